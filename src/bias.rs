//! How a score changes on its way to the softmax.
//!
//! ```text
//! raw    = scale * dot(q, k)
//! capped = softcap * tanh(raw / softcap)
//! biased = capped + bias[b, h, i, j] - slope[h] * |p - j|          p: the query's key position
//! ```
//!
//! This order is written here once and obeyed by the reference and by the kernel. A bias never hides a key, but for an
//! additive -inf, which does. (f32::MIN would, beside a score below -7e30: their sum leaves the range of f32.)

#![forbid(unsafe_code)]

use crate::tensor::any::AnyTensor;

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

#[cfg(test)]
mod tests {
    use super::*;

    /// The construction as published: a geometric series for powers of two; for other counts that of the power of two below,
    /// then the odd places of the series for twice that power.
    fn published(heads: usize) -> Vec<f64> {
        if heads.is_power_of_two() {
            let start = 2f64.powf(-8.0 / heads as f64);
            return (1..=heads).map(|n| start.powi(n as i32)).collect();
        }
        let below = 1 << heads.ilog2();
        let mut slopes = published(below);
        slopes.extend(published(2 * below).into_iter().step_by(2).take(heads - below));
        slopes
    }

    #[test]
    fn slopes_are_the_published_ones() {
        for heads in 1..=130 {
            for (head, slope) in published(heads).into_iter().enumerate() {
                let got = alibi_slope(head, heads) as f64;
                assert!((got - slope).abs() <= 1e-7 * slope, "head {head} of {heads}: {got}, not {slope}");
            }
        }
    }

    #[test]
    fn slopes_of_some_counts() {
        let slopes = |heads| (0..heads).map(|head| alibi_slope(head, heads)).collect::<Vec<_>>();
        assert_eq!(slopes(1), [1.0 / 256.0]);
        assert_eq!(slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        assert_eq!(slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]);
        let of_16 = slopes(16);
        assert_eq!(slopes(12)[..8], slopes(8));
        assert_eq!(slopes(12)[8..], [of_16[0], of_16[2], of_16[4], of_16[6]]);
    }

    #[test]
    fn slopes_per_head_are_taken_as_given() {
        let bias = Bias { heads: 2, softcap: None, tensor: None, alibi: Some(AlibiSlopes::PerHead(&[0.5, -2.0])) };
        assert_eq!([bias.slope(0), bias.slope(1)], [Some(0.5), Some(-2.0)]);
        let standard = Bias { heads: 4, alibi: Some(AlibiSlopes::Standard), ..bias };
        assert_eq!(standard.slope(1), Some(0.0625));
        assert_eq!(Bias { alibi: None, ..bias }.slope(0), None);
    }
}
