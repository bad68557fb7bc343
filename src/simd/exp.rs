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
