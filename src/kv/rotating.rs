//! A cache of the first and the last tokens.

#![forbid(unsafe_code)]

use super::KeysValues;
use super::batch::{CacheBatch, To};
use super::format::KvFormat;
use super::places::{Places, Ring};
use super::storage::{Place, Tokens};
use crate::error::Error;
use crate::rotary::{Positions, Rotary};
use crate::tensor::AnyTensorRef;
use std::ops::Range;

/// The keys and values of one layer that keeps the first `S` and the last `W` tokens of each sequence (StreamingLLM, sliding
/// windows).
///
/// ```text
/// keys    [batch, heads_kv, S + W, head_dim]      row(j) = j                     if j < S
/// values  [batch, heads_kv, S + W, value_dim]     row(j) = S + (j - S) mod W     else
/// lengths [batch]                                 the tokens ever appended to each sequence
/// ```
///
/// A sequence of `n` tokens holds the tokens `0 .. min(S, n)` and `max(S, n - W) .. n`, and no others: what is held depends on
/// its length alone. Token `j` replaces token `j - W`.
///
/// Appending `n` tokens at once writes those that remain. Attention after it sees the last `W` tokens: the first of `n` new queries
/// has lost up to `n - 1` keys of its window. So a model whose queries see `w` tokens, their own included, and which appends `n` tokens
/// at a time, needs `W >= w + n - 1`. Attention with a [`window`](crate::Attention::window) refuses a cache that lacks keys in it, with
/// [`Error::LostKeys`]. Without a window, and with masks of [`masked_by`](crate::Attention::masked_by), queries see what is left: check
/// `W` yourself there. Attention takes sequences of less than 2^30 tokens from this cache, lost ones included; these take no
/// time.
///
/// Attention takes `&cache` as its keys and values. Token `j` keeps the position `j`, whatever has been lost, so causal order,
/// windows and ALiBi are right; lost tokens are hidden from every query.
///
/// As in [`KvCache`](crate::KvCache), all memory is allocated by [`new`](RotatingKvCache::new), keys and values may have any type
/// and strides, and a refused call has changed nothing.
///
/// ```
/// use flashtile::{DType, KvFormat, RotatingKvCache, TensorRef};
///
/// // The first 4 tokens and the last 8.
/// let mut cache = RotatingKvCache::new(KvFormat::new(DType::Bf16, 2, 64), 1, 4, 8)?;
/// let kv = vec![0.5f32; 2 * 20 * 64];
/// let kv = TensorRef::from_slice(&kv, [1, 2, 20, 64])?;
/// cache.append(kv, kv)?;
/// assert_eq!((cache.len(0)?, cache.kept(0)?), (20, [0..4, 12..20]));
/// assert_eq!(cache.keys().shape(), [1, 2, 12, 64]);
/// assert_eq!(cache.row(19), 4 + (19 - 4) % 8);
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Debug)]
pub struct RotatingKvCache {
    batch: CacheBatch,
    first: usize,
    window: usize,
}

impl RotatingKvCache {
    /// Empty sequences, with memory for `first + window` tokens each.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if the window is 0; [`Error::TooLarge`].
    pub fn new(format: KvFormat, batch: usize, first: usize, window: usize) -> Result<Self, Error> {
        if window == 0 {
            return Err(Error::InvalidOption { option: "window", got: 0.0, expected: "1 or more" });
        }
        let rows = first.checked_add(window).ok_or(Error::TooLarge { what: "the cache" })?;
        Ok(RotatingKvCache { batch: CacheBatch::new(format, batch, rows)?, first, window })
    }

    /// Adds `n` tokens to every sequence.
    ///
    /// * `k`: `[batch, heads_kv, n, head_dim]`
    /// * `v`: `[batch, heads_kv, n, value_dim]`
    ///
    /// # Errors
    /// [`Error::Rank`], [`Error::ShapeMismatch`]; [`Error::CacheFull`] if a length would overflow.
    pub fn append<'t>(&mut self, k: impl Into<AnyTensorRef<'t>>, v: impl Into<AnyTensorRef<'t>>) -> Result<(), Error> {
        self.write(self.batch.tokens(To::All, None, k.into(), v.into())?)
    }

    /// As [`append`](RotatingKvCache::append), with rotated keys: see
    /// [`KvCache::append_rotated`](crate::KvCache::append_rotated). Without positions, a token's position is its number in the
    /// sequence, whatever has been overwritten.
    ///
    /// # Errors
    /// As [`append`](RotatingKvCache::append) and [`Rotary::rotate`].
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
    /// [`Error::NotInCache`] if there is no such sequence; else as [`append`](RotatingKvCache::append).
    pub fn append_to<'t>(
        &mut self,
        sequence: usize,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        self.write(self.batch.tokens(To::One(sequence), None, k.into(), v.into())?)
    }

    /// As [`append_to`](RotatingKvCache::append_to), with rotated keys.
    ///
    /// # Errors
    /// As [`append_to`](RotatingKvCache::append_to) and [`Rotary::rotate`].
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

    /// Writes the tokens of batch `b` to sequence `first + b`: those that remain, in runs of neighbouring rows.
    fn write(&mut self, (first, tokens): (usize, Tokens<'_>)) -> Result<(), Error> {
        let sequences = first..first + tokens.batch;
        for sequence in sequences.clone() {
            if self.batch.lengths[sequence].checked_add(tokens.count).is_none() {
                return Err(Error::CacheFull { sequence, tokens: usize::MAX, capacity: usize::MAX });
            }
        }
        for (batch, outer) in sequences.enumerate() {
            let before = self.batch.lengths[outer];
            let len = before + tokens.count;
            for kept in self.kept_of(len) {
                let mut next = kept.start.max(before);
                while next < kept.end {
                    let row = self.row(next);
                    // The run ends where the ring does, and the first tokens end before the ring begins.
                    let rows = if next < self.first { self.first } else { self.first + self.window } - row;
                    let end = kept.end.min(next.saturating_add(rows));
                    let place = Place { outer, row, batch, tokens: next - before..end - before, before };
                    self.batch.storage.write(&tokens, place);
                    next = end;
                }
            }
            self.batch.lengths[outer] = len;
        }
        Ok(())
    }

    /// The tokens that a sequence of `len` tokens holds.
    fn kept_of(&self, len: usize) -> [Range<usize>; 2] {
        let first = self.first.min(len);
        [0..first, first.max(len.saturating_sub(self.window))..len]
    }

    /// Forgets the tokens of a sequence after the first `len`.
    ///
    /// The sequence is then as if the tokens had not been appended. So this is refused where tokens that it would hold have been
    /// overwritten: once a sequence has more than `first + window` tokens, it can be truncated to `first` or less.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence; [`Error::CannotTruncate`].
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), Error> {
        let before = self.len(sequence)?;
        let held = if before - self.first.min(before) <= self.window { before } else { self.first };
        if len > held && len != before {
            return Err(Error::CannotTruncate { to: len, len: before, held });
        }
        self.batch.lengths[sequence] = len;
        Ok(())
    }

    /// Makes sequence `to` a copy of sequence `from`. Its own tokens are forgotten.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<(), Error> {
        self.batch.fork(from, to, self.first + self.window)
    }

    /// Forgets all tokens of all sequences.
    pub fn clear(&mut self) {
        self.batch.lengths.fill(0);
    }

    /// The tokens ever appended to a sequence, and not truncated.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence.
    pub fn len(&self, sequence: usize) -> Result<usize, Error> {
        self.batch.len(sequence)
    }

    /// The tokens ever appended to each sequence, and not truncated.
    pub fn lengths(&self) -> &[usize] {
        &self.batch.lengths
    }

    /// The tokens that a sequence holds: among the first ones, and among the last ones. The second range starts where the first
    /// ends if no token is missing between them.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such sequence.
    pub fn kept(&self, sequence: usize) -> Result<[Range<usize>; 2], Error> {
        Ok(self.kept_of(self.len(sequence)?))
    }

    /// The row of token `token` of any sequence, while it is held.
    pub fn row(&self, token: usize) -> usize {
        self.ring().row(token)
    }

    fn ring(&self) -> Ring<'_> {
        Ring { lengths: self.lengths().into(), first: self.first, window: self.window }
    }

    /// The number of first tokens that are never overwritten.
    pub fn first(&self) -> usize {
        self.first
    }

    /// The number of last tokens that are held.
    pub fn window(&self) -> usize {
        self.window
    }

    /// The number of sequences.
    pub fn batch(&self) -> usize {
        self.batch.lengths.len()
    }

    /// What is stored for each token.
    pub fn format(&self) -> KvFormat {
        self.batch.format
    }

    /// The bytes of keys and values that were allocated.
    pub fn bytes(&self) -> usize {
        self.batch.storage.bytes()
    }

    /// All memory of the keys, `[batch, heads_kv, first + window, head_dim]`. Rows of no held token have no meaning.
    pub fn keys(&self) -> AnyTensorRef<'_> {
        self.batch.storage.keys()
    }

    /// All memory of the values, `[batch, heads_kv, first + window, value_dim]`. Rows of no held token have no meaning.
    pub fn values(&self) -> AnyTensorRef<'_> {
        self.batch.storage.values()
    }
}

impl<'a> From<&'a RotatingKvCache> for KeysValues<'a> {
    fn from(cache: &'a RotatingKvCache) -> Self {
        KeysValues { k: cache.keys(), v: cache.values(), places: Places::Ring(cache.ring()) }
    }
}
