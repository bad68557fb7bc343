//! Where the keys (and values) of each sequence lie.

#![forbid(unsafe_code)]

use super::page_table::PageTable;
use crate::integers::Integers;
use std::ops::Range;

/// Where the keys (and values) of each sequence lie: in which rows of which batch index of their tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Places<'a> {
    /// In the rows of a batch index of their own.
    Dense,
    /// In the first rows of a batch index of their own, these many.
    Filled(Integers<'a>),
    /// In a batch index of their own, from these rows on: left-padded.
    From(Integers<'a>),
    /// In rows `starts[b]..starts[b + 1]` of batch 0.
    Packed(Integers<'a>),
    /// In pages, which are the tensor's batch indices.
    Pages(PageTable<'a>),
    /// In a batch index of their own, in the rows of a [`Ring`].
    Ring(Ring<'a>),
}

/// The first and the last tokens of each sequence, as a [`RotatingKvCache`](super::RotatingKvCache) keeps them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring<'a> {
    /// The tokens of each sequence, lost ones included.
    pub(crate) lengths: Integers<'a>,
    /// The number of first tokens.
    pub(crate) first: usize,
    /// The number of last tokens, at least 1.
    pub(crate) window: usize,
}

impl Ring<'_> {
    /// The row of token `j`, while it is kept. Otherwise the row of the token that has replaced it.
    pub(crate) fn row(&self, j: usize) -> usize {
        if j < self.first { j } else { self.first + (j - self.first) % self.window }
    }
}

impl Places<'_> {
    /// The batch index and the row of key `j` of sequence `b`: the definition.
    pub(crate) fn of_key(&self, b: usize, j: usize) -> (usize, usize) {
        match self {
            Places::Dense | Places::Filled(_) => (b, j),
            Places::From(firsts) => (b, firsts.get(b) as usize + j),
            Places::Packed(starts) => (0, starts.get(b) as usize + j),
            Places::Pages(table) => table.of_key(b, j),
            Places::Ring(ring) => (b, ring.row(j)),
        }
    }

    /// The number of first keys of sequence `a`, `most` at most, whose keys and values are those of `b` in memory, too. Both have
    /// `most` keys.
    ///
    /// * `is_broadcast`: whether each batch index of keys and values is the same memory
    pub(crate) fn shared_keys(&self, (a, b): (usize, usize), most: usize, is_broadcast: bool) -> usize {
        match self {
            Places::Pages(table) => table.shared_keys(a, b, most),
            Places::Dense | Places::Filled(_) if is_broadcast => most,
            _ => 0,
        }
    }

    /// The run that the keys `keys` of sequence `b` start with, where a sequence may have several: the batch index, and the rows.
    #[inline]
    pub(crate) fn first_run(&self, b: usize, keys: &Range<usize>) -> (usize, Range<usize>) {
        let (index, row) = self.of_key(b, keys.start);
        let end = match self {
            Places::Dense | Places::Filled(_) | Places::From(_) | Places::Packed(_) => usize::MAX,
            Places::Pages(table) => table.page_size(),
            Places::Ring(ring) if keys.start < ring.first => ring.first,
            Places::Ring(ring) => ring.first + ring.window,
        };
        (index, row..end.min(row + keys.len()))
    }

    /// Calls `visit` with each run of the keys `keys` of sequence `b`: the batch index, and the rows.
    #[inline]
    pub(super) fn for_each_run(&self, b: usize, keys: Range<usize>, mut visit: impl FnMut(usize, Range<usize>)) {
        if let Places::Pages(table) = self {
            return table.for_each_run(b, keys, visit);
        }
        let mut rest = keys;
        while !rest.is_empty() {
            let (index, rows) = self.first_run(b, &rest);
            rest.start += rows.len();
            visit(index, rows);
        }
    }

    /// Whether each key has a page of its own.
    pub(crate) fn has_pages_of_one(&self) -> bool {
        matches!(self, Places::Pages(table) if table.page_size() == 1)
    }
}
