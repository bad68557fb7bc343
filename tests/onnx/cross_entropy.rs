//! ONNX's SoftmaxCrossEntropyLoss in this crate's words.

use crate::Result;
use crate::vectors::{Case, Computed, Tensor};
use flashtile::softmax::{Axis, CrossEntropy, Reduction, log_softmax_into};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    ignore_index: Option<i64>,
    reduction: Option<String>,
}

pub(crate) fn softmax_cross_entropy_loss(case: &Case, inputs: &[Option<Tensor>]) -> Result<Vec<Computed>> {
    let attributes = Attributes::deserialize(&case.attributes)?;
    let [Some(x), Some(targets), rest @ ..] = inputs else { return Err("logits or labels are missing".into()) };
    let (logits, axis) = (x.elements::<f32>("logits")?, Axis::new(&x.shape, 1)?);
    let mut options = CrossEntropy::new();
    if let Some(ignored) = attributes.ignore_index {
        options = options.ignore_index(ignored);
    }
    if let [Some(weights)] = rest {
        options = options.class_weights(weights.elements::<f32>("weights")?);
    }
    let mut shape = Vec::new();
    let reduction = match attributes.reduction.as_deref() {
        None | Some("mean") => Reduction::Mean,
        Some("sum") => Reduction::Sum,
        Some("none") => {
            shape.clone_from(&targets.shape);
            Reduction::None
        }
        Some(other) => return Err(format!("there is no reduction {other}").into()),
    };
    let mut loss = vec![0.0f32; shape.iter().product()];
    options.reduction(reduction).loss_into(logits, targets.elements::<i64>("labels")?, axis, &mut loss)?;
    let mut logs = vec![0.0f32; logits.len()];
    log_softmax_into(logits, &mut logs, axis, 1.0)?;
    let outputs = [Tensor::new(&shape, loss), Tensor::new(&x.shape, logs)];
    let computed = |(output, tensor)| Computed { output, how: String::new(), tensor };
    Ok(outputs.into_iter().enumerate().map(computed).collect())
}
