//! Random problems over every option, layout, type, form and level against the exact answer: every element under the
//! a-priori bound of `docs/numerics.md`.
//!
//! `FLASHTILE_PROBLEMS=1000` sets the number of small problems; `FLASHTILE_SEED=17` runs the one with that seed alone and
//! prints it, which is what a failure asks for.

mod support;

use flashtile::{DType, Form, Level, Threads};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use support::Rng;
use support::any_problem::{Alibi, Broadcast, Dims, Layout, Offset, Problem, Tensor};
use support::bound::{Chains, exact, round_to, sees};
use support::check::{Found, check};

#[test]
fn small_problems() {
    let count = number("FLASHTILE_PROBLEMS").unwrap_or(100_000);
    let found = check_seeds("small_problems", count, |rng| {
        let dims = small_dims(rng);
        problem(rng, dims)
    });
    assert!(found.largest_ratio.iter().all(|ratio| *ratio <= 1.0));
    // The bounds say something: half of them are below two in a hundred thousand of what they bound.
    assert_median_below(&found, 2e-5);
}

#[test]
fn large_problems() {
    // One for each 400 small ones costs about a third as much time.
    let count = number("FLASHTILE_PROBLEMS").unwrap_or(100_000).div_ceil(400);
    let found = check_seeds("large_problems", count, |rng| {
        let dims = large_dims(rng);
        problem(rng, dims)
    });
    assert_median_below(&found, 2e-4);
}

/// Error of half outputs, all in all: no more than half as much again as that of the exact answer, rounded.
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

/// Values chosen to hurt, in both forms: more keys than two tiles or splits, and more queries than a panel.
#[test]
fn adversarial_values() {
    for form in [Form::FewQueries, Form::ManyQueries] {
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
    let [q, k, ..] = dims.shapes().map(Layout::contiguous);
    // The first element carries what is wanted; 1 in the queries, so that every one sees the same.
    problem.q = Tensor::new(DType::F32, q, |[.., e]| if e == 0 { 1.0 } else { 0.01 * rng.normal() });
    problem.k = Tensor::new(DType::F32, k, |[.., j, e]| if e == 0 { key(j, rng) } else { 0.01 * rng.normal() });
    (problem.scale, problem.form) = (Some(scale), Some(form));
    problem
}

const ADVERSARIAL: Dims =
    Dims { batch: 1, heads_q: 2, heads_kv: 1, seq_q: 12, seq_kv: 1030, head_dim: 4, value_dim: 5 };
const LAST: usize = 1029;

/// Models write -1e9 or the lowest finite number where they mean "hidden". In a row of nothing else, every score rounds to
/// that number: the row's output is the mean of the values, and not the 0 of a row that sees nothing.
#[test]
fn rows_of_one_huge_bias_are_uniform() {
    for (form, level) in
        [Form::FewQueries, Form::ManyQueries].into_iter().flat_map(|f| Level::available().map(move |l| (f, l)))
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

/// That bounds are not so wide that anything would pass; a few problems alone can have wide ones.
fn assert_median_below(found: &Found, most: f64) {
    let median = found.median_bound();
    assert!(found.bounds.len() < 100 || median < most, "the median of the relative bounds is {median:e}");
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?} but must be a number")))
}

/// Checks the problems that `make` makes of the seeds 0 to `count`, on every core, or of the seed asked for.
fn check_seeds(test: &str, count: u64, make: impl Fn(&mut Rng) -> Problem + Sync) -> Found {
    if let Some(seed) = number("FLASHTILE_SEED") {
        let problem = make(&mut Rng(seed));
        println!("{problem}");
        let found = check(&problem).unwrap_or_else(|error| panic!("{error}"));
        println!("largest error over bound: {:?}", found.largest_ratio);
        return found;
    }
    let (next, all, failure) = (AtomicU64::new(0), Mutex::new(Found::default()), Mutex::new(None));
    let work = || {
        let mut found = Found::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= count {
                break all.lock().expect("no panics").add(found);
            }
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
    println!("{test}: {count} problems, {} numbers; largest error over bound:", found.elements);
    println!(
        "  outputs {out:.3} (bounds below 1e-3: {sharp:.3}), lse {lse:.3}; median bound {:.1e}",
        found.median_bound()
    );
    found
}

/// Mostly small, often at an edge: nothing, one, a whole vector (8 or 16), a whole panel (16 or 32) and one more or less.
fn size(rng: &mut Rng, edges: &[usize], most: usize) -> usize {
    match rng.below(8) {
        0..3 => edges[rng.below(edges.len())],
        3..6 => 1 + rng.below(most.min(9)),
        _ => rng.below(most + 1),
    }
}

fn small_dims(rng: &mut Rng) -> Dims {
    let few = |rng: &mut Rng, most| if rng.one_in(60) { 0 } else { 1 + rng.below(rng.clone().below(most) + 1) };
    if rng.one_in(20) {
        // Narrow, and longer than a tile (240 keys) or a split (512): the running maximum moves, states are merged.
        return Dims {
            batch: 1,
            heads_q: 2,
            heads_kv: 1,
            seq_q: 1 + rng.below(9),
            seq_kv: [239, 240, 241, 300, 481, 511, 512, 513, 700][rng.below(9)],
            head_dim: 1 + rng.below(9),
            value_dim: 1 + rng.below(9),
        };
    }
    let heads_kv = few(rng, 3);
    Dims {
        batch: few(rng, 3),
        heads_q: heads_kv * few(rng, 4),
        heads_kv,
        seq_q: size(rng, &[0, 1, 1, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33], 40),
        // 48: the smallest tile; 64: the tile of few queries.
        seq_kv: size(rng, &[0, 1, 2, 8, 16, 47, 48, 49, 63, 64, 65], 70),
        head_dim: size(rng, &[0, 1, 2, 7, 8, 9, 16, 17, 64, 65], 70),
        value_dim: size(rng, &[0, 1, 5, 6, 7, 8, 9, 12, 16, 64, 65], 70),
    }
}

/// Hundreds of keys and wide heads; in all about 8 million multiply-adds at most.
fn large_dims(rng: &mut Rng) -> Dims {
    const DIMS: [usize; 11] = [1, 8, 24, 64, 64, 80, 128, 128, 192, 256, 576];
    let heads_kv = 1 + rng.below(2);
    let mut dims = Dims {
        batch: 1 + rng.below(2),
        heads_q: heads_kv * (1 + rng.below(4)),
        heads_kv,
        seq_q: [1, 2, 8, 17, 100, 257, 400][rng.below(7)] + rng.below(4),
        seq_kv: [100, 240, 480, 512, 1024, 2000][rng.below(6)] + rng.below(4),
        head_dim: DIMS[rng.below(11)],
        value_dim: DIMS[rng.below(11)],
    };
    let work = |dims: &Dims| dims.batch * dims.heads_q * dims.seq_q * dims.seq_kv * (dims.head_dim + dims.value_dim);
    while work(&dims) > 8_000_000 {
        match () {
            () if dims.batch > 1 => dims.batch = 1,
            () if dims.heads_q > dims.heads_kv => dims.heads_q = dims.heads_kv,
            () if dims.heads_kv > 1 => (dims.heads_q, dims.heads_kv) = (1, 1),
            () if dims.seq_q > 1 => dims.seq_q = dims.seq_q.div_ceil(2),
            () => dims.seq_kv = dims.seq_kv.div_ceil(2),
        }
    }
    dims
}

fn dtype(rng: &mut Rng) -> DType {
    [DType::F32, DType::F32, DType::F16, DType::Bf16][rng.below(4)]
}

/// Elements of one kind: mostly normal, now and then what brings out a special path.
fn values(rng: &mut Rng) -> impl FnMut([usize; 4]) -> f32 + use<> {
    let kind = rng.below(16);
    let amplitude = [1.0, 1.0, 1.0, 0.1, 4.0, 30.0][rng.below(6)];
    let mut rng = rng.clone();
    move |[b, h, i, e]| match kind {
        0 => amplitude,                                  // all equal
        1 => 0.0,                                        // nothing
        2 => ((i * 5 + e * 3 + h + b) % 7) as f32 - 3.0, // many ties, exact sums
        3 => 1e-40 * rng.normal(),                       // denormals
        4 => 1000.0 * amplitude * rng.normal(),          // beyond one score's weight
        5 => amplitude * i as f32 * 0.5,                 // growing from key to key: the maximum always moves
        6 if rng.one_in(9) => 50.0 * rng.normal(),       // a few stand out
        6 => 0.0,
        7 => 10f32.powi(rng.below(24) as i32 - 12) * rng.normal(), // every magnitude whose products f32 can hold
        _ => amplitude * rng.normal(),
    }
}

/// The shape of a mask or bias: 1 in any dimension, and lower ranks.
fn broadcast_shape(rng: &mut Rng, dims: &Dims) -> (usize, [usize; 4]) {
    let rank = [4, 4, 4, 3, 2, 2, 1][rng.below(7)];
    let full = [dims.batch, dims.heads_q, dims.seq_q, dims.seq_kv];
    let shape = std::array::from_fn(|axis| if axis < 4 - rank || rng.one_in(4) { 1 } else { full[axis] });
    (rank, shape)
}

/// Options, types and layouts for `dims`, all at random.
fn problem(rng: &mut Rng, dims: Dims) -> Problem {
    let mut problem = Problem::plain(Dims { batch: 0, ..dims }, || 0.0);
    problem.dims = dims;
    let [q, k, v, out] = dims.shapes();
    let [batch, heads, queries, _] = out;
    let tensor = |rng: &mut Rng, shape| {
        let (dtype, layout) = (dtype(rng), Layout::random(rng, shape, true));
        Tensor::new(dtype, layout, values(rng))
    };
    problem.q = tensor(rng, q);
    problem.k = tensor(rng, k);
    problem.v = tensor(rng, v);
    problem.out = (dtype(rng), Layout::random(rng, out, false));
    problem.lse = Layout::random(rng, [batch, heads, queries], false);

    if rng.one_in(3) {
        problem.scale = Some([0.0, -0.5, 1.0, 0.1, 3.0, -1e-3, 100.0][rng.below(7)]);
    }
    problem.causal = rng.one_in(2);
    if rng.one_in(3) {
        let bound = |rng: &mut Rng| match rng.below(4) {
            0 => None,
            1 => Some([0, 1, dims.seq_kv, usize::MAX][rng.below(4)]),
            _ => Some(rng.below(dims.seq_kv + 2)),
        };
        problem.window = (bound(rng), bound(rng));
    }
    let near = |rng: &mut Rng| rng.below(dims.seq_kv + 12) as isize - 8;
    problem.offset = match rng.below(12) {
        0 | 1 => Offset::FromStart,
        2 | 3 => Offset::At(near(rng)),
        4 => Offset::At([isize::MIN, isize::MAX, 1 << 24, -(1 << 30)][rng.below(4)]),
        5 | 6 => Offset::PerBatch((0..dims.batch).map(|_| near(rng)).collect()),
        _ => Offset::FromEnd,
    };
    if rng.one_in(4) {
        let length = |_| if rng.one_in(4) { dims.seq_kv } else { rng.below(dims.seq_kv + 1) };
        problem.key_lengths = Some((0..dims.batch).map(length).collect());
    }
    if rng.one_in(4) {
        let (rank, shape) = broadcast_shape(rng, &dims);
        let one_in = [2, 2, 10, 100][rng.below(4)];
        let most = rng.one_in(4);
        let layout = Layout::random(rng, shape, true);
        problem.mask = Some(Broadcast::<_>::new(rank, layout, |_| rng.one_in(one_in) == most));
    }
    if rng.one_in(8) {
        problem.softcap = Some([0.5, 5.0, 30.0, 1e4][rng.below(4)]);
    }
    if rng.one_in(4) {
        let (rank, shape) = broadcast_shape(rng, &dims);
        let (hidden, amplitude) = (rng.one_in(2), [1.0, 1.0, 10.0, 1e4][rng.below(4)]);
        let (dtype, layout) = (dtype(rng), Layout::random(rng, shape, true));
        let value = |_| if hidden && rng.one_in(3) { f32::NEG_INFINITY } else { amplitude * rng.normal() };
        problem.bias = Some(Broadcast { rank, tensor: Tensor::new(dtype, layout, value) });
    }
    if rng.one_in(6) {
        let slopes = |_| if rng.one_in(4) { 0.0 } else { rng.normal() };
        problem.alibi = Some(match dims.heads_q % 2 {
            0 => Alibi::Standard,
            _ => Alibi::PerHead((0..dims.heads_q).map(slopes).collect()),
        });
    }
    problem.form = [None, Some(Form::FewQueries), Some(Form::ManyQueries)][rng.below(3)];
    problem.threads = [Threads::Pool, Threads::Serial][rng.below(2)];
    if rng.one_in(4) {
        poison(rng, &mut problem);
    }
    problem
}

/// Puts NaN and infinity where they must not show: into keys and values that no query sees. And, now and then, a NaN or
/// infinity where it must, or where it makes scores of either infinity.
fn poison(rng: &mut Rng, problem: &mut Problem) {
    let dims = problem.dims;
    let shared = |tensor: &Tensor| tensor.layout().strides.contains(&0);
    if shared(&problem.k) || shared(&problem.v) || shared(&problem.q) || dims.heads_kv == 0 {
        return;
    }
    let group = dims.heads_q / dims.heads_kv;
    const POISONS: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    // (Times a query's element that scaling rounds to 0, infinity would be NaN.)
    let mut queries = problem.q.layout().indices().map(|index| problem.q.get(index).abs());
    let of_keys = if queries.any(|x| x > 0.0 && x < 1e-20) { 1 } else { 3 };
    for b in 0..dims.batch {
        for (h, j) in (0..dims.heads_kv).flat_map(|h| (0..dims.seq_kv).map(move |j| (h, j))) {
            let mut pairs = (h * group..(h + 1) * group).flat_map(|h| (0..dims.seq_q).map(move |i| (h, i)));
            if !pairs.any(|(h, i)| sees(problem, [b, h, i, j])) {
                let poison = POISONS[rng.below(3)];
                (0..dims.head_dim).for_each(|e| problem.k.set([b, h, j, e], poison));
                (0..dims.value_dim).for_each(|d| problem.v.set([b, h, j, d], poison));
            } else if rng.one_in(4 * dims.seq_kv) {
                match rng.below(2) {
                    0 if dims.head_dim > 0 => {
                        problem.k.set([b, h, j, rng.below(dims.head_dim)], POISONS[rng.below(of_keys)]);
                        // Where that hides the key, its value is left out, whatever it is.
                        if dims.value_dim > 0 && rng.one_in(2) {
                            problem.v.set([b, h, j, rng.below(dims.value_dim)], POISONS[rng.below(3)]);
                        }
                    }
                    _ if dims.value_dim > 0 => {
                        problem.v.set([b, h, j, rng.below(dims.value_dim)], POISONS[rng.below(3)]);
                    }
                    _ => {}
                }
            }
        }
        if dims.heads_q * dims.seq_q * dims.head_dim > 0 && rng.one_in(4) {
            let (h, i) = (rng.below(dims.heads_q), rng.below(dims.seq_q));
            problem.q.set([b, h, i, rng.below(dims.head_dim)], f32::NAN);
        }
    }
}
