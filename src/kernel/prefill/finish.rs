//! `out = O / l`, and the log-sum-exp.

use crate::element::Element;
use crate::kernel::state::PanelState;
use crate::simd::{MAX_LANES, Simd};
use std::f64::consts::LN_2;

/// Divides a panel by its sums and writes it as rows, rounded to their type. A query that saw no key gets zeros.
///
/// * `panel`: `[value_dim rounded up][lanes]`
/// * `rows`: one for each lane, of `value_dim`; lanes without a row are left out
#[inline(always)]
pub(crate) fn finish_rows<S: Simd, T: Element>(
    simd: S,
    (panel, lanes): (&[f32], usize),
    state: &PanelState,
    rows: &mut [&mut [T]],
) {
    for (rows, first) in rows.chunks_mut(S::LANES).zip((0..lanes).step_by(S::LANES)) {
        let sum = simd.load_slice(&state.sum[first..]);
        let nothing = simd.eq(sum, simd.zero());
        let inverse = simd.div(simd.splat(1.0), sum);
        let reach = rows.iter().map(|row| row.len()).min().unwrap_or(0);
        for (b, panel) in panel.chunks_exact(S::LANES * lanes).enumerate() {
            let mut block = [simd.zero(); MAX_LANES];
            for n in 0..S::LANES {
                // Adding +0 turns a -0, which leaves no trace in a sum that goes on, into +0.
                let out = simd.add(simd.load_slice(&panel[n * lanes + first..]), simd.zero());
                block[n] = simd.select(nothing, simd.zero(), simd.mul(out, inverse));
            }
            // SAFETY: `reach` is the shortest row's length.
            unsafe { write_block(simd, simd.transpose(block), (&mut *rows, reach), b * S::LANES) };
        }
    }
}

/// Writes a vector to each of at most `LANES` rows, from `at` on, up to the row's end.
///
/// # Safety
/// * no row is shorter than `reach`
#[inline(always)]
unsafe fn write_block<S: Simd, T: Element>(
    simd: S,
    block: [S::F32; MAX_LANES],
    (rows, reach): (&mut [&mut [T]], usize),
    at: usize,
) {
    if rows.len() == S::LANES && at + S::LANES <= reach {
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

/// `log sum exp` in natural units from a running maximum in units of log2 and its sum; -inf where no key was seen.
pub(crate) fn log_sum_exp(max: f32, sum: f32) -> f32 {
    // In f64: the maximum may be large beside the logarithm of the sum, and this is done once a row.
    if sum == 0.0 { f32::NEG_INFINITY } else { ((max as f64 + (sum as f64).log2()) * LN_2) as f32 }
}
