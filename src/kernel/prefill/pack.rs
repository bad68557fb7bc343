//! Packs a tile of values in the order in which the products read them, and widens them to f32.

use crate::element::Element;
use crate::kernel::convert::load_from;
use crate::kernel::shape::{EvenBlocks, level_value_block_dims, value_block_dims};
use crate::kv::run::{Run, with_run};
use crate::simd::{Isa, MAX_LANES, Simd, kernel};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// The layout of a packed tile of values: even blocks of at most [`value_block_dims`] dimensions, and in each block one key
/// after the other. So a product reads the values in one ascending stream. Unpacked rows often lie a power of two apart, and
/// would compete for a few sets of the L1 cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ValueBlocks {
    keys: usize,
    value_dim: usize,
    blocks: EvenBlocks,
}

impl ValueBlocks {
    /// Blocks for the products of `isa`.
    pub(crate) fn new(isa: Isa, keys: usize, value_dim: usize) -> Self {
        Self { keys, value_dim, blocks: EvenBlocks::new(value_dim, level_value_block_dims(isa)) }
    }

    /// Keys of the tile.
    #[inline(always)]
    pub(crate) fn keys(&self) -> usize {
        self.keys
    }

    /// Dimensions of a value.
    #[inline(always)]
    pub(crate) fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// The number of blocks.
    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.blocks.count
    }

    /// The dimensions of block `b`.
    #[inline(always)]
    pub(crate) fn dims(&self, b: usize) -> Range<usize> {
        self.blocks.range(b)
    }

    /// The start of block `b`. [`MAX_LANES`] unused elements follow each block, because packing writes whole vectors.
    #[inline(always)]
    pub(crate) fn offset(&self, b: usize) -> usize {
        self.blocks.start(b) * self.keys + b * MAX_LANES
    }

    /// The number of elements, unused ones included.
    pub(crate) fn len(&self) -> usize {
        self.value_dim * self.keys + self.count() * MAX_LANES
    }
}

kernel! {
    /// Packs values of a tile in its layout, from key `first` on. Returns whether they are all finite. Keys are packed in their order:
    /// whole vectors are written, past the last key, too.
    ///
    /// * `values`: `[keys, value_dim]`, rows without gaps, any type
    /// * `layout`: the tile's layout, and the index in the tile of the first key
    /// * `packed`: `blocks.len()` elements
    pub(crate) fn pack_values<'a, S: Simd>(
        simd: S,
        values: Run<'a>,
        layout: (ValueBlocks, usize),
        packed: &'a mut [f32],
    ) -> bool {
        let (blocks, first) = layout;
        let fits = first.checked_add(values.rows()).is_some_and(|end| end <= blocks.keys);
        assert!(fits && values.cols() == blocks.value_dim && values.has_contiguous_rows());
        assert!(packed.len() >= blocks.len());
        let largest = with_run!(values, values => pack_blocks(simd, values, (blocks, first), packed));
        // The bits of |x|, read as an integer, are in the order of |x|, with NaN above infinity.
        let mut bits = [0.0; MAX_LANES];
        simd.store_slice(&mut bits, simd.float_of_bits(largest));
        bits[..S::LANES].iter().all(|x| x.is_finite())
    }
}

/// Keys that are packed together, one block of dimensions after the other: their rows stay in the L1 cache until all blocks are
/// done.
const PACK_KEYS: usize = 32;

/// Vectors that packing writes for each key of a block.
const fn block_vectors<S: Simd>() -> usize {
    value_block_dims::<S>().div_ceil(S::LANES)
}

/// Packs all values. Returns, for each lane, the largest bits of |value|.
#[inline(always)]
fn pack_blocks<S: Simd, T: Element>(
    simd: S,
    values: Matrix<'_, T>,
    (blocks, first_key): (ValueBlocks, usize),
    packed: &mut [f32],
) -> S::I32 {
    let width = const { block_vectors::<S>() * S::LANES };
    const { assert!(block_vectors::<S>() * S::LANES <= MAX_LANES, "`MAX_LANES` unused elements follow each block") };
    let mut largest = simd.splat_i32(0);
    for first in (0..values.rows()).step_by(PACK_KEYS) {
        let keys = first..(first + PACK_KEYS).min(values.rows());
        for b in 0..blocks.count() {
            // Whole vectors extend past a key's dimensions. The elements there are overwritten by the next key. After the last
            // key they fall into the unused elements between blocks, which are never read.
            let (dims, at) = (blocks.dims(b), blocks.offset(b));
            let to = &mut packed[at + (first_key + keys.start) * dims.len()..][..(keys.len() - 1) * dims.len() + width];
            if dims.start + width <= blocks.value_dim {
                // SAFETY: for each of these keys, `width` elements from `dims.start` on lie inside the row; `to` has `width`
                // elements from `dims.len()` times the index of the last key on.
                largest = unsafe { pack_block(simd, values, keys.clone(), dims, to, largest) };
            } else {
                for (n, j) in keys.clone().enumerate() {
                    let row = values.row(j).as_slice().expect("rows without gaps");
                    for v in 0..block_vectors::<S>() {
                        let vector = load_from(simd, row, (dims.start + v * S::LANES).min(row.len()));
                        simd.store_slice(&mut to[n * dims.len() + v * S::LANES..], vector);
                        largest = simd.max_i32(largest, simd.bits(simd.abs(vector)));
                    }
                }
            }
        }
    }
    largest
}

/// Packs the dimensions `dims` of `keys`. Returns the larger of `largest` and the bits of every |value|.
///
/// # Safety
/// * for every key, [`block_vectors`] vectors from `dims.start` on lie inside its row, and rows have no gaps
/// * `to` has [`block_vectors`] vectors at `dims.len()` times the index of the last key, counted from the first of `keys`
#[inline(always)]
unsafe fn pack_block<S: Simd, T: Element>(
    simd: S,
    values: Matrix<'_, T>,
    keys: Range<usize>,
    dims: Range<usize>,
    to: &mut [f32],
    mut largest: S::I32,
) -> S::I32 {
    let mut from = values.slice_rows(keys.clone()).as_ptr().wrapping_add(dims.start);
    let mut to = to.as_mut_ptr();
    for _ in keys {
        for v in 0..block_vectors::<S>() {
            // SAFETY: the caller's promise.
            let vector = unsafe { simd.load_as(from.wrapping_add(v * S::LANES)) };
            // SAFETY: the caller's promise.
            unsafe { simd.store(to.wrapping_add(v * S::LANES), vector) };
            largest = simd.max_i32(largest, simd.bits(simd.abs(vector)));
        }
        from = from.wrapping_offset(values.row_stride());
        to = to.wrapping_add(dims.len());
    }
    largest
}
