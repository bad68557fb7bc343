"""flashtile against torch and onnxruntime on the same arrays; README.md beside this file says how and how fairly.

    cargo rustc --release --lib --features capi --crate-type cdylib
    python benches/peers/compare.py --csv peers.csv --png docs/img/peers.png --markdown
"""

import argparse
import csv
import ctypes
import datetime
import math
import os
import pathlib
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "examples" / "python"))

import flashtile  # noqa: E402

BUILD = "cargo rustc --release --lib --features capi --crate-type cdylib"
ROW_SECONDS = 4.0  # what the rounds of one row may take together; MIN_ROUNDS are measured all the same
MIN_ROUNDS = 3
SAMPLE_SECONDS = 2e-3  # shorter calls are repeated until a sample lasts so long
PAUSE = 0.02  # before each turn: a pool whose threads still spin for more work would slow the next contestant
SAMPLED_ROWS = 32
ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
COLUMNS = "workload type contestant detail threads best_ms median_ms paused_ms ratio max_error tolerance note".split()
PEERS = ("torch", "onnxruntime", "candle", "burn-flex")


class Lacks(Exception):
    """Why a contestant has no answer to a workload."""


# ---------------------------------------------------------------------------------------------------------- workloads


@dataclass
class Workload:
    name: str
    dtype: str
    batch: int
    heads_q: int
    heads_kv: int
    seq_q: int
    seq_kv: int
    dim: int
    option: str

    @property
    def title(self):
        return f"{self.name} {self.dtype}"

    def problem(self):
        return Problem(self)

    @property
    def causal(self):
        return self.option == "causal" or self.window is not None

    @property
    def window(self):
        """How many keys before its own a query sees."""
        return int(self.option.split()[1]) if self.option.startswith("window") else None


def workloads():
    with open(HERE / "workloads.csv", newline="") as file:
        for line in csv.DictReader(file):
            sizes = [int(line[n]) for n in ("batch", "heads_q", "heads_kv", "seq_q", "seq_kv", "dim")]
            for dtype in line["types"].split():
                yield Workload(line["name"], dtype, *sizes, line["option"])


@dataclass
class SoftmaxWorkload:
    """Softmax of a matrix along one of its axes."""

    name: str
    dtype: str
    shape: tuple
    axis: int

    @property
    def title(self):
        return f"{self.name} {self.dtype}"

    def problem(self):
        return SoftmaxProblem(self)


def softmax_workloads():
    """Those of the roofline bench."""
    square, short = (4096, 4096), 10 << 20  # elements of short rows
    rows = [
        ("softmax_last", square, 1, "f32 bf16"),
        ("softmax_first", square, 0, "f32 bf16"),
        ("softmax_vocab_128256", ((1 << 24) // 128256, 128256), 1, "f32 bf16"),
        ("softmax_short_10", (short // 10, 10), 1, "f32 f16 bf16"),
        ("softmax_short_100", (short // 100, 100), 1, "f32 f16 bf16"),
    ]
    for name, shape, axis, dtypes in rows:
        for dtype in dtypes.split():
            yield SoftmaxWorkload(name, dtype, shape, axis)


class Problem:
    """A workload with its arrays, what is right for some of its rows, and how far from that an answer may be."""

    def __init__(self, workload):
        self.workload = w = workload
        rng = np.random.default_rng(20261123)
        normal = lambda *shape: rng.standard_normal(shape, np.float32)
        self.q = typed(normal(w.batch, w.heads_q, w.seq_q, w.dim), w.dtype)
        self.k = typed(normal(w.batch, w.heads_kv, w.seq_kv, w.dim), w.dtype)
        self.v = typed(normal(w.batch, w.heads_kv, w.seq_kv, w.dim), w.dtype)
        self.mask = rng.random((1, 1, w.seq_q, w.seq_kv), np.float32) >= 1 / 8 if w.option == "mask" else None
        self.bias = normal(1, w.heads_q, w.seq_q, w.seq_kv) if w.option == "bias" else None
        ends = [(0, 0, 0), (w.batch - 1, w.heads_q - 1, w.seq_q - 1)]
        limits = (w.batch, w.heads_q, w.seq_q)
        self.rows = ends + [tuple(rng.integers(limits)) for _ in range(SAMPLED_ROWS - len(ends))]
        self.expected, self.tolerance = map(np.array, zip(*map(self._row, self.rows)))

    def sees(self):
        """What a causal order, a window or a mask shows, as a tensor, for those who have to be told so."""
        w = self.workload
        if not w.causal:
            return self.mask
        place, keys = np.arange(w.seq_q)[:, None] + w.seq_kv - w.seq_q, np.arange(w.seq_kv)[None, :]
        sees = keys <= place
        if w.window is not None:
            sees &= keys >= place - w.window
        return sees[None, None]

    def _row(self, at):
        """A row of the output by the definition, in f64, and by how much an honest answer may differ."""
        (b, h, i), w = at, self.workload
        group = w.heads_q // w.heads_kv
        q, k, v = wide(self.q, (b, h, i)), wide(self.k, (b, h // group)), wide(self.v, (b, h // group))
        scores = k @ q / np.sqrt(w.dim)
        if self.bias is not None:
            scores = scores + self.bias[0, h, i]
        place, keys = i + w.seq_kv - w.seq_q, np.arange(w.seq_kv)
        sees = np.ones(w.seq_kv, bool) if self.mask is None else self.mask[0, 0, i]
        if w.causal:
            sees = sees & (keys <= place)
        if w.window is not None:
            sees = sees & (keys >= place - w.window)
        scores = np.where(sees, scores, -np.inf)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        # Scores that are sums in f32 are off by at most `score`, so weights by about twice that in proportion; weights and
        # outputs may be rounded to the type; sums over keys are in f32.
        score = w.dim * ROUNDOFF["f32"] * (np.abs(k) @ np.abs(q)).max() / np.sqrt(w.dim)
        relative = 2 * score + w.seq_kv * ROUNDOFF["f32"] + 2 * ROUNDOFF[w.dtype]
        return weights @ v, relative * (weights @ np.abs(v))

    def judge(self, rows):
        return judged(rows, self.expected, self.tolerance)


class SoftmaxProblem:
    """As Problem, for a softmax; `rows` are lines along the axis."""

    def __init__(self, workload):
        self.workload = w = workload
        rng = np.random.default_rng(20261123)
        self.x = typed(rng.standard_normal(w.shape, np.float32), w.dtype)
        lines = w.shape[1 - w.axis]
        self.rows = [0, lines - 1, *rng.integers(lines, size=SAMPLED_ROWS - 2)]
        weights = np.exp(self.sampled(self.x))
        self.expected = weights / weights.sum(axis=1, keepdims=True)
        # Sums are in f32, and so are exponentials, of differences that are rounded. Exponentials and results may be rounded to
        # the type, whose smallest step is 2^-24 in f16.
        relative = (w.shape[w.axis] + 32) * ROUNDOFF["f32"] + 2 * ROUNDOFF[w.dtype]
        self.tolerance = relative * self.expected + (2.0**-24 if w.dtype == "f16" else 0)

    def sampled(self, x):
        """The sampled lines of x in f64, one a row."""
        if self.workload.axis == 1:
            return wide(x, self.rows)
        return wide(x, (slice(None), self.rows)).T

    def judge(self, rows):
        return judged(rows, self.expected, self.tolerance)


def typed(x, dtype):
    return {"f32": lambda: x, "f16": lambda: x.astype(np.float16), "bf16": lambda: flashtile.to_bf16(x)}[dtype]()


def zeros(shape, dtype):
    return flashtile.bf16(np.zeros(shape, np.uint16)) if dtype == "bf16" else typed(np.zeros(shape, np.float32), dtype)


def judged(rows, expected, tolerance):
    """The largest error of the sampled rows, and the largest in proportion to what is tolerated."""
    error = np.abs(rows - expected)
    error[np.isnan(error)] = np.inf
    return error.max(), (error / tolerance).max()


def wide(x, at):
    """A part of an array in f64."""
    part = flashtile.from_bf16(flashtile.bf16(x.bits[at])) if isinstance(x, flashtile.bf16) else x[at]
    return part.astype(np.float64)


# -------------------------------------------------------------------------------------------------------- contestants


class Flashtile:
    name = "flashtile"

    def __init__(self, path, threads):
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the pool that options.threads = 0 means, made by the first call
        self.crate = flashtile.load(path)

    @property
    def about(self):
        return f"flashtile {self.crate.version} ({self.crate.level})"

    def prepare(self, p):
        """The call's descriptions made once: what a program that calls it in a loop would do."""
        if isinstance(p, SoftmaxProblem):
            return self.softmax(p)
        w, shape = p.workload, (p.workload.batch, p.workload.heads_q, p.workload.seq_q, p.workload.dim)
        out = zeros(shape, w.dtype)
        options = flashtile.options(
            causal=w.causal, window=(w.window, None), mask=p.mask, bias=p.bias, threads=0
        )
        tensors = [flashtile.describe(x) for x in (p.q, p.k, p.v, out)]
        arguments = [flashtile.byref(x) for x in tensors] + [None, flashtile.byref(options)]

        def call(_kept=(p, out)):  # a description keeps what it describes no more alive than a pointer does
            self.crate._call("attention", *arguments)

        return call, lambda: np.stack([wide(out, at) for at in p.rows]), ""

    def softmax(self, p):
        out = zeros(p.workload.shape, p.workload.dtype)
        tensors = [flashtile.describe(x) for x in (p.x, out)]
        arguments = [*map(flashtile.byref, tensors), ctypes.c_int32(p.workload.axis), ctypes.c_double(1)]

        def call(_kept=(p, out)):
            self.crate._call("softmax", *arguments)

        return call, lambda: p.sampled(out), ""


class Torch:
    name = "torch"

    def __init__(self, threads):
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    @property
    def about(self):
        return f"torch {self.torch.__version__} ({self.torch.backends.cpu.get_cpu_capability()})"

    def tensor(self, x):
        if isinstance(x, flashtile.bf16):
            return self.torch.from_numpy(x.bits.view(np.int16)).view(self.torch.bfloat16)
        return None if x is None else self.torch.from_numpy(x)

    def prepare(self, p):
        if isinstance(p, SoftmaxProblem):
            return self.softmax(p)
        w, q, k, v = p.workload, *map(self.tensor, (p.q, p.k, p.v))
        options = {"enable_gqa": True} if w.heads_q != w.heads_kv else {}
        if w.option == "causal" and w.seq_q == w.seq_kv:
            options["is_causal"] = True  # (its order is counted from the start: right for as many queries as keys only)
        elif p.bias is not None:
            options["attn_mask"] = self.tensor(p.bias)
        elif (sees := p.sees()) is not None:
            options["attn_mask"] = self.tensor(sees)
        attention, last = self.torch.nn.functional.scaled_dot_product_attention, []

        def call():
            last[:] = [attention(q, k, v, **options)]

        detail = "boolean mask" if w.causal and "attn_mask" in options else ""
        return call, lambda: np.stack([last[0][at].double().numpy() for at in p.rows]), detail

    def softmax(self, p):
        """Into given memory, as flashtile."""
        x, out = self.tensor(p.x), self.tensor(zeros(p.workload.shape, p.workload.dtype))
        call = lambda: self.torch.softmax(x, p.workload.axis, out=out)
        return call, lambda: p.sampled(out.float().numpy()), ""


class Onnxruntime:
    name = "onnxruntime"

    def __init__(self, threads):
        import onnx
        import onnxruntime

        self.onnx, self.runtime = onnx, onnxruntime
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads, self.options.inter_op_num_threads = threads, 1
        self.options.log_severity_level = 3

    @property
    def about(self):
        return f"onnxruntime {self.runtime.__version__}"

    def prepare(self, p):
        """The fastest of its operators that has an answer."""
        if isinstance(p, SoftmaxProblem):
            return self.softmax(p)
        tried, reasons = [], []
        for operator in (self.attention_23, self.multi_head, self.group_query):
            try:
                call, rows, detail = operator(p)
                call()
                tried.append((best_of(call, 2), call, rows, detail))
            except Lacks as why:
                reasons.append(str(why))
            except Exception as why:  # onnxruntime's exceptions have no common base of their own
                reasons.append(f"{operator.__name__}: {' '.join(str(why).split())[:160]}")
        if not tried:
            raise Lacks(" / ".join(reasons))
        return min(tried, key=lambda one: one[0])[1:]

    def softmax(self, p):
        outputs = {"out": zeros(p.workload.shape, p.workload.dtype)}
        try:
            call, out = self.session(p, "Softmax", "", {"x": p.x}, outputs, {"axis": p.workload.axis})
        except Exception as why:
            raise Lacks(" ".join(str(why).split())[:160]) from why
        return call, lambda: p.sampled(out()), ""

    def session(self, p, operator, domain, inputs, outputs, attributes):
        """inputs: by name, None for one left out; outputs: by name, arrays to write. A call, over bound arrays."""
        helper, types = self.onnx.helper, self.onnx.TensorProto
        if p.workload.dtype == "bf16":
            raise Lacks("no bf16 on CPUs")
        kinds = {"float32": types.FLOAT, "float16": types.FLOAT16, "bool": types.BOOL, "int32": types.INT32}
        info = lambda name, x: helper.make_tensor_value_info(name, kinds[x.dtype.name], x.shape)
        names = [name if x is not None else "" for name, x in inputs.items()]
        given = {name: x for name, x in inputs.items() if x is not None}
        node = helper.make_node(operator, names, list(outputs), domain=domain, **attributes)
        graph = helper.make_graph(
            [node], "peer", [info(*item) for item in given.items()], [info(*item) for item in outputs.items()]
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        session = self.runtime.InferenceSession(
            model.SerializeToString(), self.options, providers=["CPUExecutionProvider"]
        )
        binding, values = session.io_binding(), {}
        value = lambda x: values.setdefault(id(x), self.runtime.OrtValue.ortvalue_from_numpy(x))
        for name, x in given.items():
            binding.bind_ortvalue_input(name, value(x))
        for name, x in outputs.items():
            binding.bind_ortvalue_output(name, value(x))
        result = next(iter(outputs.values()))

        def call(_kept=(values, inputs, outputs)):  # a binding keeps neither its values nor the memory behind them alive
            session.run_with_iobinding(binding)

        return call, lambda: result

    def attention_23(self, p):
        w, attributes = p.workload, {}
        mask = p.bias if p.bias is not None else p.mask
        if w.option == "causal" and w.seq_q == w.seq_kv:
            attributes["is_causal"] = 1
        elif w.causal:
            mask = p.sees()
        inputs = {"q": p.q, "k": p.k, "v": p.v, "mask": mask}
        outputs = {"out": np.zeros_like(p.q) if w.dtype != "bf16" else None}
        call, out = self.session(p, "Attention", "", inputs, outputs, attributes)
        return call, lambda: picked(out(), p), "Attention-23"

    def multi_head(self, p):
        """Queries, keys and values lie as [batch, seq, heads * dim]."""
        w = p.workload
        if w.heads_q != w.heads_kv:
            raise Lacks("MultiHeadAttention: no groups of heads")
        if w.dtype != "f32":
            raise Lacks(f"MultiHeadAttention: no {w.dtype} on CPUs")
        attributes, bias = {"num_heads": w.heads_q}, p.bias
        if w.option == "causal" and w.seq_q == w.seq_kv:
            attributes["unidirectional"] = 1
        elif (sees := p.sees()) is not None:
            bias = np.where(sees, np.float32(0), np.finfo(np.float32).min)
        inputs = {"q": rows_of(p.q), "k": rows_of(p.k), "v": rows_of(p.v)}
        inputs |= {"projection": None, "padding": None, "bias": bias}
        outputs = {"out": np.zeros_like(inputs["q"])}
        call, out = self.session(p, "MultiHeadAttention", "com.microsoft", inputs, outputs, attributes)
        return call, lambda: picked(heads_of(out(), w), p), "MultiHeadAttention"

    def group_query(self, p):
        """The newest keys are handed in, those before lie in the cache, which is the same memory before and after."""
        w = p.workload
        if not (w.causal or w.seq_q == 1):
            raise Lacks("GroupQueryAttention: causal only")
        if w.dtype == "bf16":
            raise Lacks("no bf16 on CPUs")
        attributes = {"num_heads": w.heads_q, "kv_num_heads": w.heads_kv}
        if w.window is not None:
            attributes["local_window_size"] = w.window + 1
        past_k, past_v, new = p.k.copy(), p.v.copy(), slice(w.seq_kv - w.seq_q, None)
        inputs = {"q": rows_of(p.q), "k": rows_of(p.k[:, :, new]), "v": rows_of(p.v[:, :, new])}
        inputs |= {"past_k": past_k, "past_v": past_v}
        inputs |= {"last": np.full(w.batch, w.seq_kv - 1, np.int32), "total": np.array(w.seq_kv, np.int32)}
        outputs = {"out": np.zeros_like(inputs["q"]), "present_k": past_k, "present_v": past_v}
        call, out = self.session(p, "GroupQueryAttention", "com.microsoft", inputs, outputs, attributes)
        return call, lambda: picked(heads_of(out(), w), p), "GroupQueryAttention"


def rows_of(x):
    """[batch, seq, heads * dim] of [batch, heads, seq, dim]."""
    batch, heads, seq, dim = x.shape
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(batch, seq, heads * dim)


def heads_of(x, w):
    return x.reshape(w.batch, w.seq_q, w.heads_q, w.dim).transpose(0, 2, 1, 3)


def picked(x, p):
    return np.stack([x[at] for at in p.rows]).astype(np.float64)


# ----------------------------------------------------------------------------------------------------------- measuring


def best_of(call, times):
    return min(timed(call, 1) for _ in range(times))


def timed(call, times):
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def measure(workload, contestants, rounds, threads):
    """Lines of the table, and whether all agree."""
    p, racers, lines = workload.problem(), [], []
    for contestant in contestants:
        line = dict.fromkeys(COLUMNS, "") | {"workload": workload.name, "type": workload.dtype, "threads": threads}
        line["contestant"] = contestant.name
        lines.append(line)
        try:
            call, rows, line["detail"] = contestant.prepare(p)
            call()
        except (Lacks, RuntimeError) as why:
            line["note"] = "lacks: " + " ".join(str(why).split())
            continue
        racers.append((line, call, max(1, round(SAMPLE_SECONDS / best_of(call, 1))), ([], [])))
        line["max_error"], line["tolerance"] = p.judge(rows())
    start = time.perf_counter()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > ROW_SECONDS:
            break
        # Nobody is always first, or always after the same.
        for line, call, times, (samples, paused) in racers[done % len(racers) :] + racers[: done % len(racers)]:
            time.sleep(PAUSE)
            paused.append(timed(call, 1))
            samples.append(timed(call, times))
    best = {line["contestant"]: min(samples) for line, _, _, (samples, _) in racers}
    for line, _, _, (samples, paused) in racers:
        line["best_ms"], line["median_ms"] = min(samples) * 1e3, statistics.median(samples) * 1e3
        line["paused_ms"] = statistics.median(paused) * 1e3
        line["ratio"] = min(samples) / best["flashtile"]
    return lines, all(line["tolerance"] <= 1 for line, *_ in racers)


# ----------------------------------------------------------------------------------------------------------- reporting


def plain(line):
    if line["best_ms"] == "":
        return f"{line['contestant']:>12}  {line['note']}"
    return (
        f"{line['contestant']:>12} {line['best_ms']:10.3f} ms (median {line['median_ms']:.3f}, after a pause"
        f" {line['paused_ms']:.3f})  x {line['ratio']:.2f}"
        f"  error {line['max_error']:.1e}, {line['tolerance']:.2f} of the tolerance  {line['detail']}"
    )


def by_row(lines):
    rows = {}
    for line in lines:
        rows.setdefault((line["workload"], line["type"]), []).append(line)
    return rows


def markdown(lines):
    """A table: the time of each peer over flashtile's and, in brackets, its largest error. The same of medians of single calls
    after a pause."""
    peers = [peer for peer in PEERS if any(line["contestant"] == peer for line in lines)]
    print(f"| workload | type | flashtile | {' | '.join(peers)} | after {PAUSE * 1e3:.0f} ms: flashtile | {' | '.join(peers)} |")
    print(f"|---|---|---:|{'---:|' * len(peers)}---:|{'---:|' * len(peers)}")
    reasons = {}
    for (name, dtype), row in by_row(lines).items():
        own = next(line for line in row if line["contestant"] == "flashtile")
        cells, paused_cells = [], []
        own_paused = float(own.get("paused_ms") or "nan")
        for peer in peers:
            line = next((line for line in row if line["contestant"] == peer), None)
            if line is None or line["best_ms"] == "":
                if line is not None:
                    reasons.setdefault((peer, line["note"].removeprefix("lacks: ")), []).append(f"{name} {dtype}")
                cells.append("lacks")
                paused_cells.append("lacks")
            else:
                paused = float(line.get("paused_ms") or "nan")  # the Rust crate measures none
                paused_cells.append("" if math.isnan(paused) else f"{paused / own_paused:.2f}")
                cells.append(f"{float(line['ratio']):.2f} ({float(line['max_error']):.0e})")
        time_ms = lambda ms: f"{ms:.{3 if ms < 10 else 1}f} ms"
        own_cell = f"{time_ms(float(own['best_ms']))} ({float(own['max_error']):.0e})"
        cells += ["" if math.isnan(own_paused) else time_ms(own_paused), *paused_cells]
        print(f"| {name} | {dtype} | {own_cell} | {' | '.join(cells)} |")
    print()
    for (peer, reason), titles in reasons.items():
        print(f"* {peer} lacks {', '.join(titles)}: {reason}")


def draw(lines, path, title):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = by_row(lines)
    peers = [peer for peer in PEERS if any(line["contestant"] == peer for line in lines)]
    # (Laid out by what title and legend take: their height is the same in inches, however long the axes are.)
    size = (9, 1.4 + len(rows) * (0.1 + 0.09 * len(peers)))
    figure, axes = pyplot.subplots(figsize=size, dpi=110, layout="constrained")
    height = 0.84 / len(peers)
    for place, peer in enumerate(peers):
        at, ratios = [], []
        for index, row in enumerate(rows.values()):
            for line in row:
                if line["contestant"] == peer and line["best_ms"] != "":
                    at.append(index + (place - (len(peers) - 1) / 2) * height)
                    ratios.append(float(line["ratio"]))
        # Bars start at 1, the time that flashtile takes: to the right the peer is slower.
        bars = axes.barh(at, [ratio - 1 for ratio in ratios], height, left=1, label=peer, zorder=2)
        for bar, ratio in zip(bars, ratios):
            axes.annotate(
                f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}",
                (ratio, bar.get_y() + height / 2),
                xytext=(3 if ratio >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center",
                fontsize=6,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.axvline(1, color="black", linewidth=1, zorder=3)
    axes.set_yticks(range(len(rows)), [" ".join(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="x", linewidth=0.4, zorder=0)
    axes.set_xlabel("time over flashtile's (right of 1: flashtile is faster)")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(peers), fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of each contestant (default 2)")
    parser.add_argument("--filter", default="", metavar="TEXT", help='only rows with TEXT in "name type"')
    parser.add_argument("--rounds", type=int, default=15, help="at most so many (default 15)")
    parser.add_argument("--library", dest="path", default=str(ROOT / "target/release/libflashtile.so"), metavar="PATH")
    parser.add_argument("--csv", metavar="FILE", help="write the table, a line for each row and contestant")
    parser.add_argument("--png", metavar="FILE", help="draw the ratios")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table; progress goes to stderr")
    parser.add_argument("--also", metavar="FILE", help="a CSV of the Rust crate, for the markdown table and the chart")
    parser.add_argument("--from", dest="source", metavar="FILE", help="measure nothing: take an earlier run's CSV")
    parser.add_argument("--machine", default=processor(), metavar="NAME", help="the machine, for the title")
    arguments = parser.parse_args()
    if not pathlib.Path(arguments.path).exists():
        sys.exit(f"{arguments.path} is missing; build it with\n    {BUILD}\nor name another with --library PATH")

    out = sys.stderr if arguments.markdown else sys.stdout
    contestants = [make(arguments.threads) for make in (lambda n: Flashtile(arguments.path, n), Torch, Onnxruntime)]
    title = f"{datetime.date.today()}, {arguments.machine}, {arguments.threads} threads\n"
    title += ", ".join(contestant.about for contestant in contestants)
    print(title, file=out, flush=True)
    lines, wrong = [], []
    if arguments.source:
        with open(arguments.source, newline="") as file:
            lines = [x for x in csv.DictReader(file) if arguments.filter in f"{x['workload']} {x['type']}"]
    for workload in [*workloads(), *softmax_workloads()]:
        if arguments.source or arguments.filter not in workload.title:
            continue
        print(workload.title, file=out)
        measured, agree = measure(workload, contestants, arguments.rounds, arguments.threads)
        lines += measured
        wrong += [] if agree else [workload.title]
        print("\n".join(map(plain, measured)), file=out, flush=True)
    if not lines:
        sys.exit(f"no row has {arguments.filter!r} in its name and type")
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(lines)
    if arguments.also:
        rows = by_row(lines)
        with open(arguments.also, newline="") as file:
            also = [x for x in csv.DictReader(file) if (x["workload"], x["type"]) in rows]
        lines += [line for line in also if line["contestant"] != "flashtile"]
    if arguments.png:
        draw(lines, arguments.png, title)
    if arguments.markdown:
        print(title.replace("\n", "; ") + "\n")
        markdown(lines)
    if wrong:
        sys.exit(f"beyond the tolerance: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
