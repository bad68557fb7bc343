//! The input of a task: rows at strides, and numbers. It takes no tensor apart by batch and head.

#![forbid(unsafe_code)]

use crate::kv::rows::KeyRows;
use crate::mask::Masks;
use crate::pair::Block;
use crate::score::{ScoreMods, Unit};
use crate::sequence::Sequence;
use crate::simd::Isa;
use crate::tensor::group::{AnyGroupRows, GroupRows};
use std::fmt;
use std::ops::Range;

/// The operands that scores are formed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operands {
    /// Elements, widened to f32.
    F32,
    /// Pairs of neighbouring bf16 elements, in both queries and keys: each lane of an instruction adds two products
    /// ([`Level::Avx512Bf16`]). The products are exact, the sums are f32.
    ///
    /// [`Level::Avx512Bf16`]: crate::Level::Avx512Bf16
    Bf16Pairs,
}

impl fmt::Display for Operands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Operands::F32 => "f32",
            Operands::Bf16Pairs => "bf16 pairs",
        })
    }
}

/// Query rows of one key/value head, and all keys and values of that head.
///
/// Row `n` here is row `first_row + n` of the group of query heads that share the key/value head: query `r / group` of head
/// `r % group` (see [`GroupRows`]).
#[derive(Clone, Debug)]
pub(crate) struct TaskInput<'a> {
    pub(crate) isa: Isa,
    pub(crate) operands: Operands,
    /// The unit of the scores while they are modified, and the unit that the softmax takes.
    pub(crate) unit: Unit,
    pub(crate) last_unit: Unit,
    /// The factor of dot products. It gives scores in that unit, or with a softcap, in units of the cap.
    pub(crate) factor: f32,
    /// Keys of one tile. Tiles start at multiples of it.
    pub(crate) tile_keys: usize,
    /// The queries, `[rows][head_dim]`.
    pub(crate) queries: AnyGroupRows<'a>,
    /// `[keys][head_dim]`.
    pub(crate) keys: KeyRows<'a>,
    /// `[keys][value_dim]`.
    pub(crate) values: KeyRows<'a>,
    /// The smallest run of keys that holds the span of every row.
    pub(crate) span: Range<usize>,
    pub(crate) sequence: Sequence,
    /// The head of row 0 of the group.
    pub(crate) first_head: usize,
    /// Query heads that share the key/value head.
    pub(crate) group: usize,
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    pub(crate) masks: &'a Masks<'a>,
    pub(crate) score_mods: &'a ScoreMods<'a>,
    /// The rows of a boolean mask, `[rows][seq_kv]`.
    pub(crate) mask_rows: Option<GroupRows<'a, u8>>,
    /// The rows of an additive bias, `[rows][seq_kv]`.
    pub(crate) bias_rows: Option<AnyGroupRows<'a>>,
}

impl<'a> TaskInput<'a> {
    /// Elements of a query and of a key.
    pub(crate) fn head_dim(&self) -> usize {
        self.keys.cols()
    }

    pub(crate) fn value_dim(&self) -> usize {
        self.values.cols()
    }

    /// The query head and the query of row `n`.
    #[inline]
    pub(crate) fn head_and_query(&self, n: usize) -> (usize, usize) {
        let r = self.first_row + n;
        // A division takes longer than the rest of finding a row, and most groups have one head.
        match self.group {
            1 => (self.first_head, r),
            group => (self.first_head + r % group, r / group),
        }
    }

    /// The span of row `n`: the keys that it sees by its position.
    pub(crate) fn row_span(&self, n: usize) -> Range<usize> {
        let (head, query) = self.head_and_query(n);
        self.masks.span(&self.sequence, head, query)
    }

    /// The keys that a cache has lost: no row sees them.
    pub(crate) fn lost_keys(&self) -> Range<usize> {
        self.masks.lost(self.sequence.batch)
    }

    /// The smallest block of pairs that holds those of `rows` and `keys`.
    pub(crate) fn block(&self, rows: Range<usize>, keys: Range<usize>) -> Block {
        let rows = self.first_row + rows.start..self.first_row + rows.end;
        let queries = rows.start / self.group..rows.end.div_ceil(self.group);
        let heads = match queries.len() {
            1 => rows.start % self.group..(rows.end - 1) % self.group + 1,
            _ => 0..self.group,
        };
        Block {
            batch: self.sequence.batch,
            heads: self.first_head + heads.start..self.first_head + heads.end,
            queries,
            offset: self.sequence.offset as isize, // positions are within `MAX_INDEX` where a mask is asked for blocks
            keys,
        }
    }

    /// The sink of row `n`.
    pub(crate) fn sink(&self, n: usize) -> Option<f32> {
        self.score_mods.sinks.map(|sinks| sinks.of_head(self.head_and_query(n).0))
    }

    /// The key position of row `n`.
    pub(crate) fn position(&self, n: usize) -> i128 {
        self.sequence.position(self.head_and_query(n).1)
    }

    /// The ALiBi slope of row `n`; 0 without ALiBi.
    pub(crate) fn slope(&self, n: usize) -> f32 {
        self.score_mods.alibi.map_or(0.0, |alibi| alibi.slope(self.sequence.batch, self.head_and_query(n).0))
    }

    /// Whether there is a boolean mask or an additive bias.
    pub(crate) fn has_score_tensors(&self) -> bool {
        self.mask_rows.is_some() || self.bias_rows.is_some()
    }

    /// Whether scores are modified, other than by positions.
    pub(crate) fn has_score_mods(&self) -> bool {
        self.score_mods.softcap.is_some() || self.score_mods.alibi.is_some() || self.has_score_tensors()
    }

    /// Whether `other` has the same keys and values.
    pub(crate) fn shares_keys_with(&self, other: &TaskInput<'_>) -> bool {
        (self.sequence.batch, self.first_head) == (other.sequence.batch, other.first_head)
    }

    /// The same task with scores in unit `unit`.
    pub(crate) fn in_unit(mut self, unit: Unit, scale: f32) -> Self {
        self.unit = self.score_mods.unit(unit);
        self.last_unit = unit;
        self.factor = self.score_mods.query_factor(scale, unit);
        self
    }
}

/// A task, and the part of its keys that is computed.
#[derive(Clone, Debug)]
pub(crate) struct Piece<'t, 'a> {
    pub(crate) task: &'t TaskInput<'a>,
    pub(crate) keys: Range<usize>,
}
