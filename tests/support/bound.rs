//! The exact answer in f64 and the bound on a result's error, line by line as in `docs/numerics.md`.
//!
//! It is written from the formula, apart from `flashtile::reference`, so that the two check each other.

use super::Dims;
use super::any_problem::{Alibi, Offset, Problem};
use flashtile::mask::{Mask, Pair, Query};
use flashtile::{DType, Form, Plan, alibi_slope, bf16, f16};

/// The unit roundoff of f32.
pub const U: f64 = 1.0 / (1u64 << 24) as f64;
/// Pairs of bf16 take numbers below this for 0.
const FLUSHED: f64 = 1.1754943508222875e-38; // 2^-126
/// The largest element of a query whose scores are formed from pairs.
const LARGEST_IN_PAIR: f64 = 4_294_967_296.0; // 2^32
/// Half the smallest f32 above 0: the error of a rounding among the denormals.
const ETA: f64 = 7.006_492_321_624_085e-46; // 2^-150
/// Relative error of the constant log2(e) as f32, in units of U.
const LOG2_E: f64 = 0.225;
/// Relative error of 2^x, in units of U.
const EXP2: f64 = 3.0;
/// Relative error of tanh, in units of U.
const TANH: f64 = 8.0;
/// Probs below this part of the largest may be dropped: 2^-110.
const DROPPED: f64 = 7.703_719_777_548_943e-34;
/// The lowest bias that is a finite f32 in units of log2.
const LOWEST: f64 = -(f32::MAX as f64) * std::f64::consts::LN_2;
/// The oracle's own f64 arithmetic.
const F64: f64 = 1e-13;

/// `n u / (1 - n u)`: the relative error of n roundings one after the other.
fn gamma(n: f64) -> f64 {
    n * U / (1.0 - n * U)
}

/// The number of roundings that a summand passes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chains {
    /// The dot product of a query and a key.
    pub dot: usize,
    /// The sum over all keys of probs, or of probs times values.
    pub sum: usize,
}

impl Chains {
    /// As `plan` adds.
    pub fn of(plan: &Plan, dims: &Dims) -> Self {
        let mut chains = Self::of_form(plan, plan.form(), tile_keys(plan), dims);
        let mut also = |form, keys| {
            let other = Self::of_form(plan, form, keys, dims);
            chains = Chains { dot: chains.dot.max(other.dot), sum: chains.sum.max(other.sum) };
        };
        if plan.tail_rows() > 0 || plan.sequences(Form::Decode) > 0 {
            also(Form::Decode, DECODE_SPLIT_KEYS);
        }
        if plan.sequences(Form::Prefill) > 0 {
            PREFILL_TILE_KEYS.into_iter().for_each(|keys| also(Form::Prefill, keys));
        }
        chains
    }

    #[cfg_attr(not(feature = "_four-lanes"), allow(unused_variables, reason = "other levels have one bound"))]
    fn of_form(plan: &Plan, form: Form, keys: usize, dims: &Dims) -> Self {
        let sum = keys.min(dims.seq_kv) + dims.seq_kv.div_ceil(keys);
        match form {
            Form::Prefill => Chains { dot: dims.head_dim, sum },
            // One partial sum for each lane, then folded.
            #[cfg(feature = "_four-lanes")]
            _ if plan.level() == flashtile::Level::Portable4 => Chains { dot: dims.head_dim.div_ceil(4) + 2, sum },
            // Of 8 lanes, 16 lanes, and of pairs.
            _ => Chains { dot: dims.head_dim.div_ceil(8) + 4, sum },
        }
    }
}

/// The fewest and the most keys in one chain of the sum over keys, in prefill.
const PREFILL_TILE_KEYS: [usize; 2] = [48, 240];

/// Keys in one chain of the sum over keys, in decode.
const DECODE_SPLIT_KEYS: usize = 512;

/// Keys in one chain of the sum over keys: those of a split (decode) or a tile (prefill).
pub fn tile_keys(plan: &Plan) -> usize {
    plan.split_keys().unwrap_or(plan.tile_keys())
}

/// The answer and its bounds, rows without gaps.
#[derive(Debug, Default)]
pub struct Exact {
    /// `[batch, heads_q, seq_q, value_dim]`. NaN: must be NaN. Infinite: must not be finite. Rows of no query are 0.
    pub out: Vec<f64>,
    /// How far an f32 output may be from it.
    pub out_bound: Vec<f64>,
    /// `[batch, heads_q, seq_q]`
    pub lse: Vec<f64>,
    /// How far the log-sum-exp may be from it.
    pub lse_bound: Vec<f64>,
}

/// A score and a bound on its error, in natural units.
#[derive(Clone, Copy, Debug)]
struct Score {
    value: f64,
    error: f64,
}

/// A row's keys, once for all dimensions of the value.
struct Row {
    /// The visible keys, but for those whose score is -inf.
    keys: Vec<usize>,
    scores: Vec<Score>,
}

/// The number that stands for a sink among the keys of a row.
const SINK: usize = usize::MAX;

pub fn exact(problem: &Problem, chains: Chains) -> Exact {
    let dims = problem.dims;
    let mut exact = Exact::default();
    for (b, h) in heads(&dims) {
        let keys = kv_rows(&problem.k, [b, dims.head_kv(h)], [dims.seq_kv, dims.head_dim]);
        let values = kv_rows(&problem.v, [b, dims.head_kv(h)], [dims.seq_kv, dims.value_dim]);
        for i in 0..dims.seq_q {
            if i >= problem.queries_of(b) {
                add_constant(&mut exact, dims.value_dim, 0.0, 0.0);
                continue;
            }
            let mut row = row(problem, [b, h, i], &keys, chains.dot);
            if let Some(sink) =
                problem.sinks.as_ref().map(|sinks| sinks[h] as f64).filter(|sink| *sink != f64::NEG_INFINITY)
            {
                // A key whose value is 0. Its share is computed in f64 and rounded.
                row.keys.push(SINK);
                row.scores.push(Score { value: sink, error: 2.0 * U });
            }
            add_row(&mut exact, &row, &values, dims, chains.sum);
        }
    }
    exact
}

fn heads(dims: &Dims) -> impl Iterator<Item = (usize, usize)> + use<> {
    let Dims { batch, heads_q, .. } = *dims;
    (0..batch).flat_map(move |b| (0..heads_q).map(move |h| (b, h)))
}

/// All keys or values of a head.
fn kv_rows(tensor: &super::any_problem::Tensor, [b, h]: [usize; 2], [rows, cols]: [usize; 2]) -> Vec<f64> {
    let row = |j| (0..cols).map(move |e| tensor.get([b, h, j, e]) as f64);
    (0..rows).flat_map(row).collect()
}

/// The visible keys of a query, with their scores.
fn row(problem: &Problem, [b, h, i]: [usize; 3], keys: &[f64], dot_steps: usize) -> Row {
    let Dims { head_dim, seq_kv, .. } = problem.dims;
    let query: Vec<f64> = (0..head_dim).map(|e| problem.q.get([b, h, i, e]) as f64).collect();
    let visible = (0..seq_kv).filter(|&j| sees(problem, [b, h, i, j]));
    let scored =
        visible.map(|j| (j, score(problem, [b, h, i, j], &query, &keys[j * head_dim..][..head_dim], dot_steps)));
    // A score of -inf (of an infinite key: finite ones give finite scores here) hides its key.
    let (keys, scores) = scored.filter(|(_, score)| score.value != f64::NEG_INFINITY).unzip();
    Row { keys, scores }
}

/// Probs below 2^-126 are dropped.
const SMALLEST_PROBABILITY: f64 = 1.1754943508222875e-38;

/// The sums of each key's probabilities, `[batch, heads_q, seq_kv]`, and how far they may be from them, given log-sum-exps within
/// the bounds of `exact`. NaN: must be NaN.
pub fn exact_key_sums(problem: &Problem, exact: &Exact) -> (Vec<f64>, Vec<f64>) {
    let dims = problem.dims;
    let (mut sums, mut bounds) = (Vec::new(), Vec::new());
    // The longest chains of either form. A sum passes through one rounding for each query, or fewer and those of a vector's lanes.
    let dot_steps = dims.head_dim.max(dims.head_dim.div_ceil(4) + 4);
    let rounding = gamma(dims.seq_q as f64 + 6.0) + F64;
    for (n, (b, h)) in heads(&dims).enumerate() {
        let keys = kv_rows(&problem.k, [b, dims.head_kv(h)], [dims.seq_kv, dims.head_dim]);
        let (mut own, mut errors) = (vec![0.0; dims.seq_kv], vec![0.0; dims.seq_kv]);
        for i in 0..dims.seq_q {
            let (lse, lse_error) = (exact.lse[n * dims.seq_q + i], exact.lse_bound[n * dims.seq_q + i]);
            let row = row(problem, [b, h, i], &keys, dot_steps);
            // Relative to the largest score: a log-sum-exp of 1e38 has no room for the logarithm of a sum, in f64 either.
            let sink = problem.sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks[h] as f64);
            let largest = row.scores.iter().fold(sink, |largest, score| largest.max(score.value));
            let total =
                row.scores.iter().fold((sink - largest).exp(), |sum, score| sum + (score.value - largest).exp());
            for (j, score) in row.keys.into_iter().zip(row.scores) {
                let probability = (score.value - largest).exp() / total;
                own[j] += if lse.is_nan() { f64::NAN } else { probability };
                errors[j] += probability_error(probability, score, (lse, lse_error));
            }
        }
        let bound = |(sum, error): (&f64, &f64)| {
            error + rounding * (sum + error) + dims.seq_q as f64 * (SMALLEST_PROBABILITY + 2.0 * ETA)
        };
        bounds.extend(own.iter().zip(&errors).map(bound));
        sums.extend(own);
    }
    (sums, bounds)
}

/// The error of one probability. Both are between 0 and 1, so it is at most 1.
fn probability_error(probability: f64, score: Score, (lse, lse_error): (f64, f64)) -> f64 {
    // The lse in units of log2, and the difference, are rounded.
    let inexact = score.error + lse_error;
    let exponent = inexact + U * (lse.abs() + lse_error) + U * ((score.value - lse).abs() + inexact) + F64;
    match exponent {
        // p (e^F (1 + 3u) - 1), without the cancellation.
        ..1.0 => (probability * (exponent.exp_m1() + EXP2 * U * exponent.exp())).min(1.0),
        _ => 1.0,
    }
}

/// The key position of query `i`.
fn position(problem: &Problem, b: usize, i: usize) -> i128 {
    let offset = match &problem.offset {
        Offset::FromEnd => problem.keys_of(b) as i128 - problem.queries_of(b) as i128,
        Offset::FromStart => 0,
        Offset::At(offset) => *offset as i128,
        Offset::PerBatch(offsets) => offsets[b] as i128,
    };
    offset + i as i128
}

/// The pair as masks and score modifications see it. (They are given to problems alone whose positions fit.)
fn pair(problem: &Problem, [b, h, i, j]: [usize; 4]) -> Pair {
    Query::new(b, h, i, problem.offset_of(b)).with_key(j)
}

/// Whether the pair is visible, by the table of what each option means.
pub fn sees(problem: &Problem, [b, h, i, j]: [usize; 4]) -> bool {
    let distance = position(problem, b, i) - j as i128; // above 0: the key comes before the query
    let (left, right) = problem.window;
    let padding = i >= problem.queries_of(b) || j >= problem.keys_of(b) || problem.lost(b).contains(&j);
    let hidden = padding
        || problem.causal && distance < 0
        || left.is_some_and(|left| distance > left as i128)
        || right.is_some_and(|right| -distance > right as i128)
        || problem.mask.as_ref().is_some_and(|mask| !mask.get([b, h, i, j]))
        || problem.bias.as_ref().is_some_and(|bias| bias.get([b, h, i, j]) == f32::NEG_INFINITY)
        || problem.masks.iter().any(|mask| !mask.sees(pair(problem, [b, h, i, j])));
    !hidden
}

/// The score of a visible pair: each step's value, and the error so far.
fn score(problem: &Problem, [b, h, i, j]: [usize; 4], query: &[f64], key: &[f64], dot_steps: usize) -> Score {
    let (mut dot, mut products, mut keys, mut flushed) = (0.0, 0.0, 0.0, 0.0);
    for (q, k) in query.iter().zip(key) {
        dot += q * k;
        products += (q * k).abs();
        keys += k.abs();
        flushed += FLUSHED * q.abs().min(LARGEST_IN_PAIR);
    }
    // Roundings in a chain, and all that there are.
    let (n, roundings) = (dot_steps as f64, 2.0 * query.len() as f64 + 1.0);
    let scale = problem.scale.unwrap_or(1.0 / (query.len().max(1) as f32).sqrt()) as f64;
    let denormal = ETA * (products + keys + roundings) * 1.001;
    // (What only scores of bf16 may lose, allowed to all: it is far smaller than their other errors.)
    flushed += FLUSHED * roundings;
    // 1. scale * dot, or tanh(scale * dot / cap) * cap.
    let (mut value, mut error, mut size);
    match problem.softcap {
        None => {
            value = scale * dot;
            size = scale.abs() * products;
            error = gamma(n + 2.0 + LOG2_E) * size + denormal + scale.abs() * flushed;
        }
        Some(cap) => {
            let cap = cap as f64;
            let y = scale / cap * dot;
            let y_error =
                (gamma(n + 2.0) + F64) * (scale / cap).abs() * products + denormal + (scale / cap).abs() * flushed;
            let flattest = (y.abs() - y_error).max(0.0).tanh();
            let slope = 1.0 - flattest * flattest + F64;
            let tanh_error = gamma(TANH) * (y.tanh().abs() + ETA) + (y_error * slope).min(2.0) * (1.0 + gamma(TANH));
            value = cap * y.tanh();
            size = value.abs();
            error = cap * tanh_error + gamma(2.0 + LOG2_E) * cap * (y.tanh().abs() + tanh_error) + ETA;
        }
    }
    // 2. The additive bias.
    if let Some(tensor) = &problem.bias {
        let bias = tensor.get([b, h, i, j]) as f64;
        value += bias;
        size += bias.abs();
        // (Held within the range of f32, in units of log2.)
        error += (LOWEST - bias).max(0.0) + gamma(1.0 + LOG2_E) * bias.abs();
        error += U * (value.abs() + error) + 2.0 * ETA;
    }
    // 3. ALiBi.
    let slope = problem.alibi.as_ref().map(|alibi| match alibi {
        Alibi::Standard => alibi_slope(h, problem.dims.heads_q) as f64,
        Alibi::PerHead(slopes) => slopes[h] as f64,
        Alibi::PerBatchAndHead(slopes) => slopes[b * problem.dims.heads_q + h] as f64,
    });
    if let Some(slope) = slope {
        let distance = (position(problem, b, i) - j as i128).unsigned_abs() as f64;
        let step = slope * distance;
        value -= step;
        size += step.abs();
        error += (slope.abs() + LOWEST).max(0.0) * distance + gamma(4.0 + LOG2_E) * step.abs();
        error += U * (value.abs() + error) + 2.0 * ETA;
    }
    // 4. Users' modifications, in f32 and natural units.
    for score_mod in &problem.score_mods {
        let bias = score_mod.bias(pair(problem, [b, h, i, j]));
        value = score_mod.factor * value + bias;
        size = score_mod.factor.abs() * size + bias.abs();
        error = score_mod.factor.abs() * error + gamma(4.0) * (size + error) + 2.0 * ETA;
    }
    if !problem.score_mods.is_empty() {
        error += gamma(1.0 + LOG2_E) * (value.abs() + error) + 2.0 * ETA;
        // (Held within the range of f32, in units of log2.)
        error += (value.abs() + LOWEST).max(0.0);
    }
    Score { value, error: error + F64 * size }
}

/// A row of one number, without an error.
fn add_constant(exact: &mut Exact, value_dim: usize, out: f64, lse: f64) {
    exact.out.extend(std::iter::repeat_n(out, value_dim));
    exact.out_bound.extend(std::iter::repeat_n(0.0, value_dim));
    exact.lse.push(lse);
    exact.lse_bound.push(0.0);
}

fn add_row(exact: &mut Exact, row: &Row, values: &[f64], Dims { value_dim, seq_kv, .. }: Dims, sum_steps: usize) {
    let undefined = row.scores.iter().any(|score| score.value.is_nan() || score.value == f64::INFINITY);
    if let ([SINK], [sink]) = (&row.keys[..], &row.scores[..]) {
        return add_constant(exact, value_dim, 0.0, sink.value);
    }
    if row.keys.is_empty() || undefined {
        let (out, lse) = if undefined { (f64::NAN, f64::NAN) } else { (0.0, f64::NEG_INFINITY) };
        return add_constant(exact, value_dim, out, lse);
    }
    let visible = row.keys.len() as f64;
    let largest = row.scores.iter().copied().reduce(|a, b| if a.value < b.value { b } else { a }).expect("a key");
    let total = row.scores.iter().map(|score| (score.value - largest.value).exp()).sum::<f64>();
    let lse = largest.value + total.ln();

    // Each key's share p, and what it may have grown or shrunk to before the division by the sum of all.
    let (exp2, mut least, mut most) = (EXP2 * U, 0.0, 0.0);
    let (mut shares, mut moved, mut grown, mut beside) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for score in &row.scores {
        let log_share = score.value - largest.value - total.ln();
        let share = log_share.exp();
        let high = (log_share + score.error).exp() * (1.0 + exp2);
        least += (log_share - score.error).exp() * (1.0 - exp2);
        most += high;
        shares.push(share);
        grown.push(high);
        // p (e^E (1 + 3u) - 1), without the cancellation.
        moved.push(if score.error < 1.0 { share * (score.error.exp_m1() + exp2 * score.error.exp()) } else { high });
        let ratio = (score.value - largest.value + score.error + largest.error).exp() * (1.0 + 3.0 * exp2);
        beside.push(ratio.min(1.0));
    }

    let rounding = gamma(2.0 * sum_steps as f64 + 2.0) + F64;
    let denormal = (4.0 * seq_kv as f64 + 4.0) * ETA * (1u64 << 9) as f64;
    for d in 0..value_dim {
        let value = |&j: &usize| if j == SINK { 0.0 } else { values[j * value_dim + d] };
        let out = row.keys.iter().map(value).zip(&shares).map(|(value, share)| value * share).sum::<f64>();
        let (mut by_move, mut by_growth, mut by_ratio, mut farthest) = (0.0, 0.0, 0.0, 0.0f64);
        for (n, value) in row.keys.iter().map(value).enumerate() {
            let away = (value - out).abs();
            if away > 0.0 {
                by_move += moved[n] * away;
                by_growth += grown[n] * away;
                by_ratio += beside[n] * away;
                farthest = farthest.max(away);
            }
        }
        // Where an error is too large for one bound, another holds; f64::min passes over a NaN of inf / inf.
        let spread = (by_growth / least).min(by_ratio).min(farthest);
        let by_probs = (by_move / least).min(spread);
        let bound = by_probs + rounding * (out.abs() + spread) + DROPPED * visible * farthest + denormal;
        if row.keys.iter().map(value).any(f64::is_infinite) && !row.keys.iter().map(value).any(f64::is_nan) {
            // Times a prob, infinity; times a prob that has become 0, NaN.
            exact.out.push(f64::INFINITY);
        } else {
            exact.out.push(out);
        }
        exact.out_bound.push(if out.is_finite() { bound } else { 0.0 });
    }
    let by_scores = most.ln().max(-least.ln());
    exact.lse.push(lse);
    let before_rounding = by_scores + gamma(sum_steps as f64 + EXP2) + 2.0 * DROPPED * visible;
    exact.lse_bound.push(before_rounding * (1.0 + U) + (U + F64) * lse.abs() + F64);
}

/// The f32 nearest to `x` but never a tie that `x` is not: rounding the result to a shorter type rounds `x` itself.
pub fn round_to_odd(x: f64) -> f32 {
    let near = x as f32;
    if near as f64 == x || x.is_nan() || near.to_bits() & 1 == 1 {
        return near;
    }
    // Inexact and even: the odd neighbour on the other side of x.
    let up = (near as f64) < x;
    match (near.is_infinite(), up) {
        (true, _) => f32::MAX.copysign(near), // odd
        (_, true) => near.next_up(),
        (_, false) => near.next_down(),
    }
}

/// `x` rounded once to `dtype`.
pub fn round_to(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(round_to_odd(x)).to_f64(),
        DType::Bf16 => bf16::from_f32(round_to_odd(x)).to_f64(),
        _ => x as f32 as f64,
    }
}
