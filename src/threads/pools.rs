//! The threads that help callers outside rayon's pools: pools of this crate's own, one per number of threads.
//!
//! They are not those of rayon's global pool, because a thread must be kept from the caller's processor to come in time (see
//! `processors.rs`), and the threads of a program's pools are not ours to rule. C's callers also need an end of all threads
//! before the library is unloaded, which the global pool does not have.
//!
//! The calling thread is one of the threads of a call, so a pool for n threads starts n - 1.

use super::processors::Processors;
use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// A pool whose drop waits until its threads have ended, so that the library can be unloaded.
pub(crate) struct Pool {
    /// `None` in a pool without threads, and while the pool is dropped.
    threads: Option<ThreadPool>,
    started: Vec<JoinHandle<()>>,
    processors: Processors,
    /// The process that has the threads: a child that was forked has none, and the handles mean nothing there.
    process: u32,
}

impl Pool {
    fn new(helpers: usize) -> Result<Self, ThreadPoolBuildError> {
        let processors = Processors::of_this_thread();
        let mut pool = Pool { threads: None, started: Vec::new(), processors, process: std::process::id() };
        if helpers > 0 {
            // After an error, rayon has told the started threads to end, and the drop of `pool` joins them.
            pool.threads = Some(
                ThreadPoolBuilder::new()
                    .num_threads(helpers)
                    .thread_name(|n| format!("flashtile-{n}"))
                    .spawn_handler(|thread| {
                        pool.started.push(start(thread)?);
                        Ok(())
                    })
                    .build()?,
            );
            pool.processors.set_free(&pool.started);
        }
        Ok(pool)
    }

    /// The number of threads, without the caller.
    pub(super) fn helpers(&self) -> usize {
        self.started.len()
    }

    /// Has one of the threads run the job, some time; drops it if there is none.
    pub(super) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        if let (Some(threads), true) = (&self.threads, self.is_of_this_process()) {
            self.processors.keep_from_mine(&self.started);
            threads.spawn(job);
        }
    }

    fn is_of_this_process(&self) -> bool {
        self.process == std::process::id()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.is_of_this_process() {
            std::mem::forget(self.threads.take());
            std::mem::take(&mut self.started).into_iter().for_each(std::mem::forget);
            return;
        }
        drop(self.threads.take()); // tells the threads to end
        for thread in self.started.drain(..) {
            // A panic of a thread was already raised in the call that it worked for.
            let _ = thread.join();
        }
    }
}

fn start(thread: ThreadBuilder) -> io::Result<JoinHandle<()>> {
    let mut builder = thread::Builder::new();
    if let Some(name) = thread.name() {
        builder = builder.name(name.to_owned());
    }
    builder.spawn(|| thread.run())
}

static POOLS: Mutex<Vec<Arc<Pool>>> = Mutex::new(Vec::new());

/// The process that uses [`POOLS`]; 0 before the first pool. In a child that was forked, another thread may have held the lock.
static PROCESS: AtomicU32 = AtomicU32::new(0);

/// The pools of this process; `None` in a child of the one that has them.
fn pools() -> Option<MutexGuard<'static, Vec<Arc<Pool>>>> {
    let process = std::process::id();
    let first = PROCESS.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed);
    // A panic while it was locked leaves a valid list.
    (first == Ok(0) || first == Err(process)).then(|| POOLS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The pool for calls on `threads` threads, started if it was not. A failure is not remembered, so the next call tries again. A child
/// of `fork` gets a pool without threads.
pub(crate) fn pool(threads: usize) -> Result<Arc<Pool>, ThreadPoolBuildError> {
    let Some(mut pools) = pools() else { return Pool::new(0).map(Arc::new) };
    let helpers = threads.saturating_sub(1);
    if let Some(pool) = pools.iter().find(|pool| pool.helpers() == helpers) {
        return Ok(pool.clone());
    }
    let pool = Arc::new(Pool::new(helpers)?);
    pools.push(pool.clone());
    Ok(pool)
}

/// Ends the threads of all pools, and waits until they have ended. A pool in use ends with its last call.
#[cfg(feature = "capi")]
pub(crate) fn release() {
    // Dropped after the lock is released, because joining threads takes time.
    let pools = pools().map(|mut pools| std::mem::take(&mut *pools));
    drop(pools);
}
