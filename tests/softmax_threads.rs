//! Promise: softmax has the same bits on any number of threads, from inside and outside a pool, for each type and axis.

#![cfg(feature = "rayon")]

mod support;

use flashtile::softmax::*;
use flashtile::{bf16, f16};
use support::Rng;

/// Arrays that are worth two threads inside a pool, and one that is worth waking them and is streamed.
const SHAPES: [[usize; 3]; 5] = [[3, 300, 101], [1, 513, 130], [20_000, 2, 5], [1, 2, 50_000], LARGE];
const LARGE: [usize; 3] = [1, 1024, 4096];

/// Bits of every function along an axis. Some lines have NaN, infinities and upstream gradients that are not finite.
fn all<T: Number>(shape: [usize; 3], number: usize, from: impl Fn(f32) -> T) -> Vec<u64> {
    let axis = Axis::new(&shape, number).unwrap();
    let mut rng = Rng(1);
    let mut logits: Vec<f32> = (0..axis.elements()).map(|_| 8.0 * rng.uniform()).collect();
    for (i, bad) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
        logits[axis.elements() / 7 * (2 * i + 1)] = bad;
    }
    let x: Vec<T> = logits.iter().map(|&x| from(x)).collect();
    let real = |x: f64| T::real(x);
    let (mut y, mut log, mut dx) = (x.clone(), x.clone(), x.clone());
    softmax_into(&x, &mut y, axis, real(1.0)).unwrap();
    let mut in_place = x.clone();
    softmax_in_place(&mut in_place, axis, real(1.0)).unwrap();
    log_softmax_into(&x, &mut log, axis, real(0.5)).unwrap();
    softmax_backward_into(&y, &x, &mut dx, axis, real(1.0)).unwrap();
    let mut dx_log = x.clone();
    log_softmax_backward_in_place(&log, &mut dx_log, axis, real(1.0)).unwrap();
    let mut lse = vec![from(0.0); axis.lines()];
    logsumexp_into(&x, &mut lse, axis, real(1.0)).unwrap();
    let upstream: Vec<T> = (0..axis.lines()).map(|i| from(if i % 100 == 3 { f32::NAN } else { i as f32 })).collect();
    let mut dx_lse = x.clone();
    logsumexp_backward_into(&x, &upstream, &mut dx_lse, axis, real(1.0)).unwrap();
    let mut bits: Vec<u64> = [y, in_place, log, dx, dx_log, lse, dx_lse].iter().flatten().map(bits_of).collect();
    let (rows, classes) = (shape[0] * shape[1], shape[2]);
    let targets: Vec<usize> = (0..rows).map(|row| row * 7 % classes).collect();
    let (mut losses, mut gradient) = (vec![real(0.0); rows], x.clone());
    cross_entropy_into(&x, &targets, classes, &mut losses).unwrap();
    cross_entropy_gradient_into(&x, &targets, classes, &losses, &mut gradient).unwrap();
    bits.extend(gradient.iter().map(bits_of));
    bits.extend(losses.iter().map(|&loss| T::real_to_f64(loss).to_bits()));
    // Of finite logits, so that the order of the additions shows.
    let finite: Vec<T> = logits.iter().map(|x| from(if x.is_finite() { *x } else { 0.0 })).collect();
    bits.push(T::real_to_f64(cross_entropy(&finite, &targets, classes).unwrap()).to_bits());
    bits
}

/// All NaN are one.
fn bits_of<T: Number>(x: &T) -> u64 {
    let x = x.to_f64();
    if x.is_nan() { u64::MAX } else { x.to_bits() }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let pools: Vec<_> = (1..=3).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
    for (shape, axis) in SHAPES.into_iter().flat_map(|shape| (0..3).map(move |axis| (shape, axis))) {
        let every = || {
            let mut bits = vec![all(shape, axis, |x| x)];
            if shape != LARGE {
                bits.extend([all(shape, axis, f16::from_f32), all(shape, axis, bf16::from_f32)]);
                bits.push(all(shape, axis, f64::from));
            }
            bits
        };
        let expected = pools[0].install(every);
        for pool in &pools[1..] {
            assert!(pool.install(every) == expected, "{shape:?} axis {axis}, {} threads", pool.current_num_threads());
        }
        assert!(every() == expected, "{shape:?} axis {axis} outside a pool");
    }
}
