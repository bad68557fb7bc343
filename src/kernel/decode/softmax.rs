//! The softmax of a few rows, keys along the lanes.

use crate::kernel::prefill::softmax::prob;
use crate::kernel::state::{FAR, base, power_of_two, raised};
use crate::kernel::tile::Extent;
use crate::simd::{MAX_LANES, Simd, kernel};

/// The state of one row, in units of log2; `max` is an integer. See `prefill/softmax.rs`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowMax {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl RowMax {
    /// The state of a row that has seen nothing.
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

kernel! {
    /// The extent of scores that nothing adjusts, of one query.
    pub(crate) fn extent<'a, S: Simd>(simd: S, scores: &'a [f32]) -> Extent {
        // (A NaN hides what its lane has met before. But its row becomes NaN, whatever the others are.)
        let hidden = simd.splat(f32::NEG_INFINITY);
        let (mut max, mut min) = (hidden, simd.splat(f32::INFINITY));
        let mut whole = scores.chunks_exact(S::LANES);
        for scores in &mut whole {
            let scores = simd.load_slice(scores);
            (max, min) = (simd.max(max, scores), simd.min(min, scores));
        }
        let (mut peak, mut hides) = (simd.max_lane(max), simd.any(simd.eq(min, hidden)));
        for &score in whole.remainder() {
            (peak, hides) = (peak.max(score), hides | (score == f32::NEG_INFINITY));
        }
        Extent { peak, hides }
    }
}

kernel! {
    /// Turns the scores of one query into probs and folds them into its state. Where the maximum moves, rescales `out`.
    ///
    /// * `scores`: whole vectors, of which the first `count` are one for each key, -inf where hidden; probs of 0 behind them
    /// * `tile_max`: the largest of them
    /// * `out`: `[value_dim rounded up]`, the values summed so far
    pub(crate) fn weights<'a, S: Simd>(
        simd: S,
        scores: (&'a mut [f32], usize),
        tile_max: f32,
        state: &'a mut RowMax,
        out: &'a mut [f32],
    ) {
        let (scores, count) = scores;
        scores[count..].fill(f32::NEG_INFINITY);
        row_softmax(simd, scores, tile_max, state, out);
    }
}

#[inline(always)]
fn row_softmax<S: Simd>(simd: S, scores: &mut [f32], tile_max: f32, state: &mut RowMax, out: &mut [f32]) {
    if state.max < tile_max {
        let old = simd.splat(state.max);
        let new = raised(simd, simd.splat(tile_max));
        let factor = power_of_two(simd, simd.sub(old, new));
        state.max = first_lane(simd, new);
        state.sum *= first_lane(simd, factor);
        scale(simd, out, factor);
    }
    // As `near` has it, without a way through vectors.
    let mut max = if state.max == f32::NEG_INFINITY { 0.0 } else { state.max };
    if max.abs() > FAR {
        scores.iter_mut().for_each(|score| *score -= max);
        max = 0.0;
    }
    let base = base(simd, simd.splat(max));
    let mut sum = simd.zero();
    for scores in scores.chunks_exact_mut(S::LANES) {
        let prob = prob(simd, simd.load_slice(scores), base);
        sum = simd.add(sum, prob);
        simd.store_slice(scores, prob);
    }
    state.sum += simd.sum(sum);
}

#[inline(always)]
fn first_lane<S: Simd>(simd: S, x: S::F32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    simd.store_slice(&mut lanes, x);
    lanes[0]
}

/// What a sum of the maximum `own` is multiplied with where the maximum is `max`.
#[inline(always)]
fn factor<S: Simd>(simd: S, own: f32, max: f32) -> S::F32 {
    power_of_two(simd, simd.sub(simd.splat(own), simd.splat(max)))
}

#[inline(always)]
fn scale<S: Simd>(simd: S, x: &mut [f32], factor: S::F32) {
    for x in x.chunks_exact_mut(S::LANES) {
        simd.store_slice(x, simd.mul(simd.load_slice(x), factor));
    }
}

kernel! {
    /// Folds the state of later keys into that of earlier ones: rescales both to the larger maximum, exactly, and adds.
    ///
    /// * `out`, `other_out`: the values summed so far, whole vectors
    pub(crate) fn merge<'a, S: Simd>(
        simd: S,
        state: &'a mut RowMax,
        out: &'a mut [f32],
        other: RowMax,
        other_out: &'a [f32],
    ) {
        // A row that saw nothing there has nothing to add (and no maximum to subtract).
        if other.max == f32::NEG_INFINITY && other.sum == 0.0 {
            return;
        }
        let max = if state.max < other.max { other.max } else { state.max };
        let (mine, theirs) = (factor(simd, state.max, max), factor(simd, other.max, max));
        state.sum = state.sum * first_lane(simd, mine) + other.sum * first_lane(simd, theirs);
        state.max = max;
        for (out, other) in out.chunks_exact_mut(S::LANES).zip(other_out.chunks_exact(S::LANES)) {
            let other = simd.mul(simd.load_slice(other), theirs);
            simd.store_slice(out, simd.add(simd.mul(simd.load_slice(out), mine), other));
        }
    }
}

kernel! {
    /// Divides a row by its sum; zeros where nothing was seen.
    pub(crate) fn finish<'a, S: Simd>(simd: S, state: RowMax, out: &'a mut [f32]) {
        if state.sum == 0.0 {
            return out.fill(0.0);
        }
        let inverse = simd.splat(1.0 / state.sum);
        for out in out.chunks_exact_mut(S::LANES) {
            // Adding +0 turns a -0, which leaves no trace in a sum that goes on, into +0.
            let value = simd.add(simd.load_slice(out), simd.zero());
            simd.store_slice(out, simd.mul(value, inverse));
        }
    }
}
