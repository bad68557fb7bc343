//! Reading elements of any type as vectors of f32, and writing them back.

use crate::element::Element;
use crate::simd::Simd;

/// Loads a vector of elements of `row` from `at` on, with zeros after the row's end.
#[inline(always)]
pub(crate) fn load_from<S: Simd, T: Element>(simd: S, row: &[T], at: usize) -> S::F32 {
    let rest = &row[at..];
    if rest.len() >= S::LANES { simd.load_elements(rest) } else { simd.load_elements_part(rest, 0.0) }
}

/// Rounds `from` into `to`, which has the same length.
#[inline(always)]
pub(crate) fn store_row<S: Simd, T: Element>(simd: S, to: &mut [T], from: &[f32]) {
    assert!(to.len() == from.len());
    for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks(S::LANES)) {
        if to.len() == S::LANES {
            simd.store_elements(to, simd.load_slice(from));
        } else {
            simd.store_elements_part(to, simd.load_part(from, 0.0));
        }
    }
}
