//! Tensors of one element type and rank: [`TensorRef`] and [`TensorMut`].

#![forbid(unsafe_code)]

use super::strided::{Strided, StridedMut, contiguous};
use crate::error::Error;
use std::ops::{Bound, Range, RangeBounds};

/// A borrowed tensor of rank `N`, read only.
///
/// ```
/// use flashtile::TensorRef;
///
/// // Two sequences of three rows, stored as [batch, seq, heads, dim] = [2, 3, 4, 8], seen as [batch, heads, seq, dim].
/// let data = vec![0.0f32; 2 * 3 * 4 * 8];
/// let q = TensorRef::from_slice(&data, [2, 3, 4, 8])?.permuted([0, 2, 1, 3])?;
/// assert_eq!(q.shape(), [2, 4, 3, 8]);
/// assert_eq!(q.strides(), [96, 8, 32, 1]);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// A tensor of rank 1, 2 or 3 converts into one of rank 4, with axes of size 1 in front, as in NumPy. The conversion is for
/// masks and biases: a `[seq_q, seq_kv]` mask is for every batch and head.
///
/// The conversion is not for queries, keys and values. Calls refuse a converted tensor with [`Error::Rank`], because a tensor
/// of rank 3 has two readings: `[batch, seq, hidden]` and `[heads, seq, dim]`. Use [`insert_axis`](TensorRef::insert_axis)
/// instead. `permuted` and `narrow` of a converted tensor name its four axes, so their result is accepted, too.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a, T, const N: usize = 4> {
    pub(crate) strided: Strided<'a, T, N>,
    /// The rank before a conversion: below `N` if the first axes come from one.
    rank: usize,
}

/// A borrowed tensor of rank `N` to write to. Each index leads to an element of its own.
#[derive(Debug)]
pub struct TensorMut<'a, T, const N: usize = 4> {
    pub(crate) strided: StridedMut<'a, T, N>,
}

impl<'a, T, const N: usize> TensorRef<'a, T, N> {
    pub(crate) fn new(strided: Strided<'a, T, N>) -> Self {
        TensorRef { strided, rank: N }
    }

    /// A tensor of rank `rank`, converted to rank `N`.
    pub(super) fn of_rank(strided: Strided<'a, T, N>, rank: usize) -> Self {
        TensorRef { strided, rank }
    }

    /// The rank before a conversion: below `N` if there was one.
    pub(crate) fn original_rank(&self) -> usize {
        self.rank
    }
}

impl<'a, T: Copy, const N: usize> TensorRef<'a, T, N> {
    /// All of `data`, row by row without gaps, last axis innermost.
    ///
    /// # Errors
    /// [`Error::SliceLength`] if the shape has more or fewer elements than `data`; [`Error::TooLarge`].
    pub fn from_slice(data: &'a [T], shape: [usize; N]) -> Result<Self, Error> {
        let strides = contiguous_in(data.len(), &shape)?;
        Self::with_strides(data, 0, shape, strides)
    }

    /// The element at index `i` is `data[offset + sum of i[axis] * strides[axis]]`; strides count elements.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if an index within the shape leads outside `data`. A shape with a 0 has no elements, so any
    /// strides are accepted.
    pub fn with_strides(data: &'a [T], offset: usize, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        Ok(Self::new(Strided::new(data, offset, shape, strides)?))
    }

    /// The size of each axis.
    pub fn shape(&self) -> [usize; N] {
        *self.strided.shape()
    }

    /// The stride of each axis, in elements.
    pub fn strides(&self) -> [isize; N] {
        *self.strided.strides()
    }

    /// The element at `index`, or `None` outside the shape.
    pub fn get(&self, index: [usize; N]) -> Option<T> {
        self.strided.get(index)
    }

    /// The same tensor with its axes in another order: axis `n` of the result is axis `axes[n]` of this one.
    ///
    /// # Errors
    /// [`Error::AxisOutOfRange`] if `axes` does not name every axis once.
    pub fn permuted(self, axes: [usize; N]) -> Result<Self, Error> {
        check_permutation(&axes)?;
        Ok(Self::new(self.strided.permuted(axes)))
    }

    /// The indices `range` of one axis: index 0 of the result is index `range.start` of this tensor. The other axes stay.
    ///
    /// The result of an empty range has no elements.
    ///
    /// # Errors
    /// [`Error::AxisOutOfRange`] if there is no such axis; [`Error::RangeOutOfBounds`] if the range ends after the axis, or
    /// before it starts.
    ///
    /// The 20 filled positions of a cache of 64:
    ///
    /// ```
    /// use flashtile::TensorRef;
    ///
    /// let cache = vec![0.0f32; 2 * 64 * 8];
    /// let keys = TensorRef::from_slice(&cache, [1, 2, 64, 8])?.narrow(2, ..20)?;
    /// assert_eq!(keys.shape(), [1, 2, 20, 8]);
    /// assert_eq!(keys.strides(), [1024, 512, 8, 1]);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn narrow(self, axis: usize, range: impl RangeBounds<usize>) -> Result<Self, Error> {
        let range = check_range(axis, range, &self.shape())?;
        Ok(Self::new(self.strided.narrow(axis, range)))
    }
}

impl<'a, T: Copy, const N: usize> TensorMut<'a, T, N> {
    /// All of `data`, row by row without gaps, last axis innermost.
    ///
    /// # Errors
    /// [`Error::SliceLength`] if the shape has more or fewer elements than `data`; [`Error::TooLarge`].
    pub fn from_slice(data: &'a mut [T], shape: [usize; N]) -> Result<Self, Error> {
        let strides = contiguous_in(data.len(), &shape)?;
        Self::with_strides(data, 0, shape, strides)
    }

    /// The element at index `i` is `data[offset + sum of i[axis] * strides[axis]]`; strides count elements. Elements that no
    /// index reaches are not written.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if an index within the shape leads outside `data`; [`Error::OverlappingOutput`] if two indices
    /// may lead to one element.
    pub fn with_strides(
        data: &'a mut [T],
        offset: usize,
        shape: [usize; N],
        strides: [isize; N],
    ) -> Result<Self, Error> {
        Ok(Self { strided: StridedMut::new(data, offset, shape, strides)? })
    }

    /// The size of each axis.
    pub fn shape(&self) -> [usize; N] {
        *self.strided.as_ref().shape()
    }

    /// The stride of each axis, in elements.
    pub fn strides(&self) -> [isize; N] {
        *self.strided.as_ref().strides()
    }

    /// The same tensor with its axes in another order: axis `n` of the result is axis `axes[n]` of this one.
    ///
    /// # Errors
    /// [`Error::AxisOutOfRange`] if `axes` does not name every axis once.
    pub fn permuted(self, axes: [usize; N]) -> Result<Self, Error> {
        check_permutation(&axes)?;
        Ok(Self { strided: self.strided.permuted(axes) })
    }

    /// The indices `range` of one axis, as [`TensorRef::narrow`]. Elements outside are not written.
    ///
    /// # Errors
    /// As [`TensorRef::narrow`].
    ///
    /// The second sequence of a batch:
    ///
    /// ```
    /// use flashtile::TensorMut;
    ///
    /// let mut out = vec![0.0f32; 3 * 2 * 5 * 8];
    /// let second = TensorMut::from_slice(&mut out, [3, 2, 5, 8])?.narrow(0, 1..2)?;
    /// assert_eq!(second.shape(), [1, 2, 5, 8]);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn narrow(self, axis: usize, range: impl RangeBounds<usize>) -> Result<Self, Error> {
        let range = check_range(axis, range, &self.shape())?;
        Ok(Self { strided: self.strided.narrow(axis, range) })
    }

    /// The same tensor, borrowed for the lifetime of the result.
    pub fn reborrow(&mut self) -> TensorMut<'_, T, N> {
        TensorMut { strided: self.strided.reborrow() }
    }
}

/// The strides of a tensor without gaps over a whole slice of `len` elements.
fn contiguous_in<const N: usize>(len: usize, shape: &[usize; N]) -> Result<[isize; N], Error> {
    let (strides, expected) = contiguous(shape)?;
    if expected == len { Ok(strides) } else { Err(Error::SliceLength { expected, got: len }) }
}

/// Refuses `axes` that do not name each axis once. It has one entry for each axis.
pub(super) fn check_permutation(axes: &[usize]) -> Result<(), Error> {
    // The first entry that is too large, or equal to an earlier one.
    let wrong = (0..axes.len()).find(|&n| axes[n] >= axes.len() || axes[..n].contains(&axes[n]));
    wrong.map_or(Ok(()), |n| Err(Error::AxisOutOfRange { axis: axes[n] as i128, rank: axes.len() }))
}

/// The bounds of `range`, if it lies within the axis.
pub(crate) fn check_range(axis: usize, range: impl RangeBounds<usize>, shape: &[usize]) -> Result<Range<usize>, Error> {
    let size = *shape.get(axis).ok_or(Error::AxisOutOfRange { axis: axis as i128, rank: shape.len() })?;
    // `None` if the bound overflows: one more than usize::MAX.
    let start = match range.start_bound() {
        Bound::Included(&first) => Some(first),
        Bound::Excluded(&before) => before.checked_add(1),
        Bound::Unbounded => Some(0),
    };
    let end = match range.end_bound() {
        Bound::Included(&last) => last.checked_add(1),
        Bound::Excluded(&end) => Some(end),
        Bound::Unbounded => Some(size),
    };
    match (start, end) {
        (Some(start), Some(end)) if start <= end && end <= size => Ok(start..end),
        _ => {
            let (start, end) = (start.unwrap_or(usize::MAX), end.unwrap_or(usize::MAX));
            Err(Error::RangeOutOfBounds { axis, start, end, size })
        }
    }
}

macro_rules! insert_axis {
    ($($n:literal => $m:literal),+) => {$(
        impl<'a, T: Copy> TensorRef<'a, T, $n> {
            /// The same tensor with one more axis, of size 1, at `axis`: the axes from there on move back by one.
            ///
            /// # Errors
            /// [`Error::AxisOutOfRange`] if `axis` is above the number of axes there are.
            ///
            /// A single sequence, `[heads, seq, dim]`, as a batch of one:
            ///
            /// ```
            /// use flashtile::TensorRef;
            ///
            /// let data = vec![0.0f32; 2 * 3 * 8];
            /// let q = TensorRef::from_slice(&data, [2, 3, 8])?.insert_axis(0)?;
            /// assert_eq!(q.shape(), [1, 2, 3, 8]);
            /// # Ok::<(), flashtile::Error>(())
            /// ```
            pub fn insert_axis(self, axis: usize) -> Result<TensorRef<'a, T, $m>, Error> {
                Ok(TensorRef::new(self.strided.with_rank().permuted(first_axis_to(axis)?)))
            }
        }

        impl<'a, T: Copy> TensorMut<'a, T, $n> {
            /// The same tensor with one more axis, of size 1, at `axis`: the axes from there on move back by one.
            ///
            /// # Errors
            /// [`Error::AxisOutOfRange`] if `axis` is above the number of axes there are.
            pub fn insert_axis(self, axis: usize) -> Result<TensorMut<'a, T, $m>, Error> {
                Ok(TensorMut { strided: self.strided.with_rank().permuted(first_axis_to(axis)?) })
            }
        }
    )+};
}
insert_axis!(1 => 2, 2 => 3, 3 => 4);

/// The order of axes that moves the first one to `axis`.
fn first_axis_to<const N: usize>(axis: usize) -> Result<[usize; N], Error> {
    if axis >= N {
        return Err(Error::AxisOutOfRange { axis: axis as i128, rank: N });
    }
    let mut axes = std::array::from_fn(|n| n);
    axes[..=axis].rotate_left(1);
    Ok(axes)
}

impl<'a, T, const N: usize> From<&TensorRef<'a, T, N>> for TensorRef<'a, T, N> {
    fn from(tensor: &TensorRef<'a, T, N>) -> Self {
        TensorRef { strided: tensor.strided, rank: tensor.rank }
    }
}

/// The axes of a lower rank become the last axes, as in NumPy. The result keeps the original rank.
macro_rules! from_lower_rank {
    ($($n:literal),+) => {$(
        impl<'a, T> From<TensorRef<'a, T, $n>> for TensorRef<'a, T, 4> {
            fn from(tensor: TensorRef<'a, T, $n>) -> Self {
                TensorRef { strided: tensor.strided.with_rank(), rank: $n }
            }
        }
    )+};
}
from_lower_rank!(1, 2, 3);
