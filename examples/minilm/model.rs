//! The encoder: BERT with post-norm, in plain ndarray. The caller supplies the attention.

use ndarray::{Array1, Array2, Array3, ArrayView2, ArrayView4, ArrayViewMut4, Axis, Ix1, Ix2, s};
use safetensors::{Dtype, SafeTensors};
use std::error::Error;

pub(crate) const WIDTH: usize = 384;
const HEADS: usize = 12;
const HEAD_DIM: usize = WIDTH / HEADS;
const LAYERS: usize = 6;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The attention of the encoder. The arguments are q, k and v `[batch, heads, seq, head_dim]`, the key lengths, and the output
/// of the same shape. The views are permuted from `[batch, seq, heads, head_dim]`.
pub(crate) trait Attend:
    FnMut([ArrayView4<'_, f32>; 3], &[usize], ArrayViewMut4<'_, f32>) -> std::result::Result<(), flashtile::Error>
{
}

impl<F> Attend for F where
    F: FnMut([ArrayView4<'_, f32>; 3], &[usize], ArrayViewMut4<'_, f32>) -> std::result::Result<(), flashtile::Error>
{
}

/// Sentences as token ids, padded to the longest.
pub(crate) struct Batch {
    ids: Array2<usize>,
    lengths: Vec<usize>,
}

impl Batch {
    pub(crate) fn new(sentences: &[&[usize]]) -> Self {
        let lengths: Vec<_> = sentences.iter().map(|ids| ids.len()).collect();
        let mut ids = Array2::zeros((sentences.len(), lengths.iter().copied().max().unwrap_or(0))); // 0 is [PAD]
        for (mut row, sentence) in ids.outer_iter_mut().zip(sentences) {
            row.iter_mut().zip(*sentence).for_each(|(to, id)| *to = *id);
        }
        Batch { ids, lengths }
    }

    /// `[batch, seq]`.
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.ids.dim()
    }

    /// The number of tokens of each sentence.
    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
    }
}

pub(crate) struct Encoder {
    word: Array2<f32>,
    position: Array2<f32>,
    token_type: Array2<f32>,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: LayerNorm,
    widen: Linear,
    narrow: Linear,
    norm: LayerNorm,
}

/// y = x W^T + b.
struct Linear {
    /// `[out, in]`.
    weight: Array2<f32>,
    bias: Array1<f32>,
}

/// Normalises every row to mean 0 and variance 1, then applies a gain and a bias per column.
struct LayerNorm {
    gain: Array1<f32>,
    bias: Array1<f32>,
}

impl Encoder {
    pub(crate) fn load(bytes: &[u8]) -> Result<Self> {
        let file = &SafeTensors::deserialize(bytes)?;
        let layer = |n: usize| -> Result<Layer> {
            let name = |part: &str| format!("encoder.layer.{n}.{part}");
            Ok(Layer {
                query: Linear::load(file, &name("attention.self.query"), [WIDTH, WIDTH])?,
                key: Linear::load(file, &name("attention.self.key"), [WIDTH, WIDTH])?,
                value: Linear::load(file, &name("attention.self.value"), [WIDTH, WIDTH])?,
                attended: Linear::load(file, &name("attention.output.dense"), [WIDTH, WIDTH])?,
                attended_norm: LayerNorm::load(file, &name("attention.output.LayerNorm"))?,
                widen: Linear::load(file, &name("intermediate.dense"), [4 * WIDTH, WIDTH])?,
                narrow: Linear::load(file, &name("output.dense"), [WIDTH, 4 * WIDTH])?,
                norm: LayerNorm::load(file, &name("output.LayerNorm"))?,
            })
        };
        Ok(Encoder {
            word: matrix(file, "embeddings.word_embeddings.weight", [30522, WIDTH])?,
            position: matrix(file, "embeddings.position_embeddings.weight", [512, WIDTH])?,
            token_type: matrix(file, "embeddings.token_type_embeddings.weight", [2, WIDTH])?,
            norm: LayerNorm::load(file, "embeddings.LayerNorm")?,
            layers: (0..LAYERS).map(layer).collect::<Result<_>>()?,
        })
    }

    /// The embeddings of the sentences, `[batch, WIDTH]`: rows of length 1.
    pub(crate) fn embed(&self, batch: &Batch, mut attend: impl Attend) -> Result<Array2<f32>> {
        let (sentences, seq) = batch.shape();
        // x has one row per token, sentence after sentence.
        let mut x = self.word.select(Axis(0), batch.ids.as_slice().ok_or("ids in order")?);
        for mut sentence in x.exact_chunks_mut((seq.max(1), WIDTH)) {
            sentence += &self.position.slice(s![..seq, ..]);
            sentence += &self.token_type.row(0);
        }
        self.norm.apply(&mut x);
        for layer in &self.layers {
            x += &layer.attention(&x, batch, &mut attend)?;
            layer.attended_norm.apply(&mut x);
            x += &layer.narrow.apply(layer.widen.apply(x.view()).mapv_into(gelu).view());
            layer.norm.apply(&mut x);
        }
        let x = x.into_shape_with_order((sentences, seq, WIDTH))?;
        Ok(mean_of_tokens(&x, &batch.lengths))
    }
}

impl Layer {
    fn attention(&self, x: &Array2<f32>, batch: &Batch, attend: &mut impl Attend) -> Result<Array2<f32>> {
        let (sentences, seq) = batch.shape();
        let by_head = (sentences, seq, HEADS, HEAD_DIM);
        let project = |linear: &Linear| linear.apply(x.view()).into_shape_with_order(by_head);
        let (q, k, v) = (project(&self.query)?, project(&self.key)?, project(&self.value)?);
        let mut out = ndarray::Array4::zeros(by_head);
        // Inputs and output are permuted by strides, so nothing is copied.
        let heads_first = [0, 2, 1, 3];
        let qkv = [&q, &k, &v].map(|tensor| tensor.view().permuted_axes(heads_first));
        attend(qkv, &batch.lengths, out.view_mut().permuted_axes(heads_first))?;
        Ok(self.attended.apply(out.into_shape_with_order((sentences * seq, WIDTH))?.view()))
    }
}

impl Linear {
    fn load(file: &SafeTensors<'_>, name: &str, shape: [usize; 2]) -> Result<Self> {
        let weight = matrix(file, &format!("{name}.weight"), shape)?;
        Ok(Linear { weight, bias: vector(file, &format!("{name}.bias"), shape[0])? })
    }

    fn apply(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        x.dot(&self.weight.t()) + &self.bias
    }
}

impl LayerNorm {
    fn load(file: &SafeTensors<'_>, name: &str) -> Result<Self> {
        let vector = |part| vector(file, &format!("{name}.{part}"), WIDTH);
        Ok(LayerNorm { gain: vector("weight")?, bias: vector("bias")? })
    }

    fn apply(&self, x: &mut Array2<f32>) {
        const EPSILON: f32 = 1e-12;
        for mut row in x.rows_mut() {
            let mean = row.sum() / WIDTH as f32;
            row -= mean;
            let variance = row.dot(&row) / WIDTH as f32;
            row /= (variance + EPSILON).sqrt();
            row *= &self.gain;
            row += &self.bias;
        }
    }
}

/// x times the probability that a standard normal number is below x.
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The mean of each sentence's own tokens, scaled to length 1.
fn mean_of_tokens(x: &Array3<f32>, lengths: &[usize]) -> Array2<f32> {
    let mut embeddings = Array2::zeros((lengths.len(), WIDTH));
    for ((mut embedding, sentence), &length) in embeddings.outer_iter_mut().zip(x.outer_iter()).zip(lengths) {
        embedding.assign(&sentence.slice(s![..length, ..]).sum_axis(Axis(0)));
        // The mean has the direction of the sum, and the length is normalised to 1.
        let norm = embedding.dot(&embedding).sqrt();
        embedding /= norm;
    }
    embeddings
}

fn matrix(file: &SafeTensors<'_>, name: &str, shape: [usize; 2]) -> Result<Array2<f32>> {
    Ok(ndarray::Array::from_shape_vec(shape, weights(file, name, &shape)?)?.into_dimensionality::<Ix2>()?)
}

fn vector(file: &SafeTensors<'_>, name: &str, len: usize) -> Result<Array1<f32>> {
    Ok(ndarray::Array::from_shape_vec([len], weights(file, name, &[len])?)?.into_dimensionality::<Ix1>()?)
}

fn weights(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let view = file.tensor(name)?;
    if (view.dtype(), view.shape()) != (Dtype::F32, shape) {
        return Err(format!("{name} is {} {:?} but must be F32 {shape:?}", view.dtype(), view.shape()).into());
    }
    Ok(view.data().as_chunks().0.iter().copied().map(f32::from_le_bytes).collect())
}
