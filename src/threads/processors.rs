//! Which processors helping threads may run on.
//!
//! Linux often wakes a thread on the processor of the thread that wakes it, and moves it to an idle one only at its next tick,
//! milliseconds later, because it expects that the waking thread will sleep soon. Ours goes on to work. So before a helper is
//! woken, it is kept from the caller's processor. Two virtual processors (Zen 3), 1.3 ms of work for one thread, 20 ms
//! after the last call: 1.29 ms with a helper that may run anywhere, 0.94 ms with one that may not run here; after 2 ms 1.27
//! and 0.90.

use libc::{CPU_CLR, CPU_COUNT, cpu_set_t, pid_t, pthread_setaffinity_np, pthread_t, sched_getaffinity, sched_getcpu};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;

/// The most helpers that are kept from a processor. Among more, one that comes late matters little, and telling each of
/// them takes a microsecond.
const MOST_HELPERS: usize = 15;

/// The processors that the threads of a pool may use.
pub(super) struct Processors {
    /// `None` if unknown.
    all: Option<cpu_set_t>,
    /// The one that they are kept from.
    avoided: AtomicI32,
}

impl Processors {
    /// Those of this thread or those of the process's first thread, whichever are more: a thread that calls may be pinned, and
    /// those that help it should not be.
    pub(super) fn of_this_thread() -> Self {
        let first = i32::try_from(std::process::id()).ok().and_then(processors_of);
        let all = processors_of(0).into_iter().chain(first).max_by_key(count);
        Processors { all, avoided: AtomicI32::new(-1) }
    }

    /// Lets the threads run on all of them: threads inherit the processors of the one that starts them.
    pub(super) fn set_free(&self, threads: &[JoinHandle<()>]) {
        if let Some(all) = &self.all {
            threads.iter().for_each(|thread| run_on(thread, all));
        }
    }

    /// Keeps the threads from the caller's processor, if there are enough others.
    pub(super) fn keep_from_mine(&self, threads: &[JoinHandle<()>]) {
        let Some(mut others) = self.all else { return };
        // SAFETY: it takes nothing.
        let mine = unsafe { sched_getcpu() };
        // Telling the kernel takes a microsecond for each thread, so they are told if it has changed.
        if mine < 0 || threads.len() > MOST_HELPERS || self.avoided.swap(mine, Ordering::Relaxed) == mine {
            return;
        }
        // SAFETY: the kernel's number of a processor is within a set that the kernel filled in.
        unsafe { CPU_CLR(mine as usize, &mut others) };
        if count(&others) < threads.len() {
            return; // they would wait for each other
        }
        threads.iter().for_each(|thread| run_on(thread, &others));
    }
}

/// Has a thread of this process, which the pool has checked, run on these processors. A failure changes nothing: the thread runs where
/// it could run before.
fn run_on(thread: &JoinHandle<()>, processors: &cpu_set_t) {
    #[allow(clippy::unnecessary_cast)] // an integer for std, and a pointer for musl
    let id = thread.as_pthread_t() as pthread_t;
    // SAFETY: the thread has not been joined, so its identifier is valid; `processors` is a set of that size.
    unsafe { pthread_setaffinity_np(id, size_of::<cpu_set_t>(), processors) };
}

/// The processors that a thread may use, the calling one if `thread` is 0.
fn processors_of(thread: pid_t) -> Option<cpu_set_t> {
    // SAFETY: a set is an array of bits.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a set of that size.
    (unsafe { sched_getaffinity(thread, size_of::<cpu_set_t>(), &mut set) } == 0).then_some(set)
}

fn count(set: &cpu_set_t) -> usize {
    // SAFETY: any bits are a set.
    unsafe { CPU_COUNT(set) as usize }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libc::{CPU_SET, sched_setaffinity};
    use std::sync::{Arc, Barrier};
    use std::thread::spawn;

    fn own() -> usize {
        processors_of(0).map_or(0, |set| count(&set))
    }

    /// The helpers that a pinned thread starts may run on all processors, however many helpers they are.
    #[test]
    fn a_pinned_caller_pins_no_helpers() {
        let all = own();
        let pinned = spawn(|| {
            // SAFETY: a set is an array of bits; this thread runs on a processor of the set; a set of that size is read.
            unsafe {
                let mut one: cpu_set_t = std::mem::zeroed();
                CPU_SET(sched_getcpu() as usize, &mut one);
                assert_eq!(sched_setaffinity(0, size_of::<cpu_set_t>(), &one), 0);
            }
            let start = Arc::new(Barrier::new(MOST_HELPERS + 2));
            let helper = || {
                let start = start.clone();
                spawn(move || {
                    start.wait();
                })
            };
            let helpers: Vec<_> = (0..=MOST_HELPERS).map(|_| helper()).collect();
            let processors = Processors::of_this_thread();
            processors.set_free(&helpers);
            let free = helpers.iter().map(processors_of_handle).collect::<Vec<_>>();
            processors.keep_from_mine(&helpers[..1]);
            let kept = processors_of_handle(&helpers[0]);
            start.wait();
            helpers.into_iter().for_each(|helper| helper.join().unwrap());
            (own(), free, kept)
        });
        let kept = if all > 1 { all - 1 } else { 1 };
        assert_eq!(pinned.join().unwrap(), (1, vec![all; MOST_HELPERS + 1], kept));
    }

    fn processors_of_handle(thread: &JoinHandle<()>) -> usize {
        #[allow(clippy::unnecessary_cast)] // as in `run_on`
        let id = thread.as_pthread_t() as pthread_t;
        // SAFETY: a set is an array of bits; the thread has not been joined, and a set of that size is written.
        unsafe {
            let mut set = std::mem::zeroed();
            assert_eq!(libc::pthread_getaffinity_np(id, size_of::<cpu_set_t>(), &mut set), 0);
            count(&set)
        }
    }
}
