//! `P = 2^8 * 2^(S - m)`, `l += sum P`: the online softmax of a panel, in units of log2.
//!
//! **The running maximum m is an integer**, so that a rescale is by an exact power of two, and the fraction that the
//! polynomial takes, `s - round(s)`, depends on the score alone. With `magic = 1.5 * 2^23` and `base = magic + 127 - m`,
//! all exact:
//!
//! ```text
//! t = s + base            rounds s to an integer n; the low bits of t hold n - m + 127, which is the exponent of 2^(n-m)
//! r = s - (t - base)      s - n, in [-1/2, 1/2]
//! P = (2^8 * 2^r) * 2^(n - m)     the exponent held at 0 or above as an integer: where 2^(n - m) is below 2^-126, P is exactly 0
//! ```
//!
//! When m moves, it is set [`SLACK`](crate::kernel::state::SLACK), 8, above the largest score. So it moves rarely, and P never exceeds 2^8.
//! The factor [`PROB_UNIT`], a part of the polynomial's coefficients, makes P about 1 where the score is about the largest.

use crate::kernel::shape::MAX_PANEL_LANES;
use crate::kernel::state::{FAR, PROB_UNIT, PanelState, base, max_or_zero, power_of_two, raise_max};
use crate::simd::exp::{ROUND, exp2_fractions};
use crate::simd::{Simd, kernel};

/// The lowest score: lower ones, and -inf of hidden keys, are replaced by it. It is so far below any m within `FAR` that its
/// prob is 0, and so close to 0 that every step of the formula stays finite.
const LOWEST: f32 = -8_388_608.0; // -2^23

/// The values that a panel has summed so far.
pub(crate) enum Summed<'a> {
    /// None: this is the first tile.
    Nothing,
    /// `[value_dim][lanes]`.
    Lanes(&'a mut [f32]),
    /// `[rows][value_dim]`, whole vectors, and value_dim.
    Rows(&'a mut [f32], usize),
}

kernel! {
    /// Turns scores into probs and adds them to the state. Where the maximum moves, rescales the sums so far.
    ///
    /// * `scores`: `[keys][lanes]`, in units of log2, -inf where hidden; holds the probs afterwards
    /// * `tile_max`: the largest score of each lane; its length is the number of lanes
    /// * `out`: the values summed so far
    pub(crate) fn softmax<'a, S: Simd>(
        simd: S,
        scores: &'a mut [f32],
        tile_max: &'a [f32],
        state: &'a mut PanelState,
        out: Summed<'a>,
    ) {
        match tile_max.len() / S::LANES {
            1 => panel_softmax::<S, 1>(simd, scores, tile_max, state, out),
            2 => panel_softmax::<S, 2>(simd, scores, tile_max, state, out),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }
}

#[inline(always)]
pub(super) fn panel_softmax<S: Simd, const V: usize>(
    simd: S,
    scores: &mut [f32],
    tile_max: &[f32],
    state: &mut PanelState,
    out: Summed<'_>,
) {
    let lanes = V * S::LANES;
    assert!(tile_max.len() == lanes && scores.len().is_multiple_of(lanes));
    let (mut max, mut sum): ([S::F32; V], [S::F32; V]) = (load(simd, &state.max), load(simd, &state.sum));
    let tile_max: [S::F32; V] = load(simd, tile_max);

    // 1. Move the maximum where a score exceeds it, and rescale. (Loops and not closures, because a closure that is not inlined
    //    is compiled without the level's instructions.)
    let mut moved = false;
    let mut factors = [simd.splat(1.0); V];
    for v in 0..V {
        let passed = simd.lt(max[v], tile_max[v]);
        if simd.any(passed) {
            let old = max[v];
            max[v] = simd.select(passed, raise_max(simd, tile_max[v]), old);
            factors[v] = simd.select(passed, power_of_two(simd, simd.sub(old, max[v])), simd.splat(1.0));
            moved = true;
        }
    }
    if moved {
        rescale(simd, out, factors);
        for v in 0..V {
            sum[v] = simd.mul(sum[v], factors[v]);
        }
        store::<S, V>(simd, &mut state.max, max);
    }

    // 2. In lanes whose |m| is above `FAR`, subtract m from the scores, so that the formula stays exact.
    let mut any_far = false;
    let mut shift = [simd.zero(); V];
    for v in 0..V {
        max[v] = max_or_zero(simd, max[v]);
        let far = simd.lt(simd.splat(FAR), simd.abs(max[v]));
        if simd.any(far) {
            shift[v] = simd.select(far, max[v], simd.zero());
            max[v] = simd.select(far, simd.zero(), max[v]);
            any_far = true;
        }
    }
    if any_far {
        for scores in scores.chunks_exact_mut(lanes) {
            for v in 0..V {
                let scores = &mut scores[v * S::LANES..];
                simd.store_slice(scores, simd.sub(simd.load_slice(scores), shift[v]));
            }
        }
    }

    // 3. Probs and their sum. Scores now become probs. Their sum starts from zero for each tile, so that small probs are not
    //    lost against the sum of a long row.
    let mut bases = [simd.zero(); V];
    for v in 0..V {
        bases[v] = base(simd, max[v]);
    }
    let tile_sum = if const { S::EXP_VECTORS >= 4 * V } {
        probs_and_sum::<S, V, 4>(simd, scores, bases)
    } else if const { S::EXP_VECTORS >= 2 * V } {
        probs_and_sum::<S, V, 2>(simd, scores, bases)
    } else {
        probs_and_sum::<S, V, 1>(simd, scores, bases)
    };
    for v in 0..V {
        sum[v] = simd.add(sum[v], tile_sum[v]);
    }
    store::<S, V>(simd, &mut state.sum, sum);
}

/// Multiplies the sums of each lane by its factor.
#[inline(always)]
fn rescale<S: Simd, const V: usize>(simd: S, out: Summed<'_>, factors: [S::F32; V]) {
    match out {
        Summed::Nothing => {}
        Summed::Lanes(out) => {
            for out in out.chunks_exact_mut(V * S::LANES) {
                multiply(simd, out, factors);
            }
        }
        Summed::Rows(out, width) => {
            let mut of_lanes = [0.0; MAX_PANEL_LANES];
            store::<S, V>(simd, &mut of_lanes, factors);
            for (out, factor) in out.chunks_exact_mut(width.max(1)).zip(of_lanes) {
                for out in out.chunks_exact_mut(S::LANES) {
                    multiply(simd, out, [simd.splat(factor)]);
                }
            }
        }
    }
}

/// Turns scores into probs, `KEYS` keys at a time, and returns their sums.
#[inline(always)]
fn probs_and_sum<S: Simd, const V: usize, const KEYS: usize>(
    simd: S,
    scores: &mut [f32],
    bases: [S::F32; V],
) -> [S::F32; V] {
    let mut sum = [simd.zero(); V];
    let mut blocks = scores.chunks_exact_mut(KEYS * V * S::LANES);
    for scores in &mut blocks {
        block_probs::<S, V, KEYS>(simd, scores, bases, &mut sum);
    }
    for scores in blocks.into_remainder().chunks_exact_mut(V * S::LANES) {
        block_probs::<S, V, 1>(simd, scores, bases, &mut sum);
    }
    sum
}

#[inline(always)]
fn block_probs<S: Simd, const V: usize, const KEYS: usize>(
    simd: S,
    scores: &mut [f32],
    bases: [S::F32; V],
    sum: &mut [S::F32; V],
) {
    let mut keys = [[simd.zero(); V]; KEYS];
    for (k, key) in keys.iter_mut().enumerate() {
        *key = load(simd, &scores[k * V * S::LANES..]);
    }
    let keys = probs_of(simd, keys, bases, PROB_UNIT);
    for (k, key) in keys.into_iter().enumerate() {
        for v in 0..V {
            sum[v] = simd.add(sum[v], key[v]);
        }
        store::<S, V>(simd, &mut scores[k * V * S::LANES..], key);
    }
}

#[inline(always)]
pub(in crate::kernel) fn load<S: Simd, const V: usize>(simd: S, x: &[f32]) -> [S::F32; V] {
    let mut values = [simd.zero(); V];
    for (v, value) in values.iter_mut().enumerate() {
        *value = simd.load_slice(&x[v * S::LANES..]);
    }
    values
}

#[inline(always)]
fn multiply<S: Simd, const V: usize>(simd: S, x: &mut [f32], factors: [S::F32; V]) {
    for (v, factor) in factors.into_iter().enumerate() {
        let x = &mut x[v * S::LANES..];
        simd.store_slice(x, simd.mul(simd.load_slice(x), factor));
    }
}

#[inline(always)]
fn store<S: Simd, const V: usize>(simd: S, x: &mut [f32], values: [S::F32; V]) {
    for (v, value) in values.into_iter().enumerate() {
        simd.store_slice(&mut x[v * S::LANES..], value);
    }
}

/// `PROB_UNIT * 2^(s - m)` for s <= m, at most 2 ulp off; exactly 0 where 2^(s - m) is below 2^-126, and for -inf; NaN for NaN.
#[inline(always)]
pub(in crate::kernel) fn prob<S: Simd>(simd: S, s: S::F32, base: S::F32) -> S::F32 {
    probs_of(simd, [[s]], [base], PROB_UNIT)[0][0]
}

/// The same for several keys and vectors side by side, step by step, times `unit`, a power of two, instead of `PROB_UNIT`.
#[inline(always)]
pub(in crate::kernel) fn probs_of<S: Simd, const V: usize, const KEYS: usize>(
    simd: S,
    s: [[S::F32; V]; KEYS],
    bases: [S::F32; V],
    unit: f32,
) -> [[S::F32; V]; KEYS] {
    let (mut t, mut r) = (s, s);
    for (t, r) in t.iter_mut().zip(&mut r) {
        for v in 0..V {
            let s = simd.max(simd.splat(LOWEST), t[v]);
            t[v] = simd.add(s, bases[v]);
            r[v] = simd.sub(s, simd.sub(t[v], bases[v]));
        }
    }
    let mut p = exp2_fractions(simd, r, unit);
    for (t, p) in t.iter().zip(&mut p) {
        for v in 0..V {
            let exponent = simd.max_i32(simd.bits(t[v]), simd.splat_i32(ROUND.to_bits() as i32));
            p[v] = simd.mul(p[v], simd.float_of_bits(simd.shl_i32::<23>(exponent)));
        }
    }
    p
}
