//! The supertrait that seals [`Number`](super::Number).
#![forbid(unsafe_code)]

use super::axis::Axis;
use super::buffers::Buffers;
use super::column::MakeBlock;
use super::lines::LinePanel;
use super::scratch::Scratch;
use super::shared::{Panel, PanelMut};
use crate::tensor::strided::StridedMut;

/// Gets a line's number, its maximum and its sum, in any order of the lines. A reference, because a type parameter would compile every loop at every level
/// for each caller, and in the crate of the caller.
pub(super) type Visit<'a> = &'a mut (dyn FnMut(usize, f64, f64) + Send);

/// A panel of an output, and what writes some rows of the input to memory.
pub struct Made<'a, T: Sealed> {
    pub(super) panel: LinePanel,
    pub(super) make: MakeBlock<'a, T::Real>,
    pub(super) out: PanelMut<'a, T>,
    /// Whether the output is streamed past the caches.
    pub(super) stream: bool,
}

/// Writes a row to a tile, times the factor of the scale. The results are its maximum and the address of the row after it, for prefetching.
pub(super) type FillRow<'a, R> = &'a mut dyn FnMut(usize, &mut [R]) -> (R, *const u8);

/// [`FillRow`] for one row of a type, of which the elements that are not visible become -inf. The scale and whether logarithms are
/// computed from the tile decide about the factor.
pub(super) type Filler<T, R> = fn(x: &[T], visible: Option<&[u8]>, tile: &mut [R], (R, bool)) -> R;

/// Rows of an output, and what reads the input.
pub struct FilledRows<'a, T: Sealed> {
    pub(super) fill: FillRow<'a, T::Real>,
    /// The rows at `[i0, i1]` of the first two axes. The elements of each are neighbours.
    pub(super) out: StridedMut<'a, T, 4>,
    pub(super) at: [usize; 2],
    /// Whether the output is streamed past the caches.
    pub(super) stream: bool,
}

/// The operations of an element type. The callers have checked all lengths.
pub trait Sealed: Sized + Copy + Default + Send + Sync {
    /// The type of scales and losses, and of the arithmetic: f32, or f64 for f64.
    type Real: Sealed<Real = Self::Real>;
    fn to_f64(self) -> f64;
    fn from_f64(x: f64) -> Self;
    fn real(x: f64) -> Self::Real;
    fn real_to_f64(x: Self::Real) -> f64;
    /// The same slice if the type of the arithmetic is this type.
    fn of_real(x: &[Self::Real]) -> Option<&[Self]>;
    /// [`of_real`](Self::of_real) of a slice that is written.
    fn of_real_mut(x: &mut [Self::Real]) -> Option<&mut [Self]>;
    /// The other way round.
    fn as_real(x: &[Self]) -> Option<&[Self::Real]>;
    /// [`as_real`](Self::as_real) of a slice that is written.
    fn as_real_mut(x: &mut [Self]) -> Option<&mut [Self::Real]>;
    /// `to` = `from`, exactly.
    fn widen(from: &[Self], to: &mut [Self::Real]);
    /// `to` = `from`, exactly, or -inf where `visible` is 0.
    fn widen_visible(from: &[Self], visible: &[u8], to: &mut [Self::Real]);
    /// `to` = `from`, each element rounded once.
    fn narrow(from: &[Self::Real], to: &mut [Self]);
    fn softmax(buffers: Buffers<'_, Self>, axis: Axis, scale: Self::Real, log: bool);
    /// The same of the lines of a panel whose rows are made block by block; false, and nothing is done, if the type has no such
    /// loops.
    fn softmax_of_made(made: Made<'_, Self>, scale: Self::Real, log: bool, scratch: &mut Scratch) -> bool;
    /// What fills the tiles of [`softmax_of_filled`](Self::softmax_of_filled); `None` if the type has no such loops.
    fn filler() -> Option<Filler<Self, Self::Real>>;
    /// Softmax of rows whose tiles are filled; false, and nothing is done, if the type has no such loops.
    fn softmax_of_filled(rows: FilledRows<'_, Self>, scale: Self::Real, log: bool, scratch: &mut Scratch) -> bool;
    /// Softmax times a number per line. For the last axis, `visit` gets (line, max, sum).
    fn softmax_times(
        x: &[Self],
        out: &mut [Self],
        axis: Axis,
        scale: Self::Real,
        upstream: &[Self::Real],
        visit: Option<Visit<'_>>,
    );
    /// Hands (line, scale * max, sum) of every line to `visit`.
    fn states(x: &[Self], axis: Axis, scale: Self::Real, visit: Visit<'_>);
    /// Hands (line, max, sum) of each line of a panel, counted in the panel, to `visit`, at scale 1; false, and nothing is done, if the
    /// type has no such loops.
    fn states_of_panel(x: Panel<'_, Self>, scratch: &mut Scratch, visit: Visit<'_>) -> bool;
    /// From dy to dx. `y` is the output of softmax, or of log_softmax if `log`.
    fn backward(y: &[Self], buffers: Buffers<'_, Self>, axis: Axis, scale: Self::Real, log: bool);
}
