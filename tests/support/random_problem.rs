//! Random problems: every option, type and layout, some with NaN and infinity.

use super::any_problem::{Alibi, Broadcast, Offset, Problem, Tensor};
use super::bound::sees;
use super::layouts::Layout;
use super::sequences::{KeyPlaces, QueryPlaces};
use super::{Dims, Rng, open};
use flashtile::{DType, Form, Threads};

fn dtype(rng: &mut Rng) -> DType {
    [DType::F32, DType::F32, DType::F16, DType::Bf16][rng.below(4)]
}

/// Elements of one kind: mostly normal, sometimes a kind that takes a special path.
fn values(rng: &mut Rng) -> impl FnMut([usize; 4]) -> f32 + use<> {
    let kind = rng.below(16);
    let amplitude = [1.0, 1.0, 1.0, 0.1, 4.0, 30.0][rng.below(6)];
    let mut rng = rng.clone();
    move |[b, h, i, e]| match kind {
        0 => amplitude,                                  // all equal
        1 => 0.0,                                        // all zero
        2 => ((i * 5 + e * 3 + h + b) % 7) as f32 - 3.0, // many ties, exact sums
        3 => 1e-40 * rng.normal(),                       // denormals
        4 => 1000.0 * amplitude * rng.normal(),          // scores so far apart that most probs are 0
        5 => amplitude * i as f32 * 0.5,                 // growing from key to key: the maximum always moves
        6 if rng.one_in(9) => 50.0 * rng.normal(),       // some stand out
        6 => 0.0,
        7 => 10f32.powi(rng.below(24) as i32 - 12) * rng.normal(), // every magnitude whose products f32 can hold
        _ => amplitude * rng.normal(),
    }
}

/// The shape of a mask or bias: 1 in any dimension, and lower ranks.
fn broadcast_shape(rng: &mut Rng, dims: &Dims) -> (usize, [usize; 4]) {
    let rank = [4, 4, 4, 3, 2, 2, 1][rng.below(7)];
    let full = [dims.batch, dims.heads_q, dims.seq_q, dims.seq_kv];
    let shape = std::array::from_fn(|axis| if axis < 4 - rank || rng.one_in(4) { 1 } else { full[axis] });
    (rank, shape)
}

/// What a mask or bias hides completely: rows, tiles, or all keys on one side.
#[derive(Clone, Copy)]
enum Runs {
    Nothing,
    Rows,
    Before(usize),
    From(usize),
    Blocks,
}

impl Runs {
    fn random(rng: &mut Rng, dims: &Dims) -> Self {
        let cut = rng.below(dims.seq_kv + 1);
        match rng.below(12) {
            0 => Runs::Rows,
            1 => Runs::Before(cut),
            2 => Runs::From(cut),
            3 => Runs::Blocks,
            _ => Runs::Nothing,
        }
    }

    fn hide(self, [_, h, i, j]: [usize; 4]) -> bool {
        match self {
            Runs::Nothing => false,
            Runs::Rows => (h + i).is_multiple_of(4),
            Runs::Before(cut) => j < cut,
            Runs::From(cut) => j >= cut,
            Runs::Blocks => i % 3 != 1 && j / 48 % 2 == 1,
        }
    }
}

/// Options, types and layouts for `dims`, all at random.
pub fn problem(rng: &mut Rng, dims: Dims) -> Problem {
    let mut problem = Problem::plain(Dims { batch: 0, ..dims }, || 0.0);
    problem.dims = dims;
    let tensor = |rng: &mut Rng, shape| {
        let (dtype, layout) = (dtype(rng), Layout::random(rng, shape, true));
        Tensor::new(dtype, layout, values(rng))
    };
    problem.q = tensor(rng, dims.q());
    problem.k = tensor(rng, dims.k());
    problem.v = tensor(rng, dims.v());
    problem.out = (dtype(rng), Layout::random(rng, dims.out(), false));
    problem.lse = Layout::random(rng, dims.lse(), false);

    if rng.one_in(3) {
        problem.scale = Some([0.0, -0.5, 1.0, 0.1, 3.0, -1e-3, 100.0][rng.below(7)]);
    }
    problem.causal = rng.one_in(2);
    if rng.one_in(3) {
        let bound = |rng: &mut Rng| match rng.below(4) {
            0 => None,
            1 => Some([0, 1, dims.seq_kv, usize::MAX][rng.below(4)]),
            _ => Some(rng.below(dims.seq_kv + 2)),
        };
        problem.window = (bound(rng), bound(rng));
    }
    let near = |rng: &mut Rng| rng.below(dims.seq_kv + 12) as isize - 8;
    problem.offset = match rng.below(12) {
        0 | 1 => Offset::FromStart,
        2 | 3 => Offset::At(near(rng)),
        4 => Offset::At([isize::MIN, isize::MAX, 1 << 24, -(1 << 30)][rng.below(4)]),
        5 | 6 => Offset::PerBatch((0..dims.batch).map(|_| near(rng)).collect()),
        _ => Offset::FromEnd,
    };
    if rng.one_in(4) {
        let length = |_| if rng.one_in(4) { dims.seq_kv } else { rng.below(dims.seq_kv + 1) };
        problem.key_lengths = Some((0..dims.batch).map(length).collect());
    }
    sequences(rng, &mut problem);
    if rng.one_in(4) {
        let (rank, shape) = broadcast_shape(rng, &dims);
        let one_in = [2, 2, 10, 100][rng.below(4)];
        let most = rng.one_in(4);
        let (layout, runs) = (Layout::random(rng, shape, true), Runs::random(rng, &dims));
        problem.mask = Some(Broadcast::<_>::new(rank, layout, |index| rng.one_in(one_in) == most || runs.hide(index)));
    }
    if rng.one_in(8) {
        problem.softcap = Some([0.5, 5.0, 30.0, 1e4][rng.below(4)]);
    }
    if rng.one_in(4) {
        let (rank, shape) = broadcast_shape(rng, &dims);
        let (hidden, amplitude) = (rng.one_in(2), [1.0, 1.0, 10.0, 1e4][rng.below(4)]);
        let (dtype, layout, runs) = (dtype(rng), Layout::random(rng, shape, true), Runs::random(rng, &dims));
        // The lowest number is not hidden, but next to it all others are.
        let lowest = if rng.one_in(4) { f32::MIN } else { f32::NEG_INFINITY };
        let value = |index| match runs.hide(index) {
            true => lowest,
            false if hidden && rng.one_in(3) => f32::NEG_INFINITY,
            false => amplitude * rng.normal(),
        };
        problem.bias = Some(Broadcast { rank, tensor: Tensor::new(dtype, layout, value) });
    }
    if rng.one_in(6) {
        let slopes = |_| if rng.one_in(4) { 0.0 } else { rng.normal() };
        problem.alibi = Some(match (dims.heads_q + dims.batch) % 3 {
            0 => Alibi::Standard,
            1 => Alibi::PerHead((0..dims.heads_q).map(slopes).collect()),
            _ => Alibi::PerBatchAndHead((0..dims.batch * dims.heads_q).map(slopes).collect()),
        });
    }
    problem.form = [None, Some(Form::Decode), Some(Form::Prefill)][rng.below(3)];
    problem.threads = [Threads::Pool, Threads::Serial][rng.below(2)];
    open_sets(rng, &mut problem);
    if rng.one_in(4) {
        poison(rng, &mut problem);
    }
    problem
}

/// Lets sequences differ in their numbers of queries, and packs them; puts keys and values in other places.
fn sequences(rng: &mut Rng, problem: &mut Problem) {
    let dims = problem.dims;
    if dims.batch == 0 {
        return;
    }
    // One sequence has all, because masks are made for the longest one.
    let lengths = |rng: &mut Rng, most: usize| -> Vec<usize> {
        let longest = rng.below(dims.batch);
        let length = |b| if b == longest || rng.one_in(4) { most } else { rng.below(most + 1) };
        (0..dims.batch).map(length).collect()
    };
    if rng.one_in(3) {
        let lengths = lengths(rng, dims.seq_q);
        problem.query_places = QueryPlaces::random(rng, &dims, &lengths);
        problem.query_lengths = Some(lengths);
    }
    if rng.one_in(3) {
        let lengths = lengths(rng, dims.seq_kv);
        let places = KeyPlaces::random(rng, &dims, &lengths, problem.k.dtype() == problem.v.dtype());
        (problem.key_places, problem.key_lengths) = (places, Some(lengths));
        let is_far = |b| problem.offset_of(b).unsigned_abs() >= 1 << 20;
        if matches!(problem.key_places, KeyPlaces::Rotating { .. }) {
            // Positions must have 32 bits there, and lost keys in a window are refused.
            if (0..dims.batch).any(is_far) {
                problem.key_places = KeyPlaces::Own;
            } else if (0..dims.batch).any(|b| loses_part_of_a_window(problem, b)) {
                problem.window.0 = None;
            }
        }
    }
}

/// Whether a rotating cache has lost keys that the windows of a sequence's queries reach back to.
fn loses_part_of_a_window(problem: &Problem, b: usize) -> bool {
    let (lost, first) = (problem.lost(b), problem.offset_of(b));
    let reaches_back = |left: usize| first.saturating_sub_unsigned(left) < lost.end as isize;
    !lost.is_empty() && problem.window.0.is_some_and(reaches_back)
}

/// Adds masks and score modifications of the open sets, up to three of each, and sinks.
fn open_sets(rng: &mut Rng, problem: &mut Problem) {
    let dims = problem.dims;
    if rng.one_in(6) {
        let sink = |_| if rng.one_in(5) { f32::NEG_INFINITY } else { 4.0 * rng.normal() };
        problem.sinks = Some((0..dims.heads_q).map(sink).collect());
    }
    let offsets: Vec<isize> = (0..dims.batch).map(|b| problem.offset_of(b)).collect();
    if offsets.iter().any(|offset| offset.unsigned_abs() >= 1 << 20) {
        return; // for larger positions, ALiBi's own rounding is all that would be seen
    }
    let offset = offsets.first().copied().filter(|first| offsets.iter().all(|offset| offset == first));
    if rng.one_in(3) {
        problem.masks = (0..1 + rng.below(3)).map(|_| open::mask(rng, &dims, offset)).collect();
    }
    if rng.one_in(6) {
        problem.score_mods = (0..1 + rng.below(2)).map(|_| open::score_mod(rng, &dims)).collect();
    }
}

/// Puts NaN and infinity into keys and values that no query sees, where they must not show. Sometimes puts a NaN or infinity
/// where it must show, or where it makes infinite scores.
fn poison(rng: &mut Rng, problem: &mut Problem) {
    let dims = problem.dims;
    let shared = |tensor: &Tensor| tensor.layout().strides.contains(&0);
    if shared(&problem.k) || shared(&problem.v) || shared(&problem.q) || dims.heads_kv == 0 {
        return;
    }
    let group = dims.heads_q / dims.heads_kv;
    const POISONS: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    // Infinity times an element of a query that scaling rounds to 0 would be NaN.
    let mut queries = problem.q.layout().indices().map(|index| problem.q.get(index).abs());
    let of_keys = if queries.any(|x| x > 0.0 && x < 1e-20) { 1 } else { 3 };
    for b in 0..dims.batch {
        for (h, j) in (0..dims.heads_kv).flat_map(|h| (0..dims.seq_kv).map(move |j| (h, j))) {
            let mut pairs = (h * group..(h + 1) * group).flat_map(|h| (0..dims.seq_q).map(move |i| (h, i)));
            if !pairs.any(|(h, i)| sees(problem, [b, h, i, j])) {
                let poison = POISONS[rng.below(3)];
                (0..dims.head_dim).for_each(|e| problem.k.set([b, h, j, e], poison));
                (0..dims.value_dim).for_each(|d| problem.v.set([b, h, j, d], poison));
            } else if rng.one_in(4 * dims.seq_kv) {
                match rng.below(2) {
                    0 if dims.head_dim > 0 => {
                        problem.k.set([b, h, j, rng.below(dims.head_dim)], POISONS[rng.below(of_keys)]);
                        // Where that hides the key, its value is left out, whatever it is.
                        if dims.value_dim > 0 && rng.one_in(2) {
                            problem.v.set([b, h, j, rng.below(dims.value_dim)], POISONS[rng.below(3)]);
                        }
                    }
                    _ if dims.value_dim > 0 => {
                        problem.v.set([b, h, j, rng.below(dims.value_dim)], POISONS[rng.below(3)]);
                    }
                    _ => {}
                }
            }
        }
        if dims.heads_q * dims.seq_q * dims.head_dim > 0 && rng.one_in(4) {
            let (h, i) = (rng.below(dims.heads_q), rng.below(dims.seq_q));
            problem.q.set([b, h, i, rng.below(dims.head_dim)], f32::NAN);
        }
    }
}

/// Mostly small, often at an edge: 0, 1, a vector (8 or 16), a panel (16 or 32), and one more or less.
fn size(rng: &mut Rng, edges: &[usize], most: usize) -> usize {
    match rng.below(8) {
        0..3 => edges[rng.below(edges.len())],
        3..6 => 1 + rng.below(most.min(9)),
        _ => rng.below(most + 1),
    }
}

pub fn small_dims(rng: &mut Rng) -> Dims {
    let small = |rng: &mut Rng, most| if rng.one_in(60) { 0 } else { 1 + rng.below(rng.clone().below(most) + 1) };
    if rng.one_in(20) {
        // Narrow, and longer than a tile (240 keys) or a split (512): the running maximum moves, states are merged.
        return Dims {
            batch: 1,
            heads_q: 2,
            heads_kv: 1,
            seq_q: 1 + rng.below(9),
            seq_kv: [239, 240, 241, 300, 481, 511, 512, 513, 700][rng.below(9)],
            head_dim: 1 + rng.below(9),
            value_dim: 1 + rng.below(9),
        };
    }
    let heads_kv = small(rng, 3);
    Dims {
        batch: small(rng, 3),
        heads_q: heads_kv * small(rng, 4),
        heads_kv,
        seq_q: size(rng, &[0, 1, 1, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33], 40),
        // Around 48, the smallest tile, and 64, a common size.
        seq_kv: size(rng, &[0, 1, 2, 8, 16, 47, 48, 49, 63, 64, 65], 70),
        head_dim: size(rng, &[0, 1, 2, 7, 8, 9, 16, 17, 64, 65], 70),
        value_dim: size(rng, &[0, 1, 5, 6, 7, 8, 9, 12, 16, 64, 65], 70),
    }
}

/// Hundreds of keys and wide heads, with at most about 8 million multiply-adds.
pub fn large_dims(rng: &mut Rng) -> Dims {
    const DIMS: [usize; 11] = [1, 8, 24, 64, 64, 80, 128, 128, 192, 256, 576];
    let heads_kv = 1 + rng.below(2);
    let mut dims = Dims {
        batch: 1 + rng.below(2),
        heads_q: heads_kv * (1 + rng.below(4)),
        heads_kv,
        seq_q: [1, 2, 8, 17, 100, 257, 400][rng.below(7)] + rng.below(4),
        seq_kv: [100, 240, 480, 512, 1024, 2000][rng.below(6)] + rng.below(4),
        head_dim: DIMS[rng.below(11)],
        value_dim: DIMS[rng.below(11)],
    };
    let work = |dims: &Dims| dims.batch * dims.heads_q * dims.seq_q * dims.seq_kv * (dims.head_dim + dims.value_dim);
    while work(&dims) > 8_000_000 {
        match () {
            () if dims.batch > 1 => dims.batch = 1,
            () if dims.heads_q > dims.heads_kv => dims.heads_q = dims.heads_kv,
            () if dims.heads_kv > 1 => (dims.heads_q, dims.heads_kv) = (1, 1),
            () if dims.seq_q > 1 => dims.seq_q = dims.seq_q.div_ceil(2),
            () => dims.seq_kv = dims.seq_kv.div_ceil(2),
        }
    }
    dims
}
