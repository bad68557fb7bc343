//! flashtile's attention over one of its caches.

use super::{Attend, CacheKind, Choice, Rotation, View};
use crate::new_tensor;
use crate::smollm2::model::Sizes;
use candle_core::{Error, Result, Tensor, bail};
use flashtile::mask::FirstAndLast;
use flashtile::{
    AnyTensorRef, Attention, KeysValues, KvCache, KvFormat, PageLists, PagedKvCache, Rotary, RotatingKvCache,
    SequenceId, Workspace,
};

/// The first tokens that every query sees if there is a window.
const FIRST: usize = 4;

/// The tokens of a page.
const PAGE: usize = 16;

/// The most tokens of a step with a window. A rotating cache holds these in addition to the window, because the first of them
/// still sees the whole window before it.
const STEP: usize = 128;

/// flashtile's attention, and the keys and values of all layers.
pub struct Tiled {
    cache: Cache,
    mask: Option<FirstAndLast>,
    workspace: Workspace,
    /// The most tokens of a step.
    step: usize,
}

impl Tiled {
    /// No tokens, with room for `capacity`.
    pub fn new(choice: &Choice, sizes: &Sizes, capacity: usize) -> Result<Self> {
        if choice.window == Some(0) {
            bail!("a window has 1 token or more");
        }
        let cache = Cache::new(choice, sizes, capacity)?;
        let mask = choice.window.map(|window| FirstAndLast::new(FIRST, window - 1));
        let step = if choice.window.is_some() { STEP } else { usize::MAX };
        Ok(Tiled { cache, mask, workspace: Workspace::new(), step })
    }
}

impl Attend for Tiled {
    fn begin(&mut self, tokens: usize) -> Result<()> {
        self.cache.reserve(tokens).map_err(Error::wrap)
    }

    fn attend(&mut self, layer: usize, rotation: Rotation<'_>, q: Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
        rotation.apply(&q)?;
        let [q, k, v] = &[&q, &k, &v].map(View::of);
        self.cache.append(layer, rotation.rotary, k.heads_first()?, v.heads_first()?).map_err(Error::wrap)?;

        let mut attention = Attention::new().causal();
        if let Some(mask) = &self.mask {
            attention = attention.masked_by(mask);
        }
        let keys_values = self.cache.keys_values(layer).map_err(Error::wrap)?;
        let [_, tokens, heads, dim] = q.shape()?;
        let q = q.heads_first()?;
        // The output is stored as the next projection reads it, [1, tokens, heads, dim]: nothing is transposed.
        let out = new_tensor::<f32>(&[1, tokens, heads, dim], |out| {
            attention.compute(q, keys_values, out.permuted(&[0, 2, 1, 3])?, None, &mut self.workspace)
        })?;
        out.reshape((1, tokens, heads * dim))
    }

    fn most_tokens(&self) -> usize {
        self.step
    }
}

/// The keys and values of all layers.
#[allow(clippy::large_enum_variant)] // a session has one of them
enum Cache {
    /// A cache for each layer.
    Contiguous(Vec<KvCache>),
    /// A cache for each layer.
    Rotating(Vec<RotatingKvCache>),
    /// One pool for all layers, one sequence, and the list of its pages in this step.
    Paged { pool: PagedKvCache, sequence: SequenceId, pages: PageLists },
}

impl Cache {
    fn new(choice: &Choice, sizes: &Sizes, capacity: usize) -> Result<Self> {
        let format = KvFormat::new(choice.cache_type.into(), sizes.heads_kv, sizes.head_dim);
        let layers = 0..sizes.layers;
        match (choice.cache, choice.window) {
            (CacheKind::Contiguous, _) => {
                let caches = layers.map(|_| KvCache::new(format, 1, capacity)).collect::<std::result::Result<_, _>>();
                Ok(Cache::Contiguous(caches.map_err(Error::wrap)?))
            }
            (CacheKind::Rotating, Some(window)) => {
                let last = window + STEP - 1;
                let caches =
                    layers.map(|_| RotatingKvCache::new(format, 1, FIRST, last)).collect::<std::result::Result<_, _>>();
                Ok(Cache::Rotating(caches.map_err(Error::wrap)?))
            }
            (CacheKind::Rotating, None) => bail!("a rotating cache needs a --window"),
            (CacheKind::Paged, _) => {
                let pages = capacity.div_ceil(PAGE);
                let mut pool = PagedKvCache::new(format, sizes.layers, pages, PAGE).map_err(Error::wrap)?;
                let sequence = pool.new_sequence();
                Ok(Cache::Paged { pool, sequence, pages: PageLists::new() })
            }
        }
    }

    /// Makes room in a pool of pages. Other caches have it.
    fn reserve(&mut self, tokens: usize) -> std::result::Result<(), flashtile::Error> {
        if let Cache::Paged { pool, sequence, pages } = self {
            pool.reserve(*sequence, tokens)?;
            pool.list(&[*sequence], pages)?;
        }
        Ok(())
    }

    /// Adds tokens to a layer; keys are rotated to the positions after those in the cache.
    fn append(
        &mut self,
        layer: usize,
        rotary: &Rotary,
        k: AnyTensorRef<'_>,
        v: AnyTensorRef<'_>,
    ) -> std::result::Result<(), flashtile::Error> {
        match self {
            Cache::Contiguous(layers) => layers[layer].append_rotated(rotary, None, k, v),
            Cache::Rotating(layers) => layers[layer].append_rotated(rotary, None, k, v),
            Cache::Paged { pool, sequence, .. } => pool.write_rotated(layer, *sequence, rotary, None, k, v),
        }
    }

    fn keys_values(&self, layer: usize) -> std::result::Result<KeysValues<'_>, flashtile::Error> {
        match self {
            Cache::Contiguous(layers) => Ok((&layers[layer]).into()),
            Cache::Rotating(layers) => Ok((&layers[layer]).into()),
            Cache::Paged { pool, pages, .. } => pool.view(layer, pages),
        }
    }
}
