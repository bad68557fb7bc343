//! The trait of masks that go by position.

#![forbid(unsafe_code)]

use std::ops::Range;

/// A mask that shows each query one run of keys, by the query's key position.
///
/// Positions are i128: no sum of an offset, a query and a window overflows.
pub(crate) trait PositionMask {
    /// Whether a query at position `p` sees the key at position `j`: the definition.
    fn sees(&self, p: i128, j: i128) -> bool;

    /// The same as a run of keys: `sees(p, j)` is `span(p).contains(&j)`. It may reach outside the sequence.
    fn span(&self, p: i128) -> Range<i128>;
}
