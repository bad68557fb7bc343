//! Promise: every element of random problems is within the a-priori bound of `docs/numerics.md`. The problems cover every
//! option, layout, type, form and level.
//!
//! `FLASHTILE_PROBLEMS=1000` sets the number of small problems. `FLASHTILE_SEED_BASE=1000000` sets the first of their seeds (0 by
//! default). `FLASHTILE_SEED=17` runs and prints the problem of that seed alone: a failure names its seed.

mod support;

use flashtile::{Attention, DType, Form, Level};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use support::any_problem::{Broadcast, Problem, Tensor};
use support::bound::{Chains, exact, round_to};
use support::check::{Found, check};
use support::layouts::Layout;
use support::problems::forms_and_levels;
use support::random_problem::{large_dims, problem, small_dims};
use support::{Dims, Inputs, Rng};

#[test]
fn small_problems() {
    let count = number("FLASHTILE_PROBLEMS").unwrap_or(60_000);
    let found = check_seeds("small_problems", count, |rng| {
        let dims = small_dims(rng);
        problem(rng, dims)
    });
    assert!(found.largest_ratio.iter().all(|ratio| *ratio <= 1.0));
    // The bounds are tight: half of them are below 2e-5 of what they bound.
    assert_median_below(&found, 2e-5);
}

#[test]
fn large_problems() {
    // One per 400 small problems takes about a third of their time.
    let count = number("FLASHTILE_PROBLEMS").unwrap_or(60_000).div_ceil(400);
    let found = check_seeds("large_problems", count, |rng| {
        let dims = large_dims(rng);
        problem(rng, dims)
    });
    assert_median_below(&found, 2e-4);
}

/// The total error of outputs in a half type is at most 1.5 times that of the exact answer, rounded.
#[test]
fn half_outputs_are_rounded_once() {
    for dtype in [DType::F16, DType::Bf16] {
        let (mut ours, mut least) = (0.0f64, 0.0f64);
        for seed in 0..16 {
            let mut rng = Rng(seed);
            let dims = Dims {
                batch: 1,
                heads_q: 2,
                heads_kv: 2,
                seq_q: [1, 60][seed as usize % 2],
                seq_kv: 150 + 40 * seed as usize,
                head_dim: 64,
                value_dim: 64,
            };
            let mut problem = Problem::plain(dims, || rng.normal());
            problem.out.0 = dtype;
            let exact = exact(&problem, Chains::of(&problem.plan(Level::Portable), &dims));
            for level in Level::available() {
                for (out, right) in problem.run(level).out.iter().zip(&exact.out) {
                    ours = ours.max((out - right).abs());
                    least = least.max((round_to(dtype, *right) - right).abs());
                }
            }
        }
        println!("{dtype}: largest error {ours:e}, correctly rounded {least:e}");
        assert!(ours <= 1.5 * least, "{dtype}: {ours:e} against {least:e} when correctly rounded");
    }
}

/// With n keys of score 0, the log-sum-exp is the f32 nearest to ln n.
#[test]
fn the_lse_of_zero_scores_is_rounded_once() {
    let counts = || (1..260).chain([511, 512, 513, 1100]);
    for (form, seq_kv) in [Form::Decode, Form::Prefill].into_iter().flat_map(|f| counts().map(move |n| (f, n))) {
        let dims = Dims { batch: 1, heads_q: 1, heads_kv: 1, seq_q: 1, seq_kv, head_dim: 1, value_dim: 1 };
        let mut problem = Problem::plain(dims, || 0.0);
        problem.form = Some(form);
        for level in Level::available() {
            let (lse, exact) = (problem.run(level).lse[0], (seq_kv as f64).ln() as f32);
            assert_eq!(lse, exact, "{seq_kv} keys: {form:?} {level}");
        }
    }
}

/// Adversarial values in both forms, with more keys than two tiles or splits and more queries than a panel.
#[test]
fn adversarial_values() {
    for form in [Form::Decode, Form::Prefill] {
        for seed in 0..8 {
            let with = |name: &str, scale: f32, key: &mut dyn FnMut(usize, &mut Rng) -> f32, value: f32| {
                let mut problem = adversarial(form, seed, scale, key, value);
                check(&problem).unwrap_or_else(|error| panic!("{name}: {error}\n{problem}"));
                problem.causal = true;
                check(&problem).unwrap_or_else(|error| panic!("{name}, causal: {error}\n{problem}"));
            };
            with("scores of 1e4", 1e4, &mut |_, rng| rng.normal(), 1.0);
            with("scores of 1e7, beyond where the running maximum is exact", 1e7, &mut |_, rng| rng.normal(), 1.0);
            with("scores of 1e30", 1e30, &mut |_, rng| rng.normal(), 1.0);
            with("scores of 1e38", 1e37, &mut |_, rng| rng.normal().clamp(-3.0, 3.0), 1.0);
            with("a maximum that moves in every tile", 1.0, &mut |j, _| 0.5 * j as f32, 1.0);
            with("a maximum that moves slowly", 1.0, &mut |j, _| 0.01 * j as f32, 1.0);
            with("a maximum that never moves again", 1.0, &mut |j, _| -0.5 * j as f32, 1.0);
            with("steps of 1e7", 1.0, &mut |j, _| 1e7 * (j / 48) as f32, 1.0);
            with("one key at the end above all", 1.0, &mut |j, _| if j == LAST { 200.0 } else { 0.0 }, 1.0);
            with("one key at the end beyond all", 1.0, &mut |j, _| if j == LAST { 1e6 } else { -1e6 }, 1.0);
            with("equal scores", 1.0, &mut |_, _| 3.0, 1.0);
            with("equal scores, tiny values", 1.0, &mut |_, _| 3.0, 1e-38);
            with("denormal values", 1.0, &mut |_, rng| rng.normal(), 1e-42);
            with("denormal scores", 1e-42, &mut |_, rng| rng.normal(), 1.0);
            with("values near the end of the range", 1.0, &mut |_, rng| rng.normal(), 1e34);
        }
    }
}

/// Keys that differ by position alone (`key(j)` times the query's part) plus a little noise, and queries of about 1.
fn adversarial(form: Form, seed: u64, scale: f32, key: &mut dyn FnMut(usize, &mut Rng) -> f32, value: f32) -> Problem {
    let (rng, dims) = (&mut Rng(seed), ADVERSARIAL);
    let mut problem = Problem::plain(dims, || value * rng.normal());
    let [q, k] = [dims.q(), dims.k()].map(Layout::contiguous);
    // The first element carries the score. It is 1 in all queries, so that they all see the same.
    problem.q = Tensor::new(DType::F32, q, |[.., e]| if e == 0 { 1.0 } else { 0.01 * rng.normal() });
    problem.k = Tensor::new(DType::F32, k, |[.., j, e]| if e == 0 { key(j, rng) } else { 0.01 * rng.normal() });
    (problem.scale, problem.form) = (Some(scale), Some(form));
    problem
}

const ADVERSARIAL: Dims =
    Dims { batch: 1, heads_q: 2, heads_kv: 1, seq_q: 12, seq_kv: 1030, head_dim: 4, value_dim: 5 };
const LAST: usize = 1029;

/// Values just below 2^120 / seq_kv, where probs are as large as they get: the later keys' scores are larger by just less than what
/// moves the maximum, or so large that its distance from them is rounded away.
#[test]
fn values_near_the_limit_do_not_overflow() {
    let dims = Dims { value_dim: 16, ..Dims::new(1, 4, 480, 1) };
    let largest = 2f32.powi(120) / dims.seq_kv as f32 * 0.99;
    for later in [0.0, 5.5, 1e9, 1e30] {
        let first = if later > 1e3 { later } else { 0.0 };
        let k: Vec<f32> = (0..dims.seq_kv).map(|j| if j < 240 { first } else { later }).collect();
        let inputs = Inputs::<f32> { dims, q: vec![1.0; 4], k, v: vec![largest; 16 * dims.seq_kv] };
        for (form, level) in forms_and_levels() {
            let (out, _) = inputs.compute(&Attention::new().scale(1.0).form(form).level(level));
            let wrong = out.iter().find(|out| (**out / largest - 1.0).abs() > 1e-4);
            assert!(wrong.is_none(), "{wrong:?} for {largest:e}, scores of {later}: {form:?} {level}");
        }
    }
}

/// Models write -1e9 or the lowest finite number for "hidden". In a row of nothing else, every score rounds to that number.
/// The row's output is the mean of the values, not the 0 of a row that sees no key.
#[test]
fn rows_of_one_huge_bias_are_uniform() {
    for (form, level) in [Form::Decode, Form::Prefill].into_iter().flat_map(|f| Level::available().map(move |l| (f, l)))
    {
        for (dtype, bias) in [
            (DType::F32, -1e9),
            (DType::F32, 1e9),
            (DType::F32, -1e30),
            (DType::F32, f32::MIN),
            (DType::Bf16, f32::MIN), // held to the lowest bf16
        ] {
            let rng = &mut Rng(1);
            let mut problem = Problem::plain(ADVERSARIAL, || rng.normal());
            let rows = Layout::contiguous([1, 1, ADVERSARIAL.seq_q, ADVERSARIAL.seq_kv]);
            // Two rows of ordinary bias between the others: a maximum far away must not leak into its neighbours.
            let tensor = Tensor::new(dtype, rows, |[.., i, _]| if i % 5 == 2 { 0.5 } else { bias });
            problem.bias = Some(Broadcast { rank: 4, tensor });
            problem.form = Some(form);
            check(&problem).unwrap_or_else(|error| panic!("{bias:e}: {error}\n{problem}"));
            let results = problem.run(level);
            let (dims, keys) = (ADVERSARIAL, ADVERSARIAL.seq_kv);
            for (n, [b, h, i, d]) in problem.out.1.indices().enumerate().filter(|(_, [.., i, _])| i % 5 != 2) {
                let mean = (0..keys).map(|j| problem.v.get([b, 0, j, d]) as f64).sum::<f64>() / keys as f64;
                let out = results.out[n];
                assert!((out - mean).abs() < 1e-6, "{level} {form:?} {dtype} {bias:e}: {out} for the mean {mean}");
                assert!(results.lse[h * dims.seq_q + i].is_finite());
            }
        }
    }
}

/// Bounds must not be so wide that anything passes. Some single problems may have wide ones.
fn assert_median_below(found: &Found, most: f64) {
    let median = found.median_bound();
    assert!(found.bounds.len() < 100 || median < most, "the median of the relative bounds is {median:e}");
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?} but must be a number")))
}

/// Checks the problems that `make` makes of `count` seeds from the base on, on every core, or of the seed given.
fn check_seeds(test: &str, count: u64, make: impl Fn(&mut Rng) -> Problem + Sync) -> Found {
    if let Some(seed) = number("FLASHTILE_SEED") {
        let problem = make(&mut Rng(seed));
        println!("{problem}");
        let found = check(&problem).unwrap_or_else(|error| panic!("{error}"));
        println!("largest error over bound: {:?}", found.largest_ratio);
        return found;
    }
    let first = number("FLASHTILE_SEED_BASE").unwrap_or(0);
    let (next, all, failure) = (AtomicU64::new(0), Mutex::new(Found::default()), Mutex::new(None));
    let work = || {
        let mut found = Found::default();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= count {
                break all.lock().expect("no panics").add(found);
            }
            let seed = first.wrapping_add(n);
            let checked = catch_unwind(AssertUnwindSafe(|| check(&make(&mut Rng(seed)))));
            match checked.unwrap_or_else(|_| Err("a panic, see above".into())) {
                Ok(more) => found.add(more),
                Err(error) => {
                    next.store(count, Ordering::Relaxed);
                    failure.lock().expect("no panics").get_or_insert((seed, error));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        (0..std::thread::available_parallelism().map_or(1, usize::from)).for_each(|_| {
            scope.spawn(work);
        });
    });
    if let Some((seed, error)) = failure.into_inner().expect("no panics") {
        let problem = make(&mut Rng(seed));
        panic!("{error}\n{problem}\nagain: FLASHTILE_SEED={seed} cargo test --test differential {test} -- --nocapture");
    }
    let found = all.into_inner().expect("no panics");
    let [out, sharp, lse] = found.largest_ratio;
    println!("{test}: {count} problems from seed {first} on, {} numbers; largest error over bound:", found.elements);
    println!(
        "  outputs {out:.3} (bounds below 1e-3: {sharp:.3}), lse {lse:.3}; median bound {:.1e}",
        found.median_bound()
    );
    found
}
