//! Vector exponentials.

use super::Simd;

/// 1.5 * 2^23: a float of this size has steps of exactly 1, so adding it rounds to the nearest integer and leaves that
/// integer in the low bits of the sum.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Coefficients of 2^r = 1 + r*(C1 + r*(C2 + …)) for |r| <= 1/2.
///
/// A minimax fit in units of the last place, searched over neighbouring f32 coefficients (ours): 1.79 ulp at most,
/// Horner's rounding with fused multiply-add included. The constant is exactly 1, so that 2^0 is.
const EXP2: [f32; 5] = [0.693_146_8, 0.240_222_38, 0.055_508_96, 0.009_671_721, 0.001_322_455_1];

/// 2^r for |r| <= 1/2, at most 2 ulp off. Elsewhere a finite number of no meaning; NaN for NaN.
#[inline(always)]
pub(crate) fn exp2_fraction<S: Simd>(simd: S, r: S::F32) -> S::F32 {
    let mut p = simd.splat(EXP2[4]);
    for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
        p = simd.mul_add(p, r, simd.splat(c));
    }
    p
}

/// tanh(y) = y * P(y^2) / Q(y^2) for |y| <= [`TANH_SATURATED`]: a relative minimax fit (ours), off by at most 8.7e-8 before
/// rounding.
const TANH_P: [f32; 5] = [1.0, 0.133_889_18, 3.503_927_5e-3, 2.070_467e-5, 1.341_491e-8];
const TANH_Q: [f32; 5] = [1.0, 0.467_222_5, 2.591_143_3e-2, 3.297_449_7e-4, 7.816_093e-7];

/// From here on tanh rounds to 1.
const TANH_SATURATED: f32 = 9.01;

/// tanh(y), relative error at most 8 * 2^-24; NaN for NaN.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(simd: S, y: S::F32) -> S::F32 {
    let y = simd.max(simd.splat(-TANH_SATURATED), simd.min(simd.splat(TANH_SATURATED), y));
    let z = simd.mul(y, y);
    let horner = |c: [f32; 5]| {
        let mut sum = simd.splat(c[4]);
        for c in [c[3], c[2], c[1], c[0]] {
            sum = simd.mul_add(sum, z, simd.splat(c));
        }
        sum
    };
    simd.div(simd.mul(y, horner(TANH_P)), horner(TANH_Q))
}
