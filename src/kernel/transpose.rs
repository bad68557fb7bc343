//! Rows of memory into the lanes of a panel, a square block at a time, turned in registers.

use crate::element::with_elements;
use crate::kernel::arithmetic::{Multiply, Pairs, Singles};
use crate::kernel::bf16_pairs::{copy_gathered, pairs_in, unfit};
use crate::kernel::shape::MAX_PANEL_LANES;
use crate::kernel::widen::{Gathered, widen_gathered};
use crate::simd::{Isa, Kernel, MAX_LANES, PairDots, PairKernel, Simd};
use crate::tensor::any::AnyTensor;
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::Strided;
use std::marker::PhantomData;
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
        isa.run(IntoLanes { from: stage, lanes, to });
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
        let rows = LaneRows::of(self.lanes, |n| Some(&self.from[n * len..(n + 1) * len])).expect("slices");
        turn_rows((simd, Singles::new()), &rows, None, (self.to, self.lanes));
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
            let rows = LaneRows::new(tensor, 0..tensor.shape()[3], count, place).expect("rows without gaps");
            turn_rows((simd, Singles::new()), &rows, Some(self.factor), (self.to, self.lanes));
        });
    }
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
        let row = |n| {
            let [i0, i1, r] = (self.rows.place)(n);
            let of_row = tensor.matrix(i0, i1).pairs().map_or_else(|| copies.row(n), |pairs| pairs.row(r));
            of_row.as_slice()
        };
        let rows = LaneRows::of(count, row).expect("pairs without gaps");
        // (The factor is for sums: here, it changes nothing.)
        turn_rows((simd, Pairs { dots, factor: 1.0 }), &rows, None, (self.to, self.lanes));
        unfit
    }
}

/// The rows of a panel's lanes: as long as each other, without gaps.
pub(crate) struct LaneRows<'a, T> {
    at: [*const T; MAX_PANEL_LANES],
    len: usize,
    borrow: PhantomData<&'a [T]>,
}

impl<'a, T: Copy> LaneRows<'a, T> {
    /// The elements `cols` of rows of a tensor, lanes without a row repeating the last one; `None` if there are gaps between
    /// them.
    #[inline(always)]
    pub(in crate::kernel) fn new(
        tensor: &Strided<'a, T, 4>,
        cols: Range<usize>,
        count: usize,
        place: impl Fn(usize) -> [usize; 3],
    ) -> Option<Self> {
        Self::of(count, |n| {
            let [i0, i1, r] = place(n);
            tensor.matrix(i0, i1).row(r).slice(cols.clone()).as_slice()
        })
    }

    /// Row n of the first `count` lanes is `row(n)`; the other lanes repeat the last one.
    #[inline(always)]
    pub(in crate::kernel) fn of(count: usize, row: impl Fn(usize) -> Option<&'a [T]>) -> Option<Self> {
        assert!((1..=MAX_PANEL_LANES).contains(&count));
        let mut rows = LaneRows { at: [std::ptr::null(); MAX_PANEL_LANES], len: 0, borrow: PhantomData };
        for n in 0..count {
            let row = row(n)?;
            assert!(n == 0 || row.len() == rows.len);
            (rows.at[n], rows.len) = (row.as_ptr(), row.len());
        }
        let last = rows.at[count - 1];
        rows.at[count..].fill(last);
        Some(rows)
    }

    pub(in crate::kernel) fn len(&self) -> usize {
        self.len
    }

    /// What stands from `at` on in a lane's row.
    #[inline(always)]
    fn from(&self, lane: usize, at: usize) -> &'a [T] {
        assert!(at <= self.len);
        // SAFETY: made from a slice of `len` elements, borrowed for 'a, of which `at` are left out.
        unsafe { std::slice::from_raw_parts(self.at[lane].wrapping_add(at), self.len - at) }
    }

    /// A lane's row.
    pub(in crate::kernel) fn row(&self, lane: usize) -> &'a [T] {
        self.from(lane, 0)
    }

    /// A vector of each row, from `at` on, with zeros behind the row's end.
    pub(in crate::kernel) fn rest(&self, at: usize) -> [[T; MAX_LANES]; MAX_PANEL_LANES]
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

    /// The rows that [`LaneRows::rest`] has made.
    pub(in crate::kernel) fn of_rest(rest: &'a [[T; MAX_LANES]; MAX_PANEL_LANES]) -> Self {
        LaneRows { at: rest.each_ref().map(|row| row.as_ptr()), len: MAX_LANES, borrow: PhantomData }
    }
}

/// `to[s][lane]` is step s of the lane's row, times `factor`; zeros behind the rows' ends.
///
/// * `to`: `[steps rounded up][lanes]`
#[inline(always)]
fn turn_rows<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    rows: &LaneRows<'_, M::Step>,
    factor: Option<f32>,
    (to, lanes): (&mut [f32], usize),
) {
    assert!(lanes <= MAX_PANEL_LANES);
    let block = S::LANES * lanes;
    let whole = rows.len() / S::LANES;
    let (whole, rest) = to.split_at_mut(whole * block);
    for (b, to) in whole.chunks_exact_mut(block).enumerate() {
        turn_blocks((simd, multiply), rows, b * S::LANES, factor, (to, lanes));
    }
    if let Some((first, behind)) = rest.split_at_mut_checked(block) {
        let rest = rows.rest(rows.len() / S::LANES * S::LANES);
        turn_blocks((simd, multiply), &LaneRows::of_rest(&rest), 0, factor, (first, lanes));
        behind.fill(0.0);
    }
}

/// A vector of each row, from `at` on, a square block after the other.
#[inline(always)]
fn turn_blocks<S: Simd, M: Multiply<S>>(
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

/// A vector of each of `LANES` rows, the steps from `at` on.
#[inline(always)]
pub(in crate::kernel) fn load_block<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    rows: &LaneRows<'_, M::Step>,
    first: usize,
    at: usize,
) -> [S::F32; MAX_LANES] {
    assert!(at + S::LANES <= rows.len());
    let mut block = [simd.zero(); MAX_LANES];
    for (n, vector) in block.iter_mut().enumerate().take(S::LANES) {
        // SAFETY: LANES steps from `at` on lie inside the row.
        *vector = unsafe { multiply.load(simd, rows.from(first + n, at).as_ptr()) };
    }
    block
}

/// The answers of `LANES` rows, for `LANES` keys from `at` on.
#[inline(always)]
pub(in crate::kernel) fn load_answers<S: Simd>(
    simd: S,
    rows: &LaneRows<'_, u8>,
    first: usize,
    at: usize,
) -> [S::Mask; MAX_LANES] {
    assert!(at + S::LANES <= rows.len());
    let mut answers = [simd.lt(simd.zero(), simd.zero()); MAX_LANES];
    for (n, answers) in answers.iter_mut().enumerate().take(S::LANES) {
        // SAFETY: LANES elements from `at` on lie inside the row.
        *answers = unsafe { simd.load_answers(rows.from(first + n, at).as_ptr()) };
    }
    answers
}

/// Writes the first `LANES` vectors of `block`, `lanes` apart.
#[inline(always)]
fn store_lanes<S: Simd>(simd: S, block: [S::F32; MAX_LANES], to: &mut [f32], lanes: usize) {
    assert!(to.len() >= (S::LANES - 1) * lanes + S::LANES);
    for (n, vector) in block.into_iter().enumerate().take(S::LANES) {
        // SAFETY: vector n of `LANES`, the last of which ends inside `to`.
        unsafe { simd.store(to.as_mut_ptr().wrapping_add(n * lanes), vector) };
    }
}
