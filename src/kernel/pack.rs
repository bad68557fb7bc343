//! Bringing a tile's operands into the order in which the products read them, widened to f32.

use super::load::{AnyMatrix, Load, load_from, with_matrix};
use super::transpose::transpose;
use super::{EvenBlocks, PANEL_VECTORS, product_rows};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::strided::Row;
use std::ops::Range;

/// Calls `f` with `row` as a slice: itself, or copied into `spare` as f32 if there are gaps between its elements.
macro_rules! with_slice {
    ($row:expr, $spare:expr, $slice:ident => $value:expr) => {
        match $row.as_slice() {
            Some($slice) => $value,
            None => {
                copy_row($row, $spare);
                let $slice: &[f32] = &$spare[..];
                $value
            }
        }
    };
}

#[inline(always)]
fn copy_row<T: Load>(row: Row<'_, T>, to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(row.iter()) {
        *to = from.to_f32();
    }
}

/// `to[..row.len()] = factor * row`.
#[inline(always)]
fn widen<S: Simd, T: Load>(simd: S, row: &[T], factor: f32, to: &mut [f32]) {
    let factor = simd.splat(factor);
    for (to, c) in to.chunks_mut(S::LANES).zip((0..row.len()).step_by(S::LANES)) {
        let wide = simd.mul(load_from(simd, row, c), factor);
        if to.len() == S::LANES { simd.store_slice(to, wide) } else { simd.store_part(to, wide) }
    }
}

/// Packs query rows into a panel: `panel[e][lane] = factor * rows[lane][e]`, lanes without a row being 0.
///
/// * `row(lane)`: the matrix and the number of the lane's row in it, for `lane < count`
/// * `panel`: `[head_dim rounded up to vectors][lanes]`
/// * `stage`: scratch of `lanes * head_dim` (rounded up)
pub(crate) fn pack_queries<'q>(
    isa: Isa,
    row: impl Fn(usize) -> (AnyMatrix<'q>, usize),
    (count, lanes): (usize, usize),
    factor: f32,
    panel: &mut [f32],
    stage: &mut [f32],
) {
    let width = panel.len() / lanes;
    for (lane, to) in stage[..lanes * width].chunks_exact_mut(width.max(1)).enumerate() {
        if lane < count {
            let (matrix, r) = row(lane);
            widen_scaled(isa, matrix.slice_rows(r..r + 1), factor, &mut to[..matrix.cols()]);
        } else {
            to.fill(0.0);
        }
    }
    into_lanes(isa, &stage[..lanes * width], lanes, panel);
}

/// `to[c][lane] = from[lane][c]`; both hold `lanes` times a multiple of [`MAX_LANES`].
pub(crate) fn into_lanes(isa: Isa, from: &[f32], lanes: usize, to: &mut [f32]) {
    isa.run(Transpose { rows: lanes, cols: from.len() / lanes, from, to });
}

/// `to[lane][c] = from[c][lane]`: the way back.
pub(crate) fn from_lanes(isa: Isa, from: &[f32], lanes: usize, to: &mut [f32]) {
    isa.run(Transpose { rows: from.len() / lanes, cols: lanes, from, to });
}

struct Transpose<'a> {
    rows: usize,
    cols: usize,
    from: &'a [f32],
    to: &'a mut [f32],
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        transpose(simd, (self.rows, self.cols), (self.from, self.cols), (self.to, self.rows));
    }
}

/// Widens rows: `to[r][e] = rows[r][e]`, without gaps.
pub(crate) fn widen_rows(isa: Isa, rows: AnyMatrix<'_>, to: &mut [f32]) {
    widen_scaled(isa, rows, 1.0, to);
}

/// As [`widen_rows`], each element multiplied with `factor`.
pub(crate) fn widen_scaled(isa: Isa, rows: AnyMatrix<'_>, factor: f32, to: &mut [f32]) {
    assert!(to.len() == rows.rows() * rows.cols());
    isa.run(WidenRows { rows, factor, to });
}

struct WidenRows<'a> {
    rows: AnyMatrix<'a>,
    factor: f32,
    to: &'a mut [f32],
}

impl Kernel for WidenRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_matrix!(self.rows, matrix => {
            for (r, to) in self.to.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
                match matrix.row(r).as_slice() {
                    Some(row) => widen(simd, row, self.factor, to),
                    None => {
                        for (to, from) in to.iter_mut().zip(matrix.row(r).iter()) {
                            *to = crate::Element::to_f32(from) * self.factor;
                        }
                    }
                }
            }
        });
    }
}

/// How a tile of values is packed: even blocks of as many dimensions as a product has rows, and in each block key after
/// key. So the product over the keys reads the values in one ascending stream, where rows of values would lie a power
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
        struct Rows;
        impl Kernel for Rows {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> usize {
                product_rows::<S>(PANEL_VECTORS)
            }
        }
        Self { keys, value_dim, blocks: EvenBlocks::new(value_dim, isa.run(Rows)) }
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
/// * `values`: `[blocks.keys, value_dim]`
/// * `packed`: `blocks.len()` elements
/// * `spare`: scratch of `value_dim`
pub(crate) fn pack_values(
    isa: Isa,
    values: AnyMatrix<'_>,
    blocks: ValueBlocks,
    packed: &mut [f32],
    spare: &mut [f32],
) -> bool {
    assert!(values.rows() == blocks.keys && values.cols() == blocks.value_dim && spare.len() == blocks.value_dim);
    assert!(packed.len() >= blocks.len());
    isa.run(PackValues { values, blocks, packed, spare })
}

struct PackValues<'a> {
    values: AnyMatrix<'a>,
    blocks: ValueBlocks,
    packed: &'a mut [f32],
    spare: &'a mut [f32],
}

impl Kernel for PackValues<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let mut largest = simd.splat_i32(0);
        with_matrix!(self.values, matrix => {
            for j in 0..matrix.rows() {
                with_slice!(matrix.row(j), self.spare, row => {
                    for b in 0..self.blocks.count() {
                        let dims = self.blocks.dims(b);
                        // A vector reaches past the block into the next: what it writes there, the next key overwrites,
                        // or, behind the last key, nobody reads.
                        let values = load_from(simd, row, dims.start);
                        simd.store_slice(&mut self.packed[self.blocks.offset(b) + j * dims.len()..], values);
                        largest = simd.max_i32(largest, simd.bits(simd.abs(values)));
                    }
                });
            }
        });
        // The bits of |x|, read as an integer, are in the order of |x|, with NaN above infinity.
        let mut bits = [0.0; MAX_LANES];
        simd.store_slice(&mut bits, simd.from_bits(largest));
        bits[..S::LANES].iter().all(|x| x.is_finite())
    }
}
