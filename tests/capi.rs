//! Promise: the C interface computes what Rust's does, bit for bit. It refuses every wrong call with a code and a message. It
//! works from C and from Python.
//!
//! Without a C compiler, or without Python and numpy, part of this is skipped with a message. With FLASHTILE_EXPECT_CC=1 and
//! FLASHTILE_EXPECT_PYTHON=1 a skip is a failure. FLASHTILE_LIBRARY names a library that is built already.

#[path = "capi/caches.rs"]
mod caches;
#[path = "capi/rotary.rs"]
mod rotary;
#[path = "capi/sequences.rs"]
mod sequences;
mod support;

use flashtile::capi::*;
use flashtile::mask::{BlockSparse, Chunked, Documents, FirstAndLast, KeyStarts, PrefixLm, Tree};
use flashtile::score::{RelativeBias, ScoreMod, WindowBias, score_fn};
use flashtile::{AlibiSlopes, Attention, Form, Level, QueryOffset, TensorMut, TensorRef, Workspace, bf16, f16};
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_void};
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::counting::Counting;
use support::watchdog::within;
use support::{Rng, len};

/// One test alone is watched: that of decoding steps over caches.
#[global_allocator]
static COUNTING: Counting = Counting::new();

const F32: i32 = 1;
const F16: i32 = 2;
const BF16: i32 = 3;
const F64: i32 = 4;
const BYTE: i32 = 5;

/// A tensor without gaps.
fn tensor<T>(data: &[T], dtype: i32, shape: &[i64]) -> Tensor {
    let mut tensor =
        Tensor { data: data.as_ptr() as *mut c_void, dtype, rank: shape.len() as i32, shape: [0; 4], strides: [0; 4] };
    tensor.shape[..shape.len()].copy_from_slice(shape);
    let mut stride = 1i64;
    for axis in (0..shape.len()).rev() {
        tensor.strides[axis] = stride;
        stride = stride.wrapping_mul(shape[axis]);
    }
    tensor
}

fn tensor_mut<T>(data: &mut [T], dtype: i32, shape: &[i64]) -> Tensor {
    Tensor { data: data.as_mut_ptr().cast(), ..tensor(data, dtype, shape) }
}

fn last_error() -> String {
    // SAFETY: a string that stays where it is until this thread's next failure.
    unsafe { CStr::from_ptr(flashtile_last_error()) }.to_str().unwrap().to_owned()
}

fn random(len: usize) -> Vec<f32> {
    let mut rng = Rng(len as u64);
    (0..len).map(|_| rng.uniform()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

const SHAPE_Q: [usize; 4] = [2, 4, 7, 16];
const SHAPE_K: [usize; 4] = [2, 2, 30, 16];
const SCORES: [usize; 4] = [2, 4, 7, 30];

fn as_i64<const N: usize>(shape: [usize; N]) -> [i64; N] {
    shape.map(|n| n as i64)
}

/// The inputs of every small problem here.
struct Inputs {
    q: Vec<f32>,
    k: Vec<f16>,
    v: Vec<bf16>,
}

impl Inputs {
    fn new() -> Self {
        let (q, k) = (random(len(SHAPE_Q)), random(len(SHAPE_K)));
        let v = k.iter().rev().map(|&x| bf16::from_f32(x)).collect();
        Inputs { q, k: k.into_iter().map(f16::from_f32).collect(), v }
    }

    /// Output, lse and key sums.
    fn through_rust(&self, attention: &Attention<'_>) -> [Vec<u32>; 3] {
        let (mut out, mut lse, mut sums) = (vec![9.0; len(SHAPE_Q)], vec![9.0; 2 * 4 * 7], vec![9.0; 2 * 4 * 30]);
        let q = TensorRef::from_slice(&self.q, SHAPE_Q).unwrap();
        let kv = (TensorRef::from_slice(&self.k, SHAPE_K).unwrap(), TensorRef::from_slice(&self.v, SHAPE_K).unwrap());
        let into = TensorMut::from_slice(&mut out, SHAPE_Q).unwrap();
        let lse_into = TensorMut::from_slice(&mut lse, [2, 4, 7]).unwrap();
        attention.compute(q, kv, into, lse_into, &mut Workspace::new()).unwrap();
        let rows = TensorRef::from_slice(&lse, [2, 4, 7]).unwrap();
        let into = TensorMut::from_slice(&mut sums, [2, 4, 30]).unwrap();
        attention.key_sums(q, kv, rows, into, &mut Workspace::new()).unwrap();
        [bits(&out), bits(&lse), bits(&sums)]
    }

    fn tensors(&self) -> [Tensor; 3] {
        let k = as_i64(SHAPE_K);
        [tensor(&self.q, F32, &as_i64(SHAPE_Q)), tensor(&self.k, F16, &k), tensor(&self.v, BF16, &k)]
    }

    fn through_c(&self, options: *const Options) -> [Vec<u32>; 3] {
        let (mut out, mut lse, mut sums) = (vec![9.0; len(SHAPE_Q)], vec![9.0; 2 * 4 * 7], vec![9.0; 2 * 4 * 30]);
        let [q, k, v] = self.tensors();
        let (o, l) = (tensor_mut(&mut out, F32, &as_i64(SHAPE_Q)), tensor_mut(&mut lse, F32, &[2, 4, 7]));
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_attention(&q, &k, &v, &o, &l, options) };
        assert_eq!(code, 0, "{}", last_error());
        let s = tensor_mut(&mut sums, F32, &[2, 4, 30]);
        // SAFETY: as above.
        let code = unsafe { flashtile_key_sums(&q, &k, &v, &l, &s, options) };
        assert_eq!(code, 0, "{}", last_error());
        [bits(&out), bits(&lse), bits(&sums)]
    }
}

#[test]
fn results_are_those_of_rust() {
    let inputs = Inputs::new();
    let plain = Options::new();
    let (lengths, c_lengths) = ([30usize, 11], [30i64, 11]);
    let (offsets, c_offsets) = ([-3isize, 8], [-3i64, 8]);
    let firsts = [[2i64, 0], [9, 30]];
    let slopes = [0.5f32, -0.25, 0.0, 1.0];
    let all_slopes = [0.5f32, -0.25, 0.0, 1.0, 0.1, 0.2, 0.3, 0.4];
    let bytes: Vec<u8> = (0..len(SCORES)).map(|n| if n % 3 == 0 { 0 } else { n as u8 | 1 }).collect();
    let bools: Vec<bool> = bytes.iter().map(|&byte| byte != 0).collect();
    let all_bools = TensorRef::from_slice(&bools, SCORES).unwrap();
    let mask = tensor(&bytes, BYTE, &as_i64(SCORES));
    let row: Vec<f16> = random(30).into_iter().map(f16::from_f32).collect();
    let bias = tensor(&row, F16, &[30]);
    let portable = CString::new("portable").unwrap();
    let attention = Attention::new;
    let cases = [
        (plain, attention()),
        (Options { flags: flags::CAUSAL, ..plain }, attention().causal()),
        (Options { flags: flags::SCALE, scale: -0.5, ..plain }, attention().scale(-0.5)),
        (Options { flags: flags::SCALE, ..plain }, attention().scale(0.0)),
        (Options { flags: flags::SOFTCAP, softcap: 2.0, ..plain }, attention().softcap(2.0)),
        (Options { flags: flags::WINDOW_LEFT, window_left: 3, ..plain }, attention().window(Some(3), None)),
        (Options { flags: flags::WINDOW_RIGHT, ..plain }, attention().window(None, Some(0))),
        (
            Options { flags: flags::CAUSAL, query_position: 1, ..plain },
            attention().causal().query_offset(QueryOffset::FromStart),
        ),
        (
            Options { flags: flags::CAUSAL, query_position: 2, query_offset: -2, ..plain },
            attention().causal().query_offset(QueryOffset::At(-2)),
        ),
        (
            Options {
                flags: flags::CAUSAL,
                query_position: 3,
                query_offsets: c_offsets.as_ptr(),
                query_offset_count: 2,
                ..plain
            },
            attention().causal().query_offset(QueryOffset::per_batch(&offsets)),
        ),
        (Options { key_lengths: c_lengths.as_ptr(), key_length_count: 2, ..plain }, attention().key_lengths(&lengths)),
        (
            Options {
                flags: flags::CAUSAL,
                mask: &mask,
                first_queries: firsts[0].as_ptr(),
                first_query_count: 2,
                first_keys: firsts[1].as_ptr(),
                first_key_count: 2,
                ..plain
            },
            attention().causal().mask(all_bools).first_queries(&firsts[0]).first_keys(&firsts[1]),
        ),
        (Options { alibi: 1, ..plain }, attention().alibi(AlibiSlopes::Standard)),
        (
            Options { alibi: 2, alibi_slopes: slopes.as_ptr(), alibi_slope_count: 4, ..plain },
            attention().alibi(AlibiSlopes::PerHead(&slopes)),
        ),
        (
            Options { alibi: 3, alibi_slopes: all_slopes.as_ptr(), alibi_slope_count: 8, ..plain },
            attention().alibi(AlibiSlopes::PerBatchAndHead(&all_slopes)),
        ),
        (Options { mask: &mask, ..plain }, attention().mask(all_bools)),
        (Options { bias: &bias, ..plain }, attention().bias(TensorRef::from_slice(&row, [30]).unwrap())),
        (Options { form: 1, ..plain }, attention().form(Form::Decode)),
        (Options { form: 2, ..plain }, attention().form(Form::Prefill)),
        (Options { level: portable.as_ptr(), ..plain }, attention().level(Level::Portable)),
        (Options { threads: 1, ..plain }, attention()),
    ];
    for (options, attention) in cases {
        assert_eq!(inputs.through_c(&options), inputs.through_rust(&attention), "{options:?}");
    }
    assert_eq!(inputs.through_c(null()), inputs.through_rust(&attention()));
}

fn mask_of<const N: usize>(kind: i32, numbers: &[i64], lists: [&[i64]; N]) -> Mask {
    let mut mask = Mask::new(kind);
    mask.numbers[..numbers.len()].copy_from_slice(numbers);
    for (n, list) in lists.into_iter().enumerate() {
        (mask.lists[n], mask.counts[n]) = (list.as_ptr(), list.len() as i64);
    }
    mask
}

fn with_masks(masks: &[Mask]) -> Options {
    Options { masks: masks.as_ptr(), mask_count: masks.len() as i64, ..Options::new() }
}

#[test]
fn masks_are_those_of_rust() {
    let inputs = Inputs::new();
    let mut rng = Rng(4);
    let mut numbers = |len: usize, below: usize| -> Vec<i64> { (0..len).map(|_| rng.below(below) as i64).collect() };
    let (queries, keys, own_queries, own_keys) = (numbers(7, 3), numbers(30, 3), numbers(14, 3), numbers(60, 3));
    let parents = [-1i64, 0, 0, 1, -1, 4, 3];
    let kept = numbers(4 * 2 * 6, 2);
    let kept_bools: Vec<bool> = kept.iter().map(|&kept| kept != 0).collect();
    let documents = Documents::new(&queries, &keys);
    let own_documents = Documents::per_sequence(2, &own_queries, &own_keys).unwrap();
    let prefix = PrefixLm::new(&[0..3, 22..28]).unwrap();
    let (chunked, streaming, tree) = (Chunked::new(4), FirstAndLast::new(2, 3), Tree::new(&parents).unwrap());
    let blocks = BlockSparse::new([4, 5], [1, 4, 2, 6], &kept_bools).unwrap();
    let rows = BlockSparse::from_rows([4, 5], 6, &[0, 3, 4], &[0, 2, 5, 1]).unwrap();
    let starts = KeyStarts::new(&[3i64, -1]);
    let cases: [(Mask, &dyn flashtile::mask::Mask); 9] = [
        (mask_of(1, &[], [&queries, &keys]), &documents),
        (mask_of(1, &[2], [&own_queries, &own_keys]), &own_documents),
        (mask_of(2, &[], [&[0, 22], &[3, 28]]), &prefix),
        (mask_of(3, &[4], []), &chunked),
        (mask_of(4, &[2, 3], []), &streaming),
        (mask_of(5, &[], [&parents]), &tree),
        (mask_of(6, &[4, 5, 1, 4], [&kept]), &blocks),
        (mask_of(7, &[], [&[3, -1]]), &starts),
        (mask_of(8, &[4, 5], [&[0, 3, 4], &[0, 2, 5, 1]]), &rows),
    ];
    let plain = inputs.through_rust(&Attention::new());
    for (n, (mask, ready)) in cases.iter().enumerate() {
        let attention = Attention::new().masked_by(*ready);
        let expected = inputs.through_rust(&attention);
        assert_ne!(expected, plain, "{mask:?} hides nothing");
        assert_eq!(inputs.through_c(&with_masks(&[*mask])), expected, "{mask:?}");
        let (other, other_ready) = cases[(n + 4) % cases.len()];
        let both = inputs.through_rust(&attention.masked_by(other_ready).causal());
        let options = Options { flags: flags::CAUSAL, ..with_masks(&[*mask, other]) };
        assert_eq!(inputs.through_c(&options), both, "{options:?}");
    }
    // Numbers that say nothing: one batch and one head are all.
    let shared = mask_of(6, &[7, 30], [&[1]]);
    assert_eq!(inputs.through_c(&with_masks(&[shared])), plain);
}

fn table_of(kind: i32, numbers: &[i64], table: &[f32]) -> ScoreTable {
    let mut result = ScoreTable { table: table.as_ptr(), count: table.len() as i64, ..ScoreTable::new(kind) };
    result.numbers[..numbers.len()].copy_from_slice(numbers);
    result
}

fn with_tables(tables: &[ScoreTable]) -> Options {
    Options { score_tables: tables.as_ptr(), score_table_count: tables.len() as i64, ..Options::new() }
}

#[test]
fn score_tables_are_those_of_rust() {
    let inputs = Inputs::new();
    let [distances, buckets] = [4 * 11, 6 * 4].map(random);
    let relative = RelativeBias::new(4, 5, &distances).unwrap();
    let decoder = RelativeBias::t5(4, false, 20, &buckets).unwrap();
    let encoder = RelativeBias::t5(4, true, 20, &buckets).unwrap();
    let cases: [(ScoreTable, &dyn ScoreMod); 3] = [
        (table_of(1, &[5], &distances), &relative),
        (table_of(2, &[20], &buckets), &decoder),
        (table_of(2, &[20, 1], &buckets), &encoder),
    ];
    for (n, (table, score_mod)) in cases.iter().enumerate() {
        let attention = Attention::new().query_offset(QueryOffset::At(10)).modified_by(*score_mod);
        let at = |options| Options { query_position: 2, query_offset: 10, ..options };
        assert_eq!(inputs.through_c(&at(with_tables(&[*table]))), inputs.through_rust(&attention), "{table:?}");
        // A second table comes after the first, and a function after both.
        let (other, other_mod) = cases[(n + 1) % cases.len()];
        let function = score_fn(|score, pair| {
            let [batch, head, query, key] = [pair.batch(), pair.head(), pair.query(), pair.key()].map(|n| n as i64);
            modified(score, [batch, head, query, pair.position() as i64, key])
        });
        let all = inputs.through_rust(&attention.modified_by(other_mod).modified_by(&function));
        let calls = AtomicUsize::new(0);
        let options = Options {
            score_row: Some(modify_row),
            score_context: (&raw const calls).cast_mut().cast(),
            ..at(with_tables(&[*table, other]))
        };
        assert_eq!(inputs.through_c(&options), all, "{options:?}");
    }
}

/// Queries and keys are the places of a window of 2 x 3.
#[test]
fn window_biases_are_those_of_rust() {
    let x = random(4 * 6 * 8);
    let table = random(3 * 5 * 4);
    let bias = WindowBias::new(4, [2, 3], &table).unwrap();
    let shape = [1, 4, 6, 8];
    let view = TensorRef::from_slice(&x, shape).unwrap();
    let mut expected = vec![0.0f32; x.len()];
    let into = TensorMut::from_slice(&mut expected, shape).unwrap();
    Attention::new().modified_by(&bias).compute(view, (view, view), into, None, &mut Workspace::new()).unwrap();
    let own = tensor(&x, F32, &as_i64(shape));
    let mut out = vec![0.0f32; x.len()];
    let written = Tensor { data: out.as_mut_ptr().cast(), ..own };
    let tables = [table_of(3, &[2, 3], &table)];
    let options = with_tables(&tables);
    // SAFETY: tensors and options lead to memory that outlives the call.
    let code = unsafe { flashtile_attention(&own, &own, &own, &written, null(), &options) };
    assert_eq!(code, 0);
    assert_eq!(out, expected);
}

#[test]
fn wrong_key_sums_are_refused() {
    let inputs = Inputs::new();
    let ([q, k, v], lse, mut sums) = (inputs.tensors(), [0.0f32; 2 * 4 * 7], [7.5f32; 2 * 4 * 30]);
    let longer = [0.0f32; 2 * 4 * 30];
    let (l, s) = (tensor(&lse, F32, &[2, 4, 7]), tensor_mut(&mut sums, F32, &[2, 4, 30]));
    let check = |expected: Code, words: &str, [lse, sums]: [*const Tensor; 2], options: *const Options| {
        // SAFETY: memory is what it says wherever it is looked at before the call is refused.
        let code = unsafe { flashtile_key_sums(&q, &k, &v, lse, sums, options) };
        let message = last_error();
        assert_eq!(code, expected as i32, "{words}: {message}");
        assert!(message.contains(words), "{message:?} does not say {words:?}");
    };
    check(Code::NullPointer, "lse", [null(), &s], null());
    check(Code::NullPointer, "sums", [&l, null()], null());
    check(Code::BadDtype, "lse", [&Tensor { dtype: F16, ..l }, &s], null());
    check(Code::BadRank, "sums", [&l, &Tensor { rank: 4, ..s }], null());
    check(Code::ShapeMismatch, "seq_q of the lse is 30", [&tensor(&longer, F32, &[2, 4, 30]), &s], null());
    check(Code::ShapeMismatch, "seq_kv of the sums is 29", [&l, &Tensor { shape: [2, 4, 29, 0], ..s }], null());
    check(Code::Overlap, "lse", [&Tensor { data: s.data, ..l }, &s], null());
    check(Code::Overlap, "queries", [&l, &Tensor { data: q.data, ..s }], null());
    let sinks = Options { sinks: s.data.cast(), sink_count: 4, ..Options::new() };
    check(Code::Overlap, "sinks", [&l, &s], &sinks);
    assert_eq!(sums, [7.5; 2 * 4 * 30]);
}

#[test]
fn sinks_are_those_of_rust() {
    let inputs = Inputs::new();
    let sinks = [0.5f32, f32::NEG_INFINITY, 9.0, -3.0];
    let options = Options { sinks: sinks.as_ptr(), sink_count: 4, ..Options::new() };
    assert_eq!(inputs.through_c(&options), inputs.through_rust(&Attention::new().sinks(&sinks)));
}

/// `score * 1.5 - slope * |position - key|`, where the slope depends on batch, head and query; every seventh key is hidden.
fn modified(score: f32, [batch, head, query, position, key]: [i64; 5]) -> f32 {
    let slope = (batch + 2 * head + 3 * query) as f32 * 0.01;
    if key % 7 == 3 { f32::NEG_INFINITY } else { score * 1.5 - slope * (position - key).abs() as f32 }
}

/// Counts its calls in `context`.
unsafe extern "C" fn modify_row(context: *mut c_void, row: *const Row, scores: *mut f32, count: i64) {
    // SAFETY: the context is the counter of the test, the rest is what the library promises.
    let (calls, row, scores) =
        unsafe { (&*context.cast::<AtomicUsize>(), *row, std::slice::from_raw_parts_mut(scores, count as usize)) };
    calls.fetch_add(1, Ordering::Relaxed);
    for (score, key) in scores.iter_mut().zip(row.first_key..) {
        *score = modified(*score, [row.batch, row.head, row.query, row.position, key]);
    }
}

#[test]
fn score_functions_are_those_of_rust() {
    let inputs = Inputs::new();
    let calls = AtomicUsize::new(0);
    let same = score_fn(|score, pair| {
        let numbers = [pair.batch(), pair.head(), pair.query(), pair.position() as usize, pair.key()];
        modified(score, numbers.map(|n| n as i64))
    });
    for form in [1, 2] {
        calls.store(0, Ordering::Relaxed);
        let options = Options {
            form,
            flags: flags::CAUSAL | flags::SOFTCAP,
            softcap: 3.0,
            score_row: Some(modify_row),
            score_context: (&raw const calls).cast_mut().cast(),
            ..Options::new()
        };
        let attention = Attention::new().causal().softcap(3.0).modified_by(&same);
        let form = [Form::Decode, Form::Prefill][form as usize - 1];
        assert_eq!(inputs.through_c(&options), inputs.through_rust(&attention.form(form)), "{form}");
        // All keys fit into one run, and lanes without a query are not asked for.
        // Attention, and the key sums.
        assert_eq!(calls.load(Ordering::Relaxed), 2 * (2 * 4 * 7), "{form}");
    }
}

/// What a nested call needs, and where it puts its result.
struct Nested {
    shape: [i64; 4],
    x: Vec<f32>,
    expected: Vec<u32>,
    right: AtomicUsize,
    wrong: AtomicUsize,
}

impl Nested {
    fn compute(&self, threads: i32) -> (i32, Vec<u32>) {
        let (x, mut out) = (tensor(&self.x, F32, &self.shape), vec![0.0; self.x.len()]);
        let o = tensor_mut(&mut out, F32, &self.shape);
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_attention(&x, &x, &x, &o, null(), &Options { threads, ..Options::new() }) };
        (code, bits(&out))
    }
}

unsafe extern "C" fn calls_again(context: *mut c_void, row: *const Row, _: *mut f32, _: i64) {
    // SAFETY: the context is that of the test, the row is what the library promises.
    let (nested, row) = unsafe { (&*context.cast::<Nested>(), *row) };
    if row.query % 64 != 0 {
        return;
    }
    let threads = if cfg!(feature = "rayon") { [0, 1, 2, 3][row.query as usize / 64] } else { 0 };
    let is_right = nested.compute(threads) == (0, nested.expected.clone());
    (if is_right { &nested.right } else { &nested.wrong }).fetch_add(1, Ordering::Relaxed);
    flashtile_release();
}

/// A score function may call the library, on any number of threads, and release its threads.
#[test]
fn calls_from_score_functions_finish() {
    within(60, "calls from score functions", || {
        let shape = [1, 4, 256, 64];
        let mut nested = Nested {
            shape: as_i64(shape),
            x: random(len(shape)),
            expected: Vec::new(),
            right: AtomicUsize::new(0),
            wrong: AtomicUsize::new(0),
        };
        nested.expected = nested.compute(0).1;
        let x = tensor(&nested.x, F32, &nested.shape);
        for threads in if cfg!(feature = "rayon") { vec![0, 1, 2, 3] } else { vec![0] } {
            let mut out = vec![0.0; len(shape)];
            let o = tensor_mut(&mut out, F32, &nested.shape);
            let options = Options {
                threads,
                score_row: Some(calls_again),
                score_context: (&raw const nested).cast_mut().cast(),
                ..Options::new()
            };
            // SAFETY: all of these are what they say.
            assert_eq!(unsafe { flashtile_attention(&x, &x, &x, &o, null(), &options) }, 0, "{}", last_error());
            assert_eq!(nested.wrong.load(Ordering::Relaxed), 0, "{threads} threads");
            // Four queries of each of four heads, in one run of keys or several.
            assert!(nested.right.swap(0, Ordering::Relaxed) >= 16, "{threads} threads");
        }
    });
}

/// Enough work that threads are used.
#[test]
fn any_number_of_threads_gives_the_same() {
    let shape = [1, 4, 256, 64];
    let x = random(len(shape));
    let t = tensor(&x, F32, &as_i64(shape));
    let run = |threads| {
        let mut out = vec![0.0; len(shape)];
        let o = tensor_mut(&mut out, F32, &as_i64(shape));
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_attention(&t, &t, &t, &o, null(), &Options { threads, ..Options::new() }) };
        (code, bits(&out))
    };
    let expected = run(1);
    assert_eq!(expected.0, 0);
    for threads in [0, 2, 3, 2] {
        if cfg!(feature = "rayon") || threads == 0 {
            assert!(run(threads) == expected, "{threads} threads: {}", last_error());
        } else {
            assert_eq!(run(threads).0, Code::Threads as i32);
        }
        flashtile_release();
    }
}

#[test]
fn every_wrong_call_has_its_code() {
    let inputs = Inputs::new();
    let [q, k, v] = inputs.tensors();
    let mut memory = vec![0.0f32; len(SHAPE_Q) + 1];
    let out = tensor_mut(&mut memory[..len(SHAPE_Q)], F32, &as_i64(SHAPE_Q));
    let mut lse_memory = vec![0.0f32; 2 * 4 * 7];
    let lse = tensor_mut(&mut lse_memory, F32, &[2, 4, 7]);
    let plain = Options::new();
    let list = [1i64, -1, 31];
    let negative = list[1..].as_ptr();
    let shifted = |tensor: Tensor| Tensor { data: tensor.data.wrapping_byte_add(1), ..tensor };
    let shaped = |tensor: Tensor, axis: usize, size: i64| {
        let mut tensor = tensor;
        tensor.shape[axis] = size;
        tensor
    };
    let strided = |tensor: Tensor, axis: usize, stride: i64| {
        let mut tensor = tensor;
        tensor.strides[axis] = stride;
        tensor
    };
    let mask = tensor(&[1u8; 30], BYTE, &[30]);
    let wrong_mask = tensor(&[1u8; 29], BYTE, &[29]);
    let bias = tensor(&[0.0f64; 30], F64, &[30]);
    let nonsense = CString::new("nonsense").unwrap();
    let mut seen = BTreeSet::new();
    let mut check = |expected: Code, words: &str, [q, k, v, out, lse]: [*const Tensor; 5], options: *const Options| {
        // SAFETY: memory is what it says wherever it is looked at before the call is refused.
        let code = unsafe { flashtile_attention(q, k, v, out, lse, options) };
        let message = last_error();
        assert_eq!(code, expected as i32, "{words}: {message}");
        assert!(message.contains(words), "{message:?} does not say {words:?}");
        seen.insert(code);
    };
    use Code::*;
    let all = [&raw const q, &raw const k, &raw const v, &raw const out, &raw const lse];
    for (n, name) in ["queries", "keys", "values", "output", "lse"].into_iter().enumerate() {
        let with = |tensor: *const Tensor| {
            let mut tensors = all;
            tensors[n] = tensor;
            tensors
        };
        // SAFETY: tensors of this test.
        let tensor = unsafe { *all[n] };
        if name != "lse" {
            check(NullPointer, name, with(null()), &plain);
        }
        check(NullPointer, name, with(&Tensor { data: null_mut(), ..tensor }), &plain);
        check(Misaligned, name, with(all[n].wrapping_byte_add(1)), &plain);
        check(Misaligned, name, with(&shifted(tensor)), &plain);
        check(BadDtype, "0 is no dtype", with(&Tensor { dtype: 0, ..tensor }), &plain);
        check(BadDtype, "6 is no dtype", with(&Tensor { dtype: 6, ..tensor }), &plain);
        check(BadDtype, "-1 is no dtype", with(&Tensor { dtype: -1, ..tensor }), &plain);
        check(BadDtype, name, with(&Tensor { dtype: BYTE, ..tensor }), &plain);
        check(BadRank, name, with(&Tensor { rank: 2, ..tensor }), &plain);
        check(BadRank, "-1", with(&Tensor { rank: -1, ..tensor }), &plain);
        check(BadRank, "5", with(&Tensor { rank: 5, ..tensor }), &plain);
        check(NegativeSize, "-3", with(&shaped(tensor, 1, -3)), &plain);
        check(TooLarge, name, with(&strided(tensor, 0, i64::MAX)), &plain);
        check(TooLarge, name, with(&strided(tensor, 0, i64::MIN)), &plain);
        check(TooLarge, name, with(&shaped(tensor, 0, i64::MAX)), &plain);
    }
    let with = |options: Options| options;
    let mut refuse = |code, words: &str, options: Options| check(code, words, all, &with(options));
    refuse(BadStructSize, "struct_size is 0", Options { struct_size: 0, ..plain });
    refuse(BadStructSize, "struct_size", Options { struct_size: size_of::<Options>() - 4, ..plain });
    refuse(BadStructSize, "struct_size", Options { struct_size: usize::MAX, ..plain });
    refuse(InvalidOption, "flags are 0x20", Options { flags: 32, ..plain });
    refuse(InvalidOption, "reserved", Options { reserved: 1, ..plain });
    refuse(InvalidOption, "threads is -1", Options { threads: -1, ..plain });
    refuse(InvalidOption, "threads is 1025", Options { threads: 1025, ..plain });
    refuse(InvalidOption, "FLASHTILE_SCALE", Options { scale: 1.0, ..plain });
    refuse(InvalidOption, "FLASHTILE_SOFTCAP", Options { softcap: 1.0, ..plain });
    refuse(InvalidOption, "FLASHTILE_WINDOW_LEFT", Options { window_left: 1, ..plain });
    refuse(InvalidOption, "FLASHTILE_WINDOW_RIGHT", Options { window_right: 1, ..plain });
    refuse(InvalidOption, "FLASHTILE_AT", Options { query_offset: 1, ..plain });
    refuse(InvalidOption, "FLASHTILE_PER_BATCH", Options { query_offsets: negative, ..plain });
    refuse(InvalidOption, "FLASHTILE_PER_BATCH", Options { query_offset_count: 1, ..plain });
    refuse(InvalidOption, "FLASHTILE_ALIBI_PER_HEAD", Options { alibi_slope_count: 4, ..plain });
    refuse(InvalidOption, "query_position is 4", Options { query_position: 4, ..plain });
    refuse(InvalidOption, "alibi is 4 but must be 0 to 3", Options { alibi: 4, ..plain });
    refuse(InvalidOption, "form is -1", Options { form: -1, ..plain });
    refuse(InvalidOption, "softcap", Options { flags: flags::SOFTCAP, ..plain });
    refuse(InvalidOption, "scale", Options { flags: flags::SCALE, scale: f32::NAN, ..plain });
    refuse(NegativeSize, "window_left is -1", Options { flags: flags::WINDOW_LEFT, window_left: -1, ..plain });
    refuse(LevelUnavailable, "portable", Options { level: nonsense.as_ptr(), ..plain });
    refuse(WrongCount, "key lengths", Options { key_lengths: list.as_ptr(), key_length_count: 1, ..plain });
    refuse(WrongCount, "query offsets", Options { query_position: 3, ..plain });
    refuse(WrongCount, "slopes", Options { alibi: 2, ..plain });
    let per_head_only = Options { alibi: 3, alibi_slopes: [0.0f32; 4].as_ptr(), alibi_slope_count: 4, ..plain };
    refuse(WrongCount, "4 ALiBi slopes of all sequences", per_head_only);
    refuse(NullPointer, "key lengths", Options { key_length_count: 2, ..plain });
    refuse(NegativeSize, "key lengths", Options { key_length_count: -2, ..plain });
    refuse(NegativeSize, "-1", Options { key_lengths: negative, key_length_count: 2, ..plain });
    refuse(KeyLengthPastEnd, "31", Options { key_lengths: [1, 31].as_ptr(), key_length_count: 2, ..plain });
    refuse(TooLarge, "key lengths", Options { key_lengths: negative, key_length_count: i64::MAX, ..plain });
    refuse(
        Misaligned,
        "slopes",
        Options { alibi: 2, alibi_slopes: lse_memory.as_ptr().wrapping_byte_add(1), alibi_slope_count: 4, ..plain },
    );
    refuse(NotBroadcastable, "mask", Options { mask: &wrong_mask, ..plain });
    refuse(BadDtype, "mask is FLASHTILE_F32 (1); it must be FLASHTILE_BYTE (5)", Options { mask: &q, ..plain });
    // A type that the interface lacks, such as a mask of int64.
    for (dtype, words) in [
        (0, "0 is no dtype (of the mask); it must be FLASHTILE_BYTE (5), one byte for each element"),
        (64, "64 is no dtype (of the mask); it must be FLASHTILE_BYTE (5), one byte for each element"),
    ] {
        let mask = Tensor { dtype, ..mask };
        refuse(BadDtype, words, Options { mask: &mask, ..plain });
        let words = "(of the bias); it must be FLASHTILE_F32 (1), FLASHTILE_F16 (2) or FLASHTILE_BF16 (3)";
        refuse(BadDtype, words, Options { bias: &mask, ..plain });
    }
    refuse(BadDtype, "bias", Options { bias: &bias, ..plain });
    refuse(BadDtype, "bias", Options { bias: &mask, ..plain });
    refuse(Overlap, "ALiBi slopes", Options { alibi: 2, alibi_slopes: out.data.cast(), alibi_slope_count: 4, ..plain });
    refuse(Overlap, "bias", Options { bias: &Tensor { strides: [0; 4], shape: [1; 4], ..out }, ..plain });

    refuse(WrongCount, "3 sinks", Options { sinks: [0.0f32; 3].as_ptr(), sink_count: 3, ..plain });
    refuse(NullPointer, "sinks", Options { sink_count: 4, ..plain });
    refuse(InvalidOption, "sink is NaN", Options { sinks: [f32::NAN; 4].as_ptr(), sink_count: 4, ..plain });
    refuse(Overlap, "sinks", Options { sinks: out.data.cast(), sink_count: 4, ..plain });
    refuse(InvalidOption, "score_row", Options { score_context: out.data, ..plain });
    refuse(NullPointer, "masks", Options { mask_count: 1, ..plain });
    refuse(NegativeSize, "masks", Options { mask_count: -1, ..plain });
    refuse(TooLarge, "masks", Options { masks: &Mask::new(3), mask_count: i64::MAX, ..plain });
    let masks = [Mask::new(3); 2];
    let misaligned = masks.as_ptr().wrapping_byte_add(1);
    refuse(Misaligned, "masks", Options { masks: misaligned, mask_count: 1, ..plain });
    let mut refuse_mask = |code, words: &str, mask: Mask| {
        let masks = [mask_of(3, &[100], []), mask];
        refuse(code, &format!("masks[1]: {words}"), with_masks(&masks));
    };
    for kind in [0, -1, 9, i32::MIN, i32::MAX] {
        refuse_mask(InvalidOption, &format!("{kind} is no kind of mask; it must be 1 to 8"), Mask::new(kind));
    }
    refuse_mask(InvalidOption, "reserved", Mask { reserved: 1, ..mask_of(3, &[1], []) });
    refuse_mask(InvalidOption, "a number or list is set", mask_of(3, &[1, 1], []));
    refuse_mask(InvalidOption, "a number or list is set", mask_of(4, &[1, 1], [&[1]]));
    refuse_mask(InvalidOption, "a number or list is set", mask_of(5, &[], [&[], &[1]]));
    refuse_mask(NegativeSize, "a size of the mask is -2", mask_of(4, &[1, -2], []));
    refuse_mask(NegativeSize, "a size of the list", Mask { counts: [-1, 0], ..Mask::new(7) });
    refuse_mask(NullPointer, "the pointer to the list", Mask { counts: [2, 0], ..Mask::new(7) });
    refuse_mask(
        Misaligned,
        "the pointer to the list",
        Mask { lists: [shifted(q).data.cast(); 2], ..mask_of(1, &[], [&[1; 7]; 2]) },
    );
    refuse_mask(TooLarge, "shape and strides of the list", Mask { counts: [i64::MAX, 0], ..mask_of(7, &[], [&[1]]) });
    refuse_mask(InvalidOption, "document numbers", mask_of(1, &[2], [&[0; 7], &[0; 60]]));
    refuse_mask(WrongCount, "2 starts of ranges were given, but 1 ends", mask_of(2, &[], [&[0, 4], &[3]]));
    refuse_mask(NegativeSize, "a size of the mask is -1", mask_of(2, &[], [&[-1], &[3]]));
    refuse_mask(InvalidOption, "ranges", mask_of(2, &[], [&[4], &[3]]));
    refuse_mask(InvalidOption, "numbers[0] is 0", Mask::new(3));
    refuse_mask(InvalidOption, "the parent", mask_of(5, &[], [&[0; 7]]));
    refuse_mask(InvalidOption, "numbers[1] is 0", mask_of(6, &[4], [&[1]]));
    refuse_mask(WrongCount, "1 blocks", mask_of(6, &[4, 30], [&[1]]));
    refuse_mask(InvalidOption, "compressed rows", mask_of(8, &[4, 30], [&[0, 1, 2], &[0, 1]]));
    refuse_mask(InvalidOption, "compressed rows", mask_of(8, &[4, 30], [&[0, 1, 3], &[0, 0]]));
    refuse_mask(NegativeSize, "a size of the mask is -1", mask_of(8, &[4, 30], [&[0, 1, -1], &[0, 0]]));
    // What the problem says about masks that are right by themselves.
    for (words, mask) in [
        ("6 document numbers of queries", mask_of(1, &[], [&[0; 6], &[0; 30]])),
        ("3 sequences of documents", mask_of(1, &[3], [&[0; 21], &[0; 90]])),
        ("sequences of documents", mask_of(1, &[i64::MAX], [&[], &[]])),
        ("6 parents", mask_of(5, &[], [&[-1; 6]])),
        ("1 key starts", mask_of(7, &[], [&[0]])),
        ("3 heads", mask_of(6, &[7, 30, 1, 3], [&[1; 3]])),
        ("1 blocks of queries", mask_of(8, &[4, 30], [&[0, 1], &[0]])),
    ] {
        refuse(WrongCount, words, with_masks(&[mask]));
    }
    let (lists, counts) = ([out.data.cast_const().cast(), null()], [2, 0]);
    refuse(Overlap, "list of a mask", with_masks(&[Mask { lists, counts, ..Mask::new(7) }]));
    let (lists, counts) = ([null(), out.data.cast_const().cast()], [0, 2]);
    refuse(Overlap, "list of a mask", with_masks(&[Mask { lists, counts, ..Mask::new(1) }]));

    let tables = [0.0f32; 24];
    let mut refuse_table = |code, words: &str, table: ScoreTable| {
        let tables = [table_of(1, &[0], &tables[..4]), table];
        refuse(code, &format!("score_tables[1]: {words}"), with_tables(&tables));
    };
    for kind in [0, -1, 4, i32::MIN, i32::MAX] {
        let words = format!("{kind} is no kind of score table; it must be 1 to 3");
        refuse_table(InvalidOption, &words, ScoreTable::new(kind));
    }
    refuse_table(InvalidOption, "reserved", ScoreTable { reserved: 1, ..table_of(1, &[0], &tables[..4]) });
    refuse_table(InvalidOption, "a number is set that", table_of(1, &[0, 1], &tables[..4]));
    refuse_table(InvalidOption, "numbers[1] is 2 but must be 0 or 1", table_of(2, &[20, 2], &tables));
    refuse_table(InvalidOption, "the buckets", table_of(2, &[1], &tables));
    refuse_table(InvalidOption, "the buckets", table_of(2, &[i64::MAX], &tables));
    refuse_table(NegativeSize, "a size of the score table is -2", table_of(1, &[-2], &[]));
    refuse_table(NegativeSize, "a size of the score table is -1", ScoreTable { count: -1, ..ScoreTable::new(1) });
    refuse_table(NullPointer, "the pointer to the score table", ScoreTable { count: 4, ..ScoreTable::new(1) });
    let odd = tables.as_ptr().wrapping_byte_add(1);
    refuse_table(
        Misaligned,
        "the pointer to the score table",
        ScoreTable { table: odd, count: 4, ..ScoreTable::new(1) },
    );
    let endless = ScoreTable { count: i64::MAX, ..table_of(1, &[0], &tables) };
    refuse_table(TooLarge, "shape and strides of the score table", endless);
    refuse_table(WrongCount, "24 relative biases were given but there must be 12", table_of(1, &[1], &tables));
    refuse_table(WrongCount, "24 relative biases", table_of(1, &[i64::MAX], &tables));
    refuse_table(WrongCount, "3 bucket biases", table_of(2, &[20], &tables[..3]));
    refuse_table(WrongCount, "24 window biases", table_of(3, &[1, 2], &tables));
    refuse_table(TooLarge, "4194304 places of a window", table_of(3, &[1 << 21, 2], &tables));
    let wrong_window = [table_of(3, &[1, 1], &tables[..4])];
    refuse(WrongCount, "1 places of a window for queries", with_tables(&wrong_window));
    refuse(NullPointer, "score tables", Options { score_table_count: 1, ..plain });
    refuse(NegativeSize, "score tables", Options { score_table_count: -1, ..plain });
    let written = ScoreTable { table: out.data.cast(), count: 4, ..ScoreTable::new(1) };
    refuse(Overlap, "score table", with_tables(&[written]));

    let [pq, pk, pv, po, pl] = all;
    check(Misaligned, "options", all, (&raw const plain).wrapping_byte_add(1));
    check(Overlap, "queries", [po, pk, pv, po, pl], &plain);
    check(Overlap, "output", [pq, pk, pv, po, &Tensor { data: out.data, ..lse }], &plain);
    check(OverlappingOutput, "axis 2", [pq, pk, pv, &strided(out, 2, 15), pl], &plain);
    check(OverlappingOutput, "axis 1", [pq, pk, pv, po, &strided(lse, 1, 0)], &plain);
    check(ShapeMismatch, "keys", [pq, &shaped(k, 3, 15), pv, po, pl], &plain);
    check(ShapeMismatch, "lse", [pq, pk, pv, po, &shaped(lse, 2, 6)], &plain);
    let with_heads = |tensor: Tensor| Tensor { shape: [1, (1 << 24) + 1, 1, 16], strides: [0, 0, 0, 1], ..tensor };
    check(TooLarge, "16777217 key/value heads", [&with_heads(q), &with_heads(k), &with_heads(v), po, pl], &plain);
    check(HeadsNotDivisible, "3 query heads", [&shaped(q, 1, 3), pk, pv, po, pl], &plain);

    // SAFETY: refused before memory is read.
    seen.insert(unsafe { flashtile_softmax(&q, &out, 4, 1.0) });
    assert!(last_error().contains("axis 4"));
    for (scale, words) in [
        (f64::NAN, "scale is NaN but must be finite"),
        (f64::INFINITY, "scale is inf but must be finite"),
        (-1e39, "000 but must be finite in f32"),
    ] {
        // SAFETY: refused before memory is read.
        unsafe {
            for code in [
                flashtile_softmax(&q, &out, -1, scale),
                flashtile_log_softmax(&q, &out, 0, scale),
                flashtile_softmax_backward(&q, &q, &out, 1, scale),
                flashtile_log_softmax_backward(&q, &q, &out, 2, scale),
                flashtile_softmax(&shaped(q, 0, 0), &shaped(out, 0, 0), 1, scale),
            ] {
                assert_eq!(code, InvalidOption as i32);
                assert!(last_error().contains(words), "{}", last_error());
            }
        }
    }
    let double = [0.0f64, 1.0];
    let wide = tensor(&double, F64, &[2]);
    // SAFETY: overwrites what nothing else uses. 1e39 is a number of f64.
    assert_eq!(unsafe { flashtile_softmax(&wide, &tensor_mut(&mut [0.0f64; 2], F64, &[2]), 0, 1e39) }, 0);
    // SAFETY: refused before memory is read.
    seen.insert(unsafe { flashtile_cross_entropy(&q, null(), 0, &out, 4, null()) });
    assert!(last_error().contains("axis 4"));
    seen.insert(wrong_losses());
    let threads_and_panics = [Code::Threads as i32, Code::Panic as i32]; // these take some doing
    let expected: BTreeSet<i32> = (1..=20).filter(|code| !threads_and_panics.contains(code)).collect();
    assert_eq!(seen, expected);
}

#[test]
fn an_options_struct_of_another_version() {
    #[repr(C)]
    struct Newer {
        options: Options,
        more: [u64; 4],
    }
    let inputs = Inputs::new();
    let [q, k, v] = inputs.tensors();
    let mut memory = vec![0.0f32; len(SHAPE_Q)];
    let out = tensor_mut(&mut memory, F32, &as_i64(SHAPE_Q));
    let call = |more| {
        let struct_size = size_of::<Newer>();
        let newer = Newer { options: Options { struct_size, flags: flags::CAUSAL, ..Options::new() }, more };
        // SAFETY: all of these are what they say.
        unsafe { flashtile_attention(&q, &k, &v, &out, null(), (&raw const newer).cast()) }
    };
    assert_eq!(call([0; 4]), 0, "{}", last_error());
    // No version ends inside a member. The first one ended before the sinks, the second one before the query lengths, the third one
    // before the score tables, the fourth one before the cache.
    let [first, second] = [offset_of!(Options, sinks), offset_of!(Options, query_lengths)];
    let [third, fourth] = [offset_of!(Options, score_tables), offset_of!(Options, cache)];
    let ends = [first, second, third, fourth];
    for struct_size in (size_of::<Options>() + 1..size_of::<Newer>()).chain(0..size_of::<Options>()) {
        let whole = struct_size > size_of::<Options>() && struct_size.is_multiple_of(8);
        let newer = Newer { options: Options { struct_size, ..Options::new() }, more: [0; 4] };
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_attention(&q, &k, &v, &out, null(), (&raw const newer).cast()) };
        let accepted = whole || ends.contains(&struct_size);
        assert_eq!(code, if accepted { 0 } else { Code::BadStructSize as i32 }, "{struct_size}");
    }
    assert_eq!(call([0; 4]), 0);
    assert_eq!(call([0, 0, 0, 1]), Code::BadStructSize as i32);
    assert!(last_error().contains("older than the caller"), "{}", last_error());
    assert_eq!(bits(&memory), inputs.through_rust(&Attention::new().causal())[0]);

    // Of an older caller's struct, nothing is read after its end.
    let stray = [7.0f32];
    let older = Options {
        struct_size: first,
        flags: flags::CAUSAL,
        sinks: stray.as_ptr(),
        sink_count: -1,
        mask_count: -1,
        ..Options::new()
    };
    assert_eq!(inputs.through_c(&older), inputs.through_rust(&Attention::new().causal()));
    let older = Options {
        struct_size: second,
        flags: flags::CAUSAL,
        query_length_count: -1,
        key_start_count: 9,
        page_table: null::<PageTable>().wrapping_byte_add(1),
        ..Options::new()
    };
    assert_eq!(inputs.through_c(&older), inputs.through_rust(&Attention::new().causal()));
    let older = Options {
        struct_size: third,
        flags: flags::CAUSAL,
        score_tables: null::<ScoreTable>().wrapping_byte_add(1),
        score_table_count: 9,
        ..Options::new()
    };
    assert_eq!(inputs.through_c(&older), inputs.through_rust(&Attention::new().causal()));
    let cache = null::<CacheView>().wrapping_byte_add(1);
    let older = Options { struct_size: fourth, flags: flags::CAUSAL, cache, ..Options::new() };
    assert_eq!(inputs.through_c(&older), inputs.through_rust(&Attention::new().causal()));
}

/// Of tensors without elements, no pointer is followed.
#[test]
fn nothing_is_read_where_there_is_nothing() {
    let nowhere = null_mut::<c_void>().wrapping_byte_add(1);
    let empty = |shape: [i64; 4]| Tensor { data: nowhere, dtype: F32, rank: 4, shape, strides: [i64::MAX; 4] };
    let (x, none) = (empty([0, 2, 3, 4]), empty([1, 1, 0, 4]));
    let mut memory = [9.0f32; 8];
    let out = tensor_mut(&mut memory, F32, &[1, 1, 2, 4]);
    let q = [1.0f32; 8];
    // SAFETY: all of these are what they say.
    unsafe {
        assert_eq!(flashtile_attention(&x, &x, &x, &x, null(), null()), 0, "{}", last_error());
        assert_eq!(flashtile_attention(&tensor(&q, F32, &[1, 1, 2, 4]), &none, &none, &out, null(), null()), 0);
        assert_eq!(flashtile_softmax(&x, &x, 1, 1.0), 0, "{}", last_error());
    }
    assert_eq!(memory, [0.0; 8]);
}

#[test]
fn plans_are_cut_to_the_buffer() {
    let inputs = Inputs::new();
    let [q, k, v] = inputs.tensors();
    let plan = |text: &mut [u8]| {
        let mut length = 0;
        let (to, capacity) = (text.as_mut_ptr(), text.len());
        // SAFETY: all of these are what they say.
        let code = unsafe { flashtile_plan(&q, &k, &v, null(), to.cast(), capacity, &mut length) };
        assert_eq!(code, 0, "{}", last_error());
        length
    };
    let mut text = [7u8; 300];
    let length = plan(&mut text);
    let whole = CStr::from_bytes_until_nul(&text).unwrap().to_str().unwrap();
    assert_eq!(whole.len(), length);
    assert!(whole.starts_with("b2 h4/2 q7 kv30 d16/16: "), "{whole}");
    for capacity in [1, 2, 10, length, length + 1] {
        let mut short = [7u8; 300];
        assert_eq!(plan(&mut short[..capacity]), length);
        let fits = length.min(capacity - 1);
        assert_eq!((&short[..fits], short[fits], short[fits + 1]), (&whole.as_bytes()[..fits], 0, 7));
    }
    assert_eq!(plan(&mut []), length);
    // SAFETY: as above.
    unsafe {
        let mut length = 7;
        assert_eq!(flashtile_plan(&q, &k, &v, null(), null_mut(), 5, &mut length), Code::NullPointer as i32);
        assert_eq!(length, 7, "refused before anything is written");
        assert_eq!(flashtile_plan(&q, &k, &v, null(), null_mut(), 0, null_mut()), 0);
    }
}

/// Softmax of a half type along every axis, of a view with gaps, is that of its dense copy. (Sizes with common
/// factors: with coprime ones, axes counted wrongly would still meet every element once.)
#[test]
fn softmax_is_that_of_rust() {
    use flashtile::softmax::{Axis, softmax_into};
    let whole: Vec<f16> = random(2 * 4 * 6 * 12).into_iter().map(f16::from_f32).collect();
    let index = |[a, b, c, d]: [usize; 4]| ((a * 4 + b) * 6 + c) * 12 + d;
    let indices = || (0..2 * 4 * 6 * 6).map(|n| [n / 144, n / 36 % 4, n / 6 % 6, n % 6]);
    let dense: Vec<f16> = indices().map(|[a, b, c, d]| whole[index([1 - a, b, c, 2 * d])]).collect();
    for axis in 0..4 {
        let mut expected = vec![f16::ZERO; dense.len()];
        softmax_into(&dense, &mut expected, Axis::new(&[2, 4, 6, 6], axis).unwrap(), 3.0).unwrap();
        let mut own = whole.clone();
        let x = Tensor {
            data: own[index([1, 0, 0, 0])..].as_mut_ptr().cast(),
            strides: [-288, 72, 12, 2],
            ..tensor(&own, F16, &[2, 4, 6, 6])
        };
        // SAFETY: a view of `own`, which nothing else uses.
        let code = unsafe { flashtile_softmax(&x, &x, axis, 3.0) };
        assert_eq!(code, 0, "{}", last_error());
        assert!(
            indices().zip(&expected).all(|([a, b, c, d], y)| own[index([1 - a, b, c, 2 * d])] == *y),
            "axis {axis}"
        );
        assert!((0..own.len()).all(|n| n % 2 == 0 || own[n] == whole[n]), "gaps stay as they are");
    }
}

/// With a mask and a bias of lower rank, into f32 and in place, of a view with gaps.
#[test]
fn masked_softmax_is_that_of_rust() {
    use flashtile::softmax::Softmax;
    type Masked = unsafe extern "C" fn(*const Tensor, *const Tensor, *const Tensor, *const Tensor, i32, f64) -> i32;
    let whole: Vec<f16> = random(3 * 4 * 10).into_iter().map(f16::from_f32).collect();
    let view = TensorRef::with_strides(&whole, 1, [3, 4, 5], [40, 10, 2]).unwrap();
    let of_view = |memory: &[f16]| {
        let mut x = tensor(&memory[1..], F16, &[3, 4, 5]);
        x.strides[..3].copy_from_slice(&[40, 10, 2]);
        x
    };
    let bytes: Vec<u8> = (0..20).map(|n| if n % 3 == 1 { 0 } else { n as u8 | 1 }).collect();
    let visible: Vec<bool> = bytes.iter().map(|&byte| byte != 0).collect();
    let added = random(4);
    let (mask, bias) = (tensor(&bytes, BYTE, &[4, 5]), tensor(&added, F32, &[4, 1]));
    for axis in -3i32..3 {
        for with in [[false, false], [true, false], [false, true], [true, true]] {
            let mut options = Softmax::new().axis(axis).scale(0.5);
            if with[0] {
                options = options.mask(TensorRef::from_slice(&visible, [4, 5]).unwrap());
            }
            if with[1] {
                options = options.bias(TensorRef::from_slice(&added, [4, 1]).unwrap());
            }
            let [mask, bias] =
                [(&mask, with[0]), (&bias, with[1])].map(|(t, set)| if set { &raw const *t } else { null() });
            for (log, run) in [(false, flashtile_masked_softmax as Masked), (true, flashtile_masked_log_softmax)] {
                let (mut got, mut expected, mut own) = ([9.0f32; 60], [9.0f32; 60], whole.clone());
                let mut expected_own = own.clone();
                let into = TensorMut::from_slice(&mut expected, [3, 4, 5]).unwrap();
                let same = TensorMut::with_strides(&mut expected_own, 1, [3, 4, 5], [40, 10, 2]).unwrap();
                if log {
                    options.log_softmax_into(view, into).unwrap();
                    options.log_softmax_in_place(same).unwrap();
                } else {
                    options.softmax_into(view, into).unwrap();
                    options.softmax_in_place(same).unwrap();
                }
                let out = tensor_mut(&mut got, F32, &[3, 4, 5]);
                // SAFETY: all of these are what they say.
                assert_eq!(unsafe { run(&of_view(&whole), &out, mask, bias, axis, 0.5) }, 0, "{}", last_error());
                assert_eq!(bits(&got), bits(&expected), "axis {axis} {with:?}");
                let in_place = Tensor { data: own[1..].as_mut_ptr().cast(), ..of_view(&own) };
                // SAFETY: as above; input and output are the same view of `own`.
                assert_eq!(unsafe { run(&in_place, &in_place, mask, bias, axis, 0.5) }, 0, "{}", last_error());
                assert!(own.iter().zip(&expected_own).all(|(a, b)| a.to_bits() == b.to_bits()), "axis {axis} {with:?}");
            }
            let mut shape = [3, 4, 5];
            shape[axis.rem_euclid(3) as usize] = 1;
            let len = shape.iter().product::<i64>() as usize;
            let (mut expected, mut got) = (vec![9.0f32; len], vec![9.0f32; len]);
            options.logsumexp_into(view, &mut expected).unwrap();
            let out = tensor_mut(&mut got, F32, &shape);
            // SAFETY: as above.
            let code = unsafe { flashtile_masked_logsumexp(&of_view(&whole), &out, mask, bias, axis, 0.5) };
            assert_eq!((code, bits(&got)), (0, bits(&expected)), "axis {axis} {with:?}: {}", last_error());
        }
    }
}

#[test]
fn wrong_masked_softmaxes_have_their_codes() {
    use Code::*;
    let (numbers, bytes, mut out) = ([0.5f32; 6], [1u8; 6], [9.0f32; 6]);
    let (x, to) = (tensor(&numbers, F32, &[2, 3]), tensor_mut(&mut out, F32, &[2, 3]));
    let (mask, bias) = (tensor(&bytes, BYTE, &[2, 3]), tensor(&numbers, F32, &[1, 1]));
    let check = |code: Code, words: &str, [x, to, mask, bias]: [&Tensor; 4], axis: i32, scale: f64| {
        // SAFETY: tensors that are what they say, or are refused.
        let got = unsafe {
            [
                flashtile_masked_softmax(x, to, mask, bias, axis, scale),
                flashtile_masked_log_softmax(x, to, mask, bias, axis, scale),
            ]
        };
        assert_eq!(got, [code as i32; 2], "{words}: {}", last_error());
        assert!(last_error().contains(words), "{words}: {}", last_error());
    };
    let none = null::<Tensor>();
    // SAFETY: a null pointer is refused.
    assert_eq!(unsafe { flashtile_masked_softmax(none, &to, none, none, 0, 1.0) }, NullPointer as i32);
    let zero = tensor(&[0.0f32], F32, &[1]);
    check(BadDtype, "mask", [&x, &to, &tensor(&numbers, F32, &[1]), &zero], 0, 1.0);
    check(BadDtype, "bias", [&x, &to, &mask, &mask], 0, 1.0);
    check(BadDtype, "output", [&x, &Tensor { dtype: F16, ..to }, &mask, &zero], 0, 1.0);
    check(ShapeMismatch, "output", [&x, &Tensor { shape: [1; 4], ..to }, &mask, &zero], 0, 1.0);
    check(NotBroadcastable, "mask", [&x, &to, &tensor(&bytes, BYTE, &[3, 2]), &zero], 0, 1.0);
    check(NotBroadcastable, "bias", [&x, &to, &mask, &tensor(&[0.0f32; 2], F32, &[2])], 0, 1.0);
    check(AxisOutOfRange, "axis 2", [&x, &to, &mask, &zero], 2, 1.0);
    check(InvalidOption, "scale", [&x, &to, &mask, &zero], 0, f64::NAN);
    check(Overlap, "mask", [&x, &to, &Tensor { data: to.data, ..mask }, &zero], 0, 1.0);
    check(Overlap, "bias", [&x, &to, &mask, &Tensor { data: to.data, ..bias }], 0, 1.0);
    check(Overlap, "input", [&Tensor { data: to.data, strides: [0; 4], ..x }, &to, &mask, &zero], 0, 1.0);
    let mut sums = [9.0f32; 2];
    let sums = tensor_mut(&mut sums, F32, &[2, 1]);
    let overlapping = Tensor { data: sums.data, ..zero };
    // SAFETY: as above.
    let code = unsafe { flashtile_masked_logsumexp(&x, &sums, &mask, &overlapping, 1, 1.0) };
    assert_eq!(code, Overlap as i32, "{}", last_error());
}

/// f32 results of half types, and logsumexp, of a view with gaps.
#[test]
fn half_types_give_f32() {
    use flashtile::softmax::Softmax;
    let whole: Vec<f16> = random(3 * 4 * 10).into_iter().map(f16::from_f32).collect();
    let view = TensorRef::with_strides(&whole, 1, [3, 4, 5], [40, 10, 2]).unwrap();
    let mut x = tensor(&whole[1..], F16, &[3, 4, 5]);
    x.strides[..3].copy_from_slice(&[40, 10, 2]);
    for axis in -3i32..3 {
        let options = Softmax::new().axis(axis).scale(0.5);
        let (mut got, mut expected) = ([9.0f32; 60], [9.0f32; 60]);
        for log in [false, true] {
            let (run, out) = if log {
                options.log_softmax_into(view, TensorMut::from_slice(&mut expected, [3, 4, 5]).unwrap()).unwrap();
                (flashtile_log_softmax as unsafe extern "C" fn(_, _, _, _) -> _, tensor_mut(&mut got, F32, &[3, 4, 5]))
            } else {
                options.softmax_into(view, TensorMut::from_slice(&mut expected, [3, 4, 5]).unwrap()).unwrap();
                (flashtile_softmax as unsafe extern "C" fn(_, _, _, _) -> _, tensor_mut(&mut got, F32, &[3, 4, 5]))
            };
            // SAFETY: all of these are what they say.
            assert_eq!(unsafe { run(&raw const x, &raw const out, axis, 0.5) }, 0, "{}", last_error());
            assert_eq!(bits(&got), bits(&expected), "axis {axis}");
        }
        let number = axis.rem_euclid(3) as usize;
        let mut shape = [3, 4, 5];
        shape[number] = 1;
        let len = shape.iter().product::<i64>() as usize;
        let (mut expected, mut got) = (vec![9.0f32; len], vec![9.0f32; len]);
        options.logsumexp_into(view, &mut expected).unwrap();
        let out = tensor_mut(&mut got, F32, &shape);
        // SAFETY: all of these are what they say.
        assert_eq!(unsafe { flashtile_logsumexp(&x, &out, axis, 0.5) }, 0, "{}", last_error());
        assert_eq!(bits(&got), bits(&expected), "axis {axis}");
    }
}

#[test]
fn cross_entropy_is_that_of_rust() {
    use flashtile::softmax::{Axis, CrossEntropy, Reduction};
    let logits: Vec<f32> = random(3 * 5 * 4).into_iter().map(|x| 8.0 * x).collect();
    let targets: Vec<i64> = (0..12).map(|n| if n % 5 == 2 { -100 } else { n % 5 }).collect();
    let weights = [1.0, 0.5, 0.0, 2.0, 3.0];
    let axis = Axis::new(&[3, 5, 4], 1).unwrap();
    // The same elements, last axis first in memory.
    let turned: Vec<f32> = (0..60).map(|n| logits[n % 15 * 4 + n / 15]).collect();
    let strided = Tensor { strides: [5, 1, 15, 0], ..tensor(&turned, F32, &[3, 5, 4]) };
    for (code, reduction) in [Reduction::Mean, Reduction::Sum, Reduction::None].into_iter().enumerate() {
        let mut rust = CrossEntropy::new().ignore_index(-100).reduction(reduction);
        let mut c = CrossEntropyOptions {
            flags: 1,
            reduction: code as i32,
            ignore_index: -100,
            label_smoothing: 0.0,
            class_weights: null(),
            class_weight_count: 0,
            reserved: [0; 2],
        };
        for (smoothing, weighted) in [(0.0, false), (0.25, false), (0.0, true), (0.25, true)] {
            (rust, c.label_smoothing) = (rust.label_smoothing(smoothing), smoothing);
            if weighted {
                rust = rust.class_weights(&weights);
                (c.class_weights, c.class_weight_count) = (weights.as_ptr(), 5);
            }
            let (results, shape): (_, &[i64]) = if code == 2 { (12, &[3, 1, 4]) } else { (1, &[1]) };
            let upstream = random(results);
            let (mut loss, mut gradient) = (vec![9.0; results], vec![9.0; 60]);
            rust.loss_into(&logits, &targets, axis, &mut loss).unwrap();
            rust.gradient_into(&logits, &targets, axis, &upstream, &mut gradient).unwrap();
            for logits in [tensor(&logits, F32, &[3, 5, 4]), strided] {
                let (mut got, mut got_gradient) = (vec![9.0; results], vec![9.0; 60]);
                let (l, g) = (tensor_mut(&mut got, F32, shape), tensor_mut(&mut got_gradient, F32, &[3, 5, 4]));
                let (list, up) = (targets.as_ptr(), tensor(&upstream, F32, shape));
                // SAFETY: all of these are what they say.
                unsafe {
                    assert_eq!(flashtile_cross_entropy(&logits, list, 12, &l, -2, &c), 0, "{}", last_error());
                    let code = flashtile_cross_entropy_backward(&logits, list, 12, &up, &g, 1, &c);
                    assert_eq!(code, 0, "{}", last_error());
                }
                assert_eq!((bits(&got), bits(&got_gradient)), (bits(&loss), bits(&gradient)), "{c:?}");
            }
        }
    }
    // Without options: the mean. f64 has f64 losses.
    let (wide, mut loss) = ([0.0f64, 1.0, 2.0, 0.0], [9.0f64]);
    let l = tensor_mut(&mut loss, F64, &[1]);
    // SAFETY: all of these are what they say.
    let code = unsafe { flashtile_cross_entropy(&tensor(&wide, F64, &[2, 2]), [1, 0].as_ptr(), 2, &l, 1, null()) };
    assert_eq!(code, 0, "{}", last_error());
    let mut expected = [0.0];
    CrossEntropy::new().loss_into(&wide, &[1i64, 0], Axis::rows(2, 2).unwrap(), &mut expected).unwrap();
    assert_eq!(loss, expected);
}

/// Wrong calls of cross-entropy and logsumexp; returns the code of a wrong class.
fn wrong_losses() -> i32 {
    let mut memory = [0.5f32; 64];
    let x = tensor_mut(&mut memory[..6], F32, &[2, 3]);
    let one = tensor_mut(&mut memory[6..7], F32, &[1]);
    let two = tensor_mut(&mut memory[7..9], F32, &[2, 1]);
    let gradient = tensor_mut(&mut memory[9..15], F32, &[2, 3]);
    let before = memory;
    let plain = CrossEntropyOptions {
        flags: 0,
        reduction: 0,
        ignore_index: 0,
        label_smoothing: 0.0,
        class_weights: null(),
        class_weight_count: 0,
        reserved: [0; 2],
    };
    let (targets, wrong, weights) = ([0i64, 2], [0i64, 3], [1.0f32, -2.0, 1.0]);
    let list = targets.as_ptr();
    let check = |got: i32, code: Code, words: &str| {
        assert_eq!(got, code as i32, "{words}: {}", last_error());
        assert!(last_error().contains(words), "{words}: {}", last_error());
    };
    let with = |options: CrossEntropyOptions| options;
    use Code::*;
    // SAFETY: memory is what it says wherever it is looked at before the call is refused.
    unsafe {
        let loss = |options: CrossEntropyOptions| flashtile_cross_entropy(&x, list, 2, &one, 1, &options);
        check(loss(with(CrossEntropyOptions { flags: 2, ..plain })), InvalidOption, "flags are 0x2");
        check(loss(with(CrossEntropyOptions { ignore_index: 1, ..plain })), InvalidOption, "FLASHTILE_IGNORE_INDEX");
        check(loss(with(CrossEntropyOptions { reduction: 3, ..plain })), InvalidOption, "reduction is 3");
        check(loss(with(CrossEntropyOptions { reserved: [0, 1], ..plain })), InvalidOption, "reserved");
        check(loss(with(CrossEntropyOptions { label_smoothing: 2.0, ..plain })), InvalidOption, "label smoothing is 2");
        check(loss(with(CrossEntropyOptions { class_weight_count: 3, ..plain })), NullPointer, "class weights");
        let weighted = CrossEntropyOptions { class_weights: weights.as_ptr(), class_weight_count: 3, ..plain };
        check(loss(with(weighted)), InvalidOption, "a class weight is -2");
        check(loss(with(CrossEntropyOptions { class_weight_count: 2, ..weighted })), WrongCount, "2 class weights");
        check(loss(with(CrossEntropyOptions { reduction: 2, ..plain })), ShapeMismatch, "[1] but must be that of");
        check(flashtile_cross_entropy(&x, list, 2, &two, 1, &plain), ShapeMismatch, "[2, 1] but must be one element");
        check(flashtile_cross_entropy(&x, list, 1, &one, 1, &plain), WrongCount, "1 targets");
        check(flashtile_cross_entropy(&x, list, -1, &one, 1, &plain), NegativeSize, "targets");
        check(flashtile_cross_entropy(&x, null(), 2, &one, 1, &plain), NullPointer, "targets");
        check(flashtile_cross_entropy(null(), list, 2, &one, 1, &plain), NullPointer, "logits");
        check(flashtile_cross_entropy(&x, list, 2, null(), 1, &plain), NullPointer, "loss");
        check(flashtile_cross_entropy(&x, list, 2, &one, 2, &plain), AxisOutOfRange, "axis 2");
        let halves = Tensor { dtype: F16, ..one };
        check(flashtile_cross_entropy(&x, list, 2, &halves, 1, &plain), BadDtype, "must be FLASHTILE_F32 (1)");
        let inside = Tensor { data: x.data, ..one };
        check(flashtile_cross_entropy(&x, list, 2, &inside, 1, &plain), Overlap, "logits");
        let inside = Tensor { data: list.cast_mut().cast(), ..one };
        check(flashtile_cross_entropy(&x, list, 2, &inside, 1, &plain), Overlap, "targets");
        let back = |up: &Tensor, to: &Tensor| flashtile_cross_entropy_backward(&x, list, 2, up, to, 1, &plain);
        check(back(&two, &gradient), ShapeMismatch, "upstream gradient");
        check(back(&one, &two), ShapeMismatch, "gradient");
        check(back(&one, &x), Overlap, "logits");
        check(back(&gradient, &gradient), ShapeMismatch, "upstream gradient");
        let inside = Tensor { data: gradient.data, ..one };
        check(back(&inside, &gradient), Overlap, "upstream gradient");
        check(back(&one, &Tensor { dtype: BF16, ..gradient }), BadDtype, "gradient");
        check(flashtile_logsumexp(&x, &gradient, 1, 1.0), ShapeMismatch, "1 along the axis: [2, 1]");
        check(flashtile_logsumexp(&x, &two, -3, 1.0), AxisOutOfRange, "axis -3");
        check(flashtile_logsumexp(&x, &two, 1, f64::NAN), InvalidOption, "scale is NaN");
        check(flashtile_logsumexp(&x, &Tensor { dtype: BF16, ..two }, 1, 1.0), BadDtype, "output");
        check(flashtile_logsumexp(&x, &Tensor { data: x.data, ..two }, 1, 1.0), Overlap, "input");
        assert_eq!(bits(&memory), bits(&before), "nothing is written");
        let code = flashtile_cross_entropy(&x, wrong.as_ptr(), 2, &one, 1, &plain);
        check(code, ClassOutOfRange, "row 1 has class 3");
        code
    }
}

/// The cdylib, built once.
fn library() -> &'static Path {
    static LIBRARY: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(built) = std::env::var_os("FLASHTILE_LIBRARY") {
            return built.into();
        }
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi");
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["rustc", "--offline", "--lib", "--features", "capi", "--crate-type", "cdylib", "--target-dir"]);
        cargo.arg(&target).current_dir(env!("CARGO_MANIFEST_DIR"));
        // The kernels are slow without optimisation; checks stay on.
        cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
        run(&mut cargo);
        let name = format!("{}flashtile{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
        target.join("debug").join(name)
    })
}

/// Runs a program that must succeed; returns what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out
}

fn works(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Reports a skipped part. Fails where that part was expected to run.
fn not_run(what: &str, variable: &str) {
    let expected = std::env::var_os(variable).is_some_and(|value| value == "1");
    assert!(!expected, "{what} is missing, and {variable}=1");
    eprintln!("NOT RUN: {what} is missing");
}

/// The C compiler. `None` if there is none, which is reported.
#[cfg(unix)]
fn c_compiler() -> Option<String> {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    if works(Command::new(&compiler).arg("--version")) {
        return Some(compiler);
    }
    not_run("a C compiler", "FLASHTILE_EXPECT_CC");
    None
}

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];

/// A program that loads the library, has its threads start late or not at all, and unloads it.
#[cfg(all(target_os = "linux", feature = "rayon"))]
#[test]
fn unloads_and_recovers() {
    let Some(compiler) = c_compiler() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi-unload");
    let mut compile = Command::new(&compiler);
    compile.arg("-std=c11").args(WARNINGS).arg("-I").arg(root.join("src/capi")).arg("-rdynamic");
    compile.arg(root.join("tests/capi/unload.c")).arg("-o").arg(&program).args(["-lpthread", "-ldl"]);
    run(&mut compile);
    run(Command::new(&program).arg(library()).env("RAYON_NUM_THREADS", "3"));
    // One default thread: the library must start none, or it would outlive the library.
    run(Command::new(&program).arg(library()).env("RAYON_NUM_THREADS", "1"));
}

/// A program of C99 in one file, linked with the library.
#[cfg(unix)]
fn compiled(compiler: &str, source: &Path, name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let folder = library().parent().unwrap();
    let mut compile = Command::new(compiler);
    compile.arg("-std=c99").args(WARNINGS).arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/capi"));
    compile.arg(source).arg("-o").arg(&program);
    compile.arg("-L").arg(folder).arg("-lflashtile").arg(format!("-Wl,-rpath,{}", folder.display())).arg("-lm");
    run(&mut compile);
    program
}

/// The whole programs in docs/c-api.md: each compiles without a warning and succeeds.
#[cfg(unix)]
#[test]
fn programs_of_the_docs_run() {
    let Some(compiler) = c_compiler() else { return };
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/c-api.md")).unwrap();
    let blocks = page.split("```c\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default());
    let programs: Vec<&str> = blocks.filter(|block| block.contains("int main(void)")).collect();
    assert_eq!(programs.len(), 3, "plain attention, a decode loop, a server's step");
    for (n, program) in programs.into_iter().enumerate() {
        let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("capi-docs-{n}.c"));
        std::fs::write(&source, program).unwrap();
        run(&mut Command::new(compiled(&compiler, &source, &format!("capi-docs-{n}"))));
    }
}

#[cfg(unix)]
#[test]
fn works_from_c() {
    let Some(compiler) = c_compiler() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (header, source) = (root.join("src/capi"), root.join("tests/capi/test.c"));
    let program = compiled(&compiler, &source, "capi-test");
    let printed = run(&mut Command::new(&program));
    let expected = layout().into_iter().map(|(name, number)| format!("{name} {number}\n")).collect::<String>();
    assert_eq!(printed, format!("{expected}version {}\nlevel {}\n", env!("CARGO_PKG_VERSION"), Level::best()));

    let empty = program.with_extension("cpp");
    std::fs::write(&empty, "int main() { return 0; }\n").unwrap();
    if works(Command::new(&compiler).args(["-x", "c++", "-fsyntax-only"]).arg(&empty)) {
        run(Command::new(&compiler)
            .args(["-x", "c++", "-fsyntax-only"])
            .args(WARNINGS)
            .arg("-I")
            .arg(&header)
            .arg(&source));
    } else {
        not_run("a C++ compiler", "FLASHTILE_EXPECT_CC");
    }
}

/// Names, offsets and sizes, in the order in which tests/capi/test.c prints its own.
fn layout() -> Vec<(String, usize)> {
    macro_rules! layout {
        ($name:literal $struct:ident: $($member:ident)+) => {
            [($name.to_owned(), size_of::<$struct>())]
                .into_iter()
                .chain([$((format!("{}.{}", $name, stringify!($member)), offset_of!($struct, $member))),+])
        };
    }
    layout!("tensor" Tensor: data dtype rank shape strides)
        .chain(
            layout!("options" Options: struct_size flags threads scale softcap window_left window_right query_position
            alibi query_offset query_offsets query_offset_count key_lengths key_length_count alibi_slopes
            alibi_slope_count mask bias level form reserved sinks sink_count masks mask_count score_row score_context
            query_lengths query_length_count query_starts query_start_count key_starts key_start_count page_table
            score_tables score_table_count first_queries first_query_count first_keys first_key_count cache),
        )
        .chain(layout!("page_table" PageTable: pages32 pages64 page_count width starts start_count lengths length_count
            page_size))
        .chain(layout!("mask" Mask: kind reserved numbers lists counts))
        .chain(layout!("score_table" ScoreTable: kind reserved numbers table count))
        .chain(layout!("rotation" Rotation: rotary positions position_count))
        .chain(layout!("cache_format" CacheFormat: dtype reserved heads_kv head_dim value_dim))
        .chain(layout!("cache_info" CacheInfo: format sequences layers capacity first window pages page_size free_pages
            shared_pages bytes))
        .chain(layout!("cache_view" CacheView: cache layer sequences sequence_count))
        .chain(layout!("row" Row: batch head query position first_key))
        .chain(layout!("cross_entropy_options" CrossEntropyOptions: flags reduction ignore_index label_smoothing
            class_weights class_weight_count reserved))
        .collect()
}

#[cfg(feature = "rayon")]
#[test]
fn works_from_python() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    if !works(Command::new(&python).args(["-c", "import numpy"])) {
        return not_run("Python with numpy", "FLASHTILE_EXPECT_PYTHON");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for script in ["tests/capi/test_capi.py", "examples/python/example.py"] {
        print!("{}", run(Command::new(&python).arg("-B").arg(root.join(script)).arg(library())));
    }
}
