//! Instructions: vectors of f32, one token type per instruction set, and the vector mathematics written over them.
//!
//! Three ideas hold this floor together.
//!
//! * **A token is a proof.** [`Avx2`] can only be made by [`Isa::detect`], after the processor said that it has the
//!   instructions. Whoever holds one may use them, so vector arithmetic is safe to call.
//! * **Code is written once**, generic over [`Simd`], and compiled once for every level: a [`Kernel`] is a piece of work
//!   that runs at whatever level it is handed, and [`Isa::run`] enters it through the one function per level that
//!   enables the level's instructions. Everything below a kernel is `#[inline(always)]`, so that it is compiled inside
//!   that function.
//! * **Lanes are independent.** No operation here mixes lanes but the sums, `max_lane`, the transposes, `pick` and the packing of
//!   half types, which say so.
//!
//! Nothing here knows what the numbers mean.

mod avx2;
mod avx512;
pub(crate) mod exp;
mod portable;

use crate::element::{Bf16Pair, DType, Element, bf16, f16};
use crate::error::Error;
use crate::level::Level;
use portable::Portable;
#[cfg(target_arch = "x86_64")]
use {avx2::Avx2, avx512::Avx512, avx512::Avx512Bf16};

/// Detection: the rest of [`Level`] is plain data.
impl Level {
    /// The levels that this processor has, from the plainest to the fastest.
    pub fn available() -> impl DoubleEndedIterator<Item = Level> {
        Self::ALL.iter().copied().filter(|level| Isa::detect(*level).is_some())
    }

    /// The fastest level that this processor has.
    pub fn best() -> Level {
        Self::available().next_back().unwrap_or(Level::Portable)
    }
}

/// A level together with the proof that this processor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
}

impl Isa {
    /// The proof for `level`, if this processor has it.
    pub(crate) fn detect(level: Level) -> Option<Isa> {
        match level {
            Level::Portable => Some(Isa::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::detect().map(Isa::Avx2),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Avx512::detect().map(Isa::Avx512),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => Avx512Bf16::detect().map(Isa::Avx512Bf16),
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 | Level::Avx512Bf16 => None,
        }
    }

    /// The proof for `level`, or for the fastest level of this processor.
    ///
    /// # Errors
    /// [`Error::LevelUnavailable`].
    pub(crate) fn for_level(level: Option<Level>) -> Result<Isa, Error> {
        match level {
            None => Ok(Isa::best()),
            Some(level) => Isa::detect(level).ok_or(Error::LevelUnavailable { level }),
        }
    }

    /// The fastest level of this processor. (Detection is cached by the standard library: this costs a few loads.)
    pub(crate) fn best() -> Isa {
        Level::ALL.iter().rev().find_map(|level| Self::detect(*level)).unwrap_or(Isa::Portable(Portable))
    }

    pub(crate) fn level(self) -> Level {
        match self {
            Isa::Portable(_) => Level::Portable,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => Level::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(_) => Level::Avx512Bf16,
        }
    }

    /// Elements in one vector of this level.
    pub(crate) fn lanes(self) -> usize {
        self.run(Constants).0
    }

    /// [`Simd::PICKS_OF_SIXTEEN`] of this level.
    pub(crate) fn picks_of_sixteen(self) -> bool {
        self.run(Constants).1
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(simd) => simd.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(simd) => simd.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(simd) => simd.base().enter(kernel),
        }
    }

    /// Whether the level has [`PairDots`].
    pub(crate) fn has_pair_dots(self) -> bool {
        self.level() == Level::Avx512Bf16
    }

    /// Runs `kernel` compiled for this level.
    ///
    /// # Panics
    /// If it has no [`PairDots`].
    #[inline]
    pub(crate) fn run_pairs<K: PairKernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(simd) => simd.enter_pairs(kernel),
            _ => unreachable!("pairs of bf16 at the level {}", self.level()),
        }
    }
}

/// [`Simd::LANES`] and [`Simd::PICKS_OF_SIXTEEN`], for those who know the level at run time.
struct Constants;

impl Kernel for Constants {
    type Output = (usize, bool);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (usize, bool) {
        (S::LANES, S::PICKS_OF_SIXTEEN)
    }
}

/// A piece of work that can be compiled for every level. Implementations mark `run` as `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// A piece of work that can be compiled for every level with [`PairDots`].
pub(crate) trait PairKernel {
    type Output;
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) -> Self::Output;
}

/// Products of pairs of bf16. A vector of them is carried as one of f32: never computed with as such.
pub(crate) trait PairDots<S: Simd>: Copy {
    /// Reads `LANES` pairs from `p`.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` pairs
    unsafe fn load_pairs(self, p: *const Bf16Pair) -> S::F32;
    /// The pairs of `x`, which is at most `LANES` long, then zeros in the lanes past its end.
    fn load_pairs_part(self, x: &[Bf16Pair]) -> S::F32;
    /// In every lane, `c + a.second * b.second`, rounded, plus `a.first * b.first`, rounded. The products are exact.
    /// **Denormal numbers count as 0**, as operands and as results, and the rounding is to nearest whatever the thread's mode.
    fn add_dots(self, a: S::F32, b: S::F32, c: S::F32) -> S::F32;
    /// One pair in every lane.
    ///
    /// # Safety
    /// * `a` is valid for reads
    unsafe fn broadcast(self, a: *const Bf16Pair) -> S::F32;
    /// [`PairDots::add_dots`] with one pair, `a`, in every lane.
    ///
    /// # Safety
    /// * `a` is valid for reads
    unsafe fn add_dots_at(self, a: *const Bf16Pair, b: S::F32, c: S::F32) -> S::F32;
}

/// The vector operations of one level: `LANES` f32 side by side.
///
/// Arithmetic is IEEE 754 single precision, rounded to nearest, ties to even.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Elements in one vector.
    const LANES: usize;
    /// Vectors that the register file holds at once: how many accumulators a loop can afford.
    const REGISTERS: usize;
    /// Whether [`pick`](Self::pick) is one instruction, of sixteen lanes, and multiply-add fused. (With eight roots and half
    /// as many registers, AVX2 is a quarter slower than with none.)
    const PICKS_OF_SIXTEEN: bool;
    /// `LANES` values of f32.
    type F32: Copy;
    /// `LANES` values of i32; what it adds and shifts wraps.
    type I32: Copy;
    /// `LANES` yes-or-no answers.
    type Mask: Copy;

    fn splat(self, x: f32) -> Self::F32;
    fn splat_i32(self, x: i32) -> Self::I32;
    /// `[0.0, 1.0, 2.0, …]`: the number of each lane.
    fn lane_numbers(self) -> Self::F32;

    /// Reads `LANES` f32 from `p`.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` f32; it needs no alignment.
    unsafe fn load(self, p: *const f32) -> Self::F32;
    /// Writes `LANES` f32 to `p`.
    ///
    /// # Safety
    /// * `p` is valid for writes of `LANES` f32; it needs no alignment.
    unsafe fn store(self, p: *mut f32, x: Self::F32);
    /// Reads `LANES` f16 from `p` and widens them, exactly.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` f16.
    unsafe fn load_f16(self, p: *const f16) -> Self::F32;
    /// Reads `LANES` bf16 from `p` and widens them, exactly.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` bf16.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::F32;
    /// Rounds to f16, to nearest with ties to even, and writes `LANES` of them to `p`.
    ///
    /// # Safety
    /// * `p` is valid for writes of `LANES` f16.
    unsafe fn store_f16(self, p: *mut f16, x: Self::F32);
    /// Rounds to bf16, to nearest with ties to even, and writes `LANES` of them to `p`.
    ///
    /// # Safety
    /// * `p` is valid for writes of `LANES` bf16.
    unsafe fn store_bf16(self, p: *mut bf16, x: Self::F32);

    /// Reads `LANES` bytes from `p`: yes where they are not 0.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` bytes.
    unsafe fn load_answers(self, p: *const u8) -> Self::Mask;

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, with one rounding where the level has fused multiply-add and two where it has not.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger one; **`b` where either is NaN** (what x86 does, so that it is one instruction there).
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The smaller one; **`b` where either is NaN**.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn abs(self, a: Self::F32) -> Self::F32;
    /// The smallest integer not below `a`.
    fn ceil(self, a: Self::F32) -> Self::F32;

    /// `a < b`; false where either is NaN.
    fn lt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `!(a < b)`; **true** where either is NaN.
    fn not_lt(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a <= b`; false where either is NaN.
    fn le(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    /// `a == b`; false where either is NaN.
    fn eq(self, a: Self::F32, b: Self::F32) -> Self::Mask;
    fn and(self, a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// `a` where the mask says yes, `b` elsewhere. The other operand's bits never matter.
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Whether any lane says yes.
    fn any(self, mask: Self::Mask) -> bool;

    fn bits(self, a: Self::F32) -> Self::I32;
    fn float_of_bits(self, a: Self::I32) -> Self::F32;
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    fn sub_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// The larger of two signed integers.
    fn max_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    fn shl_i32<const N: i32>(self, a: Self::I32) -> Self::I32;
    /// Shifts right and repeats the sign.
    fn shr_i32<const N: i32>(self, a: Self::I32) -> Self::I32;

    /// The sum of all lanes, in a fixed order: halves folded onto each other. So rotating the lanes does not change it,
    /// which makes the sum of a row independent of the lane that its first key falls in.
    fn sum(self, a: Self::F32) -> f32;
    /// The sum of all lanes of each of `LANES` vectors (`x[..LANES]`), each in the same order, wherever it stands among them;
    /// which order is the level's own.
    fn sums(self, x: [Self::F32; MAX_LANES]) -> Self::F32;
    /// The largest lane; NaN lanes may be ignored.
    fn max_lane(self, a: Self::F32) -> f32;
    /// The transpose of `LANES` vectors (`x[..LANES]`): lane i of vector j goes to lane j of vector i.
    fn transpose(self, x: [Self::F32; MAX_LANES]) -> [Self::F32; MAX_LANES];
    /// The same of answers.
    fn transpose_answers(self, x: [Self::Mask; MAX_LANES]) -> [Self::Mask; MAX_LANES];

    /// The same pointer, which the compiler no longer knows to be at some distance from another one.
    #[inline(always)]
    fn unrelated<T>(self, p: *const T) -> *const T {
        p
    }
    /// In every lane, the lane of `table` whose number is what the lowest bits of `k` say.
    fn pick(self, table: Self::F32, k: Self::I32) -> Self::F32;
    /// Rounds to f16 as [`store_f16`](Self::store_f16): the `2 * LANES` results are carried as one vector, which is never
    /// computed with as such.
    fn pack_f16(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The same to bf16.
    fn pack_bf16(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// [`store`](Self::store) past the caches, where the level can: memory need not be read before it is written over.
    /// Whole cache lines, please. What is streamed is in no order with other stores until a [`fence`](Self::fence), which
    /// belongs to whoever owns the whole call (`softmax/walk.rs`, and nobody below it): one after the last line, before
    /// anything can tell another thread that the output is there.
    ///
    /// # Safety
    /// * `p` is valid for writes of `LANES` f32 and aligned to as many bytes.
    /// * A [`fence`](Self::fence) comes after the last, before anybody reads or writes that memory.
    unsafe fn stream(self, p: *mut f32, x: Self::F32);
    /// Orders what was streamed before whatever is written next, as ordinary stores are. Once a call, by `softmax/walk.rs`
    /// alone.
    fn fence(self);

    /// Asks for the cache line of `p` ([`LINE`]), which need not be readable, into the second cache.
    fn prefetch<T>(self, p: *const T);
    /// Asks for the cache line of `p`, which need not be readable, into the first cache.
    fn prefetch_near<T>(self, p: *const T);

    /// Reads `LANES` elements of any type from `p` and widens them, exactly.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` elements.
    #[inline(always)]
    unsafe fn load_as<T: Element>(self, p: *const T) -> Self::F32 {
        // SAFETY: the caller's promise; `DTYPE` names T, and only the three types that it can name implement `Element`.
        unsafe {
            match T::DTYPE {
                DType::F32 => self.load(p.cast()),
                DType::F16 => self.load_f16(p.cast()),
                DType::Bf16 => self.load_bf16(p.cast()),
            }
        }
    }

    /// Rounds to `T`, to nearest with ties to even, and writes `LANES` of them to `p`.
    ///
    /// # Safety
    /// * `p` is valid for writes of `LANES` elements.
    #[inline(always)]
    unsafe fn store_as<T: Element>(self, p: *mut T, x: Self::F32) {
        // SAFETY: the caller's promise; `DTYPE` names T, and only the three types that it can name implement `Element`.
        unsafe {
            match T::DTYPE {
                DType::F32 => self.store(p.cast(), x),
                DType::F16 => self.store_f16(p.cast(), x),
                DType::Bf16 => self.store_bf16(p.cast(), x),
            }
        }
    }

    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }

    /// The first `LANES` elements of `x`.
    ///
    /// # Panics
    /// Where `x` is shorter than that (our own mistake, never a user's).
    #[inline(always)]
    fn load_slice(self, x: &[f32]) -> Self::F32 {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.load(x.as_ptr()) }
    }

    /// Writes the first `LANES` elements of `to`.
    ///
    /// # Panics
    /// Where `to` is shorter than that.
    #[inline(always)]
    fn store_slice(self, to: &mut [f32], x: Self::F32) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.store(to.as_mut_ptr(), x) }
    }

    /// The elements of `x`, which is at most `LANES` long, then `fill` in the lanes past its end.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::F32 {
        if x.len() == Self::LANES {
            return self.load_slice(x);
        }
        let mut whole = [fill; MAX_LANES];
        whole[..x.len()].copy_from_slice(x);
        self.load_slice(&whole[..Self::LANES])
    }

    /// Writes all of `to`, which is at most `LANES` long, from the first lanes of `x`.
    #[inline(always)]
    fn store_part(self, to: &mut [f32], x: Self::F32) {
        if to.len() == Self::LANES {
            return self.store_slice(to, x);
        }
        let mut whole = [0.0; MAX_LANES];
        self.store_slice(&mut whole[..Self::LANES], x);
        to.copy_from_slice(&whole[..to.len()]);
    }

    /// The first `LANES` elements of `x`, widened.
    ///
    /// # Panics
    /// Where `x` is shorter than that.
    #[inline(always)]
    fn load_elements<T: Element>(self, x: &[T]) -> Self::F32 {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.load_as(x.as_ptr()) }
    }

    /// Rounds to `T` and writes the first `LANES` elements of `to`.
    ///
    /// # Panics
    /// Where `to` is shorter than that.
    #[inline(always)]
    fn store_elements<T: Element>(self, to: &mut [T], x: Self::F32) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.store_as(to.as_mut_ptr(), x) }
    }

    /// Two vectors of `T`, rounded, in the order of memory: one vector of a half type, or both as they are.
    #[inline(always)]
    fn pack<T: Element>(self, [a, b]: [Self::F32; 2]) -> (Self::F32, Option<Self::F32>) {
        match T::DTYPE {
            DType::F32 => (a, Some(b)),
            DType::F16 => (self.pack_f16(a, b), None),
            DType::Bf16 => (self.pack_bf16(a, b), None),
        }
    }

    /// Rounds to `T` and writes the first `2 * LANES` elements of `to`.
    ///
    /// # Panics
    /// Where `to` is shorter than that.
    #[inline(always)]
    fn store_pair<T: Element>(self, to: &mut [T], pair: [Self::F32; 2]) {
        assert!(to.len() >= 2 * Self::LANES);
        let p = to.as_mut_ptr().cast::<f32>();
        let (first, second) = self.pack::<T>(pair);
        // SAFETY: the assertion above. A second vector is there for f32 alone, of which there are two vectors.
        unsafe {
            self.store(p, first);
            if let Some(second) = second {
                self.store(p.add(Self::LANES), second);
            }
        }
    }

    /// [`store_pair`](Self::store_pair) past the caches: see [`stream`](Self::stream). Safe within this crate alone, where
    /// `softmax/walk.rs` makes the [`fence`](Self::fence) before it returns, and nothing in between looks at the output.
    ///
    /// # Panics
    /// Where `to` is shorter than that or is not aligned to a vector.
    #[inline(always)]
    fn stream_pair<T: Element>(self, to: &mut [T], pair: [Self::F32; 2]) {
        let p = to.as_mut_ptr().cast::<f32>();
        assert!(to.len() >= 2 * Self::LANES && p.addr().is_multiple_of(4 * Self::LANES));
        let (first, second) = self.pack::<T>(pair);
        // SAFETY: the assertion above; the fence is the caller's promise. A second vector is there for f32 alone, of which
        // there are two vectors.
        unsafe {
            self.stream(p, first);
            if let Some(second) = second {
                self.stream(p.add(Self::LANES), second);
            }
        }
    }

    /// The elements of `x`, which is at most `LANES` long, widened, then `fill`, a number that `T` has, in the lanes past its end.
    #[inline(always)]
    fn load_elements_part<T: Element>(self, x: &[T], fill: f32) -> Self::F32 {
        let mut whole = [T::from_f32(fill); MAX_LANES];
        whole[..x.len()].copy_from_slice(x);
        self.load_elements(&whole[..Self::LANES])
    }

    /// Rounds to `T` and writes all of `to`, which is at most `LANES` long, from the first lanes of `x`.
    #[inline(always)]
    fn store_elements_part<T: Element>(self, to: &mut [T], x: Self::F32) {
        let mut whole = [T::default(); MAX_LANES];
        self.store_elements(&mut whole[..Self::LANES], x);
        to.copy_from_slice(&whole[..to.len()]);
    }
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// No level has more lanes than this.
pub(crate) const MAX_LANES: usize = 16;

#[cfg(test)]
mod tests;
