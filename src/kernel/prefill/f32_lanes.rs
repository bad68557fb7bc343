//! Scores of panels with lanes whose bf16 queries are outside the range of pairs. The scores of these lanes are formed from f32.
//!
//! A score has the sums of the decode form, however it is computed: one chain of multiply-adds for each lane of a vector, and
//! then the sum of the lanes. So it does not depend on the other lanes of the panel.
//!
//! * Few such lanes are computed as rows, by the dot products of decode.
//! * With many, the whole panel is computed like any other, chain by chain.

use crate::kernel::arithmetic::F32Fma;
use crate::kernel::decode::scores as decode;
use crate::kernel::panel::Panel;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::scores::{PanelKeys, scores};
use crate::kernel::product::{ByRows, Left, Right, by_rows, product};
use crate::kernel::row_scores::{rows_of, widen_rows_of};
use crate::kernel::shape::{EvenBlocks, MAX_PANEL_LANES, holds, product_rows, round_up_lanes};
use crate::kernel::task::TaskInput;
use crate::kernel::transpose::transpose_into_lanes;
use crate::kv::run::Run;
use crate::simd::{MAX_LANES, PairDots, PairKernel, Simd};
use crate::tensor::matrix::Matrix;

/// Whether the panel is computed from the keys as f32: if more than three quarters of its rows are outside the range of pairs. (As
/// rows, a score takes 1.3 times as long as in a panel.) Queries with gaps between their elements are always computed as rows.
pub(super) fn needs_f32_keys(task: &TaskInput<'_>, panel: &Panel) -> bool {
    let outside = panel.f32_lanes.count_ones() as usize;
    4 * outside > 3 * panel.lanes.rows.len() && task.queries.has_contiguous_rows()
}

/// As [`scores`], for a panel with lanes whose queries are outside the range of pairs.
///
/// * `keys`: pairs, and the same keys as f32 if a panel of the task needs them
/// * `row_scores`, `row_buffer`: buffers
pub(super) fn scores_with_f32_lanes(
    task: &TaskInput<'_>,
    panel: &Panel,
    (keys, f32_keys): (PanelKeys<'_>, Option<Matrix<'_, f32>>),
    queries: &[f32],
    to: &mut [f32],
    max: &mut [f32],
    (row_scores, row_buffer): (&mut [f32], &mut [f32]),
) {
    let (lanes, rows) = (max.len(), &panel.lanes.rows);
    let mut before = [0.0; MAX_PANEL_LANES];
    before[..lanes].copy_from_slice(max);
    let as_panel = f32_keys.filter(|_| needs_f32_keys(task, panel));
    let all = panel.f32_lanes.count_ones() as usize == rows.len();
    if !(all && as_panel.is_some()) {
        scores(task.isa, keys, queries, to, max, &mut Prefetch::none());
    }
    for lane in rows_of(panel.f32_lanes) {
        max[lane] = before[lane];
    }
    if let Some(keys) = as_panel {
        let queries = &mut row_buffer[..round_up_lanes(task.head_dim()) * lanes];
        transpose_into_lanes(task.isa, task.queries.slice(rows.clone()), task.factor, (&mut *queries, lanes), &mut []);
        // Lanes without a row repeat the last row.
        let chosen = if all { u32::MAX } else { panel.f32_lanes };
        return task.isa.run_pairs(ChosenLanes { keys, queries, chosen, scores: to, max });
    }
    let PanelKeys::Pairs(keys, _) = keys else { unreachable!("f32 lanes in a panel whose keys are not pairs") };
    let (count, width) = (panel.f32_lanes.count_ones() as usize, round_up_lanes(task.head_dim()));
    let (queries, row_scores) = (&mut row_buffer[..count * width], &mut row_scores[..count * keys.rows()]);
    widen_rows_of(task, rows.clone(), panel.f32_lanes, queries);
    let elements = decode::RowKeys::Run(Run::Bf16(keys.elements(task.head_dim())));
    decode::scores(task.isa, elements, queries, row_scores, keys.rows(), &Prefetch::none());
    for (lane, row_scores) in rows_of(panel.f32_lanes).zip(row_scores.chunks_exact(keys.rows())) {
        for (scores, &score) in to.chunks_exact_mut(lanes).zip(row_scores) {
            scores[lane] = score;
        }
        max[lane] = row_scores.iter().copied().fold(max[lane], f32::max);
    }
}

/// Writes the scores of the lanes `chosen`, one bit each, and raises `max` to the largest of each lane.
///
/// ```text
/// chain[n]        = sum over e = n, n + LANES, ... of keys[j][e] * queries[e][lane]
/// scores[j][lane] = the sum of all chains, in the order of Simd::sums
/// ```
struct ChosenLanes<'a> {
    /// `[rows][width]`, where `width` is a multiple of the lanes of a vector.
    keys: Matrix<'a, f32>,
    /// `[width][lanes]`
    queries: &'a [f32],
    chosen: u32,
    /// `[rows][lanes]`
    scores: &'a mut [f32],
    max: &'a mut [f32],
}

impl PairKernel for ChosenLanes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) {
        match self.max.len() / S::LANES {
            1 => self.in_blocks::<S, _, 1>(simd, dots),
            2 => self.in_blocks::<S, _, 2>(simd, dots),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }
}

impl ChosenLanes<'_> {
    /// One block of keys after the other, as in `prefill/scores.rs`.
    #[inline(always)]
    fn in_blocks<S: Simd, D: PairDots<S>, const V: usize>(self, simd: S, _: D) {
        let (lanes, width, rows) = (self.max.len(), self.keys.cols(), self.keys.rows());
        assert!(lanes == V * S::LANES && width.is_multiple_of(S::LANES) && self.keys.has_contiguous_rows());
        assert!(holds(self.queries.len(), width, lanes) && holds(self.scores.len(), rows, lanes));
        let mut block = Chains::<S, D, V> {
            simd,
            dots: std::marker::PhantomData,
            keys: Left { at: self.keys.as_ptr(), row: self.keys.row_stride(), step: S::LANES as isize },
            queries: self.queries.as_ptr(),
            steps: width / S::LANES,
            scores: self.scores.as_mut_ptr(),
            chosen: [simd.lt(simd.zero(), simd.zero()); V],
            max: [simd.zero(); V],
        };
        for v in 0..V {
            let mut is_chosen = [0.0; MAX_LANES];
            for (n, is_chosen) in is_chosen.iter_mut().enumerate() {
                *is_chosen = (self.chosen >> ((v * S::LANES + n) % 32) & 1) as f32;
            }
            block.chosen[v] = simd.lt(simd.zero(), simd.load_slice(&is_chosen));
            block.max[v] = simd.load_slice(&self.max[v * S::LANES..]);
        }
        let blocks = EvenBlocks::new(rows, product_rows::<S>(V));
        for b in 0..blocks.count {
            let of_block = blocks.range(b);
            // Wrapping: keys of no elements may have any stride.
            let offset = self.keys.row_stride().wrapping_mul(of_block.start as isize);
            block.keys.at = self.keys.as_ptr().wrapping_offset(offset);
            // SAFETY: these rows of the keys and of the scores exist, and the queries have a vector for each element of a key
            // (asserted). The rows are no more than `product_rows`.
            unsafe { by_rows::<S, V>(of_block.len(), &mut block) };
            block.scores = block.scores.wrapping_add(of_block.len() * lanes);
        }
        for (v, max) in block.max.into_iter().enumerate() {
            simd.store_slice(&mut self.max[v * S::LANES..], max);
        }
    }
}

/// The chains of a block of keys and the panel's queries.
struct Chains<S: Simd, D, const V: usize> {
    simd: S,
    dots: std::marker::PhantomData<D>,
    /// The keys; a step is from one element of a chain to the next.
    keys: Left<f32>,
    queries: *const f32,
    /// Elements of a chain.
    steps: usize,
    scores: *mut f32,
    chosen: [S::Mask; V],
    max: [S::F32; V],
}

/// Sums that are kept while others are added up: of 1, 2, 4, 8 and 16 chains.
const KEPT: usize = MAX_LANES.ilog2() as usize + 1;

impl<S: Simd, D: PairDots<S>, const V: usize> ByRows<S> for Chains<S, D, V> {
    /// # Safety
    /// * `keys` is valid for R rows of `steps * LANES` elements, `queries` for that number of rows of `V` vectors, `scores` for reads and
    ///   writes of R rows
    #[inline(always)]
    unsafe fn call<const R: usize>(&mut self) {
        let simd = self.simd;
        let mut kept = [[[simd.zero(); V]; R]; KEPT];
        for n in 0..S::LANES {
            let lane = D::SUM_ORDER[n];
            let keys = Left { at: self.keys.at.wrapping_add(lane), ..self.keys };
            let queries = Right {
                at: self.queries.wrapping_add(lane * V * S::LANES),
                step: (V * S::LANES * S::LANES) as isize,
            };
            let (arithmetic, prefetch) = ((simd, F32Fma::new()), &mut Prefetch::none());
            // SAFETY: element `lane` of every `LANES` elements of a row: the caller's promise.
            let mut sums = unsafe { product::<S, _, f32, R, V>(arithmetic, keys, queries, self.steps, prefetch) };
            // A sum is added to that of the same number of chains before it, as a binary counter carries.
            let carries = n.trailing_ones() as usize;
            for kept in &kept[..carries] {
                for (sums, kept) in sums.iter_mut().zip(kept) {
                    for (sum, kept) in sums.iter_mut().zip(kept) {
                        *sum = simd.add(*kept, *sum);
                    }
                }
            }
            kept[carries] = sums;
        }
        for (r, row) in kept[S::LANES.ilog2() as usize].into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                let to = self.scores.wrapping_add((r * V + v) * S::LANES);
                // SAFETY: a vector of row r < R of the scores: the caller's promise.
                let score = simd.select(self.chosen[v], sum, unsafe { simd.load(to) });
                self.max[v] = simd.select(self.chosen[v], simd.max(self.max[v], score), self.max[v]);
                // SAFETY: as above.
                unsafe { simd.store(to, score) };
            }
        }
    }
}
