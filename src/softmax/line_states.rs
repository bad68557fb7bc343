//! The states of the lines of a panel, block by block, and their merge into the states of the lines.
#![forbid(unsafe_code)]

use super::lines::BLOCK;
use super::row_state::RowState;
use super::scale::{Formula, Scaling, with_formula};
use super::strips::load;
use crate::simd::exp::{SCALED_ONE, exp_scaled};
use crate::simd::{Kernel, MAX_LANES, Part, Simd};

/// Scratch memory of a panel: the tile of exponentials, and for each block a row with the states of all lines.
pub(super) struct PanelScratch<'a> {
    tile: &'a mut [f32],
    pub(super) maxima: &'a mut [f32],
    pub(super) sums: &'a mut [f32],
    /// Numbers in a row of states: the lines of a panel, padded to whole vectors.
    pub(super) width: usize,
    /// Whether the tile holds all blocks.
    pub(super) holds_all: bool,
}

impl<'a> PanelScratch<'a> {
    /// Numbers that [`new`](Self::new) needs for panels of `lines` lines of length `len`. `lines` includes `head`.
    pub(super) fn len<S: Simd>((lines, head): (usize, usize), len: usize, holds_all: bool) -> usize {
        let rows = if holds_all { len } else { len.min(BLOCK) };
        (rows + 2 * len.div_ceil(BLOCK)) * Self::width::<S>(lines, head)
    }

    pub(super) fn new<S: Simd>(
        buffer: &'a mut [f32],
        (lines, head): (usize, usize),
        len: usize,
        holds_all: bool,
    ) -> Self {
        let width = Self::width::<S>(lines, head);
        let (states, tile) = buffer.split_at_mut(2 * len.div_ceil(BLOCK) * width);
        let (maxima, sums) = states.split_at_mut(states.len() / 2);
        Self { tile, maxima, sums, width, holds_all }
    }

    /// The strips at both ends of a panel may be narrower than their vectors.
    fn width<S: Simd>(lines: usize, head: usize) -> usize {
        head.next_multiple_of(S::LANES) + (lines - head.min(lines)).next_multiple_of(S::LANES)
    }

    /// The exponentials of a strip: `rows` rows of `width` numbers in block number `block`.
    #[inline(always)]
    pub(super) fn exponentials(&mut self, (block, offset): (usize, usize), rows: usize, width: usize) -> &mut [f32] {
        let start = if self.holds_all { block * BLOCK * self.width } else { 0 };
        &mut self.tile[start + offset * rows..][..rows * width]
    }
}

/// The [`RowState`]s of the lines of a strip. Sums are in units of [`STATE_UNIT`].
#[derive(Clone, Copy)]
pub(super) struct LineStates<S: Simd, const V: usize> {
    max: [S::F32; V],
    sum: [S::F32; V],
}

/// 1/`SCALED_ONE`^2, because a sum adds products of two scaled exponentials.
const STATE_UNIT: f32 = 1.0 / SCALED_ONE / SCALED_ONE;

impl<S: Simd, const V: usize> LineStates<S, V> {
    /// Hands each state to `visit`, with the number of its line in the strip.
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

    /// [`RowState::log_sum`] of each line if `LOG`, [`RowState::inverse_sum`] otherwise.
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

/// The maximum, or 0 for a line without a visible element, because -inf - -inf is NaN.
#[inline(always)]
pub(super) fn visible<S: Simd>(simd: S, max: S::F32) -> S::F32 {
    simd.select(simd.eq(max, simd.splat(f32::NEG_INFINITY)), simd.zero(), max)
}

/// [`total`] as a part, for both formulas.
pub(super) struct Total<'a, 'b, const V: usize> {
    pub(super) scratch: &'a mut PanelScratch<'b>,
    pub(super) offset: usize,
    pub(super) formula: Formula,
}

impl<S: Simd, const V: usize> Part<S> for Total<'_, '_, V> {
    type Output = LineStates<S, V>;
    #[inline(always)]
    fn run(self, simd: S) -> LineStates<S, V> {
        let Self { scratch, offset, formula } = self;
        with_formula!(formula, |scale: C, LOG| total::<S, C, V, LOG>(simd, scratch, offset, scale))
    }
}

/// Merges the states of the blocks into those of the lines. The scratch's maxima then hold exp(scale*(block max - line max)) in
/// units of 1/`SCALED_ONE`, or the exponent if `LOG`.
#[inline(always)]
fn total<S: Simd, C: Scaling, const V: usize, const LOG: bool>(
    simd: S,
    scratch: &mut PanelScratch<'_>,
    offset: usize,
    scale: C,
) -> LineStates<S, V> {
    let mut max = [simd.splat(f32::NEG_INFINITY); V];
    for maxima in scratch.maxima.chunks_exact(scratch.width) {
        for v in 0..V {
            max[v] = simd.max(simd.load_slice(&maxima[offset + v * S::LANES..]), max[v]);
        }
    }
    let mut sum = [simd.zero(); V];
    // Partial sums of `BLOCK` blocks keep the chains of additions short.
    let run = BLOCK * scratch.width;
    for (maxima, sums) in scratch.maxima.chunks_mut(run).zip(scratch.sums.chunks(run)) {
        let mut part = [simd.zero(); V];
        for (maxima, sums) in maxima.chunks_exact_mut(scratch.width).zip(sums.chunks_exact(scratch.width)) {
            for v in 0..V {
                let at = offset + v * S::LANES;
                let t = scale.exponent(simd, simd.load_slice(&maxima[at..]), visible(simd, max[v]));
                let share = exp_scaled(simd, t);
                simd.store_slice(&mut maxima[at..], if LOG { t } else { share });
                part[v] = simd.mul_add(simd.load_slice(&sums[at..]), share, part[v]);
            }
        }
        for v in 0..V {
            sum[v] = simd.add(sum[v], part[v]);
        }
    }
    LineStates { max, sum }
}

/// A factor below this is split in two, because a denormal factor has lost bits. The exponentials are up to 2^24, so the product
/// would show the loss.
pub(super) const SMALL: f32 = f32::from_bits((127 - 100) << 23);

/// [`factors`] as a part.
pub(super) struct Factors<'a, 'b, const V: usize> {
    pub(super) scratch: &'a mut PanelScratch<'b>,
    pub(super) offset: usize,
    pub(super) formula: Formula,
    pub(super) upstream: Option<&'a [f32]>,
}

impl<const V: usize> Kernel for Factors<'_, '_, V> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { scratch, offset, formula, upstream } = self;
        let states = simd.call(Total::<V> { scratch: &mut *scratch, offset, formula });
        if formula.log {
            factors::<S, V, true>(simd, scratch, offset, states, upstream);
        } else {
            factors::<S, V, false>(simd, scratch, offset, states, upstream);
        }
    }
}

/// Turns the states of the blocks into the factors that make their exponentials probabilities. Maxima then hold the first
/// factor of each line and sums hold the second, which is nearly always 1. If `LOG`, maxima hold a number to add instead.
#[inline(always)]
fn factors<S: Simd, const V: usize, const LOG: bool>(
    simd: S,
    scratch: &mut PanelScratch<'_>,
    offset: usize,
    states: LineStates<S, V>,
    upstream: Option<&[f32]>,
) {
    let mut norms = states.norms::<LOG>(simd);
    if let Some(upstream) = upstream {
        let upstream = load::<S, f32, V>(simd, upstream);
        for v in 0..V {
            norms[v] = simd.mul(norms[v], upstream[v]);
        }
    }
    let width = scratch.width;
    for (maxima, sums) in scratch.maxima.chunks_exact_mut(width).zip(scratch.sums.chunks_exact_mut(width)) {
        for (v, &norm) in norms.iter().enumerate() {
            let at = offset + v * S::LANES;
            let (share, unit) = (simd.load_slice(&maxima[at..]), simd.splat(STATE_UNIT));
            if LOG {
                simd.store_slice(&mut maxima[at..], simd.sub(share, norm));
                continue;
            }
            // A block of hidden elements has the share 0, which needs no second factor. `upstream` may be negative, or so large
            // that the product is not small although its first factor is.
            let scaled = simd.mul(share, unit);
            let product = simd.mul(scaled, norm);
            let size = simd.min(simd.abs(product), scaled);
            let small = simd.and(simd.lt(simd.zero(), share), simd.lt(size, simd.splat(SMALL)));
            simd.store_slice(&mut maxima[at..], simd.select(small, simd.mul(share, norm), product));
            simd.store_slice(&mut sums[at..], simd.select(small, unit, simd.splat(1.0)));
        }
    }
}

/// The first `V` vectors of a row of states.
#[inline(always)]
pub(super) fn get<S: Simd, const V: usize>(simd: S, states: &[f32]) -> [S::F32; V] {
    load::<S, f32, V>(simd, &states[..V * S::LANES])
}

/// Writes the first `V` vectors of a row of states.
#[inline(always)]
pub(super) fn put<S: Simd, const V: usize>(simd: S, states: &mut [f32], x: [S::F32; V]) {
    for v in 0..V {
        simd.store_slice(&mut states[v * S::LANES..], x[v]);
    }
}
