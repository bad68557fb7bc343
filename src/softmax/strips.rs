//! Panels and strips: neighbouring lines of an axis that is not the last.
//!
//! A row is element i of every line. A panel is a range of lines. It is computed in strips of one or [`WIDE`] vectors, and in
//! blocks of [`BLOCK`] rows.
#![forbid(unsafe_code)]

use super::axis::Axis;
use crate::element::Element;
use crate::simd::{Simd, Streaming};

/// Neighbouring lines. Row i of the strip, element i of every line, starts at `first + i * stride`.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) first: usize,
    pub(super) stride: usize,
    pub(super) len: usize,
    /// Lines side by side: `V * LANES`. A strip of one vector may have fewer.
    pub(super) width: usize,
}

/// Vectors side by side in a wide strip. With eight lanes they are two cache lines of f32, or one of a half type. With sixteen
/// lanes a block of a strip is 8 KiB of the tile.
pub(super) const WIDE: usize = 4;

/// Rows of a block. A larger block has longer chains of additions; a smaller one has more states. If the length of a row is a
/// power of two, the second cache has few sets for the rows' addresses: it still holds the rows of two blocks.
pub(super) const BLOCK: usize = 32;

/// Vectors side by side where registers hold nothing but maxima. A wider strip reads longer runs of each row.
pub(super) const WIDEST: usize = 16;

/// Runs `$body` with `$v` as the number of vectors of a strip: `WIDE` or 1.
macro_rules! with_vectors {
    ($strip:expr, $s:ty, $v:ident => $body:expr) => {
        if $strip.width == $crate::softmax::strips::WIDE * <$s>::LANES {
            const $v: usize = $crate::softmax::strips::WIDE;
            $body
        } else {
            const $v: usize = 1;
            $body
        }
    };
}

pub(super) use with_vectors;

/// Neighbouring strips. The first strips, of one vector each, cover `head` lines; wide strips start after them.
#[derive(Clone, Copy)]
pub(super) struct LinePanel {
    pub(super) lines: Strip,
    pub(super) head: usize,
}

impl LinePanel {
    /// Every strip, with its offset in a row of states.
    #[inline(always)]
    pub(super) fn strips<S: Simd>(self) -> Strips {
        Strips { panel: self, lanes: S::LANES, widest: WIDE, column: 0, offset: 0 }
    }

    /// The same for a pass that computes maxima: strips of up to [`WIDEST`] vectors if the registers hold that many.
    #[inline(always)]
    pub(super) fn strips_for_max<S: Simd>(self) -> Strips {
        Strips { widest: if S::REGISTERS > WIDEST { WIDEST } else { WIDE }, ..self.strips::<S>() }
    }

    /// The panel in blocks of [`BLOCK`] rows.
    #[inline(always)]
    pub(super) fn blocks(self) -> impl Iterator<Item = Self> {
        let Strip { first, stride, len, width } = self.lines;
        (0..len).step_by(BLOCK).map(move |i| Self {
            lines: Strip { first: first + i * stride, stride, len: BLOCK.min(len - i), width },
            head: self.head,
        })
    }
}

/// The strips of a panel, each with its offset in a row of states.
pub(super) struct Strips {
    panel: LinePanel,
    lanes: usize,
    widest: usize,
    column: usize,
    offset: usize,
}

impl Iterator for Strips {
    type Item = (usize, Strip);
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (lines, column, offset) = (self.panel.lines, self.column, self.offset);
        let left = lines.width - column;
        if left == 0 {
            return None;
        }
        let width = if column < self.panel.head {
            (self.panel.head - column).min(self.lanes)
        } else {
            let fits = |vectors: &usize| vectors * self.lanes <= left;
            [self.widest, WIDE].into_iter().find(fits).map_or(left.min(self.lanes), |vectors| vectors * self.lanes)
        };
        self.column += width;
        self.offset += width.next_multiple_of(self.lanes);
        Some((offset, Strip { first: lines.first + column, width, ..lines }))
    }
}

/// `V` neighbouring vectors. A single vector may be short: lanes past its end are -inf.
#[inline(always)]
pub(super) fn load<S: Simd, T: Element, const V: usize>(simd: S, x: &[T]) -> [S::F32; V] {
    if x.len() == V * S::LANES {
        let mut y = [simd.zero(); V];
        for v in 0..V {
            y[v] = simd.load_elements(&x[v * S::LANES..]);
        }
        y
    } else {
        [simd.load_elements_part(x, f32::NEG_INFINITY); V]
    }
}

/// Stores `V` neighbouring vectors. A wide strip is stored past the caches if `stream` is given.
#[inline(always)]
pub(super) fn store<S: Simd, T: Element, const V: usize>(
    simd: S,
    out: &mut [T],
    y: [S::F32; V],
    stream: Option<&Streaming<S>>,
) {
    if V == 1 {
        return simd.store_elements_part(out, y[0]);
    }
    for v in (0..V).step_by(2) {
        let (out, pair) = (&mut out[v * S::LANES..], [y[v], y[v + 1]]);
        match stream {
            Some(stream) => stream.store_pair(out, pair),
            None => simd.store_pair(out, pair),
        }
    }
}

/// Every panel of an axis that is not the last, with the number of its first line.
#[derive(Clone, Copy)]
pub(super) struct LinePanels {
    axis: Axis,
    max_lines: usize,
    head: usize,
    line: usize,
}

impl LinePanels {
    /// Panels of at most `max_lines` lines. The first panel of each row has `head` more lines in front.
    pub(super) fn new(axis: Axis, max_lines: usize, head: usize) -> Self {
        Self { axis, max_lines, head, line: 0 }
    }

    /// Lines and head of the widest panel.
    pub(super) fn widest(self) -> (usize, usize) {
        (self.axis.after().min(self.max_lines.saturating_add(self.head)), self.head.min(self.axis.after()))
    }
}

impl Iterator for LinePanels {
    type Item = (usize, LinePanel);
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.line == self.axis.lines() {
            return None;
        }
        let (line, len, stride) = (self.line, self.axis.line_len(), self.axis.after());
        let (before, column) = (line / stride, line % stride);
        let head = if column == 0 { self.head.min(stride) } else { 0 };
        let width = (stride - column).min(self.max_lines.saturating_add(head));
        self.line += width;
        Some((line, LinePanel { lines: Strip { first: before * len * stride + column, stride, len, width }, head }))
    }
}
