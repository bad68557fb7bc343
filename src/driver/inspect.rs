//! Scores as an output: formed and modified by the prefill form, in natural units, and written row by row.

#![forbid(unsafe_code)]

use super::output::{ClaimedTask, Output, TaskClaims};
use super::schedule::Schedule;
use super::workspace::Workspace;
use crate::kernel::form::FormKernel;
use crate::kernel::output::TaskOutput;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::Prefill;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::{Piece, TaskInput};
use crate::plan::{Form, Plan};
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
    let scratch = Scratch::for_workers(&mut workspace.scratch, workers(plan.worth(), schedule.tasks().len()));
    let claims = output.share(problem, plan, &schedule, scratch.len());
    work_through(plan.worth(), scratch, &claims, &|claimed, scratch| {
        write_scores(&claims, claimed, finish_row, scratch)
    });
}

/// Writes the rows of a task, head by head.
fn write_scores(
    claims: &TaskClaims<'_>,
    mut claimed: ClaimedTask<'_>,
    finish_row: fn(Isa, &mut [f32]),
    scratch: &mut Scratch,
) {
    let (problem, plan) = (claims.problem(), claims.plan());
    let seq_kv = problem.dims.seq_kv;
    let task = claimed.task;
    for head in task.heads.clone() {
        let input = task.input(problem, plan, head).in_unit(Unit::Natural, problem.scale);
        write_head(&input, plan, seq_kv, finish_row, &mut claimed.output(head, &task.rows), scratch);
    }
}

/// Writes the rows of a head, panel by panel.
fn write_head(
    task: &TaskInput<'_>,
    plan: &Plan,
    seq_kv: usize,
    finish_row: fn(Isa, &mut [f32]),
    output: &mut TaskOutput<'_>,
    scratch: &mut Scratch,
) {
    let padding = task.sequence.first_key;
    for start in (0..task.rows).step_by(plan.tile_rows()) {
        let rows = start..(start + plan.tile_rows()).min(task.rows);
        let panel = task.slice(rows.clone());
        // Keys outside the span are hidden, and no tile has them. A sink is one more score, which is not written.
        let width = seq_kv + usize::from(task.score_mods.sinks.is_some());
        let mut whole_rows = vec![f32::NEG_INFINITY; rows.len() * width];
        for (n, row) in whole_rows.chunks_exact_mut(width).enumerate() {
            row[seq_kv..].fill(panel.sink(n).unwrap_or(f32::NEG_INFINITY));
        }
        let piece = Piece { task: &panel, keys: task.span.clone() };
        let mut prefetch = Prefetch::none();
        Prefill::list_rows(&panel, scratch);
        let mut kernel = Prefill::load(piece, None, None, &mut prefetch, scratch);
        for tile in plan.steps(Form::Prefill).tiles_of(task.span.clone()) {
            kernel.visit_scores(tile, |keys, scores, lanes| {
                for (lane, row) in whole_rows.chunks_exact_mut(width).enumerate() {
                    for (to, scores) in row[padding..][keys.clone()].iter_mut().zip(scores.chunks_exact(lanes)) {
                        *to = scores[lane];
                    }
                }
            });
        }
        whole_rows.chunks_exact_mut(width).for_each(|row| finish_row(plan.isa(), row));
        output.write_rows(plan.isa(), rows, (&whole_rows, width));
    }
}
