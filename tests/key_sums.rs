//! Promise: the sums of each key's probabilities are those of the definition within the bound of `docs/numerics.md`, with every
//! option, type and layout. Their bits depend on nothing but the rows and the key.

mod support;

use flashtile::{
    AnyTensorRef, Attention, Error, Form, KeysValues, Level, QueryOffset, TensorMut, TensorRef, Threads, Workspace,
    merge, reference,
};
use support::any_problem::Problem;
use support::bound::{Chains, exact, exact_key_sums, sees};
use support::layouts::Layout;
use support::problems::bits;
use support::random_problem::{large_dims, problem, small_dims};
use support::{Dims, Inputs, Rng, len};

fn sums_shape(dims: &Dims) -> [usize; 3] {
    [dims.batch, dims.heads_q, dims.seq_kv]
}

/// Checks the sums of `problem` at every level, and the reference's.
fn check(problem: &Problem, rng: &mut Rng) {
    let dims = problem.dims;
    let to = Layout::random(rng, sums_shape(&dims), false);
    for level in Level::available() {
        let exact = exact(problem, Chains::of(&problem.plan(level), &dims));
        let (right, bounds) = exact_key_sums(problem, &exact);
        let sums = problem.key_sums(level, &problem.run(level).lse, to);
        for (n, [b, h, j]) in Layout::contiguous(sums_shape(&dims)).indices().enumerate() {
            let (sum, right, bound) = (sums[n] as f64, right[n], bounds[n]);
            let near = if right.is_nan() { sum.is_nan() } else { (sum - right).abs() <= bound };
            assert!(
                near,
                "sums[{b}, {h}, {j}] is {sum:e} but must be {right:e} within {bound:e} at {level}\n{problem}"
            );
            let hidden = !(0..dims.seq_q).any(|i| sees(problem, [b, h, i, j]));
            assert!(!hidden || sums[n].to_bits() == 0, "the sum of a hidden key is {sum} at {level}\n{problem}");
        }
        for (ours, theirs) in right.iter().zip(problem.reference_key_sums()) {
            let near = (ours - theirs).abs() <= 1e-9 * ours.max(1.0) || ours.is_nan() && theirs.is_nan();
            assert!(near, "the reference has {theirs}, not {ours}\n{problem}");
        }
    }
}

#[test]
fn random_problems() {
    for seed in 0..6000 {
        let rng = &mut Rng(seed);
        let dims = small_dims(rng);
        check(&problem(rng, dims), rng);
    }
}

#[test]
fn large_problems() {
    for seed in 0..24 {
        let rng = &mut Rng(seed);
        let dims = large_dims(rng);
        check(&problem(rng, dims), rng);
    }
}

/// The bound must not be so wide that anything passes: for ordinary numbers it is a millionth.
#[test]
fn the_bound_is_tight() {
    let mut rng = Rng(3);
    let dims = Dims { batch: 2, heads_q: 4, heads_kv: 2, ..Dims::new(1, 100, 300, 64) };
    let problem = Problem::plain(dims, || rng.normal());
    let exact = exact(&problem, Chains::of(&problem.plan(Level::Portable), &dims));
    let (sums, bounds) = exact_key_sums(&problem, &exact);
    let mut relative: Vec<f64> = sums.iter().zip(bounds).map(|(sum, bound)| bound / sum).collect();
    relative.sort_unstable_by(f64::total_cmp);
    assert!(relative[relative.len() / 2] < 1e-4, "{:e}", relative[relative.len() / 2]);
}

/// The sums of one call after attention, of tensors without gaps.
fn sums(attention: &Attention<'_>, inputs: &Inputs<f32>, workspace: &mut Workspace) -> Vec<f32> {
    let (dims, kv) = (inputs.dims, (inputs.k(), inputs.v()));
    let (mut out, mut lse) = (vec![0.0f32; len(dims.out())], vec![0.0; len(dims.lse())]);
    let out = TensorMut::from_slice(&mut out, dims.out()).unwrap();
    let into = TensorMut::from_slice(&mut lse, dims.lse()).unwrap();
    attention.compute(inputs.q(), kv, out, into, workspace).unwrap();
    sums_of(attention, inputs, &lse, workspace)
}

fn sums_of(attention: &Attention<'_>, inputs: &Inputs<f32>, lse: &[f32], workspace: &mut Workspace) -> Vec<f32> {
    let (dims, shape) = (inputs.dims, sums_shape(&inputs.dims));
    let (lse, mut sums) = (TensorRef::from_slice(lse, dims.lse()).unwrap(), vec![f32::NAN; len(shape)]);
    let into = TensorMut::from_slice(&mut sums, shape).unwrap();
    attention.key_sums(inputs.q(), (inputs.k(), inputs.v()), lse, into, workspace).unwrap();
    sums
}

/// A query's probabilities add up to 1, so all sums of a head add up to the queries that see a key; with sinks to less.
#[test]
fn the_sums_of_all_keys_are_the_queries() {
    let dims = Dims { batch: 2, heads_q: 4, heads_kv: 2, ..Dims::new(1, 70, 300, 16) };
    let inputs = Inputs::<f32>::random(dims, &mut Rng(4));
    for level in Level::available() {
        for form in [Form::Prefill, Form::Decode] {
            // The first 20 queries are before the first key.
            let attention = Attention::new().causal().query_offset(QueryOffset::At(-20)).level(level).form(form);
            for head in sums(&attention, &inputs, &mut Workspace::new()).chunks_exact(dims.seq_kv) {
                let all = head.iter().sum::<f32>();
                assert!((all - 50.0).abs() < 1e-3, "{all} at {level}, {form}");
            }
            let sinks = attention.sinks(&[1.0, 2.0, 0.0, -1.0]);
            for head in sums(&sinks, &inputs, &mut Workspace::new()).chunks_exact(dims.seq_kv) {
                assert!(head.iter().sum::<f32>() < 49.0, "{level}, {form}");
            }
        }
    }
}

/// Serial, in pools of several sizes, prepared, and in another batch: the same bits.
#[test]
fn bits_depend_on_the_rows_and_the_key() {
    for dims in [
        Dims { batch: 2, heads_q: 6, heads_kv: 2, ..Dims::new(1, 300, 700, 40) },
        Dims { batch: 3, heads_q: 8, heads_kv: 1, ..Dims::new(1, 1, 3000, 64) },
        Dims { batch: 1, heads_q: 8, heads_kv: 2, ..Dims::new(1, 17, 2100, 64) },
        Dims::new(2, 5, 4, 3),
    ] {
        let inputs = Inputs::<f32>::random(dims, &mut Rng(5));
        let mut workspace = Workspace::new();
        for level in Level::available() {
            let attention = Attention::new().causal().level(level);
            let serial = bits(&sums(&attention.clone().threads(Threads::Serial), &inputs, &mut workspace));
            assert_eq!(bits(&sums(&attention, &inputs, &mut workspace)), serial, "{dims:?} {level}");
            #[cfg(feature = "rayon")]
            for threads in [2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let pooled = pool.install(|| bits(&sums(&attention, &inputs, &mut workspace)));
                assert_eq!(pooled, serial, "{dims:?} {level} {threads} threads");
            }
            assert_eq!(bits(&prepared(&attention, &inputs)), serial, "{dims:?} {level} prepared");
            // The last sequence alone: its tasks have other numbers of keys.
            let alone = last_sequence(&inputs);
            let own = bits(&sums(&attention, &alone, &mut workspace));
            assert_eq!(own, serial[serial.len() - own.len()..], "{dims:?} {level} alone");
        }
    }
}

fn last_sequence(inputs: &Inputs<f32>) -> Inputs<f32> {
    let dims = Dims { batch: 1, ..inputs.dims };
    let last = |data: &[f32], shape| data[data.len() - len::<4>(shape)..].to_vec();
    Inputs { dims, q: last(&inputs.q, dims.q()), k: last(&inputs.k, dims.k()), v: last(&inputs.v, dims.v()) }
}

/// As [`sums`], by prepared calls.
fn prepared(attention: &Attention<'_>, inputs: &Inputs<f32>) -> Vec<f32> {
    let (dims, kv, mut workspace) = (inputs.dims, (inputs.k(), inputs.v()), Workspace::new());
    let prepared = attention.prepare(inputs.q(), kv).unwrap();
    let (mut out, mut lse) = (vec![0.0f32; len(dims.out())], vec![0.0; len(dims.lse())]);
    let mut sums = vec![f32::NAN; len(sums_shape(&dims))];
    let out = TensorMut::from_slice(&mut out, dims.out()).unwrap();
    prepared
        .compute(inputs.q(), kv, out, TensorMut::from_slice(&mut lse, dims.lse()).unwrap(), &mut workspace)
        .unwrap();
    let (lse, into) = (TensorRef::from_slice(&lse, dims.lse()), TensorMut::from_slice(&mut sums, sums_shape(&dims)));
    prepared.key_sums(inputs.q(), kv, lse.unwrap(), into.unwrap(), &mut workspace).unwrap();
    sums
}

/// A query whose lse is NaN makes the keys that it sees NaN, and no others: not those that hold NaN themselves and are hidden.
#[test]
fn nan_stays_with_the_keys_that_are_seen() {
    let dims = Dims::new(2, 40, 90, 8);
    for (form, level) in [Form::Prefill, Form::Decode].into_iter().flat_map(|f| Level::available().map(move |l| (f, l)))
    {
        let mut inputs = Inputs::<f32>::random(dims, &mut Rng(6));
        let attention = Attention::new().causal().query_offset(QueryOffset::FromStart).form(form).level(level);
        let clean = bits(&sums(&attention, &inputs, &mut Workspace::new()));
        // Head 0: the keys after the last query. Head 1: query 25 as well.
        inputs.k[40 * 8..90 * 8].fill(f32::NAN);
        inputs.k[130 * 8..].fill(f32::NAN);
        inputs.q[(40 + 25) * 8] = f32::NAN;
        let got = sums(&attention, &inputs, &mut Workspace::new());
        for (n, sum) in got.iter().enumerate() {
            let (head, key) = (n / 90, n % 90);
            match head == 1 && key <= 25 {
                true => assert!(sum.is_nan(), "key {key}, {form} {level}"),
                false => assert_eq!(sum.to_bits(), clean[n], "key {key} of head {head}, {form} {level}"),
            }
            assert!(key < 40 || sum.to_bits() == 0, "key {key} of head {head}, {form} {level}");
        }
    }
}

/// The queries may be some of those that attention was computed for, and the keys some of those that the lse is over.
#[test]
fn parts_of_queries_and_of_keys() {
    let dims = Dims { heads_q: 4, heads_kv: 2, ..Dims::new(1, 64, 200, 16) };
    let inputs = Inputs::<f32>::random(dims, &mut Rng(7));
    let attention = Attention::new();
    let run = |keys: std::ops::Range<usize>| {
        let kv = (inputs.k().narrow(2, keys.clone()).unwrap(), inputs.v().narrow(2, keys).unwrap());
        let (mut out, mut lse) = (vec![0.0f32; len(dims.out())], vec![0.0; len(dims.lse())]);
        let into = TensorMut::from_slice(&mut out, dims.out()).unwrap();
        let lse_into = TensorMut::from_slice(&mut lse, dims.lse()).unwrap();
        attention.compute(inputs.q(), kv, into, lse_into, &mut Workspace::new()).unwrap();
        (out, lse)
    };
    let part = |queries: std::ops::Range<usize>, keys: std::ops::Range<usize>, lse: &[f32]| {
        let kv = (inputs.k().narrow(2, keys.clone()).unwrap(), inputs.v().narrow(2, keys.clone()).unwrap());
        let lse = TensorRef::<_, 3>::from_slice(lse, dims.lse()).unwrap().narrow(2, queries.clone()).unwrap();
        let mut sums = vec![f32::NAN; dims.heads_q * keys.len()];
        let into = TensorMut::from_slice(&mut sums, [1, dims.heads_q, keys.len()]).unwrap();
        let q = inputs.q().narrow(2, queries).unwrap();
        attention.key_sums(q, kv, lse, into, &mut Workspace::new()).unwrap();
        sums
    };
    let (mut out, mut lse) = run(0..200);
    let whole = part(0..64, 0..200, &lse);
    let (first, last) = (part(0..40, 0..200, &lse), part(40..64, 0..200, &lse));
    for ((whole, first), last) in whole.iter().zip(&first).zip(&last) {
        assert!((whole - (first + last)).abs() < 1e-5, "{first} and {last}, not {whole}");
    }
    // Merged results over parts of the keys.
    let ((mut a, mut lse_a), (b, lse_b)) = (run(0..130), run(130..200));
    merge(
        TensorMut::from_slice(&mut a, dims.out()).unwrap(),
        TensorMut::from_slice(&mut lse_a, dims.lse()).unwrap(),
        TensorRef::from_slice(&b, dims.out()).unwrap(),
        TensorRef::from_slice(&lse_b, dims.lse()).unwrap(),
    )
    .unwrap();
    let of_part = part(0..64, 130..200, &lse_a);
    for (n, sum) in of_part.iter().enumerate() {
        let of_whole = whole[n / 70 * 200 + 130 + n % 70];
        assert!((sum - of_whole).abs() < 1e-5, "{sum}, not {of_whole}");
    }
    out.clear();
    lse.clear();
}

/// With a log-sum-exp of other scores, a probability is still at most 1.
#[test]
fn a_probability_is_at_most_one() {
    let dims = Dims::new(1, 33, 50, 8);
    let inputs = Inputs::<f32>::random(dims, &mut Rng(8));
    for (form, level) in [Form::Prefill, Form::Decode].into_iter().flat_map(|f| Level::available().map(move |l| (f, l)))
    {
        let attention = Attention::new().form(form).level(level);
        for (lse, expected) in
            [(-1e9, 33.0), (f32::MIN, 33.0), (1e9, 0.0), (f32::INFINITY, 0.0), (f32::NEG_INFINITY, 0.0)]
        {
            let got = sums_of(&attention, &inputs, &[lse; 33], &mut Workspace::new());
            assert!(got.iter().all(|sum| *sum == expected), "{lse}: {got:?}");
        }
    }
}

/// Without queries every sum is 0; without sums nothing is computed.
#[test]
fn dimensions_of_zero() {
    for n in 0..6 {
        let size = |axis: usize, size: usize| if axis == n { 0 } else { size };
        let heads = size(1, 2);
        let dims = Dims {
            batch: size(0, 2),
            heads_q: 2 * heads,
            heads_kv: heads,
            seq_q: size(2, 3),
            seq_kv: size(3, 70),
            head_dim: size(4, 5),
            value_dim: size(5, 4),
        };
        let inputs = Inputs::<f32>::random(dims, &mut Rng(9));
        for level in Level::available() {
            let got = sums(&Attention::new().level(level), &inputs, &mut Workspace::new());
            assert_eq!(got.len(), len(sums_shape(&dims)));
            let expected = if dims.seq_q == 0 { 0.0 } else { 3.0 / 70.0 };
            assert!(dims.head_dim > 0 && dims.seq_q > 0 || got.iter().all(|sum| (sum - expected).abs() < 1e-6));
        }
    }
}

/// Tensors that don't fit are refused, and nothing is written.
#[test]
fn wrong_calls() {
    let data = [0.5f32; 2 * 3 * 4];
    let x = || TensorRef::<f32, 4>::from_slice(&data, [1, 2, 3, 4]).unwrap();
    let refused = |kv: KeysValues<'_>, lse: [usize; 3], to: [usize; 3], error: Error| {
        let (lse_data, mut sums) = (vec![0.0f32; len(lse)], vec![7.5f32; len(to)]);
        let lse = TensorRef::from_slice(&lse_data, lse).unwrap();
        let into = TensorMut::from_slice(&mut sums, to).unwrap();
        let got = Attention::new().key_sums(x(), kv, lse, into, &mut Workspace::new()).unwrap_err();
        assert_eq!(got, error);
        let (lse, into) = (TensorRef::from_slice(&lse_data, lse.shape()), TensorMut::from_slice(&mut sums, to));
        let prepared = Attention::new().prepare(x(), (x(), x())).unwrap();
        let got = prepared.key_sums(x(), kv, lse.unwrap(), into.unwrap(), &mut Workspace::new()).unwrap_err();
        assert_eq!(got, error);
        assert!(sums.iter().all(|sum| *sum == 7.5));
    };
    let mismatch = |tensor, dimension, expected, got| Error::ShapeMismatch { tensor, dimension, expected, got };
    let both = || KeysValues::from((x(), x()));
    refused(both(), [1, 2, 4], [1, 2, 3], mismatch("lse", "seq_q", 3, 4));
    refused(both(), [1, 1, 3], [1, 2, 3], mismatch("lse", "heads_q", 2, 1));
    refused(both(), [1, 2, 3], [1, 2, 4], mismatch("sums", "seq_kv", 3, 4));
    refused(both(), [1, 2, 3], [2, 2, 3], mismatch("sums", "batch", 1, 2));
    let shorter: AnyTensorRef<'_> = x().narrow(2, ..2).unwrap().into();
    refused((x(), shorter).into(), [1, 2, 3], [1, 2, 3], mismatch("values", "seq_kv", 3, 2));
    assert_eq!(
        reference::key_sums(&Attention::new(), x(), (x(), shorter)).unwrap_err(),
        mismatch("values", "seq_kv", 3, 2)
    );
}
