//! What masks and biases say about a tile, as the numbers by which the kernel adjusts its scores.

#![forbid(unsafe_code)]

use super::schedule::Work;
use crate::kernel::score_tensors::{BiasRow, PanelTensors, read_bias};
use crate::kernel::shape::MAX_PANEL_LANES;
use crate::kernel::tile::{Adjust, Unit};
use crate::mask::{common, hull};
use crate::tensor::any::AnyMatrix;
use std::ops::Range;

/// Query rows whose scores are adjusted together: the lanes of a panel, or a single row, for which `N` is 1: decoding makes
/// these for each row of a task, and [`Marks`] for each row of a tile.
#[derive(Clone, Debug)]
pub(super) struct Lanes<const N: usize = MAX_PANEL_LANES> {
    pub(super) rows: Range<usize>,
    /// Lanes computed; those without a row repeat the last one.
    pub(super) count: usize,
    /// All keys that any of the rows sees by its position.
    pub(super) span: Range<usize>,
    /// The keys that every one of them sees by its position.
    pub(super) common: Range<usize>,
    /// The keys that each lane sees by its position.
    intervals: [(usize, usize); N],
}

impl<const N: usize> Lanes<N> {
    pub(super) fn new(work: Work<'_>, rows: Range<usize>, count: usize) -> Self {
        let first = work.interval(rows.start);
        let mut intervals = [(first.start, first.end); N];
        if !work.problem.mask.goes_by_position() {
            return Lanes { rows, count, span: first.clone(), common: first, intervals };
        }
        for (interval, r) in intervals.iter_mut().zip(rows.clone()) {
            let Range { start, end } = work.interval(r);
            *interval = (start, end);
        }
        let last = intervals[rows.len() - 1];
        intervals[rows.len()..count].fill(last);
        let each = || intervals[..rows.len()].iter().map(|&(start, end)| start..end);
        Lanes { span: hull(each()), common: common(each()), rows, count, intervals }
    }

    /// Whether every row sees all of `keys` by its position.
    fn see_all(&self, keys: &Range<usize>) -> bool {
        self.common.start <= keys.start && keys.end <= self.common.end
    }

    /// Those of `keys` that any of the rows sees by its position.
    pub(super) fn seen(&self, keys: &Range<usize>) -> Range<usize> {
        keys.start.max(self.span.start)..keys.end.min(self.span.end)
    }

    /// The row of each lane.
    fn row(&self, lane: usize) -> usize {
        (self.rows.start + lane).min(self.rows.end - 1)
    }

    /// `keys`, which lie inside the span, cut at the ends of what all lanes see.
    pub(super) fn parts(&self, keys: &Range<usize>) -> [Range<usize>; 3] {
        let start = self.common.start.clamp(keys.start, keys.end);
        let end = self.common.end.clamp(start, keys.end);
        [keys.start..start, start..end, end..keys.end]
    }
}

/// What holds for some lanes and the keys of a tile.
pub(super) struct Marks<'l, const N: usize> {
    lanes: &'l Lanes<N>,
    unit: Unit,
    softcap: Option<f32>,
    only_hides: bool,
    /// The first key that is adjusted, and the first one of its tile.
    first: usize,
    tile_start: usize,
    /// First visible key of each lane and the one after its last, counted from the tile's first key; not filled in where all
    /// lanes see all keys.
    visible: [[f32; N]; 2],
    /// Slope and position of each lane.
    alibi: Option<[[f32; N]; 2]>,
}

impl<'l, const N: usize> Marks<'l, N> {
    pub(super) fn new(work: Work<'_>, lanes: &'l Lanes<N>, keys: &Range<usize>, unit: Unit) -> Self {
        // Counted from the tile's first key, numbers are small and so exact as f32; a bound outside may stand at the edge.
        // (A position may be far away, and rounded: but the same way for a key of the tile whichever rows are beside it.)
        let tile_start = keys.start / work.plan.tile_keys * work.plan.tile_keys;
        let within = |key: usize| (key.clamp(keys.start, keys.end) - tile_start) as f32;
        let mut visible = [[0.0; N]; 2];
        if !lanes.see_all(keys) {
            for (lane, &(start, end)) in lanes.intervals[..lanes.count].iter().enumerate() {
                (visible[0][lane], visible[1][lane]) = (within(start), within(end));
            }
        }
        let alibi = work.problem.bias.alibi.map(|_| {
            let slope = |lane| work.problem.bias.slope(work.head_and_query(lanes.row(lane)).0).unwrap_or(0.0);
            let position = |lane| (work.position(lanes.row(lane)) - tile_start as i128) as f32;
            [std::array::from_fn(slope), std::array::from_fn(position)]
        });
        let softcap = work.problem.bias.softcap;
        let only_hides = work.problem.bias.tensor.is_none();
        Marks { lanes, unit, softcap, only_hides, first: keys.start, tile_start, visible, alibi }
    }

    /// What the kernel is to do with a part of the keys; `bias` is that of all of them, laid out as the scores are.
    pub(super) fn adjust<'a>(&'a self, part: &Range<usize>, bias: Option<&'a [f32]>) -> Adjust<'a> {
        let count = self.lanes.count;
        let lanes = |x: &'a [f32; N]| &x[..count];
        Adjust {
            unit: self.unit,
            softcap: self.softcap,
            bias: bias.map(|bias| &bias[(part.start - self.first) * count..]),
            only_hides: self.only_hides,
            first: part.start - self.tile_start,
            alibi: self.alibi.as_ref().map(|[slope, position]| (lanes(slope), lanes(position))),
            visible: (!self.lanes.see_all(part)).then(|| (lanes(&self.visible[0]), lanes(&self.visible[1]))),
        }
    }
}

/// Reads what the bias and mask tensors say about `keys`, one row for each lane that has one, `[rows][width]`; returns
/// whether they leave any key visible.
pub(super) fn read_tensors<const N: usize>(
    work: Work<'_>,
    lanes: &Lanes<N>,
    keys: &Range<usize>,
    (to, width): (&mut [f32], usize),
) -> bool {
    let mut any = false;
    for (to, r) in to.chunks_exact_mut(width).zip(lanes.rows.clone()) {
        let ((h, i), b) = (work.head_and_query(r), work.task.batch);
        let from = BiasRow {
            row: i,
            keys: keys.clone(),
            bias: work.problem.bias.tensor.as_ref().map(|tensor| AnyMatrix::new(tensor, b, h)),
            mask: work.problem.mask.tensor.as_ref().map(|tensor| tensor.matrix(b, h)),
        };
        any |= read_bias(work.plan.isa, from, &mut to[..keys.len()]);
    }
    any
}

/// What tensors say about `keys` for the lanes of a panel.
///
/// * `rows`: `[lanes][keys]` or more, for tensors whose rows have gaps
pub(super) fn panel_tensors<'a>(
    work: Work<'a>,
    lanes: &Lanes,
    keys: &Range<usize>,
    rows: &'a mut [f32],
) -> PanelTensors<'a> {
    let place = |lane| {
        let (h, i) = work.head_and_query(lanes.rows.start + lane);
        [work.task.batch, h, i]
    };
    let (bias, mask) = (&work.problem.bias.tensor, &work.problem.mask.tensor);
    PanelTensors::new(bias.as_ref(), mask.as_ref(), keys.clone(), lanes.rows.len(), place).unwrap_or_else(|| {
        let rows = &mut rows[..lanes.rows.len() * keys.len()];
        read_tensors(work, lanes, keys, (&mut *rows, keys.len()));
        PanelTensors::of_rows(rows, lanes.rows.len(), bias.is_none())
    })
}
