//! `S = K Q`: the scores of a tile of keys for a panel of queries, and the largest of each query.

use super::ahead::Ahead;
use super::product::{ByRows, Left, by_rows, product};
use super::{EvenBlocks, PANEL_LANES, product_rows};
use crate::simd::{Isa, Kernel, Simd};
use crate::strided::Matrix;

/// Writes `scores[j][lane] = sum over e of keys[j][e] * queries[e][lane]` and raises `max[lane]` to the largest of them.
///
/// * `keys`: `[rows, head_dim]`, contiguous rows at any distance: read in place
/// * `queries`: a packed panel, `[head_dim][lanes]` (more rows are ignored), `lanes` being the length of `max`
/// * `scores`: `[rows][lanes]`, written
/// * `ahead`: what to ask memory for meanwhile
pub(crate) fn scores(
    isa: Isa,
    keys: Matrix<'_, f32>,
    queries: &[f32],
    scores: &mut [f32],
    max: &mut [f32],
    ahead: &mut Ahead,
) {
    assert!(keys.has_contiguous_rows());
    assert!(queries.len() >= keys.cols() * max.len());
    assert!(scores.len() >= keys.rows() * max.len());
    isa.run(Scores { keys, queries, scores, max, ahead });
}

struct Scores<'a> {
    keys: Matrix<'a, f32>,
    queries: &'a [f32],
    scores: &'a mut [f32],
    max: &'a mut [f32],
    ahead: &'a mut Ahead,
}

impl Kernel for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.max.len() / S::LANES {
            1 => self.blocks::<S, 1>(simd),
            2 if 2 * S::LANES <= PANEL_LANES => self.blocks::<S, 2>(simd),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }
}

impl Scores<'_> {
    /// Block after block of as many keys as the registers hold.
    #[inline(always)]
    fn blocks<S: Simd, const V: usize>(self, simd: S) {
        assert!(self.max.len() == V * S::LANES);
        let mut block = Block::<S, V> {
            simd,
            keys: Left { at: self.keys.as_ptr(), row: self.keys.row_stride(), step: 1, next: 0 },
            queries: self.queries.as_ptr(),
            head_dim: self.keys.cols(),
            scores: self.scores.as_mut_ptr(),
            max: [simd.zero(); V],
        };
        for (v, max) in block.max.iter_mut().enumerate() {
            *max = simd.load_slice(&self.max[v * S::LANES..]);
        }
        let blocks = EvenBlocks::new(self.keys.rows(), product_rows::<S>(V));
        for b in 0..blocks.count {
            let rows = blocks.range(b);
            self.ahead.ask(simd);
            // Wrapping: keys of no elements may have any stride.
            let offset = self.keys.row_stride().wrapping_mul(rows.start as isize);
            block.keys.at = self.keys.as_ptr().wrapping_offset(offset);
            block.keys.next = self.keys.row_stride().wrapping_mul(rows.len() as isize);
            // SAFETY: these rows of the keys and of the scores, which `scores` has checked, and no more of them than
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
struct Block<S: Simd, const V: usize> {
    simd: S,
    keys: Left,
    queries: *const f32,
    head_dim: usize,
    scores: *mut f32,
    max: [S::F32; V],
}

impl<S: Simd, const V: usize> ByRows<S> for Block<S, V> {
    /// # Safety
    /// * `keys` is valid for R rows of `head_dim`, `queries` for `head_dim` steps, `scores` for writes of R rows
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        // SAFETY: the caller's promise.
        let scores = unsafe { product::<S, R, V>(self.simd, self.keys, self.queries, self.head_dim) };
        for (r, row) in scores.into_iter().enumerate() {
            for (v, scores) in row.into_iter().enumerate() {
                self.max[v] = self.simd.max(self.max[v], scores);
                // SAFETY: row r < R of the scores: the caller's promise.
                unsafe { self.simd.store(self.scores.add((r * V + v) * S::LANES), scores) };
            }
        }
    }
}
