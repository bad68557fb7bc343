//! The cross-entropy loss of a classifier, and its gradient.
#![forbid(unsafe_code)]

use super::axis::{Axis, same_len};
use super::backward_calls::finish_rare_lines;
use super::number::Number;
use crate::error::{Error, check_count};

/// The losses of the rows of `logits` [rows, classes]. Row r belongs to class `targets[r]`:
///
/// `losses[r] = log(sum_c exp(logits[r, c])) - logits[r, targets[r]]`
///
/// The losses are computed from the logits, not from rounded probabilities. So the relative error of a loss of 1000 is that of a
/// loss of 1, and the absolute error of a loss near 0 is the rounding error of 1. A logit of -inf hides its class. If the target
/// is hidden, the loss is +inf.
///
/// # Errors
/// [`Error::SliceLength`], [`Error::TooLarge`], [`Error::WrongCount`] for `losses`, [`Error::ClassOutOfRange`].
pub fn cross_entropy_into<T: Number>(
    logits: &[T],
    targets: &[usize],
    classes: usize,
    losses: &mut [T::Real],
) -> Result<(), Error> {
    let axis = check(logits, targets, classes)?;
    check_count("losses", losses.len(), targets.len())?;
    T::states(logits, axis, T::real(1.0), &mut |row, max, sum| {
        losses[row] = T::real(loss(logits[row * classes + targets[row]].to_f64(), max, sum));
    });
    Ok(())
}

/// The mean of the losses of [`cross_entropy_into`]; 0 if there are no rows.
///
/// The first row gives its class a probability of 1/2, the second gives it 1/3:
///
/// ```
/// let loss = flashtile::softmax::cross_entropy(&[0.0, 0.0, f32::NEG_INFINITY, 5.0, 5.0, 5.0], &[1, 2], 3)?;
/// assert!((loss - (2f32.ln() + 3f32.ln()) / 2.0).abs() < 1e-6);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// # Errors
/// As [`cross_entropy_into`].
pub fn cross_entropy<T: Number>(logits: &[T], targets: &[usize], classes: usize) -> Result<T::Real, Error> {
    let axis = check(logits, targets, classes)?;
    let mut losses = vec![0.0; targets.len()];
    T::states(logits, axis, T::real(1.0), &mut |row, max, sum| {
        losses[row] = loss(logits[row * classes + targets[row]].to_f64(), max, sum);
    });
    let rows = targets.len().max(1) as f64;
    // The sum of the losses can overflow in f64 although their mean does not.
    let mean = match losses.iter().sum::<f64>() {
        f64::INFINITY => losses.iter().map(|loss| loss / rows).sum(),
        total => total / rows,
    };
    Ok(T::real(mean))
}

/// The gradient of `sum_r upstream[r] * losses[r]` with respect to the logits [rows, classes]:
///
/// `gradient[r, c] = upstream[r] * (softmax(logits[r, :])[c] - (c == targets[r]))`
///
/// For the mean of the losses, every upstream gradient is 1 / rows. A half type is rounded once. Where the second factor is 0 (a
/// hidden class), the gradient is 0 for any upstream gradient.
///
/// # Errors
/// As [`cross_entropy_into`], and [`Error::WrongCount`] for `upstream`.
pub fn cross_entropy_gradient_into<T: Number>(
    logits: &[T],
    targets: &[usize],
    classes: usize,
    upstream: &[T::Real],
    gradient: &mut [T],
) -> Result<(), Error> {
    let axis = check(logits, targets, classes)?;
    check_count("upstream gradients", upstream.len(), targets.len())?;
    same_len(logits.len(), gradient.len())?;
    let mut losses = vec![0.0; targets.len()];
    let mut keep_loss = |row: usize, max, sum| {
        losses[row] = loss(logits[row * classes + targets[row]].to_f64(), max, sum);
    };
    T::softmax_times(logits, gradient, axis, T::real(1.0), upstream, Some(&mut keep_loss));
    finish_rare_lines(logits, gradient, axis, 1.0, upstream, |row| [1.0, T::real_to_f64(upstream[row])]);
    for (row, loss) in losses.into_iter().enumerate() {
        let (upstream, share) = (T::real_to_f64(upstream[row]), (-loss).exp_m1());
        let at_target = if share == 0.0 && !upstream.is_finite() { 0.0 } else { upstream * share };
        gradient[row * classes + targets[row]] = T::from_f64(at_target);
    }
    Ok(())
}

/// log(sum * exp(max)) - target.
pub(super) fn loss(target: f64, max: f64, sum: f64) -> f64 {
    if target == f64::NEG_INFINITY && !sum.is_nan() { f64::INFINITY } else { (max - target) + sum.ln() }
}

fn check<T>(logits: &[T], targets: &[usize], classes: usize) -> Result<Axis, Error> {
    let axis = Axis::rows(targets.len(), classes)?;
    axis.check(logits)?;
    match targets.iter().position(|&class| class >= classes) {
        Some(row) => Err(Error::ClassOutOfRange { row, class: targets[row] as i128, classes }),
        None => Ok(axis),
    }
}
