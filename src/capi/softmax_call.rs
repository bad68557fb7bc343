//! Softmax of strided tensors, block by dense block.
//!
//! The bits of a line depend only on its elements and on the dimensions after its axis. So a tensor can be cut into blocks at
//! any axis before it, without changing a bit.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};
use super::pools;
use crate::softmax::{
    Axis, Number, Softmax, is_parallel, log_softmax_backward_in_place, log_softmax_backward_into, log_softmax_in_place,
    log_softmax_into, softmax_backward_in_place, softmax_backward_into, softmax_in_place, softmax_into,
};
use crate::tensor::strided::{Strided, StridedMut};
use crate::tensor::{TensorMut, TensorRef};
use std::ops::Range;

/// Softmax or log_softmax along an axis, or its gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct SoftmaxCall {
    /// The number of the axis, of four.
    pub(super) axis: usize,
    pub(super) scale: f64,
    pub(super) log: bool,
}

/// Inputs and output, all of one shape.
pub(super) struct SoftmaxOperands<'a, T> {
    /// The output of the forward function; `None` if this call is the forward function.
    pub(super) y: Option<Strided<'a, T, 4>>,
    /// The input; `None` if `out` is overwritten.
    pub(super) from: Option<Strided<'a, T, 4>>,
    pub(super) out: StridedMut<'a, T, 4>,
}

impl SoftmaxCall {
    pub(super) fn run<T: Number>(self, mut operands: SoftmaxOperands<'_, T>) -> Result<(), Failure> {
        if !T::real_to_f64(T::real(self.scale)).is_finite() {
            let range = if self.scale.is_finite() { " in f32" } else { "" };
            return Err(Failure::option(format!("scale is {} but must be finite{range}", self.scale)));
        }
        let shape = *operands.out.as_ref().shape();
        if shape.contains(&0) {
            return Ok(());
        }
        match (0..=self.axis).find(|&start| operands.is_dense_from(start)) {
            Some(start) => self.run_in_blocks(shape, start, &mut operands),
            None => self.run_in_copies(shape, &mut operands),
        }
    }

    /// The forward function with an output of another type.
    pub(super) fn run_converted<T: Number, O: Number<Real = T::Real>>(
        self,
        x: Strided<'_, T, 4>,
        out: StridedMut<'_, O, 4>,
    ) -> Result<(), Failure> {
        let softmax = Softmax::new().axis(self.axis).scale(self.scale);
        let axis = Axis::new(x.shape(), self.axis)?;
        let (x, out, mut result) = (TensorRef::new(x), TensorMut { strided: out }, Ok(()));
        pools::run_on(0, is_parallel(axis), || {
            result = if self.log { softmax.log_softmax_into(x, out) } else { softmax.softmax_into(x, out) };
        })?;
        Ok(result?)
    }

    /// Computes each dense block in place in memory.
    fn run_in_blocks<T: Number>(
        self,
        shape: [usize; 4],
        start: usize,
        operands: &mut SoftmaxOperands<'_, T>,
    ) -> Result<(), Failure> {
        let axis = Axis::new(&shape[start..], self.axis - start)?;
        for index in indices(shape, 0..start) {
            let y = operands.y.map(|y| y.dense_block(index, start));
            let from = operands.from.map(|from| from.dense_block(index, start));
            self.run_block(axis, y, from, operands.out.dense_block_mut(index, start))?;
        }
        Ok(())
    }

    /// Gathers each block, computes it and scatters the result.
    fn run_in_copies<T: Number>(self, shape: [usize; 4], operands: &mut SoftmaxOperands<'_, T>) -> Result<(), Failure> {
        let axis = Axis::new(&shape[self.axis..], 0)?;
        let (mut block, mut y_block) = (buffer(axis.elements())?, buffer(axis.elements())?);
        for index in indices(shape, 0..self.axis) {
            let from = operands.from.as_ref().unwrap_or(operands.out.as_ref());
            gather(from, index, self.axis, &mut block);
            if let Some(y) = &operands.y {
                gather(y, index, self.axis, &mut y_block);
            }
            self.run_block(axis, operands.y.is_some().then_some(&y_block[..]), None, &mut block)?;
            scatter(&block, index, self.axis, &mut operands.out);
        }
        Ok(())
    }

    fn run_block<T: Number>(
        self,
        axis: Axis,
        y: Option<&[T]>,
        from: Option<&[T]>,
        out: &mut [T],
    ) -> Result<(), Failure> {
        let mut result = Ok(());
        pools::run_on(0, is_parallel(axis), || result = self.run_dense(axis, y, from, out))?;
        result
    }

    fn run_dense<T: Number>(
        self,
        axis: Axis,
        y: Option<&[T]>,
        from: Option<&[T]>,
        out: &mut [T],
    ) -> Result<(), Failure> {
        let scale = T::real(self.scale);
        match (y, from, self.log) {
            (None, None, false) => softmax_in_place(out, axis, scale)?,
            (None, None, true) => log_softmax_in_place(out, axis, scale)?,
            (None, Some(from), false) => softmax_into(from, out, axis, scale)?,
            (None, Some(from), true) => log_softmax_into(from, out, axis, scale)?,
            (Some(y), None, false) => softmax_backward_in_place(y, out, axis, scale)?,
            (Some(y), None, true) => log_softmax_backward_in_place(y, out, axis, scale)?,
            (Some(y), Some(from), false) => softmax_backward_into(y, from, out, axis, scale)?,
            (Some(y), Some(from), true) => log_softmax_backward_into(y, from, out, axis, scale)?,
        }
        Ok(())
    }
}

impl<T> SoftmaxOperands<'_, T> {
    fn is_dense_from(&self, axis: usize) -> bool {
        let inputs = [&self.y, &self.from];
        self.out.as_ref().is_dense_from(axis) && inputs.into_iter().flatten().all(|input| input.is_dense_from(axis))
    }
}

/// Every index of the given axes; the other axes are 0.
fn indices(shape: [usize; 4], axes: Range<usize>) -> impl Iterator<Item = [usize; 4]> {
    // An output has these elements, so the product does not overflow.
    let count = shape[axes.clone()].iter().product::<usize>();
    (0..count).map(move |mut n| {
        let mut index = [0; 4];
        for axis in axes.clone().rev() {
            (index[axis], n) = (n % shape[axis], n / shape[axis]);
        }
        index
    })
}

/// The innermost rows of the block at `outer`.
fn rows(shape: [usize; 4], outer: [usize; 4], axis: usize) -> impl Iterator<Item = [usize; 3]> {
    let inner = indices(shape, axis.min(3)..3);
    inner.map(move |inner| std::array::from_fn(|n| outer[n] + inner[n]))
}

fn gather<T: Copy>(from: &Strided<'_, T, 4>, outer: [usize; 4], axis: usize, to: &mut Vec<T>) {
    to.clear();
    for [b, h, i] in rows(*from.shape(), outer, axis) {
        to.extend(from.matrix(b, h).row(i).iter());
    }
}

fn scatter<T: Copy>(from: &[T], outer: [usize; 4], axis: usize, to: &mut StridedMut<'_, T, 4>) {
    let shape = *to.as_ref().shape();
    for (index, values) in rows(shape, outer, axis).zip(from.chunks_exact(shape[3])) {
        to.row_mut(index).fill_from(values.iter().copied());
    }
}

fn buffer<T>(len: usize) -> Result<Vec<T>, Failure> {
    let mut buffer = Vec::new();
    let no_memory = |_| Failure::new(Code::TooLarge, "a copy of the strided tensor would not fit in memory");
    buffer.try_reserve_exact(len).map_err(no_memory)?;
    Ok(buffer)
}
