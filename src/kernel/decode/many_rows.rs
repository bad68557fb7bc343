//! Scores and values of many query rows, with the bits of [`super::scores`] and [`super::values`].
//!
//! There, few rows share each load. Here products are register tiles as in prefill: an element is loaded once for two vectors.
//!
//! **Scores.** There, a score is `LANES` partial sums, one for each lane of the elements, which are added across the lanes. Here rows lie in
//! the lanes, and a vector has one of the partial sums of each row. So adding across the lanes is adding vectors:
//!
//! ```text
//! P[l][j][rows]    = sum over s of keys[j][l + s * LANES] * queries[l + s * LANES][rows]      for each lane l
//! scores[j][rows]  = P[0] + .. + P[LANES - 1]                                                 in the order of `Simd::sums`
//! ```
//!
//! Two neighbouring lanes are summed at a time. One at a time, storing the sums that wait for their neighbours took a fifth of the time.
//!
//! **Values.** Each sum is one chain over the keys, as there.

use crate::element::Bf16Pair;
use crate::kernel::arithmetic::{Bf16Dots, F32Fma, Multiply};
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::scores::PanelKeys;
use crate::kernel::product::{ByRows, Left, Right, add_product, by_rows, prefetch_parts};
use crate::kernel::shape::{EvenBlocks, MAX_PANEL_LANES, PANEL_VECTORS, holds, product_rows, round_up_lanes};
use crate::simd::{Isa, Kernel, MAX_LANES, PairDots, PairKernel, Simd};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// Writes `scores[r * stride + j] = dot(queries[r], keys[j])`, for the first `rows` rows.
///
/// * `keys`: `[keys, head_dim]`, or their pairs, in whole vectors; rows without gaps
/// * `queries`: panels, `[head_dim or pairs][lanes]`: of `PANEL_VECTORS` vectors of rows, and a last one that may have fewer
/// * `scores`: `[rows][stride]`, `stride >= keys`
pub(crate) fn scores(
    isa: Isa,
    keys: PanelKeys<'_>,
    queries: &[f32],
    (scores, rows, stride): (&mut [f32], usize, usize),
) {
    match keys {
        PanelKeys::F32(keys) => isa.run(Scores { keys, queries, scores, rows, stride }),
        PanelKeys::Pairs(keys, factor) => {
            isa.run_pairs(PairScores(Scores { keys, queries, scores, rows, stride }, factor));
        }
    }
}

/// The arguments of [`scores`].
struct Scores<'a, K> {
    keys: Matrix<'a, K>,
    queries: &'a [f32],
    scores: &'a mut [f32],
    rows: usize,
    stride: usize,
}

impl Kernel for Scores<'_, f32> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.all(simd, F32Fma::new());
    }
}

/// The scores of keys as pairs of bf16, and the factor.
struct PairScores<'a>(Scores<'a, Bf16Pair>, f32);

impl PairKernel for PairScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) {
        self.0.all(simd, Bf16Dots { dots, factor: self.1 });
    }
}

impl<K> Scores<'_, K> {
    /// One panel after the other, whose queries stay in the L1 cache, and `LANES` keys at a time.
    #[inline(always)]
    fn all<S: Simd, M: Multiply<S, Step = K>>(mut self, simd: S, multiply: M) {
        let (keys, vectors) = (self.keys, self.rows.div_ceil(S::LANES));
        assert!(keys.has_contiguous_rows() && keys.cols().is_multiple_of(S::LANES) && keys.rows() <= self.stride);
        assert!(holds(self.queries.len(), vectors * S::LANES, keys.cols()));
        for panel in (0..vectors).step_by(PANEL_VECTORS) {
            let row = panel * S::LANES;
            for first in (0..keys.rows()).step_by(S::LANES) {
                let block = first..keys.rows().min(first + S::LANES);
                match (vectors - panel).min(PANEL_VECTORS) {
                    1 => self.block::<S, M, 1>(simd, multiply, block, row),
                    _ => self.block::<S, M, PANEL_VECTORS>(simd, multiply, block, row),
                }
            }
        }
    }

    /// The scores of at most `LANES` keys for a panel of V vectors of rows, from row `row` on.
    #[inline(always)]
    fn block<S: Simd, M: Multiply<S, Step = K>, const V: usize>(
        &mut self,
        simd: S,
        multiply: M,
        keys: Range<usize>,
        row: usize,
    ) {
        let cols = self.keys.cols();
        // `[keys][V * LANES]`
        let mut by_key = [0.0; MAX_LANES * MAX_PANEL_LANES];
        let queries = &self.queries[row * cols..][..V * S::LANES * cols];
        // Two lanes at a time take the registers of twice the keys.
        let parts = EvenBlocks::new(keys.len(), (product_rows::<S>(V) / 2).max(1));
        for part in (0..parts.count).map(|n| parts.range(n)) {
            let at = self.keys.as_ptr().wrapping_offset(self.keys.row_stride() * (keys.start + part.start) as isize);
            let mut tile = ScoreTile::<S, M, V> {
                arithmetic: (simd, multiply),
                keys: Left { at, row: self.keys.row_stride(), step: S::LANES as isize },
                queries: queries.as_ptr(),
                steps: cols / S::LANES,
                scores: &mut by_key[part.start * V * S::LANES..],
            };
            // SAFETY: these rows of the keys exist, in whole vectors, and the queries have a vector for each element (`all` has checked).
            // The rows are no more than `product_rows`.
            unsafe { by_rows::<S, V>(part.len(), &mut tile) };
        }
        for v in 0..V {
            let mut block = [simd.zero(); MAX_LANES];
            for (n, block) in block[..keys.len()].iter_mut().enumerate() {
                *block = simd.load_slice(&by_key[(n * V + v) * S::LANES..]);
            }
            let block = simd.transpose(block);
            let first = row + v * S::LANES;
            let rows = S::LANES.min(self.rows.saturating_sub(first));
            for (n, &scores) in block[..rows].iter().enumerate() {
                let to = &mut self.scores[(first + n) * self.stride + keys.start..][..keys.len()];
                simd.store_part(to, scores);
            }
        }
    }
}

/// The scores of some keys for a panel.
struct ScoreTile<'a, S: Simd, M: Multiply<S>, const V: usize> {
    arithmetic: (S, M),
    /// A step is `LANES` elements.
    keys: Left<M::Step>,
    queries: *const f32,
    steps: usize,
    /// `[keys][V * LANES]`, written.
    scores: &'a mut [f32],
}

/// The times that sums of lanes are added to their neighbours: log2 of the most lanes.
const ADDITIONS: usize = MAX_LANES.ilog2() as usize;

impl<S: Simd, M: Multiply<S>, const V: usize> ByRows<S> for ScoreTile<'_, S, M, V> {
    /// # Safety
    /// * `keys` is valid for R rows of `steps * LANES` elements, and `queries` for a panel of them
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let (simd, multiply) = self.arithmetic;
        // The sums of 2, 4, 8, .. lanes that wait for their neighbours, as in a binary counter.
        let mut waiting = [[[simd.zero(); V]; R]; ADDITIONS];
        for n in 0..S::LANES / 2 {
            // SAFETY: the caller's promise.
            let mut sums = unsafe { self.lane_sums::<R>([S::SUMS_ORDER[2 * n], S::SUMS_ORDER[2 * n + 1]]) };
            let level = n.trailing_ones() as usize;
            for waiting in &waiting[..level] {
                add_to::<S, R, V>(simd, &mut sums, waiting);
            }
            waiting[level] = sums;
        }
        for (r, row) in waiting[S::LANES.ilog2() as usize - 1].into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                simd.store_slice(&mut self.scores[(r * V + v) * S::LANES..], multiply.finish(simd, sum));
            }
        }
    }
}

impl<S: Simd, M: Multiply<S>, const V: usize> ScoreTile<'_, S, M, V> {
    /// The sum of the partial sums of two lanes.
    ///
    /// # Safety
    /// * as [`ByRows::call`]
    #[inline(always)]
    unsafe fn lane_sums<const R: usize>(&self, lanes: [usize; 2]) -> [[S::F32; V]; R] {
        let (simd, multiply) = self.arithmetic;
        let mut sums = [[[simd.zero(); V]; R]; 2];
        let (mut keys, mut queries) = (self.keys.at, self.queries);
        for _ in 0..self.steps {
            for (lane, sums) in lanes.into_iter().zip(&mut sums) {
                let mut rows = [simd.zero(); V];
                for (v, rows) in rows.iter_mut().enumerate() {
                    // SAFETY: an element of this step: the caller's promise.
                    *rows = unsafe { simd.load(queries.wrapping_add((lane * V + v) * S::LANES)) };
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let key = keys.wrapping_offset(r as isize * self.keys.row).wrapping_add(lane);
                    // SAFETY: an element of this step of row r < R: the caller's promise.
                    unsafe { multiply.mul_add_at(simd, key, rows, sums) };
                }
            }
            (keys, queries) = (keys.wrapping_add(S::LANES), queries.wrapping_add(S::LANES * V * S::LANES));
        }
        let [mut sum, other] = sums;
        add_to::<S, R, V>(simd, &mut sum, &other);
        sum
    }
}

/// `to += sums`.
#[inline(always)]
fn add_to<S: Simd, const R: usize, const V: usize>(simd: S, to: &mut [[S::F32; V]; R], sums: &[[S::F32; V]; R]) {
    for (to, sums) in to.iter_mut().zip(sums) {
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = simd.add(*to, *sum);
        }
    }
}

/// Keys whose values are added to all rows before the next ones. A register tile's columns of them stay in the L1 cache: 8 KiB of 64
/// lines in pairs. With 512 bytes from key to key, more would not fit the sets that they fall into.
const VALUE_KEYS: usize = 64;

/// Adds `sum over j of probs[r * stride + j] * values[j][d]` to `out[r][d]`.
///
/// * `values`: `[keys, value_dim]`, rows without gaps, in whole vectors
/// * `probs`: `[rows][stride]`, `stride >= keys`
/// * `out`: `[rows][value_dim]`
/// * `prefetch`: rows to prefetch between the multiply-adds
pub(crate) fn add_values(
    isa: Isa,
    values: Matrix<'_, f32>,
    probs: &[f32],
    out: &mut [f32],
    stride: usize,
    prefetch: &mut Prefetch,
) {
    isa.run(AddValues { values, probs, out, stride, prefetch });
}

/// The arguments of [`add_values`].
struct AddValues<'a> {
    values: Matrix<'a, f32>,
    probs: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
    prefetch: &'a mut Prefetch,
}

impl Kernel for AddValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let AddValues { values, probs, out, stride, prefetch } = self;
        let (rows, width) = (probs.len() / stride, values.cols());
        assert!(values.has_contiguous_rows() && width == round_up_lanes(width) && values.rows() <= stride);
        assert!(holds(out.len(), rows, width));
        let groups = EvenBlocks::new(rows, product_rows::<S>(PANEL_VECTORS));
        let (blocks, tiles) =
            (values.rows().div_ceil(VALUE_KEYS), width.div_ceil(PANEL_VECTORS * S::LANES) * groups.count);
        prefetch.spread(blocks * tiles * prefetch_parts(VALUE_KEYS.min(values.rows())));
        for first in (0..values.rows()).step_by(VALUE_KEYS) {
            let keys = values.slice_rows(first..values.rows().min(first + VALUE_KEYS));
            for col in (0..width).step_by(PANEL_VECTORS * S::LANES) {
                let values = keys.slice_cols(col..width.min(col + PANEL_VECTORS * S::LANES));
                for rows in (0..groups.count).map(|n| groups.range(n)) {
                    let (probs, out) = (&probs[rows.start * stride + first..], &mut out[rows.start * width + col..]);
                    let tile = (values, (probs, stride), (out, width));
                    match values.cols() / S::LANES {
                        1 => add_tile::<S, 1>(simd, rows.len(), tile, prefetch),
                        _ => add_tile::<S, PANEL_VECTORS>(simd, rows.len(), tile, prefetch),
                    }
                }
            }
        }
    }
}

/// Values of some keys and V vectors of columns; probs and sums of some rows, with their strides.
type Operands<'a> = (Matrix<'a, f32>, (&'a [f32], usize), (&'a mut [f32], usize));

/// Adds to the sums of a register tile: `rows` rows of V vectors.
#[inline(always)]
fn add_tile<S: Simd, const V: usize>(
    simd: S,
    rows: usize,
    (values, (probs, stride), (out, width)): Operands<'_>,
    prefetch: &mut Prefetch,
) {
    assert!(values.cols() == V * S::LANES && rows > 0);
    assert!(probs.len() >= (rows - 1) * stride + values.rows() && out.len() >= (rows - 1) * width + values.cols());
    let mut tile = ValueTile::<S, V> {
        simd,
        probs: Left { at: probs.as_ptr(), row: stride as isize, step: 1 },
        values: Right { at: values.as_ptr(), step: values.row_stride() },
        keys: values.rows(),
        out: out.as_mut_ptr(),
        width,
        prefetch,
    };
    // SAFETY: the values are V vectors of each key; each row has a prob for each of them, and V vectors of sums (asserted). The rows are
    // no more than `product_rows` of two vectors, which are no more than those of one.
    unsafe { by_rows::<S, V>(rows, &mut tile) };
}

/// The sums of some rows.
struct ValueTile<'a, S: Simd, const V: usize> {
    simd: S,
    probs: Left<f32>,
    values: Right<f32>,
    keys: usize,
    out: *mut f32,
    width: usize,
    prefetch: &'a mut Prefetch,
}

impl<S: Simd, const V: usize> ByRows<S> for ValueTile<'_, S, V> {
    /// # Safety
    /// * `probs` is valid for R rows of `keys` steps, `values` for V vectors at each of them, and `out` for R rows of V vectors, read and
    ///   written
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let (simd, out) = (self.simd, self.out);
        let mut sums = [[simd.zero(); V]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                // SAFETY: vector v of row r: the caller's promise.
                *sum = unsafe { simd.load(out.wrapping_add(r * self.width + v * S::LANES)) };
            }
        }
        let arithmetic = (simd, F32Fma::<f32>::new());
        // SAFETY: the caller's promise.
        let sums = unsafe {
            add_product::<S, _, f32, R, V>(arithmetic, self.probs, self.values, self.keys, sums, self.prefetch)
        };
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: vector v of row r: the caller's promise.
                unsafe { simd.store(out.wrapping_add(r * self.width + v * S::LANES), sum) };
            }
        }
    }
}
