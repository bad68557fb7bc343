//! Promise: whatever is done to a cache, its tokens are those of plain lists, for all types; a refused call changes nothing.
//!
//! Each test does random operations, right and wrong, to a cache and to a model of lists, and compares all of both after each.

mod support;

use flashtile::{
    AnyTensorRef, DType, Element, Error, KvCache, KvFormat, PagedKvCache, Positions, Rotary, RotatingKvCache,
    SequenceId, TensorRef, bf16, f16,
};
use support::Rng;
use support::counting::Counting;

/// One test alone is watched.
#[global_allocator]
static COUNTING: Counting = Counting::new();

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// `x` as a cache of this type has it.
fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The same number, or both NaN. Zeros have their sign.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// One element of a tensor of any type.
fn at(tensor: AnyTensorRef<'_>, index: [usize; 4]) -> f32 {
    fn get<T: Element>(tensor: AnyTensorRef<'_>, index: [usize; 4]) -> Option<f32> {
        Some(tensor.typed::<T>()?.get(index).expect("inside the shape").to_f32())
    }
    get::<f32>(tensor, index).or_else(|| get::<f16>(tensor, index)).or_else(|| get::<bf16>(tensor, index)).unwrap()
}

/// A tensor of random type, strides and numbers.
#[derive(Debug)]
struct Tensor {
    data: Data,
    offset: usize,
    shape: [usize; 4],
    strides: [isize; 4],
}

#[derive(Debug)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Tensor {
    fn random(rng: &mut Rng, shape: [usize; 4]) -> Self {
        let orders = [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [1, 0, 3, 2]];
        let (order, gap) = (orders[rng.below(4)], 1 + rng.below(2));
        let mut strides = [0isize; 4];
        let mut len = gap;
        for axis in order.into_iter().rev() {
            strides[axis] = len as isize;
            len = len * shape[axis] + rng.below(3);
        }
        let mut offset = rng.below(4);
        len += offset;
        // One axis runs backwards.
        let axis = rng.below(8);
        if axis < 4 && !shape.contains(&0) {
            offset += (shape[axis] - 1) * strides[axis] as usize;
            strides[axis] = -strides[axis];
        }
        let number = |rng: &mut Rng| match rng.below(40) {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 => f32::NEG_INFINITY,
            3 => rng.uniform() * 1e-7, // a denormal f16
            4 => rng.uniform() * 1e6,  // infinite as f16
            5 => -0.0,
            _ => rng.normal(),
        };
        fn numbers<T: Element>(rng: &mut Rng, len: usize, number: impl Fn(&mut Rng) -> f32) -> Vec<T> {
            (0..len).map(|_| T::from_f32(number(rng))).collect()
        }
        let data = match rng.below(3) {
            0 => Data::F32(numbers(rng, len, number)),
            1 => Data::F16(numbers(rng, len, number)),
            _ => Data::Bf16(numbers(rng, len, number)),
        };
        Tensor { data, offset, shape, strides }
    }

    fn view(&self) -> AnyTensorRef<'_> {
        fn view<'a, T: Element>(data: &'a [T], tensor: &Tensor) -> AnyTensorRef<'a> {
            TensorRef::with_strides(data, tensor.offset, tensor.shape, tensor.strides).unwrap().into()
        }
        match &self.data {
            Data::F32(data) => view(data, self),
            Data::F16(data) => view(data, self),
            Data::Bf16(data) => view(data, self),
        }
    }

    /// Row `i` of every head of batch `b`.
    fn rows(&self, b: usize, i: usize) -> Vec<Vec<f32>> {
        let [_, heads, _, dim] = self.shape;
        (0..heads).map(|h| (0..dim).map(|e| at(self.view(), [b, h, i, e])).collect()).collect()
    }
}

/// A token as the model has it: keys and values of each head.
#[derive(Clone, Debug)]
struct Token {
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

/// Token `i` of batch `b`, rotated to a position, rounded.
fn token(dtype: DType, k: &Tensor, v: &Tensor, b: usize, i: usize, rotation: Option<(&Rotary, usize)>) -> Token {
    let mut keys = k.rows(b, i);
    if let Some((rotary, position)) = rotation {
        keys.iter_mut().for_each(|key| rotate(rotary, position, key));
    }
    let round = |rows: Vec<Vec<f32>>| rows.into_iter().map(|row| row.into_iter().map(|x| stored(dtype, x)).collect());
    Token { k: round(keys).collect(), v: round(v.rows(b, i)).collect() }
}

/// The definition of `Rotary`.
fn rotate(rotary: &Rotary, position: usize, row: &mut [f32]) {
    for p in 0..rotary.dim() / 2 {
        let (cos, sin) = (rotary.cos().get([position, p]).unwrap(), rotary.sin().get([position, p]).unwrap());
        let (x, y) = if rotary.is_interleaved() { (2 * p, 2 * p + 1) } else { (p, p + rotary.dim() / 2) };
        (row[x], row[y]) = (row[x] * cos - row[y] * sin, row[x] * sin + row[y] * cos);
    }
}

/// Whether a row of a cache's keys and values is a token.
#[track_caller]
fn check(keys: AnyTensorRef<'_>, values: AnyTensorRef<'_>, outer: usize, row: usize, token: &Token, what: &str) {
    for (tensor, rows) in [(keys, &token.k), (values, &token.v)] {
        for (h, expected) in rows.iter().enumerate() {
            for (e, &expected) in expected.iter().enumerate() {
                let got = at(tensor, [outer, h, row, e]);
                assert!(
                    same(got, expected),
                    "{what}: row {row} of {outer}, head {h}, element {e}: {got}, not {expected}"
                );
            }
        }
    }
}

/// A format, a rotation for it, and the positions of its table.
fn random_format(rng: &mut Rng) -> (KvFormat, Rotary) {
    let dims = [1, 2, 7, 16, 33];
    let format = KvFormat::new(TYPES[rng.below(3)], 1 + rng.below(2), dims[rng.below(5)]);
    let rotary = Rotary::new(format.head_dim / 2 * 2, 100.0, 40).unwrap();
    let part = Rotary::new(format.head_dim / 4 * 2, 100.0, 40).unwrap();
    let rotary = [rotary.clone(), rotary.interleaved(), part.clone(), part.interleaved()][rng.below(4)].clone();
    (format.value_dim(dims[rng.below(5)]), rotary)
}

/// `n` tokens for `batch` sequences; once in a while of a wrong shape, and then the second is false.
fn random_tokens(rng: &mut Rng, format: &KvFormat, batch: usize, n: usize) -> (Tensor, Tensor, bool) {
    let mut k = [batch, format.heads_kv, n, format.head_dim];
    let mut v = [batch, format.heads_kv, n, format.value_dim];
    let right = !rng.one_in(8);
    if !right {
        let shape = if rng.one_in(2) { &mut k } else { &mut v };
        shape[rng.below(4)] += 1;
    }
    // (One more token in one of the two is as wrong as the rest.)
    (Tensor::random(rng, k), Tensor::random(rng, v), right)
}

/// How tokens are rotated, in the words of a call and as a position for each token.
#[derive(Clone, Debug)]
enum At {
    NotRotated,
    After,
    Start(usize),
    PerBatch(Vec<i32>),
    Each(Vec<u64>),
}

impl At {
    fn random(rng: &mut Rng, batch: usize, n: usize) -> Self {
        match rng.below(8) {
            0 | 1 => At::After,
            2 => At::Start(rng.below(44)),
            // Sometimes one entry too many, or positions next to the table.
            3 => {
                let entries = batch + usize::from(rng.one_in(8));
                At::PerBatch((0..entries).map(|_| rng.below(36) as i32 - 1).collect())
            }
            4 => {
                let (entries, most) = (batch * n + usize::from(rng.one_in(8)), 40 + usize::from(rng.one_in(8)));
                At::Each((0..entries).map(|_| rng.below(most) as u64).collect())
            }
            _ => At::NotRotated,
        }
    }

    fn positions(&self) -> Option<Positions<'_>> {
        match self {
            At::NotRotated | At::After => None,
            At::Start(start) => Some(Positions::Start(*start)),
            At::PerBatch(starts) => Some(Positions::per_batch(starts)),
            At::Each(ids) => Some(Positions::each(ids)),
        }
    }

    /// Whether tokens are rotated at all.
    fn is_rotated(&self) -> bool {
        !matches!(self, At::NotRotated)
    }

    fn of(&self, b: usize, i: usize, n: usize, before: usize) -> i64 {
        match self {
            At::NotRotated => 0,
            At::After => (before + i) as i64,
            At::Start(start) => (start + i) as i64,
            At::PerBatch(starts) => starts[b] as i64 + i as i64,
            At::Each(ids) => ids[b * n + i] as i64,
        }
    }

    /// Whether a call takes these positions.
    fn is_right(&self, lengths: &[usize], n: usize, rotary: &Rotary) -> bool {
        let count = match self {
            At::PerBatch(starts) => starts.len() == lengths.len(),
            At::Each(ids) => ids.len() == lengths.len() * n,
            _ => true,
        };
        let inside = |position: i64| (0..rotary.positions() as i64).contains(&position);
        count && (0..lengths.len() * n).all(|t| inside(self.of(t / n, t % n, n, lengths[t / n])))
    }

    fn rotation<'r>(
        &self,
        rotary: &'r Rotary,
        b: usize,
        i: usize,
        n: usize,
        before: usize,
    ) -> Option<(&'r Rotary, usize)> {
        self.is_rotated().then(|| (rotary, self.of(b, i, n, before) as usize))
    }
}

#[test]
fn a_cache_is_lists_of_tokens() {
    for seed in 0..400 {
        let rng = &mut Rng(seed);
        let (format, rotary) = random_format(rng);
        let (batch, capacity) = (1 + rng.below(3), rng.below(14));
        let mut cache = KvCache::new(format, batch, capacity).unwrap();
        let mut model: Vec<Vec<Token>> = vec![Vec::new(); batch];
        for step in 0..50 {
            let what = format!("seed {seed}, step {step}");
            match rng.below(10) {
                kind @ 0..=5 => {
                    // To all sequences, or to one, which perhaps does not exist.
                    let one = kind % 2 == 1;
                    let sequence = rng.below(batch + 1);
                    let sequences = if one { sequence..sequence + 1 } else { 0..batch };
                    let n = rng.below(5);
                    let (k, v, right) = random_tokens(rng, &format, sequences.len(), n);
                    let at = At::random(rng, sequences.len(), n);
                    let result = match (one, at.is_rotated()) {
                        (false, false) => cache.append(k.view(), v.view()),
                        (false, true) => cache.append_rotated(&rotary, at.positions(), k.view(), v.view()),
                        (true, false) => cache.append_to(sequence, k.view(), v.view()),
                        (true, true) => cache.append_rotated_to(sequence, &rotary, at.positions(), k.view(), v.view()),
                    };
                    let expected = right && sequences.end <= batch && {
                        let lengths: Vec<usize> = model[sequences.clone()].iter().map(Vec::len).collect();
                        let room = lengths.iter().all(|len| len + n <= capacity);
                        room && (!at.is_rotated() || at.is_right(&lengths, n, &rotary))
                    };
                    assert_eq!(result.is_ok(), expected, "{what}: {result:?}");
                    if expected {
                        for (b, sequence) in model[sequences].iter_mut().enumerate() {
                            let before = sequence.len();
                            let token = |i| token(format.dtype, &k, &v, b, i, at.rotation(&rotary, b, i, n, before));
                            sequence.extend((0..n).map(token));
                        }
                    }
                }
                6 | 7 => {
                    let (sequence, len) = (rng.below(batch + 1), rng.below(capacity + 2));
                    let result = cache.truncate(sequence, len);
                    assert_eq!(result.is_ok(), sequence < batch && len <= model[sequence].len(), "{what}: {result:?}");
                    if result.is_ok() {
                        model[sequence].truncate(len);
                    }
                }
                8 => {
                    let (from, to) = (rng.below(batch + 1), rng.below(batch + 1));
                    let result = cache.fork(from, to);
                    assert_eq!(result.is_ok(), from < batch && to < batch, "{what}: {result:?}");
                    if result.is_ok() {
                        model[to] = model[from].clone();
                    }
                }
                _ if rng.one_in(4) => {
                    cache.clear();
                    model.iter_mut().for_each(Vec::clear);
                }
                _ => {}
            }
            let lengths: Vec<usize> = model.iter().map(Vec::len).collect();
            assert_eq!(cache.lengths(), lengths, "{what}");
            for (b, sequence) in model.iter().enumerate() {
                for (row, token) in sequence.iter().enumerate() {
                    check(cache.keys(), cache.values(), b, row, token, &what);
                }
            }
        }
    }
}

#[test]
fn a_rotating_cache_is_the_ends_of_lists() {
    for seed in 0..400 {
        let rng = &mut Rng(seed);
        let (format, rotary) = random_format(rng);
        let (batch, first, window) = (1 + rng.below(2), rng.below(4), 1 + rng.below(6));
        let mut cache = RotatingKvCache::new(format, batch, first, window).unwrap();
        let mut model: Vec<Vec<Token>> = vec![Vec::new(); batch];
        let held = |len: usize| {
            let first = first.min(len);
            [0..first, first.max(len.saturating_sub(window))..len]
        };
        for step in 0..50 {
            let what = format!("seed {seed}, step {step}");
            match rng.below(10) {
                kind @ 0..=6 => {
                    let one = kind % 2 == 1;
                    let sequence = rng.below(batch + 1);
                    let sequences = if one { sequence..sequence + 1 } else { 0..batch };
                    let n = if rng.one_in(4) { rng.below(20) } else { rng.below(3) };
                    let (k, v, right) = random_tokens(rng, &format, sequences.len(), n);
                    let at = At::random(rng, sequences.len(), n);
                    let result = match (one, at.is_rotated()) {
                        (false, false) => cache.append(k.view(), v.view()),
                        (false, true) => cache.append_rotated(&rotary, at.positions(), k.view(), v.view()),
                        (true, false) => cache.append_to(sequence, k.view(), v.view()),
                        (true, true) => cache.append_rotated_to(sequence, &rotary, at.positions(), k.view(), v.view()),
                    };
                    let expected = right && sequences.end <= batch && {
                        let lengths: Vec<usize> = model[sequences.clone()].iter().map(Vec::len).collect();
                        !at.is_rotated() || at.is_right(&lengths, n, &rotary)
                    };
                    assert_eq!(result.is_ok(), expected, "{what}: {result:?}");
                    if expected {
                        for (b, sequence) in model[sequences].iter_mut().enumerate() {
                            let before = sequence.len();
                            let token = |i| token(format.dtype, &k, &v, b, i, at.rotation(&rotary, b, i, n, before));
                            sequence.extend((0..n).map(token));
                        }
                    }
                }
                7 => {
                    let sequence = rng.below(batch + 1);
                    let before = model.get(sequence).map_or(0, Vec::len);
                    let len = rng.below(before + 2);
                    let result = cache.truncate(sequence, len);
                    // All that the shorter sequence holds must be held now.
                    let is_held = |j: usize| held(before).iter().any(|range| range.contains(&j));
                    let possible = len <= before && held(len).into_iter().flatten().all(is_held);
                    assert_eq!(result.is_ok(), sequence < batch && possible, "{what}: {before} to {len}: {result:?}");
                    if result.is_ok() {
                        model[sequence].truncate(len);
                    }
                }
                8 => {
                    let (from, to) = (rng.below(batch + 1), rng.below(batch + 1));
                    let result = cache.fork(from, to);
                    assert_eq!(result.is_ok(), from < batch && to < batch, "{what}: {result:?}");
                    if result.is_ok() {
                        model[to] = model[from].clone();
                    }
                }
                _ if rng.one_in(4) => {
                    cache.clear();
                    model.iter_mut().for_each(Vec::clear);
                }
                _ => {}
            }
            let lengths: Vec<usize> = model.iter().map(Vec::len).collect();
            assert_eq!(cache.lengths(), lengths, "{what}");
            for (b, sequence) in model.iter().enumerate() {
                assert_eq!(cache.kept(b).unwrap(), held(sequence.len()), "{what}");
                for j in held(sequence.len()).into_iter().flatten() {
                    let row = if j < first { j } else { first + (j - first) % window };
                    assert_eq!(cache.row(j), row);
                    check(cache.keys(), cache.values(), b, row, &sequence[j], &what);
                }
            }
        }
    }
}

/// A sequence of the model of a paged cache.
#[derive(Clone, Debug)]
struct Sequence {
    len: usize,
    layers: Vec<Vec<Token>>,
}

/// The pages that `tokens` more tokens of sequence `n` take, and whether one of them is a copy.
fn pages_needed(cache: &PagedKvCache, model: &[(SequenceId, Sequence)], n: usize, tokens: usize) -> (usize, bool) {
    let tables: Vec<&[u32]> = model.iter().map(|(id, _)| cache.table(*id).unwrap()).collect();
    let (len, page_size) = (model[n].1.len, cache.page_size());
    let is_shared = |page| tables.iter().filter(|table| table.contains(page)).count() > 1;
    let copies = tokens > 0 && len % page_size > 0 && tables[n].last().is_some_and(is_shared);
    let added = len.checked_add(tokens).map(|len| len.div_ceil(page_size) - tables[n].len() + usize::from(copies));
    (added.unwrap_or(usize::MAX), copies)
}

#[test]
fn a_paged_cache_is_lists_of_tokens() {
    let (mut exhausted, mut copied) = (0, 0);
    for seed in 0..400 {
        let rng = &mut Rng(seed);
        let (format, rotary) = random_format(rng);
        let (layers, pages, page_size) = (1 + rng.below(2), rng.below(24), 1 + rng.below(4));
        let mut cache = PagedKvCache::new(format, layers, pages, page_size).unwrap();
        let mut model: Vec<(SequenceId, Sequence)> = Vec::new();
        let mut removed: Vec<SequenceId> = Vec::new();
        for step in 0..60 {
            let what = format!("seed {seed}, step {step}");
            // A sequence, or seldom one that was removed.
            let n = rng.below(model.len().max(1));
            let stale = removed.first().copied().filter(|_| rng.one_in(10));
            let Some(id) = stale.or(model.get(n).map(|(id, _)| *id)) else {
                model.push((cache.new_sequence(), Sequence { len: 0, layers: vec![Vec::new(); layers] }));
                continue;
            };
            let alive = stale.is_none();
            match rng.below(12) {
                0 if model.len() < 4 => {
                    model.push((cache.new_sequence(), Sequence { len: 0, layers: vec![Vec::new(); layers] }))
                }
                1..=3 => {
                    let tokens = if rng.one_in(20) { usize::MAX - rng.below(9) } else { rng.below(6) };
                    let expected = alive.then(|| pages_needed(&cache, &model, n, tokens));
                    let free = cache.free_pages();
                    let result = cache.reserve(id, tokens);
                    match expected {
                        None => assert_eq!(result, Err(Error::RemovedSequence), "{what}"),
                        Some((needed, _)) if needed > free => {
                            assert_eq!(result, Err(Error::PagesExhausted { needed, free }), "{what}");
                            exhausted += 1;
                        }
                        Some((needed, copies)) => {
                            assert_eq!((result, free - cache.free_pages()), (Ok(()), needed), "{what}");
                            model[n].1.len += tokens;
                            copied += usize::from(copies);
                        }
                    }
                }
                4..=7 => {
                    let layer = rng.below(layers * 8 + 1) % (layers + 1);
                    let behind = model.get(n).and_then(|(_, s)| Some(s.len - s.layers.get(layer)?.len())).unwrap_or(0);
                    let count = if rng.one_in(3) { rng.below(4) } else { behind };
                    let (k, v, right) = random_tokens(rng, &format, 1, count);
                    let at = At::random(rng, 1, count);
                    let before = model.get(n).and_then(|(_, s)| Some(s.layers.get(layer)?.len())).unwrap_or(0);
                    let result = if at.is_rotated() {
                        cache.write_rotated(layer, id, &rotary, at.positions(), k.view(), v.view())
                    } else {
                        cache.write(layer, id, k.view(), v.view())
                    };
                    let positions = || !at.is_rotated() || at.is_right(&[before], count, &rotary);
                    let expected = alive && layer < layers && right && count <= behind && positions();
                    assert_eq!(result.is_ok(), expected, "{what}: {result:?}");
                    if expected {
                        let token = |i| token(format.dtype, &k, &v, 0, i, at.rotation(&rotary, 0, i, count, before));
                        model[n].1.layers[layer].extend((0..count).map(token));
                    }
                }
                8 => {
                    let result = cache.fork(id);
                    let complete = alive && model[n].1.layers.iter().all(|layer| layer.len() == model[n].1.len);
                    assert_eq!(result.is_ok(), complete, "{what}: {result:?}");
                    if let Ok(fork) = result {
                        let sequence = model[n].1.clone();
                        model.push((fork, sequence));
                    }
                }
                9 | 10 => {
                    let len = rng.below(if alive { model[n].1.len } else { 0 } + 2);
                    let result = cache.truncate(id, len);
                    assert_eq!(result.is_ok(), alive && len <= model[n].1.len, "{what}: {result:?}");
                    if result.is_ok() {
                        model[n].1.len = len;
                        model[n].1.layers.iter_mut().for_each(|layer| layer.truncate(len));
                    }
                }
                _ if rng.one_in(8) => {
                    cache.clear();
                    removed.extend(model.drain(..).map(|(id, _)| id));
                }
                _ if rng.one_in(2) => {
                    assert_eq!(cache.remove(id).is_ok(), alive, "{what}");
                    if alive {
                        removed.push(model.remove(n).0);
                    }
                }
                _ if layers == 1 => {
                    let count = rng.below(4);
                    let (k, v, right) = random_tokens(rng, &format, 1, count);
                    let needed = alive.then(|| pages_needed(&cache, &model, n, count).0);
                    let (free, at) = (cache.free_pages(), At::random(rng, 1, count));
                    let before = if alive { model[n].1.len } else { 0 };
                    let result = if at.is_rotated() {
                        cache.append_rotated(id, &rotary, at.positions(), k.view(), v.view())
                    } else {
                        cache.append(id, k.view(), v.view())
                    };
                    let complete = alive && model[n].1.layers[0].len() == before;
                    let positions = !at.is_rotated() || at.is_right(&[before], count, &rotary);
                    let expected = complete && right && positions && needed.is_some_and(|needed| needed <= free);
                    assert_eq!(result.is_ok(), expected, "{what}: {result:?}");
                    if expected {
                        let sequence = &mut model[n].1;
                        let token = |i| token(format.dtype, &k, &v, 0, i, at.rotation(&rotary, 0, i, count, before));
                        sequence.layers[0].extend((0..count).map(token));
                        sequence.len += count;
                    }
                }
                _ => {
                    let empty = Tensor::random(rng, [1, format.heads_kv, 0, format.head_dim]);
                    let result = cache.append(id, empty.view(), empty.view());
                    assert_eq!(result, Err(Error::WrongCount { what: "layers", expected: 1, got: layers }));
                }
            }

            // Every token is where the table says, and pages are counted right.
            let mut owners = vec![0; pages];
            for (id, sequence) in &model {
                let table = cache.table(*id).unwrap();
                assert_eq!(
                    (cache.len(*id), table.len()),
                    (Ok(sequence.len), sequence.len.div_ceil(page_size)),
                    "{what}"
                );
                table.iter().for_each(|&page| owners[page as usize] += 1);
                for (layer, tokens) in sequence.layers.iter().enumerate() {
                    assert_eq!(cache.written(layer, *id), Ok(tokens.len()), "{what}");
                    let (keys, values) = (cache.key_pages(layer).unwrap(), cache.value_pages(layer).unwrap());
                    for (j, token) in tokens.iter().enumerate() {
                        check(keys, values, table[j / page_size] as usize, j % page_size, token, &what);
                    }
                }
            }
            let count = |condition: fn(usize) -> bool| owners.iter().filter(|&&owners| condition(owners)).count();
            let counted = [cache.free_pages(), cache.used_pages(), cache.shared_pages()];
            assert_eq!(counted, [count(|n| n == 0), count(|n| n > 0), count(|n| n > 1)], "{what}");
            for &id in &removed {
                assert_eq!(cache.len(id), Err(Error::RemovedSequence), "{what}");
            }
        }
    }
    assert!(exhausted > 100 && copied > 10, "{exhausted} times without pages, {copied} copies");
}

/// A page is full of tokens of one sequence while another one, which shares it, is shorter: appending to either copies it.
#[test]
fn forks_do_not_see_each_others_tokens() {
    let mut cache = PagedKvCache::new(KvFormat::new(DType::F32, 1, 1), 1, 4, 4).unwrap();
    let append = |cache: &mut PagedKvCache, id, numbers: &[f32]| {
        let kv = TensorRef::from_slice(numbers, [1, 1, numbers.len(), 1]).unwrap();
        cache.append(id, kv, kv)
    };
    let long = cache.new_sequence();
    append(&mut cache, long, &[1.0, 2.0, 3.0, 4.0]).unwrap();
    let short = cache.fork(long).unwrap();
    cache.truncate(short, 2).unwrap();
    assert_eq!((cache.used_pages(), cache.shared_pages()), (1, 1));
    append(&mut cache, short, &[30.0]).unwrap();
    append(&mut cache, long, &[5.0]).unwrap();
    assert_eq!((cache.used_pages(), cache.shared_pages()), (3, 0));
    let numbers = |id| -> Vec<f32> {
        let (table, keys) = (cache.table(id).unwrap(), cache.key_pages(0).unwrap());
        (0..cache.len(id).unwrap()).map(|j| at(keys, [table[j / 4] as usize, 0, j % 4, 0])).collect()
    };
    assert_eq!((numbers(long), numbers(short)), (vec![1.0, 2.0, 3.0, 4.0, 5.0], vec![1.0, 2.0, 30.0]));
}

/// Without elements, any numbers of heads and tokens fit, and nothing takes time.
#[test]
fn caches_without_elements_may_have_any_numbers() {
    for format in [
        KvFormat::new(DType::F32, 1 << 62, 0).value_dim(0),
        KvFormat::new(DType::F32, 0, 1 << 40),
        KvFormat::new(DType::F16, 0, 0),
    ] {
        let KvFormat { heads_kv, head_dim, .. } = format;
        let tokens = TensorRef::<f32, 4>::from_slice(&[], [1, heads_kv, 2, head_dim]).unwrap();
        let mut cache = KvCache::new(format, 2, if heads_kv == 0 { 1 << 40 } else { 4 }).unwrap();
        cache.append_to(0, tokens, tokens).unwrap();
        cache.fork(0, 1).unwrap();
        assert_eq!(cache.len(1), Ok(2));
    }
}

#[test]
fn bytes_are_those_of_the_format() {
    for dtype in TYPES {
        let format = KvFormat::new(dtype, 3, 16).value_dim(8);
        assert_eq!(format.token_bytes(), 3 * (16 + 8) * dtype.size());
        assert_eq!(KvCache::new(format, 2, 10).unwrap().bytes(), 2 * 10 * format.token_bytes());
        assert_eq!(RotatingKvCache::new(format, 2, 1, 9).unwrap().bytes(), 2 * 10 * format.token_bytes());
        assert_eq!(PagedKvCache::new(format, 4, 5, 2).unwrap().bytes(), 4 * 5 * 2 * format.token_bytes());
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, error: Error, sentence: &str) {
    let got = result.expect_err(sentence);
    assert_eq!((got.to_string().as_str(), got), (sentence, error));
}

/// The errors and their sentences.
#[test]
fn wrong_calls_are_refused() {
    let format = KvFormat::new(DType::F16, 2, 4).value_dim(3);
    let zeros = |shape| TensorRef::<f32, 4>::with_strides(&[0.0], 0, shape, [0; 4]).unwrap();
    let [k, v] = [zeros([3, 2, 5, 4]), zeros([3, 2, 5, 3])];
    let mut cache = KvCache::new(format, 3, 9).unwrap();
    let mut rotating = RotatingKvCache::new(format, 3, 2, 5).unwrap();
    let mut paged = PagedKvCache::new(format, 2, 3, 4).unwrap();

    // Sizes.
    for (format, sizes) in [(format, [usize::MAX, 2]), (KvFormat::new(DType::F32, usize::MAX, 8), [2, 2])] {
        let [batch, tokens] = sizes;
        let too_large = || Error::TooLarge { what: "the cache" };
        let sentence = "the cache would not fit in memory";
        refused(KvCache::new(format, batch, tokens), too_large(), sentence);
        refused(KvCache::new(format, tokens, batch), too_large(), sentence);
        refused(RotatingKvCache::new(format, tokens, batch, 1), too_large(), sentence);
        refused(PagedKvCache::new(format, 2, 2, batch.max(usize::MAX / 2)), too_large(), sentence);
    }
    assert_eq!(KvFormat::new(DType::F32, usize::MAX, 8).token_bytes(), usize::MAX);
    let nothing = KvFormat::new(DType::F32, 0, 8);
    refused(
        KvCache::new(nothing, usize::MAX, 1),
        Error::TooLarge { what: "the cache" },
        "the cache would not fit in memory",
    );
    refused(
        PagedKvCache::new(nothing, usize::MAX, 1, 1),
        Error::TooLarge { what: "the cache" },
        "the cache would not fit in memory",
    );
    let limit = u32::MAX as usize;
    refused(
        PagedKvCache::new(nothing, 1, limit + 1, 1),
        Error::TooMany { what: "pages", limit, got: limit + 1 },
        "4294967296 pages were given but a call takes at most 4294967295",
    );
    let option = |option| Error::InvalidOption { option, got: 0.0, expected: "1 or more" };
    refused(RotatingKvCache::new(format, 1, 4, 0), option("window"), "window is 0 but must be 1 or more");
    refused(PagedKvCache::new(format, 0, 4, 4), option("layers"), "layers is 0 but must be 1 or more");
    refused(PagedKvCache::new(format, 1, 4, 0), option("page size"), "page size is 0 but must be 1 or more");

    // Shapes.
    let mismatch = |tensor, dimension, expected, got| Error::ShapeMismatch { tensor, dimension, expected, got };
    for (k, v, error) in [
        (zeros([2, 2, 5, 4]), v, mismatch("keys", "batch", 3, 2)),
        (zeros([3, 1, 5, 4]), v, mismatch("keys", "heads_kv", 2, 1)),
        (zeros([3, 2, 5, 5]), v, mismatch("keys", "head_dim", 4, 5)),
        (zeros([3, 2, 4, 4]), v, mismatch("values", "seq_kv", 4, 5)),
        (k, zeros([3, 2, 5, 4]), mismatch("values", "value_dim", 3, 4)),
    ] {
        assert_eq!(cache.append(k, v), Err(error.clone()));
        assert_eq!(rotating.append(k, v), Err(error));
    }
    let id = paged.new_sequence();
    paged.reserve(id, 5).unwrap();
    assert_eq!(paged.write(0, id, k, v), Err(mismatch("keys", "batch", 1, 3)));
    let three = TensorRef::<f32, 3>::with_strides(&[0.0], 0, [2, 5, 4], [0; 3]).unwrap();
    let rank = |tensor| Error::Rank { tensor, expected: 4, got: 3 };
    assert_eq!(cache.append(three, v), Err(rank("keys")));
    assert_eq!(cache.append(k, three), Err(rank("values")));

    // Room, sequences and layers.
    cache.append(k, v).unwrap();
    let full = Error::CacheFull { sequence: 0, tokens: 10, capacity: 9 };
    refused(cache.append(k, v), full, "sequence 0 would have 10 tokens but the cache has room for 9");
    let [k1, v1] = [zeros([1, 2, 5, 4]), zeros([1, 2, 5, 3])];
    let sequence = || Error::NotInCache { what: "sequence", index: 3, count: 3 };
    let sentence = "there is no sequence 3, counted from 0: the cache has 3";
    refused(cache.append_to(3, k1, v1), sequence(), sentence);
    refused(rotating.append_to(3, k1, v1), sequence(), sentence);
    refused(rotating.kept(3), sequence(), sentence);
    refused(cache.fork(0, 3), sequence(), sentence);
    let layer = Error::NotInCache { what: "layer", index: 2, count: 2 };
    refused(paged.key_pages(2), layer.clone(), "there is no layer 2, counted from 0: the cache has 2");
    assert_eq!(paged.write(2, id, k1, v1), Err(layer));
    let exhausted = Error::PagesExhausted { needed: 2, free: 1 };
    refused(
        paged.reserve(id, 8),
        exhausted,
        "the pool has 1 free pages but 2 are needed; remove or truncate sequences",
    );

    // Order.
    paged.write(0, id, k1, v1).unwrap();
    let reserved = Error::NotReserved { layer: 0, tokens: 5, reserved: 0 };
    let sentence = "layer 0 is given 5 tokens but 0 are reserved for it; reserve them first";
    refused(paged.write(0, id, k1, v1), reserved, sentence);
    let written = Error::NotWritten { layer: 1, written: 0, len: 5 };
    refused(paged.fork(id), written, "layer 1 has 0 of the 5 tokens of a sequence; write the others first");
    let layers = Error::WrongCount { what: "layers", expected: 1, got: 2 };
    refused(paged.append(id, k1, v1), layers, "2 layers were given but there must be 1");
    let mut single = PagedKvCache::new(format, 1, 3, 4).unwrap();
    let one = single.new_sequence();
    single.reserve(one, 1).unwrap();
    assert_eq!(single.append(one, k1, v1), Err(Error::NotWritten { layer: 0, written: 0, len: 1 }));

    // Lengths.
    let longer = Error::CannotTruncate { to: 6, len: 5, held: 5 };
    refused(cache.truncate(0, 6), longer.clone(), "a sequence of 5 tokens can't be truncated to 6");
    assert_eq!(paged.truncate(id, 6), Err(longer));
    rotating.append(k, v).unwrap();
    rotating.append(k, v).unwrap();
    let overwritten = Error::CannotTruncate { to: 9, len: 10, held: 2 };
    let sentence = "a sequence of 10 tokens can't be truncated to 9: only 2 are held without a gap";
    refused(rotating.truncate(0, 9), overwritten, sentence);
    rotating.truncate(0, 10).unwrap();
    rotating.truncate(0, 2).unwrap();

    // Removed sequences, of this cache and of another.
    paged.remove(id).unwrap();
    let again = paged.new_sequence();
    let sentence = "the sequence was removed from the cache, or is of another cache";
    refused(paged.remove(id), Error::RemovedSequence, sentence);
    refused(paged.write(0, id, k1, v1), Error::RemovedSequence, sentence);
    refused(paged.len(one), Error::RemovedSequence, sentence);
    assert!(again != id && paged.len(again) == Ok(0));
    assert_eq!((cache.lengths(), rotating.lengths()), (&[5, 5, 5][..], &[2, 10, 10][..]));

    // A rotating cache takes any number of tokens, in the time of those that it keeps.
    let endless = zeros([1, 2, usize::MAX - 10, 4]);
    rotating.append_to(1, endless, zeros([1, 2, usize::MAX - 10, 3])).unwrap();
    let full = Error::CacheFull { sequence: 1, tokens: usize::MAX, capacity: usize::MAX };
    assert_eq!((rotating.append_to(1, k1, v1), rotating.len(1)), (Err(full), Ok(usize::MAX)));
    assert_eq!(rotating.kept(1).unwrap(), [0..2, usize::MAX - 5..usize::MAX]);
}

/// Appending allocates nothing: not in a cache, nor in the pages of a sequence whose table has grown before.
#[test]
fn appending_does_not_allocate() {
    Counting::watch();
    let format = KvFormat::new(DType::Bf16, 2, 300);
    let rotary = Rotary::new(300, 1e4, 100).unwrap();
    let kv = Tensor::random(&mut Rng(3), [1, 2, 3, 300]);
    let mut cache = KvCache::new(format, 1, 100).unwrap();
    let mut rotating = RotatingKvCache::new(format, 1, 2, 4).unwrap();
    let mut paged = PagedKvCache::new(format, 1, 10, 2).unwrap();
    let id = paged.new_sequence();
    paged.reserve(id, 20).unwrap();
    paged.truncate(id, 0).unwrap();
    let (done, usage) = COUNTING.usage(|| {
        cache.append(kv.view(), kv.view())?;
        cache.append_rotated(&rotary, None, kv.view(), kv.view())?;
        rotating.append(kv.view(), kv.view())?;
        rotating.append_rotated(&rotary, Positions::each(&[1, 2, 3i32]), kv.view(), kv.view())?;
        paged.append(id, kv.view(), kv.view())?;
        paged.reserve(id, 3)?;
        paged.write_rotated(0, id, &rotary, None, kv.view(), kv.view())?;
        paged.truncate(id, 1)
    });
    done.unwrap();
    assert_eq!(usage.calls, 0, "{usage:?}");
}
