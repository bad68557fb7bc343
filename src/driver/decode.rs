//! The few-queries form: some rows against one split of the keys after the other, the splits' results merged in order.
//!
//! ```text
//! for each split of the keys:     start from an empty state
//!     for each tile of the split: scores -> adjust -> weights -> values, all rows sharing each load
//!     merge the split's result into that of the splits before it
//! for each row:                   divide, write
//! ```
//!
//! Where there are too few tasks for the threads, each split is a task of its own, leaves its result in a slot, and the
//! slots are merged afterwards, in the same order: the bits are the same.

#![forbid(unsafe_code)]

use super::marks::{Lanes, Marks, has_score_tensor};
use super::output::{Output, Rows, Slots};
use super::schedule::{Schedule, Task};
use super::threads::{fan_out, workers};
use super::workspace::{Floats, Scratch, Workspace, even_out, for_workers};
use crate::kernel::adjust::{Unit, adjust_row, query_factor};
use crate::kernel::few::{self, RowMax};
use crate::kernel::finish::log_sum_exp;
use crate::kernel::load::AnyMatrix;
use crate::kernel::pack::{widen_rows, widen_scaled};
use crate::kernel::round_up_lanes;
use crate::mask::Verdict;
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
    let (tasks, splits) = (schedule.tasks().len(), plan.splits());
    let scratch = for_workers(&mut workspace.scratch, workers(plan.parallel, plan.tasks()));
    let slot = Slot::of(problem, schedule);
    let mut partials = None;
    if plan.split_tasks {
        let needed = tasks * splits * slot.len();
        if workspace.partials.len() < needed {
            workspace.partials.resize(needed, 0.0);
        }
        let memory = &mut workspace.partials[..needed];
        let slots = Slots::new(memory, slot.len());
        fan_out(scratch, &|scratch| {
            while let Some((index, memory)) = slots.draw() {
                let task = &schedule.tasks()[index / splits];
                run_split(problem, plan, task, index % splits, slot, memory, &mut scratch.floats);
            }
        });
        partials = Some(&workspace.partials[..needed]);
    }
    let shared = output.share(schedule);
    let workers = workers(plan.parallel, tasks).min(scratch.len());
    fan_out(&mut scratch[..workers], &|scratch| {
        while let Some(rows) = shared.draw() {
            let done = partials.map(|partials| &partials[rows.index() * splits * slot.len()..]);
            merge_splits(problem, plan, rows, done, slot, scratch);
        }
    });
    even_out(scratch);
}

/// The layout of a partial result: maxima, sums, then the values summed so far, `[rows][value_dim rounded up]`.
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
        self.rows * (2 + self.width)
    }

    fn parts(self, memory: &mut [f32]) -> (&mut [f32], &mut [f32], &mut [f32]) {
        let (max, rest) = memory[..self.len()].split_at_mut(self.rows);
        let (sum, out) = rest.split_at_mut(self.rows);
        (max, sum, out)
    }

    fn clear(self, memory: &mut [f32]) {
        let (max, sum, out) = self.parts(memory);
        max.fill(RowMax::EMPTY.max);
        sum.fill(RowMax::EMPTY.sum);
        out.fill(0.0);
    }
}

/// The keys of split `split` that `task` sees.
fn split_keys(plan: &Plan, task: &Task, split: usize) -> Range<usize> {
    let start = split * plan.split_keys;
    start.max(task.keys.start)..(start + plan.split_keys).min(task.keys.end)
}

/// Merges the results of all splits of a task in order, computing those that are not `done`, and writes the rows.
fn merge_splits(
    problem: &Problem<'_>,
    plan: &Plan,
    mut rows: Rows<'_>,
    done: Option<&[f32]>,
    slot: Slot,
    scratch: &mut Scratch,
) {
    let (isa, task) = (plan.isa, rows.task());
    let Scratch { floats, merged, .. } = scratch;
    let [total, own] = merged.buffers([slot.len(), slot.len()]);
    slot.clear(total);
    let (max, sum, out) = slot.parts(total);
    for split in 0..plan.splits() {
        if split_keys(plan, task, split).is_empty() {
            continue;
        }
        let part = match done {
            Some(done) => &done[split * slot.len()..][..slot.len()],
            None => {
                run_split(problem, plan, task, split, slot, own, floats);
                &*own
            }
        };
        let (part_max, rest) = part.split_at(slot.rows);
        let (part_sum, part_out) = rest.split_at(slot.rows);
        for r in 0..task.rows.len() {
            let mut state = RowMax { max: max[r], sum: sum[r] };
            let other = RowMax { max: part_max[r], sum: part_sum[r] };
            let at = r * slot.width..(r + 1) * slot.width;
            few::merge(isa, &mut state, &mut out[at.clone()], other, &part_out[at]);
            (max[r], sum[r]) = (state.max, state.sum);
        }
    }
    for (n, r) in task.rows.clone().enumerate() {
        let state = RowMax { max: max[n], sum: sum[n] };
        let out = &mut out[n * slot.width..][..slot.width];
        few::finish(isa, state, out);
        rows.write(isa, r, &out[..problem.dims.value_dim], log_sum_exp(state.max, state.sum));
    }
}

/// Computes one split of one task into `memory`.
fn run_split(
    problem: &Problem<'_>,
    plan: &Plan,
    task: &Task,
    split: usize,
    slot: Slot,
    memory: &mut [f32],
    floats: &mut Floats,
) {
    slot.clear(memory);
    let keys = split_keys(plan, task, split);
    if keys.is_empty() {
        return;
    }
    let (dims, rows, tile) = (&problem.dims, task.rows.len(), plan.tile_keys);
    let width = round_up_lanes(dims.head_dim);
    let all_keys = AnyMatrix::new(&problem.k, task.batch, task.head_kv);
    let all_values = AnyMatrix::new(&problem.v, task.batch, task.head_kv);
    // Rows with gaps between their elements are copied, tile by tile.
    let copy = |matrix: AnyMatrix<'_>| if matrix.has_contiguous_rows() { 0 } else { tile * matrix.cols() };
    let [queries, scores, kept_scores, bias, wide_keys, wide_values] =
        floats.buffers([rows * width, rows * tile, rows * tile, rows * tile, copy(all_keys), copy(all_values)]);
    pack_rows(problem, plan, task, queries, width);
    let mut tile_start = keys.start / tile * tile;
    while tile_start < keys.end {
        let seen = tile_start.max(keys.start)..(tile_start + tile).min(keys.end);
        let tile_keys = without_gaps(plan, all_keys.slice_rows(seen.clone()), wide_keys);
        let tile_values = without_gaps(plan, all_values.slice_rows(seen.clone()), wide_values);
        few::scores(plan.isa, tile_keys, queries, scores, tile);
        let verdict = adjust_rows(problem, plan, task, seen.clone(), slot, memory, (scores, kept_scores, bias));
        let (_, _, out) = slot.parts(memory);
        let out = &mut out[..rows * slot.width];
        match verdict {
            Verdict::Hidden => {}
            Verdict::Partial if !few::all_finite(plan.isa, tile_values) => {
                few::add_visible_values(plan.isa, tile_values, (scores, kept_scores), out, tile);
            }
            _ => few::add_values(plan.isa, tile_values, scores, out, tile),
        }
        tile_start += tile;
    }
}

/// Query rows, scaled, `[rows][head_dim rounded up]`.
fn pack_rows(problem: &Problem<'_>, plan: &Plan, task: &Task, queries: &mut [f32], width: usize) {
    let factor = query_factor(problem.scale, problem.bias.softcap, Unit::Log2);
    queries.fill(0.0);
    for (to, r) in queries.chunks_exact_mut(width.max(1)).zip(task.rows.clone()) {
        let (h, i) = task.head_and_query(r, problem.dims.group());
        let row = AnyMatrix::new(&problem.q, task.batch, h).slice_rows(i..i + 1);
        widen_scaled(plan.isa, row, factor, &mut to[..problem.dims.head_dim]);
    }
}

/// The rows themselves, or their copy in `wide` if there are gaps between their elements.
fn without_gaps<'a>(plan: &Plan, rows: AnyMatrix<'a>, wide: &'a mut [f32]) -> AnyMatrix<'a> {
    if rows.has_contiguous_rows() {
        return rows;
    }
    let wide = &mut wide[..rows.rows() * rows.cols()];
    widen_rows(plan.isa, rows, wide);
    AnyMatrix::F32(Matrix::from_slice(wide, rows.rows(), rows.cols()))
}

/// Turns the raw scores of all rows into weights; the verdict is on all of them together.
fn adjust_rows(
    problem: &Problem<'_>,
    plan: &Plan,
    task: &Task,
    keys: Range<usize>,
    slot: Slot,
    memory: &mut [f32],
    (scores, kept_scores, bias): (&mut [f32], &mut [f32], &mut [f32]),
) -> Verdict {
    let tile = plan.tile_keys;
    let (max, sum, out) = slot.parts(memory);
    let (mut all_hidden, mut all_full) = (true, true);
    for (n, r) in task.rows.clone().enumerate() {
        let scores = &mut scores[n * tile..][..keys.len()];
        let bias = &mut bias[n * tile..][..keys.len()];
        let lane = Lanes::new(problem, plan, task, r..r + 1, 1);
        let marks = Marks::read(problem, task, &lane, &keys, Unit::Log2, (&mut *bias, keys.len()));
        let peak = match marks.verdict {
            Verdict::Hidden => {
                scores.fill(f32::NEG_INFINITY);
                f32::NEG_INFINITY
            }
            _ => adjust_row(plan.isa, marks.adjust(has_score_tensor(problem).then_some(&*bias)), scores),
        };
        all_hidden &= marks.verdict == Verdict::Hidden;
        // A score that overflowed to -inf hides its key, too.
        all_full &= marks.verdict == Verdict::Full && !scores.contains(&f32::NEG_INFINITY);
        kept_scores[n * tile..][..keys.len()].copy_from_slice(scores);
        let mut state = RowMax { max: max[n], sum: sum[n] };
        few::weights(plan.isa, scores, peak, &mut state, &mut out[n * slot.width..][..slot.width]);
        (max[n], sum[n]) = (state.max, state.sum);
    }
    match (all_hidden, all_full) {
        (true, _) => Verdict::Hidden,
        (_, true) => Verdict::Full,
        _ => Verdict::Partial,
    }
}
