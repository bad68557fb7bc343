//! `S = K Q`: the scores of a tile of keys for a panel of queries, and the largest score of each query.

use crate::element::Bf16Pair;
use crate::kernel::arithmetic::{Bf16Dots, F32Fma, Multiply};
use crate::kernel::prefetch::Prefetch;
use crate::kernel::product::{ByRows, Left, Right, by_rows, product};
use crate::kernel::shape::{EvenBlocks, holds, product_rows};
use crate::simd::{Isa, Simd, kernel};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// Writes `scores[j][lane] = sum over e of keys[j][e] * queries[e][lane]`, and raises `max[lane]` to the largest of them.
/// Scores from pairs are also multiplied with the factor of [`PanelKeys::Pairs`].
///
/// * `keys`: `[rows, head_dim]`, or their pairs; rows without gaps, at any stride
/// * `queries`: a panel, `[head_dim or pairs][lanes]`, where `lanes` is the length of `max`; any further rows are ignored
/// * `scores`: `[rows][lanes]`, written
/// * `prefetch`: rows to prefetch between the multiply-adds
pub(crate) fn scores(
    isa: Isa,
    keys: PanelKeys<'_>,
    queries: &[f32],
    scores: &mut [f32],
    max: &mut [f32],
    prefetch: &mut Prefetch,
) {
    match keys {
        PanelKeys::F32(keys) => f32_scores(isa, keys, queries, scores, max, prefetch),
        PanelKeys::Pairs(keys, factor) => pair_scores(isa, (keys, factor), queries, scores, max, prefetch),
    }
}

/// The keys of a tile, as the product reads them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PanelKeys<'a> {
    /// As f32.
    F32(Matrix<'a, f32>),
    /// As pairs, and the factor that the sums of products are multiplied with.
    Pairs(Matrix<'a, Bf16Pair>, f32),
}

impl PanelKeys<'_> {
    pub(crate) fn slice_rows(&self, range: Range<usize>) -> Self {
        match self {
            PanelKeys::F32(keys) => PanelKeys::F32(keys.slice_rows(range)),
            PanelKeys::Pairs(keys, factor) => PanelKeys::Pairs(keys.slice_rows(range), *factor),
        }
    }
}

kernel! {
    /// [`scores`] of keys in f32.
    fn f32_scores<'a, S: Simd>(
        simd: S,
        keys: Matrix<'a, f32>,
        queries: &'a [f32],
        scores: &'a mut [f32],
        max: &'a mut [f32],
        prefetch: &'a mut Prefetch,
    ) {
        panel_scores((simd, F32Fma::new()), keys, queries, scores, max, prefetch);
    }
}

kernel! {
    /// [`scores`] of keys as pairs of bf16.
    fn pair_scores<'a, S: Simd, D: PairDots>(
        simd: S,
        dots: D,
        keys: (Matrix<'a, Bf16Pair>, f32),
        queries: &'a [f32],
        scores: &'a mut [f32],
        max: &'a mut [f32],
        prefetch: &'a mut Prefetch,
    ) {
        let (keys, factor) = keys;
        panel_scores((simd, Bf16Dots { dots, factor }), keys, queries, scores, max, prefetch);
    }
}

#[inline(always)]
fn panel_scores<S: Simd, M: Multiply<S>>(
    arithmetic: (S, M),
    keys: Matrix<'_, M::Step>,
    queries: &[f32],
    scores: &mut [f32],
    max: &mut [f32],
    prefetch: &mut Prefetch,
) {
    match max.len() / S::LANES {
        1 => block_scores::<S, M, 1>(arithmetic, keys, queries, scores, max, prefetch),
        2 => block_scores::<S, M, 2>(arithmetic, keys, queries, scores, max, prefetch),
        vectors => unreachable!("a panel of {vectors} vectors"),
    }
}

/// The scores of one block of keys after the other. A block has at most `product_rows` keys.
#[inline(always)]
fn block_scores<S: Simd, M: Multiply<S>, const V: usize>(
    (simd, multiply): (S, M),
    keys: Matrix<'_, M::Step>,
    queries: &[f32],
    scores: &mut [f32],
    max: &mut [f32],
    prefetch: &mut Prefetch,
) {
    let lanes = V * S::LANES;
    assert!(max.len() == lanes && keys.has_contiguous_rows());
    assert!(holds(queries.len(), keys.cols(), lanes) && holds(scores.len(), keys.rows(), lanes));
    let mut block = ScoreTile::<S, M, V> {
        prefetch,
        arithmetic: (simd, multiply),
        keys: Left { at: keys.as_ptr(), row: keys.row_stride(), step: 1 },
        queries: queries.as_ptr(),
        steps: keys.cols(),
        scores: scores.as_mut_ptr(),
        max: [simd.zero(); V],
    };
    for (v, of_block) in block.max.iter_mut().enumerate() {
        *of_block = simd.load_slice(&max[v * S::LANES..]);
    }
    let blocks = EvenBlocks::new(keys.rows(), product_rows::<S>(V));
    for b in 0..blocks.count {
        let rows = blocks.range(b);
        // Wrapping: keys of no elements may have any stride.
        let offset = keys.row_stride().wrapping_mul(rows.start as isize);
        block.keys.at = keys.as_ptr().wrapping_offset(offset);
        // SAFETY: these rows of the keys and of the scores exist (asserted above), and they are no more than `product_rows`.
        unsafe { by_rows::<S, V>(rows.len(), &mut block) };
        block.scores = block.scores.wrapping_add(rows.len() * lanes);
    }
    for (v, of_block) in block.max.into_iter().enumerate() {
        simd.store_slice(&mut max[v * S::LANES..], of_block);
    }
}

/// The product of a block of keys and the panel's queries.
struct ScoreTile<'a, S: Simd, M: Multiply<S>, const V: usize> {
    prefetch: &'a mut Prefetch,
    arithmetic: (S, M),
    keys: Left<M::Step>,
    queries: *const f32,
    steps: usize,
    scores: *mut f32,
    max: [S::F32; V],
}

impl<S: Simd, M: Multiply<S>, const V: usize> ByRows<S> for ScoreTile<'_, S, M, V> {
    /// # Safety
    /// * `keys` is valid for R rows of `steps` steps, `queries` for `steps` steps, `scores` for writes of R rows
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let (simd, _) = self.arithmetic;
        let queries = Right { at: self.queries, step: (V * S::LANES) as isize };
        // SAFETY: the caller's promise.
        let scores =
            unsafe { product::<S, M, f32, R, V>(self.arithmetic, self.keys, queries, self.steps, self.prefetch) };
        for (r, row) in scores.into_iter().enumerate() {
            for (v, scores) in row.into_iter().enumerate() {
                self.max[v] = simd.max(self.max[v], scores);
                // SAFETY: row r < R of the scores: the caller's promise.
                unsafe { simd.store(self.scores.add((r * V + v) * S::LANES), scores) };
            }
        }
    }
}
