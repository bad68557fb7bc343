//! Scratch memory, kept between calls.

#![forbid(unsafe_code)]

use super::marks::Lanes;
use super::prefill::Panel;
use super::schedule::Schedule;

/// Memory that calls need beside their output, kept for the next call.
///
/// A call takes what it needs and leaves it here; once a workspace has seen a problem, calls for problems that are no
/// larger do not allocate. Its size grows with the number of threads and the size of a tile, not with the sequences
/// (apart from one partial row for each 512 keys when decoding, and a few bytes for each 256 queries of a head).
///
/// ```
/// use flashtile::{Attention, TensorMut, TensorRef, Workspace};
///
/// let (q, kv) = (vec![0.5f32; 4 * 8], vec![0.25f32; 6 * 8]);
/// let mut out = vec![0.0f32; 4 * 8];
/// let mut workspace = Workspace::new();
/// for _layer in 0..3 {
///     Attention::new().compute(
///         TensorRef::from_slice(&q, [1, 1, 4, 8])?,
///         TensorRef::from_slice(&kv, [1, 1, 6, 8])?,
///         TensorRef::from_slice(&kv, [1, 1, 6, 8])?,
///         TensorMut::from_slice(&mut out, [1, 1, 4, 8])?,
///         None,
///         &mut workspace,
///     )?;
/// }
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Workspace {
    pub(super) schedule: Schedule,
    pub(super) scratch: Vec<Scratch>,
    /// Partial results of split keys.
    pub(super) partials: Floats,
}

impl Workspace {
    /// An empty workspace; the first call fills it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held at the moment.
    pub fn bytes(&self) -> usize {
        let scratch = self.scratch.iter().map(Scratch::bytes).sum::<usize>();
        scratch + self.partials.bytes() + self.schedule.bytes()
    }
}

/// What one worker needs.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) floats: Floats,
    /// Results that are merged while `floats` is in use for the next.
    pub(super) merged: Floats,
    pub(super) panels: Vec<Panel>,
    pub(super) lanes: Vec<Lanes<1>>,
}

impl Scratch {
    fn bytes(&self) -> usize {
        self.floats.bytes()
            + self.merged.bytes()
            + self.panels.capacity() * size_of::<Panel>()
            + self.lanes.capacity() * size_of::<Lanes<1>>()
    }
}

/// As many workers' scratch as asked for.
pub(super) fn for_workers(scratch: &mut Vec<Scratch>, workers: usize) -> &mut [Scratch] {
    if scratch.len() < workers {
        scratch.resize_with(workers, Scratch::default);
    }
    &mut scratch[..workers]
}

/// Gives every worker as much memory as the one with the most has: tasks are drawn as workers get to them, so whoever drew
/// only small ones this time, or none, may draw the largest the next time, and shall not allocate then.
pub(super) fn even_out(scratch: &mut [Scratch]) {
    let most = |len: fn(&Scratch) -> usize| scratch.iter().map(len).max().unwrap_or(0);
    let floats = most(|scratch| scratch.floats.memory.len());
    let merged = most(|scratch| scratch.merged.memory.len());
    let panels = most(|scratch| scratch.panels.capacity());
    let lanes = most(|scratch| scratch.lanes.capacity());
    for scratch in scratch {
        scratch.floats.grow(floats);
        scratch.merged.grow(merged);
        scratch.panels.reserve_exact(panels - scratch.panels.len());
        scratch.lanes.reserve_exact(lanes - scratch.lanes.len());
    }
}

/// Floats that are cut into named buffers.
#[derive(Debug, Default)]
pub(super) struct Floats {
    memory: Vec<f32>,
}

/// Elements of a cache line. A vector that straddles two lines costs two loads, so buffers start at a line.
const LINE: usize = 16;

impl Floats {
    fn bytes(&self) -> usize {
        self.memory.capacity() * size_of::<f32>()
    }

    fn grow(&mut self, len: usize) {
        if self.memory.len() < len {
            self.memory.resize(len, 0.0);
        }
    }

    /// Buffers of the given lengths, each at the start of a cache line. What they hold is left from before.
    pub(super) fn buffers<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let padded = lengths.map(|length| length.next_multiple_of(LINE));
        let needed = padded.iter().sum::<usize>() + LINE;
        self.grow(needed);
        let skip = self.memory.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let mut rest = &mut self.memory[skip..];
        std::array::from_fn(|n| {
            let (buffer, behind) = std::mem::take(&mut rest).split_at_mut(padded[n]);
            rest = behind;
            &mut buffer[..lengths[n]]
        })
    }
}
