//! A run of keys or values: rows at one stride, in one storage format. Kernels read keys and values only through runs.
//!
//! This is the only list of storage formats.

#![forbid(unsafe_code)]

use crate::element::{ByElement, bf16, f16};
use crate::tensor::any::AnyTensor;
use crate::tensor::matrix::Matrix;
use std::ops::Range;

/// Rows of keys or values at one stride.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Run<'a> {
    F32(Matrix<'a, f32>),
    F16(Matrix<'a, f16>),
    Bf16(Matrix<'a, bf16>),
}

/// Evaluates an expression with a name bound to the rows of a [`Run`], for each format.
macro_rules! with_run {
    ($run:expr, $rows:ident => $value:expr) => {
        match $run {
            $crate::kv::run::Run::F32($rows) => $value,
            $crate::kv::run::Run::F16($rows) => $value,
            $crate::kv::run::Run::Bf16($rows) => $value,
        }
    };
}
pub(crate) use with_run;

impl<'a> Run<'a> {
    /// All rows of head `h` of batch `b`.
    ///
    /// # Panics
    /// If there is no such batch or head.
    #[inline]
    pub(crate) fn new(tensor: &AnyTensor<'a>, b: usize, h: usize) -> Self {
        match tensor {
            ByElement::F32(tensor) => Run::F32(tensor.matrix(b, h)),
            ByElement::F16(tensor) => Run::F16(tensor.matrix(b, h)),
            ByElement::Bf16(tensor) => Run::Bf16(tensor.matrix(b, h)),
        }
    }

    /// Rows `rows.start` to `rows.end`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[inline]
    pub(crate) fn slice_rows(self, rows: Range<usize>) -> Self {
        match self {
            Run::F32(all) => Run::F32(all.slice_rows(rows)),
            Run::F16(all) => Run::F16(all.slice_rows(rows)),
            Run::Bf16(all) => Run::Bf16(all.slice_rows(rows)),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        with_run!(self, rows => rows.rows())
    }

    pub(crate) fn cols(&self) -> usize {
        with_run!(self, rows => rows.cols())
    }

    /// Bytes of an element.
    pub(crate) fn element_bytes(&self) -> usize {
        fn of<T>(_: &Matrix<'_, T>) -> usize {
            size_of::<T>()
        }
        with_run!(self, rows => of(rows))
    }

    /// Whether the elements of a row are contiguous.
    pub(crate) fn has_contiguous_rows(&self) -> bool {
        with_run!(self, rows => rows.has_contiguous_rows())
    }

    /// The rows, if a product can read them in place: f32 without gaps between elements.
    pub(crate) fn in_place(&self) -> Option<Matrix<'a, f32>> {
        match self {
            Run::F32(rows) if rows.has_contiguous_rows() => Some(*rows),
            _ => None,
        }
    }
}
