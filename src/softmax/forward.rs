//! The forward functions: each checks its lengths and hands them on.
#![forbid(unsafe_code)]

use super::axis::{Axis, same_len};
use super::buffers::Buffers;
use super::number::Number;
use crate::Error;

/// Softmax of one row, in place: exp(scale * (x - max)) / sum.
///
/// ```
/// let mut row = [2.0f32, 4.0, 2.0, 1.0];
/// flashtile::softmax::softmax(&mut row, 1.0);
/// assert!((row[1] - 0.7573).abs() < 1e-4);
/// ```
pub fn softmax<T: Number>(row: &mut [T], scale: T::Real) {
    let axis = Axis::row(row.len());
    T::softmax(Buffers::InPlace(row), axis, scale, false);
}

/// The logarithm of the softmax of one row, in place: scale * (x - max) - log(sum).
pub fn log_softmax<T: Number>(row: &mut [T], scale: T::Real) {
    let axis = Axis::row(row.len());
    T::softmax(Buffers::InPlace(row), axis, scale, true);
}

/// log(sum(exp(scale * x))) of one row; -inf of an empty one.
pub fn logsumexp<T: Number>(row: &[T], scale: T::Real) -> T {
    let mut out = T::from_f64(f64::NEG_INFINITY);
    T::states(row, Axis::row(row.len()), scale, |_, max, sum| out = T::from_f64(log_sum_exp(max, sum)));
    out
}

/// Softmax along an axis, in place.
///
/// # Errors
/// [`Error::SliceLength`] where `x` is not the whole array.
pub fn softmax_in_place<T: Number>(x: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    T::softmax(Buffers::InPlace(x), axis, scale, false);
    Ok(())
}

/// Softmax along an axis, into `out` of the same shape.
///
/// # Errors
/// [`Error::SliceLength`] where `x` or `out` is not a whole array.
pub fn softmax_into<T: Number>(x: &[T], out: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    axis.check(out)?;
    T::softmax(Buffers::Into { from: x, to: out }, axis, scale, false);
    Ok(())
}

/// The logarithm of softmax along an axis, in place.
///
/// # Errors
/// [`Error::SliceLength`] where `x` is not the whole array.
pub fn log_softmax_in_place<T: Number>(x: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    T::softmax(Buffers::InPlace(x), axis, scale, true);
    Ok(())
}

/// The logarithm of softmax along an axis, into `out` of the same shape.
///
/// # Errors
/// [`Error::SliceLength`] where `x` or `out` is not a whole array.
pub fn log_softmax_into<T: Number>(x: &[T], out: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    axis.check(out)?;
    T::softmax(Buffers::Into { from: x, to: out }, axis, scale, true);
    Ok(())
}

/// log(sum(exp(scale * x))) along an axis, into `out` of the shape without it: [`Axis::lines`] elements.
///
/// # Errors
/// [`Error::SliceLength`] where `x` is not the whole array or `out` has not one element for each line.
pub fn logsumexp_into<T: Number>(x: &[T], out: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    same_len(axis.lines(), out.len())?;
    T::states(x, axis, scale, |line, max, sum| out[line] = T::from_f64(log_sum_exp(max, sum)));
    Ok(())
}

/// max + log(sum), where `max` has been scaled. A line that shows nothing has (-inf, 0), or (-inf, NaN).
fn log_sum_exp(max: f64, sum: f64) -> f64 {
    if max == f64::NEG_INFINITY { max + sum } else { max + sum.ln() }
}
