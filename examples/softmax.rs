//! The output layer of a classifier: softmax of four logits, and common mistakes that it avoids.
//!
//! Run with `cargo run --release --example softmax`.

use flashtile::softmax::{
    Axis, RowState, cross_entropy, cross_entropy_gradient_into, logsumexp, softmax, softmax_into,
};
use std::error::Error;

fn show(title: &str, probs: &[f32]) {
    println!("{title}");
    for p in probs {
        println!("    {p:.4} {}", "█".repeat((p * 60.0).round() as usize));
    }
}

fn near(got: &[f32], expected: &[f32]) -> bool {
    got.iter().zip(expected).all(|(got, expected)| (got - expected).abs() < 5e-5)
}

fn main() -> Result<(), Box<dyn Error>> {
    let logits = [2.0f32, 4.0, 2.0, 1.0];
    let axis = Axis::row(logits.len());
    let mut probs = [0.0; 4];
    softmax_into(&logits, &mut probs, axis, 1.0)?;
    show("Logits 2, 4, 2, 1 become probabilities:", &probs);
    assert!(near(&probs, &[0.1025, 0.7573, 0.1025, 0.0377]));

    // Only differences matter. Logits divided by their sum, 9, give a much flatter softmax, and a scale of 9 reverses it.
    let normalised = logits.map(|x| x / 9.0);
    softmax_into(&normalised, &mut probs, axis, 1.0)?;
    show("\nThe same logits normalised to the sum 1 (.22, .44, .22, .11):", &probs);
    assert!(probs[1] < 0.31);
    softmax_into(&normalised, &mut probs, axis, 9.0)?;
    show("\n... and those with scale 9, which is the temperature 1/9:", &probs);
    assert!(near(&probs, &[0.1025, 0.7573, 0.1025, 0.0377]));

    println!("\nTwo classes are the sigmoid of the difference:");
    for difference in [-4.0f32, -1.0, 0.0, 1.0, 4.0] {
        let mut two = [difference, 0.0];
        softmax(&mut two, 1.0)?;
        let sigmoid = 1.0 / (1.0 + (-difference).exp());
        println!("    {difference:>4}: {:.6} {sigmoid:.6}", two[0]);
        assert!((two[0] - sigmoid).abs() < 1e-6);
    }

    let large = [1000.0f32, 1001.0, 1002.0];
    let naive = large.map(|x| x.exp() / large.iter().map(|x| x.exp()).sum::<f32>());
    let mut stable = large;
    softmax(&mut stable, 1.0)?;
    println!("\nLogits 1000, 1001, 1002: exp(x) / sum gives {naive:?}, softmax {stable:.4?}");
    assert!(naive.iter().all(|p| p.is_nan()) && near(&stable, &[0.0900, 0.2447, 0.6652]));

    println!("\nGradient of the loss if class 0 is right, and by finite differences in f64:");
    for logits in [[2.0f64, 4.0, 2.0, 1.0], [40.0, 4.0, 2.0, 1.0]] {
        let mut gradient = [0.0; 4];
        cross_entropy_gradient_into(&logits, &[0], 4, &[1.0], &mut gradient)?;
        for (class, got) in gradient.into_iter().enumerate() {
            let at = |step: f64| {
                let mut moved = logits;
                moved[class] += step;
                cross_entropy(&moved, &[0], 4)
            };
            let difference = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            println!("    logit {:>2}: {got:>10.6} {difference:>10.6}", logits[class]);
            assert!((got - difference).abs() < 1e-8);
        }
        println!("    {}", if logits[0] > 10.0 { "saturated: nothing left to learn from" } else { "" });
    }

    let mut hidden = [2.0, f32::NEG_INFINITY, 2.0, 1.0];
    softmax(&mut hidden, 1.0)?;
    println!("\nA class hidden by -inf costs nothing: {hidden:.4?}");
    let mut visible = [2.0, 2.0, 1.0];
    softmax(&mut visible, 1.0)?;
    assert_eq!(hidden[1], 0.0);
    assert!(near(&[hidden[0], hidden[2], hidden[3]], &visible));

    // Online softmax: the states of two pieces merge into the normaliser of the row.
    let (mut left, mut right) = (RowState::default(), RowState::default());
    left.fold(&logits[..1]);
    right.fold(&logits[1..]);
    let row = left.merge(right);
    println!("\nIn two pieces: {left:?}\n        merged with {right:?}\n        gives logsumexp {}", row.log_sum_exp());
    assert!((row.log_sum_exp() - logsumexp(&logits, 1.0)?).abs() < 1e-6);
    Ok(())
}
