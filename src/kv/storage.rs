//! The memory of keys and values that a cache owns. Tokens are checked, converted and written here, whatever the cache.

#![forbid(unsafe_code)]

use super::format::KvFormat;
use crate::element::{ByElement, DType, Element, bf16, f16, with_elements};
use crate::error::Error;
use crate::rotary::{Positions, Rotary, rotate_row};
use crate::simd::rows::convert_row;
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::any::AnyTensor;
use crate::tensor::strided::{Strided, contiguous};
use crate::tensor::{AnyTensorRef, TensorRef};
use std::fmt;
use std::ops::Range;

/// The tokens of an append, checked against the cache's format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokens<'a> {
    /// `[batch, heads_kv, count, head_dim]`
    k: AnyTensor<'a>,
    /// `[batch, heads_kv, count, value_dim]`
    v: AnyTensor<'a>,
    pub(super) batch: usize,
    /// Tokens of each sequence.
    pub(super) count: usize,
    rotation: Option<Rotation<'a>>,
}

/// How keys are rotated while they are written.
#[derive(Clone, Copy, Debug)]
struct Rotation<'a> {
    rotary: &'a Rotary,
    /// `None`: a token's position is the number of tokens before it.
    positions: Option<Positions<'a>>,
}

impl<'a> Tokens<'a> {
    /// Refuses shapes other than `[batch, heads_kv, count, head_dim]` and `[batch, heads_kv, count, value_dim]`.
    pub(super) fn new(
        format: &KvFormat,
        batch: usize,
        k: AnyTensorRef<'a>,
        v: AnyTensorRef<'a>,
    ) -> Result<Self, Error> {
        for (tensor, rank) in [("keys", k.rank()), ("values", v.rank())] {
            if rank != 4 {
                return Err(Error::Rank { tensor, expected: 4, got: rank });
            }
        }
        let count = k.shape()[2];
        let check = |tensor, dimension, got: usize, expected: usize| {
            if got == expected { Ok(()) } else { Err(Error::ShapeMismatch { tensor, dimension, expected, got }) }
        };
        for (tensor, shape, dim) in [("keys", k.shape(), format.head_dim), ("values", v.shape(), format.value_dim)] {
            check(tensor, "batch", shape[0], batch)?;
            check(tensor, "heads_kv", shape[1], format.heads_kv)?;
            check(tensor, "seq_kv", shape[2], count)?;
            check(tensor, if tensor == "keys" { "head_dim" } else { "value_dim" }, shape[3], dim)?;
        }
        Ok(Tokens { k: k.tensor, v: v.tensor, batch, count, rotation: None })
    }

    /// The same tokens, whose keys are to be rotated. Without positions, the first token of sequence `b` is at `lengths[b]`.
    pub(super) fn rotated(
        self,
        rotary: &'a Rotary,
        positions: Option<Positions<'a>>,
        lengths: &[usize],
    ) -> Result<Self, Error> {
        let head_dim = self.k.shape()[3];
        let checked = positions.unwrap_or(Positions::per_batch(lengths));
        rotary.check("keys", self.batch, self.count, head_dim, checked)?;
        Ok(Tokens { rotation: Some(Rotation { rotary, positions }), ..self })
    }
}

/// Keys and values of one layer: `[outer, heads_kv, rows, dim]` each. The outer axis is sequences or pages.
#[derive(Debug)]
pub(super) struct Storage {
    k: Memory,
    v: Memory,
}

/// Where tokens are written, and which.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The index of the outer axis, and the row of the first token.
    pub(super) outer: usize,
    pub(super) row: usize,
    /// The sequence of the tokens, and which of its tokens.
    pub(super) batch: usize,
    pub(super) tokens: Range<usize>,
    /// The tokens of the sequence before all of these: the position of token 0.
    pub(super) before: usize,
}

impl Storage {
    pub(super) fn new(format: &KvFormat, outer: usize, rows: usize) -> Result<Self, Error> {
        let memory = |dim| Memory::new(format.dtype, [outer, format.heads_kv, rows, dim]);
        Ok(Storage { k: memory(format.head_dim)?, v: memory(format.value_dim)? })
    }

    pub(super) fn keys(&self) -> AnyTensorRef<'_> {
        self.k.view()
    }

    pub(super) fn values(&self) -> AnyTensorRef<'_> {
        self.v.view()
    }

    pub(super) fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// Writes some tokens to neighbouring rows, in their order.
    ///
    /// # Panics
    /// If there are no such tokens or rows.
    pub(super) fn write(&mut self, tokens: &Tokens<'_>, place: Place) {
        self.k.write(&tokens.k, &place, tokens.rotation);
        self.v.write(&tokens.v, &place, None);
    }

    /// Copies rows of all heads from one index of the outer axis to the same rows of another.
    ///
    /// # Panics
    /// If there are no such rows.
    pub(super) fn copy_rows(&mut self, from: usize, to: usize, rows: Range<usize>) {
        self.k.copy_rows(from, to, rows.clone());
        self.v.copy_rows(from, to, rows);
    }
}

/// The memory of one tensor, without gaps.
struct Memory {
    data: ByElement<Vec<f32>, Vec<f16>, Vec<bf16>>,
    /// `[outer, heads_kv, rows, dim]`
    shape: [usize; 4],
}

impl Memory {
    /// Zeros. They are written, so that no append waits for the system to find memory.
    fn new(dtype: DType, shape: [usize; 4]) -> Result<Self, Error> {
        const TOO_LARGE: Error = Error::TooLarge { what: "the cache" };
        fn zeros<T: Element>(len: usize) -> Result<Vec<T>, Error> {
            let mut data = Vec::new();
            data.try_reserve_exact(len).map_err(|_| TOO_LARGE)?;
            data.resize(len, T::default());
            Ok(data)
        }
        let (_, len) = contiguous(&shape).map_err(|_| TOO_LARGE)?;
        let data = match dtype {
            DType::F32 => ByElement::F32(zeros(len)?),
            DType::F16 => ByElement::F16(zeros(len)?),
            DType::Bf16 => ByElement::Bf16(zeros(len)?),
        };
        Ok(Memory { data, shape })
    }

    fn view(&self) -> AnyTensorRef<'_> {
        fn view<T: Element>(data: &[T], shape: [usize; 4]) -> AnyTensorRef<'_> {
            TensorRef::from_slice(data, shape).expect("the length is that of the shape").into()
        }
        with_elements!(&self.data, data => view(data, self.shape))
    }

    fn bytes(&self) -> usize {
        with_elements!(&self.data, data => size_of_val(&data[..]))
    }

    fn write(&mut self, from: &AnyTensor<'_>, place: &Place, rotation: Option<Rotation<'_>>) {
        let shape = self.shape;
        match (from, &mut self.data, rotation) {
            // The same type: the bits as they are.
            (ByElement::F32(from), ByElement::F32(to), None) => copy_tokens(from, to, shape, place),
            (ByElement::F16(from), ByElement::F16(to), None) => copy_tokens(from, to, shape, place),
            (ByElement::Bf16(from), ByElement::Bf16(to), None) => copy_tokens(from, to, shape, place),
            (from, to, None) => with_elements!(from, from => with_elements!(to, to => {
                Isa::best().run(Convert { from, to, shape, place });
            })),
            (from, to, Some(rotation)) => with_elements!(from, from => with_elements!(to, to => {
                Isa::best().run(Rotate { from, to, shape, place, rotation });
            })),
        }
    }

    fn copy_rows(&mut self, from: usize, to: usize, rows: Range<usize>) {
        let shape = self.shape;
        // Without elements there may be any number of heads.
        let heads = if rows.is_empty() || shape[3] == 0 { 0 } else { shape[1] };
        with_elements!(&mut self.data, data => for h in 0..heads {
            let start = rows_of(shape, to, h, rows.clone()).start;
            data.copy_within(rows_of(shape, from, h, rows.clone()), start);
        });
    }
}

/// The type and the shape; the elements are too many.
impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.data.dtype(), self.shape)
    }
}

/// The elements of some rows of head `h`.
fn rows_of([outer, heads, all, dim]: [usize; 4], o: usize, h: usize, rows: Range<usize>) -> Range<usize> {
    assert!(o < outer && h < heads && rows.start <= rows.end && rows.end <= all, "rows {rows:?} of {all}");
    // In this order, no product is larger than the memory, which may be empty with any numbers of heads and rows.
    let first = (o * heads + h) * (all * dim);
    first + rows.start * dim..first + rows.end * dim
}

/// The heads of the sequence or page of a place: the rows to write of each, side by side.
#[inline(always)]
fn heads_of<'a, U>(
    to: &'a mut [U],
    [outer, heads, rows, dim]: [usize; 4],
    place: &Place,
) -> impl Iterator<Item = &'a mut [U]> + use<'a, U> {
    assert!(place.outer < outer && place.row + place.tokens.len() <= rows, "{place:?} of {outer} times {rows} rows");
    // Without elements there is nothing to write, and the other numbers may be anything.
    let dim = if to.is_empty() { 0 } else { dim };
    let (head, all) = (rows * dim, heads * (rows * dim));
    let written = place.row * dim..(place.row + place.tokens.len()) * dim;
    to[place.outer * all..][..all].chunks_exact_mut(head.max(1)).map(move |head| &mut head[written.clone()])
}

fn copy_tokens<T: Element>(from: &Strided<'_, T, 4>, to: &mut [T], shape: [usize; 4], place: &Place) {
    for (h, to) in heads_of(to, shape, place).enumerate() {
        let rows = from.matrix(place.batch, h);
        for (token, to) in place.tokens.clone().zip(to.chunks_exact_mut(shape[3])) {
            match rows.row(token).as_slice() {
                Some(from) => to.copy_from_slice(from),
                None => to.iter_mut().zip(rows.row(token).iter()).for_each(|(to, from)| *to = from),
            }
        }
    }
}

/// Writes tokens of one type as another.
struct Convert<'a, 't, T, U> {
    from: &'a Strided<'t, T, 4>,
    to: &'a mut [U],
    shape: [usize; 4],
    place: &'a Place,
}

impl<T: Element, U: Element> Kernel for Convert<'_, '_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (h, to) in heads_of(self.to, self.shape, self.place).enumerate() {
            let rows = self.from.matrix(self.place.batch, h);
            for (token, to) in self.place.tokens.clone().zip(to.chunks_exact_mut(self.shape[3])) {
                convert_row(simd, rows.row(token), to.into());
            }
        }
    }
}

/// Rotates keys, and writes them in any type.
struct Rotate<'a, 't, T, U> {
    from: &'a Strided<'t, T, 4>,
    to: &'a mut [U],
    shape: [usize; 4],
    place: &'a Place,
    rotation: Rotation<'a>,
}

impl<T: Element, U: Element> Kernel for Rotate<'_, '_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (Rotation { rotary, positions }, count) = (self.rotation, self.from.shape()[2]);
        // Without positions, token 0 follows those before it, whatever the sequence.
        let positions = positions.unwrap_or(Positions::Start(self.place.before));
        for (h, to) in heads_of(self.to, self.shape, self.place).enumerate() {
            let rows = self.from.matrix(self.place.batch, h);
            for (token, to) in self.place.tokens.clone().zip(to.chunks_exact_mut(self.shape[3])) {
                let angles = rotary.angles_of(positions, self.place.batch, token, count);
                rotate_row(simd, rows.row(token), to.into(), angles);
            }
        }
    }
}
