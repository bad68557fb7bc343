"""The C interface from Python, against plain numpy in float64:

    python tests/capi/test_capi.py target/release/libflashtile.so
"""

import ctypes
import sys
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "python"))
import flashtile  # noqa: E402

lib = flashtile.load(sys.argv[1])
rng = np.random.default_rng(7)


def random(*shape, dtype=np.float32):
    return rng.uniform(-1, 1, shape).astype(dtype)


def wide(x):
    return (flashtile.from_bf16(x) if isinstance(x, flashtile.bf16) else x).astype(np.float64)


def standard_slopes(heads):
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + [2.0 ** (-8 * (2 * h + 1) / (2 * power)) for h in range(heads - power)]


def reference(q, k, v, *, causal=False, scale=None, softcap=None, window=(None, None), query_offset=None, key_lengths=None,
              mask=None, bias=None, alibi=None, sinks=None, modify=None, **_how):
    """The definition: (out, lse). `modify` gets scores, positions [.., seq_q, 1] and keys [seq_kv]."""
    q, k, v = wide(q), wide(k), wide(v)
    (batch, heads, seq_q, dim), seq_kv = q.shape, k.shape[2]
    k, v = (x.repeat(heads // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bhid,bhjd->bhij", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + wide(bias)
    lengths = np.full(batch, seq_kv) if key_lengths is None else np.asarray(key_lengths)
    offset = lengths - seq_q if query_offset is None else np.broadcast_to(query_offset, batch)
    p = offset[:, None, None, None] + np.arange(seq_q)[:, None]
    j = np.arange(seq_kv)
    if alibi is not None:
        slopes = np.array(standard_slopes(heads) if alibi is True else alibi)
        scores = scores - slopes[..., None, None] * np.abs(p - j)
    if modify is not None:
        scores = modify(scores, p, j)
    sees = np.broadcast_to(j < lengths[:, None, None, None], scores.shape).copy()
    if causal:
        sees &= j <= p
    if window[0] is not None:
        sees &= j >= p - window[0]
    if window[1] is not None:
        sees &= j <= p + window[1]
    if mask is not None:
        sees &= mask != 0
    scores = np.where(sees, scores, -np.inf)
    sink = np.broadcast_to(-np.inf if sinks is None else np.asarray(sinks)[:, None, None], (*scores.shape[:3], 1))
    top = np.maximum(np.max(scores, axis=-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - top)
    sums = weights.sum(-1, keepdims=True) + np.exp(sink - top)
    with np.errstate(divide="ignore"):
        lse = (np.log(sums) + top)[..., 0]
    return (weights / np.where(sums > 0, sums, 1)) @ v, lse


def check(got, expected, unit=2.0**-24):
    """Inputs are below 1, so outputs are; 64 roundings of the result's type and a few hundred of f32's scores are plenty."""
    got = wide(got)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    infinite = np.isinf(expected)
    assert (got[infinite] == expected[infinite]).all()
    off = np.abs(got[~infinite] - expected[~infinite]).max(initial=0.0)
    assert off <= 2 * unit + 256 * 2.0**-24, f"off by {off}"


def refused(code, call, *words):
    try:
        call()
    except flashtile.Error as error:
        assert error.code == code, f"{error.code} instead of {code}: {error}"
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"not refused with {code}")


def test_options():
    sizes = [(2, 4, 2, 5, 9, 16, 16), (1, 6, 1, 40, 70, 24, 8), (2, 3, 3, 1, 600, 32, 32)]
    for batch, heads, heads_kv, seq_q, seq_kv, dim, value_dim in sizes:
        q = random(batch, heads, seq_q, dim)
        k, v = random(batch, heads_kv, seq_kv, dim), random(batch, heads_kv, seq_kv, value_dim)
        hides = random(1, 1, seq_q, seq_kv)
        hides[hides < -0.5] = -np.inf
        for case in (
            {},
            {"causal": True},
            {"scale": 0.0},
            {"scale": -1.5, "softcap": 0.75},
            {"window": (2, None)},
            {"window": (None, 0)},
            {"causal": True, "window": (3, 2), "alibi": True},
            {"alibi": [0.25 * h for h in range(heads)], "query_offset": -2},
            {"alibi": rng.random((batch, heads)).astype(np.float32)},
            {"causal": True, "query_offset": 0},
            {"causal": True, "query_offset": list(range(-1, batch - 1))},
            {"causal": True, "key_lengths": [seq_kv - 3 * b for b in range(batch)]},
            {"mask": rng.random((batch, 1, seq_q, seq_kv)) < 0.6},
            {"mask": (rng.integers(0, 3, (seq_q, seq_kv)) * 100).astype(np.uint8)},
            {"bias": random(heads, seq_q, seq_kv)},
            {"bias": hides},
            {"bias": flashtile.to_bf16(random(seq_kv))},
            {"bias": random(1, heads, 1, seq_kv, dtype=np.float16), "causal": True, "softcap": 3.0},
        ):
            expected, expected_lse = reference(q, k, v, **case)
            results = []
            for how in ({}, {"threads": 1}, {"threads": 2}, {"form": "decode"}, {"form": "prefill"}, {"level": "portable"}):
                out, lse = lib.attention(q, k, v, lse=True, **case, **how)
                check(out, expected)
                check(lse / 8, expected_lse / 8)  # of size up to 8
                results.append(out.tobytes())
            assert results[0] == results[1] == results[2], "bits depend on threads"


def test_masks_by_rule():
    batch, heads, seq_q, seq_kv = 2, 4, 33, 70
    offset = seq_kv - seq_q
    q, k, v = random(batch, heads, seq_q, 16), random(batch, 2, seq_kv, 16), random(batch, 2, seq_kv, 16)
    i, j = np.arange(seq_q)[:, None], np.arange(seq_kv)
    p = i + offset
    ids_q, ids_k = rng.integers(0, 3, (batch, seq_q)), rng.integers(0, 3, (batch, seq_kv))
    parents = [-1] + [int(rng.integers(-1, n)) for n in range(1, seq_q)]
    ancestors = np.zeros((seq_q, seq_q), bool)
    for n, parent in enumerate(parents):
        ancestors[n] = ancestors[parent] if parent >= 0 else False
        ancestors[n, n] = True
    kept = rng.random((1, heads, 5, 7)) < 0.5  # blocks of 7 queries and 10 keys
    rows = kept[0, 0]
    starts = np.concatenate(([0], np.cumsum(rows.sum(1))))
    columns = np.concatenate([np.flatnonzero(row) for row in rows])
    blocks = lambda kept: kept.repeat(7, -2).repeat(10, -1)[..., :seq_q, :]
    cases = [
        (flashtile.documents(ids_q, ids_k), (ids_q[:, :, None] == ids_k[:, None, :])[:, None]),
        (flashtile.documents(ids_q[0], ids_k[0]), ids_q[0][:, None] == ids_k[0]),
        (flashtile.prefix_lm((0, 3), (40, 60)), (j <= p) | (p >= 40) & (p < 60) & (j >= 40) & (j < 60)),
        (flashtile.chunked(9), p // 9 == j // 9),
        (flashtile.first_and_last(3, 8), (j <= p) & ((j < 3) | (j >= p - 8))),
        (flashtile.tree(parents), np.concatenate((np.ones((seq_q, offset), bool), ancestors), axis=1)),
        (flashtile.block_sparse((7, 10), kept), blocks(kept)),
        (flashtile.block_sparse_rows((7, 10), starts, columns), blocks(rows)),
        (flashtile.key_starts([5, 50]), j >= np.array([5, 50])[:, None, None, None]),
    ]
    for n, (mask, sees) in enumerate(cases):
        other, other_sees = cases[(n + 3) % len(cases)]
        for masks, sees in (([mask], sees), ([mask, other], sees & other_sees)):
            sees = np.broadcast_to(sees, (batch, heads, seq_q, seq_kv))
            expected, expected_lse = reference(q, k, v, mask=sees)
            for form in ("decode", "prefill"):
                out, lse = lib.attention(q, k, v, lse=True, masks=masks, form=form)
                check(out, expected)
                check(lse / 8, expected_lse / 8)
                dense = lib.attention(q, k, v, mask=sees, form=form)
                assert out.tobytes() == dense.tobytes(), f"bits of mask {n}"
    refused("WRONG_COUNT", lambda: lib.attention(q, k, v, masks=[flashtile.tree(parents[:-1])]), "parents")
    refused("INVALID_OPTION", lambda: lib.attention(q, k, v, masks=[flashtile.chunked(3), flashtile.Mask(9)]), "masks[1]", "9")


def test_sinks():
    q, k, v = random(2, 4, 5, 16), random(2, 2, 40, 16), random(2, 2, 40, 16)
    sinks = [0.5, -np.inf, 3.0, -2.0]
    for case in ({}, {"causal": True, "query_offset": -2}):
        expected, expected_lse = reference(q, k, v, sinks=sinks, **case)
        out, lse = lib.attention(q, k, v, lse=True, sinks=sinks, **case)
        check(out, expected)
        check(lse / 8, expected_lse / 8)
    refused("WRONG_COUNT", lambda: lib.attention(q, k, v, sinks=[1.0]), "sinks")
    refused("INVALID_OPTION", lambda: lib.attention(q, k, v, sinks=[np.inf] * 4), "sink is inf")


def t5_bucket(distance, bidirectional, count, max_distance):
    """As Hugging Face's transformers compute it; `distance` is the query's position minus the key's."""
    later = 0
    if bidirectional:
        count //= 2
        later, distance = np.where(distance < 0, count, 0), np.abs(distance)
    distance = np.maximum(distance, 0)
    exact = count // 2
    grown = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact) * (count - exact)
    return later + np.where(distance < exact, distance, np.minimum(exact + np.floor(grown + 1e-6).astype(int), count - 1))


def test_score_tables():
    heads, most = 4, 5
    q, k, v = random(2, heads, 7, 16), random(2, 2, 300, 16), random(2, 2, 300, 16)
    distances, buckets = random(heads, 2 * most + 1), random(32, heads)
    near = lambda p, j: distances[:, np.clip(p - j, -most, most)[0, 0] + most]
    of_buckets = lambda both: lambda p, j: buckets[t5_bucket((p - j)[0, 0], both, 32, 128)].transpose(2, 0, 1)
    cases = [
        (flashtile.relative_bias(distances), near),
        (flashtile.t5_bias(buckets, bidirectional=False), of_buckets(False)),
        (flashtile.t5_bias(buckets, bidirectional=True, max_distance=128), of_buckets(True)),
    ]
    for n, (table, bias) in enumerate(cases):
        other, other_bias = cases[n - 1]
        for tables, modify in (
            ([table], lambda scores, p, j: scores + bias(p, j)),
            ([table, other], lambda scores, p, j: scores + bias(p, j) + other_bias(p, j)),
        ):
            for how in ({}, {"causal": True, "alibi": True, "query_offset": 150}):
                out, lse = lib.attention(q, k, v, lse=True, score_tables=tables, **how)
                expected, expected_lse = reference(q, k, v, modify=modify, **how)
                check(out, expected)
                check(lse / 8, expected_lse / 8)

    height, width = 3, 5
    x, table = random(2, heads, height * width, 16), random((2 * height - 1) * (2 * width - 1), heads)
    y, x_of = np.divmod(np.arange(height * width), width)
    offsets = (y[:, None] - y + height - 1) * (2 * width - 1) + x_of[:, None] - x_of + width - 1
    out = lib.attention(x, x, x, score_tables=[flashtile.window_bias((height, width), table)])
    check(out, reference(x, x, x, bias=table[offsets].transpose(2, 0, 1))[0])

    refused("WRONG_COUNT", lambda: lib.attention(q, k, v, score_tables=[flashtile.relative_bias(distances[1:])]), "relative biases")
    refused("INVALID_OPTION", lambda: lib.attention(q, k, v, score_tables=[flashtile.ScoreTable(4)]), "score_tables[0]", "4")


def test_score_functions():
    def score_row(row, scores):
        assert scores.dtype == np.float32 and 0 < len(scores) <= 700 - row.first_key
        distance = row.position - row.first_key - np.arange(len(scores))
        scores -= 0.01 * (row.head + row.batch + 1) * np.abs(distance)
        scores[distance % 5 == 0] = -np.inf

    def modify(scores, p, j):
        head, batch = np.arange(4)[:, None, None], np.arange(2)[:, None, None, None]
        return np.where((p - j) % 5 == 0, -np.inf, scores - 0.01 * (head + batch + 1) * np.abs(p - j))

    for seq_q in (1, 3, 40):
        q, k, v = random(2, 4, seq_q, 16), random(2, 2, 700, 16), random(2, 2, 700, 16)
        for case in ({}, {"causal": True, "softcap": 2.0, "sinks": [0.0] * 4}):
            expected, expected_lse = reference(q, k, v, modify=modify, **case)
            for how in ({"form": "decode"}, {"form": "prefill"}, {"threads": 1}, {"threads": 3}):
                out, lse = lib.attention(q, k, v, lse=True, score_row=score_row, **case, **how)
                check(out, expected)
                check(lse / 8, expected_lse / 8)

    # An exception reaches the caller; the library goes on working. A call inside a function is a call like any other.
    def fails(row, scores):
        raise KeyError(row.head)

    try:
        lib.attention(q, k, v, score_row=fails)
    except KeyError:
        pass
    else:
        raise AssertionError("no exception")
    plain = lib.attention(q, k, v)

    def nested(row, scores):
        for threads in (0, 1, 2):
            assert lib.attention(q, k, v, threads=threads).tobytes() == plain.tobytes()
        lib.release()

    small = q[:, :, :2], k[:, :, :20], v[:, :, :20]
    assert lib.attention(*small, score_row=nested).tobytes() == lib.attention(*small, score_row=lambda row, scores: None).tobytes()


def test_threads():
    q, k, v = random(1, 8, 300, 64), random(1, 8, 300, 64), random(1, 8, 300, 64)
    assert "in the pool" in lib.plan(q, k, v), "too small for this test"
    assert "serial" in lib.plan(q, k, v, threads=1)
    expected = lib.attention(q, k, v, threads=1, causal=True).tobytes()

    def work(threads, failures):
        for _ in range(3):
            if lib.attention(q, k, v, threads=threads, causal=True).tobytes() != expected:
                failures.append(threads)
            lib.release()

    failures = []
    workers = [threading.Thread(target=work, args=(threads, failures)) for threads in (0, 1, 2, 3, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures
    assert lib.default_threads >= 1


def test_types():
    q, k, v = random(1, 4, 7, 32), random(1, 2, 50, 32), random(1, 2, 50, 32)
    kinds = {"f32": lambda x: x, "f16": lambda x: x.astype(np.float16), "bf16": flashtile.to_bf16}
    units = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
    for q_kind, as_q in kinds.items():
        for kv_kind, as_kv in kinds.items():
            inputs = as_q(q), as_kv(k), as_kv(v)
            expected, _ = reference(*inputs, causal=True)
            check(lib.attention(*inputs, causal=True), expected, units[q_kind])
            out = np.empty(q.shape, np.float32)
            check(lib.attention(*inputs, out, causal=True), expected)


def test_strides():
    batch, heads, seq, dim = 2, 3, 11, 8
    packed = random(batch, seq, 3, heads, dim)  # a packed projection: q, k and v beside each other
    q, k, v = (packed[:, :, n].transpose(0, 2, 1, 3) for n in range(3))
    out = np.full((batch, seq, heads + 1, dim + 2), 7.0, np.float32)  # with gaps that stay as they are
    view = out[:, ::-1, :heads, 1:-1].transpose(0, 2, 1, 3)
    lib.attention(q, k, v, view, causal=True)
    check(view, reference(q, k, v, causal=True)[0])
    assert (out[:, :, heads] == 7).all() and (out[..., 0] == 7).all() and (out[..., -1] == 7).all()
    turned = [x[:, ::-1, ::-1, ::-1] for x in (q, k, v)]
    check(lib.attention(*turned), reference(*turned)[0])
    one = np.broadcast_to(random(1, 1, seq, dim), (batch, heads, seq, dim))
    check(lib.attention(q, one, one), reference(q, one, one)[0])
    mask = np.broadcast_to(rng.random((seq, 1)) < 0.5, (batch, 1, seq, seq))
    check(lib.attention(q, k, v, mask=mask), reference(q, k, v, mask=mask)[0])


def test_edges():
    q, k, v = random(1, 2, 4, 8), random(1, 2, 0, 8), random(1, 2, 0, 8)
    out, lse = lib.attention(q, k, v, lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()
    assert lib.attention(q[:, :, :0], k, v).shape == (1, 2, 0, 8)
    k = random(1, 2, 6, 8)
    k[:, :, 4:] = np.nan  # padding
    out, expected = lib.attention(q, k, k, key_lengths=[4]), reference(q, k[:, :, :4], k[:, :, :4])[0]
    check(out, expected)


def test_sequences():
    """Packed, padded and in pages: the bits of each sequence alone."""
    heads, heads_kv, dim, value_dim, page = 4, 2, 16, 8, 5
    queries, keys = np.array([3, 0, 6, 1, 2]), np.array([7, 4, 6, 44, 0])
    starts_q, starts_k = (np.concatenate(([0], np.cumsum(lengths))) for lengths in (queries, keys))
    total_q, total_k, count = starts_q[-1], starts_k[-1], len(queries)
    q, k, v = random(total_q, heads, dim), random(total_k, heads_kv, dim), random(total_k, heads_kv, value_dim)
    batched = lambda x: x[None].transpose(0, 2, 1, 3)  # [1, heads, total, dim]
    rows = lambda x, starts, b: batched(x[starts[b] : starts[b + 1]])

    def padded(x, starts, lengths):
        result = np.full((count, x.shape[1], lengths.max(), x.shape[2]), np.nan, x.dtype)
        for b, length in enumerate(lengths):
            result[b, :, :length] = rows(x, starts, b)[0]
        return result

    page_counts = -(-keys // page)
    order = rng.permutation(page_counts.sum() + 2)[: page_counts.sum()]
    lists = np.split(order, np.cumsum(page_counts)[:-1])
    wide = np.full((count, page_counts.max() + 1), -1)
    for b, pages in enumerate(lists):
        wide[b, : len(pages)] = pages
    starts_p = np.concatenate(([0], np.cumsum(page_counts)))

    def pool(x):
        result = np.full((len(order) + 2, page, heads_kv, x.shape[-1]), np.nan, x.dtype)
        for b, pages in enumerate(lists):
            for j in range(keys[b]):
                result[pages[j // page], j % page] = x[starts_k[b] + j]
        return result.transpose(0, 2, 1, 3)

    paged_kv, packed_kv = (pool(k), pool(v)), (k, v)
    padded_kv = padded(k, starts_k, keys), padded(v, starts_k, keys)
    tables = [flashtile.PageTable(wide.astype(dtype), keys, page) for dtype in (np.int32, np.int64, np.int16)]
    tables += [flashtile.PageTable(order.astype(dtype), keys, page, starts_p) for dtype in (np.int32, np.int64)]
    tables.append(flashtile.PageTable(wide.tolist(), keys.tolist(), page))
    tables.append(flashtile.PageTable(np.asfortranarray(wide), keys, page))
    first = np.array([2, 0, 0, 30, 0])
    for case in (
        {},
        {"causal": True},
        {"causal": True, "form": "decode", "threads": 1},
        {"causal": True, "form": "prefill", "query_offset": 0},
        {"window": (4, 1), "softcap": 2.0},
        {"causal": True, "left": True},
    ):
        left = case.pop("left", False)
        masks = {"masks": [flashtile.key_starts(first)]} if left else {}
        out, lse = np.empty((total_q, heads, value_dim), np.float32), np.empty((heads, total_q), np.float32)
        for b in range(count):
            own = {"masks": [flashtile.key_starts(first[b : b + 1])]} if left else {}
            alone = rows(q, starts_q, b), rows(k, starts_k, b), rows(v, starts_k, b)
            got = lib.attention(*alone, lse=True, **case, **own)
            out[starts_q[b] : starts_q[b + 1]] = got[0][0].transpose(1, 0, 2)
            lse[:, starts_q[b] : starts_q[b + 1]] = got[1][0]
            if not left:
                check(got[0], reference(*alone, **case)[0])

        def same(got, got_lse):
            assert got.shape == out.shape and got_lse.shape == (1, heads, total_q)
            assert got.tobytes() == out.tobytes() and got_lse.tobytes() == lse.tobytes()

        case = {**case, **masks, "lse": True}
        same(*lib.attention(q, *packed_kv, query_starts=starts_q, key_starts=starts_k, **case))
        lists = {"query_starts": list(starts_q), "key_starts": starts_k.astype(np.int32)}
        same(*lib.attention(q, *map(batched, packed_kv), **lists, **case))
        same(*lib.attention(q, *padded_kv, query_starts=starts_q, key_lengths=keys, **case))
        for table in tables:
            same(*lib.attention(q, *paged_kv, query_starts=starts_q, pages=table, **case))
        in_batch, in_batch_lse = lib.attention(batched(q), *packed_kv, query_starts=starts_q, key_starts=starts_k, **case)
        same(np.ascontiguousarray(in_batch[0].transpose(1, 0, 2)), in_batch_lse)

        expected = padded(out, starts_q, queries)
        hows = {"key_lengths": keys}, {"key_starts": starts_k}, {"pages": tables[0]}
        for kv, how in zip((padded_kv, packed_kv, paged_kv), hows):
            got, got_lse = lib.attention(padded(q, starts_q, queries), *kv, query_lengths=queries, **how, **case)
            padding = np.isnan(expected)
            assert (got[~padding] == expected[~padding]).all() and (got[padding] == 0).all()
            assert (got_lse[padding[..., 0]] == -np.inf).all()

    # A step that is planned once for several layers, and again for another step.
    step = lib.prepare(q, *packed_kv, query_starts=starts_q, key_starts=starts_k, causal=True)
    for how, kv in ((hows[1], packed_kv), (hows[2], paged_kv), (hows[1], packed_kv)):
        for causal in (True, False):
            step.replan(q, *kv, query_starts=starts_q, causal=causal, **how)
            for layer in (1, 2):
                kv_of = [x * x.dtype.type(layer) for x in kv]
                own, own_lse = np.zeros_like(out), np.zeros((1, heads, total_q), np.float32)
                step.run(q, *kv_of, own, own_lse)
                expected, expected_lse = lib.attention(q, *kv_of, query_starts=starts_q, causal=causal, lse=True, **how)
                assert own.tobytes() == expected.tobytes() and own_lse.tobytes() == expected_lse.tobytes()
    refused("INVALID_STARTS", lambda: step.replan(q, *packed_kv, query_starts=starts_q, key_starts=starts_k * 2), "key starts")
    refused("SHAPE_MISMATCH", lambda: step.run(q, k[:, :, :-1], v, own), "head_dim")
    step.run(q, *packed_kv, own)  # as before
    assert own.tobytes() == lib.attention(q, *packed_kv, query_starts=starts_q, key_starts=starts_k).tobytes()

    # Left padding: queries and keys of each sequence in its last rows.
    def left_padded(x, starts, lengths):
        right = padded(x, starts, lengths)
        left = np.full_like(right, np.nan)
        for b, length in enumerate(lengths):
            left[b, :, left.shape[2] - length :] = right[b, :, :length]
        return left

    left = [left_padded(x, starts, n) for x, starts, n in ((q, starts_q, queries), (k, starts_k, keys), (v, starts_k, keys))]
    firsts = {"first_queries": queries.max() - queries, "first_keys": (keys.max() - keys).tolist()}
    for case in ({}, {"causal": True}, {"window": (4, 1), "query_offset": 3}):
        packed_out = lib.attention(q, *packed_kv, query_starts=starts_q, key_starts=starts_k, **case)
        got = lib.attention(*left, **firsts, **case)
        for b, length in enumerate(queries):
            own = rows(packed_out, starts_q, b)[0]
            assert got[b, :, got.shape[2] - length :].tobytes() == np.ascontiguousarray(own).tobytes()
            assert (got[b, :, : got.shape[2] - length] == 0).all()
    refused("KEY_LENGTH_PAST_END", lambda: lib.attention(*left, first_keys=keys + keys.max()), "first keys of batch 0")
    refused("NEGATIVE_SIZE", lambda: lib.attention(*left, first_queries=-1 - queries), "first queries of batch 0")
    refused("WRONG_COUNT", lambda: lib.attention(*left, first_keys=[0]), "1 first keys", "5")

    # Rows of no sequence stay as they are.
    own = np.full((total_q, heads, value_dim), 7, np.float32)
    lib.attention(q, *packed_kv, own, query_starts=[1, 3], key_starts=[0, 7])
    assert (own[0] == 7).all() and (own[3:] == 7).all() and (own[1:3] != 7).all()
    assert "kv44" in lib.plan(q, *paged_kv, query_starts=starts_q, pages=tables[0]), "the longest sequence"

    run = lambda *tensors, **kwargs: lambda: lib.attention(*tensors, **kwargs)
    packed = {"query_starts": starts_q, "key_starts": starts_k}
    refused("BAD_RANK", run(q, k, v), "queries", "packed")
    refused("WRONG_COUNT", run(q, k, v, **{**packed, "key_starts": starts_k[:-1]}), "5 key starts", "6")
    refused("INVALID_STARTS", run(q, k, v, **{**packed, "query_starts": starts_q[::-1]}), "query starts")
    refused("INVALID_STARTS", run(q, k, v, **{**packed, "key_starts": starts_k * 2}), "key starts")
    refused("INVALID_OPTION", run(q, k, v, **packed, pages=tables[0]), "key_starts and page_table")
    refused("INVALID_OPTION", run(q, k, v, **packed, query_lengths=queries), "query_lengths and query_starts")
    refused("INVALID_OPTION", run(q, k, v, **packed, key_lengths=keys), "key_lengths and key_starts")
    paged = lambda *table, **kwargs: run(q, *paged_kv, query_starts=starts_q, pages=flashtile.PageTable(*table, **kwargs))
    refused("INVALID_PAGES", paged(wide + len(order) + 2, keys, page), "but the pool has")
    refused("INVALID_PAGES", paged(wide, keys + 50, page), "length of sequence 0")
    refused("INVALID_PAGES", paged(np.full_like(wide, -1), keys, page), "a page of sequence 0", "-1")
    refused("INVALID_PAGES", paged(wide, keys, 0), "page_size of the page table is 0")
    refused("NEGATIVE_SIZE", paged(wide, -keys, page), "lengths of the page table")
    refused("SHAPE_MISMATCH", paged(wide, keys // 2, page - 1), "page_size of the keys is 5 but must be 4")
    refused("WRONG_COUNT", paged(wide[1:], keys[1:], page), "4 sequences of the page table", "5")
    refused("WRONG_COUNT", paged(wide[1:], keys, page), "entries of the page table")
    refused("INVALID_STARTS", paged(order, keys, page, starts_p[::-1]), "starts of the page table")
    refused("KEY_LENGTH_PAST_END", run(batched(q), batched(k), batched(v), query_lengths=[total_q + 1]), "query lengths")
    for wrong in (lambda: flashtile.PageTable(order, keys, page), lambda: flashtile.PageTable(wide, keys, page, starts_p)):
        try:
            wrong()
        except ValueError as error:
            assert "axes" in str(error)
        else:
            raise AssertionError("not refused")


def stored(x, dtype):
    """Numbers as a cache of this type has them, in float64."""
    return wide(flashtile.to_bf16(x) if dtype == "bf16" else np.asarray(x, dtype))


def turned(x, positions, frequencies, interleaved=False):
    """Rows [.., tokens, dim], rotated in float64."""
    x, dim = np.array(x, np.float64), 2 * len(frequencies)
    one, other = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
    angles = np.asarray(positions)[..., None] * np.asarray(frequencies)
    a, b = x[..., one].copy(), x[..., other].copy()
    x[..., one], x[..., other] = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
    return x


def test_rotary():
    frequencies = 100.0 ** (-np.arange(3) / 3)
    angles = np.arange(40)[:, None] * frequencies
    for interleaved in (False, True):
        for rotary in (
            lib.rotary(6, 40, 100.0, interleaved=interleaved),
            lib.rotary(frequencies=frequencies, positions=40, interleaved=interleaved),
            lib.rotary(tables=(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)), interleaved=interleaved),
        ):
            x = random(2, 5, 3, 8).transpose(0, 2, 1, 3)  # [batch, heads, seq, dim]
            each = rng.integers(0, 40, (2, 1, 5))
            starts = np.array([0, 35])
            for given, positions in ((7, 7 + np.arange(5)), (starts, starts[:, None, None] + np.arange(5)), (each[:, 0], each)):
                expected = turned(x, positions, frequencies, interleaved)
                out = rotary.rotate(x, given, np.empty(x.shape, np.float32))
                check(out / 2, expected / 2)
                own = x.copy()
                assert rotary.rotate(own, given) is own and (own == out).all()
    scaled = lib.rotary(frequencies=frequencies, magnitude=0.5, positions=40)
    check(scaled.rotate(random(1, 1, 1, 6) * 0, 3), np.zeros((1, 1, 1, 6)))
    x = random(4, 2, 6)  # packed tokens
    check(scaled.rotate(x.copy(), [0, 1, 2, 20]), turned(x / 2, np.array([0, 1, 2, 20])[:, None], frequencies))
    refused("POSITION_OUT_OF_RANGE", lambda: scaled.rotate(x.copy(), [0, 1, 2, 40]), "the position 40")
    refused("INVALID_OPTION", lambda: lib.rotary(5, 40), "rotary dim is 5 but must be even")


def test_caches():
    frequencies = 100.0 ** (-np.arange(4) / 4)
    rotary = lib.rotary(8, 64, 100.0)
    for dtype, unit in ((np.float32, 2.0**-24), (np.float16, 2.0**-11), ("bf16", 2.0**-8)):
        shape = {"value_dim": 5, "dtype": dtype}
        fixed = lib.kv_cache(2, 8, batch=2, capacity=30, **shape)
        rotating = lib.rotating_kv_cache(2, 8, batch=2, first=1, window=9, **shape)
        keys, values = np.zeros((2, 2, 0, 8)), np.zeros((2, 2, 0, 5))
        for n in (6, 1, 4, 1, 1, 1):
            k, v, q = random(2, 2, n, 8), random(2, 2, n, 5, dtype=np.float16), random(2, 4, n, 8)
            start = keys.shape[2]
            for cache in (fixed, rotating):
                cache.append(k, v, rotary=rotary)
                assert cache.lengths == [start + n] * 2
            keys = np.concatenate([keys, turned(k, start + np.arange(n), frequencies)], axis=2)
            values = np.concatenate([values, stored(v, dtype)], axis=2)
            rotary.rotate(q, start)
            expected, expected_lse = reference(q, stored(keys, dtype), values, causal=True)
            out, lse = lib.attention(q, cache=fixed, causal=True, lse=True)
            check(out, expected, unit)
            check(lse / 8, expected_lse / 8, unit)
            sums = lib.key_sums(q, None, None, lse, np.empty((2, 4, 30), np.float32), cache=fixed, causal=True)
            assert np.abs(sums.sum(2) - n).max() < 1e-4 and (sums[:, :, start + n :] == 0).all()
            near = lib.attention(q, cache=rotating, causal=True, window=(5, None))
            check(near, reference(q, stored(keys, dtype), values, causal=True, window=(5, None))[0], unit)
        assert lib.plan(q, cache=fixed).startswith("b2 h4/2 q1 kv30 ")
        check(wide(fixed.memory()[0])[:, :, :14], keys, 2 * unit)
        info = rotating.info
        assert (info.sequences, info.first, info.window, info.capacity, info.format.value_dim) == (2, 1, 9, 10, 5)
        fixed.truncate(1, 3)
        fixed.fork(1, 0)
        assert fixed.lengths == [3, 3]
        fixed.append(k[:1], v[:1], 1)
        assert fixed.lengths == [3, 4]
        refused("LOST_KEYS", lambda: lib.attention(q, cache=rotating, window=(9, 0)), "must keep 10")
        refused("CANNOT_TRUNCATE", lambda: rotating.truncate(0, 5))
        refused("CACHE_FULL", lambda: fixed.append(random(2, 2, 30, 8), random(2, 2, 30, 5)), "room for 30")
        refused("INVALID_OPTION", lambda: lib.attention(q, k, v, cache=fixed), "pass NULL for k and v")
        fixed.clear()
        assert fixed.lengths == [0, 0]
    refused("BAD_DTYPE", lambda: lib.kv_cache(2, 8, capacity=3, dtype=np.float64), "FLASHTILE_F64")
    refused("NULL_POINTER", lambda: lib.attention(random(1, 1, 1, 8)), "keys")


def test_paged_caches():
    layers = 2
    cache = lib.paged_kv_cache(2, 8, layers=layers, pages=12, page_size=4, dtype=np.float32)
    a, b = cache.new_sequence(), cache.new_sequence()
    tokens = {(layer, sequence): np.zeros((1, 2, 0, 8)) for layer in range(layers) for sequence in (a, b)}
    view, step = cache.view(0, [a, b]), None
    for counts in ((7, 2), (1, 3), (1, 1)):
        starts = np.concatenate([[0], np.cumsum(counts)])
        q = random(starts[-1], 4, 8)
        for sequence, n in zip((a, b), counts):
            cache.reserve(sequence, n)
        how = {"query_starts": starts, "cache": view, "causal": True}
        if step is None:
            step = lib.prepare(q, **how)
        else:
            step.replan(q, **how)
        for layer in range(layers):
            for sequence, n in zip((a, b), counts):
                x = random(1, n, 2, 8).transpose(0, 2, 1, 3)
                cache.write(layer, sequence, x, x)
                tokens[layer, sequence] = np.concatenate([tokens[layer, sequence], x], axis=2)
                assert cache.written(layer, sequence) == cache.length(sequence)
            view.layer = layer
            out = np.empty_like(q)
            step.run(q, None, None, out)
            assert (lib.attention(q, **how) == out).all()
            for n, sequence in enumerate((a, b)):
                rows, kv = slice(*starts[n : n + 2]), tokens[layer, sequence]
                expected = reference(q[None, rows].transpose(0, 2, 1, 3), kv, kv, causal=True)[0]
                check(out[rows], expected[0].transpose(1, 0, 2))
    fork = cache.fork(a)
    assert cache.pages(fork) == cache.pages(a) and len(cache.pages(a)) == 3
    assert (cache.info.shared_pages, cache.info.free_pages, cache.info.sequences) == (3, 12 - 5, 3)
    cache.reserve(b, 1)
    refused("NOT_WRITTEN", lambda: lib.attention(q[:1, :, None], cache=cache.view(0, [b])), "has 6 of the 7 tokens")
    refused("CACHE_FULL", lambda: cache.reserve(b, 40), "remove or truncate")
    refused("NOT_RESERVED", lambda: cache.write(0, a, x, x), "0 are reserved")
    cache.remove(fork)
    refused("NOT_IN_CACHE", lambda: cache.length(fork))
    one = lib.paged_kv_cache(2, 8, pages=3, page_size=4)
    sequence = one.new_sequence()
    one.append(sequence, x, x, rotary=lib.rotary(8, 8), positions=[3])
    assert one.length(sequence) == 1
    refused("WRONG_CACHE", lambda: cache.append(a, x, x), "flashtile_cache_write")


def test_key_sums():
    q, k, v = random(2, 4, 30, 8), random(2, 2, 20, 8), random(2, 2, 20, 8)
    _, lse = lib.attention(q, k, v, causal=True, lse=True)
    sums = lib.key_sums(q, k, v, lse, causal=True)
    assert sums.shape == (2, 4, 20)
    # The first 10 queries see no key.
    check(sums.sum(-1), np.full((2, 4), 20.0))
    scores = np.einsum("bhid,bhjd->bhij", q, k.repeat(2, axis=1)) / np.sqrt(8)
    visible = np.arange(20)[None, :] <= np.arange(30)[:, None] - 10
    probabilities = np.where(visible, np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None]), 0)
    check(sums, probabilities.sum(2))
    # Packed sequences: the sums of each are in a row of their own.
    starts = [0, 10, 30]
    packed = [np.ascontiguousarray(x[0].transpose(1, 0, 2)) for x in (q, q[:, :2], q[:, 2:])]
    options = dict(query_starts=starts, key_starts=starts)
    _, lse = lib.attention(*packed, lse=True, **options)
    sums = lib.key_sums(*packed, lse, np.full((2, 4, 20), 7, np.float32), **options)
    check(sums.sum(-1), np.repeat([[10.0], [20.0]], 4, axis=1))
    assert (sums[0, :, 10:] == 0).all()


def test_merge():
    q, k, v = random(1, 2, 3, 8), random(1, 2, 20, 8), random(1, 2, 20, 8)
    (out, lse), other = (lib.attention(q, k[:, :, part], v[:, :, part], lse=True) for part in (slice(0, 7), slice(7, 20)))
    lib.merge(out, lse, *other)
    expected, expected_lse = reference(q, k, v)
    check(out, expected)
    check(lse, expected_lse)


def softmax_of(x, axis, scale, log):
    scores = scale * (wide(x) - wide(x).max(axis, keepdims=True))
    sums = np.exp(scores).sum(axis, keepdims=True)
    return scores - np.log(sums) if log else np.exp(scores) / sums


def test_softmax():
    views = {
        "dense": lambda x: x,
        "turned": lambda x: x[::-1, :, ::-1],
        "transposed": lambda x: x.transpose(2, 0, 3, 1),
        "sliced": lambda x: x[:, 1:, :, ::2],
        "first rows": lambda x: x[:, :, :3],
    }
    for dtype, unit in ((np.float32, 2.0**-24), (np.float16, 2.0**-11), (np.float64, 2.0**-24)):
        for name, view in views.items():
            x = view(random(3, 4, 5, 34, dtype=dtype))
            for axis in range(-4, 4):
                for log in (False, True):
                    function = lib.log_softmax if log else lib.softmax
                    expected = softmax_of(x, axis, 0.5, log)
                    y = function(x, axis=axis, scale=0.5)
                    check(y / 4, expected / 4, unit)
                    dense = function(np.ascontiguousarray(x), axis=axis, scale=0.5)
                    assert np.ascontiguousarray(y).tobytes() == dense.tobytes(), f"bits of {name}, axis {axis}"
                    own = view(np.zeros((3, 4, 5, 34), dtype))
                    own[...] = x
                    function(own, own, axis=axis, scale=0.5)
                    assert (own == y).all(), f"in place: {name}, axis {axis}"

                    dy = view(random(3, 4, 5, 34, dtype=dtype))
                    backward = lib.log_softmax_backward if log else lib.softmax_backward
                    dx = backward(y, dy, axis=axis, scale=0.5)
                    wide_y, wide_dy = wide(y), wide(dy)
                    if log:
                        expected = 0.5 * (wide_dy - np.exp(wide_y) * wide_dy.sum(axis, keepdims=True))
                    else:
                        expected = 0.5 * wide_y * (wide_dy - (wide_dy * wide_y).sum(axis, keepdims=True))
                    check(dx / 4, expected / 4, unit)
                    backward(y, dy, dy, axis=axis, scale=0.5)
                    assert (dy == dx).all()
    x = random(9)
    check(lib.softmax(x), softmax_of(x, 0, 1, False))
    bits = flashtile.to_bf16(random(4, 9))
    out = flashtile.bf16(np.empty((4, 9), np.uint16))
    lib.softmax(bits, out)
    check(out, softmax_of(flashtile.from_bf16(bits), -1, 1, False), 2.0**-8)


def test_masked_softmax():
    views = (lambda x: x, lambda x: x.transpose(2, 0, 3, 1)[:, ::-1])
    for dtype, unit in ((np.float32, 2.0**-24), (np.float16, 2.0**-11), (np.float64, 2.0**-24)):
        for view in views:
            x = view(random(3, 4, 5, 34, dtype=dtype))
            mask, bias = rng.random(x.shape) < 0.7, random(*x.shape[2:])
            for how in ({"mask": mask}, {"bias": bias}, {"mask": mask[:1, :, :, :1], "bias": bias.astype(np.float16)}):
                scores = 0.5 * wide(x) + wide(how.get("bias", np.float32(0)))
                scores = np.where(how.get("mask", True), scores, -np.inf)
                for axis in range(-4, 4):
                    top = np.maximum(scores.max(axis, keepdims=True), -1e300)
                    sums = np.exp(scores - top).sum(axis, keepdims=True)
                    with np.errstate(divide="ignore"):
                        lse = top + np.log(sums)
                    expected = np.where(sums > 0, np.exp(scores - top) / np.where(sums > 0, sums, 1), 0)
                    y = lib.softmax(x, axis=axis, scale=0.5, **how)
                    check(y / 4, expected / 4, unit)
                    own = view(np.zeros((3, 4, 5, 34), dtype))
                    own[...] = x
                    lib.softmax(own, own, axis=axis, scale=0.5, **how)
                    assert (own == y).all(), f"in place, axis {axis}"
                    seen = np.isfinite(scores)
                    logs = lib.log_softmax(x, axis=axis, scale=0.5, **how)
                    check(np.where(seen, logs, 0) / 16, np.where(seen, scores - np.where(sums > 0, lse, 0), 0) / 16, unit)
                    assert (logs[~seen] == -np.inf).all()
                    got = lib.logsumexp(x, axis=axis, scale=0.5, **how)
                    some = np.isfinite(lse)
                    assert (got[~some] == -np.inf).all()
                    check(np.where(some, got, 0) / 8, np.where(some, lse, 0) / 8)
    bits = flashtile.to_bf16(random(4, 9))
    check(lib.softmax(bits, np.empty((4, 9), np.float32), mask=np.ones(9, bool)), softmax_of(flashtile.from_bf16(bits), -1, 1, False))
    refused("NOT_BROADCASTABLE", lambda: lib.softmax(random(2, 3), mask=np.ones((3, 2), bool)), "mask")


def test_logsumexp():
    for dtype, unit in ((np.float32, 2.0**-24), (np.float16, 2.0**-24), (np.float64, 2.0**-24)):
        x = random(3, 4, 5, 34, dtype=dtype).transpose(2, 0, 3, 1)[:, ::-1]
        for axis in range(-4, 4):
            lse = lib.logsumexp(x, axis=axis, scale=0.5)
            check(lse / 4, np.log(np.exp(0.5 * wide(x)).sum(axis, keepdims=True)) / 4, unit)
    x = random(4, 9).astype(np.float16)
    check(lib.softmax(x, np.empty((4, 9), np.float32)), softmax_of(x, -1, 1, False))
    bits = flashtile.to_bf16(random(4, 9))
    assert lib.softmax(bits).bits.shape == (4, 9)
    check(lib.logsumexp(bits)[:, 0], np.log(np.exp(wide(bits)).sum(-1)))


def cross_entropy_of(logits, targets, axis, weight, ignore_index, reduction, smoothing):
    """PyTorch's definition."""
    logits = np.moveaxis(wide(logits), axis, -1)
    logs = softmax_of(logits, -1, 1, True)
    weight = np.ones(logits.shape[-1]) if weight is None else np.asarray(weight, np.float64)
    seen = targets != ignore_index
    safe = np.where(seen, targets, 0)
    own = weight[safe] * -np.take_along_axis(logs, safe[..., None], -1)[..., 0]
    loss = np.where(seen, (1 - smoothing) * own + smoothing / logits.shape[-1] * (-logs * weight).sum(-1), 0)
    return loss if reduction == "none" else loss.sum() / (weight[safe] * seen).sum() if reduction == "mean" else loss.sum()


def test_cross_entropy():
    for dtype in (np.float32, np.float16, np.float64):
        logits = (4 * random(3, 6, 5, 4, dtype=dtype)).astype(dtype).transpose(0, 2, 1, 3)
        for axis in (1, 2, -1):
            targets = rng.integers(0, logits.shape[axis], np.delete(logits.shape, axis))
            targets[0, 1] = -100
            for weight in (None, rng.uniform(0, 2, logits.shape[axis]).astype(np.float32)):
                for smoothing in (0.0, 0.1, 1.0):
                    for reduction in ("none", "mean", "sum"):
                        how = dict(axis=axis, weight=weight, reduction=reduction, label_smoothing=smoothing)
                        of = lambda x: cross_entropy_of(x, targets, axis, weight, -100, reduction, smoothing)
                        loss = lib.cross_entropy(logits, targets, **how)
                        check(np.asarray(loss) / 256, of(logits) / 256)
                        # The gradient along one direction, by differences.
                        upstream = np.float32(0.5) if reduction != "none" else random(*targets.shape)
                        gradient = wide(lib.cross_entropy_backward(logits, targets, upstream, **how))
                        step = random(*logits.shape, dtype=np.float64)
                        at = lambda h: (of(wide(logits) + h * step) * upstream).sum()
                        slope, expected = (gradient * step).sum(), (at(1e-5) - at(-1e-5)) / 2e-5
                        bound = 2.0**-10 if dtype == np.float16 else 1e-5
                        assert abs(slope - expected) <= bound * (1 + np.abs(gradient * step).sum()), (slope, expected)
    refused("CLASS_OUT_OF_RANGE", lambda: lib.cross_entropy(random(2, 3), [0, 3]), "row 1 has class 3")
    refused("INVALID_OPTION", lambda: lib.cross_entropy(random(2, 3), [0, 1], label_smoothing=1.5), "1.5")


def test_errors():
    q, k, v = random(2, 4, 3, 8), random(2, 2, 5, 8), random(2, 2, 5, 8)
    run = lambda *args, **kwargs: lambda: lib.attention(*(args or (q, k, v)), **kwargs)
    refused("SHAPE_MISMATCH", run(q, k[..., :7], v), "head_dim of the keys is 7 but must be 8")
    refused("HEADS_NOT_DIVISIBLE", run(q[:, :3], k, v), "3 query heads")
    refused("BAD_DTYPE", run(q.astype(np.float64), k, v), "queries")
    refused("BAD_DTYPE", run(q.astype(np.int32), k, v), "0 is no dtype")
    refused("BAD_DTYPE", run(q, k, v, mask=np.ones((1, 1, 1, k.shape[2]), np.int64)), "FLASHTILE_BYTE")
    refused("BAD_RANK", run(q, k[0], v), "rank of the keys is 3")
    refused("OVERLAP", run(q, k, v, q), "output", "queries")
    refused("OVERLAPPING_OUTPUT", run(q, k, v, np.lib.stride_tricks.as_strided(np.empty(8, np.float32), q.shape, (0, 0, 0, 4))))
    refused("WRONG_COUNT", run(key_lengths=[1]), "1 key lengths were given but there must be 2")
    refused("KEY_LENGTH_PAST_END", run(key_lengths=[1, 6]), "batch 1 are 6")
    refused("NEGATIVE_SIZE", run(key_lengths=[1, -1]), "-1")
    refused("NOT_BROADCASTABLE", run(mask=np.ones((3, 4), bool)), "seq_kv of the mask is 4")
    refused("BAD_DTYPE", run(mask=random(3, 5)), "mask")
    refused("BAD_DTYPE", run(bias=np.ones((3, 5), bool)), "bias")
    refused("INVALID_OPTION", run(softcap=-1.0), "softcap is -1")
    refused("INVALID_OPTION", run(threads=-1), "threads is -1")
    refused("LEVEL_UNAVAILABLE", run(level="nonsense"), "nonsense", "portable")
    refused("AXIS_OUT_OF_RANGE", lambda: lib.softmax(q, axis=4), "axis 4")
    refused("AXIS_OUT_OF_RANGE", lambda: lib.softmax(q, axis=-5), "axis -5")
    refused("SHAPE_MISMATCH", lambda: lib.softmax(q, k), "[2, 2, 5, 8]", "[2, 4, 3, 8]")
    refused("OVERLAP", lambda: lib.softmax(q[:, :3], q[:, 1:]))
    refused("OVERLAP", lambda: lib.merge(q, np.zeros((2, 4, 3), np.float32), q, np.zeros((2, 4, 3), np.float32)))
    small = flashtile.options(causal=True)
    small.struct_size = 8
    tensors = [ctypes.byref(flashtile.describe(x)) for x in (q, k, v, np.empty_like(q))]
    refused("BAD_STRUCT_SIZE", lambda: lib._call("attention", *tensors, None, ctypes.byref(small)), "struct_size is 8")
    refused("NULL_POINTER", lambda: lib._call("attention", None, *tensors[1:], None, None), "queries")


for name, test in list(globals().items()):
    if name.startswith("test_"):
        test()
        print(f"{name}: ok")
