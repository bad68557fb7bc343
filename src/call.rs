//! Checked calls, and the output of log-sum-exps.

#![forbid(unsafe_code)]

use crate::driver::{self, Output, Workspace};
use crate::error::Error;
use crate::plan::Plan;
use crate::problem::{Problem, check_shape};
use crate::tensor::{AnyTensorMut, TensorMut, TensorRef};

/// The output of log-sum-exps: none, or a tensor of f32, `[batch, heads_q, seq_q]`.
///
/// It is made from `None`, from a [`TensorMut`], or from a mutable ndarray array or view of rank 3. So calls take `None` or
/// `&mut lse`.
#[derive(Debug)]
pub struct LseOutput<'t>(Option<TensorMut<'t, f32, 3>>);

impl<'t> From<Option<TensorMut<'t, f32, 3>>> for LseOutput<'t> {
    fn from(lse: Option<TensorMut<'t, f32, 3>>) -> Self {
        LseOutput(lse)
    }
}

impl<'t> From<TensorMut<'t, f32, 3>> for LseOutput<'t> {
    fn from(lse: TensorMut<'t, f32, 3>) -> Self {
        LseOutput(Some(lse))
    }
}

#[cfg(feature = "ndarray")]
impl<'t, S: ndarray::DataMut<Elem = f32>> From<&'t mut ndarray::ArrayBase<S, ndarray::Ix3>> for LseOutput<'t> {
    fn from(lse: &'t mut ndarray::ArrayBase<S, ndarray::Ix3>) -> Self {
        LseOutput(Some(lse.into()))
    }
}

#[cfg(feature = "ndarray")]
impl<'t> From<ndarray::ArrayViewMut<'t, f32, ndarray::Ix3>> for LseOutput<'t> {
    fn from(lse: ndarray::ArrayViewMut<'t, f32, ndarray::Ix3>) -> Self {
        LseOutput(Some(lse.into()))
    }
}

/// Checks the shapes of a problem's outputs.
pub(crate) fn checked_output<'t>(
    problem: &Problem<'_>,
    out: AnyTensorMut<'t>,
    LseOutput(lse): LseOutput<'t>,
) -> Result<Output<'t>, Error> {
    let out = problem.checked_output(out)?;
    lse.as_ref().map_or(Ok(()), |lse| problem.check_lse(lse))?;
    Ok(Output::new(out, lse))
}

/// A checked call: problem, plan and output.
pub(crate) struct Call<'a> {
    problem: Problem<'a>,
    plan: Plan,
    output: Output<'a>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        problem: Problem<'a>,
        plan: Plan,
        out: AnyTensorMut<'a>,
        lse: LseOutput<'a>,
    ) -> Result<Self, Error> {
        let output = checked_output(&problem, out, lse)?;
        Ok(Call { problem, plan, output })
    }

    /// Whether the plan uses several threads.
    #[cfg(feature = "capi")]
    pub(crate) fn is_parallel(&self) -> bool {
        self.plan.is_parallel()
    }

    pub(crate) fn run(self, workspace: &mut Workspace) {
        driver::run(&self.problem, &self.plan, self.output, workspace);
    }
}

/// A checked call for sums of probabilities.
pub(crate) struct KeySumsCall<'a> {
    /// Without values.
    problem: Problem<'a>,
    plan: Plan,
    /// `[batch, heads_q, queries, 1]`.
    lse: TensorRef<'a, f32>,
    sums: TensorMut<'a, f32, 3>,
}

impl<'a> KeySumsCall<'a> {
    pub(crate) fn new(
        problem: Problem<'a>,
        plan: Plan,
        lse: TensorRef<'a, f32, 3>,
        sums: TensorMut<'a, f32, 3>,
    ) -> Result<Self, Error> {
        let [batch, heads_q, _, seq_kv] = problem.dims.scores_shape();
        check_shape("lse", ["batch", "heads_q", "seq_q"], lse.shape(), problem.lse_shape())?;
        check_shape("sums", ["batch", "heads_q", "seq_kv"], sums.shape(), [batch, heads_q, seq_kv])?;
        Ok(KeySumsCall { problem, plan, lse: lse.insert_axis(3)?, sums })
    }

    /// Whether the plan uses several threads.
    #[cfg(feature = "capi")]
    pub(crate) fn is_parallel(&self) -> bool {
        self.plan.is_parallel()
    }

    pub(crate) fn run(self, workspace: &mut Workspace) {
        driver::key_sums::run(&self.problem, &self.plan, self.lse, self.sums, workspace);
    }
}
