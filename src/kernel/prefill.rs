//! The form for many rows.

pub(crate) mod finish;
pub(crate) mod pack;
pub(crate) mod scores;
pub(crate) mod softmax;
pub(crate) mod values;
