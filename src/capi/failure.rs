//! Failures as C sees them: a code and a message, never a panic.

#![forbid(unsafe_code)]

use crate::error::Error;
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The result of a call: `FLASHTILE_…` of the header. The numbers never change meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(i32)]
pub enum Code {
    /// Success.
    Ok = 0,
    /// A pointer is null that must not be.
    NullPointer = 1,
    /// A pointer is not a multiple of its type's alignment.
    Misaligned = 2,
    /// `struct_size` is not a size that this library knows.
    BadStructSize = 3,
    /// An element type does not exist or is not accepted for this tensor.
    BadDtype = 4,
    /// A rank is not accepted for this tensor.
    BadRank = 5,
    /// A size or count is negative.
    NegativeSize = 6,
    /// An output shares memory with an input or another output.
    Overlap = 7,
    /// Two indices of an output lead to one element.
    OverlappingOutput = 8,
    /// A tensor or list exceeds any memory, the available memory, or the limits of a call.
    TooLarge = 9,
    /// A dimension differs from the one that it must match.
    ShapeMismatch = 10,
    /// The number of query heads is not a multiple of the number of key/value heads.
    HeadsNotDivisible = 11,
    /// A mask or bias cannot be broadcast to the scores.
    NotBroadcastable = 12,
    /// A list has the wrong number of entries.
    WrongCount = 13,
    /// A key length is above the number of keys, a query length above the number of queries, or a first key or query above the length.
    KeyLengthPastEnd = 14,
    /// An option has a value that it cannot take.
    InvalidOption = 15,
    /// The processor, or this build, lacks the level.
    LevelUnavailable = 16,
    /// The tensor does not have the axis.
    AxisOutOfRange = 17,
    /// Threads could not be started.
    Threads = 18,
    /// A panic inside the library, which was caught.
    Panic = 19,
    /// A target is neither a class nor ignored.
    ClassOutOfRange = 20,
    /// The starts of packed sequences or of a page table don't ascend, or end after the last row or entry.
    InvalidStarts = 21,
    /// A page table names a page that the pool lacks, has a length above its pages, or a page size of 0.
    InvalidPages = 22,
    /// A position is not in the rotary table.
    PositionOutOfRange = 23,
    /// The cache has no such sequence or layer.
    NotInCache = 24,
    /// A cache has no room for the tokens, or too few free pages.
    CacheFull = 25,
    /// More tokens are written than are reserved.
    NotReserved = 26,
    /// A layer lacks tokens that are reserved.
    NotWritten = 27,
    /// A sequence is shorter than the length that it is to be truncated to, or has lost tokens of it.
    CannotTruncate = 28,
    /// A rotating cache has overwritten keys that lie in a query's window.
    LostKeys = 29,
    /// The function is not for caches of this kind.
    WrongCache = 30,
}

/// The reason why a call failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Failure { code, message: message.into() }
    }

    /// An option with a value that it cannot take.
    pub(super) fn option(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidOption, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::OverlappingOutput { .. } => Code::OverlappingOutput,
            Error::TooLarge { .. } | Error::TooMany { .. } => Code::TooLarge,
            Error::ShapeMismatch { .. } => Code::ShapeMismatch,
            Error::HeadsNotDivisible { .. } => Code::HeadsNotDivisible,
            Error::NotBroadcastable { .. } => Code::NotBroadcastable,
            Error::WrongCount { .. } => Code::WrongCount,
            Error::Rank { .. } => Code::BadRank,
            Error::LengthOutOfRange { got, .. } if got < 0 => Code::NegativeSize,
            Error::LengthOutOfRange { .. } => Code::KeyLengthPastEnd,
            Error::InvalidStarts { .. } => Code::InvalidStarts,
            Error::InvalidPages { .. } => Code::InvalidPages,
            Error::InvalidOption { .. } => Code::InvalidOption,
            Error::GivenTwice { .. } | Error::InvalidMask { .. } => Code::InvalidOption,
            Error::LevelUnavailable { .. } => Code::LevelUnavailable,
            Error::AxisOutOfRange { .. } => Code::AxisOutOfRange,
            Error::ClassOutOfRange { .. } => Code::ClassOutOfRange,
            Error::NotInCache { .. } | Error::RemovedSequence => Code::NotInCache,
            Error::CacheFull { .. } | Error::PagesExhausted { .. } => Code::CacheFull,
            Error::NotReserved { .. } => Code::NotReserved,
            Error::NotWritten { .. } => Code::NotWritten,
            Error::CannotTruncate { .. } => Code::CannotTruncate,
            Error::LostKeys { .. } => Code::LostKeys,
            Error::PositionOutOfRange { .. } => Code::PositionOutOfRange,
            // Errors about slices and ranges, which C does not pass, and about lists of pages, which are made in each call.
            Error::SliceLength { .. }
            | Error::OutOfBounds { .. }
            | Error::RangeOutOfBounds { .. }
            | Error::StaleLists { .. }
            | Error::Misaligned { .. } => Code::Panic,
        };
        Failure::new(code, error.to_string())
    }
}

thread_local! {
    /// The message of the last call on this thread that failed.
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// The message of the last failure on this thread. The pointer is valid until the next failure.
pub(super) fn last_message() -> *const c_char {
    // It no longer exists while the thread ends.
    MESSAGE.try_with(|message| message.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs the body of an exported function. It always returns a code, and keeps the message of a failure.
pub(super) fn guarded(body: impl FnOnce() -> Result<(), Failure>) -> i32 {
    // The body owns its data, so no data is observed after a panic.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Code::Ok as i32,
        Ok(Err(failure)) => failure,
        Err(payload) => from_panic(payload),
    };
    let message = CString::new(failure.message.replace('\0', " ")).unwrap_or_default();
    let _ = MESSAGE.try_with(|last| last.replace(message));
    failure.code as i32
}

fn from_panic(payload: Box<dyn Any + Send>) -> Failure {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
    let failure = Failure::new(Code::Panic, format!("a fault in the library, please report it: {text}"));
    std::mem::forget(payload); // dropping it could panic again, and that panic would not be caught
    failure
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // Copied inside the closure, so no pointer is dereferenced.
        MESSAGE.with(|message| CStr::to_string_lossy(&message.borrow()).into_owned())
    }

    #[test]
    fn a_panic_becomes_a_code() {
        let panics: [fn() -> Result<(), Failure>; 2] = [|| panic!("on {}", ["purpose"][0]), || panic!("on purpose")];
        for panic in panics {
            assert_eq!(guarded(panic), Code::Panic as i32);
            assert_eq!(message(), "a fault in the library, please report it: on purpose");
        }
    }

    #[test]
    fn a_panic_whose_payload_panics_becomes_a_code() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        assert_eq!(guarded(|| std::panic::panic_any(Bomb)), Code::Panic as i32);
    }

    #[test]
    fn a_message_outlives_successes() {
        assert_eq!(guarded(|| Err(Failure::new(Code::WrongCount, "a\0b"))), Code::WrongCount as i32);
        assert_eq!(guarded(|| Ok(())), 0);
        assert_eq!(message(), "a b");
    }
}
