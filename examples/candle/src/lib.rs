//! flashtile behind candle's own attention calls, and [`smollm2`], a language model that runs on either.
//!
//! [`flash_attn`] and [`flash_attn_varlen_cpu`] have the arguments and results of the functions of these names in
//! `candle_nn::attention`. They read candle's tensors where they lie, whatever their strides, and allocate the result alone.
//! [`attend`] takes any [`Attention`]: sinks, windows, documents and what else flashtile has.

pub mod smollm2;
mod tensors;

use candle_core::{DType, Result, Tensor, WithDType, bail};
use candle_nn::attention::AttnMask;
use flashtile::score::score_fn;
use flashtile::{
    AlibiSlopes, AnyTensorMut, AnyTensorRef, Attention, Element, KeysValues, QueryOffset, TensorRef, Workspace,
};
use half::{bf16, f16};
use std::cell::Cell;
pub use tensors::{View, new_tensor};

/// `candle_nn::attention::flash_attn`, computed by flashtile.
///
/// * `q`: `[batch, seq_q, heads_q, head_dim]` of type `T`, any strides
/// * `k`: `[batch, seq_kv, heads_kv, head_dim]`, of f32, f16 or bf16
/// * `v`: `[batch, seq_kv, heads_kv, value_dim]`, of f32, f16 or bf16
/// * result: `[batch, heads_q, seq_q, value_dim]`; f32 if `batch` is 1, else of type `T`, as candle's
///
/// What candle accepts has candle's meaning:
///
/// | | |
/// |---|---|
/// | `Causal { kv_offset }` | query i sees the keys up to `kv_offset + i`; a single query sees all keys |
/// | `Mask(m)` | m is added to the scores; it is broadcast to `[batch, heads_q, seq_q, seq_kv]` |
/// | `max_bias` with `Causal`, or with `None` and `batch > 1` | ALiBi, the last query at the last key |
/// | `max_bias` with `Mask(m)` | m is multiplied by the head's slope first |
/// | `max_bias` with `None` and `batch == 1` | nothing |
///
/// candle refuses batches with softcap, masks or bf16. Here they work.
///
/// # Errors
/// Tensors that don't fit together, and keys and values with different numbers of heads. A causal batch whose `kv_offset` does
/// not put its last query at the last key is refused: candle ignores the offset there.
pub fn flash_attn<T: WithDType>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> Result<Tensor> {
    if q.dtype() != T::DTYPE {
        bail!("the queries are {:?}, but the call is for {:?}", q.dtype(), T::DTYPE);
    }
    let (batch, seq_q, heads_q, _) = q.dims4()?;
    let slopes = max_bias.filter(|&bias| bias > 0.0).map(|bias| candle_slopes(heads_q, bias));
    let slopes = slopes.as_deref();
    let mut attention = Attention::new().scale(softmax_scale);
    if let Some(cap) = softcap.filter(|&cap| cap != 0.0) {
        attention = attention.softcap(cap);
    }
    let result = if batch == 1 { DType::F32 } else { q.dtype() };
    match attn_mask {
        AttnMask::None => {
            let attention = with_alibi(attention, slopes.filter(|_| batch > 1));
            attend_as(&attention, [q, k, v], result)
        }
        AttnMask::Causal { kv_offset } => {
            let attention = attention.causal().query_offset(query_offset(kv_offset, batch, seq_q, k.dim(1)?)?);
            attend_as(&with_alibi(attention, slopes), [q, k, v], result)
        }
        AttnMask::Mask(mask) => {
            let mask = mask.broadcast_as((batch, heads_q, seq_q, k.dim(1)?))?; // a view
            match mask.dtype() {
                DType::F32 => attend_masked::<f32>(attention, [q, k, v], &mask, slopes, result),
                DType::F16 => attend_masked::<f16>(attention, [q, k, v], &mask, slopes, result),
                DType::BF16 => attend_masked::<bf16>(attention, [q, k, v], &mask, slopes, result),
                other => bail!("a mask is added to the scores: it is f32, f16 or bf16, not {other:?}"),
            }
        }
    }
}

/// The position of causal queries, as [`flash_attn`] says.
fn query_offset(kv_offset: usize, batch: usize, seq_q: usize, seq_kv: usize) -> Result<QueryOffset<'static>> {
    if seq_q == 1 {
        return Ok(QueryOffset::FromEnd);
    }
    if batch > 1 && kv_offset.checked_add(seq_q) != Some(seq_kv) {
        bail!("kv_offset {kv_offset} does not put the last of {seq_q} queries at the last of {seq_kv} keys");
    }
    Ok(QueryOffset::At(kv_offset.min(isize::MAX as usize) as isize))
}

fn with_alibi<'a>(attention: Attention<'a>, slopes: Option<&'a [f32]>) -> Attention<'a> {
    match slopes {
        Some(slopes) => attention.alibi(AlibiSlopes::PerHead(slopes)),
        None => attention,
    }
}

/// Attention with `mask` added to the scores, multiplied by the slope of the head if there are slopes.
fn attend_masked<E: Element + WithDType>(
    attention: Attention<'_>,
    qkv: [&Tensor; 3],
    mask: &Tensor,
    slopes: Option<&[f32]>,
    result: DType,
) -> Result<Tensor> {
    let mask = View::of(mask);
    let mask: TensorRef<'_, E, 4> = mask.typed()?;
    let Some(slopes) = slopes else { return attend_as(&attention.bias(mask), qkv, result) };
    let sloped = score_fn(|score, pair| {
        let index = [pair.batch(), pair.head(), pair.query(), pair.key()];
        score + slopes[pair.head()] * mask.get(index).map_or(0.0, Element::to_f32)
    });
    attend_as(&attention.modified_by(&sloped), qkv, result)
}

/// ALiBi's slopes as candle has them: for `heads` that are no power of two they differ from the published ones.
fn candle_slopes(heads: usize, max_bias: f32) -> Vec<f32> {
    let power = heads.next_power_of_two();
    (0..heads).map(|head| 2.0f32.powf(-max_bias * (head + 1) as f32 / power as f32)).collect()
}

/// Any attention of flashtile, in the layout of [`flash_attn`]: `[batch, seq, heads, dim]` in,
/// `[batch, heads_q, seq_q, value_dim]` of the queries' type out.
///
/// # Errors
/// Those of [`Attention::compute`].
pub fn attend(attention: &Attention<'_>, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    attend_as(attention, [q, k, v], q.dtype())
}

fn attend_as(attention: &Attention<'_>, [q, k, v]: [&Tensor; 3], result: DType) -> Result<Tensor> {
    let shape = [q.dim(0)?, q.dim(2)?, q.dim(1)?, v.dim(3)?];
    let [q, k, v] = &[q, k, v].map(View::of);
    let keys_values = (k.heads_first()?, v.heads_first()?);
    compute(attention, q.heads_first()?, keys_values, &shape, result)
}

/// `candle_nn::attention::flash_attn_varlen_cpu`, computed by flashtile: packed sequences of any lengths.
///
/// * `q`: `[total_q, heads_q, head_dim]`, any strides
/// * `k`: `[total_k, heads_kv, head_dim]`, `v`: `[total_k, heads_kv, value_dim]`
/// * `alibi_slopes`: `[heads_q]`, f32
/// * `seqlens_q`, `seqlens_k`: `[batch]`, u32: the queries and keys of each sequence, lengths and not their sums
/// * result: `[total_q, heads_q, value_dim]` of the queries' type
///
/// The last query of a sequence is at its last key. As with candle, a window with a left side alone hides the keys after the
/// query. The longest lengths are found, so `_max_seqlen_q` and `_max_seqlen_k` are not read.
///
/// candle refuses bf16, mixed types and causal sequences with fewer keys than queries, and returns zeros for a window with a
/// right side alone. Here they work.
///
/// # Errors
/// Tensors that don't fit together; lengths that don't add up to the rows of `q` and `k`.
#[allow(clippy::too_many_arguments)] // the signature is candle's
pub fn flash_attn_varlen_cpu(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
    window_left: Option<usize>,
    window_right: Option<usize>,
) -> Result<Tensor> {
    let starts_q = starts("queries", seqlens_q, q.dim(0)?)?;
    let starts_k = starts("keys", seqlens_k, k.dim(0)?)?;
    let slopes = alibi_slopes.map(Tensor::to_vec1::<f32>).transpose()?;
    let right = window_right.or(window_left.map(|_| 0));
    let mut attention = Attention::new().scale(softmax_scale).query_starts(&starts_q).window(window_left, right);
    if causal {
        attention = attention.causal();
    }
    let attention = with_alibi(attention, slopes.as_deref());
    let (shape, result) = ([q.dim(0)?, q.dim(1)?, v.dim(2)?], q.dtype());
    let [q, k, v] = &[q, k, v].map(View::of);
    compute(&attention, q.any()?, KeysValues::packed(k.any()?, v.any()?, &starts_k), &shape, result)
}

/// The first row of each sequence, and the end of the last one.
fn starts(what: &str, lengths: &Tensor, rows: usize) -> Result<Vec<usize>> {
    let mut starts = vec![0];
    for length in lengths.to_vec1::<u32>()? {
        starts.push(starts[starts.len() - 1] + length as usize);
    }
    let total = starts[starts.len() - 1];
    if total != rows {
        bail!("the lengths of the {what} add up to {total}, but there are {rows}");
    }
    Ok(starts)
}

/// Computes into a new tensor of this shape and type.
fn compute<'t>(
    attention: &Attention<'_>,
    q: AnyTensorRef<'t>,
    keys_values: impl Into<KeysValues<'t>>,
    shape: &[usize],
    result: DType,
) -> Result<Tensor> {
    let keys_values = keys_values.into();
    let write = |out: AnyTensorMut<'_>| {
        // Taken and put back: while a call waits for others of its pool, its thread may begin another call.
        let mut workspace = WORKSPACE.take();
        let result = attention.compute(q, keys_values, out, None, &mut workspace);
        WORKSPACE.set(workspace);
        result
    };
    match result {
        DType::F32 => new_tensor::<f32>(shape, write),
        DType::F16 => new_tensor::<f16>(shape, write),
        DType::BF16 => new_tensor::<bf16>(shape, write),
        other => bail!("flashtile computes with f32, f16 and bf16, not with {other:?}"),
    }
}

thread_local! {
    /// Scratch memory, kept from call to call.
    static WORKSPACE: Cell<Workspace> = Cell::default();
}
