//! Packs a tile of values in the order in which the products read them, widened to f32.

use crate::element::Element;
use crate::kernel::convert::load_from;
use crate::kernel::shape::{EvenBlocks, level_value_block_dims, value_block_dims};
use crate::kv::run::{Run, with_run};
use crate::simd::{Isa, MAX_LANES, Simd, kernel};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// How a tile of values is packed: even blocks of at most [`value_block_dims`] dimensions, and in each block key after key. So
/// the product over the keys reads the values in one ascending stream. Rows of values would lie a power of two apart and crowd
/// into a few sets of the L1 cache.
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

    /// Where block `b` starts. Behind each block there is room for [`MAX_LANES`], because packing writes whole vectors.
    #[inline(always)]
    pub(crate) fn offset(&self, b: usize) -> usize {
        self.blocks.start(b) * self.keys + b * MAX_LANES
    }

    /// Elements in all.
    pub(crate) fn len(&self) -> usize {
        self.value_dim * self.keys + self.count() * MAX_LANES
    }
}

kernel! {
    /// Packs the rows of a tile of values as `blocks` says and returns whether all of them are finite.
    ///
    /// * `values`: `[blocks.keys, value_dim]`, rows without gaps, any type
    /// * `packed`: `blocks.len()` elements
    pub(crate) fn pack_values<'a, S: Simd>(
        simd: S,
        values: Run<'a>,
        blocks: ValueBlocks,
        packed: &'a mut [f32],
    ) -> bool {
        assert!(values.rows() == blocks.keys && values.cols() == blocks.value_dim && values.has_contiguous_rows());
        assert!(packed.len() >= blocks.len());
        let largest = with_run!(values, values => pack_blocks(simd, values, blocks, packed));
        // The bits of |x|, read as an integer, are in the order of |x|, with NaN above infinity.
        let mut bits = [0.0; MAX_LANES];
        simd.store_slice(&mut bits, simd.float_of_bits(largest));
        bits[..S::LANES].iter().all(|x| x.is_finite())
    }
}

/// Keys that are packed block after block before the next ones: their rows stay in the L1 cache meanwhile.
const PACK_KEYS: usize = 32;

/// Vectors of a key that packing writes in a block.
const fn block_vectors<S: Simd>() -> usize {
    value_block_dims::<S>().div_ceil(S::LANES)
}

/// Packs all values; returns the largest bits of |value| that each lane has seen.
#[inline(always)]
fn pack_blocks<S: Simd, T: Element>(simd: S, values: Matrix<'_, T>, blocks: ValueBlocks, packed: &mut [f32]) -> S::I32 {
    let width = const { block_vectors::<S>() * S::LANES };
    const { assert!(block_vectors::<S>() * S::LANES <= MAX_LANES, "behind a block there is room for `MAX_LANES`") };
    let mut largest = simd.splat_i32(0);
    for first in (0..blocks.keys).step_by(PACK_KEYS) {
        let keys = first..(first + PACK_KEYS).min(blocks.keys);
        for b in 0..blocks.count() {
            // Whole vectors reach past a key's dimensions. What they write there is overwritten by the next key. Behind the
            // last key it lies in the room between blocks, which is never read.
            let (dims, at) = (blocks.dims(b), blocks.offset(b));
            let to = &mut packed[at + keys.start * dims.len()..][..(keys.len() - 1) * dims.len() + width];
            if dims.start + width <= blocks.value_dim {
                // SAFETY: of each of these keys, `width` elements from `dims.start` on lie inside the row; `to` has room for as
                // many at `dims.len()` times the number of the last key.
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

/// Packs some dimensions of some keys; returns the larger of `largest` and the bits of every |value|.
///
/// # Safety
/// * of every one of the keys, [`block_vectors`] vectors from `dims.start` on lie inside its row, and rows have no gaps
/// * `to` has room for as many at `dims.len()` times the number of the last key, counted from the first
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
