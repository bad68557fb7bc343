//! candle's own `flash_attn` over candle's cache.

use super::{Attend, Rotation};
use crate::smollm2::model::Sizes;
use candle_core::{Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::kv_cache::KvCache;

/// candle's attention, and the keys and values of all layers, `[1, tokens, heads_kv, head_dim]`.
pub struct Fused {
    layers: Vec<KvCache>,
    scale: f32,
}

impl Fused {
    /// No tokens, with room for `capacity`.
    pub fn new(sizes: &Sizes, capacity: usize) -> Self {
        let layers = (0..sizes.layers).map(|_| KvCache::new(1, capacity)).collect();
        Fused { layers, scale: 1.0 / (sizes.head_dim as f32).sqrt() }
    }
}

impl Attend for Fused {
    fn begin(&mut self, _tokens: usize) -> Result<()> {
        Ok(())
    }

    fn attend(&mut self, layer: usize, rotation: Rotation<'_>, q: Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
        rotation.apply(&q)?;
        rotation.apply(&k)?;
        let (k, v) = self.layers[layer].append(&k, &v)?;
        let mask = AttnMask::causal_with_offset(rotation.position);
        let out = flash_attn::<f32>(&q, &k, &v, self.scale, mask, None, None)?;
        out.transpose(1, 2)?.flatten_from(2)
    }
}
