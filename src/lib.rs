//! Exact scaled-dot-product attention on CPUs.
#![warn(missing_docs)]

mod attention;
mod bias;
mod driver;
mod element;
mod error;
mod kernel;
mod machine;
mod mask;
mod merge;
mod plan;
mod problem;
pub mod reference;
mod simd;
pub mod softmax;
mod strided;
mod tensor;

pub use attention::{Attention, Prepared};
pub use bias::{AlibiSlopes, ScoreStage, alibi_slope};
pub use driver::Workspace;
pub use element::{DType, Element, bf16, f16};
pub use error::Error;
pub use mask::QueryOffset;
pub use merge::merge;
pub use plan::{Form, Plan, Threads};
pub use simd::Level;
pub use tensor::{TensorMut, TensorRef};
