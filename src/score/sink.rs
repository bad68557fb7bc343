//! Sinks: a logit for each head that joins the denominator and has no value.

#![forbid(unsafe_code)]

/// One logit for each query head: `out = sum_j exp(score[j]) * v[j] / (exp(sink) + sum_j exp(score[j]))`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sinks<'a>(pub(crate) &'a [f32]);

impl Sinks<'_> {
    /// The logit of query head `h`.
    pub(crate) fn of_head(&self, h: usize) -> f32 {
        self.0[h]
    }
}
