//! Promise: ONNX's own node tests of Attention, FlexAttention, RotaryEmbedding, Softmax, LogSoftmax and SoftmaxCrossEntropyLoss pass
//! through the public API, but for two that this crate does not support.
//!
//! The vectors are in `tests/data/onnx`; its README describes the format. `ONNX_VECTORS=DIR` tests another directory of the same
//! format. Every case runs before the test fails. The last line is the count.

#[path = "onnx/attention.rs"]
mod attention;
#[path = "onnx/cross_entropy.rs"]
mod cross_entropy;
#[path = "onnx/flexattention.rs"]
mod flexattention;
#[path = "onnx/rotary.rs"]
mod rotary;
#[path = "onnx/softmax.rs"]
mod softmax;
#[path = "onnx/vectors.rs"]
mod vectors;

use std::path::{Path, PathBuf};
use vectors::{Case, Computed, Tensor, Vectors};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Computes the outputs of a case, each perhaps in several ways, from its inputs in the operator's order.
type Adapter = fn(&Case, &[Option<Tensor>]) -> Result<Vec<Computed>>;

/// The name of the files, of the operator, and what runs it.
const OPERATORS: [(&str, &str, Adapter); 6] = [
    ("attention", "Attention", attention::attention),
    ("flexattention", "FlexAttention", flexattention::flex_attention),
    ("rotaryembedding", "RotaryEmbedding", rotary::rotary_embedding),
    ("softmax", "Softmax", softmax::softmax),
    ("logsoftmax", "LogSoftmax", softmax::log_softmax),
    ("softmaxcrossentropyloss", "SoftmaxCrossEntropyLoss", cross_entropy::softmax_cross_entropy_loss),
];

/// A case that this crate does not support, and why. It neither passes nor fails.
#[derive(Debug)]
struct Unsupported(&'static str);

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Unsupported {}

/// The cases of ONNX that are not supported; no others may be.
const UNSUPPORTED: [&str; 2] = ["test_flexattention_double", "test_flexattention_prob_mod"];

/// What became of a case.
enum Outcome {
    Passed,
    Unsupported(String),
    Failed(String),
}

#[test]
fn onnx() {
    let ours = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/onnx");
    let directory = std::env::var_os("ONNX_VECTORS").map_or_else(ours, PathBuf::from);
    // The test runner may have written the start of a line.
    println!("\nvectors in {}", directory.display());
    let (mut files, mut passed, mut unsupported, mut failed) = (0, 0, 0, 0);
    for (file, operator, adapter) in OPERATORS {
        if !Vectors::exist(&directory, file) {
            println!("{operator}: no vectors");
            continue;
        }
        files += 1;
        let outcomes = run_file(&directory, file, operator, adapter)
            .unwrap_or_else(|error| vec![Outcome::Failed(format!("{file}: {error}"))]);
        let before = passed;
        for outcome in &outcomes {
            match outcome {
                Outcome::Passed => passed += 1,
                Outcome::Unsupported(why) => {
                    println!("not supported: {why}");
                    unsupported += 1;
                }
                Outcome::Failed(why) => {
                    println!("FAILED {why}");
                    failed += 1;
                }
            }
        }
        println!("{operator}: {} of {} cases", passed - before, outcomes.len());
    }
    assert!(files > 0, "{} has the vectors of none of {:?}", directory.display(), OPERATORS.map(|(file, ..)| file));
    println!("onnx: {passed} passed, {unsupported} not supported, {failed} failed");
    assert_eq!(failed, 0, "cases failed; they are listed above");
}

/// What became of every case of a file.
fn run_file(directory: &Path, file: &str, operator: &str, adapter: Adapter) -> Result<Vec<Outcome>> {
    let vectors = Vectors::read(directory, file, operator)?;
    let run = |case: &Case| {
        // A panic is a failure like another: the cases after it shall run.
        let result = std::panic::catch_unwind(|| run_case(&vectors, case, adapter));
        match result.unwrap_or_else(|_| Err("panicked, see above".into())) {
            Ok(()) => Outcome::Passed,
            Err(why) if why.is::<Unsupported>() && UNSUPPORTED.contains(&&*case.name) => {
                Outcome::Unsupported(format!("{}: {why}", case.name))
            }
            Err(why) => Outcome::Failed(format!("{}: {why}", case.name)),
        }
    };
    Ok(vectors.cases().iter().map(run).collect())
}

fn run_case(vectors: &Vectors, case: &Case, adapter: Adapter) -> Result<()> {
    let inputs = vectors.tensors(&case.inputs)?;
    let expected = vectors.tensors(&case.outputs)?;
    let computed = adapter(case, &inputs)?;
    let mut wrong = Vec::new();
    for (n, (output, expected)) in case.outputs.iter().zip(&expected).enumerate() {
        let (Some(output), Some(expected)) = (output, expected) else { continue };
        let ways: Vec<_> = computed.iter().filter(|computed| computed.output == n).collect();
        if ways.is_empty() {
            wrong.push(format!("output {} (number {n}) is not one that the operator has", output.name));
        }
        for way in ways {
            let difference = way.tensor.difference(expected, case.rtol, case.atol);
            wrong.extend(difference.map(|difference| format!("{}{}{difference}", output.name, way.how)));
        }
    }
    if expected.iter().flatten().next().is_none() {
        wrong.push("no output is expected, so nothing was tested".into());
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n    and ").into()) }
}
