//! Masks and score functions of your own: drawn, checked against the definition, and timed against a boolean tensor.
//!
//! `cargo run --release --example custom_mask`

use flashtile::mask::{Block, Cover, Covered, Documents, Mask, Pair, check_mask, mask_fn};
use flashtile::score::{RelativeBias, score_fn, tanh};
use flashtile::{Attention, ScoreStage, Threads, Workspace, alibi_slope, reference};
use ndarray::{Array2, Array4, s};
use std::error::Error;
use std::ops::Range;
use std::time::Instant;

/// A mask with a type of its own: every query sees the keys of its own column in a picture of some width, and of its own row.
/// (The axial attention of image models.)
struct Axial {
    width: usize,
}

impl Mask for Axial {
    /// The definition, and enough.
    fn sees(&self, pair: Pair) -> bool {
        pair.query() / self.width == pair.key() / self.width || pair.query() % self.width == pair.key() % self.width
    }

    /// What saves time: a run of keys with the whole width has one key of each column, so only short runs can be hidden.
    fn cover(&self, block: &Block) -> Cover {
        let rows = |range: &Range<usize>| range.start / self.width..range.end.div_ceil(self.width);
        let columns = |range: &Range<usize>| range.start % self.width..range.start % self.width + range.len();
        let (own, keys) = (rows(&block.queries), rows(&block.keys));
        let apart = |a: Range<usize>, b: Range<usize>| a.end <= b.start || b.end <= a.start;
        let within_rows = columns(&block.queries).end <= self.width && columns(&block.keys).end <= self.width;
        if apart(own, keys) && within_rows && apart(columns(&block.queries), columns(&block.keys)) {
            Cover::Skip
        } else {
            Cover::Partial
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("Rows are queries, columns are keys; 1 where the query sees the key.\n");

    // 1. A closure. Every fourth key counted back from the query, and the last two.
    let strided = mask_fn(|pair| pair.distance() % 4 == 0 || pair.distance() < 2);
    show("strided, with causal order", 10, &Attention::new().causal().masked_by(&strided))?;
    // 2. A type, whose answers are tested against each other: do that in your tests.
    let axial = Axial { width: 3 };
    check_mask(&axial, [1, 1, 9, 9], 0)?;
    show("axial, pictures of 3 x 3", 9, &Attention::new().masked_by(&axial))?;
    // 3. A ready mask with one of your own: masks compose.
    let documents = Documents::of_lengths(&[4, 3, 3])?;
    show("strided within documents", 10, &Attention::new().causal().masked_by(&documents).masked_by(&strided))?;

    // Score functions take the score in natural units and the pair.
    let slopes: Vec<f32> = (0..4).map(|head| alibi_slope(head, 4)).collect();
    let alibi = score_fn(|score, pair| score - slopes[pair.head()] * pair.distance().abs() as f32);
    let softcap = score_fn(|score, _| 20.0 * tanh(score / 20.0));
    check(
        "softcap, then ALiBi, both from closures",
        &Attention::new().causal().modified_by(&softcap).modified_by(&alibi),
    )?;
    let table: Vec<f32> = (0..4 * 33).map(|n| (n as f32).sin()).collect();
    let relative = RelativeBias::new(4, 16, &table)?;
    check("a table of relative positions", &Attention::new().modified_by(&relative))?;

    let n = 2048;
    println!("\n{n} queries and keys, 4 heads of 64, one thread:\n");
    let same = mask_fn(|pair| pair.query() / 128 == pair.key() / 128);
    let dense = Array2::from_shape_fn((n, n), |(i, j)| i / 128 == j / 128);
    // Looked at once, and kept for every layer.
    let covered = Covered::new(same, [1, 1, n, n], 0)?;
    let [skipped, full, partial] = covered.fractions().map(|part| 100.0 * part);
    race(
        n,
        &[
            ("every key", Attention::new()),
            ("documents of 128 by a boolean tensor", Attention::new().mask(&dense)),
            ("the same by a closure", Attention::new().masked_by(&same)),
            ("by a closure that was covered once", Attention::new().masked_by(&covered)),
            ("by the ready mask", Attention::new().masked_by(&Documents::of_lengths(&[128; 16])?)),
            ("ALiBi from a closure", Attention::new().modified_by(&alibi)),
            ("a softcap from a closure", Attention::new().modified_by(&softcap)),
            ("a table of relative positions", Attention::new().modified_by(&relative)),
        ],
    )?;
    println!("\nThe cover: {skipped:.0}% of blocks skipped, {full:.0}% full, {partial:.0}% asked pair by pair.");
    Ok(())
}

/// Numbers in -1..1 with a long period: the fractional parts of multiples of an irrational number.
fn numbers(shape: [usize; 4], step: f64) -> Array4<f32> {
    let mut n = 0.0;
    Array4::from_shape_simple_fn(shape, || {
        n += step;
        (n % 1.0) as f32 * 2.0 - 1.0
    })
}

/// Prints which keys each of `n` queries sees, and checks the result.
fn show(title: &str, n: usize, attention: &Attention<'_>) -> Result<(), Box<dyn Error>> {
    let x = numbers([1, 1, n, 8], 0.618_033_988_749);
    println!("{title}\n");
    for row in attention.scores(ScoreStage::Biased, &x, &x)?.slice(s![0, 0, .., ..]).rows() {
        let row: Vec<_> = row.iter().map(|&score| if score == f32::NEG_INFINITY { "0" } else { "1" }).collect();
        println!("    {}", row.join(" "));
    }
    println!();
    compare(title, attention, &x)
}

/// Checks an attention of 4 heads.
fn check(title: &str, attention: &Attention<'_>) -> Result<(), Box<dyn Error>> {
    compare(title, attention, &numbers([2, 4, 70, 8], 0.618_033_988_749))?;
    println!("{title}: as defined");
    Ok(())
}

fn compare(title: &str, attention: &Attention<'_>, x: &Array4<f32>) -> Result<(), Box<dyn Error>> {
    let (out, expected) = (attention.run(x, x, x)?, reference::attention(attention, x, (x, x))?.out);
    match out.iter().zip(&expected).all(|(&out, &expected)| (out as f64 - expected).abs() < 1e-5) {
        true => Ok(()),
        false => Err(format!("{title}: the result is not that of the definition").into()),
    }
}

/// Prints the time of each attention over `n` queries and keys, and its part of the first one's.
fn race(n: usize, cases: &[(&str, Attention<'_>)]) -> Result<(), Box<dyn Error>> {
    let [q, k, v] = [0.618_033_988_749, 0.414_213_562_373, 0.732_050_807_568].map(|step| numbers([1, 4, n, 64], step));
    let mut times = vec![f64::INFINITY; cases.len()];
    let (mut out, mut workspace) = (Array4::<f32>::zeros(q.raw_dim()), Workspace::new());
    for _round in 0..4 {
        // In turns, so that a slow moment of the machine affects all entries.
        for ((_, attention), time) in cases.iter().zip(&mut times) {
            let start = Instant::now();
            attention.clone().threads(Threads::Serial).compute(&q, (&k, &v), &mut out, None, &mut workspace)?;
            *time = time.min(start.elapsed().as_secs_f64());
        }
    }
    for ((name, _), time) in cases.iter().zip(&times) {
        println!("{name:<38} {:7.1} ms {:7.1}%", 1e3 * time, 100.0 * time / times[0]);
    }
    Ok(())
}
