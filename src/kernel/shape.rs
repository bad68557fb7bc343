//! The sizes that the kernels share: panels, register tiles, and even blocks.

use crate::simd::{Isa, Kernel, MAX_LANES, Simd};

/// Vectors of a full panel. A broadcast then serves two multiply-adds: with one vector a product needs a load for each, and
/// where two multiply-adds can start in a cycle, so can only two loads.
pub(crate) const PANEL_VECTORS: usize = 2;

/// Queries side by side in a full panel at a level.
pub(crate) fn panel_lanes(isa: Isa) -> usize {
    PANEL_VECTORS * isa.lanes()
}

/// No panel is wider than this.
pub(crate) const MAX_PANEL_LANES: usize = PANEL_VECTORS * MAX_LANES;

/// Rows of accumulators that a product over `vectors` vectors keeps in registers: what is left of the register file after
/// the right operand, one broadcast and one to spare, but no more than [`MAX_PRODUCT_ROWS`] accumulators. With 16 registers
/// that is 6 rows of two vectors, with 32 it is 8.
pub(crate) const fn product_rows<S: Simd>(vectors: usize) -> usize {
    let accumulators = S::REGISTERS - 4;
    if accumulators < MAX_PRODUCT_ROWS { accumulators / vectors } else { MAX_PRODUCT_ROWS / vectors }
}

/// The same for a panel of so many lanes, at a level.
pub(crate) fn panel_product_rows(isa: Isa, lanes: usize) -> usize {
    struct Rows(usize);
    impl Kernel for Rows {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd>(self, _: S) -> usize {
            product_rows::<S>(self.0 / S::LANES)
        }
    }
    isa.run(Rows(lanes))
}

/// Dimensions of the values that are packed side by side at a level: as many whole products of a full panel as a vector holds,
/// so that packing writes whole vectors that overlap little.
pub(crate) fn value_block_dims(isa: Isa) -> usize {
    let rows = panel_product_rows(isa, panel_lanes(isa));
    (isa.lanes() / rows).max(1) * rows
}

/// No product has more accumulators than this, and so not more rows: two multiply-adds that can start in a cycle and take
/// four keep eight chains busy, sixteen leave room for loads that are late, and heads are multiples of 8.
pub(crate) const MAX_PRODUCT_ROWS: usize = 16;

/// `n` things in the fewest blocks of at most `most`, as even as can be: the first few have one more than the rest.
///
/// Even blocks, because a short last one would leave the multipliers waiting for each other's results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EvenBlocks {
    pub(crate) count: usize,
    /// Things in a block, or one more:
    size: usize,
    /// so many blocks have one more.
    larger: usize,
}

impl EvenBlocks {
    #[inline(always)]
    pub(crate) fn new(n: usize, most: usize) -> Self {
        let count = n.div_ceil(most);
        // (Without blocks, nobody asks for their sizes.)
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
