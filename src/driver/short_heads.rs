//! Tasks of short heads: each head is one call of the kernel.

#![forbid(unsafe_code)]

use super::output::{ClaimedTask, TaskClaims};
use super::schedule::Task;
use crate::element::ByElement;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::short::{HeadRows, Key, ShortHeads};
use crate::kernel::scratch::Scratch;
use crate::kernel::task::TaskInput;
use crate::plan::Form;
use crate::problem::Problem;
use crate::tensor::group::GroupRows;
use crate::tensor::strided::Strided;

/// Computes the heads of a task in the prefill form, if they are short. Returns the first head that is left: one that the general steps
/// must compute, or the end of the heads.
pub(super) fn compute(
    claims: &TaskClaims<'_>,
    claimed: &mut ClaimedTask<'_>,
    first: &TaskInput<'_>,
    prefetch: &mut Prefetch,
    scratch: &mut Scratch,
) -> usize {
    let (problem, task) = (claims.problem(), claimed.task);
    if !task.tail.is_empty() {
        return task.heads.start;
    }
    let Some(short) = ShortHeads::new(first, scratch) else { return task.heads.start };
    match (&problem.q, &problem.k, &problem.v) {
        (ByElement::F32(q), ByElement::F32(k), ByElement::F32(v)) => {
            compute_heads(Tensors { problem, q, k, v }, claimed, short, prefetch)
        }
        (ByElement::F16(q), ByElement::F16(k), ByElement::F16(v)) => {
            compute_heads(Tensors { problem, q, k, v }, claimed, short, prefetch)
        }
        (ByElement::Bf16(q), ByElement::Bf16(k), ByElement::Bf16(v)) => {
            compute_heads(Tensors { problem, q, k, v }, claimed, short, prefetch)
        }
        _ => task.heads.start,
    }
}

/// As [`compute`], for short heads of one element type.
fn compute_heads<T: Key>(
    tensors: Tensors<'_, T>,
    claimed: &mut ClaimedTask<'_>,
    mut short: ShortHeads<'_>,
    prefetch: &mut Prefetch,
) -> usize {
    let task = claimed.task;
    let after = claimed.next.filter(|next| next.form == Form::Prefill && next.keys == task.keys);
    // The rows of a head and those of the next one, by turns.
    let mut rows = [tensors.rows(task, task.heads.start), None];
    for head in task.heads.clone() {
        let [even, odd] = &mut rows;
        let (own, next) = if (head - task.heads.start).is_multiple_of(2) { (even, odd) } else { (odd, even) };
        *next = match after {
            _ if head + 1 < task.heads.end => tensors.rows(task, head + 1),
            after => after.and_then(|next| tensors.rows(next, next.heads.start)),
        };
        let output = &mut claimed.output(head, &task.rows);
        if !own.as_ref().is_some_and(|own| short.compute(own, next.as_ref(), prefetch, output)) {
            return head;
        }
    }
    task.heads.end
}

/// Queries, keys and values of one element type.
struct Tensors<'a, T> {
    problem: &'a Problem<'a>,
    q: &'a Strided<'a, T, 4>,
    k: &'a Strided<'a, T, 4>,
    v: &'a Strided<'a, T, 4>,
}

impl<'a, T: Copy> Tensors<'a, T> {
    /// The rows of a head of a task; `None` if its keys lie in several runs.
    #[inline(always)]
    fn rows(&self, task: &Task, head: usize) -> Option<HeadRows<'a, T>> {
        let problem = self.problem;
        let (b, head_kv) = problem.dims.batch_and_head(head);
        let heads = problem.dims.group_heads(head_kv);
        let (q_batch, q_rows) = problem.query_rows(b, heads.len(), &task.rows);
        let (batch, run) = problem.places.first_run(b, &task.keys);
        (run.len() == task.keys.len()).then(|| HeadRows {
            queries: GroupRows::new(self.q, q_batch, heads).slice(q_rows),
            keys: self.k.matrix(batch, head_kv).slice_rows(run.clone()),
            values: self.v.matrix(batch, head_kv).slice_rows(run),
        })
    }
}
