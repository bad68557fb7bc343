//! The trait between driver and kernel: load, step, finish.

#![forbid(unsafe_code)]

use super::key_sums::KeySums;
use super::output::TaskOutput;
use super::prefetch::Prefetch;
use super::scratch::Scratch;
use super::task::{Piece, TaskInput};
use std::ops::Range;

/// A form of the computation. It decides how the queries, keys and values of a task lie in registers.
///
/// The driver calls [`list_rows`](Self::list_rows) once for all heads of a task. For each head it calls [`load`](Self::load) once,
/// [`step`](Self::step) for each tile in the order of the keys, [`end_split`](Self::end_split) after the tiles of each split, and
/// [`finish`](Self::finish) at the end.
pub(crate) trait FormKernel<'t, 'a>: Sized {
    /// Lists the rows of a task and their spans, which all its heads share.
    fn list_rows(task: &TaskInput<'_>, scratch: &mut Scratch);

    /// Lays out the queries of a head, after its rows have been listed.
    ///
    /// * `piece`: the task, and the keys that will be stepped over
    /// * `next`: the piece that this worker most likely computes next, to be prefetched
    /// * `output`: the rows that will be written, to be prefetched
    /// * `prefetch`: a list to be filled; moving one takes longer than filling it
    fn load(
        piece: Piece<'t, 'a>,
        next: Option<Piece<'_, 'a>>,
        output: Option<&TaskOutput<'_>>,
        prefetch: &'t mut Prefetch,
        scratch: &'t mut Scratch,
    ) -> Self;

    /// Computes scores, softmax and values of one tile. `keys` does not cross a multiple of the tile size.
    fn step(&mut self, keys: Range<usize>);

    /// Ends a split: merges its result into that of the splits before it.
    fn end_split(&mut self) {}

    /// Adds the probabilities of one tile to the sums of its keys, instead of a step: the log-sum-exps are known, and there are no
    /// values.
    fn add_probs(&mut self, keys: Range<usize>, to: &mut KeySums<'_>);

    /// Divides by the sums and writes the task's rows.
    fn finish(self, output: &mut TaskOutput<'_>);
}
