//! The C interface: what `src/capi/flashtile.h` declares, which is also its documentation.
//!
//! ```sh
//! cargo rustc --release --lib --features capi --crate-type cdylib    # target/release/libflashtile.so
//! ```
//!
//! This is the house's outermost door: descriptions by pointer come in, are checked, become tensors and an
//! [`Attention`](crate::Attention), and what fails goes back as a [`Code`] with a message. The caller vouches for memory; all
//! else is checked here, and nothing unwinds across.
//!
//! From Rust there is no reason to call these functions, other than to test them.

mod failure;
mod options;
#[cfg(not(feature = "rayon"))]
#[path = "capi/no_pools.rs"]
mod pools;
#[cfg(feature = "rayon")]
mod pools;
mod softmax;
mod tensor;

pub use failure::Code;
pub use options::{Options, flags};
pub use tensor::Tensor;

use crate::driver::Workspace;
use crate::element::{bf16, f16};
use crate::level::Level;
use crate::problem::Problem;
use crate::softmax::Number;
use crate::tensor::{TensorMut, TensorRef};
use failure::{Failure, guarded};
use options::{Lists, ScoreTensors};
use softmax::{Job, Operands};
use std::cell::Cell;
use std::ffi::{CString, c_char};
use std::sync::OnceLock;
use tensor::{Checked, F32, FLOATS, NUMBERS, Type, check_pointer};

/// What a thread keeps between calls, so that they don't allocate.
#[derive(Debug, Default)]
struct Kept {
    workspace: Workspace,
    lists: Lists,
}

thread_local! {
    static KEPT: Cell<Option<Box<Kept>>> = const { Cell::new(None) };
}

/// Takes what the thread keeps for as long as `work` runs: a call from within another finds nothing, and one that panics
/// leaves nothing half done.
fn with_kept<R>(work: impl FnOnce(&mut Kept) -> R) -> R {
    let mut kept = KEPT.try_with(Cell::take).ok().flatten().unwrap_or_default();
    let result = work(&mut kept);
    let _ = KEPT.try_with(|cell| cell.set(Some(kept)));
    result
}

/// Queries, keys and values.
///
/// # Safety
/// As [`Checked::new`], of each.
unsafe fn inputs(q: *const Tensor, k: *const Tensor, v: *const Tensor) -> Result<[Checked; 3], Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        Ok([
            Checked::new("queries", q, FLOATS, 4..=4)?,
            Checked::new("keys", k, FLOATS, 4..=4)?,
            Checked::new("values", v, FLOATS, 4..=4)?,
        ])
    }
}

/// Attention: `flashtile_attention` of the header.
///
/// # Safety
/// * each pointer is null or leads to what its type says, with as many elements as counts, shapes and strides reach
/// * for the time of the call nobody writes to any of it, and nobody reads what is written: `out` and `lse`
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
    guarded(|| with_kept(|kept| unsafe { attention(kept, [q, k, v], out, lse, options) }))
}

/// # Safety
/// As [`flashtile_attention`].
unsafe fn attention(
    kept: &mut Kept,
    [q, k, v]: [*const Tensor; 3],
    out: *const Tensor,
    lse: *const Tensor,
    options: *const Options,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let (inputs, out) = unsafe { (inputs(q, k, v)?, Checked::new("output", out, FLOATS, 4..=4)?) };
    // SAFETY: as above.
    let lse = unsafe { (!lse.is_null()).then(|| Checked::new("lse", lse, F32, 3..=3)).transpose()? };
    // SAFETY: as above.
    let options = unsafe { Options::read(options)? };
    // SAFETY: as above.
    let tensors = unsafe { ScoreTensors::new(&options)? };
    // SAFETY: as above.
    let slopes = unsafe { options.slopes()? };
    let read = || inputs.iter().chain(&tensors.mask).chain(&tensors.bias);
    for written in lse.iter().chain([&out]) {
        read().try_for_each(|input| written.check_apart(input))?;
        written.check_apart_from_list("ALiBi slopes", slopes)?;
    }
    lse.as_ref().map_or(Ok(()), |lse| lse.check_apart(&out))?;

    let Kept { workspace, lists } = kept;
    // SAFETY: as above.
    let attention = unsafe { options.attention(lists, &tensors)? };
    let [q, k, v] = inputs;
    // SAFETY: as above; nothing that is written meets what is read.
    let problem = Problem::of_any(&attention.options, unsafe { [q.any()?, k.any()?, v.any()?] })?;
    // SAFETY: as above, and the two outputs don't meet.
    let lse = lse.map(|lse| unsafe { lse.lse_mut() }).transpose()?;
    // SAFETY: as above.
    let call = attention.call(problem, unsafe { out.output()? }, lse.into())?;
    pools::run_on(options.threads, call.is_parallel(), || call.run(workspace))
}

/// How a call would be carried out: `flashtile_plan` of the header.
///
/// # Safety
/// * as [`flashtile_attention`], but that no element of q, k and v is looked at
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
        let plan = with_kept(|kept| unsafe { plan(kept, [q, k, v], options) })?;
        // SAFETY: as above.
        unsafe { write_text(&plan, text, capacity, length) }
    })
}

/// # Safety
/// As [`flashtile_plan`].
unsafe fn plan(kept: &mut Kept, [q, k, v]: [*const Tensor; 3], options: *const Options) -> Result<String, Failure> {
    // SAFETY: the caller's promise, here and below.
    let ([q, k, v], options) = unsafe { (inputs(q, k, v)?, Options::read(options)?) };
    // SAFETY: as above.
    let tensors = unsafe { ScoreTensors::new(&options)? };
    // SAFETY: as above.
    let attention = unsafe { options.attention(&mut kept.lists, &tensors)? };
    // SAFETY: as above; a plan goes by the shapes.
    let problem = Problem::of_any(&attention.options, unsafe { [q.any()?, k.any()?, v.any()?] })?;
    Ok(attention.plan_for(&problem)?.to_string())
}

/// Writes as much of `from` as fits, and a zero behind it.
///
/// # Safety
/// `to` is null or leads to `capacity` bytes, `length` is null or leads to a size.
unsafe fn write_text(from: &str, to: *mut c_char, capacity: usize, length: *mut usize) -> Result<(), Failure> {
    // Both are looked at before either is written to.
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
    // SAFETY: `fits` bytes and a zero are no more than `capacity`.
    unsafe {
        std::ptr::copy_nonoverlapping(from.as_ptr().cast(), to, fits);
        to.add(fits).write(0);
    }
    Ok(())
}

/// Folds the attention over other keys into a result: `flashtile_merge` of the header.
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
    let [out_a, out_b] =
        unsafe { [Checked::new("output", out_a, F32, 4..=4)?, Checked::new("output to merge", out_b, F32, 4..=4)?] };
    // SAFETY: as above.
    let [lse_a, lse_b] =
        unsafe { [Checked::new("lse", lse_a, F32, 3..=3)?, Checked::new("lse to merge", lse_b, F32, 3..=3)?] };
    for (written, other) in [(&out_a, &lse_a), (&out_a, &out_b), (&out_a, &lse_b), (&lse_a, &out_b), (&lse_a, &lse_b)] {
        written.check_apart(other)?;
    }
    // SAFETY: as above, and what is written meets nothing else.
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

/// The logarithm of the softmax: `flashtile_log_softmax` of the header.
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
    let [from, out] =
        unsafe { [Checked::new(from_name, from, NUMBERS, 1..=4)?, Checked::new(out_name, out, NUMBERS, 1..=4)?] };
    // SAFETY: as above.
    let y = y.map(|y| unsafe { Checked::new("forward result", y, NUMBERS, 1..=4) }).transpose()?;
    for other in [&out].into_iter().chain(&y) {
        other.check_type_of(&from)?;
        other.check_shape_of(&from)?;
    }
    y.as_ref().map_or(Ok(()), |y| out.check_apart(y))?;
    let from = if from.is(&out) { None } else { Some(from) };
    from.as_ref().map_or(Ok(()), |from| out.check_apart(from))?;
    let job = Job { axis: 4 - out.rank() + axis_of(axis, out.rank())?, scale, log };
    // SAFETY: as above; what is written meets nothing else.
    unsafe {
        match out.dtype() {
            Type::F32 => job.run(operands::<f32>(y, from, out)?),
            Type::F16 => job.run(operands::<f16>(y, from, out)?),
            Type::Bf16 => job.run(operands::<bf16>(y, from, out)?),
            Type::F64 => job.run(operands::<f64>(y, from, out)?),
            Type::Byte => Err(out.unsupported()),
        }
    }
}

/// # Safety
/// `T` is the type of all three; the rest as for [`flashtile_attention`], and `out` meets none of the others.
unsafe fn operands<'a, T: Number>(
    y: Option<Checked>,
    from: Option<Checked>,
    out: Checked,
) -> Result<Operands<'a, T>, Failure> {
    // SAFETY: the caller's promise.
    unsafe {
        Ok(Operands { y: y.map(|y| y.strided()), from: from.map(|from| from.strided()), out: out.strided_mut()? })
    }
}

/// An axis counted from 0, or from the end if below.
fn axis_of(axis: i32, rank: usize) -> Result<usize, Failure> {
    let counted = if axis < 0 { axis as i64 + rank as i64 } else { axis as i64 };
    let message =
        || format!("axis {axis} was asked for but the tensor has {rank}, counted from 0, or from -1 at the end");
    let fits = usize::try_from(counted).ok().filter(|&axis| axis < rank);
    fits.ok_or_else(|| Failure::new(Code::AxisOutOfRange, message()))
}

/// What the last failure on this thread was about: `flashtile_last_error` of the header.
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

/// Threads of `threads = 0`: `flashtile_default_threads` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn flashtile_default_threads() -> i32 {
    // (At most `MAX_THREADS`.)
    i32::try_from(pools::default_threads()).unwrap_or(1)
}

/// Gives memory and threads back: `flashtile_release` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn flashtile_release() {
    guarded(|| {
        drop(KEPT.try_with(Cell::take));
        pools::release();
        Ok(())
    });
}
