//! What a caller outside the pool gets: `--outside [--pause MS]`.
//!
//! The calls come from a thread that does not belong to the pool, as those of most users do, after a pause if one is given, as
//! other layers of a model or a server's idle loop make them. Serial and pooled calls take turns in runs; the medians are shown,
//! because the best call says nothing about threads that come late.

use crate::arguments::Arguments;
use crate::lines::checked_case;
use crate::support::Dims;
use crate::workloads::{GROUPS, Options, Task};
use flashtile::{DType, Element, Threads, bf16, f16};
use std::error::Error;
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
    println!("{:<20} {:<5} {:>12} {:>12} {:>10}", "workload", "type", "serial", "pool", "speed-up");
    let available = GROUPS.iter().flat_map(|group| group.iter()).filter(|workload| workload.is_available());
    let named = available.filter_map(|workload| match workload.task {
        Task::Attention(dims, options) => Some((workload.name, dims, options, workload.types)),
        Task::Softmax(_) | Task::Serving(_) | Task::KeySums(..) => None,
    });
    let small = SMALL.into_iter().map(|(name, dims)| (name, dims, Options::Plain, &[DType::F32][..]));
    let mut worst = f64::INFINITY;
    for (name, dims, options, types) in named.chain(small) {
        for dtype in types.iter().filter(|dtype| format!("{name} {dtype}").contains(&arguments.filter)) {
            let [serial, pool] = match dtype {
                DType::F32 => medians::<f32>(dims, options, arguments)?,
                DType::F16 => medians::<f16>(dims, options, arguments)?,
                DType::Bf16 => medians::<bf16>(dims, options, arguments)?,
                dtype => return Err(format!("{name}: no {dtype} here").into()),
            };
            println!("{name:<20} {dtype:<5} {:>9.4} ms {:>9.4} ms {:>10.2}", serial * 1e3, pool * 1e3, serial / pool);
            worst = worst.min(serial / pool);
        }
    }
    if worst == f64::INFINITY {
        return Err(format!("no line has \"{}\" in its name and type", arguments.filter).into());
    }
    println!("\nleast speed-up: {worst:.2}");
    Ok(())
}

/// Median times of serial calls and of calls with threads.
fn medians<T: Element>(dims: Dims, options: Options, arguments: &Arguments) -> Result<[f64; 2], Box<dyn Error>> {
    let mut case = checked_case::<T>(dims, options, Threads::Pool)?;
    let mut seconds = [Vec::new(), Vec::new()];
    for _ in 0..if arguments.bench { RUNS } else { 1 } {
        for (is_serial, seconds) in [true, false].into_iter().zip(&mut seconds) {
            for call in 0..CALLS {
                sleep(arguments.pause);
                let start = Instant::now();
                if is_serial {
                    case.run_serially()?
                } else {
                    case.run()?
                }
                if call > 0 {
                    seconds.push(start.elapsed());
                }
            }
        }
    }
    Ok(seconds.map(median))
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}
