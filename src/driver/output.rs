//! The output, shared between workers. Each row is handed to the one task that writes it.
//!
//! All memory that several threads write is shared here. It is sound because each row appears once in a [`Schedule`], and a
//! counter hands out each task, block of rows, run of keys and slot once.

use super::schedule::{Schedule, Task};
use crate::element::ByElement;
use crate::kernel::output::TaskOutput;
use crate::plan::Plan;
use crate::problem::{Dims, Problem};
use crate::tensor::any::AnySharedRows;
use crate::tensor::group::{AnyGroupRowsMut, GroupRowsMut};
use crate::tensor::shared::SharedRows;
use crate::tensor::{AnyTensorMut, TensorMut};
use crate::threads::Claims;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The output of a call: a tensor of any type, and optionally the log-sum-exps.
pub(crate) struct Output<'a> {
    values: AnySharedRows<'a>,
    lse: Option<SharedRows<'a, f32, 3>>,
}

impl<'a> Output<'a> {
    pub(crate) fn new(values: AnyTensorMut<'a>, lse: Option<TensorMut<'a, f32, 3>>) -> Self {
        Output { values: values.into_shared(), lse: lse.map(|lse| SharedRows::new(lse.strided)) }
    }

    /// Whether there are no elements to write.
    pub(super) fn is_empty(&self) -> bool {
        self.values.shape().contains(&0) && self.lse.as_ref().is_none_or(|lse| lse.shape().contains(&0))
    }

    /// Shares the output between the tasks of `schedule`, which must be for this problem. `workers` workers will claim them.
    pub(super) fn share(
        self,
        problem: &'a Problem<'a>,
        plan: &'a Plan,
        schedule: &'a Schedule,
        workers: usize,
    ) -> TaskClaims<'a> {
        TaskClaims { output: self, problem, plan, schedule, workers, next: AtomicUsize::new(0) }
    }
}

/// The tasks of a call, each with the right to write its rows.
pub(super) struct TaskClaims<'a> {
    output: Output<'a>,
    problem: &'a Problem<'a>,
    plan: &'a Plan,
    schedule: &'a Schedule,
    workers: usize,
    next: AtomicUsize,
}

/// A claimed task: the only one with the right to write its rows.
pub(super) struct ClaimedTask<'c> {
    claims: &'c TaskClaims<'c>,
    /// Its index in the schedule.
    pub(super) index: usize,
    pub(super) task: &'c Task,
    /// The task that this worker most likely claims next: tasks take about as long as their neighbours, so workers claim in
    /// turns. (With two workers, the task after this one is nearly always the other worker's.)
    pub(super) next: Option<&'c Task>,
}

impl<'c> Claims<'c> for TaskClaims<'_> {
    type Claim = ClaimedTask<'c>;

    fn claim(&'c self) -> Option<ClaimedTask<'c>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let task = self.schedule.tasks().get(index)?;
        let next = self.schedule.tasks().get(index + self.workers);
        Some(ClaimedTask { claims: self, index, task, next })
    }
}

impl ClaimedTask<'_> {
    /// The output rows `rows` of key/value head `head`.
    ///
    /// # Panics
    /// If the head or the rows are not the task's.
    pub(super) fn output(&mut self, head: usize, rows: &Range<usize>) -> TaskOutput<'_> {
        assert!(self.task.heads.contains(&head), "head {head} of {:?}", self.task.heads);
        assert!(
            self.task.rows.start <= rows.start && rows.end <= self.task.tail.end,
            "rows {rows:?} of {:?}",
            self.task
        );
        // SAFETY: the counter has given the task's index once, so there is one claim of it, and each row is in one task of a
        // schedule (its invariant). The claim is borrowed mutably while the result lives.
        unsafe { self.claims.rows_of(head, rows.clone()) }
    }
}

impl TaskClaims<'_> {
    pub(super) fn problem(&self) -> &Problem<'_> {
        self.problem
    }

    pub(super) fn plan(&self) -> &Plan {
        self.plan
    }

    /// The output rows `rows` of key/value head `head`.
    ///
    /// # Safety
    /// * while the result lives, there is no other result with any of these rows
    unsafe fn rows_of(&self, head: usize, rows: Range<usize>) -> TaskOutput<'_> {
        let dims = &self.problem.dims;
        let (b, head_kv) = dims.batch_and_head(head);
        let heads = dims.group_heads(head_kv);
        let (b, rows) = self.problem.query_rows(b, heads.len(), &rows);
        // SAFETY: the caller's promise. The rows of packed sequences are apart, because their starts ascend; left
        // padding moves all rows of a batch index by one number.
        unsafe {
            let lse = self.output.lse.as_ref();
            let lse = lse.map(|lse| GroupRowsMut::of_elements(lse, b, heads.clone(), rows.clone()));
            TaskOutput { values: AnyGroupRowsMut::new(&self.output.values, b, heads, rows), lse }
        }
    }
}

/// Scores of some queries of each sequence, `[sequences, heads_q, queries, keys]`, shared between workers: each claim is of a block
/// of rows of the heads that share a key/value head.
pub(super) struct RowClaims<'a> {
    scores: SharedRows<'a, f32>,
    problem: &'a Problem<'a>,
    queries: Range<usize>,
    /// Rows of a block; the last one may have fewer.
    block: usize,
    next: AtomicUsize,
}

/// A claimed block of rows.
pub(super) struct ClaimedRows<'c> {
    /// The sequence, and the query heads.
    pub(super) batch: usize,
    pub(super) heads: Range<usize>,
    /// Rows of the heads, counted from the sequence's first one. None are padding.
    pub(super) rows: Range<usize>,
    /// The scores of these rows.
    pub(super) scores: TaskOutput<'c>,
}

impl<'a> RowClaims<'a> {
    /// # Panics
    /// If the scores are not of these queries of the problem, or `block` is 0.
    pub(super) fn new(
        scores: TensorMut<'a, f32>,
        problem: &'a Problem<'a>,
        queries: Range<usize>,
        block: usize,
    ) -> Self {
        let [batch, heads, count, _] = scores.shape();
        let expected = [problem.dims.batch, problem.dims.heads_q, queries.len()];
        assert!([batch, heads, count] == expected && block > 0, "scores of {queries:?}, blocks of {block}");
        RowClaims { scores: SharedRows::new(scores.strided), problem, queries, block, next: AtomicUsize::new(0) }
    }

    fn blocks(&self) -> usize {
        (self.queries.len() * self.problem.dims.group()).div_ceil(self.block)
    }

    /// The number of claims. (There is memory for a row of each.)
    pub(super) fn count(&self) -> usize {
        self.problem.dims.batch * self.problem.dims.heads_kv * self.blocks()
    }
}

impl<'c> Claims<'c> for RowClaims<'_> {
    type Claim = ClaimedRows<'c>;

    fn claim(&'c self) -> Option<ClaimedRows<'c>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        if index >= self.count() {
            return None;
        }
        let dims = &self.problem.dims;
        let (batch, head_kv) = dims.batch_and_head(index / self.blocks());
        let (heads, start) = (dims.group_heads(head_kv), index % self.blocks() * self.block);
        let sequence = self.problem.sequences.get(batch);
        // The part of the block that is the sequence's: rows of the scores, counted from the first one of `queries`.
        let row_of = |query: usize| {
            let row = query.clamp(self.queries.start, self.queries.end) - self.queries.start;
            (row * heads.len()).clamp(start, start + self.block)
        };
        let own = row_of(sequence.first_query)..row_of(sequence.first_query + sequence.queries);
        // SAFETY: the counter has given this index once, and the blocks and heads of two indices have no row in common.
        let scores = unsafe { GroupRowsMut::new(&self.scores, batch, heads.clone(), own.clone()) };
        let scores = TaskOutput { values: ByElement::F32(scores), lse: None };
        // No row is before the sequence's first one, unless there are none.
        let [queries, first] = [self.queries.start, sequence.first_query].map(|query| query * heads.len());
        let rows = (queries + own.start).saturating_sub(first)..(queries + own.end).saturating_sub(first);
        Some(ClaimedRows { batch, heads, rows, scores })
    }
}

/// Sums for each head and key, `[sequences, heads_q, seq_kv]`, shared between workers: each claim is of a run of keys of the heads
/// that share a key/value head.
pub(super) struct KeyClaims<'a> {
    sums: SharedRows<'a, f32, 3>,
    dims: Dims,
    /// Keys of a run; the last one may have fewer.
    run: usize,
    next: AtomicUsize,
}

/// A claimed run of keys.
pub(super) struct ClaimedKeys<'c> {
    /// The sequence, and the query heads.
    pub(super) batch: usize,
    pub(super) heads: Range<usize>,
    /// The elements of a row of sums: keys and padding.
    pub(super) columns: Range<usize>,
    /// The sums, a row for each head.
    pub(super) sums: TaskOutput<'c>,
}

impl<'a> KeyClaims<'a> {
    /// # Panics
    /// If the sums have another shape than `[batch, heads_q, seq_kv]`, or `run` is 0.
    pub(super) fn new(sums: TensorMut<'a, f32, 3>, dims: Dims, run: usize) -> Self {
        assert!(sums.shape() == [dims.batch, dims.heads_q, dims.seq_kv] && run > 0, "{dims:?}, runs of {run} keys");
        KeyClaims { sums: SharedRows::new(sums.strided), dims, run, next: AtomicUsize::new(0) }
    }

    /// The number of claims. (There is memory for a sum of each.)
    pub(super) fn count(&self) -> usize {
        self.dims.batch * self.dims.heads_kv * self.dims.seq_kv.div_ceil(self.run)
    }
}

impl<'c> Claims<'c> for KeyClaims<'_> {
    type Claim = ClaimedKeys<'c>;

    /// The first keys of all heads come first: with causal order, most queries see them.
    fn claim(&'c self) -> Option<ClaimedKeys<'c>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        if index >= self.count() {
            return None;
        }
        let all_heads = self.dims.batch * self.dims.heads_kv;
        let (batch, head_kv) = self.dims.batch_and_head(index % all_heads);
        let (heads, start) = (self.dims.group_heads(head_kv), index / all_heads * self.run);
        let columns = start..(start + self.run).min(self.dims.seq_kv);
        // SAFETY: the counter has given this index once, and the runs and heads of two indices have no element in common.
        let sums = unsafe { GroupRowsMut::of_columns(&self.sums, batch, heads.clone(), columns.clone()) };
        Some(ClaimedKeys { batch, heads, columns, sums: TaskOutput { values: ByElement::F32(sums), lse: None } })
    }
}

/// A buffer cut into slots of one length. Each slot is written by one worker.
pub(super) struct SlotClaims<'a> {
    origin: *mut f32,
    slot: usize,
    count: usize,
    workers: usize,
    next: AtomicUsize,
    buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: threads that share it can only claim slots from it, and no two claims are of the same slot.
unsafe impl Sync for SlotClaims<'_> {}

/// A claimed slot.
pub(super) struct ClaimedSlot<'c> {
    pub(super) index: usize,
    /// The slot that this worker most likely claims next, as for tasks.
    pub(super) next: usize,
    pub(super) memory: &'c mut [f32],
}

impl<'a> SlotClaims<'a> {
    /// Cuts `buffer` into slots of `slot` elements, which `workers` workers will claim. A shorter rest is not used.
    pub(super) fn new(buffer: &'a mut [f32], slot: usize, workers: usize) -> Self {
        let count = buffer.len() / slot.max(1);
        SlotClaims { origin: buffer.as_mut_ptr(), slot, count, workers, next: AtomicUsize::new(0), buffer: PhantomData }
    }
}

impl<'c> Claims<'c> for SlotClaims<'_> {
    type Claim = ClaimedSlot<'c>;

    fn claim(&'c self) -> Option<ClaimedSlot<'c>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let next = index + self.workers;
        // SAFETY: slot `index` lies inside the buffer, which stays borrowed mutably, and the counter has given this index once,
        // so this is the only reference to the slot.
        let memory = || unsafe { std::slice::from_raw_parts_mut(self.origin.add(index * self.slot), self.slot) };
        (index < self.count).then(|| ClaimedSlot { index, next, memory: memory() })
    }
}
