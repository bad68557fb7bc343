//! Softmax of ndarray arrays of any rank and strides.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::forward_calls::{log_softmax_in_place, log_softmax_into, logsumexp_into, softmax_in_place, softmax_into};
use super::number::Number;
use crate::error::Error;
use ndarray::{Array, ArrayRef, Dimension, RemoveAxis};

/// Softmax of an array along one of its axes: exp(scale * (x - max)) / sum.
///
/// `x` is an array or a view of any shape and strides. The result has the same shape, in standard (row-major) layout. If `x` is
/// in another layout, it is copied first. The result has the bits and the edge rules of [`softmax_into`].
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
/// assert_eq!(softmax_axis(&x.t(), 1, 1.0)?, array![[0.5, 0.5], [1.0, 0.0]]);
/// # Ok::<(), flashtile::Error>(())
/// ```
pub fn softmax_axis<T: Number, D: Dimension>(
    x: &ArrayRef<T, D>,
    axis: usize,
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
    axis: usize,
    scale: T::Real,
) -> Result<Array<T, D>, Error> {
    map(x, axis, |x, out, axis| log_softmax_into(x, out, axis, scale), |x, axis| log_softmax_in_place(x, axis, scale))
}

/// log(sum(exp(scale * x))) along an axis of an array: the shape of `x` without that axis, in standard layout.
///
/// An axis of length 0 gives -inf. `x` is copied if its layout is not the standard one.
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
    axis: usize,
    scale: T::Real,
) -> Result<Array<T, D::Smaller>, Error> {
    let dense = Axis::new(x.shape(), axis)?;
    let mut out = zeros(dense.lines())?;
    match x.as_slice() {
        Some(x) => logsumexp_into(x, &mut out, dense, scale)?,
        None => logsumexp_into(&copy(x)?, &mut out, dense, scale)?,
    }
    Array::from_shape_vec(x.raw_dim().remove_axis(ndarray::Axis(axis)), out).map_err(|_| TOO_LARGE)
}

/// [`softmax_axis`] in place. If the layout of `x` is not the standard one, it goes through a copy.
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
    axis: usize,
    scale: T::Real,
) -> Result<(), Error> {
    overwrite(x, axis, |x, axis| softmax_in_place(x, axis, scale))
}

/// [`log_softmax_axis`] in place. If the layout of `x` is not the standard one, it goes through a copy.
///
/// # Errors
/// As [`softmax_axis`]. After an error the array is unchanged.
pub fn log_softmax_axis_in_place<T: Number, D: Dimension>(
    x: &mut ArrayRef<T, D>,
    axis: usize,
    scale: T::Real,
) -> Result<(), Error> {
    overwrite(x, axis, |x, axis| log_softmax_in_place(x, axis, scale))
}

const TOO_LARGE: Error = Error::TooLarge { what: "the result" };

/// A new array: `into` computes it if `x` is a dense slice, `in_place` computes it in a dense copy otherwise.
fn map<T: Number, D: Dimension>(
    x: &ArrayRef<T, D>,
    axis: usize,
    into: impl FnOnce(&[T], &mut [T], Axis) -> Result<(), Error>,
    in_place: impl FnOnce(&mut [T], Axis) -> Result<(), Error>,
) -> Result<Array<T, D>, Error> {
    let axis = Axis::new(x.shape(), axis)?;
    let out = match x.as_slice() {
        Some(x) => {
            let mut out = zeros(x.len())?;
            into(x, &mut out, axis)?;
            out
        }
        None => {
            let mut out = copy(x)?;
            in_place(&mut out, axis)?;
            out
        }
    };
    Array::from_shape_vec(x.raw_dim(), out).map_err(|_| TOO_LARGE)
}

fn overwrite<T: Number, D: Dimension>(
    x: &mut ArrayRef<T, D>,
    axis: usize,
    in_place: impl FnOnce(&mut [T], Axis) -> Result<(), Error>,
) -> Result<(), Error> {
    let axis = Axis::new(x.shape(), axis)?;
    if let Some(x) = x.as_slice_mut() {
        return in_place(x, axis);
    }
    let mut dense = copy(x)?;
    in_place(&mut dense, axis)?;
    x.iter_mut().zip(dense).for_each(|(x, y)| *x = y);
    Ok(())
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
