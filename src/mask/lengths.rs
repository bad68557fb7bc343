//! Key lengths: keys from the length on are padding.

#![forbid(unsafe_code)]

use super::by_position::PositionMask;
use std::ops::Range;

/// `0 <= j < length`, for every query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lengths {
    pub(crate) length: usize,
}

impl PositionMask for Lengths {
    fn sees(&self, _: i128, j: i128) -> bool {
        0 <= j && j < self.length as i128
    }

    fn span(&self, _: i128) -> Range<i128> {
        0..self.length as i128
    }
}
