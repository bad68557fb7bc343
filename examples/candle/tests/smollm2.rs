//! The model computes the same with flashtile's attention and with candle's. Without the weights these tests say so and pass;
//! with FLASHTILE_EXPECT_WEIGHTS set they fail.
//!
//! Products are computed in f32. Quantised products round activations to 8 bits, so a difference in the last bit of an attention
//! may become one of a step of 8 bits, and the text may part where two tokens are nearly as probable.

use candle_core::Result;
use flashtile_candle::smollm2::attention::{CacheKind, CacheType, Choice, Kind};
use flashtile_candle::smollm2::model::{Model, Products};
use flashtile_candle::smollm2::sampler::Sampler;
use flashtile_candle::smollm2::session::Session;
use flashtile_candle::smollm2::{Gguf, tokenizer, weights};
use std::io::Write;
use std::sync::OnceLock;
use tokenizers::Tokenizer;

const PROMPTS: [&str; 4] = [
    "Why is the sky blue? Answer in two sentences.",
    "Write a short story about a lighthouse keeper who collects clocks.",
    "List three differences between a list and a tuple in Python.",
    "Translate into French: The weather is nice today, and we will walk along the river.",
];

/// The long text of tests: about 2800 tokens.
const LONG: &str = include_str!("../../../docs/masks.md");

struct Loaded {
    model: Model,
    tokenizer: Tokenizer,
}

/// The model, or None without weights.
fn loaded() -> Option<&'static Loaded> {
    static LOADED: OnceLock<Option<Loaded>> = OnceLock::new();
    LOADED.get_or_init(load).as_ref()
}

fn load() -> Option<Loaded> {
    if !weights().exists() {
        let message = "SKIPPED: the tests of SmolLM2 need its weights. Get them with: python fetch.py\n";
        assert!(std::env::var_os("FLASHTILE_EXPECT_WEIGHTS").is_none(), "{message}");
        std::io::stderr().write_all(message.as_bytes()).expect("stderr"); // not captured, as `eprintln` is
        return None;
    }
    let mut gguf = Gguf::open().expect("the weights open");
    let tokenizer = tokenizer::load(&gguf.content).expect("the file has a tokenizer");
    Some(Loaded { model: Model::load(&mut gguf, Products::F32, |_| ()).expect("the weights load"), tokenizer })
}

impl Loaded {
    fn ids(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode_fast(text, false).expect("any text has tokens").get_ids().to_vec()
    }

    /// The most probable answer.
    fn greedy(&self, prompt: &[u32], choice: Choice, most: usize) -> Result<String> {
        let mut session = Session::new(&self.model, &choice, prompt.len() + most)?;
        let (mut logits, _) = session.feed(prompt, || ())?;
        let mut answer = Vec::new();
        while answer.len() < most {
            let token = Sampler::new(0.0, 0).choose(&logits)?;
            if token == self.model.end {
                break;
            }
            answer.push(token);
            (logits, _) = session.feed(&[token], || ())?;
        }
        Ok(self.tokenizer.decode(&answer, true).expect("tokens of the vocabulary"))
    }

    /// The logits after the prompt but for its last three tokens, and after each of these.
    fn logits(&self, prompt: &[u32], choice: Choice) -> Result<Vec<Vec<f32>>> {
        let mut session = Session::new(&self.model, &choice, prompt.len())?;
        let (first, last) = prompt.split_at(prompt.len() - 3);
        let mut all = vec![session.feed(first, || ())?.0.to_vec1()?];
        for &token in last {
            all.push(session.feed(&[token], || ())?.0.to_vec1()?);
        }
        Ok(all)
    }
}

#[test]
fn text_is_that_of_candles_attention() -> Result<()> {
    let Some(loaded) = loaded() else { return Ok(()) };
    for prompt in PROMPTS {
        let prompt = loaded.ids(&tokenizer::chat(prompt));
        let [ours, candle] =
            [Kind::Flashtile, Kind::Candle].map(|kind| loaded.greedy(&prompt, Choice::plain(kind), 60));
        let (ours, candle) = (ours?, candle?);
        assert!(ours.split_whitespace().count() > 5, "{ours:?} is no answer");
        assert_eq!(ours, candle);
    }
    Ok(())
}

/// All attentions share the rotation, so this alone shows that its pairs are those of the weights.
#[test]
fn answers_make_sense() -> Result<()> {
    let Some(loaded) = loaded() else { return Ok(()) };
    let answer = loaded.greedy(&loaded.ids("The capital of France is"), Choice::plain(Kind::Flashtile), 3)?;
    assert!(answer.contains("Paris"), "{answer:?}");
    let count = loaded.greedy(&loaded.ids("One, two, three, four, five,"), Choice::plain(Kind::Flashtile), 4)?;
    assert_eq!(count, " six, seven,");
    Ok(())
}

/// There are no exact logits to compare with. So the rule is that of FlashAttention's tests: flashtile may be twice as far from
/// the naive attention in f32 as candle's is, and a rounding of the largest logit for each layer in addition.
#[test]
fn logits_are_as_near_as_candles() -> Result<()> {
    let Some(loaded) = loaded() else { return Ok(()) };
    for text in [tokenizer::chat(PROMPTS[0]), LONG.chars().take(3000).collect()] {
        let prompt = loaded.ids(&text);
        let [ours, candle, naive] =
            [Kind::Flashtile, Kind::Candle, Kind::Naive].map(|kind| loaded.logits(&prompt, Choice::plain(kind)));
        for ((ours, candle), naive) in ours?.iter().zip(&candle?).zip(&naive?) {
            let distance = |a: &[f32]| a.iter().zip(naive).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let largest = naive.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
            let bound = 2.0 * distance(candle) + loaded.model.sizes.layers as f32 * largest * 2.0f32.powi(-24);
            assert!(largest > 1.0 && distance(ours) <= bound, "{} > {bound}, largest {largest}", distance(ours));
        }
    }
    Ok(())
}

/// To the last bit.
#[test]
fn pages_change_nothing() -> Result<()> {
    let Some(loaded) = loaded() else { return Ok(()) };
    let prompt = loaded.ids(&LONG.chars().take(2000).collect::<String>());
    for cache_type in [CacheType::F32, CacheType::F16, CacheType::Bf16] {
        let contiguous = Choice { cache_type, ..Choice::plain(Kind::Flashtile) };
        let paged = Choice { cache: CacheKind::Paged, ..contiguous };
        assert_eq!(loaded.logits(&prompt, contiguous)?, loaded.logits(&prompt, paged)?, "{cache_type:?}");
        assert_eq!(loaded.greedy(&prompt, contiguous, 30)?, loaded.greedy(&prompt, paged, 30)?, "{cache_type:?}");
    }
    Ok(())
}

/// A ring that has forgotten most of the text has the results of a cache that has all of it, and hides as much.
#[test]
fn a_ring_has_what_its_window_shows() -> Result<()> {
    let Some(loaded) = loaded() else { return Ok(()) };
    let prompt = loaded.ids(&LONG.chars().take(3000).collect::<String>());
    assert!(prompt.len() > 600, "{} tokens", prompt.len());
    let contiguous = Choice { window: Some(100), ..Choice::plain(Kind::Flashtile) };
    let rotating = Choice { cache: CacheKind::Rotating, ..contiguous };
    assert_eq!(loaded.greedy(&prompt, contiguous, 30)?, loaded.greedy(&prompt, rotating, 30)?);
    let (all, ring) = (loaded.logits(&prompt, contiguous)?, loaded.logits(&prompt, rotating)?);
    let difference = |(a, b): (&f32, &f32)| (a - b).abs();
    let largest = all.iter().flatten().zip(ring.iter().flatten()).map(difference).fold(0.0, f32::max);
    // The same sums, perhaps in another order: the ring's rows are read in two runs.
    let bound = loaded.model.sizes.layers as f32 * 30.0 * 2.0f32.powi(-24);
    assert!(largest <= bound, "{largest} > {bound}");
    Ok(())
}

#[test]
fn tokens_make_their_text_again() {
    let Some(loaded) = loaded() else { return };
    for text in [LONG, "Digits 2026 are 1 token each;\n\n\tna\u{ef}ve caf\u{e9} \u{4f60}\u{597d} \u{1f980}", ""] {
        assert_eq!(loaded.tokenizer.decode(&loaded.ids(text), false).expect("tokens of the vocabulary"), text);
    }
    assert_eq!(loaded.ids("<|im_start|>user\n<|im_end|>").len(), 4);
    assert_eq!(loaded.ids("2026").len(), 4);
}
