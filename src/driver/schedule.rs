//! The list of tasks: one for each batch, key/value head, and block of rows.

#![forbid(unsafe_code)]

use crate::mask::cover::union;
use crate::plan::{Form, Plan};
use crate::problem::Problem;
use std::ops::Range;

/// A block of rows of one key/value head, and its span of keys.
///
/// Row `r` is query `r / group` of head `head_kv * group + r % group`: neighbouring rows have nearly the same position, so the
/// rows of a tile see nearly the same keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) batch: usize,
    pub(super) head_kv: usize,
    pub(super) rows: Range<usize>,
    /// The span: no row of the task sees a key outside it.
    pub(super) keys: Range<usize>,
    pub(super) form: Form,
}

/// The tasks of a call, heaviest first.
///
/// **Each row is in exactly one task**: several threads write rows, and this makes it sound. Only [`Schedule::fill`] changes
/// the list.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    tasks: Vec<Task>,
}

impl Schedule {
    /// Lists the tasks of `plan`: each batch, key/value head and block of rows once. The blocks are a partition of the rows.
    pub(crate) fn fill(&mut self, problem: &Problem<'_>, plan: &Plan) {
        self.tasks.clear();
        let dims = &problem.dims;
        if dims.rows() == 0 {
            return; // without rows there are no tasks, and the number of batches is not limited
        }
        let group = dims.group();
        for batch in 0..dims.batch {
            let sequence = problem.sequences.get(batch);
            for block in 0..plan.blocks() {
                let rows = plan.block_rows(block);
                // The heads of a group have the same positions.
                let queries = rows.start / group..rows.end.div_ceil(group);
                let span = |h: usize| union(queries.clone().map(move |i| problem.masks.span(&sequence, h, i)));
                let by_position = span(0);
                for head_kv in 0..dims.heads_kv {
                    // Other masks may differ from head to head.
                    let keys = match problem.masks.open {
                        [] => by_position.clone(),
                        _ => union((head_kv * group..(head_kv + 1) * group).map(span)),
                    };
                    self.tasks.push(Task { batch, head_kv, rows: rows.clone(), keys, form: plan.form() });
                }
            }
        }
        // Heaviest first, because the other workers would wait for a long task that is claimed last. Equal tasks stay in the
        // order of memory.
        self.tasks.sort_unstable_by_key(|task| {
            // Saturating, because the number of broadcast keys is not limited.
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
