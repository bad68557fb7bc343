//! Conversions of the half types without branches, for the level of every processor.
//!
//! They are arithmetic on the bits, which the compiler turns into vectors. The crate `half` converts one element at a time, through
//! branches, and decode in f16 took three to twelve times as long as in f32. The bits are the same, but for the payloads of NaN.
//! ARM has an instruction for f16.

use crate::element::{bf16, f16};

/// The sign of an f32, and the exponent of infinity and NaN.
const SIGN: u32 = 0x8000_0000;
const INFINITY: u32 = 0x7f80_0000;

/// The place of an f32's exponent, and what is added to an exponent to store it, in f32 and in f16.
const EXPONENT: u32 = 23;
const BIAS: u32 = 127;
const F16_BIAS: u32 = 15;

#[inline(always)]
pub(super) fn widen_f16<const LANES: usize>(halves: [f16; LANES]) -> [f32; LANES] {
    let mut wide = [0.0; LANES];
    #[cfg(target_arch = "aarch64")]
    for first in (0..LANES).step_by(4) {
        use std::arch::aarch64::{vcvt_f32_f16, vld1_u16, vreinterpret_f16_u16, vst1q_f32};
        const { assert!(LANES.is_multiple_of(4)) };
        // SAFETY: four of `LANES` elements, a multiple of four, are read and written. Every aarch64 target has the instructions.
        unsafe {
            let halves = vreinterpret_f16_u16(vld1_u16(halves.as_ptr().add(first).cast()));
            vst1q_f32(wide.as_mut_ptr().add(first), vcvt_f32_f16(halves));
        }
    }
    #[cfg(not(target_arch = "aarch64"))]
    for i in 0..LANES {
        wide[i] = f32_of_f16(halves[i]);
    }
    wide
}

#[inline(always)]
pub(super) fn widen_bf16<const LANES: usize>(halves: [bf16; LANES]) -> [f32; LANES] {
    let mut wide = [0.0; LANES];
    for i in 0..LANES {
        // A bf16 is the upper half of the f32 of the same value.
        wide[i] = f32::from_bits(u32::from(halves[i].to_bits()) << 16);
    }
    wide
}

/// The nearest f16, ties to even.
#[inline(always)]
pub(super) fn narrow_f16<const LANES: usize>(x: [f32; LANES]) -> [f16; LANES] {
    let mut halves = [f16::ZERO; LANES];
    for i in 0..LANES {
        halves[i] = nearest_f16(x[i]);
    }
    halves
}

/// The nearest bf16, ties to even.
#[inline(always)]
pub(super) fn narrow_bf16<const LANES: usize>(x: [f32; LANES]) -> [bf16; LANES] {
    let mut halves = [bf16::ZERO; LANES];
    for i in 0..LANES {
        halves[i] = nearest_bf16(x[i]);
    }
    halves
}

#[cfg(not(target_arch = "aarch64"))]
#[inline(always)]
fn f32_of_f16(x: f16) -> f32 {
    // The five bits of the exponent become the lowest of eight. So the number is too small by a power of two, whether the f16 is
    // normal or denormal, and the product is exact.
    const TOO_SMALL: f32 = f32::from_bits((BIAS + BIAS - F16_BIAS) << EXPONENT);
    const ONES: u32 = 31 << EXPONENT;
    const FRACTION: u32 = (1 << EXPONENT) - 1;
    let bits = ((u32::from(x.to_bits()) << 16) as i32 >> 3) as u32 & (SIGN | ONES | FRACTION);
    // An exponent of ones, of infinity and NaN, stays one.
    let infinity = if bits & ONES == ONES { INFINITY } else { 0 };
    f32::from_bits(bits | infinity) * TOO_SMALL
}

#[inline(always)]
fn nearest_f16(x: f32) -> f16 {
    const DROPPED: u32 = 23 - 10;
    const SMALLEST_NORMAL: u32 = (BIAS - F16_BIAS + 1) << EXPONENT;
    const TOO_LARGE: u32 = (BIAS + F16_BIAS + 1) << EXPONENT;
    /// 0.5: the last bit of an f32 from here on is the last bit of a denormal f16, 2^-24. So adding it rounds.
    const HALF: u32 = (BIAS - 1) << EXPONENT;
    let magnitude = x.to_bits() & !SIGN;
    // Adding just below half of the last bit that remains, and that bit, carries exactly when the value rounds up. The carry may
    // reach the exponent, and makes infinity of the largest values.
    let rounded = magnitude + ((1 << (DROPPED - 1)) - 1) + (magnitude >> DROPPED & 1);
    let normal = rounded.wrapping_sub((BIAS - F16_BIAS) << EXPONENT) >> DROPPED;
    let denormal = (f32::from_bits(magnitude) + f32::from_bits(HALF)).to_bits().wrapping_sub(HALF);
    let finite = if magnitude < SMALLEST_NORMAL { denormal } else { normal };
    let infinity_or_nan = if magnitude > INFINITY { 0x7e00 } else { 0x7c00 };
    let half = if magnitude >= TOO_LARGE { infinity_or_nan } else { finite };
    f16::from_bits(half as u16 | (x.to_bits() >> 16) as u16 & 0x8000)
}

#[inline(always)]
fn nearest_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    // As in `nearest_f16`. Wrapping: a NaN may carry out of its sign, and is replaced.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // A NaN must stay a NaN, so its quiet bit is set and its payload is not rounded.
    let quiet = bits | 0x0040_0000;
    bf16::from_bits(((if x.is_nan() { quiet } else { rounded }) >> 16) as u16)
}
