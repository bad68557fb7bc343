//! Rows with a mask: it is applied while a row is copied to the tile, which the passes of `row.rs` then compute.
#![forbid(unsafe_code)]

use super::buffers::Stored;
use super::row;
use super::scale::Formula;
use super::scratch::{Scratch, Small};
use super::sealed::{FilledRows, Sealed};
use super::short_rows::SHORT;
use crate::simd::{Isa, Kernel, Simd, Streaming};

/// Whether rows of this length are computed here. Shorter rows are computed together, and longer ones block by block.
pub(super) fn fits(len: usize) -> bool {
    (SHORT + 1..=row::ROW_TILE).contains(&len)
}

/// [`Filler`](super::sealed::Filler) for the types whose arithmetic is f32.
pub(super) fn fill<T: Stored>(isa: Isa, x: &[T], visible: Option<&[u8]>, tile: &mut [f32], formula: Formula) -> f32 {
    let scale = formula.scale;
    match visible {
        Some(visible) => isa.run(row::FillVisible { x, visible, tile, scale }),
        None => isa.run(row::Fill { x, tile, scale }),
    }
}

/// Softmax of the rows, or log_softmax.
pub(super) fn softmax<T: Stored + Sealed<Real = f32>>(
    isa: Isa,
    rows: FilledRows<'_, T>,
    formula: Formula,
    scratch: &mut Scratch,
) {
    isa.run(Softmax { rows, formula, scratch });
}

struct Softmax<'a, 's, T: Sealed<Real = f32>> {
    rows: FilledRows<'a, T>,
    formula: Formula,
    scratch: &'s mut Scratch,
}

impl<T: Stored + Sealed<Real = f32>> Kernel for Softmax<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows: FilledRows { fill, mut out, at: [i0, i1], stream }, formula, scratch } = self;
        let ([.., count, len], mut small) = (*out.as_ref().shape(), Small::default());
        let tile = scratch.numbers(&mut small, len);
        // It fences when it is dropped.
        let streaming = if stream { Some(Streaming::new(simd)) } else { None };
        for row in 0..count {
            let Ok(out) = out.row_mut([i0, i1, row]).into_mut_slice() else { unreachable!("neighbours") };
            let (max, next) = fill(row, tile);
            row::softmax_of_filled(simd, (&mut *tile, max), next.cast(), out, formula, streaming.as_ref());
        }
    }
}
