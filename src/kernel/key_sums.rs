//! Sums of probabilities for each key: `sums[j] += sum_i 2^(S[j][i] - lse[i])`, in units of log2.
//!
//! The log-sum-exps are known, so there is no running maximum, and no pair depends on another. A hidden pair adds exactly 0,
//! whatever the row's log-sum-exp is.

#![forbid(unsafe_code)]

use super::prefill::softmax::{load, probs_of};
use super::shape::MAX_PANEL_LANES;
use super::state::base;
use crate::simd::{Isa, MAX_LANES, Simd, kernel};
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// The sums of some keys for the heads of a task, and the log-sum-exps of its rows.
pub(crate) struct KeySums<'s> {
    /// The keys that have sums.
    pub(crate) keys: Range<usize>,
    /// `[heads][width]`: the first elements of each row are the sums. At least [`sums_width`] follow from there on, for whole vectors.
    pub(crate) sums: &'s mut [f32],
    pub(crate) width: usize,
    /// Of each row, as [`row_lse`] gives it.
    pub(crate) lse: &'s [f32],
    /// A buffer of [`lane_sums_len`] elements.
    pub(crate) lane_sums: &'s mut [f32],
}

impl KeySums<'_> {
    /// Adds the probabilities of one row to the sums of its head.
    ///
    /// * `scores`: whole vectors from key `from` on, -inf where hidden and after the last key; changed
    pub(super) fn add_row(&mut self, isa: Isa, scores: &mut [f32], n: usize, (head, from): (usize, usize)) {
        let mut lse = [self.lse[n]];
        spread_nan(scores, &mut lse);
        let sums = &mut self.sums[head * self.width..][from - self.keys.start..];
        add_key_probs(isa, scores, lse[0], &mut sums[..scores.len()]);
    }

    /// Starts the sums of a tile in the lanes of a vector.
    pub(super) fn start_tile(&mut self, isa: Isa, tile: &Range<usize>) {
        self.lane_sums[..tile.len() * isa.lanes()].fill(0.0);
    }

    /// Adds the probabilities of a panel to the lanes.
    ///
    /// * `scores`: `[keys][lanes]`, -inf where hidden; changed
    /// * `rows`, `lanes`: the rows of the panel, and its lanes
    /// * `first`: the index in the tile of the first key
    pub(super) fn add_panel(
        &mut self,
        isa: Isa,
        scores: &mut [f32],
        (rows, lanes): (&Range<usize>, usize),
        first: usize,
    ) {
        // A lane without a row must not count: its query is 0, whose product with an infinite key is NaN.
        if rows.len() < lanes {
            scores.chunks_exact_mut(lanes).for_each(|scores| scores[rows.len()..].fill(f32::NEG_INFINITY));
        }
        let mut lse = [f32::INFINITY; MAX_PANEL_LANES];
        lse[..rows.len()].copy_from_slice(&self.lse[rows.clone()]);
        let lse = &mut lse[..lanes];
        spread_nan(scores, lse);
        let lane_sums = &mut self.lane_sums[first * isa.lanes()..][..scores.len() / lanes * isa.lanes()];
        add_lane_probs(isa, scores, lse, lane_sums);
    }

    /// Adds the lanes of a tile to the sums of the only head.
    pub(super) fn end_tile(&mut self, isa: Isa, tile: &Range<usize>) {
        let sums = &mut self.sums[tile.start - self.keys.start..][..tile.len()];
        fold_lanes(isa, &self.lane_sums[..tile.len() * isa.lanes()], sums);
    }
}

/// Elements of a row of sums for `keys` keys: whole vectors from any key on.
pub(crate) fn sums_width(keys: usize) -> usize {
    (keys + MAX_LANES).next_multiple_of(MAX_LANES)
}

/// Elements of a tile's sums in each lane of a vector.
pub(crate) fn lane_sums_len(tile_keys: usize) -> usize {
    tile_keys * MAX_LANES
}

/// A row's log-sum-exp in units of log2. A row that sees no key (-inf) gets +inf, so that it adds nothing. Others stay finite, so
/// that hidden scores minus it are -inf.
pub(crate) fn row_lse(natural: f32) -> f32 {
    if natural == f32::NEG_INFINITY {
        return f32::INFINITY;
    }
    ((natural as f64 * LOG2_E) as f32).clamp(f32::MIN, f32::MAX)
}

/// Makes the visible scores of rows whose log-sum-exp is NaN NaN, and that log-sum-exp 0. So hidden scores stay -inf, which they
/// would not if NaN were subtracted.
///
/// * `scores`: `[keys][rows]`
fn spread_nan(scores: &mut [f32], lse: &mut [f32]) {
    let rows = lse.len();
    for (n, lse) in lse.iter_mut().enumerate().filter(|(_, lse)| lse.is_nan()) {
        *lse = 0.0;
        let of_row = scores.chunks_exact_mut(rows).map(|scores| &mut scores[n]);
        of_row.filter(|score| **score != f32::NEG_INFINITY).for_each(|score| *score = f32::NAN);
    }
}

kernel! {
    /// Adds `2^(scores - lse)` of all lanes to `sums`, a vector for each key.
    fn add_lane_probs<'a, S: Simd>(simd: S, scores: &'a [f32], lse: &'a [f32], sums: &'a mut [f32]) {
        match lse.len() / S::LANES {
            1 => add_panel::<S, 1>(simd, scores, lse, sums),
            2 => add_panel::<S, 2>(simd, scores, lse, sums),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }
}

#[inline(always)]
fn add_panel<S: Simd, const V: usize>(simd: S, scores: &[f32], lse: &[f32], sums: &mut [f32]) {
    let lse: [S::F32; V] = load(simd, lse);
    if const { S::EXP_VECTORS >= 4 * V } {
        add_blocks::<S, V, 4>(simd, scores, lse, sums);
    } else if const { S::EXP_VECTORS >= 2 * V } {
        add_blocks::<S, V, 2>(simd, scores, lse, sums);
    } else {
        add_blocks::<S, V, 1>(simd, scores, lse, sums);
    }
}

/// `KEYS` keys at a time.
#[inline(always)]
fn add_blocks<S: Simd, const V: usize, const KEYS: usize>(simd: S, scores: &[f32], lse: [S::F32; V], sums: &mut [f32]) {
    let mut blocks = scores.chunks_exact(KEYS * V * S::LANES);
    let mut sum_blocks = sums.chunks_exact_mut(KEYS * S::LANES);
    for (scores, sums) in (&mut blocks).zip(&mut sum_blocks) {
        add_block::<S, V, KEYS>(simd, scores, lse, sums);
    }
    let (rest, sums) = (blocks.remainder(), &mut sums[scores.len() / (KEYS * V * S::LANES) * KEYS * S::LANES..]);
    for (scores, sums) in rest.chunks_exact(V * S::LANES).zip(sums.chunks_exact_mut(S::LANES)) {
        add_block::<S, V, 1>(simd, scores, lse, sums);
    }
}

#[inline(always)]
fn add_block<S: Simd, const V: usize, const KEYS: usize>(simd: S, scores: &[f32], lse: [S::F32; V], sums: &mut [f32]) {
    let mut keys = [[simd.zero(); V]; KEYS];
    for (k, key) in keys.iter_mut().enumerate() {
        *key = load(simd, &scores[k * V * S::LANES..]);
        for v in 0..V {
            key[v] = exponent(simd, key[v], lse[v]);
        }
    }
    let keys = probs_of(simd, keys, [base(simd, simd.zero()); V], 1.0);
    for (k, key) in keys.into_iter().enumerate() {
        let sums = &mut sums[k * S::LANES..];
        let mut sum = simd.load_slice(sums);
        for prob in key {
            sum = simd.add(sum, prob);
        }
        simd.store_slice(sums, sum);
    }
}

/// `score - lse`, at most 0: a probability is at most 1. Where scores are so large that their rounding errors are above 1, the
/// difference could be any number.
#[inline(always)]
fn exponent<S: Simd>(simd: S, score: S::F32, lse: S::F32) -> S::F32 {
    simd.min(simd.zero(), simd.sub(score, lse))
}

kernel! {
    /// Adds `2^(scores - lse)` to `sums`, keys along the lanes.
    fn add_key_probs<'a, S: Simd>(simd: S, scores: &'a [f32], lse: f32, sums: &'a mut [f32]) {
        let (lse, base) = (simd.splat(lse), base(simd, simd.zero()));
        for (scores, sums) in scores.chunks_exact(S::LANES).zip(sums.chunks_exact_mut(S::LANES)) {
            let [[prob]] = probs_of(simd, [[exponent(simd, simd.load_slice(scores), lse)]], [base], 1.0);
            simd.store_slice(sums, simd.add(simd.load_slice(sums), prob));
        }
    }
}

kernel! {
    /// Adds the lanes of each key's vector to the key's sum.
    fn fold_lanes<'a, S: Simd>(simd: S, lane_sums: &'a [f32], sums: &'a mut [f32]) {
        for (lanes, sum) in lane_sums.chunks_exact(S::LANES).zip(sums) {
            *sum += simd.sum(simd.load_slice(lanes));
        }
    }
}
