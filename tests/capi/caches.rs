//! Caches through C: the same tokens, bits and errors as in Rust, whatever is done to them; attention over a cache has Rust's bits. A
//! refused call changes nothing.

use super::support::Rng;
use super::support::counting::Counting;
use super::{BF16, COUNTING, F16, F32, bits, last_error, mask_of, random, tensor, tensor_mut};
use flashtile::capi::*;
use flashtile::{
    AnyTensorRef, Attention, DType, Element, Error, KeysValues, KvCache, KvFormat, PageLists, PagedKvCache, Positions,
    Rotary, RotatingKvCache, SequenceId, TensorMut, TensorRef, Workspace, bf16, f16,
};
use std::collections::BTreeSet;
use std::ptr::{null, null_mut};

const HEADS: usize = 4;
const HEADS_KV: usize = 2;
const DIM: usize = 8;
const VALUE_DIM: usize = 5;
const TYPES: [(DType, i32); 3] = [(DType::F32, F32), (DType::F16, F16), (DType::Bf16, BF16)];

/// A cache of C, freed at the end.
struct Handle(*mut Cache);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by the library, and no longer used.
        unsafe { flashtile_cache_free(self.0) };
    }
}

// SAFETY: threads read a cache at once, as the header allows.
unsafe impl Sync for Handle {}

type New = unsafe extern "C" fn(*const CacheFormat, i64, i64, i64, *mut *mut Cache) -> i32;

impl Handle {
    fn fixed(format: CacheFormat, batch: i64, capacity: i64) -> Self {
        let mut cache = null_mut();
        // SAFETY: all of these are what they say, here and below.
        assert_eq!(unsafe { flashtile_cache_new(&format, batch, capacity, &mut cache) }, 0, "{}", last_error());
        Handle(cache)
    }

    fn new(new: New, format: CacheFormat, [a, b, c]: [i64; 3]) -> Self {
        let mut cache = null_mut();
        // SAFETY: as above.
        assert_eq!(unsafe { new(&format, a, b, c, &mut cache) }, 0, "{}", last_error());
        Handle(cache)
    }

    fn rotating(format: CacheFormat, batch: i64, first: i64, window: i64) -> Self {
        Self::new(flashtile_cache_new_rotating, format, [batch, first, window])
    }

    fn paged(format: CacheFormat, layers: i64, pages: i64, page_size: i64) -> Self {
        Self::new(flashtile_cache_new_paged, format, [layers, pages, page_size])
    }

    fn len(&self, sequence: i64) -> Result<i64, i32> {
        let mut length = -7;
        // SAFETY: as above.
        match unsafe { flashtile_cache_length(self.0, sequence, &mut length) } {
            0 => Ok(length),
            code => {
                assert_eq!(length, -7);
                Err(code)
            }
        }
    }

    fn written(&self, layer: i64, sequence: i64) -> i64 {
        let mut length = -7;
        // SAFETY: as above.
        assert_eq!(unsafe { flashtile_cache_written(self.0, layer, sequence, &mut length) }, 0, "{}", last_error());
        length
    }

    fn new_sequence(&self) -> i64 {
        let mut sequence = -7;
        // SAFETY: as above.
        assert_eq!(unsafe { flashtile_cache_new_sequence(self.0, &mut sequence) }, 0, "{}", last_error());
        sequence
    }

    fn pages(&self, sequence: i64) -> Vec<i64> {
        let mut count = -7;
        // SAFETY: as above. The second call has room for one page less, if there is one.
        unsafe {
            assert_eq!(flashtile_cache_pages(self.0, sequence, null_mut(), 0, &mut count), 0, "{}", last_error());
            let mut pages = vec![-7; count as usize];
            let fewer = (count - 1).max(0);
            assert_eq!(flashtile_cache_pages(self.0, sequence, pages.as_mut_ptr(), fewer, &mut count), 0);
            assert!(pages.last().is_none_or(|&page| page == -7));
            assert_eq!(flashtile_cache_pages(self.0, sequence, pages.as_mut_ptr(), count, &mut count), 0);
            pages
        }
    }

    fn memory(&self, layer: i64) -> [Tensor; 2] {
        let mut memory = [tensor::<f32>(&[], 0, &[]); 2];
        let [k, v] = &mut memory;
        // SAFETY: as above.
        assert_eq!(unsafe { flashtile_cache_memory(self.0, layer, k, v) }, 0, "{}", last_error());
        memory
    }

    fn info(&self) -> CacheInfo {
        let format = CacheFormat { dtype: 0, reserved: 9, heads_kv: 0, head_dim: 0, value_dim: 0 };
        let mut info = CacheInfo {
            format,
            sequences: -7,
            layers: -7,
            capacity: -7,
            first: -7,
            window: -7,
            pages: -7,
            page_size: -7,
            free_pages: -7,
            shared_pages: -7,
            bytes: -7,
        };
        // SAFETY: as above.
        assert_eq!(unsafe { flashtile_cache_get_info(self.0, &mut info) }, 0, "{}", last_error());
        info
    }
}

/// The same format for both.
fn format(n: usize) -> (KvFormat, CacheFormat) {
    let (dtype, number) = TYPES[n % 3];
    let c = CacheFormat {
        dtype: number,
        reserved: 0,
        heads_kv: HEADS_KV as i64,
        head_dim: DIM as i64,
        value_dim: VALUE_DIM as i64,
    };
    (KvFormat::new(dtype, HEADS_KV, DIM).value_dim(VALUE_DIM), c)
}

/// Keys and values, `[batch, heads_kv, tokens, dim]`, stored `[batch, tokens, heads_kv, dim]`.
struct Tokens {
    k: Vec<f32>,
    v: Vec<bf16>,
    batch: usize,
    count: usize,
}

impl Tokens {
    fn new(rng: &mut Rng, batch: usize, count: usize) -> Self {
        let mut numbers = |dim: usize| (0..batch * count * HEADS_KV * dim).map(|_| rng.uniform()).collect::<Vec<_>>();
        let (k, v) = (numbers(DIM), numbers(VALUE_DIM));
        Tokens { k, v: v.into_iter().map(bf16::from_f32).collect(), batch, count }
    }

    fn strides(&self, dim: usize) -> [usize; 4] {
        [self.count * HEADS_KV * dim, dim, HEADS_KV * dim, 1]
    }

    fn rust(&self) -> [AnyTensorRef<'_>; 2] {
        let strides = |dim| self.strides(dim).map(|stride| stride as isize);
        let shape = |dim| [self.batch, HEADS_KV, self.count, dim];
        [
            TensorRef::with_strides(&self.k, 0, shape(DIM), strides(DIM)).unwrap().into(),
            TensorRef::with_strides(&self.v, 0, shape(VALUE_DIM), strides(VALUE_DIM)).unwrap().into(),
        ]
    }

    fn c(&self) -> [Tensor; 2] {
        let strides = |dim| self.strides(dim).map(|stride| stride as i64);
        let shape = |dim| [self.batch, HEADS_KV, self.count, dim].map(|n| n as i64);
        [
            Tensor { strides: strides(DIM), ..tensor(&self.k, F32, &shape(DIM)) },
            Tensor { strides: strides(VALUE_DIM), ..tensor(&self.v, BF16, &shape(VALUE_DIM)) },
        ]
    }
}

/// A rotary table for both: 6 of 8 elements, 40 positions.
struct Tables {
    rust: Rotary,
    c: *mut Rotary,
}

impl Tables {
    fn new() -> Self {
        let mut c = null_mut();
        // SAFETY: as above.
        assert_eq!(unsafe { flashtile_rotary_new(6, 10.0, 40, 1, &mut c) }, 0, "{}", last_error());
        Tables { rust: Rotary::new(6, 10.0, 40).unwrap().interleaved(), c }
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        // SAFETY: made by the library, and no longer used.
        unsafe { flashtile_rotary_free(self.c) };
    }
}

/// How tokens are rotated: not at all, or at positions, of which there may be none.
#[derive(Debug)]
struct At(Option<Vec<i64>>);

impl At {
    /// Sometimes with positions too many or outside the table.
    fn random(rng: &mut Rng, batch: usize, count: usize) -> Self {
        let entries = match rng.below(8) {
            0 | 1 => return At(None),
            2 => 0,
            3 => 1,
            4 => batch,
            5 => batch * count + 7,
            _ => batch * count,
        };
        let low = i64::from(rng.one_in(8));
        At(Some((0..entries).map(|_| rng.below(41) as i64 - low).collect()))
    }

    /// What C is told, and Rust: `None` if Rust has no such call.
    fn both<'a>(&'a self, tables: &'a Tables, batch: usize, count: usize) -> (Option<Rotation>, Option<Rust<'a>>) {
        let Some(list) = &self.0 else { return (None, Some(None)) };
        let plain = Rotation::new(tables.c);
        let c = match list.len() {
            0 => plain,
            len => Rotation { positions: list.as_ptr(), position_count: len as i64, ..plain },
        };
        let positions = match list.len() {
            0 => Some(None),
            len if len == batch => Some(Some(Positions::per_batch(list))),
            len if len == batch * count => Some(Some(Positions::each(list))),
            1 if list[0] >= 0 => Some(Some(Positions::Start(list[0] as usize))),
            _ => None,
        };
        (Some(c), positions.map(|positions| Some((&tables.rust, positions))))
    }
}

/// A table, and positions if they are given; `None` without a rotation.
type Rust<'a> = Option<(&'a Rotary, Option<Positions<'a>>)>;

fn code_of(error: &Error) -> Code {
    match error {
        Error::NotInCache { .. } | Error::RemovedSequence => Code::NotInCache,
        Error::CacheFull { .. } | Error::PagesExhausted { .. } => Code::CacheFull,
        Error::NotReserved { .. } => Code::NotReserved,
        Error::NotWritten { .. } => Code::NotWritten,
        Error::CannotTruncate { .. } => Code::CannotTruncate,
        Error::LostKeys { .. } => Code::LostKeys,
        Error::PositionOutOfRange { .. } => Code::PositionOutOfRange,
        Error::ShapeMismatch { .. } => Code::ShapeMismatch,
        Error::WrongCount { .. } => Code::WrongCount,
        other => panic!("{other:?}"),
    }
}

/// The codes that were seen, so that no test can pass without them.
#[derive(Default)]
struct Seen(BTreeSet<i32>);

impl Seen {
    /// Both are right, or wrong for the same reason.
    fn same(&mut self, code: i32, rust: Result<(), Error>, what: &str) {
        let expected = rust.as_ref().map_or_else(|error| code_of(error) as i32, |()| 0);
        assert_eq!(code, expected, "{what}: {rust:?}, {}", last_error());
        match rust {
            // (In C, sequences that were removed have numbers.)
            Err(error) if error != Error::RemovedSequence => assert_eq!(last_error(), error.to_string(), "{what}"),
            _ => {}
        }
        self.0.insert(code);
    }

    fn assert_all(&self, codes: &[Code]) {
        let expected: BTreeSet<i32> = codes.iter().map(|&code| code as i32).collect();
        assert_eq!(self.0, expected);
    }
}

/// All memory of C's cache is that of Rust's, bit for bit.
fn check_memory([k, v]: [Tensor; 2], keys: AnyTensorRef<'_>, values: AnyTensorRef<'_>, what: &str) {
    fn check<T: Element>(c: &Tensor, rust: TensorRef<'_, T>, what: &str) {
        assert_eq!(c.shape.map(|n| n as usize), rust.shape(), "{what}");
        let [outer, heads, rows, dim] = rust.shape();
        let index = |n: usize| [n / (heads * rows * dim), n / (rows * dim) % heads, n / dim % rows, n % dim];
        for n in 0..outer * heads * rows * dim {
            let at: i64 = index(n).iter().zip(c.strides).map(|(&i, stride)| i as i64 * stride).sum();
            // SAFETY: within the shape, of a cache that is not changed meanwhile.
            let got = unsafe { c.data.cast::<T>().add(at as usize).read() };
            let expected = rust.get(index(n)).unwrap();
            assert_eq!(got.to_f32().to_bits(), expected.to_f32().to_bits(), "{what}, {:?}", index(n));
        }
    }
    for (c, rust) in [(k, keys), (v, values)] {
        match rust.dtype() {
            DType::F32 => check::<f32>(&c, rust.typed().unwrap(), what),
            DType::F16 => check::<f16>(&c, rust.typed().unwrap(), what),
            _ => check::<bf16>(&c, rust.typed().unwrap(), what),
        }
        assert_eq!((c.rank, c.dtype), (4, TYPES.iter().find(|(dtype, _)| *dtype == rust.dtype()).unwrap().1));
    }
}

/// What caches with a fixed batch have in common.
trait Batch {
    fn append(&mut self, to: Option<usize>, rotation: Rust<'_>, tokens: &Tokens) -> Result<(), Error>;
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), Error>;
    fn fork(&mut self, from: usize, to: usize) -> Result<(), Error>;
    fn clear(&mut self);
    fn state(&self) -> (Vec<usize>, usize, [AnyTensorRef<'_>; 2]);
}

macro_rules! batch {
    ($cache:ty) => {
        impl Batch for $cache {
            fn append(&mut self, to: Option<usize>, rotation: Rust<'_>, tokens: &Tokens) -> Result<(), Error> {
                let [k, v] = tokens.rust();
                match (to, rotation) {
                    (None, None) => self.append(k, v),
                    (None, Some((rotary, positions))) => self.append_rotated(rotary, positions, k, v),
                    (Some(to), None) => self.append_to(to, k, v),
                    (Some(to), Some((rotary, positions))) => self.append_rotated_to(to, rotary, positions, k, v),
                }
            }
            fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), Error> {
                self.truncate(sequence, len)
            }
            fn fork(&mut self, from: usize, to: usize) -> Result<(), Error> {
                self.fork(from, to)
            }
            fn clear(&mut self) {
                self.clear();
            }
            fn state(&self) -> (Vec<usize>, usize, [AnyTensorRef<'_>; 2]) {
                (self.lengths().to_vec(), self.bytes(), [self.keys(), self.values()])
            }
        }
    };
}
batch!(KvCache);
batch!(RotatingKvCache);

/// Random operations, right and wrong, on both caches.
fn do_anything(rng: &mut Rng, rust: &mut impl Batch, c: &Handle, tables: &Tables, seen: &mut Seen, what: &str) {
    for step in 0..30 {
        let what = format!("{what}, step {step}");
        let (n, batch) = (rng.below(4), rust.state().0.len());
        // SAFETY: all of these are what they say.
        unsafe {
            match rng.below(12) {
                0..=6 => {
                    let to = rng.one_in(2).then_some(n);
                    let count = rng.below(4);
                    let rows = if to.is_some() { 1 } else { batch } + usize::from(rng.one_in(12));
                    let (tokens, at) = (Tokens::new(rng, rows, count), At::random(rng, rows, count));
                    let ([k, v], (rotation, in_rust)) = (tokens.c(), at.both(tables, rows, count));
                    let rotation = rotation.as_ref().map_or(null(), |rotation| rotation);
                    let code = match to {
                        None => flashtile_cache_append(c.0, &k, &v, rotation),
                        Some(to) => flashtile_cache_append_to(c.0, to as i64, &k, &v, rotation),
                    };
                    match in_rust {
                        Some(in_rust) => seen.same(code, rust.append(to, in_rust, &tokens), &what),
                        // Rust has no words for these.
                        None => {
                            let wrong = [Code::WrongCount as i32, Code::PositionOutOfRange as i32];
                            assert!(wrong.contains(&code), "{what}: {code}, {at:?}");
                        }
                    }
                }
                7 | 8 => {
                    let len = rng.below(rust.state().0.get(n).unwrap_or(&0) + 2);
                    seen.same(flashtile_cache_truncate(c.0, n as i64, len as i64), rust.truncate(n, len), &what);
                }
                9 | 10 => {
                    let to = rng.below(4);
                    seen.same(flashtile_cache_fork_to(c.0, n as i64, to as i64), rust.fork(n, to), &what);
                }
                _ => {
                    assert_eq!(flashtile_cache_clear(c.0), 0);
                    rust.clear();
                }
            }
        }
        let (lengths, bytes, [keys, values]) = rust.state();
        for (sequence, &len) in lengths.iter().enumerate() {
            assert_eq!(c.len(sequence as i64), Ok(len as i64), "{what}");
            assert_eq!(c.written(0, sequence as i64), len as i64, "{what}");
        }
        assert_eq!((c.info().sequences, c.info().bytes), (lengths.len() as i64, bytes as i64));
        check_memory(c.memory(0), keys, values, &what);
    }
}

/// What random operations meet in every kind of cache.
const BOTH: [Code; 5] =
    [Code::Ok, Code::ShapeMismatch, Code::PositionOutOfRange, Code::NotInCache, Code::CannotTruncate];

#[test]
fn a_cache_is_that_of_rust_whatever_is_done_to_it() {
    let (tables, mut seen, mut seen_rotating) = (Tables::new(), Seen::default(), Seen::default());
    for seed in 0..60 {
        let rng = &mut Rng(seed);
        let (rust, c) = format(seed as usize);
        let what = format!("seed {seed}");
        let mut cache = KvCache::new(rust, 3, 9).unwrap();
        do_anything(rng, &mut cache, &Handle::fixed(c, 3, 9), &tables, &mut seen, &what);
        let (first, window) = (rng.below(3), 1 + rng.below(5));
        let mut cache = RotatingKvCache::new(rust, 3, first, window).unwrap();
        let handle = Handle::rotating(c, 3, first as i64, window as i64);
        let plain = handle.info();
        assert_eq!((plain.first, plain.window), (first as i64, window as i64));
        assert_eq!((plain.capacity, plain.format), ((first + window) as i64, c));
        do_anything(rng, &mut cache, &handle, &tables, &mut seen_rotating, &what);
    }
    seen_rotating.assert_all(&BOTH);
    seen.assert_all(&[&BOTH[..], &[Code::CacheFull]].concat());
}

#[test]
fn a_paged_cache_is_that_of_rust_whatever_is_done_to_it() {
    let (tables, mut seen) = (Tables::new(), Seen::default());
    for seed in 0..120 {
        let rng = &mut Rng(seed);
        let (rust, c) = format(seed as usize);
        let (layers, pages, page_size) = (1 + rng.below(2), rng.below(12), 1 + rng.below(4));
        let mut cache = PagedKvCache::new(rust, layers, pages, page_size).unwrap();
        let handle = Handle::paged(c, layers as i64, pages as i64, page_size as i64);
        // The sequences of both; some were removed.
        let mut sequences: Vec<(SequenceId, i64)> = Vec::new();
        for step in 0..40 {
            let what = format!("seed {seed}, step {step}");
            let make = |cache: &mut PagedKvCache| (cache.new_sequence(), handle.new_sequence());
            let Some(&(id, sequence)) = sequences.get(rng.below(sequences.len().max(1))) else {
                sequences.push(make(&mut cache));
                continue;
            };
            // SAFETY: all of these are what they say.
            unsafe {
                match rng.below(14) {
                    0 => sequences.push(make(&mut cache)),
                    1..=3 => {
                        let tokens = rng.below(6);
                        let code = flashtile_cache_reserve(handle.0, sequence, tokens as i64);
                        seen.same(code, cache.reserve(id, tokens), &what);
                    }
                    choice @ 4..=8 => {
                        let (layer, count) = (rng.below(layers + 1), rng.below(4));
                        let rows = 1 + usize::from(rng.one_in(12));
                        let (tokens, at) = (Tokens::new(rng, rows, count), At::random(rng, rows, count));
                        let ([k, v], (rotation, in_rust)) = (tokens.c(), at.both(&tables, rows, count));
                        let rotation = rotation.as_ref().map_or(null(), |rotation| rotation);
                        let Some(in_rust) = in_rust else { continue };
                        let [rk, rv] = tokens.rust();
                        if choice < 8 {
                            let code = flashtile_cache_write(handle.0, layer as i64, sequence, &k, &v, rotation);
                            let result = match in_rust {
                                None => cache.write(layer, id, rk, rv),
                                Some((rotary, positions)) => cache.write_rotated(layer, id, rotary, positions, rk, rv),
                            };
                            // (C asks for the sequence first.)
                            if cache.len(id).is_ok() {
                                seen.same(code, result, &what);
                            } else {
                                assert_eq!(code, Code::NotInCache as i32);
                            }
                            continue;
                        }
                        let code = flashtile_cache_append_to(handle.0, sequence, &k, &v, rotation);
                        if layers > 1 {
                            assert_eq!(code, Code::WrongCache as i32, "{what}");
                            assert!(last_error().contains("flashtile_cache_reserve"), "{}", last_error());
                            continue;
                        }
                        let result = match in_rust {
                            None => cache.append(id, rk, rv),
                            Some((rotary, positions)) => cache.append_rotated(id, rotary, positions, rk, rv),
                        };
                        seen.same(code, result, &what);
                    }
                    9 | 10 => {
                        let mut fork = -7;
                        let code = flashtile_cache_fork(handle.0, sequence, &mut fork);
                        let result = cache.fork(id);
                        assert_eq!(fork == -7, result.is_err());
                        if let Ok(id) = result {
                            sequences.push((id, fork));
                        }
                        seen.same(code, result.map(drop), &what);
                    }
                    11 | 12 => {
                        let len = rng.below(cache.len(id).unwrap_or(0) + 2);
                        let code = flashtile_cache_truncate(handle.0, sequence, len as i64);
                        seen.same(code, cache.truncate(id, len), &what);
                    }
                    _ if rng.one_in(3) => {
                        assert_eq!(flashtile_cache_clear(handle.0), 0);
                        cache.clear();
                    }
                    _ => seen.same(flashtile_cache_remove(handle.0, sequence), cache.remove(id), &what),
                }
            }
            for &(id, sequence) in &sequences {
                let len = cache.len(id).map(|len| len as i64);
                assert_eq!(handle.len(sequence), len.map_err(|error| code_of(&error) as i32), "{what}");
                if let Ok(table) = cache.table(id) {
                    let table: Vec<i64> = table.iter().map(|&page| page.into()).collect();
                    assert_eq!(handle.pages(sequence), table, "{what}");
                    for layer in 0..layers {
                        let written = cache.written(layer, id).unwrap() as i64;
                        assert_eq!(handle.written(layer as i64, sequence), written, "{what}");
                    }
                }
            }
            for layer in 0..layers {
                let (keys, values) = (cache.key_pages(layer).unwrap(), cache.value_pages(layer).unwrap());
                check_memory(handle.memory(layer as i64), keys, values, &what);
            }
            let alive = sequences.iter().filter(|(id, _)| cache.len(*id).is_ok()).count();
            let [free, shared, bytes] = [cache.free_pages(), cache.shared_pages(), cache.bytes()].map(|n| n as i64);
            let expected = CacheInfo {
                format: c,
                sequences: alive as i64,
                layers: layers as i64,
                capacity: (pages * page_size) as i64,
                first: 0,
                window: 0,
                pages: pages as i64,
                page_size: page_size as i64,
                free_pages: free,
                shared_pages: shared,
                bytes,
            };
            assert_eq!(handle.info(), expected, "{what}");
        }
    }
    let codes = [Code::CacheFull, Code::NotReserved, Code::NotWritten];
    seen.assert_all(&[&BOTH[..], &codes].concat());
}

/// Queries of a call: `[batch, heads, count, dim]`, or packed tokens `[total, heads, dim]`.
struct Queries {
    q: Vec<f32>,
    /// Of rank 3 or 4.
    shape: Vec<usize>,
}

/// Output, lse and key sums.
type Results = Result<[Vec<u32>; 3], i32>;

impl Queries {
    fn new(shape: &[usize]) -> Self {
        Queries { q: random(shape.iter().product()), shape: shape.to_vec() }
    }

    fn lse_shape(&self) -> [usize; 3] {
        match self.shape[..] {
            [total, heads, _] => [1, heads, total],
            [batch, heads, count, _] => [batch, heads, count],
            _ => unreachable!("of rank 3 or 4"),
        }
    }

    fn out_shape(&self) -> Vec<usize> {
        let rank = self.shape.len();
        self.shape[..rank - 1].iter().copied().chain([VALUE_DIM]).collect()
    }

    fn tensor(&self) -> Tensor {
        let shape: Vec<i64> = self.shape.iter().map(|&n| n as i64).collect();
        tensor(&self.q, F32, &shape)
    }

    /// * `sums`: the shape of the key sums
    fn through_rust(&self, attention: &Attention<'_>, kv: KeysValues<'_>, sums: [usize; 3]) -> [Vec<u32>; 3] {
        let contiguous = |shape: &[usize]| {
            let strides = |axis: usize| shape[axis + 1..].iter().product::<usize>() as isize;
            (0..shape.len()).map(strides).collect::<Vec<_>>()
        };
        let (mut out, mut lse) = (vec![9.0; self.q.len() / DIM * VALUE_DIM], vec![9.0; self.q.len() / DIM]);
        let q = AnyTensorRef::with_strides(&self.q, 0, &self.shape, &contiguous(&self.shape)).unwrap();
        let (shape, mut workspace) = (self.out_shape(), Workspace::new());
        let into = flashtile::AnyTensorMut::with_strides(&mut out, 0, &shape, &contiguous(&shape)).unwrap();
        let rows = TensorMut::from_slice(&mut lse, self.lse_shape()).unwrap();
        attention.compute(q, kv, into, rows, &mut workspace).unwrap();
        let mut added = vec![9.0; sums.iter().product()];
        let rows = TensorRef::from_slice(&lse, self.lse_shape()).unwrap();
        attention.key_sums(q, kv, rows, TensorMut::from_slice(&mut added, sums).unwrap(), &mut workspace).unwrap();
        [bits(&out), bits(&lse), bits(&added)]
    }

    fn through_c(&self, options: &Options, sums: [usize; 3]) -> Results {
        let (mut out, mut lse) = (vec![9.0; self.q.len() / DIM * VALUE_DIM], vec![9.0; self.q.len() / DIM]);
        let mut added = vec![9.0; sums.iter().product()];
        let [o, l, s] = self.outputs(&mut out, &mut lse, &mut added, sums);
        let q = self.tensor();
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_attention(&q, null(), null(), &o, &l, options) };
        if code != 0 {
            assert!(out.iter().chain(&lse).all(|&x| x == 9.0), "a refused call writes nothing");
            return Err(code);
        }
        // SAFETY: as above.
        let code = unsafe { flashtile_key_sums(&q, null(), null(), &l, &s, options) };
        assert_eq!(code, 0, "{}", last_error());
        Ok([bits(&out), bits(&lse), bits(&added)])
    }

    fn outputs(&self, out: &mut [f32], lse: &mut [f32], added: &mut [f32], sums: [usize; 3]) -> [Tensor; 3] {
        let as_i64 = |shape: &[usize]| shape.iter().map(|&n| n as i64).collect::<Vec<_>>();
        [
            tensor_mut(out, F32, &as_i64(&self.out_shape())),
            tensor_mut(lse, F32, &as_i64(&self.lse_shape())),
            tensor_mut(added, F32, &as_i64(&sums)),
        ]
    }

    fn plan(&self, options: &Options) -> String {
        let mut text = [0u8; 512];
        let (to, q) = (text.as_mut_ptr().cast(), self.tensor());
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_plan(&q, null(), null(), options, to, text.len(), null_mut()) };
        assert_eq!(code, 0, "{}", last_error());
        std::ffi::CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap().to_owned()
    }

    fn rust_plan(&self, attention: &Attention<'_>, kv: KeysValues<'_>) -> String {
        let [b, h, n, d]: [usize; 4] = self.shape[..].try_into().unwrap();
        let q = TensorRef::from_slice(&self.q, [b, h, n, d]).unwrap();
        attention.plan(q, kv).unwrap().to_string()
    }
}

fn appended(c: &Handle, rust: &mut impl Batch, to: Option<usize>, tokens: &Tokens) {
    let [k, v] = tokens.c();
    // SAFETY: all of these are what they say.
    let code = unsafe {
        match to {
            None => flashtile_cache_append(c.0, &k, &v, null()),
            Some(to) => flashtile_cache_append_to(c.0, to as i64, &k, &v, null()),
        }
    };
    assert_eq!(code, 0, "{}", last_error());
    rust.append(to, None, tokens).unwrap();
}

/// A prompt, a chunk, and single tokens, of sequences of unequal lengths.
#[test]
fn attention_over_a_cache_has_the_bits_of_rust() {
    let plain = Options::new();
    let chunks = mask_of(3, &[5], []);
    let chunked = flashtile::mask::Chunked::new(5);
    let firsts = [1i64, 0];
    for n in 0..3 {
        let rng = &mut Rng(n as u64);
        let (rust_format, c_format) = format(n);
        let mut fixed = KvCache::new(rust_format, 2, 40).unwrap();
        let mut rotating = RotatingKvCache::new(rust_format, 2, 1, 12).unwrap();
        let (c_fixed, c_rotating) = (Handle::fixed(c_format, 2, 40), Handle::rotating(c_format, 2, 1, 12));
        let prompt = Tokens::new(rng, 1, 7);
        appended(&c_fixed, &mut fixed, Some(1), &prompt);
        appended(&c_rotating, &mut rotating, Some(1), &prompt);
        for count in [5, 3, 1, 1, 1, 1, 1, 1] {
            let (tokens, queries) = (Tokens::new(rng, 2, count), Queries::new(&[2, HEADS, count, DIM]));
            appended(&c_fixed, &mut fixed, None, &tokens);
            appended(&c_rotating, &mut rotating, None, &tokens);
            let most = rotating.lengths().iter().copied().max().unwrap();
            for (c, kv, keys, is_fixed) in
                [(&c_fixed, KeysValues::from(&fixed), 40, true), (&c_rotating, (&rotating).into(), most, false)]
            {
                let view = CacheView::new(c.0);
                let with = Options { cache: &view, ..plain };
                let causal = || Attention::new().causal();
                let mut cases = vec![
                    (with, Attention::new()),
                    (Options { flags: flags::CAUSAL, threads: 1, ..with }, causal()),
                    (
                        Options { flags: flags::CAUSAL | flags::WINDOW_LEFT, window_left: 3, ..with },
                        causal().window(Some(3), None),
                    ),
                    (Options { masks: &chunks, mask_count: 1, ..with }, Attention::new().masked_by(&chunked)),
                ];
                if is_fixed {
                    let padded = Options { first_keys: firsts.as_ptr(), first_key_count: 2, ..cases[1].0 };
                    cases.push((padded, causal().first_keys(&firsts)));
                }
                for (options, attention) in cases {
                    let sums = [2, HEADS, keys];
                    let expected = queries.through_rust(&attention, kv, sums);
                    assert_eq!(queries.through_c(&options, sums), Ok(expected), "{n} {count} {options:?}");
                    let plan = Options { threads: 1, ..options };
                    let serial = attention.threads(flashtile::Threads::Serial);
                    assert_eq!(queries.plan(&plan), queries.rust_plan(&serial, kv));
                }
            }
        }
        // A window over keys that are lost.
        let view = CacheView::new(c_rotating.0);
        let flags = flags::CAUSAL | flags::WINDOW_LEFT;
        let lost = Options { cache: &view, flags, window_left: 12, ..plain };
        let queries = Queries::new(&[2, HEADS, 1, DIM]);
        assert_eq!(queries.through_c(&lost, [2, HEADS, 19]), Err(Code::LostKeys as i32));
        assert!(last_error().contains("must keep 13"), "{}", last_error());
        let kept = Options { window_left: 11, ..lost };
        let attention = Attention::new().causal().window(Some(11), None);
        let expected = queries.through_rust(&attention, (&rotating).into(), [2, HEADS, 21]);
        assert_eq!(queries.through_c(&kept, [2, HEADS, 21]), Ok(expected));
    }
}

/// A paged cache for both, and its sequences.
struct Pages {
    rust: PagedKvCache,
    c: Handle,
    ids: Vec<SequenceId>,
    sequences: Vec<i64>,
}

impl Pages {
    fn new(n: usize, layers: usize, sequences: usize) -> Self {
        let (rust, c) = format(n);
        let mut rust = PagedKvCache::new(rust, layers, 40, 3).unwrap();
        let c = Handle::paged(c, layers as i64, 40, 3);
        let ids = (0..sequences).map(|_| rust.new_sequence()).collect();
        let sequences = (0..sequences).map(|_| c.new_sequence()).collect();
        Pages { rust, c, ids, sequences }
    }

    fn reserve(&mut self, counts: &[usize]) {
        for (n, &count) in counts.iter().enumerate() {
            self.rust.reserve(self.ids[n], count).unwrap();
            // SAFETY: all of these are what they say.
            let code = unsafe { flashtile_cache_reserve(self.c.0, self.sequences[n], count as i64) };
            assert_eq!(code, 0, "{}", last_error());
        }
    }

    fn write(&mut self, rng: &mut Rng, layer: usize, counts: &[usize]) {
        for (n, &count) in counts.iter().enumerate() {
            let tokens = Tokens::new(rng, 1, count);
            let ([k, v], [rk, rv]) = (tokens.c(), tokens.rust());
            self.rust.write(layer, self.ids[n], rk, rv).unwrap();
            // SAFETY: all of these are what they say.
            let code = unsafe { flashtile_cache_write(self.c.0, layer as i64, self.sequences[n], &k, &v, null()) };
            assert_eq!(code, 0, "{}", last_error());
        }
    }

    fn view(&self, layer: i64) -> CacheView {
        let sequences = self.sequences.as_ptr();
        CacheView { layer, sequences, sequence_count: self.sequences.len() as i64, ..CacheView::new(self.c.0) }
    }
}

/// A server's steps: prompts, chunks and single tokens, packed, over all layers. A prepared step has the bits of calls.
#[test]
fn steps_over_a_paged_cache_have_the_bits_of_rust() {
    for n in 0..3 {
        let rng = &mut Rng(n as u64);
        let mut pages = Pages::new(n, 2, 3);
        // The sequences are forgotten, or there are none.
        let whole = CacheView::new(pages.c.0);
        for (count, code) in [(1, Code::InvalidOption), (0, Code::Ok)] {
            let (queries, options) =
                (Queries::new(&[count, HEADS, 1, DIM]), Options { cache: &whole, ..Options::new() });
            let mut len = 0;
            // SAFETY: all of these are what they say.
            let got = unsafe { flashtile_plan(&queries.tensor(), null(), null(), &options, null_mut(), 0, &mut len) };
            assert_eq!(got, code as i32, "{}", last_error());
            assert!(code == Code::Ok || last_error().starts_with("sequences of the cache view are not set"));
        }
        let mut step: *mut PreparedStep = null_mut();
        let (mut view, mut lists) = (pages.view(0), PageLists::new());
        for counts in [[7, 1, 4], [2, 5, 1], [1, 1, 1], [1, 1, 1]] {
            let starts = [0, counts[0], counts[0] + counts[1], counts.iter().sum()];
            let c_starts = starts.map(|start| start as i64);
            let queries = Queries::new(&[starts[3], HEADS, DIM]);
            pages.reserve(&counts);
            pages.rust.list(&pages.ids, &mut lists).unwrap();
            let sums = [3, HEADS, *lists.lengths().iter().max().unwrap()];
            let options = Options {
                flags: flags::CAUSAL,
                query_starts: c_starts.as_ptr(),
                query_start_count: 4,
                ..Options::new()
            };
            view.layer = 0;
            // The step reads the view in each run, so it is reached by a pointer alone from here on.
            let view = &raw mut view;
            let options = Options { cache: view, ..options };
            // SAFETY: all of these are what they say, and stay until the step is planned again or freed.
            unsafe {
                let q = queries.tensor();
                let code = if step.is_null() {
                    flashtile_prepare(&q, null(), null(), &options, &mut step)
                } else {
                    flashtile_prepared_replan(step, &q, null(), null(), &options)
                };
                assert_eq!(code, 0, "{}", last_error());
                let run = || {
                    let mut results = [vec![9.0; starts[3] * HEADS * VALUE_DIM], vec![9.0; HEADS * starts[3]], vec![]];
                    let [out, lse, none] = &mut results;
                    let [o, l, _] = queries.outputs(out, lse, none, [0; 3]);
                    let code = flashtile_prepared_run(step, &q, null(), null(), &o, &l);
                    (code, [bits(&results[0]), bits(&results[1])])
                };
                for layer in 0..2 {
                    (*view).layer = layer as i64;
                    // Reserved, not yet written.
                    assert_eq!(run().0, Code::NotWritten as i32, "{}", last_error());
                    assert_eq!(queries.through_c(&options, sums), Err(Code::NotWritten as i32));
                    pages.write(rng, layer, &counts);
                    let attention = Attention::new().causal().query_starts(&starts);
                    let kv = pages.rust.view(layer, &lists).unwrap();
                    let [out, lse, added] = queries.through_rust(&attention, kv, sums);
                    assert_eq!(run(), (0, [out.clone(), lse.clone()]), "{}", last_error());
                    assert_eq!(queries.through_c(&options, sums), Ok([out, lse, added]));
                }
                // Other lengths than the planned ones, and a layer that is not there.
                (*view).layer = 2;
                assert_eq!(run().0, Code::NotInCache as i32);
                (*view).layer = 0;
                pages.reserve(&[0, 0, 1]);
                pages.write(rng, 0, &[0, 0, 1]);
                assert_eq!(run().0, Code::ShapeMismatch as i32, "{}", last_error());
                pages.write(rng, 1, &[0, 0, 1]);
            }
        }
        // SAFETY: made above, and no longer used.
        unsafe { flashtile_prepared_free(step) };
    }
}

/// One step for the caches of all layers.
#[test]
fn a_step_runs_over_a_cache_for_each_layer() {
    let rng = &mut Rng(5);
    let (rust_format, c_format) = format(1);
    let queries = Queries::new(&[2, HEADS, 4, DIM]);
    for is_rotating in [false, true] {
        let c = [(); 2]
            .map(|()| if is_rotating { Handle::rotating(c_format, 2, 0, 6) } else { Handle::fixed(c_format, 2, 20) });
        let mut fixed = [(); 2].map(|()| KvCache::new(rust_format, 2, 20).unwrap());
        let mut rotating = [(); 2].map(|()| RotatingKvCache::new(rust_format, 2, 0, 6).unwrap());
        for layer in 0..2 {
            for _ in 0..2 {
                let tokens = Tokens::new(rng, 2, 4);
                if is_rotating {
                    appended(&c[layer], &mut rotating[layer], None, &tokens);
                } else {
                    appended(&c[layer], &mut fixed[layer], None, &tokens);
                }
            }
        }
        let (mut view, mut step, q) = (CacheView::new(c[0].0), null_mut(), queries.tensor());
        let view = &raw mut view;
        let options = Options { flags: flags::CAUSAL, cache: view, ..Options::new() };
        // SAFETY: all of these are what they say, and stay until the step is freed.
        unsafe {
            assert_eq!(flashtile_prepare(&q, null(), null(), &options, &mut step), 0, "{}", last_error());
            for (layer, cache) in c.iter().enumerate() {
                (*view).cache = cache.0;
                let mut out = vec![9.0; queries.q.len() / DIM * VALUE_DIM];
                let o = tensor_mut(&mut out, F32, &[2, HEADS as i64, 4, VALUE_DIM as i64]);
                assert_eq!(flashtile_prepared_run(step, &q, null(), null(), &o, null()), 0, "{}", last_error());
                let kv = if is_rotating { KeysValues::from(&rotating[layer]) } else { (&fixed[layer]).into() };
                let keys = if is_rotating { 8 } else { 20 };
                let expected = queries.through_rust(&Attention::new().causal(), kv, [2, HEADS, keys]);
                assert_eq!(bits(&out), expected[0]);
            }
            flashtile_prepared_free(step);
        }
    }
}

/// Block-sparse masks have a column for the capacity, for all tokens of a rotating cache, and for those of the longest sequence in pages.
#[test]
fn blocks_of_masks_are_over_the_keys_of_a_cache() {
    let (rng, mut pages) = (&mut Rng(8), Pages::new(0, 1, 2));
    let (rust_format, c_format) = format(0);
    let mut fixed = KvCache::new(rust_format, 2, 40).unwrap();
    let mut rotating = RotatingKvCache::new(rust_format, 2, 2, 9).unwrap();
    let (c_fixed, c_rotating) = (Handle::fixed(c_format, 2, 40), Handle::rotating(c_format, 2, 2, 9));
    let tokens = Tokens::new(rng, 2, 19);
    appended(&c_fixed, &mut fixed, None, &tokens);
    appended(&c_rotating, &mut rotating, None, &tokens);
    pages.reserve(&[19, 5]);
    pages.write(rng, 0, &[19, 5]);
    let (queries, mut lists, paged) = (Queries::new(&[2, HEADS, 1, DIM]), PageLists::new(), pages.view(0));
    pages.rust.list(&pages.ids, &mut lists).unwrap();
    // The second block of 8 keys.
    let mask = mask_of(8, &[1, 8], [&[0, 1], &[1]]);
    let plain = Options { masks: &mask, mask_count: 1, ..Options::new() };
    for (view, kv, keys) in [
        (CacheView::new(c_fixed.0), KeysValues::from(&fixed), 40),
        (CacheView::new(c_rotating.0), (&rotating).into(), 19),
        (paged, pages.rust.view(0, &lists).unwrap(), 19),
    ] {
        let blocks = flashtile::mask::BlockSparse::from_rows([1, 8], usize::div_ceil(keys, 8), &[0, 1], &[1]).unwrap();
        let expected = queries.through_rust(&Attention::new().masked_by(&blocks), kv, [2, HEADS, keys]);
        let options = Options { cache: &view, ..plain };
        assert_eq!(queries.through_c(&options, [2, HEADS, keys]), Ok(expected), "{keys}: {}", last_error());
    }
}

/// Forks share their pages, and each reads its own tokens after them, in any order and more than once.
#[test]
fn any_sequences_are_a_batch() {
    let (rng, mut pages) = (&mut Rng(3), Pages::new(0, 1, 2));
    pages.reserve(&[8, 2]);
    pages.write(rng, 0, &[8, 2]);
    let mut fork = 0;
    // SAFETY: all of these are what they say.
    assert_eq!(unsafe { flashtile_cache_fork(pages.c.0, pages.sequences[0], &mut fork) }, 0);
    pages.ids.push(pages.rust.fork(pages.ids[0]).unwrap());
    pages.sequences.push(fork);
    assert_eq!((pages.c.info().shared_pages, pages.c.info().free_pages), (3, 40 - 4));
    pages.reserve(&[0, 0, 2]);
    pages.write(rng, 0, &[0, 0, 2]);
    assert_eq!((pages.c.info().shared_pages, pages.c.info().free_pages), (2, 40 - 6));

    let order = [2, 0, 1, 0];
    let ids = order.map(|n| pages.ids[n]);
    let sequences = order.map(|n| pages.sequences[n]);
    let view = CacheView { sequences: sequences.as_ptr(), sequence_count: 4, ..pages.view(0) };
    let queries = Queries::new(&[4, HEADS, 1, DIM]);
    let mut lists = PageLists::new();
    pages.rust.list(&ids, &mut lists).unwrap();
    let expected = queries.through_rust(&Attention::new(), pages.rust.view(0, &lists).unwrap(), [4, HEADS, 10]);
    let options = Options { cache: &view, ..Options::new() };
    assert_eq!(queries.through_c(&options, [4, HEADS, 10]), Ok(expected));
}

#[test]
fn threads_read_a_cache_at_once() {
    let (rust_format, c_format) = format(0);
    let (c, mut rust) = (Handle::fixed(c_format, 2, 20), KvCache::new(rust_format, 2, 20).unwrap());
    appended(&c, &mut rust, None, &Tokens::new(&mut Rng(1), 2, 9));
    let queries = Queries::new(&[2, HEADS, 3, DIM]);
    let expected = queries.through_rust(&Attention::new(), (&rust).into(), [2, HEADS, 20]);
    let cache = &c;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let handle: &Handle = cache;
                let view = CacheView::new(handle.0);
                for _ in 0..20 {
                    let options = Options { cache: &view, ..Options::new() };
                    assert_eq!(queries.through_c(&options, [2, HEADS, 20]), Ok(expected.clone()));
                    assert_eq!(handle.len(1), Ok(9));
                }
            });
        }
    });
}

/// A decoding step allocates nothing: rotating, appending, and attention, once there was a step as long.
#[test]
fn a_step_does_not_allocate() {
    Counting::watch();
    let (rng, tables) = (&mut Rng(2), Tables::new());
    let (_, format) = format(1);
    let (fixed, rotating, paged) =
        (Handle::fixed(format, 1, 30), Handle::rotating(format, 1, 1, 9), Handle::paged(format, 1, 9, 4));
    let sequences = [paged.new_sequence()];
    let listed = CacheView { sequences: sequences.as_ptr(), sequence_count: 1, ..CacheView::new(paged.0) };
    let (tokens, queries) = (Tokens::new(rng, 1, 1), Queries::new(&[1, HEADS, 1, DIM]));
    let mut out = [9.0f32; HEADS * VALUE_DIM];
    let ([k, v], q) = (tokens.c(), queries.tensor());
    let o = tensor_mut(&mut out, F32, &[1, HEADS as i64, 1, VALUE_DIM as i64]);
    let rotation = Rotation::new(tables.c);
    let step = || {
        for view in [CacheView::new(fixed.0), CacheView::new(rotating.0), listed] {
            let options = Options { cache: &view, threads: 1, flags: flags::CAUSAL, ..Options::new() };
            let sequence = if view.sequences.is_null() { 0 } else { sequences[0] };
            // SAFETY: all of these are what they say.
            unsafe {
                let code = flashtile_cache_append_to(view.cache.cast_mut(), sequence, &k, &v, &rotation);
                assert_eq!(code, 0, "{}", last_error());
                let code = flashtile_attention(&q, null(), null(), &o, null(), &options);
                assert_eq!(code, 0, "{}", last_error());
            }
        }
    };
    (0..20).for_each(|_| step());
    // SAFETY: as above. The table of pages keeps its memory.
    unsafe {
        assert_eq!(flashtile_cache_clear(fixed.0), 0);
        assert_eq!(flashtile_cache_clear(rotating.0), 0);
        assert_eq!(flashtile_cache_truncate(paged.0, sequences[0], 0), 0);
    }
    let ((), usage) = COUNTING.usage(|| (0..20).for_each(|_| step()));
    assert_eq!(usage.calls, 0, "{usage:?}");
}

fn check(code: i32, expected: Code, words: &str) {
    let message = last_error();
    assert_eq!(code, expected as i32, "{words}: {message}");
    assert!(message.contains(words), "{message:?} does not say {words:?}");
}

#[test]
fn caches_that_cannot_be_are_refused() {
    use Code::*;
    let (_, format) = format(0);
    let nowhere = std::ptr::without_provenance_mut::<Cache>(8);
    let mut cache = nowhere;
    let of = |format: CacheFormat| format;
    // SAFETY: all of these are what they say, or are refused.
    unsafe {
        let mut refuse = |format: *const CacheFormat, code, words: &str| {
            check(flashtile_cache_new(format, 1, 1, &mut cache), code, words);
            check(flashtile_cache_new_rotating(format, 1, 1, 1, &mut cache), code, words);
            check(flashtile_cache_new_paged(format, 1, 1, 1, &mut cache), code, words);
        };
        refuse(null(), NullPointer, "cache format");
        refuse((&raw const format).wrapping_byte_add(1), Misaligned, "cache format");
        refuse(&of(CacheFormat { dtype: 0, ..format }), BadDtype, "0 is no dtype");
        refuse(&of(CacheFormat { dtype: 4, ..format }), BadDtype, "FLASHTILE_F64 (4); it must be FLASHTILE_F32 (1)");
        refuse(&of(CacheFormat { reserved: 1, ..format }), InvalidOption, "reserved");
        refuse(&of(CacheFormat { heads_kv: -1, ..format }), NegativeSize, "heads_kv");
        refuse(&of(CacheFormat { head_dim: -1, ..format }), NegativeSize, "head_dim");
        refuse(&of(CacheFormat { value_dim: -1, ..format }), NegativeSize, "value_dim");
        refuse(&of(CacheFormat { head_dim: i64::MAX, ..format }), TooLarge, "the cache");

        let to = &raw mut cache;
        check(flashtile_cache_new(&format, 1, 1, null_mut()), NullPointer, "cache");
        check(flashtile_cache_new(&format, 1, 1, to.wrapping_byte_add(1)), Misaligned, "cache");
        check(flashtile_cache_new(&format, -1, 1, to), NegativeSize, "batch");
        check(flashtile_cache_new(&format, 1, -1, to), NegativeSize, "capacity");
        check(flashtile_cache_new(&format, i64::MAX, i64::MAX, to), TooLarge, "the cache");
        check(flashtile_cache_new_rotating(&format, -1, 1, 1, to), NegativeSize, "batch");
        check(flashtile_cache_new_rotating(&format, 1, -1, 1, to), NegativeSize, "first");
        check(flashtile_cache_new_rotating(&format, 1, 1, -1, to), NegativeSize, "window");
        check(flashtile_cache_new_rotating(&format, 1, 1, 0, to), InvalidOption, "window is 0 but must be 1 or more");
        check(flashtile_cache_new_rotating(&format, 1, i64::MAX, i64::MAX, to), TooLarge, "the cache");
        check(flashtile_cache_new_paged(&format, 0, 1, 1, to), InvalidOption, "layers is 0");
        check(flashtile_cache_new_paged(&format, -1, 1, 1, to), NegativeSize, "layers");
        check(flashtile_cache_new_paged(&format, 1, -1, 1, to), NegativeSize, "pages");
        check(flashtile_cache_new_paged(&format, 1, 1, -1, to), NegativeSize, "page_size");
        check(flashtile_cache_new_paged(&format, 1, 1, 0, to), InvalidOption, "page size is 0");
        check(flashtile_cache_new_paged(&format, 1, 1 << 32, 1, to), TooLarge, "4294967296 pages");
        flashtile_cache_free(null_mut());
    }
    assert_eq!(cache, nowhere, "nothing is written");
    // Without elements, sequences and tokens.
    let none = Handle::fixed(CacheFormat { heads_kv: 0, ..format }, 0, 0);
    assert_eq!((none.info().sequences, none.info().bytes, none.memory(0)[0].shape), (0, 0, [0, 0, 0, 8]));
}

/// Every function, with every pointer that must not be null, and with a cache of the wrong kind.
#[test]
fn wrong_handles_are_refused() {
    use Code::*;
    let (_, format) = format(0);
    let (fixed, rotating, paged) =
        (Handle::fixed(format, 2, 4), Handle::rotating(format, 2, 1, 3), Handle::paged(format, 2, 4, 2));
    let tokens = Tokens::new(&mut Rng(0), 1, 1);
    let [k, v] = tokens.c();
    let (mut n, mut t, mut u) = (-7, k, v);
    let mut info = fixed.info();
    let before = info;
    // SAFETY: all of these are what they say, or are refused.
    unsafe {
        let odd = fixed.0.wrapping_byte_add(1);
        for (cache, code) in [(null_mut(), NullPointer), (odd, Misaligned)] {
            let codes = [
                flashtile_cache_append(cache, &k, &v, null()),
                flashtile_cache_append_to(cache, 0, &k, &v, null()),
                flashtile_cache_truncate(cache, 0, 0),
                flashtile_cache_fork_to(cache, 0, 1),
                flashtile_cache_clear(cache),
                flashtile_cache_new_sequence(cache, &mut n),
                flashtile_cache_fork(cache, 0, &mut n),
                flashtile_cache_remove(cache, 0),
                flashtile_cache_reserve(cache, 0, 1),
                flashtile_cache_write(cache, 0, 0, &k, &v, null()),
                flashtile_cache_length(cache, 0, &mut n),
                flashtile_cache_written(cache, 0, 0, &mut n),
                flashtile_cache_pages(cache, 0, null_mut(), 0, &mut n),
                flashtile_cache_memory(cache, 0, &mut t, &mut u),
                flashtile_cache_get_info(cache, &mut info),
            ];
            assert!(codes.iter().all(|&got| got == code as i32), "{codes:?}");
            assert!(last_error().contains("the pointer to the cache"), "{}", last_error());
        }
        let (one, list) = (null_mut::<i64>(), null_mut::<Tensor>());
        for cache in [fixed.0, rotating.0] {
            check(flashtile_cache_append(cache, null(), &v, null()), NullPointer, "keys");
            check(flashtile_cache_append(cache, &k, null(), null()), NullPointer, "values");
            check(flashtile_cache_append_to(cache, 0, &k, null(), null()), NullPointer, "values");
            check(flashtile_cache_length(cache, 0, one), NullPointer, "length");
            check(flashtile_cache_written(cache, 0, 0, one), NullPointer, "length");
            check(flashtile_cache_memory(cache, 0, list, &mut u), NullPointer, "keys");
            check(flashtile_cache_memory(cache, 0, &mut t, list), NullPointer, "values");
            check(flashtile_cache_get_info(cache, null_mut()), NullPointer, "information");
            let words = "they have no pages";
            check(flashtile_cache_new_sequence(cache, &mut n), WrongCache, words);
            check(flashtile_cache_fork(cache, 0, &mut n), WrongCache, "flashtile_cache_fork_to");
            check(flashtile_cache_remove(cache, 0), WrongCache, words);
            check(flashtile_cache_reserve(cache, 0, 1), WrongCache, words);
            check(flashtile_cache_write(cache, 0, 0, &k, &v, null()), WrongCache, words);
            check(flashtile_cache_pages(cache, 0, null_mut(), 0, &mut n), WrongCache, words);
            check(flashtile_cache_length(cache, -1, &mut n), NotInCache, "no sequence -1");
            check(
                flashtile_cache_length(cache, 2, &mut n),
                NotInCache,
                "no sequence 2, counted from 0: the cache has 2",
            );
            check(flashtile_cache_truncate(cache, 2, 0), NotInCache, "no sequence 2");
            check(flashtile_cache_truncate(cache, 0, -1), NegativeSize, "length");
            check(flashtile_cache_append_to(cache, -1, &k, &v, null()), NotInCache, "no sequence -1");
            check(flashtile_cache_fork_to(cache, 0, -1), NotInCache, "no sequence -1");
            check(
                flashtile_cache_written(cache, 1, 0, &mut n),
                NotInCache,
                "no layer 1, counted from 0: the cache has 1",
            );
            check(flashtile_cache_memory(cache, 1, &mut t, &mut u), NotInCache, "no layer 1");
            check(flashtile_cache_memory(cache, -1, &mut t, &mut u), NotInCache, "no layer -1");
        }
        check(flashtile_cache_new_sequence(paged.0, one), NullPointer, "sequence");
        let sequence = paged.new_sequence();
        check(flashtile_cache_fork(paged.0, sequence, one), NullPointer, "sequence");
        check(flashtile_cache_pages(paged.0, sequence, one, 1, &mut n), NullPointer, "list of pages");
        check(flashtile_cache_pages(paged.0, sequence, one, -1, &mut n), NegativeSize, "list of pages");
        check(flashtile_cache_pages(paged.0, sequence, one, 0, one), NullPointer, "number of pages");
        check(flashtile_cache_append(paged.0, &k, &v, null()), WrongCache, "flashtile_cache_append_to");
        check(flashtile_cache_append_to(paged.0, sequence, &k, &v, null()), WrongCache, "flashtile_cache_write");
        check(flashtile_cache_fork_to(paged.0, sequence, sequence), WrongCache, "flashtile_cache_fork makes");
        check(flashtile_cache_reserve(paged.0, sequence, -1), NegativeSize, "reservation");
        check(flashtile_cache_reserve(paged.0, sequence, i64::MAX), CacheFull, "the pool has 4 free pages");
        check(flashtile_cache_write(paged.0, 2, sequence, &k, &v, null()), NotInCache, "no layer 2");
        check(flashtile_cache_write(paged.0, -1, sequence, &k, &v, null()), NotInCache, "no layer -1");
        check(flashtile_cache_written(paged.0, 2, sequence, &mut n), NotInCache, "no layer 2");
        // The sequence of another cache.
        let other = Handle::paged(format, 2, 4, 2);
        let foreign = other.new_sequence();
        check(flashtile_cache_reserve(paged.0, foreign, 1), NotInCache, "removed or is of another cache");
        check(flashtile_cache_length(paged.0, foreign, &mut n), NotInCache, "flashtile_cache_new_sequence");
        assert_eq!(paged.info().sequences, 1, "a refused sequence is not made");
    }
    assert_eq!((n, info), (-7, before), "nothing is written");
    assert_eq!(([fixed.len(0), rotating.len(1)], paged.info().free_pages), ([Result::Ok(0); 2], 4));
}

#[test]
fn wrong_tokens_are_refused() {
    use Code::*;
    let (_, format) = format(0);
    let cache = Handle::fixed(format, 1, 6);
    let (tokens, tables) = (Tokens::new(&mut Rng(0), 1, 2), Tables::new());
    let [k, v] = tokens.c();
    let shaped = |tensor: Tensor, axis: usize, size: i64| {
        let mut tensor = tensor;
        tensor.shape[axis] = size;
        tensor
    };
    let append = |k: &Tensor, v: &Tensor, rotation: *const Rotation, expected, words: &str| {
        // SAFETY: all of these are what they say, or are refused.
        check(unsafe { flashtile_cache_append(cache.0, k, v, rotation) }, expected, words);
        // SAFETY: as above.
        check(unsafe { flashtile_cache_append_to(cache.0, 0, k, v, rotation) }, expected, words);
        assert_eq!(cache.len(0), Result::Ok(0));
    };
    append(&Tensor { rank: 3, ..k }, &v, null(), BadRank, "rank of the keys is 3 but must be 4");
    append(&k, &Tensor { dtype: 4, ..v }, null(), BadDtype, "values");
    append(&shaped(k, 0, 2), &v, null(), ShapeMismatch, "batch of the keys is 2 but must be 1");
    append(&shaped(k, 1, 1), &v, null(), ShapeMismatch, "heads_kv of the keys is 1 but must be 2");
    append(&k, &shaped(v, 2, 1), null(), ShapeMismatch, "seq_kv of the values is 1 but must be 2");
    append(&k, &shaped(v, 3, 4), null(), ShapeMismatch, "value_dim of the values is 4 but must be 5");
    append(&shaped(k, 2, -1), &v, null(), NegativeSize, "keys");
    // Tokens in the memory that they are written to.
    let [own_k, own_v] = cache.memory(0);
    append(&shaped(own_k, 2, 2), &v, null(), Overlap, "shares memory with the keys");
    append(&k, &shaped(own_v, 2, 2), null(), Overlap, "shares memory with the values");

    let rotation = Rotation::new(tables.c);
    append(&k, &v, (&raw const rotation).wrapping_byte_add(1), Misaligned, "rotation");
    append(&k, &v, &Rotation { rotary: null(), ..rotation }, NullPointer, "rotary table");
    append(&k, &v, &Rotation { position_count: 1, ..rotation }, NullPointer, "positions");
    append(&k, &v, &Rotation { position_count: -1, ..rotation }, NegativeSize, "positions");
    let list = [0i64, 39, 1];
    let at = |positions: &[i64]| Rotation {
        positions: positions.as_ptr(),
        position_count: positions.len() as i64,
        ..rotation
    };
    let words = "3 positions were given but there must be 1, 1 (one of each sequence) or 2 (one of each token)";
    append(&k, &v, &at(&list), WrongCount, words);
    append(&k, &v, &at(&list[1..2]), PositionOutOfRange, "the position 40 is not in the rotary table, which has 40");
    append(&k, &v, &at(&[-1]), PositionOutOfRange, "-1");

    // A rotating cache counts tokens as far as numbers go, in the time of those that it keeps.
    let rotating = Handle::rotating(format, 1, 1, 3);
    let endless = |tensor: Tensor| Tensor { strides: [0; 4], ..shaped(tensor, 2, i64::MAX) };
    let (many_k, many_v) = (endless(k), endless(v));
    // SAFETY: all of these are what they say.
    unsafe {
        for _ in 0..2 {
            assert_eq!(flashtile_cache_append(rotating.0, &many_k, &many_v, null()), 0, "{}", last_error());
            assert_eq!(rotating.len(0), Result::Ok(i64::MAX));
        }
        check(flashtile_cache_append(rotating.0, &many_k, &many_v, null()), CacheFull, "sequence 0 would have");
        check(flashtile_cache_append(cache.0, &many_k, &many_v, null()), CacheFull, "the cache has room for 6");
    }

    // After all of that, the cache takes tokens.
    // SAFETY: all of these are what they say.
    unsafe { assert_eq!(flashtile_cache_append(cache.0, &k, &v, &at(&list[..2])), 0, "{}", last_error()) };
    assert_eq!(cache.len(0), Result::Ok(2));
}

#[test]
fn wrong_views_are_refused() {
    use Code::*;
    let (_, format) = format(0);
    let (fixed, rotating, paged) =
        (Handle::fixed(format, 1, 4), Handle::rotating(format, 1, 1, 3), Handle::paged(format, 1, 4, 2));
    let sequences = [paged.new_sequence()];
    let queries = Queries::new(&[1, HEADS, 1, DIM]);
    let [k, v] = fixed.memory(0);
    let plain = Options::new();
    let refuse = |view: *const CacheView, options: Options, expected, words: &str| {
        let options = Options { cache: view, ..options };
        assert_eq!(
            queries.through_c(&options, [1, HEADS, 4]).map(drop),
            Err(expected as i32),
            "{words}: {}",
            last_error()
        );
        assert!(last_error().contains(words), "{} does not say {words:?}", last_error());
        let q = queries.tensor();
        let mut step = null_mut();
        // SAFETY: all of these are what they say, or are refused.
        check(unsafe { flashtile_prepare(&q, null(), null(), &options, &mut step) }, expected, words);
        assert!(step.is_null());
    };
    let whole = CacheView::new(fixed.0);
    refuse((&raw const whole).wrapping_byte_add(1), plain, Misaligned, "cache view");
    refuse(&CacheView { cache: null(), ..whole }, plain, NullPointer, "cache");
    for cache in [fixed.0, rotating.0] {
        let whole = CacheView::new(cache);
        let listed = CacheView { sequences: sequences.as_ptr(), sequence_count: 1, ..whole };
        refuse(&listed, plain, InvalidOption, "a call reads all sequences of a cache of flashtile_cache_new");
        refuse(&CacheView { layer: 1, ..whole }, plain, NotInCache, "there is no layer 1");
        refuse(&CacheView { sequence_count: 1, ..whole }, plain, NullPointer, "sequences of the cache view");
        refuse(&CacheView { sequence_count: -1, ..whole }, plain, NegativeSize, "sequences of the cache view");
    }
    let one = CacheView { sequences: sequences.as_ptr(), sequence_count: 1, ..CacheView::new(paged.0) };
    refuse(&CacheView { layer: 1, ..one }, plain, NotInCache, "there is no layer 1, counted from 0: the cache has 1");
    refuse(&CacheView { layer: -1, ..one }, plain, NotInCache, "there is no layer -1");
    refuse(&CacheView::new(paged.0), plain, InvalidOption, "sequences of the cache view are not set");
    let stray = [sequences[0] + 1_000_000];
    refuse(&CacheView { sequences: stray.as_ptr(), ..one }, plain, NotInCache, "the cache has no sequence");

    // What the cache says already.
    let (list, table) = ([0i64, 0], PageTable::new());
    let with = [
        (Options { key_lengths: list.as_ptr(), key_length_count: 1, ..plain }, "cache and key_lengths are both set"),
        (Options { key_starts: list.as_ptr(), key_start_count: 2, ..plain }, "cache and key_starts are both set"),
        (Options { page_table: &table, ..plain }, "cache and page_table are both set"),
    ];
    for (options, words) in with {
        refuse(&whole, options, InvalidOption, words);
    }
    let padded = Options { first_keys: list.as_ptr(), first_key_count: 1, ..plain };
    refuse(&CacheView::new(rotating.0), padded, InvalidOption, "rotating and paged caches have no padding");
    refuse(&one, padded, InvalidOption, "rotating and paged caches have no padding");

    // Keys and values beside a cache, and outputs in its memory or over the list.
    let mut out = [9.0f32; HEADS * VALUE_DIM];
    let (q, o) = (queries.tensor(), tensor_mut(&mut out, F32, &[1, HEADS as i64, 1, VALUE_DIM as i64]));
    let options = Options { cache: &whole, ..plain };
    let paged_options = Options { cache: &one, ..plain };
    let in_cache = Tensor { data: v.data, ..o };
    let over_list = Tensor { data: sequences.as_ptr().cast_mut().cast(), ..o };
    // SAFETY: all of these are refused.
    unsafe {
        check(flashtile_attention(&q, &k, null(), &o, null(), &options), InvalidOption, "pass NULL for k and v");
        check(flashtile_attention(&q, null(), &v, &o, null(), &options), InvalidOption, "pass NULL for k and v");
        check(flashtile_attention(&q, null(), null(), &o, null(), &plain), NullPointer, "keys");
        check(flashtile_attention(&q, null(), null(), &in_cache, null(), &options), Overlap, "values");
        check(flashtile_attention(&q, null(), null(), &over_list, null(), &paged_options), Overlap, "sequences of the");
    }
    assert_eq!(out, [9.0; HEADS * VALUE_DIM]);
    // An empty cache has no keys.
    let results = queries.through_c(&options, [1, HEADS, 4]).unwrap();
    assert_eq!((results[0].as_slice(), results[1][0]), (&[0u32; HEADS * VALUE_DIM][..], f32::NEG_INFINITY.to_bits()));
}
