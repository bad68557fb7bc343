//! Any axis but the last: the lanes of a vector are neighbouring lines, so nothing is transposed.
//!
//! ```text
//! for block of rows { for x in block { max = max(max, x) }                      max_of_strip
//!                     for x in block { e = exp(scale*(x-max)); sum += e } }     exp_tile        x    -> tile
//! line_max = max(max of blocks)
//! line_sum = sum(exp(scale*(max-line_max)) * sum of blocks)                     total
//! for block of rows { factor = exp(scale*(max-line_max)) / line_sum             factors
//!                     for e in block { out = e * factor } }                     write           tile -> out
//! ```
//!
//! 1. The array is read once and written once, in panels of lines. A panel takes a long run of each row, because memory is
//!    faster then. `exp_tile` computes one block of rows and prefetches the next, row by row.
//! 2. A panel is computed in strips of a few vectors. A block of a strip stays in the first cache.
//! 3. The exponentials of a block are relative to the maximum of the block, so no block waits for the maximum of the line. They
//!    lie dense in the tile. Rows of the array itself would evict each other from the cache if a row's length is a power of two.
//!    If the whole tile would be too large for any cache, it holds one block, and the exponentials are computed twice.
//! 4. Each pass over a block of a strip is a [`Part`], compiled only for what it depends on.
//! 5. An output that no cache can hold is written past the caches, in whole cache lines, if the cache lines of all rows start at
//!    the same column.
#![forbid(unsafe_code)]

use super::line_states::{Factors, PanelScratch, Total, get, put, visible};
use super::lines::{LinePanel, PanelPlace};
use super::row_state::RowState;
use super::scale::{Formula, One, Scale, Scaling, with_formula};
use super::shared::{Panel, PanelBuffers, PanelMut};
use super::short_rows::PAIR;
use super::strips::{Strip, WIDEST, load, store, with_vectors};
use crate::element::Element;
use crate::simd::exp::exp_scaled;
use crate::simd::{Part, Simd, Streaming};

/// Prefetch distance in the tile, in numbers: half a block of a strip.
const TILE_DISTANCE: usize = 1024;

/// Prefetch distance in the output, in rows, for the loop that only writes. The processor cannot predict the next row.
const ROW_DISTANCE: usize = 16;

/// Softmax of the lines of a panel times the `upstream` of each line, or log_softmax.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Element>(
    simd: S,
    buffers: &mut PanelBuffers<'_, T>,
    panel: LinePanel,
    scratch: &mut PanelScratch<'_>,
    formula: Formula,
    upstream: Option<&[f32]>,
    stream: Option<&Streaming<S>>,
) {
    fold(simd, &mut Blocks::Of(buffers.input()), panel, scratch, formula);
    factors(simd, panel, scratch, formula, upstream);
    for (b, block) in panel.blocks().enumerate() {
        for (offset, strip) in block.strips::<S>() {
            with_vectors!(strip, S, V => {
                if !scratch.holds_all {
                    let (x, tile) = (buffers.input(), scratch.exponentials((b, offset), strip.len, V * S::LANES));
                    let max = simd.call(MaxOfStrip::<T, V> { x, strip, scale: formula.scale });
                    exponentials::<S, T, V>(simd, x, strip, tile, max, formula, &mut NextBlock::of(x, strip.first + strip.len, strip.column, strip.width));
                }
                let out = buffers.output();
                simd.call(Write::<S, T, V> { scratch, at: (b, offset), out, strip, log: formula.log, stream })
            });
        }
    }
}

/// [`softmax`] of the lines of a panel whose rows need not be in one array.
#[inline(always)]
pub(super) fn softmax_of_blocks<S: Simd, T: Element, O: Element>(
    simd: S,
    mut blocks: Blocks<'_, T>,
    out: &mut PanelMut<'_, O>,
    panel: LinePanel,
    scratch: &mut PanelScratch<'_>,
    formula: Formula,
    stream: Option<&Streaming<S>>,
) {
    fold(simd, &mut blocks, panel, scratch, formula);
    factors(simd, panel, scratch, formula, None);
    for (b, block) in panel.blocks().enumerate() {
        if !scratch.holds_all {
            let (x, made, mut prefetch) = blocks.get(block);
            for (offset, strip) in made.strips::<S>() {
                with_vectors!(strip, S, V => {
                    let tile = scratch.exponentials((b, offset), strip.len, V * S::LANES);
                    let max = simd.call(MaxOfStrip::<T, V> { x, strip, scale: formula.scale });
                    exponentials::<S, T, V>(simd, x, strip, tile, max, formula, &mut prefetch);
                });
            }
        }
        for (offset, strip) in block.strips::<S>() {
            with_vectors!(strip, S, V => {
                simd.call(Write::<S, O, V> { scratch, at: (b, offset), out, strip, log: formula.log, stream })
            });
        }
    }
}

/// Writes rows of a panel, from the first one of a block, to memory of a block. The result is where the rows after them are.
pub(super) type MakeBlock<'a, T> = &'a mut dyn FnMut(LinePanel, &mut [T]) -> NextBlock;

/// Where the blocks of a panel are read.
pub(super) enum Blocks<'a, T> {
    /// In an array.
    Of(Panel<'a, T>),
    /// In memory of one block, which is made when it is read.
    Made { make: MakeBlock<'a, T>, memory: &'a mut [T] },
}

impl<T> Blocks<'_, T> {
    /// The array that a block is in, the block as a part of it, and what comes after it.
    fn get(&mut self, block: LinePanel) -> (Panel<'_, T>, LinePanel, NextBlock) {
        match self {
            Blocks::Of(x) => (*x, block, NextBlock::of(*x, block.first + block.len, 0, block.width)),
            Blocks::Made { make, memory } => {
                let numbers = &mut memory[..block.len * block.width];
                let next = make(block, numbers);
                let block = LinePanel { first: 0, ..block };
                let place = PanelPlace { line: 0, first: 0, stride: block.width, panel: block };
                (Panel::new(numbers, place), block, next)
            }
        }
    }
}

/// Turns the states of the blocks into factors.
#[inline(always)]
fn factors<S: Simd>(
    simd: S,
    panel: LinePanel,
    scratch: &mut PanelScratch<'_>,
    formula: Formula,
    upstream: Option<&[f32]>,
) {
    for (offset, strip) in panel.strips::<S>() {
        let upstream = upstream.map(|upstream| &upstream[strip.column..][..strip.width]);
        with_vectors!(strip, S, V => simd.call(Factors::<V> { scratch, offset, formula, upstream }));
    }
}

/// Hands the state of each line of a panel to `visit`, with the number of the line in the panel.
#[inline(always)]
pub(super) fn states<S: Simd, T: Element>(
    simd: S,
    x: Panel<'_, T>,
    panel: LinePanel,
    scratch: &mut PanelScratch<'_>,
    formula: Formula,
    mut visit: impl FnMut(usize, RowState),
) {
    fold(simd, &mut Blocks::Of(x), panel, scratch, formula);
    for (offset, strip) in panel.strips::<S>() {
        let visit = |i, state| {
            if i < strip.width {
                visit(strip.column + i, state)
            }
        };
        with_vectors!(strip, S, V => simd.call(Total::<V> { scratch, offset, formula }).each(simd, visit));
    }
}

/// Computes the states of all blocks, and the exponentials of the blocks that the tile holds.
#[inline(always)]
fn fold<S: Simd, T: Element>(
    simd: S,
    blocks: &mut Blocks<'_, T>,
    panel: LinePanel,
    scratch: &mut PanelScratch<'_>,
    formula: Formula,
) {
    let scale = formula.scale;
    for (b, block) in panel.blocks().enumerate() {
        let row = b * scratch.width..(b + 1) * scratch.width;
        let (x, block, mut prefetch) = blocks.get(block);
        for (offset, strip) in block.strips_for_max::<S>() {
            let maxima = &mut scratch.maxima[row.clone()][offset..];
            if strip.width == WIDEST * S::LANES {
                put(simd, maxima, simd.call(MaxOfStrip::<T, WIDEST> { x, strip, scale }));
            } else {
                with_vectors!(strip, S, V => put(simd, maxima, simd.call(MaxOfStrip::<T, V> { x, strip, scale })));
            }
        }
        for (offset, strip) in block.strips::<S>() {
            with_vectors!(strip, S, V => {
                let max = get::<S, V>(simd, &scratch.maxima[row.clone()][offset..]);
                let tile = scratch.exponentials((b, offset), strip.len, V * S::LANES);
                let sum = exponentials::<S, T, V>(simd, x, strip, tile, max, formula, &mut prefetch);
                put(simd, &mut scratch.sums[row.clone()][offset..], sum);
            });
        }
    }
}

/// Prefetches the next block of a panel a few elements at a time, row by row.
#[derive(Clone, Copy)]
pub(super) struct NextBlock {
    row: *const u8,
    column: usize,
    /// In bytes, as the column and the width of a row.
    stride: isize,
    width: usize,
    mask: Option<MaskRow>,
}

/// A row of a mask, of one byte for each line.
#[derive(Clone, Copy)]
struct MaskRow {
    row: *const u8,
    stride: isize,
    width: usize,
}

impl NextBlock {
    /// Some columns of the rows from `first`.
    fn of<T>(x: Panel<'_, T>, first: usize, column: usize, width: usize) -> Self {
        Self::new(x.address(first, column), (x.stride() as isize).wrapping_mul(size_of::<T>() as isize), width)
    }

    /// Rows of `width` elements from an address, `stride` bytes apart. They need not be readable.
    pub(super) fn new<T>(row: *const T, stride: isize, width: usize) -> Self {
        Self { row: row.cast(), column: 0, stride, width: width * size_of::<T>(), mask: None }
    }

    /// With rows of a mask, `width` bytes each: one is prefetched with each row of elements.
    pub(super) fn with_mask(self, row: *const u8, stride: isize, width: usize) -> Self {
        Self { mask: Some(MaskRow { row, stride, width }), ..self }
    }

    /// Prefetches this many bytes: a constant, so that it is no loop.
    #[inline(always)]
    fn step<S: Simd>(&mut self, simd: S, bytes: usize) {
        simd.prefetch_elements(self.row.wrapping_add(self.column), bytes);
        self.column += bytes;
        if self.column >= self.width {
            (self.row, self.column) = (self.row.wrapping_offset(self.stride), 0);
            if let Some(mask) = &mut self.mask {
                simd.prefetch_elements(mask.row, mask.width);
                mask.row = mask.row.wrapping_offset(mask.stride);
            }
        }
    }
}

/// [`max_of_strip`] as a part.
struct MaxOfStrip<'a, T, const V: usize> {
    x: Panel<'a, T>,
    strip: Strip,
    scale: Scale,
}

impl<S: Simd, T: Element, const V: usize> Part<S> for MaxOfStrip<'_, T, V> {
    type Output = [S::F32; V];
    #[inline(always)]
    fn run(self, simd: S) -> [S::F32; V] {
        let Self { x, strip, scale } = self;
        if scale.factor == 1.0 { max_of_strip(simd, x, strip, One) } else { max_of_strip(simd, x, strip, scale) }
    }
}

/// The maximum of each line; -inf for a line without elements. NaN is ignored.
#[inline(always)]
fn max_of_strip<S: Simd, T: Element, C: Scaling, const V: usize>(
    simd: S,
    x: Panel<'_, T>,
    strip: Strip,
    scale: C,
) -> [S::F32; V] {
    let mut max = [simd.splat(f32::NEG_INFINITY); V];
    for i in 0..strip.len {
        let x = load::<S, T, V>(simd, strip.row(x, i));
        for v in 0..V {
            max[v] = simd.max(scale.apply_factor(simd, x[v]), max[v]);
        }
    }
    max
}

/// [`exp_tile`] with the form of the scale that the formula needs.
#[inline(always)]
fn exponentials<S: Simd, T: Element, const V: usize>(
    simd: S,
    x: Panel<'_, T>,
    strip: Strip,
    tile: &mut [f32],
    max: [S::F32; V],
    formula: Formula,
    prefetch: &mut NextBlock,
) -> [S::F32; V] {
    with_formula!(formula, |scale: C, LOG| {
        simd.call(ExpTile::<S, T, C, V, LOG> { x, strip, tile, max, scale, prefetch })
    })
}

/// [`exp_tile`] as a part.
struct ExpTile<'a, S: Simd, T, C, const V: usize, const LOG: bool> {
    x: Panel<'a, T>,
    strip: Strip,
    tile: &'a mut [f32],
    max: [S::F32; V],
    scale: C,
    prefetch: &'a mut NextBlock,
}

impl<S: Simd, T: Element, C: Scaling, const V: usize, const LOG: bool> Part<S> for ExpTile<'_, S, T, C, V, LOG> {
    type Output = [S::F32; V];
    #[inline(always)]
    fn run(self, simd: S) -> [S::F32; V] {
        let Self { x, strip, tile, max, scale, prefetch } = self;
        exp_tile::<S, T, C, V, LOG>(simd, x, strip, tile, max, scale, prefetch)
    }
}

/// Fills the tile with the exponentials exp(scale*(y - max)) in units of 1/`SCALED_ONE`, or with their exponents if `LOG`.
/// Returns the sums of the exponentials.
#[inline(always)]
fn exp_tile<S: Simd, T: Element, C: Scaling, const V: usize, const LOG: bool>(
    simd: S,
    x: Panel<'_, T>,
    strip: Strip,
    tile: &mut [f32],
    mut max: [S::F32; V],
    scale: C,
    prefetch: &mut NextBlock,
) -> [S::F32; V] {
    for max in &mut max {
        *max = visible(simd, *max);
    }
    let mut sum = [simd.zero(); V];
    // Two vectors at a time: see `row.rs`.
    for first in (0..V).step_by(PAIR) {
        let pair = PAIR.min(V);
        for (i, tile) in tile.chunks_exact_mut(V * S::LANES).enumerate() {
            prefetch.step(simd, PAIR * S::LANES * size_of::<T>());
            let x = strip.row(x, i);
            let tile = &mut tile[first * S::LANES..][..pair * S::LANES];
            for v in 0..pair {
                // The tile is not in the first cache yet, or no longer.
                simd.prefetch_near(tile.as_ptr().wrapping_add(TILE_DISTANCE + v * S::LANES));
                let x =
                    if V == 1 { load::<S, T, 1>(simd, x)[0] } else { simd.load_elements(&x[(first + v) * S::LANES..]) };
                let y = scale.apply_factor(simd, x);
                let t = scale.exponent(simd, y, max[first + v]);
                let e = exp_scaled(simd, t);
                simd.store_slice(&mut tile[v * S::LANES..], if LOG { t } else { e });
                sum[first + v] = simd.add(sum[first + v], e);
            }
        }
    }
    sum
}

/// [`write`] as a part.
struct Write<'a, 'b, 'o, S: Simd, T, const V: usize> {
    scratch: &'a mut PanelScratch<'b>,
    at: (usize, usize),
    out: &'a mut PanelMut<'o, T>,
    strip: Strip,
    log: bool,
    stream: Option<&'a Streaming<S>>,
}

impl<S: Simd, T: Element, const V: usize> Part<S> for Write<'_, '_, '_, S, T, V> {
    type Output = ();
    #[inline(always)]
    fn run(self, simd: S) {
        let Self { scratch, at, out, strip, log, stream } = self;
        if log {
            write::<S, T, V, true>(simd, scratch, at, out, strip, stream);
        } else {
            write::<S, T, V, false>(simd, scratch, at, out, strip, stream);
        }
    }
}

/// Writes the softmax of a block of a strip: exponentials times factors.
#[inline(always)]
fn write<S: Simd, T: Element, const V: usize, const LOG: bool>(
    simd: S,
    scratch: &mut PanelScratch<'_>,
    (block, offset): (usize, usize),
    out: &mut PanelMut<'_, T>,
    strip: Strip,
    stream: Option<&Streaming<S>>,
) {
    let at = block * scratch.width + offset;
    let (factors, seconds) = (get::<S, V>(simd, &scratch.maxima[at..]), get::<S, V>(simd, &scratch.sums[at..]));
    let mut twice = false;
    for second in seconds {
        twice |= !LOG && simd.any(simd.lt(second, simd.splat(1.0)));
    }
    let tile = scratch.exponentials((block, offset), strip.len, V * S::LANES);
    if twice {
        write_rows::<S, T, V, LOG, true>(simd, tile, out, strip, [factors, seconds], stream);
    } else {
        write_rows::<S, T, V, LOG, false>(simd, tile, out, strip, [factors, seconds], stream);
    }
}

/// `TWICE` says that a second factor is not 1. The bits of a line do not depend on it, because multiplying by 1 is exact.
#[inline(always)]
fn write_rows<S: Simd, T: Element, const V: usize, const LOG: bool, const TWICE: bool>(
    simd: S,
    tile: &[f32],
    out: &mut PanelMut<'_, T>,
    strip: Strip,
    [factors, seconds]: [[S::F32; V]; 2],
    stream: Option<&Streaming<S>>,
) {
    for (i, tile) in tile.chunks_exact(V * S::LANES).enumerate() {
        if stream.is_none() {
            simd.prefetch_elements(out.address(strip.first + i + ROW_DISTANCE, strip.column), V * S::LANES);
        }
        let mut y = factors;
        for v in 0..V {
            simd.prefetch_near(tile.as_ptr().wrapping_add(2 * TILE_DISTANCE + v * S::LANES));
            let e = simd.load_slice(&tile[v * S::LANES..]);
            y[v] = if LOG { simd.add(e, factors[v]) } else { simd.mul(e, factors[v]) };
            if TWICE {
                y[v] = simd.mul(y[v], seconds[v]);
            }
        }
        store::<S, T, V>(simd, strip.row_mut(out, i), y, stream);
    }
}
