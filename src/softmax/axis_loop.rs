//! From an axis to its rows, or to strips of its columns; from a call to the level that runs it.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::buffers::{Buffers, Stored};
use super::column;
use super::level::isa;
use super::line_states::PanelScratch;
use super::row::{self, ROW_TILE};
use super::scale::{Halved, One, Plain, Scale, Scaling};
use super::state::RowState;
use super::strips::{LinePanels, WIDE};
use crate::element::Element;
use crate::simd::{Kernel, LINE, Simd, Streaming};

/// Numbers kept of a panel, at most: 10 MiB, which a common third-level cache has to spare.
const MAX_TILE_NUMBERS: usize = 10 << 18;

/// An array of so many bytes is written past the caches: half of a common third-level cache.
const FAR_BYTES: usize = 16 << 20;

/// So many numbers lie on the stack: short rows are not worth an allocation.
const STACK_NUMBERS: usize = 256;

/// Softmax along an axis, or its logarithm, with a factor for each line.
pub(super) struct Softmax<'a, T> {
    pub(super) buffers: Buffers<'a, T>,
    pub(super) axis: Axis,
    pub(super) scale: Scale,
    pub(super) log: bool,
    pub(super) upstream: Option<&'a [f32]>,
}

impl<T: Stored> Softmax<'_, T> {
    /// Runs on this processor. Of the last axis, `visit` gets the state of every row.
    pub(super) fn run(self, visit: impl FnMut(usize, RowState)) {
        match self.scale {
            Scale { factor: 1.0, scale: 1.0 } if isa().has_pick_16() => self.run_scaled(One, visit),
            Scale { factor: 1.0, scale } if self.log && scale < 1.0 => {
                isa().run(TypedSoftmax::<_, _, _, true>(self, Halved(scale), visit));
            }
            Scale { factor: 1.0, scale } => self.run_scaled(Plain(scale), visit),
            scale if self.log => isa().run(TypedSoftmax::<_, _, _, true>(self, scale.without_overflow(), visit)),
            scale => isa().run(TypedSoftmax::<_, _, _, false>(self, scale, visit)),
        }
    }

    fn run_scaled(self, scale: impl Scaling, visit: impl FnMut(usize, RowState)) {
        if self.log {
            isa().run(TypedSoftmax::<_, _, _, true>(self, scale, visit));
        } else {
            isa().run(TypedSoftmax::<_, _, _, false>(self, scale, visit));
        }
    }
}

/// [`Softmax`] with its options in the type, where they cost nothing in the loops.
struct TypedSoftmax<'a, T, C, F, const LOG: bool>(Softmax<'a, T>, C, F);

// The vector code of a kernel must not stand in a closure: one that is not inlined is compiled without the level's
// instructions. Hence loops here, and iterators that only count.
impl<T: Stored, C: Scaling, F: FnMut(usize, RowState), const LOG: bool> Kernel for TypedSoftmax<'_, T, C, F, LOG> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // (Known when it is compiled: for other levels nothing but this line is.)
        assert!(S::HAS_PICK_16 || !C::FOR_TABLE, "`Softmax::run` chooses by the level");
        let Self(Softmax { mut buffers, axis, upstream, .. }, scale, mut visit) = self;
        if axis.after() == 1 {
            // (In offset, a row is still in the first cache when it is written.)
            let stream = matches!(buffers, Buffers::Into { .. }) && is_far::<T>(axis);
            let own_tile = T::IS_F32 && !stream && axis.line_len() <= ROW_TILE;
            let mut tile = AlignedBuffer::new(if own_tile { 1 } else { axis.line_len().clamp(1, ROW_TILE) });
            let tile = tile.as_mut_slice();
            // (It fences when it is dropped.)
            let streaming = if stream { Some(Streaming::new(simd)) } else { None };
            let stream = streaming.as_ref();
            for (line, row) in rows(axis).enumerate() {
                let upstream = upstream.map_or(1.0, |upstream| upstream[line]);
                visit(line, row::softmax::<S, T, C, LOG>(simd, &mut buffers, row, tile, scale, upstream, stream));
            }
            return;
        }
        // Lines of the cache must lie alike in all rows.
        let stream = is_far::<T>(axis) && (axis.after() * size_of::<T>()).is_multiple_of(LINE);
        let head = if stream { buffers.output().as_ptr().align_offset(LINE) } else { 0 };
        let panels = LinePanels::new(axis, panel_lines::<S, T>(axis), head);
        let holds_all = PanelScratch::len::<S>(panels.widest(), axis.line_len(), true) <= MAX_TILE_NUMBERS;
        let mut buffer = AlignedBuffer::new(PanelScratch::len::<S>(panels.widest(), axis.line_len(), holds_all));
        let mut scratch = PanelScratch::new::<S>(buffer.as_mut_slice(), panels.widest(), axis.line_len(), holds_all);
        let streaming = if stream { Some(Streaming::new(simd)) } else { None };
        let stream = streaming.as_ref();
        for (line, panel) in panels {
            let upstream = upstream.map(|upstream| &upstream[line..][..panel.lines.width]);
            column::softmax::<S, T, C, LOG>(simd, &mut buffers, panel, &mut scratch, scale, upstream, stream);
        }
    }
}

/// Whether an array is so large that no cache holds it until its reader comes: the output is written past them.
fn is_far<T>(axis: Axis) -> bool {
    axis.elements() * size_of::<T>() >= FAR_BYTES
}

/// The states of all lines along an axis, handed to `visit`.
pub(super) struct EachState<'a, T, F> {
    pub(super) x: &'a [T],
    pub(super) axis: Axis,
    pub(super) scale: Scale,
    pub(super) visit: F,
}

impl<T: Element, F: FnMut(usize, RowState)> Kernel for EachState<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, axis, scale, mut visit } = self;
        if axis.after() == 1 {
            let mut tile = AlignedBuffer::new(axis.line_len().clamp(1, ROW_TILE));
            let tile = tile.as_mut_slice();
            for (line, row) in rows(axis).enumerate() {
                let mut state = RowState::default();
                for x in x[row].chunks(ROW_TILE) {
                    let part = row::fold::<S, T, Scale, true>(simd, x, &mut tile[..x.len()], scale);
                    state = state.merge_scaled(part, scale.scale);
                }
                visit(line, state);
            }
            return;
        }
        let panels = LinePanels::new(axis, panel_lines::<S, T>(axis), 0);
        let mut buffer = AlignedBuffer::new(PanelScratch::len::<S>(panels.widest(), axis.line_len(), false));
        let mut scratch = PanelScratch::new::<S>(buffer.as_mut_slice(), panels.widest(), axis.line_len(), false);
        for (line, panel) in panels {
            column::states::<S, T>(simd, x, panel, &mut scratch, scale, |i, state| visit(line + i, state));
        }
    }
}

fn rows(axis: Axis) -> impl Iterator<Item = std::ops::Range<usize>> {
    let len = axis.line_len();
    (0..axis.before()).map(move |b| b * len..(b + 1) * len)
}

/// Lines of a panel. An array that is larger than the second cache is read a kilobyte of a row at a time: 1.6 ms for 64 MiB
/// where 256 bytes at a time take 2.4. A smaller one has the smaller tile, of a single strip.
fn panel_lines<S: Simd, T>(axis: Axis) -> usize {
    const LARGE_BYTES: usize = 8 << 20;
    if axis.elements() * size_of::<T>() >= LARGE_BYTES { 1024 / size_of::<T>() } else { WIDE * S::LANES }
}

/// Numbers of a cache line.
const LINE_NUMBERS: usize = LINE / size_of::<f32>();

/// Room for tiles and what goes with them, from the start of a cache line on: a vector that lies across two takes longer
/// to load and to store.
struct AlignedBuffer {
    small: [f32; STACK_NUMBERS + LINE_NUMBERS],
    large: Vec<f32>,
    len: usize,
}

impl AlignedBuffer {
    fn new(len: usize) -> Self {
        let large = if len > STACK_NUMBERS { vec![0.0; len + LINE_NUMBERS] } else { Vec::new() };
        Self { small: [0.0; STACK_NUMBERS + LINE_NUMBERS], large, len }
    }

    fn as_mut_slice(&mut self) -> &mut [f32] {
        let buffer = if self.len <= STACK_NUMBERS { &mut self.small[..] } else { &mut self.large };
        let start = buffer.as_ptr().align_offset(LINE).min(LINE_NUMBERS);
        &mut buffer[start..][..self.len]
    }
}
