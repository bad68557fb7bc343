//! Promise: sequences that share their first keys have the bits of each of them alone.

mod support;

use flashtile::{
    AlibiSlopes, Attention, Element, Form, KeysValues, Level, PageTable, QueryOffset, TensorMut, TensorRef, Threads,
    Workspace, bf16, f16,
};
use support::Rng;

/// Sequences over one pool of pages. Each shares some first pages with the one before it.
#[derive(Clone)]
struct Batch<Q, K> {
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    value_dim: usize,
    page_size: usize,
    /// Queries and keys of each.
    lengths: Vec<(usize, usize)>,
    /// `[sequences][width]`; -1 after a sequence's last page.
    table: Vec<i32>,
    width: usize,
    pages: usize,
    /// `[pages][heads_kv][page_size][dim]`; NaN where no sequence has a key.
    k: Vec<K>,
    v: Vec<K>,
    /// `[rows][heads_q][head_dim]`, one sequence after the other.
    q: Vec<Q>,
}

/// Options of a call.
#[derive(Clone, Debug)]
struct Settings {
    causal: bool,
    window: Option<usize>,
    softcap: Option<f32>,
    alibi: bool,
    sinks: Option<Vec<f32>>,
    /// Of each sequence.
    offsets: Option<Vec<isize>>,
    /// Of each sequence and key.
    mask: Option<Vec<bool>>,
    form: Option<Form>,
    level: Level,
    threads: Threads,
}

type Bits = Vec<u32>;

fn bits(x: &[f32]) -> Bits {
    x.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

impl<Q: Element, K: Element> Batch<Q, K> {
    fn random(rng: &mut Rng) -> Self {
        let heads_kv = 1 + rng.below(2);
        let heads_q = heads_kv * [1, 1, 2, 3, 5][rng.below(5)];
        let (head_dim, value_dim) = ([1, 16, 33, 64, 128][rng.below(5)], [1, 16, 20, 64, 128][rng.below(5)]);
        let page_size = [1, 7, 16, 64, 256, 600][rng.below(6)];
        let alike = rng.one_in(2).then_some(1 + rng.below(3));
        let count = 1 + rng.below(12);
        let longest = 1600;
        let width = longest / page_size + 1;
        let (mut lengths, mut table, mut pages) = (Vec::new(), Vec::<i32>::new(), 0);
        for b in 0..count {
            let keys =
                [0, 511, 512, 1024, longest, 500 + rng.below(longest - 500), 1 + rng.below(longest)][rng.below(7)];
            lengths.push((alike.unwrap_or_else(|| [0, 1, 1, 1, 2, 4, 30][rng.below(7)]), keys));
            let shared = [0, 300, 512, 600, 1024, 1100, longest][rng.below(7)];
            for n in 0..width {
                let own = n * page_size < keys;
                table.push(match table.get((b.max(1) - 1) * width + n) {
                    Some(&before) if b > 0 && own && before >= 0 && (n + 1) * page_size <= shared => before,
                    _ if own => {
                        pages += 1;
                        pages - 1
                    }
                    _ => -1,
                });
            }
        }
        let pages = pages as usize;
        let [mut k, mut v] =
            [head_dim, value_dim].map(|dim| vec![K::from_f32(f32::NAN); pages * heads_kv * page_size * dim]);
        for (b, &(_, keys)) in lengths.iter().enumerate() {
            for j in 0..keys {
                let (page, slot) = (table[b * width + j / page_size] as usize, j % page_size);
                for row in (0..heads_kv).map(|h| (page * heads_kv + h) * page_size + slot) {
                    let mut fill = |data: &mut [K]| data.iter_mut().for_each(|x| *x = K::from_f32(rng.normal()));
                    fill(&mut k[row * head_dim..][..head_dim]);
                    fill(&mut v[row * value_dim..][..value_dim]);
                }
            }
        }
        let rows: usize = lengths.iter().map(|&(queries, _)| queries).sum();
        let mut q: Vec<Q> = rng.normals(rows * heads_q * head_dim);
        for x in &mut q {
            if rng.one_in(2000) {
                *x = Q::from_f32([1e-39, 1e12, 0.0][rng.below(3)]); // outside the range of pairs
            }
        }
        Batch { heads_q, heads_kv, head_dim, value_dim, page_size, lengths, table, width, pages, k, v, q }
    }

    fn settings(&self, rng: &mut Rng, level: Level) -> Settings {
        let count = self.lengths.len();
        let mut offsets = || self.lengths.iter().map(|&(_, keys)| rng.below(2 * keys + 20) as isize - 10).collect();
        let offsets = Some(offsets()).filter(|_| rng.one_in(4));
        let mask = (0..count * self.seq_kv()).map(|_| !rng.one_in(9)).collect();
        Settings {
            causal: rng.one_in(2),
            window: rng.one_in(5).then_some(rng.below(2000)),
            softcap: rng.one_in(4).then_some(3.0),
            alibi: rng.one_in(8),
            sinks: rng.one_in(4).then_some(rng.normals(self.heads_q)),
            offsets,
            mask: Some(mask).filter(|_| rng.one_in(8)),
            form: [None, Some(Form::Decode), Some(Form::Decode), Some(Form::Prefill)][rng.below(4)],
            level,
            threads: [Threads::Pool, Threads::Serial][rng.below(2)],
        }
    }

    /// The most keys of a sequence.
    fn seq_kv(&self) -> usize {
        self.lengths.iter().map(|&(_, keys)| keys).max().unwrap_or(0)
    }

    /// The most queries.
    fn seq_q(&self) -> usize {
        self.lengths.iter().map(|&(queries, _)| queries).max().unwrap_or(0)
    }

    /// The first row of sequence `b`.
    fn first_row(&self, b: usize) -> usize {
        self.lengths[..b].iter().map(|&(queries, _)| queries).sum()
    }

    /// Sequence `b` alone.
    fn only(&self, b: usize) -> Self {
        let width = self.heads_q * self.head_dim;
        let rows = self.first_row(b) * width..self.first_row(b + 1) * width;
        let table = self.table[b * self.width..(b + 1) * self.width].to_vec();
        Batch { lengths: vec![self.lengths[b]], table, q: self.q[rows].to_vec(), ..self.clone() }
    }

    fn attention<'s>(&self, settings: &'s Settings) -> Attention<'s> {
        let mut attention =
            Attention::new().level(settings.level).threads(settings.threads).window(settings.window, None);
        if settings.causal {
            attention = attention.causal();
        }
        if let Some(cap) = settings.softcap {
            attention = attention.softcap(cap);
        }
        if settings.alibi {
            attention = attention.alibi(AlibiSlopes::Standard);
        }
        if let Some(sinks) = &settings.sinks {
            attention = attention.sinks(sinks);
        }
        if let Some(offsets) = &settings.offsets {
            attention = attention.query_offset(QueryOffset::per_batch(offsets));
        }
        if let Some(mask) = &settings.mask {
            let shape = [self.lengths.len(), 1, 1, self.seq_kv()];
            attention = attention.mask(TensorRef::from_slice(mask, shape).unwrap());
        }
        match settings.form {
            Some(form) => attention.form(form),
            None => attention,
        }
    }

    /// All sequences in one call: output and lse, row by row. `packed` is about the queries.
    fn compute(&self, settings: &Settings, packed: bool, workspace: &mut Workspace) -> (Bits, Bits) {
        let key_lengths: Vec<u32> = self.lengths.iter().map(|&(_, keys)| keys as u32).collect();
        let table = PageTable::new(&self.table, self.width, &key_lengths, self.page_size).unwrap();
        let [k, v] = [(&self.k, self.head_dim), (&self.v, self.value_dim)]
            .map(|(data, dim)| TensorRef::from_slice(data, [self.pages, self.heads_kv, self.page_size, dim]).unwrap());
        let kv = KeysValues::paged(k, v, table);
        let (count, rows) = (self.lengths.len(), self.first_row(self.lengths.len()));
        let attention = self.attention(settings);
        if packed {
            let starts: Vec<usize> = (0..=count).map(|b| self.first_row(b)).collect();
            let (mut out, mut lse) = (vec![0.0; rows * self.heads_q * self.value_dim], vec![0.0; rows * self.heads_q]);
            let q = TensorRef::from_slice(&self.q, [rows, self.heads_q, self.head_dim]).unwrap();
            let to = TensorMut::from_slice(&mut out, [rows, self.heads_q, self.value_dim]).unwrap();
            let lse_to = TensorMut::from_slice(&mut lse, [1, rows, self.heads_q]).unwrap();
            let lse_to = lse_to.permuted([0, 2, 1]).unwrap();
            attention.query_starts(&starts).compute(q, kv, to, lse_to, workspace).unwrap();
            return (bits(&out), bits(&lse));
        }
        // `[sequences, heads, queries, dim]`: sequences are not at the distance of their queries.
        let most = self.seq_q();
        let query_lengths: Vec<u32> = self.lengths.iter().map(|&(queries, _)| queries as u32).collect();
        let place = |b: usize, h: usize, i: usize| (b * self.heads_q + h) * most + i;
        let mut q = vec![Q::from_f32(f32::NAN); count * self.heads_q * most * self.head_dim];
        let (mut out, mut lse) =
            (vec![0.0; count * self.heads_q * most * self.value_dim], vec![0.0; count * self.heads_q * most]);
        let places: Vec<usize> = (0..count)
            .flat_map(|b| (0..self.lengths[b].0).map(move |i| (b, i)))
            .flat_map(|(b, i)| (0..self.heads_q).map(move |h| place(b, h, i)))
            .collect();
        for (from, &to) in self.q.chunks_exact(self.head_dim).zip(&places) {
            q[to * self.head_dim..][..self.head_dim].copy_from_slice(from);
        }
        let q = TensorRef::from_slice(&q, [count, self.heads_q, most, self.head_dim]).unwrap();
        let to = TensorMut::from_slice(&mut out, [count, self.heads_q, most, self.value_dim]).unwrap();
        let lse_to = TensorMut::from_slice(&mut lse, [count, self.heads_q, most]).unwrap();
        attention.query_lengths(&query_lengths).compute(q, kv, to, lse_to, workspace).unwrap();
        let rows = |data: &[f32], width: usize| -> Vec<f32> {
            places.iter().flat_map(|&at| data[at * width..][..width].to_vec()).collect()
        };
        (bits(&rows(&out, self.value_dim)), bits(&rows(&lse, 1)))
    }
}

impl Settings {
    /// For sequence `b` alone.
    fn alone(&self, b: usize, keys: usize, seq_kv: usize) -> Self {
        Settings {
            offsets: self.offsets.as_ref().map(|offsets| vec![offsets[b]]),
            mask: self.mask.as_ref().map(|mask| mask[b * seq_kv..][..keys].to_vec()),
            threads: Threads::Serial,
            ..self.clone()
        }
    }
}

fn bits_are_those_alone<Q: Element, K: Element>(seed: u64) {
    let mut workspace = Workspace::new();
    for level in Level::available() {
        let mut rng = Rng(seed);
        for round in 0..if cfg!(debug_assertions) { 12 } else { 60 } {
            let batch = Batch::<Q, K>::random(&mut rng);
            let settings = batch.settings(&mut rng, level);
            let alone = (0..batch.lengths.len()).map(|b| {
                let settings = settings.alone(b, batch.lengths[b].1, batch.seq_kv());
                batch.only(b).compute(&settings, false, &mut Workspace::new())
            });
            let (out, lse): (Vec<_>, Vec<_>) = alone.unzip();
            for packed in [false, true] {
                let together = batch.compute(&settings, packed, &mut workspace);
                let what = || format!("round {round}, packed {packed}: {:?} {settings:?}", batch.lengths);
                assert!(together.0 == out.concat(), "{}", what());
                assert!(together.1 == lse.concat(), "lse, {}", what());
            }
        }
    }
}

#[test]
fn bits_of_f32_are_those_alone() {
    bits_are_those_alone::<f32, f32>(1);
}

#[test]
fn bits_of_f16_are_those_alone() {
    bits_are_those_alone::<f16, f16>(2);
}

#[test]
fn bits_of_bf16_are_those_alone() {
    bits_are_those_alone::<bf16, bf16>(3);
}

#[test]
fn bits_of_mixed_types_are_those_alone() {
    bits_are_those_alone::<f32, bf16>(4);
}

/// What is prepared assumes no sharing: a table whose sequences share pages, and one of copies of these pages, in either order.
#[test]
fn prepared_steps_may_get_other_tables() {
    let mut rng = Rng(5);
    let (heads, dim, page, keys) = (4, 32, 16, 1100usize);
    let width = keys.div_ceil(page);
    // The pages of sequence 0, then a copy of them.
    let half: Vec<f32> = rng.normals(width * heads * page * dim);
    let pool = [&half[..], &half].concat();
    let pool = TensorRef::from_slice(&pool, [2 * width, heads, page, dim]).unwrap();
    let first = 0..width as u32;
    let copied: Vec<u32> = first.clone().chain(first.clone().map(|n| n + width as u32)).collect();
    let shared: Vec<u32> = first.clone().chain(first).collect();
    let (q, lengths) = (rng.normals::<f32>(2 * heads * dim), [keys, keys - 3]);
    let q = TensorRef::from_slice(&q, [2, heads, 1, dim]).unwrap();
    for level in Level::available() {
        let attention = Attention::new().causal().level(level);
        let mut outs = Vec::new();
        for [planned, computed] in [[&copied, &copied], [&copied, &shared], [&shared, &copied], [&shared, &shared]] {
            let kv = |table| KeysValues::paged(pool, pool, PageTable::new(table, width, &lengths, page).unwrap());
            let prepared = attention.prepare(q, kv(planned)).unwrap();
            let mut out = vec![0.0f32; 2 * heads * dim];
            let to = TensorMut::from_slice(&mut out, [2, heads, 1, dim]).unwrap();
            prepared.compute(q, kv(computed), to, None, &mut Workspace::new()).unwrap();
            outs.push(bits(&out));
        }
        assert!(outs.iter().all(|out| *out == outs[0]), "{level}");
    }
}

/// Beams: a batch whose keys are the same memory.
#[test]
fn keys_of_stride_0_are_shared() {
    let mut rng = Rng(6);
    // Up to 31 rows are computed by the loops for few rows, 32 or more in lanes.
    let (beams, heads, dim, keys) = (36, 2, 64, 1300usize);
    let [k, v]: [Vec<f16>; 2] = [(); 2].map(|()| rng.normals(heads * keys * dim));
    let q: Vec<f16> = rng.normals(beams * heads * dim);
    let all = TensorRef::from_slice(&q, [beams, heads, 1, dim]).unwrap();
    let strides = |batch: isize| [batch, (keys * dim) as isize, dim as isize, 1];
    for level in Level::available() {
        for threads in [Threads::Serial, Threads::Pool] {
            let attention = Attention::new().level(level).threads(threads);
            let compute = |beams: std::ops::Range<usize>| {
                let shape = [beams.len(), heads, keys, dim];
                let [k, v] = [&k, &v].map(|data| TensorRef::with_strides(data, 0, shape, strides(0)).unwrap());
                let mut out = vec![0.0f32; beams.len() * heads * dim];
                let to = TensorMut::from_slice(&mut out, [beams.len(), heads, 1, dim]).unwrap();
                let q = all.narrow(0, beams).unwrap();
                attention.compute(q, (k, v), to, None, &mut Workspace::new()).unwrap();
                bits(&out)
            };
            let alone: Vec<_> = (0..beams).flat_map(|b| compute(b..b + 1)).collect();
            for count in [30, 31, 32, 33, beams] {
                assert!(compute(0..count) == alone[..count * heads * dim], "{level} {threads:?} {count}");
            }
        }
    }
}
