//! A line of the table: its data, the check of its answer, and what is timed.

use crate::contest::{Contest, Repeat, Work, on_parts, stream};
use crate::support::{Case, Dims, Rng, plan};
use crate::workloads::{Options, SOFTCAP, SoftmaxTask, Task, Way, Workload};
use crate::{key_sums, serving};
use flashtile::softmax::{Axis, CrossEntropy, Number, Softmax, softmax_axis_in_place, softmax_in_place, softmax_into};
use flashtile::{AlibiSlopes, Attention, DType, Element, TensorMut, TensorRef, Threads, alibi_slope, bf16, f16};
use ndarray::Array2;
use std::cell::RefCell;
use std::error::Error;
use std::hint::black_box;
use std::rc::Rc;
use std::sync::LazyLock;

pub(crate) struct Line<'a> {
    pub(crate) workload: &'static Workload,
    pub(crate) dtype: DType,
    pub(crate) threads: usize,
    pub(crate) work: Work,
    pub(crate) plan: String,
    pub(crate) contest: Contest<'a>,
    /// The same on one thread, where it is to be compared.
    pub(crate) serial: Option<Contest<'a>>,
}

impl Line<'_> {
    pub(crate) fn new(workload: &'static Workload, dtype: DType, threads: usize) -> Result<Self, Box<dyn Error>> {
        match (workload.task, dtype) {
            (Task::Attention(dims, options), DType::F32) => attention::<f32>(workload, dims, options, threads),
            (Task::Attention(dims, options), DType::F16) => attention::<f16>(workload, dims, options, threads),
            (Task::Attention(dims, options), DType::Bf16) => attention::<bf16>(workload, dims, options, threads),
            (Task::KeySums(dims, causal), DType::F32) => key_sums::line::<f32>(workload, dims, causal, threads),
            (Task::KeySums(dims, causal), DType::F16) => key_sums::line::<f16>(workload, dims, causal, threads),
            (Task::KeySums(dims, causal), DType::Bf16) => key_sums::line::<bf16>(workload, dims, causal, threads),
            (Task::Serving(task), DType::F32) => serving::line::<f32>(workload, task, threads),
            (Task::Serving(task), DType::F16) => serving::line::<f16>(workload, task, threads),
            (Task::Serving(task), DType::Bf16) => serving::line::<bf16>(workload, task, threads),
            (Task::Softmax(task @ SoftmaxTask { double: true, .. }), _) => {
                softmax::<f64>(workload, task, dtype, threads)
            }
            (Task::Softmax(task), DType::F32) => softmax::<f32>(workload, task, dtype, threads),
            (Task::Softmax(task), DType::F16) => softmax::<f16>(workload, task, dtype, threads),
            (Task::Softmax(task), DType::Bf16) => softmax::<bf16>(workload, task, dtype, threads),
            (_, dtype) => Err(format!("{}: no {dtype} here", workload.name).into()),
        }
    }

    pub(crate) fn round(&mut self) -> Result<(), flashtile::Error> {
        self.contest.round()?;
        self.serial.as_mut().map_or(Ok(()), Contest::round)
    }
}

/// The problem of a workload, whose answer has been checked.
pub(crate) fn checked_case<T: Element>(
    dims: Dims,
    options: Options,
    threads: Threads,
) -> Result<Case<T>, Box<dyn Error>> {
    let attention = options.attention(&dims)?.threads(threads);
    let mut case = Case::new(dims, attention.clone());
    if let Options::In(layout) = options {
        case = case.in_layout(layout);
    }
    if let Options::Denormals(every) = options {
        for row in case.inputs.q.chunks_exact_mut(dims.head_dim).step_by(every) {
            row[0] = T::from_f32(1e-40);
        }
    }
    case.checked_by(|h, i| options.of_row(&dims, h, i).unwrap_or_else(|| attention.clone()))
}

fn attention<'a, T: Element>(
    workload: &'static Workload,
    dims: Dims,
    options: Options,
    threads: usize,
) -> Result<Line<'a>, Box<dyn Error>> {
    let use_of_threads = if threads == 1 { Threads::Serial } else { Threads::Pool };
    let plan = plan::<T>(dims, &options.attention(&dims)?.threads(use_of_threads))?.to_string();
    let case = checked_case::<T>(dims, options, use_of_threads)?;
    let work = Work {
        flops: dims.flops(options.pairs(&dims)),
        bytes: (dims.kv_elements() + dims.query_elements()) * size_of::<T>() + options.bytes(),
    };
    let (case, stream) = (Rc::new(RefCell::new(case)), stream(work));
    let contest = |threads: usize, run: fn(&mut Case<T>) -> Result<(), flashtile::Error>| {
        let case = case.clone();
        let repeat: Repeat<'a> = Box::new(move |repeats| (0..repeats).try_for_each(|_| run(&mut case.borrow_mut())));
        Contest::with_machine(repeat, threads, work, stream.clone())
    };
    let serial = if threads > 1 && workload.scales() { Some(contest(1, Case::run_serially)?) } else { None };
    // The workload names the dimensions already.
    let plan = plan.split_once(": ").map_or(plan.clone(), |(_, plan)| plan.to_string());
    Ok(Line { workload, dtype: T::DTYPE, threads, work, plan, contest: contest(threads, Case::run)?, serial })
}

/// For the dimensions of the workloads that use them: `[seq_q, seq_kv]`, `[heads_q, seq_q, seq_kv]` and `[heads_q]`.
static MASK: LazyLock<Vec<bool>> = LazyLock::new(|| {
    let mut rng = Rng(5);
    (0..2048 * 2048).map(|_| !rng.one_in(8)).collect()
});
static BIAS: LazyLock<Vec<f32>> = LazyLock::new(|| Rng(6).normals(8 * 2048 * 2048));
static SLOPES: LazyLock<Vec<f32>> = LazyLock::new(|| (0..8).map(|h| alibi_slope(h, 8)).collect());

impl Options {
    fn attention(self, dims: &Dims) -> Result<Attention<'static>, flashtile::Error> {
        let plane = [dims.seq_q, dims.seq_kv];
        Ok(match self {
            Options::Plain | Options::In(_) | Options::Denormals(_) => Attention::new(),
            Options::At(level) => Attention::new().level(level),
            Options::Causal => Attention::new().causal(),
            Options::Window(left) => Attention::new().causal().window(Some(left), None),
            Options::Mask => Attention::new().mask(TensorRef::from_slice(&MASK, plane)?),
            Options::Bias => {
                Attention::new().bias(TensorRef::from_slice(&BIAS, [dims.heads_q, dims.seq_q, dims.seq_kv])?)
            }
            Options::Softcap => Attention::new().softcap(SOFTCAP),
            Options::Alibi => Attention::new().alibi(AlibiSlopes::Standard),
            // The last two axes change places: their elements lie one row apart.
            Options::MaskTransposed => Attention::new().mask(TensorRef::from_slice(&MASK, plane)?.permuted([1, 0])?),
            Options::BiasTransposed => {
                let shape = [dims.heads_q, dims.seq_q, dims.seq_kv];
                Attention::new().bias(TensorRef::from_slice(&BIAS, shape)?.permuted([0, 2, 1])?)
            }
            Options::Open(open) => open.attention()?,
        })
    }

    /// The options of query `i` of head `h` alone, where they differ from those of the whole problem.
    fn of_row(self, dims: &Dims, h: usize, i: usize) -> Option<Attention<'static>> {
        let keys = dims.seq_kv;
        match self {
            Options::Mask => Some(Attention::new().mask(row(&MASK[i * keys..][..keys]))),
            Options::Bias => Some(Attention::new().bias(row(&BIAS[(h * dims.seq_q + i) * keys..][..keys]))),
            Options::Alibi => Some(Attention::new().alibi(AlibiSlopes::PerHead(&SLOPES[h..=h]))),
            Options::MaskTransposed => {
                let column: Vec<bool> = (0..keys).map(|j| MASK[j * keys + i]).collect();
                Some(Attention::new().mask(row(column.leak())))
            }
            Options::BiasTransposed => {
                let column: Vec<f32> = (0..keys).map(|j| BIAS[(h * keys + j) * keys + i]).collect();
                Some(Attention::new().bias(row(column.leak())))
            }
            Options::Open(open) => open.of_row(dims, h, i).ok(),
            _ => None,
        }
    }

    /// Visible pairs of query and key.
    fn pairs(self, dims: &Dims) -> usize {
        match self {
            Options::Causal => dims.pairs(true, None),
            Options::Window(left) => dims.pairs(true, Some(left)),
            Options::Open(open) => open.pairs(dims),
            Options::Mask | Options::MaskTransposed => {
                dims.batch * dims.heads_q * MASK.iter().filter(|&&seen| seen).count()
            }
            _ => dims.pairs(false, None),
        }
    }

    /// Bytes of the mask or bias.
    fn bytes(self) -> usize {
        match self {
            Options::Mask | Options::MaskTransposed => size_of_val(&MASK[..]),
            Options::Bias | Options::BiasTransposed => size_of_val(&BIAS[..]),
            _ => 0,
        }
    }
}

fn row<T: Copy>(data: &'static [T]) -> TensorRef<'static, T, 1> {
    TensorRef::from_slice(data, [data.len()]).expect("as long as it is")
}

/// A softmax or a loss, against a copy of the bytes of a softmax, or, in place, a loop that negates them.
fn softmax<'a, T: FromF32>(
    workload: &'static Workload,
    SoftmaxTask { shape, axis: number, way, .. }: SoftmaxTask,
    dtype: DType,
    threads: usize,
) -> Result<Line<'a>, Box<dyn Error>> {
    let (axis, one) = (Axis::new(&shape, number)?, T::scale());
    let x: Vec<T> = Rng(7).normals::<f32>(axis.elements()).into_iter().map(T::from_f32).collect();
    let mut out = x.clone();
    softmax_into(&x, &mut out, axis, one)?;
    check_softmax(&x, &out, shape, number)?;
    // The same number of bytes, with any contents.
    let mut copied = vec![1.0f32; size_of_val(&x[..]) / size_of::<f32>()];
    let original = copied.clone();
    let copy: Repeat<'a> = match way {
        Way::Into | Way::Masked | Way::CrossEntropy => Box::new(move |repeats| {
            for _ in 0..repeats {
                on_parts(threads, &mut copied, black_box(&original), |to, from| to.copy_from_slice(from));
                black_box(&mut copied);
            }
            Ok(())
        }),
        Way::InPlace | Way::Transposed => Box::new(move |repeats| {
            for _ in 0..repeats {
                on_parts(threads, &mut copied, &original, |x, _| x.iter_mut().for_each(|x| *x = -*x));
                black_box(&mut copied);
            }
            Ok(())
        }),
    };
    let kernel: Repeat<'a> = match way {
        Way::Into => Box::new(move |repeats| (0..repeats).try_for_each(|_| softmax_into(&x, &mut out, axis, one))),
        // Its own output is its next input: the time depends on no value.
        Way::InPlace => Box::new(move |repeats| (0..repeats).try_for_each(|_| softmax_in_place(&mut out, axis, one))),
        Way::Transposed => {
            let mut out = Array2::from_shape_vec(shape, out)?;
            Box::new(move |repeats| {
                let mut transposed = out.view_mut().reversed_axes();
                (0..repeats).try_for_each(|_| softmax_axis_in_place(&mut transposed, 1 - number, one))
            })
        }
        Way::Masked => masked(x, shape, number)?,
        Way::CrossEntropy => cross_entropy(x, axis)?,
    };
    let work = Work { flops: 0.0, bytes: 2 * axis.elements() * size_of::<T>() };
    let contest = Contest::with_copy(kernel, copy)?;
    Ok(Line { workload, dtype, threads, work, plan: String::new(), contest, serial: None })
}

/// Softmax with a mask, whose answer has been checked.
fn masked<'a, T: FromF32>(x: Vec<T>, shape: [usize; 2], number: usize) -> Result<Repeat<'a>, Box<dyn Error>> {
    let (mut rng, mut out) = (Rng(8), x.clone());
    let mask: Vec<bool> = (0..x.len()).map(|_| !rng.one_in(8)).collect();
    let run = move |x: &[T], out: &mut [T], mask: &[bool]| {
        let options = Softmax::new().axis(number).mask(TensorRef::from_slice(mask, shape)?);
        options.softmax_into(TensorRef::from_slice(x, shape)?, TensorMut::from_slice(out, shape)?)
    };
    run(&x, &mut out, &mask)?;
    let hidden = T::from_f32(f32::NEG_INFINITY);
    let visible: Vec<T> = x.iter().zip(&mask).map(|(x, seen)| if *seen { *x } else { hidden }).collect();
    check_softmax(&visible, &out, shape, number)?;
    Ok(Box::new(move |repeats| (0..repeats).try_for_each(|_| run(&x, &mut out, &mask))))
}

/// The mean cross-entropy of the lines, whose answer has been checked.
fn cross_entropy<'a, T: FromF32>(x: Vec<T>, axis: Axis) -> Result<Repeat<'a>, Box<dyn Error>> {
    let targets: Vec<usize> = (0..axis.lines()).map(|line| line * 7 % axis.line_len()).collect();
    let mut loss = [T::scale()];
    CrossEntropy::new().loss_into(&x, &targets, axis, &mut loss)?;
    // Line n is column n along the first axis, and row n along the last.
    let (lines, len) = (axis.lines(), axis.line_len());
    let (stride, step) = if axis == Axis::new(&[lines, len], 1)? { (1, len) } else { (lines, 1) };
    let loss_of = |line: usize| {
        let at = |class: usize| x[line * step + class * stride].to_exact();
        (0..len).map(|class| at(class).exp()).sum::<f64>().ln() - at(targets[line])
    };
    let expected = (0..lines).map(loss_of).sum::<f64>() / lines as f64;
    let got = T::to_wide(loss[0]);
    if (got - expected).abs() > 1e-5 * expected {
        return Err(format!("cross-entropy: {got}, not {expected}").into());
    }
    Ok(Box::new(move |repeats| {
        (0..repeats).try_for_each(|_| CrossEntropy::new().loss_into(&x, &targets, axis, &mut loss))
    }))
}

/// An element type of softmax that is made from f32.
trait FromF32: Number {
    /// The largest relative error of a right answer.
    const TOLERANCE: f64;
    /// Smaller numbers have fewer bits: the error is relative to this one.
    const LEAST: f64;
    fn from_f32(x: f32) -> Self;
    fn to_exact(self) -> f64;
    fn scale() -> Self::Real;
    fn to_wide(x: Self::Real) -> f64;
}

macro_rules! from_f32 {
    ($t:ty, $tolerance:expr, $least:expr, $from:expr, $to:expr) => {
        impl FromF32 for $t {
            const TOLERANCE: f64 = $tolerance;
            const LEAST: f64 = $least;
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
            fn to_exact(self) -> f64 {
                f64::from($to(self))
            }
            fn scale() -> Self::Real {
                1.0
            }
            fn to_wide(x: Self::Real) -> f64 {
                f64::from(x)
            }
        }
    };
}

from_f32!(f32, 1e-5, 0.0, |x| x, |x| x);
from_f32!(f16, 0.001, 6.1e-5, f16::from_f32, f16::to_f32);
from_f32!(bf16, 0.004, 0.0, bf16::from_f32, bf16::to_f32);
from_f32!(f64, 1e-13, 0.0, f64::from, |x| x);

/// Three of the lines against the formula.
fn check_softmax<T: FromF32>(x: &[T], out: &[T], [rows, len]: [usize; 2], axis: usize) -> Result<(), Box<dyn Error>> {
    let (lines, n, stride, step) = if axis == 1 { (rows, len, 1, len) } else { (len, rows, len, 1) };
    for line in [0, lines / 2, lines - 1] {
        let at = |data: &[T], i: usize| data[line * step + i * stride].to_exact();
        let sum: f64 = (0..n).map(|i| at(x, i).exp()).sum();
        for i in 0..n {
            let (got, expected) = (at(out, i), at(x, i).exp() / sum);
            if (got - expected).abs() > T::TOLERANCE * expected.max(T::LEAST) {
                return Err(format!("softmax of axis {axis}, line {line}: {got}, not {expected}").into());
            }
        }
    }
    Ok(())
}
