//! How a score changes on its way to the softmax.
//!
//! ```text
//! raw    = scale * dot(q, k)
//! capped = softcap * tanh(raw / softcap)                           softcap.rs
//! biased = capped + bias[b, h, i, j]                               bias.rs
//!                 - slope[h] * |p - j|                             alibi.rs      p: the query's key position
//! ```
//!
//! This order is written once, in [`ScoreMods::define`] for the reference and in `kernel/tile.rs` for vectors. Each score
//! modification is one file in `score/`, with its definition in f64 and its vector form side by side.

#![forbid(unsafe_code)]

mod alibi;
mod bias;
mod softcap;
mod unit;

pub(crate) use alibi::Alibi;
pub use alibi::{AlibiSlopes, alibi_slope};
pub(crate) use bias::BiasTensor;
pub(crate) use softcap::Softcap;
pub(crate) use unit::{Unit, query_factor};

/// The stage of a score at which to look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScoreStage {
    /// `scale * dot(q, k)`. No key is hidden yet.
    Raw,
    /// After the softcap. No key is hidden yet.
    Capped,
    /// After the additive bias and ALiBi; hidden keys have -inf.
    Biased,
    /// After the softmax: what the values are weighted with. Hidden keys have 0, rows that see nothing are all 0.
    Probabilities,
}

/// The score modifications of a problem.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScoreMods<'a> {
    pub(crate) softcap: Option<Softcap>,
    pub(crate) bias: Option<BiasTensor<'a>>,
    pub(crate) alibi: Option<Alibi<'a>>,
}

impl ScoreMods<'_> {
    /// What the modifications up to `stage` make of a raw score: the definition.
    ///
    /// * `row`: batch, query head and query
    /// * `p`: the query's key position
    /// * `j`: the key
    pub(crate) fn define(&self, raw: f64, row: [usize; 3], p: i128, j: usize, stage: ScoreStage) -> f64 {
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
            score = bias.define(score, row, j);
        }
        if let Some(alibi) = &self.alibi {
            let [_, h, _] = row;
            score = alibi.define(score, h, p, j);
        }
        score
    }

    /// Whether key `j` stays visible: a bias of -inf hides it.
    pub(crate) fn sees(&self, row: [usize; 3], j: usize) -> bool {
        self.bias.is_none_or(|bias| bias.sees(row, j))
    }
}
