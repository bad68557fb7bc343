//! The trait of masks by position.

#![forbid(unsafe_code)]

use std::ops::Range;

/// A mask that shows each query one run of keys, by the query's key position.
///
/// Positions are i128, so that no sum of an offset, a query and a window overflows.
pub(crate) trait PositionMask {
    /// Whether a query at position `p` sees the key at position `j`: the definition.
    fn sees(&self, p: i128, j: i128) -> bool;

    /// The keys that it sees, as a run: `sees(p, j)` is `span(p).contains(&j)`. It may extend outside the sequence.
    fn span(&self, p: i128) -> Range<i128>;
}
