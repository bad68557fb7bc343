//! Additive bias: a tensor that is added to the scores.

#![forbid(unsafe_code)]

use crate::simd::Simd;
use crate::tensor::any::AnyTensor;
use crate::tensor::group::AnyGroupRows;
use std::ops::Range;

/// A tensor of any element type, broadcast to `[batch, heads_q, seq_q, seq_kv]`.
///
/// A bias of -inf hides a key. Any other number is added to the score. The sum of f32::MIN and a score below -7e30 overflows to
/// -inf, which hides the key, too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BiasTensor<'a>(pub(crate) AnyTensor<'a>);

impl<'a> BiasTensor<'a> {
    /// `score + bias[b, h, i, j]`: the definition.
    pub(crate) fn define(&self, score: f64, [b, h, i]: [usize; 3], j: usize) -> f64 {
        score + self.0.at([b, h, i, j]) as f64
    }

    /// Whether key `j` is visible.
    pub(crate) fn sees(&self, [b, h, i]: [usize; 3], j: usize) -> bool {
        self.0.at([b, h, i, j]) != f32::NEG_INFINITY
    }

    /// The rows of a group of heads.
    pub(crate) fn rows(&self, b: usize, heads: Range<usize>) -> AnyGroupRows<'a> {
        AnyGroupRows::new(&self.0, b, heads)
    }

    /// `score + bias` for a vector of scores in a unit in which one natural unit is `unit`.
    ///
    /// * `lowest`: the lowest bias that is finite in that unit. f32::MIN is a common bias for unwanted keys, but it does not
    ///   hide them: if all keys of a row have it, they count equally. So it must not become -inf.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(simd: S, score: S::F32, bias: S::F32, lowest: S::F32, unit: S::F32) -> S::F32 {
        simd.mul_add(simd.max(lowest, bias), unit, score)
    }
}
