//! What mask and bias say about a tile: its verdict, and the numbers by which its scores are adjusted.

#![forbid(unsafe_code)]

use super::schedule::Work;
use crate::kernel::MAX_PANEL_LANES;
use crate::kernel::adjust::{Adjust, Unit};
use crate::kernel::load::AnyMatrix;
use crate::mask::Verdict;
use std::ops::Range;

/// Query rows whose scores are adjusted together: the lanes of a panel, or a single row.
#[derive(Clone, Debug)]
pub(super) struct Lanes {
    pub(super) rows: Range<usize>,
    /// Lanes computed; those without a row repeat the last one.
    pub(super) count: usize,
    /// The keys that each lane sees by its position.
    intervals: [(usize, usize); MAX_PANEL_LANES],
}

impl Lanes {
    pub(super) fn new(work: Work<'_>, rows: Range<usize>, count: usize) -> Self {
        let mut intervals = [(0, 0); MAX_PANEL_LANES];
        for (interval, r) in intervals.iter_mut().zip(rows.clone()) {
            let Range { start, end } = work.interval(r);
            *interval = (start, end);
        }
        let last = intervals[rows.len() - 1];
        intervals[rows.len()..count].fill(last);
        Lanes { rows, count, intervals }
    }

    /// The keys that each row sees by its position.
    pub(super) fn intervals(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.intervals[..self.rows.len()].iter().map(|&(start, end)| start..end)
    }

    /// The row of each lane.
    fn row(&self, lane: usize) -> usize {
        (self.rows.start + lane).min(self.rows.end - 1)
    }
}

/// What holds for some lanes and some keys.
pub(super) struct Marks {
    pub(super) verdict: Verdict,
    unit: Unit,
    softcap: Option<f32>,
    lanes: usize,
    /// The number of the first key in its tile.
    first: usize,
    /// First visible key of each lane and the one after its last, counted from the tile's first key.
    visible: [[f32; MAX_PANEL_LANES]; 2],
    /// Slope and position of each lane.
    alibi: Option<[[f32; MAX_PANEL_LANES]; 2]>,
}

impl Marks {
    /// Reads what the mask and bias tensors say about `keys` into `bias`, one row for each lane, `[rows][width]`.
    pub(super) fn read(
        work: Work<'_>,
        lanes: &Lanes,
        keys: &Range<usize>,
        unit: Unit,
        (bias, width): (&mut [f32], usize),
    ) -> Marks {
        let mut verdict = Verdict::by_position(keys.clone(), lanes.intervals());
        if work.has_score_tensor() && verdict != Verdict::Hidden {
            let (mut any, mut all) = (false, true);
            for (row, r) in bias.chunks_exact_mut(width).zip(lanes.rows.clone()) {
                let hidden = read_score_row(work, r, keys.clone(), &mut row[..keys.len()]);
                any |= hidden < keys.len();
                all &= hidden == 0;
            }
            verdict = match (any, all) {
                (false, _) => Verdict::Hidden,
                (true, true) => verdict,
                (true, false) => Verdict::Partial,
            };
        }
        // Counted from the tile's first key, numbers are small and so exact as f32; a bound outside may stand at the edge.
        // (A position may be far away, and rounded: but the same way for a key of the tile whichever rows are beside it.)
        let tile_start = keys.start / work.plan.tile_keys * work.plan.tile_keys;
        let within = |key: usize| (key.clamp(keys.start, keys.end) - tile_start) as f32;
        let mut visible = [[0.0; MAX_PANEL_LANES]; 2];
        for (lane, &(start, end)) in lanes.intervals[..lanes.count].iter().enumerate() {
            (visible[0][lane], visible[1][lane]) = (within(start), within(end));
        }
        let alibi = work.problem.bias.alibi.map(|_| {
            let slope = |lane| work.problem.bias.slope(work.head_and_query(lanes.row(lane)).0).unwrap_or(0.0);
            let position = |lane| (work.position(lanes.row(lane)) - tile_start as i128) as f32;
            [std::array::from_fn(slope), std::array::from_fn(position)]
        });
        let (first, softcap) = (keys.start - tile_start, work.problem.bias.softcap);
        Marks { verdict, unit, softcap, lanes: lanes.count, first, visible, alibi }
    }

    /// What the kernel is to do; `bias` as read, laid out as the scores are.
    pub(super) fn adjust<'a>(&'a self, bias: Option<&'a [f32]>) -> Adjust<'a> {
        let lanes = |x: &'a [f32; MAX_PANEL_LANES]| &x[..self.lanes];
        let partial = self.verdict == Verdict::Partial;
        Adjust {
            unit: self.unit,
            softcap: self.softcap,
            bias,
            first: self.first,
            alibi: self.alibi.as_ref().map(|[slope, position]| (lanes(slope), lanes(position))),
            visible: partial.then(|| (lanes(&self.visible[0]), lanes(&self.visible[1]))),
        }
    }
}

/// The additive bias of row `r` for some keys, -inf where the boolean mask says no; returns how many are -inf.
fn read_score_row(work: Work<'_>, r: usize, keys: Range<usize>, row: &mut [f32]) -> usize {
    let ((h, i), b) = (work.head_and_query(r), work.task.batch);
    match &work.problem.bias.tensor {
        Some(tensor) => AnyMatrix::new(tensor, b, h).read_row(i, keys.clone(), row),
        None => row.fill(0.0),
    }
    if let Some(tensor) = &work.problem.mask.tensor {
        for (to, sees) in row.iter_mut().zip(tensor.matrix(b, h).row(i).slice(keys).iter()) {
            *to = if sees != 0 { *to } else { f32::NEG_INFINITY };
        }
    }
    row.iter().filter(|&&x| x == f32::NEG_INFINITY).count()
}
