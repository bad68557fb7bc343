//! The keys or values of one head of a sequence, in the order of positions, wherever they lie.

#![forbid(unsafe_code)]

use super::Places;
use super::run::Run;
use crate::element::with_elements;
use crate::tensor::any::AnyTensor;
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

/// Runs of fewer rows are copied together before a product reads them.
const SHORT_RUN: usize = 16;

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
            Places::Dense | Places::Filled(_) => KeyRows::Run(Run::new(tensor, b, head)),
            Places::Packed(starts) => {
                let first = starts.get(b) as usize;
                KeyRows::Run(Run::new(tensor, 0, head).slice_rows(first..first + rows))
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
            KeyRows::Runs(rows) => with_elements!(rows.tensor, tensor => tensor.strides()[3] == 1) || self.cols() <= 1,
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

    /// The parts of `range` that products over a few rows of queries read one after the other: runs, or some short runs that are copied
    /// together.
    #[inline]
    pub(crate) fn parts(self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let len = match self {
                _ if rest.is_empty() => return None,
                KeyRows::Run(_) => rest.len(),
                KeyRows::Runs(ManyRuns { places, .. }) if places.run_len() < SHORT_RUN => COPIED_ROWS,
                KeyRows::Runs(rows) => rows.places.first_run(rows.sequence, &rest).1.len(),
            };
            let part = rest.start..rest.end.min(rest.start + len);
            rest.start = part.end;
            Some(part)
        })
    }
}

impl<'a> ManyRuns<'a> {
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
