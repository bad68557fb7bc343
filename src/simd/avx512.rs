//! AVX-512: sixteen lanes, 32 registers, and mask registers. Also AVX-512 BF16, which adds dot products of pairs.
#![cfg(target_arch = "x86_64")]

use crate::element::{Bf16Pair, DType, Element, bf16, f16};
use crate::simd::bf16_dot::{PairDots, PairKernel};
use crate::simd::level_token::{level, op};
use crate::simd::register_tiles::{dot_tiles, strips};
use crate::simd::vector::{MAX_LANES, Part, Simd};
use std::arch::x86_64::*;

/// A [`level!`] with the features of [`Avx512`] and further ones. The list of AVX-512 features is only here.
macro_rules! avx512_level {
    ($(#[$doc:meta])* $token:ident ($($more:tt)*) $($enter:tt)+) => {
        level! {
            $(#[$doc])*
            $token = is_x86_feature_detected(
                "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c" $(, $more)*
            )
            $($enter)+
        }
    };
}

avx512_level! {
    /// The proof that this processor has AVX-512 F, BW, DQ and VL, and the features of [`Avx2`](crate::simd::avx2::Avx2).
    Avx512()
    fn enter<K: Part<Avx512>>(part, simd) { part.run(simd) }
}

avx512_level! {
    /// The proof that this processor has AVX-512 BF16 and the features of [`Avx512`].
    Avx512Bf16("avx512bf16")
    fn enter_pairs<K: PairKernel>(kernel, dots) { kernel.run(dots.base(), dots) }
}

impl Avx512Bf16 {
    /// The token of the level below. The features of this token include all features of that level.
    #[inline(always)]
    pub(in crate::simd) fn base(self) -> Avx512 {
        Avx512(())
    }
}

impl Avx512 {
    /// Rounds to bf16, in the upper halves of the result. A NaN becomes the default NaN, because rounding could carry a
    /// payload into the sign. (The instruction of AVX-512 BF16 is not used, because it flushes denormal numbers to 0.)
    #[inline(always)]
    fn round_to_bf16(self, x: __m512) -> __m512i {
        op!(self, {
            let bits = _mm512_castps_si512(_mm512_fixupimm_ps::<0>(x, x, _mm512_set1_epi32(0x33)));
            // Adding 0x7fff and the last bit that remains carries into the upper half exactly when the value rounds up.
            let odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x1_0000));
            let even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
            _mm512_mask_add_epi32(even, odd, bits, _mm512_set1_epi32(0x8000))
        })
    }
}

/// Conversions of half types, and masks for part of a vector.
impl Avx512 {
    /// With `_mm512_cvt_roundph_ps`, because `_mm512_cvtph_ps` becomes a form that suppresses exceptions, and that form takes
    /// no operand from memory.
    #[inline(always)]
    fn widen_f16(self, halves: __m256i) -> __m512 {
        op!(self, _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(halves))
    }
    /// A bf16 is the upper half of the f32 of the same value.
    #[inline(always)]
    fn widen_bf16(self, halves: __m256i) -> __m512 {
        op!(self, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))))
    }
    #[inline(always)]
    fn narrow_f16(self, x: __m512) -> __m256i {
        op!(self, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
    }
    #[inline(always)]
    fn narrow_bf16(self, x: __m512) -> __m256i {
        op!(self, _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(self.round_to_bf16(x))))
    }
    /// A mask of the first `count` lanes.
    #[inline(always)]
    fn first(self, count: usize) -> __mmask16 {
        assert!(count <= Self::LANES);
        ((1u32 << count) - 1) as __mmask16
    }
}

// SAFETY: sixteen pairs are one vector of 512 bits, and `load_pairs` is one load of it. The other two read one pair: 32 bits.
unsafe impl PairDots<Avx512> for Avx512Bf16 {
    #[inline(always)]
    unsafe fn load_pairs(self, p: *const Bf16Pair) -> __m512 {
        // SAFETY: the caller's promise (sixteen pairs are 64 bytes, and the instruction asks for no alignment); the token.
        unsafe { _mm512_loadu_ps(p.cast()) }
    }
    #[inline(always)]
    fn load_pairs_part(self, x: &[bf16]) -> __m512 {
        assert!(x.len() <= 2 * Avx512::LANES);
        let mask = ((1u64 << x.len()) - 1) as __mmask32;
        // SAFETY: elements that the mask leaves out are not read; the token for the instruction.
        unsafe { _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn add_dots(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: both types are 64 bytes, and every bit pattern is valid for both.
        let (a, b) =
            unsafe { (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b)) };
        op!(self, _mm512_dpbf16_ps(c, a, b))
    }
    #[inline(always)]
    unsafe fn broadcast(self, a: *const Bf16Pair) -> __m512 {
        // SAFETY: the caller's promise; the token for the instruction.
        unsafe { broadcast(a) }
    }
    #[inline(always)]
    unsafe fn add_dots_at(self, a: *const Bf16Pair, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller's promise; the token for the instructions.
        unsafe { add_dots_at(a, b, c) }
    }
}

/// A broadcast that the compiler cannot move. Otherwise it gathers the broadcasts of many steps and spills them: bf16 prefill
/// took 20% longer.
///
/// # Safety
/// * `a` is valid for reads
#[inline]
#[target_feature(enable = "avx512f")]
#[cfg(target_pointer_width = "64")]
unsafe fn broadcast(a: *const Bf16Pair) -> __m512 {
    let lanes;
    // SAFETY: the instruction reads the 32 bits at `a`, a pair, which is valid for reads (the caller's promise). It writes
    // `lanes` and nothing else. The address is all 64 bits of a register, as a pointer is here.
    unsafe {
        std::arch::asm!(
            "vbroadcastss {lanes}, dword ptr [{a}]",
            a = in(reg) a,
            lanes = lateout(zmm_reg) lanes,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    lanes
}

/// The dot product with a broadcast as its memory operand, also one that the compiler cannot move.
///
/// # Safety
/// * `a` is valid for reads
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
#[cfg(target_pointer_width = "64")]
unsafe fn add_dots_at(a: *const Bf16Pair, b: __m512, mut c: __m512) -> __m512 {
    // SAFETY: as in `broadcast`, except that it writes `c`.
    unsafe {
        std::arch::asm!(
            "vdpbf16ps {c}, {b}, dword ptr [{a}]{{1to16}}",
            a = in(reg) a,
            b = in(zmm_reg) b,
            c = inout(zmm_reg) c,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    c
}

/// `broadcast` for targets whose pointers are shorter than an address register (x86_64-unknown-linux-gnux32), with intrinsics.
///
/// # Safety
/// * `a` is valid for reads
#[inline]
#[target_feature(enable = "avx512f")]
#[cfg(not(target_pointer_width = "64"))]
unsafe fn broadcast(a: *const Bf16Pair) -> __m512 {
    // SAFETY: a pair is 32 bits, and every bit pattern is a valid i32; the caller's promise.
    _mm512_castsi512_ps(_mm512_set1_epi32(unsafe { a.cast::<i32>().read_unaligned() }))
}

/// `add_dots_at` for such targets.
///
/// # Safety
/// * `a` is valid for reads
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
#[cfg(not(target_pointer_width = "64"))]
unsafe fn add_dots_at(a: *const Bf16Pair, b: __m512, c: __m512) -> __m512 {
    // SAFETY: the caller's promise; both types are 64 bytes, and every bit pattern is valid for both.
    unsafe {
        let a = std::mem::transmute::<__m512, __m512bh>(broadcast(a));
        _mm512_dpbf16_ps(c, a, std::mem::transmute::<__m512, __m512bh>(b))
    }
}

// SAFETY: a vector of 512 bits has sixteen lanes. Only `detect` makes a token, or a token with more features does. Each load
// and store is one instruction at the pointer, of 64 bytes for f32, 32 for half types and 16 for masks. Loads and stores of
// parts access only lanes of the mask, and `first` selects no more lanes than the slice has elements. `unrelated` returns its
// argument (an empty template). The macros write `dot_tile` and `strip`.
unsafe impl Simd for Avx512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    // Tiles of 8 x 2 vectors: sixteen sums. 12 x 2 runs out of registers for addresses. For sixteen multiply-adds, 8 x 2 loads
    // ten vectors or elements and 16 x 1 loads seventeen. Loads are the limit of 16 x 1 on a processor that loads no faster
    // than it multiplies (Zen 5: 93% of peak against 99.5% in a bare loop).
    const PRODUCT_ROWS: [usize; 2] = [16, 8];
    // The registers hold four vectors with all constants. They take 0.88 of the time of one vector at a time.
    const EXP_VECTORS: usize = 4;
    const HAS_PICK_16: bool = true;
    const SUMS_ORDER: [usize; MAX_LANES] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];

    // A single row reads two of the other rows at a time, so its reads are nearly sequential, and adds up eight such groups
    // together. With four, eight or sixteen rows at a time, bare loops over f16 in memory took 1.1, 1.4 and 1.1 times as long
    // (Zen 5). Two or more rows share each load. At least eight chains keep the multipliers busy, and the registers hold
    // sixteen.
    dot_tiles! {
        1 => 2 x 8,
        2 => 4 x 2,
        3 => 4 x 1,
        4 => 4 x 1,
    }
    // Eight vectors if there are registers for them. Then 128 elements are one strip, and memory is read sequentially. Shorter
    // rows have strips of four.
    strips! {
        1 => 8 or 4,
        2 => 8 or 4,
        3 => 4,
        4 => 4,
    }

    type F32 = __m512;
    type I32 = __m512i;
    type Mask = __mmask16;

    #[inline(always)]
    fn call<P: Part<Self>>(self, part: P) -> P::Output {
        self.enter(part)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(self, _mm512_set1_ps(x))
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        op!(self, _mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn lane_numbers(self) -> __m512 {
        op!(self, _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's promise; the token for the instruction.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m512) {
        // SAFETY: the caller's promise; the token for the instruction.
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        // SAFETY: the caller's promise (sixteen f16 are 32 bytes); the token for the instruction.
        self.widen_f16(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: the caller's promise (sixteen bf16 are 32 bytes); the token for the instruction.
        self.widen_bf16(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: __m512) {
        // SAFETY: the caller's promise (sixteen f16 are 32 bytes); the token for the instruction.
        unsafe { _mm256_storeu_si256(p.cast(), self.narrow_f16(x)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, x: __m512) {
        // SAFETY: the caller's promise (sixteen bf16 are 32 bytes); the token for the instruction.
        unsafe { _mm256_storeu_si256(p.cast(), self.narrow_bf16(x)) }
    }

    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> __m512 {
        let some = self.first(x.len());
        // SAFETY: lanes that the mask leaves out are not read; the token for the instruction.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), some, x.as_ptr()) }
    }
    #[inline(always)]
    fn store_part(self, to: &mut [f32], x: __m512) {
        let some = self.first(to.len());
        // SAFETY: lanes that the mask leaves out are not written; the token for the instruction.
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), some, x) }
    }
    // A part of a half type is stored through the stack, because with masked stores softmax of bf16 took 15% longer on Zen 5.
    #[inline(always)]
    fn load_elements_part<T: Element>(self, x: &[T], fill: f32) -> __m512 {
        let some = self.first(x.len());
        // SAFETY: elements that the mask leaves out are not read; the type is that of the data; the token for the instructions.
        unsafe {
            let read = match T::DTYPE {
                DType::F32 => _mm512_maskz_loadu_ps(some, x.as_ptr().cast()),
                DType::F16 => self.widen_f16(_mm256_maskz_loadu_epi16(some, x.as_ptr().cast())),
                DType::Bf16 => self.widen_bf16(_mm256_maskz_loadu_epi16(some, x.as_ptr().cast())),
            };
            _mm512_mask_blend_ps(some, _mm512_set1_ps(fill), read)
        }
    }

    #[inline(always)]
    unsafe fn load_mask(self, p: *const u8) -> __mmask16 {
        // SAFETY: the caller's promise (of sixteen bytes); the token for the instruction.
        let bytes = unsafe { _mm_loadu_si128(p.cast()) };
        op!(self, _mm_test_epi8_mask(bytes, bytes))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(self, _mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(self, _mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(self, _mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(self, _mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(self, _mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(self, _mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(self, _mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        op!(self, _mm512_abs_ps(a))
    }
    #[inline(always)]
    fn ceil(self, a: __m512) -> __m512 {
        op!(self, _mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn lt(self, a: __m512, b: __m512) -> __mmask16 {
        op!(self, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn not_lt(self, a: __m512, b: __m512) -> __mmask16 {
        op!(self, _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b))
    }
    #[inline(always)]
    fn le(self, a: __m512, b: __m512) -> __mmask16 {
        op!(self, _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b))
    }
    #[inline(always)]
    fn eq(self, a: __m512, b: __m512) -> __mmask16 {
        op!(self, _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b))
    }
    #[inline(always)]
    fn and(self, a: __mmask16, b: __mmask16) -> __mmask16 {
        a & b
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, a: __m512, b: __m512) -> __m512 {
        op!(self, _mm512_mask_blend_ps(mask, b, a))
    }
    #[inline(always)]
    fn any(self, mask: __mmask16) -> bool {
        mask != 0
    }

    #[inline(always)]
    fn bits(self, a: __m512) -> __m512i {
        op!(self, _mm512_castps_si512(a))
    }
    #[inline(always)]
    fn float_of_bits(self, a: __m512i) -> __m512 {
        op!(self, _mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(self, _mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(self, _mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn max_i32(self, a: __m512i, b: __m512i) -> __m512i {
        op!(self, _mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn shl_i32<const N: i32>(self, a: __m512i) -> __m512i {
        op!(self, _mm512_sll_epi32(a, _mm_cvtsi32_si128(N)))
    }
    #[inline(always)]
    fn shr_i32<const N: i32>(self, a: __m512i) -> __m512i {
        op!(self, _mm512_sra_epi32(a, _mm_cvtsi32_si128(N)))
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        op!(self, {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn sums(self, x: [__m512; MAX_LANES]) -> __m512 {
        op!(self, {
            // Loops and macros, because a closure that is not inlined is compiled without the level's instructions.
            // In each quarter, lanes two apart are added. One operand is a blend, which any unit executes; the other is a
            // shuffle, which two units execute.
            macro_rules! halves {
                ($a:expr, $b:expr) => {
                    _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, $a, $b), _mm512_shuffle_ps::<0x4e>($a, $b))
                };
            }
            // Then neighbouring lanes are added: the sums of four vectors are side by side.
            let mut quarters = [_mm512_setzero_ps(); 4];
            for (n, quarter) in quarters.iter_mut().enumerate() {
                let (ab, cd) = (halves!(x[4 * n], x[4 * n + 1]), halves!(x[4 * n + 2], x[4 * n + 3]));
                *quarter = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(ab, cd), _mm512_shuffle_ps::<0xdd>(ab, cd));
            }
            // The same with quarters: quarters two apart, then neighbouring quarters.
            macro_rules! far {
                ($a:expr, $b:expr) => {
                    _mm512_add_ps(_mm512_mask_blend_ps(0xff00, $a, $b), _mm512_shuffle_f32x4::<0x4e>($a, $b))
                };
            }
            let (low, high) = (far!(quarters[0], quarters[1]), far!(quarters[2], quarters[3]));
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(low, high), _mm512_shuffle_f32x4::<0xdd>(low, high))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        op!(self, {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn transpose(self, rows: [__m512; MAX_LANES]) -> [__m512; MAX_LANES] {
        // Interleaves neighbours in 32-bit units, pairs in 64-bit units, then quarters twice: log2(16) steps of sixteen
        // shuffles.
        op!(self, {
            let (mut pairs, mut fours, mut eights, mut out) = (rows, rows, rows, rows);
            for i in 0..8 {
                let (a, b) = (rows[2 * i], rows[2 * i + 1]);
                (pairs[2 * i], pairs[2 * i + 1]) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            }
            // fours[4 * n + i]: in each quarter, column i of that quarter, rows 4n..4n+4.
            for i in 0..8 {
                let (a, b) = (pairs[i / 2 * 4 + i % 2], pairs[i / 2 * 4 + i % 2 + 2]);
                let low = i / 2 * 4 + i % 2 * 2;
                (fours[low], fours[low + 1]) = (_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
            }
            // eights[8 * n + 4 * half + i]: quarters `half` and `half + 2` of column i, rows 8n..8n+8.
            for i in 0..8 {
                let low = i / 4 * 8 + i % 4;
                let (a, b) = (fours[low], fours[low + 4]);
                eights[low] = _mm512_shuffle_f32x4::<0x88>(a, b);
                eights[low + 4] = _mm512_shuffle_f32x4::<0xdd>(a, b);
            }
            // Column c is in quarter c / 4, which is the first or the second quarter that the `eights` of its parity hold.
            for c in 0..8 {
                let (a, b) = (eights[c], eights[c + 8]);
                (out[c], out[c + 8]) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            }
            out
        })
    }
    #[inline(always)]
    fn transpose_masks(self, rows: [__mmask16; MAX_LANES]) -> [__mmask16; MAX_LANES] {
        // The rows are the lanes of one vector. Column c is bit c of each lane.
        // SAFETY: sixteen masks are 32 bytes; the token for the instruction.
        let rows = unsafe { _mm256_loadu_si256(rows.as_ptr().cast()) };
        let mut columns = [0; MAX_LANES];
        for (c, column) in columns.iter_mut().enumerate() {
            *column = op!(self, _mm256_test_epi16_mask(rows, _mm256_set1_epi16(1 << c)));
        }
        columns
    }
    #[inline(always)]
    #[cfg(target_pointer_width = "64")]
    fn unrelated<T>(self, mut p: *const T) -> *const T {
        // SAFETY: an empty template accesses no memory, stack or flags, and its output is its input. (`readonly` promises less
        // than `nomem`, which is enough.)
        unsafe { std::arch::asm!("/* {0} */", inout(reg) p, options(pure, readonly, nostack, preserves_flags)) };
        p
    }
    #[inline(always)]
    fn pick(self, table: __m512, k: __m512i) -> __m512 {
        op!(self, _mm512_permutexvar_ps(k, table))
    }
    #[inline(always)]
    fn pack_f16(self, a: __m512, b: __m512) -> __m512 {
        op!(self, {
            let low = _mm512_castsi256_si512(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
            let high = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(b);
            _mm512_castsi512_ps(_mm512_inserti64x4::<1>(low, high))
        })
    }
    #[inline(always)]
    fn pack_bf16(self, a: __m512, b: __m512) -> __m512 {
        op!(self, {
            let odd_words = _mm512_set_epi16(
                63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13,
                11, 9, 7, 5, 3, 1,
            );
            _mm512_castsi512_ps(_mm512_permutex2var_epi16(self.round_to_bf16(a), odd_words, self.round_to_bf16(b)))
        })
    }
    #[inline(always)]
    unsafe fn stream(self, p: *mut f32, x: __m512) {
        // SAFETY: the caller's promise; the token for the instruction.
        unsafe { _mm512_stream_ps(p, x) }
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
