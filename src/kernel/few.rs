//! The form for few queries: keys and values along the lanes.
//!
//! With a query or two the lanes of a panel would be empty, and the work is to stream K and V through the processor once:
//! four bytes of f32 for each multiply-add of a lone query. So a vector holds neighbouring elements of one key (or value), in
//! whatever type the cache has, and each is multiplied with every query of the group while it is in a register.
//!
//! ```text
//! scores   S[r][j] = sum_e Q[r][e] * K[j][e]      as many partial sums as lanes, folded at the end
//! weights  P[r][j] = 2^(S[r][j] - m[r])           as in weights.rs, with keys in the lanes
//! values   O[r][d] += P[r][j] * V[j][d]           one chain over the keys for each element of O
//! ```
//!
//! Each score and each element of O has its own chains in a fixed order: its bits don't depend on the rows beside it.

use super::adjust::Extent;
use super::ahead::{Ahead, LineShare, Lines};
use super::load::{AnyMatrix, load_from, with_matrix};
use super::multiply::{Multiply, Pairs, Singles};
use super::round_up_lanes;
use super::weights::{base, power_of_two, raised, weight};
use crate::element::{Bf16Pair, Element};
use crate::simd::{Isa, Kernel, MAX_LANES, PairDots, PairKernel, Simd};
use crate::tensor::matrix::Matrix;

/// Rows that share a load of keys or values. With eight lanes, four rows and two keys (or vectors of values) make eight
/// chains, which keep the multipliers busy and leave registers for the operands; with sixteen there are registers for four.
const ROWS: usize = 4;

/// Writes `scores[r * stride + j] = dot(queries[r], keys[j])`.
///
/// * `keys`: `[keys, head_dim]`, or their pairs, rows without gaps
/// * `queries`: `[rows][width]`, where width is `head_dim`, or as many as there are pairs, rounded up; zeros behind the end
/// * `scores`: `[rows][stride]`, `stride >= keys`
/// * `ahead`: what to ask memory for meanwhile, all of it
pub(crate) fn scores(isa: Isa, keys: RowKeys<'_>, queries: &[f32], scores: &mut [f32], stride: usize, ahead: &Ahead) {
    match keys {
        RowKeys::Any(keys) => isa.run(Scores { keys, queries, scores, stride, ahead }),
        RowKeys::Pairs(keys, factor) => {
            isa.run_pairs(PairScores(Scores { keys, queries, scores, stride, ahead }, factor));
        }
    }
}

/// Keys, as the dot products read them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RowKeys<'a> {
    /// Of any type, to be widened.
    Any(AnyMatrix<'a>),
    /// As pairs, and what sums of their products are multiplied with.
    Pairs(Matrix<'a, Bf16Pair>, f32),
}

struct Scores<'a, K> {
    keys: K,
    queries: &'a [f32],
    scores: &'a mut [f32],
    stride: usize,
    ahead: &'a Ahead,
}

impl Kernel for Scores<'_, AnyMatrix<'_>> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Scores { keys, queries, scores, stride, ahead } = self;
        with_matrix!(keys, keys => all_dots((simd, Singles::new()), keys, queries, scores, stride, ahead));
    }
}

struct PairScores<'a>(Scores<'a, Matrix<'a, Bf16Pair>>, f32);

impl PairKernel for PairScores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) {
        let Scores { keys, queries, scores, stride, ahead } = self.0;
        all_dots((simd, Pairs { dots, factor: self.1 }), keys, queries, scores, stride, ahead);
    }
}

/// Keys that all rows are done with before the next ones: their lines stay in the first cache meanwhile.
const BLOCK_KEYS: usize = 32;

/// Some neighbouring keys, or their values: rows of `cols` elements without gaps, `stride` apart.
///
/// (Like [`Group`], pointers in registers and not a view: with views cut from views, the address of a block's first load came
/// out of memory, by way of other addresses that did, and the multipliers ran out of work meanwhile: a tenth of decoding.)
#[derive(Clone, Copy)]
struct Block<T> {
    at: *const T,
    stride: isize,
    count: usize,
    cols: usize,
}

impl<T: Copy> Block<T> {
    #[inline(always)]
    fn all(rows: Matrix<'_, T>) -> Self {
        assert!(rows.has_contiguous_rows());
        Self { at: rows.as_ptr(), stride: rows.row_stride(), count: rows.rows(), cols: rows.cols() }
    }

    /// At most [`BLOCK_KEYS`] of them, and the rest.
    #[inline(always)]
    fn split(self) -> (Self, Self) {
        let count = BLOCK_KEYS.min(self.count);
        let at = self.at.wrapping_offset(self.stride.wrapping_mul(count as isize));
        (Self { count, ..self }, Self { at, count: self.count - count, ..self })
    }
}

/// Rows that share each load: what one has of f32 to multiply with, `from_stride` after the row before, and where its results go,
/// `to_stride` after.
#[derive(Clone, Copy)]
struct Group {
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
}

impl Group {
    /// The next [`ROWS`] rows.
    #[inline(always)]
    fn next(self) -> Self {
        let (from, to) = (self.from.wrapping_add(ROWS * self.from_stride), self.to.wrapping_add(ROWS * self.to_stride));
        Self { from, to, ..self }
    }
}

/// The dot products of all queries with all keys, as many queries at a time as share a load.
#[inline(always)]
fn all_dots<S: Simd, M: Multiply<S>>(
    arithmetic: (S, M),
    keys: Matrix<'_, M::Step>,
    queries: &[f32],
    scores: &mut [f32],
    stride: usize,
    ahead: &Ahead,
) {
    const { assert!(ROWS == 4 && (S::LANES == 8 || S::LANES == 16)) };
    let width = round_up_lanes(keys.cols());
    if width == 0 {
        return scores.fill(0.0);
    }
    let rows = scores.len() / stride;
    assert!(queries.len() >= rows * width && keys.rows() <= stride);
    let mut asking = ahead.lines();
    let (mut left, mut to) = (Block::all(keys), scores.as_mut_ptr());
    while left.count > 0 {
        let (block, more) = left.split();
        let mut group = Group { from: queries.as_ptr(), from_stride: width, to, to_stride: stride };
        for row in (0..rows).step_by(ROWS) {
            // The first rows ask for all.
            let lines = if row == 0 { &mut asking } else { &mut Lines::none() };
            // A lone row reads two keys at a time, nearly straight on: with four, eight or sixteen side by side, bare loops
            // over f16 in memory took 1.1, 1.4 and 1.1 times as long (Zen 5).
            // SAFETY: the block is of keys without gaps; the group has moved on to `row`, with as many queries and rows of scores
            // from there on, and a row has room for every key (asserted).
            unsafe {
                match (S::LANES, ROWS.min(rows - row)) {
                    (8, 1) => dots::<S, M, 1, 8, 1>(arithmetic, block, group, lines),
                    (8, 2) => dots::<S, M, 2, 4, 1>(arithmetic, block, group, lines),
                    (8, 3) => dots::<S, M, 3, 2, 1>(arithmetic, block, group, lines),
                    (8, _) => dots::<S, M, 4, 2, 1>(arithmetic, block, group, lines),
                    (_, 1) => dots::<S, M, 1, 2, 8>(arithmetic, block, group, lines),
                    (_, 2) => dots::<S, M, 2, 4, 2>(arithmetic, block, group, lines),
                    (_, 3) => dots::<S, M, 3, 4, 1>(arithmetic, block, group, lines),
                    (_, _) => dots::<S, M, 4, 4, 1>(arithmetic, block, group, lines),
                }
            }
            group = group.next();
        }
        (left, to) = (more, to.wrapping_add(block.count));
    }
}

/// The dot products of R queries with the keys of a block, G times N keys at a time, which are folded together.
///
/// # Safety
/// * `keys` has a row at least, and all of its rows are valid for reads of `cols` elements
/// * `group` has R queries of `keys.cols` elements, rounded up, and room for R rows of a score for each key
#[inline(always)]
unsafe fn dots<S: Simd, M: Multiply<S>, const R: usize, const N: usize, const G: usize>(
    (simd, multiply): (S, M),
    keys: Block<M::Step>,
    group: Group,
    lines: &mut Lines<'_>,
) {
    let Block { mut at, stride, count, cols } = keys;
    let Group { from: queries, from_stride: width, to: mut scores, to_stride } = group;
    let together = N * G;
    debug_assert!(R * together <= S::LANES && count > 0 && width >= round_up_lanes(cols));
    let bytes = N * S::LANES * size_of::<M::Step>();
    let mut share = lines.share(simd, count.div_ceil(N) * cols.div_ceil(S::LANES), bytes, at);
    // From the first of the keys to each of them; where there are not as many, the last one again.
    let mut offsets = [0; MAX_LANES];
    for (n, offset) in offsets[..together].iter_mut().enumerate() {
        *offset = stride.wrapping_mul(n.min(count - 1) as isize);
    }
    let mut left = count;
    loop {
        let mut sums = [simd.zero(); MAX_LANES];
        for g in 0..G {
            let mut rows = [at; N];
            for n in 0..N {
                rows[n] = at.wrapping_offset(offsets[g * N + n]);
            }
            // SAFETY: the rows are keys, and the queries R rows (the caller's promise).
            let own = unsafe { add_up::<S, M, R, N>((simd, multiply), rows, cols, (queries, width), &mut share) };
            for r in 0..R {
                sums[r * together + g * N..][..N].copy_from_slice(&own[r]);
            }
        }
        let mut folded = [0.0; MAX_LANES];
        simd.store_slice(&mut folded, multiply.finish(simd, simd.sums(sums)));
        let (mut from, mut to) = (folded.as_ptr(), scores);
        for _ in 0..R {
            // SAFETY: a score for each of these keys, or for as many as there are, in R rows (the caller's promise).
            unsafe {
                if count >= together {
                    to.copy_from_nonoverlapping(from, together); // as a vector
                } else {
                    to.copy_from_nonoverlapping(from, count);
                }
            }
            (from, to) = (from.wrapping_add(together), to.wrapping_add(to_stride));
        }
        if left <= together {
            return;
        }
        // The last keys that go together end with the last key: some of their scores may be formed once more.
        left -= together;
        let step = together.min(left);
        at = at.wrapping_offset(stride.wrapping_mul(step as isize));
        scores = scores.wrapping_add(step);
    }
}

/// The products of R queries with N keys, added up lane by lane.
///
/// # Safety
/// * each of `keys` is valid for reads of `steps`
/// * `queries` are R rows of `steps`, rounded up, as far apart as its second number says
#[inline(always)]
unsafe fn add_up<S: Simd, M: Multiply<S>, const R: usize, const N: usize>(
    (simd, multiply): (S, M),
    keys: [*const M::Step; N],
    steps: usize,
    queries: (*const f32, usize),
    share: &mut LineShare,
) -> [[S::F32; N]; R] {
    let whole = steps / S::LANES * S::LANES;
    let bytes = N * S::LANES * size_of::<M::Step>();
    let mut sums = [[simd.zero(); N]; R];
    let mut e = 0;
    while e < whole {
        share.ask(simd, e / S::LANES, bytes);
        let mut vectors = [simd.zero(); N];
        for n in 0..N {
            // SAFETY: e + LANES <= whole <= steps, so within the row.
            vectors[n] = unsafe { multiply.load(simd, keys[n].wrapping_add(e)) };
        }
        // SAFETY: as above, and there are R queries (the caller's promise).
        unsafe { add_products::<S, M, R, N>((simd, multiply), vectors, queries, e, &mut sums) };
        e += S::LANES;
    }
    if whole < steps {
        share.ask(simd, whole / S::LANES, bytes);
        let mut vectors = [simd.zero(); N];
        for n in 0..N {
            // SAFETY: what is left of the row: the caller's promise.
            let rest = unsafe { std::slice::from_raw_parts(keys[n].wrapping_add(whole), steps - whole) };
            vectors[n] = multiply.load_part(simd, rest);
        }
        // SAFETY: rounded up, the queries have `whole` elements and another vector (the caller's promise).
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

/// The state of one row, in units of log2; `max` is an integer. See [`super::weights`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowMax {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl RowMax {
    /// The state of a row that has seen nothing.
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// What the scores of one query are like that nothing adjusts.
pub(crate) fn extent(isa: Isa, scores: &[f32]) -> Extent {
    isa.run(ExtentOf(scores))
}

struct ExtentOf<'a>(&'a [f32]);

impl Kernel for ExtentOf<'_> {
    type Output = Extent;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Extent {
        // (A NaN takes away what its lane has seen. But its row becomes NaN, whatever the others are.)
        let hidden = simd.splat(f32::NEG_INFINITY);
        let (mut max, mut min) = (hidden, simd.splat(f32::INFINITY));
        let mut whole = self.0.chunks_exact(S::LANES);
        for scores in &mut whole {
            let scores = simd.load_slice(scores);
            (max, min) = (simd.max(max, scores), simd.min(min, scores));
        }
        let (mut peak, mut hides) = (simd.max_lane(max), simd.any(simd.eq(min, hidden)));
        for &score in whole.remainder() {
            (peak, hides) = (peak.max(score), hides | (score == f32::NEG_INFINITY));
        }
        Extent { peak, hides }
    }
}

/// Turns the scores of one query into weights and folds them into its state; where the maximum moves, rescales `out`.
///
/// * `scores`: whole vectors, of which the first `count` are one for each key, -inf where hidden; weights of 0 behind them
/// * `peak`: the largest of them
/// * `out`: `[value_dim rounded up]`, the values summed so far
pub(crate) fn weights(isa: Isa, scores: (&mut [f32], usize), peak: f32, state: &mut RowMax, out: &mut [f32]) {
    let (scores, count) = scores;
    scores[count..].fill(f32::NEG_INFINITY);
    isa.run(Weights { scores, peak, state, out });
}

struct Weights<'a> {
    scores: &'a mut [f32],
    peak: f32,
    state: &'a mut RowMax,
    out: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let state = self.state;
        if state.max < self.peak {
            let old = simd.splat(state.max);
            let new = raised(simd, simd.splat(self.peak));
            let factor = power_of_two(simd, simd.sub(old, new));
            state.max = first_lane(simd, new);
            state.sum *= first_lane(simd, factor);
            scale(simd, self.out, factor);
        }
        // As `near` has it, without a way through vectors.
        let mut max = if state.max == f32::NEG_INFINITY { 0.0 } else { state.max };
        if max.abs() > super::weights::FAR {
            self.scores.iter_mut().for_each(|score| *score -= max);
            max = 0.0;
        }
        let base = base(simd, simd.splat(max));
        let mut sum = simd.zero();
        for scores in self.scores.chunks_exact_mut(S::LANES) {
            let weight = weight(simd, simd.load_slice(scores), base);
            sum = simd.add(sum, weight);
            simd.store_slice(scores, weight);
        }
        state.sum += simd.sum(sum);
    }
}

#[inline(always)]
fn first_lane<S: Simd>(simd: S, x: S::F32) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    simd.store_slice(&mut lanes, x);
    lanes[0]
}

#[inline(always)]
fn scale<S: Simd>(simd: S, x: &mut [f32], factor: S::F32) {
    for x in x.chunks_exact_mut(S::LANES) {
        simd.store_slice(x, simd.mul(simd.load_slice(x), factor));
    }
}

/// Adds `sum over j of weights[r * stride + j] * values[j][d]` to `out[r][d]`.
///
/// * `values`: `[keys, value_dim]`, rows without gaps, any type
/// * `weights`: `[rows][stride]`, `stride >= keys`
/// * `out`: `[rows][value_dim rounded up]`
/// * `ahead`: what to ask memory for meanwhile, all of it
pub(crate) fn add_values(
    isa: Isa,
    values: AnyMatrix<'_>,
    weights: &[f32],
    out: &mut [f32],
    stride: usize,
    ahead: &Ahead,
) {
    isa.run(AddValues { values, weights, out, stride, ahead });
}

struct AddValues<'a> {
    values: AnyMatrix<'a>,
    weights: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
    ahead: &'a Ahead,
}

impl Kernel for AddValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        with_matrix!(self.values, values => add_all(simd, values, self.weights, self.out, self.stride, self.ahead));
    }
}

/// The weighted values of all rows, as many rows at a time as share a load.
#[inline(always)]
fn add_all<S: Simd, T: Element>(
    simd: S,
    values: Matrix<'_, T>,
    weights: &[f32],
    out: &mut [f32],
    stride: usize,
    ahead: &Ahead,
) {
    let width = round_up_lanes(values.cols());
    let rows = weights.len() / stride;
    assert!(values.rows() <= stride && out.len() >= rows * width);
    // Whole keys at a time where there are registers for them: memory then reads straight on.
    let eight = values.cols() >= 8 * S::LANES;
    let mut asking = ahead.lines();
    let (mut left, mut from) = (Block::all(values), weights.as_ptr());
    while left.count > 0 {
        let (block, more) = left.split();
        let mut group = Group { from, from_stride: stride, to: out.as_mut_ptr(), to_stride: width };
        for row in (0..rows).step_by(ROWS) {
            // The first rows ask for all.
            let lines = if row == 0 { &mut asking } else { &mut Lines::none() };
            // SAFETY: the block is of values without gaps; the group has moved on to `row`, with as many rows of weights and of
            // `out` from there on, and a row has a weight for every key (asserted).
            unsafe {
                match (S::LANES, ROWS.min(rows - row)) {
                    (8, 1) => strips::<S, _, 1, 8>(simd, block, group, lines),
                    (8, 2) => strips::<S, _, 2, 4>(simd, block, group, lines),
                    (8, 3) => strips::<S, _, 3, 2>(simd, block, group, lines),
                    (8, _) => strips::<S, _, 4, 2>(simd, block, group, lines),
                    (_, 1) if eight => strips::<S, _, 1, 8>(simd, block, group, lines),
                    (_, 1) => strips::<S, _, 1, 4>(simd, block, group, lines),
                    (_, 2) if eight => strips::<S, _, 2, 8>(simd, block, group, lines),
                    (_, 2) => strips::<S, _, 2, 4>(simd, block, group, lines),
                    (_, 3) => strips::<S, _, 3, 4>(simd, block, group, lines),
                    (_, _) => strips::<S, _, 4, 4>(simd, block, group, lines),
                }
            }
            group = group.next();
        }
        (left, from) = (more, from.wrapping_add(block.count));
    }
}

/// Weighted values for R rows, strip after strip of N vectors; the last vector may be a part of one.
///
/// # Safety
/// * all rows of `values` are valid for reads of `cols` elements
/// * `group` has R rows of a weight for each of them, and R rows of `values.cols` elements, rounded up, to add to
#[inline(always)]
unsafe fn strips<S: Simd, T: Element, const R: usize, const N: usize>(
    simd: S,
    values: Block<T>,
    group: Group,
    lines: &mut Lines<'_>,
) {
    let wide = values.cols / (N * S::LANES) * (N * S::LANES);
    let whole = values.cols / S::LANES * S::LANES;
    let mut d = 0;
    while d < whole {
        let values = Block { at: values.at.wrapping_add(d), cols: values.cols - d, ..values };
        let group = Group { to: group.to.wrapping_add(d), ..group };
        // SAFETY: as many vectors from d on as are within the row; the caller's promise.
        unsafe {
            if d < wide {
                strip::<S, T, R, N, true>(simd, values, group, lines);
                d += N * S::LANES;
            } else {
                strip::<S, T, R, 1, true>(simd, values, group, lines);
                d += S::LANES;
            }
        }
    }
    if whole < values.cols {
        let values = Block { at: values.at.wrapping_add(whole), cols: values.cols - whole, ..values };
        let group = Group { to: group.to.wrapping_add(whole), ..group };
        // SAFETY: the rest of each row, rounded up; the caller's promise.
        unsafe { strip::<S, T, R, 1, false>(simd, values, group, lines) };
    }
}

/// The first N vectors of each row of values; or, unless `WHOLE`, a row's only one, which is less than a vector.
///
/// # Safety
/// * all rows of `values` are valid for reads of N vectors, or of `cols` elements, less than a vector
/// * `group` has R rows of a weight for each of them, and R rows of N vectors to add to
#[inline(always)]
unsafe fn strip<S: Simd, T: Element, const R: usize, const N: usize, const WHOLE: bool>(
    simd: S,
    values: Block<T>,
    group: Group,
    lines: &mut Lines<'_>,
) {
    let Block { mut at, stride, count, cols } = values;
    let Group { from: weights, from_stride, to: out, to_stride: width } = group;
    let mut sums = [[simd.zero(); N]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: vector n of row r: the caller's promise.
            *sum = unsafe { simd.load(out.wrapping_add(r * width + n * S::LANES)) };
        }
    }
    let bytes = N * S::LANES * size_of::<T>();
    let mut share = lines.share(simd, count, bytes, at);
    for j in 0..count {
        share.ask(simd, j, bytes);
        let mut vectors = [simd.zero(); N];
        for (n, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: vector n of row j, or all of it: the caller's promise.
            *vector = unsafe {
                match WHOLE {
                    true => simd.load_as(at.wrapping_add(n * S::LANES)),
                    false => simd.load_elements_part(std::slice::from_raw_parts(at, cols), 0.0),
                }
            };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the weight of key j in row r: the caller's promise.
            let weight = simd.splat(unsafe { *weights.wrapping_add(r * from_stride + j) });
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul_add(weight, vectors[n], *sum);
            }
        }
        at = at.wrapping_offset(stride);
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (n, sum) in sums.into_iter().enumerate() {
            // SAFETY: vector n of row r: the caller's promise.
            unsafe { simd.store(out.wrapping_add(r * width + n * S::LANES), sum) };
        }
    }
}

/// As [`add_values`], leaving out values whose score is -inf instead of multiplying them by 0: for tiles that hold NaN or
/// infinite values and hidden keys. Plain and slow; the chains are the same.
pub(crate) fn add_visible_values(
    isa: Isa,
    values: AnyMatrix<'_>,
    (weights, scores): (&[f32], &[f32]),
    out: &mut [f32],
    stride: usize,
) {
    isa.run(AddVisibleValues { values, weights, scores, out, stride });
}

struct AddVisibleValues<'a> {
    values: AnyMatrix<'a>,
    weights: &'a [f32],
    scores: &'a [f32],
    out: &'a mut [f32],
    stride: usize,
}

impl Kernel for AddVisibleValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = round_up_lanes(self.values.cols());
        with_matrix!(self.values, values => for j in 0..values.rows() {
            let row = values.row(j).as_slice().expect("rows without gaps");
            for (r, out) in self.out.chunks_exact_mut(width.max(1)).enumerate() {
                let at = r * self.stride + j;
                if self.scores[at] != f32::NEG_INFINITY {
                    for (out, d) in out.chunks_exact_mut(S::LANES).zip((0..row.len()).step_by(S::LANES)) {
                        let weight = simd.splat(self.weights[at]);
                        let sum = simd.mul_add(weight, load_from(simd, row, d), simd.load_slice(out));
                        simd.store_slice(out, sum);
                    }
                }
            }
        });
    }
}

/// Whether every element is finite.
pub(crate) fn all_finite(isa: Isa, rows: AnyMatrix<'_>) -> bool {
    isa.run(AllFinite(rows))
}

struct AllFinite<'a>(AnyMatrix<'a>);

impl Kernel for AllFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> bool {
        let mut infinite_or_nan = false;
        with_matrix!(self.0, matrix => for j in 0..matrix.rows() {
            let row = matrix.row(j).as_slice().expect("rows without gaps");
            let mut zero = simd.zero();
            for d in (0..row.len()).step_by(S::LANES) {
                // x * 0 is NaN for NaN and infinity, and NaN stays.
                zero = simd.mul_add(load_from(simd, row, d), simd.zero(), zero);
            }
            infinite_or_nan |= !(simd.sum(zero) == 0.0);
        });
        !infinite_or_nan
    }
}

/// Folds the state of later keys into that of earlier ones: rescales both to the larger maximum, exactly, and adds.
///
/// * `out`, `other_out`: the values summed so far, whole vectors
pub(crate) fn merge(isa: Isa, state: &mut RowMax, out: &mut [f32], other: RowMax, other_out: &[f32]) {
    isa.run(Merge { state, out, other, other_out });
}

struct Merge<'a> {
    state: &'a mut RowMax,
    out: &'a mut [f32],
    other: RowMax,
    other_out: &'a [f32],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // A row that saw nothing there has nothing to add (and no maximum to subtract).
        if self.other.max == f32::NEG_INFINITY && self.other.sum == 0.0 {
            return;
        }
        let max = if self.state.max < self.other.max { self.other.max } else { self.state.max };
        let factor = |own: f32| power_of_two(simd, simd.sub(simd.splat(own), simd.splat(max)));
        let (mine, theirs) = (factor(self.state.max), factor(self.other.max));
        self.state.sum = self.state.sum * first_lane(simd, mine) + self.other.sum * first_lane(simd, theirs);
        self.state.max = max;
        for (out, other) in self.out.chunks_exact_mut(S::LANES).zip(self.other_out.chunks_exact(S::LANES)) {
            let other = simd.mul(simd.load_slice(other), theirs);
            simd.store_slice(out, simd.add(simd.mul(simd.load_slice(out), mine), other));
        }
    }
}

/// Divides a row by its sum; zeros where nothing was seen.
pub(crate) fn finish(isa: Isa, state: RowMax, out: &mut [f32]) {
    isa.run(Finish { sum: state.sum, out });
}

struct Finish<'a> {
    sum: f32,
    out: &'a mut [f32],
}

impl Kernel for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.sum == 0.0 {
            return self.out.fill(0.0);
        }
        let inverse = simd.splat(1.0 / self.sum);
        for out in self.out.chunks_exact_mut(S::LANES) {
            // Adding +0 turns a -0, which leaves no trace in a sum that goes on, into +0.
            let value = simd.add(simd.load_slice(out), simd.zero());
            simd.store_slice(out, simd.mul(value, inverse));
        }
    }
}
