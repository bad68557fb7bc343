//! The roofs of one thread of this machine, measured in the same process: multiply-adds in registers, and a loop that reads
//! memory and adds it up. Results are stated as fractions of these.

#![allow(dead_code, reason = "each bench uses its part")]

use std::hint::black_box;
use std::time::Instant;

/// Floating-point operations of one call of [`multiply_adds`] with `steps` steps.
pub(crate) fn multiply_add_flops(steps: usize) -> f64 {
    (steps * CHAINS * 2 * widest()) as f64
}

/// Independent chains: two multiply-adds can start in a cycle and each takes four, so eight chains keep the unit busy, and
/// twelve leave room for a longer latency.
const CHAINS: usize = 12;

/// f32 in the widest vector that [`multiply_adds`] uses here.
fn widest() -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return 16;
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return 8;
    }
    4
}

/// `steps` steps of multiply-adds in registers, with the widest vectors that the processor has.
///
/// With AVX-512, this also bounds AVX2 code where a 512-bit instruction takes a 256-bit unit twice, as on Zen 4. With 512-bit
/// units, AVX2 code can reach half of it.
pub(crate) fn multiply_adds(steps: usize) {
    #[cfg(target_arch = "x86_64")]
    match widest() {
        // SAFETY: `widest` has detected AVX-512F.
        16 => return unsafe { avx512(steps) },
        // SAFETY: `widest` has detected AVX2 and FMA.
        8 => return unsafe { avx2(steps) },
        _ => {}
    }
    let (x, y) = (black_box([0.5f32; 4]), black_box([1.0f32; 4]));
    let mut chains = [[0.0f32; 4]; CHAINS];
    for _ in 0..steps {
        for chain in &mut chains {
            for lane in 0..4 {
                chain[lane] = if cfg!(target_arch = "aarch64") {
                    chain[lane].mul_add(x[lane], y[lane])
                } else {
                    chain[lane] * x[lane] + y[lane]
                };
            }
        }
    }
    black_box(chains);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(steps: usize) {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps, _mm256_setzero_ps};
    let (x, y) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
    let mut chains = [_mm256_setzero_ps(); CHAINS];
    for _ in 0..steps {
        for chain in &mut chains {
            *chain = _mm256_fmadd_ps(*chain, x, y);
        }
    }
    black_box(chains);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(steps: usize) {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps, _mm512_setzero_ps};
    let (x, y) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
    let mut chains = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..steps {
        for chain in &mut chains {
            *chain = _mm512_fmadd_ps(*chain, x, y);
        }
    }
    black_box(chains);
}

/// Multiply-adds in registers, in flops a second: the best of some short runs.
pub(crate) fn multiply_add_peak() -> f64 {
    const STEPS: usize = 1 << 19;
    let run = |_| {
        let start = Instant::now();
        multiply_adds(STEPS);
        start.elapsed().as_secs_f64()
    };
    multiply_add_flops(STEPS) / (0..20).map(run).fold(f64::INFINITY, f64::min)
}

/// Reads all of `data` once, in order.
pub(crate) fn read(data: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn read_avx2(data: &[f32]) -> f32 {
            sum(data)
        }
        // SAFETY: AVX2 has been detected.
        black_box(unsafe { read_avx2(data) });
        return;
    }
    black_box(sum(data));
}

/// The sum in 64 accumulators, which the compiler keeps in eight registers of eight lanes.
#[inline(always)]
fn sum(data: &[f32]) -> f32 {
    let mut sums = [0.0f32; 64];
    for line in data.chunks_exact(64) {
        for (sum, x) in sums.iter_mut().zip(line) {
            *sum += x;
        }
    }
    sums.iter().sum()
}
