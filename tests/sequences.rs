//! Sequences of their own lengths: padded, packed or in pages, the rows of each are those of a call with that sequence alone, bit for
//! bit. Nothing else is read or written.

mod support;

use flashtile::{
    AlibiSlopes, AnyTensorRef, Attention, DType, Element, Error, Form, KeysValues, KvCache, KvFormat, Level, PageLists,
    PageTable, PagedKvCache, QueryOffset, RotatingKvCache, TensorMut, TensorRef, Threads, Workspace, bf16, f16,
    reference,
};
use support::Rng;

/// The sequences of a batch, each with rows of its own, `[rows][heads][dim]`.
struct Batch<Q, K> {
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    value_dim: usize,
    /// Queries and keys of each.
    lengths: Vec<(usize, usize)>,
    q: Vec<Vec<Q>>,
    k: Vec<Vec<K>>,
    v: Vec<Vec<K>>,
}

/// What all ways of a call share.
#[derive(Clone, Debug)]
struct Settings {
    causal: bool,
    window: Option<usize>,
    softcap: Option<f32>,
    alibi: bool,
    offsets: Option<Vec<isize>>,
    form: Option<Form>,
    level: Level,
    threads: Threads,
}

impl Settings {
    fn random(rng: &mut Rng, sequences: usize) -> Self {
        let offsets = (0..sequences).map(|_| rng.below(40) as isize - 10).collect();
        Settings {
            causal: rng.one_in(2),
            window: rng.one_in(4).then_some(rng.below(30)),
            softcap: rng.one_in(6).then_some(3.0),
            alibi: rng.one_in(5),
            offsets: rng.one_in(3).then_some(offsets),
            form: [None, None, Some(Form::Decode), Some(Form::Prefill)][rng.below(4)],
            level: Level::Portable,
            threads: [Threads::Pool, Threads::Serial][rng.below(2)],
        }
    }

    fn attention(&self) -> Attention<'_> {
        let mut attention = Attention::new().level(self.level).threads(self.threads).window(self.window, None);
        if self.causal {
            attention = attention.causal();
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if self.alibi {
            attention = attention.alibi(AlibiSlopes::Standard);
        }
        if let Some(offsets) = &self.offsets {
            attention = attention.query_offset(QueryOffset::per_batch(offsets));
        }
        match self.form {
            Some(form) => attention.form(form),
            None => attention,
        }
    }

    /// For sequence `b` alone.
    fn alone(&self, b: usize) -> Self {
        Settings { offsets: self.offsets.as_ref().map(|offsets| vec![offsets[b]]), ..self.clone() }
    }
}

const CANARY: f32 = 31.25;

/// The output, lse and key sums of each sequence, `[rows][heads][value_dim]`, `[rows][heads]` and `[heads][keys]`.
type Rows = Vec<[Vec<f32>; 3]>;

impl<Q: Element, K: Element> Batch<Q, K> {
    fn random(rng: &mut Rng, largest: usize) -> Self {
        let heads_kv = 1 + rng.below(3);
        let heads_q = heads_kv * [1, 1, 2, 3, 8][rng.below(5)];
        let (head_dim, value_dim) = ([1, 8, 16, 33, 64][rng.below(5)], [1, 8, 16, 20, 64][rng.below(5)]);
        let query_length = |rng: &mut Rng| [0, 1, 1, 1, 2, 5, 33, 1 + rng.below(70)][rng.below(8)];
        let key_length = |rng: &mut Rng| [0, 1, 17, 64, 1 + rng.below(largest), largest][rng.below(6)];
        let lengths: Vec<_> = (0..rng.below(6)).map(|_| (query_length(rng), key_length(rng))).collect();
        let mut rows =
            |count: usize, width: usize| (0..count * width).map(|_| K::from_f32(rng.normal())).collect::<Vec<K>>();
        let k = lengths.iter().map(|&(_, keys)| rows(keys, heads_kv * head_dim)).collect();
        let v = lengths.iter().map(|&(_, keys)| rows(keys, heads_kv * value_dim)).collect();
        let q = lengths.iter().map(|&(queries, _)| rng.normals(queries * heads_q * head_dim)).collect();
        Batch { heads_q, heads_kv, head_dim, value_dim, lengths, q, k, v }
    }

    /// Each sequence in a call of its own.
    fn alone(&self, settings: &Settings) -> Rows {
        let rows = |b: usize| {
            let (queries, keys) = self.lengths[b];
            let settings = settings.alone(b);
            let mut out = vec![CANARY; queries * self.heads_q * self.value_dim];
            let mut lse = vec![CANARY; queries * self.heads_q];
            let q = heads_first(&self.q[b], [1, queries, self.heads_q, self.head_dim]);
            let k = heads_first(&self.k[b], [1, keys, self.heads_kv, self.head_dim]);
            let v = heads_first(&self.v[b], [1, keys, self.heads_kv, self.value_dim]);
            let into = TensorMut::from_slice(&mut out, [1, queries, self.heads_q, self.value_dim]).unwrap();
            let lse_into = TensorMut::from_slice(&mut lse, [1, queries, self.heads_q]).unwrap();
            let (into, lse_into) = (into.permuted([0, 2, 1, 3]).unwrap(), lse_into.permuted([0, 2, 1]).unwrap());
            let attention = settings.attention();
            attention.compute(q, (k, v), into, lse_into, &mut Workspace::new()).unwrap();
            let lse_rows =
                TensorRef::from_slice(&lse, [1, queries, self.heads_q]).unwrap().permuted([0, 2, 1]).unwrap();
            let mut sums = vec![CANARY; self.heads_q * keys];
            let into = TensorMut::from_slice(&mut sums, [1, self.heads_q, keys]).unwrap();
            attention.key_sums(q, (k, v), lse_rows, into, &mut Workspace::new()).unwrap();
            [out, lse, sums]
        };
        (0..self.lengths.len()).map(rows).collect()
    }

    /// All sequences in one call, laid out as the two arguments say.
    fn together(&self, settings: &Settings, queries: &Queries<Q>, keys: &Keys<K>) -> Rows {
        let attention = settings.attention();
        let (attention, [batch, rows]) = queries.options(attention, self);
        let attention = keys.options(attention);
        let q = heads_first(&queries.q, [batch, rows, self.heads_q, self.head_dim]);
        let mut out = vec![CANARY; batch * rows * self.heads_q * self.value_dim];
        let mut lse = vec![CANARY; batch * rows * self.heads_q];
        let into = TensorMut::from_slice(&mut out, [batch, rows, self.heads_q, self.value_dim]).unwrap();
        let lse_into = TensorMut::from_slice(&mut lse, [batch, rows, self.heads_q]).unwrap();
        let (into, lse_into) = (into.permuted([0, 2, 1, 3]).unwrap(), lse_into.permuted([0, 2, 1]).unwrap());
        let kv = keys.view(self);
        attention.compute(q, kv, into, lse_into, &mut Workspace::new()).unwrap();
        let sums = self.sums_together(&attention, (q, kv), &lse);

        // The reference reads the same tensors.
        if settings.level == Level::Portable {
            let exact = reference::attention(&attention, q, kv).unwrap();
            assert_eq!(exact.shape, [batch, self.heads_q, rows, self.value_dim]);
            self.compare_with_reference(queries, &exact, &out, rows);
        }
        let width = self.heads_q * self.value_dim;
        let mut own = vec![false; batch * rows];
        let rows = (0..self.lengths.len()).map(|b| {
            let first = queries.first_row(b, rows);
            let end = first + self.lengths[b].0;
            own[first..end].fill(true);
            let (out, lse) = (&out[first * width..end * width], &lse[first * self.heads_q..end * self.heads_q]);
            [out.to_vec(), lse.to_vec(), sums[b].clone()]
        });
        let rows = rows.collect();
        for row in (0..own.len()).filter(|&row| !own[row]) {
            let untouched = |x: &[f32]| x.iter().all(|x| *x == CANARY);
            assert!(untouched(&out[row * width..][..width]), "row {row} of no sequence was written");
            assert!(untouched(&lse[row * self.heads_q..][..self.heads_q]), "row {row} of no sequence has an lse");
        }
        rows
    }

    /// The key sums of each sequence, in one call. Padding after a sequence's keys is 0.
    fn sums_together<'t>(
        &self,
        attention: &Attention<'t>,
        (q, kv): (TensorRef<'t, Q>, KeysValues<'t>),
        lse: &'t [f32],
    ) -> Vec<Vec<f32>> {
        let (_, most) = self.most();
        let [batch, _, rows, _] = q.shape();
        let lse = TensorRef::from_slice(lse, [batch, rows, self.heads_q]).unwrap().permuted([0, 2, 1]).unwrap();
        let mut sums = vec![CANARY; self.lengths.len() * self.heads_q * most];
        let into = TensorMut::from_slice(&mut sums, [self.lengths.len(), self.heads_q, most]).unwrap();
        attention.key_sums(q, kv, lse, into, &mut Workspace::new()).unwrap();
        let of_sequence = |b: usize| {
            let heads = sums[b * self.heads_q * most..][..self.heads_q * most].chunks_exact(most.max(1));
            let (own, padding): (Vec<_>, Vec<_>) = heads.map(|head| head.split_at(self.lengths[b].1)).unzip();
            assert!(padding.concat().iter().all(|sum| sum.to_bits() == 0), "padding of sequence {b} has a sum");
            own.concat()
        };
        (0..self.lengths.len()).map(of_sequence).collect()
    }

    fn compare_with_reference(&self, queries: &Queries<Q>, exact: &reference::Reference, out: &[f32], rows: usize) {
        for (b, &(count, _)) in self.lengths.iter().enumerate() {
            for (i, h) in (0..count).flat_map(|i| (0..self.heads_q).map(move |h| (i, h))) {
                let row = queries.first_row(b, rows) + i;
                let (batch, row_of_batch) = (row / rows, row % rows);
                for d in 0..self.value_dim {
                    let got = out[(row * self.heads_q + h) * self.value_dim + d] as f64;
                    let right = exact.out[((batch * self.heads_q + h) * rows + row_of_batch) * self.value_dim + d];
                    assert!((got - right).abs() < 1e-4, "sequence {b}, query {i}, head {h}: {got}, not {right}");
                }
            }
        }
    }
}

impl<Q, K> Batch<Q, K> {
    /// The most queries, and the most keys.
    fn most(&self) -> (usize, usize) {
        self.lengths.iter().fold((0, 0), |(q, k), &(queries, keys)| (q.max(queries), k.max(keys)))
    }
}

/// `[batch, rows, heads, dim]` seen as `[batch, heads, rows, dim]`.
fn heads_first<T: Copy>(data: &[T], shape: [usize; 4]) -> TensorRef<'_, T> {
    TensorRef::from_slice(data, shape).unwrap().permuted([0, 2, 1, 3]).unwrap()
}

/// Queries, `[batch, rows, heads, dim]`.
struct Queries<Q> {
    q: Vec<Q>,
    padded_lengths: Vec<i64>,
    starts: Option<Vec<u32>>,
}

impl<Q: Element> Queries<Q> {
    fn padded<K>(of: &Batch<Q, K>) -> Self {
        let (most, _) = of.most();
        let rows = of.q.iter().flat_map(|rows| {
            let padding = most * of.heads_q * of.head_dim - rows.len();
            rows.iter().copied().chain(std::iter::repeat_n(Q::from_f32(f32::NAN), padding))
        });
        let padded_lengths = of.lengths.iter().map(|&(queries, _)| queries as i64).collect();
        Queries { q: rows.collect(), padded_lengths, starts: None }
    }

    /// With `before` rows of no sequence in front, and as many at the end.
    fn packed<K>(of: &Batch<Q, K>, before: usize) -> Self {
        let gap = vec![Q::from_f32(f32::NAN); before * of.heads_q * of.head_dim];
        let q = [&gap].into_iter().chain(&of.q).chain([&gap]).flatten().copied().collect();
        let mut starts = vec![before as u32];
        of.lengths.iter().for_each(|&(queries, _)| starts.push(starts[starts.len() - 1] + queries as u32));
        Queries { q, padded_lengths: Vec::new(), starts: Some(starts) }
    }

    fn options<'a, K>(&'a self, attention: Attention<'a>, of: &Batch<Q, K>) -> (Attention<'a>, [usize; 2]) {
        match &self.starts {
            Some(starts) => {
                let rows = self.q.len() / (of.heads_q * of.head_dim);
                (attention.query_starts(starts), [1, rows])
            }
            None => (attention.query_lengths(&self.padded_lengths), [of.lengths.len(), of.most().0]),
        }
    }

    /// The row of a sequence's first query, counted through all batches of `rows` rows.
    fn first_row(&self, b: usize, rows: usize) -> usize {
        self.starts.as_ref().map_or(b * rows, |starts| starts[b] as usize)
    }
}

/// Keys and values in one of their places.
struct Keys<K> {
    k: Vec<K>,
    v: Vec<K>,
    kind: Kind,
    lengths: Vec<usize>,
    starts: Vec<i32>,
    pages: Vec<i32>,
    page_size: usize,
    pool: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Padded,
    Packed,
    /// `[pages, page_size, heads, dim]`, a rectangular table.
    Pages,
    /// `[pages, heads, page_size, dim]`, a compressed table.
    HeadsFirst,
}

const KINDS: [Kind; 4] = [Kind::Padded, Kind::Packed, Kind::Pages, Kind::HeadsFirst];

impl<K: Element> Keys<K> {
    fn new<Q>(of: &Batch<Q, K>, kind: Kind, page_size: usize, rng: &mut Rng) -> Self {
        let nan = K::from_f32(f32::NAN);
        let lengths: Vec<usize> = of.lengths.iter().map(|&(_, keys)| keys).collect();
        let (_, most) = of.most();
        let mut starts = vec![0];
        let (widths, mut pages, mut pool) = ([of.heads_kv * of.head_dim, of.heads_kv * of.value_dim], Vec::new(), 0);
        let mut place: Box<dyn Fn(usize, usize) -> usize> = Box::new(move |b, j| b * most + j);
        let mut rows = lengths.len() * most;
        match kind {
            Kind::Padded => {}
            Kind::Packed => {
                lengths.iter().for_each(|keys| starts.push(starts[starts.len() - 1] + *keys as i32));
                rows = starts[lengths.len()] as usize;
                let starts = starts.clone();
                place = Box::new(move |b, j| starts[b] as usize + j);
            }
            Kind::Pages | Kind::HeadsFirst => {
                let width = most.div_ceil(page_size);
                // Pages at random, some of no sequence.
                let mut free: Vec<i32> = (0..(lengths.len() * width + 3) as i32).collect();
                pool = free.len();
                let mut lists = Vec::new();
                for keys in &lengths {
                    let own: Vec<i32> =
                        (0..keys.div_ceil(page_size)).map(|_| free.swap_remove(rng.below(free.len()))).collect();
                    pages.extend(&own);
                    if kind == Kind::Pages {
                        pages.extend(std::iter::repeat_n(-1, width - own.len()));
                    }
                    starts.push(pages.len() as i32);
                    lists.push(own);
                }
                rows = pool * page_size;
                place = Box::new(move |b, j| lists[b][j / page_size] as usize * page_size + j % page_size);
            }
        }
        let mut data = widths.map(|width| vec![nan; rows * width]);
        for (b, &keys) in lengths.iter().enumerate() {
            for (j, (to, (from, width))) in
                (0..keys).flat_map(|j| [(j, 0), (j, 1)]).map(|(j, n)| (j, (n, ([&of.k[b], &of.v[b]][n], widths[n]))))
            {
                data[to][place(b, j) * width..][..width].copy_from_slice(&from[j * width..][..width]);
            }
        }
        let [mut k, mut v] = data;
        if kind == Kind::HeadsFirst {
            for (data, dim) in [(&mut k, of.head_dim), (&mut v, of.value_dim)] {
                let pages = heads_first(data, [pool, page_size, of.heads_kv, dim]);
                let mut moved = Vec::with_capacity(data.len());
                for [p, h, s, e] in support::layouts::Layout::contiguous(pages.shape()).indices() {
                    moved.push(pages.get([p, h, s, e]).unwrap());
                }
                *data = moved;
            }
        }
        Keys { k, v, kind, lengths, starts, pages, page_size, pool }
    }

    fn options<'a>(&'a self, attention: Attention<'a>) -> Attention<'a> {
        if self.kind == Kind::Padded { attention.key_lengths(&self.lengths) } else { attention }
    }

    fn view<Q>(&self, of: &Batch<Q, K>) -> KeysValues<'_> {
        let (sequences, (_, most)) = (self.lengths.len(), of.most());
        let tensor = |data, dim| -> AnyTensorRef<'_> {
            match self.kind {
                Kind::Padded => heads_first(data, [sequences, most, of.heads_kv, dim]).into(),
                // Three axes: `[total, heads, dim]`.
                Kind::Packed => {
                    let total = self.starts[sequences] as usize;
                    TensorRef::from_slice(data, [total, of.heads_kv, dim]).unwrap().into()
                }
                Kind::Pages => heads_first(data, [self.pool, self.page_size, of.heads_kv, dim]).into(),
                Kind::HeadsFirst => {
                    TensorRef::from_slice(data, [self.pool, of.heads_kv, self.page_size, dim]).unwrap().into()
                }
            }
        };
        let (k, v) = (tensor(&self.k, of.head_dim), tensor(&self.v, of.value_dim));
        match self.kind {
            Kind::Padded => (k, v).into(),
            Kind::Packed => KeysValues::packed(k, v, &self.starts),
            Kind::Pages => {
                let width = most.div_ceil(self.page_size);
                KeysValues::paged(k, v, PageTable::new(&self.pages, width, &self.lengths, self.page_size).unwrap())
            }
            Kind::HeadsFirst => {
                let table = PageTable::compressed(&self.starts, &self.pages, &self.lengths, self.page_size);
                KeysValues::paged(k, v, table.unwrap())
            }
        }
    }
}

fn check<Q: Element, K: Element>(rng: &mut Rng, largest: usize) {
    let batch = Batch::<Q, K>::random(rng, largest);
    let settings = Settings::random(rng, batch.lengths.len());
    let queries = if rng.one_in(2) { Queries::padded(&batch) } else { Queries::packed(&batch, rng.below(3)) };
    let page_size = [1, 2, 3, 8, 16, 17, 32, 256][rng.below(8)];
    let keys = KINDS.map(|kind| Keys::new(&batch, kind, page_size, rng));
    for level in Level::available() {
        let settings = Settings { level, ..settings.clone() };
        let alone = batch.alone(&settings);
        for keys in &keys {
            let together = batch.together(&settings, &queries, keys);
            let bits = |rows: &Rows| -> Vec<_> {
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                rows.iter().map(|rows| rows.each_ref().map(|x| bits(x))).collect()
            };
            for (b, (together, alone)) in bits(&together).into_iter().zip(bits(&alone)).enumerate() {
                assert!(
                    together == alone,
                    "sequence {b} of {:?} ({:?}, packed queries: {}, pages of {page_size}, heads {}/{}, dims {}/{}) is not as \
                     alone: {settings:?}",
                    batch.lengths,
                    keys.kind,
                    queries.starts.is_some(),
                    batch.heads_q,
                    batch.heads_kv,
                    batch.head_dim,
                    batch.value_dim,
                );
            }
        }
    }
}

/// Padded, packed, paged and alone: the same bits, over random lengths, page sizes and tables. Slots of no key hold NaN.
#[test]
fn a_sequence_has_the_bits_of_a_call_alone() {
    let mut rng = Rng(0x5e9);
    for _ in 0..60 {
        check::<f32, f32>(&mut rng, 300);
        check::<f32, f16>(&mut rng, 300);
        check::<bf16, bf16>(&mut rng, 300);
    }
    for _ in 0..4 {
        check::<f32, f16>(&mut rng, 1500); // keys in several splits
        check::<bf16, bf16>(&mut rng, 1500);
    }
}

/// A layout that an engine hands in: keys and values in one buffer, `[pages][slot][K|V][dim]`, and values that are the first
/// elements of their keys.
#[test]
fn keys_and_values_may_share_memory() {
    let mut rng = Rng(7);
    let (pages, size, dim) = (5, 4, 16);
    let data: Vec<f32> = rng.normals(pages * size * 2 * dim);
    let both = TensorRef::from_slice(&data, [pages, size, 2, dim]).unwrap();
    let [k, v] = [0, 1].map(|n| both.narrow(2, n..n + 1).unwrap().permuted([0, 2, 1, 3]).unwrap());
    let q: Vec<f32> = rng.normals(3 * 8);
    let q = TensorRef::from_slice(&q, [1, 3, 1, 8]).unwrap();
    let table = [2, 0, 4];
    let table = PageTable::compressed(&[0u32, 3], &table, &[10], size).unwrap();
    let latent = k.narrow(3, ..8).unwrap();
    for (k, v) in [(latent, v), (latent, latent.narrow(3, ..5).unwrap())] {
        let gather = |x: TensorRef<'_, f32>| {
            let cols = x.shape()[3];
            let row = move |j: usize| (0..cols).map(move |e| x.get([[2, 0, 4][j / size], 0, j % size, e]).unwrap());
            (0..10).flat_map(row).collect::<Vec<f32>>()
        };
        let (k_rows, v_rows) = (gather(k), gather(v));
        let dense = (
            TensorRef::from_slice(&k_rows, [1, 1, 10, 8]).unwrap(),
            TensorRef::from_slice(&v_rows, [1, 1, 10, v.shape()[3]]).unwrap(),
        );
        let run = |kv: KeysValues<'_>| {
            let mut out = vec![0.0f32; 3 * v.shape()[3]];
            let into = TensorMut::from_slice(&mut out, [1, 3, 1, v.shape()[3]]).unwrap();
            Attention::new().compute(q, kv, into, None, &mut Workspace::new()).unwrap();
            out
        };
        assert_eq!(run(KeysValues::paged(k, v, table)), run(dense.into()));
    }
}

/// A prepared step is planned again for longer sequences, and gives the same bits as a call.
#[test]
fn a_step_is_prepared_once_for_all_layers() {
    let mut rng = Rng(11);
    let (pages, size, heads, dim) = (40, 16, 2, 32);
    let layers: Vec<Vec<f16>> = (0..3).map(|_| rng.normals(pages * size * heads * dim)).collect();
    let pool = |data| TensorRef::<f16>::from_slice(data, [pages, heads, size, dim]).unwrap();
    let q: Vec<f32> = rng.normals(4 * 6 * dim);
    let q = TensorRef::from_slice(&q, [4, 6, dim]).unwrap();
    let (starts, list) = ([0u32, 1, 2, 4], (0..30).map(|n| (n * 7) % 40).collect::<Vec<u32>>());
    let attention = Attention::new().causal().query_starts(&starts);
    let first = [100u32, 31, 7];
    fn kv<'a>(pool: TensorRef<'a, f16>, list: &'a [u32], lengths: &'a [u32; 3]) -> KeysValues<'a> {
        KeysValues::paged(pool, pool, PageTable::new(list, 10, lengths, pool.shape()[2]).unwrap())
    }
    let mut prepared = attention.prepare(q, kv(pool(&layers[0]), &list, &first)).unwrap();
    let mut workspace = Workspace::new();
    for step in 0..30 {
        let lengths = first.map(|length| length + step);
        prepared.replan(q, kv(pool(&layers[0]), &list, &lengths)).unwrap();
        for layer in &layers {
            let run = |prepare: bool, workspace: &mut Workspace| {
                let mut out = vec![0.0f32; 4 * 6 * dim];
                let into = TensorMut::from_slice(&mut out, [4, 6, dim]).unwrap();
                match prepare {
                    true => prepared.compute(q, kv(pool(layer), &list, &lengths), into, None, workspace),
                    false => attention.compute(q, kv(pool(layer), &list, &lengths), into, None, workspace),
                }
                .unwrap();
                out
            };
            assert_eq!(run(true, &mut workspace), run(false, &mut workspace), "step {step}");
        }
    }
    // Other query starts: packed queries of another step.
    let (starts, lengths) = ([0usize, 2, 2, 4], [120u32, 31, 8]);
    prepared.replan_packed(q, &starts, kv(pool(&layers[1]), &list, &lengths)).unwrap();
    let packed = Attention::new().causal().query_starts(&starts);
    let mut outs = [(); 2].map(|()| vec![0.0f32; 4 * 6 * dim]);
    let [a, b] = outs.each_mut().map(|out| TensorMut::from_slice(out, [4, 6, dim]).unwrap());
    prepared.compute(q, kv(pool(&layers[1]), &list, &lengths), a, None, &mut workspace).unwrap();
    packed.compute(q, kv(pool(&layers[1]), &list, &lengths), b, None, &mut workspace).unwrap();
    assert_eq!(outs[0], outs[1]);
    // Sums of probabilities are of the same sequences.
    let lse_rows = [2.0f32; 6 * 4];
    let mut sums = [(); 2].map(|()| vec![CANARY; 3 * 6 * 120]);
    let [a, b] = sums.each_mut().map(|sums| TensorMut::from_slice(sums, [3, 6, 120]).unwrap());
    let lse = TensorRef::from_slice(&lse_rows, [1, 6, 4]).unwrap();
    prepared.key_sums(q, kv(pool(&layers[1]), &list, &lengths), lse, a, &mut workspace).unwrap();
    packed.key_sums(q, kv(pool(&layers[1]), &list, &lengths), lse, b, &mut workspace).unwrap();
    assert_eq!(sums[0], sums[1]);
    let none = prepared.replan_packed(q, &[], kv(pool(&layers[1]), &list, &lengths)).unwrap_err();
    assert_eq!(none, Error::WrongCount { what: "query starts", expected: 1, got: 0 });

    // Other lengths than the prepared ones are refused.
    let mut out = vec![0.0f32; 4 * 6 * dim];
    let into = TensorMut::from_slice(&mut out, [4, 6, dim]).unwrap();
    let error = prepared.compute(q, kv(pool(&layers[0]), &list, &first), into, None, &mut workspace).unwrap_err();
    let expected = Error::ShapeMismatch { tensor: "keys", dimension: "seq_kv", expected: 120, got: 100 };
    assert_eq!(error, expected);
}

/// Attention over the caches has the bits of attention over plain tensors: what a rotating cache has lost is hidden.
#[test]
fn caches_are_read_where_they_lie() {
    let mut rng = Rng(21);
    let (heads_q, heads_kv, dim) = (6, 2, 16);
    for case in 0..40 {
        let (batch, format) = (2, KvFormat::new([DType::F32, DType::F16][case % 2], heads_kv, dim));
        let (first, window) = ([0, 1, 5, 40][rng.below(4)], [1, 7, 20, 64][rng.below(4)]);
        let mut cache = KvCache::new(format, batch, 400).unwrap();
        let mut rotating = RotatingKvCache::new(format, batch, first, window).unwrap();
        let mut paged = PagedKvCache::new(format, 1, 100, [1, 4, 16, 33][rng.below(4)]).unwrap();
        let ids: Vec<_> = (0..batch).map(|_| paged.new_sequence()).collect();
        for (b, id) in ids.iter().enumerate() {
            for _ in 0..1 + rng.below(3) {
                let tokens = 1 + rng.below(60);
                let data: Vec<f32> = rng.normals(tokens * heads_kv * dim);
                let kv = heads_first(&data, [1, tokens, heads_kv, dim]);
                cache.append_to(b, kv, kv).unwrap();
                rotating.append_to(b, kv, kv).unwrap();
                if paged.free_pages() > 61 {
                    paged.append(*id, kv, kv).unwrap();
                }
            }
        }
        let queries = 1 + rng.below(3);
        let q: Vec<f32> = rng.normals(batch * queries * heads_q * dim);
        let q = TensorRef::from_slice(&q, [batch, heads_q, queries, dim]).unwrap();
        // A cache that lacks keys of a window is refused: W >= w + n - 1, or nothing has been lost.
        let left = [30, 3][rng.below(2)];
        let fits = |len: &usize| len.saturating_sub(window) <= first || window >= left + queries;
        let left = (rng.one_in(2) && rotating.lengths().iter().all(fits)).then_some(left);
        let attention = Attention::new().causal().window(left, None).alibi(AlibiSlopes::Standard);
        let run = |attention: &Attention<'_>, kv: KeysValues<'_>| {
            let mut out = vec![CANARY; batch * heads_q * queries * dim];
            let into = TensorMut::from_slice(&mut out, [batch, heads_q, queries, dim]).unwrap();
            attention.compute(q, kv, into, None, &mut Workspace::new()).unwrap();
            out
        };
        let dense = (cache.keys(), cache.values());
        let plain = attention.clone().key_lengths(cache.lengths());
        assert_eq!(run(&attention, (&cache).into()), run(&plain, dense.into()), "case {case}");

        let held = |b: usize, j: usize| {
            let kept = rotating.kept(b).unwrap();
            kept.iter().any(|range| range.contains(&j))
        };
        let shows: Vec<bool> =
            (0..batch).flat_map(|b| (0..400).map(move |j| (b, j))).map(|(b, j)| held(b, j)).collect();
        let masked = plain.clone().mask(TensorRef::from_slice(&shows, [batch, 1, 1, 400]).unwrap());
        let exact = run(&masked, dense.into());
        let got = run(&attention, (&rotating).into());
        assert_eq!(got, exact, "case {case}: first {first}, window {window}, lengths {:?}", cache.lengths());
        let reference = reference::attention(&attention, q, &rotating).unwrap();
        for (got, right) in got.iter().zip(&reference.out) {
            assert!((*got as f64 - right).abs() < 1e-5, "case {case}: {got}, not {right}");
        }

        let mut lists = PageLists::new();
        paged.list(&ids, &mut lists).unwrap();
        let lengths = lists.lengths().to_vec();
        let shorter = attention.clone().key_lengths(&lengths);
        assert_eq!(run(&attention, paged.view(0, &lists).unwrap()), run(&shorter, dense.into()), "case {case}");
    }
}

/// Windows over keys that a rotating cache has overwritten are refused: the cache must keep w + n - 1 keys for windows of w and
/// chunks of n. First tokens count as kept. Without a window, queries see what is left.
#[test]
fn a_window_over_lost_keys_is_refused() {
    let format = KvFormat::new(DType::F32, 1, 4);
    let data = [0.5f32; 40 * 4];
    let tokens = |n: usize| TensorRef::from_slice(&data[..n * 4], [1, 1, n, 4]).unwrap();
    let compute = |cache: &RotatingKvCache, attention: Attention<'_>, queries: usize| {
        let mut out = vec![0.0f32; queries * 4];
        let into = TensorMut::from_slice(&mut out, [1, 1, queries, 4]).unwrap();
        attention.compute(tokens(queries), cache, into, None, &mut Workspace::new())
    };
    for (first, (keys, chunk)) in [0, 3].into_iter().flat_map(|first| [(8, 1), (8, 5), (1, 4)].map(|of| (first, of))) {
        let windowed = || Attention::new().causal().window(Some(keys - 1), Some(0));
        for kept in 1..keys + chunk + 2 {
            let mut cache = RotatingKvCache::new(format, 1, first, kept).unwrap();
            for n in [7, 20, chunk] {
                cache.append(tokens(n), tokens(n)).unwrap();
            }
            let expected = match kept >= keys + chunk - 1 {
                true => Ok(()),
                false => Err(Error::LostKeys { sequence: 0, window: kept, needed: keys + chunk - 1 }),
            };
            assert_eq!(compute(&cache, windowed(), chunk), expected, "{first} first, {kept} kept");
            assert_eq!(compute(&cache, Attention::new().causal(), chunk), Ok(()));
            // Queries before the lost keys, and after them.
            let at = |p| windowed().query_offset(QueryOffset::At(p));
            assert_eq!(compute(&cache, at(first as isize - chunk as isize), chunk), Ok(()));
            assert_eq!(compute(&cache, at(1000), chunk), Ok(()));
        }
    }
    // No more than the first tokens is needed to reach back over them.
    let mut cache = RotatingKvCache::new(format, 1, 3, 4).unwrap();
    cache.append(tokens(8), tokens(8)).unwrap();
    let error = compute(&cache, Attention::new().causal().window(Some(100), None), 1).unwrap_err();
    assert_eq!(error, Error::LostKeys { sequence: 0, window: 4, needed: 5 });
    assert_eq!(
        error.to_string(),
        "queries of sequence 0 have windows over tokens that the cache has overwritten: it keeps the last 4 but must keep 5, the \
         window of a query and one token for each further query"
    );
}

/// The memory of partial results follows the keys that are seen: those of a window, and those that a rotating cache holds, first tokens
/// included. How many there have been does not count.
#[test]
fn memory_follows_the_keys_that_are_seen() {
    let number = [0.5f32];
    let tokens = |n: usize, dim| TensorRef::with_strides(&number, 0, [1, 1, n, dim], [0; 4]).unwrap();
    let bytes = |attention: &Attention<'_>, kv: KeysValues<'_>| {
        let (mut out, mut workspace) = ([0.0f32; 32], Workspace::new());
        let into = TensorMut::from_slice(&mut out, [1, 1, 1, 32]).unwrap();
        assert_eq!(attention.plan(tokens(1, 32), kv).unwrap().form(), Form::Decode);
        attention.compute(tokens(1, 32), kv, into, None, &mut workspace).unwrap();
        assert!(out.iter().all(|x| (x - 0.5).abs() < 1e-6));
        workspace.bytes()
    };
    let attention = Attention::new().causal().threads(Threads::Serial);
    let windowed = attention.clone().window(Some(2000), None);
    // Of the same remainders by 512 and by 2000, so that windows reach into the same numbers of splits, and rings wrap at the same key.
    let lengths = [6000, 6000 + 15 * 64_000];
    let [few, many] = lengths.map(|n| bytes(&windowed, (tokens(n, 32), tokens(n, 32)).into()));
    assert_eq!(few, many, "a window");
    let all = bytes(&attention, (tokens(lengths[1], 32), tokens(lengths[1], 32)).into());
    assert!(all > 5 * many, "{all} bytes for all keys, {many} for a window");
    for first in [0, 4, 600] {
        let [few, many] = lengths.map(|n| {
            let mut cache = RotatingKvCache::new(KvFormat::new(DType::F32, 1, 32), 1, first, 2000).unwrap();
            cache.append(tokens(n, 32), tokens(n, 32)).unwrap();
            bytes(&attention, (&cache).into())
        });
        assert_eq!(few, many, "{first} first tokens");
    }
}

/// Output, log-sum-exps and key sums: `[batch, heads_q, seq_q, value_dim]`, `[batch, heads_q, seq_q]` and `[batch, heads_q, seq_kv]`.
fn results(
    attention: &Attention<'_>,
    q: TensorRef<'_, f32>,
    kv: KeysValues<'_>,
    (seq_kv, value_dim): (usize, usize),
) -> [Vec<f32>; 3] {
    let ([batch, heads, rows, _], mut workspace) = (q.shape(), Workspace::new());
    let [mut out, mut lse, mut sums] = [rows * value_dim, rows, seq_kv].map(|len| vec![CANARY; batch * heads * len]);
    let into = TensorMut::from_slice(&mut out, [batch, heads, rows, value_dim]).unwrap();
    let lse_into = TensorMut::from_slice(&mut lse, [batch, heads, rows]).unwrap();
    attention.compute(q, kv, into, lse_into, &mut workspace).unwrap();
    let lse_rows = TensorRef::from_slice(&lse, [batch, heads, rows]).unwrap();
    let into = TensorMut::from_slice(&mut sums, [batch, heads, seq_kv]).unwrap();
    attention.key_sums(q, kv, lse_rows, into, &mut workspace).unwrap();
    [out, lse, sums]
}

/// Left padding: the bits of a call with each sequence alone, in tensors and in a cache. Padding is neither read nor written (its key
/// sums are 0), masks and biases have rows and columns for it, and positions count from the first key.
#[test]
fn left_padding_has_no_meaning() {
    let mut rng = Rng(0x1ef7);
    let (heads_q, heads_kv, dim) = (4, 2, 16);
    for case in 0..60 {
        let (seq_q, seq_kv) = ([1, 3, 20, 70][rng.below(4)], [70, 100, 700][rng.below(3)]);
        let firsts: Vec<usize> = (0..3).map(|b| [0, seq_kv, rng.below(seq_kv)][(b + case) % 3]).collect();
        let first_queries: Vec<usize> = (0..3).map(|_| rng.below(seq_q + 1)).collect();
        let (q, k) = (rng.normals::<f32>(3 * heads_q * seq_q * dim), rng.normals::<f16>(3 * heads_kv * seq_kv * dim));
        let bias: Vec<f32> = rng.normals(3 * seq_q * seq_kv);
        let shows: Vec<bool> = (0..3 * seq_kv).map(|_| !rng.one_in(5)).collect();
        let (mut q_nan, mut k_nan) = (q.clone(), k.clone());
        for (b, (&first, &first_query)) in firsts.iter().zip(&first_queries).enumerate() {
            for h in 0..heads_q {
                q_nan[(b * heads_q + h) * seq_q * dim..][..first_query * dim].fill(f32::NAN);
            }
            for h in 0..heads_kv {
                k_nan[(b * heads_kv + h) * seq_kv * dim..][..first * dim].fill(f16::NAN);
            }
        }
        let (has_bias, has_mask, window) = (rng.one_in(2), rng.one_in(2), rng.one_in(2).then_some(rng.below(90)));
        let (form, offset) = ([None, Some(Form::Decode), Some(Form::Prefill)][rng.below(3)], rng.below(50) as isize);
        let offset = if rng.one_in(2) { QueryOffset::FromEnd } else { QueryOffset::At(offset) };
        let options = |bias: AnyTensorRef<'static>, mask: TensorRef<'static, bool>| {
            let mut attention = Attention::new().causal().window(window, None).query_offset(offset);
            attention = if has_bias { attention.bias(bias) } else { attention };
            attention = if has_mask { attention.mask(mask) } else { attention };
            form.into_iter().fold(attention, Attention::form)
        };
        // The options borrow these for the whole test.
        let (bias, shows): (&'static [f32], &'static [bool]) = (bias.leak(), shows.leak());
        let bias = TensorRef::from_slice(bias, [3, 1, seq_q, seq_kv]).unwrap();
        let shows = TensorRef::from_slice(shows, [3, 1, 1, seq_kv]).unwrap();

        let padded = options(bias.into(), shows).first_keys(&firsts).first_queries(&first_queries);
        let (q_all, k_all) = (
            TensorRef::from_slice(&q_nan, [3, heads_q, seq_q, dim]).unwrap(),
            TensorRef::from_slice(&k_nan, [3, heads_kv, seq_kv, dim]).unwrap(),
        );
        let all = results(&padded, q_all, (k_all, k_all).into(), (seq_kv, dim));
        let mut cache = KvCache::new(KvFormat::new(DType::F16, heads_kv, dim), 3, seq_kv).unwrap();
        cache.append(k_all, k_all).unwrap();
        assert_eq!(results(&padded, q_all, (&cache).into(), (seq_kv, dim)), all, "case {case}");

        for (b, (&first, &first_query)) in firsts.iter().zip(&first_queries).enumerate() {
            let (rows, keys) = (seq_q - first_query, seq_kv - first);
            let q = TensorRef::from_slice(&q, [3, heads_q, seq_q, dim]).unwrap();
            let k = TensorRef::from_slice(&k, [3, heads_kv, seq_kv, dim]).unwrap();
            let q = q.narrow(0, b..b + 1).unwrap().narrow(2, first_query..).unwrap();
            let k = k.narrow(0, b..b + 1).unwrap().narrow(2, first..).unwrap();
            let bias = bias.narrow(0, b..b + 1).unwrap().narrow(2, first_query..).unwrap().narrow(3, first..).unwrap();
            let shows = shows.narrow(0, b..b + 1).unwrap().narrow(3, first..).unwrap();
            let alone = results(&options(bias.into(), shows), q, (k, k).into(), (keys, dim));
            // Elements of a head, those of its padding, and what they hold.
            let parts = [(seq_q * dim, first_query * dim, CANARY), (seq_q, first_query, CANARY), (seq_kv, first, 0.0)];
            for ((all, alone), (len, padding, untouched)) in all.iter().zip(&alone).zip(parts) {
                for h in 0..heads_q {
                    let (padding, own) = all[(b * heads_q + h) * len..][..len].split_at(padding);
                    assert!(padding.iter().all(|x| x.to_bits() == untouched.to_bits()), "case {case}: written padding");
                    let alone = &alone[h * own.len()..][..own.len()];
                    let same = own.iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "case {case}: sequence {b} of {rows} queries and {keys} keys is not as alone");
                }
            }
        }
    }
}

/// First rows that are not in a sequence, or not one for each, are refused.
#[test]
fn wrong_padding_is_refused() {
    let data = [0.5f32; 2 * 4 * 8];
    let x = TensorRef::from_slice(&data, [2, 1, 4, 8]).unwrap();
    let plan = |attention: Attention<'_>| attention.plan(x, (x, x)).map(drop);
    let range = |what, batch, got, most| Err(Error::LengthOutOfRange { what, batch, got, most });
    assert_eq!(plan(Attention::new().first_keys(&[4u32, 4]).first_queries(&[0i64, 4])), Ok(()));
    assert_eq!(plan(Attention::new().first_keys(&[0u32, 5])), range("first keys", 1, 5, 4));
    assert_eq!(plan(Attention::new().first_keys(&[-1i32, 0])), range("first keys", 0, -1, 4));
    assert_eq!(plan(Attention::new().first_queries(&[0u64, u64::MAX])), range("first queries", 1, u64::MAX as i128, 4));
    let before_the_end = Attention::new().first_keys(&[1u32, 3]).key_lengths(&[1u32, 2]);
    assert_eq!(plan(before_the_end), range("first keys", 1, 3, 2));
    let count = Error::WrongCount { what: "first keys", expected: 2, got: 3 };
    assert_eq!(plan(Attention::new().first_keys(&[0u32; 3])), Err(count));
    let count = Error::WrongCount { what: "first queries", expected: 2, got: 1 };
    assert_eq!(plan(Attention::new().first_queries(&[0u32])), Err(count));
    let twice = |option| Err(Error::GivenTwice { option });
    assert_eq!(plan(Attention::new().first_keys(&[0u32; 2]).first_keys(&[0u32; 2])), twice("first_keys"));
    assert_eq!(plan(Attention::new().first_queries(&[0u32; 2]).first_queries(&[0u32; 2])), twice("first_queries"));
    let rotating = RotatingKvCache::new(KvFormat::new(DType::F32, 1, 8), 2, 0, 4).unwrap();
    assert_eq!(Attention::new().first_keys(&[0u32; 2]).plan(x, &rotating).map(drop), twice("first_keys"));
}

/// Scores of a left-padded batch are in the columns and rows of the tensors. At the stages before masks, padding is a key like any other.
#[cfg(feature = "ndarray")]
#[test]
fn scores_of_left_padded_batches() {
    use flashtile::ScoreStage;
    let mut rng = Rng(5);
    let (q, k) = (rng.normals::<f32>(2 * 4 * 8), rng.normals::<f32>(2 * 4 * 8));
    let (q, k) = (TensorRef::from_slice(&q, [2, 1, 4, 8]).unwrap(), TensorRef::from_slice(&k, [2, 1, 4, 8]).unwrap());
    let firsts = [0u32, 2];
    let padded = Attention::new().causal().first_keys(&firsts).first_queries(&firsts);
    for stage in [ScoreStage::Raw, ScoreStage::Biased, ScoreStage::Probabilities] {
        let scores = padded.scores(stage, q, k).unwrap();
        let exact = reference::scores(&padded, stage, q, k).unwrap();
        for (n, (got, right)) in scores.iter().zip(&exact).enumerate() {
            let same = *got as f64 == *right || (*got as f64 - right).abs() < 1e-5;
            assert!(same, "{stage:?}: score {n} is {got}, not {right}");
        }
        let own = |x: TensorRef<'_, f32>| -> Vec<f32> {
            (2..4).flat_map(|i| (0..8).map(move |e| x.get([1, 0, i, e]).unwrap())).collect()
        };
        let (own_q, own_k) = (own(q), own(k));
        let (own_q, own_k) = (
            TensorRef::from_slice(&own_q, [1, 1, 2, 8]).unwrap(),
            TensorRef::from_slice(&own_k, [1, 1, 2, 8]).unwrap(),
        );
        let alone = Attention::new().causal().scores(stage, own_q, own_k).unwrap();
        for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            assert_eq!(scores[[1, 0, 2 + i, 2 + j]], alone[[0, 0, i, j]], "{stage:?} {i} {j}");
        }
    }
}

/// Sequences that don't fit are refused, with a sentence that says what to do, and nothing is written.
#[test]
fn wrong_sequences_are_refused() {
    let data = vec![0.5f32; 6 * 4 * 8];
    let (packed, pool) = ([6, 4, 8], [3, 4, 2, 8]);
    let x = || TensorRef::from_slice(&data, packed).unwrap();
    let pages = || TensorRef::from_slice(&data, pool).unwrap();
    let refuse = |attention: Attention<'_>, kv: KeysValues<'_>, error: Error, sentence: &str| {
        let mut out = vec![CANARY; 6 * 4 * 8];
        let into = TensorMut::from_slice(&mut out, packed).unwrap();
        let got = attention.compute(x(), kv, into, None, &mut Workspace::new()).unwrap_err();
        assert_eq!((&got, got.to_string().as_str()), (&error, sentence));
        assert_eq!(reference::attention(&attention, x(), kv).unwrap_err(), error);
        assert!(out.iter().all(|x| *x == CANARY));
    };
    let plain = Attention::new;
    let both = || KeysValues::packed(x(), x(), &[0u32, 2, 6]);
    let starts = |index, got, least, most| Error::InvalidStarts { what: "query starts", index, got, least, most };
    refuse(
        plain().query_starts(&[0i64, 3, 2]),
        both(),
        starts(2, 2, 3, 6),
        "entry 2 of the query starts is 2 but must be between 3, the one before it, and 6",
    );
    refuse(
        plain().query_starts(&[-1i64, 3, 6]),
        both(),
        starts(0, -1, 0, 6),
        "entry 0 of the query starts is -1 but must be between 0, the one before it, and 6",
    );
    refuse(
        plain().query_starts(&[0i64, 3, 7]),
        both(),
        starts(2, 7, 3, 6),
        "entry 2 of the query starts is 7 but must be between 3, the one before it, and 6",
    );
    let list: [u32; 0] = [];
    let count = |what, expected, got| Error::WrongCount { what, expected, got };
    refuse(
        plain().query_starts(&list),
        both(),
        count("query starts", 1, 0),
        "0 query starts were given but there must be 1",
    );
    refuse(
        plain().query_starts(&[0u32, 2, 4, 6]),
        both(),
        count("key starts", 4, 3),
        "3 key starts were given but there must be 4",
    );
    let packed_queries = || plain().query_starts(&[0u32, 2, 6]);
    // Packed sequences have no padding.
    let twice = |option| Error::GivenTwice { option };
    let sentence = "the option first_keys was given twice; combine both into one, or set it once";
    refuse(packed_queries().first_keys(&[0u32, 0]), both(), twice("first_keys"), sentence);
    let sentence = "the option first_queries was given twice; combine both into one, or set it once";
    refuse(packed_queries().first_queries(&[0u32, 0]), both(), twice("first_queries"), sentence);
    refuse(
        packed_queries().first_queries(&[0u32, 0]).first_queries(&[0u32, 0]),
        both(),
        twice("first_queries"),
        sentence,
    );
    refuse(
        packed_queries().key_lengths(&[1u32, 1]),
        both(),
        Error::GivenTwice { option: "key_lengths" },
        "the option key_lengths was given twice; combine both into one, or set it once",
    );
    refuse(
        packed_queries().query_lengths(&[1u32, 1]),
        both(),
        Error::GivenTwice { option: "query_lengths" },
        "the option query_lengths was given twice; combine both into one, or set it once",
    );
    refuse(
        plain(),
        both(),
        Error::Rank { tensor: "queries", expected: 4, got: 3 },
        "the rank of the queries is 3 but must be 4: [batch, seq, hidden] needs splitting into heads, [heads, seq, dim] needs a batch axis \
         (insert_axis)",
    );
    let table = PageTable::new(&[0u32, 3], 1, &[2, 1], 2).unwrap();
    assert_eq!((table.pages_needed(), table.page_size()), (4, 2));
    refuse(
        packed_queries(),
        KeysValues::paged(pages(), pages(), table),
        Error::ShapeMismatch { tensor: "keys", dimension: "pages (at least)", expected: 4, got: 3 },
        "pages (at least) of the keys is 3 but must be 4",
    );
    let table = PageTable::new(&[0u32, 1], 1, &[2, 1], 3).unwrap();
    refuse(
        packed_queries(),
        KeysValues::paged(pages(), pages(), table),
        Error::ShapeMismatch { tensor: "keys", dimension: "page_size", expected: 3, got: 2 },
        "page_size of the keys is 2 but must be 3",
    );

    let invalid = |what, sequence, got, limit| Error::InvalidPages { what, sequence, got, limit };
    let page = isize::MAX as usize;
    assert_eq!(PageTable::new(&[0, -1], 1, &[2, 1], 2).unwrap_err(), invalid("page", 1, -1, page));
    assert_eq!(PageTable::new(&[0, -1], 1, &[2, 0], 2).map(|table| table.pages_needed()), Ok(1));
    assert_eq!(PageTable::new(&[0, 1], 1, &[2, 3], 2).unwrap_err(), invalid("length", 1, 3, 2));
    assert_eq!(PageTable::new(&[0, 1], 1, &[2, -1], 2).unwrap_err(), invalid("length", 1, -1, 2));
    // Positions are counted in isize, so a page that is listed often can't make a sequence longer than that.
    assert_eq!(
        PageTable::new(&[0, 0], 2, &[u64::MAX - 300], usize::MAX / 2).unwrap_err(),
        invalid("length", 0, (u64::MAX - 300) as i128, page),
    );
    assert_eq!(PageTable::new(&[0, 1], 1, &[2, 1], 0).unwrap_err(), invalid("page size", 0, 0, usize::MAX));
    assert_eq!(PageTable::new(&[0, 1, 2], 1, &[2, 1], 2).unwrap_err(), count("entries of the page table", 2, 3),);
    assert_eq!(
        PageTable::compressed(&[0u32, 2, 1], &[0u32, 1], &[2, 1], 2).unwrap_err(),
        Error::InvalidStarts { what: "starts of the page table", index: 2, got: 1, least: 2, most: 2 },
    );
    let sentences = [
        (invalid("page", 1, -1, 9), "a page of sequence 1 in the page table is -1 but must be between 0 and 9"),
        (invalid("page size", 0, 0, 9), "a page size of sequence 0 in the page table is 0 but must be between 1 and 9"),
    ];
    for (error, sentence) in sentences {
        assert_eq!(error.to_string(), sentence);
    }
}

/// What is prepared stays right, whatever is planned in between: new starts, then another number of keys; and keys that a cache has
/// lost are not taken for others.
#[test]
fn prepared_steps_keep_what_they_were_told() {
    let mut rng = Rng(31);
    let (heads, dim) = (2, 8);
    let data: Vec<f32> = rng.normals(2 * heads * 40 * dim);
    let kv = |n: usize| TensorRef::from_slice(&data, [2, heads, 40, dim]).unwrap().narrow(2, ..n).unwrap();
    let q: Vec<f32> = rng.normals(3 * heads * dim);
    let q = TensorRef::from_slice(&q, [3, heads, dim]).unwrap();
    let run = |compute: &dyn Fn(TensorMut<'_, f32, 3>) -> Result<(), Error>| {
        let mut out = vec![CANARY; 3 * heads * dim];
        compute(TensorMut::from_slice(&mut out, [3, heads, dim]).unwrap()).map(|()| out)
    };
    let (first, second) = ([0usize, 2, 3], [0usize, 1, 3]);
    let mut prepared = Attention::new().query_starts(&first).prepare(q, (kv(40), kv(40))).unwrap();
    prepared.replan_packed(q, &second, (kv(40), kv(40))).unwrap();
    prepared.set_keys(30).unwrap();
    let fresh = Attention::new().query_starts(&second);
    let workspace = || Workspace::new();
    assert_eq!(
        run(&|out| prepared.compute(q, (kv(30), kv(30)), out, None, &mut workspace())),
        run(&|out| fresh.compute(q, (kv(30), kv(30)), out, None, &mut workspace())),
    );

    let format = KvFormat::new(DType::F32, heads, dim);
    let (mut plain, mut rotating) =
        (KvCache::new(format, 2, 40).unwrap(), RotatingKvCache::new(format, 2, 0, 5).unwrap());
    plain.append(kv(40), kv(40)).unwrap();
    rotating.append(kv(40), kv(40)).unwrap();
    prepared.replan(q, &rotating).unwrap();
    let error = run(&|out| prepared.compute(q, &plain, out, None, &mut workspace())).unwrap_err();
    let expected = Error::ShapeMismatch { tensor: "keys", dimension: "window of the cache", expected: 5, got: 0 };
    assert_eq!(error, expected);
    assert_eq!(
        run(&|out| prepared.compute(q, &rotating, out, None, &mut workspace())),
        run(&|out| fresh.compute(q, &rotating, out, None, &mut workspace())),
    );
}

/// A mask that panics while a step is planned leaves what was prepared before as it was.
#[test]
fn a_panic_while_planning_changes_nothing() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Panics(AtomicBool);
    impl flashtile::mask::Mask for Panics {
        fn sees(&self, _: flashtile::mask::Pair) -> bool {
            true
        }
        fn span(&self, query: flashtile::mask::Query) -> std::ops::Range<isize> {
            assert!(!self.0.load(Ordering::Relaxed) || query.batch() < 2, "asked to");
            0..isize::MAX
        }
    }
    let mut rng = Rng(41);
    let (heads, dim) = (2, 8);
    let data: Vec<f32> = rng.normals(3 * heads * 20 * dim);
    let kv = TensorRef::from_slice(&data, [3, heads, 20, dim]).unwrap();
    let q: Vec<f32> = rng.normals(5 * heads * dim);
    let q = TensorRef::from_slice(&q, [5, heads, dim]).unwrap();
    let (mask, starts) = (Panics(AtomicBool::new(false)), [0usize, 2, 3, 5]);
    let attention = Attention::new().causal().masked_by(&mask).query_starts(&starts);
    let mut prepared = attention.prepare(q, (kv, kv)).unwrap();
    let run = |prepared: &flashtile::Prepared<'_>| {
        let mut out = vec![CANARY; 5 * heads * dim];
        let into = TensorMut::from_slice(&mut out, [5, heads, dim]).unwrap();
        prepared.compute(q, (kv, kv), into, None, &mut Workspace::new()).unwrap();
        out
    };
    let before = run(&prepared);
    mask.0.store(true, Ordering::Relaxed);
    let replan = AssertUnwindSafe(|| prepared.replan_packed(q, &[0, 2, 4, 5], (kv, kv)));
    assert!(catch_unwind(replan).is_err());
    mask.0.store(false, Ordering::Relaxed);
    assert_eq!(run(&prepared), before);
}

/// Lists of pages that sequences no longer have are refused: they would show another sequence's tokens.
#[test]
fn stale_page_lists_are_refused() {
    let (ones, twos) = (vec![1.0f32; 4 * 8], vec![2.0f32; 4 * 8]);
    let [ones, twos] = [&ones, &twos].map(|data| TensorRef::from_slice(data, [1, 1, 4, 8]).unwrap());
    let mut cache = PagedKvCache::new(KvFormat::new(DType::F32, 1, 8), 1, 4, 4).unwrap();
    let (first, second) = (cache.new_sequence(), cache.new_sequence());
    let mut lists = PageLists::new();
    cache.append(first, ones, ones).unwrap();
    cache.list(&[first], &mut lists).unwrap();
    cache.truncate(first, 0).unwrap();
    cache.append(second, twos, twos).unwrap();
    cache.append(first, ones, ones).unwrap();
    let stale = Error::StaleLists { sequence: 0 };
    assert_eq!(cache.view(0, &lists).unwrap_err(), stale);
    assert_eq!(cache.view_to_plan(&lists).unwrap_err(), stale);
    assert_eq!(stale.to_string(), "sequence 0 of the page lists has other pages now; list the pages again");
    cache.list(&[first], &mut lists).unwrap();
    assert!(cache.view(0, &lists).is_ok());
}
