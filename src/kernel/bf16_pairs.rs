//! Scores of bf16 queries and keys from pairs of neighbouring elements. Pairs are read in place and not widened, and two
//! products take the time of one multiply-add.
//!
//! The products are exact and every sum is rounded, as with multiply-adds. But the instruction flushes denormals to zero, so
//! pairs are used only in a range where that doesn't matter:
//!
//! * The factor is at most [`LARGEST_FACTOR`], and each element of the query is 0 or of a magnitude from [`SMALLEST`] to
//!   [`LARGEST`]. Then a denormal element of a key leaves out less than 2^32 * 2^-126 of a sum, and a score of 2^20 elements is
//!   off by less than 2^-33.
//! * The factor is at least [`SMALLEST_FACTOR`]. It is applied after the sum, which would otherwise overflow where the score
//!   does not.
//!
//! Queries outside the range have their scores formed from f32, in the decode form's order of sums. The fallback is per row, so a
//! row's bits never depend on its neighbours.

use super::shape::RowSet;
use crate::element::{Bf16Pair, bf16};
use crate::kv::rows::KeyRows;
use crate::kv::run::Run;
use crate::simd::Isa;
use crate::tensor::group::GroupRows;
use crate::tensor::matrix::{Matrix, Row};
use std::ops::Range;

/// 2^40: the largest factor of a score.
const LARGEST_FACTOR: f32 = 1_099_511_627_776.0;

/// 2^-12: the smallest factor of a score, below the default scale of the longest head.
const SMALLEST_FACTOR: f32 = 1.0 / 4096.0;

/// The bits of 2^32, the largest element of a query.
const LARGEST: u16 = (127 + 32) << 7;

/// The bits of 2^-126, the smallest element of a query that is neither 0 nor denormal.
const SMALLEST: u16 = 1 << 7;

/// Whether scores of bf16 queries and keys, times `factor`, can be formed from pairs at a level.
pub(crate) fn usable(isa: Isa, factor: f32) -> bool {
    isa.has_pair_dots() && (SMALLEST_FACTOR..=LARGEST_FACTOR).contains(&factor.abs())
}

/// Pairs in a row of `elements` elements. If that is odd, a zero completes the last pair.
pub(crate) fn pairs_in(elements: usize) -> usize {
    elements.div_ceil(2)
}

/// Whether every element of a query is in the range of pairs. There is no early exit, so that the compiler vectorises the test.
#[inline(always)]
fn in_pair_range(query: Row<'_, bf16>) -> bool {
    let mut all = true;
    match query.as_slice() {
        Some(query) => query.iter().for_each(|&element| all &= element_in_pair_range(element)),
        None => query.iter().for_each(|element| all &= element_in_pair_range(element)),
    }
    all
}

#[inline(always)]
fn element_in_pair_range(element: bf16) -> bool {
    let magnitude = element.to_bits() & 0x7fff;
    magnitude == 0 || (SMALLEST..=LARGEST).contains(&magnitude)
}

/// The keys as pairs: in place if they can be, or copied to `copy`.
///
/// * `copy`: `[keys][pairs]`
pub(crate) fn key_pairs<'a>(keys: Matrix<'a, bf16>, copy: &'a mut [f32]) -> Matrix<'a, Bf16Pair> {
    keys.pairs().unwrap_or_else(|| {
        let pairs = pairs_in(keys.cols());
        let copy = &mut copy[..keys.rows() * pairs];
        for (r, to) in copy.chunks_exact_mut(pairs.max(1)).enumerate() {
            copy_pairs(keys.row(r), to);
        }
        Matrix::from_carried(copy, keys.rows(), pairs)
    })
}

/// The keys `range` as pairs, copied to `copy`: for keys in several runs.
pub(crate) fn copied_key_pairs<'a>(
    keys: KeyRows<'_>,
    range: Range<usize>,
    copy: &'a mut [f32],
) -> Matrix<'a, Bf16Pair> {
    let (count, pairs) = (range.len(), pairs_in(keys.cols()));
    let copy = &mut copy[..count * pairs];
    let mut rest = copy.chunks_exact_mut(pairs.max(1));
    for run in keys.runs(range) {
        let Run::Bf16(run) = run else { unreachable!("pairs of keys that are not bf16") };
        (0..run.rows()).zip(&mut rest).for_each(|(r, to)| copy_pairs(run.row(r), to));
    }
    Matrix::from_carried(copy, count, pairs)
}

/// Copies a row, two elements into the bits of each f32, with zeros after its end.
fn copy_pairs(row: Row<'_, bf16>, to: &mut [f32]) {
    if let Some(row) = row.as_slice() {
        // The compiler makes vectors of this loop.
        let (pairs, last) = row.as_chunks::<2>();
        let (whole, rest) = to.split_at_mut(pairs.len());
        for (to, [first, second]) in whole.iter_mut().zip(pairs) {
            *to = f32::from_bits(u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16);
        }
        rest.fill(0.0);
        if let [last] = last {
            rest[0] = f32::from_bits(last.to_bits().into());
        }
        return;
    }
    let mut elements = row.iter().map(|element| u32::from(element.to_bits()));
    for to in to {
        let (first, second) = (elements.next().unwrap_or(0), elements.next().unwrap_or(0));
        *to = f32::from_bits(first | second << 16);
    }
}

/// Copies rows as pairs, with zeros after each row.
///
/// * `to`: `[rows][width]`
pub(crate) fn copy_pair_rows(rows: GroupRows<'_, bf16>, to: &mut [f32]) {
    for (n, to) in to.chunks_exact_mut((to.len() / rows.count()).max(1)).enumerate() {
        copy_pairs(rows.row(n), to);
    }
}

/// The rows with an element outside the range of pairs.
#[inline(always)]
pub(crate) fn rows_outside_pair_range(rows: GroupRows<'_, bf16>) -> RowSet {
    let mut outside = 0;
    for n in 0..rows.count() {
        outside |= RowSet::from(!in_pair_range(rows.row(n))) << n;
    }
    outside
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bounds are in the range; their outer neighbours, infinity and NaN are not.
    #[test]
    fn the_range_of_pairs() {
        let (zero, two_to_32) = (bf16::ZERO, bf16::from_f32(4_294_967_296.0));
        let inside = [zero, -zero, bf16::ONE, bf16::MIN_POSITIVE, -bf16::MIN_POSITIVE, two_to_32, -two_to_32];
        let in_pair_range = |row: &[bf16]| in_pair_range(Matrix::from_slice(row, 1, row.len()).row(0));
        assert!(in_pair_range(&inside));
        let denormal = bf16::from_bits(SMALLEST - 1);
        let above = bf16::from_bits(LARGEST + 1);
        for outside in [denormal, -denormal, bf16::from_bits(1), above, -above, bf16::INFINITY, bf16::NAN] {
            let mut row = inside.to_vec();
            row.push(outside);
            assert!(!in_pair_range(&row), "{outside}");
        }
    }

    /// Rows in place and copied rows hold the same pairs and elements.
    #[test]
    fn copies_are_like_rows_in_place() {
        let data: Vec<bf16> = (0..60).map(|n| bf16::from_f32(n as f32)).collect();
        for (cols, stride, step) in [(6, 6, 1), (6, 7, 1), (5, 6, 1), (5, 9, 2), (0, 3, 1), (1, 1, 4)] {
            let strided =
                crate::tensor::strided::Strided::new(&data, 0, [1, 1, 4, cols], [0, 0, stride, step]).unwrap();
            let keys = strided.matrix(0, 0);
            let mut copy = vec![f32::NAN; 4 * pairs_in(cols)];
            let pairs = key_pairs(keys, &mut copy);
            assert_eq!((pairs.rows(), pairs.cols()), (4, pairs_in(cols)));
            let elements = pairs.elements(cols);
            for r in 0..4 {
                let mut expected: Vec<bf16> = keys.row(r).iter().collect();
                assert_eq!(elements.row(r).iter().collect::<Vec<_>>(), expected);
                expected.resize(2 * pairs_in(cols), bf16::ZERO);
                let halves: Vec<_> = pairs.row(r).iter().flat_map(|pair| [pair.first, pair.second]).collect();
                assert_eq!(halves, expected, "{cols} columns, {stride} and {step} apart");
            }
        }
    }
}
