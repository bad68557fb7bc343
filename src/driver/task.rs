//! Makes the kernel's input of a task: tensors become rows at strides.

#![forbid(unsafe_code)]

use super::schedule::Task;
use crate::kernel::task::TaskInput;
use crate::kv::rows::KeyRows;
use crate::plan::{Form, Plan};
use crate::problem::Problem;
use crate::score::Unit;
use crate::tensor::group::AnyGroupRows;
use std::ops::Range;

impl Task {
    /// The kernel's input of key/value head `head`, which is one of the task's.
    pub(super) fn input<'a>(&self, problem: &'a Problem<'a>, plan: &Plan, head: usize) -> TaskInput<'a> {
        self.input_of(self.rows.clone(), self.form, problem, plan, head)
    }

    /// The input of the tail.
    pub(super) fn tail_input<'a>(&self, problem: &'a Problem<'a>, plan: &Plan, head: usize) -> TaskInput<'a> {
        self.input_of(self.tail.clone(), Form::Decode, problem, plan, head)
    }

    fn input_of<'a>(
        &self,
        rows: Range<usize>,
        form: Form,
        problem: &'a Problem<'a>,
        plan: &Plan,
        head: usize,
    ) -> TaskInput<'a> {
        let (b, head_kv) = problem.dims.batch_and_head(head);
        let heads = problem.dims.group_heads(head_kv);
        input_of_heads((problem, plan), (b, heads), rows, self.keys.clone(), form)
    }
}

/// The kernel's input of rows of some query heads of sequence `b`, which share a key/value head. Row `r` is query `r / n` of the
/// `n` heads' head `r % n`.
///
/// * `span`: no row sees a key outside it
pub(super) fn input_of_heads<'a>(
    (problem, plan): (&'a Problem<'a>, &Plan),
    (b, heads): (usize, Range<usize>),
    rows: Range<usize>,
    span: Range<usize>,
    form: Form,
) -> TaskInput<'a> {
    let (sequence, head_kv) = (problem.sequences.get(b), heads.start / problem.dims.group());
    let (q_batch, q_rows) = problem.query_rows(b, heads.len(), &rows);
    let key_rows = |tensor| KeyRows::new(tensor, &problem.places, (b, head_kv), sequence.keys);
    // Masks and biases have rows and columns for left padding.
    let (padding, first_key) = (sequence.first_query * heads.len(), sequence.first_key);
    let score_rows = padding + rows.start..padding + rows.end;
    TaskInput {
        isa: plan.isa(),
        operands: plan.operands(),
        unit: problem.score_mods.unit(Unit::Log2),
        last_unit: Unit::Log2,
        factor: problem.score_mods.query_factor(problem.scale, Unit::Log2),
        tile_keys: plan.steps(form).tile,
        queries: AnyGroupRows::new(&problem.q, q_batch, heads.clone()).slice(q_rows),
        keys: key_rows(&problem.k),
        values: key_rows(&problem.v),
        span,
        sequence,
        first_head: heads.start,
        group: heads.len(),
        first_row: rows.start,
        rows: rows.len(),
        masks: &problem.masks,
        score_mods: &problem.score_mods,
        mask_rows: problem
            .masks
            .tensor
            .map(|mask| mask.rows(b, heads.clone()).slice(score_rows.clone()).skip_cols(first_key)),
        bias_rows: problem.score_mods.bias.map(|bias| bias.rows(b, heads).slice(score_rows).skip_cols(first_key)),
    }
}
