//! Promise: `Softmax` is its formula, for every mask, bias, axis, stride and type of the output. A hidden element counts for
//! nothing.

mod support;

use flashtile::softmax::{Axis, Number, Softmax, log_softmax_into, logsumexp_into, softmax_into};
use flashtile::{Element, Error, TensorMut, TensorRef, bf16, f16};
use std::fmt::Debug;
use support::Rng;

const INF: f64 = f64::INFINITY;

/// A type of elements: how it is made and read, and its unit of rounding with the smallest number.
trait Tried: Number + PartialEq + Debug {
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
    /// 1 in the type of the arithmetic.
    fn real_one() -> Self::Real;
    const UNIT: f64;
    const LEAST: f64;
}
macro_rules! tried {
    ($($t:ty, $of:expr, $wide:expr, $unit:expr, $least:expr);*) => {$(
        impl Tried for $t {
            fn of(x: f64) -> Self {
                $of(x)
            }
            fn wide(self) -> f64 {
                $wide(self)
            }
            fn real_one() -> Self::Real {
                1.0
            }
            const UNIT: f64 = $unit;
            const LEAST: f64 = $least;
        }
    )*};
}
const U32: f64 = 1.0 / (1u64 << 24) as f64;
const U64: f64 = 1.0 / (1u64 << 53) as f64;
tried!(f32, |x| x as f32, f64::from, U32, 1.5e-45; f64, |x| x, |x| x, U64, 5e-324;
    f16, |x| f16::from_f32(x as f32), f16::to_f64, 1.0 / 2048.0, 6e-8;
    bf16, |x| bf16::from_f32(x as f32), bf16::to_f64, 1.0 / 256.0, 1e-40);

/// The places of a tensor's elements in memory: axes in a random order, some backwards, with gaps between rows.
struct Layout {
    shape: [usize; 4],
    strides: [isize; 4],
    offset: usize,
    len: usize,
}

impl Layout {
    fn new(shape: [usize; 4], rng: &mut Rng) -> Self {
        let mut axes = [0, 1, 2, 3];
        for n in (1..4).rev() {
            axes.swap(n, rng.below(n + 1));
        }
        let (mut strides, mut offset, mut len) = ([0; 4], 0, 1usize + rng.below(2));
        for axis in axes {
            strides[axis] = len as isize;
            if rng.below(3) == 0 {
                offset += (shape[axis].max(1) - 1) * len;
                strides[axis] = -strides[axis];
            }
            len = len * shape[axis].max(1) + rng.below(2);
        }
        Layout { shape, strides, offset, len }
    }

    fn dense(shape: [usize; 4]) -> Self {
        let strides = std::array::from_fn(|n| shape[n + 1..].iter().product::<usize>() as isize);
        Layout { shape, strides, offset: 0, len: shape.iter().product() }
    }

    fn place(&self, index: [usize; 4]) -> usize {
        let offset: isize = index.iter().zip(self.strides).map(|(&i, stride)| i as isize * stride).sum();
        (self.offset as isize + offset) as usize
    }

    fn put<T: Copy>(&self, data: &[T], fill: T) -> Vec<T> {
        let mut memory = vec![fill; self.len];
        for (index, &x) in indices(self.shape).zip(data) {
            memory[self.place(index)] = x;
        }
        memory
    }

    fn tensor<'a, T: Copy>(&self, memory: &'a [T]) -> TensorRef<'a, T> {
        TensorRef::with_strides(memory, self.offset, self.shape, self.strides).unwrap()
    }

    fn get<T: Copy>(&self, memory: &[T]) -> Vec<T> {
        indices(self.shape).map(|index| memory[self.place(index)]).collect()
    }
}

/// Every index, row-major.
fn indices(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    (0..shape.iter().product::<usize>()).map(move |mut n| {
        let mut index = [0; 4];
        for axis in (0..4).rev() {
            (index[axis], n) = (n % shape[axis], n / shape[axis]);
        }
        index
    })
}

/// The element of a tensor with axes of size 1 that are repeated.
fn repeated<T: Copy>(data: &[T], shape: [usize; 4], index: [usize; 4]) -> T {
    let place = (0..4).fold(0, |place, n| place * shape[n] + if shape[n] == 1 { 0 } else { index[n] });
    data[place]
}

struct Case<T> {
    shape: [usize; 4],
    axis: usize,
    scale: f64,
    x: Vec<T>,
    mask: Option<([usize; 4], Vec<bool>)>,
    bias: Option<([usize; 4], Vec<f32>)>,
}

impl<T: Tried> Case<T> {
    fn random(shape: [usize; 4], axis: usize, rng: &mut Rng) -> Self {
        let repeating = |rng: &mut Rng| shape.map(|size| if rng.below(3) == 0 { 1 } else { size });
        let len = |shape: [usize; 4]| shape.iter().product::<usize>();
        let mask = (rng.below(4) > 0).then(|| {
            let shape = repeating(rng);
            (shape, (0..len(shape)).map(|_| rng.below(3) > 0).collect())
        });
        let bias = (rng.below(3) > 0).then(|| {
            let shape = repeating(rng);
            let mut one =
                |_| if rng.below(5) == 0 { f32::NEG_INFINITY } else { (4.0 * rng.uniform() * 16.0).round() / 16.0 };
            (shape, (0..len(shape)).map(&mut one).collect())
        });
        let scale = [1.0, 0.5, -1.5, 0.0, 1.0][rng.below(5)];
        let x = (0..len(shape)).map(|_| T::of(8.0 * f64::from(rng.uniform()))).collect();
        let mut case = Case { shape, axis, scale, x, mask, bias };
        // What is hidden may be anything.
        for (n, index) in indices(shape).enumerate() {
            if case.hidden(index) {
                case.x[n] = T::of([f64::NAN, INF, -INF, 1.0][rng.below(4)]);
            } else if rng.below(20) == 0 {
                case.x[n] = T::of(-INF);
            }
        }
        case
    }

    fn hidden(&self, index: [usize; 4]) -> bool {
        let by_mask = self.mask.as_ref().is_some_and(|(shape, mask)| !repeated(mask, *shape, index));
        by_mask || self.bias.as_ref().is_some_and(|(shape, bias)| repeated(bias, *shape, index) == f32::NEG_INFINITY)
    }

    /// score[i] of each line, in the order of lines; -inf if hidden.
    fn scores(&self) -> Vec<Vec<f64>> {
        let mut shape_of_lines = self.shape;
        shape_of_lines[self.axis] = 1;
        let x = |index| repeated(&self.x, self.shape, index).wide();
        let score = &|index| {
            let bias = self.bias.as_ref().map_or(0.0, |(shape, bias)| f64::from(repeated(bias, *shape, index)));
            if self.hidden(index) || x(index) == -INF { -INF } else { self.scale * x(index) + bias }
        };
        let line = |first: [usize; 4]| {
            (0..self.shape[self.axis]).map(move |i| {
                let mut index = first;
                index[self.axis] = i;
                score(index)
            })
        };
        indices(shape_of_lines).map(|first| line(first).collect()).collect()
    }

    /// The places of a line in a dense array.
    fn places(&self, line: usize) -> Vec<usize> {
        let (len, after) = (self.shape[self.axis], self.shape[self.axis + 1..].iter().product::<usize>());
        (0..len).map(|i| line / after * len * after + i * after + line % after).collect()
    }

    fn options<'a>(&self, mask: Option<TensorRef<'a, bool>>, bias: Option<TensorRef<'a, f32>>) -> Softmax<'a> {
        let mut options = Softmax::new().axis(self.axis).scale(self.scale);
        if let Some(mask) = mask {
            options = options.mask(mask);
        }
        if let Some(bias) = bias {
            options = options.bias(bias);
        }
        options
    }

    /// (softmax, log_softmax, logsumexp) with every tensor in layouts of its own.
    fn run<O: Number<Real = T::Real> + Tried>(&self, layout: &mut dyn FnMut([usize; 4]) -> Layout) -> [Vec<O>; 3] {
        let mask = self.mask.as_ref().map(|(shape, mask)| {
            let layout = layout(*shape);
            (layout.put(mask, true), layout)
        });
        let bias = self.bias.as_ref().map(|(shape, bias)| {
            let layout = layout(*shape);
            (layout.put(bias, 7.0), layout)
        });
        let mask = mask.as_ref().map(|(memory, layout)| layout.tensor(memory));
        let options = self.options(mask, bias.as_ref().map(|(memory, layout)| layout.tensor(memory)));
        let (from, to) = (layout(self.shape), layout(self.shape));
        let memory = from.put(&self.x, T::of(f64::NAN));
        let x = from.tensor(&memory);
        let mut results = [false, true].map(|log| {
            let mut out = vec![O::of(9.0); to.len];
            let tensor = TensorMut::with_strides(&mut out, to.offset, self.shape, to.strides).unwrap();
            let done = if log { options.log_softmax_into(x, tensor) } else { options.softmax_into(x, tensor) };
            done.unwrap();
            let nines = out.iter().filter(|&&y| y == O::of(9.0)).count();
            assert_eq!(nines, to.len - self.x.len(), "elements outside of the output are written");
            to.get(&out)
        });
        let mut lse = vec![O::of(9.0); self.x.len() / self.shape[self.axis].max(1)];
        options.logsumexp_into(x, &mut lse).unwrap();
        [std::mem::take(&mut results[0]), std::mem::take(&mut results[1]), lse]
    }

    /// (softmax, log_softmax) in place.
    fn run_in_place(&self, layout: &mut dyn FnMut([usize; 4]) -> Layout) -> [Vec<T>; 2] {
        let mask = self.mask.as_ref().map(|(shape, mask)| (mask, Layout::dense(*shape)));
        let bias = self.bias.as_ref().map(|(shape, bias)| (bias, Layout::dense(*shape)));
        let mask = mask.as_ref().map(|(mask, layout)| layout.tensor(mask));
        let options = self.options(mask, bias.as_ref().map(|(bias, layout)| layout.tensor(bias)));
        [false, true].map(|log| {
            let own = layout(self.shape);
            let mut memory = own.put(&self.x, T::of(9.0));
            let tensor = TensorMut::with_strides(&mut memory, own.offset, self.shape, own.strides).unwrap();
            let done = if log { options.log_softmax_in_place(tensor) } else { options.softmax_in_place(tensor) };
            done.unwrap();
            let y = own.get(&memory);
            let all = memory.iter().filter(|&&y| y == T::of(9.0)).count();
            let inside = y.iter().filter(|&&y| y == T::of(9.0)).count();
            assert_eq!(all - inside, own.len - self.x.len(), "elements outside of the tensor are written");
            y
        })
    }

    /// Every result within its bound of the formula in f64, each line apart.
    fn check<O: Number<Real = T::Real> + Tried>(&self, [y, log, lse]: &[Vec<O>; 3], unit: f64) {
        for (line, scores) in self.scores().into_iter().enumerate() {
            let max = scores.iter().copied().fold(-INF, f64::max);
            let sum: f64 = scores.iter().map(|score| if max == -INF { 0.0 } else { (score - max).exp() }).sum();
            let exact_lse = if max == -INF { -INF } else { max + sum.ln() };
            // The sum and the exponentials: the bound of the module page, without the differences.
            let sums = (64.0 + scores.len() as f64 / 1024.0 + 16.0) * unit;
            let case = format!("{:?} axis {} scale {} line {line}", self.shape, self.axis, self.scale);
            // The sum (relative), the f64 of the judge, and the rounding of the result.
            let bound = sums + 4.0 * U64 * (1.0 + max.abs()) + O::UNIT * exact_lse.abs() + O::LEAST;
            let got = lse[line].wide();
            assert!(got == exact_lse || (got - exact_lse).abs() <= bound, "{case}: lse {got} {exact_lse}");
            for (place, score) in self.places(line).into_iter().zip(&scores) {
                let (y, log) = (y[place].wide(), log[place].wide());
                if *score == -INF {
                    assert!(y.to_bits() == 0 && log == -INF, "{case}: hidden, but {y} {log}");
                    continue;
                }
                let below = score - max;
                let exact = (below - sum.ln()).exp();
                // Rounding x - max and its product with the scale; the judge's own score.
                let differences = 2.0 * below.abs() * unit + 4.0 * U64 * (1.0 + score.abs() + max.abs());
                let bound = exact * (sums + differences + O::UNIT * 1.001) + O::LEAST;
                assert!((y - exact).abs() <= bound, "{case}: {y} {exact}");
                let exact = below - sum.ln();
                let bound = sums + differences + (unit + O::UNIT) * exact.abs() * 1.001 + O::LEAST;
                assert!((log - exact).abs() <= bound, "{case}: log {log} {exact}");
            }
        }
    }
}

fn bits<T: Tried>(results: &[Vec<T>; 3]) -> Vec<u64> {
    results.iter().flatten().map(|y| y.wide().to_bits()).collect()
}

fn check_type<T: Tried, O: Number<Real = T::Real> + Tried>(shape: [usize; 4], seed: u64) {
    let mut rng = Rng(seed);
    let unit = if size_of::<T::Real>() == 8 { U64 } else { U32 };
    for axis in 0..4 {
        let case = Case::<T>::random(shape, axis, &mut rng);
        let dense = case.run::<O>(&mut Layout::dense);
        case.check(&dense, unit);
        let strided = case.run::<O>(&mut |shape| Layout::new(shape, &mut rng));
        assert!(bits(&dense) == bits(&strided), "{shape:?} axis {axis}: strides change bits");
        if case.bias.is_none() {
            case.check_bits(&dense);
        }
        let [y, log, _] = case.run::<T>(&mut Layout::dense);
        for layout in [&mut Layout::dense as &mut dyn FnMut(_) -> _, &mut |shape| Layout::new(shape, &mut rng)] {
            let in_place = case.run_in_place(layout);
            let same = |a: &[T], b: &[T]| a.iter().zip(b).all(|(a, b)| a.wide().to_bits() == b.wide().to_bits());
            assert!(same(&in_place[0], &y) && same(&in_place[1], &log), "{shape:?} axis {axis}: in place, other bits");
        }
    }
}

impl<T: Tried> Case<T> {
    /// Without a bias, the results are those of the functions of an axis, rounded to the output's type, with -inf for what is hidden.
    fn check_bits<O: Number<Real = T::Real> + Tried>(&self, [y, log, lse]: &[Vec<O>; 3]) {
        let of = |(index, x): ([usize; 4], &T)| if self.hidden(index) { -INF } else { x.wide() };
        let x: Vec<f64> = indices(self.shape).zip(&self.x).map(of).collect();
        let axis = Axis::new(&self.shape, self.axis).unwrap();
        let expected = if size_of::<T::Real>() == 8 {
            along::<f64>(&x, axis, self.scale)
        } else {
            along(&x.into_iter().map(|x| x as f32).collect::<Vec<_>>(), axis, self.scale as f32)
        };
        let case = format!("{:?} axis {}", self.shape, self.axis);
        for (got, expected) in [y, log].into_iter().zip(&expected) {
            assert!(got.iter().zip(expected).all(|(got, y)| *got == O::of(*y)), "{case}");
        }
        // (The logarithm is rounded once from f64, and that of the functions is a number of the arithmetic.)
        if size_of::<O>() == size_of::<T::Real>() {
            assert!(lse.iter().zip(&expected[2]).all(|(got, lse)| *got == O::of(*lse)), "{case}: lse");
        }
    }
}

/// (softmax, log_softmax, logsumexp) along an axis.
fn along<R: Tried + Number<Real = R>>(x: &[R], axis: Axis, scale: R) -> [Vec<f64>; 3] {
    let (mut y, mut log, mut lse) = (x.to_vec(), x.to_vec(), vec![R::of(9.0); axis.lines()]);
    softmax_into(x, &mut y, axis, scale).unwrap();
    log_softmax_into(x, &mut log, axis, scale).unwrap();
    logsumexp_into(x, &mut lse, axis, scale).unwrap();
    [y, log, lse].map(|numbers| numbers.into_iter().map(R::wide).collect())
}

#[test]
fn every_small_shape() {
    let sizes = [1, 2, 3];
    let mut seed = 1;
    for n in 0..81 {
        let shape = [sizes[n % 3], sizes[n / 3 % 3], sizes[n / 9 % 3], sizes[n / 27]];
        for _ in 0..4 {
            seed += 1;
            check_type::<f32, f32>(shape, seed);
            check_type::<f64, f64>(shape, seed);
            check_type::<f16, f32>(shape, seed);
        }
    }
}

/// Around a vector, the short rows, the rows that are computed together (1024), a block (4096) and a long row (16384).
#[test]
fn every_type_and_length() {
    let lengths = [5, 8, 31, 33, 64, 65, 250, 1023, 1024, 1025, 4095, 4097];
    for (n, len) in lengths.into_iter().enumerate() {
        let shape = [[2, 1, 3, len], [1, len, 3, 2], [len, 2, 1, 2], [1, 1, len, 37]][n % 4];
        let seed = 1000 + n as u64;
        check_type::<f32, f32>(shape, seed);
        check_type::<f64, f64>(shape, seed);
        check_type::<f16, f32>(shape, seed);
        check_type::<bf16, f32>(shape, seed);
        check_type::<f16, f16>(shape, seed);
        check_type::<bf16, f16>(shape, seed);
        check_type::<f32, bf16>(shape, seed);
    }
    check_type::<f32, f16>([1, 2, 3, 129], 6);
    check_type::<bf16, f32>([1, 1, 2, 16_384], 7);
    check_type::<bf16, f32>([1, 1, 2, 20_000], 7);
    check_type::<f32, f32>([1, 20_000, 1, 2], 8);
}

/// Scales of both signs, whose factors are applied at different places, along rows of every way to compute them.
#[test]
fn scales_at_every_length() {
    fn check<T: Tried, O: Number<Real = T::Real> + Tried>(len: usize, scale: f64) {
        let mut rng = Rng(len as u64);
        let mut case = std::iter::repeat_with(|| Case::<T>::random([1, 1, 2, len], 3, &mut rng))
            .find(|case| case.bias.is_none())
            .unwrap();
        case.scale = scale;
        let dense = case.run::<O>(&mut Layout::dense);
        case.check(&dense, if size_of::<T::Real>() == 8 { U64 } else { U32 });
        case.check_bits(&dense);
        let ([y, log, _], in_place) = (case.run::<T>(&mut Layout::dense), case.run_in_place(&mut Layout::dense));
        for (a, b) in in_place.iter().flatten().zip(y.iter().chain(&log)) {
            assert_eq!(a.wide().to_bits(), b.wide().to_bits(), "{len} elements, scale {scale}: in place, other bits");
        }
    }
    for len in [2, 5, 100, 128, 129, 1000, 16384, 16385] {
        for scale in [-0.5, -0.3, 0.5, -1.0, 1.0, -2.0, 1e-35, -1e-35] {
            check::<f32, f32>(len, scale);
            check::<f16, bf16>(len, scale);
            check::<f64, f64>(len, scale);
        }
    }
}

/// (softmax, log_softmax, logsumexp) of three elements: alone, and beside another line, which must be the same.
fn of_three<T: Tried>(x: [T; 3], scale: f64, visible: [bool; 3], bias: [f32; 3]) -> ([T; 3], [T; 3], T) {
    let of_line = |lines: usize| {
        let shape = [3, lines];
        let x: Vec<T> = x.into_iter().flat_map(|x| [x, T::of(1.0)].into_iter().take(lines)).collect();
        let tensor = TensorRef::from_slice(&x, shape).unwrap();
        let (mut y, mut log, mut lse) = (x.clone(), x.clone(), vec![T::of(9.0); lines]);
        let visible = TensorRef::from_slice(&visible, [3, 1]).unwrap();
        let bias = TensorRef::from_slice(&bias, [3, 1]).unwrap();
        let options = Softmax::new().axis(0).scale(scale).mask(visible).bias(bias);
        options.softmax_into(tensor, TensorMut::from_slice(&mut y, shape).unwrap()).unwrap();
        options.log_softmax_into(tensor, TensorMut::from_slice(&mut log, shape).unwrap()).unwrap();
        options.logsumexp_into(tensor, &mut lse).unwrap();
        ([0, 1, 2].map(|n| y[n * lines]), [0, 1, 2].map(|n| log[n * lines]), lse[0])
    };
    let (alone, beside) = (of_line(1), of_line(2));
    assert_eq!(format!("{alone:?}"), format!("{beside:?}"), "a line alone and beside another");
    alone
}

/// Lines whose output is written past the caches: it starts anywhere in a cache line, and its rows end anywhere in one. More
/// elements than the exponentials of a panel are kept for.
#[test]
fn large_outputs() {
    fn check<T: Tried, O: Number<Real = T::Real> + Tried>(number: usize, shape: [usize; 2]) {
        let [len, lines] = shape;
        let x: Vec<T> = (0..len * lines).map(|n| T::of((n * 7919 % 1000) as f64 / 64.0)).collect();
        let visible: Vec<bool> = (0..len * lines).map(|n| n * 31 % 7 != 3).collect();
        let hidden = |(x, visible): (&T, &bool)| if *visible { *x } else { T::of(-INF) };
        let expected_of: Vec<T> = x.iter().zip(&visible).map(hidden).collect();
        let mut expected = vec![O::of(9.0); x.len()];
        let plain = Softmax::new().axis(number);
        for offset in [0, 1, 16] {
            let mut memory = vec![O::of(9.0); x.len() + offset];
            let out = TensorMut::with_strides(&mut memory, offset, shape, [lines as isize, 1]).unwrap();
            let options = plain.clone().mask(TensorRef::from_slice(&visible, shape).unwrap());
            options.softmax_into(TensorRef::from_slice(&x, shape).unwrap(), out).unwrap();
            if offset == 0 {
                let out = TensorMut::from_slice(&mut expected, shape).unwrap();
                plain.softmax_into(TensorRef::from_slice(&expected_of, shape).unwrap(), out).unwrap();
            }
            assert!(memory[offset..] == expected, "{shape:?} from {offset} on");
            assert!(memory[..offset].iter().all(|y| *y == O::of(9.0)));
        }
        // The same bits as the function for arrays, where the types are the same.
        let mut own = expected_of.clone();
        Softmax::new().axis(number).softmax_in_place(TensorMut::from_slice(&mut own, shape).unwrap()).unwrap();
        let axis = Axis::new(&shape, number).unwrap();
        let mut array = expected_of.clone();
        softmax_into(&expected_of, &mut array, axis, T::real_one()).unwrap();
        assert!(own == array, "{shape:?}");
        if size_of::<O>() == size_of::<T>() {
            assert!(array.iter().zip(&expected).all(|(a, b)| a.wide() == b.wide()), "{shape:?}");
        }
    }
    check::<f32, f32>(0, [1030, 4096]);
    check::<f32, f32>(0, [1030, 4100]);
    check::<f32, f32>(0, [13_000, 330]);
    check::<bf16, bf16>(0, [2050, 4128]);
    check::<bf16, f32>(0, [1030, 4128]);
    check::<f32, f32>(1, [1030, 4100]);
    check::<bf16, bf16>(1, [2050, 4129]);
    check::<bf16, f32>(1, [4128, 1030]);
    check::<f32, f32>(1, [33_000, 129]);
}

/// The exact values of what has no rounding.
#[test]
fn edge_rules() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let run = of_three::<f32>;
    let all = [true; 3];
    for hidden in [nan, inf, -inf, 3.0] {
        for scale in [1.0, -1.0, 0.0, 1e30] {
            let by_mask = run([2.0, hidden, 2.0], scale, [true, false, true], [0.0, 1.0, 0.0]);
            let by_bias = run([2.0, hidden, 2.0], scale, all, [0.0, -inf, 0.0]);
            assert_eq!(by_mask.0, [0.5, 0.0, 0.5]);
            assert_eq!((by_mask.1[1], by_mask), (-inf, by_bias), "{hidden} {scale}");
            for mask in [[false; 3], all] {
                let bias = if mask == all { [-inf; 3] } else { [nan, inf, 1.0] };
                assert_eq!(run([hidden; 3], scale, mask, bias), ([0.0; 3], [-inf; 3], -inf), "nothing visible");
            }
        }
    }
    let not_finite = [([nan, 0.0, 0.0], [0.0; 3]), ([inf, 0.0, 0.0], [0.0; 3]), ([0.0; 3], [nan, 0.0, 0.0])];
    for (x, bias) in not_finite.into_iter().chain([([0.0; 3], [inf, 0.0, 0.0]), ([inf, -inf, -inf], [0.0; 3])]) {
        let (y, log, lse) = run(x, 1.0, all, bias);
        assert!(y.iter().chain(&log).all(|y| y.is_nan()) && lse.is_nan(), "{x:?} {bias:?}: {y:?}");
    }
    assert_eq!(run([inf, 0.0, 0.0], -1.0, all, [0.0; 3]).0, [0.0, 0.5, 0.5], "a negative scale hides +inf");
    // Scores beyond the range of f32, whose differences are not.
    let (y, log, lse) = run([3e38, 3e38, -3e38], 4.0, all, [0.0; 3]);
    assert_eq!((y, log[2], lse), ([0.5, 0.5, 0.0], -inf, inf));
    assert_eq!(run([f32::MAX, f32::MAX, 0.0], 1.0, all, [f32::MAX, f32::MAX, 0.0]).0, [0.5, 0.5, 0.0]);
    assert_eq!(run([f32::MIN; 3], 1.0, all, [f32::MIN; 3]).0, [1.0 / 3.0; 3]);
}

/// In f64, scores may leave the range of numbers.
#[test]
fn scores_above_the_range_of_f64() {
    let run = |x, scale, bias| {
        let (y, log, _) = of_three::<f64>(x, scale, [true; 3], bias);
        (y, log)
    };
    for sign in [1.0, -1.0] {
        let (y, log) = run([1.6e308 * sign, 1.5e308 * sign, -INF], 1.25 * sign, [0.0, 1.0, 0.0]);
        assert!(y == [1.0, 0.0, 0.0] && log[0] == 0.0 && (log[1] / -0.125e308 - 1.0).abs() < 1e-14, "{y:?} {log:?}");
        assert_eq!(log[2], -INF);
        let (y, _) = run([1.6e308 * sign, 1.6e308 * sign, 0.0], 1.25 * sign, [5.0, 5.0, 3e38]);
        assert_eq!(y, [0.5, 0.5, 0.0]);
        let (y, _) =
            run([1.6e308 * sign, 1.6e308 * sign, f64::NAN], 1.25 * sign, [5.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
        assert_eq!(y, [1.0, 0.0, 0.0]);
        let (y, _) = run([1.6e308 * sign, f64::NAN, 0.0], 1.25 * sign, [0.0; 3]);
        assert!(y.iter().all(|y| y.is_nan()), "{y:?}");
    }
}

/// A bias of a half type is that of its numbers in f32; masks and biases of lower rank lack axes in front.
#[test]
fn biases_of_half_types_and_lower_ranks() {
    fn with<T: Element>(bias: &[T], reversed: bool) -> Vec<f32> {
        let x: Vec<f32> = (0..2 * 3 * 40).map(|n| (n % 17) as f32).collect();
        let mut y = vec![9.0; 240];
        let (offset, stride) = if reversed { (39, -1) } else { (0, 1) };
        let bias = TensorRef::with_strides(bias, offset, [40], [stride]).unwrap();
        let out = TensorMut::from_slice(&mut y, [2, 3, 40]).unwrap();
        Softmax::new().bias(bias).softmax_into(TensorRef::from_slice(&x, [2, 3, 40]).unwrap(), out).unwrap();
        y
    }
    let bias: Vec<f32> = (0..40).map(|n| (n % 7) as f32 - 3.0).collect();
    for reversed in [false, true] {
        let expected = with(&bias, reversed);
        assert_eq!(with(&bias.iter().map(|&b| f16::from_f32(b)).collect::<Vec<_>>(), reversed), expected);
        assert_eq!(with(&bias.iter().map(|&b| bf16::from_f32(b)).collect::<Vec<_>>(), reversed), expected);
    }
    assert_ne!(with(&bias, false), with(&bias, true));
}

#[test]
fn axes_are_counted_from_either_end() {
    let x: Vec<f32> = (0..60).map(|n| (n * 7 % 13) as f32).collect();
    let run = |axis: i128| {
        let mut y = vec![0.0f32; 60];
        let x = TensorRef::from_slice(&x, [3, 4, 5]).unwrap();
        Softmax::new().axis(axis).softmax_into(x, TensorMut::from_slice(&mut y, [3, 4, 5]).unwrap()).map(|()| y)
    };
    for axis in 0..3 {
        assert_eq!(run(axis), run(axis - 3));
        assert!(run(axis).is_ok() && run(axis) != run((axis + 1) % 3));
        let shape = [3, 4, 5];
        assert_eq!(Axis::new(&shape, axis), Axis::new(&shape, axis - 3));
        assert_eq!(Axis::new(&shape, axis as i8 - 3), Axis::new(&shape, axis as u8));
    }
    for axis in [3, -4, i128::MAX, i128::MIN] {
        let refused = Error::AxisOutOfRange { axis, rank: 3 };
        assert_eq!((run(axis), Axis::new(&[3, 4, 5], axis)), (Err(refused.clone()), Err(refused)));
    }
    assert_eq!(
        Axis::new(&[3, 4, 5], -4).unwrap_err().to_string(),
        "there is no axis -4, counted from -1 at the end: the array has 3"
    );
}

#[test]
fn wrong_calls_are_refused_before_anything_is_written() {
    let x = [0.5f32; 6];
    let tensor = || TensorRef::from_slice(&x, [2, 3]).unwrap();
    let (mask, bias) = ([true; 6], [0.5f32; 4]);
    let try_with = |options: &Softmax<'_>, expected: Error, sentence: &str| {
        let (mut y, mut lse) = ([9.0f32; 6], [9.0f32; 2]);
        let softmax = options.softmax_into(tensor(), TensorMut::from_slice(&mut y, [2, 3]).unwrap());
        let log = options.log_softmax_into(tensor(), TensorMut::from_slice(&mut y, [2, 3]).unwrap());
        let sum = options.logsumexp_into(tensor(), &mut lse);
        let in_place = options.softmax_in_place(TensorMut::from_slice(&mut y, [2, 3]).unwrap());
        let log_in_place = options.log_softmax_in_place(TensorMut::from_slice(&mut y, [2, 3]).unwrap());
        assert_eq!([&softmax, &log, &sum, &in_place, &log_in_place], [&Err(expected); 5]);
        assert_eq!(sum.unwrap_err().to_string(), sentence);
        assert!(y == [9.0; 6] && lse == [9.0; 2]);
    };
    let wrong = TensorRef::from_slice(&mask, [3, 2]).unwrap();
    try_with(
        &Softmax::new().mask(wrong),
        Error::NotBroadcastable { tensor: "mask", dimension: "axis -2", got: 3, expected: 2 },
        "axis -2 of the mask is 3 but must be 2, or 1 to repeat",
    );
    try_with(
        &Softmax::new().bias(TensorRef::from_slice(&bias, [2, 1, 2, 1]).unwrap()),
        Error::NotBroadcastable { tensor: "bias", dimension: "axis -4", got: 2, expected: 1 },
        "axis -4 of the bias is 2 but must be 1, or 1 to repeat",
    );
    let fits = TensorRef::from_slice(&mask[..3], [3]).unwrap();
    try_with(
        &Softmax::new().mask(fits).mask(fits),
        Error::GivenTwice { option: "mask" },
        "the option mask was given twice; combine both into one, or set it once",
    );
    let fits = TensorRef::from_slice(&bias[..3], [3]).unwrap();
    try_with(
        &Softmax::new().bias(fits).bias(fits),
        Error::GivenTwice { option: "bias" },
        "the option bias was given twice; combine both into one, or set it once",
    );
    for (scale, got) in [(f64::NAN, "NaN"), (INF, "inf"), (-1e300, "-inf")] {
        let options = Softmax::new().scale(scale);
        let error = options.logsumexp_into(tensor(), &mut [0.0f32; 2]).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "scale", .. }));
        assert_eq!(error.to_string(), format!("scale is {got} but must be finite"));
    }
    let (mut y, mut lse) = ([9.0f32; 6], [9.0f32; 3]);
    assert_eq!(
        Softmax::new().softmax_into(tensor(), TensorMut::from_slice(&mut y, [3, 2]).unwrap()),
        Err(Error::ShapeMismatch { tensor: "output", dimension: "axis -2", expected: 2, got: 3 })
    );
    let expected = Err(Error::SliceLength { expected: 2, got: 3 });
    assert_eq!(Softmax::new().logsumexp_into(tensor(), &mut lse), expected);
    // More lines than a number can count.
    let huge = TensorRef::<f32, 3>::with_strides(&[], 0, [usize::MAX, usize::MAX, 0], [0; 3]).unwrap();
    assert!(matches!(Softmax::new().logsumexp_into(huge, &mut lse), Err(Error::TooLarge { .. })));
}

#[test]
fn tensors_without_elements() {
    let empty: [f32; 0] = [];
    let x = TensorRef::from_slice(&empty, [3, 0]).unwrap();
    Softmax::new().softmax_into(x, TensorMut::<f32, 2>::from_slice(&mut [], [3, 0]).unwrap()).unwrap();
    let mut lse = [9.0f32; 3];
    let bias = [0.5f32; 3];
    let bias = TensorRef::from_slice(&bias, [3, 1]).unwrap();
    for options in [Softmax::new(), Softmax::new().bias(bias)] {
        lse = [9.0; 3];
        options.logsumexp_into(x, &mut lse).unwrap();
        assert_eq!(lse, [f32::NEG_INFINITY; 3]);
    }
    Softmax::new().axis(0).logsumexp_into::<f32, f32, 2>(x, &mut []).unwrap();
    Softmax::new().softmax_in_place(TensorMut::<f32, 2>::from_slice(&mut [], [3, 0]).unwrap()).unwrap();
    // Columns without elements.
    let x = TensorRef::from_slice(&empty, [0, 3]).unwrap();
    for options in [Softmax::new(), Softmax::new().bias(TensorRef::from_slice(&[0.5f32], [1]).unwrap())] {
        lse = [9.0; 3];
        options.axis(0).logsumexp_into(x, &mut lse).unwrap();
        assert_eq!(lse, [f32::NEG_INFINITY; 3]);
    }
    assert_eq!(lse[0], f32::NEG_INFINITY);
    // Strides of which the numbers could be read in place, if there were any.
    let numbers = [0.0f64; 64];
    for (shape, strides, axis) in [([0, 16], [16, 1], 0), ([16, 0], [0, 1], 1)] {
        let (x, mut lse) = (TensorRef::with_strides(&numbers, 0, shape, strides).unwrap(), [9.0f64; 16]);
        Softmax::new().axis(axis).logsumexp_into(x, &mut lse).unwrap();
        assert_eq!(lse, [f64::NEG_INFINITY; 16], "axis {axis} of {shape:?}");
    }
}

/// Large enough for two threads inside a pool, and for waking the global pool.
#[cfg(feature = "rayon")]
#[test]
fn bits_do_not_depend_on_threads() {
    let pools: Vec<_> = (1..=3).map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).collect();
    for (shape, axis) in [
        ([3, 300, 1, 101], 3),
        ([3, 300, 1, 101], 1),
        ([1, 2, 5, 20_000], 1),
        ([1, 1, 1100, 2000], 2),
        ([2, 3, 60, 300], 3),
    ] {
        let mut rng = Rng(3);
        let case = Case::<bf16>::random(shape, axis, &mut rng);
        let run = || bits(&case.run::<f32>(&mut Layout::dense));
        let expected = pools[0].install(run);
        for pool in &pools[1..] {
            assert!(pool.install(run) == expected, "{shape:?}, {} threads", pool.current_num_threads());
        }
        assert!(run() == expected, "{shape:?} outside a pool");
    }
}
