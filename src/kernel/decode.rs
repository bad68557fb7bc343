//! The form for few query rows: one pass over keys and values, whose elements lie along the lanes.
//!
//! With one or two queries, most lanes of a panel would be empty, and the time is that of reading K and V once: four bytes of
//! f32 for each multiply-add of a single query. So a vector holds neighbouring elements of one key (or value), in the storage
//! format of the cache, and is multiplied with every row while it is in a register.
//!
//! ```text
//! load      queries as f32, or as pairs of bf16
//! step      S[i][j]  = sum_e Q[i][e] * K[j][e]      LANES partial sums, folded at the end      decode/scores.rs
//!           S[i][j]  = softcap, bias, ALiBi; -inf if hidden                                    tile.rs
//!           P[i][j]  = 2^(S[i][j] - m[i])           l[i] += sum_j P, keys in the lanes         decode/softmax.rs
//!           O[i][d] += P[i][j] * V[j][d]            one chain over the keys for each element   decode/values.rs
//! end_split merge what the split has summed into the splits before it                          state.rs
//! finish    out[i][d] = O[i][d] / l[i]
//! ```
//!
//! Keys are cut into splits of a fixed length, and each split is summed from an empty state. So a split can be a task of its
//! own: the task stores its result in memory ([`Decode::store_split`]), and [`reduce`] merges these results in the order of the
//! keys. The bits are the same either way.

mod block;
mod many_rows;
pub(super) mod scores;
pub(super) mod softmax;
pub(super) mod values;

use super::bf16_pairs::{copied_key_pairs, copy_pair_rows, key_pairs, pairs_in, rows_outside_pair_range};
use super::form::FormKernel;
use super::key_sums::KeySums;
use super::lanes::{LaneMods, LaneSpans};
use super::open_mods::{self, GRAIN};
use super::output::TaskOutput;
use super::partial::{EarlierResults, PartialLayout};
use super::prefetch::Prefetch;
use super::prefill::scores::PanelKeys;
use super::row_scores::{rows_of, widen_rows_of};
use super::score_tensors::{read_row, shown_by_mask};
use super::scratch::Scratch;
use super::shape::{RowSet, panel_lanes, round_up_lanes};
use super::state::merge;
use super::task::{Operands, Piece, TaskInput};
use super::tile::{Pass, RowExtent, modify_row};
use super::transpose::{transpose_into_lanes, transpose_pairs_into_lanes};
use super::widen::{as_one_run, copied_as_f32, widen_group};
use crate::element::{ByElement, bf16};
use crate::kv::rows::{KeyRows, ListedTiles};
use crate::kv::run::Run;
use crate::simd::Isa;
use crate::tensor::group::GroupRows;
use crate::tensor::matrix::Matrix;
use crate::tensor::row_list::RowList;
use scores::RowKeys;
use std::ops::Range;

/// The most rows of a task of this form, because a u128 has one bit for each.
pub(crate) const MAX_TASK_ROWS: usize = RowSet::BITS as usize;

/// The state of a decode task between its tiles.
pub(crate) struct Decode<'t, 'a> {
    task: &'t TaskInput<'a>,
    /// The end of the piece's keys, and the piece that this worker most likely reads next.
    end: usize,
    next: Option<Next<'a>>,
    layout: PartialLayout,
    /// The result of the splits so far, and that of the current split.
    total: &'t mut [f32],
    split: &'t mut [f32],
    /// Whether `total` holds a result, and whether `split` does.
    merged: bool,
    started: bool,
    queries: RowQueries<'t>,
    row_spans: &'t [LaneSpans<1>],
    buffers: RowBuffers<'t>,
    /// Keys and values that may be in several runs. Tiles that are in one run are not listed.
    listed_keys: Option<ListedTiles<'t, 'a>>,
    listed_values: Option<ListedTiles<'t, 'a>>,
    prefetch: &'t mut Prefetch,
}

/// The keys and values of the next piece.
#[derive(Clone)]
struct Next<'a> {
    keys: KeyRows<'a>,
    values: KeyRows<'a>,
    /// The first keys that masks show ([`first_shown`]).
    range: Range<usize>,
}

/// What is read after some keys: where the run of keys ends that they go on in, and the keys after that.
struct Upcoming {
    end: usize,
    range: Range<usize>,
    /// Whether these are of the same piece, not of the next one.
    is_own: bool,
}

impl Upcoming {
    /// What is read after `keys`, the visible part of a tile that ends at `tile_end`. The piece's keys end at `end`.
    #[inline(always)]
    fn new(task: &TaskInput<'_>, keys: &Range<usize>, tile_end: usize, end: usize, next: Option<&Next<'_>>) -> Self {
        let next = next.map_or(0..0, |next| next.range.clone());
        if keys.end == tile_end && task.masks.with_holes().next().is_none() {
            return Upcoming { end, range: next, is_own: false };
        }
        let own = first_shown(task, tile_end..end);
        let is_own = !own.is_empty();
        Upcoming { end: keys.end, range: if is_own { own } else { next }, is_own }
    }

    /// The first tile of what is read after `keys`, and whether it is of the same piece.
    fn tile_after(&self, keys: &Range<usize>, tile_keys: usize) -> (Range<usize>, bool) {
        let (rest, is_own) =
            if keys.end < self.end { (keys.end..self.end, true) } else { (self.range.clone(), self.is_own) };
        let end = (rest.start / tile_keys).saturating_add(1).saturating_mul(tile_keys);
        (rest.start..rest.end.min(end), is_own)
    }
}

/// The part of the first tile of `keys` of which masks show anything to any row; without masks that have holes, all of `keys`.
fn first_shown(task: &TaskInput<'_>, keys: Range<usize>) -> Range<usize> {
    let mut seen = open_mods::first_seen(task, keys.clone());
    while task.mask_rows.is_some() && !seen.is_empty() {
        let tile_end = keys.end.min((seen.start / task.tile_keys + 1) * task.tile_keys);
        let shown = shown_by_mask(task, &(seen.start..seen.end.min(tile_end)), GRAIN);
        if !shown.is_empty() {
            return shown;
        }
        seen = open_mods::first_seen(task, tile_end..keys.end);
    }
    seen
}

/// Buffers that are written anew for each tile: `[rows][tile_keys]`, and copies.
struct RowBuffers<'t> {
    /// Scores, then probs.
    scores: &'t mut [f32],
    /// A copy of the scores, needed because a prob of 0 may mean a hidden key or underflow. Before that, scores of the rows outside
    /// the range of pairs.
    kept_scores: &'t mut [f32],
    /// Bias and boolean mask.
    bias: &'t mut [f32],
    /// Copies of keys and values that have gaps between their elements.
    copied_keys: &'t mut [f32],
    copied_values: &'t mut [f32],
}

impl<'t, 'a> FormKernel<'t, 'a> for Decode<'t, 'a> {
    fn list_rows(task: &TaskInput<'_>, scratch: &mut Scratch) {
        scratch.row_spans.clear();
        scratch.row_spans.extend((0..task.rows).map(|n| LaneSpans::new(task, n..n + 1, 1)));
    }

    fn load(
        piece: Piece<'t, 'a>,
        next: Option<Piece<'_, 'a>>,
        _: Option<&TaskOutput<'_>>,
        prefetch: &'t mut Prefetch,
        scratch: &'t mut Scratch,
    ) -> Self {
        let Piece { task, keys } = piece;
        let Scratch { tile: floats, partials, row_spans, addresses: [key_addresses, value_addresses], .. } = scratch;
        let (rows, tile_keys, head_dim) = (task.rows, task.tile_keys, task.head_dim());
        let in_lanes = lie_in_lanes(task);
        let lanes = if in_lanes { round_up_lanes(rows) } else { rows };
        let pairs = task.operands == Operands::Bf16Pairs;
        let in_place = |rows: &KeyRows<'_>| match in_lanes {
            true => rows.are_in_place(),
            false => rows.has_contiguous_rows() && !rows.are_scattered(),
        };
        let copy = |rows: &KeyRows<'_>| if in_place(rows) { 0 } else { tile_keys * rows.cols() };
        let [queries, pair_queries, panel, scores, kept_scores, bias, copied_keys, copied_values] = floats.buffers([
            lanes * round_up_lanes(head_dim),
            if pairs { lanes * round_up_lanes(pairs_in(head_dim)) } else { 0 },
            if in_lanes { panel_lanes(task.isa) * round_up_lanes(head_dim) } else { 0 },
            rows * tile_keys,
            rows * tile_keys,
            rows * tile_keys,
            copy(&task.keys),
            copy(&task.values),
        ]);
        let layout = PartialLayout::new(rows, task.value_dim());
        let [total, split] = partials.buffers([layout.len(), layout.len()]);
        Decode {
            task,
            end: keys.end,
            next: next.map(|Piece { task, keys }| Next {
                keys: task.keys,
                values: task.values,
                range: first_shown(task, keys),
            }),
            layout,
            total,
            split,
            merged: false,
            started: false,
            queries: RowQueries::load(task, queries, pair_queries, panel),
            row_spans,
            buffers: RowBuffers { scores, kept_scores, bias, copied_keys, copied_values },
            listed_keys: task.keys.listable().map(|rows| rows.tiles(key_addresses)),
            listed_values: task.values.listable().map(|rows| rows.tiles(value_addresses)),
            prefetch,
        }
    }

    fn step(&mut self, keys: Range<usize>) {
        self.start_split();
        let (task, isa, tile_keys) = (self.task, self.task.isa, self.task.tile_keys);

        // 1. Scores.
        let tile_end = keys.end;
        let Some((keys, upcoming)) = self.raw_scores(keys) else { return };

        // 2. Score modifications, and the softmax.
        let extent = self.softmax_rows(&keys);

        // 3. Values.
        if extent.max == f32::NEG_INFINITY {
            return; // No row sees any of the keys, or the scores are NaN, and then the rows' sums are NaN already.
        }
        let RowBuffers { scores: probs, kept_scores, copied_values, .. } = &mut self.buffers;
        let (out, width) = (self.layout.values(self.split, task.rows), self.layout.width());
        let next = self.next.as_ref().filter(|_| !upcoming.is_own).map_or(&task.values, |next| &next.values);
        if self.queries.in_lanes {
            return self.add_tile_values(&keys, tile_end, extent.hides);
        }
        let in_runs = task.values.are_in_several_runs(&keys) && !extent.hides;
        if let Some(tiles) = self.listed_values.as_mut().filter(|_| in_runs) {
            let (next_tile, is_own) = upcoming.tile_after(&keys, tile_keys);
            let next = if is_own { &task.values } else { next };
            return values::add_listed_values(isa, tiles.list(keys, (next, next_tile)), probs, out, tile_keys);
        }
        let values = as_one_run(isa, &task.values, keys.clone(), copied_values);
        if extent.hides && !values::all_finite(isa, values) {
            return values::add_visible_values(isa, values, (probs, kept_scores), [tile_keys, 1], (out, width));
        }
        fill_prefetch(self.prefetch, &task.values, &keys, &upcoming, next);
        values::add_values(isa, values, probs, out, tile_keys, self.prefetch);
    }

    fn end_split(&mut self) {
        if self.merged {
            merge_partial(self.task, self.layout, self.total, self.split);
        } else {
            self.total.copy_from_slice(self.split); // the first split: nothing to merge it with
        }
        (self.merged, self.started) = (true, false);
    }

    fn add_probs(&mut self, keys: Range<usize>, to: &mut KeySums<'_>) {
        let (task, tile_keys) = (self.task, self.task.tile_keys);
        let Some((keys, _)) = self.raw_scores(keys) else { return };
        self.modify_rows(&keys, &mut [f32::NEG_INFINITY; MAX_TASK_ROWS]);
        let whole = round_up_lanes(keys.len());
        for n in 0..task.rows {
            let scores = &mut self.buffers.scores[n * tile_keys..][..whole];
            scores[keys.len()..].fill(f32::NEG_INFINITY);
            let (head, _) = task.head_and_query(n);
            to.add_row(task.isa, scores, n, (head - task.first_head, keys.start));
        }
    }

    fn finish(self, output: &mut TaskOutput<'_>) {
        if !self.merged {
            self.layout.clear(self.total);
        }
        finish_rows(self.task, self.layout, self.total, output);
    }
}

impl<'a> Decode<'_, 'a> {
    /// Ends a split and stores its result in `memory`, instead of merging it as [`end_split`](FormKernel::end_split) does.
    pub(crate) fn store_split(&mut self, memory: &mut [f32]) {
        memory[..self.layout.len()].copy_from_slice(self.split);
        self.started = false;
    }

    /// Starts from results over earlier keys, instead of from none.
    pub(crate) fn start_from(&mut self, earlier: &EarlierResults<'_>) {
        fold_earlier(self.task, self.layout, self.total, earlier);
        self.merged = true;
    }

    /// Stores the result of all splits in `memory`.
    pub(crate) fn store(&self, memory: &mut [f32]) {
        memory[..self.layout.len()].copy_from_slice(self.total);
    }

    /// Adds the values of a tile that ends at `tile_end`, for rows in lanes.
    fn add_tile_values(&mut self, keys: &Range<usize>, tile_end: usize, hides: bool) {
        self.prefetch_tile(tile_end);
        let (task, tile_keys) = (self.task, self.task.tile_keys);
        let RowBuffers { scores: probs, kept_scores, copied_values, .. } = &mut self.buffers;
        let (out, width) = (self.layout.values(self.split, task.rows), self.layout.width());
        let values = as_f32_tile(task.isa, &task.values, keys.clone(), copied_values);
        let run = Run::F32(values);
        if hides && !values::all_finite(task.isa, run) {
            values::add_visible_values(task.isa, run, (probs, kept_scores), [tile_keys, 1], (out, width));
        } else if values.cols() == width {
            many_rows::add_values(task.isa, values, probs, out, tile_keys, self.prefetch);
        } else {
            values::add_values(task.isa, run, probs, out, tile_keys, self.prefetch);
        }
    }

    /// Lists the tile that starts at `start`, or else the next piece's first one, to be prefetched.
    fn prefetch_tile(&mut self, start: usize) {
        let (task, tile_keys) = (self.task, self.task.tile_keys);
        self.prefetch.clear();
        let mut add = |keys: &KeyRows<'_>, values: &KeyRows<'_>, range: &Range<usize>| {
            let range = range.start..range.end.min(range.start + tile_keys);
            self.prefetch.add_key_rows(keys, range.clone());
            self.prefetch.add_key_rows(values, range);
        };
        match &self.next {
            _ if start < self.end => add(&task.keys, &task.values, &(start..self.end)),
            Some(next) => add(&next.keys, &next.values, &next.range),
            None => {}
        }
    }

    fn start_split(&mut self) {
        if !std::mem::replace(&mut self.started, true) {
            self.layout.clear(self.split);
        }
    }

    /// Forms the scores of a tile, without modifications. Returns the keys that have scores, and what is read after them; `None` if
    /// no key is visible.
    fn raw_scores(&mut self, keys: Range<usize>) -> Option<(Range<usize>, Upcoming)> {
        let (task, tile_end) = (self.task, keys.end);
        let keys = open_mods::trim(task, &(0..task.rows), keys);
        let keys = self.read_score_tensors(&keys);
        if keys.is_empty() {
            return None;
        }
        let upcoming = Upcoming::new(task, &keys, tile_end, self.end, self.next.as_ref());
        let next = self.next.as_ref().filter(|_| !upcoming.is_own).map_or(&task.keys, |next| &next.keys);
        let in_runs = task.keys.are_in_several_runs(&keys) && !self.queries.in_lanes;
        let listed = match &mut self.listed_keys {
            Some(tiles) if in_runs => {
                let (next_tile, is_own) = upcoming.tile_after(&keys, task.tile_keys);
                let next = if is_own { &task.keys } else { next };
                Some(tiles.list(keys.clone(), (next, next_tile)))
            }
            _ => {
                fill_prefetch(self.prefetch, &task.keys, &keys, &upcoming, next);
                None
            }
        };
        self.queries.scores(task, keys.clone(), listed, &mut self.buffers, self.prefetch);
        Some((keys, upcoming))
    }

    /// Reads bias and mask of all rows. Returns the part of the keys, in steps of [`GRAIN`], that holds all that they show.
    fn read_score_tensors(&mut self, keys: &Range<usize>) -> Range<usize> {
        let (task, tile_keys) = (self.task, self.task.tile_keys);
        if !task.has_score_tensors() || keys.is_empty() {
            return keys.clone();
        }
        // Reading tensors as numbers takes many times as long as looking for what the mask shows.
        let keys = &shown_by_mask(task, keys, GRAIN);
        if keys.is_empty() {
            return keys.clone();
        }
        let (mut first, mut last) = (usize::MAX, 0);
        for n in 0..task.rows {
            let bias = &mut self.buffers.bias[n * tile_keys..][..keys.len()];
            read_row(task, n, keys.clone(), bias);
            // Without an early exit, so that the compiler vectorises it.
            let shows = |bias: &[f32]| bias.iter().fold(false, |shows, bias| shows | (*bias != f32::NEG_INFINITY));
            first = first.min(bias.chunks(GRAIN).position(shows).unwrap_or(usize::MAX));
            last = last.max(bias.chunks(GRAIN).rposition(shows).unwrap_or(0));
        }
        if first == usize::MAX {
            return keys.start..keys.start;
        }
        let part = keys.start + first * GRAIN..keys.end.min(keys.start + (last + 1) * GRAIN);
        if first > 0 {
            // The rows of the buffer start at the first key that is computed.
            for bias in self.buffers.bias.chunks_exact_mut(tile_keys) {
                bias.copy_within(first * GRAIN..keys.len(), 0);
            }
        }
        part
    }

    /// Turns the raw scores of all rows into probs and adds them to the rows' states. Returns the extent of all scores.
    fn softmax_rows(&mut self, keys: &Range<usize>) -> RowExtent {
        let mut maxima = [f32::NEG_INFINITY; MAX_TASK_ROWS];
        let all = self.modify_rows(keys, &mut maxima);
        let (task, buffers, layout) = (self.task, &mut self.buffers, self.layout);
        let (isa, tile_keys) = (task.isa, task.tile_keys);
        if all.hides {
            buffers.kept_scores.copy_from_slice(buffers.scores);
        }
        let whole = round_up_lanes(keys.len());
        for (n, max) in maxima[..task.rows].iter().enumerate() {
            let scores = (&mut buffers.scores[n * tile_keys..][..whole], keys.len());
            layout.update(self.split, n, |state, out| softmax::softmax(isa, scores, *max, state, out));
        }
        all
    }

    /// Modifies the raw scores of all rows. Returns the extent of all, and the largest of each row in `maxima`.
    fn modify_rows(&mut self, keys: &Range<usize>, maxima: &mut [f32; MAX_TASK_ROWS]) -> RowExtent {
        let (task, buffers) = (self.task, &mut self.buffers);
        let (isa, tile_keys) = (task.isa, task.tile_keys);
        let mut all = RowExtent { max: f32::NEG_INFINITY, hides: false };
        for (n, spans) in self.row_spans.iter().enumerate() {
            let row = n * tile_keys..n * tile_keys + keys.len();
            let (scores, bias) = (&mut buffers.scores[row.clone()], &buffers.bias[row]);
            let bias = task.has_score_tensors().then_some(bias);
            let mods = LaneMods::new(task, spans, keys);
            let mods = mods.part(keys, bias);
            let own = if open_mods::are_needed(task, &spans.rows, keys) {
                modify_row(isa, Pass::Scores, mods, scores);
                open_mods::apply(task, spans, keys, scores);
                modify_row(isa, Pass::Hides, mods, scores)
            } else if mods.is_none() {
                softmax::extent(isa, scores)
            } else {
                modify_row(isa, Pass::All, mods, scores)
            };
            maxima[n] = own.max;
            all = RowExtent { max: all.max.max(own.max), hides: all.hides | own.hides };
        }
        all
    }
}

/// Merges the partial results of a task's splits in the order of the keys, after results over earlier keys, and writes its rows.
pub(crate) fn reduce<'p>(
    task: &TaskInput<'_>,
    earlier: Option<&EarlierResults<'_>>,
    mut splits: impl Iterator<Item = &'p [f32]>,
    scratch: &mut Scratch,
    output: &mut TaskOutput<'_>,
) {
    let layout = PartialLayout::new(task.rows, task.value_dim());
    let [total] = scratch.partials.buffers([layout.len()]);
    match earlier {
        Some(earlier) => fold_earlier(task, layout, total, earlier),
        None => match splits.next() {
            None => layout.clear(total),
            Some(first) => total.copy_from_slice(&first[..layout.len()]),
        },
    }
    for split in splits {
        merge_partial(task, layout, total, split);
    }
    finish_rows(task, layout, total, output);
}

/// Merges the result over later keys into that over earlier ones.
fn merge_partial(task: &TaskInput<'_>, layout: PartialLayout, total: &mut [f32], split: &[f32]) {
    for n in 0..task.rows {
        let (other, other_out) = layout.row(split, n);
        layout.update(total, n, |state, out| merge(task.isa, state, out, other, other_out));
    }
}

/// Merges results over earlier keys, in the order of the keys.
fn fold_earlier(task: &TaskInput<'_>, layout: PartialLayout, total: &mut [f32], earlier: &EarlierResults<'_>) {
    for (n, result) in (0..task.rows).flat_map(|n| (0..earlier.count).map(move |result| (n, result))) {
        let (other, other_out) = earlier.row(n, result);
        layout.update(total, n, |state, out| match result {
            0 => {
                *state = other;
                out.copy_from_slice(other_out);
            }
            _ => merge(task.isa, state, out, other, other_out),
        });
    }
}

/// Divides by the sums and writes the rows.
fn finish_rows(task: &TaskInput<'_>, layout: PartialLayout, total: &mut [f32], output: &mut TaskOutput<'_>) {
    for n in 0..task.rows {
        let sink = task.sink(n);
        let (state, _) = layout.row(total, n);
        output.write_lse(n..n + 1, |_| state.lse(0, sink));
        layout.update(total, n, |state, out| softmax::finish(task.isa, state.divisor(0, sink), out));
        let (_, out) = layout.row(total, n);
        output.write_rows(task.isa, n..n + 1, (out, layout.width()));
    }
}

/// The prefetch distance in bytes: 8 KiB for f32, 16 KiB for the half types. (Zen 5: f32 at 16 KiB took a tenth longer, half
/// types at 8 KiB a sixth.)
const fn prefetch_distance_bytes(element_bytes: usize) -> usize {
    32 * 1024 / element_bytes
}

/// The prefetch distance in rows, at least 1.
fn prefetch_distance(rows: &KeyRows<'_>) -> usize {
    let row_bytes = rows.element_bytes() * rows.cols();
    (prefetch_distance_bytes(rows.element_bytes()) / row_bytes.max(1)).max(1)
}

/// Fills `prefetch` with what to prefetch while `keys` of `rows` are read: the same number of rows, at the prefetch distance.
/// Rows past the end are replaced by those of `next` that are read then.
fn fill_prefetch(
    prefetch: &mut Prefetch,
    rows: &KeyRows<'_>,
    keys: &Range<usize>,
    Upcoming { end, range: more, .. }: &Upcoming,
    next: &KeyRows<'_>,
) {
    let distance = prefetch_distance(rows);
    let target = keys.start + distance..keys.end + distance;
    prefetch.clear();
    prefetch.add_key_rows(rows, target.start.min(*end)..target.end.min(*end));
    if !more.is_empty() {
        let from = |n: usize| (more.start + n.saturating_sub(*end)).min(more.end);
        prefetch.add_key_rows(next, from(target.start)..from(target.end));
    }
}

/// The queries of a task's rows, as the dot products read them.
struct RowQueries<'t> {
    /// The queries that scores are formed from f32 for: `[rows][head_dim rounded up]`, scaled. If `pairs` is used, those of
    /// `f32_rows` alone, one after the other.
    wide: &'t [f32],
    /// As pairs: `[rows][pairs rounded up]`.
    pairs: &'t [f32],
    /// Rows outside the range of pairs.
    f32_rows: RowSet,
    /// Whether scores are formed from pairs: not if all rows are outside the range.
    use_pairs: bool,
    /// Whether the rows lie in lanes, in panels of `[head_dim or pairs][lanes]`. (Those of `f32_rows` don't.)
    in_lanes: bool,
}

/// The fewest rows that lie in lanes. With 24 / 28 / 32 / 48 rows, lanes take 1.03 to 1.25 / 0.97 to 1.09 / 0.90 to 0.99 / 0.91 to 0.96
/// of the time of the loops for few rows (AVX-512, Zen 4), and with AVX2 1.05 / 1.13 / 1.04 / 0.99 on average. With 33 to 47 rows, a vector
/// is partly empty, and they take up to 1.13. Tasks of one sequence have fewer rows.
const LANE_ROWS: usize = 32;

/// Whether the rows of a task lie in lanes when their scores are formed: many rows, of whole vectors.
fn lie_in_lanes(task: &TaskInput<'_>) -> bool {
    let pairs = task.operands == Operands::Bf16Pairs;
    let steps = if pairs { pairs_in(task.head_dim()) } else { task.head_dim() };
    let is_whole = !pairs || task.head_dim().is_multiple_of(2);
    task.rows >= LANE_ROWS && steps > 0 && steps == round_up_lanes(steps) && is_whole
}

/// The rows `range` as f32: in place, or their copy in `wide`.
fn as_f32_tile<'a>(isa: Isa, rows: &KeyRows<'a>, range: Range<usize>, wide: &'a mut [f32]) -> Matrix<'a, f32> {
    let in_place = if rows.are_in_place() { rows.one_run(range.clone()) } else { None };
    match in_place.and_then(|run| run.in_place()) {
        Some(rows) => rows,
        None => copied_as_f32(isa, *rows, range, wide),
    }
}

/// The panels of a task's rows that lie in lanes: their rows, and their lanes.
fn lane_panels(task: &TaskInput<'_>) -> impl Iterator<Item = (Range<usize>, usize)> {
    let (rows, panel, lanes) = (task.rows, panel_lanes(task.isa), task.isa.lanes());
    (0..rows).step_by(panel).map(move |first| {
        let rows = first..rows.min(first + panel);
        (rows.clone(), rows.len().next_multiple_of(lanes))
    })
}

/// Writes pairs of queries into lanes, panel by panel. `buffer` is for a panel.
fn pairs_into_lanes(task: &TaskInput<'_>, queries: GroupRows<'_, bf16>, to: &mut [f32], buffer: &mut [f32]) {
    let steps = pairs_in(task.head_dim());
    for (rows, lanes) in lane_panels(task) {
        let to = &mut to[rows.start * steps..][..lanes * steps];
        transpose_pairs_into_lanes(task.isa, queries.slice(rows), (to, lanes), buffer);
    }
}

/// As [`pairs_into_lanes`], for queries as f32, times the task's factor.
fn f32_into_lanes(task: &TaskInput<'_>, to: &mut [f32], buffer: &mut [f32]) {
    let steps = task.head_dim();
    for (rows, lanes) in lane_panels(task) {
        let to = &mut to[rows.start * steps..][..lanes * steps];
        transpose_into_lanes(task.isa, task.queries.slice(rows), task.factor, (to, lanes), buffer);
    }
}

impl<'t> RowQueries<'t> {
    /// * `buffer`: for the rows of a panel, if rows lie in lanes
    fn load(task: &TaskInput<'_>, wide: &'t mut [f32], pairs: &'t mut [f32], buffer: &mut [f32]) -> Self {
        let in_lanes = lie_in_lanes(task);
        let f32_rows = match (task.operands, task.queries) {
            (Operands::Bf16Pairs, ByElement::Bf16(rows)) => rows_outside_pair_range(rows),
            _ => 0,
        };
        let use_pairs = task.operands == Operands::Bf16Pairs && (f32_rows.count_ones() as usize) < task.rows;
        match task.queries {
            ByElement::Bf16(rows) if use_pairs => {
                match in_lanes {
                    true => pairs_into_lanes(task, rows, pairs, buffer),
                    false => copy_pair_rows(rows, pairs),
                }
                widen_rows_of(task, 0..task.rows, f32_rows, wide);
            }
            _ if in_lanes => f32_into_lanes(task, wide, buffer),
            rows => widen_group(task.isa, rows, task.factor, (&mut *wide, round_up_lanes(task.head_dim()))),
        }
        RowQueries { wide, pairs, f32_rows, use_pairs, in_lanes }
    }

    /// As [`scores`](Self::scores), for rows in lanes.
    fn lane_scores(&self, task: &TaskInput<'_>, keys: Range<usize>, buffers: &mut RowBuffers<'_>) {
        let (isa, tile_keys) = (task.isa, task.tile_keys);
        let RowBuffers { scores: to, kept_scores, copied_keys: copy, .. } = buffers;
        if !self.use_pairs {
            let keys = PanelKeys::F32(as_f32_tile(isa, &task.keys, keys, copy));
            return many_rows::scores(isa, keys, self.wide, (to, task.rows, tile_keys));
        }
        let keys = match task.keys.one_run(keys.clone()) {
            Some(Run::Bf16(run)) => key_pairs(run, copy),
            _ => copied_key_pairs(task.keys, keys, copy),
        };
        many_rows::scores(isa, PanelKeys::Pairs(keys, task.factor), self.pairs, (to, task.rows, tile_keys));
        let keys = RowKeys::Run(Run::Bf16(keys.elements(task.head_dim())));
        self.replace_f32_rows(task, keys, kept_scores, to);
    }

    /// Forms the scores of rows outside the range of pairs from f32. `buffer` is as long as `to`.
    fn replace_f32_rows(&self, task: &TaskInput<'_>, keys: RowKeys<'_>, buffer: &mut [f32], to: &mut [f32]) {
        if self.f32_rows == 0 {
            return;
        }
        let tile_keys = task.tile_keys;
        let f32_scores = &mut buffer[..self.f32_rows.count_ones() as usize * tile_keys];
        scores::scores(task.isa, keys, self.wide, f32_scores, tile_keys, &Prefetch::none());
        for (n, from) in rows_of(self.f32_rows).zip(f32_scores.chunks_exact(tile_keys)) {
            to[n * tile_keys..][..tile_keys].copy_from_slice(from);
        }
    }

    /// The scores of all rows, `[rows][tile_keys]`, with `keys`, which are `listed` if they are in several runs.
    fn scores(
        &self,
        task: &TaskInput<'_>,
        keys: Range<usize>,
        listed: Option<RowList<'_>>,
        buffers: &mut RowBuffers<'_>,
        prefetch: &Prefetch,
    ) {
        if self.in_lanes {
            return self.lane_scores(task, keys, buffers);
        }
        let (isa, tile_keys) = (task.isa, task.tile_keys);
        let RowBuffers { scores: to, kept_scores: f32_scores, copied_keys: copy, .. } = buffers;
        let keys = match listed {
            Some(rows) => RowKeys::Listed(rows),
            None if self.use_pairs => RowKeys::Run(pairs_as_one_run(task, keys, copy)),
            None => RowKeys::Run(as_one_run(isa, &task.keys, keys, copy)),
        };
        if !self.use_pairs {
            return scores::scores(isa, keys, self.wide, to, tile_keys, prefetch);
        }
        scores::scores_of_pairs(isa, (keys, task.factor), self.pairs, to, tile_keys, prefetch);
        self.replace_f32_rows(task, keys, f32_scores, to);
    }
}

/// The keys `range` of bf16 as one run without gaps between elements: in place, or copied to `copy`.
fn pairs_as_one_run<'a>(task: &TaskInput<'a>, range: Range<usize>, copy: &'a mut [f32]) -> Run<'a> {
    match task.keys.one_run(range.clone()) {
        Some(run) if run.has_contiguous_rows() => run,
        _ => Run::Bf16(copied_key_pairs(task.keys, range, copy).elements(task.head_dim())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distance is a whole number of rows: 1 if a row is longer than that, and above 0 for empty rows.
    #[test]
    fn the_prefetch_distance_is_at_least_a_row() {
        let (wide, half) = ([0.0f32; 5000], [crate::f16::ZERO; 5000]);
        let distance = |cols| prefetch_distance(&KeyRows::Run(Run::F32(Matrix::from_slice(&wide[..cols], 1, cols))));
        assert_eq!([128, 2048, 2049, 5000].map(distance), [16, 1, 1, 1]);
        assert_eq!(prefetch_distance(&KeyRows::Run(Run::F16(Matrix::from_slice(&half[..128], 1, 128)))), 64);
        assert!(distance(0) > 0);
    }
}
