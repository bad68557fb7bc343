//! The trait of masks that users may write.

#![forbid(unsafe_code)]

use crate::error::Error;
use crate::pair::{Block, Pair, Query};
use crate::score_tile::ScoreTile;
use crate::sequence::{Lengths, QueryOffset, Sequences};
use std::ops::Range;

/// What a mask says about a block of pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cover {
    /// No pair is visible: the block is not computed.
    Skip,
    /// Every pair is visible: the mask is not asked again.
    Full,
    /// Each pair is asked for.
    Partial,
}

/// The sizes of a problem that a mask or score modification is used for.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ProblemSizes<'a> {
    /// The number of sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// The most queries of a sequence.
    pub seq_q: usize,
    /// The most keys of a sequence.
    pub seq_kv: usize,
    pub(crate) sequences: Sequences<'a>,
}

impl ProblemSizes<'_> {
    /// Sequences of one size, with query 0 at `offset`.
    pub fn of_sequences(batch: usize, heads: usize, seq_q: usize, seq_kv: usize, offset: isize) -> Self {
        let query_offset = QueryOffset::At(offset);
        let sequences = Sequences { queries: Lengths::All(seq_q), keys: Lengths::All(seq_kv), query_offset };
        ProblemSizes { batch, heads, seq_q, seq_kv, sequences }
    }

    /// Whether query 0 of every sequence is at key position `offset`.
    pub fn all_at(&self, offset: isize) -> bool {
        self.sequences.distinct(self.batch).all(|b| self.sequences.get(b).offset == offset as i128)
    }
}

/// A mask: which keys each query may see. [`Attention::masked_by`](crate::Attention::masked_by) takes any number of them; a
/// key is visible if all show it.
///
/// [`sees`](Mask::sees) is the definition, and enough. The other functions only save time: they tell which keys need not be
/// computed at all, and which pairs need not be asked for. They must agree with `sees`; [`check_mask`] tests that.
///
/// **A mask that contradicts itself** gives a wrong result, and nothing worse.
///
/// ```
/// use flashtile::Attention;
/// use flashtile::mask::{Mask, Pair};
///
/// /// Every query sees every n-th key, counted back from its own position.
/// struct Strided(i32);
///
/// impl Mask for Strided {
///     fn sees(&self, pair: Pair) -> bool {
///         pair.distance() % self.0 == 0
///     }
/// }
///
/// let attention = Attention::new().causal().masked_by(&Strided(4));
/// # Ok::<(), flashtile::Error>(())
/// ```
pub trait Mask: Sync {
    /// Whether the query may see the key: the definition.
    ///
    /// It may be asked for any pair of the problem, and must not panic.
    fn sees(&self, pair: Pair) -> bool;

    /// A run of keys outside which the query sees none. It may extend past the sequence. The default is every key.
    ///
    /// Work outside the runs of all queries of a block is never done.
    fn span(&self, query: Query) -> Range<isize> {
        let _ = query;
        0..isize::MAX
    }

    /// Whether every query sees its whole [`span`](Mask::span). Then nothing else is asked. The default is no.
    fn is_span(&self) -> bool {
        false
    }

    /// Whether the mask is the same for all heads of a sequence. Then spans are asked for one of them. The default is no.
    fn heads_are_alike(&self) -> bool {
        false
    }

    /// What the mask says about the pairs of a block. The default is [`Cover::Partial`], which is always right.
    ///
    /// It is asked for each tile, some 1 to 256 queries and up to 256 keys, and if the tile is partial, for each 16 keys of it.
    fn cover(&self, block: &Block) -> Cover {
        let _ = block;
        Cover::Partial
    }

    /// Hides what is not visible from a tile. The default asks [`sees`](Mask::sees) for each pair.
    fn hide(&self, tile: &mut ScoreTile<'_>) {
        tile.hide_unless(|pair| self.sees(pair));
    }

    /// Refuses a problem that the mask was not made for. The default takes every problem.
    ///
    /// # Errors
    /// Any, such as [`Error::WrongCount`].
    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        let _ = sizes;
        Ok(())
    }
}

/// Tests that what a mask says agrees: [`span`](Mask::span), [`is_span`](Mask::is_span), [`heads_are_alike`](Mask::heads_are_alike)
/// and [`cover`](Mask::cover) with [`sees`](Mask::sees), for every block of a small problem.
///
/// It takes some `batch * heads * (seq_q * seq_kv)^2` steps.
///
/// * `offset`: the position of query 0
///
/// # Errors
/// What contradicts what, with the first pair; and what [`check`](Mask::check) says of a problem of this size.
///
/// ```
/// use flashtile::mask::{PrefixLm, check_mask};
///
/// check_mask(&PrefixLm::new(&[2..5])?, [1, 2, 7, 9], 2).unwrap();
/// # Ok::<(), flashtile::Error>(())
/// ```
pub fn check_mask(mask: &dyn Mask, [batch, heads, seq_q, seq_kv]: [usize; 4], offset: isize) -> Result<(), String> {
    let sizes = ProblemSizes::of_sequences(batch, heads, seq_q, seq_kv, offset);
    mask.check(&sizes).map_err(|error| error.to_string())?;
    for b in 0..batch {
        let all = Block { batch: b, heads: 0..heads, queries: 0..seq_q, offset, keys: 0..seq_kv };
        check_spans(mask, &all)?;
        for block in sub_blocks(&all) {
            check_cover(mask, &block)?;
        }
    }
    Ok(())
}

fn check_spans(mask: &dyn Mask, all: &Block) -> Result<(), String> {
    for row in all.rows() {
        let span = mask.span(row);
        let first = Query { head: 0, ..row };
        if mask.heads_are_alike() && mask.span(first) != span {
            return Err(format!("{row:?} and {first:?} have other spans, but `heads_are_alike` is true"));
        }
        for pair in all.keys.clone().map(|key| row.with_key(key)) {
            let (sees, inside) = (mask.sees(pair), span.contains(&(pair.key() as isize)));
            if mask.heads_are_alike() && mask.sees(first.with_key(pair.key())) != sees {
                return Err(format!("{pair:?} is not as in head 0, but `heads_are_alike` is true"));
            }
            if sees && !inside {
                return Err(format!("{pair:?} is visible, but not in the query's span {span:?}"));
            }
            if !sees && inside && mask.is_span() {
                return Err(format!("{pair:?} is in the query's span {span:?}, and hidden, but `is_span` is true"));
            }
        }
    }
    Ok(())
}

fn check_cover(mask: &dyn Mask, block: &Block) -> Result<(), String> {
    let refuted_by = match mask.cover(block) {
        Cover::Partial => None,
        Cover::Skip => block.pairs().find(|&pair| mask.sees(pair)),
        Cover::Full => block.pairs().find(|&pair| !mask.sees(pair)),
    };
    match refuted_by {
        None => Ok(()),
        Some(pair) => Err(format!("{block:?} is {:?}, but {pair:?} is not", mask.cover(block))),
    }
}

/// Every run of heads, queries and keys.
fn sub_blocks(all: &Block) -> impl Iterator<Item = Block> {
    runs(all.heads.len()).flat_map(move |heads| {
        runs(all.queries.len()).flat_map(move |queries| {
            let heads = heads.clone();
            runs(all.keys.len()).map(move |keys| Block {
                heads: heads.clone(),
                queries: queries.clone(),
                keys,
                ..all.clone()
            })
        })
    })
}

fn runs(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).flat_map(move |start| (start + 1..=len).map(move |end| start..end))
}

/// A user's mask among the options.
#[derive(Clone, Copy)]
pub(crate) struct OpenMask<'a>(pub(crate) &'a dyn Mask);

impl std::fmt::Debug for OpenMask<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("mask")
    }
}
