//! Sizes that the kernels share: panels, register tiles, even blocks.

use crate::simd::{Isa, MAX_LANES, Simd, kernel};

/// Vectors of a full panel. With two, each broadcast serves two multiply-adds. With one, a product needs a load for every
/// multiply-add, and a processor that starts two multiply-adds in a cycle starts only two loads.
pub(crate) const PANEL_VECTORS: usize = 2;

/// Queries side by side in a full panel at a level.
pub(crate) fn panel_lanes(isa: Isa) -> usize {
    PANEL_VECTORS * isa.lanes()
}

/// The most lanes of a panel at any level.
pub(crate) const MAX_PANEL_LANES: usize = PANEL_VECTORS * MAX_LANES;

/// A set of a task's rows: bit n is row n.
pub(crate) type RowSet = u128;

/// Rows of accumulators that a product over `vectors` vectors keeps in registers at a level.
pub(crate) const fn product_rows<S: Simd>(vectors: usize) -> usize {
    S::PRODUCT_ROWS[vectors - 1]
}

kernel! {
    /// Rows of a product over a panel of `lanes` lanes, at a level.
    pub(crate) fn panel_product_rows<S: Simd>(_simd: S, lanes: usize) -> usize { product_rows::<S>(lanes / S::LANES) }
}

/// Dimensions of a block of packed values at a level: the largest multiple of a full panel's product rows that fits a vector,
/// so that packing writes whole vectors that overlap little; at least one product.
pub(crate) const fn value_block_dims<S: Simd>() -> usize {
    let rows = product_rows::<S>(PANEL_VECTORS);
    if rows <= S::LANES { S::LANES / rows * rows } else { rows }
}

kernel! {
    /// [`value_block_dims`], where the level is known at run time.
    pub(crate) fn level_value_block_dims<S: Simd>(_simd: S) -> usize { value_block_dims::<S>() }
}

/// The most rows of a product at any level.
pub(crate) const MAX_PRODUCT_ROWS: usize = 16;

/// Whether a slice of `len` elements holds `rows` rows of `cols`.
#[inline(always)]
pub(in crate::kernel) fn holds(len: usize, rows: usize, cols: usize) -> bool {
    rows.checked_mul(cols).is_some_and(|elements| elements <= len)
}

/// Divides `n` items into the fewest blocks of at most `max_size` items, evenly: the first blocks have one item more than the rest.
///
/// Blocks are even, because a short last block has too few chains of multiply-adds to keep the multipliers busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EvenBlocks {
    pub(crate) count: usize,
    /// Items of each of the smaller blocks.
    size: usize,
    /// The number of blocks that have one item more.
    larger: usize,
}

impl EvenBlocks {
    /// No items.
    pub(crate) const NONE: Self = EvenBlocks { count: 0, size: 0, larger: 0 };

    #[inline(always)]
    pub(crate) fn new(n: usize, max_size: usize) -> Self {
        let count = n.div_ceil(max_size);
        // Without blocks, the size is never read.
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
