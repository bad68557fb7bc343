//! Sequences of a batch that share their first keys, such as a system prompt or beams: one pass over these keys for all of them.
//!
//! Decode merges splits of the keys in their order, and a row's bits don't depend on the rows beside it. So the first splits can be
//! computed with the rows of all sequences that have them, each key read and widened once, and each sequence goes on from the result.
//! The bits are those of the sequence alone.
//!
//! ```text
//! find       neighbouring sequences with the same memory for the same first keys, all visible: a group
//! compute    a result for each of the group's rows, over these keys
//! rest       the keys that the sequence's own tasks are left with; they start from the result
//! ```
//!
//! Groups are found at each call, because a prepared schedule may meet other keys than those it was made for. They change no task: a
//! task has fewer keys to step over.

#![forbid(unsafe_code)]

use super::output::{ClaimedSlot, SlotClaims};
use super::schedule::Task;
use super::steps::step_over;
use super::task::input_of_heads;
use crate::element::with_elements;
use crate::kernel::decode::Decode;
use crate::kernel::form::FormKernel;
use crate::kernel::partial::{EarlierResults, PartialLayout};
use crate::kernel::prefetch::Prefetch;
use crate::kernel::scratch::{Floats, Scratch};
use crate::kernel::task::{Piece, TaskInput};
use crate::kv::Places;
use crate::mask::Masks;
use crate::plan::{Form, Plan};
use crate::problem::Problem;
use crate::score::ScoreMods;
use crate::sequence::{Lengths, Sequence};
use crate::tensor::group::AnyGroupRows;
use crate::threads::{work_through, workers};
use std::ops::Range;

/// Neighbouring sequences with the same first keys.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    sequences: Range<usize>,
    /// The number of shared keys: whole splits.
    keys: usize,
    /// Query rows of a key/value head, of all sequences, and those of a block; the last block may have fewer.
    rows: usize,
    block_rows: usize,
    /// Where its slots start, and the number of results, which follow each other in the order of the keys: one of all keys, or one of
    /// each split.
    first_slot: usize,
    results: usize,
}

impl Group {
    /// The blocks of rows of a key/value head.
    fn blocks(&self) -> usize {
        self.rows.div_ceil(self.block_rows)
    }
}

/// The groups of a call, and the results over their keys.
#[derive(Debug, Default)]
pub(super) struct SharedPrefixes {
    /// In the order of their sequences and slots.
    groups: Vec<Group>,
    /// Elements of a slot, which has a result for a block of rows.
    slot: usize,
    /// `[groups][results][key/value heads][blocks][slot]`.
    memory: Floats,
}

impl SharedPrefixes {
    /// Finds the groups of a call, and computes the results over their keys.
    pub(super) fn compute(&mut self, problem: &Problem<'_>, plan: &Plan, scratch: &mut Vec<Scratch>) {
        self.groups.clear();
        if !may_share(problem, plan) {
            return;
        }
        self.find(problem, plan);
        if self.groups.is_empty() {
            return;
        }
        let slots = self.lay_out(problem, plan);
        let scratch = Scratch::for_workers(scratch, workers(plan.worth(), slots));
        let SharedPrefixes { groups, slot, memory } = self;
        let [memory] = memory.buffers([slots * *slot]);
        let claims = SlotClaims::new(memory, *slot, scratch.len());
        // What hides keys or changes scores row by row is not here, or changes nothing before the end of these keys.
        let score_mods = ScoreMods { softcap: problem.score_mods.softcap, ..ScoreMods::default() };
        let problem = &Problem { masks: Masks::default(), score_mods, ..*problem };
        work_through(plan.worth(), scratch, &claims, &|claimed, scratch| {
            compute(groups, problem, plan, claimed, scratch)
        });
        Scratch::grow_to_largest(scratch);
    }

    /// Lists the groups. From the first sequence to the last, each joins those before it if that saves more keys than it costs, because
    /// a group shares what all of its sequences share.
    fn find(&mut self, problem: &Problem<'_>, plan: &Plan) {
        // The next call may have other groups, and must not allocate then.
        self.groups.reserve(problem.dims.batch / 2);
        let mut first = 0;
        let mut shared = 0; // by the sequences from `first` on
        let mut seen = seen_by_all(problem, plan, 0);
        for b in 1..problem.dims.batch {
            let seen_before = std::mem::replace(&mut seen, seen_by_all(problem, plan, b));
            let most = seen.min(seen_before);
            let with_last =
                if plan.prefix_keys(most) == 0 { 0 } else { plan.prefix_keys(shared_keys(problem, b, most)) };
            let others = b - 1 - first;
            if others > 0 && with_last <= 2 * shared && (others + 1) * shared.min(with_last) >= others * shared {
                shared = shared.min(with_last);
                continue;
            }
            // The sequence before is in the group that saves more keys.
            let end = if with_last > 2 * shared { b - 1 } else { b };
            self.push(problem, plan, first..end, shared);
            (first, shared) = (end, if end < b { with_last } else { 0 });
        }
        self.push(problem, plan, first..problem.dims.batch, shared);
    }

    /// Adds a group, unless it shares nothing.
    fn push(&mut self, problem: &Problem<'_>, plan: &Plan, sequences: Range<usize>, keys: usize) {
        if sequences.len() < 2 || keys == 0 {
            return;
        }
        let rows = first_row(problem, &sequences, sequences.end);
        let block_rows = plan.prefix_task_rows(rows);
        self.groups.push(Group { sequences, keys, rows, block_rows, first_slot: 0, results: 1 });
    }

    /// Gives each group its slots. Returns their number.
    fn lay_out(&mut self, problem: &Problem<'_>, plan: &Plan) -> usize {
        let steps = plan.steps(Form::Decode);
        let splits = |group: &Group| steps.splits_of(&(0..group.keys), &(0..0)).len();
        let tasks = |group: &Group| problem.dims.heads_kv * group.blocks();
        let largest = self.groups.iter().map(|group| group.block_rows).max().unwrap_or(0);
        self.slot = PartialLayout::new(largest, problem.dims.value_dim).len();
        let all_tasks = self.groups.iter().map(tasks).sum();
        let all_splits = self.groups.iter().map(|group| tasks(group).saturating_mul(splits(group)));
        let partials = all_splits.fold(0, usize::saturating_add).saturating_mul(self.slot);
        let split = plan.has_split_prefixes(all_tasks, partials);
        let mut slots = 0;
        for group in &mut self.groups {
            group.results = if split { splits(group) } else { 1 };
            group.first_slot = slots;
            slots += tasks(group) * group.results;
        }
        slots
    }

    /// The group of sequence `b`.
    fn group_of(&self, b: usize) -> Option<&Group> {
        let n = self.groups.partition_point(|group| group.sequences.end <= b);
        self.groups.get(n).filter(|group| group.sequences.contains(&b))
    }

    /// The keys of `span` that are left to the tasks of a sequence.
    pub(super) fn rest(&self, sequence: &Sequence, span: &Range<usize>) -> Range<usize> {
        self.rest_of_sequence(sequence.batch, span)
    }

    /// The keys that are left to a task of one head.
    pub(super) fn rest_of(&self, task: &Task, problem: &Problem<'_>) -> Range<usize> {
        self.rest_of_sequence(problem.dims.batch_and_head(task.heads.start).0, &task.keys)
    }

    fn rest_of_sequence(&self, b: usize, span: &Range<usize>) -> Range<usize> {
        // Rows that have a group see all of its keys.
        self.group_of(b).map_or(span.clone(), |group| group.keys..span.end)
    }

    /// The results that the rows of a task of key/value head `head`, counted through all sequences, start from.
    pub(super) fn results_of(
        &self,
        task: &TaskInput<'_>,
        problem: &Problem<'_>,
        head: usize,
    ) -> Option<EarlierResults<'_>> {
        let (b, head_kv) = problem.dims.batch_and_head(head);
        let group = self.group_of(b)?;
        let blocks = group.blocks();
        Some(EarlierResults {
            memory: &self.memory.first()[(group.first_slot + head_kv * blocks) * self.slot..],
            value_dim: problem.dims.value_dim,
            slot: self.slot,
            stride: problem.dims.heads_kv * blocks * self.slot,
            count: group.results,
            rows: group.rows,
            block_rows: group.block_rows,
            first_row: first_row(problem, &group.sequences, b) + task.first_row,
        })
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes() + self.groups.capacity() * size_of::<Group>()
    }
}

/// Whether sequences of a call may share keys at all: a quick test, because most don't. Tensors and users' functions that hide keys or
/// change scores may differ from row to row.
fn may_share(problem: &Problem<'_>, plan: &Plan) -> bool {
    let Problem { dims, masks, score_mods, .. } = problem;
    dims.batch > 1
        && plan.prefix_keys(dims.seq_kv) > 0
        && plan.sequences(Form::Decode) > 1
        && (matches!(problem.places, Places::Pages(_)) || has_broadcast_keys(problem))
        && masks.tensor.is_none()
        && !masks.has_dynamic()
        && score_mods.bias.is_none()
        && score_mods.alibi.is_none()
        && score_mods.open.is_empty()
}

/// Whether the batch indices of keys and values are all the same memory.
fn has_broadcast_keys(problem: &Problem<'_>) -> bool {
    [&problem.k, &problem.v].into_iter().all(|tensor| with_elements!(tensor, tensor => tensor.strides()[0] == 0))
}

/// The number of first keys that every query of sequence `b` sees; 0 if it is not decoded.
fn seen_by_all(problem: &Problem<'_>, plan: &Plan, b: usize) -> usize {
    let sequence = problem.sequences.get(b);
    let Some(last) = sequence.queries.checked_sub(1) else { return 0 };
    if plan.of_sequence(&sequence).form != Form::Decode {
        return 0;
    }
    // Later queries see later keys, at either end of their span.
    let [first, last] = [0, last].map(|query| problem.masks.span(&sequence, 0, query));
    if last.start == 0 { first.end } else { 0 }
}

/// The number of first keys, `most` at most, that sequence `b` shares with the one before. Both have `most` keys.
fn shared_keys(problem: &Problem<'_>, b: usize, most: usize) -> usize {
    // Rows of sequences with batch indices are at one distance if there are equally many, and none is padded on the left.
    let has_one_distance = match &problem.sequences.queries {
        Lengths::Packed(_) => true,
        Lengths::Padded { .. } => false,
        queries => queries.get(b - 1) == queries.get(b),
    };
    if !has_one_distance {
        return 0;
    }
    problem.places.shared_keys((b - 1, b), most, has_broadcast_keys(problem))
}

/// The rows of a key/value head of the first of `sequences`, up to sequence `b`.
fn first_row(problem: &Problem<'_>, sequences: &Range<usize>, b: usize) -> usize {
    let queries = match &problem.sequences.queries {
        Lengths::Packed(starts) => (starts.get(b) - starts.get(sequences.start)) as usize,
        same => (b - sequences.start) * same.get(sequences.start),
    };
    queries * problem.dims.group()
}

/// The query rows of a key/value head of `sequences`, one sequence after the other.
fn query_rows<'a>(problem: &Problem<'a>, sequences: &Range<usize>, head_kv: usize) -> AnyGroupRows<'a> {
    let heads = problem.dims.group_heads(head_kv);
    match &problem.sequences.queries {
        Lengths::Packed(starts) => {
            let first = starts.get(sequences.start) as usize * heads.len();
            let rows = first..first + first_row(problem, sequences, sequences.end);
            AnyGroupRows::new(&problem.q, 0, heads).slice(rows)
        }
        same => AnyGroupRows::of_batches(&problem.q, sequences.clone(), heads, same.get(sequences.start)),
    }
}

/// A block of rows of a group, and the keys of a result.
struct Block<'g> {
    group: &'g Group,
    head_kv: usize,
    rows: Range<usize>,
    keys: Range<usize>,
}

impl<'g> Block<'g> {
    /// That of slot `slot`.
    fn of_slot(groups: &'g [Group], slot: usize, heads_kv: usize) -> Self {
        let group = &groups[groups.partition_point(|group| group.first_slot <= slot) - 1];
        let (blocks, splits) = (group.blocks(), group.keys / group.results);
        let (result, of_result) =
            ((slot - group.first_slot) / (heads_kv * blocks), (slot - group.first_slot) % (heads_kv * blocks));
        let first = of_result % blocks * group.block_rows;
        Block {
            group,
            head_kv: of_result / blocks,
            rows: first..group.rows.min(first + group.block_rows),
            keys: result * splits..(result + 1) * splits,
        }
    }

    /// The kernel's input: the rows are those of one head with its own queries, and see all keys.
    fn input<'a>(&self, problem: &'a Problem<'a>, plan: &Plan) -> TaskInput<'a> {
        let Block { group, head_kv, rows, keys } = self;
        let b = group.sequences.start;
        let heads = problem.dims.group_heads(*head_kv);
        TaskInput {
            queries: query_rows(problem, &group.sequences, *head_kv).slice(rows.clone()),
            sequence: Sequence {
                batch: b,
                queries: group.rows,
                keys: group.keys,
                offset: 0,
                first_query: 0,
                first_key: 0,
            },
            group: 1,
            first_row: rows.start,
            rows: rows.len(),
            ..input_of_heads((problem, plan), (b, heads), 0..0, keys.clone(), Form::Decode)
        }
    }
}

/// Computes a result into its slot.
fn compute(
    groups: &[Group],
    problem: &Problem<'_>,
    plan: &Plan,
    ClaimedSlot { index, next, memory }: ClaimedSlot<'_>,
    scratch: &mut Scratch,
) {
    let input_of = |slot| Block::of_slot(groups, slot, problem.dims.heads_kv).input(problem, plan);
    let task = input_of(index);
    let last =
        groups.last().map_or(0, |group| group.first_slot + problem.dims.heads_kv * group.blocks() * group.results);
    let next = (next < last).then(|| input_of(next));
    let next = next.as_ref().map(|task| Piece { task, keys: task.span.clone() });
    let keys = task.span.clone();
    Decode::list_rows(&task, scratch);
    let mut prefetch = Prefetch::none();
    let mut kernel = Decode::load(Piece { task: &task, keys: keys.clone() }, next, None, &mut prefetch, scratch);
    step_over(&mut kernel, plan.steps(Form::Decode), keys, 0..0);
    kernel.store(memory);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{KeysValues, PageTable};
    use crate::level::Level;
    use crate::options::Options;
    use crate::plan::Threads;
    use crate::simd::Isa;
    use crate::tensor::{AnyTensorRef, TensorRef};

    /// The groups of sequences of `queries` queries with these keys, in pages of 64: the sequences and the shared keys of each.
    fn groups(options: &Options<'_>, queries: usize, sequences: &[(&[u32], usize)]) -> Vec<(Range<usize>, usize)> {
        let pages: Vec<u32> = sequences.iter().flat_map(|(pages, _)| pages.iter().copied()).collect();
        let lengths: Vec<usize> = sequences.iter().map(|&(_, keys)| keys).collect();
        let starts: Vec<usize> = [0]
            .into_iter()
            .chain(sequences.iter().scan(0, |end, (pages, _)| {
                *end += pages.len();
                Some(*end)
            }))
            .collect();
        let table = PageTable::compressed(&starts, &pages, &lengths, 64).unwrap();
        let zero = [0.0f32];
        let tensor = |shape| AnyTensorRef::from(TensorRef::with_strides(&zero, 0, shape, [0; 4]).unwrap());
        let pool = || TensorRef::with_strides(&zero, 0, [1000, 2, 64, 16], [0; 4]).unwrap();
        let (q, kv) = (tensor([sequences.len(), 4, queries, 16]), KeysValues::paged(pool(), pool(), table));
        let problem = Problem::new(options, q, kv).unwrap();
        let plan = Plan::new(&problem, Isa::detect(Level::Portable).unwrap(), None, Threads::Serial);
        let mut prefixes = SharedPrefixes::default();
        prefixes.compute(&problem, &plan, &mut Vec::new());
        prefixes.groups.into_iter().map(|group| (group.sequences, group.keys)).collect()
    }

    /// Pages `first` and those after it.
    fn pages(first: u32, shared: usize, own: u32) -> Vec<u32> {
        let shared_pages = first..first + shared as u32;
        shared_pages.chain(own..own + 30 - shared as u32).collect()
    }

    /// Neighbours that share whole splits are one group, with what all of them share.
    #[test]
    fn neighbours_that_share_keys_are_found() {
        let plain = Options { causal: true, ..Options::default() };
        let lists: Vec<Vec<u32>> = [8, 24, 24, 7, 0, 20, 16, 30]
            .into_iter()
            .enumerate()
            .map(|(b, shared)| pages(if b < 4 { 0 } else { 500 }, shared, 100 + 30 * b as u32))
            .collect();
        let batch = |range: Range<usize>| range.map(|b| (&lists[b][..], 1900)).collect::<Vec<_>>();
        // 8, 24 and 24 pages of 64 keys: the two that share more are a group of their own.
        assert_eq!(groups(&plain, 1, &batch(0..3)), [(1..3, 1536)]);
        // 24 and 24, then 7 pages: less than a split is shared.
        assert_eq!(groups(&plain, 1, &batch(1..4)), [(0..2, 1536)]);
        // 20, 16 and 30 pages: all share 16.
        assert_eq!(groups(&plain, 1, &batch(5..8)), [(0..3, 1024)]);
        assert_eq!(groups(&plain, 1, &batch(3..5)), []);
        // Fewer keys than the shared ones: those that both have.
        assert_eq!(groups(&plain, 1, &[(&lists[1], 1030), (&lists[2], 1900)]), [(0..2, 1024)]);
        assert_eq!(groups(&plain, 1, &[(&lists[1], 511), (&lists[2], 1900)]), []);
        // A query sees the first 1900 - 1 keys, which are more than the shared ones; of a prompt, the first sees one.
        assert_eq!(groups(&plain, 2, &batch(1..3)), [(0..2, 1536)]);
        assert_eq!(groups(&plain, 500, &batch(1..3)), []);
    }

    /// What hides first keys, or changes scores by position, keeps sequences apart. What all rows have alike does not.
    #[test]
    fn options_that_differ_from_row_to_row_keep_sequences_apart() {
        use crate::mask::Window;
        use crate::score::{AlibiSlopes, Sinks};

        let list: Vec<u32> = (0..30).collect();
        let with = |options: Options<'_>| groups(&options, 1, &[(&list, 1900), (&list, 1800)]);
        let all = [(0..2, 1536)];
        assert_eq!(with(Options::default()), all);
        let sinks = [0.5; 4];
        assert_eq!(with(Options { softcap: Some(9.0), sinks: Some(Sinks(&sinks)), ..Options::default() }), all);
        assert_eq!(with(Options { alibi: Some(AlibiSlopes::Standard), ..Options::default() }), []);
        let window = |left| Options { window: Window { left: Some(left), right: None }, ..Options::default() };
        assert_eq!((with(window(2000)), with(window(1000))), (all.to_vec(), Vec::new()));
    }
}
