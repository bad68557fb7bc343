//! The threads of callers from C: pools of the library's own, never a rayon pool of the program.

#![forbid(unsafe_code)]

use super::failure::{Code, Failure};
use super::thread_count::count;
use crate::threads::{helped_by, pools};

/// Calls `work`, on `threads` threads if it is `parallel`.
pub(super) fn run_on(threads: i32, parallel: bool, work: impl FnOnce()) -> Result<(), Failure> {
    if !parallel {
        work();
        return Ok(());
    }
    let threads = count(threads);
    let pool = pools::pool(threads)
        .map_err(|error| Failure::new(Code::Threads, format!("{threads} threads could not be started: {error}")))?;
    helped_by(pool, work);
    Ok(())
}

pub(super) use pools::release;
