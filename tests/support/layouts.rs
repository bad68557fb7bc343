//! The same tensor in different layouts, with known contents of the gaps.

use super::Rng;
use flashtile::{TensorMut, TensorRef};
use std::ops::Range;

/// A named layout of any shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
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

pub const ARRANGEMENTS: [Arrangement; 5] =
    [Arrangement::Dense, Arrangement::RowGaps(3), Arrangement::Reversed, Arrangement::Spread, Arrangement::Swapped];

impl Arrangement {
    pub fn of<const N: usize>(self, shape: [usize; N]) -> Layout<N> {
        let mut order: [usize; N] = std::array::from_fn(|axis| axis); // outermost first
        if self == Arrangement::Swapped && N >= 3 {
            order.swap(N - 3, N - 2);
        }
        let mut strides = [0isize; N];
        let mut next = if self == Arrangement::Spread { 2 } else { 1 };
        for (n, &axis) in order.iter().enumerate().rev() {
            strides[axis] = next;
            next *= shape[axis] as isize;
            if let (Arrangement::RowGaps(gap), true) = (self, n == N - 1) {
                next += gap as isize;
            }
        }
        if shape.contains(&0) {
            return Layout { shape, offset: 0, strides, len: 0 };
        }
        let reach: usize = shape.iter().zip(strides).map(|(&size, stride)| (size - 1) * stride as usize).sum();
        if self == Arrangement::Reversed {
            return Layout { shape, offset: reach, strides: strides.map(|stride| -stride), len: reach + 1 };
        }
        Layout { shape, offset: 0, strides, len: reach + 1 }
    }
}

/// Where the elements of a tensor lie in a slice.
#[derive(Clone, Copy, Debug)]
pub struct Layout<const N: usize = 4> {
    pub shape: [usize; N],
    pub strides: [isize; N],
    pub offset: usize,
    /// Elements of the slice.
    pub len: usize,
}

impl<const N: usize> Layout<N> {
    /// Without gaps, last axis innermost.
    pub fn contiguous(shape: [usize; N]) -> Self {
        Self::nested(shape, std::array::from_fn(|axis| axis), [0; N], 1)
    }

    /// Axes from the outermost to the innermost as in `order`, each padded by `padding` indices, elements `step` apart.
    fn nested(shape: [usize; N], order: [usize; N], padding: [usize; N], step: usize) -> Self {
        let (mut strides, mut stride) = ([0; N], step);
        for axis in order.into_iter().rev() {
            strides[axis] = stride as isize;
            stride *= shape[axis] + padding[axis];
        }
        Layout { shape, strides, offset: 0, len: stride }
    }

    /// Any layout: permuted, padded, a slice of something larger, reversed, with steps between elements, and, where
    /// elements may be shared (`repeat`), broadcast.
    pub fn random(rng: &mut Rng, shape: [usize; N], repeat: bool) -> Self {
        if rng.one_in(3) {
            return Self::contiguous(shape);
        }
        let mut order: [usize; N] = std::array::from_fn(|axis| axis);
        match rng.below(4) {
            // [batch, seq, heads, dim] seen as [batch, heads, seq, dim].
            0 if N == 4 => order.swap(1, 2),
            1 => (1..N).rev().for_each(|axis| order.swap(axis, rng.below(axis + 1))),
            _ => {}
        }
        let mut padding = [0; N];
        for (padding, size) in padding.iter_mut().zip(shape) {
            // `2 * size` is what one of three parts of a packed QKV leaves out.
            *padding = if rng.one_in(4) { [1, 3, 5, 2 * size][rng.below(4)] } else { 0 };
        }
        let step = if rng.one_in(8) { 2 + rng.below(2) } else { 1 };
        let mut layout = Self::nested(shape, order, padding, step);
        layout.offset = rng.below(4) * rng.below(4);
        layout.len += layout.offset;
        for (stride, size) in layout.strides.iter_mut().zip(shape) {
            if rng.one_in(10) {
                layout.offset += size.saturating_sub(1) * *stride as usize;
                *stride = -*stride;
            }
        }
        for stride in &mut layout.strides {
            if repeat && rng.one_in(16) {
                // The elements that the stride no longer reaches are gaps.
                *stride = 0;
            }
        }
        layout
    }

    pub fn at(&self, index: [usize; N]) -> usize {
        let steps = index.iter().zip(&self.strides).map(|(&index, &stride)| index as isize * stride);
        (self.offset as isize + steps.sum::<isize>()) as usize
    }

    /// Every index, in order.
    pub fn indices(&self) -> impl Iterator<Item = [usize; N]> + use<N> {
        let shape = self.shape;
        (0..shape.iter().product()).map(move |mut rest: usize| {
            let mut index = [0; N];
            for axis in (0..N).rev() {
                index[axis] = rest % shape[axis];
                rest /= shape[axis];
            }
            index
        })
    }

    /// The place of each element in the slice, in the order of a dense tensor.
    pub fn places(&self) -> impl Iterator<Item = usize> + use<N> {
        let layout = *self;
        self.indices().map(move |index| layout.at(index))
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

impl Layout {
    /// Keeps these ranges of the first three axes. An axis of size 1 is left as it is.
    pub fn cut(&mut self, ranges: [&Range<usize>; 3]) {
        for (axis, range) in ranges.into_iter().enumerate() {
            if self.shape[axis] != 1 {
                self.offset = (self.offset as isize + range.start as isize * self.strides[axis]) as usize;
                self.shape[axis] = range.len();
            }
        }
    }
}
