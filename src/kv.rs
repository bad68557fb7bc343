//! Keys and values: how kernels read them, and caches that own them.
//!
//! A [`Run`](run::Run) is rows at one stride, in one storage format: all that kernels see. The caches are storages with a few
//! rules. They convert and store tokens, and hand out tensors, lengths and tables. They compute nothing.
//!
//! | file | |
//! |---|---|
//! | `run.rs` | rows at one stride, as kernels read them |
//! | `format.rs` | what a cache stores for each token |
//! | `storage.rs` | the memory of keys and values; tokens are checked, converted and written here |
//! | `cache.rs` | a row for each token, up to a capacity |
//! | `rotating.rs` | the first tokens, and a ring of the last ones |
//! | `paged.rs` | a pool of pages, which sequences share |

mod cache;
mod format;
mod paged;
mod rotating;
pub(crate) mod run;
mod storage;

pub use cache::KvCache;
pub use format::KvFormat;
pub use paged::{PagedKvCache, SequenceId};
pub use rotating::RotatingKvCache;
