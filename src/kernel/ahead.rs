//! Asking memory for what is needed next, a few lines at a time, while the multipliers are busy.
//!
//! Short sequences are computed about as fast as memory delivers them, and a worker that waits for each tile before it
//! multiplies pays for both. Asked for in one go, they would fill the processor's queue of misses and hold up its loads: so
//! products hand out the lines block by block.

use super::load::{AnyMatrix, with_matrix};
use crate::simd::Simd;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Matrices that one [`Ahead`] takes; more are not asked for.
const MAX_RUNS: usize = 12;

/// Rows of a matrix: where the next one starts, how far apart they are, their length (in bytes) and their number.
#[derive(Clone, Copy, Debug)]
struct Run {
    at: *const u8,
    stride: isize,
    bytes: usize,
    rows: usize,
}

/// Lines to ask for.
#[derive(Clone, Debug)]
pub(crate) struct Ahead {
    runs: [Run; MAX_RUNS],
    count: usize,
    /// The run and the byte of its first row that come next.
    run: usize,
    byte: usize,
    /// Lines to ask for with each block of a product.
    quota: usize,
}

impl Ahead {
    /// Nothing to ask for.
    pub(crate) fn nothing() -> Self {
        let none = Run { at: std::ptr::null(), stride: 0, bytes: 0, rows: 0 };
        Ahead { runs: [none; MAX_RUNS], count: 0, run: 0, byte: 0, quota: 0 }
    }

    /// Adds the rows of a matrix, if they have no gaps.
    pub(crate) fn add(&mut self, matrix: AnyMatrix<'_>) {
        if self.count < MAX_RUNS && matrix.has_contiguous_rows() && matrix.rows() * matrix.cols() > 0 {
            let (mut run, size) = with_matrix!(matrix, matrix => {
                (Run { at: matrix.as_ptr().cast(), stride: matrix.row_stride(), bytes: matrix.cols(), rows: matrix.rows() },
                 element_size(&matrix))
            });
            if run.stride == run.bytes as isize {
                (run.bytes, run.rows) = (run.bytes * run.rows, 1); // one after the other: a single long row
            }
            self.runs[self.count] =
                Run { stride: run.stride.wrapping_mul(size as isize), bytes: run.bytes * size, ..run };
            self.count += 1;
        }
    }

    /// Spreads the lines over so many blocks.
    pub(crate) fn spread(&mut self, blocks: usize) {
        let lines = |run: &Run| run.rows * run.bytes.div_ceil(LINE);
        self.quota = self.runs[..self.count].iter().map(lines).sum::<usize>().div_ceil(blocks.max(1));
    }

    /// Asks for one block's share.
    #[inline(always)]
    pub(crate) fn ask<S: Simd>(&mut self, simd: S) {
        if self.run == self.count {
            return;
        }
        let run = self.runs[self.run];
        let end = self.byte + self.quota * LINE;
        if end < run.bytes {
            let mut byte = self.byte;
            while byte < end {
                simd.prefetch(run.at.wrapping_add(byte));
                byte += LINE;
            }
            self.byte = end;
        } else {
            self.ask_across_rows(simd);
        }
    }

    /// As [`Ahead::ask`], a line at a time.
    #[cold]
    #[inline(never)]
    fn ask_across_rows<S: Simd>(&mut self, simd: S) {
        let mut left = self.quota;
        while left > 0 && self.run < self.count {
            let run = &mut self.runs[self.run];
            simd.prefetch(run.at.wrapping_add(self.byte));
            self.byte += LINE;
            if self.byte >= run.bytes {
                (run.at, run.rows, self.byte) = (run.at.wrapping_offset(run.stride), run.rows - 1, 0);
                if run.rows == 0 {
                    self.run += 1;
                }
            }
            left -= 1;
        }
    }
}

fn element_size<T>(_: &crate::strided::Matrix<'_, T>) -> usize {
    size_of::<T>()
}
