//! The first keys and a window: streaming with attention sinks.

#![forbid(unsafe_code)]

use super::open::{Cover, Mask};
use crate::pair::{Block, Pair, Query};
use std::ops::Range;

/// A query sees the first `first` keys, and its own key with the `left` keys before it: the mask of StreamingLLM (Xiao and
/// others, 2023). **Causal order is part of it.**
///
/// ```text
/// first 1, left 1
/// 1 0 0 0 0
/// 1 1 0 0 0
/// 1 1 1 0 0
/// 1 0 1 1 0
/// 1 0 0 1 1
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstAndLast {
    first: i32,
    left: i32,
}

impl FirstAndLast {
    /// The first `first` keys, and the window of the query's own key and `left` keys before it.
    pub fn new(first: usize, left: usize) -> Self {
        let most = |n: usize| n.min(i32::MAX as usize) as i32;
        FirstAndLast { first: most(first), left: most(left) }
    }
}

impl Mask for FirstAndLast {
    #[inline]
    fn sees(&self, pair: Pair) -> bool {
        // In 32 bits, the size of a score, so that the compiler makes vectors of it. `|` and not `||`, because a branch prevents that.
        let (distance, key) = (pair.distance(), pair.key);
        (distance >= 0) & ((key < self.first) | (distance <= self.left))
    }

    fn heads_are_alike(&self) -> bool {
        true
    }

    fn span(&self, query: Query) -> Range<isize> {
        let p = query.position();
        let start = if self.first > 0 { 0 } else { p - self.left as isize };
        start..p + 1
    }

    fn is_span(&self) -> bool {
        self.first == 0 // a window alone
    }

    fn cover(&self, block: &Block) -> Cover {
        let (first, left) = (self.first as isize, self.left as isize);
        let (p, keys) = (block.positions(), block.keys.start as isize..block.keys.end as isize);
        let last = p.end - 1;
        if keys.start > last || keys.start >= first && keys.end <= p.start - left {
            Cover::Skip
        } else if keys.end <= p.start + 1 && (keys.end <= first || keys.start >= last - left) {
            Cover::Full
        } else {
            Cover::Partial
        }
    }
}
