//! The output, shared between workers: each row is handed to the one task that writes it.
//!
//! All writing of several threads into one piece of memory is here. What makes it sound: a [`Schedule`] in which each row
//! appears once, and a counter that draws each task once.

use super::ahead::for_rows;
use super::schedule::{Schedule, Work};
use crate::element::{Element, with_elements};
use crate::kernel::convert::store_row;
use crate::kernel::prefetch::Ahead;
use crate::kernel::prefill::finish::{finish_rows, log_sum_exp};
use crate::kernel::shape::MAX_PANEL_LANES;
use crate::kernel::state::PanelState;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::simd::{Kernel, Simd};
use crate::tensor::any::AnySharedRows;
use crate::tensor::matrix::RowMut;
use crate::tensor::shared::SharedRows;
use crate::tensor::{AnyTensorMut, TensorMut};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where the results go: a tensor of any type, and the log-sum-exps if they are asked for.
pub(crate) struct Output<'a> {
    values: AnySharedRows<'a>,
    lse: Option<SharedRows<'a, f32, 3>>,
}

impl<'a> Output<'a> {
    pub(crate) fn new(values: AnyTensorMut<'a>, lse: Option<TensorMut<'a, f32, 3>>) -> Self {
        Output { values: values.into_shared(), lse: lse.map(|lse| SharedRows::new(lse.strided)) }
    }

    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.values.shape().contains(&0) && self.lse.as_ref().is_none_or(|lse| lse.shape().contains(&0))
    }

    /// Gets ready to hand out the rows of `schedule`, which must be for this problem.
    pub(super) fn share(self, problem: &'a Problem<'a>, plan: &'a Plan, schedule: &'a Schedule) -> Shared<'a> {
        Shared { output: self, problem, plan, schedule, next: AtomicUsize::new(0) }
    }
}

/// An output that several workers write.
pub(super) struct Shared<'a> {
    output: Output<'a>,
    problem: &'a Problem<'a>,
    plan: &'a Plan,
    schedule: &'a Schedule,
    next: AtomicUsize,
}

impl Shared<'_> {
    /// The task that is drawn next, most likely: another worker may be faster.
    pub(super) fn peek(&self) -> Option<Work<'_>> {
        let task = self.schedule.tasks().get(self.next.load(Ordering::Relaxed))?;
        Some(Work { problem: self.problem, plan: self.plan, task })
    }

    /// The next task, and the right to write its rows.
    pub(super) fn draw(&self) -> Option<Rows<'_>> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let task = self.schedule.tasks().get(index)?;
        let work = Work { problem: self.problem, plan: self.plan, task };
        Some(Rows { output: &self.output, work, index })
    }
}

/// The rows of one task; there is one of these for each task drawn.
pub(super) struct Rows<'a> {
    output: &'a Output<'a>,
    work: Work<'a>,
    index: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn work(&self) -> Work<'a> {
        self.work
    }

    /// Has memory asked for the rows.
    pub(super) fn ask(&self, ahead: &mut Ahead) {
        let (task, values) = (self.work.task, &self.output.values);
        for_rows(self.work, |h, rows| {
            if let Some(rows) = values.addresses([task.batch, h], rows) {
                ahead.add_addresses(rows);
            }
        });
    }

    /// The task's place in the schedule.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Writes some rows of the task: the output, rounded to its type, and the log-sum-exps if they are asked for.
    ///
    /// * `values`: `[rows][width]`, of which each row's first elements are written
    /// * `lse(n)`: that of the n-th of these rows
    ///
    /// # Panics
    /// If the rows are not the task's, or `values` doesn't have as many of them, or not as long.
    pub(super) fn write(&mut self, rows: Range<usize>, values: (&[f32], usize), lse: impl Fn(usize) -> f32) {
        self.check(&rows);
        self.write_lse(rows.clone(), lse);
        self.work.plan.isa.run(WriteRows { owner: self, rows, values });
    }

    /// As [`Rows::write`], straight from the lanes of a panel: what it summed, divided by `state.sum`.
    ///
    /// * `panel`: `[value_dim rounded up][lanes]`, a lane for each of the rows or more
    /// * `stage`: `lanes * value_dim` elements or more, for output rows with gaps between their elements
    ///
    /// # Panics
    /// If the rows are not the task's, or more than there are lanes.
    pub(super) fn write_panel(
        &mut self,
        rows: Range<usize>,
        panel: (&[f32], usize),
        state: &PanelState,
        stage: &mut [f32],
    ) {
        self.check(&rows);
        assert!(rows.len() <= panel.1);
        self.write_lse(rows.clone(), |lane| log_sum_exp(state.max[lane], state.sum[lane]));
        self.work.plan.isa.run(WritePanel { owner: self, rows, panel, state, stage });
    }

    /// The log-sum-exps of rows that have been checked, if they are asked for.
    fn write_lse(&mut self, rows: Range<usize>, lse: impl Fn(usize) -> f32) {
        let Some(tensor) = &self.output.lse else { return };
        for (n, r) in rows.enumerate() {
            let (h, i) = self.work.head_and_query(r);
            // SAFETY: as in `row_mut`: element (batch, h, i) belongs to row r of this task alone. Nobody asks for rows of this
            // tensor, in which the queries of a head are one row.
            unsafe { tensor.write([self.work.task.batch, h, i], lse(n)) };
        }
    }

    /// # Panics
    /// If the rows are not the task's.
    fn check(&self, rows: &Range<usize>) {
        let task = self.work.task;
        assert!(task.rows.start <= rows.start && rows.end <= task.rows.end, "{rows:?} of a task for {:?}", task.rows);
    }

    /// Row `r` of the task in `tensor`, which is the output's values.
    ///
    /// # Safety
    /// * `r` is a row of the task
    /// * no other result for the same row lives at the same time
    #[inline(always)]
    unsafe fn row_mut<'r, T>(&self, tensor: &SharedRows<'r, T>, r: usize) -> RowMut<'r, T> {
        let (h, i) = self.work.head_and_query(r);
        // SAFETY: row (batch, h, i) belongs to row r of this task alone (a schedule lists each row once), and of this task there
        // is one `Rows` (the counter has drawn it once), whose caller has promised the rest.
        unsafe { tensor.row_mut([self.work.task.batch, h, i]) }
    }
}

struct WriteRows<'a, 'r> {
    owner: &'a mut Rows<'r>,
    rows: Range<usize>,
    values: (&'a [f32], usize),
}

impl Kernel for WriteRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (values, width) = self.values;
        let owner = self.owner;
        with_elements!(&owner.output.values, tensor => {
            for (n, r) in self.rows.enumerate() {
                let values = &values[n * width..][..tensor.shape()[3]];
                // SAFETY: a row of the task (`write` has checked them), and `owner` is borrowed mutably while this one
                // result lives.
                match unsafe { owner.row_mut(tensor, r) }.into_mut_slice() {
                    Ok(row) => store_row(simd, row, values),
                    Err(mut row) => row.fill_from(values.iter().map(|&value| Element::from_f32(value))),
                }
            }
        });
    }
}

struct WritePanel<'a, 'r> {
    owner: &'a mut Rows<'r>,
    rows: Range<usize>,
    panel: (&'a [f32], usize),
    state: &'a PanelState,
    stage: &'a mut [f32],
}

impl Kernel for WritePanel<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WritePanel { owner, rows, panel, state, stage } = self;
        with_elements!(&owner.output.values, tensor => {
            if !tensor.has_contiguous_rows() {
                let width = tensor.shape()[3];
                let mut slices = <[&mut [_]; MAX_PANEL_LANES]>::default();
                for (slice, stage) in slices.iter_mut().zip(stage.chunks_exact_mut(width)) {
                    *slice = stage;
                }
                finish_rows::<S, f32>(simd, panel, state, &mut slices[..rows.len()]);
                return WriteRows { owner, rows, values: (stage, width) }.run(simd);
            }
            let mut slices = <[&mut [_]; MAX_PANEL_LANES]>::default();
            for (slice, r) in slices.iter_mut().zip(rows.clone()) {
                // SAFETY: a row of the task (`write_panel` has checked them), each once, and `owner` is borrowed mutably while
                // they live.
                *slice = unsafe { owner.row_mut(tensor, r) }.into_mut_slice().expect("rows without gaps");
            }
            finish_rows(simd, panel, state, &mut slices[..rows.len()]);
        });
    }
}

/// A buffer that several workers fill: equal slots, each handed out once, in order.
pub(super) struct Slots<'a> {
    origin: *mut f32,
    slot: usize,
    count: usize,
    next: AtomicUsize,
    buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: threads that share it can only draw from it, and no two draws give the same slot.
unsafe impl Sync for Slots<'_> {}

impl<'a> Slots<'a> {
    /// As many slots of `slot` elements as fit in `buffer`.
    pub(super) fn new(buffer: &'a mut [f32], slot: usize) -> Self {
        let count = buffer.len() / slot.max(1);
        Slots { origin: buffer.as_mut_ptr(), slot, count, next: AtomicUsize::new(0), buffer: PhantomData }
    }

    /// The number of the slot that is drawn next, most likely: another worker may be faster.
    pub(super) fn next(&self) -> usize {
        self.next.load(Ordering::Relaxed)
    }

    /// The next slot and its number.
    pub(super) fn draw(&self) -> Option<(usize, &'a mut [f32])> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        // SAFETY: slot `index` lies inside the buffer, which is borrowed mutably for 'a, and the counter has given this
        // index once: nobody else has the slot.
        (index < self.count)
            .then(|| unsafe { (index, std::slice::from_raw_parts_mut(self.origin.add(index * self.slot), self.slot)) })
    }
}
