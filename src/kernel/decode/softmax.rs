//! The softmax of few query rows, with keys along the lanes.

use crate::kernel::prefill::softmax::prob;
use crate::kernel::state::{FAR, State, base, first_lane, power_of_two, raise_max};
use crate::kernel::tile::RowExtent;
use crate::simd::{Simd, kernel};

kernel! {
    /// The extent of one query's scores, where there are no modifications.
    pub(crate) fn extent<'a, S: Simd>(simd: S, scores: &'a [f32]) -> RowExtent {
        // A NaN may hide the maximum of its lane. That does no harm, because its row becomes NaN anyway.
        let hidden = simd.splat(f32::NEG_INFINITY);
        let (mut max, mut min) = (hidden, simd.splat(f32::INFINITY));
        let mut whole = scores.chunks_exact(S::LANES);
        for scores in &mut whole {
            let scores = simd.load_slice(scores);
            (max, min) = (simd.max(max, scores), simd.min(min, scores));
        }
        let (mut row_max, mut hides) = (simd.max_lane(max), simd.any(simd.eq(min, hidden)));
        for &score in whole.remainder() {
            (row_max, hides) = (row_max.max(score), hides | (score == f32::NEG_INFINITY));
        }
        RowExtent { max: row_max, hides }
    }
}

kernel! {
    /// Turns the scores of one query into probs and adds them to its state. Where the maximum moves, rescales `out`.
    ///
    /// * `scores`: whole vectors, and the number of keys; one score for each key, -inf where hidden; the probs after the last
    ///   key are 0
    /// * `tile_max`: the largest of them
    /// * `out`: `[value_dim rounded up]`, the values summed so far
    pub(crate) fn softmax<'a, S: Simd>(
        simd: S,
        scores: (&'a mut [f32], usize),
        tile_max: f32,
        state: &'a mut State<1>,
        out: &'a mut [f32],
    ) {
        let (scores, count) = scores;
        scores[count..].fill(f32::NEG_INFINITY);
        row_softmax(simd, scores, tile_max, state, out);
    }
}

#[inline(always)]
fn row_softmax<S: Simd>(simd: S, scores: &mut [f32], tile_max: f32, state: &mut State<1>, out: &mut [f32]) {
    if state.max[0] < tile_max {
        let old = simd.splat(state.max[0]);
        let new = raise_max(simd, simd.splat(tile_max));
        let factor = power_of_two(simd, simd.sub(old, new));
        state.max[0] = first_lane(simd, new);
        state.sum[0] *= first_lane(simd, factor);
        scale(simd, out, factor);
    }
    // As `max_or_zero` of `kernel/state.rs`, for one number.
    let mut max = if state.max[0] == f32::NEG_INFINITY { 0.0 } else { state.max[0] };
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
    state.sum[0] += simd.sum(sum);
}

#[inline(always)]
fn scale<S: Simd>(simd: S, x: &mut [f32], factor: S::F32) {
    for x in x.chunks_exact_mut(S::LANES) {
        simd.store_slice(x, simd.mul(simd.load_slice(x), factor));
    }
}

kernel! {
    /// Divides a row by `divisor`; writes zeros if that is 0: the row sees no key.
    pub(crate) fn finish<'a, S: Simd>(simd: S, divisor: f32, out: &'a mut [f32]) {
        if divisor == 0.0 {
            return out.fill(0.0);
        }
        let inverse = simd.splat(1.0 / divisor);
        for out in out.chunks_exact_mut(S::LANES) {
            // Adding +0 turns -0 into +0, as any later addition would, so that the sign of a zero does not depend on how many
            // additions follow.
            let value = simd.add(simd.load_slice(out), simd.zero());
            simd.store_slice(out, simd.mul(value, inverse));
        }
    }
}
