//! The form for many query rows. A task's rows are multiplied with one tile of keys after the other.
//!
//! ```text
//! load      for each panel of the block:        queries into lanes                     transpose.rs
//! step      pack the tile's values (and its keys, if they can't be read in place)       prefill/operands.rs
//!           for each panel that sees the tile:
//!               S[j][lane]  = sum_e K[j][e] * Q[e][lane]                                prefill/scores.rs
//!               S[j][lane]  = softcap, bias, ALiBi; -inf if hidden                      tile.rs
//!               P[j][lane]  = 2^(S[j][lane] - m[lane])      l[lane] += sum_j P          prefill/softmax.rs
//!               O[d][lane] += sum_j V[j][d] * P[j][lane]                                prefill/values.rs
//! finish    for each panel:  out[lane][d] = O[d][lane] / l[lane]                        prefill/finish.rs
//! ```
//!
//! A *panel* is a set of query rows side by side in the lanes: each lane of a vector holds the same element of another query.
//! Both products broadcast an element of the left operand and multiply it into vectors of queries ([`super::product`]). So
//! maximum and sum are vertical operations, there are no horizontal ones, and the second product reads what the first one
//! wrote.

mod f32_lanes;
pub(super) mod finish;
mod operands;
pub(super) mod pack;
pub(super) mod scores;
pub(crate) mod short;
pub(super) mod softmax;
pub(super) mod values;

use super::decode::values::add_visible_values;
use super::form::FormKernel;
use super::key_sums::KeySums;
use super::lanes::{LaneMods, LaneSpans};
use super::open_mods;
use super::output::TaskOutput;
use super::panel::{Layout, Panel, list_panels};
use super::prefetch::Prefetch;
use super::product::prefetch_parts;
use super::score_tensors::PanelTensors;
use super::scratch::Scratch;
use super::shape::{MAX_PANEL_LANES, panel_lanes, panel_product_rows, round_up_lanes};
use super::state::PanelState;
use super::task::{Operands, Piece, TaskInput};
use super::tile::{Pass, modify_panel};
use super::transpose::{transpose_into_lanes, transpose_pairs_into_lanes};
use crate::element::ByElement;
use crate::kv::run::Run;
use f32_lanes::{needs_f32_keys, scores_with_f32_lanes};
use finish::{write_panel, write_panel_rows};
use operands::{OperandBuffers, TileOperands, TileValues, score_steps};
use softmax::{Summed, softmax};
use std::ops::Range;
use values::add_values_by_rows;

/// The state of a prefill task between its tiles.
pub(crate) struct Prefill<'t, 'a> {
    task: &'t TaskInput<'a>,
    /// The end of the keys that are stepped over, and the rows to prefetch during the last tile.
    end: usize,
    last_prefetch: &'t mut Prefetch,
    layout: Layout,
    panels: &'t mut [Panel],
    /// `[panels][width][lanes]`.
    queries: &'t [f32],
    /// `[panels][value_width][lanes]`, or if `by_rows`, `[panels][lanes][value_dim]`.
    out: &'t mut [f32],
    /// Whether the rows of the values' product are queries; see [`sums_by_rows`].
    by_rows: bool,
    /// Whether a panel needs the keys of pairs as f32.
    needs_f32_keys: bool,
    operands: OperandBuffers<'t>,
    buffers: PanelBuffers<'t>,
}

/// Buffers that are written anew for each panel and tile.
struct PanelBuffers<'t> {
    /// `[keys][lanes]`: scores, then probs.
    scores: &'t mut [f32],
    /// A copy of the scores, needed because a prob of 0 may mean a hidden key or underflow.
    kept_scores: &'t mut [f32],
    /// Bias and boolean mask of each lane, where the tensors' rows have gaps: `[lanes][keys]`.
    tensor_rows: &'t mut [f32],
    /// Rows before they are transposed into lanes, or after they are transposed back.
    row_buffer: &'t mut [f32],
}

/// A tile of keys, with the operands of its products.
struct Tile<'o> {
    keys: Range<usize>,
    operands: TileOperands<'o>,
}

impl<'t, 'a> FormKernel<'t, 'a> for Prefill<'t, 'a> {
    fn list_rows(task: &TaskInput<'_>, scratch: &mut Scratch) {
        list_panels(task, &mut scratch.panels);
    }

    fn load(
        piece: Piece<'t, 'a>,
        next: Option<Piece<'_, 'a>>,
        output: Option<&TaskOutput<'_>>,
        prefetch: &'t mut Prefetch,
        scratch: &'t mut Scratch,
    ) -> Self {
        let task = piece.task;
        prefetch_after(task, next, output, prefetch);
        let Scratch { tile: floats, panels, .. } = scratch;
        let panel_lanes = panel_lanes(task.isa);
        let width = round_up_lanes(score_steps(task));
        let layout = Layout { width, value_width: round_up_lanes(task.value_dim()), panel_lanes };
        let tile_rows = round_up_lanes(task.tile_keys);
        let by_rows = sums_by_rows(task, panels.len(), &piece.keys);
        let [keys, f32_keys, values, packed_values] = OperandBuffers::lens(task, by_rows);
        let [queries, out, keys, f32_keys, values, packed_values, scores, kept_scores, tensor_rows, row_buffer] =
            floats.buffers([
                panels.len() * layout.width * panel_lanes,
                panels.len() * layout.value_width * panel_lanes,
                keys,
                f32_keys,
                values,
                packed_values,
                tile_rows * panel_lanes,
                tile_rows * panel_lanes,
                if task.has_score_tensors() { tile_rows * panel_lanes } else { 0 },
                panel_lanes * round_up_lanes(task.head_dim()).max(layout.value_width).max(tile_rows),
            ]);
        for (p, panel) in panels.iter_mut().enumerate() {
            load_panel(task, panel, &mut queries[layout.queries(p, panel.lanes.count)], row_buffer);
        }
        let needs_f32_keys = panels.iter().any(|panel| needs_f32_keys(task, panel));
        Prefill {
            task,
            end: piece.keys.end,
            last_prefetch: prefetch,
            layout,
            panels,
            queries,
            out,
            by_rows,
            needs_f32_keys,
            operands: OperandBuffers { keys, f32_keys, values, packed_values },
            buffers: PanelBuffers { scores, kept_scores, tensor_rows, row_buffer },
        }
    }

    fn step(&mut self, keys: Range<usize>) {
        let Prefill { task, end, last_prefetch, layout, panels, queries, out, by_rows, operands, buffers, .. } = self;
        let of_panels = (panels.len(), *by_rows, self.needs_f32_keys);
        let tile_end = keys.end;
        let keys = open_mods::trim(task, &(0..task.rows), keys);
        if keys.is_empty() {
            return;
        }
        let mut next_tile;
        let prefetch = if tile_end < *end {
            next_tile = prefetch_keys(task, tile_end..(tile_end + task.tile_keys).min(*end));
            &mut next_tile
        } else {
            last_prefetch
        };
        let tile = Tile { operands: TileOperands::new(task, keys.clone(), of_panels, operands), keys };
        prefetch.spread(panels.iter().map(|panel| next_tile_parts(task, &panel.lanes, &tile.keys, *by_rows)).sum());
        for (p, panel) in panels.iter_mut().enumerate() {
            let lanes = panel.lanes.count;
            let (queries, out) = (&queries[layout.queries(p, lanes)], &mut out[layout.out(p, lanes)]);
            let mut max = [f32::NEG_INFINITY; MAX_PANEL_LANES];
            if let Some(seen) = panel_scores(task, &tile, panel, queries, buffers, &mut max[..lanes], prefetch) {
                add_panel_values(task, &tile, panel, (seen, &max[..lanes]), out, buffers, prefetch);
            }
        }
    }

    fn add_probs(&mut self, keys: Range<usize>, to: &mut KeySums<'_>) {
        let Prefill { task, end, layout, panels, queries, by_rows, operands, buffers, .. } = self;
        let of_panels = (panels.len(), *by_rows, self.needs_f32_keys);
        assert!(task.group == 1, "a task of {} heads", task.group);
        let tile_end = keys.end;
        let keys = open_mods::trim(task, &(0..task.rows), keys);
        if keys.is_empty() {
            return;
        }
        let mut prefetch = prefetch_keys(task, tile_end..(tile_end + task.tile_keys).min(*end));
        prefetch.spread(panels.iter().map(|panel| next_tile_parts(task, &panel.lanes, &keys, *by_rows)).sum());
        let tile = Tile { operands: TileOperands::new(task, keys.clone(), of_panels, operands), keys };
        to.start_tile(task.isa, &tile.keys);
        for (p, panel) in panels.iter().enumerate() {
            let lanes = panel.lanes.count;
            let max = &mut [f32::NEG_INFINITY; MAX_PANEL_LANES][..lanes];
            let queries = &queries[layout.queries(p, lanes)];
            if let Some(seen) = panel_scores(task, &tile, panel, queries, buffers, max, &mut prefetch) {
                let scores = &mut buffers.scores[..seen.len() * lanes];
                to.add_panel(task.isa, scores, (&panel.lanes.rows, lanes), seen.start - tile.keys.start);
            }
        }
        to.end_tile(task.isa, &tile.keys);
    }

    fn finish(self, output: &mut TaskOutput<'_>) {
        for (p, Panel { lanes, state, .. }) in self.panels.iter_mut().enumerate() {
            let (isa, rows, out) = (self.task.isa, lanes.rows.clone(), &mut self.out[self.layout.out(p, lanes.count)]);
            let sink = |lane| self.task.sink(lanes.rows.start + lane);
            output.write_lse(rows.clone(), |lane| state.lse(lane, sink(lane)));
            if self.task.score_mods.sinks.is_some() {
                for lane in 0..rows.len() {
                    state.sum[lane] = state.divisor(lane, sink(lane));
                }
            }
            if self.by_rows {
                write_panel_rows(isa, &mut output.values, rows, out, state);
            } else {
                let panel = (&*out, lanes.count);
                write_panel(isa, &mut output.values, rows, panel, state, self.buffers.row_buffer);
            }
        }
    }
}

impl Prefill<'_, '_> {
    /// Computes the scores of the task's only panel for a tile of keys, with modifications and masks applied. Calls `visit`
    /// with the keys that the panel sees by position, the scores, `[keys][lanes]`, and the number of lanes; does not call it if
    /// the panel sees no key.
    pub(crate) fn visit_scores(&mut self, keys: Range<usize>, visit: impl FnOnce(Range<usize>, &[f32], usize)) {
        let Prefill { task, layout, panels, queries, by_rows, operands, buffers, .. } = self;
        let [panel] = &**panels else { unreachable!("a task of {} panels", panels.len()) };
        let lanes = panel.lanes.count;
        let tile = Tile { operands: TileOperands::new(task, keys.clone(), (1, *by_rows, false), operands), keys };
        let queries = &queries[layout.queries(0, lanes)];
        let max = &mut [f32::NEG_INFINITY; MAX_PANEL_LANES][..lanes];
        if let Some(seen) = panel_scores(task, &tile, panel, queries, buffers, max, &mut Prefetch::none()) {
            visit(seen.clone(), &buffers.scores[..seen.len() * lanes], lanes);
        }
    }
}

/// The most keys whose values are read in place by several panels. A block of columns of 64 rows, 256 bytes apart, fits the L1 cache
/// beside the probs. (With 128 rows, which take all ways of their sets, the product took a tenth longer than from packed values, and a
/// twentieth with copies that lie better.)
const IN_PLACE_KEYS: usize = 64;

/// Whether the rows of the values' product are queries: where values are whole vectors, and
///
/// * there is one panel. Packing a tile of values takes a quarter as long as a panel's product, and no other panel would use it.
/// * or there are few keys. Then writing the sums as they are saves more than packing the values: a transpose of each panel.
fn sums_by_rows(task: &TaskInput<'_>, panels: usize, keys: &Range<usize>) -> bool {
    let few_keys = keys.len() <= IN_PLACE_KEYS && keys.end <= (keys.start / task.tile_keys + 1) * task.tile_keys;
    task.value_dim().is_multiple_of(task.isa.lanes()) && (panels == 1 || few_keys)
}

/// Starts a panel: transposes its queries into lanes.
fn load_panel(task: &TaskInput<'_>, panel: &mut Panel, to: &mut [f32], row_buffer: &mut [f32]) {
    (panel.state, panel.started, panel.f32_lanes) = (PanelState::EMPTY, false, 0);
    let to = (to, panel.lanes.count);
    match (task.operands, task.queries.slice(panel.lanes.rows.clone())) {
        (Operands::Bf16Pairs, ByElement::Bf16(rows)) => {
            panel.f32_lanes = transpose_pairs_into_lanes(task.isa, rows, to, row_buffer);
        }
        (_, rows) => transpose_into_lanes(task.isa, rows, task.factor, to, row_buffer),
    }
}

/// The keys and values of a tile.
fn prefetch_keys(task: &TaskInput<'_>, keys: Range<usize>) -> Prefetch {
    let mut prefetch = Prefetch::none();
    prefetch.add_key_rows(&task.keys, keys.clone());
    prefetch.add_key_rows(&task.values, keys);
    prefetch
}

/// The rows that are needed after the last tile: the output rows of the task, then the first tile of the next task, then its
/// queries. The tile is left out if the next task has the same keys, because these are in cache.
fn prefetch_after(
    task: &TaskInput<'_>,
    next: Option<Piece<'_, '_>>,
    output: Option<&TaskOutput<'_>>,
    prefetch: &mut Prefetch,
) {
    prefetch.clear();
    if let Some(output) = output {
        prefetch.add_output(&output.values);
    }
    if let Some(Piece { task: next, keys }) = next {
        if !next.shares_keys_with(task) {
            let first_tile = keys.start..keys.end.min(keys.start + next.tile_keys);
            prefetch.add_key_rows(&next.keys, first_tile.clone());
            prefetch.add_key_rows(&next.values, first_tile);
        }
        prefetch.add_group(next.queries);
    }
}

/// The bias and mask elements of `rows` for `keys`.
fn prefetch_score_tensors(task: &TaskInput<'_>, rows: Range<usize>, keys: Range<usize>) -> Prefetch {
    let mut prefetch = Prefetch::none();
    if let Some(bias) = task.bias_rows {
        prefetch.add_group_cols(bias.slice(rows.clone()), keys.clone());
    }
    if let Some(mask) = task.mask_rows {
        mask.slice(rows).heads().for_each(|head| prefetch.add_rows_or_columns(head.slice_cols(keys.clone())));
    }
    prefetch
}

/// Prefetching parts of the products that form the scores of `keys` keys for a panel of `lanes` lanes.
fn score_parts(task: &TaskInput<'_>, keys: usize, lanes: usize) -> usize {
    keys.div_ceil(panel_product_rows(task.isa, lanes)) * prefetch_parts(score_steps(task))
}

/// Parts of a panel's products over a tile that can prefetch the next tile: all but those that prefetch bias and mask.
fn next_tile_parts(task: &TaskInput<'_>, lanes: &LaneSpans, tile: &Range<usize>, by_rows: bool) -> usize {
    let keys = lanes.cover.seen(tile).len();
    let scores = if task.has_score_tensors() { 0 } else { score_parts(task, keys, lanes.count) };
    let full = panel_lanes(task.isa);
    let products = if by_rows {
        task.value_dim().div_ceil(full) * lanes.rows.len().div_ceil(panel_product_rows(task.isa, full))
    } else {
        task.value_dim().div_ceil(panel_product_rows(task.isa, lanes.count))
    };
    scores + products * prefetch_parts(keys)
}

/// Computes the scores of a panel for a tile into `buffers.scores`, with modifications and masks applied, and raises `max` to the
/// largest of each lane. Returns the keys that have scores; `None` if no key is visible.
fn panel_scores(
    task: &TaskInput<'_>,
    tile: &Tile<'_>,
    panel: &Panel,
    queries: &[f32],
    buffers: &mut PanelBuffers<'_>,
    max: &mut [f32],
    prefetch: &mut Prefetch,
) -> Option<Range<usize>> {
    // The keys of the tile that this panel sees.
    let seen = open_mods::trim(task, &panel.lanes.rows, panel.lanes.cover.seen(&tile.keys));
    if seen.is_empty() {
        return None;
    }
    let (isa, lanes) = (task.isa, panel.lanes.count);

    // Masks and score modifications. Rows of tensors are prefetched while the scores are formed.
    let mut tensor_prefetch = None;
    let mut tensors = None;
    if task.has_score_tensors() {
        let of_panel =
            PanelTensors::new(task, panel.lanes.rows.clone(), lanes, seen.clone(), &mut *buffers.tensor_rows);
        if !of_panel.any_visible() {
            return None;
        }
        tensors = Some(of_panel);
        let prefetch = tensor_prefetch.insert(prefetch_score_tensors(task, panel.lanes.rows.clone(), seen.clone()));
        prefetch.spread(score_parts(task, seen.len(), lanes));
    }
    let prefetch = tensor_prefetch.as_mut().unwrap_or(prefetch);
    let open = open_mods::are_needed(task, &panel.lanes.rows, &seen);
    let modified = open || task.has_score_mods() || !panel.lanes.cover.is_full(&seen);
    let mods = modified.then(|| LaneMods::new(task, &panel.lanes, &seen));

    // Scores. In the part that every lane sees, no pair has to be compared with bounds.
    let pass = if open { Pass::Scores } else { Pass::All };
    let scores = &mut buffers.scores[..seen.len() * lanes];
    let mut raw_max = [f32::NEG_INFINITY; MAX_PANEL_LANES];
    let parts = || panel.lanes.cover.parts(&seen).into_iter().filter(|part| !part.is_empty());
    let of_part = |part: &Range<usize>| (part.start - seen.start) * lanes..(part.end - seen.start) * lanes;
    for part in parts() {
        let scores = &mut scores[of_part(&part)];
        let rows = part.start - tile.keys.start..part.end - tile.keys.start;
        let keys = tile.operands.keys.slice_rows(rows.clone());
        let tensors = tensors.as_ref().map(|tensors| (tensors, part.start - seen.start));
        let mods = mods.as_ref().map(|mods| mods.part(&part, None));
        let mods = mods.filter(|mods| !mods.is_none() || tensors.is_some());
        let scores_max = if open || mods.is_some() { &mut raw_max[..lanes] } else { &mut *max };
        if panel.f32_lanes == 0 {
            scores::scores(isa, keys, queries, scores, scores_max, prefetch);
        } else {
            let f32_keys = tile.operands.f32_keys.map(|keys| keys.slice_rows(rows));
            let buffers = (&mut *buffers.kept_scores, &mut *buffers.row_buffer);
            scores_with_f32_lanes(task, panel, (keys, f32_keys), queries, scores, scores_max, buffers);
        }
        if let Some(mods) = mods {
            modify_panel(isa, pass, mods, tensors, scores, if open { scores_max } else { &mut *max });
        }
    }
    if let Some(mods) = mods.as_ref().filter(|_| open) {
        open_mods::apply(task, &panel.lanes, &seen, scores);
        for part in parts() {
            let tensors = tensors.as_ref().map(|tensors| (tensors, part.start - seen.start));
            modify_panel(isa, Pass::Hides, mods.part(&part, None), tensors, &mut scores[of_part(&part)], max);
        }
    }
    Some(seen)
}

/// Turns the scores of a panel into probs, and adds the values times the probs to the output.
fn add_panel_values(
    task: &TaskInput<'_>,
    tile: &Tile<'_>,
    panel: &mut Panel,
    (seen, max): (Range<usize>, &[f32]),
    out: &mut [f32],
    buffers: &mut PanelBuffers<'_>,
    prefetch: &mut Prefetch,
) {
    let (isa, lanes) = (task.isa, panel.lanes.count);
    let first = seen.start - tile.keys.start;
    let scores = &mut buffers.scores[..seen.len() * lanes];
    let is_first = !std::mem::replace(&mut panel.started, true);

    // Softmax: scores now become probs. The scores are kept even if all keys are visible, because one that overflowed to
    // -inf hides its key.
    let kept = &mut buffers.kept_scores[..scores.len()];
    if !tile.operands.values.are_finite() {
        kept.copy_from_slice(scores);
    }
    let width = task.value_dim();
    let summed = match (is_first, &tile.operands.values) {
        (true, _) => Summed::Nothing,
        (false, TileValues::Packed(_)) => Summed::Lanes(&mut *out),
        (false, TileValues::Rows(_)) => Summed::Rows(&mut out[..panel.lanes.rows.len() * width], width),
    };
    softmax(isa, scores, max, &mut panel.state, summed);
    let probs = &*scores;

    // Values.
    match tile.operands.values {
        TileValues::Packed(values) => values.add(isa, first, (probs, kept), (out, is_first), lanes, prefetch),
        TileValues::Rows(values) => {
            let values = values.slice_rows(first..first + seen.len());
            let (probs, sums) = ((probs, &*kept), &mut *buffers.row_buffer);
            add_rows(task, panel, (values, seen), probs, (out, is_first), sums, prefetch);
        }
    }
}

/// Adds values by rows. If sums are not finite, adds the values of the keys that each query sees.
fn add_rows(
    task: &TaskInput<'_>,
    panel: &Panel,
    (values, seen): (Run<'_>, Range<usize>),
    (probs, scores): (&[f32], &[f32]),
    (out, is_first): (&mut [f32], bool),
    sums: &mut [f32],
    prefetch: &mut Prefetch,
) {
    let (isa, lanes) = (task.isa, &panel.lanes);
    if add_values_by_rows(isa, (values, seen), (probs, lanes), (&mut *out, is_first), sums, prefetch) {
        return;
    }
    let width = task.value_dim();
    let len = lanes.rows.len() * width;
    sums[..len].fill(0.0);
    add_visible_values(isa, values, (probs, scores), [1, lanes.count], (&mut sums[..len], width));
    for (out, sum) in out.iter_mut().zip(&sums[..len]) {
        *out = if is_first { *sum } else { *out + sum };
    }
}
