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
use crate::kv::KeysValues;
use crate::problem::{Dims, Problem, check_scores_size};
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
/// Shapes and edge rules are those of [`Attention`]. Level, form and threads are ignored. Rows of the output that belong to no
/// sequence are 0.
///
/// ```
/// use flashtile::{Attention, TensorRef, reference};
///
/// // One query that sees the first of two keys: it gets that key's value, for any scores.
/// let q = TensorRef::from_slice(&[1.0f32, 0.0], [1, 1, 1, 2])?;
/// let k = TensorRef::from_slice(&[1.0f32, 0.0, 5.0, 5.0], [1, 1, 2, 2])?;
/// let v = TensorRef::from_slice(&[10.0f32, 20.0], [1, 1, 2, 1])?;
/// let options = Attention::new().causal().query_offset(flashtile::QueryOffset::FromStart);
/// assert_eq!(reference::attention(&options, q, (k, v))?.out, [10.0]);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// # Errors
/// Those of [`Attention::run_into`], and [`Error::TooLarge`].
pub fn attention<'t>(
    options: &Attention<'t>,
    q: impl Into<AnyTensorRef<'t>>,
    kv: impl Into<KeysValues<'t>>,
) -> Result<Reference, Error> {
    let problem = Problem::new(&options.options, q.into(), kv.into())?;
    let shape = problem.output_shape();
    let [.., value_dim] = shape;
    let mut result = Reference { out: zeros(shape.into_iter())?, lse: zeros(problem.lse_shape().into_iter())?, shape };
    for [b, h] in heads(&problem) {
        let sequence = problem.sequences.get(b);
        let mut scores = zeros([sequence.keys].into_iter())?;
        let keys = widen((&problem, &problem.k), b, h)?;
        let values = widen((&problem, &problem.v), b, h)?;
        for i in 0..sequence.queries {
            let row = place(&problem, [b, h, i]);
            let visible;
            (visible, result.lse[row]) = row_probabilities(&problem, [b, h, i], &keys, &mut scores);
            let out = &mut result.out[row * value_dim..][..value_dim];
            for j in visible {
                let value = &values[j * value_dim..][..value_dim];
                out.iter_mut().zip(value).for_each(|(out, value)| *out += scores[j] * value);
            }
        }
    }
    Ok(result)
}

/// Computes the sums of each key's probabilities by the definition, `[batch, heads_q, seq_kv]`: those of
/// [`Attention::key_sums`].
///
/// ```text
/// sums[b,h,j] = sum_i exp(score[b,h,i,j] - lse[b,h,i])        for every query i that sees key j
/// ```
///
/// # Errors
/// Those of [`Attention::run_into`], and [`Error::TooLarge`].
pub fn key_sums<'t>(
    options: &Attention<'t>,
    q: impl Into<AnyTensorRef<'t>>,
    kv: impl Into<KeysValues<'t>>,
) -> Result<Vec<f64>, Error> {
    let problem = Problem::new(&options.options, q.into(), kv.into())?;
    let [batch, heads_q, _, seq_kv] = problem.dims.scores_shape();
    let mut result = zeros([batch, heads_q, seq_kv].into_iter())?;
    for [b, h] in heads(&problem) {
        let sequence = problem.sequences.get(b);
        let mut probabilities = zeros([sequence.keys].into_iter())?;
        let keys = widen((&problem, &problem.k), b, h)?;
        let sums = &mut result[(b * heads_q + h) * seq_kv + sequence.first_key..][..sequence.keys];
        for i in 0..sequence.queries {
            let (visible, _) = row_probabilities(&problem, [b, h, i], &keys, &mut probabilities);
            visible.into_iter().for_each(|j| sums[j] += probabilities[j]);
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
    let problem = Problem::of_scores(&options.options, [q.into(), k.into()])?.at_stage(stage);
    check_scores_size(problem.dims.scores_shape())?;
    let [batch, heads_q, seq_q, seq_kv] = problem.dims.scores_shape();
    if batch == 0 || heads_q == 0 || seq_q == 0 || seq_kv == 0 {
        return Ok(Vec::new()); // the other numbers are not limited
    }
    let mut result = zeros([batch, heads_q, seq_q, seq_kv].into_iter())?;
    for [b, h] in heads(&problem) {
        let keys = widen((&problem, &problem.k), b, h)?;
        let sequence = problem.sequences.get(b);
        for i in 0..sequence.queries {
            let row = ((b * heads_q + h) * seq_q + sequence.first_query + i) * seq_kv;
            let row = &mut result[row..row + seq_kv];
            if stage != ScoreStage::Probabilities {
                row.fill(f64::NEG_INFINITY); // of padding
            }
            let scores = &mut row[sequence.first_key..][..sequence.keys];
            row_scores(&problem, [b, h, i], &keys, stage, scores);
            if stage == ScoreStage::Probabilities {
                softmax(scores, sink(&problem, h));
            }
        }
    }
    Ok(result)
}

/// Every sequence and query head; none if there are no queries.
fn heads(problem: &Problem<'_>) -> impl Iterator<Item = [usize; 2]> + use<> {
    let Dims { batch, heads_q, seq_q, .. } = problem.dims;
    let batch = if heads_q == 0 || seq_q == 0 { 0 } else { batch }; // the number of sequences is not limited then
    (0..batch).flat_map(move |b| (0..heads_q).map(move |h| [b, h]))
}

/// The keys or values of a sequence that query head `h` reads, row by row.
fn widen((problem, tensor): (&Problem<'_>, &AnyTensor<'_>), b: usize, h: usize) -> Result<Vec<f64>, Error> {
    let ([.., cols], rows) = (tensor.shape(), problem.sequences.get(b).keys);
    let mut wide = zeros([rows, cols].into_iter())?;
    for j in 0..rows {
        let (index, row) = problem.places.of_key(b, j);
        for e in 0..cols {
            wide[j * cols + e] = tensor.at([index, h / problem.dims.group(), row, e]) as f64;
        }
    }
    Ok(wide)
}

/// The row of a query in the output.
fn place(problem: &Problem<'_>, [b, h, i]: [usize; 3]) -> usize {
    let (batch, first) = problem.sequences.queries.place(b);
    let [_, heads_q, queries, _] = problem.output_shape();
    (batch * heads_q + h) * queries + first + i
}

/// An array of zeros with these dimensions.
fn zeros(dimensions: impl Iterator<Item = usize>) -> Result<Vec<f64>, Error> {
    let too_large = Error::TooLarge { what: "what the reference computes in f64" };
    // A product that does not fit is more than any memory, like the largest number.
    let len = dimensions.fold(1, usize::saturating_mul);
    let mut list = Vec::new();
    list.try_reserve_exact(len).map_err(|_| too_large)?;
    list.resize(len, 0.0);
    Ok(list)
}

/// Writes the probabilities of one query. Returns the keys that it sees, and its log-sum-exp.
///
/// A hidden key is to be skipped, not multiplied by its probability of 0, because its value may be NaN.
fn row_probabilities(
    problem: &Problem<'_>,
    row: [usize; 3],
    keys: &[f64],
    probabilities: &mut [f64],
) -> (Vec<usize>, f64) {
    row_scores(problem, row, keys, ScoreStage::Biased, probabilities);
    let visible = (0..probabilities.len()).filter(|&j| probabilities[j] != f64::NEG_INFINITY).collect();
    let [_, h, _] = row;
    (visible, softmax(probabilities, sink(problem, h)))
}

/// Writes the scores of one query at a stage. For [`ScoreStage::Probabilities`] these are the scores before the softmax.
fn row_scores(problem: &Problem<'_>, row: [usize; 3], keys: &[f64], stage: ScoreStage, scores: &mut [f64]) {
    let [b, h, i] = row;
    let (mods, head_dim) = (&problem.score_mods, problem.dims.head_dim);
    let (sequence, (batch, first)) = (problem.sequences.get(b), problem.sequences.queries.place(b));
    let query: Vec<f64> = (0..head_dim).map(|e| problem.q.at([batch, h, first + i, e]) as f64).collect();
    for (j, score) in scores.iter_mut().enumerate() {
        let key = &keys[j * head_dim..][..head_dim];
        let dot = query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
        *score = mods.define(problem.scale as f64 * dot, &sequence, [h, i], j, stage);
        let shows_hidden = matches!(stage, ScoreStage::Raw | ScoreStage::Capped);
        if !(shows_hidden || (problem.masks.sees(&sequence, h, i, j) && mods.sees(&sequence, [h, i], j))) {
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
