//! Whose threads help a call.

use super::helpers;
use super::pools::{self, Pool};
use std::cell::RefCell;
use std::error::Error;
use std::sync::{Arc, OnceLock};

/// The threads that a call has.
pub(super) enum Source {
    /// The calling thread alone.
    Caller,
    /// Those of the rayon pool that the caller belongs to.
    Rayon,
    /// The caller, helped by a pool of this crate.
    Own(Arc<Pool>),
}

thread_local! {
    /// The pool of the [`helped_by`] that this thread is in.
    static CHOSEN: RefCell<Option<Arc<Pool>>> = const { RefCell::new(None) };
}

impl Source {
    /// The threads for calls of this thread. Outside a rayon pool, their number is that of rayon's global pool, which the program
    /// chooses.
    pub(super) fn of_this_thread() -> Self {
        match CHOSEN.try_with(|chosen| chosen.borrow().clone()) {
            Err(_) => Source::Caller, // the thread ends
            Ok(Some(pool)) => Source::Own(pool),
            Ok(None) if is_in_rayon_pool() => Source::Rayon,
            Ok(None) if cfg!(target_family = "wasm") => Source::Caller, // which may be unable to start threads
            Ok(None) => threads_of_global_pool()
                .and_then(|threads| pools::pool(threads).ok())
                .map_or(Source::Caller, Source::Own),
        }
    }

    pub(super) fn threads(&self) -> usize {
        match self {
            Source::Caller => 1,
            Source::Rayon => rayon::current_num_threads(),
            Source::Own(pool) => 1 + pool.helpers(),
        }
    }
}

/// Whether the threads for calls of this thread are awake: those of a rayon pool that it belongs to, or that have just worked.
pub(super) fn is_awake() -> bool {
    uses_rayon_pool() || helpers::stay_awake()
}

/// Notes that a call of this thread has ended that was large enough for several threads. Those of a rayon pool tell nothing about
/// whether the crate's are awake.
pub(super) fn note_call() {
    if !uses_rayon_pool() {
        helpers::note_call();
    }
}

fn uses_rayon_pool() -> bool {
    let has_chosen = CHOSEN.try_with(|chosen| chosen.borrow().is_some());
    has_chosen == Ok(false) && is_in_rayon_pool()
}

/// Calls `work`, whose attention is computed by this thread and by those of `pool`.
#[cfg(feature = "capi")]
pub(crate) fn helped_by<R>(pool: Arc<Pool>, work: impl FnOnce() -> R) -> R {
    /// Puts the former pool back, also if `work` panics.
    struct Former(Option<Arc<Pool>>);

    impl Drop for Former {
        fn drop(&mut self) {
            let _ = CHOSEN.try_with(|chosen| chosen.replace(self.0.take()));
        }
    }

    let former = CHOSEN.try_with(|chosen| chosen.replace(Some(pool)));
    let _former = Former(former.ok().flatten());
    work()
}

fn is_in_rayon_pool() -> bool {
    rayon::current_thread_index().is_some()
}

/// The number of threads of rayon's global pool; `None` if it can't be had.
///
/// rayon starts its global pool when it is first asked, and panics if that fails. The pool can't be started again after that. So
/// the first call here starts it. If that fails, calls are serial from then on.
fn threads_of_global_pool() -> Option<usize> {
    static GLOBAL: OnceLock<bool> = OnceLock::new();
    let starts = || {
        match rayon::ThreadPoolBuilder::new().build_global() {
            Ok(()) => true,
            // A thread did not start.
            Err(error) if error.source().is_some() => false,
            // The pool was started before, or its start failed before, which only a panic tells.
            Err(_) => std::panic::catch_unwind(rayon::current_num_threads).is_ok(),
        }
    };
    GLOBAL.get_or_init(starts).then(rayon::current_num_threads)
}
