//! The first visible key of each sequence.

#![forbid(unsafe_code)]

use super::open::{Mask, ProblemSizes};
use crate::error::{Error, check_count};
use crate::integers::Integers;
use crate::pair::{Pair, Query};
use std::ops::Range;

/// Hides the keys before the first one of each sequence: `j >= starts[batch]`.
///
/// Positions don't move: [`QueryOffset`](crate::QueryOffset) counts the hidden keys, too. For left padding,
/// [`Attention::first_keys`](crate::Attention::first_keys) is better: the bits are those of the sequence alone, and positions count from
/// its first key.
///
/// ```text
/// starts 0, 2; causal, 4 queries, 4 keys
/// 1 0 0 0   0 0 0 0
/// 1 1 0 0   0 0 0 0
/// 1 1 1 0   0 0 1 0
/// 1 1 1 1   0 0 1 1
/// ```
#[derive(Clone, Copy, Debug)]
pub struct KeyStarts<'a> {
    starts: Integers<'a>,
}

impl<'a> KeyStarts<'a> {
    /// One number for each sequence of the batch, of any common integer type. Numbers below 0 count as 0.
    pub fn new(starts: impl Into<Integers<'a>>) -> Self {
        KeyStarts { starts: starts.into() }
    }

    fn start(&self, batch: usize) -> isize {
        self.starts.get(batch).clamp(0, isize::MAX as i128) as isize
    }
}

impl Mask for KeyStarts<'_> {
    fn sees(&self, pair: Pair) -> bool {
        pair.key() as isize >= self.start(pair.batch())
    }

    fn heads_are_alike(&self) -> bool {
        true
    }

    fn span(&self, query: Query) -> Range<isize> {
        self.start(query.batch())..isize::MAX
    }

    fn is_span(&self) -> bool {
        true
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        check_count("key starts", self.starts.len(), sizes.batch)
    }
}
