//! The pieces of a tile against the processor: `cargo bench --bench kernels`.
//!
//! The kernels are private, so whole calls are timed whose time is nearly all one piece. They have one head, one thread, 192
//! queries and 4096 keys:
//!
//! ```text
//! head_dim 0, value_dim 1     softmax, and the fixed costs of a tile
//! head_dim D, value_dim 1     softmax and scores
//! head_dim 0, value_dim D     softmax and values
//! head_dim D, value_dim D     everything
//! ```
//!
//! A piece is the difference of two calls. The first call has a product of one value column, which waits for its own results. So
//! `softmax` is a little too slow and the products a little too fast; the last column shows how far the pieces miss the whole.
//!
//! Values are packed once per 192 queries, and f16 keys are widened. What that costs comes from calls for 16 and for 192 queries:
//! the first has a twelfth of the work.
//!
//! "of peak" compares with multiply-adds in registers, timed in the same rounds.

mod support;

use flashtile::{Attention, Element, Form, Level, Threads, f16};
use std::error::Error;
use support::machine::{multiply_add_flops, multiply_adds};
use support::{Case, Dims, Run, best_times, rounds};

const PEAK_STEPS: usize = 1 << 18;
const QUERIES: usize = 192;
const KEYS: usize = 4096;

fn run<'a, T: Element>(queries: usize, head_dim: usize, value_dim: usize) -> Result<Run<'a>, Box<dyn Error>> {
    let dims = Dims { head_dim, value_dim, ..Dims::new(1, queries, KEYS, 0) };
    let attention = Attention::new().scale(0.1).form(Form::Prefill).threads(Threads::Serial);
    let mut case = Case::<T>::new(dims, attention).checked()?;
    Ok(Box::new(move || case.run()))
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("One thread, {}, {QUERIES} queries, {KEYS} keys, f32; the best of all rounds.\n", Level::best());
    println!("{:>4} {:>20} {:>20} {:>20} {:>20}  pieces", "", "softmax", "scores", "values", "everything");
    println!(
        "{:>4} {:>20} {:>20} {:>20} {:>20}  / all",
        "dim", "ns/1000  of all", "GF/s  of peak", "GF/s  of peak", "GF/s  of peak"
    );
    let mut peak = 0.0f64;
    for dim in [32, 64, 128, 256] {
        let spin: Run<'_> = Box::new(|| {
            multiply_adds(PEAK_STEPS);
            Ok(())
        });
        let (softmax, scores) = (run::<f32>(QUERIES, 0, 1)?, run::<f32>(QUERIES, dim, 1)?);
        let (values, everything) = (run::<f32>(QUERIES, 0, dim)?, run::<f32>(QUERIES, dim, dim)?);
        let times = best_times(rounds(40), &mut [spin, softmax, scores, values, everything])?;
        let (softmax, scores, values, everything) = (times[1], times[2] - times[1], times[3] - times[1], times[4]);
        peak = peak.max(multiply_add_flops(PEAK_STEPS) / times[0]);
        let pairs = (QUERIES * KEYS) as f64;
        let product = |seconds: f64, dims: usize| {
            let speed = 2.0 * pairs * dims as f64 / seconds;
            format!("{:.1} {:6.0}% ", speed / 1e9, 100.0 * speed / peak)
        };
        println!(
            "{dim:>4} {:>20} {:>20} {:>20} {:>20}  {:.2}",
            format!("{:.0} {:6.0}% ", softmax / pairs * 1e12, 100.0 * softmax / everything),
            product(scores, dim),
            product(values, dim),
            product(everything, 2 * dim),
            (softmax + scores + values) / everything
        );
    }
    println!("\nmultiply-adds in registers: {:.1} GF/s\n", peak / 1e9);

    println!("Fetching, widening and packing, which 192 queries share, and its part of everything:\n");
    println!("{:>9} {:>24} {:>24}", "", "keys", "values");
    for dim in [64, 128] {
        shared::<f32>(dim)?;
        shared::<f16>(dim)?;
    }
    Ok(())
}

/// Prints the cost of what is done once per tile of keys and values, for any number of queries.
fn shared<T: Element>(dim: usize) -> Result<(), Box<dyn Error>> {
    let mut runs = Vec::new();
    for (head_dim, value_dim) in [(dim, 1), (0, dim), (dim, dim)] {
        runs.extend([run::<T>(QUERIES / 12, head_dim, value_dim)?, run::<T>(QUERIES, head_dim, value_dim)?]);
    }
    let times = best_times(rounds(30), &mut runs)?;
    // short = work / 12 + shared, long = work + shared
    let shared = |short: f64, long: f64| {
        let shared = (12.0 * short - long) / 11.0;
        format!("{:.2} ns/element {:4.1}%", shared / (KEYS * dim) as f64 * 1e9, 100.0 * shared / times[5])
    };
    println!("{:>4} {:>4} {:>24} {:>24}", T::DTYPE, dim, shared(times[0], times[1]), shared(times[2], times[3]));
    Ok(())
}
