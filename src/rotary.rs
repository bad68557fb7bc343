//! Rotary position embeddings: each pair of elements of a row is turned by an angle that grows with the row's position.
//!
//! The table of cosines and sines is computed in f64 and rounded once. Rotating is f32 arithmetic without fused operations, so
//! its bits are the same at every level.

#![forbid(unsafe_code)]

use crate::element::{Element, with_elements};
use crate::error::{Error, check_count};
use crate::integers::Integers;
use crate::simd::rows::{convert_row, narrow_row, widen_row};
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::matrix::{Row, RowMut};
use crate::tensor::strided::{Strided, StridedMut};
use crate::tensor::{AnyTensorMut, AnyTensorRef, TensorRef};
use std::fmt;
use std::ops::Range;

/// Rotary position embeddings (RoPE): a table of cosines and sines, and how elements are paired.
///
/// ```text
/// angle[p]  = position * frequency[p]            for the pairs p = 0 .. dim / 2
/// out[x(p)] = in[x(p)] * cos(angle[p]) - in[y(p)] * sin(angle[p])
/// out[y(p)] = in[x(p)] * sin(angle[p]) + in[y(p)] * cos(angle[p])
/// ```
///
/// | pairing | x(p) | y(p) | used by |
/// |---|---|---|---|
/// | halves, the default | p | p + dim / 2 | Llama, Qwen, Gemma in Hugging Face's layout; ONNX `interleaved = 0` |
/// | [`interleaved`](Rotary::interleaved) | 2 p | 2 p + 1 | GPT-J, the original paper; ONNX `interleaved = 1` |
///
/// Elements from `dim` on are not changed. So `dim` below the head's dimension rotates a part of it (`rotary_embedding_dim`).
///
/// An element is widened exactly, rotated in f32 (each product and sum is rounded once) and rounded once to the output's type.
///
/// ```
/// use flashtile::{Positions, Rotary, TensorMut};
///
/// let rotary = Rotary::new(64, 10_000.0, 4096)?; // head_dim 64, positions 0 to 4095
/// let mut q = vec![0.5f32; 8 * 3 * 64]; // [batch, heads, seq, dim] = [1, 8, 3, 64]
/// // Three tokens that follow twenty others.
/// rotary.rotate(TensorMut::from_slice(&mut q, [1, 8, 3, 64])?, Positions::Start(20))?;
/// let angle = 21.0f32; // of pair 0 of the second token
/// assert!((q[64] - 0.5 * (angle.cos() - angle.sin())).abs() < 1e-6);
/// assert!((q[64 + 32] - 0.5 * (angle.sin() + angle.cos())).abs() < 1e-6);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// Scaled frequencies are given as a list: see [`Rotary::from_frequencies`]. Tables of a model file or of ONNX: see
/// [`Rotary::from_tables`].
#[derive(Clone, PartialEq)]
pub struct Rotary {
    /// `[positions, pairs]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    positions: usize,
    pairs: usize,
    interleaved: bool,
}

/// The positions of the rows of `[batch, heads, seq, dim]`. All heads of a token have the same position.
///
/// Two sequences of one new token, after 20 and 7 others:
///
/// ```
/// use flashtile::{Positions, Rotary, TensorMut};
///
/// let rotary = Rotary::new(64, 10_000.0, 4096)?;
/// let mut q = vec![0.5f32; 2 * 8 * 64];
/// let lengths: Vec<u32> = vec![20, 7];
/// rotary.rotate(TensorMut::from_slice(&mut q, [2, 8, 1, 64])?, Positions::per_batch(&lengths))?;
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Positions<'a> {
    /// Token `i` of every sequence has the position `start + i`.
    Start(usize),
    /// Token `i` of sequence `b` has the position `starts[b] + i`. The list has `batch` entries. [`Positions::per_batch`] makes
    /// it.
    PerBatch(Integers<'a>),
    /// Token `i` of sequence `b` has the position `ids[b * seq + i]`. The list has `batch * seq` entries. [`Positions::each`]
    /// makes it.
    Each(Integers<'a>),
}

impl<'a> Positions<'a> {
    /// One position for each sequence: that of its first token.
    pub fn per_batch(starts: impl Into<Integers<'a>>) -> Self {
        Positions::PerBatch(starts.into())
    }

    /// One position for each token, `[batch, seq]` row by row: ONNX's `position_ids`.
    pub fn each(ids: impl Into<Integers<'a>>) -> Self {
        Positions::Each(ids.into())
    }

    /// The position of token `i` of `seq` of sequence `b`.
    #[inline(always)]
    fn get(&self, b: usize, i: usize, seq: usize) -> i128 {
        match self {
            Positions::Start(start) => *start as i128 + i as i128,
            Positions::PerBatch(starts) => starts.get(b) + i as i128,
            Positions::Each(ids) => ids.get(b * seq + i),
        }
    }

    /// Refuses lists of another length, and positions outside a table of `positions`.
    fn check(&self, batch: usize, seq: usize, positions: usize) -> Result<(), Error> {
        match self {
            Positions::Start(_) => {}
            Positions::PerBatch(starts) => check_count("positions", starts.len(), batch)?,
            // (A product that overflows is the length of no list.)
            Positions::Each(ids) => check_count("positions", ids.len(), batch.saturating_mul(seq))?,
        }
        let check = |position: i128| {
            let inside = (0..positions as i128).contains(&position);
            if inside { Ok(()) } else { Err(Error::PositionOutOfRange { position, positions }) }
        };
        if batch == 0 || seq == 0 {
            return Ok(());
        }
        match self {
            Positions::Start(start) => check(*start as i128 + seq as i128 - 1),
            Positions::PerBatch(starts) => starts.iter().try_for_each(|start| {
                check(start)?;
                check(start + seq as i128 - 1)
            }),
            Positions::Each(ids) => ids.iter().try_for_each(check),
        }
    }
}

/// The inverse frequencies of rotary embeddings: `base^(-2 p / dim)` for the pairs `p = 0 .. dim / 2`.
///
/// ```
/// # use flashtile::rotary_frequencies;
/// assert_eq!(rotary_frequencies(4, 10_000.0)?, [1.0, 0.01]);
/// # Ok::<(), flashtile::Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidOption`] if `dim` is odd, or `base` is not positive and finite; [`Error::TooLarge`].
pub fn rotary_frequencies(dim: usize, base: f64) -> Result<Vec<f64>, Error> {
    if !dim.is_multiple_of(2) {
        return Err(Error::InvalidOption { option: "rotary dim", got: dim as f32, expected: "even" });
    }
    if !(base > 0.0 && base.is_finite()) {
        return Err(Error::InvalidOption { option: "rotary base", got: base as f32, expected: "positive and finite" });
    }
    let mut frequencies = reserved(dim / 2)?;
    frequencies.extend((0..dim / 2).map(|p| base.powf(-2.0 * p as f64 / dim as f64)));
    Ok(frequencies)
}

fn reserved<T>(len: usize) -> Result<Vec<T>, Error> {
    let mut list = Vec::new();
    list.try_reserve_exact(len).map_err(|_| TOO_LARGE)?;
    Ok(list)
}

const TOO_LARGE: Error = Error::TooLarge { what: "the rotary table" };

impl Rotary {
    /// The table of the positions 0 to `positions - 1` with the frequencies `base^(-2 p / dim)`, paired by halves.
    ///
    /// It takes `4 * dim * positions` bytes. `dim` is the number of elements that are rotated: the head's dimension or less.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if `dim` is odd, or `base` is not positive and finite; [`Error::TooLarge`].
    pub fn new(dim: usize, base: f64, positions: usize) -> Result<Self, Error> {
        Self::from_frequencies(&rotary_frequencies(dim, base)?, positions)
    }

    /// As [`Rotary::new`], with a frequency for each pair: the form of all scalings that change frequencies.
    ///
    /// The angle `position * frequency` is computed in f64, and so are its cosine and sine, which are rounded to f32. They differ
    /// from those of the exact angle by at most `2^-25 + angle * 2^-52`: half a step of f32 below 1 as long as the angle is below
    /// a million. (Computed in f32, an angle of 500 000 is off by up to 0.016.)
    ///
    /// # Errors
    /// [`Error::InvalidOption`] if a frequency is not finite; [`Error::TooLarge`].
    ///
    /// Linear scaling by 4, and Llama 3's scaling:
    ///
    /// ```
    /// use flashtile::{Rotary, rotary_frequencies};
    /// use std::f64::consts::TAU;
    ///
    /// let linear: Vec<f64> = rotary_frequencies(128, 10_000.0)?.iter().map(|f| f / 4.0).collect();
    /// let rotary = Rotary::from_frequencies(&linear, 8192)?;
    ///
    /// // rope_scaling of Llama 3.1: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    /// let (factor, low, high, original) = (8.0, 1.0, 4.0, 8192.0);
    /// let llama3 = |frequency: f64| {
    ///     let turns = original * frequency / TAU; // within the original context
    ///     let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    ///     (1.0 - keep) * frequency / factor + keep * frequency
    /// };
    /// let llama3: Vec<f64> = rotary_frequencies(128, 500_000.0)?.into_iter().map(llama3).collect();
    /// let rotary = Rotary::from_frequencies(&llama3, 16_384)?;
    /// assert_eq!((rotary.dim(), rotary.positions()), (128, 16_384));
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn from_frequencies(frequencies: &[f64], positions: usize) -> Result<Self, Error> {
        Self::with_magnitude(frequencies, 1.0, positions)
    }

    /// As [`Rotary::from_frequencies`], with every cosine and sine multiplied by `magnitude` in f64: YaRN's attention factor.
    ///
    /// # Errors
    /// As [`Rotary::from_frequencies`]; [`Error::InvalidOption`] if the magnitude is not finite.
    pub fn with_magnitude(frequencies: &[f64], magnitude: f64, positions: usize) -> Result<Self, Error> {
        let invalid = |option, got: f64| Err(Error::InvalidOption { option, got: got as f32, expected: "finite" });
        if let Some(&frequency) = frequencies.iter().find(|frequency| !frequency.is_finite()) {
            return invalid("rotary frequency", frequency);
        }
        if !magnitude.is_finite() {
            return invalid("rotary magnitude", magnitude);
        }
        let pairs = frequencies.len();
        let len = positions.checked_mul(pairs).ok_or(TOO_LARGE)?;
        let (mut cos, mut sin) = (reserved(len)?, reserved(len)?);
        for n in 0..len {
            // No more than 2^53 positions have a row, so each is exact. The product is finite or the position is 0.
            let angle = (n / pairs) as f64 * frequencies[n % pairs];
            let (sine, cosine) = angle.sin_cos();
            cos.push((magnitude * cosine) as f32);
            sin.push((magnitude * sine) as f32);
        }
        Ok(Rotary { cos, sin, positions, pairs, interleaved: false })
    }

    /// Tables as they are in a model file: `[positions, dim / 2]` each, widened to f32 exactly, paired by halves.
    ///
    /// They are ONNX's `cos_cache` and `sin_cache`. ONNX's tables without `position_ids`, `[batch, seq, dim / 2]`, are tables of
    /// `batch * seq` positions for [`Positions::each`] of `0 .. batch * seq`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if the tables have different shapes; [`Error::TooLarge`].
    pub fn from_tables<T: Element>(cos: TensorRef<'_, T, 2>, sin: TensorRef<'_, T, 2>) -> Result<Self, Error> {
        let [positions, pairs] = cos.shape();
        for (axis, dimension) in [(0, "positions"), (1, "pairs")] {
            let (expected, got) = (cos.shape()[axis], sin.shape()[axis]);
            if expected != got {
                return Err(Error::ShapeMismatch { tensor: "sines", dimension, expected, got });
            }
        }
        let copied = |table: TensorRef<'_, T, 2>| {
            let len = positions.checked_mul(pairs).ok_or(TOO_LARGE)?;
            let mut list = reserved(len)?;
            let at = |n: usize| table.get([n / pairs, n % pairs]).expect("inside the shape").to_f32();
            list.extend((0..len).map(at));
            Ok(list)
        };
        Ok(Rotary { cos: copied(cos)?, sin: copied(sin)?, positions, pairs, interleaved: false })
    }

    /// Pairs neighbouring elements, `2 p` and `2 p + 1`, instead of halves.
    #[must_use]
    pub fn interleaved(mut self) -> Self {
        self.interleaved = true;
        self
    }

    /// Whether neighbouring elements are paired.
    pub fn is_interleaved(&self) -> bool {
        self.interleaved
    }

    /// The number of elements that are rotated.
    pub fn dim(&self) -> usize {
        2 * self.pairs
    }

    /// The number of positions in the table.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The table of cosines, `[positions, dim / 2]`.
    pub fn cos(&self) -> TensorRef<'_, f32, 2> {
        TensorRef::from_slice(&self.cos, [self.positions, self.pairs]).expect("the length is that of the shape")
    }

    /// The table of sines, `[positions, dim / 2]`.
    pub fn sin(&self) -> TensorRef<'_, f32, 2> {
        TensorRef::from_slice(&self.sin, [self.positions, self.pairs]).expect("the length is that of the shape")
    }

    /// Rotates `x`, `[batch, heads, seq, head_dim]` of any strides, in place.
    ///
    /// Packed tokens may be `[total, heads, head_dim]`: a batch of one with `total` tokens, whose positions are a list
    /// ([`Positions::each`]).
    ///
    /// ```
    /// use flashtile::{Positions, Rotary, TensorMut};
    ///
    /// // A prompt of 3 tokens, and the token after 20 others of another sequence.
    /// let rotary = Rotary::new(64, 10_000.0, 4096)?;
    /// let mut q = vec![0.5f32; 4 * 8 * 64];
    /// rotary.rotate(TensorMut::from_slice(&mut q, [4, 8, 64])?, Positions::each(&[0, 1, 2, 20]))?;
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Rank`] unless `x` has three or four axes; [`Error::ShapeMismatch`] if its rows have fewer than [`dim`](Rotary::dim)
    /// elements; [`Error::WrongCount`] if there are more or fewer positions than `positions` needs;
    /// [`Error::PositionOutOfRange`]. Nothing has been written then.
    pub fn rotate<'x>(&self, x: impl Into<AnyTensorMut<'x>>, positions: Positions<'_>) -> Result<(), Error> {
        let mut x = with_batch(x.into())?;
        self.check_tensor("input", x.shape(), positions)?;
        with_elements!(x.typed_mut(), x => Isa::best().run(InPlace { rotary: self, positions, x }));
        Ok(())
    }

    /// Rotates `x`, `[batch, heads, seq, head_dim]` or `[total, heads, head_dim]`, into `out` of the same shape. Strides and types
    /// may differ.
    ///
    /// # Errors
    /// As [`rotate`](Rotary::rotate); [`Error::Rank`] and [`Error::ShapeMismatch`] if `out` has another shape. Nothing has been
    /// written then.
    pub fn rotate_into<'x, 'o>(
        &self,
        x: impl Into<AnyTensorRef<'x>>,
        positions: Positions<'_>,
        out: impl Into<AnyTensorMut<'o>>,
    ) -> Result<(), Error> {
        let (x, out) = (x.into(), out.into());
        if out.rank() != x.rank() {
            return Err(Error::Rank { tensor: "output", expected: x.rank(), got: out.rank() });
        }
        let x = if x.rank() == 3 { x.insert_axis(0)?.permuted(&[0, 2, 1, 3])? } else { x };
        let mut out = with_batch(out)?;
        self.check_tensor("input", x.shape(), positions)?;
        for (axis, dimension) in ["batch", "heads", "seq", "head_dim"].into_iter().enumerate() {
            let (expected, got) = (x.shape()[axis], out.shape()[axis]);
            if expected != got {
                return Err(Error::ShapeMismatch { tensor: "output", dimension, expected, got });
            }
        }
        with_elements!(x.tensor, x => with_elements!(out.typed_mut(), out => {
            Isa::best().run(ToOutput { rotary: self, positions, x, out });
        }));
        Ok(())
    }

    fn check_tensor(&self, tensor: &'static str, shape: &[usize], positions: Positions<'_>) -> Result<(), Error> {
        let &[batch, _, seq, head_dim] = shape else {
            return Err(Error::Rank { tensor, expected: 4, got: shape.len() });
        };
        self.check(tensor, batch, seq, head_dim, positions)
    }

    /// Refuses rows that are too short and positions that are not in the table.
    pub(crate) fn check(
        &self,
        tensor: &'static str,
        batch: usize,
        seq: usize,
        head_dim: usize,
        positions: Positions<'_>,
    ) -> Result<(), Error> {
        if head_dim < self.dim() {
            let (dimension, expected, got) = ("head_dim", self.dim(), head_dim);
            return Err(Error::ShapeMismatch { tensor, dimension, expected, got });
        }
        positions.check(batch, seq, self.positions)
    }

    /// The angles of a position of the table.
    #[inline(always)]
    fn angles(&self, position: usize) -> Angles<'_> {
        let row = position * self.pairs..(position + 1) * self.pairs;
        Angles { cos: &self.cos[row.clone()], sin: &self.sin[row], interleaved: self.interleaved }
    }

    /// The angles of token `i` of `seq` of sequence `b`, whose position has been checked.
    #[inline(always)]
    pub(crate) fn angles_of(&self, positions: Positions<'_>, b: usize, i: usize, seq: usize) -> Angles<'_> {
        self.angles(positions.get(b, i, seq) as usize)
    }
}

/// Packed tokens as a batch of one.
fn with_batch(x: AnyTensorMut<'_>) -> Result<AnyTensorMut<'_>, Error> {
    if x.rank() == 3 { x.insert_axis(0)?.permuted(&[0, 2, 1, 3]) } else { Ok(x) }
}

/// The shape and the pairing; the tables are too long.
impl fmt::Debug for Rotary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dim, positions) = (self.dim(), self.positions);
        f.debug_struct("Rotary")
            .field("dim", &dim)
            .field("positions", &positions)
            .field("interleaved", &self.interleaved)
            .finish_non_exhaustive()
    }
}

/// What one row is turned by.
#[derive(Clone, Copy)]
pub(crate) struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    interleaved: bool,
}

/// Rotates the row `from` into `to`; the elements after the pairs are copied.
#[inline(always)]
pub(crate) fn rotate_row<S: Simd, T: Element, U: Element>(
    simd: S,
    from: Row<'_, T>,
    mut to: RowMut<'_, U>,
    angles: Angles<'_>,
) {
    let (dim, len) = (2 * angles.cos.len(), from.iter().len());
    if dim < len {
        convert_row(simd, from.slice(dim..len), to.slice_mut(dim..len));
    }
    rotate_line(simd, &mut Between { from, to }, angles);
}

/// A row that is read and one that is written, perhaps the same.
trait Line {
    fn read<S: Simd>(&self, simd: S, elements: Range<usize>, to: &mut [f32]);
    fn write<S: Simd>(&mut self, simd: S, elements: Range<usize>, from: &[f32]);
}

struct Between<'a, T, U> {
    from: Row<'a, T>,
    to: RowMut<'a, U>,
}

impl<T: Element, U: Element> Line for Between<'_, T, U> {
    #[inline(always)]
    fn read<S: Simd>(&self, simd: S, elements: Range<usize>, to: &mut [f32]) {
        widen_row(simd, self.from.slice(elements), to);
    }
    #[inline(always)]
    fn write<S: Simd>(&mut self, simd: S, elements: Range<usize>, from: &[f32]) {
        narrow_row(simd, from, self.to.slice_mut(elements));
    }
}

struct Same<'a, T>(RowMut<'a, T>);

impl<T: Element> Line for Same<'_, T> {
    #[inline(always)]
    fn read<S: Simd>(&self, simd: S, elements: Range<usize>, to: &mut [f32]) {
        widen_row(simd, self.0.as_row().slice(elements), to);
    }
    #[inline(always)]
    fn write<S: Simd>(&mut self, simd: S, elements: Range<usize>, from: &[f32]) {
        narrow_row(simd, from, self.0.slice_mut(elements));
    }
}

/// Pairs that are rotated at a time. Heads of 128 are one piece; the numbers of a piece are on the stack.
const PIECE: usize = 64;

/// Rotates a row: pieces are widened, rotated in f32 and rounded.
#[inline(always)]
fn rotate_line<S: Simd, L: Line>(simd: S, line: &mut L, angles: Angles<'_>) {
    let Angles { cos, sin, interleaved } = angles;
    let pairs = cos.len();
    let mut numbers = [0.0f32; 2 * PIECE];
    for first in (0..pairs).step_by(PIECE) {
        let count = PIECE.min(pairs - first);
        let (cos, sin) = (&cos[first..][..count], &sin[first..][..count]);
        if interleaved {
            let (elements, numbers) = (2 * first..2 * (first + count), &mut numbers[..2 * count]);
            line.read(simd, elements.clone(), numbers);
            for (pair, (&cos, &sin)) in numbers.as_chunks_mut().0.iter_mut().zip(cos.iter().zip(sin)) {
                *pair = rotated(*pair, cos, sin);
            }
            line.write(simd, elements, numbers);
        } else {
            let second = pairs + first;
            let (x, y) = numbers[..2 * count].split_at_mut(count);
            line.read(simd, first..first + count, x);
            line.read(simd, second..second + count, y);
            for p in 0..count {
                [x[p], y[p]] = rotated([x[p], y[p]], cos[p], sin[p]);
            }
            line.write(simd, first..first + count, x);
            line.write(simd, second..second + count, y);
        }
    }
}

/// The definition.
#[inline(always)]
fn rotated([x, y]: [f32; 2], cos: f32, sin: f32) -> [f32; 2] {
    [x * cos - y * sin, x * sin + y * cos]
}

struct InPlace<'a, 'x, T> {
    rotary: &'a Rotary,
    positions: Positions<'a>,
    x: &'a mut StridedMut<'x, T, 4>,
}

impl<T: Element> Kernel for InPlace<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let [batch, heads, seq, head_dim] = *self.x.as_ref().shape();
        if head_dim == 0 {
            return; // any number of rows
        }
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..seq {
                    let angles = self.rotary.angles_of(self.positions, b, i, seq);
                    rotate_line(simd, &mut Same(self.x.row_mut([b, h, i])), angles);
                }
            }
        }
    }
}

struct ToOutput<'a, 'x, 'o, T, U> {
    rotary: &'a Rotary,
    positions: Positions<'a>,
    x: Strided<'x, T, 4>,
    out: &'a mut StridedMut<'o, U, 4>,
}

impl<T: Element, U: Element> Kernel for ToOutput<'_, '_, '_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let [batch, heads, seq, head_dim] = *self.x.shape();
        if head_dim == 0 {
            return; // any number of rows
        }
        for b in 0..batch {
            for h in 0..heads {
                let rows = self.x.matrix(b, h);
                for i in 0..seq {
                    let angles = self.rotary.angles_of(self.positions, b, i, seq);
                    rotate_row(simd, rows.row(i), self.out.row_mut([b, h, i]), angles);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::f16;
    use crate::level::Level;

    /// Every level has the bits of the definition.
    #[test]
    fn levels_agree() {
        for (head_dim, dim) in [(150, 150), (40, 18), (7, 2)] {
            let half = Rotary::new(dim, 10.0, 40).unwrap();
            for rotary in [half.clone(), half.interleaved()] {
                let x: Vec<f32> = (0..3 * head_dim).map(|n| (n as f32 * 0.37).sin()).collect();
                let mut expected = x.clone();
                for (i, row) in expected.chunks_mut(head_dim).enumerate() {
                    let Angles { cos, sin, .. } = rotary.angles(30 + i);
                    for p in 0..dim / 2 {
                        let [a, b] = if rotary.interleaved { [2 * p, 2 * p + 1] } else { [p, p + dim / 2] };
                        [row[a], row[b]] = [row[a] * cos[p] - row[b] * sin[p], row[a] * sin[p] + row[b] * cos[p]];
                    }
                }
                for level in Level::available() {
                    let isa = Isa::detect(level).unwrap();
                    let (shape, strides) = ([1, 1, 3, head_dim], [0, 0, head_dim as isize, 1]);
                    let positions = Positions::Start(30);
                    let mut in_place = x.clone();
                    let mut tensor = StridedMut::new(&mut in_place, 0, shape, strides).unwrap();
                    isa.run(InPlace { rotary: &rotary, positions, x: &mut tensor });
                    assert_eq!(in_place, expected, "{level} {rotary:?}");

                    let mut out = vec![f16::ZERO; x.len()];
                    let mut tensor = StridedMut::new(&mut out, 0, shape, strides).unwrap();
                    let x = Strided::new(&x, 0, shape, strides).unwrap();
                    isa.run(ToOutput { rotary: &rotary, positions, x, out: &mut tensor });
                    let rounded: Vec<f16> = expected.iter().map(|&x| f16::from_f32(x)).collect();
                    assert_eq!(out, rounded, "{level} {rotary:?}");
                }
            }
        }
    }
}
