//! How a score changes on its way to the softmax.
//!
//! ```text
//! raw    = scale * dot(q, k)
//! capped = softcap * tanh(raw / softcap)
//! biased = capped + bias[b, h, i, j] - slope[h] * |p - j|          p: the query's key position
//! ```
//!
//! This order is written here once and obeyed by the reference and by the kernel. A bias never hides a key, but for an
//! additive -inf, which does.

#![forbid(unsafe_code)]

use crate::tensor::AnyTensor;

/// The point on a score's way at which to look at it.
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

/// The slopes of ALiBi, *attention with linear biases* (Press, Smith and Lewis, 2022): head h subtracts
/// `slope[h] * |p - j|` from the score of key j for a query at position p.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum AlibiSlopes<'a> {
    /// The published slopes for the number of query heads; see [`alibi_slope`].
    Standard,
    /// One slope for each query head.
    PerHead(&'a [f32]),
}

/// The published ALiBi slope of head `head` out of `heads`.
///
/// For a power of two, the slopes are the geometric series `2^(-8/heads), 2^(-16/heads), …, 2^-8`. For other counts they
/// are those of the power of two below, followed by every other one of twice that power, from the first on.
///
/// ```
/// assert_eq!((0..4).map(|h| flashtile::alibi_slope(h, 4)).collect::<Vec<_>>(), [0.25, 0.0625, 0.015625, 0.00390625]);
/// // Three heads: two of the series for two, then the first of the series for four.
/// assert_eq!((0..3).map(|h| flashtile::alibi_slope(h, 3)).collect::<Vec<_>>(), [0.0625, 0.00390625, 0.25]);
/// ```
pub fn alibi_slope(head: usize, heads: usize) -> f32 {
    let power = match heads {
        0 => 1,
        _ => 1usize << heads.ilog2(),
    };
    let exponent = if head < power {
        -8.0 * (head as f64 + 1.0) / power as f64
    } else {
        -8.0 * (2.0 * (head - power) as f64 + 1.0) / (2.0 * power as f64)
    };
    exponent.exp2() as f32
}

/// The checked biases of a problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bias<'a> {
    pub(crate) heads: usize,
    pub(crate) softcap: Option<f32>,
    /// Broadcast to the shape of the scores.
    pub(crate) tensor: Option<AnyTensor<'a>>,
    pub(crate) alibi: Option<AlibiSlopes<'a>>,
}

impl Bias<'_> {
    /// The ALiBi slope of query head `h`.
    pub(crate) fn slope(&self, h: usize) -> Option<f32> {
        self.alibi.map(|slopes| match slopes {
            AlibiSlopes::Standard => alibi_slope(h, self.heads),
            AlibiSlopes::PerHead(slopes) => slopes[h],
        })
    }
}
