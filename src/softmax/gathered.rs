//! Lines of strided tensors as dense numbers: for the calls with options.
//!
//! A block of lines is copied into numbers of the type of the arithmetic (f32 for the half types), computed there, and written to
//! the output. So the bits of a line depend on its elements and on the axis alone: not on strides, on other lines or on threads. A
//! tensor is cut into pieces, which workers claim.
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::axis_loop::{is_large, visit_units, worth};
use super::block::{Block, Lay, softmax_block, states_of_block};
use super::chains::hide;
use super::chosen_level::isa;
use super::column::NextBlock;
use super::copies::{TILE, gather, scatter};
use super::filled_rows;
use super::lines::{LinePanel, Lines};
use super::scratch::Scratch;
use super::sealed::{FilledRows, Made, Sealed};
use super::shared::{Counter, Panel, PanelMut};
use crate::simd::LINE;
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::{Strided, StridedMut};
use crate::threads::workers;
use std::sync::{Mutex, PoisonError};

/// Elements of a block of rows: 64 KiB of f32, a small part of the second cache. Each block costs some allocations.
const BLOCK: usize = 1 << 14;

/// The most lines of a block of columns, and the fewest, if there are more. Memory is faster in long runs of each row; a
/// block of long columns should stay in the second cache.
const COLUMNS: (usize, usize) = (1 << 10, 64);

/// Bytes of a row of a block of columns, where the output is larger than a cache, or columns are read where they lie: see
/// `panel_lines` of `axis_loop.rs`.
const RUN_BYTES: usize = 1 << 10;

/// Pieces for each worker: see `CLAIMS_PER_WORKER` of `axis_loop.rs`.
const PIECES_PER_WORKER: usize = 8;

/// Gets a block of lines, from any worker.
#[derive(Clone, Copy)]
pub(super) enum Compute<'a, R> {
    /// It reads the numbers, which are the input itself where that is possible.
    Read(&'a (dyn Fn(Block, &[R]) + Sync)),
    /// It gets the states of the lines at scale 1.
    States(&'a (dyn Fn(Block, Vec<(f64, f64)>) + Sync)),
    /// What it leaves in the numbers is written to the output.
    Write(&'a (dyn Fn(Block, &mut [R]) + Sync)),
    /// The softmax of what it leaves in the numbers is written to the output.
    Softmax(&'a SoftmaxOf<'a, R>),
}

/// Softmax, or log_softmax, of the elements that a mask shows.
pub(super) struct SoftmaxOf<'a, R> {
    pub(super) mask: Option<Strided<'a, u8, 4>>,
    pub(super) scale: R,
    pub(super) log: bool,
}

/// Applies a mask to rows of the numbers of a block, from `first` on.
pub(super) fn hide_in_block<R: Sealed>(
    mask: Option<&Strided<'_, u8, 4>>,
    block: Block,
    first: usize,
    numbers: &mut [R],
) {
    let Some(mask) = mask.map(|mask| block.of(mask)) else { return };
    let rows = numbers.len() / mask.cols();
    hide(isa(), numbers, mask.slice_rows(first..first + rows));
}

/// Copies some rows of a block, from `first` on, and hides what its mask does not show.
fn gather_visible<T: Sealed>(
    from: Matrix<'_, T>,
    softmax: &SoftmaxOf<'_, T::Real>,
    block: Block,
    first: usize,
    numbers: &mut [T::Real],
    memory: &mut Vec<T>,
) {
    if let Some(mask) = softmax.mask.as_ref().map(|mask| block.of(mask))
        && from.has_contiguous_rows()
        && mask.has_contiguous_rows()
    {
        for (n, to) in numbers.chunks_exact_mut(from.cols()).enumerate() {
            if let (Some(from), Some(visible)) = (from.row(n).as_slice(), mask.row(first + n).as_slice()) {
                T::widen_visible(from, visible, to);
            }
        }
        return;
    }
    gather(from, numbers, memory);
    hide_in_block(softmax.mask.as_ref(), block, first, numbers);
}

impl<R: Sealed<Real = R>> Compute<'_, R> {
    fn run(self, block: Block, numbers: &mut [R]) {
        match self {
            Compute::Read(compute) => compute(block, numbers),
            Compute::States(compute) => compute(block, states_of_block(block, numbers, R::real(1.0))),
            Compute::Write(compute) => compute(block, numbers),
            Compute::Softmax(softmax) => {
                hide_in_block(softmax.mask.as_ref(), block, 0, numbers);
                softmax_block(block, numbers, softmax.scale, softmax.log);
            }
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
    let large = is_large::<O>(axis.elements());
    let whole = Piece { tensors, lay, first: [0; 3], lines: [n0, n1, n2], large };
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
    /// Whether the whole output is larger than a cache.
    large: bool,
}

impl<T: Sealed, O: Sealed<Real = T::Real>> Piece<'_, T, O> {
    /// The piece in two. One line stays one piece, and so do two or three columns.
    fn push_halves(self, halves: &mut Vec<Self>) {
        let shape = self.tensors.shape();
        let least = |axis| if axis == 2 && self.lay == Lay::Columns { 4 } else { 2 };
        let Some(axis) = (0..3).find(|&axis| shape[axis] >= least(axis)) else { return halves.push(self) };
        let (Piece { tensors, lay, first, lines, large }, middle) = (self, shape[axis] / 2);
        let (left, right) = tensors.split_at(axis, middle);
        let mut second = first;
        second[axis] += middle;
        halves.push(Piece { tensors: left, lay, first, lines, large });
        halves.push(Piece { tensors: right, lay, first: second, lines, large });
    }

    fn compute(mut self, compute: Compute<'_, T::Real>) {
        let ([n0, n1, n2, _], step) = (self.tensors.shape(), self.lines_of_block(compute));
        // A single column would be a row.
        let spare = if self.lay == Lay::Columns { 1 } else { 0 };
        let mut memory =
            Memory { numbers: Vec::new(), elements: Vec::new(), out: Vec::new(), scratch: Scratch::default() };
        for (i0, i1) in (0..n0).flat_map(|i0| (0..n1).map(move |i1| (i0, i1))) {
            let mut i2 = 0;
            while i2 < n2 {
                // Later blocks start at cache lines of the output.
                let step = if i2 == 0 { step + self.head([i0, i1, 0]) } else { step };
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
    fn lines_of_block(&self, compute: Compute<'_, T::Real>) -> usize {
        let [.., lines, len] = self.tensors.shape();
        let fit = BLOCK / len.max(1);
        let step = match (self.lay, &self.tensors) {
            (Lay::Columns, Tensors::Into { out, .. }) if self.large && out.as_ref().strides()[2] == 1 => {
                RUN_BYTES / size_of::<O>()
            }
            (Lay::Columns, Tensors::Read(x)) if matches!(compute, Compute::States(_)) && x.strides()[2] == 1 => {
                RUN_BYTES / size_of::<T>()
            }
            (Lay::Columns, _) => fit.clamp(COLUMNS.1, COLUMNS.0),
            (Lay::Rows, Tensors::Read(x) | Tensors::Into { x, .. }) if x.matrix(0, 0).has_contiguous_rows() => {
                fit.max(1)
            }
            (Lay::Rows, Tensors::InPlace(out)) if out.as_ref().matrix(0, 0).has_contiguous_rows() => fit.max(1),
            (Lay::Rows, _) => fit.max(TILE),
        };
        step.min(lines)
    }

    /// Whether the output is streamed past the caches: whole cache lines of columns, whose rows all start at the same place in one.
    fn streams(&self) -> bool {
        let Tensors::Into { out, .. } = &self.tensors else { return false };
        let (shape, strides) = (out.as_ref().shape(), out.as_ref().strides());
        let bytes = size_of::<O>() as isize;
        let whole = |axis: usize| shape[axis] == 1 || strides[axis].wrapping_mul(bytes) % LINE as isize == 0;
        self.large && self.lay == Lay::Columns && strides[2] == 1 && [0, 1, 3].into_iter().all(whole)
    }

    /// Lines up to the first cache line of the output at `[i0, i1, i2]`; 0 if it is not streamed.
    fn head(&self, [i0, i1, i2]: [usize; 3]) -> usize {
        match &self.tensors {
            Tensors::Into { out, .. } if self.streams() => {
                let lines = out.as_ref().matrix(i0, i1).slice_rows(i2..out.as_ref().shape()[2]);
                lines.as_ptr().align_offset(LINE).min(lines.rows())
            }
            _ => 0,
        }
    }

    /// Computes columns block by block of their elements, so that only the exponentials of all of them are in memory; false, and
    /// nothing is done, if the type or the output does not allow it.
    fn softmax_of_columns(
        &mut self,
        part: Block,
        block: Block,
        softmax: &SoftmaxOf<'_, T::Real>,
        memory: &mut Memory<T, O, T::Real>,
    ) -> bool {
        let (stream, head) = (self.streams(), self.head(part.first).min(part.count));
        let Tensors::Into { x, out } = &mut self.tensors else { return false };
        let [i0, i1, i2] = part.first;
        let mut out = out.reborrow().narrow(2, i2..i2 + part.count).permuted(part.lay.axes());
        let Some(out) = PanelMut::of_tensor(&mut out, [i0, i1]) else { return false };
        let (elements, Memory { elements: copies, scratch, .. }) = (part.of(x), memory);
        let mask = softmax.mask.as_ref().map(|mask| block.of(mask));
        let mut make = |rows: LinePanel, numbers: &mut [T::Real]| {
            let from = elements.slice_rows(rows.first..rows.first + rows.len);
            gather_visible(from, softmax, block, rows.first, numbers, copies);
            let stride = elements.row_stride().wrapping_mul(size_of::<T>() as isize);
            let next = elements.as_ptr().wrapping_byte_offset(stride.wrapping_mul((rows.first + rows.len) as isize));
            // A row whose elements are not neighbours has no address range to prefetch.
            let next = NextBlock::new(next, stride, if elements.has_contiguous_rows() { part.count } else { 0 });
            match mask.filter(|mask| mask.has_contiguous_rows() && elements.has_contiguous_rows()) {
                Some(mask) => {
                    let row = (rows.first + rows.len) as isize;
                    let at = mask.as_ptr().wrapping_offset(mask.row_stride().wrapping_mul(row));
                    next.with_mask(at, mask.row_stride(), part.count)
                }
                None => next,
            }
        };
        let panel = LinePanel { first: 0, len: elements.rows(), width: part.count, head };
        O::softmax_of_made(Made { panel, make: &mut make, out, stream }, softmax.scale, softmax.log, scratch)
    }

    /// Computes rows that are read and masked in one pass; false, and nothing is done, if the type, the length, the mask or the strides
    /// do not allow it.
    fn softmax_of_rows(
        &mut self,
        part: Block,
        block: Block,
        softmax: &SoftmaxOf<'_, T::Real>,
        scratch: &mut Scratch,
    ) -> bool {
        let (stream, [.., len]) = (self.large, self.tensors.shape());
        let (Tensors::Into { x, out }, Some(fill)) = (&mut self.tensors, T::filler()) else { return false };
        let ([i0, i1, i2], elements) = (part.first, part.of(x));
        let mask = softmax.mask.as_ref().map(|mask| block.of(mask));
        let out = out.reborrow().narrow(2, i2..i2 + part.count);
        let neighbours = elements.has_contiguous_rows()
            && mask.is_none_or(|mask| mask.has_contiguous_rows())
            && out.as_ref().matrix(i0, i1).has_contiguous_rows();
        if !neighbours || !filled_rows::fits(len) {
            return false;
        }
        let stride = elements.row_stride().wrapping_mul(size_of::<T>() as isize);
        let mut fill = |row: usize, tile: &mut [T::Real]| {
            let x = elements.row(row).as_slice().unwrap_or_default();
            let visible = mask.map(|mask| mask.row(row).as_slice().unwrap_or_default());
            (fill(x, visible, tile, (softmax.scale, softmax.log)), x.as_ptr().cast::<u8>().wrapping_offset(stride))
        };
        let rows = FilledRows { fill: &mut fill, out, at: [i0, i1], stream };
        O::softmax_of_filled(rows, softmax.scale, softmax.log, scratch)
    }

    /// The states of columns that are read where they lie; `None` if the type or the input does not allow it.
    fn states_of_columns(&self, part: Block, scratch: &mut Scratch) -> Option<Vec<(f64, f64)>> {
        let Tensors::Read(x) = &self.tensors else { return None };
        let mut states = vec![(0.0, 0.0); part.count];
        let mut visit = |line: usize, max, sum| states[line] = (max, sum);
        T::states_of_panel(Panel::of_matrix(part.of(x))?, scratch, &mut visit).then_some(states)
    }

    /// Computes a block, which is `part` of the piece.
    fn compute_block(
        &mut self,
        part: Block,
        block: Block,
        compute: Compute<'_, T::Real>,
        memory: &mut Memory<T, O, T::Real>,
    ) {
        if let Compute::Softmax(softmax) = compute {
            let done = match part.lay {
                Lay::Rows => self.softmax_of_rows(part, block, softmax, &mut memory.scratch),
                Lay::Columns => self.softmax_of_columns(part, block, softmax, memory),
            };
            if done {
                return;
            }
        }
        if let (Compute::States(compute), Lay::Columns) = (compute, part.lay)
            && let Some(states) = self.states_of_columns(part, &mut memory.scratch)
        {
            return compute(block, states);
        }
        let ([i0, i1, _], len) = (part.first, self.tensors.shape()[3]);
        let Memory { numbers, elements, out: out_elements, .. } = memory;
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

/// Memory of a worker for blocks.
struct Memory<T, O, R> {
    numbers: Vec<R>,
    /// Of the input's type.
    elements: Vec<T>,
    /// Of the output's type.
    out: Vec<O>,
    scratch: Scratch,
}
