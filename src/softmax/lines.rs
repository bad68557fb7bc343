//! How the lines of an axis are divided: rows along the last axis, panels along any other.
//!
//! A row of a panel is element i of every line. A panel is a range of lines. It is computed in blocks of [`BLOCK`] rows and in
//! strips (`strips.rs`).
#![forbid(unsafe_code)]

use super::axis::Axis;

/// Rows of a block. A larger block has longer chains of additions; a smaller one has more states. If the length of a row is a
/// power of two, the second cache has few sets for the rows' addresses: it still holds the rows of two blocks.
pub(super) const BLOCK: usize = 32;

/// A panel, or a block of its rows. Its first strips, of one vector each, cover `head` lines; wide strips start after them.
#[derive(Clone, Copy)]
pub(super) struct LinePanel {
    pub(super) first: usize,
    pub(super) len: usize,
    pub(super) width: usize,
    pub(super) head: usize,
}

impl LinePanel {
    /// The panel in blocks of [`BLOCK`] rows.
    #[inline(always)]
    pub(super) fn blocks(self) -> impl Iterator<Item = Self> {
        (0..self.len).step_by(BLOCK).map(move |i| Self {
            first: self.first + i,
            len: BLOCK.min(self.len - i),
            ..self
        })
    }
}

/// The panels of an axis that is not the last. They are a partition of its lines.
#[derive(Clone, Copy)]
pub(super) struct LinePanels {
    axis: Axis,
    max_lines: usize,
    head: usize,
    /// Panels side by side.
    count: usize,
}

/// A panel and where it is in the array.
#[derive(Clone, Copy)]
pub(super) struct PanelPlace {
    /// Its first line.
    pub(super) line: usize,
    /// The index of its first element.
    pub(super) first: usize,
    /// Elements between two rows.
    pub(super) stride: usize,
    pub(super) panel: LinePanel,
}

impl LinePanels {
    /// Panels of at most `max_lines` lines. The first panel of each row has `head` more lines in front.
    pub(super) fn new(axis: Axis, max_lines: usize, head: usize) -> Self {
        let head = head.min(axis.after());
        Self { axis, max_lines, head, count: (axis.after() - head).div_ceil(max_lines).max(1) }
    }

    /// Lines and head of the widest panel.
    pub(super) fn widest(self) -> (usize, usize) {
        (self.axis.after().min(self.max_lines.saturating_add(self.head)), self.head)
    }

    pub(super) fn axis(self) -> Axis {
        self.axis
    }

    /// Panel number `n`.
    pub(super) fn place(self, n: usize) -> PanelPlace {
        let (before, n, stride, len) = (n / self.count, n % self.count, self.axis.after(), self.axis.line_len());
        let (column, head) = if n == 0 { (0, self.head) } else { (self.head + n * self.max_lines, 0) };
        let end = stride.min((n + 1).saturating_mul(self.max_lines).saturating_add(self.head));
        PanelPlace {
            line: before * stride + column,
            first: before * len * stride + column,
            stride,
            panel: LinePanel { first: 0, len, width: end - column, head },
        }
    }
}

/// How the lines of an axis are divided into units, which are computed one at a time.
#[derive(Clone, Copy)]
pub(super) enum Lines {
    /// The last axis: a unit is a row.
    Rows(Axis),
    /// Any other axis: a unit is a panel.
    Panels(LinePanels),
}

impl Lines {
    /// The number of units.
    pub(super) fn count(self) -> usize {
        match self {
            Lines::Rows(axis) => axis.before(),
            Lines::Panels(panels) => panels.axis.before() * panels.count,
        }
    }

    pub(super) fn axis(self) -> Axis {
        match self {
            Lines::Rows(axis) | Lines::Panels(LinePanels { axis, .. }) => axis,
        }
    }
}
