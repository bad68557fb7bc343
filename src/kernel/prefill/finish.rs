//! `out = O / l`: divides a panel by its sums and writes it as rows.

use crate::element::{Element, with_elements};
use crate::kernel::shape::MAX_PANEL_LANES;
use crate::kernel::state::PanelState;
use crate::simd::{Isa, Kernel, MAX_LANES, Simd, kernel};
use crate::tensor::group::{AnyGroupRowsMut, GroupRowsMut};
use std::ops::Range;

/// Divides a panel by its sums and writes it as rows of the output, rounded to their type. A query that sees no key gets zeros.
///
/// * `panel`: `[value_dim rounded up][lanes]`, with a lane for each row, and the number of lanes
/// * `row_buffer`: `lanes * value_dim` elements or more, for output rows with gaps between their elements
///
/// # Panics
/// If `rows` are not within the output, or there are more rows than lanes.
pub(crate) fn write_panel(
    isa: Isa,
    to: &mut AnyGroupRowsMut<'_>,
    rows: Range<usize>,
    panel: (&[f32], usize),
    state: &PanelState,
    row_buffer: &mut [f32],
) {
    assert!(rows.len() <= panel.1);
    isa.run(WritePanel { to, rows, panel, state, row_buffer });
}

struct WritePanel<'a, 'r> {
    to: &'a mut AnyGroupRowsMut<'r>,
    rows: Range<usize>,
    panel: (&'a [f32], usize),
    state: &'a PanelState,
    row_buffer: &'a mut [f32],
}

impl Kernel for WritePanel<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let WritePanel { to, rows, panel, state, row_buffer } = self;
        with_elements!(to, to => write_rows(simd, to, rows, panel, state, row_buffer));
    }
}

#[inline(always)]
fn write_rows<S: Simd, T: Element>(
    simd: S,
    to: &mut GroupRowsMut<'_, T>,
    rows: Range<usize>,
    panel: (&[f32], usize),
    state: &PanelState,
    row_buffer: &mut [f32],
) {
    let count = rows.len();
    if to.has_contiguous_rows() {
        let mut slices = <[&mut [T]; MAX_PANEL_LANES]>::default();
        for (slice, row) in slices.iter_mut().zip(to.rows_mut(rows)) {
            *slice = row.into_mut_slice().expect("rows without gaps");
        }
        return finish_rows(simd, panel, state, &mut slices[..count]);
    }
    let width = to.cols();
    let mut slices = <[&mut [f32]; MAX_PANEL_LANES]>::default();
    for (slice, buffer) in slices.iter_mut().zip(row_buffer.chunks_exact_mut(width)) {
        *slice = buffer;
    }
    finish_rows::<S, f32>(simd, panel, state, &mut slices[..count]);
    for (mut row, buffer) in to.rows_mut(rows).zip(row_buffer.chunks_exact(width)) {
        row.fill_from(buffer.iter().map(|&value| T::from_f32(value)));
    }
}

kernel! {
    /// As [`write_panel`], for a panel by rows: `[rows][value_dim]`, whole vectors. Leaves it divided.
    pub(crate) fn write_panel_rows<'a, 'r, S: Simd>(
        simd: S,
        to: &'a mut AnyGroupRowsMut<'r>,
        rows: Range<usize>,
        panel: &'a mut [f32],
        state: &'a PanelState,
    ) {
        with_elements!(to, to => divide_rows(simd, to, rows, panel, state));
    }
}

#[inline(always)]
pub(super) fn divide_rows<S: Simd, T: Element>(
    simd: S,
    to: &mut GroupRowsMut<'_, T>,
    rows: Range<usize>,
    panel: &mut [f32],
    state: &PanelState,
) {
    let mut factors = [0.0; MAX_PANEL_LANES];
    for (factors, sums) in factors.chunks_exact_mut(S::LANES).zip(state.sum.chunks_exact(S::LANES)) {
        simd.store_slice(factors, simd.div(simd.splat(1.0), simd.load_slice(sums)));
    }
    let width = to.cols();
    for (lane, n) in rows.enumerate() {
        let row = to.row_mut(n);
        let sums = &mut panel[lane * width..][..width];
        let factor = match state.sum[lane] {
            0.0 => None, // the query sees no key, and its sums were not written
            _ => Some(simd.splat(factors[lane])),
        };
        match row.into_mut_slice() {
            Ok(row) => {
                // Not `zip`, which the compiler leaves out of line.
                let mut sums = sums.chunks_exact(S::LANES);
                for to in row.chunks_exact_mut(S::LANES) {
                    let Some(sums) = sums.next() else { break };
                    simd.store_elements(to, divided(simd, simd.load_slice(sums), factor));
                }
            }
            Err(mut row) => {
                for sums in sums.chunks_exact_mut(S::LANES) {
                    simd.store_slice(sums, divided(simd, simd.load_slice(sums), factor));
                }
                row.fill_from(sums.iter().map(|&value| T::from_f32(value)));
            }
        }
    }
}

/// Sums times the inverse of the row's sum, or zeros without one. Adding +0 turns -0 into +0, as in `finish_rows`.
#[inline(always)]
fn divided<S: Simd>(simd: S, sums: S::F32, inverse: Option<S::F32>) -> S::F32 {
    match inverse {
        Some(inverse) => simd.mul(simd.add(sums, simd.zero()), inverse),
        None => simd.zero(),
    }
}

/// As [`write_rows`], for rows without gaps.
///
/// * `rows`: one for each lane, of `value_dim` elements; lanes without a row are not written
#[inline(always)]
fn finish_rows<S: Simd, T: Element>(
    simd: S,
    (panel, lanes): (&[f32], usize),
    state: &PanelState,
    rows: &mut [&mut [T]],
) {
    for (rows, first) in rows.chunks_mut(S::LANES).zip((0..lanes).step_by(S::LANES)) {
        let sum = simd.load_slice(&state.sum[first..]);
        let nothing = simd.eq(sum, simd.zero());
        let inverse = simd.div(simd.splat(1.0), sum);
        let shortest = rows.iter().map(|row| row.len()).min().unwrap_or(0);
        for (b, panel) in panel.chunks_exact(S::LANES * lanes).enumerate() {
            let mut block = [simd.zero(); MAX_LANES];
            for n in 0..S::LANES {
                // Adding +0 turns -0 into +0, as any later addition would, so that the sign of a zero does not depend on how
                // many additions follow.
                let out = simd.add(simd.load_slice(&panel[n * lanes + first..]), simd.zero());
                block[n] = simd.select(nothing, simd.zero(), simd.mul(out, inverse));
            }
            // SAFETY: no row is shorter than `shortest`.
            unsafe { write_block(simd, simd.transpose(block), (&mut *rows, shortest), b * S::LANES) };
        }
    }
}

/// Writes a vector to each of at most `LANES` rows, from `at` on, up to the row's end.
///
/// # Safety
/// * no row is shorter than `shortest`
#[inline(always)]
unsafe fn write_block<S: Simd, T: Element>(
    simd: S,
    block: [S::F32; MAX_LANES],
    (rows, shortest): (&mut [&mut [T]], usize),
    at: usize,
) {
    if rows.len() == S::LANES && at + S::LANES <= shortest {
        for n in 0..S::LANES {
            let row = &mut rows[n];
            // SAFETY: LANES elements from `at` on lie inside the row: the caller's promise.
            unsafe { simd.store_as(row.as_mut_ptr().wrapping_add(at), block[n]) };
        }
        return;
    }
    for (row, vector) in rows.iter_mut().zip(block) {
        let at = at.min(row.len());
        let row = &mut row[at..];
        if row.len() >= S::LANES {
            simd.store_elements(row, vector);
        } else {
            simd.store_elements_part(row, vector);
        }
    }
}
