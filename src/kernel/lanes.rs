//! Rows of memory into the lanes of a panel and back, a square block of elements at a time, turned in registers.

use super::PANEL_LANES;
use super::pack::{Gathered, widen_gathered};
use crate::element::Element;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd};
use crate::tensor::with_elements;

/// Brings rows into lanes: `to[e][lane] = factor * rows[lane][e]`, zeros behind the rows' elements. Lanes without a row hold
/// anything finite or not: nobody looks at them.
///
/// * `to`: `[width][lanes]`, where `width` is the rows' length rounded up
/// * `stage`: as much again, for rows with gaps between their elements
pub(crate) fn gather_into_lanes<F: Fn(usize) -> [usize; 3]>(
    isa: Isa,
    rows: Gathered<'_, F>,
    factor: f32,
    (to, lanes): (&mut [f32], usize),
    stage: &mut [f32],
) {
    if rows.has_contiguous_rows() {
        isa.run(GatherIntoLanes { rows, factor, to, lanes });
    } else {
        let stage = &mut stage[..to.len()];
        widen_gathered(isa, rows, factor, (stage, to.len() / lanes));
        into_lanes(isa, stage, lanes, to);
    }
}

struct GatherIntoLanes<'a, F> {
    rows: Gathered<'a, F>,
    factor: f32,
    to: &'a mut [f32],
    lanes: usize,
}

impl<F: Fn(usize) -> [usize; 3]> Kernel for GatherIntoLanes<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Gathered { tensor, count, place } = self.rows;
        with_elements!(tensor, tensor => {
            // Lanes without a row repeat the last one.
            let mut rows: [&[_]; PANEL_LANES] = [&[]; PANEL_LANES];
            for (n, row) in rows.iter_mut().enumerate() {
                let [i0, i1, r] = place(n.min(count - 1));
                *row = tensor.matrix(i0, i1).row(r).as_slice().expect("rows without gaps");
            }
            turn_rows(simd, &rows, self.factor, (self.to, self.lanes));
        });
    }
}

/// `to[c][lane] = from[lane][c]`; both hold `lanes` times a multiple of [`MAX_LANES`].
pub(crate) fn into_lanes(isa: Isa, from: &[f32], lanes: usize, to: &mut [f32]) {
    isa.run(IntoLanes { from, lanes, to });
}

struct IntoLanes<'a> {
    from: &'a [f32],
    lanes: usize,
    to: &'a mut [f32],
}

impl Kernel for IntoLanes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.from.len() / self.lanes;
        let mut rows: [&[f32]; PANEL_LANES] = [&[]; PANEL_LANES];
        for (n, row) in rows.iter_mut().enumerate() {
            let n = n.min(self.lanes - 1);
            *row = &self.from[n * len..(n + 1) * len];
        }
        turn_rows(simd, &rows, 1.0, (self.to, self.lanes));
    }
}

/// `to[e][lane] = factor * rows[lane][e]`, zeros behind each row's elements. All rows are of one length.
#[inline(always)]
fn turn_rows<S: Simd, T: Element>(simd: S, rows: &[&[T]; PANEL_LANES], factor: f32, (to, lanes): (&mut [f32], usize)) {
    let len = rows[0].len();
    assert!(lanes <= PANEL_LANES && rows.iter().all(|row| row.len() == len));
    let factor = simd.splat(factor);
    for (b, to) in to.chunks_exact_mut(S::LANES * lanes).enumerate() {
        let at = b * S::LANES;
        for first in (0..lanes).step_by(S::LANES) {
            let mut block = [simd.zero(); MAX_LANES];
            if at + S::LANES <= len {
                for n in 0..S::LANES {
                    // SAFETY: a vector from `at` on lies inside the row, which is as long as the others.
                    let vector = unsafe { simd.load_as(rows[first + n].as_ptr().wrapping_add(at)) };
                    block[n] = simd.mul(vector, factor);
                }
            } else {
                for n in 0..S::LANES {
                    block[n] = simd.mul(simd.load_elements_part(&rows[first + n][at..], 0.0), factor);
                }
            }
            let block = simd.transpose(block);
            for n in 0..S::LANES {
                simd.store_slice(&mut to[n * lanes + first..], block[n]);
            }
        }
    }
}
