//! What tensors say about single scores: an additive bias, and a boolean mask, which for a row becomes a bias of 0 or -inf.

use super::task::TaskInput;
use super::transpose::LaneRows;
use super::widen::widen;
use crate::element::{ByElement, Element, bf16, f16, with_elements};
use crate::simd::{Kernel, Simd};
use crate::tensor::group::{AnyGroupRows, GroupRows};
use crate::tensor::matrix::Row;
use std::ops::Range;

/// Writes what bias and mask say about `keys` for row `row`: the bias of each key in natural units, -inf where the mask
/// hides it.
///
/// * `to`: one element a key
pub(crate) fn read_row(task: &TaskInput<'_>, row: usize, keys: Range<usize>, to: &mut [f32]) {
    assert!(to.len() == keys.len());
    task.isa.run(ReadRow { bias: task.bias_rows, mask: task.mask_rows, row, keys, to });
}

struct ReadRow<'a, 't> {
    bias: Option<AnyGroupRows<'a>>,
    /// Not 0 where the query may attend.
    mask: Option<GroupRows<'a, u8>>,
    row: usize,
    keys: Range<usize>,
    to: &'t mut [f32],
}

impl Kernel for ReadRow<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ReadRow { bias, mask, row, keys, to } = self;
        match bias {
            Some(bias) => with_elements!(bias, bias => widen(simd, bias.row(row).slice(keys.clone()), 1.0, to)),
            None => to.fill(0.0),
        }
        if let Some(mask) = mask {
            hide(simd, mask.row(row).slice(keys), to);
        }
    }
}

#[inline(always)]
fn hide<S: Simd>(simd: S, sees: Row<'_, u8>, to: &mut [f32]) {
    let hidden = simd.splat(f32::NEG_INFINITY);
    let vectors = sees.as_slice().map_or(0, |sees| sees.len() / S::LANES);
    if let Some(sees) = sees.as_slice() {
        for (sees, to) in sees.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
            // SAFETY: a chunk has LANES elements.
            let sees = unsafe { simd.load_mask(sees.as_ptr()) };
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
    pub(super) bias: Option<AnyLaneRows<'a>>,
    /// Whether all of the bias is 0 or -inf, so that there is nothing to add.
    pub(super) only_hides: bool,
    /// Not 0 where the query may attend.
    pub(super) mask: Option<LaneRows<'a, u8>>,
    /// Lanes that have a row of their own.
    rows: usize,
}

/// Rows of any element type.
pub(super) type AnyLaneRows<'a> = ByElement<LaneRows<'a, f32>, LaneRows<'a, f16>, LaneRows<'a, bf16>>;

impl<'a> PanelTensors<'a> {
    /// What the task's tensors say about `keys` for the rows of a panel.
    ///
    /// * `copies`: `[rows][keys]` or more, for tensors whose rows have gaps
    pub(crate) fn new(task: &TaskInput<'a>, rows: Range<usize>, keys: Range<usize>, copies: &'a mut [f32]) -> Self {
        if let Some(in_place) = Self::in_place(task, rows.clone(), keys.clone()) {
            return in_place;
        }
        let (count, len) = (rows.len(), keys.len());
        let copies = &mut copies[..count * len];
        for (row, to) in rows.zip(copies.chunks_exact_mut(len)) {
            read_row(task, row, keys.clone(), to);
        }
        let copies = &*copies;
        let lanes = LaneRows::new(count, |n| Some(&copies[n * len..(n + 1) * len])).expect("slices");
        Self { bias: Some(ByElement::F32(lanes)), only_hides: task.bias_rows.is_none(), mask: None, rows: count }
    }

    /// `None` if there are gaps between the elements of a row.
    fn in_place(task: &TaskInput<'a>, rows: Range<usize>, keys: Range<usize>) -> Option<Self> {
        let count = rows.len();
        let bias = match task.bias_rows.map(|all| all.slice(rows.clone())) {
            None => None,
            Some(ByElement::F32(bias)) => Some(ByElement::F32(LaneRows::of_group(bias, keys.clone())?)),
            Some(ByElement::F16(bias)) => Some(ByElement::F16(LaneRows::of_group(bias, keys.clone())?)),
            Some(ByElement::Bf16(bias)) => Some(ByElement::Bf16(LaneRows::of_group(bias, keys.clone())?)),
        };
        let mask = match task.mask_rows {
            None => None,
            Some(mask) => Some(LaneRows::of_group(mask.slice(rows), keys)?),
        };
        Some(Self { bias, only_hides: false, mask, rows: count })
    }

    /// Whether they leave any key visible to any lane.
    pub(crate) fn any_visible(&self) -> bool {
        match &self.bias {
            None => any_visible::<f32>(self.rows, None, self.mask.as_ref()),
            Some(ByElement::F32(bias)) => any_visible(self.rows, Some(bias), self.mask.as_ref()),
            Some(ByElement::F16(bias)) => any_visible(self.rows, Some(bias), self.mask.as_ref()),
            Some(ByElement::Bf16(bias)) => any_visible(self.rows, Some(bias), self.mask.as_ref()),
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
