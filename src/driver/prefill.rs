//! The many-queries form: a block of rows against tile after tile of keys.
//!
//! ```text
//! for each panel of the block:            pack its queries
//! for each tile of the block's keys:      pack the values (and the keys, if they can't be read in place)
//!     for each panel that sees the tile:  scores -> adjust -> weights -> values
//! for each panel:                         divide, write its rows
//! ```

#![forbid(unsafe_code)]

use super::ahead::{add_score_tensors, next_task, next_tile};
use super::marks::{Lanes, Marks, panel_tensors};
use super::output::{Output, Rows};
use super::schedule::{Schedule, Work};
use super::threads::{fan_out, workers};
use super::workspace::{Scratch, Workspace, even_out, for_workers};
use crate::kernel::bf16_pairs::key_pairs;
use crate::kernel::decode::scores::{self as few, RowKeys};
use crate::kernel::prefetch::Ahead;
use crate::kernel::prefill::pack::{ValueBlocks, pack_values};
use crate::kernel::prefill::scores::{self, PanelKeys};
use crate::kernel::prefill::softmax::weights;
use crate::kernel::prefill::values::{add_values, add_values_in_place, add_visible_values};
use crate::kernel::product::parts;
use crate::kernel::shape::{MAX_PANEL_LANES, panel_product_rows, round_up_lanes};
use crate::kernel::state::PanelState;
use crate::kernel::tile::{Unit, adjust_panel};
use crate::kernel::transpose::{gather_into_lanes, gather_pairs_into_lanes};
use crate::kernel::widen::{as_f32, widen_gathered, without_gaps};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::simd::Isa;
use crate::tensor::any::AnyMatrix;
use std::ops::Range;

pub(super) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    schedule: &Schedule,
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    let workers = workers(plan.parallel, schedule.tasks().len());
    let shared = output.share(problem, plan, schedule);
    let scratch = for_workers(&mut workspace.scratch, workers);
    fan_out(scratch, &|scratch| {
        while let Some(rows) = shared.draw() {
            run_task(rows, shared.peek(), scratch);
        }
    });
    even_out(scratch);
}

/// Some query rows side by side in the lanes.
#[derive(Clone, Debug)]
pub(super) struct Panel {
    lanes: Lanes,
    state: PanelState,
    /// Whether values have been summed: before, its part of the buffer holds anything.
    started: bool,
    /// Lanes whose scores must not be formed from pairs, one bit each.
    unfit: u32,
}

/// Where a panel's part of a worker's buffers lies.
#[derive(Clone, Copy)]
struct Layout {
    /// Steps of a score (elements of a query, or pairs of them) and value_dim, rounded up to vectors.
    width: usize,
    value_width: usize,
    /// Lanes of a full panel.
    panel_lanes: usize,
}

impl Layout {
    /// The packed queries of panel `p`, which has `lanes` lanes: `[width][lanes]`.
    fn queries(self, p: usize, lanes: usize) -> Range<usize> {
        let start = p * self.width * self.panel_lanes;
        start..start + self.width * lanes
    }

    /// Its output: `[value_width][lanes]`.
    fn out(self, p: usize, lanes: usize) -> Range<usize> {
        let start = p * self.value_width * self.panel_lanes;
        start..start + self.value_width * lanes
    }
}

/// What a worker fills anew for each panel and tile.
struct Spare<'a> {
    /// `[keys][lanes]`: scores, then weights.
    scores: &'a mut [f32],
    /// The scores, kept where the weights alone don't tell hidden keys from faint ones.
    kept_scores: &'a mut [f32],
    /// Bias and boolean mask of each lane, where the tensors' rows have gaps: `[lanes][keys]`.
    tensor_rows: &'a mut [f32],
    /// Rows on their way into lanes or out of them.
    stage: &'a mut [f32],
}

/// A tile of keys and values, ready for every panel.
struct Tile<'a> {
    range: Range<usize>,
    keys: PanelKeys<'a>,
    values: TileValues<'a>,
}

/// The values of a tile.
enum TileValues<'a> {
    /// For several panels.
    Packed(Values<'a>),
    /// As they lie in memory, for a lone panel, and where to pack them should they not be finite.
    InPlace(AnyMatrix<'a>, &'a mut [f32]),
}

/// Packed values.
#[derive(Clone, Copy)]
struct Values<'a> {
    packed: &'a [f32],
    blocks: ValueBlocks,
    /// Whether all of them are finite.
    finite: bool,
}

fn run_task(mut rows: Rows<'_>, next: Option<Work<'_>>, scratch: &mut Scratch) {
    let work = rows.work();
    let Work { problem, plan, task } = work;
    let (isa, dims) = (plan.isa, &problem.dims);
    let panels = &mut scratch.panels;
    list_panels(work, panels);

    let steps = work.score_steps();
    let panel_lanes = plan.panel_lanes();
    let layout = Layout { width: round_up_lanes(steps), value_width: round_up_lanes(dims.value_dim), panel_lanes };
    let tile_rows = round_up_lanes(plan.tile_keys);
    let [queries, out, wide_keys, wide_values, packed_values, scores, kept_scores, tensor_rows, stage] =
        scratch.floats.buffers([
            panels.len() * layout.width * panel_lanes,
            panels.len() * layout.value_width * panel_lanes,
            if work.keys().in_place().is_some() { 0 } else { plan.tile_keys * steps },
            if work.values().has_contiguous_rows() { 0 } else { plan.tile_keys * dims.value_dim },
            ValueBlocks::new(isa, plan.tile_keys, dims.value_dim).len(),
            tile_rows * panel_lanes,
            tile_rows * panel_lanes,
            if work.has_score_tensor() { tile_rows * panel_lanes } else { 0 },
            panel_lanes * round_up_lanes(dims.head_dim).max(layout.value_width).max(tile_rows),
        ]);
    let mut spare = Spare { scores, kept_scores, tensor_rows, stage };

    // 1. Queries into lanes.
    for (p, Panel { lanes, unfit, .. }) in panels.iter_mut().enumerate() {
        let to = (&mut queries[layout.queries(p, lanes.count)], lanes.count);
        let rows = work.queries(lanes.rows.clone());
        if work.uses_pairs() {
            *unfit = gather_pairs_into_lanes(isa, rows, to, spare.stage);
        } else {
            gather_into_lanes(isa, rows, work.query_factor(), to, spare.stage);
        }
    }

    // 2. Tile after tile. Tiles start at multiples of their size, wherever the span does.
    let mut start = task.keys.start / plan.tile_keys * plan.tile_keys;
    while start < task.keys.end {
        let range = start.max(task.keys.start)..(start + plan.tile_keys).min(task.keys.end);
        let mut ahead = if range.end < task.keys.end {
            next_tile(work, range.end..(range.end + plan.tile_keys).min(task.keys.end))
        } else {
            next_task(&rows, next)
        };
        let buffers = (&mut *wide_keys, &mut *wide_values, &mut *packed_values);
        let mut tile = prepare_tile(work, range, panels.len(), buffers);
        ahead.spread(panels.iter().map(|panel| free_parts(work, &panel.lanes, &tile.range)).sum());
        for (p, panel) in panels.iter_mut().enumerate() {
            let lanes = panel.lanes.count;
            let (queries, out) = (&queries[layout.queries(p, lanes)], &mut out[layout.out(p, lanes)]);
            run_panel(work, &mut tile, panel, queries, out, &mut spare, &mut ahead);
        }
        start += plan.tile_keys;
    }

    // 3. Lanes into rows.
    for (p, Panel { lanes, state, .. }) in panels.iter().enumerate() {
        let panel = (&out[layout.out(p, lanes.count)], lanes.count);
        rows.write_panel(lanes.rows.clone(), panel, state, spare.stage);
    }
}

/// Parts of the products that form the scores of `keys` keys for a panel of `lanes` lanes.
fn score_parts(work: Work<'_>, keys: usize, lanes: usize) -> usize {
    keys.div_ceil(panel_product_rows(work.plan.isa, lanes)) * parts(work.score_steps())
}

/// Parts of a panel's products over a tile that can ask for what comes after it: all that don't ask for bias and mask.
fn free_parts(work: Work<'_>, lanes: &Lanes, tile: &Range<usize>) -> usize {
    let keys = lanes.seen(tile).len();
    let scores = if work.has_score_tensor() { 0 } else { score_parts(work, keys, lanes.count) };
    let products = work.problem.dims.value_dim.div_ceil(panel_product_rows(work.plan.isa, lanes.count));
    scores + products * parts(keys)
}

/// Cuts the rows of a task into panels: full ones, and at the end one of as many vectors as are needed.
fn list_panels(work: Work<'_>, panels: &mut Vec<Panel>) {
    panels.clear();
    let all_rows = &work.task.rows;
    for start in all_rows.clone().step_by(work.plan.panel_lanes()) {
        let rows = start..(start + work.plan.panel_lanes()).min(all_rows.end);
        let count = rows.len().next_multiple_of(work.plan.isa.lanes());
        let lanes = Lanes::new(work, rows, count);
        panels.push(Panel { lanes, state: PanelState::EMPTY, started: false, unfit: 0 });
    }
}

/// Packs the values of a tile for several panels, and copies its keys if they can't be read in place.
fn prepare_tile<'a>(
    work: Work<'a>,
    range: Range<usize>,
    panels: usize,
    (wide_keys, wide_values, packed_values): (&'a mut [f32], &'a mut [f32], &'a mut [f32]),
) -> Tile<'a> {
    let isa = work.plan.isa;
    let values = without_gaps(isa, work.values().slice_rows(range.clone()), wide_values);
    let values = if panels == 1 && values.cols().is_multiple_of(isa.lanes()) {
        TileValues::InPlace(values, packed_values)
    } else {
        TileValues::Packed(Values::pack(isa, values, packed_values))
    };
    let keys = match work.keys().slice_rows(range.clone()) {
        AnyMatrix::Bf16(keys) if work.uses_pairs() => PanelKeys::Pairs(key_pairs(keys, wide_keys), work.query_factor()),
        keys => PanelKeys::Wide(as_f32(isa, keys, wide_keys)),
    };
    Tile { range, keys, values }
}

impl<'a> Values<'a> {
    fn pack(isa: Isa, values: AnyMatrix<'_>, packed: &'a mut [f32]) -> Self {
        let blocks = ValueBlocks::new(isa, values.rows(), values.cols());
        let finite = pack_values(isa, values, blocks, packed);
        Values { packed, blocks, finite }
    }

    /// Adds them, weighted, to a panel's output. A hidden key's weight is 0, which is enough unless its value is not finite.
    ///
    /// * `first`: the number of the first weight's key among these
    /// * `scores`: from before they were weights, looked at only where values are not finite
    fn add(
        self,
        isa: Isa,
        first: usize,
        (weights, scores): (&[f32], &[f32]),
        (out, is_first): (&mut [f32], bool),
        lanes: usize,
        ahead: &mut Ahead,
    ) {
        let packed = (self.packed, self.blocks, first);
        if self.finite {
            return add_values(isa, packed, weights, (out, is_first), lanes, ahead);
        }
        if is_first {
            out.fill(0.0);
        }
        add_visible_values(isa, packed, (weights, scores), out, lanes);
    }
}

/// One panel against one tile.
fn run_panel(
    work: Work<'_>,
    tile: &mut Tile<'_>,
    panel: &mut Panel,
    queries: &[f32],
    out: &mut [f32],
    spare: &mut Spare<'_>,
    ahead: &mut Ahead,
) {
    // The keys of the tile that this panel sees, and where they start in the tile.
    let seen = panel.lanes.seen(&tile.range);
    if seen.is_empty() {
        return;
    }
    let first = seen.start - tile.range.start;
    let (isa, lanes) = (work.plan.isa, panel.lanes.count);

    // 1. What the mask and the biases say.
    let mut tensors = None;
    let mut tensor_ahead = Ahead::nothing();
    if work.has_score_tensor() {
        let of_panel = panel_tensors(work, &panel.lanes, &seen, spare.tensor_rows);
        if !of_panel.any_visible() {
            return;
        }
        tensors = Some(of_panel);
        add_score_tensors(&mut tensor_ahead, work, panel.lanes.rows.clone(), seen.clone());
        tensor_ahead.spread(score_parts(work, seen.len(), lanes));
    }
    // While the scores are formed, memory brings what the tensors say about them, if there are any.
    let score_ahead = if tensors.is_some() { &mut tensor_ahead } else { &mut *ahead };
    let marks = Marks::new(work, &panel.lanes, &seen, Unit::Log2);

    // 2. Scores, as the softmax is to see them. What every lane sees needs no look at each pair.
    let scores = &mut spare.scores[..seen.len() * lanes];
    let (mut max, mut raw_max) = ([f32::NEG_INFINITY; MAX_PANEL_LANES], [f32::NEG_INFINITY; MAX_PANEL_LANES]);
    let (max, raw_max) = (&mut max[..lanes], &mut raw_max[..lanes]);
    for part in panel.lanes.parts(&seen).into_iter().filter(|part| !part.is_empty()) {
        let scores = &mut scores[(part.start - seen.start) * lanes..(part.end - seen.start) * lanes];
        let keys = tile.keys.slice_rows(part.start - tile.range.start..part.end - tile.range.start);
        let adjust = marks.adjust(&part, None);
        let tensors = tensors.as_ref().map(|tensors| (tensors, part.start - seen.start));
        let changes = !adjust.is_none() || tensors.is_some();
        let scores_max = if changes { &mut *raw_max } else { &mut *max };
        if panel.unfit == 0 {
            scores::scores(isa, keys, queries, scores, scores_max, score_ahead);
        } else {
            let buffers = (&mut *spare.kept_scores, &mut *spare.stage);
            scores_of_elements(work, panel, (keys, queries), scores, scores_max, buffers);
        }
        if changes {
            adjust_panel(isa, adjust, tensors, scores, max);
        }
    }

    // 3. Weights and values. (Even where all keys are seen, scores may be asked for: one that overflowed to -inf hides its
    // key, too.)
    let is_first = !std::mem::replace(&mut panel.started, true);
    let kept = &mut spare.kept_scores[..scores.len()];
    if !matches!(tile.values, TileValues::Packed(Values { finite: true, .. })) {
        kept.copy_from_slice(scores);
    }
    weights(isa, scores, max, &mut panel.state, if is_first { &mut [] } else { &mut *out });
    match &mut tile.values {
        TileValues::Packed(values) => values.add(isa, first, (scores, kept), (out, is_first), lanes, ahead),
        TileValues::InPlace(values, packed) => {
            let values = values.slice_rows(first..first + seen.len());
            if !add_values_in_place(isa, values, scores, spare.stage, (&mut *out, is_first), lanes, ahead) {
                let values = Values::pack(isa, values, packed);
                values.add(isa, 0, (scores, kept), (out, is_first), lanes, ahead);
            }
        }
    }
}

/// As [`scores::scores`], for a panel in which some lanes must not be formed from pairs: theirs from elements.
fn scores_of_elements(
    work: Work<'_>,
    panel: &Panel,
    (keys, queries): (PanelKeys<'_>, &[f32]),
    scores: &mut [f32],
    max: &mut [f32],
    (row_scores, query): (&mut [f32], &mut [f32]),
) {
    let (isa, lanes) = (work.plan.isa, max.len());
    let mut before = [0.0; MAX_PANEL_LANES];
    before[..lanes].copy_from_slice(max);
    scores::scores(isa, keys, queries, scores, max, &mut Ahead::nothing());
    let PanelKeys::Pairs(keys, _) = keys else { unreachable!("queries that fit no pairs, without pairs") };
    let head_dim = work.problem.dims.head_dim;
    let query = &mut query[..round_up_lanes(head_dim)];
    let row_scores = &mut row_scores[..keys.rows()];
    for lane in (0..panel.lanes.rows.len()).filter(|lane| panel.unfit >> lane & 1 == 1) {
        let row = panel.lanes.rows.start + lane;
        let width = query.len();
        widen_gathered(isa, work.queries(row..row + 1), work.query_factor(), (&mut *query, width));
        let elements = RowKeys::Any(AnyMatrix::Bf16(keys.elements(head_dim)));
        few::scores(isa, elements, query, row_scores, keys.rows(), &Ahead::nothing());
        for (scores, &score) in scores.chunks_exact_mut(lanes).zip(&*row_scores) {
            scores[lane] = score;
        }
        max[lane] = row_scores.iter().copied().fold(before[lane], f32::max);
    }
}
