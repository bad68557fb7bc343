//! Rows at one stride: the views through which elements are read and written.
//!
//! A [`Matrix`] is cut from a [`Strided`](super::strided::Strided) tensor, or made from a slice. Index checks happen once per
//! row, not once per element.

use std::marker::PhantomData;

/// Rows and columns of elements.
///
/// Invariant: every index within `rows` and `cols` leads, by the strides, to an initialised element that stays readable for `'a`.
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
    /// * every index within `shape` (rows, columns) leads, by `strides`, to an initialised element that stays readable for `'a`
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
        assert!(rows.checked_mul(cols) == Some(data.len()), "{rows} rows of {cols} in {} elements", data.len());
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

    /// Whether the elements of a row are contiguous.
    #[inline]
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.col_stride == 1 || self.cols <= 1
    }

    /// The address of the first element.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *const T {
        self.origin
    }

    /// The same elements with rows as columns.
    #[inline]
    pub(crate) fn transposed(self) -> Self {
        Matrix { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
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

    /// Element `k`; `None` past the end.
    #[inline]
    pub(crate) fn get(&self, k: usize) -> Option<T> {
        // SAFETY: k is below `len`, so by the invariant the element is readable for 'a.
        (k < self.len).then(|| unsafe { *self.origin.wrapping_offset((k as isize).wrapping_mul(self.stride)) })
    }

    /// The row as a slice, if its elements are contiguous.
    #[inline]
    pub(crate) fn as_slice(&self) -> Option<&'a [T]> {
        match self.len {
            0 => Some(&[]),
            // SAFETY: the invariant: an element that is readable for 'a.
            1 => Some(unsafe { std::slice::from_raw_parts(self.origin, 1) }),
            // SAFETY: as above, for `len` elements side by side.
            _ if self.stride == 1 => Some(unsafe { std::slice::from_raw_parts(self.origin, self.len) }),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = T> + 'a {
        let row = *self;
        // SAFETY: k is below `len`, so by the invariant the element is readable for 'a.
        (0..row.len).map(move |k| unsafe { *row.origin.wrapping_offset((k as isize).wrapping_mul(row.stride)) })
    }
}

impl<'a, T> From<&'a [T]> for Row<'a, T> {
    #[inline(always)]
    fn from(row: &'a [T]) -> Self {
        // The invariant: a slice's elements are side by side, and readable for 'a.
        Row { origin: row.as_ptr(), len: row.len(), stride: 1, borrow: PhantomData }
    }
}

/// A row for writing.
///
/// Invariant: `origin` and `stride` lead to `len` different initialised elements, which only this value reads or writes for
/// `'a`.
#[derive(Debug)]
pub(crate) struct RowMut<'a, T> {
    origin: *mut T,
    len: usize,
    stride: isize,
    borrow: PhantomData<&'a mut T>,
}

impl<'a, T> RowMut<'a, T> {
    /// # Safety
    /// * `origin` and `stride` lead to `len` initialised elements, which only the result reads or writes for `'a`
    /// * these elements are different from each other
    #[inline]
    pub(super) unsafe fn from_parts(origin: *mut T, len: usize, stride: isize) -> Self {
        RowMut { origin, len, stride, borrow: PhantomData }
    }

    /// The row as a slice, if its elements are contiguous.
    #[inline]
    pub(crate) fn into_mut_slice(self) -> Result<&'a mut [T], Self> {
        match self.len {
            0 => Ok(&mut []),
            // SAFETY: the invariant: an element that is this value's alone for 'a, and the value is consumed.
            1 => Ok(unsafe { std::slice::from_raw_parts_mut(self.origin, 1) }),
            // SAFETY: as above, for `len` elements side by side.
            _ if self.stride == 1 => Ok(unsafe { std::slice::from_raw_parts_mut(self.origin, self.len) }),
            _ => Err(self),
        }
    }

    #[inline]
    pub(crate) fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = &mut T> {
        let (origin, stride) = (self.origin, self.stride);
        // SAFETY: k is below `len`, so by the invariant the element is ours while `self` is borrowed mutably. Each k comes once,
        // and different k lead to different elements.
        (0..self.len).map(move |k| unsafe { &mut *origin.wrapping_offset((k as isize).wrapping_mul(stride)) })
    }

    /// The same row, for reading.
    #[inline(always)]
    pub(crate) fn as_row(&self) -> Row<'_, T> {
        // The invariant of `Row`: the elements are readable, and no element is written while `self` is borrowed.
        Row { origin: self.origin.cast_const(), len: self.len, stride: self.stride, borrow: PhantomData }
    }

    /// Elements `range.start` to `range.end`, borrowed for the lifetime of the result.
    ///
    /// # Panics
    /// If there are no such elements.
    #[inline(always)]
    pub(crate) fn slice_mut(&mut self, range: std::ops::Range<usize>) -> RowMut<'_, T> {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        let origin = self.origin.wrapping_offset((range.start as isize).wrapping_mul(self.stride));
        // The invariant: some of the elements of `self`, which is borrowed mutably.
        RowMut { origin, len: range.len(), stride: self.stride, borrow: PhantomData }
    }

    /// Writes every element from `values`.
    ///
    /// # Panics
    /// If the number of values is not the length of the row.
    #[inline]
    pub(crate) fn fill_from(&mut self, values: impl ExactSizeIterator<Item = T>) {
        assert_eq!(values.len(), self.len);
        self.iter_mut().zip(values).for_each(|(to, value)| *to = value);
    }
}

impl<'a, T> From<&'a mut [T]> for RowMut<'a, T> {
    #[inline(always)]
    fn from(row: &'a mut [T]) -> Self {
        // The invariant: a slice's elements are side by side, and borrowed mutably for 'a.
        RowMut { origin: row.as_mut_ptr(), len: row.len(), stride: 1, borrow: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts of a row, at strides of either sign, are read and written where they lie.
    #[test]
    fn parts_of_rows_are_written_in_place() {
        let mut data = [0, 1, 2, 3, 4, 5, 6u16];
        // SAFETY: elements 6, 4, 2 and 0 of `data`, which is borrowed mutably.
        let mut row = unsafe { RowMut::from_parts(data.as_mut_ptr().wrapping_add(6), 4, -2) };
        let mut part = row.slice_mut(1..3);
        assert_eq!(part.as_row().iter().collect::<Vec<_>>(), [4, 2]);
        part.fill_from([40, 20].into_iter());
        assert_eq!(row.as_row().iter().collect::<Vec<_>>(), [6, 40, 20, 0]);
        RowMut::from(&mut data[..2]).slice_mut(1..2).fill_from([10].into_iter());
        assert_eq!(data, [0, 10, 20, 3, 40, 5, 6]);
    }

    #[test]
    #[should_panic(expected = "rows of 2 in 0 elements")]
    fn a_size_that_wraps_is_no_size() {
        Matrix::<f32>::from_slice(&[], usize::MAX / 2 + 1, 2);
    }
}
