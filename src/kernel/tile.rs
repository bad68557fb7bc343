//! A tile of scores: score modifications applied, hidden keys set to -inf.

use super::arithmetic::F32Fma;
use super::score_tensors::PanelTensors;
use super::transpose::{LaneRows, load_block, load_mask};
use crate::element::{ByElement, Element, bf16, f16};
use crate::score::{Alibi, BiasTensor, Softcap, Unit};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use std::ops::Range;

/// What happens to the scores of one tile, but for what tensors say of a panel; for a panel each entry has one value a lane, for
/// a row only one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileMods<'a> {
    pub(crate) unit: Unit,
    pub(crate) softcap: Option<Softcap>,
    /// Added to the scores of a row, in natural units; -inf hides.
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

impl TileMods<'_> {
    /// Whether there is anything to do.
    pub(crate) fn is_none(&self) -> bool {
        self.softcap.is_none() && self.bias.is_none() && self.alibi.is_none() && self.visible.is_none()
    }
}

/// Adjusts the scores of a panel, `[keys][lanes]`, and raises `max[lane]` to the largest of each lane.
///
/// * `tensors`: bias and mask, if there are any, and the number in their rows of the first of these keys
pub(crate) fn modify_panel(
    isa: Isa,
    mods: TileMods<'_>,
    tensors: Option<(&PanelTensors<'_>, usize)>,
    scores: &mut [f32],
    max: &mut [f32],
) {
    assert!(mods.bias.is_none(), "a panel's bias is among its tensors");
    isa.run(ModifyPanel { mods, tensors, scores, max });
}

/// What the adjusted scores of one query are like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowExtent {
    /// The largest; NaN may be ignored.
    pub(crate) max: f32,
    /// Whether any is -inf: its key is hidden, or counts for nothing.
    pub(crate) hides: bool,
}

/// Adjusts the scores of one query, one for each key.
pub(crate) fn modify_row(isa: Isa, mods: TileMods<'_>, scores: &mut [f32]) -> RowExtent {
    isa.run(ModifyRow { mods, scores })
}

/// The steps of an adjustment, a bit each, in the order of `score.rs`.
mod step {
    pub(super) const CAP: u8 = 1;
    pub(super) const BIAS: u8 = 2;
    pub(super) const ALIBI: u8 = 4;
    // What hides comes last, and is selected, not added: a NaN score plus -inf would show.
    pub(super) const HIDE_BY_BIAS: u8 = 8;
    pub(super) const HIDE_BY_MASK: u8 = 16;
    pub(super) const HIDE_BY_POSITION: u8 = 32;

    /// What a bias does.
    pub(super) const fn of_bias(only_hides: bool) -> u8 {
        if only_hides { HIDE_BY_BIAS } else { BIAS | HIDE_BY_BIAS }
    }
}

impl TileMods<'_> {
    /// The steps that there are.
    fn steps(&self) -> u8 {
        [
            (self.softcap.is_some(), step::CAP),
            (self.bias.is_some(), step::of_bias(self.only_hides)),
            (self.alibi.is_some(), step::ALIBI),
            (self.visible.is_some(), step::HIDE_BY_POSITION),
        ]
        .into_iter()
        .fold(0, |steps, (there, step)| if there { steps | step } else { steps })
    }
}

/// What is known of a vector of pairs; anything where no step asks for it.
#[derive(Clone, Copy)]
struct Pair<S: Simd> {
    bias: S::F32,
    /// What a boolean mask says.
    attends: S::Mask,
    /// The key's number in its tile.
    key: S::F32,
}

/// The numbers of an [`TileMods`] in vectors, whichever way queries and keys lie; 0 for steps that there are not.
struct Terms<S: Simd> {
    simd: S,
    unit: S::F32,
    /// The lowest bias that is finite in that unit.
    lowest: S::F32,
    cap: S::F32,
    slope: S::F32,
    position: S::F32,
    /// The first visible key and the one after the last.
    start: S::F32,
    end: S::F32,
}

impl<S: Simd> Terms<S> {
    #[inline(always)]
    fn new(simd: S, mods: &TileMods<'_>, vector: impl Fn(&[f32]) -> S::F32) -> Self {
        let (unit, zero) = (mods.unit.factor(), simd.zero());
        let (slope, position) = mods.alibi.map_or((zero, zero), |(slope, at)| {
            // Kept finite: infinity times the distance 0 would be NaN.
            let slope = simd.min(simd.splat(f32::MAX), simd.mul(simd.splat(unit), vector(slope)));
            (simd.max(simd.splat(f32::MIN), slope), vector(at))
        });
        let (start, end) = mods.visible.map_or((zero, zero), |(start, end)| (vector(start), vector(end)));
        Self {
            simd,
            unit: simd.splat(unit),
            lowest: simd.splat(f32::MIN / unit),
            cap: simd.splat(mods.softcap.map_or(0.0, |Softcap(cap)| cap) * unit),
            slope,
            position,
            start,
            end,
        }
    }

    /// Takes `STEPS` with the scores of a vector of pairs; the others cost nothing.
    #[inline(always)]
    fn apply<const STEPS: u8>(&self, mut score: S::F32, pair: Pair<S>) -> S::F32 {
        let (simd, Pair { bias, attends, key }) = (self.simd, pair);
        let hidden = simd.splat(f32::NEG_INFINITY);
        if STEPS & step::CAP != 0 {
            score = Softcap::apply(simd, score, self.cap);
        }
        if STEPS & step::BIAS != 0 {
            score = BiasTensor::apply(simd, score, bias, self.lowest, self.unit);
        }
        if STEPS & step::ALIBI != 0 {
            score = Alibi::apply(simd, score, self.slope, self.position, key);
        }
        if STEPS & step::HIDE_BY_BIAS != 0 {
            score = simd.select(simd.eq(bias, hidden), hidden, score);
        }
        if STEPS & step::HIDE_BY_MASK != 0 {
            score = simd.select(attends, score, hidden);
        }
        if STEPS & step::HIDE_BY_POSITION != 0 {
            let sees = simd.and(simd.le(self.start, key), simd.lt(key, self.end));
            score = simd.select(sees, score, hidden);
        }
        score
    }
}

/// Scores that are passed over, whichever way they lie.
trait Passes<S: Simd> {
    /// Takes some steps with each score, and finds what the scores then are like.
    fn pass<const STEPS: u8>(&mut self, simd: S);
}

/// Takes `steps`, each in a pass of its own (but for a bias, which is read once): so each pass is a loop without branches.
/// Without steps, there is still a pass.
#[inline(always)]
fn take<S: Simd>(simd: S, steps: u8, scores: &mut impl Passes<S>) {
    const BIAS_THAT_HIDES: u8 = step::BIAS | step::HIDE_BY_BIAS;
    if steps == 0 {
        scores.pass::<0>(simd);
    }
    if steps & step::CAP != 0 {
        scores.pass::<{ step::CAP }>(simd);
    }
    match steps & (BIAS_THAT_HIDES | step::ALIBI) {
        BIAS_THAT_HIDES => scores.pass::<BIAS_THAT_HIDES>(simd),
        together => {
            if together & step::BIAS != 0 {
                scores.pass::<{ step::BIAS }>(simd);
            }
            if together & step::ALIBI != 0 {
                scores.pass::<{ step::ALIBI }>(simd);
            }
            if together & step::HIDE_BY_BIAS != 0 {
                scores.pass::<{ step::HIDE_BY_BIAS }>(simd);
            }
        }
    }
    if steps & step::HIDE_BY_MASK != 0 {
        scores.pass::<{ step::HIDE_BY_MASK }>(simd);
    }
    if steps & step::HIDE_BY_POSITION != 0 {
        scores.pass::<{ step::HIDE_BY_POSITION }>(simd);
    }
}

struct ModifyPanel<'a> {
    mods: TileMods<'a>,
    tensors: Option<(&'a PanelTensors<'a>, usize)>,
    scores: &'a mut [f32],
    max: &'a mut [f32],
}

impl Kernel for ModifyPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ModifyPanel { mods, tensors, scores, max } = self;
        let lanes = max.len();
        let steps = mods.steps() | tensors.map_or(0, |(tensors, _)| tensors.steps());
        for at in (0..lanes).step_by(S::LANES) {
            let terms = Terms::new(simd, &mods, |x| simd.load_slice(&x[at..]));
            let before = simd.load_slice(&max[at..]);
            let place = (lanes, at);
            let mut vectors =
                LaneVectors { first: mods.first, terms, tensors, scores: &mut *scores, place, before, max: before };
            take(simd, steps, &mut vectors);
            simd.store_slice(&mut max[at..], vectors.max);
        }
    }
}

impl PanelTensors<'_> {
    fn steps(&self) -> u8 {
        let bias = self.bias.as_ref().map_or(0, |_| step::of_bias(self.only_hides));
        let mask = self.mask.as_ref().map_or(0, |_| step::HIDE_BY_MASK);
        bias | mask
    }
}

/// One vector of lanes of a panel, key after key.
struct LaneVectors<'a, S: Simd> {
    /// The number of the first key in its tile.
    first: usize,
    terms: Terms<S>,
    tensors: Option<(&'a PanelTensors<'a>, usize)>,
    scores: &'a mut [f32],
    /// The panel's lanes, and the first of these.
    place: (usize, usize),
    /// The largest score of each lane, of keys before these, and of all.
    before: S::F32,
    max: S::F32,
}

impl<S: Simd> Passes<S> for LaneVectors<'_, S> {
    #[inline(always)]
    fn pass<const STEPS: u8>(&mut self, simd: S) {
        self.max = self.before;
        match self.tensors {
            Some((tensors, at)) if STEPS & step::HIDE_BY_MASK != 0 => {
                self.transposed::<STEPS, f32>(simd, (None, tensors.mask.as_ref()), at);
            }
            Some((tensors, at)) if STEPS & (step::BIAS | step::HIDE_BY_BIAS) != 0 => match &tensors.bias {
                None => unreachable!("a step of a bias, without one"),
                Some(ByElement::F32(bias)) => self.transposed::<STEPS, f32>(simd, (Some(bias), None), at),
                Some(ByElement::F16(bias)) => self.transposed::<STEPS, f16>(simd, (Some(bias), None), at),
                Some(ByElement::Bf16(bias)) => self.transposed::<STEPS, bf16>(simd, (Some(bias), None), at),
            },
            _ => self.plain::<STEPS>(simd),
        }
    }
}

impl<S: Simd> LaneVectors<'_, S> {
    /// Steps that need no tensor.
    #[inline(always)]
    fn plain<const STEPS: u8>(&mut self, simd: S) {
        let (lanes, lane) = self.place;
        let mut key = self.first as f32;
        let mut max = self.max;
        for scores in self.scores.chunks_exact_mut(lanes) {
            let scores = &mut scores[lane..lane + S::LANES];
            let pair = Pair { key: simd.splat(key), ..Pair::none(simd) };
            let score = self.terms.apply::<STEPS>(simd.load_slice(scores), pair);
            max = simd.max(max, score);
            simd.store_slice(scores, score);
            key += 1.0;
        }
        self.max = max;
    }

    /// Steps that need bias or mask, whose rows lie along the keys: a square block of them at a time, transposed in registers.
    ///
    /// * `at`: the number in those rows of the first key
    #[inline(always)]
    fn transposed<const STEPS: u8, T: Element>(
        &mut self,
        simd: S,
        (bias, mask): (Option<&LaneRows<'_, T>>, Option<&LaneRows<'_, u8>>),
        at: usize,
    ) {
        let keys = self.scores.len() / self.place.0;
        let whole = keys / S::LANES * S::LANES;
        for first in (0..whole).step_by(S::LANES) {
            self.block::<STEPS, T>(simd, (bias, mask), at + first, first..first + S::LANES);
        }
        if whole < keys {
            let bias = bias.map(|rows| rows.rest(at + whole));
            let mask = mask.map(|rows| rows.rest(at + whole));
            let (bias, mask) = (bias.as_ref().map(LaneRows::of_rest), mask.as_ref().map(LaneRows::of_rest));
            self.block::<STEPS, T>(simd, (bias.as_ref(), mask.as_ref()), 0, whole..keys);
        }
    }

    /// At most `LANES` keys; the rows have as many elements from `at` on.
    #[inline(always)]
    fn block<const STEPS: u8, T: Element>(
        &mut self,
        simd: S,
        (bias, mask): (Option<&LaneRows<'_, T>>, Option<&LaneRows<'_, u8>>),
        at: usize,
        keys: Range<usize>,
    ) {
        let (lanes, lane) = self.place;
        let none = Pair::none(simd);
        let biases = match bias {
            Some(bias) => simd.transpose(load_block((simd, F32Fma::new()), bias, lane, at)),
            None => [none.bias; MAX_LANES],
        };
        let answers = match mask {
            Some(mask) => simd.transpose_masks(load_mask(simd, mask, lane, at)),
            None => [none.attends; MAX_LANES],
        };
        let scores = &mut self.scores[keys.start * lanes..keys.end * lanes];
        assert!(keys.len() <= S::LANES && lane + S::LANES <= lanes);
        for n in 0..S::LANES {
            if n == keys.len() {
                break;
            }
            let to = scores.as_mut_ptr().wrapping_add(n * lanes + lane);
            let pair = Pair { bias: biases[n], attends: answers[n], ..none };
            // SAFETY: lanes from `lane` on of one of the `lanes` scores of key n, which is one of `keys`.
            let score = self.terms.apply::<STEPS>(unsafe { simd.load(to) }, pair);
            self.max = simd.max(self.max, score);
            // SAFETY: as above.
            unsafe { simd.store(to, score) };
        }
    }
}

impl<S: Simd> Pair<S> {
    /// Of which nothing is known.
    #[inline(always)]
    fn none(simd: S) -> Self {
        Pair { bias: simd.zero(), attends: simd.eq(simd.zero(), simd.zero()), key: simd.zero() }
    }
}

struct ModifyRow<'a> {
    mods: TileMods<'a>,
    scores: &'a mut [f32],
}

impl Kernel for ModifyRow<'_> {
    type Output = RowExtent;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> RowExtent {
        let ModifyRow { mods, scores } = self;
        let terms = Terms::new(simd, &mods, |x| simd.splat(x[0]));
        let mut row = KeyVectors { mods: &mods, terms, scores, max: simd.zero(), hides: simd.zero() };
        take(simd, mods.steps(), &mut row);
        RowExtent { max: simd.max_lane(row.max), hides: simd.max_lane(row.hides) > 0.0 }
    }
}

/// The scores of one query, keys along the lanes.
struct KeyVectors<'a, S: Simd> {
    mods: &'a TileMods<'a>,
    terms: Terms<S>,
    scores: &'a mut [f32],
    /// The largest score of each lane.
    max: S::F32,
    /// Above 0 where a score is -inf.
    hides: S::F32,
}

impl<S: Simd> Passes<S> for KeyVectors<'_, S> {
    #[inline(always)]
    fn pass<const STEPS: u8>(&mut self, simd: S) {
        let none = simd.splat(f32::NEG_INFINITY);
        let (mut max, mut hides) = (none, simd.zero());
        for (c, scores) in self.scores.chunks_mut(S::LANES).enumerate() {
            let first = c * S::LANES;
            let key = simd.add(simd.splat((self.mods.first + first) as f32), simd.lane_numbers());
            let bias = match self.mods.bias {
                Some(bias) if STEPS & (step::BIAS | step::HIDE_BY_BIAS) != 0 => {
                    simd.load_part(&bias[first..first + scores.len()], 0.0)
                }
                _ => simd.zero(),
            };
            let pair = Pair { bias, key, ..Pair::none(simd) };
            let score = self.terms.apply::<STEPS>(simd.load_part(scores, f32::NEG_INFINITY), pair);
            simd.store_part(scores, score);
            // Read back twice, for lanes behind the last key: they are neither the largest nor hidden.
            max = simd.max(max, simd.load_part(scores, f32::NEG_INFINITY));
            hides = simd.select(simd.eq(simd.load_part(scores, 0.0), none), simd.splat(1.0), hides);
        }
        (self.max, self.hides) = (max, hides);
    }
}
