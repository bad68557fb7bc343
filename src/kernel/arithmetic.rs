//! The arithmetic of one step of a product: a multiply-add of f32, or a dot product of bf16 pairs.

use crate::element::{Bf16Pair, Element, bf16};
use crate::simd::{PairDots, Simd};
use std::marker::PhantomData;

/// The arithmetic of a product's steps. A vector holds `LANES` steps of one row, or one step of `LANES` rows.
///
/// # Safety
/// Unsafe code relies on what an implementation reads:
/// * [`mul_add_at`](Self::mul_add_at) reads one step at `a` and nothing else.
/// * [`load`](Self::load) reads `LANES` steps at `p` and nothing else.
/// * [`load_part`](Self::load_part) reads `elements` elements at `p` and nothing else.
pub(in crate::kernel) unsafe trait Multiply<S: Simd>: Copy {
    /// What one step reads of a row; zero by default.
    type Step: Copy + Default;
    /// Elements of a step.
    const ELEMENTS: usize;

    /// `c[v] += a * b[v]` for each of V vectors, a being one step, in every lane.
    ///
    /// # Safety
    /// * `a` is valid for reads
    unsafe fn mul_add_at<const V: usize>(self, simd: S, a: *const Self::Step, b: [S::F32; V], c: &mut [S::F32; V]);
    /// `LANES` steps.
    ///
    /// # Safety
    /// * `p` is valid for reads of `LANES` steps
    unsafe fn load(self, simd: S, p: *const Self::Step) -> S::F32;
    /// The first `elements` elements at `p`, at most those of `LANES` steps, then zeros.
    ///
    /// # Safety
    /// * `p` is valid for reads of `elements` elements, which may end inside a step
    unsafe fn load_part(self, simd: S, p: *const Self::Step, elements: usize) -> S::F32;
    /// `a * b + c`.
    fn mul_add(self, simd: S, a: S::F32, b: S::F32, c: S::F32) -> S::F32;
    /// The result of a finished sum.
    fn finish(self, simd: S, sum: S::F32) -> S::F32;
}

/// Multiply-adds of f32. Elements of any type are widened.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct F32Fma<T>(PhantomData<T>);

impl<T> F32Fma<T> {
    pub(in crate::kernel) fn new() -> Self {
        F32Fma(PhantomData)
    }
}

// SAFETY: the reads are one element, `LANES` elements (`load_as`), and a slice of `elements` elements.
unsafe impl<S: Simd, T: Element> Multiply<S> for F32Fma<T> {
    type Step = T;
    const ELEMENTS: usize = 1;

    #[inline(always)]
    unsafe fn mul_add_at<const V: usize>(self, simd: S, a: *const T, b: [S::F32; V], c: &mut [S::F32; V]) {
        // SAFETY: the caller's promise.
        let a = simd.splat(unsafe { *a }.to_f32());
        for v in 0..V {
            c[v] = simd.mul_add(a, b[v], c[v]);
        }
    }
    #[inline(always)]
    unsafe fn load(self, simd: S, p: *const T) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { simd.load_as(p) }
    }
    #[inline(always)]
    unsafe fn load_part(self, simd: S, p: *const T, elements: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        simd.load_elements_part(unsafe { std::slice::from_raw_parts(p, elements) }, 0.0)
    }
    #[inline(always)]
    fn mul_add(self, simd: S, a: S::F32, b: S::F32, c: S::F32) -> S::F32 {
        simd.mul_add(a, b, c)
    }
    #[inline(always)]
    fn finish(self, _: S, sum: S::F32) -> S::F32 {
        sum
    }
}

/// Dot products of pairs of bf16, read in place. `factor` is multiplied into the finished sums, because queries multiplied with
/// it would not be bf16 any more.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Bf16Dots<D> {
    pub(in crate::kernel) dots: D,
    pub(in crate::kernel) factor: f32,
}

// SAFETY: the reads are one pair (`add_dots_at`, `broadcast`), `LANES` pairs (`load_pairs`), and a slice of `elements` elements.
unsafe impl<S: Simd, D: PairDots<S>> Multiply<S> for Bf16Dots<D> {
    type Step = Bf16Pair;
    const ELEMENTS: usize = 2;

    #[inline(always)]
    unsafe fn mul_add_at<const V: usize>(self, _: S, a: *const Bf16Pair, b: [S::F32; V], c: &mut [S::F32; V]) {
        if V == 1 {
            // SAFETY: the caller's promise.
            c[0] = unsafe { self.dots.add_dots_at(a, b[0], c[0]) };
            return;
        }
        // SAFETY: the caller's promise.
        let a = unsafe { self.dots.broadcast(a) };
        for v in 0..V {
            c[v] = self.dots.add_dots(a, b[v], c[v]);
        }
    }
    #[inline(always)]
    unsafe fn load(self, _: S, p: *const Bf16Pair) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { self.dots.load_pairs(p) }
    }
    #[inline(always)]
    unsafe fn load_part(self, _: S, p: *const Bf16Pair, elements: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        self.dots.load_pairs_part(unsafe { std::slice::from_raw_parts(p.cast::<bf16>(), elements) })
    }
    #[inline(always)]
    fn mul_add(self, _: S, a: S::F32, b: S::F32, c: S::F32) -> S::F32 {
        self.dots.add_dots(a, b, c)
    }
    #[inline(always)]
    fn finish(self, simd: S, sum: S::F32) -> S::F32 {
        simd.mul(sum, simd.splat(self.factor))
    }
}
