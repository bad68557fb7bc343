//! The table of workloads and their targets.

use crate::open_sets::Open;
use crate::serving::Serving;
use crate::support::{Dims, Layout};
use flashtile::DType::{self, Bf16, F16, F32};
use flashtile::Level;

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
    Serving(Serving),
    /// Attention and the sums of each key's probabilities, without or with causal order.
    KeySums(Dims, bool),
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
    /// With a boolean mask of the same shape, an eighth of it false.
    Masked,
    /// The mean loss of a target for each line, without an output.
    CrossEntropy,
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
    /// Mask and bias stored with the queries as the last axis.
    MaskTransposed,
    BiasTransposed,
    /// A mask or score modification of the open sets.
    Open(Open),
    /// At a level, not at the best one.
    At(Level),
    /// With keys and values in a layout.
    In(Layout),
    /// With a denormal element in every n-th query row.
    Denormals(usize),
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
    /// In other types at most this multiple of f32's time.
    TimeOfF32(f64),
    /// None: others are held against it.
    Judge,
    /// In f32 as [`BelowPeers`](Reach::BelowPeers). In other types at most this multiple of f32's time.
    BelowPeersAndOfF32(f64),
    /// At most this time of an element of softmax, in nanoseconds.
    Nanoseconds(f64),
    /// At most this time of a call.
    Microseconds(f64),
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

/// A decoding step of eight heads at level AVX2.
const fn avx2_decode(name: &'static str, dim: usize, reach: Reach) -> Workload {
    attention(name, Dims::new(8, 1, 4096, dim), Options::At(Level::Avx2), ALL, reach)
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

const fn serving(name: &'static str, serving: Serving, types: &'static [DType], reach: Reach) -> Workload {
    Workload { name, task: Task::Serving(serving), types, reach }
}

const fn key_sums(name: &'static str, dims: Dims, causal: bool, types: &'static [DType], reach: Reach) -> Workload {
    Workload { name, task: Task::KeySums(dims, causal), types, reach }
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

/// Rows of a model's vocabulary: 2^24 elements in all.
const fn vocabulary(name: &'static str, len: usize) -> Workload {
    softmax(name, [(1 << 24) / len, len], 1, Way::Into, ENDS, Reach::Fraction(0.80))
}

/// Short rows of `len` elements, `elements` in all.
const fn short(name: &'static str, elements: usize, len: usize) -> Workload {
    softmax(name, [elements / len, len], 1, Way::Into, ALL, Reach::BelowPeersAndOfF32(1.15))
}

const fn double(name: &'static str, axis: usize) -> Workload {
    let task = SoftmaxTask { shape: [1000, 1000], axis, way: Way::Into, double: true };
    Workload { name, task: Task::Softmax(task), types: &[F32], reach: Reach::Nanoseconds(3.0) }
}

/// A batch of encoders of `seq` tokens, 4096 tokens together.
const fn encoders(seq: usize, dim: usize) -> Dims {
    batch(4096 / seq, Dims::new(12, seq, seq, dim))
}

/// Workloads of a group take turns, each in all its types. A group holds the workloads that are compared with each other.
pub(crate) const GROUPS: &[&[Workload]] = {
    use Layout::{Bshd, Padded};
    use Options::{
        Alibi, At, Bias, BiasTransposed, Causal, Denormals, In, Mask, MaskTransposed, Plain, Softcap, Window,
    };
    use Reach::{BelowPeers, Fraction, FractionOf, Judge, OfF32, TimeOf, TimeOfF32};
    use Way::{CrossEntropy, InPlace, Into, Masked, Transposed};
    const D64: Dims = Dims::new(8, 2048, 2048, 64);
    const D128: Dims = Dims::new(8, 2048, 2048, 128);
    const DECODE: Dims = grouped(32, 8, 1, 8192, 128);
    const DECODE_MHA: Dims = grouped(32, 32, 1, 4096, 128);
    &[
        &[
            attention("prefill_d64", D64, Plain, ALL, OfF32(0.85)),
            attention("causal_d64", D64, Causal, ENDS, FractionOf("prefill_d64", 0.93)),
            attention("mask_bool", D64, Mask, &[F32], TimeOf("prefill_d64", 1.15)),
            attention("mask_bias", D64, Bias, &[F32], TimeOf("prefill_d64", 1.25)),
            attention("mask_softcap", D64, Softcap, &[F32], TimeOf("prefill_d64", 1.30)),
            attention("mask_alibi", D64, Alibi, &[F32], TimeOf("prefill_d64", 1.10)),
            attention("mask_transposed", D64, MaskTransposed, &[F32], TimeOf("prefill_d64", 1.30)),
            attention("bias_transposed", D64, BiasTransposed, &[F32], TimeOf("prefill_d64", 1.50)),
            attention("document", D64, Options::Open(Open::Document), &[F32], TimeOf("prefill_d64", 0.085)),
            attention(
                "document_uneven",
                D64,
                Options::Open(Open::DocumentUneven),
                &[F32],
                FractionOf("prefill_d64", 0.75),
            ),
            attention("mask_fn", D64, Options::Open(Open::DocumentFn), &[F32], TimeOf("document", 1.15)),
            attention("prefix", D64, Options::Open(Open::Prefix), &[F32], FractionOf("causal_d64", 0.90)),
            attention("score_fn_alibi", D64, Options::Open(Open::AlibiFn), &[F32], TimeOf("mask_alibi", 1.10)),
            attention("score_fn_softcap", D64, Options::Open(Open::SoftcapFn), &[F32], TimeOf("mask_softcap", 1.10)),
            attention("score_table", D64, Options::Open(Open::Table), &[F32], TimeOf("prefill_d64", 1.25)),
            key_sums("key_sums_d64", D64, false, ENDS, TimeOf("prefill_d64", 1.6)),
            key_sums("key_sums_causal_d64", D64, true, &[F32], TimeOf("causal_d64", 1.6)),
            attention("sinks", D64, Options::Open(Open::Sinks), &[F32], TimeOf("prefill_d64", 1.02)),
        ],
        &[
            attention("full_8192", Dims::new(1, 8192, 8192, 64), Plain, &[F32], Judge),
            attention(
                "block_sparse",
                Dims::new(1, 8192, 8192, 64),
                Options::Open(Open::BlockSparse),
                &[F32],
                TimeOf("full_8192", 0.13),
            ),
        ],
        &[
            attention("prefill_d128", D128, Plain, ALL, OfF32(0.90)),
            attention("causal_d128", D128, Causal, ENDS, FractionOf("prefill_d128", 0.93)),
        ],
        &[attention("prefill_d256", Dims::new(8, 1024, 1024, 256), Plain, ALL, OfF32(0.91))],
        &[attention("causal_short", Dims::new(8, 512, 512, 64), Causal, &[F32], Fraction(0.75))],
        &[
            attention("window", Dims::new(8, 8192, 8192, 64), Window(511), &[F32], Fraction(0.78)),
            attention(
                "sink_window",
                Dims::new(8, 8192, 8192, 64),
                Options::Open(Open::SinkWindow),
                &[F32],
                TimeOf("window", 1.08),
            ),
        ],
        &[attention("bert", batch(32, Dims::new(12, 128, 128, 64)), Plain, ENDS, Fraction(0.78))],
        &[attention("vit", batch(8, Dims::new(12, 197, 197, 64)), Plain, &[F32], Fraction(0.75))],
        // Short sequences: sentence embedders, windows of an image. The fractions are those of Zen 5 at 1.15 to 2.5 times the speed
        // of the first version.
        &[attention("tiny_4", encoders(4, 64), Plain, &[F32], Fraction(0.36))],
        &[attention("tiny_8", encoders(8, 64), Plain, &[F32], Fraction(0.29))],
        &[attention("tiny_12", encoders(12, 64), Plain, &[F32], Fraction(0.36))],
        &[attention("tiny_16", encoders(16, 64), Plain, &[F32], Fraction(0.43))],
        &[attention("tiny_24", encoders(24, 64), Plain, &[F32], Fraction(0.39))],
        &[attention("tiny_32", encoders(32, 64), Plain, &[F32], Fraction(0.55))],
        &[attention("tiny_33", encoders(33, 64), Plain, &[F32], Fraction(0.47))],
        &[attention("tiny_48", encoders(48, 64), Plain, &[F32], Fraction(0.61))],
        &[attention("tiny_4_d32", encoders(4, 32), Plain, &[F32], BelowPeers)],
        &[attention("tiny_8_d32", encoders(8, 32), Plain, &[F32], BelowPeers)],
        &[attention("tiny_12_d32", encoders(12, 32), Plain, &[F32], BelowPeers)],
        &[attention("tiny_16_d32", encoders(16, 32), Plain, &[F32], BelowPeers)],
        &[attention("tiny_24_d32", encoders(24, 32), Plain, &[F32], BelowPeers)],
        &[attention("tiny_32_d32", encoders(32, 32), Plain, &[F32], BelowPeers)],
        &[attention("tiny_33_d32", encoders(33, 32), Plain, &[F32], BelowPeers)],
        &[attention("tiny_48_d32", encoders(48, 32), Plain, &[F32], BelowPeers)],
        &[attention("causal_128", encoders(128, 64), Causal, &[F32], Fraction(0.63))],
        &[attention("causal_197", encoders(197, 64), Causal, &[F32], Fraction(0.63))],
        // One row more than whole vectors.
        &[
            attention("step_32", Dims::new(12, 32, 1024, 64), Plain, &[F32], Judge),
            attention("step_33", Dims::new(12, 33, 1024, 64), Plain, &[F32], TimeOf("step_32", 1.30)),
        ],
        &[
            attention("step_16", Dims::new(12, 16, 1024, 32), Plain, &[F32], Judge),
            attention("step_17", Dims::new(12, 17, 1024, 32), Plain, &[F32], TimeOf("step_16", 1.30)),
        ],
        &[attention("odd", Dims::new(5, 1000, 1037, 80), Causal, &[F16], Fraction(0.75))],
        &[attention("chunk", grouped(32, 8, 256, 8192, 128), Causal, &[Bf16], Fraction(0.85))],
        &[attention("speculate_4", grouped(32, 8, 4, 8192, 128), Plain, &[F16], Fraction(0.75))],
        &[attention("speculate_8", grouped(32, 8, 8, 8192, 128), Plain, &[F16], Fraction(0.75))],
        &[attention("speculate_16", grouped(32, 8, 16, 8192, 128), Plain, &[F16], Fraction(0.75))],
        &[
            attention("drafts_64", grouped(32, 8, 64, 8192, 128), Plain, &[F16], Judge),
            attention(
                "tree_64",
                grouped(32, 8, 64, 8192, 128),
                Options::Open(Open::Tree),
                &[F16],
                TimeOf("drafts_64", 1.05),
            ),
        ],
        &[
            attention("decode", DECODE, Plain, ALL, Fraction(0.85)),
            key_sums("key_sums_decode", DECODE, false, ALL, TimeOf("decode", 1.6)),
            attention("decode_bshd", DECODE, In(Bshd), ALL, TimeOf("decode", 1.15)),
            attention("decode_padded", DECODE, In(Padded), ALL, TimeOf("decode", 1.15)),
            attention("decode_transposed", DECODE, In(Layout::Transposed), ALL, TimeOf("decode", 3.0)),
            attention("decode_hidden", DECODE, Options::Open(Open::FewKeys), &[F16], TimeOf("decode", 0.25)),
            attention("decode_hidden_fn", DECODE, Options::Open(Open::FewKeysFn), &[F16], TimeOf("decode", 0.15)),
        ],
        &[
            attention("decode_mha8", grouped(8, 8, 1, 8192, 128), Plain, &[F16], Judge),
            attention(
                "sinks_decode",
                grouped(8, 8, 1, 8192, 128),
                Options::Open(Open::Sinks),
                &[F16],
                TimeOf("decode_mha8", 1.02),
            ),
        ],
        &[
            attention("decode_mha", DECODE_MHA, Plain, &[F16], Fraction(0.85)),
            attention("decode_mha_bshd", DECODE_MHA, In(Bshd), &[F16], TimeOf("decode_mha", 1.15)),
            attention("decode_mha_padded", DECODE_MHA, In(Padded), &[F16], TimeOf("decode_mha", 1.15)),
        ],
        &[attention("decode_batch", batch(16, grouped(32, 8, 1, 1024, 128)), Plain, &[F16], Fraction(0.85))],
        &[attention("decode_short", grouped(9, 3, 1, 256, 64), Plain, &[F32], BelowPeers)],
        // Where pairs of bf16 can't represent queries, or rows have an odd length: held against multiply-adds of f32.
        &[
            attention("bf16_as_f32", D64, At(Level::Avx512), &[Bf16], Judge),
            attention("bf16_denormals", D64, Denormals(1), &[Bf16], TimeOf("bf16_as_f32", 1.10)),
            attention("bf16_denormals_10th", D64, Denormals(10), &[Bf16], TimeOf("bf16_as_f32", 1.10)),
        ],
        &[
            attention("decode_as_f32", DECODE, At(Level::Avx512), &[Bf16], Judge),
            attention("decode_denormals", DECODE, Denormals(1), &[Bf16], TimeOf("decode_as_f32", 1.10)),
            attention("decode_denormals_10th", DECODE, Denormals(10), &[Bf16], TimeOf("decode_as_f32", 1.10)),
        ],
        &[
            attention("decode_127_as_f32", Dims::new(8, 1, 4096, 127), At(Level::Avx512), &[Bf16], Judge),
            attention("decode_127", Dims::new(8, 1, 4096, 127), Plain, &[Bf16], TimeOf("decode_127_as_f32", 1.00)),
        ],
        &[attention("portable_decode", DECODE, At(Level::Portable), ALL, TimeOfF32(1.3))],
        &[
            serving("packed_alone", Serving::PackedAlone, &[F32], Judge),
            serving("packed", Serving::Packed, &[F32], TimeOf("packed_alone", 1.03)),
        ],
        &[
            serving("mixed_alone", Serving::MixedAlone, &[Bf16], Judge),
            serving("mixed", Serving::Mixed, &[Bf16], TimeOf("mixed_alone", 1.05)),
        ],
        &[
            serving("pages_none", Serving::Pages(0), &[F16, Bf16], Judge),
            serving("paged_256", Serving::Pages(256), &[F16, Bf16], TimeOf("pages_none", 1.03)),
            serving("paged_64", Serving::Pages(64), &[F16, Bf16], TimeOf("pages_none", 1.10)),
            serving("paged_16", Serving::Pages(16), &[F16, Bf16], TimeOf("pages_none", 1.10)),
            serving("paged_1", Serving::Pages(1), &[F16, Bf16], TimeOf("pages_none", 1.50)),
            serving("decode_cache", Serving::Cache, &[F16], TimeOf("pages_none", 1.02)),
        ],
        &[
            serving("chunk_none", Serving::ChunkPages(0), ALL, Judge),
            serving("chunk_paged_256", Serving::ChunkPages(256), ALL, TimeOf("chunk_none", 1.03)),
            serving("chunk_paged_16", Serving::ChunkPages(16), ALL, TimeOf("chunk_none", 1.10)),
        ],
        &[
            serving("decode_right_padded", Serving::RightPadded, &[F16], Judge),
            serving("decode_left_padded", Serving::LeftPadded, &[F16], TimeOf("decode_right_padded", 1.03)),
        ],
        &[
            serving("cascade_alone", Serving::CascadeAlone, &[F16, Bf16], Judge),
            serving("cascade", Serving::Cascade, &[F16], TimeOf("cascade_alone", 0.60)),
            serving("cascade", Serving::Cascade, &[Bf16], TimeOf("cascade_alone", 0.45)),
        ],
        &[
            serving("beams_folded", Serving::BeamsFolded, &[F32], Judge),
            serving("beams", Serving::Beams, &[F32], TimeOf("beams_folded", 1.10)),
        ],
        &[serving("mla", Serving::Latent, &[Bf16], Fraction(1.0))],
        // 2 us a layer.
        &[serving("append", Serving::Append, &[F16], Reach::Microseconds(64.0))],
        &[attention("portable_prefill", Dims::new(8, 512, 512, 64), At(Level::Portable), ALL, TimeOfF32(1.3))],
        // Per element, at most 1.3 times the time of the next multiple of 8, whose rows have the same number of vectors.
        &[
            avx2_decode("avx2_decode_48", 48, Judge),
            avx2_decode("avx2_decode_40", 40, TimeOf("avx2_decode_48", 1.3 * 40.0 / 48.0)),
            avx2_decode("avx2_decode_80", 80, Judge),
            avx2_decode("avx2_decode_72", 72, TimeOf("avx2_decode_80", 1.3 * 72.0 / 80.0)),
            avx2_decode("avx2_decode_104", 104, Judge),
            avx2_decode("avx2_decode_100", 100, TimeOf("avx2_decode_104", 1.3 * 100.0 / 104.0)),
        ],
        &[
            softmax("softmax_last", SQUARE, 1, Into, ENDS, Fraction(0.80)),
            softmax("softmax_masked", SQUARE, 1, Masked, ENDS, TimeOf("softmax_last", 1.50)),
            softmax("cross_entropy", SQUARE, 1, CrossEntropy, ENDS, TimeOf("softmax_last", 1.00)),
        ],
        &[softmax("softmax_last_in_place", SQUARE, 1, InPlace, ENDS, Fraction(0.80))],
        &[
            softmax("softmax_first", SQUARE, 0, Into, &[F32], Fraction(0.70)),
            softmax("softmax_masked_first", SQUARE, 0, Masked, &[F32], TimeOf("softmax_first", 1.50)),
            softmax("cross_entropy_first", SQUARE, 0, CrossEntropy, &[F32], TimeOf("softmax_first", 1.50)),
        ],
        &[
            softmax("softmax_first", SQUARE, 0, Into, &[Bf16], Fraction(0.55)),
            softmax("softmax_masked_first", SQUARE, 0, Masked, &[Bf16], TimeOf("softmax_first", 1.50)),
            softmax("cross_entropy_first", SQUARE, 0, CrossEntropy, &[Bf16], TimeOf("softmax_first", 1.50)),
        ],
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
    /// Whether this processor has its level.
    pub(crate) fn is_available(&self) -> bool {
        match self.task {
            Task::Attention(_, Options::At(level)) => Level::available().any(|other| other == level),
            _ => true,
        }
    }

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
            Task::Attention(..) | Task::Serving(_) | Task::KeySums(..) => 0,
        }
    }

    /// The line that the one of type `dtype` is judged by, if there is one.
    pub(crate) fn judged_by(&self, dtype: DType) -> Option<(&'static str, DType)> {
        match self.reach {
            Reach::OfF32(_) | Reach::TimeOfF32(_) | Reach::BelowPeersAndOfF32(_) if dtype != F32 => {
                Some((self.name, F32))
            }
            Reach::Fraction(_) | Reach::OfF32(_) | Reach::TimeOfF32(_) | Reach::Judge | Reach::BelowPeers => None,
            Reach::BelowPeersAndOfF32(_) | Reach::Nanoseconds(_) | Reach::Microseconds(_) => None,
            Reach::FractionOf(other, _) | Reach::TimeOf(other, _) => Some((other, dtype)),
        }
    }
}
