//! Trees of drafts: speculative decoding.

#![forbid(unsafe_code)]

use super::open::{Mask, ProblemSizes};
use crate::error::{Error, check_count};
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
    /// Sequences that have trees of their own; 1 if all share one.
    batch: usize,
    drafts: usize,
    /// Bit j of row i: whether draft j is draft i or one of its ancestors. `[batch][drafts][words]`.
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
        Self::of_batch(1, parents.into())
    }

    /// As [`Tree::new`], with a tree of its own for each of `batch` sequences: `[batch, drafts]`.
    ///
    /// # Errors
    /// As [`Tree::new`], and [`Error::InvalidMask`] if the list can't be cut into `batch` rows of one length.
    pub fn per_sequence<'a>(batch: usize, parents: impl Into<Integers<'a>>) -> Result<Self, Error> {
        Self::of_batch(batch, parents.into())
    }

    fn of_batch(batch: usize, parents: Integers<'_>) -> Result<Self, Error> {
        if batch == 0 || !parents.len().is_multiple_of(batch) {
            return Err(Error::InvalidMask { reason: "parents of drafts are not one row for each sequence" });
        }
        let drafts = parents.len() / batch;
        let words = drafts.div_ceil(64);
        let mut ancestors = super::filled("the ancestors of a tree", 0u64, parents.len().checked_mul(words))?;
        for (n, parent) in parents.iter().enumerate() {
            let i = n % drafts;
            let (earlier, own) = ancestors.split_at_mut(n * words);
            let (tree, own) = (&earlier[(n - i) * words..], &mut own[..words]);
            match usize::try_from(parent) {
                Ok(parent) if parent < i => own.copy_from_slice(&tree[parent * words..][..words]),
                Err(_) if parent == -1 => {}
                _ => return Err(Error::InvalidMask { reason: "the parent of a draft is not an earlier draft" }),
            }
            own[i / 64] |= 1 << (i % 64);
        }
        Ok(Tree { batch, drafts, ancestors, words })
    }
}

impl Mask for Tree {
    #[inline]
    fn sees(&self, pair: Pair) -> bool {
        let first = pair.position() - pair.query() as isize;
        match usize::try_from(pair.key() as isize - first) {
            Err(_) => true,
            Ok(draft) if draft < self.drafts => {
                let tree = if self.batch == 1 { 0 } else { pair.batch() };
                let row = (tree * self.drafts + pair.query()) * self.words;
                self.ancestors[row + draft / 64] >> (draft % 64) & 1 == 1
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
        if self.batch > 1 {
            check_count("sequences of trees", self.batch, sizes.batch)?;
        }
        check_count("parents of drafts", self.drafts, sizes.seq_q)
    }
}
