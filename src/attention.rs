//! The description of an attention, and its calls.

#![forbid(unsafe_code)]

use crate::call::{Call, LseOutput};
use crate::driver::{self, Output, Workspace};
use crate::element::{DType, Element};
use crate::error::Error;
use crate::integers::Integers;
use crate::level::Level;
use crate::mask::{MaskTensor, Window};
use crate::options::Options;
use crate::plan::{Form, Plan, Threads};
use crate::prepared::Prepared;
use crate::problem::{Problem, check_shape};
use crate::score::{AlibiSlopes, BiasTensor, ScoreStage};
use crate::sequence::QueryOffset;
use crate::simd::Isa;
use crate::softmax;
use crate::tensor::any::AnyTensor;
use crate::tensor::{AnyTensorMut, AnyTensorRef, TensorMut, TensorRef};

/// Scaled-dot-product attention: what to compute, apart from the tensors.
///
/// ```text
/// score[i,j] = softcap( scale * dot(q[i], k[j]) ) + bias[i,j]        for every key j that query i may see
/// out[i]     = sum_j softmax(score[i,:])[j] * v[j]                   lse[i] = log sum_j exp(score[i,j])
/// ```
///
/// | tensor | shape | |
/// |---|---|---|
/// | q | `[batch, heads_q, seq_q, head_dim]` | |
/// | k | `[batch, heads_kv, seq_kv, head_dim]` | `heads_q` is a multiple of `heads_kv`: query head h uses `h / (heads_q / heads_kv)` |
/// | v | `[batch, heads_kv, seq_kv, value_dim]` | |
/// | out | `[batch, heads_q, seq_q, value_dim]` | |
/// | lse | `[batch, heads_q, seq_q]` | f32, natural logarithm |
///
/// q, k, v and out may each be f32, f16 or bf16, with any strides. Every dimension may be any number, 0 included. All masks
/// compose by intersection, and biases add up in the order of the formula: softcap, additive tensor, ALiBi.
///
/// The edge rules, for every option and type:
/// * a query that sees no key gets an output of exactly 0 and an lse of -inf;
/// * a hidden key never reaches the output, whatever bits it holds (NaN, infinity, stale padding); a score of -inf
///   hides its key, however it came about: by a bias, beyond the range of f32, or by an infinite element of the key;
/// * a visible NaN comes out as NaN in the rows that see it, and in no others; so does a score of +inf;
/// * the bits of a row depend on that row's own inputs, the [`Level`] and the [`Form`] alone: not on threads, on the batch
///   around it, or on how queries are cut into calls.
///
/// The description is cheap to make, clone and keep. It borrows the tensors and lists that it was given.
///
/// ```
/// use flashtile::Attention;
/// use ndarray::Array4;
///
/// let q = Array4::from_elem((1, 8, 10, 64), 0.1f32); // 8 query heads
/// let k = Array4::from_elem((1, 2, 30, 64), 0.2f32); // share 2 key/value heads
/// let v = Array4::from_elem((1, 2, 30, 64), 0.3f32);
///
/// let attention = Attention::new().causal().window(Some(1023), None).softcap(30.0);
/// println!("{}", attention.plan(&q, &k, &v)?);
/// let out = attention.run(&q, &k, &v)?;
/// assert_eq!(out.shape(), [1, 8, 10, 64]);
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Attention<'a> {
    pub(crate) options: Options<'a>,
    level: Option<Level>,
    form: Option<Form>,
    threads: Threads,
}

/// What to compute.
impl<'a> Attention<'a> {
    /// Plain attention: every query sees every key, scores are scaled by `1 / sqrt(head_dim)`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Multiplies scores with `scale` instead of `1 / sqrt(head_dim)`. Any number that stays finite when multiplied by log2(e) (up
    /// to 2.3e38), and when divided by a softcap; zero and negative ones too.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// A query sees the key at its own position and those before it: `j <= p`. Which position that is,
    /// [`query_offset`](Attention::query_offset) says.
    pub fn causal(mut self) -> Self {
        self.options.causal = true;
        self
    }

    /// A query at position p sees the keys from `p - left` to `p + right`; `None` sets no bound on that side.
    ///
    /// `window(Some(511), Some(0))` shows a query its own key and the 511 before it.
    pub fn window(mut self, left: Option<usize>, right: Option<usize>) -> Self {
        self.options.window = self.options.window.intersect(Window { left, right });
        self
    }

    /// Where the queries stand among the keys: query i is at position `query_offset + i`. The default,
    /// [`QueryOffset::FromEnd`], puts the last query at the last key.
    ///
    /// Causal order, windows and ALiBi go by it; other options don't.
    pub fn query_offset(mut self, offset: QueryOffset<'a>) -> Self {
        self.options.query_offset = offset;
        self
    }

    /// How many keys each batch has, `[batch]`, each from 0 to `seq_kv`: the keys from there on are padding.
    ///
    /// The list is a slice, array or vector of any common integer type, see [`Integers`].
    pub fn key_lengths(mut self, lengths: impl Into<Integers<'a>>) -> Self {
        self.options.note("key_lengths", self.options.key_lengths.is_some());
        self.options.key_lengths = Some(lengths.into());
        self
    }

    /// An explicit mask: **true where the query may attend**, as in PyTorch and ONNX.
    ///
    /// `[batch, heads_q, seq_q, seq_kv]`; any dimension may be 1 to hold for all, and a tensor of lower rank lacks the
    /// first ones.
    ///
    /// A tensor of rank 3 is read as `[heads_q, seq_q, seq_kv]`. One that has a row for each batch, `[batch, seq_q, seq_kv]`, needs
    /// [`insert_axis(1)`](TensorRef::insert_axis) first: where `batch == heads_q` the wrong reading is not an error.
    pub fn mask(mut self, attend: impl Into<TensorRef<'a, bool>>) -> Self {
        self.options.note("mask", self.options.mask.is_some());
        self.options.mask = Some(MaskTensor(attend.into().strided.into_bytes()));
        self
    }

    /// Caps scores smoothly to `-cap..cap`: `cap * tanh(score / cap)`, before any bias. `cap` is a normal number above 0, up to
    /// 2.3e38.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.options.softcap = Some(cap);
        self
    }

    /// Adds a tensor of f32, f16 or bf16 to the scores; -inf hides a key.
    ///
    /// `[batch, heads_q, seq_q, seq_kv]`; any dimension may be 1 to hold for all, and a tensor of lower rank lacks the
    /// first ones.
    ///
    /// As for [`mask`](Attention::mask), a tensor of rank 3 is read as `[heads_q, seq_q, seq_kv]`. One that has a row for each batch, `[batch, seq_q, seq_kv]`, needs
    /// [`insert_axis(1)`](TensorRef::insert_axis) first: where `batch == heads_q` the wrong reading is not an error.
    pub fn bias<T: Element>(mut self, bias: impl Into<TensorRef<'a, T>>) -> Self {
        self.options.note("bias", self.options.bias.is_some());
        self.options.bias = Some(BiasTensor(AnyTensor::new(bias.into().strided)));
        self
    }

    /// Subtracts `slope[h] * |p - j|` from the score of key j for a query of head h at position p.
    pub fn alibi(mut self, slopes: AlibiSlopes<'a>) -> Self {
        self.options.note("alibi", self.options.alibi.is_some());
        self.options.alibi = Some(slopes);
        self
    }
}

/// How to compute it.
impl<'a> Attention<'a> {
    /// Uses this instruction set instead of the processor's best; refused where the processor lacks it.
    pub fn level(mut self, level: Level) -> Self {
        self.level = Some(level);
        self
    }

    /// Uses this form instead of the one that shapes, types and level suggest; any shape can be computed in either.
    pub fn form(mut self, form: Form) -> Self {
        self.form = Some(form);
        self
    }

    /// Whether the current rayon pool may be used (the default), or only the calling thread.
    pub fn threads(mut self, threads: Threads) -> Self {
        self.threads = threads;
        self
    }

    /// How a call with such tensors would be carried out; print it to see.
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn plan<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<Plan, Error> {
        self.plan_for(&Problem::new(&self.options, [q.into(), k.into(), v.into()])?)
    }

    /// The same from types and shapes alone, before there are any tensors.
    ///
    /// ```
    /// use flashtile::{Attention, DType, Form};
    ///
    /// let (q, kv) = ((DType::F32, [1, 32, 1, 128]), (DType::F16, [1, 8, 8192, 128]));
    /// let plan = Attention::new().causal().plan_shapes(q, kv, kv)?;
    /// assert_eq!(plan.form(), Form::Decode);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn plan_shapes(
        &self,
        q: (DType, [usize; 4]),
        k: (DType, [usize; 4]),
        v: (DType, [usize; 4]),
    ) -> Result<Plan, Error> {
        self.plan_for(&Problem::of_shapes(&self.options, [q, k, v])?)
    }

    pub(crate) fn plan_for(&self, problem: &Problem<'_>) -> Result<Plan, Error> {
        Ok(Plan::new(problem, Isa::for_level(self.level)?, self.form, self.threads))
    }
}

/// Calls.
impl<'a> Attention<'a> {
    /// Computes attention into an array of its own, of the queries' type.
    ///
    /// # Errors
    /// As [`Attention::compute`], and [`Error::TooLarge`] if there is no memory for the result.
    #[cfg(feature = "ndarray")]
    pub fn run<'t, Q: Element>(
        &self,
        q: impl Into<TensorRef<'t, Q>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<ndarray::Array4<Q>, Error> {
        let (q, k, v) = (q.into(), k.into(), v.into());
        let mut out = array(Problem::new(&self.options, [q.into(), k, v])?.dims.output_shape())?;
        self.compute(q, k, v, &mut out, None, &mut Workspace::new())?;
        Ok(out)
    }

    /// Computes attention and the log-sum-exp of every query's scores, natural logarithm, `[batch, heads_q, seq_q]`.
    ///
    /// # Errors
    /// As [`Attention::run`].
    #[cfg(feature = "ndarray")]
    pub fn run_with_lse<'t, Q: Element>(
        &self,
        q: impl Into<TensorRef<'t, Q>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(ndarray::Array4<Q>, ndarray::Array3<f32>), Error> {
        let (q, k, v) = (q.into(), k.into(), v.into());
        let dims = Problem::new(&self.options, [q.into(), k, v])?.dims;
        let (mut out, mut lse) = (array(dims.output_shape())?, array(dims.lse_shape())?);
        self.compute(q, k, v, &mut out, &mut lse, &mut Workspace::new())?;
        Ok((out, lse))
    }

    /// Computes attention into `out`, rounding once to its type.
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn run_into<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
        out: impl Into<AnyTensorMut<'t>>,
    ) -> Result<(), Error> {
        self.compute(q, k, v, out, None, &mut Workspace::new())
    }

    /// The full form of every call: into `out`, with the log-sum-exps if there is an `lse` to take them, and with memory
    /// that is kept from call to call.
    ///
    /// Tensors are ndarray arrays and views, [`TensorRef`] and [`TensorMut`], or [`AnyTensorRef`] and [`AnyTensorMut`] whose
    /// types are known at run time. `lse` is `None`, or `&mut lse` of an array, or a [`TensorMut`] of rank 3.
    ///
    /// With a workspace that has seen a problem as large, serial calls and calls from within a rayon pool don't allocate.
    ///
    /// # Errors
    /// Before anything is written:
    /// * [`Error::Rank`]: queries, keys or values of rank 3 or less
    /// * [`Error::ShapeMismatch`], [`Error::HeadsNotDivisible`]: tensors that don't fit together
    /// * [`Error::NotBroadcastable`], [`Error::WrongCount`], [`Error::KeyLengthOutOfRange`]: a mask, bias or list that does
    ///   not fit the tensors
    /// * [`Error::InvalidOption`]: a scale, softcap or slope that is no usable number
    /// * [`Error::GivenTwice`]: a mask, a bias, key lengths or ALiBi given twice
    /// * [`Error::LevelUnavailable`]
    /// * [`Error::TooLarge`]: dimensions (of broadcast tensors) beyond any memory
    /// * [`Error::TooMany`]: more than 2^32 - 1 query rows or 2^24 key/value heads in all batches together, or rows of more
    ///   than 2^20 elements
    pub fn compute<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
        out: impl Into<AnyTensorMut<'t>>,
        lse: impl Into<LseOutput<'t>>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let problem = Problem::new(&self.options, [q.into(), k.into(), v.into()])?;
        self.call(problem, out.into(), lse.into())?.run(workspace);
        Ok(())
    }

    /// A call that is only to be run.
    pub(crate) fn call<'t>(
        &self,
        problem: Problem<'t>,
        out: AnyTensorMut<'t>,
        lse: LseOutput<'t>,
    ) -> Result<Call<'t>, Error> {
        let plan = self.plan_for(&problem)?;
        Call::new(problem, plan, out, lse)
    }

    /// Plans once for a fixed problem, to be computed many times: the same shapes with other data.
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn prepare<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<Prepared<'a>, Error> {
        let problem = Problem::new(&self.options, [q.into(), k.into(), v.into()])?;
        Ok(Prepared::new(self.options.clone(), &problem, self.plan_for(&problem)?, self.form))
    }

    /// The scores at a named stage, `[batch, heads_q, seq_q, seq_kv]`: for looking at attention, not for computing with.
    ///
    /// This holds every score in memory, which attention itself never does.
    ///
    /// # Errors
    /// As [`Attention::run`].
    #[cfg(feature = "ndarray")]
    pub fn scores<'t>(
        &self,
        stage: ScoreStage,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
    ) -> Result<ndarray::Array4<f32>, Error> {
        let (q, k) = (q.into(), k.into());
        let mut out = array(Problem::of_scores(&self.options, [q, k])?.dims.scores_shape())?;
        self.scores_into(stage, q, k, &mut out)?;
        Ok(out)
    }

    /// As `scores` (of the feature `ndarray`), into a tensor of the caller's: `[batch, heads_q, seq_q, seq_kv]`.
    ///
    /// They are formed as [`Form::Prefill`] does, from f32, whatever form is set.
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn scores_into<'t>(
        &self,
        stage: ScoreStage,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        out: impl Into<TensorMut<'t, f32>>,
    ) -> Result<(), Error> {
        let out = out.into();
        let problem = Problem::of_scores(&self.options, [q.into(), k.into()])?;
        let plan = Plan::for_scores(&problem, Isa::for_level(self.level)?, self.threads);
        let names = ["batch", "heads_q", "seq_q", "seq_kv"];
        check_shape("output", names, out.shape(), problem.dims.scores_shape())?;
        let finish_row = match stage {
            ScoreStage::Probabilities => softmax::plain,
            _ => |_: &mut [f32]| (),
        };
        let (problem, output) = (problem.at_stage(stage), Output::new(out.into(), None));
        driver::inspect::run(&problem, &plan, finish_row, output, &mut Workspace::new());
        Ok(())
    }
}

/// An array of zeros, or an error where there is no memory for it.
#[cfg(feature = "ndarray")]
fn array<T: Clone + Default, D: ndarray::Dimension, const N: usize>(
    shape: [usize; N],
) -> Result<ndarray::Array<T, D>, Error>
where
    [usize; N]: ndarray::IntoDimension<Dim = D>,
{
    let too_large = Error::TooLarge { what: "the result" };
    let (_, len) = crate::tensor::strided::contiguous(&shape)?;
    let mut elements = Vec::new();
    elements.try_reserve_exact(len).map_err(|_| too_large.clone())?;
    elements.resize(len, T::default());
    ndarray::Array::from_shape_vec(shape, elements).map_err(|_| too_large)
}
