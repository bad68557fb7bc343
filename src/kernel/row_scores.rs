//! Rows of bf16 queries outside the range of pairs: sets of rows, and their queries widened to f32.

#![forbid(unsafe_code)]

use super::shape::{RowSet, round_up_lanes};
use super::task::TaskInput;
use super::widen::widen_group;
use std::ops::Range;

/// The rows of a set, in ascending order.
pub(super) fn rows_of(set: RowSet) -> impl Iterator<Item = usize> {
    (0..RowSet::BITS as usize).filter(move |n| set >> n & 1 == 1)
}

/// Widens the queries of the rows `set` of `rows`, one after the other, times the task's factor.
///
/// * `to`: `[rows of the set or more][head_dim rounded up]`
pub(super) fn widen_rows_of(task: &TaskInput<'_>, rows: Range<usize>, set: RowSet, to: &mut [f32]) {
    let width = round_up_lanes(task.head_dim());
    for (n, to) in rows_of(set).zip(to.chunks_exact_mut(width.max(1))) {
        let row = rows.start + n;
        widen_group(task.isa, task.queries.slice(row..row + 1), task.factor, (to, width));
    }
}
