"""flashtile's C library against vLLM's CPU attention kernel on steps of a server: a pool of pages, one token or a part of a prompt for
each sequence.

    cargo rustc --release --lib --features capi --crate-type cdylib
    python benches/peers/serving.py --kernel DIR/vllm/_C.abi3.so

README.md beside this file says how to get the kernel. Both read the same pages of the same numbers by the same tables. vLLM's kernel
keeps keys in an order of its own inside a page; it is handed a pool in that order, written by its own function. What each needs to
know of a step (vLLM's schedule, flashtile's options) is made beforehand. Each result is compared with the definition in f64 for one
sequence, and with the other result.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

import numpy as np

from compare import BUILD, PAUSE, ROOT, flashtile, timed

HEADS_Q, HEADS_KV, DIM = 32, 8, 128
SAMPLE_SECONDS = 10e-3
# A bf16 result has 8 bits. Both round it once; vLLM also rounds probabilities.
TOLERANCE = 2.0**-7


def steps():
    """Name, queries of each sequence, keys of each sequence."""
    rng = np.random.default_rng(3)
    yield "decode 8192", [1], [8192]
    keys = [int(n) for n in rng.integers(1000, 8001, 32)]
    yield "28 decodes, 4 parts of 256", [1 if b % 8 else 256 for b in range(32)], keys


class Step:
    """The arrays of a step."""

    def __init__(self, queries, keys, page):
        rng = np.random.default_rng(20261130)
        self.queries, self.keys, self.page = queries, keys, page
        counts = [-(-n // page) for n in keys]
        order = rng.permutation(sum(counts)).astype(np.int32)
        self.table = np.zeros((len(keys), max(counts)), np.int32)
        for b, count in enumerate(counts):
            self.table[b, :count], order = order[:count], order[count:]
        self.starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        numbers = lambda *shape: flashtile.to_bf16(rng.standard_normal(shape, np.float32))
        self.q = numbers(sum(queries), HEADS_Q, DIM)
        pool = (sum(counts), HEADS_KV, page, DIM)
        self.k, self.v = numbers(*pool), numbers(*pool)

    def rows(self, x, b):
        """Keys or values of sequence b in f64, [heads, keys, dim]."""
        used = flashtile.from_bf16(flashtile.bf16(x.bits[self.table[b, : -(-self.keys[b] // self.page)]]))
        rows = used.transpose(1, 0, 2, 3).reshape(HEADS_KV, -1, DIM)
        return rows[:, : self.keys[b]].astype(np.float64)

    def expected(self, b):
        """The output of the last query of sequence b, [heads, dim]."""
        q = flashtile.from_bf16(flashtile.bf16(self.q.bits[self.starts[b + 1] - 1])).astype(np.float64)
        k, v = (np.repeat(self.rows(x, b), HEADS_Q // HEADS_KV, axis=0) for x in (self.k, self.v))
        scores = np.einsum("hd,hjd->hj", q, k) / np.sqrt(DIM)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.einsum("hj,hjd->hd", weights / weights.sum(axis=1, keepdims=True), v)


def ours(crate, step, threads):
    out = flashtile.bf16(np.zeros(step.q.bits.shape, np.uint16))
    pages = flashtile.PageTable(step.table, np.array(step.keys, np.int64), step.page)
    options = flashtile.options(causal=True, query_starts=step.starts.astype(np.int64), pages=pages, threads=threads)
    tensors = [flashtile.describe(x) for x in (step.q, step.k, step.v, out)]
    arguments = [*map(flashtile.byref, tensors), None, flashtile.byref(options)]
    return lambda: crate._call("attention", *arguments), lambda: flashtile.from_bf16(out)


def theirs(torch, step):
    tensor = lambda x: torch.from_numpy(x.bits.view(np.int16)).view(torch.bfloat16)
    q, lengths = tensor(step.q), torch.tensor(step.keys, dtype=torch.int32)
    starts, table = torch.from_numpy(step.starts), torch.from_numpy(step.table)
    pool = torch.zeros(step.k.bits.shape[0], HEADS_KV, 2 * step.page, DIM, dtype=torch.bfloat16)
    keys, values = pool.chunk(2, dim=2)
    slots = torch.arange(step.k.bits.shape[0] * step.page)
    flat = lambda x: tensor(x).transpose(1, 2).reshape(-1, HEADS_KV, DIM).contiguous()
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec" if step.page % 32 == 0 else "vec16"
    kernel = torch.ops._C
    kernel.cpu_attn_reshape_and_cache(flat(step.k), flat(step.v), keys, values, slots, isa, 1.0, 1.0, "auto")
    schedule = kernel.get_scheduler_metadata(
        len(step.keys), HEADS_Q, HEADS_KV, DIM, lengths, torch.bfloat16, starts, True, -1, isa, True, None, "auto"
    )
    out = torch.zeros_like(q)

    def call():
        kernel.cpu_attention_with_kv_cache(
            q, keys, values, out, starts, lengths, DIM**-0.5, True, None, -1, table, 0.0, schedule, None, None, 1.0, 1.0, "auto"
        )

    return call, lambda: out.float().numpy()


def compare(name, step, contestants, rounds):
    times, results = {who: [] for who in contestants}, {}
    expected = step.expected(len(step.keys) - 1)
    for who, (call, result) in contestants.items():
        call()
        results[who] = result()
        error = np.abs(results[who][-1] - expected).max()
        if not error <= TOLERANCE * max(1.0, np.abs(expected).max()):
            sys.exit(f"{name}: {who} differs from the definition by {error:.1e}")
    first, second = results.values()
    if not np.abs(first - second).max() <= 2 * TOLERANCE * max(1.0, np.abs(first).max()):
        sys.exit(f"{name}: the results differ")
    for done in range(rounds):
        for who in list(contestants)[:: 1 if done % 2 else -1]:
            call, _ = contestants[who]
            time.sleep(PAUSE)
            call()
            times[who].append(timed(call, max(1, round(SAMPLE_SECONDS / timed(call, 1)))))
    best = {who: min(samples) * 1e3 for who, samples in times.items()}
    medians = {who: statistics.median(samples) * 1e3 for who, samples in times.items()}
    cells = [f"{best[who]:.2f} ms ({medians[who]:.2f})" for who in contestants]
    print(f"| {name} | {step.page} | {' | '.join(cells)} | {best['vLLM'] / best['flashtile']:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", required=True, metavar="PATH", help="vLLM's library with the kernel")
    parser.add_argument("--library", dest="path", default=str(ROOT / "target/release/libflashtile.so"), metavar="PATH")
    parser.add_argument("--threads", type=int, default=1, help="of each (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default 15)")
    parser.add_argument("--pages", default="16,32,64,256", help="keys of a page, one or several (default 16,32,64,256)")
    arguments = parser.parse_args()
    if not pathlib.Path(arguments.path).exists():
        sys.exit(f"{arguments.path} is missing; build it with\n    {BUILD}")
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    torch.ops.load_library(arguments.kernel)
    crate = flashtile.load(arguments.path)
    print(f"flashtile {crate.version} ({crate.level}), torch {torch.__version__}, threads: {arguments.threads}\n")
    print("| step | page | flashtile, best (median) | vLLM | vLLM's time divided by flashtile's |")
    print("|---|---:|---:|---:|---:|")
    for name, queries, keys in steps():
        for page in map(int, arguments.pages.split(",")):
            step = Step(queries, keys, page)
            compare(name, step, {"flashtile": ours(crate, step, 0), "vLLM": theirs(torch, step)}, arguments.rounds)


if __name__ == "__main__":
    main()
