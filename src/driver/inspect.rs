//! Scores as an output: formed and modified by the prefill form, in natural units, and written row by row.

#![forbid(unsafe_code)]

use super::output::{ClaimedTask, Output, TaskClaims};
use super::schedule::Schedule;
use super::workspace::{Workspace, for_workers};
use crate::kernel::form::FormKernel;
use crate::kernel::prefill::Prefill;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::Piece;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::score::Unit;
use crate::simd::Isa;
use crate::threads::{work_through, workers};

/// Writes the scores of every query, a row of `seq_kv` each. `finish_row` is called with the level and each row, before the row
/// is written.
pub(crate) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    finish_row: fn(Isa, &mut [f32]),
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    if output.is_empty() {
        return;
    }
    let mut schedule = Schedule::default();
    schedule.fill(problem, plan);
    let claims = output.share(problem, plan, &schedule);
    let scratch = for_workers(&mut workspace.scratch, workers(plan.worth(), schedule.tasks().len()));
    work_through(plan.worth(), scratch, &claims, &|claimed, scratch| {
        write_scores(&claims, claimed, finish_row, scratch)
    });
}

/// Writes the rows of a task, panel by panel.
fn write_scores(
    claims: &TaskClaims<'_>,
    claimed: ClaimedTask<'_>,
    finish_row: fn(Isa, &mut [f32]),
    scratch: &mut Scratch,
) {
    let (problem, plan) = (claims.problem(), claims.plan());
    let seq_kv = problem.dims.seq_kv;
    let ClaimedTask { task, mut output, .. } = claimed;
    let task = task.input(problem, plan).in_unit(Unit::Natural, problem.scale);
    for start in (0..task.rows).step_by(plan.tile_rows()) {
        let rows = start..(start + plan.tile_rows()).min(task.rows);
        let panel = task.slice(rows.clone());
        // Keys outside the span are hidden, and no tile has them.
        let mut whole_rows = vec![f32::NEG_INFINITY; rows.len() * seq_kv];
        let piece = Piece { task: &panel, keys: task.span.clone() };
        let mut kernel = Prefill::load(piece, None, None, scratch);
        for tile in plan.tiles_of(task.span.clone()) {
            kernel.visit_scores(tile, |keys, scores, lanes| {
                for (lane, row) in whole_rows.chunks_exact_mut(seq_kv).enumerate() {
                    for (to, scores) in row[keys.clone()].iter_mut().zip(scores.chunks_exact(lanes)) {
                        *to = scores[lane];
                    }
                }
            });
        }
        whole_rows.chunks_exact_mut(seq_kv).for_each(|row| finish_row(plan.isa(), row));
        output.write_rows(plan.isa(), rows, (&whole_rows, seq_kv));
    }
}
