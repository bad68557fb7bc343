//! The C interface. `src/capi/flashtile.h` declares and documents it.
//!
//! ```sh
//! cargo rustc --release --lib --features capi --crate-type cdylib    # target/release/libflashtile.so
//! ```
//!
//! Each function checks the descriptions that it gets by pointer, and makes tensors and an [`Attention`](crate::Attention) of
//! them. A failure is returned as a [`Code`], with a message. The caller guarantees the validity of memory; everything else is
//! checked here. No panic unwinds into C.
//!
//! Rust programs call these functions only to test them.

mod c_cache;
mod c_cache_view;
mod c_call;
mod c_losses;
mod c_mask;
mod c_masked_softmax;
mod c_options;
mod c_prepared;
mod c_rotary;
mod c_score_table;
mod c_sequences;
mod c_tensor;
mod failure;
mod handle;
#[cfg(not(feature = "rayon"))]
#[path = "capi/no_pools.rs"]
mod pools;
#[cfg(feature = "rayon")]
mod pools;
mod score_row;
mod softmax_call;
mod thread_count;

pub use c_cache::{
    Cache, CacheFormat, CacheInfo, flashtile_cache_append, flashtile_cache_append_to, flashtile_cache_clear,
    flashtile_cache_fork, flashtile_cache_fork_to, flashtile_cache_free, flashtile_cache_get_info,
    flashtile_cache_length, flashtile_cache_memory, flashtile_cache_new, flashtile_cache_new_paged,
    flashtile_cache_new_rotating, flashtile_cache_new_sequence, flashtile_cache_pages, flashtile_cache_remove,
    flashtile_cache_reserve, flashtile_cache_truncate, flashtile_cache_write, flashtile_cache_written,
};
pub use c_cache_view::CacheView;
pub use c_losses::{
    CrossEntropyOptions, flashtile_cross_entropy, flashtile_cross_entropy_backward, flashtile_logsumexp,
    flashtile_masked_logsumexp,
};
pub use c_mask::Mask;
pub use c_masked_softmax::{flashtile_masked_log_softmax, flashtile_masked_softmax};
pub use c_options::{Options, flags};
pub use c_prepared::{
    PreparedStep, flashtile_prepare, flashtile_prepared_free, flashtile_prepared_replan, flashtile_prepared_run,
};
pub use c_rotary::{
    Rotation, flashtile_rotary_free, flashtile_rotary_from_frequencies, flashtile_rotary_from_tables,
    flashtile_rotary_new, flashtile_rotate,
};
pub use c_score_table::ScoreTable;
pub use c_sequences::PageTable;
pub use c_tensor::Tensor;
pub use failure::Code;
pub use score_row::{Row, ScoreRow};

use crate::call::KeySumsCall;
use crate::element::{bf16, f16};
use crate::level::Level;
use crate::problem::Problem;
use crate::softmax::Number;
use crate::tensor::{TensorMut, TensorRef};
use c_cache_view::Purpose;
use c_call::{CheckedOptions, ThreadScratch, free_scratch, with_scratch};
use c_tensor::{CheckedTensor, F32, NUMBERS, Type, axis_of, check_pointer};
use failure::{Failure, guarded};
use softmax_call::{SoftmaxCall, SoftmaxOperands};
use std::ffi::{CString, c_char};
use std::sync::OnceLock;

/// Attention: `flashtile_attention` of the header.
///
/// # Safety
/// * each pointer is null or leads to a value of its type, with all elements that counts, shapes and strides reach
/// * during the call, nothing else writes to any of it, and nothing else reads `out` and `lse`
/// * the score function may be called from any thread and from several at once, with its context; it changes only the scores that
///   it is given, and does not unwind
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_attention(
    q: *const Tensor,
    k: *const Tensor,
    v: *const Tensor,
    out: *const Tensor,
    lse: *const Tensor,
    options: *const Options,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| with_scratch(|scratch| unsafe { attention(scratch, [q, k, v], out, lse, options) }))
}

/// # Safety
/// As [`flashtile_attention`].
unsafe fn attention(
    scratch: &mut ThreadScratch,
    qkv: [*const Tensor; 3],
    out: *const Tensor,
    lse: *const Tensor,
    options: *const Options,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let checked = unsafe { CheckedOptions::new(options)? };
    let ThreadScratch { workspace, lists, cached } = scratch;
    // SAFETY: as above.
    let inputs = unsafe { checked.inputs(qkv, cached, Purpose::Run)? };
    // SAFETY: as above.
    let (out, lse) = unsafe { checked.outputs(&inputs, out, lse)? };

    // SAFETY: as above.
    let open = unsafe { checked.open_sets(&inputs)? };
    // SAFETY: as above.
    let attention = unsafe { checked.attention(lists, &open)? };
    // SAFETY: as above; `out` and `lse` are disjoint from the inputs (checked).
    let problem = unsafe { checked.problem(&attention, inputs)? };
    // SAFETY: as above; the two outputs are disjoint (checked).
    let lse = lse.map(|lse| unsafe { lse.lse_mut() }).transpose()?;
    // SAFETY: as above.
    let call = attention.call(problem, unsafe { out.output()? }, lse.into())?;
    pools::run_on(checked.options.threads, call.is_parallel(), || call.run(workspace))
}

/// Sums of each key's probabilities: `flashtile_key_sums` of the header.
///
/// # Safety
/// As [`flashtile_attention`]; `lse` is read, and `sums` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_key_sums(
    q: *const Tensor,
    k: *const Tensor,
    v: *const Tensor,
    lse: *const Tensor,
    sums: *const Tensor,
    options: *const Options,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| with_scratch(|scratch| unsafe { key_sums(scratch, [q, k, v], lse, sums, options) }))
}

/// # Safety
/// As [`flashtile_key_sums`].
unsafe fn key_sums(
    scratch: &mut ThreadScratch,
    qkv: [*const Tensor; 3],
    lse: *const Tensor,
    sums: *const Tensor,
    options: *const Options,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let checked = unsafe { CheckedOptions::new(options)? };
    let ThreadScratch { workspace, lists, cached } = scratch;
    // SAFETY: as above.
    let inputs = unsafe { checked.inputs(qkv, cached, Purpose::Run)? };
    // SAFETY: as above.
    let (lse, sums) = unsafe { checked.lse_and_sums(&inputs, lse, sums)? };

    // SAFETY: as above.
    let open = unsafe { checked.open_sets(&inputs)? };
    // SAFETY: as above.
    let attention = unsafe { checked.attention(lists, &open)? };
    // SAFETY: as above; `sums` is disjoint from the inputs (checked).
    let problem = unsafe { checked.problem(&attention, inputs)? }.without_values();
    let plan = attention.plan_for(&problem)?;
    // SAFETY: as above.
    let call = KeySumsCall::new(problem, plan, unsafe { lse.lse()? }, unsafe { sums.lse_mut()? })?;
    pools::run_on(checked.options.threads, call.is_parallel(), || call.run(workspace))
}

/// The plan of a call, as text: `flashtile_plan` of the header.
///
/// # Safety
/// * as [`flashtile_attention`], except that no element of q, k and v is read
/// * `text` is null or leads to `capacity` bytes, and `length` is null or leads to a size
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_plan(
    q: *const Tensor,
    k: *const Tensor,
    v: *const Tensor,
    options: *const Options,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        let plan = with_scratch(|scratch| unsafe { plan(scratch, [q, k, v], options) })?;
        // SAFETY: as above.
        unsafe { write_text(&plan, text, capacity, length) }
    })
}

/// # Safety
/// As [`flashtile_plan`].
unsafe fn plan(
    scratch: &mut ThreadScratch,
    qkv: [*const Tensor; 3],
    options: *const Options,
) -> Result<String, Failure> {
    // SAFETY: the caller's promise, here and below.
    let checked = unsafe { CheckedOptions::new(options)? };
    let ThreadScratch { lists, cached, .. } = scratch;
    // SAFETY: as above.
    let inputs = unsafe { checked.inputs(qkv, cached, Purpose::Plan)? };
    // SAFETY: as above.
    let open = unsafe { checked.open_sets(&inputs)? };
    // SAFETY: as above.
    let attention = unsafe { checked.attention(lists, &open)? };
    let [q, k, v] = inputs.tensors;
    // The shapes alone: C may pass any pointers.
    let shapes = [q.type_and_shape()?, k.type_and_shape()?, v.type_and_shape()?];
    let problem = Problem::of_shapes(&attention.options, shapes, (attention.options.query_starts, inputs.places))?;
    Ok(attention.plan_for(&problem)?.to_string())
}

/// Writes `from` up to the capacity, and a zero after it.
///
/// # Safety
/// `to` is null or leads to `capacity` bytes, `length` is null or leads to a size.
unsafe fn write_text(from: &str, to: *mut c_char, capacity: usize, length: *mut usize) -> Result<(), Failure> {
    // Both pointers are checked before either is written to.
    if capacity > 0 {
        check_pointer("text", to)?;
    }
    if !length.is_null() {
        check_pointer("length", length)?;
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { length.write(from.len()) };
    }
    if capacity == 0 {
        return Ok(());
    }
    let fits = from.len().min(capacity - 1);
    // SAFETY: `fits` bytes and a zero are at most `capacity` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(from.as_ptr().cast(), to, fits);
        to.add(fits).write(0);
    }
    Ok(())
}

/// Merges the attention over other keys into a result: `flashtile_merge` of the header.
///
/// # Safety
/// As [`flashtile_attention`]; the first two are written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_merge(
    out_a: *const Tensor,
    lse_a: *const Tensor,
    out_b: *const Tensor,
    lse_b: *const Tensor,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { merge(out_a, lse_a, out_b, lse_b) })
}

/// # Safety
/// As [`flashtile_merge`].
unsafe fn merge(
    out_a: *const Tensor,
    lse_a: *const Tensor,
    out_b: *const Tensor,
    lse_b: *const Tensor,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let [out_a, out_b] = unsafe {
        [CheckedTensor::new("output", out_a, F32, 4..=4)?, CheckedTensor::new("output to merge", out_b, F32, 4..=4)?]
    };
    // SAFETY: as above.
    let [lse_a, lse_b] = unsafe {
        [CheckedTensor::new("lse", lse_a, F32, 3..=3)?, CheckedTensor::new("lse to merge", lse_b, F32, 3..=3)?]
    };
    for (written, other) in [(&out_a, &lse_a), (&out_a, &out_b), (&out_a, &lse_b), (&lse_a, &out_b), (&lse_a, &lse_b)] {
        written.check_disjoint(other)?;
    }
    // SAFETY: as above; the written tensors are disjoint from all others (checked).
    let (out_a, lse_a) = unsafe { (TensorMut { strided: out_a.f32s_mut()? }, lse_a.lse_mut()?) };
    // SAFETY: as above.
    let (out_b, lse_b) = unsafe { (TensorRef::new(out_b.f32s()?), lse_b.lse()?) };
    Ok(crate::merge::merge(out_a, lse_a, out_b, lse_b)?)
}

/// Softmax along an axis: `flashtile_softmax` of the header.
///
/// # Safety
/// As [`flashtile_attention`]; `out` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_softmax(x: *const Tensor, out: *const Tensor, axis: i32, scale: f64) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { along_axis(None, ("input", x), ("output", out), axis, scale, false) })
}

/// log_softmax: `flashtile_log_softmax` of the header.
///
/// # Safety
/// As [`flashtile_softmax`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_log_softmax(x: *const Tensor, out: *const Tensor, axis: i32, scale: f64) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { along_axis(None, ("input", x), ("output", out), axis, scale, true) })
}

/// The gradient of softmax: `flashtile_softmax_backward` of the header.
///
/// # Safety
/// As [`flashtile_attention`]; `dx` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_softmax_backward(
    y: *const Tensor,
    dy: *const Tensor,
    dx: *const Tensor,
    axis: i32,
    scale: f64,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { along_axis(Some(y), ("gradient", dy), ("result", dx), axis, scale, false) })
}

/// The gradient of log_softmax: `flashtile_log_softmax_backward` of the header.
///
/// # Safety
/// As [`flashtile_softmax_backward`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_log_softmax_backward(
    y: *const Tensor,
    dy: *const Tensor,
    dx: *const Tensor,
    axis: i32,
    scale: f64,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { along_axis(Some(y), ("gradient", dy), ("result", dx), axis, scale, true) })
}

/// # Safety
/// As [`flashtile_attention`]; the last tensor is written.
unsafe fn along_axis(
    y: Option<*const Tensor>,
    (from_name, from): (&'static str, *const Tensor),
    (out_name, out): (&'static str, *const Tensor),
    axis: i32,
    scale: f64,
    log: bool,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let [from, out] = unsafe {
        [CheckedTensor::new(from_name, from, NUMBERS, 1..=4)?, CheckedTensor::new(out_name, out, NUMBERS, 1..=4)?]
    };
    // SAFETY: as above.
    let y = y.map(|y| unsafe { CheckedTensor::new("forward result", y, NUMBERS, 1..=4) }).transpose()?;
    // Half types may give f32.
    let is_wide = y.is_none() && out.dtype() == Type::F32 && matches!(from.dtype(), Type::F16 | Type::Bf16);
    if !is_wide {
        out.check_type_of(&from)?;
    }
    out.check_shape_of(&from)?;
    if let Some(y) = &y {
        y.check_type_of(&from)?;
        y.check_shape_of(&from)?;
    }
    y.as_ref().map_or(Ok(()), |y| out.check_disjoint(y))?;
    let from = if from.is_same(&out) { None } else { Some(from) };
    from.as_ref().map_or(Ok(()), |from| out.check_disjoint(from))?;
    let call = SoftmaxCall { axis: 4 - out.rank() + axis_of(axis, out.rank())?, scale, log };
    // SAFETY: as above; `out` is disjoint from `y` and `from` (checked). An input that is `out` itself is `None`.
    unsafe {
        match from.map(|from| (is_wide, from.dtype(), from)) {
            Some((true, Type::F16, from)) => return call.run_converted::<f16, f32>(from.strided(), out.strided_mut()?),
            Some((true, _, from)) => return call.run_converted::<bf16, f32>(from.strided(), out.strided_mut()?),
            _ => {}
        }
        match out.dtype() {
            Type::F32 => call.run(operands::<f32>(y, from, out)?),
            Type::F16 => call.run(operands::<f16>(y, from, out)?),
            Type::Bf16 => call.run(operands::<bf16>(y, from, out)?),
            Type::F64 => call.run(operands::<f64>(y, from, out)?),
            Type::Byte => Err(out.unsupported()),
        }
    }
}

/// # Safety
/// `T` is the type of all three; the rest as for [`flashtile_attention`], and `out` is disjoint from the others.
unsafe fn operands<'a, T: Number>(
    y: Option<CheckedTensor>,
    from: Option<CheckedTensor>,
    out: CheckedTensor,
) -> Result<SoftmaxOperands<'a, T>, Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        Ok(SoftmaxOperands {
            y: y.map(|y| y.strided()),
            from: from.map(|from| from.strided()),
            out: out.strided_mut()?,
        })
    }
}

/// The message of the last failure on this thread: `flashtile_last_error` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn flashtile_last_error() -> *const c_char {
    failure::last_message()
}

/// The version of the library: `flashtile_version` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn flashtile_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The best level of this processor: `flashtile_level` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn flashtile_level() -> *const c_char {
    static NAME: OnceLock<CString> = OnceLock::new();
    NAME.get_or_init(|| CString::new(Level::best().to_string()).unwrap_or_default()).as_ptr()
}

/// The number of threads of `threads = 0`: `flashtile_default_threads` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn flashtile_default_threads() -> i32 {
    // At most `MAX_THREADS`.
    i32::try_from(thread_count::default_threads()).unwrap_or(1)
}

/// Frees scratch memory and ends threads: `flashtile_release` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn flashtile_release() {
    guarded(|| {
        free_scratch();
        pools::release();
        Ok(())
    });
}
