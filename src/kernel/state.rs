//! The state of the online softmax: a running maximum and a sum, in units of log2.

use super::shape::MAX_PANEL_LANES;
use crate::simd::exp::ROUND;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use std::f64::consts::LN_2;

/// How far above the largest score the running maximum is put when it moves, in powers of two. Scores then have to grow
/// by this much before O and l are rescaled again, while P still has 118 of its 126 binary orders of magnitude.
pub(crate) const SLACK: f32 = 8.0;

/// Beyond this, `magic - m` is no longer exact: such a lane's scores are brought max_or_zero 0 by subtracting m first.
pub(super) const FAR: f32 = 2_097_152.0; // 2^21

/// The states of `N` rows. A state is what the softmax remembers of the scores it has seen; states of disjoint keys merge into
/// the state of all of them ([`merge`]).
///
/// [`softmax::RowState`](crate::softmax::RowState) is the same idea in natural units: there the maximum is the largest element
/// itself, so that no bit of a plain softmax depends on a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State<const N: usize> {
    /// m: an integer, in units of log2; -inf before the first visible key.
    pub(crate) max: [f32; N],
    /// l: the sum of 2^(s - m).
    pub(crate) sum: [f32; N],
}

/// The states of the lanes of a panel.
pub(crate) type PanelState = State<MAX_PANEL_LANES>;

impl<const N: usize> State<N> {
    /// The states of rows that have seen nothing.
    pub(crate) const EMPTY: Self = Self { max: [f32::NEG_INFINITY; N], sum: [0.0; N] };

    /// `log sum exp` of row `n`'s scores, natural logarithm; -inf where nothing was seen.
    pub(crate) fn lse(&self, n: usize) -> f32 {
        // In f64: the maximum may be large beside the logarithm of the sum, and this is done once a row.
        let (max, sum) = (self.max[n] as f64, self.sum[n]);
        if sum == 0.0 { f32::NEG_INFINITY } else { ((max + (sum as f64).log2()) * LN_2) as f32 }
    }
}

/// The running maximum that a largest score of `largest` sets.
#[inline(always)]
pub(super) fn raise_max<S: Simd>(simd: S, largest: S::F32) -> S::F32 {
    simd.add(simd.ceil(largest), simd.splat(SLACK))
}

/// 2^d for integers d <= 0; exactly 0 below -126. (-inf gives 0; NaN, which a maximum of +inf leads to, anything.)
#[inline(always)]
pub(super) fn power_of_two<S: Simd>(simd: S, d: S::F32) -> S::F32 {
    let d = simd.max(simd.splat(-127.0), d);
    simd.float_of_bits(simd.shl_i32::<23>(simd.bits(simd.add(d, simd.splat(ROUND + 127.0)))))
}

/// The running maximum, with 0 for -inf: rows that have seen nothing yet have only hidden scores, for which any will do.
#[inline(always)]
pub(super) fn max_or_zero<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.select(simd.eq(max, simd.splat(f32::NEG_INFINITY)), simd.zero(), max)
}

/// `magic + 127 - m`.
#[inline(always)]
pub(super) fn base<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.sub(simd.splat(ROUND + 127.0), max)
}

/// Folds the state of later keys into that of earlier ones: rescales both to the larger maximum, exactly, and adds.
///
/// * `out`, `other_out`: the values summed so far, whole vectors
pub(crate) fn merge(isa: Isa, state: &mut State<1>, out: &mut [f32], other: State<1>, other_out: &[f32]) {
    isa.run(Merge { state, out, other, other_out });
}

struct Merge<'a> {
    state: &'a mut State<1>,
    out: &'a mut [f32],
    other: State<1>,
    other_out: &'a [f32],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // A row that saw nothing there has nothing to add (and no maximum to subtract).
        let (State { max: [other_max], sum: [other_sum] }, State { max: [own_max], sum: [own_sum] }) =
            (self.other, *self.state);
        if other_max == f32::NEG_INFINITY && other_sum == 0.0 {
            return;
        }
        let max = if own_max < other_max { other_max } else { own_max };
        let factor = |own: f32| power_of_two(simd, simd.sub(simd.splat(own), simd.splat(max)));
        let (mine, theirs) = (factor(own_max), factor(other_max));
        let sum = own_sum * first_lane(simd, mine) + other_sum * first_lane(simd, theirs);
        *self.state = State { max: [max], sum: [sum] };
        for (out, other) in self.out.chunks_exact_mut(S::LANES).zip(self.other_out.chunks_exact(S::LANES)) {
            let other = simd.mul(simd.load_slice(other), theirs);
            simd.store_slice(out, simd.add(simd.mul(simd.load_slice(out), mine), other));
        }
    }
}

#[inline(always)]
pub(super) fn first_lane<S: Simd>(simd: S, x: S::F32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    simd.store_slice(&mut lanes, x);
    lanes[0]
}
