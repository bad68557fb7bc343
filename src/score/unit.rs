//! The units that scores are counted in, and the factor that brings them there.

#![forbid(unsafe_code)]

use super::softcap::Softcap;
use std::f32::consts::LOG2_E;

/// The unit that scores are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Powers of e, as the user's scores are.
    Natural,
    /// Powers of 2, as the softmax wants them.
    Log2,
}

impl Unit {
    /// One natural unit in this unit.
    pub(crate) fn factor(self) -> f32 {
        match self {
            Unit::Natural => 1.0,
            Unit::Log2 => LOG2_E,
        }
    }
}

/// What queries are multiplied with before the scores are formed: `scale` in `unit`s, or, with a softcap, in units of the
/// cap, so that the product is the argument of tanh.
pub(crate) fn query_factor(scale: f32, softcap: Option<Softcap>, unit: Unit) -> f32 {
    match softcap {
        Some(Softcap(cap)) => (scale as f64 / cap as f64) as f32,
        None => (scale as f64 * unit.factor() as f64) as f32,
    }
}
