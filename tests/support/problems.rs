//! Element types by their bits, every form at every level, and one call that gives output and log-sum-exps back.

use super::{Inputs, len};
use flashtile::{Attention, Element, Form, Level, TensorMut, Workspace, bf16, f16};

/// Both forms.
pub const FORMS: [Form; 2] = [Form::Decode, Form::Prefill];

/// Every form at every level of this processor.
pub fn forms_and_levels() -> impl Iterator<Item = (Form, Level)> {
    Level::available().flat_map(|level| FORMS.map(|form| (form, level)))
}

/// An element type with its special bit patterns.
pub trait Bits: Element + PartialEq {
    /// NaNs, quiet and signalling, of either sign; infinities; the largest numbers; the smallest; -0.
    const POISON: [Self; 11];
    /// The bits, with one NaN for all payloads.
    fn bits(self) -> u32 {
        let wide = self.to_f32();
        if wide.is_nan() { f32::NAN.to_bits() } else { wide.to_bits() }
    }
}

impl Bits for f32 {
    const POISON: [f32; 11] = [
        f32::NAN,
        f32::from_bits(0xffc0_0001),
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xff80_0001),
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::from_bits(1),
        f32::from_bits(0x8000_0001),
        -0.0,
    ];
}
impl Bits for f16 {
    const POISON: [f16; 11] = [
        f16::from_bits(0x7e00),
        f16::from_bits(0xfe01),
        f16::from_bits(0x7c01),
        f16::from_bits(0xfc01),
        f16::from_bits(0x7c00),
        f16::from_bits(0xfc00),
        f16::from_bits(0x7bff),
        f16::from_bits(0xfbff),
        f16::from_bits(1),
        f16::from_bits(0x8001),
        f16::from_bits(0x8000),
    ];
}
impl Bits for bf16 {
    const POISON: [bf16; 11] = [
        bf16::from_bits(0x7fc0),
        bf16::from_bits(0xffc1),
        bf16::from_bits(0x7f81),
        bf16::from_bits(0xff81),
        bf16::from_bits(0x7f80),
        bf16::from_bits(0xff80),
        bf16::from_bits(0x7f7f),
        bf16::from_bits(0xff7f),
        bf16::from_bits(1),
        bf16::from_bits(0x8001),
        bf16::from_bits(0x8000),
    ];
}

/// The bits of every element.
pub fn bits<T: Bits>(x: &[T]) -> Vec<u32> {
    x.iter().map(|x| x.bits()).collect()
}

impl<T: Bits> Inputs<T> {
    /// Output and log-sum-exps.
    pub fn compute(&self, attention: &Attention<'_>) -> (Vec<T>, Vec<f32>) {
        self.compute_with(attention, &mut Workspace::new())
    }

    pub fn compute_with(&self, attention: &Attention<'_>, workspace: &mut Workspace) -> (Vec<T>, Vec<f32>) {
        // The previous contents must not matter.
        let (mut out, mut lse) = (vec![T::POISON[2]; len(self.dims.out())], vec![f32::NAN; len(self.dims.lse())]);
        let out_tensor = TensorMut::from_slice(&mut out, self.dims.out()).unwrap();
        let lse_tensor = TensorMut::from_slice(&mut lse, self.dims.lse()).unwrap();
        attention.compute(self.q(), (self.k(), self.v()), out_tensor, lse_tensor, workspace).unwrap();
        (out, lse)
    }

    /// The bits of output and log-sum-exps.
    pub fn bits(&self, attention: &Attention<'_>) -> (Vec<u32>, Vec<u32>) {
        let (out, lse) = self.compute(attention);
        (bits(&out), bits(&lse))
    }
}
