//! `out = O / l`, and the log-sum-exp.

use super::weights::PanelState;
use crate::element::Element;
use crate::simd::{MAX_LANES, Simd};
use std::f64::consts::LN_2;

/// Divides a panel by its sums and writes it as rows, rounded to their type; a query that saw nothing gets zeros.
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
        for (b, panel) in panel.chunks_exact(S::LANES * lanes).enumerate() {
            let mut block = [simd.zero(); MAX_LANES];
            for n in 0..S::LANES {
                // Adding +0 turns a -0, which leaves no trace in a sum that goes on, into +0.
                let out = simd.add(simd.load_slice(&panel[n * lanes + first..]), simd.zero());
                block[n] = simd.select(nothing, simd.zero(), simd.mul(out, inverse));
            }
            let block = simd.transpose(block);
            for (row, vector) in rows.iter_mut().zip(block) {
                let at = (b * S::LANES).min(row.len());
                let row = &mut row[at..];
                if row.len() >= S::LANES {
                    simd.store_elements(row, vector);
                } else {
                    simd.store_elements_part(row, vector);
                }
            }
        }
    }
}

/// `log sum exp` in natural units from a running maximum in units of log2 and its sum; -inf where nothing was seen.
pub(crate) fn log_sum_exp(max: f32, sum: f32) -> f32 {
    // In f64: the maximum may be large beside the logarithm of the sum, and this is done once a row.
    if sum == 0.0 { f32::NEG_INFINITY } else { ((max as f64 + (sum as f64).log2()) * LN_2) as f32 }
}
