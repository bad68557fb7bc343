//! Every public function at every level of this processor: the integration tests see the best level only.
//!
//! The f64 functions are the oracle. They are plain loops, and have the same bits at each level.

use super::chosen_level::isa;
use super::*;
use crate::element::{bf16, f16};
use crate::level::Level;
use crate::simd::Isa;
use crate::tensor::{TensorMut, TensorRef};
use std::cell::Cell;

thread_local! {
    static CHOSEN: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// The level that the test on this thread has chosen.
pub(super) fn chosen() -> Option<Isa> {
    CHOSEN.get()
}

/// Runs `check` once at each level. Other threads' calls are not affected: a call hands its level to its workers.
fn at_every_level(check: impl Fn(Level)) {
    for level in Level::available() {
        CHOSEN.set(Isa::detect(level));
        assert_eq!(isa().level(), level);
        check(level);
    }
    CHOSEN.set(None);
}

/// The probabilities among the scores run at the level that they are given, not at the best one.
#[test]
fn plain_runs_at_its_level() {
    let row: Vec<f32> = (0..1000).map(|n| (n * 7919 % 1000) as f32 * 0.01).collect();
    at_every_level(|level| {
        let (mut expected, mut got) = (row.clone(), row.clone());
        softmax(&mut expected, 1.0).unwrap();
        CHOSEN.set(None);
        plain(Isa::detect(level).unwrap(), &mut got);
        assert_eq!(got, expected, "{level}");
    });
    let mut bits = Vec::new();
    for level in Level::available() {
        let mut probs = row.clone();
        plain(Isa::detect(level).unwrap(), &mut probs);
        bits.push(probs);
    }
    // Otherwise this test could not fail.
    assert!(bits.len() == 1 || bits.iter().any(|probs| *probs != bits[0]), "all levels have the same bits");
}

const INF: f32 = f32::INFINITY;

/// Relative: see `BOUND` in `tests/softmax.rs`.
const BOUND: f64 = 1e-5;

/// Numbers between -8 and 8, the same every time.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 20) as f32 - 8.0
    };
    (0..len).map(|_| next()).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// Each number within `bound` of the exact one, relative to it and to `size`.
#[track_caller]
fn assert_near(got: &[f32], exact: &[f64], size: f64, bound: f64, case: &str) {
    for (got, exact) in got.iter().zip(exact) {
        let near = f64::from(*got) == *exact || (f64::from(*got) - exact).abs() <= bound * (size + exact.abs());
        assert!(near, "{got} for {exact}: {case}");
    }
}

/// Last and first axes. Lengths around one vector, a wide strip, a block of rows, a run of partial sums and a tile.
const SHAPES: [[usize; 2]; 10] =
    [[3, 7], [2, 16], [3, 33], [9, 40], [40, 9], [33, 70], [70, 140], [1030, 5], [5, 1030], [2, 40_000]];

#[test]
fn forward_functions() {
    at_every_level(|level| {
        for (shape, number, scale) in
            SHAPES.into_iter().flat_map(|s| [(s, 0, 1.0), (s, 1, 1.0), (s, 0, -1.5), (s, 1, 0.5)])
        {
            let (case, axis) =
                (format!("{level} {shape:?} axis {number} scale {scale}"), Axis::new(&shape, number).unwrap());
            let mut x = numbers(axis.elements(), 1);
            x[axis.elements() / 2] = -INF;
            let (x64, scale64) = (wide(&x), f64::from(scale));
            let (mut y, mut exact) = (x.clone(), x64.clone());
            softmax_into(&x, &mut y, axis, scale).unwrap();
            softmax_into(&x64, &mut exact, axis, scale64).unwrap();
            assert_near(&y, &exact, 0.0, BOUND, &case);
            log_softmax_into(&x, &mut y, axis, scale).unwrap();
            log_softmax_into(&x64, &mut exact, axis, scale64).unwrap();
            assert_near(&y, &exact, 1.0, BOUND, &case);
            let mut in_place = x.clone();
            log_softmax_in_place(&mut in_place, axis, scale).unwrap();
            assert_eq!(in_place, y, "{case}");
            let (mut lse, mut exact) = (vec![0.0; axis.lines()], vec![0.0; axis.lines()]);
            logsumexp_into(&x, &mut lse, axis, scale).unwrap();
            logsumexp_into(&x64, &mut exact, axis, scale64).unwrap();
            assert_near(&lse, &exact, 1.0, BOUND, &case);
        }
    });
}

/// Short rows have the bits of a row alone, in any group, in place or not, transposed or in registers, and with states handed out.
#[test]
fn short_rows() {
    fn check<T: Number<Real = f32> + PartialEq>(from: fn(f32) -> T, case: &str) {
        for len in (1..=40).chain([63, 64, 65, 100, 127, 128, 129, 500, 513]) {
            let rows = 37;
            let axis = Axis::rows(rows, len).unwrap();
            let mut x = numbers(axis.elements(), len as u64);
            x[len / 2] = -INF;
            x[3 * len..4 * len].fill(-INF);
            for scale in [1.0, 0.3, -2.0] {
                let x: Vec<T> = x.iter().map(|&x| from(x)).collect();
                let (mut y, mut log, mut lse) = (x.clone(), x.clone(), vec![from(0.0); rows]);
                softmax_into(&x, &mut y, axis, scale).unwrap();
                let mut in_place = x.clone();
                softmax_in_place(&mut in_place, axis, scale).unwrap();
                assert!(in_place == y, "{case} {len} in place");
                log_softmax_in_place(&mut log, axis, scale).unwrap();
                logsumexp_into(&x, &mut lse, axis, scale).unwrap();
                let upstream: Vec<T> = (0..rows).map(|row| from([1.0, -3e-5, 1e-33, 100.0][row % 4])).collect();
                let mut dx = x.clone();
                logsumexp_backward_into(&x, &upstream, &mut dx, axis, scale).unwrap();
                for (row, x) in x.chunks(len).enumerate() {
                    let (at, case) = (row * len..(row + 1) * len, format!("{case} row {row} of {len} scale {scale}"));
                    let mut alone = x.to_vec();
                    softmax(&mut alone, scale).unwrap();
                    assert_eq!(y[at.clone()], alone, "{case}");
                    let mut alone = x.to_vec();
                    log_softmax(&mut alone, scale).unwrap();
                    assert_eq!(log[at.clone()], alone, "log_softmax {case}");
                    assert_eq!(lse[row], logsumexp(x, scale).unwrap(), "logsumexp {case}");
                    logsumexp_backward_into(x, &upstream[row..=row], &mut alone, Axis::row(len), scale).unwrap();
                    assert_eq!(dx[at.clone()], alone, "gradient {case}");
                    // With an upstream gradient, rows are transposed at every level.
                    if upstream[row] == from(1.0) && scale == 1.0 {
                        assert_eq!(dx[at.clone()], y[at], "in registers and transposed {case}");
                    }
                }
            }
        }
    }
    at_every_level(|level| {
        check(|x| x, &format!("{level} f32"));
        check(f16::from_f32, &format!("{level} f16"));
        check(bf16::from_f32, &format!("{level} bf16"));
    });
}

/// A NaN or an infinity in one lane stays there.
#[test]
fn short_rows_do_not_mix() {
    at_every_level(|level| {
        for len in [1, 2, 7, 8, 20, 128] {
            let axis = Axis::rows(32, len).unwrap();
            let x = numbers(axis.elements(), 9);
            let mut expected = x.clone();
            softmax_in_place(&mut expected, axis, 1.0).unwrap();
            for (row, bad) in (0..32).zip([f32::NAN, INF].into_iter().cycle()) {
                let mut y = x.clone();
                y[row * len + len - 1] = bad;
                softmax_in_place(&mut y, axis, 1.0).unwrap();
                for (i, (y, expected)) in y.iter().zip(&expected).enumerate() {
                    let right = if i / len == row { y.is_nan() } else { y == expected };
                    assert!(right, "{level} {len}: {y} at {i}, {bad} in row {row}");
                }
            }
        }
    });
}

/// Blocks of a long row far below and far above each other, with upstream gradients that make up for it. The longest row does
/// not keep its exponentials.
#[test]
fn long_rows() {
    at_every_level(|level| {
        for len in [16_385, 50_000, (1 << 20) + 9] {
            for slope in [-160.0, -30.0, 30.0, 160.0] {
                let case = format!("{level} {len} slope {slope}");
                let mut x = numbers(len, 10);
                for (i, x) in x.iter_mut().enumerate() {
                    *x = (*x * 0.1 + slope * (i / 16_384) as f32).max(slope * 3.0 - 100.0).min(500.0);
                }
                let axis = Axis::row(len);
                let (mut y, mut exact) = (x.clone(), wide(&x));
                softmax(&mut y, 1.0).unwrap();
                softmax(&mut exact, 1.0).unwrap();
                // A result that is denormal has lost bits.
                assert_near(&y, &exact, 1e-36, 3.0 * BOUND, &case);
                let mut into = vec![0.0; len];
                softmax_into(&x, &mut into, axis, 1.0).unwrap();
                assert!(into == y, "{case}");
                let (mut y, mut exact) = (x.clone(), wide(&x));
                log_softmax(&mut y, 1.0).unwrap();
                log_softmax(&mut exact, 1.0).unwrap();
                assert_near(&y, &exact, 1.0, BOUND, &case);
                for factor in [1e-33f32, 1e30, -1e37] {
                    let (mut dx, mut exact) = (vec![0.0f32; len], vec![0.0; len]);
                    logsumexp_backward_into(&x, &[factor], &mut dx, axis, 1.0).unwrap();
                    logsumexp_backward_into(&wide(&x), &[f64::from(factor)], &mut exact, axis, 1.0).unwrap();
                    // Shares of less than 2^-149 are 0.
                    let size = 1e-36 + 1e-44 * f64::from(factor.abs()) / BOUND;
                    assert_near(&dx, &exact, size, 3.0 * BOUND, &format!("{case} upstream {factor}"));
                }
            }
        }
    });
}

/// A block far below the maximum of its line, and an upstream gradient that makes up for it.
#[test]
fn large_upstream_gradients_of_small_probabilities() {
    at_every_level(|level| {
        let axis = Axis::new(&[40, 9], 0).unwrap();
        let mut x = numbers(axis.elements(), 8);
        x[32 * 9..].iter_mut().for_each(|x| *x -= 80.0);
        for factor in [1e10f32, -1e20, 1e30, 1e37] {
            let (mut dx, mut exact) = (vec![0.0f32; x.len()], vec![0.0; x.len()]);
            logsumexp_backward_into(&x, &[factor; 9], &mut dx, axis, 1.0).unwrap();
            logsumexp_backward_into(&wide(&x), &[f64::from(factor); 9], &mut exact, axis, 1.0).unwrap();
            assert_near(&dx, &exact, 0.0, BOUND, &format!("{level} upstream {factor}"));
        }
    });
}

#[test]
fn gradients() {
    at_every_level(|level| {
        for (shape, number) in SHAPES.into_iter().flat_map(|shape| [(shape, 0), (shape, 1)]) {
            let (case, axis) = (format!("{level} {shape:?} axis {number}"), Axis::new(&shape, number).unwrap());
            let (x, dy) = (numbers(axis.elements(), 2), numbers(axis.elements(), 3));
            let (x64, dy64) = (wide(&x), wide(&dy));
            let (mut dx, mut exact) = (vec![0.0f32; x.len()], vec![0.0; x.len()]);
            let mut y = x.clone();
            softmax_in_place(&mut y, axis, 1.0).unwrap();
            softmax_backward_into(&y, &dy, &mut dx, axis, 1.3).unwrap();
            softmax_backward_into(&wide(&y), &dy64, &mut exact, axis, f64::from(1.3f32)).unwrap();
            // |dy| <= 8 and |total| <= 8: a few dozen roundings.
            assert_near(&dx, &exact, 1.0, BOUND, &case);
            log_softmax_into(&x, &mut y, axis, 1.0).unwrap();
            log_softmax_backward_into(&y, &dy, &mut dx, axis, 1.3).unwrap();
            log_softmax_backward_into(&wide(&y), &dy64, &mut exact, axis, f64::from(1.3f32)).unwrap();
            // A total of up to 8 n, in runs of 64.
            assert_near(&dx, &exact, 8.0 * axis.line_len() as f64, BOUND, &case);
            for factor in [1.0f32, -1e-12, 1e-33, -1e30, 3e38] {
                logsumexp_backward_into(&x, &vec![factor; axis.lines()], &mut dx, axis, 1.0).unwrap();
                let upstream = vec![f64::from(factor); axis.lines()];
                logsumexp_backward_into(&x64, &upstream, &mut exact, axis, 1.0).unwrap();
                // Results of 1e-33 may be denormal.
                let size = if factor == 1e-33 { 1e-36 } else { 0.0 };
                assert_near(&dx, &exact, size, BOUND, &format!("{case} upstream {factor}"));
            }
        }
        let (x, targets) = (numbers(12, 4), [3, 0, 1]);
        let loss = cross_entropy(&x, &targets, 4).unwrap();
        let (mut gradient, mut exact) = ([0.0f32; 12], [0.0; 12]);
        cross_entropy_gradient_into(&x, &targets, 4, &[1.0; 3], &mut gradient).unwrap();
        cross_entropy_gradient_into(&wide(&x), &targets, 4, &[1.0; 3], &mut exact).unwrap();
        assert_near(&[loss], &[cross_entropy(&wide(&x), &targets, 4).unwrap()], 1.0, BOUND, "loss");
        assert_near(&gradient, &exact, 1.0, BOUND, "gradient of the loss");
    });
}

/// Half types are computed in f32 and rounded once: the error is half a unit in the last place plus that of f32.
fn check_half<T: Number<Real = f32>>(from: fn(f32) -> T, half_ulp: f64, level: Level) {
    // The spacing of numbers below this is that of denormal numbers.
    let least = 6e-5;
    for (shape, number) in [([5, 70], 1), ([70, 37], 0), ([70, 140], 0), ([2, 20_000], 1)] {
        let axis = Axis::new(&shape, number).unwrap();
        let x: Vec<T> = numbers(axis.elements(), 5).into_iter().map(from).collect();
        let (mut y, mut exact) = (x.clone(), x.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
        softmax_in_place(&mut y, axis, 1.0).unwrap();
        softmax_in_place(&mut exact, axis, 1.0).unwrap();
        let y: Vec<f32> = y.iter().map(|y| y.to_f64() as f32).collect();
        assert_near(&y, &exact, least, half_ulp + BOUND, &format!("{level} {shape:?} axis {number}"));
    }
}

#[test]
fn half_types() {
    at_every_level(|level| {
        check_half(f16::from_f32, 2f64.powi(-11), level);
        check_half(bf16::from_f32, 2f64.powi(-8), level);
    });
}

#[test]
fn edge_rules() {
    at_every_level(|level| {
        for scale in [1.0, -1.0, 0.0, 1e30, 1e-45, -1e-40] {
            for axis in [Axis::row(4), Axis::new(&[4, 1], 0).unwrap()] {
                let case = format!("{level} scale {scale}");
                let with = |mut x: [f32; 4]| {
                    softmax_in_place(&mut x, axis, scale).unwrap();
                    x
                };
                assert_eq!(with([-INF, 3.0, -INF, 3.0]), [0.0, 0.5, 0.0, 0.5], "{case}");
                assert_eq!(with([-INF; 4]), [0.0; 4], "{case}");
                assert!(with([1.0, f32::NAN, 2.0, -INF]).iter().all(|y| y.is_nan()), "{case}");
                assert!(with([f32::MAX, f32::MIN, 0.0, 1e-45]).iter().all(|y| y.is_finite()), "{case}");
                let infinite = with([1.0, INF, 2.0, -INF]);
                assert!(infinite.iter().all(|y| if scale < 0.0 { y.is_finite() } else { y.is_nan() }), "{case}");
            }
            assert_eq!(logsumexp(&[-INF; 20], scale), Ok(-INF), "{level} scale {scale}");
        }
    });
}

#[test]
fn states() {
    at_every_level(|level| {
        let x = numbers(1300, 6);
        let exact = logsumexp(&wide(&x), 1.0).unwrap();
        let (mut state, mut pieces) = (RowState::default(), RowState::default());
        state.fold(&x);
        x.chunks(111).for_each(|x| pieces.fold(x));
        assert_near(&[state.log_sum_exp(), pieces.log_sum_exp()], &[exact; 2], 0.0, BOUND, &level.to_string());
        let (mut y, mut exact) = (x.clone(), wide(&x));
        state.finish(&mut y);
        softmax(&mut exact, 1.0).unwrap();
        assert_near(&y, &exact, 0.0, BOUND, &level.to_string());
        for bad in [f32::NAN, INF] {
            let mut state = state;
            state.fold(&[1.0, bad]);
            assert!(state.sum.is_nan(), "{level}: {bad}");
        }
        let mut nothing = RowState::default();
        nothing.fold(&[-INF; 20]);
        assert_eq!(nothing, RowState::default(), "{level}");
    });
}

/// Slices only. `exp_is_within_one_place_everywhere` in `simd/tests/exponentials.rs` tests each number.
#[test]
fn exp_of_slices() {
    at_every_level(|level| {
        for len in 0..70 {
            let x: Vec<f32> = numbers(len, 7).into_iter().map(|x| 11.0 * x).collect();
            let (mut y, mut in_place) = (vec![9.0; len], x.clone());
            exp_into(&x, &mut y).unwrap();
            exp_in_place(&mut in_place);
            let exact: Vec<f64> = x.iter().map(|x| f64::from(*x).exp()).collect();
            // Two units in the last place, each at most 2^-23.
            assert_near(&y, &exact, 0.0, 2f64.powi(-22), &format!("{level} {len}"));
            assert_eq!(y, in_place, "{level} {len}");
        }
        let mut x = [0.0, -0.0, -INF, INF, 88.72284, -103.98, f32::NAN];
        exp_in_place(&mut x);
        assert_eq!(x[..6], [1.0, 1.0, 0.0, INF, INF, 0.0], "{level}");
        assert!(x[6].is_nan(), "{level}");
    });
}

/// Calls with options, whose rows are converted, masked and weighted by loops of their own.
#[test]
fn calls_with_options() {
    at_every_level(|level| {
        for len in [1, 3, 4, 7, 8, 9, 16, 17, 33, 130, 1030] {
            let case = format!("{len} elements, {level}");
            let half: Vec<bf16> = numbers(3 * len, 9).into_iter().map(bf16::from_f32).collect();
            let x: Vec<f64> = half.iter().map(|x| x.to_f64()).collect();
            let bias: Vec<f16> = numbers(len, 5).into_iter().map(f16::from_f32).collect();
            let visible: Vec<bool> = (0..len).map(|n| n % 5 != 3).collect();
            let options = Softmax::new().scale(0.5).mask(TensorRef::from_slice(&visible, [len]).unwrap());
            let options = options.bias(TensorRef::from_slice(&bias, [len]).unwrap());
            for axis in 0..2 {
                let (shape, options) = ([3, len], options.clone().axis(axis as u8));
                let (mut exact, mut got, mut narrow) = (vec![9.0; 3 * len], vec![9.0f32; 3 * len], half.clone());
                let (wide, x) =
                    (TensorRef::from_slice(&half, shape).unwrap(), TensorRef::from_slice(&x, shape).unwrap());
                options.softmax_into(x, TensorMut::from_slice(&mut exact, shape).unwrap()).unwrap();
                options.softmax_into(wide, TensorMut::from_slice(&mut got, shape).unwrap()).unwrap();
                options.softmax_into(wide, TensorMut::from_slice(&mut narrow, shape).unwrap()).unwrap();
                assert_near(&got, &exact, 0.0, BOUND, &case);
                assert!(got.iter().zip(&narrow).all(|(got, narrow)| bf16::from_f32(*got) == *narrow), "{case}");
            }
            let weights: Vec<f32> = (0..len).map(|n| (n % 4) as f32).collect();
            let targets: [u32; 3] = [0, (len / 2) as u32, (len - 1) as u32];
            let axis = Axis::rows(3, len).unwrap();
            let options = CrossEntropy::new().label_smoothing(0.25).reduction(Reduction::Sum);
            for options in [options, options.class_weights(&weights)] {
                let (mut exact, mut got) = ([9.0f64], [9.0f32]);
                options.loss_into(&x, &targets, axis, &mut exact).unwrap();
                options.loss_into(&half, &targets, axis, &mut got).unwrap();
                assert_near(&got, &exact, 1.0, BOUND, &case);
                let (mut exact, mut got) = (vec![9.0; 3 * len], vec![9.0f32; 3 * len]);
                let single: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
                options.gradient_into(&x, &targets, axis, &[0.5], &mut exact).unwrap();
                options.gradient_into(&single, &targets, axis, &[0.5], &mut got).unwrap();
                // Terms are up to the weight of a target, 3, and its share of all.
                assert_near(&got, &exact, 3.0, BOUND, &case);
            }
        }
    });
}
