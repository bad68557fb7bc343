//! Decoding token by token: the time of a token as the cache grows, for caches of f32, f16 and bf16, contiguous and in pages.
//!
//! `cargo run --release --example decode_loop [-- --max 4096 --page 16] [plot.svg]`
//!
//! One layer of a model of 8 billion parameters: 32 query heads on 8 key/value heads of 128; one thread. All caches take the same
//! token in turns, as the layers of a model do, so a long cache is read from memory and not from the processor's.

use flashtile::{
    Attention, DType, Error, KeysValues, KvCache, KvFormat, Level, PageLists, PagedKvCache, SequenceId, TensorMut,
    TensorRef, Threads, Workspace, reference,
};
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use std::time::Instant;

const HEADS_Q: usize = 32;
const HEADS_KV: usize = 8;
const DIM: usize = 128;

/// Where the keys and values of the sequence lie.
enum Cache {
    Contiguous(KvCache),
    Paged { pool: PagedKvCache, sequence: SequenceId, lists: PageLists },
}

impl Cache {
    fn contiguous(format: KvFormat, tokens: usize) -> Result<Self, Error> {
        Ok(Cache::Contiguous(KvCache::new(format, 1, tokens)?))
    }

    fn paged(format: KvFormat, tokens: usize, page: usize) -> Result<Self, Error> {
        let mut pool = PagedKvCache::new(format, 1, tokens.div_ceil(page), page)?;
        let sequence = pool.new_sequence();
        Ok(Cache::Paged { pool, sequence, lists: PageLists::new() })
    }

    fn append(&mut self, k: TensorRef<'_, f32>, v: TensorRef<'_, f32>) -> Result<(), Error> {
        match self {
            Cache::Contiguous(cache) => cache.append(k, v),
            Cache::Paged { pool, sequence, lists } => {
                pool.append(*sequence, k, v)?;
                pool.list(&[*sequence], lists)
            }
        }
    }

    fn keys_values(&self) -> Result<KeysValues<'_>, Error> {
        match self {
            Cache::Contiguous(cache) => Ok(cache.into()),
            Cache::Paged { pool, lists, .. } => pool.view(0, lists),
        }
    }
}

/// A cache with what was measured of it.
struct Line {
    dtype: DType,
    place: &'static str,
    cache: Cache,
    out: Vec<f32>,
    /// Seconds of each token: appending and attention.
    seconds: Vec<f64>,
}

impl Line {
    /// The median time of the `count` tokens up to `length`: one token is at the mercy of the machine.
    fn median(&self, length: usize, count: usize) -> f64 {
        let mut seconds = self.seconds[length.saturating_sub(count)..length].to_vec();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }

    fn name(&self) -> String {
        format!("{} {}", self.dtype, self.place)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut max, mut page, mut path) = (4096, 16, "target/decode_loop.svg".to_string());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--max" => max = args.next().ok_or("--max needs a number")?.parse()?,
            "--page" => page = args.next().ok_or("--page needs a number")?.parse()?,
            _ => path = arg,
        }
    }
    if max == 0 || page == 0 {
        return Err("--max and --page need numbers above 0".into());
    }
    let mut lines = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let format = KvFormat::new(dtype, HEADS_KV, DIM);
        let caches = [("contiguous", Cache::contiguous(format, max)?), ("paged", Cache::paged(format, max, page)?)];
        for (place, cache) in caches {
            lines.push(Line { dtype, place, cache, out: vec![0.0; HEADS_Q * DIM], seconds: Vec::with_capacity(max) });
        }
    }

    let attention = Attention::new().causal().threads(Threads::Serial);
    let last_query = decode(&attention, &mut lines, max)?;
    print_times(&lines, max, page);
    check(&attention, &lines, &last_query)?;
    plot(&path, &lines, max)?;
    println!("\nplotted in {path}");
    Ok(())
}

/// Appends `max` tokens to every cache, with attention after each. Returns the last query.
fn decode(attention: &Attention<'_>, lines: &mut [Line], max: usize) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let progress = ProgressBar::new(max as u64);
    progress.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} tokens  {msg}")?);
    let (mut q, mut workspace) = (Vec::new(), Workspace::new());
    for token in 0..max {
        q = numbers(3 * token, HEADS_Q * DIM);
        let (k, v) = (numbers(3 * token + 1, HEADS_KV * DIM), numbers(3 * token + 2, HEADS_KV * DIM));
        let query = TensorRef::from_slice(&q, [1, HEADS_Q, 1, DIM])?;
        let [k, v] = [&k, &v].map(|rows| TensorRef::from_slice(rows, [1, HEADS_KV, 1, DIM]));
        let (k, v) = (k?, v?);
        for line in &mut *lines {
            let start = Instant::now();
            line.cache.append(k, v)?;
            let out = TensorMut::from_slice(&mut line.out, [1, HEADS_Q, 1, DIM])?;
            attention.compute(query, line.cache.keys_values()?, out, None, &mut workspace)?;
            line.seconds.push(start.elapsed().as_secs_f64());
        }
        // Contiguous and paged: the same bits.
        for pair in lines.chunks(2) {
            if pair[0].out != pair[1].out {
                return Err(format!("token {token}: {} and {} differ", pair[0].name(), pair[1].name()).into());
            }
        }
        if token % 64 == 63 {
            progress.set_position(token as u64 + 1);
            progress.set_message(format!(
                "{:.2} ms a token in {}",
                1e3 * lines[0].median(token + 1, 64),
                lines[0].name()
            ));
        }
    }
    progress.finish_and_clear();
    Ok(q)
}

/// Numbers in -1..1 for row `row`: the fractional parts of multiples of an irrational number.
fn numbers(row: usize, len: usize) -> Vec<f32> {
    let start = row as f64 * 0.414_213_562_373;
    (0..len).map(|n| ((start + n as f64 * 0.618_033_988_749) % 1.0) as f32 * 2.0 - 1.0).collect()
}

fn print_times(lines: &[Line], max: usize, page: usize) {
    println!(
        "{HEADS_Q} query heads on {HEADS_KV} of {DIM}, one thread, {}; pages of {page} tokens. Each token is appended, \
         then attention\nsees all tokens so far. Microseconds a token, median of up to 64 tokens.\n",
        Level::best()
    );
    println!("{:>7} | {:^21} | {:^21} | {:^21} |", "", "f32", "f16", "bf16");
    println!("{:>7} |{}", "tokens", " contiguous      paged |".repeat(3));
    let lengths = (7..).map(|log| 1 << log).take_while(|&length| length < max).chain([max]);
    for length in lengths {
        print!("{length:>7} |");
        for pair in lines.chunks(2) {
            let [contiguous, paged] = [0, 1].map(|n| 1e6 * pair[n].median(length, 64.min(length)));
            print!(" {contiguous:10.1} {paged:10.1} |");
        }
        println!();
    }
    print!("{:>7} |", "GB/s");
    for pair in lines.chunks(2) {
        // What attention reads at the last tokens, by the time of the whole step.
        let bytes = (max * KvFormat::new(pair[0].dtype, HEADS_KV, DIM).token_bytes()) as f64;
        let [contiguous, paged] = [0, 1].map(|n| bytes / pair[n].median(max, 64.min(max)) / 1e9);
        print!(" {contiguous:10.1} {paged:10.1} |");
    }
    println!();
}

/// Compares the last token's output with the definition in f64: over the keys and values as each cache has rounded them, and over
/// those of the f32 cache.
fn check(attention: &Attention<'_>, lines: &[Line], last_query: &[f32]) -> Result<(), Box<dyn std::error::Error>> {
    let q = TensorRef::from_slice(last_query, [1, HEADS_Q, 1, DIM])?;
    let unrounded = reference::attention(attention, q, lines[0].cache.keys_values()?)?.out;
    println!("\nLargest error of the last token's output, against the definition in f64:\n");
    println!("{:<18} {:>24} {:>24}", "cache", "over this cache's rows", "over unrounded rows");
    for line in lines {
        let expected = reference::attention(attention, q, line.cache.keys_values()?)?.out;
        let error = |expected: &[f64]| {
            line.out.iter().zip(expected).map(|(&out, &e)| (out as f64 - e).abs()).fold(0.0, f64::max)
        };
        println!("{:<18} {:>24.1e} {:>24.1e}", line.name(), error(&expected), error(&unrounded));
        if !line.out.iter().zip(&expected).all(|(&out, &e)| (out as f64 - e).abs() < 1e-5) {
            return Err(format!("{}: the result is not that of the definition", line.name()).into());
        }
    }
    Ok(())
}

/// The time of a token against the length, as medians of 48 equal ranges.
fn plot(path: &str, lines: &[Line], max: usize) -> Result<(), Box<dyn std::error::Error>> {
    if let Some(folder) = std::path::Path::new(path).parent() {
        std::fs::create_dir_all(folder)?;
    }
    let root = SVGBackend::new(path, (760, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let range = max.div_ceil(48);
    let points = |line: &Line| -> Vec<(f64, f64)> {
        let lengths = (1..=max / range).map(|n| n * range);
        lengths.map(|length| (length as f64, 1e3 * line.median(length, range))).collect()
    };
    let highest = lines.iter().flat_map(&points).map(|(_, ms)| ms).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption("ms a token against tokens in the cache, one thread", ("sans-serif", 17))
        .margin(18)
        .x_label_area_size(30)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..max as f64, 0.0..1.1 * highest)?;
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT).x_label_formatter(&|x| format!("{x:.0}")).draw()?;
    // The paged cache of a type has the lighter colour.
    let colours = [BLUE, RGBColor(150, 150, 255), RED, RGBColor(255, 150, 150), BLACK, RGBColor(160, 160, 160)];
    for (line, colour) in lines.iter().zip(colours) {
        chart
            .draw_series(LineSeries::new(points(line), colour.stroke_width(2)))?
            .label(line.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    let legend = SeriesLabelPosition::UpperLeft;
    chart.configure_series_labels().position(legend).border_style(BLACK).background_style(WHITE).draw()?;
    root.present()?;
    Ok(())
}
