//! Any axis but the last: lanes run across neighbouring lines, so that nothing is ever transposed.
//!
//! The steps are those of [`row`](super::row). A strip of lines is wide enough that each visit to a row of the array
//! uses whole cache lines; its tile lies dense in the cache, where lines of the array itself, a power of two apart, would
//! push each other out. The array is read once and written once.
#![forbid(unsafe_code)]

use super::buffers::Buffers;
use super::row::{PAIR, RUN};
use super::scale::Scale;
use super::state::RowState;
use crate::element::Element;
use crate::simd::exp::{WEIGHT_ONE, exp_weight};
use crate::simd::{LINE, MAX_LANES, Simd};

/// Neighbouring lines: element i of them starts at `first + i * stride`.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) first: usize,
    pub(super) stride: usize,
    pub(super) len: usize,
    /// Lines side by side: `V * LANES`, or for a strip of one vector, less.
    pub(super) width: usize,
}

/// Vectors side by side in a wide strip: two cache lines of f32, one of a half type.
pub(super) const WIDE: usize = 4;

/// Rows of the array by which memory has a lead: those of a strip are too far apart for the processor to guess the next.
/// In f32 a fifth of the time at 4096 x 4096; of a half type's, whose rows are half as far apart, nothing there.
const LEAD: usize = 16;

/// The [`RowState`]s of the lines of a strip.
#[derive(Clone, Copy)]
pub(super) struct States<S: Simd, const V: usize> {
    max: [S::F32; V],
    sum: [S::F32; V],
}

impl<S: Simd, const V: usize> States<S, V> {
    #[inline(always)]
    fn identity(simd: S) -> Self {
        Self { max: [simd.splat(f32::NEG_INFINITY); V], sum: [simd.zero(); V] }
    }

    #[inline(always)]
    fn merge(self, simd: S, other: Self, scale: f32) -> Self {
        let mut merged = Self::identity(simd);
        for v in 0..V {
            let max = simd.max(self.max[v], other.max[v]);
            let anchor = visible(simd, max);
            merged.max[v] = max;
            merged.sum[v] = simd.add(self.share(simd, v, anchor, scale), other.share(simd, v, anchor, scale));
        }
        merged
    }

    /// The sum of vector v, counted from another maximum.
    #[inline(always)]
    fn share(&self, simd: S, v: usize, anchor: S::F32, scale: f32) -> S::F32 {
        let t = simd.mul(simd.splat(scale), simd.sub(self.max[v], anchor));
        simd.mul(self.sum[v], simd.mul(exp_weight(simd, t), simd.splat(1.0 / WEIGHT_ONE)))
    }

    /// The states one by one.
    #[inline(always)]
    pub(super) fn each(&self, simd: S, mut visit: impl FnMut(usize, RowState)) {
        for v in 0..V {
            let (mut max, mut sum) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
            simd.store_slice(&mut max, self.max[v]);
            simd.store_slice(&mut sum, self.sum[v]);
            for lane in 0..S::LANES {
                visit(v * S::LANES + lane, RowState { max: max[lane], sum: sum[lane] });
            }
        }
    }

    /// What `write` needs of each line: see [`RowState::log_sum`] and [`RowState::inverse_sum`].
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
            let none = simd.eq(max, simd.splat(f32::NEG_INFINITY));
            *norm = simd.select(none, sum, simd.div(simd.splat(1.0 / WEIGHT_ONE), sum));
        }
        norms
    }
}

/// Softmax of the lines of a strip, times the gain of each. The tile holds `V * LANES` f32 for every element of a line, or of a block of it.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Element, const V: usize, const LOG: bool, const PLAIN: bool>(
    simd: S,
    buffers: &mut Buffers<'_, T>,
    strip: Strip,
    tile: &mut [f32],
    scale: Scale,
    gains: Option<&[f32]>,
) {
    let states = fold::<S, T, V, LOG, PLAIN>(simd, buffers.input(), strip, tile, scale);
    let mut norms = states.norms::<LOG>(simd);
    if let Some(gains) = gains {
        let gains = load::<S, f32, V>(simd, gains);
        for v in 0..V {
            norms[v] = simd.mul(norms[v], gains[v]);
        }
    }
    for block in blocks::<S, V>(strip, tile.len()) {
        let tile = &mut tile[..block.len * V * S::LANES];
        if block.len < strip.len {
            fill::<S, T, V, PLAIN>(simd, buffers.input(), block, tile, scale);
            weigh::<S, V, LOG>(simd, tile, states.max, scale.scale);
        }
        write::<S, T, V, LOG>(simd, tile, buffers.output(), block, norms);
    }
}

/// The states of the lines of a strip. Where the strip is one block, the tile then holds its weights.
#[inline(always)]
pub(super) fn fold<S: Simd, T: Element, const V: usize, const LOG: bool, const PLAIN: bool>(
    simd: S,
    x: &[T],
    strip: Strip,
    tile: &mut [f32],
    scale: Scale,
) -> States<S, V> {
    let mut states = States::identity(simd);
    for block in blocks::<S, V>(strip, tile.len()) {
        let tile = &mut tile[..block.len * V * S::LANES];
        let max = fill::<S, T, V, PLAIN>(simd, x, block, tile, scale);
        let sum = weigh::<S, V, LOG>(simd, tile, max, scale.scale);
        states = states.merge(simd, States { max, sum }, scale.scale);
    }
    states
}

/// Cuts a strip into pieces that fit the tile.
#[inline(always)]
fn blocks<S: Simd, const V: usize>(strip: Strip, tile_len: usize) -> impl Iterator<Item = Strip> {
    let len = tile_len / (V * S::LANES);
    (0..strip.len).step_by(len).map(move |i| Strip {
        first: strip.first + i * strip.stride,
        len: len.min(strip.len - i),
        ..strip
    })
}

/// The maximum, or 0 where nothing is visible: -inf - -inf is NaN.
#[inline(always)]
fn visible<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.select(simd.eq(max, simd.splat(f32::NEG_INFINITY)), simd.zero(), max)
}

#[inline(always)]
fn fill<S: Simd, T: Element, const V: usize, const PLAIN: bool>(
    simd: S,
    x: &[T],
    strip: Strip,
    tile: &mut [f32],
    scale: Scale,
) -> [S::F32; V] {
    let mut max = [simd.splat(f32::NEG_INFINITY); V];
    for (i, tile) in tile.chunks_exact_mut(V * S::LANES).enumerate() {
        let x = &x[strip.first + i * strip.stride..][..strip.width];
        ask::<S, T, V>(simd, x.as_ptr().wrapping_add(LEAD * strip.stride));
        let x = load::<S, T, V>(simd, x);
        for v in 0..V {
            let y = scale.adjust::<S, PLAIN>(simd, x[v]);
            simd.store_slice(&mut tile[v * S::LANES..], y);
            max[v] = simd.max(y, max[v]);
        }
    }
    max
}

#[inline(always)]
fn weigh<S: Simd, const V: usize, const LOG: bool>(
    simd: S,
    tile: &mut [f32],
    mut max: [S::F32; V],
    scale: f32,
) -> [S::F32; V] {
    let scale = simd.splat(scale);
    for max in &mut max {
        *max = visible(simd, *max);
    }
    let mut sum = [simd.zero(); V];
    for run in tile.chunks_mut(RUN * V * S::LANES) {
        // A pair of vectors at a time, down a run that stays in the first-level cache: see `row`.
        for first in (0..V).step_by(PAIR) {
            let mut part = [simd.zero(); PAIR];
            let pair = PAIR.min(V);
            for tile in run.chunks_exact_mut(V * S::LANES) {
                let tile = &mut tile[first * S::LANES..][..pair * S::LANES];
                for i in 0..pair {
                    let t = simd.mul(scale, simd.sub(simd.load_slice(&tile[i * S::LANES..]), max[first + i]));
                    let e = exp_weight(simd, t);
                    simd.store_slice(&mut tile[i * S::LANES..], if LOG { t } else { e });
                    part[i] = simd.add(part[i], e);
                }
            }
            for i in 0..pair {
                sum[first + i] = simd.add(sum[first + i], part[i]);
            }
        }
    }
    for sum in &mut sum {
        *sum = simd.mul(*sum, simd.splat(1.0 / WEIGHT_ONE));
    }
    sum
}

#[inline(always)]
fn write<S: Simd, T: Element, const V: usize, const LOG: bool>(
    simd: S,
    tile: &[f32],
    out: &mut [T],
    strip: Strip,
    norms: [S::F32; V],
) {
    for (i, tile) in tile.chunks_exact(V * S::LANES).enumerate() {
        let out = &mut out[strip.first + i * strip.stride..][..strip.width];
        ask::<S, T, V>(simd, out.as_ptr().wrapping_add(LEAD * strip.stride));
        let mut y = norms;
        for v in 0..V {
            let e = simd.load_slice(&tile[v * S::LANES..]);
            y[v] = if LOG { simd.sub(e, norms[v]) } else { simd.mul(e, norms[v]) };
        }
        store::<S, T, V>(simd, out, y);
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

#[inline(always)]
pub(super) fn store<S: Simd, T: Element, const V: usize>(simd: S, out: &mut [T], y: [S::F32; V]) {
    if out.len() == V * S::LANES {
        for v in 0..V {
            simd.store_elements(&mut out[v * S::LANES..], y[v]);
        }
    } else {
        simd.store_elements_part(out, y[0]);
    }
}
