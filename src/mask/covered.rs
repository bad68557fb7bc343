//! A mask with what it says about each block, found once.

#![forbid(unsafe_code)]

use super::open::{Cover, Mask, ProblemSizes};
use crate::error::{Error, check_count};
use crate::pair::{Block, Pair, Query};
use crate::score_tile::ScoreTile;
use std::ops::Range;

/// Queries and keys of a block. A panel has 16 or 32 queries, a tile 64 to 256 keys.
const QUERIES: usize = 32;
const KEYS: usize = 64;

/// A mask that was asked for all pairs once, so that blocks without a visible pair are skipped, and those without a hidden one
/// are not asked for, in every call. (FlexAttention calls this a block mask.) Keep it, and use it in every layer.
///
/// It is made for sizes and positions: a call with other ones is refused.
///
/// ```
/// use flashtile::Attention;
/// use flashtile::mask::{Covered, mask_fn};
/// use ndarray::Array4;
///
/// let document = |token: usize| token / 100;
/// let mask = mask_fn(move |pair| document(pair.query()) == document(pair.key()));
/// let mask = Covered::new(mask, [1, 1, 300, 300], 0)?; // for every batch and head, 300 queries from position 0, 300 keys
/// let x = Array4::from_elem((2, 4, 300, 16), 0.5f32);
/// let out = Attention::new().masked_by(&mask).run(&x, &x, &x)?;
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone)]
pub struct Covered<M> {
    mask: M,
    /// `[batch, heads, seq_q, seq_kv]`; a batch or heads of 1 stand for all.
    shape: [usize; 4],
    offset: isize,
    /// `[batch][heads][blocks of queries][blocks of keys]`.
    covers: Vec<Cover>,
    /// The first visible block of keys and the one after the last, in keys: `[batch][heads][blocks of queries]`.
    spans: Vec<Range<isize>>,
}

impl<M: Mask> Covered<M> {
    /// Asks `mask` for every pair: a nanosecond or two for each.
    ///
    /// * `shape`: `[batch, heads, seq_q, seq_kv]`; a batch or heads of 1 stand for all
    /// * `offset`: the position of query 0, as [`QueryOffset`](crate::QueryOffset) sets it: `seq_kv - seq_q` by default
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there is no memory for one byte for each block of 32 queries and 64 keys; what [`Mask::check`] of `mask`
    /// says of a problem of this size.
    pub fn new(mask: M, shape: [usize; 4], offset: isize) -> Result<Self, Error> {
        let [batch, heads, seq_q, seq_kv] = shape;
        mask.check(&ProblemSizes::of_sequences(batch, heads, seq_q, seq_kv, offset))?;
        let rows = batch.saturating_mul(heads).saturating_mul(seq_q.div_ceil(QUERIES));
        let (mut covers, mut spans) = (Vec::new(), Vec::new());
        let too_large = |_| Error::TooLarge { what: "the blocks of a mask" };
        covers.try_reserve_exact(rows.saturating_mul(seq_kv.div_ceil(KEYS))).map_err(too_large)?;
        spans.try_reserve_exact(rows).map_err(too_large)?;
        let batch = if rows == 0 { 0 } else { batch }; // without rows the number of batches is not limited
        for (b, head) in (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head))) {
            for queries in cut(seq_q, QUERIES) {
                let mut span = 0..0;
                for keys in cut(seq_kv, KEYS) {
                    let block =
                        Block { batch: b, heads: head..head + 1, queries: queries.clone(), offset, keys: keys.clone() };
                    let cover = cover(&mask, &block);
                    if cover != Cover::Skip {
                        let start = if span.is_empty() { keys.start as isize } else { span.start };
                        span = start..keys.end as isize;
                    }
                    covers.push(cover);
                }
                spans.push(span);
            }
        }
        Ok(Covered { mask, shape, offset, covers, spans })
    }

    /// The part of blocks that are skipped, full and partial; 0 if there are no blocks.
    pub fn fractions(&self) -> [f64; 3] {
        let count = self.covers.len().max(1) as f64;
        let part = |cover| self.covers.iter().filter(|&&own| own == cover).count() as f64 / count;
        [Cover::Skip, Cover::Full, Cover::Partial].map(part)
    }

    /// The row of blocks of a block of queries.
    fn row(&self, batch: usize, head: usize, block: usize) -> usize {
        let [all_batches, all_heads, seq_q, _] = self.shape;
        let own = |n: usize, of: usize| if of == 1 { 0 } else { n };
        (own(batch, all_batches) * all_heads + own(head, all_heads)) * seq_q.div_ceil(QUERIES) + block
    }
}

fn cut(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..(start + size).min(len))
}

/// What `mask` says about the pairs of a block, pair by pair if need be.
fn cover(mask: &impl Mask, block: &Block) -> Cover {
    let said = mask.cover(block);
    if said != Cover::Partial {
        return said;
    }
    let mut pairs = block.pairs().map(|pair| mask.sees(pair));
    match pairs.next() {
        Some(true) if pairs.all(|sees| sees) => Cover::Full,
        Some(false) if pairs.all(|sees| !sees) => Cover::Skip,
        _ => Cover::Partial,
    }
}

impl<M: Mask> Mask for Covered<M> {
    #[inline]
    fn sees(&self, pair: Pair) -> bool {
        self.mask.sees(pair)
    }

    fn span(&self, query: Query) -> Range<isize> {
        self.spans[self.row(query.batch(), query.head(), query.query() / QUERIES)].clone()
    }

    fn heads_are_alike(&self) -> bool {
        self.shape[1] == 1
    }

    fn cover(&self, block: &Block) -> Cover {
        let of_row = self.shape[3].div_ceil(KEYS);
        let keys = block.keys.start / KEYS..block.keys.end.div_ceil(KEYS);
        let mut said = None;
        for head in block.heads.clone() {
            for queries in block.queries.start / QUERIES..block.queries.end.div_ceil(QUERIES) {
                let row = self.row(block.batch, head, queries) * of_row;
                for &cover in &self.covers[row + keys.start..row + keys.end] {
                    if cover == Cover::Partial || said.is_some_and(|said| said != cover) {
                        return Cover::Partial;
                    }
                    said = Some(cover);
                }
            }
            if self.shape[1] == 1 {
                break; // all heads are alike
            }
        }
        said.unwrap_or(Cover::Partial)
    }

    fn hide(&self, tile: &mut ScoreTile<'_>) {
        self.mask.hide(tile);
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        let [batch, heads, seq_q, seq_kv] = self.shape;
        let check = |what, own: usize, of: usize| if own == 1 { Ok(()) } else { check_count(what, own, of) };
        check("sequences of a covered mask", batch, sizes.batch)?;
        check("heads of a covered mask", heads, sizes.heads)?;
        check_count("queries of a covered mask", seq_q, sizes.seq_q)?;
        check_count("keys of a covered mask", seq_kv, sizes.seq_kv)?;
        if !sizes.all_at(self.offset) {
            return Err(Error::InvalidMask { reason: "a covered mask was made for other query offsets" });
        }
        self.mask.check(sizes)
    }
}
