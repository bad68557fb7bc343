//! An attention that is planned once and computed many times.

#![forbid(unsafe_code)]

use crate::call::{KeySumsCall, LseOutput, checked_output};
use crate::driver::{self, Output, Schedule, Workspace};
use crate::element::DType;
use crate::error::Error;
use crate::integers::Integers;
use crate::kv::{KeysValues, Places};
use crate::options::Options;
use crate::plan::Plan;
use crate::problem::{Dims, Problem, check_shape};
#[cfg(feature = "capi")]
use crate::tensor::any::AnyTensor;
use crate::tensor::{AnyTensorMut, AnyTensorRef, TensorMut, TensorRef};

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
/// let prepared = Attention::new().causal().prepare(&x, (&x, &x))?;
/// let (mut out, mut workspace) = (Array4::<f32>::zeros((1, 4, 16, 32)), Workspace::new());
/// for _layer in 0..3 {
///     prepared.compute(&x, (&x, &x), &mut out, None, &mut workspace)?;
/// }
///
/// // Decoding: one more key at each step, in a cache with room for 64.
/// let (q, cache) = (Array4::from_elem((1, 4, 1, 32), 0.5f32), Array4::from_elem((1, 4, 64, 32), 0.5f32));
/// let keys = |n: usize| cache.slice(ndarray::s![.., .., ..n, ..]);
/// let mut prepared = Attention::new().causal().prepare(&q, (keys(1), keys(1)))?;
/// let mut out = Array4::<f32>::zeros((1, 4, 1, 32));
/// for n in 1..=64 {
///     prepared.set_keys(n)?;
///     prepared.compute(&q, (keys(n), keys(n)), &mut out, None, &mut workspace)?;
/// }
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Debug)]
pub struct Prepared<'a> {
    options: Options<'a>,
    planned: Planned,
    /// Where the next plan is made. So a plan that fails, or a mask that panics, leaves this one whole: each row of the output must be
    /// in one task.
    next: Planned,
}

/// A plan with its tasks, and what they were made for.
#[derive(Debug)]
struct Planned {
    plan: Plan,
    schedule: Schedule,
    dims: Dims,
    /// Types and shapes of queries, keys and values.
    shapes: [(DType, [usize; 4]); 3],
    /// The number of keys of each sequence; empty if all have the same.
    key_lengths: Vec<usize>,
    /// The tokens that the keys' cache holds, if it loses some.
    held: Option<[usize; 2]>,
    /// The query starts, if [`Prepared::replan_packed`] has set other ones than the options have.
    query_starts: Vec<usize>,
}

impl Planned {
    /// No tasks.
    fn empty(problem: &Problem<'_>, plan: Plan) -> Self {
        Planned {
            plan,
            schedule: Schedule::default(),
            dims: problem.dims,
            shapes: shapes_of(problem),
            key_lengths: Vec::new(),
            held: None,
            query_starts: Vec::new(),
        }
    }

    /// Makes as much memory as `other` uses, so that the next plan allocates nothing if it is no larger.
    fn reserve_like(&mut self, other: &Self) {
        fn reserve(list: &mut Vec<usize>, other: &[usize]) {
            list.reserve_exact(other.len().saturating_sub(list.len()));
        }
        self.schedule.reserve_like(&other.schedule);
        reserve(&mut self.key_lengths, &other.key_lengths);
        reserve(&mut self.query_starts, &other.query_starts);
    }

    /// Makes the tasks of `plan`.
    fn plan(&mut self, problem: &Problem<'_>, plan: Plan, query_starts: &[usize]) -> Result<(), Error> {
        fill(&mut self.schedule, problem, &plan)?;
        self.plan = plan;
        (self.dims, self.shapes, self.held) = (problem.dims, shapes_of(problem), held_by(problem));
        self.key_lengths.clear();
        if !problem.sequences.keys.are_alike() {
            self.key_lengths.extend((0..problem.dims.batch).map(|b| problem.sequences.keys.get(b)));
        }
        self.query_starts.clear();
        self.query_starts.extend_from_slice(query_starts);
        Ok(())
    }
}

impl<'a> Prepared<'a> {
    pub(crate) fn new(options: Options<'a>, problem: &Problem<'_>, plan: Plan) -> Result<Self, Error> {
        let [mut planned, mut next] = [(); 2].map(|()| Planned::empty(problem, plan));
        planned.plan(problem, plan, &[])?;
        next.reserve_like(&planned);
        Ok(Prepared { options, planned, next })
    }

    /// Plans again with other options.
    #[cfg(feature = "capi")]
    pub(crate) fn replace(&mut self, options: Options<'a>, problem: &Problem<'_>, plan: Plan) -> Result<(), Error> {
        self.next.plan(problem, plan, &[])?;
        self.take_next();
        self.options = options;
        Ok(())
    }

    /// A problem with the options, for tensors whose rank has been checked.
    #[cfg(feature = "capi")]
    pub(crate) fn problem_of_any<'t>(
        &'t self,
        qkv: [AnyTensor<'t>; 3],
        places: Places<'t>,
    ) -> Result<Problem<'t>, Error> {
        Problem::of_any(&self.options, qkv, (starts_of(&self.options, &self.planned.query_starts), places))
    }

    /// Takes the plan that has been made.
    fn take_next(&mut self) {
        std::mem::swap(&mut self.planned, &mut self.next);
        self.next.reserve_like(&self.planned);
    }

    /// The plan that every call follows.
    pub fn plan(&self) -> &Plan {
        &self.planned.plan
    }

    /// Plans again for `seq_kv` keys and values, for `(k, v)` of `[batch, heads_kv, seq_kv, dim]`. Everything else stays, key lengths and
    /// query offsets included.
    ///
    /// It takes less than a microsecond for a decoding step, and allocates only if there are more tasks than at any time
    /// before.
    ///
    /// # Errors
    /// As [`Attention::prepare`](crate::Attention::prepare); the prepared attention is then unchanged.
    pub fn set_keys(&mut self, seq_kv: usize) -> Result<(), Error> {
        let [q, mut k, mut v] = self.planned.shapes;
        (k.1[2], v.1[2]) = (seq_kv, seq_kv);
        // The starts that calls will have: rows of the schedule are rows of these sequences.
        let starts = starts_of(&self.options, &self.planned.query_starts);
        let problem = Problem::of_shapes(&self.options, [q, k, v], (starts, Places::Dense))?;
        self.next.plan(&problem, self.planned.plan.replanned(&problem), &self.planned.query_starts)?;
        self.take_next();
        Ok(())
    }

    /// Plans again for other tensors, key lengths or pages. Options stay, query starts and lengths included.
    ///
    /// It is for the step of a server: lengths grow by a token, and all layers of the step are computed with the same plan. It takes some
    /// microseconds for each thousand tasks, and allocates only if there are more tasks or sequences than at any time before.
    ///
    /// # Errors
    /// As [`Attention::prepare`](crate::Attention::prepare); the prepared attention is then unchanged.
    pub fn replan<'t>(&mut self, q: impl Into<AnyTensorRef<'t>>, kv: impl Into<KeysValues<'t>>) -> Result<(), Error> {
        let starts = starts_of(&self.options, &self.planned.query_starts);
        let problem = Problem::with_query_starts(&self.options, starts, q.into(), kv.into())?;
        self.next.plan(&problem, self.planned.plan.replanned(&problem), &self.planned.query_starts)?;
        self.take_next();
        Ok(())
    }

    /// As [`replan`](Prepared::replan), with other [`query_starts`](crate::Attention::query_starts), which are copied: a step of a
    /// server, with any numbers of queries. The attention must have been prepared with query starts.
    ///
    /// # Errors
    /// As [`Attention::prepare`](crate::Attention::prepare), and [`Error::WrongCount`] if there are no query starts, or there were none
    /// before; the prepared attention is then unchanged.
    pub fn replan_packed<'t>(
        &mut self,
        q: impl Into<AnyTensorRef<'t>>,
        query_starts: &[usize],
        kv: impl Into<KeysValues<'t>>,
    ) -> Result<(), Error> {
        let expected = usize::from(self.options.query_starts.is_some());
        if query_starts.is_empty() || expected == 0 {
            return Err(Error::WrongCount { what: "query starts", expected, got: query_starts.len() });
        }
        let (q, kv) = (q.into(), kv.into());
        let problem = Problem::with_query_starts(&self.options, Some(query_starts.into()), q, kv)?;
        self.next.plan(&problem, self.planned.plan.replanned(&problem), query_starts)?;
        self.take_next();
        Ok(())
    }

    /// Computes attention as [`Attention::compute`](crate::Attention::compute), for tensors of the prepared shapes and sequences of the
    /// prepared lengths. Types, strides and pages may differ. The form stays the one for the prepared types.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for other shapes and lengths that fit together and fit the options; otherwise as
    /// [`Attention::compute`](crate::Attention::compute).
    pub fn compute<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        kv: impl Into<KeysValues<'t>>,
        out: impl Into<AnyTensorMut<'t>>,
        lse: impl Into<LseOutput<'t>>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let starts = starts_of(&self.options, &self.planned.query_starts);
        let problem = Problem::with_query_starts(&self.options, starts, q.into(), kv.into())?;
        self.call(problem, out.into(), lse.into())?.run(workspace);
        Ok(())
    }

    /// Sums the probabilities of each key as [`Attention::key_sums`](crate::Attention::key_sums), for tensors of the prepared shapes
    /// and sequences of the prepared lengths. It has no list of tasks, so nothing is saved but the options.
    ///
    /// # Errors
    /// As [`compute`](Prepared::compute).
    pub fn key_sums<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        kv: impl Into<KeysValues<'t>>,
        lse: impl Into<TensorRef<'t, f32, 3>>,
        sums: impl Into<TensorMut<'t, f32, 3>>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let starts = starts_of(&self.options, &self.planned.query_starts);
        let problem = Problem::with_query_starts(&self.options, starts, q.into(), kv.into())?;
        self.planned.check_sizes(&problem)?;
        let problem = problem.without_values();
        let plan = self.planned.plan.replanned(&problem);
        KeySumsCall::new(problem, plan, lse.into(), sums.into())?.run(workspace);
        Ok(())
    }

    /// Checks a call.
    pub(crate) fn call<'t>(
        &'t self,
        problem: Problem<'t>,
        out: AnyTensorMut<'t>,
        lse: LseOutput<'t>,
    ) -> Result<PreparedCall<'t>, Error> {
        self.planned.check_sizes(&problem)?;
        let output = checked_output(&problem, out, lse)?;
        let plan = self.planned.plan.for_types_of(&problem);
        Ok(PreparedCall { problem, plan, schedule: &self.planned.schedule, output })
    }
}

/// A checked call of a prepared attention.
pub(crate) struct PreparedCall<'a> {
    problem: Problem<'a>,
    plan: Plan,
    schedule: &'a Schedule,
    output: Output<'a>,
}

impl PreparedCall<'_> {
    /// Whether the plan uses several threads.
    #[cfg(feature = "capi")]
    pub(crate) fn is_parallel(&self) -> bool {
        self.plan.is_parallel()
    }

    pub(crate) fn run(self, workspace: &mut Workspace) {
        driver::run_scheduled(&self.problem, &self.plan, self.schedule, self.output, workspace);
    }
}

impl Planned {
    /// Refuses other sizes than the schedule is for.
    fn check_sizes(&self, problem: &Problem<'_>) -> Result<(), Error> {
        let shapes = |dims: &Dims| {
            let Dims { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim } = *dims;
            let kv = |dim| [batch, heads_kv, seq_kv, dim];
            [[batch, heads_q, seq_q, head_dim], kv(head_dim), kv(value_dim)]
        };
        let ([q, k, v], [q_shape, k_shape, v_shape]) = (shapes(&problem.dims), shapes(&self.dims));
        check_shape("queries", ["batch", "heads_q", "seq_q", "head_dim"], q, q_shape)?;
        check_shape("keys", ["batch", "heads_kv", "seq_kv", "head_dim"], k, k_shape)?;
        check_shape("values", ["batch", "heads_kv", "seq_kv", "value_dim"], v, v_shape)?;
        for b in
            0..if problem.sequences.keys.are_alike() && self.key_lengths.is_empty() { 0 } else { problem.dims.batch }
        {
            let (got, prepared) = (problem.sequences.keys.get(b), self.key_lengths.get(b));
            check_shape("keys", ["length of a sequence"], [got], [*prepared.unwrap_or(&self.dims.seq_kv)])?;
        }
        // Tasks leave out the keys that a rotating cache has lost.
        let (got, held) = (held_by(problem).unwrap_or([0, 0]), self.held.unwrap_or([0, 0]));
        check_shape("keys", ["first tokens of the cache", "window of the cache"], got, held)
    }
}

/// The first tokens and the last ones that a rotating cache holds.
fn held_by(problem: &Problem<'_>) -> Option<[usize; 2]> {
    if let Places::Ring(ring) = problem.places { Some([ring.first, ring.window]) } else { None }
}

/// The starts that were copied, or else those of the options.
fn starts_of<'s>(options: &Options<'s>, copied: &'s [usize]) -> Option<Integers<'s>> {
    if copied.is_empty() { options.query_starts } else { Some(copied.into()) }
}

fn shapes_of(problem: &Problem<'_>) -> [(DType, [usize; 4]); 3] {
    [&problem.q, &problem.k, &problem.v].map(|tensor| (tensor.dtype(), tensor.shape()))
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
