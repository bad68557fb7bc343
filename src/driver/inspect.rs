//! Scores as an output: formed and modified by the prefill form, in natural units, and written row by row.

#![forbid(unsafe_code)]

use super::output::{ClaimedRows, RowClaims};
use super::schedule::span_of;
use super::task::input_of_heads;
use super::workspace::Workspace;
use crate::error::Error;
use crate::kernel::form::FormKernel;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::Prefill;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::{Piece, TaskInput};
use crate::plan::{Form, Plan};
use crate::problem::Problem;
use crate::score::Unit;
use crate::simd::Isa;
use crate::tensor::TensorMut;
use crate::threads::{work_through, workers};
use std::ops::Range;

/// The scores of a call that are written.
pub(crate) struct ScoreRange {
    /// Rows and columns of the scores of each sequence: queries and keys, with padding.
    pub(crate) queries: Range<usize>,
    pub(crate) keys: Range<usize>,
    /// Called with the level and each row before it is written. It takes whole rows, so scores of other keys are formed, too.
    pub(crate) finish_row: Option<fn(Isa, &mut [f32])>,
}

/// Writes the scores of `range` to `output`, `[sequences, heads_q, queries, keys]`.
///
/// # Errors
/// [`Error::TooLarge`] if there is no memory for a panel's rows.
pub(crate) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    range: &ScoreRange,
    output: TensorMut<'_, f32>,
    workspace: &mut Workspace,
) -> Result<(), Error> {
    if output.shape().contains(&0) {
        return Ok(());
    }
    // Keys of the rows that are formed, with padding.
    let keys = if range.finish_row.is_some() { 0..problem.dims.seq_kv } else { range.keys.clone() };
    // A sink is one more score, which is not written.
    let sinks = usize::from(range.finish_row.is_some() && problem.score_mods.sinks.is_some());
    let rows = FormedRows { width: keys.len() + sinks, keys };
    let claims = RowClaims::new(output, problem, range.queries.clone(), plan.tile_rows());
    let scratch = Scratch::for_workers(&mut workspace.scratch, workers(plan.worth(), claims.count()));
    let buffers = scratch.iter().map(|_| rows.buffer(plan.tile_rows())).collect::<Result<Vec<_>, _>>()?;
    let mut memory: Vec<_> = scratch.iter_mut().zip(buffers).collect();
    work_through(plan.worth(), &mut memory, &claims, &|claimed, (scratch, buffer)| {
        write_rows((problem, plan), range, &rows, claimed, (scratch, buffer));
    });
    Ok(())
}

/// Rows of scores in memory.
struct FormedRows {
    keys: Range<usize>,
    /// Elements of a row: the keys, and a sink.
    width: usize,
}

impl FormedRows {
    fn buffer(&self, rows: usize) -> Result<Vec<f32>, Error> {
        let (mut buffer, len) = (Vec::new(), rows.saturating_mul(self.width));
        buffer.try_reserve_exact(len).map_err(|_| Error::TooLarge { what: "a row of scores" })?;
        buffer.resize(len, 0.0);
        Ok(buffer)
    }
}

/// Writes the rows of a claim, which are one panel.
fn write_rows(
    (problem, plan): (&Problem<'_>, &Plan),
    range: &ScoreRange,
    formed: &FormedRows,
    mut claimed: ClaimedRows<'_>,
    (scratch, buffer): (&mut Scratch, &mut [f32]),
) {
    let ClaimedRows { batch, heads, rows, .. } = &claimed;
    if rows.is_empty() {
        return;
    }
    let queries = rows.start / heads.len()..rows.end.div_ceil(heads.len());
    let span = span_of(problem, &problem.sequences.get(*batch), heads.clone(), queries);
    let place = (*batch, heads.clone());
    let input = input_of_heads((problem, plan), place, rows.clone(), span, Form::Prefill);
    let input = input.in_unit(Unit::Natural, problem.scale);
    let buffer = &mut buffer[..rows.len() * formed.width];
    form_rows(&input, plan, formed, buffer, scratch);
    if let Some(finish) = range.finish_row {
        buffer.chunks_exact_mut(formed.width).for_each(|row| finish(plan.isa(), row));
    }
    let rows = 0..rows.len();
    claimed.scores.write_rows(plan.isa(), rows, (&buffer[range.keys.start - formed.keys.start..], formed.width));
}

/// Forms the rows of a panel. Keys outside the span are hidden, and no tile has them.
fn form_rows(
    panel: &TaskInput<'_>,
    plan: &Plan,
    FormedRows { keys, width }: &FormedRows,
    rows: &mut [f32],
    scratch: &mut Scratch,
) {
    rows.fill(f32::NEG_INFINITY);
    for (n, row) in rows.chunks_exact_mut(*width).enumerate() {
        row[keys.len()..].fill(panel.sink(n).unwrap_or(f32::NEG_INFINITY));
    }
    let (first_key, own) = (panel.sequence.first_key, panel.sequence.keys_in(keys));
    let seen = panel.span.start.max(own.start)..panel.span.end.min(own.end);
    if seen.is_empty() {
        return;
    }
    let mut prefetch = Prefetch::none();
    Prefill::list_rows(panel, scratch);
    let mut kernel = Prefill::load(Piece { task: panel, keys: seen.clone() }, None, None, &mut prefetch, scratch);
    for tile in plan.steps(Form::Prefill).tiles_of(seen) {
        kernel.visit_scores(tile, |seen, scores, lanes| {
            let seen = first_key + seen.start - keys.start..first_key + seen.end - keys.start;
            for (lane, row) in rows.chunks_exact_mut(*width).enumerate() {
                for (to, scores) in row[seen.clone()].iter_mut().zip(scores.chunks_exact(lanes)) {
                    // -0 becomes +0: where some pairs of a tile are hidden, 0 is added to all of its scores.
                    *to = scores[lane] + 0.0;
                }
            }
        });
    }
}
