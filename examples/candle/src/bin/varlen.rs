//! Packed sequences on the same tensors: flashtile's `flash_attn_varlen_cpu` against candle's. See README.md.

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::attention::{self as candle, AttnMask};
use clap::Parser;
use flashtile_candle as ours;
use half::{bf16, f16};
use std::time::Instant;

/// Measures causal attention of packed sequences by each library, in turns. RAYON_NUM_THREADS sets the threads of both.
#[derive(Parser)]
struct Arguments {
    /// Only rows with this text in their name and type
    #[arg(long, default_value = "")]
    filter: String,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// Sequences with 32 query heads on 8 of 128 elements.
struct Workload {
    name: &'static str,
    /// Queries and keys of each.
    lengths: &'static [(usize, usize)],
}

const HEADS_Q: usize = 32;
const HEADS_KV: usize = 8;
const DIM: usize = 128;
const SCALE: f32 = 0.088_388_35; // 1 / sqrt(DIM)

const WORKLOADS: [Workload; 4] = [
    Workload { name: "decode", lengths: &[(1, 8192)] },
    Workload {
        name: "decode_batch",
        lengths: &[(1, 500), (1, 900), (1, 1300), (1, 1700), (1, 2100), (1, 2500), (1, 2900), (1, 3300)],
    },
    Workload {
        name: "mixed",
        lengths: &[(128, 600), (1, 500), (1, 900), (1, 1300), (128, 1700), (1, 2100), (1, 2500), (1, 2900), (1, 3300)],
    },
    Workload { name: "prompts", lengths: &[(300, 300), (20, 20), (150, 150), (1, 1), (75, 75)] },
];

/// The tensors of a workload.
struct Problem<'w> {
    workload: &'w Workload,
    /// `[total, heads, dim]`
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// `[sequences]`
    lengths_q: Tensor,
    lengths_k: Tensor,
}

impl<'w> Problem<'w> {
    fn new(workload: &'w Workload, dtype: DType) -> Result<Self> {
        let lengths = |of: fn(&(usize, usize)) -> usize| -> Vec<u32> {
            workload.lengths.iter().map(|length| of(length) as u32).collect()
        };
        let (queries, keys) = (lengths(|length| length.0), lengths(|length| length.1));
        let rows = |lengths: &[u32], heads| {
            let shape = (lengths.iter().sum::<u32>() as usize, heads, DIM);
            Tensor::rand(-1.0f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype)
        };
        Ok(Self {
            workload,
            q: rows(&queries, HEADS_Q)?,
            k: rows(&keys, HEADS_KV)?,
            v: rows(&keys, HEADS_KV)?,
            lengths_q: Tensor::new(queries, &Device::Cpu)?,
            lengths_k: Tensor::new(keys, &Device::Cpu)?,
        })
    }

    fn flashtile(&self) -> Result<Tensor> {
        let Self { q, k, v, lengths_q, lengths_k, .. } = self;
        ours::flash_attn_varlen_cpu(q, k, v, None, lengths_q, lengths_k, 0, 0, SCALE, true, None, None)
    }

    fn candle_varlen(&self) -> Result<Tensor> {
        let Self { q, k, v, lengths_q, lengths_k, .. } = self;
        candle::flash_attn_varlen_cpu(q, k, v, None, lengths_q, lengths_k, 0, 0, SCALE, true, None, None)
    }

    /// candle's other function, which takes bf16: a call for each sequence. The results stay apart.
    fn candle_by_sequence(&self) -> Result<Vec<Tensor>> {
        let (mut first_q, mut first_k) = (0, 0);
        let one = |&(queries, keys): &(usize, usize)| {
            let part = |all: &Tensor, first, rows| all.narrow(0, first, rows)?.unsqueeze(0);
            let q = &part(&self.q, first_q, queries)?;
            let [k, v] = [&self.k, &self.v].map(|all| part(all, first_k, keys));
            (first_q, first_k) = (first_q + queries, first_k + keys);
            // A single query sees all keys. With a causal mask, candle 0.11.1 rounds its scores of halves to their type.
            let mask = if queries == 1 { AttnMask::None } else { AttnMask::causal_with_offset(keys - queries) };
            match q.dtype() {
                DType::F32 => candle::flash_attn::<f32>(q, &k?, &v?, SCALE, mask, None, None),
                DType::F16 => candle::flash_attn::<f16>(q, &k?, &v?, SCALE, mask, None, None),
                _ => candle::flash_attn::<bf16>(q, &k?, &v?, SCALE, mask, None, None),
            }
        };
        self.workload.lengths.iter().map(one).collect()
    }

    /// How far two results may be apart: the bound of `tests/calls.rs` for the longest sequence.
    fn bound(&self) -> f32 {
        let (u, dim) = (2.0f32.powi(-24), DIM as f32);
        let keys = self.workload.lengths.iter().map(|length| length.1).max().unwrap_or(0) as f32;
        let score = u * (dim + 8.0) * SCALE * dim;
        let rounded = match self.q.dtype() {
            DType::F16 => 2.0f32.powi(-11),
            DType::BF16 => 2.0f32.powi(-8),
            _ => 0.0,
        };
        2.0 * (2.0 * score + (4.0 * keys + 16.0) * u + rounded)
    }

    /// Fails if candle's two results and flashtile's are not the same within the bound.
    fn check(&self) -> Result<()> {
        let out = self.flashtile()?.to_dtype(DType::F32)?;
        let check = |theirs: &Tensor, what: &str| {
            let difference = (theirs - &out)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            match difference <= self.bound() {
                true => Ok(()),
                false => bail!("{what} differs by {difference}, bound {}", self.bound()),
            }
        };
        if self.q.dtype() != DType::BF16 {
            check(&self.candle_varlen()?.to_dtype(DType::F32)?, "candle's varlen")?;
        }
        // `[1, heads, queries, dim]` each
        let by_sequence: Result<Vec<_>> =
            self.candle_by_sequence()?.iter().map(|out| out.squeeze(0)?.transpose(0, 1)).collect();
        check(&Tensor::cat(&by_sequence?, 0)?, "candle by sequence")
    }
}

/// The mean time of a call in milliseconds, over 2 ms of calls, after one that is not counted.
fn timed<T>(call: impl Fn() -> Result<T>) -> Result<f64> {
    call()?;
    let (start, mut calls) = (Instant::now(), 0);
    while calls == 0 || start.elapsed().as_secs_f64() < 2e-3 {
        call()?;
        calls += 1;
    }
    Ok(1e3 * start.elapsed().as_secs_f64() / calls as f64)
}

/// A row of the table.
fn row(workload: &Workload, dtype: DType, rounds: usize) -> Result<String> {
    let problem = Problem::new(workload, dtype)?;
    problem.check()?;
    let mut best = [f64::INFINITY; 3];
    for _ in 0..rounds.max(1) {
        best[0] = best[0].min(timed(|| problem.flashtile())?);
        if dtype != DType::BF16 {
            best[1] = best[1].min(timed(|| problem.candle_varlen())?);
        }
        best[2] = best[2].min(timed(|| problem.candle_by_sequence())?);
    }
    let [ours, varlen, by_sequence] = best;
    let times = |theirs: f64| format!("{theirs:.3} ms ({:.1})", theirs / ours);
    let varlen = if varlen.is_finite() { times(varlen) } else { "refused".to_string() };
    let (name, dtype) = (workload.name, dtype.as_str());
    Ok(format!("| {name} | {dtype} | {ours:.3} ms | {varlen} | {} |", times(by_sequence)))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    println!("| workload | type | flashtile | candle, varlen | candle, a call for each sequence |");
    println!("|---|---|---:|---:|---:|");
    for workload in &WORKLOADS {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            if format!("{} {}", workload.name, dtype.as_str()).contains(&arguments.filter) {
                println!("{}", row(workload, dtype, arguments.rounds)?);
            }
        }
    }
    Ok(())
}
