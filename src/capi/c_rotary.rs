//! C's rotary position embeddings: tables, and the positions of tokens.

use super::c_tensor::{CheckedTensor, FLOATS, Tensor, Type, check_pointer, list, size};
use super::failure::{Code, Failure, guarded};
use super::handle::{self, shared};
use crate::element::{bf16, f16};
use crate::error::Error;
use crate::rotary::{Positions, Rotary};
use crate::tensor::AnyTensorRef;

/// `flashtile_rotation`: how tokens are rotated. The layout is fixed.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Rotation {
    /// The table.
    pub rotary: *const Rotary,
    /// One position, one of each sequence, or one of each token.
    pub positions: *const i64,
    /// The number of entries of `positions`.
    pub position_count: i64,
}

impl Rotation {
    /// With this table, at the positions that follow those of a cache.
    pub fn new(rotary: *const Rotary) -> Self {
        Rotation { rotary, positions: std::ptr::null(), position_count: 0 }
    }
}

/// A rotation whose table and positions are readable.
#[derive(Clone, Copy)]
pub(super) struct CheckedRotation<'a> {
    pub(super) rotary: &'a Rotary,
    positions: Option<&'a [i64]>,
}

impl<'a> CheckedRotation<'a> {
    /// # Safety
    /// `rotation` is null, misaligned, or leads to a rotation whose table is null or was made by this library and not freed, and whose
    /// positions are as [`list`] requires, all for `'a`.
    pub(super) unsafe fn new(rotation: *const Rotation) -> Result<Self, Failure> {
        check_pointer("rotation", rotation)?;
        // SAFETY: neither null nor misaligned, so by the caller's promise it may be read.
        let Rotation { rotary, positions, position_count } = unsafe { rotation.read() };
        // SAFETY: the caller's promise.
        let rotary = unsafe { shared("rotary table", rotary)? };
        let given = !positions.is_null() || position_count != 0;
        // SAFETY: as above.
        let positions = given.then(|| unsafe { list("positions", positions, position_count) }).transpose()?;
        Ok(CheckedRotation { rotary, positions })
    }

    /// The positions of tokens `[batch, .., count, ..]`, if they are given: how many there are says what they are of.
    pub(super) fn positions(&self, tokens: &CheckedTensor) -> Result<Option<Positions<'a>>, Failure> {
        let [batch, _, count, _] = tokens.shape();
        let Some(list) = self.positions else { return Ok(None) };
        let each = batch.saturating_mul(count);
        match *list {
            _ if list.len() == batch => Ok(Some(Positions::per_batch(list))),
            _ if list.len() == each => Ok(Some(Positions::each(list))),
            [start] => match usize::try_from(start) {
                Ok(start) => Ok(Some(Positions::Start(start))),
                Err(_) => {
                    let positions = self.rotary.positions();
                    Err(Error::PositionOutOfRange { position: start.into(), positions }.into())
                }
            },
            _ => {
                let got = list.len();
                let message = format!(
                    "{got} positions were given but there must be 1, {batch} (one of each sequence) or {each} (one of each token)"
                );
                Err(Failure::new(Code::WrongCount, message))
            }
        }
    }
}

/// The pairing of elements.
fn paired(rotary: Rotary, pairing: i32) -> Result<Rotary, Failure> {
    match pairing {
        0 => Ok(rotary),
        1 => Ok(rotary.interleaved()),
        other => Err(Failure::option(format!("pairing is {other} but must be 0 or 1"))),
    }
}

/// A table from a base: `flashtile_rotary_new` of the header.
///
/// # Safety
/// `rotary` is null or leads to a pointer that is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_rotary_new(
    dim: i64,
    base: f64,
    positions: i64,
    pairing: i32,
    rotary: *mut *mut Rotary,
) -> i32 {
    let make = || {
        let (dim, positions) = (size("rotary table (dim)", dim)?, size("rotary table (positions)", positions)?);
        paired(Rotary::new(dim, base, positions)?, pairing)
    };
    // SAFETY: the caller's promise.
    unsafe { handle::make("rotary table", rotary, make) }
}

/// A table from frequencies: `flashtile_rotary_from_frequencies` of the header.
///
/// # Safety
/// As [`flashtile_rotary_new`]; `frequencies` is null or leads to `frequency_count` numbers that nothing writes to meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_rotary_from_frequencies(
    frequencies: *const f64,
    frequency_count: i64,
    magnitude: f64,
    positions: i64,
    pairing: i32,
    rotary: *mut *mut Rotary,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise.
        let frequencies = unsafe { list("frequencies", frequencies, frequency_count)? };
        let positions = size("rotary table (positions)", positions)?;
        paired(Rotary::with_magnitude(frequencies, magnitude, positions)?, pairing)
    };
    // SAFETY: the caller's promise.
    unsafe { handle::make("rotary table", rotary, make) }
}

/// A table of cosines and sines: `flashtile_rotary_from_tables` of the header.
///
/// # Safety
/// As [`flashtile_rotary_new`]; the tensors are as `flashtile_attention` requires.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_rotary_from_tables(
    cos: *const Tensor,
    sin: *const Tensor,
    pairing: i32,
    rotary: *mut *mut Rotary,
) -> i32 {
    let make = || {
        // SAFETY: the caller's promise, here and below.
        let [cos, sin] = unsafe {
            [CheckedTensor::new("cosines", cos, FLOATS, 2..=2)?, CheckedTensor::new("sines", sin, FLOATS, 2..=2)?]
        };
        sin.check_type_of(&cos)?;
        // SAFETY: as above; both have the type that is matched (checked).
        let table = unsafe {
            match cos.dtype() {
                Type::F32 => Rotary::from_tables(cos.table::<f32>(), sin.table::<f32>())?,
                Type::F16 => Rotary::from_tables(cos.table::<f16>(), sin.table::<f16>())?,
                Type::Bf16 => Rotary::from_tables(cos.table::<bf16>(), sin.table::<bf16>())?,
                Type::F64 | Type::Byte => return Err(cos.unsupported()),
            }
        };
        paired(table, pairing)
    };
    // SAFETY: the caller's promise.
    unsafe { handle::make("rotary table", rotary, make) }
}

/// Frees a table: `flashtile_rotary_free` of the header.
///
/// # Safety
/// `rotary` is null, or was made by this library and is not used by any call, now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_rotary_free(rotary: *mut Rotary) {
    // SAFETY: the caller's promise.
    unsafe { handle::free(rotary) };
}

/// Rotates tokens: `flashtile_rotate` of the header.
///
/// # Safety
/// * `rotation` is null or leads to a rotation, whose table is null or was made by this library and is not freed meanwhile, and whose
///   list has `position_count` entries that nothing writes to meanwhile
/// * the tensors are as `flashtile_attention` requires; `out` is written
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashtile_rotate(rotation: *const Rotation, x: *const Tensor, out: *const Tensor) -> i32 {
    guarded(|| {
        // SAFETY: the caller's promise, here and below.
        let rotation = unsafe { CheckedRotation::new(rotation)? };
        // SAFETY: as above. Packed tokens are a batch of one.
        let (x, out) =
            unsafe { (CheckedTensor::of_heads("input", x, true)?, CheckedTensor::of_heads("output", out, true)?) };
        let [batch, _, count, _] = x.shape();
        let nothing = (batch == 0 || count == 0).then(|| Positions::each(&[0_i64; 0]));
        let positions = rotation.positions(&x)?.or(nothing).ok_or_else(|| {
            Failure::new(
                Code::NullPointer,
                "the pointer to the positions is null, but a rotation outside a cache needs them",
            )
        })?;
        out.check_disjoint_from_list("positions", rotation.positions.unwrap_or_default())?;
        if x.is_same(&out) {
            // SAFETY: as above; input and output are one tensor.
            return Ok(rotation.rotary.rotate(unsafe { out.output()? }, positions)?);
        }
        out.check_disjoint(&x)?;
        // SAFETY: as above; the output is disjoint from the input (checked).
        let (x, out) = unsafe { (AnyTensorRef::from(x.any()?), out.output()?) };
        Ok(rotation.rotary.rotate_into(x, positions, out)?)
    })
}
