//! Short rows in registers, where a level has enough of them. A row is `V` vectors, which are loaded, turned into exponentials, scaled
//! and stored. Nothing is transposed.
//!
//! ```text
//! rows of step s        max = max(x)                            highest
//! rows of step s - 1    e = exp(scale*(x-max)); sum += e        exponentials    x -> registers
//! rows of step s - 2    out = e / sum                           finish          registers -> out
//! ```
//!
//! A row is a chain of some 130 cycles: two folds of lanes, an exponential, a division. The processor alone overlaps too few such
//! chains. So the loop has three stages, each for other rows, and a stage takes `R` rows if they have few vectors. Rows of 100 take 0.87
//! of the time of a loop over rows, and rows of 24 take 0.63 (Zen 4, in cache).
//!
//! The bits are those of `F32Rows` in `row.rs`, because the exponentials are added in the same order.
#![forbid(unsafe_code)]

use super::buffers::Stored;
use super::scale::{Formula, One, Scale, Scaling};
use super::short_rows::{PAIR, SHORT};
use crate::simd::exp::{SCALED_ONE, exp_scaled};
use crate::simd::{Kernel, Simd};

/// Vectors of the longest row.
const MOST: usize = 8;

/// Rows of a step, at most.
pub(super) const STEP: usize = 4;

/// Rows of fewer elements are transposed: rows of 2 took 1.3 times as long in registers, rows of 10 less.
const LEAST: usize = 5;

/// Whether rows are computed here. The registers hold the exponentials of the rows of a step, and
/// the constants. Half types have no loops for
/// other scales than 1: they are transposed.
#[inline(always)]
pub(super) fn fits<S: Simd, T: Stored>(len: usize, formula: Formula, upstream: Option<&[f32]>) -> bool {
    let holds = S::REGISTERS >= 4 * MOST && (LEAST..=SHORT.min(MOST * S::LANES)).contains(&len);
    holds && !formula.log && upstream.is_none() && (T::IS_F32 || is_one(formula.scale))
}

fn is_one(scale: Scale) -> bool {
    scale.factor == 1.0 && scale.scale == 1.0
}

/// Rows of one length, at least 1.
pub(super) struct RegisterRows<'a, T> {
    /// The input. Without it `out` is the input.
    pub(super) x: Option<&'a [T]>,
    pub(super) out: &'a mut [f32],
    pub(super) len: usize,
    /// Gets the maximum and the sum of each row.
    pub(super) states: [&'a mut [f32]; 2],
    pub(super) scale: Scale,
}

/// Turns rows that [`fits`] has approved into their softmax.
#[inline(always)]
pub(super) fn softmax<S: Simd, T: Stored>(simd: S, rows: RegisterRows<'_, T>) {
    let scale = rows.scale;
    if is_one(scale) {
        softmax_with(simd, rows, One);
    } else if T::IS_F32 {
        softmax_with(simd, rows, scale);
    } else {
        unreachable!("half types with a scale");
    }
}

#[inline(always)]
fn softmax_with<S: Simd, T: Stored, C: Scaling>(simd: S, rows: RegisterRows<'_, T>, scale: C) {
    match rows.len.div_ceil(S::LANES) {
        1 => simd.call(Steps::<T, C, 1, STEP> { rows, scale }),
        2 => simd.call(Steps::<T, C, 2, STEP> { rows, scale }),
        3 => simd.call(Steps::<T, C, 3, STEP> { rows, scale }),
        4 => simd.call(Steps::<T, C, 4, 2> { rows, scale }),
        5 => simd.call(Steps::<T, C, 5, 1> { rows, scale }),
        6 => simd.call(Steps::<T, C, 6, 1> { rows, scale }),
        7 => simd.call(Steps::<T, C, 7, 1> { rows, scale }),
        _ => simd.call(Steps::<T, C, MOST, 1> { rows, scale }),
    }
}

/// Rows of `V` vectors, in steps of `R` rows.
struct Steps<'a, T, C, const V: usize, const R: usize> {
    rows: RegisterRows<'a, T>,
    scale: C,
}

impl<T: Stored, C: Scaling, const V: usize, const R: usize> Kernel for Steps<'_, T, C, V, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows: RegisterRows { x, out, len, states: [maxima, sums], .. }, scale } = self;
        let whole = maxima.len() - maxima.len() % R;
        let (first_maxima, maxima) = maxima.split_at_mut(whole);
        let (first_sums, sums) = sums.split_at_mut(whole);
        let (first_out, out) = out.split_at_mut(whole * len);
        let (first_x, x) = match x {
            Some(x) => (Some(&x[..whole * len]), Some(&x[whole * len..])),
            None => (None, None),
        };
        steps::<S, T, C, V, R>(simd, first_x, first_out, len, [first_maxima, first_sums], scale);
        if R > 1 {
            steps::<S, T, C, V, 1>(simd, x, out, len, [maxima, sums], scale);
        }
    }
}

/// The three stages. The number of rows is a multiple of `R`.
#[inline(always)]
fn steps<S: Simd, T: Stored, C: Scaling, const V: usize, const R: usize>(
    simd: S,
    x: Option<&[T]>,
    out: &mut [f32],
    len: usize,
    [maxima, sums]: [&mut [f32]; 2],
    scale: C,
) {
    // Thus the compiler knows that all vectors but the last one are whole.
    assert!(len > (V - 1) * S::LANES && len <= V * S::LANES);
    let count = maxima.len() / R;
    let mut exps = [[simd.zero(); V]; R];
    let mut lane_sums = [simd.zero(); R];
    for step in 0..count + 2 {
        if step >= 2 {
            for r in 0..R {
                let row = (step - 2) * R + r;
                sums[row] = finish(simd, &mut out[row * len..][..len], exps[r], lane_sums[r]);
            }
        }
        if step >= 1 && step <= count {
            for r in 0..R {
                let row = (step - 1) * R + r;
                let x = row_of(x, out, row * len, len);
                (exps[r], lane_sums[r]) = exponentials(simd, x, maxima[row], scale);
            }
        }
        if step < count {
            for r in 0..R {
                let row = step * R + r;
                maxima[row] = highest::<S, T, C, V>(simd, row_of(x, out, row * len, len), scale);
            }
        }
    }
}

/// A row of the input, which is `out` if there is no other.
#[inline(always)]
fn row_of<'a, T: Stored>(x: Option<&'a [T]>, out: &'a [f32], at: usize, len: usize) -> &'a [T] {
    match x {
        Some(x) => &x[at..][..len],
        None => T::of_f32(&out[at..][..len]).unwrap_or_default(),
    }
}

/// Vector `v` of a row, times the factor. Lanes past the end of the row are -inf.
#[inline(always)]
fn load<S: Simd, T: Stored, C: Scaling, const V: usize>(simd: S, x: &[T], v: usize, scale: C) -> S::F32 {
    let x = &x[v * S::LANES..];
    let y = if v + 1 < V { simd.load_elements(x) } else { simd.load_elements_part(x, f32::NEG_INFINITY) };
    scale.apply_factor(simd, y)
}

/// The maximum of a row; NaN is ignored.
#[inline(always)]
fn highest<S: Simd, T: Stored, C: Scaling, const V: usize>(simd: S, x: &[T], scale: C) -> f32 {
    let mut max = simd.splat(f32::NEG_INFINITY);
    for v in 0..V {
        max = simd.max(load::<S, T, C, V>(simd, x, v, scale), max);
    }
    simd.max_lane(max)
}

/// The exponentials of a row in units of 1/`SCALED_ONE`, and their sum in each lane, in the order of `exp_tile` in `row.rs`: the
/// vectors of whole pairs have a sum for each of the two, and vectors after the last pair are added to the first.
#[inline(always)]
fn exponentials<S: Simd, T: Stored, C: Scaling, const V: usize>(
    simd: S,
    x: &[T],
    max: f32,
    scale: C,
) -> ([S::F32; V], S::F32) {
    let paired = x.len() - x.len() % (PAIR * S::LANES);
    let max = simd.splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
    let (mut exps, mut sum) = ([max; V], [simd.zero(); PAIR]);
    for (v, e) in exps.iter_mut().enumerate() {
        *e = exp_scaled(simd, scale.exponent(simd, load::<S, T, C, V>(simd, x, v, scale), max));
        if v % PAIR == 0 || (v + 1 == V && v * S::LANES >= paired) {
            sum[0] = simd.add(sum[0], *e);
        } else {
            sum[1] = simd.add(sum[1], *e);
        }
    }
    (exps, simd.add(sum[0], sum[1]))
}

/// Writes the softmax of a row. Returns the sum of its exponentials.
#[inline(always)]
fn finish<S: Simd, const V: usize>(simd: S, out: &mut [f32], exps: [S::F32; V], lane_sums: S::F32) -> f32 {
    let sum = simd.sum(lane_sums);
    // The sum is 0 if all elements are hidden, and at least `SCALED_ONE` or NaN otherwise.
    let norm = simd.splat(if sum == 0.0 { 0.0 } else { 1.0 / sum });
    for v in 0..V {
        let (out, y) = (&mut out[v * S::LANES..], simd.mul(exps[v], norm));
        if v + 1 < V {
            simd.store_slice(out, y);
        } else {
            simd.store_part(out, y);
        }
    }
    sum / SCALED_ONE
}
