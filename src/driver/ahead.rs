//! Asking memory for what comes next while the multipliers are busy.
//!
//! Short sequences are computed about as fast as memory delivers them, and a worker that waits for each tile before it
//! multiplies pays for both. So while it works on one tile, it asks for the rows of the next, a share with each panel.

#![forbid(unsafe_code)]

use super::schedule::Work;
use crate::kernel::load::AnyMatrix;
use crate::kernel::pack::prefetch_rows;
use std::ops::Range;

/// Rows that are read next.
#[derive(Clone, Debug)]
pub(super) struct Ahead<'a> {
    work: Work<'a>,
    /// Keys, and the values that belong to them.
    keys: Range<usize>,
    /// Queries: rows of the task.
    rows: Range<usize>,
}

impl<'a> Ahead<'a> {
    /// The next tile of a task.
    pub(super) fn tile(work: Work<'a>, keys: Range<usize>) -> Self {
        Ahead { work, keys, rows: 0..0 }
    }

    /// The first tile of another task, unless it is of the same head, whose keys are no news.
    pub(super) fn task(next: Work<'a>, after: Work<'_>) -> Self {
        let (task, before) = (next.task, after.task);
        let same_head = (task.batch, task.head_kv) == (before.batch, before.head_kv);
        let end = if same_head { task.keys.start } else { task.keys.end.min(task.keys.start + next.plan.tile_keys) };
        Ahead { work: next, keys: task.keys.start..end, rows: task.rows.clone() }
    }

    /// Asks for share number `n` of `count`.
    pub(super) fn ask(&self, n: usize, count: usize) {
        let share = |all: &Range<usize>| {
            let cut = |n: usize| all.start + all.len() * n / count;
            cut(n)..cut(n + 1)
        };
        let ask = |matrix: AnyMatrix<'_>, rows: Range<usize>| prefetch_rows(self.work.plan.isa, matrix, rows);
        ask(self.work.keys(), share(&self.keys));
        ask(self.work.values(), share(&self.keys));
        // Row r is query r / group of one of `group` heads.
        let rows = share(&self.rows);
        let group = self.work.problem.dims.group();
        for r in rows.start..rows.end.min(rows.start + group) {
            let (h, first) = self.work.head_and_query(r);
            let queries = AnyMatrix::new(&self.work.problem.q, self.work.task.batch, h);
            ask(queries, first..first + (rows.end - r).div_ceil(group));
        }
    }
}
