//! Where a softmax reads and writes.
#![forbid(unsafe_code)]

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
