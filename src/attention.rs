//! Attention: its options and its calls.

#![forbid(unsafe_code)]

use crate::call::{Call, KeySumsCall, LseOutput};
use crate::driver::inspect::ScoreRange;
use crate::driver::{self, Workspace};
use crate::element::DType;
#[cfg(feature = "ndarray")]
use crate::element::Element;
use crate::error::Error;
use crate::integers::Integers;
use crate::kv::{KeysValues, Places};
use crate::level::Level;
use crate::mask::{Mask, MaskTensor, OpenMask, Window};
use crate::options::Options;
use crate::plan::{Form, Plan, Threads};
use crate::prepared::Prepared;
use crate::problem::{Problem, check_scores_size, check_shape};
use crate::score::{AlibiSlopes, BiasTensor, OpenScoreMod, ScoreMod, ScoreStage, Sinks};
use crate::sequence::QueryOffset;
use crate::simd::Isa;
use crate::softmax;
use crate::tensor::{AnyTensorMut, AnyTensorRef, TensorMut, TensorRef, check_range};
use std::ops::RangeBounds;

/// Scaled-dot-product attention: the options of a computation, without the tensors.
///
/// ```text
/// score[i,j] = mods(softcap(scale * dot(q[i], k[j])) + bias[i,j])
///              for every key j that query i may see
/// lse[i]     = log (exp(sink) + sum_j exp(score[i,j]))        exp(sink) is 0 without sinks
/// out[i]     = sum_j exp(score[i,j] - lse[i]) * v[j]
/// ```
///
/// | tensor | shape | |
/// |---|---|---|
/// | q | `[batch, heads_q, seq_q, head_dim]` | |
/// | k | `[batch, heads_kv, seq_kv, head_dim]` | `heads_q` is a multiple of `heads_kv`: query head h uses `h / (heads_q / heads_kv)` |
/// | v | `[batch, heads_kv, seq_kv, value_dim]` | |
/// | out | `[batch, heads_q, seq_q, value_dim]` | |
/// | lse | `[batch, heads_q, seq_q]` | f32, natural logarithm |
///
/// q, k, v and out may each be f32, f16 or bf16, with any strides. Every dimension may be any number, 0 included.
///
/// A key is visible if every mask shows it: causal order, windows, key lengths, the mask tensor, and those of
/// [`masked_by`](Self::masked_by). Scores are modified in this order: softcap, bias tensor, ALiBi, then those of
/// [`modified_by`](Self::modified_by).
///
/// Options that are set twice: causal order, windows, `masked_by` and `modified_by` compose. A [`mask`](Self::mask),
/// [`bias`](Self::bias), [`alibi`](Self::alibi), [`key_lengths`](Self::key_lengths), [`first_keys`](Self::first_keys) or [`sinks`](Self::sinks) given twice is refused by
/// the call, with [`Error::GivenTwice`].
/// For all other options the last one counts.
///
/// The edge rules hold for every option and type:
/// * A query that sees no key has an output of exactly 0 and an lse of -inf (with sinks: of its head's sink).
/// * A hidden key never changes the output, even if it holds NaN, infinity or stale data.
/// * A score of -inf hides its key, whether it comes from a bias, from overflow of f32, or from an infinite element of the key.
/// * A visible NaN makes the rows that see it NaN, and no others. So does a score of +inf.
/// * The bits of a row depend on that row's inputs, the [`Level`] and the [`Form`] alone. They don't depend on threads, on the
///   rest of the batch, or on how queries are divided into calls. (Unless it is [set](Self::form), the form follows from the
///   numbers of rows and keys, and a few rows at the end may have [another one](Plan::tail_rows).)
///
/// An `Attention` is cheap to make, clone and keep. It borrows the mask, bias and lists that it was given.
///
/// ```
/// use flashtile::Attention;
/// use ndarray::Array4;
///
/// let q = Array4::from_elem((1, 8, 10, 64), 0.1f32); // 8 query heads
/// let k = Array4::from_elem((1, 2, 30, 64), 0.2f32); // share 2 key/value heads
/// let v = Array4::from_elem((1, 2, 30, 64), 0.3f32);
///
/// let attention = Attention::new().causal().window(Some(1023), None).softcap(30.0);
/// println!("{}", attention.plan(&q, (&k, &v))?);
/// let out = attention.run(&q, &k, &v)?;
/// assert_eq!(out.shape(), [1, 8, 10, 64]);
/// # Ok::<(), flashtile::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Attention<'a> {
    pub(crate) options: Options<'a>,
    level: Option<Level>,
    form: Option<Form>,
    threads: Threads,
}

/// What to compute.
impl<'a> Attention<'a> {
    /// Plain attention: every query sees every key, and scores are scaled by `1 / sqrt(head_dim)`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the factor of the scores. The default is `1 / sqrt(head_dim)`.
    ///
    /// It may be zero or negative. `scale * log2(e)` must be finite (up to 2.3e38), and with a softcap `scale / softcap`, too.
    /// If it is set twice, the last one counts.
    pub fn scale(mut self, scale: f32) -> Self {
        self.options.scale = Some(scale);
        self
    }

    /// Hides the keys after a query's own position: query i at position p sees the keys `j <= p`.
    ///
    /// [`query_offset`](Attention::query_offset) sets the positions. It composes with every other mask, windows included.
    pub fn causal(mut self) -> Self {
        self.options.causal = true;
        self
    }

    /// Hides the keys outside a window: a query at position p sees the keys from `p - left` to `p + right`. `None` sets no
    /// bound on that side.
    ///
    /// `window(Some(511), Some(0))` shows a query its own key and the 511 keys before it.
    /// [`query_offset`](Attention::query_offset) sets the positions. If it is set twice, the windows compose: a key must be in
    /// both.
    pub fn window(mut self, left: Option<usize>, right: Option<usize>) -> Self {
        self.options.window = self.options.window.intersect(Window { left, right });
        self
    }

    /// Sets the position of the queries among the keys: query i is at position `query_offset + i`. The default,
    /// [`QueryOffset::FromEnd`], puts the last query at the last key.
    ///
    /// Causal order, windows and ALiBi use positions; other options don't. If it is set twice, the last one counts.
    ///
    /// ```
    /// use flashtile::{Attention, QueryOffset};
    ///
    /// // A chunk of a prompt that starts at token 512, over all keys so far.
    /// let attention = Attention::new().causal().query_offset(QueryOffset::At(512));
    /// ```
    pub fn query_offset(mut self, offset: QueryOffset<'a>) -> Self {
        self.options.query_offset = offset;
        self
    }

    /// Sets the number of keys of each batch, `[batch]`, each from 0 to `seq_kv`. The keys from there on are padding and
    /// hidden.
    ///
    /// The list is a slice, array or vector of any common integer type ([`Integers`]). Lengths given twice are refused with
    /// [`Error::GivenTwice`].
    ///
    /// **Right-padded prompts with causal order or windows need [`query_lengths`](Self::query_lengths), or
    /// [`QueryOffset::FromStart`].** The default,
    /// [`QueryOffset::FromEnd`], puts the last query at the last key of the length. In a padded prompt the last query is
    /// padding itself, so the default moves every query of that batch to an earlier position, and real queries see too few
    /// keys.
    ///
    /// ```
    /// use flashtile::{Attention, QueryOffset};
    ///
    /// let lengths = [5u32, 3]; // a batch of two prompts, padded to 5 tokens
    /// let prefill = Attention::new().causal().key_lengths(&lengths).query_offset(QueryOffset::FromStart);
    /// ```
    pub fn key_lengths(mut self, lengths: impl Into<Integers<'a>>) -> Self {
        self.options.note_if_twice("key_lengths", self.options.key_lengths.is_some());
        self.options.key_lengths = Some(lengths.into());
        self
    }

    /// Sets the number of queries of each sequence, `[batch]`, each from 0 to `seq_q`. The queries from there on are padding: they are
    /// not computed, and their rows of the output and lse are left as they are.
    ///
    /// The list is as in [`key_lengths`](Self::key_lengths). Masks and biases still have a row for each query, padding included.
    ///
    /// ```
    /// use flashtile::Attention;
    ///
    /// let lengths = [5u32, 3]; // two prompts, padded to 5 tokens: no query offset is needed
    /// let prefill = Attention::new().causal().query_lengths(&lengths).key_lengths(&lengths);
    /// ```
    pub fn query_lengths(mut self, lengths: impl Into<Integers<'a>>) -> Self {
        self.options.note_if_twice("query_lengths", self.options.query_lengths.is_some());
        self.options.query_lengths = Some(lengths.into());
        self
    }

    /// Sets the first key of each sequence, `[batch]`, each from 0 to its number of keys: the rows before it are **left padding**. They
    /// are not read, and the bits of a sequence's rows are those of a call with that sequence alone.
    ///
    /// The list is as in [`key_lengths`](Self::key_lengths), which counts padding: the keys of sequence `b` are the rows
    /// `first_keys[b]..key_lengths[b]`, or up to `seq_kv`. It is for `(k, v)` and [`KvCache`](crate::KvCache).
    ///
    /// * **Positions** count from the first key. [`QueryOffset::FromEnd`] needs nothing else; [`QueryOffset::At`] and
    ///   [`QueryOffset::PerBatch`] say how many keys of the sequence come before query 0, padding left out. Causal order, windows,
    ///   ALiBi, [`masked_by`](Self::masked_by) and [`modified_by`](Self::modified_by) take the sequence without its padding.
    /// * **The tensors of [`mask`](Self::mask) and [`bias`](Self::bias)** have a column for each row of the keys, padding included, as
    ///   the masks of left-padded Hugging Face batches have.
    ///
    /// In a prefill, queries are left-padded, too: see [`first_queries`](Self::first_queries). Packed keys, pages and rotating caches
    /// have no padding, and are refused with [`Error::GivenTwice`], as are first keys that are given twice.
    ///
    /// ```
    /// use flashtile::Attention;
    ///
    /// let firsts = [0u32, 2]; // two prompts of 5 and 3 tokens, padded on the left to 5
    /// let prefill = Attention::new().causal().first_queries(&firsts).first_keys(&firsts);
    /// let decode = Attention::new().causal().first_keys(&firsts);
    /// ```
    pub fn first_keys(mut self, firsts: impl Into<Integers<'a>>) -> Self {
        self.options.note_if_twice("first_keys", self.options.first_keys.is_some());
        self.options.first_keys = Some(firsts.into());
        self
    }

    /// Sets the first query of each sequence, `[batch]`, each from 0 to its number of queries: the rows before it are left padding.
    /// They are not computed, and their rows of the output and lse are left as they are.
    ///
    /// The queries of sequence `b` are the rows `first_queries[b]..query_lengths[b]`, or up to `seq_q`. Positions count from the first
    /// one. The tensors of [`mask`](Self::mask) and [`bias`](Self::bias) have a row for each row of the queries, padding included.
    ///
    /// Packed queries have no padding, and are refused with [`Error::GivenTwice`], as are first queries that are given twice.
    pub fn first_queries(mut self, firsts: impl Into<Integers<'a>>) -> Self {
        self.options.note_if_twice("first_queries", self.options.first_queries.is_some());
        self.options.first_queries = Some(firsts.into());
        self
    }

    /// Packs the queries of all sequences in one tensor: those of sequence `b` are the rows `starts[b]..starts[b + 1]`, as in
    /// FlashAttention's `varlen` calls.
    ///
    /// * `starts`: one more than there are sequences, ascending, at most `total`
    ///
    /// Queries and output are `[total, heads_q, dim]`, or `[1, heads_q, total, dim]`, the lse is `[1, heads_q, total]`. Keys are packed
    /// ([`KeysValues::packed`]), in pages ([`KeysValues::paged`]), or have a batch index for each sequence. Rows of no sequence
    /// are left as they are. A mask or bias has a row for each query of the longest sequence, as if sequences were padded.
    ///
    /// Sequences may have any numbers of queries: prompts, parts of prompts and single tokens go in one call. The bits of a
    /// sequence's rows are those of a call with that sequence alone. Starts given twice, or together with
    /// [`query_lengths`](Self::query_lengths), are refused with [`Error::GivenTwice`].
    pub fn query_starts(mut self, starts: impl Into<Integers<'a>>) -> Self {
        self.options.note_if_twice("query_starts", self.options.query_starts.is_some());
        self.options.query_starts = Some(starts.into());
        self
    }

    /// Sets a boolean mask: **true where the query may attend**, as in PyTorch and ONNX.
    ///
    /// Its shape is `[batch, heads_q, seq_q, seq_kv]`. A dimension of 1 is repeated, and a tensor of lower rank gets dimensions
    /// of 1 in front.
    ///
    /// **A tensor of rank 3 is read as `[heads_q, seq_q, seq_kv]`.** For `[batch, seq_q, seq_kv]`, call
    /// [`insert_axis(1)`](TensorRef::insert_axis) first: if `batch == heads_q`, the wrong reading is not an error.
    ///
    /// A mask given twice is refused with [`Error::GivenTwice`].
    ///
    /// ```
    /// use flashtile::{Attention, TensorRef};
    ///
    /// let attend = [true, false, true, true]; // [seq_q, seq_kv], for every batch and head
    /// let attention = Attention::new().mask(TensorRef::from_slice(&attend, [2, 2])?);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn mask(mut self, attend: impl Into<TensorRef<'a, bool>>) -> Self {
        self.options.note_if_twice("mask", self.options.mask.is_some());
        self.options.mask = Some(MaskTensor(attend.into().strided.into_bytes()));
        self
    }

    /// Adds a mask: a ready one of [`flashtile::mask`](crate::mask), one from a function
    /// ([`mask_fn`](crate::mask::mask_fn)), or your own [`Mask`].
    ///
    /// It composes with every other mask, and may be called any number of times: a key is visible if all masks show it. Blocks
    /// that a mask rules out are not computed.
    ///
    /// ```
    /// use flashtile::Attention;
    /// use flashtile::mask::Documents;
    ///
    /// let documents = Documents::of_lengths(&[300, 212])?; // two prompts packed into one sequence of 512 tokens
    /// let attention = Attention::new().causal().masked_by(&documents);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn masked_by(mut self, mask: &'a dyn Mask) -> Self {
        self.options.open_masks.push(OpenMask(mask));
        self
    }

    /// Adds a score modification: a ready one of [`flashtile::score`](crate::score), one from a function
    /// ([`score_fn`](crate::score::score_fn)), or your own [`ScoreMod`].
    ///
    /// It takes the score after softcap, bias and ALiBi. If there are several, each takes the result of the one before it.
    ///
    /// ```
    /// use flashtile::Attention;
    /// use flashtile::score::score_fn;
    ///
    /// let nearer = score_fn(|score, pair| score - 0.1 * (pair.distance().abs() as f32).sqrt());
    /// let attention = Attention::new().causal().modified_by(&nearer);
    /// ```
    pub fn modified_by(mut self, score_mod: &'a dyn ScoreMod) -> Self {
        self.options.open_score_mods.push(OpenScoreMod(score_mod));
        self
    }

    /// Adds a sink to each query head: a score without a key, whose value is 0 (gpt-oss). `out = sum_j p[j] * v[j]` with
    /// `p[j] = exp(score[j]) / (exp(sink[h]) + sum exp(score))`, and the lse counts the sink, too.
    ///
    /// * `sinks`: `[heads_q]`, each below infinity; -inf is no sink
    ///
    /// A query that sees no key has an output of 0 and an lse of `sink[h]`. **When results over parts of the keys are merged,
    /// only one part may have the sinks.** Sinks given twice are refused with [`Error::GivenTwice`].
    ///
    /// ```
    /// use flashtile::Attention;
    ///
    /// let attention = Attention::new().causal().sinks(&[0.5, -1.0]); // two query heads
    /// ```
    pub fn sinks(mut self, sinks: &'a [f32]) -> Self {
        self.options.note_if_twice("sinks", self.options.sinks.is_some());
        self.options.sinks = Some(Sinks(sinks));
        self
    }

    /// Caps scores smoothly to `-cap..cap`: `cap * tanh(score / cap)`, before any bias.
    ///
    /// `cap` is a normal number above 0 and at most 2.3e38. If it is set twice, the last one counts.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.options.softcap = Some(cap);
        self
    }

    /// Adds a tensor of f32, f16 or bf16 to the scores. A bias of -inf hides a key.
    ///
    /// Its shape is `[batch, heads_q, seq_q, seq_kv]`. A dimension of 1 is repeated, and a tensor of lower rank gets dimensions
    /// of 1 in front.
    ///
    /// **A tensor of rank 3 is read as `[heads_q, seq_q, seq_kv]`.** For `[batch, seq_q, seq_kv]`, call
    /// [`insert_axis(1)`](TensorRef::insert_axis) first: if `batch == heads_q`, the wrong reading is not an error.
    ///
    /// A bias given twice is refused with [`Error::GivenTwice`].
    ///
    /// ```
    /// use flashtile::{Attention, TensorRef};
    ///
    /// let bias = [0.0f32, f32::NEG_INFINITY, 0.5, 0.0]; // [seq_q, seq_kv], for every batch and head
    /// let attention = Attention::new().bias(TensorRef::from_slice(&bias, [2, 2])?);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    pub fn bias(mut self, bias: impl Into<AnyTensorRef<'a>>) -> Self {
        self.options.note_if_twice("bias", self.options.bias.is_some());
        self.options.bias = Some(BiasTensor(bias.into().tensor));
        self
    }

    /// Subtracts `slope[h] * |p - j|` from the score of key j, for a query of head h at position p.
    ///
    /// [`AlibiSlopes::PerHead`] has `heads_q` finite slopes, and [`AlibiSlopes::PerBatchAndHead`] `batch * heads_q`, those of sequence
    /// b in row b. [`query_offset`](Attention::query_offset) sets the positions.
    /// Slopes given twice are refused with [`Error::GivenTwice`].
    ///
    /// ```
    /// use flashtile::{AlibiSlopes, Attention};
    ///
    /// let attention = Attention::new().causal().alibi(AlibiSlopes::Standard);
    /// ```
    pub fn alibi(mut self, slopes: AlibiSlopes<'a>) -> Self {
        self.options.note_if_twice("alibi", self.options.alibi.is_some());
        self.options.alibi = Some(slopes);
        self
    }
}

/// How to compute it.
impl<'a> Attention<'a> {
    /// Uses this instruction set instead of the processor's best one.
    ///
    /// A call is refused with [`Error::LevelUnavailable`] if the processor lacks it. If it is set twice, the last one counts.
    pub fn level(mut self, level: Level) -> Self {
        self.level = Some(level);
        self
    }

    /// Uses this form instead of the one that is planned from shapes, types and level.
    ///
    /// Every problem can be computed in either form. If it is set twice, the last one counts.
    pub fn form(mut self, form: Form) -> Self {
        self.form = Some(form);
        self
    }

    /// Sets the threads that a call may use: a pool (the default), or only the calling thread.
    ///
    /// If it is set twice, the last one counts.
    pub fn threads(mut self, threads: Threads) -> Self {
        self.threads = threads;
        self
    }

    /// Plans a call with these tensors, without computing it. The [`Plan`] prints itself.
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn plan<'t>(&self, q: impl Into<AnyTensorRef<'t>>, kv: impl Into<KeysValues<'t>>) -> Result<Plan, Error> {
        self.plan_for(&Problem::new(&self.options, q.into(), kv.into())?)
    }

    /// Plans a call from types and shapes alone, without tensors. The shapes are those of q, k and v.
    ///
    /// ```
    /// use flashtile::{Attention, DType, Form};
    ///
    /// let (q, kv) = ((DType::F32, [1, 32, 1, 128]), (DType::F16, [1, 8, 8192, 128]));
    /// let plan = Attention::new().causal().plan_shapes(q, kv, kv)?;
    /// assert_eq!(plan.form(), Form::Decode);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn plan_shapes(
        &self,
        q: (DType, [usize; 4]),
        k: (DType, [usize; 4]),
        v: (DType, [usize; 4]),
    ) -> Result<Plan, Error> {
        self.plan_for(&Problem::of_shapes(&self.options, [q, k, v], (self.options.query_starts, Places::Dense))?)
    }

    /// The shape of the output for these tensors, `[batch, heads_q, seq_q, value_dim]`; with packed queries
    /// `[1, heads_q, total, value_dim]`. That of the lse are its first three numbers.
    ///
    /// ```
    /// use flashtile::{Attention, KeysValues, TensorMut, TensorRef, Workspace};
    ///
    /// // Two prompts of 3 and 2 tokens, 8 query heads.
    /// let (q, kv, starts) = (vec![0.1f32; 5 * 8 * 64], vec![0.2f32; 5 * 2 * 64], [0, 3, 5]);
    /// let (q, kv) = (TensorRef::from_slice(&q, [5, 8, 64])?, TensorRef::from_slice(&kv, [5, 2, 64])?);
    /// let (attention, kv) = (Attention::new().causal().query_starts(&starts), KeysValues::packed(kv, kv, &starts));
    ///
    /// let shape = attention.output_shape(q, kv)?;
    /// assert_eq!(shape, [1, 8, 5, 64]);
    /// let mut out = vec![0.0f32; shape.iter().product()];
    /// attention.compute(q, kv, TensorMut::from_slice(&mut out, shape)?, None, &mut Workspace::new())?;
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn output_shape<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        kv: impl Into<KeysValues<'t>>,
    ) -> Result<[usize; 4], Error> {
        Ok(Problem::new(&self.options, q.into(), kv.into())?.output_shape())
    }

    pub(crate) fn plan_for(&self, problem: &Problem<'_>) -> Result<Plan, Error> {
        Ok(Plan::new(problem, Isa::for_level(self.level)?, self.form, self.threads))
    }
}

/// Calls.
impl<'a> Attention<'a> {
    /// Computes attention into a new array of the queries' type, `[batch, heads_q, seq_q, value_dim]`.
    ///
    /// The shapes of q, k and v and the edge rules are those of [`Attention`].
    ///
    /// ```
    /// use flashtile::Attention;
    /// use ndarray::Array4;
    ///
    /// let (q, kv) = (Array4::from_elem((1, 8, 10, 64), 0.1f32), Array4::from_elem((1, 2, 30, 64), 0.2f32));
    /// let out = Attention::new().causal().run(&q, &kv, &kv)?;
    /// assert_eq!(out.shape(), [1, 8, 10, 64]);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::compute`], and [`Error::TooLarge`] if there is no memory for the result.
    #[cfg(feature = "ndarray")]
    pub fn run<'t, Q: Element>(
        &self,
        q: impl Into<TensorRef<'t, Q>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<ndarray::Array4<Q>, Error> {
        let (q, kv) = (q.into(), KeysValues::from((k, v)));
        let mut out = array(Problem::new(&self.options, q.into(), kv)?.output_shape())?;
        self.compute(q, kv, &mut out, None, &mut Workspace::new())?;
        Ok(out)
    }

    /// Computes attention as [`Attention::run`], and the log-sum-exp of every query's scores.
    ///
    /// The lse is a natural logarithm, `[batch, heads_q, seq_q]`, and -inf for a query that sees no key.
    ///
    /// ```
    /// use flashtile::Attention;
    /// use ndarray::Array4;
    ///
    /// let (q, kv) = (Array4::from_elem((1, 8, 10, 64), 0.1f32), Array4::from_elem((1, 2, 30, 64), 0.2f32));
    /// let (out, lse) = Attention::new().causal().run_with_lse(&q, &kv, &kv)?;
    /// assert_eq!((out.shape(), lse.shape()), (&[1, 8, 10, 64][..], &[1, 8, 10][..]));
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::run`].
    #[cfg(feature = "ndarray")]
    pub fn run_with_lse<'t, Q: Element>(
        &self,
        q: impl Into<TensorRef<'t, Q>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
    ) -> Result<(ndarray::Array4<Q>, ndarray::Array3<f32>), Error> {
        let (q, kv) = (q.into(), KeysValues::from((k, v)));
        let (mut out, mut lse) = {
            let problem = Problem::new(&self.options, q.into(), kv)?;
            (array(problem.output_shape())?, array(problem.lse_shape())?)
        };
        self.compute(q, kv, &mut out, &mut lse, &mut Workspace::new())?;
        Ok((out, lse))
    }

    /// Computes attention into `out`, `[batch, heads_q, seq_q, value_dim]`. Results are rounded once, to the type of `out`.
    ///
    /// The shapes of q, k and v and the edge rules are those of [`Attention`].
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn run_into<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        v: impl Into<AnyTensorRef<'t>>,
        out: impl Into<AnyTensorMut<'t>>,
    ) -> Result<(), Error> {
        self.compute(q, (k, v), out, None, &mut Workspace::new())
    }

    /// Computes attention into `out`, and into `lse` if there is one, with scratch memory that is kept from call to call. All
    /// other calls are short forms of this one.
    ///
    /// * `q`: the shape in the table of [`Attention`]
    /// * `kv`: keys and values, `(&k, &v)` of the shapes there, or any other [`KeysValues`]
    /// * `out`: `[batch, heads_q, seq_q, value_dim]`
    /// * `lse`: `[batch, heads_q, seq_q]`, f32: `None`, or `&mut lse` of an array, or a [`TensorMut`] of rank 3
    ///
    /// Tensors are ndarray arrays and views, [`TensorRef`] and [`TensorMut`], or [`AnyTensorRef`] and [`AnyTensorMut`] whose
    /// types are known at run time.
    ///
    /// After a call for a problem of the same size with the same workspace, serial calls and calls from within a rayon pool
    /// don't allocate.
    ///
    /// An example with arrays (the crate page has one with slices):
    ///
    /// ```
    /// use flashtile::{Attention, Workspace};
    /// use ndarray::{Array3, Array4};
    ///
    /// let (q, kv) = (Array4::from_elem((1, 8, 10, 64), 0.1f32), Array4::from_elem((1, 2, 30, 64), 0.2f32));
    /// let (mut out, mut lse) = (Array4::<f32>::zeros((1, 8, 10, 64)), Array3::<f32>::zeros((1, 8, 10)));
    /// let (attention, mut workspace) = (Attention::new().causal(), Workspace::new());
    /// for _layer in 0..3 {
    ///     attention.compute(&q, (&kv, &kv), &mut out, &mut lse, &mut workspace)?;
    /// }
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// A refused call has written nothing.
    ///
    /// * [`Error::Rank`]: queries, keys, values or an output of rank 3 or less
    /// * [`Error::ShapeMismatch`], [`Error::HeadsNotDivisible`]: tensors that don't fit together
    /// * [`Error::NotBroadcastable`], [`Error::WrongCount`], [`Error::LengthOutOfRange`], [`Error::InvalidStarts`]: a mask, bias or
    ///   list that does not fit the tensors
    /// * [`Error::InvalidOption`]: a scale, softcap or slope that is not a valid number
    /// * [`Error::GivenTwice`]: a mask, a bias, key lengths, first keys, sinks or ALiBi given twice
    /// * [`Error::InvalidMask`], and what [`Mask::check`] and [`ScoreMod::check`] return: masks and score modifications that
    ///   were made for another problem
    /// * [`Error::LostKeys`]: a window over keys that a [`RotatingKvCache`](crate::RotatingKvCache) has overwritten
    /// * [`Error::LevelUnavailable`]: a level that the processor lacks
    /// * [`Error::TooLarge`]: broadcast tensors with more elements than any memory holds
    /// * [`Error::TooMany`]: more than 2^32 - 1 query rows or 2^24 key/value heads in all batches together, or rows of more
    ///   than 2^20 elements; with [`masked_by`](Self::masked_by) or [`modified_by`](Self::modified_by), indices or offsets of
    ///   2^30 or more
    pub fn compute<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        kv: impl Into<KeysValues<'t>>,
        out: impl Into<AnyTensorMut<'t>>,
        lse: impl Into<LseOutput<'t>>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let problem = Problem::new(&self.options, q.into(), kv.into())?;
        self.call(problem, out.into(), lse.into())?.run(workspace);
        Ok(())
    }

    /// Checks a call and plans it.
    pub(crate) fn call<'t>(
        &self,
        problem: Problem<'t>,
        out: AnyTensorMut<'t>,
        lse: LseOutput<'t>,
    ) -> Result<Call<'t>, Error> {
        let plan = self.plan_for(&problem)?;
        Call::new(problem, plan, out, lse)
    }

    /// Plans once for fixed shapes, to compute many times with other data. See [`Prepared`] for an example.
    ///
    /// # Errors
    /// As [`Attention::compute`], and [`Error::TooMany`] for more than 2^24 tasks: their list would take a gigabyte.
    pub fn prepare<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        kv: impl Into<KeysValues<'t>>,
    ) -> Result<Prepared<'a>, Error> {
        let problem = Problem::new(&self.options, q.into(), kv.into())?;
        Prepared::new(self.options.clone(), &problem, self.plan_for(&problem)?)
    }

    /// Sums the probabilities of each key over the queries of a call: what cache eviction needs (H2O, SnapKV).
    ///
    /// ```text
    /// sums[b,h,j] = sum_i exp(score[b,h,i,j] - lse[b,h,i])        for every query i that sees key j
    /// ```
    ///
    /// It is a second pass over the scores. The matrix of probabilities is never held.
    ///
    /// * `q`, `kv`: as in [`compute`](Self::compute); values are checked and not read
    /// * `lse`: `[batch, heads_q, seq_q]`, as `compute` has written it with the same options. For some of the queries, it is that
    ///   part of it. With an lse over more keys ([`merge`](crate::merge)), probabilities are those among these keys.
    /// * `sums`: `[batch, heads_q, seq_kv]`. Packed sequences have a row of sums each, for the keys of the longest one:
    ///   `[sequences, heads_q, seq_kv]`. With left padding, columns are rows of the key tensor: the sums of sequence `b` start at
    ///   [`first_keys`](Self::first_keys)`[b]`, and its lse at [`first_queries`](Self::first_queries)`[b]`.
    ///
    /// The edge rules are those of [`Attention`]:
    /// * A key that no query sees has a sum of exactly 0, whatever it holds; so has padding on either side.
    /// * A query that sees no key adds nothing, and neither does padding, whose lse is not read. With sinks, the probabilities of
    ///   a query add up to less than 1.
    /// * A query whose lse is NaN makes the keys that it sees NaN, and no others.
    /// * A probability is at most 1. It has the error of its lse, which is f32: a relative error of 6e-4 at an lse of 1e4. In a row
    ///   whose keys all have a bias of -1e9, each of them counts as 1: hide them instead, with -inf.
    /// * The bits of a sum depend on the queries, their lses and the key, on the [`Level`] and the [`Form`], which follows from the
    ///   numbers of queries and keys unless it is [set](Self::form). They don't depend on threads, on other sequences, or on where
    ///   keys lie.
    ///
    /// ```
    /// use flashtile::{Attention, Workspace};
    /// use ndarray::{Array3, Array4};
    ///
    /// let (q, kv) = (Array4::from_elem((1, 8, 10, 64), 0.1f32), Array4::from_elem((1, 2, 30, 64), 0.2f32));
    /// let (mut out, mut lse) = (Array4::<f32>::zeros((1, 8, 10, 64)), Array3::<f32>::zeros((1, 8, 10)));
    /// let (attention, mut workspace) = (Attention::new().causal(), Workspace::new());
    /// attention.compute(&q, (&kv, &kv), &mut out, &mut lse, &mut workspace)?;
    ///
    /// let mut sums = Array3::<f32>::zeros((1, 8, 30));
    /// attention.key_sums(&q, (&kv, &kv), &lse, &mut sums, &mut workspace)?;
    /// assert!((sums.sum() - 80.0).abs() < 1e-3); // 1 for each query of each head
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn key_sums<'t>(
        &self,
        q: impl Into<AnyTensorRef<'t>>,
        kv: impl Into<KeysValues<'t>>,
        lse: impl Into<TensorRef<'t, f32, 3>>,
        sums: impl Into<TensorMut<'t, f32, 3>>,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let problem = Problem::new(&self.options, q.into(), kv.into())?.without_values();
        let plan = self.plan_for(&problem)?;
        KeySumsCall::new(problem, plan, lse.into(), sums.into())?.run(workspace);
        Ok(())
    }

    /// Computes the scores at a stage, `[batch, heads_q, seq_q, seq_kv]`, for inspection.
    ///
    /// ```
    /// use flashtile::{Attention, ScoreStage};
    /// use ndarray::Array4;
    ///
    /// let (q, k) = (Array4::from_elem((1, 1, 2, 8), 0.5f32), Array4::from_elem((1, 1, 2, 8), 0.5f32));
    /// let probabilities = Attention::new().causal().scores(ScoreStage::Probabilities, &q, &k)?;
    /// assert_eq!(probabilities.shape(), [1, 1, 2, 2]);
    /// assert_eq!(probabilities[[0, 0, 0, 1]], 0.0); // hidden
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// All scores are held in memory, which the other calls never do.
    ///
    /// # Errors
    /// As [`Attention::run`].
    #[cfg(feature = "ndarray")]
    pub fn scores<'t>(
        &self,
        stage: ScoreStage,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
    ) -> Result<ndarray::Array4<f32>, Error> {
        let (q, k) = (q.into(), k.into());
        let shape = Problem::of_scores(&self.options, [q, k])?.dims.scores_shape();
        check_scores_size(shape)?;
        let mut out = array(shape)?;
        self.scores_into(stage, q, k, &mut out)?;
        Ok(out)
    }

    /// Computes the scores at a stage into `out`, `[batch, heads_q, seq_q, seq_kv]`, for inspection.
    ///
    /// Scores are formed from f32 as in [`Form::Prefill`], even if another form is set. Rows of queries that a sequence does not have,
    /// padding on either side, are left as they are.
    ///
    /// # Errors
    /// As [`Attention::compute`].
    pub fn scores_into<'t>(
        &self,
        stage: ScoreStage,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        out: impl Into<TensorMut<'t, f32>>,
    ) -> Result<(), Error> {
        self.scores_range_into(stage, q, k, (.., ..), out)
    }

    /// Computes the scores of some queries and keys into `out`, `[batch, heads_q, queries, keys]`: those of
    /// [`scores_into`](Self::scores_into) in these ranges, bit for bit.
    ///
    /// * `q`, `k`: all queries and all keys. Positions, masks and biases are those of the whole problem.
    /// * `ranges`: of queries within `seq_q`, and of keys within `seq_kv`. In a batch, they are the same for each sequence, and count
    ///   left padding.
    ///
    /// Only what is asked for is formed, except that probabilities need the scores of all keys. Memory beside `out` is a few rows
    /// for each thread.
    ///
    /// ```
    /// use flashtile::{Attention, ScoreStage};
    /// use ndarray::Array4;
    ///
    /// let (q, k) = (Array4::from_elem((1, 2, 100, 8), 0.5f32), Array4::from_elem((1, 2, 100, 8), 0.5f32));
    /// let mut last = Array4::<f32>::zeros((1, 2, 1, 20)); // what the last query sees of the first 20 keys
    /// Attention::new().causal().scores_range_into(ScoreStage::Probabilities, &q, &k, (99.., ..20), &mut last)?;
    /// assert!((last[[0, 0, 0, 0]] - 0.01).abs() < 1e-6);
    /// # Ok::<(), flashtile::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Attention::compute`]; [`Error::RangeOutOfBounds`] for a range that does not lie within axis 2 (queries) or 3 (keys) of
    /// the scores; [`Error::TooLarge`] if there is no memory for a few rows.
    pub fn scores_range_into<'t>(
        &self,
        stage: ScoreStage,
        q: impl Into<AnyTensorRef<'t>>,
        k: impl Into<AnyTensorRef<'t>>,
        ranges: (impl RangeBounds<usize>, impl RangeBounds<usize>),
        out: impl Into<TensorMut<'t, f32>>,
    ) -> Result<(), Error> {
        let out = out.into();
        let problem = Problem::of_scores(&self.options, [q.into(), k.into()])?;
        let plan = Plan::for_scores(&problem, Isa::for_level(self.level)?, self.threads);
        let shape = problem.dims.scores_shape();
        let (queries, keys) = (check_range(2, ranges.0, &shape)?, check_range(3, ranges.1, &shape)?);
        let [batch, heads_q, ..] = shape;
        let shape = [batch, heads_q, queries.len(), keys.len()];
        check_scores_size(shape)?;
        check_shape("output", ["batch", "heads_q", "seq_q", "seq_kv"], out.shape(), shape)?;
        let finish_row = (stage == ScoreStage::Probabilities).then_some(softmax::plain as fn(Isa, &mut [f32]));
        let range = ScoreRange { queries, keys, finish_row };
        driver::inspect::run(&problem.at_stage(stage), &plan, &range, out, &mut Workspace::new())
    }
}

/// An array of zeros, or an error if there is no memory for it.
#[cfg(feature = "ndarray")]
fn array<T: Clone + Default, D: ndarray::Dimension, const N: usize>(
    shape: [usize; N],
) -> Result<ndarray::Array<T, D>, Error>
where
    [usize; N]: ndarray::IntoDimension<Dim = D>,
{
    let too_large = Error::TooLarge { what: "the result" };
    let (_, len) = crate::tensor::strided::contiguous(&shape)?;
    let mut elements = Vec::new();
    elements.try_reserve_exact(len).map_err(|_| too_large.clone())?;
    elements.resize(len, T::default());
    ndarray::Array::from_shape_vec(shape, elements).map_err(|_| too_large)
}
