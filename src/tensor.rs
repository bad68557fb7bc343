//! Tensors: a borrow, a shape and signed strides.
//!
//! [`TensorRef`] is read, [`TensorMut`] is written; their element type and rank are known at compile time. [`AnyTensorRef`] and
//! [`AnyTensorMut`] know both at run time. All are made from slices or ndarray views, and strides that leave the slice are
//! refused. The innermost stride is best 1; every stride may be anything, negative and zero included, so `[batch, heads, seq,
//! dim]`, `[batch, seq, heads, dim]` and slices of a packed QKV buffer are all the same thing to the crate.
//!
//! | file | |
//! |---|---|
//! | `strided.rs` | a checked pointer with strides: the one place where an index becomes an address |
//! | `matrix.rs` | rows at one stride, cut from it: what kernels read |
//! | `pairs.rs` | rows of bf16, two elements at a time |
//! | `shared.rs` | an output that threads share: written by rows, never read |
//! | `view.rs` `any.rs` `from_ndarray.rs` | the public types, and what they are made from |

pub(crate) mod any;
#[cfg(feature = "ndarray")]
mod from_ndarray;
pub(crate) mod group;
pub(crate) mod matrix;
mod pairs;
pub(crate) mod shared;
pub(crate) mod strided;
mod view;

pub use any::{AnyTensorMut, AnyTensorRef};
pub use view::{TensorMut, TensorRef};
