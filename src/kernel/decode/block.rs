//! Blocks of keys or values, and groups of query rows that share each load from them.

use crate::element::{Bf16Pair, bf16};
use crate::simd::{MAX_LANES, MAX_SHARED_ROWS};
use crate::tensor::matrix::Matrix;
use crate::tensor::row_list::RowList;
use std::marker::PhantomData;

/// Query rows that share a load of keys or values: the largest register tile of the levels.
pub(super) const ROWS: usize = MAX_SHARED_ROWS;

/// Keys of a block. All query rows use a block before the next one, so its lines stay in the L1 cache.
pub(super) const BLOCK_KEYS: usize = 32;

/// The fewest keys of a block whose rows lie in short runs.
const LEAST_LISTED_KEYS: usize = 16;

/// The addresses of neighbouring keys, or of their values: at one stride ([`Strided`]), or anywhere ([`Listed`]).
pub(super) trait Rows<T>: Copy {
    /// What [`tile_row`](Self::tile_row) needs to know about a block.
    type Tile;

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
    /// The most rows of a block.
    fn block_keys(self) -> usize;
    /// The same rows from column `col` on.
    fn columns_from(self, col: usize) -> Self;
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
    fn block_keys(self) -> usize {
        BLOCK_KEYS
    }
    #[inline(always)]
    fn columns_from(self, col: usize) -> Self {
        Self { at: self.at.wrapping_add(col), ..self }
    }
}

/// Rows at addresses of their own.
pub(super) struct Listed<T> {
    rows: *const *const u8,
    col: usize,
    block_keys: usize,
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
        Self { rows: self.rows.wrapping_add(n), ..self }
    }
    #[inline(always)]
    fn block_keys(self) -> usize {
        self.block_keys
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
        // A block is at most one run: where the rows to prefetch end inside a loop, all of its lines are prefetched at once.
        let block_keys = list.run_len().clamp(LEAST_LISTED_KEYS, BLOCK_KEYS);
        let rows = Listed { rows: list.addresses().as_ptr(), col: 0, block_keys, element: PhantomData };
        Self { rows, count: list.addresses().len(), cols: list.cols() }
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
        let count = self.rows.block_keys().min(self.count);
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
