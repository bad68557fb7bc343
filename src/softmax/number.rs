//! The element types of softmax.
#![forbid(unsafe_code)]

use super::sealed;
use std::fmt;

/// An element type of a softmax: [`f32`], [`f16`](crate::f16), [`bf16`](crate::bf16) or [`f64`].
///
/// The half types are storage types: arithmetic is f32, and each result is rounded once. f64 is for checking the other types: it has
/// the same bits at every level. `T::Real`, the type of scales and losses, is f64 for f64 and f32 for the other
/// types. The trait is sealed.
pub trait Number: sealed::Sealed + Copy + Default + fmt::Debug + Send + Sync + 'static {}
