//! Masks: the keys that each query may see.
//!
//! A mask implements [`Mask`]: ready ones are here, one file each, and users write their own, or make one of a function with
//! [`mask_fn`]. [`Attention::masked_by`](crate::Attention::masked_by) takes them. A key is visible if every mask shows it, causal
//! order, windows, key lengths and the mask tensor included.
//!
//! | mask | shows | like |
//! |---|---|---|
//! | [`Documents`] | the keys of the query's own document | packed sequences, segment ids |
//! | [`PrefixLm`] | earlier keys, and whole ranges to the queries in them | prefix language models, images in a prompt |
//! | [`Chunked`] | the keys of the query's own chunk | Llama 4's local layers, with causal order |
//! | [`FirstAndLast`] | the first keys, and a window | StreamingLLM |
//! | [`Tree`] | earlier keys, and a draft's ancestors | speculative decoding |
//! | [`BlockSparse`] | whole blocks | block-sparse attention |
//! | [`KeyStarts`] | the keys from each sequence's first one | left padding |
//! | [`mask_fn`], [`Covered`] | what a function says; the same, with blocks looked at once | FlexAttention's `mask_mod`, `BlockMask` |

// What follows is for the authors of this crate.
//
// A mask says three things, and tests check that they agree:
// * `sees`: is the pair visible? It is the definition.
// * `span`: outside which run of keys does a query see none? The intersection of all masks' spans is the query's span. All work
//   that is never started is decided by spans.
// * `cover`: is a block of pairs skipped, full or partial? It is asked inside the span, for masks whose spans have holes.
//
// Causal order, windows and key lengths are masks of the same kind, by position alone (`by_position.rs`). They are asked
// without a call by address, and their positions may be any number. The mask tensor is read only inside the span.

#![forbid(unsafe_code)]

mod block_sparse;
mod by_position;
mod causal;
mod chunked;
pub(crate) mod cover;
mod covered;
mod documents;
mod first_and_last;
mod function;
mod held;
mod key_starts;
mod lengths;
mod open;
mod prefix_lm;
mod tensor;
mod tree;
mod window;

pub use crate::pair::{Block, Pair, Query};
pub use crate::score_tile::ScoreTile;
pub use block_sparse::BlockSparse;
pub(crate) use causal::Causal;
pub use chunked::Chunked;
pub use covered::Covered;
pub use documents::Documents;
pub use first_and_last::FirstAndLast;
pub use function::{MaskFn, mask_fn};
pub(crate) use held::Held;
pub use key_starts::KeyStarts;
pub(crate) use open::OpenMask;
pub use open::{Cover, Mask, ProblemSizes, check_mask};
pub use prefix_lm::PrefixLm;
pub(crate) use tensor::MaskTensor;
pub use tree::Tree;
pub(crate) use window::Window;

use crate::error::Error;
use crate::sequence::Sequence;
use by_position::PositionMask;
use lengths::Lengths;
use std::ops::Range;

/// The masks of a problem: the intersection of these and of each sequence's length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Masks<'a> {
    pub(crate) causal: Option<Causal>,
    pub(crate) window: Option<Window>,
    pub(crate) tensor: Option<MaskTensor<'a>>,
    /// The tokens that the keys' cache still holds.
    pub(crate) held: Option<Held<'a>>,
    pub(crate) open: &'a [OpenMask<'a>],
}

impl Masks<'_> {
    /// The masks that are asked through the trait.
    fn dynamic(&self) -> impl Iterator<Item = &dyn Mask> {
        let held = self.held.iter().map(|held| held as &dyn Mask);
        self.open.iter().map(|OpenMask(mask)| *mask).chain(held)
    }

    /// Whether there are masks that are asked through the trait.
    pub(crate) fn has_dynamic(&self) -> bool {
        !self.open.is_empty() || self.held.is_some()
    }

    /// The keys of sequence `b` that its cache has lost: no query sees them. The end may be before the start.
    pub(crate) fn lost(&self, b: usize) -> Range<usize> {
        self.held.map_or(0..0, |held| held.lost(b))
    }

    /// Whether query `i` of head `h` may see key `j` of a sequence: the definition.
    pub(crate) fn sees(&self, sequence: &Sequence, h: usize, i: usize, j: usize) -> bool {
        let (p, key) = (sequence.position(i), j as i128);
        let (row, column) = sequence.in_tensors([h, i], j);
        Lengths { length: sequence.keys }.sees(p, key)
            && self.causal.is_none_or(|causal| causal.sees(p, key))
            && self.window.is_none_or(|window| window.sees(p, key))
            && self.tensor.is_none_or(|tensor| tensor.sees(row, column))
            && self.dynamic().all(|mask| mask.sees(sequence.query(h, i).with_key(j)))
    }

    /// Whether the queries of one sequence may have different spans.
    pub(crate) fn spans_differ(&self) -> bool {
        self.causal.is_some() || self.window.is_some() || self.has_dynamic()
    }

    /// The span of query `i` of head `h`: the keys that it may see without the tensor and the holes of masks.
    pub(crate) fn span(&self, sequence: &Sequence, h: usize, i: usize) -> Range<usize> {
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
        for mask in self.dynamic() {
            let Range { start, end } = mask.span(sequence.query(h, i));
            span = intersection(span, start as i128..end as i128);
        }
        // The span is inside 0..length, so the conversion is exact. An empty span is 0..0.
        if span.is_empty() { 0..0 } else { span.start as usize..span.end as usize }
    }

    /// Whether users' masks are the same for all heads of a sequence.
    pub(crate) fn heads_are_alike(&self) -> bool {
        self.dynamic().all(|mask| mask.heads_are_alike())
    }

    /// The masks whose spans have holes.
    pub(crate) fn with_holes(&self) -> impl Iterator<Item = &dyn Mask> {
        self.dynamic().filter(|mask| !mask.is_span())
    }

    /// Whether a mask hides all pairs of a block from all queries.
    pub(crate) fn skips(&self, block: &Block) -> bool {
        self.with_holes().any(|mask| mask.cover(block) == Cover::Skip)
    }
}

fn intersection(a: Range<i128>, b: Range<i128>) -> Range<i128> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// A list of `len` times `value`, or an error if there is no memory for it.
fn filled<T: Clone>(what: &'static str, value: T, len: Option<usize>) -> Result<Vec<T>, Error> {
    let too_large = Error::TooLarge { what };
    let Some(len) = len else { return Err(too_large) };
    let mut list = Vec::new();
    list.try_reserve_exact(len).map_err(|_| too_large)?;
    list.resize(len, value);
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::cover::{SpanCover, union};
    use super::*;
    use crate::sequence::{Lengths, QueryOffset, Sequences};

    const MOST: usize = 6;

    /// Every mask by position on every shape up to [`MOST`] queries and keys.
    fn for_every_mask(mut check: impl FnMut(Masks<'_>, Sequences<'_>, [usize; 2])) {
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
                            let keys = length.map(|length| Lengths::First((&lengths[length]).into()));
                            let (queries, keys) = (Lengths::All(seq_q), keys.unwrap_or(Lengths::All(seq_kv)));
                            let window = (left, right) != (None, None);
                            let window = window.then_some(Window { left, right });
                            let mask = Masks { causal: causal.then_some(Causal), window, ..Masks::default() };
                            check(mask, Sequences { queries, keys, query_offset }, [seq_q, seq_kv]);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_span_holds_the_keys_that_are_seen() {
        for_every_mask(|mask, sequences, [seq_q, seq_kv]| {
            let sequence = sequences.get(0);
            for i in 0..seq_q {
                let span = mask.span(&sequence, 0, i);
                assert!(span.end <= seq_kv, "{mask:?}, {sequence:?}, query {i}: {span:?}");
                assert!(!span.is_empty() || span == (0..0), "{mask:?}, {sequence:?}, query {i}: {span:?}");
                for j in 0..seq_kv {
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
        for_every_mask(|mask, sequences, [seq_q, seq_kv]| {
            let sequence = sequences.get(0);
            // Every run of queries from the first, and every run of keys.
            for queries in 1..=seq_q.min(3) {
                let spans = || (0..queries).map(|i| mask.span(&sequence, 0, i));
                let seen = |j: usize| (0..queries).filter(|&i| mask.sees(&sequence, 0, i, j)).count();
                let first = (0..seq_kv).find(|&j| seen(j) > 0);
                let last = (0..seq_kv).rfind(|&j| seen(j) > 0);
                let brute = first.zip(last).map_or(0..0, |(first, last)| first..last + 1);
                assert_eq!(union(spans()), brute, "{mask:?}, {sequence:?}, {queries} queries");
                let all = || (0..seq_kv).filter(|&j| seen(j) == queries);
                let brute = all().next().zip(all().next_back()).map_or(0..0, |(first, last)| first..last + 1);
                assert_eq!(SpanCover::new(spans()).full, brute, "{mask:?}, {sequence:?}, {queries} queries");
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
            let mask = Masks { causal: Some(Causal), ..Masks::default() };
            let sequence = Sequences { queries: Lengths::All(seq_q), keys: Lengths::All(seq_kv), query_offset }.get(0);
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
