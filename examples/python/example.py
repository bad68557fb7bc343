"""Decoding steps from Python: one new token of 8 heads over a cache of 2 heads with 64 slots, 20 of them filled; then a step of
a server, with sequences of their own lengths over pages.

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

# A prompt of 5 tokens and two decoding steps in one call, over a pool of 9 pages of 16 keys that the sequences share.
pool_k, pool_v = rng.standard_normal((2, 9, 16, 2, 64)).astype(np.float16)  # [pages, page_size, heads, dim]
k, v = pool_k.transpose(0, 2, 1, 3), pool_v.transpose(0, 2, 1, 3)  # [pages, heads, page_size, dim]
block_table = np.array([[4, -1, -1], [0, 7, 2], [4, 8, -1]], np.int32)  # sequences 0 and 2 have a page in common
pages = flashtile.PageTable(block_table, lengths=[5, 37, 20], page_size=16)
q = rng.standard_normal((7, 8, 64), np.float32)  # [total, heads, dim]
out = lib.attention(q, k, v, query_starts=[0, 5, 6, 7], pages=pages, causal=True)

one = [np.concatenate(pool[[0, 7, 2]])[:37].transpose(1, 0, 2)[None] for pool in (pool_k, pool_v)]  # sequence 1, gathered
alone = lib.attention(q[5:6, :, None].transpose(2, 1, 0, 3), *one, causal=True)
print(f"the same bits as alone, from gathered pages: {(out[5] == alone[0, :, 0]).all()}")
