//! Workers: one loop on several threads, each with memory of its own. Attention and softmax share it.

#[cfg(feature = "rayon")]
mod helpers;

#[cfg(all(feature = "capi", feature = "rayon"))]
pub(crate) use helpers::{Helpers, helped_by};

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
        let threads = match helpers::of_this_thread() {
            Ok(Some(own)) => 1 + own.count(),
            Ok(None) if pool_available() => rayon::current_num_threads(),
            _ => 1,
        };
        return threads.min(pieces).max(1);
    }
    let _ = (worth, pieces);
    1
}

#[cfg(feature = "rayon")]
fn is_worth_it(worth: Worth) -> bool {
    match worth {
        Worth::Caller => false,
        Worth::Awake => matches!(helpers::of_this_thread(), Ok(None)) && is_in_pool() || helpers::stay_awake(),
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
        helpers::note_call();
    }
}

/// Whether this thread belongs to a rayon pool.
#[cfg(feature = "rayon")]
fn is_in_pool() -> bool {
    rayon::current_thread_index().is_some()
}

/// Whether this thread can use a rayon pool: the pool that it belongs to, or the global one.
///
/// rayon starts its global pool with the first use and panics if that fails. The pool can't be started again after that. So
/// the first call here starts it. If that fails, calls are serial from then on.
#[cfg(feature = "rayon")]
fn pool_available() -> bool {
    use std::error::Error;
    use std::sync::OnceLock;

    static GLOBAL: OnceLock<bool> = OnceLock::new();
    if is_in_pool() {
        return true;
    }
    *GLOBAL.get_or_init(|| {
        if cfg!(target_family = "wasm") {
            return true; // without threads, rayon uses the calling one
        }
        match rayon::ThreadPoolBuilder::new().build_global() {
            Ok(()) => true,
            // A thread did not start.
            Err(error) if error.source().is_some() => false,
            // The pool was started before, or its start failed before, which only a panic tells.
            Err(_) => std::panic::catch_unwind(rayon::current_num_threads).is_ok(),
        }
    })
}

/// Calls `worker` for the first element of `memory` on this thread, and for the others on threads of the current rayon pool,
/// as far as these are idle.
///
/// Inside the pool it halves the workers recursively, because `rayon::join` does not allocate, and a scope allocates for each
/// spawn. If no thread is idle, a worker runs on this thread after the others. It then finds all pieces claimed. Outside,
/// `rayon::join` would put this thread to sleep until a thread of the pool has woken, which then wakes the others.
fn fan_out<M: Send>(memory: &mut [M], worker: &(impl Fn(&mut M) + Sync)) {
    match memory {
        [] => {}
        [only] => worker(only),
        #[cfg(feature = "rayon")]
        _ => match helpers::of_this_thread() {
            Ok(Some(own)) => helpers::work_with_helpers(memory, worker, |job| own.spawn(job)),
            Err(_) => memory.iter_mut().for_each(worker),
            Ok(None) if !is_in_pool() => helpers::work_with_helpers(memory, worker, rayon::spawn),
            Ok(None) => {
                let (left, right) = memory.split_at_mut(memory.len() / 2);
                rayon::join(|| fan_out(left, worker), || fan_out(right, worker));
            }
        },
        #[cfg(not(feature = "rayon"))]
        _ => memory.iter_mut().for_each(worker),
    }
}
