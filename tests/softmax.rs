//! Softmax, its gradients and its state, against plain f64 loops and against the edge rules of the module page.

use approx::assert_abs_diff_eq;
use flashtile::softmax::*;
use flashtile::{Error, bf16, f16};

const INF: f32 = f32::INFINITY;

/// Numbers between -8 and 8, the same every time.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 20) as f32 - 8.0
    };
    (0..len).map(|_| next()).collect()
}

/// The formulas in f64 along one line of an array: (softmax, log_softmax, logsumexp).
fn by_formula(x: &[f64], scale: f64) -> (Vec<f64>, Vec<f64>, f64) {
    let max = x.iter().map(|x| scale * x).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (scale * x - max).exp()).sum();
    let log = x.iter().map(|x| scale * x - max - sum.ln()).collect::<Vec<_>>();
    (log.iter().map(|l| l.exp()).collect(), log, max + sum.ln())
}

/// The places of line `line` along `axis` of a dense array, straight from the definition of row-major order.
fn places(shape: &[usize], axis: usize, line: usize) -> Vec<usize> {
    let (len, after) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
    (0..len).map(|i| line / after * len * after + i * after + line % after).collect()
}

/// Relative: (64 + n/1024 + 16) u of the module page with n <= 20000 is below 100 u = 6e-6 at worst; differences of
/// |x| <= 8 scaled by at most 2 are below 32, whose rounding costs another 32 * 2 u.
const BOUND: f64 = 1e-5;

fn check_axes(shape: &[usize], scale: f32) {
    let len = shape.iter().product();
    let x = numbers(len, 1 + len as u64);
    for (number, &line_len) in shape.iter().enumerate() {
        let axis = Axis::new(shape, number).unwrap();
        assert_eq!((axis.elements(), axis.line_len()), (len, line_len));
        let (mut y, mut log, mut lse) = (vec![9.0; len], vec![9.0; len], vec![9.0; axis.lines()]);
        softmax_into(&x, &mut y, axis, scale).unwrap();
        log_softmax_into(&x, &mut log, axis, scale).unwrap();
        logsumexp_into(&x, &mut lse, axis, scale).unwrap();
        for (line, &lse) in lse.iter().enumerate() {
            let places = places(shape, number, line);
            let exact = by_formula(&places.iter().map(|p| f64::from(x[*p])).collect::<Vec<_>>(), f64::from(scale));
            let near = |got: f32, exact: f64, size: f64| (f64::from(got) - exact).abs() <= BOUND * size;
            for (i, p) in places.iter().enumerate() {
                assert!(near(y[*p], exact.0[i], exact.0[i]), "{shape:?} axis {number}: {} {}", y[*p], exact.0[i]);
                assert!(near(log[*p], exact.1[i], 1.0 + exact.1[i].abs()), "{shape:?}: {} {}", log[*p], exact.1[i]);
            }
            let fits = exact.2 == f64::from(lse) || near(lse, exact.2, 1.0 + exact.2.abs());
            assert!(fits, "{shape:?}: {} {}", lse, exact.2);
        }
        let (mut y2, mut log2) = (x.clone(), x.clone());
        softmax_in_place(&mut y2, axis, scale).unwrap();
        log_softmax_in_place(&mut log2, axis, scale).unwrap();
        assert_eq!((y, log), (y2, log2), "in place is into an output");
    }
}

#[test]
fn every_axis_of_every_shape() {
    // Around one vector (8), a wide strip (32) and a run of partial sums (64 rows of it).
    for n in [1, 2, 7, 8, 9, 31, 32, 33, 40, 63, 64, 65, 130, 1025] {
        check_axes(&[n], 1.0);
        check_axes(&[3, n], 1.0);
        check_axes(&[n, 3], 2.0);
        check_axes(&[2, n, 5], 0.5);
        check_axes(&[n, 33], -1.5);
    }
    check_axes(&[2, 3, 4, 5], 1.0);
    // Longer than any tile: the row in blocks (16384), the strip in blocks (32 rows, 32 of them to a sum).
    check_axes(&[2, 20_000], 1.0);
    check_axes(&[4100, 41], 1.0);
    check_axes(&[170_000, 2], 1.0);
    for shape in [&[0][..], &[0, 4], &[4, 0], &[2, 0, 3], &[0, 0]] {
        check_axes(shape, 1.0);
    }
}

/// A row longer than a tile (16384) is folded in blocks. Their maxima are apart here, so that the scale decides what each
/// counts.
#[test]
fn long_rows_with_a_scale() {
    for (step, scale) in [(3.0, 0.5), (-3.0, 0.5), (3.0, 2.0), (3.0, -1.5), (-3.0, 1e-30), (3.0, 0.0)] {
        let x: Vec<f32> = numbers(20_000, 13).iter().enumerate().map(|(i, x)| x + (i / 16_384) as f32 * step).collect();
        let (exact, log, lse) = by_formula(&x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), f64::from(scale));
        let near = |got: f32, exact: f64, size: f64| (f64::from(got) - exact).abs() <= BOUND * size;
        assert!(near(logsumexp(&x, scale), lse, 1.0 + lse.abs()), "{step} {scale}: {} {lse}", logsumexp(&x, scale));
        let (mut y, mut y_log) = (x.clone(), x);
        softmax(&mut y, scale);
        log_softmax(&mut y_log, scale);
        for i in 0..y.len() {
            assert!(near(y[i], exact[i], exact[i]), "{step} {scale}: {} {}", y[i], exact[i]);
            assert!(near(y_log[i], log[i], 1.0 + log[i].abs()), "{step} {scale}: {} {}", y_log[i], log[i]);
        }
    }
}

/// The bound of the module page, (64 + n/1024 + 16) u relative, where one long chain of additions would break it: equal
/// weights are rounded the same way again and again.
#[test]
fn equal_weights_stay_within_the_bound() {
    let n = 16_384;
    let bound = (64.0 + n as f64 / 1024.0 + 16.0) * 2f64.powi(-24);
    for step in 0..500 {
        // Weights from 1/2 to 1, beside a single 1. (Differences from 0 are exact.)
        let x = -(step as f32) * 0.001_386;
        let mut y = vec![x; n];
        y[n / 2] = 0.0;
        softmax(&mut y, 1.0);
        let sum = 1.0 + (n - 1) as f64 * f64::from(x).exp();
        for (at, exact) in [(n / 2, 1.0 / sum), (0, f64::from(x).exp() / sum)] {
            let off = (f64::from(y[at]) / exact - 1.0).abs();
            assert!(off <= bound, "weights of exp({x}): off by {off:e}, bound {bound:e}");
        }
    }
}

type Along<T> = fn(&[T], &mut [T], Axis) -> Result<(), Error>;

/// The large array starts a few elements behind the start of a line of the cache. All of it, and then every line that is
/// asked for, alone.
fn check_large<T: Number<Real = f32> + PartialEq>(shape: [usize; 2], from: impl Fn(f32) -> T, lines: &[usize]) {
    let len = shape[0] * shape[1];
    for offset in [0, 3] {
        let x: Vec<T> = numbers(offset + len, 3).into_iter().map(&from).collect();
        let x = &x[offset..];
        let functions: [Along<T>; 2] =
            [|x, y, axis| softmax_into(x, y, axis, 1.0), |x, y, axis| log_softmax_into(x, y, axis, 1.0)];
        for (number, function) in [0, 1].into_iter().flat_map(|number| functions.map(|f| (number, f))) {
            let axis = Axis::new(&shape, number).unwrap();
            let mut y = vec![from(9.0); offset + len];
            function(x, &mut y[offset..], axis).unwrap();
            assert!(y[..offset].iter().all(|y| *y == from(9.0)), "writes in front of its output");
            let y = &y[offset..];
            for &line in lines.iter().filter(|line| **line < axis.lines()) {
                let places = places(&shape, number, line);
                // A column stands beside itself: with one column alone, the first axis is the last.
                let copies = 2 - number;
                let alone: Vec<T> = places.iter().flat_map(|p| vec![x[*p]; copies]).collect();
                let mut expected = alone.clone();
                let own = if number == 0 { [places.len(), copies] } else { [1, places.len()] };
                function(&alone, &mut expected, Axis::new(&own, number).unwrap()).unwrap();
                let same = places.iter().zip(expected.iter().step_by(copies)).all(|(p, expected)| y[*p] == *expected);
                assert!(same, "{shape:?}, axis {number}, line {line}, offset {offset}");
            }
        }
        let axis = Axis::new(&shape, 0).unwrap();
        let (mut y, mut in_place) = (x.to_vec(), x.to_vec());
        softmax_into(x, &mut y, axis, 1.0).unwrap();
        softmax_in_place(&mut in_place, axis, 1.0).unwrap();
        assert!(y == in_place, "{shape:?} in place");
    }
}

/// What depends on the size of the array alone, never on a line: panels, whether weights are kept, and writing past the
/// caches (from 16 MiB on; columns only where rows are whole lines of the cache).
#[test]
fn a_line_has_the_same_bits_alone_and_in_a_large_array() {
    let lines = [0, 1, 11, 12, 13, 28, 255, 256, 269, 511, 777, 1023, 2050, 4095, 4096, 4111];
    check_large([1030, 4112], |x| x, &lines);
    check_large([1030, 4113], |x| x, &lines);
    check_large([2060, 4128], bf16::from_f32, &lines);
    check_large([2060, 4128], f16::from_f32, &lines);
    // The tile holds so many weights of one line, not of the vectors of seventeen.
    check_large([100_000, 17], |x| x, &[0, 8, 16]);
    check_large([60_000, 40], |x| x, &[0, 31, 32, 39]);
}

/// Weights are counted from the maximum of a block of 32 rows; here blocks are so far apart that those of the lower ones
/// come out as the smallest numbers there are, or as nothing.
#[test]
fn small_probabilities_come_out_whatever_stands_beside_them() {
    for gap in [30.0f32, 60.0, 80.0, 90.0, 100.0, 103.0, 110.0] {
        let x: Vec<f32> =
            numbers(200, 5).iter().enumerate().map(|(i, x)| x / 8.0 - (i / 32 % 2) as f32 * gap).collect();
        let (exact, log, _) = by_formula(&x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), 1.0);
        let mut y: Vec<f32> = x.iter().flat_map(|x| [*x; 2]).collect();
        let (mut y_log, axis) = (y.clone(), Axis::new(&[200, 2], 0).unwrap());
        softmax_in_place(&mut y, axis, 1.0).unwrap();
        log_softmax_in_place(&mut y_log, axis, 1.0).unwrap();
        let (y, y_log): (Vec<_>, Vec<_>) = y.into_iter().zip(y_log).step_by(2).unzip();
        let least = f64::from(f32::from_bits(1));
        for i in 0..200 {
            assert!((f64::from(y[i]) - exact[i]).abs() <= BOUND * exact[i] + least, "{gap}: {} {}", y[i], exact[i]);
            assert!((f64::from(y_log[i]) - log[i]).abs() <= BOUND * (1.0 + log[i].abs()), "{gap}: {}", y_log[i]);
        }
    }
}

/// The gradient of logsumexp along the first axis, where probabilities lie `gap` apart, for an upstream gradient of `gain`.
fn check_gain(gap: f32, gain: f32) {
    let x: Vec<f32> = numbers(200, 5).iter().enumerate().map(|(i, x)| x / 8.0 - (i / 100) as f32 * gap).collect();
    let (exact, _, _) = by_formula(&x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), 1.0);
    let (twice, mut dx) = (x.iter().flat_map(|x| [*x; 2]).collect::<Vec<_>>(), vec![0.0; 400]);
    logsumexp_backward_into(&twice, &[gain; 2], &mut dx, Axis::new(&[200, 2], 0).unwrap(), 1.0).unwrap();
    for (dx, exact) in dx.into_iter().step_by(2).zip(&exact) {
        let (exact, least) = (exact * f64::from(gain), f64::from(f32::from_bits(1)));
        assert!((f64::from(dx) - exact).abs() <= BOUND * exact.abs() + least, "{gap} {gain}: {dx} {exact}");
    }
}

/// A gain that makes factors tiny leaves no bits behind, as long as the result is an ordinary number.
#[test]
fn small_gains_keep_small_probabilities_exact() {
    for gap in [0.0f32, 30.0, 50.0, 57.0, 80.0] {
        for gain in [1.0f32, -1e-6, 1e-8, -1e-12, 1e-25] {
            check_gain(gap, gain);
        }
    }
}

/// A large gain makes no factor overflow, of either sign.
#[test]
fn large_gains_do_not_overflow() {
    for gap in [0.0f32, 30.0, 57.0] {
        for gain in [1e20f32, -1e20, 1e30, -1e30] {
            check_gain(gap, gain);
        }
    }
}

/// A line of NaN is one NaN throughout, in whole vectors and behind them, in place and into an output.
#[test]
fn a_line_holds_one_nan() {
    for (shape, number) in [([3, 70], 1), ([70, 70], 0), ([3, 20003], 1)] {
        let axis = Axis::new(&shape, number).unwrap();
        let mut x: Vec<bf16> = numbers(shape[0] * shape[1], 7).into_iter().map(bf16::from_f32).collect();
        x[places(&shape, number, 1)[5]] = bf16::from_bits(0x7fc1);
        let mut into = vec![bf16::ZERO; x.len()];
        softmax_into(&x, &mut into, axis, 1.0).unwrap();
        softmax_in_place(&mut x, axis, 1.0).unwrap();
        let line = places(&shape, number, 1);
        let first = x[line[0]].to_bits();
        assert!(line.iter().all(|&at| x[at].is_nan() && x[at].to_bits() == first && into[at].to_bits() == first));
    }
}

fn check_half<T: Number<Real = f32> + PartialEq>(
    from: impl Fn(f32) -> T,
    to: impl Fn(T) -> f32,
    next: impl Fn(T, i16) -> T,
) {
    for shape in [[5, 70], [70, 37]] {
        let x: Vec<T> = numbers(shape[0] * shape[1], 5).into_iter().map(&from).collect();
        let wide: Vec<f32> = x.iter().map(|x| to(*x)).collect();
        for number in 0..2 {
            let axis = Axis::new(&shape, number).unwrap();
            let (mut y, mut exact) = (x.clone(), wide.clone());
            softmax_in_place(&mut y, axis, 1.0).unwrap();
            softmax_in_place(&mut exact, axis, 1.0).unwrap();
            for (y, exact) in y.iter().zip(exact) {
                // The same f32 arithmetic but for the order of additions, then one rounding: the nearest or a neighbour.
                assert!([-1, 0, 1].iter().any(|step| next(from(exact), *step) == *y), "{y:?} {exact}");
            }
        }
    }
}

#[test]
fn half_types_are_f32_rounded_once() {
    check_half(f16::from_f32, f16::to_f32, |x, step| f16::from_bits(x.to_bits().wrapping_add_signed(step)));
    check_half(bf16::from_f32, bf16::to_f32, |x, step| bf16::from_bits(x.to_bits().wrapping_add_signed(step)));
}

/// Scales of 1, of other positive numbers and of negative ones are compiled apart.
#[test]
fn scales_that_undo_powers_of_two_give_the_same_bits() {
    let special = [-INF, -0.0, 1e-39, -1e-39, -200.0, -103.98, 0.0];
    for (shape, number) in [([3, 9], 1), ([3, 77], 1), ([2, 4097], 1), ([2, 20_000], 1), ([77, 9], 0), ([70, 140], 0)] {
        let axis = Axis::new(&shape, number).unwrap();
        let mut x: Vec<f32> = numbers(axis.elements(), 11);
        for (place, special) in places(&shape, number, 0).into_iter().zip(special) {
            x[place] = special;
        }
        x[places(&shape, number, 1)[5]] = f32::NAN;
        let bits = |factor: f32, log: bool| {
            let scaled: Vec<f32> = x.iter().map(|x| x * factor).collect();
            let mut y = vec![0.0; x.len()];
            let function = if log { log_softmax_into } else { softmax_into };
            function(&scaled, &mut y, axis, 1.0 / factor).unwrap();
            y.iter().map(|y| if y.is_nan() { f32::NAN.to_bits() } else { y.to_bits() }).collect::<Vec<_>>()
        };
        for (factor, log) in [(2.0, false), (2.0, true), (-2.0, false), (-2.0, true), (-1.0, false)] {
            assert!(bits(1.0, log) == bits(factor, log), "{shape:?}, axis {number}, factor {factor}, log {log}");
        }
    }
}

#[track_caller]
fn row(x: &[f32], scale: f32) -> Vec<f32> {
    let mut y = x.to_vec();
    softmax(&mut y, scale);
    // The same numbers as a column must obey the same rules.
    let mut column = x.to_vec();
    softmax_in_place(&mut column, Axis::new(&[x.len(), 1], 0).unwrap(), scale).unwrap();
    assert!(
        y.iter().zip(&column).all(|(a, b)| a.is_nan() == b.is_nan() && (a.is_nan() || (a - b).abs() <= 1e-6)),
        "{y:?} {column:?}"
    );
    y
}

#[test]
fn known_answers() {
    // Half of the last digit that the answers are given to.
    let near = |x: &[f32], expected: &[f32]| assert_abs_diff_eq!(x, expected, epsilon = 5e-5);
    near(&row(&[1000.0, 1001.0, 1002.0], 1.0), &[0.0900, 0.2447, 0.6652]);
    near(&row(&[2.0, 4.0, 2.0, 1.0], 1.0), &[0.1025, 0.7573, 0.1025, 0.0377]);
    let flat: Vec<f32> = [2.0, 4.0, 2.0, 1.0].map(|x| x / 9.0).to_vec();
    near(&flat, &[0.2222, 0.4444, 0.2222, 0.1111]);
    assert!(row(&flat, 1.0)[1] < 0.31);
    near(&row(&flat, 9.0), &[0.1025, 0.7573, 0.1025, 0.0377]);
}

#[test]
fn hidden_elements_are_as_if_absent() {
    for scale in [1.0, -1.0, 0.0, 1e30, 1e-45, -1e-40] {
        assert_eq!(row(&[-INF, 3.0, -INF, 3.0], scale), [0.0, 0.5, 0.0, 0.5]);
        assert_eq!(row(&[-INF; 11], scale), [0.0; 11], "nothing visible");
        let mut log = [-INF, 3.0];
        log_softmax(&mut log, scale);
        assert_eq!(log, [-INF, 0.0]);
        let mut log = [-INF; 3];
        log_softmax(&mut log, scale);
        assert_eq!((log, logsumexp(&log, scale)), ([-INF; 3], -INF));
    }
    assert_eq!(logsumexp::<f32>(&[], 1.0), -INF);
    softmax::<f32>(&mut [], 1.0);
}

#[test]
fn finite_input_never_gives_nan() {
    let extremes = [0.0, -0.0, 1.0, -1.0, 1e-45, f32::MIN_POSITIVE, 1e30, -1e30, f32::MAX, f32::MIN];
    for scale in [1.0, -1.0, 0.0, -0.0, 1e-45, 1e-38, 1e-30, -1e-33, 1e30, -1e30, f32::MAX, f32::MIN] {
        for a in extremes {
            for b in extremes {
                let y = row(&[a, b, a], scale);
                let (exact, ..) = by_formula(&[a, b, a].map(f64::from), f64::from(scale));
                for (y, exact) in y.iter().zip(exact) {
                    // The f64 formula is the judge where its own differences are exact enough.
                    assert!(y.is_finite() && (f64::from(*y) - exact).abs() < 1e-5, "{scale} * [{a}, {b}]: {y} {exact}");
                }
                let mut log = [a, b, a];
                log_softmax(&mut log, scale);
                assert!(!log.iter().any(|l| l.is_nan()) && !logsumexp(&[a, b], scale).is_nan(), "{scale} * [{a}, {b}]");
            }
        }
    }
}

#[test]
fn nan_and_infinity_fill_their_row_and_no_other() {
    for (bad, scale) in [(f32::NAN, 1.0), (f32::NAN, -2.0), (f32::from_bits(0xffc0_0123), 1.0), (INF, 1.0), (INF, 0.0)]
    {
        for (n, at) in [(3, 1), (100, 99), (100, 0)] {
            let mut x = numbers(n, 3);
            x[at] = bad;
            assert!(row(&x, scale).iter().all(|y| y.is_nan()), "{bad} at {at} of {n}");
            assert!(row(&[bad, -INF], scale).iter().all(|y| y.is_nan()), "beside hidden elements alone");
            assert!(logsumexp(&x, scale).is_nan());
            for number in 0..2 {
                let axis = Axis::new(&[n, n], number).unwrap();
                let mut y = numbers(n * n, 4);
                y[5 % n * n + at] = bad;
                softmax_in_place(&mut y, axis, scale).unwrap();
                assert_eq!(y.iter().filter(|y| y.is_nan()).count(), n);
            }
        }
    }
    assert_eq!(row(&[INF, 1.0, 1.0], -1.0), [0.0, 0.5, 0.5], "a negative scale hides +inf");
}

#[test]
fn f64_follows_the_same_rules() {
    let (inf, max) = (f64::INFINITY, f64::MAX);
    for (x, scale, expected) in [
        ([-inf, 3.0, 3.0], 0.0, [0.0, 0.5, 0.5]),
        ([-inf; 3], 1.0, [0.0; 3]),
        ([max, -max, max], 1e300, [0.5, 0.0, 0.5]),
        ([max, -max, max], -1.0, [0.0, 1.0, 0.0]),
        ([max, -max, 0.0], 0.0, [1.0 / 3.0; 3]),
        ([inf, 1.0, 1.0], -1.0, [0.0, 0.5, 0.5]),
    ] {
        let mut y = x;
        softmax(&mut y, scale);
        assert_eq!(y, expected, "{scale} * {x:?}");
    }
    let mut y = [1.0, inf, f64::NAN];
    softmax(&mut y, 1.0);
    assert!(y.iter().all(|y| y.is_nan()));
    for scale in [1.0, 0.0, -0.0, -2.0] {
        let mut log = [-inf; 3];
        log_softmax(&mut log, scale);
        assert_eq!((logsumexp(&log, scale), log), (-inf, [-inf; 3]), "nothing visible, scale {scale}");
    }
}

/// d(sum of w * f(x)) / dx by central differences: off by h^2 f''' / 6 and by 1e-16 / h of rounding, both below 1e-8.
fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-5;
    (0..x.len())
        .map(|i| {
            let at = |step: f64| {
                f(&x.iter().enumerate().map(|(j, x)| if i == j { x + step } else { *x }).collect::<Vec<_>>())
            };
            (at(h) - at(-h)) / (2.0 * h)
        })
        .collect()
}

#[test]
fn gradients_match_finite_differences() {
    let shape = [3, 4, 5];
    let double = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
    let (x, w) = (double(numbers(60, 7)).iter().map(|x| x / 4.0).collect::<Vec<_>>(), double(numbers(60, 8)));
    let dot = |y: &[f64]| y.iter().zip(&w).map(|(y, w)| y * w).sum::<f64>();
    let single = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<_>>();
    #[track_caller]
    fn near(got: &[f64], expected: &[f64], bound: f64) {
        assert!(got.iter().zip(expected).all(|(g, e)| (g - e).abs() < bound), "{got:?}\n{expected:?}");
    }
    for number in 0..3 {
        let (axis, scale) = (Axis::new(&shape, number).unwrap(), 1.3);
        let (mut y, mut dx) = (x.clone(), vec![0.0; 60]);
        let f = |x: &[f64]| {
            let mut y = x.to_vec();
            softmax_in_place(&mut y, axis, scale).unwrap();
            dot(&y)
        };
        softmax_in_place(&mut y, axis, scale).unwrap();
        softmax_backward_into(&y, &w, &mut dx, axis, scale).unwrap();
        near(&dx, &differences(&x, f), 1e-7);
        let mut dx32 = single(&w);
        softmax_backward_in_place(&single(&y), &mut dx32, axis, scale as f32).unwrap();
        near(&double(dx32), &dx, 1e-5); // |w| <= 8: a dozen roundings of numbers up to 20
        let f = |x: &[f64]| {
            let mut y = x.to_vec();
            log_softmax_in_place(&mut y, axis, scale).unwrap();
            dot(&y)
        };
        let mut y = x.clone();
        log_softmax_in_place(&mut y, axis, scale).unwrap();
        log_softmax_backward_into(&y, &w, &mut dx, axis, scale).unwrap();
        near(&dx, &differences(&x, f), 1e-7);
        let mut dx32 = single(&w);
        log_softmax_backward_in_place(&single(&y), &mut dx32, axis, scale as f32).unwrap();
        near(&double(dx32), &dx, 3e-5);
        let f = |x: &[f64]| {
            let mut l = vec![0.0; axis.lines()];
            logsumexp_into(x, &mut l, axis, scale).unwrap();
            l.iter().zip(&w).map(|(l, w)| l * w).sum()
        };
        logsumexp_backward_into(&x, &w[..axis.lines()], &mut dx, axis, scale).unwrap();
        near(&dx, &differences(&x, f), 1e-7);
        let mut dx32 = vec![0.0; 60];
        logsumexp_backward_into(&single(&x), &single(&w[..axis.lines()]), &mut dx32, axis, scale as f32).unwrap();
        near(&double(dx32), &dx, 1e-5);
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    let (rows, classes, targets) = (4, 5, [0, 4, 2, 2]);
    let x: Vec<f64> = numbers(rows * classes, 9).into_iter().map(f64::from).collect();
    let mut losses = [0.0; 4];
    cross_entropy_into(&x, &targets, classes, &mut losses).unwrap();
    for (row, loss) in losses.iter().enumerate() {
        let log = by_formula(&x[row * classes..][..classes], 1.0).1;
        assert!((loss + log[targets[row]]).abs() < 1e-12);
    }
    let mean = cross_entropy(&x, &targets, classes).unwrap();
    assert!((mean - losses.iter().sum::<f64>() / 4.0).abs() < 1e-12);
    let mut gradient = vec![0.0; rows * classes];
    cross_entropy_gradient_into(&x, &targets, classes, &[0.25; 4], &mut gradient).unwrap();
    let expected = differences(&x, |x| cross_entropy(x, &targets, classes).unwrap());
    assert!(gradient.iter().zip(&expected).all(|(g, e)| (g - e).abs() < 1e-8), "{gradient:?}\n{expected:?}");
    let single: Vec<f32> = x.iter().map(|x| *x as f32).collect();
    let mut gradient32 = vec![0.0f32; rows * classes];
    cross_entropy_gradient_into(&single, &targets, classes, &[0.25; 4], &mut gradient32).unwrap();
    assert!(gradient.iter().zip(&gradient32).all(|(g, e)| (g - f64::from(*e)).abs() < 1e-6));
    // Saturated: the loss e^-30 is far below one ulp of 1, and so is the gradient at the target.
    let (logits, mut gradient) = ([30.0f32, 0.0, -INF], [9.0f32; 3]);
    let tiny = (-30f32).exp();
    assert!(cross_entropy(&logits, &[0], 3).unwrap().abs() < 1e-7, "1 + e^-30 is rounded to 1");
    cross_entropy_gradient_into(&logits, &[0], 3, &[1.0], &mut gradient).unwrap();
    assert!(gradient[0].abs() < 1e-7 && (gradient[1] / tiny - 1.0).abs() < 1e-5 && gradient[2] == 0.0);
    assert_eq!(cross_entropy(&logits, &[2], 3).unwrap(), INF, "a hidden target");
    assert!(cross_entropy(&[f32::NAN, 0.0, -INF], &[2], 3).unwrap().is_nan(), "a hidden target beside NaN");
    assert!(cross_entropy(&[f64::NAN, 0.0, f64::NEG_INFINITY], &[2], 3).unwrap().is_nan());
    assert_eq!(cross_entropy::<f32>(&[], &[], 3).unwrap(), 0.0);
}

#[test]
fn states_merge_in_any_grouping() {
    let x = numbers(1000, 11);
    let exact = by_formula(&x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), 1.0);
    let state = |x: &[f32]| {
        let mut state = RowState::default();
        state.fold(x);
        state
    };
    let near = |s: RowState| (f64::from(s.log_sum_exp()) - exact.2).abs() < 1e-6 * exact.2.abs();
    let (a, b, c) = (state(&x[..10]), state(&x[10..700]), state(&x[700..]));
    assert!(near(state(&x)) && near(a.merge(b).merge(c)) && near(a.merge(b.merge(c))) && near(c.merge(a).merge(b)));
    let mut pushed = RowState::default();
    x.iter().for_each(|x| pushed.push(*x));
    assert!((f64::from(pushed.log_sum_exp()) - exact.2).abs() < 1e-5 * exact.2.abs(), "a thousand merges");
    let none = RowState::default();
    assert_eq!(none.merge(none), none);
    assert_eq!((none.merge(a), a.merge(none)), (a, a));
    assert_eq!((none.log_sum_exp(), state(&[-INF; 20]), state(&[])), (-INF, none, none));
    assert!(none.merge(state(&[f32::NAN])).log_sum_exp().is_nan() && state(&[INF]).merge(a).sum.is_nan());
    for bad in [f32::NAN, INF] {
        for mut pushed in [none, a] {
            pushed.push(bad);
            assert!(pushed.sum.is_nan() && pushed.log_sum_exp().is_nan(), "{bad} was pushed");
        }
    }
    assert_eq!(state(&[f32::MAX]).merge(state(&[f32::MIN])), RowState { max: f32::MAX, sum: 1.0 });
    let mut y = x.clone();
    state(&x).finish(&mut y);
    assert!(y.iter().zip(exact.0).all(|(y, e)| (f64::from(*y) - e).abs() <= BOUND * e));
    let mut hidden = [-INF; 3];
    none.finish(&mut hidden);
    assert_eq!(hidden, [0.0; 3]);
}

#[test]
fn wrong_calls_are_refused_with_their_numbers() {
    let huge = 1 << (usize::BITS - 1);
    assert_eq!(Axis::new(&[2, 3], 2), Err(Error::AxisOutOfRange { axis: 2, rank: 2 }));
    assert_eq!(Axis::new(&[], 0), Err(Error::AxisOutOfRange { axis: 0, rank: 0 }));
    for shape in [[huge, 2, 1], [2, 1, huge], [3, huge, huge]] {
        for axis in 0..3 {
            assert!(matches!(Axis::new(&shape, axis), Err(Error::TooLarge { .. })), "{shape:?}");
        }
    }
    assert!((0..3).all(|axis| Axis::new(&[huge, 0, huge], axis).is_ok() == (axis != 1)));
    // An axis of no elements in 2^126 lines is refused; other axes of the same shape have no lines and nothing to do.
    // No elements but more lines than anyone could walk along.
    let axis = Axis::new(&[usize::MAX, 0], 1).unwrap();
    softmax_in_place::<f32>(&mut [], axis, 1.0).unwrap();
    softmax_in_place::<f64>(&mut [], axis, 1.0).unwrap();
    softmax_backward_in_place::<f32>(&[], &mut [], axis, 1.0).unwrap();
    softmax_backward_in_place::<f64>(&[], &mut [], axis, 1.0).unwrap();
    assert!(logsumexp_into::<f32>(&[], &mut [], axis, 1.0).is_err());
    let axis = Axis::rows(2, 3).unwrap();
    let length = |got| Err(Error::SliceLength { expected: 6, got });
    assert_eq!(softmax_in_place(&mut [0.0f32; 5], axis, 1.0), length(5));
    assert_eq!(softmax_into(&[0.0f32; 6], &mut [0.0; 7], axis, 1.0), length(7));
    assert_eq!(softmax_backward_into(&[0.0f32; 6], &[0.0; 4], &mut [0.0; 6], axis, 1.0), length(4));
    let wrong_class = Error::ClassOutOfRange { row: 1, class: 3, classes: 3 };
    assert_eq!(cross_entropy(&[0.0f32; 6], &[0, 3], 3), Err(wrong_class.clone()));
    assert!(cross_entropy_into(&[0.0f32; 6], &[0, 1], 3, &mut [0.0]).is_err());
    assert_eq!(wrong_class.to_string(), "row 1 has class 3 but there are only 3, counted from 0");
}

#[cfg(feature = "ndarray")]
mod arrays {
    use super::*;
    use ndarray::{Array, Array3, Array4, ArrayViewD, s};

    /// Every axis of a view: all five functions against the slice forms of a dense copy.
    fn check(x: ArrayViewD<'_, f32>) {
        let dense: Vec<f32> = x.iter().copied().collect();
        for number in 0..x.ndim() {
            let axis = Axis::new(x.shape(), number).unwrap();
            let (mut y, mut log, mut lse) = (dense.clone(), dense.clone(), vec![0.0; axis.lines()]);
            softmax_in_place(&mut y, axis, 0.5).unwrap();
            log_softmax_in_place(&mut log, axis, 0.5).unwrap();
            logsumexp_into(&dense, &mut lse, axis, 0.5).unwrap();
            let mut smaller = x.shape().to_vec();
            smaller.remove(number);
            let (y, log) = [y, log].map(|y| Array::from_shape_vec(x.raw_dim(), y).unwrap()).into();
            assert_eq!(softmax_axis(&x, number, 0.5).unwrap(), y, "axis {number} of {x:?}");
            assert_eq!(log_softmax_axis(&x, number, 0.5).unwrap(), log);
            assert_eq!(logsumexp_axis(&x, number, 0.5).unwrap(), Array::from_shape_vec(smaller, lse).unwrap());
            assert!(softmax_axis(&x, number, 0.5).unwrap().is_standard_layout());
        }
        let wrong = Error::AxisOutOfRange { axis: x.ndim(), rank: x.ndim() };
        assert_eq!(softmax_axis(&x, x.ndim(), 1.0), Err(wrong.clone()));
        assert_eq!(logsumexp_axis(&x, x.ndim(), 1.0), Err(wrong));
    }

    #[test]
    fn every_axis_of_any_strides() {
        let x = Array4::from_shape_vec((2, 3, 4, 5), numbers(120, 9)).unwrap();
        check(x.view().into_dyn());
        check(x.t().into_dyn());
        check(x.view().permuted_axes([2, 0, 3, 1]).into_dyn());
        check(x.slice(s![.., ..;-1, 1..;2, ..;-2]).into_dyn());
        check(x.slice(s![1, .., .., 2]).into_dyn());
        check(x.slice(s![.., 0..0, .., ..]).into_dyn());
        check(x.slice(s![0, 0, 0, ..]).broadcast((3, 5)).unwrap().into_dyn());
    }

    #[test]
    fn in_place_writes_the_view_and_nothing_else() {
        let x = Array3::from_shape_vec((4, 5, 6), numbers(120, 10)).unwrap();
        for number in 0..3 {
            let (mut y, mut log) = (x.clone(), x.clone());
            let part = s![..;-2, 1..4, ..;3];
            softmax_axis_in_place(&mut y.slice_mut(part).reversed_axes(), number, 1.0).unwrap();
            log_softmax_axis_in_place(&mut log.slice_mut(part).reversed_axes(), number, 1.0).unwrap();
            let (mut expected, mut expected_log) = (x.clone(), x.clone());
            expected.slice_mut(part).assign(&softmax_axis(&x.slice(part), 2 - number, 1.0).unwrap());
            expected_log.slice_mut(part).assign(&log_softmax_axis(&x.slice(part), 2 - number, 1.0).unwrap());
            assert_eq!((y, log), (expected, expected_log), "axis {number}");
            let mut dense = x.clone();
            softmax_axis_in_place(&mut dense, number, 1.0).unwrap();
            assert_eq!(dense, softmax_axis(&x, number, 1.0).unwrap());
            assert!(softmax_axis_in_place(&mut dense, 3, 1.0).is_err());
        }
    }
}
