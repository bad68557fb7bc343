//! Workers: the same closure on several threads, each with a part of the scratch memory.

#![forbid(unsafe_code)]

/// How many workers a call for `tasks` tasks gets.
pub(super) fn workers(parallel: bool, tasks: usize) -> usize {
    #[cfg(feature = "rayon")]
    if parallel && pool_is_there() {
        return rayon::current_num_threads().min(tasks).max(1);
    }
    let _ = (parallel, tasks);
    1
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

/// Calls `work` once for each element of `scratch`, side by side where the current rayon pool has threads to spare.
///
/// By halving, because a join of two puts nothing on the heap. A worker that no thread comes for runs on this one, after
/// the others: whoever draws tasks from a common counter leaves nothing for it to do.
pub(super) fn fan_out<W: Send>(scratch: &mut [W], work: &(impl Fn(&mut W) + Sync)) {
    match scratch {
        [] => {}
        [only] => work(only),
        #[cfg(feature = "rayon")]
        _ => {
            let (left, right) = scratch.split_at_mut(scratch.len() / 2);
            rayon::join(|| fan_out(left, work), || fan_out(right, work));
        }
        #[cfg(not(feature = "rayon"))]
        _ => scratch.iter_mut().for_each(work),
    }
}
