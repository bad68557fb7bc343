//! Memory with a shape and strides: the one place where an index becomes an address.
//!
//! [`Strided`] is a pointer that has been checked once, when it was made: every index inside its shape leads to a live
//! element. All that is read or written further down goes through a [`Matrix`] or [`Row`] cut from it, by index checks
//! that are cheap because there is one for each row and not for each element.

use super::matrix::{Matrix, RowMut};
use crate::error::Error;
use std::marker::PhantomData;

/// A pointer to the element at index 0 of every axis, with the size and the stride (in elements) of each axis.
///
/// Invariant: every index within `shape` leads to an element that stays readable for `'a`.
#[derive(Debug)]
pub(crate) struct Strided<'a, T, const N: usize> {
    origin: *const T,
    shape: [usize; N],
    strides: [isize; N],
    borrow: PhantomData<&'a T>,
}

impl<T, const N: usize> Clone for Strided<'_, T, N> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, const N: usize> Copy for Strided<'_, T, N> {}

// SAFETY: safe code gets nothing from it but what `&'a T` would give. (What `row_mut` and `write` hand out was a `StridedMut` of
// elements that are `Send`: `into_shared`.)
unsafe impl<T: Sync, const N: usize> Send for Strided<'_, T, N> {}
// SAFETY: as above.
unsafe impl<T: Sync, const N: usize> Sync for Strided<'_, T, N> {}

/// The lowest and highest element that shape and strides reach, counted from index 0; `None` if there are no elements.
///
/// In i128, where the product of a usize and an isize can't overflow, and with sums that stay at the end of its range, far
/// outside any slice: a sum that wrapped around could look as if it were inside.
pub(crate) fn reach<const N: usize>(shape: &[usize; N], strides: &[isize; N]) -> Option<(i128, i128)> {
    let (mut first, mut last) = (0i128, 0i128);
    for (&size, &stride) in shape.iter().zip(strides) {
        let end = (size as i128 - 1) * stride as i128;
        if size == 0 {
            return None;
        }
        first = first.saturating_add(end.min(0));
        last = last.saturating_add(end.max(0));
    }
    Some((first, last))
}

/// Strides of an array without gaps, last axis innermost, and its number of elements.
pub(crate) fn contiguous<const N: usize>(shape: &[usize; N]) -> Result<([isize; N], usize), Error> {
    // A dimension of 0 makes the array empty, however large the others are.
    if shape.contains(&0) {
        return Ok(([0; N], 0));
    }
    let mut strides = [0; N];
    let mut len = 1usize;
    for axis in (0..N).rev() {
        strides[axis] = isize::try_from(len).map_err(|_| Error::TooLarge { what: "the tensor" })?;
        len = len.checked_mul(shape[axis]).ok_or(Error::TooLarge { what: "the tensor" })?;
    }
    Ok((strides, len))
}

impl<'a, T, const N: usize> Strided<'a, T, N> {
    /// The elements of `data` from `offset` on, as shape and strides say.
    pub(crate) fn new(data: &'a [T], offset: usize, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        Self::check(data.len(), offset, &shape, &strides)?;
        Ok(Self::from_checked(data.as_ptr().wrapping_add(offset), shape, strides))
    }

    fn check(len: usize, offset: usize, shape: &[usize; N], strides: &[isize; N]) -> Result<(), Error> {
        let Some((first, last)) = reach(shape, strides) else { return Ok(()) };
        let (first, last) = (first.saturating_add(offset as i128), last.saturating_add(offset as i128));
        if first < 0 || last >= len as i128 {
            return Err(Error::OutOfBounds { first, last, len });
        }
        Ok(())
    }

    fn from_checked(origin: *const T, shape: [usize; N], strides: [isize; N]) -> Self {
        Self { origin, shape, strides, borrow: PhantomData }
    }

    /// The same elements as an ndarray view, whose own invariant is ours.
    #[cfg(feature = "ndarray")]
    pub(crate) fn from_ndarray<D: ndarray::Dimension>(view: ndarray::ArrayView<'a, T, D>) -> Self {
        let shape = std::array::from_fn(|axis| view.shape()[axis]);
        let strides = std::array::from_fn(|axis| view.strides()[axis]);
        Self::from_checked(view.as_ptr(), shape, strides)
    }

    pub(crate) fn shape(&self) -> &[usize; N] {
        &self.shape
    }

    pub(crate) fn strides(&self) -> &[isize; N] {
        &self.strides
    }

    /// Refuses strides that let two indices reach one element.
    ///
    /// Sorted by stride, each axis must step over all that the shorter ones reach. That is more than needed in contrived
    /// cases, and what every sliced, permuted or padded array fulfils.
    fn check_disjoint(&self) -> Result<(), Error> {
        if self.shape.contains(&0) {
            return Ok(());
        }
        let mut axes: [usize; N] = std::array::from_fn(|axis| axis);
        axes.sort_unstable_by_key(|&axis| self.strides[axis].unsigned_abs());
        let mut needed = 1usize;
        for axis in axes.into_iter().filter(|&axis| self.shape[axis] > 1) {
            let stride = self.strides[axis];
            if stride.unsigned_abs() < needed {
                return Err(Error::OverlappingOutput { axis, stride, needed });
            }
            // No overflow: the whole reach lies inside one allocation.
            needed += (self.shape[axis] - 1) * stride.unsigned_abs();
        }
        Ok(())
    }

    /// The same elements with the axes in another order.
    pub(crate) fn permuted(self, axes: [usize; N]) -> Self {
        let shape = axes.map(|axis| self.shape[axis]);
        let strides = axes.map(|axis| self.strides[axis]);
        let mut seen = [false; N];
        axes.into_iter().for_each(|axis| seen[axis] = true);
        assert!(seen.iter().all(|&seen| seen), "an axis twice");
        Self::from_checked(self.origin, shape, strides)
    }

    /// Repeats axes of size 1 up to `shape`; `None` if another axis differs.
    pub(crate) fn broadcast(self, shape: [usize; N]) -> Option<Self> {
        let mut strides = self.strides;
        for axis in 0..N {
            match self.shape[axis] {
                size if size == shape[axis] => {}
                1 => strides[axis] = 0,
                _ => return None,
            }
        }
        // Safe without a look at the memory: the same elements, or none.
        Some(Self::from_checked(self.origin, shape, strides))
    }

    /// The same memory as elements of type `U`.
    ///
    /// # Safety
    /// * `U` has the size and alignment of `T`, and every bit pattern in this tensor is a value of `U`
    pub(crate) unsafe fn cast<U>(self) -> Strided<'a, U, N> {
        Strided::from_checked(self.origin.cast(), self.shape, self.strides)
    }

    /// The same elements with axes of size 1 in front.
    pub(crate) fn with_rank<const M: usize>(self) -> Strided<'a, T, M> {
        const { assert!(N <= M) };
        let shape = std::array::from_fn(|axis| if axis < M - N { 1 } else { self.shape[axis + N - M] });
        let strides = std::array::from_fn(|axis| if axis < M - N { 0 } else { self.strides[axis + N - M] });
        Strided::from_checked(self.origin, shape, strides)
    }

    /// The address of an element.
    ///
    /// # Panics
    /// If the index is not within the shape.
    #[inline]
    fn at(&self, index: [usize; N]) -> *const T {
        let mut offset = 0isize;
        for axis in 0..N {
            assert!(index[axis] < self.shape[axis], "index {index:?} of shape {:?}", self.shape);
            // No overflow: the element lies inside the allocation.
            offset = offset.wrapping_add((index[axis] as isize).wrapping_mul(self.strides[axis]));
        }
        self.origin.wrapping_offset(offset)
    }

    /// The element at `index`, if there is one.
    pub(crate) fn get(&self, index: [usize; N]) -> Option<T>
    where
        T: Copy,
    {
        let inside = index.iter().zip(&self.shape).all(|(index, size)| index < size);
        // SAFETY: the index is within the shape, so the invariant says that the element may be read.
        inside.then(|| unsafe { *self.at(index) })
    }
}

impl<'a, const N: usize> Strided<'a, bool, N> {
    /// The same elements as bytes: 0 for false, 1 for true.
    pub(crate) fn into_bytes(self) -> Strided<'a, u8, N> {
        // A bool is a byte, so the invariant holds for bytes.
        Strided::from_checked(self.origin.cast(), self.shape, self.strides)
    }
}

impl<'a, T> Strided<'a, T, 3> {
    /// The same elements with an axis of size 1 behind.
    pub(crate) fn with_last_axis(&self) -> Strided<'a, T, 4> {
        let ([a, b, c], [x, y, z]) = (self.shape, self.strides);
        Strided::from_checked(self.origin, [a, b, c, 1], [x, y, z, 1])
    }
}

impl<'a, T> Strided<'a, T, 4> {
    /// The last two axes at `[i0, i1]`.
    ///
    /// # Panics
    /// If there are no such indices.
    #[inline]
    pub(crate) fn matrix(&self, i0: usize, i1: usize) -> Matrix<'a, T> {
        let [_, _, rows, cols] = self.shape;
        let [_, _, row_stride, col_stride] = self.strides;
        let origin = if rows == 0 || cols == 0 { self.origin } else { self.at([i0, i1, 0, 0]) };
        // SAFETY: the invariant of `Strided`: every index within the last two axes leads to an element that is readable for `'a`.
        unsafe { Matrix::from_parts(origin, [rows, cols], [row_stride, col_stride]) }
    }
}

/// A [`Strided`] that nobody else reads or writes for `'a`, and whose indices lead to an element each.
#[derive(Debug)]
pub(crate) struct StridedMut<'a, T, const N: usize> {
    strided: Strided<'a, T, N>,
    exclusive: PhantomData<&'a mut T>,
}

impl<'a, T, const N: usize> StridedMut<'a, T, N> {
    /// As [`Strided::new`]; refuses strides that may let two indices reach one element.
    pub(crate) fn new(data: &'a mut [T], offset: usize, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        Strided::<T, N>::check(data.len(), offset, &shape, &strides)?;
        // The pointer is taken from a mutable borrow, so it may write.
        let strided = Strided::from_checked(data.as_mut_ptr().wrapping_add(offset), shape, strides);
        strided.check_disjoint()?;
        Ok(Self { strided, exclusive: PhantomData })
    }

    /// The same elements as an ndarray view, which vouches for both.
    #[cfg(feature = "ndarray")]
    pub(crate) fn from_ndarray<D: ndarray::Dimension>(mut view: ndarray::ArrayViewMut<'a, T, D>) -> Self {
        let shape = std::array::from_fn(|axis| view.shape()[axis]);
        let strides = std::array::from_fn(|axis| view.strides()[axis]);
        let strided = Strided::from_checked(view.as_mut_ptr(), shape, strides);
        Self { strided, exclusive: PhantomData }
    }

    /// For reading, no longer than it is borrowed.
    pub(crate) fn as_ref(&self) -> &Strided<'_, T, N> {
        &self.strided
    }

    pub(crate) fn permuted(self, axes: [usize; N]) -> Self {
        Self { strided: self.strided.permuted(axes), exclusive: PhantomData }
    }

    pub(crate) fn reborrow(&mut self) -> StridedMut<'_, T, N> {
        StridedMut { strided: self.strided, exclusive: PhantomData }
    }

    /// Gives up the claim to be alone, to share the rows out between threads, which then write them; see
    /// [`Strided::row_mut`].
    pub(crate) fn into_shared(self) -> Strided<'a, T, N>
    where
        T: Send,
    {
        self.strided
    }
}

macro_rules! rows_of_rank {
    ($($n:literal $outer:literal),+) => {$(
        impl<'a, T> Strided<'a, T, $n> {
            /// The innermost row at `index`, for writing.
            ///
            /// # Panics
            /// If there is no such row.
            ///
            /// # Safety
            /// * this was a [`StridedMut`], and nobody else holds it but those who share it out by rows
            /// * while the result lives, nobody else reads or writes this row
            #[inline]
            pub(crate) unsafe fn row_mut<'r>(&self, index: [usize; $outer]) -> RowMut<'r, T>
            where
                'a: 'r,
            {
                let len = self.shape[$outer];
                let mut first = [0; $n];
                first[..$outer].copy_from_slice(&index);
                let origin = if len == 0 { self.origin } else { self.at(first) };
                // SAFETY: the invariant of `Strided`, and the caller's promise that nobody else uses the row.
                unsafe { RowMut::from_parts(origin.cast_mut(), len, self.strides[$outer]) }
            }
        }

        impl<T> StridedMut<'_, T, $n> {
            /// The innermost row at `index`, for writing.
            ///
            /// # Panics
            /// If there is no such row.
            #[inline]
            pub(crate) fn row_mut(&mut self, index: [usize; $outer]) -> RowMut<'_, T> {
                // SAFETY: the invariant of this type, and `self` is borrowed mutably for as long as the row lives.
                unsafe { self.strided.row_mut(index) }
            }
        }
    )+};
}
rows_of_rank!(3 2, 4 3);

/// For callers that have a pointer and no slice.
#[cfg(feature = "capi")]
impl<'a, T, const N: usize> Strided<'a, T, N> {
    /// # Safety
    /// * every index within `shape` leads to an element that stays readable for `'a`, and that nobody writes to
    /// * `origin` is aligned, also where there are no elements
    /// * from the first element to the end of the last there are no more than `isize::MAX` bytes
    pub(crate) unsafe fn from_pointer(origin: *const T, shape: [usize; N], strides: [isize; N]) -> Self {
        Self::from_checked(origin, shape, strides)
    }
}

#[cfg(feature = "capi")]
impl<'a, T, const N: usize> StridedMut<'a, T, N> {
    /// Refuses strides that may let two indices reach one element.
    ///
    /// # Safety
    /// * every index within `shape` leads to an element that may be written, and that nobody else reads or writes for `'a`
    /// * `origin` is aligned, also where there are no elements
    /// * from the first element to the end of the last there are no more than `isize::MAX` bytes
    pub(crate) unsafe fn from_pointer(origin: *mut T, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        let strided = Strided::from_checked(origin.cast_const(), shape, strides);
        strided.check_disjoint()?;
        Ok(Self { strided, exclusive: PhantomData })
    }
}

/// Blocks without gaps: all elements of the axes from `axis` on, at one index of those before.
#[cfg(feature = "capi")]
impl<'a, T> Strided<'a, T, 4> {
    /// Whether the blocks are without gaps, last axis innermost.
    pub(crate) fn is_dense_from(&self, axis: usize) -> bool {
        let mut expected = 1;
        (axis..4).rev().all(|axis| {
            let fits = self.shape[axis] == 1 || self.strides[axis] == expected;
            expected = expected.wrapping_mul(self.shape[axis] as isize);
            fits
        })
    }

    /// Address and length of the block at `outer`, 0 from `axis` on.
    ///
    /// # Panics
    /// If the blocks have gaps or no elements, or if there is no such block.
    fn block(&self, outer: [usize; 4], axis: usize) -> (*const T, usize) {
        assert!(self.is_dense_from(axis) && outer[axis..].iter().all(|&index| index == 0), "block at {outer:?}");
        (self.at(outer), self.shape[axis..].iter().product())
    }

    /// # Panics
    /// As [`Strided::block`].
    pub(crate) fn dense_block(&self, outer: [usize; 4], axis: usize) -> &'a [T] {
        let (first, len) = self.block(outer, axis);
        // SAFETY: the invariant: elements side by side, readable for 'a.
        unsafe { std::slice::from_raw_parts(first, len) }
    }
}

#[cfg(feature = "capi")]
impl<T> StridedMut<'_, T, 4> {
    /// # Panics
    /// As [`Strided::block`].
    pub(crate) fn dense_block_mut(&mut self, outer: [usize; 4], axis: usize) -> &mut [T] {
        let (first, len) = self.strided.block(outer, axis);
        // SAFETY: elements side by side, and for us alone as long as `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(first.cast_mut(), len) }
    }
}
