//! C's masks by rule: each a kind with its numbers and lists.

use super::c_tensor::{list, size};
use super::failure::{Code, Failure};
use crate::mask::{self, BlockSparse, Chunked, Documents, FirstAndLast, KeyStarts, PrefixLm, Tree};
use std::iter::zip;

/// `flashtile_mask`. The layout is fixed. Numbers and lists that a kind does not use are 0 and null.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Mask {
    /// One of the `FLASHTILE_…` kinds: 1 documents, 2 prefix LM, 3 chunked, 4 first and last, 5 tree, 6 block-sparse, 7 key
    /// starts, 8 block-sparse by rows.
    pub kind: i32,
    /// Must be 0.
    pub reserved: i32,
    /// The kind's numbers.
    pub numbers: [i64; 4],
    /// The kind's lists.
    pub lists: [*const i64; 2],
    /// The number of entries of each list.
    pub counts: [i64; 2],
}

impl Mask {
    /// A mask without numbers and lists.
    pub fn new(kind: i32) -> Self {
        Mask { kind, reserved: 0, numbers: [0; 4], lists: [std::ptr::null(); 2], counts: [0; 2] }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Documents,
    PrefixLm,
    Chunked,
    FirstAndLast,
    Tree,
    BlockSparse,
    KeyStarts,
    BlockSparseRows,
}

impl Kind {
    const ALL: [Kind; 8] = [
        Kind::Documents,
        Kind::PrefixLm,
        Kind::Chunked,
        Kind::FirstAndLast,
        Kind::Tree,
        Kind::BlockSparse,
        Kind::KeyStarts,
        Kind::BlockSparseRows,
    ];

    fn new(kind: i32) -> Result<Self, Failure> {
        let known = usize::try_from(kind).ok().and_then(|kind| Self::ALL.get(kind.checked_sub(1)?).copied());
        known.ok_or_else(|| Failure::option(format!("{kind} is no kind of mask; it must be 1 to {}", Self::ALL.len())))
    }

    /// How many numbers and lists it uses.
    fn uses(self) -> (usize, usize) {
        match self {
            Kind::Documents => (1, 2),
            Kind::PrefixLm => (0, 2),
            Kind::Chunked => (1, 0),
            Kind::FirstAndLast => (2, 0),
            Kind::Tree | Kind::KeyStarts => (0, 1),
            Kind::BlockSparse => (4, 1),
            Kind::BlockSparseRows => (2, 2),
        }
    }
}

/// A mask whose kind is known and whose lists are readable.
#[derive(Clone, Copy, Debug)]
pub(super) struct CheckedMask<'a> {
    kind: Kind,
    numbers: [usize; 4],
    pub(super) lists: [&'a [i64]; 2],
}

impl<'a> CheckedMask<'a> {
    /// # Safety
    /// As [`list`], of both lists.
    pub(super) unsafe fn new(mask: &Mask) -> Result<Self, Failure> {
        let kind = Kind::new(mask.kind)?;
        if mask.reserved != 0 {
            return Err(Failure::option("reserved is not 0"));
        }
        let (numbers, lists) = kind.uses();
        let stray_list = (lists..2).any(|n| !mask.lists[n].is_null() || mask.counts[n] != 0);
        if stray_list || mask.numbers[numbers..].iter().any(|&number| number != 0) {
            let message = format!("a number or list is set that the kind has not: it has {numbers} and {lists}");
            return Err(Failure::option(message));
        }
        let mut checked = CheckedMask { kind, numbers: [0; 4], lists: [&[]; 2] };
        for (to, &number) in zip(&mut checked.numbers, &mask.numbers) {
            *to = size("mask", number)?;
        }
        for (to, (&from, &count)) in zip(&mut checked.lists, zip(&mask.lists, &mask.counts)) {
            // SAFETY: the caller's promise.
            *to = unsafe { list("list of the mask", from, count)? };
        }
        Ok(checked)
    }

    /// The mask for `seq_q` queries and `seq_kv` keys of each sequence.
    pub(super) fn build(&self, [seq_q, seq_kv]: [usize; 2]) -> Result<Box<dyn mask::Mask + 'a>, Failure> {
        let [list, other] = self.lists;
        Ok(match self.kind {
            Kind::Documents => Box::new(Documents::per_sequence(self.numbers[0].max(1), list, other)?),
            Kind::PrefixLm => Box::new(self.prefix_lm()?),
            Kind::Chunked => Box::new(Chunked::new(self.positive(0)?)),
            Kind::FirstAndLast => Box::new(FirstAndLast::new(self.numbers[0], self.numbers[1])),
            Kind::Tree => Box::new(Tree::new(list)?),
            Kind::KeyStarts => Box::new(KeyStarts::new(list)),
            Kind::BlockSparse => {
                let block @ [queries, keys] = [self.positive(0)?, self.positive(1)?];
                let [.., batch, heads] = self.numbers.map(|number| number.max(1));
                let shape = [batch, heads, seq_q.div_ceil(queries), seq_kv.div_ceil(keys)];
                let kept: Vec<bool> = list.iter().map(|&kept| kept != 0).collect();
                Box::new(BlockSparse::new(block, shape, &kept)?)
            }
            Kind::BlockSparseRows => {
                let block @ [_, keys] = [self.positive(0)?, self.positive(1)?];
                let (starts, columns) = (sizes(list)?, sizes(other)?);
                Box::new(BlockSparse::from_rows(block, seq_kv.div_ceil(keys), &starts, &columns)?)
            }
        })
    }

    fn prefix_lm(&self) -> Result<PrefixLm, Failure> {
        let [starts, ends] = [sizes(self.lists[0])?, sizes(self.lists[1])?];
        if starts.len() != ends.len() {
            let message = format!("{} starts of ranges were given, but {} ends", starts.len(), ends.len());
            return Err(Failure::new(Code::WrongCount, message));
        }
        let ranges: Vec<_> = zip(starts, ends).map(|(start, end)| start..end).collect();
        Ok(PrefixLm::new(&ranges)?)
    }

    /// A number that must not be 0, which is what a caller leaves that forgets it.
    fn positive(&self, n: usize) -> Result<usize, Failure> {
        match self.numbers[n] {
            0 => Err(Failure::option(format!("numbers[{n}] is 0 but must be at least 1"))),
            number => Ok(number),
        }
    }
}

fn sizes(list: &[i64]) -> Result<Vec<usize>, Failure> {
    list.iter().map(|&entry| size("mask", entry)).collect()
}
