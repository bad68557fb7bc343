//! The element types of tensors: f32, f16 and bf16.

pub use half::{bf16, f16};
use std::fmt;

mod sealed {
    pub trait Sealed {}
}

/// An element type of queries, keys, values and outputs: [`f32`], [`struct@f16`] or [`bf16`].
///
/// The half types are storage: a value is widened exactly when it is read and rounded once, to nearest with ties to even,
/// when it is written. Scores, probabilities and sums are f32, always. The trait is sealed.
///
/// # Safety
/// [`DTYPE`](Element::DTYPE) names the type itself: unsafe code casts pointers by it.
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

/// The name of an [`Element`] type, as a value.
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

/// Two neighbouring bf16 of a row, what [`PairDots`](crate::simd::PairDots) multiplies at once; (0, 0) by default.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Bf16Pair {
    pub(crate) first: bf16,
    pub(crate) second: bf16,
}
