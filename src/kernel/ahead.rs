//! Asking memory for what is needed next, a few lines at a time, while the multipliers are busy.
//!
//! Short sequences are computed about as fast as memory delivers them, and a worker that waits for each tile before it
//! multiplies pays for both. Asked for in one go, they would fill the processor's queue of misses and hold up its loads: so
//! products hand out the lines block by block.

use super::load::{AnyMatrix, with_matrix};
use crate::simd::Simd;
use crate::strided::Matrix;

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

/// Lines side by side that a product asks for on its way, some in each of its parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub(super) at: *const u8,
    /// In each part.
    pub(super) lines: usize,
}

impl Stretch {
    pub(super) const NOTHING: Self = Stretch { at: std::ptr::null(), lines: 0 };

    /// Asks for one part's lines.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&mut self, simd: S) {
        for _ in 0..self.lines {
            simd.prefetch(self.at);
            self.at = self.at.wrapping_add(LINE);
        }
    }
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

    /// Adds the rows of a matrix.
    pub(crate) fn add(&mut self, matrix: AnyMatrix<'_>) {
        with_matrix!(matrix, matrix => self.add_rows(matrix));
    }

    fn add_rows<T: Copy>(&mut self, matrix: Matrix<'_, T>) {
        let (rows, cols, size) = (matrix.rows(), matrix.cols(), size_of::<T>());
        // Rows with gaps are read an element at a time, and slowly: nothing is gained by having them there.
        if self.count == MAX_RUNS || !matrix.has_contiguous_rows() || rows == 0 || cols == 0 {
            return;
        }
        // Rows one after the other are a single long one.
        let (rows, cols) = if matrix.row_stride() == cols as isize { (1, rows * cols) } else { (rows, cols) };
        let stride = matrix.row_stride().wrapping_mul(size as isize);
        self.runs[self.count] = Run { at: matrix.as_ptr().cast(), stride, bytes: cols * size, rows };
        self.count += 1;
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

    /// One block's share, to be asked for in `parts` parts: from one row, or else asked for at once.
    #[inline(always)]
    pub(super) fn stretch<S: Simd>(&mut self, simd: S, parts: usize) -> Stretch {
        if self.run == self.count {
            return Stretch::NOTHING;
        }
        let (run, start) = (self.runs[self.run], self.byte);
        let lines = self.quota.div_ceil(parts.max(1));
        let end = start + lines * parts * LINE;
        if parts == 0 || end >= run.bytes {
            self.ask(simd);
            return Stretch::NOTHING;
        }
        self.byte = end;
        Stretch { at: run.at.wrapping_add(start), lines }
    }

    /// As [`Ahead::ask`], a line at a time.
    #[cold]
    #[inline(never)]
    fn ask_across_rows<S: Simd>(&mut self, simd: S) {
        for _ in 0..self.quota {
            match self.next_line() {
                Some(line) => simd.prefetch(line),
                None => return,
            }
        }
    }

    /// The next line to ask for.
    fn next_line(&mut self) -> Option<*const u8> {
        let run = self.runs[..self.count].get_mut(self.run)?;
        let line = run.at.wrapping_add(self.byte);
        self.byte += LINE;
        if self.byte >= run.bytes {
            (run.at, run.rows, self.byte) = (run.at.wrapping_offset(run.stride), run.rows - 1, 0);
            if run.rows == 0 {
                self.run += 1;
            }
        }
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line of every row comes once, in order; rows side by side are one.
    #[test]
    fn every_line_comes_once() {
        let data = [0.0f32; 4 * 40];
        let mut ahead = Ahead::nothing();
        assert_eq!(ahead.next_line(), None);
        ahead.add(AnyMatrix::F32(Matrix::from_slice(&data, 4, 40).slice_rows(1..3))); // 320 bytes
        ahead.add(AnyMatrix::F32(Matrix::from_slice(&data[..0], 0, 40)));
        let strided = crate::strided::Strided::new(&data, 0, [1, 1, 2, 20], [0, 0, 80, 1]).unwrap();
        ahead.add(AnyMatrix::F32(strided.matrix(0, 0))); // two rows of 80 bytes, 320 apart
        let expected =
            [160, 224, 288, 352, 416, 0, 64, 320, 384].map(|byte| data.as_ptr().cast::<u8>().wrapping_add(byte));
        let lines: Vec<_> = std::iter::from_fn(|| ahead.next_line()).collect();
        assert_eq!(lines, expected);
    }

    /// All has been asked for after as many blocks as it was spread over.
    #[test]
    fn blocks_share_the_lines() {
        struct AskAll<'a>(&'a mut Ahead, usize);
        impl crate::simd::Kernel for AskAll<'_> {
            type Output = ();
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) {
                for _ in 0..self.1 {
                    self.0.ask(simd);
                }
            }
        }
        let data = [0u16; 7 * 100].map(crate::bf16::from_bits);
        for blocks in 1..40 {
            let mut ahead = Ahead::nothing();
            ahead.add(AnyMatrix::Bf16(Matrix::from_slice(&data, 7, 100)));
            let strided = crate::strided::Strided::new(&data, 0, [1, 1, 6, 90], [0, 0, 100, 1]).unwrap();
            ahead.add(AnyMatrix::Bf16(strided.matrix(0, 0)));
            ahead.spread(blocks);
            crate::simd::Isa::best().run(AskAll(&mut ahead, blocks));
            assert_eq!(ahead.next_line(), None, "{blocks} blocks");
        }
    }
}
