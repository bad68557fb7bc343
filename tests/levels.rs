//! Promise: every level of the processor is available, runs when it is selected, and agrees with the others. No level is skipped
//! in silence.

mod support;

use flashtile::{AlibiSlopes, Attention, Error, Level, bf16, f16, reference};
use support::problems::{Bits, FORMS};
use support::{Dims, Inputs, Rng};

/// The levels that must be available: those that the standard library detects, or the names in `FLASHTILE_EXPECT_LEVELS`,
/// separated by commas, where CI sets it.
fn expected() -> Vec<Level> {
    if let Ok(names) = std::env::var("FLASHTILE_EXPECT_LEVELS") {
        let level = |name: &str| {
            let known = Level::ALL.iter().copied().find(|level| level.to_string() == name);
            known.unwrap_or_else(|| panic!("FLASHTILE_EXPECT_LEVELS names a level {name:?}, which does not exist"))
        };
        return names.split(',').map(|name| level(name.trim())).collect();
    }
    let mut levels = vec![Level::Portable];
    #[cfg(feature = "_four-lanes")]
    levels.push(Level::Portable4);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        levels.push(Level::Avx2);
        let foundation = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        if foundation && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl") {
            levels.push(Level::Avx512);
            if is_x86_feature_detected!("avx512bf16") {
                levels.push(Level::Avx512Bf16);
            }
        }
    }
    levels
}

#[test]
fn expected_levels_run() {
    let available: Vec<_> = Level::available().collect();
    assert_eq!(available, expected());
    let fastest = available.iter().rev().find(|level| **level != Level::Avx512Bf16);
    assert!([available.last(), fastest].contains(&Some(&Level::best())), "{}", Level::best());
    let inputs = Inputs::<f32>::random(Dims::new(1, 9, 9, 9), &mut Rng(1));
    for level in Level::ALL {
        for form in FORMS {
            let attention = Attention::new().level(*level).form(form);
            let plan = attention.plan(inputs.q(), (inputs.k(), inputs.v()));
            let prepared = attention.prepare(inputs.q(), (inputs.k(), inputs.v()));
            if available.contains(level) {
                let plan = plan.unwrap();
                assert_eq!((plan.level(), plan.form()), (*level, form));
                assert_eq!(*prepared.unwrap().plan(), plan);
            } else {
                assert_eq!(plan.unwrap_err(), Error::LevelUnavailable { level: *level });
                assert_eq!(prepared.unwrap_err(), Error::LevelUnavailable { level: *level });
            }
        }
    }
    let plan = Attention::new().plan(inputs.q(), (inputs.k(), inputs.v())).unwrap();
    assert_eq!(plan.level(), Level::best(), "without a given level");
    // The message for an unavailable level can be checked on every processor.
    let message = Error::LevelUnavailable { level: Level::Avx2 }.to_string();
    assert!(message.contains("does not have the level avx2"), "{message}");
}

/// Each level is within the a-priori bound of the f64 reference, and so all are within twice that bound of each other.
///
/// With u = 2^-24, S the largest sum of |scale * q_e * k_e| of a row plus its biases, and A = sum of p_j |v_j|: a score is
/// off by at most (D + 8) * u * S, the probs by that and 8 ulp of arithmetic, and a sum of N terms by N * u; so an output
/// is off by at most A * u * (2 * (D + 8) * S + N + 32), half an ulp of its type aside. (Here A is bounded by max |v|.)
fn agree<T: Bits>(seed: u64) {
    let mut rng = Rng(seed);
    for round in 0..40 {
        let dims = Dims {
            batch: 2,
            heads_q: 4,
            heads_kv: 2,
            seq_q: 1 + rng.below(30),
            seq_kv: 1 + rng.below(300),
            head_dim: 1 + rng.below(70),
            value_dim: 1 + rng.below(70),
        };
        let inputs = Inputs::<T>::random(dims, &mut rng);
        let mut attention = Attention::new();
        if rng.one_in(2) {
            attention = attention.causal().softcap(10.0).alibi(AlibiSlopes::Standard);
        }
        let expected = reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap();
        let largest = |x: &[T]| x.iter().map(|x| x.to_f32().abs() as f64).fold(0.0, f64::max);
        let dim = dims.head_dim as f64;
        let scores = largest(&inputs.q) * largest(&inputs.k) * dim.sqrt() + dims.seq_kv as f64 / 4.0;
        let u = 2f64.powi(-24);
        let relative = u * (2.0 * (dim + 8.0) * scores + dims.seq_kv as f64 + 32.0);
        let v = largest(&inputs.v);
        let half_ulp = match T::DTYPE {
            flashtile::DType::F32 => u,
            flashtile::DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        for form in FORMS {
            for level in Level::available() {
                let (out, lse) = inputs.compute(&attention.clone().form(form).level(level));
                for (got, expected) in out.iter().zip(&expected.out) {
                    let off = (got.to_f32() as f64 - expected).abs();
                    let bound = v * relative + half_ulp * v;
                    assert!(off <= bound, "off by {off:e}, bound {bound:e}: round {round} {dims:?} {form:?} {level}");
                }
                for (got, expected) in lse.iter().zip(&expected.lse) {
                    let off = (*got as f64 - expected).abs();
                    let empty = *got == f32::NEG_INFINITY && *expected == f64::NEG_INFINITY;
                    assert!(empty || off <= relative, "lse off by {off:e}: round {round} {dims:?} {form:?} {level}");
                }
            }
        }
    }
}

#[test]
fn levels_agree_f32() {
    agree::<f32>(2);
}
#[test]
fn levels_agree_f16() {
    agree::<f16>(3);
}
#[test]
fn levels_agree_bf16() {
    agree::<bf16>(4);
}
