//! `O += V P`: the values of a tile of keys, times the probs of a panel of queries, added to the panel's output.

use crate::element::Element;
use crate::kernel::arithmetic::F32Fma;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::pack::ValueBlocks;
use crate::kernel::product::{ByRows, Left, Right, by_rows, product};
use crate::kernel::shape::{EvenBlocks, PANEL_VECTORS, holds, product_rows};
use crate::kernel::transpose::{LaneRows, load_block};
use crate::kv::run::{Run, with_run};
use crate::simd::{Isa, Kernel, Simd, kernel};
use crate::tensor::matrix::Matrix;

/// Adds `sum over j of values[j][d] * probs[j][lane]` to `out[d][lane]`.
///
/// * `values`: packed by [`pack_values`](super::pack::pack_values), the blocks that they are packed in, and the index of
///   the first key that `probs` has
/// * `probs`: `[keys][lanes]`
/// * `out`: `[value_dim][lanes]`, and whether this is the panel's first sum, which overwrites `out`; any further rows are
///   left as they are
/// * `prefetch`: rows to prefetch between the multiply-adds
pub(crate) fn add_values(
    isa: Isa,
    (values, blocks, first): (&[f32], ValueBlocks, usize),
    probs: &[f32],
    (out, is_first): (&mut [f32], bool),
    lanes: usize,
    prefetch: &mut Prefetch,
) {
    let keys = probs.len() / lanes;
    assert!(probs.len() == keys * lanes && first + keys <= blocks.keys());
    assert!(values.len() >= blocks.len() && holds(out.len(), blocks.value_dim(), lanes));
    isa.run(AddValues { values, blocks, first, keys, probs, out, is_first, lanes, prefetch });
}

/// The arguments of [`add_values`]. They stay in this struct while the products run. As variables of a [`kernel!`] they would
/// outlive the products in registers: then the loop of a product spills the pointer to `probs` and takes a tenth longer
/// (Sapphire Rapids).
struct AddValues<'a> {
    values: &'a [f32],
    blocks: ValueBlocks,
    first: usize,
    keys: usize,
    probs: &'a [f32],
    out: &'a mut [f32],
    is_first: bool,
    lanes: usize,
    prefetch: &'a mut Prefetch,
}

impl Kernel for AddValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.lanes / S::LANES {
            1 => self.add_blocks::<S, 1>(simd),
            2 => self.add_blocks::<S, 2>(simd),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }
}

impl AddValues<'_> {
    #[inline(always)]
    fn add_blocks<S: Simd, const V: usize>(self, simd: S) {
        assert!(self.lanes == V * S::LANES);
        for b in 0..self.blocks.count() {
            let dims = self.blocks.dims(b);
            let values = self.values[self.blocks.offset(b) + self.first * dims.len()..].as_ptr();
            let products = EvenBlocks::new(dims.len(), product_rows::<S>(V));
            for part in (0..products.count).map(|p| products.range(p)) {
                let mut block = ValueTile::<S, V> {
                    prefetch: &mut *self.prefetch,
                    simd,
                    values: Left { at: values.wrapping_add(part.start), row: 1, step: dims.len() as isize },
                    probs: self.probs.as_ptr(),
                    keys: self.keys,
                    out: self.out[(dims.start + part.start) * self.lanes..].as_mut_ptr(),
                    is_first: self.is_first,
                };
                // SAFETY: there are values for all of `blocks`, and these keys and dimensions are within it; there are probs for
                // the keys, and `out` has a row for each dimension (`add_values` has checked). The dimensions are no more than
                // `product_rows`.
                unsafe { by_rows::<S, V>(part.len(), &mut block) };
            }
        }
    }
}

/// The product of some dimensions of the values and a panel's probs.
struct ValueTile<'a, S: Simd, const V: usize> {
    prefetch: &'a mut Prefetch,
    simd: S,
    values: Left<f32>,
    probs: *const f32,
    keys: usize,
    out: *mut f32,
    is_first: bool,
}

impl<S: Simd, const V: usize> ByRows<S> for ValueTile<'_, S, V> {
    /// # Safety
    /// * `values` is valid for R rows of `keys` steps, `probs` for `keys` steps, `out` for reads and writes of R rows
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let arithmetic = (self.simd, F32Fma::new());
        let probs = Right { at: self.probs, step: (V * S::LANES) as isize };
        // SAFETY: the caller's promise.
        let sums = unsafe { product::<S, _, f32, R, V>(arithmetic, self.values, probs, self.keys, self.prefetch) };
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

kernel! {
    /// As [`add_values`], from values that are not packed, for a task of one panel. Values are widened at each use. Packing a
    /// tile would cost more than it saves if only one panel uses it.
    ///
    /// A row of this product is a query: its probs are broadcast, and values lie along the lanes. The chains of multiply-adds
    /// are those of [`add_values`].
    ///
    /// Returns whether all sums are finite. If not, `out` is left as it is, because a value that is not finite may belong to a
    /// hidden key.
    ///
    /// * `values`: `[keys, value_dim]`, rows without gaps, whole vectors
    /// * `probs`: `[keys][lanes]`
    /// * `sums`: a buffer for the sums, `[lanes][value_dim]` or longer
    pub(crate) fn add_values_in_place<'a, S: Simd>(
        simd: S,
        values: Run<'a>,
        probs: &'a [f32],
        sums: &'a mut [f32],
        out: (&'a mut [f32], bool),
        lanes: usize,
        prefetch: &'a mut Prefetch,
    ) -> bool {
        let (out, is_first) = out;
        let width = values.cols();
        assert!(holds(out.len(), lanes, width));
        let sums = &mut sums[..lanes * width];
        let not_finite = with_run!(values, values => sum_rows(simd, values, probs, sums, lanes, prefetch));
        if not_finite {
            return false;
        }
        let rows = LaneRows::new(lanes, |n| Some(&sums[n * width..(n + 1) * width])).expect("slices");
        add_transposed(simd, &rows, (out, is_first), lanes);
        true
    }
}

/// Writes `sums[lane][d] = sum over j of probs[j][lane] * values[j][d]` and returns whether any is not finite.
#[inline(always)]
fn sum_rows<S: Simd, T: Element>(
    simd: S,
    values: Matrix<'_, T>,
    probs: &[f32],
    sums: &mut [f32],
    lanes: usize,
    prefetch: &mut Prefetch,
) -> bool {
    let width = values.cols();
    assert!(values.has_contiguous_rows() && width.is_multiple_of(S::LANES) && lanes.is_multiple_of(S::LANES));
    assert!(holds(probs.len(), values.rows(), lanes) && holds(sums.len(), lanes, width));
    // A sum times 0 is 0 if the sum is finite, and NaN if not.
    let mut finite = simd.zero();
    let queries = EvenBlocks::new(lanes, product_rows::<S>(PANEL_VECTORS));
    for rows in (0..queries.count).map(|b| queries.range(b)) {
        for d in (0..width).step_by(PANEL_VECTORS * S::LANES) {
            let mut block = RowTile {
                prefetch: &mut *prefetch,
                simd,
                probs: Left { at: probs[rows.start..].as_ptr(), row: 1, step: lanes as isize },
                values: Right { at: values.as_ptr().wrapping_add(d), step: values.row_stride() },
                keys: values.rows(),
                sums: sums[rows.start * width + d..].as_mut_ptr(),
                width,
                finite,
            };
            // SAFETY: there is a prob for every key and lane, and a row of sums for every lane; rows of values and of sums have
            // the same length, in whole vectors (asserted above). The rows are no more than `product_rows` of two vectors, nor
            // of one.
            unsafe {
                if d + PANEL_VECTORS * S::LANES <= width {
                    by_rows::<S, PANEL_VECTORS>(rows.len(), &mut RowTileVectors::<S, _, PANEL_VECTORS>(&mut block));
                } else {
                    by_rows::<S, 1>(rows.len(), &mut RowTileVectors::<S, _, 1>(&mut block));
                }
            }
            finite = block.finite;
        }
    }
    simd.sum(finite) != 0.0
}

/// The product of some queries' probs and up to two vectors of each value.
struct RowTile<'a, S: Simd, T> {
    prefetch: &'a mut Prefetch,
    simd: S,
    probs: Left<f32>,
    values: Right<T>,
    keys: usize,
    sums: *mut f32,
    /// From one query's sums to the next one's, in elements.
    width: usize,
    /// 0 as long as all sums are finite, NaN afterwards.
    finite: S::F32,
}

impl<S: Simd, T: Element> RowTile<'_, S, T> {
    /// # Safety
    /// * `probs` is valid for R rows of `keys` steps, `values` for V vectors at each of these steps, `sums` for writes of V
    ///   vectors in R rows
    #[inline(always)]
    unsafe fn sum<const R: usize, const V: usize>(&mut self) {
        let arithmetic = (self.simd, F32Fma::new());
        // SAFETY: the caller's promise.
        let sums = unsafe { product::<S, _, T, R, V>(arithmetic, self.probs, self.values, self.keys, self.prefetch) };
        for (r, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                self.finite = self.simd.mul_add(sum, self.simd.zero(), self.finite);
                // SAFETY: vector v of row r: the caller's promise.
                unsafe { self.simd.store(self.sums.wrapping_add(r * self.width + v * S::LANES), sum) };
            }
        }
    }
}

/// A [`RowTile`] of V vectors.
struct RowTileVectors<'b, 'a, S: Simd, T, const V: usize>(&'b mut RowTile<'a, S, T>);

impl<S: Simd, T: Element, const V: usize> ByRows<S> for RowTileVectors<'_, '_, S, T, V> {
    /// # Safety
    /// As [`RowTile::sum`].
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.sum::<R, V>() }
    }
}

/// Adds the transpose of `rows` to a panel: `out[c][lane] += rows[lane][c]`. If `is_first`, it overwrites `out` instead.
#[inline(always)]
fn add_transposed<S: Simd>(simd: S, rows: &LaneRows<'_, f32>, (out, is_first): (&mut [f32], bool), lanes: usize) {
    for (b, out) in out.chunks_exact_mut(S::LANES * lanes).take(rows.len() / S::LANES).enumerate() {
        for first in (0..lanes).step_by(S::LANES) {
            let block = simd.transpose(load_block((simd, F32Fma::new()), rows, first, b * S::LANES));
            for n in 0..S::LANES {
                let out = &mut out[n * lanes + first..];
                let before = if is_first { simd.zero() } else { simd.load_slice(out) };
                simd.store_slice(out, simd.add(before, block[n]));
            }
        }
    }
}

kernel! {
    /// As [`add_values`], for a tile that has values that are NaN or infinite, and keys that are hidden from some of the
    /// queries. Where `scores[j][lane]` is -inf, the value is skipped, not multiplied by 0. The loop is simple and slow,
    /// because the case is rare. The chain of multiply-adds is the same.
    pub(crate) fn add_visible_values<'a, S: Simd>(
        simd: S,
        values: (&'a [f32], ValueBlocks, usize),
        probs_and_scores: (&'a [f32], &'a [f32]),
        out: &'a mut [f32],
        lanes: usize,
    ) {
        let (values, blocks, first) = values;
        let (probs, scores) = probs_and_scores;
        for b in 0..blocks.count() {
            let dims = blocks.dims(b);
            for d in dims.clone() {
                for lane in (0..lanes).step_by(S::LANES) {
                    let mut sum = simd.zero();
                    let rows = probs.chunks_exact(lanes).zip(scores.chunks_exact(lanes));
                    for (j, (probs, scores)) in rows.enumerate() {
                        let at = blocks.offset(b) + (first + j) * dims.len() + d - dims.start;
                        let hidden = simd.eq(simd.load_slice(&scores[lane..]), simd.splat(f32::NEG_INFINITY));
                        let more = simd.mul_add(simd.splat(values[at]), simd.load_slice(&probs[lane..]), sum);
                        sum = simd.select(hidden, sum, more);
                    }
                    let out = &mut out[d * lanes + lane..];
                    simd.store_slice(out, simd.add(simd.load_slice(out), sum));
                }
            }
        }
    }
}
