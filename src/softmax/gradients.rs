//! The backward functions: each checks its lengths and its scale and hands them on.
#![forbid(unsafe_code)]

use super::axis::{Axis, same_len};
use super::buffers::Buffers;
use super::double;
use super::forward::check_scale;
use super::number::Number;
use crate::error::Error;

/// From the output y of softmax and the gradient dy of a loss with respect to it, that with respect to its input:
///
/// `dx = scale * y * (dy - sum(y * dy))` with the sum along the axis.
///
/// Where y is 0 (a hidden element, or one that is far below the maximum) so is dx, whatever dy is there: NaN and infinity in
/// such a place reach no element. At another place they make the elements of the line NaN or infinite, but those whose y is
/// 0. Finite y and dy never give NaN, and infinity only where dx leaves the range of the type.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
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
    check_scale::<T>(scale)?;
    T::backward(y, Buffers::Into { from: dy, to: dx }, axis, scale, false);
    Ok(())
}

/// [`softmax_backward_into`] where dx takes the place of dy.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn softmax_backward_in_place<T: Number>(y: &[T], dy: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(y)?;
    axis.check(dy)?;
    check_scale::<T>(scale)?;
    T::backward(y, Buffers::InPlace(dy), axis, scale, false);
    Ok(())
}

/// From the output y of log_softmax and the gradient dy of a loss with respect to it, that with respect to its input:
///
/// `dx = scale * (dy - exp(y) * sum(dy))` with the sum along the axis.
///
/// Where y is -inf (a hidden element) a dy of NaN or infinity counts as 0; a finite one is part of the sum, as in the formula.
/// NaN and infinity at another place make the line NaN or infinite. Finite dy never gives NaN, and infinity only where dx leaves
/// the range of the type.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
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
    check_scale::<T>(scale)?;
    T::backward(y, Buffers::Into { from: dy, to: dx }, axis, scale, true);
    Ok(())
}

/// [`log_softmax_backward_into`] where dx takes the place of dy.
///
/// # Errors
/// [`Error::SliceLength`] where one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn log_softmax_backward_in_place<T: Number>(
    y: &[T],
    dy: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    axis.check(y)?;
    axis.check(dy)?;
    check_scale::<T>(scale)?;
    T::backward(y, Buffers::InPlace(dy), axis, scale, true);
    Ok(())
}

/// From the input x of logsumexp and the gradient dl of a loss with respect to its output, [`Axis::lines`] numbers, that
/// with respect to x:
///
/// `dx = scale * softmax(x) * dl`, with dl repeated along the axis. Where the softmax is 0 (a hidden element, a line that shows
/// nothing) so is dx, whatever dl is.
///
/// # Errors
/// [`Error::SliceLength`] where x or dx is not a whole array, or dl has not one element for each line, and
/// [`Error::InvalidOption`] for a scale that is not finite.
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
    check_scale::<T>(scale)?;
    let upstream: Vec<_> = dl.iter().map(|dl| T::real(T::real_to_f64(scale) * dl.to_f64())).collect();
    T::softmax_times(x, dx, axis, scale, &upstream, |_, _, _| ());
    let scale = T::real_to_f64(scale);
    finish_rare_lines(x, dx, axis, scale, &upstream, |line| [scale, dl[line].to_f64()]);
    Ok(())
}

/// Computes the lines of `softmax_times` again whose upstream is not finite: 0 times such a upstream would be NaN. A upstream beyond
/// the largest number is the product of two `factors` that may be smaller.
pub(super) fn finish_rare_lines<T: Number>(
    x: &[T],
    out: &mut [T],
    axis: Axis,
    scale: f64,
    upstream: &[T::Real],
    factors: impl Fn(usize) -> [f64; 2],
) {
    let is_rare = |line: &usize| !T::real_to_f64(upstream[*line]).is_finite();
    for line in (0..upstream.len()).filter(is_rare) {
        double::softmax_line_times(x, out, axis.places(line), scale, factors(line));
    }
}
