//! Softmax, log_softmax and logsumexp of rows and along any axis, their gradients, and a mergeable softmax state.
//!
//! ```text
//! softmax      y = exp(scale * (x - max)) / sum           sum = sum of exp(scale * (x - max)) along the axis
//! log_softmax  y = scale * (x - max) - log(sum)
//! logsumexp    l = scale * max + log(sum)
//! ```
//!
//! Subtracting the maximum does not change the result. It makes every exponent at most 0, so nothing overflows. `scale` is the
//! inverse temperature: 1 is the plain softmax, a larger scale is sharper, 0 gives equal probabilities, and a negative scale
//! prefers the smallest element.
//!
//! A temperature of 0 has no scale: 1/0 is infinite, and a scale that is not finite is refused. Temperature 0 means greedy
//! choice: take the index of the largest element (argmax), or write 1 there and 0 elsewhere (one-hot).
//!
//! | | one row | along an [`Axis`], in place | along an [`Axis`], into an output |
//! |---|---|---|---|
//! | softmax | [`softmax`] | [`softmax_in_place`] | [`softmax_into`] |
//! | log_softmax | [`log_softmax`] | [`log_softmax_in_place`] | [`log_softmax_into`] |
//! | logsumexp | [`logsumexp`] | | [`logsumexp_into`] |
//! | gradients | | [`softmax_backward_in_place`], [`log_softmax_backward_in_place`] | [`softmax_backward_into`], [`log_softmax_backward_into`], [`logsumexp_backward_into`] |
//! | loss of a classifier | | | [`cross_entropy`], [`cross_entropy_into`], [`cross_entropy_gradient_into`] |
//! | loss, with options | | | [`CrossEntropy`]: ignored targets, label smoothing, class weights, classes along any axis |
//! | with a mask or a bias | | | [`Softmax`]: softmax, log_softmax and logsumexp of tensors of any strides |
//! | f32 results of half types | | | [`Softmax`] |
//! | online, piece by piece | [`RowState`] | | |
//! | natural exponential | [`exp_in_place`] | | [`exp_into`] |
//!
//! Axes are counted from 0, or from -1 at the end, as in NumPy. Slices are dense and row-major. With the `ndarray` feature, [`softmax_axis`], [`log_softmax_axis`], [`logsumexp_axis`],
//! [`softmax_axis_in_place`] and [`log_softmax_axis_in_place`] take arrays of any strides. Elements are f32, f16, bf16 or f64:
//! see [`Number`].
//!
//! # Edge rules
//!
//! | | |
//! |---|---|
//! | finite input, finite scale | never NaN, for all finite numbers; a logarithm is -inf only where it is below the range of the type |
//! | an element of -inf | hidden at any scale: its softmax is exactly 0, its log_softmax is -inf, and it does not affect the others |
//! | a row with only -inf | zeros; log_softmax and logsumexp are -inf. Attention does the same for a query that sees no key |
//! | NaN in a row | that row is NaN; other rows are not affected |
//! | +inf in a row | that row is NaN, because inf - inf is NaN; with a negative scale the element is hidden |
//! | a scale that is not finite | refused, with [`Error::InvalidOption`](crate::Error::InvalidOption) |
//! | an empty row or array | nothing is written; logsumexp of an empty row is -inf |
//! | a half type | computed in f32, each result rounded once |
//! | a gradient where the softmax is 0 | 0 for any upstream gradient; see [`softmax_backward_into`] and [`log_softmax_backward_into`] |
//! | in place or into an output | the same bits |
//! | an element that a mask or bias hides | as one of -inf, whatever it is; see [`Softmax`] |
//!
//! # How exact
//!
//! [`exp_into`] is at most 1 ulp from the correctly rounded exponential for each of the 2^32 numbers. Let u = 2^-24. The
//! relative error of a softmax of n elements is at most (64 + n/1024 + 16) u, in practice 1 or 2 u, plus the effect of
//! rounding scale * (x - max): 2 |scale * (x - max)| u, or 0 at scale 1 if the differences are exact. (Along axes other than
//! the last, and in rows of more than 16384 elements, x - max is computed in two steps.)
//!
//! [`CrossEntropy`]: -log p of a class is off by the bound of the sum, (64 + n/1024 + 16) u, and a loss by that times the weights
//! in it, before it is rounded once. With a bias, [`Softmax`] rounds score - max once.
//!
//! In f64, exponentials are at most 1 ulp from the correctly rounded ones, and the same bound holds with u = 2^-53.
//!
//! # Threads
//!
//! With the `rayon` feature, a call of 2^16 elements or more divides its lines between idle threads of the pool that its caller is
//! in. Outside a pool, threads of this crate help with 2^19 elements or more. The bits never depend on threads.
//!
//! # Example
//!
//! A row, then both axes of a matrix:
//!
//! ```
//! use flashtile::softmax::{Axis, softmax, softmax_into};
//!
//! let mut row = [1000.0f32, 1001.0, 1002.0];
//! softmax(&mut row, 1.0)?;
//! assert!((row[2] - 0.66524096).abs() < 1e-6);
//!
//! let logits = [2.0f32, 4.0, 2.0, 1.0, 0.0, 0.0, 0.0, f32::NEG_INFINITY];
//! let mut probs = [0.0; 8];
//! softmax_into(&logits, &mut probs, Axis::new(&[2, 4], 1)?, 1.0)?;
//! assert_eq!(probs[4..], [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0]);
//! softmax_into(&logits, &mut probs, Axis::new(&[2, 4], 0)?, 1.0)?;
//! assert_eq!((probs[3], probs[7]), (1.0, 0.0));
//! # Ok::<(), flashtile::Error>(())
//! ```

#[cfg(feature = "ndarray")]
mod arrays;
mod axis;
mod axis_loop;
mod backward;
mod backward_calls;
mod block;
mod buffers;
mod chains;
mod chosen_level;
mod column;
mod convert;
mod copies;
mod cross_entropy;
mod cross_entropy_options;
mod dispatch;
mod double;
mod double_exp;
mod exponential;
mod filled_rows;
mod fold;
mod forward_calls;
mod gathered;
mod line_states;
mod lines;
mod masked;
mod number;
mod rare;
mod register_rows;
mod row;
mod row_state;
mod scale;
mod scratch;
mod sealed;
mod shared;
mod short_rows;
mod strips;
#[cfg(test)]
mod tests;

#[cfg(feature = "ndarray")]
pub use arrays::{log_softmax_axis, log_softmax_axis_in_place, logsumexp_axis, softmax_axis, softmax_axis_in_place};
pub use axis::Axis;
#[cfg(feature = "capi")]
pub(crate) use axis_loop::is_parallel;
pub use backward_calls::{
    log_softmax_backward_in_place, log_softmax_backward_into, logsumexp_backward_into, softmax_backward_in_place,
    softmax_backward_into,
};
pub use cross_entropy::{cross_entropy, cross_entropy_gradient_into, cross_entropy_into};
pub use cross_entropy_options::{CrossEntropy, Reduction};
pub use exponential::{exp_in_place, exp_into};
pub(crate) use forward_calls::plain;
pub use forward_calls::{
    log_softmax, log_softmax_in_place, log_softmax_into, logsumexp, logsumexp_into, softmax, softmax_in_place,
    softmax_into,
};
pub use masked::Softmax;
pub use number::Number;
pub use row_state::RowState;
