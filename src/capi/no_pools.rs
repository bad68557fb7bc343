//! What stands for `pools.rs` without the feature rayon: the calling thread alone.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};

/// Calls `work` where `threads` threads are there to help it, if it is `parallel`; 0 stands for the default.
pub(super) fn run_on(threads: i32, _parallel: bool, work: impl FnOnce() + Send) -> Result<(), Failure> {
    if threads > 1 {
        let message = format!("{threads} threads were asked for, but this library was built without the feature rayon");
        return Err(Failure::new(Code::Threads, message));
    }
    work();
    Ok(())
}

pub(super) fn release() {}

pub(super) fn default_threads() -> usize {
    1
}
