//! Lengths and offsets of sequences: the position of queries among keys. This file alone turns them into positions.
//!
//! A batch is a list of sequences, each with its own number of queries and keys. Query `i` of a sequence has the key position
//! `p = offset + i`. Causal order, windows and ALiBi use `p`.

#![forbid(unsafe_code)]

use crate::integers::Integers;
use crate::pair::{MAX_INDEX, Query};
use std::ops::Range;

/// The position of the queries among the keys: query `i` is at key position `query_offset + i`.
///
/// With 2 queries and 4 keys, a causal mask shows (rows are queries, columns keys, 1 is visible):
///
/// ```text
/// FromEnd     FromStart    At(1)
/// 1 1 1 0     1 0 0 0      1 1 0 0
/// 1 1 1 1     1 1 0 0      1 1 1 0
/// ```
///
/// and with 4 queries and 2 keys:
///
/// ```text
/// FromEnd   FromStart   At(-1)
/// 0 0       1 0         0 0
/// 0 0       1 1         1 0
/// 1 0       1 1         1 1
/// 1 1       1 1         1 1
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueryOffset<'a> {
    /// The last query is at the last key: the offset is a sequence's number of keys less its number of queries. It is the default,
    /// and right for decoding with a cache. It is wrong for right-padded prompts without
    /// [`query_lengths`](crate::Attention::query_lengths): see [`Attention::key_lengths`](crate::Attention::key_lengths).
    #[default]
    FromEnd,
    /// The first query is at the first key: the offset is 0, as in PyTorch's `is_causal`.
    FromStart,
    /// The first query is at this position, which may be negative.
    At(isize),
    /// As [`QueryOffset::At`], with one position for each batch. [`QueryOffset::per_batch`] makes it from a list of any integer
    /// type.
    PerBatch(Integers<'a>),
}

impl<'a> QueryOffset<'a> {
    /// One position for each batch: that of its first query. The list has `batch` entries.
    ///
    /// ```
    /// use flashtile::{Attention, QueryOffset};
    ///
    /// let offsets: Vec<i32> = vec![128, 0];
    /// let attention = Attention::new().causal().query_offset(QueryOffset::per_batch(&offsets));
    /// ```
    pub fn per_batch(offsets: impl Into<Integers<'a>>) -> Self {
        QueryOffset::PerBatch(offsets.into())
    }
}

/// How many queries (or keys) each sequence has, and where they lie in the tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lengths<'a> {
    /// All of the tensor's, in every sequence.
    All(usize),
    /// The first ones, a number for each sequence.
    First(Integers<'a>),
    /// Packed: those of sequence `b` are `starts[b]..starts[b + 1]` of batch 0.
    Packed(Integers<'a>),
    /// Left-padded: those of sequence `b` are `firsts[b]..ends[b]`.
    Padded { firsts: Integers<'a>, ends: Ends<'a> },
}

/// Where the queries (or keys) of each sequence end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ends<'a> {
    All(usize),
    Each(Integers<'a>),
}

impl Ends<'_> {
    #[inline(always)]
    pub(crate) fn get(&self, b: usize) -> usize {
        match self {
            Ends::All(end) => *end,
            Ends::Each(ends) => ends.get(b) as usize,
        }
    }
}

impl Lengths<'_> {
    /// Of sequence `b`.
    #[inline(always)]
    pub(crate) fn get(&self, b: usize) -> usize {
        match self {
            Lengths::All(length) => *length,
            Lengths::First(lengths) => lengths.get(b) as usize,
            Lengths::Packed(starts) => (starts.get(b + 1) - starts.get(b)) as usize,
            Lengths::Padded { firsts, ends } => ends.get(b) - firsts.get(b) as usize,
        }
    }

    /// The rows before the first one of sequence `b`, in a tensor with a batch index for each.
    #[inline(always)]
    pub(crate) fn padding(&self, b: usize) -> usize {
        if let Lengths::Padded { firsts, .. } = self { firsts.get(b) as usize } else { 0 }
    }

    /// The batch index in the tensor of sequence `b`, and the index of its first query or key.
    #[inline]
    pub(crate) fn place(&self, b: usize) -> (usize, usize) {
        match self {
            Lengths::All(_) | Lengths::First(_) | Lengths::Padded { .. } => (b, self.padding(b)),
            Lengths::Packed(starts) => (0, starts.get(b) as usize),
        }
    }

    pub(crate) fn are_alike(&self) -> bool {
        matches!(self, Lengths::All(_))
    }

    /// The largest of `batch` sequences.
    pub(crate) fn largest(&self, batch: usize) -> usize {
        match self {
            Lengths::All(length) => *length,
            _ => (0..batch).map(|b| self.get(b)).max().unwrap_or(0),
        }
    }
}

/// The sequences of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequences<'a> {
    pub(crate) queries: Lengths<'a>,
    pub(crate) keys: Lengths<'a>,
    pub(crate) query_offset: QueryOffset<'a>,
}

impl Sequences<'_> {
    /// Whether all sequences have the same lengths and offsets.
    pub(crate) fn are_alike(&self) -> bool {
        let offsets_are_alike = !matches!(self.query_offset, QueryOffset::PerBatch(_));
        self.queries.are_alike() && self.keys.are_alike() && offsets_are_alike
    }

    /// Sequence `b`.
    #[inline(always)]
    pub(crate) fn get(&self, b: usize) -> Sequence {
        let (queries, keys) = (self.queries.get(b), self.keys.get(b));
        let offset = match self.query_offset {
            QueryOffset::FromEnd => keys as i128 - queries as i128,
            QueryOffset::FromStart => 0,
            QueryOffset::At(offset) => offset as i128,
            QueryOffset::PerBatch(offsets) => offsets.get(b),
        };
        let (first_query, first_key) = (self.queries.padding(b), self.keys.padding(b));
        Sequence { batch: b, queries, keys, offset, first_query, first_key }
    }

    /// The sequences that may differ: all, or the first one.
    pub(crate) fn distinct(&self, batch: usize) -> Range<usize> {
        0..if self.are_alike() { batch.min(1) } else { batch }
    }

    /// Whether masks and score modifications can be given all indices and positions of `batch` sequences.
    pub(crate) fn are_indexable(&self, batch: usize) -> bool {
        let most = MAX_INDEX as i128;
        batch <= MAX_INDEX
            && self.distinct(batch).map(|b| self.get(b)).all(|sequence| {
                let largest = sequence.queries.max(sequence.keys);
                largest <= MAX_INDEX && (-most..=most).contains(&sequence.offset)
            })
    }
}

/// One sequence of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// Its index in the batch.
    pub(crate) batch: usize,
    /// The number of its queries, and of its keys.
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    /// The key position of query 0. It is i128, so that no sum of offsets and windows overflows.
    pub(crate) offset: i128,
    /// Where its queries and keys start in masks and biases, which have rows and columns for padding, too.
    pub(crate) first_query: usize,
    pub(crate) first_key: usize,
}

impl Sequence {
    /// The index of query `i` of head `h` in a mask or bias, and that of key `j`.
    #[inline]
    pub(crate) fn in_tensors(&self, [h, i]: [usize; 2], j: usize) -> ([usize; 3], usize) {
        ([self.batch, h, self.first_query + i], self.first_key + j)
    }

    /// The keys in columns `columns` of a mask, a bias or scores. Columns of padding have none.
    pub(crate) fn keys_in(&self, columns: &Range<usize>) -> Range<usize> {
        columns.start.saturating_sub(self.first_key)..columns.end.saturating_sub(self.first_key)
    }

    /// The key position of query `i`.
    pub(crate) fn position(&self, i: usize) -> i128 {
        self.offset + i as i128
    }

    /// Query `i` of head `h`, for masks and score modifications. These are given problems within [`MAX_INDEX`] alone.
    #[inline]
    pub(crate) fn query(&self, h: usize, i: usize) -> Query {
        Query { batch: self.batch as u32, head: h as u32, query: i as i32, offset: self.offset as i32 }
    }
}
