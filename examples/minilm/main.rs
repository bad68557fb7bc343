//! A sentence encoder, all-MiniLM-L6-v2, with this crate's attention. Its embeddings agree with PyTorch's.
//!
//!     python examples/minilm/fetch.py                 # the weights, once
//!     cargo run --release --example minilm
//!
//! The model runs on sentences of different lengths as one padded batch. Key lengths hide the padding.

mod model;

use flashtile::{Attention, Error, Threads, Workspace};
use model::{Batch, Encoder, Result};
use ndarray::{Array2, ArrayView1, ArrayView4, ArrayViewMut4, s};
use serde::Deserialize;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The smallest accepted cosine of an embedding with PyTorch's.
const COSINE: f32 = 0.99999;

#[derive(Deserialize)]
struct Fixture {
    made_by: String,
    sentences: Vec<Sentence>,
}

#[derive(Deserialize)]
struct Sentence {
    text: String,
    ids: Vec<usize>,
    embedding: Vec<f32>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/minilm");
    let path = directory.join("weights/model.safetensors");
    let bytes = std::fs::read(&path).map_err(|e| {
        let fetch = directory.join("fetch.py");
        format!(
            "The weights are not here yet ({}: {e}).\nGet them, 84 MB, with\n\n    python {}",
            path.display(),
            fetch.display()
        )
    })?;
    let encoder = Encoder::load(&bytes)?;
    let fixture: Fixture = serde_json::from_slice(include_bytes!("fixture.json"))?;
    let sentences: Vec<&[usize]> = fixture.sentences.iter().map(|sentence| &sentence.ids[..]).collect();
    let batch = Batch::new(&sentences);
    let tokens: usize = batch.lengths().iter().sum();
    let (count, seq) = batch.shape();
    println!("{count} sentences, {tokens} tokens, padded to {count} x {seq}\n");

    let mut workspace = Workspace::new();
    let embeddings = encoder.embed(&batch, |qkv, lengths: &[usize], out| tiled(&mut workspace, qkv, lengths, out))?;
    println!("cosine with {}:", fixture.made_by);
    check("tiled attention", &embeddings, &fixture)?;
    check("naive attention", &encoder.embed(&batch, naive)?, &fixture)?;

    println!("\nhow alike they are (cosine):\n");
    print_similarities(&embeddings, &fixture);

    println!("\nsentences per second (and attention alone), one thread, best of five:\n");
    println!("{:44} naive {:17} tiled", "", "");
    race("the sentences above", &encoder, &batch)?;
    // The sentences, concatenated and repeated up to the model's limit of 512 positions.
    let long: Vec<usize> = sentences.concat().into_iter().cycle().take(512).collect();
    race("two texts of 512 tokens", &encoder, &Batch::new(&[&long, &long]))
}

/// This crate's attention. All layers share a workspace, so scratch memory is allocated once.
fn tiled(
    workspace: &mut Workspace,
    [q, k, v]: [ArrayView4<'_, f32>; 3],
    lengths: &[usize],
    out: ArrayViewMut4<'_, f32>,
) -> std::result::Result<(), Error> {
    Attention::new().key_lengths(lengths).threads(Threads::Serial).compute(q, (k, v), out, None, workspace)
}

/// Attention without this crate: softmax(Q K^T / sqrt(head_dim)) V for each sentence and head, with a matrix of scores.
fn naive(
    [q, k, v]: [ArrayView4<'_, f32>; 3],
    lengths: &[usize],
    mut out: ArrayViewMut4<'_, f32>,
) -> std::result::Result<(), Error> {
    let (_, heads, _, head_dim) = q.dim();
    for (b, &length) in lengths.iter().enumerate() {
        for h in 0..heads {
            let (k, v) = (k.slice(s![b, h, ..length, ..]), v.slice(s![b, h, ..length, ..]));
            let mut scores = q.slice(s![b, h, .., ..]).dot(&k.t()) / (head_dim as f32).sqrt();
            for mut row in scores.rows_mut() {
                let max = row.fold(f32::NEG_INFINITY, |max, &score| max.max(score));
                row.mapv_inplace(|score| (score - max).exp());
                let sum = row.sum();
                row /= sum;
            }
            out.slice_mut(s![b, h, .., ..]).assign(&scores.dot(&v));
        }
    }
    Ok(())
}

/// Compares with the embeddings of the fixture. Both have length 1.
fn check(name: &str, embeddings: &Array2<f32>, fixture: &Fixture) -> Result<()> {
    let cosines = embeddings.outer_iter().zip(&fixture.sentences).map(|(embedding, sentence)| {
        let theirs = ArrayView1::from(&sentence.embedding[..]);
        embedding.dot(&theirs) / (embedding.dot(&embedding) * theirs.dot(&theirs)).sqrt()
    });
    let lowest = cosines.fold(f32::INFINITY, f32::min);
    println!("  {name}: at least {lowest:.7}");
    if lowest >= COSINE { Ok(()) } else { Err(format!("{name}: the cosine must be at least {COSINE}").into()) }
}

fn print_similarities(embeddings: &Array2<f32>, fixture: &Fixture) {
    println!("     {}", (1..=fixture.sentences.len()).map(|n| format!("{n:>4}    ")).collect::<String>());
    for (n, (row, sentence)) in embeddings.dot(&embeddings.t()).outer_iter().zip(&fixture.sentences).enumerate() {
        let cell = |&cosine: &f32| format!("{} {cosine:>5.2} ", shade(cosine));
        let text: String = sentence.text.chars().take(44).collect();
        println!("  {}  {} {text}", n + 1, row.iter().map(cell).collect::<String>());
    }
}

fn shade(cosine: f32) -> &'static str {
    match cosine {
        ..0.15 => "·",
        ..0.3 => "░",
        ..0.5 => "▒",
        ..0.9 => "▓",
        _ => "█",
    }
}

/// Prints sentences per second with either attention, and the time spent in attention.
fn race(name: &str, encoder: &Encoder, batch: &Batch) -> Result<()> {
    let mut workspace = Workspace::new();
    let mut best = [(Duration::MAX, Duration::MAX); 2];
    for _ in 0..5 {
        for (tiles, (whole, attention)) in [false, true].into_iter().zip(&mut best) {
            let (start, mut inside) = (Instant::now(), Duration::ZERO);
            encoder.embed(batch, |qkv, lengths: &[usize], out| {
                let start = Instant::now();
                if tiles { tiled(&mut workspace, qkv, lengths, out) } else { naive(qkv, lengths, out) }?;
                inside += start.elapsed();
                Ok(())
            })?;
            (*whole, *attention) = ((*whole).min(start.elapsed()), (*attention).min(inside));
        }
    }
    print!("  {name:<24}");
    for (whole, attention) in best {
        let per_second = batch.lengths().len() as f64 / whole.as_secs_f64();
        print!("{per_second:10.1}/s ({:5.1} ms)", 1e3 * attention.as_secs_f64());
    }
    println!();
    Ok(())
}
