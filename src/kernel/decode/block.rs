//! Blocks of keys or values, and groups of rows that share each load of them.

use crate::tensor::matrix::Matrix;

/// Rows that share a load of keys or values. With eight lanes, four rows and two keys (or vectors of values) make eight
/// chains, which keep the multipliers busy and leave registers for the operands; with sixteen there are registers for four.
pub(super) const ROWS: usize = 4;

/// Keys that all rows are done with before the next ones: their lines stay in the first cache meanwhile.
pub(super) const BLOCK_KEYS: usize = 32;

/// Some neighbouring keys, or their values: rows of `cols` elements without gaps, `stride` apart.
///
/// (Like [`Group`], pointers in registers and not a view: with views cut from views, the address of a block's first load came
/// out of memory, by way of other addresses that did, and the multipliers ran out of work meanwhile: a tenth of decoding.)
#[derive(Clone, Copy)]
pub(super) struct Block<T> {
    pub(super) at: *const T,
    pub(super) stride: isize,
    pub(super) count: usize,
    pub(super) cols: usize,
}

impl<T: Copy> Block<T> {
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

/// Rows that share each load: what one has of f32 to multiply with, `from_stride` after the row before, and where its results go,
/// `to_stride` after.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub(super) from: *const f32,
    pub(super) from_stride: usize,
    pub(super) to: *mut f32,
    pub(super) to_stride: usize,
}

impl Group {
    /// The next [`ROWS`] rows.
    #[inline(always)]
    pub(super) fn next(self) -> Self {
        let (from, to) = (self.from.wrapping_add(ROWS * self.from_stride), self.to.wrapping_add(ROWS * self.to_stride));
        Self { from, to, ..self }
    }
}
