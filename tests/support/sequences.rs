//! How a problem's sequences are handed in: packed or left-padded queries; keys that are packed, left-padded, in pages or in a cache.
//! What a problem says about its rows is the same in any of these. Slots of no key hold NaN.

use super::any_problem::{Broadcast, Laid, Problem, Tensor};
use super::layouts::Layout;
use super::{Dims, Rng};
use flashtile::{
    AnyTensorRef, KeysValues, KvCache, KvFormat, PageLists, PageTable, PagedKvCache, RotatingKvCache, TensorRef,
};
use std::borrow::Cow;
use std::ops::Range;

/// A row of a tensor, and whose it is: a sequence and its query or key, or none's.
type Owner = Option<(usize, usize)>;

/// Rows one sequence after the other, as the starts say.
#[derive(Clone, Debug)]
pub struct PackedRows {
    pub starts: Vec<i64>,
    pub total: usize,
}

impl PackedRows {
    /// With up to two rows of no sequence at either end.
    fn random(rng: &mut Rng, lengths: &[usize]) -> Self {
        let mut starts = vec![rng.below(3) as i64];
        lengths.iter().for_each(|&length| starts.push(starts[starts.len() - 1] + length as i64));
        let total = starts[lengths.len()] as usize + rng.below(3);
        PackedRows { starts, total }
    }

    fn owners(&self) -> Vec<Owner> {
        let mut owners = vec![None; self.total];
        for (b, starts) in self.starts.windows(2).enumerate() {
            (starts[0]..starts[1]).enumerate().for_each(|(i, row)| owners[row as usize] = Some((b, i)));
        }
        owners
    }
}

/// Left-padded rows: sequence `b` has the rows `firsts[b]..ends[b]` of its batch index.
#[derive(Clone, Debug)]
pub struct PaddedRows {
    pub firsts: Vec<usize>,
    pub ends: Vec<usize>,
}

impl PaddedRows {
    /// Within `rows` rows. Half of the time all end in the last one.
    fn random(rng: &mut Rng, rows: usize, lengths: &[usize]) -> Self {
        let to_the_end = rng.one_in(2);
        let first = |length: &usize| if to_the_end { rows - length } else { rng.below(rows - length + 1) };
        let firsts: Vec<usize> = lengths.iter().map(first).collect();
        let ends = firsts.iter().zip(lengths).map(|(first, length)| first + length).collect();
        PaddedRows { firsts, ends }
    }

    fn owners(&self, rows: usize) -> Vec<Owner> {
        let owner =
            |b: usize, row: usize| (self.firsts[b]..self.ends[b]).contains(&row).then(|| (b, row - self.firsts[b]));
        (0..self.firsts.len()).flat_map(|b| (0..rows).map(move |row| owner(b, row))).collect()
    }
}

/// Where the queries lie that a call gets.
#[derive(Clone, Debug, Default)]
pub enum QueryPlaces {
    /// In the problem's own tensor.
    #[default]
    Own,
    Packed {
        rows: PackedRows,
        q: Layout,
        out: Layout,
        lse: Layout<3>,
    },
    Padded {
        rows: PaddedRows,
        q: Layout,
    },
}

impl QueryPlaces {
    /// Any of them for queries of these numbers.
    pub fn random(rng: &mut Rng, dims: &Dims, lengths: &[usize]) -> Self {
        match rng.below(3) {
            0 => QueryPlaces::Own,
            1 => {
                let rows = PackedRows::random(rng, lengths);
                let (heads, total) = (dims.heads_q, rows.total);
                QueryPlaces::Packed {
                    rows,
                    q: Layout::random(rng, [1, heads, total, dims.head_dim], false),
                    out: Layout::random(rng, [1, heads, total, dims.value_dim], false),
                    lse: Layout::random(rng, [1, heads, total], false),
                }
            }
            _ => QueryPlaces::Padded {
                rows: PaddedRows::random(rng, dims.seq_q, lengths),
                q: Layout::random(rng, dims.q(), false),
            },
        }
    }

    fn padding(&self) -> &[usize] {
        if let QueryPlaces::Padded { rows, .. } = self { &rows.firsts } else { &[] }
    }
}

/// Where the keys and values lie that a call gets.
#[derive(Clone, Debug, Default)]
pub enum KeyPlaces {
    /// In the problem's own tensors.
    #[default]
    Own,
    Packed {
        rows: PackedRows,
        layouts: [Layout; 2],
    },
    /// In a cache, if there are no layouts.
    Padded {
        rows: PaddedRows,
        layouts: Option<[Layout; 2]>,
    },
    /// In pages, a list for each sequence.
    Pages {
        size: usize,
        lists: Vec<Vec<i32>>,
        compressed: bool,
        layouts: [Layout; 2],
    },
    /// In a cache with room for `seq_kv` keys.
    Cache,
    PagedCache {
        size: usize,
    },
    /// In a cache that loses keys, unless it has room for all.
    Rotating {
        first: usize,
        window: usize,
    },
}

impl KeyPlaces {
    /// Any of them for keys of these lengths; caches if keys and values have one type.
    pub fn random(rng: &mut Rng, dims: &Dims, lengths: &[usize], caches: bool) -> Self {
        let size = [1, 2, 3, 8, 16, 17, 32, 64][rng.below(8)];
        let layouts = |rng: &mut Rng, outer, rows| {
            [dims.head_dim, dims.value_dim].map(|dim| Layout::random(rng, [outer, dims.heads_kv, rows, dim], false))
        };
        match rng.below(if caches { 7 } else { 4 }) {
            0 => {
                let rows = PackedRows::random(rng, lengths);
                let layouts = layouts(rng, 1, rows.total);
                KeyPlaces::Packed { rows, layouts }
            }
            1 => {
                let rows = PaddedRows::random(rng, dims.seq_kv, lengths);
                let layouts = (!caches || rng.one_in(2)).then(|| layouts(rng, dims.batch, dims.seq_kv));
                KeyPlaces::Padded { rows, layouts }
            }
            2 | 3 => {
                let pages = lengths.iter().map(|length| length.div_ceil(size)).sum::<usize>() + rng.below(3);
                let mut free: Vec<i32> = (0..pages as i32).collect();
                let mut take = |_| free.swap_remove(rng.below(free.len()));
                let lists = lengths.iter().map(|length| (0..length.div_ceil(size)).map(&mut take).collect()).collect();
                KeyPlaces::Pages { size, lists, compressed: rng.one_in(2), layouts: layouts(rng, pages, size) }
            }
            4 => KeyPlaces::Cache,
            5 => KeyPlaces::PagedCache { size },
            _ => KeyPlaces::Rotating { first: rng.below(6), window: 1 + rng.below(dims.seq_kv + 1) },
        }
    }

    /// The keys of a sequence of `length` keys that have been lost.
    pub fn lost(&self, length: usize) -> Range<usize> {
        match self {
            KeyPlaces::Rotating { first, window } => *first..length.saturating_sub(*window),
            _ => 0..0,
        }
    }

    /// The rows of left padding before each sequence's keys; empty if there are none.
    pub fn padding(&self) -> &[usize] {
        if let KeyPlaces::Padded { rows, .. } = self { &rows.firsts } else { &[] }
    }
}

/// What a call of a problem gets.
pub struct Given<'p> {
    pub q: Cow<'p, Tensor>,
    /// With rows and columns for left padding.
    pub mask: Option<Cow<'p, Broadcast<Laid<bool>>>>,
    pub bias: Option<Cow<'p, Broadcast<Tensor>>>,
    keys: Keys<'p>,
    key_lengths: &'p [usize],
}

enum Keys<'p> {
    Own([&'p Tensor; 2]),
    Padded([Tensor; 2]),
    Packed([Tensor; 2], &'p [i64]),
    Pages { tensors: [Tensor; 2], starts: Option<Vec<u64>>, pages: Vec<i32>, size: usize },
    Cache(KvCache),
    PagedCache(PagedKvCache, PageLists),
    Rotating(RotatingKvCache),
}

impl<'p> Given<'p> {
    pub fn new(problem: &'p Problem) -> Self {
        let key_lengths = problem.key_lengths.as_deref().unwrap_or(&[]);
        let q = match &problem.query_places {
            QueryPlaces::Own => Cow::Borrowed(&problem.q),
            QueryPlaces::Packed { rows, q, .. } => Cow::Owned(moved(&problem.q, *q, &rows.owners())),
            QueryPlaces::Padded { rows, q } => Cow::Owned(moved(&problem.q, *q, &rows.owners(problem.dims.seq_q))),
        };
        let padding = Padding { queries: problem.query_places.padding(), keys: problem.key_places.padding() };
        Given {
            q,
            mask: problem.mask.as_ref().map(|mask| padding.of_mask(problem.dims.batch, mask)),
            bias: problem.bias.as_ref().map(|bias| padding.of_bias(problem.dims.batch, bias)),
            keys: Keys::new(problem, key_lengths),
            key_lengths,
        }
    }

    pub fn kv(&self) -> KeysValues<'_> {
        match &self.keys {
            Keys::Own([k, v]) => (k.view(), v.view()).into(),
            Keys::Padded([k, v]) => (k.view(), v.view()).into(),
            Keys::Packed([k, v], starts) => KeysValues::packed(k.view(), v.view(), *starts),
            Keys::Pages { tensors: [k, v], starts, pages, size } => {
                let table = match starts {
                    Some(starts) => PageTable::compressed(starts, pages, self.key_lengths, *size),
                    None => PageTable::new(pages, pages.len() / self.key_lengths.len(), self.key_lengths, *size),
                };
                KeysValues::paged(k.view(), v.view(), table.expect("sound lists"))
            }
            Keys::Cache(cache) => cache.into(),
            Keys::PagedCache(cache, lists) => cache.view(0, lists).expect("all are written"),
            Keys::Rotating(cache) => cache.into(),
        }
    }
}

impl<'p> Keys<'p> {
    fn new(problem: &'p Problem, lengths: &[usize]) -> Self {
        let (Dims { batch, heads_kv, seq_kv, head_dim, value_dim, .. }, own) = (problem.dims, [&problem.k, &problem.v]);
        let format = KvFormat::new(problem.k.dtype(), heads_kv, head_dim).value_dim(value_dim);
        let moved = |layouts: &[Layout; 2], owners: &[Owner]| [0, 1].map(|n| moved(own[n], layouts[n], owners));
        // Each sequence in two parts.
        let append = |append: &mut dyn FnMut(usize, [AnyTensorRef<'_>; 2])| {
            for (b, &length) in lengths.iter().enumerate() {
                for part in [0..length / 2, length / 2..length] {
                    let of = |x: &'p Tensor| x.view().narrow(0, b..b + 1).and_then(|x| x.narrow(2, part.clone()));
                    append(b, own.map(|x| of(x).expect("such tokens")));
                }
            }
        };
        match &problem.key_places {
            KeyPlaces::Own => Keys::Own(own),
            KeyPlaces::Packed { rows, layouts } => Keys::Packed(moved(layouts, &rows.owners()), &rows.starts),
            KeyPlaces::Padded { rows, layouts: Some(layouts) } => Keys::Padded(moved(layouts, &rows.owners(seq_kv))),
            KeyPlaces::Pages { size, lists, compressed, layouts } => {
                let mut owners = vec![None; layouts[0].shape[0] * size];
                for (b, &length) in lengths.iter().enumerate() {
                    (0..length).for_each(|j| owners[lists[b][j / size] as usize * size + j % size] = Some((b, j)));
                }
                let width = lists.iter().map(Vec::len).max().unwrap_or(0);
                let (mut starts, mut pages) = (vec![0], Vec::new());
                for list in lists {
                    pages.extend(list);
                    pages.extend(std::iter::repeat_n(-1, if *compressed { 0 } else { width - list.len() }));
                    starts.push(pages.len() as u64);
                }
                let starts = compressed.then_some(starts);
                Keys::Pages { tensors: moved(layouts, &owners), starts, pages, size: *size }
            }
            KeyPlaces::Cache | KeyPlaces::Padded { .. } => {
                let mut cache = KvCache::new(format, batch, seq_kv).unwrap();
                let [k, v] = nans(format, batch, seq_kv);
                cache.append(k, v).unwrap();
                for b in 0..batch {
                    cache.truncate(b, problem.key_places.padding().get(b).copied().unwrap_or(0)).unwrap();
                }
                append(&mut |b, [k, v]| cache.append_to(b, k, v).unwrap());
                Keys::Cache(cache)
            }
            KeyPlaces::PagedCache { size } => {
                let pages = 1 + lengths.iter().map(|length| length.div_ceil(*size)).sum::<usize>();
                let mut cache = PagedKvCache::new(format, 1, pages, *size).unwrap();
                let [k, v] = nans(format, 1, pages * size);
                let before = cache.new_sequence();
                cache.append(before, k, v).unwrap();
                cache.remove(before).unwrap();
                let ids: Vec<_> = lengths.iter().map(|_| cache.new_sequence()).collect();
                append(&mut |b, [k, v]| cache.append(ids[b], k, v).unwrap());
                let mut lists = PageLists::new();
                cache.list(&ids, &mut lists).unwrap();
                Keys::PagedCache(cache, lists)
            }
            KeyPlaces::Rotating { first, window } => {
                let mut cache = RotatingKvCache::new(format, batch, *first, *window).unwrap();
                let [k, v] = nans(format, batch, first + window);
                cache.append(k, v).unwrap();
                cache.clear();
                append(&mut |b, [k, v]| cache.append_to(b, k, v).unwrap());
                Keys::Rotating(cache)
            }
        }
    }
}

/// Rows of `from` in another layout, `[batch, heads, rows, dim]`, with an owner for each row of each batch index. Other rows are NaN.
fn moved(from: &Tensor, layout: Layout, owners: &[Owner]) -> Tensor {
    let rows = layout.shape[2];
    Tensor::new(from.dtype(), layout, |[n, h, r, e]| {
        owners[n * rows + r].map_or(f32::NAN, |(b, row)| from.get([b, h, row, e]))
    })
}

/// Keys and values of NaN, for what a cache holds before it is used.
fn nans(format: KvFormat, batch: usize, tokens: usize) -> [AnyTensorRef<'static>; 2] {
    [format.head_dim, format.value_dim].map(|dim| {
        let shape = [batch, format.heads_kv, tokens, dim];
        AnyTensorRef::from(TensorRef::with_strides(&[f32::NAN], 0, shape, [0; 4]).expect("one element"))
    })
}

/// The rows of left padding before the queries and keys of each sequence; empty if there are none.
struct Padding<'p> {
    queries: &'p [usize],
    keys: &'p [usize],
}

impl Padding<'_> {
    fn is_none(&self) -> bool {
        self.queries.is_empty() && self.keys.is_empty()
    }

    /// The index of an element of a mask or bias of shape `shape` without padding; `None` in the padding.
    fn own(&self, shape: [usize; 4], [b, h, i, j]: [usize; 4]) -> Option<[usize; 4]> {
        let own = |index: usize, size, firsts: &[usize]| match firsts.get(b) {
            Some(first) if size > 1 => index.checked_sub(*first),
            _ => Some(index),
        };
        Some([b, h, own(i, shape[2], self.queries)?, own(j, shape[3], self.keys)?])
    }

    /// A mask with rows and columns for the padding, whose elements have no meaning.
    fn of_mask<'m>(&self, batch: usize, mask: &'m Broadcast<Laid<bool>>) -> Cow<'m, Broadcast<Laid<bool>>> {
        if self.is_none() {
            return Cow::Borrowed(mask);
        }
        let shape = mask.tensor.layout.shape;
        let value = |index| self.own(shape, index).is_none_or(|index| mask.get(index));
        Cow::Owned(Broadcast::<Laid<bool>>::new(4, Layout::contiguous([batch, shape[1], shape[2], shape[3]]), value))
    }

    /// The same for a bias. Its padding is NaN.
    fn of_bias<'m>(&self, batch: usize, bias: &'m Broadcast<Tensor>) -> Cow<'m, Broadcast<Tensor>> {
        if self.is_none() {
            return Cow::Borrowed(bias);
        }
        let shape = bias.tensor.layout().shape;
        let value = |index| self.own(shape, index).map_or(f32::NAN, |index| bias.get(index));
        let layout = Layout::contiguous([batch, shape[1], shape[2], shape[3]]);
        Cow::Owned(Broadcast { rank: 4, tensor: Tensor::new(bias.tensor.dtype(), layout, value) })
    }
}
