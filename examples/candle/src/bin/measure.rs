//! Tokens per second of SmolLM2 with each attention, as a table. See README.md.

use clap::{Parser, ValueEnum};
use flashtile_candle::smollm2::attention::{Choice, Kind};
use flashtile_candle::smollm2::model::{Model, Products};
use flashtile_candle::smollm2::session::{Session, Times};
use flashtile_candle::smollm2::{Gguf, tokenizer};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Measures prefill and decoding with each attention, in turns. Prints medians.
#[derive(Parser)]
struct Arguments {
    /// Tokens of the prompt
    #[arg(long, value_delimiter = ',', default_value = "32,512,2048,4096")]
    lengths: Vec<usize>,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "flashtile,candle,naive")]
    attention: Vec<Kind>,
    /// Tokens that are decoded after each prompt
    #[arg(long, default_value_t = 32)]
    decode: usize,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long, value_enum, default_value_t = Products::F32)]
    products: Products,
    /// The text of the prompts
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/performance.md"))]
    text: PathBuf,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut gguf = Gguf::open()?;
    let text = std::fs::read_to_string(&arguments.text)?;
    let tokens = tokenizer::load(&gguf.content)?.encode_fast(text, false)?;
    let model = Model::load(&mut gguf, arguments.products, |_| ())?;
    println!("| prompt | attention | prefill, tokens/s | of it attention | decode, tokens/s | of it attention |");
    println!("|---|---|---|---|---|---|");
    for &length in &arguments.lengths {
        let tokens = tokens.get_ids().get(..length + arguments.decode).ok_or("the text is too short")?;
        let (prompt, next) = tokens.split_at(length);
        let mut runs = vec![Vec::new(); arguments.attention.len()];
        for round in 0..arguments.rounds {
            for (kind, runs) in arguments.attention.iter().zip(&mut runs) {
                eprintln!("{length} tokens, round {} of {}, {}", round + 1, arguments.rounds, name(*kind));
                runs.push(measure(&model, *kind, prompt, next)?);
            }
        }
        for (kind, runs) in arguments.attention.iter().zip(&runs) {
            println!("| {length} | {} | {} |", name(*kind), row(runs));
        }
    }
    Ok(())
}

/// Prefill, and decoding of the tokens that follow in the text, so that every attention has the same work.
fn measure(model: &Model, kind: Kind, prompt: &[u32], next: &[u32]) -> Result<[Times; 2]> {
    let mut session = Session::new(model, &Choice::plain(kind), prompt.len() + next.len())?;
    let (_, prefill) = session.feed(prompt, || ())?;
    let mut decode = Times::default();
    for &token in next {
        decode += session.feed(&[token], || ())?.1;
    }
    Ok([prefill, decode])
}

/// As on the command line.
fn name(kind: Kind) -> String {
    kind.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
}

fn row(runs: &[[Times; 2]]) -> String {
    let phase = |n: usize| {
        let rate = median(runs.iter().map(|run| run[n].tokens_per_second()).collect());
        let share = median(runs.iter().map(|run| run[n].share()).collect());
        format!("{rate:.0} | {:.0}%", 100.0 * share)
    };
    format!("{} | {}", phase(0), phase(1))
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}
