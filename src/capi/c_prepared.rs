//! Calls that are planned once: C's prepared steps.
//!
//! A step keeps what was read from the caller's options, so that lists and page tables are checked when it is made or planned
//! again, and not in each call.

use super::c_cache_view::{CacheLists, Purpose};
use super::c_call::{CheckedOptions, Inputs, ThreadScratch, with_scratch};
use super::c_options::{Lists, OpenSets, Options};
use super::c_tensor::Tensor;
use super::failure::{Failure, guarded};
use super::handle::{self, exclusive, shared};
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
    /// As [`flashtile_prepare`], until the result is dropped. The inputs are of this call.
    unsafe fn new<'c>(
        options: *const Options,
        qkv: [*const Tensor; 3],
        lists: &'c mut CacheLists,
    ) -> Result<(Self, Inputs<'c>), Failure> {
        // SAFETY: the caller's promise, here and below.
        let checked = unsafe { CheckedOptions::new(options)? };
        // SAFETY: as above.
        let inputs = unsafe { checked.inputs(qkv, lists, Purpose::Plan)? };
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
    let make = |lists: &mut CacheLists| {
        // SAFETY: the caller's promise, here and below.
        let (kept, inputs) = unsafe { KeptOptions::new(options, [q, k, v], lists)? };
        // SAFETY: the only call; `PreparedStep` drops the prepared attention first, and a failure drops the attention first.
        let attention = unsafe { kept.attention()? };
        // SAFETY: the caller's promise.
        let problem = unsafe { kept.get().checked.problem(&attention, inputs)? };
        let plan = attention.plan_for(&problem)?;
        let made = Prepared::new(attention.options.clone(), &problem, plan)?;
        Ok(PreparedStep { prepared: made, kept })
    };
    // SAFETY: the caller's promise.
    unsafe { handle::make("prepared step", prepared, || with_scratch(|scratch| make(&mut scratch.cached))) }
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
    let replan = |lists: &mut CacheLists| {
        // SAFETY: the caller's promise, here and below.
        let step = unsafe { exclusive("prepared step", step)? };
        // SAFETY: as above.
        let (kept, inputs) = unsafe { KeptOptions::new(options, [q, k, v], lists)? };
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
    };
    guarded(|| with_scratch(|scratch| replan(&mut scratch.cached)))
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
    let run = |ThreadScratch { workspace, cached, .. }: &mut ThreadScratch| {
        // SAFETY: the caller's promise, here and below.
        let PreparedStep { prepared, kept } = unsafe { shared("prepared step", step)? };
        let checked = &kept.get().checked;
        // SAFETY: as above.
        let inputs = unsafe { checked.inputs([q, k, v], cached, Purpose::Run)? };
        // SAFETY: as above.
        let (out, lse) = unsafe { checked.outputs(&inputs, out, lse)? };
        // SAFETY: as above; `out` and `lse` are disjoint from the inputs (checked).
        let problem = prepared.problem_of_any(unsafe { inputs.any()? }, inputs.places)?;
        // SAFETY: as above; the two outputs are disjoint (checked).
        let (out, lse) = unsafe { (out.output()?, lse.map(|lse| lse.lse_mut()).transpose()?) };
        let call = prepared.call(problem, out, lse.into())?;
        pools::run_on(checked.options.threads, call.is_parallel(), || call.run(workspace))
    };
    guarded(|| with_scratch(run))
}

/// Frees a step: `flashtile_prepared_free` of the header.
///
/// # Safety
/// `step` is null, or was made by [`flashtile_prepare`] and is not used by any call, now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_prepared_free(step: *mut PreparedStep) {
    // SAFETY: the caller's promise.
    unsafe { handle::free(step) };
}
