//! Rows of every type and stride, converted at every level.

use super::*;
use crate::simd::rows::{convert_row, narrow_row, widen_row};
use crate::tensor::matrix::{Matrix, RowMut};
use crate::tensor::strided::StridedMut;

/// Converts a row directly, and by way of f32.
struct Rows<'a, T, U> {
    from: Matrix<'a, T>,
    wide: &'a mut [f32],
    to: [&'a mut [U]; 2],
    /// Every other element, the last one first.
    spread: RowMut<'a, U>,
}

impl<T: Element, U: Element> Kernel for Rows<'_, T, U> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let [to, by_f32] = self.to;
        convert_row(simd, self.from.row(0), RowMut::from(to));
        widen_row(simd, self.from.row(0), self.wide);
        narrow_row(simd, self.wide, RowMut::from(by_f32));
        convert_row(simd, self.from.row(0), self.spread);
    }
}

fn check<T: Element, U: Element>() {
    for level in Level::available() {
        let isa = Isa::detect(level).unwrap();
        for len in 0..70usize {
            let x: Vec<T> =
                (0..2 * len).map(|n| T::from_f32((n as f32 - 20.3) * 1.7f32.powi(n as i32 % 50 - 30))).collect();
            // Side by side, and every other element.
            let rows = Matrix::from_slice(&x[..len], 1, len);
            let columns = Matrix::from_slice(&x, len, 2).transposed();
            for (from, step) in [(rows, 1), (columns, 2)] {
                let (mut wide, mut a, mut b) = (vec![0.0; len], vec![U::default(); len], vec![U::default(); len]);
                let mut data = vec![U::from_f32(9.0); 2 * len];
                let strides = [0, 0, 0, -2];
                let mut spread = StridedMut::new(&mut data, (2 * len).max(2) - 2, [1, 1, 1, len], strides).unwrap();
                let to = [&mut a[..], &mut b];
                isa.run(Rows { from, wide: &mut wide, to, spread: spread.row_mut([0, 0, 0]) });
                for n in 0..len {
                    let expected = U::from_f32(x[n * step].to_f32());
                    let back = 2 * (len - 1 - n);
                    let (got, gap) = ([a[n], b[n], data[back]], data[back + 1]);
                    assert_eq!(
                        (got, gap),
                        ([expected; 3], U::from_f32(9.0)),
                        "{level}: element {n} of {len}, step {step}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_are_converted() {
    check::<f32, f32>();
    check::<f32, f16>();
    check::<f32, bf16>();
    check::<f16, f32>();
    check::<f16, bf16>();
    check::<bf16, f16>();
    check::<bf16, bf16>();
}
