//! What a worker reads after the tile that it works on.

#![forbid(unsafe_code)]

use super::schedule::Work;
use crate::kernel::ahead::Ahead;
use crate::kernel::load::{AnyMatrix, with_matrix};
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
    for (h, queries) in queries_by_head(next, &task.rows) {
        ahead.add(AnyMatrix::new(&next.problem.q, task.batch, h).slice_rows(queries));
    }
    ahead
}

/// What the bias and mask tensors say of some rows and keys.
pub(super) fn next_bias(work: Work<'_>, rows: &Range<usize>, keys: &Range<usize>) -> Ahead {
    let mut ahead = Ahead::nothing();
    let batch = work.task.batch;
    for (h, queries) in queries_by_head(work, rows) {
        if let Some(bias) = &work.problem.bias.tensor {
            with_matrix!(AnyMatrix::new(bias, batch, h), bias => {
                ahead.add_rows(bias.slice_rows(queries.clone()).slice_cols(keys.clone()));
            });
        }
        if let Some(mask) = &work.problem.mask.tensor {
            ahead.add_rows(mask.matrix(batch, h).slice_rows(queries).slice_cols(keys.clone()));
        }
    }
    ahead
}

/// The queries of each head that some rows are. (Row r is query r / group of one of `group` heads.)
fn queries_by_head(work: Work<'_>, rows: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let (end, group) = (rows.end, work.problem.dims.group());
    (rows.start..end.min(rows.start + group)).map(move |r| {
        let (h, first) = work.head_and_query(r);
        (h, first..first + (end - r).div_ceil(group))
    })
}
