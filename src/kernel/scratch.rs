//! The scratch memory of one worker, reused for all its tasks and calls.

#![forbid(unsafe_code)]

use super::lanes::LaneSpans;
use super::panel::Panel;
use crate::tensor::row_list::RowAddresses;

/// The scratch memory of one worker.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Operands and scores of a tile.
    pub(super) tile: Floats,
    /// Partial results that are merged.
    pub(super) partials: Floats,
    /// Sums of probabilities for each key.
    pub(crate) key_sums: Floats,
    pub(super) panels: Vec<Panel>,
    pub(super) row_spans: Vec<LaneSpans<1>>,
    /// Of keys, and of values.
    pub(super) addresses: [RowAddresses; 2],
}

impl Scratch {
    /// The scratch memory of `workers` workers.
    pub(crate) fn for_workers(scratch: &mut Vec<Scratch>, workers: usize) -> &mut [Scratch] {
        if scratch.len() < workers {
            scratch.resize_with(workers, Scratch::default);
        }
        &mut scratch[..workers]
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.tile.bytes()
            + self.partials.bytes()
            + self.key_sums.bytes()
            + self.panels.capacity() * size_of::<Panel>()
            + self.row_spans.capacity() * size_of::<LaneSpans<1>>()
            + self.addresses.iter().map(RowAddresses::bytes).sum::<usize>()
    }

    /// Grows every worker's scratch to the largest size that any worker needed. Tasks are claimed dynamically, so the next call
    /// may give the largest task to any worker, and must not allocate then.
    pub(crate) fn grow_to_largest(workers: &mut [Scratch]) {
        let largest = |len: fn(&Scratch) -> usize| workers.iter().map(len).max().unwrap_or(0);
        let tile = largest(|scratch| scratch.tile.memory.len());
        let partials = largest(|scratch| scratch.partials.memory.len());
        let key_sums = largest(|scratch| scratch.key_sums.memory.len());
        let panels = largest(|scratch| scratch.panels.capacity());
        let row_spans = largest(|scratch| scratch.row_spans.capacity());
        let addresses = largest(|scratch| scratch.addresses.iter().map(RowAddresses::capacity).max().unwrap_or(0));
        for scratch in workers {
            scratch.tile.grow(tile);
            scratch.partials.grow(partials);
            scratch.key_sums.grow(key_sums);
            scratch.panels.reserve_exact(panels - scratch.panels.len());
            scratch.row_spans.reserve_exact(row_spans - scratch.row_spans.len());
            scratch.addresses.iter_mut().for_each(|own| own.grow(addresses));
        }
    }
}

/// A growing array of floats, cut into buffers for each task.
#[derive(Debug, Default)]
pub(crate) struct Floats {
    memory: Vec<f32>,
}

/// Elements of a cache line. Buffers start at a line, because a vector that straddles two lines costs two loads.
const LINE_ELEMENTS: usize = 16;

impl Floats {
    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.capacity() * size_of::<f32>()
    }

    fn grow(&mut self, len: usize) {
        if self.memory.len() < len {
            self.memory.resize(len, 0.0);
        }
    }

    /// The first buffer of the last [`buffers`](Self::buffers).
    pub(crate) fn first(&self) -> &[f32] {
        &self.memory[self.skipped()..]
    }

    /// Elements before the first line.
    fn skipped(&self) -> usize {
        let skip = self.memory.as_ptr().align_offset(LINE_ELEMENTS * size_of::<f32>());
        skip.min(LINE_ELEMENTS).min(self.memory.len())
    }

    /// Buffers of the given lengths, each at the start of a cache line. They hold stale data.
    pub(crate) fn buffers<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let padded = lengths.map(|length| length.next_multiple_of(LINE_ELEMENTS));
        let needed = padded.iter().sum::<usize>() + LINE_ELEMENTS;
        self.grow(needed);
        let skipped = self.skipped();
        let mut rest = &mut self.memory[skipped..];
        std::array::from_fn(|n| {
            let (buffer, after) = std::mem::take(&mut rest).split_at_mut(padded[n]);
            rest = after;
            &mut buffer[..lengths[n]]
        })
    }
}
