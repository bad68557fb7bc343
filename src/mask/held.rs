//! The tokens that a rotating cache has not lost.

#![forbid(unsafe_code)]

use super::open::{Cover, Mask};
use crate::kv::places::Ring;
use crate::pair::{Block, Pair, Query};
use std::ops::Range;

/// The first tokens and the last ones of each sequence: `j < first` or `j >= length - window`.
///
/// ```text
/// first 1, window 2, 5 tokens
/// 1 0 0 1 1
/// 1 0 0 1 1
/// ```
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held<'a>(pub(crate) Ring<'a>);

impl Held<'_> {
    /// The tokens that sequence `b` has lost. If it has lost none, the end may be before the start.
    pub(super) fn lost(&self, b: usize) -> Range<usize> {
        let Ring { lengths, first, window } = self.0;
        first..(lengths.get(b) as usize).saturating_sub(window)
    }
}

impl Mask for Held<'_> {
    fn sees(&self, pair: Pair) -> bool {
        !self.lost(pair.batch()).contains(&pair.key())
    }

    fn heads_are_alike(&self) -> bool {
        true
    }

    fn span(&self, query: Query) -> Range<isize> {
        // Where there are no first tokens, the span starts after the lost ones.
        let start = if self.0.first == 0 { self.lost(query.batch()).end } else { 0 };
        start as isize..isize::MAX
    }

    fn is_span(&self) -> bool {
        self.0.first == 0
    }

    fn cover(&self, block: &Block) -> Cover {
        let (lost, keys) = (self.lost(block.batch), &block.keys);
        let hidden = lost.start.max(keys.start)..lost.end.min(keys.end);
        match hidden.len() {
            0 => Cover::Full,
            n if n == keys.len() => Cover::Skip,
            _ => Cover::Partial,
        }
    }
}
