//! The keys and values of a tile, packed or widened for the products of all panels.

#![forbid(unsafe_code)]

use super::pack::{ValueBlocks, pack_values};
use super::scores::PanelKeys;
use super::values::{add_values, add_visible_values};
use crate::kernel::bf16_pairs::{copied_key_pairs, key_pairs, pairs_in};
use crate::kernel::prefetch::Prefetch;
use crate::kernel::shape::round_up_lanes;
use crate::kernel::task::{Operands, TaskInput};
use crate::kernel::widen::{as_f32, copied_as_f32, padded_as_f32, without_gaps};
use crate::kv::rows::KeyRows;
use crate::kv::run::Run;
use crate::simd::Isa;
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// The operands of a tile.
pub(super) struct TileOperands<'a> {
    pub(super) keys: PanelKeys<'a>,
    /// The keys of pairs as f32, `[keys][head_dim rounded up]`, if a panel needs them.
    pub(super) f32_keys: Option<Matrix<'a, f32>>,
    pub(super) values: TileValues<'a>,
}

/// The values of a tile.
pub(super) enum TileValues<'a> {
    /// Packed, for products whose rows are dimensions.
    Packed(PackedValues<'a>),
    /// As rows, for products whose rows are queries: in place, or widened if several panels use them.
    Rows(Run<'a>),
}

impl TileValues<'_> {
    /// Whether all values are known to be finite. Then a hidden key's prob of 0 is enough to leave out its value.
    pub(super) fn are_finite(&self) -> bool {
        matches!(self, TileValues::Packed(PackedValues { finite: true, .. }))
    }
}

/// Buffers for operands that can't be read in place.
pub(super) struct OperandBuffers<'t> {
    pub(super) keys: &'t mut [f32],
    /// For the keys of pairs as f32.
    pub(super) f32_keys: &'t mut [f32],
    pub(super) values: &'t mut [f32],
    pub(super) packed_values: &'t mut [f32],
}

impl OperandBuffers<'_> {
    /// The length of each buffer for the tiles of a task.
    #[inline]
    pub(super) fn lens(task: &TaskInput<'_>, by_rows: bool) -> [usize; 4] {
        let values = task.tile_keys * task.value_dim();
        let packed = ValueBlocks::new(task.isa, task.tile_keys, task.value_dim()).len();
        [
            if task.keys.are_in_place() { 0 } else { task.tile_keys * score_steps(task) },
            match task.operands {
                Operands::F32 => 0,
                Operands::Bf16Pairs => task.tile_keys * round_up_lanes(task.head_dim()),
            },
            if task.values.are_in_place() || (task.values.has_contiguous_rows() && !by_rows) { 0 } else { values },
            if by_rows { 0 } else { packed },
        ]
    }
}

/// Steps of the product that forms a score: elements of a query, or pairs of elements.
pub(super) fn score_steps(task: &TaskInput<'_>) -> usize {
    match task.operands {
        Operands::F32 => task.head_dim(),
        Operands::Bf16Pairs => pairs_in(task.head_dim()),
    }
}

impl<'a> TileOperands<'a> {
    /// Packs or widens the values of `keys` if there are several panels, and copies the keys if they can't be read in place. Both are
    /// copied if they are in several runs.
    ///
    /// * `by_rows`: whether the rows of the values' product are queries
    /// * `needs_f32_keys`: whether the keys of pairs are also needed as f32
    pub(super) fn new(
        task: &TaskInput<'a>,
        keys: Range<usize>,
        (panels, by_rows, needs_f32_keys): (usize, bool, bool),
        buffers: &'a mut OperandBuffers<'_>,
    ) -> Self {
        let isa = task.isa;
        let values = match &task.values {
            _ if !by_rows => {
                let values = (task.values, keys.clone());
                TileValues::Packed(PackedValues::new(isa, values, buffers.values, buffers.packed_values))
            }
            KeyRows::Run(run) if panels == 1 => {
                TileValues::Rows(without_gaps(isa, run.slice_rows(keys.clone()), buffers.values))
            }
            KeyRows::Run(run) => TileValues::Rows(Run::F32(as_f32(isa, run.slice_rows(keys.clone()), buffers.values))),
            KeyRows::Runs(_) => {
                TileValues::Rows(Run::F32(copied_as_f32(isa, task.values, keys.clone(), buffers.values)))
            }
        };
        let f32_keys = match needs_f32_keys {
            true => {
                let to = (&mut *buffers.f32_keys, round_up_lanes(task.head_dim()));
                Some(padded_as_f32(isa, task.keys, keys.clone(), to))
            }
            false => None,
        };
        let keys = match (task.operands, &task.keys) {
            (Operands::F32, KeyRows::Run(run)) => PanelKeys::F32(as_f32(isa, run.slice_rows(keys), buffers.keys)),
            (Operands::F32, KeyRows::Runs(_)) => PanelKeys::F32(copied_as_f32(isa, task.keys, keys, buffers.keys)),
            (Operands::Bf16Pairs, rows) => match rows.one_run(keys.clone()) {
                Some(Run::Bf16(run)) => PanelKeys::Pairs(key_pairs(run, buffers.keys), task.factor),
                _ => PanelKeys::Pairs(copied_key_pairs(task.keys, keys, buffers.keys), task.factor),
            },
        };
        TileOperands { keys, f32_keys, values }
    }
}

/// Packed values.
#[derive(Clone, Copy)]
pub(super) struct PackedValues<'a> {
    packed: &'a [f32],
    blocks: ValueBlocks,
    /// Whether all of them are finite.
    finite: bool,
}

impl<'a> PackedValues<'a> {
    /// * `copy`: a buffer for values that have gaps between their elements
    fn new(isa: Isa, (values, keys): (KeyRows<'_>, Range<usize>), copy: &mut [f32], packed: &'a mut [f32]) -> Self {
        let blocks = ValueBlocks::new(isa, keys.len(), values.cols());
        let (mut first, mut finite) = (0, true);
        // In the order of the keys: packing writes past the last one.
        for run in values.runs(keys) {
            finite &= pack_values(isa, without_gaps(isa, run, copy), (blocks, first), packed);
            first += run.rows();
        }
        PackedValues { packed, blocks, finite }
    }

    /// Adds the values, times their probs, to a panel's output. A hidden key's prob is 0, which leaves out its value if that is
    /// finite; otherwise hidden keys are skipped.
    ///
    /// * `first`: the index in the tile of the first key that `probs` has
    /// * `scores`: the scores of the same keys; read only if values are not finite
    pub(super) fn add(
        self,
        isa: Isa,
        first: usize,
        (probs, scores): (&[f32], &[f32]),
        (out, is_first): (&mut [f32], bool),
        lanes: usize,
        prefetch: &mut Prefetch,
    ) {
        let packed = (self.packed, self.blocks, first);
        if self.finite {
            return add_values(isa, packed, probs, (out, is_first), lanes, prefetch);
        }
        if is_first {
            out.fill(0.0);
        }
        add_visible_values(isa, packed, (probs, scores), out, lanes);
    }
}
