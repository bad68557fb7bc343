//! Vector exponentials.

use crate::simd::vector::Simd;

/// 1.5 * 2^23. Numbers of this size have a spacing of exactly 1. So adding it rounds to the nearest integer, and the low bits
/// of the sum are that integer.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Coefficients of 2^r = 1 + r*(C1 + r*(C2 + …)) for |r| <= 1/2.
///
/// Source: our minimax fit in ulp, searched over neighbouring f32 coefficients. The error is at most 1.79 ulp, with the
/// rounding of Horner's scheme with fused multiply-add. The constant is exactly 1, so 2^0 is exact. 2^(1/2) is twice 2^(-1/2),
/// bit for bit, with and without fused multiply-add. Running maxima rely on it (docs/numerics.md).
const EXP2: [f32; 5] = [0.693_146_8, 0.240_222_38, 0.055_508_96, 0.009_671_721, 0.001_322_455_1];

/// `unit` * 2^r for |r| <= 1/2. The error is at most 1.8 ulp with fused multiply-add and 2.1 ulp without. For other finite r the
/// result is finite and has no meaning; for NaN it is NaN.
///
/// * `unit`: a power of two. It multiplies the coefficients, which takes no time, and changes no bit of the fraction.
///
/// Each step is done for several vectors, so that the processor can overlap their chains.
#[inline(always)]
pub(crate) fn exp2_fractions<S: Simd, const V: usize, const N: usize>(
    simd: S,
    r: [[S::F32; V]; N],
    unit: f32,
) -> [[S::F32; V]; N] {
    let mut p = [[simd.splat(unit * EXP2[4]); V]; N];
    for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
        for (p, r) in p.iter_mut().zip(&r) {
            for v in 0..V {
                p[v] = simd.mul_add(p[v], r[v], simd.splat(unit * c));
            }
        }
    }
    p
}

/// tanh(y) = y * P(y^2) / Q(y^2) for |y| <= [`TANH_SATURATED`]. Source: our minimax fit of the relative error, which is at most
/// 8.7e-8 before rounding.
pub(crate) const TANH_P: [f32; 5] = [1.0, 0.133_889_18, 3.503_927_5e-3, 2.070_467e-5, 1.341_491e-8];
pub(crate) const TANH_Q: [f32; 5] = [1.0, 0.467_222_5, 2.591_143_3e-2, 3.297_449_7e-4, 7.816_093e-7];

/// For this y and larger ones, tanh rounds to 1.
pub(crate) const TANH_SATURATED: f32 = 9.01;

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

/// `x / ln 2` is the number of powers of two in exp(x).
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// The upper 15 bits of ln 2. Its product with any |n| < 512 is exact, and so is x minus that product, even without fused
/// multiply-add.
pub(crate) const LN2_HIGH: f32 = 0.693_145_75;

/// ln 2 - `LN2_HIGH`.
pub(crate) const LN2_LOW: f32 = 1.428_606_8e-6;

/// Coefficients of exp(r) = 1 + r + r^2*(C2 + r*(C3 + …)) for |r| <= ln(2)/2.
///
/// Source: our fit. Lawson's method (least squares on 4001 Chebyshev points, with weights multiplied by the error until it
/// levels) minimises the largest relative error over an interval 0.05% wider than needed. The coefficients are then rounded to
/// f32. The error of the fit alone is 0.03 ulp.
pub(crate) const EXP: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_454];

/// Splits exp(x) into 2^n * p with p in 0.7..1.42. Returns p, and `bias` + n in the low bits of an integer.
///
/// Valid for |x| < 2^14. For NaN, p is NaN.
#[inline(always)]
fn exp_parts<S: Simd>(simd: S, x: S::F32, bias: f32) -> (S::F32, S::I32) {
    let round = simd.splat(ROUND + bias);
    let shifted = simd.mul_add(x, simd.splat(LOG2_E), round);
    let n = simd.sub(shifted, round);
    let r = simd.mul_add(n, simd.splat(-LN2_HIGH), x);
    let r = simd.mul_add(n, simd.splat(-LN2_LOW), r);
    // Estrin's scheme: in pairs, by powers of r^2. The chain of dependent operations is shorter than Horner's, at equal work.
    let r2 = simd.mul(r, r);
    let low = simd.mul_add(simd.splat(EXP[1]), r, simd.splat(EXP[0]));
    let high = simd.mul_add(simd.splat(EXP[3]), r, simd.splat(EXP[2]));
    let q = simd.mul_add(simd.mul_add(simd.splat(EXP[4]), r2, high), r2, low);
    // 1 + (r + r^2 q): the larger a term, the later it is added.
    let p = simd.add(simd.splat(1.0), simd.mul_add(r2, q, r));
    (p, simd.bits(shifted))
}

/// exp(x), at most 1 ulp from the correctly rounded value for each of the 2^32 x, denormal results and overflow to infinity
/// included. The result never decreases as x grows. Both are tested on all x, with and without fused multiply-add. exp(0) is
/// exactly 1, exp(-inf) is 0, exp(inf) is inf, exp(NaN) is NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    // Outside these bounds the result is 0 or inf. `max` and `min` return a NaN in their second operand.
    let x = simd.min(simd.splat(89.0), simd.max(simd.splat(-104.0), x));
    let (p, n) = exp_parts(simd, x, 0.0);
    // n is in -150..=128, so 2^n is the product of two normal numbers. Only the second product can round.
    let n = simd.shr_i32::<10>(simd.shl_i32::<10>(n)); // the low 22 bits, with their sign
    let half = simd.shr_i32::<1>(n);
    let power = |n| simd.float_of_bits(simd.shl_i32::<23>(simd.add_i32(n, simd.splat_i32(127))));
    simd.mul(simd.mul(p, power(half)), power(simd.sub_i32(n, half)))
}

/// 2^24: the value of [`exp_scaled`] at 0.
pub(crate) const SCALED_ONE: f32 = 16_777_216.0;

/// 2^24 * exp(x) for x <= 0, with the error of [`exp`]. It is exactly 0 where exp(x) rounds to 0, and NaN for NaN and infinity.
///
/// The factor makes the result a normal number even where exp(x) is denormal. It cancels when exponentials are divided by
/// their sum.
#[inline(always)]
pub(crate) fn exp_scaled<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    if S::HAS_PICK_16 { scaled_from_table(simd, x) } else { scaled_from_polynomial(simd, x) }
}

/// One factor 2^n is enough, where [`exp`] needs two. For x below the range, the bit pattern of the factor is that of +0.
#[inline(always)]
fn scaled_from_polynomial<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    // exp(-104.8) is 2^-151.2: its exponent field, -151 + 127 + 24, is 0.
    let x = simd.max(simd.splat(-104.8), x);
    let (p, exponent) = exp_parts(simd, x, 127.0 + 24.0);
    // A product, because adding an integer to the exponent of p could turn a NaN with a payload into a number.
    simd.mul(p, simd.float_of_bits(simd.shl_i32::<23>(exponent)))
}

/// exp(x) = 2^(k/16) * exp(r). Here r is much smaller than with whole powers of two, so the polynomial has three coefficients
/// fewer. The fraction of 2^(k/16) is an entry of [`ROOTS`], which a register holds.
///
/// It takes 8 multiply-adds in a chain of 29 cycles; the polynomial takes 11 in a chain of 42 cycles, which is more than the
/// processor can overlap. On Zen 5 a vector takes 5.3 cycles instead of 8.4.
#[inline(always)]
fn scaled_from_table<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let round = simd.splat(ROUND);
    let shifted = simd.mul_add(x, simd.splat(16.0 * LOG2_E), round);
    let k = simd.sub(shifted, round);
    let r = simd.mul_add(k, simd.splat(-STEP), x);
    // k * STEP_LOW is at most 2^-21. It matters in the linear term but not in the square.
    let exact = simd.mul_add(k, simd.splat(-STEP_LOW), r);
    let q = simd.mul_add(simd.splat(ROOT_EXP[1]), r, simd.splat(ROOT_EXP[0]));
    let expm1 = simd.mul_add(simd.mul(r, r), q, exact);
    let k = simd.bits(shifted);
    let root = simd.bits(simd.pick(simd.load_slice(&ROOTS), k));
    let power = simd.float_of_bits(simd.add_i32(root, simd.shl_i32::<19>(k)));
    // Below the range, `power` has no meaning. A NaN is not below it, and `expm1` is NaN then.
    let in_range = simd.not_lt(x, simd.splat(LEAST_EXPONENT));
    simd.select(in_range, simd.mul_add(power, expm1, power), simd.zero())
}

/// exp of this is 2^-150.01, which rounds to 0. The scaled exponential would have an exponent field of 0.
const LEAST_EXPONENT: f32 = -103.98;

/// ln(2) / 16. Its product with any k is exact within a fused multiply-add.
const STEP: f32 = std::f32::consts::LN_2 / 16.0;

/// ln(2) / 16 - `STEP`. (ln(2) is 1.9e-9 less than the nearest f32.)
const STEP_LOW: f32 = -1.904_654_2e-9 / 16.0;

/// Coefficients of exp(r) = 1 + r + r^2*(C2 + r*C3) for |r| <= STEP/2. Source: our minimax fit in ulp, with an error of 0.03 u.
const ROOT_EXP: [f32; 2] = [0.500_016_2, 0.166_669_13];

/// 2^24 * 2^(i/16), minus i at bit 19, because shifting k by 19 bits adds i = k % 16 there and k / 16 to the exponent.
const ROOTS: [f32; 16] = {
    let mut roots = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        roots[i] = f32::from_bits(SIXTEENTHS[i] + (24 << 23) - ((i as u32) << 19));
        i += 1;
    }
    roots
};

/// The bits of 2^(i/16), rounded to f32.
const SIXTEENTHS: [u32; 16] = [
    0x3f80_0000,
    0x3f85_aac3,
    0x3f8b_95c2,
    0x3f91_c3d3,
    0x3f98_37f0,
    0x3f9e_f532,
    0x3fa5_fed7,
    0x3fad_583f,
    0x3fb5_04f3,
    0x3fbd_08a4,
    0x3fc5_672a,
    0x3fce_248c,
    0x3fd7_44fd,
    0x3fe0_ccdf,
    0x3fea_c0c7,
    0x3ff5_257d,
];
