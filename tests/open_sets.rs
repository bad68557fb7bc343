//! Promise: masks and score modifications of the open sets mean what they say. A mask has the bits of the boolean tensor that says
//! the same; a ready mask shows what its picture shows, and does not contradict itself; sinks are states without a value; a user's
//! function that lies or panics does no harm.
//!
//! `tests/differential.rs` draws all of them at random, alone and composed, against the bound of the error.

mod support;

use flashtile::mask::{
    Block, BlockSparse, Chunked, Cover, Covered, Documents, FirstAndLast, KeyStarts, Mask, Pair, PrefixLm, Query, Tree,
    check_mask, mask_fn,
};
use flashtile::score::{RelativeBias, ScoreMod, ScoreTile, WindowBias, score_fn};
use flashtile::{
    AlibiSlopes, Attention, Error, Form, Level, QueryOffset, ScoreStage, TensorMut, TensorRef, Workspace, alibi_slope,
    merge, reference,
};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::open::{OwnedMask, mask};
use support::{Dims, Inputs, Rng};

/// Output and log-sum-exps of a call.
fn run(attention: &Attention<'_>, inputs: &Inputs<f32>) -> (Vec<f32>, Vec<f32>) {
    let dims = inputs.dims;
    let (mut out, mut lse) = (vec![f32::NAN; support::len(dims.out())], vec![f32::NAN; support::len(dims.lse())]);
    attention
        .compute(
            inputs.q(),
            (inputs.k(), inputs.v()),
            TensorMut::from_slice(&mut out, dims.out()).unwrap(),
            TensorMut::from_slice(&mut lse, dims.lse()).unwrap(),
            &mut Workspace::new(),
        )
        .unwrap();
    (out, lse)
}

fn bits((out, lse): (Vec<f32>, Vec<f32>)) -> Vec<u32> {
    out.into_iter().chain(lse).map(f32::to_bits).collect()
}

/// The picture of a mask: a row of text for each query.
fn picture(mask: &dyn Mask, [seq_q, seq_kv]: [usize; 2], offset: isize, batch: usize) -> Vec<String> {
    let row = |i| Query::new(batch, 0, i, offset);
    let character = |i, j| if mask.sees(row(i).with_key(j)) { '1' } else { '0' };
    (0..seq_q).map(|i| (0..seq_kv).map(|j| character(i, j)).collect()).collect()
}

#[test]
fn ready_masks_are_as_drawn() {
    let documents = Documents::of_lengths(&[2, 3]).unwrap();
    assert_eq!(picture(&documents, [5, 5], 0, 0), ["11000", "11000", "00111", "00111", "00111"]);
    let own = Documents::per_sequence(2, &[0, 1, 1, 1], &[0, 1, 0, 1, 1, 0]).unwrap();
    assert_eq!(picture(&own, [2, 3], 0, 0), ["101", "010"]);
    assert_eq!(picture(&own, [2, 3], 0, 1), ["110", "110"]);
    assert_eq!(picture(&Chunked::new(2), [5, 5], 0, 0), ["11000", "11000", "00110", "00110", "00001"]);
    assert_eq!(picture(&Chunked::new(3), [2, 4], -1, 0), ["0000", "1110"]);
    assert_eq!(picture(&Chunked::new(0), [1, 2], 0, 0), ["00"]);
    let prefix = PrefixLm::new(&[0..2, 3..5]).unwrap();
    assert_eq!(picture(&prefix, [6, 6], 0, 0), ["110000", "110000", "111000", "111110", "111110", "111111"]);
    assert_eq!(picture(&prefix, [2, 6], 3, 0), ["111110", "111110"]);
    let tree = Tree::new(&[-1, 0, 0, 1]).unwrap();
    assert_eq!(picture(&tree, [4, 6], 2, 0), ["111000", "111100", "111010", "111101"]);
    assert_eq!(picture(&tree, [4, 7], 2, 0)[3], "1111010", "a key after the drafts is hidden");
    let own = Tree::per_sequence(2, &[-1, 0, -1, -1]).unwrap();
    assert_eq!([0, 1].map(|b| picture(&own, [2, 3], 1, b)[1].clone()), ["111", "101"]);
    let own = PrefixLm::per_sequence(&[&[0..2, 2..2], &[]]).unwrap();
    assert_eq!([0, 1].map(|b| picture(&own, [1, 3], 0, b)[0].clone()), ["110", "100"]);
    let streaming = FirstAndLast::new(1, 1);
    assert_eq!(picture(&streaming, [5, 5], 0, 0), ["10000", "11000", "11100", "10110", "10011"]);
    let starts = KeyStarts::new(&[0i32, 2]);
    assert_eq!(picture(&starts, [2, 4], 0, 1), ["0011", "0011"]);
    let blocks = BlockSparse::new([2, 2], [1, 1, 2, 2], &[true, false, false, true]).unwrap();
    assert_eq!(picture(&blocks, [4, 4], 0, 0), ["1100", "1100", "0011", "0011"]);
    assert_eq!(BlockSparse::from_rows([2, 2], 2, &[0, 1, 2], &[0, 1]).unwrap(), blocks);
    let covered = Covered::new(mask_fn(|pair| pair.key() % 2 == 0), [1, 1, 2, 4], 0).unwrap();
    assert_eq!(picture(&covered, [2, 4], 0, 0), ["1010", "1010"]);
}

/// Every ready mask, at random, over small problems; covers at their own block sizes, too.
#[test]
fn ready_masks_do_not_contradict_themselves() {
    let mut rng = Rng(3);
    for _ in 0..400 {
        let [batch, heads_q, seq_q, seq_kv] = [1 + rng.below(2), 1 + rng.below(2), rng.below(6), rng.below(7)];
        let dims = Dims { batch, heads_q, heads_kv: heads_q, seq_q, seq_kv, head_dim: 1, value_dim: 1 };
        let offset = rng.below(9) as isize - 4;
        let mask = mask(&mut rng, &dims, Some(offset));
        check_mask(&mask, [batch, heads_q, seq_q, seq_kv], offset).unwrap_or_else(|error| panic!("{mask:?}: {error}"));
    }
    // Blocks of the size that kernels ask for.
    for seed in 0..200 {
        let mut rng = Rng(seed);
        let dims = Dims { batch: 2, heads_q: 2, heads_kv: 2, seq_q: 130, seq_kv: 300, head_dim: 1, value_dim: 1 };
        let offset = rng.below(300) as isize - 50;
        let mask = mask(&mut rng, &dims, Some(offset));
        for _ in 0..30 {
            let mut run = |len: usize| {
                let (a, b) = (rng.below(len), rng.below(len));
                a.min(b)..a.max(b) + 1
            };
            let block = Block { batch: 1, heads: run(2), queries: run(130), offset, keys: run(300) };
            let visible = block.pairs().filter(|&pair| mask.sees(pair)).count();
            match mask.cover(&block) {
                Cover::Partial => {}
                Cover::Skip => assert_eq!(visible, 0, "{mask:?}, {block:?}"),
                Cover::Full => assert_eq!(visible, block.pairs().count(), "{mask:?}, {block:?}"),
            }
        }
    }
}

/// The boolean tensor `[batch, heads_q, seq_q, seq_kv]` that says the same as some masks.
fn dense(masks: &[OwnedMask], dims: &Dims, offset: isize) -> Vec<bool> {
    let all = Block { batch: 0, heads: 0..dims.heads_q, queries: 0..dims.seq_q, offset, keys: 0..dims.seq_kv };
    let sees = |pair: Pair| masks.iter().all(|mask| mask.sees(pair));
    (0..dims.batch).flat_map(|batch| Block { batch, ..all.clone() }.pairs().map(sees).collect::<Vec<_>>()).collect()
}

/// Hidden keys hold NaN: of masks, no query may see them; keys are shared between queries, so only keys that none sees can.
#[test]
fn a_mask_has_the_bits_of_the_tensor_that_says_the_same() {
    for seed in 0..160 {
        let mut rng = Rng(seed);
        let heads_kv = 1 + rng.below(2);
        let dims = Dims {
            batch: 1 + rng.below(2),
            heads_q: heads_kv * (1 + rng.below(3)),
            heads_kv,
            seq_q: [1, 3, 40, 90][rng.below(4)],
            seq_kv: [7, 130, 400, 1100][rng.below(4)],
            head_dim: 8,
            value_dim: 8,
        };
        let mut inputs = Inputs::<f32>::random(dims, &mut rng);
        let offset = rng.below(dims.seq_kv) as isize;
        let masks: Vec<_> = (0..1 + rng.below(3)).map(|_| mask(&mut rng, &dims, Some(offset))).collect();
        let tensor = dense(&masks, &dims, offset);
        hide_by_nan(&mut inputs, &tensor);
        let at = || Attention::new().query_offset(QueryOffset::At(offset));
        let shape = [dims.batch, dims.heads_q, dims.seq_q, dims.seq_kv];
        for level in Level::available() {
            for form in [Form::Decode, Form::Prefill] {
                let by_tensor = at().mask(TensorRef::from_slice(&tensor, shape).unwrap()).level(level).form(form);
                let by_masks = masks.iter().fold(at().level(level).form(form), |all, mask| all.masked_by(mask));
                let (expected, got) = (run(&by_tensor, &inputs), run(&by_masks, &inputs));
                assert!(!expected.0.iter().any(|x| x.is_nan()), "seed {seed}");
                assert_eq!(
                    bits(expected),
                    bits(got),
                    "seed {seed}, {level}, {form}: {masks:?}, {dims:?}, offset {offset}"
                );
            }
        }
    }
}

/// Puts NaN into the keys and values that no query of the group sees.
fn hide_by_nan(inputs: &mut Inputs<f32>, tensor: &[bool]) {
    let Dims { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim } = inputs.dims;
    let group = heads_q / heads_kv;
    for (b, h, j) in (0..batch).flat_map(|b| (0..heads_kv).flat_map(move |h| (0..seq_kv).map(move |j| (b, h, j)))) {
        let mut rows = (h * group..(h + 1) * group).flat_map(|h| (0..seq_q).map(move |i| (h, i)));
        if !rows.any(|(h, i)| tensor[((b * heads_q + h) * seq_q + i) * seq_kv + j]) {
            let row = (b * heads_kv + h) * seq_kv + j;
            inputs.k[row * head_dim..][..head_dim].fill(f32::NAN);
            inputs.v[row * value_dim..][..value_dim].fill(f32::NAN);
        }
    }
}

fn dims(heads_q: usize, heads_kv: usize, seq_q: usize, seq_kv: usize) -> Dims {
    Dims { batch: 2, heads_q, heads_kv, seq_q, seq_kv, head_dim: 16, value_dim: 16 }
}

/// Results from `expected` by no more than `tolerance`.
fn assert_near((out, lse): &(Vec<f32>, Vec<f32>), expected: &reference::Reference, tolerance: f64, what: &str) {
    let pairs = out.iter().zip(&expected.out).chain(lse.iter().zip(&expected.lse));
    for (got, expected) in pairs {
        let near = (*got as f64 - expected).abs() <= tolerance || *got as f64 == *expected;
        assert!(near, "{what}: {got} but must be {expected}");
    }
}

/// A closure in f32 is the built-in option that it repeats; rows in lanes of one head, of several heads, and alone.
#[test]
fn functions_repeat_options() {
    for (heads_q, heads_kv, seq_q, form) in
        [(2, 2, 70, Form::Prefill), (4, 2, 40, Form::Prefill), (4, 2, 1, Form::Decode), (2, 2, 5, Form::Decode)]
    {
        let inputs = Inputs::<f32>::random(dims(heads_q, heads_kv, seq_q, 600), &mut Rng(7));
        let slopes: Vec<f32> = (0..heads_q).map(|h| alibi_slope(h, heads_q)).collect();
        let alibi = score_fn(|score, pair| score - slopes[pair.head()] * pair.distance().abs() as f32);
        let softcap = score_fn(|score, _| 5.0 * (score / 5.0).tanh());
        let even = mask_fn(|pair| pair.key() % 2 == 0);
        let even_keys: Vec<bool> = (0..600).map(|j| j % 2 == 0).collect();
        let even_tensor = TensorRef::from_slice(&even_keys, [600]).unwrap();
        let options = || Attention::new().form(form);
        for (name, option, function) in [
            ("alibi", options().alibi(AlibiSlopes::Standard).causal(), options().modified_by(&alibi).causal()),
            ("softcap", options().softcap(5.0), options().modified_by(&softcap)),
            // Bias and mask before and after the function.
            ("both", options().softcap(5.0).alibi(AlibiSlopes::Standard), options().softcap(5.0).modified_by(&alibi)),
            (
                "mask",
                options().alibi(AlibiSlopes::Standard).mask(even_tensor),
                options().modified_by(&alibi).masked_by(&even),
            ),
        ] {
            let expected = reference::attention(&option, inputs.q(), (inputs.k(), inputs.v())).unwrap();
            for level in Level::available() {
                let got = run(&function.clone().level(level), &inputs);
                // Scores are below 50, so an ulp of f32 is 2^-19 of a probability.
                assert_near(&got, &expected, 5e-5, &format!("{name}, {level}, {form}"));
            }
            let of_function = reference::attention(&function, inputs.q(), (inputs.k(), inputs.v())).unwrap();
            let out: Vec<f32> = of_function.out.iter().map(|&x| x as f32).collect();
            let lse: Vec<f32> = of_function.lse.iter().map(|&x| x as f32).collect();
            assert_near(&(out, lse), &expected, 5e-5, &format!("{name}, by the reference"));
        }
    }
}

/// A score that depends on all parts of its pair.
fn modified(score: f32, pair: Pair) -> f32 {
    let slope = (pair.batch() + 2 * pair.head() + 3 * pair.query()) as f32 * 0.01;
    if pair.key() % 7 == 3 { f32::NEG_INFINITY } else { score * 1.5 - slope * pair.distance().abs() as f32 }
}

/// [`modified`], row by row.
struct ByRows {
    seq_kv: usize,
    /// How many scores were asked for.
    asked: AtomicUsize,
}

impl ScoreMod for ByRows {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        modified(score as f32, pair) as f64
    }

    fn modify(&self, tile: &mut ScoreTile<'_>) {
        tile.modify_rows(|first, scores| {
            let row = Query::new(first.batch(), first.head(), first.query(), first.position() - first.query() as isize);
            assert!(!scores.is_empty() && first.key() + scores.len() <= self.seq_kv);
            self.asked.fetch_add(scores.len(), Ordering::Relaxed);
            for (score, key) in scores.iter_mut().zip(first.key()..) {
                *score = modified(*score, row.with_key(key));
            }
        });
    }
}

/// Row by row has the bits of pair by pair: rows of one head, of several heads, and alone; before and after others. Each pair is
/// asked for once.
#[test]
fn rows_are_their_pairs() {
    for (heads_q, heads_kv, seq_q, seq_kv, form) in [
        (2, 2, 70, 600, Form::Prefill),
        (4, 2, 37, 300, Form::Prefill),
        (2, 2, 1, 20, Form::Prefill),
        (4, 2, 1, 1500, Form::Decode),
        (2, 2, 5, 259, Form::Decode),
    ] {
        let inputs = Inputs::<f32>::random(dims(heads_q, heads_kv, seq_q, seq_kv), &mut Rng(7));
        let (by_pairs, other) = (score_fn(modified), score_fn(|score, pair| 0.5 * score + pair.head() as f32));
        let by_rows = ByRows { seq_kv, asked: AtomicUsize::new(0) };
        for level in Level::available() {
            let run_with = |mods: &[&dyn ScoreMod]| {
                let attention = Attention::new().form(form).level(level);
                bits(run(&mods.iter().fold(attention, |all, one| all.modified_by(*one)), &inputs))
            };
            by_rows.asked.store(0, Ordering::Relaxed);
            assert_eq!(run_with(&[&by_rows]), run_with(&[&by_pairs]), "{level}, {form}");
            assert_eq!(by_rows.asked.load(Ordering::Relaxed), 2 * heads_q * seq_q * seq_kv, "{level}, {form}");
            assert_eq!(run_with(&[&other, &by_rows]), run_with(&[&other, &by_pairs]), "{level}, {form}");
            assert_eq!(run_with(&[&by_rows, &other]), run_with(&[&by_pairs, &other]), "{level}, {form}");
        }
    }
}

/// Two modifications are applied in the order in which they were given.
#[test]
fn modifications_come_in_order() {
    let inputs = Inputs::<f32>::random(dims(2, 2, 3, 20), &mut Rng(8));
    let (double, add) = (score_fn(|score, _| 2.0 * score), score_fn(|score, pair| score + pair.key() as f32 * 0.1));
    let (one, other) = (
        Attention::new().modified_by(&double).modified_by(&add),
        score_fn(|score, pair| 2.0 * score + pair.key() as f32 * 0.1),
    );
    let expected =
        reference::attention(&Attention::new().modified_by(&other), inputs.q(), (inputs.k(), inputs.v())).unwrap();
    assert_near(&run(&one, &inputs), &expected, 1e-5, "doubled, then added");
}

/// -inf from a function hides the key; a hidden key stays hidden whatever a function makes of its score.
#[test]
fn functions_hide_and_do_not_show() {
    let mut inputs = Inputs::<f32>::random(dims(2, 1, 40, 300), &mut Rng(9));
    let shape = [2, 2, 40, 300];
    let even: Vec<bool> = (0..support::len(shape)).map(|n| n % 300 % 2 == 0).collect();
    hide_by_nan(&mut inputs, &even);
    let hides = score_fn(|score, pair| if pair.key() % 2 == 0 { score } else { f32::NEG_INFINITY });
    let shows = score_fn(|score: f32, _| if score == f32::NEG_INFINITY { 1e9 } else { score });
    for form in [Form::Decode, Form::Prefill] {
        let expected = run(
            &Attention::new().mask(TensorRef::from_slice(&even, shape).unwrap()).form(form).modified_by(&shows),
            &inputs,
        );
        assert!(!expected.0.iter().any(|x| x.is_nan()));
        let got = run(&Attention::new().modified_by(&hides).form(form), &inputs);
        assert_eq!(bits(expected), bits(got), "{form}");
    }
}

#[test]
fn relative_biases_are_the_tensor_of_their_elements() {
    let mut rng = Rng(11);
    for (heads_q, heads_kv, seq_q, form) in
        [(2, 2, 70, Form::Prefill), (4, 2, 40, Form::Prefill), (2, 1, 3, Form::Decode)]
    {
        let dims = dims(heads_q, heads_kv, seq_q, 300);
        let inputs = Inputs::<f32>::random(dims, &mut rng);
        for most in [0, 1, 40, 500] {
            let table: Vec<f32> = (0..heads_q * (2 * most + 1)).map(|_| rng.normal()).collect();
            let relative = RelativeBias::new(heads_q, most, &table).unwrap();
            let block =
                Block { batch: 0, heads: 0..heads_q, queries: 0..seq_q, offset: 300 - seq_q as isize, keys: 0..300 };
            let bias: Vec<f32> = block
                .pairs()
                .map(|pair| {
                    let distance = (pair.distance() as isize).clamp(-(most as isize), most as isize);
                    table[pair.head() * (2 * most + 1) + (distance + most as isize) as usize]
                })
                .collect();
            let tensor = TensorRef::from_slice(&bias, [heads_q, seq_q, 300]).unwrap();
            let expected =
                reference::attention(&Attention::new().bias(tensor), inputs.q(), (inputs.k(), inputs.v())).unwrap();
            for level in Level::available() {
                let got = run(&Attention::new().modified_by(&relative).form(form).level(level), &inputs);
                assert_near(&got, &expected, 2e-5, &format!("{most}, {level}, {form}"));
            }
        }
    }
}

/// `T5Attention._relative_position_bucket` of transformers 4.57 for 32 buckets and a largest distance of 128, key minus query.
#[test]
fn t5_buckets_are_the_published_ones() {
    let table: Vec<f32> = (0..32).map(|n| n as f32).collect();
    let bucket = |bidirectional, key: usize, query: usize| {
        let t5 = RelativeBias::t5(1, bidirectional, 128, &table).unwrap();
        t5.define(0.0, Query::new(0, 0, query, 0).with_key(key))
    };
    let relative = [-300, -128, -100, -64, -20, -9, -8, -7, -1, 0, 1, 7, 8, 9, 20, 64, 100, 128, 300];
    let both = relative.map(|r| bucket(true, (r + 300) as usize, 300) as i32);
    assert_eq!(both, [15, 15, 15, 14, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 26, 30, 31, 31, 31]);
    let decoder = relative.map(|r| bucket(false, (r + 300) as usize, 300) as i32);
    assert_eq!(decoder, [31, 31, 30, 26, 17, 9, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

/// Swin's index: `(y_i - y_j + height - 1) * (2 * width - 1) + x_i - x_j + width - 1`.
#[test]
fn window_biases_are_swins() {
    let [height, width, heads] = [2, 3, 2];
    let table: Vec<f32> = (0..3 * 5 * heads).map(|n| n as f32).collect();
    let bias = WindowBias::new(heads, [height, width], &table).unwrap();
    for (h, i, j) in (0..heads).flat_map(|h| (0..6).flat_map(move |i| (0..6).map(move |j| (h, i, j)))) {
        let index = (i / width + height - 1 - j / width) * 5 + i % width + width - 1 - j % width;
        assert_eq!(bias.define(0.0, Query::new(0, h, i, 0).with_key(j)), table[index * heads + h] as f64);
    }
}

/// A sink is merging with the state of that logit and no value.
#[test]
fn sinks_are_states_without_a_value() {
    for (seq_q, form) in [(50, Form::Prefill), (3, Form::Decode)] {
        let dims = dims(4, 2, seq_q, 1300);
        let inputs = Inputs::<f32>::random(dims, &mut Rng(12));
        for sinks in
            [[0.0, 1.0, -3.0, 7.0], [f32::NEG_INFINITY; 4], [200.0, -200.0, 90.0, -90.0], [1e30, -1e30, 3e38, f32::MIN]]
        {
            for level in Level::available() {
                let plain = Attention::new().causal().form(form).level(level);
                let (mut out, mut lse) = run(&plain, &inputs);
                let (sink_out, sink_lse): (Vec<f32>, Vec<f32>) =
                    (vec![0.0; out.len()], (0..lse.len()).map(|n| sinks[n / seq_q % 4]).collect());
                merge(
                    TensorMut::from_slice(&mut out, dims.out()).unwrap(),
                    TensorMut::from_slice(&mut lse, dims.lse()).unwrap(),
                    TensorRef::from_slice(&sink_out, dims.out()).unwrap(),
                    TensorRef::from_slice(&sink_lse, dims.lse()).unwrap(),
                )
                .unwrap();
                let (own_out, own_lse) = run(&plain.clone().sinks(&sinks), &inputs);
                for (own, merged) in own_out.iter().zip(&out) {
                    assert!(
                        (own - merged).abs() <= 1e-6 * merged.abs().max(1e-3),
                        "{own} {merged}, {sinks:?}, {level}, {form}"
                    );
                }
                for (own, merged) in own_lse.iter().zip(&lse) {
                    assert!(
                        (own - merged).abs() <= 1e-6 * merged.abs().max(1.0),
                        "{own} {merged}, {sinks:?}, {level}, {form}"
                    );
                }
                let probabilities = scores(&plain.clone().sinks(&sinks), &inputs);
                let sums = probabilities.chunks(1300).map(|row| row.iter().sum::<f32>());
                for (n, sum) in sums.enumerate() {
                    let share = 1.0 - (sinks[n / seq_q % 4] as f64 - own_lse[n] as f64).exp();
                    assert!((sum as f64 - share).abs() < 1e-4, "probabilities add up to {sum}, not {share}");
                }
            }
        }
    }
}

fn scores(attention: &Attention<'_>, inputs: &Inputs<f32>) -> Vec<f32> {
    let Dims { batch, heads_q, seq_q, seq_kv, .. } = inputs.dims;
    let shape = [batch, heads_q, seq_q, seq_kv];
    let mut scores = vec![f32::NAN; support::len(shape)];
    let to = TensorMut::from_slice(&mut scores, shape).unwrap();
    attention.scores_into(ScoreStage::Probabilities, inputs.q(), inputs.k(), to).unwrap();
    scores
}

#[test]
fn a_row_without_keys_has_its_sink() {
    for form in [Form::Prefill, Form::Decode] {
        let inputs = Inputs::<f32>::random(dims(2, 2, 4, 3), &mut Rng(13));
        let nothing = mask_fn(|_| false);
        let attention = Attention::new().masked_by(&nothing).sinks(&[1.5, f32::NEG_INFINITY]).form(form);
        let (out, lse) = run(&attention, &inputs);
        assert!(out.iter().all(|x| x.to_bits() == 0));
        assert_eq!(
            lse[..8],
            [1.5, 1.5, 1.5, 1.5, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY]
        );
        assert_eq!(reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap().lse[0], 1.5);
    }
}

/// Says anything about spans and blocks.
struct Liar(u64);

impl Mask for Liar {
    fn sees(&self, pair: Pair) -> bool {
        pair.key().is_multiple_of(3)
    }

    fn span(&self, query: Query) -> Range<isize> {
        let mut rng = Rng(self.0 ^ query.query() as u64);
        let any = |rng: &mut Rng| [isize::MIN, isize::MAX, -1, 0, 1, 50, 1 << 40][rng.below(7)];
        any(&mut rng)..any(&mut rng)
    }

    fn is_span(&self) -> bool {
        self.0.is_multiple_of(3)
    }

    fn cover(&self, block: &Block) -> Cover {
        let mut rng = Rng(self.0 ^ block.keys.start as u64 ^ (block.queries.start as u64) << 20);
        [Cover::Skip, Cover::Full, Cover::Partial][rng.below(3)]
    }
}

/// Each head sees the keys from its own number on, and says that all heads are alike.
struct NotAlike;

impl Mask for NotAlike {
    fn sees(&self, pair: Pair) -> bool {
        pair.key() >= pair.head()
    }

    fn heads_are_alike(&self) -> bool {
        true
    }
}

#[test]
fn check_mask_finds_heads_that_are_not_alike() {
    assert!(check_mask(&NotAlike, [1, 1, 3, 3], 0).is_ok());
    assert!(check_mask(&NotAlike, [1, 2, 3, 3], 0).unwrap_err().contains("`heads_are_alike`"));
}

/// A wrong result, and nothing worse.
#[test]
fn a_mask_that_contradicts_itself_does_no_harm() {
    assert!(check_mask(&Liar(1), [1, 1, 4, 4], 0).is_err());
    let inputs = Inputs::<f32>::random(dims(4, 2, 60, 700), &mut Rng(14));
    for seed in 0..60 {
        for form in [Form::Prefill, Form::Decode] {
            run(&Attention::new().masked_by(&Liar(seed)).form(form), &inputs);
        }
    }
}

/// A panic of a user's function reaches the caller, and the workspace serves the next call.
#[test]
fn a_panic_leaves_the_workspace_usable() {
    let inputs = Inputs::<f32>::random(dims(4, 2, 300, 700), &mut Rng(15));
    let dims = inputs.dims;
    let mut workspace = Workspace::new();
    let panics = score_fn(|_, pair| if pair.key() == 650 { panic!("a user's") } else { 0.0 });
    let call = |attention: &Attention<'_>, workspace: &mut Workspace| {
        let mut out = vec![0.0; support::len(dims.out())];
        let to = TensorMut::from_slice(&mut out, dims.out()).unwrap();
        attention.compute(inputs.q(), (inputs.k(), inputs.v()), to, None, workspace).map(|()| out)
    };
    for form in [Form::Prefill, Form::Decode] {
        let expected = call(&Attention::new().form(form), &mut Workspace::new()).unwrap();
        let attention = Attention::new().modified_by(&panics).form(form);
        let panic = catch_unwind(AssertUnwindSafe(|| call(&attention, &mut workspace).map(drop))).unwrap_err();
        assert_eq!(*panic.downcast_ref::<&str>().unwrap(), "a user's");
        assert_eq!(call(&Attention::new().form(form), &mut workspace).unwrap(), expected);
    }
}

/// Masks and modifications made for another problem are refused before any work.
#[test]
fn other_problems_are_refused() {
    let inputs = Inputs::<f32>::random(dims(2, 2, 5, 7), &mut Rng(16));
    let plan = |attention: &Attention<'_>| attention.plan(inputs.q(), (inputs.k(), inputs.v())).err();
    let count = |what, expected, got| Some(Error::WrongCount { what, expected, got });
    let masked = |mask: &dyn Mask| plan(&Attention::new().masked_by(mask));
    assert_eq!(masked(&Documents::of_lengths(&[7]).unwrap()), count("document numbers of queries", 5, 7));
    assert_eq!(masked(&Documents::new(&[0; 5], &[0; 5])), count("document numbers of keys", 7, 5));
    let three = Documents::per_sequence(3, &[0; 15], &[0; 21]).unwrap();
    assert_eq!(masked(&three), count("sequences of documents", 2, 3));
    assert_eq!(masked(&KeyStarts::new(&[1u32])), count("key starts", 2, 1));
    assert_eq!(masked(&Tree::new(&[-1, 0]).unwrap()), count("parents of drafts", 5, 2));
    let blocks = BlockSparse::new([2, 2], [1, 1, 3, 3], &[true; 9]).unwrap();
    assert_eq!(masked(&blocks), count("blocks of keys", 4, 3));
    let covered = |shape, offset| Covered::new(mask_fn(|_| true), shape, offset).unwrap();
    assert_eq!(masked(&covered([1, 1, 5, 7], 2)), None);
    assert_eq!(masked(&covered([1, 2, 5, 6], 2)), count("keys of a covered mask", 7, 6));
    assert_eq!(masked(&covered([1, 3, 5, 7], 2)), count("heads of a covered mask", 2, 3));
    assert!(matches!(masked(&covered([2, 2, 5, 7], 0)), Some(Error::InvalidMask { .. })), "FromEnd is offset 2");
    let relative = RelativeBias::new(3, 1, &[0.0; 9]).unwrap();
    assert_eq!(plan(&Attention::new().modified_by(&relative)), count("heads of a relative bias", 2, 3));
    let window = WindowBias::new(2, [1, 5], &[0.0; 18]).unwrap();
    assert_eq!(plan(&Attention::new().modified_by(&window)), count("places of a window for keys", 7, 5));
    assert_eq!(plan(&Attention::new().sinks(&[0.0])), count("sinks", 2, 1));
    assert!(matches!(
        plan(&Attention::new().sinks(&[0.0, f32::NAN])),
        Some(Error::InvalidOption { option: "a sink", .. })
    ));
    assert_eq!(plan(&Attention::new().sinks(&[0.0; 2]).sinks(&[0.0; 2])), Some(Error::GivenTwice { option: "sinks" }));
    let all = mask_fn(|_| true);
    let far = Attention::new().masked_by(&all).query_offset(QueryOffset::At(isize::MAX));
    assert!(matches!(plan(&far), Some(Error::TooMany { limit, .. }) if limit == (1 << 30) - 1));
    assert!(PrefixLm::new(&[3..5, 4..6]).is_err() && PrefixLm::new(&[Range { start: 2, end: 1 }]).is_err());
    assert_eq!(masked(&PrefixLm::per_sequence(&[&[], &[], &[]]).unwrap()), count("sequences of a PrefixLm", 2, 3));
    assert_eq!(masked(&Tree::per_sequence(3, &[-1; 15]).unwrap()), count("sequences of trees", 2, 3));
    assert!(Tree::per_sequence(2, &[-1; 5]).is_err() && Tree::per_sequence(0, &[-1; 4]).is_err());
    assert!(Tree::new(&[-1, 1]).is_err() && Tree::new(&[-2]).is_err());
    assert!(Documents::of_lengths(&[-1]).is_err() && Documents::of_lengths(&[1u64 << 40]).is_err());
    assert!(BlockSparse::new([0, 1], [1, 1, 1, 1], &[true]).is_err());
    assert!(BlockSparse::from_rows([1, 1], 2, &[0, 3], &[0, 1]).is_err());
    assert!(matches!(BlockSparse::from_rows([1, 1], usize::MAX, &[0, 0], &[]), Err(Error::TooLarge { .. })));
    let empty = Documents::per_sequence(usize::MAX, &[0i32; 0], &[0i32; 0]).unwrap();
    assert_eq!(masked(&empty), count("sequences of documents", 2, usize::MAX));
}

/// A bias of f32::MIN does not hide its key, whatever functions come after it, and nor does a function's f32::MIN.
#[test]
fn the_lowest_number_hides_nothing() {
    let inputs = Inputs::<f32>::random(dims(2, 2, 20, 40), &mut Rng(17));
    let lowest = TensorRef::from_slice(&[f32::MIN], [1, 1]).unwrap();
    let (same, least) = (score_fn(|score, _| score), score_fn(|_, _| f32::MIN));
    let table = RelativeBias::new(2, 0, &[f32::MIN; 2]).unwrap();
    for form in [Form::Prefill, Form::Decode] {
        for (name, attention) in [
            ("bias", Attention::new().bias(lowest).modified_by(&same)),
            ("function", Attention::new().modified_by(&least)),
            ("table", Attention::new().modified_by(&table)),
            ("two", Attention::new().modified_by(&least).modified_by(&same)),
        ] {
            let (out, lse) = run(&attention.form(form), &inputs);
            for (n, row) in out.chunks(16).enumerate() {
                let head = n / 20;
                for (d, got) in row.iter().enumerate() {
                    let mean = (0..40).map(|j| inputs.v[(head * 40 + j) * 16 + d]).sum::<f32>() / 40.0;
                    // The scores are no more than rounding apart, unless one of them is 1e31 and more.
                    assert!((got - mean).abs() < 1e-5, "{name}, {form}: {got}, not the mean {mean}");
                }
            }
            assert!(lse.iter().all(|lse| lse.is_finite() && *lse < -2.3e38), "{name}, {form}");
        }
    }
}

/// Adds `by`, in a tile function of its own that may leave the tile alone, or go over it twice.
struct Plus {
    by: f32,
    times: usize,
}

impl ScoreMod for Plus {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        score + (self.by * self.times as f32) as f64 * (pair.key() % 3) as f64
    }

    fn modify(&self, tile: &mut ScoreTile<'_>) {
        for _ in 0..self.times {
            tile.modify(|score, pair| score + self.by * (pair.key() % 3) as f32);
        }
    }
}

/// Hides odd keys by changing scores.
struct HidesByModifying;

impl Mask for HidesByModifying {
    fn sees(&self, pair: Pair) -> bool {
        pair.key().is_multiple_of(2)
    }

    fn hide(&self, tile: &mut ScoreTile<'_>) {
        tile.modify(|score, pair| if self.sees(pair) { score } else { f32::NEG_INFINITY });
    }
}

/// A tile may be gone over any number of times: scores are converted to the softmax's unit after users' functions.
#[test]
fn tiles_may_be_modified_any_number_of_times() {
    for (seq_q, form) in [(40, Form::Prefill), (2, Form::Decode)] {
        let inputs = Inputs::<f32>::random(dims(4, 2, seq_q, 300), &mut Rng(18));
        for times in [0, 1, 2] {
            let (plus, hides) = (Plus { by: 0.7, times }, HidesByModifying);
            let attention = Attention::new().modified_by(&plus).masked_by(&hides).form(form);
            let expected = reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap();
            for level in Level::available() {
                let got = run(&attention.clone().level(level), &inputs);
                assert_near(&got, &expected, 1e-5, &format!("{times} times, {level}, {form}"));
            }
        }
    }
}

/// Sizes that a mask was not made for, and absurd ones, are refused.
#[test]
fn absurd_sizes_are_refused() {
    let documents = Documents::of_lengths(&[5]).unwrap();
    assert!(Covered::new(documents.clone(), [1, 1, 8, 8], 0).is_err());
    assert!(check_mask(&documents, [1, 1, 8, 8], 0).is_err());
    let all = || mask_fn(|_| true);
    assert!(Covered::new(all(), [usize::MAX, 1, 0, 0], 0).is_ok(), "there are no pairs");
    assert!(Covered::new(all(), [1, 1, usize::MAX, 1], 0).is_err());
    assert!(BlockSparse::from_rows([1, 1], usize::MAX, &[0, 0], &[]).is_err());
    assert!(WindowBias::new(1, [1 << 40, 1 << 40], &[]).is_err());
    assert!(RelativeBias::new(1, usize::MAX, &[]).is_err());
    assert!(RelativeBias::t5(1, true, 128, &[0.0; 33]).is_err(), "an odd number of buckets");
}
