//! The arrays of a call, divided between workers: each line is handed out once.
//!
//! The lines along the last axis are rows, which lie side by side in memory. A panel is a range of lines along any other axis:
//! its rows lie at strides, between those of other panels. So no slice holds a panel, and the output of one is a type of its own.

use super::buffers::Buffers;
use super::lines::{LinePanel, Lines, PanelPlace};
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::StridedMut;
use crate::threads::Claims;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A panel that is read: `len` rows of `width` elements, `stride` elements apart.
///
/// Invariant: for `'a`, these elements may be read, and nothing writes them.
pub struct Panel<'a, T> {
    origin: *const T,
    stride: usize,
    len: usize,
    width: usize,
    elements: PhantomData<&'a T>,
}

impl<T> Clone for Panel<'_, T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Panel<'_, T> {}

impl<'a, T> Panel<'a, T> {
    /// The panel of `x`, a whole array, at a place.
    ///
    /// # Panics
    /// If the array has no such place.
    pub(super) fn new(x: &'a [T], place: PanelPlace) -> Self {
        let PanelPlace { first, stride, panel: LinePanel { len, width, .. }, .. } = place;
        let end = |i: usize| i.checked_mul(stride)?.checked_add(first)?.checked_add(width);
        assert!(len == 0 || end(len - 1).is_some_and(|end| end <= x.len()));
        Panel { origin: x.as_ptr().wrapping_add(first), stride, len, width, elements: PhantomData }
    }

    /// `None` if the elements of a row are not neighbours, or the rows go backwards.
    pub(super) fn of_matrix(x: Matrix<'a, T>) -> Option<Self> {
        let stride = usize::try_from(x.row_stride()).ok().filter(|_| x.has_contiguous_rows())?;
        // The invariant: a matrix may be read for 'a.
        Some(Panel { origin: x.as_ptr(), stride, len: x.rows(), width: x.cols(), elements: PhantomData })
    }

    /// One line of neighbouring elements.
    pub(super) fn line(x: &'a [T]) -> Self {
        Panel { origin: x.as_ptr(), stride: 1, len: x.len(), width: 1, elements: PhantomData }
    }

    /// Columns of a row.
    ///
    /// # Panics
    /// If the panel has no such row or columns.
    #[inline(always)]
    pub(super) fn row(self, i: usize, column: usize, width: usize) -> &'a [T] {
        assert!(i < self.len && column <= self.width && width <= self.width - column);
        // SAFETY: the columns are in the panel (asserted), whose elements may be read (invariant).
        unsafe { std::slice::from_raw_parts(self.origin.add(i * self.stride + column), width) }
    }

    /// Where row `i` begins. It need not be in the panel: the address is for prefetching.
    #[inline(always)]
    pub(super) fn address(self, i: usize, column: usize) -> *const T {
        self.origin.wrapping_add(i.wrapping_mul(self.stride).wrapping_add(column))
    }

    /// Elements between two rows.
    pub(super) fn stride(self) -> usize {
        self.stride
    }

    /// All of its lines.
    pub(super) fn all(self) -> LinePanel {
        LinePanel { first: 0, len: self.len, width: self.width, head: 0 }
    }

    /// The number of rows.
    pub(super) fn len(self) -> usize {
        self.len
    }
}

/// A panel that is written.
///
/// Invariant: for `'a`, all access to its elements is through this value.
pub(super) struct PanelMut<'a, T> {
    origin: *mut T,
    stride: usize,
    len: usize,
    width: usize,
    elements: PhantomData<&'a mut T>,
}

impl<'a, T> PanelMut<'a, T> {
    /// The last two axes of a tensor at `[i0, i1]`. `None` if the elements of a row are not neighbours, or the rows go backwards.
    pub(super) fn of_tensor(out: &'a mut StridedMut<'_, T, 4>, [i0, i1]: [usize; 2]) -> Option<Self> {
        let matrix = out.as_ref().matrix(i0, i1);
        let stride = usize::try_from(matrix.row_stride()).ok().filter(|_| matrix.has_contiguous_rows())?;
        // The invariant: these are elements of `out`, which is borrowed mutably for 'a.
        Some(PanelMut {
            origin: matrix.as_ptr().cast_mut(),
            stride,
            len: matrix.rows(),
            width: matrix.cols(),
            elements: PhantomData,
        })
    }

    /// One line of neighbouring elements.
    pub(super) fn line(x: &'a mut [T]) -> Self {
        PanelMut { origin: x.as_mut_ptr(), stride: 1, len: x.len(), width: 1, elements: PhantomData }
    }

    /// [`Panel::row`], to be written.
    ///
    /// # Panics
    /// If the panel has no such row or columns.
    #[inline(always)]
    pub(super) fn row(&mut self, i: usize, column: usize, width: usize) -> &mut [T] {
        assert!(i < self.len && column <= self.width && width <= self.width - column);
        // SAFETY: the columns are in the panel (asserted), and `self`, which is borrowed mutably, is the only access (invariant).
        unsafe { std::slice::from_raw_parts_mut(self.origin.add(i * self.stride + column), width) }
    }

    /// [`Panel::address`].
    #[inline(always)]
    pub(super) fn address(&self, i: usize, column: usize) -> *const T {
        self.as_read().address(i, column)
    }

    #[inline(always)]
    fn as_read(&self) -> Panel<'_, T> {
        Panel { origin: self.origin, stride: self.stride, len: self.len, width: self.width, elements: PhantomData }
    }
}

/// The input and output of a panel, as [`Buffers`].
pub(super) enum PanelBuffers<'a, T> {
    InPlace(PanelMut<'a, T>),
    Into { from: Panel<'a, T>, to: PanelMut<'a, T> },
}

impl<'a, T> PanelBuffers<'a, T> {
    #[inline(always)]
    pub(super) fn input(&self) -> Panel<'_, T> {
        match self {
            PanelBuffers::InPlace(x) => x.as_read(),
            PanelBuffers::Into { from, .. } => *from,
        }
    }

    #[inline(always)]
    pub(super) fn output(&mut self) -> &mut PanelMut<'a, T> {
        match self {
            PanelBuffers::InPlace(x) => x,
            PanelBuffers::Into { to, .. } => to,
        }
    }
}

/// Counts the units of an axis (see [`Lines`]), a few at a time. Each is handed out once.
pub(super) struct Counter {
    lines: Lines,
    step: usize,
    next: AtomicUsize,
}

impl Counter {
    /// Hands out `step` units at a time.
    pub(super) fn new(lines: Lines, step: usize) -> Self {
        Counter { lines, step, next: AtomicUsize::new(0) }
    }

    pub(super) fn lines(&self) -> Lines {
        self.lines
    }
}

impl<'c> Claims<'c> for Counter {
    type Claim = Range<usize>;

    fn claim(&'c self) -> Option<Range<usize>> {
        let count = self.lines.count();
        // It stops at the last unit, so it can't overflow.
        let after = |start: usize| (start < count).then(|| start.saturating_add(self.step).min(count));
        let start = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after).ok()?;
        Some(start..after(start)?)
    }
}

/// The input and output of a call, divided between workers.
pub(super) struct Shared<'a, T> {
    input: *const T,
    output: *mut T,
    in_place: bool,
    counter: Counter,
    elements: PhantomData<&'a mut [T]>,
}

// SAFETY: threads that share it can only claim lines from it, and no two claims have a line in common. So elements of the output
// are sent to the thread that claims them (`T: Send`), and those of the input are shared (`T: Sync`).
unsafe impl<T: Send + Sync> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// # Panics
    /// If the arrays are not those of the counter's axis, or have no elements.
    pub(super) fn new(buffers: Buffers<'a, T>, counter: Counter) -> Self {
        let elements = counter.lines.axis().elements();
        assert!(elements > 0);
        let (input, output, in_place) = match buffers {
            Buffers::InPlace(x) => {
                assert_eq!(x.len(), elements);
                let x = x.as_mut_ptr();
                (x.cast_const(), x, true)
            }
            Buffers::Into { from, to } => {
                assert_eq!([from.len(), to.len()], [elements; 2]);
                (from.as_ptr(), to.as_mut_ptr(), false)
            }
        };
        Shared { input, output, in_place, counter, elements: PhantomData }
    }

    /// All lines.
    pub(super) fn into_whole(self) -> Share<'a, T> {
        let Shared { input, output, in_place, counter: Counter { lines, .. }, .. } = self;
        Share { input, output, in_place, lines, units: 0..lines.count(), elements: PhantomData }
    }
}

impl<'c, T: Send + Sync + 'c> Claims<'c> for Shared<'_, T> {
    type Claim = Share<'c, T>;

    fn claim(&'c self) -> Option<Share<'c, T>> {
        let &Shared { input, output, in_place, .. } = self;
        let (units, lines) = (self.counter.claim()?, self.counter.lines);
        Some(Share { input, output, in_place, lines, units, elements: PhantomData })
    }
}

/// Lines that a worker has claimed.
///
/// Invariant: for `'c`, all access to these lines of the output is through this value; the input lives as long, and nothing
/// writes these lines of it unless it is the output.
pub(super) struct Share<'c, T> {
    input: *const T,
    output: *mut T,
    in_place: bool,
    lines: Lines,
    units: Range<usize>,
    elements: PhantomData<&'c mut T>,
}

impl<'c, T> Share<'c, T> {
    /// The units.
    pub(super) fn units(&self) -> Range<usize> {
        self.units.clone()
    }

    /// How the lines are divided.
    pub(super) fn lines(&self) -> Lines {
        self.lines
    }

    /// The rows of the share.
    ///
    /// # Panics
    /// If the lines are divided into panels.
    pub(super) fn rows(self) -> Buffers<'c, T> {
        let Lines::Rows(axis) = self.lines else { panic!("panels") };
        let (first, len) = (self.units.start * axis.line_len(), self.units.len() * axis.line_len());
        // SAFETY: the rows of the units are in the arrays (`Shared::new` asserts their length), and only this share has them
        // (invariant). In place, the input is not used.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.output.add(first), len);
            if self.in_place {
                Buffers::InPlace(to)
            } else {
                Buffers::Into { from: std::slice::from_raw_parts(self.input.add(first), len), to }
            }
        }
    }

    /// The next panel of the share, with its place.
    ///
    /// # Panics
    /// If the lines are not divided into panels.
    pub(super) fn next_panel(&mut self) -> Option<(PanelPlace, PanelBuffers<'c, T>)> {
        let Lines::Panels(panels) = self.lines else { panic!("rows") };
        let place = panels.place(self.units.next()?);
        let PanelPlace { first, stride, panel: LinePanel { len, width, .. }, .. } = place;
        // SAFETY: a place is in the arrays (`Shared::new` asserts their length). Panels have no line in common, and a share hands
        // out each of its units once, so nothing else has these elements of the output (invariant).
        let (origin, read) = unsafe { (self.output.add(first), self.input.add(first)) };
        let to = PanelMut { origin, stride, len, width, elements: PhantomData };
        let buffers = if self.in_place {
            PanelBuffers::InPlace(to)
        } else {
            PanelBuffers::Into { from: Panel { origin: read, stride, len, width, elements: PhantomData }, to }
        };
        Some((place, buffers))
    }
}
