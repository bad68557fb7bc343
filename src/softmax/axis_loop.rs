//! The loops over the lines of an axis: rows for the last axis, panels of lines for any other. They also pick the number of
//! workers, and whether the output is streamed past the caches.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::buffers::{Buffers, Stored};
use super::column::{self, Blocks};
use super::line_states::PanelScratch;
use super::lines::{BLOCK, LinePanels, Lines};
use super::row::{self, Rows};
use super::row_state::RowState;
use super::scale::Formula;
use super::scratch::{LINE_NUMBERS, Scratch, Small};
use super::sealed::{Made, Sealed};
use super::shared::{Counter, Panel, Share, Shared};
use super::short_rows::SHORT;
use super::strips::WIDE;
use crate::element::Element;
use crate::simd::{Isa, Kernel, LINE, Simd, Streaming};
use crate::threads::{Worth, work_through, workers};
use std::ops::Range;

/// The largest scratch of a panel that holds all exponentials, in numbers: 10 MiB, which fits a common third-level cache.
const MAX_PANEL_NUMBERS: usize = 10 << 18;

/// The output of an array of at least this size is streamed past the caches: half of a common third-level cache.
const STREAM_BYTES: usize = 16 << 20;

/// With fewer elements than this, the caller works alone. They take some 20 µs.
const PARALLEL_ELEMENTS: usize = 1 << 16;

/// With fewer elements than this, a caller outside the pool does not wake sleeping threads. They take some 0.2 ms: see
/// `WAKING_WORK` of `plan/tuning.rs`.
const WAKING_ELEMENTS: usize = 1 << 19;

/// The fewest elements that one of several workers claims of the last axis: some 6 µs.
const LEAST_CLAIM: usize = 1 << 14;

/// Claims for each worker. With 8, workers wait for the last one for at most an eighth of the time.
const CLAIMS_PER_WORKER: usize = 8;

/// Gets the number of each line and its state, from any worker.
pub(super) type VisitState<'a> = &'a (dyn Fn(usize, RowState) + Sync);

/// The threads that an array is worth.
pub(super) fn worth(axis: Axis) -> Worth {
    match axis.elements() {
        0..PARALLEL_ELEMENTS => Worth::Caller,
        PARALLEL_ELEMENTS..WAKING_ELEMENTS => Worth::Awake,
        WAKING_ELEMENTS.. => Worth::Waking,
    }
}

/// Whether an array is worth several threads.
#[cfg(feature = "capi")]
pub(crate) fn is_parallel(axis: Axis) -> bool {
    worth(axis) != Worth::Caller
}

/// The rows of the last axis, for `workers` workers.
pub(super) fn rows_for(axis: Axis, workers: usize) -> Counter {
    let least = LEAST_CLAIM.div_ceil(axis.line_len().max(1));
    let step = if workers == 1 { axis.before() } else { (axis.before() / (workers * CLAIMS_PER_WORKER)).max(least) };
    Counter::new(Lines::Rows(axis), step)
}

/// Panels of at most `max_lines` lines of another axis, for `workers` workers.
pub(super) fn panels_for(axis: Axis, max_lines: usize, head: usize, workers: usize) -> Counter {
    if workers == 1 {
        let lines = Lines::Panels(LinePanels::new(axis, max_lines, head));
        return Counter::new(lines, lines.count());
    }
    // Whole cache lines, so that no two workers write to one.
    let share = (axis.lines() / (workers * CLAIMS_PER_WORKER)).next_multiple_of(LINE).max(LINE);
    let lines = Lines::Panels(LinePanels::new(axis, max_lines.min(share), head));
    Counter::new(lines, (lines.count() / (workers * CLAIMS_PER_WORKER)).max(1))
}

/// Computes the lines of `buffers` on `workers` workers. `compute` is a reference, because as a type parameter it was compiled into each
/// way of `threads.rs` to call it.
pub(super) fn compute_shares<T: Send + Sync>(
    buffers: Buffers<'_, T>,
    counter: Counter,
    (worth, workers): (Worth, usize),
    compute: &(dyn Fn(Share<'_, T>, &mut Scratch) + Sync),
) {
    let shared = Shared::new(buffers, counter);
    if worth == Worth::Caller {
        // A short row is computed in less time than it takes to claim it.
        return compute(shared.into_whole(), &mut Scratch::default());
    }
    with_scratch(workers, |scratch| {
        work_through(worth, scratch, &shared, &|share, scratch: &mut Scratch| compute(share, scratch))
    });
}

/// Visits the units of a counter on `workers` workers.
pub(super) fn visit_units(
    counter: Counter,
    (worth, workers): (Worth, usize),
    visit: &(dyn Fn(Range<usize>, &mut Scratch) + Sync),
) {
    with_scratch(workers, |scratch| {
        work_through(worth, scratch, &counter, &|units, scratch: &mut Scratch| visit(units, scratch))
    });
}

/// Scratch memory of each worker. One worker needs no list of them.
fn with_scratch(workers: usize, run: impl FnOnce(&mut [Scratch])) {
    if workers == 1 {
        run(&mut [Scratch::default()]);
    } else {
        run(&mut vec![Scratch::default(); workers]);
    }
}

/// What to compute of each line.
#[derive(Clone, Copy)]
pub(super) struct Options<'a> {
    pub(super) formula: Formula,
    /// Softmax is multiplied by the number of its line.
    pub(super) upstream: Option<&'a [f32]>,
    /// For the last axis, it gets the state of each row.
    pub(super) visit: Option<VisitState<'a>>,
}

impl Options<'_> {
    pub(super) fn new(formula: Formula) -> Self {
        Self { formula, upstream: None, visit: None }
    }
}

/// Softmax along an axis, or log_softmax.
pub(super) fn softmax<T: Stored>(
    isa: Isa,
    mut buffers: Buffers<'_, T>,
    axis: Axis,
    worth: Worth,
    options: Options<'_>,
) {
    if axis.elements() == 0 {
        return;
    }
    let workers = workers(worth, axis.lines());
    let large = is_large::<T>(axis.elements());
    let (counter, stream) = if axis.after() == 1 {
        // In place, a row is still in the first cache when it is written, so streaming would not help. Short rows are computed in less
        // time without it: 0.86 ns an element instead of 0.94 for rows of 64 (Zen 3, transposed), 0.31 instead of 0.46 or more for
        // rows of 100 (Zen 4, in registers).
        (rows_for(axis, workers), large && axis.line_len() > SHORT && matches!(buffers, Buffers::Into { .. }))
    } else {
        // The cache lines of all rows must start at the same column.
        let stream = large && (axis.after() * size_of::<T>()).is_multiple_of(LINE);
        let head = if stream { buffers.output().as_ptr().align_offset(LINE) } else { 0 };
        (panels_for(axis, panel_lines::<T>(isa, axis), head, workers), stream)
    };
    compute_shares(buffers, counter, (worth, workers), &|share, scratch| {
        isa.run(Softmax { share, scratch, options, stream })
    });
}

/// [`softmax`] of the lines of a share.
struct Softmax<'a, 'c, T> {
    share: Share<'c, T>,
    scratch: &'a mut Scratch,
    options: Options<'a>,
    stream: bool,
}

// A kernel has no vector code in closures, because a closure that is not inlined is compiled without the level's instructions.
// The closures below only hand over numbers.
impl<T: Stored> Kernel for Softmax<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { mut share, scratch, options: Options { formula, upstream, visit }, stream } = self;
        let mut small = Small::default();
        // It fences when it is dropped.
        let streaming = if stream { Some(Streaming::new(simd)) } else { None };
        let streaming = streaming.as_ref();
        match share.lines() {
            Lines::Rows(axis) => {
                let units = share.units();
                let upstream = upstream.map(|upstream| &upstream[units.clone()]);
                let rows = Rows { len: axis.line_len(), formula, upstream };
                let memory = scratch.numbers(&mut small, rows.scratch::<S, T>(units.len(), stream));
                row::softmax(simd, &mut share.rows(), rows, memory, streaming, |row, state| {
                    if let Some(visit) = visit {
                        visit(units.start + row, state);
                    }
                });
            }
            Lines::Panels(panels) => {
                let (widest, len) = (panels.widest(), panels.axis().line_len());
                let holds_all = PanelScratch::len::<S>(widest, len, true) <= MAX_PANEL_NUMBERS;
                let memory = scratch.numbers(&mut small, PanelScratch::len::<S>(widest, len, holds_all));
                let mut scratch = PanelScratch::new::<S>(memory, widest, len, holds_all);
                while let Some((place, mut buffers)) = share.next_panel() {
                    let upstream = upstream.map(|upstream| &upstream[place.line..][..place.panel.width]);
                    column::softmax(simd, &mut buffers, place.panel, &mut scratch, formula, upstream, streaming);
                }
            }
        }
    }
}

/// [`softmax`] of the lines of a panel whose rows are made block by block.
pub(super) fn softmax_of_made<T: Stored + Sealed<Real = f32>>(
    isa: Isa,
    made: Made<'_, T>,
    formula: Formula,
    scratch: &mut Scratch,
) {
    isa.run(SoftmaxOfMade { made, formula, scratch });
}

struct SoftmaxOfMade<'a, 's, T: Sealed<Real = f32>> {
    made: Made<'a, T>,
    formula: Formula,
    scratch: &'s mut Scratch,
}

impl<T: Stored + Sealed<Real = f32>> Kernel for SoftmaxOfMade<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { made: Made { panel, make, mut out, stream }, formula, scratch } = self;
        let (widest, mut small) = ((panel.width, panel.head), Small::default());
        let holds_all = PanelScratch::len::<S>(widest, panel.len, true) <= MAX_PANEL_NUMBERS;
        let own = PanelScratch::len::<S>(widest, panel.len, holds_all).next_multiple_of(LINE_NUMBERS);
        let (memory, block) = scratch.numbers(&mut small, own + panel.len.min(BLOCK) * panel.width).split_at_mut(own);
        let mut scratch = PanelScratch::new::<S>(memory, widest, panel.len, holds_all);
        // It fences when it is dropped.
        let streaming = if stream { Some(Streaming::new(simd)) } else { None };
        let blocks = Blocks::Made { make, memory: block };
        column::softmax_of_blocks(simd, blocks, &mut out, panel, &mut scratch, formula, streaming.as_ref());
    }
}

/// Whether an output of this size is streamed past the caches.
pub(super) fn is_large<T>(elements: usize) -> bool {
    elements.saturating_mul(size_of::<T>()) >= STREAM_BYTES
}

/// Hands the state of every line along an axis to `visit`.
pub(super) fn visit_states<T: Stored>(isa: Isa, x: &[T], axis: Axis, formula: Formula, visit: VisitState<'_>) {
    if axis.lines() == 0 {
        return;
    }
    if axis.line_len() == 0 {
        return (0..axis.lines()).for_each(|line| visit(line, RowState::default()));
    }
    let worth = worth(axis);
    let workers = workers(worth, axis.lines());
    let counter = if axis.after() == 1 {
        rows_for(axis, workers)
    } else {
        panels_for(axis, panel_lines::<T>(isa, axis), 0, workers)
    };
    let lines = counter.lines();
    visit_units(counter, (worth, workers), &|units, scratch| {
        isa.run(VisitStates { x, lines, units, scratch, formula, visit })
    });
}

/// [`visit_states`] of some units of the lines.
struct VisitStates<'a, T> {
    x: &'a [T],
    lines: Lines,
    units: Range<usize>,
    scratch: &'a mut Scratch,
    formula: Formula,
    visit: VisitState<'a>,
}

impl<T: Stored> Kernel for VisitStates<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, lines, units, scratch, formula, visit } = self;
        let mut small = Small::default();
        match lines {
            Lines::Rows(axis) => {
                let len = axis.line_len();
                let rows = Rows { len, formula, upstream: None };
                let memory = scratch.numbers(&mut small, rows.scratch_of_states::<S>(units.len()));
                let x = &x[units.start * len..units.end * len];
                row::states(simd, x, rows, memory, |row, state| visit(units.start + row, state));
            }
            Lines::Panels(panels) => {
                let (widest, len) = (panels.widest(), panels.axis().line_len());
                let memory = scratch.numbers(&mut small, PanelScratch::len::<S>(widest, len, false));
                let mut scratch = PanelScratch::new::<S>(memory, widest, len, false);
                for unit in units {
                    let place = panels.place(unit);
                    column::states(simd, Panel::new(x, place), place.panel, &mut scratch, formula, |i, state| {
                        visit(place.line + i, state)
                    });
                }
            }
        }
    }
}

/// Hands the state of each line of a panel, at scale 1, to `visit`, with its number in the panel.
pub(super) fn states_of_panel<T: Stored>(
    isa: Isa,
    x: Panel<'_, T>,
    scratch: &mut Scratch,
    visit: &mut dyn FnMut(usize, RowState),
) {
    isa.run(StatesOfPanel { x, scratch, visit });
}

struct StatesOfPanel<'a, T> {
    x: Panel<'a, T>,
    scratch: &'a mut Scratch,
    visit: &'a mut dyn FnMut(usize, RowState),
}

impl<T: Stored> Kernel for StatesOfPanel<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, scratch, visit } = self;
        let (panel, mut small) = (x.all(), Small::default());
        let widest = (panel.width, panel.head);
        let memory = scratch.numbers(&mut small, PanelScratch::len::<S>(widest, panel.len, false));
        let mut scratch = PanelScratch::new::<S>(memory, widest, panel.len, false);
        column::states(simd, x, panel, &mut scratch, Formula::new(1.0, false), visit);
    }
}

/// The lines of a panel. An array larger than the second cache is read in runs of 1 KiB per row: 64 MiB take 1.6 ms, and 2.4
/// ms with runs of 256 bytes. A smaller array has panels of a single strip, and so a smaller tile.
pub(super) fn panel_lines<T: Element>(isa: Isa, axis: Axis) -> usize {
    const LARGE_BYTES: usize = 8 << 20;
    if axis.elements() * size_of::<T>() >= LARGE_BYTES { 1024 / size_of::<T>() } else { WIDE * isa.lanes() }
}
