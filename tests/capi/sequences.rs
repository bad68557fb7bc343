//! Sequences of their own lengths through C: padded, packed and in pages they have the bits of calls of their own. What does not
//! fit is refused.

use super::{BF16, F16, F32, bits, last_error, mask_of, random, tensor, tensor_mut};
use flashtile::capi::*;
use flashtile::{Attention, KeysValues, TensorRef, Threads, bf16, f16};
use std::collections::BTreeSet;
use std::ptr::null;

/// Queries and keys of each sequence.
const LENGTHS: [(usize, usize); 5] = [(3, 7), (0, 4), (5, 5), (1, 41), (2, 0)];
const SEQUENCES: i64 = LENGTHS.len() as i64;
const HEADS: usize = 4;
const HEADS_KV: usize = 2;
const DIM: usize = 8;
const VALUE_DIM: usize = 5;
const PAGE: usize = 4;

fn starts_of(lengths: impl Iterator<Item = usize>) -> Vec<i64> {
    let mut end = 0;
    std::iter::once(0).chain(lengths.map(|length| (end += length as i64, end).1)).collect()
}

/// Rows of all sequences, `[total, heads, dim]`.
struct Rows {
    q: Vec<f32>,
    k: Vec<f16>,
    v: Vec<bf16>,
    query_starts: Vec<i64>,
    key_starts: Vec<i64>,
    query_lengths: Vec<i64>,
    key_lengths: Vec<i64>,
}

/// Outputs of all sequences, `[total, heads, value_dim]` and `[heads, total]`.
type Outputs = (Vec<u32>, Vec<u32>);

impl Rows {
    fn new() -> Self {
        let (query_starts, key_starts) =
            (starts_of(LENGTHS.iter().map(|lengths| lengths.0)), starts_of(LENGTHS.iter().map(|lengths| lengths.1)));
        let [queries, keys] = [&query_starts, &key_starts].map(|starts| starts[LENGTHS.len()] as usize);
        Rows {
            q: random(queries * HEADS * DIM),
            k: random(keys * HEADS_KV * DIM).into_iter().map(f16::from_f32).collect(),
            v: random(keys * HEADS_KV * VALUE_DIM).into_iter().map(bf16::from_f32).collect(),
            query_starts,
            key_starts,
            query_lengths: LENGTHS.map(|lengths| lengths.0 as i64).to_vec(),
            key_lengths: LENGTHS.map(|lengths| lengths.1 as i64).to_vec(),
        }
    }

    fn queries(&self) -> usize {
        self.query_starts[LENGTHS.len()] as usize
    }

    fn keys(&self) -> usize {
        self.key_starts[LENGTHS.len()] as usize
    }

    /// All rows, of rank 3: queries, keys and values.
    fn packed(&self) -> [Tensor; 3] {
        let (queries, keys, heads_kv) = (self.queries() as i64, self.keys() as i64, HEADS_KV as i64);
        [
            tensor(&self.q, F32, &[queries, HEADS as i64, DIM as i64]),
            tensor(&self.k, F16, &[keys, heads_kv, DIM as i64]),
            tensor(&self.v, BF16, &[keys, heads_kv, VALUE_DIM as i64]),
        ]
    }

    fn packed_queries(&self, options: Options) -> Options {
        Options { query_starts: self.query_starts.as_ptr(), query_start_count: SEQUENCES + 1, ..options }
    }

    fn packed_keys(&self, options: Options) -> Options {
        Options { key_starts: self.key_starts.as_ptr(), key_start_count: SEQUENCES + 1, ..options }
    }

    fn padded_keys(&self, options: Options) -> Options {
        Options { key_lengths: self.key_lengths.as_ptr(), key_length_count: SEQUENCES, ..options }
    }

    /// A call whose outputs are packed.
    fn call(&self, [q, k, v]: [Tensor; 3], rank: i32, options: &Options) -> Outputs {
        let queries = self.queries();
        let (mut out, mut lse) = (vec![9.0; queries * HEADS * VALUE_DIM], vec![9.0; HEADS * queries]);
        let packed = tensor_mut(&mut out, F32, &[queries as i64, HEADS as i64, VALUE_DIM as i64]);
        let o = if rank == 3 { packed } else { of_rank_4(packed) };
        let l = tensor_mut(&mut lse, F32, &[1, HEADS as i64, queries as i64]);
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_attention(&q, &k, &v, &o, &l, options) };
        assert_eq!(code, 0, "{}", last_error());
        (bits(&out), bits(&lse))
    }

    /// A call for each sequence; `options` gives those of a sequence.
    fn one_by_one(&self, options: impl Fn(usize) -> Options) -> Outputs {
        let queries = self.queries();
        let (mut out, mut lse) = (vec![9.0; queries * HEADS * VALUE_DIM], vec![9.0; HEADS * queries]);
        let [q, k, v] = self.packed().map(of_rank_4);
        let o = of_rank_4(tensor_mut(&mut out, F32, &[queries as i64, HEADS as i64, VALUE_DIM as i64]));
        let l = tensor_mut(&mut lse, F32, &[1, HEADS as i64, queries as i64]);
        for b in 0..LENGTHS.len() {
            let (query, key) = (self.query_starts[b], self.key_starts[b]);
            let (of_queries, of_keys) = ((query, self.query_lengths[b]), (key, self.key_lengths[b]));
            let (q, k, v) = (rows(q, of_queries, 4), rows(k, of_keys, 2), rows(v, of_keys, 2));
            let (o, l) = (rows(o, of_queries, 4), rows(l, of_queries, 4));
            // SAFETY: all of these are what they say.
            let code = unsafe { flashtile_attention(&q, &k, &v, &o, &l, &options(b)) };
            assert_eq!(code, 0, "{}", last_error());
        }
        (bits(&out), bits(&lse))
    }

    /// A batch index for each sequence, `[sequences, heads, most rows, dim]`; `padding` is in the rows of no sequence.
    fn padded<T: Copy>(&self, x: &[T], starts: &[i64], heads: usize, padding: T) -> (Vec<T>, [i64; 4]) {
        let dim = x.len() / (starts[LENGTHS.len()] as usize * heads);
        let most = starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap() as usize;
        let mut padded = vec![padding; LENGTHS.len() * heads * most * dim];
        for b in 0..LENGTHS.len() {
            for (n, row) in (starts[b] as usize..starts[b + 1] as usize).enumerate() {
                for h in 0..heads {
                    let to = ((b * heads + h) * most + n) * dim;
                    padded[to..to + dim].copy_from_slice(&x[(row * heads + h) * dim..][..dim]);
                }
            }
        }
        (padded, [LENGTHS.len(), heads, most, dim].map(|n| n as i64))
    }

    /// A pool `[pages, page_size, heads, dim]`, as a view `[pages, heads, page_size, dim]`.
    fn pool<T: Copy>(&self, x: &[T], pages: &[Vec<i32>], padding: T) -> (Vec<T>, [i64; 4], [i64; 4]) {
        let dim = x.len() / (self.keys() * HEADS_KV);
        let row = HEADS_KV * dim;
        let count = POOL * PAGE;
        let mut pool = vec![padding; count * row];
        for (b, pages) in pages.iter().enumerate() {
            for j in 0..LENGTHS[b].1 {
                let to = (pages[j / PAGE] as usize * PAGE + j % PAGE) * row;
                pool[to..to + row].copy_from_slice(&x[(self.key_starts[b] as usize + j) * row..][..row]);
            }
        }
        let shape = [POOL, HEADS_KV, PAGE, dim].map(|n| n as i64);
        (pool, shape, [PAGE * row, dim, row, 1].map(|n| n as i64))
    }
}

/// `[total, heads, dim]` as `[1, heads, total, dim]`.
fn of_rank_4(x: Tensor) -> Tensor {
    let ([rows, heads, dim, _], [row, head, element, _]) = (x.shape, x.strides);
    Tensor { rank: 4, shape: [1, heads, rows, dim], strides: [0, head, row, element], ..x }
}

/// `length` rows of a tensor whose rows are axis 2, from `start` on.
fn rows(x: Tensor, (start, length): (i64, i64), size: isize) -> Tensor {
    let mut x = x;
    x.data = x.data.wrapping_byte_offset(start as isize * x.strides[2] as isize * size);
    x.shape[2] = length;
    x
}

const POOL: usize = 17;

/// The pages of each sequence: all of the pool's but one, in no order.
fn pages() -> Vec<Vec<i32>> {
    let mut next = 0;
    let page = |n: usize| (n * 5 % POOL) as i32;
    LENGTHS.map(|(_, keys)| (0..keys.div_ceil(PAGE)).map(|_| (next += 1, page(next)).1).collect()).to_vec()
}

/// Tables of the same pages: rectangular and compressed, with entries of 32 and of 64 bits. Entries past the end are -1.
struct Tables {
    wide: Vec<i32>,
    wide64: Vec<i64>,
    compressed: Vec<i32>,
    compressed64: Vec<i64>,
    starts: Vec<i64>,
}

const WIDTH: usize = 12;

impl Tables {
    fn new(pages: &[Vec<i32>]) -> Self {
        let wide: Vec<i32> =
            pages.iter().flat_map(|list| list.iter().copied().chain(std::iter::repeat(-1)).take(WIDTH)).collect();
        let compressed = pages.concat();
        Tables {
            wide64: wide.iter().map(|&page| page.into()).collect(),
            compressed64: compressed.iter().map(|&page| page.into()).collect(),
            starts: starts_of(pages.iter().map(Vec::len)),
            wide,
            compressed,
        }
    }

    fn all(&self, lengths: &[i64]) -> [PageTable; 4] {
        let plain = PageTable {
            lengths: lengths.as_ptr(),
            length_count: lengths.len() as i64,
            page_size: PAGE as i64,
            ..PageTable::new()
        };
        let rectangular = PageTable { page_count: self.wide.len() as i64, width: WIDTH as i64, ..plain };
        let compressed = PageTable {
            page_count: self.compressed.len() as i64,
            starts: self.starts.as_ptr(),
            start_count: self.starts.len() as i64,
            ..plain
        };
        [
            PageTable { pages32: self.wide.as_ptr(), ..rectangular },
            PageTable { pages64: self.wide64.as_ptr(), ..rectangular },
            PageTable { pages32: self.compressed.as_ptr(), ..compressed },
            PageTable { pages64: self.compressed64.as_ptr(), ..compressed },
        ]
    }
}

fn view<T>(data: &[T], dtype: i32, shape: [i64; 4], strides: [i64; 4]) -> Tensor {
    Tensor { strides, ..tensor(data, dtype, &shape) }
}

/// Every way of handing in the sequences, with these options.
fn check_all_ways(rows: &Rows, options: Options, expected: &Outputs) {
    let [q, k, v] = rows.packed();
    let packed = rows.packed_keys(rows.packed_queries(options));
    for (q, rank) in [(q, 3), (of_rank_4(q), 4), (q, 4), (of_rank_4(q), 3)] {
        assert_eq!(&rows.call([q, k, v], rank, &packed), expected, "packed");
        assert_eq!(&rows.call([q, of_rank_4(k), of_rank_4(v)], rank, &packed), expected, "packed, rank 4");
    }

    let (padded_k, k_shape) = rows.padded(&rows.k, &rows.key_starts, HEADS_KV, f16::NAN);
    let (padded_v, v_shape) = rows.padded(&rows.v, &rows.key_starts, HEADS_KV, bf16::NAN);
    let padded = [tensor(&padded_k, F16, &k_shape), tensor(&padded_v, BF16, &v_shape)];
    let mixed = rows.padded_keys(rows.packed_queries(options));
    assert_eq!(&rows.call([q, padded[0], padded[1]], 3, &mixed), expected, "packed queries, padded keys");

    let pages = pages();
    let ((pool_k, shape_k, strides_k), (pool_v, shape_v, strides_v)) =
        (rows.pool(&rows.k, &pages, f16::NAN), rows.pool(&rows.v, &pages, bf16::NAN));
    let pool = [view(&pool_k, F16, shape_k, strides_k), view(&pool_v, BF16, shape_v, strides_v)];
    let tables = Tables::new(&pages);
    for table in tables.all(&rows.key_lengths) {
        let paged = Options { page_table: &table, ..rows.packed_queries(options) };
        assert_eq!(&rows.call([q, pool[0], pool[1]], 3, &paged), expected, "{table:?}");
    }

    // Padded queries: rows of padding stay as they are.
    let (padded_q, q_shape) = rows.padded(&rows.q, &rows.query_starts, HEADS, f32::NAN);
    let table = tables.all(&rows.key_lengths)[0];
    let lengths = Options { query_lengths: rows.query_lengths.as_ptr(), query_length_count: SEQUENCES, ..options };
    let kvs = [
        (rows.padded_keys(lengths), padded),
        (rows.packed_keys(lengths), [k, v]),
        (Options { page_table: &table, ..lengths }, pool),
    ];
    let untouched = (9.0f32).to_bits();
    let (expected_out, o_shape) = rows.padded(&expected.0, &rows.query_starts, HEADS, untouched);
    for (options, [k, v]) in kvs {
        let (mut out, mut lse) = (vec![9.0f32; expected_out.len()], vec![9.0f32; expected_out.len() / VALUE_DIM]);
        let o = tensor_mut(&mut out, F32, &o_shape);
        let l = tensor_mut(&mut lse, F32, &o_shape[..3]);
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_attention(&tensor(&padded_q, F32, &q_shape), &k, &v, &o, &l, &options) };
        assert_eq!(code, 0, "{}", last_error());
        assert_eq!(bits(&out), expected_out, "padded queries");
        for b in 0..LENGTHS.len() {
            for h in 0..HEADS {
                for i in 0..o_shape[2] as usize {
                    let got = lse[(b * HEADS + h) * o_shape[2] as usize + i].to_bits();
                    let row = rows.query_starts[b] as usize + i;
                    let own = i < LENGTHS[b].0;
                    assert_eq!(got, if own { expected.1[h * rows.queries() + row] } else { untouched });
                }
            }
        }
    }
}

#[test]
fn every_way_has_the_bits_of_single_calls() {
    let rows = Rows::new();
    let plain = Options::new();
    for options in [
        plain,
        Options { flags: flags::CAUSAL, threads: 1, ..plain },
        Options { flags: flags::CAUSAL, query_position: 1, form: 2, ..plain },
        Options { flags: flags::WINDOW_LEFT | flags::SOFTCAP, window_left: 3, softcap: 2.0, form: 1, ..plain },
    ] {
        check_all_ways(&rows, options, &rows.one_by_one(|_| options));
    }
    // Positions of each sequence.
    let offsets = [2i64, -1, 0, 40, 5];
    let at = |offsets: &[i64]| Options {
        flags: flags::CAUSAL,
        query_position: 3,
        query_offsets: offsets.as_ptr(),
        query_offset_count: offsets.len() as i64,
        ..plain
    };
    check_all_ways(&rows, at(&offsets), &rows.one_by_one(|b| at(&offsets[b..b + 1])));
}

/// A step that is planned once and run for several layers has the bits of calls; planned again, those of the other options. A failure
/// leaves it as it was.
#[test]
fn a_step_is_planned_once_for_all_layers() {
    let rows = Rows::new();
    let packed = rows.packed_keys(rows.packed_queries(Options { flags: flags::CAUSAL, ..Options::new() }));
    let sinks = [0.5f32, -1.0, 0.0, 2.0];
    let chunks = mask_of(3, &[5], []);
    let with_more = Options { sinks: sinks.as_ptr(), sink_count: 4, masks: &chunks, mask_count: 1, ..packed };
    let parallel = Options { threads: 2, flags: 0, ..packed };
    let [q, k, v] = rows.packed();
    let run = |step: *const PreparedStep, rows: &Rows| {
        let [q, k, v] = rows.packed();
        let queries = rows.queries() as i64;
        let (mut out, mut lse) = (vec![9.0; rows.queries() * HEADS * VALUE_DIM], vec![9.0; HEADS * rows.queries()]);
        let o = tensor_mut(&mut out, F32, &[queries, HEADS as i64, VALUE_DIM as i64]);
        let l = tensor_mut(&mut lse, F32, &[1, HEADS as i64, queries]);
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_prepared_run(step, &q, &k, &v, &o, &l) };
        assert_eq!(code, 0, "{}", last_error());
        (bits(&out), bits(&lse))
    };
    let mut step = std::ptr::null_mut();
    // SAFETY: all of these are what they say, and stay to the end of the test.
    assert_eq!(unsafe { flashtile_prepare(&q, &k, &v, &packed, &mut step) }, 0, "{}", last_error());
    for options in [packed, with_more, parallel, packed] {
        // SAFETY: as above.
        assert_eq!(unsafe { flashtile_prepared_replan(step, &q, &k, &v, &options) }, 0, "{}", last_error());
        for layer in [1.0, 0.25] {
            let mut rows = Rows::new();
            rows.q.iter_mut().for_each(|x| *x *= layer);
            assert_eq!(run(step, &rows), rows.call(rows.packed(), 3, &options));
        }
        // SAFETY: as above; the counts are wrong.
        let code = unsafe {
            let wrong = Options { key_start_count: SEQUENCES, ..packed };
            flashtile_prepared_replan(step, &q, &k, &v, &wrong)
        };
        assert_eq!((code, last_error().contains("key starts")), (Code::WrongCount as i32, true));
        assert_eq!(run(step, &rows), rows.call(rows.packed(), 3, &options));
    }
    // SAFETY: as above; the shapes are wrong.
    unsafe {
        let (mut out, narrow) = (vec![9.0f32; 11 * 4 * 5], Tensor { shape: [3, q.shape[1], q.shape[2], 0], ..q });
        let o = tensor_mut(&mut out, F32, &[11, 4, 5]);
        assert_eq!(flashtile_prepared_run(step, &narrow, &k, &v, &o, null()), Code::InvalidStarts as i32);
        assert_eq!(flashtile_prepared_run(step, &q, &k, &v, &q, null()), Code::Overlap as i32);
        assert_eq!(flashtile_prepared_run(null(), &q, &k, &v, &o, null()), Code::NullPointer as i32);
        assert!(out.iter().all(|&x| x == 9.0));
        assert_eq!(flashtile_prepare(&q, &k, &v, &packed, std::ptr::null_mut()), Code::NullPointer as i32);
        let mut none = std::ptr::null_mut();
        assert_eq!(flashtile_prepare(&q, &q, &v, &packed, &mut none), Code::InvalidStarts as i32, "{}", last_error());
        assert!(none.is_null());
        flashtile_prepared_free(step);
        flashtile_prepared_free(none);
    }
}

/// The mask of first keys counts the keys of each sequence from its own first one.
#[test]
fn a_mask_of_first_keys_counts_in_each_sequence() {
    let rows = Rows::new();
    let first = [2i64, 0, 1, 17, 0];
    let masks: Vec<Mask> = (0..LENGTHS.len()).map(|b| mask_of(7, &[], [&first[b..b + 1]])).collect();
    let causal = Options { flags: flags::CAUSAL, mask_count: 1, ..Options::new() };
    let expected = rows.one_by_one(|b| Options { masks: &masks[b], ..causal });
    assert_ne!(expected, rows.one_by_one(|_| Options { mask_count: 0, ..causal }), "it hides something");
    let mask = mask_of(7, &[], [&first]);
    check_all_ways(&rows, Options { masks: &mask, ..causal }, &expected);
}

/// Block-sparse masks have a row for each query of the longest sequence.
#[test]
fn blocks_are_those_of_the_longest_sequence() {
    let rows = Rows::new();
    // Blocks of 2 queries and 8 keys; 5 queries and 41 keys are the most.
    let kept: Vec<i64> = (0..3 * 6).map(|n| (n % 3 != 1).into()).collect();
    let columns: Vec<i64> = (0..18).filter(|n| n % 3 != 1).map(|n| n % 6).collect();
    let starts = [0i64, 4, 8, 12];
    let dense = mask_of(6, &[2, 8], [&kept]);
    let compressed = mask_of(8, &[2, 8], [&starts, &columns]);
    let options = |mask: &Mask| Options { masks: mask, mask_count: 1, ..Options::new() };
    let [q, k, v] = rows.packed();
    let expected = rows.call([q, k, v], 3, &rows.packed_keys(rows.packed_queries(options(&dense))));
    assert_ne!(expected, rows.one_by_one(|_| Options::new()), "it hides something");
    for mask in [dense, compressed] {
        check_all_ways(&rows, options(&mask), &expected);
    }
}

fn plan([q, k, v]: &[Tensor; 3], options: &Options) -> String {
    let mut text = [0u8; 512];
    // SAFETY: all of these are what they say.
    let code = unsafe { flashtile_plan(q, k, v, options, text.as_mut_ptr().cast(), text.len(), std::ptr::null_mut()) };
    assert_eq!(code, 0, "{}", last_error());
    std::ffi::CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap().to_owned()
}

#[test]
fn plans_are_those_of_rust() {
    let rows = Rows::new();
    let serial = Options { threads: 1, ..rows.packed_queries(Options::new()) };
    let attention = Attention::new().threads(Threads::Serial).query_starts(&rows.query_starts);
    let q = TensorRef::from_slice(&rows.q, [rows.queries(), HEADS, DIM]).unwrap();
    let k = TensorRef::from_slice(&rows.k, [rows.keys(), HEADS_KV, DIM]).unwrap();
    let v = TensorRef::from_slice(&rows.v, [rows.keys(), HEADS_KV, VALUE_DIM]).unwrap();
    let expected = attention.plan(q, KeysValues::packed(k, v, &rows.key_starts)).unwrap().to_string();
    assert_eq!(plan(&rows.packed(), &rows.packed_keys(serial)), expected);

    let pages = pages();
    let ((pool_k, shape_k, _), (pool_v, shape_v, _)) =
        (rows.pool(&rows.k, &pages, f16::NAN), rows.pool(&rows.v, &pages, bf16::NAN));
    let tables = Tables::new(&pages);
    let table = flashtile::PageTable::new(&tables.wide, WIDTH, &rows.key_lengths, PAGE).unwrap();
    let k = TensorRef::from_slice(&pool_k, shape_k.map(|n| n as usize)).unwrap();
    let v = TensorRef::from_slice(&pool_v, shape_v.map(|n| n as usize)).unwrap();
    let expected = attention.plan(q, KeysValues::paged(k, v, table)).unwrap().to_string();
    for table in tables.all(&rows.key_lengths) {
        let tensors = [rows.packed()[0], tensor(&pool_k, F16, &shape_k), tensor(&pool_v, BF16, &shape_v)];
        assert_eq!(plan(&tensors, &Options { page_table: &table, ..serial }), expected);
    }
}

#[test]
fn a_batch_may_have_no_sequences_and_no_pages() {
    let none: [f32; 0] = [];
    let (empty, start) = (tensor(&none, F32, &[0, 4, 8]), [0i64]);
    let packed = Options {
        query_starts: start.as_ptr(),
        query_start_count: 1,
        key_starts: start.as_ptr(),
        key_start_count: 1,
        ..Options::new()
    };
    // SAFETY: nothing is read.
    assert_eq!(unsafe { flashtile_attention(&empty, &empty, &empty, &empty, null(), &packed) }, 0, "{}", last_error());
    // Two sequences without keys: no pages, and no list of them.
    let (lengths, pool) = ([0i64; 2], tensor(&none, F32, &[0, 4, 16, 8]));
    let table = PageTable { lengths: lengths.as_ptr(), length_count: 2, page_size: 16, ..PageTable::new() };
    let (q, mut out) = (vec![1.0f32; 2 * 4 * 8], vec![9.0f32; 2 * 4 * 8]);
    let options = Options { page_table: &table, ..Options::new() };
    let (q, o) = (tensor(&q, F32, &[2, 4, 1, 8]), tensor_mut(&mut out, F32, &[2, 4, 1, 8]));
    // SAFETY: all of these are what they say.
    assert_eq!(unsafe { flashtile_attention(&q, &pool, &pool, &o, null(), &options) }, 0, "{}", last_error());
    assert_eq!(out, [0.0; 64]);
}

#[test]
fn what_does_not_fit_is_refused() {
    use Code::*;
    let rows = Rows::new();
    let (plain, [q, k, v]) = (Options::new(), rows.packed());
    let mut out = vec![9.0f32; rows.queries() * HEADS * VALUE_DIM];
    let o = tensor_mut(&mut out, F32, &[rows.queries() as i64, HEADS as i64, VALUE_DIM as i64]);
    let mut seen = BTreeSet::new();
    let mut check = |expected: Code, words: &str, [q, k, v, o]: [Tensor; 4], options: Options| {
        // SAFETY: memory is what it says wherever it is looked at before the call is refused.
        let code = unsafe { flashtile_attention(&q, &k, &v, &o, null(), &options) };
        let message = last_error();
        assert_eq!(code, expected as i32, "{words}: {message}");
        assert!(message.contains(words), "{message:?} does not say {words:?}");
        seen.insert(code);
        if expected == Overlap || words.contains("output") {
            return;
        }
        // SAFETY: as above; no text is wanted.
        let code = unsafe { flashtile_plan(&q, &k, &v, &options, std::ptr::null_mut(), 0, std::ptr::null_mut()) };
        assert_eq!((code, last_error()), (expected as i32, message), "a plan is refused alike");
    };
    let (queries, keys) = (rows.queries() as i64, rows.keys() as i64);
    let packed = rows.packed_keys(rows.packed_queries(plain));
    let bad: [i64; 6] = [0, 3, 2, 8, 9, 11];
    let stray = bad.as_ptr();

    // Lists of starts.
    let mut starts = |code, words: &str, options: Options| check(code, words, [q, k, v, o], options);
    starts(NullPointer, "query starts", Options { query_starts: null(), ..packed });
    starts(NullPointer, "key starts", Options { key_starts: null(), ..packed });
    starts(NegativeSize, "query starts", Options { query_start_count: -1, ..packed });
    starts(NegativeSize, "key starts", Options { key_start_count: i64::MIN, ..packed });
    starts(TooLarge, "query starts", Options { query_start_count: i64::MAX, ..packed });
    starts(Misaligned, "key starts", Options { key_starts: rows.key_starts.as_ptr().wrapping_byte_add(1), ..packed });
    starts(WrongCount, "0 query starts were given but there must be 1", Options { query_start_count: 0, ..packed });
    starts(WrongCount, "5 key starts were given but there must be 6", Options { key_start_count: 5, ..packed });
    starts(WrongCount, "0 key starts", Options { key_start_count: 0, ..packed });
    starts(
        InvalidStarts,
        "entry 2 of the query starts is 2 but must be between 3",
        Options { query_starts: stray, ..packed },
    );
    starts(InvalidStarts, "entry 2 of the key starts", Options { key_starts: stray, ..packed });
    let past = [0, 0, 0, 0, 0, queries + 1];
    starts(InvalidStarts, "entry 5 of the query starts is 12", Options { query_starts: past.as_ptr(), ..packed });
    let past = [0, 0, 0, 0, 0, keys + 1];
    starts(InvalidStarts, "entry 5 of the key starts is 58", Options { key_starts: past.as_ptr(), ..packed });
    let negative = [-1, 0, 0, 0, 0, 0i64];
    starts(InvalidStarts, "entry 0 of the query starts is -1", Options { query_starts: negative.as_ptr(), ..packed });
    let extreme = [i64::MIN, i64::MAX, i64::MIN, i64::MAX, 0, 0];
    starts(InvalidStarts, "key starts", Options { key_starts: extreme.as_ptr(), ..packed });
    starts(WrongCount, "query offsets", Options { query_position: 3, ..packed });

    // Options that exclude each other.
    let lengths = |options| Options { query_lengths: stray, query_length_count: 5, ..options };
    starts(InvalidOption, "query_lengths and query_starts are both set", lengths(packed));
    starts(InvalidOption, "key_lengths and key_starts are both set", rows.padded_keys(packed));
    let table = PageTable::new();
    starts(InvalidOption, "key_starts and page_table are both set", Options { page_table: &table, ..packed });
    let firsts = [0i64; 5];
    let first_keys = |options| Options { first_keys: firsts.as_ptr(), first_key_count: SEQUENCES, ..options };
    let first_queries = |options| Options { first_queries: firsts.as_ptr(), first_query_count: SEQUENCES, ..options };
    starts(InvalidOption, "first_keys and key_starts are both set", first_keys(packed));
    starts(InvalidOption, "first_queries and query_starts are both set", first_queries(packed));
    let paged = first_keys(Options { page_table: &table, ..rows.packed_queries(Options::new()) });
    starts(InvalidOption, "first_keys and page_table are both set", paged);
    let paged = Options { page_table: &table, ..rows.packed_queries(plain) };
    starts(InvalidOption, "key_lengths and page_table are both set", rows.padded_keys(paged));

    // Tensors that are not packed.
    starts(BadRank, "rank of the queries is 3 but must be 4; [total, heads, dim] is for", rows.packed_keys(plain));
    starts(BadRank, "rank of the keys is 3 but must be 4; [total, heads, dim] is for", rows.packed_queries(plain));
    let [q4, k4, v4] = [q, k, v].map(of_rank_4);
    let doubled = |x: Tensor| Tensor { shape: [2, x.shape[1], x.shape[2], x.shape[3]], ..x };
    check(ShapeMismatch, "batch of the queries is 2 but must be 1", [doubled(q4), k, v, o], packed);
    check(ShapeMismatch, "batch of the keys is 2 but must be 1", [q, doubled(k4), doubled(v4), o], packed);
    check(ShapeMismatch, "batch of the values", [q, k, doubled(v4), o], packed);
    check(ShapeMismatch, "batch of the keys is 1 but must be 5", [q, k4, v4, o], rows.packed_queries(plain));
    let short = Tensor { shape: [queries - 1, o.shape[1], o.shape[2], 0], ..o };
    check(ShapeMismatch, "seq_q of the output", [q, k, v, short], packed);
    check(BadRank, "rank of the output is 2 but must be 3 to 4", [q, k, v, Tensor { rank: 2, ..o }], packed);

    // Query lengths.
    let lists = |list: &[i64]| Options { query_lengths: list.as_ptr(), query_length_count: list.len() as i64, ..plain };
    let mut lengths = |code, words: &str, options| check(code, words, [q4, k4, v4, of_rank_4(o)], options);
    lengths(NullPointer, "query lengths", Options { query_length_count: 1, ..plain });
    lengths(NegativeSize, "query lengths", Options { query_length_count: -1, ..plain });
    lengths(WrongCount, "2 query lengths were given but there must be 1", lists(&[1, 1]));
    lengths(KeyLengthPastEnd, "query lengths of batch 0 are 12 but must be between 0 and 11", lists(&[12]));
    lengths(NegativeSize, "query lengths of batch 0 are -1", lists(&[-1]));

    // Page tables.
    let pages = pages();
    let ((pool_k, shape_k, strides_k), (pool_v, shape_v, strides_v)) =
        (rows.pool(&rows.k, &pages, f16::NAN), rows.pool(&rows.v, &pages, bf16::NAN));
    let [pk, pv] = [view(&pool_k, F16, shape_k, strides_k), view(&pool_v, BF16, shape_v, strides_v)];
    let tables = Tables::new(&pages);
    let [wide, _, compressed, compressed64] = tables.all(&rows.key_lengths);
    let queries_packed = rows.packed_queries(plain);
    let mut tensors = [q, pk, pv, o];
    let mut refuse = |code, words: &str, tensors: [Tensor; 4], table: PageTable| {
        check(code, words, tensors, Options { page_table: &table, ..queries_packed });
    };
    refuse(NullPointer, "pages of the page table", tensors, PageTable { pages32: null(), ..wide });
    refuse(NegativeSize, "pages of the page table", tensors, PageTable { page_count: -1, ..wide });
    refuse(NegativeSize, "pages of the page table", tensors, PageTable { page_count: -1, ..compressed64 });
    let odd = tables.wide.as_ptr().wrapping_byte_add(1);
    refuse(Misaligned, "pages of the page table", tensors, PageTable { pages32: odd, ..wide });
    refuse(TooLarge, "pages of the page table", tensors, PageTable { page_count: i64::MAX, ..wide });
    let both = PageTable { pages64: tables.wide64.as_ptr(), ..wide };
    refuse(InvalidOption, "pages32 and pages64 of the page table are both set", tensors, both);
    let both = PageTable { starts: compressed.starts, start_count: compressed.start_count, ..wide };
    refuse(InvalidOption, "width and starts of the page table are both set", tensors, both);
    refuse(InvalidOption, "set the width", tensors, PageTable { width: 0, ..wide });
    refuse(NegativeSize, "width", tensors, PageTable { width: -1, ..wide });
    refuse(NegativeSize, "page_size", tensors, PageTable { page_size: -4, ..wide });
    refuse(InvalidPages, "page_size of the page table is 0", tensors, PageTable { page_size: 0, ..wide });
    refuse(
        WrongCount,
        "60 entries of the page table were given but there must be 55",
        tensors,
        PageTable { width: 11, ..wide },
    );
    refuse(WrongCount, "entries of the page table", tensors, PageTable { width: i64::MAX, ..wide });
    refuse(NullPointer, "lengths of the page table", tensors, PageTable { lengths: null(), ..wide });
    refuse(WrongCount, "sequences of the page table", tensors, PageTable { length_count: 4, page_count: 48, ..wide });
    let of = |lengths: &[i64; 5], table| PageTable { lengths: lengths.as_ptr(), ..table };
    let long = [49, 0, 0, 0, 0];
    refuse(
        InvalidPages,
        "length of sequence 0 in the page table is 49 but must be between 0 and 48",
        tensors,
        of(&long, wide),
    );
    let long = [0, 0, 9, 0, 0];
    refuse(
        InvalidPages,
        "length of sequence 2 in the page table is 9 but must be between 0 and 8",
        tensors,
        of(&long, compressed),
    );
    let negative = [0, 0, 0, -1, 0];
    refuse(NegativeSize, "lengths of the page table is -1", tensors, of(&negative, wide));
    let huge = [i64::MAX; 5];
    refuse(InvalidPages, "length of sequence 0", tensors, of(&huge, wide));
    let unlisted = [9, 0, 0, 0, 0];
    refuse(InvalidPages, "a page of sequence 0 in the page table is -1", tensors, of(&unlisted, wide));
    let largest = [i64::MAX; 60];
    let beyond = PageTable { pages32: null(), pages64: largest.as_ptr(), ..wide };
    refuse(InvalidPages, "a page of sequence 0 in the page table is 9223372036854775807", tensors, beyond);
    refuse(NullPointer, "starts of the page table", tensors, PageTable { starts: null(), ..compressed });
    refuse(NegativeSize, "starts of the page table", tensors, PageTable { start_count: -6, ..compressed });
    refuse(
        WrongCount,
        "5 starts of the page table were given but there must be 6",
        tensors,
        PageTable { start_count: 5, ..compressed },
    );
    refuse(
        InvalidStarts,
        "entry 2 of the starts of the page table",
        tensors,
        PageTable { starts: stray, ..compressed },
    );
    refuse(
        Misaligned,
        "starts of the page table",
        tensors,
        PageTable { starts: stray.wrapping_byte_add(4), ..compressed },
    );
    let zeros = [0i64; 5];
    let other = PageTable { page_size: 3, ..of(&zeros, wide) };
    refuse(ShapeMismatch, "page_size of the keys is 4 but must be 3", tensors, other);
    // A pool that lacks the last page.
    (tensors[1].shape[0], tensors[2].shape[0]) = (16, 16);
    refuse(InvalidPages, "the page table names page 16, but the pool has 16 pages", tensors, compressed);
    tensors[1].shape[0] = 17;
    refuse(ShapeMismatch, "batch of the values is 16 but must be 17", tensors, compressed);
    tensors[2] = Tensor { shape: [17, 2, 3, 5], ..pv };
    refuse(ShapeMismatch, "seq_kv of the values is 3 but must be 4", tensors, wide);
    let misaligned = (&raw const wide).wrapping_byte_add(1);
    check(Misaligned, "page table", [q, pk, pv, o], Options { page_table: misaligned, ..queries_packed });

    // Masks that are made for the longest sequence are made after the lists are checked.
    let blocks = mask_of(8, &[2, 8], [&[0, 1], &[0]]);
    let masked = |options| Options { masks: &blocks, mask_count: 1, ..options };
    check(InvalidStarts, "key starts", [q, k, v, o], masked(Options { key_starts: extreme.as_ptr(), ..packed }));
    check(WrongCount, "blocks of queries", [q, k, v, o], masked(packed));

    // Outputs over lists.
    let over = o.data.cast_const();
    let list = || over.cast::<i64>();
    check(Overlap, "query starts", [q, k, v, o], Options { query_starts: list(), query_start_count: 1, ..packed });
    check(Overlap, "key starts", [q, k, v, o], Options { key_starts: list(), key_start_count: 1, ..packed });
    let lengths = Options { query_lengths: list(), query_length_count: 1, ..plain };
    check(Overlap, "query lengths", [q4, k4, v4, of_rank_4(o)], lengths);
    let firsts = Options { first_queries: list(), first_query_count: 1, ..plain };
    check(Overlap, "first queries", [q4, k4, v4, of_rank_4(o)], firsts);
    let firsts = Options { first_keys: list(), first_key_count: 1, ..plain };
    check(Overlap, "first keys", [q4, k4, v4, of_rank_4(o)], firsts);
    // Zeros, which are valid entries of any list.
    // SAFETY: within the output, which nothing else uses now.
    unsafe { o.data.write_bytes(0, 100 * 4) };
    for (words, table) in [
        ("pages of the page table", PageTable { pages32: over.cast(), ..compressed }),
        ("pages of the page table", PageTable { pages64: list(), ..compressed64 }),
        ("lengths of the page table", PageTable { lengths: list(), ..compressed }),
        ("starts of the page table", PageTable { starts: list(), ..of(&zeros, compressed) }),
    ] {
        check(Overlap, words, [q, pk, pv, o], Options { page_table: &table, ..queries_packed });
    }
    assert!(seen.contains(&21) && seen.contains(&22));
    assert!(out[100..].iter().all(|&x| x == 9.0), "a refused call writes nothing");
}
