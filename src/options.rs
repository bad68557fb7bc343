//! What to compute, as plain data. [`Attention`](crate::Attention) builds it, [`Problem`](crate::problem::Problem) checks it.

#![forbid(unsafe_code)]

use crate::integers::Integers;
use crate::mask::{MaskTensor, Window};
use crate::score::{AlibiSlopes, BiasTensor};
use crate::sequence::QueryOffset;

/// The options of an attention, as given: nothing is checked yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options<'a> {
    /// `None` for `1 / sqrt(head_dim)`.
    pub(crate) scale: Option<f32>,
    pub(crate) query_offset: QueryOffset<'a>,
    pub(crate) key_lengths: Option<Integers<'a>>,
    pub(crate) causal: bool,
    pub(crate) window: Window,
    pub(crate) mask: Option<MaskTensor<'a>>,
    pub(crate) softcap: Option<f32>,
    pub(crate) bias: Option<BiasTensor<'a>>,
    pub(crate) alibi: Option<AlibiSlopes<'a>>,
    /// An option that was given a second time and can't be combined with the first.
    pub(crate) given_twice: Option<&'static str>,
}

impl Options<'_> {
    /// Notes that `option` is given, where `before` says whether it was given already.
    pub(crate) fn note(&mut self, option: &'static str, before: bool) {
        if before && self.given_twice.is_none() {
            self.given_twice = Some(option);
        }
    }
}
