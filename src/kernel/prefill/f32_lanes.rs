//! Scores of panels with lanes whose bf16 queries are outside the range of pairs. The scores of these lanes are formed from f32.
//!
//! A score has the sums of the decode form, however it is computed: one chain of multiply-adds for each lane of a vector, and
//! then the sum of the lanes. So it does not depend on the other lanes of the panel.
//!
//! * Few such lanes are computed as rows, by the dot products of decode.
//! * With many, the whole panel is computed like any other, chain by chain.

use crate::kernel::decode::scores as decode;
use crate::kernel::panel::Panel;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::prefill::scores::{PanelKeys, scores};
use crate::kernel::row_scores::{rows_of, widen_rows_of};
use crate::kernel::shape::{MAX_PANEL_LANES, RowSet, holds, round_up_lanes};
use crate::kernel::task::TaskInput;
use crate::kernel::transpose::transpose_into_lanes;
use crate::kv::run::Run;
use crate::simd::{MAX_LANES, PairDots, PairKernel, Simd};
use crate::tensor::matrix::Matrix;

/// Whether the panel is computed from the keys as f32: if more than half of its rows are outside the range of pairs. (Computing the
/// panel takes the time of 12, 16 and 20 rows on their own with a head_dim of 32, 64 and 128; Zen 4.) Queries with gaps between their
/// elements are always computed as rows.
pub(super) fn needs_f32_keys(task: &TaskInput<'_>, panel: &Panel) -> bool {
    let outside = panel.f32_lanes.count_ones() as usize;
    2 * outside > panel.lanes.rows.len() && task.queries.has_contiguous_rows()
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
    // Then the queries have not been transposed as pairs.
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
        let chosen = if all { RowSet::MAX } else { panel.f32_lanes };
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
    chosen: RowSet,
    /// `[rows][lanes]`
    scores: &'a mut [f32],
    max: &'a mut [f32],
}

impl PairKernel for ChosenLanes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, _: impl PairDots<S>) {
        match self.max.len() / S::LANES {
            1 => self.in_blocks::<S, 1>(simd),
            2 => self.in_blocks::<S, 2>(simd),
            vectors => unreachable!("a panel of {vectors} vectors"),
        }
    }
}

impl ChosenLanes<'_> {
    /// Few keys at a time: the chains of four lanes of a vector, for each vector of the panel, fill half of the registers.
    #[inline(always)]
    fn in_blocks<S: Simd, const V: usize>(self, simd: S) {
        const { assert!(S::LANES == 8 || S::LANES == 16, "`scores_of` adds two or four sums of four chains") };
        let (lanes, width, rows) = (self.max.len(), self.keys.cols(), self.keys.rows());
        assert!(lanes == V * S::LANES && width.is_multiple_of(S::LANES) && self.keys.has_contiguous_rows());
        assert!(holds(self.queries.len(), width, lanes) && holds(self.scores.len(), rows, lanes));
        let mut block = Chains::<S, V> {
            simd,
            keys: self.keys.as_ptr(),
            row: self.keys.row_stride(),
            queries: self.queries.as_ptr(),
            steps: width / S::LANES,
            scores: self.scores.as_mut_ptr(),
            chosen: [simd.lt(simd.zero(), simd.zero()); V],
            max: [simd.zero(); V],
        };
        for v in 0..V {
            let mut is_chosen = [0.0; MAX_LANES];
            for (n, is_chosen) in is_chosen.iter_mut().enumerate() {
                *is_chosen = (self.chosen >> (v * S::LANES + n) & 1) as f32;
            }
            block.chosen[v] = simd.lt(simd.zero(), simd.load_slice(&is_chosen));
            block.max[v] = simd.load_slice(&self.max[v * S::LANES..]);
        }
        let mut left = rows;
        while left > 0 {
            // SAFETY: `left` rows of the keys and of the scores follow, and the queries have a vector for each element of a key
            // (asserted).
            left -= unsafe {
                match V {
                    1 if left >= 4 => block.scores_of::<4>(),
                    2 if left >= 2 => block.scores_of::<2>(),
                    _ => block.scores_of::<1>(),
                }
            };
        }
        for (v, max) in block.max.into_iter().enumerate() {
            simd.store_slice(&mut self.max[v * S::LANES..], max);
        }
    }
}

/// The keys that are left, and the panel's queries.
struct Chains<S: Simd, const V: usize> {
    simd: S,
    keys: *const f32,
    /// The distance between two keys.
    row: isize,
    queries: *const f32,
    /// Elements of a chain.
    steps: usize,
    scores: *mut f32,
    chosen: [S::Mask; V],
    max: [S::F32; V],
}

impl<S: Simd, const V: usize> Chains<S, V> {
    /// The scores of the next R keys. Returns R.
    ///
    /// # Safety
    /// * `keys` is valid for R rows of `steps * LANES` elements, `queries` for that number of rows of `V` vectors, `scores` for
    ///   reads and writes of R rows
    #[inline(always)]
    unsafe fn scores_of<const R: usize>(&mut self) -> usize {
        let simd = self.simd;
        let mut sums = [[simd.zero(); V]; R];
        let mut half = sums;
        for quarter in 0..S::LANES / 4 {
            // SAFETY: the caller's promise.
            let own = unsafe { self.sum_of_four::<R>(4 * quarter) };
            half = if quarter % 2 == 0 { own } else { add(simd, half, own) };
            if quarter % 2 == 1 {
                sums = if quarter == 1 { half } else { add(simd, sums, half) };
            }
        }
        for (r, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                let to = self.scores.wrapping_add((r * V + v) * S::LANES);
                // SAFETY: a vector of row r < R of the scores: the caller's promise.
                let score = simd.select(self.chosen[v], sum, unsafe { simd.load(to) });
                self.max[v] = simd.select(self.chosen[v], simd.max(self.max[v], score), self.max[v]);
                // SAFETY: as above.
                unsafe { simd.store(to, score) };
            }
        }
        self.keys = self.keys.wrapping_offset(R as isize * self.row);
        self.scores = self.scores.wrapping_add(R * V * S::LANES);
        R
    }

    /// The sum of four chains: those from place `first` on in the order of sums.
    ///
    /// # Safety
    /// * as [`scores_of`](Self::scores_of); `first + 4 <= LANES`
    #[inline(always)]
    unsafe fn sum_of_four<const R: usize>(&self, first: usize) -> [[S::F32; V]; R] {
        let simd = self.simd;
        let mut chains = [[[simd.zero(); V]; R]; 4];
        let mut at = [(self.keys, self.queries); 4];
        for (n, (key, query)) in at.iter_mut().enumerate() {
            let lane = S::SUMS_ORDER[first + n];
            (*key, *query) = (key.wrapping_add(lane), query.wrapping_add(lane * V * S::LANES));
        }
        for _ in 0..self.steps {
            for n in 0..4 {
                let (key, query) = at[n];
                let mut lanes = [simd.zero(); V];
                for (v, lanes) in lanes.iter_mut().enumerate() {
                    // SAFETY: the queries' vectors for an element of a key: the caller's promise.
                    *lanes = unsafe { simd.load(query.wrapping_add(v * S::LANES)) };
                }
                for (r, sums) in chains[n].iter_mut().enumerate() {
                    // SAFETY: an element of row r < R: the caller's promise.
                    let element = simd.splat(unsafe { *key.wrapping_offset(r as isize * self.row) });
                    for v in 0..V {
                        sums[v] = simd.mul_add(element, lanes[v], sums[v]);
                    }
                }
                at[n] = (key.wrapping_add(S::LANES), query.wrapping_add(V * S::LANES * S::LANES));
            }
        }
        let [a, b, c, d] = chains;
        add(simd, add(simd, a, b), add(simd, c, d))
    }
}

#[inline(always)]
fn add<S: Simd, const R: usize, const V: usize>(
    simd: S,
    mut a: [[S::F32; V]; R],
    b: [[S::F32; V]; R],
) -> [[S::F32; V]; R] {
    for (a, b) in a.iter_mut().zip(b) {
        for (a, b) in a.iter_mut().zip(b) {
            *a = simd.add(*a, b);
        }
    }
    a
}
