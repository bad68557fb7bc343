//! Boolean masks: a tensor with an element for each pair of query and key.

#![forbid(unsafe_code)]

use crate::tensor::group::GroupRows;
use crate::tensor::strided::Strided;
use std::ops::Range;

/// Bytes, not 0 where the query may attend, broadcast to `[batch, heads_q, seq_q, seq_kv]`.
///
/// The elements are bytes, because a mask from C may hold any byte, and a Rust `bool` that is neither 0 nor 1 is undefined
/// behaviour.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MaskTensor<'a>(pub(crate) Strided<'a, u8, 4>);

impl<'a> MaskTensor<'a> {
    /// Whether query `i` of head `h` may attend to key `j`: the definition.
    pub(crate) fn sees(&self, [b, h, i]: [usize; 3], j: usize) -> bool {
        self.0.get([b, h, i, j]).is_some_and(|byte| byte != 0)
    }

    /// The rows of a group of heads.
    pub(crate) fn rows(&self, b: usize, heads: Range<usize>) -> GroupRows<'a, u8> {
        GroupRows::new(&self.0, b, heads)
    }
}
