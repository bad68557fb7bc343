//! Partial results: the values that rows have summed over a part of the keys, and the rows' states.

#![forbid(unsafe_code)]

use super::shape::round_up_lanes;
use super::state::State;

/// The layout of a partial result in memory: values summed so far, `[rows][value_dim rounded up]`, then maxima, then sums, each
/// in whole vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartialLayout {
    rows: usize,
    width: usize,
}

impl PartialLayout {
    /// The layout for at most `rows` rows of `value_dim`.
    pub(crate) fn new(rows: usize, value_dim: usize) -> Self {
        PartialLayout { rows, width: round_up_lanes(value_dim) }
    }

    /// Elements of one partial result. It does not overflow, because `Problem` keeps rows times value_dim below 2^60.
    pub(crate) fn len(self) -> usize {
        self.rows * self.width + 2 * round_up_lanes(self.rows)
    }

    /// Elements from one row of values to the next.
    pub(crate) fn width(self) -> usize {
        self.width
    }

    /// Writes the result over no keys.
    pub(crate) fn clear(self, memory: &mut [f32]) {
        let State { max: [max], sum: [sum] } = State::EMPTY;
        memory.fill(sum); // 0, as are the values over no keys
        self.states(memory).0.fill(max);
    }

    /// The maxima and the sums.
    fn states(self, memory: &mut [f32]) -> (&mut [f32], &mut [f32]) {
        memory[self.rows * self.width..].split_at_mut(round_up_lanes(self.rows))
    }

    /// The values of the first `rows` rows.
    pub(crate) fn values(self, memory: &mut [f32], rows: usize) -> &mut [f32] {
        &mut memory[..rows * self.width]
    }

    /// The state and the values of row `n`.
    pub(crate) fn row(self, memory: &[f32], n: usize) -> (State<1>, &[f32]) {
        let (values, states) = memory.split_at(self.rows * self.width);
        let state = State { max: [states[n]], sum: [states[round_up_lanes(self.rows) + n]] };
        (state, &values[n * self.width..][..self.width])
    }

    /// Changes the state and the values of row `n`.
    pub(crate) fn update(self, memory: &mut [f32], n: usize, change: impl FnOnce(&mut State<1>, &mut [f32])) {
        let (mut state, _) = self.row(memory, n);
        change(&mut state, &mut memory[n * self.width..][..self.width]);
        let (max, sum) = self.states(memory);
        (max[n], sum[n]) = (state.max[0], state.sum[0]);
    }
}

/// Results over the first keys of a task's rows, which other tasks have computed: of one split after the other, or of all. Each result
/// has blocks of rows, and each block a slot of memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EarlierResults<'m> {
    /// From the first block of the first result on.
    pub(crate) memory: &'m [f32],
    pub(crate) value_dim: usize,
    /// Elements from one block to the next, and from one result to the next.
    pub(crate) slot: usize,
    pub(crate) stride: usize,
    /// The number of results.
    pub(crate) count: usize,
    /// All rows, and those of a block; the last block may have fewer.
    pub(crate) rows: usize,
    pub(crate) block_rows: usize,
    /// The task's row 0 among these.
    pub(crate) first_row: usize,
}

impl<'m> EarlierResults<'m> {
    /// The state and the values of the task's row `n` in result `result`.
    pub(crate) fn row(&self, n: usize, result: usize) -> (State<1>, &'m [f32]) {
        let row = self.first_row + n;
        let (block, n) = (row / self.block_rows, row % self.block_rows);
        let rows = self.block_rows.min(self.rows - block * self.block_rows);
        PartialLayout::new(rows, self.value_dim).row(&self.memory[result * self.stride + block * self.slot..], n)
    }
}
