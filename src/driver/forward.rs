//! Computes each task: loads its queries, steps over its keys tile by tile, finishes its rows.

#![forbid(unsafe_code)]

use super::output::{ClaimedTask, Output, TaskClaims};
use super::reduce;
use super::schedule::Schedule;
use super::shared_prefix::SharedPrefixes;
use super::short_heads;
use super::steps::step_over;
use super::workspace::Workspace;
use crate::kernel::decode::Decode;
use crate::kernel::form::FormKernel;
use crate::kernel::output::TaskOutput;
use crate::kernel::partial::EarlierResults;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::Prefill;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::{Piece, TaskInput};
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
    // Moved out and back, as the schedule.
    let mut prefixes = std::mem::take(&mut workspace.prefixes);
    prefixes.compute(problem, plan, &mut workspace.scratch);
    match plan.has_split_tasks() {
        true => reduce::run(problem, plan, (schedule, &prefixes), output, workspace),
        false => run_tasks(problem, plan, (schedule, &prefixes), output, workspace),
    }
    workspace.prefixes = prefixes;
}

/// Computes the tasks, after what their sequences share.
fn run_tasks(
    problem: &Problem<'_>,
    plan: &Plan,
    (schedule, prefixes): (&Schedule, &SharedPrefixes),
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    let scratch = Scratch::for_workers(&mut workspace.scratch, workers(plan.worth(), schedule.tasks().len()));
    let claims = output.share(problem, plan, schedule, scratch.len());
    work_through(plan.worth(), scratch, &claims, &|claimed, scratch| compute(&claims, prefixes, claimed, scratch));
    Scratch::grow_to_largest(scratch);
}

/// Computes a task, one head after the other, and writes its rows.
fn compute(claims: &TaskClaims<'_>, prefixes: &SharedPrefixes, mut claimed: ClaimedTask<'_>, scratch: &mut Scratch) {
    let (problem, plan, task) = (claims.problem(), claims.plan(), claimed.task);
    let mut prefetch = Prefetch::none();
    let mut heads = task.heads.clone();
    let input = task.input(problem, plan, heads.start);
    match task.form {
        Form::Prefill => {
            Prefill::list_rows(&input, scratch);
            heads.start = short_heads::compute(claims, &mut claimed, &input, &mut prefetch, scratch);
        }
        Form::Decode => Decode::list_rows(&input, scratch),
    }
    if heads.is_empty() {
        return;
    }
    if !task.tail.is_empty() {
        Decode::list_rows(&task.tail_input(problem, plan, heads.start), scratch);
    }
    let input = if heads.start == task.heads.start { input } else { task.input(problem, plan, heads.start) };
    compute_heads((claims, prefixes), &mut claimed, (heads, input), &mut prefetch, scratch);
}

/// Computes the heads `heads` of a task whose rows have been listed; `first` is the input of the first of them.
fn compute_heads<'c>(
    (claims, prefixes): (&'c TaskClaims<'_>, &SharedPrefixes),
    claimed: &mut ClaimedTask<'_>,
    (heads, first): (Range<usize>, TaskInput<'c>),
    prefetch: &mut Prefetch,
    scratch: &mut Scratch,
) {
    let (problem, plan, task) = (claims.problem(), claims.plan(), claimed.task);
    // The input of a head and that of the next one, by turns.
    let mut inputs = [Some(first), None];
    for head in heads.clone() {
        let [even, odd] = &mut inputs;
        let (input, next) = if (head - heads.start).is_multiple_of(2) { (even, odd) } else { (odd, even) };
        *next = match claimed.next {
            _ if head + 1 < task.heads.end => Some(task.input(problem, plan, head + 1)),
            next => next.map(|next| next.input(problem, plan, next.heads.start)),
        };
        let (Some(input), next) = (&*input, &*next) else { unreachable!("a head without input") };
        let next = next.as_ref().map(|task| Piece { task, keys: prefixes.rest(&task.sequence, &task.span) });
        let pieces = (Piece { task: input, keys: prefixes.rest(&input.sequence, &input.span) }, next);
        let (steps, output) = (plan.steps(task.form), &mut claimed.output(head, &task.rows));
        match task.form {
            Form::Prefill => compute_as::<Prefill<'_, '_>>(pieces, steps, output, prefetch, scratch),
            Form::Decode => match prefixes.results_of(input, problem, head) {
                Some(earlier) => compute_rest(pieces, &earlier, steps, output, prefetch, scratch),
                None => compute_as::<Decode<'_, '_>>(pieces, steps, output, prefetch, scratch),
            },
        }
        if !task.tail.is_empty() {
            // Keys and values are in cache.
            let input = task.tail_input(problem, plan, head);
            let pieces = (Piece { task: &input, keys: input.span.clone() }, None);
            let (steps, output) = (plan.steps(Form::Decode), &mut claimed.output(head, &task.tail));
            compute_as::<Decode<'_, '_>>(pieces, steps, output, prefetch, scratch);
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

/// As [`compute_as`], for rows whose first keys have been computed.
fn compute_rest<'t, 'a: 't>(
    (piece, next): (Piece<'t, 'a>, Option<Piece<'_, 'a>>),
    earlier: &EarlierResults<'_>,
    steps: KeySteps,
    output: &mut TaskOutput<'_>,
    prefetch: &'t mut Prefetch,
    scratch: &'t mut Scratch,
) {
    let (keys, lost) = (piece.keys.clone(), piece.task.lost_keys());
    let mut kernel = Decode::load(piece, next, Some(output), prefetch, scratch);
    kernel.start_from(earlier);
    step_over(&mut kernel, steps, keys, lost);
    kernel.finish(output);
}
