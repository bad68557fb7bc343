//! All steps of the prefill form in one call, for short sequences: heads of one element type whose keys are one tile, with nothing that
//! modifies or hides scores, and sums by rows ([`sums_by_rows`]): one panel, or at most 64 keys.
//!
//! ```text
//! for each panel:
//!     Q[e][lane] = factor * q[lane][e]             transpose.rs
//!     S[j][lane] = sum_e k[j][e] * Q[e][lane]      scores.rs, from k as f32
//!     P, l       = softmax of S                    softmax.rs
//!     O[lane][d] = sum_j P[j][lane] * v[j][d]      values.rs
//!     out        = O / l                           finish.rs
//! ```
//!
//! A head of a few tokens takes less time to multiply than the general steps take to find out what they need not do. The functions are
//! theirs, and so are the bits.

use super::finish::divide_rows;
use super::scores::Scores;
use super::softmax::{Summed, panel_softmax};
use super::values::sum_rows;
use super::{next_tile_parts, sums_by_rows};
use crate::element::{Element, bf16, f16, with_elements};
use crate::kernel::arithmetic::F32Fma;
use crate::kernel::output::TaskOutput;
use crate::kernel::panel::Panel;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::scratch::Scratch;
use crate::kernel::shape::{MAX_PANEL_LANES, panel_lanes, round_up_lanes};
use crate::kernel::task::{Operands, TaskInput};
use crate::kernel::transpose::{LaneRows, transpose_rows};
use crate::kernel::widen::widen;
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::group::GroupRows;
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// What the short heads of a task share: all but their rows.
pub(crate) struct ShortHeads<'t> {
    isa: Isa,
    factor: f32,
    span: Range<usize>,
    /// Parts of a head's products, which prefetch.
    parts: usize,
    panels: &'t mut [Panel],
    /// `[head_dim rounded up][lanes]`.
    queries: &'t mut [f32],
    /// `[keys][head_dim]`, for keys of half types.
    keys: &'t mut [f32],
    /// `[keys][lanes]`.
    scores: &'t mut [f32],
    /// `[lanes][value_dim]`.
    sums: &'t mut [f32],
}

/// The rows of a head: its queries, and the keys and values of its span.
pub(crate) struct HeadRows<'a, T> {
    pub(crate) queries: GroupRows<'a, T>,
    pub(crate) keys: Matrix<'a, T>,
    pub(crate) values: Matrix<'a, T>,
}

/// Elements whose rows can be keys of a product.
pub(crate) trait Key: Element {
    /// `keys` as f32, in place or copied to `copy`: `[keys.rows()][keys.cols()]`, or longer.
    fn as_f32<'k, S: Simd>(simd: S, keys: Matrix<'k, Self>, copy: &'k mut [f32]) -> Matrix<'k, f32>;
}

impl Key for f32 {
    #[inline(always)]
    fn as_f32<'k, S: Simd>(_: S, keys: Matrix<'k, f32>, _: &'k mut [f32]) -> Matrix<'k, f32> {
        keys
    }
}

impl Key for f16 {
    #[inline(always)]
    fn as_f32<'k, S: Simd>(simd: S, keys: Matrix<'k, f16>, copy: &'k mut [f32]) -> Matrix<'k, f32> {
        widened(simd, keys, copy)
    }
}

impl Key for bf16 {
    #[inline(always)]
    fn as_f32<'k, S: Simd>(simd: S, keys: Matrix<'k, bf16>, copy: &'k mut [f32]) -> Matrix<'k, f32> {
        widened(simd, keys, copy)
    }
}

#[inline(always)]
fn widened<'k, S: Simd, T: Element>(simd: S, keys: Matrix<'k, T>, copy: &'k mut [f32]) -> Matrix<'k, f32> {
    let (rows, cols) = (keys.rows(), keys.cols());
    let copy = &mut copy[..rows * cols];
    for (n, copy) in copy.chunks_exact_mut(cols.max(1)).enumerate() {
        widen(simd, keys.row(n), 1.0, copy);
    }
    Matrix::from_slice(copy, rows, cols)
}

impl<'t> ShortHeads<'t> {
    /// The heads of a task, whose rows have been listed ([`FormKernel::list_rows`](crate::kernel::form::FormKernel::list_rows)), if
    /// they are short.
    pub(crate) fn new(task: &TaskInput<'_>, scratch: &'t mut Scratch) -> Option<Self> {
        let Scratch { tile: floats, panels, .. } = scratch;
        if !are_short(task, panels) {
            return None;
        }
        let (span, lanes) = (task.span.clone(), panel_lanes(task.isa));
        let [queries, keys, scores, sums] = floats.buffers([
            round_up_lanes(task.head_dim()) * lanes,
            if task.keys.are_in_place() { 0 } else { span.len() * task.head_dim() },
            span.len() * lanes,
            round_up_lanes(task.value_dim()) * lanes,
        ]);
        let parts = panels.iter().map(|panel| next_tile_parts(task, &panel.lanes, &span, true)).sum();
        Some(ShortHeads { isa: task.isa, factor: task.factor, span, parts, panels, queries, keys, scores, sums })
    }

    /// Computes a head and prefetches the next one's rows. Returns whether it is done: not if a sum is not finite, because a value that
    /// is not finite may have a prob of 0 and count for nothing.
    pub(crate) fn compute<T: Key>(
        &mut self,
        head: &HeadRows<'_, T>,
        next: Option<&HeadRows<'_, T>>,
        prefetch: &mut Prefetch,
        output: &mut TaskOutput<'_>,
    ) -> bool {
        prefetch.clear();
        prefetch.add_output(&output.values);
        if let Some(next) = next {
            prefetch.add_rows(next.keys);
            prefetch.add_rows(next.values);
            next.queries.heads().for_each(|head| prefetch.add_rows(head));
        }
        prefetch.spread(self.parts);
        if !self.isa.run(ShortHead { heads: self, head, prefetch, output }) {
            return false;
        }
        for Panel { lanes, state, .. } in &*self.panels {
            output.write_lse(lanes.rows.clone(), |lane| state.lse(lane, None));
        }
        true
    }
}

/// Whether the heads of a task are short.
fn are_short(task: &TaskInput<'_>, panels: &[Panel]) -> bool {
    let span = &task.span;
    let unmodified = !task.has_score_mods() && task.score_mods.open.is_empty() && task.score_mods.sinks.is_none();
    let sees_all =
        task.masks.with_holes().next().is_none() && panels.iter().all(|panel| panel.lanes.cover.is_full(span));
    task.operands == Operands::F32
        && unmodified
        && sees_all
        && !span.is_empty()
        && span.end <= (span.start / task.tile_keys + 1) * task.tile_keys
        && sums_by_rows(task, panels.len(), span)
        && task.queries.has_contiguous_rows()
        && task.keys.has_contiguous_rows()
        && task.values.has_contiguous_rows()
}

/// A head. Its arguments stay in this struct while the products run (see `AddValues` in `values.rs`).
struct ShortHead<'s, 't, 'a, 'o, T> {
    heads: &'s mut ShortHeads<'t>,
    head: &'s HeadRows<'a, T>,
    prefetch: &'s mut Prefetch,
    output: &'s mut TaskOutput<'o>,
}

impl<T: Key> Kernel for ShortHead<'_, '_, '_, '_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let ShortHead { heads, head: &HeadRows { queries, keys, values }, prefetch, output } = self;
        let ShortHeads { factor, span, panels, queries: into, keys: copy, scores, sums, .. } = heads;
        let keys = T::as_f32(simd, keys, copy);
        for Panel { lanes, state, .. } in &mut **panels {
            let (rows, count) = (lanes.rows.clone(), lanes.count);
            let (into, scores) = (&mut into[..round_up_lanes(keys.cols()) * count], &mut scores[..keys.rows() * count]);
            let mut max = [f32::NEG_INFINITY; MAX_PANEL_LANES];
            (state.max, state.sum) = ([f32::NEG_INFINITY; MAX_PANEL_LANES], [0.0; MAX_PANEL_LANES]);

            // 1. Scores.
            let lanes_rows =
                LaneRows::of_group(queries.slice(rows.clone()), 0..queries.cols()).expect("rows without gaps");
            transpose_rows((simd, F32Fma::new()), &lanes_rows, Some(*factor), (&mut *into, count));
            let of_panel = Scores { keys, queries: into, scores: &mut *scores, max: &mut max[..count], prefetch };
            of_panel.panel_scores(simd, F32Fma::new());

            // 2. Probs.
            match count / S::LANES {
                1 => panel_softmax::<S, 1>(simd, scores, &max[..count], state, Summed::Nothing),
                2 => panel_softmax::<S, 2>(simd, scores, &max[..count], state, Summed::Nothing),
                vectors => unreachable!("a panel of {vectors} vectors"),
            }

            // 3. Values.
            let sums = &mut sums[..rows.len() * values.cols()];
            if !sum_rows(simd, (values, span.clone()), (&*scores, &*lanes), &mut *sums, prefetch) {
                return false;
            }
            with_elements!(&mut output.values, to => divide_rows(simd, to, rows, sums, state));
        }
        true
    }
}
