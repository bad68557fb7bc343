//! Every operation of every level against the scalar one of the standard library.

use crate::element::{Bf16Pair, Element, bf16, f16};
use crate::level::Level;
use crate::simd::exp::{exp, exp_scaled, exp2_fractions, tanh};
use crate::simd::portable::Portable;
use crate::simd::{Isa, Kernel, LINE, MAX_LANES, PairDots, PairKernel, Simd, Streaming};

mod conversions;
mod exponentials;
mod operations;
mod rows;
