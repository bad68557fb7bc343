//! The list of tasks: a plan cut along batches, key/value heads, and blocks of rows.

#![forbid(unsafe_code)]

use crate::kernel::bf16_pairs as pairs;
use crate::kernel::tile::{Unit, query_factor};
use crate::kernel::widen::Gathered;
use crate::mask::hull;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::tensor::any::AnyMatrix;
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

/// A task, with the problem and the plan that it is a part of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) plan: &'a Plan,
    pub(super) task: &'a Task,
}

impl<'a> Work<'a> {
    /// The query head and the query of row `r`.
    #[inline]
    pub(super) fn head_and_query(&self, r: usize) -> (usize, usize) {
        // (A division takes longer than all the rest of finding a row, and most groups are of one head.)
        match self.problem.dims.group() {
            1 => (self.task.head_kv, r),
            group => (self.task.head_kv * group + r % group, r / group),
        }
    }

    /// The queries of some rows of the task.
    pub(super) fn queries(&self, rows: Range<usize>) -> Gathered<'a, impl Fn(usize) -> [usize; 3] + use<'a>> {
        let work = *self;
        let place = move |n| {
            let (h, i) = work.head_and_query(rows.start + n);
            [work.task.batch, h, i]
        };
        Gathered { tensor: &self.problem.q, count: rows.len(), place }
    }

    /// What queries are multiplied with, or the scores themselves.
    pub(super) fn query_factor(&self) -> f32 {
        query_factor(self.problem.scale, self.problem.bias.softcap, Unit::Log2)
    }

    /// Whether the scores are formed from pairs of bf16.
    pub(super) fn uses_pairs(&self) -> bool {
        pairs::apply(self.plan.isa, &self.problem.q, &self.problem.k, self.query_factor())
    }

    /// Steps of the sum that a score is: elements of a query, or pairs of them.
    pub(super) fn score_steps(&self) -> usize {
        let head_dim = self.problem.dims.head_dim;
        if self.uses_pairs() { pairs::pairs_in(head_dim) } else { head_dim }
    }

    /// All keys of the head, `[seq_kv, head_dim]`.
    pub(super) fn keys(&self) -> AnyMatrix<'a> {
        AnyMatrix::new(&self.problem.k, self.task.batch, self.task.head_kv)
    }

    /// All values of the head, `[seq_kv, value_dim]`.
    pub(super) fn values(&self) -> AnyMatrix<'a> {
        AnyMatrix::new(&self.problem.v, self.task.batch, self.task.head_kv)
    }

    /// The keys that row `r` sees by its position.
    pub(super) fn interval(&self, r: usize) -> Range<usize> {
        let (_, i) = self.head_and_query(r);
        self.problem.mask.interval(self.task.batch, i)
    }

    /// The key position that row `r` stands at.
    pub(super) fn position(&self, r: usize) -> i128 {
        let (_, i) = self.head_and_query(r);
        self.problem.mask.position(self.task.batch, i)
    }

    /// Whether a tensor has something to say about single scores.
    pub(super) fn has_score_tensor(&self) -> bool {
        self.problem.mask.tensor.is_some() || self.problem.bias.tensor.is_some()
    }
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
    pub(super) fn fill(&mut self, problem: &Problem<'_>, plan: &Plan) {
        self.tasks.clear();
        let dims = &problem.dims;
        if dims.rows() == 0 {
            return; // without rows there is nothing to list, and there may be any number of batches
        }
        let group = dims.group();
        for batch in 0..dims.batch {
            for block in 0..plan.blocks.count {
                let rows = plan.block_rows(block);
                // The heads of a group stand at the same positions.
                let queries = rows.start / group..rows.end.div_ceil(group);
                let keys = hull(queries.map(|i| problem.mask.interval(batch, i)));
                for head_kv in 0..dims.heads_kv {
                    self.tasks.push(Task { batch, head_kv, rows: rows.clone(), keys: keys.clone() });
                }
            }
        }
        // A long task drawn last would leave the other workers waiting. (Equal ones stay in the order of memory.)
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
