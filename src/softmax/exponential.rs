//! The natural exponential of slices.
#![forbid(unsafe_code)]

use super::axis::same_len;
use super::buffers::Buffers;
use super::chosen_level::isa;
use crate::error::Error;
use crate::simd::exp::exp;
use crate::simd::kernel;

/// x = exp(x), element by element, at most 1 ulp from the correctly rounded value.
///
/// exp(0) is exactly 1, exp(-inf) is 0, exp(inf) is inf, and NaN stays NaN. Small results are denormal numbers, not 0. The
/// result never decreases as x grows.
///
/// ```
/// let mut x = [0.0, 1.0, -100.0];
/// flashtile::softmax::exp_in_place(&mut x);
/// assert_eq!(x, [1.0, 2.7182817, 3.8e-44]);
/// ```
pub fn exp_in_place(x: &mut [f32]) {
    exp_buffers(isa(), Buffers::InPlace(x));
}

/// out = exp(x), as [`exp_in_place`].
///
/// # Errors
/// [`Error::SliceLength`] if the slices differ in length.
pub fn exp_into(x: &[f32], out: &mut [f32]) -> Result<(), Error> {
    same_len(x.len(), out.len())?;
    exp_buffers(isa(), Buffers::Into { from: x, to: out });
    Ok(())
}

kernel! {
    fn exp_buffers<'a, S: Simd>(simd: S, buffers: Buffers<'a, f32>) {
        let mut buffers = buffers;
        let len = buffers.input().len();
        let whole = len - len % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            let y = exp(simd, simd.load_slice(&buffers.input()[at..]));
            simd.store_slice(&mut buffers.output()[at..], y);
        }
        let y = exp(simd, simd.load_part(&buffers.input()[whole..], 0.0));
        simd.store_part(&mut buffers.output()[whole..], y);
    }
}
