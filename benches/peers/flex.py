"""flashtile's masks and score options against torch's flex_attention under torch.compile, on one thread.

    cargo rustc --release --lib --features capi --crate-type cdylib
    python benches/peers/flex.py

Each row's result is compared with the other's before it is timed. A compiler (g++) is needed by torch. The first call of each
function compiles it; its time is shown apart.
"""

import argparse
import os
import pathlib
import sys
import time

import numpy as np

from compare import BUILD, PAUSE, ROOT, flashtile

ROUNDS = 5


def rows(torch, block_mask):
    """Name, shape, what flex_attention takes, what flashtile takes."""
    long, short, heads = 8192, 2048, 8
    document = torch.arange(short) // 128
    slopes = torch.tensor([2.0 ** -(h + 1) for h in range(heads)])
    kept = np.random.default_rng(1).random((64, 64)) < 0.1
    kept[:, 0] = True  # no query without a key, where the two differ
    kept_there = torch.from_numpy(kept)
    ids = np.arange(short, dtype=np.int64) // 128
    yield (
        "document",
        (1, heads, short, 64),
        lambda: {"block_mask": block_mask(lambda b, h, i, j: document[i] == document[j], None, None, short, short, device="cpu")},
        {"masks": [flashtile.documents(ids, ids)]},
    )
    yield (
        "block_sparse",
        (1, 1, long, 64),
        lambda: {"block_mask": block_mask(lambda b, h, i, j: kept_there[i // 128, j // 128], None, None, long, long, device="cpu")},
        {"masks": [flashtile.block_sparse((128, 128), kept)]},
    )
    yield (
        "alibi",
        (1, heads, short, 64),
        lambda: {"score_mod": lambda s, b, h, i, j: s - slopes[h] * (i - j).abs()},
        {"alibi": slopes.numpy()},
    )
    yield (
        "softcap",
        (1, heads, short, 64),
        lambda: {"score_mod": lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0)},
        {"softcap": 30.0},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", dest="path", default=str(ROOT / "target/release/libflashtile.so"), metavar="PATH")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    if not pathlib.Path(arguments.path).exists():
        sys.exit(f"{arguments.path} is missing; build it with\n    {BUILD}\nor name another with --library PATH")
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    crate = flashtile.load(arguments.path)
    print(f"flashtile {crate.version} ({crate.level}), torch {torch.__version__}, {arguments.threads} threads\n")
    print(f"{'row':<14} {'flashtile':>11} {'flex':>11} {'ratio':>7} {'to compile':>11}")
    for name, shape, of_torch, options in rows(torch, create_block_mask):
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention)
        q, k, v = (np.random.default_rng(n).standard_normal(shape, np.float32) for n in range(3))
        tensors, of_torch = [torch.from_numpy(x) for x in (q, k, v)], of_torch()
        start = time.perf_counter()
        theirs = compiled(*tensors, **of_torch).numpy()
        compile_time = time.perf_counter() - start
        ours = crate.attention(q, k, v, threads=arguments.threads, **options)
        assert np.abs(ours - theirs).max() < 1e-4, f"{name}: the results differ by {np.abs(ours - theirs).max()}"
        best = [float("inf")] * 2
        calls = [
            lambda: crate.attention(q, k, v, threads=arguments.threads, **options),
            lambda: compiled(*tensors, **of_torch),
        ]
        for _ in range(ROUNDS):
            for n, call in enumerate(calls):
                time.sleep(PAUSE)
                start = time.perf_counter()
                call()
                best[n] = min(best[n], time.perf_counter() - start)
        print(f"{name:<14} {best[0] * 1e3:8.2f} ms {best[1] * 1e3:8.2f} ms {best[1] / best[0]:7.2f} {compile_time:9.1f} s")


if __name__ == "__main__":
    main()
