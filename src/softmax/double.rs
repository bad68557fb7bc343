//! The formulas in f64: plain loops over slices, which the compiler turns into vectors at each level.
//!
//! No loop has a fused multiply-add, and each adds in one order. So the bits are the same at every level.
#![forbid(unsafe_code)]

use super::axis::{Axis, Line};
use super::axis_loop::{compute_shares, panels_for, rows_for, visit_units, worth};
use super::buffers::Buffers;
use super::chosen_level::isa;
use super::double_exp::exp;
use super::lines::{Lines, PanelPlace};
use super::number::Number;
use super::rare;
use super::sealed::Visit;
use super::shared::{Counter, Panel, PanelBuffers, PanelMut, Share};
use crate::simd::{Isa, Kernel, Simd};
use crate::threads::{Worth, workers};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Partial sums of a row. The loops over them become vectors.
const SUMS: usize = 8;

/// Elements of a row that are computed at a time, in the first cache.
const BLOCK: usize = 256;

/// Lines of a panel: four cache lines of each row.
const PANEL_LINES: usize = 32;

/// The exponents scale * (x - max) of a line, where max belongs to the largest scale * x. An x of -inf is always hidden, +inf is
/// hidden with a negative scale, and no finite x gives NaN.
#[derive(Clone, Copy)]
struct Exponents {
    sign: f64,
    scale: f64,
}

impl Exponents {
    fn new(scale: f64) -> Self {
        Self { sign: if scale < 0.0 { -1.0 } else { 1.0 }, scale: scale.abs() }
    }

    #[inline(always)]
    fn visible(self, x: f64) -> f64 {
        if x == f64::NEG_INFINITY { x } else { self.sign * x }
    }

    /// The larger of `max` and that of x. NaN is ignored.
    #[inline(always)]
    fn larger(self, x: f64, max: f64) -> f64 {
        let y = self.visible(x);
        if y > max { y } else { max }
    }

    /// As twice the product with half of the difference, which never overflows.
    #[inline(always)]
    fn of(self, x: f64, max: f64) -> f64 {
        let y = self.visible(x);
        let t = self.scale * (0.5 * y - 0.5 * max) * 2.0;
        if y == f64::NEG_INFINITY { y } else { t }
    }

    /// The maximum in units of the exponent.
    fn scaled(self, max: f64) -> f64 {
        if max == f64::NEG_INFINITY { max } else { self.scale * max }
    }
}

/// 1 / sum and log(sum). A line without a visible element has the sum 0. Its softmax is 0, its log_softmax is -inf.
fn norms(sum: f64) -> (f64, f64) {
    if sum == 0.0 { (0.0, 0.0) } else { (1.0 / sum, sum.ln()) }
}

/// The state of a line: its maximum and its sum.
type State = (f64, f64);

/// What to compute of each line.
#[derive(Clone, Copy)]
struct Options<'a> {
    exponents: Exponents,
    log: bool,
    upstream: Option<&'a [f64]>,
    visit: &'a (dyn Fn(usize, State) + Sync),
}

pub(super) fn softmax(
    isa: Isa,
    buffers: Buffers<'_, f64>,
    axis: Axis,
    (scale, log): (f64, bool),
    upstream: Option<&[f64]>,
    visit: Option<Visit<'_>>,
) {
    if axis.elements() == 0 {
        return;
    }
    let visit = visit.map(Mutex::new);
    let visit = &|line, (max, sum): State| {
        if let Some(visit) = &visit {
            (visit.lock().unwrap_or_else(PoisonError::into_inner))(line, max, sum);
        }
    };
    let (worth, workers, counter) = divided(axis);
    compute_shares(buffers, counter, (worth, workers), &|share, _| {
        isa.run(Softmax { share, options: Options { exponents: Exponents::new(scale), log, upstream, visit } })
    });
}

fn divided(axis: Axis) -> (Worth, usize, Counter) {
    let worth = worth(axis);
    let workers = workers(worth, axis.lines());
    let counter = if axis.after() == 1 { rows_for(axis, workers) } else { panels_for(axis, PANEL_LINES, 0, workers) };
    (worth, workers, counter)
}

struct Softmax<'a, 'c> {
    share: Share<'c, f64>,
    options: Options<'a>,
}

impl Kernel for Softmax<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { mut share, options } = self;
        match share.lines() {
            Lines::Rows(axis) => {
                let (units, len) = (share.units(), axis.line_len());
                let (mut buffers, mut exps) = (share.rows(), [0.0; BLOCK]);
                for (line, start) in units.zip((0..).step_by(len)) {
                    row_softmax(&mut buffers, start..start + len, line, options, &mut exps);
                }
            }
            Lines::Panels(_) => {
                while let Some((place, mut buffers)) = share.next_panel() {
                    panel_softmax(&mut buffers, place, options);
                }
            }
        }
    }
}

/// Softmax of one row, or log_softmax.
#[inline(always)]
fn row_softmax(
    buffers: &mut Buffers<'_, f64>,
    row: Range<usize>,
    line: usize,
    options: Options<'_>,
    exps: &mut [f64; BLOCK],
) {
    let Options { exponents, log, upstream, visit } = options;
    let max = row_max(&buffers.input()[row.clone()], exponents);
    let mut sums = [0.0; SUMS];
    for start in row.clone().step_by(BLOCK) {
        let block = start..row.end.min(start + BLOCK);
        let exps = &mut exps[..block.len()];
        match buffers {
            Buffers::InPlace(x) => x[block].iter_mut().for_each(|x| *x = exponents.of(*x, max)),
            Buffers::Into { from, to } => {
                for (t, x) in to[block.clone()].iter_mut().zip(&from[block]) {
                    *t = exponents.of(*x, max);
                }
            }
        }
        let t = &mut buffers.output()[start..start + exps.len()];
        for (e, t) in exps.iter_mut().zip(&*t) {
            *e = exp(*t);
        }
        if !log {
            t.copy_from_slice(exps);
        }
        add_up(exps, &mut sums);
    }
    let sum = sums.iter().sum();
    let (inverse, log_sum) = norms(sum);
    let out = &mut buffers.output()[row];
    if log {
        out.iter_mut().for_each(|t| *t -= log_sum);
    } else {
        let upstream = upstream.map_or(1.0, |upstream| upstream[line]);
        out.iter_mut().for_each(|e| *e = *e * inverse * upstream);
    }
    visit(line, (max, sum));
}

/// The maximum of a row; -inf without elements. NaN is ignored.
#[inline(always)]
fn row_max(x: &[f64], exponents: Exponents) -> f64 {
    let mut max = [f64::NEG_INFINITY; SUMS];
    let chunks = x.chunks_exact(SUMS);
    for &x in chunks.remainder() {
        max[0] = exponents.larger(x, max[0]);
    }
    for x in chunks {
        for i in 0..SUMS {
            max[i] = exponents.larger(x[i], max[i]);
        }
    }
    max.into_iter().fold(f64::NEG_INFINITY, f64::max)
}

/// Adds element i to sum i % `SUMS`.
#[inline(always)]
fn add_up(x: &[f64], sums: &mut [f64; SUMS]) {
    let chunks = x.chunks_exact(SUMS);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..SUMS {
            sums[i] += x[i];
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += x;
    }
}

/// Softmax of the lines of a panel, or log_softmax.
#[inline(always)]
fn panel_softmax(buffers: &mut PanelBuffers<'_, f64>, place: PanelPlace, options: Options<'_>) {
    for column in (0..place.panel.width).step_by(PANEL_LINES) {
        match place.panel.width - column {
            // With a constant width, loops over a row have no rest.
            PANEL_LINES.. => strip_softmax(buffers, place, column, PANEL_LINES, options),
            width => strip_softmax(buffers, place, column, width, options),
        }
    }
}

/// Softmax of some lines of a panel, or log_softmax. Each pass over the lines is a pass over the rows.
#[inline(always)]
fn strip_softmax(
    buffers: &mut PanelBuffers<'_, f64>,
    place: PanelPlace,
    column: usize,
    width: usize,
    options: Options<'_>,
) {
    let (Options { exponents, log, upstream, visit }, len) = (options, place.panel.len);
    let max = panel_max(buffers.input(), column, width, exponents);
    let max = &max[..width];
    let (mut sums, mut row) = ([0.0; PANEL_LINES], [0.0; PANEL_LINES]);
    let (sums, row) = (&mut sums[..width], &mut row[..width]);
    for i in 0..len {
        for (t, (x, max)) in row.iter_mut().zip(buffers.input().row(i, column, width).iter().zip(max)) {
            *t = exponents.of(*x, *max);
        }
        for ((out, t), sum) in buffers.output().row(i, column, width).iter_mut().zip(&*row).zip(&mut *sums) {
            let e = exp(*t);
            *sum += e;
            *out = if log { *t } else { e };
        }
    }
    // The sums are replaced by what makes probabilities of the exponentials, or logarithms of the exponents.
    for (i, (sum, max)) in sums.iter_mut().zip(max).enumerate() {
        let line = place.line + column + i;
        visit(line, (*max, *sum));
        let (inverse, log_sum) = norms(*sum);
        *sum = if log { log_sum } else { inverse };
        row[i] = upstream.map_or(1.0, |upstream| upstream[line]);
    }
    for i in 0..len {
        for ((out, norm), upstream) in buffers.output().row(i, column, width).iter_mut().zip(&*sums).zip(&*row) {
            *out = if log { *out - norm } else { *out * norm * upstream };
        }
    }
}

/// The maxima of lines of a panel.
#[inline(always)]
fn panel_max(x: Panel<'_, f64>, column: usize, width: usize, exponents: Exponents) -> [f64; PANEL_LINES] {
    let mut max = [f64::NEG_INFINITY; PANEL_LINES];
    for i in 0..x.len() {
        for (x, max) in x.row(i, column, width).iter().zip(&mut max) {
            *max = exponents.larger(*x, *max);
        }
    }
    max
}

pub(super) fn states(isa: Isa, x: &[f64], axis: Axis, scale: f64, visit: Visit<'_>) {
    let (visit, exponents) = (Mutex::new(visit), Exponents::new(scale));
    let visit = &|line, (max, sum): State| {
        (visit.lock().unwrap_or_else(PoisonError::into_inner))(line, exponents.scaled(max), sum);
    };
    if axis.lines() > 0 {
        let (worth, workers, counter) = divided(axis);
        let lines = counter.lines();
        visit_units(counter, (worth, workers), &|units, _| isa.run(States { x, lines, units, exponents, visit }));
    }
}

struct States<'a> {
    x: &'a [f64],
    lines: Lines,
    units: Range<usize>,
    exponents: Exponents,
    visit: &'a (dyn Fn(usize, State) + Sync),
}

impl Kernel for States<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { x, lines, units, exponents, visit } = self;
        for unit in units {
            match lines {
                Lines::Rows(axis) => {
                    visit(unit, row_state(&x[unit * axis.line_len()..][..axis.line_len()], exponents));
                }
                Lines::Panels(panels) => {
                    let place = panels.place(unit);
                    panel_states(Panel::new(x, place), place, exponents, visit);
                }
            }
        }
    }
}

#[inline(always)]
fn row_state(x: &[f64], exponents: Exponents) -> State {
    let max = row_max(x, exponents);
    let mut sums = [0.0; SUMS];
    for x in x.chunks(BLOCK) {
        let mut exps = [0.0; BLOCK];
        for (e, x) in exps.iter_mut().zip(x) {
            *e = exp(exponents.of(*x, max));
        }
        add_up(&exps[..x.len()], &mut sums);
    }
    (max, sums.iter().sum())
}

#[inline(always)]
fn panel_states(x: Panel<'_, f64>, place: PanelPlace, exponents: Exponents, visit: &(dyn Fn(usize, State) + Sync)) {
    for column in (0..place.panel.width).step_by(PANEL_LINES) {
        let width = PANEL_LINES.min(place.panel.width - column);
        let max = panel_max(x, column, width, exponents);
        let mut sums = [0.0; PANEL_LINES];
        for i in 0..x.len() {
            for ((x, max), sum) in x.row(i, column, width).iter().zip(&max).zip(&mut sums) {
                *sum += exp(exponents.of(*x, *max));
            }
        }
        for (i, state) in max.into_iter().zip(sums).take(width).enumerate() {
            visit(place.line + column + i, state);
        }
    }
}

pub(super) fn backward(isa: Isa, y: &[f64], buffers: Buffers<'_, f64>, axis: Axis, scale: f64, log: bool) {
    if axis.elements() > 0 {
        let (worth, workers, counter) = divided(axis);
        compute_shares(buffers, counter, (worth, workers), &|share, _| isa.run(Backward { y, share, scale, log }));
    }
}

struct Backward<'a, 'c> {
    y: &'a [f64],
    share: Share<'c, f64>,
    scale: f64,
    log: bool,
}

impl Kernel for Backward<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { y, mut share, scale, log } = self;
        match share.lines() {
            Lines::Rows(axis) => {
                let (first, len) = (share.units().start * axis.line_len(), axis.line_len());
                let mut buffers = share.rows();
                for start in (0..buffers.input().len()).step_by(len) {
                    let (y, row) = (&y[first + start..][..len], start..start + len);
                    let mut buffers = match &mut buffers {
                        Buffers::InPlace(x) => PanelBuffers::InPlace(PanelMut::line(&mut x[row])),
                        Buffers::Into { from, to } => PanelBuffers::Into {
                            from: Panel::line(&from[row.clone()]),
                            to: PanelMut::line(&mut to[row]),
                        },
                    };
                    line_backward(Panel::line(y), &mut buffers, 0, scale, log);
                }
            }
            Lines::Panels(_) => {
                while let Some((place, mut buffers)) = share.next_panel() {
                    for column in 0..place.panel.width {
                        line_backward(Panel::new(y, place), &mut buffers, column, scale, log);
                    }
                }
            }
        }
    }
}

/// The gradient of the line in one column of a panel.
#[inline(always)]
fn line_backward(y: Panel<'_, f64>, buffers: &mut PanelBuffers<'_, f64>, column: usize, scale: f64, log: bool) {
    let at = |panel: Panel<'_, f64>, i: usize| panel.row(i, column, 1)[0];
    let dy = buffers.input();
    let (mut total, mut largest) = (0.0, 0.0f64);
    for i in 0..y.len() {
        total += if log { at(dy, i) } else { at(y, i) * at(dy, i) };
        largest = largest.max(at(dy, i).abs());
    }
    if !(largest + total.abs()).is_finite() {
        return rare::backward(y, dy, column, scale, log).write(buffers.output());
    }
    for i in 0..y.len() {
        let (y, dy) = (at(y, i), at(buffers.input(), i));
        let dx = if log { dy - exp(y) * total } else { y * (dy - total) };
        buffers.output().row(i, column, 1)[0] = scale * dx;
    }
}

/// The softmax of one line times both factors; 0 where the softmax is 0.
#[cold]
#[inline(never)]
pub(super) fn softmax_line_times<T: Number>(x: &[T], out: &mut [T], line: Line, scale: f64, factors: [f64; 2]) {
    let mut probs: Vec<f64> = line.indices().map(|index| x[index].to_f64()).collect();
    let axis = Axis::row(probs.len());
    softmax(isa(), Buffers::InPlace(&mut probs), axis, (scale, false), None, None);
    let [a, b] = factors;
    let (larger, smaller) = if a.abs() < b.abs() { (b, a) } else { (a, b) };
    for (index, prob) in line.indices().zip(probs) {
        out[index] = T::from_f64(if prob == 0.0 { 0.0 } else { prob * larger * smaller });
    }
}
