//! The vector operations that every level has.

use crate::element::{DType, Element, bf16, f16};
use crate::simd::register_tiles::{ByDotTile, ByStrip};

/// The vector operations of one level: `LANES` f32 side by side, and the register tiles of its loops.
///
/// Arithmetic is IEEE 754 single precision, rounded to nearest, ties to even.
///
/// # Safety
/// Unsafe code relies on what an implementation says of itself:
/// * `LANES` is a power of two and at most [`MAX_LANES`].
/// * A value of the type exists only if the processor has the level's instructions.
/// * Loads and stores touch the `LANES` elements at their pointer and nothing else. They need no alignment, but for `stream`.
/// * `load_part`, `store_part`, `load_elements_part` and `store_elements_part` touch nothing but the slice that they are given.
/// * [`unrelated`](Self::unrelated) returns its argument.
/// * [`dot_tile`](Self::dot_tile) and [`strip`](Self::strip) call their work with `ROWS = rows`.
///
/// An implementation that replaces a provided method keeps its contract.
pub(crate) unsafe trait Simd: Copy + Send + Sync + 'static {
    /// Elements in one vector.
    const LANES: usize;
    /// Vectors that the register file holds at once: how many accumulators a loop can afford.
    const REGISTERS: usize;
    /// Rows of accumulators that a product over one vector keeps in registers, and that one over two does. Accumulators,
    /// the vectors of the right operand, a broadcast and one to spare fit the register file.
    ///
    /// Sixteen accumulators are enough: two multiply-adds that can start in a cycle and take four keep eight chains busy,
    /// sixteen leave room for loads that are late, and rows come in multiples of 8.
    const PRODUCT_ROWS: [usize; 2];
    /// Vectors of exponentials that are computed side by side: each is a chain of operations, of which the processor alone
    /// overlaps too few.
    const EXP_VECTORS: usize;
    /// Whether [`pick`](Self::pick) is one instruction, of sixteen lanes, and multiply-add fused. (With eight roots and half
    /// as many registers, AVX2 is a quarter slower than with none.)
    const HAS_PICK_16: bool;
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
    unsafe fn load_mask(self, p: *const u8) -> Self::Mask;

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
    fn transpose_masks(self, x: [Self::Mask; MAX_LANES]) -> [Self::Mask; MAX_LANES];

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
    /// Whole cache lines are worth it. What is streamed is in no order with other stores until a [`fence`](Self::fence).
    /// [`Streaming`](crate::simd::streaming::Streaming) is what calls both.
    ///
    /// # Safety
    /// * `p` is valid for writes of `LANES` f32 and aligned to their size.
    /// * A [`fence`](Self::fence) follows the last one before another thread can read or write that memory.
    unsafe fn stream(self, p: *mut f32, x: Self::F32);
    /// Orders what was streamed before whatever is written next, as ordinary stores are.
    fn fence(self);

    /// Asks for the cache line of `p` ([`LINE`]), which need not be readable, into the second cache.
    fn prefetch<T>(self, p: *const T);
    /// Asks for the cache line of `p`, which need not be readable, into the first cache.
    fn prefetch_near<T>(self, p: *const T);
    /// [`prefetch`](Self::prefetch)es one cache line per line of `count` elements from `p`, which need not be readable.
    #[inline(always)]
    fn prefetch_elements<T>(self, p: *const T, count: usize) {
        for at in (0..count).step_by(LINE / size_of::<T>()) {
            self.prefetch(p.wrapping_add(at));
        }
    }

    /// Calls `work` with the register tile of dot products of `rows` rows that share each load.
    ///
    /// The macro [`dot_tiles!`](crate::simd::register_tiles::dot_tiles) writes it.
    ///
    /// # Safety
    /// * as `W::call` says
    unsafe fn dot_tile<W: ByDotTile>(rows: usize, work: W);
    /// Calls `work` with the widest strip of sums for `rows` rows that share each load, which is no wider than `vectors`, or
    /// with the narrowest one.
    ///
    /// The macro [`strips!`](crate::simd::register_tiles::strips) writes it.
    ///
    /// # Safety
    /// * as `W::call` says
    unsafe fn strip<W: ByStrip>(rows: usize, vectors: usize, work: W);

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
