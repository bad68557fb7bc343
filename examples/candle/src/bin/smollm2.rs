//! SmolLM2-135M-Instruct with flashtile's attention, candle's, or a matrix of scores. See README.md.

use clap::Parser;
use flashtile_candle::smollm2::attention::{CacheKind, CacheType, Choice, Kind};
use flashtile_candle::smollm2::model::{Model, Products};
use flashtile_candle::smollm2::sampler::Sampler;
use flashtile_candle::smollm2::session::{Session, Times};
use flashtile_candle::smollm2::{Gguf, tokenizer};
use indicatif::{ProgressBar, ProgressStyle};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Answers a prompt, token by token. The text goes to stdout, all else to stderr.
#[derive(Parser)]
struct Arguments {
    /// A question to the assistant
    #[arg(long, conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// A file with the question
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// Continue the prompt as a plain text, without the form of a chat
    #[arg(long)]
    plain: bool,
    /// 0 always takes the most probable token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The most tokens of the answer
    #[arg(long, default_value_t = 200)]
    max_tokens: usize,
    #[arg(long, value_enum, default_value_t = Kind::Flashtile)]
    attention: Kind,
    /// The cache of flashtile's attention
    #[arg(long, value_enum, default_value_t = CacheKind::Contiguous)]
    cache: CacheKind,
    /// What that cache stores
    #[arg(long, value_enum, default_value_t = CacheType::F32)]
    cache_type: CacheType,
    /// The tokens that each token sees, in addition to the first 4
    #[arg(long)]
    window: Option<usize>,
    /// Products with the weights of the file, or widened to f32
    #[arg(long, value_enum, default_value_t = Products::F32)]
    products: Products,
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
    let tokenizer = tokenizer::load(&gguf.content)?;
    let prompt = tokenizer.encode_fast(arguments.text()?, false)?;
    let prompt = prompt.get_ids();

    let bar = bar("loading", 30);
    let model = Model::load(&mut gguf, arguments.products, |layers| bar.set_position(layers as u64))?;
    bar.finish_and_clear();
    let mut session = Session::new(&model, &arguments.choice(), prompt.len() + arguments.max_tokens)?;
    let mut sampler = Sampler::new(arguments.temperature, arguments.seed);

    let bar = self::bar("reading", session.layers(prompt.len()));
    let (mut logits, prefill) = session.feed(prompt, || bar.inc(1))?;
    bar.finish_and_clear();

    let (mut stream, mut out) = (tokenizer.decode_stream(true), std::io::stdout().lock());
    let mut decode = Times::default();
    for _ in 0..arguments.max_tokens {
        let token = sampler.choose(&logits)?;
        if token == model.end {
            break;
        }
        if let Some(text) = stream.step(token)? {
            write!(out, "{text}")?;
            out.flush()?;
        }
        let (next, times) = session.feed(&[token], || ())?;
        logits = next;
        decode += times;
    }
    writeln!(out)?;
    report("prefill", &prefill);
    report("decode", &decode);
    Ok(())
}

fn report(name: &str, times: &Times) {
    let (tokens, rate, share) = (times.tokens, times.tokens_per_second(), 100.0 * times.share());
    if tokens > 0 {
        eprintln!("{name:8} {tokens:5} tokens, {rate:8.1} tokens/s, {share:3.0}% of the time in attention");
    }
}

/// A bar on stderr, if that is a terminal.
fn bar(name: &str, len: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} layers").expect("a valid template");
    ProgressBar::new(len as u64).with_style(style).with_message(name.to_owned())
}

impl Arguments {
    fn text(&self) -> Result<String> {
        let prompt = match (&self.prompt, &self.prompt_file) {
            (_, Some(path)) => std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?,
            (Some(prompt), None) => prompt.clone(),
            (None, None) => return Err("Give a --prompt or a --prompt-file.".into()),
        };
        Ok(if self.plain { prompt } else { tokenizer::chat(&prompt) })
    }

    fn choice(&self) -> Choice {
        Choice { attention: self.attention, cache: self.cache, cache_type: self.cache_type, window: self.window }
    }
}
