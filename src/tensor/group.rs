//! The rows of a group of heads that share a key/value head.
//!
//! Row `r` is query `r / group` of head `r % group` of the group. So neighbouring rows have nearly the same position, and one
//! pass over keys and values serves the whole group.

use super::any::{AnySharedRows, AnyTensor};
use super::matrix::{Matrix, Row, RowMut};
use super::shared::SharedRows;
use super::strided::Strided;
use crate::element::{ByElement, bf16, f16, map_elements, with_elements};
use std::marker::PhantomData;
use std::ops::Range;

/// The offset of row `r` of a group: strides and a division.
#[derive(Clone, Copy, Debug)]
struct GroupLayout {
    group: usize,
    head_stride: isize,
    query_stride: isize,
    /// Queries of a batch; after them come those of the next batch.
    queries: usize,
    batch_stride: isize,
}

impl GroupLayout {
    /// The head of the group and the query of row `r`.
    #[inline(always)]
    fn head_and_query(self, r: usize) -> (usize, usize) {
        // A division takes longer than the rest of finding a row, and most groups have one head.
        if self.group == 1 { (0, r) } else { (r % self.group, r / self.group) }
    }

    /// Elements from row 0 to row `r`. Wrapping, because rows without elements may have any stride.
    #[inline(always)]
    fn offset(self, r: usize) -> isize {
        let (head, query) = self.head_and_query(r);
        // Most groups are of one batch, and need no division.
        let in_first = query < self.queries;
        let (batch, query) = if in_first { (0, query) } else { (query / self.queries, query % self.queries) };
        let offset = |index: usize, stride: isize| (index as isize).wrapping_mul(stride);
        offset(head, self.head_stride)
            .wrapping_add(offset(query, self.query_stride))
            .wrapping_add(offset(batch, self.batch_stride))
    }
}

/// Rows of a group, for reading.
///
/// Invariant: every row leads to `cols` elements, `col_stride` apart, that stay readable for `'a`.
#[derive(Debug)]
pub(crate) struct GroupRows<'a, T> {
    origin: *const T,
    layout: GroupLayout,
    /// The index in the group of row 0, and the number of rows.
    first: usize,
    count: usize,
    cols: usize,
    col_stride: isize,
    borrow: PhantomData<&'a T>,
}

impl<T> Clone for GroupRows<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for GroupRows<'_, T> {}

impl<'a, T: Copy> GroupRows<'a, T> {
    /// All rows of the heads `heads` of batch `b`.
    ///
    /// # Panics
    /// If there is no such batch, or are no such heads.
    #[inline]
    pub(crate) fn new(tensor: &Strided<'a, T, 4>, b: usize, heads: Range<usize>) -> Self {
        Self::of_batches(tensor, b..b + 1, heads, tensor.shape()[2])
    }

    /// The rows of the first `queries` queries of the heads `heads`, of one batch of `batches` after the other.
    ///
    /// # Panics
    /// If there are no such batches, heads or queries.
    #[inline]
    pub(crate) fn of_batches(
        tensor: &Strided<'a, T, 4>,
        batches: Range<usize>,
        heads: Range<usize>,
        queries: usize,
    ) -> Self {
        let [batch, all_heads, all_queries, cols] = *tensor.shape();
        let [batch_stride, head_stride, query_stride, col_stride] = *tensor.strides();
        assert!(batches.start < batches.end && batches.end <= batch, "batches {batches:?} of {batch}");
        assert!(heads.end <= all_heads && queries <= all_queries, "heads {heads:?}, {queries} queries");
        let (group, count) = (heads.len(), heads.len() * queries * batches.len());
        let origin = tensor.matrix(batches.start, heads.start.min(all_heads.saturating_sub(1))).as_ptr();
        // Invariant: the indices of every row and element are within the tensor's shape.
        let layout = GroupLayout { group, head_stride, query_stride, queries, batch_stride };
        GroupRows { origin, layout, first: 0, count, cols, col_stride, borrow: PhantomData }
    }

    /// Rows `rows.start` to `rows.end` of these.
    ///
    /// # Panics
    /// If there are no such rows.
    #[inline]
    pub(crate) fn slice(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.count, "rows {rows:?} of {}", self.count);
        GroupRows { first: self.first + rows.start, count: rows.len(), ..self }
    }

    /// The elements of these rows from `first` on.
    ///
    /// # Panics
    /// If the rows are shorter than that.
    #[inline]
    pub(crate) fn skip_cols(self, first: usize) -> Self {
        assert!(first <= self.cols, "element {first} of {}", self.cols);
        // Wrapping, because rows without elements may have any stride.
        let origin = self.origin.wrapping_offset((first as isize).wrapping_mul(self.col_stride));
        // Invariant: element e of a row was element `first + e`.
        GroupRows { origin, cols: self.cols - first, ..self }
    }

    #[inline]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    #[inline]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the elements of a row are contiguous.
    #[inline]
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.col_stride == 1 || self.cols <= 1
    }

    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub(crate) fn row(&self, n: usize) -> Row<'a, T> {
        assert!(n < self.count, "row {n} of {}", self.count);
        let origin = self.origin.wrapping_offset(self.layout.offset(self.first + n));
        // SAFETY: the invariant, and there is such a row.
        unsafe { Row::from_parts(origin, self.cols, self.col_stride) }
    }

    /// The rows as a matrix, if there are any, and they are of one head and one batch.
    #[inline(always)]
    pub(crate) fn one_head(self) -> Option<Matrix<'a, T>> {
        if self.layout.group != 1 || self.count == 0 || self.first + self.count > self.layout.queries {
            return None;
        }
        let origin = self.origin.wrapping_offset(self.layout.offset(self.first));
        // SAFETY: the invariant, for each of these rows. They are of one head and one batch, so a query stride apart.
        Some(unsafe {
            Matrix::from_parts(origin, [self.count, self.cols], [self.layout.query_stride, self.col_stride])
        })
    }

    /// The rows of each head in the group, as a matrix. They must be of one batch.
    pub(crate) fn heads(self) -> impl Iterator<Item = Matrix<'a, T>> {
        let query = |n| self.layout.head_and_query(self.first + n).1;
        assert!(self.count == 0 || query(self.count - 1) < self.layout.queries, "heads of several batches");
        (0..self.layout.group.min(self.count)).map(move |n| {
            let origin = self.origin.wrapping_offset(self.layout.offset(self.first + n));
            let rows = (self.count - n).div_ceil(self.layout.group);
            // SAFETY: the invariant: rows a group apart are those of one head, from this one on.
            unsafe { Matrix::from_parts(origin, [rows, self.cols], [self.layout.query_stride, self.col_stride]) }
        })
    }
}

/// Rows of a group, of any element type.
pub(crate) type AnyGroupRows<'a> = ByElement<GroupRows<'a, f32>, GroupRows<'a, f16>, GroupRows<'a, bf16>>;

impl<'a> AnyGroupRows<'a> {
    /// As [`GroupRows::new`].
    pub(crate) fn new(tensor: &AnyTensor<'a>, b: usize, heads: Range<usize>) -> Self {
        map_elements!(tensor, tensor => GroupRows::new(tensor, b, heads))
    }

    /// As [`GroupRows::of_batches`].
    pub(crate) fn of_batches(
        tensor: &AnyTensor<'a>,
        batches: Range<usize>,
        heads: Range<usize>,
        queries: usize,
    ) -> Self {
        map_elements!(tensor, tensor => GroupRows::of_batches(tensor, batches, heads, queries))
    }

    /// As [`GroupRows::slice`].
    #[inline]
    pub(crate) fn slice(self, rows: Range<usize>) -> Self {
        map_elements!(self, all => all.slice(rows))
    }

    /// As [`GroupRows::skip_cols`].
    #[inline]
    pub(crate) fn skip_cols(self, first: usize) -> Self {
        map_elements!(self, all => all.skip_cols(first))
    }

    pub(crate) fn has_contiguous_rows(&self) -> bool {
        with_elements!(self, rows => rows.has_contiguous_rows())
    }
}

/// Rows of a group, for exclusive writing.
///
/// Invariant: every row leads to `cols` elements, `col_stride` apart, that only this value reads or writes for `'a`; no two
/// rows share an element.
#[derive(Debug)]
pub(crate) struct GroupRowsMut<'a, T> {
    origin: *mut T,
    layout: GroupLayout,
    first: usize,
    count: usize,
    cols: usize,
    col_stride: isize,
    borrow: PhantomData<&'a mut T>,
}

impl<'a, T> GroupRowsMut<'a, T> {
    /// The rows `rows` of the heads `heads` of batch `b`, counted within the group.
    ///
    /// # Safety
    /// * while the result lives, there is no other value with any of these rows
    ///
    /// # Panics
    /// If there is no such batch, or are no such heads or rows.
    pub(crate) unsafe fn new(output: &SharedRows<'a, T>, b: usize, heads: Range<usize>, rows: Range<usize>) -> Self {
        let (cols, col_stride) = (output.shape()[3], output.strides()[3]);
        // SAFETY: the caller's promise.
        unsafe { Self::of_heads(output, b, heads, rows, (cols, col_stride)) }
    }

    /// As [`GroupRowsMut::new`], for a tensor with one element for each row.
    ///
    /// # Safety
    /// * while the result lives, there is no other value with any of these elements
    ///
    /// # Panics
    /// As [`GroupRowsMut::new`].
    pub(crate) unsafe fn of_elements(
        output: &SharedRows<'a, T, 3>,
        b: usize,
        heads: Range<usize>,
        rows: Range<usize>,
    ) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::of_heads(output, b, heads, rows, (1, 1)) }
    }

    /// For a tensor with one row for each head: the elements `cols` of the rows of `heads`.
    ///
    /// # Safety
    /// * while the result lives, there is no other value with any of these elements
    ///
    /// # Panics
    /// If there is no such batch, or are no such heads or elements.
    pub(crate) unsafe fn of_columns(
        output: &SharedRows<'a, T, 3>,
        b: usize,
        heads: Range<usize>,
        cols: Range<usize>,
    ) -> Self {
        let ([_, _, all], [_, head_stride, col_stride]) = (*output.shape(), *output.strides());
        assert!(cols.start <= cols.end && cols.end <= all, "elements {cols:?} of {all}");
        let layout = GroupLayout { group: heads.len(), head_stride, query_stride: 0, queries: 1, batch_stride: 0 };
        let count = heads.len();
        // The invariant of `SharedRows` says that the elements exist; the rest is the caller's promise. There is one row for each
        // head, so the query stride is never used.
        let origin = output.first_of(b, heads).wrapping_offset((cols.start as isize).wrapping_mul(col_stride));
        GroupRowsMut { origin, layout, first: 0, count, cols: cols.len(), col_stride, borrow: PhantomData }
    }

    /// As [`GroupRowsMut::new`], for rows of `cols` elements, `col_stride` apart. The axes of `output` begin with batch, head
    /// and query.
    ///
    /// # Safety
    /// * while the result lives, there is no other value with any of these rows
    /// * each row of `output` has such elements
    ///
    /// # Panics
    /// As [`GroupRowsMut::new`].
    unsafe fn of_heads<const N: usize>(
        output: &SharedRows<'a, T, N>,
        b: usize,
        heads: Range<usize>,
        rows: Range<usize>,
        (cols, col_stride): (usize, isize),
    ) -> Self {
        let (queries, strides) = (output.shape()[2], output.strides());
        assert!(rows.start <= rows.end && rows.end <= heads.len() * queries, "rows {rows:?} of {heads:?}");
        let (head_stride, query_stride, batch_stride) = (strides[1], strides[2], strides[0]);
        let layout = GroupLayout { group: heads.len(), head_stride, query_stride, queries, batch_stride };
        // The invariant of `SharedRows` says that the elements exist; the rest is the caller's promise.
        let origin = output.first_of(b, heads);
        GroupRowsMut { origin, layout, first: rows.start, count: rows.len(), cols, col_stride, borrow: PhantomData }
    }

    #[inline]
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the elements of a row are contiguous.
    #[inline]
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.col_stride == 1 || self.cols <= 1
    }

    /// Row `n` of these, borrowed while it is written.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub(crate) fn row_mut(&mut self, n: usize) -> RowMut<'_, T> {
        assert!(n < self.count, "row {n} of {}", self.count);
        let origin = self.origin.wrapping_offset(self.layout.offset(self.first + n));
        // SAFETY: the invariant, and there is such a row; `self` is borrowed mutably.
        unsafe { RowMut::from_parts(origin, self.cols, self.col_stride) }
    }

    /// Rows `rows.start` to `rows.end` of these, each once.
    ///
    /// # Panics
    /// If there are no such rows.
    #[inline(always)]
    pub(crate) fn rows_mut(&mut self, rows: Range<usize>) -> impl Iterator<Item = RowMut<'_, T>> {
        assert!(rows.start <= rows.end && rows.end <= self.count, "rows {rows:?} of {}", self.count);
        let (origin, layout, first, cols, stride) = (self.origin, self.layout, self.first, self.cols, self.col_stride);
        rows.map(move |n| {
            let origin = origin.wrapping_offset(layout.offset(first + n));
            // SAFETY: the invariant; `self` is borrowed mutably, and each row comes once.
            unsafe { RowMut::from_parts(origin, cols, stride) }
        })
    }

    /// The addresses of the rows of each head in the group: the first element, the stride in elements, the number of rows. They
    /// are for prefetching, which reads nothing.
    pub(crate) fn heads(&self) -> impl Iterator<Item = (*const T, isize, usize)> + use<'a, T> {
        let (origin, layout, first, count) = (self.origin, self.layout, self.first, self.count);
        (0..layout.group.min(count)).map(move |n| {
            let origin = origin.wrapping_offset(layout.offset(first + n));
            (origin.cast_const(), layout.query_stride, (count - n).div_ceil(layout.group))
        })
    }
}

/// Rows of a group, for exclusive writing, of any element type.
pub(crate) type AnyGroupRowsMut<'a> = ByElement<GroupRowsMut<'a, f32>, GroupRowsMut<'a, f16>, GroupRowsMut<'a, bf16>>;

impl<'a> AnyGroupRowsMut<'a> {
    /// As [`GroupRowsMut::new`].
    ///
    /// # Safety
    /// As [`GroupRowsMut::new`].
    pub(crate) unsafe fn new(output: &AnySharedRows<'a>, b: usize, heads: Range<usize>, rows: Range<usize>) -> Self {
        // SAFETY: the caller's promise.
        map_elements!(output, output => unsafe { GroupRowsMut::new(output, b, heads, rows) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::strided::StridedMut;
    use super::*;

    /// Row r is query r / group of head r % group, for any strides; a slice counts from its first row.
    #[test]
    fn rows_are_those_of_the_group() {
        let data: Vec<u16> = (0..2 * 4 * 3 * 6).collect();
        // Element (b, h, i, e) is data[72 b + 18 (3 - h) + 6 i + 2 e].
        let tensor = Strided::new(&data, 54, [2, 4, 3, 3], [72, -18, 6, 2]).unwrap();
        for (b, heads) in [(0, 0..1), (1, 3..4), (0, 0..4), (1, 1..3), (1, 1..4)] {
            let (group, all) = (heads.len(), GroupRows::new(&tensor, b, heads.clone()));
            assert_eq!((all.count(), all.cols(), all.has_contiguous_rows()), (3 * group, 3, false));
            for first in 0..=all.count() {
                let rows = all.slice(first..all.count());
                for n in 0..rows.count() {
                    let (h, i) = (heads.start + (first + n) % group, (first + n) / group);
                    let expected: Vec<u16> = (0..3).map(|e| tensor.get([b, h, i, e]).unwrap()).collect();
                    assert_eq!(rows.row(n).iter().collect::<Vec<_>>(), expected, "{heads:?}: row {n} from {first}");
                }
                // Head by head, they are the same rows.
                let by_head =
                    rows.heads().flat_map(|head| (0..head.rows()).map(move |i| head.row(i).iter().sum::<u16>()));
                let one_by_one = (0..rows.count()).map(|n| rows.row(n).iter().sum::<u16>());
                let sorted = |mut sums: Vec<u16>| {
                    sums.sort_unstable();
                    sums
                };
                assert_eq!(sorted(by_head.collect()), sorted(one_by_one.collect()));
            }
        }
    }

    /// Two threads write disjoint rows of a tensor with gaps and a negative stride; gaps are not written.
    #[test]
    fn threads_write_their_rows() {
        let mut data = [0u16; 2 * 4 * 20];
        // Element (b, h, i, e) is data[80 b + 20 (3 - h) + 5 i + e].
        let shared = SharedRows::new(StridedMut::new(&mut data, 60, [2, 4, 4, 3], [80, -20, 5, 1]).unwrap());
        let write = |heads: Range<usize>| {
            for b in 0..2 {
                // SAFETY: each thread has the rows of its own heads, of one batch at a time.
                let mut rows = unsafe { GroupRowsMut::new(&shared, b, heads.clone(), 0..4 * heads.len()) };
                let group = heads.len();
                for (r, row) in rows.rows_mut(0..4 * group).enumerate() {
                    let (h, i) = (heads.start + r % group, r / group);
                    row.into_mut_slice().expect("no gaps").fill((100 * b + 10 * h + i + 1) as u16);
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| write(0..3));
            write(3..4);
        });
        for (n, value) in data.into_iter().enumerate() {
            let (b, h, i, e) = (n / 80, 3 - n % 80 / 20, n % 20 / 5, n % 5);
            assert_eq!(value as usize, if e < 3 { 100 * b + 10 * h + i + 1 } else { 0 }, "element {n}");
        }
    }

    #[test]
    fn elements_are_rows_of_one() {
        let mut data = [0u16; 12];
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [1, 2, 3], [12, 6, 2]).unwrap());
        // SAFETY: this is the only value with these elements.
        let mut rows = unsafe { GroupRowsMut::of_elements(&shared, 0, 0..2, 1..6) };
        for (n, mut row) in rows.rows_mut(0..5).enumerate() {
            row.iter_mut().for_each(|x| *x = n as u16 + 1);
        }
        assert_eq!(data, [0, 0, 2, 0, 4, 0, 1, 0, 3, 0, 5, 0]);
    }

    #[test]
    fn columns_are_a_part_of_each_row() {
        let mut data = [0u16; 24];
        // Element (h, j) is data[12 h + 2 j].
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [1, 2, 6], [24, 12, 2]).unwrap());
        // SAFETY: these are the only values, with different elements.
        let mut parts = unsafe {
            [(0..2, 1..3), (1..2, 4..6)].map(|(heads, cols)| GroupRowsMut::of_columns(&shared, 0, heads, cols))
        };
        for (n, part) in parts.iter_mut().enumerate() {
            for (r, mut row) in part.rows_mut(0..2 - n).enumerate() {
                row.iter_mut().enumerate().for_each(|(c, x)| *x = (10 * (n + 1) + 5 * r + c) as u16);
            }
        }
        let written: Vec<_> = data.into_iter().enumerate().filter(|(_, x)| *x != 0).collect();
        assert_eq!(written, [(2, 10), (4, 11), (14, 15), (16, 16), (20, 20), (22, 21)]);
    }

    #[test]
    #[should_panic(expected = "elements 1..7 of 6")]
    fn columns_outside_are_not_written() {
        let mut data = [0u16; 12];
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [1, 2, 6], [12, 6, 1]).unwrap());
        // SAFETY: there is no other value.
        let _ = unsafe { GroupRowsMut::of_columns(&shared, 0, 0..1, 1..7) };
    }

    #[test]
    #[should_panic(expected = "rows 0..3 of 2")]
    fn rows_outside_are_not_written() {
        let mut data = [0u16; 12];
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [1, 2, 3], [12, 6, 2]).unwrap());
        // SAFETY: this is the only value with these elements.
        let mut rows = unsafe { GroupRowsMut::of_elements(&shared, 0, 0..2, 1..3) };
        let _ = rows.rows_mut(0..3).count();
    }
}
