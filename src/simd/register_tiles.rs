//! Register tiles: the sums that a loop keeps in registers. Each level states the shapes in its own file.
//!
//! A loop needs its shape as a const argument, and Rust cannot compute a const argument from a trait's constant. So the level
//! calls the loop with its shapes. [`dot_tiles!`] and [`strips!`] write the methods that do so, from a table. Only the shapes
//! in the table are compiled.

/// The largest number of rows that share each load of a dot product or a strip. The tables have this number of lines.
pub(crate) const MAX_SHARED_ROWS: usize = 4;

/// Dot products of R rows with N * G other rows.
pub(crate) trait ByDotTile {
    /// Each step loads a vector from each of N other rows and multiplies it by the R rows: R * N sums in registers. G such
    /// groups are then added across lanes together, into R * N * G results.
    ///
    /// # Safety
    /// As each implementation says.
    unsafe fn call<const R: usize, const N: usize, const G: usize>(self);
}

/// Sums of R rows of N vectors.
pub(crate) trait ByStrip {
    /// Whole vectors of `lanes` lanes that a row has.
    fn vectors(&self, lanes: usize) -> usize;

    /// Each step loads N vectors and multiplies them by one number per row: R * N sums in registers.
    ///
    /// # Safety
    /// As each implementation says.
    unsafe fn call<const R: usize, const N: usize>(self);
}

/// Writes [`Simd::dot_tile`](crate::simd::vector::Simd::dot_tile). A line of the table is `rows => N x G`.
macro_rules! dot_tiles {
    ($($rows:literal => $n:literal x $g:literal,)+) => {
        #[inline(always)]
        unsafe fn dot_tile<W: $crate::simd::register_tiles::ByDotTile>(rows: usize, work: W) {
            match rows {
                // SAFETY: the caller's promise.
                $($rows => unsafe { work.call::<$rows, $n, $g>() },)+
                _ => unreachable!("dot products of {rows} rows"),
            }
        }
    };
}
pub(crate) use dot_tiles;

/// Writes [`Simd::strip`](crate::simd::vector::Simd::strip). A line of the table is `rows => N or N`, the widest first.
macro_rules! strips {
    ($($rows:literal => $($n:literal)or+,)+) => {
        #[inline(always)]
        unsafe fn strip<W: $crate::simd::register_tiles::ByStrip>(rows: usize, work: W) {
            let vectors = work.vectors(Self::LANES);
            match rows {
                $($rows => $crate::simd::register_tiles::strips!(@widest vectors, work, $rows: $($n)+),)+
                _ => unreachable!("a strip of {rows} rows"),
            }
        }
    };
    (@widest $vectors:ident, $work:ident, $rows:literal: $n:literal) => {{
        let _ = $vectors;
        // SAFETY: the caller's promise.
        unsafe { $work.call::<$rows, $n>() }
    }};
    (@widest $vectors:ident, $work:ident, $rows:literal: $n:literal $($narrower:literal)+) => {
        if $vectors >= $n {
            // SAFETY: the caller's promise.
            unsafe { $work.call::<$rows, $n>() }
        } else {
            $crate::simd::register_tiles::strips!(@widest $vectors, $work, $rows: $($narrower)+)
        }
    };
}
pub(crate) use strips;
