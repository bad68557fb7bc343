//! What a caller outside the pool gets: `--outside [--pause MS]`.
//!
//! The calls come from a thread that does not belong to the pool, as those of most users do, after a pause if one is given, as
//! other layers of a model or a server's idle loop make them. Serial and pooled calls take turns in runs; the medians are shown,
//! because the best call says nothing about threads that come late. With the feature `capi`, calls of the C interface, which has
//! threads of its own, take their turns, too.

use crate::arguments::Arguments;
use crate::lines::checked_case;
use crate::support::{Case, Dims};
use crate::workloads::{GROUPS, Options, Task};
use flashtile::{DType, Element, Threads, bf16, f16};
use std::error::Error;
use std::hint::spin_loop;
use std::sync::mpsc::{self, TryRecvError};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Runs of each kind of call, and calls of a run. The first call of a run is not counted: it follows the other kind.
const RUNS: usize = 6;
const CALLS: usize = 9;

/// Problems so small that waking a thread takes as long as they do.
const SMALL: [(&str, Dims); 8] = [
    ("small_decode_64", small_decode(64)),
    ("small_decode_512", small_decode(512)),
    ("small_decode_2048", small_decode(2048)),
    ("small_decode_8192", small_decode(8192)),
    ("small_encoder_8", Dims::new(12, 8, 8, 64)),
    ("small_encoder_32", Dims::new(12, 32, 32, 64)),
    ("small_encoder_128", Dims::new(12, 128, 128, 64)),
    ("small_encoder_256", Dims::new(12, 256, 256, 64)),
];

/// A small language model's decoding step.
const fn small_decode(keys: usize) -> Dims {
    let mut dims = Dims::new(9, 1, keys, 64);
    dims.heads_kv = 3;
    dims
}

/// Prints the table.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build_global()?;
    let kinds = if cfg!(feature = "capi") { &KINDS[..] } else { &KINDS[..2] };
    print!("{:<20} {:<5}", "workload", "type");
    kinds.iter().for_each(|kind| print!(" {:>12}", format!("{kind:?}").to_lowercase()));
    println!("   speed-up");
    let available = GROUPS.iter().flat_map(|group| group.iter()).filter(|workload| workload.is_available());
    let named = available.filter_map(|workload| match workload.task {
        Task::Attention(dims, options) => Some((workload.name, dims, options, workload.types)),
        Task::Softmax(_) | Task::Serving(_) | Task::KeySums(..) => None,
    });
    let small = SMALL.into_iter().map(|(name, dims)| (name, dims, Options::Plain, &[DType::F32][..]));
    let mut worst = f64::INFINITY;
    for (name, dims, options, types) in named.chain(small) {
        for dtype in types.iter().filter(|dtype| format!("{name} {dtype}").contains(&arguments.filter)) {
            let medians = match dtype {
                DType::F32 => medians::<f32>(dims, options, kinds, arguments)?,
                DType::F16 => medians::<f16>(dims, options, kinds, arguments)?,
                DType::Bf16 => medians::<bf16>(dims, options, kinds, arguments)?,
                dtype => return Err(format!("{name}: no {dtype} here").into()),
            };
            print!("{name:<20} {dtype:<5}");
            medians.iter().for_each(|seconds| print!(" {:>9.4} ms", seconds * 1e3));
            for seconds in &medians[1..] {
                worst = worst.min(medians[0] / seconds);
                print!("   {:>8.2}", medians[0] / seconds);
            }
            println!();
        }
    }
    if worst == f64::INFINITY {
        return Err(format!("no line has \"{}\" in its name and type", arguments.filter).into());
    }
    let [late, spent] = lateness(arguments)?.map(|seconds| seconds * 1e6);
    println!("\nleast speed-up: {worst:.2}");
    println!(
        "After this pause a thread of the pool starts {late:.1} µs after it is called, which takes the caller {spent:.1} µs."
    );
    Ok(())
}

/// Median seconds from putting an empty job into the pool's queue until it runs, and until the caller goes on.
fn lateness(arguments: &Arguments) -> Result<[f64; 2], Box<dyn Error>> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..RUNS * CALLS {
        sleep(arguments.pause);
        let (sender, started) = mpsc::channel();
        let start = Instant::now();
        rayon::spawn(move || {
            let _ = sender.send(Instant::now()); // the receiver is still there
        });
        times[1].push(start.elapsed());
        // As a caller that works: if it slept, the thread could start on its processor.
        let started = loop {
            match started.try_recv() {
                Err(TryRecvError::Empty) => spin_loop(),
                result => break result?,
            }
        };
        times[0].push(started.duration_since(start));
    }
    Ok(times.map(median))
}

/// How calls are made.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Serial,
    /// With rayon's global pool.
    Pool,
    /// Through the C interface.
    C,
}

const KINDS: [Kind; 3] = [Kind::Serial, Kind::Pool, Kind::C];

/// Median times of calls of each kind.
fn medians<T: Element>(
    dims: Dims,
    options: Options,
    kinds: &[Kind],
    arguments: &Arguments,
) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut case = checked_case::<T>(dims, options, Threads::Pool)?;
    let mut seconds = vec![Vec::new(); kinds.len()];
    for _ in 0..if arguments.bench { RUNS } else { 1 } {
        for (kind, seconds) in kinds.iter().zip(&mut seconds) {
            for call in 0..CALLS {
                sleep(arguments.pause);
                let start = Instant::now();
                match kind {
                    Kind::Serial => case.run_serially()?,
                    Kind::Pool => case.run()?,
                    Kind::C => through_c(&mut case, options, arguments.threads)?,
                }
                if call > 0 {
                    seconds.push(start.elapsed());
                }
            }
        }
    }
    Ok(seconds.into_iter().map(median).collect())
}

#[cfg(feature = "capi")]
fn through_c<T: Element>(case: &mut Case<T>, options: Options, threads: usize) -> Result<(), Box<dyn Error>> {
    use flashtile::capi::{Options as COptions, Tensor, flags, flashtile_attention};
    use std::ptr::null;

    let (inputs, out) = case.parts();
    let dims = inputs.dims;
    let tensor = |data: *const T, shape: [usize; 4]| {
        let shape = shape.map(|n| n as i64);
        let [_, heads, rows, cols] = shape;
        let strides = [heads * rows * cols, rows * cols, cols, 1];
        let dtype = match T::DTYPE {
            DType::F32 => 1,
            DType::F16 => 2,
            _ => 3,
        };
        Tensor { data: data.cast_mut().cast(), dtype, rank: 4, shape, strides }
    };
    let keys = [dims.batch, dims.heads_kv, dims.seq_kv];
    let q = tensor(inputs.q.as_ptr(), [dims.batch, dims.heads_q, dims.seq_q, dims.head_dim]);
    let k = tensor(inputs.k.as_ptr(), [keys[0], keys[1], keys[2], dims.head_dim]);
    let v = tensor(inputs.v.as_ptr(), [keys[0], keys[1], keys[2], dims.value_dim]);
    let out = tensor(out.as_mut_ptr(), dims.out());
    let mut how = COptions { threads: threads as i32, ..COptions::new() };
    match options {
        Options::Plain => {}
        Options::Causal => how.flags = flags::CAUSAL,
        Options::Window(left) => {
            (how.flags, how.window_left) = (flags::CAUSAL | flags::WINDOW_LEFT, left as i64);
        }
        _ => return Ok(()), // scores and tensors make no difference to threads
    }
    // SAFETY: the tensors lie over slices of these sizes; the output is borrowed mutably.
    let code = unsafe { flashtile_attention(&q, &k, &v, &out, null(), &how) };
    if code == 0 { Ok(()) } else { Err(format!("code {code} from C").into()) }
}

#[cfg(not(feature = "capi"))]
fn through_c<T: Element>(_: &mut Case<T>, _: Options, _: usize) -> Result<(), Box<dyn Error>> {
    Err("the C interface needs the feature capi".into())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}
