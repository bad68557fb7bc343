//! The sizes that the kernels share: panels, register tiles, and even blocks.

use crate::simd::{Isa, MAX_LANES, Simd, kernel};

/// Vectors of a full panel. A broadcast then serves two multiply-adds: with one vector a product needs a load for each, and
/// where two multiply-adds can start in a cycle, so can only two loads.
pub(crate) const PANEL_VECTORS: usize = 2;

/// Queries side by side in a full panel at a level.
pub(crate) fn panel_lanes(isa: Isa) -> usize {
    PANEL_VECTORS * isa.lanes()
}

/// No panel is wider than this.
pub(crate) const MAX_PANEL_LANES: usize = PANEL_VECTORS * MAX_LANES;

/// Rows of accumulators that a product over `vectors` vectors keeps in registers at a level.
pub(crate) const fn product_rows<S: Simd>(vectors: usize) -> usize {
    S::PRODUCT_ROWS[vectors - 1]
}

kernel! {
    /// Rows of a product over a panel of `lanes` lanes, at a level.
    pub(crate) fn panel_product_rows<S: Simd>(_simd: S, lanes: usize) -> usize { product_rows::<S>(lanes / S::LANES) }
}

/// Dimensions of the values that are packed side by side at a level: as many whole products of a full panel as a vector holds,
/// so that packing writes whole vectors that overlap little, but one product at least.
pub(crate) const fn value_block_dims<S: Simd>() -> usize {
    let rows = product_rows::<S>(PANEL_VECTORS);
    if rows <= S::LANES { S::LANES / rows * rows } else { rows }
}

kernel! {
    /// [`value_block_dims`], where the level is known at run time.
    pub(crate) fn level_value_block_dims<S: Simd>(_simd: S) -> usize { value_block_dims::<S>() }
}

/// No product has more rows than this.
pub(crate) const MAX_PRODUCT_ROWS: usize = 16;

/// Whether a slice of `len` elements holds `rows` rows of `cols`.
#[inline(always)]
pub(in crate::kernel) fn holds(len: usize, rows: usize, cols: usize) -> bool {
    rows.checked_mul(cols).is_some_and(|elements| elements <= len)
}

/// `n` things in the fewest blocks of at most `most`, as even as can be: the first few have one more than the rest.
///
/// Even blocks, because a short last one would leave the multipliers waiting for each other's results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EvenBlocks {
    pub(crate) count: usize,
    /// Things in a block, or one less than in it:
    size: usize,
    /// the number of blocks that have one more.
    larger: usize,
}

impl EvenBlocks {
    #[inline(always)]
    pub(crate) fn new(n: usize, most: usize) -> Self {
        let count = n.div_ceil(most);
        // (Without blocks, the size is never read.)
        let size = n.checked_div(count).unwrap_or(0);
        EvenBlocks { count, size, larger: n - size * count }
    }

    #[inline(always)]
    pub(crate) fn start(&self, b: usize) -> usize {
        b * self.size + b.min(self.larger)
    }

    #[inline(always)]
    pub(crate) fn range(&self, b: usize) -> std::ops::Range<usize> {
        self.start(b)..self.start(b + 1)
    }
}

/// `n` rounded up to whole vectors of any level.
pub(crate) const fn round_up_lanes(n: usize) -> usize {
    n.next_multiple_of(MAX_LANES)
}
