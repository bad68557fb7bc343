//! Transposes rows of memory into the lanes of a panel, in square blocks held in registers.

use super::arithmetic::{Bf16Dots, F32Fma, Multiply};
use super::bf16_pairs::{copy_pair_rows, pairs_in, rows_outside_pair_range};
use super::shape::{MAX_PANEL_LANES, RowSet};
use super::widen::widen_group;
use crate::element::{bf16, with_elements};
use crate::simd::{Isa, Kernel, MAX_LANES, PairDots, PairKernel, Simd};
use crate::tensor::group::{AnyGroupRows, GroupRows};
use crate::tensor::matrix::Matrix;
use std::marker::PhantomData;
use std::ops::Range;

/// Transposes rows into lanes: `to[e][lane] = factor * rows[lane][e]`, with zeros after the rows' elements. Lanes without a row
/// repeat the last row.
///
/// * `to`: `[width][lanes]`, where `width` is the rows' length rounded up
/// * `copies`: a buffer of the same length, for rows with gaps between their elements
pub(crate) fn transpose_into_lanes(
    isa: Isa,
    rows: AnyGroupRows<'_>,
    factor: f32,
    (to, lanes): (&mut [f32], usize),
    copies: &mut [f32],
) {
    if rows.has_contiguous_rows() {
        isa.run(GroupIntoLanes { rows, factor, to, lanes });
    } else {
        let copies = &mut copies[..to.len()];
        widen_group(isa, rows, factor, (copies, to.len() / lanes));
        isa.run(IntoLanes { from: copies, lanes, to });
    }
}

/// `to[c][lane] = from[lane][c]`.
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
        let rows = LaneRows::new(self.lanes, |n| Some(&self.from[n * len..(n + 1) * len])).expect("slices");
        transpose_rows((simd, F32Fma::new()), &rows, None, (self.to, self.lanes));
    }
}

struct GroupIntoLanes<'a> {
    rows: AnyGroupRows<'a>,
    factor: f32,
    to: &'a mut [f32],
    lanes: usize,
}

impl Kernel for GroupIntoLanes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_elements!(self.rows, rows => {
            let rows = LaneRows::of_group(rows, 0..rows.cols()).expect("rows without gaps");
            transpose_rows((simd, F32Fma::new()), &rows, Some(self.factor), (self.to, self.lanes));
        });
    }
}

/// As [`transpose_into_lanes`], for pairs of bf16: `to[p][lane]` holds the bits of pair p of the lane's row. Returns the rows
/// outside the range of pairs, one bit each. If all rows are, and have no gaps between their elements, nothing is written: no
/// score is formed from their pairs (`prefill/f32_lanes.rs`).
///
/// * `to`: `[pairs rounded up][lanes]`
/// * `copies`: a buffer of the same length
pub(crate) fn transpose_pairs_into_lanes(
    isa: Isa,
    rows: GroupRows<'_, bf16>,
    (to, lanes): (&mut [f32], usize),
    copies: &mut [f32],
) -> RowSet {
    isa.run_pairs(PairsIntoLanes { rows, to, lanes, copies })
}

struct PairsIntoLanes<'a> {
    rows: GroupRows<'a, bf16>,
    to: &'a mut [f32],
    lanes: usize,
    copies: &'a mut [f32],
}

impl PairKernel for PairsIntoLanes<'_> {
    type Output = RowSet;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) -> RowSet {
        let (count, pairs) = (self.rows.count(), pairs_in(self.rows.cols()));
        let outside = rows_outside_pair_range(self.rows);
        if outside.count_ones() as usize == count && self.rows.has_contiguous_rows() {
            return outside;
        }
        // Read in place if they can be, copied otherwise. All rows have the same layout, so the first one decides.
        let in_place = self.rows.row(0).pairs().is_some();
        let copies = &mut self.copies[..if in_place { 0 } else { count * pairs }];
        if !in_place {
            copy_pair_rows(self.rows, copies);
        }
        let copies = Matrix::from_carried(copies, if in_place { 0 } else { count }, pairs);
        let row = |n| self.rows.row(n).pairs().or_else(|| copies.row(n).as_slice());
        let rows = LaneRows::new(count, row).expect("pairs without gaps");
        // The factor is for sums: there are none here.
        transpose_rows((simd, Bf16Dots { dots, factor: 1.0 }), &rows, None, (self.to, self.lanes));
        outside
    }
}

/// The rows of a panel's lanes, of one length and without gaps.
pub(crate) struct LaneRows<'a, T> {
    at: [*const T; MAX_PANEL_LANES],
    /// The lanes that have a row of their own.
    count: usize,
    len: usize,
    borrow: PhantomData<&'a [T]>,
}

impl<'a, T: Copy> LaneRows<'a, T> {
    /// The elements `cols` of `rows`; lanes without a row repeat the last row. `None` if there are gaps between elements.
    #[inline(always)]
    pub(super) fn of_group(rows: GroupRows<'a, T>, cols: Range<usize>) -> Option<Self> {
        match rows.one_head() {
            // Rows at one stride need no division and no test for each of them.
            Some(head) => Self::new(head.rows(), |n| head.row(n).slice(cols.clone()).as_slice()),
            None => Self::new(rows.count(), |n| rows.row(n).slice(cols.clone()).as_slice()),
        }
    }

    /// Lane n has `row(n)`, for the first `count` lanes; the other lanes repeat the last row.
    #[inline(always)]
    pub(super) fn new(count: usize, row: impl Fn(usize) -> Option<&'a [T]>) -> Option<Self> {
        assert!((1..=MAX_PANEL_LANES).contains(&count));
        let mut rows = LaneRows { at: [std::ptr::null(); MAX_PANEL_LANES], count, len: 0, borrow: PhantomData };
        for n in 0..count {
            let row = row(n)?;
            assert!(n == 0 || row.len() == rows.len);
            (rows.at[n], rows.len) = (row.as_ptr(), row.len());
        }
        let last = rows.at[count - 1];
        rows.at[count..].fill(last);
        Some(rows)
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The elements of a lane's row from `at` on.
    #[inline(always)]
    fn from(&self, lane: usize, at: usize) -> &'a [T] {
        assert!(at <= self.len);
        // SAFETY: the row is a slice of `len` elements, borrowed for 'a, and the first `at` of them, which are no more
        // (asserted), are left out.
        unsafe { std::slice::from_raw_parts(self.at[lane].wrapping_add(at), self.len - at) }
    }

    /// A lane's row.
    pub(super) fn row(&self, lane: usize) -> &'a [T] {
        self.from(lane, 0)
    }

    /// A vector of each row from `at` on, with zeros after the row's end.
    pub(super) fn rest(&self, at: usize) -> [[T; MAX_LANES]; MAX_PANEL_LANES]
    where
        T: Default,
    {
        let mut rest = [[T::default(); MAX_LANES]; MAX_PANEL_LANES];
        for (lane, to) in rest.iter_mut().enumerate() {
            let row = self.from(lane, at);
            let len = row.len().min(MAX_LANES);
            to[..len].copy_from_slice(&row[..len]);
        }
        rest
    }

    /// The rows that [`LaneRows::rest`] returned.
    pub(super) fn of_rest(rest: &'a [[T; MAX_LANES]; MAX_PANEL_LANES]) -> Self {
        let at = rest.each_ref().map(|row| row.as_ptr());
        LaneRows { at, count: MAX_PANEL_LANES, len: MAX_LANES, borrow: PhantomData }
    }
}

/// `to[s][lane]` is step s of the lane's row, times `factor`; zeros after the rows' ends.
///
/// * `to`: `[steps rounded up][lanes]`
#[inline(always)]
pub(super) fn transpose_rows<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    rows: &LaneRows<'_, M::Step>,
    factor: Option<f32>,
    (to, lanes): (&mut [f32], usize),
) {
    assert!(lanes <= MAX_PANEL_LANES);
    let (block, len) = (S::LANES * lanes, rows.len());
    for (b, to) in to.chunks_exact_mut(block).take(len / S::LANES).enumerate() {
        transpose_blocks((simd, multiply), rows, b * S::LANES, factor, (to, lanes));
    }
    if len * lanes < to.len() {
        if len < S::LANES {
            let rest = rows.rest(0);
            transpose_blocks((simd, multiply), &LaneRows::of_rest(&rest), 0, factor, (&mut to[..block], lanes));
        } else if !len.is_multiple_of(S::LANES) {
            // The last vector of each row. Those of its elements that have been transposed come out the same again.
            let at = len - S::LANES;
            transpose_blocks((simd, multiply), rows, at, factor, (&mut to[at * lanes..len * lanes], lanes));
        }
        to[len * lanes..].fill(0.0);
    }
}

/// Transposes a vector of each row from `at` on, one square block of lanes after the other.
#[inline(always)]
fn transpose_blocks<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    rows: &LaneRows<'_, M::Step>,
    at: usize,
    factor: Option<f32>,
    (to, lanes): (&mut [f32], usize),
) {
    for first in (0..lanes).step_by(S::LANES) {
        let mut block = load_block((simd, multiply), rows, first, at);
        if let Some(factor) = factor {
            for vector in &mut block {
                *vector = simd.mul(*vector, simd.splat(factor));
            }
        }
        store_lanes(simd, simd.transpose(block), &mut to[first..], lanes);
    }
}

/// Loads a square block: `LANES` steps from `at` on, of each of `LANES` rows from `first` on.
#[inline(always)]
pub(super) fn load_block<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    rows: &LaneRows<'_, M::Step>,
    first: usize,
    at: usize,
) -> [S::F32; MAX_LANES] {
    assert!(at + S::LANES <= rows.len());
    let rows = &rows.at[first..first + S::LANES];
    let mut block = [simd.zero(); MAX_LANES];
    for n in 0..S::LANES {
        // SAFETY: LANES steps from `at` on lie inside the row, which is a slice of `rows.len()` elements.
        block[n] = unsafe { multiply.load(simd, rows[n].wrapping_add(at)) };
    }
    block
}

/// Loads a square block of masks: `LANES` keys from `at` on, of each of `LANES` rows from `first` on.
#[inline(always)]
pub(super) fn load_masks<S: Simd>(simd: S, rows: &LaneRows<'_, u8>, first: usize, at: usize) -> [S::Mask; MAX_LANES] {
    assert!(at + S::LANES <= rows.len());
    let mut masks = [simd.lt(simd.zero(), simd.zero()); MAX_LANES];
    for (n, masks) in masks.iter_mut().enumerate().take(S::LANES) {
        // SAFETY: LANES elements from `at` on lie inside the row.
        *masks = unsafe { simd.load_mask(rows.from(first + n, at).as_ptr()) };
    }
    masks
}

/// Writes the first `LANES` vectors of `block`, `lanes` elements apart.
#[inline(always)]
fn store_lanes<S: Simd>(simd: S, block: [S::F32; MAX_LANES], to: &mut [f32], lanes: usize) {
    assert!(to.len() >= (S::LANES - 1) * lanes + S::LANES);
    for (n, vector) in block.into_iter().enumerate().take(S::LANES) {
        // SAFETY: vector n of `LANES`, the last of which ends inside `to`.
        unsafe { simd.store(to.as_mut_ptr().wrapping_add(n * lanes), vector) };
    }
}
