//! Asking memory for what is needed next, a few lines at a time, while the multipliers are busy.
//!
//! Short sequences are computed about as fast as memory delivers them, and a worker that waits for each tile before it
//! multiplies pays for both. Asked for in one go, they would fill the processor's queue of misses and hold up its loads: so
//! products hand out the lines on their way, some with every few steps.

use crate::element::with_elements;
use crate::kv::run::{Run, with_run};
use crate::simd::{LINE, Simd};
use crate::tensor::group::{AnyGroupRows, AnyGroupRowsMut};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// Matrices that one [`Prefetch`] takes; more are not asked for.
const MAX_RUNS: usize = 12;

/// Rows of a matrix: where the next one starts, how far apart they are, their length (in bytes) and their number.
#[derive(Clone, Copy, Debug)]
struct Rows {
    at: *const u8,
    stride: isize,
    bytes: usize,
    rows: usize,
}

impl Rows {
    const NONE: Self = Rows { at: std::ptr::null(), stride: 0, bytes: 0, rows: 0 };

    fn row_lines(&self) -> usize {
        self.bytes.div_ceil(LINE)
    }

    fn lines(&self) -> usize {
        self.rows * self.row_lines()
    }
}

/// What one loop asks for of [`Lines`].
pub(in crate::kernel) struct LineShare {
    at: *const u8,
    /// From what one turn asks for to what the next one does; 0 where there is nothing to ask for.
    advance: usize,
}

impl LineShare {
    /// Asks for what turn `turn` of the loop asks for, as [`Lines::share`] has it.
    #[inline(always)]
    pub(in crate::kernel) fn ask<S: Simd>(&mut self, simd: S, turn: usize, bytes: usize) {
        if turn.is_multiple_of(turns_a_line(bytes)) {
            for n in 0..lines_a_turn(bytes) {
                simd.prefetch_near(self.at.wrapping_add(n * LINE));
            }
            self.at = self.at.wrapping_add(self.advance);
        }
    }
}

/// Lines to ask for in a turn that reads so many bytes, where it asks for any.
#[inline(always)]
fn lines_a_turn(bytes: usize) -> usize {
    (bytes / LINE).max(1)
}

/// One of so many turns asks for any.
#[inline(always)]
fn turns_a_line(bytes: usize) -> usize {
    (LINE / bytes).max(1)
}

/// Where asking has come to in some rows, and how to go on.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    at: *const u8,
    /// Lines left in this row, and in each of the next ones.
    left: usize,
    row_lines: usize,
    /// From behind a row's last line to the next row.
    jump: isize,
}

impl Cursor {
    /// The next line; behind the last row, whatever stands there.
    #[inline(always)]
    fn step(&mut self) -> *const u8 {
        let line = self.at;
        self.at = self.at.wrapping_add(LINE);
        self.left -= 1;
        if self.left == 0 {
            (self.at, self.left) = (self.at.wrapping_offset(self.jump), self.row_lines);
        }
        line
    }
}

/// What one product asks for: some lines in each of its parts.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Share {
    cursor: Cursor,
    /// In each part.
    lines: usize,
}

impl Share {
    /// Asks for the lines of one part. (It may go on behind the last row until the product ends: that is harmless.)
    #[inline(always)]
    pub(in crate::kernel) fn ask<S: Simd>(&mut self, simd: S) {
        if self.lines < self.cursor.left {
            // Within a row, as nearly always: without a look at its end.
            for n in 0..self.lines {
                simd.prefetch_near(self.cursor.at.wrapping_add(n * LINE));
            }
            self.cursor.at = self.cursor.at.wrapping_add(self.lines * LINE);
            self.cursor.left -= self.lines;
        } else {
            for _ in 0..self.lines {
                simd.prefetch_near(self.cursor.step());
            }
        }
    }
}

/// Lines that are asked for one after the other, into the first cache: what is read a little later.
///
/// In the order of memory, whichever way the rows are read: on Zen 5, asked for by rows side by side, they came a tenth later.
pub(in crate::kernel) struct Lines<'a> {
    /// The next one, and how many are left in its row: none where all have been asked for.
    at: *const u8,
    left: usize,
    /// Where the next row starts; `rows` are left from there on.
    run: Rows,
    /// What comes behind these rows.
    more: &'a [Rows],
}

impl Lines<'_> {
    /// Nothing to ask for.
    pub(in crate::kernel) fn none() -> Self {
        Lines { at: std::ptr::null(), left: 0, run: Rows::NONE, more: &[] }
    }

    /// What a loop of so many turns asks for, which reads so many bytes in each: as many lines as that is. Where there is
    /// nothing more to ask for it asks for `idle`, which is in use anyway.
    #[inline(always)]
    pub(in crate::kernel) fn share<S: Simd, T>(
        &mut self,
        simd: S,
        turns: usize,
        bytes: usize,
        idle: *const T,
    ) -> LineShare {
        let lines = turns.div_ceil(turns_a_line(bytes)) * lines_a_turn(bytes);
        if lines < self.left {
            // Within a row, as nearly always.
            let share = LineShare { at: self.at, advance: lines_a_turn(bytes) * LINE };
            self.at = self.at.wrapping_add(lines * LINE);
            self.left -= lines;
            return share;
        }
        // Across the end of a row, all at once.
        for _ in 0..lines {
            let Some(line) = self.next_line() else { break };
            simd.prefetch_near(line);
        }
        LineShare { at: idle.cast(), advance: 0 }
    }

    #[inline(always)]
    fn next_line(&mut self) -> Option<*const u8> {
        if self.left == 0 {
            return None;
        }
        let line = self.at;
        self.at = self.at.wrapping_add(LINE);
        self.left -= 1;
        if self.left == 0 {
            self.next_row();
        }
        Some(line)
    }

    /// Goes to the start of the next row that has any lines, if there is one.
    fn next_row(&mut self) {
        if self.run.rows == 0
            && let Some((run, more)) = self.more.split_first()
        {
            (self.run, self.more) = (*run, more);
        }
        if self.run.rows > 0 {
            (self.at, self.left) = (self.run.at, self.run.row_lines());
            self.run.at = self.run.at.wrapping_offset(self.run.stride);
            self.run.rows -= 1;
        }
    }
}

/// Lines to ask for.
#[derive(Clone, Debug)]
pub(crate) struct Prefetch {
    runs: [Rows; MAX_RUNS],
    count: usize,
    /// The next of the runs.
    run: usize,
    /// Where asking has come to in the run before that, and how many of its lines are left.
    cursor: Cursor,
    left: usize,
    /// Lines to ask for with each part of a product.
    quota: usize,
}

impl Prefetch {
    /// Nothing to ask for.
    pub(crate) fn none() -> Self {
        let nowhere = Cursor { at: std::ptr::null(), left: 0, row_lines: 0, jump: 0 };
        Prefetch { runs: [Rows::NONE; MAX_RUNS], count: 0, run: 0, cursor: nowhere, left: 0, quota: 0 }
    }

    /// Nothing any more.
    pub(crate) fn clear(&mut self) {
        (self.count, self.run, self.left) = (0, 0, 0);
    }

    /// Adds a run of keys or values.
    pub(crate) fn add_run(&mut self, run: Run<'_>) {
        with_run!(run, rows => self.add_rows(rows));
    }

    /// Adds the rows of a group.
    pub(crate) fn add_group(&mut self, rows: AnyGroupRows<'_>) {
        with_elements!(rows, rows => rows.heads().for_each(|head| self.add_rows(head)));
    }

    /// Adds some columns of the rows of a group.
    pub(crate) fn add_group_cols(&mut self, rows: AnyGroupRows<'_>, cols: Range<usize>) {
        with_elements!(rows, rows => rows.heads().for_each(|head| self.add_rows(head.slice_cols(cols.clone()))));
    }

    /// Adds rows that will be written.
    pub(crate) fn add_output(&mut self, rows: &AnyGroupRowsMut<'_>) {
        with_elements!(rows, rows => if rows.has_contiguous_rows() {
            rows.heads().for_each(|(at, stride, count)| self.add_at(at, stride, [count, rows.cols()]));
        });
    }

    /// Adds rows of any type.
    pub(crate) fn add_rows<T: Copy>(&mut self, matrix: Matrix<'_, T>) {
        // Rows with gaps are read an element at a time, and slowly: nothing is gained by having them there.
        if matrix.has_contiguous_rows() {
            self.add_at(matrix.as_ptr(), matrix.row_stride(), [matrix.rows(), matrix.cols()]);
        }
    }

    fn add_at<T>(&mut self, at: *const T, row_stride: isize, [rows, cols]: [usize; 2]) {
        let size = size_of::<T>();
        if self.count == MAX_RUNS || rows == 0 || cols == 0 {
            return;
        }
        // Rows one after the other are a single long one.
        let (rows, cols) = if row_stride == cols as isize { (1, rows * cols) } else { (rows, cols) };
        let stride = row_stride.wrapping_mul(size as isize);
        self.runs[self.count] = Rows { at: at.cast(), stride, bytes: cols * size, rows };
        self.count += 1;
    }

    /// All lines, from the first on.
    pub(in crate::kernel) fn lines(&self) -> Lines<'_> {
        let mut lines = Lines { more: &self.runs[..self.count], ..Lines::none() };
        lines.next_row();
        lines
    }

    /// Spreads the lines over so many parts of products.
    pub(crate) fn spread(&mut self, parts: usize) {
        let lines = self.runs[..self.count].iter().map(Rows::lines).sum::<usize>();
        self.quota = lines.div_ceil(parts.max(1));
    }

    /// What a product of so many parts is to ask for; [`Prefetch::go_on`] takes it back.
    #[inline(always)]
    pub(in crate::kernel) fn share(&mut self, parts: usize) -> Share {
        if self.left == 0 {
            self.next_run();
        }
        // (After the last run, nothing.)
        let lines = if self.left == 0 { 0 } else { self.quota };
        self.left = self.left.saturating_sub(lines * parts);
        Share { cursor: self.cursor, lines }
    }

    /// Goes on where a product has come to.
    #[inline(always)]
    pub(in crate::kernel) fn go_on(&mut self, share: Share) {
        self.cursor = share.cursor;
    }

    fn next_run(&mut self) {
        if let Some(run) = self.runs[..self.count].get(self.run) {
            let row_lines = run.row_lines();
            let jump = run.stride.wrapping_sub((row_lines * LINE) as isize);
            self.cursor = Cursor { at: run.at, left: row_lines, row_lines, jump };
            self.left = run.lines();
            self.run += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ask<'a>(&'a mut Share, usize);
    impl crate::simd::Kernel for Ask<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for _ in 0..self.1 {
                self.0.ask(simd);
            }
        }
    }

    /// What products of so many parts ask for, until there is nothing left.
    fn asked(ahead: &mut Prefetch, parts: usize) -> Vec<*const u8> {
        let mut lines = Vec::new();
        loop {
            let mut share = ahead.share(parts);
            if share.lines == 0 {
                return lines;
            }
            let mut asking = share;
            lines.extend((0..parts * share.lines).map(|_| share.cursor.step()));
            crate::simd::Isa::best().run(Ask(&mut asking, parts));
            let place = |cursor: Cursor| (cursor.at, cursor.left);
            assert_eq!(place(asking.cursor), place(share.cursor), "asking goes the same way");
            ahead.go_on(share);
        }
    }

    /// Every line of every row comes once, in order; rows side by side are one.
    #[test]
    fn every_line_comes_once() {
        let data = [0.0f32; 4 * 40];
        let mut ahead = Prefetch::none();
        ahead.spread(1);
        assert!(asked(&mut ahead, 1).is_empty());
        ahead.add_run(Run::F32(Matrix::from_slice(&data, 4, 40).slice_rows(1..3))); // 320 bytes
        ahead.add_run(Run::F32(Matrix::from_slice(&data[..0], 0, 40)));
        let strided = crate::tensor::strided::Strided::new(&data, 0, [1, 1, 2, 20], [0, 0, 80, 1]).unwrap();
        ahead.add_run(Run::F32(strided.matrix(0, 0))); // two rows of 80 bytes, 320 apart
        let expected =
            [160, 224, 288, 352, 416, 0, 64, 320, 384].map(|byte| data.as_ptr().cast::<u8>().wrapping_add(byte));
        for parts in [100, 4] {
            let mut ahead = ahead.clone();
            ahead.spread(parts); // a line or three for each
            let lines = asked(&mut ahead, 1);
            assert!(expected.iter().all(|line| lines.contains(line)), "{lines:?}");
            assert!(parts < 9 || lines == expected);
        }
    }

    struct TakeShare<'a, 'l>(&'a mut Lines<'l>, [usize; 2], *const u8);
    impl crate::simd::Kernel for TakeShare<'_, '_> {
        type Output = LineShare;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> LineShare {
            self.0.share(simd, self.1[0], self.1[1], self.2)
        }
    }

    /// Loops ask for every line once and in order, whatever they read in a turn, and then for nothing but the idle one.
    #[test]
    fn loops_share_the_lines() {
        let (data, idle) = ([0.0f32; 3 * 100], 0u8);
        let strided = crate::tensor::strided::Strided::new(&data, 0, [1, 1, 3, 50], [0, 0, 100, 1]).unwrap();
        let mut ahead = Prefetch::none();
        ahead.add_run(Run::F32(Matrix::from_slice(&data, 3, 100))); // 1200 bytes
        ahead.add_run(Run::F32(Matrix::from_slice(&data[..0], 0, 100)));
        ahead.add_run(Run::F32(strided.matrix(0, 0))); // three rows of 200 bytes, 400 apart
        let at = |byte: usize| data.as_ptr().cast::<u8>().wrapping_add(byte);
        let rows = (0..3).flat_map(|row| (0..4).map(move |line| 400 * row + 64 * line));
        let expected: Vec<_> = (0..19).map(|line| 64 * line).chain(rows).map(at).collect();
        for (turns, bytes, each) in
            [(1, 64, 1), (5, 64, 5), (2, 256, 8), (3, 32, 2), (4, 32, 2), (8, 16, 2), (40, 64, 40)]
        {
            let mut lines = ahead.lines();
            let mut asked = Vec::new();
            while asked.len() < expected.len() {
                let mut own = Lines { ..lines };
                let share = crate::simd::Isa::best().run(TakeShare(&mut lines, [turns, bytes], &raw const idle));
                let taken: Vec<_> = (0..each).map_while(|_| own.next_line()).collect();
                if share.advance > 0 {
                    assert_eq!((share.at, taken.len()), (taken[0], each), "{turns} turns of {bytes}");
                    assert_eq!(share.advance, bytes.max(LINE));
                    assert!(taken.iter().enumerate().all(|(n, line)| *line == share.at.wrapping_add(n * LINE)));
                }
                assert_eq!((lines.at, lines.left), (own.at, own.left));
                asked.extend(taken);
            }
            assert_eq!(asked, expected, "{turns} turns of {bytes}");
            let share = crate::simd::Isa::best().run(TakeShare(&mut lines, [turns, bytes], &raw const idle));
            assert_eq!((share.at, share.advance), (&raw const idle, 0));
        }
        assert!(Prefetch::none().lines().next_line().is_none() && Lines::none().next_line().is_none());
    }

    /// All has been asked for after as many parts as it was spread over, for each run rounded up to whole products.
    #[test]
    fn products_share_the_lines() {
        let data = [0u16; 7 * 100].map(crate::bf16::from_bits);
        for (products, parts) in (1..20).flat_map(|products| [1, 2, 7].map(|parts| (products, parts))) {
            let mut ahead = Prefetch::none();
            ahead.add_run(Run::Bf16(Matrix::from_slice(&data, 7, 100)));
            let strided = crate::tensor::strided::Strided::new(&data, 0, [1, 1, 6, 90], [0, 0, 100, 1]).unwrap();
            ahead.add_run(Run::Bf16(strided.matrix(0, 0)));
            ahead.spread(products * parts);
            for _ in 0..products + 2 {
                let share = ahead.share(parts);
                ahead.go_on(share);
            }
            assert!(asked(&mut ahead, parts).is_empty(), "{products} products of {parts} parts");
        }
    }
}
