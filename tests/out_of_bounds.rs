//! Promise: no element outside a tensor is read or written, whatever its sizes, strides and types.
//!
//! Every tensor starts or ends at a guard page. An access beyond it ends the process, and a signal handler prints the case. The
//! bytes between the rows of an output stay as they were.
#![cfg(unix)]

mod support;

use flashtile::mask::KeyStarts;
use flashtile::{
    AlibiSlopes, Attention, Form, KeysValues, Level, PageTable, ScoreStage, TensorMut, TensorRef, Threads, Workspace,
    bf16, f16, merge,
};
use support::any_problem::{Problem, Tensor};
use support::guarded::{Guarded, Side, note};
use support::layouts::{ARRANGEMENTS, Arrangement, Layout};
use support::open::{OwnedMask, READY_MASKS, ready_mask, three_ready_masks};
use support::problems::{Bits, FORMS, bits, forms_and_levels};
use support::{Dims, Inputs, Rng, len};

/// The pages of one call.
struct Pages {
    q: Guarded,
    k: Guarded,
    v: Guarded,
    mask: Guarded,
    bias: Guarded,
    slopes: Guarded,
    key_starts: Guarded,
    out: Guarded,
    lse: Guarded,
    sums: Guarded,
}

impl Pages {
    fn new() -> Self {
        let pages = || Guarded::new(1 << 20);
        Pages {
            q: pages(),
            k: pages(),
            v: pages(),
            mask: pages(),
            bias: pages(),
            slopes: pages(),
            key_starts: pages(),
            out: pages(),
            lse: pages(),
            sums: pages(),
        }
    }
}

/// One call to try.
#[derive(Clone, Copy, Debug)]
struct Case<'m> {
    dims: Dims,
    form: Form,
    level: Level,
    layout: Arrangement,
    side: Side,
    /// Mask, bias, causal order and the rest, or none of them.
    options: bool,
    masks: &'m [OwnedMask],
}

impl<'m> Case<'m> {
    fn attention<'a, T: Bits>(
        &self,
        slopes: &'a [f32],
        mask: TensorRef<'a, bool>,
        bias: TensorRef<'a, T>,
    ) -> Attention<'a>
    where
        'm: 'a,
    {
        let attention = Attention::new().form(self.form).level(self.level).threads(Threads::Serial);
        let attention = self.masks.iter().fold(attention, |attention, mask| attention.masked_by(mask));
        if !self.options {
            return attention;
        }
        let attention = attention.causal().window(Some(self.dims.seq_kv / 2 + 3), None).softcap(20.0);
        attention.mask(mask).bias(bias).alibi(AlibiSlopes::PerBatchAndHead(slopes))
    }
}

/// The contents of gaps: a number that outputs don't have.
const CANARY: f32 = -1234.5;

/// Computes the case between guard pages and compares with the same problem in ordinary memory without gaps.
fn check<T: Bits>(case: Case<'_>, pages: &mut Pages, workspace: &mut Workspace, rng: &mut Rng) {
    check_inputs(&Inputs::<T>::random(case.dims, rng), case, pages, workspace, rng);
}

fn check_inputs<T: Bits>(
    inputs: &Inputs<T>,
    case: Case<'_>,
    pages: &mut Pages,
    workspace: &mut Workspace,
    rng: &mut Rng,
) {
    let Case { dims, layout, side, .. } = case;
    note(format_args!("{} {case:?}", T::DTYPE));
    let attend: Vec<bool> = (0..len(dims.scores())).map(|_| !rng.one_in(4)).collect();
    let bias: Vec<T> = (0..len(dims.scores())).map(|_| T::from_f32(rng.normal())).collect();
    let slopes: Vec<f32> = (0..dims.batch * dims.heads_q).map(|_| rng.uniform()).collect();
    let plain = case.attention::<T>(
        &slopes,
        TensorRef::from_slice(&attend, dims.scores()).unwrap(),
        TensorRef::from_slice(&bias, dims.scores()).unwrap(),
    );
    let (expected, expected_lse) = inputs.bits(&plain);

    let gap = T::POISON[0];
    let [q, k, v] = [dims.q(), dims.k(), dims.v()].map(|shape| layout.of(shape));
    let (scores, out, lse) = (layout.of(dims.scores()), layout.of(dims.out()), layout.of(dims.lse()));
    let guarded = case.attention::<T>(
        pages.slopes.place(&slopes, side),
        scores.tensor(pages.mask.place(&scores.scatter(&attend, false), side)),
        scores.tensor(pages.bias.place(&scores.scatter(&bias, gap), side)),
    );
    let out_memory = pages.out.place(&vec![T::from_f32(CANARY); out.len], side);
    let lse_memory = pages.lse.place(&vec![CANARY; lse.len], side);
    guarded
        .compute(
            q.tensor(pages.q.place(&q.scatter(&inputs.q, gap), side)),
            (
                k.tensor(pages.k.place(&k.scatter(&inputs.k, gap), side)),
                v.tensor(pages.v.place(&v.scatter(&inputs.v, gap), side)),
            ),
            out.tensor_mut(out_memory),
            lse.tensor_mut(lse_memory),
            workspace,
        )
        .unwrap();

    let (values, gaps) = out.gather(out_memory);
    assert_eq!(bits(&values), expected, "{} {case:?}", T::DTYPE);
    assert!(gaps.iter().all(|x| *x == T::from_f32(CANARY)), "written between the rows: {} {case:?}", T::DTYPE);
    let (values, gaps) = lse.gather(lse_memory);
    assert_eq!(bits(&values), expected_lse, "{} {case:?}", T::DTYPE);
    assert!(gaps.iter().all(|x| *x == CANARY), "written between the log-sum-exps: {} {case:?}", T::DTYPE);

    // Sums of each key's probabilities.
    let shape = [dims.batch, dims.heads_q, dims.seq_kv];
    let (sums, rows) = (layout.of(shape), values);
    let sums_memory = pages.sums.place(&vec![CANARY; sums.len], side);
    let kv = (
        k.tensor(pages.k.place(&k.scatter(&inputs.k, gap), side)),
        v.tensor(pages.v.place(&v.scatter(&inputs.v, gap), side)),
    );
    let q = q.tensor(pages.q.place(&q.scatter(&inputs.q, gap), side));
    let guarded_lse = lse.tensor(pages.lse.place(&lse.scatter(&rows, f32::NAN), side));
    guarded.key_sums(q, kv, guarded_lse, sums.tensor_mut(sums_memory), workspace).unwrap();
    let (values, gaps) = sums.gather(sums_memory);
    let (lse, mut expected) = (TensorRef::from_slice(&rows, dims.lse()).unwrap(), vec![CANARY; len(shape)]);
    let to = TensorMut::from_slice(&mut expected, shape).unwrap();
    plain.key_sums(inputs.q(), (inputs.k(), inputs.v()), lse, to, &mut Workspace::new()).unwrap();
    assert_eq!(bits(&values), bits(&expected), "{} {case:?}", T::DTYPE);
    assert!(gaps.iter().all(|x| *x == CANARY), "written between the sums: {} {case:?}", T::DTYPE);
}

/// Tails of every length for vectors of up to 16, and sizes around those of models.
fn dims() -> impl Iterator<Item = usize> + Clone {
    (1..=40).chain([64, 65, 127])
}

fn every_head_size<T: Bits>() {
    let (mut pages, mut workspace, mut rng) = (Pages::new(), Workspace::new(), Rng(1));
    for (form, level) in forms_and_levels() {
        for head_dim in dims() {
            for value_dim in dims() {
                let near = head_dim.abs_diff(value_dim) <= 1;
                if !near && !rng.one_in(6) {
                    continue;
                }
                let case = Case {
                    // Every number of queries up to a block's panels, and of keys past a tile of the decode form.
                    dims: Dims {
                        batch: 1,
                        heads_q: 2,
                        heads_kv: 1 + rng.below(2),
                        seq_q: 1 + rng.below(20),
                        seq_kv: 1 + rng.below(70),
                        head_dim,
                        value_dim,
                    },
                    form,
                    level,
                    layout: ARRANGEMENTS[rng.below(ARRANGEMENTS.len())],
                    side: Side::End,
                    options: rng.one_in(2),
                    masks: &[],
                };
                for side in [Side::End, Side::Start] {
                    check::<T>(Case { side, ..case }, &mut pages, &mut workspace, &mut rng);
                }
            }
        }
    }
}

#[test]
fn every_head_size_f32() {
    every_head_size::<f32>();
}
#[test]
fn every_head_size_f16() {
    every_head_size::<f16>();
}
#[test]
fn every_head_size_bf16() {
    every_head_size::<bf16>();
}

/// Every number of queries over two panels and every number of keys over a tile, in every layout.
#[test]
fn every_sequence_length() {
    let (mut pages, mut workspace, mut rng) = (Pages::new(), Workspace::new(), Rng(2));
    for (form, level) in forms_and_levels() {
        let queries = (1..=34).map(|seq_q| (seq_q, 1 + seq_q * 7 % 70));
        let keys = (1..=130).map(|seq_kv| (1 + seq_kv % 7, seq_kv));
        for (seq_q, seq_kv) in queries.chain(keys).chain([(3, 239), (3, 240), (3, 241), (1, 511), (2, 512), (1, 1030)])
        {
            for layout in ARRANGEMENTS {
                let dims = Dims { batch: 2, value_dim: 5, ..Dims::new(1, seq_q, seq_kv, 3 + seq_q % 3) };
                let side = if rng.one_in(2) { Side::End } else { Side::Start };
                let case = Case { dims, form, level, layout, side, options: rng.one_in(2), masks: &[] };
                check::<f32>(case, &mut pages, &mut workspace, &mut rng);
                check::<f16>(case, &mut pages, &mut workspace, &mut rng);
                check::<bf16>(case, &mut pages, &mut workspace, &mut rng);
            }
        }
    }
}

/// Every ready mask, and three that intersect, at sizes around a vector, a panel and a tile. The result in ordinary memory is within
/// its bound of the reference, and that between guard pages has the same bits.
#[test]
fn ready_masks() {
    fn check_masks<T: Bits>(pages: &mut Pages, rng: &mut Rng) {
        let mut workspace = Workspace::new();
        let sizes = [(1, 1), (3, 17), (8, 31), (16, 48), (17, 49), (33, 97), (5, 241), (2, 257)];
        for (n, (seq_q, seq_kv)) in sizes.into_iter().enumerate() {
            let dims = Dims { heads_q: 4, heads_kv: 2, value_dim: 5, ..Dims::new(2, seq_q, seq_kv, 3 + n % 2) };
            for kind in 0..READY_MASKS + 2 {
                let masks = match kind {
                    kind if kind < READY_MASKS => vec![ready_mask(kind, rng, &dims)],
                    _ => three_ready_masks(rng, &dims),
                };
                let inputs = Inputs::<T>::random(dims, rng);
                for form in FORMS {
                    let problem = problem(&inputs, &masks, form);
                    if let Err(error) = support::check::check(&problem) {
                        panic!("{error}\n{problem}");
                    }
                    for (level, side) in Level::available().flat_map(|level| [(level, Side::Start), (level, Side::End)])
                    {
                        let layout = ARRANGEMENTS[rng.below(ARRANGEMENTS.len())];
                        let case = Case { dims, form, level, layout, side, options: false, masks: &masks };
                        check_inputs(&inputs, case, pages, &mut workspace, rng);
                        check_inputs(&inputs, Case { options: true, ..case }, pages, &mut workspace, rng);
                    }
                }
            }
        }
    }
    let (mut pages, mut rng) = (Pages::new(), Rng(52));
    check_masks::<f32>(&mut pages, &mut rng);
    check_masks::<f16>(&mut pages, &mut rng);
    check_masks::<bf16>(&mut pages, &mut rng);
}

/// The problem of these inputs, in ordinary memory.
fn problem<T: Bits>(inputs: &Inputs<T>, masks: &[OwnedMask], form: Form) -> Problem {
    let tensor = |shape, elements: &[T]| {
        let layout = Layout::contiguous(shape);
        Tensor::new(T::DTYPE, layout, |index| elements[layout.at(index)].to_f32())
    };
    let dims = inputs.dims;
    let mut problem = Problem::plain(dims, || 0.0);
    problem.q = tensor(dims.q(), &inputs.q);
    problem.k = tensor(dims.k(), &inputs.k);
    problem.v = tensor(dims.v(), &inputs.v);
    problem.out.0 = T::DTYPE;
    problem.masks = masks.to_vec();
    problem.form = Some(form);
    problem
}

/// A mask that borrows its list reads nothing past either end of it.
#[test]
fn lists_of_masks() {
    let (mut pages, mut rng) = (Pages::new(), Rng(53));
    for (form, level) in forms_and_levels() {
        for batch in 1..=5 {
            let dims = Dims { batch, ..Dims::new(2, 7, 50, 8) };
            let inputs = Inputs::<f32>::random(dims, &mut rng);
            let starts: Vec<i64> = (0..batch).map(|_| rng.below(50) as i64).collect();
            for side in [Side::Start, Side::End] {
                note(format_args!("key starts {form:?} {level} batch {batch} {side:?}"));
                let results = [&starts[..], pages.key_starts.place(&starts, side)].map(|starts| {
                    let mask = KeyStarts::new(starts);
                    inputs.bits(&Attention::new().form(form).level(level).masked_by(&mask))
                });
                assert_eq!(results[0], results[1]);
            }
        }
    }
}

/// Tensors that repeat by strides of 0 own a single row, or a single element.
#[test]
fn broadcast_inputs() {
    let (mut pages, mut workspace) = (Pages::new(), Workspace::new());
    for (form, level) in forms_and_levels() {
        for head_dim in dims() {
            for side in [Side::End, Side::Start] {
                note(format_args!("broadcast {form:?} {level} {head_dim} {side:?}"));
                let attention = Attention::new().form(form).level(level);
                let row = pages.k.place(&vec![f16::ONE; head_dim], side);
                let keys = TensorRef::with_strides(row, 0, [2, 3, 50, head_dim], [0, 0, 0, 1]).unwrap();
                let element = pages.q.place(&[1.0f32], side);
                let queries = TensorRef::with_strides(element, 0, [2, 3, 9, head_dim], [0; 4]).unwrap();
                let shape = [2, 3, 9, head_dim];
                let out = pages.out.place(&vec![0.0f32; len(shape)], side);
                let out_tensor = TensorMut::from_slice(out, shape).unwrap();
                attention.compute(queries, (keys, keys), out_tensor, None, &mut workspace).unwrap();
                assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6), "{form:?} {level} {head_dim}");
            }
        }
    }
}

/// Scores and merges stay inside their tensors.
#[test]
fn scores_and_merge() {
    let (mut pages, mut rng) = (Pages::new(), Rng(3));
    for level in Level::available() {
        for head_dim in dims() {
            let dims = Dims { heads_q: 2, ..Dims::new(1, 1 + rng.below(20), 1 + rng.below(70), head_dim) };
            let layout = ARRANGEMENTS[rng.below(ARRANGEMENTS.len())];
            for side in [Side::End, Side::Start] {
                note(format_args!("scores {dims:?} {level} {layout:?} {side:?}"));
                let inputs = Inputs::<f32>::random(dims, &mut rng);
                let [q, k, to] = [dims.q(), dims.k(), dims.scores()].map(|shape| layout.of(shape));
                let memory = pages.out.place(&vec![CANARY; to.len], side);
                Attention::new()
                    .level(level)
                    .causal()
                    .scores_into(
                        ScoreStage::Biased,
                        q.tensor(pages.q.place(&q.scatter(&inputs.q, f32::NAN), side)),
                        k.tensor(pages.k.place(&k.scatter(&inputs.k, f32::NAN), side)),
                        to.tensor_mut(memory),
                    )
                    .unwrap();
                let (scores, gaps) = to.gather(memory);
                assert!(scores.iter().all(|x| !x.is_nan() && *x != CANARY) && gaps.iter().all(|x| *x == CANARY));

                note(format_args!("merge {dims:?} {layout:?} {side:?}"));
                let (out, lse) = (layout.of(dims.out()), layout.of(dims.lse()));
                let ones = |n| vec![1.0f32; n];
                let out_a = pages.out.place(&out.scatter(&ones(len(dims.out())), CANARY), side);
                let lse_a = pages.lse.place(&lse.scatter(&ones(len(dims.lse())), CANARY), side);
                merge(
                    out.tensor_mut(out_a),
                    lse.tensor_mut(lse_a),
                    out.tensor(pages.v.place(&out.scatter(&ones(len(dims.out())), CANARY), side)),
                    lse.tensor(pages.k.place(&lse.scatter(&ones(len(dims.lse())), CANARY), side)),
                )
                .unwrap();
                let ((merged, gaps), (_, lse_gaps)) = (out.gather(out_a), lse.gather(lse_a));
                assert!(merged.iter().all(|x| *x == 1.0) && gaps.iter().chain(&lse_gaps).all(|x| *x == CANARY));
            }
        }
    }
}

/// Pools of pages of any size and layout, whose last page ends at the guard page or whose first one starts there. Slots of no key hold
/// poison. The result is that of keys and values in one piece.
#[test]
fn pools_of_pages() {
    fn check_pool<T: Bits>(pages: &mut Pages, rng: &mut Rng) {
        let mut workspace = Workspace::new();
        for (form, level) in forms_and_levels() {
            let attention = Attention::new().causal().form(form).level(level).threads(Threads::Serial);
            for (size, dim, keys) in [(1, 3, 70), (3, 8, 50), (16, 20, 300), (40, 64, 90)] {
                let dims = Dims { heads_q: 4, heads_kv: 2, ..Dims::new(2, 5, keys, dim) };
                let inputs = Inputs::<T>::random(dims, rng);
                let (expected, expected_lse) = inputs.bits(&attention);
                let count = keys.div_ceil(size);
                let shape = [count, 2, size, dim];
                // Pages backwards: the first keys are at the end of the pool.
                let table: Vec<i32> = (0..count as i32).rev().collect();
                let pool = |from: &[T]| {
                    let mut pool = vec![T::POISON[0]; len(shape)];
                    for (n, x) in from.iter().enumerate() {
                        let (h, j, e) = (n / dim / keys, n / dim % keys, n % dim);
                        let page = count - 1 - j / size;
                        pool[((page * 2 + h) * size + j % size) * dim + e] = *x;
                    }
                    pool
                };
                let (k, v) = (pool(&inputs.k), pool(&inputs.v));
                for (layout, side) in ARRANGEMENTS.into_iter().flat_map(|a| [(a, Side::Start), (a, Side::End)]) {
                    note(format_args!("{} {form:?} {level} pages of {size} x {dim}, {layout:?} {side:?}", T::DTYPE));
                    let laid = layout.of(shape);
                    let [k, v] = [(&mut pages.k, &k), (&mut pages.v, &v)]
                        .map(|(memory, pool)| laid.tensor(memory.place(&laid.scatter(pool, T::POISON[0]), side)));
                    let (lengths, mut out) = ([keys], vec![T::from_f32(CANARY); len(dims.out())]);
                    let table = PageTable::new(&table, count, &lengths, size).unwrap();
                    let mut lse = vec![CANARY; len(dims.lse())];
                    let into = TensorMut::from_slice(&mut out, dims.out()).unwrap();
                    let lse_into = TensorMut::from_slice(&mut lse, dims.lse()).unwrap();
                    attention
                        .compute(inputs.q(), KeysValues::paged(k, v, table), into, lse_into, &mut workspace)
                        .unwrap();
                    let case = format!("{} {form:?} {level} {size} x {dim} {layout:?}", T::DTYPE);
                    assert_eq!(bits(&out), expected, "{case}");
                    assert_eq!(bits(&lse), expected_lse, "{case}");
                }
            }
        }
    }
    let (mut pages, mut rng) = (Pages::new(), Rng(51));
    check_pool::<f32>(&mut pages, &mut rng);
    check_pool::<f16>(&mut pages, &mut rng);
    check_pool::<bf16>(&mut pages, &mut rng);
}
