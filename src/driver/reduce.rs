//! Splits the keys of a task between workers, if there are too few tasks for the threads. Each split of the keys gives a
//! partial result. The partial results of a task are then merged in the order of the keys.
//!
//! A task has one head here, because there are few. The bits are those of a task that computes all its splits itself.

#![forbid(unsafe_code)]

use super::output::{ClaimedSlot, Output, SlotClaims};
use super::schedule::{Schedule, Task};
use super::shared_prefix::SharedPrefixes;
use super::workspace::Workspace;
use crate::kernel::decode::{Decode, reduce};
use crate::kernel::form::FormKernel;
use crate::kernel::partial::PartialLayout;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::Piece;
use crate::plan::{Form, KeySteps, Plan, Splits};
use crate::problem::Problem;
use crate::threads::{work_through, workers};
use std::ops::Range;

/// Claims for each worker. With 16, workers wait for the last one for at most a 16th of the time.
const CLAIMS_PER_WORKER: usize = 16;

/// Elements of partial results that several threads merge: 1 MiB, some 100 µs at 10 GB/s.
const PARALLEL_MERGE: usize = 1 << 18;

/// The partial results of a call, `[claims][splits of a claim][slot]`.
#[derive(Clone, Copy)]
struct Partials {
    /// Elements of a partial result.
    slot: usize,
    tasks: usize,
    /// The most splits that a task sees. They are counted from the task's first one.
    splits: usize,
    /// Neighbouring splits of a task that are claimed together, so that their worker reads one ascending stream.
    splits_per_claim: usize,
    /// Whether the claims of the same splits follow each other, not the claims of the same task.
    by_splits: bool,
}

impl Partials {
    fn new(
        (problem, plan): (&Problem<'_>, &Plan),
        (schedule, prefixes): (&Schedule, &SharedPrefixes),
        workers: usize,
    ) -> Self {
        let tasks = schedule.tasks();
        let rows = tasks.iter().map(|task| task.rows.len()).max().unwrap_or(0);
        let steps = plan.steps(Form::Decode);
        let splits = tasks.iter().map(|task| splits_of(problem, steps, (task, prefixes)).len()).max().unwrap_or(0);
        // Where the heads of a key lie side by side, the next head's split is on the same pages. Task by task, every page was
        // visited again for each head, and decode took 1.3 to 2 times as long (Zen 3).
        let by_splits = problem.has_heads_side_by_side();
        let claims_per_task = (CLAIMS_PER_WORKER * workers).div_ceil(tasks.len().max(1));
        Partials {
            slot: PartialLayout::new(rows, problem.dims.value_dim).len(),
            tasks: tasks.len(),
            splits,
            splits_per_claim: if by_splits { 1 } else { splits.div_ceil(claims_per_task).max(1) },
            by_splits,
        }
    }

    /// The number of claims of a task.
    fn claims(self) -> usize {
        self.splits.div_ceil(self.splits_per_claim)
    }

    /// Elements of all partial results.
    fn len(self) -> usize {
        self.tasks * self.claims() * self.splits_per_claim * self.slot
    }

    /// The task of a claim, and the first split.
    fn place(self, claim: usize) -> Option<(usize, usize)> {
        let claims = self.claims();
        let (task, n) =
            if self.by_splits { (claim % self.tasks, claim / self.tasks) } else { (claim / claims, claim % claims) };
        (task < self.tasks && n < claims).then_some((task, n * self.splits_per_claim))
    }

    /// The partial result of a split of a task.
    fn range(self, task: usize, split: usize) -> Range<usize> {
        let n = split / self.splits_per_claim;
        let claim = if self.by_splits { n * self.tasks + task } else { task * self.claims() + n };
        let at = (claim * self.splits_per_claim + split % self.splits_per_claim) * self.slot;
        at..at + self.slot
    }
}

pub(super) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    (schedule, prefixes): (&Schedule, &SharedPrefixes),
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    let scratch = Scratch::for_workers(&mut workspace.scratch, workers(plan.worth(), plan.tasks()));
    let steps = plan.steps(Form::Decode);
    let partials = Partials::new((problem, plan), (schedule, prefixes), scratch.len());
    let [memory] = workspace.partials.buffers([partials.len()]);

    let slots = SlotClaims::new(memory, partials.splits_per_claim * partials.slot, scratch.len());
    work_through(plan.worth(), scratch, &slots, &|claimed, scratch| {
        compute_splits((problem, plan), (schedule, prefixes), partials, claimed, scratch)
    });

    // Waking threads for less takes longer than merging.
    let parallel = partials.len() >= PARALLEL_MERGE;
    let workers = if parallel { workers(plan.worth(), partials.tasks).min(scratch.len()) } else { 1 };
    let memory = &*memory;
    let claims = output.share(problem, plan, schedule, workers);
    work_through(plan.worth(), &mut scratch[..workers], &claims, &|mut claimed, scratch| {
        let (index, head, rows) = (claimed.index, claimed.task.heads.start, &claimed.task.rows);
        let input = claimed.task.input(problem, plan, head);
        let splits = splits_of(problem, steps, (claimed.task, prefixes)).len();
        let splits = (0..splits).map(|n| &memory[partials.range(index, n)]);
        let earlier = prefixes.results_of(&input, problem, head);
        reduce(&input, earlier.as_ref(), splits, scratch, &mut claimed.output(head, rows));
    });
    Scratch::grow_to_largest(scratch);
}

/// Computes the splits of one claim into their slots: as `step_over`, but each result is kept and none is merged.
fn compute_splits(
    (problem, plan): (&Problem<'_>, &Plan),
    (schedule, prefixes): (&Schedule, &SharedPrefixes),
    partials: Partials,
    ClaimedSlot { index, next, memory }: ClaimedSlot<'_>,
    scratch: &mut Scratch,
) {
    let steps = plan.steps(Form::Decode);
    // The task of a claim, the splits that it sees, and which of them are the claim's.
    let of_claim = |index: usize| {
        let (task, first) = partials.place(index)?;
        let task = &schedule.tasks()[task];
        let seen = splits_of(problem, steps, (task, prefixes));
        let own = first..(first + partials.splits_per_claim).min(seen.len());
        (!own.is_empty()).then(|| (task.input(problem, plan, task.heads.start), seen, own))
    };
    let keys_of = |seen: &Splits, own: &Range<usize>, span: &Range<usize>| {
        steps.split_of(seen.get(own.start), span).start..steps.split_of(seen.get(own.end - 1), span).end
    };
    let Some((task, seen, own)) = of_claim(index) else { return };
    let next = of_claim(next);
    let next = next.as_ref().map(|(task, seen, own)| Piece { task, keys: keys_of(seen, own, &task.span) });
    let piece = Piece { task: &task, keys: keys_of(&seen, &own, &task.span) };
    Decode::list_rows(&task, scratch);
    let mut prefetch = Prefetch::none();
    let mut kernel = Decode::load(piece, next, None, &mut prefetch, scratch);
    let lost = task.lost_keys();
    for n in own.clone() {
        for tile in steps.seen_tiles(steps.split_of(seen.get(n), &task.span), &lost) {
            kernel.step(tile);
        }
        kernel.store_split(&mut memory[(n - own.start) * partials.slot..][..partials.slot]);
    }
}

/// The splits that a task sees, after those that its sequence shares.
fn splits_of(problem: &Problem<'_>, steps: KeySteps, (task, prefixes): (&Task, &SharedPrefixes)) -> Splits {
    let (b, _) = problem.dims.batch_and_head(task.heads.start);
    steps.splits_of(&prefixes.rest_of(task, problem), &problem.masks.lost(b))
}
