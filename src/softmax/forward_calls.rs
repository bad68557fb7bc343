//! The public forward functions. Each checks lengths and scale, then calls the loops of its element type.
#![forbid(unsafe_code)]

use super::axis::{Axis, same_len};
use super::axis_loop::{self, Options};
use super::buffers::Buffers;
use super::number::Number;
use super::scale::Formula;
use crate::error::Error;
use crate::simd::Isa;
use crate::threads::Worth;

/// Softmax of one row, in place: exp(scale * (x - max)) / sum.
///
/// ```
/// let mut row = [2.0f32, 4.0, 2.0, 1.0];
/// flashtile::softmax::softmax(&mut row, 1.0)?;
/// assert!((row[1] - 0.7573).abs() < 1e-4);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidOption`] for a scale that is not finite.
pub fn softmax<T: Number>(row: &mut [T], scale: T::Real) -> Result<(), Error> {
    let axis = Axis::row(row.len());
    softmax_in_place(row, axis, scale)
}

/// Softmax of one row at scale 1, at a level. It cannot fail.
pub(crate) fn plain(isa: Isa, row: &mut [f32]) {
    let (axis, options) = (Axis::row(row.len()), Options::new(Formula::new(1.0, false)));
    axis_loop::softmax(isa, Buffers::InPlace(row), axis, Worth::Caller, options);
}

/// The logarithm of the softmax of one row, in place: scale * (x - max) - log(sum).
///
/// # Errors
/// [`Error::InvalidOption`] for a scale that is not finite.
pub fn log_softmax<T: Number>(row: &mut [T], scale: T::Real) -> Result<(), Error> {
    let axis = Axis::row(row.len());
    log_softmax_in_place(row, axis, scale)
}

/// log(sum(exp(scale * x))) of one row; -inf for an empty row.
///
/// # Errors
/// [`Error::InvalidOption`] for a scale that is not finite.
pub fn logsumexp<T: Number>(row: &[T], scale: T::Real) -> Result<T, Error> {
    let mut out = [T::from_f64(f64::NEG_INFINITY)];
    logsumexp_into(row, &mut out, Axis::row(row.len()), scale)?;
    let [out] = out;
    Ok(out)
}

/// Softmax along an axis, in place.
///
/// # Errors
/// [`Error::SliceLength`] if `x` is not the whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn softmax_in_place<T: Number>(x: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    check_scale::<T>(scale)?;
    T::softmax(Buffers::InPlace(x), axis, scale, false);
    Ok(())
}

/// Softmax along an axis, into `out` of the same shape.
///
/// # Errors
/// [`Error::SliceLength`] if `x` or `out` is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn softmax_into<T: Number>(x: &[T], out: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    axis.check(out)?;
    check_scale::<T>(scale)?;
    T::softmax(Buffers::Into { from: x, to: out }, axis, scale, false);
    Ok(())
}

/// The logarithm of softmax along an axis, in place.
///
/// # Errors
/// [`Error::SliceLength`] if `x` is not the whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn log_softmax_in_place<T: Number>(x: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    check_scale::<T>(scale)?;
    T::softmax(Buffers::InPlace(x), axis, scale, true);
    Ok(())
}

/// The logarithm of softmax along an axis, into `out` of the same shape.
///
/// # Errors
/// [`Error::SliceLength`] if `x` or `out` is not a whole array, and [`Error::InvalidOption`] for a scale that is
/// not finite.
pub fn log_softmax_into<T: Number>(x: &[T], out: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    axis.check(out)?;
    check_scale::<T>(scale)?;
    T::softmax(Buffers::Into { from: x, to: out }, axis, scale, true);
    Ok(())
}

/// log(sum(exp(scale * x))) along an axis, into `out` of the shape without it: [`Axis::lines`] elements.
///
/// # Errors
/// [`Error::SliceLength`] if `x` is not the whole array or `out` does not have one element per line, and
/// [`Error::InvalidOption`] for a scale that is not finite.
pub fn logsumexp_into<T: Number>(x: &[T], out: &mut [T], axis: Axis, scale: T::Real) -> Result<(), Error> {
    axis.check(x)?;
    same_len(axis.lines(), out.len())?;
    check_scale::<T>(scale)?;
    T::states(x, axis, scale, &mut |line, max, sum| out[line] = T::from_f64(log_sum_exp(max, sum)));
    Ok(())
}

/// Refuses a scale that is not finite: it would make every result NaN.
pub(super) fn check_scale<T: Number>(scale: T::Real) -> Result<(), Error> {
    let scale = T::real_to_f64(scale);
    if scale.is_finite() {
        return Ok(());
    }
    // NaN and infinity do not change in f32.
    Err(Error::InvalidOption { option: "scale", got: scale as f32, expected: "finite" })
}

/// max + log(sum). `max` is scaled. A line without a visible element has the state (-inf, 0) or (-inf, NaN).
pub(super) fn log_sum_exp(max: f64, sum: f64) -> f64 {
    if max == f64::NEG_INFINITY { max + sum } else { max + sum.ln() }
}
