//! Threads and tiles: carries out a plan. No formulas and no instructions.
//!
//! ```text
//! schedule   the plan's tasks, those with the most visible keys first
//! threads    as many workers as the pool has, each with scratch memory of its own
//! marks      what mask and bias say about a tile
//! prefill    a task of the many-queries form: a block of rows, tile after tile of keys
//! decode     a task of the few-queries form: some rows, a split of the keys
//! output     hands each row of the output to the one task that writes it
//! ```

mod decode;
mod marks;
mod output;
mod prefill;
mod schedule;
mod threads;
mod workspace;

pub(crate) use output::Output;
pub use workspace::Workspace;

use crate::plan::{Form, Plan};
use crate::problem::Problem;

/// Computes `problem` as `plan` says into `output`.
pub(crate) fn run(problem: &Problem<'_>, plan: &Plan, output: Output<'_>, workspace: &mut Workspace) {
    match plan.form {
        Form::FewQueries => decode::run(problem, plan, output, workspace),
        Form::ManyQueries => prefill::run(problem, plan, output, workspace),
    }
}
