//! Streaming stores, which bypass the caches, and the fence that they need.

use crate::element::Element;
use crate::simd::vector::Simd;

/// A guard for streaming stores: it makes the stores, and fences when it is dropped.
///
/// Streaming stores are not ordered with other stores. Without a fence, another thread could learn that an output is complete
/// before it can see all of it. Only this type streams, so the fence comes before the borrow of the output ends, also in a
/// panic. One fence is enough for all stores of a call, so a call makes one `Streaming` and lends it to its loops.
///
/// This crate never leaks a `Streaming`, because a leaked one would not fence.
pub(crate) struct Streaming<S: Simd> {
    simd: S,
}

impl<S: Simd> Streaming<S> {
    #[inline(always)]
    pub(crate) fn new(simd: S) -> Self {
        Streaming { simd }
    }

    /// [`Simd::store_pair`] past the caches, if the level can. It pays for whole cache lines.
    ///
    /// # Panics
    /// If `to` is shorter than two vectors or is not aligned to a vector.
    #[inline(always)]
    pub(crate) fn store_pair<T: Element>(&self, to: &mut [T], pair: [S::F32; 2]) {
        let p = to.as_mut_ptr().cast::<f32>();
        assert!(to.len() >= 2 * S::LANES && p.addr().is_multiple_of(4 * S::LANES));
        let (first, second) = self.simd.pack::<T>(pair);
        // SAFETY: `to` is at least two vectors of T long: one vector of f32 if T is a half type, else two (asserted). It is
        // aligned to a vector (asserted). The fence follows when `self` is dropped.
        unsafe {
            self.simd.stream(p, first);
            if let Some(second) = second {
                self.simd.stream(p.add(S::LANES), second);
            }
        }
    }
}

impl<S: Simd> Drop for Streaming<S> {
    #[inline(always)]
    fn drop(&mut self) {
        self.simd.fence();
    }
}
