//! The command line.

use std::error::Error;
use std::time::Duration;

pub(crate) const USAGE: &str = "\
usage: cargo bench --bench roofline -- [--filter TEXT] [--threads N] [--csv FILE] [--outside [--pause MS]]

  --filter TEXT   only lines with TEXT in their name and type, as in \"decode_short f32\"
  --threads N     threads of the pool, 1 if not given; with more than 1, prefill and decode are held against one thread
  --csv FILE      the table as a file, too
  --outside       instead: medians of calls from a thread outside the pool, against serial calls (2 threads if not given)
  --pause MS      with --outside: milliseconds before each call";

pub(crate) struct Arguments {
    /// Set under `cargo bench`, not under `cargo test --benches`, which runs one round.
    pub(crate) bench: bool,
    pub(crate) help: bool,
    pub(crate) filter: String,
    pub(crate) threads: usize,
    pub(crate) csv: Option<String>,
    pub(crate) outside: bool,
    pub(crate) pause: Duration,
}

impl Arguments {
    pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, Box<dyn Error>> {
        let mut parsed = Self {
            bench: false,
            help: false,
            filter: String::new(),
            threads: 0,
            csv: None,
            outside: false,
            pause: Duration::ZERO,
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or(format!("{arg} needs a value\n\n{USAGE}"));
            match arg.as_str() {
                "--bench" => parsed.bench = true, // from cargo
                "--help" | "-h" => parsed.help = true,
                "--filter" => parsed.filter = value()?,
                "--csv" => parsed.csv = Some(value()?),
                "--threads" => {
                    let number = value()?;
                    let threads = number.parse().ok().filter(|&threads| threads > 0);
                    parsed.threads = threads.ok_or(format!("--threads takes a number from 1 on, not {number}"))?;
                }
                "--outside" => parsed.outside = true,
                "--pause" => {
                    let number = value()?;
                    let millis = number.parse().map_err(|_| format!("--pause takes milliseconds, not {number}"))?;
                    parsed.pause = Duration::from_millis(millis);
                }
                _ => return Err(format!("unknown argument {arg}\n\n{USAGE}").into()),
            }
        }
        if parsed.outside && parsed.csv.is_some() {
            return Err("--outside has no --csv".into());
        }
        if parsed.threads == 0 {
            parsed.threads = if parsed.outside { 2 } else { 1 };
        }
        Ok(parsed)
    }
}
