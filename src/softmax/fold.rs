//! [`RowState::fold`] adds a slice to a state; [`RowState::finish`] turns a slice into its softmax.
#![forbid(unsafe_code)]

use super::chosen_level::isa;
use super::row;
use super::row_state::RowState;
use super::scale::{Formula, One};
use crate::simd::{Kernel, Simd};

impl RowState {
    /// Adds the elements of `x`.
    pub fn fold(&mut self, x: &[f32]) {
        *self = self.merge(isa().run(Fold(x)));
    }

    /// Computes the softmax exp(x - max) / sum in place, for elements that were folded into this state.
    pub fn finish(self, x: &mut [f32]) {
        isa().run(Finish(self, x));
    }
}

/// Elements folded at a time. Their tile is on the stack.
const TILE: usize = 512;

struct Fold<'a>(&'a [f32]);

impl Kernel for Fold<'_> {
    type Output = RowState;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> RowState {
        let mut tile = [0.0; TILE];
        let mut state = RowState::default();
        for x in self.0.chunks(TILE) {
            state = state.merge(row::fold(simd, x, &mut tile[..x.len()], Formula::new(1.0, false)));
        }
        state
    }
}

struct Finish<'a>(RowState, &'a mut [f32]);

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let next = self.1.as_ptr_range().end;
        row::exp_tile::<S, f32, One, false>(simd, self.1, self.0.max, One, next);
        row::finish_in_place::<S, false>(simd, self.1, row::norm_of(self.0));
    }
}
