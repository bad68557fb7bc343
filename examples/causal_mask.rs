//! Which keys a query sees: every kind of mask as a 0/1 matrix, checked against the reference, and the time that masks save.
//!
//! `cargo run --release --example causal_mask`

use flashtile::{Attention, QueryOffset, ScoreStage, Threads, Workspace, reference};
use ndarray::{Array1, Array2, Array4, s};
use std::error::Error;
use std::time::Instant;

/// Numbers in -1..1 with a long period: the fractional parts of multiples of an irrational number.
fn numbers(shape: [usize; 4], step: f64) -> Array4<f32> {
    let mut n = 0.0;
    Array4::from_shape_simple_fn(shape, || {
        n += step;
        (n % 1.0) as f32 * 2.0 - 1.0
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("Rows are queries, columns are keys; 1 where the query sees the key.");
    let causal = Attention::new().causal();
    let both = |left, right| Attention::new().window(Some(left), Some(right));

    // Query i has the key position offset + i, and sees the keys up to that position. The query offsets below differ.
    show("As many queries as keys: all agree", [5, 5], &[("causal", causal.clone())])?;
    let offsets = [
        ("FromEnd, the default", causal.clone()),
        ("FromStart", causal.clone().query_offset(QueryOffset::FromStart)),
        ("At(1)", causal.clone().query_offset(QueryOffset::At(1))),
        ("At(-1)", causal.clone().query_offset(QueryOffset::At(-1))),
    ];
    show("More keys than queries, as with a cache: FromEnd shows the last query every key", [3, 6], &offsets)?;
    show("More queries than keys: some see nothing, and get 0", [5, 3], &offsets)?;

    show(
        "Windows, around the query's own position",
        [6, 6],
        &[
            ("window 2 left", Attention::new().window(Some(2), None)),
            ("window 1 right", Attention::new().window(None, Some(1))),
            ("2 left, 1 right", both(2, 1)),
            ("causal, 2 left", causal.clone().window(Some(2), None)),
        ],
    )?;

    let lengths = [4, 2];
    show(
        "Key lengths 4 and 2 in a batch of two: with FromEnd, each batch's last query stands at its last key",
        [3, 5],
        &[
            ("lengths", Attention::new().key_lengths(&lengths)),
            ("causal and lengths", causal.clone().key_lengths(&lengths)),
            ("and FromStart", causal.clone().key_lengths(&lengths).query_offset(QueryOffset::FromStart)),
            (
                "and PerBatch([1, 0])",
                causal.clone().key_lengths(&lengths).query_offset(QueryOffset::per_batch(&[1, 0])),
            ),
        ],
    )?;

    // A boolean tensor (true = attend) or a bias with -inf describes any pattern. All masks intersect.
    let document = [0, 0, 0, 1, 1, 2, 2];
    let same_document = Array2::from_shape_fn((7, 7), |(i, j)| document[i] == document[j]);
    let prefix = Array2::from_shape_fn((7, 7), |(i, j)| j < 3 || j <= i);
    let no_odd = Array2::from_shape_fn((1, 7), |(_, j)| if j % 2 == 1 { f32::NEG_INFINITY } else { 0.5 });
    show(
        "Tensors, of any shape that broadcasts",
        [7, 7],
        &[
            ("documents of 3, 2, 2", Attention::new().mask(&same_document)),
            ("and causal", causal.clone().mask(&same_document)),
            ("prefix of 3", Attention::new().mask(&prefix)),
            ("causal, bias -inf", causal.clone().bias(&no_odd)),
        ],
    )?;

    println!("\nHidden tiles are skipped, though a tensor must be read to know them (head_dim 64, one thread):\n");
    println!("{:<46} {:>9} {:>10} {:>10}", "", "time", "of full's", "pairs");
    race(4096, &[("causal", causal.clone()), ("causal, window of 512", causal.clone().window(Some(511), None))])?;
    race(8192, &[("causal, window of 512", causal.clone().window(Some(511), None))])?;
    let documents = Array2::from_shape_fn((4096, 4096), |(i, j)| i / 512 == j / 512);
    race(4096, &[("documents of 512, a boolean tensor", Attention::new().mask(&documents))])?;
    Ok(())
}

/// Prints which of `[queries, keys]` each attention shows, and checks matrices and results against the reference.
fn show(title: &str, [queries, keys]: [usize; 2], cases: &[(&str, Attention<'_>)]) -> Result<(), Box<dyn Error>> {
    let batch = if title.contains("batch of two") { 2 } else { 1 };
    let (q, kv) = (numbers([batch, 1, queries, 8], 0.618_033_988_749), numbers([batch, 1, keys, 8], 0.414_213_562_373));
    let mut lines = vec![String::new(); batch * (queries + 1)];
    for (name, attention) in cases {
        let scores = attention.scores(ScoreStage::Biased, &q, &kv)?;
        let visible = scores.mapv(|score| score != f32::NEG_INFINITY);
        let expected = reference::scores(attention, ScoreStage::Biased, &q, &kv)?;
        if visible.iter().zip(&expected).any(|(&visible, &score)| visible != (score != f64::NEG_INFINITY)) {
            return Err(format!("{name}: the picture is not that of the definition").into());
        }
        let (out, expected) = (attention.run(&q, &kv, &kv)?, reference::attention(attention, &q, (&kv, &kv))?.out);
        if !out.iter().zip(&expected).all(|(&out, &expected)| (out as f64 - expected).abs() < 1e-6) {
            return Err(format!("{name}: the result is not that of the definition").into());
        }
        let rows =
            visible.rows().into_iter().map(|row| row.iter().map(|&sees| if sees { "1 " } else { "0 " }).collect());
        for (n, row) in rows.collect::<Vec<String>>().into_iter().enumerate() {
            lines[n + n / queries + 1] += &format!("   {row:<22}");
        }
        lines[0] += &format!("   {name:<22}");
    }
    println!("\n{title}\n\n{}", lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n"));
    Ok(())
}

/// Times each attention over `n` queries and keys against attention without a mask.
fn race(n: usize, cases: &[(&str, Attention<'_>)]) -> Result<(), Box<dyn Error>> {
    let [q, k, v] = [0.618_033_988_749, 0.414_213_562_373, 0.732_050_807_568].map(|step| numbers([1, 1, n, 64], step));
    let entries: Vec<_> = [("full", Attention::new())].iter().chain(cases).cloned().collect();
    let mut times = vec![f64::INFINITY; entries.len()];
    let (mut out, mut workspace) = (Array4::<f32>::zeros(q.raw_dim()), Workspace::new());
    for _round in 0..4 {
        // In turns, so that a slow moment of the machine affects all entries.
        for ((_, attention), time) in entries.iter().zip(&mut times) {
            let start = Instant::now();
            attention.clone().threads(Threads::Serial).compute(&q, (&k, &v), &mut out, None, &mut workspace)?;
            *time = time.min(start.elapsed().as_secs_f64());
        }
    }
    for ((name, attention), time) in entries.iter().zip(&times) {
        let probabilities = attention.scores(ScoreStage::Probabilities, &q, &k)?;
        let (probabilities, values) = (probabilities.slice(s![0, 0, .., ..]), v.slice(s![0, 0, .., ..]));
        attention.run_into(&q, &k, &v, &mut out)?;
        for i in [0, n / 3, n - 1] {
            let difference: Array1<f32> = probabilities.row(i).dot(&values) - out.slice(s![0, 0, i, ..]);
            if !difference.iter().all(|x| x.abs() < 1e-5) {
                return Err(format!("{name}: query {i} of {n} is not its values by their weights").into());
            }
        }
        let pairs = probabilities.iter().filter(|&&p| p > 0.0).count();
        let (of_time, of_pairs) = (100.0 * time / times[0], 100.0 * pairs as f64 / (n * n) as f64);
        println!("{:<46} {:6.1} ms {of_time:9.1}% {of_pairs:9.1}%", format!("{n} x {n}, {name}"), 1e3 * time);
    }
    println!();
    Ok(())
}
