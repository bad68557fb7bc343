//! Score modifications: how a score changes before the softmax.
//!
//! ```text
//! raw    = scale * dot(q, k)
//! capped = softcap * tanh(raw / softcap)                           softcap.rs
//! biased = capped + bias[b, h, i, j]                               bias.rs
//!                 - slope[h] * |p - j|                             alibi.rs      p: the query's key position
//! ```
//!
//! [`ScoreMods::define`] applies this order for the reference, and `kernel/tile.rs` for vectors. Each score modification is one
//! file in `score/`, with its definition in f64 and its vector form.

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

/// A stage of the scores, for [`Attention::scores_into`](crate::Attention::scores_into).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScoreStage {
    /// `scale * dot(q, k)`. No key is hidden yet.
    Raw,
    /// After the softcap. No key is hidden yet.
    Capped,
    /// After the additive bias and ALiBi; hidden keys have -inf.
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
}

impl ScoreMods<'_> {
    /// Applies the modifications up to `stage` to a raw score: the definition.
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

    /// Whether key `j` is visible: a bias of -inf hides it.
    pub(crate) fn sees(&self, row: [usize; 3], j: usize) -> bool {
        self.bias.is_none_or(|bias| bias.sees(row, j))
    }
}
