//! One axis of an n-dimensional array, seen as (before, len, after).
#![forbid(unsafe_code)]

use crate::error::Error;

/// The axis of a dense row-major array along which a softmax runs.
///
/// Whatever the array's rank, three numbers describe it: `before`, the product of the dimensions in front of the axis;
/// `len`, its length; `after`, the product of those behind it. Element i of line (b, a) stands at
/// `(b * len + i) * after + a`, and there are `before * after` lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    before: usize,
    len: usize,
    after: usize,
}

impl Axis {
    /// Axis number `axis`, counted from 0, of an array of this shape.
    ///
    /// # Errors
    /// [`Error::AxisOutOfRange`], and [`Error::TooLarge`] where the number of elements is no `usize`.
    pub fn new(shape: &[usize], axis: usize) -> Result<Self, Error> {
        let &len = shape.get(axis).ok_or(Error::AxisOutOfRange { axis, rank: shape.len() })?;
        Ok(Self { before: product(&shape[..axis])?, len, after: product(&shape[axis + 1..])? }).and_then(Self::checked)
    }

    /// The only axis of a single row.
    pub fn row(len: usize) -> Self {
        Self { before: 1, len, after: 1 }
    }

    /// The last axis of an array of `rows` rows of `len`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] where the number of elements is no `usize`.
    pub fn rows(rows: usize, len: usize) -> Result<Self, Error> {
        Self { before: rows, len, after: 1 }.checked()
    }

    fn checked(self) -> Result<Self, Error> {
        product(&[self.before, self.len, self.after]).map(|_| self)
    }

    /// Elements of the whole array.
    pub fn elements(self) -> usize {
        self.before * self.len * self.after
    }

    /// Lines along the axis: elements of an array without it.
    pub fn lines(self) -> usize {
        self.before * self.after
    }

    /// Elements of one line.
    pub fn line_len(self) -> usize {
        self.len
    }

    pub(super) fn before(self) -> usize {
        self.before
    }

    pub(super) fn after(self) -> usize {
        self.after
    }

    /// The places of the elements of line number `line`.
    pub(super) fn places(self, line: usize) -> impl Iterator<Item = usize> + Clone {
        let first = line / self.after * self.len * self.after + line % self.after;
        (0..self.len).map(move |i| first + i * self.after)
    }

    /// Refuses a slice that is not the whole array.
    pub(super) fn check<T>(self, x: &[T]) -> Result<(), Error> {
        same_len(self.elements(), x.len())
    }
}

pub(super) fn same_len(expected: usize, got: usize) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::SliceLength { expected, got }) }
}

/// The product of some dimensions, where even the product of all that are not zero is a `usize`: then so is every
/// partial one.
fn product(dimensions: &[usize]) -> Result<usize, Error> {
    let product = dimensions.iter().filter(|&&n| n > 0).try_fold(1usize, |product, &n| product.checked_mul(n));
    let product = product.ok_or(Error::TooLarge { what: "an array of this shape" })?;
    Ok(if dimensions.contains(&0) { 0 } else { product })
}
