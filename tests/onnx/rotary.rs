//! ONNX's RotaryEmbedding, opset 23, in this crate's words: in place, into an output, and while appending to a cache.

use crate::Result;
use crate::vectors::{Case, Computed, Stored, Tensor, Values};
use flashtile::{DType, Element, KvCache, KvFormat, Positions, Rotary, TensorMut, TensorRef, bf16, f16};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Attributes {
    interleaved: i64,
    num_heads: usize,
    rotary_embedding_dim: usize,
}

pub(crate) fn rotary_embedding(case: &Case, inputs: &[Option<Tensor>]) -> Result<Vec<Computed>> {
    let attributes = Attributes::deserialize(&case.attributes)?;
    let ([Some(x), Some(cos), Some(sin)] | [Some(x), Some(cos), Some(sin), None]) = inputs else {
        let [Some(x), Some(cos), Some(sin), Some(ids)] = inputs else {
            return Err(format!("{} inputs were given, or one is missing", inputs.len()).into());
        };
        return with_ids(&attributes, x, [cos, sin], ids.elements::<i64>("position_ids")?);
    };
    // Without position_ids there is a row of the tables for each token.
    let rows: usize = cos.shape.iter().rev().skip(1).product();
    let ids: Vec<i64> = (0..rows as i64).collect();
    with_ids(&attributes, x, [cos, sin], &ids)
}

fn with_ids(attributes: &Attributes, x: &Tensor, tables: [&Tensor; 2], ids: &[i64]) -> Result<Vec<Computed>> {
    match &x.values {
        Values::F32(_) => run::<f32>(attributes, x, tables, ids),
        Values::F16(_) => run::<f16>(attributes, x, tables, ids),
        Values::Bf16(_) => run::<bf16>(attributes, x, tables, ids),
        other => Err(format!("elements of X have type {}, which is not handled here", other.dtype()).into()),
    }
}

fn run<T: Element + Stored>(
    attributes: &Attributes,
    x: &Tensor,
    [cos, sin]: [&Tensor; 2],
    ids: &[i64],
) -> Result<Vec<Computed>> {
    let pairs = *cos.shape.last().ok_or("cos_cache has no axes")?;
    let (cos, sin) = (cos.elements::<T>("cos_cache")?, sin.elements::<T>("sin_cache")?);
    let shape = [cos.len() / pairs, pairs];
    let mut rotary = Rotary::from_tables(TensorRef::from_slice(cos, shape)?, TensorRef::from_slice(sin, shape)?)?;
    if attributes.interleaved != 0 {
        rotary = rotary.interleaved();
    }
    // 3D inputs are [batch, seq, heads * dim].
    let (sizes, axes) = match x.shape[..] {
        [batch, heads, seq, dim] => ([batch, heads, seq, dim], [0, 1, 2, 3]),
        [batch, seq, hidden] => {
            let heads = attributes.num_heads;
            ([batch, seq, heads, hidden / heads.max(1)], [0, 2, 1, 3])
        }
        _ => return Err(format!("the input has shape {:?}", x.shape).into()),
    };
    let dim = if attributes.rotary_embedding_dim == 0 { sizes[3] } else { attributes.rotary_embedding_dim };
    if rotary.dim() != dim {
        return Err(format!("the tables are for {} elements but {dim} are rotated", rotary.dim()).into());
    }
    let elements = x.elements::<T>("X")?;
    let input = TensorRef::from_slice(elements, sizes)?.permuted(axes)?;
    let [batch, heads, seq, head_dim] = input.shape();
    let positions = Positions::each(ids);
    let way = |how: &str, y: Vec<T>| Computed { output: 0, how: how.into(), tensor: Tensor::new(&x.shape, y) };

    let mut into = vec![T::default(); elements.len()];
    rotary.rotate_into(input, positions, TensorMut::from_slice(&mut into, sizes)?.permuted(axes)?)?;
    let mut in_place = elements.to_vec();
    rotary.rotate(TensorMut::from_slice(&mut in_place, sizes)?.permuted(axes)?, positions)?;

    // The keys of a cache are [batch, heads, capacity, dim].
    let mut cache = KvCache::new(KvFormat::new(DType::F32, heads, head_dim), batch, seq)?;
    cache.append_rotated(&rotary, positions, input, input)?;
    let keys = cache.keys().typed::<f32>().ok_or("the cache has another type")?;
    let mut cached = vec![T::default(); elements.len()];
    let [row, head, sequence] = if x.shape.len() == 3 {
        [heads * head_dim, head_dim, seq * heads * head_dim]
    } else {
        [head_dim, seq * head_dim, heads * seq * head_dim]
    };
    for (n, element) in cached.iter_mut().enumerate() {
        let index = [n / sequence, n % sequence / head % heads, n % sequence / row % seq, n % head_dim];
        *element = T::from_f32(keys.get(index).ok_or("the cache is too small")?);
    }
    Ok(vec![way(" (into an output)", into), way(" (in place)", in_place), way(" (in a cache)", cached)])
}
