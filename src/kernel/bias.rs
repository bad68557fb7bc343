//! What tensors say about single scores: an additive bias, and a boolean mask as a bias of 0 or -inf.

use super::MAX_PANEL_LANES;
use super::lanes::{lane_rows, load_block, store_lanes};
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
            Some(mask) => Some(lane_rows(mask, keys.clone(), count, &place)?),
            None => None,
        };
        match bias {
            Some(bias) => with_elements!(bias, bias => {
                let bias = lane_rows(bias, keys.clone(), count, &place)?;
                Some(turn(simd, Some(&bias), mask.as_ref(), keys.len(), (to, lanes)))
            }),
            None => Some(turn::<S, f32>(simd, None, mask.as_ref(), keys.len(), (to, lanes))),
        }
    }
}

/// A square block of bias and mask at a time, turned; returns whether any is above -inf.
#[inline(always)]
fn turn<S: Simd, T: Element>(
    simd: S,
    bias: Option<&[&[T]; MAX_PANEL_LANES]>,
    mask: Option<&[&[u8]; MAX_PANEL_LANES]>,
    keys: usize,
    (to, lanes): (&mut [f32], usize),
) -> bool {
    let hidden = simd.splat(f32::NEG_INFINITY);
    let mut seen = simd.zero();
    for (at, to) in (0..keys).step_by(S::LANES).zip(to.chunks_exact_mut(S::LANES * lanes)) {
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
            for vector in &block[..S::LANES.min(keys - at)] {
                // NaN is not -inf: it has to show.
                seen = simd.max(seen, simd.select(simd.eq(*vector, hidden), simd.zero(), simd.splat(1.0)));
            }
            store_lanes(simd, block, &mut to[first..], lanes);
        }
    }
    simd.max_lane(seen) > 0.0
}

/// The answers of `LANES` rows for `LANES` keys from `at` on; no behind their end.
#[inline(always)]
fn load_answers<S: Simd>(simd: S, rows: &[&[u8]; MAX_PANEL_LANES], first: usize, at: usize) -> [S::Mask; MAX_LANES] {
    let mut answers = [simd.lt(simd.zero(), simd.zero()); MAX_LANES];
    for n in 0..S::LANES {
        let row = &rows[first + n][at..];
        let mut part = [0; MAX_LANES];
        let row = if row.len() >= S::LANES {
            row
        } else {
            part[..row.len()].copy_from_slice(row);
            &part
        };
        // SAFETY: LANES elements or more.
        answers[n] = unsafe { simd.load_answers(row.as_ptr()) };
    }
    answers
}
