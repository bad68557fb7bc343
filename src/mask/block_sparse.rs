//! Block-sparse masks.

#![forbid(unsafe_code)]

use super::open::{Cover, Mask, ProblemSizes};
use crate::error::{Error, check_count};
use crate::pair::{Block, Pair};

/// Blocks of queries and keys that are visible or hidden as a whole.
///
/// ```text
/// blocks of 2 x 2, kept 1 0 / 0 1
/// 1 1 0 0
/// 1 1 0 0
/// 0 0 1 1
/// 0 0 1 1
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSparse {
    /// `[batch, heads, blocks of queries, blocks of keys]`; a batch or heads of 1 stand for all.
    shape: [usize; 4],
    block: [usize; 2],
    kept: Vec<bool>,
}

impl BlockSparse {
    /// The blocks that are visible, as a dense array.
    ///
    /// * `block`: the queries and the keys of a block
    /// * `kept`: `[batch, heads, ceil(seq_q / block[0]), ceil(seq_kv / block[1])]`, row by row; a batch or heads of 1 stand for
    ///   all
    ///
    /// # Errors
    /// [`Error::InvalidMask`] if a block has no queries or keys, [`Error::WrongCount`] if `kept` does not have the shape.
    pub fn new(block: [usize; 2], shape: [usize; 4], kept: &[bool]) -> Result<Self, Error> {
        if block.contains(&0) {
            return Err(Error::InvalidMask { reason: "blocks of a BlockSparse have no queries or no keys" });
        }
        let blocks = shape.iter().fold(1, |n: usize, &size| n.saturating_mul(size));
        check_count("blocks of a BlockSparse", kept.len(), blocks)?;
        Ok(BlockSparse { shape, block, kept: kept.to_vec() })
    }

    /// The blocks that are visible, as compressed rows (CSR), for every batch and head: row n keeps the blocks of keys
    /// `columns[starts[n]..starts[n + 1]]`.
    ///
    /// * `block`: the queries and the keys of a block
    /// * `key_blocks`: `ceil(seq_kv / block[1])`
    ///
    /// # Errors
    /// [`Error::InvalidMask`] if starts are not ascending, or reach past the columns, or a column is not below `key_blocks`;
    /// [`Error::TooLarge`] if there is no memory for a byte for each block.
    pub fn from_rows(block: [usize; 2], key_blocks: usize, starts: &[usize], columns: &[usize]) -> Result<Self, Error> {
        let rows = starts.len().saturating_sub(1);
        let invalid = Error::InvalidMask { reason: "compressed rows of a BlockSparse don't fit together" };
        let ascending = starts.windows(2).all(|pair| pair[0] <= pair[1]);
        let fits = ascending && starts.last().is_none_or(|&end| end <= columns.len());
        if !fits || columns.iter().any(|&column| column >= key_blocks) {
            return Err(invalid);
        }
        let mut kept = super::filled("the blocks of a BlockSparse", false, rows.checked_mul(key_blocks))?;
        for (n, row) in starts.windows(2).enumerate() {
            columns[row[0]..row[1]].iter().for_each(|column| kept[n * key_blocks + column] = true);
        }
        Self::new(block, [1, 1, rows, key_blocks], &kept)
    }

    /// Whether the blocks of a batch and head are kept: from query block `q` and key block `k`.
    fn kept(&self, batch: usize, head: usize, q: usize, k: usize) -> bool {
        let [batches, heads, rows, columns] = self.shape;
        let own = |n: usize, of: usize| if of == 1 { 0 } else { n };
        self.kept[((own(batch, batches) * heads + own(head, heads)) * rows + q) * columns + k]
    }
}

impl Mask for BlockSparse {
    #[inline]
    fn sees(&self, pair: Pair) -> bool {
        self.kept(pair.batch(), pair.head(), pair.query() / self.block[0], pair.key() / self.block[1])
    }

    fn heads_are_alike(&self) -> bool {
        self.shape[1] == 1
    }

    fn cover(&self, block: &Block) -> Cover {
        let [q, k] = self.block;
        let mut said = None;
        let heads = if self.shape[1] == 1 { 0..block.heads.len().min(1) } else { block.heads.clone() };
        for head in heads {
            for q in block.queries.start / q..block.queries.end.div_ceil(q) {
                for k in block.keys.start / k..block.keys.end.div_ceil(k) {
                    let cover = if self.kept(block.batch, head, q, k) { Cover::Full } else { Cover::Skip };
                    if *said.get_or_insert(cover) != cover {
                        return Cover::Partial;
                    }
                }
            }
        }
        said.unwrap_or(Cover::Partial)
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        let [batch, heads, rows, columns] = self.shape;
        let check = |what, own: usize, of: usize| if own == 1 { Ok(()) } else { check_count(what, own, of) };
        check("sequences of a BlockSparse", batch, sizes.batch)?;
        check("heads of a BlockSparse", heads, sizes.heads)?;
        check_count("blocks of queries", rows, sizes.seq_q.div_ceil(self.block[0]))?;
        check_count("blocks of keys", columns, sizes.seq_kv.div_ceil(self.block[1]))
    }
}
