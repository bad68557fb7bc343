//! Problems with data, checked against the definition, and times that a busy machine spoils as little as possible.

#![allow(dead_code, reason = "each bench uses its part")]

pub(crate) mod machine;

use flashtile::{Attention, Element, Plan, QueryOffset, TensorMut, TensorRef, Threads, Workspace, reference};
use std::error::Error;
use std::time::Instant;

/// The sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) heads_q: usize,
    pub(crate) heads_kv: usize,
    pub(crate) seq_q: usize,
    pub(crate) seq_kv: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
}

impl Sizes {
    /// Batch 1, as many key/value heads as query heads, and one size of head.
    pub(crate) const fn new(heads: usize, seq_q: usize, seq_kv: usize, dim: usize) -> Self {
        Self { batch: 1, heads_q: heads, heads_kv: heads, seq_q, seq_kv, head_dim: dim, value_dim: dim }
    }

    /// Pairs of query and key that a mask of these properties shows, the last query standing at the last key.
    pub(crate) fn pairs(&self, causal: bool, left: Option<usize>) -> usize {
        let keys = |i: usize| {
            let p = (self.seq_kv + i) as isize - self.seq_q as isize;
            let start = left.map_or(0, |left| p - left as isize).max(0);
            let end = if causal { p + 1 } else { self.seq_kv as isize };
            (end - start).max(0) as usize
        };
        self.batch * self.heads_q * (0..self.seq_q).map(keys).sum::<usize>()
    }

    /// Operations of both products over so many pairs, a multiply-add being two.
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

    /// The shapes of queries, keys, values and output.
    pub(crate) fn shapes(&self) -> [[usize; 4]; 4] {
        let Sizes { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim } = *self;
        [
            [batch, heads_q, seq_q, head_dim],
            [batch, heads_kv, seq_kv, head_dim],
            [batch, heads_kv, seq_kv, value_dim],
            [batch, heads_q, seq_q, value_dim],
        ]
    }

    /// `b1h32g4q1kv8192d128`: 32 query heads in groups of 4 to a key/value head (if more than 1), and so on.
    pub(crate) fn name(&self) -> String {
        let group = self.heads_q / self.heads_kv;
        let group = if group == 1 { String::new() } else { format!("g{group}") };
        format!("b{}h{}{group}q{}kv{}d{}", self.batch, self.heads_q, self.seq_q, self.seq_kv, self.head_dim)
    }
}

/// A problem with seeded data, whose memory is kept between calls.
pub(crate) struct Case<T> {
    pub(crate) sizes: Sizes,
    attention: Attention<'static>,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    out: Vec<T>,
    workspace: Workspace,
}

impl<T: Element> Case<T> {
    pub(crate) fn new(sizes: Sizes, attention: Attention<'static>) -> Self {
        let [q, k, v, out] = sizes.shapes().map(|shape| shape.iter().product());
        Self {
            sizes,
            attention,
            q: numbers(q, 1),
            k: numbers(k, 2),
            v: numbers(v, 3),
            out: numbers(out, 4),
            workspace: Workspace::new(),
        }
    }

    pub(crate) fn tensors(&self) -> Result<[TensorRef<'_, T>; 3], flashtile::Error> {
        let [q, k, v, _] = self.sizes.shapes();
        Ok([TensorRef::from_slice(&self.q, q)?, TensorRef::from_slice(&self.k, k)?, TensorRef::from_slice(&self.v, v)?])
    }

    /// How it is computed.
    pub(crate) fn plan(&self) -> Result<Plan, flashtile::Error> {
        let [q, k, v] = self.tensors()?;
        self.attention.plan(q, k, v)
    }

    /// Bytes that calls have needed beside their output.
    pub(crate) fn extra_bytes(&self) -> usize {
        self.workspace.bytes()
    }

    /// Computes it.
    pub(crate) fn run(&mut self) -> Result<(), flashtile::Error> {
        let mut workspace = std::mem::take(&mut self.workspace);
        let mut out = std::mem::take(&mut self.out);
        let [q, k, v] = self.tensors()?;
        let [.., shape] = self.sizes.shapes();
        let done = self.attention.compute(q, k, v, TensorMut::from_slice(&mut out, shape)?, None, &mut workspace);
        (self.workspace, self.out) = (workspace, out);
        done
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
        self.checked_by(|attention, _, _| attention)
    }

    /// As [`Case::checked`], where options differ from row to row: `options_of(attention, h, i)` makes of the options of
    /// all those of query `i` of head `h` alone. (The query's position is seen to here.)
    pub(crate) fn checked_by(
        mut self,
        options_of: impl Fn(Attention<'static>, usize, usize) -> Attention<'static>,
    ) -> Result<Self, Box<dyn Error>> {
        self.run()?;
        let Sizes { batch, heads_q, seq_q, .. } = self.sizes;
        for (b, h) in [(0, 0), (batch / 3, heads_q / 3), (batch - 1, heads_q - 1)] {
            for i in [0, seq_q / 3, seq_q / 2, seq_q - 1] {
                self.check_row([b, h, i], options_of(self.attention.clone(), h, i))?;
            }
        }
        Ok(self)
    }

    fn check_row(&self, [b, h, i]: [usize; 3], options: Attention<'_>) -> Result<(), Box<dyn Error>> {
        let Sizes { heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, .. } = self.sizes;
        let (row, head) = ((b * heads_q + h) * seq_q + i, b * heads_kv + h * heads_kv / heads_q);
        let expected = reference::attention(
            &options.query_offset(QueryOffset::At((seq_kv + i) as isize - seq_q as isize)),
            TensorRef::from_slice(&self.q[row * head_dim..][..head_dim], [1, 1, 1, head_dim])?,
            TensorRef::from_slice(&self.k[head * seq_kv * head_dim..][..seq_kv * head_dim], [1, 1, seq_kv, head_dim])?,
            TensorRef::from_slice(
                &self.v[head * seq_kv * value_dim..][..seq_kv * value_dim],
                [1, 1, seq_kv, value_dim],
            )?,
        )?;
        // The error of f32, then one rounding to the type: half a unit of its last place.
        let rounding = unit::<T>() as f64 / 2.0;
        for (got, expected) in self.out[row * value_dim..][..value_dim].iter().zip(&expected.out) {
            let error = (got.to_f32() as f64 - expected).abs();
            if error.is_nan() || error > 1e-5 + rounding * expected.abs() {
                let sizes = self.sizes.name();
                let place = format!("batch {b} head {h} query {i}");
                return Err(format!("{sizes} {}, {place}: {got:?}, not {expected}", T::DTYPE).into());
            }
        }
        Ok(())
    }
}

/// The distance from 1 to the next number of a type.
fn unit<T: Element>() -> f32 {
    (1..30).map(|n| 0.5f32.powi(n)).take_while(|&x| T::from_f32(1.0 + x).to_f32() != 1.0).last().unwrap_or(1.0)
}

/// Roughly normal numbers, the same everywhere: sums of four uniform ones, from a multiplicative hash of the index.
pub(crate) fn numbers<T: Element>(n: usize, seed: u64) -> Vec<T> {
    let number = |n: u64| {
        let mut z = (n ^ seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^= z >> 32;
        let sum: u64 = (0..4).map(|part| z >> (16 * part) & 0xffff).sum();
        T::from_f32((sum as f32 / 65536.0 - 2.0) * 1.732)
    };
    (0..n as u64).map(number).collect()
}

/// Something to time.
pub(crate) type Run<'a> = Box<dyn FnMut() -> Result<(), flashtile::Error> + 'a>;

/// The shortest time of each run in seconds. They take turns, so that a slow spell of the machine hits all alike.
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

/// Whether this is `cargo bench`; without it (`cargo test --benches`), one round will do to see that all runs.
pub(crate) fn rounds(many: usize) -> usize {
    if std::env::args().any(|arg| arg == "--bench") { many } else { 1 }
}
