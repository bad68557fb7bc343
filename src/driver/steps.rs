//! Steps of a kernel over its keys.

#![forbid(unsafe_code)]

use crate::kernel::form::FormKernel;
use crate::plan::KeySteps;
use std::ops::Range;

/// Steps over `keys`, split by split and tile by tile. Tiles of nothing but lost keys are left out, whatever their number.
pub(super) fn step_over<'t, 'a: 't>(
    kernel: &mut impl FormKernel<'t, 'a>,
    steps: KeySteps,
    keys: Range<usize>,
    lost: Range<usize>,
) {
    let splits = steps.splits_of(&keys, &lost);
    for split in (0..splits.len()).map(|n| splits.get(n)) {
        for tile in steps.seen_tiles(steps.split_of(split, &keys), &lost) {
            kernel.step(tile);
        }
        kernel.end_split();
    }
}
