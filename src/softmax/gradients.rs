//! The backward functions: each checks its lengths and hands them on.
#![forbid(unsafe_code)]

use super::axis::{Axis, same_len};
use super::buffers::Buffers;
use super::number::Number;
use crate::Error;

/// From the output y of softmax and the gradient dy of a loss with respect to it, that with respect to its input:
///
/// `dx = scale * y * (dy - sum(y * dy))` with the sum along the axis.
///
/// Where y is 0 (a hidden element, or one that is far below the maximum) so is dx.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array.
pub fn softmax_backward_into<T: Number>(
    y: &[T],
    dy: &[T],
    dx: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    for x in [y, dy, dx] {
        axis.check(x)?;
    }
    T::backward(y, Buffers::Into { from: dy, to: dx }, axis, scale, false);
    Ok(())
}

/// [`softmax_backward_into`] where dx takes the place of dy.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array.
pub fn softmax_backward_in_place<T: Number>(y: &[T], dy: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(y)?;
    axis.check(dy)?;
    T::backward(y, Buffers::InPlace(dy), axis, scale, false);
    Ok(())
}

/// From the output y of log_softmax and the gradient dy of a loss with respect to it, that with respect to its input:
///
/// `dx = scale * (dy - exp(y) * sum(dy))` with the sum along the axis.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array.
pub fn log_softmax_backward_into<T: Number>(
    y: &[T],
    dy: &[T],
    dx: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    for x in [y, dy, dx] {
        axis.check(x)?;
    }
    T::backward(y, Buffers::Into { from: dy, to: dx }, axis, scale, true);
    Ok(())
}

/// [`log_softmax_backward_into`] where dx takes the place of dy.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array.
pub fn log_softmax_backward_in_place<T: Number>(
    y: &[T],
    dy: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    axis.check(y)?;
    axis.check(dy)?;
    T::backward(y, Buffers::InPlace(dy), axis, scale, true);
    Ok(())
}

/// From the input x of logsumexp and the gradient dl of a loss with respect to its output, [`Axis::lines`] numbers, that
/// with respect to x:
///
/// `dx = scale * softmax(x) * dl`, with dl repeated along the axis. Where a line shows nothing, dx is 0.
///
/// # Errors
/// [`Error::SliceLength`] where x or dx is not a whole array, or dl has not one element for each line.
pub fn logsumexp_backward_into<T: Number>(
    x: &[T],
    dl: &[T],
    dx: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    axis.check(x)?;
    axis.check(dx)?;
    same_len(axis.lines(), dl.len())?;
    let gains: Vec<_> = dl.iter().map(|dl| T::real(T::real_to_f64(scale) * dl.to_f64())).collect();
    T::weighted_softmax(x, dx, axis, scale, &gains, |_, _, _| ());
    Ok(())
}
