/* flashtile: exact scaled-dot-product attention on CPUs.
 *
 *   score[i,j] = softcap( scale * dot(q[i], k[j]) ) + bias[i,j]        for every key j that query i may see
 *   out[i]     = sum_j softmax(score[i,:])[j] * v[j]                   lse[i] = log sum_j exp(score[i,j])
 *
 * Build the library with
 *
 *   cargo rustc --release --lib --features capi --crate-type cdylib
 *
 * (target/release/libflashtile.so, .dylib or .dll), then a program with
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
 * Errors.     A function that returns int32_t returns FLASHTILE_OK (0) or one of the codes below; flashtile_last_error()
 *             then says what was wrong, with the numbers that disagree. A call is refused before anything is written
 *             (FLASHTILE_PANIC is no refusal: outputs may be half written). Nothing is thrown or unwound into the caller.
 * Memory.     The caller owns all memory and keeps it valid for the length of the call; the library keeps no pointer. You
 *             vouch that pointers lead to as much memory as shapes, strides and counts reach. All else is checked: null and
 *             misaligned pointers, sizes, strides that overflow, outputs that overlap.
 * Overlap.    Inputs may overlap each other. An output (or lse) may not: its bytes, from the first element to the last,
 *             must lie apart from those of every other tensor, gaps included. So an output interleaved with its inputs in
 *             one buffer is refused even if no element is shared. Softmax may overwrite its input: pass the same memory
 *             and strides twice.
 * Threads.    Any function may be called from any number of threads at once, if no call writes what another reads or writes.
 *             Each thread keeps scratch memory of its own, so repeated calls of flashtile_attention with `threads = 1` don't
 *             allocate: flashtile_release(). Where there is no memory for scratch, the process aborts.
 *             Before the library is unloaded, end its threads: call flashtile_release() when no other call is under way.
 * fork().     Threads don't survive a fork. In the child use `threads = 1`, and don't call flashtile_release().
 * Floats.     Every thread must have the default floating-point environment. With another rounding mode results are wrong;
 *             flush-to-zero (-ffast-math links it in) costs accuracy, and bits where threads differ in it.
 * Results.    The bits of a row depend on its own inputs, the level and the form: not on threads or the batch around it.
 *             (FLASHTILE_AUTO chooses the form by the rows and keys of a key/value head, their length and type, and the level.)
 */
#ifndef FLASHTILE_H
#define FLASHTILE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Errors ---- */

/* The numbers never change meaning; later versions may add some. */
enum flashtile_code {
    FLASHTILE_OK = 0,
    FLASHTILE_NULL_POINTER = 1,          /* a pointer that must not be is NULL */
    FLASHTILE_MISALIGNED = 2,            /* a pointer is no multiple of its element's alignment */
    FLASHTILE_BAD_STRUCT_SIZE = 3,       /* struct_size was not set, or a newer option is set than this library knows */
    FLASHTILE_BAD_DTYPE = 4,             /* no such dtype, or not taken there */
    FLASHTILE_BAD_RANK = 5,              /* a rank that is not taken there */
    FLASHTILE_NEGATIVE_SIZE = 6,         /* a dimension, count, length or window below 0 */
    FLASHTILE_OVERLAP = 7,               /* an output shares memory with another tensor */
    FLASHTILE_OVERLAPPING_OUTPUT = 8,    /* two indices of an output (may) lead to one element */
    FLASHTILE_TOO_LARGE = 9,             /* more than any memory could hold, or than there is for lists and copies; or more
                                            than one call takes, which the message names: 2^32 - 1 query rows or 2^24 key/value heads in all batches together, or rows of
                                            more than 2^20 elements */
    FLASHTILE_SHAPE_MISMATCH = 10,       /* dimensions that must agree don't */
    FLASHTILE_HEADS_NOT_DIVISIBLE = 11,  /* heads_q is no multiple of heads_kv */
    FLASHTILE_NOT_BROADCASTABLE = 12,    /* a dimension of mask or bias is neither 1 nor that of the scores */
    FLASHTILE_WRONG_COUNT = 13,          /* a list has not one entry for each batch or head */
    FLASHTILE_KEY_LENGTH_PAST_END = 14,  /* a key length is above seq_kv */
    FLASHTILE_INVALID_OPTION = 15,       /* an option has a value that it can't take (an unknown flag, too), or has no effect
                                            without another */
    FLASHTILE_LEVEL_UNAVAILABLE = 16,    /* the processor or this build has no such level */
    FLASHTILE_AXIS_OUT_OF_RANGE = 17,    /* the tensor has no such axis */
    FLASHTILE_THREADS = 18,              /* threads could not be started, or this build has none to start */
    FLASHTILE_PANIC = 19                 /* a fault of the library, stopped at the border: please report it */
};

/* What the last failed call on this thread was about, in English, UTF-8; "" if there was none. It is the library's, and
 * stays where it is until the next failure on this thread. */
const char *flashtile_last_error(void);

/* ---- Tensors ---- */

/* The element types; 0 is none of them, so that a forgotten one is noticed. */
enum flashtile_dtype {
    FLASHTILE_F32 = 1,
    FLASHTILE_F16 = 2,  /* IEEE 754 binary16 */
    FLASHTILE_BF16 = 3, /* the upper half of a binary32 */
    FLASHTILE_F64 = 4,  /* softmax alone takes it */
    FLASHTILE_BYTE = 5  /* masks: any byte but 0 is true */
};

/* The element at index i is ((T *)data)[sum of i[axis] * strides[axis]].
 *
 * Strides may be anything, 0 (repeat) and negative ones included; those of an output must keep its elements apart. The
 * innermost one is best 1. A tensor with a dimension of 0 has no elements: its data and strides aren't looked at.
 * Inputs are never written, though `data` is not const. The struct's layout is fixed. */
typedef struct flashtile_tensor {
    void *data;         /* the element at index 0 of every axis: with negative strides, not the lowest address */
    int32_t dtype;      /* enum flashtile_dtype */
    int32_t rank;       /* so many entries of shape and strides count */
    int64_t shape[4];
    int64_t strides[4]; /* in elements, not in bytes */
} flashtile_tensor;

/* a * b; the largest int64_t where the product is larger, 0 where one is negative, which every call refuses. */
static inline int64_t flashtile_stride_product(int64_t a, int64_t b) {
    const int64_t most = (int64_t)(~(uint64_t)0 >> 1);
    if (a <= 0 || b <= 0) return 0;
    return a > most / b ? most : a * b;
}

/* A tensor of rank 4 without gaps, last axis innermost. Any dimensions may be given: those that no memory could hold are
 * refused by the call that gets the tensor, unless one of them is 0. */
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

/* ---- Attention ---- */

/* flashtile_options.flags: which options count. A number that is set without its flag is refused, not ignored. */
#define FLASHTILE_CAUSAL 1u        /* query at position p sees keys j <= p */
#define FLASHTILE_SCALE 2u         /* scale, instead of 1 / sqrt(head_dim) */
#define FLASHTILE_SOFTCAP 4u       /* softcap */
#define FLASHTILE_WINDOW_LEFT 8u   /* window_left: keys j >= p - window_left only */
#define FLASHTILE_WINDOW_RIGHT 16u /* window_right: keys j <= p + window_right only */

/* flashtile_options.query_position: query i stands at key position p = offset + i. */
enum flashtile_query_position {
    FLASHTILE_FROM_END = 0,   /* the last query is the last key: offset = seq_kv - seq_q, or key_lengths[b] - seq_q */
    FLASHTILE_FROM_START = 1, /* offset = 0 */
    FLASHTILE_AT = 2,         /* offset = query_offset, which may be negative */
    FLASHTILE_PER_BATCH = 3   /* offset = query_offsets[b] */
};

/* flashtile_options.alibi: subtracts slope[h] * |p - j| from the scores of query head h. */
enum flashtile_alibi {
    FLASHTILE_NO_ALIBI = 0,
    FLASHTILE_ALIBI_STANDARD = 1, /* the published slopes for heads_q */
    FLASHTILE_ALIBI_PER_HEAD = 2  /* alibi_slopes[h] */
};

/* flashtile_options.form: how the work is laid out; results agree within rounding. */
enum flashtile_form { FLASHTILE_AUTO = 0, FLASHTILE_FEW_QUERIES = 1, FLASHTILE_MANY_QUERIES = 2 };

/* All zero but for struct_size is plain attention: start from FLASHTILE_OPTIONS_INIT.
 *
 * Later versions add members at the end, and no version has padding: between members and after the last one every byte is
 * a member's. A library takes the smaller struct of an older caller, and the larger one of a newer caller as long as what it
 * doesn't know is zero. It refuses a struct_size that no version has, such as one that ends inside a member.
 *
 * Masks compose by intersection: a key is visible if all of causal, window, key lengths and mask allow it. */
typedef struct flashtile_options {
    size_t struct_size;           /* sizeof(flashtile_options) */
    uint32_t flags;               /* FLASHTILE_CAUSAL and so on */
    int32_t threads;              /* 0: one for each core, or RAYON_NUM_THREADS, see flashtile_default_threads(); 1: the
                                     calling thread; n up to 1024: n threads, started once for each n and kept. If they
                                     can't be started, the call is refused and the next one tries again. Small work stays
                                     on the calling thread anyway. */
    float scale;                  /* up to 2.3e38, and 3.4e38 times the softcap; zero and negative ones too */
    float softcap;                /* cap * tanh(score / cap), before any bias; a normal number above 0, up to 2.3e38 */
    int64_t window_left;          /* not negative */
    int64_t window_right;         /* not negative */
    int32_t query_position;       /* enum flashtile_query_position */
    int32_t alibi;                /* enum flashtile_alibi */
    int64_t query_offset;         /* for FLASHTILE_AT */
    const int64_t *query_offsets; /* for FLASHTILE_PER_BATCH, [batch] */
    int64_t query_offset_count;   /* batch */
    const int64_t *key_lengths;   /* [batch]: the keys from there on are padding, never read into a result; NULL: seq_kv */
    int64_t key_length_count;     /* batch */
    const float *alibi_slopes;    /* for FLASHTILE_ALIBI_PER_HEAD, [heads_q] */
    int64_t alibi_slope_count;    /* heads_q */
    const flashtile_tensor *mask; /* bytes, not 0 where the query may attend; NULL for none. [batch, heads_q, seq_q, seq_kv]:
                                     a dimension may be 1 to hold for all, a lower rank lacks the first ones */
    const flashtile_tensor *bias; /* f32, f16 or bf16, added to the scores, -inf hides; NULL for none. Shaped as a mask */
    const char *level;            /* an instruction set, such as "avx2" or "portable"; NULL for the best there is */
    int32_t form;                 /* enum flashtile_form */
    int32_t reserved;             /* 0 */
} flashtile_options;

/* (Spelled out, so that neither C nor C++ warns of members left out.) */
#define FLASHTILE_OPTIONS_INIT                                                                                           \
    { sizeof(flashtile_options), 0, 0, 0, 0, 0, 0, 0, 0, 0, NULL, 0, NULL, 0, NULL, 0, NULL, NULL, NULL, 0, 0 }

/* Attention.
 *
 *   q     [batch, heads_q, seq_q, head_dim]
 *   k     [batch, heads_kv, seq_kv, head_dim]    heads_q is a multiple of heads_kv: head h uses h / (heads_q / heads_kv)
 *   v     [batch, heads_kv, seq_kv, value_dim]
 *   out   [batch, heads_q, seq_q, value_dim]     written
 *   lse   [batch, heads_q, seq_q], f32           written, natural logarithm; NULL if not wanted
 *   options                                      NULL for plain attention
 *
 * q, k, v and out are f32, f16 or bf16 each. Every dimension may be 0 (heads_kv only with heads_q). A query that sees no key
 * gets an output of 0 and an lse of -inf; a hidden key never reaches the output, whatever it holds, and a score of -inf hides
 * its key; a visible NaN comes out as NaN in the rows that see it, and so does a score of +inf. Biases, and ALiBi after them,
 * are added behind the softcap. */
int32_t flashtile_attention(const flashtile_tensor *q, const flashtile_tensor *k, const flashtile_tensor *v,
                            const flashtile_tensor *out, const flashtile_tensor *lse, const flashtile_options *options);

/* How a call with such tensors would be carried out: form, tiles, level, whether it is worth threads. For people: the text
 * may change with any version.
 *
 * Writes as much as fits into capacity bytes of `text`, ending with a zero, and the whole length without the zero to
 * *length, which may be NULL. With capacity 0, text may be NULL. Elements aren't looked at, but `data` is checked as ever. */
int32_t flashtile_plan(const flashtile_tensor *q, const flashtile_tensor *k, const flashtile_tensor *v,
                       const flashtile_options *options, char *text, size_t capacity, size_t *length);

/* Folds the attention over other keys, (out_b, lse_b), into (out_a, lse_a), in f32. With w = exp(lse_a) + exp(lse_b):
 *
 *   out_a = (exp(lse_a) * out_a + exp(lse_b) * out_b) / w          lse_a = log w
 *
 *   out_a, out_b   [batch, heads, seq_q, value_dim]
 *   lse_a, lse_b   [batch, heads, seq_q]
 *
 * Nothing is added by (0, -inf): start from it. An lse of f32 is off by 2^-24 of itself, and the weights by as much as e to
 * that: at lse = 1e4, 6e-4. Runs on the calling thread. */
int32_t flashtile_merge(const flashtile_tensor *out_a, const flashtile_tensor *lse_a, const flashtile_tensor *out_b,
                        const flashtile_tensor *lse_b);

/* ---- Softmax ---- */

/* Along one axis of a tensor of rank 1 to 4, counted from 0, or from the end as -1, -2 and so on:
 *
 *   softmax       out = exp(scale * (x - max)) / sum          sum = sum of exp(scale * (x - max)) along the axis
 *   log_softmax   out = scale * (x - max) - log(sum)
 *
 * `scale` is the inverse temperature: 1 for the plain softmax. x and out are f32, f16, bf16 or f64, both of one type and
 * shape. An element of -inf gives 0 (-inf), a line of nothing else as well; a NaN makes its line NaN, and no other, and so
 * does +inf, but that it is hidden under a negative scale. `scale` is rounded to f32, but for f64. One that is not finite, or not
 * after that, is refused with FLASHTILE_INVALID_OPTION. So a temperature of 0 has no scale: it stands for the largest element
 * (argmax). Runs on the calling thread; copies blocks of tensors that have gaps along or behind the axis. */
int32_t flashtile_softmax(const flashtile_tensor *x, const flashtile_tensor *out, int32_t axis, double scale);
int32_t flashtile_log_softmax(const flashtile_tensor *x, const flashtile_tensor *out, int32_t axis, double scale);

/* Gradients, from dy and the result y of the forward function to dx, which may be dy:
 *
 *   of softmax       dx = scale * y * (dy - sum of dy * y)
 *   of log_softmax   dx = scale * (dy - exp(y) * sum of dy)
 *
 * Of softmax, dx is 0 where y is 0, whatever dy is there. Of log_softmax, a dy of NaN or infinity counts as 0 where y is -inf. */
int32_t flashtile_softmax_backward(const flashtile_tensor *y, const flashtile_tensor *dy, const flashtile_tensor *dx,
                                   int32_t axis, double scale);
int32_t flashtile_log_softmax_backward(const flashtile_tensor *y, const flashtile_tensor *dy, const flashtile_tensor *dx,
                                       int32_t axis, double scale);

/* ---- The library ---- */

/* "0.1.0". */
const char *flashtile_version(void);

/* The best instruction set of this processor, such as "avx2": what is used unless options.level says otherwise. */
const char *flashtile_level(void);

/* How many threads `threads = 0` uses: RAYON_NUM_THREADS as it was at first, or else one for each core. Starts none. */
int32_t flashtile_default_threads(void);

/* Gives back the scratch memory of the calling thread, and the threads that were started for any `threads`; both come again
 * with the next call that needs them. Without it, scratch memory goes with its thread, and threads stay.
 *
 * It returns when those threads have ended. The library may be unloaded after that. Calls under way on other threads are not
 * disturbed: threads that such a call uses end before that call returns. */
void flashtile_release(void);

#ifdef __cplusplus
}
#endif

#endif
