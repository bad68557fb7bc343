//! Functions for the closures of [`score_fn`](super::score_fn).
//!
//! The standard library's are calls, one score at a time. These are made of additions, products and bits alone, so that the
//! compiler makes vectors of them in the loops of each level.

#![forbid(unsafe_code)]

use crate::simd::exp::{EXP, LN2_HIGH, LN2_LOW, ROUND, TANH_P, TANH_Q, TANH_SATURATED};
use std::f32::consts::LOG2_E;

/// 2^n for normal results.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

/// exp(x), at most 2 units in the last place from the exact value; 0 for -inf, inf for inf and above 88.8, NaN for NaN.
///
/// ```
/// assert_eq!(flashtile::score::exp(0.0), 1.0);
/// ```
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Selections and not `clamp`, whose result for NaN takes longer.
    let low = if x < -104.0 { -104.0 } else { x };
    let x = if low > 89.0 { 89.0 } else { low };
    // exp(x) = 2^n * exp(r): see `exp_parts` of `simd/exp.rs`.
    let shifted = x * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let q = polynomial(EXP, r);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32); // any number for NaN
    // n is in -150..=128, so 2^n is the product of two normal numbers.
    let half = n >> 1;
    (1.0 + (r + r * r * q)) * power(half) * power(n.wrapping_sub(half))
}

/// tanh(x), at most 6 units in the last place from the exact value; NaN for NaN.
///
/// ```
/// use flashtile::Attention;
/// use flashtile::score::{score_fn, tanh};
///
/// let softcap = score_fn(|score, _| 30.0 * tanh(score / 30.0));
/// let attention = Attention::new().modified_by(&softcap);
/// ```
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let low = if x < -TANH_SATURATED { -TANH_SATURATED } else { x };
    let x = if low > TANH_SATURATED { TANH_SATURATED } else { low };
    let z = x * x;
    x * polynomial(TANH_P, z) / polynomial(TANH_Q, z)
}

#[inline(always)]
fn polynomial(c: [f32; 5], z: f32) -> f32 {
    c[0] + z * (c[1] + z * (c[2] + z * (c[3] + z * c[4])))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest error in units in the last place, over a sample of all numbers.
    fn error(own: fn(f32) -> f32, exact: fn(f64) -> f64, within: f32) -> f64 {
        let mut largest = 0.0f64;
        for bits in (0..=u32::MAX).step_by(9973) {
            let x = f32::from_bits(bits);
            let (got, expected) = (own(x), exact(x as f64));
            if x.is_nan() {
                assert!(got.is_nan());
            } else if x.abs() <= within {
                let ulp = f32::EPSILON as f64 * 2f64.powi((expected.abs().log2().floor() as i32).max(-126));
                largest = largest.max((got as f64 - expected).abs() / ulp);
            }
        }
        largest
    }

    #[test]
    fn errors_are_as_stated() {
        assert!(error(exp, f64::exp, 88.7) <= 2.0, "{}", error(exp, f64::exp, 88.7));
        assert!(error(tanh, f64::tanh, f32::MAX) <= 6.0, "{}", error(tanh, f64::tanh, f32::MAX));
        assert_eq!([exp(f32::NEG_INFINITY), exp(f32::INFINITY), exp(100.0)], [0.0, f32::INFINITY, f32::INFINITY]);
        assert_eq!([tanh(f32::INFINITY), tanh(9.5), tanh(0.0)], [tanh(10.0), -tanh(-1e30), 0.0]);
    }
}
