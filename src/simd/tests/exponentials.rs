//! The exponentials of every level against f64: at most 1 ulp from the correctly rounded f32.

use super::*;

/// Applies `f` to a block of numbers.
struct Map<'a, F>(&'a mut [f32; BLOCK], F);
const BLOCK: usize = 1024;

/// A vector function that is generic over the level.
trait Function: Copy {
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32;
}

impl<F: Function> Kernel for Map<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for x in self.0.chunks_exact_mut(S::LANES) {
            let y = self.1.apply(simd, simd.load_slice(x));
            simd.store_slice(x, y);
        }
    }
}

#[derive(Clone, Copy)]
struct Exp;
impl Function for Exp {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        exp(simd, x)
    }
}

#[derive(Clone, Copy)]
struct Weight;
impl Function for Weight {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        exp_scaled(simd, x)
    }
}

#[derive(Clone, Copy)]
struct Fraction;
impl Function for Fraction {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        let [[y]] = exp2_fractions(simd, [[x]], 1.0);
        y
    }
}

#[derive(Clone, Copy)]
struct Tanh;
impl Function for Tanh {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        tanh(simd, x)
    }
}

/// The index of a float in the order of all floats. Neighbours differ by 1; -0 and 0 have the same index.
fn place(x: f32) -> i64 {
    let bits = x.to_bits() as i32;
    i64::from(if bits < 0 { i32::MIN - bits } else { bits })
}

/// Calls `check(x, f(x))` for every given x, in blocks.
fn each(level: Level, f: impl Function, mut bits: impl Iterator<Item = u32>, mut check: impl FnMut(f32, f32)) {
    let isa = Isa::detect(level).unwrap();
    loop {
        let x: Vec<f32> = bits.by_ref().take(BLOCK).map(f32::from_bits).collect();
        if x.is_empty() {
            return;
        }
        let mut y = [0.0; BLOCK];
        y[..x.len()].copy_from_slice(&x);
        isa.run(Map(&mut y, f));
        x.iter().zip(y).for_each(|(x, y)| check(*x, y));
    }
}

/// Every 251st bit pattern, or all of them if an environment variable says so.
fn patterns(from: u32, to: u32) -> impl Iterator<Item = u32> {
    let step = if std::env::var("FLASHTILE_EXHAUSTIVE").is_ok() { 1 } else { 251 };
    (from..=to).step_by(step)
}

#[test]
fn exp_is_within_one_place_everywhere() {
    for level in Level::available() {
        let mut worst = (0, 0.0);
        each(level, Exp, patterns(0, u32::MAX), |x, y| {
            if x.is_nan() {
                assert!(y.is_nan(), "{level}: exp of the NaN {:08x} is {y}", x.to_bits());
                return;
            }
            // The relative error of f64 is below 2^-52, so the correctly rounded value is one of these two.
            let exact = f64::from(x).exp();
            let [low, high] = [-1.0, 1.0].map(|sign| place((exact * (1.0 + sign * f64::EPSILON)) as f32));
            let off = (low - place(y)).max(place(y) - high).max(0);
            if off > worst.0 {
                worst = (off, x);
            }
        });
        println!("{level}: exp is at most {} places off, first at {:?}", worst.0, worst.1);
        assert!(worst.0 <= 1, "{level}: exp({:?}) is {} places off", worst.1, worst.0);
    }
}

#[test]
fn exp_never_falls() {
    for level in Level::available() {
        for (from, to, order) in
            [(0, f32::INFINITY.to_bits(), [0, 1]), (0x8000_0000, f32::NEG_INFINITY.to_bits(), [1, 0])]
        {
            let mut last = (0.0, 1.0);
            each(level, Exp, patterns(from, to), |x, y| {
                let pair = [last, (x, y)];
                let (low, high) = (pair[order[0]], pair[order[1]]);
                assert!(low.1 <= high.1, "{level}: exp{low:?} is above exp{high:?}");
                last = (x, y);
            });
        }
    }
}

/// `exp_scaled` is exp in units of 2^-24. It has the error of exp where exp is normal, and is exactly 0 where exp rounds to 0.
#[test]
fn weights_are_exp_in_other_units() {
    for level in Level::available() {
        each(level, Weight, patterns(0x8000_0000, u32::MAX), |x, y| {
            let exact = f64::from(x).exp() * 16_777_216.0;
            if x.is_nan() {
                assert!(y.is_nan(), "{level}: the NaN {:08x} gives {y}", x.to_bits());
            } else if x < -104.4 {
                assert_eq!(y, 0.0, "{level}: {x}"); // below 2^-150.5
            } else if x >= -103.97 || y != 0.0 {
                // Above 2^-150. Between the two bounds exp rounds to 0, and `exp_scaled` may be 0 or not.
                let off = (place(y) - place(exact as f32)).abs();
                assert!(off <= 1, "{level}: {x} gives {y}, {off} places off {exact}");
            }
        });
        each(level, Weight, [0.0f32, -0.0, f32::NEG_INFINITY].map(f32::to_bits).into_iter(), |x, y| {
            assert_eq!(y, if x == 0.0 { 16_777_216.0 } else { 0.0 });
        });
    }
}

/// The unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// 2^r for every |r| from 2^-26 to 1/2, and 0, has an error of at most 3 u. Every error bound of attention relies on it.
#[test]
fn powers_of_two_within_3_roundoffs() {
    for level in Level::available() {
        let both = |bits: u32| [bits, bits | 1 << 31];
        let magnitudes = std::iter::once(0).chain(patterns(0x3280_0000, 0.5f32.to_bits())).chain([0.5f32.to_bits()]);
        each(level, Fraction, magnitudes.flat_map(both), |r, y| {
            let right = f64::from(r).exp2();
            assert!((f64::from(y) - right).abs() <= 3.0 * U * right, "2^{r:e} is {y:e} at {level}");
        });
    }
}

/// A score halfway between two integers may be rounded to either of them: the probability has the same bits.
#[test]
fn halves_on_either_side_make_the_same_power() {
    for level in Level::available() {
        let mut powers = Vec::new();
        each(level, Fraction, [0.5f32, -0.5].map(f32::to_bits).into_iter(), |_, y| powers.push(y));
        assert_eq!(powers[0], 2.0 * powers[1], "{level}");
    }
}

/// tanh, from the smallest number to where it is 1, has an error of at most 8 u.
#[test]
fn tanh_within_8_roundoffs() {
    for level in Level::available() {
        each(level, Tanh, patterns(0x0080_0000, 10.0f32.to_bits()), |x, y| {
            let right = f64::from(x).tanh();
            assert!((f64::from(y) - right).abs() <= 8.0 * U * right, "tanh({x:e}) is {y:e} at {level}");
        });
    }
}
