//! Prefix language models: causal order, except that some ranges see themselves in both directions.

#![forbid(unsafe_code)]

use super::open::{Mask, ProblemSizes};
use crate::error::{Error, check_count};
use crate::pair::{Pair, Query};
use std::ops::Range;

/// Causal order united with ranges whose positions all see each other: the prefix of a prefix language model, or the images in
/// a prompt.
///
/// A query at position p sees the keys `j <= p`, and if p is in a range, all keys of that range. **Causal order is part of it:
/// [`Attention::causal`](crate::Attention::causal) beside it would hide what the ranges show.**
///
/// ```text
/// ranges 0..2 and 3..5
/// 1 1 0 0 0 0
/// 1 1 0 0 0 0
/// 1 1 1 0 0 0
/// 1 1 1 1 1 0
/// 1 1 1 1 1 0
/// 1 1 1 1 1 1
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixLm {
    /// The ranges of each sequence, in ascending order; one list if all sequences share it.
    ranges: Vec<Vec<Range<usize>>>,
}

impl PrefixLm {
    /// Ranges of positions for every sequence, in ascending order and apart.
    ///
    /// # Errors
    /// [`Error::InvalidMask`] for ranges that overlap or are not in ascending order.
    pub fn new(ranges: &[Range<usize>]) -> Result<Self, Error> {
        Self::per_sequence(&[ranges])
    }

    /// As [`PrefixLm::new`], with ranges of its own for each sequence of the batch. A single list is for all of them.
    ///
    /// # Errors
    /// As [`PrefixLm::new`].
    pub fn per_sequence(ranges: &[&[Range<usize>]]) -> Result<Self, Error> {
        let in_order = |ranges: &&[Range<usize>]| {
            ranges.windows(2).all(|pair| pair[0].end <= pair[1].start)
                && ranges.iter().all(|range| range.start <= range.end)
        };
        if !ranges.iter().all(in_order) {
            return Err(Error::InvalidMask { reason: "ranges of a PrefixLm overlap or are not in ascending order" });
        }
        Ok(PrefixLm { ranges: ranges.iter().map(|ranges| ranges.to_vec()).collect() })
    }

    /// The first position that a query of a batch at position `p` does not see.
    fn end(&self, batch: usize, p: isize) -> isize {
        let ranges = &self.ranges[if self.ranges.len() == 1 { 0 } else { batch }];
        let later = ranges.partition_point(|range| range.end as i128 <= p as i128);
        match ranges.get(later) {
            Some(range) if range.start as i128 <= p as i128 => range.end.min(isize::MAX as usize) as isize,
            _ => p + 1,
        }
    }
}

impl Mask for PrefixLm {
    fn sees(&self, pair: Pair) -> bool {
        (pair.key() as isize) < self.end(pair.batch(), pair.position())
    }

    fn heads_are_alike(&self) -> bool {
        true
    }

    fn span(&self, query: Query) -> Range<isize> {
        0..self.end(query.batch(), query.position())
    }

    fn is_span(&self) -> bool {
        true
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        match self.ranges.len() {
            1 => Ok(()),
            lists => check_count("sequences of a PrefixLm", lists, sizes.batch),
        }
    }
}
