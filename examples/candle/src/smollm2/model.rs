//! The Llama architecture of SmolLM2. The caller supplies the attention.

use super::Gguf;
use super::attention::{Attend, Rotation};
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{Device, Module, Result, Tensor, bail};
use candle_nn::ops::{rms_norm, silu};
use flashtile::Rotary;
use std::sync::Arc;

/// How products with weights are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Products {
    /// With the weights as they are in the file, by candle's quantised products.
    Quantised,
    /// With weights that are widened to f32 when they are loaded.
    F32,
}

/// The sizes of the model.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub layers: usize,
    pub heads_q: usize,
    pub heads_kv: usize,
    pub head_dim: usize,
    /// The most tokens of a sequence.
    pub context: usize,
}

/// The weights.
pub struct Model {
    embedding: QMatMul,
    layers: Vec<Layer>,
    norm: Tensor,
    rotary: Rotary,
    epsilon: f32,
    /// The model's sizes.
    pub sizes: Sizes,
    /// The token that ends an answer.
    pub end: u32,
}

struct Layer {
    attention_norm: Tensor,
    query: QMatMul,
    key: QMatMul,
    value: QMatMul,
    attended: QMatMul,
    mlp_norm: Tensor,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

impl Model {
    /// Reads the weights. `progress` is called with the number of layers that are read.
    pub fn load(gguf: &mut Gguf, products: Products, mut progress: impl FnMut(usize)) -> Result<Self> {
        let number = |key: &str| match gguf.content.metadata.get(key) {
            Some(value) => value.to_u32().map(|n| n as usize),
            None => bail!("the file has no {key}"),
        };
        let real = |key: &str| match gguf.content.metadata.get(key) {
            Some(value) => value.to_f32(),
            None => bail!("the file has no {key}"),
        };
        let sizes = Sizes {
            layers: number("llama.block_count")?,
            heads_q: number("llama.attention.head_count")?,
            heads_kv: number("llama.attention.head_count_kv")?,
            head_dim: number("llama.rope.dimension_count")?,
            context: number("llama.context_length")?,
        };
        let end = number("tokenizer.ggml.eos_token_id")? as u32;
        let (base, epsilon) = (real("llama.rope.freq_base")?, real("llama.attention.layer_norm_rms_epsilon")?);
        // The rows of the query and key weights of llama's GGUF files are in an order that makes pairs neighbours.
        let rotary = Rotary::new(sizes.head_dim, base.into(), sizes.context).map_err(candle_core::Error::wrap)?;

        let mut weights = Weights { gguf, products };
        let mut layers = Vec::new();
        for n in 0..sizes.layers {
            layers.push(Layer::load(&mut weights, n)?);
            progress(n + 1);
        }
        let (embedding, norm) = (weights.matrix("token_embd.weight")?, weights.vector("output_norm.weight")?);
        Ok(Model { embedding, layers, norm, rotary: rotary.interleaved(), epsilon, sizes, end })
    }

    /// The logits of the token after `tokens`, `[vocabulary]`. The first of `tokens` is at `position`; `attention` has those
    /// before.
    ///
    /// `progress` is called after each layer.
    pub fn forward(
        &self,
        tokens: &[u32],
        position: usize,
        attention: &mut dyn Attend,
        mut progress: impl FnMut(),
    ) -> Result<Tensor> {
        attention.begin(tokens.len())?;
        let rotation = Rotation { rotary: &self.rotary, position };
        let ids = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let mut x = self.embedding.embedding(&ids)?; // [1, tokens, width]
        for (n, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, self.epsilon)?;
            let [q, k, v] = layer.project(&normed, &self.sizes)?;
            x = (x + layer.attended.forward(&attention.attend(n, rotation, q, k, v)?)?)?;
            x = (&x + layer.mlp(&rms_norm(&x, &layer.mlp_norm, self.epsilon)?)?)?;
            progress();
        }
        let last = x.narrow(1, tokens.len() - 1, 1)?.contiguous()?;
        self.embedding.forward(&rms_norm(&last, &self.norm, self.epsilon)?)?.flatten_all()
    }
}

impl Layer {
    fn load(weights: &mut Weights<'_>, n: usize) -> Result<Self> {
        let name = |part: &str| format!("blk.{n}.{part}.weight");
        Ok(Layer {
            attention_norm: weights.vector(&name("attn_norm"))?,
            query: weights.matrix(&name("attn_q"))?,
            key: weights.matrix(&name("attn_k"))?,
            value: weights.matrix(&name("attn_v"))?,
            attended: weights.matrix(&name("attn_output"))?,
            mlp_norm: weights.vector(&name("ffn_norm"))?,
            gate: weights.matrix(&name("ffn_gate"))?,
            up: weights.matrix(&name("ffn_up"))?,
            down: weights.matrix(&name("ffn_down"))?,
        })
    }

    /// Queries, keys and values, `[1, tokens, heads, head_dim]`.
    fn project(&self, x: &Tensor, sizes: &Sizes) -> Result<[Tensor; 3]> {
        let split =
            |weights: &QMatMul, heads: usize| weights.forward(x)?.reshape((1, x.dim(1)?, heads, sizes.head_dim));
        let (heads_q, heads_kv) = (sizes.heads_q, sizes.heads_kv);
        Ok([split(&self.query, heads_q)?, split(&self.key, heads_kv)?, split(&self.value, heads_kv)?])
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        self.down.forward(&(silu(&self.gate.forward(x)?)? * self.up.forward(x)?)?)
    }
}

/// The tensors of a file.
struct Weights<'g> {
    gguf: &'g mut Gguf,
    products: Products,
}

impl Weights<'_> {
    fn tensor(&mut self, name: &str) -> Result<QTensor> {
        self.gguf.content.tensor(&mut self.gguf.file, name, &Device::Cpu)
    }

    fn vector(&mut self, name: &str) -> Result<Tensor> {
        self.tensor(name)?.dequantize(&Device::Cpu)
    }

    fn matrix(&mut self, name: &str) -> Result<QMatMul> {
        let tensor = self.tensor(name)?;
        match self.products {
            Products::Quantised => Ok(QMatMul::QTensor(Arc::new(tensor))),
            Products::F32 => Ok(QMatMul::Tensor(tensor.dequantize(&Device::Cpu)?)),
        }
    }
}
