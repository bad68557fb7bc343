//! The state of the online softmax: a running maximum and a sum, in units of log2.

use crate::kernel::shape::MAX_PANEL_LANES;
use crate::simd::Simd;
use crate::simd::exp::ROUND;

/// How far above the largest score the running maximum is put when it moves, in powers of two. Scores then have to grow
/// by this much before O and l are rescaled again, while P still has 118 of its 126 binary orders of magnitude.
pub(crate) const SLACK: f32 = 8.0;

/// Beyond this, `magic - m` is no longer exact: such a lane's scores are brought near 0 by subtracting m first.
pub(in crate::kernel) const FAR: f32 = 2_097_152.0; // 2^21

/// The state of the online softmax for each lane of a panel; see [`crate::softmax::RowState`] for the one of a single row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanelState {
    /// m: an integer, in units of log2; -inf before the first visible key.
    pub(crate) max: [f32; MAX_PANEL_LANES],
    /// l: the sum of 2^(s - m).
    pub(crate) sum: [f32; MAX_PANEL_LANES],
}

impl PanelState {
    /// The state of rows that have seen nothing.
    pub(crate) const EMPTY: Self = Self { max: [f32::NEG_INFINITY; MAX_PANEL_LANES], sum: [0.0; MAX_PANEL_LANES] };
}

/// The running maximum that a largest score of `peak` sets.
#[inline(always)]
pub(in crate::kernel) fn raised<S: Simd>(simd: S, peak: S::F32) -> S::F32 {
    simd.add(simd.ceil(peak), simd.splat(SLACK))
}

/// 2^d for integers d <= 0; exactly 0 below -126. (-inf gives 0; NaN, which a maximum of +inf leads to, anything.)
#[inline(always)]
pub(in crate::kernel) fn power_of_two<S: Simd>(simd: S, d: S::F32) -> S::F32 {
    let d = simd.max(simd.splat(-127.0), d);
    simd.float_of_bits(simd.shl_i32::<23>(simd.bits(simd.add(d, simd.splat(ROUND + 127.0)))))
}

/// The running maximum, with 0 for -inf: rows that have seen nothing yet have only hidden scores, for which any will do.
#[inline(always)]
pub(in crate::kernel) fn near<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.select(simd.eq(max, simd.splat(f32::NEG_INFINITY)), simd.zero(), max)
}

/// `magic + 127 - m`.
#[inline(always)]
pub(in crate::kernel) fn base<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.sub(simd.splat(ROUND + 127.0), max)
}
