//! Real attention, checked, timed and drawn: `cargo run --release --example quickstart`.
//!
//! The tensors are q, k and v of one attention group of a small language model that reads the opening of *A Tale of Two Cities*.
//! README.md in this folder says how they were captured.

use flashtile::{Attention, Element, ScoreStage, Threads, f16, reference};
use ndarray::{Array4, ArrayView1, ArrayView2, ArrayView4, Axis, s};
use safetensors::SafeTensors;
use std::error::Error;
use std::time::{Duration, Instant};

static ACTIVATIONS: &[u8] = include_bytes!("activations.safetensors");

fn main() -> Result<(), Box<dyn Error>> {
    let file = SafeTensors::deserialize(ACTIVATIONS)?;
    let (q, k, v) = (load(&file, "q")?, load(&file, "k")?, load(&file, "v")?);
    let tokens = load_tokens()?;
    println!("SmolLM2-135M reads the first {} tokens of \"A Tale of Two Cities\"; this is layer 17.", tokens.len());
    println!("q {:?} f16: {} query heads, which share", q.shape(), q.shape()[1]);
    println!("k {:?} f16: {} head of keys and\nv {:?} f16: values\n", k.shape(), k.shape()[1], v.shape());

    // The default scale is 1 / sqrt(64). `run` would return f16, the type of the queries. The output is f32 here, because an f16
    // output would hide the error.
    let attention = Attention::new().causal();
    println!("plan  {}\n", attention.plan(&q, (&k, &v))?.to_string().replace(": ", ":\n      "));
    let mut out = Array4::<f32>::zeros(q.raw_dim());
    attention.run_into(&q, &k, &v, &mut out)?;

    compare(&attention, &q, &k, &v, &out)?;
    let head = 2;
    let probabilities = attention.scores(ScoreStage::Probabilities, &q, &k)?;
    let right = draw(&tokens, probabilities.slice(s![0, head, .., ..]), 7..32);

    if right < 0.8 {
        return Err(format!("only {:.0}% of the repeated tokens look where they should", 100.0 * right).into());
    }
    Ok(())
}

fn load(file: &SafeTensors<'_>, name: &str) -> Result<Array4<f16>, Box<dyn Error>> {
    let tensor = file.tensor(name)?;
    let shape: [usize; 4] = tensor.shape().try_into()?;
    let elements = tensor.data().chunks_exact(2).map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]])).collect();
    Ok(Array4::from_shape_vec(shape, elements)?)
}

fn load_tokens() -> Result<Vec<String>, Box<dyn Error>> {
    let (_, header) = SafeTensors::read_metadata(ACTIVATIONS)?;
    let metadata = header.metadata().as_ref().ok_or("the file has no metadata")?;
    Ok(serde_json::from_str(metadata.get("tokens").ok_or("the file does not name its tokens")?)?)
}

/// Prints time and error of the same attention computed in several ways. Fails if the error of `out` is more than twice that
/// of plain f32 loops.
fn compare(
    attention: &Attention<'_>,
    q: &Array4<f16>,
    k: &Array4<f16>,
    v: &Array4<f16>,
    out: &Array4<f32>,
) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let definition = reference::attention(attention, q, (k, v))?.out;
    let definition_time = start.elapsed();
    let largest = definition.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    let error = |out: &Array4<f32>| {
        let errors = out.iter().zip(&definition).map(|(&got, &expected)| (got as f64 - expected).abs());
        errors.fold(0.0, f64::max)
    };
    let [wide_q, wide_k, wide_v] = [q, k, v].map(|half| half.mapv(Element::to_f32));
    let plain = || plain_loops(wide_q.view(), wide_k.view(), wide_v.view());
    let plain_time = best_time(|| drop(plain()));

    let serial = attention.clone().threads(Threads::Serial);
    let mut tiled = out.clone();
    let serial_time = best_time(|| serial.run_into(q, k, v, &mut tiled).expect("it ran before"));
    let pool_time = best_time(|| attention.run_into(q, k, v, &mut tiled).expect("it ran before"));

    let line = |name: &str, time: Duration, error: f64| {
        let speed = plain_time.as_secs_f64() / time.as_secs_f64();
        let error = if error == 0.0 { "none".into() } else { format!("{error:.1e}") };
        println!("{name:<36} {:>10.2} ms {speed:>9.3}x {error:>12}", time.as_secs_f64() * 1e3);
    };
    println!("{:<36} {:>13} {:>10} {:>12}  (outputs up to {largest:.1})", "", "time", "speed", "error");
    line("the definition, pair by pair, f64", definition_time, 0.0);
    line("plain loops, row by row, f32", plain_time, error(&plain()));
    line("flashtile, one thread", serial_time, error(&tiled));
    line(&format!("flashtile, rayon pool of {}", rayon::current_num_threads()), pool_time, error(out));
    println!();
    let worst = error(out).max(error(&tiled));
    if worst > 2.0 * error(&plain()) {
        return Err(format!("the largest error is {worst:e}").into());
    }
    Ok(())
}

/// The simplest causal attention: one thread, one row of scores at a time.
fn plain_loops(q: ArrayView4<'_, f32>, k: ArrayView4<'_, f32>, v: ArrayView4<'_, f32>) -> Array4<f32> {
    let (keys, values) = (k.slice(s![0, 0, .., ..]), v.slice(s![0, 0, .., ..]));
    let scale = (keys.ncols() as f32).sqrt().recip();
    let mut out = Array4::zeros(q.raw_dim());
    for h in 0..q.shape()[1] {
        for i in 0..q.shape()[2] {
            let query: ArrayView1<'_, f32> = q.slice(s![0, h, i, ..]);
            let mut out = out.slice_mut(s![0, h, i, ..]);
            let mut row: Vec<f32> = (0..=i).map(|j| scale * query.dot(&keys.row(j))).collect();
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter_mut().for_each(|score| *score = (*score - max).exp());
            let sum: f32 = row.iter().sum();
            for (prob, value) in row.iter().zip(values.axis_iter(Axis(0))) {
                out.scaled_add(prob / sum, &value);
            }
        }
    }
    out
}

/// The shortest time of 20 calls, after a warm-up call.
fn best_time(mut call: impl FnMut()) -> Duration {
    call();
    let time = |()| {
        let start = Instant::now();
        call();
        start.elapsed()
    };
    std::iter::repeat_n((), 20).map(time).min().unwrap_or_default()
}

/// Draws the probabilities of `queries`. Returns the fraction of repeated tokens whose largest probability is one past their
/// last occurrence.
fn draw(tokens: &[String], probabilities: ArrayView2<'_, f32>, queries: std::ops::Range<usize>) -> f64 {
    const SHADES: [&str; 5] = ["  ", "░░", "▒▒", "▓▓", "██"];
    let labels: Vec<&str> = tokens[..queries.end].iter().map(|token| token.trim()).collect();
    println!("What head 2 looks at: queries downwards, keys to the right, darker for more (by the square root).\n");
    for letter in 0..labels.iter().map(|label| label.chars().count()).max().unwrap_or(0) {
        let column = labels.iter().map(|label| label.chars().nth(letter).unwrap_or(' '));
        println!("{:>12}{}", "", column.map(|c| format!("{c} ")).collect::<String>().trim_end());
    }
    let (mut repeated, mut right) = (0, 0);
    for i in queries {
        let row = probabilities.slice(s![i, ..=i]);
        let shade = |&p: &f32| SHADES[(p.sqrt() * SHADES.len() as f32).min(SHADES.len() as f32 - 1.0) as usize];
        let picture: String = row.iter().map(shade).collect();
        let (best, p) = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap_or((0, &0.0));
        println!("{i:>2} {:>8} {picture:<width$} {:<6} {p:.2}", labels[i], labels[best], width = 2 * labels.len());
        if let Some(last) = labels[..i].iter().rposition(|label| *label == labels[i]) {
            repeated += 1;
            right += usize::from(best == last + 1);
        }
    }
    println!("\nAn induction head: a token that stood before looks at what came after it then, so each");
    println!("repetition of \"it was the\" is a diagonal, one step right of the words it repeats. A new word finds");
    println!(
        "nothing and rests on the first token. {right} of {repeated} repeated tokens look just past their last occurrence."
    );
    right as f64 / repeated as f64
}
