//! Workers: one loop on several threads, each with scratch memory of its own.

#![forbid(unsafe_code)]

use crate::kernel::scratch::Scratch;

/// How many workers a call for `tasks` tasks gets.
pub(super) fn workers(parallel: bool, tasks: usize) -> usize {
    #[cfg(feature = "rayon")]
    if parallel {
        return rayon::current_num_threads().min(tasks).max(1);
    }
    let _ = (parallel, tasks);
    1
}

/// Work that is handed out piece by piece, each piece once.
pub(super) trait Claims<'c>: Sync {
    /// The right to one piece.
    type Claim;

    /// The next piece; `None` where all have been claimed.
    fn claim(&'c self) -> Option<Self::Claim>;
}

/// The worker loop: each worker claims pieces until none is left.
pub(super) fn work_through<'c, C: Claims<'c>>(
    scratch: &mut [Scratch],
    claims: &'c C,
    work: &(impl Fn(C::Claim, &mut Scratch) + Sync),
) {
    fan_out(scratch, &|scratch| {
        while let Some(claim) = claims.claim() {
            work(claim, scratch);
        }
    });
}

/// Calls `worker` once for each element of `scratch`, side by side where the current rayon pool has threads to spare.
///
/// By halving, because a join of two allocates nothing; a scope allocates for each spawn. A worker that no thread comes for runs
/// on this one, after the others: where pieces are claimed from a common counter, it finds none left.
fn fan_out(scratch: &mut [Scratch], worker: &(impl Fn(&mut Scratch) + Sync)) {
    match scratch {
        [] => {}
        [only] => worker(only),
        #[cfg(feature = "rayon")]
        _ => {
            let (left, right) = scratch.split_at_mut(scratch.len() / 2);
            rayon::join(|| fan_out(left, worker), || fan_out(right, worker));
        }
        #[cfg(not(feature = "rayon"))]
        _ => scratch.iter_mut().for_each(worker),
    }
}
