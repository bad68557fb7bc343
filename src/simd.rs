//! Vectors of f32, one token type per instruction set, and the vector functions written over them.
//!
//! Three rules:
//!
//! * **A token is a proof.** Only detection makes an `Avx2`, after the processor reported the instructions. Holding a
//!   token is the permission to use them, so vector arithmetic is safe to call.
//! * **Code is written once**, generic over `Simd`, and compiled once per level. A `Kernel` is a piece of work. `Isa::run`
//!   runs it through one function per level, which enables the level's instructions.
//! * **Lanes are independent.** The only operations that mix lanes are the sums, `max_lane`, the transposes, `pick` and the
//!   packing of half types.
//!
//! | file | |
//! |---|---|
//! | `vector.rs` | the operations that every level has; kernels and their parts |
//! | `register_tiles.rs` | the shapes of register tiles, which every level states |
//! | `portable.rs` `avx2.rs` `avx512.rs` | the levels: instructions and shapes, one file each |
//! | `halves.rs` | conversions of the half types at the portable level |
//! | `level_token.rs` | the macros for tokens and instructions |
//! | `entry.rs` `isa.rs` | how a kernel enters a level; which levels the processor has |
//! | `processor.rs` | what depends on the processor, not on its instructions |
//! | `bf16_dot.rs` | dot products of pairs of bf16 |
//! | `streaming.rs` | stores past the caches |
//! | `rows.rs` | conversions of rows |
//! | `exp.rs` | exponentials |
//!
//! No code here depends on what the numbers mean.

mod avx2;
mod avx512;
mod bf16_dot;
mod entry;
pub(crate) mod exp;
mod halves;
mod isa;
#[cfg(target_arch = "x86_64")] // the others have no level of their own yet
mod level_token;
mod portable;
mod processor;
mod register_tiles;
pub(crate) mod rows;
mod streaming;
#[cfg(test)]
mod tests;
mod vector;

pub(crate) use bf16_dot::{PairDots, PairKernel};
pub(crate) use entry::kernel;
pub(crate) use isa::Isa;
pub(crate) use processor::prefetches_into_second_cache;
pub(crate) use register_tiles::{ByDotTile, ByStrip, MAX_SHARED_ROWS};
pub(crate) use streaming::Streaming;
pub(crate) use vector::{Kernel, LINE, MAX_LANES, Part, Simd};
