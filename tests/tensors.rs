//! Promise: a view of a tensor has the elements that its description says, and only those are written.
//!
//! Views are ranges of an axis, other orders of axes, one more axis, and run-time types and ranks.

use flashtile::{
    AnyTensorMut, AnyTensorRef, Attention, DType, Element, Error, Integers, QueryOffset, TensorMut, TensorRef, bf16,
    f16,
};

/// Layouts of `[2, 3, 4, 5]` within a slice of `LEN`: offset and strides.
const LAYOUTS: [(usize, [isize; 4]); 4] = [
    (0, [60, 20, 5, 1]),
    (1, [3, 40, -10, 6]),      // axes in another order, gaps, one backwards
    (119, [-60, -20, -5, -1]), // all backwards
    (7, [0, 0, 0, 3]),         // repeated
];
const SHAPE: [usize; 4] = [2, 3, 4, 5];
const LEN: usize = 300;

fn indices(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let [a, b, c, d] = shape;
    (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).flat_map(move |k| (0..d).map(move |l| [i, j, k, l]))))
}

#[test]
fn a_range_of_an_axis_has_the_elements_of_its_indices() {
    let data: Vec<usize> = (0..LEN).collect();
    for (offset, strides) in LAYOUTS {
        // The second layout starts high enough for its backward axis.
        let offset = offset + if strides[2] == -10 { 30 } else { 0 };
        let tensor = TensorRef::with_strides(&data, offset, SHAPE, strides).unwrap();
        for axis in 0..4 {
            for (start, end) in (0..=SHAPE[axis]).flat_map(|start| (start..=SHAPE[axis]).map(move |end| (start, end))) {
                let part = tensor.narrow(axis, start..end).unwrap();
                let mut shape = SHAPE;
                shape[axis] = end - start;
                assert_eq!((part.shape(), part.strides()), (shape, strides));
                for index in indices(shape) {
                    let mut of_whole = index;
                    of_whole[axis] += start;
                    assert_eq!(part.get(index), tensor.get(of_whole), "{index:?} of {start}..{end} of axis {axis}");
                }
                let mut outside = [0; 4];
                outside[axis] = end - start;
                assert_eq!(part.get(outside), None);
                // Ranges of ranges count from the start of the outer one.
                if end - start > 1 {
                    let inner = part.narrow(axis, 1..).unwrap();
                    let same = tensor.narrow(axis, start + 1..end).unwrap();
                    assert!(indices(inner.shape()).all(|index| inner.get(index) == same.get(index)));
                }
            }
        }
        let all = [tensor.narrow(1, ..).unwrap(), tensor.narrow(1, 0..=2).unwrap(), tensor.narrow(1, ..3).unwrap()];
        assert!(all.iter().all(|all| indices(SHAPE).all(|index| all.get(index) == tensor.get(index))));
    }
}

/// Slices and bytes with a rank, shape and strides that are known at run time, as engines have them: the elements of the view that
/// is made at compile time, for reading and for writing.
#[test]
fn tensors_are_made_from_what_an_engine_has() {
    fn check<T: Element + PartialEq + std::fmt::Debug>() {
        let data: Vec<T> = (0..LEN).map(|n| T::from_f32(n as f32)).collect();
        for (offset, strides) in LAYOUTS {
            let offset = offset + if strides[2] == -10 { 30 } else { 0 };
            for rank in 1..=4 {
                let (shape, strides) = (&SHAPE[4 - rank..], &strides[4 - rank..]);
                let of_slice = AnyTensorRef::with_strides(&data, offset, shape, strides).unwrap();
                let bytes = as_bytes(&data);
                let of_bytes = AnyTensorRef::from_bytes(T::DTYPE, bytes, offset, shape, strides).unwrap();
                for tensor in [of_slice, of_bytes] {
                    assert_eq!((tensor.dtype(), tensor.rank()), (T::DTYPE, rank));
                    assert_eq!((tensor.shape(), tensor.strides()), (shape, strides));
                    let typed = tensor.typed::<T>().unwrap();
                    for index in indices(typed.shape()) {
                        let steps = (4 - rank..4).map(|axis| index[axis] as isize * strides[axis + rank - 4]);
                        let at = offset as isize + steps.sum::<isize>();
                        assert_eq!(typed.get(index), Some(data[at as usize]), "{index:?}");
                    }
                }
            }
        }
        // Outputs: key 0 is the only one, so each row is its value.
        let (ones, shape, strides) = ([T::from_f32(1.0); 8], [1, 1, 2, 4], [8, 8, 4, 1]);
        let one = AnyTensorRef::with_strides(&ones, 0, &[1, 1, 1, 4], &[0, 0, 0, 1]).unwrap();
        let q = AnyTensorRef::with_strides(&ones, 0, &shape, &strides).unwrap();
        let mut outs = [vec![T::from_f32(7.0); 11], vec![T::from_f32(7.0); 11]];
        let [a, b] = &mut outs;
        let a = AnyTensorMut::with_strides(a, 2, &shape, &strides).unwrap();
        let b = AnyTensorMut::from_bytes(T::DTYPE, as_bytes_mut(b), 2, &shape, &strides).unwrap();
        for out in [a, b] {
            assert_eq!((out.dtype(), out.shape(), out.strides()), (T::DTYPE, &shape[..], &strides[..]));
            Attention::new().run_into(q, one, one, out).unwrap();
        }
        for out in outs {
            let expected = [7, 7, 1, 1, 1, 1, 1, 1, 1, 1, 7].map(|x| T::from_f32(x as f32));
            assert_eq!(out, expected);
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

fn as_bytes<T: Element>(data: &[T]) -> &[u8] {
    // SAFETY: floats have no padding, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

fn as_bytes_mut<T: Element>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a float.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}

/// What an engine hands in may be wrong in any way, and is refused.
#[test]
fn wrong_descriptions_are_refused() {
    let (mut data, mut words) = ([0.0f32; 24], [0u64; 12]);
    let rank = |expected, got| Error::Rank { tensor: "tensor", expected, got };
    let make = |shape: &[usize], strides: &[isize]| AnyTensorRef::with_strides(&data, 0, shape, strides).map(drop);
    assert_eq!(make(&[], &[]), Err(rank(1, 0)));
    assert_eq!(make(&[1; 5], &[1; 5]), Err(rank(4, 5)));
    let count = Error::WrongCount { what: "strides", expected: 2, got: 3 };
    assert_eq!(make(&[2, 3], &[3, 1, 1]), Err(count));
    assert_eq!(make(&[5, 5], &[5, 1]), Err(Error::OutOfBounds { first: 0, last: 24, len: 24 }));
    assert_eq!(make(&[2, 3], &[-1, 1]), Err(Error::OutOfBounds { first: -1, last: 2, len: 24 }));
    assert_eq!(make(&[usize::MAX, usize::MAX, 0], &[isize::MAX; 3]), Ok(()));
    assert!(make(&[usize::MAX; 4], &[isize::MIN; 4]).is_err());
    assert!(AnyTensorRef::with_strides(&data, usize::MAX, &[1], &[1]).is_err());
    let overlapping = AnyTensorMut::with_strides(&mut data, 0, &[2, 3], &[2, 1]).map(drop);
    assert_eq!(overlapping, Err(Error::OverlappingOutput { axis: 0, stride: 2, needed: 3 }));

    let bytes = as_bytes_of_words(&mut words);
    for (dtype, size) in [(DType::F32, 4), (DType::F16, 2), (DType::Bf16, 2)] {
        for start in 0..9 {
            let make = AnyTensorRef::from_bytes(dtype, &bytes[start..], 0, &[3], &[1]).map(drop);
            let expected = if start % size == 0 { Ok(()) } else { Err(Error::Misaligned { dtype }) };
            assert_eq!(make, expected, "{dtype} from byte {start}");
            assert_eq!(AnyTensorMut::from_bytes(dtype, &mut bytes[start..], 0, &[3], &[1]).map(drop), expected);
        }
        // An element that is not whole does not count.
        let error = Error::OutOfBounds { first: 0, last: 2, len: 2 };
        assert_eq!(AnyTensorRef::from_bytes(dtype, &bytes[..3 * size - 1], 0, &[3], &[1]).map(drop), Err(error));
    }
    let sentence = "elements of type f32 must start at a multiple of 4 bytes";
    assert_eq!(Error::Misaligned { dtype: DType::F32 }.to_string(), sentence);
}

fn as_bytes_of_words(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: integers have no padding, and any bytes are an integer.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

/// A bias whose type is known at run time, of any rank.
#[test]
fn a_bias_may_have_any_type() {
    let x = [0.5f32; 2 * 4];
    let x = TensorRef::from_slice(&x, [1, 1, 2, 4]).unwrap();
    let v = [1.0f32, 2.0];
    let v = TensorRef::from_slice(&v, [1, 1, 2, 1]).unwrap();
    let (f32s, f16s, bf16s) =
        ([0.0, f32::NEG_INFINITY], [f16::ZERO, f16::NEG_INFINITY], [bf16::ZERO, bf16::NEG_INFINITY]);
    fn of<T: Element>(data: &[T; 2]) -> AnyTensorRef<'_> {
        AnyTensorRef::with_strides(data, 0, &[2], &[1]).unwrap()
    }
    for bias in [of(&f32s), of(&f16s), of(&bf16s)] {
        for bias in [bias, bias.insert_axis(0).unwrap(), bias.insert_axis(0).and_then(|x| x.insert_axis(0)).unwrap()] {
            let mut out = [0.0f32; 2];
            let into = TensorMut::from_slice(&mut out, [1, 1, 2, 1]).unwrap();
            Attention::new().bias(bias).run_into(x, x, v, into).unwrap();
            assert_eq!(out, [1.0, 1.0]);
        }
    }
}

/// An empty range has no elements, also at the end of a slice and in a tensor without elements.
#[test]
fn empty_ranges() {
    let data = [1.0f32; 6];
    let tensor = TensorRef::from_slice(&data, [2, 3]).unwrap();
    for axis in 0..2 {
        let empty = tensor.narrow(axis, tensor.shape()[axis]..).unwrap();
        assert_eq!((empty.shape()[axis], empty.get([0, 0])), (0, None));
        assert_eq!(empty.narrow(axis, 0..0).unwrap().shape(), empty.shape());
    }
    let nothing = TensorRef::<f32, 2>::with_strides(&[], 0, [0, usize::MAX], [isize::MAX, isize::MIN]).unwrap();
    assert_eq!(nothing.narrow(1, usize::MAX - 1..).unwrap().shape(), [0, 1]);
}

/// An output that is a range of a buffer: the rest of the buffer stays as it is.
#[test]
fn only_the_range_is_written() {
    let x = [0.5f32; 24];
    let x = TensorRef::from_slice(&x, [1, 2, 3, 4]).unwrap();
    let mut buffer = [9.0f32; 3 * 2 * 5 * 6];
    let to = TensorMut::from_slice(&mut buffer, [3, 2, 5, 6]).unwrap();
    let to = to.narrow(0, 1..2).unwrap().narrow(2, 1..4).unwrap().narrow(3, 2..).unwrap();
    assert_eq!((to.shape(), to.strides()), ([1, 2, 3, 4], [60, 30, 6, 1]));
    Attention::new().run_into(x, x, x, to).unwrap();
    for (index, value) in indices([3, 2, 5, 6]).zip(&buffer) {
        let [b, _, i, e] = index;
        let inside = b == 1 && (1..4).contains(&i) && e >= 2;
        assert_eq!(*value, if inside { 0.5 } else { 9.0 }, "{index:?}");
    }
}

/// Run-time types and ranks: what a function that takes `impl Into<AnyTensorRef>` sees.
#[test]
fn types_and_ranks_at_run_time() {
    fn seen<'a>(x: impl Into<AnyTensorRef<'a>>) -> (DType, Vec<usize>, Vec<isize>) {
        let x = x.into();
        assert_eq!(x.rank(), x.shape().len());
        (x.dtype(), x.shape().to_vec(), x.strides().to_vec())
    }
    fn of<T: Element>(dtype: DType) {
        let data = [T::default(); LEN];
        let tensor = TensorRef::from_slice(&data[..120], SHAPE).unwrap();
        let strides = vec![60, 20, 5, 1];
        let expected = (dtype, SHAPE.to_vec(), strides);
        assert_eq!(seen(tensor), expected);
        let (of_tensor, of_any) = (&tensor, &AnyTensorRef::from(tensor));
        assert_eq!([seen(of_tensor), seen(of_any)], [expected.clone(), expected]);
        let [one, two, three] = [vec![7], vec![2, 3], vec![2, 3, 4]];
        assert_eq!(seen(TensorRef::from_slice(&data[..7], [7]).unwrap()), (dtype, one, vec![1]));
        assert_eq!(seen(TensorRef::from_slice(&data[..6], [2, 3]).unwrap()), (dtype, two, vec![3, 1]));
        let tensor = TensorRef::from_slice(&data[..24], [2, 3, 4]).unwrap();
        assert_eq!(seen(tensor), (dtype, three.clone(), vec![12, 4, 1]));
        // Converted to rank 4, it still knows its own rank.
        assert_eq!(seen(TensorRef::<T, 4>::from(tensor)), (dtype, three, vec![12, 4, 1]));
        assert_eq!(TensorRef::<T, 4>::from(&TensorRef::<T, 4>::from(tensor)).shape(), [1, 2, 3, 4]);
    }
    of::<f32>(DType::F32);
    of::<f16>(DType::F16);
    of::<bf16>(DType::Bf16);
}

#[cfg(feature = "ndarray")]
#[test]
fn arrays_and_views_convert() {
    use ndarray::{Array1, Array2, Array3, Array4, s};
    fn shape<'a>(x: impl Into<AnyTensorRef<'a>>) -> Vec<usize> {
        x.into().shape().to_vec()
    }
    fn shape_mut<'a>(x: impl Into<AnyTensorMut<'a>>) -> Vec<usize> {
        x.into().shape().to_vec()
    }
    let mut x = Array4::from_elem((2, 3, 4, 5), 0.5); // (the literal becomes an f32)
    assert_eq!(AnyTensorRef::from(&x).dtype(), DType::F32);
    let other = x.clone();
    let view = &other.view();
    for got in [shape(&x), shape(x.view()), shape(view), shape_mut(&mut x.clone()), shape_mut(x.view_mut())] {
        assert_eq!(got, SHAPE);
    }
    let shared = x.to_shared();
    assert_eq!(shape(&shared), SHAPE);
    assert_eq!(shape(x.slice(s![.., 1..2, ..;-2, ..])), [2, 1, 2, 5]);
    assert_eq!(AnyTensorRef::from(x.slice(s![.., 1..2, ..;-2, ..])).strides()[2], -10);
    assert_eq!(shape(&Array3::from_elem((3, 4, 5), bf16::ONE)), [3, 4, 5]);
    assert_eq!(shape(&Array2::from_elem((4, 5), f16::ONE)), [4, 5]);
    assert_eq!(shape(&Array1::from_elem(5, 0.0f32)), [5]);
    assert_eq!(shape_mut(&mut Array3::from_elem((3, 4, 5), bf16::ONE)), [3, 4, 5]);
}

/// Views of run-time-typed tensors are those of typed tensors.
#[test]
fn views_at_run_time() {
    let data: Vec<f32> = (0..LEN).map(|x| x as f32).collect();
    let tensor = TensorRef::with_strides(&data, 31, [3, 4, 5], [40, -10, 6]).unwrap();
    let any = AnyTensorRef::from(tensor);
    let same = |any: AnyTensorRef<'_>, shape: &[usize], strides: &[isize]| {
        assert_eq!((any.shape(), any.strides()), (shape, strides));
    };
    let permuted = tensor.permuted([2, 0, 1]).unwrap();
    same(any.permuted(&[2, 0, 1]).unwrap(), &permuted.shape(), &permuted.strides());
    let narrowed = tensor.narrow(1, 1..3).unwrap();
    same(any.narrow(1, 1..3).unwrap(), &narrowed.shape(), &narrowed.strides());
    for axis in 0..=3 {
        let (of_4, any) = (tensor.insert_axis(axis).unwrap(), any.insert_axis(axis).unwrap());
        same(any, &of_4.shape(), &of_4.strides());
        let mut shape = vec![3, 4, 5];
        shape.insert(axis, 1);
        assert_eq!(any.shape(), shape);
        for index in indices(of_4.shape()) {
            let mut of_3 = index.to_vec();
            of_3.remove(axis);
            assert_eq!(of_4.get(index), tensor.get(of_3.try_into().unwrap()));
        }
    }
    let mut any = AnyTensorRef::from(TensorRef::from_slice(&data[..5], [5]).unwrap());
    for rank in 2..=4 {
        any = any.insert_axis(rank - 2).unwrap();
        assert_eq!((any.rank(), any.shape()[rank - 1]), (rank, 5));
    }

    let mut buffer = vec![bf16::ZERO; 60];
    let mut to = AnyTensorMut::from(TensorMut::from_slice(&mut buffer, [3, 4, 5]).unwrap());
    assert_eq!((to.reborrow().dtype(), to.reborrow().rank()), (DType::Bf16, 3));
    let to = to.permuted(&[1, 0, 2]).unwrap().narrow(0, 2..).unwrap().insert_axis(1).unwrap();
    assert_eq!((to.shape(), to.strides()), (&[2, 1, 3, 5][..], &[5, 0, 20, 1][..]));
    let mut buffer = [0.0f32; 60];
    let to = TensorMut::from_slice(&mut buffer, [3, 4, 5]).unwrap().insert_axis(2).unwrap();
    assert_eq!((to.shape(), to.strides()), ([3, 4, 1, 5], [20, 5, 0, 1]));
}

/// Lists of any integer type mean the same.
#[test]
fn lists_of_any_integers() {
    let data: Vec<f32> = (0..2 * 2 * 6 * 4).map(|x| (x % 7) as f32).collect();
    let x = TensorRef::from_slice(&data, [2, 2, 6, 4]).unwrap();
    let run = |lengths: Integers<'_>, offsets: QueryOffset<'_>| {
        let mut out = vec![0.0f32; data.len()];
        let to = TensorMut::from_slice(&mut out, [2, 2, 6, 4]).unwrap();
        Attention::new().causal().key_lengths(lengths).query_offset(offsets).run_into(x, x, x, to).unwrap();
        out
    };
    let expected = run((&[5usize, 2]).into(), QueryOffset::per_batch(&[1isize, -2]));
    let lengths: [Integers<'_>; 5] =
        [(&[5u32, 2]).into(), (&[5u64, 2]).into(), (&[5i32, 2]).into(), (&[5i64, 2]).into(), (&[5isize, 2]).into()];
    for lengths in lengths {
        for offsets in [QueryOffset::per_batch(&[1i32, -2]), QueryOffset::per_batch(&[1i64, -2])] {
            assert_eq!(offsets, QueryOffset::per_batch(&[1isize, -2]));
            assert_eq!(run(lengths, offsets), expected, "{lengths:?}, {offsets:?}");
        }
    }
    assert_ne!(run((&[5, 3]).into(), QueryOffset::FromEnd), expected);
}
