//! Tensors with an element for each score: the additive bias and the boolean mask. For a row, the mask is read as a bias of 0
//! or -inf.

use super::lane_elements::LaneElements;
use super::task::TaskInput;
use super::transpose::LaneRows;
use super::widen::widen;
use crate::element::{ByElement, Element, bf16, f16, with_elements};
use crate::simd::{Kernel, Simd};
use crate::tensor::group::{AnyGroupRows, GroupRows};
use crate::tensor::matrix::Row;
use std::ops::Range;

/// Writes the bias of row `row` for `keys`, in natural units, with -inf where the mask hides a key.
///
/// * `to`: one element for each key
pub(crate) fn read_row(task: &TaskInput<'_>, row: usize, keys: Range<usize>, to: &mut [f32]) {
    assert!(to.len() == keys.len());
    task.isa.run(ReadRow { bias: task.bias_rows, mask: task.mask_rows, row, keys, to });
}

/// The part of `keys`, in steps of `grain`, that holds all that the mask shows to any row; all of `keys` if the elements of its rows have
/// gaps between them.
pub(crate) fn shown_by_mask(task: &TaskInput<'_>, keys: &Range<usize>, grain: usize) -> Range<usize> {
    let Some(mask) = task.mask_rows else { return keys.clone() };
    let (mut first, mut last) = (usize::MAX, 0);
    for n in 0..task.rows {
        let row = mask.row(n).slice(keys.clone());
        let Some(sees) = row.as_slice() else { return keys.clone() };
        first = first.min(sees.chunks(grain).position(shows_any).unwrap_or(usize::MAX));
        last = last.max(sees.chunks(grain).rposition(shows_any).unwrap_or(0));
    }
    if first == usize::MAX {
        return keys.start..keys.start;
    }
    keys.start + first * grain..keys.end.min(keys.start + (last + 1) * grain)
}

/// Whether a run of a mask shows anything. 64 elements at a time, without an early exit, so that the compiler vectorises the test.
/// Usually the first 64 decide.
fn shows_any(mask: &[u8]) -> bool {
    mask.chunks(64).any(|mask| mask.iter().fold(0, |seen, x| seen | x) != 0)
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

/// The bias and mask of a panel.
pub(crate) struct PanelTensors<'a> {
    pub(super) bias: Option<AnyLaneElements<'a>>,
    /// Whether every bias is 0 or -inf, so that none has to be added.
    pub(super) only_hides: bool,
    /// Not 0 where the query may attend.
    pub(super) mask: Option<LaneElements<'a, u8>>,
}

/// Elements of any type.
pub(super) type AnyLaneElements<'a> = ByElement<LaneElements<'a, f32>, LaneElements<'a, f16>, LaneElements<'a, bf16>>;

impl<'a> PanelTensors<'a> {
    /// The bias and mask of a panel's rows for `keys`.
    ///
    /// * `lanes`: the panel's number of lanes
    /// * `copies`: `[rows][keys]` or more, for tensors whose rows have gaps
    pub(crate) fn new(
        task: &TaskInput<'a>,
        rows: Range<usize>,
        lanes: usize,
        keys: Range<usize>,
        copies: &'a mut [f32],
    ) -> Self {
        if let Some(in_place) = Self::in_place(task, rows.clone(), lanes, keys.clone()) {
            return in_place;
        }
        let (count, len) = (rows.len(), keys.len());
        let copies = &mut copies[..count * len];
        for (row, to) in rows.zip(copies.chunks_exact_mut(len)) {
            read_row(task, row, keys.clone(), to);
        }
        let copies = &*copies;
        let rows = LaneRows::new(count, |n| Some(&copies[n * len..(n + 1) * len])).expect("slices");
        let bias = Some(ByElement::F32(LaneElements::Rows(rows)));
        Self { bias, only_hides: task.bias_rows.is_none(), mask: None }
    }

    /// `None` if a tensor has gaps between the elements of a row and of a column.
    fn in_place(task: &TaskInput<'a>, rows: Range<usize>, lanes: usize, keys: Range<usize>) -> Option<Self> {
        let bias = match task.bias_rows.map(|all| all.slice(rows.clone())) {
            None => None,
            Some(ByElement::F32(bias)) => Some(ByElement::F32(LaneElements::of_group(bias, keys.clone(), lanes)?)),
            Some(ByElement::F16(bias)) => Some(ByElement::F16(LaneElements::of_group(bias, keys.clone(), lanes)?)),
            Some(ByElement::Bf16(bias)) => Some(ByElement::Bf16(LaneElements::of_group(bias, keys.clone(), lanes)?)),
        };
        let mask = match task.mask_rows {
            None => None,
            Some(mask) => Some(LaneElements::of_group(mask.slice(rows), keys, lanes)?),
        };
        Some(Self { bias, only_hides: false, mask })
    }

    /// Whether any lane may see any key. Where bias and mask lie in different orders, each is asked alone.
    pub(crate) fn any_visible(&self) -> bool {
        match &self.bias {
            None => any_visible::<f32>(None, self.mask.as_ref()),
            Some(ByElement::F32(bias)) => any_visible(Some(bias), self.mask.as_ref()),
            Some(ByElement::F16(bias)) => any_visible(Some(bias), self.mask.as_ref()),
            Some(ByElement::Bf16(bias)) => any_visible(Some(bias), self.mask.as_ref()),
        }
    }
}

fn any_visible<T: Element>(bias: Option<&LaneElements<'_, T>>, mask: Option<&LaneElements<'_, u8>>) -> bool {
    use LaneElements::{Columns, Rows};
    let hidden = T::from_f32(f32::NEG_INFINITY);
    // As `shows_any`. NaN is not -inf: it does not hide its key.
    let shows_bias = |bias: &[T]| bias.chunks(64).any(|bias| bias.iter().fold(false, |seen, x| seen | (*x != hidden)));
    let shows_both = |(bias, mask): (&[T], &[u8])| {
        bias.chunks(64).zip(mask.chunks(64)).any(|(bias, mask)| {
            bias.iter().zip(mask).fold(false, |seen, (bias, mask)| seen | ((*bias != hidden) & (*mask != 0)))
        })
    };
    match (bias, mask) {
        (None, None) => true,
        (Some(bias), None) => bias.runs().any(shows_bias),
        (None, Some(mask)) => mask.runs().any(shows_any),
        (Some(bias @ Rows(_)), Some(mask @ Rows(_))) => bias.runs().zip(mask.runs()).any(shows_both),
        (Some(bias @ Columns(_)), Some(mask @ Columns(_))) => bias.runs().zip(mask.runs()).any(shows_both),
        (Some(bias), Some(mask)) => bias.runs().any(shows_bias) && mask.runs().any(shows_any),
    }
}
