//! The keys or values of one head of a sequence, in the order of positions, wherever they lie.

#![forbid(unsafe_code)]

use super::Places;
use super::page_table::PageTable;
use super::run::Run;
use crate::element::with_elements;
use crate::tensor::any::AnyTensor;
use std::ops::Range;

/// The keys or values of one head of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyRows<'a> {
    /// One run.
    Run(Run<'a>),
    /// A run for each page.
    Pages(PageRows<'a>),
}

/// Rows in the pages of a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageRows<'a> {
    /// `[pages, heads, page_size, cols]`.
    pages: &'a AnyTensor<'a>,
    head: usize,
    table: &'a PageTable<'a>,
    /// The first entry of the sequence's pages.
    first_entry: usize,
    rows: usize,
}

/// Pages of fewer rows are copied together before a product reads them.
const SHORT_PAGE: usize = 16;

/// Rows that are copied together.
const COPIED_ROWS: usize = 32;

impl<'a> KeyRows<'a> {
    /// The first `rows` rows of head `head` of sequence `b`.
    #[inline]
    pub(crate) fn new(
        tensor: &'a AnyTensor<'a>,
        places: &'a Places<'a>,
        (b, head): (usize, usize),
        rows: usize,
    ) -> Self {
        match places {
            Places::Dense => KeyRows::Run(Run::new(tensor, b, head)),
            Places::Packed(starts) => {
                let first = starts.get(b) as usize;
                KeyRows::Run(Run::new(tensor, 0, head).slice_rows(first..first + rows))
            }
            Places::Pages(table) => {
                let first_entry = table.first_entry(b);
                KeyRows::Pages(PageRows { pages: tensor, head, table, first_entry, rows })
            }
        }
    }

    #[inline]
    pub(crate) fn cols(&self) -> usize {
        match self {
            KeyRows::Run(run) => run.cols(),
            KeyRows::Pages(rows) => rows.pages.shape()[3],
        }
    }

    /// Bytes of an element.
    #[inline]
    pub(crate) fn element_bytes(&self) -> usize {
        match self {
            KeyRows::Run(run) => run.element_bytes(),
            KeyRows::Pages(rows) => rows.pages.dtype().size(),
        }
    }

    /// Whether the elements of a row are contiguous.
    #[inline]
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        match self {
            KeyRows::Run(run) => run.has_contiguous_rows(),
            KeyRows::Pages(rows) => with_elements!(rows.pages, pages => pages.strides()[3] == 1) || self.cols() <= 1,
        }
    }

    /// Whether products can read all rows in place: one run of f32 without gaps between elements.
    #[inline]
    pub(crate) fn are_in_place(&self) -> bool {
        matches!(self, KeyRows::Run(run) if run.in_place().is_some())
    }

    /// Whether rows are in more than one run.
    #[inline]
    pub(crate) fn are_paged(&self) -> bool {
        matches!(self, KeyRows::Pages(_))
    }

    /// The rows `range` as one run, if they are.
    #[inline(always)]
    pub(crate) fn one_run(&self, range: Range<usize>) -> Option<Run<'a>> {
        match self {
            KeyRows::Run(run) => Some(run.slice_rows(range)),
            KeyRows::Pages(rows) => rows.first_run(range.clone()).filter(|run| run.rows() == range.len()),
        }
    }

    /// The runs of the rows `range`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[inline]
    pub(crate) fn runs(self, range: Range<usize>) -> impl Iterator<Item = Run<'a>> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let run = match self {
                KeyRows::Run(run) if !rest.is_empty() => Some(run.slice_rows(rest.clone())),
                KeyRows::Run(_) => None,
                KeyRows::Pages(rows) => rows.first_run(rest.clone()),
            }?;
            rest.start += run.rows();
            Some(run)
        })
    }

    /// The parts of `range` that products over a few rows of queries read one after the other: runs, or some short runs that are copied
    /// together.
    #[inline]
    pub(crate) fn parts(self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let len = match self {
                _ if rest.is_empty() => return None,
                KeyRows::Run(_) => rest.len(),
                KeyRows::Pages(rows) => {
                    let page = rows.table.page_size();
                    if page < SHORT_PAGE { COPIED_ROWS } else { page - rest.start % page }
                }
            };
            let part = rest.start..rest.end.min(rest.start + len);
            rest.start = part.end;
            Some(part)
        })
    }
}

impl<'a> PageRows<'a> {
    /// The run that `range` starts with; `None` if it is empty.
    #[inline]
    fn first_run(&self, range: Range<usize>) -> Option<Run<'a>> {
        assert!(range.end <= self.rows, "rows {range:?} of {}", self.rows);
        if range.is_empty() {
            return None;
        }
        let size = self.table.page_size();
        let (entry, slot) = (self.first_entry + range.start / size, range.start % size);
        let page = Run::new(self.pages, self.table.page(entry), self.head);
        Some(page.slice_rows(slot..size.min(slot + range.len())))
    }
}
