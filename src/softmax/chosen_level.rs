//! The level at which softmax runs.
#![forbid(unsafe_code)]

use crate::simd::Isa;

/// The best level of this processor. Unit tests can choose another level for their thread.
pub(super) fn isa() -> Isa {
    #[cfg(test)]
    if let Some(isa) = super::tests::chosen() {
        return isa;
    }
    Isa::best()
}
