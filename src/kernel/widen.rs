//! Rows of any element type, widened to f32.

use super::convert::load_from;
use crate::element::{Element, with_elements};
use crate::kv::rows::KeyRows;
use crate::kv::run::{Run, with_run};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd, kernel};
use crate::tensor::group::AnyGroupRows;
use crate::tensor::matrix::{Matrix, Row};
use std::ops::Range;

/// `to = factor * row`, of the same length. A factor of 1 leaves every bit as it is.
#[inline(always)]
pub(super) fn widen<S: Simd, T: Element>(simd: S, row: Row<'_, T>, factor: f32, to: &mut [f32]) {
    match row.as_slice() {
        Some(row) => {
            let factor = simd.splat(factor);
            let (mut from, mut whole) = (row.chunks_exact(S::LANES), to.chunks_exact_mut(S::LANES));
            for (from, to) in (&mut from).zip(&mut whole) {
                simd.store_slice(to, simd.mul(simd.load_elements(from), factor));
            }
            let rest = whole.into_remainder();
            if !rest.is_empty() {
                simd.store_part(rest, simd.mul(simd.load_elements_part(from.remainder(), 0.0), factor));
            }
        }
        None => {
            for (to, from) in to.iter_mut().zip(row.iter()) {
                *to = from.to_f32() * factor;
            }
        }
    }
}

/// Widens the rows of a group: `to[n][e] = factor * rows[n][e]`, zeros after a row's elements and after the last row.
///
/// * `to`: `[count or more][width]`
pub(crate) fn widen_group(isa: Isa, rows: AnyGroupRows<'_>, factor: f32, (to, width): (&mut [f32], usize)) {
    isa.run(WidenGroup { rows, factor, to, width });
}

struct WidenGroup<'a> {
    rows: AnyGroupRows<'a>,
    factor: f32,
    to: &'a mut [f32],
    width: usize,
}

impl Kernel for WidenGroup<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_elements!(self.rows, rows => for (n, to) in self.to.chunks_exact_mut(self.width.max(1)).enumerate() {
            if n >= rows.count() {
                to.fill(0.0);
                continue;
            }
            let (to, padding) = to.split_at_mut(rows.cols());
            padding.fill(0.0);
            widen(simd, rows.row(n), self.factor, to);
        });
    }
}

kernel! {
    /// Widens rows: `to[r][e] = rows[r][e]`, without gaps.
    fn widen_rows<'a, S: Simd>(simd: S, rows: Run<'a>, to: &'a mut [f32]) {
        with_run!(rows, matrix => {
            assert!(to.len() == matrix.rows() * matrix.cols());
            if !matrix.has_contiguous_rows() && matrix.transposed().has_contiguous_rows() {
                return widen_columns(simd, matrix.transposed(), to);
            }
            for (r, to) in to.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
                widen(simd, matrix.row(r), 1.0, to);
            }
        });
    }
}

/// `to[r][c] = columns[c][r]`, without gaps. Square blocks are transposed in registers: one element at a time, decode took twelve
/// to twenty times as long as from rows.
#[inline(always)]
fn widen_columns<S: Simd, T: Element>(simd: S, columns: Matrix<'_, T>, to: &mut [f32]) {
    let (rows, cols) = (columns.cols(), columns.rows());
    for first in (0..cols).step_by(S::LANES) {
        let count = S::LANES.min(cols - first);
        let mut block_columns: [&[T]; MAX_LANES] = [&[]; MAX_LANES];
        for (n, column) in block_columns[..count].iter_mut().enumerate() {
            *column = columns.row(first + n).as_slice().expect("columns without gaps");
        }
        for row in (0..rows).step_by(S::LANES) {
            let mut block = [simd.zero(); MAX_LANES];
            for n in 0..S::LANES {
                if n < count {
                    block[n] = load_from(simd, block_columns[n], row);
                }
            }
            let block = simd.transpose(block);
            for n in 0..S::LANES {
                if row + n < rows {
                    simd.store_part(&mut to[(row + n) * cols + first..][..count], block[n]);
                }
            }
        }
    }
}

/// The rows themselves if a product can read them in place, or their copy in `wide`.
pub(crate) fn as_f32<'a>(isa: Isa, rows: Run<'a>, wide: &'a mut [f32]) -> Matrix<'a, f32> {
    rows.in_place().unwrap_or_else(|| {
        let wide = &mut wide[..rows.rows() * rows.cols()];
        widen_rows(isa, rows, wide);
        Matrix::from_slice(wide, rows.rows(), rows.cols())
    })
}

kernel! {
    /// Widens the rows `range`, wherever they lie: `to[r][e] = rows[range.start + r][e]`, with zeros after a row's elements.
    ///
    /// * `to`: `[range][width]`
    fn widen_key_rows<'a, S: Simd>(simd: S, rows: KeyRows<'a>, range: Range<usize>, to: &'a mut [f32], width: usize) {
        assert!(to.len() == range.len() * width);
        let mut rest = to.chunks_exact_mut(width.max(1));
        for run in rows.runs(range) {
            with_run!(run, matrix => for (r, to) in (0..matrix.rows()).zip(&mut rest) {
                let (to, padding) = to.split_at_mut(matrix.cols());
                padding.fill(0.0);
                widen(simd, matrix.row(r), 1.0, to);
            });
        }
    }
}

/// A copy of the rows `range` in `wide`.
pub(crate) fn copied_as_f32<'a>(
    isa: Isa,
    rows: KeyRows<'_>,
    range: Range<usize>,
    wide: &'a mut [f32],
) -> Matrix<'a, f32> {
    let width = rows.cols();
    padded_as_f32(isa, rows, range, (wide, width))
}

/// A copy of the rows `range`, `[range][width]`, with zeros after the elements of each row.
pub(crate) fn padded_as_f32<'a>(
    isa: Isa,
    rows: KeyRows<'_>,
    range: Range<usize>,
    (wide, width): (&'a mut [f32], usize),
) -> Matrix<'a, f32> {
    let count = range.len();
    let wide = &mut wide[..count * width];
    widen_key_rows(isa, rows, range, wide, width);
    Matrix::from_slice(wide, count, width)
}

/// The rows `range` as one run: in place, or their copy in `wide` if they are in several runs, or there are gaps between elements.
#[inline(always)]
pub(crate) fn as_one_run<'a>(isa: Isa, rows: &KeyRows<'a>, range: Range<usize>, wide: &'a mut [f32]) -> Run<'a> {
    match rows.one_run(range.clone()) {
        Some(run) => without_gaps(isa, run, wide),
        None => Run::F32(copied_as_f32(isa, *rows, range, wide)),
    }
}

/// The rows themselves, or their copy in `wide` if there are gaps between their elements.
pub(crate) fn without_gaps<'a>(isa: Isa, rows: Run<'a>, wide: &'a mut [f32]) -> Run<'a> {
    if rows.has_contiguous_rows() { rows } else { Run::F32(as_f32(isa, rows, wide)) }
}
