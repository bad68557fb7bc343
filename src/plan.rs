//! Decides how a problem is computed: form, operands, tiles, splits and tasks. The plan is a pure function of the problem and
//! the level.
//!
//! Everything is decided once, in [`Plan::new`]; drivers and kernels follow the plan. `plan/tuning.rs` has the numbers with
//! their reasons.

#![forbid(unsafe_code)]

mod tuning;

use crate::element::ByElement;
use crate::kernel::bf16_pairs;
use crate::kernel::partial::PartialLayout;
use crate::kernel::shape::{EvenBlocks, panel_lanes};
use crate::kernel::task::Operands;
use crate::level::Level;
use crate::problem::{Dims, Problem};
use crate::score::Unit;
use crate::sequence::Sequence;
use crate::simd::Isa;
use crate::threads::Worth;
use std::fmt;
use std::ops::Range;
use tuning::{
    BLOCK_ROWS, DECODE_TASK_ROWS, DECODE_TILE_KEYS, ENOUGH_TASKS, MAX_PARTIALS, PARALLEL_WORK, SPLIT_KEYS, WAKING_WORK,
};

/// The form of the computation: how queries and keys lie in vectors. The results of the two forms agree within the error bound,
/// not bit for bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// For many query rows. Queries lie in the lanes, and the multipliers bound the speed.
    Prefill,
    /// For few query rows. Keys and values are read once, and memory bandwidth bounds the speed. Keys are split at a fixed
    /// length, so that few rows keep many threads busy.
    Decode,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Form::Prefill => "prefill",
            Form::Decode => "decode",
        })
    }
}

/// The threads that a call may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Threads {
    /// The rayon pool that the caller is in, unless the work is too small. A caller outside a pool is one of the workers, and
    /// threads of this crate help if they come in time: with the caller, the number of threads of rayon's global pool. It wakes
    /// them only for 2^23 multiply-adds or more (some 0.2 ms with AVX2), or if calls follow each other closely. Calls are serial
    /// without the feature `rayon`, and if threads can't be started.
    #[default]
    Pool,
    /// The calling thread alone.
    Serial,
}

/// The plan for one problem at one level; made by [`Attention::plan`](crate::Attention::plan).
///
/// It prints its form, tiles and tasks. The accessors return the same numbers. The form of a sequence follows from its own numbers
/// of queries and keys, so a batch may have both.
///
/// ```
/// use flashtile::{Attention, Form};
/// use ndarray::Array4;
///
/// let (q, kv) = (Array4::from_elem((1, 8, 1, 64), 0.5f32), Array4::from_elem((1, 2, 300, 64), 0.5f32));
/// let plan = Attention::new().plan(&q, (&kv, &kv))?;
/// assert_eq!((plan.form(), plan.tasks()), (Form::Decode, 2)); // one task for each key/value head
/// println!("{plan}");
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    isa: Isa,
    operands: Operands,
    dims: Dims,
    /// The form that was set, for all sequences.
    set_form: Option<Form>,
    /// Whether keys have a half type.
    halves: bool,
    /// The plan of the sequence with the most multiply-adds.
    largest: SequencePlan,
    /// The number of sequences in the decode form.
    decoded: usize,
    /// Whether each split is a task of its own (decode).
    split_tasks: bool,
    /// Blocks of rows of all sequences, for one key/value head of each.
    all_blocks: usize,
    /// The runs that key/value heads with the same spans are divided into, and the number of these heads: all, or those of one
    /// batch. A task computes the heads of a run.
    head_runs: EvenBlocks,
    alike_heads: usize,
    threads: Threads,
    /// Multiply-adds of all pairs of query and key, hidden ones included.
    work: usize,
}

/// How the rows of one sequence are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SequencePlan {
    pub(crate) form: Form,
    /// Query rows of a key/value head.
    rows: usize,
    /// Rows at the end of each key/value head that are computed in the decode form, after the others.
    tail_rows: usize,
    /// Query rows of a panel; 1 in decode.
    unit: usize,
    /// The blocks that the rows of each key/value head are divided into: of rows (decode) or panels (prefill).
    blocks: EvenBlocks,
}

impl SequencePlan {
    /// No rows.
    const NONE: Self = SequencePlan { form: Form::Decode, rows: 0, tail_rows: 0, unit: 1, blocks: EvenBlocks::NONE };

    /// The number of blocks that the rows of each key/value head are divided into.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.count
    }

    /// The rows of block `block`, and the tail that is decoded after them. Prefill divides whole panels evenly over the blocks,
    /// decode rows.
    pub(crate) fn block_rows(&self, block: usize) -> (Range<usize>, Range<usize>) {
        let (rows, units) = (self.rows - self.tail_rows, self.blocks.range(block));
        let rows = (units.start * self.unit).min(rows)..(units.end * self.unit).min(rows);
        let tail = rows.end..if block + 1 == self.blocks.count { self.rows } else { rows.end };
        (rows, tail)
    }
}

/// How the probabilities of one sequence are summed for each key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeySumsPlan {
    pub(crate) form: Form,
    /// Query heads whose rows are computed together: one (prefill), or all that share a key/value head (decode).
    pub(crate) heads: usize,
    /// Query rows of these heads.
    rows: usize,
    /// The most rows that are added up before the next ones are.
    pub(crate) block_rows: usize,
}

impl KeySumsPlan {
    /// The blocks of rows, in the order in which they are added.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, size) = (self.rows, self.block_rows);
        (0..rows).step_by(size).map(move |start| start..(start + size).min(rows))
    }
}

impl Plan {
    pub(crate) fn new(problem: &Problem<'_>, isa: Isa, form: Option<Form>, threads: Threads) -> Self {
        Self::of_operands(problem, isa, form, operands(problem, isa), threads)
    }

    /// The plan for scores as an output: the prefill form, from f32.
    pub(crate) fn for_scores(problem: &Problem<'_>, isa: Isa, threads: Threads) -> Self {
        Self::of_operands(problem, isa, Some(Form::Prefill), Operands::F32, threads)
    }

    /// The same plan for tensors of other types: the operands follow from the types.
    pub(crate) fn for_types_of(self, problem: &Problem<'_>) -> Self {
        Plan { operands: operands(problem, self.isa), ..self }
    }

    /// The plan for another problem, with the same level, form and threads.
    pub(crate) fn replanned(&self, problem: &Problem<'_>) -> Self {
        Self::new(problem, self.isa, self.set_form, self.threads)
    }

    fn of_operands(
        problem: &Problem<'_>,
        isa: Isa,
        set_form: Option<Form>,
        operands: Operands,
        threads: Threads,
    ) -> Self {
        let (dims, sequences) = (problem.dims, &problem.sequences);
        // Users' masks may differ from sequence to sequence, and from head to head.
        let sequences_are_alike = !problem.masks.has_dynamic() && sequences.are_alike();
        let heads = dims.batch.saturating_mul(dims.heads_kv);
        let mut plan = Plan {
            isa,
            operands,
            dims,
            set_form,
            halves: !matches!(problem.k, ByElement::F32(_)),
            largest: SequencePlan::NONE,
            decoded: 0,
            split_tasks: false,
            all_blocks: 0,
            head_runs: EvenBlocks::new(0, 1),
            alike_heads: match (problem.masks.heads_are_alike(), sequences_are_alike) {
                (false, _) => dims.heads_kv.min(1),
                (true, false) => dims.heads_kv,
                (true, true) => heads,
            },
            threads,
            work: 0,
        };
        plan.add_sequences(problem);
        let tasks = dims.heads_kv.saturating_mul(plan.all_blocks);
        // Splits that are tasks and splits in one task give the same bits, so this may depend on the whole problem.
        let worth_splitting = dims.seq_kv > SPLIT_KEYS && tasks < ENOUGH_TASKS;
        let partial = PartialLayout::new(plan.largest.rows.min(DECODE_TASK_ROWS), dims.value_dim).len();
        let partials = [tasks, dims.seq_kv.div_ceil(SPLIT_KEYS)].into_iter().fold(partial, usize::saturating_mul);
        let all_decoded = plan.decoded == dims.batch;
        plan.split_tasks = all_decoded && worth_splitting && partials <= MAX_PARTIALS;
        let task_heads = tuning::task_heads(plan.work / heads.max(1), tasks);
        plan.head_runs = EvenBlocks::new(plan.alike_heads, task_heads);
        plan
    }

    /// Counts the work and the blocks of all sequences.
    fn add_sequences(&mut self, problem: &Problem<'_>) {
        // Sequences of the same size are planned once.
        let distinct = problem.sequences.distinct(self.dims.batch);
        let each = if distinct.len() == self.dims.batch { 1 } else { self.dims.batch };
        let mut largest_work = 0;
        for sequence in distinct.map(|b| problem.sequences.get(b)) {
            let own = self.of_sequence(&sequence);
            let work = multiply_adds(&self.dims, &sequence);
            self.work = self.work.saturating_add(work.saturating_mul(each));
            self.all_blocks = self.all_blocks.saturating_add(own.blocks.count.saturating_mul(each));
            self.decoded += if own.form == Form::Decode { each } else { 0 };
            if self.largest == SequencePlan::NONE || work > largest_work {
                (self.largest, largest_work) = (own, work);
            }
        }
    }

    /// How a sequence is computed. It follows from the sequence alone, so that its bits do, too.
    pub(crate) fn of_sequence(&self, sequence: &Sequence) -> SequencePlan {
        let rows = sequence.queries.saturating_mul(self.dims.group());
        let suits =
            || tuning::suits_decode(rows, sequence.keys, &self.dims, self.isa.level(), self.halves, self.operands);
        let (form, tail_rows) = match self.set_form {
            Some(form) => (form, 0),
            None if suits() => (Form::Decode, 0),
            None => (Form::Prefill, tuning::tail_rows(rows, sequence.keys, self.isa.lanes())),
        };
        let panel = panel_lanes(self.isa);
        let (unit, blocks) = match form {
            Form::Decode => (1, EvenBlocks::new(rows, DECODE_TASK_ROWS)),
            Form::Prefill => (panel, EvenBlocks::new((rows - tail_rows).div_ceil(panel), BLOCK_ROWS / panel)),
        };
        SequencePlan { form, rows, tail_rows, unit, blocks }
    }

    /// How the probabilities of a sequence are summed. In prefill, a vector has queries of one head, so that it is added up as a
    /// whole: the form follows from the number of queries, not of rows.
    pub(crate) fn key_sums_of(&self, sequence: &Sequence) -> KeySumsPlan {
        let (queries, keys, level) = (sequence.queries, sequence.keys, self.isa.level());
        let suits_decode = || tuning::suits_decode(queries, keys, &self.dims, level, self.halves, self.operands);
        match self.set_form {
            Some(Form::Decode) => {}
            None if suits_decode() => {}
            _ => return KeySumsPlan { form: Form::Prefill, heads: 1, rows: queries, block_rows: BLOCK_ROWS },
        }
        let heads = self.dims.group();
        KeySumsPlan { form: Form::Decode, heads, rows: queries.saturating_mul(heads), block_rows: DECODE_TASK_ROWS }
    }

    /// Keys of a task that sums probabilities. The bits don't depend on it.
    pub(crate) fn keys_of_sum_task(&self) -> usize {
        let tile = self.steps(self.largest.form).tile;
        let heads = self.dims.batch.saturating_mul(self.dims.heads_kv);
        tile * tuning::sum_task_tiles(heads.saturating_mul(self.dims.seq_kv.div_ceil(tile)))
    }

    /// The form of the sequence with the most work, for all rows but the last [`tail_rows`](Self::tail_rows).
    pub fn form(&self) -> Form {
        self.largest.form
    }

    /// The number of sequences in a form.
    pub fn sequences(&self, form: Form) -> usize {
        match form {
            Form::Decode => self.decoded,
            Form::Prefill => self.dims.batch - self.decoded,
        }
    }

    /// The number of rows at the end of each key/value head that are computed in the decode form, although the others are
    /// computed in the prefill form: a few rows that would take the time of a whole vector of them. It is that of the sequence with
    /// the most work; 0 if [`Attention::form`](crate::Attention::form) has set the form.
    pub fn tail_rows(&self) -> usize {
        self.largest.tail_rows
    }

    /// The instruction set of the computation.
    pub fn level(&self) -> Level {
        self.isa.level()
    }

    /// What scores are formed from.
    pub fn operands(&self) -> Operands {
        self.operands
    }

    /// The most query rows of a tile of scores: those of a panel (prefill) or of a task (decode).
    pub fn tile_rows(&self) -> usize {
        match self.largest.form {
            Form::Prefill => panel_lanes(self.isa),
            Form::Decode => self.largest.blocks.start(1).min(self.largest.rows),
        }
    }

    /// The most keys of a tile of scores. Tiles start at multiples of it.
    pub fn tile_keys(&self) -> usize {
        self.steps(self.largest.form).tile
    }

    /// The keys of one split (decode; `None` for prefill). The results of splits are merged in the order of the keys.
    pub fn split_keys(&self) -> Option<usize> {
        self.steps(self.largest.form).split
    }

    /// The number of tasks, which can be computed in parallel. A task has one key/value head, or several small ones. A mask may
    /// leave some tasks without keys.
    pub fn tasks(&self) -> usize {
        let splits = if self.split_tasks { self.splits() } else { 1 };
        self.listed_tasks().saturating_mul(splits)
    }

    /// The number of tasks in the list, where all splits are one.
    pub(crate) fn listed_tasks(&self) -> usize {
        // Saturating: a problem without an output may have any dimensions.
        let heads = self.dims.batch.saturating_mul(self.dims.heads_kv);
        match self.alike_heads == heads {
            true => self.largest.blocks.count.saturating_mul(self.head_runs.count),
            false => {
                let runs = self.dims.heads_kv.checked_div(self.alike_heads).unwrap_or(0) * self.head_runs.count;
                self.all_blocks.saturating_mul(runs)
            }
        }
    }

    /// The key/value heads with the same spans, counted through all batches: all heads, or one batch after the other.
    pub(crate) fn alike_heads(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (heads, alike) = (self.dims.batch.saturating_mul(self.dims.heads_kv), self.alike_heads);
        (0..heads).step_by(alike.max(1)).map(move |first| first..first + alike)
    }

    /// The runs of heads that tasks compute, of `alike`, one of [`alike_heads`](Self::alike_heads).
    pub(crate) fn head_runs(&self, alike: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let runs = self.head_runs;
        (0..runs.count).map(move |n| alike.start + runs.start(n)..alike.start + runs.start(n + 1))
    }

    /// Whether the work is large enough for several threads and [`Threads`] allows them.
    pub fn is_parallel(&self) -> bool {
        cfg!(feature = "rayon") && self.threads == Threads::Pool && self.work >= PARALLEL_WORK
    }

    /// The threads that the work is worth.
    pub(crate) fn worth(&self) -> Worth {
        match self.work {
            _ if !self.is_parallel() => Worth::Caller,
            ..WAKING_WORK => Worth::Awake,
            _ => Worth::Waking,
        }
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// Whether each split of the keys is a task of its own.
    pub(crate) fn has_split_tasks(&self) -> bool {
        self.split_tasks
    }

    /// The number of splits of the keys; 1 for prefill, which has no splits.
    pub(crate) fn splits(&self) -> usize {
        self.split_keys().map_or(1, |keys| self.dims.seq_kv.div_ceil(keys))
    }

    /// The part of `keys` first keys that a pass of its own may compute for several sequences: whole splits, because their results are
    /// what the other keys' results are merged into.
    pub(crate) fn prefix_keys(&self, keys: usize) -> usize {
        keys / SPLIT_KEYS * SPLIT_KEYS
    }

    /// The rows of a task of that pass, for `rows` rows of a key/value head.
    pub(crate) fn prefix_task_rows(&self, rows: usize) -> usize {
        tuning::prefix_task_rows(rows)
    }

    /// Whether each split is a task of its own in that pass. It changes no bits.
    ///
    /// * `tasks`: the tasks otherwise
    /// * `partials`: the elements of all splits' partial results
    pub(crate) fn has_split_prefixes(&self, tasks: usize, partials: usize) -> bool {
        self.is_parallel() && tasks < ENOUGH_TASKS && partials <= MAX_PARTIALS
    }

    /// How rows of form `form` step over their keys.
    pub(crate) fn steps(&self, form: Form) -> KeySteps {
        match form {
            Form::Decode => KeySteps { tile: DECODE_TILE_KEYS, split: Some(SPLIT_KEYS) },
            Form::Prefill => KeySteps { tile: tuning::prefill_tile_keys(&self.dims), split: None },
        }
    }
}

/// How a piece's keys are stepped over: split by split, and tile by tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeySteps {
    /// Keys of a tile; divides those of a split.
    pub(crate) tile: usize,
    split: Option<usize>,
}

/// The splits with keys that a task may see: a run, but for some in its middle that hold nothing but lost keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Splits {
    all: Range<usize>,
    lost: Range<usize>,
}

impl Splits {
    /// The number of splits.
    pub(crate) fn len(&self) -> usize {
        self.all.len() - self.lost.len()
    }

    /// Split `n` of these, whose place among all splits of the sequence is the result.
    pub(crate) fn get(&self, n: usize) -> usize {
        let split = self.all.start + n;
        if split < self.lost.start { split } else { split + self.lost.len() }
    }
}

impl KeySteps {
    /// The splits that `keys` without those in `lost` reach into.
    pub(crate) fn splits_of(&self, keys: &Range<usize>, lost: &Range<usize>) -> Splits {
        let Some(size) = self.split else { return Splits { all: 0..1, lost: 1..1 } };
        let all = keys.start / size..keys.end.div_ceil(size);
        // A split at either end of the keys is lost if its part of them is.
        let first = if lost.start <= keys.start { all.start } else { lost.start.div_ceil(size) };
        let end = if lost.end >= keys.end { all.end } else { lost.end / size };
        let (first, end) = (first.clamp(all.start, all.end), end.clamp(all.start, all.end));
        let lost = if lost.is_empty() || first >= end { all.end..all.end } else { first..end };
        Splits { all, lost }
    }

    /// The part of `keys` in split `split`, which must be one of [`splits_of`](Self::splits_of).
    pub(crate) fn split_of(&self, split: usize, keys: &Range<usize>) -> Range<usize> {
        match self.split {
            Some(size) => (split * size).max(keys.start)..((split + 1) * size).min(keys.end),
            None => keys.clone(),
        }
    }

    /// The tiles of `keys` that hold more than keys in `lost`.
    pub(crate) fn seen_tiles(
        &self,
        keys: Range<usize>,
        lost: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        // Two runs of tiles: up to the first lost tile, and from the one after the last. A tile at either end of the keys is lost if
        // its part of them is.
        let (size, Range { start, end }) = (self.tile, keys);
        let (before, after) = match lost {
            _ if lost.is_empty() => (start..end, end..end),
            lost => {
                let first = if lost.start <= start { start } else { lost.start.next_multiple_of(size).min(end) };
                let next = if lost.end >= end { end } else { lost.end / size * size };
                (start..first, next.max(first)..end)
            }
        };
        self.tiles_of(before).chain(self.tiles_of(after))
    }

    /// The tiles of `keys`. They start at multiples of the tile size, even if `keys` don't, so that the order of a row's
    /// additions depends on the row alone.
    pub(crate) fn tiles_of(&self, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let size = self.tile;
        let first = if keys.is_empty() { keys.end } else { keys.start / size * size };
        (first..keys.end).step_by(size).map(move |start| start.max(keys.start)..(start + size).min(keys.end))
    }
}

/// The operands that a problem's scores are formed from.
fn operands(problem: &Problem<'_>, isa: Isa) -> Operands {
    let bf16 = matches!((&problem.q, &problem.k), (ByElement::Bf16(_), ByElement::Bf16(_)));
    let factor = problem.score_mods.query_factor(problem.scale, Unit::Log2);
    if bf16 && bf16_pairs::usable(isa, factor) { Operands::Bf16Pairs } else { Operands::F32 }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dims { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim } = self.dims;
        let SequencePlan { form, rows, tail_rows, blocks, .. } = self.largest;
        write!(f, "b{batch} h{heads_q}/{heads_kv} q{seq_q} kv{seq_kv} d{head_dim}/{value_dim}: {form}")?;
        match form {
            Form::Decode => write!(f, ", {rows} rows a head, splits of {SPLIT_KEYS} keys")?,
            Form::Prefill => write!(
                f,
                ", tiles of {} queries x {} keys, blocks of {} rows",
                self.tile_rows(),
                self.tile_keys(),
                if blocks.count == 0 { 0 } else { self.largest.block_rows(0).0.len() },
            )?,
        }
        if tail_rows > 0 {
            write!(f, " and {tail_rows} decoded")?;
        }
        if (1..batch).contains(&self.decoded) {
            write!(f, ", {} sequences in prefill and {} in decode", batch - self.decoded, self.decoded)?;
        }
        if self.operands == Operands::Bf16Pairs {
            write!(f, ", scores from pairs of bf16")?;
        }
        let threads = if self.is_parallel() { "in the pool" } else { "serial" };
        write!(f, ", {} tasks, {threads}, {}", self.tasks(), self.level())
    }
}

/// Multiply-adds of all pairs of query and key of a sequence.
fn multiply_adds(dims: &Dims, sequence: &Sequence) -> usize {
    let pairs = [dims.heads_q, sequence.queries, sequence.keys];
    let each = dims.head_dim.saturating_add(dims.value_dim);
    pairs.into_iter().fold(each, usize::saturating_mul)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splits and tiles are those with a key that is not lost, for any run of keys and of lost keys.
    #[test]
    fn splits_and_tiles_leave_out_lost_keys() {
        const MOST: usize = 13;
        let ranges = || (0..=MOST).flat_map(|start| (0..=MOST).map(move |end| start..end));
        let steps = KeySteps { tile: 2, split: Some(4) };
        for keys in ranges().filter(|keys| !keys.is_empty()) {
            for lost in ranges() {
                let seen = |part: &Range<usize>| part.clone().any(|key| !lost.contains(&key));
                let all = keys.start / 4..keys.end.div_ceil(4);
                let expected: Vec<usize> = all.filter(|split| seen(&steps.split_of(*split, &keys))).collect();
                let splits = steps.splits_of(&keys, &lost);
                let got: Vec<usize> = (0..splits.len()).map(|n| splits.get(n)).collect();
                assert_eq!(got, expected, "{keys:?} without {lost:?}");

                let expected: Vec<_> = steps.tiles_of(keys.clone()).filter(seen).collect();
                let got: Vec<_> = steps.seen_tiles(keys.clone(), &lost).collect();
                assert_eq!(got, expected, "{keys:?} without {lost:?}");
            }
        }
        let whole = KeySteps { tile: 2, split: None };
        assert_eq!((whole.splits_of(&(3..9), &(0..9)).len(), whole.splits_of(&(3..9), &(0..9)).get(0)), (1, 0));
        let nothing_lost = Range { start: usize::MAX - 1, end: 0 };
        assert_eq!(steps.seen_tiles(1..5, &nothing_lost).collect::<Vec<_>>(), [1..2, 2..4, 4..5]);
    }
}
