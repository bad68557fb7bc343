//! Sums of probabilities for each key, with queries in the lanes. The rows of a task are of one head here.
//!
//! ```text
//! S[j][lane]      = scores of a panel, modified, -inf if hidden      for each panel that sees the tile
//! sums[j][lane]  += 2^(S[j][lane] - lse[lane])                       in a vector for each key
//! sums[j]        += sum_lane sums[j][lane]                           once for all panels
//! ```

#![forbid(unsafe_code)]

use super::operands::TileOperands;
use super::{Prefill, Tile, next_tile_parts, panel_scores, prefetch_keys};
use crate::kernel::key_sums::{KeySums, add_panel_probs};
use crate::kernel::open_mods;
use crate::kernel::shape::MAX_PANEL_LANES;
use std::ops::Range;

/// Adds the probabilities of a tile. `keys` are as for a step.
pub(super) fn add_probs(prefill: &mut Prefill<'_, '_>, keys: Range<usize>, to: &mut KeySums<'_>) {
    let Prefill { task, end, layout, panels, queries, by_rows, operands, buffers, .. } = prefill;
    assert!(task.group == 1, "a task of {} heads", task.group);
    let tile_end = keys.end;
    let keys = open_mods::trim(task, &(0..task.rows), keys);
    if keys.is_empty() {
        return;
    }
    let mut prefetch = prefetch_keys(task, tile_end..(tile_end + task.tile_keys).min(*end));
    prefetch.spread(panels.iter().map(|panel| next_tile_parts(task, &panel.lanes, &keys, *by_rows)).sum());
    let tile = Tile { operands: TileOperands::new(task, keys.clone(), (panels.len(), *by_rows), operands), keys };
    let vector = task.isa.lanes();
    to.lane_sums[..tile.keys.len() * vector].fill(0.0);
    for (p, panel) in panels.iter().enumerate() {
        let lanes = panel.lanes.count;
        let (queries, max) = (&queries[layout.queries(p, lanes)], &mut [f32::NEG_INFINITY; MAX_PANEL_LANES][..lanes]);
        if let Some(seen) = panel_scores(task, &tile, panel, queries, buffers, max, &mut prefetch) {
            // A lane without a row repeats the last row, and must not count.
            let mut lse = [f32::INFINITY; MAX_PANEL_LANES];
            lse[..panel.lanes.rows.len()].copy_from_slice(&to.lse[panel.lanes.rows.clone()]);
            let seen = seen.start - tile.keys.start..seen.end - tile.keys.start;
            let lane_sums = &mut to.lane_sums[seen.start * vector..seen.end * vector];
            add_panel_probs(task.isa, &mut buffers.scores[..seen.len() * lanes], &mut lse[..lanes], lane_sums);
        }
    }
    to.fold_lanes(task.isa, &tile.keys);
}
