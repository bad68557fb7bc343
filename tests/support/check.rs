//! Compares every element of a problem with the exact answer, at every level.

use super::any_problem::{Problem, Results};
use super::bound::{Chains, Exact, exact, round_to};
use flashtile::{DType, Level, Plan};

/// What the checks of some problems found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The largest part of its bound that an error took up: of f32 outputs, of those among them whose bound is below a
    /// thousandth of them, and of log-sum-exps. (Beyond that, scores are so large that the bound is the spread of the
    /// values, and an error may well be as large.)
    pub largest_ratio: [f64; 3],
    /// Bounds over the size of what they bound, one for each problem: the median of its f32 outputs.
    pub bounds: Vec<f64>,
    /// Outputs and log-sum-exps compared.
    pub elements: usize,
}

impl Found {
    pub fn add(&mut self, other: Found) {
        for (mine, other) in self.largest_ratio.iter_mut().zip(other.largest_ratio) {
            *mine = mine.max(other);
        }
        self.bounds.extend(other.bounds);
        self.elements += other.elements;
    }

    /// The median of the relative bounds.
    pub fn median_bound(&self) -> f64 {
        median(self.bounds.clone())
    }
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_unstable_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}

/// Computes `problem` at every level and compares every element with the exact answer.
pub fn check(problem: &Problem) -> Result<Found, String> {
    let mut found = Found::default();
    // The levels may differ in the form that the plan chooses, and so in their bounds.
    let mut answers: Vec<(Chains, Exact)> = Vec::new();
    for level in Level::available() {
        let plan = problem.plan(level);
        let chains = Chains::of(&plan, &problem.dims);
        if !answers.iter().any(|(known, _)| *known == chains) {
            answers.push((chains, exact(problem, chains)));
            check_reference(problem, &answers[answers.len() - 1].1)?;
        }
        let (_, exact) = answers.iter().find(|(known, _)| *known == chains).expect("just pushed");
        let results = problem.run(level);
        check_results(problem, &plan, exact, &results, &mut found).map_err(|error| format!("at {level}: {error}"))?;
    }
    let (_, exact) = &answers[0];
    let relative = exact.out.iter().zip(&exact.out_bound).filter(|(out, _)| **out != 0.0);
    found.bounds.push(median(relative.map(|(out, bound)| bound / out.abs()).filter(|x| x.is_finite()).collect()));
    Ok(found)
}

/// The public reference must agree with the oracle of these tests: two programs for one formula.
fn check_reference(problem: &Problem, exact: &Exact) -> Result<(), String> {
    let (out, lse) = problem.reference();
    let agree = |what: &str, ours: &[f64], theirs: &[f64], bounds: &[f64]| {
        if ours.len() != theirs.len() {
            return Err(format!("the reference has {} {what}s, not {}", theirs.len(), ours.len()));
        }
        for (n, (&ours, &theirs)) in ours.iter().zip(theirs).enumerate() {
            // f64 is 2^29 times finer than f32: a hundredth of the bound leaves room for long sums.
            let near = (ours - theirs).abs() <= bounds[n] * 0.01;
            let special = if ours.is_nan() { theirs.is_nan() } else { ours == f64::INFINITY && !theirs.is_finite() };
            if !(near || ours == theirs || special) {
                return Err(format!("{what} {n} of the reference is {theirs}, not {ours}"));
            }
        }
        Ok(())
    };
    agree("output", &exact.out, &out, &exact.out_bound)?;
    agree("lse", &exact.lse, &lse, &exact.lse_bound)
}

fn check_results(
    problem: &Problem,
    plan: &Plan,
    exact: &Exact,
    results: &Results,
    found: &mut Found,
) -> Result<(), String> {
    let (dtype, layout) = problem.out;
    for (n, index) in layout.indices().enumerate() {
        let (out, right, bound) = (results.out[n], exact.out[n], exact.out_bound[n]);
        let good = if right.is_nan() {
            out.is_nan()
        } else if right.is_infinite() {
            !out.is_finite()
        } else if dtype == DType::F32 {
            let ratio = if bound > 0.0 { (out - right).abs() / bound } else { 0.0 };
            found.largest_ratio[0] = found.largest_ratio[0].max(ratio);
            if bound < 1e-3 * right.abs() {
                found.largest_ratio[1] = found.largest_ratio[1].max(ratio);
            }
            (out - right).abs() <= bound
        } else {
            // Rounding is monotone: what correct rounding makes of some number within the bound.
            round_to(dtype, right - bound) <= out && out <= round_to(dtype, right + bound)
        };
        if !good {
            return Err(format!("out{index:?} is {out:e} but must be {right:e} within {bound:e}, as {dtype} ({plan})"));
        }
    }
    for (n, index) in problem.lse.indices().enumerate() {
        let (lse, right, bound) = (results.lse[n] as f64, exact.lse[n], exact.lse_bound[n]);
        let good = if right.is_finite() {
            found.largest_ratio[2] = found.largest_ratio[2].max((lse - right).abs() / bound);
            // A bound may be infinite; what is to be finite may not.
            lse.is_finite() && (lse - right).abs() <= bound
        } else {
            lse == right || lse.is_nan() && right.is_nan()
        };
        if !good {
            return Err(format!("lse{index:?} is {lse:e} but must be {right:e} within {bound:e} ({plan})"));
        }
    }
    found.elements += results.out.len() + results.lse.len();
    Ok(())
}
