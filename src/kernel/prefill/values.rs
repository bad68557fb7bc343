//! `O += V P`: the values of a tile of keys, times the probs of a panel of queries, added to the panel's output.

use crate::element::Element;
use crate::kernel::arithmetic::F32Fma;
use crate::kernel::lanes::LaneSpans;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::pack::ValueBlocks;
use crate::kernel::product::{ByRows, Left, Right, by_rows, product};
use crate::kernel::shape::{EvenBlocks, PANEL_VECTORS, holds, product_rows};
use crate::kv::run::{Run, with_run};
use crate::simd::{Isa, Kernel, Simd, kernel};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

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

/// Adds `sum over j of probs[j][lane] * values[j][d]` to `out[lane][d]`, for the lanes that have a row. Returns whether all sums
/// are finite. If not, nothing is added, because a value that is not finite may belong to a hidden key.
///
/// A row of this product is a query: its probs are broadcast, and values lie along the lanes, in place. The chains of
/// multiply-adds are those of [`add_values`], except that keys before the first one and after the last one that a register
/// tile's queries see are left out: their probs are 0.
///
/// * `values`: those of the keys `seen`, rows without gaps, whole vectors; widened at each use
/// * `probs`: `[keys][lanes]`
/// * `out`: `[rows][value_dim]` or longer, and whether this is the panel's first sum, which overwrites `out`
/// * `sums`: a buffer of the same length, for sums that are not the first
pub(crate) fn add_values_by_rows(
    isa: Isa,
    (values, seen): (Run<'_>, Range<usize>),
    (probs, lanes): (&[f32], &LaneSpans),
    (out, is_first): (&mut [f32], bool),
    sums: &mut [f32],
    prefetch: &mut Prefetch,
) -> bool {
    isa.run(AddRows { values, seen, probs, lanes, out, is_first, sums, prefetch })
}

/// The arguments of [`add_values_by_rows`]; see [`AddValues`].
struct AddRows<'a> {
    values: Run<'a>,
    seen: Range<usize>,
    probs: &'a [f32],
    lanes: &'a LaneSpans,
    out: &'a mut [f32],
    is_first: bool,
    sums: &'a mut [f32],
    prefetch: &'a mut Prefetch,
}

impl Kernel for AddRows<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let AddRows { values, seen, probs, lanes, out, is_first, sums, prefetch } = self;
        let len = lanes.rows.len() * values.cols();
        let (out, sums) = (&mut out[..len], &mut sums[..len]);
        let to = if is_first { &mut *out } else { &mut *sums };
        let finite = with_run!(values, values => sum_rows(simd, (values, seen), (probs, lanes), to, prefetch));
        if finite && !is_first {
            for (out, sums) in out.chunks_exact_mut(S::LANES).zip(sums.chunks_exact(S::LANES)) {
                simd.store_slice(out, simd.add(simd.load_slice(out), simd.load_slice(sums)));
            }
        }
        finite
    }
}

/// Writes `sums[lane][d] = sum over j of probs[j][lane] * values[j][d]` and returns whether all are finite.
#[inline(always)]
pub(super) fn sum_rows<S: Simd, T: Element>(
    simd: S,
    (values, seen): (Matrix<'_, T>, Range<usize>),
    (probs, lanes): (&[f32], &LaneSpans),
    sums: &mut [f32],
    prefetch: &mut Prefetch,
) -> bool {
    let (rows, width) = (lanes.rows.len(), values.cols());
    assert!(values.has_contiguous_rows() && values.rows() == seen.len() && width.is_multiple_of(S::LANES));
    assert!(rows <= lanes.count && holds(probs.len(), seen.len(), lanes.count) && holds(sums.len(), rows, width));
    let mut rows_of = RowTile {
        prefetch,
        simd,
        probs: Left { at: probs.as_ptr(), row: 1, step: lanes.count as isize },
        values: Right { at: values.as_ptr(), step: values.row_stride() },
        keys: seen.len(),
        sums: sums.as_mut_ptr(),
        width,
        finite: simd.zero(),
    };
    let all_see_all = lanes.cover.is_full(&seen);
    let queries = EvenBlocks::new(rows, product_rows::<S>(PANEL_VECTORS));
    for rows in (0..queries.count).map(|b| queries.range(b)) {
        let keys = if all_see_all { 0..seen.len() } else { lanes.seen_by(rows.clone(), &seen) };
        rows_of.probs.at = probs.as_ptr().wrapping_add(keys.start * lanes.count + rows.start);
        rows_of.values.at = values.as_ptr().wrapping_offset(values.row_stride().wrapping_mul(keys.start as isize));
        rows_of.keys = keys.len();
        // SAFETY: `keys` are within those of `values`; there is a prob for every key and lane, and a row of sums for every row;
        // rows of values and of sums have the same length, in whole vectors (asserted above). The rows are no more than
        // `product_rows` of two vectors.
        unsafe { by_rows::<S, PANEL_VECTORS>(rows.len(), &mut rows_of) };
        rows_of.sums = rows_of.sums.wrapping_add(rows.len() * width);
    }
    simd.sum(rows_of.finite) == 0.0
}

/// The product of some queries' probs and the values.
struct RowTile<'a, S: Simd, T> {
    prefetch: &'a mut Prefetch,
    simd: S,
    probs: Left<f32>,
    values: Right<T>,
    keys: usize,
    sums: *mut f32,
    /// Elements of a value, and from one query's sums to the next one's.
    width: usize,
    /// 0 as long as all sums are finite, NaN afterwards: a sum times 0 is 0 if the sum is finite, and NaN if not.
    finite: S::F32,
}

impl<S: Simd, T: Element> ByRows<S> for RowTile<'_, S, T> {
    /// # Safety
    /// * `probs` is valid for R rows of `keys` steps, `values` for `width` elements at each of these steps, `sums` for writes of R
    ///   rows of `width` elements; `width` is whole vectors
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let whole = self.width / (PANEL_VECTORS * S::LANES) * (PANEL_VECTORS * S::LANES);
        for d in (0..whole).step_by(PANEL_VECTORS * S::LANES) {
            // SAFETY: these vectors lie inside the rows.
            unsafe { self.sum::<R, PANEL_VECTORS>(d) };
        }
        if whole < self.width {
            // SAFETY: one vector is left, because rows are whole vectors.
            unsafe { self.sum::<R, 1>(whole) };
        }
    }
}

impl<S: Simd, T: Element> RowTile<'_, S, T> {
    /// The sums of the V vectors from element `d` on.
    ///
    /// # Safety
    /// * as for [`ByRows::call`], and the rows have V vectors from `d` on
    #[inline(always)]
    unsafe fn sum<const R: usize, const V: usize>(&mut self, d: usize) {
        let arithmetic = (self.simd, F32Fma::new());
        let values = Right { at: self.values.at.wrapping_add(d), step: self.values.step };
        // SAFETY: the caller's promise.
        let sums = unsafe { product::<S, _, T, R, V>(arithmetic, self.probs, values, self.keys, self.prefetch) };
        let to = self.sums.wrapping_add(d);
        for (r, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                self.finite = self.simd.mul_add(sum, self.simd.zero(), self.finite);
                // SAFETY: vector v of row r: the caller's promise.
                unsafe { self.simd.store(to.wrapping_add(r * self.width + v * S::LANES), sum) };
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
