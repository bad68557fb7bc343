//! What goes back over the border: codes and messages, never a panic.

#![forbid(unsafe_code)]

use crate::error::Error;
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a call returns: `FLASHTILE_…` of the header. The numbers never change meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(i32)]
pub enum Code {
    /// Done.
    Ok = 0,
    /// A pointer that must not be is null.
    NullPointer = 1,
    /// A pointer is not a multiple of its type's alignment.
    Misaligned = 2,
    /// `struct_size` is none that this library knows.
    BadStructSize = 3,
    /// An element type that does not exist or is not taken there.
    BadDtype = 4,
    /// A rank that is not taken there.
    BadRank = 5,
    /// A size or count below 0.
    NegativeSize = 6,
    /// An output shares memory with an input or another output.
    Overlap = 7,
    /// Two indices of an output lead to one element.
    OverlappingOutput = 8,
    /// More than any memory could hold, than there is, or than a call takes.
    TooLarge = 9,
    /// A dimension differs from the one that it must match.
    ShapeMismatch = 10,
    /// Query heads are no multiple of key/value heads.
    HeadsNotDivisible = 11,
    /// A mask or bias fits the scores in no way.
    NotBroadcastable = 12,
    /// A list is too short or too long.
    WrongCount = 13,
    /// A key length is above the number of keys.
    KeyLengthPastEnd = 14,
    /// An option has a value that it cannot take.
    InvalidOption = 15,
    /// The processor, or this build, lacks the level.
    LevelUnavailable = 16,
    /// The tensor does not have the axis.
    AxisOutOfRange = 17,
    /// Threads could not be had.
    Threads = 18,
    /// A fault of the library, stopped at the border.
    Panic = 19,
}

/// Why a call did not go through.
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
            Error::KeyLengthOutOfRange { .. } => Code::KeyLengthPastEnd,
            Error::InvalidOption { .. } => Code::InvalidOption,
            Error::GivenTwice { .. } => Code::InvalidOption,
            Error::LevelUnavailable { .. } => Code::LevelUnavailable,
            Error::AxisOutOfRange { .. } => Code::AxisOutOfRange,
            // Of slices, ranges and classes, which don't cross this border.
            Error::SliceLength { .. }
            | Error::OutOfBounds { .. }
            | Error::RangeOutOfBounds { .. }
            | Error::ClassOutOfRange { .. } => Code::Panic,
        };
        Failure::new(code, error.to_string())
    }
}

thread_local! {
    /// Of the last call on this thread that failed.
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// The message of the last failure on this thread; it stays where it is until the next failure.
pub(super) fn last_message() -> *const c_char {
    // Not there any more while the thread is being taken down.
    MESSAGE.try_with(|message| message.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs the body of an entry: whatever happens in it, a code comes back and the message is kept.
pub(super) fn guarded(body: impl FnOnce() -> Result<(), Failure>) -> i32 {
    // Nothing of ours is seen again after a panic: the body owns what it works with.
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
    std::mem::forget(payload); // dropping it could panic again, and here nothing would stop that
    failure
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // (Copied within the closure: no pointer is followed.)
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
