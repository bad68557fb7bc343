//! Seeded numbers and the problems made of them: one generator for tests and benches.
//!
//! Tests include this file by its path. It lies here because benches are packaged and tests are not.

#![allow(dead_code, unreachable_pub, reason = "each test and bench uses its part, and is a crate of its own")]

use flashtile::{Element, TensorRef};

/// SplitMix64: small, seeded, the same everywhere.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Roughly normal, variance 1, between -6 and 6: half the sum of twelve uniform numbers.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() / 2.0
    }

    /// `n` numbers from [`Rng::normal`], rounded to a type.
    pub fn normals<T: Element>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::from_f32(self.normal())).collect()
    }
}

/// The dimensions of a problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dims {
    pub batch: usize,
    pub heads_q: usize,
    pub heads_kv: usize,
    pub seq_q: usize,
    pub seq_kv: usize,
    pub head_dim: usize,
    pub value_dim: usize,
}

impl Dims {
    /// Batch 1, one key/value head for each query head, `value_dim` equal to `head_dim`.
    pub const fn new(heads: usize, seq_q: usize, seq_kv: usize, dim: usize) -> Self {
        Dims { batch: 1, heads_q: heads, heads_kv: heads, seq_q, seq_kv, head_dim: dim, value_dim: dim }
    }

    pub fn q(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.seq_q, self.head_dim]
    }
    pub fn k(&self) -> [usize; 4] {
        [self.batch, self.heads_kv, self.seq_kv, self.head_dim]
    }
    pub fn v(&self) -> [usize; 4] {
        [self.batch, self.heads_kv, self.seq_kv, self.value_dim]
    }
    pub fn out(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.seq_q, self.value_dim]
    }
    pub fn lse(&self) -> [usize; 3] {
        [self.batch, self.heads_q, self.seq_q]
    }
    pub fn scores(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.seq_q, self.seq_kv]
    }

    /// Every (batch, query head, query), in the order of memory.
    pub fn rows(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let [batch, heads, queries] = self.lse();
        // (By division: valgrind takes the state of a flattened iterator for uninitialised.)
        (0..batch * heads * queries).map(move |n| [n / queries / heads, n / queries % heads, n % queries])
    }

    /// The key/value head of query head `h`.
    pub fn head_kv(&self, h: usize) -> usize {
        h / (self.heads_q / self.heads_kv)
    }
}

/// The number of elements of a shape.
pub fn len<const N: usize>(shape: [usize; N]) -> usize {
    shape.iter().product()
}

/// Queries, keys and values without gaps.
#[derive(Clone, Debug)]
pub struct Inputs<T> {
    pub dims: Dims,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
}

impl<T: Element> Inputs<T> {
    /// Roughly normal numbers.
    pub fn random(dims: Dims, rng: &mut Rng) -> Self {
        let [q, k, v] = [dims.q(), dims.k(), dims.v()].map(|shape| rng.normals(len(shape)));
        Inputs { dims, q, k, v }
    }

    pub fn q(&self) -> TensorRef<'_, T> {
        TensorRef::from_slice(&self.q, self.dims.q()).expect("the length is that of the shape")
    }
    pub fn k(&self) -> TensorRef<'_, T> {
        TensorRef::from_slice(&self.k, self.dims.k()).expect("the length is that of the shape")
    }
    pub fn v(&self) -> TensorRef<'_, T> {
        TensorRef::from_slice(&self.v, self.dims.v()).expect("the length is that of the shape")
    }
}
