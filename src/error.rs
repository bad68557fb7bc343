//! The errors of calls.

use crate::element::DType;
use crate::level::Level;
use std::fmt;

/// The reason why a call was refused. A refused call has written nothing. Each error has the numbers that disagree.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// The number of elements of a slice is not that of the shape.
    SliceLength {
        /// Elements of the shape.
        expected: usize,
        /// Elements that the slice has.
        got: usize,
    },
    /// Shape and strides reach an element outside the slice.
    OutOfBounds {
        /// The lowest element reached, counted from the start of the slice.
        first: i128,
        /// The highest element reached.
        last: i128,
        /// Elements that the slice has.
        len: usize,
    },
    /// Bytes that do not start at a multiple of their elements' size.
    Misaligned {
        /// The type of the elements.
        dtype: DType,
    },
    /// Two indices of an output may lead to the same element. Strides must nest, as those of a permuted or sliced array do.
    OverlappingOutput {
        /// The axis whose stride is shorter than the elements within one of its steps.
        axis: usize,
        /// The stride of that axis, in elements.
        stride: isize,
        /// The smallest stride without overlap.
        needed: usize,
    },
    /// A tensor that no memory could hold, or that this machine's allocator refused.
    TooLarge {
        /// The tensor: "the problem", "the scores", "the result", …
        what: &'static str,
    },
    /// More of something than one call takes, although it would fit in memory.
    TooMany {
        /// The items: "key/value heads in all batches", …
        what: &'static str,
        /// The most that a call takes.
        limit: usize,
        /// The number given; the largest `usize` if it is larger than that.
        got: usize,
    },
    /// A tensor's dimension differs from the one that it must match.
    ShapeMismatch {
        /// The tensor: "keys", "values", "output", …
        tensor: &'static str,
        /// The dimension: "batch", "head_dim", …
        dimension: &'static str,
        /// The size that it should have.
        expected: usize,
        /// The size that it has.
        got: usize,
    },
    /// A tensor has more or fewer axes than it must have.
    ///
    /// Queries, keys and values of rank 3 are refused because they have two readings: `[batch, seq, hidden]`, whose heads must be
    /// split off (`[batch, seq, heads, dim]`, permuted to `[batch, heads, seq, dim]`), and `[heads, seq, dim]`, which needs a batch
    /// axis ([`TensorRef::insert_axis`](crate::TensorRef::insert_axis)).
    Rank {
        /// The tensor: "queries", "keys", "values", "output", …
        tensor: &'static str,
        /// The number of axes that it must have.
        expected: usize,
        /// The number of axes that it has.
        got: usize,
    },
    /// The number of query heads is not a multiple of the number of key/value heads.
    HeadsNotDivisible {
        /// Heads of the queries.
        heads_q: usize,
        /// Heads of the keys and values.
        heads_kv: usize,
    },
    /// A dimension of a mask or bias is neither 1 nor that of the scores, or of the input of a softmax.
    NotBroadcastable {
        /// "mask" or "bias".
        tensor: &'static str,
        /// The dimension: "batch", "heads_q", "seq_q" or "seq_kv"; for a softmax "axis -1", "axis -2", …
        dimension: &'static str,
        /// The size that it has.
        got: usize,
        /// The size of the scores or of the input there.
        expected: usize,
    },
    /// A list does not have one entry for each batch, head, row or axis.
    WrongCount {
        /// "key lengths", "query offsets", "ALiBi slopes", "targets", …
        what: &'static str,
        /// Entries that it should have.
        expected: usize,
        /// Entries that it has.
        got: usize,
    },
    /// A sequence's number of queries or keys is below 0, or above that of the tensor.
    LengthOutOfRange {
        /// The lengths: "key lengths", "query lengths".
        what: &'static str,
        /// The batch that it is for.
        batch: usize,
        /// The length given.
        got: i128,
        /// The queries or keys that there are.
        most: usize,
    },
    /// The starts of packed sequences don't ascend, or end after the last row.
    InvalidStarts {
        /// The starts: "query starts", "key starts", …
        what: &'static str,
        /// The first one that is wrong.
        index: usize,
        /// What it is.
        got: i128,
        /// The start before it, or 0.
        least: i128,
        /// The number of rows.
        most: usize,
    },
    /// A page table with a page, length or page size that can't be.
    InvalidPages {
        /// What it is: "page", "length", "page size".
        what: &'static str,
        /// The sequence.
        sequence: usize,
        /// The number given.
        got: i128,
        /// The most that it may be.
        limit: usize,
    },
    /// A number that is not valid for an option.
    InvalidOption {
        /// The option: "scale", "softcap", …
        option: &'static str,
        /// The number given.
        got: f32,
        /// The numbers that are valid.
        expected: &'static str,
    },
    /// An option that can be given only once was given twice.
    GivenTwice {
        /// The option: "mask", "bias", …
        option: &'static str,
    },
    /// A mask or score modification that contradicts itself, or was made for another problem.
    InvalidMask {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// This processor does not have the requested level.
    LevelUnavailable {
        /// The requested level.
        level: Level,
    },
    /// An axis that the array does not have.
    AxisOutOfRange {
        /// The requested axis; below 0 if it was counted from the end.
        axis: i128,
        /// The number of axes.
        rank: usize,
    },
    /// A range of an axis that ends after the axis, or before it starts.
    RangeOutOfBounds {
        /// The axis.
        axis: usize,
        /// The first index of the range.
        start: usize,
        /// The index after the last one of the range.
        end: usize,
        /// The size of the axis.
        size: usize,
    },
    /// A class number that is negative, or not below the number of classes.
    ClassOutOfRange {
        /// The row of the class: its place in the list of targets.
        row: usize,
        /// The class given.
        class: i128,
        /// The number of classes.
        classes: usize,
    },
    /// A sequence or layer that a cache does not have.
    NotInCache {
        /// "sequence" or "layer".
        what: &'static str,
        /// The index given.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A sequence that was removed from its cache, or is of another one.
    RemovedSequence,
    /// An append to a sequence for which the cache has no room.
    CacheFull {
        /// The sequence.
        sequence: usize,
        /// The tokens that it would have; the largest `usize` if they are more than that.
        tokens: usize,
        /// The tokens that it may have.
        capacity: usize,
    },
    /// A pool has too few free pages.
    PagesExhausted {
        /// The pages that the call needs; the largest `usize` if they are more than that.
        needed: usize,
        /// The pages that are free.
        free: usize,
    },
    /// A write of more tokens than are reserved.
    NotReserved {
        /// The layer written to.
        layer: usize,
        /// The tokens given.
        tokens: usize,
        /// The tokens that are reserved and not yet written in that layer.
        reserved: usize,
    },
    /// A view or a fork of a sequence with reserved tokens that a layer lacks.
    NotWritten {
        /// The layer.
        layer: usize,
        /// The tokens that were written there.
        written: usize,
        /// The tokens of the sequence.
        len: usize,
    },
    /// Page lists were filled before a sequence was given other pages.
    StaleLists {
        /// The sequence, counted in the lists.
        sequence: usize,
    },
    /// A truncation to more tokens than a sequence has, or to tokens that it no longer holds.
    CannotTruncate {
        /// The length asked for.
        to: usize,
        /// The tokens that the sequence has.
        len: usize,
        /// The tokens that it holds without a gap, from its first one on. Shorter lengths are possible.
        held: usize,
    },
    /// A rotating cache has overwritten keys that lie in a query's window.
    LostKeys {
        /// The sequence.
        sequence: usize,
        /// The last tokens that the cache holds of each sequence.
        window: usize,
        /// The last tokens that it must hold: those of a query's window, and one for each further query.
        needed: usize,
    },
    /// A position that is not in a rotary table.
    PositionOutOfRange {
        /// The position.
        position: i128,
        /// The positions of the table, counted from 0.
        positions: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::SliceLength { expected, got } => {
                write!(f, "the shape needs {expected} elements but the slice has {got}")
            }
            Error::OutOfBounds { first, last, len } => {
                write!(f, "shape and strides reach elements {first} to {last} of a slice of {len}")
            }
            Error::Misaligned { dtype } => {
                write!(f, "elements of type {dtype} must start at a multiple of {} bytes", dtype.size())
            }
            Error::OverlappingOutput { axis, stride, needed } => write!(
                f,
                "elements of the output overlap: axis {axis} has stride {stride} but needs at least {needed} either way"
            ),
            Error::TooLarge { what } => write!(f, "{what} would not fit in memory"),
            Error::TooMany { what, limit, got } => {
                write!(f, "{got} {what} were given but a call takes at most {limit}")
            }
            Error::ShapeMismatch { tensor, dimension, expected, got } => {
                write!(f, "{dimension} of the {tensor} is {got} but must be {expected}")
            }
            Error::Rank { tensor, expected: 4, got: 3 } => write!(
                f,
                "the rank of the {tensor} is 3 but must be 4: [batch, seq, hidden] needs splitting into heads, \
                 [heads, seq, dim] needs a batch axis (insert_axis)"
            ),
            Error::Rank { tensor, expected, got } => {
                write!(f, "the rank of the {tensor} is {got} but must be {expected}")
            }
            Error::HeadsNotDivisible { heads_q, heads_kv } => {
                write!(f, "{heads_q} query heads can't be shared out evenly over {heads_kv} key/value heads")
            }
            Error::NotBroadcastable { tensor, dimension, got, expected } => {
                write!(f, "{dimension} of the {tensor} is {got} but must be {expected}, or 1 to repeat")
            }
            Error::WrongCount { what, expected, got } => {
                write!(f, "{got} {what} were given but there must be {expected}")
            }
            Error::LengthOutOfRange { what, batch, got, most } => {
                write!(f, "the {what} of batch {batch} are {got} but must be between 0 and {most}")
            }
            Error::InvalidStarts { what, index, got, least, most } => {
                write!(
                    f,
                    "entry {index} of the {what} is {got} but must be between {least}, the one before it, and {most}"
                )
            }
            Error::InvalidPages { what, sequence, got, limit } => {
                let least = usize::from(*what == "page size");
                write!(
                    f,
                    "a {what} of sequence {sequence} in the page table is {got} but must be between {least} and {limit}"
                )
            }
            Error::InvalidOption { option, got, expected } => {
                write!(f, "{option} is {got} but must be {expected}")
            }
            Error::GivenTwice { option } => {
                write!(f, "the option {option} was given twice; combine both into one, or set it once")
            }
            Error::InvalidMask { reason } => f.write_str(reason),
            Error::LevelUnavailable { level } => {
                write!(f, "this processor does not have the level {level}; Level::available() lists those that it has")
            }
            Error::AxisOutOfRange { axis, rank } => {
                let first = if *axis < 0 { "-1 at the end" } else { "0" };
                write!(f, "there is no axis {axis}, counted from {first}: the array has {rank}")
            }
            Error::RangeOutOfBounds { axis, start, end, size } => {
                write!(f, "the range {start}..{end} does not lie within axis {axis}, which has size {size}")
            }
            Error::ClassOutOfRange { row, class, classes } => {
                write!(f, "row {row} has class {class} but there are only {classes}, counted from 0")
            }
            Error::NotInCache { what, index, count } => {
                write!(f, "there is no {what} {index}, counted from 0: the cache has {count}")
            }
            Error::RemovedSequence => f.write_str("the sequence was removed from the cache, or is of another cache"),
            Error::CacheFull { sequence, tokens, capacity } => {
                write!(f, "sequence {sequence} would have {tokens} tokens but the cache has room for {capacity}")
            }
            Error::PagesExhausted { needed, free } => {
                write!(f, "the pool has {free} free pages but {needed} are needed; remove or truncate sequences")
            }
            Error::NotReserved { layer, tokens, reserved } => {
                write!(
                    f,
                    "layer {layer} is given {tokens} tokens but {reserved} are reserved for it; reserve them first"
                )
            }
            Error::NotWritten { layer, written, len } => {
                write!(f, "layer {layer} has {written} of the {len} tokens of a sequence; write the others first")
            }
            Error::StaleLists { sequence } => {
                write!(f, "sequence {sequence} of the page lists has other pages now; list the pages again")
            }
            Error::CannotTruncate { to, len, .. } if to > len => {
                write!(f, "a sequence of {len} tokens can't be truncated to {to}")
            }
            Error::CannotTruncate { to, len, held } => {
                write!(f, "a sequence of {len} tokens can't be truncated to {to}: only {held} are held without a gap")
            }
            Error::LostKeys { sequence, window, needed } => write!(
                f,
                "queries of sequence {sequence} have windows over tokens that the cache has overwritten: it keeps the last \
                 {window} but must keep {needed}, the window of a query and one token for each further query"
            ),
            Error::PositionOutOfRange { position, positions } => {
                write!(f, "the position {position} is not in the rotary table, which has {positions}")
            }
        }
    }
}

impl std::error::Error for Error {}

/// Refuses a list that does not have the right number of entries.
pub(crate) fn check_count(what: &'static str, got: usize, expected: usize) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::WrongCount { what, expected, got }) }
}
