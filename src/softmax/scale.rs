//! The scale of a softmax, in the form in which finite logits cannot give NaN.
#![forbid(unsafe_code)]

use crate::simd::Simd;

/// scale * x as `scale * y`, where y = factor * x and `scale` is positive.
///
/// The exponent `scale * (y - max)` is then never positive, and a difference that overflows to -inf is hidden rightly:
///
/// * a negative scale takes its sign to the factor, so that the largest y is always what is subtracted;
/// * a scale below 2^-100 (zero too) would turn an overflow into something visible, or into 0 * inf: the factor 2^-30
///   makes the overflow impossible. The smallest positive number then stands for zero: it gives exp(0) everywhere.
///
/// A logit of -inf is hidden whatever the scale. Under a negative scale one of +inf is, too: that is what scale * x says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    pub(super) factor: f32,
    pub(super) scale: f32,
}

impl Scale {
    pub(super) const ONE: Self = Self { factor: 1.0, scale: 1.0 };

    pub(super) fn new(scale: f32) -> Self {
        const TINY: f32 = f32::from_bits((127 - 100) << 23);
        const DOWN: f32 = f32::from_bits((127 - 30) << 23);
        let (sign, size) = (if scale < 0.0 { -1.0 } else { 1.0 }, scale.abs());
        if size < TINY {
            Self { factor: sign * DOWN, scale: (size / DOWN).max(f32::from_bits(1)) }
        } else {
            Self { factor: sign, scale: size }
        }
    }

    /// Whether y is x itself.
    pub(super) fn is_plain(self) -> bool {
        self.factor == 1.0
    }

    /// y, where `PLAIN` says at compile time that it is x.
    #[inline(always)]
    pub(super) fn adjust<S: Simd, const PLAIN: bool>(self, simd: S, x: S::F32) -> S::F32 {
        if PLAIN {
            return x;
        }
        let hidden = simd.splat(f32::NEG_INFINITY);
        simd.select(simd.eq(x, hidden), hidden, simd.mul(x, simd.splat(self.factor)))
    }
}
