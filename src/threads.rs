//! Workers: one loop on several threads, each with memory of its own. Attention and softmax share it.

#[cfg(feature = "rayon")]
mod helpers;
#[cfg(feature = "rayon")]
pub(crate) mod pools;
#[cfg(all(feature = "rayon", not(target_os = "linux")))]
#[path = "threads/no_processors.rs"]
mod processors;
#[cfg(all(feature = "rayon", target_os = "linux"))]
mod processors;
#[cfg(feature = "rayon")]
mod source;

#[cfg(feature = "rayon")]
use source::Source;
#[cfg(all(feature = "capi", feature = "rayon"))]
pub(crate) use source::helped_by;

/// The threads that a call is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Worth {
    /// The caller alone.
    Caller,
    /// Threads that are awake: those of a pool that the caller is in, or that has just worked.
    Awake,
    /// Threads that have to be woken, too.
    Waking,
}

/// The number of workers for `pieces` pieces of work.
pub(crate) fn workers(worth: Worth, pieces: usize) -> usize {
    #[cfg(feature = "rayon")]
    if is_worth_it(worth) {
        return Source::of_this_thread().threads().min(pieces).max(1);
    }
    let _ = (worth, pieces);
    1
}

#[cfg(feature = "rayon")]
fn is_worth_it(worth: Worth) -> bool {
    match worth {
        Worth::Caller => false,
        Worth::Awake => source::is_awake(),
        Worth::Waking => true,
    }
}

/// Work that workers claim piece by piece, each piece once.
pub(crate) trait Claims<'c>: Sync {
    /// The right to one piece.
    type Claim;

    /// Claims the next piece; `None` if all have been claimed.
    fn claim(&'c self) -> Option<Self::Claim>;
}

/// The worker loop: each worker claims and computes pieces until none is left. There is a worker for each element of `memory`.
pub(crate) fn work_through<'c, M: Send, C: Claims<'c>>(
    worth: Worth,
    memory: &mut [M],
    claims: &'c C,
    work: &(impl Fn(C::Claim, &mut M) + Sync),
) {
    fan_out(memory, &|memory| {
        while let Some(claim) = claims.claim() {
            work(claim, memory);
        }
    });
    if worth != Worth::Caller {
        #[cfg(feature = "rayon")]
        source::note_call();
    }
}

/// Calls `worker` for the first element of `memory` on this thread, and for the others on threads that are idle.
///
/// Inside a rayon pool it halves the workers recursively, because `rayon::join` does not allocate, and a scope allocates for each
/// spawn. If no thread is idle, a worker runs on this thread after the others. It then finds all pieces claimed.
fn fan_out<M: Send>(memory: &mut [M], worker: &(impl Fn(&mut M) + Sync)) {
    match memory {
        [] => {}
        [only] => worker(only),
        #[cfg(feature = "rayon")]
        _ => match Source::of_this_thread() {
            Source::Caller => memory.iter_mut().for_each(worker),
            Source::Own(pool) => helpers::work_with_helpers(memory, worker, |job| pool.spawn(job)),
            Source::Rayon => {
                let (left, right) = memory.split_at_mut(memory.len() / 2);
                rayon::join(|| fan_out(left, worker), || fan_out(right, worker));
            }
        },
        #[cfg(not(feature = "rayon"))]
        _ => memory.iter_mut().for_each(worker),
    }
}
