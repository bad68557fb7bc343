//! Applies score modifications and masks to a tile of scores. Hidden keys get -inf.

use super::lane_elements::LaneElements;
use super::score_tensors::PanelTensors;
use super::transpose::LaneRows;
use crate::element::{ByElement, Element, bf16, f16};
use crate::score::{Alibi, BiasTensor, Softcap, Unit};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use std::ops::Range;

/// The parameters of the modifications of one tile, apart from a panel's tensors. A slice has one element for each lane of a
/// panel, or one element for a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileMods<'a> {
    pub(crate) unit: Unit,
    pub(crate) softcap: Option<Softcap>,
    /// The bias of a row's scores, in natural units; -inf hides a key.
    pub(crate) bias: Option<&'a [f32]>,
    /// Whether every bias is 0 or -inf, so that none has to be added.
    pub(crate) only_hides: bool,
    /// The index in the tile of the first key.
    pub(crate) first: usize,
    /// ALiBi's slopes, and the query positions, counted from the tile's first key.
    pub(crate) alibi: Option<(&'a [f32], &'a [f32])>,
    /// First visible key and the one after the last, counted from the tile's first key.
    pub(crate) visible: Option<(&'a [f32], &'a [f32])>,
}

impl TileMods<'_> {
    /// Whether there are no modifications.
    pub(crate) fn is_none(&self) -> bool {
        self.softcap.is_none() && self.bias.is_none() && self.alibi.is_none() && self.visible.is_none()
    }

    /// The steps that are needed.
    fn steps(&self) -> u8 {
        [
            (self.softcap.is_some(), step::CAP),
            (self.bias.is_some(), step::of_bias(self.only_hides)),
            (self.alibi.is_some(), step::ALIBI),
            (self.visible.is_some(), step::HIDE_BY_POSITION),
        ]
        .into_iter()
        .fold(0, |steps, (needed, step)| if needed { steps | step } else { steps })
    }
}

/// Which steps are applied: all at once, or two passes with users' functions between them (`open_mods.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    All,
    /// What changes scores.
    Scores,
    /// What hides keys.
    Hides,
}

impl Pass {
    fn steps(self) -> u8 {
        match self {
            Pass::All => u8::MAX,
            Pass::Scores => step::CAP | step::BIAS | step::ALIBI,
            Pass::Hides => step::HIDE_BY_BIAS | step::HIDE_BY_MASK | step::HIDE_BY_POSITION,
        }
    }
}

/// Modifies the scores of a panel, `[keys][lanes]`, and raises `max[lane]` to the largest of each lane.
///
/// * `tensors`: bias and mask, if there are any, and the index in their rows of the first key
pub(crate) fn modify_panel(
    isa: Isa,
    pass: Pass,
    mods: TileMods<'_>,
    tensors: Option<(&PanelTensors<'_>, usize)>,
    scores: &mut [f32],
    max: &mut [f32],
) {
    assert!(mods.bias.is_none(), "a panel's bias is among its tensors");
    isa.run(ModifyPanel { pass, mods, tensors, scores, max });
}

/// The extent of one query's modified scores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowExtent {
    /// The largest score; NaN may be ignored.
    pub(crate) max: f32,
    /// Whether any score is -inf, which hides its key.
    pub(crate) hides: bool,
}

/// Modifies the scores of one query, one for each key.
pub(crate) fn modify_row(isa: Isa, pass: Pass, mods: TileMods<'_>, scores: &mut [f32]) -> RowExtent {
    isa.run(ModifyRow { pass, mods, scores })
}

/// The steps of a modification, one bit each, in the order of `score.rs`.
mod step {
    pub(super) const CAP: u8 = 1;
    pub(super) const BIAS: u8 = 2;
    pub(super) const ALIBI: u8 = 4;
    // Steps that hide come last. They select -inf and don't add it, because a NaN score plus -inf is NaN.
    pub(super) const HIDE_BY_BIAS: u8 = 8;
    pub(super) const HIDE_BY_MASK: u8 = 16;
    pub(super) const HIDE_BY_POSITION: u8 = 32;

    /// The steps of a bias.
    pub(super) const fn of_bias(only_hides: bool) -> u8 {
        if only_hides { HIDE_BY_BIAS } else { BIAS | HIDE_BY_BIAS }
    }
}

/// The inputs of a vector of (query, key) pairs. An input that no step reads may be anything.
#[derive(Clone, Copy)]
struct PairInputs<S: Simd> {
    bias: S::F32,
    /// The boolean mask.
    attends: S::Mask,
    /// The key's index in its tile.
    key: S::F32,
}

/// The parameters of [`TileMods`] as vectors, for queries or keys along the lanes; 0 for steps that are not needed.
struct ModVectors<S: Simd> {
    simd: S,
    unit: S::F32,
    /// The lowest bias that is finite in that unit.
    lowest: S::F32,
    cap: S::F32,
    slope: S::F32,
    position: S::F32,
    /// The first visible key, and the one after the last.
    start: S::F32,
    end: S::F32,
}

impl<S: Simd> ModVectors<S> {
    #[inline(always)]
    fn new(simd: S, mods: &TileMods<'_>, vector: impl Fn(&[f32]) -> S::F32) -> Self {
        let (unit, zero) = (mods.unit.factor(), simd.zero());
        let (slope, position) = mods.alibi.map_or((zero, zero), |(slope, at)| {
            // Kept finite, because infinity times a distance of 0 is NaN.
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

    /// Applies `STEPS` to the scores of a vector of pairs. Other steps are not compiled.
    #[inline(always)]
    fn apply<const STEPS: u8>(&self, mut score: S::F32, pair: PairInputs<S>) -> S::F32 {
        let (simd, PairInputs { bias, attends, key }) = (self.simd, pair);
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
        if STEPS & (step::HIDE_BY_BIAS | step::HIDE_BY_MASK | step::HIDE_BY_POSITION) != 0 {
            // Of a select and a store to where the score came from, the compiler makes a masked store, which takes some 20 cycles
            // on Zen 3. Adding 0 is between them.
            score = simd.add(score, simd.zero());
        }
        score
    }
}

/// Scores in the layout of a panel or of a row, for passes over them.
trait ScorePass<S: Simd> {
    /// Applies `STEPS` to every score and finds the extent of the results.
    fn pass<const STEPS: u8>(&mut self, simd: S);
}

/// Applies `steps`, each in a pass of its own, so that each pass is a loop without branches. The two steps of a bias are one
/// pass, because the bias is read once. Without steps there is still one pass, which finds the extent.
#[inline(always)]
fn apply_steps<S: Simd>(simd: S, steps: u8, scores: &mut impl ScorePass<S>) {
    const BIAS_THAT_HIDES: u8 = step::BIAS | step::HIDE_BY_BIAS;
    if steps == 0 {
        scores.pass::<0>(simd);
    }
    if steps & step::CAP != 0 {
        scores.pass::<{ step::CAP }>(simd);
    }
    match steps & (BIAS_THAT_HIDES | step::ALIBI) {
        BIAS_THAT_HIDES => scores.pass::<BIAS_THAT_HIDES>(simd),
        remaining => {
            if remaining & step::BIAS != 0 {
                scores.pass::<{ step::BIAS }>(simd);
            }
            if remaining & step::ALIBI != 0 {
                scores.pass::<{ step::ALIBI }>(simd);
            }
            if remaining & step::HIDE_BY_BIAS != 0 {
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
    pass: Pass,
    mods: TileMods<'a>,
    tensors: Option<(&'a PanelTensors<'a>, usize)>,
    scores: &'a mut [f32],
    max: &'a mut [f32],
}

impl Kernel for ModifyPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ModifyPanel { pass, mods, tensors, scores, max } = self;
        let lanes = max.len();
        let steps = (mods.steps() | tensors.map_or(0, |(tensors, _)| tensors.steps())) & pass.steps();
        for at in (0..lanes).step_by(S::LANES) {
            let vectors = ModVectors::new(simd, &mods, |x| simd.load_slice(&x[at..]));
            let before = simd.load_slice(&max[at..]);
            let place = (lanes, at);
            let mut vectors =
                LaneVectors { first: mods.first, vectors, tensors, scores: &mut *scores, place, before, max: before };
            apply_steps(simd, steps, &mut vectors);
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

/// One vector of a panel's lanes, for passes over its keys.
struct LaneVectors<'a, S: Simd> {
    /// The index in the tile of the first key.
    first: usize,
    vectors: ModVectors<S>,
    tensors: Option<(&'a PanelTensors<'a>, usize)>,
    scores: &'a mut [f32],
    /// The panel's number of lanes, and the first of these lanes.
    place: (usize, usize),
    /// The largest score of each lane: of the keys before these, and of these, too.
    before: S::F32,
    max: S::F32,
}

impl<S: Simd> ScorePass<S> for LaneVectors<'_, S> {
    #[inline(always)]
    fn pass<const STEPS: u8>(&mut self, simd: S) {
        self.max = self.before;
        match self.tensors {
            Some((tensors, at)) if STEPS & step::HIDE_BY_MASK != 0 => {
                self.pass_with_tensors::<STEPS, f32>(simd, (None, tensors.mask.as_ref()), at);
            }
            Some((tensors, at)) if STEPS & (step::BIAS | step::HIDE_BY_BIAS) != 0 => match &tensors.bias {
                None => unreachable!("a bias step without a bias"),
                Some(ByElement::F32(bias)) => self.pass_with_tensors::<STEPS, f32>(simd, (Some(bias), None), at),
                Some(ByElement::F16(bias)) => self.pass_with_tensors::<STEPS, f16>(simd, (Some(bias), None), at),
                Some(ByElement::Bf16(bias)) => self.pass_with_tensors::<STEPS, bf16>(simd, (Some(bias), None), at),
            },
            _ => self.pass_without_tensors::<STEPS>(simd),
        }
    }
}

impl<S: Simd> LaneVectors<'_, S> {
    /// Applies steps that read no tensor.
    #[inline(always)]
    fn pass_without_tensors<const STEPS: u8>(&mut self, simd: S) {
        let (lanes, lane) = self.place;
        let mut key = self.first as f32;
        let mut max = self.max;
        for scores in self.scores.chunks_exact_mut(lanes) {
            let scores = &mut scores[lane..lane + S::LANES];
            let pair = PairInputs { key: simd.splat(key), ..PairInputs::none(simd) };
            let score = self.vectors.apply::<STEPS>(simd.load_slice(scores), pair);
            max = simd.max(max, score);
            simd.store_slice(scores, score);
            key += 1.0;
        }
        self.max = max;
    }

    /// Applies steps that read bias or mask, one of the two. Rows that lie along the keys are transposed in registers, in square
    /// blocks.
    ///
    /// * `at`: the index in those tensors of the first key
    #[inline(always)]
    fn pass_with_tensors<const STEPS: u8, T: Element>(
        &mut self,
        simd: S,
        (bias, mask): (Option<&LaneElements<'_, T>>, Option<&LaneElements<'_, u8>>),
        at: usize,
    ) {
        let keys = self.scores.len() / self.place.0;
        let whole = keys / S::LANES * S::LANES;
        for first in (0..whole).step_by(S::LANES) {
            self.tensor_block::<STEPS, T>(simd, (bias, mask), (at + first, 0), first..first + S::LANES);
        }
        if whole == keys {
            return;
        }
        let rest = whole..keys;
        match (bias, mask) {
            (Some(LaneElements::Columns(_)), _) | (_, Some(LaneElements::Columns(_))) => {
                self.tensor_block::<STEPS, T>(simd, (bias, mask), (at + whole, 0), rest);
            }
            // The vector of each row that ends where the keys do.
            _ if at + keys >= S::LANES => {
                let skipped = S::LANES - rest.len();
                self.tensor_block::<STEPS, T>(simd, (bias, mask), (at + keys - S::LANES, skipped), rest);
            }
            (Some(LaneElements::Rows(rows)), _) => {
                let copies = rows.rest(at + whole);
                let rows = LaneElements::Rows(LaneRows::of_rest(&copies));
                self.tensor_block::<STEPS, T>(simd, (Some(&rows), None), (0, 0), rest);
            }
            (_, Some(LaneElements::Rows(rows))) => {
                let copies = rows.rest(at + whole);
                let rows = LaneElements::Rows(LaneRows::of_rest(&copies));
                self.tensor_block::<STEPS, T>(simd, (None, Some(&rows)), (0, 0), rest);
            }
            (None, None) => unreachable!("a pass without tensors"),
        }
    }

    /// Applies steps to at most `LANES` keys.
    ///
    /// * `at`, `skipped`: the element of the tensors' rows that a vector starts with, and its elements before the first key; rows have
    ///   `LANES` elements from there on
    #[inline(always)]
    fn tensor_block<const STEPS: u8, T: Element>(
        &mut self,
        simd: S,
        (bias, mask): (Option<&LaneElements<'_, T>>, Option<&LaneElements<'_, u8>>),
        (at, skipped): (usize, usize),
        keys: Range<usize>,
    ) {
        let (lanes, lane) = self.place;
        let none = PairInputs::none(simd);
        let biases = match bias {
            Some(bias) => bias.load(simd, lane, at..at + skipped + keys.len()),
            None => [none.bias; MAX_LANES],
        };
        let masks = match mask {
            Some(mask) => mask.load_masks(simd, lane, at..at + skipped + keys.len()),
            None => [none.attends; MAX_LANES],
        };
        let scores = &mut self.scores[keys.start * lanes..keys.end * lanes];
        assert!(skipped + keys.len() <= S::LANES && lane + S::LANES <= lanes);
        for n in 0..S::LANES {
            if n < skipped {
                continue;
            }
            if n == skipped + keys.len() {
                break;
            }
            let to = scores.as_mut_ptr().wrapping_add((n - skipped) * lanes + lane);
            let pair = PairInputs { bias: biases[n], attends: masks[n], ..none };
            // SAFETY: key n - skipped is one of `keys`, whose scores are `lanes` each, and `LANES` of them from `lane` on are within it
            // (asserted above).
            let score = self.vectors.apply::<STEPS>(unsafe { simd.load(to) }, pair);
            self.max = simd.max(self.max, score);
            // SAFETY: as above.
            unsafe { simd.store(to, score) };
        }
    }
}

impl<S: Simd> PairInputs<S> {
    /// Inputs for steps that read none.
    #[inline(always)]
    fn none(simd: S) -> Self {
        PairInputs { bias: simd.zero(), attends: simd.eq(simd.zero(), simd.zero()), key: simd.zero() }
    }
}

struct ModifyRow<'a> {
    pass: Pass,
    mods: TileMods<'a>,
    scores: &'a mut [f32],
}

impl Kernel for ModifyRow<'_> {
    type Output = RowExtent;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> RowExtent {
        let ModifyRow { pass, mods, scores } = self;
        let vectors = ModVectors::new(simd, &mods, |x| simd.splat(x[0]));
        let mut row = KeyVectors { mods: &mods, vectors, scores, max: simd.zero(), hides: simd.zero() };
        apply_steps(simd, mods.steps() & pass.steps(), &mut row);
        RowExtent { max: simd.max_lane(row.max), hides: simd.max_lane(row.hides) > 0.0 }
    }
}

/// The scores of one query, with keys along the lanes.
struct KeyVectors<'a, S: Simd> {
    mods: &'a TileMods<'a>,
    vectors: ModVectors<S>,
    scores: &'a mut [f32],
    /// The largest score of each lane.
    max: S::F32,
    /// Above 0 in lanes where a score is -inf.
    hides: S::F32,
}

impl<S: Simd> ScorePass<S> for KeyVectors<'_, S> {
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
            let pair = PairInputs { bias, key, ..PairInputs::none(simd) };
            let score = self.vectors.apply::<STEPS>(simd.load_part(scores, f32::NEG_INFINITY), pair);
            simd.store_part(scores, score);
            // Read back twice, with different fill, so that lanes after the last key are neither the largest nor hidden.
            max = simd.max(max, simd.load_part(scores, f32::NEG_INFINITY));
            hides = simd.select(simd.eq(simd.load_part(scores, 0.0), none), simd.splat(1.0), hides);
        }
        (self.max, self.hides) = (max, hides);
    }
}
