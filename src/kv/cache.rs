//! A cache with a row for each token.

#![forbid(unsafe_code)]

use super::KeysValues;
use super::batch::{CacheBatch, To};
use super::format::KvFormat;
use super::places::Places;
use super::storage::{Place, Tokens};
use crate::error::Error;
use crate::rotary::{Positions, Rotary};
use crate::tensor::AnyTensorRef;

/// The keys and values of one layer, for a batch of sequences, each with room for `capacity` tokens.
///
/// ```text
/// keys    [batch, heads_kv, capacity, head_dim]     without gaps; token j of sequence b is row j of [b, h]
/// values  [batch, heads_kv, capacity, value_dim]
/// lengths [batch]                                   the tokens of each sequence; rows after them are not read
/// ```
///
/// All memory is allocated by [`new`](KvCache::new), and appending allocates nothing. Appended keys and values may have any type
/// and strides. They are rounded once, to nearest with ties to even; infinities and NaNs stay what they are. A refused call has
/// changed nothing.
///
/// Attention takes `&cache` as its keys and values, and reads them where they lie. The last query is at the last token of each
/// sequence ([`QueryOffset::FromEnd`](crate::QueryOffset::FromEnd), the default):
///
/// ```
/// use flashtile::{Attention, DType, KvCache, KvFormat, TensorMut, TensorRef, Workspace};
///
/// // 2 heads of 64 elements, stored as f16; 2 sequences of up to 100 tokens.
/// let mut cache = KvCache::new(KvFormat::new(DType::F16, 2, 64), 2, 100)?;
///
/// // A prompt of 5 tokens for the first sequence, then a token for both. The projections are stored [batch, seq, heads, dim].
/// let prompt = vec![0.5f32; 5 * 2 * 64];
/// let prompt = TensorRef::from_slice(&prompt, [1, 5, 2, 64])?.permuted([0, 2, 1, 3])?;
/// cache.append_to(0, prompt, prompt)?;
/// let token = vec![0.5f32; 2 * 2 * 64];
/// let token = TensorRef::from_slice(&token, [2, 1, 2, 64])?.permuted([0, 2, 1, 3])?;
/// cache.append(token, token)?;
/// assert_eq!(cache.lengths(), [6, 1]);
///
/// let q = vec![0.1f32; 2 * 8 * 64];
/// let mut out = vec![0.0f32; 2 * 8 * 64];
/// Attention::new().causal().compute(
///     TensorRef::from_slice(&q, [2, 8, 1, 64])?,
///     &cache,
///     TensorMut::from_slice(&mut out, [2, 8, 1, 64])?,
///     None,
///     &mut Workspace::new(),
/// )?;
/// assert!(out.iter().all(|x| (x - 0.5).abs() < 1e-6));
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    batch: CacheBatch,
    capacity: usize,
}

impl KvCache {
    /// Empty sequences, with memory for all their tokens: `batch * capacity *` [`format.token_bytes()`](KvFormat::token_bytes).
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn new(format: KvFormat, batch: usize, capacity: usize) -> Result<Self, Error> {
        Ok(KvCache { batch: CacheBatch::new(format, batch, capacity)?, capacity })
    }

    /// Adds `n` tokens to every sequence.
    ///
    /// * `k`: `[batch, heads_kv, n, head_dim]`
    /// * `v`: `[batch, heads_kv, n, value_dim]`
    ///
    /// # Errors
    /// [`Error::Rank`], [`Error::ShapeMismatch`]; [`Error::CacheFull`] if a sequence would have more than
    /// [`capacity`](KvCache::capacity) tokens. Nothing has been added to any sequence then.
    pub fn append<'t>(&mut self, k: impl Into<AnyTensorRef<'t>>, v: impl Into<AnyTensorRef<'t>>) -> Result<(), Error> {
        self.write(self.batch.tokens(To::All, None, k.into(), v.into())?)
    }

    /// As [`append`](KvCache::append), with rotated keys: each is turned to its position in f32, and rounded once.
    ///
    /// Without positions, the keys of a sequence follow those in the cache: the first one has the sequence's length as position.
    ///
    /// ```
    /// use flashtile::{DType, KvCache, KvFormat, Rotary, TensorRef};
    ///
    /// let rotary = Rotary::new(64, 10_000.0, 4096)?;
    /// let mut cache = KvCache::new(KvFormat::new(DType::F32, 2, 64), 1, 100)?;
    /// let kv = vec![0.5f32; 2 * 3 * 64];
    /// let kv = TensorRef::from_slice(&kv, [1, 2, 3, 64])?;
    /// cache.append_rotated(&rotary, None, kv, kv)?; // positions 0, 1, 2
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`append`](KvCache::append) and [`Rotary::rotate`].
    pub fn append_rotated<'t>(
        &mut self,
        rotary: &'t Rotary,
        positions: impl Into<Option<Positions<'t>>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        self.write(self.batch.tokens(To::All, Some((rotary, positions.into())), k.into(), v.into())?)
    }

    /// Adds `n` tokens to one sequence.
    ///
    /// * `k`: `[1, heads_kv, n, head_dim]`
    /// * `v`: `[1, heads_kv, n, value_dim]`
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence; else as [`append`](KvCache::append).
    pub fn append_to<'t>(
        &mut self,
        sequence: usize,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        self.write(self.batch.tokens(To::One(sequence), None, k.into(), v.into())?)
    }

    /// As [`append_to`](KvCache::append_to), with rotated keys: see [`append_rotated`](KvCache::append_rotated).
    ///
    /// # Errors
    /// As [`append_to`](KvCache::append_to) and [`Rotary::rotate`].
    pub fn append_rotated_to<'t>(
        &mut self,
        sequence: usize,
        rotary: &'t Rotary,
        positions: impl Into<Option<Positions<'t>>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        let rotation = Some((rotary, positions.into()));
        self.write(self.batch.tokens(To::One(sequence), rotation, k.into(), v.into())?)
    }

    /// Writes the tokens of batch `b` to sequence `first + b`.
    fn write(&mut self, (first, tokens): (usize, Tokens<'_>)) -> Result<(), Error> {
        let CacheBatch { lengths, storage, .. } = &mut self.batch;
        let lengths = &mut lengths[first..first + tokens.batch];
        for (b, len) in lengths.iter().enumerate() {
            let total = len.saturating_add(tokens.count);
            if total > self.capacity {
                return Err(Error::CacheFull { sequence: first + b, tokens: total, capacity: self.capacity });
            }
        }
        for (batch, len) in lengths.iter_mut().enumerate() {
            let place = Place { outer: first + batch, row: *len, batch, tokens: 0..tokens.count, before: *len };
            storage.write(&tokens, place);
            *len += tokens.count;
        }
        Ok(())
    }

    /// Forgets the tokens of a sequence after the first `len`.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence; [`Error::CannotTruncate`] if it has fewer tokens.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), Error> {
        let before = self.len(sequence)?;
        if len > before {
            return Err(Error::CannotTruncate { to: len, len: before, held: before });
        }
        self.batch.lengths[sequence] = len;
        Ok(())
    }

    /// Makes sequence `to` a copy of sequence `from`. Its own tokens are forgotten.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<(), Error> {
        self.batch.fork(from, to, self.capacity)
    }

    /// Forgets all tokens of all sequences.
    pub fn clear(&mut self) {
        self.batch.lengths.fill(0);
    }

    /// The tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence.
    pub fn len(&self, sequence: usize) -> Result<usize, Error> {
        self.batch.len(sequence)
    }

    /// The tokens of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.batch.lengths
    }

    /// The number of sequences.
    pub fn batch(&self) -> usize {
        self.batch.lengths.len()
    }

    /// The tokens that a sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// What is stored for each token.
    pub fn format(&self) -> KvFormat {
        self.batch.format
    }

    /// The bytes of keys and values that were allocated.
    pub fn bytes(&self) -> usize {
        self.batch.storage.bytes()
    }

    /// All memory of the keys, `[batch, heads_kv, capacity, head_dim]`. Rows after a sequence's length have no meaning.
    pub fn keys(&self) -> AnyTensorRef<'_> {
        self.batch.storage.keys()
    }

    /// All memory of the values, `[batch, heads_kv, capacity, value_dim]`. Rows after a sequence's length have no meaning.
    pub fn values(&self) -> AnyTensorRef<'_> {
        self.batch.storage.values()
    }
}

impl<'a> From<&'a KvCache> for KeysValues<'a> {
    fn from(cache: &'a KvCache) -> Self {
        let places = Places::Filled(cache.lengths().into());
        KeysValues { k: cache.keys(), v: cache.values(), places }
    }
}
