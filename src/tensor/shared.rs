//! An output that several threads write. Rows are handed out for writing, and nothing is read.

use super::strided::StridedMut;
use std::marker::PhantomData;
use std::ops::Range;

/// A tensor whose rows are divided between threads.
///
/// Elements are reached only through [`GroupRowsMut`](super::group::GroupRowsMut), whose constructors are unsafe: their callers
/// promise that each row has one holder at a time. It can't be converted to a tensor that is read, or to one in which two
/// indices lead to one element.
///
/// Invariant: every index within `shape` leads, by `strides`, to an initialised element that may be written, no two of them to
/// one element; for `'a`, all access to the elements is through this value.
#[derive(Debug)]
pub(crate) struct SharedRows<'a, T, const N: usize = 4> {
    origin: *mut T,
    shape: [usize; N],
    strides: [isize; N],
    exclusive: PhantomData<&'a mut T>,
}

// SAFETY: this is a set of `&'a mut T` that is handed out by unsafe functions. Another thread that receives it can write
// elements, and so drop or take them: that is sending them, which `T: Send` allows.
unsafe impl<T: Send, const N: usize> Send for SharedRows<'_, T, N> {}
// SAFETY: through a shared reference, safe code reaches the shape and addresses alone. The unsafe functions give an element to
// one thread at a time, by their callers' promise: that is sending it, which `T: Send` allows. No two threads get `&T` to one
// element, so `T: Sync` isn't needed.
unsafe impl<T: Send, const N: usize> Sync for SharedRows<'_, T, N> {}

impl<'a, T, const N: usize> SharedRows<'a, T, N> {
    pub(crate) fn new(tensor: StridedMut<'a, T, N>) -> Self {
        // The invariant of a `StridedMut` is ours, and it is consumed.
        let (origin, shape, strides) = tensor.into_parts();
        SharedRows { origin, shape, strides, exclusive: PhantomData }
    }

    #[inline]
    pub(crate) fn shape(&self) -> &[usize; N] {
        &self.shape
    }

    #[inline]
    pub(crate) fn strides(&self) -> &[isize; N] {
        &self.strides
    }

    /// The address of the first element of the heads `heads` of batch `b`, which are indices of the first two axes. Without
    /// elements, it is any address.
    ///
    /// # Panics
    /// If there is no such batch, or are no such heads.
    pub(super) fn first_of(&self, b: usize, heads: Range<usize>) -> *mut T {
        assert!(
            b < self.shape[0] && heads.start < heads.end && heads.end <= self.shape[1],
            "heads {heads:?} of batch {b}"
        );
        let offset = |axis: usize, index: usize| (index as isize).wrapping_mul(self.strides[axis]);
        self.origin.wrapping_offset(offset(0, b).wrapping_add(offset(1, heads.start)))
    }
}
