//! Lines of strided tensors as dense numbers: for the calls with options.
//!
//! A block of lines is copied into numbers of the type of the arithmetic (f32 for the half types), computed there, and written to
//! the output. So the bits of a line depend on its elements and on the axis alone: not on strides, on other lines or on threads. A
//! tensor is cut into pieces, which workers claim.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::axis_loop::{visit_units, worth};
use super::buffers::Buffers;
use super::lines::Lines;
use super::sealed::Sealed;
use super::shared::Counter;
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::{Strided, StridedMut};
use crate::threads::workers;
use std::sync::{Mutex, PoisonError};

/// Elements of a block of rows: 64 KiB of f32, a small part of the second cache. Each block costs some allocations.
const BLOCK: usize = 1 << 14;

/// The most lines of a block of columns, and the fewest, if there are more. Memory is faster in long runs of each row; a
/// block of long columns should stay in the second cache.
const COLUMNS: (usize, usize) = (1 << 10, 64);

/// Elements and lines of a tile that is transposed, where the elements of a line are not neighbours in memory: the f32 of a cache
/// line.
const TILE: usize = 16;

/// Rows of at most this length are handed to the row passes together, because these transpose short rows.
const TOGETHER: usize = 1 << 10;

/// Pieces for each worker: see `CLAIMS_PER_WORKER` of `axis_loop.rs`.
const PIECES_PER_WORKER: usize = 8;

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

    /// The part's place in memory, if it has no gaps there: the tensor in the order of the numbers, and the first element of
    /// the part in its last two axes.
    fn dense<T>(self, tensor: &Strided<'_, T, 4>) -> Option<usize> {
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

impl Lay {
    /// The axes of a tensor whose softmax axis is the last, as numbers lie.
    fn axes(self) -> [usize; 4] {
        match self {
            Lay::Rows => [0, 1, 2, 3],
            Lay::Columns => [0, 1, 3, 2],
        }
    }
}

/// Gets a block of lines, from any worker.
#[derive(Clone, Copy)]
pub(super) enum Compute<'a, R> {
    /// It reads the numbers, which are the input itself where that is possible.
    Read(&'a (dyn Fn(Block, &[R]) + Sync)),
    /// What it leaves in the numbers is written to the output.
    Write(&'a (dyn Fn(Block, &mut [R]) + Sync)),
}

impl<R> Compute<'_, R> {
    fn run(self, block: Block, numbers: &mut [R]) {
        match self {
            Compute::Read(compute) => compute(block, numbers),
            Compute::Write(compute) => compute(block, numbers),
        }
    }
}

/// Input and output of one shape, whose lines are along the last axis.
pub(super) enum Tensors<'a, T, O> {
    Read(Strided<'a, T, 4>),
    Into { x: Strided<'a, T, 4>, out: StridedMut<'a, O, 4> },
    InPlace(StridedMut<'a, O, 4>),
}

/// Hands the lines to `compute`, block by block, and writes the numbers to the output. The number of lines fits a `usize`.
pub(super) fn for_each_block<T: Sealed, O: Sealed<Real = T::Real>>(
    tensors: Tensors<'_, T, O>,
    lay: Lay,
    compute: Compute<'_, T::Real>,
) -> Result<(), crate::error::Error> {
    let [n0, n1, n2, len] = tensors.shape();
    let axis = Axis::new(&[n0, n1, n2, len], 3)?;
    let whole = Piece { tensors, lay, first: [0; 3], lines: [n0, n1, n2] };
    if axis.lines() == 0 {
        return Ok(());
    }
    let worth = worth(axis);
    let workers = workers(worth, axis.lines());
    if workers == 1 {
        whole.compute(compute);
        return Ok(());
    }
    let (mut pieces, mut count) = (vec![whole], 0);
    while pieces.len() > count && pieces.len() < (workers * PIECES_PER_WORKER).min(axis.lines()) {
        count = pieces.len();
        let mut halves = Vec::with_capacity(2 * count);
        pieces.into_iter().for_each(|piece| piece.push_halves(&mut halves));
        pieces = halves;
    }
    let pieces: Vec<_> = pieces.into_iter().map(|piece| Mutex::new(Some(piece))).collect();
    // A counter of pieces, because the loop of its workers is compiled once for all types.
    let counter = Counter::new(Lines::Rows(Axis::of_rows(pieces.len(), 1)), 1);
    visit_units(counter, (worth, workers), &|units, _| {
        for piece in &pieces[units] {
            let piece = piece.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(piece) = piece {
                piece.compute(compute);
            }
        }
    });
    Ok(())
}

impl<T: Sealed, O: Sealed<Real = T::Real>> Tensors<'_, T, O> {
    pub(super) fn shape(&self) -> [usize; 4] {
        match self {
            Tensors::Read(x) | Tensors::Into { x, .. } => *x.shape(),
            Tensors::InPlace(out) => *out.as_ref().shape(),
        }
    }

    fn split_at(self, axis: usize, middle: usize) -> (Self, Self) {
        let end = self.shape()[axis];
        match self {
            Tensors::Read(x) => (Tensors::Read(x.narrow(axis, 0..middle)), Tensors::Read(x.narrow(axis, middle..end))),
            Tensors::Into { x, out } => {
                let (left, right) = out.split_at(axis, middle);
                let second = Tensors::Into { x: x.narrow(axis, middle..end), out: right };
                (Tensors::Into { x: x.narrow(axis, 0..middle), out: left }, second)
            }
            Tensors::InPlace(out) => {
                let (left, right) = out.split_at(axis, middle);
                (Tensors::InPlace(left), Tensors::InPlace(right))
            }
        }
    }

    /// Copies the input's part of a block.
    fn gather(&self, part: Block, numbers: &mut [T::Real], memory: (&mut Vec<T>, &mut Vec<O>)) {
        match self {
            Tensors::Read(x) | Tensors::Into { x, .. } => gather(part.of(x), numbers, memory.0),
            Tensors::InPlace(out) => gather(part.of(out.as_ref()), numbers, memory.1),
        }
    }

    /// The output, and the input if it is another tensor.
    fn output(&mut self) -> Option<(Option<Strided<'_, T, 4>>, StridedMut<'_, O, 4>)> {
        match self {
            Tensors::Read(_) => None,
            Tensors::Into { x, out } => Some((Some(*x), out.reborrow())),
            Tensors::InPlace(out) => Some((None, out.reborrow())),
        }
    }
}

/// Some of the lines, with their place among all.
struct Piece<'a, T, O> {
    tensors: Tensors<'a, T, O>,
    lay: Lay,
    first: [usize; 3],
    /// The sizes of the first three axes of the whole tensor.
    lines: [usize; 3],
}

impl<T: Sealed, O: Sealed<Real = T::Real>> Piece<'_, T, O> {
    /// The piece in two. One line stays one piece, and so do two or three columns.
    fn push_halves(self, halves: &mut Vec<Self>) {
        let shape = self.tensors.shape();
        let least = |axis| if axis == 2 && self.lay == Lay::Columns { 4 } else { 2 };
        let Some(axis) = (0..3).find(|&axis| shape[axis] >= least(axis)) else { return halves.push(self) };
        let (Piece { tensors, lay, first, lines }, middle) = (self, shape[axis] / 2);
        let (left, right) = tensors.split_at(axis, middle);
        let mut second = first;
        second[axis] += middle;
        halves.push(Piece { tensors: left, lay, first, lines });
        halves.push(Piece { tensors: right, lay, first: second, lines });
    }

    fn compute(mut self, compute: Compute<'_, T::Real>) {
        let ([n0, n1, n2, _], step) = (self.tensors.shape(), self.lines_of_block());
        // A single column would be a row.
        let spare = if self.lay == Lay::Columns { 1 } else { 0 };
        let mut memory = Memory { numbers: Vec::new(), elements: Vec::new(), out: Vec::new() };
        for (i0, i1) in (0..n0).flat_map(|i0| (0..n1).map(move |i1| (i0, i1))) {
            let mut i2 = 0;
            while i2 < n2 {
                let left = n2 - i2;
                let count = if left <= step + spare { left } else { step };
                let first = [self.first[0] + i0, self.first[1] + i1, self.first[2] + i2];
                let line = (first[0] * self.lines[1] + first[1]) * self.lines[2] + first[2];
                let block = Block { first, count, line, lay: self.lay };
                self.compute_block(Block { first: [i0, i1, i2], ..block }, block, compute, &mut memory);
                i2 += count;
            }
        }
    }

    /// Lines of a block.
    fn lines_of_block(&self) -> usize {
        let [.., lines, len] = self.tensors.shape();
        let fit = BLOCK / len.max(1);
        let step = match (self.lay, &self.tensors) {
            (Lay::Columns, _) => fit.clamp(COLUMNS.1, COLUMNS.0),
            (Lay::Rows, Tensors::Read(x) | Tensors::Into { x, .. }) if x.matrix(0, 0).has_contiguous_rows() => {
                fit.max(1)
            }
            (Lay::Rows, Tensors::InPlace(out)) if out.as_ref().matrix(0, 0).has_contiguous_rows() => fit.max(1),
            (Lay::Rows, _) => fit.max(TILE),
        };
        step.min(lines)
    }

    /// Computes a block, which is `part` of the piece.
    fn compute_block(
        &mut self,
        part: Block,
        block: Block,
        compute: Compute<'_, T::Real>,
        memory: &mut Memory<T, O, T::Real>,
    ) {
        let ([i0, i1, _], len) = (part.first, self.tensors.shape()[3]);
        let Memory { numbers, elements, out: out_elements } = memory;
        if let (Compute::Read(compute), Tensors::Read(x)) = (compute, &self.tensors)
            && let Some(first) = part.dense(x)
            && let Some(x) = T::as_real(x.permuted(part.lay.axes()).dense_block([i0, i1, 0, 0], 2))
        {
            return compute(block, &x[first..][..part.count * len]);
        }
        // The numbers are computed in the output, if they can be there.
        if let Some((x, out)) = self.tensors.output()
            && let Some(first) = part.dense(out.as_ref())
            && let Some(out) = O::as_real_mut(out.permuted(part.lay.axes()).dense_block_mut([i0, i1, 0, 0], 2))
        {
            let numbers = &mut out[first..][..part.count * len];
            if let Some(x) = x {
                gather(part.of(&x), numbers, elements);
            }
            return compute.run(block, numbers);
        }
        numbers.resize(part.count * len, T::Real::default());
        self.tensors.gather(part, numbers, (elements, out_elements));
        compute.run(block, numbers);
        if let Some((_, out)) = self.tensors.output() {
            scatter(numbers, out, part, out_elements);
        }
    }
}

/// Writes numbers to their part of the output. `memory` is for elements of its type.
fn scatter<O: Sealed>(numbers: &[O::Real], out: StridedMut<'_, O, 4>, part: Block, memory: &mut Vec<O>) {
    let [i0, i1, i2] = part.first;
    let mut out = out.narrow(2, i2..i2 + part.count).permuted(part.lay.axes());
    let [.., count, len] = *out.as_ref().shape();
    if out.as_ref().matrix(i0, i1).has_contiguous_rows() {
        for (i, row) in numbers.chunks_exact(len).enumerate() {
            if let Ok(out) = out.row_mut([i0, i1, i]).into_mut_slice() {
                O::narrow(row, out);
            }
        }
        return;
    }
    let rows = O::of_real(numbers).unwrap_or_else(|| {
        memory.resize(numbers.len(), O::default());
        O::narrow(numbers, memory);
        memory
    });
    let mut tile = [[O::default(); TILE]; TILE];
    let mut columns = out.permuted([0, 1, 3, 2]);
    for (i, line) in tiles(len, count) {
        let (height, width) = (TILE.min(len - i), TILE.min(count - line));
        for n in 0..width {
            let row = &rows[(line + n) * len + i..][..height];
            tile.iter_mut().zip(row).for_each(|(tile, &y)| tile[n] = y);
        }
        let mut columns = columns.reborrow().narrow(3, line..line + width);
        for (n, tile) in tile[..height].iter().enumerate() {
            columns.row_mut([i0, i1, i + n]).fill_from(tile[..width].iter().copied());
        }
    }
}

/// Memory of a worker for blocks.
struct Memory<T, O, R> {
    numbers: Vec<R>,
    /// Of the input's type.
    elements: Vec<T>,
    /// Of the output's type.
    out: Vec<O>,
}

/// Copies rows into dense ones. `memory` is for elements of their type.
fn gather<T: Sealed>(lines: Matrix<'_, T>, rows: &mut [T::Real], memory: &mut Vec<T>) {
    let len = lines.cols();
    if len == 0 {
        return;
    }
    if lines.has_contiguous_rows() {
        for (i, row) in rows.chunks_exact_mut(len).enumerate() {
            if let Some(line) = lines.row(i).as_slice() {
                T::widen(line, row);
            }
        }
    } else if let Some(rows) = T::of_real_mut(rows) {
        transpose(lines, rows);
    } else {
        memory.resize(rows.len(), T::default());
        transpose(lines, memory);
        T::widen(memory, rows);
    }
}

/// Copies rows whose elements are not neighbours in memory, tile by tile: so each cache line is read and written once.
fn transpose<T: Sealed>(lines: Matrix<'_, T>, rows: &mut [T]) {
    let (count, len, columns) = (lines.rows(), lines.cols(), lines.transposed());
    let mut tile = [[T::default(); TILE]; TILE];
    for (i, line) in tiles(len, count) {
        let (height, width) = (TILE.min(len - i), TILE.min(count - line));
        for (n, tile) in tile[..height].iter_mut().enumerate() {
            let column = columns.row(i + n).slice(line..line + width);
            match column.as_slice() {
                Some(column) => tile[..width].copy_from_slice(column),
                None => tile.iter_mut().zip(column.iter()).for_each(|(tile, x)| *tile = x),
            }
        }
        for n in 0..width {
            let row = &mut rows[(line + n) * len + i..][..height];
            row.iter_mut().zip(&tile).for_each(|(x, tile)| *x = tile[n]);
        }
    }
}

/// The first element and the first line of each tile.
fn tiles(len: usize, count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(TILE).flat_map(move |i| (0..count).step_by(TILE).map(move |line| (i, line)))
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
