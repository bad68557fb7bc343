//! Prefetches the cache lines that are needed next, a few at a time, between the multiply-adds of the current loop.
//!
//! Short sequences are computed about as fast as memory delivers them. A worker that waits for each tile before it multiplies
//! pays for both in full. The prefetches are spread over the loops, some with every few steps, because a burst would fill the
//! processor's queue of misses and hold up the loads behind it.
//!
//! A [`Prefetch`] lists rows of memory. There are two ways to issue its lines:
//! * Products of prefill take a [`ProductPrefetch`] each: the lines are divided evenly over the parts of all products.
//! * Loops of decode take a [`LoopPrefetch`] each, from [`PrefetchLines`]: one line for each line that the loop reads.

use crate::element::with_elements;
use crate::kv::rows::KeyRows;
use crate::kv::run::{Run, with_run};
use crate::simd::{LINE, Simd, prefetches_into_second_cache};
use crate::tensor::group::{AnyGroupRows, AnyGroupRowsMut};
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// Runs of rows that a [`Prefetch`] holds. Any further ones are not prefetched. A tile of decode has 16 pages of 16 keys, and 16 of
/// values. With 12 runs, shared keys in such pages took 1.06 times as long (Zen 4).
const MAX_RUNS: usize = 32;

/// Rows of memory at one stride.
#[derive(Clone, Copy, Debug)]
struct ByteRows {
    /// The start of the first row.
    at: *const u8,
    /// From one row to the next, in bytes.
    stride: isize,
    /// The length of a row, in bytes.
    bytes: usize,
    rows: usize,
}

impl ByteRows {
    const NONE: Self = ByteRows { at: std::ptr::null(), stride: 0, bytes: 0, rows: 0 };

    fn lines_per_row(&self) -> usize {
        self.bytes.div_ceil(LINE)
    }

    fn lines(&self) -> usize {
        self.rows * self.lines_per_row()
    }
}

/// The prefetches of one loop; made by [`PrefetchLines::for_loop`].
///
/// A loop is cut into [`runs`](Self::run) of iterations whose lines are in one row. Inside a run, a prefetch needs no branch and
/// two registers.
pub(in crate::kernel) struct LoopPrefetch {
    at: *const u8,
    /// Bytes from one iteration's lines to those of the next iteration that prefetches. 0 if there is nothing to prefetch.
    advance: usize,
    /// Iterations of the current row that will prefetch.
    left_in_row: usize,
    /// The start of the next row, and the bytes from there to the start of the one after it.
    next_row: *const u8,
    row_stride: isize,
    /// Iterations of each of the next rows that will prefetch.
    per_row: usize,
    /// Whether lines go into the second cache, not the first ([`prefetches_into_second_cache`]).
    far: bool,
}

impl LoopPrefetch {
    /// More iterations than any loop has.
    const NO_END: usize = usize::MAX >> 8;

    /// The prefetches of a loop from `at` on, in one row.
    #[inline(always)]
    fn in_one_row(at: *const u8, advance: usize, far: bool) -> Self {
        LoopPrefetch { at, advance, left_in_row: Self::NO_END, next_row: at, row_stride: 0, per_row: Self::NO_END, far }
    }

    /// The number of iterations, at most `most`, of the run that starts now. [`end_run`](Self::end_run) ends it. Each iteration
    /// reads `bytes` bytes.
    #[inline(always)]
    pub(in crate::kernel) fn run(&self, most: usize, bytes: usize) -> usize {
        most.min(self.left_in_row * iterations_per_line(bytes))
    }

    /// Issues the prefetches of iteration `iteration`.
    #[inline(always)]
    pub(in crate::kernel) fn issue<S: Simd>(&mut self, simd: S, iteration: usize, bytes: usize) {
        if iteration.is_multiple_of(iterations_per_line(bytes)) {
            // One branch for all lines of an iteration, not one for each: 0.93 of the time of decode in f32 (Zen 4).
            if self.far {
                for n in 0..lines_per_iteration(bytes) {
                    simd.prefetch(self.at.wrapping_add(n * LINE));
                }
            } else {
                for n in 0..lines_per_iteration(bytes) {
                    simd.prefetch_near(self.at.wrapping_add(n * LINE));
                }
            }
            self.at = self.at.wrapping_add(self.advance);
        }
    }

    /// Ends a run of `iterations` iterations.
    #[inline(always)]
    pub(in crate::kernel) fn end_run<S: Simd>(&mut self, simd: S, iterations: usize, bytes: usize) {
        self.left_in_row -= iterations.div_ceil(iterations_per_line(bytes));
        if self.left_in_row == 0 {
            // A row that starts inside a line also ends inside one.
            prefetch_line(simd, self.at.wrapping_sub(1), self.far);
            (self.at, self.left_in_row) = (self.next_row, self.per_row);
            self.next_row = self.next_row.wrapping_offset(self.row_stride);
        }
    }
}

#[inline(always)]
fn prefetch_line<S: Simd>(simd: S, line: *const u8, far: bool) {
    if far { simd.prefetch(line) } else { simd.prefetch_near(line) }
}

/// Lines that an iteration prefetches, if it prefetches any, when each iteration reads `bytes` bytes.
#[inline(always)]
fn lines_per_iteration(bytes: usize) -> usize {
    (bytes / LINE).max(1)
}

/// One iteration in this many prefetches, when each iteration reads `bytes` bytes.
#[inline(always)]
fn iterations_per_line(bytes: usize) -> usize {
    (LINE / bytes).max(1)
}

/// A position in a run of rows, line by line.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    at: *const u8,
    /// Lines left in the current row; 0 at its end.
    lines_left: usize,
    /// Rows after the current one, and lines of each.
    rows_left: usize,
    lines_per_row: usize,
    /// From the end of a row's last line to the start of the next row, in bytes.
    row_gap: isize,
}

impl Cursor {
    /// After the last row of a run.
    const END: Self = Cursor { at: std::ptr::null(), lines_left: 0, rows_left: 0, lines_per_row: 0, row_gap: 0 };

    /// The first line of a run, which has lines.
    fn start_of(run: &ByteRows) -> Self {
        let lines_per_row = run.lines_per_row();
        let row_gap = run.stride.wrapping_sub((lines_per_row * LINE) as isize);
        Cursor { at: run.at, lines_left: lines_per_row, rows_left: run.rows - 1, lines_per_row, row_gap }
    }

    /// Prefetches `lines` lines of the current row, which has them.
    #[inline(always)]
    fn issue<S: Simd>(&mut self, simd: S, lines: usize) {
        for n in 0..lines {
            simd.prefetch_near(self.at.wrapping_add(n * LINE));
        }
        self.at = self.at.wrapping_add(lines * LINE);
        self.lines_left -= lines;
    }

    /// Moves to the next row of the run, at the end of one. Returns whether there is one.
    #[inline(always)]
    fn start_next_row(&mut self) -> bool {
        let has_next = self.rows_left > 0;
        if has_next {
            (self.at, self.lines_left) = (self.at.wrapping_offset(self.row_gap), self.lines_per_row);
            self.rows_left -= 1;
        }
        has_next
    }
}

/// The prefetches of one product, in equal parts; made by [`Prefetch::for_product`].
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct ProductPrefetch {
    cursor: Cursor,
    /// The index of the run after the cursor's.
    next_run: usize,
    lines_per_part: usize,
}

impl ProductPrefetch {
    /// Issues the prefetches of one part, or the last ones of `of`, which made this.
    #[inline(always)]
    pub(in crate::kernel) fn issue<S: Simd>(&mut self, simd: S, of: &Prefetch) {
        if self.lines_per_part <= self.cursor.lines_left {
            // The usual case: all lines are in one row.
            self.cursor.issue(simd, self.lines_per_part);
            return;
        }
        let mut left = self.lines_per_part;
        while left > 0 {
            if self.cursor.lines_left == 0 && !self.cursor.start_next_row() {
                let Some(run) = of.all_runs().get(self.next_run) else { return };
                self.cursor = Cursor::start_of(run);
                self.next_run += 1;
            }
            let lines = left.min(self.cursor.lines_left);
            self.cursor.issue(simd, lines);
            left -= lines;
        }
    }
}

/// The lines of a [`Prefetch`] in the order of memory, to be prefetched by loop after loop.
///
/// The order is that of memory even where a loop reads several rows side by side: on Zen 5, lines prefetched side by side came a
/// tenth later.
pub(in crate::kernel) struct PrefetchLines<'a> {
    /// The next line.
    at: *const u8,
    /// Lines left in the current row. 0 when all lines have been prefetched.
    lines_left: usize,
    /// The rows after the current one, in the same run.
    rows_left: ByteRows,
    /// The runs after that.
    runs_left: &'a [ByteRows],
    /// Whether lines go into the second cache, not the first ([`prefetches_into_second_cache`]).
    far: bool,
}

impl PrefetchLines<'_> {
    /// No lines.
    pub(in crate::kernel) fn none() -> Self {
        PrefetchLines { at: std::ptr::null(), lines_left: 0, rows_left: ByteRows::NONE, runs_left: &[], far: false }
    }

    /// Returns the prefetches for a loop of `iterations` iterations that read `bytes` bytes each: one line per line read.
    ///
    /// After the last line, the loop prefetches `cached`, an address that is in cache already, so that it needs no branch.
    #[inline(always)]
    pub(in crate::kernel) fn for_loop<S: Simd, T>(
        &mut self,
        simd: S,
        iterations: usize,
        bytes: usize,
        cached: *const T,
    ) -> LoopPrefetch {
        let (issues, lines) = (iterations.div_ceil(iterations_per_line(bytes)), lines_per_iteration(bytes));
        if issues * lines <= self.lines_left {
            // The usual case: all lines are in one row.
            let of_loop = LoopPrefetch::in_one_row(self.at, lines * LINE, self.far);
            self.at = self.at.wrapping_add(issues * lines * LINE);
            self.lines_left -= issues * lines;
            if self.lines_left == 0 {
                self.start_next_row();
            }
            return of_loop;
        }
        if let Some(of_loop) = self.over_rows(issues, lines) {
            return of_loop;
        }
        // The end of the run, or rows with fewer lines than an iteration: all at once.
        for _ in 0..issues * lines {
            let Some(line) = self.next_line() else { break };
            prefetch_line(simd, line, self.far);
        }
        LoopPrefetch::in_one_row(cached.cast(), 0, self.far)
    }

    /// The prefetches of a loop that go on from row to row: `issues` times `lines` lines. `None` if the run ends before, or its rows
    /// have fewer lines.
    fn over_rows(&mut self, issues: usize, lines: usize) -> Option<LoopPrefetch> {
        let (row, advance) = (&mut self.rows_left, lines * LINE);
        let (left_in_row, per_row) = (self.lines_left.div_ceil(lines), row.lines_per_row().div_ceil(lines));
        if row.lines_per_row() < lines || issues > left_in_row + per_row * row.rows {
            return None;
        }
        let (next_row, row_stride, far) = (row.at, row.stride, self.far);
        let of_loop = LoopPrefetch { at: self.at, advance, left_in_row, next_row, row_stride, per_row, far };
        // The loop ends inside a later row or at its end: that it ends in this one is the usual case.
        let (rows, in_row) = ((issues - left_in_row) / per_row, (issues - left_in_row) % per_row);
        row.at = row.at.wrapping_offset(row.stride.wrapping_mul(rows as isize));
        row.rows -= rows;
        self.lines_left = 0;
        self.start_next_row();
        if in_row > 0 {
            self.at = self.at.wrapping_add(in_row * advance);
            self.lines_left -= in_row * lines;
        }
        Some(of_loop)
    }

    #[inline(always)]
    fn next_line(&mut self) -> Option<*const u8> {
        if self.lines_left == 0 {
            return None;
        }
        let line = self.at;
        self.at = self.at.wrapping_add(LINE);
        self.lines_left -= 1;
        if self.lines_left == 0 {
            self.start_next_row();
        }
        Some(line)
    }

    /// Moves to the start of the next row that has lines, if there is one.
    fn start_next_row(&mut self) {
        if self.rows_left.rows == 0
            && let Some((run, runs_left)) = self.runs_left.split_first()
        {
            (self.rows_left, self.runs_left) = (*run, runs_left);
        }
        if self.rows_left.rows > 0 {
            (self.at, self.lines_left) = (self.rows_left.at, self.rows_left.lines_per_row());
            self.rows_left.at = self.rows_left.at.wrapping_offset(self.rows_left.stride);
            self.rows_left.rows -= 1;
        }
    }
}

/// Rows of memory to prefetch.
#[derive(Clone, Debug)]
pub(crate) struct Prefetch {
    runs: [ByteRows; MAX_RUNS],
    count: usize,
    /// The index of the next run.
    next_run: usize,
    /// The position in the run before that.
    cursor: Cursor,
    /// Lines to prefetch in each part of a product.
    lines_per_part: usize,
}

impl Prefetch {
    /// Nothing to prefetch.
    pub(crate) fn none() -> Self {
        Prefetch { runs: [ByteRows::NONE; MAX_RUNS], count: 0, next_run: 0, cursor: Cursor::END, lines_per_part: 0 }
    }

    /// Removes all rows.
    pub(crate) fn clear(&mut self) {
        (self.count, self.next_run, self.cursor) = (0, 0, Cursor::END);
    }

    /// Adds the rows `range` of keys or values.
    #[inline]
    pub(crate) fn add_key_rows(&mut self, rows: &KeyRows<'_>, range: Range<usize>) {
        match rows {
            KeyRows::Run(run) => self.add_run(run.slice_rows(range)),
            KeyRows::Runs(rows) if rows.has_contiguous_rows() => {
                let (stride, bytes) = rows.row_bytes();
                rows.for_each_address(range, |at, count| self.add_bytes(at, stride, [count, bytes]));
            }
            KeyRows::Runs(_) => {}
        }
    }

    /// Adds a run of keys or values.
    fn add_run(&mut self, run: Run<'_>) {
        with_run!(run, rows => self.add_rows(rows));
    }

    /// Adds the rows of a group.
    pub(crate) fn add_group(&mut self, rows: AnyGroupRows<'_>) {
        with_elements!(rows, rows => rows.heads().for_each(|head| self.add_rows(head)));
    }

    /// Adds the columns `cols` of the rows of a group.
    pub(crate) fn add_group_cols(&mut self, rows: AnyGroupRows<'_>, cols: Range<usize>) {
        with_elements!(rows, rows => {
            rows.heads().for_each(|head| self.add_rows_or_columns(head.slice_cols(cols.clone())));
        });
    }

    /// Adds rows of any type, or, if their elements have gaps and those of columns don't, the columns.
    pub(crate) fn add_rows_or_columns<T: Copy>(&mut self, matrix: Matrix<'_, T>) {
        self.add_rows(if matrix.has_contiguous_rows() { matrix } else { matrix.transposed() });
    }

    /// Adds rows that will be written.
    pub(crate) fn add_output(&mut self, rows: &AnyGroupRowsMut<'_>) {
        with_elements!(rows, rows => if rows.has_contiguous_rows() {
            rows.heads().for_each(|(at, stride, count)| self.add_at(at, stride, [count, rows.cols()]));
        });
    }

    /// Adds rows of any type.
    pub(crate) fn add_rows<T: Copy>(&mut self, matrix: Matrix<'_, T>) {
        // Rows with gaps are left out: they are read one element at a time, which is slow with or without a prefetch.
        if matrix.has_contiguous_rows() {
            self.add_at(matrix.as_ptr(), matrix.row_stride(), [matrix.rows(), matrix.cols()]);
        }
    }

    fn add_at<T>(&mut self, at: *const T, row_stride: isize, [rows, cols]: [usize; 2]) {
        let size = size_of::<T>();
        self.add_bytes(at.cast(), row_stride.wrapping_mul(size as isize), [rows, cols * size]);
    }

    /// Adds rows of `bytes` bytes, `stride` bytes apart.
    #[inline]
    fn add_bytes(&mut self, at: *const u8, stride: isize, [rows, bytes]: [usize; 2]) {
        if rows == 0 || bytes == 0 || self.count == MAX_RUNS {
            return;
        }
        // Rows that follow each other without a gap are one long row.
        let (rows, bytes) = if stride == bytes as isize { (1, rows * bytes) } else { (rows, bytes) };
        let run = ByteRows { at, stride, bytes, rows };
        self.runs[self.count] = run;
        self.count += 1;
    }

    #[inline(always)]
    fn all_runs(&self) -> &[ByteRows] {
        &self.runs[..self.count]
    }

    /// All lines, from the first on.
    pub(in crate::kernel) fn lines(&self) -> PrefetchLines<'_> {
        let far = prefetches_into_second_cache();
        let mut lines = PrefetchLines { runs_left: self.all_runs(), far, ..PrefetchLines::none() };
        lines.start_next_row();
        lines
    }

    /// Divides the lines evenly over `parts` parts of products.
    pub(crate) fn spread(&mut self, parts: usize) {
        let lines = self.all_runs().iter().map(ByteRows::lines).sum::<usize>();
        self.lines_per_part = lines.div_ceil(parts.max(1));
    }

    /// Returns the prefetches of a product. [`Prefetch::resume_after`] takes them back.
    #[inline(always)]
    pub(in crate::kernel) fn for_product(&self) -> ProductPrefetch {
        ProductPrefetch { cursor: self.cursor, next_run: self.next_run, lines_per_part: self.lines_per_part }
    }

    /// Continues from where `product` stopped.
    #[inline(always)]
    pub(in crate::kernel) fn resume_after(&mut self, product: ProductPrefetch) {
        (self.cursor, self.next_run) = (product.cursor, product.next_run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Issue<'a>(&'a mut ProductPrefetch, &'a Prefetch);
    impl crate::simd::Kernel for Issue<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            self.0.issue(simd, self.1);
        }
    }

    fn next_line(product: &mut ProductPrefetch, of: &Prefetch) -> Option<*const u8> {
        let cursor = &mut product.cursor;
        if cursor.lines_left == 0 && !cursor.start_next_row() {
            *cursor = Cursor::start_of(of.all_runs().get(product.next_run)?);
            product.next_run += 1;
        }
        let line = cursor.at;
        (cursor.at, cursor.lines_left) = (line.wrapping_add(LINE), cursor.lines_left - 1);
        Some(line)
    }

    /// The lines that products of `parts` parts prefetch, until none are left.
    fn prefetched(prefetch: &mut Prefetch, parts: usize) -> Vec<*const u8> {
        let mut lines = Vec::new();
        loop {
            let (mut product, mut expected) = (prefetch.for_product(), prefetch.for_product());
            let before = lines.len();
            for _ in 0..parts {
                lines.extend((0..expected.lines_per_part).map_while(|_| next_line(&mut expected, prefetch)));
                crate::simd::Isa::best().run(Issue(&mut product, prefetch));
                let position = |of: &ProductPrefetch| (of.cursor.at, of.cursor.lines_left, of.next_run);
                assert_eq!(position(&product), position(&expected), "`issue` moves the cursor line by line");
            }
            if lines.len() == before {
                return lines;
            }
            prefetch.resume_after(product);
        }
    }

    /// Every line of every row comes once and in order. Rows without a gap between them count as one.
    #[test]
    fn every_line_comes_once() {
        let data = [0.0f32; 4 * 40];
        let mut prefetch = Prefetch::none();
        prefetch.spread(1);
        assert!(prefetched(&mut prefetch, 1).is_empty());
        prefetch.add_run(Run::F32(Matrix::from_slice(&data, 4, 40).slice_rows(1..3))); // 320 bytes
        prefetch.add_run(Run::F32(Matrix::from_slice(&data[..0], 0, 40)));
        let strided = crate::tensor::strided::Strided::new(&data, 0, [1, 1, 2, 20], [0, 0, 80, 1]).unwrap();
        prefetch.add_run(Run::F32(strided.matrix(0, 0))); // two rows of 80 bytes, 320 apart
        let expected =
            [160, 224, 288, 352, 416, 0, 64, 320, 384].map(|byte| data.as_ptr().cast::<u8>().wrapping_add(byte));
        for (parts, of_product) in [(100, 1), (100, 4), (4, 1), (4, 3), (1, 1)] {
            let mut prefetch = prefetch.clone();
            prefetch.spread(parts); // 1, 3 or 9 lines a part
            assert_eq!(prefetched(&mut prefetch, of_product), expected, "{parts} parts, {of_product} in a product");
        }
    }

    struct ForLoop<'a, 'l>(&'a mut PrefetchLines<'l>, [usize; 2], *const u8);
    impl crate::simd::Kernel for ForLoop<'_, '_> {
        type Output = LoopPrefetch;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> LoopPrefetch {
            self.0.for_loop(simd, self.1[0], self.1[1], self.2)
        }
    }

    /// The lines that a loop prefetches.
    struct Replay(LoopPrefetch, [usize; 2]);
    impl crate::simd::Kernel for Replay {
        type Output = Vec<*const u8>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<*const u8> {
            let Replay(mut of_loop, [iterations, bytes]) = self;
            let (mut taken, mut i) = (Vec::new(), 0);
            while i < iterations {
                let run = of_loop.run(iterations - i, bytes);
                for i in i..i + run {
                    let at = of_loop.at;
                    of_loop.issue(simd, i, bytes);
                    let lines = if of_loop.at == at { 0 } else { lines_per_iteration(bytes) };
                    taken.extend((0..lines).map(|n| at.wrapping_add(n * LINE)));
                }
                of_loop.end_run(simd, run, bytes);
                i += run;
            }
            taken
        }
    }

    /// Loops prefetch every line once and in order, for any bytes per iteration, and after that `cached` alone. Lines between rows
    /// may come, too, where a row is not a whole number of iterations.
    #[test]
    fn loops_prefetch_all_lines() {
        let (whole, gaps, cached) = ([0.0f32; 3 * 100], [0.0f32; 5 * 100], 0u8);
        let strided = crate::tensor::strided::Strided::new(&gaps, 0, [1, 1, 5, 50], [0, 0, 100, 1]).unwrap();
        let mut prefetch = Prefetch::none();
        prefetch.add_run(Run::F32(Matrix::from_slice(&whole, 3, 100))); // 1200 bytes
        prefetch.add_run(Run::F32(Matrix::from_slice(&whole[..0], 0, 100)));
        prefetch.add_run(Run::F32(strided.matrix(0, 0))); // five rows of 200 bytes, 400 apart
        let at = |data: &[f32], byte: usize| data.as_ptr().cast::<u8>().wrapping_add(byte);
        let rows = (0..5).flat_map(|row| (0..4).map(move |line| 400 * row + 64 * line));
        let expected: Vec<_> =
            (0..19).map(|line| at(&whole, 64 * line)).chain(rows.map(|byte| at(&gaps, byte))).collect();
        let isa = crate::simd::Isa::best();
        let mut loops_over_rows = 0;
        for (iterations, bytes, each) in
            [(1, 64, 1), (5, 64, 5), (2, 256, 8), (2, 192, 6), (3, 32, 2), (4, 32, 2), (8, 16, 2), (40, 64, 40)]
        {
            let mut lines = prefetch.lines();
            let mut all = Vec::new();
            while all.len() < expected.len() {
                let mut own = PrefetchLines { ..lines };
                let of_loop = isa.run(ForLoop(&mut lines, [iterations, bytes], &raw const cached));
                let taken: Vec<_> = if of_loop.advance == 0 {
                    (0..each).map_while(|_| own.next_line()).collect()
                } else {
                    loops_over_rows += (of_loop.row_stride != 0) as usize;
                    let mut replayed = isa.run(Replay(of_loop, [iterations, bytes]));
                    assert_eq!(replayed.len(), each);
                    replayed.retain(|line| expected.contains(line));
                    assert!(replayed.iter().all(|&line| Some(line) == own.next_line()));
                    replayed
                };
                assert_eq!(lines.lines_left, own.lines_left);
                assert!(lines.at == own.at || lines.lines_left == 0);
                all.extend(taken);
            }
            assert_eq!(all, expected, "{iterations} iterations of {bytes} bytes");
            let of_loop = isa.run(ForLoop(&mut lines, [iterations, bytes], &raw const cached));
            assert_eq!((of_loop.at, of_loop.advance), (&raw const cached, 0));
        }
        assert!(loops_over_rows > 8);
        assert!(Prefetch::none().lines().next_line().is_none() && PrefetchLines::none().next_line().is_none());
    }

    /// All lines are prefetched after the parts that they are spread over.
    #[test]
    fn products_prefetch_all_lines() {
        let data = [0u16; 7 * 100].map(crate::bf16::from_bits);
        for (products, parts) in (1..20).flat_map(|products| [1, 2, 7].map(|parts| (products, parts))) {
            let mut prefetch = Prefetch::none();
            prefetch.add_run(Run::Bf16(Matrix::from_slice(&data, 7, 100)));
            let strided = crate::tensor::strided::Strided::new(&data, 0, [1, 1, 6, 90], [0, 0, 100, 1]).unwrap();
            prefetch.add_run(Run::Bf16(strided.matrix(0, 0)));
            prefetch.spread(products * parts);
            for _ in 0..products {
                let mut product = prefetch.for_product();
                (0..parts).for_each(|_| crate::simd::Isa::best().run(Issue(&mut product, &prefetch)));
                prefetch.resume_after(product);
            }
            assert!(prefetched(&mut prefetch, parts).is_empty(), "{products} products of {parts} parts");
        }
    }
}
