//! Workloads of a server: sequences of different lengths in one call, pages, caches, and the same one by one.

use crate::contest::{Contest, Repeat, Work, stream};
use crate::lines::Line;
use crate::support::{Dims, Rng};
use crate::workloads::Workload;
use flashtile::{
    Attention, Element, KeysValues, KvCache, KvFormat, PageTable, TensorMut, TensorRef, Threads, Workspace,
};
use std::error::Error;

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Serving {
    /// 16 prompts of 1 to 700 tokens, packed; and each in a call of its own.
    Packed,
    PackedAlone,
    /// 4 parts of prompts of 256 tokens and 28 single tokens, over 1000 to 8000 keys; and each alone.
    Mixed,
    MixedAlone,
    /// A token over 8192 keys, or a part of a prompt of 256 tokens, in a pool of shuffled pages of this many keys; 0 is no page.
    Pages(usize),
    ChunkPages(usize),
    /// Half of the keys of each of 4 sequences are padding: in front, or behind.
    LeftPadded,
    RightPadded,
    /// 16 heads on one key of 576 elements, whose first 512 are the value.
    Latent,
    /// A token of each of 32 sequences, in pages of 16: 4096 keys that all of them share, then 200 of its own. And each sequence in a
    /// call of its own.
    Cascade,
    CascadeAlone,
    /// Five beams over 1500 keys, as a batch of stride 0; and as five queries of one sequence.
    Beams,
    BeamsFolded,
    /// One token in a cache of 32 layers.
    Append,
    /// A token over 8192 keys of a cache.
    Cache,
}

impl Serving {
    /// Queries and keys of each sequence.
    fn lengths(self) -> Vec<(usize, usize)> {
        let mut rng = Rng(3);
        match self {
            Serving::Packed | Serving::PackedAlone => {
                // Evenly spread, in any order.
                (0..16).map(|n| 1 + (n * 7 % 16) * 699 / 15).map(|len| (len, len)).collect()
            }
            Serving::Mixed | Serving::MixedAlone => {
                (0..32).map(|n| (if n % 8 == 0 { 256 } else { 1 }, 1000 + rng.below(7001))).collect()
            }
            Serving::ChunkPages(_) => vec![(256, 8192)],
            Serving::LeftPadded | Serving::RightPadded => vec![(1, 2048); 4],
            Serving::Cascade | Serving::CascadeAlone => vec![(1, PREFIX + SUFFIX); 32],
            Serving::Beams => vec![(1, 1500); 5],
            Serving::BeamsFolded => vec![(5, 1500)],
            Serving::Pages(_) | Serving::Latent | Serving::Append | Serving::Cache => vec![(1, 8192)],
        }
    }

    /// `[heads_q, heads_kv, head_dim, value_dim]`.
    fn heads(self) -> [usize; 4] {
        match self {
            Serving::Packed | Serving::PackedAlone => [8, 8, 64, 64],
            Serving::Latent => [16, 1, 576, 512],
            Serving::Beams | Serving::BeamsFolded => [12, 12, 64, 64],
            _ => [32, 8, 128, 128],
        }
    }

    fn is_causal(self) -> bool {
        !matches!(self, Serving::LeftPadded | Serving::RightPadded | Serving::Beams | Serving::BeamsFolded)
    }

    /// Visible pairs of query and key.
    fn pairs(self) -> usize {
        let [heads, ..] = self.heads();
        let pairs = |&(queries, keys)| Dims::new(heads, queries, keys, 1).pairs(self.is_causal() && queries > 1, None);
        self.lengths().iter().map(pairs).sum()
    }

    /// The keys in memory, shared ones once.
    fn stored_keys(self) -> usize {
        match self {
            Serving::Cascade | Serving::CascadeAlone => PREFIX + self.lengths().len() * SUFFIX,
            Serving::Beams => 1500,
            _ => self.lengths().iter().map(|&(_, keys)| keys).sum(),
        }
    }

    pub(crate) fn work<T: Element>(self) -> Work {
        let [heads_q, heads_kv, head_dim, value_dim] = self.heads();
        let lengths = self.lengths();
        let (queries, keys) = (lengths.iter().map(|&(queries, _)| queries).sum::<usize>(), self.stored_keys());
        let kv_dim = head_dim + if self == Serving::Latent { 0 } else { value_dim };
        let elements = keys * heads_kv * kv_dim + queries * heads_q * (head_dim + value_dim);
        match self {
            Serving::Append => Work { flops: 0.0, bytes: 2 * LAYERS * heads_kv * kv_dim * size_of::<T>() },
            _ => Work {
                flops: 2.0 * self.pairs() as f64 * (head_dim + value_dim) as f64,
                bytes: elements * size_of::<T>(),
            },
        }
    }
}

const LAYERS: usize = 32;

/// Keys of a shared prefix and of what follows, and of a page.
const PREFIX: usize = 4096;
const SUFFIX: usize = 200;
const PAGE: usize = 16;

/// The page tables of sequences that share a prefix, one after the other, and the number of pages.
fn shared_tables(sequences: usize) -> (Vec<u32>, usize) {
    let (prefix, own) = (PREFIX / PAGE, SUFFIX.div_ceil(PAGE));
    let pages = prefix + sequences * own;
    let mut shuffled: Vec<u32> = (0..pages as u32).collect();
    let mut rng = Rng(4);
    (1..pages).rev().for_each(|n| shuffled.swap(n, rng.below(n + 1)));
    let (shared, rest) = shuffled.split_at(prefix);
    (rest.chunks(own).flat_map(|own| shared.iter().chain(own)).copied().collect(), pages)
}

pub(crate) fn line<'a, T: Element>(
    workload: &'static Workload,
    serving: Serving,
    threads: usize,
) -> Result<Line<'a>, Box<dyn Error>> {
    let work = serving.work::<T>();
    let kernel = kernel::<T>(serving, if threads == 1 { Threads::Serial } else { Threads::Pool })?;
    let contest = Contest::with_machine(kernel, threads, work, stream(work))?;
    Ok(Line { workload, dtype: T::DTYPE, threads, work, plan: String::new(), contest, serial: None })
}

/// Numbers that repeat after a million: the time depends on no value.
fn numbers<T: Element>(n: usize, seed: u64) -> Vec<T> {
    let some: Vec<T> = Rng(seed).normals(n.min(1 << 20));
    some.iter().copied().cycle().take(n).collect()
}

fn kernel<'a, T: Element>(serving: Serving, threads: Threads) -> Result<Repeat<'a>, flashtile::Error> {
    let [heads_q, heads_kv, head_dim, value_dim] = serving.heads();
    let lengths = serving.lengths();
    let starts = |of: fn(&(usize, usize)) -> usize| -> Vec<usize> {
        let sums = lengths.iter().scan(0, |sum, length| {
            *sum += of(length);
            Some(*sum)
        });
        [0].into_iter().chain(sums).collect()
    };
    let (q_starts, k_starts) = (starts(|length| length.0), starts(|length| length.1));
    let (queries, keys) = (q_starts[lengths.len()], k_starts[lengths.len()]);
    let q = numbers::<T>(queries * heads_q * head_dim, 1);
    let mut out = vec![T::default(); queries * heads_q * value_dim];
    let mut workspace = Workspace::new();
    let causal = |attention: Attention<'static>| if serving.is_causal() { attention.causal() } else { attention };
    let attention = causal(Attention::new().threads(threads));
    let (k, v) = (numbers::<T>(keys * heads_kv * head_dim, 2), numbers::<T>(keys * heads_kv * value_dim, 3));
    Ok(match serving {
        Serving::Packed | Serving::Mixed => Box::new(move |repeats| {
            let attention = attention.clone().query_starts(&q_starts);
            let [k, v] =
                [(&k, head_dim), (&v, value_dim)].map(|(data, dim)| TensorRef::from_slice(data, [keys, heads_kv, dim]));
            let kv = KeysValues::packed(k?, v?, &k_starts);
            for _ in 0..repeats {
                let q = TensorRef::from_slice(&q, [queries, heads_q, head_dim])?;
                let out = TensorMut::from_slice(&mut out, [queries, heads_q, value_dim])?;
                attention.compute(q, kv, out, None, &mut workspace)?;
            }
            Ok(())
        }),
        Serving::PackedAlone | Serving::MixedAlone => Box::new(move |repeats| {
            for b in (0..repeats).flat_map(|_| 0..q_starts.len() - 1) {
                let (rows, of_keys) = (q_starts[b]..q_starts[b + 1], k_starts[b]..k_starts[b + 1]);
                let q = TensorRef::from_slice(&q, [1, queries, heads_q, head_dim])?;
                let q = q.narrow(1, rows.clone())?.permuted([0, 2, 1, 3])?;
                let [k, v] = [(&k, head_dim), (&v, value_dim)].map(|(data, dim)| {
                    let all = TensorRef::from_slice(data, [1, keys, heads_kv, dim])?;
                    all.narrow(1, of_keys.clone())?.permuted([0, 2, 1, 3])
                });
                let out = TensorMut::from_slice(&mut out, [1, queries, heads_q, value_dim])?;
                let out = out.narrow(1, rows)?.permuted([0, 2, 1, 3])?;
                attention.compute(q, (k?, v?), out, None, &mut workspace)?;
            }
            Ok(())
        }),
        Serving::Pages(size) | Serving::ChunkPages(size) => {
            let (size, paged) = if size == 0 { (keys, false) } else { (size, true) };
            let pages = keys / size;
            // Each page goes somewhere else.
            let mut table: Vec<u32> = (0..pages as u32).collect();
            let mut rng = Rng(4);
            (1..pages).rev().for_each(|n| table.swap(n, rng.below(n + 1)));
            Box::new(move |repeats| {
                let q = TensorRef::from_slice(&q, [1, queries, heads_q, head_dim])?.permuted([0, 2, 1, 3])?;
                let [k, v] = [(&k, head_dim), (&v, value_dim)]
                    .map(|(data, dim)| TensorRef::from_slice(data, [pages, heads_kv, size, dim]));
                let lengths = [keys];
                let table = PageTable::new(&table, pages, &lengths, size)?;
                let kv = if paged { KeysValues::paged(k?, v?, table) } else { (k?, v?).into() };
                for _ in 0..repeats {
                    let out = TensorMut::from_slice(&mut out, [1, queries, heads_q, value_dim])?;
                    attention.compute(q, kv, out.permuted([0, 2, 1, 3])?, None, &mut workspace)?;
                }
                Ok(())
            })
        }
        Serving::LeftPadded | Serving::RightPadded => {
            let (batch, half) = (lengths.len(), 1024usize);
            Box::new(move |repeats| {
                let starts = vec![half; batch];
                let attention = match serving {
                    Serving::LeftPadded => attention.clone().first_keys(&starts),
                    _ => attention.clone().key_lengths(&starts),
                };
                let q = TensorRef::from_slice(&q, [batch, heads_q, 1, head_dim])?;
                let [k, v] = [(&k, head_dim), (&v, value_dim)]
                    .map(|(data, dim)| TensorRef::from_slice(data, [batch, heads_kv, 2 * half, dim]));
                let kv = KeysValues::from((k?, v?));
                for _ in 0..repeats {
                    let out = TensorMut::from_slice(&mut out, [batch, heads_q, 1, value_dim])?;
                    attention.compute(q, kv, out, None, &mut workspace)?;
                }
                Ok(())
            })
        }
        Serving::Cascade | Serving::CascadeAlone => {
            let sequences = lengths.len();
            let (tables, pages) = shared_tables(sequences);
            let width = tables.len() / sequences;
            let (k, v) = (
                numbers::<T>(pages * PAGE * heads_kv * head_dim, 2),
                numbers::<T>(pages * PAGE * heads_kv * head_dim, 3),
            );
            // Sequences of a call.
            let together = if serving == Serving::Cascade { sequences } else { 1 };
            Box::new(move |repeats| {
                let pool = |data| TensorRef::from_slice(data, [pages, heads_kv, PAGE, head_dim]);
                let lengths = vec![PREFIX + SUFFIX; together];
                for b in (0..repeats).flat_map(|_| (0..sequences).step_by(together)) {
                    let table = &tables[b * width..(b + together) * width];
                    let kv = KeysValues::paged(pool(&k)?, pool(&v)?, PageTable::new(table, width, &lengths, PAGE)?);
                    let rows = b * heads_q * head_dim..(b + together) * heads_q * head_dim;
                    let q = TensorRef::from_slice(&q[rows.clone()], [together, heads_q, 1, head_dim])?;
                    let out = TensorMut::from_slice(&mut out[rows], [together, heads_q, 1, head_dim])?;
                    attention.compute(q, kv, out, None, &mut workspace)?;
                }
                Ok(())
            })
        }
        Serving::Beams | Serving::BeamsFolded => {
            let (batch, per_sequence) = (lengths.len(), lengths[0].0);
            let keys = lengths[0].1;
            Box::new(move |repeats| {
                let q = TensorRef::from_slice(&q, [batch, heads_q, per_sequence, head_dim])?;
                let broadcast = |data, dim: usize| {
                    let stride = (keys * dim) as isize;
                    TensorRef::with_strides(data, 0, [batch, heads_kv, keys, dim], [0, stride, dim as isize, 1])
                };
                for _ in 0..repeats {
                    let out = TensorMut::from_slice(&mut out, [batch, heads_q, per_sequence, value_dim])?;
                    let kv = (broadcast(&k[..], head_dim)?, broadcast(&v[..], value_dim)?);
                    attention.compute(q, kv, out, None, &mut workspace)?;
                }
                Ok(())
            })
        }
        Serving::Latent => Box::new(move |repeats| {
            let q = TensorRef::from_slice(&q, [1, heads_q, 1, head_dim])?;
            let k = TensorRef::from_slice(&k, [1, 1, keys, head_dim])?;
            for _ in 0..repeats {
                let out = TensorMut::from_slice(&mut out, [1, heads_q, 1, value_dim])?;
                attention.compute(q, (k, k.narrow(3, ..value_dim)?), out, None, &mut workspace)?;
            }
            Ok(())
        }),
        Serving::Cache => {
            let mut cache = KvCache::new(KvFormat::new(T::DTYPE, heads_kv, head_dim), 1, keys)?;
            cache.append(
                TensorRef::from_slice(&k, [1, heads_kv, keys, head_dim])?,
                TensorRef::from_slice(&v, [1, heads_kv, keys, value_dim])?,
            )?;
            Box::new(move |repeats| {
                let q = TensorRef::from_slice(&q, [1, heads_q, 1, head_dim])?;
                for _ in 0..repeats {
                    let out = TensorMut::from_slice(&mut out, [1, heads_q, 1, value_dim])?;
                    attention.compute(q, &cache, out, None, &mut workspace)?;
                }
                Ok(())
            })
        }
        Serving::Append => {
            let format = KvFormat::new(T::DTYPE, heads_kv, head_dim);
            let caches = (0..LAYERS).map(|_| KvCache::new(format, 1, 512)).collect::<Result<Vec<_>, _>>();
            let mut caches = caches?;
            let token: Vec<f32> = Rng(5).normals(heads_kv * head_dim);
            Box::new(move |repeats| {
                let kv = TensorRef::from_slice(&token, [1, heads_kv, 1, head_dim])?;
                for _ in 0..repeats {
                    for cache in &mut caches {
                        if cache.len(0)? == cache.capacity() {
                            cache.clear();
                        }
                        cache.append(kv, kv)?;
                    }
                }
                Ok(())
            })
        }
    })
}
