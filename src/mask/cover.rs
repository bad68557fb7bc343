//! What a mask by position says about a tile: skip it, it is full, or it is partial.

#![forbid(unsafe_code)]

use std::ops::Range;

/// What some queries see of the keys by their positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cover {
    /// The smallest run with every key that any of the queries sees: other keys are skipped.
    pub(crate) span: Range<usize>,
    /// The run of keys that all of the queries see: no pair among them needs a look.
    pub(crate) full: Range<usize>,
}

impl Cover {
    /// The cover of queries that see `spans`, one run of keys each.
    pub(crate) fn new(spans: impl Iterator<Item = Range<usize>> + Clone) -> Self {
        let full = spans.clone().reduce(|a, b| a.start.max(b.start)..a.end.min(b.end)).unwrap_or(0..0);
        Cover { span: union(spans), full: if full.is_empty() { 0..0 } else { full } }
    }

    /// Those of `keys` that any of the queries sees.
    pub(crate) fn seen(&self, keys: &Range<usize>) -> Range<usize> {
        keys.start.max(self.span.start)..keys.end.min(self.span.end)
    }

    /// Whether every query sees all of `keys`.
    pub(crate) fn is_full(&self, keys: &Range<usize>) -> bool {
        self.full.start <= keys.start && keys.end <= self.full.end
    }

    /// `keys`, which lie inside the span, cut into a partial, a full and a partial part.
    pub(crate) fn parts(&self, keys: &Range<usize>) -> [Range<usize>; 3] {
        let start = self.full.start.clamp(keys.start, keys.end);
        let end = self.full.end.clamp(start, keys.end);
        [keys.start..start, start..end, end..keys.end]
    }
}

/// The smallest run that holds all of `spans`, empty ones aside.
pub(crate) fn union(spans: impl Iterator<Item = Range<usize>>) -> Range<usize> {
    spans.filter(|span| !span.is_empty()).reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
}
