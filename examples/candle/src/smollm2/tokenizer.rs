//! Byte-level BPE from a GGUF file's vocabulary.

use candle_core::quantized::gguf_file::{Content, Value};
use std::error::Error;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The token type of control tokens in GGUF files.
const CONTROL: i32 = 3;

/// The tokenizer of the file. Digits are tokens of their own (`tokenizer.ggml.pre` is `smollm`); the rest is split as GPT-2
/// splits it.
pub fn load(gguf: &Content) -> Result<Tokenizer> {
    let kind = (entry(gguf, "tokenizer.ggml.model")?.to_string()?, entry(gguf, "tokenizer.ggml.pre")?.to_string()?);
    if (kind.0.as_str(), kind.1.as_str()) != ("gpt2", "smollm") {
        return Err(format!("this example splits text as smollm's BPE does, not as {kind:?}").into());
    }
    let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
    let types = entry(gguf, "tokenizer.ggml.token_type")?.to_vec()?;
    let merges = strings(gguf, "tokenizer.ggml.merges")?.into_iter().map(pair).collect::<Result<_>>()?;
    let vocabulary: Vocab = tokens.iter().cloned().zip(0..).collect();
    let bpe = BPE::builder().vocab_and_merges(vocabulary, merges).build()?;

    let mut tokenizer = Tokenizer::new(bpe);
    let bytes = ByteLevel::new(false, true, true);
    let digits = PreTokenizerWrapper::Digits(Digits::new(true));
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![digits, bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    let mut control = Vec::new();
    for (token, kind) in tokens.into_iter().zip(types) {
        if kind.to_i32()? == CONTROL {
            control.push(AddedToken::from(token, true));
        }
    }
    tokenizer.add_special_tokens(control)?;
    Ok(tokenizer)
}

/// A question to the assistant, as the file's `tokenizer.chat_template` writes it.
pub fn chat(question: &str) -> String {
    let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    format!("<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
}

fn entry<'c>(gguf: &'c Content, key: &str) -> Result<&'c Value> {
    gguf.metadata.get(key).ok_or_else(|| format!("the file has no {key}").into())
}

fn strings(gguf: &Content, key: &str) -> Result<Vec<String>> {
    let list = entry(gguf, key)?.to_vec()?;
    list.iter().map(|value| Ok(value.to_string()?.clone())).collect()
}

/// The two parts of a merge, which a space separates.
fn pair(merge: String) -> Result<(String, String)> {
    let (left, right) = merge.split_once(' ').ok_or_else(|| format!("{merge:?} is no merge"))?;
    Ok((left.into(), right.into()))
}
