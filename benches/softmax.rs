//! Softmax of 4096 x 4096 along either axis and of a single row, beside a copy of the same bytes and a plain loop.
//!
//! `copy` reads and writes what an ideal softmax would; `f32_loop` is the formula with the standard library's exp.

mod support;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flashtile::softmax::{Axis, softmax, softmax_in_place, softmax_into};
use flashtile::{bf16, f16};
use std::hint::black_box;
use std::time::Duration;
use support::Rng;

const N: usize = 4096;

/// Logits between -8 and 8.
fn logits(len: usize) -> Vec<f32> {
    let mut rng = Rng(1);
    (0..len).map(|_| 8.0 * rng.uniform()).collect()
}

/// One row by the formula.
fn f32_loop(x: &[f32], out: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    out.iter_mut().zip(x).for_each(|(out, x)| *out = (x - max).exp());
    let sum: f32 = out.iter().sum();
    out.iter_mut().for_each(|y| *y /= sum);
}

fn arrays(c: &mut Criterion) {
    let x = logits(N * N);
    macro_rules! bench_type {
        ($name:literal, $t:ty, $from:expr, $to:expr, $tolerance:expr, $least:expr) => {
            let x: Vec<$t> = x.iter().map(|x| $from(*x)).collect();
            let mut out = x.clone();
            let mut group = c.benchmark_group("softmax");
            group.throughput(Throughput::Bytes(2 * size_of_val(&x[..]) as u64));
            group.bench_function(concat!("copy/", $name, "/4096x4096"), |b| {
                b.iter(|| out.copy_from_slice(black_box(&x)));
            });
            for (number, name) in [(1, "last_axis"), (0, "first_axis")] {
                let axis = Axis::new(&[N, N], number).unwrap();
                softmax_into(&x, &mut out, axis, 1.0).unwrap();
                let (stride, step) = if number == 1 { (1, N) } else { (N, 1) };
                for line in [0, N / 2, N - 1] {
                    let x: Vec<f32> = (0..N).map(|i| $to(x[line * step + i * stride])).collect();
                    let mut expected = x.clone();
                    f32_loop(&x, &mut expected);
                    for i in 0..N {
                        let got = $to(out[line * step + i * stride]);
                        assert!(
                            (got - expected[i]).abs() <= $tolerance * expected[i] + $least,
                            "{got} {}",
                            expected[i]
                        );
                    }
                }
                let path = format!("{name}/{}/4096x4096", $name);
                group.bench_function(&path, |b| b.iter(|| softmax_into(&x, &mut out, axis, black_box(1.0)).unwrap()));
                // Its own output is its next input: the time depends on no value.
                let path = format!("{name}_in_place/{}/4096x4096", $name);
                group.bench_function(&path, |b| b.iter(|| softmax_in_place(&mut out, axis, black_box(1.0)).unwrap()));
            }
            group.finish();
        };
    }
    bench_type!("f32", f32, |x| x, |x: f32| x, 1e-5, 0.0);
    bench_type!("bf16", bf16, bf16::from_f32, bf16::to_f32, 0.004, 0.0);
    bench_type!("f16", f16, f16::from_f32, f16::to_f32, 0.001, 3e-8);
}

fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("softmax");
    for n in [10, 128, N, 32_000] {
        let x = logits(n);
        let mut out = x.clone();
        group.throughput(Throughput::Bytes(8 * n as u64));
        group
            .bench_function(format!("copy/f32/{n}"), |b| b.iter(|| black_box(&mut out).copy_from_slice(black_box(&x))));
        group.bench_function(format!("f32_loop/f32/{n}"), |b| b.iter(|| f32_loop(black_box(&x), black_box(&mut out))));
        group.bench_function(format!("row_into/f32/{n}"), |b| {
            b.iter(|| softmax_into(black_box(&x), black_box(&mut out), Axis::row(n), 1.0).unwrap());
        });
        group.bench_function(format!("row/f32/{n}"), |b| b.iter(|| softmax(black_box(&mut out), 1.0).unwrap()));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = rows, arrays
}
criterion_main!(benches);
