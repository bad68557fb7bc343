//! The parameters of masks and score modifications for some rows and the keys of a tile.

#![forbid(unsafe_code)]

use super::shape::MAX_PANEL_LANES;
use super::task::TaskInput;
use super::tile::TileMods;
use crate::mask::cover::{SpanCover, union};
use std::ops::Range;

/// Rows whose scores are modified together, and the span of each: the lanes of a panel in prefill, a single row (`N` is 1) in
/// decode.
#[derive(Clone, Debug)]
pub(crate) struct LaneSpans<const N: usize = MAX_PANEL_LANES> {
    /// The rows, counted within the task.
    pub(crate) rows: Range<usize>,
    /// The number of lanes computed. Lanes without a row repeat the last row.
    pub(crate) count: usize,
    /// The cover of the rows' spans.
    pub(crate) cover: SpanCover,
    /// The span of each lane: first visible key, and the one after the last.
    spans: [(usize, usize); N],
}

impl<const N: usize> LaneSpans<N> {
    pub(crate) fn new(task: &TaskInput<'_>, rows: Range<usize>, count: usize) -> Self {
        let first = task.row_span(rows.start);
        let mut spans = [(first.start, first.end); N];
        if !task.masks.spans_differ() {
            let cover = SpanCover { span: first.clone(), full: first };
            return LaneSpans { rows, count, cover, spans };
        }
        for (span, n) in spans.iter_mut().zip(rows.clone()) {
            let Range { start, end } = task.row_span(n);
            *span = (start, end);
        }
        let last = spans[rows.len() - 1];
        spans[rows.len()..count].fill(last);
        let cover = SpanCover::new(spans[..rows.len()].iter().map(|&(start, end)| start..end));
        LaneSpans { rows, count, cover, spans }
    }

    /// The smallest run of `keys` that holds what the lanes `lanes`, which have rows, see of them, counted from the first key.
    pub(crate) fn seen_by(&self, lanes: Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let within =
            |&(start, end): &(usize, usize)| start.clamp(keys.start, keys.end)..end.clamp(keys.start, keys.end);
        let seen = union(self.spans[lanes].iter().map(within));
        seen.start.saturating_sub(keys.start)..seen.end.saturating_sub(keys.start)
    }

    /// The row of each lane.
    pub(super) fn row(&self, lane: usize) -> usize {
        (self.rows.start + lane).min(self.rows.end - 1)
    }
}

/// The parameters of masks and score modifications for some lanes and the keys of a tile.
pub(crate) struct LaneMods<'l, 't, 'a, const N: usize> {
    task: &'t TaskInput<'a>,
    lanes: &'l LaneSpans<N>,
    /// The first of the keys, and the first key of their tile.
    first: usize,
    tile_start: usize,
    /// First visible key of each lane and the one after the last, counted from the tile's first key. Not filled in if all lanes
    /// see all keys.
    visible: [[f32; N]; 2],
    /// Slope and position of each lane.
    alibi: Option<[[f32; N]; 2]>,
}

impl<'l, 't, 'a, const N: usize> LaneMods<'l, 't, 'a, N> {
    pub(crate) fn new(task: &'t TaskInput<'a>, lanes: &'l LaneSpans<N>, keys: &Range<usize>) -> Self {
        // Counted from the tile's first key, key indices are small, so they are exact as f32. Bounds outside the tile are moved
        // to its edge. A distant position may be rounded, but its rounding depends on the row and the tile alone.
        let tile_start = keys.start / task.tile_keys * task.tile_keys;
        let within = |key: usize| (key.clamp(keys.start, keys.end) - tile_start) as f32;
        let mut visible = [[0.0; N]; 2];
        if !lanes.cover.is_full(keys) {
            for (lane, &(start, end)) in lanes.spans[..lanes.count].iter().enumerate() {
                (visible[0][lane], visible[1][lane]) = (within(start), within(end));
            }
        }
        let alibi = task.score_mods.alibi.map(|_| {
            let slope = |lane| task.slope(lanes.row(lane));
            let position = |lane| (task.position(lanes.row(lane)) - tile_start as i128) as f32;
            [std::array::from_fn(slope), std::array::from_fn(position)]
        });
        LaneMods { task, lanes, first: keys.start, tile_start, visible, alibi }
    }

    /// The modifications for the keys `part`. `bias` is the bias of all keys, in the layout of the scores.
    pub(crate) fn part<'m>(&'m self, part: &Range<usize>, bias: Option<&'m [f32]>) -> TileMods<'m> {
        let count = self.lanes.count;
        let lanes = |x: &'m [f32; N]| &x[..count];
        TileMods {
            unit: self.task.unit,
            softcap: self.task.score_mods.softcap,
            bias: bias.map(|bias| &bias[(part.start - self.first) * count..]),
            only_hides: self.task.bias_rows.is_none(),
            first: part.start - self.tile_start,
            alibi: self.alibi.as_ref().map(|[slope, position]| (lanes(slope), lanes(position))),
            visible: (!self.lanes.cover.is_full(part)).then(|| (lanes(&self.visible[0]), lanes(&self.visible[1]))),
        }
    }
}
