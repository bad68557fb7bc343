//! A block of lines as dense numbers, and the passes over them.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::buffers::Buffers;
use super::sealed::Sealed;
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::Strided;

/// Rows of at most this length are handed to the row passes together, because these transpose short rows.
const TOGETHER: usize = 1 << 10;

/// The axes of a tensor in the order in which lines are computed: the softmax axis is the last. Lines have their numbers from the
/// other axes, row-major in their own order. Those of size 1 are put first, so that a block has the most lines.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order([usize; 4]);

impl Order {
    pub(super) fn new(shape: [usize; 4], axis: usize) -> Self {
        let mut axes = [0, 1, 2, 3];
        axes.sort_by_key(|&n| (n == axis, shape[n] != 1, n));
        Order(axes)
    }

    pub(super) fn axes(self) -> [usize; 4] {
        self.0
    }
}

/// How the numbers of a block lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lay {
    /// Line after line.
    Rows,
    /// Element 0 of every line, then element 1 of every line. A block has two lines or more, because the loops over columns
    /// are those of an axis that is not the last.
    Columns,
}

impl Lay {
    /// That of the loops for axis `axis` of an array of this shape, which have other bits for the last axis than for others.
    pub(super) fn of_axis(shape: [usize; 4], axis: usize) -> Self {
        if shape[axis + 1..].iter().all(|&size| size == 1) { Lay::Rows } else { Lay::Columns }
    }

    /// The axes of a tensor whose softmax axis is the last, as numbers lie.
    pub(super) fn axes(self) -> [usize; 4] {
        match self {
            Lay::Rows => [0, 1, 2, 3],
            Lay::Columns => [0, 1, 3, 2],
        }
    }
}

/// Neighbouring lines: those at `[i0, i1, i2..i2 + count]` of the first three axes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) first: [usize; 3],
    pub(super) count: usize,
    /// The number of the first line.
    pub(super) line: usize,
    pub(super) lay: Lay,
}

impl Block {
    /// The block's part of a tensor, as the numbers lie.
    pub(super) fn of<'a, T>(self, tensor: &Strided<'a, T, 4>) -> Matrix<'a, T> {
        let [i0, i1, i2] = self.first;
        let lines = tensor.matrix(i0, i1).slice_rows(i2..i2 + self.count);
        match self.lay {
            Lay::Rows => lines,
            Lay::Columns => lines.transposed(),
        }
    }

    /// The block's lines of a tensor, each as a row.
    pub(super) fn of_lines<'a, T>(self, tensor: &Strided<'a, T, 4>) -> Matrix<'a, T> {
        Block { lay: Lay::Rows, ..self }.of(tensor)
    }

    /// The part's place in memory, if it has no gaps there: the tensor in the order of the numbers, and the first element of
    /// the part in its last two axes.
    pub(super) fn dense<T>(self, tensor: &Strided<'_, T, 4>) -> Option<usize> {
        let [.., all, len] = *tensor.shape();
        let (first, is_whole) = match self.lay {
            Lay::Rows => (self.first[2] * len, true),
            Lay::Columns => (0, self.count == all),
        };
        (is_whole && tensor.permuted(self.lay.axes()).is_dense_from(2)).then_some(first)
    }

    /// The axis of the lines in an array of the numbers.
    fn axis(self, numbers: usize) -> Axis {
        let len = numbers / self.count;
        match self.lay {
            Lay::Rows => Axis::of_rows(self.count, len),
            Lay::Columns => Axis::of_columns(len, self.count),
        }
    }

    /// Numbers side by side.
    pub(super) fn width(self, numbers: usize) -> usize {
        match self.lay {
            Lay::Rows => numbers / self.count,
            Lay::Columns => self.count,
        }
    }
}

/// The ranges of rows that one call of the row passes computes.
fn together(rows: usize, len: usize) -> impl Iterator<Item = (std::ops::Range<usize>, Axis)> {
    let step = if len <= TOGETHER { rows.max(1) } else { 1 };
    (0..rows).step_by(step).map(move |row| {
        let range = row..rows.min(row + step);
        (range.clone(), Axis::of_rows(range.len(), len))
    })
}

/// Softmax, or log_softmax, of the lines of a block in place.
pub(super) fn softmax_block<R: Sealed<Real = R>>(block: Block, numbers: &mut [R], scale: R, log: bool) {
    if block.lay == Lay::Columns {
        let axis = block.axis(numbers.len());
        return R::softmax(Buffers::InPlace(numbers), axis, scale, log);
    }
    let len = numbers.len() / block.count;
    for (range, axis) in together(block.count, len) {
        R::softmax(Buffers::InPlace(&mut numbers[range.start * len..range.end * len]), axis, scale, log);
    }
}

/// Softmax of rows at scale 1, times a number for each row, with the states of the rows.
pub(super) fn softmax_rows_times<R: Sealed<Real = R>>(x: &[R], out: &mut [R], upstream: &[R]) -> Vec<(f64, f64)> {
    let (count, mut states) = (upstream.len(), vec![(0.0, 0.0); upstream.len()]);
    let len = x.len() / count;
    for (range, axis) in together(count, len) {
        let (elements, first) = (range.start * len..range.end * len, range.start);
        let mut visit = |row: usize, max, sum| states[first + row] = (max, sum);
        let (x, out) = (&x[elements.clone()], &mut out[elements]);
        R::softmax_times(x, out, axis, R::real(1.0), &upstream[range], Some(&mut visit));
    }
    states
}

/// (scale * max, sum) of each line of a block.
pub(super) fn states_of_block<R: Sealed<Real = R>>(block: Block, x: &[R], scale: R) -> Vec<(f64, f64)> {
    if block.lay == Lay::Rows {
        return states_of_rows(x, block.count, scale);
    }
    let mut states = vec![(0.0, 0.0); block.count];
    R::states(x, block.axis(x.len()), scale, &mut |line, max, sum| states[line] = (max, sum));
    states
}

/// (scale * max, sum) of each row.
pub(super) fn states_of_rows<R: Sealed<Real = R>>(x: &[R], count: usize, scale: R) -> Vec<(f64, f64)> {
    let (len, mut states) = (x.len() / count, vec![(0.0, 0.0); count]);
    for (range, axis) in together(count, len) {
        let (elements, first) = (range.start * len..range.end * len, range.start);
        R::states(&x[elements], axis, scale, &mut |row, max, sum| states[first + row] = (max, sum));
    }
    states
}
