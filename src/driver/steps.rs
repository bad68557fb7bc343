//! Steps of a kernel over its keys.

#![forbid(unsafe_code)]

use crate::kernel::form::FormKernel;
use crate::plan::KeySteps;
use std::ops::Range;

/// Steps over `keys`, split by split and tile by tile.
pub(super) fn step_over<'t, 'a: 't>(kernel: &mut impl FormKernel<'t, 'a>, steps: KeySteps, keys: Range<usize>) {
    for split in steps.splits_of(&keys) {
        for tile in steps.tiles_of(steps.split_of(split, &keys)) {
            kernel.step(tile);
        }
        kernel.end_split();
    }
}
