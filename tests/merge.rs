//! Promise: outputs and log-sum-exps of disjoint sets of keys merge to those of all keys. The state of no keys changes nothing.

mod support;

use flashtile::{Attention, Error, TensorMut, TensorRef, merge};
use support::layouts::ARRANGEMENTS;
use support::problems::{bits, forms_and_levels};
use support::{Dims, Inputs, Rng, len};

/// An output with its log-sum-exps.
#[derive(Clone, Debug)]
struct State {
    dims: Dims,
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl State {
    fn new(dims: Dims, (out, lse): (Vec<f32>, Vec<f32>)) -> Self {
        State { dims, out, lse }
    }

    /// The state of no keys.
    fn empty(dims: Dims) -> Self {
        Self::new(dims, (vec![0.0; len(dims.out())], vec![f32::NEG_INFINITY; len(dims.lse())]))
    }

    fn random(dims: Dims, rng: &mut Rng) -> Self {
        let lse = rng.normals::<f32>(len(dims.lse())).into_iter().map(|x| x * 10.0).collect();
        Self::new(dims, (rng.normals(len(dims.out())), lse))
    }

    fn merged(mut self, other: &State) -> State {
        let dims = self.dims;
        merge(
            TensorMut::from_slice(&mut self.out, dims.out()).unwrap(),
            TensorMut::from_slice(&mut self.lse, dims.lse()).unwrap(),
            TensorRef::from_slice(&other.out, dims.out()).unwrap(),
            TensorRef::from_slice(&other.lse, dims.lse()).unwrap(),
        )
        .unwrap();
        self
    }

    fn bits(&self) -> (Vec<u32>, Vec<u32>) {
        (bits(&self.out), bits(&self.lse))
    }

    /// Each element is within `n` roundings of the other state's. Those of outputs are in units of `values`.
    fn assert_near(&self, other: &State, n: f32, values: f32, case: &str) {
        let u = f32::EPSILON / 2.0;
        for (a, b) in self.out.iter().zip(&other.out) {
            assert!((a - b).abs() <= n * u * values, "{a} and {b}: {case}");
        }
        for (a, b) in self.lse.iter().zip(&other.lse) {
            assert!(a == b || (a - b).abs() <= n * u * a.abs().max(1.0), "lse {a} and {b}: {case}");
        }
    }
}

const SIZES: Dims = Dims { batch: 2, heads_q: 3, heads_kv: 3, seq_q: 5, seq_kv: 90, head_dim: 8, value_dim: 7 };

/// Attention over pieces of the keys, merged, against attention over all keys.
///
/// Each piece and the whole are within the error bound of attention (for 90 keys with scores below 20 some
/// 2 * (8 + 8) * 20 + 90 roundings), and each merge adds a rounding or two.
#[test]
fn split_equals_unsplit() {
    let mut rng = Rng(1);
    for round in 0..60 {
        let inputs = Inputs::<f32>::random(SIZES, &mut rng);
        let largest = inputs.v.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        // A mask, so that some rows see nothing of some pieces.
        let attend: Vec<bool> = (0..len(SIZES.scores())).map(|_| rng.one_in(3)).collect();
        let cuts = [0, rng.below(30), 30 + rng.below(30), 60 + rng.below(30), 90];
        for (form, level) in forms_and_levels() {
            let state = |keys: std::ops::Range<usize>| {
                let dims = Dims { seq_kv: keys.len(), ..SIZES };
                let cut = |data: &[f32], cols: usize| {
                    let heads = data.chunks_exact(SIZES.seq_kv * cols);
                    heads.flat_map(|head| head[keys.start * cols..keys.end * cols].to_vec()).collect::<Vec<_>>()
                };
                let part = Inputs { dims, q: inputs.q.clone(), k: cut(&inputs.k, 8), v: cut(&inputs.v, 7) };
                let strides = [3 * 5 * 90, 5 * 90, 90, 1];
                let first = if keys.is_empty() { 0 } else { keys.start };
                let mask = TensorRef::with_strides(&attend, first, dims.scores(), strides).unwrap();
                State::new(dims, part.compute(&Attention::new().mask(mask).form(form).level(level)))
            };
            let whole = state(0..90);
            let merged =
                cuts.windows(2).map(|cut| state(cut[0]..cut[1])).fold(State::empty(SIZES), |a, b| a.merged(&b));
            merged.assert_near(
                &whole,
                2.0 * (2.0 * 16.0 * 20.0 + 90.0),
                largest,
                &format!("round {round} {form:?} {level}"),
            );
        }
    }
}

/// The empty state on either side changes nothing, bit for bit.
#[test]
fn no_keys_change_nothing() {
    let (empty, mut state) = (State::empty(SIZES), State::random(SIZES, &mut Rng(2)));
    state.out[0] = -0.0;
    state.out[1] = f32::from_bits(1);
    state.out[2] = f32::MAX;
    state.lse[0] = -87.5;
    state.lse[1] = f32::MAX;
    state.lse[2] = f32::MIN;
    assert_eq!(state.clone().merged(&empty).bits(), state.bits());
    assert_eq!(empty.clone().merged(&state).bits(), state.bits());
    let both = empty.clone().merged(&empty);
    assert_eq!(both.bits(), empty.bits());
    assert!(both.out.iter().all(|x| x.to_bits() == 0));
}

/// A merge rounds each number once; so two orders of three merges differ by a few roundings.
#[test]
fn associative_and_commutative() {
    let mut rng = Rng(3);
    for round in 0..200 {
        let mut states = || {
            let mut state = State::random(SIZES, &mut rng);
            for (out, lse) in state.out.chunks_exact_mut(SIZES.value_dim).zip(&mut state.lse) {
                if rng.one_in(5) {
                    out.fill(0.0);
                    *lse = f32::NEG_INFINITY;
                }
            }
            state
        };
        let (a, b, c) = (states(), states(), states());
        let case = format!("round {round}");
        let left = a.clone().merged(&b).merged(&c);
        let right = a.clone().merged(&b.clone().merged(&c));
        // A factor is off by as much as the log-sum-exp before it: 50 here, in roundings of its own size.
        left.assert_near(&right, 4.0 * 64.0, 5.0, &case);
        a.clone().merged(&b).assert_near(&b.merged(&a), 2.0, 5.0, &case);
    }
}

/// The output of a side without keys may hold anything.
#[test]
fn the_output_of_no_keys_is_ignored() {
    let mut rng = Rng(4);
    for poison in [f32::NAN, f32::INFINITY, f32::from_bits(0x7f80_0001), f32::MAX] {
        let state = State::random(SIZES, &mut rng);
        let garbage = State { out: vec![poison; len(SIZES.out())], ..State::empty(SIZES) };
        assert_eq!(state.clone().merged(&garbage).bits(), state.bits());
        assert_eq!(garbage.clone().merged(&state).bits(), state.bits());
    }
}

/// Where both sides have no keys, the output is exactly 0, whatever either held, in any layout and beside other rows.
#[test]
fn two_states_of_no_keys_give_zero() {
    let mut rng = Rng(8);
    let (mut state, other) = (State::random(SIZES, &mut rng), State::random(SIZES, &mut rng));
    let (width, poisons) = (SIZES.value_dim, [f32::NAN, f32::INFINITY, -0.0, 7.0, f32::from_bits(0x7f80_0001)]);
    let expected = state.clone().merged(&other).bits();
    let (mut empty, mut other) = (other.clone(), other);
    for (row, out) in state.out.chunks_exact_mut(width).enumerate().filter(|(row, _)| row % 3 == 1) {
        out.fill(poisons[row / 3 % poisons.len()]);
        state.lse[row] = f32::NEG_INFINITY;
        other.lse[row] = f32::NEG_INFINITY;
        other.out[row * width] = poisons[row % poisons.len()];
    }
    let (out, lse) = state.clone().merged(&other).bits();
    for row in 0..lse.len() {
        let own = &out[row * width..][..width];
        if row % 3 == 1 {
            assert!(own.iter().all(|x| *x == 0) && lse[row] == f32::NEG_INFINITY.to_bits(), "row {row}");
        } else {
            assert_eq!((own, lse[row]), (&expected.0[row * width..][..width], expected.1[row]), "row {row}");
        }
    }
    empty.lse.fill(f32::NEG_INFINITY);
    empty.out.fill(f32::NAN);
    for to in ARRANGEMENTS {
        let (out_a, lse_a) = (to.of(SIZES.out()), to.of(SIZES.lse()));
        let (mut out, mut lse) = (out_a.scatter(&empty.out, 9.0), lse_a.scatter(&empty.lse, 9.0));
        let (dims, from) = (SIZES, &empty);
        merge(
            out_a.tensor_mut(&mut out),
            lse_a.tensor_mut(&mut lse),
            TensorRef::from_slice(&from.out, dims.out()).unwrap(),
            TensorRef::from_slice(&from.lse, dims.lse()).unwrap(),
        )
        .unwrap();
        let (out, gaps) = out_a.gather(&out);
        assert!(out.iter().all(|x| x.to_bits() == 0) && gaps.iter().all(|x| *x == 9.0), "{to:?}");
    }
}

/// A NaN in a log-sum-exp shows in its row, one in an output in its element, and nowhere else.
#[test]
fn nan_stays_in_its_row() {
    let mut rng = Rng(5);
    let (a, b) = (State::random(SIZES, &mut rng), State::random(SIZES, &mut rng));
    let (clean, width) = (a.clone().merged(&b).bits(), SIZES.value_dim);
    for side in 0..2 {
        for row in 0..len(SIZES.lse()) {
            let (mut a, mut b) = (a.clone(), b.clone());
            let state = if side == 0 { &mut a } else { &mut b };
            state.lse[row] = f32::NAN;
            let (out, lse) = a.merged(&b).bits();
            for n in 0..lse.len() {
                let (own, expected) = (&out[n * width..][..width], &clean.0[n * width..][..width]);
                if n == row {
                    assert!(own.iter().chain([&lse[n]]).all(|x| *x == f32::NAN.to_bits()));
                } else {
                    assert_eq!((own, lse[n]), (expected, clean.1[n]));
                }
            }
        }
        for at in 0..len(SIZES.out()) {
            let (mut a, mut b) = (a.clone(), b.clone());
            if side == 0 {
                a.out[at] = f32::NAN
            } else {
                b.out[at] = f32::NAN
            };
            let (out, lse) = a.merged(&b).bits();
            assert_eq!(lse, clean.1);
            for (n, x) in out.into_iter().enumerate() {
                assert_eq!(x, if n == at { f32::NAN.to_bits() } else { clean.0[n] });
            }
        }
    }
}

/// Equal log-sum-exps give the mean, whatever their size: no sum of them leaves the range of numbers.
#[test]
fn far_log_sum_exps() {
    let one = Dims::new(1, 1, 1, 1);
    for lse in [0.0, 88.0, 1e4, 1e30, f32::MAX, f32::MIN, -1e30, -104.0] {
        let state = |out: f32, lse: f32| State::new(one, (vec![out], vec![lse]));
        let merged = state(1.0, lse).merged(&state(3.0, lse));
        assert_eq!(merged.out, [2.0]);
        assert!((merged.lse[0] - (lse as f64 + 2f64.ln()) as f32).abs() <= lse.abs() * f32::EPSILON);
        // A state that is merged with a far larger one does not count.
        if lse.abs() > 1e4 {
            let large = if lse > 0.0 { lse } else { 0.0 };
            let merged = state(1.0, large).merged(&state(7.0, if lse > 0.0 { 0.0 } else { lse }));
            assert_eq!((merged.out[0], merged.lse[0]), (1.0, large));
        }
    }
}

/// A side whose factor is 0 still shows a NaN or infinity of its output. Only the state of no keys is left out.
#[test]
fn a_faint_side_shows_what_is_not_finite() {
    let one = Dims::new(1, 1, 1, 1);
    // exp(-745) is the smallest number of f64 above 0.
    for faint in [-700.0, -750.0, -1e4, f32::MIN] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (clear, faint) = (State::new(one, (vec![1.0], vec![0.0])), State::new(one, (vec![bad], vec![faint])));
            for merged in [clear.clone().merged(&faint), faint.clone().merged(&clear)] {
                assert_eq!((bits(&merged.out), merged.lse), (bits(&[bad]), vec![0.0]), "{faint:?}");
            }
        }
    }
}

#[test]
fn any_layout() {
    let mut rng = Rng(6);
    let (a, b) = (State::random(SIZES, &mut rng), State::random(SIZES, &mut rng));
    let expected = a.clone().merged(&b).bits();
    for to in ARRANGEMENTS {
        for from in ARRANGEMENTS {
            let (out_a, lse_a) = (to.of(SIZES.out()), to.of(SIZES.lse()));
            let (out_b, lse_b) = (from.of(SIZES.out()), from.of(SIZES.lse()));
            let (mut out, mut lse) = (out_a.scatter(&a.out, 9.0), lse_a.scatter(&a.lse, 9.0));
            let (other_out, other_lse) = (out_b.scatter(&b.out, f32::NAN), lse_b.scatter(&b.lse, f32::NAN));
            merge(
                out_a.tensor_mut(&mut out),
                lse_a.tensor_mut(&mut lse),
                out_b.tensor(&other_out),
                lse_b.tensor(&other_lse),
            )
            .unwrap();
            let ((out, gaps), (lse, lse_gaps)) = (out_a.gather(&out), lse_a.gather(&lse));
            assert_eq!((bits(&out), bits(&lse)), expected, "{to:?} {from:?}");
            assert!(gaps.iter().chain(&lse_gaps).all(|x| *x == 9.0), "{to:?} {from:?}");
        }
    }
}

/// Shapes that don't fit are refused by name, and nothing is written.
#[test]
fn shapes_refused() {
    let zeros = [0.0f32; 64];
    let right = ([1, 2, 3, 4], [1, 2, 3]);
    for (out_b, lse_a, lse_b, tensor, dimension, expected, got) in [
        ([2, 2, 3, 4], right.1, right.1, "output to merge", "batch", 1, 2),
        ([1, 1, 3, 4], right.1, right.1, "output to merge", "heads", 2, 1),
        ([1, 2, 2, 4], right.1, right.1, "output to merge", "seq_q", 3, 2),
        ([1, 2, 3, 5], right.1, right.1, "output to merge", "value_dim", 4, 5),
        (right.0, [1, 2, 4], right.1, "lse", "seq_q", 3, 4),
        (right.0, right.1, [1, 1, 3], "lse", "heads", 2, 1),
    ] {
        let (mut out, mut lse) = (vec![1.0f32; len(right.0)], vec![1.0f32; len(lse_a)]);
        let error = merge(
            TensorMut::from_slice(&mut out, right.0).unwrap(),
            TensorMut::from_slice(&mut lse, lse_a).unwrap(),
            TensorRef::from_slice(&zeros[..len(out_b)], out_b).unwrap(),
            TensorRef::from_slice(&zeros[..len(lse_b)], lse_b).unwrap(),
        )
        .unwrap_err();
        assert_eq!(error, Error::ShapeMismatch { tensor, dimension, expected, got });
        assert_eq!(error.to_string(), format!("{dimension} of the {tensor} is {got} but must be {expected}"));
        assert!(out.iter().chain(&lse).all(|x| *x == 1.0));
    }
}
