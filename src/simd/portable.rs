//! The level of every processor: plain arrays and loops, which the compiler turns into the target's baseline vectors.
//!
//! A multiply-add is fused only if the target always has the instruction. Elsewhere the fused form would be a library call,
//! about fifty times slower, so it rounds twice.

use crate::element::{bf16, f16};
use crate::simd::halves::{narrow_bf16, narrow_f16, widen_bf16, widen_f16};
use crate::simd::register_tiles::{dot_tiles, strips};
use crate::simd::vector::{MAX_LANES, Part, Simd};

/// Vectors of `LANES` f32. [`Level::Portable`](crate::level::Level::Portable) has eight. Tests also run vectors of four, which
/// other architectures have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Portable<const LANES: usize>;

/// As `map` of arrays, which the compiler does not always inline.
#[inline(always)]
fn map<A: Copy, B: Copy + Default, const LANES: usize>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i]);
    }
    out
}

#[inline(always)]
fn map2<A: Copy, B: Copy, C: Copy + Default, const LANES: usize>(
    a: [A; LANES],
    b: [B; LANES],
    f: impl Fn(A, B) -> C,
) -> [C; LANES] {
    let mut out = [C::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

/// The half-type elements of a, then those of b, in memory order.
#[inline(always)]
fn pack<const LANES: usize>(a: [u16; LANES], b: [u16; LANES]) -> [f32; LANES] {
    let mut packed = [0.0; LANES];
    for i in 0..LANES {
        let x = if i < LANES / 2 { &a[2 * i..] } else { &b[2 * i - LANES..] };
        let ([a, b], [c, d]) = (x[0].to_ne_bytes(), x[1].to_ne_bytes());
        packed[i] = f32::from_ne_bytes([a, b, c, d]);
    }
    packed
}

/// `lanes`, checked against the rules of [`Simd::LANES`].
const fn checked(lanes: usize) -> usize {
    assert!(lanes.is_power_of_two() && lanes <= MAX_LANES);
    lanes
}

// SAFETY: `checked` enforces the bounds of `LANES`. These operations need no instructions beyond the target's own. Each load and
// store goes through a pointer to an array of `LANES` elements. The parts of slices and `unrelated` are the trait's own. The
// macros write `dot_tile` and `strip`.
unsafe impl<const LANES: usize> Simd for Portable<LANES> {
    const LANES: usize = checked(LANES);
    // Sixteen 128-bit registers (x86-64 without extensions) hold eight vectors of eight lanes.
    const REGISTERS: usize = 64 / LANES;
    // All but four of the registers: 4 or 2 x 2 of eight lanes, 12 or 6 x 2 of four.
    const PRODUCT_ROWS: [usize; 2] = [Self::REGISTERS - 4, (Self::REGISTERS - 4) / 2];
    // Eight registers do not hold the constants and a second chain.
    const EXP_VECTORS: usize = 1;
    const HAS_PICK_16: bool = false;

    // A tile's sums and the vectors of a step fit the registers. With twice the sums, decode of one row took a third longer in f32
    // and two thirds in bf16 (Zen 3, SSE2). With AVX, a vector of eight is one register. ARM has 32 registers.
    #[cfg(not(any(target_feature = "avx", target_arch = "aarch64")))]
    dot_tiles! {
        1 => 4 x 2,
        2 => 2 x 2,
        3 => 1 x 2,
        4 => 1 x 2,
    }
    #[cfg(any(target_feature = "avx", target_arch = "aarch64"))]
    dot_tiles! {
        1 => 8 x 1,
        2 => 4 x 1,
        3 => 2 x 1,
        4 => 2 x 1,
    }
    #[cfg(not(any(target_feature = "avx", target_arch = "aarch64")))]
    strips! {
        1 => 4,
        2 => 2,
        3 => 2,
        4 => 2,
    }
    #[cfg(any(target_feature = "avx", target_arch = "aarch64"))]
    strips! {
        1 => 8,
        2 => 4,
        3 => 2,
        4 => 2,
    }

    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Mask = [bool; LANES];

    #[inline(never)]
    fn call<P: Part<Self>>(self, part: P) -> P::Output {
        part.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        [x; LANES]
    }
    #[inline(always)]
    fn lane_numbers(self) -> Self::F32 {
        std::array::from_fn(|i| i as f32)
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F32 {
        // SAFETY: the caller's promise is exactly this read.
        unsafe { p.cast::<Self::F32>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F32) {
        // SAFETY: the caller's promise is exactly this write.
        unsafe { p.cast::<Self::F32>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::F32 {
        // SAFETY: the caller's promise is exactly this read.
        widen_f16(unsafe { p.cast::<[f16; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Self::F32 {
        // SAFETY: the caller's promise is exactly this read.
        widen_bf16(unsafe { p.cast::<[bf16; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: Self::F32) {
        // SAFETY: the caller's promise is exactly this write.
        unsafe { p.cast::<[f16; LANES]>().write_unaligned(narrow_f16(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, x: Self::F32) {
        // SAFETY: the caller's promise is exactly this write.
        unsafe { p.cast::<[bf16; LANES]>().write_unaligned(narrow_bf16(x)) }
    }

    #[inline(always)]
    unsafe fn load_mask(self, p: *const u8) -> Self::Mask {
        // SAFETY: the caller's promise is exactly this read.
        map(unsafe { p.cast::<[u8; LANES]>().read_unaligned() }, |byte| byte != 0)
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        let mut out = c;
        for i in 0..LANES {
            out[i] = if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
                a[i].mul_add(b[i], c[i])
            } else {
                a[i] * b[i] + c[i]
            };
        }
        out
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        map(a, f32::abs)
    }
    #[inline(always)]
    fn ceil(self, a: Self::F32) -> Self::F32 {
        map(a, f32::ceil)
    }

    #[inline(always)]
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        map2(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn not_lt(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        map2(a, b, |a, b| !matches!(a.partial_cmp(&b), Some(std::cmp::Ordering::Less)))
    }
    #[inline(always)]
    fn le(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        map2(a, b, |a, b| a <= b)
    }
    #[inline(always)]
    fn eq(self, a: Self::F32, b: Self::F32) -> Self::Mask {
        map2(a, b, |a, b| a == b)
    }
    #[inline(always)]
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask {
        map2(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32 {
        let mut out = b;
        for i in 0..LANES {
            out[i] = if mask[i] { a[i] } else { b[i] };
        }
        out
    }
    #[inline(always)]
    fn any(self, mask: Self::Mask) -> bool {
        mask.into_iter().any(|yes| yes)
    }

    #[inline(always)]
    fn bits(self, a: Self::F32) -> Self::I32 {
        map(a, |a| a.to_bits() as i32)
    }
    #[inline(always)]
    fn float_of_bits(self, a: Self::I32) -> Self::F32 {
        map(a, |a| f32::from_bits(a as u32))
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        map2(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        map2(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        map2(a, b, i32::max)
    }
    #[inline(always)]
    fn shl_i32<const N: i32>(self, a: Self::I32) -> Self::I32 {
        map(a, |a| a << N)
    }
    #[inline(always)]
    fn shr_i32<const N: i32>(self, a: Self::I32) -> Self::I32 {
        map(a, |a| a >> N)
    }

    #[inline(always)]
    fn sum(self, a: Self::F32) -> f32 {
        // The upper half is added to the lower half.
        let mut folded = a;
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                folded[i] += folded[i + half];
            }
            half /= 2;
        }
        folded[0]
    }
    #[inline(always)]
    fn sums(self, x: [Self::F32; MAX_LANES]) -> Self::F32 {
        // Neighbouring lanes of each vector are added.
        let mut sums = [0.0; LANES];
        for (sum, vector) in sums.iter_mut().zip(x) {
            let mut folded = vector;
            let mut count = LANES;
            while count > 1 {
                count /= 2;
                for i in 0..count {
                    folded[i] = folded[2 * i] + folded[2 * i + 1];
                }
            }
            *sum = folded[0];
        }
        sums
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F32) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn transpose(self, x: [Self::F32; MAX_LANES]) -> [Self::F32; MAX_LANES] {
        transposed(x)
    }
    #[inline(always)]
    fn transpose_masks(self, x: [Self::Mask; MAX_LANES]) -> [Self::Mask; MAX_LANES] {
        transposed(x)
    }
    #[inline(always)]
    fn pick(self, table: Self::F32, k: Self::I32) -> Self::F32 {
        map(k, |k| table[k as usize % LANES])
    }
    #[inline(always)]
    fn pack_f16(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        pack(map(narrow_f16(a), f16::to_bits), map(narrow_f16(b), f16::to_bits))
    }
    #[inline(always)]
    fn pack_bf16(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        pack(map(narrow_bf16(a), bf16::to_bits), map(narrow_bf16(b), bf16::to_bits))
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, x: Self::F32) {
        // SAFETY: the caller's promise covers this write.
        unsafe { self.store(p, x) }
    }
    #[inline(always)]
    fn fence(self) {}

    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
    #[inline(always)]
    fn prefetch_near<T>(self, _: *const T) {}
}

#[inline(always)]
fn transposed<T: Copy, const LANES: usize>(x: [[T; LANES]; MAX_LANES]) -> [[T; LANES]; MAX_LANES] {
    let mut columns = x;
    for r in 0..LANES {
        for c in 0..LANES {
            columns[c][r] = x[r][c];
        }
    }
    columns
}
