//! The list of tasks: one for each run of key/value heads, and block of rows.

#![forbid(unsafe_code)]

use crate::mask::cover::union;
use crate::plan::{Form, Plan};
use crate::problem::Problem;
use crate::sequence::Sequence;
use std::ops::Range;

/// A block of rows of some key/value heads, one head or several small ones, and its span of keys.
///
/// Row `r` is query `r / group` of head `head_kv * group + r % group`: neighbouring rows have nearly the same position, so the
/// rows of a tile see nearly the same keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Task {
    /// The key/value heads, counted through all sequences. Their rows have the same spans.
    pub(super) heads: Range<usize>,
    /// Rows of each head, counted from the sequence's first.
    pub(super) rows: Range<usize>,
    /// Rows after these that are decoded.
    pub(super) tail: Range<usize>,
    /// The span: no row of the task sees a key outside it.
    pub(super) keys: Range<usize>,
    pub(super) form: Form,
}

/// The smallest run of keys that holds the spans of these queries.
pub(super) fn span_of(
    problem: &Problem<'_>,
    sequence: &Sequence,
    heads: Range<usize>,
    queries: Range<usize>,
) -> Range<usize> {
    let rows = heads.flat_map(|h| queries.clone().map(move |i| (h, i)));
    union(rows.map(|(h, i)| problem.masks.span(sequence, h, i)))
}

/// The tasks of a call, heaviest first.
///
/// **Each row is in exactly one task**, its tail included: several threads write rows, and this makes it sound. Only
/// [`Schedule::fill`] changes the list.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    tasks: Vec<Task>,
}

impl Schedule {
    /// Lists the tasks of `plan`: each key/value head and block of rows once. The runs of heads are a partition of the heads, the
    /// blocks one of the rows.
    pub(crate) fn fill(&mut self, problem: &Problem<'_>, plan: &Plan) {
        self.tasks.clear();
        let dims = &problem.dims;
        if dims.rows() == 0 || dims.heads_kv == 0 {
            return; // without rows there are no tasks, and the number of batches is not limited
        }
        let group = dims.group();
        for alike in plan.alike_heads() {
            let sequence = problem.sequences.get(alike.start / dims.heads_kv);
            let own = plan.of_sequence(&sequence);
            for block in 0..own.blocks() {
                let (rows, tail) = own.block_rows(block);
                // The heads of a group have the same positions.
                let queries = rows.start / group..tail.end.div_ceil(group);
                // Masks that may differ from head to head are alike in one head alone.
                let first = alike.start % dims.heads_kv * group;
                let heads = first..first + if problem.masks.heads_are_alike() { 1 } else { group };
                let keys = span_of(problem, &sequence, heads, queries);
                for heads in plan.head_runs(alike.clone()) {
                    let (rows, tail, keys) = (rows.clone(), tail.clone(), keys.clone());
                    self.tasks.push(Task { heads, rows, tail, keys, form: own.form });
                }
            }
        }
        // Heaviest first, because the other workers would wait for a long task that is claimed last. Equal tasks stay in the
        // order of memory.
        self.tasks.sort_unstable_by_key(|task| {
            // Saturating, because the number of broadcast keys is not limited.
            let pairs = [task.tail.end - task.rows.start, task.keys.len()]
                .into_iter()
                .fold(task.heads.len(), usize::saturating_mul);
            (std::cmp::Reverse(pairs), task.heads.start, task.rows.start)
        });
    }

    /// Makes memory for the number of tasks that `other` has.
    pub(crate) fn reserve_like(&mut self, other: &Self) {
        self.tasks.reserve_exact(other.tasks.len().saturating_sub(self.tasks.len()));
    }

    pub(super) fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.tasks.capacity() * size_of::<Task>()
    }
}
