//! Promise: a call with a kept workspace does not allocate. What a call allocates beside its output does not grow with the
//! sequences.
//!
//! All watched threads share one set of counters, so this is a single test.

mod support;

use flashtile::{
    Attention, Form, KeysValues, Level, PageTable, Prepared, TensorMut, TensorRef, Threads, Workspace, bf16,
};
use support::counting::{Counting, Usage};
use support::problems::{Bits, forms_and_levels};
use support::{Dims, Inputs, Rng, len};

#[global_allocator]
static COUNTING: Counting = Counting::new();

/// Inputs with outputs to write to.
struct Call<T> {
    inputs: Inputs<T>,
    out: Vec<f32>,
    lse: Vec<f32>,
    key_sums: Vec<f32>,
}

impl<T: Bits> Call<T> {
    fn new(dims: Dims) -> Self {
        let (out, lse) = (vec![0.0; len(dims.out())], vec![0.0; len(dims.lse())]);
        let key_sums = vec![0.0; dims.batch * dims.heads_q * dims.seq_kv];
        Call { inputs: Inputs::random(dims, &mut Rng(1)), out, lse, key_sums }
    }

    /// Allocations of a call, and of one for the key sums.
    fn usage(
        &mut self,
        attention: &Attention<'_>,
        prepared: Option<&Prepared<'_>>,
        workspace: &mut Workspace,
    ) -> Usage {
        let Call { inputs, out, lse, key_sums } = self;
        let dims = inputs.dims;
        let out = TensorMut::from_slice(out, dims.out()).unwrap();
        let sums = TensorMut::from_slice(key_sums, [dims.batch, dims.heads_q, dims.seq_kv]).unwrap();
        let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
        let (done, usage) = COUNTING.usage(|| {
            let lse_out = TensorMut::from_slice(lse, dims.lse())?;
            match prepared {
                Some(prepared) => prepared.compute(q, (k, v), out, lse_out, workspace)?,
                None => attention.compute(q, (k, v), out, lse_out, workspace)?,
            }
            let lse = TensorRef::from_slice(lse, dims.lse())?;
            match prepared {
                Some(prepared) => prepared.key_sums(q, (k, v), lse, sums, workspace),
                None => attention.key_sums(q, (k, v), lse, sums, workspace),
            }
        });
        done.unwrap();
        usage
    }
}

#[test]
fn allocation() {
    Counting::watch();
    nothing_on_later_calls();
    nothing_for_queries_that_fit_no_pairs();
    nothing_for_other_numbers_of_keys();
    nothing_for_shared_keys();
    flat_in_the_keys();
    bytes_are_what_is_held();
    // Last, because the threads of a pool are watched and end some time after the pool.
    #[cfg(feature = "rayon")]
    nothing_for_steps_over_pages();
    nothing_within_a_pool();
}

/// Problems whose later calls are no larger than the first.
fn problems() -> [Dims; 4] {
    [
        Dims { batch: 2, heads_q: 4, heads_kv: 2, ..Dims::new(1, 300, 500, 40) },
        Dims { heads_q: 8, heads_kv: 2, ..Dims::new(1, 1, 3000, 64) },
        Dims { value_dim: 9, ..Dims::new(1, 20, 40, 3) },
        Dims::new(1, 1, 1, 1),
    ]
}

fn nothing_on_later_calls() {
    for (form, level) in forms_and_levels() {
        let attention = Attention::new().causal().softcap(9.0).form(form).level(level).threads(Threads::Serial);
        let mut workspace = Workspace::new();
        for dims in problems() {
            let mut call = Call::<f32>::new(dims);
            let prepared = attention.prepare(call.inputs.q(), (call.inputs.k(), call.inputs.v())).unwrap();
            for prepared in [None, Some(&prepared)] {
                call.usage(&attention, prepared, &mut workspace);
                let later = call.usage(&attention, prepared, &mut workspace);
                assert_eq!(later.calls, 0, "{later:?} {dims:?} {form:?} {level}");
            }
        }
        // After the large ones, smaller ones allocate nothing.
        for dims in problems() {
            let later = Call::<f32>::new(dims).usage(&attention, None, &mut workspace);
            assert_eq!(later.calls, 0, "{later:?} {dims:?} {form:?} {level}, after larger ones");
        }
    }
}

/// Scores of denormal bf16 queries are computed in another way.
fn nothing_for_queries_that_fit_no_pairs() {
    for (form, level) in forms_and_levels() {
        let attention = Attention::new().form(form).level(level).threads(Threads::Serial);
        let mut workspace = Workspace::new();
        let mut call = Call::<bf16>::new(Dims::new(1, 20, 300, 33));
        call.inputs.q[40] = bf16::from_bits(1);
        call.usage(&attention, None, &mut workspace);
        let later = call.usage(&attention, None, &mut workspace);
        assert_eq!(later.calls, 0, "{later:?} {form:?} {level}");
    }
}

/// A prepared call that has seen the most keys plans anew for fewer, and for the most again, without an allocation.
fn nothing_for_other_numbers_of_keys() {
    const MOST: usize = 1300;
    for (form, level) in forms_and_levels() {
        let attention = Attention::new().causal().form(form).level(level).threads(Threads::Serial);
        let dims = Dims { heads_q: 8, ..Dims::new(2, 1, MOST, 64) };
        let inputs = Inputs::<f32>::random(dims, &mut Rng(1));
        let keys = |n: usize| (inputs.k().narrow(2, ..n).unwrap(), inputs.v().narrow(2, ..n).unwrap());
        let mut prepared = attention.prepare(inputs.q(), (inputs.k(), inputs.v())).unwrap();
        let (mut out, mut workspace) = (vec![0.0f32; len(dims.out())], Workspace::new());
        let to = TensorMut::from_slice(&mut out, dims.out()).unwrap();
        prepared.compute(inputs.q(), (inputs.k(), inputs.v()), to, None, &mut workspace).unwrap();
        for n in [1, 512, 513, 1024, 1025, MOST, 0, MOST] {
            let ((k, v), out) = (keys(n), TensorMut::from_slice(&mut out, dims.out()).unwrap());
            let (done, usage) = COUNTING.usage(|| {
                prepared.set_keys(n)?;
                prepared.compute(inputs.q(), (k, v), out, None, &mut workspace)
            });
            done.unwrap();
            assert_eq!(usage.calls, 0, "{usage:?} {n} keys {form:?} {level}");
        }
    }
}

/// Beams share their keys: fewer of them, or fewer keys, allocate nothing.
fn nothing_for_shared_keys() {
    let (beams, heads, dim, keys) = (6, 8, 32, 1300);
    let data: Vec<f32> = Rng(2).normals(heads * keys * dim);
    for (form, level) in forms_and_levels() {
        let attention = Attention::new().form(form).level(level).threads(Threads::Serial);
        let (mut out, mut workspace) = (vec![0.0f32; beams * heads * dim], Workspace::new());
        let mut call = |beams: usize, keys: usize| {
            let q = TensorRef::from_slice(&data[..beams * heads * dim], [beams, heads, 1, dim])?;
            let strides = [0, (keys * dim) as isize, dim as isize, 1];
            let kv = TensorRef::with_strides(&data, 0, [beams, heads, keys, dim], strides)?;
            let out = TensorMut::from_slice(&mut out[..beams * heads * dim], [beams, heads, 1, dim])?;
            attention.compute(q, (kv, kv), out, None, &mut workspace)
        };
        call(beams, keys).unwrap();
        for (beams, keys) in [(beams, keys), (2, 600), (1, keys), (5, 1024), (beams, 100), (beams, keys)] {
            let (done, usage) = COUNTING.usage(|| call(beams, keys));
            done.unwrap();
            assert_eq!(usage.calls, 0, "{usage:?} {beams} beams over {keys} keys {form:?} {level}");
        }
    }
}

/// A server's step: lengths grow in pages of any size, all is planned again, and nothing is allocated once the most has been seen.
fn nothing_for_steps_over_pages() {
    let (heads_q, heads_kv, dim, sequences, most) = (4, 2, 32, 3, 700usize);
    for (form, level) in forms_and_levels() {
        for size in [1, 16, 300] {
            let attention = Attention::new().causal().form(form).level(level).threads(Threads::Serial);
            let attention = attention.query_starts(&[0usize, 1]);
            let pages = sequences * most.div_ceil(size);
            let pool: Vec<f32> = Rng(2).normals(pages * heads_kv * size * dim);
            let pool = TensorRef::from_slice(&pool, [pages, heads_kv, size, dim]).unwrap();
            let list: Vec<u32> = (0..pages as u32).rev().collect();
            let q: Vec<f32> = Rng(3).normals(5 * heads_q * dim);
            let (mut out, mut workspace) = (vec![0.0f32; 5 * heads_q * dim], Workspace::new());
            let longest = [most];
            let one = PageTable::new(&list[..pages / sequences], pages / sequences, &longest, size).unwrap();
            let first = TensorRef::from_slice(&q[..heads_q * dim], [1, heads_q, dim]).unwrap();
            let mut prepared = attention.prepare(first, KeysValues::paged(pool, pool, one)).unwrap();
            let mut step = |starts: &[usize; 4], lengths: &[usize; 3]| {
                let total = starts[3];
                let q = TensorRef::from_slice(&q[..total * heads_q * dim], [total, heads_q, dim])?;
                let out = TensorMut::from_slice(&mut out[..total * heads_q * dim], [total, heads_q, dim])?;
                let table = PageTable::new(&list, pages / sequences, lengths, size)?;
                prepared.replan_packed(q, starts, KeysValues::paged(pool, pool, table))?;
                prepared.compute(q, KeysValues::paged(pool, pool, table), out, None, &mut workspace)
            };
            step(&[0, 1, 2, 5], &[most; 3]).unwrap();
            for (starts, lengths) in
                [([0, 1, 2, 3], [5, 400, 513]), ([0, 1, 4, 5], [most, 1, 90]), ([0, 1, 2, 5], [most; 3])]
            {
                let (done, usage) = COUNTING.usage(|| step(&starts, &lengths));
                done.unwrap();
                assert_eq!(usage.calls, 0, "{usage:?} pages of {size} {form:?} {level}");
            }
        }
    }
}

/// The same in a pool, where other workers may claim the tasks than the last time.
#[cfg(feature = "rayon")]
fn nothing_within_a_pool() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).start_handler(|_| Counting::watch()).build().unwrap();
    for (form, level) in forms_and_levels() {
        let attention = Attention::new().causal().form(form).level(level);
        let mut workspace = Workspace::new();
        for dims in problems() {
            let mut call = Call::<f32>::new(dims);
            let prepared = attention.prepare(call.inputs.q(), (call.inputs.k(), call.inputs.v())).unwrap();
            pool.install(|| {
                // Twice, because the pool may allocate for itself the first time.
                call.usage(&attention, None, &mut workspace);
                call.usage(&attention, None, &mut workspace);
                for n in 0..40 {
                    let later = call.usage(&attention, (n % 2 == 0).then_some(&prepared), &mut workspace);
                    assert_eq!(later.calls, 0, "{later:?} {dims:?} {form:?} {level} in a pool, call {n}");
                }
            });
        }
    }
}

/// Eight times the keys, the same memory.
fn flat_in_the_keys() {
    for level in Level::available() {
        for softcap in [false, true] {
            let peak = |seq_kv| {
                let mut attention = Attention::new().form(Form::Prefill).level(level).threads(Threads::Serial).causal();
                if softcap {
                    attention = attention.softcap(20.0);
                }
                let mut call = Call::<f32>::new(Dims::new(1, 200, seq_kv, 64));
                call.usage(&attention, None, &mut Workspace::new()).peak
            };
            let (short, long) = (peak(1024), peak(8192));
            // The test harness may allocate about a kilobyte.
            assert!(short > 0 && long <= short + 4096, "{short} bytes for 1024 keys, {long} for 8192: {level}");
            assert!(long < 2 << 20, "{long} bytes for 200 queries of 64: {level}");
        }
    }
}

/// [`Workspace::bytes`] is what the workspace holds.
fn bytes_are_what_is_held() {
    for (form, level) in forms_and_levels() {
        for dims in problems() {
            let attention = Attention::new().form(form).level(level).threads(Threads::Serial);
            let mut call = Call::<f32>::new(dims);
            let mut workspace = Workspace::new();
            assert_eq!(workspace.bytes(), 0);
            call.usage(&attention, None, &mut workspace);
            let bytes = workspace.bytes();
            let ((), freed) = COUNTING.freed(|| drop(workspace));
            // The list of workers' memories is a few words more.
            assert!(bytes <= freed && freed <= bytes + 2048, "{bytes} bytes, {freed} freed: {dims:?} {form:?} {level}");
        }
    }
}
