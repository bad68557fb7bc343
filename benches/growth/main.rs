//! How time and memory grow: `cargo bench --bench growth -- --out docs/img`.
//!
//! It measures against the length of the sequence, the threads and the batch, and finds where prefill becomes faster than decode.
//! It prints the tables of `docs/performance.md` and draws its pictures. "Extra memory" is what a call holds beside its tensors:
//! the bytes of its [`Workspace`](flashtile::Workspace). Every answer is checked before it is timed.

#[path = "../support/mod.rs"]
mod support;

mod plot;

use flashtile::{Attention, Element, Form, Level, Threads, bf16, f16};
use indicatif::{ProgressBar, ProgressStyle};
use plot::{Panel, Series, pair};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use support::machine::{multiply_add_flops, multiply_add_peak, multiply_adds};
use support::{Case, Dims, Run, best_times, plan};

const USAGE: &str =
    "usage: cargo bench --bench growth -- [--out FOLDER]      where the pictures go, docs/img if not given";

/// Keys that a query of the window sees.
const WINDOW: usize = 512;
const CROSSOVER_KEYS: usize = 4096;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("growth: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let (mut out, mut bench, mut args) = (PathBuf::from("docs/img"), false, std::env::args().skip(1));
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => bench = true, // from cargo
            "--out" => out = args.next().ok_or(USAGE)?.into(),
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            _ => return Err(format!("unknown argument {arg}\n\n{USAGE}").into()),
        }
    }
    if !bench {
        out = std::env::temp_dir(); // `cargo test --benches` leaves the real pictures alone
    }
    std::fs::create_dir_all(&out)?;
    let growth = Growth { out, bench, progress: ProgressBar::new_spinner() };
    growth.progress.set_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    println!("By `cargo bench --bench growth -- --out docs/img`, {}.", Level::best());
    growth.lengths()?;
    growth.threads()?;
    growth.batches()?;
    growth.crossover()?;
    growth.progress.finish_and_clear();
    Ok(())
}

struct Growth {
    out: PathBuf,
    bench: bool,
    progress: ProgressBar,
}

/// Time and memory of one problem.
#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    extra_bytes: usize,
}

impl Cost {
    fn text(self) -> String {
        format!("{:.3} ms | {:.0} KiB", self.seconds * 1e3, kib(self.extra_bytes))
    }
}

fn kib(bytes: usize) -> f64 {
    bytes as f64 / 1024.0
}

fn causal() -> Attention<'static> {
    Attention::new().causal()
}

/// Names with a number for each step.
fn series(names: &[&str], steps: &[usize], y: impl Fn(usize, usize) -> f64) -> Vec<Series> {
    let points = |n: usize| steps.iter().enumerate().map(|(i, &x)| (x as f64, y(i, n))).collect();
    names.iter().enumerate().map(|(n, name)| (name.to_string(), points(n))).collect()
}

impl Growth {
    /// All of them, or the first `quick` under `cargo test --benches`.
    fn steps(&self, steps: &[usize], quick: usize) -> Vec<usize> {
        steps[..if self.bench { steps.len() } else { quick }].to_vec()
    }

    fn tell(&self, what: String) {
        if self.progress.is_hidden() {
            eprintln!("measuring {what}");
        }
        self.progress.set_message(what);
        self.progress.tick();
    }

    /// The best of several calls, or one call if it is long. The check has run the problem once before.
    fn cost<T: Element>(&self, dims: Dims, attention: Attention<'static>) -> Result<Cost, Box<dyn Error>> {
        let mut case = Case::<T>::new(dims, attention).checked()?;
        let (begin, mut seconds) = (Instant::now(), f64::INFINITY);
        while seconds == f64::INFINITY || self.bench && begin.elapsed().as_secs_f64() < 0.5 {
            let start = Instant::now();
            case.run()?;
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        Ok(Cost { seconds, extra_bytes: case.extra_bytes() })
    }

    fn lengths(&self) -> Result<(), Box<dyn Error>> {
        let lengths: Vec<usize> = (7..=16).map(|log| 1 << log).collect();
        let lengths = self.steps(&lengths, 2);
        let window = || causal().window(Some(WINDOW - 1), None);
        let mut costs = Vec::new();
        println!(
            "\n### Sequence length\n\nOne head of 64, f32, one thread; causal, and causal with a window of {WINDOW}.\n"
        );
        println!("| tokens | causal | GF/s | extra memory | window | GF/s | extra memory |");
        println!("|---:|---:|---:|---:|---:|---:|---:|");
        for &tokens in &lengths {
            self.tell(format!("{tokens} tokens"));
            let dims = Dims::new(1, tokens, tokens, 64);
            let serial = |attention: Attention<'static>| self.cost::<f32>(dims, attention.threads(Threads::Serial));
            let row = [serial(causal())?, serial(window())?];
            let pairs = [dims.pairs(true, None), dims.pairs(true, Some(WINDOW - 1))];
            let texts = [0, 1].map(|n| {
                let Cost { seconds, extra_bytes } = row[n];
                let speed = dims.flops(pairs[n]) / seconds / 1e9;
                format!("{:.3} ms | {speed:.1} | {:.0} KiB", seconds * 1e3, kib(extra_bytes))
            });
            println!("| {tokens} | {} |", texts.join(" | "));
            costs.push(row);
        }
        let names = ["causal", &format!("window of {WINDOW}")];
        let time = series(&names, &lengths, |i, n| costs[i][n].seconds * 1e3);
        let memory = series(&names, &lengths, |i, n| kib(costs[i][n].extra_bytes));
        self.picture(
            "growth_length",
            "time and extra memory against the length",
            [
                Panel { title: "ms against tokens", series: time },
                Panel { title: "KiB beside the tensors, and theirs, against tokens", series: memory },
            ],
        )
    }

    fn threads(&self) -> Result<(), Box<dyn Error>> {
        let most = std::thread::available_parallelism()?.get();
        let counts: Vec<usize> = (0..).map(|log| 1 << log).take_while(|&n| n < most).chain([most]).collect();
        let prefill = Dims::new(8, 2048, 2048, 64);
        let decode = Dims { heads_kv: 8, ..Dims::new(32, 1, 8192, 128) };
        println!(
            "\n### Threads\n\nPrefill: causal, 8 heads of 64, 2048 tokens, f32. Decode: 32 heads of 128 on 8, 8192 keys, f16.\n"
        );
        println!("| threads | prefill | extra memory | speed-up | decode | extra memory | speed-up | multiply-adds' |");
        println!("|---:|---:|---:|---:|---:|---:|---:|---:|");
        let (mut costs, alone): (Vec<[Cost; 2]>, f64) = (Vec::new(), multiply_add_peak());
        for &threads in &counts {
            self.tell(format!("threads: {threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            // Boxed errors are not `Send`, so they cross threads as text.
            let row = pool.install(|| -> Result<_, String> {
                let prefill = self.cost::<f32>(prefill, causal()).map_err(|error| error.to_string())?;
                Ok([prefill, self.cost::<f16>(decode, Attention::new()).map_err(|error| error.to_string())?])
            })?;
            costs.push(row);
            let texts = [0, 1].map(|n| format!("{} | {:.2}", row[n].text(), costs[0][n].seconds / row[n].seconds));
            let spin = Self::spin(&pool);
            println!("| {threads} | {} | {:.2} |", texts.join(" | "), spin / alone);
        }
        let names = ["prefill", "decode"];
        let time = series(&names, &counts, |i, n| costs[i][n].seconds * 1e3);
        let memory = series(&names, &counts, |i, n| kib(costs[i][n].extra_bytes));
        self.picture(
            "growth_threads",
            "time and extra memory against threads",
            [
                Panel { title: "ms against threads", series: time },
                Panel { title: "KiB beside the tensors, against threads", series: memory },
            ],
        )
    }

    /// Multiply-adds in registers on all threads of a pool, in operations a second: the roof of the machine.
    fn spin(pool: &rayon::ThreadPool) -> f64 {
        const STEPS: usize = 1 << 21;
        let run = |_| {
            let start = Instant::now();
            pool.broadcast(|_| multiply_adds(STEPS));
            start.elapsed().as_secs_f64()
        };
        pool.current_num_threads() as f64 * multiply_add_flops(STEPS) / (0..10).map(run).fold(f64::INFINITY, f64::min)
    }

    fn batches(&self) -> Result<(), Box<dyn Error>> {
        let batches = self.steps(&[1, 2, 4, 8, 16, 32], 1);
        println!(
            "\n### Batch\n\nEncoder: 12 heads of 64, 128 tokens, f32. Decode: 32 heads of 128 on 8, 1024 keys, f16. One thread.\n"
        );
        println!("| batch | encoder | extra memory | ms a sequence | decode | extra memory | ms a sequence |");
        println!("|---:|---:|---:|---:|---:|---:|---:|");
        let mut costs = Vec::new();
        for &batch in &batches {
            self.tell(format!("batch {batch}"));
            let serial = || Attention::new().threads(Threads::Serial);
            let encoder = Dims { batch, ..Dims::new(12, 128, 128, 64) };
            let decode = Dims { batch, heads_kv: 8, ..Dims::new(32, 1, 1024, 128) };
            let row = [self.cost::<f32>(encoder, serial())?, self.cost::<f16>(decode, serial())?];
            let texts = row.map(|cost| format!("{} | {:.3}", cost.text(), cost.seconds * 1e3 / batch as f64));
            println!("| {batch} | {} |", texts.join(" | "));
            costs.push(row);
        }
        let names = ["encoder", "decode"];
        let time = series(&names, &batches, |i, n| costs[i][n].seconds * 1e3);
        let memory = series(&names, &batches, |i, n| kib(costs[i][n].extra_bytes));
        self.picture(
            "growth_batch",
            "time and extra memory against the batch",
            [
                Panel { title: "ms against batch", series: time },
                Panel { title: "KiB beside the tensors, against batch", series: memory },
            ],
        )
    }

    fn crossover(&self) -> Result<(), Box<dyn Error>> {
        println!(
            "\n### Decode or prefill\n\nRows of one key/value head, {CROSSOVER_KEYS} keys, one thread: GF/s of either form, best of turns. The plan's loss is how\nmuch longer its choice takes than the other form, at the worst of these row counts.\n"
        );
        println!(
            "| type, head_dim | rows: decode / prefill | decode is faster at | plan takes decode for | plan's loss at most |"
        );
        println!("|---|---|---:|---:|---:|");
        let panels = [
            Panel { title: "GF/s against rows, head_dim 64", series: self.forms(64)? },
            Panel { title: "GF/s against rows, head_dim 128", series: self.forms(128)? },
        ];
        self.picture("growth_forms", "the speed of both forms against the rows of a key/value head", panels)
    }

    fn forms(&self, dim: usize) -> Result<Vec<Series>, Box<dyn Error>> {
        Ok([self.forms_of::<f32>(dim)?, self.forms_of::<f16>(dim)?, self.forms_of::<bf16>(dim)?].concat())
    }

    /// The speed of both forms.
    fn forms_of<T: Element>(&self, dim: usize) -> Result<Vec<Series>, Box<dyn Error>> {
        let rows = self.steps(&[1, 2, 4, 6, 8, 10, 12, 16, 18, 20, 22, 24, 28, 32, 40, 48, 64], 1);
        let (mut times, mut loss, mut texts) = (Vec::new(), 1.0f64, Vec::new());
        self.tell(format!("{} {dim}: decode or prefill", T::DTYPE));
        for &rows in &rows {
            let (dims, both) = (dims_of(rows, dim), self.both_forms::<T>(rows, dim)?);
            let chosen = if planned::<T>(rows, dim)? == Form::Decode { both[0] } else { both[1] };
            loss = loss.max(chosen / both[0].min(both[1]));
            let [decode, prefill] = both.map(|seconds| dims.flops(dims.pairs(false, None)) / seconds / 1e9);
            texts.push(format!("{rows}: {decode:.0} / {prefill:.0}"));
            times.push([decode, prefill]);
        }
        let faster = rows.iter().zip(&times).filter(|(_, [decode, prefill])| decode >= prefill).map(|(rows, _)| *rows);
        let mut planned_decode = Vec::new();
        for rows in 1..=64 {
            if planned::<T>(rows, dim)? == Form::Decode {
                planned_decode.push(rows);
            }
        }
        println!(
            "| {}, {dim} | {} | {} | {} | {:.0}% |",
            T::DTYPE,
            texts.join(", "),
            faster.map(|rows| rows.to_string()).collect::<Vec<_>>().join(", "),
            runs_of(&planned_decode),
            100.0 * (loss - 1.0)
        );
        let names = ["decode", "prefill"].map(|form| format!("{}, {form}", T::DTYPE));
        Ok(series(&[&names[0], &names[1]], &rows, |i, n| times[i][n]))
    }

    /// Seconds of decode and of prefill.
    fn both_forms<T: Element>(&self, rows: usize, dim: usize) -> Result<[f64; 2], Box<dyn Error>> {
        let run = |form| -> Result<Run<'_>, Box<dyn Error>> {
            let attention = Attention::new().threads(Threads::Serial).form(form);
            let mut case = Case::<T>::new(dims_of(rows, dim), attention).checked()?;
            Ok(Box::new(move || case.run()))
        };
        let mut runs = [run(Form::Decode)?, run(Form::Prefill)?];
        let once: f64 = best_times(1, &mut runs)?.iter().sum();
        let rounds = if self.bench { (0.5 / once).clamp(5.0, 500.0) as usize } else { 1 };
        let times = best_times(rounds, &mut runs)?;
        Ok([times[0], times[1]])
    }

    fn picture(&self, name: &str, about: &str, panels: [Panel; 2]) -> Result<(), Box<dyn Error>> {
        pair(&self.out.join(format!("{name}.svg")), panels)?;
        println!("\n![{about}](img/{name}.svg)");
        Ok(())
    }
}

fn dims_of(rows: usize, dim: usize) -> Dims {
    Dims::new(1, rows, CROSSOVER_KEYS, dim)
}

/// Numbers in order, neighbours as `1-12`.
fn runs_of(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| format!("{}-{}", run[0], run[run.len() - 1]));
    runs.collect::<Vec<_>>().join(", ")
}

/// The form that the plan chooses.
fn planned<T: Element>(rows: usize, dim: usize) -> Result<Form, Box<dyn Error>> {
    Ok(plan::<T>(dims_of(rows, dim), &Attention::new())?.form())
}
