//! The softmax of a few rows, keys along the lanes.

use crate::kernel::prefill::softmax::weight;
use crate::kernel::state::{FAR, State, base, first_lane, power_of_two, raised};
use crate::kernel::tile::RowExtent;
use crate::simd::{Isa, Kernel, Simd};

/// What the scores of one query are like that nothing adjusts.
pub(crate) fn extent(isa: Isa, scores: &[f32]) -> RowExtent {
    isa.run(ExtentOf(scores))
}

struct ExtentOf<'a>(&'a [f32]);

impl Kernel for ExtentOf<'_> {
    type Output = RowExtent;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> RowExtent {
        // (A NaN takes away what its lane has seen. But its row becomes NaN, whatever the others are.)
        let hidden = simd.splat(f32::NEG_INFINITY);
        let (mut max, mut min) = (hidden, simd.splat(f32::INFINITY));
        let mut whole = self.0.chunks_exact(S::LANES);
        for scores in &mut whole {
            let scores = simd.load_slice(scores);
            (max, min) = (simd.max(max, scores), simd.min(min, scores));
        }
        let (mut peak, mut hides) = (simd.max_lane(max), simd.any(simd.eq(min, hidden)));
        for &score in whole.remainder() {
            (peak, hides) = (peak.max(score), hides | (score == f32::NEG_INFINITY));
        }
        RowExtent { max: peak, hides }
    }
}

/// Turns the scores of one query into weights and folds them into its state; where the maximum moves, rescales `out`.
///
/// * `scores`: whole vectors, of which the first `count` are one for each key, -inf where hidden; weights of 0 behind them
/// * `peak`: the largest of them
/// * `out`: `[value_dim rounded up]`, the values summed so far
pub(crate) fn softmax(isa: Isa, scores: (&mut [f32], usize), peak: f32, state: &mut State<1>, out: &mut [f32]) {
    let (scores, count) = scores;
    scores[count..].fill(f32::NEG_INFINITY);
    isa.run(Weights { scores, peak, state, out });
}

struct Weights<'a> {
    scores: &'a mut [f32],
    peak: f32,
    state: &'a mut State<1>,
    out: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let state = self.state;
        if state.max[0] < self.peak {
            let old = simd.splat(state.max[0]);
            let new = raised(simd, simd.splat(self.peak));
            let factor = power_of_two(simd, simd.sub(old, new));
            state.max[0] = first_lane(simd, new);
            state.sum[0] *= first_lane(simd, factor);
            scale(simd, self.out, factor);
        }
        // As `near` has it, without a way through vectors.
        let mut max = if state.max[0] == f32::NEG_INFINITY { 0.0 } else { state.max[0] };
        if max.abs() > FAR {
            self.scores.iter_mut().for_each(|score| *score -= max);
            max = 0.0;
        }
        let base = base(simd, simd.splat(max));
        let mut sum = simd.zero();
        for scores in self.scores.chunks_exact_mut(S::LANES) {
            let weight = weight(simd, simd.load_slice(scores), base);
            sum = simd.add(sum, weight);
            simd.store_slice(scores, weight);
        }
        state.sum[0] += simd.sum(sum);
    }
}

#[inline(always)]
fn scale<S: Simd>(simd: S, x: &mut [f32], factor: S::F32) {
    for x in x.chunks_exact_mut(S::LANES) {
        simd.store_slice(x, simd.mul(simd.load_slice(x), factor));
    }
}

/// Divides a row by its sum; zeros where nothing was seen.
pub(crate) fn finish(isa: Isa, state: State<1>, out: &mut [f32]) {
    isa.run(Finish { sum: state.sum[0], out });
}

struct Finish<'a> {
    sum: f32,
    out: &'a mut [f32],
}

impl Kernel for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.sum == 0.0 {
            return self.out.fill(0.0);
        }
        let inverse = simd.splat(1.0 / self.sum);
        for out in self.out.chunks_exact_mut(S::LANES) {
            // Adding +0 turns a -0, which leaves no trace in a sum that goes on, into +0.
            let value = simd.add(simd.load_slice(out), simd.zero());
            simd.store_slice(out, simd.mul(value, inverse));
        }
    }
}
