//! Merges the attention over disjoint sets of keys.

#![forbid(unsafe_code)]

use crate::error::Error;
use crate::problem::check_shape;
use crate::tensor::{TensorMut, TensorRef};

/// Merges the attention over other keys, `(out_b, lse_b)`, into `(out_a, lse_a)`.
///
/// For each query, with `w = exp(lse_a) + exp(lse_b)`, computed without overflow:
///
/// ```text
/// out_a = (exp(lse_a) * out_a + exp(lse_b) * out_b) / w          lse_a = log w
/// ```
///
/// The result is the attention over both sets of keys. So a shared prefix is computed once for many sequences, or keys are
/// divided over machines.
///
/// Merging is associative and commutative within rounding. The attention over no keys, `(0, -inf)`, is the identity, bit for
/// bit, on either side. If an lse is -inf, that side's output is not read. If both are -inf, `out_a` becomes exactly 0.
///
/// * `out_a`, `out_b`: `[batch, heads, seq_q, value_dim]`, f32
/// * `lse_a`, `lse_b`: `[batch, heads, seq_q]`, f32, natural logarithms, as from
///   [`Attention::compute`](crate::Attention::compute)
///
/// ```
/// use flashtile::{TensorMut, TensorRef, merge};
///
/// // One query over one key each, with scores ln 3 and ln 1: probabilities 3/4 and 1/4.
/// let (mut out, mut lse) = ([8.0f32], [3.0f32.ln()]);
/// merge(
///     TensorMut::from_slice(&mut out, [1, 1, 1, 1])?,
///     TensorMut::from_slice(&mut lse, [1, 1, 1])?,
///     TensorRef::from_slice(&[4.0], [1, 1, 1, 1])?,
///     TensorRef::from_slice(&[0.0], [1, 1, 1])?,
/// )?;
/// assert_eq!((out[0], lse[0]), (7.0, 4.0f32.ln()));
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// # Errors
/// * [`Error::ShapeMismatch`] if shapes differ
/// * [`Error::Rank`] for an `out_b` of rank 3 or less
pub fn merge<'t>(
    out_a: impl Into<TensorMut<'t, f32>>,
    lse_a: impl Into<TensorMut<'t, f32, 3>>,
    out_b: impl Into<TensorRef<'t, f32>>,
    lse_b: impl Into<TensorRef<'t, f32, 3>>,
) -> Result<(), Error> {
    let (mut out_a, mut lse_a, out_b, lse_b) = (out_a.into(), lse_a.into(), out_b.into(), lse_b.into());
    let shape = out_a.shape();
    let [batch, heads, queries, _] = shape;
    if out_b.original_rank() != 4 {
        return Err(Error::Rank { tensor: "output to merge", expected: 4, got: out_b.original_rank() });
    }
    const NAMES: [&str; 4] = ["batch", "heads", "seq_q", "value_dim"];
    check_shape("output to merge", NAMES, out_b.shape(), shape)?;
    for lse in [lse_a.shape(), lse_b.shape()] {
        check_shape("lse", ["batch", "heads", "seq_q"], lse, [batch, heads, queries])?;
    }
    if lse_a.shape().contains(&0) {
        return Ok(()); // no rows; the other dimensions are not limited
    }
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        let from = out_b.strided.matrix(b, h);
        for (i, lse) in lse_a.strided.row_mut([b, h]).iter_mut().enumerate() {
            let other = lse_b.get([b, h, i]).unwrap_or(f32::NEG_INFINITY);
            let (share_a, share_b, merged) = shares(*lse, other);
            *lse = merged;
            if share_b == 0.0 && merged != f32::NEG_INFINITY {
                continue;
            }
            let mut to = out_a.strided.row_mut([b, h, i]);
            if share_b == 0.0 {
                // No keys on either side. `out_a` may hold stale data.
                to.iter_mut().for_each(|a| *a = 0.0);
                continue;
            }
            for (a, b) in to.iter_mut().zip(from.row(i).iter()) {
                *a = if share_a == 0.0 { b } else { (share_a * *a as f64 + share_b * b as f64) as f32 };
            }
        }
    }
    Ok(())
}

/// The shares of both sides, and the log-sum-exp of their union. A share is exactly 0 only for an lse of -inf; that side's
/// output is not read.
fn shares(a: f32, b: f32) -> (f64, f64, f32) {
    if b == f32::NEG_INFINITY {
        return (1.0, 0.0, a);
    }
    if a == f32::NEG_INFINITY {
        return (0.0, 1.0, b);
    }
    let (a, b) = (a as f64, b as f64);
    let max = a.max(b);
    let (share_a, share_b) = ((a - max).exp(), (b - max).exp());
    let sum = share_a + share_b;
    // Not `f64::max`, which would return `MIN_POSITIVE` for NaN.
    let above_zero = |x: f64| if x < f64::MIN_POSITIVE { f64::MIN_POSITIVE } else { x };
    (above_zero(share_a / sum), above_zero(share_b / sum), (max + sum.ln()) as f32)
}
