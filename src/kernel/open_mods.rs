//! Users' masks and score modifications, on the scores of some rows and the keys of a tile.
//!
//! They are called once for a tile, between the two passes of [`super::tile`]: what changes scores comes before, what hides keys
//! comes after, so that a hidden key stays hidden whatever a function makes of its score.

#![forbid(unsafe_code)]

use super::lanes::LaneSpans;
use super::task::TaskInput;
use crate::mask::Cover;
use crate::score::OpenScoreMod;
use crate::score_tile::{ScoreTile, TileRows};
use std::ops::Range;

/// Whether users' masks or score modifications have anything to do with the pairs of some rows and keys. Those of a mask that
/// skips the block are none, and are not asked for here.
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
    let mut tile = ScoreTile { isa: task.isa, scores, rows, first_key: keys.start as i32, factor: 1.0 };
    for (n, OpenScoreMod(open)) in task.score_mods.open.iter().enumerate() {
        if n + 1 == task.score_mods.open.len() {
            tile.factor = task.last_unit.factor();
        }
        open.modify(&mut tile);
    }
    let block = task.block(lanes.rows.clone(), keys.clone());
    for mask in task.masks.with_holes() {
        if mask.cover(&block) != Cover::Full {
            mask.hide(&mut tile);
        }
    }
}
