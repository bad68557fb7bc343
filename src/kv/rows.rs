//! The keys or values of one head of a sequence, in the order of positions, wherever they lie.

#![forbid(unsafe_code)]

use super::Places;
use super::run::Run;
use crate::element::with_elements;
use crate::tensor::any::AnyTensor;
use crate::tensor::row_list::{EachRun, ListedRows, RowAddresses, RowList};
use std::ops::Range;

/// The keys or values of one head of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyRows<'a> {
    /// One run.
    Run(Run<'a>),
    /// Several runs, such as pages.
    Runs(ManyRuns<'a>),
}

/// Rows in several runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ManyRuns<'a> {
    tensor: &'a AnyTensor<'a>,
    places: &'a Places<'a>,
    sequence: usize,
    head: usize,
    rows: usize,
}

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
            Places::Dense | Places::Filled(_) => KeyRows::Run(Run::new(tensor, b, head)),
            Places::From(_) | Places::Packed(_) => {
                let (index, first) = places.of_key(b, 0);
                KeyRows::Run(Run::new(tensor, index, head).slice_rows(first..first + rows))
            }
            Places::Pages(_) | Places::Ring(_) => KeyRows::Runs(ManyRuns { tensor, places, sequence: b, head, rows }),
        }
    }

    #[inline]
    pub(crate) fn cols(&self) -> usize {
        match self {
            KeyRows::Run(run) => run.cols(),
            KeyRows::Runs(rows) => rows.tensor.shape()[3],
        }
    }

    /// Bytes of an element.
    #[inline]
    pub(crate) fn element_bytes(&self) -> usize {
        match self {
            KeyRows::Run(run) => run.element_bytes(),
            KeyRows::Runs(rows) => rows.tensor.dtype().size(),
        }
    }

    /// Whether the elements of a row are contiguous.
    #[inline]
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        match self {
            KeyRows::Run(run) => run.has_contiguous_rows(),
            KeyRows::Runs(rows) => rows.has_contiguous_rows(),
        }
    }

    /// Whether products can read all rows in place: one run of f32 without gaps between elements.
    #[inline]
    pub(crate) fn are_in_place(&self) -> bool {
        matches!(self, KeyRows::Run(run) if run.in_place().is_some())
    }

    /// Whether rows are in more than one run.
    #[inline]
    pub(crate) fn are_scattered(&self) -> bool {
        matches!(self, KeyRows::Runs(_))
    }

    /// The rows `range` as one run, if they are.
    #[inline(always)]
    pub(crate) fn one_run(&self, range: Range<usize>) -> Option<Run<'a>> {
        match self {
            KeyRows::Run(run) => Some(run.slice_rows(range)),
            KeyRows::Runs(rows) => rows.first_run(range.clone()).filter(|run| run.rows() == range.len()),
        }
    }

    /// The rows, if they may be in several runs, and have no gaps.
    pub(crate) fn listable(&self) -> Option<&ManyRuns<'a>> {
        match self {
            KeyRows::Runs(rows) if rows.has_contiguous_rows() => Some(rows),
            _ => None,
        }
    }

    /// Whether the rows `range` are in more than one run.
    #[inline]
    pub(crate) fn are_in_several_runs(&self, range: &Range<usize>) -> bool {
        match self {
            KeyRows::Run(_) => false,
            KeyRows::Runs(rows) => rows.places.first_run(rows.sequence, range).1.len() < range.len(),
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
                KeyRows::Runs(rows) => rows.first_run(rest.clone()),
            }?;
            rest.start += run.rows();
            Some(run)
        })
    }
}

impl<'a> ManyRuns<'a> {
    /// To list these rows tile by tile, in `memory`.
    pub(crate) fn tiles<'m>(&self, memory: &'m mut RowAddresses) -> ListedTiles<'m, 'a> {
        ListedTiles { rows: *self, listed: ListedRows::new(memory, self.tensor, self.head), ahead: 0..0 }
    }

    fn runs_of(&self, range: Range<usize>) -> RunsOf<'_> {
        assert!(range.end <= self.rows, "rows {range:?} of {}", self.rows);
        RunsOf { places: self.places, sequence: self.sequence, range }
    }

    fn is_same(&self, other: &Self) -> bool {
        let place = (self.sequence, self.head) == (other.sequence, other.head);
        place && std::ptr::eq(self.tensor, other.tensor) && std::ptr::eq(self.places, other.places)
    }

    /// Calls `visit` with the address of the first row of each run of `range`, and its number of rows. They are for prefetching, which
    /// reads nothing.
    #[inline]
    pub(crate) fn for_each_address(&self, range: Range<usize>, mut visit: impl FnMut(*const u8, usize)) {
        with_elements!(self.tensor, tensor => {
            let [index_stride, _, row_stride, _] = *tensor.strides();
            let first = if tensor.shape()[0] == 0 { std::ptr::null() } else { tensor.matrix(0, self.head).as_ptr() };
            self.places.for_each_run(self.sequence, range, |index, rows| {
                let at = (index as isize).wrapping_mul(index_stride);
                let at = at.wrapping_add((rows.start as isize).wrapping_mul(row_stride));
                visit(first.wrapping_offset(at).cast(), rows.len());
            });
        });
    }

    /// The stride of the rows of a run, and the length of a row, in bytes.
    pub(crate) fn row_bytes(&self) -> (isize, usize) {
        let size = self.tensor.dtype().size();
        let stride = with_elements!(self.tensor, tensor => tensor.strides()[2]);
        (stride.wrapping_mul(size as isize), self.tensor.shape()[3] * size)
    }

    /// Whether the elements of a row are contiguous.
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        self.tensor.shape()[3] <= 1 || with_elements!(self.tensor, tensor => tensor.strides()[3] == 1)
    }

    /// The run that `range` starts with; `None` if it is empty.
    #[inline]
    fn first_run(&self, range: Range<usize>) -> Option<Run<'a>> {
        assert!(range.end <= self.rows, "rows {range:?} of {}", self.rows);
        if range.is_empty() {
            return None;
        }
        let (index, rows) = self.places.first_run(self.sequence, &range);
        Some(Run::new(self.tensor, index, self.head).slice_rows(rows))
    }
}

/// The rows of a head that are in several runs, listed tile by tile. Each row is listed once: as what the tile before prefetches.
#[derive(Debug)]
pub(crate) struct ListedTiles<'m, 'a> {
    rows: ManyRuns<'a>,
    listed: ListedRows<'m, 'a>,
    /// The rows ahead; empty if they are not of this head.
    ahead: Range<usize>,
}

impl<'m, 'a> ListedTiles<'m, 'a> {
    /// Lists the rows `tile`, and what is prefetched while they are read: the rows `next` of `next_rows`.
    ///
    /// # Panics
    /// If there are no such rows, or gaps between the elements of a row of this head.
    pub(crate) fn list(&mut self, tile: Range<usize>, (next_rows, next): (&KeyRows<'_>, Range<usize>)) -> RowList<'_> {
        if tile == self.ahead && !tile.is_empty() {
            self.listed.advance();
        } else {
            self.listed.list(self.rows.runs_of(tile));
        }
        self.ahead = 0..0;
        match next_rows {
            KeyRows::Runs(rows) if rows.has_contiguous_rows() => {
                self.listed.list_ahead(rows.tensor, rows.head, rows.runs_of(next.clone()));
                if rows.is_same(&self.rows) {
                    self.ahead = next;
                }
            }
            _ => self.listed.list_ahead(self.rows.tensor, self.rows.head, self.rows.runs_of(0..0)),
        }
        self.listed.rows()
    }
}

/// The runs of some keys of a sequence.
struct RunsOf<'a> {
    places: &'a Places<'a>,
    sequence: usize,
    range: Range<usize>,
}

impl EachRun for RunsOf<'_> {
    #[inline]
    fn for_each(self, visit: impl FnMut(usize, Range<usize>)) {
        self.places.for_each_run(self.sequence, self.range, visit);
    }
}
