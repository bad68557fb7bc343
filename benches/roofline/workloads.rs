//! The table of workloads and their targets.

use crate::support::Dims;
use flashtile::DType::{self, Bf16, F16, F32};

/// One line of the table for each of its types.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) task: Task,
    /// Of queries, keys, values and output.
    pub(crate) types: &'static [DType],
    pub(crate) reach: Reach,
}

#[derive(Clone, Copy)]
pub(crate) enum Task {
    Attention(Dims, Options),
    /// Of a matrix along one of its axes.
    Softmax(SoftmaxTask),
}

#[derive(Clone, Copy)]
pub(crate) struct SoftmaxTask {
    pub(crate) shape: [usize; 2],
    pub(crate) axis: usize,
    pub(crate) way: Way,
    /// Whether the elements are f64. The line's type is f32 then, because `DType` has no f64.
    pub(crate) double: bool,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Way {
    Into,
    InPlace,
    /// In place, along axis 1 of a transposed view. `axis` is that of the memory, 0.
    Transposed,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Options {
    Plain,
    Causal,
    /// Causal, with this many keys before the query's own.
    Window(usize),
    /// A dense random boolean mask for all heads, an eighth of it false.
    Mask,
    /// An additive bias, another for each head.
    Bias,
    Softcap,
    Alibi,
}

/// The target of a line.
#[derive(Clone, Copy)]
pub(crate) enum Reach {
    /// This fraction of the binding roof.
    Fraction(f64),
    /// This fraction of the binding roof in f32. In other types at most [`HALVES_TIME`] times f32's time.
    OfF32(f64),
    /// This part of the fraction that another workload reaches in the same type.
    FractionOf(&'static str, f64),
    /// At most this multiple of the time of another workload in the same type.
    TimeOf(&'static str, f64),
    /// In f32 as [`BelowPeers`](Reach::BelowPeers). In other types at most this multiple of f32's time.
    BelowPeersAndOfF32(f64),
    /// At most this time of an element of softmax, in nanoseconds.
    Nanoseconds(f64),
    /// Less time than any peer takes, as `benches/peers` measures. A call of microseconds is bound by neither roof.
    BelowPeers,
}

pub(crate) const HALVES_TIME: f64 = 1.03;
/// The shape of most lines of softmax.
const SQUARE: [usize; 2] = [4096; 2];
/// Elements of short rows, in no cache and in the second cache.
const SHORT_LARGE: usize = 10 << 20;
const SHORT_SMALL: usize = 1 << 14;
pub(crate) const SOFTCAP: f32 = 30.0;

const ALL: &[DType] = &[F32, F16, Bf16];
const ENDS: &[DType] = &[F32, Bf16];

/// Query heads in groups that share a key/value head.
const fn grouped(heads_q: usize, heads_kv: usize, seq_q: usize, seq_kv: usize, dim: usize) -> Dims {
    let mut dims = Dims::new(heads_q, seq_q, seq_kv, dim);
    dims.heads_kv = heads_kv;
    dims
}

const fn batch(batch: usize, mut dims: Dims) -> Dims {
    dims.batch = batch;
    dims
}

const fn attention(
    name: &'static str,
    dims: Dims,
    options: Options,
    types: &'static [DType],
    reach: Reach,
) -> Workload {
    Workload { name, task: Task::Attention(dims, options), types, reach }
}

const fn softmax(
    name: &'static str,
    shape: [usize; 2],
    axis: usize,
    way: Way,
    types: &'static [DType],
    reach: Reach,
) -> Workload {
    Workload { name, task: Task::Softmax(SoftmaxTask { shape, axis, way, double: false }), types, reach }
}

/// Rows of a model's vocabulary, as many as 64 MiB of f32 have.
const fn vocabulary(name: &'static str, len: usize) -> Workload {
    softmax(name, [(1 << 24) / len, len], 1, Way::Into, ENDS, Reach::Fraction(0.80))
}

/// Short rows, as many as 40 MB of f32 have, or as many as the second cache holds.
const fn short(name: &'static str, elements: usize, len: usize) -> Workload {
    softmax(name, [elements / len, len], 1, Way::Into, ALL, Reach::BelowPeersAndOfF32(1.15))
}

const fn double(name: &'static str, axis: usize) -> Workload {
    let task = SoftmaxTask { shape: [1000, 1000], axis, way: Way::Into, double: true };
    Workload { name, task: Task::Softmax(task), types: &[F32], reach: Reach::Nanoseconds(3.0) }
}

/// Workloads of a group take turns, each in all its types. A group holds the workloads that are compared with each other.
pub(crate) const GROUPS: &[&[Workload]] = {
    use Options::{Alibi, Bias, Causal, Mask, Plain, Softcap, Window};
    use Reach::{BelowPeers, Fraction, FractionOf, OfF32, TimeOf};
    use Way::{InPlace, Into, Transposed};
    const D64: Dims = Dims::new(8, 2048, 2048, 64);
    const D128: Dims = Dims::new(8, 2048, 2048, 128);
    &[
        &[
            attention("prefill_d64", D64, Plain, ALL, OfF32(0.85)),
            attention("causal_d64", D64, Causal, ENDS, FractionOf("prefill_d64", 0.93)),
            attention("mask_bool", D64, Mask, &[F32], TimeOf("prefill_d64", 1.15)),
            attention("mask_bias", D64, Bias, &[F32], TimeOf("prefill_d64", 1.25)),
            attention("mask_softcap", D64, Softcap, &[F32], TimeOf("prefill_d64", 1.30)),
            attention("mask_alibi", D64, Alibi, &[F32], TimeOf("prefill_d64", 1.10)),
        ],
        &[
            attention("prefill_d128", D128, Plain, ALL, OfF32(0.90)),
            attention("causal_d128", D128, Causal, ENDS, FractionOf("prefill_d128", 0.93)),
        ],
        &[attention("prefill_d256", Dims::new(8, 1024, 1024, 256), Plain, ALL, OfF32(0.91))],
        &[attention("causal_short", Dims::new(8, 512, 512, 64), Causal, &[F32], Fraction(0.75))],
        &[attention("window", Dims::new(8, 8192, 8192, 64), Window(511), &[F32], Fraction(0.78))],
        &[attention("bert", batch(32, Dims::new(12, 128, 128, 64)), Plain, ENDS, Fraction(0.78))],
        &[attention("vit", batch(8, Dims::new(12, 197, 197, 64)), Plain, &[F32], Fraction(0.75))],
        &[attention("odd", Dims::new(5, 1000, 1037, 80), Causal, &[F16], Fraction(0.75))],
        &[attention("chunk", grouped(32, 8, 256, 8192, 128), Causal, &[Bf16], Fraction(0.85))],
        &[attention("speculate_4", grouped(32, 8, 4, 8192, 128), Plain, &[F16], Fraction(0.75))],
        &[attention("speculate_8", grouped(32, 8, 8, 8192, 128), Plain, &[F16], Fraction(0.75))],
        &[attention("speculate_16", grouped(32, 8, 16, 8192, 128), Plain, &[F16], Fraction(0.75))],
        &[attention("decode", grouped(32, 8, 1, 8192, 128), Plain, ALL, Fraction(0.85))],
        &[attention("decode_mha", grouped(32, 32, 1, 4096, 128), Plain, &[F16], Fraction(0.85))],
        &[attention("decode_batch", batch(16, grouped(32, 8, 1, 1024, 128)), Plain, &[F16], Fraction(0.85))],
        &[attention("decode_short", grouped(9, 3, 1, 256, 64), Plain, &[F32], BelowPeers)],
        &[softmax("softmax_last", SQUARE, 1, Into, ENDS, Fraction(0.80))],
        &[softmax("softmax_last_in_place", SQUARE, 1, InPlace, ENDS, Fraction(0.80))],
        &[softmax("softmax_first", SQUARE, 0, Into, &[F32], Fraction(0.70))],
        &[softmax("softmax_first", SQUARE, 0, Into, &[Bf16], Fraction(0.55))],
        &[
            softmax("softmax_first_in_place", SQUARE, 0, InPlace, ENDS, Fraction(0.80)),
            softmax("softmax_transposed", SQUARE, 0, Transposed, ENDS, TimeOf("softmax_first_in_place", 1.30)),
        ],
        &[vocabulary("softmax_vocab_32768", 32_768)],
        &[vocabulary("softmax_vocab_50257", 50_257)],
        &[vocabulary("softmax_vocab_128256", 128_256)],
        &[short("softmax_short_2", SHORT_LARGE, 2)],
        &[short("softmax_short_10", SHORT_LARGE, 10)],
        &[short("softmax_short_48", SHORT_LARGE, 48)],
        &[short("softmax_short_100", SHORT_LARGE, 100)],
        &[short("softmax_small_2", SHORT_SMALL, 2)],
        &[short("softmax_small_10", SHORT_SMALL, 10)],
        &[short("softmax_small_48", SHORT_SMALL, 48)],
        &[short("softmax_small_100", SHORT_SMALL, 100)],
        &[double("softmax_f64", 1)],
        &[double("softmax_f64_first", 0)],
    ]
};

impl Workload {
    /// Whether several threads are compared with one.
    pub(crate) fn scales(&self) -> bool {
        ["prefill", "decode"].iter().any(|start| self.name.starts_with(start))
    }

    /// The name of its type in the table.
    pub(crate) fn type_name(&self, dtype: DType) -> String {
        match self.task {
            Task::Softmax(SoftmaxTask { double: true, .. }) => "f64".into(),
            _ => dtype.to_string(),
        }
    }

    /// Elements of a softmax; 0 for attention.
    pub(crate) fn softmax_elements(&self) -> usize {
        match self.task {
            Task::Softmax(SoftmaxTask { shape: [rows, len], .. }) => rows * len,
            Task::Attention(..) => 0,
        }
    }

    /// The line that the one of type `dtype` is judged by, if there is one.
    pub(crate) fn judged_by(&self, dtype: DType) -> Option<(&'static str, DType)> {
        match self.reach {
            Reach::OfF32(_) | Reach::BelowPeersAndOfF32(_) if dtype != F32 => Some((self.name, F32)),
            Reach::Fraction(_) | Reach::OfF32(_) | Reach::BelowPeers => None,
            Reach::BelowPeersAndOfF32(_) | Reach::Nanoseconds(_) => None,
            Reach::FractionOf(other, _) | Reach::TimeOf(other, _) => Some((other, dtype)),
        }
    }
}
