//! AVX2 with FMA and F16C: eight lanes, sixteen registers.
#![cfg(target_arch = "x86_64")]

use crate::element::{DType, Element, bf16, f16};
use crate::simd::level_token::{level, op};
use crate::simd::register_tiles::{dot_tiles, strips};
use crate::simd::vector::{MAX_LANES, Part, Simd};
use std::arch::x86_64::*;

level! {
    /// The proof that this processor has AVX2, FMA and F16C.
    Avx2 = is_x86_feature_detected("avx2", "fma", "f16c")
    fn enter<K: Part<Avx2>>(part, simd) { part.run(simd) }
}

impl Avx2 {
    /// The bf16 nearest to each lane, in its lower half.
    #[inline(always)]
    fn round_bf16(self, x: __m256) -> __m256i {
        op!(self, {
            let bits = _mm256_castps_si256(x);
            // Adding 0x7fff and the last bit that remains carries into the upper half exactly when the value rounds up.
            let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
            // A NaN must stay a NaN, so its quiet bit is set and its payload is not rounded.
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
        })
    }

    /// The bf16 nearest to each lane, in memory order.
    #[inline(always)]
    fn narrow_bf16(self, x: __m256) -> __m128i {
        let rounded = self.round_bf16(x);
        op!(self, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256::<1>(rounded)))
    }

    /// The f16 nearest to each lane, in memory order.
    #[inline(always)]
    fn narrow_f16(self, x: __m256) -> __m128i {
        op!(self, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
    }

    /// The f32 of eight bf16: a bf16 is the upper half of the f32 of the same value.
    #[inline(always)]
    fn widen_bf16(self, halves: __m128i) -> __m256 {
        op!(self, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))))
    }

    /// All bits of the first `count` lanes, for up to eight.
    #[inline(always)]
    fn first(self, count: usize) -> __m256i {
        const EIGHT_AND_NONE: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        let rest = 8 - count.min(8);
        // SAFETY: `rest` is at most 8, so eight of the sixteen numbers follow; the token for the instruction.
        unsafe { _mm256_loadu_si256(EIGHT_AND_NONE.as_ptr().add(rest).cast()) }
    }

    /// Up to eight half-type elements, then zeros. There is no masked load of them, and a copy to the stack is a function call,
    /// around which a loop has to spill its vectors.
    ///
    /// # Safety
    /// * `p` is valid for reads of `count` elements of two bytes
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u16, count: usize) -> __m128i {
        // SAFETY: all reads are in the caller's range. With four elements or more, the last four are, too. Below four, two are
        // read if bit 1 of the count is set, and the last one if bit 0 is. The token for the instructions.
        unsafe {
            if count >= 8 {
                return _mm_loadu_si128(p.cast());
            }
            let (mut low, mut high) = (0, 0);
            if count >= 4 {
                low = p.cast::<u64>().read_unaligned();
                // The last four elements without those that are among the first four.
                high = p.add(count - 4).cast::<u64>().read_unaligned() >> (16 * (7 - count)) >> 16;
            } else {
                if count & 2 != 0 {
                    low = u64::from(p.cast::<u32>().read_unaligned());
                }
                if count & 1 != 0 {
                    low |= u64::from(p.add(count - 1).read_unaligned()) << (16 * (count - 1));
                }
            }
            _mm_set_epi64x(high as i64, low as i64)
        }
    }

    /// The first `count` of eight half-type elements.
    ///
    /// # Safety
    /// * `p` is valid for writes of `count` elements of two bytes
    #[inline(always)]
    unsafe fn store_halves(self, mut p: *mut u16, count: usize, x: __m128i) {
        // SAFETY: the caller's range has eight elements or more, of which eight are written, or the bits of `count` are the
        // numbers of elements that are written one after the other, so all are in the range. The token for the instructions.
        unsafe {
            if count >= 8 {
                return _mm_storeu_si128(p.cast(), x);
            }
            let mut rest = _mm_cvtsi128_si64(x) as u64;
            if count & 4 != 0 {
                p.cast::<u64>().write_unaligned(rest);
                (p, rest) = (p.add(4), _mm_extract_epi64::<1>(x) as u64);
            }
            if count & 2 != 0 {
                p.cast::<u32>().write_unaligned(rest as u32);
                (p, rest) = (p.add(2), rest >> 32);
            }
            if count & 1 != 0 {
                p.write_unaligned(rest as u16);
            }
        }
    }

    /// The first `count` of eight f32. Not by a masked store, which is microcode on AMD processors.
    ///
    /// # Safety
    /// * `p` is valid for writes of `count` f32
    #[inline(always)]
    unsafe fn store_floats(self, mut p: *mut f32, count: usize, x: __m256) {
        // SAFETY: the caller's range has eight elements or more, of which eight are written, or the bits of `count` are the
        // numbers of elements that are written one after the other, so all are in the range. The token for the instructions.
        unsafe {
            if count >= 8 {
                return _mm256_storeu_ps(p, x);
            }
            let mut rest = _mm256_castps256_ps128(x);
            if count & 4 != 0 {
                _mm_storeu_ps(p, rest);
                (p, rest) = (p.add(4), _mm256_extractf128_ps::<1>(x));
            }
            if count & 2 != 0 {
                _mm_storel_epi64(p.cast(), _mm_castps_si128(rest));
                (p, rest) = (p.add(2), _mm_movehl_ps(rest, rest));
            }
            if count & 1 != 0 {
                _mm_store_ss(p, rest);
            }
        }
    }
}

// SAFETY: a vector of 256 bits has eight lanes. Only `detect` makes a token. Each load and store is one instruction at the
// pointer, of 32 bytes for f32, 16 for half types and 8 for masks. Loads and stores of part of a vector access `len` elements of
// their slice, at most eight. `unrelated` is the trait's own. The macros write `dot_tile` and `strip`.
unsafe impl Simd for Avx2 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    // Tiles of 6 x 2 vectors: twelve sums, two vectors of the right operand, a broadcast, and one unused register. 4 x 3 needs
    // all sixteen registers, and the compiler spills it.
    const PRODUCT_ROWS: [usize; 2] = [12, 6];
    // Sixteen registers do not hold the constants and a second chain.
    const EXP_VECTORS: usize = 1;
    const HAS_PICK_16: bool = false;

    // Eight chains keep the multipliers busy and leave registers for the operands. Three rows have six chains, because nine
    // would not fit.
    dot_tiles! {
        1 => 8 x 1,
        2 => 4 x 1,
        3 => 2 x 1,
        4 => 2 x 1,
    }
    strips! {
        1 => 8,
        2 => 4,
        3 => 2,
        4 => 2,
    }

    type F32 = __m256;
    type I32 = __m256i;
    type Mask = __m256;

    #[inline(always)]
    fn call<P: Part<Self>>(self, part: P) -> P::Output {
        self.enter(part)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        op!(self, _mm256_set1_ps(x))
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m256i {
        op!(self, _mm256_set1_epi32(x))
    }
    #[inline(always)]
    fn lane_numbers(self) -> __m256 {
        op!(self, _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's promise; the token for the instruction.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m256) {
        // SAFETY: the caller's promise; the token for the instruction.
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m256 {
        // SAFETY: the caller's promise (eight f16 are sixteen bytes); the token for the instruction.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: the caller's promise (eight bf16 are sixteen bytes); the token for the instruction.
        self.widen_bf16(unsafe { _mm_loadu_si128(p.cast()) })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: __m256) {
        // SAFETY: the caller's promise (eight f16 are sixteen bytes); the token for the instruction.
        unsafe { _mm_storeu_si128(p.cast(), self.narrow_f16(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, x: __m256) {
        // SAFETY: the caller's promise (eight bf16 are sixteen bytes); the token for the instruction.
        unsafe { _mm_storeu_si128(p.cast(), self.narrow_bf16(x)) }
    }

    #[inline(always)]
    unsafe fn load_mask(self, p: *const u8) -> __m256 {
        // SAFETY: the caller's promise (of eight bytes); the token for the instruction.
        let bytes = unsafe { _mm_loadl_epi64(p.cast()) };
        op!(self, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256())))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        op!(self, _mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        op!(self, _mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }
    #[inline(always)]
    fn ceil(self, a: __m256) -> __m256 {
        op!(self, _mm256_ceil_ps(a))
    }

    #[inline(always)]
    fn lt(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn not_lt(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_cmp_ps::<_CMP_NLT_UQ>(a, b))
    }
    #[inline(always)]
    fn le(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_cmp_ps::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn eq(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn and(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_and_ps(a, b))
    }
    #[inline(always)]
    fn select(self, mask: __m256, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_blendv_ps(b, a, mask))
    }
    #[inline(always)]
    fn any(self, mask: __m256) -> bool {
        op!(self, _mm256_movemask_ps(mask)) != 0
    }

    #[inline(always)]
    fn bits(self, a: __m256) -> __m256i {
        op!(self, _mm256_castps_si256(a))
    }
    #[inline(always)]
    fn float_of_bits(self, a: __m256i) -> __m256 {
        op!(self, _mm256_castsi256_ps(a))
    }
    #[inline(always)]
    fn add_i32(self, a: __m256i, b: __m256i) -> __m256i {
        op!(self, _mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: __m256i, b: __m256i) -> __m256i {
        op!(self, _mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn max_i32(self, a: __m256i, b: __m256i) -> __m256i {
        op!(self, _mm256_max_epi32(a, b))
    }
    #[inline(always)]
    fn shl_i32<const N: i32>(self, a: __m256i) -> __m256i {
        op!(self, _mm256_slli_epi32::<N>(a))
    }
    #[inline(always)]
    fn shr_i32<const N: i32>(self, a: __m256i) -> __m256i {
        op!(self, _mm256_srai_epi32::<N>(a))
    }

    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        op!(self, {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn sums(self, x: [__m256; MAX_LANES]) -> __m256 {
        op!(self, {
            let [a, b, c, d, e, f, g, h, ..] = x;
            let low = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let high = _mm256_hadd_ps(_mm256_hadd_ps(e, f), _mm256_hadd_ps(g, h));
            // Each half of `low` and `high` holds the sums of four lanes of four vectors.
            let first = _mm256_permute2f128_ps::<0x20>(low, high);
            let second = _mm256_permute2f128_ps::<0x31>(low, high);
            _mm256_add_ps(first, second)
        })
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        op!(self, {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn transpose(self, rows: [__m256; MAX_LANES]) -> [__m256; MAX_LANES] {
        // Interleaves neighbours in 32-bit units, then pairs in 64-bit units, then halves: log2(8) steps of eight shuffles.
        op!(self, {
            let (mut pairs, mut fours, mut out) = (rows, rows, rows);
            for i in 0..4 {
                let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                (pairs[2 * i], pairs[2 * i + 1]) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            }
            for i in 0..4 {
                let (a, b) = (pairs[i / 2 * 4 + i % 2], pairs[i / 2 * 4 + i % 2 + 2]);
                let low = i / 2 * 4 + i % 2 * 2;
                (fours[low], fours[low + 1]) = (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
            }
            for i in 0..4 {
                let (a, b) = (fours[i], fours[i + 4]);
                (out[i], out[i + 4]) = (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            }
            out
        })
    }
    #[inline(always)]
    fn transpose_masks(self, rows: [__m256; MAX_LANES]) -> [__m256; MAX_LANES] {
        self.transpose(rows)
    }
    #[inline(always)]
    fn pick(self, table: __m256, k: __m256i) -> __m256 {
        op!(self, _mm256_permutevar8x32_ps(table, k))
    }
    #[inline(always)]
    fn pack_f16(self, a: __m256, b: __m256) -> __m256 {
        op!(self, _mm256_castsi256_ps(_mm256_set_m128i(self.narrow_f16(b), self.narrow_f16(a))))
    }
    #[inline(always)]
    fn pack_bf16(self, a: __m256, b: __m256) -> __m256 {
        op!(self, {
            // The quarters are a, b, a, b. The two in the middle are swapped.
            let packed = _mm256_packus_epi32(self.round_bf16(a), self.round_bf16(b));
            _mm256_castsi256_ps(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed))
        })
    }
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> __m256 {
        self.load_elements_part(x, fill)
    }
    #[inline(always)]
    fn store_part(self, to: &mut [f32], x: __m256) {
        self.store_elements_part(to, x);
    }
    #[inline(always)]
    fn load_elements_part<T: Element>(self, x: &[T], fill: f32) -> __m256 {
        debug_assert!(x.len() <= Self::LANES);
        let some = self.first(x.len());
        // SAFETY: elements past the slice are not read; the type is that of the data; the token for the instructions.
        unsafe {
            let read = match T::DTYPE {
                DType::F32 => _mm256_maskload_ps(x.as_ptr().cast(), some),
                DType::F16 => _mm256_cvtph_ps(self.load_halves(x.as_ptr().cast(), x.len())),
                DType::Bf16 => self.widen_bf16(self.load_halves(x.as_ptr().cast(), x.len())),
            };
            _mm256_blendv_ps(_mm256_set1_ps(fill), read, _mm256_castsi256_ps(some))
        }
    }
    #[inline(always)]
    fn store_elements_part<T: Element>(self, to: &mut [T], x: __m256) {
        debug_assert!(to.len() <= Self::LANES);
        let p = to.as_mut_ptr();
        match T::DTYPE {
            // SAFETY: T is f32, and `to` has that many elements.
            DType::F32 => unsafe { self.store_floats(p.cast(), to.len(), x) },
            // SAFETY: T is f16, and `to` has that many elements.
            DType::F16 => unsafe { self.store_halves(p.cast(), to.len(), self.narrow_f16(x)) },
            // SAFETY: T is bf16, and `to` has that many elements.
            DType::Bf16 => unsafe { self.store_halves(p.cast(), to.len(), self.narrow_bf16(x)) },
        }
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, x: __m256) {
        // SAFETY: the caller's promise; the token for the instruction.
        unsafe { _mm256_stream_ps(p, x) }
    }
    #[inline(always)]
    fn fence(self) {
        op!(self, _mm_sfence())
    }

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        op!(self, _mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
    #[inline(always)]
    fn prefetch_near<T>(self, p: *const T) {
        op!(self, _mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }
}
