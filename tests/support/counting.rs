//! An allocator that counts allocations and the most bytes held.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering::Relaxed};

thread_local! {
    /// Whether this thread's allocations count.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator with counters. A test file installs it with `#[global_allocator]`. The threads that
/// [`watch`](Self::watch) share one set of counters, so a file that reads them has a single `#[test]`; other threads (the
/// test harness's, those of a pool that is ending) don't count.
pub struct Counting {
    calls: AtomicUsize,
    /// Bytes; below 0 where a watched thread gave back what another one took.
    held: AtomicIsize,
    peak: AtomicIsize,
}

/// What a piece of work took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Allocations and growths.
    pub calls: usize,
    /// The most bytes held beyond what was held before.
    pub peak: usize,
}

impl Counting {
    pub const fn new() -> Self {
        Counting { calls: AtomicUsize::new(0), held: AtomicIsize::new(0), peak: AtomicIsize::new(0) }
    }

    /// From now on, what this thread takes counts.
    pub fn watch() {
        WATCHED.set(true);
    }

    /// Does `work` and says what it took.
    pub fn usage<T>(&self, work: impl FnOnce() -> T) -> (T, Usage) {
        assert!(WATCHED.get(), "this thread is not watched");
        let (calls, held) = (self.calls.load(Relaxed), self.held.load(Relaxed));
        self.peak.store(held, Relaxed);
        let result = work();
        let peak = self.peak.load(Relaxed) - held;
        (result, Usage { calls: self.calls.load(Relaxed) - calls, peak: peak as usize })
    }

    /// Does `work` and says how many bytes fewer are held after it.
    pub fn freed<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        assert!(WATCHED.get(), "this thread is not watched");
        let held = self.held.load(Relaxed);
        let result = work();
        (result, (held - self.held.load(Relaxed)).max(0) as usize)
    }

    fn took(&self, bytes: usize) {
        if WATCHED.get() {
            self.calls.fetch_add(1, Relaxed);
            let held = self.held.fetch_add(bytes as isize, Relaxed) + bytes as isize;
            self.peak.fetch_max(held, Relaxed);
        }
    }

    fn gave_back(&self, bytes: usize) {
        if WATCHED.get() {
            self.held.fetch_sub(bytes as isize, Relaxed);
        }
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.took(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        self.gave_back(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.took(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.took(size);
        self.gave_back(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(p, layout, size) }
    }
}
