//! SmolLM2-135M-Instruct from its GGUF file: tokenizer, model and generation. The attention is a part that can be exchanged.
//!
//! | file | |
//! |---|---|
//! | `tokenizer.rs` | text to token ids and back, from the file's own vocabulary |
//! | `model.rs` | the Llama architecture, without its attention |
//! | `attention.rs` | what the model asks of an attention, and the choice between three |
//! | `attention/tiled.rs` | flashtile's, over one of its three caches |
//! | `attention/fused.rs` | candle's `flash_attn`, over candle's cache |
//! | `attention/naive.rs` | a matrix of scores, by candle's operations |
//! | `session.rs` | prompts in, tokens out, and the time that they took |
//! | `sampler.rs` | the choice of the next token |

pub mod attention;
pub mod model;
pub mod sampler;
pub mod session;
pub mod tokenizer;

use candle_core::quantized::gguf_file::Content;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

/// Where `fetch.py` puts the weights.
pub fn weights() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/weights/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// A GGUF file whose metadata has been read.
pub struct Gguf {
    /// Metadata and the places of tensors.
    pub content: Content,
    /// The file, to read tensors from.
    pub file: BufReader<File>,
}

impl Gguf {
    /// Opens the weights. If they are missing, the error says how to get them.
    pub fn open() -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let path = weights();
        let file = File::open(&path).map_err(|e| {
            let fetch = concat!(env!("CARGO_MANIFEST_DIR"), "/fetch.py");
            format!(
                "The weights are not here yet ({}: {e}).\nGet them, 93 MB, with\n\n    python {fetch}",
                path.display()
            )
        })?;
        let mut file = BufReader::new(file);
        Ok(Gguf { content: Content::read(&mut file)?, file })
    }
}
