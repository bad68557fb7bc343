//! Promise: scores can be inspected at every stage, and are those of the reference.

mod support;

use flashtile::{AlibiSlopes, Attention, Level, QueryOffset, ScoreStage, TensorRef, Threads, reference};
use support::layouts::ARRANGEMENTS;
use support::problems::{Bits, bits};
use support::{Dims, Inputs, Rng, len};

const STAGES: [ScoreStage; 4] = [ScoreStage::Raw, ScoreStage::Capped, ScoreStage::Biased, ScoreStage::Probabilities];

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
