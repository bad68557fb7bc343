//! From raw scores to those that the softmax sees: softcap, bias, ALiBi, and -inf for hidden keys.

use crate::simd::exp::tanh;
use crate::simd::{Isa, Kernel, Simd};
use std::f32::consts::LOG2_E;

/// The unit that scores are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Powers of e, as the user's scores are.
    Natural,
    /// Powers of 2, as the softmax wants them.
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

/// What queries are multiplied with before the scores are formed: `scale` in `unit`s, or, with a softcap, in units of the
/// cap, so that the product is the argument of tanh.
pub(crate) fn query_factor(scale: f32, softcap: Option<f32>, unit: Unit) -> f32 {
    match softcap {
        Some(cap) => (scale as f64 / cap as f64) as f32,
        None => (scale as f64 * unit.factor() as f64) as f32,
    }
}

/// What happens to the scores of one tile; for a panel each entry has one value a lane, for a row only one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adjust<'a> {
    pub(crate) unit: Unit,
    pub(crate) softcap: Option<f32>,
    /// Added to the scores, in natural units, and laid out as they are; -inf hides.
    pub(crate) bias: Option<&'a [f32]>,
    /// Whether all of the bias is 0 or -inf, so that there is nothing to add.
    pub(crate) only_hides: bool,
    /// The number of the first of these keys in its tile.
    pub(crate) first: usize,
    /// ALiBi's slopes, and the positions of the queries counted from the tile's first key.
    pub(crate) alibi: Option<(&'a [f32], &'a [f32])>,
    /// First visible key and the one after the last, counted from the tile's first key.
    pub(crate) visible: Option<(&'a [f32], &'a [f32])>,
}

impl Adjust<'_> {
    /// Whether there is anything to do.
    pub(crate) fn is_none(&self) -> bool {
        self.softcap.is_none() && self.bias.is_none() && self.alibi.is_none() && self.visible.is_none()
    }
}

/// Adjusts the scores of a panel, `[keys][lanes]`, and raises `max[lane]` to the largest of each lane.
pub(crate) fn adjust_panel(isa: Isa, adjust: Adjust<'_>, scores: &mut [f32], max: &mut [f32]) {
    isa.run(AdjustPanel { adjust, scores, max });
}

/// What the adjusted scores of one query are like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// The largest; NaN may be ignored.
    pub(crate) peak: f32,
    /// Whether any is -inf: its key is hidden, or counts for nothing.
    pub(crate) hides: bool,
}

/// Adjusts the scores of one query, one for each key.
pub(crate) fn adjust_row(isa: Isa, adjust: Adjust<'_>, scores: &mut [f32]) -> Extent {
    isa.run(AdjustRow { adjust, scores })
}

/// [`Adjust`] with its numbers in vectors, whichever way queries and keys lie.
struct Terms<S: Simd> {
    simd: S,
    unit: S::F32,
    /// The lowest bias that is finite in that unit.
    lowest: S::F32,
    cap: Option<S::F32>,
    only_hides: bool,
    alibi: Option<(S::F32, S::F32)>,
    visible: Option<(S::F32, S::F32)>,
}

impl<S: Simd> Terms<S> {
    #[inline(always)]
    fn new(simd: S, adjust: &Adjust<'_>, vector: impl Fn(&[f32]) -> S::F32) -> Self {
        let unit = adjust.unit.factor();
        Self {
            simd,
            unit: simd.splat(unit),
            lowest: simd.splat(f32::MIN / unit),
            only_hides: adjust.only_hides,
            cap: adjust.softcap.map(|cap| simd.splat(cap * unit)),
            alibi: adjust.alibi.map(|(slope, at)| {
                // Kept finite: infinity times the distance 0 would be NaN.
                let slope = simd.min(simd.splat(f32::MAX), simd.mul(simd.splat(unit), vector(slope)));
                (simd.max(simd.splat(f32::MIN), slope), vector(at))
            }),
            visible: adjust.visible.map(|(start, end)| (vector(start), vector(end))),
        }
    }

    /// The order of things, as `bias.rs` has it.
    #[inline(always)]
    fn apply(&self, mut score: S::F32, bias: Option<S::F32>, key: S::F32) -> S::F32 {
        let simd = self.simd;
        let hidden = simd.splat(f32::NEG_INFINITY);
        if let Some(cap) = self.cap {
            score = simd.mul(cap, tanh(simd, score));
        }
        if let Some(bias) = bias.filter(|_| !self.only_hides) {
            // f32::MIN is a common bias of keys that are to count for nothing. It does not hide them: in a row where all
            // have it they count alike, so it must not become -inf.
            score = simd.mul_add(simd.max(self.lowest, bias), self.unit, score);
        }
        if let Some((slope, position)) = self.alibi {
            score = simd.sub(score, simd.mul(slope, simd.abs(simd.sub(position, key))));
        }
        // What hides comes last, and is selected, not added: a NaN score plus -inf would show.
        if let Some(bias) = bias {
            score = simd.select(simd.eq(bias, hidden), hidden, score);
        }
        if let Some((start, end)) = self.visible {
            let sees = simd.and(simd.le(start, key), simd.lt(key, end));
            score = simd.select(sees, score, hidden);
        }
        score
    }
}

struct AdjustPanel<'a> {
    adjust: Adjust<'a>,
    scores: &'a mut [f32],
    max: &'a mut [f32],
}

impl Kernel for AdjustPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let lanes = self.max.len();
        for at in (0..lanes).step_by(S::LANES) {
            let terms = Terms::new(simd, &self.adjust, |x| simd.load_slice(&x[at..]));
            let mut max = simd.load_slice(&self.max[at..]);
            for (j, scores) in self.scores.chunks_exact_mut(lanes).enumerate() {
                let bias = bias_at(simd, &self.adjust, j * lanes + at, S::LANES);
                let score =
                    terms.apply(simd.load_slice(&scores[at..]), bias, simd.splat((self.adjust.first + j) as f32));
                max = simd.max(max, score);
                simd.store_slice(&mut scores[at..], score);
            }
            simd.store_slice(&mut self.max[at..], max);
        }
    }
}

/// Up to a vector of the bias, if there is one.
#[inline(always)]
fn bias_at<S: Simd>(simd: S, adjust: &Adjust<'_>, at: usize, len: usize) -> Option<S::F32> {
    Some(simd.load_part(&adjust.bias?[at..at + len], 0.0))
}

struct AdjustRow<'a> {
    adjust: Adjust<'a>,
    scores: &'a mut [f32],
}

impl Kernel for AdjustRow<'_> {
    type Output = Extent;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Extent {
        let terms = Terms::new(simd, &self.adjust, |x| simd.splat(x[0]));
        let none = simd.splat(f32::NEG_INFINITY);
        let one = simd.splat(1.0);
        let (mut max, mut hides) = (none, simd.zero());
        for (c, scores) in self.scores.chunks_mut(S::LANES).enumerate() {
            let first = c * S::LANES;
            let key = simd.add(simd.splat((self.adjust.first + first) as f32), simd.lane_numbers());
            let bias = bias_at(simd, &self.adjust, first, scores.len());
            let score = terms.apply(simd.load_part(scores, f32::NEG_INFINITY), bias, key);
            simd.store_part(scores, score);
            // Read back twice, for lanes behind the last key: they are neither the largest nor hidden.
            max = simd.max(max, simd.load_part(scores, f32::NEG_INFINITY));
            hides = simd.select(simd.eq(simd.load_part(scores, 0.0), none), one, hides);
        }
        Extent { peak: simd.max_lane(max), hides: simd.max_lane(hides) > 0.0 }
    }
}
