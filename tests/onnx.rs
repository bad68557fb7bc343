//! Promise: ONNX's own node tests of Attention, Softmax and LogSoftmax pass through the public API.
//!
//! The vectors are in `tests/data/onnx`; its README describes the format. `ONNX_VECTORS=DIR` tests another directory of the same
//! format. Every case runs before the test fails. The last line is the count.

#[path = "onnx/attention.rs"]
mod attention;
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
const OPERATORS: [(&str, &str, Adapter); 3] = [
    ("attention", "Attention", attention::attention),
    ("softmax", "Softmax", softmax::softmax),
    ("logsoftmax", "LogSoftmax", softmax::log_softmax),
];

#[test]
fn onnx() {
    let ours = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/onnx");
    let directory = std::env::var_os("ONNX_VECTORS").map_or_else(ours, PathBuf::from);
    // The test runner may have written the start of a line.
    println!("\nvectors in {}", directory.display());
    let (mut files, mut passed, mut failed) = (0, 0, 0);
    for (file, operator, adapter) in OPERATORS {
        if !Vectors::exist(&directory, file) {
            println!("{operator}: no vectors");
            continue;
        }
        files += 1;
        let results =
            run_file(&directory, file, operator, adapter).unwrap_or_else(|e| vec![Err(format!("{file}: {e}"))]);
        let failures: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
        failures.iter().for_each(|failure| println!("FAILED {failure}"));
        println!("{operator}: {} of {} cases", results.len() - failures.len(), results.len());
        passed += results.len() - failures.len();
        failed += failures.len();
    }
    assert!(files > 0, "{} has the vectors of none of {:?}", directory.display(), OPERATORS.map(|(file, ..)| file));
    println!("onnx: {passed} passed, {failed} failed");
    assert_eq!(failed, 0, "cases failed; they are listed above");
}

/// For every case of a file, what is wrong with it.
fn run_file(
    directory: &Path,
    file: &str,
    operator: &str,
    adapter: Adapter,
) -> Result<Vec<std::result::Result<(), String>>> {
    let vectors = Vectors::read(directory, file, operator)?;
    let run = |case: &Case| {
        // A panic is a failure like another: the cases after it shall run.
        let result = std::panic::catch_unwind(|| run_case(&vectors, case, adapter));
        let result = result.unwrap_or_else(|_| Err("panicked, see above".into()));
        result.map_err(|e| format!("{}: {e}", case.name))
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
