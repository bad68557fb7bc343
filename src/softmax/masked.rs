//! Softmax with options: a mask, a bias, tensors of any strides, f32 results of half types.
#![forbid(unsafe_code)]

use super::axis::{Axis, axis_number, same_len};
use super::block::{Block, Lay, Order, softmax_block, states_of_block};
use super::chains::{larger_scores, largest_score, score, subtract, subtract_each};
use super::chosen_level::isa;
use super::convert;
use super::forward_calls::{check_scale, log_sum_exp};
use super::gathered::{Compute, SoftmaxOf, Tensors, for_each_block, hide_in_block};
use super::number::Number;
use super::sealed::Sealed;
use crate::element::{Element, map_elements, with_elements};
use crate::error::Error;
use crate::tensor::any::AnyTensor;
use crate::tensor::matrix::Row;
use crate::tensor::strided::Strided;
use crate::tensor::{TensorMut, TensorRef};
use std::sync::{Mutex, PoisonError};

/// Softmax, log_softmax and logsumexp with a mask, a bias, any strides, and results of another type:
///
/// ```text
/// score = scale * x + bias, or -inf where the mask is false
/// softmax      exp(score - max) / sum           sum = sum of exp(score - max) along the axis
/// log_softmax  score - max - log(sum)
/// logsumexp    max + log(sum)
/// ```
///
/// Inputs and outputs are tensors of rank 1 to 4, of any strides. The output has the type of the input, or another one with the
/// same [`Number`] arithmetic: f32, f16 and bf16 go together. So f16 logits can give f32 probabilities.
///
/// | | |
/// |---|---|
/// | hidden: mask false, bias -inf, or x -inf | softmax exactly 0, log_softmax -inf; x and bias may be anything there, also NaN |
/// | a line with only hidden elements | zeros; log_softmax and logsumexp are -inf |
/// | a visible NaN, or a score of +inf from an infinite x or bias | that line is NaN, and no other |
/// | finite x, bias and scale | never NaN, also where a score leaves the range of the type |
/// | an axis of length 0 | nothing is written; logsumexp is -inf |
///
/// Scores with a bias are f64, and their differences from the maximum are rounded once, to f32 (f64 for f64). Without a bias, a line
/// has the bits of [`softmax_into`](super::softmax_into()) along the same axis, with -inf for hidden elements. Its bits depend on the
/// line and on whether its axis is the last (but for axes of size 1); they depend on no stride, no other line and no thread.
///
/// Probabilities of f16 logits in f32, along the last axis, where the second row has only two classes:
///
/// ```
/// use flashtile::softmax::Softmax;
/// use flashtile::{TensorMut, TensorRef, f16};
///
/// let logits = [0.0f32, 0.0, 0.0, 1.0, 1.0, f32::NAN].map(f16::from_f32);
/// let visible = [true, true, true, true, true, false];
/// let mut probs = [0.0f32; 6];
/// Softmax::new()
///     .mask(TensorRef::from_slice(&visible, [2, 3])?)
///     .softmax_into(TensorRef::from_slice(&logits, [2, 3])?, TensorMut::from_slice(&mut probs, [2, 3])?)?;
/// assert_eq!(probs[3..], [0.5, 0.5, 0.0]);
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Softmax<'a> {
    axis: i128,
    scale: f64,
    mask: Option<Strided<'a, u8, 4>>,
    bias: Option<AnyTensor<'a>>,
    given_twice: Option<&'static str>,
}

impl Default for Softmax<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Softmax<'a> {
    /// Along the last axis, at scale 1, without mask and bias.
    pub fn new() -> Self {
        Softmax { axis: -1, scale: 1.0, mask: None, bias: None, given_twice: None }
    }

    /// With tensors that C describes.
    #[cfg(feature = "capi")]
    pub(crate) fn with_tensors(mask: Option<Strided<'a, u8, 4>>, bias: Option<AnyTensor<'a>>) -> Self {
        Softmax { mask, bias, ..Self::new() }
    }

    /// The axis along which it runs: counted from 0, or from -1 at the end, as in NumPy. `axis` is of any integer type.
    pub fn axis(mut self, axis: impl TryInto<i128>) -> Self {
        self.axis = axis.try_into().unwrap_or(i128::MAX);
        self
    }

    /// The inverse temperature, which multiplies x, not the bias. It is rounded to f32, except for f64. A scale that is not
    /// finite, or not finite after rounding, is refused with [`Error::InvalidOption`].
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = scale;
        self
    }

    /// The elements that take part: those where `visible` is true. Axes of size 1 are repeated, and axes in front that it lacks,
    /// too, as in NumPy.
    ///
    /// A mask given twice is refused with [`Error::GivenTwice`].
    pub fn mask(mut self, visible: impl Into<TensorRef<'a, bool>>) -> Self {
        self.note_if_twice("mask", self.mask.is_some());
        self.mask = Some(visible.into().strided.into_bytes());
        self
    }

    /// Numbers that are added to scale * x; -inf hides the element. f32, f16 or bf16, repeated as the [mask](Self::mask).
    ///
    /// A bias given twice is refused with [`Error::GivenTwice`].
    ///
    /// ```
    /// use flashtile::softmax::Softmax;
    /// use flashtile::{TensorMut, TensorRef};
    ///
    /// let (x, bias, mut y) = ([0.0f32, 1.0, 2.0, 0.0], [0.0, f32::NEG_INFINITY], [9.0f32; 4]);
    /// let x = TensorRef::from_slice(&x, [2, 2])?;
    /// Softmax::new().bias(TensorRef::from_slice(&bias, [2])?).softmax_into(x, TensorMut::from_slice(&mut y, [2, 2])?)?;
    /// assert_eq!(y, [1.0, 0.0, 1.0, 0.0]);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn bias<T: Element>(mut self, bias: impl Into<TensorRef<'a, T>>) -> Self {
        self.note_if_twice("bias", self.bias.is_some());
        self.bias = Some(AnyTensor::new(bias.into().strided));
        self
    }

    fn note_if_twice(&mut self, option: &'static str, given: bool) {
        if given {
            self.given_twice = Some(option);
        }
    }

    /// Softmax of `x`, into `out` of the same shape. (A rank above 4 does not compile.)
    ///
    /// # Errors
    /// [`Error::AxisOutOfRange`]; [`Error::ShapeMismatch`] if `out` has another shape; [`Error::NotBroadcastable`] for mask and
    /// bias; [`Error::InvalidOption`] for a scale that is not finite; [`Error::GivenTwice`].
    pub fn softmax_into<T: Number, O: Number<Real = T::Real>, const N: usize>(
        &self,
        x: TensorRef<'_, T, N>,
        out: TensorMut<'_, O, N>,
    ) -> Result<(), Error> {
        self.write(x, out, false)
    }

    /// The logarithm of softmax of `x`, into `out` of the same shape.
    ///
    /// # Errors
    /// As [`softmax_into`](Self::softmax_into).
    pub fn log_softmax_into<T: Number, O: Number<Real = T::Real>, const N: usize>(
        &self,
        x: TensorRef<'_, T, N>,
        out: TensorMut<'_, O, N>,
    ) -> Result<(), Error> {
        self.write(x, out, true)
    }

    /// Softmax of `x` in place. The bits are those of [`softmax_into`](Self::softmax_into).
    ///
    /// ```
    /// use flashtile::TensorMut;
    /// use flashtile::softmax::Softmax;
    ///
    /// let mut x = [1.0f32, 5.0, 1.0, 1.0];
    /// Softmax::new().axis(0).softmax_in_place(TensorMut::from_slice(&mut x, [2, 2])?)?;
    /// assert_eq!([x[0], x[2]], [0.5, 0.5]);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`softmax_into`](Self::softmax_into).
    pub fn softmax_in_place<T: Number, const N: usize>(&self, x: TensorMut<'_, T, N>) -> Result<(), Error> {
        self.overwrite(x, false)
    }

    /// The logarithm of softmax of `x`, in place.
    ///
    /// # Errors
    /// As [`softmax_into`](Self::softmax_into).
    pub fn log_softmax_in_place<T: Number, const N: usize>(&self, x: TensorMut<'_, T, N>) -> Result<(), Error> {
        self.overwrite(x, true)
    }

    /// log(sum(exp(score))) along the axis: one element of `out` for each line, row-major in the order of the other axes. It is -inf
    /// for lines without elements.
    ///
    /// # Errors
    /// As [`softmax_into`](Self::softmax_into), and [`Error::SliceLength`] if `out` does not have one element per line.
    pub fn logsumexp_into<T: Number, O: Number<Real = T::Real>, const N: usize>(
        &self,
        x: TensorRef<'_, T, N>,
        out: &mut [O],
    ) -> Result<(), Error> {
        let lines = self.lines::<T, N>(x.shape())?;
        same_len(lines.count, out.len())?;
        let x = Tensors::<T, O>::Read(x.strided.with_rank::<4>().permuted(lines.order.axes()));
        if x.shape()[3] == 0 {
            out.fill(O::from_f64(f64::NEG_INFINITY));
            return Ok(());
        }
        let out = Mutex::new(out);
        let finish = |block: Block, numbers: &[T::Real], shifts: Vec<f64>| {
            let states = states_of_block(block, numbers, lines.scale_of_numbers());
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            for ((out, (max, sum)), shift) in out[block.line..].iter_mut().zip(states).zip(shifts) {
                *out = O::from_f64(log_sum_exp(max + shift, sum));
            }
        };
        if lines.mask.is_none() && lines.bias.is_none() {
            let read = |block: Block, numbers: &[T::Real]| finish(block, numbers, vec![0.0; block.count]);
            return for_each_block(x, lines.lay, Compute::Read(&read));
        }
        let change = |block, numbers: &mut [T::Real]| {
            let shifts = lines.apply(block, numbers);
            finish(block, numbers, shifts);
        };
        for_each_block(x, lines.lay, Compute::Write(&change))
    }

    fn write<T: Number, O: Number<Real = T::Real>, const N: usize>(
        &self,
        x: TensorRef<'_, T, N>,
        out: TensorMut<'_, O, N>,
        log: bool,
    ) -> Result<(), Error> {
        let (shape, expected) = (out.shape(), x.shape());
        let lines = self.lines::<T, N>(expected)?;
        if let Some(n) = (0..N).find(|&n| shape[n] != expected[n]) {
            let dimension = AXES[4 - N + n];
            return Err(Error::ShapeMismatch { tensor: "output", dimension, expected: expected[n], got: shape[n] });
        }
        let axes = lines.order.axes();
        let x = x.strided.with_rank::<4>().permuted(axes);
        lines.softmax(Tensors::Into { x, out: out.strided.with_rank::<4>().permuted(axes) }, log)
    }

    fn overwrite<T: Number, const N: usize>(&self, x: TensorMut<'_, T, N>, log: bool) -> Result<(), Error> {
        let lines = self.lines::<T, N>(x.shape())?;
        let out = x.strided.with_rank::<4>().permuted(lines.order.axes());
        lines.softmax(Tensors::<T, T>::InPlace(out), log)
    }

    /// Checks the options for a tensor.
    fn lines<T: Number, const N: usize>(&self, shape: [usize; N]) -> Result<MaskedLines<'a, T>, Error> {
        if let Some(option) = self.given_twice {
            return Err(Error::GivenTwice { option });
        }
        let number = axis_number(self.axis, N)?;
        let count = Axis::numbered(&shape, number)?.lines();
        let scale = T::real(self.scale);
        check_scale::<T>(scale)?;
        let number = number + 4 - N;
        let shape = std::array::from_fn(|n| if n < 4 - N { 1 } else { shape[n + N - 4] });
        let order = Order::new(shape, number);
        let axes = order.axes();
        let mask = self.mask.map(|mask| {
            let fits = mask.broadcast(shape).ok_or_else(|| not_broadcastable("mask", *mask.shape(), shape));
            fits.map(|mask| mask.permuted(axes))
        });
        let bias = self.bias.map(|bias| {
            let fits = bias.broadcast(shape).ok_or_else(|| not_broadcastable("bias", bias.shape(), shape));
            fits.map(|bias| map_elements!(bias, bias => bias.permuted(axes)))
        });
        let (mask, bias) = (mask.transpose()?, bias.transpose()?);
        Ok(MaskedLines { order, lay: Lay::of_axis(shape, number), count, scale, mask, bias })
    }
}

/// The names of four axes.
const AXES: [&str; 4] = ["axis -4", "axis -3", "axis -2", "axis -1"];

fn not_broadcastable(tensor: &'static str, got: [usize; 4], shape: [usize; 4]) -> Error {
    let n = (0..4).find(|&n| got[n] != 1 && got[n] != shape[n]).unwrap_or_default();
    Error::NotBroadcastable { tensor, dimension: AXES[n], got: got[n], expected: shape[n] }
}

/// How the lines of a tensor are computed. Mask and bias have its shape, with the softmax axis as the last.
struct MaskedLines<'a, T: Sealed> {
    order: Order,
    lay: Lay,
    /// The number of lines.
    count: usize,
    scale: T::Real,
    mask: Option<Strided<'a, u8, 4>>,
    bias: Option<AnyTensor<'a>>,
}

impl<T: Sealed> MaskedLines<'_, T> {
    /// Softmax, or log_softmax, of tensors in the order of the lines.
    fn softmax<O: Sealed<Real = T::Real>>(&self, tensors: Tensors<'_, T, O>, log: bool) -> Result<(), Error> {
        if tensors.shape().contains(&0) {
            return Ok(());
        }
        if self.bias.is_some() {
            let compute = |block: Block, numbers: &mut [T::Real]| {
                self.apply(block, numbers);
                softmax_block(block, numbers, self.scale_of_numbers(), log);
            };
            return for_each_block(tensors, self.lay, Compute::Write(&compute));
        }
        let softmax = SoftmaxOf { mask: self.mask, scale: self.scale, log };
        for_each_block(tensors, self.lay, Compute::Softmax(&softmax))
    }

    /// The scale of what [`apply`](Self::apply) leaves in the numbers.
    fn scale_of_numbers(&self) -> T::Real {
        if self.bias.is_some() { T::real(1.0) } else { self.scale }
    }

    /// Applies mask and bias to the numbers of a block. With a bias, they are then score - max, and the result has the max of each
    /// line.
    fn apply(&self, block: Block, numbers: &mut [T::Real]) -> Vec<f64> {
        if numbers.is_empty() {
            return vec![0.0; block.count];
        }
        hide_in_block(self.mask.as_ref(), block, 0, numbers);
        let scale = T::real_to_f64(self.scale);
        match (&self.bias, block.lay) {
            (None, _) => vec![0.0; block.count],
            (Some(bias), Lay::Rows) => add_bias(block, numbers, bias, scale),
            (Some(bias), Lay::Columns) => add_bias_to_columns(block, numbers, bias, scale),
        }
    }
}

/// Row `n` of the bias of a block, as f32.
fn copy_bias(bias: &AnyTensor<'_>, block: Block, n: usize, to: &mut [f32]) {
    with_elements!(bias, bias => copy_row(block.of(bias).row(n), to));
}

fn copy_row<T: super::buffers::Stored>(row: Row<'_, T>, to: &mut [f32]) {
    match row.as_slice() {
        Some(row) => convert::widen(isa(), row, to),
        None => to.iter_mut().zip(row.iter()).for_each(|(to, from)| *to = from.to_f32()),
    }
}

/// Turns rows into score - max, and gives the max of each: -inf if all is hidden.
fn add_bias<R: Sealed>(block: Block, numbers: &mut [R], bias: &AnyTensor<'_>, scale: f64) -> Vec<f64> {
    let len = block.width(numbers.len());
    let mut bias_row = vec![0.0; len];
    let of_row = |(n, row): (usize, &mut [R])| {
        copy_bias(bias, block, n, &mut bias_row);
        let max = largest_score(isa(), row, &bias_row, scale);
        if max < f64::INFINITY || !overflows(row, &bias_row, scale) {
            subtract(isa(), row, &bias_row, scale, max);
        }
        max
    };
    numbers.chunks_exact_mut(len).enumerate().map(of_row).collect()
}

/// [`add_bias`] where the lines are columns.
fn add_bias_to_columns<R: Sealed>(block: Block, numbers: &mut [R], bias: &AnyTensor<'_>, scale: f64) -> Vec<f64> {
    let width = block.width(numbers.len());
    let (mut bias_row, mut max) = (vec![0.0; width], vec![f64::NEG_INFINITY; width]);
    for (n, row) in numbers.chunks_exact(width).enumerate() {
        copy_bias(bias, block, n, &mut bias_row);
        larger_scores(isa(), row, &bias_row, scale, &mut max);
    }
    let overflowed = overflowed_columns(block, numbers, bias, scale, &max);
    for (n, row) in numbers.chunks_exact_mut(width).enumerate() {
        copy_bias(bias, block, n, &mut bias_row);
        subtract_each(isa(), row, &bias_row, scale, &max);
    }
    for (column, line) in overflowed {
        numbers[column..].iter_mut().step_by(width).zip(line).for_each(|(to, x)| *to = x);
    }
    max
}

/// The columns that [`overflows`] changes, and what it leaves of them.
fn overflowed_columns<R: Sealed>(
    block: Block,
    numbers: &[R],
    bias: &AnyTensor<'_>,
    scale: f64,
    max: &[f64],
) -> Vec<(usize, Vec<R>)> {
    let mut row = vec![0.0; max.len()];
    let mut overflowed = Vec::new();
    for column in (0..max.len()).filter(|&column| max[column] == f64::INFINITY) {
        let mut line: Vec<R> = numbers[column..].iter().step_by(max.len()).copied().collect();
        let mut bias_of = |n| {
            copy_bias(bias, block, n, &mut row);
            row[column]
        };
        let bias: Vec<f32> = (0..line.len()).map(&mut bias_of).collect();
        if overflows(&mut line, &bias, scale) {
            overflowed.push((column, line));
        }
    }
    overflowed
}

/// Turns a row of f64 into score - max where the largest score is above the range of numbers; false, without a change, if it is
/// infinite or NaN instead.
#[cold]
#[inline(never)]
fn overflows<R: Sealed>(row: &mut [R], bias: &[f32], scale: f64) -> bool {
    let hidden = f64::NEG_INFINITY;
    // The largest scale * x decides, unless two are equal: numbers of this size differ by more than any bias.
    let mut top = (hidden, f32::NEG_INFINITY);
    for (x, &bias) in row.iter().map(|x| x.to_f64()).zip(bias) {
        if score(x, bias, scale) == hidden {
            continue;
        }
        if !x.is_finite() || !bias.is_finite() {
            return false;
        }
        let y = scale.signum() * x;
        if y > top.0 || y == top.0 && bias > top.1 {
            top = (y, bias);
        }
    }
    for (x, &bias) in row.iter_mut().zip(bias) {
        let (finite, y) = (x.to_f64(), scale.signum() * x.to_f64());
        // Twice the product with half of the difference, which does not overflow before the product does.
        let below = scale.abs() * (0.5 * y - 0.5 * top.0) * 2.0;
        let is_hidden = finite == hidden || bias == f32::NEG_INFINITY;
        *x = R::from_f64(if is_hidden { hidden } else { below + (f64::from(bias) - f64::from(top.1)) });
    }
    true
}
