//! flashtile against candle's `attention::flash_attn` and burn-flex's attention, on the same numbers: see README.md.

#[path = "../../support/seeded.rs"]
mod seeded;

use burn_backend::ops::{AttentionModuleOptions, ModuleOps};
use burn_backend::{Element as BurnElement, TensorData};
use burn_flex::{Flex, FlexTensor};
use candle_core::{Device, Tensor, WithDType};
use candle_nn::attention::{AttnMask, flash_attn};
use flashtile::{Attention, QueryOffset, TensorMut, TensorRef, Workspace, reference};
use half::{bf16, f16};
use seeded::Rng;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// The time of all rounds of one row. `MIN_ROUNDS` are measured in any case.
const ROW_TIME: Duration = Duration::from_secs(4);
const MIN_ROUNDS: usize = 3;
/// Contestants whose first call takes longer are not called again.
const SLOW: f64 = 1.0;
/// The least time of a sample. Shorter calls are repeated.
const SAMPLE_SECONDS: f64 = 2e-3;
const SAMPLED_ROWS: usize = 32;

/// The table that `compare.py` reads, too.
const WORKLOADS: &str = include_str!("../workloads.csv");

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    Causal,
    /// Causal, with this many keys before the query's own.
    Window(usize),
    Mask,
    Bias,
}

struct Workload {
    name: String,
    dtype: String,
    batch: usize,
    heads_q: usize,
    heads_kv: usize,
    seq_q: usize,
    seq_kv: usize,
    dim: usize,
    kind: Kind,
}

fn workloads() -> Vec<Workload> {
    let mut all = Vec::new();
    for line in WORKLOADS.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let size = |at: usize| cells[at].parse().expect("a size");
        let kind = match cells[7].split_once(' ') {
            Some(("window", left)) => Kind::Window(left.parse().expect("a window")),
            _ => match cells[7] {
                "plain" => Kind::Plain,
                "causal" => Kind::Causal,
                "mask" => Kind::Mask,
                "bias" => Kind::Bias,
                other => panic!("workloads.csv: no option is called {other}"),
            },
        };
        for dtype in cells[8].split(' ') {
            all.push(Workload {
                name: cells[0].to_string(),
                dtype: dtype.to_string(),
                batch: size(1),
                heads_q: size(2),
                heads_kv: size(3),
                seq_q: size(4),
                seq_kv: size(5),
                dim: size(6),
                kind,
            });
        }
    }
    all
}

impl Workload {
    /// Whether the options that all queries share show key `j` to query `i`.
    fn sees(&self, i: usize, j: usize) -> bool {
        let place = i + self.seq_kv - self.seq_q;
        match self.kind {
            Kind::Plain | Kind::Mask | Kind::Bias => true,
            Kind::Causal => j <= place,
            Kind::Window(left) => j <= place && j + left >= place,
        }
    }

    fn options(&self) -> Attention<'static> {
        match self.kind {
            Kind::Plain | Kind::Mask | Kind::Bias => Attention::new(),
            Kind::Causal => Attention::new().causal(),
            Kind::Window(left) => Attention::new().causal().window(Some(left), None),
        }
    }
}

/// What all three crates take.
trait Number: flashtile::Element + BurnElement + WithDType + num_traits::Float {
    const ROUNDOFF: f64;
}

impl Number for f32 {
    const ROUNDOFF: f64 = 1.0 / 16_777_216.0;
}
impl Number for f16 {
    const ROUNDOFF: f64 = 1.0 / 2048.0;
}
impl Number for bf16 {
    const ROUNDOFF: f64 = 1.0 / 256.0;
}

/// A workload's numbers, `[batch, heads, seq, dim]` each.
struct Problem<'a, T> {
    workload: &'a Workload,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    mask: Vec<bool>,
    bias: Vec<T>,
    /// Batch, head and query of the rows that are checked.
    rows: Vec<[usize; 3]>,
    expected: Vec<Vec<f64>>,
    tolerance: Vec<Vec<f64>>,
}

impl<'a, T: Number> Problem<'a, T> {
    fn new(workload: &'a Workload) -> Self {
        let (w, mut rng) = (workload, Rng(20261123));
        let q = rng.normals(w.batch * w.heads_q * w.seq_q * w.dim);
        let k = rng.normals(w.batch * w.heads_kv * w.seq_kv * w.dim);
        let v = rng.normals(w.batch * w.heads_kv * w.seq_kv * w.dim);
        let pairs = w.seq_q * w.seq_kv;
        let mask = (0..if w.kind == Kind::Mask { pairs } else { 0 }).map(|_| !rng.one_in(8)).collect();
        let bias = rng.normals(if w.kind == Kind::Bias { w.heads_q * pairs } else { 0 });
        let mut rows = vec![[0, 0, 0], [w.batch - 1, w.heads_q - 1, w.seq_q - 1]];
        rows.resize_with(SAMPLED_ROWS, || [rng.below(w.batch), rng.below(w.heads_q), rng.below(w.seq_q)]);
        let mut problem = Self { workload, q, k, v, mask, bias, rows, expected: Vec::new(), tolerance: Vec::new() };
        (problem.expected, problem.tolerance) = problem.rows.iter().map(|&row| problem.row(row)).unzip();
        problem
    }

    /// A row of the output by the definition, in f64, and its tolerance.
    fn row(&self, [b, h, i]: [usize; 3]) -> (Vec<f64>, Vec<f64>) {
        let w = self.workload;
        let head = b * w.heads_kv + h / (w.heads_q / w.heads_kv);
        let q = &self.q[((b * w.heads_q + h) * w.seq_q + i) * w.dim..][..w.dim];
        let [k, v] = [&self.k, &self.v].map(|x| &x[head * w.seq_kv * w.dim..][..w.seq_kv * w.dim]);
        let keys = [1, 1, w.seq_kv, w.dim];
        let mut options = w.options().query_offset(QueryOffset::At((i + w.seq_kv - w.seq_q) as isize));
        if w.kind == Kind::Mask {
            options = options.mask(tensor(&self.mask[i * w.seq_kv..][..w.seq_kv], [1, 1, 1, w.seq_kv]));
        }
        if w.kind == Kind::Bias {
            options = options.bias(tensor(&self.bias[(h * w.seq_q + i) * w.seq_kv..][..w.seq_kv], [1, 1, 1, w.seq_kv]));
        }
        let by_definition =
            |v| reference::attention(&options, tensor(q, [1, 1, 1, w.dim]), (tensor(k, keys), v)).expect("a problem").out;
        let sizes: Vec<T> = v.iter().map(|x| x.abs()).collect();
        let (expected, weighted) = (by_definition(tensor(v, keys)), by_definition(tensor(&sizes, keys)));
        // Scores that are sums in f32 are off by at most `score`, so probs by about twice that in proportion; probs and
        // outputs may be rounded to the type; sums over keys are in f32.
        let product = |key: &[T]| q.iter().zip(key).map(|(q, k)| (wide(*q) * wide(*k)).abs()).sum::<f64>();
        let largest = k.chunks(w.dim).map(product).fold(0.0, f64::max);
        let score = (w.dim as f64).sqrt() * f32::ROUNDOFF * largest;
        let relative = 2.0 * score + w.seq_kv as f64 * f32::ROUNDOFF + 2.0 * T::ROUNDOFF;
        (expected, weighted.iter().map(|x| relative * x).collect())
    }

    /// The largest error of the checked rows, and the largest in proportion to what is tolerated; `out` is
    /// `[batch, heads, seq, dim]`.
    fn judge(&self, out: &[T]) -> (f64, f64) {
        let (w, mut largest, mut of_tolerance) = (self.workload, 0.0f64, 0.0f64);
        for (row, &[b, h, i]) in self.rows.iter().enumerate() {
            let out = &out[((b * w.heads_q + h) * w.seq_q + i) * w.dim..][..w.dim];
            for (d, &x) in out.iter().enumerate() {
                let error = (wide(x) - self.expected[row][d]).abs();
                let error = if error.is_nan() { f64::INFINITY } else { error };
                largest = largest.max(error);
                of_tolerance = of_tolerance.max(error / self.tolerance[row][d]);
            }
        }
        (largest, of_tolerance)
    }
}

fn wide<T: Number>(x: T) -> f64 {
    WithDType::to_f64(x)
}

fn tensor<T: Copy>(data: &[T], shape: [usize; 4]) -> TensorRef<'_, T> {
    TensorRef::from_slice(data, shape).expect("the length is that of the shape")
}

/// A call that computes once. It returns the output, `[batch, heads, seq, dim]`, if its argument says so, or why it can't.
type Call<'p, T> = Box<dyn FnMut(bool) -> Result<Vec<T>, String> + 'p>;

fn ours<'p, T: Number>(p: &'p Problem<'_, T>) -> Result<Call<'p, T>, String> {
    let w = p.workload;
    let (queries, keys) = ([w.batch, w.heads_q, w.seq_q, w.dim], [w.batch, w.heads_kv, w.seq_kv, w.dim]);
    let mut options: Attention<'p> = w.options();
    if w.kind == Kind::Mask {
        options = options.mask(tensor(&p.mask, [1, 1, w.seq_q, w.seq_kv]));
    }
    if w.kind == Kind::Bias {
        options = options.bias(tensor(&p.bias, [1, w.heads_q, w.seq_q, w.seq_kv]));
    }
    let (mut out, mut workspace) = (p.q.clone(), Workspace::new());
    Ok(Box::new(move |wanted| {
        let target = TensorMut::from_slice(&mut out, queries).expect("the queries' size");
        options
            .compute(tensor(&p.q, queries), (tensor(&p.k, keys), tensor(&p.v, keys)), target, None, &mut workspace)
            .expect("a problem");
        Ok(if wanted { out.clone() } else { Vec::new() })
    }))
}

/// Its tensors are `[batch, seq, heads, dim]`; of f16 and bf16 it makes f32, which is judged once it is rounded.
fn candle<'p, T: Number>(p: &'p Problem<'_, T>) -> Result<Call<'p, T>, String> {
    let (w, cpu) = (p.workload, Device::Cpu);
    let given = |data: &[T], heads, seq| {
        let by_heads = Tensor::from_slice(data, (w.batch, heads, seq, w.dim), &cpu)?;
        by_heads.transpose(1, 2)?.contiguous()
    };
    let tensors = || {
        let keys = given(&p.k, w.heads_kv, w.seq_kv)?;
        candle_core::Result::Ok((given(&p.q, w.heads_q, w.seq_q)?, keys, given(&p.v, w.heads_kv, w.seq_kv)?))
    };
    let (q, k, v) = tensors().map_err(|error| error.to_string())?;
    let mask = match w.kind {
        Kind::Plain => AttnMask::None,
        Kind::Causal => AttnMask::causal_with_offset(w.seq_kv - w.seq_q),
        Kind::Bias => return Err("its mask is one for all heads".to_string()),
        Kind::Window(_) | Kind::Mask => {
            let shown = |i, j| if w.kind == Kind::Mask { p.mask[i * w.seq_kv + j] } else { w.sees(i, j) };
            let mut added: Vec<T> = Vec::with_capacity(w.seq_q * w.seq_kv);
            for i in 0..w.seq_q {
                added.extend((0..w.seq_kv).map(|j| if shown(i, j) { T::zero() } else { T::neg_infinity() }));
            }
            let mask = Tensor::from_slice(&added, (w.seq_q, w.seq_kv), &cpu).map_err(|error| error.to_string())?;
            AttnMask::Mask(mask)
        }
    };
    let scale = 1.0 / (w.dim as f32).sqrt();
    Ok(Box::new(move |wanted| {
        let out = flash_attn::<T>(&q, &k, &v, scale, mask.clone(), None, None)
            .map_err(|error| error.to_string().lines().next().unwrap_or_default().to_string())?;
        if !wanted {
            return Ok(Vec::new());
        }
        let out = out.to_dtype(<T as WithDType>::DTYPE).and_then(|out| out.flatten_all()?.to_vec1());
        Ok(out.expect("numbers"))
    }))
}

fn burn<'p, T: Number>(p: &'p Problem<'_, T>) -> Result<Call<'p, T>, String> {
    let w = p.workload;
    let given = |data: &[T], shape: [usize; 4]| FlexTensor::from_data(TensorData::new(data.to_vec(), shape));
    let q = given(&p.q, [w.batch, w.heads_q, w.seq_q, w.dim]);
    let k = given(&p.k, [w.batch, w.heads_kv, w.seq_kv, w.dim]);
    let v = given(&p.v, [w.batch, w.heads_kv, w.seq_kv, w.dim]);
    // (Its mask says what is hidden.)
    let hidden = match w.kind {
        Kind::Mask => Some(p.mask.iter().map(|&sees| !sees).collect::<Vec<bool>>()),
        Kind::Window(_) => {
            let pairs = (0..w.seq_q).flat_map(|i| (0..w.seq_kv).map(move |j| (i, j)));
            Some(pairs.map(|(i, j)| !w.sees(i, j)).collect())
        }
        _ => None,
    };
    let hidden = hidden.map(|hidden| FlexTensor::from_data(TensorData::new(hidden, [1, 1, w.seq_q, w.seq_kv])));
    let bias = (w.kind == Kind::Bias).then(|| given(&p.bias, [1, w.heads_q, w.seq_q, w.seq_kv]));
    let options = AttentionModuleOptions { is_causal: w.kind == Kind::Causal, ..Default::default() };
    Ok(Box::new(move |wanted| {
        let out = <Flex as ModuleOps<Flex>>::attention(
            q.clone(),
            k.clone(),
            v.clone(),
            hidden.clone(),
            bias.clone(),
            options.clone(),
        );
        Ok(if wanted { out.into_data().try_to_vec().expect("numbers") } else { Vec::new() })
    }))
}

struct Racer<'p, T> {
    name: &'static str,
    call: Call<'p, T>,
    first: f64,
    samples: Vec<f64>,
    error: (f64, f64),
}

fn timed<T>(call: &mut Call<'_, T>, times: usize) -> f64 {
    let start = Instant::now();
    for _ in 0..times {
        call(false).expect("as the first time");
    }
    start.elapsed().as_secs_f64() / times as f64
}

/// Prints a row, adds its lines to `csv`, and says whether all agree.
fn measure<T: Number>(w: &Workload, arguments: &Arguments, csv: &mut String) -> bool {
    let problem = Problem::<T>::new(w);
    let (mut racers, mut agree) = (Vec::new(), true);
    println!("{} {}", w.name, w.dtype);
    for (name, prepared) in [("flashtile", ours(&problem)), ("candle", candle(&problem)), ("burn-flex", burn(&problem))]
    {
        let tried = prepared.and_then(|mut call| {
            let start = Instant::now();
            let out = call(true)?;
            Ok((call, start.elapsed().as_secs_f64(), problem.judge(&out)))
        });
        match tried {
            Ok((mut call, mut first, error)) => {
                if first <= SLOW {
                    first = timed(&mut call, 1);
                }
                racers.push(Racer { name, call, first, samples: Vec::new(), error });
            }
            Err(why) => {
                println!("{name:>10}  lacks: {why}");
                let why = why.replace('"', "'");
                writeln!(csv, "{},{},{name},,{},,,,,,\"lacks: {why}\"", w.name, w.dtype, arguments.threads).unwrap();
            }
        }
    }
    let start = Instant::now();
    for round in 0..arguments.rounds {
        if round >= MIN_ROUNDS && start.elapsed() > ROW_TIME {
            break;
        }
        // None is always first, or always after the same one.
        racers.rotate_left(1);
        for racer in &mut racers {
            if racer.first > SLOW {
                if round == 0 {
                    racer.samples = vec![racer.first];
                }
                continue;
            }
            timed(&mut racer.call, 1);
            let times = (SAMPLE_SECONDS / racer.first).round().max(1.0) as usize;
            racer.samples.push(timed(&mut racer.call, times));
        }
    }
    for racer in &mut racers {
        racer.samples.sort_by(f64::total_cmp);
    }
    let own = racers.iter().find(|racer| racer.name == "flashtile").expect("it lacks nothing").samples[0];
    racers.sort_by_key(|racer| ["flashtile", "candle", "burn-flex"].iter().position(|&name| name == racer.name));
    for Racer { name, samples, error: (error, of_tolerance), .. } in &racers {
        let (best, median) = (samples[0] * 1e3, samples[samples.len() / 2] * 1e3);
        let ratio = samples[0] / own;
        println!(
            "{name:>10} {best:10.3} ms (median {median:.3})  x {ratio:.2}  error {error:.1e}, {of_tolerance:.2} of the tolerance"
        );
        let columns = format!("{best},{median},{ratio},{error},{of_tolerance}");
        let detail = if samples.len() == 1 { "called once" } else { "" };
        writeln!(csv, "{},{},{name},{detail},{},{columns},", w.name, w.dtype, arguments.threads).unwrap();
        agree &= *of_tolerance <= 1.0;
    }
    agree
}

struct Arguments {
    filter: String,
    threads: usize,
    rounds: usize,
    csv: Option<String>,
}

fn arguments() -> Result<Arguments, String> {
    let mut all = Arguments { filter: String::new(), threads: 2, rounds: 15, csv: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} lacks its value"));
        let number = |text: String| text.parse().ok().filter(|&n: &usize| n > 0).ok_or(format!("{text} is no count"));
        match word.as_str() {
            "--filter" => all.filter = value()?,
            "--threads" => all.threads = number(value()?)?,
            "--rounds" => all.rounds = number(value()?)?,
            "--csv" => all.csv = Some(value()?),
            _ => return Err(format!("unknown: {word}; there are --filter TEXT, --threads N, --rounds N, --csv FILE")),
        }
    }
    Ok(all)
}

fn main() -> Result<(), String> {
    let arguments = arguments()?;
    // SAFETY: no other thread runs yet. All three crates work in rayon's global pool, which is made when first used.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", arguments.threads.to_string()) };
    let native = if cfg!(target_feature = "avx2") { "this processor" } else { "any processor: candle is slower so" };
    println!("flashtile, candle 0.11.1, burn-flex 0.22.1; {} threads; compiled for {native}", arguments.threads);
    let mut csv =
        "workload,type,contestant,detail,threads,best_ms,median_ms,ratio,max_error,tolerance,note\n".to_string();
    let mut wrong = Vec::new();
    for w in workloads() {
        let title = format!("{} {}", w.name, w.dtype);
        if !title.contains(&arguments.filter) {
            continue;
        }
        let agree = match w.dtype.as_str() {
            "f32" => measure::<f32>(&w, &arguments, &mut csv),
            "f16" => measure::<f16>(&w, &arguments, &mut csv),
            _ => measure::<bf16>(&w, &arguments, &mut csv),
        };
        if !agree {
            wrong.push(title);
        }
    }
    if let Some(path) = &arguments.csv {
        std::fs::write(path, csv).map_err(|error| format!("{path}: {error}"))?;
    }
    if wrong.is_empty() { Ok(()) } else { Err(format!("beyond the tolerance: {}", wrong.join(", "))) }
}
