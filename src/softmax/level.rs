//! The level that softmax runs at.
#![forbid(unsafe_code)]

use crate::simd::Isa;

/// The level that softmax runs at: the best one of this processor. (Unit tests choose another for their thread.)
pub(super) fn isa() -> Isa {
    #[cfg(test)]
    if let Some(isa) = super::tests::chosen() {
        return isa;
    }
    Isa::best()
}
