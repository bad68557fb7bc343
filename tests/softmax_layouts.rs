//! Promise: softmax of an ndarray view of any strides is that of its elements, and keeps the order of its axes in memory.

#![cfg(feature = "ndarray")]

mod support;

use flashtile::softmax::*;
use ndarray::{Array2, Array3, ArrayView3, Axis as At, s};
use support::Rng;

fn check(x: ArrayView3<'_, f32>, case: &str) {
    for axis in 0..3 {
        let dense = x.as_standard_layout();
        let (y, expected) = (softmax_axis(&x, axis, 1.5).unwrap(), softmax_axis(&dense, axis, 1.5).unwrap());
        let log = log_softmax_axis(&x, axis, 1.5).unwrap();
        let lse = logsumexp_axis(&x, axis, 1.5).unwrap();
        assert_eq!((y.shape(), lse.shape()), (x.shape(), x.raw_dim().remove_axis_of(axis).as_slice()), "{case}");
        let line_lse = logsumexp_axis(&dense, axis, 1.5).unwrap();
        for (a, b) in y.iter().zip(&expected).chain(lse.iter().zip(&line_lse)) {
            assert!((a - b).abs() <= 1e-5 * b.abs(), "{case} axis {axis}: {a} {b}");
        }
        for (index, y) in y.indexed_iter() {
            assert!((log[index].exp() - y).abs() <= 1e-5, "{case} axis {axis}");
        }
        // In place, through a view of the same strides.
        let mut owner = y.clone();
        owner.assign(&x);
        softmax_axis_in_place(&mut owner, axis, 1.5).unwrap();
        for (a, b) in owner.iter().zip(&y) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "{case} axis {axis} in place");
        }
        // The result has the strides of a dense array whose axes are in the same order.
        let order = |strides: &[isize]| {
            let mut axes: Vec<usize> = (0..3).filter(|&axis| x.shape()[axis] > 1).collect();
            axes.sort_by_key(|&axis| std::cmp::Reverse(strides[axis].abs()));
            axes
        };
        assert_eq!(order(y.strides()), order(x.strides()), "{case}");
    }
}

trait RemoveAxisOf {
    fn remove_axis_of(self, axis: usize) -> Vec<usize>;
}

impl RemoveAxisOf for ndarray::Ix3 {
    fn remove_axis_of(self, axis: usize) -> Vec<usize> {
        let mut shape = [self[0], self[1], self[2]].to_vec();
        shape.remove(axis);
        shape
    }
}

#[test]
fn any_strides() {
    let mut rng = Rng(3);
    for shape in [[4, 5, 6], [3, 1, 33], [1, 7, 20], [2, 40, 9]] {
        let x = Array3::from_shape_simple_fn(shape, || 8.0 * rng.uniform());
        for axes in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let view = x.view().permuted_axes(axes);
            check(view, &format!("{shape:?} as {axes:?}"));
            check(view.slice(s![..;-1, .., ..;2]), &format!("{shape:?} as {axes:?}, sliced"));
        }
        check(x.index_axis(At(1), 0).insert_axis(At(0)), "a plane");
        check(x.slice(s![..1, .., ..]).broadcast([3, shape[1], shape[2]]).unwrap(), "broadcast");
    }
}

#[test]
fn transposed_in_place_and_empty() {
    let x = Array2::from_shape_fn((40, 30), |(i, j)| ((i * 7 + j * 3) % 11) as f32);
    let (mut a, mut b) = (x.clone(), x.clone());
    softmax_axis_in_place(&mut a.view_mut().reversed_axes(), 1, 1.0).unwrap();
    softmax_axis_in_place(&mut b, 0, 1.0).unwrap();
    assert_eq!(a, b);
    assert_eq!(softmax_axis(&x.t(), 1, 1.0).unwrap(), b.t());
    for shape in [(0, 3), (3, 0), (0, 0)] {
        let x = Array2::<f32>::zeros(shape);
        assert_eq!(softmax_axis(&x.t(), 0, 1.0).unwrap().shape(), [shape.1, shape.0]);
        assert_eq!(logsumexp_axis(&x.t(), 1, 1.0).unwrap(), ndarray::Array1::from_elem(shape.1, f32::NEG_INFINITY));
    }
}
