//! `out = O / l`, and the log-sum-exp.

use super::pack::from_lanes;
use super::weights::PanelState;
use crate::simd::{Isa, Kernel, Simd};
use std::f64::consts::LN_2;

/// Divides a panel by its sums and turns it into rows; a query that saw nothing gets zeros.
///
/// * `panel`: `[value_dim rounded up][lanes]`; is overwritten
/// * `rows`: `[lanes][value_dim rounded up]`, written
pub(crate) fn finish(isa: Isa, panel: &mut [f32], lanes: usize, state: &PanelState, rows: &mut [f32]) {
    isa.run(Divide { panel, lanes, state });
    from_lanes(isa, panel, lanes, rows);
}

struct Divide<'a> {
    panel: &'a mut [f32],
    lanes: usize,
    state: &'a PanelState,
}

impl Kernel for Divide<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for at in (0..self.lanes).step_by(S::LANES) {
            let sum = simd.load_slice(&self.state.sum[at..]);
            let nothing = simd.eq(sum, simd.zero());
            let inverse = simd.div(simd.splat(1.0), sum);
            for out in self.panel.chunks_exact_mut(self.lanes) {
                // Adding +0 turns a -0, which leaves no trace in a sum that goes on, into +0.
                let out = &mut out[at..];
                let value = simd.mul(simd.add(simd.load_slice(out), simd.zero()), inverse);
                simd.store_slice(out, simd.select(nothing, simd.zero(), value));
            }
        }
    }
}

/// `log sum exp` in natural units from a running maximum in units of log2 and its sum; -inf where nothing was seen.
pub(crate) fn log_sum_exp(max: f32, sum: f32) -> f32 {
    // In f64: the maximum may be large beside the logarithm of the sum, and this is done once a row.
    if sum == 0.0 { f32::NEG_INFINITY } else { ((max as f64 + (sum as f64).log2()) * LN_2) as f32 }
}
