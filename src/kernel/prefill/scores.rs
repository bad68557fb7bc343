//! `S = K Q`: the scores of a tile of keys for a panel of queries, and the largest of each query.

use crate::element::Bf16Pair;
use crate::kernel::arithmetic::{Multiply, Pairs, Singles};
use crate::kernel::prefetch::Prefetch;
use crate::kernel::product::{ByRows, Left, Right, by_rows, product};
use crate::kernel::shape::{EvenBlocks, product_rows};
use crate::simd::{Isa, Kernel, PairDots, PairKernel, Simd};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// Writes `scores[j][lane] = sum over e of keys[j][e] * queries[e][lane]`, times the factor that comes with pairs, and raises
/// `max[lane]` to the largest of them.
///
/// * `keys`: `[rows, head_dim]`, or their pairs, in rows without gaps at any distance: read in place
/// * `queries`: a packed panel, `[head_dim, or as many as there are pairs][lanes]` (more rows are ignored), `lanes` being the
///   length of `max`
/// * `scores`: `[rows][lanes]`, written
/// * `ahead`: what to ask memory for meanwhile
pub(crate) fn scores(
    isa: Isa,
    keys: PanelKeys<'_>,
    queries: &[f32],
    scores: &mut [f32],
    max: &mut [f32],
    ahead: &mut Prefetch,
) {
    match keys {
        PanelKeys::Wide(keys) => isa.run(Scores { keys, queries, scores, max, ahead }),
        PanelKeys::Pairs(keys, factor) => {
            isa.run_pairs(PairScores(Scores { keys, queries, scores, max, ahead }, factor))
        }
    }
}

/// Keys of a tile, as the product reads them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PanelKeys<'a> {
    /// As f32.
    Wide(Matrix<'a, f32>),
    /// As pairs, and what sums of their products are multiplied with.
    Pairs(Matrix<'a, Bf16Pair>, f32),
}

impl PanelKeys<'_> {
    pub(crate) fn slice_rows(&self, range: Range<usize>) -> Self {
        match self {
            PanelKeys::Wide(keys) => PanelKeys::Wide(keys.slice_rows(range)),
            PanelKeys::Pairs(keys, factor) => PanelKeys::Pairs(keys.slice_rows(range), *factor),
        }
    }
}

struct Scores<'a, K> {
    keys: Matrix<'a, K>,
    queries: &'a [f32],
    scores: &'a mut [f32],
    max: &'a mut [f32],
    ahead: &'a mut Prefetch,
}

impl Kernel for Scores<'_, f32> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.panels(simd, Singles::new());
    }
}

struct PairScores<'a>(Scores<'a, Bf16Pair>, f32);

impl PairKernel for PairScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) {
        self.0.panels(simd, Pairs { dots, factor: self.1 });
    }
}

impl<K> Scores<'_, K> {
    #[inline(always)]
    fn panels<S: Simd, M: Multiply<S, Step = K>>(self, simd: S, multiply: M) {
        let (rows, lanes) = (self.keys.rows(), self.max.len());
        assert!(self.keys.has_contiguous_rows());
        assert!(self.queries.len() >= self.keys.cols() * lanes && self.scores.len() >= rows * lanes);
        match self.max.len() / S::LANES {
            1 => self.blocks::<S, M, 1>(simd, multiply),
            2 => self.blocks::<S, M, 2>(simd, multiply),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }

    /// Block after block of as many keys as the registers hold.
    #[inline(always)]
    fn blocks<S: Simd, M: Multiply<S, Step = K>, const V: usize>(self, simd: S, multiply: M) {
        assert!(self.max.len() == V * S::LANES);
        let mut block = Block::<S, M, V> {
            ahead: self.ahead,
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
            // SAFETY: these rows of the keys and of the scores, which `panels` has checked, and no more of them than
            // `product_rows`.
            unsafe { by_rows::<S, V>(rows.len(), &mut block) };
            block.scores = block.scores.wrapping_add(rows.len() * V * S::LANES);
        }
        for (v, max) in block.max.into_iter().enumerate() {
            simd.store_slice(&mut self.max[v * S::LANES..], max);
        }
    }
}

/// Some keys against the panel.
struct Block<'a, S: Simd, M: Multiply<S>, const V: usize> {
    ahead: &'a mut Prefetch,
    arithmetic: (S, M),
    keys: Left<M::Step>,
    queries: *const f32,
    steps: usize,
    scores: *mut f32,
    max: [S::F32; V],
}

impl<S: Simd, M: Multiply<S>, const V: usize> ByRows<S> for Block<'_, S, M, V> {
    /// # Safety
    /// * `keys` is valid for R rows of `steps`, `queries` for as many, `scores` for writes of R rows
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let (simd, _) = self.arithmetic;
        let queries = Right { at: self.queries, step: (V * S::LANES) as isize };
        // SAFETY: the caller's promise.
        let scores = unsafe { product::<S, M, f32, R, V>(self.arithmetic, self.keys, queries, self.steps, self.ahead) };
        for (r, row) in scores.into_iter().enumerate() {
            for (v, scores) in row.into_iter().enumerate() {
                self.max[v] = simd.max(self.max[v], scores);
                // SAFETY: row r < R of the scores: the caller's promise.
                unsafe { simd.store(self.scores.add((r * V + v) * S::LANES), scores) };
            }
        }
    }
}
