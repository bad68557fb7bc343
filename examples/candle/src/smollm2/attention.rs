//! What the model asks of an attention, and the choice between three.

mod fused;
mod naive;
mod tiled;

pub use fused::Fused;
pub use naive::Naive;
pub use tiled::Tiled;

use super::model::Sizes;
use crate::View;
use candle_core::{CpuStorage, Error, InplaceOp1, Layout, Result, Tensor, bail};
use flashtile::{AnyTensorMut, DType, Element, Positions, Rotary, TensorMut};

/// The attention of all layers, with the keys and values of the tokens so far.
pub trait Attend {
    /// Makes room for `tokens` more tokens in every layer.
    fn begin(&mut self, tokens: usize) -> Result<()>;

    /// Adds the keys and values of new tokens to a layer, and computes the layer's attention.
    ///
    /// * `q`: `[1, tokens, heads_q, head_dim]`, contiguous, not rotated
    /// * `k`, `v`: `[1, tokens, heads_kv, head_dim]`, contiguous, not rotated
    /// * result: `[1, tokens, heads_q * head_dim]`
    fn attend(&mut self, layer: usize, rotation: Rotation<'_>, q: Tensor, k: Tensor, v: Tensor) -> Result<Tensor>;

    /// The most tokens that one step may add.
    fn most_tokens(&self) -> usize {
        usize::MAX
    }
}

/// The attention to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// This crate's.
    Flashtile,
    /// candle's own `flash_attn`.
    Candle,
    /// A matrix of scores, by candle's operations.
    Naive,
}

/// The cache of flashtile's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheKind {
    /// A row for each token.
    Contiguous,
    /// Pages of 16 tokens, from one pool for all layers.
    Paged,
    /// The first 4 tokens, and the last ones that the window needs.
    Rotating,
}

/// The type that flashtile's caches store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheType {
    F32,
    F16,
    Bf16,
}

/// An attention and its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub attention: Kind,
    pub cache: CacheKind,
    pub cache_type: CacheType,
    /// The tokens that a query sees, with its own; the first 4 are seen in addition. None is all.
    pub window: Option<usize>,
}

impl Choice {
    /// An attention over a cache of f32 with a row for each token.
    pub fn plain(attention: Kind) -> Self {
        Choice { attention, cache: CacheKind::Contiguous, cache_type: CacheType::F32, window: None }
    }

    /// The attention, without tokens, with room for `capacity`.
    pub fn build(&self, sizes: &Sizes, capacity: usize) -> Result<Box<dyn Attend>> {
        if self.attention != Kind::Flashtile && *self != Self::plain(self.attention) {
            bail!("other caches, types and windows are for --attention flashtile");
        }
        Ok(match self.attention {
            Kind::Flashtile => Box::new(Tiled::new(self, sizes, capacity)?),
            Kind::Candle => Box::new(Fused::new(sizes, capacity)),
            Kind::Naive => Box::new(Naive::new(sizes, capacity)),
        })
    }
}

impl From<CacheType> for DType {
    fn from(kind: CacheType) -> Self {
        match kind {
            CacheType::F32 => DType::F32,
            CacheType::F16 => DType::F16,
            CacheType::Bf16 => DType::Bf16,
        }
    }
}

/// The rotation of tokens whose first one is at `position`. It is an operation of candle's that works in place.
#[derive(Clone, Copy)]
pub struct Rotation<'a> {
    pub rotary: &'a Rotary,
    pub position: usize,
}

impl Rotation<'_> {
    /// Rotates `[batch, seq, heads, head_dim]` in its own memory.
    pub fn apply(self, x: &Tensor) -> Result<()> {
        x.inplace_op1(&self)
    }

    fn rotate<T: Element>(&self, memory: &mut [T], layout: &Layout) -> Result<()> {
        let (&[batch, seq, heads, dim], &[s0, s1, s2, s3]) = (layout.dims(), layout.stride()) else {
            bail!("expected four axes, got {:?}", layout.dims());
        };
        let (shape, strides) = ([batch, heads, seq, dim], [s0, s2, s1, s3].map(|stride| stride as isize));
        let x = TensorMut::with_strides(memory, layout.start_offset(), shape, strides).map_err(Error::wrap)?;
        self.rotary.rotate(AnyTensorMut::from(x), Positions::Start(self.position)).map_err(Error::wrap)
    }
}

impl InplaceOp1 for Rotation<'_> {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match storage {
            CpuStorage::F32(memory) => self.rotate(memory, layout),
            CpuStorage::F16(memory) => self.rotate(memory, layout),
            CpuStorage::BF16(memory) => self.rotate(memory, layout),
            _ => bail!("rotary embeddings are of f32, f16 and bf16"),
        }
    }
}
