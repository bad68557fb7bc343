//! Tiled attention as sequences grow: speed stays near the machine's peak, and memory stays constant.
//!
//! `cargo run --release --example sequence_lengths [-- --max 4096] [plot.svg]`
//!
//! One head, head_dim 64, seq_q = seq_kv, one thread. It is compared with the textbook algorithm: all scores in one matrix.

#[path = "../benches/support/machine.rs"]
mod machine;

use flashtile::{Attention, TensorMut, TensorRef, Threads, Workspace};
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use std::error::Error;
use std::time::Instant;

const DIM: usize = 64;
/// The textbook algorithm is skipped for lengths where it would take longer than this, in seconds.
const PATIENCE: f64 = 2.0;

#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    /// Memory in addition to inputs and output.
    bytes: usize,
}

struct Row {
    keys: usize,
    tiled: Cost,
    matrix: Option<Cost>,
}

impl Row {
    /// Two products of keys x queries x DIM multiply-adds of two operations each.
    fn flops(&self) -> f64 {
        4.0 * (self.keys * self.keys * DIM) as f64
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut max, mut path, mut args) = (16384, "target/sequence_lengths.svg".to_string(), std::env::args().skip(1));
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--max" => max = args.next().ok_or("--max needs a number")?.parse()?,
            _ => path = arg,
        }
    }
    let lengths: Vec<usize> = (7..=20).map(|log| 1 << log).take_while(|&keys| keys <= max).collect();
    let progress = ProgressBar::new(lengths.len() as u64);
    progress.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len}  {msg}")?);
    let (mut rows, mut peak, mut patient): (Vec<Row>, f64, bool) = (Vec::new(), 0.0, true);
    for &keys in &lengths {
        progress.set_message(format!("{keys} keys"));
        peak = peak.max(machine::multiply_add_peak());
        let row = measure(keys, patient)?;
        // The next length takes four times as long.
        patient = row.matrix.is_some_and(|cost| 4.0 * cost.seconds < PATIENCE);
        rows.push(row);
        progress.inc(1);
    }
    progress.finish_and_clear();

    println!(
        "One head of {DIM}, seq_q = seq_kv, f32, one thread. Multiply-adds in registers: {:.1} GF/s.\n",
        peak / 1e9
    );
    println!("{:7} | {:^41} | {:^27} |", "", "tiled", "all scores in a matrix");
    println!("   keys |       time     GF/s  of peak        memory |      time    GF/s     memory | speed-up");
    for row in &rows {
        let (tiled, speed) = (row.tiled, row.flops() / row.tiled.seconds);
        let (time, kib) = (tiled.seconds * 1e3, tiled.bytes as f64 / 1024.0);
        print!("{:7} | {time:7.2} ms {:8.1} {:7.0}% {kib:9.0} KiB |", row.keys, speed / 1e9, 100.0 * speed / peak);
        match row.matrix {
            None => println!("{:>29}", "|"),
            Some(matrix) => {
                let (time, kib) = (matrix.seconds * 1e3, matrix.bytes as f64 / 1024.0);
                let speed_up = matrix.seconds / tiled.seconds;
                println!("{time:7.1} ms {:5.1} {kib:8.0} KiB | {speed_up:.1}x", row.flops() / matrix.seconds / 1e9);
            }
        }
    }
    plot(&path, &rows, peak)?;
    println!("\nplotted in {path}");
    Ok(())
}

/// Times both algorithms at one length (best of a few calls), and compares their results.
fn measure(keys: usize, with_matrix: bool) -> Result<Row, Box<dyn Error>> {
    // Numbers in -1..1 with a long period: the fractional parts of multiples of an irrational number.
    let numbers = |step: f64| (0..keys * DIM).map(|n| (n as f64 * step).fract() as f32 * 2.0 - 1.0).collect::<Vec<_>>();
    let (q, k, v) = (numbers(0.618_033_988_749), numbers(0.414_213_562_373), numbers(0.732_050_807_568));
    let shape = [1, 1, keys, DIM];
    let attention = Attention::new().threads(Threads::Serial);
    let mut workspace = Workspace::new();
    let mut out = vec![0.0f32; keys * DIM];
    let [q_view, k_view, v_view] = [&q, &k, &v].map(|data| TensorRef::from_slice(data, shape));
    let (q_view, k_view, v_view) = (q_view?, k_view?, v_view?);
    let seconds = best(|| {
        let out = TensorMut::from_slice(&mut out, shape)?;
        attention.compute(q_view, (k_view, v_view), out, None, &mut workspace)
    })?;
    let tiled = Cost { seconds, bytes: workspace.bytes() };
    if !with_matrix {
        return Ok(Row { keys, tiled, matrix: None });
    }

    let mut scores = vec![0.0f32; keys * keys];
    let mut expected = vec![0.0f32; keys * DIM];
    let seconds = best(|| {
        all_scores(&q, &k, &v, &mut scores, &mut expected);
        Ok(())
    })?;
    let error = out.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    if error.is_nan() || error > 1e-5 {
        return Err(format!("at {keys} keys the results differ by {error}").into());
    }
    Ok(Row { keys, tiled, matrix: Some(Cost { seconds, bytes: size_of_val(&scores[..]) }) })
}

/// The textbook algorithm: scores of all queries, then softmax of all queries, then values.
fn all_scores(q: &[f32], k: &[f32], v: &[f32], scores: &mut [f32], out: &mut [f32]) {
    let keys = k.len() / DIM;
    for (row, query) in scores.chunks_exact_mut(keys).zip(q.chunks_exact(DIM)) {
        for (score, key) in row.iter_mut().zip(k.chunks_exact(DIM)) {
            *score = query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() / (DIM as f32).sqrt();
        }
    }
    for row in scores.chunks_exact_mut(keys) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|score| *score = (*score - max).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|prob| *prob /= sum);
    }
    out.fill(0.0);
    for (row, out) in scores.chunks_exact(keys).zip(out.chunks_exact_mut(DIM)) {
        for (prob, value) in row.iter().zip(v.chunks_exact(DIM)) {
            out.iter_mut().zip(value).for_each(|(out, v)| *out += prob * v);
        }
    }
}

/// The shortest time of at least two calls, and of further calls until 0.25 s have passed.
fn best(mut call: impl FnMut() -> Result<(), flashtile::Error>) -> Result<f64, flashtile::Error> {
    let (begin, mut calls, mut best) = (Instant::now(), 0, f64::INFINITY);
    while calls < 2 || begin.elapsed().as_secs_f64() < 0.25 {
        let start = Instant::now();
        call()?;
        best = best.min(start.elapsed().as_secs_f64());
        calls += 1;
    }
    Ok(best)
}

/// Two charts side by side, with logarithmic axes: operations per second and memory.
fn plot(path: &str, rows: &[Row], peak: f64) -> Result<(), Box<dyn Error>> {
    if let Some(folder) = std::path::Path::new(path).parent() {
        std::fs::create_dir_all(folder)?;
    }
    let root = SVGBackend::new(path, (1000, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(500);
    let tiled =
        |value: fn(&Row, Cost) -> f64| rows.iter().map(|row| (row.keys as f64, value(row, row.tiled))).collect();
    let matrix = |value: fn(&Row, Cost) -> f64| {
        rows.iter().filter_map(|row| Some((row.keys as f64, value(row, row.matrix?)))).collect()
    };
    let peak_line = rows.iter().map(|row| (row.keys as f64, peak / 1e9)).collect();
    let speed = |row: &Row, cost: Cost| row.flops() / cost.seconds / 1e9;
    let memory = |_: &Row, cost: Cost| cost.bytes as f64 / 1024.0;
    let series = [("tiled", tiled(speed)), ("all scores in a matrix", matrix(speed)), ("registers alone", peak_line)];
    panel(left, "GF/s against keys, one thread", 1.0..2.0 * peak / 1e9, &series, SeriesLabelPosition::MiddleRight)?;
    let series = [("tiled", tiled(memory)), ("all scores in a matrix", matrix(memory))];
    panel(right, "KiB beside the output, against keys", 16.0..8e6, &series, SeriesLabelPosition::UpperLeft)?;
    root.present()?;
    Ok(())
}

fn panel(
    area: DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    range: std::ops::Range<f64>,
    series: &[(&'static str, Vec<(f64, f64)>)],
    legend: SeriesLabelPosition,
) -> Result<(), Box<dyn Error>> {
    let keys = series[0].1.iter().fold(f64::INFINITY..0.0, |range, &(x, _)| range.start.min(x)..range.end.max(x));
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 17))
        .margin(18)
        .x_label_area_size(30)
        .y_label_area_size(56)
        .build_cartesian_2d(keys.log_scale().base(2.0), range.log_scale())?;
    let label = |x: &f64| format!("{x:.0}");
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT).x_labels(9).x_label_formatter(&label).y_label_formatter(&label).draw()?;
    for ((name, points), colour) in series.iter().zip([BLUE, RED, BLACK]) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().position(legend).border_style(BLACK).background_style(WHITE).draw()?;
    Ok(())
}
