//! Cross-entropy with the options of PyTorch.
#![forbid(unsafe_code)]

use super::axis::{Axis, same_len};
use super::block::{Block, Lay, Order, softmax_rows_times, states_of_rows};
use super::chains::{subtract_weights, sum_below, times};
use super::chosen_level::isa;
use super::cross_entropy::loss;
use super::gathered::{Compute, Tensors, for_each_block};
use super::number::Number;
use super::sealed::Sealed;
use crate::error::{Error, check_count};
use crate::integers::Integers;
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::{Strided, StridedMut, contiguous};
use std::sync::{Mutex, PoisonError};

/// What becomes of the losses of all rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// One loss for each row.
    None,
    /// Their sum, divided by the sum of the class weights of the targets that are not ignored. Without class weights that is the
    /// number of these targets. NaN if it is 0.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// The cross-entropy loss with the options of PyTorch's `cross_entropy`, and its gradient.
///
/// Logits are a dense array with an axis of K classes: `[N, K]`, `[N, K, H, W]`, … There is a row for each line along that axis.
/// `targets` has the class of each row, row-major in the order of the other axes. With the label smoothing e and the class weights w,
/// a row with the target t has the loss
///
/// ```text
/// (1 - e) * w[t] * (log(sum_c exp(x[c])) - x[t])  +  e/K * sum_c w[c] * (log(sum_c exp(x[c])) - x[c])
/// ```
///
/// A row whose target is the ignored one has a loss and a gradient of exactly 0, even if its logits are NaN. Losses are computed
/// and added in f64, from the logits and the sum of their exponentials, and rounded once. A class of logit -inf is hidden: where
/// it has a share in the loss, the loss is +inf. A class with weight 0 has no share, hidden or not (in PyTorch, 0 times infinity
/// is NaN).
///
/// Two images of two pixels, with three classes. The last pixel has no label:
///
/// ```
/// use flashtile::softmax::{Axis, CrossEntropy};
///
/// let logits = [1.0f32, 0.0, 1.0, 0.0, 1.0, 0.0, 3.0, 9.0, 3.0, 9.0, 3.0, 9.0]; // [2, 3, 2]
/// let (axis, mut loss) = (Axis::new(&[2, 3, 2], 1)?, [0.0]);
/// CrossEntropy::new().ignore_index(-100).loss_into(&logits, &[0i64, 1, 2, -100], axis, &mut loss)?;
/// assert!((loss[0] - 3f32.ln()).abs() < 1e-6);
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CrossEntropy<'a> {
    ignored: Option<i64>,
    label_smoothing: f64,
    class_weights: Option<&'a [f32]>,
    reduction: Reduction,
}

impl<'a> CrossEntropy<'a> {
    /// The mean, without smoothing, weights and ignored targets.
    pub fn new() -> Self {
        Self::default()
    }

    /// A target that is ignored. It need not be a class. (PyTorch ignores -100 by default; here nothing is ignored by default.)
    pub fn ignore_index(mut self, class: i64) -> Self {
        self.ignored = Some(class);
        self
    }

    /// The share of the loss that is spread over all classes, from 0 to 1.
    pub fn label_smoothing(mut self, smoothing: f64) -> Self {
        self.label_smoothing = smoothing;
        self
    }

    /// One weight for each class: finite and not negative.
    pub fn class_weights(mut self, weights: &'a [f32]) -> Self {
        self.class_weights = Some(weights);
        self
    }

    /// What becomes of the losses; by default the mean.
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// The losses: `out` has an element for each row ([`Axis::lines`]), or one with [`Reduction::Mean`] and [`Reduction::Sum`].
    ///
    /// # Errors
    /// * [`Error::SliceLength`] if `logits` is not the whole array
    /// * [`Error::WrongCount`] for targets, losses and class weights
    /// * [`Error::ClassOutOfRange`] for a target that is neither a class nor ignored
    /// * [`Error::InvalidOption`] for a smoothing outside 0 to 1, and for a class weight that is negative or not finite
    pub fn loss_into<'t, T: Number>(
        &self,
        logits: &[T],
        targets: impl Into<Integers<'t>>,
        axis: Axis,
        out: &mut [T::Real],
    ) -> Result<(), Error> {
        let (rows, classes) = (axis.lines(), axis.line_len());
        axis.check(logits)?;
        let call = self.checked(targets.into(), rows, classes)?;
        check_count("losses", out.len(), call.results())?;
        let losses = call.losses(Strided::new(logits, 0, shape_of(axis), contiguous(&shape_of(axis))?.0)?, 2)?;
        out.iter_mut().zip(losses).for_each(|(out, loss)| *out = T::real(loss));
        Ok(())
    }

    /// The gradient with respect to the logits. `upstream` is the gradient of a further loss with respect to the result of
    /// [`loss_into`](Self::loss_into), and has its length. With softmax p and W = sum of w, a row with the upstream gradient g
    /// has
    ///
    /// ```text
    /// gradient[c] = g * ((1 - e) * w[t] * (p[c] - (c == t)) + e/K * (W * p[c] - w[c]))
    /// ```
    ///
    /// With [`Reduction::Mean`], g is the upstream gradient divided by the sum of the weights of the targets. Where the second
    /// factor is 0, the gradient is 0 for any g. A half type is rounded once.
    ///
    /// # Errors
    /// As [`loss_into`](Self::loss_into); [`Error::WrongCount`] for upstream gradients, [`Error::SliceLength`] for `gradient`.
    pub fn gradient_into<'t, T: Number>(
        &self,
        logits: &[T],
        targets: impl Into<Integers<'t>>,
        axis: Axis,
        upstream: &[T::Real],
        gradient: &mut [T],
    ) -> Result<(), Error> {
        let (rows, classes) = (axis.lines(), axis.line_len());
        axis.check(logits)?;
        let call = self.checked(targets.into(), rows, classes)?;
        check_count("upstream gradients", upstream.len(), call.results())?;
        same_len(logits.len(), gradient.len())?;
        let (shape, strides) = (shape_of(axis), contiguous(&shape_of(axis))?.0);
        let logits = Strided::new(logits, 0, shape, strides)?;
        let upstream: Vec<f64> = upstream.iter().map(|&g| T::real_to_f64(g)).collect();
        call.gradient(logits, 2, &upstream, StridedMut::new(gradient, 0, shape, strides)?)
    }

    #[cfg(feature = "capi")]
    pub(crate) fn is_reduced(&self) -> bool {
        self.reduction != Reduction::None
    }

    #[cfg(feature = "capi")]
    pub(crate) fn weights(&self) -> Option<&'a [f32]> {
        self.class_weights
    }

    /// Checks the options and targets for logits of `rows` lines.
    pub(crate) fn checked<'t>(
        &self,
        targets: Integers<'t>,
        rows: usize,
        classes: usize,
    ) -> Result<Call<'t, 'a>, Error> {
        let &CrossEntropy { ignored, label_smoothing: smoothing, class_weights: weights, reduction } = self;
        if !(0.0..=1.0).contains(&smoothing) {
            let (option, expected) = ("label smoothing", "between 0 and 1");
            return Err(Error::InvalidOption { option, got: smoothing as f32, expected });
        }
        if let Some(weights) = weights {
            check_count("class weights", weights.len(), classes)?;
            if let Some(&got) = weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
                return Err(Error::InvalidOption {
                    option: "a class weight",
                    got,
                    expected: "finite and not negative",
                });
            }
        }
        check_count("targets", targets.len(), rows)?;
        let ignored = ignored.map(i128::from);
        let wrong = |&(_, class): &(usize, i128)| Some(class) != ignored && !(0..classes as i128).contains(&class);
        if let Some((row, class)) = targets.iter().enumerate().find(wrong) {
            return Err(Error::ClassOutOfRange { row, class, classes });
        }
        let all_weights = weights.map_or(classes as f64, |weights| weights.iter().copied().map(f64::from).sum());
        let spread = if smoothing == 0.0 { 0.0 } else { smoothing / classes as f64 };
        let call =
            Call { ignored, targets, weights, all_weights, kept: 1.0 - smoothing, spread, reduction, divisor: 1.0 };
        let divisor = (0..rows).filter_map(|row| call.class_of(row)).map(|class| call.weight(class)).sum();
        Ok(if reduction == Reduction::Mean { Call { divisor, ..call } } else { call })
    }
}

fn shape_of(axis: Axis) -> [usize; 4] {
    [1, axis.before(), axis.line_len(), axis.after()]
}

/// Checked options, with the targets.
pub(crate) struct Call<'t, 'a> {
    ignored: Option<i128>,
    targets: Integers<'t>,
    weights: Option<&'a [f32]>,
    /// The sum of the weights of all classes.
    all_weights: f64,
    /// 1 - label smoothing: what the target keeps.
    kept: f64,
    /// The smoothing of one class.
    spread: f64,
    reduction: Reduction,
    /// Of the sum of all losses: the sum of the targets' weights, or 1.
    divisor: f64,
}

/// A row that is not ignored: its target, the maximum and the sum of the exponentials relative to it.
#[derive(Clone, Copy)]
struct Row {
    target: usize,
    max: f64,
    sum: f64,
}

impl Row {
    /// log(sum_c exp(x[c])) - x.
    #[inline(always)]
    fn loss_of<R: Sealed>(self, x: R) -> f64 {
        loss(x.to_f64(), self.max, self.sum)
    }
}

impl Call<'_, '_> {
    /// The number of losses after the reduction.
    pub(crate) fn results(&self) -> usize {
        if self.reduction == Reduction::None { self.targets.len() } else { 1 }
    }

    /// The class of a row; `None` if the row is ignored.
    fn class_of(&self, row: usize) -> Option<usize> {
        let class = self.targets.get(row);
        // It is below the number of classes (checked).
        (Some(class) != self.ignored).then_some(class as usize)
    }

    fn weight(&self, class: usize) -> f64 {
        self.weights.map_or(1.0, |weights| f64::from(weights[class]))
    }

    /// The losses after the reduction. `axis` is the classes' axis of the logits.
    pub(crate) fn losses<T: Sealed>(&self, logits: Strided<'_, T, 4>, axis: usize) -> Result<Vec<f64>, Error> {
        let lay = Lay::of_axis(*logits.shape(), axis);
        let logits = logits.permuted(Order::new(*logits.shape(), axis).axes());
        let losses = Mutex::new(vec![0.0; self.targets.len()]);
        let keep = |block: Block, of_block: Vec<f64>| {
            let mut losses = losses.lock().unwrap_or_else(PoisonError::into_inner);
            losses[block.line..][..block.count].copy_from_slice(&of_block);
        };
        let tensors = Tensors::<T, T>::Read(logits);
        if lay == Lay::Columns && self.spread == 0.0 {
            let compute =
                |block: Block, states| keep(block, self.losses_at_targets(block.of_lines(&logits), block, states));
            for_each_block(tensors, lay, Compute::States(&compute))?;
        } else {
            let compute = |block: Block, rows: &[T::Real]| keep(block, self.losses_of_block(block, rows));
            for_each_block(tensors, Lay::Rows, Compute::Read(&compute))?;
        }
        let losses = losses.into_inner().unwrap_or_else(PoisonError::into_inner);
        if self.reduction == Reduction::None {
            return Ok(losses);
        }
        Ok(vec![match losses.iter().sum::<f64>() {
            // The sum can overflow although the mean does not.
            f64::INFINITY => losses.iter().map(|loss| loss / self.divisor).sum(),
            total => total / self.divisor,
        }])
    }

    fn losses_of_block<R: Sealed<Real = R>>(&self, block: Block, rows: &[R]) -> Vec<f64> {
        let classes = rows.len() / block.count;
        let loss = |(n, (max, sum)): (usize, (f64, f64))| {
            let row = |target| Row { target, max, sum };
            let target = self.class_of(block.line + n);
            target.map_or(0.0, |target| self.loss(&rows[n * classes..][..classes], row(target)))
        };
        states_of_rows(rows, block.count, R::real(1.0)).into_iter().enumerate().map(loss).collect()
    }

    /// The losses of lines whose states are known, without label smoothing.
    fn losses_at_targets<T: Sealed>(&self, logits: Matrix<'_, T>, block: Block, states: Vec<(f64, f64)>) -> Vec<f64> {
        let loss = |(n, (max, sum)): (usize, (f64, f64))| {
            let at = |target| logits.row(n).get(target).unwrap_or_default();
            let of_target = |target| self.loss_at_target(at(target), Row { target, max, sum });
            self.class_of(block.line + n).map_or(0.0, of_target)
        };
        states.into_iter().enumerate().map(loss).collect()
    }

    /// The loss of a row that is not ignored.
    fn loss<R: Sealed>(&self, logits: &[R], row: Row) -> f64 {
        let own = self.loss_at_target(logits[row.target], row);
        if self.spread == 0.0 { own } else { own + self.spread * self.weighted_losses(logits, row) }
    }

    /// The target's part of a loss.
    fn loss_at_target<R: Sealed>(&self, at_target: R, row: Row) -> f64 {
        times(self.kept * self.weight(row.target), row.loss_of(at_target))
    }

    /// The sum of w[c] * (log(sum_c exp(x[c])) - x[c]).
    fn weighted_losses<R: Sealed>(&self, logits: &[R], row: Row) -> f64 {
        if row.max == f64::NEG_INFINITY && !row.sum.is_nan() {
            // All are hidden.
            return times(self.all_weights, f64::INFINITY);
        }
        sum_below(isa(), logits, self.weights, row.max) + self.all_weights * row.sum.ln()
    }

    /// The gradient with respect to the logits, of the same shape.
    pub(crate) fn gradient<T: Sealed>(
        &self,
        logits: Strided<'_, T, 4>,
        axis: usize,
        upstream: &[f64],
        gradient: StridedMut<'_, T, 4>,
    ) -> Result<(), Error> {
        if logits.shape().contains(&0) {
            return Ok(());
        }
        let axes = Order::new(*logits.shape(), axis).axes();
        let compute = |block: Block, rows: &mut [T::Real]| self.gradient_of_block(block, rows, upstream);
        let tensors = Tensors::Into { x: logits.permuted(axes), out: gradient.permuted(axes) };
        for_each_block(tensors, Lay::Rows, Compute::Write(&compute))
    }

    /// Turns the logits of rows into their gradient.
    fn gradient_of_block<R: Sealed<Real = R>>(&self, block: Block, rows: &mut [R], upstream: &[f64]) {
        let (logits, classes) = (rows.to_vec(), rows.len() / block.count);
        let upstream_of = |n: usize| match self.reduction {
            Reduction::None => upstream[block.line + n],
            _ => upstream[0] / self.divisor,
        };
        // What multiplies the softmax of each row. Where it is not finite, the row is computed again.
        let factor = |n: usize| {
            let all = |target| self.kept * self.weight(target) + self.spread * self.all_weights;
            R::from_f64(self.class_of(block.line + n).map_or(0.0, |target| upstream_of(n) * all(target)))
        };
        let factors: Vec<R> = (0..block.count).map(factor).collect();
        let states = softmax_rows_times(&logits, rows, &factors);
        for (n, (max, sum)) in states.into_iter().enumerate() {
            let (out, logits) = (&mut rows[n * classes..][..classes], &logits[n * classes..][..classes]);
            match self.class_of(block.line + n) {
                None => out.fill(R::default()),
                Some(target) if factors[n].to_f64().is_finite() => {
                    self.finish(out, logits[target], Row { target, max, sum }, upstream_of(n));
                }
                Some(target) => self.rare_gradient(out, logits, Row { target, max, sum }, upstream_of(n)),
            }
        }
    }

    /// Turns the softmax of a row, times its factor, into the gradient.
    fn finish<R: Sealed>(&self, out: &mut [R], at_target: R, row: Row, upstream: f64) {
        if self.spread != 0.0 {
            subtract_weights(isa(), out, self.weights, upstream * self.spread);
        }
        out[row.target] = R::from_f64(upstream * self.slope_at_target(at_target, row));
    }

    /// The second factor of the gradient at the target. 1 - p is formed from the loss, so that it is exact near 0.
    fn slope_at_target<R: Sealed>(&self, at_target: R, row: Row) -> f64 {
        let (loss, weight) = (row.loss_of(at_target), self.weight(row.target));
        let own = times(self.kept * weight, (-loss).exp_m1());
        if self.spread == 0.0 { own } else { own + self.spread * (self.all_weights * (-loss).exp() - weight) }
    }

    /// The gradient of a row whose factor is not finite, in f64.
    #[cold]
    #[inline(never)]
    fn rare_gradient<R: Sealed>(&self, out: &mut [R], logits: &[R], row: Row, upstream: f64) {
        let kept = self.kept * self.weight(row.target);
        for (class, (out, &x)) in out.iter_mut().zip(logits).enumerate() {
            let slope = if class == row.target {
                self.slope_at_target(x, row)
            } else {
                let prob = (-row.loss_of(x)).exp();
                kept * prob + self.spread * (self.all_weights * prob - self.weight(class))
            };
            *out = R::from_f64(if slope == 0.0 { 0.0 } else { upstream * slope });
        }
    }
}
