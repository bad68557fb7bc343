//! One axis of an n-dimensional array, described by (before, len, after).
#![forbid(unsafe_code)]

use crate::error::Error;

/// The axis of a dense row-major array along which a softmax runs.
///
/// Three numbers describe it for any rank: `before`, the product of the dimensions before the axis; `len`, the length of the
/// axis; `after`, the product of the dimensions after it. Element i of line (b, a) has the index
/// `(b * len + i) * after + a`. There are `before * after` lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    before: usize,
    len: usize,
    after: usize,
}

impl Axis {
    /// Axis number `axis` of an array of this shape: counted from 0, or from -1 at the end, as in NumPy. `axis` is of any integer
    /// type.
    ///
    /// # Errors
    /// [`Error::AxisOutOfRange`], and [`Error::TooLarge`] if the number of elements does not fit a `usize`.
    ///
    /// The last axis:
    ///
    /// ```
    /// use flashtile::softmax::Axis;
    ///
    /// assert_eq!(Axis::new(&[2, 3, 4], -1)?, Axis::new(&[2, 3, 4], 2)?);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn new(shape: &[usize], axis: impl TryInto<i128>) -> Result<Self, Error> {
        Self::numbered(shape, axis_number(axis, shape.len())?)
    }

    /// The axis with a number below the rank.
    pub(super) fn numbered(shape: &[usize], axis: usize) -> Result<Self, Error> {
        let len = shape[axis];
        Ok(Self { before: product(&shape[..axis])?, len, after: product(&shape[axis + 1..])? }).and_then(Self::checked)
    }

    /// The only axis of a single row.
    pub fn row(len: usize) -> Self {
        Self { before: 1, len, after: 1 }
    }

    /// The last axis of an array of `rows` rows of `len` elements.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the number of elements does not fit a `usize`.
    pub fn rows(rows: usize, len: usize) -> Result<Self, Error> {
        Self { before: rows, len, after: 1 }.checked()
    }

    /// [`rows`](Self::rows) of an array that exists.
    pub(super) fn of_rows(rows: usize, len: usize) -> Self {
        Self { before: rows, len, after: 1 }
    }

    /// The first axis of an array `[len, columns]` that exists.
    pub(super) fn of_columns(len: usize, columns: usize) -> Self {
        Self { before: 1, len, after: columns }
    }

    fn checked(self) -> Result<Self, Error> {
        product(&[self.before, self.len, self.after]).map(|_| self)
    }

    /// The number of elements of the array.
    pub fn elements(self) -> usize {
        self.before * self.len * self.after
    }

    /// The number of lines along the axis.
    pub fn lines(self) -> usize {
        self.before * self.after
    }

    /// The number of elements of a line.
    pub fn line_len(self) -> usize {
        self.len
    }

    pub(super) fn before(self) -> usize {
        self.before
    }

    pub(super) fn after(self) -> usize {
        self.after
    }

    /// Line number `line`.
    pub(super) fn line(self, line: usize) -> Line {
        let first = line / self.after * self.len * self.after + line % self.after;
        Line { first, stride: self.after, len: self.len }
    }

    /// Refuses a slice that is not the whole array.
    pub(super) fn check<T>(self, x: &[T]) -> Result<(), Error> {
        same_len(self.elements(), x.len())
    }
}

/// The elements of one line of an axis: `first + i * stride`.
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub(super) first: usize,
    pub(super) stride: usize,
    pub(super) len: usize,
}

impl Line {
    pub(super) fn indices(self) -> impl Iterator<Item = usize> + Clone {
        (0..self.len).map(move |i| self.first + i * self.stride)
    }
}

/// The number of an axis, counted from 0, of one that may be counted from the end.
pub(super) fn axis_number(axis: impl TryInto<i128>, rank: usize) -> Result<usize, Error> {
    // Only a u128 can be larger.
    let axis = axis.try_into().unwrap_or(i128::MAX);
    let counted = if axis < 0 { axis + rank as i128 } else { axis };
    let number = usize::try_from(counted).ok().filter(|&number| number < rank);
    number.ok_or(Error::AxisOutOfRange { axis, rank })
}

pub(super) fn same_len(expected: usize, got: usize) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::SliceLength { expected, got }) }
}

/// The product of the dimensions. It is refused if the product of those that are not 0 does not fit a `usize`, so every partial
/// product fits.
fn product(dimensions: &[usize]) -> Result<usize, Error> {
    let product = dimensions.iter().filter(|&&n| n > 0).try_fold(1usize, |product, &n| product.checked_mul(n));
    let product = product.ok_or(Error::TooLarge { what: "an array of this shape" })?;
    Ok(if dimensions.contains(&0) { 0 } else { product })
}
