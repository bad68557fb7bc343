//! Instructions: vectors of f32, one token type per instruction set, and the vector mathematics written over them.
//!
//! Three ideas hold this layer together.
//!
//! * **A token is a proof.** `Avx2` can only be made by `Isa::detect`, after the processor said that it has the
//!   instructions. Holding one is the right to use them, so vector arithmetic is safe to call.
//! * **Code is written once**, generic over `Simd`, and compiled once for every level: a `Kernel` is a piece of work that runs
//!   at the level that it is given, and `Isa::run` enters it through the one function per level that enables the level's
//!   instructions.
//! * **Lanes are independent.** No operation mixes lanes but the sums, `max_lane`, the transposes, `pick` and the packing of
//!   half types, which say so.
//!
//! | file | |
//! |---|---|
//! | `vector.rs` | the operations that every level has |
//! | `register_tiles.rs` | the shapes of loops, which every level states |
//! | `portable.rs` `avx2.rs` `avx512.rs` | the levels: instructions and shapes, a file each |
//! | `level_token.rs` | the macros that a level's file begins with |
//! | `entry.rs` `isa.rs` | how work enters a level; which levels the processor has |
//! | `bf16_dot.rs` | dot products of pairs of bf16 |
//! | `streaming.rs` | stores past the caches |
//! | `exp.rs` | exponentials |
//!
//! Nothing here knows what the numbers mean.

mod avx2;
mod avx512;
mod bf16_dot;
mod entry;
pub(crate) mod exp;
mod isa;
mod level_token;
mod portable;
mod register_tiles;
mod streaming;
#[cfg(test)]
mod tests;
mod vector;

pub(crate) use bf16_dot::{PairDots, PairKernel};
pub(crate) use entry::{Kernel, kernel};
pub(crate) use isa::Isa;
pub(crate) use register_tiles::{ByDotTile, ByStrip, MAX_SHARED_ROWS};
pub(crate) use streaming::Streaming;
pub(crate) use vector::{LINE, MAX_LANES, Simd};
