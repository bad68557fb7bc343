//! Tensors: borrowed memory with a shape and signed strides.
//!
//! [`TensorRef`] is read, [`TensorMut`] is written; their element type and rank are known at compile time. [`AnyTensorRef`] and
//! [`AnyTensorMut`] have a type and rank known at run time. All are made from slices or ndarray views, and strides that leave
//! the slice are refused.
//!
//! Strides may be any number, negative and zero included; an innermost stride of 1 is fastest. So `[batch, heads, seq, dim]`,
//! `[batch, seq, heads, dim]` and slices of a packed QKV buffer are read alike.
//!
//! | file | |
//! |---|---|
//! | `strided.rs` | a checked pointer with strides: indices become addresses here |
//! | `matrix.rs` | rows at one stride, cut from a tensor: kernels read these |
//! | `group.rs` | the rows of the query heads that share a key/value head |
//! | `pairs.rs` | rows of bf16, two elements at a time |
//! | `shared.rs` | an output that threads share: written by rows, never read |
//! | `view.rs` `any.rs` `from_ndarray.rs` | the public types, and their conversions |

pub(crate) mod any;
#[cfg(feature = "ndarray")]
mod from_ndarray;
pub(crate) mod group;
pub(crate) mod matrix;
mod pairs;
pub(crate) mod row_list;
pub(crate) mod shared;
pub(crate) mod strided;
mod view;

pub use any::{AnyTensorMut, AnyTensorRef};
pub(crate) use view::check_range;
pub use view::{TensorMut, TensorRef};
