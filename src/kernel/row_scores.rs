//! The scores of a single bf16 row from elements widened to f32: the fallback for queries outside the range of pairs.

#![forbid(unsafe_code)]

use super::decode::scores::{RowKeys, scores};
use super::prefetch::Prefetch;
use super::shape::round_up_lanes;
use super::task::TaskInput;
use super::widen::widen_group;
use crate::element::Bf16Pair;
use crate::kv::run::Run;
use crate::tensor::matrix::Matrix;

/// Writes the scores of row `n` of the task for `keys`, which are stored as pairs.
///
/// * `query`: a buffer of at least head_dim elements, rounded up
/// * `to`: at least one element for each key
pub(super) fn scores_from_f32(
    task: &TaskInput<'_>,
    n: usize,
    keys: Matrix<'_, Bf16Pair>,
    query: &mut [f32],
    to: &mut [f32],
) {
    let width = round_up_lanes(task.head_dim());
    let query = &mut query[..width];
    widen_group(task.isa, task.queries.slice(n..n + 1), task.factor, (&mut *query, width));
    let elements = RowKeys::Any(Run::Bf16(keys.elements(task.head_dim())));
    let stride = to.len();
    scores(task.isa, elements, query, to, stride, &Prefetch::none());
}
