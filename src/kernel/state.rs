//! The state of the online softmax: a running maximum and a sum, in units of log2.

use super::shape::MAX_PANEL_LANES;
use crate::simd::exp::ROUND;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use std::f64::consts::LN_2;

/// When the running maximum moves, it is set this far above the largest score, in powers of two. O and l are rescaled again
/// only after scores have grown by this much.
pub(crate) const SLACK: f32 = 8.0;

/// 2^[`SLACK`]: probs are `PROB_UNIT * 2^(s - m)`, at most 2^8. The one that moved the maximum is about 1, unless scores are so large that
/// `SLACK` rounds away, and those that are not 0 are above 2^-119. Then their products with values of ordinary size are not denormal. Intel's processors take some 150 cycles for a
/// multiply-add that meets a denormal number, and far from the diagonal of ALiBi there are whole tiles of them: 1.7 times the time.
pub(super) const PROB_UNIT: f32 = 256.0;

/// Above this magnitude of m, `magic - m` is not exact. In such lanes, m is subtracted from the scores first.
pub(super) const FAR: f32 = 2_097_152.0; // 2^21

/// The states of `N` rows: maximum and sum of the scores so far. The states of disjoint sets of keys merge into the state of
/// their union ([`merge`]).
///
/// [`softmax::RowState`](crate::softmax::RowState) is the same in natural units. There the maximum is the largest element
/// itself, so that a plain softmax has no error from a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State<const N: usize> {
    /// m: an integer in units of log2, or -inf before the first visible key.
    pub(crate) max: [f32; N],
    /// l: the sum of `PROB_UNIT * 2^(s - m)`.
    pub(crate) sum: [f32; N],
}

/// The states of the lanes of a panel.
pub(crate) type PanelState = State<MAX_PANEL_LANES>;

impl<const N: usize> State<N> {
    /// The states over no keys.
    pub(crate) const EMPTY: Self = Self { max: [f32::NEG_INFINITY; N], sum: [0.0; N] };

    /// The log-sum-exp of row `n`'s scores and its sink, natural logarithm; -inf over no keys.
    pub(crate) fn lse(&self, n: usize, sink: Option<f32>) -> f32 {
        // In f64, because the maximum may be much larger than the logarithm of the sum. It is computed once for each row.
        let (max, sum) = (self.max[n] as f64, self.sum[n] as f64 / PROB_UNIT as f64);
        let Some(sink) = sink.map(f64::from) else {
            return if sum == 0.0 { f32::NEG_INFINITY } else { ((max + sum.log2()) * LN_2) as f32 };
        };
        // Relative to the larger of the two, so that no exponential overflows.
        let own = if sum == 0.0 { f64::NEG_INFINITY } else { (max + sum.log2()) * LN_2 };
        let (low, high) = if own < sink { (own, sink) } else { (sink, own) };
        if high == f64::NEG_INFINITY { f32::NEG_INFINITY } else { (high + (low - high).exp().ln_1p()) as f32 }
    }

    /// What row `n`'s values, summed so far, are divided by: the sum, and the sink's share in the same unit. 0 over no keys,
    /// whatever the sink, because there is nothing to divide.
    pub(crate) fn divisor(&self, n: usize, sink: Option<f32>) -> f32 {
        let (max, sum) = (self.max[n] as f64, self.sum[n]);
        match sink {
            Some(sink) if sum != 0.0 => {
                let divisor = sum as f64 + PROB_UNIT as f64 * (sink as f64 / LN_2 - max).exp2();
                // A sink far above all scores leaves nothing of the values. Their sum times 0 would be NaN if it is infinite.
                if divisor > f32::MAX as f64 { f32::MAX } else { divisor as f32 }
            }
            _ => sum,
        }
    }
}

/// The running maximum for a largest score of `largest`.
#[inline(always)]
pub(super) fn raise_max<S: Simd>(simd: S, largest: S::F32) -> S::F32 {
    simd.add(simd.ceil(largest), simd.splat(SLACK))
}

/// 2^d for integers d <= 0; exactly 0 below -126 and for -inf. NaN, which follows from a maximum of +inf, gives any number.
#[inline(always)]
pub(super) fn power_of_two<S: Simd>(simd: S, d: S::F32) -> S::F32 {
    let d = simd.max(simd.splat(-127.0), d);
    simd.float_of_bits(simd.shl_i32::<23>(simd.bits(simd.add(d, simd.splat(ROUND + 127.0)))))
}

/// The running maximum, or 0 where it is -inf. In that case all scores so far are hidden, and any finite number does.
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
        // A state over no keys has no maximum to subtract and changes nothing.
        let (State { max: [other_max], sum: [other_sum] }, State { max: [own_max], sum: [own_sum] }) =
            (self.other, *self.state);
        if other_max == f32::NEG_INFINITY && other_sum == 0.0 {
            return;
        }
        let max = if own_max < other_max { other_max } else { own_max };
        let factor = |max_before: f32| power_of_two(simd, simd.sub(simd.splat(max_before), simd.splat(max)));
        let (own_factor, other_factor) = (factor(own_max), factor(other_max));
        let sum = own_sum * first_lane(simd, own_factor) + other_sum * first_lane(simd, other_factor);
        *self.state = State { max: [max], sum: [sum] };
        for (out, other) in self.out.chunks_exact_mut(S::LANES).zip(self.other_out.chunks_exact(S::LANES)) {
            let other = simd.mul(simd.load_slice(other), other_factor);
            simd.store_slice(out, simd.add(simd.mul(simd.load_slice(out), own_factor), other));
        }
    }
}

#[inline(always)]
pub(super) fn first_lane<S: Simd>(simd: S, x: S::F32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    simd.store_slice(&mut lanes, x);
    lanes[0]
}
