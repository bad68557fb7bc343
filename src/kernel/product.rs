//! The matrix product of one register tile, which forms both scores and values.

use crate::element::Element;
use crate::kernel::arithmetic::Multiply;
use crate::kernel::prefetch::Prefetch;
use crate::kernel::shape::{MAX_PRODUCT_ROWS, product_rows};
use crate::simd::Simd;

/// A left operand: step s of row r is at `at.offset(r * row + s * step)`.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Left<A> {
    pub(in crate::kernel) at: *const A,
    pub(in crate::kernel) row: isize,
    pub(in crate::kernel) step: isize,
}

/// A right operand: the `V` vectors of step s start at `at.offset(s * step)`.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Right<B> {
    pub(in crate::kernel) at: *const B,
    pub(in crate::kernel) step: isize,
}

/// `C[r][lane] = sum over s of A[r][s] * B[s][lane]`, in `R * V` registers.
///
/// Each step broadcasts R elements (or pairs, as `multiply` says) of A and multiplies them into V vectors of B: R * V
/// multiply-adds for R + V loads. Two multiply-adds can start in each cycle and each takes four cycles, so eight chains or more
/// keep the multipliers busy.
///
/// # Safety
/// * `a` is valid for reads of every element with r < R and s < steps
/// * `b` is valid for reads of `V` vectors at every step
#[inline(always)]
pub(in crate::kernel) unsafe fn product<S: Simd, M: Multiply<S>, B: Element, const R: usize, const V: usize>(
    (simd, multiply): (S, M),
    a: Left<M::Step>,
    b: Right<B>,
    steps: usize,
    prefetch: &mut Prefetch,
) -> [[S::F32; V]; R] {
    // SAFETY: the caller's promise.
    unsafe { add_product((simd, multiply), a, b, steps, [[simd.zero(); V]; R], prefetch) }
}

/// As [`product`], added to `c` step by step: its chains go on.
///
/// # Safety
/// * as [`product`]
#[inline(always)]
pub(in crate::kernel) unsafe fn add_product<S: Simd, M: Multiply<S>, B: Element, const R: usize, const V: usize>(
    (simd, multiply): (S, M),
    a: Left<M::Step>,
    b: Right<B>,
    steps: usize,
    mut c: [[S::F32; V]; R],
    prefetch: &mut Prefetch,
) -> [[S::F32; V]; R] {
    let (mut at, mut from, mut of_product) = (RowPointers::<_, R>::new(simd, a), b.at, prefetch.for_product());
    // Unrolled, so that address arithmetic and the test for the loop's end take only one instruction slot in four.
    for n in 0..steps / UNROLL {
        // Prefetch for the next tile. The processor prefetches the operands of this tile's next product by itself: with
        // prefetches for those, short sequences took 3% longer.
        if n % (LINE_STEPS / UNROLL) == 0 {
            of_product.issue(simd, prefetch);
        }
        for s in 0..UNROLL {
            let at = at.after(s as isize * a.step);
            // SAFETY: a step below `steps`: the caller's promise.
            unsafe { step((simd, multiply), at, from.wrapping_offset(s as isize * b.step), &mut c) };
        }
        at = at.after(UNROLL as isize * a.step);
        from = from.wrapping_offset(UNROLL as isize * b.step);
    }
    prefetch.resume_after(of_product);
    for _ in 0..steps % UNROLL {
        // SAFETY: as above.
        unsafe { step((simd, multiply), at, from, &mut c) };
        at = at.after(a.step);
        from = from.wrapping_offset(b.step);
    }
    for row in &mut c {
        for sum in row {
            *sum = multiply.finish(simd, *sum);
        }
    }
    c
}

/// Pointers to the rows of a left operand at one step.
///
/// Up to eight rows are addressed from the first row's pointer. With more rows, every third row has its own pointer, because
/// otherwise the compiler keeps each row's distance from the first one in memory and loads it at every step.
#[derive(Clone, Copy)]
struct RowPointers<A, const R: usize> {
    thirds: [*const A; MAX_PRODUCT_ROWS.div_ceil(3)],
    row: isize,
}

impl<A, const R: usize> RowPointers<A, R> {
    /// Whether all rows are addressed from the first row's pointer.
    const ONE_POINTER: bool = R <= 8;

    #[inline(always)]
    fn new<S: Simd>(simd: S, a: Left<A>) -> Self {
        let mut thirds = [a.at; MAX_PRODUCT_ROWS.div_ceil(3)];
        for (n, third) in thirds.iter_mut().enumerate().skip(1) {
            if !Self::ONE_POINTER && 3 * n < R {
                // Wrapping: keys of no elements may have any stride.
                *third = simd.unrelated(a.at.wrapping_offset((3 * n as isize).wrapping_mul(a.row)));
            }
        }
        RowPointers { thirds, row: a.row }
    }

    /// Row `3 * n + r`. It is called at a step only, so the row lies inside its tensor and the product does not overflow.
    #[inline(always)]
    fn row(self, n: usize, r: usize) -> *const A {
        if Self::ONE_POINTER {
            self.thirds[0].wrapping_offset((3 * n + r) as isize * self.row)
        } else {
            self.thirds[n].wrapping_offset(r as isize * self.row)
        }
    }

    #[inline(always)]
    fn after(mut self, elements: isize) -> Self {
        for n in 0..self.thirds.len() {
            self.thirds[n] = self.thirds[n].wrapping_offset(elements);
        }
        self
    }
}

/// Steps in a cache line of f32, or of pairs of bf16.
const LINE_STEPS: usize = 16;

/// Parts of a product of `steps` steps. The product issues prefetches once in each part.
pub(crate) fn prefetch_parts(steps: usize) -> usize {
    (steps / UNROLL).div_ceil(LINE_STEPS / UNROLL)
}

/// Steps of a product between two tests for the loop's end.
const UNROLL: usize = 4;

/// `c[r][lane] += A[r] * B[lane]` for one step.
///
/// # Safety
/// * `a.row(r)` is valid for reads for every r < R, and `b` for reads of V vectors
#[inline(always)]
unsafe fn step<S: Simd, M: Multiply<S>, B: Element, const R: usize, const V: usize>(
    (simd, multiply): (S, M),
    a: RowPointers<M::Step, R>,
    b: *const B,
    c: &mut [[S::F32; V]; R],
) {
    let mut lanes = [simd.zero(); V];
    for (v, lanes) in lanes.iter_mut().enumerate() {
        // SAFETY: vector v < V: the caller's promise.
        *lanes = unsafe { simd.load_as(b.wrapping_add(v * S::LANES)) };
    }
    // In groups of three, because the compiler does not unroll sixteen rows.
    let (threes, rest) = c.as_chunks_mut::<3>();
    for (n, three) in threes.iter_mut().enumerate() {
        for (r, c) in three.iter_mut().enumerate() {
            // SAFETY: a row below R: the caller's promise.
            unsafe { multiply.mul_add_at(simd, a.row(n, r), lanes, c) };
        }
    }
    for (r, c) in rest.iter_mut().enumerate() {
        // SAFETY: a row below R: the caller's promise.
        unsafe { multiply.mul_add_at(simd, a.row(R / 3, r), lanes, c) };
    }
}

/// Work on a product of `R` rows, generic over R.
pub(in crate::kernel) trait ByRows<S: Simd> {
    /// # Safety
    /// As each implementation says.
    unsafe fn call<const R: usize>(&mut self);
}

/// Calls `body` with `R = rows`.
///
/// # Safety
/// * as `body` says
#[inline(always)]
pub(in crate::kernel) unsafe fn by_rows<S: Simd, const V: usize>(rows: usize, body: &mut impl ByRows<S>) {
    macro_rules! call {
        ($($r:literal)+) => {
            match rows {
                // Row counts above the level's register tile are not compiled.
                // SAFETY: the caller's promise.
                $($r if const { $r <= product_rows::<S>(V) } => unsafe { body.call::<$r>() },)+
                _ => unreachable!("a product of {rows} rows"),
            }
        };
    }
    const { assert!(MAX_PRODUCT_ROWS == 16) };
    const { assert!(1 <= product_rows::<S>(V) && product_rows::<S>(V) <= MAX_PRODUCT_ROWS, "`by_rows` goes up to 16 rows") };
    call!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16)
}
