//! The options of an attention, as plain data. [`Attention`](crate::Attention) builds them,
//! [`Problem`](crate::problem::Problem) checks them.

#![forbid(unsafe_code)]

use crate::integers::Integers;
use crate::mask::{MaskTensor, OpenMask, Window};
use crate::score::{AlibiSlopes, BiasTensor, OpenScoreMod, Sinks};
use crate::sequence::QueryOffset;

/// The options of an attention as the caller gave them, unchecked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options<'a> {
    /// `None` for `1 / sqrt(head_dim)`.
    pub(crate) scale: Option<f32>,
    pub(crate) query_offset: QueryOffset<'a>,
    pub(crate) key_lengths: Option<Integers<'a>>,
    pub(crate) query_lengths: Option<Integers<'a>>,
    pub(crate) first_keys: Option<Integers<'a>>,
    pub(crate) first_queries: Option<Integers<'a>>,
    pub(crate) query_starts: Option<Integers<'a>>,
    pub(crate) causal: bool,
    pub(crate) window: Window,
    pub(crate) mask: Option<MaskTensor<'a>>,
    pub(crate) open_masks: Vec<OpenMask<'a>>,
    pub(crate) softcap: Option<f32>,
    pub(crate) bias: Option<BiasTensor<'a>>,
    pub(crate) alibi: Option<AlibiSlopes<'a>>,
    pub(crate) open_score_mods: Vec<OpenScoreMod<'a>>,
    pub(crate) sinks: Option<Sinks<'a>>,
    /// The first option that was given twice and can't be combined.
    pub(crate) given_twice: Option<&'static str>,
}

impl Options<'_> {
    /// Records `option` as given twice, if `before` says that it was given already.
    pub(crate) fn note_if_twice(&mut self, option: &'static str, before: bool) {
        if before && self.given_twice.is_none() {
            self.given_twice = Some(option);
        }
    }
}
