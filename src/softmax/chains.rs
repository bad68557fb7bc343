//! Loops over a row for the calls with options, in f64 where they add or multiply: plain Rust, which the compiler turns into vectors at each level. Sums and
//! maxima are formed in eight chains, in one order, so the bits are the same at every level.
#![forbid(unsafe_code)]

use super::sealed::Sealed;
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::matrix::Matrix;

/// Partial sums or maxima of a row.
const CHAINS: usize = 8;

const HIDDEN: f64 = f64::NEG_INFINITY;

/// scale * x + bias, in f64. -inf hides at any scale.
#[inline(always)]
pub(super) fn score(x: f64, bias: f32, scale: f64) -> f64 {
    let score = scale * x + f64::from(bias);
    if (x == HIDDEN) | (bias == f32::NEG_INFINITY) { HIDDEN } else { score }
}

/// Rows ahead of the one that is read of a mask, for prefetching: the rows of a block of columns.
const AHEAD: usize = super::lines::BLOCK;

/// Writes -inf where `visible` is 0: in dense rows of its width.
pub(super) fn hide<R: Sealed>(isa: Isa, rows: &mut [R], visible: Matrix<'_, u8>) {
    isa.run(Hide { rows, visible });
}

struct Hide<'a, R> {
    rows: &'a mut [R],
    visible: Matrix<'a, u8>,
}

impl<R: Sealed> Kernel for Hide<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (hidden, visible) = (R::from_f64(HIDDEN), self.visible);
        for (n, row) in self.rows.chunks_exact_mut(visible.cols()).enumerate() {
            let of_row = visible.row(n);
            if let Some(of_row) = of_row.as_slice() {
                let ahead = visible.row_stride().wrapping_mul(AHEAD as isize);
                simd.prefetch_elements(of_row.as_ptr().wrapping_offset(ahead), of_row.len());
                for (x, visible) in row.iter_mut().zip(of_row) {
                    *x = if *visible == 0 { hidden } else { *x };
                }
            } else {
                for (x, visible) in row.iter_mut().zip(of_row.iter()) {
                    *x = if visible == 0 { hidden } else { *x };
                }
            }
        }
    }
}

/// The largest score of a row; NaN is ignored.
pub(super) fn largest_score<R: Sealed>(isa: Isa, row: &[R], bias: &[f32], scale: f64) -> f64 {
    isa.run(LargestScore { row, bias, scale })
}

struct LargestScore<'a, R> {
    row: &'a [R],
    bias: &'a [f32],
    scale: f64,
}

impl<R: Sealed> Kernel for LargestScore<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let mut largest = [HIDDEN; CHAINS];
        for (row, bias) in self.row.chunks(CHAINS).zip(self.bias.chunks(CHAINS)) {
            if let (Some(row), Some(bias)) = (row.first_chunk::<CHAINS>(), bias.first_chunk::<CHAINS>()) {
                for n in 0..CHAINS {
                    let score = score(row[n].to_f64(), bias[n], self.scale);
                    largest[n] = if score > largest[n] { score } else { largest[n] };
                }
            } else {
                for n in 0..row.len() {
                    let score = score(row[n].to_f64(), bias[n], self.scale);
                    largest[n] = if score > largest[n] { score } else { largest[n] };
                }
            }
        }
        let mut max = HIDDEN;
        for chain in largest {
            max = if chain > max { chain } else { max };
        }
        max
    }
}

/// The larger of each number of `max` and the score of its column; NaN is ignored.
pub(super) fn larger_scores<R: Sealed>(isa: Isa, row: &[R], bias: &[f32], scale: f64, max: &mut [f64]) {
    isa.run(LargerScores { row, bias, scale, max });
}

struct LargerScores<'a, R> {
    row: &'a [R],
    bias: &'a [f32],
    scale: f64,
    max: &'a mut [f64],
}

impl<R: Sealed> Kernel for LargerScores<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((x, bias), max) in self.row.iter().zip(self.bias).zip(self.max) {
            let score = score(x.to_f64(), *bias, self.scale);
            *max = if score > *max { score } else { *max };
        }
    }
}

/// Turns a row into score - max, with a maximum for each column.
pub(super) fn subtract_each<R: Sealed>(isa: Isa, row: &mut [R], bias: &[f32], scale: f64, max: &[f64]) {
    isa.run(SubtractEach { row, bias, scale, max });
}

struct SubtractEach<'a, R> {
    row: &'a mut [R],
    bias: &'a [f32],
    scale: f64,
    max: &'a [f64],
}

impl<R: Sealed> Kernel for SubtractEach<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((x, bias), max) in self.row.iter_mut().zip(self.bias).zip(self.max) {
            let score = score(x.to_f64(), *bias, self.scale);
            let below = score - max;
            *x = R::from_f64(if score == HIDDEN { HIDDEN } else { below });
        }
    }
}

/// Turns a row into score - max.
pub(super) fn subtract<R: Sealed>(isa: Isa, row: &mut [R], bias: &[f32], scale: f64, max: f64) {
    isa.run(Subtract { row, bias, scale, max });
}

struct Subtract<'a, R> {
    row: &'a mut [R],
    bias: &'a [f32],
    scale: f64,
    max: f64,
}

impl<R: Sealed> Kernel for Subtract<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (x, bias) in self.row.iter_mut().zip(self.bias) {
            let score = score(x.to_f64(), *bias, self.scale);
            let below = score - self.max;
            *x = R::from_f64(if score == HIDDEN { HIDDEN } else { below });
        }
    }
}

/// The sum of weight * (max - x), where a weight of 0 leaves nothing of infinity. Without weights, all are 1.
pub(super) fn sum_below<R: Sealed>(isa: Isa, row: &[R], weights: Option<&[f32]>, max: f64) -> f64 {
    isa.run(SumBelow { row, weights, max })
}

struct SumBelow<'a, R> {
    row: &'a [R],
    weights: Option<&'a [f32]>,
    max: f64,
}

impl<R: Sealed> Kernel for SumBelow<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let Self { row, weights, max } = self;
        let mut sums = [0.0; CHAINS];
        match weights {
            None => {
                for row in row.chunks(CHAINS) {
                    if let Some(row) = row.first_chunk::<CHAINS>() {
                        for n in 0..CHAINS {
                            sums[n] += max - row[n].to_f64();
                        }
                    } else {
                        for n in 0..row.len() {
                            sums[n] += max - row[n].to_f64();
                        }
                    }
                }
            }
            Some(weights) => {
                for (row, weights) in row.chunks(CHAINS).zip(weights.chunks(CHAINS)) {
                    if let (Some(row), Some(weights)) = (row.first_chunk::<CHAINS>(), weights.first_chunk::<CHAINS>()) {
                        for n in 0..CHAINS {
                            sums[n] += times(f64::from(weights[n]), max - row[n].to_f64());
                        }
                    } else {
                        for n in 0..row.len() {
                            sums[n] += times(f64::from(weights[n]), max - row[n].to_f64());
                        }
                    }
                }
            }
        }
        let [a, b, c, d, e, f, g, h] = sums;
        ((a + b) + (c + d)) + ((e + f) + (g + h))
    }
}

/// Subtracts factor * weight from each number of a row. Without weights, all are 1.
pub(super) fn subtract_weights<R: Sealed>(isa: Isa, row: &mut [R], weights: Option<&[f32]>, factor: f64) {
    isa.run(SubtractWeights { row, weights, factor });
}

struct SubtractWeights<'a, R> {
    row: &'a mut [R],
    weights: Option<&'a [f32]>,
    factor: f64,
}

impl<R: Sealed> Kernel for SubtractWeights<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.weights {
            None => {
                for x in self.row {
                    *x = R::from_f64(x.to_f64() - self.factor);
                }
            }
            Some(weights) => {
                for (x, weight) in self.row.iter_mut().zip(weights) {
                    *x = R::from_f64(x.to_f64() - self.factor * f64::from(*weight));
                }
            }
        }
    }
}

/// weight * x, where a weight of 0 leaves nothing of infinity.
#[inline(always)]
pub(super) fn times(weight: f64, x: f64) -> f64 {
    let product = weight * x;
    if (weight == 0.0) & (x == f64::INFINITY) { 0.0 } else { product }
}
