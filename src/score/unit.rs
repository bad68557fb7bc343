//! The unit of scores, and the factor of queries that gives it.

#![forbid(unsafe_code)]

use super::softcap::Softcap;
use std::f32::consts::LOG2_E;

/// The unit of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Powers of e: the unit of the definition.
    Natural,
    /// Powers of 2: the unit of the kernels' softmax.
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

/// The factor of queries: `scale` in `unit`. With a softcap it is `scale` in units of the cap, so that the product is the
/// argument of tanh.
pub(crate) fn query_factor(scale: f32, softcap: Option<Softcap>, unit: Unit) -> f32 {
    match softcap {
        Some(Softcap(cap)) => (scale as f64 / cap as f64) as f32,
        None => (scale as f64 * unit.factor() as f64) as f32,
    }
}
