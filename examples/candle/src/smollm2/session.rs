//! Prompts in, tokens out, and the time that they took.

use super::attention::{Attend, Choice, Rotation};
use super::model::Model;
use candle_core::{Result, Tensor, bail};
use std::time::{Duration, Instant};

/// The model with the tokens of one text.
pub struct Session<'m> {
    model: &'m Model,
    attention: Timed,
    tokens: usize,
}

/// Where time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    pub tokens: usize,
    pub all: Duration,
    /// Rotating, storing keys and values, and attention.
    pub attention: Duration,
}

impl Times {
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.all.as_secs_f64()
    }

    /// The part of the time that was spent in attention.
    pub fn share(&self) -> f64 {
        self.attention.as_secs_f64() / self.all.as_secs_f64()
    }
}

impl std::ops::AddAssign for Times {
    fn add_assign(&mut self, other: Times) {
        self.tokens += other.tokens;
        self.all += other.all;
        self.attention += other.attention;
    }
}

impl<'m> Session<'m> {
    /// No text, with room for `capacity` tokens.
    pub fn new(model: &'m Model, choice: &Choice, capacity: usize) -> Result<Self> {
        let context = model.sizes.context;
        if capacity > context {
            bail!("{capacity} tokens are more than the {context} that the model was made for");
        }
        let attention = Timed { inner: choice.build(&model.sizes, capacity)?, spent: Duration::ZERO };
        Ok(Session { model, attention, tokens: 0 })
    }

    /// Adds tokens to the text. Returns the logits of the next one.
    ///
    /// `progress` is called after each layer of each step, as often as [`layers`](Self::layers) says.
    pub fn feed(&mut self, tokens: &[u32], mut progress: impl FnMut()) -> Result<(Tensor, Times)> {
        let (start, spent) = (Instant::now(), self.attention.spent);
        let mut logits = None;
        for step in tokens.chunks(self.attention.most_tokens()) {
            logits = Some(self.model.forward(step, self.tokens, &mut self.attention, &mut progress)?);
            self.tokens += step.len();
        }
        let times = Times { tokens: tokens.len(), all: start.elapsed(), attention: self.attention.spent - spent };
        let Some(logits) = logits else { bail!("there are no tokens") };
        Ok((logits, times))
    }

    /// The layers that are computed for this number of tokens.
    pub fn layers(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.attention.most_tokens()) * self.model.sizes.layers
    }
}

/// An attention, and the time spent in it.
struct Timed {
    inner: Box<dyn Attend>,
    spent: Duration,
}

impl Attend for Timed {
    fn begin(&mut self, tokens: usize) -> Result<()> {
        let start = Instant::now();
        let result = self.inner.begin(tokens);
        self.spent += start.elapsed();
        result
    }

    fn attend(&mut self, layer: usize, rotation: Rotation<'_>, q: Tensor, k: Tensor, v: Tensor) -> Result<Tensor> {
        let start = Instant::now();
        let result = self.inner.attend(layer, rotation, q, k, v);
        self.spent += start.elapsed();
        result
    }

    fn most_tokens(&self) -> usize {
        self.inner.most_tokens()
    }
}
