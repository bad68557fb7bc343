//! Bringing a tile's operands into the order in which the products read them, widened to f32.

use super::load::{AnyMatrix, load_from, with_matrix};
use super::{EvenBlocks, value_block_dims};
use crate::element::Element;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::tensor::any::{AnyTensor, with_elements};
use crate::tensor::matrix::{Matrix, Row};
use std::ops::Range;

/// `to = factor * row`, which is as long. (A factor of 1 changes nothing.)
#[inline(always)]
pub(super) fn widen<S: Simd, T: Element>(simd: S, row: Row<'_, T>, factor: f32, to: &mut [f32]) {
    match row.as_slice() {
        Some(row) => {
            let factor = simd.splat(factor);
            let (mut from, mut whole) = (row.chunks_exact(S::LANES), to.chunks_exact_mut(S::LANES));
            for (from, to) in (&mut from).zip(&mut whole) {
                simd.store_slice(to, simd.mul(simd.load_elements(from), factor));
            }
            let rest = whole.into_remainder();
            if !rest.is_empty() {
                simd.store_part(rest, simd.mul(simd.load_elements_part(from.remainder(), 0.0), factor));
            }
        }
        None => {
            for (to, from) in to.iter_mut().zip(row.iter()) {
                *to = from.to_f32() * factor;
            }
        }
    }
}

/// Rows of a tensor that lie anywhere in it: row `n` at index `place(n)`, for `n < count`.
pub(crate) struct Gathered<'a, F> {
    pub(crate) tensor: &'a AnyTensor<'a>,
    pub(crate) count: usize,
    pub(crate) place: F,
}

impl<F> Gathered<'_, F> {
    /// Whether the elements of a row stand side by side.
    pub(super) fn has_contiguous_rows(&self) -> bool {
        with_elements!(self.tensor, tensor => tensor.has_contiguous_rows())
    }
}

/// Widens gathered rows: `to[n][e] = factor * rows[n][e]`, zeros behind the rows' elements and behind the last row.
///
/// * `to`: `[count or more][width]`
pub(crate) fn widen_gathered<F: Fn(usize) -> [usize; 3]>(
    isa: Isa,
    rows: Gathered<'_, F>,
    factor: f32,
    (to, width): (&mut [f32], usize),
) {
    isa.run(WidenGathered { rows, factor, to, width });
}

struct WidenGathered<'a, F> {
    rows: Gathered<'a, F>,
    factor: f32,
    to: &'a mut [f32],
    width: usize,
}

impl<F: Fn(usize) -> [usize; 3]> Kernel for WidenGathered<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Gathered { tensor, count, place } = self.rows;
        with_elements!(tensor, tensor => for (n, to) in self.to.chunks_exact_mut(self.width.max(1)).enumerate() {
            if n >= count {
                to.fill(0.0);
                continue;
            }
            let [i0, i1, r] = place(n);
            let row = tensor.matrix(i0, i1).row(r);
            let (to, behind) = to.split_at_mut(tensor.shape()[3]);
            behind.fill(0.0);
            widen(simd, row, self.factor, to);
        });
    }
}

/// Widens rows: `to[r][e] = rows[r][e]`, without gaps.
fn widen_rows(isa: Isa, rows: AnyMatrix<'_>, to: &mut [f32]) {
    assert!(to.len() == rows.rows() * rows.cols());
    isa.run(WidenRows { rows, to });
}

/// The rows themselves if a product can read them in place, or their copy in `wide`.
pub(crate) fn as_f32<'a>(isa: Isa, rows: AnyMatrix<'a>, wide: &'a mut [f32]) -> Matrix<'a, f32> {
    rows.in_place().unwrap_or_else(|| {
        let wide = &mut wide[..rows.rows() * rows.cols()];
        widen_rows(isa, rows, wide);
        Matrix::from_slice(wide, rows.rows(), rows.cols())
    })
}

/// The rows themselves, or their copy in `wide` if there are gaps between their elements.
pub(crate) fn without_gaps<'a>(isa: Isa, rows: AnyMatrix<'a>, wide: &'a mut [f32]) -> AnyMatrix<'a> {
    if rows.has_contiguous_rows() { rows } else { AnyMatrix::F32(as_f32(isa, rows, wide)) }
}

struct WidenRows<'a> {
    rows: AnyMatrix<'a>,
    to: &'a mut [f32],
}

impl Kernel for WidenRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_matrix!(self.rows, matrix => {
            for (r, to) in self.to.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
                widen(simd, matrix.row(r), 1.0, to);
            }
        });
    }
}

/// How a tile of values is packed: even blocks of at most [`value_block_dims`] dimensions, no more than a vector holds, and in
/// each block key after key. So the product over the keys reads the values in one ascending stream, where rows of values would lie a power
/// of two apart and crowd into a few sets of the first cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ValueBlocks {
    pub(crate) keys: usize,
    pub(crate) value_dim: usize,
    blocks: EvenBlocks,
}

impl ValueBlocks {
    /// Blocks for the products of `isa`.
    pub(crate) fn new(isa: Isa, keys: usize, value_dim: usize) -> Self {
        Self { keys, value_dim, blocks: EvenBlocks::new(value_dim, value_block_dims(isa)) }
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
        with_matrix!(values, values => for first in (0..blocks.keys).step_by(PACK_KEYS) {
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
