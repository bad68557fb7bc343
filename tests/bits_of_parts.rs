//! Promise: the one of `bits.rs`, over every option, type and layout at once. A row's bits depend on its own inputs, the level
//! and the form alone.

mod support;

use flashtile::{Level, Threads};
use std::ops::Range;
use support::any_problem::{Offset, Part, Results};
use support::problems::FORMS;
use support::random_problem::problem;
use support::{Dims, Rng};

/// A range inside `0..n` that is not empty.
fn some_of(n: usize, rng: &mut Rng) -> Range<usize> {
    let start = rng.below(n);
    start..start + 1 + rng.below(n - start)
}

/// Numbers of queries, keys and elements of a key and a value on either side of vectors, panels and tiles.
fn odd_dims(rng: &mut Rng) -> Dims {
    let heads_kv = 1 + rng.below(2);
    Dims {
        batch: 1 + rng.below(2),
        heads_q: heads_kv * [1, 2, 3, 5, 7][rng.below(5)],
        heads_kv,
        seq_q: [1, 2, 5, 7, 11, 15, 16, 17, 31, 32, 33, 37, 48, 65][rng.below(14)],
        seq_kv: [1, 7, 15, 16, 17, 31, 33, 47, 49, 97, 145, 239, 241, 257, 485, 530, 720][rng.below(17)],
        head_dim: [1, 3, 8, 15, 17, 24, 33, 40, 72][rng.below(9)],
        value_dim: [1, 3, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 72][rng.below(13)],
    }
}

/// Random parts of random problems, with NaN and infinity in hidden and visible elements. The whole is computed in the pool, the
/// part by itself.
#[test]
fn any_part_of_any_problem() {
    for seed in 0..1500 {
        let mut rng = Rng(seed);
        let dims = odd_dims(&mut rng);
        let mut whole = problem(&mut rng, dims);
        whole.form = Some(FORMS[rng.below(2)]); // which the shape of a part might not suggest
        if matches!(whole.offset, Offset::At(offset) if offset.unsigned_abs() > 1 << 40) {
            continue; // positions beyond it may overflow
        }
        let group = dims.heads_q / dims.heads_kv;
        let first = rng.below(dims.heads_kv) * group;
        let some = some_of(group, &mut rng);
        let part = Part {
            batches: some_of(dims.batch, &mut rng),
            heads: if rng.one_in(3) { 0..dims.heads_q } else { first + some.start..first + some.end },
            queries: some_of(dims.seq_q, &mut rng),
        };
        let mut alone = whole.part(&part);
        (whole.threads, alone.threads) = (Threads::Pool, Threads::Serial);
        for level in Level::available() {
            let case = || format!("{level}, seed {seed}: {part:?} of\n{whole}");
            same_rows(&whole.run(level), &alone.run(level), (&dims, &part), case);
        }
    }
}

/// Checks that a part's rows have the bits that they have in the whole.
fn same_rows(whole: &Results, alone: &Results, (dims, part): (&Dims, &Part), case: impl Fn() -> String) {
    // NaNs of any payload are one.
    let bits = |x: f64| if x.is_nan() { u64::MAX } else { x.to_bits() };
    let rows = part.batches.clone().flat_map(|b| part.heads.clone().map(move |h| b * dims.heads_q + h));
    let rows = rows.flat_map(|head| part.queries.clone().map(move |i| head * dims.seq_q + i));
    for (own, row) in rows.enumerate() {
        assert_eq!(bits(alone.lse[own] as f64), bits(whole.lse[row] as f64), "lse of row {row}, {}", case());
        for d in 0..dims.value_dim {
            let (own, out) = (alone.out[own * dims.value_dim + d], whole.out[row * dims.value_dim + d]);
            assert_eq!(bits(own), bits(out), "element {d} of row {row}, {}", case());
        }
    }
}
