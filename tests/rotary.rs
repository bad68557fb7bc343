//! Promise: rotary tables are within their bound at any position; rotating is the definition, bit for bit, for all types and
//! strides, and writes nothing else. A refused call has written nothing.

mod support;

use flashtile::{AnyTensorMut, Element, Error, Positions, Rotary, TensorMut, TensorRef, bf16, f16, rotary_frequencies};
use support::layouts::ARRANGEMENTS;
use support::{Rng, len};

/// The cosine and sine of `position * frequency`, whose product is exact: its rounding error is turned back.
fn exact(position: usize, frequency: f64) -> (f64, f64) {
    let angle = position as f64 * frequency;
    let rest = (position as f64).mul_add(frequency, -angle);
    let (sin, cos) = angle.sin_cos();
    (cos - rest * sin, sin + rest * cos)
}

#[test]
fn tables_are_within_their_bound() {
    let frequencies = rotary_frequencies(64, 10_000.0).unwrap();
    assert_eq!((frequencies.len(), frequencies[0], frequencies[16]), (32, 1.0, 0.01));
    let positions = 1 << 20;
    // Some frequencies of a long table: all pairs would take a while.
    for frequency in [1.0, frequencies[1], frequencies[17], frequencies[31], 1.0 / 3.0, -0.7] {
        let rotary = Rotary::from_frequencies(&[frequency], positions).unwrap();
        let mut largest = 0.0f64;
        for position in (0..4096).chain((4096..positions).step_by(61)).chain(positions - 64..positions) {
            let (cos, sin) = exact(position, frequency);
            let bound = 2f64.powi(-25) + (position as f64 * frequency).abs() * 2f64.powi(-52);
            for (table, exact) in [(rotary.cos(), cos), (rotary.sin(), sin)] {
                let error = (f64::from(table.get([position, 0]).unwrap()) - exact).abs();
                assert!(error <= bound, "position {position}, frequency {frequency}: {error:e} above {bound:e}");
                largest = largest.max(error);
            }
        }
        assert!(largest > 1e-8, "{largest:e}: nothing was rounded");
    }
    let scaled = Rotary::with_magnitude(&[1.0], 1.25, 10).unwrap();
    assert_eq!(scaled.cos().get([3, 0]), Some((1.25 * 3f64.cos()) as f32));
    assert_eq!(scaled.sin().get([3, 0]), Some((1.25 * 3f64.sin()) as f32));
}

/// The definition, one row.
fn rotate(rotary: &Rotary, position: usize, row: &mut [f32]) {
    for p in 0..rotary.dim() / 2 {
        let (cos, sin) = (rotary.cos().get([position, p]).unwrap(), rotary.sin().get([position, p]).unwrap());
        let (x, y) = if rotary.is_interleaved() { (2 * p, 2 * p + 1) } else { (p, p + rotary.dim() / 2) };
        (row[x], row[y]) = (row[x] * cos - row[y] * sin, row[x] * sin + row[y] * cos);
    }
}

fn rotating_is_the_definition<T: Element, U: Element>() {
    let mut rng = Rng(5);
    let shapes = [[2, 3, 4, 8], [1, 2, 3, 70], [2, 1, 2, 300], [1, 1, 5, 2], [2, 2, 1, 1], [1, 2, 0, 8], [0, 2, 3, 8]];
    for shape in shapes {
        let [batch, heads, seq, dim] = shape;
        for rotated in [dim / 2 * 2, dim / 4 * 2, 0] {
            let half = Rotary::new(rotated, 10.0, 50).unwrap();
            for rotary in [half.clone(), half.interleaved()] {
                let starts: Vec<i64> = (0..batch).map(|_| rng.below(40) as i64).collect();
                let ids: Vec<u32> = (0..batch * seq).map(|_| rng.below(50) as u32).collect();
                let (b_of, i_of) = (|t: usize| t / seq.max(1), |t: usize| t % seq.max(1));
                let of = |f: &dyn Fn(usize) -> usize| (0..batch * seq).map(f).collect::<Vec<_>>();
                let lists = [
                    (Positions::Start(7), of(&|t| 7 + i_of(t))),
                    (Positions::per_batch(&starts), of(&|t| starts[b_of(t)] as usize + i_of(t))),
                    (Positions::each(&ids), of(&|t| ids[t] as usize)),
                ];
                for (positions, list) in lists {
                    let x: Vec<T> = rng.normals(len(shape));
                    // The same numbers, rotated by the definition.
                    let mut expected: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
                    for (n, row) in expected.chunks_mut(dim.max(1)).enumerate() {
                        rotate(&rotary, list[n / seq / heads * seq + n % seq], row);
                    }
                    for (from, to) in ARRANGEMENTS.into_iter().zip(ARRANGEMENTS.into_iter().cycle().skip(3)) {
                        let case = || format!("{shape:?} {rotary:?} {positions:?} {from:?} {to:?}");
                        let (from, to) = (from.of(shape), to.of(shape));
                        let place = |layout: &support::layouts::Layout, n: usize| {
                            let index = [n / dim / seq / heads, n / dim / seq % heads, n / dim % seq, n % dim];
                            let offset: isize = (0..4).map(|axis| index[axis] as isize * layout.strides[axis]).sum();
                            layout.offset.strict_add_signed(offset)
                        };
                        let gap = 99.0;
                        let mut data = vec![T::from_f32(gap); from.len];
                        (0..x.len()).for_each(|n| data[place(&from, n)] = x[n]);
                        let mut out = vec![U::from_f32(gap); to.len];
                        rotary
                            .rotate_into(
                                TensorRef::with_strides(&data, from.offset, shape, from.strides).unwrap(),
                                positions,
                                TensorMut::with_strides(&mut out, to.offset, shape, to.strides).unwrap(),
                            )
                            .unwrap();
                        let mut right = vec![U::from_f32(gap); to.len];
                        (0..x.len()).for_each(|n| right[place(&to, n)] = U::from_f32(expected[n]));
                        assert!(out == right, "{}", case());

                        let mut right = vec![T::from_f32(gap); from.len];
                        (0..x.len()).for_each(|n| right[place(&from, n)] = T::from_f32(expected[n]));
                        let tensor = TensorMut::with_strides(&mut data, from.offset, shape, from.strides).unwrap();
                        rotary.rotate(tensor, positions).unwrap();
                        assert!(data == right, "in place: {}", case());
                    }
                }
            }
        }
    }
}

#[test]
fn rotating_is_the_definition_for_all_types() {
    rotating_is_the_definition::<f32, f32>();
    rotating_is_the_definition::<f32, f16>();
    rotating_is_the_definition::<f32, bf16>();
    rotating_is_the_definition::<f16, f32>();
    rotating_is_the_definition::<f16, f16>();
    rotating_is_the_definition::<bf16, f16>();
    rotating_is_the_definition::<bf16, bf16>();
}

/// Scores depend on the distance of query and key alone.
#[test]
fn products_depend_on_distances() {
    let rotary = Rotary::new(64, 10_000.0, 1_000_000).unwrap();
    let mut rng = Rng(1);
    let (q, k): (Vec<f32>, Vec<f32>) = (rng.normals(64), rng.normals(64));
    let score = |query: usize, key: usize| {
        let rotated = |x: &[f32], position| {
            let mut x = x.to_vec();
            rotary.rotate(TensorMut::from_slice(&mut x, [1, 1, 1, 64]).unwrap(), Positions::Start(position)).unwrap();
            x
        };
        rotated(&q, query).iter().zip(rotated(&k, key)).map(|(q, k)| f64::from(q * k)).sum::<f64>()
    };
    for distance in [0, 1, 100] {
        let expected = score(distance, 0);
        for key in [1, 1000, 999_000] {
            assert!((score(key + distance, key) - expected).abs() < 2e-5, "{distance} from {key}");
        }
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, error: Error, sentence: &str) {
    let got = result.expect_err(sentence);
    assert_eq!((got.to_string().as_str(), got), (sentence, error));
}
/// Packed tokens, `[total, heads, head_dim]`, each at a position of its own: the rows of a call with a batch axis.
#[test]
fn packed_tokens_are_a_batch_of_one() {
    let (total, heads, dim) = (5, 3, 8);
    let rotary = Rotary::new(dim, 1e4, 40).unwrap();
    let ids = [0u32, 1, 2, 30, 7];
    let data: Vec<f32> = (0..total * heads * dim).map(|n| (n as f32 * 0.37).sin()).collect();
    let mut expected = data.clone();
    for (token, id) in ids.into_iter().enumerate() {
        let row = TensorMut::from_slice(&mut expected[token * heads * dim..][..heads * dim], [1, heads, 1, dim]);
        rotary.rotate(row.unwrap(), Positions::Start(id as usize)).unwrap();
    }
    let mut in_place = data.clone();
    rotary.rotate(TensorMut::from_slice(&mut in_place, [total, heads, dim]).unwrap(), Positions::each(&ids)).unwrap();
    assert_eq!(in_place, expected);
    let (from, mut out) = (TensorRef::from_slice(&data, [total, heads, dim]).unwrap(), vec![0.0f32; data.len()]);
    let to = TensorMut::from_slice(&mut out, [total, heads, dim]).unwrap();
    rotary.rotate_into(from, Positions::each(&ids), to).unwrap();
    assert_eq!(out, expected);
    // Five positions, not three: the first axis is the tokens.
    let to = TensorMut::from_slice(&mut out, [total, heads, dim]).unwrap();
    let error = Error::WrongCount { what: "positions", expected: 5, got: 3 };
    assert_eq!(rotary.rotate(to, Positions::each(&ids[..3])), Err(error));
}

#[test]
fn wrong_calls_write_nothing() {
    let invalid = |option, got, expected| Error::InvalidOption { option, got, expected };
    refused(Rotary::new(7, 1e4, 9), invalid("rotary dim", 7.0, "even"), "rotary dim is 7 but must be even");
    for base in [0.0, -1.0, f64::INFINITY, f64::NAN] {
        assert!(matches!(Rotary::new(8, base, 9), Err(Error::InvalidOption { option: "rotary base", .. })));
    }
    let infinity = f64::INFINITY;
    let error = invalid("rotary frequency", f32::INFINITY, "finite");
    refused(Rotary::from_frequencies(&[1.0, infinity], 9), error, "rotary frequency is inf but must be finite");
    let error = invalid("rotary magnitude", f32::INFINITY, "finite");
    refused(Rotary::with_magnitude(&[1.0], infinity, 9), error, "rotary magnitude is inf but must be finite");
    for (dim, positions) in [(8, usize::MAX), (8, usize::MAX / 32), (usize::MAX - 1, 1)] {
        let error = Error::TooLarge { what: "the rotary table" };
        refused(Rotary::new(dim, 1e4, positions), error, "the rotary table would not fit in memory");
    }
    assert_eq!(Rotary::new(0, 1e4, usize::MAX).unwrap().positions(), usize::MAX);
    let table = |shape| TensorRef::<f32, 2>::with_strides(&[0.0], 0, shape, [0, 0]).unwrap();
    refused(
        Rotary::from_tables(table([3, 4]), table([3, 5])),
        Error::ShapeMismatch { tensor: "sines", dimension: "pairs", expected: 4, got: 5 },
        "pairs of the sines is 5 but must be 4",
    );
    let error = Error::TooLarge { what: "the rotary table" };
    let endless = table([usize::MAX, 4]);
    refused(Rotary::from_tables(endless, endless), error, "the rotary table would not fit in memory");

    let rotary = Rotary::new(8, 1e4, 20).unwrap();
    let mut data = [1.0f32; 2 * 3 * 8];
    let mut out = [1.0f32; 2 * 3 * 8];
    let shape = [2, 1, 3, 8];
    let mut call =
        |positions: Positions<'_>, shape: [usize; 4], out_shape: [usize; 4], error: Error, sentence: &str| {
            let x = TensorRef::with_strides(&data, 0, shape, [24, 24, 8, 1]).unwrap();
            let to = TensorMut::with_strides(&mut out, 0, out_shape, [24, 24, 8, 1]).unwrap();
            refused(rotary.rotate_into(x, positions, to), error.clone(), sentence);
            if shape == out_shape {
                let x = TensorMut::with_strides(&mut data, 0, shape, [24, 24, 8, 1]).unwrap();
                refused(rotary.rotate(x, positions), error, sentence);
            }
        };
    let error = |position| Error::PositionOutOfRange { position, positions: 20 };
    let start = Positions::Start;
    call(start(18), shape, shape, error(20), "the position 20 is not in the rotary table, which has 20");
    let sentence = "the position 18446744073709551617 is not in the rotary table, which has 20";
    call(start(usize::MAX), shape, shape, error(u64::MAX as i128 + 2), sentence);
    let sentence = "the position -1 is not in the rotary table, which has 20";
    call(Positions::per_batch(&[5i32, -1]), shape, shape, error(-1), sentence);
    let sentence = "the position 22 is not in the rotary table, which has 20";
    call(Positions::each(&[0u32, 0, 0, 0, 22, 0]), shape, shape, error(22), sentence);
    let count = |expected, got| Error::WrongCount { what: "positions", expected, got };
    call(Positions::per_batch(&[5u64]), shape, shape, count(2, 1), "1 positions were given but there must be 2");
    call(Positions::each(&[5u64; 7]), shape, shape, count(6, 7), "7 positions were given but there must be 6");
    let mismatch = |tensor, dimension, expected, got| Error::ShapeMismatch { tensor, dimension, expected, got };
    let narrow = [2, 1, 3, 7];
    let sentence = "head_dim of the input is 7 but must be 8";
    call(start(0), narrow, narrow, mismatch("input", "head_dim", 8, 7), sentence);
    let sentence = "seq of the output is 2 but must be 3";
    call(start(0), shape, [2, 1, 2, 8], mismatch("output", "seq", 3, 2), sentence);

    let (two, three) =
        (TensorRef::from_slice(&data, [6, 8]).unwrap(), TensorRef::from_slice(&data, [2, 3, 8]).unwrap());
    fn to(out: &mut [f32]) -> AnyTensorMut<'_> {
        TensorMut::from_slice(out, [2, 3, 8]).unwrap().into()
    }
    let rank = |tensor, expected, got| Error::Rank { tensor, expected, got };
    let to_two = TensorMut::from_slice(&mut out, [6, 8]).unwrap();
    assert_eq!(rotary.rotate_into(two, start(0), to_two), Err(rank("input", 4, 2)));
    assert_eq!(rotary.rotate(TensorMut::from_slice(&mut out, [6, 8]).unwrap(), start(0)), Err(rank("input", 4, 2)));
    assert_eq!(rotary.rotate_into(three.insert_axis(0).unwrap(), start(0), to(&mut out)), Err(rank("output", 4, 3)));
    let four = TensorMut::from_slice(&mut out, [1, 2, 3, 8]).unwrap();
    assert_eq!(rotary.rotate_into(three, start(0), four), Err(rank("output", 3, 4)));
    assert!(data == [1.0; 48] && out == [1.0; 48]);

    // Any number of rows without elements takes no time.
    let nothing = Rotary::new(0, 1e4, 1 << 62).unwrap();
    let many = || TensorMut::<f32, 4>::from_slice(&mut [], [1 << 30, 1 << 30, 1, 0]).unwrap();
    nothing.rotate(many(), start(0)).unwrap();
    let many_refs = TensorRef::<f32, 4>::from_slice(&[], [1 << 30, 1 << 30, 1, 0]).unwrap();
    nothing.rotate_into(many_refs, start(0), many()).unwrap();
}
