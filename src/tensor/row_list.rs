//! Rows of a tensor at addresses of their own, such as the keys of a sequence in pages.

use super::any::AnyTensor;
use super::strided::Strided;
use crate::element::{DType, with_elements};
use std::marker::PhantomData;
use std::ops::Range;

/// Memory for the addresses of [`ListedRows`], used again by the next task.
#[derive(Debug, Default)]
pub(crate) struct RowAddresses {
    rows: Vec<*const u8>,
    /// Rows that are read after these. They are prefetched, and nothing is read through these addresses.
    ahead: Vec<*const u8>,
}

// SAFETY: nothing is read through the addresses but by way of a `RowList`, which borrows what they lead to.
unsafe impl Send for RowAddresses {}
// SAFETY: as above.
unsafe impl Sync for RowAddresses {}

impl RowAddresses {
    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        (self.rows.capacity() + self.ahead.capacity()) * size_of::<*const u8>()
    }

    /// The number of rows that there is memory for.
    pub(crate) fn capacity(&self) -> usize {
        self.rows.capacity().max(self.ahead.capacity())
    }

    /// Makes memory for `len` rows.
    pub(crate) fn grow(&mut self, len: usize) {
        for addresses in [&mut self.rows, &mut self.ahead] {
            addresses.reserve_exact(len.saturating_sub(addresses.len()));
        }
    }
}

/// Rows of one head of a tensor, listed part by part. Each part is listed together with the rows that are read after it.
///
/// Invariant: each address in `memory.rows` leads to a row of the head, which stays readable for `'a`. So does each in
/// `memory.ahead`, if `ahead_is_own`.
#[derive(Debug)]
pub(crate) struct ListedRows<'m, 'a> {
    memory: &'m mut RowAddresses,
    tensor: &'a AnyTensor<'a>,
    head: usize,
    ahead_is_own: bool,
    /// The number of rows ahead, without what fills the list up.
    ahead: usize,
}

impl<'m, 'a> ListedRows<'m, 'a> {
    /// For rows of head `head` of `tensor`. Its rows must have no gaps between their elements.
    pub(crate) fn new(memory: &'m mut RowAddresses, tensor: &'a AnyTensor<'a>, head: usize) -> Self {
        memory.rows.clear();
        memory.ahead.clear();
        ListedRows { memory, tensor, head, ahead_is_own: true, ahead: 0 }
    }

    /// Lists rows: rows `range` of batch index `index`, for each `(index, range)` of `runs`.
    ///
    /// # Panics
    /// If there are no such rows, or gaps between the elements of a row.
    pub(crate) fn list(&mut self, runs: impl EachRun) {
        list(&mut self.memory.rows, self.tensor, self.head, runs);
    }

    /// As [`list`](Self::list), for the rows ahead, which must be of this head.
    pub(crate) fn advance(&mut self) {
        assert!(self.ahead_is_own, "rows of another head");
        let RowAddresses { rows, ahead } = &mut *self.memory;
        std::mem::swap(rows, ahead);
        rows.truncate(self.ahead);
        ahead.clear();
        self.ahead = 0;
    }

    /// Lists the rows ahead: those of head `head` of `tensor` that are read next. They are prefetched while the rows are read.
    pub(crate) fn list_ahead(&mut self, tensor: &AnyTensor<'_>, head: usize, runs: impl EachRun) {
        self.ahead_is_own = std::ptr::eq(tensor, self.tensor) && head == self.head;
        list(&mut self.memory.ahead, tensor, head, runs);
        self.ahead = self.memory.ahead.len();
    }

    /// The rows.
    pub(crate) fn rows(&mut self) -> RowList<'_> {
        let RowAddresses { rows, ahead } = &mut *self.memory;
        // A row that is in cache: loops over the rows need no branch.
        let cached = rows.last().copied().unwrap_or(std::ptr::null());
        ahead.resize(self.ahead.max(rows.len()) + AHEAD_PADDING, cached);
        let (cols, dtype) = (self.tensor.shape()[3], self.tensor.dtype());
        RowList { rows, ahead, cols, dtype, borrow: PhantomData }
    }
}

/// Lists the addresses of rows of head `head` of `tensor`.
///
/// # Panics
/// If there are no such rows, or gaps between the elements of a row.
fn list(addresses: &mut Vec<*const u8>, tensor: &AnyTensor<'_>, head: usize, runs: impl EachRun) {
    addresses.clear();
    with_elements!(tensor, tensor => add_rows(addresses, tensor, head, runs));
}

fn add_rows<T>(addresses: &mut Vec<*const u8>, tensor: &Strided<'_, T, 4>, head: usize, runs: impl EachRun) {
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
        addresses.extend(range.map(|_| {
            let row = at.cast::<u8>();
            at = at.wrapping_offset(row_stride);
            row
        }));
    });
}

/// Some runs of rows: a batch index of a tensor, and rows there.
pub(crate) trait EachRun {
    /// Calls `visit` with each run.
    fn for_each(self, visit: impl FnMut(usize, Range<usize>));
}

/// Rows of one head of a tensor, each without gaps between its elements, and rows that are read next.
///
/// Invariants:
/// * each of the addresses in `rows` leads to `cols` elements of type `dtype`, side by side, that stay readable for `'l`
/// * `ahead` has [`AHEAD_PADDING`] more addresses than `rows` at least; these may lead anywhere
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowList<'l> {
    rows: &'l [*const u8],
    ahead: &'l [*const u8],
    cols: usize,
    dtype: DType,
    borrow: PhantomData<&'l u8>,
}

/// The rows ahead are at least this number more than the rows.
pub(crate) const AHEAD_PADDING: usize = 16;

impl<'l> RowList<'l> {
    /// The address of each row.
    pub(crate) fn addresses(&self) -> &'l [*const u8] {
        self.rows
    }

    /// The addresses of what is prefetched while each row is read, and [`AHEAD_PADDING`] more.
    pub(crate) fn ahead(&self) -> &'l [*const u8] {
        self.ahead
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }
}
