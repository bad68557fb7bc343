//! Checks the tensors and options of attention. `Prepared` adds the shapes it was made for; `merge`, `softmax` and C check
//! their own arguments.
//!
//! In a [`Problem`], every index within the dimensions leads to an element, every list has the right length, and every number
//! is one that the kernels take. The layers below check nothing again.

#![forbid(unsafe_code)]

use crate::element::{DType, map_elements, with_elements};
use crate::error::{Error, check_count};
use crate::integers::Integers;
use crate::kv::places::Ring;
use crate::kv::{KeysValues, Places, check_starts};
use crate::mask::{Causal, Held, MaskTensor, Masks, OpenMask, ProblemSizes, Window};
use crate::options::Options;
use crate::pair::MAX_INDEX;
use crate::score::{Alibi, AlibiSlopes, BiasTensor, OpenScoreMod, ScoreMods, ScoreStage, Sinks, Softcap};
use crate::sequence::{Ends, Lengths, QueryOffset, Sequences};
use crate::tensor::any::AnyTensor;
use crate::tensor::{AnyTensorMut, AnyTensorRef, TensorMut};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// The sizes of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Dims {
    /// The number of sequences.
    pub(crate) batch: usize,
    pub(crate) heads_q: usize,
    pub(crate) heads_kv: usize,
    /// The most queries, and the most keys, of a sequence. In tensors without packing, the size of the axis.
    pub(crate) seq_q: usize,
    pub(crate) seq_kv: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
}

impl Dims {
    /// Query heads that share one key/value head; 0 without heads.
    pub(crate) fn group(&self) -> usize {
        // It is computed for every row, and most problems need no division.
        if self.heads_q == self.heads_kv {
            return self.heads_q.min(1);
        }
        self.heads_q.checked_div(self.heads_kv).unwrap_or(0)
    }

    /// Query rows of the longest sequence that share one key/value head, and so each tile of its keys and values.
    ///
    /// Row `r` is query `r / group` of the group's head `r % group`: neighbouring rows have nearly the same position, so the
    /// rows of a tile see nearly the same keys.
    pub(crate) fn rows(&self) -> usize {
        self.seq_q.saturating_mul(self.group())
    }

    /// The sequence and the key/value head of head `head`, counted through all sequences.
    pub(crate) fn batch_and_head(&self, head: usize) -> (usize, usize) {
        (head / self.heads_kv, head % self.heads_kv)
    }

    /// The query heads that share key/value head `head_kv`.
    pub(crate) fn group_heads(&self, head_kv: usize) -> Range<usize> {
        let group = self.group();
        head_kv * group..(head_kv + 1) * group
    }

    pub(crate) fn scores_shape(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.seq_q, self.seq_kv]
    }
}

/// A checked call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Problem<'a> {
    pub(crate) dims: Dims,
    pub(crate) q: AnyTensor<'a>,
    pub(crate) k: AnyTensor<'a>,
    pub(crate) v: AnyTensor<'a>,
    /// Where the keys and values of each sequence lie in their tensors.
    pub(crate) places: Places<'a>,
    pub(crate) scale: f32,
    pub(crate) sequences: Sequences<'a>,
    pub(crate) masks: Masks<'a>,
    pub(crate) score_mods: ScoreMods<'a>,
}

impl<'a> Problem<'a> {
    /// Whether the heads of a key lie side by side in memory, as in `[batch, seq, heads, dim]`.
    pub(crate) fn has_heads_side_by_side(&self) -> bool {
        let [page, head, row, _] = with_elements!(&self.k, k => *k.strides());
        // A page of one key has no next row.
        let key = if self.places.has_pages_of_one() { page } else { row };
        self.dims.heads_kv > 1 && head.unsigned_abs() < key.unsigned_abs()
    }

    pub(crate) fn new(options: &'a Options<'a>, q: AnyTensorRef<'a>, kv: KeysValues<'a>) -> Result<Self, Error> {
        Self::with_query_starts(options, options.query_starts, q, kv)
    }

    /// As [`Problem::new`], with other query starts than those of the options.
    pub(crate) fn with_query_starts(
        options: &'a Options<'a>,
        query_starts: Option<Integers<'a>>,
        q: AnyTensorRef<'a>,
        kv: KeysValues<'a>,
    ) -> Result<Self, Error> {
        let q = of_rank_4_or_packed("queries", q, query_starts.is_some())?;
        let packed = matches!(kv.places, Places::Packed(_));
        let [k, v] = [of_rank_4_or_packed("keys", kv.k, packed)?, of_rank_4_or_packed("values", kv.v, packed)?];
        Self::of_any(options, [q, k, v], (query_starts, kv.places))
    }

    /// A problem of types, shapes and places alone, for planning. All elements of a tensor are the same zero.
    pub(crate) fn of_shapes(
        options: &'a Options<'a>,
        shapes: [(DType, [usize; 4]); 3],
        (query_starts, places): (Option<Integers<'a>>, Places<'a>),
    ) -> Result<Self, Error> {
        let tensors = shapes.map(|(dtype, shape)| AnyTensor::repeated(dtype, shape));
        Self::of_any(options, tensors, (query_starts, places))
    }

    /// As [`Problem::new`], for tensors whose rank has been checked.
    pub(crate) fn of_any(
        options: &'a Options<'a>,
        [q, k, v]: [AnyTensor<'a>; 3],
        (query_starts, places): (Option<Integers<'a>>, Places<'a>),
    ) -> Result<Self, Error> {
        let shapes = [q.shape(), k.shape(), v.shape()];
        check_shapes(shapes, query_starts.is_none() && matches!(places, Places::Dense))?;
        let (batch, sequences) = check_sequences(options, query_starts, shapes, places)?;
        // Where keys lie follows from the places that the caller gave and the first keys.
        let places = options.first_keys.map_or(places, Places::From);
        let dims = check_dims(shapes, batch, &sequences, places)?;
        let scale = options.scale.unwrap_or(1.0 / (dims.head_dim.max(1) as f32).sqrt());
        // Scores are formed in units of log2. A number that overflows there would make them NaN.
        check_number("scale", scale, (scale * LOG2_E).is_finite(), "between -2.3e38 and 2.3e38")?;
        let (mut masks, score_mods) = (check_masks(options, &dims)?, check_score_mods(options, &dims)?);
        if let Places::Ring(ring) = places {
            masks.held = Some(Held(ring));
            check_held(ring, &masks, batch, &sequences)?;
        }
        check_open(&masks, &score_mods, &dims, sequences)?;
        let in_caps = score_mods.softcap.map_or(0.0, |Softcap(cap)| (scale as f64 / cap as f64) as f32);
        check_number("scale", scale, in_caps.is_finite(), "at most 3.4e38 times the softcap")?;
        options.given_twice.map_or(Ok(()), |option| Err(Error::GivenTwice { option }))?;
        Ok(Problem { dims, q, k, v, places, scale, sequences, masks, score_mods })
    }

    /// The same problem without values (a value_dim of 0).
    pub(crate) fn without_values(mut self) -> Self {
        let [batch, heads_kv, rows, _] = self.v.shape();
        self.v = AnyTensor::repeated(DType::F32, [batch, heads_kv, rows, 0]);
        self.dims.value_dim = 0;
        self
    }

    /// A problem without values (a value_dim of 0), for scores as an output.
    pub(crate) fn of_scores(options: &'a Options<'a>, [q, k]: [AnyTensorRef<'a>; 2]) -> Result<Self, Error> {
        let [q, k] = [of_rank_4_or_packed("queries", q, options.query_starts.is_some())?, of_rank_4("keys", k)?];
        let [batch, heads_kv, seq_kv, _] = k.shape();
        let no_values = AnyTensor::repeated(DType::F32, [batch, heads_kv, seq_kv, 0]);
        Self::of_any(options, [q, k, no_values], (options.query_starts, Places::Dense))
    }

    /// The same problem with scores up to `stage`: without the later modifications. At the stages before [`ScoreStage::Biased`]
    /// no key is hidden, so there is no mask either.
    pub(crate) fn at_stage(mut self, stage: ScoreStage) -> Self {
        if matches!(stage, ScoreStage::Raw | ScoreStage::Capped) {
            let softcap = self.score_mods.softcap.filter(|_| stage == ScoreStage::Capped);
            self.score_mods = ScoreMods { softcap, ..ScoreMods::default() };
            self.masks = Masks::default();
            (self.sequences.keys, self.places) = (Lengths::All(self.dims.seq_kv), Places::Dense);
        }
        self
    }

    /// Where rows `rows` of `heads` query heads of sequence `b` are in the tensors of queries and outputs: the batch index, and the
    /// rows there.
    #[inline]
    pub(crate) fn query_rows(&self, b: usize, heads: usize, rows: &Range<usize>) -> (usize, Range<usize>) {
        let (batch, first) = self.sequences.queries.place(b);
        let first = first * heads;
        (batch, first + rows.start..first + rows.end)
    }

    /// The shape of the output: a row for each of the tensor's queries.
    pub(crate) fn output_shape(&self) -> [usize; 4] {
        let [batch, heads_q, queries, _] = self.q.shape();
        [batch, heads_q, queries, self.dims.value_dim]
    }

    pub(crate) fn lse_shape(&self) -> [usize; 3] {
        let [batch, heads_q, queries, _] = self.q.shape();
        [batch, heads_q, queries]
    }

    /// Refuses an output of another shape. Packed queries may have an output of rank 3.
    pub(crate) fn checked_output<'o>(&self, out: AnyTensorMut<'o>) -> Result<AnyTensorMut<'o>, Error> {
        let packed = matches!(self.sequences.queries, Lengths::Packed(_));
        let out = if packed && out.rank() == 3 { out.insert_axis(0)?.permuted(&[0, 2, 1, 3])? } else { out };
        let got = out.shape().try_into().map_err(|_| Error::Rank { tensor: "output", expected: 4, got: out.rank() })?;
        const NAMES: [&str; 4] = ["batch", "heads_q", "seq_q", "value_dim"];
        check_shape("output", NAMES, got, self.output_shape())?;
        Ok(out)
    }

    /// Refuses log-sum-exps of another shape.
    pub(crate) fn check_lse(&self, lse: &TensorMut<'_, f32, 3>) -> Result<(), Error> {
        check_shape("lse", ["batch", "heads_q", "seq_q"], lse.shape(), self.lse_shape())
    }
}

/// Queries, keys or values: refuses another rank than 4, because `[batch, seq, hidden]` is easily taken for `[heads, seq, dim]`.
pub(crate) fn of_rank_4<'a>(tensor: &'static str, from: impl Into<AnyTensorRef<'a>>) -> Result<AnyTensor<'a>, Error> {
    of_rank_4_or_packed(tensor, from.into(), false)
}

/// As [`of_rank_4`]; packed sequences may also be `[total, heads, dim]`.
fn of_rank_4_or_packed<'a>(tensor: &'static str, from: AnyTensorRef<'a>, packed: bool) -> Result<AnyTensor<'a>, Error> {
    match from.rank() {
        4 => Ok(from.tensor),
        // The conversion has put an axis of size 1 in front.
        3 if packed => Ok(map_elements!(from.tensor, tensor => tensor.permuted([0, 2, 1, 3]))),
        got => Err(Error::Rank { tensor, expected: 4, got }),
    }
}

/// Refuses a tensor whose shape is not the one expected.
pub(crate) fn check_shape<const N: usize>(
    tensor: &'static str,
    names: [&'static str; N],
    got: [usize; N],
    expected: [usize; N],
) -> Result<(), Error> {
    for axis in 0..N {
        if got[axis] != expected[axis] {
            let (expected, got) = (expected[axis], got[axis]);
            return Err(Error::ShapeMismatch { tensor, dimension: names[axis], expected, got });
        }
    }
    Ok(())
}

/// The most query rows of one call, in all batches and heads together: 4 G.
const MAX_QUERIES: usize = u32::MAX as usize;

/// The most key/value heads of one call, in all batches together: 16 M. Each head has at least one task, and tasks are listed.
const MAX_HEADS: usize = 1 << 24;

/// The longest row of queries or values: a million elements. Tiles and blocks of up to 256 rows are copied to scratch memory.
const MAX_ROW_LEN: usize = 1 << 20;

/// Refuses tensors that don't fit together, wherever the rows of a sequence are.
///
/// * `same_batch`: whether queries and keys have a batch index for each sequence
fn check_shapes([q, k, v]: [[usize; 4]; 3], same_batch: bool) -> Result<(), Error> {
    let [batch, heads_q, _, head_dim] = q;
    let [k_batch, heads_kv, seq_kv, _] = k;
    let [.., value_dim] = v;
    const NAMES: [&str; 4] = ["batch", "heads_kv", "seq_kv", "head_dim"];
    let k_batch = if same_batch { batch } else { k_batch };
    check_shape("keys", NAMES, k, [k_batch, heads_kv, seq_kv, head_dim])?;
    check_shape("values", NAMES, v, [k_batch, heads_kv, seq_kv, value_dim])?;
    let divisible = if heads_kv == 0 { heads_q == 0 } else { heads_q.is_multiple_of(heads_kv) };
    if divisible { Ok(()) } else { Err(Error::HeadsNotDivisible { heads_q, heads_kv }) }
}

fn check_dims(
    [q, k, v]: [[usize; 4]; 3],
    batch: usize,
    sequences: &Sequences<'_>,
    places: Places<'_>,
) -> Result<Dims, Error> {
    let [q_batch, heads_q, q_rows, head_dim] = q;
    let [_, heads_kv, k_rows, _] = k;
    let [.., value_dim] = v;
    // Masks and biases have a row for each query of the tensor, padding included.
    let seq_q = if let Lengths::Packed(_) = sequences.queries { sequences.queries.largest(batch) } else { q_rows };
    let seq_kv = match places {
        Places::Dense | Places::Filled(_) | Places::From(_) => k_rows,
        _ => sequences.keys.largest(batch),
    };
    let dims = Dims { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim };
    // Broadcast dimensions can be larger than memory, but counts of rows and elements must not overflow.
    for shape in [[q_batch, heads_q, q_rows, value_dim], q, k] {
        check_size("the problem", shape)?;
    }
    // Broadcast tensors can be larger than memory, but the list of tasks and the copies of tiles must fit.
    if dims.batch > 0 && dims.rows() > 0 {
        check_limit("key/value heads in all batches", MAX_HEADS, dims.batch.saturating_mul(dims.heads_kv))?;
        check_limit("elements of a query (head_dim)", MAX_ROW_LEN, dims.head_dim)?;
        check_limit("elements of a value (value_dim)", MAX_ROW_LEN, dims.value_dim)?;
    }
    // Rows are limited, because tasks are listed: one for about 256 rows, or for 24 if decode is forced.
    let rows = [heads_q, q_rows].into_iter().fold(q_batch.max(1), usize::saturating_mul);
    check_limit("queries in all batches and heads", MAX_QUERIES, rows)?;
    Ok(dims)
}

fn check_limit(what: &'static str, limit: usize, got: usize) -> Result<(), Error> {
    if got <= limit { Ok(()) } else { Err(Error::TooMany { what, limit, got }) }
}

/// Refuses scores whose size in bytes overflows.
pub(crate) fn check_scores_size(shape: [usize; 4]) -> Result<(), Error> {
    check_size("the scores", shape)
}

/// Refuses shapes whose size in bytes overflows. A dimension of 0 counts as 1, because products of some of the dimensions must
/// not overflow either.
fn check_size(what: &'static str, shape: [usize; 4]) -> Result<(), Error> {
    let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size.max(1)));
    if elements.is_some_and(|n| n <= isize::MAX as usize / 8) { Ok(()) } else { Err(Error::TooLarge { what }) }
}

/// The number of sequences, and their lengths.
fn check_sequences<'a>(
    options: &Options<'a>,
    query_starts: Option<Integers<'a>>,
    [[q_batch, _, q_rows, _], [k_batch, _, k_rows, _], _]: [[usize; 4]; 3],
    places: Places<'a>,
) -> Result<(usize, Sequences<'a>), Error> {
    let Options { key_lengths, query_lengths, query_offset, first_keys, first_queries, .. } = *options;
    // The queries say how many sequences there are.
    let (batch, queries) = match (query_starts, query_lengths) {
        (Some(_), _) if first_queries.is_some() => return Err(Error::GivenTwice { option: "first_queries" }),
        (Some(_), Some(_)) => return Err(Error::GivenTwice { option: "query_lengths" }),
        (Some(starts), None) => {
            let batch = starts.len().saturating_sub(1);
            check_packed("queries", "query starts", (q_batch, q_rows), (starts, batch))?;
            (batch, Lengths::Packed(starts))
        }
        (None, Some(lengths)) => {
            check_lengths("query lengths", lengths, q_batch, q_rows)?;
            (q_batch, Lengths::First(lengths))
        }
        (None, None) => (q_batch, Lengths::All(q_rows)),
    };
    let queries = check_firsts("first queries", first_queries, queries, batch)?;
    let keys = match (places, key_lengths) {
        (Places::Packed(_) | Places::Pages(_) | Places::Ring(_), _) if first_keys.is_some() => {
            return Err(Error::GivenTwice { option: "first_keys" }); // such keys have no padding
        }
        (Places::Dense | Places::Filled(_) | Places::From(_) | Places::Ring(_), _) if k_batch != batch => {
            let (expected, got) = (batch, k_batch);
            return Err(Error::ShapeMismatch { tensor: "keys", dimension: "batch", expected, got });
        }
        (Places::Dense | Places::From(_), None) => Lengths::All(k_rows),
        (Places::Dense | Places::From(_), Some(lengths)) => {
            check_lengths("key lengths", lengths, batch, k_rows)?;
            Lengths::First(lengths)
        }
        // Such keys have lengths already.
        (_, Some(_)) => return Err(Error::GivenTwice { option: "key_lengths" }),
        (Places::Packed(starts), None) => {
            check_packed("keys", "key starts", (k_batch, k_rows), (starts, batch))?;
            Lengths::Packed(starts)
        }
        (Places::Filled(lengths), None) => {
            check_lengths("key lengths", lengths, batch, k_rows)?;
            Lengths::First(lengths)
        }
        (Places::Ring(ring), None) => {
            check_count("sequences of the cache", ring.lengths.len(), batch)?;
            Lengths::First(ring.lengths)
        }
        (Places::Pages(table), None) => {
            check_count("sequences of the page table", table.lengths().len(), batch)?;
            table.check_pool(k_batch, k_rows)?;
            Lengths::First(table.lengths())
        }
    };
    let keys = check_firsts("first keys", first_keys, keys, batch)?;
    if let QueryOffset::PerBatch(offsets) = query_offset {
        check_count("query offsets", offsets.len(), batch)?;
    }
    Ok((batch, Sequences { queries, keys, query_offset }))
}

fn check_lengths(what: &'static str, lengths: Integers<'_>, batch: usize, most: usize) -> Result<(), Error> {
    check_count(what, lengths.len(), batch)?;
    match lengths.iter().enumerate().find(|(_, length)| !(0..=most as i128).contains(length)) {
        None => Ok(()),
        Some((batch, got)) => Err(Error::LengthOutOfRange { what, batch, got, most }),
    }
}

/// Adds left padding to rows with a batch index for each sequence: refuses first rows after the end of a sequence.
fn check_firsts<'a>(
    what: &'static str,
    firsts: Option<Integers<'a>>,
    rows: Lengths<'a>,
    batch: usize,
) -> Result<Lengths<'a>, Error> {
    let Some(firsts) = firsts else { return Ok(rows) };
    check_count(what, firsts.len(), batch)?;
    for (b, got) in firsts.iter().enumerate() {
        let most = rows.get(b);
        if !(0..=most as i128).contains(&got) {
            return Err(Error::LengthOutOfRange { what, batch: b, got, most });
        }
    }
    let ends = match rows {
        Lengths::All(end) => Ends::All(end),
        Lengths::First(ends) => Ends::Each(ends),
        Lengths::Packed(_) | Lengths::Padded { .. } => unreachable!("such rows have no padding"),
    };
    Ok(Lengths::Padded { firsts, ends })
}

/// Refuses starts of packed sequences that are not those of `sequences` sequences in one batch of `rows` rows.
fn check_packed(
    tensor: &'static str,
    what: &'static str,
    (batch, rows): (usize, usize),
    (starts, sequences): (Integers<'_>, usize),
) -> Result<(), Error> {
    if batch != 1 {
        return Err(Error::ShapeMismatch { tensor, dimension: "batch", expected: 1, got: batch });
    }
    check_count(what, starts.len(), sequences + 1)?;
    check_starts(what, starts, rows)
}

fn check_masks<'a>(options: &'a Options<'a>, dims: &Dims) -> Result<Masks<'a>, Error> {
    let tensor = options.mask.map(|MaskTensor(mask)| {
        let fits = mask.broadcast(dims.scores_shape()).map(MaskTensor);
        fits.ok_or_else(|| not_broadcastable("mask", *mask.shape(), dims))
    });
    Ok(Masks {
        causal: options.causal.then_some(Causal),
        window: (options.window != Window::default()).then_some(options.window),
        tensor: tensor.transpose()?,
        held: None,
        open: &options.open_masks,
    })
}

/// Refuses windows over tokens that a rotating cache has overwritten. Without a window, queries see what is left.
fn check_held(ring: Ring<'_>, masks: &Masks<'_>, batch: usize, sequences: &Sequences<'_>) -> Result<(), Error> {
    let Some(Window { left: Some(left), right }) = masks.window else { return Ok(()) };
    for sequence in (0..batch).map(|b| sequences.get(b)).filter(|sequence| sequence.queries > 0) {
        let lost = ring.first as i128..sequence.keys as i128 - ring.window as i128;
        let first = sequence.position(0) - left as i128;
        let after = if masks.causal.is_some() { Some(0) } else { right };
        let last = after.map_or(i128::MAX, |after| sequence.position(sequence.queries - 1) + after as i128);
        if lost.start.max(first) < lost.end && lost.start <= last {
            let needed = sequence.keys as i128 - lost.start.max(first);
            return Err(Error::LostKeys { sequence: sequence.batch, window: ring.window, needed: needed as usize });
        }
    }
    Ok(())
}

fn check_score_mods<'a>(options: &'a Options<'a>, dims: &Dims) -> Result<ScoreMods<'a>, Error> {
    if let Some(cap) = options.softcap {
        let usable = cap.is_normal() && cap > 0.0 && (cap * LOG2_E).is_finite();
        check_number("softcap", cap, usable, "a normal number above 0 and below 2.3e38")?;
    }
    if let Some(slopes) = options.alibi {
        check_slopes(slopes, dims)?;
    }
    if let Some(Sinks(sinks)) = options.sinks {
        check_count("sinks", sinks.len(), dims.heads_q)?;
        for &sink in sinks {
            check_number("a sink", sink, sink < f32::INFINITY, "a number below infinity")?;
        }
    }
    let bias = options.bias.map(|BiasTensor(bias)| {
        let fits = bias.broadcast(dims.scores_shape()).map(BiasTensor);
        fits.ok_or_else(|| not_broadcastable("bias", bias.shape(), dims))
    });
    Ok(ScoreMods {
        softcap: options.softcap.map(Softcap),
        bias: bias.transpose()?,
        alibi: options.alibi.map(|slopes| Alibi { slopes, heads: dims.heads_q }),
        open: &options.open_score_mods,
        sinks: options.sinks,
    })
}

fn check_slopes(slopes: AlibiSlopes<'_>, dims: &Dims) -> Result<(), Error> {
    let slopes = match slopes {
        AlibiSlopes::Standard => return Ok(()),
        AlibiSlopes::PerHead(slopes) => {
            check_count("ALiBi slopes", slopes.len(), dims.heads_q)?;
            slopes
        }
        AlibiSlopes::PerBatchAndHead(slopes) => {
            check_count("ALiBi slopes of all sequences", slopes.len(), dims.batch.saturating_mul(dims.heads_q))?;
            slopes
        }
    };
    slopes.iter().try_for_each(|&slope| check_number("an ALiBi slope", slope, slope.is_finite(), "finite"))
}

/// Has users' masks and score modifications check the problem. Their indices and positions have 32 bits.
fn check_open(
    masks: &Masks<'_>,
    score_mods: &ScoreMods<'_>,
    dims: &Dims,
    sequences: Sequences<'_>,
) -> Result<(), Error> {
    if !masks.has_dynamic() && score_mods.open.is_empty() {
        return Ok(());
    }
    let sizes =
        ProblemSizes { batch: dims.batch, heads: dims.heads_q, seq_q: dims.seq_q, seq_kv: dims.seq_kv, sequences };
    if dims.heads_q > MAX_INDEX || !sequences.are_indexable(dims.batch) {
        return Err(Error::TooMany {
            what: "queries, keys or positions for a mask or score modification",
            limit: MAX_INDEX,
            got: [dims.batch, dims.heads_q, dims.seq_q, dims.seq_kv].into_iter().fold(MAX_INDEX + 1, usize::max),
        });
    }
    masks.open.iter().try_for_each(|OpenMask(mask)| mask.check(&sizes))?;
    score_mods.open.iter().try_for_each(|OpenScoreMod(open)| open.check(&sizes))
}

fn check_number(option: &'static str, got: f32, valid: bool, expected: &'static str) -> Result<(), Error> {
    if valid { Ok(()) } else { Err(Error::InvalidOption { option, got, expected }) }
}

fn not_broadcastable(tensor: &'static str, got: [usize; 4], dims: &Dims) -> Error {
    let expected = dims.scores_shape();
    let axis = (0..4).find(|&axis| got[axis] != 1 && got[axis] != expected[axis]).unwrap_or(0);
    let dimension = ["batch", "heads_q", "seq_q", "seq_kv"][axis];
    Error::NotBroadcastable { tensor, dimension, got: got[axis], expected: expected[axis] }
}
