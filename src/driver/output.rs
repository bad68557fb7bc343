//! The output, shared between workers. Each row is handed to the one task that writes it.
//!
//! All memory that several threads write is shared here. It is sound because each row appears once in a [`Schedule`], and a
//! counter hands out each task, and each slot, once.

use super::schedule::{Schedule, Task};
use crate::kernel::output::TaskOutput;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::tensor::any::AnySharedRows;
use crate::tensor::group::{AnyGroupRowsMut, GroupRowsMut};
use crate::tensor::shared::SharedRows;
use crate::tensor::{AnyTensorMut, TensorMut};
use crate::threads::Claims;
use std::marker::PhantomData;
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

    /// Shares the output between the tasks of `schedule`, which must be for this problem.
    pub(super) fn share(self, problem: &'a Problem<'a>, plan: &'a Plan, schedule: &'a Schedule) -> TaskClaims<'a> {
        TaskClaims { output: self, problem, plan, schedule, next: AtomicUsize::new(0) }
    }
}

/// The tasks of a call, each with the right to write its rows.
pub(super) struct TaskClaims<'a> {
    output: Output<'a>,
    problem: &'a Problem<'a>,
    plan: &'a Plan,
    schedule: &'a Schedule,
    next: AtomicUsize,
}

/// A claimed task.
pub(super) struct ClaimedTask<'c> {
    /// Its index in the schedule.
    pub(super) index: usize,
    pub(super) task: &'c Task,
    /// The task that this worker most likely claims next. Another worker may be faster.
    pub(super) next: Option<&'c Task>,
    pub(super) output: TaskOutput<'c>,
}

impl<'c> Claims<'c> for TaskClaims<'_> {
    type Claim = ClaimedTask<'c>;

    fn claim(&'c self) -> Option<ClaimedTask<'c>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let task = self.schedule.tasks().get(index)?;
        let next = self.schedule.tasks().get(self.next.load(Ordering::Relaxed));
        // SAFETY: the counter has given this index once, and each row is in one task of a schedule (its invariant).
        let output = unsafe { self.rows_of(task) };
        Some(ClaimedTask { index, task, next, output })
    }
}

impl TaskClaims<'_> {
    pub(super) fn problem(&self) -> &Problem<'_> {
        self.problem
    }

    pub(super) fn plan(&self) -> &Plan {
        self.plan
    }

    /// The output rows of a task.
    ///
    /// # Safety
    /// * while the result lives, there is no other result with any of these rows
    unsafe fn rows_of(&self, task: &Task) -> TaskOutput<'_> {
        let (b, heads, rows) = (task.batch, task.heads(self.problem), task.rows.clone());
        // SAFETY: the caller's promise.
        unsafe {
            let lse = self.output.lse.as_ref();
            let lse = lse.map(|lse| GroupRowsMut::of_elements(lse, b, heads.clone(), rows.clone()));
            TaskOutput { values: AnyGroupRowsMut::new(&self.output.values, b, heads, rows), lse }
        }
    }
}

/// A buffer cut into slots of one length. Each slot is written by one worker.
pub(super) struct SlotClaims<'a> {
    origin: *mut f32,
    slot: usize,
    count: usize,
    next: AtomicUsize,
    buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: threads that share it can only claim slots from it, and no two claims are of the same slot.
unsafe impl Sync for SlotClaims<'_> {}

/// A claimed slot.
pub(super) struct ClaimedSlot<'c> {
    pub(super) index: usize,
    /// The slot that this worker most likely claims next. Another worker may be faster.
    pub(super) next: usize,
    pub(super) memory: &'c mut [f32],
}

impl<'a> SlotClaims<'a> {
    /// Cuts `buffer` into slots of `slot` elements. A shorter rest is not used.
    pub(super) fn new(buffer: &'a mut [f32], slot: usize) -> Self {
        let count = buffer.len() / slot.max(1);
        SlotClaims { origin: buffer.as_mut_ptr(), slot, count, next: AtomicUsize::new(0), buffer: PhantomData }
    }
}

impl<'c> Claims<'c> for SlotClaims<'_> {
    type Claim = ClaimedSlot<'c>;

    fn claim(&'c self) -> Option<ClaimedSlot<'c>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let next = self.next.load(Ordering::Relaxed);
        // SAFETY: slot `index` lies inside the buffer, which stays borrowed mutably, and the counter has given this index once,
        // so this is the only reference to the slot.
        let memory = || unsafe { std::slice::from_raw_parts_mut(self.origin.add(index * self.slot), self.slot) };
        (index < self.count).then(|| ClaimedSlot { index, next, memory: memory() })
    }
}
