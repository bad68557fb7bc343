//! Page tables: the pages of each sequence.

#![forbid(unsafe_code)]

use crate::error::{Error, check_count};
use crate::integers::Integers;
use std::ops::Range;

/// The pages of each sequence of a batch, in the order of its keys: key `j` is in slot `j % page_size` of page `j / page_size` of the
/// sequence's list.
///
/// It borrows lists of any common integer type ([`Integers`]) and checks them once, when it is made. It can be used for any
/// number of layers: each has a pool of its own, and the tables are the same.
///
/// Entries past a sequence's length are never read. They may be anything, such as -1.
#[derive(Clone, Copy, Debug)]
pub struct PageTable<'a> {
    pages: Integers<'a>,
    lists: Lists<'a>,
    lengths: Integers<'a>,
    page_size: usize,
    /// One more than the largest page.
    end: usize,
}

/// Where each sequence's list of pages starts.
#[derive(Clone, Copy, Debug)]
enum Lists<'a> {
    /// At multiples of a width.
    Rows(usize),
    /// At these entries.
    Starts(Integers<'a>),
}

impl<'a> PageTable<'a> {
    /// A rectangular table: `[sequences, width]`, row by row (vLLM's block table).
    ///
    /// * `lengths`: the number of keys of each sequence, at most `width * page_size`, and at most `isize::MAX`
    ///
    /// # Errors
    /// [`Error::WrongCount`] unless there are `width` entries for each sequence; [`Error::InvalidPages`] for a page size of 0, a
    /// length below 0 or above the listed pages, or a page below 0.
    pub fn new(
        pages: impl Into<Integers<'a>>,
        width: usize,
        lengths: impl Into<Integers<'a>>,
        page_size: usize,
    ) -> Result<Self, Error> {
        let (pages, lengths) = (pages.into(), lengths.into());
        check_count("entries of the page table", pages.len(), lengths.len().saturating_mul(width))?;
        Self::checked(pages, Lists::Rows(width), lengths, page_size)
    }

    /// A compressed table: the pages of sequence `b` are `pages[starts[b]..starts[b + 1]]` (FlashInfer's and SGLang's `indptr` and
    /// `indices`).
    ///
    /// * `starts`: one more than there are sequences, ascending, at most the number of entries
    /// * `lengths`: as in [`PageTable::new`]
    ///
    /// # Errors
    /// As [`PageTable::new`]; [`Error::InvalidStarts`].
    pub fn compressed(
        starts: impl Into<Integers<'a>>,
        pages: impl Into<Integers<'a>>,
        lengths: impl Into<Integers<'a>>,
        page_size: usize,
    ) -> Result<Self, Error> {
        let (starts, pages, lengths) = (starts.into(), pages.into(), lengths.into());
        check_count("starts of the page table", starts.len(), lengths.len() + 1)?;
        check_starts("starts of the page table", starts, pages.len())?;
        Self::checked(pages, Lists::Starts(starts), lengths, page_size)
    }

    /// Lists that a cache has made, whose pages are all below `end`.
    pub(super) fn of_cache(
        starts: &'a [usize],
        pages: &'a [u32],
        lengths: &'a [usize],
        (page_size, end): (usize, usize),
    ) -> Self {
        let lists = Lists::Starts(starts.into());
        PageTable { pages: pages.into(), lists, lengths: lengths.into(), page_size, end }
    }

    fn checked(pages: Integers<'a>, lists: Lists<'a>, lengths: Integers<'a>, page_size: usize) -> Result<Self, Error> {
        if page_size == 0 {
            return Err(Error::InvalidPages { what: "page size", sequence: 0, got: 0, limit: usize::MAX });
        }
        let mut table = PageTable { pages, lists, lengths, page_size, end: 0 };
        for b in 0..lengths.len() {
            let (list, length) = (table.list(b), lengths.get(b));
            // Longer lists name the same page again and again. Positions are counted in isize.
            let limit = list.len().saturating_mul(page_size).min(isize::MAX as usize);
            if !(0..=limit as i128).contains(&length) {
                return Err(Error::InvalidPages { what: "length", sequence: b, got: length, limit });
            }
            for entry in list.take((length as usize).div_ceil(page_size)) {
                let page = pages.get(entry);
                // Every tensor has fewer pages than this.
                let limit = isize::MAX as usize;
                if !(0..limit as i128).contains(&page) {
                    return Err(Error::InvalidPages { what: "page", sequence: b, got: page, limit });
                }
                table.end = table.end.max(page as usize + 1);
            }
        }
        Ok(table)
    }

    /// The entries of the pages of sequence `b`.
    #[inline]
    fn list(&self, b: usize) -> Range<usize> {
        match self.lists {
            Lists::Rows(width) => b * width..(b + 1) * width,
            Lists::Starts(starts) => starts.get(b) as usize..starts.get(b + 1) as usize,
        }
    }

    /// The number of keys of each sequence.
    pub fn lengths(&self) -> Integers<'a> {
        self.lengths
    }

    /// Keys of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// The pages that a pool must have: one more than the largest page that a sequence uses.
    pub fn pages_needed(&self) -> usize {
        self.end
    }

    /// Refuses a pool of `pages` pages of `page_size` keys that has too few, or others.
    pub(crate) fn check_pool(&self, pages: usize, page_size: usize) -> Result<(), Error> {
        if page_size != self.page_size {
            let (expected, got) = (self.page_size, page_size);
            return Err(Error::ShapeMismatch { tensor: "keys", dimension: "page_size", expected, got });
        }
        if pages < self.end {
            let (expected, got) = (self.end, pages);
            return Err(Error::ShapeMismatch { tensor: "keys", dimension: "pages (at least)", expected, got });
        }
        Ok(())
    }

    /// The number of first keys of sequence `a`, `most` at most, that are in the places of the first keys of `b`. Both have `most` keys.
    pub(super) fn shared_keys(&self, a: usize, b: usize, most: usize) -> usize {
        let (a, b) = (self.list(a).start, self.list(b).start);
        let pages = self.pages.equal_entries(a, b, most.div_ceil(self.page_size));
        pages.saturating_mul(self.page_size).min(most)
    }

    /// The page and the slot of key `j` of sequence `b`.
    #[inline]
    pub(crate) fn of_key(&self, b: usize, j: usize) -> (usize, usize) {
        (self.page(self.list(b).start + j / self.page_size), j % self.page_size)
    }

    /// Calls `visit` with the page and the slots of each run of keys of sequence `b`.
    #[inline]
    pub(super) fn for_each_run(&self, b: usize, keys: Range<usize>, mut visit: impl FnMut(usize, Range<usize>)) {
        if keys.is_empty() {
            return;
        }
        let (size, first) = (self.page_size, self.list(b).start);
        let entries = first + keys.start / size..first + keys.end.div_ceil(size);
        let (mut slot, mut left) = (keys.start % size, keys.len());
        self.pages.for_each_index(entries, |page| {
            let rows = slot..size.min(slot + left);
            (slot, left) = (0, left - rows.len());
            visit(page, rows);
        });
    }

    /// The page of an entry, which is one that a sequence uses.
    #[inline]
    fn page(&self, entry: usize) -> usize {
        self.pages.get(entry) as usize
    }
}

/// Refuses starts that do not ascend from 0 or more to `end` or less.
pub(crate) fn check_starts(what: &'static str, starts: Integers<'_>, end: usize) -> Result<(), Error> {
    let mut before = 0;
    for (index, start) in starts.iter().enumerate() {
        if !(before..=end as i128).contains(&start) {
            return Err(Error::InvalidStarts { what, index, got: start, least: before, most: end });
        }
        before = start;
    }
    Ok(())
}
