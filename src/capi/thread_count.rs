//! The number of threads of a call.

#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::thread;

/// The largest number of threads. A larger number is refused as a mistake.
pub(super) const MAX_THREADS: i32 = 1024;

/// The number of threads that C means: 0 stands for [`default_threads`].
pub(super) fn count(threads: i32) -> usize {
    if threads == 0 { default_threads() } else { usize::try_from(threads).unwrap_or(1) }
}

/// RAYON_NUM_THREADS if set, otherwise one thread per core; 1 without the feature rayon.
pub(super) fn default_threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    if cfg!(not(feature = "rayon")) {
        return 1;
    }
    *THREADS.get_or_init(|| {
        let set = std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
        let cores = || thread::available_parallelism().map_or(1, usize::from);
        set.filter(|&threads| threads > 0).unwrap_or_else(cores).min(MAX_THREADS as usize)
    })
}
