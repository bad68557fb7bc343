//! Calls that are planned once: C's prepared steps.
//!
//! A step keeps what was read from the caller's options, so that lists and page tables are checked when it is made or planned
//! again, and not in each call.

use super::c_call::{CheckedOptions, ThreadScratch, inputs, with_scratch};
use super::c_options::{Lists, OpenSets, Options};
use super::c_tensor::{CheckedTensor, Tensor, check_pointer};
use super::failure::{Failure, guarded};
use super::pools;
use crate::attention::Attention;
use crate::prepared::Prepared;
use std::ptr::NonNull;

/// `flashtile_prepared`: a plan with its tasks, and the options that it was made for.
pub struct PreparedStep {
    /// It borrows from `kept`, and is dropped first.
    prepared: Prepared<'static>,
    kept: KeptOptions,
}

/// What a prepared attention was made of. It stays where it is until it is dropped, so that the attention may borrow from it.
struct Kept {
    checked: CheckedOptions<'static>,
    lists: Lists,
    open: OpenSets<'static>,
}

/// An owned [`Kept`]. A box would claim that nothing borrows from it.
struct KeptOptions(NonNull<Kept>);

impl Drop for KeptOptions {
    fn drop(&mut self) {
        // SAFETY: the pointer is that of a box, and what borrowed from it is gone: see `PreparedStep`.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

impl KeptOptions {
    fn get(&self) -> &Kept {
        // SAFETY: it is valid, and after `attention` nothing writes to it.
        unsafe { self.0.as_ref() }
    }

    /// # Safety
    /// As [`flashtile_prepare`], until the result is dropped.
    unsafe fn new(options: *const Options, qkv: [*const Tensor; 3]) -> Result<(Self, [CheckedTensor; 3]), Failure> {
        // SAFETY: the caller's promise, here and below.
        let checked = unsafe { CheckedOptions::new(options)? };
        // SAFETY: as above.
        let inputs = unsafe { inputs(qkv, &checked.sequences)? };
        // SAFETY: as above.
        let open = unsafe { checked.open_sets(&inputs)? };
        let kept = Box::new(Kept { checked, lists: Lists::default(), open });
        Ok((KeptOptions(NonNull::from(Box::leak(kept))), inputs))
    }

    /// The attention, which borrows from these. It is asked for once.
    ///
    /// # Safety
    /// * the result is dropped before `self`, and this is the only call for `self`
    /// * as [`flashtile_prepare`], until then
    unsafe fn attention(&self) -> Result<Attention<'static>, Failure> {
        let kept = self.0.as_ptr();
        // SAFETY: each field is borrowed once, the lists mutably by this only call. They live until `self` is dropped.
        let (lists, open, checked) = unsafe { (&mut (*kept).lists, &(*kept).open, &(*kept).checked) };
        // SAFETY: the caller's promise.
        unsafe { checked.attention(lists, open) }
    }
}

/// Plans calls of one shape: `flashtile_prepare` of the header.
///
/// # Safety
/// * each pointer is null or leads to a value of its type, with all elements that counts, shapes and strides reach; `prepared` to a
///   pointer that is written
/// * what the pointers in the options lead to stays readable, and is not written to, until the step is planned again or freed
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_prepare(
    q: *const Tensor,
    k: *const Tensor,
    v: *const Tensor,
    options: *const Options,
    prepared: *mut *mut PreparedStep,
) -> i32 {
    guarded(|| {
        check_pointer("prepared step", prepared)?;
        // SAFETY: the caller's promise, here and below.
        let (kept, inputs) = unsafe { KeptOptions::new(options, [q, k, v])? };
        // SAFETY: the only call; `PreparedStep` drops the prepared attention first, and a failure drops the attention first.
        let attention = unsafe { kept.attention()? };
        // SAFETY: the caller's promise.
        let problem = unsafe { kept.get().checked.problem(&attention, inputs)? };
        let plan = attention.plan_for(&problem)?;
        let made = Prepared::new(attention.options.clone(), &problem, plan)?;
        let step = Box::new(PreparedStep { prepared: made, kept });
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { prepared.write(Box::into_raw(step)) };
        Ok(())
    })
}

/// Plans a step again: `flashtile_prepared_replan` of the header.
///
/// # Safety
/// As [`flashtile_prepare`]; `step` is null or was made by it and not freed, and no other call uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_prepared_replan(
    step: *mut PreparedStep,
    q: *const Tensor,
    k: *const Tensor,
    v: *const Tensor,
    options: *const Options,
) -> i32 {
    guarded(|| {
        check_pointer("prepared step", step)?;
        // SAFETY: the caller's promise, here and below.
        let step = unsafe { &mut *step };
        // SAFETY: as above.
        let (kept, inputs) = unsafe { KeptOptions::new(options, [q, k, v])? };
        // SAFETY: the only call; `kept` replaces the other one when the attention has been taken, and otherwise a failure drops the
        // attention first.
        let attention = unsafe { kept.attention()? };
        // SAFETY: the caller's promise.
        let problem = unsafe { kept.get().checked.problem(&attention, inputs)? };
        let plan = attention.plan_for(&problem)?;
        step.prepared.replace(attention.options.clone(), &problem, plan)?;
        // Nothing borrows from the options before any more.
        step.kept = kept;
        Ok(())
    })
}

/// Computes a step: `flashtile_prepared_run` of the header.
///
/// # Safety
/// As `flashtile_attention`; `step` is null or was made by [`flashtile_prepare`] and not freed, and no
/// call plans it again meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_prepared_run(
    step: *const PreparedStep,
    q: *const Tensor,
    k: *const Tensor,
    v: *const Tensor,
    out: *const Tensor,
    lse: *const Tensor,
) -> i32 {
    guarded(|| {
        check_pointer("prepared step", step)?;
        // SAFETY: the caller's promise, here and below.
        let PreparedStep { prepared, kept } = unsafe { &*step };
        let checked = &kept.get().checked;
        // SAFETY: as above.
        let inputs = unsafe { inputs([q, k, v], &checked.sequences)? };
        // SAFETY: as above.
        let (out, lse) = unsafe { checked.outputs(&inputs, out, lse)? };
        let [q, k, v] = inputs;
        // SAFETY: as above; `out` and `lse` are disjoint from the inputs (checked).
        let problem = prepared.problem_of_any(unsafe { [q.any()?, k.any()?, v.any()?] }, checked.sequences.places())?;
        // SAFETY: as above; the two outputs are disjoint (checked).
        let (out, lse) = unsafe { (out.output()?, lse.map(|lse| lse.lse_mut()).transpose()?) };
        let call = prepared.call(problem, out, lse.into())?;
        let run = |scratch: &mut ThreadScratch| {
            pools::run_on(checked.options.threads, call.is_parallel(), || call.run(&mut scratch.workspace))
        };
        with_scratch(run)
    })
}

/// Frees a step: `flashtile_prepared_free` of the header.
///
/// # Safety
/// `step` is null, or was made by [`flashtile_prepare`] and is not used by any call, now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_prepared_free(step: *mut PreparedStep) {
    if !step.is_null() {
        let free = || {
            // SAFETY: the caller's promise.
            drop(unsafe { Box::from_raw(step) });
            Ok(())
        };
        guarded(free);
    }
}
