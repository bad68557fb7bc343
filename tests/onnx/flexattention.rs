//! ONNX's preview operator FlexAttention in this crate's words, on every level and in both forms.
//!
//! In ONNX a score modification is a graph; here each is written as a function, by the case's name.

use crate::vectors::{Case, Computed, Stored, Tensor, Values};
use crate::{Result, Unsupported};
use flashtile::score::{ScoreMod, score_fn};
use flashtile::{Attention, Element, Form, Level, QueryOffset, TensorMut, TensorRef, Workspace, f16};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    scale: Option<f32>,
    score_mod: Option<Graph>,
    prob_mod: Option<Graph>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Graph {
    /// The function in words, which a reader compares with that of [`score_mod`].
    #[serde(rename = "nodes")]
    _nodes: Vec<String>,
    #[serde(rename = "constants")]
    _constants: serde_json::Value,
}

pub(crate) fn flex_attention(case: &Case, inputs: &[Option<Tensor>]) -> Result<Vec<Computed>> {
    let attributes = Attributes::deserialize(&case.attributes)?;
    if attributes.prob_mod.is_some() {
        return Err(Unsupported("probabilities can't be changed: tiles have them before they are divided").into());
    }
    let [Some(q), Some(k), Some(v)] = inputs else { return Err("Q, K or V is missing".into()) };
    let score_mod = attributes.score_mod.map(|_| score_mod(&case.name)).transpose()?;
    let options = |level, form| {
        let mut options = Attention::new().query_offset(QueryOffset::FromStart).level(level).form(form);
        if let Some(scale) = attributes.scale {
            options = options.scale(scale);
        }
        match &score_mod {
            Some(score_mod) => options.modified_by(&**score_mod),
            None => options,
        }
    };
    let mut computed = Vec::new();
    for level in Level::available() {
        for form in [Form::Prefill, Form::Decode] {
            let tensor = match &q.values {
                Values::F32(_) => run::<f32>(&options(level, form), [q, k, v])?,
                Values::F16(_) => run::<f16>(&options(level, form), [q, k, v])?,
                Values::F64(_) => return Err(Unsupported("attention has no f64: scores are f32").into()),
                other => {
                    return Err(format!("elements of Q have type {}, which is not handled here", other.dtype()).into());
                }
            };
            computed.push(Computed { output: 0, how: format!(" ({level}, {form})"), tensor });
        }
    }
    Ok(computed)
}

/// The score modification of a case.
fn score_mod(name: &str) -> Result<Box<dyn ScoreMod>> {
    Ok(match name {
        "test_flexattention_score_mod" => Box::new(score_fn(|score, _| score + 0.5)),
        "test_flexattention_soft_cap" => Box::new(score_fn(|score, _| 20.0 * (score / 20.0).tanh())),
        "test_flexattention_relative_positional" => Box::new(score_fn(|score, pair| score + pair.distance() as f32)),
        "test_flexattention_causal_mask" => {
            Box::new(score_fn(|score, pair| if pair.query() >= pair.key() { score } else { f32::NEG_INFINITY }))
        }
        _ => return Err("its score_mod is not written here".into()),
    })
}

fn run<T: Element + Stored>(options: &Attention<'_>, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let shape =
        |tensor: &Tensor| <[usize; 4]>::try_from(tensor.shape.clone()).map_err(|shape| format!("a shape of {shape:?}"));
    let ([batch, heads, seq_q, _], [.., value_dim]) = (shape(q)?, shape(v)?);
    let out_shape = [batch, heads, seq_q, value_dim];
    let mut out = vec![T::from_f32(f32::NAN); out_shape.iter().product()];
    options.compute(
        TensorRef::from_slice(q.elements::<T>("Q")?, shape(q)?)?,
        (
            TensorRef::from_slice(k.elements::<T>("K")?, shape(k)?)?,
            TensorRef::from_slice(v.elements::<T>("V")?, shape(v)?)?,
        ),
        TensorMut::from_slice(&mut out, out_shape)?,
        None,
        &mut Workspace::new(),
    )?;
    Ok(Tensor::new(&out_shape, out))
}
