//! The loops of each element type: those of f32 for f32, f16 and bf16, and those of f64.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::axis_loop::{self, Options, VisitState, visit_states, worth};
use super::backward;
use super::buffers::{Buffers, Stored};
use super::chosen_level::isa;
use super::convert;
use super::filled_rows;
use super::number::Number;
use super::row_state::RowState;
use super::scale::Formula;
use super::scratch::Scratch;
use super::sealed::{FilledRows, Filler, Made, Visit};
use super::shared::Panel;
use super::{double, sealed};
use crate::element::{bf16, f16};
use std::sync::{Mutex, PoisonError};

/// Hands a state to its visitor, from one worker at a time.
fn hand_over(visit: &Mutex<Visit<'_>>, line: usize, max: f64, sum: f64) {
    (visit.lock().unwrap_or_else(PoisonError::into_inner))(line, max, sum);
}

macro_rules! through_f32 {
    ($t:ty, $to:expr, $from:expr) => {
        impl Number for $t {}
        impl sealed::Sealed for $t {
            type Real = f32;
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from($to(self))
            }
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                $from(x as f32)
            }
            fn real(x: f64) -> f32 {
                x as f32
            }
            fn real_to_f64(x: f32) -> f64 {
                f64::from(x)
            }
            fn of_real(x: &[f32]) -> Option<&[Self]> {
                <$t>::of_f32(x)
            }
            fn of_real_mut(x: &mut [f32]) -> Option<&mut [Self]> {
                <$t>::of_f32_mut(x)
            }
            fn as_real(x: &[Self]) -> Option<&[f32]> {
                <$t>::as_f32(x)
            }
            fn as_real_mut(x: &mut [Self]) -> Option<&mut [f32]> {
                <$t>::as_f32_mut(x)
            }
            fn widen(from: &[Self], to: &mut [f32]) {
                convert::widen(isa(), from, to);
            }
            fn widen_visible(from: &[Self], visible: &[u8], to: &mut [f32]) {
                convert::widen_visible(isa(), from, visible, to);
            }
            fn narrow(from: &[f32], to: &mut [Self]) {
                convert::narrow(isa(), from, to);
            }
            fn softmax(buffers: Buffers<'_, Self>, axis: Axis, scale: f32, log: bool) {
                let options = Options::new(Formula::new(scale, log));
                axis_loop::softmax(isa(), buffers, axis, worth(axis), options);
            }
            fn softmax_of_made(made: Made<'_, Self>, scale: f32, log: bool, scratch: &mut Scratch) -> bool {
                axis_loop::softmax_of_made(isa(), made, Formula::new(scale, log), scratch);
                true
            }
            fn filler() -> Option<Filler<Self, f32>> {
                Some(|x, visible, tile, (scale, log)| {
                    filled_rows::fill(isa(), x, visible, tile, Formula::new(scale, log))
                })
            }
            fn softmax_of_filled(rows: FilledRows<'_, Self>, scale: f32, log: bool, scratch: &mut Scratch) -> bool {
                filled_rows::softmax(isa(), rows, Formula::new(scale, log), scratch);
                true
            }
            fn softmax_times(
                x: &[Self],
                out: &mut [Self],
                axis: Axis,
                scale: f32,
                upstream: &[f32],
                visit: Option<Visit<'_>>,
            ) {
                let (buffers, formula) = (Buffers::Into { from: x, to: out }, Formula::new(scale, false));
                let visit = visit.map(Mutex::new);
                let visit = visit.as_ref().map(|visit| {
                    |line, state: RowState| hand_over(visit, line, f64::from(state.max), f64::from(state.sum))
                });
                let visit = visit.as_ref().map(|visit| visit as VisitState<'_>);
                let options = Options { formula, upstream: Some(upstream), visit };
                axis_loop::softmax(isa(), buffers, axis, worth(axis), options);
            }
            fn states(x: &[Self], axis: Axis, scale: f32, visit: Visit<'_>) {
                let (visit, formula) = (Mutex::new(visit), Formula::new(scale, false));
                visit_states(isa(), x, axis, formula, &|line, state: RowState| {
                    let max = f64::from(state.max) * f64::from(formula.scale.scale);
                    hand_over(&visit, line, max, f64::from(state.sum));
                });
            }
            fn states_of_panel(x: Panel<'_, Self>, scratch: &mut Scratch, visit: Visit<'_>) -> bool {
                let mut visit = |line, state: RowState| visit(line, f64::from(state.max), f64::from(state.sum));
                axis_loop::states_of_panel(isa(), x, scratch, &mut visit);
                true
            }
            fn backward(y: &[Self], buffers: Buffers<'_, Self>, axis: Axis, scale: f32, log: bool) {
                backward::backward(isa(), y, buffers, axis, scale, log);
            }
        }
    };
}

through_f32!(f32, |x| x, |x| x);
through_f32!(f16, f16::to_f32, f16::from_f32);
through_f32!(bf16, bf16::to_f32, bf16::from_f32);

impl Number for f64 {}
impl sealed::Sealed for f64 {
    type Real = f64;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    fn real(x: f64) -> f64 {
        x
    }
    fn real_to_f64(x: f64) -> f64 {
        x
    }
    fn of_real(x: &[f64]) -> Option<&[Self]> {
        Some(x)
    }
    fn of_real_mut(x: &mut [f64]) -> Option<&mut [Self]> {
        Some(x)
    }
    fn as_real(x: &[Self]) -> Option<&[f64]> {
        Some(x)
    }
    fn as_real_mut(x: &mut [Self]) -> Option<&mut [f64]> {
        Some(x)
    }
    fn widen(from: &[Self], to: &mut [f64]) {
        to.copy_from_slice(from);
    }
    fn widen_visible(from: &[Self], visible: &[u8], to: &mut [f64]) {
        for ((to, x), visible) in to.iter_mut().zip(from).zip(visible) {
            *to = if *visible == 0 { f64::NEG_INFINITY } else { *x };
        }
    }
    fn narrow(from: &[f64], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn softmax(buffers: Buffers<'_, Self>, axis: Axis, scale: f64, log: bool) {
        double::softmax(isa(), buffers, axis, (scale, log), None, None);
    }
    fn softmax_of_made(_: Made<'_, f64>, _: f64, _: bool, _: &mut Scratch) -> bool {
        false
    }
    fn filler() -> Option<Filler<f64, f64>> {
        None
    }
    fn softmax_of_filled(_: FilledRows<'_, f64>, _: f64, _: bool, _: &mut Scratch) -> bool {
        false
    }
    fn softmax_times(x: &[Self], out: &mut [Self], axis: Axis, scale: f64, upstream: &[f64], visit: Option<Visit<'_>>) {
        double::softmax(isa(), Buffers::Into { from: x, to: out }, axis, (scale, false), Some(upstream), visit);
    }
    fn states(x: &[Self], axis: Axis, scale: f64, visit: Visit<'_>) {
        double::states(isa(), x, axis, scale, visit);
    }
    fn states_of_panel(_: Panel<'_, f64>, _: &mut Scratch, _: Visit<'_>) -> bool {
        false
    }
    fn backward(y: &[Self], buffers: Buffers<'_, Self>, axis: Axis, scale: f64, log: bool) {
        double::backward(isa(), y, buffers, axis, scale, log);
    }
}
