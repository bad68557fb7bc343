//! Rows of bf16 as pairs of elements, for the products of pairs.

use super::matrix::{Matrix, Row};
use crate::element::{Bf16Pair, bf16};

impl<'a> Matrix<'a, bf16> {
    /// The same memory as pairs of neighbours: if rows have no gaps, and an even number of columns and an even stride.
    pub(crate) fn pairs(&self) -> Option<Matrix<'a, Bf16Pair>> {
        let even = self.has_contiguous_rows() && self.cols().is_multiple_of(2) && self.row_stride() % 2 == 0;
        // SAFETY: column p is elements 2 p and 2 p + 1 of a row, side by side (rows have no gaps, and an even number of
        // columns) and readable for 'a. Rows are as far apart as before, counted in pairs: an even stride is halved exactly.
        // A pair is two bf16 (`repr(C)`) and needs no more alignment than one.
        even.then(|| unsafe {
            Matrix::from_parts(self.as_ptr().cast(), [self.rows(), self.cols() / 2], [self.row_stride() / 2, 1])
        })
    }
}

impl<'a> Matrix<'a, Bf16Pair> {
    /// A matrix without gaps, of pairs stored in the bits of f32.
    ///
    /// # Panics
    /// If `data` is not `rows * cols` long.
    pub(crate) fn from_carried(data: &'a [f32], rows: usize, cols: usize) -> Self {
        let carriers = Matrix::from_slice(data, rows, cols);
        // SAFETY: a pair has the size of an f32 and needs less alignment, and any bits are two bf16; so each index leads to a
        // pair where it led to an f32 that is readable for 'a.
        unsafe { Matrix::from_parts(carriers.as_ptr().cast(), [rows, cols], [carriers.row_stride(), 1]) }
    }

    /// The first `cols` elements of every row.
    ///
    /// # Panics
    /// If rows have gaps or fewer elements.
    pub(crate) fn elements(&self, cols: usize) -> Matrix<'a, bf16> {
        assert!(self.has_contiguous_rows() && cols <= 2 * self.cols());
        // SAFETY: element k of a row is half of pair k / 2, which is within the row (asserted above) and readable for 'a. Rows
        // are as far apart as before, counted in elements.
        unsafe { Matrix::from_parts(self.as_ptr().cast(), [self.rows(), cols], [self.row_stride().wrapping_mul(2), 1]) }
    }
}

impl<'a> Row<'a, bf16> {
    /// The same memory as pairs of neighbours: if the row has no gaps and an even length.
    #[inline(always)]
    pub(crate) fn pairs(&self) -> Option<&'a [Bf16Pair]> {
        let row = self.as_slice()?;
        // SAFETY: a pair is two elements side by side and needs no more alignment than one.
        let pairs = || unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), row.len() / 2) };
        row.len().is_multiple_of(2).then(pairs)
    }
}
