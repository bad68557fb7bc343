//! The list of tasks: a plan cut along batches, key/value heads, and blocks of rows.

#![forbid(unsafe_code)]

use crate::mask::cover::union;
use crate::plan::{Form, Plan};
use crate::problem::Problem;
use std::ops::Range;

/// Some rows of one key/value head, and the keys to look at for them.
///
/// Row `r` is query `r / group` of head `head_kv * group + r % group`: rows beside each other stand at nearly the same
/// position, so a tile of rows sees nearly the same keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) batch: usize,
    pub(super) head_kv: usize,
    pub(super) rows: Range<usize>,
    /// The span: no row of the task sees any other key.
    pub(super) keys: Range<usize>,
    pub(super) form: Form,
}

/// The tasks of a call, heaviest first; **each row is in exactly one of them**, which is what makes it sound to write
/// their rows from several threads. Only [`Schedule::fill`] changes it.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    tasks: Vec<Task>,
}

impl Schedule {
    /// A list of its own.
    pub(crate) fn new(problem: &Problem<'_>, plan: &Plan) -> Self {
        let mut schedule = Self::default();
        schedule.fill(problem, plan);
        schedule
    }

    /// Lists the tasks of `plan`: every batch, head and block of rows once, and the blocks divide the rows.
    pub(crate) fn fill(&mut self, problem: &Problem<'_>, plan: &Plan) {
        self.tasks.clear();
        let dims = &problem.dims;
        if dims.rows() == 0 {
            return; // without rows there is nothing to list, and there may be any number of batches
        }
        let group = dims.group();
        for batch in 0..dims.batch {
            let sequence = problem.sequences.get(batch);
            for block in 0..plan.blocks() {
                let rows = plan.block_rows(block);
                // The heads of a group stand at the same positions.
                let queries = rows.start / group..rows.end.div_ceil(group);
                let keys = union(queries.map(|i| problem.mask.span(&sequence, i)));
                for head_kv in 0..dims.heads_kv {
                    self.tasks.push(Task { batch, head_kv, rows: rows.clone(), keys: keys.clone(), form: plan.form() });
                }
            }
        }
        // A long task claimed last would leave the other workers waiting. (Equal ones stay in the order of memory.)
        self.tasks.sort_unstable_by_key(|task| {
            // (Saturating: keys that share their memory may be any number.)
            (
                std::cmp::Reverse(task.rows.len().saturating_mul(task.keys.len())),
                task.batch,
                task.head_kv,
                task.rows.start,
            )
        });
    }

    pub(super) fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.tasks.capacity() * size_of::<Task>()
    }
}
