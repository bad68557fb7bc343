//! Rows of a tensor at addresses of their own, such as the keys of a sequence in pages.

use super::any::AnyTensor;
use super::strided::Strided;
use crate::element::{DType, with_elements};
use std::marker::PhantomData;
use std::ops::Range;

/// Memory for the addresses of a [`RowList`], used again for the next one.
#[derive(Debug, Default)]
pub(crate) struct RowAddresses {
    rows: Vec<*const u8>,
}

// SAFETY: nothing is read through the addresses but by way of a `RowList`, which borrows what they lead to.
unsafe impl Send for RowAddresses {}
// SAFETY: as above.
unsafe impl Sync for RowAddresses {}

/// Rows of one head of a tensor, each without gaps between its elements.
///
/// Invariant: each of the addresses leads to `cols` elements of type `dtype`, side by side, that stay readable for `'l`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowList<'l> {
    rows: &'l [*const u8],
    /// The number of rows that most often follow each other at one stride.
    run_len: usize,
    cols: usize,
    dtype: DType,
    borrow: PhantomData<&'l u8>,
}

impl RowAddresses {
    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.capacity() * size_of::<*const u8>()
    }

    /// The number of addresses that there is memory for.
    pub(crate) fn capacity(&self) -> usize {
        self.rows.capacity()
    }

    /// Makes memory for `len` addresses.
    pub(crate) fn grow(&mut self, len: usize) {
        self.rows.reserve_exact(len.saturating_sub(self.rows.len()));
    }

    /// Lists rows of head `head` of `tensor`: rows `range` of batch index `index`, for each `(index, range)` that `runs` passes to
    /// its argument.
    ///
    /// * `run_len`: the number of rows of most runs
    ///
    /// # Panics
    /// If there are no such rows, or gaps between the elements of a row.
    pub(crate) fn list<'l>(
        &'l mut self,
        tensor: &'l AnyTensor<'_>,
        head: usize,
        (runs, run_len): (impl EachRun, usize),
    ) -> RowList<'l> {
        self.rows.clear();
        with_elements!(tensor, tensor => self.add_rows(tensor, head, runs));
        // Invariant: `add_rows` has checked each row, and the tensor is borrowed for 'l.
        RowList { rows: &self.rows, run_len, cols: tensor.shape()[3], dtype: tensor.dtype(), borrow: PhantomData }
    }

    fn add_rows<T>(&mut self, tensor: &Strided<'_, T, 4>, head: usize, runs: impl EachRun) {
        let [indices, heads, rows, cols] = *tensor.shape();
        let [index_stride, _, row_stride, col_stride] = *tensor.strides();
        assert!(head < heads && (col_stride == 1 || cols <= 1), "head {head} of {heads}");
        let first = if indices == 0 { return } else { tensor.matrix(0, head).as_ptr() };
        runs.for_each(|index, range| {
            assert!(index < indices && range.end <= rows, "rows {range:?} of {rows}, index {index} of {indices}");
            // Wrapping: rows without elements may have any stride. The others are inside the tensor (asserted).
            let mut at = first
                .wrapping_offset((index as isize).wrapping_mul(index_stride))
                .wrapping_offset((range.start as isize).wrapping_mul(row_stride));
            self.rows.extend(range.map(|_| {
                let row = at.cast::<u8>();
                at = at.wrapping_offset(row_stride);
                row
            }));
        });
    }
}

/// Some runs of rows: a batch index of a tensor, and rows there.
pub(crate) trait EachRun {
    /// Calls `visit` with each run.
    fn for_each(self, visit: impl FnMut(usize, Range<usize>));
}

impl<'l> RowList<'l> {
    pub(crate) fn run_len(&self) -> usize {
        self.run_len
    }

    /// The address of each row.
    pub(crate) fn addresses(&self) -> &'l [*const u8] {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }
}
