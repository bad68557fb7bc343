//! The rows that a task writes.

#![forbid(unsafe_code)]

use super::convert::store_row;
use crate::element::{Element, with_elements};
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::group::{AnyGroupRowsMut, GroupRowsMut};
use std::ops::Range;

/// The output of a task: its rows of the output tensor, and its log-sum-exps if the call has an lse output.
#[derive(Debug)]
pub(crate) struct TaskOutput<'a> {
    pub(crate) values: AnyGroupRowsMut<'a>,
    /// One element for each row.
    pub(crate) lse: Option<GroupRowsMut<'a, f32>>,
}

impl TaskOutput<'_> {
    /// Writes the log-sum-exps of `rows`, if there is an lse output: `lse(n)` to row `rows.start + n`.
    pub(crate) fn write_lse(&mut self, rows: Range<usize>, lse: impl Fn(usize) -> f32) {
        if let Some(to) = &mut self.lse {
            for (n, mut row) in to.rows_mut(rows).enumerate() {
                row.iter_mut().for_each(|to| *to = lse(n));
            }
        }
    }

    /// Writes `rows`, rounded to the output's type.
    ///
    /// * `values`: `[rows][width]` and the width; the first elements of each row are written, one for each output column
    ///
    /// # Panics
    /// If `rows` are not within the output, or `values` has fewer rows or shorter ones.
    pub(crate) fn write_rows(&mut self, isa: Isa, rows: Range<usize>, values: (&[f32], usize)) {
        isa.run(WriteRows { to: &mut self.values, rows, values });
    }
}

struct WriteRows<'a, 'r> {
    to: &'a mut AnyGroupRowsMut<'r>,
    rows: Range<usize>,
    values: (&'a [f32], usize),
}

impl Kernel for WriteRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (values, width) = self.values;
        with_elements!(self.to, to => {
            let cols = to.cols();
            for (n, row) in to.rows_mut(self.rows).enumerate() {
                let values = &values[n * width..][..cols];
                match row.into_mut_slice() {
                    Ok(row) => store_row(simd, row, values),
                    Err(mut row) => row.fill_from(values.iter().map(|&value| Element::from_f32(value))),
                }
            }
        });
    }
}
