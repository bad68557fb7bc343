//! The public backward functions. Each checks lengths and scale, then calls the loops of its element type.
#![forbid(unsafe_code)]

use super::axis::{Axis, same_len};
use super::buffers::Buffers;
use super::double;
use super::forward_calls::check_scale;
use super::number::Number;
use crate::error::Error;

/// The gradient of softmax. `y` is its output, `dy` the gradient of a loss with respect to `y`, `dx` the gradient with respect
/// to its input:
///
/// `dx = scale * y * (dy - sum(y * dy))` with the sum along the axis.
///
/// Where y is 0 (a hidden element, or one far below the maximum), dx is 0 for any dy, and a dy of NaN or infinity there
/// reaches no other element. Elsewhere, a dy of NaN or infinity makes the elements of the line whose y is not 0 NaN or
/// infinite. Finite y and dy never give NaN. They give infinity only where dx is outside the range of the type.
///
/// # Errors
/// [`Error::SliceLength`] if one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn softmax_backward_into<T: Number>(
    y: &[T],
    dy: &[T],
    dx: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    backward(y, Buffers::Into { from: dy, to: dx }, axis, scale, false)
}

/// [`softmax_backward_into`] that overwrites dy with dx.
///
/// # Errors
/// [`Error::SliceLength`] if one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn softmax_backward_in_place<T: Number>(y: &[T], dy: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    backward(y, Buffers::InPlace(dy), axis, scale, false)
}

/// The gradient of log_softmax. `y` is its output, `dy` the gradient of a loss with respect to `y`, `dx` the gradient with
/// respect to its input:
///
/// `dx = scale * (dy - exp(y) * sum(dy))` with the sum along the axis.
///
/// Where y is -inf (a hidden element), a dy of NaN or infinity counts as 0, and a finite dy is part of the sum as in the
/// formula. Elsewhere, a dy of NaN or infinity makes the line NaN or infinite. Finite dy never gives NaN. It gives infinity
/// only where dx is outside the range of the type.
///
/// # Errors
/// [`Error::SliceLength`] if one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn log_softmax_backward_into<T: Number>(
    y: &[T],
    dy: &[T],
    dx: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    backward(y, Buffers::Into { from: dy, to: dx }, axis, scale, true)
}

/// [`log_softmax_backward_into`] that overwrites dy with dx.
///
/// # Errors
/// [`Error::SliceLength`] if one of the slices is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn log_softmax_backward_in_place<T: Number>(
    y: &[T],
    dy: &mut [T],
    axis: Axis,
    scale: T::Real,
) -> Result<(), Error> {
    backward(y, Buffers::InPlace(dy), axis, scale, true)
}

/// Checks and computes the gradient of softmax, or of log_softmax if `log`.
fn backward<T: Number>(
    y: &[T],
    mut buffers: Buffers<'_, T>,
    axis: Axis,
    scale: T::Real,
    log: bool,
) -> Result<(), Error> {
    axis.check(y)?;
    axis.check(buffers.input())?;
    axis.check(buffers.output())?;
    check_scale::<T>(scale)?;
    T::backward(y, buffers, axis, scale, log);
    Ok(())
}

/// The gradient of logsumexp. `x` is its input, `dl` the gradient of a loss with respect to its output ([`Axis::lines`]
/// numbers), `dx` the gradient with respect to `x`:
///
/// `dx = scale * softmax(x) * dl`, with dl repeated along the axis. Where the softmax is 0 (a hidden element, or a line without
/// visible elements), dx is 0 for any dl.
///
/// # Errors
/// [`Error::SliceLength`] if x or dx is not a whole array, or dl does not have one element per line, and
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
    T::softmax_times(x, dx, axis, scale, &upstream, None);
    let scale = T::real_to_f64(scale);
    finish_rare_lines(x, dx, axis, scale, &upstream, |line| [scale, dl[line].to_f64()]);
    Ok(())
}

/// Computes again the lines of `softmax_times` whose upstream gradient is not finite, because 0 times it would be NaN. The two
/// `factors` have the upstream gradient as their product, and may be finite although the product is not.
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
        double::softmax_line_times(x, out, axis.line(line), scale, factors(line));
    }
}
