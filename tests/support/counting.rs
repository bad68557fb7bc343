//! An allocator that counts: how often it was asked, and how much was held at most.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator with counters. A test file installs it with `#[global_allocator]`; counters are of the whole
/// process, so a file that reads them has a single `#[test]`.
pub struct Counting {
    calls: AtomicUsize,
    held: AtomicUsize,
    peak: AtomicUsize,
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
        Counting { calls: AtomicUsize::new(0), held: AtomicUsize::new(0), peak: AtomicUsize::new(0) }
    }

    /// Does `work` and says what it took.
    pub fn usage<T>(&self, work: impl FnOnce() -> T) -> (T, Usage) {
        let (calls, held) = (self.calls.load(Relaxed), self.held.load(Relaxed));
        self.peak.store(held, Relaxed);
        let result = work();
        let usage =
            Usage { calls: self.calls.load(Relaxed) - calls, peak: self.peak.load(Relaxed).saturating_sub(held) };
        (result, usage)
    }

    /// Does `work` and says how many bytes fewer are held after it.
    pub fn freed<T>(&self, work: impl FnOnce() -> T) -> (T, usize) {
        let held = self.held.load(Relaxed);
        let result = work();
        (result, held.saturating_sub(self.held.load(Relaxed)))
    }

    fn took(&self, bytes: usize) {
        self.calls.fetch_add(1, Relaxed);
        let held = self.held.fetch_add(bytes, Relaxed) + bytes;
        self.peak.fetch_max(held, Relaxed);
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
        self.held.fetch_sub(layout.size(), Relaxed);
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
        self.held.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(p, layout, size) }
    }
}
