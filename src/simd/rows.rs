//! Rows of any element type, converted vector by vector.

#![forbid(unsafe_code)]

use crate::element::Element;
use crate::simd::vector::Simd;
use crate::tensor::matrix::{Row, RowMut};

/// `to[k] = from[k]`, widened exactly.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub(crate) fn widen_row<S: Simd, T: Element>(simd: S, from: Row<'_, T>, to: &mut [f32]) {
    match from.as_slice() {
        Some(from) => convert(simd, from, to),
        None => {
            assert!(from.iter().len() == to.len());
            for (to, from) in to.iter_mut().zip(from.iter()) {
                *to = from.to_f32();
            }
        }
    }
}

/// `to[k] = from[k]`, rounded to nearest, ties to even.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub(crate) fn narrow_row<S: Simd, U: Element>(simd: S, from: &[f32], to: RowMut<'_, U>) {
    match to.into_mut_slice() {
        Ok(to) => convert(simd, from, to),
        Err(mut to) => {
            assert!(from.len() == to.iter_mut().len());
            for (to, &from) in to.iter_mut().zip(from) {
                *to = U::from_f32(from);
            }
        }
    }
}

/// `to[k] = from[k]`: widened exactly, then rounded to nearest, ties to even. A NaN stays a NaN, its payload may change.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub(crate) fn convert_row<S: Simd, T: Element, U: Element>(simd: S, from: Row<'_, T>, to: RowMut<'_, U>) {
    match (from.as_slice(), to.into_mut_slice()) {
        (Some(from), Ok(to)) => convert(simd, from, to),
        (_, Ok(to)) => {
            assert!(from.iter().len() == to.len());
            for (to, from) in to.iter_mut().zip(from.iter()) {
                *to = U::from_f32(from.to_f32());
            }
        }
        (_, Err(mut to)) => {
            assert!(from.iter().len() == to.iter_mut().len());
            for (to, from) in to.iter_mut().zip(from.iter()) {
                *to = U::from_f32(from.to_f32());
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
