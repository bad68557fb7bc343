//! Masks and score modifications of the open sets, as workloads.

use crate::support::{Dims, Rng};
use crate::workloads::SOFTCAP;
use flashtile::mask::{
    Block, BlockSparse, Covered, Documents, FirstAndLast, Mask, Pair, PrefixLm, Query, Tree, mask_fn,
};
use flashtile::score::{RelativeBias, ScoreMod, score_fn, tanh};
use flashtile::{Attention, TensorRef, alibi_slope};
use std::sync::LazyLock;

/// What a workload adds to plain attention.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Open {
    /// 16 documents of 128 tokens.
    Document,
    /// The same from a closure, covered once.
    DocumentFn,
    /// Documents of 1 to 700 tokens.
    DocumentUneven,
    /// Causal order with two bidirectional ranges of 300.
    Prefix,
    /// Blocks of 128 x 128, a tenth of them kept.
    BlockSparse,
    /// The first 4 keys and a window of 512.
    SinkWindow,
    /// 64 drafts, each the child of a random earlier one.
    Tree,
    /// One of ten runs of 64 keys is visible, by a closure that was covered once.
    FewKeysFn,
    /// The same by a boolean tensor.
    FewKeys,
    /// ALiBi and softcap from closures.
    AlibiFn,
    SoftcapFn,
    /// A table of relative positions.
    Table,
    /// A sink for each head.
    Sinks,
}

type StaticMask = LazyLock<Box<dyn Mask + Send>>;
type StaticScoreMod = LazyLock<Box<dyn ScoreMod + Send>>;

const LEN: usize = 2048;
/// The longest of these sequences.
const LONG: usize = 8192;
const MOST: usize = 128;

static DOCUMENT: StaticMask = LazyLock::new(|| Box::new(Documents::of_lengths(&[128u32; 16]).expect("fits")));
static DOCUMENT_FN: StaticMask = LazyLock::new(|| {
    let same = mask_fn(|pair: Pair| pair.query() / 128 == pair.key() / 128);
    Box::new(Covered::new(same, [1, 1, LEN, LEN], 0).expect("fits"))
});
static DOCUMENT_UNEVEN: StaticMask = LazyLock::new(|| {
    const LENGTHS: [u32; 9] = [1, 700, 20, 411, 3, 290, 64, 500, 59];
    Box::new(Documents::of_lengths(&LENGTHS).expect("fits"))
});
static PREFIX: StaticMask = LazyLock::new(|| Box::new(PrefixLm::new(&[200..500, 1100..1400]).expect("in order")));
static BLOCK_SPARSE: StaticMask = LazyLock::new(|| {
    let mut rng = Rng(9);
    let kept: Vec<bool> = (0..64 * 64).map(|_| rng.one_in(10)).collect();
    Box::new(BlockSparse::new([128, 128], [1, 1, 64, 64], &kept).expect("of the shape"))
});
static SINK_WINDOW: StaticMask = LazyLock::new(|| Box::new(FirstAndLast::new(4, 511)));
static TREE: StaticMask = LazyLock::new(|| {
    let mut rng = Rng(10);
    let parents: Vec<i32> = (0..64).map(|i| rng.below(i + 1) as i32 - 1).collect();
    Box::new(Tree::new(&parents).expect("earlier drafts"))
});
static FEW_KEYS_FN: StaticMask = LazyLock::new(|| {
    let few = mask_fn(|pair: Pair| (pair.key() / 64).is_multiple_of(10));
    Box::new(Covered::new(few, [1, 1, 1, LONG], LONG as isize - 1).expect("fits"))
});
static FEW_KEYS: LazyLock<Vec<bool>> = LazyLock::new(|| (0..LONG).map(|j| (j / 64).is_multiple_of(10)).collect());
static ALIBI_FN: StaticScoreMod = LazyLock::new(|| {
    let slopes: Vec<f32> = (0..8).map(|h| alibi_slope(h, 8)).collect();
    Box::new(score_fn(move |score, pair| score - slopes[pair.head()] * pair.distance().abs() as f32))
});
static SOFTCAP_FN: StaticScoreMod =
    LazyLock::new(|| Box::new(score_fn(|score, _| SOFTCAP * tanh(score * (1.0 / SOFTCAP)))));
static TABLE: LazyLock<Vec<f32>> = LazyLock::new(|| Rng(11).normals(8 * (2 * MOST + 1)));
static RELATIVE: StaticScoreMod = LazyLock::new(|| Box::new(RelativeBias::new(8, MOST, &TABLE).expect("of that size")));
static SINKS: LazyLock<Vec<f32>> = LazyLock::new(|| Rng(12).normals(32));

impl Open {
    fn mask(self) -> Option<&'static dyn Mask> {
        Some(match self {
            Open::Document => &**DOCUMENT,
            Open::DocumentFn => &**DOCUMENT_FN,
            Open::DocumentUneven => &**DOCUMENT_UNEVEN,
            Open::Prefix => &**PREFIX,
            Open::BlockSparse => &**BLOCK_SPARSE,
            Open::SinkWindow => &**SINK_WINDOW,
            Open::Tree => &**TREE,
            Open::FewKeysFn => &**FEW_KEYS_FN,
            _ => return None,
        })
    }

    fn score_mod(self) -> Option<&'static dyn ScoreMod> {
        Some(match self {
            Open::AlibiFn => &**ALIBI_FN,
            Open::SoftcapFn => &**SOFTCAP_FN,
            Open::Table => &**RELATIVE,
            _ => return None,
        })
    }

    pub(crate) fn attention(self) -> Result<Attention<'static>, flashtile::Error> {
        let mut attention = Attention::new();
        if let Some(mask) = self.mask() {
            attention = attention.masked_by(mask);
        }
        if let Some(score_mod) = self.score_mod() {
            attention = attention.modified_by(score_mod);
        }
        Ok(match self {
            Open::Sinks => attention.sinks(&SINKS[..8]),
            Open::FewKeys => attention.mask(TensorRef::from_slice(&FEW_KEYS, [LONG])?),
            _ => attention,
        })
    }

    fn query(dims: &Dims, h: usize, i: usize) -> Query {
        Query::new(0, h, i, dims.seq_kv as isize - dims.seq_q as isize)
    }

    /// The options of query `i` of head `h` alone. A row's mask and bias are leaked: a few rows of each workload are checked.
    pub(crate) fn of_row(self, dims: &Dims, h: usize, i: usize) -> Result<Attention<'static>, flashtile::Error> {
        let row = Self::query(dims, h, i);
        let (keys, attention) = (0..dims.seq_kv, Attention::new());
        if let Some(mask) = self.mask() {
            let sees: Vec<bool> = keys.map(|j| mask.sees(row.with_key(j))).collect();
            return Ok(attention.mask(TensorRef::from_slice(sees.leak(), [dims.seq_kv])?));
        }
        Ok(match self {
            Open::Sinks => attention.sinks(&SINKS[h..=h]),
            Open::AlibiFn | Open::Table => {
                let bias = |j| self.score_mod().map_or(0.0, |own| own.define(0.0, row.with_key(j)) as f32);
                let bias: Vec<f32> = keys.map(bias).collect();
                attention.bias(TensorRef::from_slice(bias.leak(), [dims.seq_kv])?)
            }
            _ => self.attention()?,
        })
    }

    /// Visible pairs of query and key.
    pub(crate) fn pairs(self, dims: &Dims) -> usize {
        let all = Block {
            batch: 0,
            heads: 0..1,
            queries: 0..dims.seq_q,
            offset: dims.seq_kv as isize - dims.seq_q as isize,
            keys: 0..dims.seq_kv,
        };
        let of_head = match (self, self.mask()) {
            (Open::FewKeys, _) => FEW_KEYS.iter().filter(|&&sees| sees).count(),
            (_, Some(mask)) => all.pairs().filter(|&pair| mask.sees(pair)).count(),
            _ => dims.seq_q * dims.seq_kv,
        };
        of_head * dims.batch * dims.heads_q
    }
}
