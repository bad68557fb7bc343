//! Dot products of pairs of bf16, for the levels that have an instruction for them.

use crate::element::{Bf16Pair, bf16};
use crate::simd::vector::Simd;

/// Work that is compiled for every level that has [`PairDots`]. Implementations mark `run` as `#[inline(always)]`.
pub(crate) trait PairKernel {
    type Output;
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) -> Self::Output;
}

/// Dot products of pairs of bf16. A vector of `LANES` pairs is carried as an `S::F32`. No f32 arithmetic is done on it.
///
/// # Safety
/// Unsafe code relies on what an implementation reads:
/// * [`load_pairs`](Self::load_pairs) reads `LANES` pairs and nothing else.
/// * [`broadcast`](Self::broadcast) and [`add_dots_at`](Self::add_dots_at) read one pair and nothing else.
pub(crate) unsafe trait PairDots<S: Simd>: Copy {
    /// Reads `LANES` pairs from `p`.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` pairs
    unsafe fn load_pairs(self, p: *const Bf16Pair) -> S::F32;
    /// The elements of `x`, at most `2 * LANES`, as pairs; zeros after the last one.
    fn load_pairs_part(self, x: &[bf16]) -> S::F32;
    /// In every lane, `c + a.second * b.second`, rounded, plus `a.first * b.first`, rounded. The products are exact.
    /// **Denormal numbers count as 0**, as operands and as results. The rounding is to nearest in every rounding mode of the
    /// thread.
    fn add_dots(self, a: S::F32, b: S::F32, c: S::F32) -> S::F32;
    /// One pair in every lane.
    ///
    /// # Safety
    /// * `a` is valid for reads
    unsafe fn broadcast(self, a: *const Bf16Pair) -> S::F32;
    /// [`PairDots::add_dots`] with one pair, `a`, in every lane.
    ///
    /// # Safety
    /// * `a` is valid for reads
    unsafe fn add_dots_at(self, a: *const Bf16Pair, b: S::F32, c: S::F32) -> S::F32;
}
