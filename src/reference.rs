//! The definition of attention: the formula in f64, one pair of query and key after the other.
//!
//! ```text
//! score[i,j] = mods( softcap( scale * dot(q[i], k[j]) ) + bias[i,j] - slope * |p - j| )      for every key j that query i may see
//! lse[i]     = log (exp(sink) + sum_j exp(score[i,j]))                                     exp(sink) is 0 without sinks
//! out[i]     = sum_j exp(score[i,j] - lse[i]) * v[j]
//! ```
//!
//! It takes the same options as [`Attention`], and the fast path is tested against it. It is slow, short, and public, so that
//! you can test against it, too. Besides its results it holds the keys and values of one head in f64, and one row of scores.
//! If there is no memory for these, it returns [`Error::TooLarge`].

#![forbid(unsafe_code)]

use crate::attention::Attention;
use crate::error::Error;
use crate::problem::{Dims, Problem};
use crate::score::ScoreStage;
use crate::tensor::AnyTensorRef;
use crate::tensor::any::AnyTensor;

/// The results of [`attention`]: f64, row by row without gaps.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// The output, `[batch, heads_q, seq_q, value_dim]`.
    pub out: Vec<f64>,
    /// The log-sum-exps, natural logarithm, `[batch, heads_q, seq_q]`; -inf for a query that sees no key.
    pub lse: Vec<f64>,
    /// The shape of `out`.
    pub shape: [usize; 4],
}

/// Computes attention by the definition.
///
/// Shapes and edge rules are those of [`Attention`]. Level, form and threads are ignored.
///
/// ```
/// use flashtile::{Attention, TensorRef, reference};
///
/// // One query that sees the first of two keys: it gets that key's value, for any scores.
/// let q = TensorRef::from_slice(&[1.0f32, 0.0], [1, 1, 1, 2])?;
/// let k = TensorRef::from_slice(&[1.0f32, 0.0, 5.0, 5.0], [1, 1, 2, 2])?;
/// let v = TensorRef::from_slice(&[10.0f32, 20.0], [1, 1, 2, 1])?;
/// let options = Attention::new().causal().query_offset(flashtile::QueryOffset::FromStart);
/// assert_eq!(reference::attention(&options, q, k, v)?.out, [10.0]);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// # Errors
/// Those of [`Attention::run_into`], and [`Error::TooLarge`].
pub fn attention<'t>(
    options: &Attention<'t>,
    q: impl Into<AnyTensorRef<'t>>,
    k: impl Into<AnyTensorRef<'t>>,
    v: impl Into<AnyTensorRef<'t>>,
) -> Result<Reference, Error> {
    let problem = Problem::new(&options.options, [q.into(), k.into(), v.into()])?;
    let shape = problem.dims.output_shape();
    let [.., value_dim] = shape;
    let mut result = Reference { out: Vec::new(), lse: Vec::new(), shape };
    let (mut scores, mut visible) = (Vec::new(), Vec::new());
    for [b, h] in heads(&problem) {
        scores.clear();
        visible.clear();
        reserve(&mut scores, problem.dims.seq_kv)?;
        reserve(&mut visible, problem.dims.seq_kv)?;
        scores.resize(problem.dims.seq_kv, 0.0);
        let keys = widen(&problem.k, b, h / problem.dims.group())?;
        let values = widen(&problem.v, b, h / problem.dims.group())?;
        for i in 0..problem.dims.seq_q {
            row_scores(&problem, [b, h, i], &keys, ScoreStage::Biased, &mut scores);
            // A hidden key is skipped, not multiplied by its probability of 0, because its value may be NaN.
            visible.clear();
            visible.extend(scores.iter().map(|&score| score != f64::NEG_INFINITY));
            reserve(&mut result.lse, 1)?;
            reserve(&mut result.out, value_dim)?;
            result.lse.push(softmax(&mut scores, sink(&problem, h)));
            let (probs, mut out) = (&scores, vec![0.0; value_dim]);
            for j in (0..probs.len()).filter(|&j| visible[j]) {
                let value = &values[j * value_dim..][..value_dim];
                out.iter_mut().zip(value).for_each(|(out, value)| *out += probs[j] * value);
            }
            result.out.extend(out);
        }
    }
    Ok(result)
}

/// Computes the scores at a stage by the definition, `[batch, heads_q, seq_q, seq_kv]`.
///
/// # Errors
/// Those of [`Attention::run_into`], and [`Error::TooLarge`].
pub fn scores<'t>(
    options: &Attention<'t>,
    stage: ScoreStage,
    q: impl Into<AnyTensorRef<'t>>,
    k: impl Into<AnyTensorRef<'t>>,
) -> Result<Vec<f64>, Error> {
    let problem = Problem::of_scores(&options.options, [q.into(), k.into()])?;
    let mut result = Vec::new();
    if problem.dims.seq_kv == 0 {
        return Ok(result); // the number of queries is not limited
    }
    let mut row_of_scores = Vec::new();
    for [b, h] in heads(&problem) {
        row_of_scores.clear();
        reserve(&mut row_of_scores, problem.dims.seq_kv)?;
        row_of_scores.resize(problem.dims.seq_kv, 0.0);
        let keys = widen(&problem.k, b, h / problem.dims.group())?;
        for i in 0..problem.dims.seq_q {
            reserve(&mut result, problem.dims.seq_kv)?;
            row_scores(&problem, [b, h, i], &keys, stage, &mut row_of_scores);
            if stage == ScoreStage::Probabilities {
                softmax(&mut row_of_scores, sink(&problem, h));
            }
            result.extend_from_slice(&row_of_scores);
        }
    }
    Ok(result)
}

/// Every batch and query head; none if there are no queries.
fn heads(problem: &Problem<'_>) -> impl Iterator<Item = [usize; 2]> + use<> {
    let Dims { batch, heads_q, seq_q, .. } = problem.dims;
    let batch = if heads_q == 0 || seq_q == 0 { 0 } else { batch }; // the number of batches is not limited then
    (0..batch).flat_map(move |b| (0..heads_q).map(move |h| [b, h]))
}

/// The keys or values of one head, row by row.
fn widen(tensor: &AnyTensor<'_>, b: usize, h: usize) -> Result<Vec<f64>, Error> {
    let [.., rows, cols] = tensor.shape();
    let mut wide = Vec::new();
    // A product that does not fit is more than any memory, like the largest number.
    reserve(&mut wide, rows.saturating_mul(cols))?;
    wide.extend((0..rows).flat_map(|j| (0..cols).map(move |e| tensor.at([b, h, j, e]) as f64)));
    Ok(wide)
}

/// Makes room for `len` more elements.
fn reserve<T>(list: &mut Vec<T>, len: usize) -> Result<(), Error> {
    list.try_reserve(len).map_err(|_| Error::TooLarge { what: "what the reference computes in f64" })
}

/// Writes the scores of one query at a stage. For [`ScoreStage::Probabilities`] these are the scores before the softmax.
fn row_scores(problem: &Problem<'_>, row: [usize; 3], keys: &[f64], stage: ScoreStage, scores: &mut [f64]) {
    let [b, h, i] = row;
    let (mods, head_dim) = (&problem.score_mods, problem.dims.head_dim);
    let sequence = problem.sequences.get(b);
    let query: Vec<f64> = (0..head_dim).map(|e| problem.q.at([b, h, i, e]) as f64).collect();
    for (j, score) in scores.iter_mut().enumerate() {
        let key = &keys[j * head_dim..][..head_dim];
        let dot = query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
        *score = mods.define(problem.scale as f64 * dot, &sequence, [h, i], j, stage);
        let shows_hidden = matches!(stage, ScoreStage::Raw | ScoreStage::Capped);
        if !(shows_hidden || (problem.masks.sees(&sequence, h, i, j) && mods.sees(row, j))) {
            *score = f64::NEG_INFINITY;
        }
    }
}

/// The sink of a query head; without sinks -inf, which adds nothing.
fn sink(problem: &Problem<'_>, h: usize) -> f64 {
    problem.score_mods.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks.of_head(h) as f64)
}

/// Turns scores into probabilities and returns the log-sum-exp, in which the sink counts, too. If all of them are -inf,
/// probabilities are 0.
fn softmax(scores: &mut [f64], sink: f64) -> f64 {
    let max = scores.iter().copied().fold(sink, f64::max);
    // If all scores are -inf, nothing is subtracted. `max` skips a NaN, but the sum is NaN then.
    let shift = if max == f64::NEG_INFINITY { 0.0 } else { max };
    scores.iter_mut().for_each(|score| *score = (*score - shift).exp());
    let sum = scores.iter().sum::<f64>() + (sink - shift).exp();
    if sum != 0.0 {
        scores.iter_mut().for_each(|score| *score /= sum);
    }
    shift + sum.ln()
}
