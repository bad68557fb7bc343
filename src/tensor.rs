//! What the user hands in: tensors as a borrow, a shape and signed strides.
//!
//! [`TensorRef`] is read, [`TensorMut`] is written. Both are made from slices, or from ndarray views, and refuse strides
//! that leave the slice. The innermost stride is best 1; every stride may be anything, negative and zero included, so
//! `[batch, heads, seq, dim]`, `[batch, seq, heads, dim]` and slices of a packed QKV buffer are all the same thing to the
//! crate.

pub(crate) mod any;
#[cfg(feature = "ndarray")]
mod from_ndarray;
pub(crate) mod group;
pub(crate) mod matrix;
pub(crate) mod strided;

use crate::error::Error;
use strided::{Strided, StridedMut, contiguous};

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
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a, T, const N: usize = 4> {
    pub(crate) strided: Strided<'a, T, N>,
}

/// A borrowed tensor of rank `N` that is written: no two indices share an element.
#[derive(Debug)]
pub struct TensorMut<'a, T, const N: usize = 4> {
    pub(crate) strided: StridedMut<'a, T, N>,
}

impl<'a, T: Copy, const N: usize> TensorRef<'a, T, N> {
    /// All of `data`, row by row without gaps, last axis innermost.
    ///
    /// # Errors
    /// [`Error::SliceLength`] if the shape has more or fewer elements than `data`; [`Error::TooLarge`].
    pub fn from_slice(data: &'a [T], shape: [usize; N]) -> Result<Self, Error> {
        let (strides, expected) = contiguous(&shape)?;
        if expected != data.len() {
            return Err(Error::SliceLength { expected, got: data.len() });
        }
        Self::with_strides(data, 0, shape, strides)
    }

    /// The element at index `i` is `data[offset + sum of i[axis] * strides[axis]]`; strides count elements.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if an index within the shape leads outside `data`. A shape with a zero has no elements, and
    /// its strides don't matter.
    pub fn with_strides(data: &'a [T], offset: usize, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        Ok(Self { strided: Strided::new(data, offset, shape, strides)? })
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
        check_permutation(axes)?;
        Ok(Self { strided: self.strided.permuted(axes) })
    }
}

impl<'a, T: Copy, const N: usize> TensorMut<'a, T, N> {
    /// All of `data`, row by row without gaps, last axis innermost.
    ///
    /// # Errors
    /// [`Error::SliceLength`] if the shape has more or fewer elements than `data`; [`Error::TooLarge`].
    pub fn from_slice(data: &'a mut [T], shape: [usize; N]) -> Result<Self, Error> {
        let (strides, expected) = contiguous(&shape)?;
        if expected != data.len() {
            return Err(Error::SliceLength { expected, got: data.len() });
        }
        Self::with_strides(data, 0, shape, strides)
    }

    /// The element at index `i` is `data[offset + sum of i[axis] * strides[axis]]`; strides count elements. Elements that
    /// no index reaches are left as they are.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if an index within the shape leads outside `data`; [`Error::OverlappingOutput`] if two may
    /// lead to one element.
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
        check_permutation(axes)?;
        Ok(Self { strided: self.strided.permuted(axes) })
    }

    /// The same tensor, borrowed for as long as the result lives.
    pub fn reborrow(&mut self) -> TensorMut<'_, T, N> {
        TensorMut { strided: self.strided.reborrow() }
    }
}

fn check_permutation<const N: usize>(axes: [usize; N]) -> Result<(), Error> {
    // The first axis that is too large, or that an earlier place already named.
    let wrong = (0..N).find(|&n| axes[n] >= N || axes[..n].contains(&axes[n]));
    wrong.map_or(Ok(()), |n| Err(Error::AxisOutOfRange { axis: axes[n], rank: N }))
}

/// Lower ranks stand for the last axes, as in NumPy: a `[seq_q, seq_kv]` mask holds for every batch and head.
macro_rules! from_lower_rank {
    ($($n:literal),+) => {$(
        impl<'a, T> From<TensorRef<'a, T, $n>> for TensorRef<'a, T, 4> {
            fn from(tensor: TensorRef<'a, T, $n>) -> Self {
                TensorRef { strided: tensor.strided.with_rank() }
            }
        }
    )+};
}
from_lower_rank!(1, 2, 3);
