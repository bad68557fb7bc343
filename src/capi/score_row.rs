//! C's score functions: what becomes of a run of scores of one query.

use crate::score::{Pair, ScoreMod, ScoreTile};
use std::ffi::c_void;

/// `flashtile_row`: a query, and the first key of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Row {
    /// The index in the batch.
    pub batch: i64,
    /// The query head.
    pub head: i64,
    /// The index of the query in its sequence.
    pub query: i64,
    /// The position of the query among the keys.
    pub position: i64,
    /// The key of the first score.
    pub first_key: i64,
}

/// `flashtile_score_row`: changes `count` scores of one query.
pub type ScoreRow = unsafe extern "C" fn(context: *mut c_void, row: *const Row, scores: *mut f32, count: i64);

/// A caller's function with its context.
pub(super) struct ScoreRowMod {
    function: ScoreRow,
    context: *mut c_void,
}

// SAFETY: the function may be called with the context from several threads at once (see `new`).
unsafe impl Sync for ScoreRowMod {}

impl ScoreRowMod {
    /// # Safety
    /// While this lives, the function may be called from any thread and from several at once, with this context, a row, and as
    /// many scores as it is told. It changes only those, and does not unwind.
    pub(super) unsafe fn new(function: ScoreRow, context: *mut c_void) -> Self {
        ScoreRowMod { function, context }
    }

    fn call(&self, first: Pair, scores: &mut [f32]) {
        let row = Row {
            batch: first.batch() as i64,
            head: first.head() as i64,
            query: first.query() as i64,
            position: first.position() as i64,
            first_key: first.key() as i64,
        };
        // SAFETY: the promise of `new`; the row and the scores are valid during the call.
        unsafe { (self.function)(self.context, &row, scores.as_mut_ptr(), scores.len() as i64) }
    }
}

impl ScoreMod for ScoreRowMod {
    fn define(&self, score: f64, pair: Pair) -> f64 {
        let mut score = [score as f32];
        self.call(pair, &mut score);
        score[0] as f64
    }

    fn modify(&self, tile: &mut ScoreTile<'_>) {
        tile.modify_rows(|first, scores| self.call(first, scores));
    }
}
