//! ALiBi: a penalty that grows with the distance of query and key.

#![forbid(unsafe_code)]

use crate::simd::Simd;

/// The slopes of ALiBi, *attention with linear biases* (Press, Smith and Lewis, 2022): head h subtracts
/// `slope[h] * |p - j|` from the score of key j for a query at position p.
///
/// Another list of slopes for each sequence of a batch:
///
/// ```
/// use flashtile::{AlibiSlopes, Attention};
///
/// // Two sequences, three heads.
/// let slopes = [0.5, 0.25, 0.125, 0.1, 0.01, 0.001];
/// let attention = Attention::new().causal().alibi(AlibiSlopes::PerBatchAndHead(&slopes));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum AlibiSlopes<'a> {
    /// The published slopes for the number of query heads; see [`alibi_slope`].
    Standard,
    /// One slope for each query head.
    PerHead(&'a [f32]),
    /// One slope for each query head of each sequence, `[batch, heads_q]`: sequence b subtracts `slope[b][h] * |p - j|`.
    PerBatchAndHead(&'a [f32]),
}

/// The published ALiBi slope of head `head` out of `heads`.
///
/// If `heads` is a power of two, the slopes are the geometric series `2^(-8/heads), 2^(-16/heads), …, 2^-8`. Otherwise they are
/// the slopes for the next lower power of two, followed by every other slope for twice that power, from the first on.
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

/// Checked slopes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alibi<'a> {
    pub(crate) slopes: AlibiSlopes<'a>,
    /// The number of query heads.
    pub(crate) heads: usize,
}

impl Alibi<'_> {
    /// The slope of query head `h` of sequence `b`.
    pub(crate) fn slope(&self, b: usize, h: usize) -> f32 {
        match self.slopes {
            AlibiSlopes::Standard => alibi_slope(h, self.heads),
            AlibiSlopes::PerHead(slopes) => slopes[h],
            AlibiSlopes::PerBatchAndHead(slopes) => slopes[b * self.heads + h],
        }
    }

    /// `score - slope * |p - j|` for a query of sequence `b` and head `h`: the definition.
    pub(crate) fn define(&self, score: f64, [b, h]: [usize; 2], p: i128, j: usize) -> f64 {
        score - self.slope(b, h) as f64 * (p - j as i128).unsigned_abs() as f64
    }

    /// Applies ALiBi to a vector of scores. `position` and `key` are counted from the same key.
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(simd: S, score: S::F32, slope: S::F32, position: S::F32, key: S::F32) -> S::F32 {
        simd.sub(score, simd.mul(slope, simd.abs(simd.sub(position, key))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published construction: a geometric series for powers of two; for other counts the series for the next lower power
    /// of two, then the odd places of the series for twice that power.
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
    fn slopes_are_taken_as_given() {
        let of = |slopes, heads| {
            let alibi = Alibi { slopes, heads };
            [[0, 0], [0, 1], [1, 0], [1, 1]].map(|[b, h]| alibi.slope(b, h))
        };
        assert_eq!(of(AlibiSlopes::PerHead(&[0.5, -2.0]), 2), [0.5, -2.0, 0.5, -2.0]);
        assert_eq!(of(AlibiSlopes::PerBatchAndHead(&[0.5, -2.0, 3.0, 4.0]), 2), [0.5, -2.0, 3.0, 4.0]);
        assert_eq!(of(AlibiSlopes::Standard, 4), [0.25, 0.0625, 0.25, 0.0625]);
    }
}
