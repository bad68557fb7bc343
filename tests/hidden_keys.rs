//! Promise: a hidden key never reaches the output, whatever bits it holds. A visible NaN reaches the rows that see it, and no
//! others.
//!
//! This test decides by itself which pairs are visible, one by one. It does not use the crate's masks.

mod support;

use flashtile::{AlibiSlopes, Attention, Form, Level, QueryOffset, TensorRef, Threads, bf16, f16, reference};
use support::layouts::Arrangement;
use support::problems::{Bits, bits, forms_and_levels};
use support::{Dims, Inputs, Rng, len};

/// The options of a random problem, as plain numbers.
#[derive(Clone, Debug)]
struct Options<T> {
    causal: bool,
    window: (Option<usize>, Option<usize>),
    /// `None` for the default.
    offset: Option<isize>,
    lengths: Option<Vec<usize>>,
    attend: Option<Vec<bool>>,
    bias: Option<Vec<T>>,
    softcap: bool,
    slopes: Option<Vec<f32>>,
}

impl<T: Bits> Options<T> {
    /// Random options, often several.
    fn random(dims: &Dims, rng: &mut Rng) -> Self {
        let scores = len(dims.scores());
        let bound = |rng: &mut Rng| rng.one_in(3).then(|| rng.below(dims.seq_kv + 1));
        Options {
            causal: rng.one_in(2),
            window: (bound(rng), bound(rng)),
            offset: rng.one_in(3).then(|| rng.below(2 * dims.seq_kv + 1) as isize - dims.seq_kv as isize),
            lengths: rng.one_in(3).then(|| (0..dims.batch).map(|_| rng.below(dims.seq_kv + 1)).collect()),
            attend: rng.one_in(3).then(|| (0..scores).map(|_| !rng.one_in(3)).collect()),
            bias: rng.one_in(3).then(|| {
                let hides = |rng: &mut Rng| if rng.one_in(3) { f32::NEG_INFINITY } else { rng.normal() };
                (0..scores).map(|_| T::from_f32(hides(rng))).collect()
            }),
            softcap: rng.one_in(3),
            slopes: rng.one_in(3).then(|| vec![0.5; dims.heads_q]),
        }
    }

    fn attention(&self, dims: &Dims, form: Form, level: Level) -> Attention<'_> {
        let mut attention = Attention::new().form(form).level(level).threads(Threads::Serial);
        attention = attention.window(self.window.0, self.window.1);
        if self.causal {
            attention = attention.causal();
        }
        if let Some(offset) = self.offset {
            attention = attention.query_offset(QueryOffset::At(offset));
        }
        if let Some(lengths) = &self.lengths {
            attention = attention.key_lengths(lengths);
        }
        if let Some(attend) = &self.attend {
            attention = attention.mask(TensorRef::from_slice(attend, dims.scores()).unwrap());
        }
        if let Some(bias) = &self.bias {
            attention = attention.bias(TensorRef::<T>::from_slice(bias, dims.scores()).unwrap());
        }
        if self.softcap {
            attention = attention.softcap(5.0);
        }
        if let Some(slopes) = &self.slopes {
            attention = attention.alibi(AlibiSlopes::PerHead(slopes));
        }
        attention
    }

    /// Whether the query sees the key by everything except a bias of -inf.
    fn unmasked(&self, dims: &Dims, [b, h, i]: [usize; 3], j: usize) -> bool {
        let length = self.lengths.as_ref().map_or(dims.seq_kv, |lengths| lengths[b]);
        let offset = self.offset.unwrap_or(length as isize - dims.seq_q as isize);
        let (p, key) = (offset + i as isize, j as isize);
        j < length
            && (!self.causal || key <= p)
            && self.window.0.is_none_or(|left| key >= p - left as isize)
            && self.window.1.is_none_or(|right| key <= p + right as isize)
            && self.attend.as_ref().is_none_or(|attend| attend[pair(dims, [b, h, i], j)])
    }

    fn sees(&self, dims: &Dims, row: [usize; 3], j: usize) -> bool {
        let bias = self.bias.as_ref().map_or(0.0, |bias| bias[pair(dims, row, j)].to_f32());
        bias != f32::NEG_INFINITY && self.unmasked(dims, row, j)
    }
}

/// The index of a pair among the scores.
fn pair(dims: &Dims, [b, h, i]: [usize; 3], j: usize) -> usize {
    ((b * dims.heads_q + h) * dims.seq_q + i) * dims.seq_kv + j
}

/// Dimensions around the sizes of tiles and panels.
fn random_dims(rng: &mut Rng) -> Dims {
    let group = 1 + rng.below(3);
    let heads_kv = 1 + rng.below(2);
    let seq_kv = match rng.below(4) {
        0 => 1 + rng.below(12),
        1 => 60 + rng.below(12),
        2 => 120 + rng.below(140),
        _ => {
            if rng.one_in(4) {
                500 + rng.below(100)
            } else {
                1 + rng.below(40)
            }
        }
    };
    let most_queries = if rng.one_in(2) { 5 } else { 40 };
    Dims {
        batch: 1 + rng.below(2),
        heads_q: heads_kv * group,
        heads_kv,
        seq_q: 1 + rng.below(most_queries),
        seq_kv,
        head_dim: 1 + rng.below(20),
        value_dim: 1 + rng.below(20),
    }
}

/// What a poisoned element is part of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Key,
    Value,
}

/// Some keys or values are 0 first and poison then. Rows that see none of them keep their bits. Rows that see a NaN show it.
fn poisoned_keys<T: Bits>(seed: u64, rounds: usize) {
    let mut rng = Rng(seed);
    for round in 0..rounds {
        let dims = random_dims(&mut rng);
        let options = Options::<T>::random(&dims, &mut rng);
        let mut clean = Inputs::<T>::random(dims, &mut rng);
        // Poisoned rows of keys, often except for a few elements. Keys that few rows see are preferred.
        let place = if rng.one_in(2) { Place::Key } else { Place::Value };
        let poison = T::POISON[rng.below(T::POISON.len())];
        let cols = if place == Place::Key { dims.head_dim } else { dims.value_dim };
        let whole = rng.one_in(2);
        let some = 1 + rng.below(8);
        let mut poisoned = clean.clone();
        let mut columns = vec![Vec::new(); dims.batch * dims.heads_kv * dims.seq_kv];
        for (row, columns) in columns.iter_mut().enumerate() {
            let (b, hkv, j) = (row / dims.seq_kv / dims.heads_kv, row / dims.seq_kv % dims.heads_kv, row % dims.seq_kv);
            let seen =
                dims.rows().any(|[rb, h, i]| rb == b && dims.head_kv(h) == hkv && options.sees(&dims, [b, h, i], j));
            if !seen || rng.one_in(10 * some) {
                let column = rng.below(cols);
                *columns = if whole { (0..cols).collect() } else { vec![column] };
            }
            let ([clean, poisoned], at) = match place {
                Place::Key => ([&mut clean.k, &mut poisoned.k], row * cols),
                Place::Value => ([&mut clean.v, &mut poisoned.v], row * cols),
            };
            for &column in &*columns {
                clean[at + column] = T::default();
                poisoned[at + column] = poison;
            }
        }
        for (form, level) in forms_and_levels() {
            let attention = options.attention(&dims, form, level);
            let (clean_out, clean_lse) = clean.bits(&attention);
            let (out, lse) = poisoned.bits(&attention);
            let case = || format!("round {round}: {poison:?} in {place:?}, {dims:?} {form:?} {level} {options:?}");
            for (n, row) in dims.rows().enumerate() {
                let first = (row[0] * dims.heads_kv + dims.head_kv(row[1])) * dims.seq_kv;
                let seen = (0..dims.seq_kv).filter(|&j| options.sees(&dims, row, j));
                let seen: Vec<usize> = seen.flat_map(|j| columns[first + j].iter().copied()).collect();
                let nan = poison.to_f32().is_nan();
                for d in 0..dims.value_dim {
                    let at = n * dims.value_dim + d;
                    let reached = if place == Place::Key { !seen.is_empty() } else { seen.contains(&d) };
                    if !reached {
                        assert_eq!(out[at], clean_out[at], "row {row:?} column {d}, {}", case());
                    } else if nan {
                        assert_eq!(out[at], f32::NAN.to_bits(), "row {row:?} column {d}, {}", case());
                    }
                }
                if place == Place::Value || seen.is_empty() {
                    assert_eq!(lse[n], clean_lse[n], "lse of row {row:?}, {}", case());
                } else if nan {
                    assert_eq!(lse[n], f32::NAN.to_bits(), "lse of row {row:?}, {}", case());
                }
            }
        }
    }
}

#[test]
fn poisoned_keys_f32() {
    poisoned_keys::<f32>(1, 1500);
}
#[test]
fn poisoned_keys_f16() {
    poisoned_keys::<f16>(2, 800);
}
#[test]
fn poisoned_keys_bf16() {
    poisoned_keys::<bf16>(3, 800);
}

/// The bias of a key that another option hides does not matter.
#[test]
fn hidden_bias_entries() {
    let mut rng = Rng(4);
    for round in 0..1000 {
        let dims = random_dims(&mut rng);
        let mut options = Options::<f32>::random(&dims, &mut rng);
        let mut bias = vec![0.0; len(dims.scores())];
        let mut poisoned = bias.clone();
        for row in dims.rows() {
            for j in 0..dims.seq_kv {
                let at = pair(&dims, row, j);
                if options.unmasked(&dims, row, j) {
                    bias[at] = if rng.one_in(5) { f32::NEG_INFINITY } else { rng.normal() };
                    poisoned[at] = bias[at];
                } else {
                    poisoned[at] = f32::POISON[rng.below(f32::POISON.len())];
                }
            }
        }
        let inputs = Inputs::<f32>::random(dims, &mut rng);
        for (form, level) in forms_and_levels() {
            options.bias = Some(bias.clone());
            let expected = inputs.bits(&options.attention(&dims, form, level));
            options.bias = Some(poisoned.clone());
            let got = inputs.bits(&options.attention(&dims, form, level));
            assert_eq!(got, expected, "round {round}: {dims:?} {form:?} {level}");
        }
    }
}

/// A NaN in a query, or in a visible entry of the bias, stays in its row.
#[test]
fn nan_stays_in_its_row() {
    let mut rng = Rng(5);
    for round in 0..600 {
        let dims = random_dims(&mut rng);
        let mut options = Options::<f32>::random(&dims, &mut rng);
        let inputs = Inputs::<f32>::random(dims, &mut rng);
        let mut poisoned = inputs.clone();
        let in_bias = rng.one_in(2);
        let clean_bias = options.bias.get_or_insert_with(|| vec![0.0; len(dims.scores())]).clone();
        let mut bias = clean_bias.clone();
        let mut hit = vec![false; len(dims.lse())];
        for (n, row) in dims.rows().enumerate() {
            if !rng.one_in(6) {
                continue;
            }
            if in_bias {
                let j = rng.below(dims.seq_kv);
                if options.unmasked(&dims, row, j) {
                    bias[pair(&dims, row, j)] = f32::POISON[rng.below(4)];
                    hit[n] = true;
                }
            } else {
                poisoned.q[n * dims.head_dim + rng.below(dims.head_dim)] = f32::POISON[rng.below(4)];
                hit[n] = (0..dims.seq_kv).any(|j| options.sees(&dims, row, j));
            }
        }
        for (form, level) in forms_and_levels() {
            options.bias = Some(clean_bias.clone());
            let (clean_out, clean_lse) = inputs.bits(&options.attention(&dims, form, level));
            options.bias = Some(bias.clone());
            let (out, lse) = poisoned.bits(&options.attention(&dims, form, level));
            for (n, hit) in hit.iter().enumerate() {
                let row = n * dims.value_dim..(n + 1) * dims.value_dim;
                let case =
                    || format!("round {round}: row {n} in bias {in_bias}, {dims:?} {form:?} {level} {options:?}");
                if *hit {
                    assert!(out[row].iter().chain([&lse[n]]).all(|x| *x == f32::NAN.to_bits()), "{}", case());
                } else {
                    assert_eq!((&out[row.clone()], lse[n]), (&clean_out[row], clean_lse[n]), "{}", case());
                }
            }
        }
    }
}

/// Padding after the key lengths and gaps between rows never matter.
#[test]
fn padding_and_gaps() {
    let mut rng = Rng(6);
    for _ in 0..200 {
        let dims = random_dims(&mut rng);
        let inputs = Inputs::<f16>::random(dims, &mut rng);
        let lengths: Vec<usize> = (0..dims.batch).map(|_| rng.below(dims.seq_kv + 1)).collect();
        for layout in [Arrangement::RowGaps(1 + rng.below(9)), Arrangement::Spread] {
            let [q, k, v] = [dims.q(), dims.k(), dims.v()].map(|shape| layout.of(shape));
            for (form, level) in forms_and_levels() {
                let attention = Attention::new().causal().key_lengths(&lengths).form(form).level(level);
                let run = |gap: f16, padding: f16| {
                    let mut x = inputs.clone();
                    for (cols, data) in [(dims.head_dim, &mut x.k), (dims.value_dim, &mut x.v)] {
                        for (row, data) in data.chunks_exact_mut(cols).enumerate() {
                            let (b, j) = (row / dims.seq_kv / dims.heads_kv, row % dims.seq_kv);
                            if j >= lengths[b] {
                                data.fill(padding);
                            }
                        }
                    }
                    let mut out = vec![f16::ONE; len(dims.out())];
                    let (q_data, k_data, v_data) = (q.scatter(&x.q, gap), k.scatter(&x.k, gap), v.scatter(&x.v, gap));
                    let to = Arrangement::Dense.of(dims.out());
                    let tensors = (q.tensor(&q_data), k.tensor(&k_data), v.tensor(&v_data));
                    attention.run_into(tensors.0, tensors.1, tensors.2, to.tensor_mut(&mut out)).unwrap();
                    bits(&out)
                };
                let expected = run(f16::ZERO, f16::ZERO);
                for poison in f16::POISON {
                    assert_eq!(run(poison, poison), expected, "{poison:?} {dims:?} {layout:?} {form:?} {level}");
                }
            }
        }
    }
}

/// Rows that see no key are exactly +0 and -inf, even if every hidden key is NaN.
#[test]
fn nothing_seen_among_nan() {
    let dims = Dims { batch: 2, heads_q: 2, ..Dims::new(1, 20, 70, 9) };
    let nan = Inputs::<f32> {
        dims,
        q: vec![f32::NAN; len(dims.q())],
        k: vec![f32::NAN; len(dims.k())],
        v: vec![f32::NAN; len(dims.v())],
    };
    let (no, hides) = ([false], [f32::NEG_INFINITY]);
    for (form, level) in forms_and_levels() {
        let plain = Attention::new().form(form).level(level);
        for attention in [
            plain.clone().key_lengths(&[0, 0]),
            plain.clone().mask(TensorRef::from_slice(&no, [1, 1, 1, 1]).unwrap()),
            plain.clone().bias(TensorRef::<f32>::from_slice(&hides, [1, 1, 1, 1]).unwrap()),
            plain.clone().causal().query_offset(QueryOffset::At(-20)),
            plain.clone().window(Some(0), None).query_offset(QueryOffset::At(70)),
            plain.clone().softcap(3.0).bias(TensorRef::<f32>::from_slice(&hides, [1, 1, 1, 1]).unwrap()),
        ] {
            let (out, lse) = nan.bits(&attention);
            assert!(out.iter().all(|x| *x == 0) && lse.iter().all(|x| *x == f32::NEG_INFINITY.to_bits()));
        }
    }
}

/// A bias of -inf hides a key at any ALiBi distance. A slope of any size does not change the score of the key at the query's
/// own position.
#[test]
fn giant_slopes() {
    let dims = Dims::new(1, 1, 3, 2);
    let inputs = Inputs::<f32> { dims, q: vec![1.0; 2], k: vec![1.0; 6], v: vec![9.0, 9.0, 8.0, 8.0, 1.0, 1.0] };
    let bias = [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0];
    for (form, level) in forms_and_levels() {
        for slope in [f32::MAX, f32::MIN] {
            let slopes = [slope];
            let attention = Attention::new().form(form).level(level).alibi(AlibiSlopes::PerHead(&slopes));
            let attention = attention.bias(TensorRef::<f32, 1>::from_slice(&bias, [3]).unwrap());
            let (out, lse) = inputs.compute(&attention);
            assert_eq!(out, [1.0, 1.0], "slope {slope} {form:?} {level}");
            assert!((lse[0] - 2f32.sqrt()).abs() < 1e-5, "lse {} slope {slope} {form:?} {level}", lse[0]);
        }
    }
}

/// The lowest number is not -inf: keys that all have it as their bias are visible, with equal probs.
#[test]
fn the_lowest_bias_hides_nothing() {
    let dims = Dims::new(1, 3, 20, 4);
    let mut inputs = Inputs::<f32>::random(dims, &mut Rng(7));
    inputs.v.fill(2.5);
    for (form, level) in forms_and_levels() {
        for lowest in [f32::MIN, -3e38] {
            let bias = [lowest];
            let bias = TensorRef::<f32, 1>::from_slice(&bias, [1]).unwrap();
            let (out, lse) = inputs.compute(&Attention::new().form(form).level(level).bias(bias));
            assert!(out.iter().all(|x| *x == 2.5), "{out:?} {form:?} {level}");
            assert!(lse.iter().all(|x| x.is_finite()), "{lse:?} {form:?} {level}");
        }
    }
}

/// An infinite element of a key hides it where its score is -inf: the bits are those of a mask that hides it, whatever its
/// value. Where the score is +inf, the row is NaN.
fn infinite_keys<T: Bits>(seed: u64) {
    let mut rng = Rng(seed);
    let infinity = |sign: f32| T::from_f32(sign * f32::INFINITY);
    for round in 0..80 {
        let dims = Dims { heads_q: 2, ..random_dims(&mut rng) };
        let dims = Dims { heads_kv: 1 + rng.below(2), value_dim: [dims.value_dim, 16, 32][rng.below(3)], ..dims };
        let mut inputs = Inputs::<T>::random(dims, &mut rng);
        // Half of the queries have the sign of the infinite elements in their column, the others the other one.
        let column = rng.below(dims.head_dim);
        let hides: Vec<bool> = dims.rows().map(|_| rng.one_in(2)).collect();
        for (query, hides) in inputs.q.chunks_exact_mut(dims.head_dim).zip(&hides) {
            query[column] = T::from_f32(if *hides { 0.5 } else { -0.5 });
        }
        let attend: Vec<bool> = (0..dims.seq_kv).map(|_| !rng.one_in(1 + dims.seq_kv / 3)).collect();
        let poison = [T::from_f32(f32::NAN), infinity(1.0), infinity(-1.0)];
        for row in (0..dims.batch * dims.heads_kv * dims.seq_kv).filter(|row| !attend[row % dims.seq_kv]) {
            inputs.k[row * dims.head_dim + column] = infinity(-1.0);
            inputs.v[row * dims.value_dim + rng.below(dims.value_dim)] = poison[rng.below(3)];
        }
        let mask = TensorRef::from_slice(&attend, [1, 1, 1, dims.seq_kv]).unwrap();
        for (form, level) in forms_and_levels() {
            let mut attention = Attention::new().form(form).level(level);
            if round % 2 == 1 {
                attention = attention.causal();
            }
            let exact = reference::attention(&attention, inputs.q(), (inputs.k(), inputs.v())).unwrap();
            let masked = attention.clone().mask(mask);
            let (out, lse) = inputs.bits(&attention);
            let (masked_out, masked_lse) = inputs.bits(&masked);
            let exact_masked = reference::attention(&masked, inputs.q(), (inputs.k(), inputs.v())).unwrap();
            for (n, [_, _, i]) in dims.rows().enumerate() {
                let case = || format!("round {round} row {n}: {dims:?} {form:?} {level} {attend:?}");
                let row = n * dims.value_dim..(n + 1) * dims.value_dim;
                let last =
                    if round % 2 == 1 { dims.seq_kv as isize - dims.seq_q as isize + i as isize } else { isize::MAX };
                let sees_one = (0..dims.seq_kv).any(|j| !attend[j] && j as isize <= last);
                if hides[n] || !sees_one {
                    assert_eq!((&out[row.clone()], lse[n]), (&masked_out[row.clone()], masked_lse[n]), "{}", case());
                    assert_eq!(exact.out[row.clone()], exact_masked.out[row.clone()], "{}", case());
                    assert!(out[row].iter().all(|x| f32::from_bits(*x).is_finite()), "{}", case());
                } else {
                    assert!(out[row.clone()].iter().chain([&lse[n]]).all(|x| *x == f32::NAN.to_bits()), "{}", case());
                    assert!(exact.out[row].iter().all(|x| x.is_nan()), "{}", case());
                }
            }
        }
    }
}

#[test]
fn infinite_keys_f32() {
    infinite_keys::<f32>(8);
}
#[test]
fn infinite_keys_f16() {
    infinite_keys::<f16>(9);
}
#[test]
fn infinite_keys_bf16() {
    infinite_keys::<bf16>(10);
}

/// A score of -inf hides its key in every tile, whether all rows see the tile or only some.
#[test]
fn a_score_of_minus_infinity_hides() {
    for (form, level) in forms_and_levels() {
        for seq_q in 1..20 {
            // A part of a vector of keys, and more than one.
            for seq_kv in [3, 17, 40] {
                // Scores overflow to -inf for key 0, whose value is NaN; key 2 is not seen by the first query.
                let dims = Dims::new(1, seq_q, seq_kv, 1);
                let (mut k, mut v) = (vec![0.0; seq_kv], vec![5.0; seq_kv]);
                (k[0], v[0]) = (-1e30, f32::NAN);
                let inputs = Inputs::<f32> { dims, q: vec![1e30; seq_q], k, v };
                let attention = Attention::new().form(form).level(level);
                for attention in [attention.clone(), attention.causal().query_offset(QueryOffset::At(1))] {
                    let (out, _) = inputs.compute(&attention);
                    // A mean of equal values: off by the roundings of a sum and its inverse.
                    let mean = |x: &f32| (x - 5.0).abs() <= 5.0 * 4.0 * f32::EPSILON;
                    assert!(out.iter().all(mean), "{out:?} {seq_kv} keys {form:?} {level} {attention:?}");
                }
            }
        }
    }
}

/// A NaN shows even as the only key of the last tile or split, where no maximum shows that a key was visible.
#[test]
fn a_nan_alone_in_the_last_tile() {
    // One key more than a tile of prefill (240), a tile of decode (256) and a split (512).
    for seq_kv in [241, 257, 513] {
        for seq_q in [1, 3] {
            let dims = Dims::new(1, seq_q, seq_kv, 5);
            let mut inputs = Inputs::<f32>::random(dims, &mut Rng(11));
            inputs.k[(seq_kv - 1) * 5 + 2] = f32::NAN;
            for (form, level) in forms_and_levels() {
                let (out, lse) = inputs.compute(&Attention::new().form(form).level(level));
                let all_nan = out.iter().chain(&lse).all(|x| x.is_nan());
                assert!(all_nan, "{seq_q} queries, {seq_kv} keys: {out:?} {lse:?} {form:?} {level}");
            }
        }
    }
}

/// Hidden keys count for nothing beside visible ones of very low scores. In units of log2, the
/// running maximum is no longer exact from 2^21 on, and -2^23 stands for -inf.
#[test]
fn hidden_keys_beside_very_low_scores() {
    let dims = Dims::new(1, 2, 20, 1);
    let attend: Vec<bool> = (0..20).map(|j| j % 3 != 1).collect();
    let v: Vec<f32> = attend.iter().map(|&attend| if attend { 5.0 } else { 9.0 }).collect();
    for exponent in [19, 20, 21, 22, 23, 24] {
        for beside in [-20.0, -1.0, 0.0, 1.0, 20.0] {
            let score = (beside - 2f64.powi(exponent)) * std::f64::consts::LN_2;
            let inputs = Inputs::<f32> { dims, q: vec![1.0; 2], k: vec![score as f32; 20], v: v.clone() };
            for (form, level) in forms_and_levels() {
                let attention = Attention::new().scale(1.0).form(form).level(level);
                let mask = TensorRef::from_slice(&attend, [1, 1, 1, 20]).unwrap();
                let (out, _) = inputs.compute(&attention.mask(mask));
                // A mean of equal values: off by the roundings of a sum and its inverse.
                let mean = |x: &f32| (x - 5.0).abs() <= 5.0 * 8.0 * f32::EPSILON;
                assert!(out.iter().all(mean), "{out:?} for scores of {score}: {form:?} {level}");
            }
        }
    }
}
