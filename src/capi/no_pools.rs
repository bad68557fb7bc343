//! Replaces `pools.rs` without the feature rayon: only the calling thread works.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};

/// Calls `work` on the calling thread. Refuses more than one thread.
pub(super) fn run_on(threads: i32, _parallel: bool, work: impl FnOnce()) -> Result<(), Failure> {
    if threads > 1 {
        let message = format!("{threads} threads need the feature rayon, and this library was built without it");
        return Err(Failure::new(Code::Threads, message));
    }
    work();
    Ok(())
}

pub(super) fn release() {}
