//! Exact scaled-dot-product attention on CPUs: a tiled online softmax, with masks, biases, f16 and bf16.
//!
//! ```text
//! score[i,j] = softcap(scale * dot(q[i], k[j])) + bias[i,j]
//!              for every key j that query i may see
//! out[i]     = sum_j softmax(score[i,:])[j] * v[j]
//! lse[i]     = log sum_j exp(score[i,j])
//! ```
//!
//! With ndarray (a default feature), arrays and views of any strides:
//!
//! ```
//! use flashtile::Attention;
//! use ndarray::Array4;
//!
//! let q = Array4::from_elem((1, 8, 10, 64), 0.1f32); // [batch, heads_q, seq_q, head_dim]
//! let k = Array4::from_elem((1, 2, 30, 64), 0.2f32); // [batch, heads_kv, seq_kv, head_dim]
//! let v = Array4::from_elem((1, 2, 30, 64), 0.3f32); // [batch, heads_kv, seq_kv, value_dim]
//! let out = Attention::new().causal().run(&q, &k, &v)?; // [batch, heads_q, seq_q, value_dim]
//! assert!((out[[0, 7, 9, 63]] - 0.3).abs() < 1e-6);
//! # Ok::<(), flashtile::Error>(())
//! ```
//!
//! With slices, as an inference engine calls it: its own memory and layout, and an f16 cache beside f32 queries. Calls do not
//! allocate after the workspace has grown.
//!
//! ```
//! use flashtile::{Attention, TensorMut, TensorRef, Workspace, f16};
//!
//! let attention = Attention::new().causal();
//! let mut workspace = Workspace::new();
//!
//! // One new token of 8 heads, stored [batch, seq, heads, dim]; a cache with room for 64 tokens, 20 of them filled.
//! let q = vec![0.1f32; 8 * 64];
//! let (k, v) = (vec![f16::from_f32(0.2); 2 * 64 * 64], vec![f16::from_f32(0.3); 2 * 64 * 64]);
//! let mut out = vec![0.0f32; 8 * 64];
//! let (filled, [head, row]) = (20, [64 * 64, 64]);
//! attention.compute(
//!     TensorRef::from_slice(&q, [1, 1, 8, 64])?.permuted([0, 2, 1, 3])?,
//!     (
//!         TensorRef::with_strides(&k, 0, [1, 2, filled, 64], [0, head, row, 1])?,
//!         TensorRef::with_strides(&v, 0, [1, 2, filled, 64], [0, head, row, 1])?,
//!     ),
//!     TensorMut::from_slice(&mut out, [1, 1, 8, 64])?.permuted([0, 2, 1, 3])?,
//!     None,
//!     &mut workspace,
//! )?;
//! assert!((out[0] - 0.3).abs() < 1e-4);
//! # Ok::<(), flashtile::Error>(())
//! ```
//!
//! With caches: [`KvCache`] for a batch of sequences, [`RotatingKvCache`] for windows, [`PagedKvCache`] for a server. Prompts,
//! chunks and single tokens of many sequences go in one call: see [`Attention::query_starts`]. `docs/inference.md` leads from
//! one request to a server's batch, and `docs/embedding.md` has the views of other engines' memory.
//!
//! # When to use it, and when not
//!
//! * Use it for prefill, encoders and decoding on x86-64 processors with AVX2 or AVX-512. On other processors it runs portable
//!   code, which is correct and slower.
//! * Use it if results must not change with the number of threads, the batch or the chunking. The edge rules of [`Attention`]
//!   are tested promises.
//! * It is not for training: there is no backward pass yet. (The public [`softmax`] functions have one.)
//! * It does not read quantised caches yet.
//!
//! # Levels and features
//!
//! The instruction set is detected at run time. [`Level`] lists all of them, and [`Attention::level`] forces one.
//!
//! | feature | default | |
//! |---|---|---|
//! | `rayon` | yes | work is spread over the caller's rayon pool, or over threads of this crate; without it, calls are serial |
//! | `ndarray` | yes | ndarray views in, arrays out; without it, [`TensorRef`] and [`TensorMut`] over slices |
//! | `capi` | no | the C interface, `src/capi/flashtile.h` |
//!
//! # Map of files
//!
//! Data goes down one layer at a time. A file uses only its own layer and the layers below it; `docs/architecture.md` has the
//! reasons.
//!
//! | layer | files | |
//! |---|---|---|
//! | api | `attention.rs` `call.rs` `prepared.rs` `merge.rs` `reference.rs` `capi.rs` `capi/` | calls: tensors come in, errors go back |
//! | driver | `driver.rs` `driver/` | tasks, threads, workspace, output |
//! | decision | `problem.rs` `plan.rs` `plan/` | the checked call; how it is computed |
//! | kernel | `kernel.rs` `kernel/` | one tile: rows at strides |
//! | meaning | `options.rs` `sequence.rs` `pair.rs` `mask.rs` `mask/` `score.rs` `score/` `score_tile.rs` `kv.rs` `kv/` `rotary.rs` | what is computed; caches |
//! | softmax | `softmax.rs` `softmax/` | the public softmax functions |
//! | simd | `simd.rs` `simd/` | instructions |
//! | ground | `error.rs` `element.rs` `level.rs` `integers.rs` `threads.rs` `threads/` `tensor.rs` `tensor/` | what every layer may use |

#![deny(missing_docs)]

mod attention;
mod call;
#[cfg(feature = "capi")]
pub mod capi;
mod driver;
mod element;
mod error;
mod integers;
mod kernel;
mod kv;
mod level;
pub mod mask;
mod merge;
mod options;
mod pair;
mod plan;
mod prepared;
mod problem;
pub mod reference;
mod rotary;
pub mod score;
mod score_tile;
mod sequence;
mod simd;
pub mod softmax;
mod tensor;
mod threads;

pub use attention::Attention;
pub use call::LseOutput;
pub use driver::Workspace;
pub use element::{DType, Element, bf16, f16};
pub use error::Error;
pub use integers::Integers;
pub use kernel::task::Operands;
pub use kv::{KeysValues, KvCache, KvFormat, PageLists, PageTable, PagedKvCache, RotatingKvCache, SequenceId};
pub use level::Level;
pub use merge::merge;
pub use plan::{Form, Plan, Threads};
pub use prepared::Prepared;
pub use rotary::{Positions, Rotary, rotary_frequencies};
pub use score::{AlibiSlopes, ScoreStage, alibi_slope};
pub use sequence::QueryOffset;
pub use tensor::{AnyTensorMut, AnyTensorRef, TensorMut, TensorRef};

/// Compiles and runs the README's code as a doc test.
#[cfg(all(doctest, feature = "ndarray"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// The same for `docs/inference.md`.
#[cfg(doctest)]
#[doc = include_str!("../docs/inference.md")]
struct Inference;

/// The same for `docs/embedding.md`.
#[cfg(all(doctest, feature = "ndarray"))]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;
