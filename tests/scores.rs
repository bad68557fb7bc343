//! Promise: scores can be inspected at every stage, and are those of the reference.

mod support;

use flashtile::mask::{BlockSparse, Documents, FirstAndLast, KeyStarts, mask_fn};
use flashtile::score::score_fn;
use flashtile::{
    AlibiSlopes, Attention, Error, Level, QueryOffset, ScoreStage, TensorMut, TensorRef, Threads, reference,
};
use std::ops::Range;
use support::layouts::ARRANGEMENTS;
use support::problems::{Bits, bits};
use support::{Dims, Inputs, Rng, len};

const STAGES: [ScoreStage; 4] = [ScoreStage::Raw, ScoreStage::Capped, ScoreStage::Biased, ScoreStage::Probabilities];

/// Some of the scores that a call gave, those of these queries and keys.
fn part(whole: &[f32], dims: Dims, queries: &Range<usize>, keys: &Range<usize>) -> Vec<f32> {
    let rows = whole.chunks_exact(dims.seq_kv).enumerate();
    let rows = rows.filter(|(row, _)| queries.contains(&(row % dims.seq_q)));
    rows.flat_map(|(_, row)| row[keys.clone()].to_vec()).collect()
}

/// Checks that the scores of random ranges have the bits of those of a whole call, `whole`. Rows that a call leaves as they are hold
/// NaN in both.
fn check_ranges<T: Bits>(
    (attention, stage): (&Attention<'_>, ScoreStage),
    inputs: &Inputs<T>,
    whole: &[f32],
    rng: &mut Rng,
) {
    let dims = inputs.dims;
    for _ in 0..3 {
        let [queries, keys] = [dims.seq_q, dims.seq_kv].map(|size| {
            let start = rng.below(size + 1);
            start..start + rng.below(size - start + 1)
        });
        let mut out = vec![f32::NAN; dims.batch * dims.heads_q * queries.len() * keys.len()];
        let into = TensorMut::from_slice(&mut out, [dims.batch, dims.heads_q, queries.len(), keys.len()]).unwrap();
        let ranges = (queries.clone(), keys.clone());
        attention.scores_range_into(stage, inputs.q(), inputs.k(), ranges, into).unwrap();
        let expected = part(whole, dims, &queries, &keys);
        assert_eq!(bits(&out), bits(&expected), "{stage:?} of {queries:?} and {keys:?}, {dims:?}");
    }
}

fn scores<T: Bits>(attention: &Attention<'_>, stage: ScoreStage, inputs: &Inputs<T>) -> Vec<f32> {
    let to = ARRANGEMENTS[0].of(inputs.dims.scores());
    let mut out = vec![f32::NAN; to.len];
    attention.scores_into(stage, inputs.q(), inputs.k(), to.tensor_mut(&mut out)).unwrap();
    out
}

/// The options of one case. The caller makes the numbers of `bias` and `slopes`.
#[derive(Clone, Copy, Debug)]
struct Options {
    causal: bool,
    window: bool,
    lengths: bool,
    mask: bool,
    bias: bool,
    softcap: bool,
    alibi: bool,
}

/// Every stage with every combination of options, at every level, against the reference.
///
/// A dot product of D terms is off by at most (D + 2) * u * sum |scale * q_e * k_e|, and each later step by a few roundings
/// of the numbers it adds up; the bound takes S for the largest of those, 2^-24 for u, and (D + 16) * u * S.
fn every_option<T: Bits>(seed: u64) {
    let mut rng = Rng(seed);
    for case in 0..1 << 7 {
        let on = |bit: usize| case >> bit & 1 == 1;
        let options = Options {
            causal: on(0),
            window: on(1),
            lengths: on(2),
            mask: on(3),
            bias: on(4),
            softcap: on(5),
            alibi: on(6),
        };
        let dims = Dims {
            batch: 2,
            heads_q: 2,
            heads_kv: 1,
            seq_q: 1 + rng.below(30),
            seq_kv: 1 + rng.below(if case % 8 == 0 { 500 } else { 60 }),
            head_dim: rng.below(30),
            value_dim: 0,
        };
        let inputs = Inputs::<T>::random(dims, &mut rng);
        let lengths = [rng.below(dims.seq_kv + 1), dims.seq_kv];
        let attend: Vec<bool> = (0..len(dims.scores())).map(|_| !rng.one_in(4)).collect();
        let bias: Vec<f32> =
            (0..len(dims.scores())).map(|_| if rng.one_in(9) { f32::NEG_INFINITY } else { rng.normal() }).collect();
        let mut attention = Attention::new().scale(0.3);
        if options.causal {
            attention = attention.causal();
        }
        if options.window {
            attention =
                attention.window(Some(rng.below(dims.seq_kv + 2)), Some(2)).query_offset(QueryOffset::FromStart);
        }
        if options.lengths {
            attention = attention.key_lengths(&lengths);
        }
        if options.mask {
            attention = attention.mask(TensorRef::from_slice(&attend, dims.scores()).unwrap());
        }
        if options.bias {
            attention = attention.bias(TensorRef::<f32>::from_slice(&bias, dims.scores()).unwrap());
        }
        if options.softcap {
            attention = attention.softcap(2.0);
        }
        if options.alibi {
            attention = attention.alibi(AlibiSlopes::Standard);
        }
        let largest = |x: &[T]| x.iter().map(|x| x.to_f32().abs() as f64).fold(0.0, f64::max);
        let sum = 0.3 * largest(&inputs.q) * largest(&inputs.k) * dims.head_dim as f64;
        let bound = (dims.head_dim + 16) as f64 * 2f64.powi(-24) * (sum + 8.0 + dims.seq_kv as f64 / 4.0);
        for stage in STAGES {
            let expected = reference::scores(&attention, stage, inputs.q(), inputs.k()).unwrap();
            for level in Level::available() {
                let got = scores(&attention.clone().level(level), stage, &inputs);
                for (n, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let at = || format!("{n} of {stage:?}: {got} and {expected}, {dims:?} {options:?} {level}");
                    let hidden =
                        *expected == f64::NEG_INFINITY || stage == ScoreStage::Probabilities && *expected == 0.0;
                    if hidden {
                        assert_eq!(*got as f64, *expected, "{}", at());
                    } else if stage == ScoreStage::Probabilities {
                        assert!(
                            (*got as f64 - expected).abs() <= 4.0 * bound * expected + 1e-7 * expected + 1e-38,
                            "{}",
                            at()
                        );
                    } else {
                        assert!((*got as f64 - expected).abs() <= bound, "{}", at());
                    }
                }
                check_ranges((&attention.clone().level(level), stage), &inputs, &got, &mut rng);
                let serial = scores(&attention.clone().level(level).threads(Threads::Serial), stage, &inputs);
                assert_eq!(bits(&serial), bits(&got), "{stage:?} {dims:?} {options:?} {level}");
            }
        }
    }
}

#[test]
fn every_option_f32() {
    every_option::<f32>(1);
}
#[test]
fn every_option_f16() {
    every_option::<flashtile::f16>(2);
}
#[test]
fn every_option_bf16() {
    every_option::<flashtile::bf16>(3);
}

/// Ranges with masks and score modifications of the open sets, sinks, and sequences of their own lengths, padded on
/// either side or packed.
#[test]
fn ranges_of_every_kind() {
    let mut rng = Rng(11);
    let dims = Dims { batch: 2, heads_q: 6, heads_kv: 2, ..Dims::new(1, 70, 300, 12) };
    let inputs = Inputs::<f32>::random(dims, &mut rng);
    let [of_queries, of_keys]: [Vec<usize>; 2] = [70, 300].map(|len| (0..len).map(|n| (n + 370 - len) / 80).collect());
    let documents = Documents::new(&of_queries, &of_keys);
    let blocks: Vec<bool> = (0..5 * 10).map(|_| !rng.one_in(3)).collect();
    let blocks = BlockSparse::new([16, 32], [1, 1, 5, 10], &blocks).unwrap();
    let (first_and_last, starts) = (FirstAndLast::new(5, 40), [30u32, 0]);
    let (starts, holes) = (KeyStarts::new(&starts), mask_fn(|pair| !(pair.key() * 7 + pair.query()).is_multiple_of(3)));
    let nearer = score_fn(|score, pair| score - 0.1 * (pair.distance() as f32).abs() + pair.query() as f32 * 0.01);
    let sinks = [0.5, -1.0, f32::NEG_INFINITY, 2.0, 0.0, 1.0];
    let bias: Vec<f32> = rng.normals(2 * 70 * 300);
    let bias = TensorRef::<f32>::from_slice(&bias, [2, 1, 70, 300]).unwrap();
    let plain = Attention::new().causal();
    let kinds = [
        plain.clone().masked_by(&documents),
        plain.clone().masked_by(&blocks).softcap(3.0),
        plain.clone().masked_by(&first_and_last).masked_by(&starts),
        plain.clone().masked_by(&holes).sinks(&sinks),
        plain.clone().modified_by(&nearer).alibi(AlibiSlopes::PerHead(&[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])),
        plain.clone().query_lengths(&[50, 70]).key_lengths(&[300, 90]),
        plain.clone().query_offset(QueryOffset::per_batch(&[-30, 400])).sinks(&sinks),
        plain.clone().first_queries(&[20, 70]).first_keys(&[33, 300]).bias(bias),
        plain.clone().first_queries(&[0, 15]).query_lengths(&[50, 60]).first_keys(&[100, 7]).key_lengths(&[300, 90]),
        plain.clone().first_queries(&[40, 3]).first_keys(&[290, 0]).masked_by(&holes).sinks(&sinks),
    ];
    for (attention, level) in kinds.iter().flat_map(|kind| Level::available().map(move |level| (kind, level))) {
        let attention = attention.clone().level(level);
        for stage in STAGES {
            check_ranges((&attention, stage), &inputs, &scores(&attention, stage, &inputs), &mut rng);
        }
    }
    // Packed: 50 and 20 queries, in one batch of 70 rows.
    let starts = [0u32, 50, 70];
    let packed = plain.query_starts(&starts).masked_by(&holes);
    let q = inputs.q().narrow(0, ..1).unwrap();
    for stage in STAGES {
        let call = |queries: Range<usize>, keys: Range<usize>| {
            let shape = [2, 6, queries.len(), keys.len()];
            let mut out = vec![f32::NAN; len(shape)];
            let into = TensorMut::from_slice(&mut out, shape).unwrap();
            packed.scores_range_into(stage, q, inputs.k(), (queries, keys), into).unwrap();
            out
        };
        let (whole, whole_dims) = (call(0..50, 0..300), Dims { seq_q: 50, ..dims });
        for (queries, keys) in [(0..50, 7..9), (15..40, 100..300), (20..21, 0..1), (49..50, 299..300)] {
            let expected = part(&whole, whole_dims, &queries, &keys);
            assert_eq!(bits(&call(queries.clone(), keys.clone())), bits(&expected), "{stage:?} {queries:?} {keys:?}");
        }
        // The second sequence has no query 20.
        assert!(part(&whole, whole_dims, &(20..50), &(0..300))[6 * 30 * 300..].iter().all(|x| x.is_nan()));
    }
}

/// Ranges outside the scores are refused, and so is an output of another size. Nothing is written.
#[test]
fn wrong_ranges() {
    let dims = Dims::new(1, 5, 9, 4);
    let inputs = Inputs::<f32>::random(dims, &mut Rng(12));
    let mut out = [7.5f32; 6];
    let mut refused = |queries: (usize, usize), keys: (usize, usize), shape: [usize; 4], error: Error| {
        let into = TensorMut::from_slice(&mut out[..len(shape)], shape).unwrap();
        let ranges = (queries.0..queries.1, keys.0..keys.1);
        let got = Attention::new().scores_range_into(ScoreStage::Biased, inputs.q(), inputs.k(), ranges, into);
        assert_eq!(got.unwrap_err(), error);
    };
    let outside = |axis, start, end, size| Error::RangeOutOfBounds { axis, start, end, size };
    refused((4, 6), (0, 3), [1, 1, 2, 3], outside(2, 4, 6, 5));
    refused((3, 5), (8, 11), [1, 1, 2, 3], outside(3, 8, 11, 9));
    refused((3, 2), (0, 3), [1, 1, 2, 3], outside(2, 3, 2, 5));
    let mismatch = Error::ShapeMismatch { tensor: "output", dimension: "seq_q", expected: 3, got: 2 };
    refused((2, 5), (0, 3), [1, 1, 2, 3], mismatch);
    assert_eq!(out, [7.5; 6]);
    // Rows of probabilities of broadcast keys that fit in no memory.
    let one = [0.5f32];
    let [q, k] = [1, 1 << 50].map(|rows| TensorRef::with_strides(&one, 0, [1, 1, rows, 1], [0; 4]).unwrap());
    let into = TensorMut::from_slice(&mut out[..1], [1, 1, 1, 1]).unwrap();
    let got = Attention::new().scores_range_into(ScoreStage::Probabilities, q, k, (.., ..1), into);
    assert_eq!(got.unwrap_err(), Error::TooLarge { what: "a row of scores" });
}

/// Rows that see no key are -inf, then 0. No mask applies to the stages before.
#[test]
fn rows_of_nothing() {
    let dims = Dims::new(1, 20, 70, 5);
    let inputs = Inputs::<f32>::random(dims, &mut Rng(4));
    for level in Level::available() {
        let attention = Attention::new().causal().query_offset(QueryOffset::At(-10)).level(level);
        for (stage, nothing) in [(ScoreStage::Biased, f32::NEG_INFINITY), (ScoreStage::Probabilities, 0.0)] {
            let got = scores(&attention, stage, &inputs);
            assert!(got[..10 * 70].iter().all(|x| x.to_bits() == nothing.to_bits()), "{stage:?} {level}");
            assert!(got[10 * 70] > nothing, "{stage:?} {level}");
        }
        let raw = scores(&attention, ScoreStage::Raw, &inputs);
        assert!(raw.iter().all(|x| x.is_finite()));
        assert_eq!(bits(&raw), bits(&scores(&attention, ScoreStage::Capped, &inputs)));
    }
}

/// The elements of a hidden key show before the masked stage, and not after.
#[test]
fn poisoned_keys() {
    let dims = Dims::new(1, 20, 70, 5);
    let mut inputs = Inputs::<f32>::random(dims, &mut Rng(5));
    for level in Level::available() {
        let attention = Attention::new().key_lengths(&[60]).level(level);
        inputs.k[60 * 5..].fill(0.0);
        let clean = STAGES.map(|stage| bits(&scores(&attention, stage, &inputs)));
        inputs.k[60 * 5..].fill(f32::NAN);
        for (stage, clean) in STAGES.into_iter().zip(clean) {
            let got = scores(&attention, stage, &inputs);
            for (n, x) in got.iter().enumerate() {
                let shows = n % 70 >= 60 && matches!(stage, ScoreStage::Raw | ScoreStage::Capped);
                assert!(if shows { x.is_nan() } else { x.to_bits() == clean[n] }, "{n} {stage:?} {level}");
            }
        }
        // A visible NaN shows, even as the only visible key.
        let only_nan: Vec<bool> = (0..70).map(|j| j == 65).collect();
        let mask = TensorRef::<bool, 1>::from_slice(&only_nan, [70]).unwrap();
        let got = scores(&Attention::new().mask(mask).level(level), ScoreStage::Probabilities, &inputs);
        assert!((0..20).all(|i| got[i * 70 + 65].is_nan()), "{level}");
    }
}

/// The output may have any layout. Its gaps stay as they are.
#[test]
fn any_layout() {
    let dims = Dims { batch: 2, heads_q: 2, ..Dims::new(1, 19, 50, 6) };
    let inputs = Inputs::<f32>::random(dims, &mut Rng(6));
    for level in Level::available() {
        for stage in STAGES {
            let attention = Attention::new().causal().level(level);
            let expected = scores(&attention, stage, &inputs);
            for layout in ARRANGEMENTS {
                let to = layout.of(dims.scores());
                let mut out = vec![7.5f32; to.len];
                attention.scores_into(stage, inputs.q(), inputs.k(), to.tensor_mut(&mut out)).unwrap();
                let (out, gaps) = to.gather(&out);
                assert_eq!(bits(&out), bits(&expected), "{stage:?} {layout:?} {level}");
                assert!(gaps.iter().all(|x| *x == 7.5), "{stage:?} {layout:?} {level}");
            }
        }
    }
}

/// The same scores as a new array.
#[cfg(feature = "ndarray")]
#[test]
fn as_an_array() {
    let dims = Dims { batch: 2, heads_q: 4, heads_kv: 2, ..Dims::new(1, 7, 11, 6) };
    let inputs = Inputs::<f32>::random(dims, &mut Rng(7));
    for stage in STAGES {
        let attention = Attention::new().causal();
        let array = attention.scores(stage, inputs.q(), inputs.k()).unwrap();
        assert_eq!(array.shape(), dims.scores());
        assert_eq!(bits(array.as_slice().unwrap()), bits(&scores(&attention, stage, &inputs)));
    }
}

/// A score that underflows is +0, whether or not some keys of its tile are hidden: the sign of a zero, too, follows from the row and the
/// key alone.
#[test]
fn zeros_have_one_sign() {
    let (tiny, key) = (6.428_48e-40, [0.660_156_25f32, -0.660_156_25]);
    for (n, level) in (1..40).flat_map(|n| Level::available().map(move |level| (n, level))) {
        let (q, k, mut scores) = (vec![tiny; 2 * n], key.repeat(n), vec![f32::NAN; n * n]);
        let [q, k] = [&q, &k].map(|x| TensorRef::from_slice(x, [1, 1, n, 2]).unwrap());
        let out = TensorMut::from_slice(&mut scores, [1, 1, n, n]).unwrap();
        let attention = Attention::new().causal().query_offset(QueryOffset::FromStart).level(level);
        attention.scores_into(ScoreStage::Biased, q, k, out).unwrap();
        let zeros = scores.iter().filter(|score| **score != f32::NEG_INFINITY);
        assert!(zeros.clone().all(|score| score.to_bits() == 0), "{n} keys, {level}: {zeros:?}");
    }
}
