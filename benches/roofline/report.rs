//! The table, as text and as a CSV file.

use crate::contest::Outcome;
use crate::lines::Line;
use crate::workloads::{HALVES_TIME, Reach, Workload};
use flashtile::DType;

/// The target of the speed-up on two threads, and the speed-up of multiply-adds in registers from which it applies.
const SPEED_UP: f64 = 1.85;
const SPIN_SPEED_UP: f64 = 1.95;

/// A measured line.
pub(crate) struct Row {
    workload: &'static Workload,
    dtype: DType,
    threads: usize,
    flops: f64,
    bytes: f64,
    plan: String,
    outcome: Outcome,
    serial: Option<Outcome>,
}

impl From<Line<'_>> for Row {
    fn from(line: Line<'_>) -> Self {
        Self {
            workload: line.workload,
            dtype: line.dtype,
            threads: line.threads,
            flops: line.work.flops,
            bytes: line.work.bytes as f64,
            outcome: line.contest.outcome(),
            serial: line.serial.map(|contest| contest.outcome()),
            plan: line.plan,
        }
    }
}

pub(crate) const CSV_HEADER: &str = "workload,q_type,kv_type,threads,best_ms,median_ms,gflops,gbps,fraction,roof";

pub(crate) fn header(threads: usize) -> String {
    let scaling = if threads > 1 { "   speed-up (roof's)" } else { "" };
    format!(
        "{:<22} {:<5} {:>7} {:>11} {:>11} {:>7} {:>6} {:>8} {:<7} {:<34}{scaling}  plan",
        "workload", "type", "threads", "best", "median", "GF/s", "GB/s", "fraction", "roof", "target"
    )
}

impl Row {
    /// The time that the binding roof allows, as a fraction of the time taken.
    fn fraction(&self) -> f64 {
        self.outcome.roof / self.outcome.best
    }

    fn speed_up(&self) -> Option<f64> {
        Some(self.serial?.best / self.outcome.best)
    }

    /// The speed-up of multiply-adds in registers.
    fn spin_speed_up(&self) -> Option<f64> {
        Some(self.outcome.peak? / self.serial?.peak?)
    }

    /// The speed-up of the roof that binds the row.
    fn roof_speed_up(&self) -> Option<f64> {
        Some(self.serial?.roof / self.outcome.roof)
    }

    /// The verdict on a speed-up below the target. Multiply-adds show whether the machine has a second thread to give. Where
    /// memory binds and reading gains less than the target, they show nothing.
    fn verdict(&self, spin: f64, roof: f64) -> &'static str {
        if self.outcome.roof_name == "memory" && roof < SPEED_UP {
            "bound by memory"
        } else if spin >= SPIN_SPEED_UP {
            "not reached"
        } else {
            "not judged"
        }
    }

    /// Its line of the file, and another for one thread if that was measured.
    pub(crate) fn csv(&self) -> String {
        let serial = self.serial.iter().map(|serial| self.csv_line(1, serial));
        serial.chain([self.csv_line(self.threads, &self.outcome)]).collect()
    }

    fn csv_line(&self, threads: usize, outcome: &Outcome) -> String {
        let Outcome { best, median, roof, roof_name, .. } = *outcome;
        let (name, dtype) = (self.workload.name, self.workload.type_name(self.dtype));
        let (gflops, gbps) = (self.flops / best / 1e9, self.bytes / best / 1e9);
        let (fraction, best, median) = (roof / best, best * 1e3, median * 1e3);
        format!(
            "{name},{dtype},{dtype},{threads},{best:.6},{median:.6},{gflops:.3},{gbps:.3},{fraction:.4},{roof_name}\n"
        )
    }

    /// Its line of a table for `threads` threads. `rows` are those of its group, with the one that it is judged by.
    pub(crate) fn text(&self, rows: &[Row], threads: usize) -> String {
        let Outcome { best, median, roof_name, .. } = self.outcome;
        let target = match self.workload.reach {
            Reach::BelowPeers | Reach::BelowPeersAndOfF32(_) if self.workload.judged_by(self.dtype).is_none() => {
                "less than peers: see benches/peers".into()
            }
            _ => self.judgement(rows).map_or(String::new(), |judgement| judgement.text()),
        };
        let gflops = if self.flops > 0.0 { format!("{:.1}", self.flops / best / 1e9) } else { "-".into() };
        format!(
            "{:<22} {:<5} {:>7} {:>11} {:>11} {gflops:>7} {:>6.1} {:>8.3} {roof_name:<7} {target:<34}{}  {}",
            self.workload.name,
            self.workload.type_name(self.dtype),
            self.threads,
            time(best),
            time(median),
            self.bytes / best / 1e9,
            self.fraction(),
            self.scaling_columns(threads),
            self.plan
        )
    }

    fn scaling_columns(&self, threads: usize) -> String {
        match self.serial {
            _ if threads == 1 => String::new(),
            None => format!("{:20}", ""),
            Some(serial) => {
                let roofs = format!("({:.2})", serial.roof / self.outcome.roof);
                format!("{:>11.2} {roofs:>8}", serial.best / self.outcome.best)
            }
        }
    }

    pub(crate) fn judgement(&self, rows: &[Row]) -> Option<Judgement> {
        let Some(judge) = self.workload.judged_by(self.dtype) else {
            return match self.workload.reach {
                Reach::Fraction(least) | Reach::OfF32(least) => {
                    Some(Judgement { what: String::new(), got: self.fraction(), bound: Bound::Least(least) })
                }
                Reach::Nanoseconds(most) => {
                    let got = self.outcome.best * 1e9 / self.workload.softmax_elements() as f64;
                    Some(Judgement { what: " ns an element".into(), got, bound: Bound::Most(most) })
                }
                Reach::Microseconds(most) => {
                    let got = self.outcome.best * 1e6;
                    Some(Judgement { what: " us".into(), got, bound: Bound::Most(most) })
                }
                _ => None,
            };
        };
        let judge = rows.iter().find(|row| (row.workload.name, row.dtype) == judge)?;
        let (fractions, times) = (self.fraction() / judge.fraction(), self.outcome.best / judge.outcome.best);
        let (what, got, bound) = match self.workload.reach {
            Reach::FractionOf(name, least) => (name, fractions, Bound::Least(least)),
            Reach::TimeOf(name, most) => (name, times, Bound::Most(most)),
            Reach::TimeOfF32(most) => ("f32's time", times, Bound::Most(most)),
            Reach::BelowPeersAndOfF32(most) => ("f32's time", times, Bound::Most(most)),
            _ => ("f32's time", times, Bound::Most(HALVES_TIME)),
        };
        Some(Judgement { what: format!(" of {what}"), got, bound })
    }
}

enum Bound {
    Least(f64),
    Most(f64),
}

pub(crate) struct Judgement {
    /// What the number is a ratio to, if not to the roof.
    what: String,
    got: f64,
    bound: Bound,
}

impl Judgement {
    pub(crate) fn reached(&self) -> bool {
        match self.bound {
            Bound::Least(least) => self.got >= least,
            Bound::Most(most) => self.got <= most,
        }
    }

    fn text(&self) -> String {
        let mark = if self.reached() { "yes" } else { "NO " };
        let (sign, bound) = match self.bound {
            Bound::Least(least) => ('≥', least),
            Bound::Most(most) => ('≤', most),
        };
        format!("{mark} {sign} {bound:.2}: {:.3}{}", self.got, self.what)
    }
}

fn time(seconds: f64) -> String {
    if seconds < 1e-3 { format!("{:.2} µs", seconds * 1e6) } else { format!("{:.3} ms", seconds * 1e3) }
}

/// How threads helped, over all rows; empty if no row has both.
pub(crate) fn scaling(rows: &[Row], threads: usize) -> String {
    let best = |peak: fn(&Row) -> Option<f64>| rows.iter().filter_map(peak).fold(0.0, f64::max);
    let one = best(|row| row.serial?.peak);
    let all = best(|row| row.serial.and(row.outcome.peak));
    if one == 0.0 {
        return String::new();
    }
    let mut text = format!(
        "Multiply-adds in registers: {:.1} GF/s on one thread, {:.1} on {threads}: {:.2} times.\n",
        one / 1e9,
        all / 1e9,
        all / one
    );
    if threads != 2 {
        return text;
    }
    let judged: Vec<_> = rows.iter().filter_map(|row| Some((row, row.speed_up()?, row.spin_speed_up()?))).collect();
    let scaled = judged.iter().filter(|(_, _, spin)| *spin >= SPIN_SPEED_UP).count();
    text += &format!(
        "The target of prefill and decode is {SPEED_UP} times where those scale by {SPIN_SPEED_UP}, as they did beside {scaled} of \
         {} rows.\n",
        judged.len()
    );
    for (row, speed_up, spin) in judged.iter().filter(|(_, speed_up, _)| *speed_up < SPEED_UP) {
        let (name, dtype, roof) = (row.workload.name, row.dtype, row.roof_speed_up().unwrap_or(f64::NAN));
        let verdict = row.verdict(*spin, roof);
        text += &format!("  {name} {dtype}: {speed_up:.2}, its roof {roof:.2}, multiply-adds {spin:.2}: {verdict}\n");
    }
    text
}
