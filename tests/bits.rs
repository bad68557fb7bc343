//! Promise: the bits of a row depend on its own inputs, the level and the form. They do not depend on the number of threads, on
//! other rows of the call, on the row's place in memory, or on earlier contents of the workspace.

mod support;

use flashtile::{AlibiSlopes, Attention, Element, Form, Level, QueryOffset, TensorMut, TensorRef, Workspace};
use support::problems::{Bits, bits, forms_and_levels};
use support::{Dims, Inputs, Rng, len};

/// Options that depend on positions, window sizes or tensors.
#[derive(Clone, Debug)]
struct Options {
    causal: bool,
    window: (Option<usize>, Option<usize>),
    offset: isize,
    slopes: Option<Vec<f32>>,
    softcap: Option<f32>,
    /// A bias for each head, query and key.
    bias: Option<Vec<f32>>,
}

impl Options {
    fn random(dims: &Dims, rng: &mut Rng) -> Self {
        let bound = |rng: &mut Rng| rng.one_in(2).then(|| rng.below(dims.seq_kv + 1));
        let (heads, pairs) = (dims.heads_q, dims.heads_q * dims.seq_q * dims.seq_kv);
        Options {
            causal: rng.one_in(2),
            window: (bound(rng), bound(rng)),
            offset: rng.below(dims.seq_kv + 1) as isize - 3,
            slopes: rng.one_in(3).then(|| (0..heads).map(|_| rng.uniform()).collect()),
            softcap: rng.one_in(4).then_some(2.0),
            bias: rng
                .one_in(3)
                .then(|| (0..pairs).map(|_| if rng.one_in(8) { f32::NEG_INFINITY } else { rng.normal() }).collect()),
        }
    }

    /// The options of query heads `heads` and queries `queries` alone.
    fn attention<'a>(
        &'a self,
        dims: &Dims,
        heads: std::ops::Range<usize>,
        queries: std::ops::Range<usize>,
    ) -> Attention<'a> {
        let offset = QueryOffset::At(self.offset + queries.start as isize);
        let mut attention = Attention::new().window(self.window.0, self.window.1).query_offset(offset);
        if self.causal {
            attention = attention.causal();
        }
        if let Some(slopes) = &self.slopes {
            attention = attention.alibi(AlibiSlopes::PerHead(&slopes[heads.clone()]));
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if let Some(bias) = &self.bias {
            let strides = [0, dims.seq_q * dims.seq_kv, dims.seq_kv, 1].map(|stride| stride as isize);
            let first = (heads.start * dims.seq_q + queries.start) * dims.seq_kv;
            let shape = [1, heads.len(), queries.len(), dims.seq_kv];
            attention = attention.bias(TensorRef::<f32>::with_strides(bias, first, shape, strides).unwrap());
        }
        attention
    }
}

/// Some batches, heads and queries of larger inputs.
#[derive(Clone, Debug)]
struct Part {
    batches: std::ops::Range<usize>,
    heads_kv: std::ops::Range<usize>,
    /// Among the query heads of each key/value head.
    group: std::ops::Range<usize>,
    queries: std::ops::Range<usize>,
}

/// Computes a part on its own and compares each of its rows with the same row of `whole`.
fn check_part<T: Bits>(
    inputs: &Inputs<T>,
    options: &Options,
    (form, level): (Form, Level),
    part: &Part,
    whole: &(Vec<u32>, Vec<u32>),
) {
    let dims = inputs.dims;
    let group = dims.heads_q / dims.heads_kv;
    // A part of one group, or several whole groups.
    assert!(part.group == (0..group) || part.heads_kv.len() == 1);
    let heads = part.heads_kv.start * group + part.group.start..(part.heads_kv.end - 1) * group + part.group.end;
    let own = Dims {
        batch: part.batches.len(),
        heads_q: heads.len(),
        heads_kv: part.heads_kv.len(),
        seq_q: part.queries.len(),
        ..dims
    };
    let cut = |data: &[T], [_, heads, rows, cols]: [usize; 4], shape: [usize; 4], [b, h, r]: [usize; 3]| {
        let strides = [heads * rows * cols, rows * cols, cols, 1].map(|stride| stride as isize);
        let at = if len(shape) == 0 { 0 } else { ((b * heads + h) * rows + r) * cols };
        let tensor = TensorRef::with_strides(data, at, shape, strides).unwrap();
        let [b, h, r, c] = shape;
        let rows = (0..b).flat_map(|b| (0..h).flat_map(move |h| (0..r).map(move |r| [b, h, r])));
        rows.flat_map(|[b, h, r]| (0..c).map(move |c| [b, h, r, c])).map(|i| tensor.get(i).unwrap()).collect::<Vec<T>>()
    };
    let first_batch = part.batches.start;
    let own_inputs = Inputs {
        dims: own,
        q: cut(&inputs.q, dims.q(), own.q(), [first_batch, heads.start, part.queries.start]),
        k: cut(&inputs.k, dims.k(), own.k(), [first_batch, part.heads_kv.start, 0]),
        v: cut(&inputs.v, dims.v(), own.v(), [first_batch, part.heads_kv.start, 0]),
    };
    let attention = options.attention(&dims, heads.clone(), part.queries.clone()).form(form).level(level);
    let (out, lse) = own_inputs.bits(&attention);
    for (n, [b, h, i]) in own.rows().enumerate() {
        let row = ((part.batches.start + b) * dims.heads_q + heads.start + h) * dims.seq_q + part.queries.start + i;
        let case = || format!("row {b} {h} {i} of {part:?}, {dims:?} {form:?} {level} {options:?}");
        let d = dims.value_dim;
        assert_eq!(out[n * d..][..d], whole.0[row * d..][..d], "{}", case());
        assert_eq!(lse[n], whole.1[row], "lse of {}", case());
    }
}

/// A range inside `0..n` that is not empty.
fn some_of(n: usize, rng: &mut Rng) -> std::ops::Range<usize> {
    let start = rng.below(n);
    start..start + 1 + rng.below(n - start)
}

fn parts<T: Bits>(seed: u64, rounds: usize) {
    let mut rng = Rng(seed);
    for _ in 0..rounds {
        let (heads_kv, group) = (1 + rng.below(3), 1 + rng.below(4));
        let seq_kv = [1 + rng.below(30), 60 + rng.below(100), 230 + rng.below(30), 500 + rng.below(600)][rng.below(4)];
        let dims = Dims {
            batch: 1 + rng.below(3),
            heads_q: heads_kv * group,
            heads_kv,
            seq_q: [1 + rng.below(4), 1 + rng.below(40), 180 + rng.below(30)][rng.below(3)],
            seq_kv,
            head_dim: 1 + rng.below(20),
            // Sometimes whole vectors: a lone panel multiplies them in place.
            value_dim: if rng.one_in(3) { 16 * (1 + rng.below(4)) } else { 1 + rng.below(20) },
        };
        let (inputs, options) = (Inputs::<T>::random(dims, &mut rng), Options::random(&dims, &mut rng));
        for (form, level) in forms_and_levels() {
            let all = options.attention(&dims, 0..dims.heads_q, 0..dims.seq_q).form(form).level(level);
            let whole = inputs.bits(&all);
            for _ in 0..3 {
                let one_group = rng.one_in(2);
                let heads_kv = if one_group {
                    Some(rng.below(dims.heads_kv)).map(|h| h..h + 1).unwrap()
                } else {
                    some_of(dims.heads_kv, &mut rng)
                };
                let part = Part {
                    batches: some_of(dims.batch, &mut rng),
                    group: if one_group { some_of(group, &mut rng) } else { 0..group },
                    heads_kv,
                    queries: some_of(dims.seq_q, &mut rng),
                };
                check_part(&inputs, &options, (form, level), &part, &whole);
            }
        }
    }
}

#[test]
fn any_part_f32() {
    parts::<f32>(1, 150);
}
#[test]
fn any_part_f16() {
    parts::<flashtile::f16>(2, 80);
}
#[test]
fn any_part_bf16() {
    parts::<flashtile::bf16>(3, 80);
}

/// Queries one by one, as in decoding, against all at once.
#[test]
fn one_query_after_the_other() {
    let mut rng = Rng(4);
    let dims = Dims { heads_q: 4, heads_kv: 2, ..Dims::new(1, 37, 700, 16) };
    for _ in 0..6 {
        let (inputs, options) = (Inputs::<f32>::random(dims, &mut rng), Options::random(&dims, &mut rng));
        for (form, level) in forms_and_levels() {
            let all = options.attention(&dims, 0..dims.heads_q, 0..dims.seq_q).form(form).level(level);
            let whole = inputs.bits(&all);
            for i in 0..dims.seq_q {
                let part = Part { batches: 0..1, heads_kv: 0..2, group: 0..2, queries: i..i + 1 };
                check_part(&inputs, &options, (form, level), &part, &whole);
            }
        }
    }
}

/// One, two and three heads of a group against all four: that many rows share each load of keys and values.
#[test]
fn some_heads_of_a_group() {
    let mut rng = Rng(6);
    let dims = Dims { heads_q: 4, heads_kv: 1, ..Dims::new(1, 1, 300, 128) };
    let (inputs, options) = (Inputs::<f32>::random(dims, &mut rng), Options::random(&dims, &mut rng));
    for (form, level) in forms_and_levels() {
        let whole = inputs.bits(&options.attention(&dims, 0..4, 0..1).form(form).level(level));
        for group in [0..1, 1..2, 3..4, 0..2, 1..3, 1..4] {
            check_part(
                &inputs,
                &options,
                (form, level),
                &Part { batches: 0..1, heads_kv: 0..1, group, queries: 0..1 },
                &whole,
            );
        }
    }
}

/// Without a form, a few rows at the end of a prefill are decoded: the bits of each row are those of its own form.
#[test]
fn tails_have_the_bits_of_decode() {
    let mut rng = Rng(8);
    for (level, seq_q) in Level::available().flat_map(|level| [17, 33, 65, 257].map(|rows| (level, rows))) {
        let dims = Dims { batch: 2, ..Dims::new(3, seq_q, 300, 24) };
        let (inputs, options) = (Inputs::<f32>::random(dims, &mut rng), Options::random(&dims, &mut rng));
        let all = options.attention(&dims, 0..3, 0..seq_q).level(level);
        let plan = all.plan(inputs.q(), (inputs.k(), inputs.v())).unwrap();
        let main = seq_q - plan.tail_rows();
        assert_eq!((plan.form(), plan.tail_rows()), (Form::Prefill, 1), "{plan}");
        let whole = inputs.bits(&all);
        for (form, queries) in [(Form::Prefill, 0..main), (Form::Decode, main..seq_q)] {
            let part = Part { batches: 0..2, heads_kv: 0..3, group: 0..1, queries };
            check_part(&inputs, &options, (form, level), &part, &whole);
        }
    }
}

/// Many small heads are computed by one task: each as it is alone.
#[test]
fn heads_that_share_a_task() {
    let mut rng = Rng(10);
    for (seq_q, seq_kv, dim) in [(4, 4, 64), (5, 9, 16), (12, 12, 8), (20, 40, 16), (3, 70, 8)] {
        let dims = Dims { batch: 40, heads_q: 8, heads_kv: 4, ..Dims::new(1, seq_q, seq_kv, dim) };
        let (inputs, options) = (Inputs::<f32>::random(dims, &mut rng), Options::random(&dims, &mut rng));
        for (form, level) in forms_and_levels() {
            let all = options.attention(&dims, 0..8, 0..seq_q).form(form).level(level);
            let tasks = all.plan(inputs.q(), (inputs.k(), inputs.v())).unwrap().tasks();
            assert!((64..160).contains(&tasks), "{tasks} tasks");
            let whole = inputs.bits(&all);
            for batch in [0, 17, 39] {
                let part = Part { batches: batch..batch + 1, heads_kv: 0..4, group: 0..2, queries: 0..seq_q };
                check_part(&inputs, &options, (form, level), &part, &whole);
            }
        }
    }
}

/// Short heads are one call of the kernel. They have the bits of the general steps, which a mask that hides nothing asks for, whether
/// some of their values are infinite or not.
#[test]
fn short_heads_have_the_bits_of_the_general_steps() {
    short_heads::<f32>(60);
    short_heads::<flashtile::f16>(30);
    short_heads::<flashtile::bf16>(30);
}

fn short_heads<T: Bits>(rounds: usize) {
    let mut rng = Rng(11);
    for round in 0..rounds {
        let (seq_q, seq_kv) = (1 + rng.below([9, 70][round % 2]), 1 + rng.below([20, 64, 200][round % 3]));
        let (head_dim, value_dim) = (1 + rng.below(80), 16 * (1 + rng.below(5)));
        let (heads_kv, group) = (1 + rng.below(3), 1 + rng.below(2));
        let batch = [1, 70][usize::from(rng.one_in(4))];
        let dims = Dims { batch, heads_kv, value_dim, ..Dims::new(heads_kv * group, seq_q, seq_kv, head_dim) };
        let mut inputs = Inputs::<T>::random(dims, &mut rng);
        if rng.one_in(3) {
            let at = rng.below(inputs.v.len());
            inputs.v[at] = T::from_f32([f32::INFINITY, f32::NAN, f32::NEG_INFINITY][rng.below(3)]);
        }
        let all = vec![true; seq_kv];
        let attend = TensorRef::from_slice(&all, [1, 1, 1, seq_kv]).unwrap();
        for level in Level::available() {
            let short = Attention::new().form(Form::Prefill).level(level);
            let general = short.clone().mask(attend);
            assert!(inputs.bits(&short) == inputs.bits(&general), "{} {dims:?}, {level}, round {round}", T::DTYPE);
        }
    }
}

/// Positions far beyond the integers that f32 holds exactly.
#[test]
fn far_positions() {
    let mut rng = Rng(5);
    let dims = Dims::new(1, 40, 300, 8);
    let inputs = Inputs::<f32>::random(dims, &mut rng);
    for offset in [1isize << 25, (1 << 26) + 77, -(1 << 25) - 1, 1 << 40] {
        let options = Options {
            causal: false,
            window: if offset < 0 {
                (None, Some(offset.unsigned_abs() + 100))
            } else {
                (Some(offset as usize - 100), None)
            },
            offset,
            slopes: Some(vec![1e-6]),
            softcap: None,
            bias: None,
        };
        for (form, level) in forms_and_levels() {
            let whole = inputs.bits(&options.attention(&dims, 0..1, 0..40).form(form).level(level));
            for queries in [0..1, 1..2, 17..18, 3..40, 39..40] {
                let part = Part { batches: 0..1, heads_kv: 0..1, group: 0..1, queries };
                check_part(&inputs, &options, (form, level), &part, &whole);
            }
        }
    }
}

/// Problems on either side of every threshold of the plan: work worth a pool, keys worth a split, tasks enough without
/// splitting, rows of a block, rows of a decode task.
#[cfg(feature = "rayon")]
fn thresholds() -> Vec<Dims> {
    let decode = |batch, heads_kv, group, seq_kv| Dims {
        batch,
        heads_q: heads_kv * group,
        heads_kv,
        ..Dims::new(1, 1, seq_kv, 64)
    };
    vec![
        decode(1, 1, 1, 511),
        decode(1, 1, 1, 512),
        decode(1, 2, 4, 513),
        decode(1, 1, 1, 1025),
        decode(1, 2, 8, 8200),
        decode(1, 63, 1, 1100),
        decode(1, 64, 1, 1100),
        decode(5, 13, 2, 1100),
        Dims::new(1, 7, 1030, 17),
        Dims::new(1, 15, 1030, 17),
        Dims::new(1, 17, 1030, 17),
        Dims::new(1, 24, 1030, 17),
        Dims::new(1, 25, 1030, 17),
        Dims::new(1, 33, 520, 64),
        Dims::new(1, 255, 300, 32),
        Dims::new(1, 256, 300, 32),
        Dims::new(1, 257, 300, 32),
        Dims::new(1, 580, 500, 40),
        Dims { heads_q: 6, heads_kv: 2, batch: 2, ..Dims::new(1, 130, 260, 48) },
        Dims { heads_q: 4, heads_kv: 1, ..Dims::new(1, 90, 90, 16) },
    ]
}

/// Serial, in pools of any size, in a pool inside a pool, prepared or not, and with a used workspace: all the same bits.
#[cfg(feature = "rayon")]
#[test]
fn threads_and_memory() {
    let pools: Vec<_> = [1, 2, 3, 4, 7, 16].into_iter().map(pool).collect();
    let mut rng = Rng(6);
    let mut used = Workspace::new();
    for dims in thresholds() {
        let inputs = Inputs::<f32>::random(dims, &mut rng);
        for (form, level) in forms_and_levels() {
            let base = Attention::new().form(form).level(level);
            for attention in [base.clone(), base.causal().window(Some(dims.seq_kv / 3), None)] {
                let case = format!("{dims:?} {form:?} {level}");
                let serial = inputs.bits(&attention.clone().threads(flashtile::Threads::Serial));
                for pool in &pools {
                    let threads = pool.current_num_threads();
                    assert_eq!(pool.install(|| inputs.bits(&attention)), serial, "{threads} threads, {case}");
                    let (out, lse) = pool.install(|| inputs.compute_with(&attention, &mut used));
                    assert_eq!((bits(&out), bits(&lse)), serial, "{threads} threads and used memory, {case}");
                }
                let nested = pools[2].install(|| pools[1].install(|| inputs.bits(&attention)));
                assert_eq!(nested, serial, "a pool in a pool, {case}");
                assert_eq!(prepared(&inputs, &attention, &mut used), serial, "prepared, {case}");
                let in_pool = pools[3].install(|| prepared(&inputs, &attention, &mut used));
                assert_eq!(in_pool, serial, "prepared in a pool, {case}");
            }
        }
    }
}

/// Calls from threads outside the pool, several at a time: the pool's threads help those that they reach in time. Some problems are
/// large enough to wake them, some only follow each other closely.
#[cfg(feature = "rayon")]
#[test]
fn calls_from_outside_the_pool() {
    let problems = [
        Dims::new(8, 300, 300, 64),
        Dims { heads_q: 9, heads_kv: 3, ..Dims::new(1, 1, 2048, 64) },
        Dims { heads_q: 32, heads_kv: 8, ..Dims::new(1, 1, 5000, 128) },
        Dims::new(4, 40, 90, 80),
    ];
    let mut rng = Rng(9);
    let inputs: Vec<_> = problems.into_iter().map(|dims| Inputs::<f32>::random(dims, &mut rng)).collect();
    let attention = Attention::new().causal();
    let serial: Vec<_> =
        inputs.iter().map(|x| x.bits(&attention.clone().threads(flashtile::Threads::Serial))).collect();
    std::thread::scope(|scope| {
        for _caller in 0..3 {
            scope.spawn(|| {
                let mut workspace = Workspace::new();
                for _round in 0..40 {
                    for (inputs, serial) in inputs.iter().zip(&serial) {
                        let (out, lse) = inputs.compute_with(&attention, &mut workspace);
                        assert_eq!((bits(&out), bits(&lse)), *serial, "{:?}", inputs.dims);
                    }
                }
            });
        }
    });
}

#[cfg(feature = "rayon")]
fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// As [`Inputs::bits`], by a prepared call.
fn prepared<T: Bits + Element>(
    inputs: &Inputs<T>,
    attention: &Attention<'_>,
    workspace: &mut Workspace,
) -> (Vec<u32>, Vec<u32>) {
    let dims = inputs.dims;
    let prepared = attention.prepare(inputs.q(), (inputs.k(), inputs.v())).unwrap();
    let (mut out, mut lse) = (vec![T::default(); len(dims.out())], vec![0.0; len(dims.lse())]);
    let out_tensor = TensorMut::from_slice(&mut out, dims.out()).unwrap();
    let lse_tensor = TensorMut::from_slice(&mut lse, dims.lse()).unwrap();
    prepared.compute(inputs.q(), (inputs.k(), inputs.v()), out_tensor, lse_tensor, workspace).unwrap();
    (bits(&out), bits(&lse))
}

/// The same call repeated, with a workspace that other problems have used.
#[test]
fn run_to_run() {
    let mut rng = Rng(7);
    let mut workspace = Workspace::new();
    let problems: Vec<_> =
        (0..12).map(|n| Inputs::<f32>::random(Dims::new(1, 1 + n * 5, 40 + n * 120, 3 + n), &mut rng)).collect();
    for (form, level) in forms_and_levels() {
        let attention = Attention::new().form(form).level(level).causal();
        let expected: Vec<_> = problems.iter().map(|inputs| inputs.bits(&attention)).collect();
        for n in 0..240 {
            let n = n * 7 % problems.len();
            let (out, lse) = problems[n].compute_with(&attention, &mut workspace);
            assert_eq!((bits(&out), bits(&lse)), expected[n], "problem {n} {form:?} {level}");
            let planned = prepared(&problems[n], &attention, &mut workspace);
            assert_eq!(planned, expected[n], "problem {n} {form:?} {level}, prepared");
        }
    }
}

/// A row of a decode step alone, whose keys are split between tasks, and in a batch so large that they are not.
#[test]
fn split_and_unsplit() {
    let mut rng = Rng(8);
    let dims = Dims { batch: 70, heads_q: 2, heads_kv: 1, ..Dims::new(1, 1, 1300, 16) };
    let (inputs, none) = (
        Inputs::<f32>::random(dims, &mut rng),
        Options { causal: false, window: (None, None), offset: 0, slopes: None, softcap: None, bias: None },
    );
    for level in Level::available() {
        let attention = none.attention(&dims, 0..2, 0..1).level(level);
        assert_eq!(attention.plan(inputs.q(), (inputs.k(), inputs.v())).unwrap().form(), Form::Decode);
        let whole = inputs.bits(&attention);
        for batches in [0..1, 69..70, 3..50, 7..71 - 1] {
            let part = Part { batches, heads_kv: 0..1, group: 0..2, queries: 0..1 };
            check_part(&inputs, &none, (Form::Decode, level), &part, &whole);
        }
        // A single head of it takes the same form.
        let part = Part { batches: 5..6, heads_kv: 0..1, group: 1..2, queries: 0..1 };
        check_part(&inputs, &none, (Form::Decode, level), &part, &whole);
    }
}

/// A sum that rescaling turned into -0 stays -0. The next tile, which only the next query sees, must not turn it into +0,
/// whether the query is computed beside that one or alone.
#[test]
fn signs_of_zero() {
    let none = Options { causal: true, window: (None, None), offset: 0, slopes: None, softcap: None, bias: None };
    // At the ends of tiles of 48 to 240 keys, and of splits.
    for step in [240, 512] {
        let dims = Dims::new(1, 2, 2 * step + 1, 1);
        let mut inputs =
            Inputs::<f32> { dims, q: vec![1.0; 2], k: vec![200.0; dims.seq_kv], v: vec![1.0; dims.seq_kv] };
        // First a small sum, then scores whose probs are 2^288 times as large with values that round to -0, then the last query's own key.
        inputs.k[..step].fill(0.0);
        inputs.v[..step].fill(-1e-40);
        inputs.v[step..2 * step].fill(-f32::from_bits(1));
        let options = Options { offset: 2 * step as isize - 1, ..none.clone() };
        for (form, level) in forms_and_levels() {
            let whole = inputs.bits(&options.attention(&dims, 0..1, 0..2).form(form).level(level));
            let part = Part { batches: 0..1, heads_kv: 0..1, group: 0..1, queries: 0..1 };
            check_part(&inputs, &options, (form, level), &part, &whole);
        }
    }
}
