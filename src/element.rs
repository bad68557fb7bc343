//! The element types of tensors: f32, f16 and bf16.

pub use half::{bf16, f16};
use std::fmt;

mod sealed {
    pub trait Sealed {}
}

/// An element type of queries, keys, values and outputs: [`f32`], [`struct@f16`] or [`bf16`].
///
/// The half types are storage formats. An element is widened exactly when it is read, and rounded once, to nearest with ties to
/// even, when it is written. Scores, probabilities and sums are always f32. The trait is sealed.
///
/// # Safety
/// * [`DTYPE`](Element::DTYPE) names the type itself, because unsafe code casts pointers by it
pub unsafe trait Element:
    Copy + Default + PartialEq + Send + Sync + fmt::Debug + sealed::Sealed + 'static
{
    /// The type as a value.
    const DTYPE: DType;
    /// The element as f32, exactly.
    fn to_f32(self) -> f32;
    /// The element nearest to `x`, ties to even.
    fn from_f32(x: f32) -> Self;
}

/// The name of an [`Element`] type at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        })
    }
}

/// A value for one of the three element types: f32, f16 or bf16.
///
/// Element types that are known only at run time are matched by two macros: [`with_elements`] evaluates an expression for the
/// actual type, [`map_elements`] also wraps its value again. A new element type is a new variant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ByElement<A, B, C> {
    F32(A),
    F16(B),
    Bf16(C),
}

/// Evaluates an expression with a name bound to the value in a [`ByElement`]: `with_elements!(any, tensor => tensor.len())`.
macro_rules! with_elements {
    ($any:expr, $inner:pat => $value:expr) => {
        match $any {
            $crate::element::ByElement::F32($inner) => $value,
            $crate::element::ByElement::F16($inner) => $value,
            $crate::element::ByElement::Bf16($inner) => $value,
        }
    };
}
pub(crate) use with_elements;

/// As [`with_elements`], with the value wrapped for the same element type: a [`ByElement`] again.
macro_rules! map_elements {
    ($any:expr, $inner:pat => $value:expr) => {
        match $any {
            $crate::element::ByElement::F32($inner) => $crate::element::ByElement::F32($value),
            $crate::element::ByElement::F16($inner) => $crate::element::ByElement::F16($value),
            $crate::element::ByElement::Bf16($inner) => $crate::element::ByElement::Bf16($value),
        }
    };
}
pub(crate) use map_elements;

impl<A, B, C> ByElement<A, B, C> {
    /// The element type that it is for.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            ByElement::F32(_) => DType::F32,
            ByElement::F16(_) => DType::F16,
            ByElement::Bf16(_) => DType::Bf16,
        }
    }
}

macro_rules! element {
    ($t:ty, $dtype:expr, $to:expr, $from:expr) => {
        impl sealed::Sealed for $t {}
        // SAFETY: each of the three calls below pairs a type with its own name.
        unsafe impl Element for $t {
            const DTYPE: DType = $dtype;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to(self)
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
        }
    };
}

element!(f32, DType::F32, |x| x, |x| x);
element!(f16, DType::F16, f16::to_f32, f16::from_f32);
element!(bf16, DType::Bf16, bf16::to_f32, bf16::from_f32);

/// Two neighbouring bf16 of a row, the operand of [`PairDots`](crate::simd::PairDots); (0, 0) by default.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Bf16Pair {
    pub(crate) first: bf16,
    pub(crate) second: bf16,
}
