//! A toy server: continuous batching over one pool of pages. 32 requests share a system prompt and arrive over time. Each step
//! computes chunks of prompts and single tokens in one call per layer. At the end, a step over the shared pages of the system
//! prompt is compared with a step over copies of them.
//!
//! `cargo run --release --example serve [-- --steps 400 --seed 1 --pages 232]`
//!
//! Projections are a stand-in: pseudo-random rows that depend on layer and token. The next token is the index of the largest
//! element of the last layer's output. Caches, rotation, attention, scheduling and checks are real.

use flashtile::{
    Attention, DType, Error, KvFormat, PageLists, PagedKvCache, Positions, Prepared, Rotary, SequenceId, TensorMut,
    TensorRef, Workspace, reference,
};
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error>;

const LAYERS: usize = 4;
const HEADS_Q: usize = 8;
const HEADS_KV: usize = 2;
const DIM: usize = 64;
const PAGE: usize = 16;
/// Tokens of the system prompt. They end within a page, which is copied by each request that writes to it. Sequences that decode side by
/// side read whole runs of 512 shared keys once for all of them.
const PREFIX: usize = 2052;
const REQUESTS: usize = 32;
/// Tokens of a step, and of one request in a step.
const STEP_TOKENS: usize = 64;
const CHUNK: usize = 32;
const LONGEST: usize = PREFIX + 160 + 64;

/// A request: its prompt and the answer so far. The cache has the first `cached` tokens.
struct Request {
    id: SequenceId,
    tokens: Vec<usize>,
    cached: usize,
    /// The tokens of prompt and answer, when it is finished.
    goal: usize,
    /// The step in which it arrives.
    arrival: usize,
}

/// The part of a request that a step computes.
struct Turn {
    /// The index of the request among the running ones.
    request: usize,
    id: SequenceId,
    /// Its rows in the packed tensors of the step.
    rows: Range<usize>,
}

impl Turn {
    /// Its rows of a packed `[total, heads, dim]`, as `[1, heads, tokens, dim]`.
    fn of<'a>(&self, packed: &'a [f32], heads: usize) -> Result<TensorRef<'a, f32>, Error> {
        let rows = &packed[self.rows.start * heads * DIM..self.rows.end * heads * DIM];
        heads_first(rows, [1, self.rows.len(), heads, DIM])
    }
}

struct Server {
    cache: PagedKvCache,
    /// The pages of the step's requests.
    lists: PageLists,
    /// The plan of steps in which each request has one token.
    prepared: Prepared<'static>,
    rotary: Rotary,
    /// The sequence of the system prompt. Requests are forks of it.
    prefix: SequenceId,
    prefix_tokens: Vec<usize>,
    coming: VecDeque<Request>,
    waiting: VecDeque<Request>,
    running: Vec<Request>,
    /// Whether a running request got no page in the last step.
    short: bool,
    workspace: Workspace,
    rng: Rng,
    stats: Stats,
}

#[derive(Default)]
struct Stats {
    steps: Vec<Duration>,
    planning: Duration,
    writing: Duration,
    attention: Duration,
    checking: Duration,
    prompt_tokens: usize,
    answer_tokens: usize,
    /// Times that a running request got no page and waited for a step.
    waits: usize,
    preempted: usize,
    checked_rows: usize,
    largest_error: f64,
}

fn main() -> Result<(), Failure> {
    let (mut steps, mut seed, mut pages, mut args) = (400, 1, 232, std::env::args().skip(1));
    while let Some(arg) = args.next() {
        let mut number = || args.next().ok_or(format!("{arg} needs a number"))?.parse().map_err(Failure::from);
        match arg.as_str() {
            "--steps" => steps = number()?,
            "--seed" => seed = number()?,
            "--pages" => pages = number()?,
            _ => return Err(format!("{arg}: not one of --steps, --seed and --pages").into()),
        }
    }
    let mut server = Server::new(pages, seed as u64)?;
    println!(
        "{REQUESTS} requests after a system prompt of {PREFIX} tokens; {LAYERS} layers, {HEADS_Q} heads on {HEADS_KV} of {DIM}, \
         f16.\n{pages} pages of {PAGE} tokens: {:.1} MB. Pages: · free, ▒ of one sequence, █ shared.\n",
        server.cache.bytes() as f64 / 1e6
    );
    let mut step = 0;
    while step < steps && server.has_work() {
        let turns = server.step(step)?;
        if step % 20 == 0 {
            server.draw(step, &turns)?;
        }
        step += 1;
    }
    server.print_stats(step);
    compare_sharing()
}

impl Server {
    /// A pool with the system prompt, and the requests to come.
    fn new(pages: usize, seed: u64) -> Result<Self, Failure> {
        let needed = LONGEST.div_ceil(PAGE) + 1;
        if pages < needed {
            return Err(format!("the longest request needs {needed} pages, and there are {pages}").into());
        }
        let mut cache = PagedKvCache::new(KvFormat::new(DType::F16, HEADS_KV, DIM), LAYERS, pages, PAGE)?;
        let (mut rng, rotary, prefix) = (Rng(seed), Rotary::new(DIM, 10_000.0, LONGEST)?, cache.new_sequence());
        let prefix_tokens: Vec<usize> = (0..PREFIX).map(|_| rng.below(HEADS_Q * DIM)).collect();
        let coming = requests(&mut rng, prefix, &prefix_tokens);
        // Any batch of the right heads will do: each step plans again.
        let mut lists = PageLists::new();
        cache.list(&[prefix], &mut lists)?;
        let (q, pages) = (vec![0.0; HEADS_Q * DIM], cache.view(0, &lists)?);
        let attention = Attention::new().causal().query_starts(&[0usize, 1]);
        let prepared = attention.prepare(heads_first(&q, [1, 1, HEADS_Q, DIM])?, pages)?;
        let (waiting, running, short, workspace, stats) = Default::default();
        let mut server = Server {
            cache,
            rotary,
            prefix,
            prefix_tokens,
            coming,
            waiting,
            running,
            short,
            workspace,
            rng,
            stats,
            lists,
            prepared,
        };
        server.compute_prefix()?;
        Ok(server)
    }

    /// The system prompt is a batch of one sequence, whose outputs are not used.
    fn compute_prefix(&mut self) -> Result<(), Failure> {
        self.cache.reserve(self.prefix, PREFIX)?;
        let turn = Turn { request: 0, id: self.prefix, rows: 0..PREFIX };
        let positions: Vec<usize> = (0..PREFIX).collect();
        let tokens = self.prefix_tokens.clone();
        self.forward(&[turn], &tokens, &positions)?;
        self.stats = Stats::default();
        Ok(())
    }

    fn has_work(&self) -> bool {
        !(self.coming.is_empty() && self.waiting.is_empty() && self.running.is_empty())
    }

    /// One step: requests join, each running one gets its turn, all turns are computed, finished requests leave.
    fn step(&mut self, step: usize) -> Result<Vec<Turn>, Failure> {
        while self.coming.front().is_some_and(|request| request.arrival <= step) {
            self.waiting.extend(self.coming.pop_front());
        }
        let (start, checked) = (Instant::now(), self.stats.checking);
        self.admit()?;
        let turns = self.schedule()?;
        if turns.is_empty() {
            self.preempt()?;
            return Ok(turns);
        }
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for turn in &turns {
            let Request { tokens: all, cached, .. } = &self.running[turn.request];
            let new = *cached..cached + turn.rows.len();
            tokens.extend_from_slice(&all[new.clone()]);
            positions.extend(new);
        }
        let out = self.forward(&turns, &tokens, &positions)?;
        self.sample(&turns, &out);
        self.retire()?;
        self.stats.steps.push(start.elapsed() - (self.stats.checking - checked));
        Ok(turns)
    }

    /// Requests join in the order of arrival, while there are pages for their tokens and no running request lacks one. A fork
    /// shares the pages of the system prompt.
    fn admit(&mut self) -> Result<(), Error> {
        while let Some(request) = self.waiting.front() {
            // Pages after the full ones of the system prompt.
            let pages = request.tokens.len().div_ceil(PAGE) - PREFIX / PAGE;
            if self.short || pages > self.cache.free_pages() {
                break;
            }
            let mut request = self.waiting.pop_front().expect("the front");
            (request.id, request.cached) = (self.cache.fork(self.prefix)?, PREFIX);
            self.running.push(request);
        }
        Ok(())
    }

    /// Each running request gets its next tokens and the pages for them, the oldest first. Without a free page it waits.
    fn schedule(&mut self) -> Result<Vec<Turn>, Error> {
        let (mut turns, mut end) = (Vec::new(), 0);
        self.short = false;
        for (index, request) in self.running.iter().enumerate() {
            let count = (request.tokens.len() - request.cached).min(CHUNK).min(STEP_TOKENS - end);
            if count == 0 {
                break; // the step is full
            }
            match self.cache.reserve(request.id, count) {
                Ok(()) => {
                    turns.push(Turn { request: index, id: request.id, rows: end..end + count });
                    end += count;
                }
                Err(Error::PagesExhausted { .. }) => {
                    self.short = true;
                    self.stats.waits += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(turns)
    }

    /// No request got a page: the youngest one gives its pages back. It starts again later, with the answer so far as a part of
    /// its prompt.
    fn preempt(&mut self) -> Result<(), Error> {
        if let Some(request) = self.running.pop() {
            self.cache.remove(request.id)?;
            self.waiting.push_front(request);
            self.stats.preempted += 1;
        }
        Ok(())
    }

    /// All layers for the tokens of a step: `[total, heads_q * dim]`, the output of the last one.
    fn forward(&mut self, turns: &[Turn], tokens: &[usize], positions: &[usize]) -> Result<Vec<f32>, Failure> {
        let total = tokens.len();
        let ids: Vec<SequenceId> = turns.iter().map(|turn| turn.id).collect();
        let starts: Vec<usize> = turns.iter().map(|turn| turn.rows.start).chain([total]).collect();
        self.cache.list(&ids, &mut self.lists)?;
        let checked_layer = self.rng.below(8 * LAYERS);

        // One plan for all layers, which differ in data alone.
        let planning = Instant::now();
        let shape = [1, total, HEADS_Q, DIM];
        let mut out = vec![0.0f32; total * HEADS_Q * DIM];
        self.prepared.replan_packed(heads_first(&out, shape)?, &starts, self.cache.view_to_plan(&self.lists)?)?;
        self.stats.planning += planning.elapsed();

        for layer in 0..LAYERS {
            let [mut q, k, v] = project(layer, tokens);
            let writing = Instant::now();
            let queries = TensorMut::from_slice(&mut q, [1, total, HEADS_Q, DIM])?.permuted([0, 2, 1, 3])?;
            self.rotary.rotate(queries, Positions::each(positions))?;
            for turn in turns {
                let [k, v] = [&k, &v].map(|packed| turn.of(packed, HEADS_KV));
                self.cache.write_rotated(layer, turn.id, &self.rotary, None, k?, v?)?;
            }
            self.stats.writing += writing.elapsed();

            let computing = Instant::now();
            let output = TensorMut::from_slice(&mut out, shape)?.permuted([0, 2, 1, 3])?;
            let kv = self.cache.view(layer, &self.lists)?;
            self.prepared.compute(heads_first(&q, shape)?, kv, output, None, &mut self.workspace)?;
            self.stats.attention += computing.elapsed();
            if layer == checked_layer {
                let (checking, turn) = (Instant::now(), &turns[self.rng.below(turns.len())]);
                let error = check(&self.cache, layer, turn, &q, &out)?;
                self.stats.largest_error = self.stats.largest_error.max(error);
                self.stats.checked_rows += turn.rows.len() * HEADS_Q;
                self.stats.checking += checking.elapsed();
            }
        }
        Ok(out)
    }

    /// A request whose tokens are all in the cache gets its next one from the last row of its turn.
    fn sample(&mut self, turns: &[Turn], out: &[f32]) {
        for turn in turns {
            let request = &mut self.running[turn.request];
            request.cached += turn.rows.len();
            if request.cached < request.tokens.len() {
                self.stats.prompt_tokens += turn.rows.len();
                continue;
            }
            let row = &out[(turn.rows.end - 1) * HEADS_Q * DIM..turn.rows.end * HEADS_Q * DIM];
            let largest = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            request.tokens.extend(largest);
            self.stats.prompt_tokens += turn.rows.len() - 1;
            self.stats.answer_tokens += 1;
        }
    }

    /// Finished requests leave and free their pages.
    fn retire(&mut self) -> Result<(), Error> {
        let finished = |request: &mut Request| request.tokens.len() >= request.goal;
        for request in self.running.extract_if(.., finished) {
            self.cache.remove(request.id)?;
        }
        Ok(())
    }

    /// The state of the pool, a character a page.
    fn draw(&self, step: usize, turns: &[Turn]) -> Result<(), Error> {
        let mut owners = vec![0; self.cache.pages()];
        let ids = self.running.iter().map(|request| request.id).chain([self.prefix]);
        for id in ids {
            self.cache.table(id)?.iter().for_each(|&page| owners[page as usize] += 1);
        }
        let (tokens, chunks) = (turns.last().map_or(0, |turn| turn.rows.end), turns.iter());
        let chunks = chunks.filter(|turn| turn.rows.len() > 1).count();
        println!(
            "step {step:3}   {} running, {} waiting   {tokens} tokens: {chunks} chunks of prompts, {} single tokens   \
             {} pages used, {} shared",
            self.running.len(),
            self.waiting.len(),
            turns.len() - chunks,
            self.cache.used_pages(),
            self.cache.shared_pages()
        );
        let characters: Vec<&str> = owners.iter().map(|&owners| ["·", "▒", "█"][owners.min(2)]).collect();
        characters.chunks(64).for_each(|line| println!("    {}", line.concat()));
        Ok(())
    }

    fn print_stats(&mut self, steps: usize) {
        let finished = REQUESTS - self.coming.len() - self.waiting.len() - self.running.len();
        let Stats { steps: times, planning, writing, attention, .. } = &mut self.stats;
        times.sort();
        let count = times.len().max(1);
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        let of = |part: usize| times.get((count - 1) * part / 100).map_or(0.0, |&time| ms(time));
        let (seconds, micros) = (times.iter().sum::<Duration>().as_secs_f64().max(1e-9), 1e6 / count as f64);
        println!("\n{finished} of {REQUESTS} requests finished in {steps} steps");
        println!("step       median {:.2} ms, 95% within {:.2} ms, longest {:.2} ms", of(50), of(95), of(100));
        println!(
            "of a step  planning {:.0} µs, rotation and cache {:.0} µs, attention {:.0} µs; the rest is the stand-in",
            planning.as_secs_f64() * micros,
            writing.as_secs_f64() * micros,
            attention.as_secs_f64() * micros
        );
        let Stats { prompt_tokens, answer_tokens, .. } = self.stats;
        println!(
            "tokens     {prompt_tokens} of prompts, {answer_tokens} of answers: {:.0} a second",
            (prompt_tokens + answer_tokens) as f64 / seconds
        );
        let Stats { waits, preempted, checked_rows, largest_error, .. } = self.stats;
        println!("pool       exhausted: {waits} turns waited for a page, {preempted} requests started again");
        println!("           at the end {} of {} pages free", self.cache.free_pages(), self.cache.pages());
        println!(
            "checked    {checked_rows} rows: the bits of a batch of one; at most {largest_error:.1e} from the definition"
        );
    }
}

/// Times a step of one token for each request over the shared pages of the system prompt, and over copies.
fn compare_sharing() -> Result<(), Failure> {
    let (mut shared, mut copied) = (DecodeStep::new(true)?, DecodeStep::new(false)?);
    for _ in 0..15 {
        shared.run()?;
        copied.run()?;
    }
    if shared.out != copied.out {
        return Err("sharing pages changes the result".into());
    }
    let ratio = copied.best.as_secs_f64() / shared.best.as_secs_f64();
    println!(
        "\nA step of {REQUESTS} tokens, one for each request, after {PREFIX} tokens of system prompt and {OWN} of its own: attention of \
         one layer"
    );
    println!("shared     {shared}; keys of the system prompt are read once for all");
    println!("copied     {copied}; {ratio:.1} times as long, for the same bits");
    Ok(())
}

/// Tokens that a request of [`DecodeStep`] has after the system prompt.
const OWN: usize = 60;

/// A step in which each request has one token, in one layer.
struct DecodeStep {
    cache: PagedKvCache,
    lists: PageLists,
    prepared: Prepared<'static>,
    /// `[requests, heads_q, 1, dim]`
    q: Vec<f32>,
    out: Vec<f32>,
    workspace: Workspace,
    /// The time of the fastest step.
    best: Duration,
}

impl DecodeStep {
    /// The requests are forks of the system prompt, or each has a copy of it.
    fn new(is_shared: bool) -> Result<Self, Failure> {
        let pages = REQUESTS * (PREFIX + OWN).div_ceil(PAGE) + 1;
        let mut cache = PagedKvCache::new(KvFormat::new(DType::F16, HEADS_KV, DIM), 1, pages, PAGE)?;
        let append = |cache: &mut PagedKvCache, id, tokens: Range<usize>| -> Result<(), Error> {
            let shape = [1, tokens.len(), HEADS_KV, DIM];
            let [_, k, v] = project(0, &tokens.collect::<Vec<_>>());
            cache.append(id, heads_first(&k, shape)?, heads_first(&v, shape)?)
        };
        let prefix = cache.new_sequence();
        if is_shared {
            append(&mut cache, prefix, 0..PREFIX)?;
        }
        let mut ids = Vec::new();
        for request in 0..REQUESTS {
            let id = cache.fork(prefix)?;
            if !is_shared {
                append(&mut cache, id, 0..PREFIX)?;
            }
            let first = PREFIX + request * OWN;
            append(&mut cache, id, first..first + OWN)?;
            ids.push(id);
        }
        let mut lists = PageLists::new();
        cache.list(&ids, &mut lists)?;
        let [q, ..] = project(0, &(0..REQUESTS).collect::<Vec<_>>());
        let prepared = Attention::new().causal().prepare(Self::rows(&q)?, cache.view(0, &lists)?)?;
        let (out, workspace) = (vec![0.0; q.len()], Workspace::new());
        Ok(Self { cache, lists, prepared, q, out, workspace, best: Duration::MAX })
    }

    fn rows(q: &[f32]) -> Result<TensorRef<'_, f32>, Error> {
        TensorRef::from_slice(q, [REQUESTS, HEADS_Q, 1, DIM])
    }

    fn run(&mut self) -> Result<(), Error> {
        let (start, kv) = (Instant::now(), self.cache.view(0, &self.lists)?);
        let out = TensorMut::from_slice(&mut self.out, [REQUESTS, HEADS_Q, 1, DIM])?;
        self.prepared.compute(Self::rows(&self.q)?, kv, out, None, &mut self.workspace)?;
        self.best = self.best.min(start.elapsed());
        Ok(())
    }
}

impl fmt::Display for DecodeStep {
    /// The pages and the time.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (used, all) = (self.cache.used_pages(), self.cache.pages());
        let bytes = self.cache.bytes() as f64 / all as f64 * used as f64;
        write!(f, "{used:4} pages, {:4.1} MB, {:.2} ms", bytes / 1e6, 1e3 * self.best.as_secs_f64())
    }
}

/// Requests of random lengths and times, after the system prompt.
fn requests(rng: &mut Rng, prefix: SequenceId, prefix_tokens: &[usize]) -> VecDeque<Request> {
    let mut arrival = 0;
    let request = |_| {
        arrival += rng.below(6);
        let mut tokens = prefix_tokens.to_vec();
        tokens.extend((0..8 + rng.below(152)).map(|_| rng.below(HEADS_Q * DIM)));
        let goal = tokens.len() + 16 + rng.below(48);
        Request { id: prefix, tokens, cached: 0, goal, arrival }
    };
    (0..REQUESTS).map(request).collect()
}

/// The queries, keys and values of some tokens in one layer: `[tokens, heads, dim]`.
fn project(layer: usize, tokens: &[usize]) -> [Vec<f32>; 3] {
    [HEADS_Q, HEADS_KV, HEADS_KV].map(|heads| {
        let rows = tokens.iter().map(|&token| Rng((token * LAYERS + layer) as u64 + ((heads as u64) << 32)));
        rows.flat_map(|mut rng| (0..heads * DIM).map(move |_| rng.number())).collect()
    })
}

/// `[batch, tokens, heads, dim]` as `[batch, heads, tokens, dim]`.
fn heads_first(data: &[f32], shape: [usize; 4]) -> Result<TensorRef<'_, f32>, Error> {
    TensorRef::from_slice(data, shape)?.permuted([0, 2, 1, 3])
}

/// Compares a turn's rows with those of a call with this turn alone, bit for bit, and returns their largest difference from the
/// definition in f64.
fn check(cache: &PagedKvCache, layer: usize, turn: &Turn, q: &[f32], out: &[f32]) -> Result<f64, Failure> {
    let mut lists = PageLists::new();
    cache.list(&[turn.id], &mut lists)?;
    let (q, kv, attention) = (turn.of(q, HEADS_Q)?, cache.view(layer, &lists)?, Attention::new().causal());
    let mut alone = vec![0.0f32; turn.rows.len() * HEADS_Q * DIM];
    let output = TensorMut::from_slice(&mut alone, [1, turn.rows.len(), HEADS_Q, DIM])?.permuted([0, 2, 1, 3])?;
    attention.compute(q, kv, output, None, &mut Workspace::new())?;
    if alone != out[turn.rows.start * HEADS_Q * DIM..turn.rows.end * HEADS_Q * DIM] {
        return Err(format!("layer {layer}: a request's rows depend on the rest of its batch").into());
    }
    let (got, expected) = (turn.of(out, HEADS_Q)?, reference::attention(&attention, q, kv)?.out);
    let mut largest: f64 = 0.0;
    for (n, expected) in expected.iter().enumerate() {
        let (head, row, element) = (n / DIM / turn.rows.len(), n / DIM % turn.rows.len(), n % DIM);
        let error = (got.get([0, head, row, element]).ok_or("no such element")? as f64 - expected).abs();
        if error.is_nan() || error > 1e-5 {
            return Err(format!("layer {layer}: the result is not that of the definition").into());
        }
        largest = largest.max(error);
    }
    Ok(largest)
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In -1..1.
    fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
