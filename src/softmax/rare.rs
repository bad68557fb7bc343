//! Gradients of the rare lines that the fast loops cannot compute: lines with numbers that are not finite, or with differences
//! or products that overflow. Plain f64 loops, one line at a time.
#![forbid(unsafe_code)]

use super::number::Number;
use super::shared::{Panel, PanelMut};
use super::strips::Strip;

/// Gradients are multiplied by this before they are added, and by its inverse at the end. So no sum or difference of finite
/// numbers overflows, not even for f64 elements.
const DOWN: f64 = f64::from_bits((1023 - 64) << 52);

/// The dx of one line, kept until every other line that needs its dy has been computed: dx may overwrite dy.
pub(super) struct RareLine<T> {
    /// Its column in the panel.
    column: usize,
    dx: Vec<T>,
}

impl<T: Number> RareLine<T> {
    #[cold]
    #[inline(never)]
    pub(super) fn write(self, out: &mut PanelMut<'_, T>) {
        for (i, dx) in self.dx.into_iter().enumerate() {
            out.row(i, self.column, 1)[0] = dx;
        }
    }
}

/// The lines of a strip whose `reach` is not finite.
#[cold]
#[inline(never)]
pub(super) fn strip_backward<T: Number>(
    y: Panel<'_, T>,
    dy: Panel<'_, T>,
    strip: Strip,
    reach: &[f32],
    scale: f64,
    log: bool,
) -> Vec<RareLine<T>> {
    let rare = (0..strip.width).filter(|&i| !reach[i].is_finite());
    rare.map(|i| backward(y, dy, strip.column + i, scale, log)).collect()
}

/// dx of softmax, or of log_softmax if `log`, for the line in one column of a panel.
///
/// Elements whose y is 0 (-inf for log_softmax) are hidden. For softmax, a hidden element adds 0 to the total and its dx is 0.
/// For log_softmax, this holds if its dy is not finite.
#[cold]
#[inline(never)]
pub(super) fn backward<T: Number>(
    y: Panel<'_, T>,
    dy: Panel<'_, T>,
    column: usize,
    scale: f64,
    log: bool,
) -> RareLine<T> {
    let terms = (0..y.len()).map(|i| {
        let (y, dy) = (y.row(i, column, 1)[0].to_f64(), dy.row(i, column, 1)[0].to_f64());
        let (prob, hidden) = if log { (y.exp(), y == f64::NEG_INFINITY) } else { (y, y == 0.0) };
        (prob, if hidden && !dy.is_finite() { 0.0 } else { dy * DOWN })
    });
    let total: f64 = terms.clone().map(|(prob, dy)| if log { dy } else { prob * dy }).sum();
    let dx = terms.map(|(prob, dy)| {
        let unscaled = if !log {
            if prob == 0.0 { 0.0 } else { prob * (dy - total) }
        } else if prob == 0.0 {
            dy
        } else {
            dy - prob * total
        };
        // The order in which the intermediate product is smaller.
        let dx = if scale.abs() < 1.0 { unscaled * (scale / DOWN) } else { unscaled * scale / DOWN };
        T::from_f64(dx)
    });
    RareLine { column, dx: dx.collect() }
}
