//! The loops over the lines of an axis: rows for the last axis, panels of lines for any other. They also pick the level, and
//! whether the output is streamed past the caches.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::buffers::{Buffers, Stored};
use super::column;
use super::line_states::PanelScratch;
use super::row::{self, ROW_TILE};
use super::row_state::RowState;
use super::scale::Formula;
use super::strips::{LinePanels, WIDE};
use crate::element::Element;
use crate::simd::{Kernel, LINE, Simd, Streaming};

/// The largest scratch of a panel that holds all exponentials, in numbers: 10 MiB, which fits a common third-level cache.
const MAX_PANEL_NUMBERS: usize = 10 << 18;

/// The output of an array of at least this size is streamed past the caches: half of a common third-level cache.
const STREAM_BYTES: usize = 16 << 20;

/// Numbers of a buffer on the stack. A short row is not worth an allocation.
const STACK_NUMBERS: usize = 256;

/// Softmax along an axis, or log_softmax. Softmax is multiplied by the `upstream` of each line, if given. For the last axis,
/// `visit` gets the state of every row.
pub(super) struct Softmax<'a, T> {
    pub(super) buffers: Buffers<'a, T>,
    pub(super) axis: Axis,
    pub(super) formula: Formula,
    pub(super) upstream: Option<&'a [f32]>,
    pub(super) visit: Option<&'a mut dyn FnMut(usize, RowState)>,
}

// A kernel has no vector code in closures, because a closure that is not inlined is compiled without the level's instructions.
// The iterators below only count.
impl<T: Stored> Kernel for Softmax<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { mut buffers, axis, formula, upstream, mut visit } = self;
        if axis.after() == 1 {
            // In place, a row is still in the first cache when it is written, so streaming would not help.
            let stream = matches!(buffers, Buffers::Into { .. }) && is_large::<T>(axis);
            let own_tile = T::IS_F32 && !stream && axis.line_len() <= ROW_TILE;
            let mut tile = AlignedBuffer::new(if own_tile { 1 } else { axis.line_len().clamp(1, ROW_TILE) });
            let tile = tile.as_mut_slice();
            // It fences when it is dropped.
            let streaming = if stream { Some(Streaming::new(simd)) } else { None };
            let stream = streaming.as_ref();
            for (line, row) in rows(axis).enumerate() {
                let upstream = upstream.map_or(1.0, |upstream| upstream[line]);
                let state = row::softmax(simd, &mut buffers, row, tile, formula, upstream, stream);
                if let Some(visit) = &mut visit {
                    visit(line, state);
                }
            }
            return;
        }
        // The cache lines of all rows must start at the same column.
        let stream = is_large::<T>(axis) && (axis.after() * size_of::<T>()).is_multiple_of(LINE);
        let head = if stream { buffers.output().as_ptr().align_offset(LINE) } else { 0 };
        let panels = LinePanels::new(axis, panel_lines::<S, T>(axis), head);
        let holds_all = PanelScratch::len::<S>(panels.widest(), axis.line_len(), true) <= MAX_PANEL_NUMBERS;
        let mut buffer = AlignedBuffer::new(PanelScratch::len::<S>(panels.widest(), axis.line_len(), holds_all));
        let mut scratch = PanelScratch::new::<S>(buffer.as_mut_slice(), panels.widest(), axis.line_len(), holds_all);
        let streaming = if stream { Some(Streaming::new(simd)) } else { None };
        let stream = streaming.as_ref();
        for (line, panel) in panels {
            let upstream = upstream.map(|upstream| &upstream[line..][..panel.lines.width]);
            column::softmax(simd, &mut buffers, panel, &mut scratch, formula, upstream, stream);
        }
    }
}

/// Whether the output is so large that no cache holds it until it is read.
fn is_large<T>(axis: Axis) -> bool {
    axis.elements() * size_of::<T>() >= STREAM_BYTES
}

/// Hands the state of every line along an axis to `visit`.
pub(super) struct VisitStates<'a, T> {
    pub(super) x: &'a [T],
    pub(super) axis: Axis,
    pub(super) formula: Formula,
    pub(super) visit: &'a mut dyn FnMut(usize, RowState),
}

impl<T: Element> Kernel for VisitStates<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, axis, formula, visit } = self;
        if axis.after() == 1 {
            let mut tile = AlignedBuffer::new(axis.line_len().clamp(1, ROW_TILE));
            let tile = tile.as_mut_slice();
            for (line, row) in rows(axis).enumerate() {
                let mut state = RowState::default();
                for x in x[row].chunks(ROW_TILE) {
                    let part = row::fold(simd, x, &mut tile[..x.len()], formula);
                    state = state.merge_scaled(part, formula.scale.scale);
                }
                visit(line, state);
            }
            return;
        }
        let panels = LinePanels::new(axis, panel_lines::<S, T>(axis), 0);
        let mut buffer = AlignedBuffer::new(PanelScratch::len::<S>(panels.widest(), axis.line_len(), false));
        let mut scratch = PanelScratch::new::<S>(buffer.as_mut_slice(), panels.widest(), axis.line_len(), false);
        for (line, panel) in panels {
            column::states(simd, x, panel, &mut scratch, formula, |i, state| visit(line + i, state));
        }
    }
}

fn rows(axis: Axis) -> impl Iterator<Item = std::ops::Range<usize>> {
    let len = axis.line_len();
    (0..axis.before()).map(move |b| b * len..(b + 1) * len)
}

/// The lines of a panel. An array larger than the second cache is read in runs of 1 KiB per row: 64 MiB take 1.6 ms, and 2.4
/// ms with runs of 256 bytes. A smaller array has panels of a single strip, and so a smaller tile.
fn panel_lines<S: Simd, T>(axis: Axis) -> usize {
    const LARGE_BYTES: usize = 8 << 20;
    if axis.elements() * size_of::<T>() >= LARGE_BYTES { 1024 / size_of::<T>() } else { WIDE * S::LANES }
}

/// f32 numbers in a cache line.
const LINE_NUMBERS: usize = LINE / size_of::<f32>();

/// Memory for tiles and states, aligned to cache lines, because loads and stores across two cache lines take longer.
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
