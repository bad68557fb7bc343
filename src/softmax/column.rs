//! Any axis but the last: lanes run across neighbouring lines, so that nothing is ever transposed.
//!
//! ```text
//! for block of rows { for x in block { max = max(max, x) }                      fill     x    -> tile
//!                     for x in block { e = exp(scale*(x-max)); sum += e } }     weigh    tile -> tile
//! top = max(max of blocks)
//! total = sum(exp(scale*(max-top)) * sum of blocks)                             total
//! for block of rows { factor = exp(scale*(max-top)) / total                     factors
//!                     for e in block { out = e * factor } }                     write    tile -> out
//! ```
//!
//! 1. The array is read once and written once, in panels: of each row, as much as memory likes to give at a time. While
//!    the arithmetic is at one block of rows, the next is asked for, row by row.
//! 2. A panel is worked on in strips of a few vectors. A block of a strip stays in the first cache.
//! 3. Weights are counted from the maximum of their own block, so that none has to wait for the maximum of the line. They
//!    lie dense in the tile, where lines of the array itself, a power of two apart, would push each other out of the
//!    cache. Where the tile would be too large for any cache, it holds one block, and weights are computed again.
//! 4. An output that no cache can hold is written past them, in whole cache lines, if those of all rows lie alike.
#![forbid(unsafe_code)]

use super::buffers::Buffers;
use super::row::PAIR;
use super::scale::{Scale, Scaling};
use super::state::RowState;
use crate::element::Element;
use crate::simd::exp::{WEIGHT_ONE, exp_weight};
use crate::simd::{LINE, MAX_LANES, Simd, Streaming};

/// Neighbouring lines: element i of them starts at `first + i * stride`.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) first: usize,
    pub(super) stride: usize,
    pub(super) len: usize,
    /// Lines side by side: `V * LANES`, or for a strip of one vector, less.
    pub(super) width: usize,
}

/// Vectors side by side in a wide strip: two cache lines of f32, one of a half type. A block of it is 8 KiB.
pub(super) const WIDE: usize = 4;

/// Rows of a block. Additions in a chain grow with it, states of blocks shrink. (With a power of two as the length of a
/// row, those of two blocks still fit the second cache beside each other: it has few places for such addresses.)
const BLOCK: usize = 32;

/// Numbers of the tile by which its lines are asked for before they are written: half a block of a strip.
const TILE_LEAD: usize = 1024;

/// Rows by which memory has a lead where a strip is written and nothing else: the processor can't guess the next.
const LEAD: usize = 16;

/// Vectors side by side where maxima are all that registers hold: rows are read further along.
const WIDEST: usize = 16;

/// Runs `$body` with `$v` as the number of vectors of a strip: only wide ones have more than one.
macro_rules! with_vectors {
    ($strip:expr, $s:ty, $v:ident => $body:expr) => {
        if $strip.width == WIDE * <$s>::LANES {
            const $v: usize = WIDE;
            $body
        } else {
            const $v: usize = 1;
            $body
        }
    };
}

/// Neighbouring strips. The first ones cover `head` lines; a wide one can start behind them.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub(super) lines: Strip,
    pub(super) head: usize,
}

impl Panel {
    /// Every strip, with its place in a row of states.
    #[inline(always)]
    pub(super) fn strips<S: Simd>(self) -> Strips {
        Strips { panel: self, lanes: S::LANES, widest: WIDE, column: 0, place: 0 }
    }

    /// The same, as many vectors side by side as there are registers for maxima.
    #[inline(always)]
    fn peaks<S: Simd>(self) -> Strips {
        Strips { widest: if S::REGISTERS > WIDEST { WIDEST } else { WIDE }, ..self.strips::<S>() }
    }

    /// Pieces of [`BLOCK`] rows.
    #[inline(always)]
    fn blocks(self) -> impl Iterator<Item = Self> {
        let Strip { first, stride, len, width } = self.lines;
        (0..len).step_by(BLOCK).map(move |i| Self {
            lines: Strip { first: first + i * stride, stride, len: BLOCK.min(len - i), width },
            head: self.head,
        })
    }
}

pub(super) struct Strips {
    panel: Panel,
    lanes: usize,
    widest: usize,
    column: usize,
    place: usize,
}

impl Iterator for Strips {
    type Item = (usize, Strip);
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (lines, column, place) = (self.panel.lines, self.column, self.place);
        let left = lines.width - column;
        if left == 0 {
            return None;
        }
        let width = if column < self.panel.head {
            (self.panel.head - column).min(self.lanes)
        } else {
            let fits = |vectors: &usize| vectors * self.lanes <= left;
            [self.widest, WIDE].into_iter().find(fits).map_or(left.min(self.lanes), |vectors| vectors * self.lanes)
        };
        self.column += width;
        self.place += width.next_multiple_of(self.lanes);
        Some((place, Strip { first: lines.first + column, width, ..lines }))
    }
}

/// What is remembered of a panel: weights, and of each block the states of all lines, a row of them.
pub(super) struct Scratch<'a> {
    tile: &'a mut [f32],
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    /// Lines of a panel, with what fills up its vectors.
    width: usize,
    /// Whether the tile holds all blocks.
    keeps: bool,
}

impl<'a> Scratch<'a> {
    /// Numbers that [`new`](Self::new) needs for panels of so many lines of this length, `head` among them.
    pub(super) fn len<S: Simd>((lines, head): (usize, usize), len: usize, keeps: bool) -> usize {
        let rows = if keeps { len } else { len.min(BLOCK) };
        (rows + 2 * len.div_ceil(BLOCK)) * Self::width::<S>(lines, head)
    }

    pub(super) fn new<S: Simd>(room: &'a mut [f32], (lines, head): (usize, usize), len: usize, keeps: bool) -> Self {
        let width = Self::width::<S>(lines, head);
        let (states, tile) = room.split_at_mut(2 * len.div_ceil(BLOCK) * width);
        let (maxima, sums) = states.split_at_mut(states.len() / 2);
        Self { tile, maxima, sums, width, keeps }
    }

    /// The strips at both ends may be narrower than their vectors.
    fn width<S: Simd>(lines: usize, head: usize) -> usize {
        head.next_multiple_of(S::LANES) + (lines - head.min(lines)).next_multiple_of(S::LANES)
    }

    /// Where the weights of a strip lie: `rows` rows of `width` in block number `block`.
    #[inline(always)]
    fn weights(&mut self, (block, place): (usize, usize), rows: usize, width: usize) -> &mut [f32] {
        let start = if self.keeps { block * BLOCK * self.width } else { 0 };
        &mut self.tile[start + place * rows..][..rows * width]
    }
}

/// The [`RowState`]s of the lines of a strip, sums in units of 1/`WEIGHT_ONE`^2.
#[derive(Clone, Copy)]
pub(super) struct States<S: Simd, const V: usize> {
    max: [S::F32; V],
    sum: [S::F32; V],
}

/// 1/`WEIGHT_ONE`^2.
const STATE_UNIT: f32 = 1.0 / WEIGHT_ONE / WEIGHT_ONE;

impl<S: Simd, const V: usize> States<S, V> {
    /// The states one by one.
    #[inline(always)]
    pub(super) fn each(&self, simd: S, mut visit: impl FnMut(usize, RowState)) {
        for v in 0..V {
            let (mut max, mut sum) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
            simd.store_slice(&mut max, self.max[v]);
            simd.store_slice(&mut sum, simd.mul(self.sum[v], simd.splat(STATE_UNIT)));
            for lane in 0..S::LANES {
                visit(v * S::LANES + lane, RowState { max: max[lane], sum: sum[lane] });
            }
        }
    }

    /// What the factors need of each line: see [`RowState::log_sum`] and [`RowState::inverse_sum`].
    #[inline(always)]
    fn norms<const LOG: bool>(&self, simd: S) -> [S::F32; V] {
        let mut norms = [simd.zero(); V];
        if LOG {
            let mut logs = [[0.0; MAX_LANES]; V];
            self.each(simd, |line, state| logs[line / S::LANES][line % S::LANES] = state.log_sum());
            for (norm, logs) in norms.iter_mut().zip(&logs) {
                *norm = simd.load_slice(logs);
            }
            return norms;
        }
        for (norm, (max, sum)) in norms.iter_mut().zip(self.max.into_iter().zip(self.sum)) {
            let (none, sum) = (simd.eq(max, simd.splat(f32::NEG_INFINITY)), simd.mul(sum, simd.splat(STATE_UNIT)));
            *norm = simd.select(none, sum, simd.div(simd.splat(1.0), sum));
        }
        norms
    }
}

/// Softmax of the lines of a panel, times the gain of each, or its logarithm where `LOG`.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Element, C: Scaling, const LOG: bool>(
    simd: S,
    buffers: &mut Buffers<'_, T>,
    panel: Panel,
    scratch: &mut Scratch<'_>,
    scale: C,
    gains: Option<&[f32]>,
    stream: Option<&Streaming<S>>,
) {
    fold::<S, T, C, LOG>(simd, buffers.input(), panel, scratch, scale);
    for (place, strip) in panel.strips::<S>() {
        let gains = gains.map(|gains| &gains[strip.first - panel.lines.first..][..strip.width]);
        with_vectors!(strip, S, V => factors::<S, C, V, LOG>(simd, scratch, place, scale, gains));
    }
    for (b, block) in panel.blocks().enumerate() {
        for (place, strip) in block.strips::<S>() {
            with_vectors!(strip, S, V => {
                if !scratch.keeps {
                    let (x, tile) = (buffers.input(), scratch.weights((b, place), strip.len, V * S::LANES));
                    let max = peak::<S, T, C, V>(simd, x, strip, scale);
                    weigh::<S, T, C, V, LOG>(simd, x, strip, tile, max, scale, &mut Ahead::of(x, strip));
                }
                write::<S, T, V, LOG>(simd, scratch, (b, place), buffers.output(), strip, stream)
            });
        }
    }
}

/// The states of the lines of a panel, handed to `visit` with their number in it.
#[inline(always)]
pub(super) fn states<S: Simd, T: Element>(
    simd: S,
    x: &[T],
    panel: Panel,
    scratch: &mut Scratch<'_>,
    scale: Scale,
    mut visit: impl FnMut(usize, RowState),
) {
    fold::<S, T, Scale, true>(simd, x, panel, scratch, scale);
    for (place, strip) in panel.strips::<S>() {
        let visit = |i, state| {
            if i < strip.width {
                visit(strip.first - panel.lines.first + i, state)
            }
        };
        with_vectors!(strip, S, V => total::<S, Scale, V, true>(simd, scratch, place, scale).each(simd, visit));
    }
}

/// States of all blocks, and weights of as many as the tile holds.
#[inline(always)]
fn fold<S: Simd, T: Element, C: Scaling, const LOG: bool>(
    simd: S,
    x: &[T],
    panel: Panel,
    scratch: &mut Scratch<'_>,
    scale: C,
) {
    for (b, block) in panel.blocks().enumerate() {
        let row = b * scratch.width..(b + 1) * scratch.width;
        for (place, strip) in block.peaks::<S>() {
            let maxima = &mut scratch.maxima[row.clone()][place..];
            if strip.width == WIDEST * S::LANES {
                put(simd, maxima, peak::<S, T, C, WIDEST>(simd, x, strip, scale));
            } else {
                with_vectors!(strip, S, V => put(simd, maxima, peak::<S, T, C, V>(simd, x, strip, scale)));
            }
        }
        let mut ahead = Ahead::of(x, block.lines);
        for (place, strip) in block.strips::<S>() {
            with_vectors!(strip, S, V => {
                let max = get::<S, V>(simd, &scratch.maxima[row.clone()][place..]);
                let tile = scratch.weights((b, place), strip.len, V * S::LANES);
                let sum = weigh::<S, T, C, V, LOG>(simd, x, strip, tile, max, scale, &mut ahead);
                put(simd, &mut scratch.sums[row.clone()][place..], sum);
            });
        }
    }
}

/// The next block of a panel, asked for a little at a time, row by row.
struct Ahead<T> {
    row: *const T,
    column: usize,
    stride: usize,
    width: usize,
}

impl<T> Ahead<T> {
    /// Behind the last block it is the first of the next panel.
    fn of(x: &[T], block: Strip) -> Self {
        let Strip { first, stride, len, width } = block;
        Self { row: x.as_ptr().wrapping_add(first + len * stride), column: 0, stride, width }
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S, elements: usize) {
        for at in (0..elements).step_by(LINE / size_of::<T>()) {
            simd.prefetch(self.row.wrapping_add(self.column + at));
        }
        self.column += elements;
        if self.column >= self.width {
            (self.row, self.column) = (self.row.wrapping_add(self.stride), 0);
        }
    }
}

/// The maximum, or 0 where nothing is visible: -inf - -inf is NaN.
#[inline(always)]
fn visible<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.select(simd.eq(max, simd.splat(f32::NEG_INFINITY)), simd.zero(), max)
}

/// The maximum of each line, -inf where there is none, past NaN.
#[inline(always)]
fn peak<S: Simd, T: Element, C: Scaling, const V: usize>(simd: S, x: &[T], strip: Strip, scale: C) -> [S::F32; V] {
    let mut max = [simd.splat(f32::NEG_INFINITY); V];
    for i in 0..strip.len {
        let x = load::<S, T, V>(simd, &x[strip.first + i * strip.stride..][..strip.width]);
        for v in 0..V {
            max[v] = simd.max(scale.adjust(simd, x[v]), max[v]);
        }
    }
    max
}

/// Puts weights exp(scale*(y - max)) in units of 1/`WEIGHT_ONE` into the tile, or their exponents where `LOG`; gives the
/// sums of exp.
#[inline(always)]
fn weigh<S: Simd, T: Element, C: Scaling, const V: usize, const LOG: bool>(
    simd: S,
    x: &[T],
    strip: Strip,
    tile: &mut [f32],
    mut max: [S::F32; V],
    scale: C,
    ahead: &mut Ahead<T>,
) -> [S::F32; V] {
    for max in &mut max {
        *max = visible(simd, *max);
    }
    let mut sum = [simd.zero(); V];
    // A pair of vectors at a time: see `row`.
    for first in (0..V).step_by(PAIR) {
        let pair = PAIR.min(V);
        for (i, tile) in tile.chunks_exact_mut(V * S::LANES).enumerate() {
            ahead.ask(simd, PAIR * S::LANES);
            let x = &x[strip.first + i * strip.stride..][..strip.width];
            let tile = &mut tile[first * S::LANES..][..pair * S::LANES];
            for v in 0..pair {
                // Where it goes is not in the first cache, or no longer.
                simd.prefetch_near(tile.as_ptr().wrapping_add(TILE_LEAD + v * S::LANES));
                let x =
                    if V == 1 { load::<S, T, 1>(simd, x)[0] } else { simd.load_elements(&x[(first + v) * S::LANES..]) };
                let y = scale.adjust(simd, x);
                let t = scale.exponent(simd, y, max[first + v]);
                let e = exp_weight(simd, t);
                simd.store_slice(&mut tile[v * S::LANES..], if LOG { t } else { e });
                sum[first + v] = simd.add(sum[first + v], e);
            }
        }
    }
    sum
}

/// From the states of the blocks to those of the lines. Maxima then are weights of blocks, or their exponents where `LOG`.
#[inline(always)]
fn total<S: Simd, C: Scaling, const V: usize, const LOG: bool>(
    simd: S,
    scratch: &mut Scratch<'_>,
    place: usize,
    scale: C,
) -> States<S, V> {
    let mut max = [simd.splat(f32::NEG_INFINITY); V];
    for maxima in scratch.maxima.chunks_exact(scratch.width) {
        for v in 0..V {
            max[v] = simd.max(simd.load_slice(&maxima[place + v * S::LANES..]), max[v]);
        }
    }
    let mut sum = [simd.zero(); V];
    // Runs keep the chain of additions short.
    let run = BLOCK * scratch.width;
    for (maxima, sums) in scratch.maxima.chunks_mut(run).zip(scratch.sums.chunks(run)) {
        let mut part = [simd.zero(); V];
        for (maxima, sums) in maxima.chunks_exact_mut(scratch.width).zip(sums.chunks_exact(scratch.width)) {
            for v in 0..V {
                let at = place + v * S::LANES;
                let t = scale.exponent(simd, simd.load_slice(&maxima[at..]), visible(simd, max[v]));
                let share = exp_weight(simd, t);
                simd.store_slice(&mut maxima[at..], if LOG { t } else { share });
                part[v] = simd.mul_add(simd.load_slice(&sums[at..]), share, part[v]);
            }
        }
        for v in 0..V {
            sum[v] = simd.add(sum[v], part[v]);
        }
    }
    States { max, sum }
}

/// Below this, a factor needs a second one: denormal, it would be short of bits that the weights, up to 2^24 times as large
/// where they belong, would show.
const SMALL: f32 = f32::from_bits((127 - 100) << 23);

/// Turns the states of blocks into what makes their weights probabilities: two factors, of which the second is nearly
/// always 1. Of logarithms it is a number to add.
#[inline(always)]
fn factors<S: Simd, C: Scaling, const V: usize, const LOG: bool>(
    simd: S,
    scratch: &mut Scratch<'_>,
    place: usize,
    scale: C,
    gains: Option<&[f32]>,
) {
    let states = total::<S, C, V, LOG>(simd, scratch, place, scale);
    let mut norms = states.norms::<LOG>(simd);
    if let Some(gains) = gains {
        let gains = load::<S, f32, V>(simd, gains);
        for v in 0..V {
            norms[v] = simd.mul(norms[v], gains[v]);
        }
    }
    let width = scratch.width;
    for (maxima, sums) in scratch.maxima.chunks_exact_mut(width).zip(scratch.sums.chunks_exact_mut(width)) {
        for (v, &norm) in norms.iter().enumerate() {
            let at = place + v * S::LANES;
            let (share, unit) = (simd.load_slice(&maxima[at..]), simd.splat(STATE_UNIT));
            if LOG {
                simd.store_slice(&mut maxima[at..], simd.sub(share, norm));
                continue;
            }
            // (A block of hidden elements has the share 0, which needs none; gains may be negative.)
            let product = simd.mul(simd.mul(share, unit), norm);
            let size = simd.max(product, simd.sub(simd.zero(), product));
            let small = simd.and(simd.lt(simd.zero(), share), simd.lt(size, simd.splat(SMALL)));
            simd.store_slice(&mut maxima[at..], simd.select(small, simd.mul(share, norm), product));
            simd.store_slice(&mut sums[at..], simd.select(small, unit, simd.splat(1.0)));
        }
    }
}

#[inline(always)]
fn write<S: Simd, T: Element, const V: usize, const LOG: bool>(
    simd: S,
    scratch: &mut Scratch<'_>,
    (block, place): (usize, usize),
    out: &mut [T],
    strip: Strip,
    stream: Option<&Streaming<S>>,
) {
    let at = block * scratch.width + place;
    let (factors, seconds) = (get::<S, V>(simd, &scratch.maxima[at..]), get::<S, V>(simd, &scratch.sums[at..]));
    let mut twice = false;
    for second in seconds {
        twice |= !LOG && simd.any(simd.lt(second, simd.splat(1.0)));
    }
    let tile = scratch.weights((block, place), strip.len, V * S::LANES);
    if twice {
        write_rows::<S, T, V, LOG, true>(simd, tile, out, strip, [factors, seconds], stream);
    } else {
        write_rows::<S, T, V, LOG, false>(simd, tile, out, strip, [factors, seconds], stream);
    }
}

/// `TWICE` says whether any of the second factors is not 1: a line's bits don't depend on it.
#[inline(always)]
fn write_rows<S: Simd, T: Element, const V: usize, const LOG: bool, const TWICE: bool>(
    simd: S,
    tile: &[f32],
    out: &mut [T],
    strip: Strip,
    [factors, seconds]: [[S::F32; V]; 2],
    stream: Option<&Streaming<S>>,
) {
    for (i, tile) in tile.chunks_exact(V * S::LANES).enumerate() {
        let out = &mut out[strip.first + i * strip.stride..][..strip.width];
        if stream.is_none() {
            ask::<S, T, V>(simd, out.as_ptr().wrapping_add(LEAD * strip.stride));
        }
        let mut y = factors;
        for v in 0..V {
            simd.prefetch_near(tile.as_ptr().wrapping_add(2 * TILE_LEAD + v * S::LANES));
            let e = simd.load_slice(&tile[v * S::LANES..]);
            y[v] = if LOG { simd.add(e, factors[v]) } else { simd.mul(e, factors[v]) };
            if TWICE {
                y[v] = simd.mul(y[v], seconds[v]);
            }
        }
        store::<S, T, V>(simd, out, y, stream);
    }
}

/// The first `V` vectors of a row of states.
#[inline(always)]
fn get<S: Simd, const V: usize>(simd: S, states: &[f32]) -> [S::F32; V] {
    load::<S, f32, V>(simd, &states[..V * S::LANES])
}

#[inline(always)]
fn put<S: Simd, const V: usize>(simd: S, states: &mut [f32], x: [S::F32; V]) {
    for v in 0..V {
        simd.store_slice(&mut states[v * S::LANES..], x[v]);
    }
}

/// Asks memory for `V` vectors, which need not be there.
#[inline(always)]
fn ask<S: Simd, T, const V: usize>(simd: S, row: *const T) {
    for at in (0..V * S::LANES).step_by(LINE / size_of::<T>()) {
        simd.prefetch(row.wrapping_add(at));
    }
}

/// `V` vectors of neighbours; a single vector may be short and is filled up with -inf.
#[inline(always)]
pub(super) fn load<S: Simd, T: Element, const V: usize>(simd: S, x: &[T]) -> [S::F32; V] {
    if x.len() == V * S::LANES {
        let mut y = [simd.zero(); V];
        for v in 0..V {
            y[v] = simd.load_elements(&x[v * S::LANES..]);
        }
        y
    } else {
        [simd.load_elements_part(x, f32::NEG_INFINITY); V]
    }
}

/// As many; wide strips past the caches where `stream`.
#[inline(always)]
pub(super) fn store<S: Simd, T: Element, const V: usize>(
    simd: S,
    out: &mut [T],
    y: [S::F32; V],
    stream: Option<&Streaming<S>>,
) {
    if V == 1 {
        return simd.store_elements_part(out, y[0]);
    }
    for v in (0..V).step_by(2) {
        let (out, pair) = (&mut out[v * S::LANES..], [y[v], y[v + 1]]);
        match stream {
            Some(stream) => stream.store_pair(out, pair),
            None => simd.store_pair(out, pair),
        }
    }
}
