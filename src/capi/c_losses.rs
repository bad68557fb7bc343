//! logsumexp and cross-entropy for C.

use super::c_masked_softmax::ScoreOptions;
use super::c_tensor::{CheckedTensor, NUMBERS, Tensor, Type, axis_of, check_pointer, list};
use super::failure::{Code, Failure, guarded};
use super::pools;
use crate::element::{bf16, f16};
use crate::softmax::{Axis, CrossEntropy, Number, Reduction, Softmax, is_parallel};
use crate::tensor::TensorRef;
use crate::tensor::strided::{Strided, StridedMut};
use std::ptr::null;

/// `flashtile_cross_entropy_options`. All zero is the mean, without smoothing, weights and ignored targets.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CrossEntropyOptions {
    /// The options that are set: 1 for `ignore_index`.
    pub flags: u32,
    /// 0: mean; 1: sum; 2: none.
    pub reduction: i32,
    /// A target that is ignored.
    pub ignore_index: i64,
    /// The share of the loss that is spread over all classes.
    pub label_smoothing: f64,
    /// The weight of each class.
    pub class_weights: *const f32,
    /// The number of entries of `class_weights`.
    pub class_weight_count: i64,
    /// Must be 0.
    pub reserved: [i64; 2],
}

/// The flag of [`CrossEntropyOptions::ignore_index`].
const IGNORE_INDEX: u32 = 1;

impl CrossEntropyOptions {
    /// Reads the caller's struct, with its list.
    ///
    /// # Safety
    /// `options` is null, misaligned, or leads to a struct; its list is as for [`list`].
    unsafe fn read<'a>(options: *const CrossEntropyOptions) -> Result<CrossEntropy<'a>, Failure> {
        if options.is_null() {
            return Ok(CrossEntropy::new());
        }
        check_pointer("options", options)?;
        // SAFETY: neither null nor misaligned, so by the caller's promise it may be read.
        let options = unsafe { options.read() };
        if options.flags & !IGNORE_INDEX != 0 {
            return Err(Failure::option(format!("flags are {:#x}, of which 0x1 is known", options.flags)));
        }
        if options.reserved != [0; 2] {
            return Err(Failure::option("reserved is not 0"));
        }
        let mut cross_entropy = CrossEntropy::new().label_smoothing(options.label_smoothing);
        cross_entropy = cross_entropy.reduction(match options.reduction {
            0 => Reduction::Mean,
            1 => Reduction::Sum,
            2 => Reduction::None,
            other => return Err(Failure::option(format!("reduction is {other} but must be 0, 1 or 2"))),
        });
        if options.flags & IGNORE_INDEX != 0 {
            cross_entropy = cross_entropy.ignore_index(options.ignore_index);
        } else if options.ignore_index != 0 {
            let message = "ignore_index is set but has no effect without the flag FLASHTILE_IGNORE_INDEX";
            return Err(Failure::option(message));
        }
        if !options.class_weights.is_null() || options.class_weight_count != 0 {
            // SAFETY: the caller's promise.
            let weights = unsafe { list("class weights", options.class_weights, options.class_weight_count)? };
            cross_entropy = cross_entropy.class_weights(weights);
        }
        Ok(cross_entropy)
    }
}

/// log(sum(exp(scale * x))) along an axis: `flashtile_logsumexp` of the header.
///
/// # Safety
/// As [`flashtile_attention`](super::flashtile_attention); `out` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_logsumexp(x: *const Tensor, out: *const Tensor, axis: i32, scale: f64) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { logsumexp(x, out, ScoreOptions::new(null(), null())?, axis, scale) })
}

/// The same of the visible elements: `flashtile_masked_logsumexp` of the header.
///
/// # Safety
/// As [`flashtile_logsumexp`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_masked_logsumexp(
    x: *const Tensor,
    out: *const Tensor,
    mask: *const Tensor,
    bias: *const Tensor,
    axis: i32,
    scale: f64,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { logsumexp(x, out, ScoreOptions::new(mask, bias)?, axis, scale) })
}

/// # Safety
/// As [`flashtile_logsumexp`].
unsafe fn logsumexp(
    x: *const Tensor,
    out: *const Tensor,
    options: ScoreOptions,
    axis: i32,
    scale: f64,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let [x, out] = unsafe {
        [CheckedTensor::new("input", x, NUMBERS, 1..=4)?, CheckedTensor::new("output", out, NUMBERS, 1..=4)?]
    };
    let axis = 4 - x.rank() + axis_of(axis, x.rank())?;
    out.check_shape(x.rank(), without_axis(x.shape(), axis), "that of the input, but 1 along the axis")?;
    out.check_disjoint(&x)?;
    options.check_disjoint(&out)?;
    out.check_type(type_of_results(&x))?;
    // SAFETY: as above.
    let softmax = unsafe { options.softmax(axis, scale)? };
    // SAFETY: as above; `out` is disjoint from the inputs, and has the type of its results (checked).
    unsafe {
        match x.dtype() {
            Type::F32 => fill_lse::<f32>(&softmax, axis, x.strided(), out.strided_mut()?),
            Type::F16 => fill_lse::<f16>(&softmax, axis, x.strided(), out.strided_mut()?),
            Type::Bf16 => fill_lse::<bf16>(&softmax, axis, x.strided(), out.strided_mut()?),
            Type::F64 => fill_lse::<f64>(&softmax, axis, x.strided(), out.strided_mut()?),
            Type::Byte => Err(x.unsupported()),
        }
    }
}

/// f64 for f64, f32 for the other types.
fn type_of_results(x: &CheckedTensor) -> Type {
    if x.dtype() == Type::F64 { Type::F64 } else { Type::F32 }
}

fn fill_lse<T: Number>(
    softmax: &Softmax<'_>,
    axis: usize,
    x: Strided<'_, T, 4>,
    mut out: StridedMut<'_, T::Real, 4>,
) -> Result<(), Failure>
where
    T::Real: Number<Real = T::Real>,
{
    let dense = Axis::new(x.shape(), axis)?;
    let mut lse = buffer(dense.lines())?;
    on_threads(dense, || Ok(softmax.logsumexp_into(TensorRef::new(x), &mut lse)?))?;
    fill(&mut out, &lse);
    Ok(())
}

/// The cross-entropy loss: `flashtile_cross_entropy` of the header.
///
/// # Safety
/// As [`flashtile_attention`](super::flashtile_attention); `loss` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cross_entropy(
    logits: *const Tensor,
    targets: *const i64,
    target_count: i64,
    loss: *const Tensor,
    axis: i32,
    options: *const CrossEntropyOptions,
) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise, here and below.
        let call = unsafe { LossCall::new((logits, axis), (targets, target_count), ("loss", loss), options)? };
        call.loss.check_disjoint(&call.logits)?;
        call.check_disjoint(&call.loss)?;
        // SAFETY: as above; the loss is disjoint from the rest (checked), and its type is that of the losses.
        unsafe {
            match call.logits.dtype() {
                Type::F32 => call.fill_loss::<f32>(),
                Type::F16 => call.fill_loss::<f16>(),
                Type::Bf16 => call.fill_loss::<bf16>(),
                Type::F64 => call.fill_loss::<f64>(),
                Type::Byte => Err(call.logits.unsupported()),
            }
        }
    })
}

/// The gradient of the cross-entropy loss: `flashtile_cross_entropy_backward` of the header.
///
/// # Safety
/// As [`flashtile_attention`](super::flashtile_attention); `gradient` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cross_entropy_backward(
    logits: *const Tensor,
    targets: *const i64,
    target_count: i64,
    upstream: *const Tensor,
    gradient: *const Tensor,
    axis: i32,
    options: *const CrossEntropyOptions,
) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise, here and below.
        let call = unsafe {
            LossCall::new((logits, axis), (targets, target_count), ("upstream gradient", upstream), options)?
        };
        // SAFETY: as above.
        let gradient = unsafe { CheckedTensor::new("gradient", gradient, NUMBERS, 1..=4)? };
        gradient.check_type_of(&call.logits)?;
        gradient.check_shape_of(&call.logits)?;
        gradient.check_disjoint(&call.logits)?;
        gradient.check_disjoint(&call.loss)?;
        call.check_disjoint(&gradient)?;
        // SAFETY: as above; the gradient is disjoint from the rest (checked), and has the type of the logits.
        unsafe {
            match call.logits.dtype() {
                Type::F32 => call.fill_gradient::<f32>(gradient.strided_mut()?),
                Type::F16 => call.fill_gradient::<f16>(gradient.strided_mut()?),
                Type::Bf16 => call.fill_gradient::<bf16>(gradient.strided_mut()?),
                Type::F64 => call.fill_gradient::<f64>(gradient.strided_mut()?),
                Type::Byte => Err(call.logits.unsupported()),
            }
        }
    })
}

/// Logits with targets and options, and the tensor of losses, or of their gradients.
struct LossCall<'a> {
    logits: CheckedTensor,
    /// The number of the classes' axis, of four.
    axis: usize,
    targets: &'a [i64],
    loss: CheckedTensor,
    options: CrossEntropy<'a>,
}

impl<'a> LossCall<'a> {
    /// # Safety
    /// As [`flashtile_cross_entropy`].
    unsafe fn new(
        (logits, axis): (*const Tensor, i32),
        (targets, target_count): (*const i64, i64),
        (name, loss): (&'static str, *const Tensor),
        options: *const CrossEntropyOptions,
    ) -> Result<Self, Failure> {
        // SAFETY: the caller's promise, here and below.
        let [logits, loss] = unsafe {
            [CheckedTensor::new("logits", logits, NUMBERS, 1..=4)?, CheckedTensor::new(name, loss, NUMBERS, 1..=4)?]
        };
        // SAFETY: as above.
        let (targets, options) =
            unsafe { (list("targets", targets, target_count)?, CrossEntropyOptions::read(options)?) };
        let axis = 4 - logits.rank() + axis_of(axis, logits.rank())?;
        loss.check_type(type_of_results(&logits))?;
        if options.is_reduced() {
            loss.check_shape(loss.rank(), [1; 4], "one element")?;
        } else {
            let shape = without_axis(logits.shape(), axis);
            loss.check_shape(logits.rank(), shape, "that of the logits, but 1 along the axis")?;
        }
        Ok(LossCall { logits, axis, targets, loss, options })
    }

    /// Refuses an output that overlaps a list.
    fn check_disjoint(&self, written: &CheckedTensor) -> Result<(), Failure> {
        written.check_disjoint_from_list("targets", self.targets)?;
        written.check_disjoint_from_list("class weights", self.options.weights().unwrap_or_default())
    }

    /// # Safety
    /// `T` is the type of the logits, and `T::Real` that of the loss; the rest as for [`flashtile_cross_entropy`], and the loss is
    /// disjoint from the inputs.
    unsafe fn fill_loss<T: Number>(&self) -> Result<(), Failure> {
        // SAFETY: the caller's promise.
        let (logits, mut loss) = unsafe { (self.logits.strided::<T>(), self.loss.strided_mut::<T::Real>()?) };
        let dense = Axis::new(logits.shape(), self.axis)?;
        let call = self.options.checked(self.targets.into(), dense.lines(), dense.line_len())?;
        let mut losses = Vec::new();
        on_threads(dense, || {
            losses = call.losses(logits, self.axis)?;
            Ok(())
        })?;
        let losses: Vec<T::Real> = losses.into_iter().map(T::real).collect();
        fill(&mut loss, &losses);
        Ok(())
    }

    /// # Safety
    /// `T` is the type of the logits, and `T::Real` that of the upstream gradient; the rest as for
    /// [`flashtile_cross_entropy_backward`], and `gradient` is disjoint from the inputs.
    unsafe fn fill_gradient<T: Number>(&self, gradient: StridedMut<'_, T, 4>) -> Result<(), Failure> {
        // SAFETY: the caller's promise.
        let (logits, upstream) = unsafe { (self.logits.strided::<T>(), self.loss.strided::<T::Real>()) };
        let dense = Axis::new(logits.shape(), self.axis)?;
        let call = self.options.checked(self.targets.into(), dense.lines(), dense.line_len())?;
        let upstream: Vec<f64> = elements(&upstream).into_iter().map(T::real_to_f64).collect();
        on_threads(dense, || Ok(call.gradient(logits, self.axis, &upstream, gradient)?))
    }
}

fn without_axis(mut shape: [usize; 4], axis: usize) -> [usize; 4] {
    shape[axis] = 1;
    shape
}

/// Calls `work` on the threads of `threads = 0` if the array is worth them.
fn on_threads(axis: Axis, work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    let mut result = Ok(());
    pools::run_on(0, is_parallel(axis), || result = work())?;
    result
}

fn buffer<T: Clone + Default>(len: usize) -> Result<Vec<T>, Failure> {
    let mut buffer = Vec::new();
    let no_memory = |_| Failure::new(Code::TooLarge, "the results would not fit in memory");
    buffer.try_reserve_exact(len).map_err(no_memory)?;
    buffer.resize(len, T::default());
    Ok(buffer)
}

/// Every index of the first three axes.
fn rows(shape: [usize; 4]) -> impl Iterator<Item = [usize; 3]> {
    let [n0, n1, n2, _] = if shape.contains(&0) { [0; 4] } else { shape };
    (0..n0).flat_map(move |i0| (0..n1).flat_map(move |i1| (0..n2).map(move |i2| [i0, i1, i2])))
}

/// Writes all elements, row-major.
fn fill<T: Copy>(out: &mut StridedMut<'_, T, 4>, values: &[T]) {
    let shape = *out.as_ref().shape();
    for (index, values) in rows(shape).zip(values.chunks(shape[3].max(1))) {
        out.row_mut(index).fill_from(values.iter().copied());
    }
}

/// All elements, row-major.
fn elements<T: Copy>(from: &Strided<'_, T, 4>) -> Vec<T> {
    let mut elements = Vec::new();
    for [i0, i1, i2] in rows(*from.shape()) {
        elements.extend(from.matrix(i0, i1).row(i2).iter());
    }
    elements
}
