//! What the processor offers.

#![forbid(unsafe_code)]

use crate::error::Error;
use crate::level::Level;
use crate::simd::Isa;

/// The hardware as the plan sees it. Cache sizes are not among it: tile sizes decide in which order numbers are added, and
/// the same problem shall give the same bits on every machine of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    pub(crate) isa: Isa,
}

impl Machine {
    /// This machine, at `level` or its best.
    pub(crate) fn new(level: Option<Level>) -> Result<Self, Error> {
        let isa = match level {
            None => Isa::best(),
            Some(level) => Isa::detect(level).ok_or(Error::LevelUnavailable { level })?,
        };
        Ok(Self { isa })
    }
}
