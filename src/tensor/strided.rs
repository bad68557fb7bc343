//! Memory with a shape and strides. Indices become addresses here.
//!
//! [`Strided`] is a pointer that is checked once, when it is made: every index inside its shape leads to a live element. The
//! layers below read and write through a [`Matrix`] or a row cut from it. Index checks there are cheap, because there is one
//! for each row and not for each element.

use super::matrix::{Matrix, RowMut};
use crate::error::Error;
use std::marker::PhantomData;
use std::ops::Range;

/// A pointer to the element at index 0 of every axis, with the size and the stride (in elements) of each axis.
///
/// Invariant: every index within `shape` leads, by `strides`, to an initialised element of one allocation that stays readable
/// for `'a`, as if there were a `&'a T` to each of them. `origin` is aligned, also where there are no elements.
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

// SAFETY: a `Strided` is a set of `&'a T` (the invariant), and safe code gets nothing else from it: it is only read. `&'a T`
// may go to another thread if `T: Sync`. (`StridedMut` and `SharedRows`, which write, have bounds of their own.)
unsafe impl<T: Sync, const N: usize> Send for Strided<'_, T, N> {}
// SAFETY: it is `Copy`, so sharing it between threads allows what sending it does, and no more.
unsafe impl<T: Sync, const N: usize> Sync for Strided<'_, T, N> {}

/// The lowest and highest element that shape and strides reach, counted from index 0; `None` if there are no elements.
///
/// It computes in i128, where the product of a usize and an isize can't overflow. Sums saturate at the end of the range, far
/// outside any slice, because a sum that wrapped around could seem to be inside.
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
    // A dimension of 0 makes the array empty, even if other dimensions are large.
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

/// The offset of the element at `index` from the one at index 0, in elements.
///
/// # Panics
/// If the index is not within the shape.
#[inline]
pub(super) fn offset_of<const N: usize>(index: [usize; N], shape: &[usize; N], strides: &[isize; N]) -> isize {
    let mut offset = 0isize;
    for axis in 0..N {
        assert!(index[axis] < shape[axis], "index {index:?} of shape {shape:?}");
        // No overflow: the element lies inside the allocation.
        offset = offset.wrapping_add((index[axis] as isize).wrapping_mul(strides[axis]));
    }
    offset
}

impl<'a, T, const N: usize> Strided<'a, T, N> {
    /// The elements of `data` at `shape` and `strides`, with index 0 at `offset`.
    pub(crate) fn new(data: &'a [T], offset: usize, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        Self::check(data.len(), offset, &shape, &strides)?;
        // SAFETY: `check` has found every index within the shape inside `data`, which is borrowed for 'a. The pointer of a
        // slice is aligned, and so is one that is whole elements away.
        Ok(unsafe { Self::from_checked(data.as_ptr().wrapping_add(offset), shape, strides) })
    }

    /// The same element at every index.
    pub(crate) fn repeated(element: &'a T, shape: [usize; N]) -> Self {
        // SAFETY: with strides of 0, every index leads to that element.
        unsafe { Self::from_checked(element, shape, [0; N]) }
    }

    fn check(len: usize, offset: usize, shape: &[usize; N], strides: &[isize; N]) -> Result<(), Error> {
        let Some((first, last)) = reach(shape, strides) else { return Ok(()) };
        let (first, last) = (first.saturating_add(offset as i128), last.saturating_add(offset as i128));
        if first < 0 || last >= len as i128 {
            return Err(Error::OutOfBounds { first, last, len });
        }
        Ok(())
    }

    /// # Safety
    /// * every index within `shape` leads, by `strides`, to an initialised element of one allocation
    /// * for `'a` these elements stay readable, and they are not written, except through the result if it is made part of a
    ///   [`StridedMut`]
    /// * `origin` is aligned, also where there are no elements
    #[inline]
    unsafe fn from_checked(origin: *const T, shape: [usize; N], strides: [isize; N]) -> Self {
        Self { origin, shape, strides, borrow: PhantomData }
    }

    /// The elements of an ndarray view, which has the same invariant.
    #[cfg(feature = "ndarray")]
    pub(crate) fn from_ndarray<D: ndarray::Dimension>(view: ndarray::ArrayView<'a, T, D>) -> Self {
        let shape = std::array::from_fn(|axis| view.shape()[axis]);
        let strides = std::array::from_fn(|axis| view.strides()[axis]);
        // SAFETY: an `ArrayView<'a>` promises the same: its pointer is aligned, and every index within its shape leads, by its
        // strides, to an element that is borrowed for 'a.
        unsafe { Self::from_checked(view.as_ptr(), shape, strides) }
    }

    pub(crate) fn shape(&self) -> &[usize; N] {
        &self.shape
    }

    pub(crate) fn strides(&self) -> &[isize; N] {
        &self.strides
    }

    /// Refuses strides that let two indices reach one element.
    ///
    /// With axes sorted by stride, the stride of each axis must be larger than the reach of the axes before it. Every sliced,
    /// permuted or padded array fulfils this. Some contrived strides without overlap are refused.
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
        // SAFETY: every axis is in `axes` once (asserted above), so the result's indices are this tensor's, reordered.
        unsafe { Self::from_checked(self.origin, shape, strides) }
    }

    /// Indices `range.start` to `range.end` of one axis.
    ///
    /// # Panics
    /// If there is no such axis, or there are no such indices.
    #[inline]
    pub(crate) fn narrow(self, axis: usize, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.shape[axis],
            "{range:?} of axis {axis} of {:?}",
            self.shape
        );
        let mut shape = self.shape;
        shape[axis] = range.len();
        // Without elements the pointer stays, because there is no address to move to.
        let start = if shape.contains(&0) { 0 } else { range.start };
        let origin = self.origin.wrapping_offset((start as isize).wrapping_mul(self.strides[axis]));
        // SAFETY: index i of the axis is index `start + i` of this tensor, which is within its shape (asserted above). The new
        // pointer is aligned, because it is whole elements away from an aligned one.
        unsafe { Self::from_checked(origin, shape, self.strides) }
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
        // SAFETY: an axis that keeps its size keeps its stride. One that is repeated had size 1 and gets stride 0: all its
        // indices lead where index 0 led. (An axis of size 1 that becomes 0 leaves no index.)
        Some(unsafe { Self::from_checked(self.origin, shape, strides) })
    }

    /// The same memory as elements of type `U`.
    ///
    /// # Safety
    /// * `U` has the size and alignment of `T`, and every bit pattern in this tensor is a value of `U`
    pub(crate) unsafe fn cast<U>(self) -> Strided<'a, U, N> {
        // SAFETY: the invariant says that elements of `T` are there; that they are values of `U`, of the same size and
        // alignment, is the caller's promise.
        unsafe { Strided::from_checked(self.origin.cast(), self.shape, self.strides) }
    }

    /// The same elements with axes of size 1 in front.
    pub(crate) fn with_rank<const M: usize>(self) -> Strided<'a, T, M> {
        const { assert!(N <= M) };
        let shape = std::array::from_fn(|axis| if axis < M - N { 1 } else { self.shape[axis + N - M] });
        let strides = std::array::from_fn(|axis| if axis < M - N { 0 } else { self.strides[axis + N - M] });
        // SAFETY: an axis in front has the index 0 alone, which adds nothing; the others are those of this tensor.
        unsafe { Strided::from_checked(self.origin, shape, strides) }
    }

    /// The address of an element.
    ///
    /// # Panics
    /// If the index is not within the shape.
    #[inline]
    fn at(&self, index: [usize; N]) -> *const T {
        self.origin.wrapping_offset(offset_of(index, &self.shape, &self.strides))
    }

    /// The element at `index`; `None` outside the shape.
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
        // SAFETY: a bool has the size and alignment of a byte, and both of its bit patterns are bytes.
        unsafe { self.cast() }
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

/// A [`Strided`] for exclusive reading and writing, in which each index leads to an element of its own.
///
/// Invariant: that of [`Strided`], and the pointer may write; no two indices lead to one element; all access to the elements
/// for `'a` is through this value, as if it held a `&'a mut T` to each of them. The [`Strided`] inside is copied only into
/// values that borrow or replace this one.
#[derive(Debug)]
pub(crate) struct StridedMut<'a, T, const N: usize> {
    strided: Strided<'a, T, N>,
    exclusive: PhantomData<&'a mut T>,
}

impl<'a, T, const N: usize> StridedMut<'a, T, N> {
    /// As [`Strided::new`]; refuses strides that may let two indices reach one element.
    pub(crate) fn new(data: &'a mut [T], offset: usize, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        Strided::<T, N>::check(data.len(), offset, &shape, &strides)?;
        // SAFETY: `check` has found every index within the shape inside `data`, which is borrowed mutably for 'a: only the
        // result reaches it. The pointer of a slice is aligned, and so is one that is whole elements away; it comes from a
        // mutable borrow, so it may write.
        let strided = unsafe { Strided::from_checked(data.as_mut_ptr().wrapping_add(offset), shape, strides) };
        strided.check_disjoint()?;
        Ok(Self { strided, exclusive: PhantomData })
    }

    /// The elements of an ndarray view, which has the same invariant.
    #[cfg(feature = "ndarray")]
    pub(crate) fn from_ndarray<D: ndarray::Dimension>(mut view: ndarray::ArrayViewMut<'a, T, D>) -> Self {
        let shape = std::array::from_fn(|axis| view.shape()[axis]);
        let strides = std::array::from_fn(|axis| view.strides()[axis]);
        // SAFETY: an `ArrayViewMut<'a>` promises the same, and that its indices lead to an element each, borrowed mutably for
        // 'a. It is consumed here, so only the result reaches them.
        let strided = unsafe { Strided::from_checked(view.as_mut_ptr(), shape, strides) };
        Self { strided, exclusive: PhantomData }
    }

    /// A shared borrow, for reading.
    pub(crate) fn as_ref(&self) -> &Strided<'_, T, N> {
        &self.strided
    }

    pub(crate) fn permuted(self, axes: [usize; N]) -> Self {
        Self { strided: self.strided.permuted(axes), exclusive: PhantomData }
    }

    /// As [`Strided::narrow`]: some of the indices lead to an element each, because all of them do.
    pub(crate) fn narrow(self, axis: usize, range: Range<usize>) -> Self {
        Self { strided: self.strided.narrow(axis, range), exclusive: PhantomData }
    }

    /// The indices of one axis before `index`, and the others. No index of one part is an index of the other.
    ///
    /// # Panics
    /// If the axis has fewer indices.
    pub(crate) fn split_at(self, axis: usize, index: usize) -> (Self, Self) {
        let (strided, len) = (self.strided, self.strided.shape[axis]);
        let part = |range| Self { strided: strided.narrow(axis, range), exclusive: PhantomData };
        (part(0..index), part(index..len))
    }

    /// As [`Strided::with_rank`]: an axis of size 1 adds no index.
    pub(crate) fn with_rank<const M: usize>(self) -> StridedMut<'a, T, M> {
        StridedMut { strided: self.strided.with_rank(), exclusive: PhantomData }
    }

    pub(crate) fn reborrow(&mut self) -> StridedMut<'_, T, N> {
        StridedMut { strided: self.strided, exclusive: PhantomData }
    }

    /// The same memory as elements of type `U`.
    ///
    /// # Safety
    /// * `T` and `U` are the same type
    pub(crate) unsafe fn cast<U>(self) -> StridedMut<'a, U, N> {
        // SAFETY: of the same type, they have the same size, alignment and values.
        StridedMut { strided: unsafe { self.strided.cast() }, exclusive: PhantomData }
    }

    /// The pointer, which may write, the shape and the strides: the subjects of the invariant.
    pub(super) fn into_parts(self) -> (*mut T, [usize; N], [isize; N]) {
        (self.strided.origin.cast_mut(), self.strided.shape, self.strided.strides)
    }

    /// The innermost row at `index`, which names all axes but the last.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline]
    pub(crate) fn row_mut<const OUTER: usize>(&mut self, index: [usize; OUTER]) -> RowMut<'_, T> {
        let Strided { origin, shape, strides, .. } = self.strided;
        // SAFETY: the invariant of this type, and `self` is borrowed mutably for as long as the row lives.
        unsafe { row_of(origin.cast_mut(), &shape, &strides, index) }
    }
}

/// The innermost row at `index`, which names all axes but the last.
///
/// # Panics
/// If there is no such row.
///
/// # Safety
/// * every index within `shape` leads, by `strides`, from `origin` to an initialised element that may be written
/// * no two indices lead to one element
/// * while the result lives, the elements of this row are read and written only through it
#[inline]
pub(super) unsafe fn row_of<'r, T, const N: usize, const OUTER: usize>(
    origin: *mut T,
    shape: &[usize; N],
    strides: &[isize; N],
    index: [usize; OUTER],
) -> RowMut<'r, T> {
    const { assert!(OUTER + 1 == N) };
    let len = shape[OUTER];
    let mut first = [0; N];
    first[..OUTER].copy_from_slice(&index);
    let start = if len == 0 { origin } else { origin.wrapping_offset(offset_of(first, shape, strides)) };
    // SAFETY: `offset_of` has found the row's first element within the shape, so the others, a stride of the last axis apart,
    // are within it, too. They may be read and written, and only through the result, by the caller's promise.
    unsafe { RowMut::from_parts(start, len, strides[OUTER]) }
}

/// Constructors from pointers, for callers that have no slice. Memory from C counts as initialised: Rust can't tell what C has
/// written to it, so its bytes have values, though unknown ones.
#[cfg(feature = "capi")]
impl<'a, T, const N: usize> Strided<'a, T, N> {
    /// # Safety
    /// * every index within `shape` leads to an element that stays readable for `'a`, and that is not written for `'a`
    /// * `origin` is aligned, also where there are no elements
    /// * from the first element to the end of the last there are no more than `isize::MAX` bytes, of one allocation
    pub(crate) unsafe fn from_pointer(origin: *const T, shape: [usize; N], strides: [isize; N]) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::from_checked(origin, shape, strides) }
    }

    /// The element at index 0 of every axis.
    pub(crate) fn origin(&self) -> *const T {
        self.origin
    }
}

#[cfg(feature = "capi")]
impl<'a, T, const N: usize> StridedMut<'a, T, N> {
    /// Refuses strides that may let two indices reach one element.
    ///
    /// # Safety
    /// * every index within `shape` leads to an element that may be written, and that is read and written only through the
    ///   result for `'a`
    /// * `origin` is aligned, also where there are no elements
    /// * from the first element to the end of the last there are no more than `isize::MAX` bytes, of one allocation
    pub(crate) unsafe fn from_pointer(origin: *mut T, shape: [usize; N], strides: [isize; N]) -> Result<Self, Error> {
        // SAFETY: the caller's promise; only the result reaches the elements, and the pointer may write.
        let strided = unsafe { Strided::from_checked(origin.cast_const(), shape, strides) };
        strided.check_disjoint()?;
        Ok(Self { strided, exclusive: PhantomData })
    }
}

/// Blocks without gaps: all elements of the axes from `axis` on, at one index of those before.
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

impl<T> StridedMut<'_, T, 4> {
    /// # Panics
    /// As [`Strided::block`].
    pub(crate) fn dense_block_mut(&mut self, outer: [usize; 4], axis: usize) -> &mut [T] {
        let (first, len) = self.strided.block(outer, axis);
        // SAFETY: elements side by side, and for us alone as long as `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(first.cast_mut(), len) }
    }
}
