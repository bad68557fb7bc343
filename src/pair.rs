//! Queries, pairs and blocks of pairs, as masks and score modifications see them.

#![forbid(unsafe_code)]

use std::ops::Range;

/// The largest index and the largest magnitude of an offset that masks and score modifications see. Indices, offsets and distances have
/// 32 bits, the size of a score, so that the compiler makes vectors of functions of them.
pub(crate) const MAX_INDEX: usize = (1 << 30) - 1;

/// A query of one batch and head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Query {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) query: i32,
    /// The position of query 0.
    pub(crate) offset: i32,
}

impl Query {
    /// Query `query` of query head `head`, in a sequence whose query 0 is at key position `offset`.
    ///
    /// Numbers of 2^30 and more (-2^30 and less) count as the nearest number that is not.
    pub fn new(batch: usize, head: usize, query: usize, offset: isize) -> Self {
        let index = |n: usize| n.min(MAX_INDEX) as i32;
        let offset = offset.clamp(-(MAX_INDEX as isize), MAX_INDEX as isize) as i32;
        Query { batch: index(batch) as u32, head: index(head) as u32, query: index(query), offset }
    }

    /// The index in the batch.
    #[inline]
    pub fn batch(self) -> usize {
        self.batch as usize
    }

    /// The query head.
    #[inline]
    pub fn head(self) -> usize {
        self.head as usize
    }

    /// The index of the query in its sequence.
    #[inline]
    pub fn query(self) -> usize {
        self.query as usize
    }

    /// The query's position among the keys, as causal order counts it: see [`QueryOffset`](crate::QueryOffset).
    #[inline]
    pub fn position(self) -> isize {
        self.query as isize + self.offset as isize
    }

    /// The pair of this query and a key.
    #[inline]
    pub fn with_key(self, key: usize) -> Pair {
        Pair { row: self, key: key.min(MAX_INDEX) as i32 }
    }
}

/// A query and a key: what a mask shows or hides, and what has a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    pub(crate) row: Query,
    pub(crate) key: i32,
}

impl Pair {
    /// The index in the batch.
    #[inline]
    pub fn batch(self) -> usize {
        self.row.batch()
    }

    /// The query head.
    #[inline]
    pub fn head(self) -> usize {
        self.row.head()
    }

    /// The index of the query in its sequence.
    #[inline]
    pub fn query(self) -> usize {
        self.row.query()
    }

    /// The query's position among the keys, as causal order counts it: see [`QueryOffset`](crate::QueryOffset).
    #[inline]
    pub fn position(self) -> isize {
        self.row.position()
    }

    /// The index of the key in its sequence.
    #[inline]
    pub fn key(self) -> usize {
        self.key as usize
    }

    /// `position - key`: how far the key lies before the query. Loops over it are vectorised, as it has the size of a score.
    #[inline]
    pub fn distance(self) -> i32 {
        self.row.query + self.row.offset - self.key
    }
}

/// Queries times keys: all pairs of some heads and queries of a batch with a run of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The index in the batch.
    pub batch: usize,
    /// Query heads.
    pub heads: Range<usize>,
    /// Queries of the sequence.
    pub queries: Range<usize>,
    /// The position of query 0.
    pub offset: isize,
    /// Keys of the sequence.
    pub keys: Range<usize>,
}

impl Block {
    /// The positions of the queries.
    pub fn positions(&self) -> Range<isize> {
        self.queries.start as isize + self.offset..self.queries.end as isize + self.offset
    }

    /// Its queries, head by head.
    pub fn rows(&self) -> impl Iterator<Item = Query> + use<> {
        let Block { batch, heads, queries, offset, .. } = self.clone();
        heads.flat_map(move |head| queries.clone().map(move |query| Query::new(batch, head, query, offset)))
    }

    /// All pairs, row by row.
    pub fn pairs(&self) -> impl Iterator<Item = Pair> + use<> {
        let keys = self.keys.clone();
        self.rows().flat_map(move |row| keys.clone().map(move |key| row.with_key(key)))
    }
}
