//! C's options of attention, and the [`Attention`] that they make.

use super::c_cache_view::CacheView;
use super::c_mask::{CheckedMask, Mask};
use super::c_score_table::{CheckedTable, ScoreTable};
use super::c_sequences::{CheckedSequences, PageTable, SequenceOptions};
use super::c_tensor::{BYTES, CheckedTensor, FLOATS, Tensor, Type, check_pointer, list, size};
use super::failure::{Code, Failure};
use super::score_row::{ScoreRow, ScoreRowMod};
use super::thread_count::{MAX_THREADS, count};
use crate::attention::Attention;
use crate::level::Level;
use crate::mask::{self, MaskTensor};
use crate::plan::{Form, Threads};
use crate::score::{AlibiSlopes, BiasTensor, ScoreMod};
use crate::sequence::QueryOffset;
use std::ffi::{CStr, c_char, c_void};
use std::{mem, ptr};

/// `flashtile_options`. All zero except `struct_size` is plain attention. No version of the struct has padding: see `SIZES`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Options {
    /// The size of the caller's struct in bytes.
    pub struct_size: usize,
    /// The options that are set: the `FLASHTILE_…` flags.
    pub flags: u32,
    /// 0: the default number of threads; 1: the calling thread; n: n threads.
    pub threads: i32,
    /// The factor of the scores.
    pub scale: f32,
    /// The softcap of the scores.
    pub softcap: f32,
    /// Visible keys before the query's position.
    pub window_left: i64,
    /// Visible keys after the query's position.
    pub window_right: i64,
    /// The positions of the queries: 0 from the end, 1 from the start, 2 at `query_offset`, 3 at `query_offsets[batch]`.
    pub query_position: i32,
    /// ALiBi: 0 none, 1 with the published slopes, 2 with `alibi_slopes[head]`, 3 with `alibi_slopes[batch][head]`.
    pub alibi: i32,
    /// The position of the first query.
    pub query_offset: i64,
    /// The position of the first query of each batch.
    pub query_offsets: *const i64,
    /// The number of entries of `query_offsets`.
    pub query_offset_count: i64,
    /// The number of keys of each batch.
    pub key_lengths: *const i64,
    /// The number of entries of `key_lengths`.
    pub key_length_count: i64,
    /// The slope of each query head, or of each query head of each batch.
    pub alibi_slopes: *const f32,
    /// The number of entries of `alibi_slopes`.
    pub alibi_slope_count: i64,
    /// Bytes that are not 0 where the query may attend to the key.
    pub mask: *const Tensor,
    /// Added to the scores.
    pub bias: *const Tensor,
    /// The name of an instruction set.
    pub level: *const c_char,
    /// 0: chosen from the shapes; 1: decode; 2: prefill.
    pub form: i32,
    /// Must be 0.
    pub reserved: i32,
    /// The logit of each query head that joins the denominator.
    pub sinks: *const f32,
    /// The number of entries of `sinks`.
    pub sink_count: i64,
    /// Masks by rule.
    pub masks: *const Mask,
    /// The number of entries of `masks`.
    pub mask_count: i64,
    /// Changes scores.
    pub score_row: Option<ScoreRow>,
    /// What `score_row` is called with.
    pub score_context: *mut c_void,
    /// The number of queries of each sequence; the others are padding.
    pub query_lengths: *const i64,
    /// The number of entries of `query_lengths`.
    pub query_length_count: i64,
    /// Packed queries: the first row of each sequence, and the end of the last one.
    pub query_starts: *const i64,
    /// The number of entries of `query_starts`.
    pub query_start_count: i64,
    /// Packed keys: the first row of each sequence, and the end of the last one.
    pub key_starts: *const i64,
    /// The number of entries of `key_starts`.
    pub key_start_count: i64,
    /// The pages of each sequence, where keys and values are a pool of pages.
    pub page_table: *const PageTable,
    /// Biases by relative position.
    pub score_tables: *const ScoreTable,
    /// The number of entries of `score_tables`.
    pub score_table_count: i64,
    /// The first query of each sequence; the rows before it are left padding.
    pub first_queries: *const i64,
    /// The number of entries of `first_queries`.
    pub first_query_count: i64,
    /// The first key of each sequence; the rows before it are left padding.
    pub first_keys: *const i64,
    /// The number of entries of `first_keys`.
    pub first_key_count: i64,
    /// The keys and values, where they are in a cache.
    pub cache: *const CacheView,
}

/// The flags of [`Options`].
pub mod flags {
    /// Causal order.
    pub const CAUSAL: u32 = 1;
    /// `scale` counts.
    pub const SCALE: u32 = 2;
    /// `softcap` counts.
    pub const SOFTCAP: u32 = 4;
    /// `window_left` counts.
    pub const WINDOW_LEFT: u32 = 8;
    /// `window_right` counts.
    pub const WINDOW_RIGHT: u32 = 16;
    /// All of them.
    pub(in super::super) const ALL: u32 = 31;
}

/// The option that a list of slopes needs.
const LISTED_SLOPES: &str = "alibi FLASHTILE_ALIBI_PER_HEAD or FLASHTILE_ALIBI_PER_BATCH_AND_HEAD";

/// The size of the struct of the first version, the smallest one.
const SMALLEST: usize = mem::offset_of!(Options, reserved) + size_of::<i32>();

/// No version will be larger. A larger size was never set by a caller.
const LARGEST: usize = 4096;

/// The sizes of the struct in all versions up to this one. **A new member adds a size.** It must not need padding before or
/// after it, because a caller leaves padding unset, and a library of another version could read it as a member.
const SIZES: [usize; 5] = [
    SMALLEST,
    mem::offset_of!(Options, score_context) + size_of::<*mut c_void>(),
    mem::offset_of!(Options, page_table) + size_of::<*const PageTable>(),
    mem::offset_of!(Options, first_key_count) + size_of::<i64>(),
    mem::offset_of!(Options, cache) + size_of::<*const CacheView>(),
];

/// Whether a version of the struct has this size. Of later versions it is only known that they have no padding at the end.
fn is_size(size: usize) -> bool {
    SIZES.contains(&size)
        || size_of::<Options>() < size && size <= LARGEST && size.is_multiple_of(align_of::<Options>())
}

/// Asserts that there is no padding: the sizes of the members add up to that of the struct. The pattern must name each member,
/// or it does not compile.
macro_rules! assert_no_padding {
    ($($member:ident)+) => {
        const _: () = {
            const fn size<M>(_: fn(&Options) -> &M) -> usize {
                size_of::<M>()
            }
            const fn all(_: fn(&Options)) {}
            all(|Options { $($member: _),+ }| ());
            assert!(0 $(+ size(|options| &options.$member))+ == size_of::<Options>());
            assert!(SIZES[SIZES.len() - 1] == size_of::<Options>());
        };
    };
}
assert_no_padding!(struct_size flags threads scale softcap window_left window_right query_position alibi query_offset
    query_offsets query_offset_count key_lengths key_length_count alibi_slopes alibi_slope_count mask bias level form
    reserved sinks sink_count masks mask_count score_row score_context query_lengths query_length_count query_starts
    query_start_count key_starts key_start_count page_table score_tables score_table_count first_queries first_query_count
    first_keys first_key_count cache);

impl Options {
    /// Plain attention.
    pub fn new() -> Self {
        // SAFETY: the members are integers, floats and nullable pointers (one to a function), for which all zeros are valid.
        Options { struct_size: size_of::<Options>(), ..unsafe { mem::zeroed() } }
    }

    /// Reads the caller's struct. Members of a newer caller that this library does not know must be zero.
    ///
    /// # Safety
    /// `options` is null, misaligned, or leads to `struct_size` readable bytes, where `struct_size` is its first member.
    pub(super) unsafe fn read(options: *const Options) -> Result<Self, Failure> {
        if options.is_null() {
            return Ok(Self::new());
        }
        check_pointer("options", options)?;
        // SAFETY: the first member is readable, by the caller's promise.
        let struct_size = unsafe { options.cast::<usize>().read() };
        if !is_size(struct_size) {
            let message = format!(
                "struct_size is {struct_size} but must be sizeof(flashtile_options), here {}",
                size_of::<Options>()
            );
            return Err(Failure::new(Code::BadStructSize, message));
        }
        let mut read = Self::new();
        let known = struct_size.min(size_of::<Options>());
        // SAFETY: both structs have at least `known` bytes, and any bytes are a valid `Options`.
        unsafe { ptr::copy_nonoverlapping(options.cast::<u8>(), (&raw mut read).cast(), known) };
        // SAFETY: the remaining bytes of the caller's `struct_size`, which are readable by the caller's promise.
        let unknown = unsafe { std::slice::from_raw_parts(options.cast::<u8>().add(known), struct_size - known) };
        if unknown.iter().any(|&byte| byte != 0) {
            let message =
                format!("an option beyond byte {known} of the struct is set: this library is older than the caller");
            return Err(Failure::new(Code::BadStructSize, message));
        }
        read.check()?;
        Ok(read)
    }

    /// Refuses values that are invalid for all tensors, and members that are set without the option that uses them.
    fn check(&self) -> Result<(), Failure> {
        if self.flags & !flags::ALL != 0 {
            return Err(Failure::option(format!("flags are {:#x}, of which {:#x} are known", self.flags, flags::ALL)));
        }
        if self.reserved != 0 {
            return Err(Failure::option("reserved is not 0"));
        }
        if !(0..=MAX_THREADS).contains(&self.threads) {
            return Err(Failure::option(format!("threads is {} but must be 0 to {MAX_THREADS}", self.threads)));
        }
        let stray = [
            ("scale", self.scale != 0.0, self.has(flags::SCALE), "flag FLASHTILE_SCALE"),
            ("softcap", self.softcap != 0.0, self.has(flags::SOFTCAP), "flag FLASHTILE_SOFTCAP"),
            ("window_left", self.window_left != 0, self.has(flags::WINDOW_LEFT), "flag FLASHTILE_WINDOW_LEFT"),
            ("window_right", self.window_right != 0, self.has(flags::WINDOW_RIGHT), "flag FLASHTILE_WINDOW_RIGHT"),
            ("query_offset", self.query_offset != 0, self.query_position == 2, "query_position FLASHTILE_AT"),
            (
                "query_offsets",
                !self.query_offsets.is_null(),
                self.query_position == 3,
                "query_position FLASHTILE_PER_BATCH",
            ),
            (
                "query_offset_count",
                self.query_offset_count != 0,
                self.query_position == 3,
                "query_position FLASHTILE_PER_BATCH",
            ),
            ("alibi_slopes", !self.alibi_slopes.is_null(), self.alibi >= 2, LISTED_SLOPES),
            ("alibi_slope_count", self.alibi_slope_count != 0, self.alibi >= 2, LISTED_SLOPES),
            ("score_context", !self.score_context.is_null(), self.score_row.is_some(), "function score_row"),
        ];
        match stray.iter().find(|(_, set, wanted, _)| *set && !wanted) {
            Some((name, .., by)) => Err(Failure::option(format!("{name} is set but has no effect without the {by}"))),
            None => Ok(()),
        }
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// The [`Attention`] of these options. Lists whose element type differs in Rust are copied to `lists`.
    ///
    /// # Safety
    /// Lists, tensors and strings are null, misaligned, or readable and not written to during `'a`.
    pub(super) unsafe fn attention<'a>(
        &self,
        lists: &'a mut Lists,
        tensors: &ScoreTensors,
        sequences: &CheckedSequences<'a>,
        open: &'a OpenSets<'_>,
    ) -> Result<Attention<'a>, Failure> {
        // SAFETY: the caller's promise, here and below.
        unsafe { lists.fill(self)? };
        let lists: &'a Lists = lists;
        let mut attention = Attention::new().window(self.window_left()?, self.window_right()?);
        // Also where 0 stands for one thread: with `Threads::Pool`, rayon would start its own pool, which `release` can't end.
        let serial = count(self.threads) == 1;
        attention = attention.threads(if serial { Threads::Serial } else { Threads::Pool });
        attention = sequences.set(attention.query_offset(self.query_position(lists)?));
        if self.has(flags::CAUSAL) {
            attention = attention.causal();
        }
        if self.has(flags::SCALE) {
            attention = attention.scale(self.scale);
        }
        if self.has(flags::SOFTCAP) {
            attention = attention.softcap(self.softcap);
        }
        if !self.key_lengths.is_null() || self.key_length_count != 0 {
            attention = attention.key_lengths(&lists.key_lengths);
        }
        attention.options.alibi = match self.alibi {
            0 => None,
            1 => Some(AlibiSlopes::Standard),
            // SAFETY: as above.
            2 => Some(AlibiSlopes::PerHead(unsafe { self.slopes()? })),
            // SAFETY: as above.
            3 => Some(AlibiSlopes::PerBatchAndHead(unsafe { self.slopes()? })),
            other => return Err(Failure::option(format!("alibi is {other} but must be 0 to 3"))),
        };
        // SAFETY: as above.
        attention.options.mask = tensors.mask.map(|mask| unsafe { mask.bytes() }).transpose()?.map(MaskTensor);
        // SAFETY: as above.
        attention.options.bias = tensors.bias.map(|bias| unsafe { bias.any() }).transpose()?.map(BiasTensor);
        if !self.sinks.is_null() || self.sink_count != 0 {
            // SAFETY: as above.
            attention = attention.sinks(unsafe { self.sinks()? });
        }
        attention = open.masks.iter().fold(attention, |attention, mask| attention.masked_by(&**mask));
        attention = open.tables.iter().fold(attention, |attention, table| attention.modified_by(&**table));
        if let Some(function) = &open.function {
            attention = attention.modified_by(function);
        }
        if let Some(form) = self.form()? {
            attention = attention.form(form);
        }
        // SAFETY: as above.
        if let Some(level) = unsafe { self.level()? } {
            attention = attention.level(level);
        }
        Ok(attention)
    }

    fn window_left(&self) -> Result<Option<usize>, Failure> {
        self.has(flags::WINDOW_LEFT).then(|| size("window_left", self.window_left)).transpose()
    }

    fn window_right(&self) -> Result<Option<usize>, Failure> {
        self.has(flags::WINDOW_RIGHT).then(|| size("window_right", self.window_right)).transpose()
    }

    fn query_position<'a>(&self, lists: &'a Lists) -> Result<QueryOffset<'a>, Failure> {
        Ok(match self.query_position {
            0 => QueryOffset::FromEnd,
            1 => QueryOffset::FromStart,
            2 => QueryOffset::At(position(self.query_offset)?),
            3 => QueryOffset::per_batch(&lists.query_offsets),
            other => return Err(Failure::option(format!("query_position is {other} but must be 0 to 3"))),
        })
    }

    fn form(&self) -> Result<Option<Form>, Failure> {
        match self.form {
            0 => Ok(None),
            1 => Ok(Some(Form::Decode)),
            2 => Ok(Some(Form::Prefill)),
            other => Err(Failure::option(format!("form is {other} but must be 0, 1 or 2"))),
        }
    }

    /// # Safety
    /// `level` is null or a string.
    unsafe fn level(&self) -> Result<Option<Level>, Failure> {
        if self.level.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        let name = unsafe { CStr::from_ptr(self.level) }.to_string_lossy();
        let level = Level::ALL.iter().find(|level| level.to_string() == name);
        let unknown = || {
            let names = Level::ALL.iter().map(Level::to_string).collect::<Vec<_>>().join(", ");
            Failure::new(Code::LevelUnavailable, format!("{name:?} is no level; there are {names}"))
        };
        level.copied().map(Some).ok_or_else(unknown)
    }

    /// # Safety
    /// As [`list`].
    pub(super) unsafe fn slopes<'a>(&self) -> Result<&'a [f32], Failure> {
        // SAFETY: the caller's promise.
        unsafe { list("ALiBi slopes", self.alibi_slopes, self.alibi_slope_count) }
    }

    /// # Safety
    /// As [`list`].
    pub(super) unsafe fn sinks<'a>(&self) -> Result<&'a [f32], Failure> {
        // SAFETY: the caller's promise.
        unsafe { list("sinks", self.sinks, self.sink_count) }
    }

    /// # Safety
    /// As [`CheckedSequences::new`], of the lists of sequences and the page table.
    pub(super) unsafe fn sequences<'a>(&self) -> Result<CheckedSequences<'a>, Failure> {
        let options = SequenceOptions {
            query_lengths: (self.query_lengths, self.query_length_count),
            query_starts: (self.query_starts, self.query_start_count),
            key_lengths: (self.key_lengths, self.key_length_count),
            key_starts: (self.key_starts, self.key_start_count),
            page_table: self.page_table,
            first_queries: (self.first_queries, self.first_query_count),
            first_keys: (self.first_keys, self.first_key_count),
            has_cache: !self.cache.is_null(),
        };
        // SAFETY: the caller's promise.
        unsafe { CheckedSequences::new(options) }
    }

    /// # Safety
    /// As [`list`], of the masks, the score tables, and their lists.
    pub(super) unsafe fn open_sets<'a>(&self) -> Result<CheckedOpenSets<'a>, Failure> {
        // SAFETY: the caller's promise, here and below.
        let masks: &[Mask] = unsafe { list("masks", self.masks, self.mask_count)? };
        // SAFETY: as above.
        let tables: &[ScoreTable] = unsafe { list("score tables", self.score_tables, self.score_table_count)? };
        Ok(CheckedOpenSets {
            // SAFETY: as above.
            masks: each("masks", masks, |mask| unsafe { CheckedMask::new(mask) })?,
            // SAFETY: as above.
            tables: each("score_tables", tables, |table| unsafe { CheckedTable::new(table) })?,
        })
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}

/// What `of` makes of each entry of the list. A failure names the entry.
fn each<T, R>(name: &str, list: &[T], of: impl Fn(&T) -> Result<R, Failure>) -> Result<Vec<R>, Failure> {
    let named = |n, failure: Failure| Failure { message: format!("{name}[{n}]: {}", failure.message), ..failure };
    list.iter().enumerate().map(|(n, entry)| of(entry).map_err(|failure| named(n, failure))).collect()
}

/// Masks by rule and score tables whose lists are readable.
pub(super) struct CheckedOpenSets<'a> {
    masks: Vec<CheckedMask<'a>>,
    tables: Vec<CheckedTable<'a>>,
}

impl CheckedOpenSets<'_> {
    /// Refuses an output that overlaps a list.
    pub(super) fn check_disjoint(&self, written: &CheckedTensor) -> Result<(), Failure> {
        let mut lists = self.masks.iter().flat_map(|mask| mask.lists);
        lists.try_for_each(|list| written.check_disjoint_from_list("list of a mask", list))?;
        let mut tables = self.tables.iter().map(|table| table.table);
        tables.try_for_each(|table| written.check_disjoint_from_list("score table", table))
    }
}

/// The masks by rule, the score tables and the score function.
pub(super) struct OpenSets<'a> {
    masks: Vec<Box<dyn mask::Mask + 'a>>,
    tables: Vec<Box<dyn ScoreMod>>,
    function: Option<ScoreRowMod>,
}

impl<'a> OpenSets<'a> {
    /// * `longest`: the most queries, and the most keys, of a sequence
    /// * `heads`: query heads
    ///
    /// # Safety
    /// The score function and its context are as [`ScoreRowMod::new`] requires.
    pub(super) unsafe fn new(
        options: &Options,
        checked: &CheckedOpenSets<'a>,
        longest: [usize; 2],
        heads: usize,
    ) -> Result<Self, Failure> {
        let masks = each("masks", &checked.masks, |mask| mask.build(longest))?;
        let tables = each("score_tables", &checked.tables, |table| table.build(heads))?;
        // SAFETY: the caller's promise.
        let function = options.score_row.map(|function| unsafe { ScoreRowMod::new(function, options.score_context) });
        Ok(OpenSets { masks, tables, function })
    }
}

/// Mask and bias. Outputs must be disjoint from them.
pub(super) struct ScoreTensors {
    pub(super) mask: Option<CheckedTensor>,
    pub(super) bias: Option<CheckedTensor>,
}

impl ScoreTensors {
    /// # Safety
    /// As [`CheckedTensor::new`], of both.
    pub(super) unsafe fn new(options: &Options) -> Result<Self, Failure> {
        // SAFETY: the caller's promise.
        let read = |name, tensor: *const Tensor, types: &[Type]| unsafe {
            (!tensor.is_null()).then(|| CheckedTensor::new(name, tensor, types, 1..=4)).transpose()
        };
        Ok(ScoreTensors { mask: read("mask", options.mask, BYTES)?, bias: read("bias", options.bias, FLOATS)? })
    }
}

/// Lists in Rust's types. They are kept between calls, so that repeated calls do not allocate.
#[derive(Debug, Default)]
pub(super) struct Lists {
    key_lengths: Vec<usize>,
    query_offsets: Vec<isize>,
}

impl Lists {
    /// # Safety
    /// As [`list`].
    unsafe fn fill(&mut self, options: &Options) -> Result<(), Failure> {
        // SAFETY: the caller's promise.
        let lengths = unsafe { list("key lengths", options.key_lengths, options.key_length_count)? };
        copy(lengths, &mut self.key_lengths, |&length| size("key lengths", length))?;
        // SAFETY: as above.
        let offsets = unsafe { list("query offsets", options.query_offsets, options.query_offset_count)? };
        copy(offsets, &mut self.query_offsets, |&offset| position(offset))
    }
}

fn copy<T>(from: &[i64], to: &mut Vec<T>, convert: impl Fn(&i64) -> Result<T, Failure>) -> Result<(), Failure> {
    to.clear();
    let no_memory = |_| Failure::new(Code::TooLarge, "a list would not fit in memory");
    to.try_reserve(from.len()).map_err(no_memory)?;
    from.iter().try_for_each(|x| convert(x).map(|x| to.push(x)))
}

fn position(offset: i64) -> Result<isize, Failure> {
    isize::try_from(offset)
        .map_err(|_| Failure::option(format!("a query offset is {offset}, which is no position here")))
}
