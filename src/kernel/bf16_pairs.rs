//! Scores of bf16 queries and keys from pairs of neighbours, as they lie in memory: nothing is widened, and two products
//! take the time of one multiply-add.
//!
//! The products are exact and every sum is rounded, as it is with multiply-adds. But the instruction takes denormal numbers
//! for 0, so it is used only where that doesn't matter: the factor is at most [`LARGEST_FACTOR`], and each element of the
//! query is 0 or between [`SMALLEST`] and [`LARGEST`]. (Nor is the factor below [`SMALLEST_FACTOR`]: sums come without it, and
//! would overflow where the score is an ordinary number.) Then a denormal key leaves out less than 2^32 * 2^-126 of a sum, and
//! a score of 2^20 elements is off by less than 2^-33. Other queries have their scores formed from elements, row by row.

use crate::element::{Bf16Pair, bf16};
use crate::simd::Isa;
use crate::tensor::group::GroupRows;
use crate::tensor::matrix::{Matrix, Row};

/// 2^40: what a score may be multiplied with.
const LARGEST_FACTOR: f32 = 1_099_511_627_776.0;

/// 2^-12: below the default scale of the longest head.
const SMALLEST_FACTOR: f32 = 1.0 / 4096.0;

/// The bits of 2^32, the largest element of a query.
const LARGEST: u16 = (127 + 32) << 7;

/// The bits of 2^-126, the smallest one that is no denormal number.
const SMALLEST: u16 = 1 << 7;

/// Whether scores of bf16 queries and keys, times `factor`, can be formed from pairs at a level.
pub(crate) fn usable(isa: Isa, factor: f32) -> bool {
    isa.has_pair_dots() && (SMALLEST_FACTOR..=LARGEST_FACTOR).contains(&factor.abs())
}

/// Pairs in a row of `elements`: behind an odd one's last element stands a zero.
pub(crate) fn pairs_in(elements: usize) -> usize {
    elements.div_ceil(2)
}

/// Whether pairs may stand for this query. (All of it is looked at, without a branch: that is done by vectors.)
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

/// The keys as pairs: in place, or their copy in `copy` if they don't lie so.
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

/// Copies a row, two elements into the bits of each f32, zeros behind its end.
fn copy_pairs(row: Row<'_, bf16>, to: &mut [f32]) {
    let mut elements = row.iter().map(|element| u32::from(element.to_bits()));
    for to in to {
        let (first, second) = (elements.next().unwrap_or(0), elements.next().unwrap_or(0));
        *to = f32::from_bits(first | second << 16);
    }
}

/// Copies rows as pairs, zeros behind each.
///
/// * `to`: `[rows][width]`
pub(crate) fn copy_pair_rows(rows: GroupRows<'_, bf16>, to: &mut [f32]) {
    for (n, to) in to.chunks_exact_mut((to.len() / rows.count()).max(1)).enumerate() {
        copy_pairs(rows.row(n), to);
    }
}

/// The queries for which pairs may not stand, one bit each.
#[inline(always)]
pub(crate) fn rows_outside_pair_range(rows: GroupRows<'_, bf16>) -> u32 {
    let mut outside = 0;
    for n in 0..rows.count() {
        outside |= u32::from(!in_pair_range(rows.row(n))) << n;
    }
    outside
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bounds themselves are within, their neighbours and what is no number are not.
    #[test]
    fn rows_that_fit() {
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

    /// Rows in place and rows copied hold the same pairs; the elements are found in both.
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
