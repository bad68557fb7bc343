/* flashtile: exact scaled-dot-product attention on CPUs.
 *
 *   score[i,j] = f( softcap( scale * dot(q[i], k[j]) ) + bias[i,j] )   for every key j that query i may see
 *   out[i]     = sum_j exp(score[i,j] - lse[i]) * v[j]                 lse[i] = log( exp(sink) + sum_j exp(score[i,j]) )
 *
 * where f is a function of yours, and exp(sink) is 0 without sinks.
 *
 * Build the library with
 *
 *   cargo rustc --release --lib --features capi --crate-type cdylib
 *
 * (the result is target/release/libflashtile.so, .dylib or .dll), then a program with
 *
 *   cc -I src/capi program.c -L target/release -lflashtile -Wl,-rpath,target/release
 *
 * A whole program:
 *
 *   #include <flashtile.h>
 *   #include <stdio.h>
 *
 *   int main(void) {
 *       static float q[8 * 10 * 64], k[2 * 30 * 64], v[2 * 30 * 64], out[8 * 10 * 64];
 *       flashtile_tensor tq = flashtile_contiguous(q, FLASHTILE_F32, 1, 8, 10, 64);
 *       flashtile_tensor tk = flashtile_contiguous(k, FLASHTILE_F32, 1, 2, 30, 64);
 *       flashtile_tensor tv = flashtile_contiguous(v, FLASHTILE_F32, 1, 2, 30, 64);
 *       flashtile_tensor to = flashtile_contiguous(out, FLASHTILE_F32, 1, 8, 10, 64);
 *       flashtile_options options = FLASHTILE_OPTIONS_INIT;
 *       options.flags = FLASHTILE_CAUSAL;
 *       if (flashtile_attention(&tq, &tk, &tv, &to, NULL, &options) != FLASHTILE_OK) {
 *           fprintf(stderr, "%s\n", flashtile_last_error());
 *           return 1;
 *       }
 *       return 0;
 *   }
 *
 * Rules for every function:
 *
 * Errors.     A function that returns int32_t returns FLASHTILE_OK (0) or one of the codes below. After a failure,
 *             flashtile_last_error() gives a message with the numbers that disagree. A call is refused before anything is
 *             written. (After FLASHTILE_PANIC, outputs may be partly written.) No exception or panic unwinds into the caller.
 * Memory.     The caller owns all memory, but for that of handles (caches, rotary tables, prepared steps), and keeps it valid during
 *             the call. The library keeps no pointer, except as flashtile_prepare says. The caller
 *             guarantees that pointers lead to all the memory that shapes, strides and counts reach. Everything else is
 *             checked: null and misaligned pointers, sizes, strides that overflow, outputs that overlap.
 * Overlap.    Inputs may overlap each other. An output (or lse) may not: the range from its first to its last byte must not
 *             overlap that of any other tensor or list. So an output interleaved with its inputs in one buffer is refused
 *             even if no element is shared. Softmax may overwrite its input: pass the same memory and strides twice.
 * Threads.    Any function may be called from several threads at once, if no call writes what another call reads or writes.
 *             Each thread keeps its own scratch memory, so repeated calls of flashtile_attention with `threads = 1` don't
 *             allocate. flashtile_release() frees it. If scratch memory cannot be allocated, the process aborts.
 *             Before the library is unloaded, its threads must end: call flashtile_release() when no other call is running.
 * fork().     Threads don't survive a fork. If the parent has started some, the child's calls run on the calling thread alone; don't
 *             call flashtile_release() there.
 * Floats.     Every thread must have the default floating-point environment. With another rounding mode, results are wrong.
 *             Flush-to-zero (-ffast-math links it in) costs accuracy. If it differs between threads, bits differ, too.
 * Results.    The bits of a row depend on its own inputs, the level and the form, not on threads or the rest of the batch.
 *             (FLASHTILE_AUTO chooses the form from the rows and keys of a key/value head, their length and type, and the level.)
 */
#ifndef FLASHTILE_H
#define FLASHTILE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Errors ---- */

/* The numbers never change meaning. Later versions may add codes. */
enum flashtile_code {
    FLASHTILE_OK = 0,
    FLASHTILE_NULL_POINTER = 1,          /* a pointer is NULL that must not be */
    FLASHTILE_MISALIGNED = 2,            /* a pointer is not a multiple of its element's alignment */
    FLASHTILE_BAD_STRUCT_SIZE = 3,       /* struct_size is not set, or an option is set that is newer than this library */
    FLASHTILE_BAD_DTYPE = 4,             /* no such dtype, or not accepted for this tensor */
    FLASHTILE_BAD_RANK = 5,              /* a rank that is not accepted for this tensor */
    FLASHTILE_NEGATIVE_SIZE = 6,         /* a dimension, count, length or window below 0 */
    FLASHTILE_OVERLAP = 7,               /* an output shares memory with another tensor or a list, or tokens with their cache */
    FLASHTILE_OVERLAPPING_OUTPUT = 8,    /* two indices of an output (may) have the same element */
    FLASHTILE_TOO_LARGE = 9,             /* larger than any memory, or than the available memory for lists and copies; or above
                                            a limit of one call, which the message names: 2^32 - 1 query rows or 2^24
                                            key/value heads over all batches, rows of 2^20 elements, or, with masks or a
                                            score function, indices and positions of 2^30 */
    FLASHTILE_SHAPE_MISMATCH = 10,       /* dimensions that must agree don't */
    FLASHTILE_HEADS_NOT_DIVISIBLE = 11,  /* heads_q is not a multiple of heads_kv */
    FLASHTILE_NOT_BROADCASTABLE = 12,    /* a dimension of mask or bias is neither 1 nor that of the scores */
    FLASHTILE_WRONG_COUNT = 13,          /* a list does not have one entry for each sequence or head (starts: one more) */
    FLASHTILE_KEY_LENGTH_PAST_END = 14,  /* a key length is above seq_kv, a query length above seq_q, or a first key or query above
                                            the length of its sequence */
    FLASHTILE_INVALID_OPTION = 15,       /* an option has an invalid value, a flag is unknown, or an option has no effect
                                            without another option, or excludes another one */
    FLASHTILE_LEVEL_UNAVAILABLE = 16,    /* the processor or this build has no such level */
    FLASHTILE_AXIS_OUT_OF_RANGE = 17,    /* the tensor has no such axis */
    FLASHTILE_THREADS = 18,              /* threads could not be started, or this build has no threads */
    FLASHTILE_PANIC = 19,                /* a bug in the library, caught before it reached the caller: please report it */
    FLASHTILE_CLASS_OUT_OF_RANGE = 20,   /* a target is neither a class nor ignored */
    FLASHTILE_INVALID_STARTS = 21,       /* starts of packed sequences or of a page table that don't ascend from 0 or more, or
                                            end after the last row or entry */
    FLASHTILE_INVALID_PAGES = 22,        /* a page table with a page that the pool lacks, a length above the listed pages, or a
                                            page size of 0 */
    FLASHTILE_POSITION_OUT_OF_RANGE = 23, /* a position that is not in the rotary table */
    FLASHTILE_NOT_IN_CACHE = 24,         /* the cache has no such sequence or layer */
    FLASHTILE_CACHE_FULL = 25,           /* a sequence would be longer than the cache's capacity, or too few pages are free */
    FLASHTILE_NOT_RESERVED = 26,         /* more tokens are written than are reserved */
    FLASHTILE_NOT_WRITTEN = 27,          /* a layer lacks tokens that are reserved */
    FLASHTILE_CANNOT_TRUNCATE = 28,      /* more tokens than a sequence has, or tokens that it has lost */
    FLASHTILE_LOST_KEYS = 29,            /* a rotating cache has overwritten keys in a query's window */
    FLASHTILE_WRONG_CACHE = 30           /* the function is not for caches of this kind */
};

/* The message of the last failed call on this thread, in English, UTF-8; "" if no call failed. The library owns the string,
 * and it is valid until the next failure on this thread. */
const char *flashtile_last_error(void);

/* ---- Tensors ---- */

/* The element types. 0 is not a type, so that a dtype that was not set is refused. */
enum flashtile_dtype {
    FLASHTILE_F32 = 1,
    FLASHTILE_F16 = 2,  /* IEEE 754 binary16 */
    FLASHTILE_BF16 = 3, /* the upper half of a binary32 */
    FLASHTILE_F64 = 4,  /* for softmax only */
    FLASHTILE_BYTE = 5  /* masks: any byte but 0 is true */
};

/* The element at index i is ((T *)data)[sum of i[axis] * strides[axis]].
 *
 * Strides may have any value, also 0 (repeat) and negative ones. The strides of an output must not map two indices to the same
 * element. The innermost stride is best 1. A tensor with a dimension of 0 has no elements: its data and strides are ignored.
 * Inputs are never written, although `data` is not const. The layout of the struct is fixed. */
typedef struct flashtile_tensor {
    void *data;         /* the element at index 0 of every axis; with negative strides, it is not the lowest address */
    int32_t dtype;      /* enum flashtile_dtype */
    int32_t rank;       /* the number of axes: entries of shape and strides that are used */
    int64_t shape[4];
    int64_t strides[4]; /* in elements, not in bytes */
} flashtile_tensor;

/* a * b, at most the largest int64_t; 0 if a factor is negative, because every call refuses the dimension. */
static inline int64_t flashtile_stride_product(int64_t a, int64_t b) {
    const int64_t most = (int64_t)(~(uint64_t)0 >> 1);
    if (a <= 0 || b <= 0) return 0;
    return a > most / b ? most : a * b;
}

/* A dense tensor of rank 4, last axis innermost. Dimensions may have any value: the call that gets the tensor refuses those
 * that no memory could hold, unless one of them is 0. */
static inline flashtile_tensor flashtile_contiguous(void *data, int32_t dtype, int64_t n0, int64_t n1, int64_t n2,
                                                    int64_t n3) {
    flashtile_tensor t;
    t.data = data;
    t.dtype = dtype;
    t.rank = 4;
    t.shape[0] = n0;
    t.shape[1] = n1;
    t.shape[2] = n2;
    t.shape[3] = n3;
    t.strides[3] = 1;
    t.strides[2] = n3;
    t.strides[1] = flashtile_stride_product(n3, n2);
    t.strides[0] = flashtile_stride_product(t.strides[1], n1);
    return t;
}

/* A dense tensor of rank 3, last axis innermost: packed sequences [total, heads, dim], or an lse [batch, heads, seq_q]. */
static inline flashtile_tensor flashtile_contiguous3(void *data, int32_t dtype, int64_t n0, int64_t n1, int64_t n2) {
    flashtile_tensor t = flashtile_contiguous(data, dtype, n0, n1, n2, 1);
    t.rank = 3; /* the axis of size 1 is not used */
    return t;
}

/* ---- Rotary position embeddings ---- */

/* flashtile_rotary_…: the elements of a row that are turned together. */
enum flashtile_pairing {
    FLASHTILE_HALVES = 0,      /* element p and element p + dim / 2 (Llama, Qwen, Gemma in Hugging Face's layout) */
    FLASHTILE_INTERLEAVED = 1  /* elements 2 p and 2 p + 1 (GPT-J, the original paper) */
};

/* A table of cosines and sines. Each pair p = 0 .. dim / 2 - 1 of a row is turned by an angle that grows with the row's position:
 *
 *   angle[p]  = position * frequency[p]
 *   out[x(p)] = in[x(p)] * cos(angle[p]) - in[y(p)] * sin(angle[p])
 *   out[y(p)] = in[x(p)] * sin(angle[p]) + in[y(p)] * cos(angle[p])
 *
 * where x(p) and y(p) are the elements of the pair. Elements from dim on are not changed, so a dim below head_dim rotates a part of
 * each row. An element is widened exactly, rotated in f32 (each product and sum is rounded once) and rounded once to the output's
 * type. The table is computed in double and rounded once.
 *
 * A table never changes after it was made, so any number of calls may use it at once, until it is freed. */
typedef struct flashtile_rotary flashtile_rotary;

/* The table of the positions 0 .. positions - 1 with frequency[p] = base^(-2 p / dim), `4 * dim * positions` bytes. dim is even, base
 * positive and finite (FLASHTILE_INVALID_OPTION). Writes the table to *rotary; it is not written if the call fails. */
int32_t flashtile_rotary_new(int64_t dim, double base, int64_t positions, int32_t pairing, flashtile_rotary **rotary);

/* The same with a frequency for each pair, dim / 2 of them: all scalings that change frequencies (linear, Llama 3, YaRN). Every
 * cosine and sine is multiplied by magnitude, in double: 1, or YaRN's attention factor. All are finite (FLASHTILE_INVALID_OPTION). */
int32_t flashtile_rotary_from_frequencies(const double *frequencies, int64_t frequency_count, double magnitude,
                                          int64_t positions, int32_t pairing, flashtile_rotary **rotary);

/* The table of cosines and sines as a model file has it, [positions, dim / 2] each, of one type (f32, f16 or bf16): ONNX's cos_cache
 * and sin_cache. The numbers are copied. */
int32_t flashtile_rotary_from_tables(const flashtile_tensor *cos, const flashtile_tensor *sin, int32_t pairing,
                                     flashtile_rotary **rotary);

/* Frees a table, which may be NULL. */
void flashtile_rotary_free(flashtile_rotary *rotary);

/* How tokens [batch, heads, count, head_dim] are rotated. All heads of a token have the same position. The number of positions says
 * what they are of:
 *
 *   1               token i of every sequence has the position positions[0] + i
 *   batch           token i of sequence b has the position positions[b] + i
 *   batch * count   token i of sequence b has the position positions[b * count + i] (ONNX's position_ids)
 *   0, NULL         in caches only: the tokens follow those of their sequence, whose first one has the position 0
 *
 * Another number is FLASHTILE_WRONG_COUNT. Positions are 0 .. those of the table - 1 (FLASHTILE_POSITION_OUT_OF_RANGE). The layout of
 * the struct is fixed. */
typedef struct flashtile_rotation {
    const flashtile_rotary *rotary;
    const int64_t *positions;
    int64_t position_count;
} flashtile_rotation;

/* Rotates x into out, of the same shape: [batch, heads, count, head_dim], or packed tokens [total, heads, head_dim], which are a batch
 * of one. Types (f32, f16, bf16) and strides may differ. out may be x: pass the same memory and strides twice. Otherwise out must not
 * overlap x or the positions. Rows of fewer than dim elements are FLASHTILE_SHAPE_MISMATCH. Runs on the calling thread. */
int32_t flashtile_rotate(const flashtile_rotation *rotation, const flashtile_tensor *x, const flashtile_tensor *out);

/* ---- Caches of keys and values ---- */

/* A cache owns keys and values, and knows which are of which sequence. Attention reads them where they lie: see flashtile_cache_view.
 * There are three kinds. Functions that are not for all of them say so:
 *
 *                                  memory                                           for
 *   flashtile_cache_new            a row for each token, up to a capacity           a batch of sequences
 *   flashtile_cache_new_rotating   the first tokens, and a ring of the last ones    sliding windows, StreamingLLM
 *   flashtile_cache_new_paged      pages that sequences take as they grow, and      servers: sequences of unknown lengths, shared
 *                                  share, for all layers of a model                 prefixes
 *
 * The first two are caches of one layer: make one for each. Their sequences are the numbers 0 .. batch - 1. The sequences of a paged
 * cache are numbers that flashtile_cache_new_sequence and flashtile_cache_fork give. No two of these are the same in a process, so
 * the numbers of removed sequences and of other caches are refused (FLASHTILE_NOT_IN_CACHE).
 *
 * All memory is allocated when the cache is made, but for the tables of pages. A refused call has changed nothing.
 *
 * Threads. Calls that take a const cache (directly, or by flashtile_cache_view) may overlap. A call that takes a cache that is not const
 * changes it: no other call may use the cache meanwhile, from this or another thread; a score function of a call that reads a cache must
 * not change it. The library does not check that, and without it behavior is undefined. Different caches have nothing in common. */
typedef struct flashtile_cache flashtile_cache;

/* What is stored for each token of a layer. Appended keys and values may be f32, f16 or bf16, with any strides; they are rounded to
 * dtype once, to nearest with ties to even. The layout of the struct is fixed. */
typedef struct flashtile_cache_format {
    int32_t dtype;     /* FLASHTILE_F32, FLASHTILE_F16 or FLASHTILE_BF16 */
    int32_t reserved;  /* must be 0 */
    int64_t heads_kv;
    int64_t head_dim;  /* elements of a key */
    int64_t value_dim; /* elements of a value */
} flashtile_cache_format;

/* Empty sequences, each with room for `capacity` tokens. Writes the cache to *cache, as the next two; it is not written if the call
 * fails. Memory: keys [batch, heads_kv, capacity, head_dim], values [batch, heads_kv, capacity, value_dim]. */
int32_t flashtile_cache_new(const flashtile_cache_format *format, int64_t batch, int64_t capacity, flashtile_cache **cache);

/* Empty sequences that keep their first `first` tokens and their last `window` (at least 1). Token j of a sequence is
 * row j if j < first, else row first + (j - first) % window, of keys [batch, heads_kv, first + window, head_dim]. A token keeps its
 * position whatever is overwritten, so causal order, windows and ALiBi are right. Queries that see w keys, their own included, n of them
 * at a time, need window >= w + n - 1: attention with a window over overwritten keys is refused (FLASHTILE_LOST_KEYS). */
int32_t flashtile_cache_new_rotating(const flashtile_cache_format *format, int64_t batch, int64_t first, int64_t window,
                                     flashtile_cache **cache);

/* Pages of page_size tokens for all layers, and no sequences. Token j of a sequence is in row j % page_size of page
 * table[j / page_size], in every layer: keys [pages, heads_kv, page_size, head_dim]. There are at least one layer and one token of a
 * page. */
int32_t flashtile_cache_new_paged(const flashtile_cache_format *format, int64_t layers, int64_t pages, int64_t page_size,
                                  flashtile_cache **cache);

/* Frees a cache, which may be NULL. No call may read it afterwards, and so no step whose view has it may be run. */
void flashtile_cache_free(flashtile_cache *cache);

/* Adds n tokens to every sequence, after those that it has (not paged: FLASHTILE_WRONG_CACHE).
 *
 *   k          [batch, heads_kv, n, head_dim]
 *   v          [batch, heads_kv, n, value_dim]
 *   rotation   turns the keys, in f32 before they are rounded; NULL: they are stored as they are
 *
 * k and v must not overlap the cache (FLASHTILE_OVERLAP). No room: FLASHTILE_CACHE_FULL. Runs on the calling thread, as all functions of
 * caches. */
int32_t flashtile_cache_append(flashtile_cache *cache, const flashtile_tensor *k, const flashtile_tensor *v,
                               const flashtile_rotation *rotation);

/* Adds n tokens to one sequence: k [1, heads_kv, n, head_dim], v [1, heads_kv, n, value_dim]. A paged cache must have one layer
 * (FLASHTILE_WRONG_CACHE; with several see flashtile_cache_reserve), and takes the pages that the tokens need (FLASHTILE_CACHE_FULL). */
int32_t flashtile_cache_append_to(flashtile_cache *cache, int64_t sequence, const flashtile_tensor *k,
                                  const flashtile_tensor *v, const flashtile_rotation *rotation);

/* Forgets the tokens of a sequence after the first `length`; pages without tokens become free. More tokens than the sequence has, or
 * tokens that a rotating cache has overwritten (once there are more than first + window, length may be at most `first`):
 * FLASHTILE_CANNOT_TRUNCATE. */
int32_t flashtile_cache_truncate(flashtile_cache *cache, int64_t sequence, int64_t length);

/* Copies sequence `from` to sequence `to`, whose own tokens are forgotten (not paged). */
int32_t flashtile_cache_fork_to(flashtile_cache *cache, int64_t from, int64_t to);

/* Forgets all tokens; in a paged cache all sequences, whose numbers are refused from then on. */
int32_t flashtile_cache_clear(flashtile_cache *cache);

/* Paged: makes an empty sequence and writes its number to *sequence. */
int32_t flashtile_cache_new_sequence(flashtile_cache *cache, int64_t *sequence);

/* Paged: makes a sequence that shares all pages of sequence `from`, and writes its number to *sequence. Full pages stay shared; the last
 * one, if partly filled, is copied when one of its sequences reserves further tokens (copy on write). To share a prefix, truncate the
 * new sequence. Tokens that a layer lacks: FLASHTILE_NOT_WRITTEN. */
int32_t flashtile_cache_fork(flashtile_cache *cache, int64_t from, int64_t *sequence);

/* Paged: forgets a sequence. A page that no other sequence has becomes free. */
int32_t flashtile_cache_remove(flashtile_cache *cache, int64_t sequence);

/* Paged: makes a sequence `tokens` longer in all layers. It takes the pages that they need, or none (FLASHTILE_CACHE_FULL). So a step
 * runs out of pages before its first layer or not at all. The tokens are then to be written in every layer. */
int32_t flashtile_cache_reserve(flashtile_cache *cache, int64_t sequence, int64_t tokens);

/* Paged: writes the next n tokens of a sequence in one layer, after those that the layer has: k [1, heads_kv, n, head_dim],
 * v [1, heads_kv, n, value_dim], rotation as for flashtile_cache_append. More than are reserved: FLASHTILE_NOT_RESERVED. */
int32_t flashtile_cache_write(flashtile_cache *cache, int64_t layer, int64_t sequence, const flashtile_tensor *k,
                              const flashtile_tensor *v, const flashtile_rotation *rotation);

/* The tokens of a sequence: with overwritten ones of a rotating cache, and reserved ones of a paged cache. */
int32_t flashtile_cache_length(const flashtile_cache *cache, int64_t sequence, int64_t *length);

/* The tokens of a sequence that one layer has; without pages, those of flashtile_cache_length for layer 0. */
int32_t flashtile_cache_written(const flashtile_cache *cache, int64_t layer, int64_t sequence, int64_t *length);

/* Paged: the pages of a sequence, in the order of its tokens. Writes at most `capacity` of them to pages, and how many there are to
 * *count. If capacity is 0, pages may be NULL. */
int32_t flashtile_cache_pages(const flashtile_cache *cache, int64_t sequence, int64_t *pages, int64_t capacity,
                              int64_t *count);

/* The memory of a layer as tensors (0 without pages), in the shapes above. It may be read, not written. Rows of no token have no meaning.
 * The tensors are valid until the next call that changes the cache. */
int32_t flashtile_cache_memory(const flashtile_cache *cache, int64_t layer, flashtile_tensor *k, flashtile_tensor *v);

/* The sizes of a cache. Numbers that its kind does not have are 0. The layout of the struct is fixed. */
typedef struct flashtile_cache_info {
    flashtile_cache_format format;
    int64_t sequences;    /* the batch; paged: sequences that were made and not removed */
    int64_t layers;       /* 1 without pages */
    int64_t capacity;     /* tokens that there is memory for: of each sequence; paged: pages * page_size */
    int64_t first;        /* rotating: first tokens that are kept */
    int64_t window;       /* rotating: last tokens that are kept */
    int64_t pages;        /* paged: all pages */
    int64_t page_size;    /* paged: tokens of a page */
    int64_t free_pages;   /* paged: pages that no sequence has */
    int64_t shared_pages; /* paged: pages that more than one sequence has */
    int64_t bytes;        /* keys and values, in all layers */
} flashtile_cache_info;

/* Writes the sizes to *info. For shared_pages it reads a number for each page. */
int32_t flashtile_cache_get_info(const flashtile_cache *cache, flashtile_cache_info *info);

/* The part of a cache that a call reads: flashtile_options.cache. Start from FLASHTILE_CACHE_VIEW_INIT. The layout of the struct is
 * fixed. */
typedef struct flashtile_cache_view {
    const flashtile_cache *cache;
    int64_t layer;            /* of a paged cache; otherwise 0 */
    const int64_t *sequences; /* the batch, for a paged cache: any of its sequences, in any order; otherwise NULL: all of them */
    int64_t sequence_count;
} flashtile_cache_view;

#define FLASHTILE_CACHE_VIEW_INIT \
    { NULL, 0, NULL, 0 }

/* ---- Attention ---- */

/* flashtile_options.flags: the options that are set. A number without its flag is refused, not ignored. */
#define FLASHTILE_CAUSAL 1u        /* query at position p sees keys j <= p */
#define FLASHTILE_SCALE 2u         /* `scale` replaces 1 / sqrt(head_dim) */
#define FLASHTILE_SOFTCAP 4u       /* `softcap` is set */
#define FLASHTILE_WINDOW_LEFT 8u   /* `window_left` is set: keys j >= p - window_left only */
#define FLASHTILE_WINDOW_RIGHT 16u /* `window_right` is set: keys j <= p + window_right only */

/* flashtile_options.query_position: query i has the key position p = offset + i. */
enum flashtile_query_position {
    FLASHTILE_FROM_END = 0,   /* the last query is at the last key: offset = the sequence's keys - its queries */
    FLASHTILE_FROM_START = 1, /* offset = 0 */
    FLASHTILE_AT = 2,         /* offset = query_offset, which may be negative */
    FLASHTILE_PER_BATCH = 3   /* offset = query_offsets[b] */
};

/* flashtile_options.alibi: subtracts slope * |p - j| from the scores of query head h of sequence b. */
enum flashtile_alibi {
    FLASHTILE_NO_ALIBI = 0,
    FLASHTILE_ALIBI_STANDARD = 1, /* the published slopes for heads_q */
    FLASHTILE_ALIBI_PER_HEAD = 2, /* alibi_slopes[h] */
    FLASHTILE_ALIBI_PER_BATCH_AND_HEAD = 3 /* alibi_slopes[b * heads_q + h] */
};

/* flashtile_options.form: the algorithm. The results of the two forms agree within rounding. */
enum flashtile_form {
    FLASHTILE_AUTO = 0,   /* chosen from shapes, types and level */
    FLASHTILE_DECODE = 1, /* for few queries per key/value head */
    FLASHTILE_PREFILL = 2 /* for many queries per key/value head */
};

/* flashtile_mask.kind: which keys query i sees, where p is its position.
 *
 *                          numbers                              lists
 *   DOCUMENTS              0: batches with numbers of their     0: document of each query, [batch, seq_q]
 *                             own; 0 or 1: one row for all      1: document of each key, [batch, seq_kv]
 *   PREFIX_LM                                                   0: starts, 1: ends of ranges of positions, ascending and apart
 *   CHUNKED                0: size, at least 1
 *   FIRST_AND_LAST         0: first keys, 1: keys before p
 *   TREE                                                        0: parent of each draft, [seq_q]: an earlier draft, or -1
 *   BLOCK_SPARSE           0: queries, 1: keys of a block;      0: not 0 where a block is visible,
 *                          2: batch, 3: heads of the list;         [batch, heads, ceil(seq_q / queries), ceil(seq_kv / keys)]
 *                             0 or 1: one for all
 *   KEY_STARTS                                                  0: first visible key, [batch] (these are not the key_starts of
 *                                                                  the options; for left padding, first_keys is better)
 *   BLOCK_SPARSE_ROWS      0: queries, 1: keys of a block       0: starts of compressed rows (CSR), [ceil(seq_q / queries) + 1]
 *                                                               1: columns: visible blocks of keys of each row
 *
 * With packed sequences and pages, batch is the number of sequences, and seq_q and seq_kv are the most queries and keys of one.
 *
 * Causal order is a part of PREFIX_LM, FIRST_AND_LAST and TREE. With FLASHTILE_CAUSAL beside it, PREFIX_LM would hide what its
 * ranges show. */
enum flashtile_mask_kind {
    FLASHTILE_DOCUMENTS = 1,        /* the keys with the query's document number (packed sequences) */
    FLASHTILE_PREFIX_LM = 2,        /* j <= p, and the whole range that p is in (a prefix, images in a prompt) */
    FLASHTILE_CHUNKED = 3,          /* the keys of the chunk that p is in: j / size == p / size, rounded down */
    FLASHTILE_FIRST_AND_LAST = 4,   /* j <= p, and j < first or j >= p - before (StreamingLLM) */
    FLASHTILE_TREE = 5,             /* all keys before the drafts, the query's own and those of its ancestors; key p is the
                                       query's own (speculative decoding) */
    FLASHTILE_BLOCK_SPARSE = 6,     /* whole blocks of queries and keys */
    FLASHTILE_KEY_STARTS = 7,       /* j >= start[b]; a start below 0 is 0 */
    FLASHTILE_BLOCK_SPARSE_ROWS = 8 /* whole blocks, the same for all batches and heads */
};

/* A mask by rule: work that it rules out is not done. Start from FLASHTILE_MASK_INIT. The layout of the struct is fixed. Numbers
 * and lists that a kind does not have must be 0 and NULL. The lists are read once in each call, which takes time in proportion. */
typedef struct flashtile_mask {
    int32_t kind;            /* enum flashtile_mask_kind */
    int32_t reserved;        /* must be 0 */
    int64_t numbers[4];      /* not negative */
    const int64_t *lists[2];
    int64_t counts[2];       /* entries of each list */
} flashtile_mask;

#define FLASHTILE_MASK_INIT \
    { 0, 0, { 0, 0, 0, 0 }, { NULL, NULL }, { 0, 0 } }

/* flashtile_score_table.kind: a bias for each query head h and relative position, where p is the query's position.
 *
 *                     numbers                             table
 *   RELATIVE_BIAS     0: the largest distance, D          [heads_q, 2 * D + 1]: adds table[h][D + d] where d = p - j, held
 *                                                         between -D and D: keys long before the query come last
 *   T5_BIAS           0: the distance from which on       [buckets, heads_q]: adds table[bucket of p - j][h], as T5 and its
 *                        all share the last bucket,       relatives have it (relative_attention_bias)
 *                        128 in T5; at most 2^20
 *                     1: 1 for an encoder, whose half
 *                        of the buckets is for keys
 *                        after the query; 0 for a
 *                        decoder
 *   WINDOW_BIAS       0: height, 1: width of a window,    [(2 * height - 1) * (2 * width - 1), heads_q]: adds the entry of
 *                        whose places are the queries     the offset (y, x) from the key's place to the query's, as Swin has
 *                        and the keys, row by row         it (relative_position_bias_table) */
enum flashtile_score_table_kind {
    FLASHTILE_RELATIVE_BIAS = 1, /* a number for each distance */
    FLASHTILE_T5_BIAS = 2,       /* a number for each bucket of distances */
    FLASHTILE_WINDOW_BIAS = 3    /* a number for each offset in two dimensions */
};

/* A table of biases, which takes the place of a bias tensor with an element for each pair. Start from
 * FLASHTILE_SCORE_TABLE_INIT. The layout of the struct is fixed. Numbers that a kind does not have must be 0. The table is read
 * once in each call, which takes time in proportion. */
typedef struct flashtile_score_table {
    int32_t kind;       /* enum flashtile_score_table_kind */
    int32_t reserved;   /* must be 0 */
    int64_t numbers[4]; /* not negative */
    const float *table;
    int64_t count;      /* entries of table */
} flashtile_score_table;

#define FLASHTILE_SCORE_TABLE_INIT \
    { 0, 0, { 0, 0, 0, 0 }, NULL, 0 }

/* The query whose scores a score function gets, and the first of their keys. Later versions may add members at the end. */
typedef struct flashtile_row {
    int64_t batch;     /* the sequence */
    int64_t head;      /* query head */
    int64_t query;     /* index in its sequence */
    int64_t position;  /* p: see flashtile_query_position */
    int64_t first_key; /* scores[n] is that of key first_key + n */
} flashtile_row;

/* A score function. It changes scores[0] to scores[count - 1] in place, after all other changes: numbers in natural units
 * (scale * dot(q, k), modified). -inf hides the key. NaN makes the row NaN, and so does 2.3e38 or more.
 *
 * It may be called
 *   - from several threads at once, so it must not change what `context` leads to without a lock or atomics
 *   - for any run of up to some hundred keys, in any order, so a score may depend on its own query and key alone
 *   - for keys that a mask hides; their scores may be anything, also NaN, and have no effect
 *
 * It must return: an exception of C++, or longjmp, must not leave it. It may call functions of this library, also
 * flashtile_attention, but not with tensors that the outer call writes. It can't end the call; to report an error, note it in
 * `context`. */
typedef void (*flashtile_score_row)(void *context, const flashtile_row *row, float *scores, int64_t count);

/* The pages of each sequence, in the order of its keys: key j is in slot j % page_size of page j / page_size of the sequence's
 * list. Start from FLASHTILE_PAGE_TABLE_INIT. The layout of the struct is fixed. The lists are read where they lie, so one table
 * serves all layers of a model; each layer has a pool of its own.
 *
 *   rectangular (vLLM)             width: entries of each sequence; pages [sequences, width]; starts is NULL
 *   compressed (FlashInfer, CSR)   starts [sequences + 1]: the pages of sequence b are the entries from starts[b] up to
 *                                  starts[b + 1] (exclusive); width is 0
 *
 * Entries past a sequence's length are never used. They may be anything, such as -1. */
typedef struct flashtile_page_table {
    const int32_t *pages32; /* the pages of all sequences: one of these two lists, the other is NULL */
    const int64_t *pages64;
    int64_t page_count;     /* entries of pages32 or pages64 */
    int64_t width;          /* of a rectangular table */
    const int64_t *starts;  /* of a compressed table: ascending, at most page_count */
    int64_t start_count;    /* sequences + 1 */
    const int64_t *lengths; /* [sequences]: the keys of each; at most page_size times its entries */
    int64_t length_count;   /* sequences */
    int64_t page_size;      /* keys of a page, at least 1: axis 2 of k and v */
} flashtile_page_table;

#define FLASHTILE_PAGE_TABLE_INIT \
    { NULL, NULL, 0, 0, NULL, 0, NULL, 0, 0 }

/* All zero except struct_size is plain attention: start from FLASHTILE_OPTIONS_INIT.
 *
 * Later versions add members at the end. No version has padding: every byte of the struct belongs to a member. A library accepts
 * the smaller struct of an older caller. It accepts the larger struct of a newer caller if the members that it does not know are
 * zero. It refuses a struct_size that no version has, for example one that ends inside a member.
 *
 * Masks intersect: a key is visible if causal order, window, key lengths, mask and every one of `masks` allow it. */
typedef struct flashtile_options {
    size_t struct_size;           /* sizeof(flashtile_options) */
    uint32_t flags;               /* FLASHTILE_CAUSAL and so on */
    int32_t threads;              /* 0: flashtile_default_threads() threads; 1: the calling thread; n up to 1024: n
                                     threads, the calling one among them; the others are started once per n and
                                     kept. If they cannot be started, the call is refused, and the next call tries
                                     again. Small work always runs on the calling thread. */
    float scale;                  /* any sign; magnitude up to 2.3e38 and up to 3.4e38 times the softcap */
    float softcap;                /* cap * tanh(score / cap), before biases; a normal number above 0, up to 2.3e38 */
    int64_t window_left;          /* not negative */
    int64_t window_right;         /* not negative */
    int32_t query_position;       /* enum flashtile_query_position */
    int32_t alibi;                /* enum flashtile_alibi */
    int64_t query_offset;         /* for FLASHTILE_AT */
    const int64_t *query_offsets; /* for FLASHTILE_PER_BATCH, [batch] */
    int64_t query_offset_count;   /* batch */
    const int64_t *key_lengths;   /* [batch]: keys from this index on are padding and do not affect results; NULL: seq_kv */
    int64_t key_length_count;     /* batch */
    const float *alibi_slopes;    /* for FLASHTILE_ALIBI_PER_HEAD, [heads_q]; for FLASHTILE_ALIBI_PER_BATCH_AND_HEAD,
                                     [batch, heads_q] */
    int64_t alibi_slope_count;    /* heads_q or batch * heads_q */
    const flashtile_tensor *mask; /* bytes, not 0 where the query may attend to the key; NULL: no mask.
                                     [batch, heads_q, seq_q, seq_kv]: a dimension of 1 is repeated; a lower rank has no
                                     leading dimensions, which are repeated, too */
    const flashtile_tensor *bias; /* f32, f16 or bf16, added to the scores; -inf hides the key; NULL: no bias. Shape as mask */
    const char *level;            /* an instruction set, such as "avx2" or "portable"; NULL: the best of this processor */
    int32_t form;                 /* enum flashtile_form */
    int32_t reserved;             /* must be 0 */
    const float *sinks;           /* [heads_q]: a score of each query head that has no key and whose value is 0 (gpt-oss); it
                                     counts in lse. Below +inf; -inf is no sink. When results are merged, only one of them
                                     may have the sinks. NULL: no sinks */
    int64_t sink_count;           /* heads_q */
    const flashtile_mask *masks;  /* any number of masks by rule */
    int64_t mask_count;           /* 0: none */
    flashtile_score_row score_row; /* a score function; NULL: none */
    void *score_context;          /* what score_row is called with */
    /* Sequences of their own lengths: see "Sequences" at flashtile_attention. */
    const int64_t *query_lengths; /* [batch]: queries from this index on are padding: they are not computed, and their rows of
                                     out and lse are left as they are; NULL: seq_q. Not with query_starts */
    int64_t query_length_count;   /* batch */
    const int64_t *query_starts;  /* packed queries: those of sequence b are the rows from query_starts[b] up to
                                     query_starts[b + 1] (exclusive). Ascending, at most the number of rows; rows of no
                                     sequence are left as they are. NULL: not packed */
    int64_t query_start_count;    /* sequences + 1 */
    const int64_t *key_starts;    /* packed keys and values, as query_starts; NULL: not packed. Not with key_lengths or
                                     page_table. Left padding is another thing: first_keys */
    int64_t key_start_count;      /* sequences + 1 */
    const flashtile_page_table *page_table; /* k and v are a pool of pages; NULL: they are not. Not with key_lengths */
    const flashtile_score_table *score_tables; /* any number of tables of biases by relative position */
    int64_t score_table_count;    /* 0: none */
    const int64_t *first_queries; /* [batch], left padding: queries before this index are not computed, and their rows of out and
                                     lse are left as they are; NULL: 0. Not with query_starts */
    int64_t first_query_count;    /* batch */
    const int64_t *first_keys;    /* [batch], left padding: keys before this index are not read, and positions are counted from
                                     it; NULL: 0. Not with key_starts or page_table */
    int64_t first_key_count;      /* batch */
    const flashtile_cache_view *cache; /* keys and values of a cache: k and v of the call are NULL. Not with key_lengths, key_starts
                                     or page_table, and with first_keys for caches of flashtile_cache_new alone. NULL: no cache */
} flashtile_options;

/* Every member is listed, so that neither C nor C++ warns about missing initializers. */
#define FLASHTILE_OPTIONS_INIT                                                                                           \
    { sizeof(flashtile_options), 0, 0, 0, 0, 0, 0, 0, 0, 0, NULL, 0, NULL, 0, NULL, 0, NULL, NULL, NULL, 0, 0, NULL, 0, NULL, \
      0, NULL, NULL, NULL, 0, NULL, 0, NULL, 0, NULL, NULL, 0, NULL, 0, NULL, 0, NULL }

/* Attention.
 *
 *   q     [batch, heads_q, seq_q, head_dim]
 *   k     [batch, heads_kv, seq_kv, head_dim]    heads_q is a multiple of heads_kv: head h uses h / (heads_q / heads_kv)
 *   v     [batch, heads_kv, seq_kv, value_dim]
 *   out   [batch, heads_q, seq_q, value_dim]     written
 *   lse   [batch, heads_q, seq_q], f32           written, natural logarithm; NULL: not computed
 *   options                                      NULL: plain attention
 *
 * q, k, v and out are each f32, f16 or bf16. Every dimension may be 0 (heads_kv only together with heads_q). A query that sees
 * no key has an output of 0 and an lse of -inf (with sinks: of its head's sink). A hidden key never affects the output, even if it
 * holds NaN. A score of -inf hides its key. A visible NaN, or a score of +inf, makes the rows that see it NaN. After the softcap,
 * the bias is added, then ALiBi, then the score tables in their order, and score_row is called last.
 *
 * Sequences. A batch is a list of sequences, each with its own numbers of queries and keys. The options say where they are:
 *
 *   padded          query_lengths, key_lengths   the first rows of a batch index
 *   left-padded     first_queries, first_keys    the rows of a batch index from these on, up to the lengths (if they are given)
 *   packed queries  query_starts                 q and out [total, heads_q, dim], or [1, heads_q, total, dim];
 *                                                lse [1, heads_q, total]
 *   packed keys     key_starts                   k and v [total, heads_kv, dim], or [1, heads_kv, total, dim]
 *   pages           page_table                   k and v [pages, heads_kv, page_size, dim]
 *   a cache         cache                        k and v are NULL
 *
 * Queries and keys may be kept in different ways; only the number of sequences must be the same. Any strides will do: a pool
 * [pages, page_size, heads_kv, dim], or one with keys and values beside each other, is described by its strides. A mask or bias
 * is [sequences, heads_q, most queries, most keys of a sequence]; padded sequences have rows and columns for their padding there.
 * With a cache of flashtile_cache_new, the most keys are its capacity; with a rotating one, lost keys count, and are hidden.
 * Query positions are counted in each sequence, from its first key on. So are the keys and queries of `masks` and of score_row.
 * The bits of a sequence's rows are those of a call with that sequence alone.
 *
 * The lists must not overlap an output. As all memory, they must not change during the call: an entry that changes after it was
 * checked is undefined behavior. */
int32_t flashtile_attention(const flashtile_tensor *q, const flashtile_tensor *k, const flashtile_tensor *v,
                            const flashtile_tensor *out, const flashtile_tensor *lse, const flashtile_options *options);

/* Sums of each key's probabilities over the queries, after attention: what cache eviction needs (H2O, SnapKV).
 *
 *   sums[b,h,j] = sum over i of exp(score[b,h,i,j] - lse[b,h,i])        for every query i that sees key j
 *
 *   q, k, v, options   as in flashtile_attention; values are checked and not read
 *   lse                [batch, heads_q, seq_q], f32                 read: as flashtile_attention has written it
 *   sums               [batch, heads_q, seq_kv], f32                written; with packed sequences and pages
 *                                                                   [sequences, heads_q, most keys of a sequence]; with
 *                                                                   flashtile_cache_new, seq_kv is the capacity
 *
 * With left padding, lse has rows and sums has elements for the padding, as a mask has.
 *
 * A key that no query sees has a sum of exactly 0, whatever it holds, and so has padding. A query that sees no key adds nothing. A
 * query whose lse is NaN makes the keys that it sees NaN, and no others. q and lse may be some of the queries, with their positions
 * in the options. sums must not overlap anything else. */
int32_t flashtile_key_sums(const flashtile_tensor *q, const flashtile_tensor *k, const flashtile_tensor *v,
                           const flashtile_tensor *lse, const flashtile_tensor *sums, const flashtile_options *options);

/* The plan of a call with these tensors, as text: form, tiles, level, whether it uses threads. The text is for people and may
 * change with any version.
 *
 * Writes the text to `text`, truncated to capacity bytes with the terminating zero, and the whole length without the zero to
 * *length, which may be NULL. If capacity is 0, text may be NULL. Elements are not read, but `data` is checked as in all calls,
 * and lists are read. */
int32_t flashtile_plan(const flashtile_tensor *q, const flashtile_tensor *k, const flashtile_tensor *v,
                       const flashtile_options *options, char *text, size_t capacity, size_t *length);

/* A call that is planned once for many tensors of the same shapes, such as all layers of a server's step. Options, lists and the page
 * table are checked when it is planned, and not in each run:
 *
 *   flashtile_prepared *step = NULL;
 *   flashtile_prepare(&q, &k, &v, &options, &step);             once
 *   for each step:
 *       flashtile_prepared_replan(step, &q, &k, &v, &options);  other lengths, tables and numbers of queries
 *       for each layer:
 *           flashtile_prepared_run(step, &q, &k, &v, &out, NULL);
 *   flashtile_prepared_free(step);
 *
 * The options struct is copied. What its pointers lead to is not: lists, page table, mask, bias, masks, sinks, slopes and
 * score_context must stay, and must not change, until the step is planned again or freed. Only *cache may change: each run reads it
 * anew, so that a step runs over the layers of a paged cache, or over a cache for each layer, with sequences of the planned lengths.
 * Planning reads the lengths of a cache alone: tokens that are reserved need not be written yet.
 *
 * Of q, k and v, planning reads types and shapes alone. Runs have tensors of the same shapes; types, strides and memory may differ.
 * Of pages, the pool may differ, too. The results are those of flashtile_attention, bit for bit, except that the form stays that of
 * the prepared types.
 *
 * A step may be run by several threads at once, with other outputs. While it is planned again or freed, no other call may use it. */
typedef struct flashtile_prepared flashtile_prepared;

/* Plans, and writes the step to *prepared; it is not written if the call fails. */
int32_t flashtile_prepare(const flashtile_tensor *q, const flashtile_tensor *k, const flashtile_tensor *v,
                          const flashtile_options *options, flashtile_prepared **prepared);

/* Plans again, with any options and shapes. It keeps the memory of the plans before. If it fails, the step is as before, with its old
 * options: their lists must still be there if it is run. */
int32_t flashtile_prepared_replan(flashtile_prepared *step, const flashtile_tensor *q, const flashtile_tensor *k,
                                  const flashtile_tensor *v, const flashtile_options *options);

/* Computes the step. Shapes other than the prepared ones are refused (FLASHTILE_SHAPE_MISMATCH). Tensors as in flashtile_attention. */
int32_t flashtile_prepared_run(const flashtile_prepared *step, const flashtile_tensor *q, const flashtile_tensor *k,
                               const flashtile_tensor *v, const flashtile_tensor *out, const flashtile_tensor *lse);

/* Frees a step, which may be NULL. */
void flashtile_prepared_free(flashtile_prepared *step);

/* Merges the attention over other keys, (out_b, lse_b), into (out_a, lse_a), in f32. With w = exp(lse_a) + exp(lse_b):
 *
 *   out_a = (exp(lse_a) * out_a + exp(lse_b) * out_b) / w          lse_a = log w
 *
 *   out_a, out_b   [batch, heads, seq_q, value_dim]
 *   lse_a, lse_b   [batch, heads, seq_q]
 *
 * (0, -inf) is the identity: start from it. An lse in f32 has a relative error of 2^-24, so exp(lse) has a relative error of about
 * |lse| * 2^-24: 6e-4 at lse = 1e4. Runs on the calling thread. */
int32_t flashtile_merge(const flashtile_tensor *out_a, const flashtile_tensor *lse_a, const flashtile_tensor *out_b,
                        const flashtile_tensor *lse_b);

/* ---- Softmax ---- */

/* Softmax along one axis of a tensor of rank 1 to 4. The axis is counted from 0, or from the end as -1, -2 and so on:
 *
 *   softmax       out = exp(scale * (x - max)) / sum          sum = sum of exp(scale * (x - max)) along the axis
 *   log_softmax   out = scale * (x - max) - log(sum)
 *
 * `scale` is the inverse temperature: 1 for the plain softmax. x and out are f32, f16, bf16 or f64, of the same type and shape; out
 * may also be f32 where x is f16 or bf16.
 * An element of -inf gives 0 (-inf for log_softmax), also in a line with only -inf. A NaN makes its line NaN, but no other line. A
 * +inf makes its line NaN; with a negative scale it is hidden instead. `scale` is rounded to f32, except for f64. A scale that is
 * not finite, or not finite after rounding, is refused with FLASHTILE_INVALID_OPTION. So a temperature of 0 has no scale: take the
 * largest element (argmax) instead. Large calls run on the threads of `threads = 0`. Blocks of a tensor that is not dense
 * from its axis on are copied. */
int32_t flashtile_softmax(const flashtile_tensor *x, const flashtile_tensor *out, int32_t axis, double scale);
int32_t flashtile_log_softmax(const flashtile_tensor *x, const flashtile_tensor *out, int32_t axis, double scale);

/* The same with a mask, a bias, or both, which have the shape of x or lack leading axes; axes of size 1 are repeated:
 *
 *   score = scale * x + bias, or -inf where the mask is 0        mask: bytes; bias: f32, f16 or bf16; NULL: none
 *   out   = softmax, log_softmax or logsumexp of the scores
 *
 * x and bias may be anything where they are hidden, also NaN; a bias of -inf hides, too. A line with only hidden elements gives
 * 0 (-inf for the logarithms). Tensors may have any strides. out may be x: pass the same memory and strides twice. In
 * flashtile_masked_logsumexp, out is as for flashtile_logsumexp, below. */
int32_t flashtile_masked_softmax(const flashtile_tensor *x, const flashtile_tensor *out, const flashtile_tensor *mask,
                                 const flashtile_tensor *bias, int32_t axis, double scale);
int32_t flashtile_masked_log_softmax(const flashtile_tensor *x, const flashtile_tensor *out, const flashtile_tensor *mask,
                                     const flashtile_tensor *bias, int32_t axis, double scale);
int32_t flashtile_masked_logsumexp(const flashtile_tensor *x, const flashtile_tensor *out, const flashtile_tensor *mask,
                                   const flashtile_tensor *bias, int32_t axis, double scale);

/* Gradients: dx from dy and the result y of the forward function. dx may be dy:
 *
 *   softmax       dx = scale * y * (dy - sum of dy * y)
 *   log_softmax   dx = scale * (dy - exp(y) * sum of dy)
 *
 * For softmax, dx is 0 where y is 0, for any dy. For log_softmax, a dy of NaN or infinity counts as 0 where y is -inf. */
int32_t flashtile_softmax_backward(const flashtile_tensor *y, const flashtile_tensor *dy, const flashtile_tensor *dx,
                                   int32_t axis, double scale);
int32_t flashtile_log_softmax_backward(const flashtile_tensor *y, const flashtile_tensor *dy, const flashtile_tensor *dx,
                                       int32_t axis, double scale);

/* log(sum of exp(scale * x)) along an axis. out has the shape of x, but 1 along the axis. It is f32, or f64 where x is f64.
 * A line with only -inf, and one of length 0, gives -inf. Axis, scale and NaN are as for flashtile_softmax. */
int32_t flashtile_logsumexp(const flashtile_tensor *x, const flashtile_tensor *out, int32_t axis, double scale);

/* flashtile_cross_entropy_options.flags. */
#define FLASHTILE_IGNORE_INDEX 1u /* ignore_index counts */

/* flashtile_cross_entropy_options.reduction. */
enum flashtile_reduction {
    FLASHTILE_MEAN = 0,         /* the sum, divided by the sum of the class weights of the targets that are not ignored (without
                                   class weights, by their number); NaN if that is 0 */
    FLASHTILE_SUM = 1,
    FLASHTILE_NO_REDUCTION = 2  /* one loss for each row */
};

/* All zero is the mean, without smoothing, weights and ignored targets. The layout of the struct is fixed. */
typedef struct flashtile_cross_entropy_options {
    uint32_t flags;             /* FLASHTILE_IGNORE_INDEX, or 0 */
    int32_t reduction;          /* enum flashtile_reduction */
    int64_t ignore_index;       /* a target that is ignored; it need not be a class. By default none is (in PyTorch, -100 is) */
    double label_smoothing;     /* e, from 0 to 1 */
    const float *class_weights; /* w, one for each class: finite and not negative; NULL: all 1 */
    int64_t class_weight_count; /* the number of classes, or 0 */
    int64_t reserved[2];        /* must be 0 */
} flashtile_cross_entropy_options;

#define FLASHTILE_CROSS_ENTROPY_OPTIONS_INIT \
    { 0, 0, 0, 0, NULL, 0, { 0, 0 } }

/* The cross-entropy loss of PyTorch. Logits of any rank have an axis of K classes, as in [N, K] or [N, K, H, W]. There is a row
 * for each line along that axis, and targets has the class of each row, row-major in the order of the other axes. A row with the
 * target t has the loss
 *
 *   (1 - e) * w[t] * (lse - x[t])  +  e/K * sum_c w[c] * (lse - x[c])          lse = log( sum_c exp(x[c]) )
 *
 * loss is f32, or f64 for logits of f64. With FLASHTILE_NO_REDUCTION it has the shape of the logits, but 1 along the axis;
 * otherwise it has one element. An ignored row has a loss of exactly 0, even if its logits are NaN. A logit of -inf hides its
 * class: where that has a share in the loss, the loss is +inf. options may be NULL. */
int32_t flashtile_cross_entropy(const flashtile_tensor *logits, const int64_t *targets, int64_t target_count,
                                const flashtile_tensor *loss, int32_t axis,
                                const flashtile_cross_entropy_options *options);

/* Its gradient with respect to the logits, of their type and shape. upstream is the gradient with respect to the loss, of the
 * loss's type and shape. With p = softmax(x) and W = sum of w:
 *
 *   gradient[c] = g * ((1 - e) * w[t] * (p[c] - (c == t)) + e/K * (W * p[c] - w[c]))
 *
 * g is upstream; for FLASHTILE_MEAN it is upstream divided by the sum of the targets' weights. The gradient of an ignored row is 0. */
int32_t flashtile_cross_entropy_backward(const flashtile_tensor *logits, const int64_t *targets, int64_t target_count,
                                         const flashtile_tensor *upstream, const flashtile_tensor *gradient, int32_t axis,
                                         const flashtile_cross_entropy_options *options);

/* ---- The library ---- */

/* "0.1.0". */
const char *flashtile_version(void);

/* The best instruction set of this processor, such as "avx2". Calls use it unless options.level is set. */
const char *flashtile_level(void);

/* The number of threads of `threads = 0`: RAYON_NUM_THREADS as it was at the first use, otherwise one per core. Starts none. */
int32_t flashtile_default_threads(void);

/* Frees the scratch memory of the calling thread, and ends all threads that the library started. The next call that needs them
 * makes them again. Without this function, scratch memory is freed when its thread ends, and the library's threads stay.
 *
 * It returns when those threads have ended. After that the library may be unloaded. Calls that are running on other threads are
 * not disturbed: the threads of such a call end before the call returns. */
void flashtile_release(void);

#ifdef __cplusplus
}
#endif

#endif
