//! Calls from outside a pool: the calling thread works, and threads of the pool help as soon as they are awake.
//!
//! Waking a sleeping thread takes from microseconds to milliseconds, and a thread whose processor is busy may not come at all. So
//! the caller starts at once and never waits for a thread that has not come:
//!
//! 1. The caller puts a job for each helper into the pool's queue, and works.
//! 2. A job that starts enters the [`Door`]. Only then may it use what the caller has lent.
//! 3. When no work is left, the caller closes the door and waits until everyone inside has left. Jobs that start later find the
//!    door closed and return.

use std::any::Any;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Instant;

/// Looks at the door before the caller sleeps until the last helper leaves: some 20 µs, which is what waking the caller takes.
const LOOKS: usize = 500;

/// Calls `work` for the first of `lent` on this thread, and for each of the others on a thread of the pool, if one comes before
/// that returns. `spawn` puts a job into the pool's queue.
///
/// # Panics
/// If `work` panics, on any thread, after all calls of it have ended.
pub(super) fn work_with_helpers<T: Send>(
    lent: &mut [T],
    work: &(impl Fn(&mut T) + Sync),
    spawn: impl Fn(Box<dyn FnOnce() + Send>),
) {
    let Some((own, others)) = lent.split_first_mut() else { return };
    let door = Arc::new(Door::new());
    // Closes the door at the end of this function, also if `work` panics here.
    let closing = Closing(&door);
    for other in others {
        let (door, job) = (door.clone(), Job::new(work, other));
        spawn(Box::new(move || door.through(job)));
    }
    work(own);
    drop(closing);
    if let Some(panic) = door.panic() {
        resume_unwind(panic);
    }
}

/// Nanoseconds for which threads of a pool look for work before they sleep, with a margin: 75 µs were measured (Zen 3), and the
/// time depends on how long `sched_yield` takes.
const AWAKE: u64 = 30_000;

/// When the last call ended that was large enough for several threads, in nanoseconds.
static LAST_CALL: AtomicU64 = AtomicU64::new(0);

/// Notes that such a call has ended.
pub(super) fn note_call() {
    LAST_CALL.store(now().max(1), Ordering::Relaxed);
}

/// Whether calls come so fast that the pool stays awake. The second of such calls wakes it.
pub(super) fn stay_awake() -> bool {
    let last = LAST_CALL.load(Ordering::Relaxed);
    last != 0 && now().saturating_sub(last) <= AWAKE
}

/// Nanoseconds since the first call; 0 where there may be no clock.
fn now() -> u64 {
    if cfg!(target_family = "wasm") {
        return 0;
    }
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_nanos() as u64
}

/// What a caller has lent to a job: a function and its argument, without their types and lifetimes.
struct Job {
    call: unsafe fn(*const (), *mut ()),
    work: *const (),
    lent: *mut (),
}

// SAFETY: a job is a call of a function that is `Sync` with an argument that is `Send` (see `Job::new`).
unsafe impl Send for Job {}

impl Job {
    fn new<T: Send, W: Fn(&mut T) + Sync>(work: &W, lent: &mut T) -> Self {
        /// # Safety
        /// * `work` points to a `W`, `lent` to a `T` that nothing else uses; both live as long as the call
        unsafe fn call<T, W: Fn(&mut T)>(work: *const (), lent: *mut ()) {
            // SAFETY: the caller's promise.
            unsafe { (*work.cast::<W>())(&mut *lent.cast::<T>()) }
        }
        Job { call: call::<T, W>, work: (&raw const *work).cast(), lent: (&raw mut *lent).cast() }
    }
}

/// Counts the jobs that use what a caller has lent, and lets none in once it is closed.
struct Door {
    /// Jobs inside, and [`CLOSED`].
    inside: AtomicUsize,
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

const CLOSED: usize = 1 << (usize::BITS - 1);

impl Door {
    fn new() -> Self {
        Door { inside: AtomicUsize::new(0), caller: thread::current(), panic: Mutex::new(None) }
    }

    /// Runs the job, unless the door is closed.
    fn through(&self, job: Job) {
        if !self.enter() {
            return;
        }
        // SAFETY: the types are those of `Job::new`. `work_with_helpers` gives each job an element of its own, and does not
        // return before the door is closed and this job has left. So both pointers are valid, and nothing else uses `lent`.
        let done = catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.work, job.lent) }));
        if let Err(panic) = done {
            let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
            if first.is_none() {
                *first = Some(panic);
            } else {
                std::mem::forget(panic); // dropping it might panic, and this job would never leave
            }
        }
        self.leave();
    }

    fn enter(&self) -> bool {
        let one_more = |inside| (inside & CLOSED == 0).then_some(inside + 1);
        self.inside.fetch_update(Ordering::Acquire, Ordering::Relaxed, one_more).is_ok()
    }

    fn leave(&self) {
        // Release: what the job has written is seen by the caller, which acquires.
        if self.inside.fetch_sub(1, Ordering::Release) == CLOSED | 1 {
            self.caller.unpark();
        }
    }

    /// Lets no more jobs in, and waits until all have left.
    fn close(&self) {
        self.inside.fetch_or(CLOSED, Ordering::AcqRel);
        let mut looks = 0;
        while self.inside.load(Ordering::Acquire) != CLOSED {
            looks += 1;
            if looks < LOOKS { spin_loop() } else { thread::park() }
        }
    }

    fn panic(&self) -> Option<Box<dyn Any + Send>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Closes a door when it is dropped.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
        if thread::panicking() {
            // The caller's panic goes on, and dropping another one's might panic.
            std::mem::forget(self.0.panic());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Pieces are claimed from a counter, as in a call.
    struct Pieces {
        next: AtomicUsize,
        done: [AtomicUsize; 100],
    }

    impl Pieces {
        fn new() -> Self {
            Pieces { next: AtomicUsize::new(0), done: [const { AtomicUsize::new(0) }; 100] }
        }

        fn work(&self, own: &mut usize) {
            while let Some(done) = self.done.get(self.next.fetch_add(1, Ordering::Relaxed)) {
                done.fetch_add(1, Ordering::Relaxed);
                *own += 1;
            }
        }

        fn is_complete(&self) -> bool {
            self.done.iter().all(|done| done.load(Ordering::Relaxed) == 1)
        }
    }

    fn spawn_now(job: Box<dyn FnOnce() + Send>) {
        thread::spawn(job);
    }

    /// Threads come at any time: before, while and after the caller works.
    #[test]
    fn each_piece_is_computed_once() {
        let mut helped = 0;
        for round in 0..2000 {
            let (pieces, mut counts) = (Pieces::new(), [0; 3]);
            work_with_helpers(
                &mut counts,
                &|own| {
                    (0..round % 7 * 500).for_each(|_| spin_loop());
                    pieces.work(own);
                },
                spawn_now,
            );
            assert!(pieces.is_complete());
            assert_eq!(counts.iter().sum::<usize>(), 100);
            helped += usize::from(counts[1] + counts[2] > 0);
        }
        // Otherwise this test would show nothing. One processor may be too busy for a thread to come.
        let processors = thread::available_parallelism().map_or(1, usize::from);
        assert!(helped > 0 || processors == 1, "no thread came in time");
    }

    /// The caller does not wait for a thread that never comes, and one that comes later finds the door closed.
    #[test]
    fn nobody_waits_for_late_threads() {
        let (sender, jobs) = mpsc::channel();
        let (pieces, mut counts) = (Pieces::new(), vec![0; 3]);
        work_with_helpers(&mut counts, &|own| pieces.work(own), |job| sender.send(job).unwrap());
        assert_eq!(counts, [100, 0, 0]);
        drop(sender);
        let late: Vec<_> = jobs.into_iter().collect();
        assert_eq!(late.len(), 2);
        counts.clear();
        drop((counts, pieces)); // what was lent is gone
        late.into_iter().for_each(|job| job());
    }

    /// The caller's panic, too, waits for those inside. The helper's panic is the caller's.
    #[test]
    fn panics_come_after_all_have_left() {
        for by_helper in [false, true] {
            let (inside, left) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let result = catch_unwind(AssertUnwindSafe(|| {
                work_with_helpers(
                    &mut [0, 1],
                    &|own| {
                        if *own == 1 {
                            inside.store(1, Ordering::SeqCst);
                            thread::sleep(std::time::Duration::from_millis(20));
                            left.store(1, Ordering::SeqCst);
                            assert!(!by_helper, "the helper's");
                        } else {
                            while inside.load(Ordering::SeqCst) == 0 {
                                thread::yield_now();
                            }
                            assert!(by_helper, "the caller's");
                        }
                    },
                    spawn_now,
                )
            }));
            let message = *result.unwrap_err().downcast::<&str>().unwrap();
            assert_eq!(message, if by_helper { "the helper's" } else { "the caller's" });
            assert_eq!(left.load(Ordering::SeqCst), 1);
        }
    }
}
