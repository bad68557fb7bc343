//! Tokens into caches, and rotation: `cargo bench --bench caches`.
//!
//! One token of 8 heads of 128, keys and values, is appended to each cache: converted, rotated and converted, or out of rows
//! whose elements are apart. One call is timed as the mean of 256 in a row, so data is in the caches of the processor.

mod support;

use flashtile::{
    DType, Element, KvCache, KvFormat, Level, PagedKvCache, Positions, Rotary, RotatingKvCache, TensorMut, TensorRef,
    bf16, f16,
};
use std::error::Error;
use support::{Rng, Run, best_times, rounds};

const HEADS: usize = 8;
const DIM: usize = 128;
const CALLS: usize = 256;

/// A line of the table: one type of tokens, and one of the caches.
fn line<T: Element>(dtype: DType) -> Result<(), Box<dyn Error>> {
    let numbers: Vec<T> = Rng(1).normals(2 * HEADS * DIM);
    let token = TensorRef::from_slice(&numbers[..HEADS * DIM], [1, HEADS, 1, DIM])?;
    let spread = TensorRef::with_strides(&numbers, 0, [1, HEADS, 1, DIM], [0, 2 * DIM as isize, 0, 2])?;
    let (format, rotary) = (KvFormat::new(dtype, HEADS, DIM), Rotary::new(DIM, 10_000.0, CALLS)?);
    let interleaved = rotary.clone().interleaved();
    let mut caches = [(); 4].map(|()| KvCache::new(format, 1, CALLS));
    let [plain, gaps, rotated, pairs] = caches.each_mut().map(|cache| cache.as_mut().expect("a small cache"));
    let mut rotating = RotatingKvCache::new(format, 1, 4, 100)?;
    let mut paged = PagedKvCache::new(format, 1, CALLS / 16, 16)?;
    let sequence = paged.new_sequence();
    let mut runs: [Run<'_>; 6] = [
        Box::new(|| {
            plain.clear();
            (0..CALLS).try_for_each(|_| plain.append(token, token))
        }),
        Box::new(|| (0..CALLS).try_for_each(|_| rotating.append(token, token))),
        Box::new(|| {
            paged.truncate(sequence, 0)?;
            (0..CALLS).try_for_each(|_| paged.append(sequence, token, token))
        }),
        Box::new(|| {
            gaps.clear();
            (0..CALLS).try_for_each(|_| gaps.append(spread, spread))
        }),
        Box::new(|| {
            rotated.clear();
            (0..CALLS).try_for_each(|_| rotated.append_rotated(&rotary, None, token, token))
        }),
        Box::new(|| {
            pairs.clear();
            (0..CALLS).try_for_each(|_| pairs.append_rotated(&interleaved, None, token, token))
        }),
    ];
    let times = best_times(rounds(200), &mut runs)?;
    print!("{:>5} to {dtype:<5}", T::DTYPE);
    times.iter().for_each(|seconds| print!("{:>13.0}", seconds / CALLS as f64 * 1e9));
    println!();
    Ok(())
}

/// Queries of one token, rotated in place.
fn rotation<T: Element>() -> Result<(), Box<dyn Error>> {
    let rotary = Rotary::new(DIM, 10_000.0, CALLS)?;
    let mut q: Vec<T> = Rng(1).normals(4 * HEADS * DIM);
    let mut run = || {
        let rotate = |position| {
            let q = TensorMut::from_slice(&mut q, [1, 4 * HEADS, 1, DIM])?;
            rotary.rotate(q, Positions::Start(position))
        };
        (0..CALLS).try_for_each(rotate)
    };
    let times = best_times(rounds(200), &mut [Box::new(&mut run)])?;
    println!("{:>5}: {:.0} ns", T::DTYPE, times[0] / CALLS as f64 * 1e9);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    println!(
        "One token of {HEADS} heads of {DIM}, keys and values, one thread, {}; ns, the best of all rounds.\n",
        Level::best()
    );
    let columns = ["append", "rotating", "paged", "gaps", "rotated", "interleaved"];
    print!("{:14}", "");
    columns.iter().for_each(|column| print!("{column:>13}"));
    println!();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        line::<f32>(dtype)?;
        line::<f16>(dtype)?;
        line::<bf16>(dtype)?;
    }
    println!("\nQueries of one token, {} heads of {DIM}, rotated in place:", 4 * HEADS);
    rotation::<f32>()?;
    rotation::<f16>()?;
    rotation::<bf16>()
}
