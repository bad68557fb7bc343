//! Chunks: a query sees the keys of its own chunk.

#![forbid(unsafe_code)]

use super::open::Mask;
use crate::pair::{Pair, Query};
use std::ops::Range;

/// Cuts positions into chunks of `size`: a query sees the keys of the chunk that its position is in. With causal order this is
/// the local attention of Llama 4.
///
/// ```text
/// size 2               with causal order
/// 1 1 0 0 0            1 0 0 0 0
/// 1 1 0 0 0            1 1 0 0 0
/// 0 0 1 1 0            0 0 1 0 0
/// 0 0 1 1 0            0 0 1 1 0
/// 0 0 0 0 1            0 0 0 0 1
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunked {
    size: isize,
}

impl Chunked {
    /// Chunks of `size` keys. A size of 0 shows no key.
    pub fn new(size: usize) -> Self {
        Chunked { size: size.min(isize::MAX as usize) as isize }
    }
}

impl Mask for Chunked {
    fn sees(&self, pair: Pair) -> bool {
        self.size > 0 && pair.position().div_euclid(self.size) == (pair.key() as isize).div_euclid(self.size)
    }

    fn heads_are_alike(&self) -> bool {
        true
    }

    fn span(&self, query: Query) -> Range<isize> {
        if self.size == 0 {
            return 0..0;
        }
        let start = query.position().div_euclid(self.size) * self.size;
        start..start.saturating_add(self.size)
    }

    fn is_span(&self) -> bool {
        true
    }
}
