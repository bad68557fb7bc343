//! Threads by number: one pool for each number that was ever asked for, kept until it is released.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};

/// More threads than any machine has use for here; asking for more is taken for a mistake.
pub(super) const MAX_THREADS: i32 = 1024;

#[cfg(feature = "rayon")]
mod kept {
    use super::*;
    use rayon::{ThreadPool, ThreadPoolBuilder};
    use std::panic::catch_unwind;
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

    static POOLS: Mutex<Vec<Arc<ThreadPool>>> = Mutex::new(Vec::new());

    fn pools() -> MutexGuard<'static, Vec<Arc<ThreadPool>>> {
        // A panic while it was locked leaves a list of whole pools all the same.
        POOLS.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pool(threads: usize) -> Result<Arc<ThreadPool>, Failure> {
        let mut pools = pools();
        if let Some(pool) = pools.iter().find(|pool| pool.current_num_threads() == threads) {
            return Ok(pool.clone());
        }
        let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|n| format!("flashtile-{n}"));
        let pool = builder
            .build()
            .map_err(|error| Failure::new(Code::Threads, format!("{threads} threads could not be started: {error}")))?;
        let pool = Arc::new(pool);
        pools.push(pool.clone());
        Ok(pool)
    }

    pub(in super::super) fn run_on(threads: i32, parallel: bool, work: impl FnOnce() + Send) -> Result<(), Failure> {
        // Small work would be done before a pool is awake.
        match usize::try_from(threads) {
            Ok(threads @ 2..) if parallel => pool(threads)?.install(work),
            Ok(0) if parallel => {
                // Starts rayon's own pool, which panics where it can't.
                catch_unwind(rayon::current_num_threads)
                    .map_err(|_| Failure::new(Code::Threads, "the threads of rayon's pool could not be started"))?;
                work();
            }
            _ => work(),
        }
        Ok(())
    }

    pub(in super::super) fn release() {
        // Dropped behind the lock: ending threads takes a while, and a pool in use ends after its last call.
        let pools = std::mem::take(&mut *pools());
        drop(pools);
    }

    pub(in super::super) fn default_threads() -> usize {
        rayon::current_num_threads()
    }
}

#[cfg(not(feature = "rayon"))]
mod kept {
    use super::*;

    pub(in super::super) fn run_on(threads: i32, _parallel: bool, work: impl FnOnce() + Send) -> Result<(), Failure> {
        if threads > 1 {
            let message =
                format!("{threads} threads were asked for, but this library was built without the feature rayon");
            return Err(Failure::new(Code::Threads, message));
        }
        work();
        Ok(())
    }

    pub(in super::super) fn release() {}

    pub(in super::super) fn default_threads() -> usize {
        1
    }
}

/// `run_on` calls `work` where so many threads are there to help it, if it is `parallel`; 0 leaves it to rayon's own pool.
pub(super) use kept::{default_threads, release, run_on};
