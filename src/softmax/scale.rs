//! The scale of a softmax, in forms that never turn finite logits into NaN.
#![forbid(unsafe_code)]

use crate::simd::Simd;

/// The product scale * x as `scale * y`, where y = factor * x and the field `scale` is positive.
///
/// Then the exponent `scale * (y - max)` is never positive. If `y - max` overflows to -inf, the exponential is 0, which is
/// right:
///
/// * The sign of a negative scale is in the factor, so max is always the largest y.
/// * With a scale below 2^-100 (also 0), an element whose difference overflows would have to be visible, or give 0 * inf. The
///   factor 2^-30 makes the overflow impossible. The smallest positive number replaces a scale of 0: it gives exp(0) for all
///   elements.
///
/// In log_softmax the exponent itself is the result. With a scale below 1, `y - max` can overflow although `scale * (y - max)`
/// does not. [`Halved`] and [`Scale::without_overflow`] compute half of the difference.
///
/// A logit of -inf is hidden at any scale. A logit of +inf is hidden with a negative scale, because scale * x is -inf.
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

    /// The same scale in a form where y - max overflows only if scale * (y - max) does.
    fn without_overflow(self) -> Self {
        if self.factor.abs() == 1.0 && self.scale < 1.0 {
            Self { factor: 0.5 * self.factor, scale: 2.0 * self.scale }
        } else {
            self
        }
    }
}

/// Softmax at a scale, or log_softmax if `log`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Formula {
    pub(super) scale: Scale,
    pub(super) log: bool,
}

impl Formula {
    pub(super) fn new(scale: f32, log: bool) -> Self {
        let scale = Scale::new(scale);
        let halved = scale.factor == 1.0 && scale.scale <= Halved::LARGEST;
        Self { scale: if log && !halved { scale.without_overflow() } else { scale }, log }
    }
}

/// Runs `$body` with `$scale` in the form that the formula needs, of the type `$form`, and with the constant `$log`.
macro_rules! with_formula {
    ($formula:expr, |$scale:ident: $form:ident, $log:ident| $body:expr) => {{
        use $crate::softmax::scale::{Halved, One, Plain, Scale, with_form};
        match ($formula.scale, $formula.log) {
            (Scale { factor: 1.0, scale: 1.0 }, false) => with_form!($scale: $form = One => One, $log = false, $body),
            (Scale { factor: 1.0, scale: 1.0 }, true) => with_form!($scale: $form = One => One, $log = true, $body),
            (Scale { factor: 1.0, scale }, false) => {
                with_form!($scale: $form = Plain => Plain(scale), $log = false, $body)
            }
            (Scale { factor: 1.0, scale }, true) if scale <= Halved::LARGEST => {
                with_form!($scale: $form = Halved => Halved(scale), $log = true, $body)
            }
            (scale, false) => with_form!($scale: $form = Scale => scale, $log = false, $body),
            (scale, true) => with_form!($scale: $form = Scale => scale, $log = true, $body),
        }
    }};
}
pub(super) use with_formula;

/// One arm of [`with_formula!`].
macro_rules! with_form {
    ($scale:ident: $form:ident = $type:ty => $value:expr, $log:ident = $is_log:literal, $body:expr) => {{
        type $form = $type;
        const $log: bool = $is_log;
        let $scale = $value;
        $body
    }};
}
pub(super) use with_form;

/// A form of a scale. Loops are compiled for each form, so that a form without a factor costs no multiplication.
pub(super) trait Scaling: Copy {
    /// Whether y = x.
    const PLAIN: bool = true;
    fn scale(self) -> f32;

    /// y = factor * x.
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

/// Scale 1. It saves a product per exponential: a tenth of a row's time with AVX-512, a twentieth with AVX2.
#[derive(Clone, Copy)]
pub(super) struct One;

/// A positive scale that needs no factor.
#[derive(Clone, Copy)]
pub(super) struct Plain(pub(super) f32);

/// A positive scale that needs no factor, for log_softmax: scale * (y - max) as (2 * scale) * (y/2 - max/2). Half of a difference
/// never overflows. It has the bits of the difference apart from the power of two, unless it is denormal: then its product with a
/// scale up to [`Halved::LARGEST`] is less than a rounding error of the logarithm.
#[derive(Clone, Copy)]
pub(super) struct Halved(pub(super) f32);

impl Halved {
    /// 2^100. Above it, a denormal difference could show, and `y - max` overflows only if the exponent does.
    pub(super) const LARGEST: f32 = f32::from_bits((127 + 100) << 23);
}

impl Scaling for One {
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
        // The product with max is the same for a whole row. So with fused multiply-add this takes no longer.
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
