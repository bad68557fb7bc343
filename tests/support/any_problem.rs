//! A problem for tests: tensors of any type in any layout, with every option, and the call that computes it.

use super::Dims;
use super::layouts::Layout;
use super::open::{OwnedMask, OwnedScoreMod};
use super::sequences::{Given, KeyPlaces, QueryPlaces};
use flashtile::{
    AlibiSlopes, AnyTensorRef, Attention, DType, Element, Form, Level, Plan, QueryOffset, TensorMut, TensorRef,
    Threads, Workspace, alibi_slope, bf16, f16, mask::mask_fn, reference,
};
use std::fmt;
use std::ops::Range;

/// Elements and where they lie.
#[derive(Clone, Debug)]
pub struct Laid<T> {
    pub data: Vec<T>,
    pub layout: Layout,
}

impl<T: Copy> Laid<T> {
    /// `gap` where no index leads.
    fn new(layout: Layout, gap: T, mut value: impl FnMut([usize; 4]) -> T) -> Self {
        let mut data = vec![gap; layout.len];
        layout.indices().for_each(|index| data[layout.at(index)] = value(index));
        Laid { data, layout }
    }

    fn view(&self) -> TensorRef<'_, T> {
        let Layout { shape, strides, offset, .. } = self.layout;
        TensorRef::with_strides(&self.data, offset, shape, strides).expect("inside the slice")
    }

    /// As a tensor of lower rank, which the last axes are.
    fn view_of_rank(&self, rank: usize) -> TensorRef<'_, T> {
        fn last<T: Copy, const N: usize>(laid: &Laid<T>) -> TensorRef<'_, T, N> {
            let Layout { shape, strides, offset, .. } = laid.layout;
            let shape = std::array::from_fn(|axis| shape[4 - N + axis]);
            let strides = std::array::from_fn(|axis| strides[4 - N + axis]);
            TensorRef::with_strides(&laid.data, offset, shape, strides).expect("inside the slice")
        }
        match rank {
            1 => last::<T, 1>(self).into(),
            2 => last::<T, 2>(self).into(),
            3 => last::<T, 3>(self).into(),
            _ => self.view(),
        }
    }
}

/// A tensor of any element type.
#[derive(Clone, Debug)]
pub enum Tensor {
    F32(Laid<f32>),
    F16(Laid<f16>),
    Bf16(Laid<bf16>),
}

/// Evaluates an expression with a name bound to what a [`Tensor`] holds.
macro_rules! with_laid {
    ($tensor:expr, $laid:ident => $value:expr) => {
        match $tensor {
            Tensor::F32($laid) => $value,
            Tensor::F16($laid) => $value,
            Tensor::Bf16($laid) => $value,
        }
    };
}

impl Tensor {
    /// Values are rounded to the type, and held within its range; the gaps are NaN.
    pub fn new(dtype: DType, layout: Layout, value: impl FnMut([usize; 4]) -> f32) -> Self {
        fn laid<T: Element>(layout: Layout, mut value: impl FnMut([usize; 4]) -> f32, largest: f32) -> Laid<T> {
            let within = move |index| match value(index) {
                x if x.is_finite() => T::from_f32(x.clamp(-largest, largest)),
                x => T::from_f32(x),
            };
            Laid::new(layout, T::from_f32(f32::NAN), within)
        }
        match dtype {
            DType::F16 => Tensor::F16(laid(layout, value, f16::MAX.to_f32())),
            DType::Bf16 => Tensor::Bf16(laid(layout, value, bf16::MAX.to_f32())),
            _ => Tensor::F32(laid(layout, value, f32::MAX)),
        }
    }

    pub fn dtype(&self) -> DType {
        fn of<T: Element>(_: &Laid<T>) -> DType {
            T::DTYPE
        }
        with_laid!(self, laid => of(laid))
    }

    pub fn layout(&self) -> Layout {
        with_laid!(self, laid => laid.layout)
    }

    pub fn view(&self) -> AnyTensorRef<'_> {
        with_laid!(self, laid => laid.view().into())
    }

    fn layout_mut(&mut self) -> &mut Layout {
        with_laid!(self, laid => &mut laid.layout)
    }

    pub fn get(&self, index: [usize; 4]) -> f32 {
        with_laid!(self, laid => laid.data[laid.layout.at(index)].to_f32())
    }

    pub fn set(&mut self, index: [usize; 4], value: f32) {
        fn set<T: Element>(laid: &mut Laid<T>, index: [usize; 4], value: f32) {
            let at = laid.layout.at(index);
            laid.data[at] = T::from_f32(value);
        }
        with_laid!(self, laid => set(laid, index, value))
    }
}

/// A mask or bias as handed in: a tensor of some rank whose axes of size 1 hold for all.
#[derive(Clone, Debug)]
pub struct Broadcast<T> {
    pub rank: usize,
    pub tensor: T,
}

fn of_one(shape: [usize; 4], index: [usize; 4]) -> [usize; 4] {
    std::array::from_fn(|axis| if shape[axis] == 1 { 0 } else { index[axis] })
}

impl Broadcast<Laid<bool>> {
    pub fn new(rank: usize, layout: Layout, value: impl FnMut([usize; 4]) -> bool) -> Self {
        Broadcast { rank, tensor: Laid::new(layout, true, value) }
    }

    pub fn get(&self, index: [usize; 4]) -> bool {
        self.tensor.data[self.tensor.layout.at(of_one(self.tensor.layout.shape, index))]
    }
}

impl Broadcast<Tensor> {
    pub fn get(&self, index: [usize; 4]) -> f32 {
        self.tensor.get(of_one(self.tensor.layout().shape, index))
    }
}

/// [`QueryOffset`] that owns its list.
#[derive(Clone, Debug, Default)]
pub enum Offset {
    #[default]
    FromEnd,
    FromStart,
    At(isize),
    PerBatch(Vec<isize>),
}

/// [`AlibiSlopes`] that owns its list.
#[derive(Clone, Debug)]
pub enum Alibi {
    Standard,
    PerHead(Vec<f32>),
    /// `[batch][heads_q]`.
    PerBatchAndHead(Vec<f32>),
}

/// Everything about a call. Printing it leaves out the elements, which come from the seed.
#[derive(Clone, Debug)]
pub struct Problem {
    pub dims: Dims,
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub out: (DType, Layout),
    pub lse: Layout<3>,
    pub scale: Option<f32>,
    pub causal: bool,
    pub window: (Option<usize>, Option<usize>),
    pub offset: Offset,
    pub key_lengths: Option<Vec<usize>>,
    pub query_lengths: Option<Vec<usize>>,
    /// Where queries lie, if not in `q`. The longest sequence has `seq_q` of them.
    pub query_places: QueryPlaces,
    /// Where keys and values lie, if not in `k` and `v`. The longest sequence has `seq_kv` of them.
    pub key_places: KeyPlaces,
    pub mask: Option<Broadcast<Laid<bool>>>,
    pub softcap: Option<f32>,
    pub bias: Option<Broadcast<Tensor>>,
    pub alibi: Option<Alibi>,
    pub masks: Vec<OwnedMask>,
    pub score_mods: Vec<OwnedScoreMod>,
    pub sinks: Option<Vec<f32>>,
    pub form: Option<Form>,
    pub threads: Threads,
}

/// Some batches, heads and queries of a problem: all heads, or some that share a key/value head.
#[derive(Clone, Debug)]
pub struct Part {
    pub batches: Range<usize>,
    pub heads: Range<usize>,
    pub queries: Range<usize>,
}

/// What a call gave, rows without gaps: `[batch, heads_q, seq_q, value_dim]` and `[batch, heads_q, seq_q]`. Rows of padding are 0.
#[derive(Debug)]
pub struct Results {
    pub out: Vec<f64>,
    pub lse: Vec<f32>,
}

impl Problem {
    /// Plain attention over contiguous f32 tensors.
    pub fn plain(dims: Dims, mut value: impl FnMut() -> f32) -> Self {
        let [q, k, v, out] = [dims.q(), dims.k(), dims.v(), dims.out()].map(Layout::contiguous);
        Problem {
            dims,
            q: Tensor::new(DType::F32, q, |_| value()),
            k: Tensor::new(DType::F32, k, |_| value()),
            v: Tensor::new(DType::F32, v, |_| value()),
            out: (DType::F32, out),
            lse: Layout::contiguous(dims.lse()),
            scale: None,
            causal: false,
            window: (None, None),
            offset: Offset::FromEnd,
            key_lengths: None,
            query_lengths: None,
            query_places: QueryPlaces::Own,
            key_places: KeyPlaces::Own,
            mask: None,
            softcap: None,
            bias: None,
            alibi: None,
            masks: Vec::new(),
            score_mods: Vec::new(),
            sinks: None,
            form: None,
            threads: Threads::Serial,
        }
    }

    /// The problem of a part alone: queries at the same positions, over the problem's own tensors.
    pub fn part(&self, part: &Part) -> Problem {
        let (Part { batches, heads, queries }, dims, mut own) = (part, self.dims, self.clone());
        let group = dims.heads_q / dims.heads_kv;
        let heads_kv = heads.start / group..heads.end.div_ceil(group);
        assert!(*heads == (0..dims.heads_q) || heads_kv.len() == 1);
        own.dims =
            Dims { batch: batches.len(), heads_q: heads.len(), heads_kv: heads_kv.len(), seq_q: queries.len(), ..dims };
        let all_keys = 0..dims.seq_kv;
        own.q.layout_mut().cut([batches, heads, queries]);
        own.k.layout_mut().cut([batches, &heads_kv, &all_keys]);
        own.v.layout_mut().cut([batches, &heads_kv, &all_keys]);
        if let Some(mask) = &mut own.mask {
            mask.tensor.layout.cut([batches, heads, queries]);
        }
        if let Some(bias) = &mut own.bias {
            bias.tensor.layout_mut().cut([batches, heads, queries]);
        }
        own.offset = Offset::PerBatch(batches.clone().map(|b| self.offset_of(b) + queries.start as isize).collect());
        own.key_lengths = self.key_lengths.as_ref().map(|lengths| lengths[batches.clone()].to_vec());
        own.query_lengths = self.query_lengths.as_ref().map(|lengths| {
            let lengths = lengths[batches.clone()].iter();
            lengths.map(|length| length.clamp(&queries.start, &queries.end) - queries.start).collect()
        });
        (own.query_places, own.key_places) = (QueryPlaces::Own, KeyPlaces::Own);
        own.alibi = self.alibi.as_ref().map(|alibi| match alibi {
            Alibi::Standard => Alibi::PerHead(heads.clone().map(|h| alibi_slope(h, dims.heads_q)).collect()),
            Alibi::PerHead(slopes) => Alibi::PerHead(slopes[heads.clone()].to_vec()),
            Alibi::PerBatchAndHead(slopes) => {
                let of = |b| &slopes[b * dims.heads_q..][heads.clone()];
                Alibi::PerBatchAndHead(batches.clone().flat_map(of).copied().collect())
            }
        });
        let first = [batches.start, heads.start, queries.start];
        own.masks = self.masks.iter().map(|mask| mask.part(first)).collect();
        own.score_mods = self.score_mods.iter().map(|score_mod| score_mod.part(first[1])).collect();
        if let KeyPlaces::Rotating { .. } = self.key_places {
            let lost: Vec<_> = batches.clone().map(|b| self.lost(b)).collect();
            own.masks.push(OwnedMask::new("held", mask_fn(move |pair| !lost[pair.batch()].contains(&pair.key()))));
        }
        own.sinks = self.sinks.as_ref().map(|sinks| sinks[heads.clone()].to_vec());
        own.out.1 = Layout::contiguous(own.dims.out());
        own.lse = Layout::contiguous(own.dims.lse());
        own
    }

    /// The number of queries of sequence `b`.
    pub fn queries_of(&self, b: usize) -> usize {
        self.query_lengths.as_ref().map_or(self.dims.seq_q, |lengths| lengths[b])
    }

    /// The number of keys of sequence `b`.
    pub fn keys_of(&self, b: usize) -> usize {
        self.key_lengths.as_ref().map_or(self.dims.seq_kv, |lengths| lengths[b])
    }

    /// The keys of sequence `b` that a cache has lost.
    pub fn lost(&self, b: usize) -> Range<usize> {
        self.key_places.lost(self.keys_of(b))
    }

    /// The position of query 0.
    pub fn offset_of(&self, b: usize) -> isize {
        match &self.offset {
            Offset::FromEnd => self.keys_of(b) as isize - self.queries_of(b) as isize,
            Offset::FromStart => 0,
            Offset::At(offset) => *offset,
            Offset::PerBatch(offsets) => offsets[b],
        }
    }

    /// The options, for what a call is given.
    fn attention<'a>(&'a self, given: &'a Given<'_>) -> Attention<'a> {
        let mut attention = Attention::new().window(self.window.0, self.window.1).threads(self.threads);
        attention = attention.query_offset(match &self.offset {
            Offset::FromEnd => QueryOffset::FromEnd,
            Offset::FromStart => QueryOffset::FromStart,
            Offset::At(offset) => QueryOffset::At(*offset),
            Offset::PerBatch(offsets) => QueryOffset::per_batch(offsets),
        });
        if self.causal {
            attention = attention.causal();
        }
        if let Some(scale) = self.scale {
            attention = attention.scale(scale);
        }
        match (&self.key_places, &self.key_lengths) {
            (KeyPlaces::Own, Some(lengths)) => attention = attention.key_lengths(lengths),
            (KeyPlaces::Padded { rows, layouts: Some(_) }, _) => {
                attention = attention.first_keys(&rows.firsts).key_lengths(&rows.ends);
            }
            (KeyPlaces::Padded { rows, layouts: None }, _) => attention = attention.first_keys(&rows.firsts),
            _ => {}
        }
        match (&self.query_places, &self.query_lengths) {
            (QueryPlaces::Own, Some(lengths)) => attention = attention.query_lengths(lengths),
            (QueryPlaces::Own, None) => {}
            (QueryPlaces::Packed { rows, .. }, _) => attention = attention.query_starts(&rows.starts),
            (QueryPlaces::Padded { rows, .. }, _) => {
                attention = attention.first_queries(&rows.firsts).query_lengths(&rows.ends);
            }
        }
        if let Some(Broadcast { rank, tensor }) = given.mask.as_deref() {
            attention = attention.mask(tensor.view_of_rank(*rank));
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if let Some(Broadcast { rank, tensor }) = given.bias.as_deref() {
            attention = with_laid!(tensor, laid => attention.bias(laid.view_of_rank(*rank)));
        }
        match &self.alibi {
            Some(Alibi::Standard) => attention = attention.alibi(AlibiSlopes::Standard),
            Some(Alibi::PerHead(slopes)) => attention = attention.alibi(AlibiSlopes::PerHead(slopes)),
            Some(Alibi::PerBatchAndHead(slopes)) => attention = attention.alibi(AlibiSlopes::PerBatchAndHead(slopes)),
            None => {}
        }
        for mask in &self.masks {
            attention = attention.masked_by(mask);
        }
        for score_mod in &self.score_mods {
            attention = attention.modified_by(score_mod);
        }
        if let Some(sinks) = &self.sinks {
            attention = attention.sinks(sinks);
        }
        match self.form {
            Some(form) => attention.form(form),
            None => attention,
        }
    }

    pub fn plan(&self, level: Level) -> Plan {
        let given = Given::new(self);
        self.attention(&given).level(level).plan(given.q.view(), given.kv()).expect("a sound problem")
    }

    /// The public reference's answer, `[batch, heads_q, seq_q, value_dim]` and `[batch, heads_q, seq_q]`. It is 0 for queries of no
    /// sequence.
    pub fn reference(&self) -> (Vec<f64>, Vec<f64>) {
        let given = Given::new(self);
        let exact = reference::attention(&self.attention(&given), given.q.view(), given.kv()).expect("a sound problem");
        let [_, heads, rows, dim] = exact.shape;
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for index in self.rows() {
            match self.place(index).map(|[b, h, i]| (b * heads + h) * rows + i) {
                Some(row) => {
                    out.extend(&exact.out[row * dim..][..dim]);
                    lse.push(exact.lse[row]);
                }
                None => {
                    out.extend(std::iter::repeat_n(0.0, dim));
                    lse.push(0.0);
                }
            }
        }
        (out, lse)
    }

    /// Every batch, head and query, padding included.
    fn rows(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        Layout::contiguous(self.dims.lse()).indices()
    }

    /// Where the row of a query is in the output; `None` for padding.
    fn place(&self, [b, h, i]: [usize; 3]) -> Option<[usize; 3]> {
        (i < self.queries_of(b)).then(|| match &self.query_places {
            QueryPlaces::Own => [b, h, i],
            QueryPlaces::Packed { rows, .. } => [0, h, rows.starts[b] as usize + i],
            QueryPlaces::Padded { rows, .. } => [b, h, rows.firsts[b] + i],
        })
    }

    /// The public reference's sums of each key's probabilities, as [`Problem::key_sums`] gives them.
    pub fn reference_key_sums(&self) -> Vec<f64> {
        let given = Given::new(self);
        let exact = reference::key_sums(&self.attention(&given), given.q.view(), given.kv()).expect("a sound problem");
        let Dims { batch, heads_q, seq_kv, .. } = self.dims;
        let layout = Layout::contiguous([batch, heads_q, seq_kv]);
        layout.indices().map(|index| exact[layout.at(self.sum_place(index))]).collect()
    }

    /// Where the sum of a key is. The padding before a sequence's keys comes after that behind them.
    fn sum_place(&self, [b, h, j]: [usize; 3]) -> [usize; 3] {
        let first = self.key_places.padding().get(b).copied().unwrap_or(0);
        [b, h, (first + j) % self.dims.seq_kv]
    }

    /// The sums of each key's probabilities, `[batch, heads_q, seq_kv]`, those of padding last, computed in a tensor of layout `to`.
    /// Checks that nothing but them was written.
    pub fn key_sums(&self, level: Level, lse: &[f32], to: Layout<3>) -> Vec<f32> {
        const CANARY: f32 = 31.25;
        let (_, from) = self.output_layouts();
        // Log-sum-exps of no query are not read.
        let (mut lse_data, mut sums) = (vec![f32::NAN; from.len], vec![CANARY; to.len]);
        for (place, lse) in self.rows().map(|index| self.place(index)).zip(lse) {
            place.into_iter().for_each(|place| lse_data[from.at(place)] = *lse);
        }
        let lse = TensorRef::with_strides(&lse_data, from.offset, from.shape, from.strides);
        let into = TensorMut::with_strides(&mut sums, to.offset, to.shape, to.strides);
        let (lse, into) = (lse.expect("inside the slice"), into.expect("apart"));
        let given = Given::new(self);
        let attention = self.attention(&given).level(level);
        let done = attention.key_sums(given.q.view(), given.kv(), lse, into, &mut Workspace::new());
        done.expect("a sound problem");
        let results = to.indices().map(|index| sums[to.at(self.sum_place(index))]).collect();
        to.indices().for_each(|index| sums[to.at(index)] = CANARY);
        assert!(sums.iter().all(|&x| x == CANARY), "a gap of the sums was written");
        results
    }

    /// Computes it; checks that nothing but the elements of the results was written.
    pub fn run(&self, level: Level) -> Results {
        match self.out.0 {
            DType::F16 => self.run_into::<f16>(level),
            DType::Bf16 => self.run_into::<bf16>(level),
            _ => self.run_into::<f32>(level),
        }
    }

    /// Of the output and the log-sum-exps that a call gets.
    fn output_layouts(&self) -> (Layout, Layout<3>) {
        match &self.query_places {
            QueryPlaces::Packed { out, lse, .. } => (*out, *lse),
            QueryPlaces::Own | QueryPlaces::Padded { .. } => (self.out.1, self.lse),
        }
    }

    fn run_into<O: Element>(&self, level: Level) -> Results {
        const CANARY: f32 = 31.25;
        let (out_layout, lse_layout) = self.output_layouts();
        let mut out = vec![O::from_f32(CANARY); out_layout.len];
        let mut lse = vec![CANARY; lse_layout.len];
        let given = Given::new(self);
        let attention = self.attention(&given).level(level);
        let into = TensorMut::with_strides(&mut out, out_layout.offset, out_layout.shape, out_layout.strides);
        let lse_into = TensorMut::with_strides(&mut lse, lse_layout.offset, lse_layout.shape, lse_layout.strides);
        let (into, lse_into) = (into.expect("apart"), lse_into.expect("apart"));
        let done = attention.compute(given.q.view(), given.kv(), into, lse_into, &mut Workspace::new());
        done.expect("a sound problem");
        let mut results = Results { out: Vec::new(), lse: Vec::new() };
        for index in self.rows() {
            let place = self.place(index);
            for d in 0..self.dims.value_dim {
                let element = place.map(|[b, h, i]| &mut out[out_layout.at([b, h, i, d])]);
                let taken = element.map(|x| std::mem::replace(x, O::from_f32(CANARY)));
                results.out.push(taken.map_or(0.0, |x| x.to_f32() as f64));
            }
            let taken = place.map(|place| std::mem::replace(&mut lse[lse_layout.at(place)], CANARY));
            results.lse.push(taken.unwrap_or(0.0));
        }
        assert!(out.iter().all(|x| x.to_f32() == CANARY), "a gap of the output or a row of no query was written");
        assert!(lse.iter().all(|&x| x == CANARY), "a gap of the log-sum-exps or a row of no query was written");
        results
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tensor = |tensor: &Tensor| (tensor.dtype(), tensor.layout());
        let Problem { scale, causal, window, offset, key_lengths, softcap, alibi, form, threads, .. } = self;
        writeln!(f, "q    {:?}", tensor(&self.q))?;
        writeln!(f, "k    {:?}", tensor(&self.k))?;
        writeln!(f, "v    {:?}", tensor(&self.v))?;
        writeln!(f, "out  {:?}", self.out)?;
        writeln!(f, "lse  {:?}", self.lse)?;
        if let Some(mask) = &self.mask {
            writeln!(f, "mask of rank {}: {:?}", mask.rank, mask.tensor.layout)?;
        }
        if let Some(bias) = &self.bias {
            writeln!(f, "bias of rank {}: {:?}", bias.rank, tensor(&bias.tensor))?;
        }
        writeln!(f, "scale {scale:?}, causal {causal}, window {window:?}, offset {offset:?}, lengths {key_lengths:?}")?;
        let Problem { masks, score_mods, sinks, query_lengths, query_places, key_places, .. } = self;
        writeln!(f, "query lengths {query_lengths:?}, queries {query_places:?}, keys {key_places:?}")?;
        writeln!(f, "masks {masks:?}, score modifications {score_mods:?}, sinks {sinks:?}")?;
        writeln!(f, "softcap {softcap:?}, alibi {alibi:?}, form {form:?}, threads {threads:?}")?;
        Level::available().try_for_each(|level| writeln!(f, "{}", self.plan(level)))
    }
}
