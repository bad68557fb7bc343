//! Computes each task: loads its queries, steps over its keys tile by tile, finishes its rows.

#![forbid(unsafe_code)]

use super::output::{ClaimedTask, Output, TaskClaims};
use super::reduce;
use super::schedule::Schedule;
use super::workspace::{Workspace, for_workers};
use crate::kernel::decode::Decode;
use crate::kernel::form::FormKernel;
use crate::kernel::output::TaskOutput;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::Prefill;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::Piece;
use crate::plan::{Form, KeySteps, Plan};
use crate::problem::Problem;
use crate::threads::{work_through, workers};
use std::ops::Range;

/// Computes `problem` into `output`, as `plan` says.
pub(crate) fn run(problem: &Problem<'_>, plan: &Plan, output: Output<'_>, workspace: &mut Workspace) {
    if output.is_empty() {
        return; // before listing tasks: with nothing to write, the other dimensions may be anything
    }
    // Moved out and back, so that the list and the rest of the workspace can be borrowed separately.
    let mut schedule = std::mem::take(&mut workspace.schedule);
    schedule.fill(problem, plan);
    run_scheduled(problem, plan, &schedule, output, workspace);
    workspace.schedule = schedule;
}

/// As [`run`], with a list of tasks that [`Schedule::fill`] has made for this problem and plan.
pub(crate) fn run_scheduled(
    problem: &Problem<'_>,
    plan: &Plan,
    schedule: &Schedule,
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    if output.is_empty() {
        return;
    }
    if plan.has_split_tasks() {
        return reduce::run(problem, plan, schedule, output, workspace);
    }
    let scratch = for_workers(&mut workspace.scratch, workers(plan.worth(), schedule.tasks().len()));
    let claims = output.share(problem, plan, schedule, scratch.len());
    work_through(plan.worth(), scratch, &claims, &|claimed, scratch| compute(&claims, claimed, scratch));
    Scratch::grow_to_largest(scratch);
}

/// Computes a task, one head after the other, and writes its rows.
fn compute(claims: &TaskClaims<'_>, mut claimed: ClaimedTask<'_>, scratch: &mut Scratch) {
    let (problem, plan, task) = (claims.problem(), claims.plan(), claimed.task);
    // The input of a head and that of the next one, by turns.
    let mut inputs = [Some(task.input(problem, plan, task.heads.start)), None];
    let mut prefetch = Prefetch::none();
    if let [Some(input), _] = &inputs {
        match task.form {
            Form::Prefill => Prefill::list_rows(input, scratch),
            Form::Decode => Decode::list_rows(input, scratch),
        }
    }
    if !task.tail.is_empty() {
        Decode::list_rows(&task.tail_input(problem, plan, task.heads.start), scratch);
    }
    for head in task.heads.clone() {
        let [even, odd] = &mut inputs;
        let (input, next) = if (head - task.heads.start).is_multiple_of(2) { (even, odd) } else { (odd, even) };
        *next = match claimed.next {
            _ if head + 1 < task.heads.end => Some(task.input(problem, plan, head + 1)),
            next => next.map(|next| next.input(problem, plan, next.heads.start)),
        };
        let (Some(input), next) = (&*input, &*next) else { unreachable!("a head without input") };
        let next = next.as_ref().map(|task| Piece { task, keys: task.span.clone() });
        let pieces = (Piece { task: input, keys: input.span.clone() }, next);
        let (steps, output) = (plan.steps(task.form), &mut claimed.output(head, &task.rows));
        match task.form {
            Form::Prefill => compute_as::<Prefill<'_, '_>>(pieces, steps, output, &mut prefetch, scratch),
            Form::Decode => compute_as::<Decode<'_, '_>>(pieces, steps, output, &mut prefetch, scratch),
        }
        if !task.tail.is_empty() {
            // Keys and values are in cache.
            let input = task.tail_input(problem, plan, head);
            let pieces = (Piece { task: &input, keys: input.span.clone() }, None);
            let (steps, output) = (plan.steps(Form::Decode), &mut claimed.output(head, &task.tail));
            compute_as::<Decode<'_, '_>>(pieces, steps, output, &mut prefetch, scratch);
        }
    }
}

/// Computes a piece in the form `K`. The other piece is the next one.
fn compute_as<'t, 'a: 't, K: FormKernel<'t, 'a>>(
    (piece, next): (Piece<'t, 'a>, Option<Piece<'_, 'a>>),
    steps: KeySteps,
    output: &mut TaskOutput<'_>,
    prefetch: &'t mut Prefetch,
    scratch: &'t mut Scratch,
) {
    let (keys, lost) = (piece.keys.clone(), piece.task.lost_keys());
    let mut kernel = K::load(piece, next, Some(output), prefetch, scratch);
    step_over(&mut kernel, steps, keys, lost);
    kernel.finish(output);
}

/// Steps over `keys`, split by split and tile by tile. Tiles of nothing but lost keys are left out, whatever their number.
fn step_over<'t, 'a: 't>(
    kernel: &mut impl FormKernel<'t, 'a>,
    steps: KeySteps,
    keys: Range<usize>,
    lost: Range<usize>,
) {
    let splits = steps.splits_of(&keys, &lost);
    for split in (0..splits.len()).map(|n| splits.get(n)) {
        for tile in steps.seen_tiles(steps.split_of(split, &keys), &lost) {
            kernel.step(tile);
        }
        kernel.end_split();
    }
}
