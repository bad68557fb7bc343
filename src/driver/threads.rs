//! Workers: the same closure on several threads, each with a part of the scratch memory.

#![forbid(unsafe_code)]

/// How many workers a call for `tasks` tasks gets.
pub(super) fn workers(parallel: bool, tasks: usize) -> usize {
    #[cfg(feature = "rayon")]
    if parallel {
        return rayon::current_num_threads().min(tasks).max(1);
    }
    let _ = (parallel, tasks);
    1
}

/// Calls `work` once for each element of `scratch`, side by side where the current rayon pool has threads to spare.
///
/// By halving, because a join of two puts nothing on the heap. A worker that no thread comes for runs on this one, after
/// the others: whoever draws tasks from a common counter leaves nothing for it to do.
pub(super) fn fan_out<W: Send>(scratch: &mut [W], work: &(impl Fn(&mut W) + Sync)) {
    match scratch {
        [] => {}
        [only] => work(only),
        #[cfg(feature = "rayon")]
        _ => {
            let (left, right) = scratch.split_at_mut(scratch.len() / 2);
            rayon::join(|| fan_out(left, work), || fan_out(right, work));
        }
        #[cfg(not(feature = "rayon"))]
        _ => scratch.iter_mut().for_each(work),
    }
}
