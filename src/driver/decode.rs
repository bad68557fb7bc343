//! The few-queries form: some rows against one split of the keys after the other, the splits' results merged in order.
//!
//! ```text
//! for each split of the keys:     start from an empty state
//!     for each tile of the split: scores -> adjust -> weights -> values, all rows sharing each load
//!     merge the split's result into that of the splits before it
//! for each row:                   divide, write
//! ```
//!
//! Where there are too few tasks for the threads, splits are drawn by themselves, some of a task at a time; each leaves its
//! result in a slot, and the slots are merged afterwards, in the same order: the bits are the same.

#![forbid(unsafe_code)]

use super::marks::{Lanes, Marks, read_tensors};
use super::output::{Output, Rows, Slots};
use super::schedule::{Schedule, Work};
use super::threads::{fan_out, workers};
use super::workspace::{Floats, Scratch, Workspace, even_out, for_workers};
use crate::kernel::bf16_pairs::{self, copy_gathered, key_pairs, pairs_in};
use crate::kernel::decode::scores::{self, RowKeys};
use crate::kernel::decode::softmax::RowMax;
use crate::kernel::decode::{softmax, values};
use crate::kernel::prefetch::Ahead;
use crate::kernel::prefill::finish::log_sum_exp;
use crate::kernel::shape::round_up_lanes;
use crate::kernel::tile::{Extent, Unit, adjust_row};
use crate::kernel::widen::{widen_gathered, without_gaps};
use crate::plan::{FEW_TASK_ROWS, Plan, partial_len};
use crate::problem::Problem;
use crate::tensor::any::AnyMatrix;
use std::ops::Range;

/// Draws of each worker, where splits are drawn: the last to be done keeps the others waiting for a 32nd of the time.
const DRAWS: usize = 16;

pub(super) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    schedule: &Schedule,
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    let (tasks, splits) = (schedule.tasks().len(), plan.splits());
    let scratch = for_workers(&mut workspace.scratch, workers(plan.parallel, plan.tasks()));
    let slot = Slot::of(problem, schedule);
    // Splits beside each other are drawn together: their worker reads straight on.
    let run = splits.div_ceil((DRAWS * scratch.len()).div_ceil(tasks.max(1))).max(1);
    // (Splits that are tasks of their own the plan has bounded; there may be any number of others, which take no memory.)
    let own = if plan.split_tasks { splits.next_multiple_of(run) * slot.len() } else { 0 };
    let mut done = None;
    if plan.split_tasks {
        let [partials] = workspace.partials.buffers([tasks * own]);
        compute_splits((problem, plan, schedule), run, slot, partials, scratch);
        done = Some(&*partials);
    }
    let shared = output.share(problem, plan, schedule);
    let workers = workers(plan.parallel, tasks).min(scratch.len());
    fan_out(&mut scratch[..workers], &|scratch| {
        while let Some(rows) = shared.draw() {
            let done = done.map(|done| &done[rows.index() * own..][..own]);
            merge_splits(rows, shared.peek(), done, slot, scratch);
        }
    });
    even_out(scratch);
}

/// Computes the splits of all tasks into their slots, `run` of a task at a time.
///
/// * `partials`: `[tasks][splits, rounded up to whole runs][slot]`
fn compute_splits(
    (problem, plan, schedule): (&Problem<'_>, &Plan, &Schedule),
    run: usize,
    slot: Slot,
    partials: &mut [f32],
    scratch: &mut [Scratch],
) {
    let splits = plan.splits();
    let runs = splits.div_ceil(run);
    let slots = Slots::new(partials, run * slot.len());
    // The task of a draw, and its first split.
    let drawn = |index: usize| {
        let work = Work { problem, plan, task: schedule.tasks().get(index / runs)? };
        Some((work, index % runs * run))
    };
    fan_out(scratch, &|scratch| {
        while let Some((index, memory)) = slots.draw() {
            let Some((work, first)) = drawn(index) else { return };
            let next_run = drawn(slots.next()).map(|(work, first)| (work, split_keys(work, first)));
            let mut worker = Worker::new(work, slot, &mut scratch.floats, &mut scratch.lanes);
            let end = (first + run).min(splits);
            for (split, memory) in (first..end).zip(memory.chunks_exact_mut(slot.len())) {
                let next = if split + 1 < end { Some((work, split_keys(work, split + 1))) } else { next_run.clone() };
                worker.compute(split_keys(work, split), next, memory);
            }
        }
    });
}

/// The layout of a partial result: the values summed so far, `[rows][value_dim rounded up]`, then maxima, then sums; all in
/// whole vectors, so that none of them straddles two lines.
#[derive(Clone, Copy)]
struct Slot {
    rows: usize,
    width: usize,
}

impl Slot {
    /// For the largest of the tasks.
    fn of(problem: &Problem<'_>, schedule: &Schedule) -> Self {
        let rows = schedule.tasks().iter().map(|task| task.rows.len()).max().unwrap_or(0);
        Slot { rows, width: round_up_lanes(problem.dims.value_dim) }
    }

    fn len(self) -> usize {
        partial_len(self.rows, self.width)
    }

    fn clear(self, memory: &mut [f32]) {
        memory.fill(RowMax::EMPTY.sum); // 0, which is also where values start from
        self.states(memory).0.fill(RowMax::EMPTY.max);
    }

    /// The maxima and the sums.
    fn states(self, memory: &mut [f32]) -> (&mut [f32], &mut [f32]) {
        memory[self.rows * self.width..].split_at_mut(round_up_lanes(self.rows))
    }

    /// The values of the first `rows` rows.
    fn out(self, memory: &mut [f32], rows: usize) -> &mut [f32] {
        &mut memory[..rows * self.width]
    }

    /// The state and the values of row `n`.
    fn row(self, memory: &[f32], n: usize) -> (RowMax, &[f32]) {
        let (values, states) = memory.split_at(self.rows * self.width);
        let state = RowMax { max: states[n], sum: states[round_up_lanes(self.rows) + n] };
        (state, &values[n * self.width..][..self.width])
    }

    /// Changes the state and the values of row `n`.
    fn update(self, memory: &mut [f32], n: usize, change: impl FnOnce(&mut RowMax, &mut [f32])) {
        let (mut state, _) = self.row(memory, n);
        change(&mut state, &mut memory[n * self.width..][..self.width]);
        let (max, sum) = self.states(memory);
        (max[n], sum[n]) = (state.max, state.sum);
    }
}

/// The splits that hold all keys that the task sees: with a window, or lengths, a few of any number.
fn seen_splits(work: Work<'_>) -> Range<usize> {
    let (keys, size) = (&work.task.keys, work.plan.split_keys);
    keys.start / size..keys.end.div_ceil(size)
}

/// The keys of split `split` that the task sees.
fn split_keys(work: Work<'_>, split: usize) -> Range<usize> {
    let (start, seen) = (split * work.plan.split_keys, &work.task.keys);
    let (start, end) = (start.max(seen.start), (start + work.plan.split_keys).min(seen.end));
    start..end.max(start)
}

/// The results of a task's splits: in their slots, or to be computed one after the other.
enum Parts<'a, 'w> {
    Done(&'a [f32]),
    ToDo(&'w mut Worker<'a>),
}

impl<'a> Parts<'a, '_> {
    /// The result of split `split`, which has `keys`: in its slot, or computed into `own`, while memory is asked for what
    /// comes `next`.
    fn part<'m>(
        &'m mut self,
        split: usize,
        keys: Range<usize>,
        next: Option<TaskKeys<'a>>,
        own: &'m mut [f32],
    ) -> &'m [f32] {
        match self {
            Parts::Done(done) => &done[split * own.len()..][..own.len()],
            Parts::ToDo(worker) => {
                worker.compute(keys, next, own);
                own
            }
        }
    }
}

/// Merges the results of all splits of a task in order, `done` or still to be computed, and writes the rows.
fn merge_splits(
    mut rows: Rows<'_>,
    next_task: Option<Work<'_>>,
    done: Option<&[f32]>,
    slot: Slot,
    scratch: &mut Scratch,
) {
    let work = rows.work();
    let (isa, task) = (work.plan.isa, work.task);
    let Scratch { floats, merged, lanes, .. } = scratch;
    let [total, own] = merged.buffers([slot.len(), slot.len()]);
    let mut worker;
    let mut parts = match done {
        Some(done) => Parts::Done(done),
        None => {
            worker = Worker::new(work, slot, floats, lanes);
            Parts::ToDo(&mut worker)
        }
    };
    let splits = seen_splits(work);
    if splits.is_empty() {
        slot.clear(total);
    }
    for split in splits.clone() {
        let next = match (split_keys(work, split + 1), next_task) {
            (keys, _) if !keys.is_empty() => Some((work, keys)),
            (_, next) => next.map(|next| (next, next.task.keys.clone())),
        };
        let part = parts.part(split, split_keys(work, split), next, own);
        if split == splits.start {
            total.copy_from_slice(part); // nothing to merge it with yet
            continue;
        }
        for n in 0..task.rows.len() {
            let (other, other_out) = slot.row(part, n);
            slot.update(total, n, |state, out| softmax::merge(isa, state, out, other, other_out));
        }
    }
    for (n, r) in task.rows.clone().enumerate() {
        slot.update(total, n, |state, out| softmax::finish(isa, *state, out));
        let (state, out) = slot.row(total, n);
        rows.write(r..r + 1, (out, slot.width), |_| log_sum_exp(state.max, state.sum));
    }
}

/// Some keys of a task, of which its worker looks at all.
type TaskKeys<'a> = (Work<'a>, Range<usize>);

/// How far ahead of what is read memory is asked, in bytes: 8 KiB of f32, 16 KiB of halves. (On Zen 5, f32 asked for 16 KiB
/// ahead took a tenth longer, and halves 8 KiB ahead a sixth.)
const fn lead_bytes(element_bytes: usize) -> usize {
    32 * 1024 / element_bytes
}

/// The same in rows: one at least, where a single row is longer.
fn lead_rows(rows: AnyMatrix<'_>) -> usize {
    let row_bytes = rows.element_bytes() * rows.cols();
    (lead_bytes(rows.element_bytes()) / row_bytes.max(1)).max(1)
}

/// What to ask for while the rows `seen` are read of the keys, or of the values: as many rows some way ahead, and behind the
/// worker's own keys, the first rows of those that come `next`.
fn ask_ahead<'a>(
    ahead: &mut Ahead,
    rows: fn(&Work<'a>) -> AnyMatrix<'a>,
    (work, keys): &TaskKeys<'a>,
    seen: &Range<usize>,
    next: &Option<TaskKeys<'a>>,
) {
    let own = rows(work);
    let lead = lead_rows(own);
    let (start, end) = (seen.start + lead, seen.end + lead);
    ahead.clear();
    ahead.add(own.slice_rows(start.min(keys.end)..end.min(keys.end)));
    if let Some((work, more)) = next {
        let from = |n: usize| (more.start + n.saturating_sub(keys.end)).min(more.end);
        ahead.add(rows(work).slice_rows(from(start)..from(end)));
    }
}

/// What a worker needs for the splits of a task.
struct Worker<'a> {
    work: Work<'a>,
    slot: Slot,
    queries: RowQueries<'a>,
    lanes: &'a [Lanes<1>],
    spare: Spare<'a>,
    ahead: Ahead,
}

/// What a worker fills anew for each tile: a row of `tile_keys` for each row of the task, and copies.
struct Spare<'a> {
    /// Scores, then weights.
    scores: &'a mut [f32],
    /// The scores, kept where the weights alone don't tell hidden keys from faint ones.
    kept_scores: &'a mut [f32],
    /// Bias and boolean mask.
    bias: &'a mut [f32],
    /// Keys and values with gaps between their elements, and keys that are no pairs.
    copied_keys: &'a mut [f32],
    wide_values: &'a mut [f32],
}

impl<'a> Worker<'a> {
    fn new(work: Work<'a>, slot: Slot, floats: &'a mut Floats, lanes: &'a mut Vec<Lanes<1>>) -> Self {
        let (rows, tile, head_dim) = (work.task.rows.len(), work.plan.tile_keys, work.problem.dims.head_dim);
        let copy = |matrix: AnyMatrix<'_>| if matrix.has_contiguous_rows() { 0 } else { tile * matrix.cols() };
        let [queries, pair_queries, scores, kept_scores, bias, copied_keys, wide_values] = floats.buffers([
            rows * round_up_lanes(head_dim),
            if work.uses_pairs() { rows * round_up_lanes(pairs_in(head_dim)) } else { 0 },
            rows * tile,
            rows * tile,
            rows * tile,
            if work.uses_pairs() { tile * pairs_in(head_dim) } else { copy(work.keys()) },
            copy(work.values()),
        ]);
        lanes.clear();
        lanes.extend(work.task.rows.clone().map(|r| Lanes::new(work, r..r + 1, 1)));
        Worker {
            work,
            slot,
            queries: RowQueries::pack(work, queries, pair_queries),
            lanes,
            spare: Spare { scores, kept_scores, bias, copied_keys, wide_values },
            ahead: Ahead::nothing(),
        }
    }

    /// Computes one split, `keys`, into `memory`, and asks for what comes `next`.
    fn compute(&mut self, keys: Range<usize>, next: Option<TaskKeys<'a>>, memory: &mut [f32]) {
        self.slot.clear(memory);
        if keys.is_empty() {
            return;
        }
        let Worker { work, slot, queries, spare, ahead, .. } = self;
        let (isa, rows, tile, own) = (work.plan.isa, work.task.rows.len(), work.plan.tile_keys, (*work, keys.clone()));
        let (all_keys, all_values) = (work.keys(), work.values());
        let mut start = keys.start / tile * tile;
        while start < keys.end {
            let seen = start.max(keys.start)..(start + tile).min(keys.end);
            ask_ahead(ahead, Work::keys, &own, &seen, &next);
            queries.scores(*work, all_keys.slice_rows(seen.clone()), spare.copied_keys, spare.scores, ahead);
            let extent = weigh_rows(*work, self.lanes, seen.clone(), *slot, memory, spare);
            let values = without_gaps(isa, all_values.slice_rows(seen.clone()), spare.wide_values);
            let out = slot.out(memory, rows);
            if extent.peak == f32::NEG_INFINITY {
                // Nobody sees any of it. (Or the scores are NaN, which the sums have taken up.)
            } else if extent.hides && !values::all_finite(isa, values) {
                values::add_visible_values(isa, values, (spare.scores, spare.kept_scores), out, tile);
            } else {
                ask_ahead(ahead, Work::values, &own, &seen, &next);
                values::add_values(isa, values, spare.scores, out, tile, ahead);
            }
            start += tile;
        }
    }
}

/// The queries of a task's rows, as the dot products read them.
struct RowQueries<'a> {
    /// As f32, scaled: `[rows][head_dim rounded up]`; with pairs, only if one of the rows must not be formed from them.
    wide: &'a [f32],
    /// As pairs: `[rows][pairs rounded up]`.
    pairs: &'a [f32],
    /// Rows whose scores must not be formed from pairs, one bit each.
    unfit: u32,
}

impl<'a> RowQueries<'a> {
    fn pack(work: Work<'_>, wide: &'a mut [f32], as_pairs: &'a mut [f32]) -> Self {
        const { assert!(FEW_TASK_ROWS <= u32::BITS as usize) }; // `unfit`
        let rows = work.task.rows.clone();
        let width = round_up_lanes(work.problem.dims.head_dim);
        let mut unfit = 0;
        if work.uses_pairs() {
            let queries = work.queries(rows.clone());
            copy_gathered(&queries, as_pairs);
            unfit = bf16_pairs::unfit(&queries);
        }
        if unfit != 0 || !work.uses_pairs() {
            widen_gathered(work.plan.isa, work.queries(rows), work.query_factor(), (&mut *wide, width));
        }
        RowQueries { wide, pairs: as_pairs, unfit }
    }

    /// The scores of all rows, `[rows][tile_keys]`.
    fn scores(&self, work: Work<'_>, keys: AnyMatrix<'_>, copy: &mut [f32], scores: &mut [f32], ahead: &Ahead) {
        let (isa, tile) = (work.plan.isa, work.plan.tile_keys);
        let keys = match keys {
            AnyMatrix::Bf16(keys) if work.uses_pairs() => key_pairs(keys, copy),
            keys => {
                let keys = RowKeys::Any(without_gaps(isa, keys, copy));
                return scores::scores(isa, keys, self.wide, scores, tile, ahead);
            }
        };
        scores::scores(isa, RowKeys::Pairs(keys, work.query_factor()), self.pairs, scores, tile, ahead);
        let head_dim = work.problem.dims.head_dim;
        let rows = self.wide.chunks_exact(round_up_lanes(head_dim).max(1)).zip(scores.chunks_exact_mut(tile));
        for (_, (query, scores)) in rows.enumerate().filter(|(n, _)| self.unfit >> n & 1 == 1) {
            let elements = RowKeys::Any(AnyMatrix::Bf16(keys.elements(head_dim)));
            scores::scores(isa, elements, query, scores, tile, &Ahead::nothing());
        }
    }
}

/// Turns the raw scores of all rows into weights, folded into their states; returns what they are like together.
fn weigh_rows(
    work: Work<'_>,
    lanes: &[Lanes<1>],
    keys: Range<usize>,
    slot: Slot,
    memory: &mut [f32],
    spare: &mut Spare<'_>,
) -> Extent {
    let (isa, tile) = (work.plan.isa, work.plan.tile_keys);
    let mut all = Extent { peak: f32::NEG_INFINITY, hides: false };
    let mut peaks = [f32::NEG_INFINITY; FEW_TASK_ROWS];
    for (n, lane) in lanes.iter().enumerate() {
        let row = n * tile..n * tile + keys.len();
        let (scores, bias) = (&mut spare.scores[row.clone()], &mut spare.bias[row]);
        let bias = work.has_score_tensor().then(|| {
            read_tensors(work, lane, &keys, (&mut *bias, keys.len()));
            &*bias
        });
        let marks = Marks::new(work, lane, &keys, Unit::Log2);
        let adjust = marks.adjust(&keys, bias);
        let own = if adjust.is_none() { softmax::extent(isa, scores) } else { adjust_row(isa, adjust, scores) };
        peaks[n] = own.peak;
        all = Extent { peak: all.peak.max(own.peak), hides: all.hides | own.hides };
    }
    if all.hides {
        spare.kept_scores.copy_from_slice(spare.scores);
    }
    let whole = round_up_lanes(keys.len());
    for (n, peak) in peaks[..lanes.len()].iter().enumerate() {
        let scores = (&mut spare.scores[n * tile..][..whole], keys.len());
        slot.update(memory, n, |state, out| softmax::weights(isa, scores, *peak, state, out));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::matrix::Matrix;

    /// As many rows as the lead is long; one where a row is longer, or there is nothing in it.
    #[test]
    fn the_lead_is_a_row_at_least() {
        let (wide, half) = ([0.0f32; 5000], [crate::f16::ZERO; 5000]);
        let lead = |cols| lead_rows(AnyMatrix::F32(Matrix::from_slice(&wide[..cols], 1, cols)));
        assert_eq!([128, 2048, 2049, 5000].map(lead), [16, 1, 1, 1]);
        assert_eq!(lead_rows(AnyMatrix::F16(Matrix::from_slice(&half[..128], 1, 128))), 64);
        assert!(lead(0) > 0);
    }
}
