//! Splits the keys of a task between workers, if there are too few tasks for the threads. Each split of the keys gives a
//! partial result. The partial results of a task are then merged in the order of the keys.
//!
//! The bits are those of a task that computes all its splits itself.

#![forbid(unsafe_code)]

use super::output::{ClaimedSlot, SlotClaims, TaskClaims};
use super::schedule::Schedule;
use super::workspace::{Workspace, for_workers};
use crate::kernel::decode::{Decode, reduce};
use crate::kernel::form::FormKernel;
use crate::kernel::partial::PartialLayout;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::Piece;
use crate::threads::{work_through, workers};
use std::ops::Range;

/// Claims for each worker. With 16, workers wait for the last one for at most a 16th of the time.
const CLAIMS_PER_WORKER: usize = 16;

/// Elements of partial results that several threads merge: 1 MiB, some 100 µs at 10 GB/s.
const PARALLEL_MERGE: usize = 1 << 18;

/// The partial results of a call, `[tasks][splits, rounded up to whole claims][slot]`.
#[derive(Clone, Copy)]
struct Partials {
    /// Elements of a partial result.
    slot: usize,
    splits: usize,
    /// Neighbouring splits that are claimed together, so that their worker reads one ascending stream.
    splits_per_claim: usize,
}

impl Partials {
    /// The number of claims of a task.
    fn claims(self) -> usize {
        self.splits.div_ceil(self.splits_per_claim)
    }

    /// Elements of one task's partial results.
    fn task_len(self) -> usize {
        self.claims() * self.splits_per_claim * self.slot
    }
}

pub(super) fn run(claims: &TaskClaims<'_>, schedule: &Schedule, workspace: &mut Workspace) {
    let (problem, plan, tasks) = (claims.problem(), claims.plan(), schedule.tasks());
    let scratch = for_workers(&mut workspace.scratch, workers(plan.worth(), plan.tasks()));
    let splits = plan.splits();
    let rows = tasks.iter().map(|task| task.rows.len()).max().unwrap_or(0);
    let partials = Partials {
        slot: PartialLayout::new(rows, problem.dims.value_dim).len(),
        splits,
        splits_per_claim: splits.div_ceil((CLAIMS_PER_WORKER * scratch.len()).div_ceil(tasks.len().max(1))).max(1),
    };
    let [memory] = workspace.partials.buffers([tasks.len() * partials.task_len()]);

    let slots = SlotClaims::new(memory, partials.splits_per_claim * partials.slot);
    work_through(plan.worth(), scratch, &slots, &|claimed, scratch| {
        compute_splits(claims, schedule, partials, claimed, scratch)
    });

    // Waking threads for less takes longer than merging.
    let parallel = tasks.len() * partials.task_len() >= PARALLEL_MERGE;
    let workers = if parallel { workers(plan.worth(), tasks.len()).min(scratch.len()) } else { 1 };
    let memory = &*memory;
    work_through(plan.worth(), &mut scratch[..workers], claims, &|mut claimed, scratch| {
        let own = &memory[claimed.index * partials.task_len()..][..partials.task_len()];
        let input = claimed.task.input(problem, plan);
        let splits = plan.splits_of(&claimed.task.keys).map(|split| &own[split * partials.slot..][..partials.slot]);
        reduce(&input, splits, scratch, &mut claimed.output);
    });
    Scratch::grow_to_largest(scratch);
}

/// Computes the splits of one claim into their slots: as `step_over`, but each result is kept and none is merged.
fn compute_splits(
    claims: &TaskClaims<'_>,
    schedule: &Schedule,
    partials: Partials,
    ClaimedSlot { index, next, memory }: ClaimedSlot<'_>,
    scratch: &mut Scratch,
) {
    let (problem, plan) = (claims.problem(), claims.plan());
    // The task of a claim, its splits, and the first split of the claim.
    let of_claim = |index: usize| {
        let task = schedule.tasks().get(index / partials.claims())?;
        let first = index % partials.claims() * partials.splits_per_claim;
        let seen = plan.splits_of(&task.keys);
        let splits = first.max(seen.start)..(first + partials.splits_per_claim).min(seen.end);
        (!splits.is_empty()).then(|| (task.input(problem, plan), splits, first))
    };
    let keys_of = |splits: &Range<usize>, span: &Range<usize>| {
        plan.split_of(splits.start, span).start..plan.split_of(splits.end - 1, span).end
    };
    let Some((task, splits, first)) = of_claim(index) else { return };
    let next = of_claim(next);
    let next = next.as_ref().map(|(task, splits, _)| Piece { task, keys: keys_of(splits, &task.span) });
    let piece = Piece { task: &task, keys: keys_of(&splits, &task.span) };
    let mut kernel = Decode::load(piece, next, None, scratch);
    for split in splits {
        for tile in plan.tiles_of(plan.split_of(split, &task.span)) {
            kernel.step(tile);
        }
        kernel.store_split(&mut memory[(split - first) * partials.slot..][..partials.slot]);
    }
}
