//! Gradients of the rare lines that the fast loops can't do: with numbers that are not finite, or with differences or
//! products beyond the largest number. Plain f64, one line at a time.
#![forbid(unsafe_code)]

use super::number::Number;

/// Gradients are multiplied by this before they are added, and by its inverse at the end: no sum or difference of finite
/// numbers overflows, in f64 either.
const DOWN: f64 = f64::from_bits((1023 - 64) << 52);

/// dx of softmax, or of its logarithm where `log`, for the elements of one line at `places`.
///
/// Elements whose y is 0 (-inf of logarithms) are hidden. Of softmax, such an element adds nothing to the total and its dx
/// is 0. Of logarithms, this holds if its dy is not finite.
#[cold]
#[inline(never)]
pub(super) fn backward<T: Number>(
    y: &[T],
    dy: &[T],
    places: impl Iterator<Item = usize> + Clone,
    scale: f64,
    log: bool,
) -> Vec<T> {
    let terms = places.map(|place| {
        let (y, dy) = (y[place].to_f64(), dy[place].to_f64());
        let (share, hidden) = if log { (y.exp(), y == f64::NEG_INFINITY) } else { (y, y == 0.0) };
        (share, if hidden && !dy.is_finite() { 0.0 } else { dy * DOWN })
    });
    let total: f64 = terms.clone().map(|(share, dy)| if log { dy } else { share * dy }).sum();
    let dx = terms.map(|(share, dy)| {
        let unscaled = if !log {
            if share == 0.0 { 0.0 } else { share * (dy - total) }
        } else if share == 0.0 {
            dy
        } else {
            dy - share * total
        };
        // The product that is the smaller one first.
        let dx = if scale.abs() < 1.0 { unscaled * (scale / DOWN) } else { unscaled * scale / DOWN };
        T::from_f64(dx)
    });
    dx.collect()
}
