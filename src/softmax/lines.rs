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
        (0..self.len).step_by(BLOCK).map(move |i| Self { first: self.first + i, len: BLOCK.min(self.len - i), ..self })
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Workers write to panels at the same time, so no line may be in two, and none may be missing.
    #[test]
    fn panels_are_a_partition() {
        for (shape, axis) in [([3, 5, 70], 1), ([1, 2, 1000], 1), ([7, 2, 1], 0), ([1, 1, 16], 1), ([2, 3, 17], 1)] {
            let axis = Axis::new(&shape, axis).unwrap();
            for (max_lines, head) in [(1, 0), (16, 0), (16, 3), (32, 15), (64, 1), (usize::MAX, 0), (usize::MAX, 9)] {
                let panels = LinePanels::new(axis, max_lines, head);
                let mut times = vec![0; axis.elements()];
                for n in 0..Lines::Panels(panels).count() {
                    let PanelPlace { line, first, stride, panel } = panels.place(n);
                    assert!(panel.width <= panels.widest().0 && panel.head <= panels.widest().1);
                    let before = line / axis.after() * axis.line_len() * axis.after();
                    assert_eq!((first, stride, panel.first), (before + line % axis.after(), axis.after(), 0));
                    for i in 0..panel.len {
                        times[first + i * stride..][..panel.width].iter_mut().for_each(|times| *times += 1);
                    }
                }
                assert!(times.iter().all(|&times| times == 1), "{axis:?} {max_lines} {head}");
            }
        }
    }
}
