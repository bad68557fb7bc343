//! Promise: a wrong call is refused before anything is written, and the error has the numbers that disagree. No shape, stride,
//! offset or option makes a call panic, overflow, run without end or allocate memory out of proportion.
//!
//! The counters of the allocator belong to the whole process, so this is a single test.

mod support;

use flashtile::softmax::{Axis, CrossEntropy, Softmax};
use flashtile::{
    AlibiSlopes, AnyTensorMut, AnyTensorRef, Attention, Error, Form, QueryOffset, ScoreStage, TensorMut, TensorRef,
    Workspace, alibi_slope, merge, reference,
};
use std::ops::{Bound, Range};
use support::counting::Counting;
use support::problems::FORMS;
use support::watchdog::within;
use support::{Rng, len};

#[global_allocator]
static COUNTING: Counting = Counting::new();

#[test]
fn wrong_calls() {
    within(60, "wrong calls", || {
        Counting::watch();
        tensors();
        views();
        ranks();
        problems();
        options();
        outputs();
        prepared();
        too_large();
        endless_keys();
        softmax();
        extreme_options();
        extreme_tensors();
        extreme_problems();
    });
}

/// Checks that a call was refused with this error and this sentence.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, error: Error, sentence: &str) {
    let got = result.expect_err(sentence);
    assert_eq!(got, error);
    assert_eq!(got.to_string(), sentence);
}

/// Softmax and cross-entropy with options. `tests/softmax_masked.rs` and `tests/softmax_cross_entropy.rs` have the other refusals.
fn softmax() {
    let x = [0.5f32; 6];
    let axis = Axis::new(&[2, 3], 1).unwrap();
    let (mut loss, mut out) = ([9.0f32], [9.0f32; 6]);
    refused(
        Axis::new(&[2, 3], -3),
        Error::AxisOutOfRange { axis: -3, rank: 2 },
        "there is no axis -3, counted from -1 at the end: the array has 2",
    );
    refused(
        CrossEntropy::new().loss_into(&x, &[0i64, -1], axis, &mut loss),
        Error::ClassOutOfRange { row: 1, class: -1, classes: 3 },
        "row 1 has class -1 but there are only 3, counted from 0",
    );
    refused(
        CrossEntropy::new().label_smoothing(-0.5).loss_into(&x, &[0i64, 1], axis, &mut loss),
        Error::InvalidOption { option: "label smoothing", got: -0.5, expected: "between 0 and 1" },
        "label smoothing is -0.5 but must be between 0 and 1",
    );
    let bias = TensorRef::from_slice(&x, [3, 2]).unwrap();
    let tensor = TensorRef::from_slice(&x, [2, 3]).unwrap();
    refused(
        Softmax::new().bias(bias).softmax_into(tensor, TensorMut::from_slice(&mut out, [2, 3]).unwrap()),
        Error::NotBroadcastable { tensor: "bias", dimension: "axis -2", got: 3, expected: 2 },
        "axis -2 of the bias is 3 but must be 2, or 1 to repeat",
    );
    // Many lines without elements, and targets for none of them.
    let axis = Axis::new(&[usize::MAX, 0], 1).unwrap();
    refused(
        CrossEntropy::new().loss_into::<f32>(&[], &[0i64; 0], axis, &mut loss),
        Error::WrongCount { what: "targets", expected: usize::MAX, got: 0 },
        &format!("0 targets were given but there must be {}", usize::MAX),
    );
    let empty = TensorRef::<f32, 2>::with_strides(&[], 0, [usize::MAX, 0], [0, 0]).unwrap();
    let none = TensorMut::<f32, 2>::with_strides(&mut [], 0, [usize::MAX, 0], [0, 0]).unwrap();
    Softmax::new().softmax_into(empty, none).unwrap();
    assert!(loss == [9.0] && out == [9.0; 6]);
}

/// Tensors that don't fit their slice, or overlap.
fn tensors() {
    let data = [0.0f32; 24];
    refused(
        TensorRef::from_slice(&data, [1, 2, 3, 5]),
        Error::SliceLength { expected: 30, got: 24 },
        "the shape needs 30 elements but the slice has 24",
    );
    refused(
        TensorMut::from_slice(&mut data.clone(), [1, 2, 3, 5]),
        Error::SliceLength { expected: 30, got: 24 },
        "the shape needs 30 elements but the slice has 24",
    );
    refused(
        TensorRef::with_strides(&data, 1, [1, 2, 3, 4], [24, 12, 4, 1]),
        Error::OutOfBounds { first: 1, last: 24, len: 24 },
        "shape and strides reach elements 1 to 24 of a slice of 24",
    );
    refused(
        TensorRef::with_strides(&data, 3, [2, 2], [-4, 1]),
        Error::OutOfBounds { first: -1, last: 4, len: 24 },
        "shape and strides reach elements -1 to 4 of a slice of 24",
    );
    refused(
        TensorMut::with_strides(&mut data.clone(), 0, [2, 3], [2, 1]),
        Error::OverlappingOutput { axis: 0, stride: 2, needed: 3 },
        "elements of the output overlap: axis 0 has stride 2 but needs at least 3 either way",
    );
    refused(
        TensorMut::with_strides(&mut data.clone(), 5, [4, 2], [0, -3]),
        Error::OverlappingOutput { axis: 0, stride: 0, needed: 1 },
        "elements of the output overlap: axis 0 has stride 0 but needs at least 1 either way",
    );
    refused(
        TensorMut::with_strides(&mut data.clone(), 9, [2, 3, 3], [9, -3, 2]),
        Error::OverlappingOutput { axis: 1, stride: -3, needed: 5 },
        "elements of the output overlap: axis 1 has stride -3 but needs at least 5 either way",
    );
    refused(
        TensorRef::from_slice(&data, [usize::MAX, 2, 1, 1]),
        Error::TooLarge { what: "the tensor" },
        "the tensor would not fit in memory",
    );
    let tensor = TensorRef::from_slice(&data, [1, 2, 3, 4]).unwrap();
    refused(
        tensor.permuted([0, 1, 2, 4]),
        Error::AxisOutOfRange { axis: 4, rank: 4 },
        "there is no axis 4, counted from 0: the array has 4",
    );
    assert_eq!(tensor.permuted([0, 1, 1, 3]).unwrap_err(), Error::AxisOutOfRange { axis: 1, rank: 4 });
}

fn to(buffer: &mut [f32; 24]) -> TensorMut<'_, f32> {
    TensorMut::from_slice(buffer, [1, 2, 3, 4]).unwrap()
}

/// Axes and ranges that a tensor does not have.
fn views() {
    let (data, mut buffer) = ([0.0f32; 24], [0.0f32; 24]);
    let tensor = TensorRef::from_slice(&data, [1, 2, 3, 4]).unwrap();
    let any = AnyTensorRef::from(tensor);
    let mut narrowed = |axis, range: Range<usize>, error: Error, sentence: &str| {
        refused(tensor.narrow(axis, range.clone()), error.clone(), sentence);
        refused(any.narrow(axis, range.clone()), error.clone(), sentence);
        refused(to(&mut buffer).narrow(axis, range.clone()), error.clone(), sentence);
        refused(AnyTensorMut::from(to(&mut buffer)).narrow(axis, range), error, sentence);
    };
    let past_end = |axis, Range { start, end }, size| Error::RangeOutOfBounds { axis, start, end, size };
    let no_axis = |axis, rank| Error::AxisOutOfRange { axis, rank };
    narrowed(2, 1..4, past_end(2, 1..4, 3), "the range 1..4 does not lie within axis 2, which has size 3");
    narrowed(2, 4..4, past_end(2, 4..4, 3), "the range 4..4 does not lie within axis 2, which has size 3");
    #[allow(clippy::reversed_empty_ranges, reason = "a range that ends before it starts")]
    narrowed(3, 3..2, past_end(3, 3..2, 4), "the range 3..2 does not lie within axis 3, which has size 4");
    narrowed(4, 0..0, no_axis(4, 4), "there is no axis 4, counted from 0: the array has 4");
    narrowed(
        usize::MAX,
        0..0,
        no_axis(usize::MAX as i128, 4),
        &format!("there is no axis {}, counted from 0: the array has 4", usize::MAX),
    );
    // A range whose end overflows, although every representable end is inside the axis.
    let endless = TensorRef::with_strides(&data, 0, [usize::MAX], [0]).unwrap();
    assert_eq!(endless.narrow(0, ..=usize::MAX).unwrap_err(), past_end(0, 0..usize::MAX, usize::MAX));
    let start = (Bound::Excluded(usize::MAX), Bound::Unbounded);
    assert_eq!(endless.narrow(0, start).unwrap_err(), past_end(0, usize::MAX..usize::MAX, usize::MAX));

    assert_eq!(TensorRef::from_slice(&data, [2, 3, 4]).unwrap().insert_axis(4).unwrap_err(), no_axis(4, 4));
    assert_eq!(TensorMut::from_slice(&mut data.clone(), [24]).unwrap().insert_axis(2).unwrap_err(), no_axis(2, 2));
    let of_rank_3 = AnyTensorRef::from(TensorRef::from_slice(&data, [2, 3, 4]).unwrap());
    assert_eq!(of_rank_3.insert_axis(4).unwrap_err(), no_axis(4, 4));
    refused(
        any.insert_axis(0),
        Error::Rank { tensor: "tensor", expected: 4, got: 5 },
        "the rank of the tensor is 5 but must be 4",
    );
    refused(
        of_rank_3.permuted(&[0, 1]),
        Error::WrongCount { what: "axes", expected: 3, got: 2 },
        "2 axes were given but there must be 3",
    );
    assert_eq!(of_rank_3.permuted(&[0, 1, 3]).unwrap_err(), no_axis(3, 3));
    assert_eq!(of_rank_3.permuted(&[0, 1, 1]).unwrap_err(), no_axis(1, 3));
}

/// Queries, keys and values of rank 3, which have two readings: the same error from every call.
fn ranks() {
    let new = Attention::new;
    let (x, of_rank_3) = (zeros([1, 2, 3, 4]), zeros([2, 3, 4]));
    for (n, tensor) in ["queries", "keys", "values"].into_iter().enumerate() {
        let sentence = format!(
            "the rank of the {tensor} is 3 but must be 4: [batch, seq, hidden] needs splitting into heads, \
             [heads, seq, dim] needs a batch axis (insert_axis)"
        );
        let error = Error::Rank { tensor, expected: 4, got: 3 };
        let [q, k, v] = std::array::from_fn(|m| if m == n { TensorRef::from(of_rank_3) } else { x });
        assert_eq!([q, k, v].map(|x| x.shape()), [[1, 2, 3, 4]; 3]);
        refused(new().plan(q, (k, v)), error.clone(), &sentence);
        refused(new().prepare(q, (k, v)), error.clone(), &sentence);
        refused(reference::attention(&new(), q, (k, v)), error.clone(), &sentence);
        let (mut out, mut scores) = ([1.0f32; 24], [1.0f32; 18]);
        refused(new().run_into(q, k, v, to(&mut out)), error.clone(), &sentence);
        refused(new().compute(q, (k, v), to(&mut out), None, &mut Workspace::new()), error.clone(), &sentence);
        let prepared = new().prepare(x, (x, x)).unwrap();
        refused(prepared.compute(q, (k, v), to(&mut out), None, &mut Workspace::new()), error.clone(), &sentence);
        if n < 2 {
            let to = TensorMut::from_slice(&mut scores, [1, 2, 3, 3]).unwrap();
            refused(new().scores_into(ScoreStage::Raw, q, k, to), error.clone(), &sentence);
            refused(reference::scores(&new(), ScoreStage::Raw, q, k), error, &sentence);
        }
        assert!(out.iter().chain(&scores).all(|x| *x == 1.0));
    }
    // Directly from slices or arrays.
    let error = Error::Rank { tensor: "queries", expected: 4, got: 3 };
    assert_eq!(new().plan(of_rank_3, (x, x)).unwrap_err(), error);
    #[cfg(feature = "ndarray")]
    {
        let array = ndarray::Array3::<f32>::zeros((2, 3, 4));
        assert_eq!(new().run(&array, x, x).unwrap_err(), error);
        assert_eq!(new().run_with_lse(array.view(), x, x).unwrap_err(), error);
        assert_eq!(new().scores(ScoreStage::Raw, &array, x).unwrap_err(), error);
    }
    refused(
        new().plan(x, (zeros([3, 4]), x)),
        Error::Rank { tensor: "keys", expected: 4, got: 2 },
        "the rank of the keys is 2 but must be 4",
    );
    // With the axis inserted there is one reading.
    assert!(new().plan(of_rank_3.insert_axis(0).unwrap(), (x, x)).is_ok());
    // Masks and biases may be of lower rank.
    assert!(new().bias(zeros([2, 3, 3])).mask(TensorRef::from_slice(&[true; 3], [3]).unwrap()).plan(x, (x, x)).is_ok());

    let (mut out, mut lse) = ([1.0f32; 24], [1.0f32; 6]);
    let to_lse = TensorMut::from_slice(&mut lse, [1, 2, 3]).unwrap();
    let error = Error::Rank { tensor: "output to merge", expected: 4, got: 3 };
    assert_eq!(merge(to(&mut out), to_lse, of_rank_3, zeros([1, 2, 3])).unwrap_err(), error);
    assert!(out.iter().chain(&lse).all(|x| *x == 1.0));
}

/// A tensor of zeros that owns a single element.
fn zeros<const N: usize>(shape: [usize; N]) -> TensorRef<'static, f32, N> {
    TensorRef::with_strides(&[0.0], 0, shape, [0; N]).unwrap()
}

/// Tensors that don't fit together: the same error from every call.
fn problems() {
    let shape = |tensor, dimension, expected, got| {
        let sentence = format!("{dimension} of the {tensor} is {got} but must be {expected}");
        (Error::ShapeMismatch { tensor, dimension, expected, got }, sentence)
    };
    let (q, k, v) = ([2, 4, 3, 8], [2, 2, 5, 8], [2, 2, 5, 6]);
    for (q, k, v, (error, sentence)) in [
        (q, [3, 2, 5, 8], v, shape("keys", "batch", 2, 3)),
        (q, [2, 2, 5, 7], v, shape("keys", "head_dim", 8, 7)),
        (q, k, [1, 2, 5, 6], shape("values", "batch", 2, 1)),
        (q, k, [2, 4, 5, 6], shape("values", "heads_kv", 2, 4)),
        (q, k, [2, 2, 4, 6], shape("values", "seq_kv", 5, 4)),
        (
            q,
            [2, 3, 5, 8],
            [2, 3, 5, 6],
            (
                Error::HeadsNotDivisible { heads_q: 4, heads_kv: 3 },
                "4 query heads can't be shared out evenly over 3 key/value heads".into(),
            ),
        ),
        (
            q,
            [2, 0, 5, 8],
            [2, 0, 5, 6],
            (
                Error::HeadsNotDivisible { heads_q: 4, heads_kv: 0 },
                "4 query heads can't be shared out evenly over 0 key/value heads".into(),
            ),
        ),
    ] {
        let attention = Attention::new();
        refused(attention.plan(zeros(q), (zeros(k), zeros(v))), error.clone(), &sentence);
        refused(attention.prepare(zeros(q), (zeros(k), zeros(v))), error.clone(), &sentence);
        refused(reference::attention(&attention, zeros(q), (zeros(k), zeros(v))), error.clone(), &sentence);
        let mut out = vec![1.0f32; len([2, 4, 3, 6])];
        let to = TensorMut::from_slice(&mut out, [2, 4, 3, 6]).unwrap();
        refused(attention.run_into(zeros(q), zeros(k), zeros(v), to), error, &sentence);
        assert!(out.iter().all(|x| *x == 1.0));
    }
}

/// Checks that plan, prepare, compute, scores and reference refuse the options, and that nothing is written.
#[track_caller]
fn options_refused(attention: &Attention<'_>, error: Error, sentence: &str) {
    let (q, k, v) = (zeros([2, 4, 3, 8]), zeros([2, 2, 5, 8]), zeros([2, 2, 5, 6]));
    refused(attention.plan(q, (k, v)), error.clone(), sentence);
    refused(attention.prepare(q, (k, v)), error.clone(), sentence);
    refused(reference::attention(attention, q, (k, v)), error.clone(), sentence);
    let (mut out, mut lse) = (vec![1.0f32; len([2, 4, 3, 6])], vec![1.0f32; len([2, 4, 3])]);
    let to = TensorMut::from_slice(&mut out, [2, 4, 3, 6]).unwrap();
    let to_lse = TensorMut::from_slice(&mut lse, [2, 4, 3]).unwrap();
    refused(attention.compute(q, (k, v), to, to_lse, &mut Workspace::new()), error.clone(), sentence);
    let mut scores = vec![1.0f32; len([2, 4, 3, 5])];
    let to = TensorMut::from_slice(&mut scores, [2, 4, 3, 5]).unwrap();
    refused(attention.scores_into(ScoreStage::Raw, q, k, to), error, sentence);
    assert!(out.iter().chain(&lse).chain(&scores).all(|x| *x == 1.0));
}

fn options() {
    let new = Attention::new;
    options_refused(
        &new().key_lengths(&[5]),
        Error::WrongCount { what: "key lengths", expected: 2, got: 1 },
        "1 key lengths were given but there must be 2",
    );
    options_refused(
        &new().key_lengths(&[5, 6]),
        Error::LengthOutOfRange { what: "key lengths", batch: 1, got: 6, most: 5 },
        "the key lengths of batch 1 are 6 but must be between 0 and 5",
    );
    options_refused(
        &new().key_lengths(&[-1, 5]),
        Error::LengthOutOfRange { what: "key lengths", batch: 0, got: -1, most: 5 },
        "the key lengths of batch 0 are -1 but must be between 0 and 5",
    );
    options_refused(
        &new().key_lengths(&[5, u64::MAX]),
        Error::LengthOutOfRange { what: "key lengths", batch: 1, got: u64::MAX as i128, most: 5 },
        "the key lengths of batch 1 are 18446744073709551615 but must be between 0 and 5",
    );
    options_refused(
        &new().query_offset(QueryOffset::per_batch(&[0, 1, 2])),
        Error::WrongCount { what: "query offsets", expected: 2, got: 3 },
        "3 query offsets were given but there must be 2",
    );
    options_refused(
        &new().alibi(AlibiSlopes::PerHead(&[0.5])),
        Error::WrongCount { what: "ALiBi slopes", expected: 4, got: 1 },
        "1 ALiBi slopes were given but there must be 4",
    );
    // Two sequences of four heads.
    options_refused(
        &new().alibi(AlibiSlopes::PerBatchAndHead(&[0.5; 4])),
        Error::WrongCount { what: "ALiBi slopes of all sequences", expected: 8, got: 4 },
        "4 ALiBi slopes of all sequences were given but there must be 8",
    );
    let attend = [true; 60];
    options_refused(
        &new().mask(TensorRef::from_slice(&attend[..24], [2, 4, 3, 1]).unwrap().permuted([1, 0, 2, 3]).unwrap()),
        Error::NotBroadcastable { tensor: "mask", dimension: "batch", got: 4, expected: 2 },
        "batch of the mask is 4 but must be 2, or 1 to repeat",
    );
    options_refused(
        &new().mask(TensorRef::<bool, 2>::from_slice(&attend[..12], [3, 4]).unwrap()),
        Error::NotBroadcastable { tensor: "mask", dimension: "seq_kv", got: 4, expected: 5 },
        "seq_kv of the mask is 4 but must be 5, or 1 to repeat",
    );
    options_refused(
        &new().bias(zeros([2, 2, 3, 5])),
        Error::NotBroadcastable { tensor: "bias", dimension: "heads_q", got: 2, expected: 4 },
        "heads_q of the bias is 2 but must be 4, or 1 to repeat",
    );
    options_refused(
        &new().bias(zeros([0, 5])),
        Error::NotBroadcastable { tensor: "bias", dimension: "seq_q", got: 0, expected: 3 },
        "seq_q of the bias is 0 but must be 3, or 1 to repeat",
    );
    let (mask, bias) = (TensorRef::from_slice(&attend[..5], [5]).unwrap(), zeros([5]));
    for (option, attention) in [
        ("mask", new().mask(mask).mask(mask)),
        ("bias", new().bias(bias).bias(bias)),
        ("alibi", new().alibi(AlibiSlopes::Standard).alibi(AlibiSlopes::PerHead(&[0.5; 4]))),
        ("key_lengths", new().key_lengths(&[5, 5]).key_lengths(&[4, 5])),
    ] {
        let sentence = format!("the option {option} was given twice; combine both into one, or set it once");
        options_refused(&attention, Error::GivenTwice { option }, &sentence);
    }
    let number = |option, got, expected| Error::InvalidOption { option, got, expected };
    for (got, shown) in [(f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        options_refused(
            &new().alibi(AlibiSlopes::PerHead(&[0.0, 0.0, got, 0.0])),
            number("an ALiBi slope", got, "finite"),
            &format!("an ALiBi slope is {shown} but must be finite"),
        );
        options_refused(
            &new().alibi(AlibiSlopes::PerBatchAndHead(&[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, got, 0.0])),
            number("an ALiBi slope", got, "finite"),
            &format!("an ALiBi slope is {shown} but must be finite"),
        );
    }
    for got in [f32::INFINITY, f32::NEG_INFINITY, 2.4e38, f32::MIN] {
        options_refused(
            &new().scale(got),
            number("scale", got, "between -2.3e38 and 2.3e38"),
            &format!("scale is {got} but must be between -2.3e38 and 2.3e38"),
        );
    }
    for got in [0.0, -1.0, f32::INFINITY, f32::MIN_POSITIVE / 2.0, 2.4e38] {
        options_refused(
            &new().softcap(got),
            number("softcap", got, "a normal number above 0 and below 2.3e38"),
            &format!("softcap is {got} but must be a normal number above 0 and below 2.3e38"),
        );
    }
    options_refused(
        &new().scale(-1e20).softcap(1e-19),
        number("scale", -1e20, "at most 3.4e38 times the softcap"),
        "scale is -100000000000000000000 but must be at most 3.4e38 times the softcap",
    );
    // (NaN is not equal to itself.)
    let (q, k, v) = (zeros([2, 4, 3, 8]), zeros([2, 2, 5, 8]), zeros([2, 2, 5, 6]));
    for attention in
        [new().scale(f32::NAN), new().softcap(f32::NAN), new().alibi(AlibiSlopes::PerHead(&[f32::NAN, 0.0, 0.0, 0.0]))]
    {
        let error = attention.plan(q, (k, v)).unwrap_err();
        assert!(error.to_string().contains("is NaN but must be"), "{error}");
    }
}

/// Outputs of wrong shapes. The one of the right shape is not written either.
fn outputs() {
    let (q, k, v) = (zeros([2, 4, 3, 8]), zeros([2, 2, 5, 8]), zeros([2, 2, 5, 6]));
    let prepared = Attention::new().prepare(q, (k, v)).unwrap();
    for (out_shape, lse_shape, tensor, dimension, expected, got) in [
        ([1, 4, 3, 6], [2, 4, 3], "output", "batch", 2, 1),
        ([2, 2, 3, 6], [2, 4, 3], "output", "heads_q", 4, 2),
        ([2, 4, 5, 6], [2, 4, 3], "output", "seq_q", 3, 5),
        ([2, 4, 3, 8], [2, 4, 3], "output", "value_dim", 6, 8),
        ([2, 4, 3, 6], [1, 4, 3], "lse", "batch", 2, 1),
        ([2, 4, 3, 6], [2, 4, 5], "lse", "seq_q", 3, 5),
    ] {
        for prepared in [None, Some(&prepared)] {
            let (mut out, mut lse) = (vec![1.0f32; len(out_shape)], vec![1.0f32; len(lse_shape)]);
            let to = TensorMut::from_slice(&mut out, out_shape).unwrap();
            let to_lse = TensorMut::from_slice(&mut lse, lse_shape).unwrap();
            let mut workspace = Workspace::new();
            let result = match prepared {
                Some(prepared) => prepared.compute(q, (k, v), to, to_lse, &mut workspace),
                None => Attention::new().compute(q, (k, v), to, to_lse, &mut workspace),
            };
            let sentence = format!("{dimension} of the {tensor} is {got} but must be {expected}");
            refused(result, Error::ShapeMismatch { tensor, dimension, expected, got }, &sentence);
            assert!(out.iter().chain(&lse).all(|x| *x == 1.0));
        }
    }
    let mut scores = [1.0f32; 60];
    let to = TensorMut::from_slice(&mut scores, [1, 4, 3, 5]).unwrap();
    refused(
        Attention::new().scores_into(ScoreStage::Raw, q, k, to),
        Error::ShapeMismatch { tensor: "output", dimension: "batch", expected: 2, got: 1 },
        "batch of the output is 1 but must be 2",
    );
    assert!(scores.iter().all(|x| *x == 1.0));
}

/// Other shapes than those prepared for.
fn prepared() {
    let (q, k, v) = ([2, 4, 3, 8], [2, 2, 5, 8], [2, 2, 5, 6]);
    let prepared = Attention::new().prepare(zeros(q), (zeros(k), zeros(v))).unwrap();
    for (q, k, v, tensor, dimension, expected, got) in [
        ([2, 4, 4, 8], k, v, "queries", "seq_q", 3, 4),
        ([2, 8, 3, 8], k, v, "queries", "heads_q", 4, 8),
        (q, [2, 2, 6, 8], [2, 2, 6, 6], "keys", "seq_kv", 5, 6),
        (q, k, [2, 2, 5, 7], "values", "value_dim", 6, 7),
    ] {
        let mut out = vec![1.0f32; len([q[0], q[1], q[2], v[3]])];
        let to = TensorMut::from_slice(&mut out, [q[0], q[1], q[2], v[3]]).unwrap();
        let result = prepared.compute(zeros(q), (zeros(k), zeros(v)), to, None, &mut Workspace::new());
        let sentence = format!("{dimension} of the {tensor} is {got} but must be {expected}");
        refused(result, Error::ShapeMismatch { tensor, dimension, expected, got }, &sentence);
        assert!(out.iter().all(|x| *x == 1.0));
    }
}

/// Broadcast tensors can be larger than memory. A call whose results would be is refused before any allocation.
fn too_large() {
    let small = 1 << 16;
    let memory = |what| Error::TooLarge { what };
    let many = |what, limit, got| Error::TooMany { what, limit, got };
    let (heads, rows) = ("key/value heads in all batches", "queries in all batches and heads");
    let (query, value) = ("elements of a query (head_dim)", "elements of a value (value_dim)");
    let (most_rows, most_heads, longest) = (u32::MAX as usize, 1 << 24, 1 << 20);
    let one = [1, 1, 1, 1];
    for (q, k, v, error) in [
        ([1 << 20, 1, 1 << 20, 1], [1 << 20, 1, 1, 1], [1 << 20, 1, 1, 1], many(rows, most_rows, 1 << 40)),
        ([1, 1, 1 << 33, 1], one, one, many(rows, most_rows, 1 << 33)),
        ([1, 1, most_rows + 1, 1], one, one, many(rows, most_rows, most_rows + 1)),
        ([1 << 25, 1, 1, 1], [1 << 25, 1, 1, 1], [1 << 25, 1, 1, 1], many(heads, most_heads, 1 << 25)),
        (
            [1 << 13, 1 << 13, 1, 1],
            [1 << 13, 1 << 13, 1, 1],
            [1 << 13, 1 << 13, 1, 1],
            many(heads, most_heads, 1 << 26),
        ),
        (
            [1, most_heads + 1, 1, 1],
            [1, most_heads + 1, 1, 1],
            [1, most_heads + 1, 1, 1],
            many(heads, most_heads, most_heads + 1),
        ),
        ([1, 1, 1, 1 << 40], [1, 1, 1, 1 << 40], one, many(query, longest, 1 << 40)),
        ([1, 1, 1, longest + 1], [1, 1, 1, longest + 1], one, many(query, longest, longest + 1)),
        (one, one, [1, 1, 1, 1 << 40], many(value, longest, 1 << 40)),
        ([1, 1, 1, usize::MAX], [1, 1, 1, usize::MAX], one, memory("the problem")),
        (one, [1, 1, usize::MAX, 1], [1, 1, usize::MAX, 1], memory("the problem")),
        ([1, usize::MAX, 1, 1], one, one, memory("the problem")),
    ] {
        let sentence = match error {
            Error::TooMany { what, limit, got } => format!("{got} {what} were given but a call takes at most {limit}"),
            Error::TooLarge { what } => format!("{what} would not fit in memory"),
            _ => unreachable!(),
        };
        for form in FORMS {
            let attention = Attention::new().form(form);
            let ((), usage) = COUNTING.usage(|| {
                refused(attention.plan(zeros(q), (zeros(k), zeros(v))), error.clone(), &sentence);
                refused(attention.prepare(zeros(q), (zeros(k), zeros(v))), error.clone(), &sentence);
                refused(reference::attention(&attention, zeros(q), (zeros(k), zeros(v))), error.clone(), &sentence);
            });
            assert!(usage.peak < small, "{usage:?}: {error}");
        }
    }
    // The limit, and one more: heads, and elements of 8 bytes.
    let plan = |heads, seq_kv| {
        let (q, kv) = (zeros([1, heads, 1, 1]), zeros([1, heads, seq_kv, 1]));
        Attention::new().plan(q, (kv, kv)).map(|_| ())
    };
    assert_eq!(plan(1 << 24, 1), Ok(()));
    let (what, limit, got) = ("key/value heads in all batches", 1 << 24, (1 << 24) + 1);
    assert_eq!(plan((1 << 24) + 1, 1), Err(Error::TooMany { what, limit, got }));
    #[cfg(target_pointer_width = "64")]
    {
        assert_eq!(plan(1, (1 << 60) - 1), Ok(()));
        assert_eq!(plan(1, 1 << 60), Err(Error::TooLarge { what: "the problem" }));
        // The reference holds a row of scores; a prepared attention lists its tasks.
        let (one, keys) = (zeros([1, 1, 1, 1]), zeros([1, 1, 1 << 57, 1]));
        let options = Attention::new();
        let no_memory = |error| matches!(error, Error::TooLarge { .. });
        assert!(reference::attention(&options, one, (keys, keys)).is_err_and(no_memory));
        assert!(reference::scores(&options, ScoreStage::Raw, one, keys).is_err_and(no_memory));
        let many = zeros([1, 1, u32::MAX as usize, 1]);
        let too_many = |error| matches!(error, Error::TooMany { limit: 0x100_0000, .. });
        assert!(options.clone().form(Form::Decode).prepare(many, (one, one)).is_err_and(too_many));
    }
    // Queries and keys within their limits, but too large a matrix of scores.
    let mut out = [0.0f32; 0];
    let to = TensorMut::from_slice(&mut out, [1, 1, 0, 0]).unwrap();
    refused(
        Attention::new().scores_into(ScoreStage::Raw, zeros([1, 1, 1 << 31, 1]), zeros([1, 1, 1 << 31, 1]), to),
        Error::TooLarge { what: "the scores" },
        "the scores would not fit in memory",
    );
    // A result that no allocator would give.
    #[cfg(feature = "ndarray")]
    {
        let many = zeros([1, 1, u32::MAX as usize, 1 << 20]);
        let error = Attention::new().run(many, zeros([1, 1, 0, 1 << 20]), zeros([1, 1, 0, 1 << 20])).unwrap_err();
        assert_eq!(error, Error::TooLarge { what: "the result" });
    }
}

/// Keys that share their memory may be any number. Time and memory of a call depend on the visible ones alone.
fn endless_keys() {
    let lengths = [3];
    for seq_kv in [1 << 35, 1 << 50, (1 << 59) - 1] {
        for (form, seq_q) in FORMS.into_iter().flat_map(|form| [1, 12, 300].map(|seq_q| (form, seq_q))) {
            let base = Attention::new().form(form);
            // All keys visible: the task is listed by its work, but never computed.
            base.prepare(zeros([1, 1, seq_q, 1]), (zeros([1, 1, seq_kv, 1]), zeros([1, 1, seq_kv, 1]))).unwrap();
            for attention in [base.clone().key_lengths(&lengths), base.window(Some(2), Some(0))] {
                let (mut out, mut workspace) = (vec![f32::NAN; seq_q], Workspace::new());
                let to = TensorMut::from_slice(&mut out, [1, 1, seq_q, 1]).unwrap();
                let (q, kv) = (zeros([1, 1, seq_q, 1]), zeros([1, 1, seq_kv, 1]));
                let prepared = attention.prepare(q, (kv, kv)).unwrap();
                let (done, usage) = COUNTING.usage(|| prepared.compute(q, (kv, kv), to, None, &mut workspace));
                done.unwrap();
                assert!(usage.peak < 1 << 20, "{usage:?} {seq_kv} {form:?} {attention:?}");
                assert!(out.iter().all(|x| *x == 0.0));
            }
        }
    }
}

/// Windows, offsets, slopes and scales at the ends of their ranges. A query sees what the definition says, and nothing
/// overflows.
fn extreme_options() {
    assert!(alibi_slope(0, 0).is_finite(), "no heads at all");
    let x: Vec<f32> = (0..20).map(|n| n as f32 / 8.0).collect();
    let tensor = TensorRef::from_slice(&x, [1, 1, 5, 4]).unwrap();
    let bounds = [None, Some(0), Some(1), Some(isize::MAX as usize), Some(usize::MAX)];
    let offsets = [isize::MIN, isize::MIN + 1, -5, 0, 3, isize::MAX - 4, isize::MAX];
    let slopes = [[f32::MAX], [f32::MIN], [1e-45], [0.0]];
    let scales = [2.3e38, -2.3e38, 0.0, -0.0, 1e-45, 1.0];
    for offset in offsets {
        for left in bounds {
            for right in bounds {
                for causal in [false, true] {
                    for (n, form) in FORMS.into_iter().enumerate() {
                        let per_batch = [offset];
                        let offset = if n == 0 { QueryOffset::At(offset) } else { QueryOffset::per_batch(&per_batch) };
                        let mut attention = Attention::new().window(left, right).query_offset(offset).form(form);
                        if causal {
                            attention = attention.causal();
                        }
                        let mut out = [f32::NAN; 20];
                        let to = TensorMut::from_slice(&mut out, [1, 1, 5, 4]).unwrap();
                        attention.run_into(tensor, tensor, tensor, to).unwrap();
                        let expected = reference::attention(&attention, tensor, (tensor, tensor)).unwrap().out;
                        assert!(out.iter().zip(&expected).all(|(x, y)| (*x as f64 - y).abs() < 1e-5), "{attention:?}");
                        // With slopes and scales, the call only has to return.
                        for slope in &slopes {
                            let to = TensorMut::from_slice(&mut out, [1, 1, 5, 4]).unwrap();
                            let attention = attention.clone().alibi(AlibiSlopes::PerHead(slope));
                            attention.run_into(tensor, tensor, tensor, to).unwrap();
                        }
                        for scale in scales {
                            let to = TensorMut::from_slice(&mut out, [1, 1, 5, 4]).unwrap();
                            let attention = attention.clone().scale(scale).softcap(f32::MIN_POSITIVE);
                            // (A scale beyond 3.4e38 caps is refused.)
                            let done = attention.run_into(tensor, tensor, tensor, to);
                            assert_eq!(done.is_err(), scale.abs() >= 4.0, "scale {scale}");
                        }
                    }
                }
            }
        }
    }
}

/// Mostly small numbers, and those at which arithmetic may overflow.
fn extreme_size(rng: &mut Rng) -> usize {
    const EXTREME: [usize; 10] =
        [1 << 16, 1 << 31, 1 << 32, 1 << 33, 1 << 48, 1 << 60, 1 << 62, isize::MAX as usize, 1 << 63, usize::MAX];
    match rng.below(8) {
        0 => EXTREME[rng.below(EXTREME.len())],
        1 => EXTREME[rng.below(EXTREME.len())].wrapping_add(rng.below(5)).wrapping_sub(2),
        _ => rng.below(5),
    }
}

fn extreme_stride(rng: &mut Rng) -> isize {
    const EXTREME: [isize; 8] = [isize::MIN, isize::MAX, isize::MIN / 2, 1 << 62, 1 << 31, -(1 << 32), 1 << 48, -1];
    match rng.below(8) {
        0 => EXTREME[rng.below(EXTREME.len())],
        1 => EXTREME[rng.below(EXTREME.len())].wrapping_add(rng.below(5) as isize - 2),
        2 | 3 => 0,
        _ => rng.below(9) as isize - 4,
    }
}

/// Random shapes, strides and offsets, checked with arithmetic that can't overflow.
fn extreme_tensors() {
    let mut rng = Rng(1);
    let data = [1.5f32; 40];
    // Sums of four products that are 0 modulo 2^128.
    let wrapping = TensorRef::with_strides(&data, 0, [(1 << 63) + 1; 4], [isize::MIN; 4]);
    assert_eq!(wrapping.unwrap_err(), Error::OutOfBounds { first: i128::MIN, last: 0, len: 40 });
    let mut accepted = [0; 2];
    for _ in 0..200_000 {
        let shape: [usize; 4] = std::array::from_fn(|_| extreme_size(&mut rng));
        let strides: [isize; 4] = std::array::from_fn(|_| extreme_stride(&mut rng));
        let offset = if rng.one_in(6) { extreme_size(&mut rng) } else { rng.below(41) };
        let mut buffer = data;
        let (read, usage) = COUNTING.usage(|| TensorRef::with_strides(&data, offset, shape, strides));
        assert_eq!(usage.calls, 0);
        let written = TensorMut::with_strides(&mut buffer, offset, shape, strides).map(|_| ());
        let _ = TensorRef::from_slice(&data, shape);
        if let Ok(tensor) = read {
            accepted[0] += 1;
            assert_eq!((tensor.shape(), tensor.strides()), (shape, strides));
            // Every corner leads to an element, or there are none.
            for corner in 0..16 {
                let index =
                    std::array::from_fn(|axis| if corner >> axis & 1 == 1 { shape[axis].wrapping_sub(1) } else { 0 });
                assert_eq!(tensor.get(index), if shape.contains(&0) { None } else { Some(1.5) });
            }
            assert_eq!(tensor.get(shape), None);
        }
        if written.is_ok() {
            accepted[1] += 1;
            // One place for each index.
            let mut places = [false; 40];
            if !shape.contains(&0) {
                for n in 0..len(shape) {
                    let (mut at, mut n) = (offset as isize, n);
                    for axis in (0..4).rev() {
                        at = at.wrapping_add(
                            (n % shape[axis]) as isize * if shape[axis] == 1 { 0 } else { strides[axis] },
                        );
                        n /= shape[axis];
                    }
                    assert!(!std::mem::replace(&mut places[at as usize], true), "{shape:?} {strides:?} at {offset}");
                }
            }
        }
    }
    assert!(accepted.iter().all(|n| *n > 1000), "{accepted:?}");
}

/// Random problems are refused, or planned, prepared and, where the work is small, computed.
fn extreme_problems() {
    let mut rng = Rng(2);
    let (data, attend) = ([0.5f32; 16], [true; 16]);
    let (mut refusals, mut computed) = (0, 0);
    for _ in 0..60_000 {
        let mut size = || extreme_size(&mut rng);
        let (batch, heads_kv, seq_q, seq_kv, head_dim, value_dim) = (size(), size(), size(), size(), size(), size());
        let heads_q = if rng.one_in(8) { extreme_size(&mut rng) } else { heads_kv.saturating_mul(1 + rng.below(3)) };
        // Sometimes one dimension differs.
        let odd = rng.below(40);
        let other = |n: usize, size: usize| if odd == n { size.wrapping_add(1) } else { size };
        let q = zeros([batch, heads_q, seq_q, head_dim]);
        let k = zeros([other(0, batch), heads_kv, seq_kv, other(1, head_dim)]);
        let v = zeros([batch, other(2, heads_kv), other(3, seq_kv), value_dim]);
        let lengths = [rng.below(5), rng.below(5)];
        let offsets = [extreme_stride(&mut rng)];
        let mut attention = Attention::new().form(FORMS[rng.below(2)]);
        if rng.one_in(2) {
            attention = attention.causal().query_offset(QueryOffset::At(offsets[0]));
        }
        if rng.one_in(2) {
            attention = attention.window(Some(extreme_size(&mut rng)), Some(extreme_size(&mut rng)));
        }
        match rng.below(12) {
            0 => attention = attention.key_lengths(&lengths),
            1 => attention = attention.query_offset(QueryOffset::per_batch(&offsets)),
            2 => attention = attention.alibi(AlibiSlopes::PerHead(&data[..2])),
            3 => attention = attention.alibi(AlibiSlopes::Standard),
            4 => {
                let shape = std::array::from_fn(|_| if rng.one_in(2) { 1 } else { extreme_size(&mut rng) });
                attention = attention.mask(TensorRef::with_strides(&attend, 3, shape, [0; 4]).unwrap());
            }
            5 => attention = attention.bias(zeros([seq_q, seq_kv])),
            _ => {}
        }
        let case = || format!("{q:?} {k:?} {v:?} {attention:?}");
        let (plan, usage) = COUNTING.usage(|| attention.plan(q, (k, v)));
        assert_eq!(usage.calls, 0, "{}", case());
        let product = |dims: &[usize]| dims.iter().fold(1, |n: usize, size| n.saturating_mul(*size));
        let rows = product(&[batch, heads_q, seq_q]);
        let outputs = [product(&[rows, value_dim]), product(&[rows, seq_kv]), rows];
        match &plan {
            Err(_) => refusals += 1,
            Ok(plan) => assert!(!plan.to_string().is_empty()),
        }
        // Preparing lists tasks, in proportion to heads and rows.
        if plan.is_err() || rows < 1 << 17 {
            let (prepared, usage) = COUNTING.usage(|| attention.prepare(q, (k, v)));
            assert_eq!(prepared.err(), plan.clone().err(), "{}", case());
            let listed = if plan.is_ok() { 256 * rows } else { 0 };
            assert!(usage.peak <= 4096 + listed, "{usage:?} {}", case());
        }
        // A few scores, of problems of any size.
        let ranges = (0..seq_q.min(2), seq_kv.saturating_sub(2)..seq_kv);
        let some = [batch, heads_q, ranges.0.len(), ranges.1.len()];
        if product(&some) < 1 << 12 && (plan.is_err() || product(&[product(&some), head_dim]) < 1 << 20) {
            let mut scores = vec![1.0f32; product(&some)];
            let to = TensorMut::from_slice(&mut scores, some).unwrap();
            let done = attention.scores_range_into(ScoreStage::Biased, q, k, ranges, to);
            assert!(done.is_ok() || scores.iter().all(|x| *x == 1.0), "{}", case());
        }
        // Computing takes an output of that size, and the time for it.
        let work = product(&[rows, seq_kv, head_dim.saturating_add(value_dim).max(1)]);
        let sums_shape = [batch, heads_q, seq_kv];
        if product(&sums_shape) < 1 << 12 && rows < 1 << 12 && (plan.is_err() || work < 1 << 20) {
            let lse = TensorRef::<f32, 3>::with_strides(&data, 0, [batch, heads_q, seq_q], [0; 3]).unwrap();
            let mut sums = vec![-1.0f32; product(&sums_shape)];
            let to = TensorMut::from_slice(&mut sums, sums_shape).unwrap();
            let done = attention.key_sums(q, (k, v), lse, to, &mut Workspace::new());
            assert_eq!(done.err(), plan.clone().err(), "{}", case());
            assert!(sums.iter().all(|sum| (*sum == -1.0) == plan.is_err()), "{}", case());
        }
        if outputs.iter().all(|n| *n < 1 << 12) && (plan.is_err() || work < 1 << 20) {
            let (mut out, mut lse) = (vec![1.0f32; outputs[0]], vec![1.0f32; outputs[2]]);
            let out_shape = [batch, heads_q, seq_q, value_dim];
            let to = TensorMut::from_slice(&mut out, out_shape).unwrap();
            let to_lse = TensorMut::from_slice(&mut lse, [batch, heads_q, seq_q]).unwrap();
            let mut workspace = Workspace::new();
            let (done, usage) = COUNTING.usage(|| attention.compute(q, (k, v), to, to_lse, &mut workspace));
            assert_eq!(done.err(), plan.clone().err(), "{}", case());
            // Tiles for up to 240 keys or rows of either length, and for each worker.
            let longest = head_dim.saturating_add(value_dim).saturating_add(300).min(1 << 22);
            assert!(usage.peak < longest * 4 * 1000 * 4, "{usage:?} {}", case());
            match &plan {
                Err(_) => assert!(out.iter().chain(&lse).all(|x| *x == 1.0), "{}", case()),
                Ok(_) => {
                    computed += 1;
                    assert!(out.iter().all(|x| *x == 0.0), "{}", case());
                }
            }
            let mut scores = vec![1.0f32; outputs[1]];
            let to = TensorMut::from_slice(&mut scores, [batch, heads_q, seq_q, seq_kv]).unwrap();
            let done = attention.scores_into(ScoreStage::Probabilities, q, k, to);
            assert!(done.is_ok() || scores.iter().all(|x| *x == 1.0), "{}", case());

            let rows_of = |shape| TensorRef::<f32, 3>::with_strides(&data, 0, shape, [0; 3]).unwrap();
            let to = TensorMut::from_slice(&mut out, out_shape).unwrap();
            let to_lse = TensorMut::from_slice(&mut lse, [batch, heads_q, seq_q]).unwrap();
            let other_lse = rows_of([other(4, batch), heads_q, other(5, seq_q)]);
            let merged = merge(to, to_lse, zeros([batch, other(6, heads_q), seq_q, other(7, value_dim)]), other_lse);
            assert_eq!(merged.is_err(), (4..8).contains(&odd), "{}", case());
        }
    }
    assert!(refusals > 1000 && computed > 1000, "{refusals} refusals, {computed} computed");
}
