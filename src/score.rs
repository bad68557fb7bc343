//! Score modifications: how a score changes before the softmax.
//!
//! ```text
//! raw      = scale * dot(q, k)
//! capped   = softcap * tanh(raw / softcap)                         Attention::softcap
//! biased   = capped + bias[b, h, i, j]                             Attention::bias
//!                   - slope[b, h] * |p - j|                        Attention::alibi       p: the query's key position
//! modified = f(biased, pair), one after the other                  Attention::modified_by
//! out      = sum_j exp(modified[j]) * v[j] / (exp(sink[h]) + sum_j exp(modified[j]))      Attention::sinks
//! ```
//!
//! [`ScoreMod`] is the trait of what users write; [`score_fn`] makes one of a closure. [`RelativeBias`] and [`WindowBias`] look
//! biases up in a table.

// `ScoreMods::define` applies this order for the reference, and `kernel/tile.rs` and `kernel/open_mods.rs` for vectors. Each
// score modification is one file in `score/`, with its definition in f64 and its vector form.

#![forbid(unsafe_code)]

mod alibi;
mod bias;
mod function;
mod math;
mod open;
mod relative_bias;
mod sink;
mod softcap;
mod unit;

pub use crate::pair::{Pair, Query};
pub use crate::score_tile::ScoreTile;
pub(crate) use alibi::Alibi;
pub use alibi::{AlibiSlopes, alibi_slope};
pub(crate) use bias::BiasTensor;
pub use function::{ScoreFn, score_fn};
pub use math::{exp, tanh};
pub(crate) use open::OpenScoreMod;
pub use open::ScoreMod;
pub use relative_bias::{RelativeBias, WindowBias};
pub(crate) use sink::Sinks;
pub(crate) use softcap::Softcap;
pub(crate) use unit::{Unit, query_factor};

use crate::sequence::Sequence;

/// A stage of the scores, for [`Attention::scores_into`](crate::Attention::scores_into).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScoreStage {
    /// `scale * dot(q, k)`. No key is hidden yet.
    Raw,
    /// After the softcap. No key is hidden yet.
    Capped,
    /// After the additive bias, ALiBi and users' modifications; hidden keys have -inf.
    Biased,
    /// After the softmax: the factors of the values. Hidden keys have 0 (NaN in a row with a visible NaN). Rows that see
    /// no key are all 0.
    Probabilities,
}

/// The score modifications of a problem.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScoreMods<'a> {
    pub(crate) softcap: Option<Softcap>,
    pub(crate) bias: Option<BiasTensor<'a>>,
    pub(crate) alibi: Option<Alibi<'a>>,
    /// Users' modifications, in order.
    pub(crate) open: &'a [OpenScoreMod<'a>],
    pub(crate) sinks: Option<Sinks<'a>>,
}

impl ScoreMods<'_> {
    /// Applies the modifications up to `stage` to a raw score of query `i` of head `h` and key `j`: the definition.
    pub(crate) fn define(&self, raw: f64, sequence: &Sequence, [h, i]: [usize; 2], j: usize, stage: ScoreStage) -> f64 {
        let mut score = raw;
        if stage == ScoreStage::Raw {
            return score;
        }
        if let Some(softcap) = &self.softcap {
            score = softcap.define(score);
        }
        if stage == ScoreStage::Capped {
            return score;
        }
        if let Some(bias) = &self.bias {
            let (row, column) = sequence.in_tensors([h, i], j);
            score = bias.define(score, row, column);
        }
        if let Some(alibi) = &self.alibi {
            score = alibi.define(score, [sequence.batch, h], sequence.position(i), j);
        }
        for OpenScoreMod(open) in self.open {
            score = open.define(score, sequence.query(h, i).with_key(j));
        }
        score
    }

    /// The unit of scores while they are modified, if the softmax takes them in `last`: users' functions take natural units.
    pub(crate) fn unit(&self, last: Unit) -> Unit {
        if self.open.is_empty() { last } else { Unit::Natural }
    }

    /// The factor of queries that gives scores in that unit.
    pub(crate) fn query_factor(&self, scale: f32, last: Unit) -> f32 {
        query_factor(scale, self.softcap, self.unit(last))
    }

    /// Whether key `j` is visible to query `i` of head `h`: a bias of -inf hides it.
    pub(crate) fn sees(&self, sequence: &Sequence, [h, i]: [usize; 2], j: usize) -> bool {
        let (row, column) = sequence.in_tensors([h, i], j);
        self.bias.is_none_or(|bias| bias.sees(row, column))
    }
}
