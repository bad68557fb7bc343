//! Vector-Jacobian products: from dy, the gradient of the output, to dx, the gradient of the input.
//!
//! ```text
//! softmax      total = sum(y * dy)    dx = scale * y * (dy - total)
//! log_softmax  total = sum(dy)        dx = scale * (dy - exp(y) * total)
//! ```
//!
//! Both are a sum along the line, then one expression per element. So y and dy are read twice, the second time from the cache if
//! the line fits there. The first pass also finds the largest |dy|. If it or the total is not finite, a dy is not finite or a
//! difference may overflow, and the line goes to the slow loops of `rare.rs`.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::buffers::Buffers;
use super::number::Number;
use super::rare;
use super::row::RUN;
use super::strips::{LinePanels, Strip, WIDE, load, store};
use crate::element::Element;
use crate::simd::exp::exp;
use crate::simd::{Kernel, MAX_LANES, Simd};

/// The gradient of softmax, or of log_softmax if `LOG`. `buffers` reads dy and writes dx.
pub(super) struct Backward<'a, T, const LOG: bool> {
    pub(super) y: &'a [T],
    pub(super) buffers: Buffers<'a, T>,
    pub(super) axis: Axis,
    pub(super) scale: f32,
}

impl<T: Element + Number, const LOG: bool> Kernel for Backward<'_, T, LOG> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { y, mut buffers, axis, scale } = self;
        if axis.after() == 1 {
            for number in 0..axis.lines() {
                let line = number * axis.line_len()..(number + 1) * axis.line_len();
                let (total, largest) = row_total::<S, T, LOG>(simd, &y[line.clone()], &buffers.input()[line.clone()]);
                if !(largest + total.abs()).is_finite() {
                    let dx = rare::backward(y, buffers.input(), axis.line(number), f64::from(scale), LOG);
                    dx.write(buffers.output());
                    continue;
                }
                // All vectors of a row have the same total.
                for at in line.clone().step_by(S::LANES) {
                    let at = at..line.end.min(at + S::LANES);
                    apply::<S, T, 1, LOG>(simd, &y[at.clone()], &mut buffers, at, [simd.splat(total)], scale);
                }
            }
            return;
        }
        for (_, panel) in LinePanels::new(axis, axis.after(), 0) {
            for (_, strip) in panel.strips::<S>() {
                if strip.width == WIDE * S::LANES {
                    strip_backward::<S, T, WIDE, LOG>(simd, y, &mut buffers, strip, scale);
                } else {
                    strip_backward::<S, T, 1, LOG>(simd, y, &mut buffers, strip, scale);
                }
            }
        }
    }
}

/// The gradient of the lines of a strip.
#[inline(always)]
fn strip_backward<S: Simd, T: Element + Number, const V: usize, const LOG: bool>(
    simd: S,
    y: &[T],
    buffers: &mut Buffers<'_, T>,
    strip: Strip,
    scale: f32,
) {
    let row = |i: usize| strip.first + i * strip.stride..strip.first + i * strip.stride + strip.width;
    let (mut total, mut largest) = ([simd.zero(); V], [simd.zero(); V]);
    for run in (0..strip.len).step_by(RUN) {
        let mut part = [simd.zero(); V];
        for i in run..strip.len.min(run + RUN) {
            let (y, dy) = (load::<S, T, V>(simd, &y[row(i)]), load::<S, T, V>(simd, &buffers.input()[row(i)]));
            for v in 0..V {
                part[v] = add_term::<S, LOG>(simd, y[v], dy[v], part[v]);
                largest[v] = simd.max(simd.abs(dy[v]), largest[v]);
            }
        }
        for v in 0..V {
            total[v] = simd.add(total[v], part[v]);
        }
    }
    let inside = simd.lt(simd.lane_numbers(), simd.splat(strip.width as f32));
    let (mut reaches, mut rare) = (largest, false);
    for v in 0..V {
        reaches[v] = simd.add(largest[v], simd.abs(total[v]));
        rare |= simd.any(simd.and(inside, simd.not_lt(reaches[v], simd.splat(f32::INFINITY))));
    }
    let mut rare_lines = Vec::new();
    if rare {
        let mut reach = [0.0; WIDE * MAX_LANES];
        for v in 0..V {
            simd.store_slice(&mut reach[v * S::LANES..], reaches[v]);
        }
        rare_lines = rare::strip_backward(y, buffers.input(), strip, &reach, f64::from(scale), LOG);
    }
    for i in 0..strip.len {
        apply::<S, T, V, LOG>(simd, &y[row(i)], buffers, row(i), total, scale);
    }
    for line in rare_lines {
        line.write(buffers.output());
    }
}

/// The total of a row and the largest |dy|. The largest ignores NaN.
#[inline(always)]
fn row_total<S: Simd, T: Element, const LOG: bool>(simd: S, y: &[T], dy: &[T]) -> (f32, f32) {
    let (mut total, mut largest) = (simd.zero(), simd.zero());
    for (y, dy) in y.chunks(RUN * S::LANES).zip(dy.chunks(RUN * S::LANES)) {
        let mut part = simd.zero();
        for (y, dy) in y.chunks(S::LANES).zip(dy.chunks(S::LANES)) {
            let ([y], [dy]) = if y.len() == S::LANES {
                (load::<S, T, 1>(simd, y), load::<S, T, 1>(simd, dy))
            } else {
                ([simd.load_elements_part(y, 0.0)], [simd.load_elements_part(dy, 0.0)])
            };
            part = add_term::<S, LOG>(simd, y, dy, part);
            largest = simd.max(simd.abs(dy), largest);
        }
        total = simd.add(total, part);
    }
    (simd.sum(total), simd.max_lane(largest))
}

#[inline(always)]
fn add_term<S: Simd, const LOG: bool>(simd: S, y: S::F32, dy: S::F32, sum: S::F32) -> S::F32 {
    if LOG { simd.add(sum, dy) } else { simd.mul_add(y, dy, sum) }
}

/// dx of `V` neighbouring vectors, from y and dy of the same elements.
#[inline(always)]
fn apply<S: Simd, T: Element, const V: usize, const LOG: bool>(
    simd: S,
    y: &[T],
    buffers: &mut Buffers<'_, T>,
    range: std::ops::Range<usize>,
    total: [S::F32; V],
    scale: f32,
) {
    let (y, dy) = (load::<S, T, V>(simd, y), load::<S, T, V>(simd, &buffers.input()[range.clone()]));
    let mut dx = total;
    for v in 0..V {
        let unscaled = if LOG {
            simd.sub(dy[v], simd.mul(exp(simd, y[v]), total[v]))
        } else {
            simd.mul(y[v], simd.sub(dy[v], total[v]))
        };
        dx[v] = simd.mul(simd.splat(scale), unscaled);
    }
    store::<S, T, V>(simd, &mut buffers.output()[range], dx, None);
}
