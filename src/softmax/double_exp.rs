//! The exponential in f64.
#![forbid(unsafe_code)]

/// 1.5 * 2^52, and 2^11. Numbers of this size have a spacing of exactly 1, so adding it rounds to the nearest integer. The low bits of
/// the sum are that integer plus 2^11.
const ROUND: f64 = 6_755_399_441_055_744.0 + 2048.0;

/// The upper 32 bits of ln 2. Its product with any |n| < 2^21 is exact.
const LN2_HIGH: f64 = f64::from_bits(std::f64::consts::LN_2.to_bits() & !0x1f_ffff);

/// ln 2 - `LN2_HIGH`.
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// 1/k! for k of 2 to 13: exp(r) = 1 + r + r^2*(C2 + r*(C3 + ...)) for |r| <= ln(2)/2, with an error below 5e-18.
const TERMS: [f64; 12] = {
    let (mut terms, mut k, mut factorial) = ([0.0; 12], 0, 1.0);
    while k < 12 {
        factorial *= (k + 2) as f64;
        terms[k] = 1.0 / factorial;
        k += 1;
    }
    terms
};

/// exp(x), at most 1 ulp from the exact value, denormal results and overflow to infinity included; exp(0) is exactly 1, exp(-inf) is 0
/// and exp(NaN) is NaN.
///
/// x is n*ln(2) + r, and exp(x) = 2^n * exp(r). There are no branches and no fused multiply-adds: the compiler makes vectors of a loop
/// of calls, and the bits are the same on every processor.
#[inline(always)]
pub(super) fn exp(x: f64) -> f64 {
    // exp(-746) is less than half of the smallest number, exp(710) is more than the largest one.
    let x = if x < -746.0 { -746.0 } else { x };
    let x = if x > 710.0 { 710.0 } else { x };
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // Estrin's scheme: the chain of dependent operations is shorter than Horner's.
    let [c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13] = TERMS;
    let (r2, r4) = (r * r, (r * r) * (r * r));
    let low = (c2 + c3 * r) + (c4 + c5 * r) * r2;
    let middle = (c6 + c7 * r) + (c8 + c9 * r) * r2;
    let high = (c10 + c11 * r) + (c12 + c13 * r) * r2;
    let q = low + (middle + high * r4) * r4;
    // The larger a term, the later it is added.
    let p = 1.0 + (r + r2 * q);
    // 2^n is the product of two normal numbers. Only the second product can round.
    let n = shifted.to_bits() & 0xfff;
    let half = n >> 1;
    let power = |exponent: u64| f64::from_bits(exponent.wrapping_sub(1) << 52);
    p * power(half) * power(n - half)
}

#[cfg(test)]
mod tests {
    use super::exp;

    /// The standard library's exp is at most 0.52 ulp from the exact value on the platforms of CI.
    #[test]
    fn exp_is_within_one_place() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        for n in 0..1_000_000 {
            let x = match n % 4 {
                0 => -750.0 * next(),
                1 => -40.0 * next(),
                2 => next() - 0.5,
                _ => 712.0 * next(),
            };
            let places = exp(x).to_bits().abs_diff(x.exp().to_bits());
            assert!(places <= 1, "exp({x}) is {} and not {}", exp(x), x.exp());
        }
        for x in [
            0.0,
            -0.0,
            f64::NEG_INFINITY,
            f64::INFINITY,
            709.78,
            709.79,
            1e300,
            -1e300,
            -745.13,
            -745.14,
            -746.1,
            5e-324,
        ] {
            assert_eq!(exp(x), x.exp(), "{x}");
        }
        assert!(exp(f64::NAN).is_nan() && exp(-f64::NAN).is_nan());
    }
}
