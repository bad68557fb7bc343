//! Workers: one loop on several threads, each with scratch memory of its own.

#![forbid(unsafe_code)]

use crate::kernel::scratch::Scratch;

/// How many workers a call for `tasks` tasks gets.
pub(super) fn workers(parallel: bool, tasks: usize) -> usize {
    #[cfg(feature = "rayon")]
    if parallel && pool_is_there() {
        return rayon::current_num_threads().min(tasks).max(1);
    }
    let _ = (parallel, tasks);
    1
}

/// Work that is handed out piece by piece, each piece once.
pub(super) trait Claims<'c>: Sync {
    /// The right to one piece.
    type Claim;

    /// The next piece; `None` where all have been claimed.
    fn claim(&'c self) -> Option<Self::Claim>;
}

/// The worker loop: each worker claims pieces until none is left.
pub(super) fn work_through<'c, C: Claims<'c>>(
    scratch: &mut [Scratch],
    claims: &'c C,
    work: &(impl Fn(C::Claim, &mut Scratch) + Sync),
) {
    fan_out(scratch, &|scratch| {
        while let Some(claim) = claims.claim() {
            work(claim, scratch);
        }
    });
}

/// Whether this thread can use a rayon pool: the one that it belongs to, or else the global one.
///
/// rayon starts its global pool with the first use and panics if that fails. The pool can't be started again after that. So
/// the first call here starts it. If that fails, calls are serial from then on.
#[cfg(feature = "rayon")]
fn pool_is_there() -> bool {
    use std::error::Error;
    use std::sync::OnceLock;

    static GLOBAL: OnceLock<bool> = OnceLock::new();
    if rayon::current_thread_index().is_some() {
        return true;
    }
    *GLOBAL.get_or_init(|| {
        if cfg!(target_family = "wasm") {
            return true; // without threads, rayon uses the calling one
        }
        match rayon::ThreadPoolBuilder::new().build_global() {
            Ok(()) => true,
            // The error of a thread that did not start.
            Err(error) if error.source().is_some() => false,
            // Started by somebody else before, or in vain, which only a panic shows.
            Err(_) => std::panic::catch_unwind(rayon::current_num_threads).is_ok(),
        }
    })
}

/// Calls `worker` once for each element of `scratch`, side by side where the current rayon pool has threads to spare.
///
/// By halving, because a join of two allocates nothing; a scope allocates for each spawn. A worker that no thread comes for runs
/// on this one, after the others: where pieces are claimed from a common counter, it finds none left.
fn fan_out(scratch: &mut [Scratch], worker: &(impl Fn(&mut Scratch) + Sync)) {
    match scratch {
        [] => {}
        [only] => worker(only),
        #[cfg(feature = "rayon")]
        _ => {
            let (left, right) = scratch.split_at_mut(scratch.len() / 2);
            rayon::join(|| fan_out(left, worker), || fan_out(right, worker));
        }
        #[cfg(not(feature = "rayon"))]
        _ => scratch.iter_mut().for_each(worker),
    }
}
