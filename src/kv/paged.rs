//! A cache of pages, for many sequences of unknown length.

#![forbid(unsafe_code)]

use super::KeysValues;
use super::batch::Rotation;
use super::format::KvFormat;
use super::page_table::PageTable;
use super::storage::{Place, Storage, Tokens};
use crate::error::Error;
use crate::rotary::{Positions, Rotary};
use crate::tensor::AnyTensorRef;
use std::sync::atomic::{AtomicU64, Ordering};

/// The keys and values of all layers of a model, in pages of `page_size` tokens that sequences take as they grow, and share.
///
/// ```text
/// keys of a layer    [pages, heads_kv, page_size, head_dim]
/// values of a layer  [pages, heads_kv, page_size, value_dim]
/// table of a sequence [ceil(len / page_size)]     token j is row j mod page_size of page table[j / page_size]
/// ```
///
/// A sequence has one table for all layers: page 7 of its table is page 7 of every layer's keys and values. So room is made once
/// for a step, and a layer that runs in the middle of the step can't fail for lack of pages:
///
/// 1. [`reserve`](PagedKvCache::reserve) makes the sequence `n` tokens longer. It is the only call that takes pages.
/// 2. [`write`](PagedKvCache::write) stores the next tokens of one layer, up to those reserved.
///
/// [`append`](PagedKvCache::append) does both in a cache of one layer.
///
/// [`fork`](PagedKvCache::fork) shares all pages of a sequence. Full pages stay shared. The last page, if partly filled, is
/// copied when one of its sequences reserves further tokens (copy on write). A page is free when no sequence has it.
///
/// All memory is allocated by [`new`](PagedKvCache::new), but for tables. Keys and values may have any type and strides, as in
/// [`KvCache`](crate::KvCache). A refused call has changed nothing.
///
/// ```
/// use flashtile::{DType, KvFormat, PagedKvCache, TensorRef};
///
/// // 2 layers of 2 heads of 64; 10 pages of 16 tokens.
/// let mut cache = PagedKvCache::new(KvFormat::new(DType::F16, 2, 64), 2, 10, 16)?;
/// let kv = vec![0.5f32; 2 * 20 * 64];
/// let kv = TensorRef::from_slice(&kv, [1, 2, 20, 64])?;
///
/// let prompt = cache.new_sequence();
/// cache.reserve(prompt, 20)?;
/// for layer in 0..2 {
///     cache.write(layer, prompt, kv, kv)?; // then attention of this layer
/// }
/// assert_eq!((cache.table(prompt)?.len(), cache.free_pages()), (2, 8));
///
/// // A second answer to the same prompt: its first page is shared, the second one is copied.
/// let answer = cache.fork(prompt)?;
/// cache.reserve(answer, 1)?;
/// assert_eq!(cache.table(answer)?[0], cache.table(prompt)?[0]);
/// assert_ne!(cache.table(answer)?[1], cache.table(prompt)?[1]);
/// assert_eq!((cache.free_pages(), cache.shared_pages()), (7, 1));
///
/// cache.remove(prompt)?;
/// assert!(cache.table(prompt).is_err());
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Debug)]
pub struct PagedKvCache {
    format: KvFormat,
    page_size: usize,
    layers: Vec<Storage>,
    /// The sequences that have each page.
    owners: Vec<u32>,
    /// The free pages; the last one is taken next.
    free: Vec<u32>,
    slots: Vec<Option<Slot>>,
}

/// A sequence of a [`PagedKvCache`]. The ids of removed sequences and of other caches are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    slot: usize,
    serial: u64,
}

impl SequenceId {
    /// The number that no other sequence of any cache has.
    #[cfg(feature = "capi")]
    pub(crate) fn serial(&self) -> u64 {
        self.serial
    }
}

/// The serial number of the next sequence of any cache, so that none is taken for another.
static SERIAL: AtomicU64 = AtomicU64::new(0);

/// The pages and lengths of some sequences of a [`PagedKvCache`]: a batch. [`list`](PagedKvCache::list) fills it, and keeps its memory
/// from step to step.
#[derive(Debug, Default)]
pub struct PageLists {
    ids: Vec<SequenceId>,
    starts: Vec<usize>,
    pages: Vec<u32>,
    lengths: Vec<usize>,
    page_size: usize,
    /// One more than the largest page.
    end: usize,
}

impl PageLists {
    /// No sequences.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of tokens of each sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Where the pages of each sequence start in [`pages`](PageLists::pages), and the end of the last ones: those of sequence `b`
    /// are `pages[starts[b]..starts[b + 1]]`, as [`PageTable::compressed`] takes them.
    ///
    /// ```
    /// use flashtile::{DType, KvFormat, PageLists, PageTable, PagedKvCache};
    ///
    /// let mut cache = PagedKvCache::new(KvFormat::new(DType::F16, 2, 64), 1, 10, 16)?;
    /// let ids = [cache.new_sequence(), cache.new_sequence()];
    /// cache.reserve(ids[0], 20)?;
    /// cache.reserve(ids[1], 5)?;
    /// let mut lists = PageLists::new();
    /// cache.list(&ids, &mut lists)?;
    /// assert_eq!((lists.starts(), lists.pages(), lists.lengths()), (&[0, 2, 3][..], &[0, 1, 2][..], &[20, 5][..]));
    /// let table = PageTable::compressed(lists.starts(), lists.pages(), lists.lengths(), lists.page_size())?;
    /// assert_eq!(table.pages_needed(), 3);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn starts(&self) -> &[usize] {
        // Lists that were never filled have no sequences.
        if self.starts.is_empty() { &[0] } else { &self.starts }
    }

    /// The pages of all sequences, one list after the other.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The tokens of a page; 0 before the lists are filled.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// The same as a table, for pools of your own.
    pub fn table(&self) -> PageTable<'_> {
        PageTable::of_cache(&self.starts, &self.pages, &self.lengths, (self.page_size, self.end))
    }
}

/// What is known of a sequence.
///
/// Invariants: the table has `ceil(len / page_size)` pages. A page with tokens that a layer lacks is this sequence's alone.
#[derive(Debug)]
struct Slot {
    serial: u64,
    /// The tokens reserved, with those written.
    len: usize,
    /// The tokens that each layer has.
    written: Vec<usize>,
    table: Vec<u32>,
}

impl PagedKvCache {
    /// An empty pool: `pages * page_size * layers *` [`format.token_bytes()`](KvFormat::token_bytes) bytes.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if there is no layer or the page size is 0; [`Error::TooMany`] if pages have no number of 32
    /// bits; [`Error::TooLarge`].
    pub fn new(format: KvFormat, layers: usize, pages: usize, page_size: usize) -> Result<Self, Error> {
        const TOO_LARGE: Error = Error::TooLarge { what: "the cache" };
        for (option, number) in [("layers", layers), ("page size", page_size)] {
            if number == 0 {
                return Err(Error::InvalidOption { option, got: 0.0, expected: "1 or more" });
            }
        }
        let limit = u32::MAX as usize;
        if pages > limit {
            return Err(Error::TooMany { what: "pages", limit, got: pages });
        }
        // No sequence is longer than all pages, so no length overflows.
        pages.checked_mul(page_size).ok_or(TOO_LARGE)?;
        let (mut storages, mut owners, mut free) = (Vec::new(), Vec::new(), Vec::new());
        storages.try_reserve_exact(layers).map_err(|_| TOO_LARGE)?;
        for _ in 0..layers {
            storages.push(Storage::new(&format, pages, page_size)?);
        }
        owners.try_reserve_exact(pages).map_err(|_| TOO_LARGE)?;
        owners.resize(pages, 0);
        free.try_reserve_exact(pages).map_err(|_| TOO_LARGE)?;
        free.extend((0..pages as u32).rev());
        Ok(PagedKvCache { format, page_size, layers: storages, owners, free, slots: Vec::new() })
    }

    /// An empty sequence.
    pub fn new_sequence(&mut self) -> SequenceId {
        let written = vec![0; self.layers.len()];
        self.insert(0, written, Vec::new())
    }

    fn insert(&mut self, len: usize, written: Vec<usize>, table: Vec<u32>) -> SequenceId {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if slot == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[slot] = Some(Slot { serial, len, written, table });
        SequenceId { slot, serial }
    }

    fn slot(&self, id: SequenceId) -> Result<&Slot, Error> {
        let slot = self.slots.get(id.slot).and_then(Option::as_ref);
        slot.filter(|slot| slot.serial == id.serial).ok_or(Error::RemovedSequence)
    }

    fn slot_mut(&mut self, id: SequenceId) -> Result<&mut Slot, Error> {
        let slot = self.slots.get_mut(id.slot).and_then(Option::as_mut);
        slot.filter(|slot| slot.serial == id.serial).ok_or(Error::RemovedSequence)
    }

    /// Makes a sequence `tokens` longer: takes the pages that they need, and copies the last page if it is shared.
    ///
    /// The tokens are then to be written in every layer. Rows that have not been written have no meaning.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`]; [`Error::PagesExhausted`]; [`Error::TooLarge`] if there is no memory for the table.
    pub fn reserve(&mut self, id: SequenceId, tokens: usize) -> Result<(), Error> {
        let (page_size, free) = (self.page_size, self.free.len());
        let slot = self.slot(id)?;
        let rows = slot.len % page_size;
        // The page that the first token goes to, if others have it, too.
        let shared =
            slot.table.last().copied().filter(|&page| tokens > 0 && rows > 0 && self.owners[page as usize] > 1);
        let Some(len) = slot.len.checked_add(tokens) else {
            return Err(Error::PagesExhausted { needed: usize::MAX, free });
        };
        let added = len.div_ceil(page_size) - slot.table.len();
        let needed = added + usize::from(shared.is_some());
        if needed > free {
            return Err(Error::PagesExhausted { needed, free });
        }
        self.slot_mut(id)?.table.try_reserve(added).map_err(|_| Error::TooLarge { what: "the page table" })?;

        // Nothing fails from here on.
        let copy = shared.map(|page| {
            let copy = self.take_page();
            for layer in &mut self.layers {
                layer.copy_rows(page as usize, copy as usize, 0..rows);
            }
            self.owners[page as usize] -= 1;
            copy
        });
        let slot = self.slots[id.slot].as_mut().expect("found above");
        if let (Some(last), Some(copy)) = (slot.table.last_mut(), copy) {
            *last = copy;
        }
        slot.len = len;
        for _ in 0..added {
            let page = self.take_page();
            self.slots[id.slot].as_mut().expect("found above").table.push(page);
        }
        Ok(())
    }

    /// A free page, for one owner.
    fn take_page(&mut self) -> u32 {
        let page = self.free.pop().expect("free pages were counted");
        self.owners[page as usize] = 1;
        page
    }

    /// Writes the next `n` tokens of a sequence in one layer: those after the tokens that the layer has.
    ///
    /// * `k`: `[1, heads_kv, n, head_dim]`
    /// * `v`: `[1, heads_kv, n, value_dim]`
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such layer; [`Error::RemovedSequence`]; [`Error::Rank`], [`Error::ShapeMismatch`];
    /// [`Error::NotReserved`] if fewer than `n` tokens are reserved and not yet written in this layer.
    pub fn write<'t>(
        &mut self,
        layer: usize,
        id: SequenceId,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        let tokens = self.tokens(layer, id, None, k.into(), v.into())?;
        self.write_tokens(layer, id, &tokens)
    }

    /// As [`write`](PagedKvCache::write), with rotated keys: see [`KvCache::append_rotated`](crate::KvCache::append_rotated).
    /// Without positions, a token's position is its number in the sequence.
    ///
    /// # Errors
    /// As [`write`](PagedKvCache::write) and [`Rotary::rotate`].
    pub fn write_rotated<'t>(
        &mut self,
        layer: usize,
        id: SequenceId,
        rotary: &'t Rotary,
        positions: impl Into<Option<Positions<'t>>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        let tokens = self.tokens(layer, id, Some((rotary, positions.into())), k.into(), v.into())?;
        self.write_tokens(layer, id, &tokens)
    }

    /// Checks the keys and values of a write.
    fn tokens<'t>(
        &self,
        layer: usize,
        id: SequenceId,
        rotation: Rotation<'t>,
        k: AnyTensorRef<'t>,
        v: AnyTensorRef<'t>,
    ) -> Result<Tokens<'t>, Error> {
        let written = self.written(layer, id)?;
        let tokens = Tokens::new(&self.format, 1, k, v)?;
        match rotation {
            Some((rotary, positions)) => tokens.rotated(rotary, positions, &[written]),
            None => Ok(tokens),
        }
    }

    fn write_tokens(&mut self, layer: usize, id: SequenceId, tokens: &Tokens<'_>) -> Result<(), Error> {
        let slot = self.slot(id)?;
        let before = slot.written[layer];
        let reserved = slot.len - before;
        if tokens.count > reserved {
            return Err(Error::NotReserved { layer, tokens: tokens.count, reserved });
        }
        let mut next = 0;
        while next < tokens.count {
            let (page, row) = ((before + next) / self.page_size, (before + next) % self.page_size);
            let end = tokens.count.min(next.saturating_add(self.page_size - row));
            let outer = self.slot(id)?.table[page] as usize;
            debug_assert_eq!(self.owners[outer], 1, "page {outer} is written");
            self.layers[layer].write(tokens, Place { outer, row, batch: 0, tokens: next..end, before });
            next = end;
        }
        self.slot_mut(id)?.written[layer] += tokens.count;
        Ok(())
    }

    /// [`reserve`](PagedKvCache::reserve) and [`write`](PagedKvCache::write), for a cache of one layer.
    ///
    /// # Errors
    /// As both; [`Error::WrongCount`] if there is more than one layer; [`Error::NotWritten`] if tokens are reserved already.
    pub fn append<'t>(
        &mut self,
        id: SequenceId,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        self.append_tokens(id, None, k.into(), v.into())
    }

    /// As [`append`](PagedKvCache::append), with rotated keys: see [`write_rotated`](PagedKvCache::write_rotated).
    ///
    /// ```
    /// use flashtile::{DType, KvFormat, PagedKvCache, Rotary, TensorRef};
    ///
    /// let rotary = Rotary::new(64, 10_000.0, 4096)?;
    /// let mut cache = PagedKvCache::new(KvFormat::new(DType::F32, 2, 64), 1, 10, 16)?;
    /// let id = cache.new_sequence();
    /// let kv = vec![0.5f32; 2 * 3 * 64];
    /// let kv = TensorRef::from_slice(&kv, [1, 2, 3, 64])?;
    /// cache.append_rotated(id, &rotary, None, kv, kv)?; // positions 0, 1, 2
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`append`](PagedKvCache::append) and [`Rotary::rotate`].
    pub fn append_rotated<'t>(
        &mut self,
        id: SequenceId,
        rotary: &'t Rotary,
        positions: impl Into<Option<Positions<'t>>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(), Error> {
        self.append_tokens(id, Some((rotary, positions.into())), k.into(), v.into())
    }

    fn append_tokens<'t>(
        &mut self,
        id: SequenceId,
        rotation: Rotation<'t>,
        k: AnyTensorRef<'t>,
        v: AnyTensorRef<'t>,
    ) -> Result<(), Error> {
        if self.layers.len() != 1 {
            return Err(Error::WrongCount { what: "layers", expected: 1, got: self.layers.len() });
        }
        self.check_complete(id)?;
        let tokens = self.tokens(0, id, rotation, k, v)?;
        self.reserve(id, tokens.count)?;
        self.write_tokens(0, id, &tokens)
    }

    /// Refuses sequences with tokens that a layer lacks.
    fn check_complete(&self, id: SequenceId) -> Result<(), Error> {
        let slot = self.slot(id)?;
        let behind = slot.written.iter().position(|&written| written < slot.len);
        behind.map_or(Ok(()), |layer| Err(Error::NotWritten { layer, written: slot.written[layer], len: slot.len }))
    }

    /// A new sequence with the same tokens, which shares all pages. Nothing is copied but the table.
    ///
    /// To share a prefix only, [`truncate`](PagedKvCache::truncate) the result.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`]; [`Error::NotWritten`] if tokens are reserved that a layer lacks; [`Error::TooMany`] if a page
    /// has 2^32 - 1 sequences.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId, Error> {
        self.check_complete(id)?;
        let slot = self.slot(id)?;
        let limit = u32::MAX as usize;
        if slot.table.iter().any(|&page| self.owners[page as usize] as usize == limit) {
            return Err(Error::TooMany { what: "sequences of one page", limit, got: limit.saturating_add(1) });
        }
        let (len, written, table) = (slot.len, slot.written.clone(), slot.table.clone());
        table.iter().for_each(|&page| self.owners[page as usize] += 1);
        Ok(self.insert(len, written, table))
    }

    /// Forgets the tokens of a sequence after the first `len`, in all layers, reserved ones too. Pages without tokens are given
    /// back.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`]; [`Error::CannotTruncate`] if it has fewer tokens.
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<(), Error> {
        let page_size = self.page_size;
        let slot = self.slot_mut(id)?;
        if len > slot.len {
            return Err(Error::CannotTruncate { to: len, len: slot.len, held: slot.len });
        }
        slot.len = len;
        slot.written.iter_mut().for_each(|written| *written = len.min(*written));
        while let Some(slot) = self.slots[id.slot].as_mut()
            && slot.table.len() > len.div_ceil(page_size)
            && let Some(page) = slot.table.pop()
        {
            self.give_back(page);
        }
        Ok(())
    }

    fn give_back(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.push(page);
        }
    }

    /// Forgets a sequence. Its id is refused from now on.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`].
    pub fn remove(&mut self, id: SequenceId) -> Result<(), Error> {
        self.truncate(id, 0)?;
        self.slots[id.slot] = None;
        Ok(())
    }

    /// Forgets all sequences. Their ids are refused from now on.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.owners.fill(0);
        self.free.clear();
        self.free.extend((0..self.owners.len() as u32).rev());
    }

    /// The tokens reserved for a sequence, with those written.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`].
    pub fn len(&self, id: SequenceId) -> Result<usize, Error> {
        Ok(self.slot(id)?.len)
    }

    /// The tokens of a sequence that one layer has: the key length of attention in that layer.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such layer; [`Error::RemovedSequence`].
    pub fn written(&self, layer: usize, id: SequenceId) -> Result<usize, Error> {
        self.layer(layer)?;
        Ok(self.slot(id)?.written[layer])
    }

    /// The pages of a sequence, in the order of its tokens, the same in all layers.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`].
    pub fn table(&self, id: SequenceId) -> Result<&[u32], Error> {
        Ok(&self.slot(id)?.table)
    }

    /// The pages that no sequence has.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// The pages that sequences have, each counted once.
    pub fn used_pages(&self) -> usize {
        self.owners.len() - self.free.len()
    }

    /// The pages that more than one sequence has. It reads a number for each page.
    pub fn shared_pages(&self) -> usize {
        self.owners.iter().filter(|&&owners| owners > 1).count()
    }

    /// All pages.
    pub fn pages(&self) -> usize {
        self.owners.len()
    }

    /// The tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// The number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// What is stored for each token of a layer.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// The bytes of keys and values of all layers that were allocated.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(Storage::bytes).sum()
    }

    /// Lists the pages of some sequences, in this order: the batch of a step. They are the same for all layers.
    ///
    /// A sequence may be listed more than once. Lists are to be filled again after sequences have grown or were truncated: they are the
    /// lengths and pages of this moment.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`]; the lists are then unchanged.
    pub fn list(&self, ids: &[SequenceId], lists: &mut PageLists) -> Result<(), Error> {
        ids.iter().try_for_each(|&id| self.slot(id).map(|_| ()))?;
        lists.ids.clear();
        lists.ids.extend_from_slice(ids);
        lists.starts.clear();
        lists.pages.clear();
        lists.lengths.clear();
        lists.starts.push(0);
        for &id in ids {
            let slot = self.slot(id)?;
            lists.pages.extend_from_slice(&slot.table);
            lists.starts.push(lists.pages.len());
            lists.lengths.push(slot.len);
        }
        (lists.page_size, lists.end) = (self.page_size, lists.pages.iter().max().map_or(0, |page| *page as usize + 1));
        Ok(())
    }

    /// The keys and values of one layer, for the sequences that `lists` has.
    ///
    /// ```
    /// use flashtile::{Attention, DType, KvFormat, PageLists, PagedKvCache, TensorMut, TensorRef, Workspace};
    ///
    /// let mut cache = PagedKvCache::new(KvFormat::new(DType::F16, 2, 64), 1, 10, 16)?;
    /// let (a, b) = (cache.new_sequence(), cache.new_sequence());
    /// let kv = vec![0.5f32; 2 * 20 * 64];
    /// let kv = TensorRef::from_slice(&kv, [1, 2, 20, 64])?;
    /// cache.append(a, kv, kv)?;
    /// cache.append(b, kv.narrow(2, ..3)?, kv.narrow(2, ..3)?)?;
    ///
    /// // The last 2 tokens of one sequence and the last one of the other, packed.
    /// let mut lists = PageLists::new();
    /// cache.list(&[a, b], &mut lists)?;
    /// let (q, mut out) = (vec![0.1f32; 3 * 8 * 64], vec![0.0f32; 3 * 8 * 64]);
    /// Attention::new().causal().query_starts(&[0, 2, 3]).compute(
    ///     TensorRef::from_slice(&q, [3, 8, 64])?,
    ///     cache.view(0, &lists)?,
    ///     TensorMut::from_slice(&mut out, [3, 8, 64])?,
    ///     None,
    ///     &mut Workspace::new(),
    /// )?;
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such layer; [`Error::RemovedSequence`], for sequences of another cache, too;
    /// [`Error::NotWritten`] if the layer lacks tokens of a sequence; [`Error::StaleLists`] if a sequence has other pages now.
    pub fn view<'a>(&'a self, layer: usize, lists: &'a PageLists) -> Result<KeysValues<'a>, Error> {
        self.layer(layer)?;
        for (&id, &len) in lists.ids.iter().zip(&lists.lengths) {
            let written = self.written(layer, id)?;
            if written < len {
                return Err(Error::NotWritten { layer, written, len });
            }
        }
        self.check_lists(lists)?;
        Ok(KeysValues::paged(self.key_pages(layer)?, self.value_pages(layer)?, lists.table()))
    }

    /// The same for planning ([`Prepared::replan`](crate::Prepared::replan)): of the first layer, where tokens that are reserved need not
    /// be written yet.
    ///
    /// # Errors
    /// [`Error::RemovedSequence`]; [`Error::StaleLists`].
    pub fn view_to_plan<'a>(&'a self, lists: &'a PageLists) -> Result<KeysValues<'a>, Error> {
        self.check_lists(lists)?;
        Ok(KeysValues::paged(self.layers[0].keys(), self.layers[0].values(), lists.table()))
    }

    /// Refuses lists whose pages are no longer those of their sequences: a truncation or a copy on write has given them others.
    fn check_lists(&self, lists: &PageLists) -> Result<(), Error> {
        for (n, &id) in lists.ids.iter().enumerate() {
            let listed = &lists.pages[lists.starts[n]..lists.starts[n + 1]];
            if self.slot(id)?.table.get(..listed.len()) != Some(listed) {
                return Err(Error::StaleLists { sequence: n });
            }
        }
        Ok(())
    }

    fn layer(&self, layer: usize) -> Result<&Storage, Error> {
        let none = Error::NotInCache { what: "layer", index: layer, count: self.layers.len() };
        self.layers.get(layer).ok_or(none)
    }

    /// All pages of the keys of a layer, `[pages, heads_kv, page_size, head_dim]`. Rows that were not written have no meaning.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such layer.
    pub fn key_pages(&self, layer: usize) -> Result<AnyTensorRef<'_>, Error> {
        Ok(self.layer(layer)?.keys())
    }

    /// All pages of the values of a layer, `[pages, heads_kv, page_size, value_dim]`. Rows that were not written have no meaning.
    ///
    /// # Errors
    /// [`Error::NotInCache`] if there is no such layer.
    pub fn value_pages(&self, layer: usize) -> Result<AnyTensorRef<'_>, Error> {
        Ok(self.layer(layer)?.values())
    }
}
