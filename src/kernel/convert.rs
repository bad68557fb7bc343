//! Reading elements of any type as vectors of f32, and writing them back.

use crate::element::{Element, bf16, f16};
use crate::simd::Simd;
use crate::tensor::any::AnyTensor;
use crate::tensor::matrix::Matrix;
use crate::tensor::strided::Strided;

/// The elements of `row` from `at` on, at most a vector of them, then zeros.
#[inline(always)]
pub(crate) fn load_from<S: Simd, T: Element>(simd: S, row: &[T], at: usize) -> S::F32 {
    let rest = &row[at..];
    if rest.len() >= S::LANES { simd.load_elements(rest) } else { simd.load_elements_part(rest, 0.0) }
}

/// Two axes of an [`AnyTensor`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnyMatrix<'a> {
    F32(Matrix<'a, f32>),
    F16(Matrix<'a, f16>),
    Bf16(Matrix<'a, bf16>),
}

/// Evaluates an expression with a name bound to what an [`AnyMatrix`] holds, whichever type that is.
macro_rules! with_matrix {
    ($any:expr, $matrix:ident => $value:expr) => {
        match $any {
            $crate::kernel::convert::AnyMatrix::F32($matrix) => $value,
            $crate::kernel::convert::AnyMatrix::F16($matrix) => $value,
            $crate::kernel::convert::AnyMatrix::Bf16($matrix) => $value,
        }
    };
}
pub(crate) use with_matrix;

impl<'a> AnyMatrix<'a> {
    /// The last two axes of `tensor` at `[i0, i1]`.
    pub(crate) fn new(tensor: &AnyTensor<'a>, i0: usize, i1: usize) -> Self {
        match tensor {
            AnyTensor::F32(tensor) => AnyMatrix::F32(Strided::matrix(tensor, i0, i1)),
            AnyTensor::F16(tensor) => AnyMatrix::F16(Strided::matrix(tensor, i0, i1)),
            AnyTensor::Bf16(tensor) => AnyMatrix::Bf16(Strided::matrix(tensor, i0, i1)),
        }
    }

    pub(crate) fn slice_rows(self, range: std::ops::Range<usize>) -> Self {
        match self {
            AnyMatrix::F32(matrix) => AnyMatrix::F32(matrix.slice_rows(range)),
            AnyMatrix::F16(matrix) => AnyMatrix::F16(matrix.slice_rows(range)),
            AnyMatrix::Bf16(matrix) => AnyMatrix::Bf16(matrix.slice_rows(range)),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        with_matrix!(self, matrix => matrix.rows())
    }

    pub(crate) fn cols(&self) -> usize {
        with_matrix!(self, matrix => matrix.cols())
    }

    /// Bytes of an element.
    pub(crate) fn element_bytes(&self) -> usize {
        fn of<T>(_: &Matrix<'_, T>) -> usize {
            size_of::<T>()
        }
        with_matrix!(self, matrix => of(matrix))
    }

    pub(crate) fn has_contiguous_rows(&self) -> bool {
        with_matrix!(self, matrix => matrix.has_contiguous_rows())
    }

    /// The matrix itself if a product can read it in place: f32, rows without gaps between elements.
    pub(crate) fn in_place(&self) -> Option<Matrix<'a, f32>> {
        match self {
            AnyMatrix::F32(matrix) if matrix.has_contiguous_rows() => Some(*matrix),
            _ => None,
        }
    }
}

/// Rounds `from` into `to`, which has the same length.
#[inline(always)]
pub(crate) fn store_row<S: Simd, T: Element>(simd: S, to: &mut [T], from: &[f32]) {
    assert!(to.len() == from.len());
    for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks(S::LANES)) {
        if to.len() == S::LANES {
            simd.store_elements(to, simd.load_slice(from));
        } else {
            simd.store_elements_part(to, simd.load_part(from, 0.0));
        }
    }
}
