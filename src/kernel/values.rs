//! `O += V P`: the values of a tile of keys, weighted, for a panel of queries.

use super::ahead::Ahead;
use super::multiply::Singles;
use super::pack::ValueBlocks;
use super::product::{ByRows, Left, by_rows, product};
use super::{EvenBlocks, product_rows};
use crate::simd::{Isa, Kernel, Simd};

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
    assert!(weights.len() == keys * lanes && first + keys <= blocks.keys);
    assert!(values.len() >= blocks.len() && out.len() >= blocks.value_dim * lanes);
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
        // SAFETY: the caller's promise.
        let sums = unsafe { product::<S, _, R, V>(arithmetic, self.values, self.weights, self.keys, self.ahead) };
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
