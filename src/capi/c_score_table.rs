//! C's tables of biases by relative position: each a kind with its numbers and its table.

use super::c_tensor::{list, size};
use super::failure::Failure;
use crate::score::{RelativeBias, ScoreMod, WindowBias};

/// `flashtile_score_table`. The layout is fixed. Numbers that a kind does not use are 0.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ScoreTable {
    /// One of the kinds of `flashtile_score_table_kind`: 1 relative bias, 2 T5 bias, 3 window bias.
    pub kind: i32,
    /// Must be 0.
    pub reserved: i32,
    /// The kind's numbers.
    pub numbers: [i64; 4],
    /// The biases.
    pub table: *const f32,
    /// The number of entries of `table`.
    pub count: i64,
}

impl ScoreTable {
    /// A table without numbers and entries.
    pub fn new(kind: i32) -> Self {
        ScoreTable { kind, reserved: 0, numbers: [0; 4], table: std::ptr::null(), count: 0 }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Numbers: the largest distance.
    Relative,
    /// Numbers: the largest distance; 1 for an encoder.
    T5,
    /// Numbers: height and width.
    Window,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Relative, Kind::T5, Kind::Window];

    fn new(kind: i32) -> Result<Self, Failure> {
        let known = usize::try_from(kind).ok().and_then(|kind| Self::ALL.get(kind.checked_sub(1)?).copied());
        let message = || format!("{kind} is no kind of score table; it must be 1 to {}", Self::ALL.len());
        known.ok_or_else(|| Failure::option(message()))
    }

    /// How many numbers it uses.
    fn numbers(self) -> usize {
        match self {
            Kind::Relative => 1,
            Kind::T5 | Kind::Window => 2,
        }
    }
}

/// A table whose kind is known and whose entries are readable.
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckedTable<'a> {
    kind: Kind,
    numbers: [usize; 4],
    pub(super) table: &'a [f32],
}

impl<'a> CheckedTable<'a> {
    /// # Safety
    /// As [`list`], of the table.
    pub(super) unsafe fn new(given: &ScoreTable) -> Result<Self, Failure> {
        let kind = Kind::new(given.kind)?;
        if given.reserved != 0 {
            return Err(Failure::option("reserved is not 0"));
        }
        let used = kind.numbers();
        if given.numbers[used..].iter().any(|&number| number != 0) {
            return Err(Failure::option(format!("a number is set that the kind has not: it has {used}")));
        }
        let mut numbers = [0; 4];
        for (to, &number) in numbers.iter_mut().zip(&given.numbers) {
            *to = size("score table", number)?;
        }
        // SAFETY: the caller's promise.
        let table = unsafe { list("score table", given.table, given.count)? };
        Ok(CheckedTable { kind, numbers, table })
    }

    /// The score modification of `heads` query heads.
    pub(super) fn build(&self, heads: usize) -> Result<Box<dyn ScoreMod>, Failure> {
        let [first, second, ..] = self.numbers;
        Ok(match self.kind {
            Kind::Relative => Box::new(RelativeBias::new(heads, first, self.table)?),
            Kind::T5 => Box::new(RelativeBias::t5(heads, self.is_bidirectional()?, first, self.table)?),
            Kind::Window => Box::new(WindowBias::new(heads, [first, second], self.table)?),
        })
    }

    fn is_bidirectional(&self) -> Result<bool, Failure> {
        match self.numbers[1] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Failure::option(format!("numbers[1] is {other} but must be 0 or 1"))),
        }
    }
}
