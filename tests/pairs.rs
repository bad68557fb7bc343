//! Promise: scores from pairs of bf16 are as exact as scores from f32, for all numbers and layouts. A row that pairs can't
//! represent does not change the rows beside it.
//!
//! The tests also hold on a processor without such a level.

mod support;

use flashtile::{Attention, Level, TensorMut, TensorRef, Workspace, bf16, reference};
use support::problems::forms_and_levels;
use support::{Dims, Inputs, Rng};

const SIZES: Dims = Dims { batch: 1, heads_q: 4, heads_kv: 2, seq_q: 21, seq_kv: 300, head_dim: 34, value_dim: 20 };

fn compute(attention: &Attention<'_>, q: &[bf16], inputs: &Inputs<bf16>) -> Vec<f32> {
    let mut out = vec![0.0; SIZES.out().iter().product()];
    let q = TensorRef::from_slice(q, SIZES.q()).unwrap();
    let to = TensorMut::from_slice(&mut out, SIZES.out()).unwrap();
    attention.compute(q, (inputs.k(), inputs.v()), to, None, &mut Workspace::new()).unwrap();
    out
}

/// Denormal queries with giant keys, and giant queries or a giant scale with denormal keys. Scores are about 1, and an
/// instruction that flushes denormals to 0 would lose them all.
#[test]
fn denormal_numbers_count() {
    for (q_size, k_size, scale) in [(1e-39, 1e37, 50.0), (5e35, 1e-38, 50.0), (0.3, 1e-38, 1e38), (1e10, 1e-12, 50.0)] {
        let mut inputs = Inputs::<bf16>::random(SIZES, &mut Rng(1));
        inputs.q.iter_mut().for_each(|q| *q = bf16::from_f32(q.to_f32() * q_size));
        inputs.k.iter_mut().for_each(|k| *k = bf16::from_f32(k.to_f32() * k_size));
        let attention = Attention::new().scale(scale);
        let expected = reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap().out;
        let mean =
            reference::attention(&Attention::new().scale(0.0), inputs.q(), (inputs.k(), inputs.v())).unwrap().out;
        let far = expected.iter().zip(&mean).filter(|(a, b)| (*a - *b).abs() > 0.1).count();
        assert!(far > expected.len() / 4, "the scores matter: {far} of {}", expected.len());
        for (form, level) in forms_and_levels() {
            let out = compute(&attention.clone().form(form).level(level), &inputs.q, &inputs);
            for (got, expected) in out.iter().zip(&expected) {
                assert!((*got as f64 - expected).abs() < 1e-4, "{got} for {expected}: {q_size:e} {form:?} {level}");
            }
        }
    }
}

/// One element that pairs can't represent, in one row of one head: only that row's bits change.
#[test]
fn rows_for_which_pairs_do_not_do_stand_alone() {
    let inputs = Inputs::<bf16>::random(SIZES, &mut Rng(2));
    for (form, level) in forms_and_levels() {
        for attention in [Attention::new(), Attention::new().causal().softcap(2.0)] {
            let attention = attention.form(form).level(level);
            let before = compute(&attention, &inputs.q, &inputs);
            for odd in [bf16::from_bits(1), bf16::MAX, bf16::NAN, bf16::INFINITY] {
                let row = 37;
                let mut q = inputs.q.clone();
                q[row * SIZES.head_dim + 33] = odd;
                let after = compute(&attention, &q, &inputs);
                for (r, (before, after)) in
                    before.chunks(SIZES.value_dim).zip(after.chunks(SIZES.value_dim)).enumerate()
                {
                    let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert!(r == row || bits(before) == bits(after), "row {r}: {odd} {form:?} {level}");
                    if r == row && odd == bf16::from_bits(1) {
                        let near = before.iter().zip(after).all(|(a, b)| (a - b).abs() < 0.2);
                        assert!(near, "a denormal number for one of {} elements: {form:?} {level}", SIZES.head_dim);
                    }
                }
            }
        }
    }
}

/// Rows that pairs can't represent have the same bits, whether few or all rows are so. Lengths on either side of a vector of pairs,
/// of a panel, and of a tile; a window, which divides tiles.
#[test]
fn few_and_many_such_rows_give_the_same_bits() {
    for (head_dim, seq_q, seq_kv) in [(1, 5, 40), (33, 40, 300), (64, 50, 70), (130, 33, 500)] {
        let dims = Dims { head_dim, seq_q, seq_kv, ..SIZES };
        let inputs = Inputs::<bf16>::random(dims, &mut Rng(6));
        let rows = dims.heads_q * seq_q;
        for (form, level) in forms_and_levels() {
            for attention in [Attention::new(), Attention::new().causal().window(Some(60), None).softcap(2.0)] {
                let attention = attention.form(form).level(level);
                let with_denormals = |every: usize| {
                    let mut q = inputs.q.clone();
                    (0..rows).step_by(every).for_each(|row| q[row * head_dim] = bf16::from_bits(0x8001));
                    let mut out = vec![0.0f32; rows * dims.value_dim];
                    let to = TensorMut::from_slice(&mut out, dims.out()).unwrap();
                    let q = TensorRef::from_slice(&q, dims.q()).unwrap();
                    attention.compute(q, (inputs.k(), inputs.v()), to, None, &mut Workspace::new()).unwrap();
                    out.chunks(dims.value_dim).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
                };
                let all: Vec<Vec<u32>> = with_denormals(1);
                for every in [2, 7, rows] {
                    for (row, bits) in with_denormals(every).iter().enumerate().step_by(every) {
                        assert!(all[row] == *bits, "row {row}, 1 of {every}: {dims:?} {form:?} {level}");
                    }
                }
            }
        }
    }
}

/// Pairs are read in place, or rows are copied because of their strides or an odd length. Both give the same bits.
#[test]
fn layouts_give_the_same_bits() {
    for head_dim in [1, 2, 15, 16, 31, 34, 64] {
        let dims = Dims { head_dim, ..SIZES };
        let inputs = Inputs::<bf16>::random(dims, &mut Rng(3));
        let spread = |x: &[bf16], row: usize, step: usize| {
            let mut spread = vec![bf16::NAN; x.len() / head_dim * row];
            for (n, &x) in x.iter().enumerate() {
                spread[n / head_dim * row + n % head_dim * step] = x;
            }
            spread
        };
        for (form, level) in forms_and_levels() {
            let attention = Attention::new().form(form).level(level);
            let expected = inputs.compute(&attention).0;
            for (row, step) in [(head_dim + 1, 1), (head_dim + 2, 1), (2 * head_dim, 2), (3 * head_dim + 1, 3)] {
                let (q, k) = (spread(&inputs.q, row, step), spread(&inputs.k, row, step));
                let strides = |[_, heads, seq, _]: [usize; 4]| {
                    [heads * seq * row, seq * row, row, step].map(|stride| stride as isize)
                };
                let q = TensorRef::with_strides(&q, 0, dims.q(), strides(dims.q())).unwrap();
                let k = TensorRef::with_strides(&k, 0, dims.k(), strides(dims.k())).unwrap();
                let mut out = vec![bf16::NAN; expected.len()];
                let to = TensorMut::from_slice(&mut out, dims.out()).unwrap();
                attention.compute(q, (k, inputs.v()), to, None, &mut Workspace::new()).unwrap();
                assert!(out == expected, "head_dim {head_dim}, rows {row} and elements {step} apart: {form:?} {level}");
            }
        }
    }
}

/// Pairs are summed before scaling. With a tiny scale they must not be used, because sums could overflow where scores are small.
#[test]
fn tiny_scales_do_not_overflow() {
    let [tiny, big, bigger] = [-100, 32, 97].map(|exponent| 2.0f32.powi(exponent));
    let dims = Dims { head_dim: 2, ..SIZES };
    let filled = |x: &[bf16], value: f32| vec![bf16::from_f32(value); x.len()];
    let mut inputs = Inputs::<bf16>::random(dims, &mut Rng(4));
    (inputs.q, inputs.k) = (filled(&inputs.q, -big), filled(&inputs.k, bigger));
    for (form, level) in forms_and_levels() {
        // Every score is -2^30: all keys have equal probs, and none is hidden.
        let (_, lse) = inputs.compute(&Attention::new().scale(tiny).form(form).level(level));
        assert!(lse.iter().all(|lse| (lse + 2.0f32.powi(30)).abs() < 1e3), "{form:?} {level}: {lse:?}");
    }
}

/// A window divides a tile into keys that all rows see and keys that some rows see. Where scores are computed from elements
/// instead of pairs, the second part must keep the maximum of the first.
#[test]
fn a_window_keeps_the_maximum_of_its_edge() {
    let (huge, tiny, largest) = (2.0f32.powi(33), 2.0f32.powi(-33), 190);
    let dims = Dims { head_dim: 2, ..Dims::new(1, 20, 300, 8) };
    let mut inputs = Inputs::<bf16>::random(dims, &mut Rng(5));
    // Every query is too large for pairs. Every score is 0 except that of one key, which the first eleven rows see.
    inputs.q.iter_mut().enumerate().for_each(|(n, q)| *q = bf16::from_f32(if n % 2 == 0 { huge } else { 0.0 }));
    let key = |n: usize| if n == 2 * largest { 300.0 * tiny } else { 0.0 };
    inputs.k.iter_mut().enumerate().for_each(|(n, k)| *k = bf16::from_f32(key(n)));
    let attention = Attention::new().scale(1.0).window(Some(100), None);
    let expected = reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap();
    for (form, level) in forms_and_levels() {
        let (out, lse) = inputs.compute(&attention.clone().form(form).level(level));
        for (n, (got, expected)) in out.iter().zip(&expected.out).enumerate() {
            // Twice half a place of bf16 for values below 4.
            assert!((got.to_f32() as f64 - expected).abs() < 0.02, "{got} for {expected}: {n} {form:?} {level}");
        }
        for (got, expected) in lse.iter().zip(&expected.lse) {
            assert!((*got as f64 - expected).abs() < 1e-3, "lse {got} for {expected}: {form:?} {level}");
        }
    }
}

/// The level is available where the standard library detects it. It is the best one where the instruction is fast: on AMD's processors.
#[test]
#[cfg(target_arch = "x86_64")]
fn the_best_level_has_pairs_where_they_are_fast() {
    let has_pairs = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vl");
    assert_eq!(Level::available().any(|level| level == Level::Avx512Bf16), has_pairs);
    let id = std::arch::x86_64::__cpuid(0);
    let is_amd = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD";
    assert_eq!(Level::best() == Level::Avx512Bf16, has_pairs && is_amd);
}
