//! Makes the kernel's input of a task: tensors become rows at strides.

#![forbid(unsafe_code)]

use super::schedule::Task;
use crate::kernel::task::TaskInput;
use crate::kv::run::Run;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::score::Unit;
use crate::tensor::group::AnyGroupRows;

impl Task {
    /// The query heads of the task's group.
    pub(super) fn heads(&self, problem: &Problem<'_>) -> std::ops::Range<usize> {
        let group = problem.dims.group();
        self.head_kv * group..(self.head_kv + 1) * group
    }

    /// The kernel's input of the task.
    pub(super) fn input<'a>(&self, problem: &'a Problem<'a>, plan: &Plan) -> TaskInput<'a> {
        let (b, heads) = (self.batch, self.heads(problem));
        let rows = self.rows.clone();
        TaskInput {
            isa: plan.isa(),
            operands: plan.operands(),
            unit: problem.score_mods.unit(Unit::Log2),
            last_unit: Unit::Log2,
            factor: problem.score_mods.query_factor(problem.scale, Unit::Log2),
            tile_keys: plan.tile_keys(),
            queries: AnyGroupRows::new(&problem.q, b, heads.clone()).slice(rows.clone()),
            keys: Run::new(&problem.k, b, self.head_kv),
            values: Run::new(&problem.v, b, self.head_kv),
            span: self.keys.clone(),
            sequence: problem.sequences.get(b),
            first_head: heads.start,
            group: heads.len(),
            first_row: rows.start,
            rows: rows.len(),
            masks: &problem.masks,
            score_mods: &problem.score_mods,
            mask_rows: problem.masks.tensor.map(|mask| mask.rows(b, heads.clone()).slice(rows.clone())),
            bias_rows: problem.score_mods.bias.map(|bias| bias.rows(b, heads).slice(rows)),
        }
    }
}
