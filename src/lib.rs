//! Exact scaled-dot-product attention on CPUs: a tiled online softmax, with masks, biases, f16 and bf16.
//!
//! ```text
//! score[i,j] = softcap( scale * dot(q[i], k[j]) ) + bias[i,j]        for every key j that query i may see
//! out[i]     = sum_j softmax(score[i,:])[j] * v[j]                   lse[i] = log sum_j exp(score[i,j])
//! ```
//!
//! With ndarray (a default feature), any strides:
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
//! With slices, as an engine would: its own memory, its own layout, a cache that is narrower than the queries, and no
//! allocation once the workspace has grown.
//!
//! ```
//! use flashtile::{Attention, TensorMut, TensorRef, Workspace, f16};
//!
//! let attention = Attention::new().causal();
//! let mut workspace = Workspace::new();
//!
//! // One new token of 8 heads, stored [batch, seq, heads, dim]; a cache with room for 64 tokens, of which 20 are filled.
//! let q = vec![0.1f32; 8 * 64];
//! let (k, v) = (vec![f16::from_f32(0.2); 2 * 64 * 64], vec![f16::from_f32(0.3); 2 * 64 * 64]);
//! let mut out = vec![0.0f32; 8 * 64];
//! let (filled, [head, row]) = (20, [64 * 64, 64]);
//! attention.compute(
//!     TensorRef::from_slice(&q, [1, 1, 8, 64])?.permuted([0, 2, 1, 3])?,
//!     TensorRef::with_strides(&k, 0, [1, 2, filled, 64], [0, head, row, 1])?,
//!     TensorRef::with_strides(&v, 0, [1, 2, filled, 64], [0, head, row, 1])?,
//!     TensorMut::from_slice(&mut out, [1, 1, 8, 64])?.permuted([0, 2, 1, 3])?,
//!     None,
//!     &mut workspace,
//! )?;
//! assert!((out[0] - 0.3).abs() < 1e-4);
//! # Ok::<(), flashtile::Error>(())
//! ```
//!
//! # When to use it, and when not
//!
//! * Prefill, encoders and decoding on x86-64 processors with AVX2 or AVX-512; elsewhere it runs on portable code, correct and slower.
//! * Where results must not change with the number of threads, the batch or the chunking: see the edge rules of
//!   [`Attention`], which are tested promises.
//! * Not for training: there is no backward pass yet (the [`softmax`] on its own has one).
//! * Not for quantised or paged caches, yet.
//!
//! # Levels and features
//!
//! The instruction set is found at run time: [`Level`] lists them, [`Attention::level`] forces one.
//!
//! | feature | default | |
//! |---|---|---|
//! | `rayon` | yes | work is spread over the caller's current rayon pool; without it, calls are serial |
//! | `ndarray` | yes | ndarray views in, arrays out; without it, [`TensorRef`] and [`TensorMut`] over slices |
//! | `capi` | no | the C interface, `src/capi/flashtile.h` |
//!
//! # Map
//!
//! What a call goes through, floor by floor; `docs/architecture.md` has the reasons.
//!
//! | file | |
//! |---|---|
//! | `tensor.rs` `tensor/` `integers.rs` `element.rs` `error.rs` | what the user hands in |
//! | `attention.rs` | the calls |
//! | `problem.rs` `plan.rs` `machine.rs` | the checked question, the decision, the hardware |
//! | `driver.rs` `driver/` | threads and tiles, no formulas |
//! | `kernel.rs` `kernel/` | one tile, no tensors, no threads |
//! | `simd.rs` `simd/` | instructions |
//! | `mask.rs` `bias.rs` | which pairs exist, how a score changes: shared meanings |
//! | `reference.rs` | the definition in f64, beside the house |
//! | `capi.rs` `capi/` | the C interface, before the door |
//! | `softmax.rs` `softmax/` | softmax on its own, above `simd` |

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
mod mask;
mod merge;
mod options;
mod plan;
mod prepared;
mod problem;
pub mod reference;
mod score;
mod sequence;
mod simd;
pub mod softmax;
mod tensor;

pub use attention::Attention;
pub use call::LseOutput;
pub use driver::Workspace;
pub use element::{DType, Element, bf16, f16};
pub use error::Error;
pub use integers::Integers;
pub use kernel::task::Operands;
pub use level::Level;
pub use merge::merge;
pub use plan::{Form, Plan, Threads};
pub use prepared::Prepared;
pub use score::{AlibiSlopes, ScoreStage, alibi_slope};
pub use sequence::QueryOffset;
pub use tensor::{AnyTensorMut, AnyTensorRef, TensorMut, TensorRef};

/// The README's code is compiled and run, too.
#[cfg(all(doctest, feature = "ndarray"))]
#[doc = include_str!("../README.md")]
struct Readme;
