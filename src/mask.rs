//! Masks: the keys that each query may see.
//!
//! Each mask has a file in `mask/`. This file composes them by intersection.
//!
//! **Masks by position.** Query `i` is at key position `p` ([`Sequence::position`]). Causal order, windows and key lengths each
//! show it one run of keys ([`PositionMask`]). The intersection of these runs is the query's *span*. All skipping of work is
//! decided by spans ([`cover`]). A boolean tensor is read only inside the span.
//!
//! What a mask shows is said three times, and a test checks that all agree:
//! * [`Mask::sees`]: is the pair (i, j) visible? It is the definition.
//! * [`Mask::span`]: which keys can query i see by its position?
//! * [`Cover`](cover::Cover): which keys does any query of a tile see, and which do all of them see?

#![forbid(unsafe_code)]

mod by_position;
mod causal;
pub(crate) mod cover;
mod lengths;
mod tensor;
mod window;

pub(crate) use causal::Causal;
pub(crate) use tensor::MaskTensor;
pub(crate) use window::Window;

use crate::sequence::Sequence;
use by_position::PositionMask;
use lengths::Lengths;
use std::ops::Range;

/// The mask of a problem: the intersection of these masks and of each sequence's length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mask<'a> {
    pub(crate) causal: Option<Causal>,
    pub(crate) window: Option<Window>,
    pub(crate) tensor: Option<MaskTensor<'a>>,
}

impl Mask<'_> {
    /// Whether query `i` of head `h` may see key `j` of a sequence: the definition.
    pub(crate) fn sees(&self, sequence: &Sequence, h: usize, i: usize, j: usize) -> bool {
        let (p, key) = (sequence.position(i), j as i128);
        Lengths { length: sequence.keys }.sees(p, key)
            && self.causal.is_none_or(|causal| causal.sees(p, key))
            && self.window.is_none_or(|window| window.sees(p, key))
            && self.tensor.is_none_or(|tensor| tensor.sees([sequence.batch, h, i], j))
    }

    /// Whether the queries of one sequence may have different spans.
    pub(crate) fn spans_differ(&self) -> bool {
        self.causal.is_some() || self.window.is_some()
    }

    /// The span of query `i`: the keys that [`Mask::sees`] allows without the tensor.
    pub(crate) fn span(&self, sequence: &Sequence, i: usize) -> Range<usize> {
        if !self.spans_differ() {
            return 0..sequence.keys;
        }
        let p = sequence.position(i);
        let mut span = Lengths { length: sequence.keys }.span(p);
        if let Some(window) = &self.window {
            span = intersection(span, window.span(p));
        }
        if let Some(causal) = &self.causal {
            span = intersection(span, causal.span(p));
        }
        // The span is inside 0..length, so the conversion is exact. An empty span is 0..0.
        if span.is_empty() { 0..0 } else { span.start as usize..span.end as usize }
    }
}

fn intersection(a: Range<i128>, b: Range<i128>) -> Range<i128> {
    a.start.max(b.start)..a.end.min(b.end)
}

#[cfg(test)]
mod tests {
    use super::cover::{Cover, union};
    use super::*;
    use crate::sequence::{QueryOffset, Sequences};

    const MOST: usize = 6;

    /// Every mask by position on every shape up to [`MOST`] queries and keys.
    fn for_every_mask(mut check: impl FnMut(Mask<'_>, Sequences<'_>)) {
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
                            let key_lengths = length.map(|length| (&lengths[length]).into());
                            let window = (left, right) != (None, None);
                            let window = window.then_some(Window { left, right });
                            let mask = Mask { causal: causal.then_some(Causal), window, tensor: None };
                            check(mask, Sequences { seq_q, seq_kv, query_offset, key_lengths });
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_span_holds_the_keys_that_are_seen() {
        for_every_mask(|mask, sequences| {
            let sequence = sequences.get(0);
            for i in 0..sequences.seq_q {
                let span = mask.span(&sequence, i);
                assert!(span.end <= sequences.seq_kv, "{mask:?}, {sequence:?}, query {i}: {span:?}");
                assert!(!span.is_empty() || span == (0..0), "{mask:?}, {sequence:?}, query {i}: {span:?}");
                for j in 0..sequences.seq_kv {
                    assert_eq!(
                        mask.sees(&sequence, 0, i, j),
                        span.contains(&j),
                        "{mask:?}, {sequence:?}, query {i}, key {j}"
                    );
                }
            }
        });
    }

    #[test]
    fn a_cover_is_that_of_the_pairs() {
        for_every_mask(|mask, sequences| {
            let sequence = sequences.get(0);
            // Every run of queries from the first, and every run of keys.
            for queries in 1..=sequences.seq_q.min(3) {
                let spans = || (0..queries).map(|i| mask.span(&sequence, i));
                let seen = |j: usize| (0..queries).filter(|&i| mask.sees(&sequence, 0, i, j)).count();
                let first = (0..sequences.seq_kv).find(|&j| seen(j) > 0);
                let last = (0..sequences.seq_kv).rfind(|&j| seen(j) > 0);
                let brute = first.zip(last).map_or(0..0, |(first, last)| first..last + 1);
                assert_eq!(union(spans()), brute, "{mask:?}, {sequence:?}, {queries} queries");
                let all = || (0..sequences.seq_kv).filter(|&j| seen(j) == queries);
                let brute = all().next().zip(all().next_back()).map_or(0..0, |(first, last)| first..last + 1);
                assert_eq!(Cover::new(spans()).full, brute, "{mask:?}, {sequence:?}, {queries} queries");
                assert_eq!(all().count(), brute.len(), "{mask:?}, {sequence:?}, {queries} queries");
            }
        });
    }

    /// The intersection of two windows shows the keys that both show.
    #[test]
    fn windows_intersect() {
        let sizes = [None, Some(0), Some(2), Some(5)];
        let windows = || sizes.into_iter().flat_map(|left| sizes.map(|right| Window { left, right }));
        for (a, b) in windows().flat_map(|a| windows().map(move |b| (a, b))) {
            for j in -8..8 {
                assert_eq!(a.intersect(b).sees(0, j), a.sees(0, j) && b.sees(0, j), "{a:?}, {b:?}, {j}");
            }
        }
    }

    /// The matrices in the documentation of [`QueryOffset`].
    #[test]
    fn causal_matrices_are_as_drawn() {
        let matrix = |seq_q, seq_kv, query_offset| {
            let mask = Mask { causal: Some(Causal), ..Mask::default() };
            let sequence = Sequences { seq_q, seq_kv, query_offset, key_lengths: None }.get(0);
            let row =
                |i| (0..seq_kv).map(|j| if mask.sees(&sequence, 0, i, j) { '1' } else { '0' }).collect::<String>();
            (0..seq_q).map(row).collect::<Vec<_>>()
        };
        assert_eq!(matrix(2, 4, QueryOffset::FromEnd), ["1110", "1111"]);
        assert_eq!(matrix(2, 4, QueryOffset::FromStart), ["1000", "1100"]);
        assert_eq!(matrix(2, 4, QueryOffset::At(1)), ["1100", "1110"]);
        assert_eq!(matrix(4, 2, QueryOffset::FromEnd), ["00", "00", "10", "11"]);
        assert_eq!(matrix(4, 2, QueryOffset::FromStart), ["10", "11", "11", "11"]);
        assert_eq!(matrix(4, 2, QueryOffset::At(-1)), ["00", "10", "11", "11"]);
    }
}
