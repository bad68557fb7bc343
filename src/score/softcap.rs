//! Softcap: a smooth bound of the scores.

#![forbid(unsafe_code)]

use crate::simd::Simd;
use crate::simd::exp::tanh;

/// `cap * tanh(score / cap)`; the cap is a normal number above 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Softcap(pub(crate) f32);

impl Softcap {
    /// The definition.
    pub(crate) fn define(self, score: f64) -> f64 {
        let cap = self.0 as f64;
        cap * (score / cap).tanh()
    }

    /// Applies the softcap to a vector of scores that are in units of the cap already, by the queries' factor:
    /// `cap * tanh(score)`. `cap` is in the unit of the result.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(simd: S, score: S::F32, cap: S::F32) -> S::F32 {
        simd.mul(cap, tanh(simd, score))
    }
}
