//! Score modifications from closures.

#![forbid(unsafe_code)]

use super::open::ScoreMod;
use crate::pair::Pair;

/// A score modification from a function of the score, in natural units, and the pair.
///
/// ```
/// use flashtile::{Attention, alibi_slope, score::score_fn};
///
/// let slopes: Vec<f32> = (0..8).map(|h| alibi_slope(h, 8)).collect();
/// let alibi = score_fn(|score, pair| score - slopes[pair.head()] * pair.distance().abs() as f32);
/// let attention = Attention::new().causal().modified_by(&alibi);
/// ```
pub fn score_fn<F: Fn(f32, Pair) -> f32 + Sync>(f: F) -> ScoreFn<F> {
    ScoreFn(f)
}

/// The score modification of [`score_fn`].
#[derive(Clone, Copy)]
pub struct ScoreFn<F>(F);

impl<F: Fn(f32, Pair) -> f32 + Sync> ScoreMod for ScoreFn<F> {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        (self.0)(score as f32, pair) as f64
    }

    #[inline]
    fn apply(&self, score: f32, pair: Pair) -> f32 {
        (self.0)(score, pair)
    }
}
