//! Promise: the exponential, through the public API at this processor's best level, is off by at most one unit in the last
//! place from the correctly rounded value, denormal results included.
//!
//! `FLASHTILE_EXHAUSTIVE=1 cargo test --release --test exp` tries all 2^32 numbers instead of a sample, in a minute or two.
//! `--lib exponentials` instead of `--test exp` does so for every level.

use flashtile::softmax::{exp_in_place, exp_into};

/// The place of a float in the order of all floats: neighbours differ by one.
fn place(x: f32) -> i64 {
    let bits = x.to_bits() as i32;
    i64::from(if bits < 0 { i32::MIN - bits } else { bits })
}

fn check(x: &[f32]) {
    let mut y = x.to_vec();
    exp_in_place(&mut y);
    for (x, y) in x.iter().zip(y) {
        // f64 is off by less than 2^-52 relative. So the correctly rounded value is one of these two, which are the same but for
        // cases rarer than 2^-27.
        let exact = f64::from(*x).exp();
        let [low, high] = [-1.0, 1.0].map(|sign| (exact * (1.0 + sign * f64::EPSILON)) as f32);
        let fits = if x.is_nan() { y.is_nan() } else { (place(low) - 1..=place(high) + 1).contains(&place(y)) };
        assert!(fits, "exp({x:?}) = {y:?}, {low:?} is right");
    }
}

#[test]
fn one_place_on_every_number_of_a_dense_sample() {
    let step = if std::env::var("FLASHTILE_EXHAUSTIVE").is_ok() { 1 } else { 1021 };
    let mut block = Vec::with_capacity(1 << 16);
    for bits in (0..=u32::MAX).step_by(step) {
        block.push(f32::from_bits(bits));
        if block.len() == block.capacity() {
            check(&block);
            block.clear();
        }
    }
    check(&block);
}

#[test]
fn one_place_around_every_special_point() {
    let overflow = f32::MAX.ln();
    let ties = (-151..=129).map(|n| (n as f32 + 0.5) * std::f32::consts::LN_2);
    let points = [0.0f32, -0.0, 1.0, overflow, 89.0, -87.336_54, -103.278_93, -103.972_08, -104.0, -104.8, f32::MAX];
    for point in points.into_iter().chain(ties) {
        for x in [point, -point] {
            check(&(-2000..2000).map(|step| f32::from_bits(x.to_bits().wrapping_add_signed(step))).collect::<Vec<_>>());
        }
    }
}

#[test]
fn exact_where_that_is_promised() {
    let x = [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, f32::MAX, f32::MIN, 88.72284, -103.98];
    let mut y = [7.0; 8];
    exp_into(&x, &mut y).unwrap();
    assert_eq!(y, [1.0, 1.0, 0.0, f32::INFINITY, f32::INFINITY, 0.0, f32::INFINITY, 0.0]);
    let mut small = [-100.0, f32::NAN];
    exp_in_place(&mut small);
    assert!(small[0] > 0.0 && small[0].is_subnormal() && small[1].is_nan());
}

#[test]
fn every_length() {
    for len in 0..40 {
        let x: Vec<f32> = (0..len).map(|i| i as f32 * 0.37 - 5.0).collect();
        let mut out = vec![0.0; len];
        exp_into(&x, &mut out).unwrap();
        let mut in_place = x.clone();
        exp_in_place(&mut in_place);
        assert_eq!(out, in_place);
        check(&x);
        assert!(exp_into(&x, &mut vec![0.0; len + 1]).is_err());
    }
}
