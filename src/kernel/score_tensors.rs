//! What tensors say about single scores: an additive bias, and a boolean mask, which for a row becomes a bias of 0 or -inf.

use crate::element::{Element, bf16, f16, with_elements};
use crate::kernel::transpose::LaneRows;
use crate::kernel::widen::widen;
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::any::{AnyMatrix, AnyTensor};
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::Strided;
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
            Some(bias) => with_elements!(bias, bias => widen(simd, bias.row(row).slice(keys.clone()), 1.0, self.to)),
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

/// What tensors say about the scores of a panel: a row for each lane, lanes without one repeating the last.
pub(crate) struct PanelTensors<'a> {
    pub(in crate::kernel) bias: Option<AnyLaneRows<'a>>,
    /// Whether all of the bias is 0 or -inf, so that there is nothing to add.
    pub(in crate::kernel) only_hides: bool,
    /// Not 0 where the query may attend.
    pub(in crate::kernel) mask: Option<LaneRows<'a, u8>>,
    /// Lanes that have a row of their own.
    rows: usize,
}

/// Rows of any type.
pub(in crate::kernel) enum AnyLaneRows<'a> {
    F32(LaneRows<'a, f32>),
    F16(LaneRows<'a, f16>),
    Bf16(LaneRows<'a, bf16>),
}

impl<'a> PanelTensors<'a> {
    /// The elements `keys` of the rows `place(n)`, for `n < count`; `None` if there are gaps between them.
    pub(crate) fn new(
        bias: Option<&AnyTensor<'a>>,
        mask: Option<&Strided<'a, u8, 4>>,
        keys: Range<usize>,
        count: usize,
        place: impl Fn(usize) -> [usize; 3],
    ) -> Option<Self> {
        let bias = match bias {
            None => None,
            Some(AnyTensor::F32(bias)) => Some(AnyLaneRows::F32(LaneRows::new(bias, keys.clone(), count, &place)?)),
            Some(AnyTensor::F16(bias)) => Some(AnyLaneRows::F16(LaneRows::new(bias, keys.clone(), count, &place)?)),
            Some(AnyTensor::Bf16(bias)) => Some(AnyLaneRows::Bf16(LaneRows::new(bias, keys.clone(), count, &place)?)),
        };
        let mask = match mask {
            None => None,
            Some(mask) => Some(LaneRows::new(mask, keys, count, &place)?),
        };
        Some(Self { bias, only_hides: false, mask, rows: count })
    }

    /// Rows that [`read_bias`] has written, as far apart as they are long.
    pub(crate) fn of_rows(rows: &'a [f32], count: usize, only_hides: bool) -> Self {
        let len = rows.len() / count;
        let lanes = LaneRows::of(count, |n| Some(&rows[n * len..(n + 1) * len])).expect("slices");
        Self { bias: Some(AnyLaneRows::F32(lanes)), only_hides, mask: None, rows: count }
    }

    /// Whether they leave any key visible to any lane.
    pub(crate) fn any_visible(&self) -> bool {
        match &self.bias {
            None => any_visible::<f32>(self.rows, None, self.mask.as_ref()),
            Some(AnyLaneRows::F32(bias)) => any_visible(self.rows, Some(bias), self.mask.as_ref()),
            Some(AnyLaneRows::F16(bias)) => any_visible(self.rows, Some(bias), self.mask.as_ref()),
            Some(AnyLaneRows::Bf16(bias)) => any_visible(self.rows, Some(bias), self.mask.as_ref()),
        }
    }
}

fn any_visible<T: Element>(rows: usize, bias: Option<&LaneRows<'_, T>>, mask: Option<&LaneRows<'_, u8>>) -> bool {
    let hidden = T::from_f32(f32::NEG_INFINITY);
    // A few elements at a time, all of which are looked at: that is done by vectors. Most often the first few will do.
    (0..rows).any(|lane| match (bias.map(|rows| rows.row(lane)), mask.map(|rows| rows.row(lane))) {
        (None, None) => true,
        // NaN is not -inf: it has to show.
        (Some(bias), None) => bias.chunks(64).any(|bias| bias.iter().fold(false, |seen, x| seen | (*x != hidden))),
        (None, Some(mask)) => mask.chunks(64).any(|mask| mask.iter().fold(0, |seen, x| seen | x) != 0),
        (Some(bias), Some(mask)) => bias.chunks(64).zip(mask.chunks(64)).any(|(bias, mask)| {
            bias.iter().zip(mask).fold(false, |seen, (bias, mask)| seen | ((*bias != hidden) & (*mask != 0)))
        }),
    })
}
