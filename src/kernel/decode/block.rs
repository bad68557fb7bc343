//! Blocks of keys or values, and groups of query rows that share each load from them.

use crate::element::{Bf16Pair, bf16};
use crate::kernel::prefetch::{LoopPrefetch, PrefetchLines};
use crate::simd::{LINE, MAX_LANES, MAX_SHARED_ROWS, Simd};
use crate::tensor::matrix::Matrix;
use crate::tensor::row_list::{AHEAD_PADDING, RowList};
use std::marker::PhantomData;

const _: () = assert!(AHEAD_PADDING >= MAX_LANES, "a tile has at most `MAX_LANES` rows");

/// Query rows that share a load of keys or values: the largest register tile of the levels.
pub(super) const ROWS: usize = MAX_SHARED_ROWS;

/// Keys of a block. All query rows use a block before the next one, so its lines stay in the L1 cache.
pub(super) const BLOCK_KEYS: usize = 32;

/// The addresses of neighbouring keys, or of their values: at one stride ([`Strided`]), or anywhere ([`Listed`]).
pub(super) trait Rows<T>: Copy {
    /// What [`tile_row`](Self::tile_row) needs to know about a block.
    type Tile;
    /// The prefetches of a loop over rows.
    type Prefetches: RowPrefetches;

    /// For tiles of `tile` of the `count` rows, which is 1 or more.
    fn tile(self, count: usize, tile: usize) -> Self::Tile;
    /// Row `n` of the tile that starts here. If the block has fewer rows, its last one is repeated.
    ///
    /// # Safety
    /// * `tile` is that of the block, and the tile lies inside it, or is the block if that is shorter
    unsafe fn tile_row(self, tile: &Self::Tile, n: usize) -> *const T;
    /// Row 0.
    ///
    /// # Safety
    /// * there is a row
    unsafe fn first(self) -> *const T;
    /// The rows from row `n` on.
    fn after(self, n: usize) -> Self;
    /// The prefetches of a loop that starts here, of `iterations` iterations that read `bytes` bytes each. Those of rows at a stride
    /// are taken from `lines`.
    ///
    /// # Safety
    /// * there is a row
    unsafe fn prefetches<S: Simd>(
        self,
        simd: S,
        lines: &mut PrefetchLines<'_>,
        iterations: usize,
        bytes: usize,
    ) -> Self::Prefetches;
    /// The same rows from column `col` on.
    fn columns_from(self, col: usize) -> Self;
}

/// The prefetches of a loop over rows.
pub(super) trait RowPrefetches {
    /// The number of iterations, at most `most`, until [`end_run`](Self::end_run). Each iteration reads `bytes` bytes.
    fn run(&self, most: usize, bytes: usize) -> usize;
    /// Issues those of an iteration that reads `bytes` bytes of each of N rows, from byte `iteration * bytes` on.
    ///
    /// # Safety
    /// * the loop is over N rows at least
    unsafe fn issue_across<S: Simd, const N: usize>(&mut self, simd: S, iteration: usize, bytes: usize);
    /// Issues those of an iteration that reads `bytes` bytes of row `row`.
    ///
    /// # Safety
    /// * the loop is over more rows than `row`
    unsafe fn issue_along<S: Simd>(&mut self, simd: S, row: usize, bytes: usize);
    /// Ends a run of `iterations` iterations of `bytes` bytes.
    fn end_run<S: Simd>(&mut self, simd: S, iterations: usize, bytes: usize);
    /// Goes on to the next `rows` rows, which are read side by side.
    fn next_rows(&mut self, rows: usize);
}

impl RowPrefetches for LoopPrefetch {
    #[inline(always)]
    fn run(&self, most: usize, bytes: usize) -> usize {
        LoopPrefetch::run(self, most, bytes)
    }
    #[inline(always)]
    unsafe fn issue_across<S: Simd, const N: usize>(&mut self, simd: S, iteration: usize, bytes: usize) {
        self.issue(simd, iteration, N * bytes);
    }
    #[inline(always)]
    unsafe fn issue_along<S: Simd>(&mut self, simd: S, row: usize, bytes: usize) {
        self.issue(simd, row, bytes);
    }
    #[inline(always)]
    fn end_run<S: Simd>(&mut self, simd: S, iterations: usize, bytes: usize) {
        LoopPrefetch::end_run(self, simd, iterations, bytes);
    }
    #[inline(always)]
    fn next_rows(&mut self, _: usize) {}
}

/// The prefetches of a loop over listed rows: while a part of a row is read, the same part of the row ahead.
///
/// They go into the second cache, because a tile ahead does not fit the first one. Pages of 4 KiB in random order came at 25 GB/s that
/// way, and at 16 into the first cache, which waits for fewer lines (Zen 4).
pub(super) struct ListedPrefetches {
    ahead: *const *const u8,
    /// The part of each row that the loop reads starts at this byte.
    offset: usize,
}

impl ListedPrefetches {
    /// Prefetches `bytes` bytes of row `row` ahead, from byte `at` of the loop's part on: for each line's length, the line that it ends in,
    /// and where the row starts, the line that it starts in. A row that starts inside a line also ends inside one. Without that line, decode
    /// over pages of one key took 1.4 (f16) and 1.7 (bf16) times as long (Zen 4), because allocators start large blocks 16 bytes after a line.
    ///
    /// # Safety
    /// * there is such a row ahead
    #[inline(always)]
    unsafe fn issue<S: Simd>(&self, simd: S, row: usize, at: usize, bytes: usize) {
        // SAFETY: the caller's promise.
        let row = unsafe { *self.ahead.wrapping_add(row) };
        let start = self.offset + at;
        if start == 0 {
            simd.prefetch(row);
        }
        for line in 1..=bytes.div_ceil(LINE) {
            simd.prefetch(row.wrapping_add(start + line * LINE - 1));
        }
    }
}

impl RowPrefetches for ListedPrefetches {
    #[inline(always)]
    fn run(&self, most: usize, _: usize) -> usize {
        most
    }
    #[inline(always)]
    unsafe fn issue_across<S: Simd, const N: usize>(&mut self, simd: S, iteration: usize, bytes: usize) {
        if iteration.is_multiple_of((LINE / bytes).max(1)) {
            for n in 0..N {
                // SAFETY: there is a row ahead for each row, and for a whole tile after them: a loop has at most one tile more
                // rows than the block.
                unsafe { self.issue(simd, n, iteration * bytes, bytes) };
            }
        }
    }
    #[inline(always)]
    unsafe fn issue_along<S: Simd>(&mut self, simd: S, row: usize, bytes: usize) {
        // SAFETY: there is a row ahead for each row.
        unsafe { self.issue(simd, row, 0, bytes) };
    }
    #[inline(always)]
    fn end_run<S: Simd>(&mut self, _: S, _: usize, _: usize) {}
    #[inline(always)]
    fn next_rows(&mut self, rows: usize) {
        self.ahead = self.ahead.wrapping_add(rows);
    }
}

/// Rows at one stride, which is counted in bytes: pairs of bf16 may lie an odd number of elements apart.
pub(super) struct Strided<T> {
    at: *const T,
    stride: isize,
}

impl<T> Clone for Strided<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Strided<T> {}

impl<T> Rows<T> for Strided<T> {
    /// The offset of each row from the first one.
    type Tile = [isize; MAX_LANES];
    type Prefetches = LoopPrefetch;

    #[inline(always)]
    fn tile(self, count: usize, tile: usize) -> Self::Tile {
        let mut offsets = [0; MAX_LANES];
        for (n, offset) in offsets[..tile].iter_mut().enumerate() {
            *offset = self.stride.wrapping_mul(n.min(count - 1) as isize);
        }
        offsets
    }
    #[inline(always)]
    unsafe fn tile_row(self, offsets: &Self::Tile, n: usize) -> *const T {
        self.at.wrapping_byte_offset(offsets[n])
    }
    #[inline(always)]
    unsafe fn first(self) -> *const T {
        self.at
    }
    #[inline(always)]
    fn after(self, n: usize) -> Self {
        Self { at: self.at.wrapping_byte_offset(self.stride.wrapping_mul(n as isize)), ..self }
    }
    #[inline(always)]
    unsafe fn prefetches<S: Simd>(
        self,
        simd: S,
        lines: &mut PrefetchLines<'_>,
        iterations: usize,
        bytes: usize,
    ) -> LoopPrefetch {
        lines.for_loop(simd, iterations, bytes, self.at)
    }
    #[inline(always)]
    fn columns_from(self, col: usize) -> Self {
        Self { at: self.at.wrapping_add(col), ..self }
    }
}

/// Rows at addresses of their own.
pub(super) struct Listed<T> {
    rows: *const *const u8,
    /// What is prefetched while each row is read, and [`AHEAD_PADDING`] more addresses.
    ahead: *const *const u8,
    col: usize,
    element: PhantomData<T>,
}

impl<T> Clone for Listed<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Listed<T> {}

impl<T> Listed<T> {
    /// # Safety
    /// * the list has row `n`
    #[inline(always)]
    unsafe fn row(self, n: usize) -> *const T {
        // SAFETY: the caller's promise.
        unsafe { *self.rows.wrapping_add(n) }.cast::<T>().wrapping_add(self.col)
    }
}

impl<T> Rows<T> for Listed<T> {
    /// The last row.
    type Tile = usize;
    type Prefetches = ListedPrefetches;

    #[inline(always)]
    fn tile(self, count: usize, _: usize) -> usize {
        count - 1
    }
    #[inline(always)]
    unsafe fn tile_row(self, last: &usize, n: usize) -> *const T {
        // SAFETY: a row of the block: the caller's promise.
        unsafe { self.row(n.min(*last)) }
    }
    #[inline(always)]
    unsafe fn first(self) -> *const T {
        // SAFETY: the caller's promise.
        unsafe { self.row(0) }
    }
    #[inline(always)]
    fn after(self, n: usize) -> Self {
        Self { rows: self.rows.wrapping_add(n), ahead: self.ahead.wrapping_add(n), ..self }
    }
    #[inline(always)]
    unsafe fn prefetches<S: Simd>(self, _: S, _: &mut PrefetchLines<'_>, _: usize, _: usize) -> ListedPrefetches {
        ListedPrefetches { ahead: self.ahead, offset: self.col * size_of::<T>() }
    }
    #[inline(always)]
    fn columns_from(self, col: usize) -> Self {
        Self { col: self.col + col, ..self }
    }
}

/// Neighbouring keys, or their values: rows of `cols` elements without gaps, read one by one or in pairs.
///
/// This and [`RowGroup`] hold pointers, not views. With views cut from views, the address of a block's first load was itself
/// loaded from memory, and the multipliers waited for it: a tenth of the time of decoding.
#[derive(Clone, Copy)]
pub(super) struct RowBlock<P> {
    pub(super) rows: P,
    pub(super) count: usize,
    pub(super) cols: usize,
}

impl<T: Copy> RowBlock<Strided<T>> {
    #[inline(always)]
    pub(super) fn all(rows: Matrix<'_, T>) -> Self {
        assert!(rows.has_contiguous_rows());
        let stride = rows.row_stride().wrapping_mul(size_of::<T>() as isize);
        Self { rows: Strided { at: rows.as_ptr(), stride }, count: rows.rows(), cols: rows.cols() }
    }
}

impl RowBlock<Strided<Bf16Pair>> {
    /// Rows of bf16 that are read as pairs of neighbours. If their number is odd, the last element of a row is half of a pair.
    #[inline(always)]
    pub(super) fn pairs(rows: Matrix<'_, bf16>) -> Self {
        let RowBlock { rows: Strided { at, stride }, count, cols } = RowBlock::all(rows);
        Self { rows: Strided { at: at.cast(), stride }, count, cols }
    }
}

impl<T> RowBlock<Listed<T>> {
    /// The rows of a list.
    ///
    /// # Safety
    /// * a row of the list is elements of type `T`, or `T` is a pair of them
    #[inline(always)]
    pub(super) unsafe fn listed(list: RowList<'_>) -> Self {
        let (addresses, ahead) = (list.addresses(), list.ahead());
        let rows = Listed { rows: addresses.as_ptr(), ahead: ahead.as_ptr(), col: 0, element: PhantomData };
        Self { rows, count: addresses.len(), cols: list.cols() }
    }
}

/// Evaluates an expression with a name bound to the rows of a [`RowList`], for each type of element.
macro_rules! with_listed {
    ($list:expr, $rows:ident => $value:expr) => {
        $crate::kernel::decode::block::with_listed!(@types $list, $rows => $value;
            F32 f32, F16 $crate::element::f16, Bf16 $crate::element::bf16)
    };
    (@types $list:expr, $rows:ident => $value:expr; $($dtype:ident $t:ty),+) => {
        match $list.dtype() {
            $($crate::element::DType::$dtype => {
                use $crate::kernel::decode::block::{Listed, RowBlock};
                // SAFETY: rows of the list's type (its invariant).
                let $rows = unsafe { RowBlock::<Listed<$t>>::listed($list) };
                $value
            })+
        }
    };
}
pub(super) use with_listed;

impl<P> RowBlock<P> {
    /// The rows of the first block, and the rest.
    #[inline(always)]
    pub(super) fn split<T>(self) -> (Self, Self)
    where
        P: Rows<T>,
    {
        let count = BLOCK_KEYS.min(self.count);
        (Self { count, ..self }, Self { rows: self.rows.after(count), count: self.count - count, ..self })
    }
}

/// Query rows that share each load. Row `r` reads f32 from `from + r * from_stride` on, and writes from `to + r * to_stride`
/// on.
#[derive(Clone, Copy)]
pub(super) struct RowGroup {
    pub(super) from: *const f32,
    pub(super) from_stride: usize,
    pub(super) to: *mut f32,
    pub(super) to_stride: usize,
}

impl RowGroup {
    /// The next [`ROWS`] rows.
    #[inline(always)]
    pub(super) fn next(self) -> Self {
        let (from, to) = (self.from.wrapping_add(ROWS * self.from_stride), self.to.wrapping_add(ROWS * self.to_stride));
        Self { from, to, ..self }
    }
}
