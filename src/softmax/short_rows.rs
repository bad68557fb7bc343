//! Short rows, one in each lane: `LANES` rows are transposed, computed as neighbouring lines, and
//! transposed back.
//!
//! A row of its own fills its last vector in part, and adds up the lanes of its maximum and of its sum: 25 to 45 ns for each row
//! (Zen 3). Here no lane is idle. Transposing takes a quarter of the time of the exponentials.
//!
//! The bits are those of a row of its own, because the exponentials are added in the same order: see [`row_sums`].
#![forbid(unsafe_code)]

use super::line_states::{SMALL, visible};
use super::row_state::RowState;
use super::scale::{Formula, One, Scale, Scaling, with_formula};
use crate::simd::exp::{SCALED_ONE, exp_scaled};
use crate::simd::{Kernel, MAX_LANES, Simd};

/// The longest row that is transposed, or computed in registers. It is shorter than a run of additions in `exp_tile` of `row.rs`.
pub(super) const SHORT: usize = 128;

/// Vectors side by side in `exp_tile` of `row.rs`, each with a sum of its own.
pub(super) const PAIR: usize = 2;

/// Elements of `LANES` rows, transposed into columns.
fn group_len<S: Simd>(len: usize) -> usize {
    len.next_multiple_of(S::LANES) * S::LANES
}

/// Numbers of the scratch memory of `rows` rows of `len` elements. log_softmax keeps exponents beside exponentials.
pub(super) fn scratch_len<S: Simd>(rows: usize, len: usize, log: bool) -> usize {
    rows / S::LANES * group_len::<S>(len) * if log { 2 } else { 1 }
}

/// Rows, a multiple of `LANES` of them.
pub(super) struct ShortRows<'a> {
    pub(super) len: usize,
    /// Of [`scratch_len`].
    pub(super) scratch: &'a mut [f32],
    /// Gets the maximum and the sum of each row.
    pub(super) states: [&'a mut [f32]; 2],
    pub(super) upstream: Option<&'a [f32]>,
}

/// Computes the states of rows. If `finish`, `out` becomes their softmax times the `upstream` of each row, or log_softmax. The input is
/// `x`, or `out` without it.
///
/// Each pass is a part of its own, because only the second depends on the formula.
#[inline(always)]
pub(super) fn softmax<S: Simd>(
    simd: S,
    x: Option<&[f32]>,
    out: &mut [f32],
    rows: ShortRows<'_>,
    formula: Formula,
    finish: bool,
) {
    let ShortRows { len, scratch, states: [maxima, sums], upstream } = rows;
    let (columns, exps) = scratch.split_at_mut(scratch.len() / if formula.log { 2 } else { 1 });
    let next = [x.unwrap_or(out).as_ptr_range().end, out.as_ptr_range().end];
    simd.call(Load { x: x.unwrap_or(out), len, columns: &mut *columns, maxima: &mut *maxima, scale: formula.scale });
    with_formula!(formula, |scale: C, LOG| {
        let (columns, exps, maxima) = (&mut *columns, &mut *exps, &*maxima);
        simd.call(Exponentials::<C, LOG> { columns, exps, len, maxima, scale, next })
    });
    simd.call(Sums { exps: if formula.log { exps } else { &*columns }, len, sums: &mut *sums });
    if finish {
        simd.call(Finish { columns, len, out, maxima, sums, upstream, log: formula.log });
    }
}

/// [`load_columns`] of each group of rows.
struct Load<'a> {
    x: &'a [f32],
    len: usize,
    columns: &'a mut [f32],
    maxima: &'a mut [f32],
    scale: Scale,
}

impl Kernel for Load<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = self.scale;
        if scale.factor == 1.0 { self.run_with(simd, One) } else { self.run_with(simd, scale) }
    }
}

impl Load<'_> {
    #[inline(always)]
    fn run_with<S: Simd, C: Scaling>(self, simd: S, scale: C) {
        let Self { x, len, columns, maxima, .. } = self;
        let groups = columns.chunks_exact_mut(group_len::<S>(len)).zip(maxima.chunks_exact_mut(S::LANES));
        for (group, (columns, maxima)) in groups.enumerate() {
            let max = load_columns(simd, &x[group * S::LANES * len..], len, columns, scale);
            simd.store_slice(maxima, max);
        }
    }
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

/// Replaces columns by their exponentials in units of 1/`SCALED_ONE`. If `LOG`, the columns become the exponents, and `exps` gets the
/// exponentials. Prefetches as many numbers from each of `next`, which may be any addresses.
struct Exponentials<'a, C, const LOG: bool> {
    columns: &'a mut [f32],
    exps: &'a mut [f32],
    len: usize,
    maxima: &'a [f32],
    scale: C,
    next: [*const f32; 2],
}

impl<C: Scaling, const LOG: bool> Kernel for Exponentials<'_, C, LOG> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { columns, exps, len, maxima, scale, mut next } = self;
        let group_len = group_len::<S>(len);
        for (group, columns) in columns.chunks_exact_mut(group_len).enumerate() {
            let max = visible(simd, simd.load_slice(&maxima[group * S::LANES..]));
            // The last column may have no second one. A group has an even number of columns.
            for (pair, columns) in columns.chunks_exact_mut(2 * S::LANES).enumerate().take(len.div_ceil(2)) {
                for next in &mut next {
                    simd.prefetch_elements(*next, 2 * S::LANES);
                    *next = next.wrapping_add(2 * S::LANES);
                }
                let (mut t, mut e) = ([max; 2], [max; 2]);
                for v in 0..2 {
                    t[v] = scale.exponent(simd, simd.load_slice(&columns[v * S::LANES..]), max);
                    e[v] = exp_scaled(simd, t[v]);
                }
                for v in 0..2 {
                    simd.store_slice(&mut columns[v * S::LANES..], if LOG { t[v] } else { e[v] });
                    if LOG {
                        simd.store_slice(&mut exps[group * group_len + (2 * pair + v) * S::LANES..], e[v]);
                    }
                }
            }
        }
    }
}

/// [`row_sums`] of each group of rows.
struct Sums<'a> {
    exps: &'a [f32],
    len: usize,
    sums: &'a mut [f32],
}

impl Kernel for Sums<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { exps, len, sums } = self;
        for (exps, sums) in exps.chunks_exact(group_len::<S>(len)).zip(sums.chunks_exact_mut(S::LANES)) {
            let sum = row_sums(simd, &exps[..len * S::LANES]);
            simd.store_slice(sums, sum);
        }
    }
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

/// Turns the columns into the softmax of the rows times their `upstream`, or log_softmax.
struct Finish<'a> {
    columns: &'a mut [f32],
    len: usize,
    out: &'a mut [f32],
    maxima: &'a [f32],
    sums: &'a [f32],
    upstream: Option<&'a [f32]>,
    log: bool,
}

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { columns, len, out, maxima, sums, upstream, log } = self;
        let groups = columns.chunks_exact_mut(group_len::<S>(len)).zip(out.chunks_exact_mut(S::LANES * len));
        for (group, (columns, out)) in groups.enumerate() {
            let row = group * S::LANES;
            let (max, sum) = (simd.load_slice(&maxima[row..]), simd.load_slice(&sums[row..]));
            if log {
                store_rows::<S, true>(simd, columns, len, out, log_sums(simd, max, sum));
            } else {
                let upstream = match upstream {
                    Some(upstream) => simd.load_slice(&upstream[row..]),
                    None => simd.splat(1.0),
                };
                let norms = norms(simd, max, sum, upstream, columns);
                store_rows::<S, false>(simd, columns, len, out, norms);
            }
        }
    }
}

/// Finishes the columns and transposes them back into the first `LANES` rows of `out`.
#[inline(always)]
fn store_rows<S: Simd, const LOG: bool>(simd: S, columns: &[f32], len: usize, out: &mut [f32], norm: S::F32) {
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
