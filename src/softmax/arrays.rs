//! Softmax of ndarray arrays of any rank and strides.
#![forbid(unsafe_code)]

use super::axis::{Axis, axis_number};
use super::forward_calls::{log_softmax_in_place, log_softmax_into, logsumexp_into, softmax_in_place, softmax_into};
use super::number::Number;
use crate::error::Error;
use ndarray::{Array, ArrayRef, Dimension, RemoveAxis};

/// Softmax of an array along one of its axes: exp(scale * (x - max)) / sum.
///
/// The axis is counted from 0, or from -1 at the end, as in NumPy.
///
/// `x` is an array or a view of any shape and strides. The result has the same shape, and its axes have the order in memory that those
/// of `x` have: the softmax of a transposed array is transposed, too. If the elements of `x` are not neighbours in memory, they are
/// copied first. The result has the bits and the edge rules of [`softmax_into`] with the axes in the order of memory.
///
/// # Errors
/// [`Error::AxisOutOfRange`], [`Error::InvalidOption`] for a scale that is not finite, and [`Error::TooLarge`] if the result
/// does not fit in memory.
///
/// Along the columns of a matrix, then along the rows of its transpose:
///
/// ```
/// use flashtile::softmax::softmax_axis;
/// use ndarray::array;
///
/// let x = array![[0.0f32, 1.0], [0.0, f32::NEG_INFINITY]];
/// assert_eq!(softmax_axis(&x, 0, 1.0)?, array![[0.5, 1.0], [0.5, 0.0]]);
/// assert_eq!(softmax_axis(&x.t(), -1, 1.0)?, array![[0.5, 0.5], [1.0, 0.0]]);
/// # Ok::<(), flashtile::Error>(())
/// ```
pub fn softmax_axis<T: Number, D: Dimension>(
    x: &ArrayRef<T, D>,
    axis: impl TryInto<i128>,
    scale: T::Real,
) -> Result<Array<T, D>, Error> {
    map(x, axis, |x, out, axis| softmax_into(x, out, axis, scale), |x, axis| softmax_in_place(x, axis, scale))
}

/// The logarithm of the softmax of an array along one of its axes: scale * (x - max) - log(sum).
///
/// Shapes, layouts and errors are those of [`softmax_axis`].
///
/// # Errors
/// As [`softmax_axis`].
pub fn log_softmax_axis<T: Number, D: Dimension>(
    x: &ArrayRef<T, D>,
    axis: impl TryInto<i128>,
    scale: T::Real,
) -> Result<Array<T, D>, Error> {
    map(x, axis, |x, out, axis| log_softmax_into(x, out, axis, scale), |x, axis| log_softmax_in_place(x, axis, scale))
}

/// log(sum(exp(scale * x))) along an axis of an array: the shape of `x` without that axis.
///
/// An axis of length 0 gives -inf. The order of axes in memory and copies are those of [`softmax_axis`].
///
/// # Errors
/// As [`softmax_axis`].
///
/// logsumexp of each row:
///
/// ```
/// use flashtile::softmax::logsumexp_axis;
/// use ndarray::array;
///
/// let lse = logsumexp_axis(&array![[0.0f32, 0.0], [1.0, f32::NEG_INFINITY]], 1, 1.0)?;
/// assert_eq!(lse, array![2.0f32.ln(), 1.0]);
/// # Ok::<(), flashtile::Error>(())
/// ```
pub fn logsumexp_axis<T: Number, D: RemoveAxis>(
    x: &ArrayRef<T, D>,
    axis: impl TryInto<i128>,
    scale: T::Real,
) -> Result<Array<T, D::Smaller>, Error> {
    let axis = checked_axis(x.shape(), axis)?;
    let order = MemoryOrder::new(x);
    let x = x.view().permuted_axes(order.forwards.clone());
    let axis = order.position(axis);
    let dense = Axis::new(x.shape(), axis)?;
    let mut out = zeros(dense.lines())?;
    match x.as_slice() {
        Some(x) => logsumexp_into(x, &mut out, dense, scale)?,
        None => logsumexp_into(&copy(&x)?, &mut out, dense, scale)?,
    }
    let out = Array::from_shape_vec(x.raw_dim().remove_axis(ndarray::Axis(axis)), out).map_err(|_| TOO_LARGE)?;
    Ok(out.permuted_axes(order.backwards_without(axis)))
}

/// [`softmax_axis`] in place. If the elements of `x` are not neighbours in memory, they go through a copy.
///
/// # Errors
/// As [`softmax_axis`]. After an error the array is unchanged.
///
/// ```
/// use flashtile::softmax::softmax_axis_in_place;
/// use ndarray::{array, s};
///
/// let mut x = array![[0.0f32, 7.0, 0.0], [1.0, 7.0, 1.0]];
/// softmax_axis_in_place(&mut x.slice_mut(s![.., ..;2]), 1, 1.0)?;
/// assert_eq!(x, array![[0.5, 7.0, 0.5], [0.5, 7.0, 0.5]]);
/// # Ok::<(), flashtile::Error>(())
/// ```
pub fn softmax_axis_in_place<T: Number, D: Dimension>(
    x: &mut ArrayRef<T, D>,
    axis: impl TryInto<i128>,
    scale: T::Real,
) -> Result<(), Error> {
    overwrite(x, axis, |x, axis| softmax_in_place(x, axis, scale))
}

/// [`log_softmax_axis`] in place. If the elements of `x` are not neighbours in memory, they go through a copy.
///
/// # Errors
/// As [`softmax_axis`]. After an error the array is unchanged.
pub fn log_softmax_axis_in_place<T: Number, D: Dimension>(
    x: &mut ArrayRef<T, D>,
    axis: impl TryInto<i128>,
    scale: T::Real,
) -> Result<(), Error> {
    overwrite(x, axis, |x, axis| log_softmax_in_place(x, axis, scale))
}

const TOO_LARGE: Error = Error::TooLarge { what: "the result" };

/// The number of an axis, counted from 0.
fn checked_axis(shape: &[usize], axis: impl TryInto<i128>) -> Result<usize, Error> {
    let axis = axis_number(axis, shape.len())?;
    Axis::new(shape, axis).map(|_| axis)
}

/// A new array: `into` computes it if `x` is a dense slice, `in_place` computes it in a dense copy otherwise.
fn map<T: Number, D: Dimension>(
    x: &ArrayRef<T, D>,
    axis: impl TryInto<i128>,
    into: impl FnOnce(&[T], &mut [T], Axis) -> Result<(), Error>,
    in_place: impl FnOnce(&mut [T], Axis) -> Result<(), Error>,
) -> Result<Array<T, D>, Error> {
    let axis = checked_axis(x.shape(), axis)?;
    let order = MemoryOrder::new(x);
    let x = x.view().permuted_axes(order.forwards.clone());
    let axis = Axis::new(x.shape(), order.position(axis))?;
    let out = match x.as_slice() {
        Some(x) => {
            let mut out = zeros(x.len())?;
            into(x, &mut out, axis)?;
            out
        }
        None => {
            let mut out = copy(&x)?;
            in_place(&mut out, axis)?;
            out
        }
    };
    let out = Array::from_shape_vec(x.raw_dim(), out).map_err(|_| TOO_LARGE)?;
    Ok(out.permuted_axes(order.backwards))
}

fn overwrite<T: Number, D: Dimension>(
    x: &mut ArrayRef<T, D>,
    axis: impl TryInto<i128>,
    in_place: impl FnOnce(&mut [T], Axis) -> Result<(), Error>,
) -> Result<(), Error> {
    let axis = checked_axis(x.shape(), axis)?;
    let order = MemoryOrder::new(x);
    let mut x = x.view_mut().permuted_axes(order.forwards.clone());
    let axis = Axis::new(x.shape(), order.position(axis))?;
    if let Some(x) = x.as_slice_mut() {
        return in_place(x, axis);
    }
    let mut dense = copy(&x)?;
    in_place(&mut dense, axis)?;
    x.iter_mut().zip(dense).for_each(|(x, y)| *x = y);
    Ok(())
}

/// The axes of an array in the order of their strides, the largest first. So the last one has neighbouring elements, if any has, and
/// loops are chosen by strides, not by numbers of axes.
struct MemoryOrder<D> {
    /// For `permuted_axes`, into that order.
    forwards: D,
    /// For `permuted_axes`, back again.
    backwards: D,
}

impl<D: Dimension> MemoryOrder<D> {
    fn new<T>(x: &ArrayRef<T, D>) -> Self {
        let mut axes: Vec<usize> = (0..x.ndim()).collect();
        axes.sort_by_key(|&axis| std::cmp::Reverse(x.strides()[axis].unsigned_abs()));
        let mut order = Self { forwards: D::zeros(axes.len()), backwards: D::zeros(axes.len()) };
        for (position, axis) in axes.into_iter().enumerate() {
            order.forwards[position] = axis;
            order.backwards[axis] = position;
        }
        order
    }

    /// Where an axis is in memory.
    fn position(&self, axis: usize) -> usize {
        self.backwards[axis]
    }

    /// [`backwards`](Self::backwards) for an array that has lost the axis at a position in memory.
    fn backwards_without(&self, position: usize) -> D::Smaller {
        let rest = self.backwards.slice().iter().filter(|&&at| at != position);
        let mut backwards = D::Smaller::zeros(self.backwards.ndim() - 1);
        for (to, &at) in backwards.slice_mut().iter_mut().zip(rest) {
            *to = if at > position { at - 1 } else { at };
        }
        backwards
    }
}

/// The elements in row-major order.
fn copy<T: Number, D: Dimension>(x: &ArrayRef<T, D>) -> Result<Vec<T>, Error> {
    let mut elements = Vec::new();
    elements.try_reserve_exact(x.len()).map_err(|_| TOO_LARGE)?;
    elements.extend(x.iter().copied());
    Ok(elements)
}

fn zeros<T: Number>(len: usize) -> Result<Vec<T>, Error> {
    let mut elements = Vec::new();
    elements.try_reserve_exact(len).map_err(|_| TOO_LARGE)?;
    elements.resize(len, T::default());
    Ok(elements)
}
