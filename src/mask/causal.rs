//! Causal order: a query sees the key at its own position and those before it.

#![forbid(unsafe_code)]

use super::by_position::PositionMask;
use std::ops::Range;

/// `j <= p`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Causal;

impl PositionMask for Causal {
    fn sees(&self, p: i128, j: i128) -> bool {
        j <= p
    }

    fn span(&self, p: i128) -> Range<i128> {
        i128::MIN..p + 1
    }
}
