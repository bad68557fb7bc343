//! C's descriptions of tensors. Everything is checked except the memory itself.

use super::failure::{Code, Failure};
use crate::element::{ByElement, DType, bf16, f16, with_elements};
use crate::error::Error;
use crate::tensor::any::AnyTensor;
use crate::tensor::strided::{Strided, StridedMut, reach};
use crate::tensor::{AnyTensorMut, AnyTensorRef, TensorMut, TensorRef};
use std::ffi::c_void;
use std::ops::RangeInclusive;
use std::ptr;

/// `flashtile_tensor`: memory, element type, shape and strides.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Tensor {
    /// The element at index 0 of every axis.
    pub data: *mut c_void,
    /// One of the `FLASHTILE_…` types: 1 f32, 2 f16, 3 bf16, 4 f64, 5 bytes.
    pub dtype: i32,
    /// The number of axes: entries of `shape` and `strides` that are used.
    pub rank: i32,
    /// The size of each axis.
    pub shape: [i64; 4],
    /// The stride of each axis, in elements.
    pub strides: [i64; 4],
}

/// The element types of the C interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    F32,
    F16,
    Bf16,
    F64,
    Byte,
}

impl Type {
    fn new(dtype: i32) -> Option<Self> {
        [Type::F32, Type::F16, Type::Bf16, Type::F64, Type::Byte]
            .get(usize::try_from(dtype).ok()?.checked_sub(1)?)
            .copied()
    }

    fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Type::F32,
            DType::F16 => Type::F16,
            DType::Bf16 => Type::Bf16,
        }
    }

    /// The type as one of attention's, if it is.
    fn element(self) -> Option<DType> {
        match self {
            Type::F32 => Some(DType::F32),
            Type::F16 => Some(DType::F16),
            Type::Bf16 => Some(DType::Bf16),
            Type::F64 | Type::Byte => None,
        }
    }

    /// Its name in the header.
    fn name(self) -> &'static str {
        match self {
            Type::F32 => "FLASHTILE_F32",
            Type::F16 => "FLASHTILE_F16",
            Type::Bf16 => "FLASHTILE_BF16",
            Type::F64 => "FLASHTILE_F64",
            Type::Byte => "FLASHTILE_BYTE",
        }
    }

    /// Its number in the header.
    fn number(self) -> i32 {
        self as i32 + 1
    }

    fn size(self) -> usize {
        match self {
            Type::Byte => 1,
            Type::F16 | Type::Bf16 => 2,
            Type::F32 => 4,
            Type::F64 => 8,
        }
    }

    fn align(self) -> usize {
        match self {
            Type::Byte => align_of::<u8>(),
            Type::F16 | Type::Bf16 => align_of::<u16>(),
            Type::F32 => align_of::<f32>(),
            Type::F64 => align_of::<f64>(),
        }
    }
}

/// The types of queries, keys, values, biases and outputs of attention.
pub(super) const FLOATS: &[Type] = &[Type::F32, Type::F16, Type::Bf16];
/// The type of a log-sum-exp and of a merged output.
pub(super) const F32: &[Type] = &[Type::F32];
/// The type of a mask.
pub(super) const BYTES: &[Type] = &[Type::Byte];
/// The types of softmax.
pub(super) const NUMBERS: &[Type] = &[Type::F32, Type::F16, Type::Bf16, Type::F64];

/// The header's number of one of attention's types.
pub(super) fn number_of(dtype: DType) -> i32 {
    Type::of(dtype).number()
}

/// The type of attention with this number in the header.
pub(super) fn element_type(name: &str, dtype: i32) -> Result<DType, Failure> {
    Type::new(dtype).and_then(Type::element).ok_or_else(|| wrong_dtype(name, dtype, FLOATS))
}

/// A failure that names the dtype and the accepted types.
fn wrong_dtype(name: &str, dtype: i32, types: &[Type]) -> Failure {
    let got = match Type::new(dtype) {
        Some(known) => format!("the dtype of the {name} is {} ({dtype})", known.name()),
        None => format!("{dtype} is no dtype (of the {name})"),
    };
    let mut names = types.iter().map(|known| format!("{} ({})", known.name(), known.number())).collect::<Vec<_>>();
    let last = names.pop().unwrap_or_default();
    let names = if names.is_empty() { last } else { format!("{} or {last}", names.join(", ")) };
    let more = if types == BYTES { ", one byte for each element, not 0 where a query may attend" } else { "" };
    Failure::new(Code::BadDtype, format!("{got}; it must be {names}{more}"))
}

/// A checked description: the pointer is aligned, and all elements have addresses within `isize::MAX` bytes. A rank below four
/// gets leading axes of size 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckedTensor {
    name: &'static str,
    dtype: Type,
    rank: usize,
    shape: [usize; 4],
    strides: [isize; 4],
    data: *mut c_void,
    /// `None` if there are no elements.
    byte_range: Option<ByteRange>,
}

/// The addresses of the first and the last byte of a tensor's elements.
type ByteRange = (usize, usize);

impl CheckedTensor {
    /// Reads a description of a tensor whose dtype is one of `types` and whose rank is one of `ranks`.
    ///
    /// # Safety
    /// `tensor` is null, misaligned, or may be read.
    pub(super) unsafe fn new(
        name: &'static str,
        tensor: *const Tensor,
        types: &[Type],
        ranks: RangeInclusive<usize>,
    ) -> Result<Self, Failure> {
        check_pointer(name, tensor)?;
        // SAFETY: neither null nor misaligned, so by the caller's promise it may be read.
        let tensor = unsafe { tensor.read() };
        let dtype = Type::new(tensor.dtype)
            .filter(|dtype| types.contains(dtype))
            .ok_or_else(|| wrong_dtype(name, tensor.dtype, types))?;
        let rank = usize::try_from(tensor.rank).ok().filter(|rank| ranks.contains(rank)).ok_or_else(|| {
            let (least, most) = (ranks.start(), ranks.end());
            let expected = if least == most { most.to_string() } else { format!("{least} to {most}") };
            Failure::new(Code::BadRank, format!("the rank of the {name} is {} but must be {expected}", tensor.rank))
        })?;
        let (mut shape, mut strides) = ([1; 4], [0; 4]);
        for axis in 0..rank {
            shape[4 - rank + axis] = size(name, tensor.shape[axis])?;
            strides[4 - rank + axis] = isize::try_from(tensor.strides[axis]).map_err(|_| too_large(name))?;
        }
        CheckedTensor { name, dtype, rank, shape, strides, data: tensor.data, byte_range: None }.with_byte_range()
    }

    /// Reads queries, keys, values or an output, `[batch, heads, seq, dim]`.
    ///
    /// * `packed`: whether they may be `[total, heads, dim]`, too, which becomes `[1, heads, total, dim]`
    ///
    /// # Safety
    /// As [`CheckedTensor::new`].
    pub(super) unsafe fn of_heads(name: &'static str, tensor: *const Tensor, packed: bool) -> Result<Self, Failure> {
        let least = if packed { 3 } else { 4 };
        // SAFETY: the caller's promise.
        let mut checked = unsafe { Self::new(name, tensor, FLOATS, least..=4) }.map_err(|failure| {
            let hint = if packed { "" } else { "; [total, heads, dim] is for sequences packed with starts" };
            let hint = if failure.code == Code::BadRank { hint } else { "" };
            Failure { message: failure.message + hint, ..failure }
        })?;
        if checked.rank == 3 {
            // The axis of size 1 is in front already.
            checked.shape.swap(1, 2);
            checked.strides.swap(1, 2);
            checked.rank = 4;
        }
        Ok(checked)
    }

    /// The memory of a cache, `[batch or pages, heads, rows, dim]`.
    pub(super) fn of_cache(name: &'static str, tensor: AnyTensorRef<'_>) -> Result<Self, Failure> {
        let (shape, strides, data) = with_elements!(&tensor.tensor, tensor => {
            (*tensor.shape(), *tensor.strides(), tensor.origin().cast_mut().cast())
        });
        let dtype = Type::of(tensor.dtype());
        CheckedTensor { name, dtype, rank: 4, shape, strides, data, byte_range: None }.with_byte_range()
    }

    /// What C sees of it. Its rank is 4.
    pub(super) fn described(&self) -> Tensor {
        let CheckedTensor { dtype, shape, strides, data, .. } = *self;
        // (All of these are those of memory.)
        let (shape, strides) = (shape.map(|size| size as i64), strides.map(|stride| stride as i64));
        Tensor { data, dtype: dtype.number(), rank: 4, shape, strides }
    }

    fn with_byte_range(mut self) -> Result<Self, Failure> {
        let Some((first, last)) = reach(&self.shape, &self.strides) else {
            self.data = ptr::without_provenance_mut(self.dtype.align()); // never dereferenced; aligned, as the pointer of a slice must be
            return Ok(self);
        };
        check_address(self.name, self.data, self.dtype.align())?;
        let (address, size) = (self.data.addr() as i128, self.dtype.size() as i128);
        // Saturating, as in `reach`, because a wrapped number could look like an address.
        let start = first.saturating_mul(size).saturating_add(address);
        let end = last.saturating_mul(size).saturating_add(address + size - 1);
        let in_memory = start > 0 && end < usize::MAX as i128 && end - start < isize::MAX as i128;
        if !in_memory {
            return Err(too_large(self.name));
        }
        self.byte_range = Some((start as usize, end as usize));
        Ok(self)
    }

    pub(super) fn dtype(&self) -> Type {
        self.dtype
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// The shape, with leading axes of size 1.
    pub(super) fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Refuses an output whose byte range overlaps that of another tensor.
    pub(super) fn check_disjoint(&self, other: &CheckedTensor) -> Result<(), Failure> {
        self.check_disjoint_from(other.name, other.byte_range)
    }

    /// [`CheckedTensor::check_disjoint`] for a list.
    pub(super) fn check_disjoint_from_list<T>(&self, name: &str, list: &[T]) -> Result<(), Failure> {
        let start = list.as_ptr().addr();
        self.check_disjoint_from(name, (!list.is_empty()).then(|| (start, start + size_of_val(list) - 1)))
    }

    fn check_disjoint_from(&self, other: &str, byte_range: Option<ByteRange>) -> Result<(), Failure> {
        match (self.byte_range, byte_range) {
            (Some((start, end)), Some((other_start, other_end))) if start <= other_end && other_start <= end => {
                let name = self.name;
                let message = format!(
                    "the {name} ({start:#x} to {end:#x}) shares memory with the {other} ({other_start:#x} to {other_end:#x})"
                );
                Err(Failure::new(Code::Overlap, message))
            }
            _ => Ok(()),
        }
    }

    /// Whether both have the same elements at the same indices.
    pub(super) fn is_same(&self, other: &CheckedTensor) -> bool {
        let same_axis = |axis: usize| self.shape[axis] == 1 || self.strides[axis] == other.strides[axis];
        self.data == other.data && self.dtype == other.dtype && self.shape == other.shape && (0..4).all(same_axis)
    }

    fn wrong_type(&self, types: &[Type]) -> Failure {
        wrong_dtype(self.name, self.dtype.number(), types)
    }

    /// # Safety
    /// Every index within the shape leads to an element of type `T`, the dtype's, that is readable and not written to during
    /// `'a`; all of them are in one allocation.
    pub(super) unsafe fn strided<'a, T>(&self) -> Strided<'a, T, 4> {
        // SAFETY: alignment and extent were checked when this was made; the rest is the caller's promise.
        unsafe { Strided::from_pointer(self.data.cast_const().cast(), self.shape, self.strides) }
    }

    /// # Safety
    /// Every index within the shape leads to an element of type `T`, the dtype's, that is not read or written otherwise during
    /// `'a`; all of them are in one allocation.
    pub(super) unsafe fn strided_mut<'a, T>(&self) -> Result<StridedMut<'a, T, 4>, Error> {
        // SAFETY: as in `strided`.
        unsafe { StridedMut::from_pointer(self.data.cast(), self.shape, self.strides) }
    }

    /// What a plan needs to know. Elements are not read.
    pub(super) fn type_and_shape(&self) -> Result<(DType, [usize; 4]), Failure> {
        Ok((self.dtype.element().ok_or_else(|| self.wrong_type(FLOATS))?, self.shape))
    }

    /// # Safety
    /// Every index leads to an element that is readable and not written to during `'a`.
    pub(super) unsafe fn any<'a>(&self) -> Result<AnyTensor<'a>, Failure> {
        // SAFETY: the type is the dtype's; the rest is the caller's promise.
        Ok(unsafe {
            match self.dtype {
                Type::F32 => ByElement::F32(self.strided::<f32>()),
                Type::F16 => ByElement::F16(self.strided::<f16>()),
                Type::Bf16 => ByElement::Bf16(self.strided::<bf16>()),
                Type::F64 | Type::Byte => return Err(self.wrong_type(FLOATS)),
            }
        })
    }

    /// # Safety
    /// Every index leads to a byte that is readable and not written to during `'a`.
    pub(super) unsafe fn bytes<'a>(&self) -> Result<Strided<'a, u8, 4>, Failure> {
        match self.dtype {
            // SAFETY: the type is a byte; the rest is the caller's promise.
            Type::Byte => Ok(unsafe { self.strided() }),
            _ => Err(self.wrong_type(BYTES)),
        }
    }

    /// # Safety
    /// Every index leads to an f32 that is readable and not written to during `'a`.
    pub(super) unsafe fn f32s<'a>(&self) -> Result<Strided<'a, f32, 4>, Failure> {
        self.check_f32()?;
        // SAFETY: the type is f32; the rest is the caller's promise.
        Ok(unsafe { self.strided() })
    }

    /// # Safety
    /// Every index leads to an f32 that is not read or written otherwise during `'a`.
    pub(super) unsafe fn f32s_mut<'a>(&self) -> Result<StridedMut<'a, f32, 4>, Failure> {
        self.check_f32()?;
        // SAFETY: the type is f32; the rest is the caller's promise.
        Ok(unsafe { self.strided_mut()? })
    }

    /// # Safety
    /// The last three axes: as [`CheckedTensor::f32s`].
    pub(super) unsafe fn lse<'a>(&self) -> Result<TensorRef<'a, f32, 3>, Failure> {
        self.check_f32()?;
        let ([_, shape @ ..], [_, strides @ ..]) = (self.shape, self.strides);
        // SAFETY: as in `strided`; the first axis has size 1.
        let strided = unsafe { Strided::from_pointer(self.data.cast_const().cast(), shape, strides) };
        Ok(TensorRef::new(strided))
    }

    /// # Safety
    /// The last three axes: as [`CheckedTensor::f32s_mut`].
    pub(super) unsafe fn lse_mut<'a>(&self) -> Result<TensorMut<'a, f32, 3>, Failure> {
        self.check_f32()?;
        let ([_, shape @ ..], [_, strides @ ..]) = (self.shape, self.strides);
        // SAFETY: as in `strided_mut`; the first axis has size 1.
        let strided = unsafe { StridedMut::from_pointer(self.data.cast(), shape, strides)? };
        Ok(TensorMut { strided })
    }

    /// A tensor of rank 2.
    ///
    /// # Safety
    /// The last two axes: as [`CheckedTensor::strided`].
    pub(super) unsafe fn table<'a, T: Copy>(&self) -> TensorRef<'a, T, 2> {
        let ([_, _, shape @ ..], [_, _, strides @ ..]) = (self.shape, self.strides);
        // SAFETY: as in `strided`; the first axes have size 1.
        TensorRef::new(unsafe { Strided::from_pointer(self.data.cast_const().cast(), shape, strides) })
    }

    fn check_f32(&self) -> Result<(), Failure> {
        if self.dtype == Type::F32 { Ok(()) } else { Err(self.wrong_type(F32)) }
    }

    /// The output of attention, of any accepted type.
    ///
    /// # Safety
    /// Every index leads to an element that is not read or written otherwise during `'a`.
    pub(super) unsafe fn output<'a>(&self) -> Result<AnyTensorMut<'a>, Failure> {
        // SAFETY: the type is the dtype's; the rest is the caller's promise.
        Ok(unsafe {
            match self.dtype {
                Type::F32 => TensorMut { strided: self.strided_mut::<f32>()? }.into(),
                Type::F16 => TensorMut { strided: self.strided_mut::<f16>()? }.into(),
                Type::Bf16 => TensorMut { strided: self.strided_mut::<bf16>()? }.into(),
                Type::F64 | Type::Byte => return Err(self.wrong_type(FLOATS)),
            }
        })
    }

    /// Refuses an element type other than that of `like`.
    pub(super) fn check_type_of(&self, like: &CheckedTensor) -> Result<(), Failure> {
        if self.dtype == like.dtype {
            return Ok(());
        }
        let (name, got, expected, other) = (self.name, self.dtype.name(), like.dtype.name(), like.name);
        let message = format!("the dtype of the {name} is {got} but must be that of the {other}, {expected}");
        Err(Failure::new(Code::BadDtype, message))
    }

    /// Refuses a shape other than that of `like`.
    pub(super) fn check_shape_of(&self, like: &CheckedTensor) -> Result<(), Failure> {
        if (self.rank, self.shape) == (like.rank, like.shape) {
            return Ok(());
        }
        let (name, got, other) = (self.name, &self.shape[4 - self.rank..], like.name);
        let expected = &like.shape[4 - like.rank..];
        let message = format!("the shape of the {name} is {got:?} but must be that of the {other}, {expected:?}");
        Err(Failure::new(Code::ShapeMismatch, message))
    }

    /// Refuses an element type other than `expected`.
    pub(super) fn check_type(&self, expected: Type) -> Result<(), Failure> {
        if self.dtype == expected { Ok(()) } else { Err(self.wrong_type(&[expected])) }
    }

    /// Refuses another rank or shape, which `expected` describes.
    pub(super) fn check_shape(&self, rank: usize, shape: [usize; 4], expected: &str) -> Result<(), Failure> {
        if (self.rank, self.shape) == (rank, shape) {
            return Ok(());
        }
        let (name, got) = (self.name, &self.shape[4 - self.rank..]);
        let message = format!("the shape of the {name} is {got:?} but must be {expected}: {:?}", &shape[4 - rank..]);
        Err(Failure::new(Code::ShapeMismatch, message))
    }

    pub(super) fn unsupported(&self) -> Failure {
        self.wrong_type(NUMBERS)
    }
}

fn too_large(name: &str) -> Failure {
    Failure::new(Code::TooLarge, format!("shape and strides of the {name} reach beyond any memory"))
}

/// A size or count.
pub(super) fn size(name: &str, size: i64) -> Result<usize, Failure> {
    if size < 0 {
        return Err(Failure::new(Code::NegativeSize, format!("a size of the {name} is {size}")));
    }
    usize::try_from(size).map_err(|_| too_large(name))
}

/// An axis counted from 0, or from the end if it is negative.
pub(super) fn axis_of(axis: i32, rank: usize) -> Result<usize, Failure> {
    let counted = if axis < 0 { axis as i64 + rank as i64 } else { axis as i64 };
    let message = || format!("there is no axis {axis}, counted from 0, or from -1 at the end: the tensor has {rank}");
    let fits = usize::try_from(counted).ok().filter(|&axis| axis < rank);
    fits.ok_or_else(|| Failure::new(Code::AxisOutOfRange, message()))
}

/// Refuses a pointer that is null or misaligned.
pub(super) fn check_pointer<T>(name: &str, pointer: *const T) -> Result<(), Failure> {
    check_address(name, pointer.cast_mut().cast(), align_of::<T>())
}

fn check_address(name: &str, pointer: *mut c_void, align: usize) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::new(Code::NullPointer, format!("the pointer to the {name} is null")));
    }
    if !pointer.addr().is_multiple_of(align) {
        let message = format!("the pointer to the {name}, {pointer:p}, is no multiple of {align}");
        return Err(Failure::new(Code::Misaligned, message));
    }
    Ok(())
}

/// The caller's list as a slice.
///
/// # Safety
/// `list` is null, misaligned, or leads to `count` elements that are readable and not written to during `'a`.
pub(super) unsafe fn list<'a, T>(name: &str, list: *const T, count: i64) -> Result<&'a [T], Failure> {
    let count = size(name, count)?;
    if count == 0 {
        return Ok(&[]);
    }
    check_pointer(name, list)?;
    if count > isize::MAX as usize / size_of::<T>() {
        return Err(too_large(name));
    }
    // SAFETY: neither null nor misaligned nor too long; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(list, count) })
}
