//! Every measured number of the plan, with its reason.
//!
//! Tile and split sizes decide the order of additions. They follow from the head sizes alone, so that a row's bits depend on
//! that row alone.

#![forbid(unsafe_code)]

use crate::kernel::decode::MAX_TASK_ROWS;
use crate::kernel::shape::round_up_lanes;
use crate::kernel::task::Operands;
use crate::level::Level;
use crate::problem::Dims;
use crate::simd::MAX_SHARED_ROWS;

/// Whether decode is the faster form.
///
/// The time of decode grows with the rows. The time of prefill grows with the vectors of lanes, full or not, and the second
/// vector of a panel is cheaper than the first. With few keys, the fixed cost of each row or panel counts, too. Pairs of bf16
/// make both forms faster, so the fixed cost counts up to more keys.
///
/// The table has decode's time divided by prefill's (AVX-512, Zen 5, in cache). With AVX2, 8 rows fill a vector and the ratio
/// is 0.85 to 0.95 there; other ratios are similar.
///
/// | rows | 8 | 10 | 12 | 16 | 20 | 24 |
/// |---|---|---|---|---|---|---|
/// | 64, f32, 32 / 128 / 4096 keys | 0.97 / 0.76 / 0.65 | 1.16 / 0.94 / 0.75 | 1.31 / 1.04 / 0.86 | – / – / 1.2 | 1.27 / 0.96 / 0.85 | 1.4 / 1.1 / 0.95 |
/// | 128, f16, 32 / 128 / 4096 keys | 0.69 / 0.61 / 0.53 | 0.83 / 0.75 / 0.65 | 0.95 / 0.85 / 0.77 | – / – / 1.0 | 0.94 / 0.82 / 0.72 | 1.1 / 0.95 / 0.86 |
/// | 128, bf16, 32 / 256 / 4096 keys | 1.02 / 0.67 / 0.64 | 1.21 / 0.83 / 0.8 | 1.39 / 0.96 / 0.99 | – / – / 1.3 | 1.36 / 0.85 / 0.87 | 1.56 / 1.01 / 1.0 |
///
/// With few keys, the fixed cost of the rows is most of decode's time (AVX2, 64, f32, in cache):
///
/// | rows | 3 | 4 | 5 | 6 | 8 |
/// |---|---|---|---|---|---|
/// | 4 / 16 / 64 / 128 keys | 1.05 / 0.90 / 0.75 / 0.64 | 1.22 / 0.98 / 0.81 / 0.70 | 1.51 / 1.19 / 1.01 / 0.94 | 1.51 / 1.26 / 1.14 / 1.00 | 1.85 / 1.52 / 1.20 / 0.98 |
///
/// With a head_dim of 32, ratios are a fifth higher than with 64. 24 rows with a head_dim of 64, f32, have a ratio of 1.16 if
/// memory is cold. `cargo bench --bench growth` measures the ratio.
///
/// * `rows`, `keys`: of the sequence
/// * `halves`: whether keys have a half type
pub(super) fn suits_decode(
    rows: usize,
    keys: usize,
    dims: &Dims,
    level: Level,
    halves: bool,
    operands: Operands,
) -> bool {
    let pairs = operands == Operands::Bf16Pairs;
    let (always_rows, min_keys) = if pairs { (6, 256) } else { (8, 128) };
    if rows <= always_rows {
        return rows < 4 || keys > if rows == 4 { FEW_KEYS / 4 } else { FEW_KEYS };
    }
    if dims.head_dim < 64 || keys < min_keys {
        return false;
    }
    let (one_vector_rows, two_vector_rows) = match (pairs, halves || dims.head_dim >= 128) {
        (true, _) => (10, 20),
        (false, true) => (12, 24),
        (false, false) => (12, 20),
    };
    // Portable code keeps fewer sums in registers: with 20 rows, decode takes up to three times as long as prefill.
    rows <= one_vector_rows || level != Level::Portable && (17..=two_vector_rows).contains(&rows)
}

/// Rows at the end of `rows` that are decoded, although prefill is the faster form for the others: up to a quarter of a vector of
/// lanes that they would take alone, if there are whole vectors before them. With 2048 keys, 33 rows took 1.3 times as long as 32
/// without this, and 17 rows 1.64 times as long as 16 (head_dim 32); with it, 1.1 and 1.23 times (AVX2). Two rows gain as much,
/// three a little less.
///
/// With few keys, the fixed cost of another form is more than it saves.
///
/// * `lanes`: lanes of a vector
pub(super) fn tail_rows(rows: usize, keys: usize, lanes: usize) -> usize {
    let tail = rows % lanes;
    if tail < rows && tail <= lanes / 4 && keys > FEW_KEYS { tail } else { 0 }
}

/// Up to this many keys, what a form does once for each row or panel takes longer than its products.
const FEW_KEYS: usize = 64;

/// The most rows of a task of the decode form. It is the most rows for which the plan chooses decode, so that keys and values
/// are read once. (With 12, a problem of 20 rows took 6 to 10% longer.)
pub(super) const DECODE_TASK_ROWS: usize = 24;

/// The most rows of a task of the pass over keys that sequences share, at most [`MAX_TASK_ROWS`]. Keys and values are widened once for
/// the rows of a task: with 32 rows that takes 13% of the time, with 128 rows 6% (f16, head_dim 128, Zen 4).
const PREFIX_TASK_ROWS: usize = 128;
const _: () = assert!(PREFIX_TASK_ROWS <= MAX_TASK_ROWS && PREFIX_TASK_ROWS.is_multiple_of(MAX_SHARED_ROWS));

/// The rows of a task of that pass: the fewest tasks of even size, in whole register tiles.
pub(super) fn prefix_task_rows(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(PREFIX_TASK_ROWS).max(1)).next_multiple_of(MAX_SHARED_ROWS)
}

/// Keys of one split of the decode form. At head_dim 128 and 16 bits, a split has 256 KiB of keys and values. Reading them
/// takes some 15 µs, much longer than claiming a task, and the partial result has 1/128 of the bytes.
pub(super) const SPLIT_KEYS: usize = 512;

/// Keys of a tile of the decode form; divides [`SPLIT_KEYS`]. A long tile reads one long stream of keys, then one of values:
/// with tiles of 64, decoding took a quarter longer.
pub(super) const DECODE_TILE_KEYS: usize = 256;

/// With at least this many tasks, keys are not split between tasks. With more, a task may have several heads.
pub(super) const ENOUGH_TASKS: usize = 64;

/// The most elements of all partial results of split keys: 1 GiB. With more, keys are not split between tasks. One query with a
/// value_dim of 128 reaches the limit at 860 million keys.
pub(super) const MAX_PARTIALS: usize = 1 << 28;

/// Elements of a K tile and a V tile together: 192 KiB as f32. They fit an L2 cache of 512 KiB together with the packed queries
/// and outputs of a block at head_dim 128, which take about the same. (128 KiB took 1% longer at head_dim 128.)
pub(super) const TILE_ELEMENTS: usize = 48 * 1024;

/// The most rows that share a packed tile of keys and values. Fetching and packing a key and its value costs about half of
/// using them for 16 rows, so with 256 rows it is a thirtieth of the work. (192 rows took 1% longer. 384 rows took the same
/// time and leave fewer tasks.)
pub(super) const BLOCK_ROWS: usize = 256;

/// With fewer multiply-adds than this, the calling thread works alone. They take about 20 µs. A thread that is awake starts
/// some 2 µs after it is called.
pub(super) const PARALLEL_WORK: usize = 1 << 20;

/// With fewer multiply-adds than this, a caller outside the pool does not wake sleeping threads. At AVX2's peak they take some 0.2
/// ms. Waking a thread keeps the caller from its work for 12 to 25 µs (Zen 3, a virtual machine), and the thread comes some 60 µs
/// later. Without this rule, calls of 0.2 ms after a pause took up to 1.2 times as long as serial ones. (With 2^25, calls of 0.4
/// to 1.3 ms after a pause were serial, which now take 0.55 to 0.7 of the time: Zen 4.)
pub(super) const WAKING_WORK: usize = 1 << 23;

/// Key/value heads of a task: the number that together has [`TASK_WORK`] multiply-adds, if [`ENOUGH_TASKS`] tasks remain.
///
/// * `head_work`: multiply-adds of a head
/// * `tasks`: the number of tasks of one head each
pub(super) fn task_heads(head_work: usize, tasks: usize) -> usize {
    (TASK_WORK / head_work.max(1)).min(tasks / ENOUGH_TASKS).max(1)
}

/// Multiply-adds of a task of several heads. They take 5 to 10 µs, against some 0.1 µs to claim a task and to list its rows, which
/// is half the time of a head of 4 queries and keys. (With 2^23, causal heads of 128 took 0.95 of the time, but a long sequence among
/// short ones was one task.)
const TASK_WORK: usize = 1 << 18;

/// Tiles of keys of a task that sums probabilities: up to four, because each task packs all queries, if 16 tasks remain: with two threads,
/// one then waits for a 16th of the time at most.
///
/// * `tiles`: of all key/value heads
pub(super) fn sum_task_tiles(tiles: usize) -> usize {
    (tiles / 16).clamp(1, 4)
}

/// Keys of a tile of the prefill form: the number that [`TILE_ELEMENTS`] allows, within two limits.
///
/// * At least 48, so that the cost of a tile's ends is small.
/// * At most 240, so that the scores stay in the L1 cache: 240 keys of 32 queries are 30 KiB. A cache of 32 KiB holds little
///   else, but scores are read and written in order. On Zen 5, whose L1 cache has 48 KiB, 192 keys were no faster and 144
///   slower.
pub(super) fn prefill_tile_keys(dims: &Dims) -> usize {
    let elements = round_up_lanes(dims.head_dim + dims.value_dim).max(1);
    (TILE_ELEMENTS / elements / 48 * 48).clamp(48, 240)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of either side of every step, for each kind of keys.
    #[test]
    fn decode_is_chosen_where_it_is_faster() {
        let rows = |level, (head_dim, seq_kv), halves, pairs: bool| -> Vec<usize> {
            let operands = if pairs { Operands::Bf16Pairs } else { Operands::F32 };
            let dims = Dims { batch: 1, heads_q: 1, heads_kv: 1, seq_q: 1, seq_kv, head_dim, value_dim: head_dim };
            let chosen =
                (1..=64).map(|rows| suits_decode(rows, seq_kv, &dims, level, halves, operands)).collect::<Vec<_>>();
            (1..64).filter(|&rows| chosen[rows - 1] != chosen[rows]).collect() // the last ones of a form
        };
        let avx2 = Level::Avx2;
        assert_eq!(rows(avx2, (64, 128), false, false), [12, 16, 20]);
        assert_eq!(rows(avx2, (128, 128), false, false), [12, 16, 24]);
        assert_eq!(rows(avx2, (128, 128), true, false), [12, 16, 24]);
        assert_eq!(rows(avx2, (64, 128), true, false), [12, 16, 24]);
        assert_eq!(rows(Level::Portable, (128, 128), true, false), [12]);
        for (head_dim, seq_kv) in [(64, 127), (63, 128)] {
            assert_eq!(rows(avx2, (head_dim, seq_kv), false, false), [8]);
        }
        assert_eq!(rows(avx2, (64, 16), false, false), [3]);
        assert_eq!(rows(avx2, (64, 64), false, false), [4]);
        assert_eq!(rows(avx2, (64, 17), false, false), [4]);
        assert_eq!(rows(avx2, (64, 65), false, false), [8]);
        assert_eq!(rows(Level::Avx512Bf16, (128, 255), true, true), [6]);
        assert_eq!(rows(Level::Avx512Bf16, (128, 256), true, true), [10, 16, 20]);
    }

    #[test]
    fn a_tail_is_at_most_a_quarter_of_a_vector() {
        let tails = |lanes| (1..=2 * lanes).filter(|&rows| tail_rows(rows, 65, lanes) > 0).collect::<Vec<_>>();
        assert_eq!((tails(4), tails(8), tails(16)), (vec![5], vec![9, 10], vec![17, 18, 19, 20]));
        assert_eq!(tail_rows(33, 64, 8), 0);
    }
}
