//! What the spans of some queries say about a tile: skip, full, or partial.

#![forbid(unsafe_code)]

use std::ops::Range;

/// The keys that a set of queries sees by position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpanCover {
    /// The smallest run of keys that holds every query's span. Keys outside are skipped.
    pub(crate) span: Range<usize>,
    /// The run of keys that all of the queries see. Pairs in it are not compared with bounds.
    pub(crate) full: Range<usize>,
}

impl SpanCover {
    /// The cover of queries that see `spans`, one run of keys each.
    pub(crate) fn new(spans: impl Iterator<Item = Range<usize>> + Clone) -> Self {
        let full = spans.clone().reduce(|a, b| a.start.max(b.start)..a.end.min(b.end)).unwrap_or(0..0);
        SpanCover { span: union(spans), full: if full.is_empty() { 0..0 } else { full } }
    }

    /// The part of `keys` inside the span.
    pub(crate) fn seen(&self, keys: &Range<usize>) -> Range<usize> {
        keys.start.max(self.span.start)..keys.end.min(self.span.end)
    }

    /// Whether every query sees all of `keys`.
    pub(crate) fn is_full(&self, keys: &Range<usize>) -> bool {
        self.full.start <= keys.start && keys.end <= self.full.end
    }

    /// Cuts `keys`, which lie inside the span, into a partial, a full and a partial part.
    pub(crate) fn parts(&self, keys: &Range<usize>) -> [Range<usize>; 3] {
        let start = self.full.start.clamp(keys.start, keys.end);
        let end = self.full.end.clamp(start, keys.end);
        [keys.start..start, start..end, end..keys.end]
    }
}

/// The smallest run that holds all of `spans`; empty spans don't count.
pub(crate) fn union(spans: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    spans.filter(|span| !span.is_empty()).reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
}
