//! Promise: a query that sees no key gets an output of exactly +0 and a log-sum-exp of -inf. Dimensions may be 0.

mod support;

use flashtile::{Attention, Error, QueryOffset, ScoreStage, TensorMut, TensorRef, Workspace, merge, reference};
use support::problems::{FORMS, forms_and_levels};
use support::watchdog::within;
use support::{Dims, Inputs, Rng, len};

/// Checks for the exact bits of +0 and of -inf.
fn assert_empty(out: &[f32], lse: &[f32], case: impl std::fmt::Display) {
    assert!(out.iter().all(|x| x.to_bits() == 0), "{out:?}: {case}");
    assert!(lse.iter().all(|x| *x == f32::NEG_INFINITY), "{lse:?}: {case}");
}

/// Rows that see no key, alone and beside rows that see some, in every place.
#[test]
fn rows_that_see_nothing() {
    let mut rng = Rng(1);
    for _ in 0..60 {
        let dims = Dims {
            batch: 2,
            heads_q: 4,
            heads_kv: 2,
            seq_q: 1 + rng.below(40),
            seq_kv: 1 + rng.below(100),
            head_dim: 1 + rng.below(20),
            value_dim: 1 + rng.below(20),
        };
        let mut inputs = Inputs::<f32>::random(dims, &mut rng);
        // Negative values make the -0 that a product with a prob of 0 can leave.
        inputs.v.iter_mut().for_each(|x| *x = -x.abs());
        let attend: Vec<bool> = dims.rows().map(|_| rng.one_in(2)).collect();
        let mask = TensorRef::from_slice(&attend, [2, 4, dims.seq_q, 1]).unwrap();
        for (form, level) in forms_and_levels() {
            let (out, lse) = inputs.compute(&Attention::new().mask(mask).form(form).level(level));
            for (n, sees) in attend.iter().enumerate() {
                let (row, lse) = (&out[n * dims.value_dim..][..dims.value_dim], &lse[n..n + 1]);
                if *sees {
                    assert!(lse[0].is_finite() && row.iter().all(|x| *x < 0.0));
                } else {
                    assert_empty(row, lse, format_args!("row {n} of {dims:?} {form:?} {level}"));
                }
            }
            let nowhere = Attention::new().causal().query_offset(QueryOffset::At(isize::MIN));
            let (out, lse) = inputs.compute(&nowhere.form(form).level(level));
            assert_empty(&out, &lse, format_args!("{dims:?} {form:?} {level}"));
        }
    }
}

/// Each dimension, and each pair of dimensions, is 0.
#[test]
fn dimensions_of_zero() {
    let full = [2, 4, 2, 3, 5, 6, 7];
    for first in 0..7 {
        for second in 0..7 {
            let mut dims = full;
            (dims[first], dims[second]) = (0, 0);
            let [batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim] = dims;
            let dims = Dims { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim };
            let inputs = Inputs::<f32>::random(dims, &mut Rng(2));
            let (form, level) = forms_and_levels().next().unwrap();
            let plan = Attention::new().form(form).level(level).plan(inputs.q(), (inputs.k(), inputs.v()));
            if heads_kv == 0 && heads_q != 0 {
                assert_eq!(plan.unwrap_err(), Error::HeadsNotDivisible { heads_q, heads_kv });
                continue;
            }
            for (form, level) in forms_and_levels() {
                let attention = Attention::new().form(form).level(level);
                println!("{}", attention.plan(inputs.q(), (inputs.k(), inputs.v())).unwrap());
                let (out, lse) = inputs.compute(&attention);
                let case = format!("{dims:?} {form:?} {level}");
                if seq_kv == 0 {
                    assert_empty(&out, &lse, &case);
                } else if head_dim == 0 {
                    // Scores are all 0: the output is the mean of the values, the lse the logarithm of the number of keys.
                    let expected = reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap();
                    assert!(out.iter().zip(&expected.out).all(|(x, y)| (*x as f64 - y).abs() < 1e-6), "{case}");
                    assert!(lse.iter().all(|x| (x - 5f32.ln()).abs() < 1e-6), "{lse:?}: {case}");
                } else if value_dim == 0 {
                    let expected = reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap();
                    assert!(lse.iter().zip(&expected.lse).all(|(x, y)| (*x as f64 - y).abs() < 1e-5), "{case}");
                }
                prepared_is_the_same(&inputs, &attention, &out);
            }
        }
    }
}

fn prepared_is_the_same(inputs: &Inputs<f32>, attention: &Attention<'_>, expected: &[f32]) {
    let shape = inputs.dims.out();
    let mut out = vec![f32::NAN; len(shape)];
    let prepared = attention.prepare(inputs.q(), (inputs.k(), inputs.v())).unwrap();
    let to = TensorMut::from_slice(&mut out, shape).unwrap();
    prepared.compute(inputs.q(), (inputs.k(), inputs.v()), to, None, &mut Workspace::new()).unwrap();
    assert_eq!(out, expected);
}

/// A tensor without elements may have any strides.
#[test]
fn wild_strides_without_elements() {
    for stride in [isize::MIN, isize::MAX, isize::MAX / 2 + 1, -1] {
        for (form, level) in forms_and_levels() {
            for (head_dim, value_dim) in [(0, 3), (3, 0), (0, 0)] {
                let ones = [1.0f32; 40 * 3];
                let tensor = |rows, dim| {
                    let strides = if dim == 0 { [stride; 4] } else { [0, 0, 3, 1] };
                    TensorRef::with_strides(&ones, 0, [2, 2, rows, dim], strides).unwrap()
                };
                let (mut out, mut lse) = (vec![f32::NAN; 2 * 2 * 20 * value_dim], [f32::NAN; 2 * 2 * 20]);
                let shape = [2, 2, 20, value_dim];
                let to = if value_dim == 0 {
                    TensorMut::with_strides(&mut out, 0, shape, [stride; 4])
                } else {
                    TensorMut::from_slice(&mut out, shape)
                };
                let to_lse = TensorMut::from_slice(&mut lse, [2, 2, 20]).unwrap();
                let (q, k, v) = (tensor(20, head_dim), tensor(40, head_dim), tensor(40, value_dim));
                let attention = Attention::new().form(form).level(level);
                attention.compute(q, (k, v), to.unwrap(), to_lse, &mut Workspace::new()).unwrap();
                assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6), "{stride} {head_dim} {value_dim} {form:?} {level}");
                assert!(lse.iter().all(|x| x.is_finite()), "{stride} {head_dim} {value_dim} {form:?} {level}");
            }
        }
    }
}

/// Tensors without elements may have huge dimensions. They are refused or done at once, never looped over.
#[test]
fn huge_without_elements() {
    within(60, "tensors without elements", || {
        let huge = [1 << 30, 1 << 32, 1 << 50, 1 << 59, 1 << 62, usize::MAX / 2, usize::MAX];
        let pairs = huge.into_iter().flat_map(|huge| [1, 2].map(|small| (small, huge)));
        for ((small, huge), form) in pairs.flat_map(|pair| FORMS.map(|form| (pair, form))) {
            for case in 0..1 << 7 {
                // Each dimension is huge or small; a shape that would have elements gets a 0.
                let size = |bit: usize| if case >> bit & 1 == 1 { huge } else { small };
                for zero in [0, 2, 3, 4] {
                    let mut q = [size(0), size(1), size(2), size(3)];
                    let mut k = [q[0], size(4), size(5), q[3]];
                    let mut v = [k[0], k[1], k[2], size(6)];
                    match zero {
                        0 => (q[0], k[0], v[0]) = (0, 0, 0),
                        2 => (q[2], k[2], v[2]) = (0, 0, 0),
                        3 => (q[3], k[3], v[3], v[2], k[2]) = (0, 0, 0, 0, 0),
                        _ => (q[1], k[1], v[1]) = (0, 0, 0),
                    }
                    let out = [q[0], q[1], q[2], v[3]];
                    let lse = [q[0], q[1], q[2]];
                    if !out.contains(&0) || !lse.contains(&0) {
                        continue;
                    }
                    let empty = |shape| TensorRef::<f32>::from_slice(&[], shape).unwrap();
                    let attention = Attention::new().causal().form(form);
                    let mut workspace = Workspace::new();
                    let (q, k, v) = (empty(q), empty(k), empty(v));
                    let plan = attention.plan(q, (k, v));
                    let prepared = attention.prepare(q, (k, v));
                    assert_eq!(plan.is_ok(), prepared.is_ok());
                    let to = || TensorMut::<f32>::from_slice(&mut [], out).unwrap();
                    let to_lse = || TensorMut::<f32, 3>::from_slice(&mut [], lse).unwrap();
                    let done = attention.compute(q, (k, v), to(), to_lse(), &mut workspace);
                    assert_eq!(done.clone().err(), plan.clone().err());
                    if let Ok(prepared) = prepared {
                        prepared.compute(q, (k, v), to(), to_lse(), &mut workspace).unwrap();
                        assert!(!plan.unwrap().to_string().is_empty());
                        let reference = reference::attention(&attention, q, (k, v)).unwrap();
                        assert!(reference.out.is_empty() && reference.lse.is_empty());
                        let scores = reference::scores(&attention, ScoreStage::Biased, q, k);
                        assert!(
                            scores.as_ref().is_ok_and(Vec::is_empty)
                                || matches!(scores, Err(Error::TooLarge { .. } | Error::TooMany { .. }))
                        );
                    }
                    let lse_ref = TensorRef::<f32, 3>::from_slice(&[], lse).unwrap();
                    merge(to(), to_lse(), empty(out), lse_ref).unwrap();
                }
            }
        }
    });
}
