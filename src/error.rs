//! What can be wrong with a call.

use std::fmt;

/// Why a call was refused. Every refusal comes before any work is done and names the numbers that disagree.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A slice does not have as many elements as the shape says.
    SliceLength {
        /// Elements that the shape asks for.
        expected: usize,
        /// Elements that the slice has.
        got: usize,
    },
    /// A shape whose elements no memory could hold, or more than this machine's allocator would give.
    TooLarge {
        /// What was to be held.
        what: &'static str,
    },
    /// A list has not one entry for each batch, head or row.
    WrongCount {
        /// "targets", "losses", …
        what: &'static str,
        /// Entries that it should have.
        expected: usize,
        /// Entries that it has.
        got: usize,
    },
    /// An axis that the array does not have.
    AxisOutOfRange {
        /// The axis asked for.
        axis: usize,
        /// The number of axes there are.
        rank: usize,
    },
    /// A class number that is not below the number of classes.
    ClassOutOfRange {
        /// The row whose class it is.
        row: usize,
        /// The class given.
        class: usize,
        /// The number of classes.
        classes: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::SliceLength { expected, got } => {
                write!(f, "the shape asks for {expected} elements but the slice has {got}")
            }
            Error::TooLarge { what } => write!(f, "{what} would not fit in memory"),
            Error::WrongCount { what, expected, got } => {
                write!(f, "{got} {what} were given but there must be {expected}")
            }
            Error::AxisOutOfRange { axis, rank } => {
                write!(f, "axis {axis} was asked for but the array has {rank}, counted from 0")
            }
            Error::ClassOutOfRange { row, class, classes } => {
                write!(f, "row {row} has class {class} but there are only {classes}, counted from 0")
            }
        }
    }
}

impl std::error::Error for Error {}
