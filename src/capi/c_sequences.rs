//! C's sequences of their own lengths: padded, packed, or in pages.

use super::c_cache_view::CheckedView;
use super::c_tensor::{CheckedTensor, check_pointer, list, size};
use super::failure::{Code, Failure};
use crate::attention::Attention;
use crate::integers::Integers;
use crate::kv::{self, Places, check_starts};
use crate::sequence::Lengths;

/// `flashtile_page_table`. The layout is fixed. All zero is a table without sequences and pages.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PageTable {
    /// The pages of all sequences as 32-bit numbers, or null.
    pub pages32: *const i32,
    /// The pages of all sequences as 64-bit numbers, or null.
    pub pages64: *const i64,
    /// The number of entries of the pages.
    pub page_count: i64,
    /// Entries of each sequence; 0 if there are `starts`.
    pub width: i64,
    /// The first entry of each sequence, and the end of the last one; null if there is a `width`.
    pub starts: *const i64,
    /// The number of entries of `starts`.
    pub start_count: i64,
    /// The keys of each sequence.
    pub lengths: *const i64,
    /// The number of entries of `lengths`.
    pub length_count: i64,
    /// The keys of a page.
    pub page_size: i64,
}

impl PageTable {
    /// A table without sequences and pages.
    pub fn new() -> Self {
        use std::ptr::null;
        PageTable {
            pages32: null(),
            pages64: null(),
            page_count: 0,
            width: 0,
            starts: null(),
            start_count: 0,
            lengths: null(),
            length_count: 0,
            page_size: 0,
        }
    }
}

impl Default for PageTable {
    fn default() -> Self {
        Self::new()
    }
}

/// The options of sequences: lists as pointers with their counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct SequenceOptions {
    pub(super) query_lengths: (*const i64, i64),
    pub(super) query_starts: (*const i64, i64),
    pub(super) key_lengths: (*const i64, i64),
    pub(super) key_starts: (*const i64, i64),
    pub(super) page_table: *const PageTable,
    pub(super) first_queries: (*const i64, i64),
    pub(super) first_keys: (*const i64, i64),
    pub(super) has_cache: bool,
}

/// The lists of the sequences. Their entries are read where they lie, during the whole call.
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckedSequences<'a> {
    query_lengths: Option<&'a [i64]>,
    query_starts: Option<&'a [i64]>,
    key_starts: Option<&'a [i64]>,
    first_queries: Option<&'a [i64]>,
    first_keys: Option<&'a [i64]>,
    page_table: Option<CheckedTable<'a>>,
}

/// A page table with its lists.
#[derive(Clone, Copy, Debug)]
struct CheckedTable<'a> {
    table: kv::PageTable<'a>,
    /// One of the two is empty.
    pages32: &'a [i32],
    pages64: &'a [i64],
    starts: &'a [i64],
    lengths: &'a [i64],
}

impl<'a> CheckedSequences<'a> {
    /// # Safety
    /// As [`list`], of the lists but the key lengths, which are not read; the page table is null, misaligned, or readable, and
    /// its lists are as [`list`] requires.
    pub(super) unsafe fn new(options: SequenceOptions) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let query_lengths = unsafe { given("query lengths", options.query_lengths)? };
        // SAFETY: as above.
        let query_starts = unsafe { given("query starts", options.query_starts)? };
        // SAFETY: as above.
        let key_starts = unsafe { given("key starts", options.key_starts)? };
        // SAFETY: as above.
        let first_queries = unsafe { given("first queries", options.first_queries)? };
        // SAFETY: as above.
        let first_keys = unsafe { given("first keys", options.first_keys)? };
        let (has_key_lengths, has_table) = (is_given(options.key_lengths), !options.page_table.is_null());
        let has_cache = options.has_cache;
        let conflicts = [
            (
                query_lengths.is_some() && query_starts.is_some(),
                "query_lengths and query_starts",
                "starts imply lengths",
            ),
            (key_starts.is_some() && has_table, "key_starts and page_table", "keys are packed or in pages"),
            (has_key_lengths && key_starts.is_some(), "key_lengths and key_starts", "starts imply lengths"),
            (has_key_lengths && has_table, "key_lengths and page_table", "the table has the lengths"),
            (
                first_queries.is_some() && query_starts.is_some(),
                "first_queries and query_starts",
                "packed queries have no padding",
            ),
            (first_keys.is_some() && key_starts.is_some(), "first_keys and key_starts", "packed keys have no padding"),
            (first_keys.is_some() && has_table, "first_keys and page_table", "pages have no padding"),
            (has_cache && has_key_lengths, "cache and key_lengths", "the cache has the lengths"),
            (has_cache && key_starts.is_some(), "cache and key_starts", "keys are packed or in a cache"),
            (has_cache && has_table, "cache and page_table", "the cache knows its pages"),
        ];
        if let Some((_, names, why)) = conflicts.iter().find(|(both, ..)| *both) {
            return Err(Failure::option(format!("{names} are both set, but {why}: set one of them")));
        }
        // SAFETY: as above.
        let page_table = has_table.then(|| unsafe { CheckedTable::new(options.page_table) }).transpose()?;
        Ok(CheckedSequences { query_lengths, query_starts, key_starts, first_queries, first_keys, page_table })
    }

    /// Whether queries and output are packed. Then they may be `[total, heads, dim]`.
    pub(super) fn has_packed_queries(&self) -> bool {
        self.query_starts.is_some()
    }

    /// Whether keys and values are packed. Then they may be `[total, heads, dim]`.
    pub(super) fn has_packed_keys(&self) -> bool {
        self.key_starts.is_some()
    }

    /// Refuses padding of keys in a cache that has none.
    pub(super) fn check_padding(&self, cache: &CheckedView<'_>) -> Result<(), Failure> {
        if self.first_keys.is_none() || cache.has_padding() {
            return Ok(());
        }
        let message =
            "first_keys and cache are both set, but rotating and paged caches have no padding: leave first_keys NULL";
        Err(Failure::option(message))
    }

    /// Refuses starts and pages that the queries and keys don't have. Returns the most queries, and the most keys, of a sequence,
    /// for masks that are made from them.
    pub(super) fn check(&self, [q, k]: [&CheckedTensor; 2], places: Places<'_>) -> Result<[usize; 2], Failure> {
        let [[.., queries, _], [pages, _, keys, _]] = [q.shape(), k.shape()];
        let longest = |what, starts: Integers<'_>, end| {
            check_starts(what, starts, end)?;
            Ok::<_, Failure>(Lengths::Packed(starts).largest(starts.len().saturating_sub(1)))
        };
        let most_queries = match self.query_starts {
            Some(starts) => longest("query starts", starts.into(), queries)?,
            None => queries,
        };
        self.page_table.as_ref().map_or(Ok(()), |table| table.check_pool(pages, keys))?;
        let largest = |lengths: Integers<'_>| Lengths::First(lengths).largest(lengths.len());
        let most_keys = match places {
            Places::Packed(starts) => longest("key starts", starts, keys)?,
            Places::Pages(table) => largest(table.lengths()),
            Places::Ring(ring) => largest(ring.lengths),
            Places::Dense | Places::Filled(_) | Places::From(_) => keys,
        };
        Ok([most_queries, most_keys])
    }

    /// Refuses an output that shares memory with a list.
    pub(super) fn check_disjoint(&self, written: &CheckedTensor) -> Result<(), Failure> {
        let lists = [
            ("query lengths", self.query_lengths),
            ("query starts", self.query_starts),
            ("key starts", self.key_starts),
            ("first queries", self.first_queries),
            ("first keys", self.first_keys),
        ];
        for (name, list) in lists {
            written.check_disjoint_from_list(name, list.unwrap_or_default())?;
        }
        let Some(table) = &self.page_table else { return Ok(()) };
        written.check_disjoint_from_list("pages of the page table", table.pages32)?;
        written.check_disjoint_from_list("pages of the page table", table.pages64)?;
        written.check_disjoint_from_list("starts of the page table", table.starts)?;
        written.check_disjoint_from_list("lengths of the page table", table.lengths)
    }

    /// Where the keys of each sequence lie, without a cache.
    pub(super) fn places(&self) -> Places<'a> {
        match (self.key_starts, &self.page_table) {
            (Some(starts), _) => Places::Packed(starts.into()),
            (None, Some(table)) => Places::Pages(table.table),
            (None, None) => Places::Dense,
        }
    }

    /// Tells the attention which queries each sequence has, and where its keys start in their batch index.
    pub(super) fn set<'b>(&self, mut attention: Attention<'b>) -> Attention<'b>
    where
        'a: 'b,
    {
        if let Some(lengths) = self.query_lengths {
            attention = attention.query_lengths(lengths);
        }
        if let Some(starts) = self.query_starts {
            attention = attention.query_starts(starts);
        }
        if let Some(firsts) = self.first_queries {
            attention = attention.first_queries(firsts);
        }
        if let Some(firsts) = self.first_keys {
            attention = attention.first_keys(firsts);
        }
        attention
    }
}

impl<'a> CheckedTable<'a> {
    /// # Safety
    /// The table is misaligned or readable; the rest as [`list`], of its lists.
    unsafe fn new(table: *const PageTable) -> Result<Self, Failure> {
        check_pointer("page table", table)?;
        // SAFETY: neither null nor misaligned, so by the caller's promise it may be read.
        let from = unsafe { table.read() };
        if !from.pages32.is_null() && !from.pages64.is_null() {
            return Err(Failure::option("pages32 and pages64 of the page table are both set: set one of them"));
        }
        let width = size("rows of the page table (width)", from.width)?;
        let page_size = size("pages of the page table (page_size)", from.page_size)?;
        if page_size == 0 {
            let message = "page_size of the page table is 0 but must be at least 1: the keys of a page";
            return Err(Failure::new(Code::InvalidPages, message));
        }
        // SAFETY: the caller's promise, here and below.
        let starts = unsafe { given("starts of the page table", (from.starts, from.start_count))? };
        // SAFETY: as above.
        let lengths: &[i64] = unsafe { list("lengths of the page table", from.lengths, from.length_count)? };
        lengths.iter().try_for_each(|&length| size("lengths of the page table", length).map(drop))?;
        let count32 = if from.pages32.is_null() { 0 } else { from.page_count };
        let count64 = if from.pages32.is_null() { from.page_count } else { 0 };
        // SAFETY: as above.
        let pages32: &[i32] = unsafe { list("pages of the page table", from.pages32, count32)? };
        // SAFETY: as above.
        let pages64: &[i64] = unsafe { list("pages of the page table", from.pages64, count64)? };
        let pages: Integers<'a> = if from.pages32.is_null() { pages64.into() } else { pages32.into() };
        let table = match starts {
            Some(_) if width != 0 => {
                let message = "width and starts of the page table are both set, but it is rectangular or compressed: \
                               set one of them";
                return Err(Failure::option(message));
            }
            None if width == 0 && from.page_count != 0 => {
                let message = "the page table has pages but neither a width nor starts: set the width of a rectangular \
                               table, or the starts of a compressed one";
                return Err(Failure::option(message));
            }
            Some(starts) => kv::PageTable::compressed(starts, pages, lengths, page_size)?,
            None => kv::PageTable::new(pages, width, lengths, page_size)?,
        };
        Ok(CheckedTable { table, pages32, pages64, starts: starts.unwrap_or_default(), lengths })
    }

    /// Refuses a pool that lacks a page or has pages of another size.
    fn check_pool(&self, pages: usize, page_size: usize) -> Result<(), Failure> {
        let needed = self.table.pages_needed();
        if pages < needed {
            let (page, last) = (needed - 1, "counted from 0 along axis 0");
            let message = format!("the page table names page {page}, but the pool has {pages} pages, {last}");
            return Err(Failure::new(Code::InvalidPages, message));
        }
        Ok(self.table.check_pool(pages, page_size)?)
    }
}

/// Whether a list is given: its pointer is not null, or its count is not 0.
fn is_given((from, count): (*const i64, i64)) -> bool {
    !from.is_null() || count != 0
}

/// A list, if it is given.
///
/// # Safety
/// As [`list`].
unsafe fn given<'a>(name: &str, (from, count): (*const i64, i64)) -> Result<Option<&'a [i64]>, Failure> {
    // SAFETY: the caller's promise.
    is_given((from, count)).then(|| unsafe { list(name, from, count) }).transpose()
}
