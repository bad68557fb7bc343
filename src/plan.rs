//! The decision: which form, which tiles, how many tasks. A pure function of the problem and the machine.
//!
//! Every number here carries its reason. Those that decide in which order numbers are added (tile and split sizes) come
//! from the head sizes alone, so that a row's bits depend on nothing around it.

#![forbid(unsafe_code)]

use crate::kernel::adjust::{Unit, query_factor};
use crate::kernel::{EvenBlocks, pairs, panel_lanes, round_up_lanes};
use crate::machine::Machine;
use crate::problem::{Dims, Problem};
use crate::simd::{Isa, Level};
use crate::tensor::AnyTensor;
use std::fmt;
use std::ops::Range;

/// How queries and keys are laid on the processor. The two forms agree within the error bound, not bit for bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// For decoding: one pass over keys and values at the speed of memory; keys split at a fixed length, so that few rows
    /// keep many threads busy.
    FewQueries,
    /// For prefill and encoders: tiles of queries in the lanes, at the speed of the multipliers.
    ManyQueries,
}

/// Whether a call may use the threads around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Threads {
    /// The current rayon pool, unless the work is too small to be worth waking it. Serial without the feature `rayon`, and
    /// where the threads of rayon's global pool can't be started.
    #[default]
    Pool,
    /// The calling thread alone.
    Serial,
}

/// Whether the few-queries form is the faster one. It takes as long as there are rows; the other form as long as there are vectors
/// of lanes, full or not, of which the second one of a panel is cheaper. What either does for each row or panel counts, too,
/// where there are few keys; and pairs of bf16 make both quicker, so that it counts for longer.
///
/// Few's time by many's (AVX-512, Zen 5, in cache; with AVX2 8 rows fill a vector, and it is 0.85 to 0.95, but else much the same):
///
/// | rows | 8 | 10 | 12 | 16 | 20 | 24 |
/// |---|---|---|---|---|---|---|
/// | 64, f32, 32 / 128 / 4096 keys | 0.97 / 0.76 / 0.65 | 1.16 / 0.94 / 0.75 | 1.31 / 1.04 / 0.86 | – / – / 1.2 | 1.27 / 0.96 / 0.85 | 1.4 / 1.1 / 0.95 |
/// | 128, f16, 32 / 128 / 4096 keys | 0.69 / 0.61 / 0.53 | 0.83 / 0.75 / 0.65 | 0.95 / 0.85 / 0.77 | – / – / 1.0 | 0.94 / 0.82 / 0.72 | 1.1 / 0.95 / 0.86 |
/// | 128, bf16, 32 / 256 / 4096 keys | 1.02 / 0.67 / 0.64 | 1.21 / 0.83 / 0.8 | 1.39 / 0.96 / 0.99 | – / – / 1.3 | 1.36 / 0.85 / 0.87 | 1.56 / 1.01 / 1.0 |
///
/// Heads of 32 are like those of 64, a fifth higher. 24 rows of 64, f32, take 1.16 times the time where memory is cold.
/// `cargo bench --bench growth` measures it.
///
/// * `halves`: whether keys are of a half type
fn suits_few(rows: usize, dims: &Dims, level: Level, halves: bool, from_pairs: bool) -> bool {
    let (always, enough_keys) = if from_pairs { (6, 256) } else { (8, 128) };
    if rows <= always {
        return true;
    }
    if dims.head_dim < 64 || dims.seq_kv < enough_keys {
        return false;
    }
    let (in_one, in_two) = match (from_pairs, halves || dims.head_dim >= 128) {
        (true, _) => (10, 20),
        (false, true) => (12, 24),
        (false, false) => (12, 20),
    };
    // (Portable code keeps fewer sums in registers: with 20 rows it takes up to three times as long.)
    rows <= in_one || level != Level::Portable && (17..=in_two).contains(&rows)
}

/// Rows of one task of the few-queries form: all that the plan gives to it, so that keys and values are read once. (With 12, 20
/// rows took 6 to 10% longer.)
pub(crate) const FEW_TASK_ROWS: usize = 24;

/// Keys of one split of the few-queries form. At head_dim 128 and 16 bits, 256 KiB of keys and values: some 15 µs of
/// memory time, long beside the cost of handing out a task, and the partial result is 1/128 of it.
const SPLIT_KEYS: usize = 512;

/// Keys whose scores the few-queries form holds at once; divides [`SPLIT_KEYS`]. Long enough that memory sees one stream of
/// keys, then one of values: with tiles of 64, decoding took a quarter longer.
const FEW_TILE_KEYS: usize = 256;

/// With so many tasks there is no need to split keys between tasks.
const PLENTY_TASKS: usize = 64;

/// Partial results of split keys are kept if there are no more elements of them than this: 1 GiB. One query of 128 values
/// gets there with 860 million keys.
const MAX_PARTIALS: usize = 1 << 28;

/// Elements of a partial result: the values of some rows, then the rows' maxima and sums, each in whole vectors.
/// (No overflow: a problem's rows times its value_dim stay below 2^60, output or not.)
pub(crate) fn partial_len(rows: usize, value_dim: usize) -> usize {
    rows * round_up_lanes(value_dim) + 2 * round_up_lanes(rows)
}

/// Elements of a K tile and a V tile together: 192 KiB as f32. With as much for the packed queries and outputs of a block of
/// head_dim 128, that fits a second-level cache of 512 KiB. (128 KiB took 1% longer at head_dim 128.)
const TILE_ELEMENTS: usize = 48 * 1024;

/// Rows that share a packed tile of keys and values. Fetching and packing a key and its value costs about half as much as
/// using them for 16 rows, so shared by sixteen times as many it is a thirtieth of the work. (192 rows took 1% longer; 384 no
/// less, and leave fewer tasks.)
const BLOCK_ROWS: usize = 256;

/// Below so many multiply-adds the calling thread works alone: about 20 µs, what waking a pool costs.
const PARALLEL_WORK: usize = 1 << 20;

/// The decision for one problem on one machine, as it is carried out. Printing it tells which form, tiles and tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub(crate) isa: Isa,
    pub(crate) form: Form,
    pub(crate) dims: Dims,
    /// Keys of one tile; tiles start at multiples of it.
    pub(crate) tile_keys: usize,
    /// Keys of one split (few queries).
    pub(crate) split_keys: usize,
    /// Whether each split is a task of its own (few queries).
    pub(crate) split_tasks: bool,
    /// The blocks that the rows of each key/value head are divided into: of rows (few queries) or panels (many).
    pub(crate) blocks: EvenBlocks,
    /// Whether the work is worth more than one thread.
    pub(crate) parallel: bool,
}

impl Plan {
    pub(crate) fn new(problem: &Problem<'_>, machine: Machine, form: Option<Form>, threads: Threads) -> Self {
        let dims = problem.dims;
        let rows = dims.rows();
        let form = form.unwrap_or_else(|| {
            let factor = query_factor(problem.scale, problem.bias.softcap, Unit::Log2);
            let from_pairs = pairs::apply(machine.isa, &problem.q, &problem.k, factor);
            let few = suits_few(rows, &dims, machine.isa.level(), !matches!(problem.k, AnyTensor::F32(_)), from_pairs);
            if few { Form::FewQueries } else { Form::ManyQueries }
        });
        let heads = dims.batch.saturating_mul(dims.heads_kv);
        let (tile_keys, blocks) = match form {
            Form::FewQueries => (FEW_TILE_KEYS, EvenBlocks::new(rows, FEW_TASK_ROWS)),
            Form::ManyQueries => {
                let panel = panel_lanes(machine.isa);
                (tile_keys(&dims), EvenBlocks::new(rows.div_ceil(panel), BLOCK_ROWS / panel))
            }
        };
        // Split tasks and unsplit ones give the same bits, so this may depend on anything.
        let worth_splitting = dims.seq_kv > SPLIT_KEYS && heads.saturating_mul(blocks.count) < PLENTY_TASKS;
        let partial = partial_len(rows.min(FEW_TASK_ROWS), dims.value_dim);
        let partials =
            [heads, blocks.count, dims.seq_kv.div_ceil(SPLIT_KEYS)].into_iter().fold(partial, usize::saturating_mul);
        Plan {
            isa: machine.isa,
            form,
            dims,
            tile_keys,
            split_keys: SPLIT_KEYS,
            split_tasks: form == Form::FewQueries && worth_splitting && partials <= MAX_PARTIALS,
            blocks,
            parallel: threads == Threads::Pool && multiply_adds(&dims) >= PARALLEL_WORK,
        }
    }

    /// The form that the problem is computed in.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The instruction set that it is computed with.
    pub fn level(&self) -> Level {
        self.isa.level()
    }

    /// Query rows of a full panel (many queries).
    pub(crate) fn panel_lanes(&self) -> usize {
        panel_lanes(self.isa)
    }

    /// The rows of block `block`: whole panels, shared out evenly.
    pub(crate) fn block_rows(&self, block: usize) -> Range<usize> {
        let rows = self.dims.rows();
        let unit = match self.form {
            Form::FewQueries => 1,
            Form::ManyQueries => self.panel_lanes(),
        };
        let units = self.blocks.range(block);
        (units.start * unit).min(rows)..(units.end * unit).min(rows)
    }

    /// Splits of the keys.
    pub(crate) fn splits(&self) -> usize {
        self.dims.seq_kv.div_ceil(self.split_keys)
    }

    /// Tasks that can be worked on side by side, if no mask rules any out.
    pub(crate) fn tasks(&self) -> usize {
        let splits = if self.split_tasks { self.splits() } else { 1 };
        // Saturating: a problem without an output may have any dimensions.
        [self.dims.batch, self.dims.heads_kv, self.blocks.count].into_iter().fold(splits, usize::saturating_mul)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dims { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim } = self.dims;
        write!(f, "b{batch} h{heads_q}/{heads_kv} q{seq_q} kv{seq_kv} d{head_dim}/{value_dim}: ")?;
        match self.form {
            Form::FewQueries => {
                write!(f, "few queries, {} rows a head, splits of {} keys", self.dims.rows(), self.split_keys)?;
            }
            Form::ManyQueries => write!(
                f,
                "many queries, tiles of {} queries x {} keys, blocks of {} rows",
                self.panel_lanes(),
                self.tile_keys,
                if self.blocks.count == 0 { 0 } else { self.block_rows(0).len() },
            )?,
        }
        let threads = if self.parallel { "in the pool" } else { "serial" };
        write!(f, ", {} tasks, {threads}, {}", self.tasks(), self.level())
    }
}

/// Keys of a tile of the many-queries form: as [`TILE_ELEMENTS`] allows, but enough that the ends of a tile don't count,
/// and not so many that its scores leave the first cache: 240 keys of 32 queries are 30 KiB. (Where that is all of it, blocks of
/// scores are still read and written straight on; on Zen 5, whose first cache has 48 KiB, 192 keys were no faster and 144 slower.)
fn tile_keys(dims: &Dims) -> usize {
    let elements = round_up_lanes(dims.head_dim + dims.value_dim).max(1);
    (TILE_ELEMENTS / elements / 48 * 48).clamp(48, 240)
}

fn multiply_adds(dims: &Dims) -> usize {
    let pairs = [dims.batch, dims.heads_q, dims.seq_q, dims.seq_kv];
    let each = dims.head_dim.saturating_add(dims.value_dim);
    pairs.into_iter().fold(each, usize::saturating_mul)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of either side of every step, for each kind of keys.
    #[test]
    fn few_queries_are_chosen_where_they_are_faster() {
        let rows = |level, (head_dim, seq_kv), halves, from_pairs| -> Vec<usize> {
            let dims = Dims { batch: 1, heads_q: 1, heads_kv: 1, seq_q: 1, seq_kv, head_dim, value_dim: head_dim };
            let chosen = (1..=64).map(|rows| suits_few(rows, &dims, level, halves, from_pairs)).collect::<Vec<_>>();
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
        assert_eq!(rows(Level::Avx512Bf16, (128, 255), true, true), [6]);
        assert_eq!(rows(Level::Avx512Bf16, (128, 256), true, true), [10, 16, 20]);
    }
}
