//! Scratch memory, kept between calls.

#![forbid(unsafe_code)]

use super::schedule::Schedule;
use super::shared_prefix::SharedPrefixes;
use crate::kernel::scratch::{Floats, Scratch};

/// Scratch memory of calls, kept for the next call.
///
/// A workspace grows with the first calls. After that, calls for problems that are no larger do not allocate (except for the
/// jobs in the pool's queue if threads help a caller outside the pool). Its size depends on the number of threads and the size of a tile, not on
/// the length of the sequences, with three exceptions: decoding keeps one partial row for each 512 keys that are seen, the list of tasks has a
/// few bytes for each 256 queries of a head, and sequences that share their first keys have a partial row for each of their queries.
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
///         (TensorRef::from_slice(&kv, [1, 1, 6, 8])?, TensorRef::from_slice(&kv, [1, 1, 6, 8])?),
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
    pub(super) prefixes: SharedPrefixes,
}

impl Workspace {
    /// An empty workspace. The first call allocates.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of bytes held.
    pub fn bytes(&self) -> usize {
        let scratch = self.scratch.iter().map(Scratch::bytes).sum::<usize>();
        scratch + self.partials.bytes() + self.prefixes.bytes() + self.schedule.bytes()
    }
}
