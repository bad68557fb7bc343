//! An output that several threads write: rows go out for writing, and nothing is ever read.

use super::matrix::{RowAddresses, RowMut};
use super::strided::{StridedMut, offset_of, row_of};
use std::marker::PhantomData;
use std::ops::Range;

/// A tensor whose rows are shared out between threads.
///
/// Shape and addresses are for everybody. Elements are only written, by unsafe functions whose callers promise that each row
/// (or element) has one writer at a time. There is no way back to a tensor that is read, and none to one in which two
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

// SAFETY: this is a set of `&'a mut T` that is handed out by unsafe functions; whoever receives it in another thread can write
// (and so drop or take) elements there: that is sending them, which `T: Send` allows.
unsafe impl<T: Send, const N: usize> Send for SharedRows<'_, T, N> {}
// SAFETY: through a shared reference, safe code sees the shape and addresses alone. The unsafe functions give an element to one
// thread at a time, by their callers' promise: that is sending it, which `T: Send` allows. No two threads get `&T` to one element,
// so `T: Sync` isn't needed.
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

    /// Whether the elements of a row stand side by side.
    #[inline]
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.strides[N - 1] == 1 || self.shape[N - 1] <= 1
    }

    /// The innermost row at `index`, which names all axes but the last.
    ///
    /// # Panics
    /// If there is no such row.
    ///
    /// # Safety
    /// * while the result lives, nobody else has this row or writes an element of it
    #[inline]
    pub(crate) unsafe fn row_mut<'r, const OUTER: usize>(&self, index: [usize; OUTER]) -> RowMut<'r, T>
    where
        'a: 'r,
    {
        // SAFETY: the invariant has the elements and where they lie. For 'a, and so for 'r, they are reached through this value
        // alone, and of those who reach them through it nobody uses this row, by the caller's promise.
        unsafe { row_of(self.origin, &self.shape, &self.strides, index) }
    }

    /// Writes the element at `index`.
    ///
    /// # Panics
    /// If there is no such element.
    ///
    /// # Safety
    /// * meanwhile, nobody else writes this element or has the row that it is in
    #[inline]
    pub(crate) unsafe fn write(&self, index: [usize; N], value: T) {
        let element = self.origin.wrapping_offset(offset_of(index, &self.shape, &self.strides));
        // SAFETY: `offset_of` has found the index within the shape, so by the invariant the element may be written; nobody else
        // uses it, by the caller's promise.
        unsafe { element.write(value) };
    }
}

impl<T> SharedRows<'_, T> {
    /// Where some rows of `[i0, i1]` lie, for prefetching; `None` if their elements have gaps or there are none.
    ///
    /// # Panics
    /// If there are no such rows.
    pub(crate) fn addresses(&self, [i0, i1]: [usize; 2], rows: Range<usize>) -> Option<RowAddresses> {
        let [_, _, len, cols] = self.shape;
        assert!(rows.start <= rows.end && rows.end <= len, "rows {rows:?} of {len}");
        if rows.is_empty() || cols == 0 || !self.has_contiguous_rows() {
            return None;
        }
        let first = offset_of([i0, i1, rows.start, 0], &self.shape, &self.strides);
        Some(RowAddresses {
            first: self.origin.wrapping_offset(first).cast_const().cast(),
            rows: rows.len(),
            row_bytes: cols * size_of::<T>(),
            stride_bytes: self.strides[2].wrapping_mul(size_of::<T>() as isize),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two threads write the rows of a tensor with gaps and a backward axis, each its own; gaps stay as they are.
    #[test]
    fn threads_write_their_rows() {
        let mut data = [0u16; 2 * 3 * 20];
        // Element (b, h, i, e) is data[60 b - 20 h + 5 i + e + 40].
        let tensor = StridedMut::new(&mut data, 40, [2, 3, 4, 3], [60, -20, 5, 1]).unwrap();
        let shared = SharedRows::new(tensor);
        let write = |b: usize| {
            for (h, i) in (0..3).flat_map(|h| (0..4).map(move |i| (h, i))) {
                // SAFETY: each thread writes the rows of one b, one after the other.
                let row = unsafe { shared.row_mut([b, h, i]) };
                row.into_mut_slice().expect("no gaps").fill((100 * b + 10 * h + i + 1) as u16);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| write(0));
            write(1);
        });
        for (n, value) in data.into_iter().enumerate() {
            let (b, h, i, e) = (n / 60, 2 - n % 60 / 20, n % 20 / 5, n % 5);
            assert_eq!(value as usize, if e < 3 { 100 * b + 10 * h + i + 1 } else { 0 }, "element {n}");
        }
    }

    #[test]
    fn elements_are_written_alone() {
        let mut data = [0u16; 12];
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [1, 2, 3], [12, 6, 2]).unwrap());
        // SAFETY: one thread, one element at a time.
        (0..2).for_each(|h| (0..3).for_each(|i| unsafe { shared.write([0, h, i], (3 * h + i + 1) as u16) }));
        assert_eq!(data, [1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]);
    }

    #[test]
    #[should_panic(expected = "index [0, 2, 0] of shape [1, 2, 3]")]
    fn an_element_outside_is_not_written() {
        let mut data = [0u16; 12];
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [1, 2, 3], [12, 6, 2]).unwrap());
        // SAFETY: one thread, one element.
        unsafe { shared.write([0, 2, 0], 1) };
    }

    /// Addresses are those of the rows, and there are none where a prefetch would be of no use.
    #[test]
    fn addresses_of_rows() {
        let mut data = [0.0f32; 120];
        let first = data.as_ptr();
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [2, 3, 4, 3], [60, 20, 5, 1]).unwrap());
        let rows = shared.addresses([1, 2], 1..3).unwrap();
        assert_eq!((rows.first, rows.rows), (first.wrapping_add(60 + 2 * 20 + 5).cast(), 2));
        assert_eq!((rows.row_bytes, rows.stride_bytes), (12, 20));
        assert!(shared.addresses([1, 2], 4..4).is_none());
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [2, 3, 4, 3], [60, 20, 1, 5]).unwrap());
        assert!(shared.addresses([0, 0], 0..4).is_none(), "gaps");
        let shared = SharedRows::new(StridedMut::new(&mut data, 0, [1, 1, 4, 0], [0; 4]).unwrap());
        assert!(shared.addresses([0, 0], 0..4).is_none(), "no elements");
    }
}
