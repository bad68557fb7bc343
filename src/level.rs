//! The names of the instruction sets.

#![forbid(unsafe_code)]

use std::fmt;

/// An instruction set that the kernels are compiled for.
///
/// The fastest one that the processor has is picked at run time; [`Attention::level`](crate::Attention::level) forces
/// another, in tests and benches. Levels agree within the error bound of `docs/numerics.md`, not bit for bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Level {
    /// Plain Rust that runs everywhere; the compiler vectorises it for the target's baseline.
    Portable,
    /// [`Level::Portable`] in vectors of four, as other architectures have them: for this crate's own tests.
    #[cfg(feature = "_four-lanes")]
    #[doc(hidden)]
    Portable4,
    /// x86-64 with AVX2, FMA and F16C: Intel Haswell (2013), AMD Zen (2017) and later.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL: Intel Skylake-SP (2017), AMD Zen 4 (2022) and later.
    Avx512,
    /// [`Level::Avx512`] with BF16, whose instruction forms two products of bf16: AMD Zen 4 (2022) and later, Intel Cooper Lake (2020) and
    /// Sapphire Rapids (2023). It makes a difference where both queries and keys are bf16. On Intel's processors that instruction takes the
    /// time of two multiply-adds, so there [`Level::best`] is [`Level::Avx512`].
    Avx512Bf16,
}

impl Level {
    /// Every level, whether this processor has it or not: of each architecture, from the plainest to the best.
    pub const ALL: &'static [Level] = &[
        Level::Portable,
        #[cfg(feature = "_four-lanes")]
        Level::Portable4,
        Level::Avx2,
        Level::Avx512,
        Level::Avx512Bf16,
    ];
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Level::Portable => "portable",
            #[cfg(feature = "_four-lanes")]
            Level::Portable4 => "portable4",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
        })
    }
}
