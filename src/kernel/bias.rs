//! What tensors say about single scores: an additive bias, and a boolean mask as a bias of 0 or -inf.

use super::load::{AnyMatrix, with_matrix};
use super::pack::widen;
use crate::simd::{Isa, Kernel, Simd};
use crate::strided::Matrix;
use std::ops::Range;

/// Bias and boolean mask of one query, for some keys.
#[derive(Clone, Debug)]
pub(crate) struct BiasRow<'a> {
    /// The number of the row in its matrix.
    pub(crate) row: usize,
    pub(crate) keys: Range<usize>,
    pub(crate) bias: Option<AnyMatrix<'a>>,
    /// Not 0 where the query may attend.
    pub(crate) mask: Option<Matrix<'a, u8>>,
}

/// Writes the bias of each key, in natural units, -inf where the mask says no; returns whether any is above -inf.
///
/// * `to`: one element a key
pub(crate) fn read_bias(isa: Isa, from: BiasRow<'_>, to: &mut [f32]) -> bool {
    assert!(to.len() == from.keys.len());
    isa.run(ReadBias { from, to })
}

struct ReadBias<'a> {
    from: BiasRow<'a>,
    to: &'a mut [f32],
}

impl Kernel for ReadBias<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let BiasRow { row, keys, bias, mask } = self.from;
        match bias {
            Some(bias) => with_matrix!(bias, bias => widen(simd, bias.row(row).slice(keys.clone()), 1.0, self.to)),
            None => self.to.fill(0.0),
        }
        if let Some(mask) = mask {
            hide(simd, mask, row, keys, self.to);
        }
        // NaN is not -inf: it has to show.
        let hidden = simd.splat(f32::NEG_INFINITY);
        let mut seen = simd.zero();
        for bias in self.to.chunks(S::LANES) {
            let bias = simd.load_part(bias, f32::NEG_INFINITY);
            seen = simd.max(seen, simd.select(simd.eq(bias, hidden), simd.zero(), simd.splat(1.0)));
        }
        simd.max_lane(seen) > 0.0
    }
}

#[inline(always)]
fn hide<S: Simd>(simd: S, mask: Matrix<'_, u8>, row: usize, keys: Range<usize>, to: &mut [f32]) {
    let hidden = simd.splat(f32::NEG_INFINITY);
    let sees = mask.row(row).slice(keys);
    let vectors = sees.as_slice().map_or(0, |sees| sees.len() / S::LANES);
    if let Some(sees) = sees.as_slice() {
        for (sees, to) in sees.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
            // SAFETY: a chunk has LANES elements.
            let sees = unsafe { simd.load_answers(sees.as_ptr()) };
            simd.store_slice(to, simd.select(sees, simd.load_slice(to), hidden));
        }
    }
    for (sees, to) in sees.iter().zip(to).skip(vectors * S::LANES) {
        if sees == 0 {
            *to = f32::NEG_INFINITY;
        }
    }
}
