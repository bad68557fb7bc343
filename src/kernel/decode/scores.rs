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

use super::block::{Block, Group, ROWS};
use crate::element::{Bf16Pair, with_elements};
use crate::kernel::arithmetic::{Multiply, Pairs, Singles};
use crate::kernel::prefetch::{Ahead, LineShare, Lines};
use crate::kernel::shape::round_up_lanes;
use crate::simd::{Isa, Kernel, MAX_LANES, PairDots, PairKernel, Simd};
use crate::tensor::any::AnyMatrix;
use crate::tensor::matrix::Matrix;

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
        with_elements!(keys, keys => all_dots((simd, Singles::new()), keys, queries, scores, stride, ahead));
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
