//! `O += P V` for a few rows: values along the lanes.

use super::block::{Block, Group, ROWS};
use crate::element::{Element, with_elements};
use crate::kernel::convert::load_from;
use crate::kernel::prefetch::{Ahead, Lines};
use crate::kernel::shape::round_up_lanes;
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::any::AnyMatrix;
use crate::tensor::matrix::Matrix;

/// Adds `sum over j of weights[r * stride + j] * values[j][d]` to `out[r][d]`.
///
/// * `values`: `[keys, value_dim]`, rows without gaps, any type
/// * `weights`: `[rows][stride]`, `stride >= keys`
/// * `out`: `[rows][value_dim rounded up]`
/// * `ahead`: what to ask memory for meanwhile, all of it
pub(crate) fn add_values(
    isa: Isa,
    values: AnyMatrix<'_>,
    weights: &[f32],
    out: &mut [f32],
    stride: usize,
    ahead: &Ahead,
) {
    isa.run(AddValues { values, weights, out, stride, ahead });
}

struct AddValues<'a> {
    values: AnyMatrix<'a>,
    weights: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
    ahead: &'a Ahead,
}

impl Kernel for AddValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_elements!(self.values, values => add_all(simd, values, self.weights, self.out, self.stride, self.ahead));
    }
}

/// The weighted values of all rows, as many rows at a time as share a load.
#[inline(always)]
fn add_all<S: Simd, T: Element>(
    simd: S,
    values: Matrix<'_, T>,
    weights: &[f32],
    out: &mut [f32],
    stride: usize,
    ahead: &Ahead,
) {
    let width = round_up_lanes(values.cols());
    let rows = weights.len() / stride;
    assert!(values.rows() <= stride && out.len() >= rows * width);
    // Whole keys at a time where there are registers for them: memory then reads straight on.
    let eight = values.cols() >= 8 * S::LANES;
    let mut asking = ahead.lines();
    let (mut left, mut from) = (Block::all(values), weights.as_ptr());
    while left.count > 0 {
        let (block, more) = left.split();
        let mut group = Group { from, from_stride: stride, to: out.as_mut_ptr(), to_stride: width };
        for row in (0..rows).step_by(ROWS) {
            // The first rows ask for all.
            let lines = if row == 0 { &mut asking } else { &mut Lines::none() };
            // SAFETY: the block is of values without gaps; the group has moved on to `row`, with as many rows of weights and of
            // `out` from there on, and a row has a weight for every key (asserted).
            unsafe {
                match (S::LANES, ROWS.min(rows - row)) {
                    (8, 1) => strips::<S, _, 1, 8>(simd, block, group, lines),
                    (8, 2) => strips::<S, _, 2, 4>(simd, block, group, lines),
                    (8, 3) => strips::<S, _, 3, 2>(simd, block, group, lines),
                    (8, _) => strips::<S, _, 4, 2>(simd, block, group, lines),
                    (_, 1) if eight => strips::<S, _, 1, 8>(simd, block, group, lines),
                    (_, 1) => strips::<S, _, 1, 4>(simd, block, group, lines),
                    (_, 2) if eight => strips::<S, _, 2, 8>(simd, block, group, lines),
                    (_, 2) => strips::<S, _, 2, 4>(simd, block, group, lines),
                    (_, 3) => strips::<S, _, 3, 4>(simd, block, group, lines),
                    (_, _) => strips::<S, _, 4, 4>(simd, block, group, lines),
                }
            }
            group = group.next();
        }
        (left, from) = (more, from.wrapping_add(block.count));
    }
}

/// Weighted values for R rows, strip after strip of N vectors; the last vector may be a part of one.
///
/// # Safety
/// * all rows of `values` are valid for reads of `cols` elements
/// * `group` has R rows of a weight for each of them, and R rows of `values.cols` elements, rounded up, to add to
#[inline(always)]
unsafe fn strips<S: Simd, T: Element, const R: usize, const N: usize>(
    simd: S,
    values: Block<T>,
    group: Group,
    lines: &mut Lines<'_>,
) {
    let wide = values.cols / (N * S::LANES) * (N * S::LANES);
    let whole = values.cols / S::LANES * S::LANES;
    let mut d = 0;
    while d < whole {
        let values = Block { at: values.at.wrapping_add(d), cols: values.cols - d, ..values };
        let group = Group { to: group.to.wrapping_add(d), ..group };
        // SAFETY: as many vectors from d on as are within the row; the caller's promise.
        unsafe {
            if d < wide {
                strip::<S, T, R, N, true>(simd, values, group, lines);
                d += N * S::LANES;
            } else {
                strip::<S, T, R, 1, true>(simd, values, group, lines);
                d += S::LANES;
            }
        }
    }
    if whole < values.cols {
        let values = Block { at: values.at.wrapping_add(whole), cols: values.cols - whole, ..values };
        let group = Group { to: group.to.wrapping_add(whole), ..group };
        // SAFETY: the rest of each row, rounded up; the caller's promise.
        unsafe { strip::<S, T, R, 1, false>(simd, values, group, lines) };
    }
}

/// The first N vectors of each row of values; or, unless `WHOLE`, a row's only one, which is less than a vector.
///
/// # Safety
/// * all rows of `values` are valid for reads of N vectors, or of `cols` elements, less than a vector
/// * `group` has R rows of a weight for each of them, and R rows of N vectors to add to
#[inline(always)]
unsafe fn strip<S: Simd, T: Element, const R: usize, const N: usize, const WHOLE: bool>(
    simd: S,
    values: Block<T>,
    group: Group,
    lines: &mut Lines<'_>,
) {
    let Block { mut at, stride, count, cols } = values;
    let Group { from: weights, from_stride, to: out, to_stride: width } = group;
    let mut sums = [[simd.zero(); N]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: vector n of row r: the caller's promise.
            *sum = unsafe { simd.load(out.wrapping_add(r * width + n * S::LANES)) };
        }
    }
    let bytes = N * S::LANES * size_of::<T>();
    let mut share = lines.share(simd, count, bytes, at);
    for j in 0..count {
        share.ask(simd, j, bytes);
        let mut vectors = [simd.zero(); N];
        for (n, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: vector n of row j, or all of it: the caller's promise.
            *vector = unsafe {
                match WHOLE {
                    true => simd.load_as(at.wrapping_add(n * S::LANES)),
                    false => simd.load_elements_part(std::slice::from_raw_parts(at, cols), 0.0),
                }
            };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the weight of key j in row r: the caller's promise.
            let weight = simd.splat(unsafe { *weights.wrapping_add(r * from_stride + j) });
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul_add(weight, vectors[n], *sum);
            }
        }
        at = at.wrapping_offset(stride);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (n, sum) in sums.into_iter().enumerate() {
            // SAFETY: vector n of row r: the caller's promise.
            unsafe { simd.store(out.wrapping_add(r * width + n * S::LANES), sum) };
        }
    }
}

/// As [`add_values`], leaving out values whose score is -inf instead of multiplying them by 0: for tiles that hold NaN or
/// infinite values and hidden keys. Plain and slow; the chains are the same.
pub(crate) fn add_visible_values(
    isa: Isa,
    values: AnyMatrix<'_>,
    (weights, scores): (&[f32], &[f32]),
    out: &mut [f32],
    stride: usize,
) {
    isa.run(AddVisibleValues { values, weights, scores, out, stride });
}

struct AddVisibleValues<'a> {
    values: AnyMatrix<'a>,
    weights: &'a [f32],
    scores: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
}

impl Kernel for AddVisibleValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = round_up_lanes(self.values.cols());
        with_elements!(self.values, values => for j in 0..values.rows() {
            let row = values.row(j).as_slice().expect("rows without gaps");
            for (r, out) in self.out.chunks_exact_mut(width.max(1)).enumerate() {
                let at = r * self.stride + j;
                if self.scores[at] != f32::NEG_INFINITY {
                    for (out, d) in out.chunks_exact_mut(S::LANES).zip((0..row.len()).step_by(S::LANES)) {
                        let weight = simd.splat(self.weights[at]);
                        let sum = simd.mul_add(weight, load_from(simd, row, d), simd.load_slice(out));
                        simd.store_slice(out, sum);
                    }
                }
            }
        });
    }
}

/// Whether every element is finite.
pub(crate) fn all_finite(isa: Isa, rows: AnyMatrix<'_>) -> bool {
    isa.run(AllFinite(rows))
}

struct AllFinite<'a>(AnyMatrix<'a>);

impl Kernel for AllFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let mut infinite_or_nan = false;
        with_elements!(self.0, matrix => for j in 0..matrix.rows() {
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
