//! Short rows, one in each lane: as many rows as a vector has lanes are transposed, computed as neighbouring lines, and
//! transposed back.
//!
//! A row of its own fills its last vector in part, and adds up the lanes of its maximum and of its sum: 25 to 45 ns for each row
//! (Zen 3). Here no lane is idle. Transposing takes a quarter of the time of the exponentials.
//!
//! The bits are those of a row of its own, because the exponentials are added in the same order: see [`row_sums`].
#![forbid(unsafe_code)]

use super::line_states::{SMALL, visible};
use super::row_state::RowState;
use super::scale::Scaling;
use crate::simd::exp::{SCALED_ONE, exp_scaled};
use crate::simd::{MAX_LANES, Simd};

/// The longest row that is transposed. Longer rows take no longer as they are.
pub(super) const SHORT: usize = 128;

/// Prefetch distance in the input and the output, in numbers. The processor does not see a stream in the rows of a block.
const DISTANCE: usize = 2048;

/// Numbers of the scratch memory of rows of `len` elements: columns of numbers, and columns of exponentials.
pub(super) fn columns_len<S: Simd>(len: usize) -> usize {
    2 * len.next_multiple_of(S::LANES) * S::LANES
}

/// The maxima and the sums of the first `LANES` rows of `out`, each of `len` elements. The input is `x`, or `out` without it.
/// Slices may be longer. If `finish`, `out` becomes the softmax times the `upstream` of each row, or log_softmax if `LOG`.
#[inline(always)]
pub(super) fn softmax<S: Simd, C: Scaling, const LOG: bool>(
    simd: S,
    x: Option<&[f32]>,
    out: &mut [f32],
    len: usize,
    columns: &mut [f32],
    (scale, upstream, finish): (C, S::F32, bool),
) -> [S::F32; 2] {
    let next = [x.unwrap_or(out).as_ptr().wrapping_add(DISTANCE), out.as_ptr().wrapping_add(DISTANCE)];
    let max = load_columns(simd, x.unwrap_or(out), len, columns, scale);
    let sum = exponentials::<S, C, LOG>(simd, len, columns, max, scale, next);
    if finish {
        let (exponents, exps) = columns.split_at_mut(columns.len() / 2);
        if LOG {
            store_rows::<S, LOG>(simd, exponents, len, out, log_sums(simd, max, sum));
        } else {
            let norms = norms(simd, max, sum, upstream, exps);
            store_rows::<S, LOG>(simd, exps, len, out, norms);
        }
    }
    [max, sum]
}

/// Transposes rows into columns: column i holds element i of each row, times the factor. Returns the maxima.
#[inline(always)]
fn load_columns<S: Simd, C: Scaling>(simd: S, x: &[f32], len: usize, columns: &mut [f32], scale: C) -> S::F32 {
    let mut max = simd.splat(f32::NEG_INFINITY);
    let mut blocks = columns[..len * S::LANES].chunks_exact_mut(S::LANES * S::LANES);
    let mut at = 0;
    for block in blocks.by_ref() {
        let rows = simd.transpose(simd.load_rows(&x[at..], len));
        for (row, column) in rows.iter().zip(block.chunks_exact_mut(S::LANES)) {
            let y = scale.apply_factor(simd, *row);
            simd.store_slice(column, y);
            max = simd.max(y, max);
        }
        at += S::LANES;
    }
    let rest = blocks.into_remainder();
    if !rest.is_empty() {
        let rows = simd.transpose(load_last_block(simd, &x[at..], len));
        for (row, column) in rows.iter().zip(rest.chunks_exact_mut(S::LANES)) {
            let y = scale.apply_factor(simd, *row);
            simd.store_slice(column, y);
            max = simd.max(y, max);
        }
    }
    max
}

/// [`Simd::load_rows`] where rows end within a vector. The lanes past the end of a row are of the next row, and are not used.
#[inline(always)]
fn load_last_block<S: Simd>(simd: S, x: &[f32], len: usize) -> [S::F32; MAX_LANES] {
    let mut rows = [simd.zero(); MAX_LANES];
    for row in 0..S::LANES {
        let x = &x[row * len..];
        rows[row] = if x.len() >= S::LANES { simd.load_slice(x) } else { simd.load_part(x, 0.0) };
    }
    rows
}

/// Computes the exponentials of the columns in units of 1/`SCALED_ONE`. If `LOG`, the columns become the exponents. Returns the sums.
/// Prefetches `LANES * len` numbers from each of `next`, which may be any addresses.
#[inline(always)]
fn exponentials<S: Simd, C: Scaling, const LOG: bool>(
    simd: S,
    len: usize,
    columns: &mut [f32],
    max: S::F32,
    scale: C,
    mut next: [*const f32; 2],
) -> S::F32 {
    let max = visible(simd, max);
    let (columns, exps) = columns.split_at_mut(columns.len() / 2);
    // The last column may have no second one. The scratch memory has an even number of columns.
    let pairs = columns.chunks_exact_mut(2 * S::LANES).zip(exps.chunks_exact_mut(2 * S::LANES));
    for (column, exps) in pairs.take(len.div_ceil(2)) {
        for next in &mut next {
            simd.prefetch_elements(*next, 2 * S::LANES);
            *next = next.wrapping_add(2 * S::LANES);
        }
        let (mut t, mut e) = ([max; 2], [max; 2]);
        for v in 0..2 {
            t[v] = scale.exponent(simd, simd.load_slice(&column[v * S::LANES..]), max);
            e[v] = exp_scaled(simd, t[v]);
        }
        for v in 0..2 {
            if LOG {
                simd.store_slice(&mut column[v * S::LANES..], t[v]);
            }
            simd.store_slice(&mut exps[v * S::LANES..], e[v]);
        }
    }
    row_sums(simd, &exps[..len * S::LANES])
}

/// The sums of rows in lanes, in units of 1, in the order of `exp_tile` of `row.rs`: element i of a row is in lane i % `LANES` of a
/// vector there. The vectors of whole pairs have a sum for each of the two, and vectors after the last pair are added to the
/// first. The two sums are added, and then their lanes as `Simd::sum` does.
#[inline(always)]
fn row_sums<S: Simd>(simd: S, exps: &[f32]) -> S::F32 {
    let vector = S::LANES * S::LANES;
    let mut sums = [simd.zero(); MAX_LANES];
    for lane in 0..S::LANES {
        let mut pair = [simd.zero(); 2];
        let pairs = exps.chunks_exact(2 * vector);
        let rest = pairs.remainder();
        for exps in pairs {
            pair[0] = simd.add(pair[0], simd.load_slice(&exps[lane * S::LANES..]));
            pair[1] = simd.add(pair[1], simd.load_slice(&exps[vector + lane * S::LANES..]));
        }
        for exps in rest.chunks(vector) {
            if exps.len() > lane * S::LANES {
                pair[0] = simd.add(pair[0], simd.load_slice(&exps[lane * S::LANES..]));
            }
        }
        sums[lane] = simd.add(pair[0], pair[1]);
    }
    let mut half = S::LANES / 2;
    while half > 0 {
        for lane in 0..half {
            sums[lane] = simd.add(sums[lane], sums[lane + half]);
        }
        half /= 2;
    }
    simd.mul(sums[0], simd.splat(1.0 / SCALED_ONE))
}

/// The factor that makes exponentials of each row its softmax. Where it would be denormal, the exponentials are multiplied by their
/// unit before: see `norms_of` in `row.rs`.
#[inline(always)]
fn norms<S: Simd>(simd: S, max: S::F32, sum: S::F32, upstream: S::F32, columns: &mut [f32]) -> S::F32 {
    let none = simd.eq(max, simd.splat(f32::NEG_INFINITY));
    let inverse = simd.select(none, sum, simd.div(simd.splat(1.0), sum));
    let unit = simd.splat(1.0 / SCALED_ONE);
    let (norm, both) = (simd.mul(simd.mul(inverse, unit), upstream), simd.mul(inverse, upstream));
    let small = simd.lt(simd.abs(norm), simd.splat(SMALL));
    let small = simd.and(small, simd.lt(simd.zero(), simd.abs(both)));
    if !simd.any(small) {
        return norm;
    }
    let first = simd.select(small, unit, simd.splat(1.0));
    for column in columns.chunks_exact_mut(S::LANES) {
        simd.store_slice(column, simd.mul(simd.load_slice(column), first));
    }
    simd.select(small, both, norm)
}

/// [`RowState::log_sum`] of each row.
#[inline(always)]
fn log_sums<S: Simd>(simd: S, max: S::F32, sum: S::F32) -> S::F32 {
    let (mut maxima, mut sums) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
    simd.store_slice(&mut maxima, max);
    simd.store_slice(&mut sums, sum);
    for lane in 0..S::LANES {
        sums[lane] = RowState { max: maxima[lane], sum: sums[lane] }.log_sum();
    }
    simd.load_slice(&sums)
}

/// Finishes the columns and transposes them back into the first `LANES` rows of `out`.
#[inline(always)]
fn store_rows<S: Simd, const LOG: bool>(simd: S, columns: &[f32], len: usize, out: &mut [f32], norm: S::F32) {
    let out = &mut out[..S::LANES * len];
    let whole = len - len % S::LANES;
    let (columns, last) = columns.split_at(whole * S::LANES);
    // Where rows end within a vector, it reaches into the next row, whose first elements are stored later.
    if whole < len {
        let rows = simd.transpose(finished::<S, LOG>(simd, &last[..S::LANES * S::LANES], norm));
        for row in 0..S::LANES {
            let to = &mut out[row * len + whole..];
            if to.len() >= S::LANES {
                simd.store_slice(to, rows[row]);
            } else {
                simd.store_part(&mut to[..len - whole], rows[row]);
            }
        }
    }
    for (block, columns) in columns.chunks_exact(S::LANES * S::LANES).enumerate() {
        let rows = simd.transpose(finished::<S, LOG>(simd, columns, norm));
        simd.store_rows(&mut out[block * S::LANES..], len, rows);
    }
}

/// As many columns as a vector has lanes, finished.
#[inline(always)]
fn finished<S: Simd, const LOG: bool>(simd: S, columns: &[f32], norm: S::F32) -> [S::F32; MAX_LANES] {
    let mut block = [simd.zero(); MAX_LANES];
    for (i, column) in columns.chunks_exact(S::LANES).enumerate() {
        let e = simd.load_slice(column);
        block[i] = if LOG { simd.sub(e, norm) } else { simd.mul(e, norm) };
    }
    block
}
