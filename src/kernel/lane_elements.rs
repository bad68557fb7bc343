//! Tensors with an element for each pair, as a panel reads them: by rows, which are transposed, or by columns, which lie in memory
//! as lanes do.

use super::arithmetic::F32Fma;
use super::transpose::{LaneRows, load_block, load_masks};
use crate::element::Element;
use crate::simd::{MAX_LANES, Simd};
use crate::tensor::group::GroupRows;
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// The elements of a panel's rows for some keys.
#[expect(clippy::large_enum_variant, reason = "one on the stack for each panel and tile")]
pub(super) enum LaneElements<'a, T> {
    /// Rows without gaps.
    Rows(LaneRows<'a, T>),
    /// The elements of neighbouring rows are neighbours in memory.
    Columns(LaneColumns<'a, T>),
}

impl<'a, T: Copy> LaneElements<'a, T> {
    /// The elements `cols` of `rows`; lanes without a row repeat the last row. `None` if they are neither rows without gaps nor
    /// columns with an element for each lane.
    pub(super) fn of_group(rows: GroupRows<'a, T>, cols: Range<usize>, lanes: usize) -> Option<Self> {
        if rows.has_contiguous_rows() {
            return LaneRows::of_group(rows, cols).map(LaneElements::Rows);
        }
        LaneColumns::of_group(rows, cols, lanes).map(LaneElements::Columns)
    }

    /// The runs of memory that hold them.
    pub(super) fn runs(&self) -> impl Iterator<Item = &'a [T]> {
        let (rows, columns) = match self {
            LaneElements::Rows(rows) => (Some(rows), None),
            LaneElements::Columns(columns) => (None, Some(columns)),
        };
        let rows = rows.into_iter().flat_map(|rows| (0..rows.count()).map(|lane| rows.row(lane)));
        rows.chain(columns.into_iter().flat_map(|columns| (0..columns.keys.rows()).map(|key| columns.key(key))))
    }
}

impl<T: Element> LaneElements<'_, T> {
    /// Vectors of `LANES` lanes from `lane` on, for each of `keys`, at most `LANES`. Rows have `LANES` elements from the first of
    /// the keys on.
    #[inline(always)]
    pub(super) fn load<S: Simd>(&self, simd: S, lane: usize, keys: Range<usize>) -> [S::F32; MAX_LANES] {
        match self {
            LaneElements::Rows(rows) => simd.transpose(load_block((simd, F32Fma::new()), rows, lane, keys.start)),
            LaneElements::Columns(columns) => columns.load(simd, lane, keys),
        }
    }
}

impl LaneElements<'_, u8> {
    /// As [`load`](Self::load): whether bytes are not 0.
    #[inline(always)]
    pub(super) fn load_masks<S: Simd>(&self, simd: S, lane: usize, keys: Range<usize>) -> [S::Mask; MAX_LANES] {
        match self {
            LaneElements::Rows(rows) => simd.transpose_masks(load_masks(simd, rows, lane, keys.start)),
            LaneElements::Columns(columns) => columns.load_masks(simd, lane, keys),
        }
    }
}

/// A row of memory for each key, with an element for each lane.
pub(super) struct LaneColumns<'a, T> {
    /// `[keys][lanes]`.
    keys: Matrix<'a, T>,
}

impl<'a, T: Copy> LaneColumns<'a, T> {
    fn of_group(rows: GroupRows<'a, T>, cols: Range<usize>, lanes: usize) -> Option<Self> {
        let mut heads = rows.heads();
        let (Some(rows), None) = (heads.next(), heads.next()) else { return None };
        let keys = rows.slice_cols(cols).transposed();
        (keys.cols() == lanes && keys.has_contiguous_rows()).then_some(LaneColumns { keys })
    }

    /// The elements of a key.
    #[inline(always)]
    fn key(&self, key: usize) -> &'a [T] {
        self.keys.row(key).as_slice().expect("rows without gaps")
    }
}

impl<T: Element> LaneColumns<'_, T> {
    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, first: usize, keys: Range<usize>) -> [S::F32; MAX_LANES] {
        let mut block = [simd.zero(); MAX_LANES];
        for (vector, key) in block.iter_mut().zip(keys) {
            *vector = simd.load_elements(&self.key(key)[first..first + S::LANES]);
        }
        block
    }
}

impl LaneColumns<'_, u8> {
    #[inline(always)]
    fn load_masks<S: Simd>(&self, simd: S, first: usize, keys: Range<usize>) -> [S::Mask; MAX_LANES] {
        let mut masks = [simd.lt(simd.zero(), simd.zero()); MAX_LANES];
        for (mask, key) in masks.iter_mut().zip(keys) {
            let bytes = &self.key(key)[first..first + S::LANES];
            // SAFETY: the slice has LANES elements.
            *mask = unsafe { simd.load_mask(bytes.as_ptr()) };
        }
        masks
    }
}
