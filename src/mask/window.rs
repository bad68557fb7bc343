//! Windows: a query sees the keys within some distance of its own position.

#![forbid(unsafe_code)]

use super::by_position::PositionMask;
use std::ops::Range;

/// `p - left <= j <= p + right`; `None` sets no bound on that side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) left: Option<usize>,
    pub(crate) right: Option<usize>,
}

impl Window {
    /// The keys that both windows show.
    pub(crate) fn intersect(self, other: Window) -> Window {
        let smaller = |a: Option<usize>, b: Option<usize>| a.into_iter().chain(b).min();
        Window { left: smaller(self.left, other.left), right: smaller(self.right, other.right) }
    }
}

impl PositionMask for Window {
    fn sees(&self, p: i128, j: i128) -> bool {
        self.left.is_none_or(|left| p - left as i128 <= j) && self.right.is_none_or(|right| j <= p + right as i128)
    }

    fn span(&self, p: i128) -> Range<i128> {
        let start = self.left.map_or(i128::MIN, |left| p - left as i128);
        let end = self.right.map_or(i128::MAX, |right| p + right as i128 + 1);
        start..end
    }
}
