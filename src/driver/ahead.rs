//! What a worker reads after the tile that it works on.

#![forbid(unsafe_code)]

use super::schedule::Work;
use crate::kernel::ahead::Ahead;
use crate::kernel::load::AnyMatrix;
use std::ops::Range;

/// The next tile of a task.
pub(super) fn next_tile(work: Work<'_>, keys: Range<usize>) -> Ahead {
    let mut ahead = Ahead::nothing();
    ahead.add(work.keys().slice_rows(keys.clone()));
    ahead.add(work.values().slice_rows(keys));
    ahead
}

/// The queries of another task and its first tile, unless it is of the same head, whose keys are no news.
pub(super) fn next_task(next: Work<'_>, after: Work<'_>) -> Ahead {
    let (task, before) = (next.task, after.task);
    let same_head = (task.batch, task.head_kv) == (before.batch, before.head_kv);
    let end = if same_head { task.keys.start } else { task.keys.end.min(task.keys.start + next.plan.tile_keys) };
    let mut ahead = next_tile(next, task.keys.start..end);
    // Row r is query r / group of one of `group` heads.
    let group = next.problem.dims.group();
    for r in task.rows.start..task.rows.end.min(task.rows.start + group) {
        let (h, first) = next.head_and_query(r);
        let queries = AnyMatrix::new(&next.problem.q, task.batch, h);
        ahead.add(queries.slice_rows(first..first + (task.rows.end - r).div_ceil(group)));
    }
    ahead
}
