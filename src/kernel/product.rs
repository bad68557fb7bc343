//! The product that both halves of attention are made of.

use super::{MAX_PRODUCT_ROWS, product_rows};
use crate::simd::Simd;

/// A left operand, read one element at a time: element (row r, step s) is at `at.offset(r * row + s * step)`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) at: *const f32,
    pub(super) row: isize,
    pub(super) step: isize,
}

/// `C[r][lane] = sum over s of A[r][s] * B[s][lane]`, in `R * V` registers; B has `V` vectors a step, one after the other.
///
/// Each step broadcasts R elements of A and multiplies them into V vectors of B: R * V multiply-adds for R + V loads. Two
/// multiply-adds can start in a cycle and each takes four, so eight chains or more keep the unit busy.
///
/// # Safety
/// * `a` is valid for reads of every element with r < R and s < steps
/// * `b` is valid for reads of `steps * V` vectors
#[inline(always)]
pub(super) unsafe fn product<S: Simd, const R: usize, const V: usize>(
    simd: S,
    a: Left,
    b: *const f32,
    steps: usize,
) -> [[S::F32; V]; R] {
    let mut c = [[simd.zero(); V]; R];
    let (mut at, mut b) = (a.at, b);
    for _ in 0..steps {
        let mut lanes = [simd.zero(); V];
        for (v, lanes) in lanes.iter_mut().enumerate() {
            // SAFETY: a vector of a step below `steps`: the caller's promise.
            *lanes = unsafe { simd.load(b.add(v * S::LANES)) };
        }
        for (r, c) in c.iter_mut().enumerate() {
            // SAFETY: row r < R of a step below `steps`: the caller's promise.
            let x = simd.splat(unsafe { *at.offset(r as isize * a.row) });
            for v in 0..V {
                c[v] = simd.mul_add(x, lanes[v], c[v]);
            }
        }
        at = at.wrapping_offset(a.step);
        b = b.wrapping_add(V * S::LANES);
    }
    c
}

/// What to do with a product of `R` rows, for whichever R it comes in.
pub(super) trait ByRows<S: Simd> {
    /// # Safety
    /// As each implementation says.
    unsafe fn call<const R: usize>(&mut self);
}

/// Calls `body` with `R = rows`.
///
/// # Safety
/// * as `body` says
#[inline(always)]
pub(super) unsafe fn by_rows<S: Simd, const V: usize>(rows: usize, body: &mut impl ByRows<S>) {
    macro_rules! call {
        ($($r:literal)+) => {
            match rows {
                // Row counts beyond the level's registers are compiled to nothing.
                // SAFETY: the caller's promise.
                $($r if $r <= product_rows::<S>(V) => unsafe { body.call::<$r>() },)+
                _ => unreachable!("a product of {rows} rows"),
            }
        };
    }
    const { assert!(MAX_PRODUCT_ROWS == 12) };
    call!(1 2 3 4 5 6 7 8 9 10 11 12)
}
