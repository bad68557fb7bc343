//! From an axis to its rows, or to strips of its columns; from a call to the level that runs it.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::buffers::{Buffers, Stored};
use super::column::{self, Strip};
use super::row::{self, ROW_TILE};
use super::scale::Scale;
use super::state::RowState;
use crate::element::Element;
use crate::simd::{Isa, Kernel, Simd};

/// Longest block of a strip: 512 KiB of tile, half of a common second-level cache.
const COLUMN_TILE: usize = 4096;

/// An output of so many bytes is not in a cache when its reader comes, and each line would be read before it is written
/// over.
const STREAM_BYTES: usize = 16 << 20;

/// A tile up to this length lies on the stack: short rows are not worth an allocation.
const STACK_TILE: usize = 256;

/// Softmax along an axis, or its logarithm, with a factor for each line.
pub(super) struct Softmax<'a, T> {
    pub(super) buffers: Buffers<'a, T>,
    pub(super) axis: Axis,
    pub(super) scale: Scale,
    pub(super) log: bool,
    pub(super) gains: Option<&'a [f32]>,
}

impl<T: Stored> Softmax<'_, T> {
    /// Runs on this processor. Of the last axis, `visit` gets the state of every row.
    pub(super) fn run(self, visit: impl FnMut(usize, RowState)) {
        let (isa, plain) = (Isa::best(), self.scale.is_plain());
        match (self.log, plain) {
            (false, true) => isa.run(Typed::<_, _, false, true>(self, visit)),
            (false, false) => isa.run(Typed::<_, _, false, false>(self, visit)),
            (true, true) => isa.run(Typed::<_, _, true, true>(self, visit)),
            (true, false) => isa.run(Typed::<_, _, true, false>(self, visit)),
        }
    }
}

/// [`Softmax`] with its options in the type, where they cost nothing in the loops.
struct Typed<'a, T, F, const LOG: bool, const PLAIN: bool>(Softmax<'a, T>, F);

// The vector code of a kernel must not stand in a closure: one that is not inlined is compiled without the level's
// instructions. Hence loops here, and iterators that only count.
impl<T: Stored, F: FnMut(usize, RowState), const LOG: bool, const PLAIN: bool> Kernel for Typed<'_, T, F, LOG, PLAIN> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self(Softmax { mut buffers, axis, scale, gains, .. }, mut visit) = self;
        let stream = streams(&buffers);
        let own_tile = T::IS_F32 && !stream && axis.after() == 1 && axis.line_len() <= ROW_TILE;
        let mut tile = if own_tile { Tile::none() } else { Tile::new::<S>(axis) };
        let tile = tile.as_mut_slice();
        if axis.after() == 1 {
            for (line, row) in rows(axis).enumerate() {
                let gain = gains.map_or(1.0, |gains| gains[line]);
                visit(line, row::softmax::<S, T, LOG, PLAIN>(simd, &mut buffers, row, tile, scale, gain, stream));
            }
            if stream {
                simd.fence();
            }
            return;
        }
        for (line, strip) in Strips::new::<S>(axis) {
            let gains = gains.map(|gains| &gains[line..][..strip.width]);
            if strip.width == column::WIDE * S::LANES {
                column::softmax::<S, T, { column::WIDE }, LOG, PLAIN>(simd, &mut buffers, strip, tile, scale, gains);
            } else {
                column::softmax::<S, T, 1, LOG, PLAIN>(simd, &mut buffers, strip, tile, scale, gains);
            }
        }
    }
}

/// Whether the output is written past the caches.
fn streams<T>(buffers: &Buffers<'_, T>) -> bool {
    match buffers {
        Buffers::InPlace(_) => false,
        Buffers::Into { to, .. } => size_of_val(*to) >= STREAM_BYTES,
    }
}

/// The states of all lines along an axis, handed to `visit`.
pub(super) struct States<'a, T, F> {
    pub(super) x: &'a [T],
    pub(super) axis: Axis,
    pub(super) scale: Scale,
    pub(super) visit: F,
}

impl<T: Element, F: FnMut(usize, RowState)> Kernel for States<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, axis, scale, mut visit } = self;
        let mut tile = Tile::new::<S>(axis);
        let tile = tile.as_mut_slice();
        if axis.after() == 1 {
            for (line, row) in rows(axis).enumerate() {
                let mut state = RowState::default();
                for x in x[row].chunks(ROW_TILE) {
                    let part = row::fold::<S, T, true, false>(simd, x, &mut tile[..x.len()], scale);
                    state = state.merge_scaled(part, scale.scale);
                }
                visit(line, state);
            }
            return;
        }
        for (line, strip) in Strips::new::<S>(axis) {
            let visit = |i, state| {
                if i < strip.width {
                    visit(line + i, state)
                }
            };
            if strip.width == column::WIDE * S::LANES {
                column::fold::<S, T, { column::WIDE }, true, false>(simd, x, strip, tile, scale).each(simd, visit);
            } else {
                column::fold::<S, T, 1, true, false>(simd, x, strip, tile, scale).each(simd, visit);
            }
        }
    }
}

fn rows(axis: Axis) -> impl Iterator<Item = std::ops::Range<usize>> {
    let len = axis.line_len();
    (0..axis.before()).map(move |b| b * len..(b + 1) * len)
}

/// Every strip of an axis that is not the last, with the number of its first line: wide ones, then what is left over in
/// single vectors.
pub(super) struct Strips {
    axis: Axis,
    lanes: usize,
    line: usize,
}

impl Strips {
    pub(super) fn new<S: Simd>(axis: Axis) -> Self {
        Self { axis, lanes: S::LANES, line: 0 }
    }
}

impl Iterator for Strips {
    type Item = (usize, Strip);
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.line == self.axis.lines() {
            return None;
        }
        let (line, len, stride) = (self.line, self.axis.line_len(), self.axis.after());
        let (before, column) = (line / stride, line % stride);
        let (left, wide) = (stride - column, column::WIDE * self.lanes);
        let width = if left >= wide { wide } else { left.min(self.lanes) };
        self.line += width;
        Some((line, Strip { first: before * len * stride + column, stride, len, width }))
    }
}

/// Room for a row, for a strip, or for a block of either.
struct Tile {
    small: [f32; STACK_TILE],
    large: Vec<f32>,
    len: usize,
}

impl Tile {
    fn new<S: Simd>(axis: Axis) -> Self {
        let len = if axis.after() == 1 {
            axis.line_len().clamp(1, ROW_TILE)
        } else {
            axis.line_len().clamp(1, COLUMN_TILE) * column::WIDE * S::LANES
        };
        Self { small: [0.0; STACK_TILE], large: if len > STACK_TILE { vec![0.0; len] } else { Vec::new() }, len }
    }

    /// For rows that need none.
    fn none() -> Self {
        Self { small: [0.0; STACK_TILE], large: Vec::new(), len: 1 }
    }

    fn as_mut_slice(&mut self) -> &mut [f32] {
        if self.len <= STACK_TILE { &mut self.small[..self.len] } else { &mut self.large }
    }
}
