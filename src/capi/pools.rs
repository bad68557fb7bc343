//! One thread pool per number of threads. A pool is kept until it is released.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};
use super::thread_count::count;
use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// A pool whose drop waits until its threads have ended, so that the library can be unloaded.
struct Pool {
    /// `None` only while it is dropped.
    threads: Option<ThreadPool>,
    started: Vec<JoinHandle<()>>,
}

impl Pool {
    fn new(threads: usize) -> Result<Self, ThreadPoolBuildError> {
        let mut started = Vec::with_capacity(threads);
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("flashtile-{n}"))
            .spawn_handler(|thread| {
                started.push(start(thread)?);
                Ok(())
            })
            .build();
        match pool {
            Ok(pool) => Ok(Pool { threads: Some(pool), started }),
            Err(error) => {
                // rayon has told the started threads to end; the drop joins them.
                drop(Pool { threads: None, started });
                Err(error)
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
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

fn pools() -> MutexGuard<'static, Vec<Arc<Pool>>> {
    // A panic while it was locked leaves a valid list.
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pool(threads: usize) -> Result<Arc<Pool>, Failure> {
    let mut pools = pools();
    if let Some(pool) = pools.iter().find(|pool| pool.started.len() == threads) {
        return Ok(pool.clone());
    }
    // A failure is not remembered, so the next call tries again.
    let pool = Pool::new(threads)
        .map_err(|error| Failure::new(Code::Threads, format!("{threads} threads could not be started: {error}")))?;
    let pool = Arc::new(pool);
    pools.push(pool.clone());
    Ok(pool)
}

/// Calls `work` inside a pool of `threads` threads if it is `parallel`, on the calling thread otherwise.
pub(super) fn run_on(threads: i32, parallel: bool, work: impl FnOnce() + Send) -> Result<(), Failure> {
    let threads = count(threads);
    // Small work takes less time than waking a pool.
    if threads == 1 || !parallel {
        work();
        return Ok(());
    }
    run_in_pool(threads, work)
}

/// Calls `work` inside the pool of the default number of threads, even if that is one: work outside a pool would use rayon's global
/// pool.
pub(super) fn run_in_default_pool(work: impl FnOnce() + Send) -> Result<(), Failure> {
    run_in_pool(count(0), work)
}

fn run_in_pool(threads: usize, work: impl FnOnce() + Send) -> Result<(), Failure> {
    let pool = pool(threads)?;
    // It is `Some` until the pool is dropped.
    match &pool.threads {
        Some(threads) => threads.install(work),
        None => work(),
    }
    Ok(())
}

pub(super) fn release() {
    // Dropped after the lock is released, because joining threads takes time. A pool in use is dropped by its last call.
    let pools = std::mem::take(&mut *pools());
    drop(pools);
}
