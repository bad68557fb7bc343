//! Every operation of every level against the scalar one of the standard library.

use super::exp::{exp, exp_weight, exp2_fractions, tanh};
use super::*;

mod conversions;
mod exponentials;
mod operations;
