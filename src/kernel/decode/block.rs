//! Blocks of keys or values, and groups of query rows that share each load from them.

use crate::simd::MAX_SHARED_ROWS;
use crate::tensor::matrix::Matrix;

/// Query rows that share a load of keys or values: the largest register tile of the levels.
pub(super) const ROWS: usize = MAX_SHARED_ROWS;

/// Keys of a block. All query rows use a block before the next one, so its lines stay in the L1 cache.
pub(super) const BLOCK_KEYS: usize = 32;

/// Neighbouring keys, or their values: rows of `cols` elements without gaps, `stride` elements apart.
///
/// This and [`RowGroup`] hold pointers, not views. With views cut from views, the address of a block's first load was itself
/// loaded from memory, and the multipliers waited for it: a tenth of the time of decoding.
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

    /// The first [`BLOCK_KEYS`] rows, and the rest.
    #[inline(always)]
    pub(super) fn split(self) -> (Self, Self) {
        let count = BLOCK_KEYS.min(self.count);
        let at = self.at.wrapping_offset(self.stride.wrapping_mul(count as isize));
        (Self { count, ..self }, Self { at, count: self.count - count, ..self })
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
