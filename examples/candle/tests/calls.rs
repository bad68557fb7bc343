//! The two calls have candle's results, within a bound, on seeded random problems. What candle refuses is compared with candle's
//! results for its parts.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::attention::{self as candle, AttnMask};
use flashtile::{Attention, mask::FirstAndLast};
use flashtile_candle as ours;
use half::{bf16, f16};

const PROBLEMS: u64 = 1000;
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// From -1 to 1.
    fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn maybe(&mut self, number: f32) -> Option<f32> {
        (self.below(2) == 0).then_some(number)
    }

    fn contiguous(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| self.number()).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)
    }

    /// `[batch, seq, heads, dim]`, or `[seq, heads, dim]`: contiguous, or with heads before seq in memory, or a part of a longer
    /// one.
    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let seq = shape.len() - 3;
        let mut stored = shape.to_vec();
        match self.below(3) {
            0 => self.contiguous(shape, dtype),
            1 => {
                stored.swap(seq, seq + 1);
                self.contiguous(&stored, dtype)?.transpose(seq, seq + 1)
            }
            _ => {
                stored[seq] += 5;
                self.contiguous(&stored, dtype)?.narrow(seq, 3, shape[seq])
            }
        }
    }
}

/// The sizes that the bound depends on.
#[derive(Clone, Copy, Debug)]
struct Bound {
    keys: usize,
    head_dim: usize,
    scale: f32,
    softcap: Option<f32>,
    /// The largest bias.
    bias: f32,
    /// Of the result.
    dtype: DType,
}

impl Bound {
    /// How far two results in f32 may be apart, if queries, keys and values are from -1 to 1.
    ///
    /// With the unit roundoff `u = 2^-24` and the largest score `s = scale * head_dim`, a score is off by
    /// `d = u ((head_dim + 4) s + 8 softcap + 4 (s + bias))`: a sum of products, a tanh, and the addition of a bias. A weighted
    /// mean of `n` values has an error of `2 d`, of two sums of `n` terms, and of `n` rescalings: `2 d + (4 n + 16) u`. There
    /// are two results. Each is rounded to its type.
    fn value(self) -> f32 {
        let u = 2.0f32.powi(-24);
        let score = self.scale.abs() * self.head_dim as f32;
        let cap = self.softcap.unwrap_or(0.0);
        let of_score = u * ((self.head_dim as f32 + 4.0) * score + 8.0 * cap + 4.0 * (score + self.bias));
        let rounded = match self.dtype {
            DType::F16 => 2.0f32.powi(-11),
            DType::BF16 => 2.0f32.powi(-8),
            _ => 0.0,
        };
        2.0 * (2.0 * of_score + (4.0 * self.keys as f32 + 16.0) * u + rounded)
    }
}

fn compare(ours: &Tensor, theirs: &Tensor, bound: Bound, what: &dyn std::fmt::Debug) -> Result<()> {
    assert_eq!((ours.dims(), ours.dtype()), (theirs.dims(), theirs.dtype()), "{what:?}");
    assert_close(ours, theirs, bound, what)
}

fn assert_close(ours: &Tensor, theirs: &Tensor, bound: Bound, what: &dyn std::fmt::Debug) -> Result<()> {
    let numbers = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    for (n, (a, b)) in numbers(ours)?.into_iter().zip(numbers(theirs)?).enumerate() {
        assert!(
            (a - b).abs() <= bound.value(),
            "element {n}: {a} and {b}, bound {}, {bound:?} {what:?}",
            bound.value()
        );
    }
    Ok(())
}

/// One call of `flash_attn`.
#[derive(Clone, Debug)]
struct Call {
    scale: f32,
    mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
}

impl Call {
    fn ours(&self, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let Call { scale, mask, max_bias, softcap } = self.clone();
        match q.dtype() {
            DType::F32 => ours::flash_attn::<f32>(q, k, v, scale, mask, max_bias, softcap),
            DType::F16 => ours::flash_attn::<f16>(q, k, v, scale, mask, max_bias, softcap),
            _ => ours::flash_attn::<bf16>(q, k, v, scale, mask, max_bias, softcap),
        }
    }

    /// candle's result. Its causal call for a single query (candle 0.11.1) can't be the measure: it rounds the scores of halves
    /// to their type, and with a softcap alone it adds ALiBi with a slope of 1. A single query sees all keys, so a call in f32,
    /// and without a mask if there is no ALiBi, has the same meaning.
    fn candle(&self, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let Call { scale, mask, max_bias, softcap } = self.clone();
        let [q, k, v] = qkv;
        if q.dim(0)? == 1 && q.dim(1)? == 1 && mask.is_causal() {
            let [q, k, v] = &[q.to_dtype(DType::F32)?, k.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?];
            let mask = if max_bias.is_some() { mask } else { AttnMask::None };
            return candle::flash_attn::<f32>(q, k, v, scale, mask, max_bias, softcap);
        }
        match q.dtype() {
            DType::F32 => candle::flash_attn::<f32>(q, k, v, scale, mask, max_bias, softcap),
            DType::F16 => candle::flash_attn::<f16>(q, k, v, scale, mask, max_bias, softcap),
            _ => candle::flash_attn::<bf16>(q, k, v, scale, mask, max_bias, softcap),
        }
    }

    /// candle's result for each sequence alone.
    fn candle_by_sequence(&self, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let one = |b: usize| {
            let [q, k, v] = &[q.narrow(0, b, 1)?, k.narrow(0, b, 1)?, v.narrow(0, b, 1)?];
            let mask = match &self.mask {
                AttnMask::Mask(mask) if mask.rank() == 4 => AttnMask::Mask(mask.narrow(0, b, 1)?),
                other => other.clone(),
            };
            Call { mask, ..self.clone() }.candle([q, k, v])
        };
        Tensor::cat(&(0..q.dim(0)?).map(one).collect::<Result<Vec<_>>>()?, 0)
    }

    fn largest_bias(&self, keys: usize) -> f32 {
        let mask = if matches!(self.mask, AttnMask::Mask(_)) { 1.0 } else { keys as f32 };
        if self.max_bias.is_some() { mask } else { 1.0 }
    }
}

/// -inf hides a key; the first one stays visible.
fn random_mask(random: &mut Random, shape: &[usize], dtype: DType) -> Result<AttnMask> {
    let keys = shape[shape.len() - 1];
    let number =
        |n: usize| if !n.is_multiple_of(keys) && random.below(3) == 0 { f32::NEG_INFINITY } else { random.number() };
    let numbers: Vec<f32> = (0..shape.iter().product()).map(number).collect();
    Ok(AttnMask::Mask(Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_dtype(dtype)?))
}

#[test]
fn flash_attn_has_candles_results() -> Result<()> {
    for seed in 0..PROBLEMS {
        let random = &mut Random(seed);
        let (dtype, heads_kv, repeats) = (random.of(&TYPES), 1 + random.below(3), 1 + random.below(4));
        let (batch, head_dim) = (random.of(&[1, 1, 1, 2, 3]), random.of(&[8, 20, 64]));
        let heads_q = heads_kv * repeats;
        let (seq_q, before) = (random.of(&[1, 1, 2, 7, 33, 70]), random.of(&[0, 1, 40, 130]));
        let seq_kv = seq_q + before;
        let mask = match random.below(3) {
            0 => AttnMask::None,
            1 => AttnMask::causal_with_offset(before),
            _ if random.below(2) == 0 => random_mask(random, &[seq_q, seq_kv], dtype)?,
            _ => random_mask(random, &[batch, 1, seq_q, seq_kv], dtype)?,
        };
        let scale = 2.0 / (head_dim as f32).sqrt();
        let call = Call { scale, mask, max_bias: random.maybe(8.0), softcap: random.maybe(1.5) };
        let q = random.tensor(&[batch, seq_q, heads_q, head_dim], dtype)?;
        let k = random.tensor(&[batch, seq_kv, heads_kv, head_dim], dtype)?;
        let v = random.tensor(&[batch, seq_kv, heads_kv, head_dim], dtype)?;

        let result = call.ours([&q, &k, &v])?;
        let refused = call.softcap.is_some() || dtype == DType::BF16 || matches!(call.mask, AttnMask::Mask(_));
        let bias = call.largest_bias(seq_kv);
        let bound = Bound { keys: seq_kv, head_dim, scale, softcap: call.softcap, bias, dtype: result.dtype() };
        let what = (seed, dtype, q.dims(), k.dims(), &call.max_bias);
        if batch == 1 || !refused {
            compare(&result, &call.candle([&q, &k, &v])?, bound, &what)?;
        } else if !(matches!(call.mask, AttnMask::None) && call.max_bias.is_some()) {
            // (candle has ALiBi without a mask for batches alone.)
            assert_eq!(result.dtype(), dtype);
            assert_close(&result, &call.candle_by_sequence([&q, &k, &v])?, bound, &what)?;
        }
    }
    Ok(())
}

#[test]
fn varlen_has_candles_results() -> Result<()> {
    for seed in 0..PROBLEMS {
        let random = &mut Random(seed);
        let (dtype, heads_kv, repeats) = (random.of(&TYPES), 1 + random.below(3), 1 + random.below(4));
        let (heads_q, head_dim) = (heads_kv * repeats, random.of(&[8, 20, 64]));
        let queries: Vec<u32> = (0..1 + random.below(4)).map(|_| random.of(&[0, 1, 1, 5, 40])).collect();
        let keys: Vec<u32> = queries.iter().map(|queries| queries + random.of(&[0, 1, 60])).collect();
        let (total_q, total_k) = (queries.iter().sum::<u32>() as usize, keys.iter().sum::<u32>() as usize);
        let causal = random.below(2) == 0;
        let (left, right) = random.of(&[(None, None), (Some(3), None), (Some(20), Some(2)), (Some(0), Some(0))]);
        let slopes = (0..heads_q).map(|_| random.number()).collect::<Vec<_>>();
        let slopes = (random.below(2) == 0).then(|| Tensor::new(slopes, &Device::Cpu)).transpose()?;
        let lengths = [Tensor::new(queries, &Device::Cpu)?, Tensor::new(keys.clone(), &Device::Cpu)?];
        let q = random.tensor(&[total_q, heads_q, head_dim], dtype)?;
        let k = random.tensor(&[total_k, heads_kv, head_dim], dtype)?;
        let v = random.tensor(&[total_k, heads_kv, head_dim], dtype)?;

        let scale = 2.0 / (head_dim as f32).sqrt();
        let call = |call: Varlen, dtype: DType| {
            let [q, k, v] = &[q.to_dtype(dtype)?, k.to_dtype(dtype)?, v.to_dtype(dtype)?];
            call(q, k, v, slopes.as_ref(), &lengths[0], &lengths[1], 0, 0, scale, causal, left, right)
        };
        let result = call(ours::flash_attn_varlen_cpu, dtype)?;
        let longest = keys.into_iter().max().unwrap_or(0) as usize;
        let bound = Bound { keys: longest, head_dim, scale, softcap: None, bias: longest as f32, dtype };
        let what = (seed, q.dims(), k.dims(), causal, left, right);
        assert_eq!((result.dtype(), result.dims()), (dtype, q.dims()));
        // candle refuses bf16. The numbers are exact in f32.
        let theirs = call(candle::flash_attn_varlen_cpu, if dtype == DType::BF16 { DType::F32 } else { dtype })?;
        assert_close(&result, &theirs, bound, &what)?;
    }
    Ok(())
}

#[allow(clippy::type_complexity)] // candle's signature
type Varlen = fn(
    &Tensor,
    &Tensor,
    &Tensor,
    Option<&Tensor>,
    &Tensor,
    &Tensor,
    usize,
    usize,
    f32,
    bool,
    Option<usize>,
    Option<usize>,
) -> Result<Tensor>;

/// A single query is at the last key, whatever its offset, as with candle.
#[test]
fn a_single_query_sees_all_keys() -> Result<()> {
    let random = &mut Random(0);
    let (q, kv) = (random.tensor(&[1, 1, 4, 64], DType::F32)?, random.tensor(&[1, 50, 2, 64], DType::F32)?);
    let scale = 0.125;
    let call = Call { scale, mask: AttnMask::causal(), max_bias: None, softcap: None };
    let bound = Bound { keys: 50, head_dim: 64, scale, softcap: None, bias: 0.0, dtype: DType::F32 };
    compare(&call.ours([&q, &kv, &kv])?, &call.candle([&q, &kv, &kv])?, bound, &"one query")
}

/// Keys and values of another type than the queries, and values of another size than keys: candle has neither.
#[test]
fn types_and_sizes_may_differ() -> Result<()> {
    let random = &mut Random(0);
    let q = random.tensor(&[2, 9, 4, 64], DType::F32)?;
    let k = random.tensor(&[2, 30, 2, 64], DType::F16)?;
    let v = random.tensor(&[2, 30, 2, 24], DType::BF16)?;
    let out = ours::attend(&Attention::new().causal(), &q, &k, &v)?;
    let [k, v] = [k.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?];
    // Zeros in further elements change no score.
    let padded = v.pad_with_zeros(3, 0, 40)?;
    let call = Call { scale: 0.125, mask: AttnMask::causal_with_offset(21), max_bias: None, softcap: None };
    let theirs = call.candle([&q, &k, &padded])?.narrow(3, 0, 24)?;
    let bound = Bound { keys: 30, head_dim: 64, scale: 0.125, softcap: None, bias: 0.0, dtype: DType::F32 };
    compare(&out, &theirs, bound, &"mixed")
}

/// candle uses the mask of the first head for all.
#[test]
fn heads_have_masks_of_their_own() -> Result<()> {
    let random = &mut Random(0);
    let (q, k) = (random.tensor(&[1, 20, 4, 64], DType::F32)?, random.tensor(&[1, 30, 2, 64], DType::F32)?);
    let mask = random.contiguous(&[1, 4, 20, 30], DType::F32)?;
    let call = |mask: &Tensor| Call { scale: 0.125, mask: AttnMask::Mask(mask.clone()), max_bias: None, softcap: None };
    let ours = call(&mask).ours([&q, &k, &k])?;
    let bound = Bound { keys: 30, head_dim: 64, scale: 0.125, softcap: None, bias: 1.0, dtype: DType::F32 };
    for head in 0..4 {
        let (q, k, mask) = (q.narrow(2, head, 1)?, k.narrow(2, head / 2, 1)?, mask.narrow(1, head, 1)?);
        compare(&ours.narrow(1, head, 1)?, &call(&mask).candle([&q, &k, &k])?, bound, &head)?;
    }
    Ok(())
}

/// Any option of flashtile: a mask by rule and sinks, against a mask tensor and a key of its own.
#[test]
fn attend_takes_any_attention() -> Result<()> {
    let random = &mut Random(0);
    let [q, k, v] = [&[1, 40, 2, 64]; 3].map(|shape| random.contiguous(shape, DType::F32));
    let (q, k, v) = (q?, k?, v?);
    let mask = FirstAndLast::new(2, 5);
    let ours = ours::attend(&Attention::new().masked_by(&mask).sinks(&[0.0, 0.0]), &q, &k, &v)?;

    // A sink of 0 is a key of zeros whose value is 0.
    let (k, v) = (k.pad_with_zeros(1, 0, 1)?, v.pad_with_zeros(1, 0, 1)?);
    let seen = |i: usize, j: usize| j == 40 || (j <= i && (j < 2 || i - j <= 5));
    let hide = |n: usize| if seen(n / 41, n % 41) { 0.0 } else { f32::NEG_INFINITY };
    let mask = Tensor::from_vec((0..40 * 41).map(hide).collect::<Vec<f32>>(), (40, 41), &Device::Cpu)?;
    let call = Call { scale: 0.125, mask: AttnMask::Mask(mask), max_bias: None, softcap: None };
    let bound = Bound { keys: 41, head_dim: 64, scale: 0.125, softcap: None, bias: 0.0, dtype: DType::F32 };
    compare(&ours, &call.candle([&q, &k, &v])?, bound, &"sinks")
}

#[test]
fn refusals_name_the_numbers() -> Result<()> {
    let random = &mut Random(0);
    let q = random.tensor(&[2, 3, 4, 8], DType::F32)?;
    let k = random.tensor(&[2, 9, 2, 8], DType::F32)?;
    let causal = |offset| ours::flash_attn::<f32>(&q, &k, &k, 1.0, AttnMask::causal_with_offset(offset), None, None);
    causal(6)?;
    let message = causal(0).unwrap_err().to_string();
    assert!(message.contains("kv_offset 0 does not put the last of 3 queries at the last of 9 keys"), "{message}");

    let message = ours::flash_attn::<f16>(&q, &k, &k, 1.0, AttnMask::None, None, None).unwrap_err().to_string();
    assert!(message.contains("the queries are F32, but the call is for F16"), "{message}");

    let integers = Tensor::zeros((2, 9, 2, 8), DType::U8, &Device::Cpu)?;
    let message = ours::flash_attn::<f32>(&q, &integers, &k, 1.0, AttnMask::None, None, None).unwrap_err().to_string();
    assert!(message.contains("not with U8"), "{message}");

    let short = Tensor::new(&[2u32], &Device::Cpu)?;
    let (q, k) = (q.get(0)?, k.get(0)?);
    let call = ours::flash_attn_varlen_cpu(&q, &k, &k, None, &short, &short, 0, 0, 1.0, false, None, None);
    let message = call.unwrap_err().to_string();
    assert!(message.contains("the lengths of the queries add up to 2, but there are 3"), "{message}");
    Ok(())
}
