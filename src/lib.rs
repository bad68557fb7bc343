//! Exact scaled-dot-product attention on CPUs.
#![warn(missing_docs)]

mod element;
mod error;
mod simd;
pub mod softmax;

pub use element::{DType, Element, bf16, f16};
pub use error::Error;
pub use simd::Level;
