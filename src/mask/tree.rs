//! Trees of drafts: speculative decoding.

#![forbid(unsafe_code)]

use super::open::{Mask, ProblemSizes};
use crate::error::Error;
use crate::integers::Integers;
use crate::pair::{Pair, Query};
use std::ops::Range;

/// A tree of draft tokens: each draft sees all keys before the drafts, itself, and its ancestors.
///
/// The queries are the drafts, and the last keys of each sequence are the drafts' keys: key `offset + i` is that of draft i, where
/// `offset` is the position of query 0. With the default [`QueryOffset::FromEnd`](crate::QueryOffset::FromEnd) these are the last
/// `seq_q` keys. **Causal order is part of it**, as parents come before their children; `causal` beside it changes nothing.
///
/// ```text
/// parents -1 0 0 1, two keys before the drafts
/// 1 1   1 0 0 0
/// 1 1   1 1 0 0
/// 1 1   1 0 1 0
/// 1 1   1 1 0 1
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    drafts: usize,
    /// Bit j of row i: whether draft j is draft i or one of its ancestors. `[drafts][words]`.
    ancestors: Vec<u64>,
    words: usize,
}

impl Tree {
    /// The parent of each draft: an earlier draft, or -1 for a draft that follows the keys before them.
    ///
    /// # Errors
    /// [`Error::InvalidMask`] if a parent is not an earlier draft; [`Error::TooLarge`] if there is no memory for a bit for each
    /// pair of drafts.
    pub fn new<'a>(parents: impl Into<Integers<'a>>) -> Result<Self, Error> {
        let parents = parents.into();
        let drafts = parents.len();
        let words = drafts.div_ceil(64);
        let mut ancestors = super::filled("the ancestors of a tree", 0u64, drafts.checked_mul(words))?;
        for (i, parent) in parents.iter().enumerate() {
            let (earlier, own) = ancestors.split_at_mut(i * words);
            let own = &mut own[..words];
            match usize::try_from(parent) {
                Ok(parent) if parent < i => own.copy_from_slice(&earlier[parent * words..][..words]),
                Err(_) if parent == -1 => {}
                _ => return Err(Error::InvalidMask { reason: "the parent of a draft is not an earlier draft" }),
            }
            own[i / 64] |= 1 << (i % 64);
        }
        Ok(Tree { drafts, ancestors, words })
    }
}

impl Mask for Tree {
    #[inline]
    fn sees(&self, pair: Pair) -> bool {
        let first = pair.position() - pair.query() as isize;
        match usize::try_from(pair.key() as isize - first) {
            Err(_) => true,
            Ok(draft) if draft < self.drafts => {
                self.ancestors[pair.query() * self.words + draft / 64] >> (draft % 64) & 1 == 1
            }
            Ok(_) => false,
        }
    }

    fn heads_are_alike(&self) -> bool {
        true
    }

    fn span(&self, query: Query) -> Range<isize> {
        0..query.position() + 1
    }

    fn cover(&self, block: &crate::pair::Block) -> super::Cover {
        if block.keys.end as isize <= block.offset { super::Cover::Full } else { super::Cover::Partial }
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        super::check_count("parents of drafts", self.drafts, sizes.seq_q)
    }
}
