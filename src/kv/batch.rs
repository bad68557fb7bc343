//! A fixed batch of sequences, each with rows of its own: what [`KvCache`](super::KvCache) and
//! [`RotatingKvCache`](super::RotatingKvCache) share.

#![forbid(unsafe_code)]

use super::format::KvFormat;
use super::storage::{Storage, Tokens};
use crate::error::Error;
use crate::rotary::{Positions, Rotary};
use crate::tensor::AnyTensorRef;

/// The sequences of a cache: their memory, and the tokens that each has had.
#[derive(Debug)]
pub(super) struct CacheBatch {
    pub(super) format: KvFormat,
    /// `[batch, heads_kv, rows, dim]`
    pub(super) storage: Storage,
    pub(super) lengths: Vec<usize>,
}

/// The sequences that tokens are appended to.
#[derive(Clone, Copy, Debug)]
pub(super) enum To {
    All,
    One(usize),
}

/// How the keys of appended tokens are rotated: `None`, or a table with the positions that a caller may give.
pub(super) type Rotation<'t> = Option<(&'t Rotary, Option<Positions<'t>>)>;

impl CacheBatch {
    /// Empty sequences of `rows` rows.
    pub(super) fn new(format: KvFormat, batch: usize, rows: usize) -> Result<Self, Error> {
        let storage = Storage::new(&format, batch, rows)?;
        let mut lengths = Vec::new();
        lengths.try_reserve_exact(batch).map_err(|_| Error::TooLarge { what: "the cache" })?;
        lengths.resize(batch, 0);
        Ok(CacheBatch { format, storage, lengths })
    }

    /// Checks the keys and values of an append: the first sequence that they are for, and the tokens.
    pub(super) fn tokens<'t>(
        &self,
        to: To,
        rotation: Rotation<'t>,
        k: AnyTensorRef<'t>,
        v: AnyTensorRef<'t>,
    ) -> Result<(usize, Tokens<'t>), Error> {
        let (first, batch) = match to {
            To::All => (0, self.lengths.len()),
            To::One(sequence) => (sequence, self.len(sequence).map(|_| 1)?),
        };
        let tokens = Tokens::new(&self.format, batch, k, v)?;
        let tokens = match rotation {
            Some((rotary, positions)) => tokens.rotated(rotary, positions, &self.lengths[first..first + batch])?,
            None => tokens,
        };
        Ok((first, tokens))
    }

    /// The tokens of a sequence, if there is one.
    pub(super) fn len(&self, sequence: usize) -> Result<usize, Error> {
        let none = Error::NotInCache { what: "sequence", index: sequence, count: self.lengths.len() };
        self.lengths.get(sequence).copied().ok_or(none)
    }

    /// Makes sequence `to` a copy of sequence `from`, which holds at most `rows` rows.
    pub(super) fn fork(&mut self, from: usize, to: usize, rows: usize) -> Result<(), Error> {
        let len = self.len(from)?;
        self.len(to)?;
        if from != to {
            self.storage.copy_rows(from, to, 0..len.min(rows));
            self.lengths[to] = len;
        }
        Ok(())
    }
}
