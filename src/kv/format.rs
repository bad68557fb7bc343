//! What a cache stores for each token.

#![forbid(unsafe_code)]

use crate::element::DType;

/// What a cache stores for each token of a layer: `heads_kv` keys of `head_dim` elements and values of `value_dim`, of one type.
///
/// ```
/// use flashtile::{DType, KvFormat};
///
/// let format = KvFormat::new(DType::F16, 8, 128);
/// assert_eq!(format.token_bytes(), 2 * 8 * (128 + 128));
/// let narrow = format.value_dim(64);
/// assert_eq!((narrow.head_dim, narrow.value_dim), (128, 64));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvFormat {
    /// The type that keys and values are stored in. Appended ones may have any type, and are rounded to nearest, ties to even.
    pub dtype: DType,
    /// Heads of keys and values.
    pub heads_kv: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
}

impl KvFormat {
    /// Keys and values of `head_dim` elements.
    pub const fn new(dtype: DType, heads_kv: usize, head_dim: usize) -> Self {
        KvFormat { dtype, heads_kv, head_dim, value_dim: head_dim }
    }

    /// Values of another number of elements than keys.
    #[must_use]
    pub const fn value_dim(self, value_dim: usize) -> Self {
        KvFormat { value_dim, ..self }
    }

    /// Bytes of one token in one layer; the largest `usize` if they are more than that.
    pub const fn token_bytes(&self) -> usize {
        let elements = self.heads_kv.saturating_mul(self.head_dim.saturating_add(self.value_dim));
        elements.saturating_mul(self.dtype.size())
    }
}
