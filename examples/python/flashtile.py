"""flashtile from Python: ctypes over src/capi/flashtile.h, numpy arrays in and out, nothing copied.

    import flashtile
    lib = flashtile.load("target/release/libflashtile.so")
    out = lib.attention(q, k, v, causal=True)

Arrays are [batch, heads, seq, dim]; packed sequences may be [total, heads, dim]. Strides must be whole elements. numpy has no
bf16, so a bf16 array is an array of uint16 wrapped as `flashtile.bf16(array)`.
"""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p

import numpy as np

CODES = (
    "OK NULL_POINTER MISALIGNED BAD_STRUCT_SIZE BAD_DTYPE BAD_RANK NEGATIVE_SIZE OVERLAP OVERLAPPING_OUTPUT TOO_LARGE "
    "SHAPE_MISMATCH HEADS_NOT_DIVISIBLE NOT_BROADCASTABLE WRONG_COUNT KEY_LENGTH_PAST_END INVALID_OPTION "
    "LEVEL_UNAVAILABLE AXIS_OUT_OF_RANGE THREADS PANIC CLASS_OUT_OF_RANGE INVALID_STARTS INVALID_PAGES "
    "POSITION_OUT_OF_RANGE NOT_IN_CACHE CACHE_FULL NOT_RESERVED NOT_WRITTEN CANNOT_TRUNCATE LOST_KEYS WRONG_CACHE"
).split()
F32, F16, BF16, F64, BYTE = 1, 2, 3, 4, 5
DTYPES = {"float32": F32, "float16": F16, "float64": F64, "bool": BYTE, "uint8": BYTE}
IGNORE_INDEX = 1
CAUSAL, SCALE, SOFTCAP, WINDOW_LEFT, WINDOW_RIGHT = 1, 2, 4, 8, 16
FROM_END, FROM_START, AT, PER_BATCH = 0, 1, 2, 3
(DOCUMENTS, PREFIX_LM, CHUNKED, FIRST_AND_LAST, TREE, BLOCK_SPARSE, KEY_STARTS, BLOCK_SPARSE_ROWS) = range(1, 9)
RELATIVE_BIAS, T5_BIAS, WINDOW_BIAS = 1, 2, 3


def _integers(values, dtype=np.int64):
    """A dense array of integers: the same array where it is one."""
    values = np.asarray(values)
    if values.size and values.dtype.kind not in "iu":
        raise TypeError(f"a list of integers is needed, not of {values.dtype}")
    return np.ascontiguousarray(values, dtype)


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("rank", c_int32),
        ("shape", c_int64 * 4),
        ("strides", c_int64 * 4),
    ]


class Mask(ctypes.Structure):
    """A mask by rule, made by `documents` and the functions after it."""

    _fields_ = [
        ("kind", c_int32),
        ("reserved", c_int32),
        ("numbers", c_int64 * 4),
        ("lists", c_void_p * 2),
        ("counts", c_int64 * 2),
    ]

    def __init__(self, kind, numbers=(), lists=()):
        super().__init__(kind=kind, numbers=(c_int64 * 4)(*numbers))
        self.arrays = [np.ascontiguousarray(entries, np.int64).ravel() for entries in lists]  # kept alive with the mask
        for n, array in enumerate(self.arrays):
            self.lists[n], self.counts[n] = array.ctypes.data, array.size


class ScoreTable(ctypes.Structure):
    """Biases by relative position, made by `relative_bias` and the functions after it."""

    _fields_ = [
        ("kind", c_int32),
        ("reserved", c_int32),
        ("numbers", c_int64 * 4),
        ("table", c_void_p),
        ("count", c_int64),
    ]

    def __init__(self, kind, numbers=(), table=()):
        super().__init__(kind=kind, numbers=(c_int64 * 4)(*numbers))
        self.array = np.ascontiguousarray(table, np.float32).ravel()  # kept alive with the struct
        self.table, self.count = self.array.ctypes.data, self.array.size


class PageTable(ctypes.Structure):
    """The pages of each sequence: key j is in slot j % page_size of page j // page_size of its list.

    pages: [sequences, width]; or, with `starts`, one list of all pages, and those of sequence b are pages[starts[b]:starts[b + 1]]
    lengths: the keys of each sequence

    Dense arrays (pages of int32 or int64, the others of int64) are used in place, so they must not change during a call. Others
    are copied once, here. Entries past a sequence's length may be anything, such as -1.
    """

    _fields_ = [
        ("pages32", c_void_p),
        ("pages64", c_void_p),
        ("page_count", c_int64),
        ("width", c_int64),
        ("starts", c_void_p),
        ("start_count", c_int64),
        ("lengths", c_void_p),
        ("length_count", c_int64),
        ("page_size", c_int64),
    ]

    def __init__(self, pages, lengths, page_size, starts=None):
        super().__init__(page_size=page_size)
        pages = np.asarray(pages)
        rank = 2 if starts is None else 1
        if pages.ndim != rank:
            raise ValueError(f"pages have {pages.ndim} axes but must have {rank}: [sequences, width], or one list with starts")
        pages = _integers(pages, pages.dtype if pages.dtype in (np.int32, np.int64) else np.int64)
        lengths = _integers(lengths)
        self.arrays = [pages, lengths]  # kept alive with the table
        setattr(self, "pages32" if pages.dtype == np.int32 else "pages64", pages.ctypes.data)
        self.page_count = pages.size
        self.lengths, self.length_count = lengths.ctypes.data, lengths.size
        if starts is None:
            self.width = pages.shape[1]
        else:
            starts = _integers(starts)
            self.arrays.append(starts)
            self.starts, self.start_count = starts.ctypes.data, starts.size


class Rotation(ctypes.Structure):
    """How tokens are rotated: a `Rotary` and positions, or None in a cache, where tokens follow those before them."""

    _fields_ = [("rotary", c_void_p), ("positions", c_void_p), ("position_count", c_int64)]

    def __init__(self, rotary, positions=None):
        super().__init__(rotary=rotary.handle)
        self.kept = [rotary]  # alive with the struct
        if positions is not None:
            array = _integers(positions).ravel()
            self.kept.append(array)
            self.positions, self.position_count = array.ctypes.data, array.size


class CacheFormat(ctypes.Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("reserved", c_int32),
        ("heads_kv", c_int64),
        ("head_dim", c_int64),
        ("value_dim", c_int64),
    ]


class CacheInfo(ctypes.Structure):
    """The sizes of a cache. `capacity` is the tokens that there is memory for: of each sequence, or in all pages."""

    _fields_ = [("format", CacheFormat)] + [
        (name, c_int64)
        for name in (
            "sequences", "layers", "capacity", "first", "window", "pages", "page_size", "free_pages", "shared_pages", "bytes"
        )
    ]


class CacheView(ctypes.Structure):
    """The part of a cache that a call reads: `cache=` of the options. For a paged cache a layer and the sequences of the batch.

    A prepared step reads its view in each run. So `view.layer = n`, or `view.use(other)`, chooses the layer of the next run.
    """

    _fields_ = [("cache", c_void_p), ("layer", c_int64), ("sequences", c_void_p), ("sequence_count", c_int64)]

    def __init__(self, cache, layer=0, sequences=None):
        super().__init__(cache=cache.handle, layer=layer)
        self.kept, self.value_dim = [cache], cache.info.format.value_dim
        if sequences is not None:
            array = _integers(sequences).ravel()
            self.kept.append(array)
            self.sequences, self.sequence_count = array.ctypes.data, array.size

    def use(self, cache):
        """Reads another cache of the same kind from now on."""
        self.cache, self.kept[0] = cache.handle, cache


class Row(ctypes.Structure):
    """The query whose scores a score function gets; scores[n] is that of key first_key + n."""

    _fields_ = [(name, c_int64) for name in ("batch", "head", "query", "position", "first_key")]


SCORE_ROW = ctypes.CFUNCTYPE(None, c_void_p, POINTER(Row), POINTER(c_float), c_int64)


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("flags", c_uint32),
        ("threads", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("query_position", c_int32),
        ("alibi", c_int32),
        ("query_offset", c_int64),
        ("query_offsets", POINTER(c_int64)),
        ("query_offset_count", c_int64),
        ("key_lengths", POINTER(c_int64)),
        ("key_length_count", c_int64),
        ("alibi_slopes", POINTER(c_float)),
        ("alibi_slope_count", c_int64),
        ("mask", POINTER(Tensor)),
        ("bias", POINTER(Tensor)),
        ("level", c_char_p),
        ("form", c_int32),
        ("reserved", c_int32),
        ("sinks", POINTER(c_float)),
        ("sink_count", c_int64),
        ("masks", POINTER(Mask)),
        ("mask_count", c_int64),
        ("score_row", SCORE_ROW),
        ("score_context", c_void_p),
        ("query_lengths", c_void_p),
        ("query_length_count", c_int64),
        ("query_starts", c_void_p),
        ("query_start_count", c_int64),
        ("key_starts", c_void_p),
        ("key_start_count", c_int64),
        ("page_table", POINTER(PageTable)),
        ("score_tables", POINTER(ScoreTable)),
        ("score_table_count", c_int64),
        ("first_queries", c_void_p),
        ("first_query_count", c_int64),
        ("first_keys", c_void_p),
        ("first_key_count", c_int64),
        ("cache", POINTER(CacheView)),
    ]


class CrossEntropyOptions(ctypes.Structure):
    _fields_ = [
        ("flags", c_uint32),
        ("reduction", c_int32),
        ("ignore_index", c_int64),
        ("label_smoothing", c_double),
        ("class_weights", POINTER(c_float)),
        ("class_weight_count", c_int64),
        ("reserved", c_int64 * 2),
    ]


class Error(ValueError):
    """A refused call. `code` is the name of the header's code, the text its message."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = CODES[code] if 0 <= code < len(CODES) else str(code)


class bf16:
    """An array of bf16, stored as uint16: the upper halves of float32s."""

    def __init__(self, bits):
        if bits.dtype != np.uint16:
            raise TypeError("bf16 wraps an array of uint16")
        self.bits = bits


def to_bf16(x):
    """Rounds numbers to bf16, to nearest with ties to even. The bits of a NaN may change."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return bf16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def from_bf16(x):
    return (x.bits.astype(np.uint32) << 16).view(np.float32)


def describe(x):
    """The header's description of an array; the array must outlive it."""
    array, dtype = (x.bits, BF16) if isinstance(x, bf16) else (x, DTYPES.get(x.dtype.name, 0))
    tensor = Tensor(array.ctypes.data, dtype, array.ndim)
    if array.ndim > 4:
        raise ValueError(f"{array.ndim} axes, but there can be 4")
    for axis in range(array.ndim):
        elements, rest = divmod(array.strides[axis], array.itemsize)
        if rest and array.shape[axis] > 1:
            raise ValueError(f"the stride of axis {axis} is not a whole number of elements")
        tensor.shape[axis], tensor.strides[axis] = array.shape[axis], elements
    return tensor


def _list(values, ctype):
    """A list for the options, and its length."""
    values = np.asarray(values).tolist()  # numpy's own numbers are none to ctypes
    return (ctype * len(values))(*values), len(values)


def documents(queries, keys=None):
    """Packed sequences: a query sees the keys with its own document number. Both are [seq], or [batch, seq] with numbers for each
    batch; keys=None: those of the queries."""
    queries, keys = np.asarray(queries), np.asarray(queries if keys is None else keys)
    return Mask(DOCUMENTS, [len(queries) if queries.ndim == 2 else 0], [queries, keys])


def prefix_lm(*ranges):
    """Causal order, and ranges (start, end) of positions that all see each other: a prefix, or images in a prompt. Without
    causal=True, which would hide what the ranges show."""
    return Mask(PREFIX_LM, [], [[start for start, _ in ranges], [end for _, end in ranges]])


def chunked(size):
    """A query sees the keys of the chunk of `size` positions that its own position is in."""
    return Mask(CHUNKED, [size])


def first_and_last(first, before):
    """The first keys, the query's own, and `before` keys before it (StreamingLLM). Causal order is a part of it."""
    return Mask(FIRST_AND_LAST, [first, before])


def tree(parents):
    """Drafts of speculative decoding, the last keys: each sees all keys before the drafts, itself and its ancestors. A parent is an
    earlier draft, or -1."""
    return Mask(TREE, [], [parents])


def block_sparse(block, kept):
    """Blocks of (queries, keys) that are visible where `kept` is not 0: [batch or 1, heads or 1, query blocks, key blocks]."""
    kept = np.asarray(kept)
    kept = kept.reshape((1,) * (4 - kept.ndim) + kept.shape)
    return Mask(BLOCK_SPARSE, [*block, *kept.shape[:2]], [kept])


def block_sparse_rows(block, starts, columns):
    """The same for all batches and heads, as compressed rows (CSR): row n has the key blocks columns[starts[n]:starts[n + 1]]."""
    return Mask(BLOCK_SPARSE_ROWS, block, [starts, columns])


def key_starts(starts):
    """The first visible key of each batch. For left padding, the option first_keys= is better; key_starts= is packed keys."""
    return Mask(KEY_STARTS, [], [starts])


def relative_bias(table):
    """Adds table[h, most + d], where d is the query's position minus the key's, held between -most and most. The table is
    [heads, 2 * most + 1]."""
    table = np.asarray(table)
    return ScoreTable(RELATIVE_BIAS, [table.shape[-1] // 2], table)


def t5_bias(table, *, bidirectional, max_distance=128):
    """The bias of T5 and its relatives, for each bucket of distances: [buckets, heads], as checkpoints have it."""
    return ScoreTable(T5_BIAS, [max_distance, int(bidirectional)], table)


def window_bias(size, table):
    """The bias of Swin transformers, for each offset in a window of `size`, (height, width), whose places are the queries and the
    keys, row by row: [(2 * height - 1) * (2 * width - 1), heads], as checkpoints have it."""
    return ScoreTable(WINDOW_BIAS, size, table)


def _score_row(function, raised):
    """The C function of a score function. Its exceptions are put into `raised`, as they can't leave it."""

    def score_row(_context, row, scores, count):
        try:
            function(row.contents, np.ctypeslib.as_array(scores, (count,)))
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    return SCORE_ROW(score_row)


def options(
    *,
    causal=False,
    scale=None,
    softcap=None,
    window=(None, None),
    query_offset=None,
    key_lengths=None,
    query_lengths=None,
    query_starts=None,
    key_starts=None,
    first_queries=None,
    first_keys=None,
    pages=None,
    cache=None,
    mask=None,
    bias=None,
    alibi=None,
    sinks=None,
    masks=(),
    score_tables=(),
    score_row=None,
    level=None,
    form=None,
    threads=0,
):
    """The header's options, from Python's.

    window: (left, right); query_offset: None (the last query is the last key), a number, or one for each batch; alibi: True,
    a slope for each head, or slopes [batch, heads]; form: None, "decode" or "prefill".

    Sequences of their own lengths, in any of these ways:
    query_lengths, key_lengths: the first rows of each batch; rows of `out` and `lse` past a query length are left as they are
    query_starts: packed queries, those of sequence b are the rows query_starts[b]:query_starts[b + 1]
    key_starts: packed keys and values, likewise
    first_queries, first_keys: left padding, the rows of each batch from these on; positions are counted from the first key
    pages: a PageTable; k and v are pools [pages, heads, page_size, dim]
    cache: a KvCache or a RotatingKvCache, or the view of a PagedKvCache; k and v are None

    sinks: a score for each head that has no key; masks: a list of masks by rule, see `documents` and the functions after it;
    score_tables: a list of biases by relative position, see `relative_bias` and the functions after it;
    score_row: a function (row, scores) that changes the array `scores` in place: those of the query `row` and of the keys
    row.first_key to row.first_key + len(scores) - 1. -inf hides a key. It may be called from several threads, for any run of keys,
    and must not keep the array. It is called for each query and some hundred keys: for try-outs, not for speed.
    """
    o = Options(struct_size=ctypes.sizeof(Options), threads=threads)
    o.flags = CAUSAL if causal else 0
    for flag, name, value in (
        (SCALE, "scale", scale),
        (SOFTCAP, "softcap", softcap),
        (WINDOW_LEFT, "window_left", window[0]),
        (WINDOW_RIGHT, "window_right", window[1]),
    ):
        if value is not None:
            o.flags |= flag
            setattr(o, name, value)
    if isinstance(query_offset, (int, np.integer)):
        o.query_position, o.query_offset = AT, query_offset
    elif query_offset is not None:
        o.query_position = PER_BATCH
        o.query_offsets, o.query_offset_count = _list(query_offset, c_int64)
    if key_lengths is not None:
        o.key_lengths, o.key_length_count = _list(key_lengths, c_int64)
    o.sequence_lists = []  # kept alive with the options
    for name, count, values in (
        ("query_lengths", "query_length_count", query_lengths),
        ("query_starts", "query_start_count", query_starts),
        ("key_starts", "key_start_count", key_starts),
        ("first_queries", "first_query_count", first_queries),
        ("first_keys", "first_key_count", first_keys),
    ):
        if values is not None:
            values = _integers(values)
            o.sequence_lists.append(values)
            setattr(o, name, values.ctypes.data)
            setattr(o, count, values.size)
    if pages is not None:
        o.page_table = ctypes.pointer(pages)
    if cache is not None:
        o.view = cache if isinstance(cache, CacheView) else CacheView(cache)  # kept alive with the options
        o.cache = ctypes.pointer(o.view)
    if alibi is True:
        o.alibi = 1
    elif alibi is not None and alibi is not False:
        slopes = np.asarray(alibi, np.float32)
        o.alibi = 3 if slopes.ndim == 2 else 2
        o.alibi_slopes, o.alibi_slope_count = _list(slopes.ravel(), c_float)
    if sinks is not None:
        o.sinks, o.sink_count = _list(sinks, c_float)
    o.masks, o.mask_count = (Mask * len(masks))(*masks), len(masks)
    o.score_tables, o.score_table_count = (ScoreTable * len(score_tables))(*score_tables), len(score_tables)
    o.kept, o.raised = [*masks, *score_tables], []
    if score_row is not None:
        o.score_row = _score_row(score_row, o.raised)
    # ctypes keeps the target of a pointer member alive, but not the array that the description points to.
    if mask is not None:
        o.mask, o.mask_array = ctypes.pointer(describe(mask)), mask
    if bias is not None:
        o.bias, o.bias_array = ctypes.pointer(describe(bias)), bias
    o.level = level.encode() if level else None
    o.form = {None: 0, "decode": 1, "prefill": 2}[form]
    return o


def _without_axis(shape, axis):
    """The shape with 1 along the axis."""
    shape = list(shape)
    if -len(shape) <= axis < len(shape):  # otherwise the library refuses it
        shape[axis] = 1
    return tuple(shape)


def _pointer(tensor):
    return None if tensor is None else byref(tensor)


def _described(*arrays):
    """The descriptions of arrays, of which some are None."""
    return [None if array is None else describe(array) for array in arrays]


class Rotary:
    """A table of rotary position embeddings, made by `Library.rotary`. Caches rotate the keys that are appended with it."""

    def __init__(self, library, name, *arguments):
        self.lib, self.handle = library, None
        handle = c_void_p()
        library._call(name, *arguments, byref(handle))
        self.handle = handle.value

    def rotate(self, x, positions, out=None):
        """Rotates x, [batch, heads, seq, dim] or packed [total, heads, dim], in place, or into `out`.

        positions: one number, that of the first token of every sequence; [batch], of each sequence's first token; or
        [batch, seq], of each token."""
        rotation, tensors = Rotation(self, positions), [describe(x), describe(x if out is None else out)]
        self.lib._call("rotate", byref(rotation), *map(byref, tensors))
        return x if out is None else out

    def __del__(self):
        if self.handle is not None:
            self.lib.c.flashtile_rotary_free(c_void_p(self.handle))


class _Cache:
    """What all caches have in common. Keys and values may be float32, float16 or bf16 arrays of any strides, and are rounded once to
    the cache's dtype: np.float32, np.float16 or "bf16". A refused call raises Error and has changed nothing.

    rotary, positions: with a `Rotary`, keys are turned before they are rounded, to the positions that follow those of the sequence
    or to `positions`, as in `Rotary.rotate`."""

    def __init__(self, library, name, heads, dim, numbers, dtype, value_dim):
        self.lib, self.handle = library, None
        dtype = BF16 if dtype == "bf16" else DTYPES.get(np.dtype(dtype).name, 0)
        handle, cache_format = c_void_p(), CacheFormat(dtype, 0, heads, dim, dim if value_dim is None else value_dim)
        library._call(name, byref(cache_format), *map(c_int64, numbers), byref(handle))
        self.handle = handle.value

    def _call(self, name, *arguments):
        self.lib._call(f"cache_{name}", c_void_p(self.handle), *arguments)

    def _add(self, name, indices, k, v, rotary, positions):
        if rotary is None and positions is not None:
            raise TypeError("positions are for a rotary table: give rotary, too")
        rotation = None if rotary is None else Rotation(rotary, positions)
        self._call(name, *map(c_int64, indices), byref(describe(k)), byref(describe(v)), _pointer(rotation))

    def _number(self, name, *indices):
        number = c_int64()
        self._call(name, *map(c_int64, indices), byref(number))
        return number.value

    @property
    def info(self):
        """The sizes of the cache: a `CacheInfo`."""
        info = CacheInfo()
        self._call("get_info", byref(info))
        return info

    def length(self, sequence):
        """The tokens of a sequence: with those that a rotating cache has lost, or that are reserved and not yet written."""
        return self._number("length", sequence)

    def truncate(self, sequence, length):
        """Forgets the tokens of a sequence after the first `length`."""
        self._call("truncate", c_int64(sequence), c_int64(length))

    def clear(self):
        """Forgets all tokens; in a paged cache all sequences."""
        self._call("clear")

    def memory(self, layer=0):
        """A copy of all keys and values of a layer, as they are in memory: [batch or pages, heads, rows, dim]."""
        tensors = Tensor(), Tensor()
        self._call("memory", c_int64(layer), *map(byref, tensors))
        return tuple(map(_copied, tensors))

    def __del__(self):
        if self.handle is not None:
            self.lib.c.flashtile_cache_free(c_void_p(self.handle))


def _copied(tensor):
    """A copy of memory without gaps: an array, or a bf16."""
    shape, dtype = tuple(tensor.shape), np.float32 if tensor.dtype == F32 else np.uint16
    count = int(np.prod(shape))
    data = ctypes.string_at(tensor.data, count * np.dtype(dtype).itemsize) if count else b""
    array = np.frombuffer(data, dtype).reshape(shape).copy()
    return bf16(array) if tensor.dtype == BF16 else array.view(np.float16) if tensor.dtype == F16 else array


class KvCache(_Cache):
    """Keys and values of one layer: a batch of sequences with room for `capacity` tokens each. Made by `Library.kv_cache`."""

    def append(self, k, v, sequence=None, *, rotary=None, positions=None):
        """Adds tokens to every sequence, [batch, heads, n, dim], or to one, [1, heads, n, dim]."""
        name, indices = ("append", []) if sequence is None else ("append_to", [sequence])
        self._add(name, indices, k, v, rotary, positions)

    def fork(self, sequence, to):
        """Copies a sequence to another one, whose own tokens are forgotten."""
        self._call("fork_to", c_int64(sequence), c_int64(to))

    @property
    def lengths(self):
        """The tokens of each sequence."""
        return [self.length(sequence) for sequence in range(self.info.sequences)]


class RotatingKvCache(KvCache):
    """Keys and values of one layer that keeps the first tokens and the last `window` of each sequence. Made by
    `Library.rotating_kv_cache`. Tokens keep their positions, whatever is lost."""


class PagedKvCache(_Cache):
    """Keys and values of all layers, in pages that sequences take as they grow, and share. Made by `Library.paged_kv_cache`.

    A step reserves tokens, once, and writes them in each layer; `append` does both in a cache of one layer:

        cache.reserve(sequence, n)
        for layer in range(layers):
            cache.write(layer, sequence, k, v)
            out = lib.attention(q, cache=cache.view(layer, [sequence]), causal=True)
    """

    def new_sequence(self):
        """The number of a new, empty sequence."""
        return self._number("new_sequence")

    def fork(self, sequence):
        """A new sequence that shares all pages of another one."""
        return self._number("fork", sequence)

    def remove(self, sequence):
        """Forgets a sequence; its number is refused from now on."""
        self._call("remove", c_int64(sequence))

    def reserve(self, sequence, tokens):
        """Makes a sequence longer, and takes the pages for it."""
        self._call("reserve", c_int64(sequence), c_int64(tokens))

    def write(self, layer, sequence, k, v, *, rotary=None, positions=None):
        """Writes the next tokens of a sequence in one layer, [1, heads, n, dim]."""
        self._add("write", [layer, sequence], k, v, rotary, positions)

    def append(self, sequence, k, v, *, rotary=None, positions=None):
        """Reserves and writes tokens, [1, heads, n, dim], in a cache of one layer."""
        self._add("append_to", [sequence], k, v, rotary, positions)

    def written(self, layer, sequence):
        """The tokens of a sequence that one layer has."""
        return self._number("written", layer, sequence)

    def pages(self, sequence):
        """The pages of a sequence, in the order of its tokens."""
        count = c_int64()
        self._call("pages", c_int64(sequence), None, c_int64(0), byref(count))
        pages = (c_int64 * count.value)()
        self._call("pages", c_int64(sequence), pages, count, byref(count))
        return list(pages)

    def view(self, layer, sequences):
        """The layer and the batch that a call reads: its `cache`."""
        return CacheView(self, layer, sequences)


class Prepared:
    """A planned call. `run` computes it for arrays of the planned shapes; `replan` plans it again, with any options. Options, lists and
    page tables are checked when it is planned, and must not change until it is planned again."""

    def __init__(self, library, q, k, v, kwargs):
        self.lib, self.step = library, c_void_p()
        self.options = options(**kwargs)
        library._call("prepare", *map(_pointer, _described(q, k, v)), byref(self.options), byref(self.step))

    def replan(self, q, k=None, v=None, **kwargs):
        o = options(**kwargs)
        self.lib._call("prepared_replan", self.step, *map(_pointer, _described(q, k, v)), byref(o))
        self.options = o  # those before are no longer read

    def run(self, q, k, v, out, lse=None):
        self.lib._call("prepared_run", self.step, *map(_pointer, _described(q, k, v, out, lse)))
        if self.options.raised:
            raise self.options.raised.pop()  # of score_row; the outputs are of no use

    def __del__(self):
        self.lib.c.flashtile_prepared_free(self.step)


class Library:
    """The functions of a libflashtile; a refused call raises Error."""

    def __init__(self, path):
        self.c = ctypes.CDLL(path)
        for name in ("last_error", "version", "level"):
            getattr(self.c, f"flashtile_{name}").restype = c_char_p
        self.c.flashtile_release.restype = None
        for name in ("prepared", "cache", "rotary"):
            getattr(self.c, f"flashtile_{name}_free").restype = None

    def _call(self, name, *arguments):
        code = getattr(self.c, f"flashtile_{name}")(*arguments)
        if code != 0:
            raise Error(code, self.c.flashtile_last_error().decode())

    def attention(self, q, k=None, v=None, out=None, *, lse=None, **kwargs):
        """Attention into `out`, by default a new array of q's type. lse: an array [batch, heads, seq] to write, or True
        for a new one: then (out, lse) is returned. Packed queries [total, heads, dim] have an out [total, heads, dim] and an lse
        [1, heads, total]. In new arrays, rows of padding and of no sequence are 0, their lse is -inf. Other arguments: see
        `options`."""
        shape = lambda x: (x.bits if isinstance(x, bf16) else x).shape
        o = options(**kwargs)
        if out is None:
            # (Without values and a cache, the library refuses the call.)
            full = (*shape(q)[:-1], o.view.value_dim if o.cache else shape(q if v is None else v)[-1])
            out = bf16(np.zeros(full, np.uint16)) if isinstance(q, bf16) else np.zeros(full, q.dtype)
        returns_lse = lse is True
        if returns_lse:
            rows = shape(q)
            lse = np.full((1, rows[1], rows[0]) if len(rows) == 3 else rows[:3], -np.inf, np.float32)
        self._call("attention", *map(_pointer, _described(q, k, v, out, lse)), byref(o))
        if o.raised:
            raise o.raised[0]  # of score_row; the outputs are of no use
        return (out, lse) if returns_lse else out

    def key_sums(self, q, k, v, lse, sums=None, **kwargs):
        """Sums of each key's probabilities over the queries into `sums`, by default a new array [batch, heads, keys]. lse is that of
        `attention` with the same arguments. For packed sequences, pages and caches, sums must be given: [sequences, heads, most
        keys of one], or a KvCache's capacity."""
        if sums is None:
            shape = lambda x: (x.bits if isinstance(x, bf16) else x).shape
            sums = np.empty((*shape(q)[:2], shape(k)[2]), np.float32)
        o = options(**kwargs)
        self._call("key_sums", *map(_pointer, _described(q, k, v, lse, sums)), byref(o))
        if o.raised:
            raise o.raised[0]  # of score_row; the sums are of no use
        return sums

    def prepare(self, q, k=None, v=None, **kwargs):
        """A call that is planned once for many arrays of the same shapes, such as all layers of a step: see `Prepared`. Arguments as in
        `attention`."""
        return Prepared(self, q, k, v, kwargs)

    def kv_cache(self, heads, dim, *, capacity, batch=1, dtype=np.float16, value_dim=None):
        """A `KvCache`: `batch` empty sequences with room for `capacity` tokens of `heads` keys of `dim` elements."""
        return KvCache(self, "cache_new", heads, dim, [batch, capacity], dtype, value_dim)

    def rotating_kv_cache(self, heads, dim, *, window, first=0, batch=1, dtype=np.float16, value_dim=None):
        """A `RotatingKvCache`, which keeps the first tokens and the last `window` of each sequence."""
        return RotatingKvCache(self, "cache_new_rotating", heads, dim, [batch, first, window], dtype, value_dim)

    def paged_kv_cache(self, heads, dim, *, pages, page_size=64, layers=1, dtype=np.float16, value_dim=None):
        """A `PagedKvCache` of pages for all layers, without sequences."""
        return PagedKvCache(self, "cache_new_paged", heads, dim, [layers, pages, page_size], dtype, value_dim)

    def rotary(
        self, dim=None, positions=None, base=10_000.0, *, frequencies=None, magnitude=1.0, tables=None, interleaved=False
    ):
        """A `Rotary` for the positions 0 to `positions` - 1, in one of three ways:

        dim, base: rotates the first `dim` elements of a row, with the frequencies base ** (-2 * p / dim)
        frequencies, magnitude: a frequency for each pair of elements; every cosine and sine is multiplied by magnitude
        tables: (cos, sin), [positions, dim / 2] each, as a model file has them

        interleaved: pairs are neighbours, not the two halves of the elements."""
        if tables is not None:
            tensors = [describe(x) for x in tables]
            return Rotary(self, "rotary_from_tables", *map(byref, tensors), c_int32(interleaved))
        if frequencies is not None:
            listed, count = _list(frequencies, c_double)
            numbers = [c_int64(count), c_double(magnitude), c_int64(positions)]
            return Rotary(self, "rotary_from_frequencies", listed, *numbers, c_int32(interleaved))
        return Rotary(self, "rotary_new", c_int64(dim), c_double(base), c_int64(positions), c_int32(interleaved))

    def plan(self, q, k=None, v=None, **kwargs):
        """The plan of such a call, as text."""
        tensors, text = _described(q, k, v), ctypes.create_string_buffer(512)
        self._call("plan", *map(_pointer, tensors), byref(options(**kwargs)), text, c_size_t(len(text)), None)
        return text.value.decode()

    def merge(self, out_a, lse_a, out_b, lse_b):
        """Merges (out_b, lse_b) into (out_a, lse_a)."""
        self._call("merge", *(byref(describe(x)) for x in (out_a, lse_a, out_b, lse_b)))

    def _along_axis(self, name, inputs, out, axis, scale, options=()):
        if out is None:
            is_bf16 = isinstance(inputs[-1], bf16)
            out = bf16(np.empty_like(inputs[-1].bits)) if is_bf16 else np.empty_like(inputs[-1])
        if any(x is not None for x in options):
            name, inputs = f"masked_{name}", [*inputs, out, *options]
        else:
            inputs = [*inputs, out]
        tensors = [None if x is None else describe(x) for x in inputs]
        self._call(name, *map(_pointer, tensors), c_int32(axis), c_double(scale))
        return out

    def softmax(self, x, out=None, axis=-1, scale=1.0, *, mask=None, bias=None):
        """Softmax into `out`: by default a new array of x's type. It may be float32 where x is float16 or bf16, or x itself.

        mask: the elements that take part; bias: added to scale * x. Both may lack leading axes, and axes of size 1 are
        repeated."""
        return self._along_axis("softmax", [x], out, axis, scale, [mask, bias])

    def log_softmax(self, x, out=None, axis=-1, scale=1.0, *, mask=None, bias=None):
        return self._along_axis("log_softmax", [x], out, axis, scale, [mask, bias])

    def softmax_backward(self, y, dy, out=None, axis=-1, scale=1.0):
        return self._along_axis("softmax_backward", [y, dy], out, axis, scale)

    def log_softmax_backward(self, y, dy, out=None, axis=-1, scale=1.0):
        return self._along_axis("log_softmax_backward", [y, dy], out, axis, scale)

    def logsumexp(self, x, out=None, axis=-1, scale=1.0, *, mask=None, bias=None):
        """log(sum(exp(scale * x))) into `out`: of x's shape, but 1 along the axis; float32, or float64 where x is that. Mask and bias
        are as for `softmax`."""
        array = x.bits if isinstance(x, bf16) else x
        if out is None:
            out = np.empty(_without_axis(array.shape, axis), np.float64 if array.dtype == np.float64 else np.float32)
        return self._along_axis("logsumexp", [x], out, axis, scale, [mask, bias])

    def _cross_entropy(self, logits, targets, axis, weight, ignore_index, reduction, label_smoothing):
        """What both functions of the loss get, and the shape and type of the loss."""
        array = logits.bits if isinstance(logits, bf16) else logits
        targets = np.ascontiguousarray(targets, np.int64)
        o = CrossEntropyOptions(label_smoothing=label_smoothing)
        o.reduction = {"mean": 0, "sum": 1, "none": 2}[reduction]
        if ignore_index is not None:
            o.flags, o.ignore_index = IGNORE_INDEX, ignore_index
        if weight is not None:
            o.class_weights, o.class_weight_count = _list(weight, c_float)
        shape = _without_axis(array.shape, axis) if reduction == "none" else (1,)
        dtype = np.float64 if array.dtype == np.float64 else np.float32
        return targets, [c_void_p(targets.ctypes.data), c_int64(targets.size)], o, shape, dtype

    def cross_entropy(
        self, logits, targets, *, axis=1, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
    ):
        """The loss, with the arguments of PyTorch's `cross_entropy`: a number, or with reduction="none" an array of the targets'
        shape. targets has the shape of the logits without their class axis."""
        how = self._cross_entropy(logits, targets, axis, weight, ignore_index, reduction, label_smoothing)
        targets, listed, o, shape, dtype = how
        loss = np.empty(shape, dtype)
        self._call(
            "cross_entropy", byref(describe(logits)), *listed, byref(describe(loss)), c_int32(axis), byref(o)
        )
        return loss.reshape(targets.shape) if reduction == "none" else loss[0]

    def cross_entropy_backward(
        self, logits, targets, upstream=1.0, out=None, *, axis=1, weight=None, ignore_index=-100, reduction="mean",
        label_smoothing=0.0
    ):
        """The gradient of the loss with respect to the logits. upstream: of the loss's shape."""
        how = self._cross_entropy(logits, targets, axis, weight, ignore_index, reduction, label_smoothing)
        targets, listed, o, shape, dtype = how
        upstream = np.ascontiguousarray(np.broadcast_to(upstream, targets.shape if reduction == "none" else (1,)), dtype)
        upstream = upstream.reshape(shape)
        if out is None:
            out = bf16(np.empty_like(logits.bits)) if isinstance(logits, bf16) else np.empty_like(logits)
        self._call(
            "cross_entropy_backward",
            byref(describe(logits)),
            *listed,
            byref(describe(upstream)),
            byref(describe(out)),
            c_int32(axis),
            byref(o),
        )
        return out

    @property
    def version(self):
        return self.c.flashtile_version().decode()

    @property
    def level(self):
        """The best instruction set of this processor."""
        return self.c.flashtile_level().decode()

    @property
    def default_threads(self):
        return self.c.flashtile_default_threads()

    def release(self):
        """Frees this thread's scratch memory and ends the library's threads."""
        self.c.flashtile_release()


def load(path):
    return Library(path)
