//! Scores to look at: formed and adjusted by the same tiles, in natural units, and written out instead of used up.

#![forbid(unsafe_code)]

use super::marks::{Lanes, Marks, has_score_tensor};
use super::output::{Output, Rows};
use super::schedule::Schedule;
use super::threads::{fan_out, workers};
use super::workspace::{Scratch, Workspace, for_workers};
use crate::bias::ScoreStage;
use crate::kernel::adjust::{Adjust, Unit, adjust_panel, query_factor};
use crate::kernel::load::AnyMatrix;
use crate::kernel::pack::{from_lanes, into_lanes, pack_queries, widen_rows};
use crate::kernel::{MAX_PANEL_LANES, round_up_lanes, scores};
use crate::mask::Verdict;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::strided::Matrix;

/// Writes the scores at `stage` of every query, a row of `seq_kv` each. `plan` is for many queries.
pub(crate) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    stage: ScoreStage,
    output: Output<'_>,
    workspace: &mut Workspace,
) {
    if output.is_empty() {
        return;
    }
    let schedule = Schedule::new(problem, plan);
    let workers = workers(plan.parallel, schedule.tasks().len());
    let shared = output.share(&schedule);
    fan_out(for_workers(&mut workspace.scratch, workers), &|scratch| {
        while let Some(mut rows) = shared.draw() {
            let task_rows = rows.task().rows.clone();
            for start in task_rows.clone().step_by(plan.panel_lanes) {
                let end = (start + plan.panel_lanes).min(task_rows.end);
                run_panel(problem, plan, stage, start..end, &mut rows, scratch);
            }
        }
    });
}

fn run_panel(
    problem: &Problem<'_>,
    plan: &Plan,
    stage: ScoreStage,
    panel_rows: std::ops::Range<usize>,
    rows: &mut Rows<'_>,
    scratch: &mut Scratch,
) {
    let (isa, dims, task) = (plan.isa, &problem.dims, rows.task());
    let count = round_up_lanes(panel_rows.len());
    let lanes = Lanes::new(problem, plan, task, panel_rows.clone(), count);
    let (width, tile) = (round_up_lanes(dims.head_dim), round_up_lanes(plan.tile_keys));
    let [queries, keys, tile_scores, bias, stage_rows, whole_rows] = scratch.floats.buffers([
        width * count,
        plan.tile_keys * dims.head_dim,
        tile * count,
        tile * count,
        count * width.max(tile),
        panel_rows.len() * dims.seq_kv,
    ]);
    let cap = problem.bias.softcap.filter(|_| stage != ScoreStage::Raw);
    let row = |lane| {
        let (h, i) = task.head_and_query(panel_rows.start + lane, dims.group());
        (AnyMatrix::new(&problem.q, task.batch, h), i)
    };
    let factor = query_factor(problem.scale, cap, Unit::Natural);
    pack_queries(isa, row, (panel_rows.len(), count), factor, queries, stage_rows);

    for start in (0..dims.seq_kv).step_by(plan.tile_keys) {
        let seen = start..(start + plan.tile_keys).min(dims.seq_kv);
        let row_len = round_up_lanes(seen.len());
        let tile_rows = AnyMatrix::new(&problem.k, task.batch, task.head_kv).slice_rows(seen.clone());
        let tile_rows = tile_rows.in_place().unwrap_or_else(|| {
            let wide = &mut keys[..seen.len() * dims.head_dim];
            widen_rows(isa, tile_rows, wide);
            Matrix::from_slice(wide, seen.len(), dims.head_dim)
        });
        let mut max = [f32::NEG_INFINITY; MAX_PANEL_LANES];
        let max = &mut max[..count];
        scores::scores(isa, tile_rows, queries, tile_scores, max);
        let scores = &mut tile_scores[..seen.len() * count];
        match stage {
            ScoreStage::Raw | ScoreStage::Capped => {
                let adjust =
                    Adjust { unit: Unit::Natural, softcap: cap, bias: None, first: 0, alibi: None, visible: None };
                if !adjust.is_none() {
                    adjust_panel(isa, adjust, scores, max);
                }
            }
            ScoreStage::Biased | ScoreStage::Probabilities => {
                let marks = Marks::read(problem, task, &lanes, &seen, Unit::Natural, (&mut *stage_rows, row_len));
                if marks.verdict == Verdict::Hidden {
                    scores.fill(f32::NEG_INFINITY);
                } else {
                    let bias = has_score_tensor(problem).then(|| {
                        into_lanes(isa, &stage_rows[..row_len * count], count, &mut bias[..row_len * count]);
                        &*bias
                    });
                    adjust_panel(isa, marks.adjust(bias), scores, max);
                }
            }
        }
        from_lanes(isa, &tile_scores[..row_len * count], count, &mut stage_rows[..row_len * count]);
        for (to, from) in whole_rows.chunks_exact_mut(dims.seq_kv).zip(stage_rows.chunks_exact(row_len)) {
            to[seen.clone()].copy_from_slice(&from[..seen.len()]);
        }
    }
    for (n, r) in panel_rows.enumerate() {
        let row = &mut whole_rows[n * dims.seq_kv..][..dims.seq_kv];
        if stage == ScoreStage::Probabilities {
            crate::softmax::softmax_in_place(row);
        }
        rows.write(isa, r, row, 0.0);
    }
}
