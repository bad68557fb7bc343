//! Bringing a tile's operands into the order in which the products read them, widened to f32.

use crate::element::{Element, with_elements};
use crate::kernel::convert::load_from;
use crate::kernel::shape::{EvenBlocks, value_block_dims};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::tensor::any::AnyMatrix;
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// How a tile of values is packed: even blocks of at most [`value_block_dims`] dimensions, no more than a vector holds, and in
/// each block key after key. So the product over the keys reads the values in one ascending stream, where rows of values would lie a power
/// of two apart and crowd into a few sets of the first cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ValueBlocks {
    keys: usize,
    value_dim: usize,
    blocks: EvenBlocks,
}

impl ValueBlocks {
    /// Blocks for the products of `isa`.
    pub(crate) fn new(isa: Isa, keys: usize, value_dim: usize) -> Self {
        Self { keys, value_dim, blocks: EvenBlocks::new(value_dim, value_block_dims(isa)) }
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

    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.blocks.count
    }

    /// The dimensions of block `b`.
    #[inline(always)]
    pub(crate) fn dims(&self, b: usize) -> Range<usize> {
        self.blocks.range(b)
    }

    /// Where block `b` starts. Behind each block there is room for one vector, because packing writes whole ones.
    #[inline(always)]
    pub(crate) fn offset(&self, b: usize) -> usize {
        self.blocks.start(b) * self.keys + b * MAX_LANES
    }

    /// Elements in all.
    pub(crate) fn len(&self) -> usize {
        self.value_dim * self.keys + self.count() * MAX_LANES
    }
}

/// Packs the rows of a tile of values as `blocks` says and returns whether all of them are finite.
///
/// * `values`: `[blocks.keys, value_dim]`, rows without gaps, any type
/// * `packed`: `blocks.len()` elements
pub(crate) fn pack_values(isa: Isa, values: AnyMatrix<'_>, blocks: ValueBlocks, packed: &mut [f32]) -> bool {
    assert!(values.rows() == blocks.keys && values.cols() == blocks.value_dim && values.has_contiguous_rows());
    assert!(packed.len() >= blocks.len());
    isa.run(PackValues { values, blocks, packed })
}

/// Keys that are packed block after block before the next ones: their rows stay in the first cache meanwhile.
const PACK_KEYS: usize = 32;

struct PackValues<'a> {
    values: AnyMatrix<'a>,
    blocks: ValueBlocks,
    packed: &'a mut [f32],
}

impl Kernel for PackValues<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let PackValues { values, blocks, packed } = self;
        let mut largest = simd.splat_i32(0);
        with_elements!(values, values => for first in (0..blocks.keys).step_by(PACK_KEYS) {
            let keys = first..(first + PACK_KEYS).min(blocks.keys);
            for b in 0..blocks.count() {
                // A vector reaches past the block into the next: what it writes there is overwritten by the next key, or,
                // behind the last key, lies in the room between blocks, which nobody reads.
                let (dims, at) = (blocks.dims(b), blocks.offset(b));
                let to = &mut packed[at + keys.start * dims.len()..][..(keys.len() - 1) * dims.len() + S::LANES];
                if dims.start + S::LANES <= blocks.value_dim {
                    // SAFETY: of each of these keys, a vector from `dims.start` on lies inside the row; `to` has room for a
                    // vector at `dims.len()` times the number of the last key.
                    largest = unsafe { pack_block(simd, values, keys.clone(), dims, to, largest) };
                } else {
                    for (n, j) in keys.clone().enumerate() {
                        let row = values.row(j).as_slice().expect("rows without gaps");
                        let vector = load_from(simd, row, dims.start);
                        simd.store_slice(&mut to[n * dims.len()..], vector);
                        largest = simd.max_i32(largest, simd.bits(simd.abs(vector)));
                    }
                }
            }
        });
        // The bits of |x|, read as an integer, are in the order of |x|, with NaN above infinity.
        let mut bits = [0.0; MAX_LANES];
        simd.store_slice(&mut bits, simd.float_of_bits(largest));
        bits[..S::LANES].iter().all(|x| x.is_finite())
    }
}

/// Packs some dimensions of some keys; returns the larger of `largest` and the bits of every |value|.
///
/// # Safety
/// * of every one of the keys, the vector from `dims.start` on lies inside its row, and rows have no gaps
/// * `to` has room for a vector at `dims.len()` times the number of the last key, counted from the first
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
        // SAFETY: the caller's promise.
        let vector = unsafe { simd.load_as(from) };
        // SAFETY: the caller's promise.
        unsafe { simd.store(to, vector) };
        largest = simd.max_i32(largest, simd.bits(simd.abs(vector)));
        from = from.wrapping_offset(values.row_stride());
        to = to.wrapping_add(dims.len());
    }
    largest
}
