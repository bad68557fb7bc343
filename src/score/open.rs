//! The trait of score modifications that users may write.

#![forbid(unsafe_code)]

use crate::error::Error;
use crate::mask::ProblemSizes;
use crate::pair::Pair;
use crate::score_tile::ScoreTile;

/// A score modification: what becomes of each score before the softmax.
/// [`Attention::modified_by`](crate::Attention::modified_by) takes any number of them. They come after softcap, bias and ALiBi,
/// in the order in which they were given.
///
/// Scores are in natural units: `scale * dot(q, k)`, modified. A result of -inf hides the key. NaN and +inf make the row NaN. Finite
/// results are held between -2.3e38 and 2.3e38.
///
/// [`define`](ScoreMod::define) is the definition, and enough. The reference computes with it, in f64. [`apply`](ScoreMod::apply)
/// is the same in f32, and twice as fast. It is compiled into the loops of each level, so that simple formulas become vector
/// instructions; a look-up in a table, a branch or a call does not. The error of `apply` adds to that of the result: an
/// error of e in a score changes its probability by a factor of `exp(e)`.
///
/// ```
/// use flashtile::Attention;
/// use flashtile::score::{Pair, ScoreMod};
///
/// /// A penalty that grows with the square of the distance.
/// struct Gaussian(f64);
///
/// impl ScoreMod for Gaussian {
///     fn define(&self, score: f64, pair: Pair) -> f64 {
///         score - self.0 * (pair.distance() as f64).powi(2)
///     }
/// }
///
/// let attention = Attention::new().modified_by(&Gaussian(0.01));
/// ```
pub trait ScoreMod: Sync {
    /// The modified score of a pair: the definition.
    ///
    /// It may be asked for any pair of the problem, hidden ones included, and must not panic.
    fn define(&self, score: f64, pair: Pair) -> f64;

    /// The same in f32. The default computes in f64 and rounds.
    #[inline]
    fn apply(&self, score: f32, pair: Pair) -> f32 {
        self.define(score as f64, pair) as f32
    }

    /// Modifies a tile. The default calls [`apply`](ScoreMod::apply) for each pair.
    fn modify(&self, tile: &mut ScoreTile<'_>) {
        tile.modify(|score, pair| self.apply(score, pair));
    }

    /// Refuses a problem that the modification was not made for. The default takes every problem.
    ///
    /// # Errors
    /// Any, such as [`Error::WrongCount`].
    fn check(&self, sizes: &ProblemSizes<'_>) -> Result<(), Error> {
        let _ = sizes;
        Ok(())
    }
}

/// A user's score modification among the options.
#[derive(Clone, Copy)]
pub(crate) struct OpenScoreMod<'a>(pub(crate) &'a dyn ScoreMod);

impl std::fmt::Debug for OpenScoreMod<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("score modification")
    }
}
