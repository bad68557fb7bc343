//! Whole calls: `cargo bench --bench attention [-- --quick] [prefill/causal]`.
//!
//! Names read as a path: form, mask, type, dimensions, level, threads. `h32g4` are 32 query heads, 4 to each key/value head.
//! Every answer is checked against the definition before it is timed.
//!
//! Throughput of `prefill` is in floating-point operations ("elem") of the visible pairs. Throughput of `decode` is in bytes
//! of the visible keys and values, each read once. `plan` is a tiny problem: planned by every call, planned once, and
//! planned but not computed.

mod support;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flashtile::{Attention, Element, Level, TensorMut, Threads, Workspace, bf16, f16};
use std::time::Duration;
use support::{Case, Dims};

/// Which keys are visible. The rest of a name is dimensions and types.
#[derive(Clone, Copy)]
enum Pattern {
    Full,
    Causal,
    /// Causal, with at most this many keys for each query.
    Window(usize),
    /// Causal, with a softcap.
    Softcap,
}

impl Pattern {
    fn name(self) -> String {
        match self {
            Pattern::Full => "full".into(),
            Pattern::Causal => "causal".into(),
            Pattern::Window(keys) => format!("window{keys}"),
            Pattern::Softcap => "causal+softcap".into(),
        }
    }

    fn attention(self) -> Attention<'static> {
        match self {
            Pattern::Full => Attention::new(),
            Pattern::Causal => Attention::new().causal(),
            Pattern::Window(keys) => Attention::new().causal().window(Some(keys - 1), None),
            Pattern::Softcap => Attention::new().causal().softcap(30.0),
        }
    }

    fn pairs(self, dims: &Dims) -> usize {
        match self {
            Pattern::Full => dims.pairs(false, None),
            Pattern::Causal | Pattern::Softcap => dims.pairs(true, None),
            Pattern::Window(keys) => dims.pairs(true, Some(keys - 1)),
        }
    }
}

fn bench<T: Element>(c: &mut Criterion, pattern: Pattern, dims: Dims, level: Level, threads: usize) {
    let pairs = pattern.pairs(&dims);
    let (form, throughput) = match dims.seq_q {
        1 => {
            let keys = pairs / (dims.batch * dims.heads_q); // that the one query sees
            let elements = dims.kv_elements() / dims.seq_kv * keys;
            ("decode", Throughput::Bytes((elements * size_of::<T>()) as u64))
        }
        _ => ("prefill", Throughput::Elements(dims.flops(pairs) as u64)),
    };
    if !Level::available().any(|available| available == level) {
        return eprintln!("{form}/…/{level}: this processor has no {level}");
    }
    let attention = pattern.attention().level(level);
    let attention = if threads == 1 { attention.threads(Threads::Serial) } else { attention };
    let mut group = c.benchmark_group(form);
    group.throughput(throughput);
    let name = format!("{}/{}/{}/{level}/t{threads}", pattern.name(), T::DTYPE, dims.name());
    group.bench_function(name, |bencher| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        // Criterion calls this only for the benches that the filter selects. Others make no data.
        let mut case = Case::<T>::new(dims, attention.clone()).checked().expect("the right answer");
        pool.install(|| bencher.iter(|| case.run()));
    });
    group.finish();
}

fn prefill(c: &mut Criterion) {
    use Level::{Avx2, Portable};
    use Pattern::{Causal, Full, Softcap, Window};
    bench::<f32>(c, Full, Dims::new(8, 512, 512, 64), Avx2, 1);
    bench::<f32>(c, Causal, Dims::new(8, 512, 512, 64), Avx2, 1);
    bench::<f32>(c, Causal, Dims::new(8, 512, 512, 64), Portable, 1);
    bench::<f32>(c, Softcap, Dims::new(8, 512, 512, 64), Avx2, 1);
    bench::<f32>(c, Causal, Dims::new(2, 2048, 2048, 64), Avx2, 1);
    bench::<f32>(c, Causal, Dims::new(2, 2048, 2048, 64), Avx2, 2);
    bench::<f32>(c, Causal, Dims::new(2, 2048, 2048, 128), Avx2, 1);
    bench::<f16>(c, Causal, Dims::new(2, 2048, 2048, 128), Avx2, 1);
    bench::<bf16>(c, Causal, Dims::new(2, 2048, 2048, 128), Avx2, 1);
    bench::<f32>(c, Window(512), Dims::new(2, 4096, 4096, 64), Avx2, 1);
    // A chunk of a prompt on a long cache.
    bench::<f16>(c, Causal, Dims { heads_kv: 1, ..Dims::new(4, 256, 4096, 128) }, Avx2, 1);
}

fn decode(c: &mut Criterion) {
    use Level::{Avx2, Portable};
    let cache = |keys| Dims { heads_kv: 8, ..Dims::new(32, 1, keys, 128) };
    bench::<f32>(c, Pattern::Full, cache(1024), Avx2, 1);
    bench::<f32>(c, Pattern::Full, cache(8192), Avx2, 1);
    bench::<f16>(c, Pattern::Full, cache(8192), Avx2, 1);
    bench::<f16>(c, Pattern::Full, cache(8192), Avx2, 2);
    bench::<bf16>(c, Pattern::Full, cache(8192), Avx2, 1);
    bench::<f16>(c, Pattern::Window(512), cache(8192), Avx2, 1);
    bench::<f16>(c, Pattern::Full, cache(1024), Portable, 1);
}

/// What planning costs: the same tiny problem by [`Attention::compute`] and by [`flashtile::Prepared`].
fn plan(c: &mut Criterion) {
    for (seq_q, attention) in [(1, Attention::new()), (16, Attention::new().causal())] {
        let dims = Dims::new(1, seq_q, 16, 32);
        let mut case = Case::<f32>::new(dims, attention.clone()).checked().expect("the right answer");
        let mut group = c.benchmark_group("plan");
        group.bench_function(format!("oneshot/f32/{}", dims.name()), |bencher| bencher.iter(|| case.run()));
        let (q, k, v) = (case.inputs.q(), case.inputs.k(), case.inputs.v());
        let prepared = attention.prepare(q, (k, v)).expect("it ran before");
        let (mut out, mut workspace) = (vec![0.0f32; seq_q * 32], Workspace::new());
        group.bench_function(format!("prepared/f32/{}", dims.name()), |bencher| {
            bencher.iter(|| {
                let out = TensorMut::from_slice(&mut out, [1, 1, seq_q, 32])?;
                prepared.compute(q, (k, v), out, None, &mut workspace)
            });
        });
        group.bench_function(format!("plan_only/f32/{}", dims.name()), |bencher| {
            bencher.iter(|| attention.plan(q, (k, v)));
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = prefill, decode, plan
}
criterion_main!(benches);
