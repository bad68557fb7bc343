//! Blocks of keys or values, and groups of rows that share each load of them.

use crate::simd::MAX_SHARED_ROWS;
use crate::tensor::matrix::Matrix;

/// Rows that share a load of keys or values: as many as the levels have register tiles for.
pub(super) const ROWS: usize = MAX_SHARED_ROWS;

/// Keys that all rows are done with before the next ones: their lines stay in the L1 cache meanwhile.
pub(super) const BLOCK_KEYS: usize = 32;

/// Some neighbouring keys, or their values: rows of `cols` elements without gaps, `stride` apart.
///
/// (Pointers in registers and not a view, like [`RowGroup`]. With views cut from views, the address of a block's first load came
/// out of memory, by way of other addresses that did, and the multipliers waited meanwhile: a tenth of decoding.)
#[derive(Clone, Copy)]
pub(super) struct RowBlock<T> {
    pub(super) at: *const T,
    pub(super) stride: isize,
    pub(super) count: usize,
    pub(super) cols: usize,
}

impl<T: Copy> RowBlock<T> {
    #[inline(always)]
    pub(super) fn all(rows: Matrix<'_, T>) -> Self {
        assert!(rows.has_contiguous_rows());
        Self { at: rows.as_ptr(), stride: rows.row_stride(), count: rows.rows(), cols: rows.cols() }
    }

    /// At most [`BLOCK_KEYS`] of them, and the rest.
    #[inline(always)]
    pub(super) fn split(self) -> (Self, Self) {
        let count = BLOCK_KEYS.min(self.count);
        let at = self.at.wrapping_offset(self.stride.wrapping_mul(count as isize));
        (Self { count, ..self }, Self { at, count: self.count - count, ..self })
    }
}

/// Rows that share each load. The f32 that a row multiplies with start `from_stride` after those of the row before; its results
/// go `to_stride` after.
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
