//! Promise: `CrossEntropy` is PyTorch's `cross_entropy`: ignored targets, smoothing, class weights, any axis of the classes, each
//! reduction, and its gradient.

mod support;

use flashtile::softmax::{
    Axis, CrossEntropy, Number, Reduction, cross_entropy, cross_entropy_gradient_into, cross_entropy_into,
};
use flashtile::{Error, bf16, f16};
use std::fmt::Debug;
use support::Rng;

const INF: f64 = f64::INFINITY;

/// A type of logits: how it is made and read, its unit of rounding and its smallest number.
trait Tried: Number + PartialEq + Debug {
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
    const UNIT: f64;
    const LEAST: f64;
}
macro_rules! tried {
    ($($t:ty, $of:expr, $wide:expr, $unit:expr, $least:expr);*) => {$(
        impl Tried for $t {
            fn of(x: f64) -> Self {
                $of(x)
            }
            fn wide(self) -> f64 {
                $wide(self)
            }
            const UNIT: f64 = $unit;
            const LEAST: f64 = $least;
        }
    )*};
}
const U32: f64 = 1.0 / (1u64 << 24) as f64;
const U64: f64 = 1.0 / (1u64 << 53) as f64;
tried!(f32, |x| x as f32, f64::from, U32, 1.5e-45; f64, |x| x, |x| x, U64, 5e-324;
    f16, |x| f16::from_f32(x as f32), f16::to_f64, 1.0 / 2048.0, 6e-8;
    bf16, |x| bf16::from_f32(x as f32), bf16::to_f64, 1.0 / 256.0, 1e-40);

struct Case<T> {
    /// Before the classes, classes, after them.
    shape: [usize; 3],
    logits: Vec<T>,
    targets: Vec<i64>,
    ignored: Option<i64>,
    smoothing: f64,
    weights: Option<Vec<f32>>,
    reduction: Reduction,
}

impl<T: Tried> Case<T> {
    fn random(shape: [usize; 3], rng: &mut Rng) -> Self {
        let [before, classes, after] = shape;
        let rows = before * after;
        let ignored = [None, Some(-100), Some(0), Some(i64::MAX)][rng.below(4)];
        let mut targets: Vec<i64> = (0..rows).map(|_| rng.below(classes) as i64).collect();
        for target in &mut targets {
            if rng.below(4) == 0 {
                *target = ignored.unwrap_or(*target);
            }
        }
        let mut logits: Vec<T> = (0..rows * classes).map(|_| T::of(8.0 * f64::from(rng.uniform()))).collect();
        for row in (0..rows).filter(|&row| Some(targets[row]) == ignored) {
            logits[places(shape, row)[rng.below(classes)]] = T::of(f64::NAN); // of no effect
        }
        let weight = |n: usize| if n == 0 { 0.0 } else { n as f32 * 0.375 };
        Case {
            shape,
            logits,
            targets,
            ignored,
            smoothing: [0.0, 0.1, 0.5, 1.0][rng.below(4)],
            weights: (rng.below(2) == 0).then(|| (0..classes).map(|_| weight(rng.below(5))).collect()),
            reduction: [Reduction::None, Reduction::Mean, Reduction::Sum][rng.below(3)],
        }
    }

    fn options(&self) -> CrossEntropy<'_> {
        let mut options = CrossEntropy::new().label_smoothing(self.smoothing).reduction(self.reduction);
        if let Some(ignored) = self.ignored {
            options = options.ignore_index(ignored);
        }
        if let Some(weights) = &self.weights {
            options = options.class_weights(weights);
        }
        options
    }

    fn axis(&self) -> Axis {
        Axis::new(&self.shape, 1).unwrap()
    }

    fn results(&self) -> usize {
        if self.reduction == Reduction::None { self.targets.len() } else { 1 }
    }

    fn loss(&self) -> Vec<f64> {
        let mut loss = vec![T::real(9.0); self.results()];
        self.options().loss_into(&self.logits, &self.targets, self.axis(), &mut loss).unwrap();
        loss.into_iter().map(T::real_to_f64).collect()
    }

    fn gradient(&self, upstream: &[f64]) -> Vec<T> {
        let upstream: Vec<T::Real> = upstream.iter().map(|&g| T::real(g)).collect();
        let mut gradient = vec![T::of(9.0); self.logits.len()];
        let call = self.options().gradient_into(&self.logits, &self.targets, self.axis(), &upstream, &mut gradient);
        call.unwrap();
        gradient
    }

    fn weight(&self, class: usize) -> f64 {
        self.weights.as_ref().map_or(1.0, |weights| f64::from(weights[class]))
    }

    /// The target of a row, unless it is ignored.
    fn target(&self, row: usize) -> Option<usize> {
        let target = self.targets[row];
        (Some(target) != self.ignored).then_some(target as usize)
    }

    /// What the sum of losses is divided by.
    fn divisor(&self) -> f64 {
        let weights = (0..self.targets.len()).filter_map(|row| self.target(row)).map(|class| self.weight(class));
        if self.reduction == Reduction::Mean { weights.sum() } else { 1.0 }
    }

    /// log_softmax of a row.
    fn logs(&self, row: usize) -> Vec<f64> {
        let x: Vec<f64> = places(self.shape, row).into_iter().map(|place| self.logits[place].wide()).collect();
        let max = x.iter().copied().fold(-INF, f64::max);
        let log_sum = x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        x.iter().map(|x| x - max - log_sum).collect()
    }

    /// The target's share of the loss is w[t] times this, that of every class w[c] times the second number.
    fn shares(&self) -> [f64; 2] {
        [1.0 - self.smoothing, self.smoothing / self.shape[1] as f64]
    }

    /// The definition, with a bound on the error: (loss, bound) of each result.
    ///
    /// The sum of a row's exponentials is off by (64 + n/1024 + 16) u, relatively. So each -log p is off by that, and the loss by
    /// that times the weights in it. What is computed in f64, here and there, is off by 2^-53 times the terms and their number.
    fn exact_loss(&self, unit: f64) -> Vec<(f64, f64)> {
        let [kept, spread] = self.shares();
        let sums = (64.0 + self.shape[1] as f64 / 1024.0 + 16.0) * unit;
        let losses: Vec<(f64, f64)> = (0..self.targets.len())
            .map(|row| {
                let Some(target) = self.target(row) else { return (0.0, 0.0) };
                let logs = self.logs(row);
                let own = -kept * self.weight(target) * logs[target];
                let all: f64 = logs.iter().enumerate().map(|(class, log)| -self.weight(class) * log).sum();
                let weights: f64 = (0..logs.len()).map(|class| self.weight(class)).sum();
                let loss = own + spread * all;
                (loss, (kept * self.weight(target) + spread * weights) * sums + U64 * loss * (8.0 + logs.len() as f64))
            })
            .collect();
        if self.reduction == Reduction::None {
            return losses.into_iter().map(|(loss, bound)| (loss, bound + unit * loss)).collect();
        }
        let (loss, bound) = losses.iter().fold((0.0, 0.0), |all, row| (all.0 + row.0, all.1 + row.1));
        let (loss, bound) = (loss / self.divisor(), bound / self.divisor());
        vec![(loss, bound + (unit + losses.len() as f64 * U64) * loss)]
    }

    /// The definition of the gradient, with a bound: softmax p is off by the error of the sums and of x - max, relatively; then a
    /// few roundings of p and of the result.
    fn exact_gradient(&self, upstream: &[f64], unit: f64) -> Vec<(f64, f64)> {
        let [kept, spread] = self.shares();
        let weights: f64 = (0..self.shape[1]).map(|class| self.weight(class)).sum();
        let mut gradient = vec![(0.0, 0.0); self.logits.len()];
        for row in 0..self.targets.len() {
            let Some(target) = self.target(row) else { continue };
            let g = upstream[if self.reduction == Reduction::None { row } else { 0 }] / self.divisor();
            let logs = self.logs(row);
            let max = logs.iter().copied().fold(-INF, f64::max);
            for (class, place) in places(self.shape, row).into_iter().enumerate() {
                let p = logs[class].exp();
                let is_target = if class == target { 1.0 } else { 0.0 };
                let own = kept * self.weight(target) * (p - is_target);
                let exact = g * (own + spread * (weights * p - self.weight(class)));
                let of_p = 64.0 + 16.0 + logs.len() as f64 / 1024.0 + 2.0 * (max - logs[class]) + 4.0;
                let factor = kept * self.weight(target) + spread * weights;
                let bound = g.abs() * (factor * p * of_p * unit + spread * self.weight(class) * 4.0 * U64);
                let f64s = 8.0 * U64 * g.abs() * factor;
                gradient[place] = (exact, bound + f64s + (unit + T::UNIT * 1.001) * exact.abs() + T::LEAST);
            }
        }
        gradient
    }
}

/// The places of a row's classes.
fn places([_, classes, after]: [usize; 3], row: usize) -> Vec<usize> {
    (0..classes).map(|class| (row / after * classes + class) * after + row % after).collect()
}

fn check<T: Tried>(shape: [usize; 3], seed: u64) {
    let mut rng = Rng(seed);
    let case = Case::<T>::random(shape, &mut rng);
    let unit = if size_of::<T::Real>() == 8 { U64 } else { U32 };
    let (smoothing, reduction, weights) = (case.smoothing, case.reduction, case.weights.is_some());
    let what = format!("{shape:?} seed {seed}, smoothing {smoothing}, weights {weights}, {reduction:?}");
    for (n, (got, (exact, bound))) in case.loss().into_iter().zip(case.exact_loss(unit)).enumerate() {
        let near = got == exact || (got - exact).abs() <= bound || got.is_nan() && exact.is_nan();
        assert!(near, "{what}: loss {n} is {got} but {exact}, off by more than {bound:e}");
    }
    let upstream: Vec<f64> = (0..case.results()).map(|_| f64::from(4.0 * rng.uniform())).collect();
    let got = case.gradient(&upstream);
    for (n, (got, (exact, bound))) in got.into_iter().zip(case.exact_gradient(&upstream, unit)).enumerate() {
        let got = got.wide();
        // A mean over weights of 0 has no gradient.
        let undefined = case.divisor() == 0.0 && (exact.is_nan() || exact.is_infinite());
        assert!((got - exact).abs() <= bound || undefined, "{what}: gradient {n} is {got} but {exact} ± {bound:e}");
    }
    for row in (0..case.targets.len()).filter(|&row| case.target(row).is_none()) {
        let gradient = case.gradient(&upstream);
        assert!(places(shape, row).into_iter().all(|place| gradient[place].wide().to_bits() == 0), "{what}: row {row}");
    }
}

#[test]
fn every_small_shape() {
    let mut seed = 0;
    for n in 0..48 {
        let shape = [1 + n % 3, 1 + n / 3 % 4, 1 + n / 12];
        for _ in 0..30 {
            seed += 1;
            check::<f32>(shape, seed);
            check::<f64>(shape, seed);
            check::<f16>(shape, seed);
            check::<bf16>(shape, seed);
        }
    }
}

/// Around a vector, short rows, rows that are computed together, blocks and long rows.
#[test]
fn every_length() {
    for (n, classes) in [5, 8, 31, 65, 129, 250, 1023, 1025, 4095, 4097, 17_000].into_iter().enumerate() {
        let after = [1, 37][n % 2];
        for seed in 0..6 {
            check::<f32>([3, classes, after], 7000 + seed);
            check::<f16>([2, classes, 38 - after], 8000 + seed);
            check::<f64>([1, classes, after], 9000 + seed);
        }
    }
}

/// Without options, it has the bits of the functions without options.
#[test]
fn no_options() {
    for classes in [1, 5, 40, 300, 5000] {
        let mut rng = Rng(classes as u64);
        let rows = 7;
        let logits: Vec<f32> = (0..rows * classes).map(|_| 8.0 * rng.uniform()).collect();
        let targets: Vec<usize> = (0..rows).map(|_| rng.below(classes)).collect();
        let upstream: Vec<f32> = (0..rows).map(|_| rng.uniform()).collect();
        let axis = Axis::rows(rows, classes).unwrap();
        let options = CrossEntropy::new().reduction(Reduction::None);
        let (mut expected, mut got) = (vec![0.0; rows], vec![9.0; rows]);
        cross_entropy_into(&logits, &targets, classes, &mut expected).unwrap();
        options.loss_into(&logits, &targets, axis, &mut got).unwrap();
        assert_eq!(got, expected);
        CrossEntropy::new().loss_into(&logits, &targets, axis, &mut got[..1]).unwrap();
        assert_eq!(got[0], cross_entropy(&logits, &targets, classes).unwrap());
        let (mut expected, mut got) = (vec![0.0; rows * classes], vec![9.0; rows * classes]);
        cross_entropy_gradient_into(&logits, &targets, classes, &upstream, &mut expected).unwrap();
        options.gradient_into(&logits, &targets, axis, &upstream, &mut got).unwrap();
        assert_eq!(got, expected);
    }
}

/// The loss of a column has the bits that it has beside fewer columns, at any place.
#[test]
fn columns_do_not_depend_on_each_other() {
    fn check<T: Tried>(classes: usize) {
        const COLUMNS: usize = 300;
        let logits: Vec<T> = (0..classes * COLUMNS).map(|n| T::of((n * 7919 % 1000) as f64 / 64.0 - 8.0)).collect();
        let targets: Vec<usize> = (0..COLUMNS).map(|n| n * 7 % classes).collect();
        let losses_of = |columns: std::ops::Range<usize>| {
            let part: Vec<T> = logits.chunks(COLUMNS).flat_map(|row| row[columns.clone()].iter().copied()).collect();
            let axis = Axis::new(&[classes, columns.len()], 0).unwrap();
            let mut losses = vec![T::real(9.0); columns.len()];
            let options = CrossEntropy::new().reduction(Reduction::None);
            options.loss_into(&part, &targets[columns], axis, &mut losses).unwrap();
            losses.into_iter().map(T::real_to_f64).collect::<Vec<f64>>()
        };
        let all = losses_of(0..COLUMNS);
        for columns in [0..2, 1..8, 5..70, 63..66, 100..300, 298..300] {
            assert!(losses_of(columns.clone()) == all[columns.clone()], "{classes} classes, columns {columns:?}");
        }
    }
    for classes in [2, 21, 33, 1000, 5000] {
        check::<f32>(classes);
        check::<f16>(classes);
        check::<bf16>(classes);
        check::<f64>(classes);
    }
}

/// The gradient is that of the loss: central differences are off by h^2 f''' / 6 and by 1e-15 / h of rounding, both below 1e-8.
#[test]
fn gradients_match_finite_differences() {
    let h = 1e-5;
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let mut case = Case::<f64>::random([2, 4, 3], &mut rng);
        if case.divisor() == 0.0 {
            continue;
        }
        case.logits.iter_mut().for_each(|x| *x = if x.is_nan() { 1.0 } else { *x / 4.0 });
        let upstream: Vec<f64> = (0..case.results()).map(|_| f64::from(rng.uniform())).collect();
        let gradient = case.gradient(&upstream);
        for (n, gradient) in gradient.into_iter().enumerate() {
            let x = case.logits[n];
            let mut at = |x: f64| {
                case.logits[n] = x;
                case.loss().iter().zip(&upstream).map(|(loss, g)| loss * g).sum::<f64>()
            };
            let expected = (at(x + h) - at(x - h)) / (2.0 * h);
            at(x);
            assert!((gradient - expected).abs() < 1e-7, "seed {seed}, {n}: {gradient} {expected}");
        }
    }
}

/// One row of f64: (loss, gradient for an upstream gradient).
fn row(options: CrossEntropy<'_>, logits: &[f64], target: i64, upstream: f64) -> (f64, Vec<f64>) {
    let (mut loss, mut gradient) = ([9.0], vec![9.0; logits.len()]);
    let axis = Axis::row(logits.len());
    options.loss_into(logits, &[target], axis, &mut loss).unwrap();
    options.gradient_into(logits, &[target], axis, &[upstream], &mut gradient).unwrap();
    (loss[0], gradient)
}

#[test]
fn hidden_classes() {
    let plain = CrossEntropy::new();
    let (loss, gradient) = row(plain, &[0.0, -INF, 0.0], 0, 1.0);
    assert!((loss - 2f64.ln()).abs() < 1e-15 && (gradient[0] + 0.5).abs() < 1e-15 && gradient[1..] == [0.0, 0.5]);
    assert_eq!(row(plain, &[0.0, -INF], 1, 1.0), (INF, vec![1.0, -1.0]), "a hidden target");
    assert_eq!(row(plain, &[-INF, -INF], 1, 1.0).0, INF, "nothing visible");
    assert_eq!(row(plain.label_smoothing(0.1), &[0.0, -INF], 0, 1.0).0, INF, "the hidden class has a share");
    assert_eq!(row(plain.label_smoothing(1.0).class_weights(&[1.0, 0.0]), &[0.0, -INF], 0, 1.0).0, 0.0, "it has none");
    // The mean of one row is divided by the weight of its target.
    let sum = plain.reduction(Reduction::Sum);
    assert_eq!(row(sum.class_weights(&[1.0, 0.0]), &[0.0, -INF], 1, 1.0), (0.0, vec![0.0, 0.0]));
    assert!(row(sum.class_weights(&[1.0, 0.0]), &[0.0, f64::NAN], 1, 1.0).0.is_nan());
}

#[test]
fn nothing_to_average() {
    let plain = CrossEntropy::new().ignore_index(-100);
    let (loss, gradient) = row(plain, &[1.0, f64::NAN], -100, 1.0);
    assert!(loss.is_nan() && gradient == [0.0, 0.0], "as in PyTorch: 0 / 0");
    let (loss, gradient) = row(plain.reduction(Reduction::Sum), &[1.0, INF], -100, f64::NAN);
    assert!(loss == 0.0 && gradient == [0.0, 0.0]);
    assert!(row(plain.class_weights(&[1.0, 0.0]), &[1.0, 2.0], 1, 1.0).0.is_nan());
    let (mut loss, axis) = ([9.0f32], Axis::rows(0, 3).unwrap());
    CrossEntropy::new().loss_into::<f32>(&[], &[0usize; 0], axis, &mut loss).unwrap();
    assert!(loss[0].is_nan());
    CrossEntropy::new().reduction(Reduction::Sum).loss_into::<f32>(&[], &[0usize; 0], axis, &mut loss).unwrap();
    assert_eq!(loss[0], 0.0);
    // Rows without classes, all ignored.
    let (mut losses, axis) = ([9.0f32; 2], Axis::rows(2, 0).unwrap());
    let ignored = plain.reduction(Reduction::None);
    ignored.loss_into::<f32>(&[], &[-100i64, -100], axis, &mut losses).unwrap();
    ignored.gradient_into::<f32>(&[], &[-100i64, -100], axis, &[1.0; 2], &mut []).unwrap();
    assert_eq!(losses, [0.0; 2]);
}

/// An upstream gradient that is not finite reaches what is not 0, and a product that overflows does so only where it must.
#[test]
fn upstream_gradients_that_are_not_finite() {
    let sum = CrossEntropy::new().reduction(Reduction::Sum);
    for bad in [f64::NAN, INF, -INF] {
        let gradient = row(sum, &[0.0, -INF, 0.0], 0, bad).1;
        assert!(gradient[1] == 0.0 && !gradient[0].is_finite() && !gradient[2].is_finite(), "{gradient:?}");
        let gradient = row(sum.label_smoothing(0.5), &[0.0, -INF, 0.0], 0, bad).1;
        assert!(gradient.iter().all(|g| !g.is_finite()), "the hidden class has a share: {gradient:?}");
        assert_eq!(row(sum, &[0.0, -INF], 0, bad).1, [0.0, 0.0], "the target has all of the probability");
    }
    let mut gradient = [9.0f32; 2];
    let options = sum.class_weights(&[1e20, 1.0]);
    options.gradient_into(&[0.0f32, -60.0], &[0i64], Axis::row(2), &[1e30], &mut gradient).unwrap();
    let exact = 1e50 * (-60f64).exp();
    assert!((f64::from(gradient[1]) / exact - 1.0).abs() < 1e-6, "{gradient:?} {exact}");
    assert!(gradient[0].is_finite(), "1 - p is 0 within the rounding of 1");
}

/// The loss of a saturated target is far below one ulp of 1, and its gradient keeps its digits.
#[test]
fn large_losses_do_not_overflow() {
    let mut loss = [0.0f64];
    let logits = [1.6e308, 0.0, 0.0, 1.6e308];
    CrossEntropy::new().loss_into(&logits, &[1i64, 0], Axis::rows(2, 2).unwrap(), &mut loss).unwrap();
    assert_eq!(loss[0], 1.6e308, "the mean of two losses of 1.6e308");
}

#[test]
fn wrong_calls_are_refused_before_anything_is_written() {
    let (logits, axis) = ([0.5f32; 6], Axis::new(&[2, 3], -1).unwrap());
    let refused = |options: CrossEntropy<'_>, targets: &[i64], expected: Error, sentence: &str| {
        let (mut loss, mut gradient) = ([9.0f32], [9.0f32; 6]);
        let got = options.loss_into(&logits, targets, axis, &mut loss);
        assert_eq!(got, Err(expected.clone()));
        assert_eq!(got.unwrap_err().to_string(), sentence);
        assert_eq!(options.gradient_into(&logits, targets, axis, &[1.0], &mut gradient), Err(expected));
        assert!(loss == [9.0] && gradient == [9.0; 6]);
    };
    let plain = CrossEntropy::new();
    for (smoothing, got) in [(-0.1, "-0.1"), (1.5, "1.5"), (f64::NAN, "NaN"), (INF, "inf")] {
        let error = plain.label_smoothing(smoothing).loss_into(&logits, &[0i64, 1], axis, &mut [0.0]).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "label smoothing", .. }));
        assert_eq!(error.to_string(), format!("label smoothing is {got} but must be between 0 and 1"));
    }
    for weight in [-1.0, f32::NAN, f32::INFINITY] {
        let weights = [1.0, 1.0, weight];
        let error = plain.class_weights(&weights).loss_into(&logits, &[0i64, 1], axis, &mut [0.0]).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "a class weight", .. }));
    }
    let negative = Error::InvalidOption { option: "a class weight", got: -0.5, expected: "finite and not negative" };
    let sentence = "a class weight is -0.5 but must be finite and not negative";
    refused(plain.class_weights(&[0.0, -0.5, 1.0]), &[0, 1], negative, sentence);
    refused(
        plain.class_weights(&[1.0; 2]),
        &[0, 1],
        Error::WrongCount { what: "class weights", expected: 3, got: 2 },
        "2 class weights were given but there must be 3",
    );
    refused(
        plain,
        &[0, 1, 2],
        Error::WrongCount { what: "targets", expected: 2, got: 3 },
        "3 targets were given but there must be 2",
    );
    let out_of_range = |class| Error::ClassOutOfRange { row: 1, class, classes: 3 };
    refused(plain, &[0, 3], out_of_range(3), "row 1 has class 3 but there are only 3, counted from 0");
    refused(plain, &[0, -100], out_of_range(-100), "row 1 has class -100 but there are only 3, counted from 0");
    refused(
        plain.ignore_index(-1),
        &[-1, -100],
        out_of_range(-100),
        "row 1 has class -100 but there are only 3, counted from 0",
    );
    assert_eq!(plain.loss_into(&logits, &[0u64, u64::MAX], axis, &mut [0.0]), Err(out_of_range(i128::from(u64::MAX))));
    let (mut two, mut short) = ([9.0f32; 2], [9.0f32; 5]);
    let count = |what, expected, got| Err(Error::WrongCount { what, expected, got });
    assert_eq!(plain.loss_into(&logits, &[0i64, 1], axis, &mut two), count("losses", 1, 2));
    let rows = plain.reduction(Reduction::None);
    assert_eq!(rows.loss_into(&logits, &[0i64, 1], axis, &mut two[..1]), count("losses", 2, 1));
    let gradient = rows.gradient_into(&logits, &[0i64, 1], axis, &[1.0], &mut [9.0; 6]);
    assert_eq!(gradient, count("upstream gradients", 2, 1));
    let length = Err(Error::SliceLength { expected: 6, got: 5 });
    assert_eq!(plain.loss_into(&logits[..5], &[0i64, 1], axis, &mut two[..1]), length);
    assert_eq!(plain.gradient_into(&logits, &[0i64, 1], axis, &[1.0], &mut short), length);
}

#[cfg(feature = "rayon")]
#[test]
fn bits_do_not_depend_on_threads() {
    let pools: Vec<_> = (1..=3).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
    let shapes = [[300, 301, 1], [3, 101, 300], [2, 40_000, 1], [1100, 2000, 1]];
    for (shape, smoothing) in shapes.into_iter().flat_map(|shape| [(shape, 0.0), (shape, 0.1)]) {
        let mut case = Case::<f32>::random(shape, &mut Rng(5));
        (case.smoothing, case.reduction) = (smoothing, Reduction::Sum);
        case.logits.iter_mut().for_each(|x| *x = if x.is_nan() { 0.0 } else { *x });
        let run = || {
            let bits = |x: f32| x.to_bits();
            (case.loss()[0].to_bits(), case.gradient(&[0.5]).into_iter().map(bits).collect::<Vec<_>>())
        };
        let expected = pools[0].install(run);
        for pool in &pools[1..] {
            assert!(pool.install(run) == expected, "{shape:?}, {} threads", pool.current_num_threads());
        }
        assert!(run() == expected, "{shape:?} outside a pool");
    }
}
