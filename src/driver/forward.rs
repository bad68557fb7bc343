//! Computes each task: loads its queries, steps over its keys tile by tile, finishes its rows.

#![forbid(unsafe_code)]

use super::output::{ClaimedTask, Output, TaskClaims};
use super::reduce;
use super::schedule::Schedule;
use super::workspace::{Workspace, for_workers};
use crate::kernel::decode::Decode;
use crate::kernel::form::FormKernel;
use crate::kernel::output::TaskOutput;
use crate::kernel::prefill::Prefill;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::Piece;
use crate::plan::{Form, Plan};
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
    let claims = output.share(problem, plan, schedule);
    if plan.has_split_tasks() {
        return reduce::run(&claims, schedule, workspace);
    }
    let scratch = for_workers(&mut workspace.scratch, workers(plan.worth(), schedule.tasks().len()));
    work_through(plan.worth(), scratch, &claims, &|claimed, scratch| compute(&claims, claimed, scratch));
    Scratch::grow_to_largest(scratch);
}

/// Computes a task and writes its rows.
fn compute(claims: &TaskClaims<'_>, claimed: ClaimedTask<'_>, scratch: &mut Scratch) {
    let (problem, plan) = (claims.problem(), claims.plan());
    let ClaimedTask { task, next, mut output, .. } = claimed;
    let input = task.input(problem, plan);
    let next = next.map(|next| next.input(problem, plan));
    let next = next.as_ref().map(|task| Piece { task, keys: task.span.clone() });
    let piece = Piece { task: &input, keys: input.span.clone() };
    match task.form {
        Form::Prefill => compute_as::<Prefill<'_, '_>>(piece, next, plan, &mut output, scratch),
        Form::Decode => compute_as::<Decode<'_, '_>>(piece, next, plan, &mut output, scratch),
    }
}

/// Computes a piece in the form `K`.
fn compute_as<'t, 'a: 't, K: FormKernel<'t, 'a>>(
    piece: Piece<'t, 'a>,
    next: Option<Piece<'_, 'a>>,
    plan: &Plan,
    output: &mut TaskOutput<'_>,
    scratch: &'t mut Scratch,
) {
    let keys = piece.keys.clone();
    let mut kernel = K::load(piece, next, Some(output), scratch);
    step_over(&mut kernel, plan, keys);
    kernel.finish(output);
}

/// Steps over `keys`, split by split and tile by tile.
fn step_over<'t, 'a: 't>(kernel: &mut impl FormKernel<'t, 'a>, plan: &Plan, keys: Range<usize>) {
    for split in plan.splits_of(&keys) {
        for tile in plan.tiles_of(plan.split_of(split, &keys)) {
            kernel.step(tile);
        }
        kernel.end_split();
    }
}
