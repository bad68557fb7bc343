//! The loops of each element type: vectors of f32 for f32, f16 and bf16, plain loops for f64.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::axis_loop::{Softmax, VisitStates};
use super::backward::Backward;
use super::buffers::Buffers;
use super::chosen_level::isa;
use super::number::Number;
use super::row_state::RowState;
use super::scale::Formula;
use super::sealed::Visit;
use super::{double, sealed};
use crate::element::{bf16, f16};

macro_rules! through_f32 {
    ($t:ty, $to:expr, $from:expr) => {
        impl Number for $t {}
        impl sealed::Sealed for $t {
            type Real = f32;
            fn to_f64(self) -> f64 {
                f64::from($to(self))
            }
            fn from_f64(x: f64) -> Self {
                $from(x as f32)
            }
            fn real(x: f64) -> f32 {
                x as f32
            }
            fn real_to_f64(x: f32) -> f64 {
                f64::from(x)
            }
            fn softmax(buffers: Buffers<'_, Self>, axis: Axis, scale: f32, log: bool) {
                if axis.elements() > 0 {
                    let formula = Formula::new(scale, log);
                    isa().run(Softmax { buffers, axis, formula, upstream: None, visit: None });
                }
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
                let mut visit = visit
                    .map(|visit| move |line, state: RowState| visit(line, f64::from(state.max), f64::from(state.sum)));
                let visit = visit.as_mut().map(|visit| visit as &mut dyn FnMut(usize, RowState));
                isa().run(Softmax { buffers, axis, formula, upstream: Some(upstream), visit });
            }
            fn states(x: &[Self], axis: Axis, scale: f32, visit: Visit<'_>) {
                let formula = Formula::new(scale, false);
                let visit = &mut |line, state: RowState| {
                    visit(line, f64::from(state.max) * f64::from(formula.scale.scale), f64::from(state.sum));
                };
                isa().run(VisitStates { x, axis, formula, visit });
            }
            fn backward(y: &[Self], buffers: Buffers<'_, Self>, axis: Axis, scale: f32, log: bool) {
                if axis.elements() == 0 {
                    // The number of empty lines can be up to `usize::MAX`: too many to visit.
                } else if log {
                    isa().run(Backward::<_, true> { y, buffers, axis, scale });
                } else {
                    isa().run(Backward::<_, false> { y, buffers, axis, scale });
                }
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
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(x: f64) -> Self {
        x
    }
    fn real(x: f64) -> f64 {
        x
    }
    fn real_to_f64(x: f64) -> f64 {
        x
    }
    fn softmax(buffers: Buffers<'_, Self>, axis: Axis, scale: f64, log: bool) {
        double::softmax(buffers, axis, scale, log, |_| 1.0, None);
    }
    fn softmax_times(x: &[Self], out: &mut [Self], axis: Axis, scale: f64, upstream: &[f64], visit: Option<Visit<'_>>) {
        double::softmax(Buffers::Into { from: x, to: out }, axis, scale, false, |line| upstream[line], visit);
    }
    fn states(x: &[Self], axis: Axis, scale: f64, visit: Visit<'_>) {
        double::states(x, axis, scale, visit);
    }
    fn backward(y: &[Self], buffers: Buffers<'_, Self>, axis: Axis, scale: f64, log: bool) {
        double::backward(y, buffers, axis, scale, log);
    }
}
