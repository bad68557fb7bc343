//! Promise: softmax, its gradients and its state agree with plain f64 loops and with the edge rules of the module page.

mod support;

use approx::assert_abs_diff_eq;
use flashtile::softmax::*;
use flashtile::{Error, bf16, f16};
use support::Rng;

const INF: f32 = f32::INFINITY;

/// Numbers between -8 and 8, the same every time.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng(seed);
    (0..len).map(|_| 8.0 * rng.uniform()).collect()
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
        let got = logsumexp(&x, scale).unwrap();
        assert!(near(got, lse, 1.0 + lse.abs()), "{step} {scale}: {got} {lse}");
        let (mut y, mut y_log) = (x.clone(), x);
        softmax(&mut y, scale).unwrap();
        log_softmax(&mut y_log, scale).unwrap();
        for i in 0..y.len() {
            assert!(near(y[i], exact[i], exact[i]), "{step} {scale}: {} {}", y[i], exact[i]);
            assert!(near(y_log[i], log[i], 1.0 + log[i].abs()), "{step} {scale}: {} {}", y_log[i], log[i]);
        }
    }
}

/// The bound of the module page, (64 + n/1024 + 16) u relative, where one long chain of additions would break it: equal
/// probs are rounded the same way in every addition.
#[test]
fn equal_probs_stay_within_the_bound() {
    let n = 16_384;
    let bound = (64.0 + n as f64 / 1024.0 + 16.0) * 2f64.powi(-24);
    for step in 0..500 {
        // Probs from 1/2 to 1, beside a single 1. (Differences from 0 are exact.)
        let x = -(step as f32) * 0.001_386;
        let mut y = vec![x; n];
        y[n / 2] = 0.0;
        softmax(&mut y, 1.0).unwrap();
        let sum = 1.0 + (n - 1) as f64 * f64::from(x).exp();
        for (at, exact) in [(n / 2, 1.0 / sum), (0, f64::from(x).exp() / sum)] {
            let off = (f64::from(y[at]) / exact - 1.0).abs();
            assert!(off <= bound, "probs of exp({x}): off by {off:e}, bound {bound:e}");
        }
    }
}

type Along<T> = fn(&[T], &mut [T], Axis) -> Result<(), Error>;

/// The large array starts a few elements after the start of a cache line. All of it is computed, and then each given line
/// alone.
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
                // Each column comes twice: with one column alone, the first axis is the last.
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

/// What depends on the size of the array alone, never on a line: panels, whether probs are kept, and writing past the
/// caches (from 16 MiB on; columns only where rows are whole lines of the cache).
#[test]
fn a_line_has_the_same_bits_alone_and_in_a_large_array() {
    let lines = [0, 1, 11, 12, 13, 28, 255, 256, 269, 511, 777, 1023, 2050, 4095, 4096, 4111];
    check_large([1030, 4112], |x| x, &lines);
    check_large([1030, 4113], |x| x, &lines);
    check_large([2060, 4128], bf16::from_f32, &lines);
    check_large([2060, 4128], f16::from_f32, &lines);
    // The tile holds that many probs of one line, not of the vectors of seventeen.
    check_large([100_000, 17], |x| x, &[0, 8, 16]);
    check_large([60_000, 40], |x| x, &[0, 31, 32, 39]);
}

/// Probs are relative to the maximum of a block of 32 rows. Here blocks are so far apart that those of the lower ones are
/// the smallest numbers there are, or 0.
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
    softmax(&mut y, scale).unwrap();
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
        log_softmax(&mut log, scale).unwrap();
        assert_eq!(log, [-INF, 0.0]);
        let mut log = [-INF; 3];
        log_softmax(&mut log, scale).unwrap();
        assert_eq!((log, logsumexp(&log, scale).unwrap()), ([-INF; 3], -INF));
    }
    assert_eq!(logsumexp::<f32>(&[], 1.0).unwrap(), -INF);
    softmax::<f32>(&mut [], 1.0).unwrap();
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
                log_softmax(&mut log, scale).unwrap();
                assert!(
                    !log.iter().any(|l| l.is_nan()) && !logsumexp(&[a, b], scale).unwrap().is_nan(),
                    "{scale} * [{a}, {b}]"
                );
            }
        }
    }
}

/// Rows of two shapes and columns: alone, beside each other, in several blocks, in a row longer than any tile.
const LAYOUTS: [([usize; 2], usize); 7] =
    [([1, 3], 1), ([1, 70], 1), ([2, 20_000], 1), ([3, 1], 0), ([70, 1], 0), ([70, 37], 0), ([40, 100], 0)];

/// One line of an array along `axis`: the numbers at its start, its middle and its end, `fill` between them.
fn spread<T: Copy>(numbers: &[T], fill: T, shape: [usize; 2], axis: usize, line: usize) -> Vec<T> {
    let places = places(&shape, axis, line);
    let mut x = vec![fill; shape[0] * shape[1]];
    for (n, number) in numbers.iter().enumerate() {
        x[places[n * (places.len() - 1) / (numbers.len() - 1)]] = *number;
    }
    x
}

/// A difference of finite numbers can overflow where its product with the scale does not.
#[test]
fn logarithms_of_differences_beyond_the_largest_number() {
    let hidden = f32::NEG_INFINITY;
    for scale in [0.5f32, 0.99, -0.5, 1e-30, -1e-30, 3e-33, 0.1, -0.7, 1.0, -1.0, 2.0, 1e30] {
        for (high, low) in [(3.2e38f32, -1e38f32), (f32::MAX, f32::MIN), (1e38, -3e38), (0.0, f32::MIN)] {
            // The f64 formula: nothing overflows there.
            let exact = by_formula(&[high, low].map(f64::from), f64::from(scale)).1;
            for (shape, number) in LAYOUTS {
                let axis = Axis::new(&shape, number).unwrap();
                let line = axis.lines() / 2;
                let x = spread(&[high, low], hidden, shape, number, line);
                let ends = places(&shape, number, line);
                let ends = [ends[0], ends[ends.len() - 1]];
                let case = format!("{scale} * [{high}, {low}] {shape:?} {number}");
                let mut y = x.clone();
                log_softmax_in_place(&mut y, axis, scale).unwrap();
                for (place, exact) in ends.into_iter().zip(&exact) {
                    // Three roundings, of the difference (twice in columns) and of the product.
                    let near = (f64::from(y[place]) - exact).abs() <= 4.0 * 2f64.powi(-24) * exact.abs();
                    assert!(near || y[place] == *exact as f32, "{case}: {} {exact}", y[place]);
                }
                let half: Vec<bf16> =
                    x.iter().map(|x| bf16::from_f32(x.clamp(-3.3e38, 3.3e38)).max(bf16::MIN)).collect();
                let half: Vec<bf16> =
                    half.iter().zip(&x).map(|(h, x)| if *x == hidden { bf16::NEG_INFINITY } else { *h }).collect();
                let mut y = vec![bf16::ZERO; x.len()];
                log_softmax_into(&half, &mut y, axis, scale).unwrap();
                let exact = by_formula(&ends.map(|p| f64::from(half[p].to_f32())), f64::from(scale)).1;
                for (place, exact) in ends.into_iter().zip(&exact) {
                    let (y, rounded) = (y[place], bf16::from_f32(*exact as f32));
                    let near = (f64::from(y.to_f32()) - exact).abs() <= 2f64.powi(-8) * exact.abs();
                    assert!(near || y == rounded, "{case}: bf16 {y} {exact}");
                }
            }
        }
    }
    let mut y = [3.2e38f32, -1e38];
    log_softmax(&mut y, 0.5).unwrap();
    assert_eq!(y, [0.0, -2.1e38]);
    let mut y = [1.6e308f64, -0.5e308];
    log_softmax(&mut y, 0.5).unwrap();
    assert_eq!(y, [0.0, -1.05e308]);
}

/// A logarithm of 0 is +0, of denormal elements too, whose halves may be rounded.
#[test]
fn a_lone_element_has_the_logarithm_plus_zero() {
    for x in [1, 3, 5, 0x0080_0001, 0x3f80_0000, 0x7f7f_ffff].map(f32::from_bits) {
        for (x, scale) in [(x, 0.5), (-x, 0.5), (x, -0.5), (x, 1.0), (-x, 0.3), (x, 1e-3)] {
            for layout in [[1, 1], [1, 2]] {
                let mut y = [x, -INF];
                let y = &mut y[..layout[1]];
                log_softmax(y, scale).unwrap();
                assert_eq!(y[0].to_bits(), 0, "{scale} * {x:e}");
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
            assert!(logsumexp(&x, scale).unwrap().is_nan());
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
        softmax(&mut y, scale).unwrap();
        assert_eq!(y, expected, "{scale} * {x:?}");
    }
    let mut y = [1.0, inf, f64::NAN];
    softmax(&mut y, 1.0).unwrap();
    assert!(y.iter().all(|y| y.is_nan()));
    for scale in [1.0, 0.0, -0.0, -2.0] {
        let mut log = [-inf; 3];
        log_softmax(&mut log, scale).unwrap();
        assert_eq!((logsumexp(&log, scale), log), (Ok(-inf), [-inf; 3]), "nothing visible, scale {scale}");
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

/// A type of elements with the numbers that it is tried with.
trait Tried: Number + PartialEq {
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
    fn scale(x: f64) -> Self::Real;
}
macro_rules! tried {
    ($($t:ty, $real:ty, $of:expr, $wide:expr);*) => {$(
        impl Tried for $t {
            fn of(x: f64) -> Self {
                $of(x)
            }
            fn wide(self) -> f64 {
                $wide(self)
            }
            fn scale(x: f64) -> $real {
                x as $real
            }
        }
    )*};
}
tried!(f32, f32, |x| x as f32, f64::from; f64, f64, |x| x, |x| x;
    f16, f32, f16::from_f64, f16::to_f64; bf16, f32, bf16::from_f64, bf16::to_f64);

/// dx of one line that starts, and goes on, as y and dy say; other lines are ordinary. Into an output and in place, along every
/// layout.
#[track_caller]
fn line_gradient<T: Tried>(y: &[f64], dy: &[f64], scale: f64, log: bool) -> Vec<f64> {
    let mut results = Vec::new();
    for shape in [[1, y.len()], [3, y.len()], [y.len(), 1], [y.len(), 37], [y.len(), 130]] {
        let number = usize::from(shape[1] == y.len());
        let axis = Axis::new(&shape, number).unwrap();
        let ordinary = if log { (1.0 / y.len() as f64).ln() } else { 1.0 / y.len() as f64 };
        let (mut all_y, mut all_dy) = (vec![T::of(ordinary); axis.elements()], vec![T::of(0.25); axis.elements()]);
        let of_line = places(&shape, number, axis.lines() / 2);
        for (i, place) in of_line.iter().enumerate() {
            (all_y[*place], all_dy[*place]) = (T::of(y[i]), T::of(dy[i]));
        }
        let mut into = vec![T::of(9.0); axis.elements()];
        let functions = if log {
            log_softmax_backward_into(&all_y, &all_dy, &mut into, axis, T::scale(scale)).unwrap();
            log_softmax_backward_in_place(&all_y, &mut all_dy, axis, T::scale(scale))
        } else {
            softmax_backward_into(&all_y, &all_dy, &mut into, axis, T::scale(scale)).unwrap();
            softmax_backward_in_place(&all_y, &mut all_dy, axis, T::scale(scale))
        };
        functions.unwrap();
        let same = |(a, b): (&T, &T)| a == b || a.wide().is_nan() && b.wide().is_nan();
        assert!(into.iter().zip(&all_dy).all(same), "in place is into an output");
        let others = (0..axis.elements()).filter(|place| !of_line.contains(place));
        for place in others {
            assert!(into[place].wide().abs() < 1e-2, "{shape:?}: another line has {:?}", into[place]);
        }
        results.push(of_line.iter().map(|place| into[*place].wide()).collect::<Vec<_>>());
    }
    let first = results.swap_remove(0);
    for other in results {
        // Sums in another order: a rounding or two of bf16.
        let near = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan() || (a - b).abs() <= 0.01 * a.abs();
        assert!(first.iter().zip(&other).all(near), "{first:?} {other:?}");
    }
    first
}

fn check_hidden_gradients<T: Tried>() {
    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;
    for bad in [NAN, INF, -INF] {
        // The same as without the hidden elements, which are 0.
        let dx = line_gradient::<T>(&[0.5, 0.5, 0.0], &[1.0, 2.0, bad], 1.0, false);
        assert_eq!(dx, [-0.25, 0.25, 0.0], "{bad}");
        let dx = line_gradient::<T>(&[0.0, 0.5, 0.0, 0.5, 0.0], &[bad, 1.0, bad, 2.0, 3.0], 2.0, false);
        assert_eq!(dx, [0.0, -0.5, 0.0, 0.5, 0.0], "{bad}");
        assert_eq!(line_gradient::<T>(&[0.0; 2], &[bad; 2], 1.0, false), [0.0; 2], "nothing visible");
        // A visible NaN spoils what is visible.
        let dx = line_gradient::<T>(&[0.5, 0.5, 0.0], &[bad, 2.0, 3.0], 1.0, false);
        assert!(!dx[0].is_finite() && !dx[1].is_finite() && dx[2] == 0.0, "{bad} {dx:?}");

        let half = 0.5f64.ln();
        let dx = line_gradient::<T>(&[half, half, -INF], &[1.0, 2.0, bad], 1.0, true);
        assert!((dx[0] + 0.5).abs() < 0.01 && (dx[1] - 0.5).abs() < 0.01 && dx[2] == 0.0, "{bad} {dx:?}");
        let dx = line_gradient::<T>(&[half, half, -INF, -INF], &[1.0, 2.0, bad, 1.0], 1.0, true);
        assert!((dx[0] + 1.0).abs() < 0.02 && dx[1].abs() < 0.02 && dx[2..] == [0.0, 1.0], "{bad} {dx:?}");
        assert_eq!(line_gradient::<T>(&[-INF; 2], &[bad; 2], 1.0, true), [0.0; 2], "nothing visible");
        let dx = line_gradient::<T>(&[half, half, -INF], &[bad, 2.0, 0.0], 1.0, true);
        assert!(!dx[0].is_finite() && !dx[1].is_finite() && dx[2] == 0.0, "{bad} {dx:?}");
    }
}

/// Elements whose softmax is 0 reach no gradient.
#[test]
fn gradients_of_hidden_elements_are_zero() {
    check_hidden_gradients::<f32>();
    check_hidden_gradients::<f64>();
    check_hidden_gradients::<f16>();
    check_hidden_gradients::<bf16>();
}

/// Differences of gradients and their sums overflow where the result does not.
#[test]
fn gradients_near_the_largest_number() {
    let near = |got: Vec<f64>, expected: &[f64]| {
        let near = got.iter().zip(expected).all(|(g, e)| (g - e).abs() <= 0.01 * e.abs());
        assert!(near, "{got:?} {expected:?}");
    };
    let half = 0.5f64.ln();
    let quarter = 0.25f64.ln();
    near(line_gradient::<f32>(&[0.25, 0.75], &[3e38, -3e38], 1.0, false), &[1.125e38, -1.125e38]);
    near(line_gradient::<f32>(&[0.25, 0.75], &[3e38, -3e38], 1e-30, false), &[1.125e8, -1.125e8]);
    near(line_gradient::<bf16>(&[0.25, 0.75], &[3e38, -3e38], 1.0, false), &[1.125e38, -1.125e38]);
    near(line_gradient::<f64>(&[0.25, 0.75], &[1.5e308, -1.5e308], 1.0, false), &[0.5625e308, -0.5625e308]);
    near(line_gradient::<f32>(&[0.0, 1.0], &[3e38, -3e38], 1.0, false), &[0.0, 0.0]);
    near(line_gradient::<f32>(&[half, half], &[3e38, 2e38], 1.0, true), &[0.5e38, -0.5e38]);
    near(line_gradient::<bf16>(&[quarter, quarter, half], &[3e38, 3e38, 0.0], 1e-3, true), &[1.5e35, 1.5e35, -3e35]);
    near(line_gradient::<f64>(&[half, half], &[1.5e308, 1e308], 1.0, true), &[0.25e308, -0.25e308]);
    near(line_gradient::<f64>(&[half, half], &[1.5e308, 1e308], 1e-300, true), &[0.25e8, -0.25e8]);
}

/// A gain of NaN, of infinity, or beyond the largest number while its products are not.
#[test]
fn gains_that_are_not_finite() {
    let x = [0.0f32, -INF, 0.0, -80.0];
    for bad in [f32::NAN, INF, -INF] {
        for (shape, copies) in [([1, 4], 1), ([4, 1], 1), ([4, 40], 40)] {
            let number = usize::from(shape[0] == 1);
            let axis = Axis::new(&shape, number).unwrap();
            let wide: Vec<f32> = x.iter().flat_map(|x| vec![*x; copies]).collect();
            let mut dl = vec![1.0; copies];
            dl[copies / 2] = bad;
            let mut dx = vec![9.0; wide.len()];
            logsumexp_backward_into(&wide, &dl, &mut dx, axis, 1.0).unwrap();
            let line: Vec<f32> = places(&shape, number, copies / 2).into_iter().map(|place| dx[place]).collect();
            assert!(line[1] == 0.0 && !line[0].is_finite() && !line[2].is_finite() && !line[3].is_finite(), "{line:?}");
            assert_eq!(dx.iter().filter(|dx| dx.is_finite()).count(), wide.len() - 3);
        }
        let mut gradient = [9.0f32; 8];
        let logits = [0.0, -INF, 0.0, -1.0, 0.0, -INF, 0.0, -1.0];
        cross_entropy_gradient_into(&logits, &[0, 2], 4, &[bad, 1.0], &mut gradient).unwrap();
        assert!(gradient[1] == 0.0 && [0, 2, 3].iter().all(|at| !gradient[*at].is_finite()), "{gradient:?}");
        assert!(gradient[4..].iter().all(|g| g.is_finite()));
        cross_entropy_gradient_into(&[0.0f32, -INF], &[0], 2, &[bad], &mut gradient[..2]).unwrap();
        assert_eq!(gradient[..2], [0.0, 0.0], "the target has all of the probability");
    }
    // exp(-80) is 1.8e-35; times 1e40 it is 1.8e5.
    let mut dx = [9.0f32; 3];
    logsumexp_backward_into(&[0.0, -80e-20, -INF], &[1e20], &mut dx, Axis::row(3), 1e20).unwrap();
    assert!(dx[0] == INF && (dx[1] / 180_485.14 - 1.0).abs() < 3e-5 && dx[2] == 0.0, "{dx:?}");
    let mut dx = [9.0f64; 3];
    logsumexp_backward_into(&[0.0, -100e-30, -f64::INFINITY], &[1e300], &mut dx, Axis::row(3), 1e30).unwrap();
    assert!(dx[0].is_infinite() && (dx[1] / 3.720_075_976e286 - 1.0).abs() < 1e-8 && dx[2] == 0.0, "{dx:?}");
    // The mean of two losses of 1.6e308.
    assert_eq!(cross_entropy(&[1.6e308, 0.0, 0.0, 1.6e308], &[1, 0], 2).unwrap(), 1.6e308);
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

/// Every function that takes a scale, with elements and without.
fn refused_scales<T: Tried>(scales: [T::Real; 3]) {
    for (scale, got) in scales.into_iter().zip(["NaN", "inf", "-inf"]) {
        for len in [2, 0] {
            let x = vec![T::of(0.5); len];
            let (mut y, mut l, axis) = (x.clone(), [T::of(0.5)], Axis::row(len));
            let results = [
                softmax(&mut y, scale),
                log_softmax(&mut y, scale),
                logsumexp(&x, scale).map(|_| ()),
                softmax_in_place(&mut y, axis, scale),
                softmax_into(&x, &mut y, axis, scale),
                log_softmax_in_place(&mut y, axis, scale),
                log_softmax_into(&x, &mut y, axis, scale),
                logsumexp_into(&x, &mut l, axis, scale),
                softmax_backward_into(&x, &x, &mut y, axis, scale),
                softmax_backward_in_place(&x, &mut y, axis, scale),
                log_softmax_backward_into(&x, &x, &mut y, axis, scale),
                log_softmax_backward_in_place(&x, &mut y, axis, scale),
                logsumexp_backward_into(&x, &[T::of(0.5)], &mut y, axis, scale),
            ];
            for (n, result) in results.into_iter().enumerate() {
                let error = result.unwrap_err();
                assert!(matches!(error, Error::InvalidOption { option: "scale", .. }), "function {n}");
                assert_eq!(error.to_string(), format!("scale is {got} but must be finite"), "function {n}");
            }
            assert!(y == x && l == [T::of(0.5)], "nothing is written");
        }
    }
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
    // No elements, but more lines than a loop could visit.
    let axis = Axis::new(&[usize::MAX, 0], 1).unwrap();
    softmax_in_place::<f32>(&mut [], axis, 1.0).unwrap();
    softmax_in_place::<f64>(&mut [], axis, 1.0).unwrap();
    softmax_backward_in_place::<f32>(&[], &mut [], axis, 1.0).unwrap();
    softmax_backward_in_place::<f64>(&[], &mut [], axis, 1.0).unwrap();
    assert!(logsumexp_into::<f32>(&[], &mut [], axis, 1.0).is_err());
    refused_scales::<f32>([f32::NAN, INF, -INF]);
    refused_scales::<f16>([f32::NAN, INF, -INF]);
    refused_scales::<f64>([f64::NAN, f64::INFINITY, -f64::INFINITY]);
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
    use ndarray::{Array, Array3, Array4, ArrayD, ArrayViewD, s};

    fn assert_near(got: &ArrayD<f32>, expected: &ArrayD<f32>) {
        assert_eq!(got.shape(), expected.shape());
        for (got, expected) in got.iter().zip(expected) {
            assert!(got == expected || (got - expected).abs() <= 1e-5 * (0.1 + expected.abs()), "{got} {expected}");
        }
    }

    /// Every axis of a view, against the slice forms of a dense copy.
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
            // The order of axes in memory decides the bits.
            assert_near(&softmax_axis(&x, number, 0.5).unwrap(), &y);
            assert_near(&log_softmax_axis(&x, number, 0.5).unwrap(), &log);
            let lse = Array::from_shape_vec(smaller, lse).unwrap();
            assert_near(&logsumexp_axis(&x, number, 0.5).unwrap(), &lse);
        }
        let wrong = Error::AxisOutOfRange { axis: x.ndim() as i128, rank: x.ndim() };
        assert_eq!(softmax_axis(&x, x.ndim(), 1.0), Err(wrong.clone()));
        assert_eq!(logsumexp_axis(&x, x.ndim(), 1.0), Err(wrong));
        for number in 0..x.ndim() {
            let expected = Error::InvalidOption { option: "scale", got: INF, expected: "finite" };
            assert_eq!(softmax_axis(&x, number, INF), Err(expected.clone()));
            assert_eq!(log_softmax_axis(&x, number, INF), Err(expected.clone()));
            assert_eq!(logsumexp_axis(&x, number, INF), Err(expected.clone()));
            let mut y = x.to_owned();
            assert_eq!(softmax_axis_in_place(&mut y, number, INF), Err(expected.clone()));
            assert_eq!(log_softmax_axis_in_place(&mut y, number, INF), Err(expected));
            assert_eq!(y, x, "as it was");
        }
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
