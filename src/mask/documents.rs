//! Documents packed into one sequence: a query sees the keys of its own document.

#![forbid(unsafe_code)]

use super::open::{Cover, Mask, ProblemSizes};
use crate::error::{Error, check_count};
use crate::integers::Integers;
use crate::pair::{Block, Pair, Query};
use std::collections::HashMap;
use std::ops::Range;

/// A query sees the keys that have its own document number (segment id). Compose it with causal order for packed prompts.
///
/// Documents whose keys are neighbours, as packing makes them, cost no comparison of pairs: the keys of a document are one run.
/// Numbers in any other order are compared pair by pair.
///
/// ```text
/// queries 0 0 1 1 1, keys 0 0 1 1 1
/// 1 1 0 0 0
/// 1 1 0 0 0
/// 0 0 1 1 1
/// 0 0 1 1 1
/// 0 0 1 1 1
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents {
    /// Sequences that have numbers of their own; 1 if all share them.
    batch: usize,
    /// `[batch][seq_q]` and `[batch][seq_kv]`: the documents of a sequence in the order of their first keys, and numbers that no
    /// key has for those without.
    queries: Vec<u32>,
    keys: Vec<u32>,
    /// The smallest run of keys that holds all of each query's document, `[batch][seq_q]`.
    spans: Vec<Range<usize>>,
    /// Whether no run has a key of another document.
    is_span: bool,
}

impl Documents {
    /// The document number of each query and of each key, of any common integer type, for every sequence alike.
    pub fn new<'a>(queries: impl Into<Integers<'a>>, keys: impl Into<Integers<'a>>) -> Self {
        Self::of_batch(1, queries.into(), keys.into()).expect("a batch of one divides every list")
    }

    /// As [`Documents::new`] with numbers of its own for each of `batch` sequences: `[batch, seq_q]` and `[batch, seq_kv]`.
    ///
    /// # Errors
    /// [`Error::InvalidMask`] if the lists can't be cut into `batch` rows of one length.
    pub fn per_sequence<'a>(
        batch: usize,
        queries: impl Into<Integers<'a>>,
        keys: impl Into<Integers<'a>>,
    ) -> Result<Self, Error> {
        Self::of_batch(batch, queries.into(), keys.into())
    }

    /// Documents by their lengths, one after the other, the same for queries and keys, for every sequence alike. (The cumulative
    /// starts of packed batches are the running sums of these.)
    ///
    /// # Errors
    /// [`Error::InvalidMask`] if a length is negative or the sum is 2^30 or more.
    pub fn of_lengths<'a>(lengths: impl Into<Integers<'a>>) -> Result<Self, Error> {
        let mut numbers = Vec::new();
        for (n, length) in lengths.into().iter().enumerate() {
            let reason = "a document's length is negative, or there are 2^30 tokens or more";
            let room = crate::pair::MAX_INDEX as i128 - numbers.len() as i128;
            if !(0..=room).contains(&length) {
                return Err(Error::InvalidMask { reason });
            }
            numbers.resize(numbers.len() + length as usize, n as u64);
        }
        Ok(Self::new(&numbers, &numbers))
    }

    fn of_batch(batch: usize, queries: Integers<'_>, keys: Integers<'_>) -> Result<Self, Error> {
        if batch == 0 || !queries.len().is_multiple_of(batch) || !keys.len().is_multiple_of(batch) {
            return Err(Error::InvalidMask { reason: "document numbers are not one row for each sequence" });
        }
        let (all_queries, all_keys): (Vec<_>, Vec<_>) = (queries.iter().collect(), keys.iter().collect());
        let mut documents =
            Documents { batch, queries: Vec::new(), keys: Vec::new(), spans: Vec::new(), is_span: true };
        // Without numbers, any batch has rows of none.
        for b in 0..batch.min(queries.len().max(keys.len())) {
            documents.add_sequence(row(&all_queries, batch, b), row(&all_keys, batch, b));
        }
        Ok(documents)
    }

    /// Numbers the documents of a sequence and finds the smallest run of keys that holds each.
    fn add_sequence(&mut self, queries: &[i128], keys: &[i128]) {
        let mut numbers = HashMap::<i128, u32>::new();
        let mut runs = Vec::<Range<usize>>::new();
        for (j, document) in keys.iter().enumerate() {
            let number = *numbers.entry(*document).or_insert(runs.len() as u32);
            if number as usize == runs.len() {
                runs.push(j..j);
            }
            let run = &mut runs[number as usize];
            self.is_span &= run.end == j;
            run.end = j + 1;
            self.keys.push(number);
        }
        for document in queries {
            let number = numbers.get(document).copied().unwrap_or(u32::MAX);
            self.queries.push(number);
            self.spans.push(runs.get(number as usize).cloned().unwrap_or(0..0));
        }
    }

    fn own(&self, batch: usize) -> usize {
        if self.batch == 1 { 0 } else { batch }
    }
}

/// Row `b` of `batch` rows.
fn row<T>(all: &[T], batch: usize, b: usize) -> &[T] {
    let len = all.len() / batch;
    &all[b * len..(b + 1) * len]
}

impl Mask for Documents {
    #[inline]
    fn sees(&self, pair: Pair) -> bool {
        let b = self.own(pair.batch());
        let (queries, keys) = (row(&self.queries, self.batch, b), row(&self.keys, self.batch, b));
        queries[pair.query()] == keys[pair.key()]
    }

    fn heads_are_alike(&self) -> bool {
        true
    }

    fn span(&self, query: Query) -> Range<isize> {
        let Range { start, end } = row(&self.spans, self.batch, self.own(query.batch()))[query.query()];
        start as isize..end as isize
    }

    fn is_span(&self) -> bool {
        self.is_span
    }

    /// Compares the smallest and largest numbers on either side, as documents in no order have mostly blocks of both.
    fn cover(&self, block: &Block) -> Cover {
        let b = self.own(block.batch);
        let queries = extent(&row(&self.queries, self.batch, b)[block.queries.clone()]);
        let keys = extent(&row(&self.keys, self.batch, b)[block.keys.clone()]);
        match (queries, keys) {
            (queries, keys) if queries.1 < keys.0 || keys.1 < queries.0 => Cover::Skip,
            (queries, keys) if queries.0 == queries.1 && queries == keys => Cover::Full,
            _ => Cover::Partial,
        }
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        if self.batch > 1 {
            check_count("sequences of documents", self.batch, sizes.batch)?;
        }
        check_count("document numbers of queries", self.queries.len() / self.batch, sizes.seq_q)?;
        check_count("document numbers of keys", self.keys.len() / self.batch, sizes.seq_kv)
    }
}

/// The smallest and the largest number.
fn extent(numbers: &[u32]) -> (u32, u32) {
    numbers.iter().fold((u32::MAX, 0), |(low, high), &n| (low.min(n), high.max(n)))
}
