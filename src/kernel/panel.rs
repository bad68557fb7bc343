//! Panels: query rows side by side in the lanes.

#![forbid(unsafe_code)]

use super::lanes::LaneSpans;
use super::shape::{RowSet, panel_lanes};
use super::state::PanelState;
use super::task::TaskInput;
use std::ops::Range;

/// A panel of a task.
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub(super) lanes: LaneSpans,
    pub(super) state: PanelState,
    /// Whether values have been added to the panel's output. Before that, the output holds stale data.
    pub(super) started: bool,
    /// Lanes whose queries are outside the range of pairs, one bit each. Their scores are formed from f32.
    pub(super) f32_lanes: RowSet,
}

/// Cuts the rows of a task into panels. The last panel has only the vectors that it needs.
pub(super) fn list_panels(task: &TaskInput<'_>, panels: &mut Vec<Panel>) {
    panels.clear();
    let full = panel_lanes(task.isa);
    for start in (0..task.rows).step_by(full) {
        let rows = start..(start + full).min(task.rows);
        let count = rows.len().next_multiple_of(task.isa.lanes());
        let lanes = LaneSpans::new(task, rows, count);
        panels.push(Panel { lanes, state: PanelState::EMPTY, started: false, f32_lanes: 0 });
    }
}

/// The place of each panel in a worker's buffers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Steps of a score (elements of a query, or pairs of them) and value_dim, rounded up to vectors.
    pub(super) width: usize,
    pub(super) value_width: usize,
    /// Lanes of a full panel.
    pub(super) panel_lanes: usize,
}

impl Layout {
    /// The packed queries of panel `p`, which has `lanes` lanes: `[width][lanes]`.
    pub(super) fn queries(self, p: usize, lanes: usize) -> Range<usize> {
        let start = p * self.width * self.panel_lanes;
        start..start + self.width * lanes
    }

    /// Its output: `[value_width][lanes]`.
    pub(super) fn out(self, p: usize, lanes: usize) -> Range<usize> {
        let start = p * self.value_width * self.panel_lanes;
        start..start + self.value_width * lanes
    }
}
