//! The form for few rows.

mod block;
pub(crate) mod scores;
pub(crate) mod softmax;
pub(crate) mod values;
