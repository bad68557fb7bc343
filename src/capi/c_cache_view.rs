//! A cache as the keys and values of a call.

use super::c_cache::{Cache, Kind, Paged};
use super::c_tensor::{CheckedTensor, check_pointer, list};
use super::failure::{Code, Failure};
use super::handle::shared;
use crate::error::Error;
use crate::kv::{KeysValues, PageLists, Places, SequenceId};
use std::ptr::null;

/// `flashtile_cache_view`: the sequences and the layer of a cache that a call reads. The layout is fixed.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct CacheView {
    /// The cache.
    pub cache: *const Cache,
    /// The layer of a paged cache; otherwise 0.
    pub layer: i64,
    /// The sequences of a paged cache that are the batch; otherwise null.
    pub sequences: *const i64,
    /// The number of entries of `sequences`.
    pub sequence_count: i64,
}

impl CacheView {
    /// All sequences of a cache without pages.
    pub fn new(cache: *const Cache) -> Self {
        CacheView { cache, layer: 0, sequences: null(), sequence_count: 0 }
    }
}

/// What a call is for: planning reads lengths and shapes alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Plan,
    Run,
}

/// The pages of the sequences of a call. They are kept between calls, so that repeated calls do not allocate.
#[derive(Debug, Default)]
pub(super) struct CacheLists {
    ids: Vec<SequenceId>,
    pages: PageLists,
}

/// A cache whose sequences are readable.
pub(super) struct CheckedView<'a> {
    cache: &'a Cache,
    layer: i64,
    pub(super) sequences: &'a [i64],
}

impl<'a> CheckedView<'a> {
    /// # Safety
    /// `view` is null, misaligned, or leads to a view whose cache is null or was made by this library, and is neither freed nor changed
    /// during `'a`, and whose list is as [`list`] requires.
    pub(super) unsafe fn new(view: *const CacheView) -> Result<Self, Failure> {
        check_pointer("cache view", view)?;
        // SAFETY: neither null nor misaligned, so by the caller's promise it may be read.
        let CacheView { cache, layer, sequences, sequence_count } = unsafe { view.read() };
        // SAFETY: the caller's promise, for both.
        let (cache, sequences) =
            unsafe { (shared("cache", cache)?, list("sequences of the cache view", sequences, sequence_count)?) };
        Ok(CheckedView { cache, layer, sequences })
    }

    /// Whether its sequences may have padding before their first key.
    pub(super) fn has_padding(&self) -> bool {
        matches!(self.cache.kind, Kind::Fixed(_))
    }

    /// Refuses queries of no sequence.
    pub(super) fn check_chosen(&self, q: &CheckedTensor) -> Result<(), Failure> {
        if matches!(self.cache.kind, Kind::Paged(_)) && self.sequences.is_empty() && !q.shape().contains(&0) {
            let message =
                "sequences of the cache view are not set, and a call over a paged cache needs those of the batch";
            return Err(Failure::option(message));
        }
        Ok(())
    }

    /// Keys and values, and where those of each sequence lie.
    pub(super) fn keys_values(
        &self,
        lists: &'a mut CacheLists,
        purpose: Purpose,
    ) -> Result<([CheckedTensor; 2], Places<'a>), Failure> {
        let KeysValues { k, v, places } = match &self.cache.kind {
            Kind::Fixed(cache) => self.check_whole(cache)?.into(),
            Kind::Rotating(cache) => self.check_whole(cache)?.into(),
            Kind::Paged(paged) => self.pages(paged, lists, purpose)?,
        };
        Ok(([CheckedTensor::of_cache("keys", k)?, CheckedTensor::of_cache("values", v)?], places))
    }

    /// Refuses a choice of layers or sequences where there is none.
    fn check_whole<C>(&self, cache: &'a C) -> Result<&'a C, Failure> {
        if !self.sequences.is_empty() {
            let message = format!(
                "sequences of the cache view are set, but a call reads all sequences of a cache of {}: set none",
                self.cache.maker()
            );
            return Err(Failure::option(message));
        }
        if self.layer != 0 {
            return Err(self.no_layer(1));
        }
        Ok(cache)
    }

    fn no_layer(&self, layers: usize) -> Failure {
        let message = format!("there is no layer {}, counted from 0: the cache has {layers}", self.layer);
        Failure::new(Code::NotInCache, message)
    }

    fn pages(&self, paged: &'a Paged, lists: &'a mut CacheLists, purpose: Purpose) -> Result<KeysValues<'a>, Failure> {
        let (cache, CacheLists { ids, pages }) = (&paged.cache, lists);
        let layer = usize::try_from(self.layer).map_err(|_| self.no_layer(cache.layers()))?;
        ids.clear();
        ids.try_reserve(self.sequences.len()).map_err(|_| Error::TooLarge { what: "the list of sequences" })?;
        for &sequence in self.sequences {
            ids.push(paged.id(sequence)?);
        }
        cache.list(ids, pages)?;
        match purpose {
            Purpose::Run => Ok(cache.view(layer, pages)?),
            // Tokens that are reserved need not be written yet.
            Purpose::Plan => Ok(KeysValues::paged(cache.key_pages(layer)?, cache.value_pages(layer)?, pages.table())),
        }
    }
}
