//! Tensors whose element type is known at run time.
//!
//! The layers below the calls take these, so that they are not compiled for each combination of types. Bindings for other
//! languages call one function instead of one for each combination.

use super::shared::SharedRows;
use super::strided::{Strided, StridedMut};
use super::view::{TensorMut, TensorRef, check_permutation, check_range};
use crate::element::{ByElement, DType, Element, bf16, f16, map_elements, with_elements};
use crate::error::{Error, check_count};
use std::ops::RangeBounds;
use std::slice;

/// A borrowed tensor, read only, whose element type (f32, f16 or bf16) and rank are known at run time.
///
/// It is made from a [`TensorRef`] of rank 1 to 4, from an ndarray array or view, or from what an engine's tensor has: a slice
/// with an offset, shape and strides ([`with_strides`](Self::with_strides)), or bytes with a type tag
/// ([`from_bytes`](Self::from_bytes)).
///
/// ```
/// use flashtile::{AnyTensorRef, DType, TensorRef, bf16};
///
/// let data = vec![bf16::ONE; 2 * 3 * 8];
/// let q = AnyTensorRef::from(TensorRef::from_slice(&data, [2, 3, 8])?); // [heads, seq, dim]
/// assert_eq!((q.dtype(), q.rank(), q.shape()), (DType::Bf16, 3, &[2, 3, 8][..]));
/// let q = q.insert_axis(0)?; // [batch, heads, seq, dim]
/// assert_eq!(q.shape(), [1, 2, 3, 8]);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// Queries, keys and values must have rank 4. A tensor of rank 3 has two readings, `[batch, seq, hidden]` and
/// `[heads, seq, dim]`, so calls refuse it with [`Error::Rank`]. A bias may have a lower rank: it gets axes of size 1 in front.
#[derive(Clone, Copy, Debug)]
pub struct AnyTensorRef<'a> {
    /// With axes of size 1 in front of its own.
    pub(crate) tensor: AnyTensor<'a>,
    rank: usize,
}

/// A borrowed tensor to write to, whose element type (f32, f16 or bf16) and rank are known at run time.
///
/// It is made from a [`TensorMut`] of rank 1 to 4, from a mutable ndarray array or view, or as an [`AnyTensorRef`] from slices and
/// bytes that are mutable.
#[derive(Debug)]
pub struct AnyTensorMut<'a> {
    /// With axes of size 1 in front of its own.
    tensor: AnyStridedMut<'a>,
    rank: usize,
}

/// The largest rank of a tensor.
const MAX_RANK: usize = 4;

/// The order of all four axes that puts the tensor's own axes in the order `axes`.
fn four_axes(axes: &[usize], rank: usize) -> Result<[usize; 4], Error> {
    if axes.len() != rank {
        return Err(Error::WrongCount { what: "axes", expected: rank, got: axes.len() });
    }
    check_permutation(axes)?;
    let own = MAX_RANK - rank;
    Ok(std::array::from_fn(|n| if n < own { n } else { own + axes[n - own] }))
}

/// The order of all four axes that inserts an axis of size 1 at `axis` of the tensor's own axes.
fn axes_with_inserted(axis: usize, rank: usize) -> Result<[usize; 4], Error> {
    if rank == MAX_RANK {
        return Err(Error::Rank { tensor: "tensor", expected: MAX_RANK, got: rank + 1 });
    }
    if axis > rank {
        return Err(Error::AxisOutOfRange { axis: axis as i128, rank: rank + 1 });
    }
    let mut axes = [0, 1, 2, 3];
    axes[MAX_RANK - 1 - rank..MAX_RANK - rank + axis].rotate_left(1);
    Ok(axes)
}

/// Shape and strides of rank 1 to 4, with axes of size 1 in front.
fn with_four_axes(shape: &[usize], strides: &[isize]) -> Result<([usize; 4], [isize; 4]), Error> {
    let rank = shape.len();
    if !(1..=MAX_RANK).contains(&rank) {
        return Err(Error::Rank { tensor: "tensor", expected: rank.clamp(1, MAX_RANK), got: rank });
    }
    check_count("strides", strides.len(), rank)?;
    let (mut four_sizes, mut four_strides) = ([1; MAX_RANK], [0; MAX_RANK]);
    four_sizes[MAX_RANK - rank..].copy_from_slice(shape);
    four_strides[MAX_RANK - rank..].copy_from_slice(strides);
    Ok((four_sizes, four_strides))
}

/// The number of elements in `len` bytes from `address` on.
fn elements_in(dtype: DType, address: usize, len: usize) -> Result<usize, Error> {
    let size = dtype.size();
    // The alignment of each element type is its size.
    match address % size {
        0 => Ok(len / size),
        _ => Err(Error::Misaligned { dtype }),
    }
}

impl<'a> AnyTensorRef<'a> {
    /// A tensor whose rank is known at run time: the element at index `i` is `data[offset + sum of i[axis] * strides[axis]]`;
    /// strides count elements.
    ///
    /// Engines such as candle keep a slice for each element type, with a layout beside it:
    ///
    /// ```
    /// use flashtile::{AnyTensorRef, Error, f16};
    ///
    /// enum Storage {
    ///     F32(Vec<f32>),
    ///     F16(Vec<f16>),
    /// }
    ///
    /// fn view<'a>(of: &'a Storage, offset: usize, dims: &[usize], strides: &[isize]) -> Result<AnyTensorRef<'a>, Error> {
    ///     match of {
    ///         Storage::F32(data) => AnyTensorRef::with_strides(data, offset, dims, strides),
    ///         Storage::F16(data) => AnyTensorRef::with_strides(data, offset, dims, strides),
    ///     }
    /// }
    ///
    /// let storage = Storage::F16(vec![f16::ONE; 2 * 3 * 8]);
    /// let q = view(&storage, 0, &[1, 2, 3, 8], &[48, 8, 16, 1])?; // [batch, seq, heads, dim], transposed
    /// assert_eq!(q.shape(), [1, 2, 3, 8]);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Rank`] unless there are 1 to 4 axes; [`Error::WrongCount`] unless each has a stride; [`Error::OutOfBounds`] if an
    /// index within the shape leads outside `data`. A shape with a 0 has no elements, so any strides are accepted.
    pub fn with_strides<T: Element>(
        data: &'a [T],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self, Error> {
        let (sizes, steps) = with_four_axes(shape, strides)?;
        Ok(AnyTensorRef { tensor: AnyTensor::new(Strided::new(data, offset, sizes, steps)?), rank: shape.len() })
    }

    /// As [`with_strides`](Self::with_strides), of the bytes of elements of type `dtype`, in the order of the processor. Offset and
    /// strides count elements. Bytes after the last whole element are not read.
    ///
    /// ```
    /// use flashtile::{AnyTensorRef, DType};
    ///
    /// let floats = [0.5f32; 6 * 4];
    /// // SAFETY: every byte of a float is initialised.
    /// let bytes: &[u8] = unsafe { std::slice::from_raw_parts(floats.as_ptr().cast(), size_of_val(&floats)) };
    /// let x = AnyTensorRef::from_bytes(DType::F32, bytes, 4, &[5, 4], &[4, 1])?; // rows 1 to 5
    /// assert_eq!(x.typed::<f32>().and_then(|x| x.get([0, 0, 4, 3])), Some(0.5));
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Misaligned`] if the bytes do not start at a multiple of the element's size; otherwise as
    /// [`with_strides`](Self::with_strides).
    pub fn from_bytes(
        dtype: DType,
        bytes: &'a [u8],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self, Error> {
        let (data, len) = (bytes.as_ptr(), elements_in(dtype, bytes.as_ptr().addr(), bytes.len())?);
        // SAFETY: the pointer is aligned (checked), `len` elements are no more than the bytes, which are initialised and borrowed
        // for 'a, and any bits are a number of each of these types.
        unsafe {
            match dtype {
                DType::F32 => {
                    Self::with_strides(slice::from_raw_parts(data.cast::<f32>(), len), offset, shape, strides)
                }
                DType::F16 => {
                    Self::with_strides(slice::from_raw_parts(data.cast::<f16>(), len), offset, shape, strides)
                }
                DType::Bf16 => {
                    Self::with_strides(slice::from_raw_parts(data.cast::<bf16>(), len), offset, shape, strides)
                }
            }
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// The number of axes, 1 to 4.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The size of each axis.
    pub fn shape(&self) -> &[usize] {
        with_elements!(&self.tensor, tensor => &tensor.shape()[MAX_RANK - self.rank..])
    }

    /// The stride of each axis, in elements.
    pub fn strides(&self) -> &[isize] {
        with_elements!(&self.tensor, tensor => &tensor.strides()[MAX_RANK - self.rank..])
    }

    /// The same tensor with its type known at compile time, if that is `T`. A tensor of a rank below 4 has axes of size 1 in
    /// front, as after its conversion to rank 4.
    ///
    /// ```
    /// use flashtile::{DType, KvCache, KvFormat, f16};
    ///
    /// let cache = KvCache::new(KvFormat::new(DType::F16, 2, 64), 1, 100)?;
    /// let keys = cache.keys().typed::<f16>().expect("a cache of f16");
    /// assert_eq!(keys.get([0, 1, 99, 63]), Some(f16::ZERO));
    /// assert!(cache.keys().typed::<f32>().is_none());
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn typed<T: Element>(self) -> Option<TensorRef<'a, T>> {
        if self.dtype() != T::DTYPE {
            return None;
        }
        // SAFETY: `DTYPE` names `T` (what an `Element` promises), and the elements have that type, so the cast changes nothing.
        let strided = with_elements!(self.tensor, tensor => unsafe { tensor.cast() });
        Some(TensorRef::of_rank(strided, self.rank))
    }

    /// The same tensor with its axes in another order: axis `n` of the result is axis `axes[n]` of this one.
    ///
    /// # Errors
    /// [`Error::WrongCount`] unless there is one entry for each axis; [`Error::AxisOutOfRange`] if they do not name every axis
    /// once.
    pub fn permuted(self, axes: &[usize]) -> Result<Self, Error> {
        let axes = four_axes(axes, self.rank)?;
        Ok(AnyTensorRef { tensor: map_elements!(self.tensor, tensor => tensor.permuted(axes)), ..self })
    }

    /// The indices `range` of one axis, as [`TensorRef::narrow`].
    ///
    /// # Errors
    /// As [`TensorRef::narrow`].
    pub fn narrow(self, axis: usize, range: impl RangeBounds<usize>) -> Result<Self, Error> {
        let range = check_range(axis, range, self.shape())?;
        let axis = MAX_RANK - self.rank + axis;
        Ok(AnyTensorRef { tensor: map_elements!(self.tensor, tensor => tensor.narrow(axis, range)), ..self })
    }

    /// The same tensor with one more axis, of size 1, at `axis`: the axes from there on move back by one.
    ///
    /// # Errors
    /// [`Error::AxisOutOfRange`] if `axis` is above the number of axes; [`Error::Rank`] if there are four already.
    pub fn insert_axis(self, axis: usize) -> Result<Self, Error> {
        let axes = axes_with_inserted(axis, self.rank)?;
        let tensor = map_elements!(self.tensor, tensor => tensor.permuted(axes));
        Ok(AnyTensorRef { tensor, rank: self.rank + 1 })
    }
}

impl<'a> AnyTensorMut<'a> {
    /// A tensor whose rank is known at run time, as [`AnyTensorRef::with_strides`]. Elements that no index reaches are not written.
    ///
    /// # Errors
    /// As [`AnyTensorRef::with_strides`]; [`Error::OverlappingOutput`] if two indices may lead to one element.
    pub fn with_strides<T: Element>(
        data: &'a mut [T],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self, Error> {
        let (sizes, steps) = with_four_axes(shape, strides)?;
        let overlap_of_own = |error| match error {
            Error::OverlappingOutput { axis, stride, needed } => {
                Error::OverlappingOutput { axis: axis + shape.len() - MAX_RANK, stride, needed }
            }
            other => other,
        };
        let tensor = StridedMut::new(data, offset, sizes, steps).map_err(overlap_of_own)?;
        Ok(AnyTensorMut { tensor: AnyStridedMut::new(tensor), rank: shape.len() })
    }

    /// As [`with_strides`](Self::with_strides), of the bytes of elements of type `dtype`, as [`AnyTensorRef::from_bytes`].
    ///
    /// # Errors
    /// [`Error::Misaligned`] if the bytes do not start at a multiple of the element's size; otherwise as
    /// [`with_strides`](Self::with_strides).
    pub fn from_bytes(
        dtype: DType,
        bytes: &'a mut [u8],
        offset: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self, Error> {
        let len = elements_in(dtype, bytes.as_ptr().addr(), bytes.len())?;
        let data = bytes.as_mut_ptr();
        // SAFETY: the pointer is aligned (checked), `len` elements are no more than the bytes, which are initialised and borrowed
        // mutably for 'a, and any bits are a number of each of these types, and any number's bits are bytes.
        unsafe {
            match dtype {
                DType::F32 => {
                    Self::with_strides(slice::from_raw_parts_mut(data.cast::<f32>(), len), offset, shape, strides)
                }
                DType::F16 => {
                    Self::with_strides(slice::from_raw_parts_mut(data.cast::<f16>(), len), offset, shape, strides)
                }
                DType::Bf16 => {
                    Self::with_strides(slice::from_raw_parts_mut(data.cast::<bf16>(), len), offset, shape, strides)
                }
            }
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// The number of axes, 1 to 4.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The size of each axis.
    pub fn shape(&self) -> &[usize] {
        with_elements!(&self.tensor, tensor => &tensor.as_ref().shape()[MAX_RANK - self.rank..])
    }

    /// The stride of each axis, in elements.
    pub fn strides(&self) -> &[isize] {
        with_elements!(&self.tensor, tensor => &tensor.as_ref().strides()[MAX_RANK - self.rank..])
    }

    /// The same tensor with its axes in another order, as [`AnyTensorRef::permuted`].
    ///
    /// # Errors
    /// As [`AnyTensorRef::permuted`].
    pub fn permuted(self, axes: &[usize]) -> Result<Self, Error> {
        let axes = four_axes(axes, self.rank)?;
        Ok(AnyTensorMut { tensor: map_elements!(self.tensor, tensor => tensor.permuted(axes)), ..self })
    }

    /// The indices `range` of one axis, as [`TensorRef::narrow`]. Elements outside are not written.
    ///
    /// # Errors
    /// As [`TensorRef::narrow`].
    pub fn narrow(self, axis: usize, range: impl RangeBounds<usize>) -> Result<Self, Error> {
        let range = check_range(axis, range, self.shape())?;
        let axis = MAX_RANK - self.rank + axis;
        Ok(AnyTensorMut { tensor: map_elements!(self.tensor, tensor => tensor.narrow(axis, range)), ..self })
    }

    /// The same tensor with one more axis, of size 1, at `axis`, as [`AnyTensorRef::insert_axis`].
    ///
    /// # Errors
    /// As [`AnyTensorRef::insert_axis`].
    pub fn insert_axis(self, axis: usize) -> Result<Self, Error> {
        let axes = axes_with_inserted(axis, self.rank)?;
        let tensor = map_elements!(self.tensor, tensor => tensor.permuted(axes));
        Ok(AnyTensorMut { tensor, rank: self.rank + 1 })
    }

    /// The same tensor, borrowed for the lifetime of the result.
    pub fn reborrow(&mut self) -> AnyTensorMut<'_> {
        AnyTensorMut { tensor: map_elements!(&mut self.tensor, tensor => tensor.reborrow()), rank: self.rank }
    }

    /// The tensor with axes of size 1 in front of its own, of its type.
    pub(crate) fn typed_mut(&mut self) -> &mut AnyStridedMut<'a> {
        &mut self.tensor
    }

    /// The same tensor as rows that several threads write.
    pub(crate) fn into_shared(self) -> AnySharedRows<'a> {
        map_elements!(self.tensor, tensor => SharedRows::new(tensor))
    }
}

#[cfg(feature = "capi")]
impl<'a> From<AnyTensor<'a>> for AnyTensorRef<'a> {
    fn from(tensor: AnyTensor<'a>) -> Self {
        AnyTensorRef { tensor, rank: MAX_RANK }
    }
}

impl<'a> From<&AnyTensorRef<'a>> for AnyTensorRef<'a> {
    fn from(tensor: &AnyTensorRef<'a>) -> Self {
        *tensor
    }
}

macro_rules! from_typed {
    ($($n:literal),+) => {$(
        impl<'a, T: Element> From<TensorRef<'a, T, $n>> for AnyTensorRef<'a> {
            fn from(tensor: TensorRef<'a, T, $n>) -> Self {
                AnyTensorRef { tensor: AnyTensor::new(tensor.strided.with_rank()), rank: tensor.original_rank() }
            }
        }

        impl<'a, T: Element> From<&TensorRef<'a, T, $n>> for AnyTensorRef<'a> {
            fn from(tensor: &TensorRef<'a, T, $n>) -> Self {
                AnyTensorRef::from(*tensor)
            }
        }

        impl<'a, T: Element> From<TensorMut<'a, T, $n>> for AnyTensorMut<'a> {
            fn from(tensor: TensorMut<'a, T, $n>) -> Self {
                AnyTensorMut { tensor: AnyStridedMut::new(tensor.strided.with_rank()), rank: $n }
            }
        }
    )+};
}
from_typed!(1, 2, 3, 4);

/// A [`Strided`] of any element type.
pub(crate) type AnyTensor<'a> = ByElement<Strided<'a, f32, 4>, Strided<'a, f16, 4>, Strided<'a, bf16, 4>>;

impl<'a> AnyTensor<'a> {
    pub(crate) fn new<T: Element>(strided: Strided<'a, T, 4>) -> Self {
        // SAFETY: `DTYPE` names `T` (what an `Element` promises), so each cast is to the type that the elements have.
        unsafe {
            match T::DTYPE {
                DType::F32 => ByElement::F32(strided.cast()),
                DType::F16 => ByElement::F16(strided.cast()),
                DType::Bf16 => ByElement::Bf16(strided.cast()),
            }
        }
    }

    /// A tensor whose elements are all one and the same zero.
    pub(crate) fn repeated(dtype: DType, shape: [usize; 4]) -> AnyTensor<'static> {
        match dtype {
            DType::F32 => ByElement::F32(Strided::repeated(&0.0, shape)),
            DType::F16 => ByElement::F16(Strided::repeated(const { &f16::ZERO }, shape)),
            DType::Bf16 => ByElement::Bf16(Strided::repeated(const { &bf16::ZERO }, shape)),
        }
    }

    pub(crate) fn shape(&self) -> [usize; 4] {
        with_elements!(self, tensor => *tensor.shape())
    }

    /// Repeats axes of size 1 up to `shape`; `None` if another axis differs.
    pub(crate) fn broadcast(self, shape: [usize; 4]) -> Option<Self> {
        Some(map_elements!(self, tensor => tensor.broadcast(shape)?))
    }

    /// One element as f32, exactly.
    ///
    /// # Panics
    /// If the index is outside the shape.
    pub(crate) fn at(&self, index: [usize; 4]) -> f32 {
        with_elements!(self, tensor => tensor.get(index).expect("inside the shape").to_f32())
    }
}

/// A [`StridedMut`] of any element type.
pub(crate) type AnyStridedMut<'a> = ByElement<StridedMut<'a, f32, 4>, StridedMut<'a, f16, 4>, StridedMut<'a, bf16, 4>>;

impl<'a> AnyStridedMut<'a> {
    fn new<T: Element>(strided: StridedMut<'a, T, 4>) -> Self {
        // SAFETY: `DTYPE` names `T` (what an `Element` promises), so each cast is to the type that the elements have.
        unsafe {
            match T::DTYPE {
                DType::F32 => ByElement::F32(strided.cast()),
                DType::F16 => ByElement::F16(strided.cast()),
                DType::Bf16 => ByElement::Bf16(strided.cast()),
            }
        }
    }
}

/// A [`SharedRows`] of any element type.
pub(crate) type AnySharedRows<'a> = ByElement<SharedRows<'a, f32>, SharedRows<'a, f16>, SharedRows<'a, bf16>>;

impl AnySharedRows<'_> {
    pub(crate) fn shape(&self) -> [usize; 4] {
        with_elements!(self, rows => *rows.shape())
    }
}
