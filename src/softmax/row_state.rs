//! The mergeable state of a softmax.
#![forbid(unsafe_code)]

/// The state of a softmax over some elements: their maximum and `sum(exp(x - max))`.
///
/// States of disjoint pieces merge into the state of the whole. So a row can be folded piece by piece, in any grouping, and need
/// not be stored. [`RowState::default()`] is the identity, the state of no elements: (-inf, 0).
///
/// | | |
/// |---|---|
/// | merge | max = max(max₁, max₂), sum = sum₁·exp(max₁ - max) + sum₂·exp(max₂ - max) |
/// | associative | within rounding: each merge adds at most 4 ulp to the sum |
/// | elements of -inf | do not change the state |
/// | NaN or +inf among the elements | sum is NaN, and stays NaN |
///
/// A row in two pieces:
///
/// ```
/// use flashtile::softmax::RowState;
///
/// let (mut left, mut right) = (RowState::default(), RowState::default());
/// left.fold(&[1.0, 2.0]);
/// right.fold(&[3.0]);
/// let row = left.merge(right);
/// assert_eq!(row.max, 3.0);
/// assert!((row.log_sum_exp() - 3.407606).abs() < 1e-6);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowState {
    /// The largest element; -inf if there is none.
    pub max: f32,
    /// The sum of exp(x - max) over all elements: 0 without finite elements, at least 1 with one.
    pub sum: f32,
}

impl Default for RowState {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl RowState {
    /// Adds one element.
    pub fn push(&mut self, x: f32) {
        let sum = match x {
            f32::NEG_INFINITY => 0.0,
            x if x.is_finite() => 1.0,
            _ => f32::NAN,
        };
        *self = self.merge(Self { max: x.max(f32::NEG_INFINITY), sum });
    }

    /// The state of the elements of both states.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        self.merge_scaled(other, 1.0)
    }

    /// [`merge`](Self::merge) of states whose sums are those of exp(scale * (x - max)).
    pub(super) fn merge_scaled(self, other: Self, scale: f32) -> Self {
        let max = self.max.max(other.max);
        // Equal maxima need no factor. This keeps the identity exact, and avoids inf - inf for infinite maxima.
        let share = |s: Self| if s.max == max { s.sum } else { s.sum * (scale * (s.max - max)).exp() };
        Self { max, sum: share(self) + share(other) }
    }

    /// log(sum(exp(x))) of all elements; -inf if there is none.
    pub fn log_sum_exp(self) -> f32 {
        self.log_sum_exp_scaled(1.0)
    }

    pub(super) fn log_sum_exp_scaled(self, scale: f32) -> f32 {
        if self.max == f32::NEG_INFINITY {
            return self.max + self.sum; // -inf, or NaN if the sum is NaN
        }
        (f64::from(scale) * f64::from(self.max) + f64::from(self.sum).ln()) as f32
    }

    /// log(sum), which log_softmax subtracts; 0 for a state without visible elements. The logarithm of 1 is -0, so that an
    /// exponent of +0 or -0 becomes the result +0.
    pub(super) fn log_sum(self) -> f32 {
        match self {
            Self { max: f32::NEG_INFINITY, sum } => sum,
            Self { sum: 1.0, .. } => -0.0,
            Self { sum, .. } => sum.ln(),
        }
    }

    /// 1/sum, by which softmax multiplies; 0 for a state without visible elements.
    pub(super) fn inverse_sum(self) -> f32 {
        if self.max == f32::NEG_INFINITY { self.sum } else { 1.0 / self.sum }
    }
}
