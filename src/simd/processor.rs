//! What a processor is better at than others with the same instructions.

use std::sync::LazyLock;

/// Whether loops over data from memory should prefetch into the second cache, not the first.
///
/// The first cache of Zen 3 and Zen 4 (AMD's family 19h) waits for at most 24 lines, which is 16 GB/s. Into the second cache, Zen 4 brought
/// 25 GB/s and more. Decode of f32 takes 0.78 of the time there, of f16 0.90; Zen 3 was not measured. Zen 5 is slower that way.
#[inline]
pub(crate) fn prefetches_into_second_cache() -> bool {
    static IS_FAMILY_19H: LazyLock<bool> = LazyLock::new(|| is(b"AuthenticAMD") && family() == 0x19);
    *IS_FAMILY_19H
}

/// Whether the dot products of pairs of bf16 that the processor has are as fast as multiply-adds of f32, so that they halve the time.
///
/// On AMD's processors (Zen 4, Zen 5) they are. Intel's Emerald Rapids starts one where it starts two multiply-adds: prefill of bf16 took
/// 1.4 times as long by pairs as by f32, decode as long at best. Elements that the instruction can't represent cost extra.
pub(crate) fn has_fast_pair_dots() -> bool {
    static IS_AMD: LazyLock<bool> = LazyLock::new(|| is(b"AuthenticAMD"));
    *IS_AMD
}

/// Whether `vendor` made this processor.
#[cfg(target_arch = "x86_64")]
fn is(vendor: &[u8; 12]) -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened() == vendor
}

/// The family, as AMD counts them.
#[cfg(target_arch = "x86_64")]
fn family() -> u32 {
    // The base is 15 in all newer processors, and the extended family is added.
    let version = std::arch::x86_64::__cpuid(1).eax;
    (version >> 8 & 15) + (version >> 20 & 255)
}

#[cfg(not(target_arch = "x86_64"))]
fn is(_vendor: &[u8; 12]) -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn family() -> u32 {
    0
}
