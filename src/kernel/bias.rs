//! What tensors say about single scores: an additive bias, and a boolean mask as a bias of 0 or -inf.

use super::lanes::{LaneRows, load_block, store_lanes};
use super::load::{AnyMatrix, with_matrix};
use super::multiply::Singles;
use super::pack::widen;
use crate::element::Element;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::strided::{Matrix, Strided};
use crate::tensor::{AnyTensor, with_elements};
use std::ops::Range;

/// Bias and boolean mask of one query, for some keys.
#[derive(Clone, Debug)]
pub(crate) struct BiasRow<'a> {
    /// The number of the row in its matrix.
    pub(crate) row: usize,
    pub(crate) keys: Range<usize>,
    pub(crate) bias: Option<AnyMatrix<'a>>,
    /// Not 0 where the query may attend.
    pub(crate) mask: Option<Matrix<'a, u8>>,
}

/// Writes the bias of each key, in natural units, -inf where the mask says no; returns whether any is above -inf.
///
/// * `to`: one element a key
pub(crate) fn read_bias(isa: Isa, from: BiasRow<'_>, to: &mut [f32]) -> bool {
    assert!(to.len() == from.keys.len());
    isa.run(ReadBias { from, to })
}

struct ReadBias<'a> {
    from: BiasRow<'a>,
    to: &'a mut [f32],
}

impl Kernel for ReadBias<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let BiasRow { row, keys, bias, mask } = self.from;
        match bias {
            Some(bias) => with_matrix!(bias, bias => widen(simd, bias.row(row).slice(keys.clone()), 1.0, self.to)),
            None => self.to.fill(0.0),
        }
        if let Some(mask) = mask {
            hide(simd, mask, row, keys, self.to);
        }
        // NaN is not -inf: it has to show.
        let hidden = simd.splat(f32::NEG_INFINITY);
        let mut seen = simd.zero();
        for bias in self.to.chunks(S::LANES) {
            let bias = simd.load_part(bias, f32::NEG_INFINITY);
            seen = simd.max(seen, simd.select(simd.eq(bias, hidden), simd.zero(), simd.splat(1.0)));
        }
        simd.max_lane(seen) > 0.0
    }
}

#[inline(always)]
fn hide<S: Simd>(simd: S, mask: Matrix<'_, u8>, row: usize, keys: Range<usize>, to: &mut [f32]) {
    let hidden = simd.splat(f32::NEG_INFINITY);
    let sees = mask.row(row).slice(keys);
    let vectors = sees.as_slice().map_or(0, |sees| sees.len() / S::LANES);
    if let Some(sees) = sees.as_slice() {
        for (sees, to) in sees.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
            // SAFETY: a chunk has LANES elements.
            let sees = unsafe { simd.load_answers(sees.as_ptr()) };
            simd.store_slice(to, simd.select(sees, simd.load_slice(to), hidden));
        }
    }
    for (sees, to) in sees.iter().zip(to).skip(vectors * S::LANES) {
        if sees == 0 {
            *to = f32::NEG_INFINITY;
        }
    }
}

/// What tensors say about the scores of a panel: those of lane `n`, for `n < count`, stand in row `place(n)` of each.
pub(crate) struct PanelTensors<'a, F> {
    pub(crate) bias: Option<&'a AnyTensor<'a>>,
    /// Not 0 where the query may attend.
    pub(crate) mask: Option<&'a Strided<'a, u8, 4>>,
    pub(crate) count: usize,
    pub(crate) place: F,
    pub(crate) keys: Range<usize>,
}

/// As [`read_bias`] for every lane of a panel: `to[key][lane]`. Lanes without a row repeat the last one. `None` if there are
/// gaps between the elements of a row; then nothing is written.
///
/// All lanes' rows are read side by side: each lies in pages of its own, and their misses overlap.
///
/// * `to`: `[keys rounded up][lanes]`
pub(crate) fn gather_bias<F: Fn(usize) -> [usize; 3]>(
    isa: Isa,
    from: PanelTensors<'_, F>,
    (to, lanes): (&mut [f32], usize),
) -> Option<bool> {
    isa.run(GatherBias { from, to, lanes })
}

struct GatherBias<'a, F> {
    from: PanelTensors<'a, F>,
    to: &'a mut [f32],
    lanes: usize,
}

impl<F: Fn(usize) -> [usize; 3]> Kernel for GatherBias<'_, F> {
    type Output = Option<bool>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Option<bool> {
        let GatherBias { from: PanelTensors { bias, mask, count, place, keys }, to, lanes } = self;
        let mask = match mask {
            Some(mask) => Some(LaneRows::new(mask, keys.clone(), count, &place)?),
            None => None,
        };
        match bias {
            Some(bias) => with_elements!(bias, bias => {
                let bias = LaneRows::new(bias, keys.clone(), count, &place)?;
                Some(turn(simd, Some(&bias), mask.as_ref(), keys.len(), (to, lanes)))
            }),
            None => Some(turn::<S, f32>(simd, None, mask.as_ref(), keys.len(), (to, lanes))),
        }
    }
}

/// Turns bias and mask block by block; returns whether any is above -inf.
#[inline(always)]
fn turn<S: Simd, T: Element>(
    simd: S,
    bias: Option<&LaneRows<'_, T>>,
    mask: Option<&LaneRows<'_, u8>>,
    keys: usize,
    (to, lanes): (&mut [f32], usize),
) -> bool {
    let block = S::LANES * lanes;
    let (whole, rest) = to.split_at_mut(keys / S::LANES * block);
    let mut all_hidden = simd.eq(simd.zero(), simd.zero());
    for (b, to) in whole.chunks_exact_mut(block).enumerate() {
        all_hidden = turn_blocks(simd, bias, mask, b * S::LANES, (to, lanes), all_hidden);
    }
    if !keys.is_multiple_of(S::LANES) {
        // Behind the last key everything is hidden, and nobody looks.
        let bias = bias.map(|bias| bias.rest(S::LANES, T::from_f32(f32::NEG_INFINITY)));
        let mask = mask.map(|mask| mask.rest(S::LANES, 0));
        let (bias, mask) = (bias.as_ref().map(LaneRows::of_rest), mask.as_ref().map(LaneRows::of_rest));
        all_hidden = turn_blocks(simd, bias.as_ref(), mask.as_ref(), 0, (&mut rest[..block], lanes), all_hidden);
    }
    simd.max_lane(simd.select(all_hidden, simd.zero(), simd.splat(1.0))) > 0.0
}

/// A vector of each row, from `at` on, a square block after the other; returns the lanes of `all_hidden` that still are.
#[inline(always)]
fn turn_blocks<S: Simd, T: Element>(
    simd: S,
    bias: Option<&LaneRows<'_, T>>,
    mask: Option<&LaneRows<'_, u8>>,
    at: usize,
    (to, lanes): (&mut [f32], usize),
    mut all_hidden: S::Mask,
) -> S::Mask {
    let hidden = simd.splat(f32::NEG_INFINITY);
    for first in (0..lanes).step_by(S::LANES) {
        let mut block = [simd.zero(); MAX_LANES];
        if let Some(bias) = bias {
            block = simd.transpose(load_block((simd, Singles::new()), bias, first, at));
        }
        if let Some(mask) = mask {
            let answers = simd.transpose_answers(load_answers(simd, mask, first, at));
            for n in 0..S::LANES {
                block[n] = simd.select(answers[n], block[n], hidden);
            }
        }
        for n in 0..S::LANES {
            // NaN is not -inf: it has to show.
            all_hidden = simd.and(all_hidden, simd.eq(block[n], hidden));
        }
        store_lanes(simd, block, &mut to[first..], lanes);
    }
    all_hidden
}

/// The answers of `LANES` rows for `LANES` keys from `at` on.
#[inline(always)]
fn load_answers<S: Simd>(simd: S, rows: &LaneRows<'_, u8>, first: usize, at: usize) -> [S::Mask; MAX_LANES] {
    assert!(at + S::LANES <= rows.len());
    let mut answers = [simd.lt(simd.zero(), simd.zero()); MAX_LANES];
    for n in 0..S::LANES {
        // SAFETY: LANES elements from `at` on lie inside the row.
        answers[n] = unsafe { simd.load_answers(rows.from(first + n, at).as_ptr()) };
    }
    answers
}
