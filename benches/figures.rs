//! The crate's figures, measured in one go: `cargo bench --bench figures`.
//!
//! One thread at the processor's best level. The lines of a block take turns, and each shows its best time. Fractions are of what
//! the same thread reaches in the same turns: with multiply-adds in registers, or with a loop that reads the bytes of the keys and
//! values and adds them up.

mod support;

use flashtile::{Attention, Element, Level, Threads, bf16, f16};
use std::error::Error;
use support::machine::{multiply_add_flops, multiply_adds, read};
use support::{Case, Dims, Rng, Run, best_times, rounds};

const PEAK_STEPS: usize = 1 << 18;

fn run<'a, T: Element>(dims: Dims, attention: Attention<'static>) -> Result<Run<'a>, Box<dyn Error>> {
    let mut case = Case::<T>::new(dims, attention.threads(Threads::Serial)).checked()?;
    Ok(Box::new(move || case.run()))
}

fn spin<'a>() -> Run<'a> {
    Box::new(|| {
        multiply_adds(PEAK_STEPS);
        Ok(())
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("One thread, {}.", Level::best());
    prefill()?;
    types()?;
    masks()?;
    decode()
}

fn prefill() -> Result<(), Box<dyn Error>> {
    println!("\nPrefill, 8 heads, 2048 queries and keys, no mask, f32:");
    let all = [64, 128].map(|dim| Dims::new(8, 2048, 2048, dim));
    let times = best_times(
        rounds(12),
        &mut [spin(), run::<f32>(all[0], Attention::new())?, run::<f32>(all[1], Attention::new())?],
    )?;
    let peak = multiply_add_flops(PEAK_STEPS) / times[0];
    println!("  multiply-adds in registers  {:6.1} GF/s", peak / 1e9);
    for (dims, time) in all.iter().zip(&times[1..]) {
        let speed = dims.flops(dims.pairs(false, None)) / time;
        println!(
            "  head_dim {:<4} {:8.1} ms  {:6.1} GF/s  {:.3} of it",
            dims.head_dim,
            time * 1e3,
            speed / 1e9,
            speed / peak
        );
    }
    Ok(())
}

fn types() -> Result<(), Box<dyn Error>> {
    println!("\nPrefill by type, 1 head of 128, 2048 queries and keys:");
    let dims = Dims::new(1, 2048, 2048, 128);
    let attention = Attention::new;
    let mut runs = [run::<f32>(dims, attention())?, run::<f16>(dims, attention())?, run::<bf16>(dims, attention())?];
    let times = best_times(rounds(15), &mut runs)?;
    for (name, time) in ["f32", "f16", "bf16"].iter().zip(&times) {
        println!("  {name:<5} {:7.1} ms  {:.3} of f32's time", time * 1e3, time / times[0]);
    }
    Ok(())
}

fn masks() -> Result<(), Box<dyn Error>> {
    println!("\nMasks, 1 head of 64:");
    let window = || Attention::new().causal().window(Some(511), None);
    let (short, long) = (Dims::new(1, 4096, 4096, 64), Dims::new(1, 8192, 8192, 64));
    let mut runs = [
        run::<f32>(short, Attention::new())?,
        run::<f32>(short, Attention::new().causal())?,
        run::<f32>(long, Attention::new())?,
        run::<f32>(long, window())?,
    ];
    let times = best_times(rounds(10), &mut runs)?;
    for (name, dims, full, time, pairs) in [
        ("4096, causal", short, times[0], times[1], short.pairs(true, None)),
        ("8192, causal, window of 512", long, times[2], times[3], long.pairs(true, Some(511))),
    ] {
        let of_pairs = pairs as f64 / dims.pairs(false, None) as f64;
        println!(
            "  {name:<28} {:7.1} ms  {:.3} of full's time for {of_pairs:.3} of its pairs",
            time * 1e3,
            time / full
        );
    }
    Ok(())
}

fn decode() -> Result<(), Box<dyn Error>> {
    println!("\nDecode, 32 query heads on 8, head_dim 128, one query, 8192 keys:");
    let dims = Dims { heads_kv: 8, ..Dims::new(32, 1, 8192, 128) };
    // The bytes of keys and values in f32, and half of them.
    let memory = Rng(5).normals::<f32>(dims.kv_elements());
    let read_part = |elements: usize| -> Run<'_> {
        let part = &memory[..elements];
        Box::new(move || {
            read(part);
            Ok(())
        })
    };
    let mut runs = [
        read_part(dims.kv_elements()),
        read_part(dims.kv_elements() / 2),
        run::<f32>(dims, Attention::new())?,
        run::<f16>(dims, Attention::new())?,
        run::<bf16>(dims, Attention::new())?,
    ];
    let times = best_times(rounds(25), &mut runs)?;
    for (name, bytes, reading, time) in
        [("f32", 4, times[0], times[2]), ("f16", 2, times[1], times[3]), ("bf16", 2, times[1], times[4])]
    {
        let speed = (dims.kv_elements() * bytes) as f64 / time / 1e9;
        let bound = (dims.kv_elements() * bytes) as f64 / reading / 1e9;
        println!("  {name:<5} {:7.2} ms  {speed:5.1} GB/s of {bound:5.1} read: {:.3}", time * 1e3, speed / bound);
    }
    Ok(())
}
