//! Strided parts of tensors as dense numbers, and back.
#![forbid(unsafe_code)]

use super::block::Block;
use super::sealed::Sealed;
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::StridedMut;

/// Elements and lines of a tile that is transposed, where the elements of a line are not neighbours in memory: the f32 of a cache
/// line.
pub(super) const TILE: usize = 16;

/// Copies rows into dense ones. `memory` is for elements of their type.
pub(super) fn gather<T: Sealed>(lines: Matrix<'_, T>, rows: &mut [T::Real], memory: &mut Vec<T>) {
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

/// Writes numbers to their part of the output. `memory` is for elements of its type.
pub(super) fn scatter<O: Sealed>(numbers: &[O::Real], out: StridedMut<'_, O, 4>, part: Block, memory: &mut Vec<O>) {
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
