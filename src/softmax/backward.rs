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
use super::axis_loop::{compute_shares, panels_for, rows_for, worth};
use super::buffers::Buffers;
use super::lines::Lines;
use super::number::Number;
use super::rare;
use super::row::RUN;
use super::shared::{Panel, PanelBuffers, PanelMut, Share};
use super::strips::{Strip, WIDE, load, store, with_vectors};
use crate::element::Element;
use crate::simd::exp::exp;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::threads::workers;
use std::ops::Range;

/// The gradient of softmax, or of log_softmax if `log`. `buffers` reads dy and writes dx.
pub(super) fn backward<T: Element + Number>(
    isa: Isa,
    y: &[T],
    buffers: Buffers<'_, T>,
    axis: Axis,
    scale: f32,
    log: bool,
) {
    if axis.elements() == 0 {
        return;
    }
    let worth = worth(axis);
    let workers = workers(worth, axis.lines());
    let counter = if axis.after() == 1 { rows_for(axis, workers) } else { panels_for(axis, axis.after(), 0, workers) };
    compute_shares(buffers, counter, (worth, workers), &|share, _| {
        if log {
            isa.run(Backward::<_, true> { y, share, scale });
        } else {
            isa.run(Backward::<_, false> { y, share, scale });
        }
    });
}

/// [`backward`] of the lines of a share.
struct Backward<'a, 'c, T, const LOG: bool> {
    y: &'a [T],
    share: Share<'c, T>,
    scale: f32,
}

impl<T: Element + Number, const LOG: bool> Kernel for Backward<'_, '_, T, LOG> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { y, mut share, scale } = self;
        match share.lines() {
            Lines::Rows(axis) => {
                let (first, len) = (share.units().start * axis.line_len(), axis.line_len());
                let mut buffers = share.rows();
                for start in (0..buffers.input().len()).step_by(len) {
                    let y = &y[first + start..][..len];
                    row_backward::<S, T, LOG>(simd, y, &mut buffers, start..start + len, scale);
                }
            }
            Lines::Panels(_) => {
                while let Some((place, mut buffers)) = share.next_panel() {
                    let y = Panel::new(y, place);
                    for (_, strip) in place.panel.strips::<S>() {
                        with_vectors!(strip, S, V => {
                            strip_backward::<S, T, V, LOG>(simd, y, &mut buffers, strip, scale)
                        });
                    }
                }
            }
        }
    }
}

/// The gradient of a row.
#[inline(always)]
fn row_backward<S: Simd, T: Element + Number, const LOG: bool>(
    simd: S,
    y: &[T],
    buffers: &mut Buffers<'_, T>,
    row: Range<usize>,
    scale: f32,
) {
    let (total, largest) = row_total::<S, T, LOG>(simd, y, &buffers.input()[row.clone()]);
    if !(largest + total.abs()).is_finite() {
        let (y, dy) = (Panel::line(y), Panel::line(&buffers.input()[row.clone()]));
        let dx = rare::backward(y, dy, 0, f64::from(scale), LOG);
        return dx.write(&mut PanelMut::line(&mut buffers.output()[row]));
    }
    // All vectors of a row have the same total.
    for (at, y) in row.clone().step_by(S::LANES).zip(y.chunks(S::LANES)) {
        let at = at..at + y.len();
        let dx = dx_of::<S, T, 1, LOG>(simd, y, &buffers.input()[at.clone()], [simd.splat(total)], scale);
        store::<S, T, 1>(simd, &mut buffers.output()[at], dx, None);
    }
}

/// The gradient of the lines of a strip.
#[inline(always)]
fn strip_backward<S: Simd, T: Element + Number, const V: usize, const LOG: bool>(
    simd: S,
    y: Panel<'_, T>,
    buffers: &mut PanelBuffers<'_, T>,
    strip: Strip,
    scale: f32,
) {
    let (mut total, mut largest) = ([simd.zero(); V], [simd.zero(); V]);
    for run in (0..strip.len).step_by(RUN) {
        let mut part = [simd.zero(); V];
        for i in run..strip.len.min(run + RUN) {
            let (y, dy) =
                (load::<S, T, V>(simd, strip.row(y, i)), load::<S, T, V>(simd, strip.row(buffers.input(), i)));
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
        let dx = dx_of::<S, T, V, LOG>(simd, strip.row(y, i), strip.row(buffers.input(), i), total, scale);
        store::<S, T, V>(simd, strip.row_mut(buffers.output(), i), dx, None);
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
fn dx_of<S: Simd, T: Element, const V: usize, const LOG: bool>(
    simd: S,
    y: &[T],
    dy: &[T],
    total: [S::F32; V],
    scale: f32,
) -> [S::F32; V] {
    let (y, dy) = (load::<S, T, V>(simd, y), load::<S, T, V>(simd, dy));
    let mut dx = total;
    for v in 0..V {
        let unscaled = if LOG {
            simd.sub(dy[v], simd.mul(exp(simd, y[v]), total[v]))
        } else {
            simd.mul(y[v], simd.sub(dy[v], total[v]))
        };
        dx[v] = simd.mul(simd.splat(scale), unscaled);
    }
    dx
}
