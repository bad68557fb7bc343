//! Lengths and offsets of sequences: the position of queries among keys. This file alone turns them into positions.
//!
//! A batch is a list of sequences. Query `i` of a sequence has the key position `p = offset + i`. Causal order, windows and
//! ALiBi use `p`.

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
    /// The last query is at the last key: the offset is `seq_kv - seq_q`, or `key_lengths[b] - seq_q` with key lengths. It is
    /// the default, and right for decoding with a cache. It is wrong for right-padded prompts: see
    /// [`Attention::key_lengths`](crate::Attention::key_lengths).
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

/// The sequences of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequences<'a> {
    pub(crate) seq_q: usize,
    pub(crate) seq_kv: usize,
    pub(crate) query_offset: QueryOffset<'a>,
    /// The number of keys of each batch, 0 to `seq_kv`; `None` if each has `seq_kv`.
    pub(crate) key_lengths: Option<Integers<'a>>,
}

impl Sequences<'_> {
    /// Whether all batches have the same lengths and offsets.
    pub(crate) fn are_alike(&self) -> bool {
        self.key_lengths.is_none() && !matches!(self.query_offset, QueryOffset::PerBatch(_))
    }

    /// The sequence of batch `b`.
    pub(crate) fn get(&self, b: usize) -> Sequence {
        let keys = self.key_lengths.map_or(self.seq_kv, |lengths| lengths.get(b) as usize);
        let offset = match self.query_offset {
            QueryOffset::FromEnd => keys as i128 - self.seq_q as i128,
            QueryOffset::FromStart => 0,
            QueryOffset::At(offset) => offset as i128,
            QueryOffset::PerBatch(offsets) => offsets.get(b),
        };
        Sequence { batch: b, keys, offset }
    }

    /// The batches whose offsets may differ: all, or the first one.
    pub(crate) fn distinct(&self, batch: usize) -> Range<usize> {
        let differ = self.key_lengths.is_some() || matches!(self.query_offset, QueryOffset::PerBatch(_));
        0..if differ { batch } else { batch.min(1) }
    }

    /// Whether masks and score modifications can be given all indices and positions of `batch` sequences.
    pub(crate) fn are_indexable(&self, batch: usize) -> bool {
        let most = MAX_INDEX as i128;
        self.seq_q <= MAX_INDEX
            && self.seq_kv <= MAX_INDEX
            && batch <= MAX_INDEX
            && self.distinct(batch).all(|b| (-most..=most).contains(&self.get(b).offset))
    }
}

/// One sequence of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// Its index in the batch.
    pub(crate) batch: usize,
    /// The number of its keys.
    pub(crate) keys: usize,
    /// The key position of query 0. It is i128, so that no sum of offsets and windows overflows.
    pub(crate) offset: i128,
}

impl Sequence {
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
