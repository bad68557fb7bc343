//! Scores to look at: formed and adjusted by the same tiles, in natural units, and written out instead of used up.

#![forbid(unsafe_code)]

use super::marks::{Lanes, Marks, panel_tensors};
use super::output::{Output, Rows};
use super::schedule::{Schedule, Work};
use super::threads::{fan_out, workers};
use super::workspace::{Scratch, Workspace, for_workers};
use crate::bias::ScoreStage;
use crate::kernel::adjust::{Adjust, Unit, adjust_panel, query_factor};
use crate::kernel::ahead::Ahead;
use crate::kernel::lanes::gather_into_lanes;
use crate::kernel::pack::as_f32;
use crate::kernel::scores::{self, PanelKeys};
use crate::kernel::{MAX_PANEL_LANES, round_up_lanes};
use crate::plan::Plan;
use crate::problem::Problem;
use std::ops::Range;

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
    let shared = output.share(problem, plan, &schedule);
    fan_out(for_workers(&mut workspace.scratch, workers), &|scratch| {
        while let Some(mut rows) = shared.draw() {
            let all_rows = &rows.work().task.rows;
            for start in all_rows.clone().step_by(plan.panel_lanes()) {
                run_panel(&mut rows, start..(start + plan.panel_lanes()).min(all_rows.end), stage, scratch);
            }
        }
    });
}

/// The scores of a panel against all keys, tile after tile, gathered into whole rows.
fn run_panel(rows: &mut Rows<'_>, panel_rows: Range<usize>, stage: ScoreStage, scratch: &mut Scratch) {
    let work = rows.work();
    let Work { problem, plan, .. } = work;
    let (isa, dims) = (plan.isa, &problem.dims);
    let count = round_up_lanes(panel_rows.len());
    let lanes = Lanes::new(work, panel_rows.clone(), count);
    let (width, tile) = (round_up_lanes(dims.head_dim), round_up_lanes(plan.tile_keys));
    let [queries, wide_keys, tile_scores, tensor_rows, stage_rows, whole_rows] = scratch.floats.buffers([
        width * count,
        plan.tile_keys * dims.head_dim,
        tile * count,
        tile * count,
        count * width,
        panel_rows.len() * dims.seq_kv,
    ]);
    let cap = problem.bias.softcap.filter(|_| stage != ScoreStage::Raw);
    let factor = query_factor(problem.scale, cap, Unit::Natural);
    gather_into_lanes(isa, work.queries(panel_rows.clone()), factor, (&mut *queries, count), stage_rows);

    for start in (0..dims.seq_kv).step_by(plan.tile_keys) {
        let seen = start..(start + plan.tile_keys).min(dims.seq_kv);
        let keys = as_f32(isa, work.keys().slice_rows(seen.clone()), wide_keys);
        let scores = &mut tile_scores[..seen.len() * count];
        let mut max = [f32::NEG_INFINITY; MAX_PANEL_LANES];
        scores::scores(isa, PanelKeys::Wide(keys), queries, scores, &mut max[..count], &mut Ahead::nothing());
        match stage {
            ScoreStage::Raw | ScoreStage::Capped => adjust_raw(work, cap, scores, &mut max[..count]),
            ScoreStage::Biased | ScoreStage::Probabilities => {
                adjust_all(work, &lanes, &seen, scores, &mut max[..count], &mut *tensor_rows);
            }
        }
        for (lane, row) in whole_rows.chunks_exact_mut(dims.seq_kv).enumerate() {
            for (to, scores) in row[seen.clone()].iter_mut().zip(scores.chunks_exact(count)) {
                *to = scores[lane];
            }
        }
    }
    for (row, r) in whole_rows.chunks_exact_mut(dims.seq_kv).zip(panel_rows) {
        if stage == ScoreStage::Probabilities {
            crate::softmax::plain(row);
        }
        rows.write(r..r + 1, (row, dims.seq_kv), |_| 0.0);
    }
}

/// The softcap alone.
fn adjust_raw(work: Work<'_>, softcap: Option<f32>, scores: &mut [f32], max: &mut [f32]) {
    let adjust =
        Adjust { unit: Unit::Natural, softcap, bias: None, only_hides: true, first: 0, alibi: None, visible: None };
    if !adjust.is_none() {
        adjust_panel(work.plan.isa, adjust, None, scores, max);
    }
}

/// All that changes or hides a score.
fn adjust_all(
    work: Work<'_>,
    lanes: &Lanes,
    keys: &Range<usize>,
    scores: &mut [f32],
    max: &mut [f32],
    tensor_rows: &mut [f32],
) {
    let isa = work.plan.isa;
    let tensors = work.has_score_tensor().then(|| panel_tensors(work, lanes, keys, tensor_rows));
    let marks = Marks::new(work, lanes, keys, Unit::Natural);
    adjust_panel(isa, marks.adjust(keys, None), tensors.as_ref().map(|tensors| (tensors, 0)), scores, max);
}
