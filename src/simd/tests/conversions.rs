//! Half types: widening of every pattern, rounding at every tie.

use super::*;

struct Widen<'a, T>(&'a [T], &'a mut [f32]);
impl<T: Element> Kernel for Widen<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, y) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
            let wide = if x.len() == S::LANES { simd.load_elements(x) } else { simd.load_elements_part(x, 7.0) };
            simd.store_part(y, wide);
        }
    }
}

struct Narrow<'a, T>(&'a [f32], &'a mut [T]);
impl<T: Element> Kernel for Narrow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, y) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
            let wide = simd.load_part(x, 0.0);
            if y.len() == S::LANES { simd.store_elements(y, wide) } else { simd.store_elements_part(y, wide) }
        }
    }
}

/// Stores two vectors at a time, first with ordinary stores, then past the caches. The remaining elements are unchanged.
struct NarrowPairs<'a, T>(&'a [f32], &'a mut [T], &'a mut [T]);
impl<T: Element> Kernel for NarrowPairs<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let pair = 2 * S::LANES;
        let aligned = self.2.as_ptr().align_offset(LINE);
        let stored = self.1.chunks_exact_mut(pair);
        let streamed = self.2[aligned..].chunks_exact_mut(pair);
        let streaming = Streaming::new(simd);
        for ((x, stored), streamed) in self.0.chunks_exact(pair).zip(stored).zip(streamed) {
            let x = [simd.load_slice(x), simd.load_slice(&x[S::LANES..])];
            simd.store_pair(stored, x);
            streaming.store_pair(streamed, x);
        }
    }
}

/// Every pattern of a half type, then the f32 at, just below and just above every value and every tie between two values.
fn check<T: Element>(from_bits: impl Fn(u16) -> T, bits: impl Fn(T) -> u16, is_nan: impl Fn(T) -> bool) {
    let narrow: Vec<T> = (0..=u16::MAX).map(from_bits).collect();
    let values: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
    let mut inputs = vec![f32::MAX, f32::MIN, 65_519.996, 65_520.0, 1e-45, -1e-45];
    // A NaN whose payload would be rounded into the exponent or the sign.
    inputs.extend([0x7f80_0001, 0x7fff_ffff, 0x7fff_8000, 0xffff_ffff, 0xff80_0001].map(f32::from_bits));
    for pair in values.windows(2) {
        for x in [pair[0], ((f64::from(pair[0]) + f64::from(pair[1])) / 2.0) as f32] {
            let near = |step: i32| f32::from_bits(x.to_bits().wrapping_add_signed(step));
            inputs.extend([near(-1), x, near(1)]);
        }
    }
    for level in Level::available() {
        let isa = Isa::detect(level).unwrap();
        let mut wide = vec![0.0; narrow.len()];
        isa.run(Widen(&narrow, &mut wide));
        for (got, expected) in wide.iter().zip(&values) {
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{level}: {expected}");
        }
        let (mut rounded, mut stored) = (vec![T::default(); inputs.len()], vec![T::default(); inputs.len()]);
        let mut streamed = vec![T::default(); inputs.len() + LINE];
        isa.run(Narrow(&inputs, &mut rounded));
        isa.run(NarrowPairs(&inputs, &mut stored, &mut streamed));
        let whole = inputs.len() / 32 * 32;
        let aligned = streamed.as_ptr().align_offset(LINE);
        for results in [&rounded[..], &stored[..whole], &streamed[aligned..][..whole]] {
            for (x, got) in inputs.iter().zip(results) {
                let expected = T::from_f32(*x);
                let equal = bits(*got) == bits(expected) || is_nan(*got) && is_nan(expected);
                assert!(equal, "{level}: {x:?} ({:08x}) is rounded to {got:?}, not {expected:?}", x.to_bits());
            }
        }
    }
}

#[test]
fn f16_converts_like_the_scalar() {
    check(f16::from_bits, f16::to_bits, f16::is_nan);
}

#[test]
fn bf16_converts_like_the_scalar() {
    check(bf16::from_bits, bf16::to_bits, bf16::is_nan);
}

#[test]
fn f32_is_handed_through() {
    let x: Vec<f32> = (0..13).map(|i| i as f32 - 6.5).collect();
    for level in Level::available() {
        let mut y = vec![0.0; x.len()];
        Isa::detect(level).unwrap().run(Widen(&x, &mut y));
        assert_eq!(x, y);
        Isa::detect(level).unwrap().run(Narrow(&x, &mut y));
        assert_eq!(x, y);
        let x: Vec<f32> = (0..96).map(|i| i as f32 - 40.0).collect();
        let (mut stored, mut streamed) = (vec![0.0; x.len()], vec![0.0; x.len() + LINE]);
        Isa::detect(level).unwrap().run(NarrowPairs(&x, &mut stored, &mut streamed));
        let aligned = streamed.as_ptr().align_offset(LINE);
        assert_eq!((&x[..], &x[..]), (&stored[..], &streamed[aligned..][..x.len()]));
    }
}
