//! Problems, the exact answer and the checks that tests share.
#![allow(dead_code, unreachable_pub, reason = "each test uses its part, and is a crate of its own")]

pub mod any_problem;
pub mod bound;
pub mod check;
pub mod counting;
#[cfg(unix)]
pub mod guarded;
pub mod layouts;
pub mod open;
pub mod problems;
pub mod random_problem;
#[path = "../../benches/support/seeded.rs"]
pub mod seeded;
pub mod sequences;
pub mod watchdog;

pub use seeded::{Dims, Inputs, Rng, len};
