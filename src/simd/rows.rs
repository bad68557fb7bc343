//! Rows of any element type, converted vector by vector.

#![forbid(unsafe_code)]

use crate::element::Element;
use crate::simd::vector::{Kernel, Simd};
use crate::tensor::matrix::{Row, RowMut};

/// `to[k] = from[k]`: widened exactly, then rounded to nearest, ties to even. A NaN stays a NaN, its payload may change.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub(crate) fn convert_row<S: Simd, T: Element, U: Element>(simd: S, from: Row<'_, T>, to: RowMut<'_, U>) {
    match (from.as_slice(), to.into_mut_slice()) {
        (Some(from), Ok(to)) => convert(simd, from, to),
        (None, Ok(to)) => simd.call(Pieces { from, to: to.into() }),
        (_, Err(to)) => simd.call(Pieces { from, to }),
    }
}

/// As [`convert_row`], from any row to f32.
#[inline(always)]
pub(crate) fn widen_row<S: Simd, T: Element>(simd: S, from: Row<'_, T>, to: &mut [f32]) {
    convert_row(simd, from, to.into());
}

/// As [`convert_row`], from f32 to any row.
#[inline(always)]
pub(crate) fn narrow_row<S: Simd, U: Element>(simd: S, from: &[f32], to: RowMut<'_, U>) {
    convert_row(simd, from.into(), to);
}

/// Elements of a row with gaps that are brought together at a time. One by one, conversions take up to twice as long.
const PIECE: usize = 64;

/// Converts a row with gaps, or to one. It is a part of its own, so that the loops over rows without gaps stay short.
struct Pieces<'a, T, U> {
    from: Row<'a, T>,
    to: RowMut<'a, U>,
}

impl<T: Element, U: Element> Kernel for Pieces<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let len = self.from.iter().len();
        assert!(len == self.to.iter_mut().len());
        let (mut dense, mut converted) = ([T::default(); PIECE], [U::default(); PIECE]);
        for first in (0..len).step_by(PIECE) {
            let count = PIECE.min(len - first);
            for (dense, from) in dense.iter_mut().zip(self.from.slice(first..first + count).iter()) {
                *dense = from;
            }
            convert(simd, &dense[..count], &mut converted[..count]);
            for (to, &converted) in self.to.slice_mut(first..first + count).iter_mut().zip(&converted) {
                *to = converted;
            }
        }
    }
}

#[inline(always)]
fn convert<S: Simd, T: Element, U: Element>(simd: S, from: &[T], to: &mut [U]) {
    assert!(from.len() == to.len());
    let (mut from, mut to) = (from.chunks_exact(S::LANES), to.chunks_exact_mut(S::LANES));
    for (from, to) in (&mut from).zip(&mut to) {
        simd.store_elements(to, simd.load_elements(from));
    }
    let (from, to) = (from.remainder(), to.into_remainder());
    if !to.is_empty() {
        simd.store_elements_part(to, simd.load_elements_part(from, 0.0));
    }
}
