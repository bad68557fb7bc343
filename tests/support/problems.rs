//! Small problems: their sizes, their inputs, and one call that gives output and log-sum-exps back.

use super::Rng;
use flashtile::{Attention, Element, Form, Level, TensorMut, TensorRef, Workspace, bf16, f16};
use std::fmt::Debug;

/// Both forms.
pub const FORMS: [Form; 2] = [Form::Decode, Form::Prefill];

/// Every form at every level of this processor.
pub fn forms_and_levels() -> impl Iterator<Item = (Form, Level)> {
    Level::available().flat_map(|level| FORMS.map(|form| (form, level)))
}

/// The sizes of a problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    pub batch: usize,
    pub heads_q: usize,
    pub heads_kv: usize,
    pub seq_q: usize,
    pub seq_kv: usize,
    pub head_dim: usize,
    pub value_dim: usize,
}

impl Sizes {
    /// One batch, one head, as many values as elements of a key.
    pub fn single(seq_q: usize, seq_kv: usize, head_dim: usize) -> Self {
        Sizes { batch: 1, heads_q: 1, heads_kv: 1, seq_q, seq_kv, head_dim, value_dim: head_dim }
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

/// An element type with its unpleasant bit patterns.
pub trait Bits: Element + PartialEq {
    /// NaNs, quiet and signalling, of either sign; infinities; the largest numbers; the smallest; -0.
    const POISON: [Self; 11];
    /// The bits, NaNs of any payload taken as one.
    fn bits(self) -> u32 {
        let wide = self.to_f32();
        if wide.is_nan() { f32::NAN.to_bits() } else { wide.to_bits() }
    }
}

impl Bits for f32 {
    const POISON: [f32; 11] = [
        f32::NAN,
        f32::from_bits(0xffc0_0001),
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xff80_0001),
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::from_bits(1),
        f32::from_bits(0x8000_0001),
        -0.0,
    ];
}
impl Bits for f16 {
    const POISON: [f16; 11] = [
        f16::from_bits(0x7e00),
        f16::from_bits(0xfe01),
        f16::from_bits(0x7c01),
        f16::from_bits(0xfc01),
        f16::from_bits(0x7c00),
        f16::from_bits(0xfc00),
        f16::from_bits(0x7bff),
        f16::from_bits(0xfbff),
        f16::from_bits(1),
        f16::from_bits(0x8001),
        f16::from_bits(0x8000),
    ];
}
impl Bits for bf16 {
    const POISON: [bf16; 11] = [
        bf16::from_bits(0x7fc0),
        bf16::from_bits(0xffc1),
        bf16::from_bits(0x7f81),
        bf16::from_bits(0xff81),
        bf16::from_bits(0x7f80),
        bf16::from_bits(0xff80),
        bf16::from_bits(0x7f7f),
        bf16::from_bits(0xff7f),
        bf16::from_bits(1),
        bf16::from_bits(0x8001),
        bf16::from_bits(0x8000),
    ];
}

/// The bits of every element.
pub fn bits<T: Bits>(x: &[T]) -> Vec<u32> {
    x.iter().map(|x| x.bits()).collect()
}

/// Queries, keys and values without gaps.
#[derive(Clone, Debug)]
pub struct Inputs<T> {
    pub sizes: Sizes,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
}

pub fn len<const N: usize>(shape: [usize; N]) -> usize {
    shape.iter().product()
}

impl<T: Bits> Inputs<T> {
    pub fn random(sizes: Sizes, rng: &mut Rng) -> Self {
        let mut normals = |n| (0..n).map(|_| T::from_f32(rng.normal())).collect::<Vec<T>>();
        let (q, k, v) = (normals(len(sizes.q())), normals(len(sizes.k())), normals(len(sizes.v())));
        Inputs { sizes, q, k, v }
    }

    pub fn q(&self) -> TensorRef<'_, T> {
        TensorRef::from_slice(&self.q, self.sizes.q()).unwrap()
    }
    pub fn k(&self) -> TensorRef<'_, T> {
        TensorRef::from_slice(&self.k, self.sizes.k()).unwrap()
    }
    pub fn v(&self) -> TensorRef<'_, T> {
        TensorRef::from_slice(&self.v, self.sizes.v()).unwrap()
    }

    /// Output and log-sum-exps.
    pub fn compute(&self, attention: &Attention<'_>) -> (Vec<T>, Vec<f32>) {
        self.compute_with(attention, &mut Workspace::new())
    }

    pub fn compute_with(&self, attention: &Attention<'_>, workspace: &mut Workspace) -> (Vec<T>, Vec<f32>) {
        // What was there before must not matter.
        let (mut out, mut lse) = (vec![T::POISON[2]; len(self.sizes.out())], vec![f32::NAN; len(self.sizes.lse())]);
        let out_tensor = TensorMut::from_slice(&mut out, self.sizes.out()).unwrap();
        let lse_tensor = TensorMut::from_slice(&mut lse, self.sizes.lse()).unwrap();
        attention.compute(self.q(), self.k(), self.v(), out_tensor, Some(lse_tensor), workspace).unwrap();
        (out, lse)
    }

    /// The bits of output and log-sum-exps.
    pub fn bits(&self, attention: &Attention<'_>) -> (Vec<u32>, Vec<u32>) {
        let (out, lse) = self.compute(attention);
        (bits(&out), bits(&lse))
    }
}
