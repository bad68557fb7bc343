//! ONNX's Attention in this crate's words, on every level and in both forms.

use crate::Result;
use crate::vectors::{Case, Computed, Stored, Tensor, Values};
use flashtile::{Attention, Element, Form, Level, QueryOffset, ScoreStage, TensorMut, TensorRef, bf16, f16};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    is_causal: i64,
    kv_num_heads: Option<usize>,
    left_window_size: Option<i64>,
    q_num_heads: Option<usize>,
    qk_matmul_output_mode: i64,
    right_window_size: Option<i64>,
    scale: Option<f32>,
    softcap: f32,
    softmax_precision: Option<i64>,
}

/// The inputs in ONNX's order.
struct Inputs<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    attn_mask: Option<&'a Tensor>,
    past_key: Option<&'a Tensor>,
    past_value: Option<&'a Tensor>,
    nonpad_kv_seqlen: Option<&'a Tensor>,
}

pub(crate) fn attention(case: &Case, inputs: &[Option<Tensor>]) -> Result<Vec<Computed>> {
    let attributes = Attributes::deserialize(&case.attributes)?;
    if inputs.len() > 7 {
        return Err(format!("{} inputs were given but there are 7 at most", inputs.len()).into());
    }
    let optional = |n: usize| inputs.get(n).and_then(Option::as_ref);
    let required = |n: usize, name| optional(n).ok_or_else(|| format!("input {name} is missing"));
    let inputs = Inputs {
        q: required(0, "Q")?,
        k: required(1, "K")?,
        v: required(2, "V")?,
        attn_mask: optional(3),
        past_key: optional(4),
        past_value: optional(5),
        nonpad_kv_seqlen: optional(6),
    };
    // Q, K and what comes of them have one type, V and what comes of it another, or the same.
    match &inputs.q.values {
        Values::F32(_) => with_values::<f32>(&attributes, &inputs),
        Values::F16(_) => with_values::<f16>(&attributes, &inputs),
        Values::Bf16(_) => with_values::<bf16>(&attributes, &inputs),
        other => Err(format!("elements of Q have type {}, which is not handled here", other.dtype()).into()),
    }
}

fn with_values<T: Element + Stored>(attributes: &Attributes, inputs: &Inputs<'_>) -> Result<Vec<Computed>> {
    match &inputs.v.values {
        Values::F32(_) => run::<T, f32>(attributes, inputs),
        Values::F16(_) => run::<T, f16>(attributes, inputs),
        Values::Bf16(_) => run::<T, bf16>(attributes, inputs),
        other => Err(format!("elements of V have type {}, which is not handled here", other.dtype()).into()),
    }
}

fn run<T: Element + Stored, U: Element + Stored>(
    attributes: &Attributes,
    inputs: &Inputs<'_>,
) -> Result<Vec<Computed>> {
    let q = heads::<T>("Q", inputs.q, attributes.q_num_heads)?;
    let k = heads::<T>("K", inputs.k, attributes.kv_num_heads)?;
    let v = heads::<U>("V", inputs.v, attributes.kv_num_heads)?;
    let present_key = join("past_key", inputs.past_key, k)?;
    let present_value = join("past_value", inputs.past_value, v)?;
    // Without a past, the keys and values go in as they lie in memory.
    let k = if inputs.past_key.is_some() { heads("present_key", &present_key, None)? } else { k };
    let v = if inputs.past_value.is_some() { heads("present_value", &present_value, None)? } else { v };
    let ([batch, heads_q, seq_q, _], [_, _, seq_kv, _], [.., value_dim]) = (q.shape(), k.shape(), v.shape());
    let (y_shape, scores_shape) = ([batch, heads_q, seq_q, value_dim], [batch, heads_q, seq_q, seq_kv]);

    let key_lengths = inputs.nonpad_kv_seqlen.map(key_lengths).transpose()?;
    let attn_mask = inputs.attn_mask.map(|mask| fill_up(mask, seq_kv)).transpose()?;
    let attention = describe(attributes, inputs.past_key, key_lengths.as_deref(), attn_mask.as_ref())?;
    let stage = score_stage(attributes.qk_matmul_output_mode)?;

    let mut computed = Vec::new();
    for level in Level::available() {
        let attention = attention.clone().level(level);
        for form in [Form::Decode, Form::Prefill] {
            let mut y = vec![T::default(); y_shape.iter().product()];
            // 3D inputs have a 3D output, [batch, seq, heads * dim].
            let (out, shape) = if inputs.q.shape.len() == 3 {
                let out = TensorMut::from_slice(&mut y, [batch, seq_q, heads_q, value_dim])?.permuted([0, 2, 1, 3])?;
                (out, vec![batch, seq_q, heads_q * value_dim])
            } else {
                (TensorMut::from_slice(&mut y, y_shape)?, y_shape.to_vec())
            };
            attention.clone().form(form).run_into(q, k, v, out)?;
            computed.push(Computed { output: 0, how: format!(" ({level}, {form:?})"), tensor: Tensor::new(&shape, y) });
        }
        let mut scores = vec![0.0; scores_shape.iter().product()];
        attention.scores_into(stage, q, k, TensorMut::from_slice(&mut scores, scores_shape)?)?;
        let scores: Vec<T> = scores.into_iter().map(T::from_f32).collect();
        computed.push(Computed { output: 3, how: format!(" ({level})"), tensor: Tensor::new(&scores_shape, scores) });
    }
    computed.push(Computed { output: 1, how: String::new(), tensor: present_key });
    computed.push(Computed { output: 2, how: String::new(), tensor: present_value });
    Ok(computed)
}

/// The attributes, the past, the key lengths and the mask in this crate's words.
fn describe<'a>(
    attributes: &Attributes,
    past_key: Option<&Tensor>,
    key_lengths: Option<&'a [usize]>,
    attn_mask: Option<&'a Tensor>,
) -> Result<Attention<'a>> {
    let query_offset = match (past_key, key_lengths) {
        (None, None) => QueryOffset::FromStart,
        (None, Some(_)) => QueryOffset::FromEnd,
        (Some(past), None) => QueryOffset::At(past.shape[2].try_into()?),
        (Some(_), Some(_)) => return Err("past_key and nonpad_kv_seqlen exclude each other".into()),
    };
    let (left, right) = (window(attributes.left_window_size)?, window(attributes.right_window_size)?);
    let mut attention = Attention::new().query_offset(query_offset).window(left, right);
    match attributes.is_causal {
        0 => {}
        1 => attention = attention.causal(),
        other => return Err(format!("is_causal is {other} but must be 0 or 1").into()),
    }
    if let Some(scale) = attributes.scale {
        attention = attention.scale(scale);
    }
    if attributes.softcap != 0.0 {
        attention = attention.softcap(attributes.softcap);
    }
    // ONNX chooses the type of the softmax, from f16 to f64; ours is f32, and the tolerances judge it.
    if !matches!(attributes.softmax_precision, None | Some(FLOAT | FLOAT16 | DOUBLE | BFLOAT16)) {
        return Err(format!("softmax_precision is {:?}, no floating-point type", attributes.softmax_precision).into());
    }
    if let Some(lengths) = key_lengths {
        attention = attention.key_lengths(lengths);
    }
    let Some(mask) = attn_mask else { return Ok(attention) };
    let shape = rank_4(&mask.shape)?;
    Ok(match &mask.values {
        Values::Bool(attend) => attention.mask(TensorRef::from_slice(attend, shape)?),
        Values::F32(bias) => attention.bias(TensorRef::from_slice(bias, shape)?),
        Values::F16(bias) => attention.bias(TensorRef::from_slice(bias, shape)?),
        Values::Bf16(bias) => attention.bias(TensorRef::from_slice(bias, shape)?),
        Values::I64(_) | Values::F64(_) => return Err("attn_mask of this type is not handled here".into()),
    })
}

fn score_stage(qk_matmul_output_mode: i64) -> Result<ScoreStage> {
    Ok(match qk_matmul_output_mode {
        0 => ScoreStage::Raw,
        1 => ScoreStage::Capped,
        2 => ScoreStage::Biased,
        3 => ScoreStage::Probabilities,
        other => return Err(format!("qk_matmul_output_mode is {other} but must be 0 to 3").into()),
    })
}

// Numbers of ONNX's TensorProto.DataType.
const FLOAT: i64 = 1;
const FLOAT16: i64 = 10;
const DOUBLE: i64 = 11;
const BFLOAT16: i64 = 16;

/// `[batch, heads, seq, dim]` of a tensor of that shape, or of `[batch, seq, heads * dim]`.
fn heads<'a, T: Stored>(name: &str, tensor: &'a Tensor, heads: Option<usize>) -> Result<TensorRef<'a, T>> {
    let elements = tensor.elements(name)?;
    match (&tensor.shape[..], heads) {
        (&[batch, heads, seq, dim], given) if given.is_none_or(|given| given == heads) => {
            Ok(TensorRef::from_slice(elements, [batch, heads, seq, dim])?)
        }
        (&[batch, seq, width], Some(heads)) if heads > 0 && width % heads == 0 => {
            Ok(TensorRef::from_slice(elements, [batch, seq, heads, width / heads])?.permuted([0, 2, 1, 3])?)
        }
        (shape, heads) => Err(format!("{name} has shape {shape:?}, and the number of heads is {heads:?}").into()),
    }
}

/// The rows of `past`, if any, followed by those of `new`, for each batch and head.
fn join<T: Stored>(name: &str, past: Option<&Tensor>, new: TensorRef<'_, T>) -> Result<Tensor> {
    let [batch, heads_kv, seq, dim] = new.shape();
    let past = past.map(|past| heads::<T>(name, past, None)).transpose()?;
    let seq_past = past.map_or(0, |past| past.shape()[2]);
    if past.is_some_and(|past| past.shape() != [batch, heads_kv, seq_past, dim]) {
        return Err(format!("{name} has shape {:?} but goes before {:?}", past.map(|p| p.shape()), new.shape()).into());
    }
    let mut values = Vec::new();
    for (b, h) in (0..batch).flat_map(|b| (0..heads_kv).map(move |h| (b, h))) {
        for (part, rows) in past.into_iter().map(|past| (past, seq_past)).chain([(new, seq)]) {
            values.extend((0..rows * dim).filter_map(|n| part.get([b, h, n / dim, n % dim])));
        }
    }
    Ok(Tensor::new(&[batch, heads_kv, seq_past + seq, dim], values))
}

/// The mask with `columns` columns: those that it lacks are hidden.
fn fill_up(mask: &Tensor, columns: usize) -> Result<Tensor> {
    fn rows<T: Copy>(values: &[T], has: usize, rows: usize, columns: usize, hidden: T) -> Vec<T> {
        let row = |n: usize| values[n * has..][..has].iter().copied();
        (0..rows).flat_map(|n| row(n).chain(std::iter::repeat_n(hidden, columns - has))).collect()
    }
    let (&has, before) = mask.shape.split_last().ok_or("attn_mask has no axes")?;
    let columns = columns.max(has);
    let count = before.iter().product();
    let values = match &mask.values {
        Values::Bool(values) => Values::Bool(rows(values, has, count, columns, false)),
        Values::F32(values) => Values::F32(rows(values, has, count, columns, f32::NEG_INFINITY)),
        Values::F16(values) => Values::F16(rows(values, has, count, columns, f16::NEG_INFINITY)),
        Values::Bf16(values) => Values::Bf16(rows(values, has, count, columns, bf16::NEG_INFINITY)),
        Values::I64(_) | Values::F64(_) => return Err("attn_mask of this type is not handled here".into()),
    };
    Ok(Tensor { shape: [before, &[columns]].concat(), values })
}

/// A shape of at most four axes, preceded by ones.
fn rank_4(shape: &[usize]) -> Result<[usize; 4]> {
    let missing = 4usize.checked_sub(shape.len()).ok_or_else(|| format!("attn_mask has {} axes", shape.len()))?;
    let mut full = [1; 4];
    full[missing..].copy_from_slice(shape);
    Ok(full)
}

fn key_lengths(nonpad_kv_seqlen: &Tensor) -> Result<Vec<usize>> {
    let lengths = nonpad_kv_seqlen.elements::<i64>("nonpad_kv_seqlen")?;
    Ok(lengths.iter().map(|&length| usize::try_from(length)).collect::<std::result::Result<_, _>>()?)
}

/// A window's size on one side, -1 (the default) for no bound.
fn window(size: Option<i64>) -> Result<Option<usize>> {
    match size {
        None | Some(-1) => Ok(None),
        Some(size) => Ok(Some(size.try_into().map_err(|_| format!("a window of {size}"))?)),
    }
}
