//! `S = K Q`: the scores of a tile of keys for a panel of queries, and the largest score of each query.

use crate::element::Bf16Pair;
use crate::kernel::arithmetic::{Bf16Dots, F32Fma, Multiply};
use crate::kernel::prefetch::Prefetch;
use crate::kernel::product::{ByRows, Left, Right, by_rows, product};
use crate::kernel::shape::{EvenBlocks, holds, product_rows};
use crate::simd::{Isa, Kernel, PairDots, PairKernel, Simd};
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
        PanelKeys::F32(keys) => isa.run(Scores { keys, queries, scores, max, prefetch }),
        PanelKeys::Pairs(keys, factor) => {
            isa.run_pairs(PairScores(Scores { keys, queries, scores, max, prefetch }, factor));
        }
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

/// The arguments of [`scores`], which stay in this struct while the products run (see `AddValues` in `values.rs`).
pub(super) struct Scores<'a, K> {
    pub(super) keys: Matrix<'a, K>,
    pub(super) queries: &'a [f32],
    pub(super) scores: &'a mut [f32],
    pub(super) max: &'a mut [f32],
    pub(super) prefetch: &'a mut Prefetch,
}

impl Kernel for Scores<'_, f32> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.panel_scores(simd, F32Fma::new());
    }
}

/// The scores of keys as pairs of bf16, and the factor.
struct PairScores<'a>(Scores<'a, Bf16Pair>, f32);

impl PairKernel for PairScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) {
        self.0.panel_scores(simd, Bf16Dots { dots, factor: self.1 });
    }
}

impl<K> Scores<'_, K> {
    #[inline(always)]
    pub(super) fn panel_scores<S: Simd, M: Multiply<S, Step = K>>(self, simd: S, multiply: M) {
        let lanes = self.max.len();
        assert!(self.keys.has_contiguous_rows());
        assert!(
            holds(self.queries.len(), self.keys.cols(), lanes) && holds(self.scores.len(), self.keys.rows(), lanes)
        );
        match self.max.len() / S::LANES {
            1 => self.block_scores::<S, M, 1>(simd, multiply),
            2 => self.block_scores::<S, M, 2>(simd, multiply),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }

    /// The scores of one block of keys after the other. A block has at most `product_rows` keys.
    #[inline(always)]
    fn block_scores<S: Simd, M: Multiply<S, Step = K>, const V: usize>(self, simd: S, multiply: M) {
        assert!(self.max.len() == V * S::LANES);
        let mut block = ScoreTile::<S, M, V> {
            prefetch: self.prefetch,
            arithmetic: (simd, multiply),
            keys: Left { at: self.keys.as_ptr(), row: self.keys.row_stride(), step: 1 },
            queries: self.queries.as_ptr(),
            steps: self.keys.cols(),
            scores: self.scores.as_mut_ptr(),
            max: [simd.zero(); V],
        };
        for (v, max) in block.max.iter_mut().enumerate() {
            *max = simd.load_slice(&self.max[v * S::LANES..]);
        }
        let blocks = EvenBlocks::new(self.keys.rows(), product_rows::<S>(V));
        for b in 0..blocks.count {
            let rows = blocks.range(b);
            // Wrapping: keys of no elements may have any stride.
            let offset = self.keys.row_stride().wrapping_mul(rows.start as isize);
            block.keys.at = self.keys.as_ptr().wrapping_offset(offset);
            // SAFETY: these rows of the keys and of the scores exist, and the queries have a vector for each step
            // (`panel_scores` has checked). The rows are no more than `product_rows`.
            unsafe { by_rows::<S, V>(rows.len(), &mut block) };
            block.scores = block.scores.wrapping_add(rows.len() * V * S::LANES);
        }
        for (v, max) in block.max.into_iter().enumerate() {
            simd.store_slice(&mut self.max[v * S::LANES..], max);
        }
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
