//! Strips of a panel, of one or [`WIDE`] vectors, and how they are loaded and stored.
#![forbid(unsafe_code)]

use super::lines::LinePanel;
use super::shared::{Panel, PanelMut};
use crate::element::Element;
use crate::simd::{Simd, Streaming};

/// Neighbouring lines of a panel: `len` of its rows, from `first`, and the columns from `column`.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    pub(super) first: usize,
    pub(super) len: usize,
    pub(super) column: usize,
    /// Lines side by side: `V * LANES`. A strip of one vector may have fewer.
    pub(super) width: usize,
}

impl Strip {
    /// Row i of the strip: element i of every line.
    #[inline(always)]
    pub(super) fn row<T>(self, x: Panel<'_, T>, i: usize) -> &[T] {
        x.row(self.first + i, self.column, self.width)
    }

    /// [`row`](Self::row), to be written.
    #[inline(always)]
    pub(super) fn row_mut<'a, T>(self, out: &'a mut PanelMut<'_, T>, i: usize) -> &'a mut [T] {
        out.row(self.first + i, self.column, self.width)
    }
}

/// Vectors side by side in a wide strip. With eight lanes they are two cache lines of f32, or one of a half type. With sixteen
/// lanes a block of a strip is 8 KiB of the tile.
pub(super) const WIDE: usize = 4;

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
        let (panel, column, offset) = (self.panel, self.column, self.offset);
        let left = panel.width - column;
        if left == 0 {
            return None;
        }
        let width = if column < panel.head {
            (panel.head - column).min(self.lanes)
        } else {
            let fits = |vectors: &usize| vectors * self.lanes <= left;
            [self.widest, WIDE].into_iter().find(fits).map_or(left.min(self.lanes), |vectors| vectors * self.lanes)
        };
        self.column += width;
        self.offset += width.next_multiple_of(self.lanes);
        Some((offset, Strip { first: panel.first, len: panel.len, column, width }))
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
