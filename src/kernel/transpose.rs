//! Rows into lanes and back.

use crate::simd::Simd;

/// Writes `to[c][r] = from[r][c]` for whole vectors: `rows` and `cols` are multiples of `LANES`.
///
/// * `from`: `[rows][from_stride]`, `to`: `[cols][to_stride]`
#[inline(always)]
pub(super) fn transpose<S: Simd>(
    simd: S,
    (rows, cols): (usize, usize),
    (from, from_stride): (&[f32], usize),
    (to, to_stride): (&mut [f32], usize),
) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(rows.is_multiple_of(S::LANES) && cols.is_multiple_of(S::LANES) && cols <= from_stride && rows <= to_stride);
    assert!((rows - 1) * from_stride + cols <= from.len() && (cols - 1) * to_stride + rows <= to.len());
    for r in (0..rows).step_by(S::LANES) {
        for c in (0..cols).step_by(S::LANES) {
            let from = from.as_ptr().wrapping_add(r * from_stride + c);
            let to = to.as_mut_ptr().wrapping_add(c * to_stride + r);
            // SAFETY: the assertions: LANES rows and columns from (r, c) on lie inside both slices.
            unsafe { simd.transpose(from, from_stride as isize, to, to_stride as isize) };
        }
    }
}
