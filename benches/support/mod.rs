//! Problems with data whose answers are checked against the definition, and the best times of runs that take turns.

#![allow(dead_code, reason = "each bench uses its part")]

pub(crate) mod machine;
pub(crate) mod seeded;

use flashtile::{Attention, Element, Plan, QueryOffset, TensorMut, TensorRef, Threads, Workspace, reference};
use seeded::len;
use std::error::Error;
use std::time::Instant;

pub(crate) use seeded::{Dims, Inputs, Rng};

/// Work and names.
impl Dims {
    /// Visible pairs of query and key under these masks. The last query is at the last key.
    pub(crate) fn pairs(&self, causal: bool, left: Option<usize>) -> usize {
        let keys = |i: usize| {
            let p = (self.seq_kv + i) as isize - self.seq_q as isize;
            let start = left.map_or(0, |left| p - left as isize).max(0);
            let end = if causal { p + 1 } else { self.seq_kv as isize };
            (end - start).max(0) as usize
        };
        self.batch * self.heads_q * (0..self.seq_q).map(keys).sum::<usize>()
    }

    /// Floating-point operations of both products over `pairs` pairs. A multiply-add counts as two.
    pub(crate) fn flops(&self, pairs: usize) -> f64 {
        2.0 * pairs as f64 * (self.head_dim + self.value_dim) as f64
    }

    /// Elements of keys and values.
    pub(crate) fn kv_elements(&self) -> usize {
        self.batch * self.heads_kv * self.seq_kv * (self.head_dim + self.value_dim)
    }

    /// Elements of queries and output.
    pub(crate) fn query_elements(&self) -> usize {
        self.batch * self.heads_q * self.seq_q * (self.head_dim + self.value_dim)
    }

    /// `b1h32g4q1kv8192d128`: 32 query heads in groups of 4 to a key/value head (if more than 1), and so on.
    pub(crate) fn name(&self) -> String {
        let group = self.heads_q / self.heads_kv;
        let group = if group == 1 { String::new() } else { format!("g{group}") };
        format!("b{}h{}{group}q{}kv{}d{}", self.batch, self.heads_q, self.seq_q, self.seq_kv, self.head_dim)
    }
}

/// How a problem of these dimensions and one type would be computed.
pub(crate) fn plan<T: Element>(dims: Dims, attention: &Attention<'_>) -> Result<Plan, flashtile::Error> {
    let [q, k, v] = [dims.q(), dims.k(), dims.v()].map(|shape| (T::DTYPE, shape));
    attention.plan_shapes(q, k, v)
}

/// A problem with seeded data. Its memory is kept between calls.
pub(crate) struct Case<T> {
    attention: Attention<'static>,
    pub(crate) inputs: Inputs<T>,
    /// Keys and values again, in another layout.
    cache: Option<[Arranged<T>; 2]>,
    out: Vec<T>,
    workspace: Workspace,
}

/// How keys and values lie in memory.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Layout {
    /// The heads of a key side by side.
    Bshd,
    /// 64 bytes between rows.
    Padded,
    /// The keys of an element side by side.
    Transposed,
}

/// A tensor in a layout, from the first element that is aligned to a cache line on.
struct Arranged<T> {
    data: Vec<T>,
    first: usize,
    shape: [usize; 4],
    strides: [isize; 4],
}

impl<T: Element> Arranged<T> {
    fn new(from: &[T], shape: [usize; 4], layout: Layout) -> Self {
        let [batch, heads, seq, dim] = shape;
        let row = dim + if layout == Layout::Padded { LINE / size_of::<T>() } else { 0 };
        let strides = match layout {
            Layout::Bshd => [seq * heads * row, row, heads * row, 1],
            Layout::Padded => [heads * seq * row, seq * row, row, 1],
            Layout::Transposed => [heads * seq * row, seq * row, 1, seq],
        };
        let mut data = vec![T::default(); batch * heads * seq * row + LINE];
        let first = data.as_ptr().align_offset(LINE);
        for (n, &element) in from.iter().enumerate() {
            let index = [n / dim / seq / heads, n / dim / seq % heads, n / dim % seq, n % dim];
            data[first + index.iter().zip(strides).map(|(index, stride)| index * stride).sum::<usize>()] = element;
        }
        Self { data, first, shape, strides: strides.map(|stride| stride as isize) }
    }

    fn view(&self) -> Result<TensorRef<'_, T>, flashtile::Error> {
        TensorRef::with_strides(&self.data, self.first, self.shape, self.strides)
    }
}

const LINE: usize = 64;

impl<T: Element> Case<T> {
    pub(crate) fn new(dims: Dims, attention: Attention<'static>) -> Self {
        // NaN: what a call does not write fails the check.
        let out = vec![T::from_f32(f32::NAN); len(dims.out())];
        Self { attention, inputs: Inputs::random(dims, &mut Rng(1)), cache: None, out, workspace: Workspace::new() }
    }

    /// The same problem with keys and values in another layout.
    pub(crate) fn in_layout(mut self, layout: Layout) -> Self {
        let Inputs { dims, k, v, .. } = &self.inputs;
        self.cache = Some([Arranged::new(k, dims.k(), layout), Arranged::new(v, dims.v(), layout)]);
        self
    }

    /// Bytes that calls hold beside their tensors.
    pub(crate) fn extra_bytes(&self) -> usize {
        self.workspace.bytes()
    }

    /// Computes it.
    pub(crate) fn run(&mut self) -> Result<(), flashtile::Error> {
        let Self { attention, inputs, cache, out, workspace } = self;
        let out = TensorMut::from_slice(out, inputs.dims.out())?;
        let (k, v) = match cache {
            Some([k, v]) => (k.view()?, v.view()?),
            None => (inputs.k(), inputs.v()),
        };
        attention.compute(inputs.q(), (k, v), out, None, workspace)
    }

    /// Computes it on the calling thread alone.
    pub(crate) fn run_serially(&mut self) -> Result<(), flashtile::Error> {
        let serial = self.attention.clone().threads(Threads::Serial);
        let usual = std::mem::replace(&mut self.attention, serial);
        let done = self.run();
        self.attention = usual;
        done
    }

    /// Computes it and compares some of its rows, up to a dozen, with the definition.
    pub(crate) fn checked(self) -> Result<Self, Box<dyn Error>> {
        let attention = self.attention.clone();
        self.checked_by(|_, _| attention.clone())
    }

    /// As [`Case::checked`], where options differ from row to row: `options_of(h, i)` are those of query `i` of head `h`
    /// alone. The query's position is added here.
    pub(crate) fn checked_by(
        mut self,
        options_of: impl Fn(usize, usize) -> Attention<'static>,
    ) -> Result<Self, Box<dyn Error>> {
        self.run()?;
        let Dims { batch, heads_q, seq_q, .. } = self.inputs.dims;
        for (b, h) in [(0, 0), (batch / 3, heads_q / 3), (batch - 1, heads_q - 1)] {
            for i in [0, seq_q / 3, seq_q / 2, seq_q - 1] {
                self.check_row([b, h, i], options_of(h, i))?;
            }
        }
        Ok(self)
    }

    fn check_row(&self, [b, h, i]: [usize; 3], options: Attention<'_>) -> Result<(), Box<dyn Error>> {
        let Dims { heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, .. } = self.inputs.dims;
        let (row, head) = ((b * heads_q + h) * seq_q + i, b * heads_kv + self.inputs.dims.head_kv(h));
        let Inputs { q, k, v, .. } = &self.inputs;
        let expected = reference::attention(
            &options.query_offset(QueryOffset::At((seq_kv + i) as isize - seq_q as isize)),
            TensorRef::from_slice(&q[row * head_dim..][..head_dim], [1, 1, 1, head_dim])?,
            (
                TensorRef::from_slice(&k[head * seq_kv * head_dim..][..seq_kv * head_dim], [1, 1, seq_kv, head_dim])?,
                TensorRef::from_slice(
                    &v[head * seq_kv * value_dim..][..seq_kv * value_dim],
                    [1, 1, seq_kv, value_dim],
                )?,
            ),
        )?;
        // The error of f32, then one rounding to the type: half a unit of its last place.
        let rounding = unit::<T>() as f64 / 2.0;
        for (got, expected) in self.out[row * value_dim..][..value_dim].iter().zip(&expected.out) {
            let error = (got.to_f32() as f64 - expected).abs();
            if error.is_nan() || error > 1e-5 + rounding * expected.abs() {
                let dims = self.inputs.dims.name();
                let place = format!("batch {b} head {h} query {i}");
                return Err(format!("{dims} {}, {place}: {got:?}, not {expected}", T::DTYPE).into());
            }
        }
        Ok(())
    }
}

/// The distance from 1 to the next number of a type.
fn unit<T: Element>() -> f32 {
    (1..30).map(|n| 0.5f32.powi(n)).take_while(|&x| T::from_f32(1.0 + x).to_f32() != 1.0).last().unwrap_or(1.0)
}

/// Something to time.
pub(crate) type Run<'a> = Box<dyn FnMut() -> Result<(), flashtile::Error> + 'a>;

/// The shortest time of each run in seconds. Runs take turns, so that a slow spell of the machine affects all of them.
pub(crate) fn best_times(rounds: usize, runs: &mut [Run<'_>]) -> Result<Vec<f64>, flashtile::Error> {
    let mut best = vec![f64::INFINITY; runs.len()];
    for _ in 0..rounds {
        for (run, best) in runs.iter_mut().zip(&mut best) {
            let start = Instant::now();
            run()?;
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    Ok(best)
}

/// `rounds` under `cargo bench`. One under `cargo test --benches`, which only shows that everything runs.
pub(crate) fn rounds(rounds: usize) -> usize {
    if std::env::args().any(|arg| arg == "--bench") { rounds } else { 1 }
}
