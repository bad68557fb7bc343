//! Threads and tiles: carries out a plan. No formulas and no instructions.
//!
//! ```text
//! schedule   the plan's tasks, those with the most visible keys first
//! threads    as many workers as the pool has, each with scratch memory of its own
//! marks      what mask and bias say about a tile
//! prefill    a task of the many-queries form: a block of rows, tile after tile of keys
//! decode     a task of the few-queries form: some rows, a split of the keys
//! inspect    scores, written out to be looked at
//! output     hands each row of the output to the one task that writes it
//! ```

mod ahead;
mod decode;
pub(crate) mod inspect;
mod marks;
mod output;
mod prefill;
mod schedule;
mod threads;
mod workspace;

pub(crate) use output::Output;
pub(crate) use schedule::Schedule;
pub use workspace::Workspace;

use crate::plan::{Form, Plan};
use crate::problem::Problem;

/// Computes `problem` as `plan` says into `output`.
pub(crate) fn run(problem: &Problem<'_>, plan: &Plan, output: Output<'_>, workspace: &mut Workspace) {
    if output.is_empty() {
        return; // before listing tasks: with nothing to write, the other dimensions may be anything
    }
    // Taken out and put back, so that the list and the rest of the workspace can be borrowed apart.
    let mut schedule = std::mem::take(&mut workspace.schedule);
    schedule.fill(problem, plan);
    run_scheduled(problem, plan, &schedule, output, workspace);
    workspace.schedule = schedule;
}

/// As [`run`], with the list of tasks already made: by [`Schedule::fill`], for this problem and plan.
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
    match plan.form {
        Form::FewQueries => decode::run(problem, plan, schedule, output, workspace),
        Form::ManyQueries => prefill::run(problem, plan, schedule, output, workspace),
    }
}
