//! Promise: every way to make a call gives the same bits. A plan from shapes is the plan of tensors of these shapes.
//!
//! The ways: typed tensors, run-time-typed tensors, ndarray arrays and views; with and without log-sum-exps; prepared or not;
//! prepared for another number of keys. Options that are given twice compose or are refused.

#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "calls take borrowed and owned arguments, and both are tested"
)]
#![allow(clippy::reversed_empty_ranges, reason = "ndarray counts negative ends from the end of the axis")]

mod support;

use flashtile::{
    AlibiSlopes, AnyTensorMut, AnyTensorRef, Attention, DType, Error, Form, Level, Operands, Prepared, TensorMut,
    TensorRef, Threads, Workspace, bf16, f16,
};
use support::problems::{Bits, bits, forms_and_levels};
use support::{Dims, Inputs, Rng, len};

/// The bits of an output and of its log-sum-exps.
type Written = (Vec<u32>, Vec<u32>);

/// What `call` writes to an output and log-sum-exps without gaps.
fn written<T: Bits>(
    dims: Dims,
    call: impl FnOnce(TensorMut<'_, T>, TensorMut<'_, f32, 3>) -> Result<(), Error>,
) -> Written {
    let (mut out, mut lse) = (vec![T::POISON[0]; len(dims.out())], vec![f32::NAN; len(dims.lse())]);
    let to = TensorMut::from_slice(&mut out, dims.out()).unwrap();
    let to_lse = TensorMut::from_slice(&mut lse, dims.lse()).unwrap();
    call(to, to_lse).unwrap();
    (bits(&out), bits(&lse))
}

/// Grouped heads, more than one tile of keys, and more than one split.
const DIMS: Dims = Dims { batch: 2, heads_q: 4, heads_kv: 2, seq_q: 5, seq_kv: 530, head_dim: 34, value_dim: 21 };

#[test]
fn typed_and_run_time_typed_tensors() {
    fn of<T: Bits>(dims: Dims) {
        let inputs = Inputs::<T>::random(dims, &mut Rng(1));
        let (q, k, v) = (inputs.q(), inputs.k(), inputs.v());
        let any = [q, k, v].map(AnyTensorRef::from);
        for (form, level) in forms_and_levels() {
            let attention = Attention::new().causal().form(form).level(level);
            let expected = inputs.bits(&attention);
            let check = |way: &str, got: Written| {
                assert!(got.0 == expected.0, "output of {way}: {} {form} {level}", T::DTYPE);
                assert!(got.1 == expected.1, "lse of {way}: {} {form} {level}", T::DTYPE);
            };
            let mut workspace = Workspace::new();
            let w = &mut workspace;
            check("typed tensors", written::<T>(dims, |out, lse| attention.compute(q, (k, v), out, lse, w)));
            check("an optional lse", written::<T>(dims, |out, lse| attention.compute(q, (k, v), out, Some(lse), w)));
            check("references", written::<T>(dims, |out, lse| attention.compute(&q, (&k, &v), out, lse, w)));
            let [q_any, k_any, v_any] = any;
            let way = written::<T>(dims, |out, lse| {
                attention.compute(q_any, (k_any, v_any), AnyTensorMut::from(out), lse, w)
            });
            check("run-time types", way);
            let way = written::<T>(dims, |out, lse| {
                let mut out = AnyTensorMut::from(out);
                attention.compute(&q_any, (&k_any, v), out.reborrow(), lse, w)
            });
            check("some run-time types", way);
            let prepared = attention.prepare(q, (k, v)).unwrap();
            check("a prepared call", written::<T>(dims, |out, lse| prepared.compute(q, (k, v), out, lse, w)));
            let way = written::<T>(dims, |out, lse| {
                prepared.compute(q_any, (k_any, v_any), AnyTensorMut::from(out), Some(lse), w)
            });
            check("a prepared call of run-time types", way);

            let without_lse = |way: &str, got: Written| {
                assert!(got.0 == expected.0, "output of {way}: {} {form} {level}", T::DTYPE);
                assert!(got.1.iter().all(|&lse| lse == f32::NAN.to_bits()), "lse of {way} was written");
            };
            without_lse("no lse", written::<T>(dims, |out, _| attention.compute(q, (k, v), out, None, w)));
            without_lse("run_into", written::<T>(dims, |out, _| attention.run_into(q, k_any, &v, out)));
            without_lse("a prepared call", written::<T>(dims, |out, _| prepared.compute(q, (k, v), out, None, w)));
        }
    }
    of::<f32>(DIMS);
    of::<f16>(DIMS);
    of::<bf16>(DIMS);
    // A prompt, and a decode step.
    of::<f32>(Dims::new(2, 40, 40, 16));
    of::<bf16>(Dims { heads_q: 8, ..Dims::new(2, 1, 1100, 64) });
}

/// Another type for each tensor, known at compile time or at run time.
#[test]
fn mixed_types() {
    let q = Inputs::<f32>::random(DIMS, &mut Rng(2));
    let k = Inputs::<f16>::random(DIMS, &mut Rng(3));
    let v = Inputs::<bf16>::random(DIMS, &mut Rng(4));
    let (q, k, v) = (q.q(), k.k(), v.v());
    for (form, level) in forms_and_levels() {
        let attention = Attention::new().form(form).level(level);
        let w = &mut Workspace::new();
        let typed = written::<f16>(DIMS, |out, lse| attention.compute(q, (k, v), out, lse, w));
        let [q, k, v] = [AnyTensorRef::from(q), k.into(), v.into()];
        assert_eq!([q, k, v].map(|x| x.dtype()), [DType::F32, DType::F16, DType::Bf16]);
        let any = written::<f16>(DIMS, |out, lse| attention.compute(q, (k, v), AnyTensorMut::from(out), lse, w));
        assert!(typed == any, "{form} {level}");
    }
}

#[cfg(feature = "ndarray")]
#[test]
fn arrays_and_views() {
    use ndarray::{Array3, Array4, s};

    fn of<T: Bits>() {
        let inputs = Inputs::<T>::random(DIMS, &mut Rng(5));
        let array = |shape: [usize; 4], data: &[T]| Array4::from_shape_vec(shape, data.to_vec()).unwrap();
        let q = array(DIMS.q(), &inputs.q);
        let k = array(DIMS.k(), &inputs.k);
        let v = array(DIMS.v(), &inputs.v);
        // The same numbers as [batch, seq, heads, dim].
        let q_by_rows = q.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
        for (form, level) in forms_and_levels() {
            let attention = Attention::new().causal().form(form).level(level);
            let expected = inputs.bits(&attention);
            let got = |out: &Array4<T>, lse: Option<&Array3<f32>>, way: &str| {
                let out: Vec<T> = out.iter().copied().collect();
                assert!(bits(&out) == expected.0, "output of {way}: {} {form} {level}", T::DTYPE);
                if let Some(lse) = lse {
                    let lse: Vec<f32> = lse.iter().copied().collect();
                    assert!(bits(&lse) == expected.1, "lse of {way}: {} {form} {level}", T::DTYPE);
                }
            };
            let w = &mut Workspace::new();
            let new = || (Array4::<T>::default(DIMS.out()), Array3::<f32>::zeros(DIMS.lse()));

            got(&attention.run(&q, &k, &v).unwrap(), None, "run");
            let (out, lse) = attention.run_with_lse(q.view(), &k.view(), v.to_shared().view()).unwrap();
            got(&out, Some(&lse), "run_with_lse");
            let (out, lse) = attention.run_with_lse(inputs.q(), inputs.k(), inputs.v()).unwrap();
            got(&out, Some(&lse), "run_with_lse of tensors");

            let (mut out, mut lse) = new();
            attention.compute(&q, (&k, &v), &mut out, &mut lse, w).unwrap();
            got(&out, Some(&lse), "arrays");
            let (mut out, mut lse) = new();
            attention.compute(q.view(), (k.view(), v.view()), out.view_mut(), lse.view_mut(), w).unwrap();
            got(&out, Some(&lse), "views");
            let (mut out, mut lse) = new();
            let to_lse = TensorMut::from(&mut lse);
            attention.compute(&q, (inputs.k(), AnyTensorRef::from(&v)), &mut out, to_lse, w).unwrap();
            got(&out, Some(&lse), "arrays beside tensors");
            let (mut out, _) = new();
            attention.run_into(&q, &k, &v, &mut out).unwrap();
            got(&out, None, "run_into");
            let (mut out, mut lse) = new();
            let prepared = attention.prepare(&q, (&k, &v)).unwrap();
            prepared.compute(&q, (k.view(), &v), &mut out, &mut lse, w).unwrap();
            got(&out, Some(&lse), "a prepared call");

            // Other strides, of an input and of the output.
            let permuted = q_by_rows.view().permuted_axes([0, 2, 1, 3]);
            let [batch, heads, queries, value_dim] = DIMS.out();
            let mut wider = Array4::<T>::default((batch, heads, queries, value_dim + 3));
            let (_, mut lse) = new();
            attention.compute(permuted, (&k, &v), wider.slice_mut(s![.., .., .., 2..-1]), &mut lse, w).unwrap();
            got(&wider.slice(s![.., .., .., 2..-1]).to_owned(), Some(&lse), "strided views");
        }
    }
    of::<f32>();
    of::<f16>();
    of::<bf16>();
}

/// A tensor of some type whose elements are all one.
fn repeated(dtype: DType, shape: [usize; 4]) -> AnyTensorRef<'static> {
    static ZEROS: ([f32; 1], [f16; 1], [bf16; 1]) = ([0.0], [f16::ZERO], [bf16::ZERO]);
    match dtype {
        DType::F16 => TensorRef::with_strides(&ZEROS.1, 0, shape, [0; 4]).unwrap().into(),
        DType::Bf16 => TensorRef::with_strides(&ZEROS.2, 0, shape, [0; 4]).unwrap().into(),
        _ => TensorRef::with_strides(&ZEROS.0, 0, shape, [0; 4]).unwrap().into(),
    }
}

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// A plan, or the refusal, is the same from shapes alone.
#[test]
fn plans_from_shapes() {
    let mut seen = Vec::new();
    let mut refused = 0;
    // On either side of every threshold of the plan: rows of either form, rows of a task or block, keys of a split.
    let grid = [0, 1, 2, 3, 4, 5, 6, 7, 63, 64, 65, 256, 257]
        .into_iter()
        .flat_map(|seq_q| [0, 1, 127, 128, 255, 256, 512, 513, 1300].map(|seq_kv| (seq_q, seq_kv)));
    for (seq_q, seq_kv) in grid {
        for (heads_q, heads_kv) in [(1, 1), (8, 2), (64, 64), (4, 3)] {
            for head_dim in [0, 63, 64, 128, (1 << 20) + 1] {
                let dims = Dims { heads_q, heads_kv, ..Dims::new(1, seq_q, seq_kv, head_dim) };
                for (dtype_q, dtype_k) in TYPES.into_iter().flat_map(|q| TYPES.map(|k| (q, k))) {
                    let dtypes = [dtype_q, dtype_k, TYPES[(seq_q + seq_kv) % 3]];
                    for level in Level::available() {
                        let attention = Attention::new().level(level);
                        let case = format!("{dims:?} {dtypes:?} {level}");
                        match same_plan(&attention, dims, dtypes, &case) {
                            Ok(plan) if !seen.contains(&(plan.form(), plan.operands())) => {
                                seen.push((plan.form(), plan.operands()));
                            }
                            Ok(_) => {}
                            Err(_) => refused += 1,
                        }
                    }
                }
            }
        }
    }
    for form in [Form::Decode, Form::Prefill] {
        assert!(seen.contains(&(form, Operands::F32)), "{form} was never planned");
        let pairs = Level::available().any(|level| level == Level::Avx512Bf16);
        assert_eq!(seen.contains(&(form, Operands::Bf16Pairs)), pairs, "{form} of pairs");
    }
    assert!(refused > 0);

    // Options count, too.
    let attend = [true; 9];
    let mask = TensorRef::from_slice(&attend, [9]).unwrap();
    for attention in [
        Attention::new().threads(Threads::Serial),
        Attention::new().form(Form::Prefill),
        Attention::new().form(Form::Decode).causal(),
        Attention::new().scale(1e-5),
        Attention::new().scale(f32::MAX),
        Attention::new().key_lengths(&[9]),
        Attention::new().key_lengths(&[10]),
        Attention::new().key_lengths(&[9, 9]),
        Attention::new().mask(mask),
        Attention::new().mask(mask).mask(mask),
    ] {
        for (seq_q, seq_kv) in [(1, 9), (30, 9), (1, 10), (30, 10), (900, 9)] {
            let case = format!("{attention:?}, {seq_q} queries, {seq_kv} keys");
            let _ = same_plan(&attention, Dims::new(2, seq_q, seq_kv, 64), [DType::Bf16; 3], &case);
        }
    }
    for level in Level::ALL.iter().copied() {
        let attention = Attention::new().level(level);
        let planned = same_plan(&attention, Dims::new(2, 3, 9, 64), [DType::F32; 3], &level.to_string());
        assert_eq!(planned.is_ok(), Level::available().any(|available| available == level));
    }
}

/// The plan of tensors, which must be that of their types and shapes.
#[track_caller]
fn same_plan(attention: &Attention<'_>, dims: Dims, dtypes: [DType; 3], case: &str) -> Result<flashtile::Plan, Error> {
    let [q, k, v] = [(dtypes[0], dims.q()), (dtypes[1], dims.k()), (dtypes[2], dims.v())];
    let tensor = |(dtype, shape)| repeated(dtype, shape);
    let of_tensors = attention.plan(tensor(q), (tensor(k), tensor(v)));
    let of_shapes = attention.plan_shapes(q, k, v);
    // (By text where a number in an error is NaN.)
    assert_eq!(format!("{of_shapes:?}"), format!("{of_tensors:?}"), "{case}");
    of_tensors
}

/// Keys and values with room for more keys than are used.
struct Cache<T> {
    inputs: Inputs<T>,
}

impl<T: Bits> Cache<T> {
    fn keys(&self, n: usize) -> [TensorRef<'_, T>; 2] {
        [self.inputs.k().narrow(2, ..n).unwrap(), self.inputs.v().narrow(2, ..n).unwrap()]
    }

    fn computed(&self, attention: &Attention<'_>, n: usize, workspace: &mut Workspace) -> Written {
        let (q, [k, v]) = (self.inputs.q(), self.keys(n));
        written::<T>(self.inputs.dims, |out, lse| attention.compute(q, (k, v), out, lse, workspace))
    }

    fn prepared(&self, prepared: &Prepared<'_>, n: usize, workspace: &mut Workspace) -> Written {
        let (q, [k, v]) = (self.inputs.q(), self.keys(n));
        written::<T>(self.inputs.dims, |out, lse| prepared.compute(q, (k, v), out, lse, workspace))
    }

    fn prepare<'a>(&self, attention: &Attention<'a>, n: usize) -> Result<Prepared<'a>, Error> {
        let [k, v] = self.keys(n);
        attention.prepare(self.inputs.q(), (k, v))
    }
}

/// On either side of what changes with the number of keys: decode or prefill (128, 256), a tile (48 to 256), a split (512).
const KEYS: [usize; 30] = [
    0, 1, 2, 3, 15, 16, 17, 47, 48, 49, 127, 128, 129, 191, 192, 193, 239, 240, 241, 255, 256, 257, 511, 512, 513, 600,
    1024, 1025, 1100, 1101,
];

/// A decode loop that plans anew for each number of keys gives the bits of calls that are planned alone.
#[test]
fn prepared_for_growing_keys() {
    fn of<T: Bits>() {
        // Rows of a key/value head: 1, 8, 12 (prefill up to 127 keys, then decode), 14 and 40 (prefill).
        for (seq_q, group) in [(1, 1), (2, 4), (3, 4), (7, 2), (40, 1)] {
            let dims = Dims { heads_q: 2 * group, ..Dims::new(2, seq_q, KEYS[KEYS.len() - 1], 64) };
            let cache = Cache { inputs: Inputs::<T>::random(dims, &mut Rng(6)) };
            for level in Level::available() {
                let base = Attention::new().level(level);
                let forms = [base.clone(), base.clone().causal().softcap(20.0).window(Some(300), None)];
                let forced = [Form::Decode, Form::Prefill].map(|form| base.clone().causal().form(form));
                for attention in forms.into_iter().chain(forced) {
                    grow(&cache, &attention, &format!("{seq_q} queries, groups of {group}, {} {level}", T::DTYPE));
                }
            }
        }
    }
    of::<f32>();
    of::<bf16>();
}

fn grow<T: Bits>(cache: &Cache<T>, attention: &Attention<'_>, case: &str) {
    let (w, w_prepared) = (&mut Workspace::new(), &mut Workspace::new());
    let mut prepared = cache.prepare(attention, 1).unwrap();
    // Growing, then shrinking; the same number twice.
    for n in KEYS.into_iter().chain([1101]).chain(KEYS.into_iter().rev().step_by(4)) {
        prepared.set_keys(n).unwrap();
        let [k, v] = cache.keys(n);
        assert_eq!(*prepared.plan(), attention.plan(cache.inputs.q(), (k, v)).unwrap(), "{n} keys, {case}");
        let expected = cache.computed(attention, n, w);
        assert!(cache.prepared(&prepared, n, w_prepared) == expected, "{n} keys, {case}: {}", prepared.plan());
    }
}

/// The loop above meets both forms, and splits that are tasks and that are none.
#[test]
fn growing_keys_cross_the_thresholds() {
    let dims = Dims { heads_q: 8, ..Dims::new(2, 3, KEYS[KEYS.len() - 1], 64) };
    let cache = Cache { inputs: Inputs::<f32>::random(dims, &mut Rng(6)) };
    for level in Level::available() {
        let mut prepared = cache.prepare(&Attention::new().level(level), 1).unwrap();
        let plans = KEYS.map(|n| {
            prepared.set_keys(n).unwrap();
            (n, prepared.plan().form(), prepared.plan().tasks())
        });
        for (n, form, tasks) in plans {
            assert_eq!(form, if n < 128 { Form::Prefill } else { Form::Decode }, "{n} keys, {level}");
            assert_eq!(tasks, if n > 512 { 2 * n.div_ceil(512) } else { 2 }, "{n} keys, {level}");
        }
    }
}

/// `set_keys` refuses what `compute` would refuse, with the same error, and nothing else. After a refusal everything is as
/// it was.
#[test]
fn refused_numbers_of_keys() {
    let dims = Dims { batch: 2, ..Dims::new(2, 3, 600, 16) };
    let cache = Cache { inputs: Inputs::<f32>::random(dims, &mut Rng(7)) };
    let mut rng = Rng(8);
    let attend: Vec<bool> = (0..3 * 40).map(|_| !rng.one_in(4)).collect();
    let bias: Vec<f32> = rng.normals(40);
    let one_for_all = TensorRef::from_slice(&attend[..3], [3, 1]).unwrap();
    for (name, attention, allowed) in [
        ("plain", Attention::new().causal(), 0..usize::MAX),
        ("lengths", Attention::new().causal().key_lengths(&[40, 7]), 40..usize::MAX),
        ("no keys", Attention::new().key_lengths(&[0, 0]), 0..usize::MAX),
        ("a mask", Attention::new().mask(TensorRef::from_slice(&attend, [3, 40]).unwrap()), 40..41),
        ("a mask for all keys", Attention::new().mask(one_for_all), 0..usize::MAX),
        ("a bias", Attention::new().bias(TensorRef::from_slice(&bias, [40]).unwrap()), 40..41),
    ] {
        let w = &mut Workspace::new();
        let mut prepared = cache.prepare(&attention, 40).unwrap();
        let mut current = 40;
        for n in [39, 40, 41, 0, 1, 6, 7, 513, 40, 600, usize::MAX, usize::MAX / 8, 1 << 58, 39, 40] {
            let before = *prepared.plan();
            let [k, v] = [dims.k(), dims.v()].map(|[batch, heads, _, dim]| (DType::F32, [batch, heads, n, dim]));
            let planned = attention.plan_shapes((DType::F32, dims.q()), k, v);
            let done = prepared.set_keys(n);
            assert_eq!(done, planned.clone().map(|_| ()), "{n} keys, {name}");
            if n <= dims.seq_kv {
                assert_eq!(done.is_ok(), allowed.contains(&n), "{n} keys, {name}");
            }
            match planned {
                Ok(plan) => {
                    assert_eq!(*prepared.plan(), plan, "{n} keys, {name}");
                    current = n;
                }
                Err(_) => {
                    assert_eq!(*prepared.plan(), before, "{n} keys, {name}: changed by a refusal");
                }
            }
            let expected = cache.computed(&attention, current, w);
            assert!(cache.prepared(&prepared, current, w) == expected, "{current} keys after {n}, {name}");
            // Tensors of another length are refused.
            let [k, v] = cache.keys(if current == 600 { 599 } else { current + 1 });
            let mut out = vec![1.0f32; len(dims.out())];
            let to = TensorMut::from_slice(&mut out, dims.out()).unwrap();
            assert!(prepared.compute(cache.inputs.q(), (k, v), to, None, w).is_err(), "{n} keys, {name}");
            assert!(out.iter().all(|&x| x == 1.0), "{n} keys, {name}: a refused call wrote");
        }
    }
}

/// A window given twice shows what both windows show.
#[test]
fn windows_compose() {
    let dims = Dims::new(2, 30, 70, 8);
    let inputs = Inputs::<f32>::random(dims, &mut Rng(9));
    let bounds = [None, Some(0), Some(3), Some(20), Some(usize::MAX)];
    let windows: Vec<_> = bounds.into_iter().flat_map(|left| bounds.map(|right| (left, right))).collect();
    let least = |a: Option<usize>, b: Option<usize>| a.into_iter().chain(b).min();
    for (form, level) in forms_and_levels() {
        let base = Attention::new().form(form).level(level);
        let alone: Vec<_> =
            windows.iter().map(|&(left, right)| inputs.bits(&base.clone().window(left, right))).collect();
        for &a in &windows {
            for &b in &windows {
                let both = (least(a.0, b.0), least(a.1, b.1));
                let expected = &alone[windows.iter().position(|&window| window == both).unwrap()];
                let got = inputs.bits(&base.clone().window(a.0, a.1).window(b.0, b.1));
                assert!(got == *expected, "{a:?} and {b:?}: {form} {level}");
            }
        }
    }
}

/// What can't be combined is refused, whichever comes first, and also where both are the same.
#[test]
fn options_given_twice() {
    let x = [0.0f32; 24];
    let x = TensorRef::from_slice(&x, [1, 2, 3, 4]).unwrap();
    let (attend, bias) = ([true; 3], [0.0f32; 3]);
    let mask = TensorRef::from_slice(&attend, [3]).unwrap();
    let bias = TensorRef::from_slice(&bias, [3]).unwrap();
    let twice: [(&str, Attention<'_>); 6] = [
        ("mask", Attention::new().mask(mask).mask(mask)),
        ("bias", Attention::new().bias(bias).bias(bias)),
        ("alibi", Attention::new().alibi(AlibiSlopes::Standard).alibi(AlibiSlopes::Standard)),
        ("key_lengths", Attention::new().key_lengths(&[3]).key_lengths(&[2u32])),
        // The first of two.
        ("mask", Attention::new().mask(mask).bias(bias).mask(mask).bias(bias)),
        ("bias", Attention::new().mask(mask).bias(bias).bias(bias).clone().mask(mask)),
    ];
    for (option, attention) in twice {
        assert_eq!(attention.plan(x, (x, x)).unwrap_err(), Error::GivenTwice { option });
    }
    // One of each is none twice.
    let once = Attention::new().mask(mask).bias(bias).alibi(AlibiSlopes::Standard).key_lengths(&[3]);
    assert!(once.plan(x, (x, x)).is_ok());
    // The last scale, softcap, level, form and offset count.
    let last = Attention::new().scale(0.5).scale(0.25).softcap(3.0).softcap(9.0).form(Form::Prefill).form(Form::Decode);
    let alone = Attention::new().scale(0.25).softcap(9.0).form(Form::Decode);
    let inputs = Inputs::<f32>::random(Dims::new(1, 4, 9, 8), &mut Rng(10));
    assert_eq!(inputs.bits(&last), inputs.bits(&alone));
}
