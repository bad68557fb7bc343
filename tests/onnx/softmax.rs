//! ONNX's Softmax and LogSoftmax, opset 13 and later, in this crate's words.

use crate::Result;
use crate::vectors::{Case, Computed, Stored, Tensor, Values};
use flashtile::Error;
use flashtile::softmax::{Axis, Number, log_softmax_into, softmax_into};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    axis: isize,
}

impl Default for Attributes {
    fn default() -> Self {
        Attributes { axis: -1 }
    }
}

pub(crate) fn softmax(case: &Case, inputs: &[Option<Tensor>]) -> Result<Vec<Computed>> {
    run(case, inputs, false)
}

pub(crate) fn log_softmax(case: &Case, inputs: &[Option<Tensor>]) -> Result<Vec<Computed>> {
    run(case, inputs, true)
}

fn run(case: &Case, inputs: &[Option<Tensor>], log: bool) -> Result<Vec<Computed>> {
    if case.opset < 13 {
        return Err(format!("opset {} flattens the input to a matrix, which is not handled here", case.opset).into());
    }
    let Attributes { axis } = Attributes::deserialize(&case.attributes)?;
    let [Some(x)] = inputs else {
        return Err(format!("{} inputs were given but there must be one", inputs.len()).into());
    };
    let axis = Axis::new(&x.shape, axis)?;
    let values = match &x.values {
        Values::F32(x) => along(x, axis, log)?,
        Values::F16(x) => along(x, axis, log)?,
        Values::Bf16(x) => along(x, axis, log)?,
        other => return Err(format!("elements of x have type {}, which is not handled here", other.dtype()).into()),
    };
    Ok(vec![Computed { output: 0, how: String::new(), tensor: Tensor { shape: x.shape.clone(), values } }])
}

fn along<T: Number<Real = f32> + Stored>(x: &[T], axis: Axis, log: bool) -> std::result::Result<Values, Error> {
    let mut y = vec![T::default(); x.len()];
    let run = if log { log_softmax_into } else { softmax_into };
    run(x, &mut y, axis, 1.0)?;
    Ok(T::values(y))
}
