//! The formulas in f64, for checking: plain loops with the standard library's exp.
#![forbid(unsafe_code)]

use super::axis::{Axis, Line};
use super::buffers::Buffers;
use super::number::Number;
use super::rare;
use super::sealed::Visit;

fn lines(axis: Axis) -> impl Iterator<Item = Line> {
    (0..axis.lines()).map(move |line| axis.line(line))
}

/// The exponents scale * (x - max) of a line, where max belongs to the largest scale * x. An x of -inf is always hidden, +inf is
/// hidden with a negative scale, and no finite x gives NaN.
#[derive(Clone, Copy)]
struct Exponents {
    sign: f64,
    scale: f64,
    max: f64,
}

impl Exponents {
    fn new(x: &[f64], line: Line, scale: f64) -> Self {
        let mut exponents = Self { sign: if scale < 0.0 { -1.0 } else { 1.0 }, scale: scale.abs(), max: 0.0 };
        exponents.max = line.indices().map(|p| exponents.visible(x[p])).fold(f64::NEG_INFINITY, f64::max);
        exponents
    }

    fn visible(self, x: f64) -> f64 {
        if x == f64::NEG_INFINITY { x } else { self.sign * x }
    }

    fn of(self, x: f64) -> f64 {
        let y = self.visible(x);
        if y == f64::NEG_INFINITY {
            return y;
        }
        let difference = y - self.max;
        if difference.is_infinite() {
            return self.scale * (y / 2.0 - self.max / 2.0) * 2.0;
        }
        self.scale * difference
    }

    fn sum(self, x: &[f64], line: Line) -> f64 {
        line.indices().map(|p| self.of(x[p]).exp()).sum()
    }
}

pub(super) fn softmax(
    mut buffers: Buffers<'_, f64>,
    axis: Axis,
    scale: f64,
    log: bool,
    upstream: impl Fn(usize) -> f64,
    mut visit: Option<Visit<'_>>,
) {
    if axis.elements() == 0 {
        return;
    }
    for (l, line) in lines(axis).enumerate() {
        let exponents = Exponents::new(buffers.input(), line, scale);
        let sum = exponents.sum(buffers.input(), line);
        // A line without a visible element has the sum 0. Its softmax is 0, its log_softmax is -inf.
        let (inverse, log_sum) = if sum == 0.0 { (0.0, 0.0) } else { (1.0 / sum, sum.ln()) };
        for p in line.indices() {
            let t = exponents.of(buffers.input()[p]);
            buffers.output()[p] = if log { t - log_sum } else { t.exp() * inverse * upstream(l) };
        }
        if let Some(visit) = &mut visit {
            visit(l, exponents.max, sum);
        }
    }
}

pub(super) fn states(x: &[f64], axis: Axis, scale: f64, visit: Visit<'_>) {
    for (l, line) in lines(axis).enumerate() {
        let exponents = Exponents::new(x, line, scale);
        let sum = exponents.sum(x, line);
        let max = if exponents.max == f64::NEG_INFINITY { exponents.max } else { exponents.scale * exponents.max };
        visit(l, max, sum);
    }
}

pub(super) fn backward(y: &[f64], mut buffers: Buffers<'_, f64>, axis: Axis, scale: f64, log: bool) {
    if axis.elements() == 0 {
        return;
    }
    for line in lines(axis) {
        let dy = buffers.input();
        let total: f64 = line.indices().map(|p| if log { dy[p] } else { y[p] * dy[p] }).sum();
        let largest = line.indices().map(|p| dy[p].abs()).fold(0.0, f64::max);
        if !(largest + total.abs()).is_finite() {
            rare::backward(y, dy, line, scale, log).write(buffers.output());
            continue;
        }
        for p in line.indices() {
            let dy = buffers.input()[p];
            let dx = if log { dy - y[p].exp() * total } else { y[p] * (dy - total) };
            buffers.output()[p] = scale * dx;
        }
    }
}

/// The softmax of one line times both factors; 0 where the softmax is 0.
#[cold]
#[inline(never)]
pub(super) fn softmax_line_times<T: Number>(x: &[T], out: &mut [T], line: Line, scale: f64, factors: [f64; 2]) {
    let mut probs: Vec<f64> = line.indices().map(|index| x[index].to_f64()).collect();
    let axis = Axis::row(probs.len());
    softmax(Buffers::InPlace(&mut probs), axis, scale, false, |_| 1.0, None);
    let [a, b] = factors;
    let (larger, smaller) = if a.abs() < b.abs() { (b, a) } else { (a, b) };
    for (index, prob) in line.indices().zip(probs) {
        out[index] = T::from_f64(if prob == 0.0 { 0.0 } else { prob * larger * smaller });
    }
}
