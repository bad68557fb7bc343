//! The trait of vector operations, which every level implements.

use crate::element::{DType, Element, bf16, f16};
use crate::simd::register_tiles::{ByDotTile, ByStrip};

/// Work that is compiled for every level. Implementations mark `run` as `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// A part of a kernel that is compiled on its own, once for all kernels of a level that [`call`](Simd::call) it. Unlike the
/// fields of a [`Kernel`], its fields may be vectors. A call costs a few cycles. Implementations mark `run` as `#[inline(always)]`.
pub(crate) trait Part<S: Simd> {
    type Output;
    fn run(self, simd: S) -> Self::Output;
}

impl<K: Kernel, S: Simd> Part<S> for K {
    type Output = K::Output;

    #[inline(always)]
    fn run(self, simd: S) -> K::Output {
        Kernel::run(self, simd)
    }
}

/// The vector operations of a level, on vectors of `LANES` f32, and the register tiles of its loops.
///
/// Arithmetic is IEEE 754 single precision, rounded to nearest, ties to even.
///
/// # Safety
/// Unsafe code relies on these properties of an implementation:
/// * `LANES` is a power of two and at most [`MAX_LANES`].
/// * A value of the type exists only if the processor has the level's instructions.
/// * Loads and stores access the `LANES` elements at their pointer and nothing else. Only `stream` needs alignment.
/// * `load_part`, `store_part`, `load_elements_part` and `store_elements_part` access nothing but their slice.
/// * [`unrelated`](Self::unrelated) returns its argument.
/// * [`dot_tile`](Self::dot_tile) and [`strip`](Self::strip) call their work with `ROWS = rows`.
///
/// An implementation that overrides a provided method keeps its contract.
pub(crate) unsafe trait Simd: Copy + Send + Sync + 'static {
    /// Elements of a vector.
    const LANES: usize;
    /// Vectors that the register file holds. It limits the accumulators of a loop.
    const REGISTERS: usize;
    /// Rows of accumulators that a product over one vector keeps in registers, and rows of a product over two vectors. The
    /// accumulators, the vectors of the right operand, a broadcast and one unused register fit the register file.
    ///
    /// Sixteen accumulators are enough. Two multiply-adds start per cycle and each takes four cycles, so eight chains are busy;
    /// sixteen tolerate loads that are late. Rows come in multiples of 8.
    const PRODUCT_ROWS: [usize; 2];
    /// Vectors of exponentials that a loop computes at a time. Each is a chain of operations, and the processor alone overlaps
    /// too few chains.
    const EXP_VECTORS: usize;
    /// Whether [`pick`](Self::pick) is one instruction on sixteen lanes, and multiply-add is fused. `exp_scaled` uses a table of
    /// sixteen roots then. AVX2 would be 25% slower with a table of eight roots, because it has half the registers.
    const HAS_PICK_16: bool;
    /// `LANES` values of f32.
    type F32: Copy;
    /// `LANES` values of i32. Additions and shifts wrap.
    type I32: Copy;
    /// `LANES` booleans.
    type Mask: Copy;

    /// Runs `part` compiled with the level's instructions, as a function of its own.
    fn call<P: Part<Self>>(self, part: P) -> P::Output;

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

    /// Reads `LANES` bytes from `p`. A lane is true if its byte is not 0.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` bytes.
    unsafe fn load_mask(self, p: *const u8) -> Self::Mask;

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, with one rounding if the level has fused multiply-add and two otherwise.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger of `a` and `b`; **`b` where either is NaN**, because x86 does so in one instruction.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The smaller of `a` and `b`; **`b` where either is NaN**.
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
    /// `a` where the mask is true, `b` elsewhere. The operand that is not selected has no effect.
    fn select(self, mask: Self::Mask, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Whether any lane is true.
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

    /// The sum of all lanes, in a fixed order: the upper half is added to the lower half, and so on. So rotating the lanes
    /// does not change it, and the sum of a row does not depend on the lane of its first key.
    fn sum(self, a: Self::F32) -> f32;
    /// The sum of all lanes of each of `LANES` vectors (`x[..LANES]`). All sums have the same order of additions, which
    /// depends on the level.
    fn sums(self, x: [Self::F32; MAX_LANES]) -> Self::F32;
    /// The order of the lanes in [`sums`](Self::sums): neighbours in this list are added, then neighbouring sums, and so on. With
    /// fewer lanes, the first ones count.
    const SUMS_ORDER: [usize; MAX_LANES] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    /// The largest lane; NaN lanes may be ignored.
    fn max_lane(self, a: Self::F32) -> f32;
    /// The transpose of `LANES` vectors (`x[..LANES]`): lane i of vector j goes to lane j of vector i.
    fn transpose(self, x: [Self::F32; MAX_LANES]) -> [Self::F32; MAX_LANES];
    /// The transpose of `LANES` masks (`x[..LANES]`).
    fn transpose_masks(self, x: [Self::Mask; MAX_LANES]) -> [Self::Mask; MAX_LANES];

    /// The same pointer, without the compiler's knowledge of its distance from another pointer.
    #[inline(always)]
    fn unrelated<T>(self, p: *const T) -> *const T {
        p
    }
    /// In every lane, the lane of `table` whose number is in the lowest bits of `k`.
    fn pick(self, table: Self::F32, k: Self::I32) -> Self::F32;
    /// Rounds to f16 as [`store_f16`](Self::store_f16) does. The `2 * LANES` results are carried as one vector. No f32
    /// arithmetic is done on it.
    fn pack_f16(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The same to bf16.
    fn pack_bf16(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// [`store`](Self::store) past the caches, if the level can, so that memory is not read before it is overwritten. It pays
    /// for whole cache lines. Streaming stores are not ordered with other stores until a [`fence`](Self::fence). Only
    /// [`Streaming`](crate::simd::streaming::Streaming) calls both.
    ///
    /// # Safety
    /// * `p` is valid for writes of `LANES` f32 and aligned to their size.
    /// * A [`fence`](Self::fence) follows the last one before another thread can read or write that memory.
    unsafe fn stream(self, p: *mut f32, x: Self::F32);
    /// Orders all earlier streaming stores before all later stores.
    fn fence(self);

    /// Prefetches the cache line of `p` ([`LINE`]), which need not be readable, into the second cache.
    fn prefetch<T>(self, p: *const T);
    /// Prefetches the cache line of `p`, which need not be readable, into the first cache.
    fn prefetch_near<T>(self, p: *const T);
    /// [`prefetch`](Self::prefetch)es the cache lines of `count` elements from `p`, which need not be readable.
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
    /// Calls `work` with a strip of sums for `rows` rows that share each load: the widest strip of no more vectors than its rows have,
    /// or the narrowest strip.
    ///
    /// The macro [`strips!`](crate::simd::register_tiles::strips) writes it.
    ///
    /// # Safety
    /// * as `W::call` says
    unsafe fn strip<W: ByStrip>(rows: usize, work: W);

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
    /// If `x` is shorter. Callers inside this crate ensure that it is not.
    #[inline(always)]
    fn load_slice(self, x: &[f32]) -> Self::F32 {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.load(x.as_ptr()) }
    }

    /// Writes the first `LANES` elements of `to`.
    ///
    /// # Panics
    /// If `to` is shorter.
    #[inline(always)]
    fn store_slice(self, to: &mut [f32], x: Self::F32) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.store(to.as_mut_ptr(), x) }
    }

    /// [`load_mask`](Self::load_mask) of the first `LANES` bytes of `x`.
    ///
    /// # Panics
    /// If `x` is shorter.
    #[inline(always)]
    fn load_mask_slice(self, x: &[u8]) -> Self::Mask {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.load_mask(x.as_ptr()) }
    }

    /// The bytes of `x`, at most `LANES`, as booleans, then false in the remaining lanes.
    #[inline(always)]
    fn load_mask_part(self, x: &[u8]) -> Self::Mask {
        let mut whole = [0; MAX_LANES];
        whole[..x.len()].copy_from_slice(x);
        self.load_mask_slice(&whole[..Self::LANES])
    }

    /// `LANES` vectors of `x`, each `stride` elements after the one before.
    ///
    /// # Panics
    /// If `x` is shorter.
    #[inline(always)]
    fn load_rows(self, x: &[f32], stride: usize) -> [Self::F32; MAX_LANES] {
        assert!(x.len() >= Self::LANES && stride <= x.len() && (Self::LANES - 1) * stride <= x.len() - Self::LANES);
        let mut rows = [self.zero(); MAX_LANES];
        for (i, row) in rows.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: the last vector ends `(LANES - 1) * stride + LANES` elements after the first begins, in the slice (asserted). The product
            // does not overflow, because a slice of f32 has less than 2^61 elements, and `stride` is no larger.
            *row = unsafe { self.load(x.as_ptr().add(i * stride)) };
        }
        rows
    }

    /// Writes `LANES` vectors to `to`, in their order, each `stride` elements after the one before.
    ///
    /// # Panics
    /// If `to` is shorter.
    #[inline(always)]
    fn store_rows(self, to: &mut [f32], stride: usize, rows: [Self::F32; MAX_LANES]) {
        assert!(to.len() >= Self::LANES && stride <= to.len() && (Self::LANES - 1) * stride <= to.len() - Self::LANES);
        for (i, row) in rows.into_iter().enumerate().take(Self::LANES) {
            // SAFETY: as in `load_rows`.
            unsafe { self.store(to.as_mut_ptr().add(i * stride), row) };
        }
    }

    /// The elements of `x`, at most `LANES`, then `fill` in the remaining lanes.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::F32 {
        if x.len() == Self::LANES {
            return self.load_slice(x);
        }
        let mut whole = [fill; MAX_LANES];
        whole[..x.len()].copy_from_slice(x);
        self.load_slice(&whole[..Self::LANES])
    }

    /// Writes all of `to`, at most `LANES` elements, from the first lanes of `x`.
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
    /// If `x` is shorter.
    #[inline(always)]
    fn load_elements<T: Element>(self, x: &[T]) -> Self::F32 {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.load_as(x.as_ptr()) }
    }

    /// Rounds to `T` and writes the first `LANES` elements of `to`.
    ///
    /// # Panics
    /// If `to` is shorter.
    #[inline(always)]
    fn store_elements<T: Element>(self, to: &mut [T], x: Self::F32) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: the assertion above.
        unsafe { self.store_as(to.as_mut_ptr(), x) }
    }

    /// Two vectors rounded to `T`, in memory order: one vector of a half type, or both vectors of f32.
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
    /// If `to` is shorter.
    #[inline(always)]
    fn store_pair<T: Element>(self, to: &mut [T], pair: [Self::F32; 2]) {
        assert!(to.len() >= 2 * Self::LANES);
        let p = to.as_mut_ptr().cast::<f32>();
        let (first, second) = self.pack::<T>(pair);
        // SAFETY: the assertion above. There is a second vector only if T is f32, and then `to` has two vectors of f32.
        unsafe {
            self.store(p, first);
            if let Some(second) = second {
                self.store(p.add(Self::LANES), second);
            }
        }
    }

    /// The elements of `x`, at most `LANES`, widened, then `fill` in the remaining lanes. `T` represents `fill` exactly.
    #[inline(always)]
    fn load_elements_part<T: Element>(self, x: &[T], fill: f32) -> Self::F32 {
        let mut whole = [T::from_f32(fill); MAX_LANES];
        whole[..x.len()].copy_from_slice(x);
        self.load_elements(&whole[..Self::LANES])
    }

    /// Rounds to `T` and writes all of `to`, at most `LANES` elements, from the first lanes of `x`.
    #[inline(always)]
    fn store_elements_part<T: Element>(self, to: &mut [T], x: Self::F32) {
        let mut whole = [T::default(); MAX_LANES];
        self.store_elements(&mut whole[..Self::LANES], x);
        to.copy_from_slice(&whole[..to.len()]);
    }
}

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// The largest number of lanes of any level.
pub(crate) const MAX_LANES: usize = 16;
