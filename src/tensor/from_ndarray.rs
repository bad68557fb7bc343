//! Conversions of ndarray's arrays and views, of any strides, without a copy.

#![forbid(unsafe_code)]

use super::any::{AnyTensorMut, AnyTensorRef};
use super::strided::{Strided, StridedMut};
use super::view::{TensorMut, TensorRef};
use crate::element::Element;
use ndarray::{ArrayBase, ArrayView, ArrayViewMut, Data, DataMut, Ix1, Ix2, Ix3, Ix4};

macro_rules! from_ndarray {
    ($($dim:ty, $n:literal);+) => {$(
        impl<'a, T> From<ArrayView<'a, T, $dim>> for TensorRef<'a, T, $n> {
            fn from(view: ArrayView<'a, T, $dim>) -> Self {
                TensorRef::new(Strided::from_ndarray(view))
            }
        }
        impl<'a, S: Data> From<&'a ArrayBase<S, $dim>> for TensorRef<'a, S::Elem, $n> {
            fn from(array: &'a ArrayBase<S, $dim>) -> Self {
                array.view().into()
            }
        }
        impl<'a, T> From<ArrayViewMut<'a, T, $dim>> for TensorMut<'a, T, $n> {
            fn from(view: ArrayViewMut<'a, T, $dim>) -> Self {
                TensorMut { strided: StridedMut::from_ndarray(view) }
            }
        }
        impl<'a, S: DataMut> From<&'a mut ArrayBase<S, $dim>> for TensorMut<'a, S::Elem, $n> {
            fn from(array: &'a mut ArrayBase<S, $dim>) -> Self {
                array.view_mut().into()
            }
        }

        impl<'a, T: Element> From<ArrayView<'a, T, $dim>> for AnyTensorRef<'a> {
            fn from(view: ArrayView<'a, T, $dim>) -> Self {
                TensorRef::<'a, T, $n>::from(view).into()
            }
        }
        impl<'a, S: Data<Elem: Element>> From<&'a ArrayBase<S, $dim>> for AnyTensorRef<'a> {
            fn from(array: &'a ArrayBase<S, $dim>) -> Self {
                array.view().into()
            }
        }
        impl<'a, T: Element> From<ArrayViewMut<'a, T, $dim>> for AnyTensorMut<'a> {
            fn from(view: ArrayViewMut<'a, T, $dim>) -> Self {
                TensorMut::<'a, T, $n>::from(view).into()
            }
        }
        impl<'a, S: DataMut<Elem: Element>> From<&'a mut ArrayBase<S, $dim>> for AnyTensorMut<'a> {
            fn from(array: &'a mut ArrayBase<S, $dim>) -> Self {
                array.view_mut().into()
            }
        }
    )+};
}
from_ndarray!(Ix1, 1; Ix2, 2; Ix3, 3; Ix4, 4);

macro_rules! from_lower_rank_ndarray {
    ($($dim:ty, $n:literal);+) => {$(
        impl<'a, T> From<ArrayView<'a, T, $dim>> for TensorRef<'a, T, 4> {
            fn from(view: ArrayView<'a, T, $dim>) -> Self {
                TensorRef::<'a, T, $n>::from(view).into()
            }
        }
        impl<'a, S: Data> From<&'a ArrayBase<S, $dim>> for TensorRef<'a, S::Elem, 4> {
            fn from(array: &'a ArrayBase<S, $dim>) -> Self {
                array.view().into()
            }
        }
    )+};
}
from_lower_rank_ndarray!(Ix1, 1; Ix2, 2; Ix3, 3);
