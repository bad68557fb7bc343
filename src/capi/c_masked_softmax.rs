//! Softmax with a mask or a bias, for C.

use super::c_tensor::{BYTES, CheckedTensor, FLOATS, NUMBERS, Tensor, Type, axis_of};
use super::failure::{Failure, guarded};
use super::pools;
use crate::element::{bf16, f16};
use crate::softmax::{Axis, Number, Softmax, is_parallel};
use crate::tensor::strided::{Strided, StridedMut};
use crate::tensor::{TensorMut, TensorRef};

/// Softmax of the visible elements: `flashtile_masked_softmax` of the header.
///
/// # Safety
/// As [`flashtile_attention`](super::flashtile_attention); `out` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_masked_softmax(
    x: *const Tensor,
    out: *const Tensor,
    mask: *const Tensor,
    bias: *const Tensor,
    axis: i32,
    scale: f64,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { masked(x, out, ScoreOptions::new(mask, bias)?, (axis, scale), false) })
}

/// Its logarithm: `flashtile_masked_log_softmax` of the header.
///
/// # Safety
/// As [`flashtile_masked_softmax`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_masked_log_softmax(
    x: *const Tensor,
    out: *const Tensor,
    mask: *const Tensor,
    bias: *const Tensor,
    axis: i32,
    scale: f64,
) -> i32 {
    // SAFETY: the caller's promise, passed on.
    guarded(|| unsafe { masked(x, out, ScoreOptions::new(mask, bias)?, (axis, scale), true) })
}

/// Mask and bias of a softmax. The output must be disjoint from them.
pub(super) struct ScoreOptions {
    mask: Option<CheckedTensor>,
    bias: Option<CheckedTensor>,
}

impl ScoreOptions {
    /// # Safety
    /// As [`CheckedTensor::new`], of both.
    pub(super) unsafe fn new(mask: *const Tensor, bias: *const Tensor) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let read = |name, tensor: *const Tensor, types: &[Type]| unsafe {
            (!tensor.is_null()).then(|| CheckedTensor::new(name, tensor, types, 1..=4)).transpose()
        };
        Ok(ScoreOptions { mask: read("mask", mask, BYTES)?, bias: read("bias", bias, FLOATS)? })
    }

    /// Refuses an output that overlaps mask or bias.
    pub(super) fn check_disjoint(&self, written: &CheckedTensor) -> Result<(), Failure> {
        self.mask.iter().chain(&self.bias).try_for_each(|input| written.check_disjoint(input))
    }

    /// The softmax with these options.
    ///
    /// # Safety
    /// As [`CheckedTensor::bytes`] of the mask, and [`CheckedTensor::any`] of the bias.
    pub(super) unsafe fn softmax<'a>(&self, axis: usize, scale: f64) -> Result<Softmax<'a>, Failure> {
        // SAFETY: the caller's promise.
        let mask = self.mask.map(|mask| unsafe { mask.bytes() }).transpose()?;
        // SAFETY: the caller's promise.
        let bias = self.bias.map(|bias| unsafe { bias.any() }).transpose()?;
        Ok(Softmax::with_tensors(mask, bias).axis(axis).scale(scale))
    }
}

/// # Safety
/// As [`flashtile_masked_softmax`].
unsafe fn masked(
    x: *const Tensor,
    out: *const Tensor,
    options: ScoreOptions,
    (axis, scale): (i32, f64),
    log: bool,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise, here and below.
    let [x, out] = unsafe {
        [CheckedTensor::new("input", x, NUMBERS, 1..=4)?, CheckedTensor::new("output", out, NUMBERS, 1..=4)?]
    };
    // Half types may give f32.
    let is_wide = out.dtype() == Type::F32 && matches!(x.dtype(), Type::F16 | Type::Bf16);
    if !is_wide {
        out.check_type_of(&x)?;
    }
    out.check_shape_of(&x)?;
    options.check_disjoint(&out)?;
    let is_in_place = x.is_same(&out);
    if !is_in_place {
        out.check_disjoint(&x)?;
    }
    let axis = 4 - x.rank() + axis_of(axis, x.rank())?;
    // SAFETY: as above.
    let softmax = unsafe { options.softmax(axis, scale)? };
    let call = MaskedCall { softmax, axis: Axis::new(&x.shape(), axis)?, log };
    // SAFETY: as above; the types are those of the tensors, and `out` is disjoint from mask and bias, and from `x` unless it is
    // `x` (checked).
    unsafe {
        match (x.dtype(), is_in_place) {
            (Type::F32, true) => call.run_in_place::<f32>(out.strided_mut()?),
            (Type::F16, true) => call.run_in_place::<f16>(out.strided_mut()?),
            (Type::Bf16, true) => call.run_in_place::<bf16>(out.strided_mut()?),
            (Type::F64, true) => call.run_in_place::<f64>(out.strided_mut()?),
            (Type::F16, _) if is_wide => call.run::<f16, f32>(x.strided(), out.strided_mut()?),
            (Type::Bf16, _) if is_wide => call.run::<bf16, f32>(x.strided(), out.strided_mut()?),
            (Type::F32, _) => call.run::<f32, f32>(x.strided(), out.strided_mut()?),
            (Type::F16, _) => call.run::<f16, f16>(x.strided(), out.strided_mut()?),
            (Type::Bf16, _) => call.run::<bf16, bf16>(x.strided(), out.strided_mut()?),
            (Type::F64, _) => call.run::<f64, f64>(x.strided(), out.strided_mut()?),
            (Type::Byte, _) => Err(x.unsupported()),
        }
    }
}

struct MaskedCall<'a> {
    softmax: Softmax<'a>,
    axis: Axis,
    log: bool,
}

impl MaskedCall<'_> {
    fn run<T: Number, O: Number<Real = T::Real>>(
        self,
        x: Strided<'_, T, 4>,
        out: StridedMut<'_, O, 4>,
    ) -> Result<(), Failure> {
        let (x, out, mut result) = (TensorRef::new(x), TensorMut { strided: out }, Ok(()));
        pools::run_on(0, is_parallel(self.axis), || {
            result = if self.log { self.softmax.log_softmax_into(x, out) } else { self.softmax.softmax_into(x, out) };
        })?;
        Ok(result?)
    }

    fn run_in_place<T: Number>(self, x: StridedMut<'_, T, 4>) -> Result<(), Failure> {
        let (x, mut result) = (TensorMut { strided: x }, Ok(()));
        pools::run_on(0, is_parallel(self.axis), || {
            result = if self.log { self.softmax.log_softmax_in_place(x) } else { self.softmax.softmax_in_place(x) };
        })?;
        Ok(result?)
    }
}
