//! Rotary embeddings through C: Rust's bits for all types, layouts and ways to give positions. A refused call writes nothing.

use super::{BF16, F16, F32, F64, last_error, random, tensor, tensor_mut};
use flashtile::capi::*;
use flashtile::{AnyTensorMut, Element, Positions, Rotary, TensorMut, TensorRef, bf16, f16};
use std::ptr::{null, null_mut};

const BATCH: usize = 2;
const HEADS: usize = 3;
const COUNT: usize = 4;
const DIM: usize = 10;
const SHAPE: [usize; 4] = [BATCH, HEADS, COUNT, DIM];
const LEN: usize = BATCH * HEADS * COUNT * DIM;

/// A table of C, freed at the end.
struct Table(*mut Rotary);

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: made by the library, and no longer used.
        unsafe { flashtile_rotary_free(self.0) };
    }
}

fn table(make: impl FnOnce(*mut *mut Rotary) -> i32) -> Table {
    let mut table = null_mut();
    assert_eq!(make(&mut table), 0, "{}", last_error());
    Table(table)
}

fn at(table: &Table, positions: &[i64]) -> Rotation {
    Rotation { positions: positions.as_ptr(), position_count: positions.len() as i64, ..Rotation::new(table.0) }
}

fn as_i64<const N: usize>(shape: [usize; N]) -> [i64; N] {
    shape.map(|n| n as i64)
}

/// Both tables, of each constructor and pairing.
fn tables() -> Vec<(Rotary, Table)> {
    let frequencies = [1.0, 0.25, -0.5];
    let (cos, sin) = (random(40 * 2), random(40 * 2));
    let half: Vec<f16> = cos.iter().map(|&x| f16::from_f32(x)).collect();
    let wide: Vec<bf16> = cos.iter().map(|&x| bf16::from_f32(x)).collect();
    let paired = |rotary: Rotary, pairing| if pairing == 1 { rotary.interleaved() } else { rotary };
    let mut all = Vec::new();
    for pairing in [0, 1] {
        // SAFETY: all of these are what they say.
        let made = unsafe {
            let [c, s] = [&cos, &sin].map(|list| tensor(list, F32, &[40, 2]));
            let turned = Tensor { strides: [1, 40, 0, 0], ..c };
            let halves = tensor(&half, F16, &[40, 2]);
            let wides = tensor(&wide, BF16, &[40, 2]);
            [
                table(|to| flashtile_rotary_new(8, 100.0, 40, pairing, to)),
                table(|to| flashtile_rotary_from_frequencies(frequencies.as_ptr(), 3, 1.0, 40, pairing, to)),
                table(|to| flashtile_rotary_from_frequencies(frequencies.as_ptr(), 3, 1.25, 40, pairing, to)),
                table(|to| flashtile_rotary_from_tables(&c, &s, pairing, to)),
                table(|to| flashtile_rotary_from_tables(&turned, &s, pairing, to)),
                table(|to| flashtile_rotary_from_tables(&halves, &halves, pairing, to)),
                table(|to| flashtile_rotary_from_tables(&wides, &wides, pairing, to)),
            ]
        };
        fn of<T: Element>(list: &[T]) -> TensorRef<'_, T, 2> {
            TensorRef::from_slice(list, [40, 2]).unwrap()
        }
        let turned = TensorRef::with_strides(&cos, 0, [40, 2], [1, 40]).unwrap();
        let rust = [
            Rotary::new(8, 100.0, 40),
            Rotary::from_frequencies(&frequencies, 40),
            Rotary::with_magnitude(&frequencies, 1.25, 40),
            Rotary::from_tables(of(&cos), of(&sin)),
            Rotary::from_tables(turned, of(&sin)),
            Rotary::from_tables(of(&half), of(&half)),
            Rotary::from_tables(of(&wide), of(&wide)),
        ];
        all.extend(rust.into_iter().map(|rotary| paired(rotary.unwrap(), pairing)).zip(made));
    }
    all
}

/// From `T` to `U`, and in place, `[batch, heads, seq, dim]` stored `[batch, seq, heads, dim]`.
fn rotates<T: Element, U: Element>([from, to]: [i32; 2]) {
    let strides = [COUNT * HEADS * DIM, DIM, HEADS * DIM, 1];
    let x: Vec<T> = random(LEN).into_iter().map(T::from_f32).collect();
    let rust_strides = strides.map(|stride| stride as isize);
    let laid = |tensor: Tensor| Tensor { strides: as_i64(strides), ..tensor };
    let (start, starts) = ([30i64], [0i64, 36]);
    let each: [i64; BATCH * COUNT] = [5, 4, 3, 39, 0, 0, 17, 2];
    for (rotary, table) in tables() {
        for (list, positions) in [
            (&start[..], Positions::Start(30)),
            (&starts[..], Positions::per_batch(&starts)),
            (&each[..], Positions::each(&each)),
        ] {
            let rotation = at(&table, list);
            let (mut expected, mut got) = (vec![U::default(); LEN], vec![U::default(); LEN]);
            let view = TensorRef::with_strides(&x, 0, SHAPE, rust_strides).unwrap();
            let into = TensorMut::from_slice(&mut expected, SHAPE).unwrap();
            rotary.rotate_into(view, positions, into).unwrap();
            let input = laid(tensor(&x, from, &as_i64(SHAPE)));
            let out = tensor_mut(&mut got, to, &as_i64(SHAPE));
            // SAFETY: all of these are what they say.
            assert_eq!(unsafe { flashtile_rotate(&rotation, &input, &out) }, 0, "{}", last_error());
            assert_eq!(got, expected, "{rotary:?} {list:?}");

            let (mut expected, mut got) = (x.clone(), x.clone());
            let into = TensorMut::with_strides(&mut expected, 0, SHAPE, rust_strides).unwrap();
            rotary.rotate(into, positions).unwrap();
            let both = laid(tensor_mut(&mut got, from, &as_i64(SHAPE)));
            // SAFETY: as above.
            assert_eq!(unsafe { flashtile_rotate(&rotation, &both, &both) }, 0, "{}", last_error());
            assert_eq!(got, expected, "in place, {rotary:?} {list:?}");
        }
    }
}

#[test]
fn rotating_is_that_of_rust() {
    rotates::<f32, f32>([F32, F32]);
    rotates::<f32, f16>([F32, F16]);
    rotates::<f16, bf16>([F16, BF16]);
    rotates::<bf16, f32>([BF16, F32]);
    rotates::<f16, f16>([F16, F16]);
}

#[test]
fn packed_tokens_are_a_batch_of_one() {
    let (rotary, table) = tables().swap_remove(0);
    let shape = [6, HEADS, DIM];
    let x = random(6 * HEADS * DIM);
    let ids = [0i64, 1, 2, 20, 0, 1];
    for (list, positions) in [(&ids[..], Positions::each(&ids)), (&ids[3..4], Positions::Start(20))] {
        let (mut expected, mut got) = (x.clone(), x.clone());
        let into: AnyTensorMut<'_> = TensorMut::from_slice(&mut expected, shape).unwrap().into();
        rotary.rotate(into, positions).unwrap();
        let both = tensor_mut(&mut got, F32, &as_i64(shape));
        // SAFETY: all of these are what they say.
        assert_eq!(unsafe { flashtile_rotate(&at(&table, list), &both, &both) }, 0, "{}", last_error());
        assert_eq!(got, expected);
        let (input, mut other) = (tensor(&x, F32, &as_i64(shape)), vec![0.0f32; x.len()]);
        let out = tensor_mut(&mut other, F32, &as_i64(shape));
        // SAFETY: as above.
        assert_eq!(unsafe { flashtile_rotate(&at(&table, list), &input, &out) }, 0, "{}", last_error());
        assert_eq!(other, expected);
    }
}

fn check(code: i32, expected: Code, words: &str) {
    let message = last_error();
    assert_eq!(code, expected as i32, "{words}: {message}");
    assert!(message.contains(words), "{message:?} does not say {words:?}");
}

#[test]
fn wrong_tables_are_refused() {
    use Code::*;
    let nowhere = std::ptr::without_provenance_mut::<Rotary>(8);
    let mut rotary = nowhere;
    let to = &raw mut rotary;
    let (list, numbers) = ([1.0, f64::INFINITY], [0.5f32; 8]);
    let table = tensor(&numbers, F32, &[4, 2]);
    // SAFETY: all of these are what they say, or are refused.
    unsafe {
        check(flashtile_rotary_new(8, 100.0, 40, 0, null_mut()), NullPointer, "rotary table");
        check(flashtile_rotary_new(8, 100.0, 40, 0, to.wrapping_byte_add(1)), Misaligned, "rotary table");
        check(flashtile_rotary_new(7, 100.0, 40, 0, to), InvalidOption, "rotary dim is 7 but must be even");
        check(flashtile_rotary_new(-2, 100.0, 40, 0, to), NegativeSize, "dim");
        check(
            flashtile_rotary_new(8, 0.0, 40, 0, to),
            InvalidOption,
            "rotary base is 0 but must be positive and finite",
        );
        check(flashtile_rotary_new(8, 100.0, -1, 0, to), NegativeSize, "positions");
        check(flashtile_rotary_new(8, 100.0, i64::MAX, 0, to), TooLarge, "the rotary table");
        check(flashtile_rotary_new(8, 100.0, 40, 2, to), InvalidOption, "pairing is 2 but must be 0 or 1");
        let from = flashtile_rotary_from_frequencies;
        check(from(list.as_ptr(), 2, 1.0, 4, 0, to), InvalidOption, "rotary frequency is inf");
        check(from(list.as_ptr(), 1, f64::NAN, 4, 0, to), InvalidOption, "rotary magnitude is NaN");
        check(from(null(), 1, 1.0, 4, 0, to), NullPointer, "frequencies");
        check(from(list.as_ptr(), -1, 1.0, 4, 0, to), NegativeSize, "frequencies");
        check(from(list.as_ptr(), 1, 1.0, 4, -1, to), InvalidOption, "pairing is -1");
        let from = flashtile_rotary_from_tables;
        check(from(null(), &table, 0, to), NullPointer, "cosines");
        check(from(&table, null(), 0, to), NullPointer, "sines");
        check(from(&table, &Tensor { dtype: F16, ..table }, 0, to), BadDtype, "must be that of the cosines");
        check(from(&Tensor { dtype: F64, ..table }, &table, 0, to), BadDtype, "cosines");
        check(from(&Tensor { rank: 3, ..table }, &table, 0, to), BadRank, "cosines");
        let short = Tensor { shape: [3, 2, 0, 0], ..table };
        check(from(&table, &short, 0, to), ShapeMismatch, "positions of the sines is 3 but must be 4");
        check(from(&table, &table, 3, to), InvalidOption, "pairing is 3");
        flashtile_rotary_free(null_mut());
    }
    assert_eq!(rotary, nowhere, "nothing is written");
}

#[test]
fn wrong_rotations_write_nothing() {
    use Code::*;
    let (_, table) = tables().swap_remove(0);
    let (x, mut memory) = (random(LEN), vec![9.0f32; LEN]);
    let (input, out) = (tensor(&x, F32, &as_i64(SHAPE)), tensor_mut(&mut memory, F32, &as_i64(SHAPE)));
    let list = [0i64; 16];
    let right = at(&table, &list[..1]);
    let refuse = |rotation: *const Rotation, x: *const Tensor, out: *const Tensor, expected, words: &str| {
        // SAFETY: all of these are what they say, or are refused.
        check(unsafe { flashtile_rotate(rotation, x, out) }, expected, words);
    };
    refuse(null(), &input, &out, NullPointer, "rotation");
    refuse((&raw const right).wrapping_byte_add(1), &input, &out, Misaligned, "rotation");
    refuse(&Rotation { rotary: null(), ..right }, &input, &out, NullPointer, "rotary table");
    refuse(&Rotation::new(table.0), &input, &out, NullPointer, "a rotation outside a cache needs them");
    refuse(&Rotation { position_count: -1, ..right }, &input, &out, NegativeSize, "positions");
    let words = "3 positions were given but there must be 1, 2 (one of each sequence) or 8 (one of each token)";
    refuse(&at(&table, &list[..3]), &input, &out, WrongCount, words);
    refuse(
        &at(&table, &[37]),
        &input,
        &out,
        PositionOutOfRange,
        "the position 40 is not in the rotary table, which has 40",
    );
    refuse(&at(&table, &[-1]), &input, &out, PositionOutOfRange, "the position -1");
    refuse(&at(&table, &[0, -1]), &input, &out, PositionOutOfRange, "the position -1");
    refuse(&right, null(), &out, NullPointer, "input");
    refuse(&right, &input, null(), NullPointer, "output");
    refuse(&right, &Tensor { dtype: F64, ..input }, &out, BadDtype, "input");
    refuse(&right, &Tensor { rank: 2, ..input }, &out, BadRank, "rank of the input is 2 but must be 3 to 4");
    let narrow = |tensor: Tensor| Tensor { shape: [2, 3, 4, 7], ..tensor };
    let none = Tensor { shape: [0, 3, 4, 10], ..out };
    // SAFETY: there are no elements, and so no positions.
    assert_eq!(unsafe { flashtile_rotate(&Rotation::new(table.0), &none, &none) }, Code::Ok as i32, "{}", last_error());
    refuse(&right, &narrow(input), &narrow(out), ShapeMismatch, "head_dim of the input is 7 but must be 8");
    refuse(&right, &input, &narrow(out), ShapeMismatch, "head_dim of the output is 7 but must be 10");
    refuse(&right, &input, &Tensor { strides: [0, 10, 30, 1], ..out }, OverlappingOutput, "axis 0");
    let shifted = Tensor { data: out.data.wrapping_byte_add(4), shape: [1, 3, 4, 10], ..out };
    refuse(&right, &shifted, &Tensor { shape: [1, 3, 4, 10], ..out }, Overlap, "input");
    let inside = Rotation { positions: out.data.cast_const().cast(), ..right };
    refuse(&inside, &input, &out, Overlap, "positions");
    assert!(memory.iter().all(|&x| x == 9.0));
}
