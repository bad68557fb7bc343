//! Sums of probabilities for each key.
//!
//! A task is a run of keys of a key/value head, and goes through all queries. So each sum is computed by one worker in the order of
//! the queries, nothing is reduced between workers, and memory is that of a run.

#![forbid(unsafe_code)]

use super::output::{ClaimedKeys, KeyClaims};
use super::schedule::span_of;
use super::task::input_of_heads;
use super::workspace::Workspace;
use crate::kernel::decode::Decode;
use crate::kernel::form::FormKernel;
use crate::kernel::key_sums::{KeySums, lane_sums_len, row_lse, sums_width};
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::Prefill;
use crate::kernel::scratch::Scratch;
use crate::kernel::task::{Piece, TaskInput};
use crate::plan::{Form, KeySteps, KeySumsPlan, Plan};
use crate::problem::Problem;
use crate::tensor::group::GroupRows;
use crate::tensor::{TensorMut, TensorRef};
use crate::threads::{work_through, workers};
use std::ops::Range;

/// Writes the sum of each key's probabilities, `exp(score - lse)`, over the queries of each head.
///
/// * `problem`: without values
/// * `lse`: `[batch, heads_q, queries, 1]`, checked
/// * `sums`: `[sequences, heads_q, seq_kv]`, checked
pub(crate) fn run(
    problem: &Problem<'_>,
    plan: &Plan,
    lse: TensorRef<'_, f32>,
    sums: TensorMut<'_, f32, 3>,
    workspace: &mut Workspace,
) {
    if sums.shape().contains(&0) {
        return; // the other dimensions may be anything
    }
    let claims = KeyClaims::new(sums, problem.dims, plan.keys_of_sum_task());
    let scratch = Scratch::for_workers(&mut workspace.scratch, workers(plan.worth(), claims.count()));
    work_through(plan.worth(), scratch, &claims, &|claimed, scratch| {
        write_sums((problem, plan), &lse, claimed, scratch);
    });
    Scratch::grow_to_largest(scratch);
}

/// Writes the sums of a claimed run of keys.
fn write_sums(
    (problem, plan): (&Problem<'_>, &Plan),
    lse: &TensorRef<'_, f32>,
    mut claimed: ClaimedKeys<'_>,
    scratch: &mut Scratch,
) {
    let sequence = problem.sequences.get(claimed.batch);
    let own = plan.key_sums_of(&sequence);
    let (width, keys) = (sums_width(claimed.columns.len()), sequence.keys_in(&claimed.columns));
    // Columns before the first key stay 0.
    let padding = claimed.columns.len() - keys.len();
    // Moved out and back, so that kernels can borrow the rest.
    let mut memory = std::mem::take(&mut scratch.key_sums);
    let [sums, row_lses, lane_sums] =
        memory.buffers([own.heads * width, own.block_rows, lane_sums_len(plan.steps(own.form).tile)]);
    for first in claimed.heads.clone().step_by(own.heads) {
        let heads = first..first + own.heads;
        sums.fill(0.0);
        for rows in own.blocks() {
            let input = input_of_rows((problem, plan), &own, (claimed.batch, heads.clone()), rows.clone());
            let lse = read_lse(problem, lse, (claimed.batch, heads.clone()), &rows, row_lses);
            let mut to =
                KeySums { keys: keys.clone(), sums: &mut sums[padding..], width, lse, lane_sums: &mut *lane_sums };
            let (steps, prefetch) = (plan.steps(own.form), &mut Prefetch::none());
            match own.form {
                Form::Prefill => add_rows::<Prefill<'_, '_>>(&input, steps, &mut to, prefetch, scratch),
                Form::Decode => add_rows::<Decode<'_, '_>>(&input, steps, &mut to, prefetch, scratch),
            }
        }
        let rows = first - claimed.heads.start..heads.end - claimed.heads.start;
        claimed.sums.write_rows(plan.isa(), rows, (sums, width));
    }
    scratch.key_sums = memory;
}

/// Reads the log-sum-exps of a block of rows into a buffer.
fn read_lse<'m>(
    problem: &Problem<'_>,
    lse: &TensorRef<'_, f32>,
    (b, heads): (usize, Range<usize>),
    rows: &Range<usize>,
    to: &'m mut [f32],
) -> &'m [f32] {
    let (b, rows) = problem.query_rows(b, heads.len(), rows);
    let from = GroupRows::new(&lse.strided, b, heads).slice(rows);
    let to = &mut to[..from.count()];
    for (n, to) in to.iter_mut().enumerate() {
        from.row(n).iter().for_each(|natural| *to = row_lse(natural));
    }
    to
}

/// The kernel's input of a block of rows.
fn input_of_rows<'a>(
    (problem, plan): (&'a Problem<'a>, &Plan),
    own: &KeySumsPlan,
    (b, heads): (usize, Range<usize>),
    rows: Range<usize>,
) -> TaskInput<'a> {
    let queries = rows.start / own.heads..rows.end.div_ceil(own.heads);
    let distinct = if problem.masks.heads_are_alike() { heads.start..heads.start + 1 } else { heads.clone() };
    let span = span_of(problem, &problem.sequences.get(b), distinct, queries);
    input_of_heads((problem, plan), (b, heads), rows, span, own.form)
}

/// Adds the probabilities of a block of rows, tile by tile.
fn add_rows<'t, 'a: 't, K: FormKernel<'t, 'a>>(
    input: &'t TaskInput<'a>,
    steps: KeySteps,
    to: &mut KeySums<'_>,
    prefetch: &'t mut Prefetch,
    scratch: &'t mut Scratch,
) {
    let keys = input.span.start.max(to.keys.start)..input.span.end.min(to.keys.end);
    if keys.is_empty() {
        return;
    }
    K::list_rows(input, scratch);
    let mut kernel = K::load(Piece { task: input, keys: keys.clone() }, None, None, prefetch, scratch);
    for tile in steps.seen_tiles(keys, &input.lost_keys()) {
        kernel.add_probs(tile, to);
    }
}
