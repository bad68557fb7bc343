//! Random masks and score modifications of the open sets, as a part of a problem.

use super::{Dims, Rng};
use flashtile::mask::{
    Block, BlockSparse, Chunked, Cover, Covered, Documents, FirstAndLast, KeyStarts, Mask, Pair, PrefixLm, Query,
    ScoreTile, Tree, mask_fn,
};
use flashtile::score::{RelativeBias, ScoreMod};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A mask, with the batch, head and query of the whole problem that its first ones are.
#[derive(Clone)]
pub struct OwnedMask {
    name: &'static str,
    mask: Arc<dyn Mask + Send>,
    first: [usize; 3],
}

impl fmt::Debug for OwnedMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl OwnedMask {
    pub fn new(name: &'static str, mask: impl Mask + Send + 'static) -> Self {
        OwnedMask { name, mask: Arc::new(mask), first: [0; 3] }
    }

    /// The mask of a part of the problem.
    pub fn part(&self, first: [usize; 3]) -> Self {
        OwnedMask { first: std::array::from_fn(|n| self.first[n] + first[n]), ..self.clone() }
    }

    /// Query 0 of the part is query i of the whole: the positions stay.
    fn whole(&self, query: Query) -> Query {
        let [b, h, i] = self.first;
        let offset = query.position() - query.query() as isize - i as isize;
        Query::new(query.batch() + b, query.head() + h, query.query() + i, offset)
    }
}

impl Mask for OwnedMask {
    fn sees(&self, pair: Pair) -> bool {
        let query = Query::new(pair.batch(), pair.head(), pair.query(), pair.position() - pair.query() as isize);
        self.mask.sees(self.whole(query).with_key(pair.key()))
    }

    fn span(&self, query: Query) -> Range<isize> {
        self.mask.span(self.whole(query))
    }

    fn is_span(&self) -> bool {
        self.mask.is_span()
    }

    fn heads_are_alike(&self) -> bool {
        self.mask.heads_are_alike()
    }

    fn cover(&self, block: &Block) -> Cover {
        let [b, h, i] = self.first;
        let shift = |range: &Range<usize>, by: usize| range.start + by..range.end + by;
        self.mask.cover(&Block {
            batch: block.batch + b,
            heads: shift(&block.heads, h),
            queries: shift(&block.queries, i),
            offset: block.offset - i as isize,
            keys: block.keys.clone(),
        })
    }

    fn hide(&self, tile: &mut ScoreTile<'_>) {
        match self.first {
            [0, 0, 0] => self.mask.hide(tile),
            _ => tile.hide_unless(|pair| self.sees(pair)),
        }
    }
}

/// Kinds of [`ready_mask`].
pub const READY_MASKS: usize = 8;

/// A random mask of one of the kinds of `src/mask/` that are ready to use.
pub fn ready_mask(kind: usize, rng: &mut Rng, dims: &Dims) -> OwnedMask {
    let Dims { batch, heads_q, seq_q, seq_kv, .. } = *dims;
    let documents = |rng: &mut Rng, len: usize| -> Vec<u32> { (0..len).map(|_| rng.below(4) as u32).collect() };
    match kind {
        0 => {
            let (mut q, mut k) = (documents(rng, seq_q), documents(rng, seq_kv));
            q.sort_unstable();
            k.sort_unstable();
            OwnedMask::new("documents in order", Documents::new(&q, &k))
        }
        1 => {
            let (q, k) = (documents(rng, batch * seq_q), documents(rng, batch * seq_kv));
            OwnedMask::new("documents", Documents::per_sequence(batch.max(1), &q, &k).expect("rows of one length"))
        }
        2 => {
            let (a, b) = (rng.below(seq_kv + 1), rng.below(9));
            let ranges = [a..a + b, a + b + 1..a + 2 * b + 1];
            if rng.one_in(2) {
                let lists: Vec<_> = (0..batch).map(|b| &ranges[b % 3..]).collect();
                return OwnedMask::new("prefixes", PrefixLm::per_sequence(&lists).expect("in order"));
            }
            OwnedMask::new("prefix", PrefixLm::new(&ranges).expect("in order"))
        }
        3 => OwnedMask::new("chunks", Chunked::new(1 + rng.below(seq_kv + 3))),
        4 => OwnedMask::new("first and last", FirstAndLast::new(rng.below(9), rng.below(seq_kv + 1))),
        5 => {
            let trees = if rng.one_in(2) { batch.max(1) } else { 1 };
            let parent = |i: usize| rng.below(i % seq_q + 1) as i32 - 1;
            let parents: Vec<i32> = (0..trees * seq_q).map(parent).collect();
            OwnedMask::new("tree", Tree::per_sequence(trees, &parents).expect("earlier drafts"))
        }
        6 => {
            let block = [1 + rng.below(40), 1 + rng.below(70)];
            let shape = [1, heads_q, seq_q.div_ceil(block[0]), seq_kv.div_ceil(block[1])];
            let kept: Vec<bool> = (0..shape.iter().product()).map(|_| rng.one_in(2)).collect();
            OwnedMask::new("blocks", BlockSparse::new(block, shape, &kept).expect("of the shape"))
        }
        _ => {
            let starts: Vec<i64> = (0..batch).map(|_| rng.below(seq_kv + 2) as i64 - 1).collect();
            let starts: &'static [i64] = starts.leak(); // a few bytes in each of some problems
            OwnedMask::new("key starts", KeyStarts::new(starts))
        }
    }
}

/// Three ready masks of any kinds, that intersect.
pub fn three_ready_masks(rng: &mut Rng, dims: &Dims) -> Vec<OwnedMask> {
    (0..3).map(|_| ready_mask(rng.below(READY_MASKS), rng, dims)).collect()
}

/// A mask of any kind. `offset` is the position of query 0 if all batches have the same.
pub fn mask(rng: &mut Rng, dims: &Dims, offset: Option<isize>) -> OwnedMask {
    let Dims { batch, heads_q, seq_q, seq_kv, .. } = *dims;
    match rng.below(READY_MASKS + 2) {
        kind if kind < READY_MASKS => ready_mask(kind, rng, dims),
        _ => {
            let (a, b) = (1 + rng.below(5), 1 + rng.below(3));
            let function = mask_fn(move |pair: Pair| {
                !(pair.query() / 7 + pair.key() / 50 + pair.head() / b + pair.batch()).is_multiple_of(a)
                    || pair.distance() == 0
            });
            match offset {
                Some(offset) if rng.one_in(2) => {
                    let covered = Covered::new(function, [batch, heads_q, seq_q, seq_kv], offset);
                    OwnedMask::new("function, covered", covered.expect("small"))
                }
                _ => OwnedMask::new("function", function),
            }
        }
    }
}

/// `slope * score + table[h][distance]`: what bounds its error.
#[derive(Clone)]
pub struct OwnedScoreMod {
    pub factor: f64,
    bias: Arc<dyn Fn(Pair) -> f64 + Send + Sync>,
    score_mod: Arc<dyn ScoreMod + Send>,
    /// The head of the whole problem that head 0 is.
    first_head: usize,
}

impl fmt::Debug for OwnedScoreMod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "score times {} plus a bias", self.factor)
    }
}

impl OwnedScoreMod {
    /// The score modification of a part of the problem. (None of these knows batch or query.)
    pub fn part(&self, first_head: usize) -> Self {
        OwnedScoreMod { first_head: self.first_head + first_head, ..self.clone() }
    }

    fn whole(&self, pair: Pair) -> Pair {
        let offset = pair.position() - pair.query() as isize;
        Query::new(pair.batch(), pair.head() + self.first_head, pair.query(), offset).with_key(pair.key())
    }

    /// What is added to the score.
    pub fn bias(&self, pair: Pair) -> f64 {
        (self.bias)(self.whole(pair))
    }
}

impl ScoreMod for OwnedScoreMod {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        self.score_mod.define(score, self.whole(pair))
    }

    fn modify(&self, tile: &mut ScoreTile<'_>) {
        match self.first_head {
            0 => self.score_mod.modify(tile),
            _ => tile.modify(|score, pair| self.score_mod.apply(score, self.whole(pair))),
        }
    }
}

/// `factor * score - slope * |distance|`.
#[derive(Clone, Copy)]
struct Linear {
    factor: f32,
    slope: f32,
}

impl ScoreMod for Linear {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        self.factor as f64 * score - self.slope as f64 * pair.distance().abs() as f64
    }

    fn apply(&self, score: f32, pair: Pair) -> f32 {
        self.factor * score - self.slope * pair.distance().abs() as f32
    }
}

/// A score modification of any kind.
pub fn score_mod(rng: &mut Rng, dims: &Dims) -> OwnedScoreMod {
    if rng.one_in(2) {
        let linear = Linear { factor: [1.0f32, 0.5, -1.0][rng.below(3)], slope: rng.uniform() };
        return OwnedScoreMod {
            factor: linear.factor as f64,
            bias: Arc::new(move |pair| linear.define(0.0, pair)),
            score_mod: Arc::new(linear),
            first_head: 0,
        };
    }
    let most = rng.below(30);
    let table: Vec<f32> = (0..(2 * most + 1) * dims.heads_q).map(|_| rng.normal()).collect();
    let relative = RelativeBias::new(dims.heads_q, most, &table).expect("of that size");
    let bias = move |pair: Pair| {
        let most = most as i32;
        table[pair.head() * (2 * most as usize + 1) + (pair.distance().clamp(-most, most) + most) as usize] as f64
    };
    OwnedScoreMod { factor: 1.0, bias: Arc::new(bias), score_mod: Arc::new(relative), first_head: 0 }
}
