//! The input and output of a softmax.
#![forbid(unsafe_code)]

use crate::element::{Element, bf16, f16};

/// One array that is overwritten, or an input and an output of the same length.
pub enum Buffers<'a, T> {
    InPlace(&'a mut [T]),
    Into { from: &'a [T], to: &'a mut [T] },
}

impl<T> Buffers<'_, T> {
    #[inline(always)]
    pub(super) fn input(&self) -> &[T] {
        match self {
            Buffers::InPlace(x) => x,
            Buffers::Into { from, .. } => from,
        }
    }

    #[inline(always)]
    pub(super) fn output(&mut self) -> &mut [T] {
        match self {
            Buffers::InPlace(x) => x,
            Buffers::Into { to, .. } => to,
        }
    }
}

/// An element type as it is stored: whether it is f32.
pub(super) trait Stored: Element {
    /// Whether [`as_f32`](Self::as_f32) returns `Some`.
    const IS_F32: bool = false;

    /// The same slice if the elements are f32.
    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    /// [`as_f32`](Self::as_f32) of a slice that is written.
    #[inline(always)]
    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }

    /// The other way round.
    #[inline(always)]
    fn of_f32(_: &[f32]) -> Option<&[Self]> {
        None
    }

    /// [`of_f32`](Self::of_f32) of a slice that is written.
    fn of_f32_mut(_: &mut [f32]) -> Option<&mut [Self]> {
        None
    }
}

impl Stored for f16 {}
impl Stored for bf16 {}
impl Stored for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    fn as_f32(x: &[f32]) -> Option<&[f32]> {
        Some(x)
    }

    #[inline(always)]
    fn as_f32_mut(x: &mut [f32]) -> Option<&mut [f32]> {
        Some(x)
    }

    #[inline(always)]
    fn of_f32(x: &[f32]) -> Option<&[f32]> {
        Some(x)
    }

    fn of_f32_mut(x: &mut [f32]) -> Option<&mut [f32]> {
        Some(x)
    }
}
