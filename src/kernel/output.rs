//! The rows that a task writes.

#![forbid(unsafe_code)]

use super::convert::store_row;
use crate::element::{Element, with_elements};
use crate::simd::{Isa, Kernel, Simd};
use crate::tensor::group::{AnyGroupRowsMut, GroupRowsMut};
use std::ops::Range;

/// Where a task's results go: its rows of the output, and its log-sum-exps if they are asked for.
#[derive(Debug)]
pub(crate) struct TaskOutput<'a> {
    pub(crate) values: AnyGroupRowsMut<'a>,
    /// One element a row.
    pub(crate) lse: Option<GroupRowsMut<'a, f32>>,
}

impl TaskOutput<'_> {
    /// Writes the log-sum-exps of some rows, if they are asked for: `lse(n)` is that of the n-th of them.
    pub(crate) fn write_lse(&mut self, rows: Range<usize>, lse: impl Fn(usize) -> f32) {
        if let Some(to) = &mut self.lse {
            for (n, mut row) in to.rows_mut(rows).enumerate() {
                row.iter_mut().for_each(|to| *to = lse(n));
            }
        }
    }

    /// Writes some rows, rounded to the output's type.
    ///
    /// * `values`: `[rows][width]`, of which each row's first elements are written
    ///
    /// # Panics
    /// If there are no such rows, or `values` doesn't have as many of them, or not as long.
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
