//! Tensors whose element type is known at run time.

use super::strided::Strided;
use crate::element::{DType, Element, bf16, f16};

/// A tensor that is read, whatever its element type: so that the floors below need not be compiled once for each
/// combination of types.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnyTensor<'a> {
    F32(Strided<'a, f32, 4>),
    F16(Strided<'a, f16, 4>),
    Bf16(Strided<'a, bf16, 4>),
}

/// Evaluates an expression with a name bound to what an [`AnyTensor`] holds, whichever type that is.
macro_rules! with_elements {
    ($any:expr, $tensor:ident => $value:expr) => {
        match $any {
            $crate::tensor::any::AnyTensor::F32($tensor) => $value,
            $crate::tensor::any::AnyTensor::F16($tensor) => $value,
            $crate::tensor::any::AnyTensor::Bf16($tensor) => $value,
        }
    };
}
pub(crate) use with_elements;

impl<'a> AnyTensor<'a> {
    pub(crate) fn new<T: Element>(strided: Strided<'a, T, 4>) -> Self {
        // SAFETY: `DTYPE` names `T`, so each cast is to the type that the elements already have.
        unsafe {
            match T::DTYPE {
                DType::F32 => AnyTensor::F32(strided.cast()),
                DType::F16 => AnyTensor::F16(strided.cast()),
                DType::Bf16 => AnyTensor::Bf16(strided.cast()),
            }
        }
    }

    pub(crate) fn shape(&self) -> [usize; 4] {
        with_elements!(self, tensor => *tensor.shape())
    }

    pub(crate) fn broadcast(self, shape: [usize; 4]) -> Option<Self> {
        Some(match self {
            AnyTensor::F32(tensor) => AnyTensor::F32(tensor.broadcast(shape)?),
            AnyTensor::F16(tensor) => AnyTensor::F16(tensor.broadcast(shape)?),
            AnyTensor::Bf16(tensor) => AnyTensor::Bf16(tensor.broadcast(shape)?),
        })
    }

    /// One element as f32, exactly.
    ///
    /// # Panics
    /// If the index is outside the shape.
    pub(crate) fn at(&self, index: [usize; 4]) -> f32 {
        with_elements!(self, tensor => tensor.get(index).expect("inside the shape").to_f32())
    }
}
