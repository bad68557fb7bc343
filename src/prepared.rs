//! An attention that is planned once and computed many times.

#![forbid(unsafe_code)]

use crate::call::{LseOutput, checked_output};
use crate::driver::{self, Schedule, Workspace};
use crate::element::DType;
use crate::error::Error;
use crate::options::Options;
use crate::plan::{Form, Plan};
use crate::problem::{Problem, check_shape};
use crate::tensor::{AnyTensorMut, AnyTensorRef};

/// An [`Attention`](crate::Attention) with its plan and tasks for fixed shapes; made by
/// [`Attention::prepare`](crate::Attention::prepare).
///
/// It saves planning and listing the tasks at each call, some 0.3 microseconds for a small problem. That is useful for very
/// small calls. If the number of keys grows from step to step, [`Prepared::set_keys`] plans again without an allocation.
///
/// ```
/// use flashtile::{Attention, Workspace};
/// use ndarray::Array4;
///
/// let x = Array4::from_elem((1, 4, 16, 32), 0.5f32);
/// let prepared = Attention::new().causal().prepare(&x, &x, &x)?;
/// let (mut out, mut workspace) = (Array4::<f32>::zeros((1, 4, 16, 32)), Workspace::new());
/// for _layer in 0..3 {
///     prepared.compute(&x, &x, &x, &mut out, None, &mut workspace)?;
/// }
///
/// // Decoding: one more key at each step, in a cache with room for 64.
/// let (q, cache) = (Array4::from_elem((1, 4, 1, 32), 0.5f32), Array4::from_elem((1, 4, 64, 32), 0.5f32));
/// let keys = |n: usize| cache.slice(ndarray::s![.., .., ..n, ..]);
/// let mut prepared = Attention::new().causal().prepare(&q, keys(1), keys(1))?;
/// let mut out = Array4::<f32>::zeros((1, 4, 1, 32));
/// for n in 1..=64 {
///     prepared.set_keys(n)?;
///     prepared.compute(&q, keys(n), keys(n), &mut out, None, &mut workspace)?;
/// }
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Debug)]
pub struct Prepared<'a> {
    options: Options<'a>,
    plan: Plan,
    schedule: Schedule,
    /// The form set by [`Attention::form`](crate::Attention::form).
    form: Option<Form>,
    /// Types and shapes of queries, keys and values.
    shapes: [(DType, [usize; 4]); 3],
}

impl<'a> Prepared<'a> {
    pub(crate) fn new(
        options: Options<'a>,
        problem: &Problem<'_>,
        plan: Plan,
        form: Option<Form>,
    ) -> Result<Self, Error> {
        let shapes = [&problem.q, &problem.k, &problem.v].map(|tensor| (tensor.dtype(), tensor.shape()));
        let mut schedule = Schedule::default();
        fill(&mut schedule, problem, &plan)?;
        Ok(Prepared { options, plan, schedule, form, shapes })
    }

    /// The plan that every call follows.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Plans again for `seq_kv` keys and values. Everything else stays, key lengths and query offsets included.
    ///
    /// It takes less than a microsecond for a decoding step, and allocates only if there are more tasks than at any time
    /// before.
    ///
    /// # Errors
    /// As [`Attention::prepare`](crate::Attention::prepare); the prepared attention is then unchanged.
    pub fn set_keys(&mut self, seq_kv: usize) -> Result<(), Error> {
        let [q, mut k, mut v] = self.shapes;
        (k.1[2], v.1[2]) = (seq_kv, seq_kv);
        let problem = Problem::of_shapes(&self.options, [q, k, v])?;
        let plan = self.plan.replanned(&problem, self.form);
        fill(&mut self.schedule, &problem, &plan)?;
        (self.plan, self.shapes) = (plan, [q, k, v]);
        Ok(())
    }

    /// Computes attention as [`Attention::compute`](crate::Attention::compute), for tensors of the prepared shapes. Types and
    /// strides may differ. The form stays the one for the prepared types.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for other shapes that fit together and fit the options; otherwise as
    /// [`Attention::compute`](crate::Attention::compute).
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
        let [q_shape, k_shape, v_shape] = self.shapes.map(|(_, shape)| shape);
        check_shape("queries", ["batch", "heads_q", "seq_q", "head_dim"], problem.q.shape(), q_shape)?;
        check_shape("keys", ["batch", "heads_kv", "seq_kv", "head_dim"], problem.k.shape(), k_shape)?;
        check_shape("values", ["batch", "heads_kv", "seq_kv", "value_dim"], problem.v.shape(), v_shape)?;
        let output = checked_output(&problem, out.into(), lse.into())?;
        let plan = self.plan.for_types_of(&problem);
        driver::run_scheduled(&problem, &plan, &self.schedule, output, workspace);
        Ok(())
    }
}

/// Lists the tasks, unless there are too many to keep. (A call lists them, too, but its output has memory for each row.)
fn fill(schedule: &mut Schedule, problem: &Problem<'_>, plan: &Plan) -> Result<(), Error> {
    const LIMIT: usize = 1 << 24;
    let got = plan.listed_tasks();
    if got > LIMIT {
        return Err(Error::TooMany { what: "tasks of a prepared attention", limit: LIMIT, got });
    }
    schedule.fill(problem, plan);
    Ok(())
}
