//! Users' masks and score modifications, on the scores of some rows and the keys of a tile.
//!
//! They are called between the two passes of [`super::tile`], score modifications once for a tile, masks once for each grain that they
//! partly show. What changes scores comes before, what hides keys comes after, so that a hidden key stays hidden whatever a function
//! makes of its score.

#![forbid(unsafe_code)]

use super::lanes::LaneSpans;
use super::task::TaskInput;
use crate::mask::{Cover, Mask};
use crate::pair::Block;
use crate::score::OpenScoreMod;
use crate::score_tile::{ScoreTile, TileRows};
use crate::simd::MAX_LANES;
use std::ops::Range;

/// Keys that masks are asked for at once where a tile is partial. Scores that are skipped at either end of a tile are a multiple
/// of it, so that the others keep their lanes (decode).
pub(super) const GRAIN: usize = 16;
const _: () = assert!(GRAIN.is_multiple_of(MAX_LANES));

/// The smallest part of `keys`, in steps of [`GRAIN`], that holds all keys which masks show to any of the rows.
pub(super) fn trim(task: &TaskInput<'_>, rows: &Range<usize>, keys: Range<usize>) -> Range<usize> {
    let mut masks = task.masks.with_holes().peekable();
    if keys.is_empty() || masks.peek().is_none() {
        return keys;
    }
    let block = task.block(rows.clone(), keys.clone());
    let covers = masks.fold(Cover::Full, |all, mask| match (all, mask.cover(&block)) {
        (Cover::Skip, _) | (_, Cover::Skip) => Cover::Skip,
        (Cover::Full, Cover::Full) => Cover::Full,
        _ => Cover::Partial,
    });
    match covers {
        Cover::Full => return keys,
        Cover::Skip => return keys.start..keys.start,
        Cover::Partial => {}
    }
    let skips = |keys: &Range<usize>| task.masks.skips(&Block { keys: keys.clone(), ..block.clone() });
    let grains = || grains(&keys);
    match (grains().find(|keys| !skips(keys)), grains().rev().find(|keys| !skips(keys))) {
        (Some(first), Some(last)) => first.start..last.end,
        _ => keys.start..keys.start,
    }
}

/// The part of the first tile of `keys` of which masks show anything to any row; empty if no tile has one. Tiles end at multiples of
/// their size.
pub(super) fn first_seen(task: &TaskInput<'_>, keys: Range<usize>) -> Range<usize> {
    if task.masks.with_holes().next().is_none() {
        return keys;
    }
    let (mut start, lost) = (keys.start, task.lost_keys());
    while start < keys.end {
        if lost.contains(&start) {
            start = lost.end; // without asking for each tile
            continue;
        }
        let end = (start / task.tile_keys * task.tile_keys + task.tile_keys).min(keys.end);
        let seen = trim(task, &(0..task.rows), start..end);
        if !seen.is_empty() {
            return seen;
        }
        start = end;
    }
    keys.end..keys.end
}

/// Cuts a run of keys into grains.
fn grains(keys: &Range<usize>) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *keys;
    (0..(end - start).div_ceil(GRAIN)).map(move |n| start + n * GRAIN..(start + (n + 1) * GRAIN).min(end))
}

/// Whether there are score modifications, or masks that hide any pair of some rows and keys.
pub(super) fn are_needed(task: &TaskInput<'_>, rows: &Range<usize>, keys: &Range<usize>) -> bool {
    !task.score_mods.open.is_empty() || {
        let mut masks = task.masks.with_holes().peekable();
        masks.peek().is_some() && {
            let block = task.block(rows.clone(), keys.clone());
            masks.any(|mask| mask.cover(&block) != Cover::Full)
        }
    }
}

/// Applies them to the scores of some lanes, `[keys][lanes]`, and brings the scores into the unit that the softmax takes.
pub(super) fn apply<const N: usize>(
    task: &TaskInput<'_>,
    lanes: &LaneSpans<N>,
    keys: &Range<usize>,
    scores: &mut [f32],
) {
    let (mut heads, mut queries) = ([0; N], [0; N]);
    for lane in 0..lanes.count {
        let (head, query) = task.head_and_query(lanes.row(lane));
        (heads[lane], queries[lane]) = (head as u32, query as i32);
    }
    let (heads, queries) = (&heads[..lanes.count], &queries[..lanes.count]);
    let rows = TileRows {
        batch: task.sequence.batch as u32,
        head: (task.group == 1 || lanes.count == 1).then_some(heads[0]),
        heads,
        queries,
        offset: task.sequence.offset as i32,
    };
    let mut tile = ScoreTile { isa: task.isa, scores, rows, first_key: keys.start as i32 };
    for OpenScoreMod(open) in task.score_mods.open {
        open.modify(&mut tile);
    }
    if task.unit != task.last_unit {
        tile.convert(task.last_unit.factor());
    }
    let block = task.block(lanes.rows.clone(), keys.clone());
    for mask in task.masks.with_holes() {
        hide_by(mask, &block, &mut tile);
    }
}

/// Hides the pairs of a block, grain by grain, so that few are asked for one by one.
fn hide_by(mask: &dyn Mask, block: &Block, tile: &mut ScoreTile<'_>) {
    if mask.cover(block) == Cover::Full {
        return;
    }
    for keys in grains(&block.keys) {
        let own = keys.start - block.keys.start..keys.end - block.keys.start;
        match mask.cover(&Block { keys, ..block.clone() }) {
            Cover::Full => {}
            Cover::Skip => tile.slice_keys(own).hide_all(),
            Cover::Partial => mask.hide(&mut tile.slice_keys(own)),
        }
    }
}
