//! The scores of few query rows: elements of keys along the lanes.
//!
//! ```text
//! scores[r][j] = sum_e queries[r][e] * keys[j][e]      LANES partial sums, folded at the end
//! ```
//!
//! Each score has its own chains in a fixed order, so its bits don't depend on the rows beside it. `decode.rs` says why
//! elements lie along the lanes.

use super::block::{Listed, ROWS, RowBlock, RowGroup, RowPrefetches, Rows, with_listed};
use crate::element::{Bf16Pair, DType, bf16};
use crate::kernel::arithmetic::{Bf16Dots, F32Fma, Multiply};
use crate::kernel::prefetch::{Prefetch, PrefetchLines};
use crate::kernel::shape::{holds, round_up_lanes};
use crate::kv::run::{Run, with_run};
use crate::simd::{ByDotTile, Isa, MAX_LANES, Simd, kernel};
use crate::tensor::matrix::Matrix;
use crate::tensor::row_list::RowList;

/// Writes `scores[r * stride + j] = dot(queries[r], keys[j])`.
///
/// * `keys`: `[keys, head_dim]`, rows without gaps
/// * `queries`: `[rows][width]`, where width is `head_dim` rounded up; zeros after the last element
/// * `scores`: `[rows][stride]`, `stride >= keys`
/// * `prefetch`: rows to prefetch between the multiply-adds
pub(crate) fn scores(
    isa: Isa,
    keys: RowKeys<'_>,
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
    prefetch: &Prefetch,
) {
    match keys {
        RowKeys::Run(keys) => f32_scores(isa, keys, queries, scores, stride, prefetch),
        RowKeys::Listed(keys) => listed_scores(isa, keys, queries, scores, stride, prefetch),
    }
}

/// As [`scores`], times `factor`, from pairs of neighbouring elements.
///
/// * `keys`: bf16
/// * `queries`: `[rows][width]`, where width is the number of pairs rounded up
pub(crate) fn scores_of_pairs(
    isa: Isa,
    (keys, factor): (RowKeys<'_>, f32),
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
    prefetch: &Prefetch,
) {
    match keys {
        RowKeys::Run(Run::Bf16(keys)) => pair_scores(isa, (keys, factor), queries, scores, stride, prefetch),
        RowKeys::Run(_) => unreachable!("pairs of keys that are not bf16"),
        RowKeys::Listed(keys) => listed_pair_scores(isa, (keys, factor), queries, scores, stride, prefetch),
    }
}

/// Keys, as the dot products read them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RowKeys<'a> {
    /// At one stride.
    Run(Run<'a>),
    /// At addresses of their own.
    Listed(RowList<'a>),
}

kernel! {
    /// [`scores`] of keys of any type.
    fn f32_scores<'a, S: Simd>(
        simd: S,
        keys: Run<'a>,
        queries: &'a [f32],
        scores: &'a mut [f32],
        stride: usize,
        prefetch: &'a Prefetch,
    ) {
        with_run!(keys, keys => {
            // SAFETY: `keys` is a view of rows without gaps (`all` asserts that).
            unsafe { all_dots((simd, F32Fma::new()), RowBlock::all(keys), queries, scores, stride, prefetch) }
        });
    }
}

kernel! {
    /// [`scores_of_pairs`] of keys at one stride.
    fn pair_scores<'a, S: Simd, D: PairDots>(
        simd: S,
        dots: D,
        keys: (Matrix<'a, bf16>, f32),
        queries: &'a [f32],
        scores: &'a mut [f32],
        stride: usize,
        prefetch: &'a Prefetch,
    ) {
        let (keys, factor) = keys;
        // SAFETY: `keys` is a view of rows without gaps (`pairs` asserts that).
        unsafe { all_dots((simd, Bf16Dots { dots, factor }), RowBlock::pairs(keys), queries, scores, stride, prefetch) };
    }
}

kernel! {
    /// [`scores`] of keys at addresses of their own.
    fn listed_scores<'a, S: Simd>(
        simd: S,
        keys: RowList<'a>,
        queries: &'a [f32],
        scores: &'a mut [f32],
        stride: usize,
        prefetch: &'a Prefetch,
    ) {
        with_listed!(keys, keys => {
            // SAFETY: the rows of a list, which are readable for 'a (its invariant).
            unsafe { all_dots((simd, F32Fma::new()), keys, queries, scores, stride, prefetch) }
        });
    }
}

kernel! {
    /// [`scores_of_pairs`] of keys at addresses of their own.
    fn listed_pair_scores<'a, S: Simd, D: PairDots>(
        simd: S,
        dots: D,
        keys: (RowList<'a>, f32),
        queries: &'a [f32],
        scores: &'a mut [f32],
        stride: usize,
        prefetch: &'a Prefetch,
    ) {
        let (keys, factor) = keys;
        assert!(keys.dtype() == DType::Bf16);
        // SAFETY: a pair is two bf16 (asserted), and needs no more alignment than one.
        let keys = unsafe { RowBlock::<Listed<Bf16Pair>>::listed(keys) };
        // SAFETY: the rows of a list, which are readable for 'a (its invariant).
        unsafe { all_dots((simd, Bf16Dots { dots, factor }), keys, queries, scores, stride, prefetch) };
    }
}

/// The dot products of all queries with all keys, [`ROWS`] queries at a time.
///
/// # Safety
/// * all rows of `keys` are valid for reads of `cols` elements
#[inline(always)]
unsafe fn all_dots<S: Simd, M: Multiply<S>, P: Rows<M::Step>>(
    arithmetic: (S, M),
    keys: RowBlock<P>,
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
    prefetch: &Prefetch,
) {
    let width = round_up_lanes(keys.cols.div_ceil(M::ELEMENTS));
    if width == 0 {
        return scores.fill(0.0);
    }
    let rows = scores.len() / stride;
    assert!(holds(queries.len(), rows, width) && keys.count <= stride);
    let mut prefetch_lines = prefetch.lines();
    let (mut rest, mut to) = (keys, scores.as_mut_ptr());
    while rest.count > 0 {
        let (block, after) = rest.split();
        let mut group = RowGroup { from: queries.as_ptr(), from_stride: width, to, to_stride: stride };
        for row in (0..rows).step_by(ROWS) {
            // The first group of rows prefetches.
            let lines = if row == 0 { &mut prefetch_lines } else { &mut PrefetchLines::none() };
            let dots = Dots { arithmetic, keys: block, group, lines };
            // SAFETY: the block is of these keys (the caller's promise), and not empty; the group starts at `row`, so there are `rows - row` queries and rows
            // of scores from there on, and a row has a score for every key (asserted).
            unsafe { S::dot_tile(ROWS.min(rows - row), dots) };
            group = group.next();
        }
        (rest, to) = (after, to.wrapping_add(block.count));
    }
}

/// The product of a group's queries and a block of keys.
struct Dots<'a, 'l, S: Simd, M: Multiply<S>, P> {
    arithmetic: (S, M),
    keys: RowBlock<P>,
    group: RowGroup,
    lines: &'a mut PrefetchLines<'l>,
}

impl<S: Simd, M: Multiply<S>, P: Rows<M::Step>> ByDotTile for Dots<'_, '_, S, M, P> {
    /// # Safety
    /// * as [`dots`]
    #[inline(always)]
    unsafe fn call<const R: usize, const N: usize, const G: usize>(self) {
        // SAFETY: the caller's promise.
        unsafe { dots::<S, M, P, R, N, G>(self.arithmetic, self.keys, self.group, self.lines) }
    }
}

/// The dot products of R queries with the keys of a block. `G * N` keys at a time have their lanes folded together.
///
/// # Safety
/// * `keys` has a row at least, and all of its rows are valid for reads of `cols` elements
/// * `group` has R queries of the steps that `keys.cols` elements are, rounded up, and R rows of scores, one for each key, that may
///   be written
#[inline(always)]
unsafe fn dots<S: Simd, M: Multiply<S>, P: Rows<M::Step>, const R: usize, const N: usize, const G: usize>(
    (simd, multiply): (S, M),
    keys: RowBlock<P>,
    group: RowGroup,
    lines: &mut PrefetchLines<'_>,
) {
    const { assert!(R * N * G <= MAX_LANES, "a dot tile has more results than `MAX_LANES`") };
    let RowBlock { rows: mut at, count, cols } = keys;
    let RowGroup { from: queries, from_stride: width, to: mut scores, to_stride } = group;
    let keys_per_tile = N * G;
    let steps = cols.div_ceil(M::ELEMENTS);
    debug_assert!(count > 0 && width >= round_up_lanes(steps));
    let bytes = N * S::LANES * size_of::<M::Step>();
    // SAFETY: the block has a row (the caller's promise).
    let first = unsafe { at.first() };
    let iterations = count.div_ceil(N) * steps.div_ceil(S::LANES);
    // SAFETY: as above.
    let mut prefetches = unsafe { at.prefetches(simd, lines, iterations, bytes) };
    let tile = at.tile(count, keys_per_tile);
    let mut keys_left = count;
    loop {
        let mut sums = [simd.zero(); MAX_LANES];
        for g in 0..G {
            let mut rows = [first; N];
            for (n, row) in rows.iter_mut().enumerate() {
                // SAFETY: tiles lie inside the block: the last one starts where it ends with the block's last row.
                *row = unsafe { at.tile_row(&tile, g * N + n) };
            }
            // SAFETY: the rows are keys, and the queries R rows (the caller's promise).
            let own =
                unsafe { lane_sums::<S, M, R, N>((simd, multiply), rows, cols, (queries, width), &mut prefetches) };
            prefetches.next_rows(N);
            for r in 0..R {
                sums[r * keys_per_tile + g * N..][..N].copy_from_slice(&own[r]);
            }
        }
        let folded = fold_lanes::<S, M>((simd, multiply), sums, R * keys_per_tile);
        let (mut from, mut to) = (folded.as_ptr(), scores);
        for _ in 0..R {
            // SAFETY: a score for each of these keys, or for each of the block's `count` keys, in R rows (the caller's
            // promise).
            unsafe {
                if count >= keys_per_tile {
                    to.copy_from_nonoverlapping(from, keys_per_tile); // as a vector
                } else {
                    to.copy_from_nonoverlapping(from, count);
                }
            }
            (from, to) = (from.wrapping_add(keys_per_tile), to.wrapping_add(to_stride));
        }
        if keys_left <= keys_per_tile {
            return;
        }
        // The last tile ends at the last key, so it may form some scores a second time.
        keys_left -= keys_per_tile;
        let step = keys_per_tile.min(keys_left);
        at = at.after(step);
        scores = scores.wrapping_add(step);
    }
}

/// Sums the lanes of each of the first `count` vectors and finishes the sums, `LANES` vectors at a time.
#[inline(always)]
fn fold_lanes<S: Simd, M: Multiply<S>>(
    (simd, multiply): (S, M),
    sums: [S::F32; MAX_LANES],
    count: usize,
) -> [f32; MAX_LANES] {
    let mut folded = [0.0; MAX_LANES];
    simd.store_slice(&mut folded, multiply.finish(simd, simd.sums(sums)));
    for first in (S::LANES..count).step_by(S::LANES) {
        let mut next = [simd.zero(); MAX_LANES];
        next[..S::LANES].copy_from_slice(&sums[first..first + S::LANES]);
        simd.store_slice(&mut folded[first..], multiply.finish(simd, simd.sums(next)));
    }
    folded
}

/// The products of R queries with N keys, summed lane by lane.
///
/// # Safety
/// * each of `keys` is valid for reads of `cols` elements
/// * `prefetches` are of a loop over N rows at least
/// * `queries` are R rows of the steps that these are, rounded up; the second number is the distance between rows
#[inline(always)]
unsafe fn lane_sums<S: Simd, M: Multiply<S>, const R: usize, const N: usize>(
    (simd, multiply): (S, M),
    keys: [*const M::Step; N],
    cols: usize,
    queries: (*const f32, usize),
    prefetches: &mut impl RowPrefetches,
) -> [[S::F32; N]; R] {
    let whole = cols / (S::LANES * M::ELEMENTS) * S::LANES; // steps in whole vectors
    let bytes = N * S::LANES * size_of::<M::Step>();
    let mut sums = [[simd.zero(); N]; R];
    let mut e = 0;
    while e < whole {
        let run = prefetches.run((whole - e) / S::LANES, bytes);
        let end = e + run * S::LANES;
        while e < end {
            // SAFETY: a loop over N rows: the caller's promise.
            unsafe { prefetches.issue_across::<S, N>(simd, e / S::LANES, bytes / N) };
            let mut vectors = [simd.zero(); N];
            for n in 0..N {
                // SAFETY: e + LANES <= end <= whole, so within the row.
                vectors[n] = unsafe { multiply.load(simd, keys[n].wrapping_add(e)) };
            }
            // SAFETY: as above, and there are R queries (the caller's promise).
            unsafe { add_products::<S, M, R, N>((simd, multiply), vectors, queries, e, &mut sums) };
            e += S::LANES;
        }
        prefetches.end_run(simd, run, bytes);
    }
    let rest = cols - whole * M::ELEMENTS;
    if rest > 0 {
        // SAFETY: as above.
        unsafe { prefetches.issue_across::<S, N>(simd, whole / S::LANES, bytes / N) };
        prefetches.end_run(simd, 1, bytes);
        let mut vectors = [simd.zero(); N];
        for n in 0..N {
            // SAFETY: the rest of the row: the caller's promise.
            vectors[n] = unsafe { multiply.load_part(simd, keys[n].wrapping_add(whole), rest) };
        }
        // SAFETY: rounded up, the queries have `whole` steps and one more vector (the caller's promise).
        unsafe { add_products::<S, M, R, N>((simd, multiply), vectors, queries, whole, &mut sums) };
    }
    sums
}

/// Adds the products of one vector of N keys and R queries to their sums.
///
/// # Safety
/// * `queries` are R rows, `width` apart, each valid for reads of a vector at `e`
#[inline(always)]
unsafe fn add_products<S: Simd, M: Multiply<S>, const R: usize, const N: usize>(
    (simd, multiply): (S, M),
    keys: [S::F32; N],
    (queries, width): (*const f32, usize),
    e: usize,
    sums: &mut [[S::F32; N]; R],
) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let query = unsafe { simd.load(queries.wrapping_add(r * width + e)) };
        for n in 0..N {
            sums[n] = multiply.mul_add(simd, query, keys[n], sums[n]);
        }
    }
}
