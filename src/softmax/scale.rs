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
/// An exponent that is a result, as in log_softmax, needs more: below a scale of 1, `y - max` can overflow where
/// `scale * (y - max)` is a number. [`Scale::without_overflow`] and [`Halved`] form half of the difference there.
///
/// A logit of -inf is hidden whatever the scale. Under a negative scale one of +inf is, too: that is what scale * x says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    pub(super) factor: f32,
    pub(super) scale: f32,
}

impl Scale {
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

    /// The same scale, such that y - max overflows only where scale * (y - max) does.
    pub(super) fn without_overflow(self) -> Self {
        if self.factor.abs() == 1.0 && self.scale < 1.0 {
            Self { factor: 0.5 * self.factor, scale: 2.0 * self.scale }
        } else {
            self
        }
    }
}

/// A scale as loops know it when they are compiled: what it does not do costs them nothing.
pub(super) trait Scaling: Copy {
    /// Whether y is x itself.
    const PLAIN: bool = true;
    /// Whether levels whose weights come from no roots do without it: there they don't wait for the multipliers.
    const FOR_TABLE: bool = false;

    fn scale(self) -> f32;

    /// y.
    #[inline(always)]
    fn apply_factor<S: Simd>(self, _: S, x: S::F32) -> S::F32 {
        x
    }

    /// scale * (y - max).
    #[inline(always)]
    fn exponent<S: Simd>(self, simd: S, y: S::F32, max: S::F32) -> S::F32 {
        simd.mul(simd.splat(self.scale()), simd.sub(y, max))
    }
}

/// The scale 1. Weights wait for the multipliers, and a product less for each is a tenth of a row's time.
#[derive(Clone, Copy)]
pub(super) struct One;

/// A scale that needs no factor.
#[derive(Clone, Copy)]
pub(super) struct Plain(pub(super) f32);

/// A scale below 1 that needs no factor, for exponents that are results: scale * (y - max) as (2 * scale) * (y/2 - max/2). The
/// half of a difference never overflows, and has the bits of the difference but for the power of two.
#[derive(Clone, Copy)]
pub(super) struct Halved(pub(super) f32);

impl Scaling for One {
    const FOR_TABLE: bool = true;

    #[inline(always)]
    fn scale(self) -> f32 {
        1.0
    }
    #[inline(always)]
    fn exponent<S: Simd>(self, simd: S, y: S::F32, max: S::F32) -> S::F32 {
        simd.sub(y, max)
    }
}

impl Scaling for Plain {
    #[inline(always)]
    fn scale(self) -> f32 {
        self.0
    }
}

impl Scaling for Halved {
    #[inline(always)]
    fn scale(self) -> f32 {
        self.0
    }
    #[inline(always)]
    fn exponent<S: Simd>(self, simd: S, y: S::F32, max: S::F32) -> S::F32 {
        // The product with max is the same for a whole row. So where multiply-add is fused, this takes no longer.
        let half_max = simd.mul(simd.splat(-0.5), max);
        simd.mul(simd.splat(2.0 * self.0), simd.mul_add(simd.splat(0.5), y, half_max))
    }
}

impl Scaling for Scale {
    const PLAIN: bool = false;

    #[inline(always)]
    fn scale(self) -> f32 {
        self.scale
    }
    #[inline(always)]
    fn apply_factor<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        let hidden = simd.splat(f32::NEG_INFINITY);
        simd.select(simd.eq(x, hidden), hidden, simd.mul(x, simd.splat(self.factor)))
    }
}
