//! The choice of the next token.

use candle_core::{Result, Tensor};

/// Draws tokens by their probability at a temperature.
pub struct Sampler {
    temperature: f32,
    state: u64,
}

impl Sampler {
    /// A temperature of 0 always takes the most probable token.
    pub fn new(temperature: f32, seed: u64) -> Self {
        Sampler { temperature, state: seed }
    }

    /// A token, given logits of `[vocabulary]`.
    pub fn choose(&mut self, logits: &Tensor) -> Result<u32> {
        let logits: Vec<f32> = logits.to_vec1()?;
        let (most, largest) = argmax(&logits);
        if self.temperature <= 0.0 {
            return Ok(most);
        }
        let weights: Vec<f32> = logits.iter().map(|logit| ((logit - largest) / self.temperature).exp()).collect();
        let mut rest = self.next() * weights.iter().sum::<f32>();
        for (token, weight) in weights.iter().enumerate() {
            rest -= weight;
            if rest < 0.0 {
                return Ok(token as u32);
            }
        }
        Ok(most) // by rounding, nothing was reached
    }

    /// A number from 0 to 1, by SplitMix64.
    fn next(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// The first of the largest logits, and its value.
fn argmax(logits: &[f32]) -> (u32, f32) {
    let better = |best: (u32, f32), (token, logit): (u32, f32)| if logit > best.1 { (token, logit) } else { best };
    (0..).zip(logits.iter().copied()).fold((0, f32::NEG_INFINITY), better)
}
