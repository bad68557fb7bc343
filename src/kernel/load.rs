//! Reading elements of any type as vectors of f32.

use crate::element::{Element, bf16, f16};
use crate::simd::{MAX_LANES, Simd};
use crate::strided::{Matrix, Strided};
use crate::tensor::AnyTensor;

/// An element type that a level can widen while it loads.
pub(crate) trait Load: Element {
    /// # Safety
    /// * `p` is valid for reads of `S::LANES` elements.
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::F32;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const f32) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { simd.load(p) }
    }
}
impl Load for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const f16) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f16(p) }
    }
}
impl Load for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const bf16) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16(p) }
    }
}

/// The elements of `row` from `at` on: as many as there are up to a vector, then zeros.
#[inline(always)]
pub(crate) fn load_from<S: Simd, T: Load>(simd: S, row: &[T], at: usize) -> S::F32 {
    let rest = &row[at..];
    if rest.len() >= S::LANES {
        // SAFETY: there are LANES elements left.
        unsafe { T::load(simd, rest.as_ptr()) }
    } else {
        let mut whole = [T::default(); MAX_LANES];
        whole[..rest.len()].copy_from_slice(rest);
        // SAFETY: MAX_LANES elements are LANES at least.
        unsafe { T::load(simd, whole.as_ptr()) }
    }
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
            $crate::kernel::load::AnyMatrix::F32($matrix) => $value,
            $crate::kernel::load::AnyMatrix::F16($matrix) => $value,
            $crate::kernel::load::AnyMatrix::Bf16($matrix) => $value,
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

    /// Elements `range` of row `r`, widened into `to`.
    pub(crate) fn read_row(&self, r: usize, range: std::ops::Range<usize>, to: &mut [f32]) {
        with_matrix!(self, matrix => for (to, from) in to.iter_mut().zip(matrix.row(r).slice(range).iter()) {
            *to = from.to_f32();
        });
    }

    pub(crate) fn rows(&self) -> usize {
        with_matrix!(self, matrix => matrix.rows())
    }

    pub(crate) fn cols(&self) -> usize {
        with_matrix!(self, matrix => matrix.cols())
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

/// An element type that a level can round to while it stores.
pub(crate) trait Store: Element {
    /// # Safety
    /// * `p` is valid for writes of `S::LANES` elements.
    unsafe fn store<S: Simd>(simd: S, p: *mut Self, x: S::F32);
}

impl Store for f32 {
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut f32, x: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store(p, x) }
    }
}
impl Store for f16 {
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut f16, x: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store_f16(p, x) }
    }
}
impl Store for bf16 {
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut bf16, x: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store_bf16(p, x) }
    }
}

/// Rounds `from` into `to`, which is as long.
#[inline(always)]
pub(crate) fn store_row<S: Simd, T: Store>(simd: S, to: &mut [T], from: &[f32]) {
    assert!(to.len() == from.len());
    for (to, from) in to.chunks_mut(S::LANES).zip(from.chunks(S::LANES)) {
        if to.len() == S::LANES {
            // SAFETY: `to` has LANES elements.
            unsafe { T::store(simd, to.as_mut_ptr(), simd.load_slice(from)) };
        } else {
            let mut whole = [T::default(); MAX_LANES];
            // SAFETY: MAX_LANES elements are LANES at least.
            unsafe { T::store(simd, whole.as_mut_ptr(), simd.load_part(from, 0.0)) };
            to.copy_from_slice(&whole[..to.len()]);
        }
    }
}
