//! `O += P V` for few query rows, with values along the lanes.

use super::block::{ROWS, RowBlock, RowGroup, RowPrefetches, Rows, with_listed};
use crate::element::Element;
use crate::kernel::convert::load_from;
use crate::kernel::prefetch::{Prefetch, PrefetchLines};
use crate::kernel::shape::{holds, round_up_lanes};
use crate::kv::run::{Run, with_run};
use crate::simd::{ByStrip, Isa, Kernel, Simd, kernel};
use crate::tensor::row_list::RowList;
use std::marker::PhantomData;

/// Adds `sum over j of probs[r * stride + j] * values[j][d]` to `out[r][d]`.
///
/// * `values`: `[keys, value_dim]`, rows without gaps, any type
/// * `probs`: `[rows][stride]`, `stride >= keys`
/// * `out`: `[rows][value_dim rounded up]`
/// * `prefetch`: rows to prefetch between the multiply-adds
pub(crate) fn add_values(
    isa: Isa,
    values: Run<'_>,
    probs: &[f32],
    out: &mut [f32],
    stride: usize,
    prefetch: &Prefetch,
) {
    isa.run(AddValues { values, probs, out, stride, prefetch });
}

/// As [`add_values`], for values at addresses of their own. Their list says what is prefetched.
pub(crate) fn add_listed_values(isa: Isa, values: RowList<'_>, probs: &[f32], out: &mut [f32], stride: usize) {
    isa.run(AddListedValues { values, probs, out, stride });
}

/// The arguments of [`add_listed_values`].
struct AddListedValues<'a> {
    values: RowList<'a>,
    probs: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
}

impl Kernel for AddListedValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let AddListedValues { values, probs, out, stride } = self;
        let lines = &mut PrefetchLines::none();
        with_listed!(values, values => {
            // SAFETY: the rows of a list, which stay readable (its invariant).
            unsafe { add_all(simd, values, (probs, stride), out, lines) }
        });
    }
}

/// The arguments of [`add_values`]. As in prefill, they stay in a struct: as variables of a [`kernel!`] they spill one of the
/// pointers to probs in the loop of four rows, and decode in f16 takes an eighth longer (Sapphire Rapids).
struct AddValues<'a> {
    values: Run<'a>,
    probs: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
    prefetch: &'a Prefetch,
}

impl Kernel for AddValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let AddValues { values, probs, out, stride, prefetch } = self;
        let lines = &mut prefetch.lines();
        with_run!(values, values => {
            // SAFETY: `values` is a view of rows without gaps (`all` asserts that).
            unsafe { add_all(simd, RowBlock::all(values), (probs, stride), out, lines) }
        });
    }
}

/// Adds to the sums of all rows, [`ROWS`] rows at a time.
///
/// # Safety
/// * all rows of `values` are valid for reads of `cols` elements
#[inline(always)]
unsafe fn add_all<S: Simd, T: Element, P: Rows<T>>(
    simd: S,
    values: RowBlock<P>,
    (probs, stride): (&[f32], usize),
    out: &mut [f32],
    lines: &mut PrefetchLines<'_>,
) {
    let width = round_up_lanes(values.cols);
    let rows = probs.len() / stride;
    assert!(values.count <= stride && holds(out.len(), rows, width));
    let (mut rest, mut from) = (values, probs.as_ptr());
    while rest.count > 0 {
        let (block, after) = rest.split();
        let mut group = RowGroup { from, from_stride: stride, to: out.as_mut_ptr(), to_stride: width };
        for row in (0..rows).step_by(ROWS) {
            // The first group of rows prefetches.
            let lines = if row == 0 { &mut *lines } else { &mut PrefetchLines::none() };
            let sums = Sums { simd, values: block, group, lines, element: PhantomData };
            // SAFETY: the block is of these values (the caller's promise), and not empty; the group starts at `row`, so probs and `out` have `rows - row`
            // rows from there on, and a row has a prob for every key (asserted).
            unsafe { S::strip(ROWS.min(rows - row), sums) };
            group = group.next();
        }
        (rest, from) = (after, from.wrapping_add(block.count));
    }
}

/// The product of a group's probs and a block of values.
struct Sums<'a, 'l, S, T, P> {
    simd: S,
    values: RowBlock<P>,
    group: RowGroup,
    lines: &'a mut PrefetchLines<'l>,
    element: PhantomData<T>,
}

impl<S: Simd, T: Element, P: Rows<T>> ByStrip for Sums<'_, '_, S, T, P> {
    #[inline(always)]
    fn vectors(&self, lanes: usize) -> usize {
        self.values.cols / lanes
    }

    /// # Safety
    /// * as [`strips`]
    #[inline(always)]
    unsafe fn call<const R: usize, const N: usize>(self) {
        // SAFETY: the caller's promise.
        unsafe { strips::<S, T, P, R, N>(self.simd, self.values, self.group, self.lines) }
    }
}

/// Adds to the sums of R rows, one strip of N vectors after the other. The remaining vectors are done one at a time; the last
/// one may be partial.
///
/// # Safety
/// * all rows of `values` are valid for reads of `cols` elements
/// * `group` has R rows of a prob for each of them, and R rows of `values.cols` elements, rounded up, to add to
#[inline(always)]
unsafe fn strips<S: Simd, T: Element, P: Rows<T>, const R: usize, const N: usize>(
    simd: S,
    values: RowBlock<P>,
    group: RowGroup,
    lines: &mut PrefetchLines<'_>,
) {
    let wide = values.cols / (N * S::LANES) * (N * S::LANES);
    let whole = values.cols / S::LANES * S::LANES;
    let mut d = 0;
    while d < whole {
        let values = RowBlock { rows: values.rows.columns_from(d), cols: values.cols - d, ..values };
        let group = RowGroup { to: group.to.wrapping_add(d), ..group };
        // SAFETY: the vectors from d on that the strip reads are within the row; the caller's promise.
        unsafe {
            if d < wide {
                strip::<S, T, P, R, N, true>(simd, values, group, lines);
                d += N * S::LANES;
            } else {
                strip::<S, T, P, R, 1, true>(simd, values, group, lines);
                d += S::LANES;
            }
        }
    }
    if whole < values.cols {
        let values = RowBlock { rows: values.rows.columns_from(whole), cols: values.cols - whole, ..values };
        let group = RowGroup { to: group.to.wrapping_add(whole), ..group };
        // SAFETY: the rest of each row, rounded up; the caller's promise.
        unsafe { strip::<S, T, P, R, 1, false>(simd, values, group, lines) };
    }
}

/// Adds to the first N vectors of each sum. Unless `WHOLE`, rows of values have less than one vector, and N is 1.
///
/// # Safety
/// * `values` has a row at least, and all of them are valid for reads of N vectors, or of `cols` elements, less than a vector
/// * `group` has R rows of a prob for each of them, and R rows of N vectors to add to
#[inline(always)]
unsafe fn strip<S: Simd, T: Element, P: Rows<T>, const R: usize, const N: usize, const WHOLE: bool>(
    simd: S,
    values: RowBlock<P>,
    group: RowGroup,
    lines: &mut PrefetchLines<'_>,
) {
    let RowBlock { rows: mut at, count, cols } = values;
    let RowGroup { from: probs, from_stride, to: out, to_stride: width } = group;
    let mut sums = [[simd.zero(); N]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: vector n of row r: the caller's promise.
            *sum = unsafe { simd.load(out.wrapping_add(r * width + n * S::LANES)) };
        }
    }
    let bytes = N * S::LANES * size_of::<T>();
    // SAFETY: a block has a row.
    let mut prefetches = unsafe { at.prefetches(simd, lines, count, bytes) };
    let mut j = 0;
    while j < count {
        let run = prefetches.run(count - j, bytes);
        for j in j..j + run {
            // SAFETY: one of the block's rows.
            unsafe { prefetches.issue_along(simd, j, bytes) };
            // SAFETY: row j of the block.
            let row = unsafe { at.first() };
            let mut vectors = [simd.zero(); N];
            for (n, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: vector n of row j, or all of the row: the caller's promise.
                *vector = unsafe {
                    match WHOLE {
                        true => simd.load_as(row.wrapping_add(n * S::LANES)),
                        false => simd.load_elements_part(std::slice::from_raw_parts(row, cols), 0.0),
                    }
                };
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the prob of key j in row r: the caller's promise.
                let prob = simd.splat(unsafe { *probs.wrapping_add(r * from_stride + j) });
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.mul_add(prob, vectors[n], *sum);
                }
            }
            at = at.after(1);
        }
        prefetches.end_run(simd, run, bytes);
        j += run;
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (n, sum) in sums.into_iter().enumerate() {
            // SAFETY: vector n of row r: the caller's promise.
            unsafe { simd.store(out.wrapping_add(r * width + n * S::LANES), sum) };
        }
    }
}

kernel! {
    /// As [`add_values`], but values whose score is -inf are skipped, not multiplied by 0. It is for tiles that have both
    /// hidden keys and values that are NaN or infinite. The loop is simple and slow; the chains are the same.
    ///
    /// * `probs_and_scores`: those of row r and key j are at `r * strides[0] + j * strides[1]`
    /// * `out`: `[rows][width]` and the width, whole vectors
    pub(crate) fn add_visible_values<'a, S: Simd>(
        simd: S,
        values: Run<'a>,
        probs_and_scores: (&'a [f32], &'a [f32]),
        strides: [usize; 2],
        out: (&'a mut [f32], usize),
    ) {
        let ((probs, scores), (out, width)) = (probs_and_scores, out);
        with_run!(values, values => for j in 0..values.rows() {
            let row = values.row(j).as_slice().expect("rows without gaps");
            for (r, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
                let at = r * strides[0] + j * strides[1];
                if scores[at] != f32::NEG_INFINITY {
                    for (out, d) in out.chunks_exact_mut(S::LANES).zip((0..row.len()).step_by(S::LANES)) {
                        let prob = simd.splat(probs[at]);
                        let sum = simd.mul_add(prob, load_from(simd, row, d), simd.load_slice(out));
                        simd.store_slice(out, sum);
                    }
                }
            }
        });
    }
}

kernel! {
    /// Whether every element is finite.
    pub(crate) fn all_finite<'a, S: Simd>(simd: S, rows: Run<'a>) -> bool {
        let mut infinite_or_nan = false;
        with_run!(rows, matrix => for j in 0..matrix.rows() {
            let row = matrix.row(j).as_slice().expect("rows without gaps");
            let mut zero = simd.zero();
            for d in (0..row.len()).step_by(S::LANES) {
                // x * 0 is NaN for NaN and infinity, and NaN stays.
                zero = simd.mul_add(load_from(simd, row, d), simd.zero(), zero);
            }
            infinite_or_nan |= !(simd.sum(zero) == 0.0);
        });
        !infinite_or_nan
    }
}
