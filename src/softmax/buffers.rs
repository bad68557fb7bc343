//! Where a softmax reads and writes.
#![forbid(unsafe_code)]

use crate::element::{Element, bf16, f16};

/// One array that is overwritten, or two of the same length.
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

/// How an element type lies in memory.
pub(super) trait Stored: Element {
    /// Whether [`as_f32`](Self::as_f32) gives anything.
    const IS_F32: bool = false;

    /// The elements themselves, where they are f32.
    #[inline(always)]
    fn as_f32(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

impl Stored for f16 {}
impl Stored for bf16 {}
impl Stored for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    fn as_f32(x: &mut [f32]) -> Option<&mut [f32]> {
        Some(x)
    }
}
