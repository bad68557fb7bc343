//! A deadline: work that hangs fails its test.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Runs `work` on a thread of its own and returns its result. A panic of `work` is passed on.
///
/// # Panics
/// If it is not done within `seconds`.
pub fn within<T: Send + 'static>(seconds: u64, what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, wait) = channel();
    let worker = std::thread::spawn(move || {
        let result = work();
        let _ = done.send(());
        result
    });
    if let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(Duration::from_secs(seconds)) {
        panic!("{what}: not done within {seconds} seconds");
    }
    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
