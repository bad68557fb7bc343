//! Rows of memory into the lanes of a panel, a square block at a time, turned in registers.

use super::MAX_PANEL_LANES;
use super::multiply::{Multiply, Pairs, Singles};
use super::pack::{Gathered, widen_gathered};
use super::pairs::{copy_gathered, pairs_in, unfit};
use crate::element::Bf16Pair;
use crate::simd::{Isa, Kernel, MAX_LANES, PairDots, PairKernel, Simd};
use crate::strided::{Matrix, Strided};
use crate::tensor::{AnyTensor, with_elements};
use std::ops::Range;

/// Brings rows into lanes: `to[e][lane] = factor * rows[lane][e]`, zeros behind the rows' elements. Lanes without a row repeat
/// the last one.
///
/// * `to`: `[width][lanes]`, where `width` is the rows' length rounded up
/// * `stage`: as much again, for rows with gaps between their elements
pub(crate) fn gather_into_lanes<F: Fn(usize) -> [usize; 3]>(
    isa: Isa,
    rows: Gathered<'_, F>,
    factor: f32,
    (to, lanes): (&mut [f32], usize),
    stage: &mut [f32],
) {
    if rows.has_contiguous_rows() {
        isa.run(GatherIntoLanes { rows, factor, to, lanes });
    } else {
        let stage = &mut stage[..to.len()];
        widen_gathered(isa, rows, factor, (stage, to.len() / lanes));
        into_lanes(isa, stage, lanes, to);
    }
}

struct GatherIntoLanes<'a, F> {
    rows: Gathered<'a, F>,
    factor: f32,
    to: &'a mut [f32],
    lanes: usize,
}

impl<F: Fn(usize) -> [usize; 3]> Kernel for GatherIntoLanes<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Gathered { tensor, count, place } = self.rows;
        with_elements!(tensor, tensor => {
            let rows = lane_rows(tensor, 0..tensor.shape()[3], count, place).expect("rows without gaps");
            turn_rows((simd, Singles::new()), &rows, Some(self.factor), (self.to, self.lanes));
        });
    }
}

/// The elements `cols` of every lane's row, lanes without a row repeating the last one; `None` if there are gaps between them.
#[inline(always)]
pub(super) fn lane_rows<'a, T: Copy>(
    tensor: &Strided<'a, T, 4>,
    cols: Range<usize>,
    count: usize,
    place: impl Fn(usize) -> [usize; 3],
) -> Option<[&'a [T]; MAX_PANEL_LANES]> {
    let mut rows: [&[T]; MAX_PANEL_LANES] = [&[]; MAX_PANEL_LANES];
    for (n, row) in rows.iter_mut().enumerate() {
        let [i0, i1, r] = place(n.min(count - 1));
        *row = tensor.matrix(i0, i1).row(r).slice(cols.clone()).as_slice()?;
    }
    Some(rows)
}

/// As [`gather_into_lanes`], for rows of bf16: `to[p][lane]` is pair p of the lane's row, as it is. Returns the lanes whose
/// scores must not be formed from pairs, one bit each.
///
/// * `to`: `[pairs rounded up][lanes]`
/// * `stage`: as much again
pub(crate) fn gather_pairs_into_lanes<F: Fn(usize) -> [usize; 3]>(
    isa: Isa,
    rows: Gathered<'_, F>,
    (to, lanes): (&mut [f32], usize),
    stage: &mut [f32],
) -> u32 {
    isa.run_pairs(GatherPairs { rows, to, lanes, stage })
}

struct GatherPairs<'a, F> {
    rows: Gathered<'a, F>,
    to: &'a mut [f32],
    lanes: usize,
    stage: &'a mut [f32],
}

impl<F: Fn(usize) -> [usize; 3]> PairKernel for GatherPairs<'_, F> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) -> u32 {
        let unfit = unfit(&self.rows);
        let AnyTensor::Bf16(tensor) = self.rows.tensor else { unreachable!("pairs of another type") };
        let (count, pairs) = (self.rows.count, pairs_in(tensor.shape()[3]));
        // In place, or copied if they don't lie so: one row is as the others.
        let [i0, i1, _] = (self.rows.place)(0);
        let copies = if tensor.matrix(i0, i1).pairs().is_some() { 0 } else { count };
        let stage = &mut self.stage[..copies * pairs];
        if copies > 0 {
            copy_gathered(&self.rows, stage);
        }
        let copies = Matrix::from_carried(stage, copies, pairs);
        let mut rows: [&[Bf16Pair]; MAX_PANEL_LANES] = [&[]; MAX_PANEL_LANES];
        for (n, row) in rows.iter_mut().enumerate() {
            let n = n.min(count - 1);
            let [i0, i1, r] = (self.rows.place)(n);
            let of_row = tensor.matrix(i0, i1).pairs().map_or_else(|| copies.row(n), |pairs| pairs.row(r));
            *row = of_row.as_slice().expect("pairs without gaps");
        }
        // (The factor is for sums: here, it changes nothing.)
        turn_rows((simd, Pairs { dots, factor: 1.0 }), &rows, None, (self.to, self.lanes));
        unfit
    }
}

/// `to[c][lane] = from[lane][c]`; both hold `lanes` times a multiple of [`MAX_LANES`].
pub(crate) fn into_lanes(isa: Isa, from: &[f32], lanes: usize, to: &mut [f32]) {
    isa.run(IntoLanes { from, lanes, to });
}

struct IntoLanes<'a> {
    from: &'a [f32],
    lanes: usize,
    to: &'a mut [f32],
}

impl Kernel for IntoLanes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.from.len() / self.lanes;
        let mut rows: [&[f32]; MAX_PANEL_LANES] = [&[]; MAX_PANEL_LANES];
        for (n, row) in rows.iter_mut().enumerate() {
            let n = n.min(self.lanes - 1);
            *row = &self.from[n * len..(n + 1) * len];
        }
        turn_rows((simd, Singles::new()), &rows, None, (self.to, self.lanes));
    }
}

/// `to[s][lane]` is step s of `rows[lane]`, times `factor`; zeros behind each row's end. All rows are of one length.
#[inline(always)]
fn turn_rows<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    rows: &[&[M::Step]; MAX_PANEL_LANES],
    factor: Option<f32>,
    (to, lanes): (&mut [f32], usize),
) {
    let len = rows[0].len();
    assert!(lanes <= MAX_PANEL_LANES);
    for (b, to) in to.chunks_exact_mut(S::LANES * lanes).enumerate() {
        let at = b * S::LANES;
        for first in (0..lanes).step_by(S::LANES) {
            let mut block = load_block((simd, multiply), rows, first, at.min(len));
            if let Some(factor) = factor {
                for vector in &mut block {
                    *vector = simd.mul(*vector, simd.splat(factor));
                }
            }
            store_lanes(simd, simd.transpose(block), &mut to[first..], lanes);
        }
    }
}

/// A vector of each of `LANES` rows: the steps from `at` on, zeros behind the end. All rows are of one length.
#[inline(always)]
pub(super) fn load_block<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    rows: &[&[M::Step]; MAX_PANEL_LANES],
    first: usize,
    at: usize,
) -> [S::F32; MAX_LANES] {
    let rows = &rows[first..first + S::LANES];
    let mut block = [simd.zero(); MAX_LANES];
    let whole = rows.iter().all(|row| row.len() >= at + S::LANES);
    for (vector, row) in block.iter_mut().zip(rows) {
        *vector = if whole {
            // SAFETY: LANES steps from `at` on lie inside the row.
            unsafe { multiply.load(simd, row.as_ptr().wrapping_add(at)) }
        } else {
            multiply.load_part(simd, &row[at..])
        };
    }
    block
}

/// Writes the first `LANES` vectors of `block`, `lanes` apart.
#[inline(always)]
pub(super) fn store_lanes<S: Simd>(simd: S, block: [S::F32; MAX_LANES], to: &mut [f32], lanes: usize) {
    for (n, vector) in block.into_iter().enumerate().take(S::LANES) {
        simd.store_slice(&mut to[n * lanes..], vector);
    }
}
