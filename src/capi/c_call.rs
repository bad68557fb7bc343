//! What calls of attention have in common: the thread's scratch memory, the inputs, and the checked options.

use super::c_cache_view::{CacheLists, CheckedView, Purpose};
use super::c_options::{CheckedOpenSets, Lists, OpenSets, Options, ScoreTensors};
use super::c_sequences::CheckedSequences;
use super::c_tensor::{CheckedTensor, F32, Tensor};
use super::failure::{Code, Failure};
use crate::attention::Attention;
use crate::driver::Workspace;
use crate::kv::Places;
use crate::problem::Problem;
use crate::tensor::any::AnyTensor;
use std::cell::Cell;

/// Scratch memory that a thread keeps between calls, so that repeated calls do not allocate.
#[derive(Debug, Default)]
pub(super) struct ThreadScratch {
    pub(super) workspace: Workspace,
    pub(super) lists: Lists,
    pub(super) cached: CacheLists,
}

thread_local! {
    static SCRATCH: Cell<Option<Box<ThreadScratch>>> = const { Cell::new(None) };
}

/// Takes the scratch memory out of the thread's slot while `work` runs. A call inside `work` finds none and makes its own.
/// After a panic the slot is empty, not half written.
pub(super) fn with_scratch<R>(work: impl FnOnce(&mut ThreadScratch) -> R) -> R {
    let mut scratch = SCRATCH.try_with(Cell::take).ok().flatten().unwrap_or_default();
    let result = work(&mut scratch);
    let _ = SCRATCH.try_with(|cell| cell.set(Some(scratch)));
    result
}

/// Frees the scratch memory of the thread.
pub(super) fn free_scratch() {
    drop(SCRATCH.try_with(Cell::take));
}

/// Queries, keys and values of a call, and where the keys of each sequence lie.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub(super) tensors: [CheckedTensor; 3],
    pub(super) places: Places<'a>,
    /// The list of a cache view.
    listed: &'a [i64],
}

impl Inputs<'_> {
    /// # Safety
    /// As [`CheckedTensor::any`], of each.
    pub(super) unsafe fn any<'t>(&self) -> Result<[AnyTensor<'t>; 3], Failure> {
        let [q, k, v] = &self.tensors;
        // SAFETY: the caller's promise.
        Ok(unsafe { [q.any()?, k.any()?, v.any()?] })
    }
}

/// What was read from the options of a call. `'a` is the lifetime of the memory that their pointers lead to.
pub(super) struct CheckedOptions<'a> {
    pub(super) options: Options,
    pub(super) sequences: CheckedSequences<'a>,
    tensors: ScoreTensors,
    slopes: &'a [f32],
    sinks: &'a [f32],
    open: CheckedOpenSets<'a>,
}

impl<'a> CheckedOptions<'a> {
    /// # Safety
    /// The options, and what their pointers lead to, are as `flashtile_attention` requires, for `'a`.
    pub(super) unsafe fn new(options: *const Options) -> Result<Self, Failure> {
        // SAFETY: the caller's promise, here and below.
        let options = unsafe { Options::read(options)? };
        // SAFETY: as above.
        let sequences = unsafe { options.sequences()? };
        // SAFETY: as above.
        let tensors = unsafe { ScoreTensors::new(&options)? };
        // SAFETY: as above.
        let (slopes, sinks, open) = unsafe { (options.slopes()?, options.sinks()?, options.open_sets()?) };
        Ok(CheckedOptions { options, sequences, tensors, slopes, sinks, open })
    }

    /// Queries, keys and values. With a cache, keys and values are its.
    ///
    /// # Safety
    /// As [`CheckedTensor::of_heads`], of each tensor, and as [`CheckedView::new`], of the cache.
    pub(super) unsafe fn inputs<'c>(
        &self,
        [q, k, v]: [*const Tensor; 3],
        lists: &'c mut CacheLists,
        purpose: Purpose,
    ) -> Result<Inputs<'c>, Failure>
    where
        'a: 'c,
    {
        let (packed_q, packed_kv) = (self.sequences.has_packed_queries(), self.sequences.has_packed_keys());
        // SAFETY: the caller's promise, here and below.
        let q = unsafe { CheckedTensor::of_heads("queries", q, packed_q)? };
        if self.options.cache.is_null() {
            if k.is_null() {
                let message = "the pointer to the keys is null, and the option cache is not set";
                return Err(Failure::new(Code::NullPointer, message));
            }
            // SAFETY: as above.
            let (k, v) = unsafe {
                (CheckedTensor::of_heads("keys", k, packed_kv)?, CheckedTensor::of_heads("values", v, packed_kv)?)
            };
            return Ok(Inputs { tensors: [q, k, v], places: self.sequences.places(), listed: &[] });
        }
        if !k.is_null() || !v.is_null() {
            return Err(Failure::option(
                "keys or values are given beside a cache, which has its own: pass NULL for k and v",
            ));
        }
        // SAFETY: as above.
        let view = unsafe { CheckedView::new(self.options.cache)? };
        view.check_chosen(&q)?;
        self.sequences.check_padding(&view)?;
        let ([k, v], places) = view.keys_values(lists, purpose)?;
        Ok(Inputs { tensors: [q, k, v], places, listed: view.sequences })
    }

    /// The masks by rule, the score tables and the score function, for these queries and keys.
    ///
    /// # Safety
    /// The score function is as `flashtile_attention` requires, while the result lives.
    pub(super) unsafe fn open_sets(&self, inputs: &Inputs<'_>) -> Result<OpenSets<'a>, Failure> {
        let [q, k, _] = &inputs.tensors;
        let longest = self.sequences.check([q, k], inputs.places)?;
        // SAFETY: the caller's promise.
        unsafe { OpenSets::new(&self.options, &self.open, longest, q.shape()[1]) }
    }

    /// The attention of these options.
    ///
    /// # Safety
    /// What the options lead to is readable and not written to during `'b`.
    pub(super) unsafe fn attention<'b>(
        &self,
        lists: &'b mut Lists,
        open: &'b OpenSets<'a>,
    ) -> Result<Attention<'b>, Failure>
    where
        'a: 'b,
    {
        // SAFETY: the caller's promise.
        unsafe { self.options.attention(lists, &self.tensors, &self.sequences, open) }
    }

    /// The problem of this attention, which is of these options.
    ///
    /// # Safety
    /// The memory of the inputs is readable and not written to during `'t`.
    pub(super) unsafe fn problem<'t>(
        &'t self,
        attention: &'t Attention<'_>,
        inputs: Inputs<'t>,
    ) -> Result<Problem<'t>, Failure> {
        // SAFETY: the caller's promise.
        let tensors = unsafe { inputs.any()? };
        Ok(Problem::of_any(&attention.options, tensors, (attention.options.query_starts, inputs.places))?)
    }

    /// Reads the outputs, and refuses those that share memory with an input, a list, or each other.
    ///
    /// # Safety
    /// As [`CheckedTensor::new`], of both.
    pub(super) unsafe fn outputs(
        &self,
        inputs: &Inputs<'_>,
        out: *const Tensor,
        lse: *const Tensor,
    ) -> Result<(CheckedTensor, Option<CheckedTensor>), Failure> {
        // SAFETY: the caller's promise, here and below.
        let out = unsafe { CheckedTensor::of_heads("output", out, self.sequences.has_packed_queries())? };
        // SAFETY: as above.
        let lse = unsafe { (!lse.is_null()).then(|| CheckedTensor::new("lse", lse, F32, 3..=3)).transpose()? };
        lse.iter().chain([&out]).try_for_each(|written| self.check_disjoint(inputs, written))?;
        lse.as_ref().map_or(Ok(()), |lse| lse.check_disjoint(&out))?;
        Ok((out, lse))
    }

    /// Reads the log-sum-exps, which are an input, and the output of sums. Refuses sums that share memory with an input or a list.
    ///
    /// # Safety
    /// As [`CheckedTensor::new`], of both.
    pub(super) unsafe fn lse_and_sums(
        &self,
        inputs: &Inputs<'_>,
        lse: *const Tensor,
        sums: *const Tensor,
    ) -> Result<(CheckedTensor, CheckedTensor), Failure> {
        // SAFETY: the caller's promise.
        let (lse, sums) =
            unsafe { (CheckedTensor::new("lse", lse, F32, 3..=3)?, CheckedTensor::new("sums", sums, F32, 3..=3)?) };
        self.check_disjoint(inputs, &sums)?;
        sums.check_disjoint(&lse)?;
        Ok((lse, sums))
    }

    /// Refuses an output that shares memory with an input or a list.
    fn check_disjoint(&self, inputs: &Inputs<'_>, written: &CheckedTensor) -> Result<(), Failure> {
        let mut read = inputs.tensors.iter().chain(&self.tensors.mask).chain(&self.tensors.bias);
        read.try_for_each(|input| written.check_disjoint(input))?;
        written.check_disjoint_from_list("sequences of the cache view", inputs.listed)?;
        written.check_disjoint_from_list("ALiBi slopes", self.slopes)?;
        written.check_disjoint_from_list("sinks", self.sinks)?;
        self.open.check_disjoint(written)?;
        self.sequences.check_disjoint(written)
    }
}
