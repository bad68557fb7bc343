//! Rows of any element type, widened to f32.

use crate::element::Element;
use crate::kernel::convert::{AnyMatrix, with_matrix};
use crate::simd::{Isa, Kernel, Simd, kernel};
use crate::tensor::any::{AnyTensor, with_elements};
use crate::tensor::matrix::{Matrix, Row};

/// `to = factor * row`, of the same length. (A factor of 1 changes nothing.)
#[inline(always)]
pub(in crate::kernel) fn widen<S: Simd, T: Element>(simd: S, row: Row<'_, T>, factor: f32, to: &mut [f32]) {
    match row.as_slice() {
        Some(row) => {
            let factor = simd.splat(factor);
            let (mut from, mut whole) = (row.chunks_exact(S::LANES), to.chunks_exact_mut(S::LANES));
            for (from, to) in (&mut from).zip(&mut whole) {
                simd.store_slice(to, simd.mul(simd.load_elements(from), factor));
            }
            let rest = whole.into_remainder();
            if !rest.is_empty() {
                simd.store_part(rest, simd.mul(simd.load_elements_part(from.remainder(), 0.0), factor));
            }
        }
        None => {
            for (to, from) in to.iter_mut().zip(row.iter()) {
                *to = from.to_f32() * factor;
            }
        }
    }
}

/// Rows of a tensor that lie anywhere in it: row `n` at index `place(n)`, for `n < count`.
pub(crate) struct Gathered<'a, F> {
    pub(crate) tensor: &'a AnyTensor<'a>,
    pub(crate) count: usize,
    pub(crate) place: F,
}

impl<F> Gathered<'_, F> {
    /// Whether the elements of a row stand side by side.
    pub(in crate::kernel) fn has_contiguous_rows(&self) -> bool {
        with_elements!(self.tensor, tensor => tensor.has_contiguous_rows())
    }
}

/// Widens gathered rows: `to[n][e] = factor * rows[n][e]`, zeros behind the rows' elements and behind the last row.
///
/// * `to`: `[count or more][width]`
pub(crate) fn widen_gathered<F: Fn(usize) -> [usize; 3]>(
    isa: Isa,
    rows: Gathered<'_, F>,
    factor: f32,
    (to, width): (&mut [f32], usize),
) {
    isa.run(WidenGathered { rows, factor, to, width });
}

struct WidenGathered<'a, F> {
    rows: Gathered<'a, F>,
    factor: f32,
    to: &'a mut [f32],
    width: usize,
}

impl<F: Fn(usize) -> [usize; 3]> Kernel for WidenGathered<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Gathered { tensor, count, place } = self.rows;
        with_elements!(tensor, tensor => for (n, to) in self.to.chunks_exact_mut(self.width.max(1)).enumerate() {
            if n >= count {
                to.fill(0.0);
                continue;
            }
            let [i0, i1, r] = place(n);
            let row = tensor.matrix(i0, i1).row(r);
            let (to, behind) = to.split_at_mut(tensor.shape()[3]);
            behind.fill(0.0);
            widen(simd, row, self.factor, to);
        });
    }
}

kernel! {
    /// Widens rows: `to[r][e] = rows[r][e]`, without gaps.
    fn widen_rows<'a, S: Simd>(simd: S, rows: AnyMatrix<'a>, to: &'a mut [f32]) {
        with_matrix!(rows, matrix => {
            assert!(to.len() == matrix.rows() * matrix.cols());
            for (r, to) in to.chunks_exact_mut(matrix.cols().max(1)).enumerate() {
                widen(simd, matrix.row(r), 1.0, to);
            }
        });
    }
}

/// The rows themselves if a product can read them in place, or their copy in `wide`.
pub(crate) fn as_f32<'a>(isa: Isa, rows: AnyMatrix<'a>, wide: &'a mut [f32]) -> Matrix<'a, f32> {
    rows.in_place().unwrap_or_else(|| {
        let wide = &mut wide[..rows.rows() * rows.cols()];
        widen_rows(isa, rows, wide);
        Matrix::from_slice(wide, rows.rows(), rows.cols())
    })
}

/// The rows themselves, or their copy in `wide` if there are gaps between their elements.
pub(crate) fn without_gaps<'a>(isa: Isa, rows: AnyMatrix<'a>, wide: &'a mut [f32]) -> AnyMatrix<'a> {
    if rows.has_contiguous_rows() { rows } else { AnyMatrix::F32(as_f32(isa, rows, wide)) }
}
