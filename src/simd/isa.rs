//! Detection of levels, and the choice of a level at run time.

use crate::error::Error;
use crate::level::Level;
#[cfg(target_arch = "x86_64")]
use crate::simd::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use crate::simd::avx512::{Avx512, Avx512Bf16};
use crate::simd::bf16_dot::PairKernel;
use crate::simd::entry::kernel;
use crate::simd::portable::Portable;
use crate::simd::processor::has_fast_pair_dots;
use crate::simd::vector::Kernel;

/// Detection. The rest of [`Level`] is plain data, in `level.rs`.
impl Level {
    /// The levels that this processor has, each one after those whose instructions it includes. (The type `Level` has no order, because
    /// levels of different architectures have none.)
    pub fn available() -> impl DoubleEndedIterator<Item = Level> {
        Self::ALL.iter().copied().filter(|level| Isa::detect(*level).is_some())
    }

    /// The fastest level that this processor has: the last one of [`Level::available`], but for [`Level::Avx512Bf16`] where its
    /// instruction is slow.
    pub fn best() -> Level {
        Isa::best().level()
    }
}

/// A level together with the proof that this processor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    Portable(Portable<8>),
    #[cfg(feature = "_four-lanes")]
    Portable4(Portable<4>),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
}

impl Isa {
    /// The proof for `level`, if this processor has it.
    pub(crate) fn detect(level: Level) -> Option<Isa> {
        match level {
            Level::Portable => Some(Isa::Portable(Portable)),
            #[cfg(feature = "_four-lanes")]
            Level::Portable4 => Some(Isa::Portable4(Portable)),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Avx2::detect().map(Isa::Avx2),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Avx512::detect().map(Isa::Avx512),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => Avx512Bf16::detect().map(Isa::Avx512Bf16),
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 | Level::Avx512Bf16 => None,
        }
    }

    /// The proof for `level`, or for the best level of this processor.
    ///
    /// # Errors
    /// [`Error::LevelUnavailable`].
    pub(crate) fn for_level(level: Option<Level>) -> Result<Isa, Error> {
        match level {
            None => Ok(Isa::best()),
            Some(level) => Isa::detect(level).ok_or(Error::LevelUnavailable { level }),
        }
    }

    /// The fastest level of this processor. It costs a few loads, because the standard library caches detection.
    pub(crate) fn best() -> Isa {
        let fast = |level: &&Level| **level != Level::Avx512Bf16 || has_fast_pair_dots();
        let detected = Level::ALL.iter().rev().filter(fast).find_map(|level| Self::detect(*level));
        detected.unwrap_or(Isa::Portable(Portable))
    }

    pub(crate) fn level(self) -> Level {
        match self {
            Isa::Portable(_) => Level::Portable,
            #[cfg(feature = "_four-lanes")]
            Isa::Portable4(_) => Level::Portable4,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => Level::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(_) => Level::Avx512Bf16,
        }
    }

    /// Lanes of a vector of this level.
    pub(crate) fn lanes(self) -> usize {
        lanes(self)
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Portable(simd) => Kernel::run(kernel, simd),
            #[cfg(feature = "_four-lanes")]
            Isa::Portable4(simd) => Kernel::run(kernel, simd),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(simd) => simd.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(simd) => simd.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(dots) => dots.base().enter(kernel),
        }
    }

    /// Whether the level has [`PairDots`](crate::simd::bf16_dot::PairDots).
    pub(crate) fn has_pair_dots(self) -> bool {
        self.level() == Level::Avx512Bf16
    }

    /// Runs `kernel` compiled for this level.
    ///
    /// # Panics
    /// If the level has no [`PairDots`](crate::simd::bf16_dot::PairDots).
    #[inline]
    pub(crate) fn run_pairs<K: PairKernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(dots) => dots.enter_pairs(kernel),
            _ => unreachable!("pairs of bf16 at the level {}", self.level()),
        }
    }
}

kernel! {
    fn lanes<S: Simd>(_simd: S) -> usize { S::LANES }
}
