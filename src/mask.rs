//! Which keys a query may see.
//!
//! **One idea for all that depends on position.** Query `i` stands at key position `p = query_offset + i`, and causal
//! order, windows and key lengths each allow one run of keys around or up to `p`. Their intersection is one interval of
//! keys per query; everything that skips work is derived from that interval. An explicit boolean tensor is looked at only
//! inside it.
//!
//! A mask answers three questions, and a test holds the answers together:
//! * is the pair (i, j) visible? [`Mask::sees`], straight from the definition;
//! * which keys can query i see by its position? [`Mask::interval`];
//! * which keys does any query of a tile see, and which do all of them? [`hull`] and [`common`], from the intervals.

#![forbid(unsafe_code)]

use crate::integers::Integers;
use crate::tensor::strided::Strided;
use std::ops::Range;

/// Where the queries stand among the keys: query `i` is at key position `query_offset + i`.
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
    /// The last query stands at the last key: the offset is `seq_kv - seq_q`, or `key_lengths[b] - seq_q` where lengths
    /// are given. What a decoder with a cache wants, and the default.
    #[default]
    FromEnd,
    /// The first query stands at the first key: the offset is 0. What PyTorch's `is_causal` means.
    FromStart,
    /// The first query stands at this position, which may be negative.
    At(isize),
    /// As [`QueryOffset::At`], one for each batch; [`QueryOffset::per_batch`] makes it from a list of any integers.
    PerBatch(Integers<'a>),
}

impl<'a> QueryOffset<'a> {
    /// One position for each batch, where its first query stands.
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

/// The checked mask of a problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask<'a> {
    pub(crate) seq_q: usize,
    pub(crate) seq_kv: usize,
    pub(crate) query_offset: QueryOffset<'a>,
    pub(crate) causal: bool,
    /// Keys visible before and after the query's own position; `None` for all.
    pub(crate) window: (Option<usize>, Option<usize>),
    /// How many keys each batch has, 0 to `seq_kv`; `None` for `seq_kv`.
    pub(crate) key_lengths: Option<Integers<'a>>,
    /// Not 0 where the query may attend, broadcast to the shape of the scores. Bytes: a mask that comes from C may hold any.
    pub(crate) tensor: Option<Strided<'a, u8, 4>>,
}

impl Mask<'_> {
    /// How many keys batch `b` has.
    pub(crate) fn key_length(&self, b: usize) -> usize {
        self.key_lengths.map_or(self.seq_kv, |lengths| lengths.get(b) as usize)
    }

    /// The key position of query `i` of batch `b`. In i128, in which no sum of offsets and windows can overflow.
    pub(crate) fn position(&self, b: usize, i: usize) -> i128 {
        let offset = match self.query_offset {
            QueryOffset::FromEnd => self.key_length(b) as i128 - self.seq_q as i128,
            QueryOffset::FromStart => 0,
            QueryOffset::At(offset) => offset as i128,
            QueryOffset::PerBatch(offsets) => offsets.get(b),
        };
        offset + i as i128
    }

    /// Whether query `i` of head `h` may see key `j`: the definition.
    pub(crate) fn sees(&self, b: usize, h: usize, i: usize, j: usize) -> bool {
        let (p, key) = (self.position(b, i), j as i128);
        let (left, right) = self.window;
        j < self.key_length(b)
            && (!self.causal || key <= p)
            && left.is_none_or(|left| p - left as i128 <= key)
            && right.is_none_or(|right| key <= p + right as i128)
            && self.tensor.is_none_or(|tensor| tensor.get([b, h, i, j]).is_some_and(|byte| byte != 0))
    }

    /// Whether queries of a batch see different keys by their positions.
    pub(crate) fn goes_by_position(&self) -> bool {
        self.causal || self.window != (None, None)
    }

    /// The keys that query `i` of batch `b` may see by its position: all that [`Mask::sees`] allows but for the tensor.
    pub(crate) fn interval(&self, b: usize, i: usize) -> Range<usize> {
        if !self.goes_by_position() {
            return 0..self.key_length(b);
        }
        let p = self.position(b, i);
        let length = self.key_length(b) as i128;
        let (left, right) = self.window;
        let start = left.map_or(0, |left| p - left as i128);
        let mut end = right.map_or(length, |right| p + right as i128 + 1);
        if self.causal {
            end = end.min(p + 1);
        }
        // Clamped into 0..=length, so that the conversion is exact; an empty interval is 0..0.
        let (start, end) = (start.clamp(0, length) as usize, end.clamp(0, length) as usize);
        if start < end { start..end } else { 0..0 }
    }
}

/// The smallest interval that holds all of `intervals`, empty ones aside: the span of keys that a tile of queries needs.
pub(crate) fn hull(intervals: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    intervals
        .filter(|interval| !interval.is_empty())
        .reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
        .unwrap_or(0..0)
}

/// The intersection of `intervals`: keys at which nobody's position needs a look. Without any, or where they don't meet,
/// an empty one.
pub(crate) fn common(intervals: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    let all = intervals.reduce(|a, b| a.start.max(b.start)..a.end.min(b.end)).unwrap_or(0..0);
    if all.is_empty() { 0..0 } else { all }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 6;

    /// Every mask by position on every shape up to [`MOST`] queries and keys.
    fn for_every_mask(mut check: impl FnMut(Mask<'_>)) {
        const BOUNDS: [Option<usize>; 5] = [None, Some(0), Some(1), Some(3), Some(usize::MAX)];
        let lengths: Vec<[usize; 1]> = (0..=MOST).map(|length| [length]).collect();
        let mut offsets = vec![QueryOffset::FromEnd, QueryOffset::FromStart, QueryOffset::per_batch(&[-2])];
        offsets.extend([isize::MIN, isize::MAX].map(QueryOffset::At));
        offsets.extend((-3..=8).map(QueryOffset::At));
        for (seq_q, seq_kv) in (0..=MOST).flat_map(|q| (0..=MOST).map(move |kv| (q, kv))) {
            for length in (0..=seq_kv).map(Some).chain([None]) {
                for query_offset in offsets.iter().copied() {
                    for (left, right) in BOUNDS.into_iter().flat_map(|left| BOUNDS.map(|right| (left, right))) {
                        for causal in [false, true] {
                            let key_lengths = length.map(|length| Integers::from(&lengths[length]));
                            let window = (left, right);
                            check(Mask { seq_q, seq_kv, query_offset, causal, window, key_lengths, tensor: None });
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_interval_holds_the_keys_that_are_seen() {
        for_every_mask(|mask| {
            for i in 0..mask.seq_q {
                let interval = mask.interval(0, i);
                assert!(interval.end <= mask.seq_kv, "{mask:?}, query {i}: {interval:?}");
                assert!(!interval.is_empty() || interval == (0..0), "{mask:?}, query {i}: {interval:?}");
                for j in 0..mask.seq_kv {
                    assert_eq!(mask.sees(0, 0, i, j), interval.contains(&j), "{mask:?}, query {i}, key {j}");
                }
            }
        });
    }

    #[test]
    fn hull_and_common_are_those_of_the_pairs() {
        for_every_mask(|mask| {
            // Every run of queries from the first, and every run of keys.
            for queries in 1..=mask.seq_q.min(3) {
                let intervals = || (0..queries).map(|i| mask.interval(0, i));
                let seen = |j: usize| (0..queries).filter(|&i| mask.sees(0, 0, i, j)).count();
                let first = (0..mask.seq_kv).find(|&j| seen(j) > 0);
                let last = (0..mask.seq_kv).rfind(|&j| seen(j) > 0);
                let brute = first.zip(last).map_or(0..0, |(first, last)| first..last + 1);
                assert_eq!(hull(intervals()), brute, "{mask:?}, {queries} queries");
                let all = || (0..mask.seq_kv).filter(|&j| seen(j) == queries);
                let brute = all().next().zip(all().next_back()).map_or(0..0, |(first, last)| first..last + 1);
                assert_eq!(common(intervals()), brute, "{mask:?}, {queries} queries");
                assert_eq!(all().count(), brute.len(), "{mask:?}, {queries} queries");
            }
        });
    }

    /// The matrices in the documentation of [`QueryOffset`].
    #[test]
    fn causal_matrices_are_as_drawn() {
        let draw = |seq_q, seq_kv, query_offset| {
            let window = (None, None);
            let mask = Mask { seq_q, seq_kv, query_offset, causal: true, window, key_lengths: None, tensor: None };
            let row = |i| (0..seq_kv).map(|j| if mask.sees(0, 0, i, j) { '1' } else { '0' }).collect::<String>();
            (0..seq_q).map(row).collect::<Vec<_>>()
        };
        assert_eq!(draw(2, 4, QueryOffset::FromEnd), ["1110", "1111"]);
        assert_eq!(draw(2, 4, QueryOffset::FromStart), ["1000", "1100"]);
        assert_eq!(draw(2, 4, QueryOffset::At(1)), ["1100", "1110"]);
        assert_eq!(draw(4, 2, QueryOffset::FromEnd), ["00", "00", "10", "11"]);
        assert_eq!(draw(4, 2, QueryOffset::FromStart), ["10", "11", "11", "11"]);
        assert_eq!(draw(4, 2, QueryOffset::At(-1)), ["00", "10", "11", "11"]);
    }
}
