//! Keys and values: how callers hand them in ([`KeysValues`]), as kernels read them, and caches that own them.
//!
//! The kernel gets [`KeyRows`](rows::KeyRows), the keys or values of one head in the order of positions, and takes
//! [`Run`](run::Run)s from them: rows at one stride, in one storage format. Nothing above the kernel gathers rows. The caches are
//! storages with a few rules. They convert and store tokens, and compute nothing.
//!
//! | file | |
//! |---|---|
//! | `places.rs` | where the keys of each sequence lie |
//! | `page_table.rs` | lists of pages, checked once |
//! | `rows.rs` | the keys of one head, as a list of runs |
//! | `run.rs` | rows at one stride, as kernels read them |
//! | `format.rs` | what a cache stores for each token |
//! | `storage.rs` | the memory of keys and values; tokens are checked, converted and written here |
//! | `batch.rs` | a fixed batch of sequences, as the next two have |
//! | `cache.rs` | a row for each token, up to a capacity |
//! | `rotating.rs` | the first tokens, and a ring of the last ones |
//! | `paged.rs` | a pool of pages, which sequences share |

#![forbid(unsafe_code)]

mod batch;
mod cache;
mod format;
mod page_table;
mod paged;
pub(crate) mod places;
mod rotating;
pub(crate) mod rows;
pub(crate) mod run;
mod storage;

pub use cache::KvCache;
pub use format::KvFormat;
pub use page_table::PageTable;
pub(crate) use page_table::check_starts;
pub use paged::{PageLists, PagedKvCache, SequenceId};
pub(crate) use places::Places;
pub use rotating::RotatingKvCache;

use crate::integers::Integers;
use crate::tensor::AnyTensorRef;

/// The keys and values of a call: tensors, packed sequences, or pages of a pool. Calls take anything that converts into it.
///
/// | made from | keys and values of a sequence |
/// |---|---|
/// | `(k, v)` | of one batch index: `[batch, heads_kv, seq_kv, head_dim]` and `[batch, heads_kv, seq_kv, value_dim]`; the first [`key_lengths`](crate::Attention::key_lengths) of them |
/// | [`KeysValues::packed`] | neighbouring rows of one tensor |
/// | [`KeysValues::paged`] | the rows of a list of pages |
/// | `&`[`KvCache`], `&`[`RotatingKvCache`], [`PagedKvCache::view`] | the tokens of a cache |
///
/// They are read where they lie, whatever their strides. The bits of a result don't depend on which of these it is.
///
/// ```
/// use flashtile::{Attention, Workspace};
/// use ndarray::Array4;
///
/// let (q, kv) = (Array4::from_elem((1, 8, 10, 64), 0.1f32), Array4::from_elem((1, 2, 30, 64), 0.2f32));
/// let mut out = Array4::<f32>::zeros((1, 8, 10, 64));
/// Attention::new().compute(&q, (&kv, &kv), &mut out, None, &mut Workspace::new())?;
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct KeysValues<'a> {
    pub(crate) k: AnyTensorRef<'a>,
    pub(crate) v: AnyTensorRef<'a>,
    pub(crate) places: Places<'a>,
}

impl<'a, K: Into<AnyTensorRef<'a>>, V: Into<AnyTensorRef<'a>>> From<(K, V)> for KeysValues<'a> {
    fn from((k, v): (K, V)) -> Self {
        KeysValues { k: k.into(), v: v.into(), places: Places::Dense }
    }
}

impl<'a> KeysValues<'a> {
    /// Packed sequences: the keys of sequence `b` are the rows `starts[b]..starts[b + 1]`, as in FlashAttention's `varlen` calls.
    ///
    /// * `k`: `[total, heads_kv, head_dim]`, or `[1, heads_kv, total, head_dim]`
    /// * `v`: `[total, heads_kv, value_dim]`, or `[1, heads_kv, total, value_dim]`
    /// * `starts`: one more than there are sequences, ascending, at most `total`
    ///
    /// Queries are packed with [`query_starts`](crate::Attention::query_starts), whether or not keys are. The call refuses starts
    /// that don't ascend or end after the rows.
    ///
    /// ```
    /// use flashtile::{Attention, KeysValues, TensorRef};
    ///
    /// // Two prompts of 3 and 2 tokens, 4 heads of 8.
    /// let (data, starts) = (vec![0.5f32; 5 * 4 * 8], [0u32, 3, 5]);
    /// let x = TensorRef::from_slice(&data, [5, 4, 8])?;
    /// let attention = Attention::new().causal().query_starts(&starts);
    /// let mut out = vec![0.0f32; 5 * 4 * 8];
    /// let output = flashtile::TensorMut::from_slice(&mut out, [5, 4, 8])?;
    /// attention.compute(x, KeysValues::packed(x, x, &starts), output, None, &mut flashtile::Workspace::new())?;
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn packed(
        k: impl Into<AnyTensorRef<'a>>,
        v: impl Into<AnyTensorRef<'a>>,
        starts: impl Into<Integers<'a>>,
    ) -> Self {
        KeysValues { k: k.into(), v: v.into(), places: Places::Packed(starts.into()) }
    }

    /// Pages of a pool: the keys of a sequence lie in the pages that `table` lists for it.
    ///
    /// * `k`: `[pages, heads_kv, page_size, head_dim]`, any strides
    /// * `v`: `[pages, heads_kv, page_size, value_dim]`, any strides
    ///
    /// Other orders of axes are views: a pool `[pages, page_size, heads_kv, dim]` is `permuted([0, 2, 1, 3])`; keys and values in one
    /// buffer are two [`narrow`](crate::TensorRef::narrow) views of it, and so are values that are the first elements of their key
    /// (MLA).
    ///
    /// ```
    /// use flashtile::{Attention, KeysValues, PageTable, TensorMut, TensorRef, Workspace};
    ///
    /// // A pool of 6 pages of 4 keys, 2 heads of 8. Two sequences of 7 and 3 keys.
    /// let pool = vec![0.5f32; 6 * 2 * 4 * 8];
    /// let pages = TensorRef::from_slice(&pool, [6, 2, 4, 8])?;
    /// let table = PageTable::new(&[5, 0, 3, -1], 2, &[7, 3], 4)?; // sequence 0: pages 5 and 0; sequence 1: page 3
    ///
    /// let (q, mut out) = (vec![0.1f32; 2 * 4 * 8], vec![0.0f32; 2 * 4 * 8]);
    /// Attention::new().causal().compute(
    ///     TensorRef::from_slice(&q, [2, 4, 1, 8])?,
    ///     KeysValues::paged(pages, pages, table),
    ///     TensorMut::from_slice(&mut out, [2, 4, 1, 8])?,
    ///     None,
    ///     &mut Workspace::new(),
    /// )?;
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn paged(k: impl Into<AnyTensorRef<'a>>, v: impl Into<AnyTensorRef<'a>>, table: PageTable<'a>) -> Self {
        KeysValues { k: k.into(), v: v.into(), places: Places::Pages(table) }
    }
}
