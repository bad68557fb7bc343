"""A decoding step from Python: one new token of 8 heads over a cache of 2 heads with 64 slots, 20 of them filled.

    cargo rustc --release --lib --features capi --crate-type cdylib
    python examples/python/example.py target/release/libflashtile.so
"""

import sys

import numpy as np

import flashtile

lib = flashtile.load(sys.argv[1])
rng = np.random.default_rng(1)
q = rng.standard_normal((1, 1, 8, 64), np.float32)  # [batch, seq, heads, dim], as a projection leaves it
cache_k, cache_v = rng.standard_normal((2, 1, 2, 64, 64)).astype(np.float16)  # [batch, heads, slots, dim]
out = np.empty_like(q)

queries, k, v = q.transpose(0, 2, 1, 3), cache_k[:, :, :20], cache_v[:, :, :20]  # views: nothing is copied
lib.attention(queries, k, v, out.transpose(0, 2, 1, 3), causal=True)

scores = np.einsum("bhid,bhjd->bhij", queries.astype(np.float64), k.repeat(4, axis=1).astype(np.float64)) / 8
exps = np.exp(scores - scores.max(-1, keepdims=True))
expected = exps / exps.sum(-1, keepdims=True) @ v.repeat(4, axis=1).astype(np.float64)
print(f"flashtile {lib.version} ({lib.level}): {lib.plan(queries, k, v, causal=True)}")
print(f"largest difference from numpy in float64: {np.abs(out.transpose(0, 2, 1, 3) - expected).max():.1e}")
