//! Relative position bias: a table instead of a tensor with an element for each pair.

#![forbid(unsafe_code)]

use super::open::ScoreMod;
use crate::error::{Error, check_count};
use crate::mask::ProblemSizes;
use crate::pair::{MAX_INDEX, Pair};
use crate::score_tile::ScoreTile;
use crate::simd::MAX_LANES;

/// A bias for each head and distance of query and key: `score + table[h][p - j]`. Distances past the table's ends have the bias
/// of its ends.
#[derive(Clone, Debug, PartialEq)]
pub struct RelativeBias {
    heads: usize,
    /// The largest distance, either way.
    most: usize,
    /// For each head the biases of distances `-most..=most`, and the first and last of them repeated `MAX_LANES` times at either
    /// end, so that a vector of neighbouring distances is within it.
    table: Vec<f32>,
}

impl RelativeBias {
    /// * `table`: `[heads, 2 * most + 1]`; element `most + d` is the bias of distance d, where d is the query's position minus
    ///   the key's: the last ones are those of keys long before the query
    ///
    /// # Errors
    /// [`Error::WrongCount`] if the table is not of that size.
    pub fn new(heads: usize, most: usize, table: &[f32]) -> Result<Self, Error> {
        let expected = most.saturating_mul(2).saturating_add(1).saturating_mul(heads);
        if table.len() != expected || most > MAX_INDEX {
            return Err(Error::WrongCount { what: "relative biases", expected, got: table.len() });
        }
        let row = 2 * most + 1;
        let mut padded = Vec::with_capacity(table.len() + 2 * MAX_LANES * heads);
        for biases in table.chunks_exact(row) {
            padded.extend([biases[0]; MAX_LANES]);
            padded.extend(biases);
            padded.extend([biases[row - 1]; MAX_LANES]);
        }
        Ok(RelativeBias { heads, most, table: padded })
    }

    /// The bias of T5 and its relatives: distances are put into buckets, which grow with the distance.
    ///
    /// * `buckets`: `[buckets, heads]`, as checkpoints have it
    /// * `bidirectional`: an encoder; half of the buckets are for keys after the query. In a decoder these have the bias of
    ///   distance 0
    /// * `max_distance`: distances from there on share the last bucket; 128 in T5
    ///
    /// # Errors
    /// [`Error::WrongCount`] if `buckets` can't be cut into rows of `heads`; [`Error::InvalidMask`] if there are fewer than 4 (2 in a
    /// decoder) or an odd number in an encoder, or `max_distance` is not larger than half of one direction's buckets, or above 2^20.
    /// Without heads there are no buckets, and only `max_distance` is checked.
    ///
    /// Source: Raffel and others, 2020, and `T5Attention._relative_position_bucket` of Hugging Face's transformers.
    pub fn t5(heads: usize, bidirectional: bool, max_distance: usize, buckets: &[f32]) -> Result<Self, Error> {
        let count = buckets.len().checked_div(heads).unwrap_or(0);
        check_count("bucket biases", buckets.len(), count * heads)?;
        let own = if bidirectional { count / 2 } else { count };
        let fit = own >= 2 && !(bidirectional && count % 2 == 1) && max_distance > own / 2;
        if !(fit || heads == 0) || max_distance > 1 << 20 {
            return Err(Error::InvalidMask {
                reason: "the buckets of a relative bias and its largest distance don't fit",
            });
        }
        let bucket = |distance: i64| {
            let later = if bidirectional && distance < 0 { own } else { 0 };
            let distance = if bidirectional { distance.unsigned_abs() as usize } else { distance.max(0) as usize };
            later + t5_bucket(distance, own, max_distance)
        };
        let most = max_distance as i64;
        let of_head = |h| (-most..=most).map(move |distance| buckets[bucket(distance) * heads + h]);
        Self::new(heads, max_distance, &(0..heads).flat_map(of_head).collect::<Vec<_>>())
    }

    /// The row of the table for a head.
    fn row(&self, head: usize) -> &[f32] {
        let len = 2 * self.most + 1 + 2 * MAX_LANES;
        &self.table[head * len..][..len]
    }
}

/// The bucket of a distance: one for each distance in the first half, then growing geometrically.
fn t5_bucket(distance: usize, buckets: usize, max_distance: usize) -> usize {
    let exact = buckets / 2;
    if distance < exact {
        return distance;
    }
    // In f32, as the published code computes it: buckets change where it rounds.
    let part = (distance as f32 / exact as f32).ln() / (max_distance as f32 / exact as f32).ln();
    (exact + (part * (buckets - exact) as f32) as usize).min(buckets - 1)
}

impl ScoreMod for RelativeBias {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        score + self.bias(pair) as f64
    }

    #[inline]
    fn apply(&self, score: f32, pair: Pair) -> f32 {
        score + self.bias(pair)
    }

    fn modify(&self, tile: &mut ScoreTile<'_>) {
        let added = tile.add_by_distance(|head| self.row(head), (self.most + MAX_LANES) as i32);
        if !added {
            tile.modify(|score, pair| self.apply(score, pair));
        }
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        check_count("heads of a relative bias", self.heads, sizes.heads)
    }
}

impl RelativeBias {
    #[inline]
    fn bias(&self, pair: Pair) -> f32 {
        let most = self.most as i64;
        self.row(pair.head())[((pair.distance() as i64).clamp(-most, most) + most) as usize + MAX_LANES]
    }
}

/// A bias for each head and offset in a window of two dimensions, as Swin transformers have it: queries and keys are the window's
/// `height * width` places, row by row, and `score + table[h][y_i - y_j][x_i - x_j]`.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowBias {
    heads: usize,
    /// Where query i and key j meet in a row of the table: `queries[i] - keys[j]`.
    queries: Vec<u32>,
    keys: Vec<u32>,
    /// `[heads][(2 * height - 1) * (2 * width - 1)]`.
    table: Vec<f32>,
}

impl WindowBias {
    /// * `table`: `[(2 * height - 1) * (2 * width - 1), heads]`, as checkpoints have it (`relative_position_bias_table`)
    ///
    /// # Errors
    /// [`Error::WrongCount`] if the table is not of that size, [`Error::TooMany`] for a window of more than 2^20 places.
    pub fn new(heads: usize, [height, width]: [usize; 2], table: &[f32]) -> Result<Self, Error> {
        const LIMIT: usize = 1 << 20;
        let places = height.saturating_mul(width);
        if places > LIMIT {
            return Err(Error::TooMany { what: "places of a window", limit: LIMIT, got: places });
        }
        let [rows, columns] = [height, width].map(|n| n.saturating_mul(2).saturating_sub(1));
        let offsets = rows.saturating_mul(columns);
        let expected = offsets.saturating_mul(heads);
        check_count("window biases", table.len(), expected)?;
        let place = |n: usize, y: usize, x: usize| ((n / width + y) * columns + n % width + x) as u32;
        Ok(WindowBias {
            heads,
            queries: (0..places).map(|n| place(n, height - 1, width - 1)).collect(),
            keys: (0..places).map(|n| place(n, 0, 0)).collect(),
            table: (0..heads).flat_map(|h| (0..offsets).map(move |n| table[n * heads + h])).collect(),
        })
    }

    #[inline]
    fn bias(&self, pair: Pair) -> f32 {
        let row = self.table.len() / self.heads;
        let at = self.queries[pair.query()] - self.keys[pair.key()];
        self.table[pair.head() * row + at as usize]
    }
}

impl ScoreMod for WindowBias {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        score + self.bias(pair) as f64
    }

    #[inline]
    fn apply(&self, score: f32, pair: Pair) -> f32 {
        score + self.bias(pair)
    }

    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        let places = self.queries.len();
        check_count("heads of a window bias", self.heads, sizes.heads)?;
        check_count("places of a window for queries", places, sizes.seq_q)?;
        check_count("places of a window for keys", places, sizes.seq_kv)
    }
}
