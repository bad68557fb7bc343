//! The same tensor in different layouts, with known contents of the gaps.

use flashtile::{TensorMut, TensorRef};

/// A way to lay out a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row after row.
    Dense,
    /// A gap of this many elements after each row but the last.
    RowGaps(usize),
    /// Every stride negative: the last element comes first.
    Reversed,
    /// Every other element is a gap.
    Spread,
    /// The second axis inside the third: `[batch, seq, heads, dim]`.
    Swapped,
}

pub const LAYOUTS: [Layout; 5] = [Layout::Dense, Layout::RowGaps(3), Layout::Reversed, Layout::Spread, Layout::Swapped];

/// A layout of a shape: offset of the first element, strides, and how many elements lie from the first to the last.
#[derive(Clone, Copy, Debug)]
pub struct Laid<const N: usize> {
    pub shape: [usize; N],
    pub offset: usize,
    pub strides: [isize; N],
    pub len: usize,
}

impl Layout {
    pub fn of<const N: usize>(self, shape: [usize; N]) -> Laid<N> {
        let mut order: [usize; N] = std::array::from_fn(|axis| axis); // outermost first
        if self == Layout::Swapped && N >= 3 {
            order.swap(N - 3, N - 2);
        }
        let mut strides = [0isize; N];
        let mut next = if self == Layout::Spread { 2 } else { 1 };
        for (n, &axis) in order.iter().enumerate().rev() {
            strides[axis] = next;
            next *= shape[axis] as isize;
            if let (Layout::RowGaps(gap), true) = (self, n == N - 1) {
                next += gap as isize;
            }
        }
        if shape.contains(&0) {
            return Laid { shape, offset: 0, strides, len: 0 };
        }
        let reach: usize = shape.iter().zip(strides).map(|(&size, stride)| (size - 1) * stride as usize).sum();
        if self == Layout::Reversed {
            return Laid { shape, offset: reach, strides: strides.map(|stride| -stride), len: reach + 1 };
        }
        Laid { shape, offset: 0, strides, len: reach + 1 }
    }
}

impl<const N: usize> Laid<N> {
    /// Where each element is, in the order of a dense tensor.
    pub fn places(&self) -> impl Iterator<Item = usize> + '_ {
        let count = self.shape.iter().product::<usize>();
        (0..count).map(|mut n| {
            let mut at = self.offset as isize;
            for axis in (0..N).rev() {
                at += (n % self.shape[axis]) as isize * self.strides[axis];
                n /= self.shape[axis];
            }
            at as usize
        })
    }

    /// `dense` in this layout, with `gap` in the gaps.
    pub fn scatter<T: Copy>(&self, dense: &[T], gap: T) -> Vec<T> {
        let mut laid = vec![gap; self.len];
        self.places().zip(dense).for_each(|(at, x)| laid[at] = *x);
        laid
    }

    /// The elements as a dense tensor, and those in the gaps.
    pub fn gather<T: Copy>(&self, laid: &[T]) -> (Vec<T>, Vec<T>) {
        let mut owned = vec![false; laid.len()];
        let dense = self.places().map(|at| (owned[at] = true, laid[at]).1).collect();
        let gaps = laid.iter().zip(owned).filter(|(_, owned)| !owned).map(|(x, _)| *x).collect();
        (dense, gaps)
    }

    pub fn tensor<'a, T: Copy>(&self, data: &'a [T]) -> TensorRef<'a, T, N> {
        TensorRef::with_strides(data, self.offset, self.shape, self.strides).unwrap()
    }

    pub fn tensor_mut<'a, T: Copy>(&self, data: &'a mut [T]) -> TensorMut<'a, T, N> {
        TensorMut::with_strides(data, self.offset, self.shape, self.strides).unwrap()
    }
}
