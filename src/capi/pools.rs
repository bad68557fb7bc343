//! The threads that help callers from C: one pool per number of threads. A pool is kept until it is released.
//!
//! The calling thread is one of the threads of a call, so the pool of n threads starts n - 1.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};
use super::processors::Processors;
use super::thread_count::count;
use crate::threads::{Helpers, helped_by};
use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// A pool whose drop waits until its threads have ended, so that the library can be unloaded.
struct Pool {
    /// `None` only while it is dropped.
    threads: Option<ThreadPool>,
    started: Vec<JoinHandle<()>>,
    processors: Processors,
    /// The process that has the threads: a child that was forked has none, and the handles mean nothing there.
    process: u32,
}

impl Pool {
    /// A pool of `helpers` threads, at least one.
    fn new(helpers: usize) -> Result<Self, ThreadPoolBuildError> {
        let (processors, process) = (Processors::of_this_thread(), std::process::id());
        let mut started = Vec::with_capacity(helpers);
        let pool = ThreadPoolBuilder::new()
            .num_threads(helpers)
            .thread_name(|n| format!("flashtile-{n}"))
            .spawn_handler(|thread| {
                started.push(start(thread)?);
                Ok(())
            })
            .build();
        match pool {
            Ok(pool) => Ok(Pool { threads: Some(pool), started, processors, process }),
            Err(error) => {
                // rayon has told the started threads to end; the drop joins them.
                drop(Pool { threads: None, started, processors, process });
                Err(error)
            }
        }
    }

    fn is_of_this_process(&self) -> bool {
        self.process == std::process::id()
    }
}

impl Helpers for Pool {
    fn count(&self) -> usize {
        self.started.len()
    }

    fn spawn(&self, job: Box<dyn FnOnce() + Send>) {
        // It is `Some` until the pool is dropped.
        if let (Some(threads), true) = (&self.threads, self.is_of_this_process()) {
            self.processors.keep_from_mine(&self.started);
            threads.spawn(job);
        }
    }
}

/// The helpers of a call on one thread.
struct NoHelpers;

impl Helpers for NoHelpers {
    fn count(&self) -> usize {
        0
    }

    fn spawn(&self, _job: Box<dyn FnOnce() + Send>) {}
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

fn pools() -> MutexGuard<'static, Vec<Arc<Pool>>> {
    // A panic while it was locked leaves a valid list.
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pool(helpers: usize) -> Result<Arc<Pool>, Failure> {
    let mut pools = pools();
    if let Some(pool) = pools.iter().find(|pool| pool.count() == helpers) {
        return Ok(pool.clone());
    }
    // A failure is not remembered, so the next call tries again.
    let pool = Pool::new(helpers).map_err(|error| {
        let message = format!("{} threads could not be started: {error}", helpers + 1);
        Failure::new(Code::Threads, message)
    })?;
    let pool = Arc::new(pool);
    pools.push(pool.clone());
    Ok(pool)
}

/// Calls `work`, on `threads` threads if it is `parallel`.
pub(super) fn run_on(threads: i32, parallel: bool, work: impl FnOnce()) -> Result<(), Failure> {
    match count(threads) {
        _ if !parallel => work(),
        // Without helpers of its own it would be helped by rayon's global pool.
        1 => helped_by(Arc::new(NoHelpers), work),
        threads => helped_by(pool(threads - 1)?, work),
    }
    Ok(())
}

pub(super) fn release() {
    // Dropped after the lock is released, because joining threads takes time. A pool in use is dropped by its last call.
    let pools = std::mem::take(&mut *pools());
    drop(pools);
}
