//! What mask and bias say about a tile: its verdict, and the numbers by which its scores are adjusted.

#![forbid(unsafe_code)]

use super::schedule::Task;
use crate::kernel::MAX_PANEL_LANES;
use crate::kernel::adjust::{Adjust, Unit};
use crate::kernel::load::AnyMatrix;
use crate::mask::Verdict;
use crate::problem::Problem;
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
    pub(super) fn new(problem: &Problem<'_>, task: &Task, rows: Range<usize>, count: usize) -> Self {
        let mut intervals = [(0, 0); MAX_PANEL_LANES];
        for lane in 0..count {
            let r = rows.start + lane;
            intervals[lane] = if r < rows.end {
                let (_, i) = task.head_and_query(r, problem.dims.group());
                let interval = problem.mask.interval(task.batch, i);
                (interval.start, interval.end)
            } else {
                intervals[lane - 1]
            };
        }
        Lanes { rows, count, intervals }
    }

    /// The keys that each row sees by its position.
    pub(super) fn intervals(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.intervals[..self.rows.len()].iter().map(|&(start, end)| start..end)
    }

    /// The query head and the query of each lane.
    fn head_and_query(&self, problem: &Problem<'_>, task: &Task, lane: usize) -> (usize, usize) {
        task.head_and_query((self.rows.start + lane).min(self.rows.end - 1), problem.dims.group())
    }
}

/// Whether a tensor has something to say about single scores.
pub(super) fn has_score_tensor(problem: &Problem<'_>) -> bool {
    problem.mask.tensor.is_some() || problem.bias.tensor.is_some()
}

/// What holds for some lanes and some keys.
pub(super) struct Marks {
    pub(super) verdict: Verdict,
    unit: Unit,
    softcap: Option<f32>,
    lanes: usize,
    /// First visible key of each lane and the one after its last, counted from the first key.
    visible: [[f32; MAX_PANEL_LANES]; 2],
    /// Slope and position of each lane.
    alibi: Option<[[f32; MAX_PANEL_LANES]; 2]>,
}

impl Marks {
    /// Reads what the mask and bias tensors say about `keys` into `bias`, one row for each lane, `[rows][width]`.
    pub(super) fn read(
        problem: &Problem<'_>,
        task: &Task,
        lanes: &Lanes,
        keys: &Range<usize>,
        unit: Unit,
        (bias, width): (&mut [f32], usize),
    ) -> Marks {
        let mut verdict = Verdict::by_position(keys.clone(), lanes.intervals());
        if has_score_tensor(problem) && verdict != Verdict::Hidden {
            let (mut any, mut all) = (false, true);
            for (lane, row) in bias.chunks_exact_mut(width).take(lanes.rows.len()).enumerate() {
                let (h, i) = lanes.head_and_query(problem, task, lane);
                let hidden = read_score_row(problem, [task.batch, h, i], keys.clone(), &mut row[..keys.len()]);
                any |= hidden < keys.len();
                all &= hidden == 0;
            }
            verdict = match (any, all) {
                (false, _) => Verdict::Hidden,
                (true, true) => verdict,
                (true, false) => Verdict::Partial,
            };
        }
        // Counted from the first key, numbers are small and so exact as f32; a bound outside may stand at the edge.
        let within = |key: usize| (key.clamp(keys.start, keys.end) - keys.start) as f32;
        let mut visible = [[0.0; MAX_PANEL_LANES]; 2];
        for (lane, &(start, end)) in lanes.intervals[..lanes.count].iter().enumerate() {
            (visible[0][lane], visible[1][lane]) = (within(start), within(end));
        }
        let alibi = problem.bias.alibi.map(|_| {
            let of = |lane| lanes.head_and_query(problem, task, lane);
            let position = |lane| problem.mask.position(task.batch, of(lane).1) - keys.start as i128;
            [
                std::array::from_fn(|lane| problem.bias.slope(of(lane).0).unwrap_or(0.0)),
                std::array::from_fn(|lane| position(lane) as f32),
            ]
        });
        Marks { verdict, unit, softcap: problem.bias.softcap, lanes: lanes.count, visible, alibi }
    }

    /// What the kernel is to do; `bias` as read, laid out as the scores are.
    pub(super) fn adjust<'a>(&'a self, bias: Option<&'a [f32]>) -> Adjust<'a> {
        let lanes = |x: &'a [f32; MAX_PANEL_LANES]| &x[..self.lanes];
        let partial = self.verdict == Verdict::Partial;
        Adjust {
            unit: self.unit,
            softcap: self.softcap,
            bias,
            alibi: self.alibi.as_ref().map(|[slope, position]| (lanes(slope), lanes(position))),
            visible: partial.then(|| (lanes(&self.visible[0]), lanes(&self.visible[1]))),
        }
    }
}

/// The additive bias of a query for some keys, -inf where the boolean mask says no; returns how many are -inf.
fn read_score_row(problem: &Problem<'_>, [b, h, i]: [usize; 3], keys: Range<usize>, row: &mut [f32]) -> usize {
    match &problem.bias.tensor {
        Some(tensor) => AnyMatrix::new(tensor, b, h).read_row(i, keys.clone(), row),
        None => row.fill(0.0),
    }
    if let Some(tensor) = &problem.mask.tensor {
        for (to, sees) in row.iter_mut().zip(tensor.matrix(b, h).row(i).slice(keys).iter()) {
            *to = if sees { *to } else { f32::NEG_INFINITY };
        }
    }
    row.iter().filter(|&&x| x == f32::NEG_INFINITY).count()
}
