//! Rows of one element type as rows of the type of their arithmetic, and back.
#![forbid(unsafe_code)]

use super::buffers::Stored;
use crate::simd::{Isa, Kernel, Simd};

/// `to` = `from`, exactly. Both have the same length.
pub(super) fn widen<T: Stored>(isa: Isa, from: &[T], to: &mut [f32]) {
    match T::as_f32(from) {
        Some(from) => to.copy_from_slice(from),
        None => isa.run(Widen { from, to }),
    }
}

/// `to` = `from`, each element rounded once. Both have the same length.
pub(super) fn narrow<T: Stored>(isa: Isa, from: &[f32], to: &mut [T]) {
    match T::as_f32_mut(to) {
        Some(to) => to.copy_from_slice(from),
        None => isa.run(Narrow { from, to }),
    }
}

/// `to` = `from`, exactly, or -inf where `visible` is 0. All have the same length.
pub(super) fn widen_visible<T: Stored>(isa: Isa, from: &[T], visible: &[u8], to: &mut [f32]) {
    isa.run(WidenVisible { from, visible, to });
}

struct WidenVisible<'a, T> {
    from: &'a [T],
    visible: &'a [u8],
    to: &'a mut [f32],
}

impl<T: Stored> Kernel for WidenVisible<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { from, visible, to } = self;
        assert_eq!([from.len(), visible.len()], [to.len(); 2]);
        let hidden = simd.splat(f32::NEG_INFINITY);
        for ((from, visible), to) in from.chunks(S::LANES).zip(visible.chunks(S::LANES)).zip(to.chunks_mut(S::LANES)) {
            if from.len() == S::LANES {
                let y = simd.select(simd.load_mask_slice(visible), simd.load_elements(from), hidden);
                simd.store_slice(to, y);
            } else {
                let y = simd.select(simd.load_mask_part(visible), simd.load_elements_part(from, 0.0), hidden);
                simd.store_part(to, y);
            }
        }
    }
}

struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Stored> Kernel for Widen<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert_eq!(self.from.len(), self.to.len());
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            if from.len() == S::LANES {
                simd.store_slice(to, simd.load_elements(from));
            } else {
                simd.store_part(to, simd.load_elements_part(from, 0.0));
            }
        }
    }
}

struct Narrow<'a, T> {
    from: &'a [f32],
    to: &'a mut [T],
}

impl<T: Stored> Kernel for Narrow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert_eq!(self.from.len(), self.to.len());
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            if from.len() == S::LANES {
                simd.store_elements(to, simd.load_slice(from));
            } else {
                simd.store_elements_part(to, simd.load_part(from, 0.0));
            }
        }
    }
}
