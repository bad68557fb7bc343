//! Rows at one stride: the view through which elements are read and written.
//!
//! A [`Matrix`] is cut from a [`Strided`](super::strided::Strided) tensor, or made from a slice. Index checks happen once per
//! row, not once per element.

use crate::element::{Bf16Pair, bf16};
use std::marker::PhantomData;

/// Two axes of a [`Strided`], under the same invariant.
#[derive(Debug)]
pub(crate) struct Matrix<'a, T> {
    origin: *const T,
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
    borrow: PhantomData<&'a T>,
}

impl<T> Clone for Matrix<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Matrix<'_, T> {}

impl<'a, T> Matrix<'a, T> {
    /// # Safety
    /// * every index within `shape` (rows, columns) leads, by `strides`, to an element that stays readable for `'a`
    #[inline]
    pub(super) unsafe fn from_parts(origin: *const T, shape: [usize; 2], strides: [isize; 2]) -> Self {
        let ([rows, cols], [row_stride, col_stride]) = (shape, strides);
        Matrix { origin, rows, cols, row_stride, col_stride, borrow: PhantomData }
    }

    /// A matrix without gaps.
    ///
    /// # Panics
    /// If `data` is not `rows * cols` long.
    #[inline]
    pub(crate) fn from_slice(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        Matrix { origin: data.as_ptr(), rows, cols, row_stride: cols as isize, col_stride: 1, borrow: PhantomData }
    }

    #[inline]
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    #[inline]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    #[inline]
    pub(crate) fn row_stride(&self) -> isize {
        self.row_stride
    }

    /// Whether the elements of a row stand side by side.
    #[inline]
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.col_stride == 1 || self.cols <= 1
    }

    /// The address of the first element.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *const T {
        self.origin
    }

    /// Rows `range.start` to `range.end`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[inline]
    pub(crate) fn slice_rows(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let origin = self.origin.wrapping_offset((range.start as isize).wrapping_mul(self.row_stride));
        Matrix { origin, rows: range.len(), ..*self }
    }

    /// Columns `range.start` to `range.end`.
    ///
    /// # Panics
    /// If there are no such columns.
    #[inline]
    pub(crate) fn slice_cols(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        let origin = self.origin.wrapping_offset((range.start as isize).wrapping_mul(self.col_stride));
        Matrix { origin, cols: range.len(), ..*self }
    }

    /// # Panics
    /// If there is no such row.
    #[inline]
    pub(crate) fn row(&self, r: usize) -> Row<'a, T> {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        let origin = self.origin.wrapping_offset((r as isize).wrapping_mul(self.row_stride));
        Row { origin, len: self.cols, stride: self.col_stride, borrow: PhantomData }
    }
}

impl<'a> Matrix<'a, bf16> {
    /// Neighbours taken together, if that takes no more than another look at the same memory.
    pub(crate) fn pairs(&self) -> Option<Matrix<'a, Bf16Pair>> {
        let even = self.has_contiguous_rows() && self.cols.is_multiple_of(2) && self.row_stride % 2 == 0;
        // Every pair is two elements of a row, side by side, so the invariant holds for it.
        even.then(|| Matrix {
            origin: self.origin.cast(),
            rows: self.rows,
            cols: self.cols / 2,
            row_stride: self.row_stride / 2,
            col_stride: 1,
            borrow: PhantomData,
        })
    }
}

impl<'a> Matrix<'a, Bf16Pair> {
    /// A matrix without gaps, of pairs that stand in the bits of f32.
    ///
    /// # Panics
    /// If `data` is not `rows * cols` long.
    pub(crate) fn from_carried(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        // A pair has the size of an f32 and needs less alignment, and any bits are one.
        let origin = data.as_ptr().cast();
        Matrix { origin, rows, cols, row_stride: cols as isize, col_stride: 1, borrow: PhantomData }
    }

    /// The first `cols` elements of every row, one by one.
    ///
    /// # Panics
    /// If rows have gaps or fewer elements.
    pub(crate) fn elements(&self, cols: usize) -> Matrix<'a, bf16> {
        assert!(self.has_contiguous_rows() && cols <= 2 * self.cols);
        // Each element is one half of a pair, so the invariant holds for it.
        Matrix {
            origin: self.origin.cast(),
            rows: self.rows,
            cols,
            row_stride: self.row_stride.wrapping_mul(2),
            col_stride: 1,
            borrow: PhantomData,
        }
    }
}

/// One row of a [`Matrix`], under the same invariant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a, T> {
    origin: *const T,
    len: usize,
    stride: isize,
    borrow: PhantomData<&'a T>,
}

impl<'a, T: Copy> Row<'a, T> {
    /// # Safety
    /// * `len` elements, `stride` apart from `origin` on, stay readable for `'a`
    #[inline(always)]
    pub(super) unsafe fn from_parts(origin: *const T, len: usize, stride: isize) -> Self {
        Row { origin, len, stride, borrow: PhantomData }
    }

    /// Elements `range.start` to `range.end`.
    ///
    /// # Panics
    /// If there are no such elements.
    #[inline]
    pub(crate) fn slice(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        let origin = self.origin.wrapping_offset((range.start as isize).wrapping_mul(self.stride));
        Row { origin, len: range.len(), ..*self }
    }

    /// The row as a slice, if its elements stand side by side.
    #[inline]
    pub(crate) fn as_slice(&self) -> Option<&'a [T]> {
        match self.len {
            0 => Some(&[]),
            // SAFETY: the invariant: `len` elements from `origin` on, one after the other, readable for 'a.
            1 => Some(unsafe { std::slice::from_raw_parts(self.origin, 1) }),
            // SAFETY: as above.
            _ if self.stride == 1 => Some(unsafe { std::slice::from_raw_parts(self.origin, self.len) }),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = T> + 'a {
        let row = *self;
        // SAFETY: k is below `len`: an element that the invariant vouches for.
        (0..row.len).map(move |k| unsafe { *row.origin.wrapping_offset((k as isize).wrapping_mul(row.stride)) })
    }
}

impl<'a> Row<'a, bf16> {
    /// Neighbours taken together, if they stand side by side and none is left over.
    #[inline(always)]
    pub(crate) fn pairs(&self) -> Option<&'a [Bf16Pair]> {
        let row = self.as_slice()?;
        // SAFETY: a pair is two elements side by side and needs no more alignment than one.
        let pairs = || unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), row.len() / 2) };
        row.len().is_multiple_of(2).then(pairs)
    }
}

/// A row that is written.
#[derive(Debug)]
pub(crate) struct RowMut<'a, T> {
    origin: *mut T,
    len: usize,
    stride: isize,
    borrow: PhantomData<&'a mut T>,
}

impl<'a, T> RowMut<'a, T> {
    /// # Safety
    /// * `len` elements, `stride` apart from `origin` on, may be read and written, by nobody else, for `'a`
    #[inline]
    pub(super) unsafe fn from_parts(origin: *mut T, len: usize, stride: isize) -> Self {
        RowMut { origin, len, stride, borrow: PhantomData }
    }

    /// The row as a slice, if its elements stand side by side.
    #[inline]
    pub(crate) fn into_mut_slice(self) -> Result<&'a mut [T], Self> {
        match self.len {
            0 => Ok(&mut []),
            // SAFETY: `row_mut`: `len` elements from `origin` on, one after the other, for us alone.
            1 => Ok(unsafe { std::slice::from_raw_parts_mut(self.origin, 1) }),
            // SAFETY: as above.
            _ if self.stride == 1 => Ok(unsafe { std::slice::from_raw_parts_mut(self.origin, self.len) }),
            _ => Err(self),
        }
    }

    #[inline]
    pub(crate) fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = &mut T> {
        let (origin, stride) = (self.origin, self.stride);
        // SAFETY: k is below `len`: an element that `row_mut` vouches for, and each k comes once.
        (0..self.len).map(move |k| unsafe { &mut *origin.wrapping_offset((k as isize).wrapping_mul(stride)) })
    }

    /// Writes every element from `values`.
    ///
    /// # Panics
    /// If there are not as many values.
    #[inline]
    pub(crate) fn fill_from(&mut self, values: impl ExactSizeIterator<Item = T>) {
        assert_eq!(values.len(), self.len);
        self.iter_mut().zip(values).for_each(|(to, value)| *to = value);
    }
}
