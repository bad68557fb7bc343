//! The description of an attention, and its calls.

#![forbid(unsafe_code)]

use crate::bias::{AlibiSlopes, ScoreStage};
use crate::driver::{self, Output, Workspace};
use crate::element::Element;
use crate::error::Error;
use crate::machine::Machine;
use crate::mask::QueryOffset;
use crate::plan::{Form, Plan, Threads};
use crate::problem::Problem;
use crate::simd::Level;
use crate::tensor::{AnyTensor, TensorMut, TensorRef};

/// Scaled-dot-product attention: what to compute, apart from the tensors.
///
/// ```text
/// score[i,j] = softcap( scale * dot(q[i], k[j]) ) + bias[i,j]        for every key j that query i may see
/// out[i]     = sum_j softmax(score[i,:])[j] * v[j]                   lse[i] = log sum_j exp(score[i,j])
/// ```
#[derive(Clone, Debug, Default)]
pub struct Attention<'a> {
    pub(crate) scale: Option<f32>,
    pub(crate) causal: bool,
    pub(crate) window: (Option<usize>, Option<usize>),
    pub(crate) query_offset: QueryOffset<'a>,
    pub(crate) key_lengths: Option<&'a [usize]>,
    pub(crate) mask: Option<TensorRef<'a, bool>>,
    pub(crate) softcap: Option<f32>,
    pub(crate) bias: Option<AnyTensor<'a>>,
    pub(crate) alibi: Option<AlibiSlopes<'a>>,
    pub(crate) level: Option<Level>,
    pub(crate) form: Option<Form>,
    pub(crate) threads: Threads,
}

impl<'a> Attention<'a> {
    /// Plain attention: every query sees every key, scores are scaled by `1 / sqrt(head_dim)`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Multiplies scores with `scale` instead of `1 / sqrt(head_dim)`; any finite number.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// A query sees the keys at its own position and before it: `j <= p`. Which position that is, [`QueryOffset`] says.
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// A query at position p sees the keys from `p - left` to `p + right`; `None` is no bound on that side.
    ///
    /// `window(Some(511), Some(0))` shows a query itself and the 511 keys before it.
    pub fn window(mut self, left: Option<usize>, right: Option<usize>) -> Self {
        self.window = (left, right);
        self
    }

    /// Where the queries stand among the keys; the default is [`QueryOffset::FromEnd`].
    pub fn query_offset(mut self, offset: QueryOffset<'a>) -> Self {
        self.query_offset = offset;
        self
    }

    /// How many keys each batch has, `[batch]`: keys from there on are padding and never read into the result.
    pub fn key_lengths(mut self, lengths: &'a [usize]) -> Self {
        self.key_lengths = Some(lengths);
        self
    }

    /// An explicit mask: **true where the query may attend**, as in PyTorch and ONNX.
    ///
    /// `[batch, heads_q, seq_q, seq_kv]`, where any dimension may be 1 to hold for all, and missing ones stand in front.
    pub fn mask(mut self, attend: impl Into<TensorRef<'a, bool>>) -> Self {
        self.mask = Some(attend.into());
        self
    }

    /// Caps scores smoothly to `-cap..cap`: `cap * tanh(score / cap)`, before any bias; finite and above 0.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.softcap = Some(cap);
        self
    }

    /// Adds a tensor to the scores; -inf hides a key.
    ///
    /// `[batch, heads_q, seq_q, seq_kv]`, where any dimension may be 1 to hold for all, and missing ones stand in front.
    pub fn bias<T: Element>(mut self, bias: impl Into<TensorRef<'a, T>>) -> Self {
        self.bias = Some(AnyTensor::new(bias.into().strided));
        self
    }

    /// Subtracts `slope[h] * |p - j|` from the score of key j for a query of head h at position p.
    pub fn alibi(mut self, slopes: AlibiSlopes<'a>) -> Self {
        self.alibi = Some(slopes);
        self
    }

    /// Uses this instruction set instead of the processor's best.
    pub fn level(mut self, level: Level) -> Self {
        self.level = Some(level);
        self
    }

    /// Uses this form instead of the one that the shape suggests.
    pub fn form(mut self, form: Form) -> Self {
        self.form = Some(form);
        self
    }

    /// Whether the current rayon pool may be used (the default), or only the calling thread.
    pub fn threads(mut self, threads: Threads) -> Self {
        self.threads = threads;
        self
    }

    /// How a call with such tensors would be carried out.
    ///
    /// # Errors
    /// As [`Attention::run_into`].
    pub fn plan<'t, Q: Element, K: Element, V: Element>(
        &self,
        q: impl Into<TensorRef<'t, Q>>,
        k: impl Into<TensorRef<'t, K>>,
        v: impl Into<TensorRef<'t, V>>,
    ) -> Result<Plan, Error>
    where
        'a: 't,
    {
        let problem = Problem::new(self, q.into(), k.into(), v.into())?;
        Ok(Plan::new(&problem, Machine::new(self.level)?, self.form, self.threads))
    }

    /// Computes attention into `out`.
    pub fn run_into<'t, Q: Element, K: Element, V: Element, O: Element>(
        &self,
        q: impl Into<TensorRef<'t, Q>>,
        k: impl Into<TensorRef<'t, K>>,
        v: impl Into<TensorRef<'t, V>>,
        out: impl Into<TensorMut<'t, O>>,
    ) -> Result<(), Error>
    where
        'a: 't,
    {
        self.call(q.into(), k.into(), v.into(), out.into(), None, &mut Workspace::new())
    }

    /// The one way down.
    fn call<'t, Q: Element, K: Element, V: Element, O: Element>(
        &self,
        q: TensorRef<'t, Q>,
        k: TensorRef<'t, K>,
        v: TensorRef<'t, V>,
        out: TensorMut<'t, O>,
        lse: Option<TensorMut<'t, f32, 3>>,
        workspace: &mut Workspace,
    ) -> Result<(), Error>
    where
        'a: 't,
    {
        let problem = Problem::new(self, q, k, v)?;
        let machine = Machine::new(self.level)?;
        problem.check_output(&out)?;
        lse.as_ref().map_or(Ok(()), |lse| problem.check_lse(lse))?;
        let plan = Plan::new(&problem, machine, self.form, self.threads);
        driver::run(&problem, &plan, Output::new(out, lse), workspace);
        Ok(())
    }
}
