//! Lines of strided tensors as dense rows: for the calls with options, which are computed row by row.
//!
//! A block of lines is copied into rows of the type of the arithmetic (f32 for the half types), computed there, and written to
//! the output. So the bits of a line depend on its elements alone: not on strides, on other lines or on threads. A tensor is cut
//! into pieces, which workers claim.
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

/// Elements of a block: 64 KiB of f32, a small part of the second cache. Each block costs some allocations.
const BLOCK: usize = 1 << 14;

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

/// Neighbouring lines: those at `[i0, i1, i2..i2 + count]` of the first three axes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) first: [usize; 3],
    pub(super) count: usize,
    /// The number of the first line.
    pub(super) line: usize,
}

/// Gets a block of lines as rows, from any worker.
#[derive(Clone, Copy)]
pub(super) enum Compute<'a, R> {
    /// It reads the rows, which are the input itself where that is possible.
    Read(&'a (dyn Fn(Block, &[R]) + Sync)),
    /// What it leaves in the rows is written to the output.
    Write(&'a (dyn Fn(Block, &mut [R]) + Sync)),
}

impl<R> Compute<'_, R> {
    fn run(self, block: Block, rows: &mut [R]) {
        match self {
            Compute::Read(compute) => compute(block, rows),
            Compute::Write(compute) => compute(block, rows),
        }
    }
}

/// Hands the lines along the last axis of `x` to `compute`, block by block, and writes the rows to `out`, of the same shape. The
/// number of lines fits a `usize`.
pub(super) fn for_each_block<T: Sealed, O: Sealed<Real = T::Real>>(
    x: Strided<'_, T, 4>,
    out: Option<StridedMut<'_, O, 4>>,
    compute: Compute<'_, T::Real>,
) -> Result<(), crate::error::Error> {
    let [n0, n1, n2, len] = *x.shape();
    let axis = Axis::new(&[n0, n1, n2, len], 3)?;
    let whole = Piece { x, out, first: [0; 3], lines: [n0, n1, n2] };
    if axis.lines() == 0 {
        return Ok(());
    }
    let worth = worth(axis);
    let workers = workers(worth, axis.lines());
    if workers == 1 {
        whole.compute(compute);
        return Ok(());
    }
    let mut pieces = vec![whole];
    while pieces.len() < (workers * PIECES_PER_WORKER).min(axis.lines()) {
        let mut halves = Vec::with_capacity(2 * pieces.len());
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

/// Some of the lines, with their place among all.
struct Piece<'a, T, O> {
    x: Strided<'a, T, 4>,
    out: Option<StridedMut<'a, O, 4>>,
    first: [usize; 3],
    /// The sizes of the first three axes of the whole tensor.
    lines: [usize; 3],
}

impl<T: Sealed, O: Sealed<Real = T::Real>> Piece<'_, T, O> {
    /// The piece in two; one line stays one piece.
    fn push_halves(self, halves: &mut Vec<Self>) {
        let shape = *self.x.shape();
        let Some(axis) = (0..3).find(|&axis| shape[axis] > 1) else { return halves.push(self) };
        let (Piece { x, out, first, lines }, middle) = (self, shape[axis] / 2);
        let (left, right) = out.map(|out| out.split_at(axis, middle)).unzip();
        let mut second = first;
        second[axis] += middle;
        halves.push(Piece { x: x.narrow(axis, 0..middle), out: left, first, lines });
        halves.push(Piece { x: x.narrow(axis, middle..shape[axis]), out: right, first: second, lines });
    }

    fn compute(mut self, compute: Compute<'_, T::Real>) {
        let [n0, n1, n2, len] = *self.x.shape();
        let least = if self.x.matrix(0, 0).has_contiguous_rows() { 1 } else { TILE };
        let step = (BLOCK / len.max(1)).max(least).min(n2);
        let mut memory = Memory { rows: Vec::new(), elements: Vec::new(), out: Vec::new() };
        for (i0, i1) in (0..n0).flat_map(|i0| (0..n1).map(move |i1| (i0, i1))) {
            for i2 in (0..n2).step_by(step) {
                let (count, [all0, all1, all2]) = (step.min(n2 - i2), [i0, i1, i2]);
                let first = [self.first[0] + all0, self.first[1] + all1, self.first[2] + all2];
                let line = (first[0] * self.lines[1] + first[1]) * self.lines[2] + first[2];
                let block = Block { first, count, line };
                let lines = self.x.matrix(i0, i1).slice_rows(i2..i2 + count);
                if let (Compute::Read(compute), true) = (compute, self.x.is_dense_from(2))
                    && let Some(x) = T::as_real(self.x.dense_block([i0, i1, 0, 0], 2))
                {
                    compute(block, &x[i2 * len..][..count * len]);
                    continue;
                }
                // Rows are computed in the output, if they can be there.
                let dense = self.out.as_mut().filter(|out| out.as_ref().is_dense_from(2));
                let dense = dense.and_then(|out| O::as_real_mut(out.dense_block_mut([i0, i1, 0, 0], 2)));
                if let Some(out) = dense {
                    let rows = &mut out[i2 * len..][..count * len];
                    gather(lines, rows, &mut memory.elements);
                    compute.run(block, rows);
                    continue;
                }
                memory.rows.resize(count * len, T::Real::default());
                gather(lines, &mut memory.rows, &mut memory.elements);
                compute.run(block, &mut memory.rows);
                self.scatter([i0, i1, i2], count, &memory.rows, &mut memory.out);
            }
        }
    }

    /// Writes rows to `count` lines of the output. `memory` is for elements of its type.
    fn scatter(&mut self, [i0, i1, i2]: [usize; 3], count: usize, rows: &[T::Real], memory: &mut Vec<O>) {
        let Some(out) = &mut self.out else { return };
        let [.., len] = *out.as_ref().shape();
        if out.as_ref().matrix(i0, i1).has_contiguous_rows() {
            for (line, row) in rows.chunks_exact(len).enumerate() {
                if let Ok(out) = out.row_mut([i0, i1, i2 + line]).into_mut_slice() {
                    O::narrow(row, out);
                }
            }
            return;
        }
        let rows = O::of_real(rows).unwrap_or_else(|| {
            memory.resize(rows.len(), O::default());
            O::narrow(rows, memory);
            memory
        });
        let mut tile = [[O::default(); TILE]; TILE];
        for (i, line) in tiles(len, count) {
            let (height, width) = (TILE.min(len - i), TILE.min(count - line));
            for n in 0..width {
                let row = &rows[(line + n) * len + i..][..height];
                tile.iter_mut().zip(row).for_each(|(tile, &y)| tile[n] = y);
            }
            let lines = i2 + line..i2 + line + width;
            let mut columns = out.reborrow().narrow(2, lines).permuted([0, 1, 3, 2]);
            for (n, tile) in tile[..height].iter().enumerate() {
                columns.row_mut([i0, i1, i + n]).fill_from(tile[..width].iter().copied());
            }
        }
    }
}

/// Memory of a worker for blocks.
struct Memory<T, O, R> {
    rows: Vec<R>,
    /// Of the input's type.
    elements: Vec<T>,
    /// Of the output's type.
    out: Vec<O>,
}

/// Copies lines into rows. `memory` is for elements of their type.
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

/// Copies lines whose elements are not neighbours in memory, tile by tile: so each cache line is read and written once.
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

/// Softmax, or log_softmax, of rows in place.
pub(super) fn softmax_rows<R: Sealed<Real = R>>(rows: &mut [R], count: usize, scale: R, log: bool) {
    let len = rows.len() / count;
    for (range, axis) in together(count, len) {
        R::softmax(Buffers::InPlace(&mut rows[range.start * len..range.end * len]), axis, scale, log);
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

/// (scale * max, sum) of each row.
pub(super) fn states_of_rows<R: Sealed<Real = R>>(x: &[R], count: usize, scale: R) -> Vec<(f64, f64)> {
    let (len, mut states) = (x.len() / count, vec![(0.0, 0.0); count]);
    for (range, axis) in together(count, len) {
        let (elements, first) = (range.start * len..range.end * len, range.start);
        R::states(&x[elements], axis, scale, &mut |row, max, sum| states[first + row] = (max, sum));
    }
    states
}
