//! A tile of scores, as masks and score modifications change it.

#![forbid(unsafe_code)]

use crate::pair::{Pair, Query};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use std::ops::Range;

/// The scores of some queries and a run of keys. A mask hides some of them, a score modification changes them.
///
/// Only the crate makes tiles. [`ScoreTile::modify`] is compiled for each level with the function that it is given, so the
/// compiler can vectorise it.
pub struct ScoreTile<'t> {
    pub(crate) isa: Isa,
    /// `[keys][rows]`.
    pub(crate) scores: &'t mut [f32],
    pub(crate) rows: TileRows<'t>,
    /// The first key.
    pub(crate) first_key: i32,
}

/// The query of each column of a tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileRows<'t> {
    pub(crate) batch: u32,
    /// The head of all rows, if they have one.
    pub(crate) head: Option<u32>,
    pub(crate) heads: &'t [u32],
    pub(crate) queries: &'t [i32],
    pub(crate) offset: i32,
}

/// The most keys of a run of [`ScoreTile::modify_rows`], copied to the stack. Tiles have up to 256 keys.
const MAX_RUN: usize = 256;

impl TileRows<'_> {
    fn row(&self, lane: usize) -> Query {
        Query { batch: self.batch, head: self.heads[lane], query: self.queries[lane], offset: self.offset }
    }
}

impl ScoreTile<'_> {
    /// Replaces the score of each pair by `f(score, pair)`, in natural units. -inf hides the key from the query.
    ///
    /// Some pairs may lie outside what is visible. Their scores don't count, but `f` must not panic for them.
    #[inline]
    pub fn modify(&mut self, f: impl Fn(f32, Pair) -> f32) {
        let ScoreTile { isa, scores, rows, first_key } = self;
        isa.run(Modify { scores, rows: *rows, first_key: *first_key, f });
    }

    /// Calls `f` for each query of the tile, with runs of its scores: the pair of the query and the first key of a run, and the
    /// scores of that key and those after it, in natural units. `f` changes them in place. -inf hides the key.
    ///
    /// It is for what computes many scores at once, such as a function of another language; [`modify`](ScoreTile::modify) is faster
    /// for formulas. How keys are cut into runs may change, so that a score may depend on its own pair alone. Some pairs may lie
    /// outside what is visible, as in `modify`.
    ///
    /// ```
    /// use flashtile::Attention;
    /// use flashtile::score::{Pair, ScoreMod, ScoreTile};
    ///
    /// struct NearFirst;
    ///
    /// impl ScoreMod for NearFirst {
    ///     fn define(&self, score: f64, pair: Pair) -> f64 {
    ///         score - pair.key() as f64
    ///     }
    ///
    ///     fn modify(&self, tile: &mut ScoreTile<'_>) {
    ///         tile.modify_rows(|first, scores| {
    ///             for (score, key) in scores.iter_mut().zip(first.key()..) {
    ///                 *score -= key as f32;
    ///             }
    ///         });
    ///     }
    /// }
    ///
    /// let attention = Attention::new().modified_by(&NearFirst);
    /// ```
    pub fn modify_rows(&mut self, mut f: impl FnMut(Pair, &mut [f32])) {
        let ScoreTile { scores, rows, first_key, .. } = self;
        let lanes = rows.queries.len();
        for (scores, key) in scores.chunks_mut((MAX_RUN * lanes).max(1)).zip((*first_key..).step_by(MAX_RUN)) {
            let (mut run, mut of) = ([0.0; MAX_RUN], None);
            let run = &mut run[..scores.len() / lanes];
            for lane in 0..lanes {
                let pair = Pair { row: rows.row(lane), key };
                // Lanes without a query repeat the last one. It is asked for once.
                if of.replace(pair) != Some(pair) {
                    for (to, score) in run.iter_mut().zip(scores[lane..].iter().step_by(lanes)) {
                        *to = *score;
                    }
                    f(pair, run);
                }
                for (score, from) in scores[lane..].iter_mut().step_by(lanes).zip(&*run) {
                    *score = *from;
                }
            }
        }
    }

    /// The tile of some of its keys, counted from its first.
    pub(crate) fn slice_keys(&mut self, keys: Range<usize>) -> ScoreTile<'_> {
        let rows = self.rows.queries.len();
        let scores = &mut self.scores[keys.start * rows..keys.end * rows];
        ScoreTile { scores, first_key: self.first_key + keys.start as i32, ..*self }
    }

    /// Hides all pairs.
    pub(crate) fn hide_all(&mut self) {
        self.scores.fill(f32::NEG_INFINITY);
    }

    /// Hides the pairs for which `sees` is false.
    #[inline]
    pub fn hide_unless(&mut self, sees: impl Fn(Pair) -> bool) {
        self.modify(|score, pair| if sees(pair) { score } else { f32::NEG_INFINITY });
    }
}

impl ScoreTile<'_> {
    /// Adds `table(head)[most + distance]`, where the distance is held within the table, if the queries of the tile are
    /// neighbours of one head. Otherwise changes nothing and returns false.
    ///
    /// * `table`: `2 * most + 1` elements; the first and the last `MAX_LANES` are the same
    pub(crate) fn add_by_distance<'b>(&mut self, table: impl Fn(usize) -> &'b [f32], most: i32) -> bool {
        let ScoreTile { isa, scores, rows, first_key } = self;
        let (Some(head), [first, _, ..]) = (rows.head, rows.queries) else { return false };
        let (table, lanes) = (table(head as usize), rows.queries.len());
        let first_distance = (first + rows.offset - *first_key) as i64 + most as i64;
        isa.run(AddByDistance { scores, lanes, table, first: first_distance });
        true
    }

    /// Brings the scores into a unit of which one natural unit is `factor`, above 1.
    pub(crate) fn convert(&mut self, factor: f32) {
        self.isa.run(ToUnit { scores: self.scores, factor });
    }
}

/// A finite score stays finite: one of f32::MIN must not become -inf, which hides its key.
struct ToUnit<'t> {
    scores: &'t mut [f32],
    factor: f32,
}

impl Kernel for ToUnit<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ToUnit { scores, factor } = self;
        let mut vectors = scores.chunks_exact_mut(S::LANES);
        for scores in &mut vectors {
            simd.store_slice(scores, in_unit(simd, simd.load_slice(scores), factor));
        }
        let rest = vectors.into_remainder();
        simd.store_part(rest, in_unit(simd, simd.load_part(rest, 0.0), factor));
    }
}

/// `score * factor`, with finite scores held where they stay finite, and infinite ones left as they are.
///
/// By additions of 0 or infinity and not by a select: of a select and a store to where the score came from, the compiler makes a
/// masked store, which takes some 20 cycles on Zen 3. `max` and `min` return a NaN in their second operand.
#[inline(always)]
fn in_unit<S: Simd>(simd: S, score: S::F32, factor: f32) -> S::F32 {
    let (most, zero) = (simd.splat(f32::MAX), simd.zero());
    let least = simd.sub(zero, most);
    let within = simd.min(most, simd.max(least, simd.mul(score, simd.splat(factor))));
    let below = simd.min(zero, simd.add(score, most)); // -inf for -inf, otherwise 0
    let above = simd.max(zero, simd.sub(score, most)); // inf for inf, otherwise 0
    simd.add(simd.add(within, below), above)
}

/// The distances of a key's neighbouring queries ascend, as the table does, so a vector of biases is one load.
struct AddByDistance<'t> {
    scores: &'t mut [f32],
    lanes: usize,
    table: &'t [f32],
    /// The index of the first query's and the first key's distance.
    first: i64,
}

impl Kernel for AddByDistance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let AddByDistance { scores, lanes, table, mut first } = self;
        // The last start of a vector within the table.
        let last = table.len() - S::LANES;
        for scores in scores.chunks_exact_mut(lanes) {
            for (at, scores) in (first..).step_by(S::LANES).zip(scores.chunks_exact_mut(S::LANES)) {
                let start = (at.max(0) as usize).min(last);
                simd.store_slice(scores, simd.add(simd.load_slice(scores), simd.load_slice(&table[start..])));
            }
            first -= 1;
        }
    }
}

struct Modify<'t, F> {
    scores: &'t mut [f32],
    rows: TileRows<'t>,
    first_key: i32,
    f: F,
}

impl<F: Fn(f32, Pair) -> f32> Kernel for Modify<'_, F> {
    type Output = ();

    /// A vector of scores is taken out of memory and put back, so that what `f` reads is read once for all of them. Between two
    /// stores the compiler would have to read it again, and would not make a vector of the loop. 0 is added because of a select and
    /// a store to where the score came from the compiler makes a masked store; see [`in_unit`].
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Modify { scores, rows, first_key, f } = self;
        let TileRows { batch, head, heads, queries, offset } = rows;
        let mut key = first_key;
        match (head, queries) {
            // One row: the keys are neighbours.
            (Some(head), &[query]) => {
                let row = Query { batch, head, query, offset };
                let mut vectors = scores.chunks_exact_mut(S::LANES);
                for scores in &mut vectors {
                    let mut vector = [0.0; MAX_LANES];
                    vector[..S::LANES].copy_from_slice(scores);
                    for (score, key) in vector[..S::LANES].iter_mut().zip(key..) {
                        *score = f(*score, Pair { row, key }) + 0.0;
                    }
                    scores.copy_from_slice(&vector[..S::LANES]);
                    key += S::LANES as i32;
                }
                for score in vectors.into_remainder() {
                    *score = f(*score, Pair { row, key }) + 0.0;
                    key += 1;
                }
            }
            // The rows of a key are neighbours.
            (Some(head), queries) => {
                for scores in scores.chunks_exact_mut(queries.len()) {
                    for (scores, queries) in scores.chunks_exact_mut(S::LANES).zip(queries.chunks_exact(S::LANES)) {
                        let mut vector = [0.0; MAX_LANES];
                        vector[..S::LANES].copy_from_slice(scores);
                        for lane in 0..S::LANES {
                            let row = Query { batch, head, query: queries[lane], offset };
                            vector[lane] = f(vector[lane], Pair { row, key }) + 0.0;
                        }
                        scores.copy_from_slice(&vector[..S::LANES]);
                    }
                    key += 1;
                }
            }
            (None, queries) => {
                for scores in scores.chunks_exact_mut(queries.len()) {
                    for (lane, score) in scores.iter_mut().enumerate() {
                        let row = Query { batch, head: heads[lane], query: queries[lane], offset };
                        *score = f(*score, Pair { row, key }) + 0.0;
                    }
                    key += 1;
                }
            }
        }
    }
}
