//! One row of neighbouring elements, along which vectors are loaded.
//!
//! ```text
//! for x in row { max = max(max, x) }                    fill       x    -> tile   (from memory)
//! for x in row { e = exp(scale*(x-max)); sum += e }     exp_tile   tile -> tile   (cache)
//! for x in row { out = e / sum }                        write      tile -> out    (to memory)
//! ```
//!
//! 1. The tile holds the exponentials e as f32 in the cache, so each is computed once, for the half types too. If the elements
//!    are f32 and the row is no longer than the tile, the output is the tile.
//! 2. A longer row is folded block by block into a [`RowState`]. Then `fill` and `exp_tile` run again for each block, with the
//!    maximum of the row, and the block is written. So x is read twice.
//! 3. `fill` processes four vectors at a time. `exp_tile` processes two, because an exponential is a chain of 30 to 50 cycles,
//!    and the processor alone overlaps too few chains. Four do not fit the registers.
//! 4. An output that no cache can hold is written past the caches (`stream`). Otherwise each of its cache lines would be read
//!    before it is overwritten: a third of all traffic. Such a row has a tile for f32, too.
//! 5. Division by the sum is multiplication by its inverse.
//! 6. `exp_tile` is arithmetic alone, so it prefetches the next row.
//! 7. Each of these passes is a [`Part`], compiled only for what it depends on: `exp_tile` for the formula, the others for the element type.
//!    A row of f32 that is no longer than the tile is one `Part`, because calls matter for short rows.
#![forbid(unsafe_code)]

use super::buffers::{Buffers, Stored};
use super::line_states::SMALL;
use super::row_state::RowState;
use super::scale::{Formula, One, Scale, Scaling, with_formula};
use crate::element::Element;
use crate::simd::exp::{SCALED_ONE, exp_scaled};
use crate::simd::{Kernel, LINE, Part, Simd, Streaming};
use std::ops::Range;

/// The longest block of a row, in elements: a tile of 64 KiB, which the second cache holds together with input and output.
pub(super) const ROW_TILE: usize = 16 * 1024;

/// Vectors side by side in `fill`.
const WIDE: usize = 4;

/// Vectors side by side in `exp_tile`.
pub(super) const PAIR: usize = 2;

/// Additions in a chain before the partial sum is added to the total. The error grows with the longest chain.
pub(super) const RUN: usize = 64;

/// Softmax of one row times `upstream`, or log_softmax, which ignores `upstream`. The tile is as long as the row or as a block
/// of it.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Stored>(
    simd: S,
    buffers: &mut Buffers<'_, T>,
    row: Range<usize>,
    tile: &mut [f32],
    formula: Formula,
    upstream: f32,
    stream: Option<&Streaming<S>>,
) -> RowState {
    if stream.is_none()
        && row.len() <= ROW_TILE
        && let Some((x, out)) = f32_row(buffers, row.clone())
    {
        return with_formula!(formula, |scale: C, LOG| simd.call(F32Row::<C, LOG> { x, out, scale, upstream }));
    }
    let block_len = tile.len();
    let blocks = row.clone().step_by(block_len).map(|at| at..row.end.min(at + block_len));
    let mut state = RowState::default();
    for block in blocks.clone() {
        let tile = &mut tile[..block.len()];
        let part = fold(simd, &buffers.input()[block], tile, formula);
        state = state.merge_scaled(part, formula.scale.scale);
    }
    let (first, norm) = if formula.log { (None, state.log_sum()) } else { norms_of(state, upstream) };
    for block in blocks {
        let tile = &mut tile[..block.len()];
        if block.len() < row.len() {
            let x = &buffers.input()[block.clone()];
            simd.call(Fill { x, tile, scale: formula.scale });
            exponentials(simd, x, tile, state.max, formula);
        }
        if let Some(first) = first {
            finish_in_place::<S, false>(simd, tile, first);
        }
        simd.call(Write { tile, out: &mut buffers.output()[block], norm, log: formula.log, stream });
    }
    state
}

/// The row's input, unless it is the output, and its output. `None` for other types than f32.
fn f32_row<'a, T: Stored>(
    buffers: &'a mut Buffers<'_, T>,
    row: Range<usize>,
) -> Option<(Option<&'a [f32]>, &'a mut [f32])> {
    match buffers {
        Buffers::InPlace(x) => Some((None, T::as_f32_mut(&mut x[row])?)),
        Buffers::Into { from, to } => Some((Some(T::as_f32(&from[row.clone()])?), T::as_f32_mut(&mut to[row])?)),
    }
}

/// Softmax of a row of f32 that is no longer than a tile: the output is the tile. Without `x`, it is the input, too.
struct F32Row<'a, C, const LOG: bool> {
    x: Option<&'a [f32]>,
    out: &'a mut [f32],
    scale: C,
    upstream: f32,
}

impl<C: Scaling, const LOG: bool> Kernel for F32Row<'_, C, LOG> {
    type Output = RowState;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> RowState {
        let Self { x, out, scale, upstream } = self;
        let next = x.unwrap_or(out).as_ptr_range().end;
        let max = match x {
            Some(x) => fill::<S, f32, C>(simd, x, out, scale),
            None => fill_in_place::<S, C>(simd, out, scale),
        };
        let state = RowState { max, sum: exp_tile::<S, f32, C, LOG>(simd, out, max, scale, next) };
        let (first, norm) = if LOG { (None, state.log_sum()) } else { norms_of(state, upstream) };
        if let Some(first) = first {
            finish_in_place::<S, false>(simd, out, first);
        }
        finish_in_place::<S, LOG>(simd, out, norm);
        state
    }
}

/// The state of `x`. The tile, of the same length, then holds the exponentials e, or their exponents for log_softmax.
#[inline(always)]
pub(super) fn fold<S: Simd, T: Element>(simd: S, x: &[T], tile: &mut [f32], formula: Formula) -> RowState {
    let max = simd.call(Fill { x, tile: &mut *tile, scale: formula.scale });
    RowState { max, sum: exponentials(simd, x, tile, max, formula) }
}

/// [`exp_tile`], with the elements that follow `x` in memory as the next ones.
#[inline(always)]
fn exponentials<S: Simd, T: Element>(simd: S, x: &[T], tile: &mut [f32], max: f32, formula: Formula) -> f32 {
    let next = x.as_ptr_range().end;
    with_formula!(formula, |scale: C, LOG| simd.call(ExpTile::<T, C, LOG> { tile, max, scale, next }))
}

/// [`exp_tile`] as a part.
struct ExpTile<'a, T, C, const LOG: bool> {
    tile: &'a mut [f32],
    max: f32,
    scale: C,
    next: *const T,
}

impl<T, C: Scaling, const LOG: bool> Kernel for ExpTile<'_, T, C, LOG> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        exp_tile::<S, T, C, LOG>(simd, self.tile, self.max, self.scale, self.next)
    }
}

/// [`fill`] as a part.
struct Fill<'a, T> {
    x: &'a [T],
    tile: &'a mut [f32],
    scale: Scale,
}

impl<T: Element> Kernel for Fill<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let Self { x, tile, scale } = self;
        if scale.factor == 1.0 { fill(simd, x, tile, One) } else { fill(simd, x, tile, scale) }
    }
}

/// The factor that makes a scaled exponential a probability.
pub(super) fn norm_of(state: RowState) -> f32 {
    state.inverse_sum() / SCALED_ONE
}

/// The factors that make a scaled exponential its share of `upstream`. There are two if one alone would be denormal, because it
/// would have lost bits.
fn norms_of(state: RowState, upstream: f32) -> (Option<f32>, f32) {
    let (norm, both) = (norm_of(state) * upstream, state.inverse_sum() * upstream);
    if norm.abs() < SMALL && both != 0.0 { (Some(1.0 / SCALED_ONE), both) } else { (None, norm) }
}

/// Widens x into the tile. Returns the maximum, or -inf without elements. NaN is ignored.
#[inline(always)]
fn fill<S: Simd, T: Element, C: Scaling>(simd: S, x: &[T], tile: &mut [f32], scale: C) -> f32 {
    let mut max = [simd.splat(f32::NEG_INFINITY); WIDE];
    let mut from = x.chunks_exact(WIDE * S::LANES);
    let mut to = tile.chunks_exact_mut(WIDE * S::LANES);
    for (x, tile) in from.by_ref().zip(to.by_ref()) {
        for i in 0..WIDE {
            let y = scale.apply_factor(simd, simd.load_elements(&x[i * S::LANES..]));
            simd.store_slice(&mut tile[i * S::LANES..], y);
            max[i] = simd.max(y, max[i]);
        }
    }
    for (x, tile) in from.remainder().chunks(S::LANES).zip(to.into_remainder().chunks_mut(S::LANES)) {
        let y = scale.apply_factor(simd, simd.load_elements_part(x, f32::NEG_INFINITY));
        simd.store_part(tile, y);
        max[0] = simd.max(y, max[0]);
    }
    simd.max_lane(simd.max(simd.max(max[0], max[1]), simd.max(max[2], max[3])))
}

/// [`fill`] if x is the tile.
#[inline(always)]
fn fill_in_place<S: Simd, C: Scaling>(simd: S, x: &mut [f32], scale: C) -> f32 {
    let mut max = [simd.splat(f32::NEG_INFINITY); WIDE];
    let mut chunks = x.chunks_exact_mut(WIDE * S::LANES);
    for x in chunks.by_ref() {
        for i in 0..WIDE {
            let y = scale.apply_factor(simd, simd.load_slice(&x[i * S::LANES..]));
            if !C::PLAIN {
                simd.store_slice(&mut x[i * S::LANES..], y);
            }
            max[i] = simd.max(y, max[i]);
        }
    }
    for x in chunks.into_remainder().chunks_mut(S::LANES) {
        let y = scale.apply_factor(simd, simd.load_part(x, f32::NEG_INFINITY));
        simd.store_part(x, y);
        max[0] = simd.max(y, max[0]);
    }
    simd.max_lane(simd.max(simd.max(max[0], max[1]), simd.max(max[2], max[3])))
}

/// Replaces y in the tile by e = exp(scale*(y - max)) in units of 1/`SCALED_ONE`, or by the exponent if `LOG`. Returns the sum
/// of the exponentials. Prefetches `tile.len()` elements from `next`, which may be any address.
#[inline(always)]
pub(super) fn exp_tile<S: Simd, T, C: Scaling, const LOG: bool>(
    simd: S,
    tile: &mut [f32],
    max: f32,
    scale: C,
    mut next: *const T,
) -> f32 {
    // Without a visible element any finite number will do. -inf will not, because -inf - -inf is NaN.
    let max = simd.splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
    let mut sum = [simd.zero(); PAIR];
    for run in tile.chunks_mut(RUN * PAIR * S::LANES) {
        let mut part = [simd.zero(); PAIR];
        let mut pairs = run.chunks_exact_mut(PAIR * S::LANES);
        for tile in pairs.by_ref() {
            simd.prefetch_elements(next, PAIR * S::LANES);
            next = next.wrapping_add(PAIR * S::LANES);
            let (mut t, mut e) = ([max; PAIR], [max; PAIR]);
            for i in 0..PAIR {
                t[i] = scale.exponent(simd, simd.load_slice(&tile[i * S::LANES..]), max);
                e[i] = exp_scaled(simd, t[i]);
            }
            // In a loop of their own: otherwise the compiler keeps the sums in memory (AVX2: 9.1 ns a pair instead of 6.8).
            for i in 0..PAIR {
                simd.store_slice(&mut tile[i * S::LANES..], if LOG { t[i] } else { e[i] });
                part[i] = simd.add(part[i], e[i]);
            }
        }
        for tile in pairs.into_remainder().chunks_mut(S::LANES) {
            let t = scale.exponent(simd, simd.load_part(tile, f32::NEG_INFINITY), max);
            let e = exp_scaled(simd, t);
            simd.store_part(tile, if LOG { t } else { e });
            part[0] = simd.add(part[0], e);
        }
        for i in 0..PAIR {
            sum[i] = simd.add(sum[i], part[i]);
        }
    }
    simd.sum(simd.add(sum[0], sum[1])) / SCALED_ONE
}

/// [`write`] as a part.
struct Write<'a, S: Simd, T> {
    tile: &'a [f32],
    out: &'a mut [T],
    norm: f32,
    log: bool,
    stream: Option<&'a Streaming<S>>,
}

impl<S: Simd, T: Element> Part<S> for Write<'_, S, T> {
    type Output = ();
    #[inline(always)]
    fn run(self, simd: S) {
        let Self { tile, out, norm, log, stream } = self;
        if log {
            write::<S, T, true>(simd, tile, out, norm, stream);
        } else {
            write::<S, T, false>(simd, tile, out, norm, stream);
        }
    }
}

/// out = e * norm, or t - norm if `LOG`. Whole cache lines are stored past the caches if `stream` is given.
#[inline(always)]
fn write<S: Simd, T: Element, const LOG: bool>(
    simd: S,
    tile: &[f32],
    out: &mut [T],
    norm: f32,
    stream: Option<&Streaming<S>>,
) {
    let norm = simd.splat(norm);
    let head = if stream.is_some() { out.as_ptr().align_offset(LINE).min(out.len()) } else { 0 };
    let (tile_head, tile) = tile.split_at(head);
    let (head, out) = out.split_at_mut(head);
    write_parts::<S, T, LOG>(simd, tile_head, head, norm);
    let whole = out.len() - out.len() % (2 * S::LANES);
    let (tile, tile_rest) = tile.split_at(whole);
    let (out, rest) = out.split_at_mut(whole);
    if stream.is_some() {
        write_pairs::<S, T, LOG>(simd, tile, out, norm, stream);
    } else {
        write_pairs::<S, T, LOG>(simd, tile, out, norm, None);
    }
    write_parts::<S, T, LOG>(simd, tile_rest, rest, norm);
}

#[inline(always)]
fn write_pairs<S: Simd, T: Element, const LOG: bool>(
    simd: S,
    tile: &[f32],
    out: &mut [T],
    norm: S::F32,
    stream: Option<&Streaming<S>>,
) {
    for (tile, out) in tile.chunks_exact(2 * S::LANES).zip(out.chunks_exact_mut(2 * S::LANES)) {
        let (a, b) = (simd.load_slice(tile), simd.load_slice(&tile[S::LANES..]));
        let pair = [finish::<S, LOG>(simd, a, norm), finish::<S, LOG>(simd, b, norm)];
        match stream {
            Some(stream) => stream.store_pair(out, pair),
            None => simd.store_pair(out, pair),
        }
    }
}

#[inline(always)]
fn write_parts<S: Simd, T: Element, const LOG: bool>(simd: S, tile: &[f32], out: &mut [T], norm: S::F32) {
    for (tile, out) in tile.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
        simd.store_elements_part(out, finish::<S, LOG>(simd, simd.load_part(tile, 0.0), norm));
    }
}

#[inline(always)]
fn finish<S: Simd, const LOG: bool>(simd: S, e: S::F32, norm: S::F32) -> S::F32 {
    if LOG { simd.sub(e, norm) } else { simd.mul(e, norm) }
}

/// [`write`] if out is the tile.
#[inline(always)]
pub(super) fn finish_in_place<S: Simd, const LOG: bool>(simd: S, tile: &mut [f32], norm: f32) {
    let norm = simd.splat(norm);
    let mut vectors = tile.chunks_exact_mut(S::LANES);
    for tile in vectors.by_ref() {
        simd.store_slice(tile, finish::<S, LOG>(simd, simd.load_slice(tile), norm));
    }
    let tile = vectors.into_remainder();
    simd.store_part(tile, finish::<S, LOG>(simd, simd.load_part(tile, 0.0), norm));
}
