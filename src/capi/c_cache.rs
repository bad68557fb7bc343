//! C's caches of keys and values: one handle for the three kinds.
//!
//! The functions that change a cache borrow it mutably during their call, all others share it. The caller sees to it that no call
//! changes a cache that another call uses.

use super::c_rotary::{CheckedRotation, Rotation};
use super::c_tensor::{CheckedTensor, FLOATS, Tensor, check_pointer, element_type, number_of, size};
use super::failure::{Code, Failure, guarded};
use super::handle::{self, exclusive, shared};
use crate::error::Error;
use crate::kv::{KvCache, KvFormat, PagedKvCache, RotatingKvCache, SequenceId};
use crate::rotary::{Positions, Rotary};
use crate::tensor::AnyTensorRef;
use std::collections::BTreeMap;

/// `flashtile_cache_format`: what is stored for each token. The layout is fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CacheFormat {
    /// The type that keys and values are stored in: 1 f32, 2 f16, 3 bf16.
    pub dtype: i32,
    /// Must be 0.
    pub reserved: i32,
    /// Heads of keys and values.
    pub heads_kv: i64,
    /// Elements of a key.
    pub head_dim: i64,
    /// Elements of a value.
    pub value_dim: i64,
}

/// `flashtile_cache_info`: the sizes of a cache. The layout is fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CacheInfo {
    /// What is stored for each token.
    pub format: CacheFormat,
    /// The sequences that there are.
    pub sequences: i64,
    /// The layers; 1 unless the cache is paged.
    pub layers: i64,
    /// The tokens that there is memory for: of each sequence, or in all pages.
    pub capacity: i64,
    /// The first tokens that a rotating cache keeps.
    pub first: i64,
    /// The last tokens that a rotating cache keeps.
    pub window: i64,
    /// The pages.
    pub pages: i64,
    /// The tokens of a page.
    pub page_size: i64,
    /// The pages that no sequence has.
    pub free_pages: i64,
    /// The pages that more than one sequence has.
    pub shared_pages: i64,
    /// The bytes of keys and values, in all layers.
    pub bytes: i64,
}

/// `flashtile_cache`: a cache of any kind.
#[derive(Debug)]
pub struct Cache {
    pub(super) kind: Kind,
}

/// What a cache is.
#[derive(Debug)]
pub(super) enum Kind {
    Fixed(KvCache),
    Rotating(RotatingKvCache),
    Paged(Paged),
}

/// A cache of pages, whose sequences are numbers in C.
#[derive(Debug)]
pub(super) struct Paged {
    pub(super) cache: PagedKvCache,
    /// By serial number, which no other sequence of any cache has.
    ids: BTreeMap<i64, SequenceId>,
}

// Threads may share a cache that none of them changes, and a thread may free what another one has made.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Cache>();
    is_shared::<Rotary>();
};

/// A number for C. Sizes of memory fit; a rotating cache may count more tokens than that.
pub(super) fn number(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The index of a sequence or layer.
fn index(what: &'static str, index: i64) -> Result<usize, Failure> {
    usize::try_from(index)
        .map_err(|_| Failure::new(Code::NotInCache, format!("there is no {what} {index}: they are counted from 0")))
}

impl CacheFormat {
    /// # Safety
    /// `format` is null, misaligned, or may be read.
    unsafe fn read(format: *const CacheFormat) -> Result<KvFormat, Failure> {
        check_pointer("cache format", format)?;
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        let CacheFormat { dtype, reserved, heads_kv, head_dim, value_dim } = unsafe { format.read() };
        if reserved != 0 {
            return Err(Failure::option("reserved of the cache format is not 0"));
        }
        let heads_kv = size("cache format (heads_kv)", heads_kv)?;
        let head_dim = size("cache format (head_dim)", head_dim)?;
        let value_dim = size("cache format (value_dim)", value_dim)?;
        Ok(KvFormat::new(element_type("cache format", dtype)?, heads_kv, head_dim).value_dim(value_dim))
    }

    fn of(format: KvFormat) -> Self {
        let KvFormat { dtype, heads_kv, head_dim, value_dim } = format;
        let [heads_kv, head_dim, value_dim] = [heads_kv, head_dim, value_dim].map(number);
        CacheFormat { dtype: number_of(dtype), reserved: 0, heads_kv, head_dim, value_dim }
    }
}

impl Cache {
    /// The function that made it.
    pub(super) fn maker(&self) -> &'static str {
        match self.kind {
            Kind::Fixed(_) => "flashtile_cache_new",
            Kind::Rotating(_) => "flashtile_cache_new_rotating",
            Kind::Paged(_) => "flashtile_cache_new_paged",
        }
    }

    fn wrong(&self, function: &str, instead: &str) -> Failure {
        let message = format!("flashtile_cache_{function} is not for caches of {}: {instead}", self.maker());
        Failure::new(Code::WrongCache, message)
    }

    /// The cache of pages, if it is one.
    fn paged(&self, function: &str) -> Result<&Paged, Failure> {
        match &self.kind {
            Kind::Paged(paged) => Ok(paged),
            _ => Err(self.wrong(function, "they have no pages, and their sequences are there from the start")),
        }
    }

    /// The cache of pages, if it is one.
    fn paged_mut(&mut self, function: &str) -> Result<&mut Paged, Failure> {
        self.paged(function)?;
        match &mut self.kind {
            Kind::Paged(paged) => Ok(paged),
            _ => unreachable!("checked above"),
        }
    }

    /// The memory of a layer: keys and values.
    fn memory(&self, layer: usize) -> Result<[CheckedTensor; 2], Failure> {
        let (keys, values) = match &self.kind {
            Kind::Paged(Paged { cache, .. }) => (cache.key_pages(layer)?, cache.value_pages(layer)?),
            _ if layer != 0 => return Err(Error::NotInCache { what: "layer", index: layer, count: 1 }.into()),
            Kind::Fixed(cache) => (cache.keys(), cache.values()),
            Kind::Rotating(cache) => (cache.keys(), cache.values()),
        };
        Ok([
            CheckedTensor::of_cache("keys of the cache", keys)?,
            CheckedTensor::of_cache("values of the cache", values)?,
        ])
    }

    /// The tokens of a sequence, reserved ones included.
    fn len(&self, sequence: i64) -> Result<usize, Failure> {
        Ok(match &self.kind {
            Kind::Fixed(cache) => cache.len(index("sequence", sequence)?)?,
            Kind::Rotating(cache) => cache.len(index("sequence", sequence)?)?,
            Kind::Paged(paged) => paged.cache.len(paged.id(sequence)?)?,
        })
    }

    /// The tokens of a sequence that a layer has.
    fn written(&self, layer: usize, sequence: i64) -> Result<usize, Failure> {
        match &self.kind {
            Kind::Paged(paged) => Ok(paged.cache.written(layer, paged.id(sequence)?)?),
            _ => self.memory(layer).and_then(|_| self.len(sequence)),
        }
    }

    fn truncate(&mut self, sequence: i64, len: usize) -> Result<(), Failure> {
        match &mut self.kind {
            Kind::Fixed(cache) => cache.truncate(index("sequence", sequence)?, len)?,
            Kind::Rotating(cache) => cache.truncate(index("sequence", sequence)?, len)?,
            Kind::Paged(paged) => paged.cache.truncate(paged.id(sequence)?, len)?,
        }
        Ok(())
    }

    fn fork_to(&mut self, from: i64, to: i64) -> Result<(), Failure> {
        if let Kind::Paged(_) = self.kind {
            return Err(self.wrong("fork_to", "flashtile_cache_fork makes the new sequence"));
        }
        let (from, to) = (index("sequence", from)?, index("sequence", to)?);
        match &mut self.kind {
            Kind::Fixed(cache) => cache.fork(from, to)?,
            Kind::Rotating(cache) => cache.fork(from, to)?,
            Kind::Paged(_) => unreachable!("refused above"),
        }
        Ok(())
    }

    fn clear(&mut self) {
        match &mut self.kind {
            Kind::Fixed(cache) => cache.clear(),
            Kind::Rotating(cache) => cache.clear(),
            Kind::Paged(Paged { cache, ids }) => {
                cache.clear();
                ids.clear();
            }
        }
    }

    /// Appends tokens to a sequence, or to all.
    fn append(&mut self, sequence: Option<i64>, tokens: Tokens<'_>) -> Result<(), Failure> {
        /// The two kinds without pages have functions of the same names.
        macro_rules! append_to_rows {
            ($cache:expr) => {{
                let Tokens { k, v, rotation } = tokens;
                let sequence = sequence.map(|sequence| index("sequence", sequence)).transpose()?;
                match (sequence, rotation) {
                    (None, None) => $cache.append(k, v)?,
                    (Some(n), None) => $cache.append_to(n, k, v)?,
                    (None, Some((rotary, positions))) => $cache.append_rotated(rotary, positions, k, v)?,
                    (Some(n), Some((rotary, positions))) => $cache.append_rotated_to(n, rotary, positions, k, v)?,
                }
            }};
        }
        match &mut self.kind {
            Kind::Fixed(cache) => append_to_rows!(cache),
            Kind::Rotating(cache) => append_to_rows!(cache),
            Kind::Paged(_) => return self.append_to_pages(sequence, tokens),
        }
        Ok(())
    }

    fn append_to_pages(&mut self, sequence: Option<i64>, Tokens { k, v, rotation }: Tokens<'_>) -> Result<(), Failure> {
        let Some(sequence) = sequence else {
            return Err(self.wrong("append", "flashtile_cache_append_to takes one of their sequences"));
        };
        if self.paged("append_to")?.cache.layers() != 1 {
            let instead = "with several layers, reserve tokens (flashtile_cache_reserve), and write them in each layer \
                           (flashtile_cache_write)";
            return Err(self.wrong("append_to", instead));
        }
        let paged = self.paged_mut("append_to")?;
        let id = paged.id(sequence)?;
        match rotation {
            None => paged.cache.append(id, k, v)?,
            Some((rotary, positions)) => paged.cache.append_rotated(id, rotary, positions, k, v)?,
        }
        Ok(())
    }

    fn info(&self) -> CacheInfo {
        let (format, bytes) = match &self.kind {
            Kind::Fixed(cache) => (cache.format(), cache.bytes()),
            Kind::Rotating(cache) => (cache.format(), cache.bytes()),
            Kind::Paged(Paged { cache, .. }) => (cache.format(), cache.bytes()),
        };
        let plain = CacheInfo {
            format: CacheFormat::of(format),
            sequences: 0,
            layers: 1,
            capacity: 0,
            first: 0,
            window: 0,
            pages: 0,
            page_size: 0,
            free_pages: 0,
            shared_pages: 0,
            bytes: number(bytes),
        };
        match &self.kind {
            Kind::Fixed(cache) => {
                CacheInfo { sequences: number(cache.batch()), capacity: number(cache.capacity()), ..plain }
            }
            Kind::Rotating(cache) => CacheInfo {
                sequences: number(cache.batch()),
                capacity: number(cache.first() + cache.window()),
                first: number(cache.first()),
                window: number(cache.window()),
                ..plain
            },
            Kind::Paged(Paged { cache, ids }) => CacheInfo {
                sequences: number(ids.len()),
                layers: number(cache.layers()),
                capacity: number(cache.pages() * cache.page_size()),
                pages: number(cache.pages()),
                page_size: number(cache.page_size()),
                free_pages: number(cache.free_pages()),
                shared_pages: number(cache.shared_pages()),
                ..plain
            },
        }
    }
}

impl Paged {
    /// The sequence with this number.
    pub(super) fn id(&self, sequence: i64) -> Result<SequenceId, Failure> {
        self.ids.get(&sequence).copied().ok_or_else(|| {
            let message = format!(
                "the cache has no sequence {sequence}: it was removed or is of another cache; \
                 flashtile_cache_new_sequence and flashtile_cache_fork make sequences"
            );
            Failure::new(Code::NotInCache, message)
        })
    }

    /// The number of a new sequence.
    fn add(&mut self, id: SequenceId) -> i64 {
        let sequence = i64::try_from(id.serial()).unwrap_or(i64::MAX); // counted up from 0
        self.ids.insert(sequence, id);
        sequence
    }
}

/// Keys and values to append.
struct Tokens<'a> {
    k: AnyTensorRef<'a>,
    v: AnyTensorRef<'a>,
    rotation: Option<(&'a Rotary, Option<Positions<'a>>)>,
}

impl<'a> Tokens<'a> {
    /// Reads the tokens, and refuses those that share memory with `memory`, to which they are written.
    ///
    /// # Safety
    /// The tensors are as `flashtile_attention` requires; `rotation` is null or as [`CheckedRotation::new`] requires; all of it for
    /// `'a`.
    unsafe fn new(
        memory: [CheckedTensor; 2],
        k: *const Tensor,
        v: *const Tensor,
        rotation: *const Rotation,
    ) -> Result<Self, Failure> {
        // SAFETY: the caller's promise, here and below.
        let (k, v) =
            unsafe { (CheckedTensor::new("keys", k, FLOATS, 4..=4)?, CheckedTensor::new("values", v, FLOATS, 4..=4)?) };
        for written in &memory {
            written.check_disjoint(&k)?;
            written.check_disjoint(&v)?;
        }
        // SAFETY: as above.
        let rotation = unsafe { (!rotation.is_null()).then(|| CheckedRotation::new(rotation)).transpose()? };
        let rotation = match rotation {
            Some(rotation) => Some((rotation.rotary, rotation.positions(&k)?)),
            None => None,
        };
        // SAFETY: as above; nothing writes to them, as they are disjoint from the cache (checked).
        Ok(unsafe { Tokens { k: k.any()?.into(), v: v.any()?.into(), rotation } })
    }
}

/// A cache with a row for each token: `flashtile_cache_new` of the header.
///
/// # Safety
/// `format` is null or readable, `cache` is null or leads to a pointer that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_new(
    format: *const CacheFormat,
    batch: i64,
    capacity: i64,
    cache: *mut *mut Cache,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise.
        let format = unsafe { CacheFormat::read(format)? };
        let (batch, capacity) = (size("cache (batch)", batch)?, size("cache (capacity)", capacity)?);
        Ok(Cache { kind: Kind::Fixed(KvCache::new(format, batch, capacity)?) })
    };
    // SAFETY: the caller's promise.
    unsafe { handle::make("cache", cache, make) }
}

/// A cache of the first and the last tokens: `flashtile_cache_new_rotating` of the header.
///
/// # Safety
/// As [`flashtile_cache_new`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_new_rotating(
    format: *const CacheFormat,
    batch: i64,
    first: i64,
    window: i64,
    cache: *mut *mut Cache,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise.
        let format = unsafe { CacheFormat::read(format)? };
        let batch = size("cache (batch)", batch)?;
        let (first, window) = (size("cache (first)", first)?, size("cache (window)", window)?);
        Ok(Cache { kind: Kind::Rotating(RotatingKvCache::new(format, batch, first, window)?) })
    };
    // SAFETY: the caller's promise.
    unsafe { handle::make("cache", cache, make) }
}

/// A cache of pages: `flashtile_cache_new_paged` of the header.
///
/// # Safety
/// As [`flashtile_cache_new`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_new_paged(
    format: *const CacheFormat,
    layers: i64,
    pages: i64,
    page_size: i64,
    cache: *mut *mut Cache,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise.
        let format = unsafe { CacheFormat::read(format)? };
        let layers = size("cache (layers)", layers)?;
        let (pages, page_size) = (size("cache (pages)", pages)?, size("cache (page_size)", page_size)?);
        let cache = PagedKvCache::new(format, layers, pages, page_size)?;
        Ok(Cache { kind: Kind::Paged(Paged { cache, ids: BTreeMap::new() }) })
    };
    // SAFETY: the caller's promise.
    unsafe { handle::make("cache", cache, make) }
}

/// Frees a cache: `flashtile_cache_free` of the header.
///
/// # Safety
/// `cache` is null, or was made by this library and is not used by any call, now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_free(cache: *mut Cache) {
    // SAFETY: the caller's promise.
    unsafe { handle::free(cache) };
}

/// Adds tokens to every sequence: `flashtile_cache_append` of the header.
///
/// # Safety
/// * `cache` is null, or was made by this library, is not freed, and is not used by another call
/// * the tensors are as `flashtile_attention` requires, and `rotation` is null or a rotation
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_append(
    cache: *mut Cache,
    k: *const Tensor,
    v: *const Tensor,
    rotation: *const Rotation,
) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise, here and below.
        let cache = unsafe { exclusive("cache", cache)? };
        // SAFETY: as above.
        cache.append(None, unsafe { Tokens::new(cache.memory(0)?, k, v, rotation)? })
    })
}

/// Adds tokens to one sequence: `flashtile_cache_append_to` of the header.
///
/// # Safety
/// As [`flashtile_cache_append`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_append_to(
    cache: *mut Cache,
    sequence: i64,
    k: *const Tensor,
    v: *const Tensor,
    rotation: *const Rotation,
) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise, here and below.
        let cache = unsafe { exclusive("cache", cache)? };
        // SAFETY: as above.
        cache.append(Some(sequence), unsafe { Tokens::new(cache.memory(0)?, k, v, rotation)? })
    })
}

/// Makes a sequence of a paged cache longer: `flashtile_cache_reserve` of the header.
///
/// # Safety
/// `cache` is null, or was made by this library, is not freed, and is not used by another call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_reserve(cache: *mut Cache, sequence: i64, tokens: i64) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        let paged = unsafe { exclusive("cache", cache)? }.paged_mut("reserve")?;
        Ok(paged.cache.reserve(paged.id(sequence)?, size("reservation", tokens)?)?)
    })
}

/// Writes tokens of one layer of a paged cache: `flashtile_cache_write` of the header.
///
/// # Safety
/// As [`flashtile_cache_append`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_write(
    cache: *mut Cache,
    layer: i64,
    sequence: i64,
    k: *const Tensor,
    v: *const Tensor,
    rotation: *const Rotation,
) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise, here and below.
        let cache = unsafe { exclusive("cache", cache)? };
        let layer = index("layer", layer)?;
        let id = cache.paged("write")?.id(sequence)?;
        // SAFETY: as above.
        let Tokens { k, v, rotation } = unsafe { Tokens::new(cache.memory(layer)?, k, v, rotation)? };
        let Paged { cache, .. } = cache.paged_mut("write")?;
        match rotation {
            None => cache.write(layer, id, k, v)?,
            Some((rotary, positions)) => cache.write_rotated(layer, id, rotary, positions, k, v)?,
        }
        Ok(())
    })
}

/// A sequence of a paged cache: `flashtile_cache_new_sequence` of the header.
///
/// # Safety
/// As [`flashtile_cache_reserve`]; `sequence` is null or is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_new_sequence(cache: *mut Cache, sequence: *mut i64) -> i32 {
    guarded(|| {
        check_pointer("sequence", sequence)?;
        // SAFETY: the caller's promise.
        let paged = unsafe { exclusive("cache", cache)? }.paged_mut("new_sequence")?;
        let id = paged.cache.new_sequence();
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { sequence.write(paged.add(id)) };
        Ok(())
    })
}

/// A sequence that shares the pages of another one: `flashtile_cache_fork` of the header.
///
/// # Safety
/// As [`flashtile_cache_new_sequence`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_fork(cache: *mut Cache, from: i64, sequence: *mut i64) -> i32 {
    guarded(|| {
        check_pointer("sequence", sequence)?;
        // SAFETY: the caller's promise.
        let cache = unsafe { exclusive("cache", cache)? };
        let paged = match cache.kind {
            Kind::Paged(_) => cache.paged_mut("fork")?,
            _ => return Err(cache.wrong("fork", "flashtile_cache_fork_to copies one of their sequences to another")),
        };
        let id = paged.cache.fork(paged.id(from)?)?;
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { sequence.write(paged.add(id)) };
        Ok(())
    })
}

/// Copies a sequence to another: `flashtile_cache_fork_to` of the header.
///
/// # Safety
/// As [`flashtile_cache_reserve`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_fork_to(cache: *mut Cache, from: i64, to: i64) -> i32 {
    // SAFETY: the caller's promise.
    guarded(|| unsafe { exclusive("cache", cache)? }.fork_to(from, to))
}

/// Forgets the last tokens of a sequence: `flashtile_cache_truncate` of the header.
///
/// # Safety
/// As [`flashtile_cache_reserve`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_truncate(cache: *mut Cache, sequence: i64, length: i64) -> i32 {
    // SAFETY: the caller's promise.
    guarded(|| unsafe { exclusive("cache", cache)? }.truncate(sequence, size("sequence (length)", length)?))
}

/// Forgets a sequence of a paged cache: `flashtile_cache_remove` of the header.
///
/// # Safety
/// As [`flashtile_cache_reserve`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_remove(cache: *mut Cache, sequence: i64) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        let paged = unsafe { exclusive("cache", cache)? }.paged_mut("remove")?;
        paged.cache.remove(paged.id(sequence)?)?;
        paged.ids.remove(&sequence);
        Ok(())
    })
}

/// Forgets all tokens: `flashtile_cache_clear` of the header.
///
/// # Safety
/// As [`flashtile_cache_reserve`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_clear(cache: *mut Cache) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise.
        unsafe { exclusive("cache", cache)? }.clear();
        Ok(())
    })
}

/// The tokens of a sequence: `flashtile_cache_length` of the header.
///
/// # Safety
/// * `cache` is null, or was made by this library and is neither freed nor changed meanwhile
/// * `length` is null or is written
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_length(cache: *const Cache, sequence: i64, length: *mut i64) -> i32 {
    guarded(|| {
        check_pointer("length", length)?;
        // SAFETY: the caller's promise.
        let len = unsafe { shared("cache", cache)? }.len(sequence)?;
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { length.write(number(len)) };
        Ok(())
    })
}

/// The tokens of a sequence that a layer has: `flashtile_cache_written` of the header.
///
/// # Safety
/// As [`flashtile_cache_length`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_written(
    cache: *const Cache,
    layer: i64,
    sequence: i64,
    length: *mut i64,
) -> i32 {
    guarded(|| {
        check_pointer("length", length)?;
        // SAFETY: the caller's promise.
        let len = unsafe { shared("cache", cache)? }.written(index("layer", layer)?, sequence)?;
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { length.write(number(len)) };
        Ok(())
    })
}

/// The pages of a sequence: `flashtile_cache_pages` of the header.
///
/// # Safety
/// As [`flashtile_cache_length`]; `pages` is null or leads to `capacity` numbers, which are written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_pages(
    cache: *const Cache,
    sequence: i64,
    pages: *mut i64,
    capacity: i64,
    count: *mut i64,
) -> i32 {
    guarded(|| {
        check_pointer("number of pages", count)?;
        let capacity = size("list of pages", capacity)?;
        if capacity > 0 {
            check_pointer("list of pages", pages)?;
        }
        // SAFETY: the caller's promise.
        let paged = unsafe { shared("cache", cache)? }.paged("pages")?;
        let table = paged.cache.table(paged.id(sequence)?)?;
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { count.write(number(table.len())) };
        for (n, &page) in table.iter().take(capacity).enumerate() {
            // SAFETY: as above; `n` is below the capacity.
            unsafe { pages.add(n).write(page.into()) };
        }
        Ok(())
    })
}

/// The memory of a layer: `flashtile_cache_memory` of the header.
///
/// # Safety
/// As [`flashtile_cache_length`]; `k` and `v` are null or are written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_memory(
    cache: *const Cache,
    layer: i64,
    k: *mut Tensor,
    v: *mut Tensor,
) -> i32 {
    guarded(|| {
        check_pointer("keys", k)?;
        check_pointer("values", v)?;
        // SAFETY: the caller's promise.
        let [keys, values] = unsafe { shared("cache", cache)? }.memory(index("layer", layer)?)?;
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe {
            k.write(keys.described());
            v.write(values.described());
        }
        Ok(())
    })
}

/// The sizes of a cache: `flashtile_cache_get_info` of the header.
///
/// # Safety
/// As [`flashtile_cache_length`]; `info` is null or is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_cache_get_info(cache: *const Cache, info: *mut CacheInfo) -> i32 {
    guarded(|| {
        check_pointer("information", info)?;
        // SAFETY: the caller's promise.
        let of_cache = unsafe { shared("cache", cache)? }.info();
        // SAFETY: neither null nor misaligned; the rest is the caller's promise.
        unsafe { info.write(of_cache) };
        Ok(())
    })
}
