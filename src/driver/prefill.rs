//! The many-queries form: a block of rows against tile after tile of keys.
//!
//! ```text
//! for each panel of the block:            pack its queries, clear its state
//! for each tile of the block's keys:      pack the values (and the keys, if they are narrower than f32)
//!     for each panel that sees the tile:  scores -> adjust -> weights -> values
//! for each panel:                         divide, write its rows
//! ```

#![forbid(unsafe_code)]

use super::marks::{Lanes, Marks, has_score_tensor};
use super::output::{Output, Rows};
use super::schedule::{Schedule, Task};
use super::threads::{fan_out, workers};
use super::workspace::{Scratch, Workspace, even_out, for_workers};
use crate::kernel::adjust::{Unit, adjust_panel, query_factor};
use crate::kernel::finish::{finish, log_sum_exp};
use crate::kernel::load::AnyMatrix;
use crate::kernel::pack::{ValueBlocks, into_lanes, pack_queries, pack_values, widen_rows};
use crate::kernel::scores;
use crate::kernel::values::{add_values, add_visible_values};
use crate::kernel::weights::{PanelState, weights};
use crate::kernel::{MAX_PANEL_LANES, round_up_lanes};
use crate::mask::{Verdict, hull};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::strided::Matrix;
use std::ops::Range;

pub(super) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    schedule: &Schedule,
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    let workers = workers(plan.parallel, schedule.tasks().len());
    let shared = output.share(schedule);
    let scratch = for_workers(&mut workspace.scratch, workers);
    fan_out(scratch, &|scratch| {
        while let Some(rows) = shared.draw() {
            run_task(problem, plan, rows, scratch);
        }
    });
    even_out(scratch);
}

/// Some query rows side by side in the lanes.
#[derive(Clone, Debug)]
pub(super) struct Panel {
    lanes: Lanes,
    /// All keys that any of the rows sees by its position.
    span: Range<usize>,
    state: PanelState,
}

/// A worker's buffers for one task.
struct Buffers<'a> {
    /// `[panels][head_dim rounded up][lanes]`
    queries: &'a mut [f32],
    /// `[panels][value_dim rounded up][lanes]`
    out: &'a mut [f32],
    tile: TileBuffers<'a>,
    /// Rows on their way into lanes or out of them.
    stage: &'a mut [f32],
}

/// What is filled anew for each tile.
struct TileBuffers<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
    /// `[keys][lanes]`: scores, then weights.
    scores: &'a mut [f32],
    /// The scores, kept where the weights alone don't tell hidden keys from faint ones.
    kept_scores: &'a mut [f32],
    /// Bias and boolean mask, `[keys rounded up][lanes]`.
    bias: &'a mut [f32],
}

fn run_task(problem: &Problem<'_>, plan: &Plan, mut rows: Rows<'_>, scratch: &mut Scratch) {
    let task = rows.task();
    let dims = &problem.dims;
    let panels = &mut scratch.panels;
    list_panels(problem, plan, task, panels);

    let lanes = plan.panel_lanes;
    let (width, value_width) = (round_up_lanes(dims.head_dim), round_up_lanes(dims.value_dim));
    let tile = round_up_lanes(plan.tile_keys);
    let keys = AnyMatrix::new(&problem.k, task.batch, task.head_kv);
    let values = AnyMatrix::new(&problem.v, task.batch, task.head_kv);
    let [queries, out, tile_keys, tile_values, scores, kept_scores, bias, stage] = scratch.floats.buffers([
        panels.len() * width * lanes,
        panels.len() * value_width * lanes,
        if keys.in_place().is_some() { 0 } else { plan.tile_keys * dims.head_dim },
        ValueBlocks::new(plan.isa, plan.tile_keys, dims.value_dim).len(),
        tile * lanes,
        tile * lanes,
        if has_score_tensor(problem) { tile * lanes } else { 0 },
        lanes * width.max(value_width).max(tile),
    ]);
    let tile = TileBuffers { keys: tile_keys, values: tile_values, scores, kept_scores, bias };
    let mut buffers = Buffers { queries, out, tile, stage };

    // 1. Queries into lanes.
    let factor = query_factor(problem.scale, problem.bias.softcap, Unit::Log2);
    for (panel, queries) in panels.iter().zip(buffers.queries.chunks_mut((width * lanes).max(1))) {
        let row = |lane| {
            let (h, i) = task.head_and_query(panel.lanes.rows.start + lane, dims.group());
            (AnyMatrix::new(&problem.q, task.batch, h), i)
        };
        let queries = &mut queries[..width * panel.lanes.count];
        pack_queries(plan.isa, row, (panel.lanes.rows.len(), panel.lanes.count), factor, queries, buffers.stage);
    }
    buffers.out.fill(0.0);

    // 2. Tile after tile. Tiles start at multiples of their size, wherever the span does.
    let mut start = task.keys.start / plan.tile_keys * plan.tile_keys;
    while start < task.keys.end {
        let tile = start.max(task.keys.start)..(start + plan.tile_keys).min(task.keys.end);
        run_tile(problem, plan, task, (keys, values), tile, panels, &mut buffers);
        start += plan.tile_keys;
    }

    // 3. Lanes into rows.
    for (p, panel) in panels.iter().enumerate() {
        let out = &mut buffers.out[p * value_width * lanes..][..value_width * panel.lanes.count];
        let stage = &mut buffers.stage[..value_width * panel.lanes.count];
        finish(plan.isa, out, panel.lanes.count, &panel.state, stage);
        for (lane, r) in panel.lanes.rows.clone().enumerate() {
            let lse = log_sum_exp(panel.state.max[lane], panel.state.sum[lane]);
            rows.write(plan.isa, r, &stage[lane * value_width..][..dims.value_dim], lse);
        }
    }
}

/// Cuts the rows of `task` into panels: full ones, and at the end one of as many vectors as are needed.
fn list_panels(problem: &Problem<'_>, plan: &Plan, task: &Task, panels: &mut Vec<Panel>) {
    panels.clear();
    for start in task.rows.clone().step_by(plan.panel_lanes) {
        let rows = start..(start + plan.panel_lanes).min(task.rows.end);
        let count = round_up_lanes(rows.len());
        let lanes = Lanes::new(problem, plan, task, rows, count);
        panels.push(Panel { span: hull(lanes.intervals()), lanes, state: PanelState::EMPTY });
    }
}

/// All panels against one tile of keys.
fn run_tile(
    problem: &Problem<'_>,
    plan: &Plan,
    task: &Task,
    (keys, values): (AnyMatrix<'_>, AnyMatrix<'_>),
    tile: Range<usize>,
    panels: &mut [Panel],
    buffers: &mut Buffers<'_>,
) {
    let (isa, dims) = (plan.isa, &problem.dims);
    let blocks = ValueBlocks::new(isa, tile.len(), dims.value_dim);
    let spare = &mut buffers.stage[..dims.value_dim];
    let finite = pack_values(isa, values.slice_rows(tile.clone()), blocks, buffers.tile.values, spare);
    let keys = keys.slice_rows(tile.clone());
    let keys = keys.in_place().unwrap_or_else(|| {
        let wide = &mut buffers.tile.keys[..tile.len() * dims.head_dim];
        widen_rows(isa, keys, wide);
        Matrix::from_slice(wide, tile.len(), dims.head_dim)
    });
    let (width, value_width) = (round_up_lanes(dims.head_dim), round_up_lanes(dims.value_dim));
    for (p, panel) in panels.iter_mut().enumerate() {
        // The keys of the tile that this panel sees, and where they start in the tile.
        let seen = tile.start.max(panel.span.start)..tile.end.min(panel.span.end);
        if seen.is_empty() {
            continue;
        }
        let first = seen.start - tile.start;
        let lanes = panel.lanes.count;
        let queries = &buffers.queries[p * width * plan.panel_lanes..][..width * lanes];
        let out = &mut buffers.out[p * value_width * plan.panel_lanes..][..value_width * lanes];
        let scores = &mut buffers.tile.scores[..seen.len() * lanes];

        // 1. What the mask and the biases say.
        let row_len = round_up_lanes(seen.len());
        let stage = &mut *buffers.stage;
        let marks = Marks::read(problem, task, &panel.lanes, &seen, Unit::Log2, (&mut *stage, row_len));
        if marks.verdict == Verdict::Hidden {
            continue;
        }
        let bias = has_score_tensor(problem).then(|| {
            let bias = &mut buffers.tile.bias[..row_len * lanes];
            into_lanes(isa, &stage[..row_len * lanes], lanes, bias);
            &*bias
        });

        // 2. Scores, as the softmax is to see them.
        let mut max = [f32::NEG_INFINITY; MAX_PANEL_LANES];
        let max = &mut max[..lanes];
        scores::scores(isa, keys.slice_rows(first..first + seen.len()), queries, scores, max);
        let adjust = marks.adjust(bias);
        if !adjust.is_none() {
            adjust_panel(isa, adjust, scores, max);
        }

        // 3. Weights and values. A hidden key's weight is 0, which is enough unless its value is not finite. (Even in a full
        // tile: a score that overflowed to -inf hides its key, too.)
        let packed = (&*buffers.tile.values, blocks, first);
        if finite {
            weights(isa, scores, max, &mut panel.state, out);
            add_values(isa, packed, scores, out, lanes);
        } else {
            let kept = &mut buffers.tile.kept_scores[..seen.len() * lanes];
            kept.copy_from_slice(scores);
            weights(isa, scores, max, &mut panel.state, out);
            add_visible_values(isa, packed, (scores, kept), out, lanes);
        }
    }
}
