//! One row of neighbouring elements, along which vectors are loaded.
//!
//! ```text
//! for x in row { max = max(max, x) }                    fill       x    -> tile   (from memory)
//! for x in row { e = exp(scale*(x-max)); sum += e }     exp_tile   tile -> tile   (cache)
//! for x in row { out = e / sum }                        write      tile -> out    (to memory)
//! ```
//!
//! 1. The tile holds the exponentials e as f32 in the cache, so each is computed once, for the half types too. If the elements
//!    are f32 and the row is no longer than a block, the output is the tile.
//! 2. A longer row is computed block by block. The exponentials of a block are relative to the maximum of the row so far, so no
//!    block waits for the maximum of the row. At the end, those of blocks before the maximum are multiplied by
//!    exp(scale*(maximum then - maximum)). If the whole tile would be too large for any cache, it holds one block, and the exponentials
//!    are computed twice.
//! 3. `fill` processes four vectors at a time. `exp_tile` processes two, because an exponential is a chain of 30 to 50 cycles,
//!    and the processor alone overlaps too few chains. Four do not fit the registers.
//! 4. An output that no cache can hold is written past the caches (`stream`). Otherwise each of its cache lines would be read
//!    before it is overwritten: a third of all traffic. Such a row has a tile for f32, too.
//! 5. Division by the sum is multiplication by its inverse.
//! 6. `exp_tile` is arithmetic alone, so it prefetches the next block or row.
//! 7. Each of these passes is a [`Part`], compiled only for what it depends on: `exp_tile` for the formula, the others for the element type.
//!    Neighbouring rows of f32 that are no longer than a block are one `Part`, because calls matter for short rows.
//! 8. Short rows share a tile, so that what depends on the element type is done for many rows at once, and so that whole cache lines
//!    are written past the caches. Rows of up to [`SHORT`] elements are computed in registers where a level has enough
//!    of them (`register_rows.rs`), and transposed elsewhere (`short_rows.rs`).
#![forbid(unsafe_code)]

use super::buffers::{Buffers, Stored};
use super::line_states::SMALL;
use super::register_rows::{self, RegisterRows};
use super::row_state::RowState;
use super::scale::{Formula, One, Scale, Scaling, with_formula};
use super::short_rows::{self, PAIR, SHORT, ShortRows};
use crate::element::Element;
use crate::simd::exp::{SCALED_ONE, exp_scaled};
use crate::simd::{Kernel, LINE, MAX_LANES, Part, Simd, Streaming};
use std::ops::Range;

/// The longest block of a row, in elements: a tile of 64 KiB, which the second cache holds together with input and output.
pub(super) const ROW_TILE: usize = 16 * 1024;

/// Vectors side by side in `fill`.
const WIDE: usize = 4;

/// Additions in a chain before the partial sum is added to the total. The error grows with the longest chain.
pub(super) const RUN: usize = 64;

/// The longest row that shares a tile with its neighbours.
const GROUPED: usize = 512;

/// Numbers of the tile of a group of rows. Tile, input and output fit the first cache.
const GROUP_TILE: usize = 2048;

/// The longest row whose exponentials are all kept: a tile of 4 MiB.
const MAX_KEPT: usize = 1 << 20;

/// Rows of one length, and what to compute of them.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) len: usize,
    pub(super) formula: Formula,
    /// Softmax of row r is multiplied by element r. log_softmax ignores it.
    pub(super) upstream: Option<&'a [f32]>,
}

impl Rows<'_> {
    /// Rows that are computed together, of `count`: a multiple of `unit` if there are enough.
    fn group(self, count: usize, unit: usize) -> usize {
        // Columns of rows of less than a vector are padded.
        let len = self.len.max(8);
        let most = if len <= GROUPED { (GROUP_TILE / len).next_multiple_of(unit) } else { 1 };
        most.min(count)
    }

    /// Numbers of the scratch memory of [`softmax`] for `count` rows that are streamed or not.
    pub(super) fn scratch<S: Simd, T: Stored>(self, count: usize, stream: bool) -> usize {
        let tile = match self.len {
            ..=ROW_TILE if T::IS_F32 && !stream => 0,
            ..=MAX_KEPT => self.len,
            _ => ROW_TILE,
        };
        if self.in_registers::<S, T>() {
            return Self::scratch_with(self.group(count, register_rows::STEP), tile);
        }
        let group = self.group(count, MAX_LANES);
        let blocks = if self.len > GROUPED { self.len.div_ceil(ROW_TILE) } else { 0 };
        Self::scratch_with(group, tile) + blocks + self.columns::<S>(group)
    }

    /// Numbers of the scratch memory of [`states`].
    pub(super) fn scratch_of_states<S: Simd>(self, count: usize) -> usize {
        let group = self.group(count, MAX_LANES);
        Self::scratch_with(group, self.len.min(ROW_TILE)) + self.columns::<S>(group)
    }

    /// Whether `register_rows` computes them.
    fn in_registers<S: Simd, T: Stored>(self) -> bool {
        register_rows::fits::<S, T>(self.len, self.formula, self.upstream)
    }

    /// Numbers for the states and the tiles of a group.
    fn scratch_with(group: usize, tile: usize) -> usize {
        if group > 1 { group * (2 + tile) } else { tile }
    }

    /// Numbers for the columns of a group; 0 if its rows are not transposed.
    fn columns<S: Simd>(self, group: usize) -> usize {
        if self.len <= SHORT { short_rows::scratch_len::<S>(group, self.len, self.formula.log) } else { 0 }
    }
}

/// Softmax of all rows of `buffers`. `visit` gets the number of each row and its state.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Stored>(
    simd: S,
    buffers: &mut Buffers<'_, T>,
    rows: Rows<'_>,
    scratch: &mut [f32],
    stream: Option<&Streaming<S>>,
    mut visit: impl FnMut(usize, RowState),
) {
    let Rows { len, formula, upstream } = rows;
    let count = buffers.input().len() / len;
    let in_registers = rows.in_registers::<S, T>();
    let group = rows.group(count, if in_registers { register_rows::STEP } else { MAX_LANES });
    // The output of f32 can be the tile.
    let direct = T::IS_F32 && stream.is_none();
    for first in (0..count).step_by(group) {
        let range = first * len..(first + group).min(count) * len;
        let upstream = upstream.map(|upstream| &upstream[first..][..range.len() / len]);
        if len > ROW_TILE || !direct && len > GROUPED {
            let upstream = upstream.map_or(1.0, |upstream| upstream[0]);
            visit(first, blocks(simd, buffers, range, scratch, formula, upstream, stream));
            continue;
        }
        let mut one = [0.0; 2];
        let columns = if in_registers { 0 } else { rows.columns::<S>(range.len() / len) };
        let (columns, rest) = scratch.split_at_mut(columns);
        let (tile, rest) = rest.split_at_mut(if direct { 0 } else { range.len() });
        let (maxima, sums) = states_of(range.len() / len, &mut one, rest);
        let states = [&mut *maxima, &mut *sums];
        if in_registers {
            let scale = formula.scale;
            if direct && let Some((x, out)) = f32_rows(buffers, range.clone()) {
                register_rows::softmax(simd, RegisterRows { x, out, len, states, scale });
            } else {
                let x = Some(&buffers.input()[range.clone()]);
                register_rows::softmax(simd, RegisterRows { x, out: &mut *tile, len, states, scale });
                simd.call(Write { tile, out: &mut buffers.output()[range], norm: 1.0, log: false, stream });
            }
            visit_rows(first, maxima, sums, &mut visit);
            continue;
        }
        let group = Group { len, columns, states, upstream, finish: true };
        if direct && let Some((x, out)) = f32_rows(buffers, range.clone()) {
            group_softmax(simd, x, out, group, formula);
        } else {
            let x = as_f32(simd, &buffers.input()[range.clone()], tile);
            group_softmax(simd, x, tile, group, formula);
            simd.call(Write { tile, out: &mut buffers.output()[range], norm: 1.0, log: false, stream });
        }
        visit_rows(first, maxima, sums, &mut visit);
    }
}

/// Hands the number and the state of each row of `x` to `visit`.
#[inline(always)]
pub(super) fn states<S: Simd, T: Stored>(
    simd: S,
    x: &[T],
    rows: Rows<'_>,
    scratch: &mut [f32],
    mut visit: impl FnMut(usize, RowState),
) {
    let Rows { len, formula, .. } = rows;
    let count = x.len() / len;
    let group = rows.group(count, MAX_LANES);
    for first in (0..count).step_by(group) {
        let x = &x[first * len..(first + group).min(count) * len];
        if len > GROUPED {
            let mut state = RowState::default();
            for x in x.chunks(ROW_TILE) {
                state = fold_after(simd, state, x, &mut scratch[..x.len()], formula);
            }
            visit(first, state);
            continue;
        }
        let mut one = [0.0; 2];
        let (columns, rest) = scratch.split_at_mut(rows.columns::<S>(x.len() / len));
        let (tile, rest) = rest.split_at_mut(x.len());
        let (maxima, sums) = states_of(x.len() / len, &mut one, rest);
        let states = [&mut *maxima, &mut *sums];
        let group = Group { len, columns, states, upstream: None, finish: false };
        let x = as_f32(simd, x, tile);
        group_softmax(simd, x, tile, group, formula);
        visit_rows(first, maxima, sums, &mut visit);
    }
}

/// Hands over the states of rows from `first` on.
#[inline(always)]
fn visit_rows(first: usize, maxima: &[f32], sums: &[f32], visit: &mut impl FnMut(usize, RowState)) {
    for (row, (&max, &sum)) in maxima.iter().zip(sums).enumerate() {
        visit(first + row, RowState { max, sum });
    }
}

/// Maxima and sums of `count` rows. One row needs no scratch memory.
fn states_of<'a>(count: usize, one: &'a mut [f32; 2], scratch: &'a mut [f32]) -> (&'a mut [f32], &'a mut [f32]) {
    if count == 1 {
        return one.split_at_mut(1);
    }
    scratch[..2 * count].split_at_mut(count)
}

/// `x` itself if it is f32. Otherwise the tile becomes x.
#[inline(always)]
fn as_f32<'a, S: Simd, T: Stored>(simd: S, x: &'a [T], tile: &mut [f32]) -> Option<&'a [f32]> {
    let same = T::as_f32(x);
    if same.is_none() {
        simd.call(Fill { x, tile, scale: Scale::new(1.0) });
    }
    same
}

/// The input of rows, unless it is the output, and their output. `None` for other types than f32.
fn f32_rows<'a, T: Stored>(
    buffers: &'a mut Buffers<'_, T>,
    rows: Range<usize>,
) -> Option<(Option<&'a [f32]>, &'a mut [f32])> {
    match buffers {
        Buffers::InPlace(x) => Some((None, T::as_f32_mut(&mut x[rows])?)),
        Buffers::Into { from, to } => Some((Some(T::as_f32(&from[rows.clone()])?), T::as_f32_mut(&mut to[rows])?)),
    }
}

/// Softmax of a row that is longer than a block, or has a tile of its own.
#[inline(always)]
fn blocks<S: Simd, T: Stored>(
    simd: S,
    buffers: &mut Buffers<'_, T>,
    row: Range<usize>,
    scratch: &mut [f32],
    formula: Formula,
    upstream: f32,
    stream: Option<&Streaming<S>>,
) -> RowState {
    let keeps_all = row.len() <= MAX_KEPT;
    let (tile, maxima) = scratch.split_at_mut(if keeps_all { row.len() } else { ROW_TILE });
    let maxima = &mut maxima[..row.len().div_ceil(ROW_TILE)];
    let block = |b: usize| b * ROW_TILE..row.len().min((b + 1) * ROW_TILE);
    let mut state = RowState::default();
    for (b, max) in maxima.iter_mut().enumerate() {
        let (x, part) = (&buffers.input()[row.clone()][block(b)], tile_of(tile, block(b), keeps_all));
        state = fold_after(simd, state, x, part, formula);
        *max = state.max;
    }
    for (b, &max) in maxima.iter().enumerate() {
        let part = tile_of(tile, block(b), keeps_all);
        if !keeps_all {
            let x = &buffers.input()[row.clone()][block(b)];
            simd.call(Fill { x, tile: &mut *part, scale: formula.scale });
            exponentials(simd, x, part, max, formula);
        }
        let norm = scale_block(simd, part, max, state, formula, upstream);
        let out = &mut buffers.output()[row.clone()][block(b)];
        simd.call(Write { tile: part, out, norm, log: formula.log, stream });
    }
    state
}

/// Softmax of a row of no more than [`ROW_TILE`] elements, after [`Fill`] or [`FillVisible`]. Prefetches `tile.len()` elements from `next`.
#[inline(always)]
pub(super) fn softmax_of_filled<S: Simd, T: Element>(
    simd: S,
    (tile, max): (&mut [f32], f32),
    next: *const T,
    out: &mut [T],
    formula: Formula,
    stream: Option<&Streaming<S>>,
) {
    let sum = with_formula!(formula, |scale: C, LOG| {
        simd.call(ExpTile::<T, C, LOG> { tile: &mut *tile, max, scale, next })
    });
    let state = RowState { max, sum };
    let norm = if formula.log { state.log_sum() } else { norm_of(state) };
    simd.call(Write { tile, out, norm, log: formula.log, stream });
}

/// Where the exponentials of a block are.
fn tile_of(tile: &mut [f32], block: Range<usize>, keeps_all: bool) -> &mut [f32] {
    if keeps_all { &mut tile[block] } else { &mut tile[..block.len()] }
}

/// Makes the exponentials of a block relative to the maximum of the row. Returns the number by which [`write`] makes them
/// probabilities, or logarithms of them.
#[inline(always)]
fn scale_block<S: Simd>(simd: S, tile: &mut [f32], max: f32, state: RowState, formula: Formula, upstream: f32) -> f32 {
    /// Above it, the product of all factors is not denormal, and loses no bits.
    const NEAR: f32 = f32::from_bits((127 - 50) << 23);
    if formula.log {
        return state.log_sum() - share(simd, max, state.max, formula);
    }
    let mut unit = 1.0 / SCALED_ONE;
    if max < state.max {
        let share = share(simd, max, state.max, formula);
        let norm = share * unit * unit * state.inverse_sum() * upstream;
        if share * unit >= NEAR && norm.abs() >= NEAR {
            return norm;
        }
        finish_in_place::<S, false>(simd, tile, share);
        unit *= unit;
    }
    let (first, norm) = norms_of(state, unit, upstream);
    if let Some(first) = first {
        finish_in_place::<S, false>(simd, tile, first);
    }
    norm
}

/// exp(scale*(max - row_max)) in units of 1/`SCALED_ONE`, or its exponent for log_softmax.
#[inline(always)]
fn share<S: Simd>(simd: S, max: f32, row_max: f32, formula: Formula) -> f32 {
    let mut one = [max];
    exponentials(simd, &[0.0f32; 0], &mut one, row_max, formula);
    one[0]
}

/// Neighbouring rows of f32.
struct Group<'a> {
    len: usize,
    /// Scratch memory of `short_rows`; empty if the rows are not transposed.
    columns: &'a mut [f32],
    /// Gets the maximum and the sum of each row.
    states: [&'a mut [f32]; 2],
    upstream: Option<&'a [f32]>,
    /// Whether the rows become their softmax.
    finish: bool,
}

/// Softmax of rows of f32 that are no longer than a block: the output is the tile. Without `x`, it is the input, too.
#[inline(always)]
fn group_softmax<S: Simd>(simd: S, x: Option<&[f32]>, out: &mut [f32], group: Group<'_>, formula: Formula) {
    let Group { len, columns: scratch, states: [maxima, sums], upstream, finish } = group;
    let transposed = if scratch.is_empty() { 0 } else { maxima.len() - maxima.len() % S::LANES };
    let (short_maxima, maxima) = maxima.split_at_mut(transposed);
    let (short_sums, sums) = sums.split_at_mut(transposed);
    let (short_x, x) = (x.map(|x| &x[..transposed * len]), x.map(|x| &x[transposed * len..]));
    let (short_out, out) = out.split_at_mut(transposed * len);
    if transposed > 0 {
        let upstream = upstream.map(|upstream| &upstream[..transposed]);
        let rows = ShortRows { len, scratch, states: [short_maxima, short_sums], upstream };
        short_rows::softmax(simd, short_x, short_out, rows, formula, finish);
    }
    if !maxima.is_empty() {
        let upstream = upstream.map(|upstream| &upstream[transposed..]);
        with_formula!(formula, |scale: C, LOG| {
            let states = [&mut *maxima, &mut *sums];
            simd.call(F32Rows::<C, LOG> { x, out: &mut *out, len, states, upstream, finish, scale })
        });
    }
}

/// Softmax of rows of f32, one after the other.
struct F32Rows<'a, C, const LOG: bool> {
    x: Option<&'a [f32]>,
    out: &'a mut [f32],
    len: usize,
    states: [&'a mut [f32]; 2],
    upstream: Option<&'a [f32]>,
    finish: bool,
    scale: C,
}

impl<C: Scaling, const LOG: bool> Kernel for F32Rows<'_, C, LOG> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, out, len, states: [maxima, sums], upstream, finish, scale } = self;
        for row in 0..maxima.len() {
            let (x, out) = (from_row(x, row * len), &mut out[row * len..][..len]);
            let upstream = upstream.map_or(1.0, |upstream| upstream[row]);
            let state = f32_row::<S, C, LOG>(simd, x, out, scale, upstream, finish);
            (maxima[row], sums[row]) = (state.max, state.sum);
        }
    }
}

/// The input from an index on.
#[inline(always)]
fn from_row(x: Option<&[f32]>, at: usize) -> Option<&[f32]> {
    match x {
        Some(x) => Some(&x[at..]),
        None => None,
    }
}

/// The state of a row. If `finish`, `out` becomes its softmax.
#[inline(always)]
fn f32_row<S: Simd, C: Scaling, const LOG: bool>(
    simd: S,
    x: Option<&[f32]>,
    out: &mut [f32],
    scale: C,
    upstream: f32,
    finish: bool,
) -> RowState {
    let next = x.unwrap_or(out).as_ptr().wrapping_add(out.len());
    let max = match x {
        Some(x) => fill::<S, f32, C>(simd, &x[..out.len()], out, scale),
        None => fill_in_place::<S, C>(simd, out, scale),
    };
    let state = RowState { max, sum: exp_tile::<S, f32, C, LOG>(simd, out, max, scale, next) };
    if finish {
        let (first, norm) = if LOG { (None, state.log_sum()) } else { norms_of(state, 1.0 / SCALED_ONE, upstream) };
        if let Some(first) = first {
            finish_in_place::<S, false>(simd, out, first);
        }
        finish_in_place::<S, LOG>(simd, out, norm);
    }
    state
}

/// The state of a row after another block. The tile, of the same length, then holds the exponentials e relative to the new
/// maximum, or their exponents for log_softmax.
#[inline(always)]
fn fold_after<S: Simd, T: Element>(simd: S, state: RowState, x: &[T], tile: &mut [f32], formula: Formula) -> RowState {
    let max = state.max.max(simd.call(Fill { x, tile: &mut *tile, scale: formula.scale }));
    let part = RowState { max, sum: exponentials(simd, x, tile, max, formula) };
    state.merge_scaled(part, formula.scale.scale)
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
pub(super) struct Fill<'a, T> {
    pub(super) x: &'a [T],
    pub(super) tile: &'a mut [f32],
    pub(super) scale: Scale,
}

impl<T: Element> Kernel for Fill<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let Self { x, tile, scale } = self;
        if scale.factor == 1.0 { fill(simd, x, tile, One) } else { fill(simd, x, tile, scale) }
    }
}

/// [`Fill`] of a row of which only some elements are visible: bytes other than 0. The others are -inf.
pub(super) struct FillVisible<'a, T> {
    pub(super) x: &'a [T],
    pub(super) visible: &'a [u8],
    pub(super) tile: &'a mut [f32],
    pub(super) scale: Scale,
}

impl<T: Element> Kernel for FillVisible<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let scale = self.scale;
        if scale.factor == 1.0 { self.run_with(simd, One) } else { self.run_with(simd, scale) }
    }
}

impl<T: Element> FillVisible<'_, T> {
    #[inline(always)]
    fn run_with<S: Simd, C: Scaling>(self, simd: S, scale: C) -> f32 {
        let Self { x, visible, tile, .. } = self;
        assert!(x.len() == tile.len() && visible.len() == tile.len());
        // The next row of a dense mask.
        let (step, ahead) = (WIDE * S::LANES, visible.len());
        let hidden = simd.splat(f32::NEG_INFINITY);
        let mut max = [hidden; WIDE];
        let (mut from, mut sees) = (x.chunks_exact(step), visible.chunks_exact(step));
        let mut to = tile.chunks_exact_mut(step);
        for ((x, visible), tile) in from.by_ref().zip(sees.by_ref()).zip(to.by_ref()) {
            simd.prefetch_elements(visible.as_ptr().wrapping_add(ahead), step);
            for i in 0..WIDE {
                let y = scale.apply_factor(simd, simd.load_elements(&x[i * S::LANES..]));
                let y = simd.select(simd.load_mask_slice(&visible[i * S::LANES..]), y, hidden);
                simd.store_slice(&mut tile[i * S::LANES..], y);
                max[i] = simd.max(y, max[i]);
            }
        }
        let rest = from.remainder().chunks(S::LANES).zip(sees.remainder().chunks(S::LANES));
        for ((x, visible), tile) in rest.zip(to.into_remainder().chunks_mut(S::LANES)) {
            let y = scale.apply_factor(simd, simd.load_elements_part(x, f32::NEG_INFINITY));
            let y = simd.select(simd.load_mask_part(visible), y, hidden);
            simd.store_part(tile, y);
            max[0] = simd.max(y, max[0]);
        }
        simd.max_lane(simd.max(simd.max(max[0], max[1]), simd.max(max[2], max[3])))
    }
}

/// The factor that makes a scaled exponential a probability.
pub(super) fn norm_of(state: RowState) -> f32 {
    state.inverse_sum() / SCALED_ONE
}

/// The factors that make exponentials in units of 1/`unit` shares of `upstream`. There are two if one alone would be denormal,
/// because it would have lost bits.
fn norms_of(state: RowState, unit: f32, upstream: f32) -> (Option<f32>, f32) {
    let (norm, both) = (state.inverse_sum() * unit * upstream, state.inverse_sum() * upstream);
    if norm.abs() < SMALL && both != 0.0 { (Some(unit), both) } else { (None, norm) }
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
