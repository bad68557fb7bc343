//! What a worker reads after the tile that it works on.

#![forbid(unsafe_code)]

use super::output::Rows;
use super::schedule::Work;
use crate::element::with_elements;
use crate::kernel::prefetch::Ahead;
use crate::tensor::any::AnyMatrix;
use std::ops::Range;

/// The next tile of a task.
pub(super) fn next_tile(work: Work<'_>, keys: Range<usize>) -> Ahead {
    let mut ahead = Ahead::nothing();
    add_tile(&mut ahead, work, keys);
    ahead
}

fn add_tile(ahead: &mut Ahead, work: Work<'_>, keys: Range<usize>) {
    ahead.add(work.keys().slice_rows(keys.clone()));
    ahead.add(work.values().slice_rows(keys));
}

/// The rows that a task writes, then the first tile of the task after it, unless that is of the same head, whose keys are no
/// news, and its queries.
pub(super) fn next_task(rows: &Rows<'_>, next: Option<Work<'_>>) -> Ahead {
    let mut ahead = Ahead::nothing();
    rows.ask(&mut ahead);
    if let Some(next) = next {
        let (task, before) = (next.task, rows.work().task);
        if (task.batch, task.head_kv) != (before.batch, before.head_kv) {
            add_tile(&mut ahead, next, task.keys.start..task.keys.end.min(task.keys.start + next.plan.tile_keys));
        }
        add_queries(&mut ahead, next);
    }
    ahead
}

/// What bias and mask say about some rows of a task.
pub(super) fn add_score_tensors(ahead: &mut Ahead, work: Work<'_>, rows: Range<usize>, keys: Range<usize>) {
    let group = work.problem.dims.group();
    for r in rows.start..rows.end.min(rows.start + group) {
        let (h, first) = work.head_and_query(r);
        let queries = first..first + (rows.end - r).div_ceil(group);
        if let Some(bias) = &work.problem.bias.tensor {
            let bias = AnyMatrix::new(bias, work.task.batch, h).slice_rows(queries.clone());
            with_elements!(bias, bias => ahead.add_rows(bias.slice_cols(keys.clone())));
        }
        if let Some(mask) = &work.problem.mask.tensor {
            ahead.add_rows(mask.matrix(work.task.batch, h).slice_rows(queries).slice_cols(keys.clone()));
        }
    }
}

/// The rows of a task in the queries.
fn add_queries(ahead: &mut Ahead, work: Work<'_>) {
    for_rows(work, |h, rows| ahead.add(AnyMatrix::new(&work.problem.q, work.task.batch, h).slice_rows(rows)));
}

/// Every query head of a task, with the queries in it.
pub(super) fn for_rows(work: Work<'_>, mut f: impl FnMut(usize, Range<usize>)) {
    // Row r is query r / group of one of `group` heads.
    let (task, group) = (work.task, work.problem.dims.group());
    for r in task.rows.start..task.rows.end.min(task.rows.start + group) {
        let (h, first) = work.head_and_query(r);
        f(h, first..first + (task.rows.end - r).div_ceil(group));
    }
}
