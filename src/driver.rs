//! Tasks and threads: carries out a plan. No formulas and no instructions.
//!
//! ```text
//! schedule    the plan's tasks, those with the most visible keys first
//! task        a task as the kernel sees it: rows at strides
//! threads     as many workers as the pool has, each with scratch memory of its own; the one worker loop
//! output      hands the rows of the output to the one task that writes them
//! forward     load, step over the tiles, finish
//! reduce      the same with keys split between tasks: partial results, merged in order
//! inspect     scores, written out to be looked at
//! ```

mod forward;
pub(crate) mod inspect;
mod output;
mod reduce;
mod schedule;
mod task;
mod threads;
mod workspace;

pub(crate) use forward::{run, run_scheduled};
pub(crate) use output::Output;
pub(crate) use schedule::Schedule;
pub use workspace::Workspace;
