//! Threads by number: one pool for each number that was ever asked for, kept until it is released.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};
use super::options::MAX_THREADS;
use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

/// A pool whose threads have ended when it has been dropped: the library may be unloaded then.
struct Pool {
    /// Taken out when dropped.
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
                // rayon has told those that did start to end.
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
            // A panic of a thread would have come out of the call that it worked for.
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
    // A panic while it was locked leaves a list of whole pools all the same.
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pool(threads: usize) -> Result<Arc<Pool>, Failure> {
    let mut pools = pools();
    if let Some(pool) = pools.iter().find(|pool| pool.started.len() == threads) {
        return Ok(pool.clone());
    }
    // What failed is not kept: the next call tries again.
    let pool = Pool::new(threads)
        .map_err(|error| Failure::new(Code::Threads, format!("{threads} threads could not be started: {error}")))?;
    let pool = Arc::new(pool);
    pools.push(pool.clone());
    Ok(pool)
}

/// Calls `work` where `threads` threads are there to help it, if it is `parallel`; 0 stands for [`default_threads`].
pub(super) fn run_on(threads: i32, parallel: bool, work: impl FnOnce() + Send) -> Result<(), Failure> {
    let threads = if threads == 0 { default_threads() } else { usize::try_from(threads).unwrap_or(1) };
    // Small work would be done before a pool is awake.
    if threads == 1 || !parallel {
        work();
        return Ok(());
    }
    let pool = pool(threads)?;
    // (Always there until the pool is dropped.)
    match &pool.threads {
        Some(threads) => threads.install(work),
        None => work(),
    }
    Ok(())
}

pub(super) fn release() {
    // Dropped behind the lock: ending threads takes a while. A pool in use ends with its last call, on that thread.
    let pools = std::mem::take(&mut *pools());
    drop(pools);
}

/// RAYON_NUM_THREADS, or else a thread for each core.
pub(super) fn default_threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        let set = std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
        let cores = || thread::available_parallelism().map_or(1, usize::from);
        set.filter(|&threads| threads > 0).unwrap_or_else(cores).min(MAX_THREADS as usize)
    })
}
