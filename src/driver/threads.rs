//! Workers: one loop on several threads, each with its own scratch memory.

#![forbid(unsafe_code)]

#[cfg(feature = "rayon")]
use super::helpers;
use crate::kernel::scratch::Scratch;
use crate::plan::Plan;

/// The number of workers for `tasks` tasks of a plan.
pub(super) fn workers(plan: &Plan, tasks: usize) -> usize {
    #[cfg(feature = "rayon")]
    if plan.is_parallel() {
        let own = helpers::of_this_thread();
        let sleeping = own.is_some() || !is_in_pool();
        if sleeping && !plan.is_worth_waking() && !helpers::stay_awake() {
            return 1;
        }
        let threads = match own {
            Some(helpers) => 1 + helpers.count(),
            None if pool_available() => rayon::current_num_threads(),
            None => 1,
        };
        return threads.min(tasks).max(1);
    }
    let _ = (plan, tasks);
    1
}

/// Work that workers claim piece by piece, each piece once.
pub(super) trait Claims<'c>: Sync {
    /// The right to one piece.
    type Claim;

    /// Claims the next piece; `None` if all have been claimed.
    fn claim(&'c self) -> Option<Self::Claim>;
}

/// The worker loop: each worker claims and computes pieces until none is left.
pub(super) fn work_through<'c, C: Claims<'c>>(
    plan: &Plan,
    scratch: &mut [Scratch],
    claims: &'c C,
    work: &(impl Fn(C::Claim, &mut Scratch) + Sync),
) {
    fan_out(scratch, &|scratch| {
        while let Some(claim) = claims.claim() {
            work(claim, scratch);
        }
    });
    if plan.is_parallel() {
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

/// Calls `worker` for the first element of `scratch` on this thread, and for the others on threads of the current rayon pool,
/// as far as these are idle.
///
/// Inside the pool it halves the workers recursively, because `rayon::join` does not allocate, and a scope allocates for each
/// spawn. If no thread is idle, a worker runs on this thread after the others. It then finds all pieces claimed. Outside,
/// `rayon::join` would put this thread to sleep until a thread of the pool has woken, which then wakes the others.
fn fan_out(scratch: &mut [Scratch], worker: &(impl Fn(&mut Scratch) + Sync)) {
    match scratch {
        [] => {}
        [only] => worker(only),
        #[cfg(feature = "rayon")]
        _ => match helpers::of_this_thread() {
            Some(own) => helpers::work_with_helpers(scratch, worker, |job| own.spawn(job)),
            None if !is_in_pool() => helpers::work_with_helpers(scratch, worker, rayon::spawn),
            None => {
                let (left, right) = scratch.split_at_mut(scratch.len() / 2);
                rayon::join(|| fan_out(left, worker), || fan_out(right, worker));
            }
        },
        #[cfg(not(feature = "rayon"))]
        _ => scratch.iter_mut().for_each(worker),
    }
}
