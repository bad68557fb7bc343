//! Tasks and threads: carries out a plan. It has no formulas and no instructions.
//!
//! ```text
//! schedule    the plan's tasks, heaviest (rows times keys) first
//! task        the kernel's input of a task: rows at strides
//! workspace   scratch memory, kept between calls
//! output      hands each row of the output to the one task that writes it
//! steps       a kernel's steps over the tiles of its keys
//! forward     load, step over the tiles, finish
//! short_heads the same in one call of the kernel, for heads of a few tokens
//! reduce      the same with keys split between tasks: partial results, merged in the order of the keys
//! inspect     scores as an output
//! key_sums    sums of probabilities for each key: tasks of keys, not of rows
//! ```
//!
//! `shared_prefix` computes the keys that sequences share, once for all of them, before the tasks.
//!
//! `threads.rs` has the worker loop: at most one worker for each thread of the pool, each with scratch memory of its own.
//! `task` and `output` here fill in what `kernel/task.rs` and `kernel/output.rs` define.

mod forward;
pub(crate) mod inspect;
pub(crate) mod key_sums;
mod output;
mod reduce;
mod schedule;
mod shared_prefix;
mod short_heads;
mod steps;
mod task;
mod workspace;

pub(crate) use forward::{run, run_scheduled};
pub(crate) use output::Output;
pub(crate) use schedule::Schedule;
pub use workspace::Workspace;
