//! `O += V P`: the values of a tile of keys, weighted, for a panel of queries.

use crate::element::{Element, with_elements};
use crate::kernel::arithmetic::Singles;
use crate::kernel::prefetch::Ahead;
use crate::kernel::prefill::pack::ValueBlocks;
use crate::kernel::product::{ByRows, Left, Right, by_rows, product};
use crate::kernel::shape::{EvenBlocks, PANEL_VECTORS, product_rows};
use crate::kernel::transpose::{LaneRows, load_block};
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::any::AnyMatrix;

/// Adds `sum over j of values[j][d] * weights[j][lane]` to `out[d][lane]`.
///
/// * `values`: packed by [`pack_values`](super::pack::pack_values), laid out as `blocks` says; keys from `first` on
/// * `weights`: `[keys][lanes]`
/// * `out`: `[value_dim][lanes]` (more rows are left alone), and whether this is the first sum: then it is written over
///   whatever is there
/// * `ahead`: what to ask memory for meanwhile
pub(crate) fn add_values(
    isa: Isa,
    (values, blocks, first): (&[f32], ValueBlocks, usize),
    weights: &[f32],
    (out, is_first): (&mut [f32], bool),
    lanes: usize,
    ahead: &mut Ahead,
) {
    let keys = weights.len() / lanes;
    assert!(weights.len() == keys * lanes && first + keys <= blocks.keys());
    assert!(values.len() >= blocks.len() && out.len() >= blocks.value_dim() * lanes);
    isa.run(AddValues { values, blocks, first, keys, weights, out, is_first, lanes, ahead });
}

struct AddValues<'a> {
    values: &'a [f32],
    blocks: ValueBlocks,
    first: usize,
    keys: usize,
    weights: &'a [f32],
    out: &'a mut [f32],
    is_first: bool,
    lanes: usize,
    ahead: &'a mut Ahead,
}

impl Kernel for AddValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.lanes / S::LANES {
            1 => self.blocks::<S, 1>(simd),
            2 => self.blocks::<S, 2>(simd),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }
}

impl AddValues<'_> {
    #[inline(always)]
    fn blocks<S: Simd, const V: usize>(self, simd: S) {
        assert!(self.lanes == V * S::LANES);
        for b in 0..self.blocks.count() {
            let dims = self.blocks.dims(b);
            let values = self.values[self.blocks.offset(b) + self.first * dims.len()..].as_ptr();
            let products = EvenBlocks::new(dims.len(), product_rows::<S>(V));
            for part in (0..products.count).map(|p| products.range(p)) {
                let mut block = Block::<S, V> {
                    ahead: &mut *self.ahead,
                    simd,
                    values: Left { at: values.wrapping_add(part.start), row: 1, step: dims.len() as isize },
                    weights: self.weights.as_ptr(),
                    keys: self.keys,
                    out: self.out[(dims.start + part.start) * self.lanes..].as_mut_ptr(),
                    is_first: self.is_first,
                };
                // SAFETY: `add_values` has checked that there are values for all of `blocks`, of which these keys and
                // dimensions are a part, weights for the keys and room for the dimensions.
                unsafe { by_rows::<S, V>(part.len(), &mut block) };
            }
        }
    }
}

/// Some dimensions of the values for the panel.
struct Block<'a, S: Simd, const V: usize> {
    ahead: &'a mut Ahead,
    simd: S,
    values: Left<f32>,
    weights: *const f32,
    keys: usize,
    out: *mut f32,
    is_first: bool,
}

impl<S: Simd, const V: usize> ByRows<S> for Block<'_, S, V> {
    /// # Safety
    /// * `values` is valid for R rows of `keys` steps, `weights` for `keys` steps, `out` for reads and writes of R rows
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let arithmetic = (self.simd, Singles::new());
        let weights = Right { at: self.weights, step: (V * S::LANES) as isize };
        // SAFETY: the caller's promise.
        let sums = unsafe { product::<S, _, f32, R, V>(arithmetic, self.values, weights, self.keys, self.ahead) };
        for (r, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                let out = self.out.wrapping_add((r * V + v) * S::LANES);
                // SAFETY: row r < R of the output: the caller's promise.
                let before = if self.is_first { self.simd.zero() } else { unsafe { self.simd.load(out) } };
                // SAFETY: as above.
                unsafe { self.simd.store(out, self.simd.add(before, sum)) };
            }
        }
    }
}

/// As [`add_values`], from values as they lie in memory, widened with each use: for a panel that has a tile to itself, packing
/// would cost more than it saves. Here a row of the product is a query, whose weights are broadcast, and values lie along the
/// lanes; the chains are the same. Returns whether all sums are finite; otherwise `out` is as before, for a value that is not
/// finite may belong to a hidden key.
///
/// * `values`: `[keys, value_dim]`, rows without gaps, whole vectors
/// * `weights`: `[keys][lanes]`
/// * `sums`: `[lanes][value_dim]` or more, for what is added
pub(crate) fn add_values_in_place(
    isa: Isa,
    values: AnyMatrix<'_>,
    weights: &[f32],
    sums: &mut [f32],
    (out, is_first): (&mut [f32], bool),
    lanes: usize,
    ahead: &mut Ahead,
) -> bool {
    assert!(values.has_contiguous_rows() && values.cols().is_multiple_of(isa.lanes()));
    assert!(weights.len() == values.rows() * lanes && lanes.is_multiple_of(isa.lanes()));
    assert!(out.len() >= lanes * values.cols());
    let sums = &mut sums[..lanes * values.cols()];
    isa.run(AddValuesInPlace { values, weights, sums, out, is_first, lanes, ahead })
}

struct AddValuesInPlace<'a> {
    values: AnyMatrix<'a>,
    weights: &'a [f32],
    sums: &'a mut [f32],
    out: &'a mut [f32],
    is_first: bool,
    lanes: usize,
    ahead: &'a mut Ahead,
}

impl Kernel for AddValuesInPlace<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let (lanes, width) = (self.lanes, self.values.cols());
        let mut finite = simd.zero();
        with_elements!(self.values, values => {
            let queries = EvenBlocks::new(lanes, product_rows::<S>(PANEL_VECTORS));
            for rows in (0..queries.count).map(|b| queries.range(b)) {
                for d in (0..width).step_by(PANEL_VECTORS * S::LANES) {
                    let mut block = RowBlock {
                        ahead: &mut *self.ahead,
                        simd,
                        weights: Left { at: self.weights[rows.start..].as_ptr(), row: 1, step: lanes as isize },
                        values: Right { at: values.as_ptr().wrapping_add(d), step: values.row_stride() },
                        keys: values.rows(),
                        sums: self.sums[rows.start * width + d..].as_mut_ptr(),
                        width,
                        finite,
                    };
                    // SAFETY: `add_values_in_place` has checked that there is a weight for every key and lane, and that rows
                    // of values and sums, which are as long, are whole vectors.
                    unsafe {
                        if d + PANEL_VECTORS * S::LANES <= width {
                            by_rows::<S, PANEL_VECTORS>(rows.len(), &mut Wide::<S, _, PANEL_VECTORS>(&mut block));
                        } else {
                            by_rows::<S, 1>(rows.len(), &mut Wide::<S, _, 1>(&mut block));
                        }
                    }
                    finite = block.finite;
                }
            }
        });
        // (A sum times 0 is 0, or NaN where it is not finite.)
        if simd.sum(finite) != 0.0 {
            return false;
        }
        let rows = LaneRows::of(lanes, |n| Some(&self.sums[n * width..(n + 1) * width])).expect("slices");
        add_turned(simd, &rows, (self.out, self.is_first), lanes);
        true
    }
}

/// Some queries' sums of some dimensions.
struct RowBlock<'a, S: Simd, T> {
    ahead: &'a mut Ahead,
    simd: S,
    weights: Left<f32>,
    values: Right<T>,
    keys: usize,
    sums: *mut f32,
    /// Between one query's sums and the next one's.
    width: usize,
    /// 0 so long as all sums are finite.
    finite: S::F32,
}

impl<S: Simd, T: Element> RowBlock<'_, S, T> {
    /// # Safety
    /// * `weights` is valid for R rows of `keys` steps, `values` for V vectors at as many, `sums` for writes of V vectors in R
    ///   rows
    #[inline(always)]
    unsafe fn sum<const R: usize, const V: usize>(&mut self) {
        let arithmetic = (self.simd, Singles::new());
        // SAFETY: the caller's promise.
        let sums = unsafe { product::<S, _, T, R, V>(arithmetic, self.weights, self.values, self.keys, self.ahead) };
        for (r, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                self.finite = self.simd.mul_add(sum, self.simd.zero(), self.finite);
                // SAFETY: vector v of row r: the caller's promise.
                unsafe { self.simd.store(self.sums.wrapping_add(r * self.width + v * S::LANES), sum) };
            }
        }
    }
}

/// A [`RowBlock`] of so many vectors.
struct Wide<'b, 'a, S: Simd, T, const V: usize>(&'b mut RowBlock<'a, S, T>);

impl<S: Simd, T: Element, const V: usize> ByRows<S> for Wide<'_, '_, S, T, V> {
    /// # Safety
    /// As [`RowBlock::sum`].
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.sum::<R, V>() }
    }
}

/// Adds rows, turned, to a panel, or writes them over whatever is there: `out[c][lane] += rows[lane][c]`.
#[inline(always)]
fn add_turned<S: Simd>(simd: S, rows: &LaneRows<'_, f32>, (out, is_first): (&mut [f32], bool), lanes: usize) {
    for (b, out) in out.chunks_exact_mut(S::LANES * lanes).take(rows.len() / S::LANES).enumerate() {
        for first in (0..lanes).step_by(S::LANES) {
            let block = simd.transpose(load_block((simd, Singles::new()), rows, first, b * S::LANES));
            for n in 0..S::LANES {
                let out = &mut out[n * lanes + first..];
                let before = if is_first { simd.zero() } else { simd.load_slice(out) };
                simd.store_slice(out, simd.add(before, block[n]));
            }
        }
    }
}

/// As [`add_values`], for a tile that holds NaN or infinite values and keys that some of the queries don't see: where
/// `scores[j][lane]` is -inf the value is left out instead of multiplied by 0. Plain and slow, for it is hardly ever
/// needed; the chain of multiply-adds is the same.
pub(crate) fn add_visible_values(
    isa: Isa,
    (values, blocks, first): (&[f32], ValueBlocks, usize),
    (weights, scores): (&[f32], &[f32]),
    out: &mut [f32],
    lanes: usize,
) {
    isa.run(AddVisibleValues { values, blocks, first, weights, scores, out, lanes });
}

struct AddVisibleValues<'a> {
    values: &'a [f32],
    blocks: ValueBlocks,
    first: usize,
    weights: &'a [f32],
    scores: &'a [f32],
    out: &'a mut [f32],
    lanes: usize,
}

impl Kernel for AddVisibleValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for b in 0..self.blocks.count() {
            let dims = self.blocks.dims(b);
            for d in dims.clone() {
                for lane in (0..self.lanes).step_by(S::LANES) {
                    let mut sum = simd.zero();
                    let rows = self.weights.chunks_exact(self.lanes).zip(self.scores.chunks_exact(self.lanes));
                    for (j, (weights, scores)) in rows.enumerate() {
                        let at = self.blocks.offset(b) + (self.first + j) * dims.len() + d - dims.start;
                        let hidden = simd.eq(simd.load_slice(&scores[lane..]), simd.splat(f32::NEG_INFINITY));
                        let more = simd.mul_add(simd.splat(self.values[at]), simd.load_slice(&weights[lane..]), sum);
                        sum = simd.select(hidden, sum, more);
                    }
                    let out = &mut self.out[d * self.lanes + lane..];
                    simd.store_slice(out, simd.add(simd.load_slice(out), sum));
                }
            }
        }
    }
}
