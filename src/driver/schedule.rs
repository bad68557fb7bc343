//! The list of tasks: a plan cut along batches, key/value heads, and blocks of rows.

#![forbid(unsafe_code)]

use crate::mask::hull;
use crate::plan::Plan;
use crate::problem::Problem;
use std::ops::Range;

/// Some rows of one key/value head, and the keys to look at for them.
///
/// Row `r` is query `r / group` of head `head_kv * group + r % group`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) batch: usize,
    pub(super) head_kv: usize,
    pub(super) rows: Range<usize>,
    /// The span: no row of the task sees any other key.
    pub(super) keys: Range<usize>,
}

impl Task {
    /// The query head and the query of row `r`.
    #[inline]
    pub(super) fn head_and_query(&self, r: usize, group: usize) -> (usize, usize) {
        (self.head_kv * group + r % group, r / group)
    }
}

/// The tasks of a call, heaviest first; **each row is in exactly one of them**, which is what makes it sound to write
/// their rows from several threads. Only [`Schedule::fill`] changes it.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    tasks: Vec<Task>,
    group: usize,
}

impl Schedule {
    /// A list of its own.
    pub(crate) fn new(problem: &Problem<'_>, plan: &Plan) -> Self {
        let mut schedule = Self::default();
        schedule.fill(problem, plan);
        schedule
    }

    /// Lists the tasks of `plan`: every batch, head and block of rows once, and the blocks divide the rows.
    pub(super) fn fill(&mut self, problem: &Problem<'_>, plan: &Plan) {
        self.tasks.clear();
        let dims = &problem.dims;
        self.group = dims.group();
        for batch in 0..dims.batch {
            for block in 0..plan.blocks.count {
                let rows = plan.block_rows(block);
                // The heads of a group stand at the same positions.
                let queries = rows.start / self.group..rows.end.div_ceil(self.group);
                let keys = hull(queries.map(|i| problem.mask.interval(batch, i)));
                for head_kv in 0..dims.heads_kv {
                    self.tasks.push(Task { batch, head_kv, rows: rows.clone(), keys: keys.clone() });
                }
            }
        }
        // A long task drawn last would leave the other workers waiting. (Equal ones stay in the order of memory.)
        self.tasks.sort_unstable_by_key(|task| {
            (std::cmp::Reverse(task.rows.len() * task.keys.len()), task.batch, task.head_kv, task.rows.start)
        });
    }

    pub(super) fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.tasks.capacity() * size_of::<Task>()
    }

    pub(super) fn group(&self) -> usize {
        self.group
    }
}
