//! Arithmetic, comparison, selection, bits, folds, parts and the transpose.

use super::*;

/// Numbers of all kinds: both signs, zeros, halves, denormals, extremes, infinities, NaN.
const NUMBERS: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.5,
    -0.25,
    3.7e-39,
    -1e-45,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    1e10,
    8_388_609.0,
    0.1,
];

fn read<S: Simd>(simd: S, x: S::F32) -> Vec<f32> {
    let mut out = vec![0.0; S::LANES];
    simd.store_slice(&mut out, x);
    out
}

fn read_mask<S: Simd>(simd: S, mask: S::Mask) -> Vec<bool> {
    read(simd, simd.select(mask, simd.splat(1.0), simd.zero())).into_iter().map(|x| x == 1.0).collect()
}

fn read_i32<S: Simd>(simd: S, x: S::I32) -> Vec<i32> {
    read(simd, simd.float_of_bits(x)).into_iter().map(|x| x.to_bits() as i32).collect()
}

#[track_caller]
fn same(what: &str, got: &[f32], expected: &[f32]) {
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let equal = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
        assert!(equal, "{what}, lane {i}: {got:?} but the scalar gives {expected:?}");
    }
}

/// All pairs of `NUMBERS`, `LANES` at a time.
fn pairs<S: Simd>() -> impl Iterator<Item = (Vec<f32>, Vec<f32>)> {
    let all: Vec<_> = NUMBERS.iter().flat_map(|a| NUMBERS.map(|b| (*a, b))).collect();
    let chunks: Vec<_> = all.chunks(S::LANES).map(|pairs| pairs.iter().copied().unzip()).collect();
    chunks.into_iter()
}

struct Arithmetic;
impl Kernel for Arithmetic {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (a, b) in pairs::<S>() {
            let (x, y) = (simd.load_slice(&a), simd.load_slice(&b));
            let two = |f: fn(f32, f32) -> f32| a.iter().zip(&b).map(|(a, b)| f(*a, *b)).collect::<Vec<_>>();
            same("add", &read(simd, simd.add(x, y)), &two(|a, b| a + b));
            same("sub", &read(simd, simd.sub(x, y)), &two(|a, b| a - b));
            same("mul", &read(simd, simd.mul(x, y)), &two(|a, b| a * b));
            same("div", &read(simd, simd.div(x, y)), &two(|a, b| a / b));
            same("abs", &read(simd, simd.abs(x)), &two(|a, _| a.abs()));
            same("ceil", &read(simd, simd.ceil(x)), &two(|a, _| a.ceil()));
            // For equal operands (0 and -0) either may be the result. All other cases are fixed; NaN gives the second operand.
            let apart: Vec<_> = a.iter().zip(&b).map(|(a, b)| if a == b { 1.0 } else { 0.0 }).collect();
            let apart = simd.eq(simd.load_slice(&apart), simd.zero());
            let skip = |z| read(simd, simd.select(apart, z, simd.zero()));
            let two_apart = |f: fn(f32, f32) -> f32| {
                two(f).iter().zip(a.iter().zip(&b)).map(|(z, (a, b))| if a == b { 0.0 } else { *z }).collect::<Vec<_>>()
            };
            same("max", &skip(simd.max(x, y)), &two_apart(|a, b| if a > b { a } else { b }));
            same("min", &skip(simd.min(x, y)), &two_apart(|a, b| if a < b { a } else { b }));
            let asked = |f: fn(&f32, &f32) -> bool| a.iter().zip(&b).map(|(a, b)| f(a, b)).collect::<Vec<_>>();
            assert_eq!(read_mask(simd, simd.lt(x, y)), asked(|a, b| a < b), "lt {a:?} {b:?}");
            let not_lt = read_mask(simd, simd.not_lt(x, y)).into_iter().map(|yes| !yes).collect::<Vec<_>>();
            assert_eq!(not_lt, asked(|a, b| a < b), "not_lt {a:?} {b:?}");
            assert_eq!(read_mask(simd, simd.le(x, y)), asked(|a, b| a <= b), "le {a:?} {b:?}");
            assert_eq!(read_mask(simd, simd.eq(x, y)), asked(|a, b| a == b), "eq {a:?} {b:?}");
            let both = simd.and(simd.le(x, y), simd.lt(simd.zero(), x));
            assert_eq!(read_mask(simd, both), asked(|a, b| a <= b && *a > 0.0), "and {a:?} {b:?}");
            assert_eq!(simd.any(both), read_mask(simd, both).contains(&true));
        }
    }
}

struct Fused;
impl Kernel for Fused {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (a, b) in pairs::<S>() {
            for c in [0.0, -1.0, 0.1, f32::INFINITY, f32::NAN] {
                let got = read(simd, simd.mul_add(simd.load_slice(&a), simd.load_slice(&b), simd.splat(c)));
                for i in 0..S::LANES {
                    // One rounding or two, depending on the level.
                    let (one, two) = (a[i].mul_add(b[i], c), a[i] * b[i] + c);
                    let fits = |x: f32| x.to_bits() == got[i].to_bits() || x.is_nan() && got[i].is_nan();
                    assert!(fits(one) || fits(two), "{} * {} + {c} = {}", a[i], b[i], got[i]);
                }
            }
        }
    }
}

struct Integers;
impl Kernel for Integers {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let numbers = [0, 1, -1, 5, -77, i32::MAX, i32::MIN, 1 << 23, -(1 << 23), 0x7fc0_0001];
        for a in numbers {
            for b in numbers {
                let (x, y) = (simd.splat_i32(a), simd.splat_i32(b));
                let all = |x: i32| vec![x; S::LANES];
                assert_eq!(read_i32(simd, simd.add_i32(x, y)), all(a.wrapping_add(b)));
                assert_eq!(read_i32(simd, simd.sub_i32(x, y)), all(a.wrapping_sub(b)));
                assert_eq!(read_i32(simd, simd.max_i32(x, y)), all(a.max(b)));
                assert_eq!(read_i32(simd, simd.shl_i32::<23>(x)), all(a << 23));
                assert_eq!(read_i32(simd, simd.shr_i32::<9>(x)), all(a >> 9));
                assert_eq!(read_i32(simd, simd.bits(simd.float_of_bits(x))), all(a));
            }
        }
    }
}

struct Lanes;
impl Kernel for Lanes {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let x: Vec<f32> = (0..S::LANES).map(|i| (i * 37 % 11) as f32 - 4.0).collect();
        same("lane_numbers", &read(simd, simd.lane_numbers()), &(0..S::LANES).map(|i| i as f32).collect::<Vec<_>>());
        let bytes: Vec<u8> = (0..S::LANES as u8).map(|i| [0, 1, 2, 0, 128, 255][i as usize % 6]).collect();
        // SAFETY: LANES bytes.
        let answers = unsafe { simd.load_mask(bytes.as_ptr()) };
        assert_eq!(read_mask(simd, answers), bytes.iter().map(|&byte| byte != 0).collect::<Vec<_>>(), "load_mask");
        let k: Vec<i32> = (0..S::LANES as i32).map(|i| i * 5 - 9 + (i << 20)).collect();
        let bits: Vec<f32> = k.iter().map(|k| f32::from_bits(*k as u32)).collect();
        let picked: Vec<f32> = k.iter().map(|k| x[*k as usize % S::LANES]).collect();
        same("pick", &read(simd, simd.pick(simd.load_slice(&x), simd.bits(simd.load_slice(&bits)))), &picked);
        assert_eq!(simd.sum(simd.load_slice(&x)), x.iter().sum::<f32>(), "small integers add up exactly");
        assert_eq!(simd.max_lane(simd.load_slice(&x)), x.iter().copied().fold(f32::MIN, f32::max));
        for len in 0..=S::LANES {
            let part = simd.load_part(&x[..len], 9.5);
            let expected: Vec<_> = (0..S::LANES).map(|i| if i < len { x[i] } else { 9.5 }).collect();
            same("load_part", &read(simd, part), &expected);
            let mut out = vec![-1.0; S::LANES];
            simd.store_part(&mut out[..len], part);
            same("store_part", &out[..len], &x[..len]);
            assert!(out[len..].iter().all(|x| *x == -1.0), "store_part writes past its end");
        }
    }
}

struct Transpose;
impl Kernel for Transpose {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let from: Vec<f32> = (0..S::LANES * S::LANES).map(|i| i as f32).collect();
        let mut rows = [simd.zero(); MAX_LANES];
        for (row, from) in rows.iter_mut().zip(from.chunks_exact(S::LANES)) {
            *row = simd.load_slice(from);
        }
        for (r, row) in simd.transpose(rows)[..S::LANES].iter().enumerate() {
            let expected: Vec<f32> = from.iter().skip(r).step_by(S::LANES).copied().collect();
            assert_eq!(read(simd, *row), expected, "row {r}");
        }
        let yes = |r: usize, c: usize| (r * r + 3 * c) % 5 < 2;
        let mut answers = [simd.eq(simd.zero(), simd.zero()); MAX_LANES];
        for (r, answers) in answers.iter_mut().enumerate() {
            let row: [f32; MAX_LANES] = std::array::from_fn(|c| f32::from(u8::from(yes(r, c))));
            *answers = simd.eq(simd.load_slice(&row), simd.splat(1.0));
        }
        for (r, answers) in simd.transpose_masks(answers)[..S::LANES].iter().enumerate() {
            let expected: Vec<bool> = (0..S::LANES).map(|c| yes(c, r)).collect();
            assert_eq!(read_mask(simd, *answers), expected, "row {r}");
        }
    }
}

struct SumChecks;
impl Kernel for SumChecks {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // The sums of integers are exact: the sum of each vector is in its lane.
        let number = |n: usize, i: usize| ((n * 131 + i * 37 + n * i * i) % 1009) as f32;
        let mut vectors = [simd.zero(); MAX_LANES];
        for (n, vector) in vectors.iter_mut().enumerate().take(S::LANES) {
            let row: [f32; MAX_LANES] = std::array::from_fn(|i| number(n, i));
            *vector = simd.load_slice(&row);
        }
        let expected: Vec<f32> = (0..S::LANES).map(|n| (0..S::LANES).map(|i| number(n, i)).sum()).collect();
        same("sums", &read(simd, simd.sums(vectors)), &expected);
        // The sum of these numbers depends on the order. It must not depend on the index of the vector.
        for seed in 1..200u32 {
            let row: [f32; MAX_LANES] = std::array::from_fn(|i| {
                let bits = (i as u32 + 1).wrapping_mul(seed).wrapping_mul(0x9e37_79b9);
                (bits >> 8) as f32 * 1.1f32.powi((bits % 97) as i32)
            });
            let sums = read(simd, simd.sums([simd.load_slice(&row); MAX_LANES]));
            same("sums of one vector", &sums, &vec![sums[0]; S::LANES]);
            let mut in_order: Vec<f32> = S::SUMS_ORDER[..S::LANES].iter().map(|&lane| row[lane]).collect();
            while in_order.len() > 1 {
                in_order = in_order.chunks(2).map(|pair| pair[0] + pair[1]).collect();
            }
            same("the order of sums", &sums[..1], &in_order);
        }
    }
}

struct AllOperations;
impl Kernel for AllOperations {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        Arithmetic.run(simd);
        Fused.run(simd);
        Integers.run(simd);
        Lanes.run(simd);
        Transpose.run(simd);
        SumChecks.run(simd);
    }
}

#[test]
fn operations_match_the_scalar_ones() {
    for level in Level::available() {
        let isa = Isa::detect(level).unwrap();
        assert_eq!(isa.level(), level);
        isa.run(AllOperations);
    }
    AllOperations.run(Portable::<4>);
}

struct PairChecks;
impl PairKernel for PairChecks {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S, dots: impl PairDots<S>) {
        check_sum_order(simd, dots);
        check_parts(simd, dots);
        let flush = |x: f32| if x.abs() < f32::MIN_POSITIVE { 0.0 * x } else { x };
        let halves: Vec<bf16> = NUMBERS.iter().map(|&x| bf16::from_f32(x)).collect();
        for shift in 0..NUMBERS.len() {
            for c in [0.0, 1.0, -3.0e38, 16_777_216.0] {
                let pair = |n: usize| Bf16Pair { first: halves[n % 16], second: halves[(n / 16 + n) % 16] };
                let a: Vec<_> = (0..S::LANES).map(pair).collect();
                let b: Vec<_> = (0..S::LANES).map(|n| pair(n * 5 + shift)).collect();
                let dot = |a: Bf16Pair, b: Bf16Pair| {
                    let product = |a: bf16, b: bf16, c: f32| flush(flush(a.to_f32()).mul_add(flush(b.to_f32()), c));
                    product(a.first, b.first, product(a.second, b.second, c))
                };
                // SAFETY: both have LANES pairs.
                let (x, y) = unsafe { (dots.load_pairs(a.as_ptr()), dots.load_pairs(b.as_ptr())) };
                let expected: Vec<_> = a.iter().zip(&b).map(|(&a, &b)| dot(a, b)).collect();
                same("add_dots", &read(simd, dots.add_dots(x, y, simd.splat(c))), &expected);
                let one: Vec<_> = b.iter().map(|&b| dot(a[shift % S::LANES], b)).collect();
                // SAFETY: a pair of `a`.
                let got = unsafe { dots.add_dots_at(&a[shift % S::LANES], y, simd.splat(c)) };
                same("add_dots_at", &read(simd, got), &one);
                // SAFETY: a pair of `a`.
                let everywhere = unsafe { dots.broadcast(&a[shift % S::LANES]) };
                same("broadcast", &read(simd, dots.add_dots(everywhere, y, simd.splat(c))), &one);
            }
        }
    }
}

/// The sums of lanes, added up in the order that is stated, have the bits of `sums`.
#[inline(always)]
fn check_sum_order<S: Simd, D: PairDots<S>>(simd: S, _: D) {
    let mut vectors = [simd.zero(); MAX_LANES];
    let mut expected = Vec::new();
    for (n, vector) in vectors[..S::LANES].iter_mut().enumerate() {
        // Thirds and sevenths: every order of additions rounds differently.
        let x: Vec<f32> =
            (0..S::LANES).map(|lane| (1 + lane * lane + 31 * n) as f32 / [3.0, 7.0e3][lane % 2]).collect();
        let mut sums: Vec<f32> = S::SUMS_ORDER[..S::LANES].iter().map(|&lane| x[lane]).collect();
        while sums.len() > 1 {
            sums = sums.chunks(2).map(|two| two[0] + two[1]).collect();
        }
        expected.push(sums[0]);
        *vector = simd.load_slice(&x);
    }
    same("sums in the stated order", &read(simd, simd.sums(vectors)), &expected);
}

/// Part of a vector of pairs: the elements, then zeros, also where the last pair has one element.
#[inline(always)]
fn check_parts<S: Simd, D: PairDots<S>>(simd: S, dots: D) {
    let x: Vec<bf16> = (0..2 * S::LANES).map(|n| bf16::from_f32(n as f32 + 1.0)).collect();
    for len in 0..=x.len() {
        let bits = |n: usize| if n < len { u32::from(x[n].to_bits()) } else { 0 };
        let expected: Vec<_> = (0..S::LANES).map(|n| f32::from_bits(bits(2 * n) | bits(2 * n + 1) << 16)).collect();
        same("load_pairs_part", &read(simd, dots.load_pairs_part(&x[..len])), &expected);
    }
}

#[test]
fn pairs_match_the_scalar_products() {
    if let Some(isa) = Isa::detect(Level::Avx512Bf16) {
        isa.run_pairs(PairChecks);
    }
}
