//! Replaces `pools.rs` without the feature rayon: only the calling thread works.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};

/// The number of threads that C means: 0 stands for [`default_threads`].
pub(super) fn count(threads: i32) -> usize {
    if threads == 0 { default_threads() } else { usize::try_from(threads).unwrap_or(1) }
}

/// Calls `work` on the calling thread. Refuses more than one thread.
pub(super) fn run_on(threads: i32, _parallel: bool, work: impl FnOnce() + Send) -> Result<(), Failure> {
    if threads > 1 {
        let message = format!("{threads} threads need the feature rayon, and this library was built without it");
        return Err(Failure::new(Code::Threads, message));
    }
    work();
    Ok(())
}

pub(super) fn release() {}

pub(super) fn default_threads() -> usize {
    1
}
