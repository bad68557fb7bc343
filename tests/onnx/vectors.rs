//! The files: cases from JSON, tensors from safetensors, and how to compare them.

use crate::Result;
use flashtile::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::fs;
use std::path::Path;

#[derive(Debug, Deserialize)]
struct Manifest {
    operator: String,
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// Absent for preview operators, which have none yet.
    #[serde(default)]
    pub(crate) opset: u32,
    pub(crate) attributes: serde_json::Value,
    pub(crate) inputs: Vec<Option<Entry>>,
    pub(crate) outputs: Vec<Option<Entry>>,
    pub(crate) rtol: f64,
    pub(crate) atol: f64,
}

/// An input or output of a case.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub(crate) name: String,
    tensor: String,
    dtype: String,
    shape: Vec<usize>,
}

/// The cases of one operator and the bytes of their tensors.
pub(crate) struct Vectors {
    manifest: Manifest,
    bytes: Vec<u8>,
}

impl Vectors {
    /// Whether a directory has either file of this name.
    pub(crate) fn exist(directory: &Path, file: &str) -> bool {
        ["json", "safetensors"].iter().any(|extension| directory.join(file).with_extension(extension).exists())
    }

    pub(crate) fn read(directory: &Path, file: &str, operator: &str) -> Result<Self> {
        let read = |extension| {
            let path = directory.join(file).with_extension(extension);
            fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))
        };
        let manifest: Manifest = serde_json::from_slice(&read("json")?)?;
        if manifest.operator != operator {
            return Err(format!("the operator is {} but must be {operator}", manifest.operator).into());
        }
        if manifest.cases.is_empty() {
            return Err("there are no cases".into());
        }
        Ok(Self { manifest, bytes: read("safetensors")? })
    }

    pub(crate) fn cases(&self) -> &[Case] {
        &self.manifest.cases
    }

    /// The tensors of these entries, checked to be what the entries say.
    pub(crate) fn tensors(&self, entries: &[Option<Entry>]) -> Result<Vec<Option<Tensor>>> {
        let file = SafeTensors::deserialize(&self.bytes)?;
        let read = |entry: &Entry| {
            let view = file.tensor(&entry.tensor)?;
            let (dtype, shape) = (view.dtype().to_string(), view.shape());
            if (&dtype, shape) != (&entry.dtype, &entry.shape) {
                let Entry { name, dtype: listed_dtype, shape: listed, .. } = entry;
                return Err(
                    format!("{name} is listed as {listed_dtype}{listed:?} but stored as {dtype}{shape:?}").into()
                );
            }
            let values =
                Values::from_le_bytes(view.dtype(), view.data()).map_err(|e| format!("{}: {e}", entry.name))?;
            Ok(Tensor { shape: shape.to_vec(), values })
        };
        entries.iter().map(|entry| entry.as_ref().map(read).transpose()).collect()
    }
}

/// An output that was computed.
pub(crate) struct Computed {
    /// Its number in the operator's order.
    pub(crate) output: usize,
    /// The way it was computed where there are several, in brackets.
    pub(crate) how: String,
    pub(crate) tensor: Tensor,
}

/// A dense tensor of any rank and type.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Values,
}

#[derive(Debug)]
pub(crate) enum Values {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Bool(Vec<bool>),
    I64(Vec<i64>),
}

/// A type of [`Values`].
pub(crate) trait Stored: Copy {
    fn values(values: Vec<Self>) -> Values;
    fn slice(values: &Values) -> Option<&[Self]>;
}

macro_rules! stored {
    ($($t:ty, $variant:ident);+) => {$(
        impl Stored for $t {
            fn values(values: Vec<Self>) -> Values {
                Values::$variant(values)
            }
            fn slice(values: &Values) -> Option<&[Self]> {
                if let Values::$variant(values) = values { Some(values) } else { None }
            }
        }
    )+};
}
stored!(f64, F64; f32, F32; f16, F16; bf16, Bf16; bool, Bool; i64, I64);

impl Values {
    fn from_le_bytes(dtype: Dtype, bytes: &[u8]) -> Result<Self> {
        fn elements<T, const N: usize>(bytes: &[u8], element: fn([u8; N]) -> T) -> Vec<T> {
            bytes.as_chunks().0.iter().copied().map(element).collect()
        }
        Ok(match dtype {
            Dtype::F64 => Values::F64(elements(bytes, f64::from_le_bytes)),
            Dtype::F32 => Values::F32(elements(bytes, f32::from_le_bytes)),
            Dtype::F16 => Values::F16(elements(bytes, f16::from_le_bytes)),
            Dtype::BF16 => Values::Bf16(elements(bytes, bf16::from_le_bytes)),
            Dtype::BOOL => Values::Bool(elements(bytes, |[byte]| byte != 0)),
            Dtype::I64 => Values::I64(elements(bytes, i64::from_le_bytes)),
            other => return Err(format!("elements of type {other} are not supported").into()),
        })
    }

    pub(crate) fn dtype(&self) -> Dtype {
        match self {
            Values::F64(_) => Dtype::F64,
            Values::F32(_) => Dtype::F32,
            Values::F16(_) => Dtype::F16,
            Values::Bf16(_) => Dtype::BF16,
            Values::Bool(_) => Dtype::BOOL,
            Values::I64(_) => Dtype::I64,
        }
    }

    /// All elements as f64, exactly (integers below 2^53).
    fn to_f64(&self) -> Vec<f64> {
        match self {
            Values::F64(values) => values.clone(),
            Values::F32(values) => values.iter().copied().map(f64::from).collect(),
            Values::F16(values) => values.iter().copied().map(f64::from).collect(),
            Values::Bf16(values) => values.iter().copied().map(f64::from).collect(),
            Values::Bool(values) => values.iter().copied().map(f64::from).collect(),
            Values::I64(values) => values.iter().map(|&value| value as f64).collect(),
        }
    }
}

impl Tensor {
    pub(crate) fn new<T: Stored>(shape: &[usize], values: Vec<T>) -> Self {
        Self { shape: shape.to_vec(), values: T::values(values) }
    }

    /// The elements, if they have this type.
    pub(crate) fn elements<T: Stored>(&self, name: &str) -> Result<&[T]> {
        let of_other_type =
            || format!("elements of {name} have type {}, which is not handled here", self.values.dtype());
        Ok(T::slice(&self.values).ok_or_else(of_other_type)?)
    }

    /// How this differs from what is expected, beyond the tolerance: the first place, and in how many.
    pub(crate) fn difference(&self, expected: &Tensor, rtol: f64, atol: f64) -> Option<String> {
        let what = |tensor: &Tensor| (tensor.values.dtype(), tensor.shape.clone());
        if what(self) != what(expected) {
            return Some(format!(" is {:?} but should be {:?}", what(self), what(expected)));
        }
        let (got, expected) = (self.values.to_f64(), expected.values.to_f64());
        let steps = if self.values.dtype() == Dtype::BF16 { BF16_STEPS } else { 0.0 };
        let tolerance = |expected: f64| (atol + rtol * expected.abs()).max(steps * bf16_step(expected));
        let wrong: Vec<_> = (0..got.len()).filter(|&n| !close(got[n], expected[n], tolerance(expected[n]))).collect();
        let &first = wrong.first()?;
        let index = self.index(first);
        let more = if wrong.len() > 1 { format!(" (and {} more)", wrong.len() - 1) } else { String::new() };
        Some(format!("{index:?}: expected {}, got {}{more}", expected[first], got[first]))
    }

    /// The index of the element at `position`, row by row.
    fn index(&self, mut position: usize) -> Vec<usize> {
        let mut index = vec![0; self.shape.len()];
        for (i, size) in index.iter_mut().zip(&self.shape).rev() {
            (*i, position) = (position % size, position / size);
        }
        index
    }
}

/// How many steps of its type a bf16 output may be off, where that is more than the tolerance of the case.
///
/// A step is 2^-8 to 2^-7 of a number, above every rtol of ONNX's tests, which would ask for equal bits. But ONNX computed
/// what is expected with bf16 arithmetic, every score, exponential and probability rounded to 8 bits; one element in four
/// is a step away from the exact result, and a few are two.
const BF16_STEPS: f64 = 2.0;

/// From `x` to the next larger number in bf16.
fn bf16_step(x: f64) -> f64 {
    (x.abs().log2().floor() - 7.0).exp2()
}

/// Equal (infinities and NaNs too), or within the tolerance.
fn close(got: f64, expected: f64, tolerance: f64) -> bool {
    let both_nan = got.is_nan() && expected.is_nan();
    let within = expected.is_finite() && (got - expected).abs() <= tolerance;
    both_nan || got == expected || within
}
