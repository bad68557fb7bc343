//! A matrix of scores, by candle's operations: keys and values are repeated for each query head.

use super::{Attend, Rotation};
use crate::smollm2::model::Sizes;
use candle_core::{D, Device, Result, Tensor};
use candle_nn::kv_cache::KvCache;
use candle_nn::ops::softmax_last_dim;

/// Attention by its definition, and the keys and values of all layers, `[1, heads_kv, tokens, head_dim]`.
pub struct Naive {
    layers: Vec<KvCache>,
    repeats: usize,
    scale: f64,
    /// Of this step: 0 where a query sees a key, else -inf. None is for a single query.
    mask: Option<Tensor>,
}

impl Naive {
    /// No tokens, with room for `capacity`.
    pub fn new(sizes: &Sizes, capacity: usize) -> Self {
        let layers = (0..sizes.layers).map(|_| KvCache::new(2, capacity)).collect();
        Naive {
            layers,
            repeats: sizes.heads_q / sizes.heads_kv,
            scale: 1.0 / (sizes.head_dim as f64).sqrt(),
            mask: None,
        }
    }
}

impl Attend for Naive {
    fn begin(&mut self, tokens: usize) -> Result<()> {
        let before = self.layers[0].current_seq_len();
        self.mask = if tokens == 1 { None } else { Some(causal(tokens, before)?) };
        Ok(())
    }

    fn attend(&mut self, layer: usize, rotation: Rotation<'_>, q: Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
        rotation.apply(&q)?;
        rotation.apply(&k)?;
        let heads_first = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let (k, v) = self.layers[layer].append(&heads_first(&k)?, &heads_first(&v)?)?;
        let (k, v) = (repeat(&k, self.repeats)?, repeat(&v, self.repeats)?);
        let mut scores = (heads_first(&q)?.matmul(&k.transpose(2, 3)?)? * self.scale)?;
        if let Some(mask) = &self.mask {
            scores = scores.broadcast_add(mask)?;
        }
        softmax_last_dim(&scores)?.matmul(&v)?.transpose(1, 2)?.flatten_from(D::Minus2)
    }
}

/// Each head `repeats` times.
fn repeat(x: &Tensor, repeats: usize) -> Result<Tensor> {
    let (batch, heads, seq, dim) = x.dims4()?;
    x.unsqueeze(2)?.expand((batch, heads, repeats, seq, dim))?.reshape((batch, heads * repeats, seq, dim))
}

/// The mask of `tokens` queries after `before` keys, `[tokens, before + tokens]`.
fn causal(tokens: usize, before: usize) -> Result<Tensor> {
    let all = before + tokens;
    let row = |i: usize| (0..all).map(move |j| if j <= before + i { 0.0 } else { f32::NEG_INFINITY });
    Tensor::from_vec((0..tokens).flat_map(row).collect(), (tokens, all), &Device::Cpu)
}
