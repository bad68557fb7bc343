//! How close calls come to the limits of the machine: `cargo bench --bench roofline [-- --filter decode] [--threads 2]`.
//!
//! One process runs many rounds. In each, these take turns: the kernel, multiply-adds in registers, and a loop that reads the bytes
//! of the workload's tensors. The binding roof is the one with the longer time:
//!
//! ```text
//! roof      = max(operations / multiply-adds per second, bytes / bytes read per second)
//! fraction  = roof / time                                                              best against best
//! ```
//!
//! Operations are those of the visible pairs. Bytes are those of all tensors, mask and bias included, each once. For softmax the
//! roof is a copy of the bytes, or, in place, a loop that negates them. Every answer is checked against the definition before it is
//! timed.
//!
//! With several threads, roofs are measured on all of them, and prefill and decode also on one thread. Two threads must give a
//! speed-up, as far as the machine allows: multiply-adds in registers show how far. A row that memory binds can gain no more than
//! reading gains, which may be nothing where one core reads all that memory delivers. So the roof's own speed-up stands beside a
//! row's. Where memory binds a row and reading gains less than the target, the row counts as bound by memory, neither reached nor
//! missed.
//!
//! `--outside` is another table: what callers outside the pool get, see `outside.rs`.

#[path = "../support/mod.rs"]
mod support;

mod arguments;
mod contest;
mod key_sums;
mod lines;
mod open_sets;
mod outside;
mod report;
mod serving;
mod workloads;

use arguments::{Arguments, USAGE};
use flashtile::{DType, Level};
use indicatif::{ProgressBar, ProgressStyle};
use lines::Line;
use report::{CSV_HEADER, Row, header, scaling};
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use workloads::{GROUPS, Workload};

/// The time of a line, on average over its group: some 150 lines with their data must take less than ten minutes.
const LINE_TIME: Duration = Duration::from_millis(3000);
const LEAST_ROUNDS: usize = 5;
const MOST_ROUNDS: usize = 400;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("roofline: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = Arguments::parse(std::env::args().skip(1))?;
    if arguments.help {
        println!("{USAGE}");
        return Ok(());
    }
    if !arguments.bench && arguments.filter.is_empty() {
        arguments.filter = "decode_short".into();
    }
    if arguments.outside {
        return outside::run(&arguments);
    }
    let mut csv = arguments.csv.as_ref().map(File::create).transpose()?;
    let groups: Vec<Vec<Wanted>> = GROUPS.iter().map(|group| wanted(group, &arguments.filter)).collect();
    if groups.iter().all(Vec::is_empty) {
        return Err(format!("no line has \"{}\" in its name and type", arguments.filter).into());
    }
    let _pool = rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).use_current_thread().build()?;

    println!("{}, threads: {}\n\n{}", Level::best(), arguments.threads, header(arguments.threads));
    let progress = Progress::new(groups.iter().map(Vec::len).sum())?;
    let (mut all, mut reached, mut judged) = (Vec::new(), 0, 0);
    for group in groups.iter().filter(|group| !group.is_empty()) {
        let rows = measure(group, &arguments, &progress)?;
        for (row, _) in rows.iter().zip(group).filter(|(_, wanted)| wanted.shown) {
            progress.print(&row.text(&rows, arguments.threads));
            let judgement = row.judgement(&rows);
            judged += judgement.is_some() as usize;
            reached += judgement.is_some_and(|judgement| judgement.reached()) as usize;
        }
        all.extend(rows.into_iter().zip(group).filter(|(_, wanted)| wanted.shown).map(|(row, _)| row));
    }
    progress.bar.finish_and_clear();
    if judged > 0 {
        println!("\n{reached} of {judged} lines reach their target.");
    }
    println!("{}", scaling(&all, arguments.threads));
    if let Some(file) = &mut csv {
        writeln!(file, "{CSV_HEADER}")?;
        all.iter().try_for_each(|row| write!(file, "{}", row.csv()))?;
    }
    Ok(())
}

/// A line to measure: for the table, or because others are judged by it.
struct Wanted {
    workload: &'static Workload,
    dtype: DType,
    shown: bool,
}

fn wanted(group: &'static [Workload], filter: &str) -> Vec<Wanted> {
    let workloads = || group.iter().filter(|workload| workload.is_available());
    let lines = || workloads().flat_map(|workload| workload.types.iter().map(move |&dtype| (workload, dtype)));
    let shown = |(workload, dtype): (&Workload, DType)| format!("{} {dtype}", workload.name).contains(filter);
    let judges: Vec<_> =
        lines().filter(|&line| shown(line)).filter_map(|(workload, dtype)| workload.judged_by(dtype)).collect();
    lines()
        .map(|(workload, dtype)| Wanted { workload, dtype, shown: shown((workload, dtype)) })
        .filter(|wanted| wanted.shown || judges.contains(&(wanted.workload.name, wanted.dtype)))
        .collect()
}

/// All lines of a group, taking turns until their time is up.
fn measure(group: &[Wanted], arguments: &Arguments, progress: &Progress) -> Result<Vec<Row>, Box<dyn Error>> {
    progress.tell(group[0].workload.name);
    let make = |wanted: &Wanted| Line::new(wanted.workload, wanted.dtype, arguments.threads);
    let mut lines = group.iter().map(make).collect::<Result<Vec<_>, _>>()?;
    let (start, time) = (Instant::now(), LINE_TIME * lines.len() as u32);
    for round in 0..if arguments.bench { MOST_ROUNDS } else { 1 } {
        if round >= LEAST_ROUNDS && start.elapsed() > time {
            break;
        }
        lines.iter_mut().try_for_each(Line::round)?;
    }
    progress.bar.inc(lines.len() as u64);
    Ok(lines.into_iter().map(Row::from).collect())
}

/// A bar on a terminal, plain lines elsewhere.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new(lines: usize) -> Result<Self, Box<dyn Error>> {
        let bar = ProgressBar::new(lines as u64);
        bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len}  {msg}  {elapsed}")?);
        bar.enable_steady_tick(Duration::from_millis(500));
        Ok(Self { bar })
    }

    fn tell(&self, name: &'static str) {
        self.bar.set_message(name);
        if self.bar.is_hidden() {
            eprintln!("measuring {name}");
        }
    }

    /// A line of the table, above the bar.
    fn print(&self, line: &str) {
        self.bar.suspend(|| println!("{line}"));
    }
}
