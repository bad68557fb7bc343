//! Masks from closures.

#![forbid(unsafe_code)]

use super::open::Mask;
use crate::pair::Pair;

/// A mask from a function of the pair: true where the query may see the key.
///
/// Every pair that the other masks leave is asked for. [`Covered::new`](super::Covered::new) looks at all pairs once and skips
/// blocks without a visible one in every later call.
///
/// ```
/// use flashtile::{Attention, mask::mask_fn};
/// use ndarray::Array4;
///
/// let x = Array4::from_elem((1, 2, 6, 8), 0.5f32);
/// let same_parity = mask_fn(|pair| pair.query() % 2 == pair.key() % 2);
/// let out = Attention::new().causal().masked_by(&same_parity).run(&x, &x, &x)?;
/// # Ok::<(), flashtile::Error>(())
/// ```
pub fn mask_fn<F: Fn(Pair) -> bool + Sync>(sees: F) -> MaskFn<F> {
    MaskFn(sees)
}

/// The mask of [`mask_fn`].
#[derive(Clone, Copy)]
pub struct MaskFn<F>(F);

impl<F: Fn(Pair) -> bool + Sync> Mask for MaskFn<F> {
    #[inline]
    fn sees(&self, pair: Pair) -> bool {
        (self.0)(pair)
    }
}
