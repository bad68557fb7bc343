/* The C interface from C. Prints the layout of its structs, for tests/capi.rs to compare with Rust's, and checks known
 * answers; says what is wrong on stderr and returns 1. Also valid C++. */
#include <flashtile.h>

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, flashtile_last_error()); \
            failures++;                                                                  \
        }                                                                                \
    } while (0)

#define PRINT_OFFSET(type, member) printf("%s.%s %lu\n", #type, #member, (unsigned long)offsetof(flashtile_##type, member))

static void print_layout(void) {
    printf("tensor %lu\n", (unsigned long)sizeof(flashtile_tensor));
    PRINT_OFFSET(tensor, data);
    PRINT_OFFSET(tensor, dtype);
    PRINT_OFFSET(tensor, rank);
    PRINT_OFFSET(tensor, shape);
    PRINT_OFFSET(tensor, strides);
    printf("options %lu\n", (unsigned long)sizeof(flashtile_options));
    PRINT_OFFSET(options, struct_size);
    PRINT_OFFSET(options, flags);
    PRINT_OFFSET(options, threads);
    PRINT_OFFSET(options, scale);
    PRINT_OFFSET(options, softcap);
    PRINT_OFFSET(options, window_left);
    PRINT_OFFSET(options, window_right);
    PRINT_OFFSET(options, query_position);
    PRINT_OFFSET(options, alibi);
    PRINT_OFFSET(options, query_offset);
    PRINT_OFFSET(options, query_offsets);
    PRINT_OFFSET(options, query_offset_count);
    PRINT_OFFSET(options, key_lengths);
    PRINT_OFFSET(options, key_length_count);
    PRINT_OFFSET(options, alibi_slopes);
    PRINT_OFFSET(options, alibi_slope_count);
    PRINT_OFFSET(options, mask);
    PRINT_OFFSET(options, bias);
    PRINT_OFFSET(options, level);
    PRINT_OFFSET(options, form);
    PRINT_OFFSET(options, reserved);
    PRINT_OFFSET(options, sinks);
    PRINT_OFFSET(options, sink_count);
    PRINT_OFFSET(options, masks);
    PRINT_OFFSET(options, mask_count);
    PRINT_OFFSET(options, score_row);
    PRINT_OFFSET(options, score_context);
    PRINT_OFFSET(options, query_lengths);
    PRINT_OFFSET(options, query_length_count);
    PRINT_OFFSET(options, query_starts);
    PRINT_OFFSET(options, query_start_count);
    PRINT_OFFSET(options, key_starts);
    PRINT_OFFSET(options, key_start_count);
    PRINT_OFFSET(options, page_table);
    PRINT_OFFSET(options, score_tables);
    PRINT_OFFSET(options, score_table_count);
    PRINT_OFFSET(options, first_queries);
    PRINT_OFFSET(options, first_query_count);
    PRINT_OFFSET(options, first_keys);
    PRINT_OFFSET(options, first_key_count);
    PRINT_OFFSET(options, cache);
    printf("page_table %lu\n", (unsigned long)sizeof(flashtile_page_table));
    PRINT_OFFSET(page_table, pages32);
    PRINT_OFFSET(page_table, pages64);
    PRINT_OFFSET(page_table, page_count);
    PRINT_OFFSET(page_table, width);
    PRINT_OFFSET(page_table, starts);
    PRINT_OFFSET(page_table, start_count);
    PRINT_OFFSET(page_table, lengths);
    PRINT_OFFSET(page_table, length_count);
    PRINT_OFFSET(page_table, page_size);
    printf("mask %lu\n", (unsigned long)sizeof(flashtile_mask));
    PRINT_OFFSET(mask, kind);
    PRINT_OFFSET(mask, reserved);
    PRINT_OFFSET(mask, numbers);
    PRINT_OFFSET(mask, lists);
    PRINT_OFFSET(mask, counts);
    printf("score_table %lu\n", (unsigned long)sizeof(flashtile_score_table));
    PRINT_OFFSET(score_table, kind);
    PRINT_OFFSET(score_table, reserved);
    PRINT_OFFSET(score_table, numbers);
    PRINT_OFFSET(score_table, table);
    PRINT_OFFSET(score_table, count);
    printf("rotation %lu\n", (unsigned long)sizeof(flashtile_rotation));
    PRINT_OFFSET(rotation, rotary);
    PRINT_OFFSET(rotation, positions);
    PRINT_OFFSET(rotation, position_count);
    printf("cache_format %lu\n", (unsigned long)sizeof(flashtile_cache_format));
    PRINT_OFFSET(cache_format, dtype);
    PRINT_OFFSET(cache_format, reserved);
    PRINT_OFFSET(cache_format, heads_kv);
    PRINT_OFFSET(cache_format, head_dim);
    PRINT_OFFSET(cache_format, value_dim);
    printf("cache_info %lu\n", (unsigned long)sizeof(flashtile_cache_info));
    PRINT_OFFSET(cache_info, format);
    PRINT_OFFSET(cache_info, sequences);
    PRINT_OFFSET(cache_info, layers);
    PRINT_OFFSET(cache_info, capacity);
    PRINT_OFFSET(cache_info, first);
    PRINT_OFFSET(cache_info, window);
    PRINT_OFFSET(cache_info, pages);
    PRINT_OFFSET(cache_info, page_size);
    PRINT_OFFSET(cache_info, free_pages);
    PRINT_OFFSET(cache_info, shared_pages);
    PRINT_OFFSET(cache_info, bytes);
    printf("cache_view %lu\n", (unsigned long)sizeof(flashtile_cache_view));
    PRINT_OFFSET(cache_view, cache);
    PRINT_OFFSET(cache_view, layer);
    PRINT_OFFSET(cache_view, sequences);
    PRINT_OFFSET(cache_view, sequence_count);
    printf("row %lu\n", (unsigned long)sizeof(flashtile_row));
    PRINT_OFFSET(row, batch);
    PRINT_OFFSET(row, head);
    PRINT_OFFSET(row, query);
    PRINT_OFFSET(row, position);
    PRINT_OFFSET(row, first_key);
    printf("cross_entropy_options %lu\n", (unsigned long)sizeof(flashtile_cross_entropy_options));
    PRINT_OFFSET(cross_entropy_options, flags);
    PRINT_OFFSET(cross_entropy_options, reduction);
    PRINT_OFFSET(cross_entropy_options, ignore_index);
    PRINT_OFFSET(cross_entropy_options, label_smoothing);
    PRINT_OFFSET(cross_entropy_options, class_weights);
    PRINT_OFFSET(cross_entropy_options, class_weight_count);
    PRINT_OFFSET(cross_entropy_options, reserved);
}

/* Attention of 6 queries over 9 keys in double, causal from the end, window of 4 keys. */
static void check_attention(void) {
    enum { HEADS = 4, HEADS_KV = 2, QUERIES = 6, KEYS = 9, DIM = 5, VALUES = 3, LEFT = 3 };
    float q[HEADS * QUERIES * DIM], k[HEADS_KV * KEYS * DIM], v[HEADS_KV * KEYS * VALUES];
    float out[HEADS * QUERIES * VALUES], lse[HEADS * QUERIES];
    flashtile_tensor tq = flashtile_contiguous(q, FLASHTILE_F32, 1, HEADS, QUERIES, DIM);
    flashtile_tensor tk = flashtile_contiguous(k, FLASHTILE_F32, 1, HEADS_KV, KEYS, DIM);
    flashtile_tensor tv = flashtile_contiguous(v, FLASHTILE_F32, 1, HEADS_KV, KEYS, VALUES);
    flashtile_tensor to = flashtile_contiguous(out, FLASHTILE_F32, 1, HEADS, QUERIES, VALUES);
    flashtile_tensor tl;
    flashtile_options options = FLASHTILE_OPTIONS_INIT;
    int n, h, i, j, d;

    for (n = 0; n < HEADS * QUERIES * DIM; n++) q[n] = (float)sin(n);
    for (n = 0; n < HEADS_KV * KEYS * DIM; n++) k[n] = (float)cos(3 * n);
    for (n = 0; n < HEADS_KV * KEYS * VALUES; n++) v[n] = (float)sin(2 * n + 1);
    memset(&tl, 0, sizeof tl);
    tl.data = lse;
    tl.dtype = FLASHTILE_F32;
    tl.rank = 3;
    tl.shape[0] = 1, tl.shape[1] = HEADS, tl.shape[2] = QUERIES;
    tl.strides[1] = QUERIES, tl.strides[2] = 1;
    options.flags = FLASHTILE_CAUSAL | FLASHTILE_WINDOW_LEFT | FLASHTILE_SCALE;
    options.window_left = LEFT;
    options.scale = 0.75f;
    CHECK(flashtile_attention(&tq, &tk, &tv, &to, &tl, &options) == FLASHTILE_OK);

    for (h = 0; h < HEADS; h++) {
        for (i = 0; i < QUERIES; i++) {
            double sum = 0, expected[VALUES] = {0};
            int p = KEYS - QUERIES + i, kv = h / (HEADS / HEADS_KV);
            for (j = p > LEFT ? p - LEFT : 0; j <= p; j++) {
                double score = 0, weight;
                for (d = 0; d < DIM; d++) score += (double)q[(h * QUERIES + i) * DIM + d] * k[(kv * KEYS + j) * DIM + d];
                weight = exp(0.75 * score);
                sum += weight;
                for (d = 0; d < VALUES; d++) expected[d] += weight * v[(kv * KEYS + j) * VALUES + d];
            }
            for (d = 0; d < VALUES; d++) CHECK(fabs(out[(h * QUERIES + i) * VALUES + d] - expected[d] / sum) < 1e-5);
            CHECK(fabs(lse[h * QUERIES + i] - log(sum)) < 1e-5);
        }
    }
}

/* Keys far from the query count less. */
static void score_row(void *context, const flashtile_row *row, float *scores, int64_t count) {
    int64_t n;
    for (n = 0; n < count; n++) scores[n] -= *(const float *)context * (float)(row->position - row->first_key - n);
}

/* Chunks of 5 positions, drafts at the end, sinks and a score function, in double. */
static void check_open_sets(void) {
    enum { HEADS = 2, QUERIES = 3, KEYS = 9, DIM = 5 };
    static const int64_t parents[QUERIES] = {-1, 0, 0};
    const float sinks[HEADS] = {0.5f, -1.0f};
    float q[HEADS * QUERIES * DIM], k[HEADS * KEYS * DIM], out[HEADS * QUERIES * DIM], slope = 0.25f;
    flashtile_tensor tq = flashtile_contiguous(q, FLASHTILE_F32, 1, HEADS, QUERIES, DIM);
    flashtile_tensor tk = flashtile_contiguous(k, FLASHTILE_F32, 1, HEADS, KEYS, DIM);
    flashtile_tensor to = flashtile_contiguous(out, FLASHTILE_F32, 1, HEADS, QUERIES, DIM);
    flashtile_mask masks[2] = {FLASHTILE_MASK_INIT, FLASHTILE_MASK_INIT};
    flashtile_options options = FLASHTILE_OPTIONS_INIT;
    int n, h, i, j, d;

    for (n = 0; n < HEADS * QUERIES * DIM; n++) q[n] = (float)sin(n);
    for (n = 0; n < HEADS * KEYS * DIM; n++) k[n] = (float)cos(3 * n);
    masks[0].kind = FLASHTILE_CHUNKED;
    masks[0].numbers[0] = 5;
    masks[1].kind = FLASHTILE_TREE;
    masks[1].lists[0] = parents;
    masks[1].counts[0] = QUERIES;
    options.masks = masks;
    options.mask_count = 2;
    options.sinks = sinks;
    options.sink_count = HEADS;
    options.score_row = score_row;
    options.score_context = &slope;
    options.flags = FLASHTILE_SCALE;
    options.scale = 1;
    CHECK(flashtile_attention(&tq, &tk, &tk, &to, NULL, &options) == FLASHTILE_OK);

    for (h = 0; h < HEADS; h++) {
        for (i = 0; i < QUERIES; i++) {
            double sum = exp(sinks[h]), expected[DIM] = {0};
            int p = KEYS - QUERIES + i;
            for (j = 0; j <= p; j++) {
                double score = 0, weight;
                if (j / 5 != p / 5 || (i == 2 && j == 7)) continue; /* drafts 1 and 2 are siblings */
                for (d = 0; d < DIM; d++) score += (double)q[(h * QUERIES + i) * DIM + d] * k[(h * KEYS + j) * DIM + d];
                weight = exp(score - slope * (p - j));
                sum += weight;
                for (d = 0; d < DIM; d++) expected[d] += weight * k[(h * KEYS + j) * DIM + d];
            }
            for (d = 0; d < DIM; d++) CHECK(fabs(out[(h * QUERIES + i) * DIM + d] - expected[d] / sum) < 1e-5);
        }
    }
    masks[1].numbers[0] = 1;
    CHECK(flashtile_attention(&tq, &tk, &tk, &to, NULL, &options) == FLASHTILE_INVALID_OPTION);
    CHECK(strstr(flashtile_last_error(), "masks[1]") == flashtile_last_error());
}

/* The bias of query i and key j of head h, by hand: distances up to 2; buckets of a decoder; a window of 2 x 3. */
static float table_bias(const flashtile_score_table *table, int heads, int h, int i, int j) {
    const int d = i - j;
    switch (table->kind) {
    case FLASHTILE_RELATIVE_BIAS: return table->table[h * 5 + 2 + (d < -2 ? -2 : d > 2 ? 2 : d)];
    case FLASHTILE_T5_BIAS: /* a decoder's 4 buckets up to distance 4: 0, 1, 2, and 3 or more */
        return table->table[(d < 0 ? 0 : d > 3 ? 3 : d) * heads + h];
    default: return table->table[((i / 3 - j / 3 + 1) * 5 + i % 3 - j % 3 + 2) * heads + h];
    }
}

/* Tables of relative positions, each alone, in double. */
static void check_score_tables(void) {
    enum { HEADS = 2, PLACES = 6, DIM = 5, COUNT = 3 * 5 * HEADS };
    float x[HEADS * PLACES * DIM], out[HEADS * PLACES * DIM], biases[COUNT];
    flashtile_tensor tx = flashtile_contiguous(x, FLASHTILE_F32, 1, HEADS, PLACES, DIM);
    flashtile_tensor to = flashtile_contiguous(out, FLASHTILE_F32, 1, HEADS, PLACES, DIM);
    flashtile_options options = FLASHTILE_OPTIONS_INIT;
    flashtile_score_table tables[3] = {FLASHTILE_SCORE_TABLE_INIT, FLASHTILE_SCORE_TABLE_INIT, FLASHTILE_SCORE_TABLE_INIT};
    int n, h, i, j, d;

    for (n = 0; n < HEADS * PLACES * DIM; n++) x[n] = (float)sin(n);
    for (n = 0; n < COUNT; n++) biases[n] = (float)cos(3 * n);
    for (n = 0; n < 3; n++) tables[n].kind = n + 1, tables[n].table = biases;
    tables[0].numbers[0] = 2, tables[0].count = 5 * HEADS;
    tables[1].numbers[0] = 4, tables[1].count = 4 * HEADS;
    tables[2].numbers[0] = 2, tables[2].numbers[1] = 3, tables[2].count = COUNT;
    options.flags = FLASHTILE_SCALE;
    options.scale = 1;
    options.score_table_count = 1;
    for (n = 0; n < 3; n++) {
        options.score_tables = &tables[n];
        CHECK(flashtile_attention(&tx, &tx, &tx, &to, NULL, &options) == FLASHTILE_OK);
        for (h = 0; h < HEADS; h++) {
            for (i = 0; i < PLACES; i++) {
                double sum = 0, expected[DIM] = {0};
                for (j = 0; j < PLACES; j++) {
                    double score = table_bias(&tables[n], HEADS, h, i, j), weight;
                    for (d = 0; d < DIM; d++) score += (double)x[(h * PLACES + i) * DIM + d] * x[(h * PLACES + j) * DIM + d];
                    weight = exp(score);
                    sum += weight;
                    for (d = 0; d < DIM; d++) expected[d] += weight * x[(h * PLACES + j) * DIM + d];
                }
                for (d = 0; d < DIM; d++) CHECK(fabs(out[(h * PLACES + i) * DIM + d] - expected[d] / sum) < 1e-5);
            }
        }
    }
    tables[2].count--;
    CHECK(flashtile_attention(&tx, &tx, &tx, &to, NULL, &options) == FLASHTILE_WRONG_COUNT);
    CHECK(strstr(flashtile_last_error(), "score_tables[0]") == flashtile_last_error());
}

/* Sequences of 3, 1 and 4 queries over 7, 5 and 4 keys: packed, padded and in pages they have the bits of calls of their own. */
static void check_sequences(void) {
    enum { HEADS = 4, HEADS_KV = 2, DIM = 8, SEQUENCES = 3, QUERIES = 8, KEYS = 16 };
    enum { PAGES = 7, PAGE = 3, LONGEST_Q = 4, LONGEST_K = 7 };
    static const int64_t query_lengths[SEQUENCES] = {3, 1, 4}, query_starts[SEQUENCES + 1] = {0, 3, 4, 8};
    static const int64_t key_lengths[SEQUENCES] = {7, 5, 4}, key_starts[SEQUENCES + 1] = {0, 7, 12, 16};
    static const int32_t pages32[SEQUENCES * 3] = {6, 0, 2, 3, 1, -1, 4, 5, -1};
    static const int64_t pages64[7] = {6, 0, 2, 3, 1, 4, 5}, page_starts[SEQUENCES + 1] = {0, 3, 5, 7};
    float q[QUERIES][HEADS][DIM], k[KEYS][HEADS_KV][DIM], alone[QUERIES][HEADS][DIM], out[QUERIES][HEADS][DIM];
    float lse_alone[HEADS][QUERIES], lse[HEADS][QUERIES];
    float pool[PAGES][HEADS_KV][PAGE][DIM], padded_q[SEQUENCES][HEADS][LONGEST_Q][DIM];
    float padded_k[SEQUENCES][HEADS_KV][LONGEST_K][DIM];
    float padded_out[SEQUENCES][HEADS][LONGEST_Q][DIM];
    flashtile_tensor tq = flashtile_contiguous3(q, FLASHTILE_F32, QUERIES, HEADS, DIM);
    flashtile_tensor tk = flashtile_contiguous3(k, FLASHTILE_F32, KEYS, HEADS_KV, DIM);
    flashtile_tensor to = flashtile_contiguous3(out, FLASHTILE_F32, QUERIES, HEADS, DIM);
    flashtile_tensor tl = flashtile_contiguous3(lse, FLASHTILE_F32, 1, HEADS, QUERIES);
    flashtile_tensor tpool = flashtile_contiguous(pool, FLASHTILE_F32, PAGES, HEADS_KV, PAGE, DIM);
    flashtile_tensor tpq = flashtile_contiguous(padded_q, FLASHTILE_F32, SEQUENCES, HEADS, LONGEST_Q, DIM);
    flashtile_tensor tpk = flashtile_contiguous(padded_k, FLASHTILE_F32, SEQUENCES, HEADS_KV, LONGEST_K, DIM);
    flashtile_tensor tpo = flashtile_contiguous(padded_out, FLASHTILE_F32, SEQUENCES, HEADS, LONGEST_Q, DIM);
    flashtile_options options = FLASHTILE_OPTIONS_INIT;
    flashtile_page_table table = FLASHTILE_PAGE_TABLE_INIT;
    char text[256];
    int n, b, h, i;

    for (n = 0; n < QUERIES * HEADS * DIM; n++) (&q[0][0][0])[n] = (float)sin(n);
    for (n = 0; n < KEYS * HEADS_KV * DIM; n++) (&k[0][0][0])[n] = (float)cos(3 * n);
    memset(pool, 0xff, sizeof pool); /* NaN */
    memset(padded_q, 0xff, sizeof padded_q);
    memset(padded_k, 0xff, sizeof padded_k);
    memset(padded_out, 0, sizeof padded_out);
    for (b = 0; b < SEQUENCES; b++) {
        for (h = 0; h < HEADS; h++) {
            for (i = 0; i < query_lengths[b]; i++) memcpy(padded_q[b][h][i], q[query_starts[b] + i][h], sizeof q[0][0]);
        }
        for (h = 0; h < HEADS_KV; h++) {
            for (i = 0; i < key_lengths[b]; i++) {
                memcpy(padded_k[b][h][i], k[key_starts[b] + i][h], sizeof k[0][0]);
                memcpy(pool[pages32[3 * b + i / PAGE]][h][i % PAGE], k[key_starts[b] + i][h], sizeof k[0][0]);
            }
        }
    }
    options.flags = FLASHTILE_CAUSAL;

    for (b = 0; b < SEQUENCES; b++) {
        flashtile_tensor sq = flashtile_contiguous(q[query_starts[b]], FLASHTILE_F32, 1, HEADS, query_lengths[b], DIM);
        flashtile_tensor sk = flashtile_contiguous(k[key_starts[b]], FLASHTILE_F32, 1, HEADS_KV, key_lengths[b], DIM);
        flashtile_tensor so = flashtile_contiguous(alone[query_starts[b]], FLASHTILE_F32, 1, HEADS, query_lengths[b], DIM);
        flashtile_tensor sl = flashtile_contiguous3(&lse_alone[0][query_starts[b]], FLASHTILE_F32, 1, HEADS, query_lengths[b]);
        sq.strides[1] = sk.strides[1] = so.strides[1] = DIM;
        sq.strides[2] = so.strides[2] = HEADS * DIM;
        sk.strides[2] = HEADS_KV * DIM;
        sl.strides[1] = QUERIES;
        CHECK(flashtile_attention(&sq, &sk, &sk, &so, &sl, &options) == FLASHTILE_OK);
    }

    options.query_starts = query_starts;
    options.query_start_count = SEQUENCES + 1;
    options.key_starts = key_starts;
    options.key_start_count = SEQUENCES + 1;
    CHECK(flashtile_attention(&tq, &tk, &tk, &to, &tl, &options) == FLASHTILE_OK);
    CHECK(memcmp(out, alone, sizeof out) == 0 && memcmp(lse, lse_alone, sizeof lse) == 0);
    CHECK(flashtile_plan(&tq, &tk, &tk, &options, text, sizeof text, NULL) == FLASHTILE_OK);
    options.page_table = &table;
    CHECK(flashtile_attention(&tq, &tk, &tk, &to, &tl, &options) == FLASHTILE_INVALID_OPTION);
    options.key_starts = NULL;
    options.key_start_count = 0;
    CHECK(flashtile_attention(&tq, &tk, &tk, &to, &tl, &options) == FLASHTILE_INVALID_PAGES);
    CHECK(strstr(flashtile_last_error(), "page_size") != NULL);

    table.lengths = key_lengths;
    table.length_count = SEQUENCES;
    table.page_size = PAGE;
    table.pages32 = pages32;
    table.page_count = SEQUENCES * 3;
    CHECK(flashtile_attention(&tq, &tpool, &tpool, &to, &tl, &options) == FLASHTILE_INVALID_OPTION);
    CHECK(strstr(flashtile_last_error(), "set the width") != NULL);
    table.width = 3;
    memset(out, 0, sizeof out);
    CHECK(flashtile_attention(&tq, &tpool, &tpool, &to, &tl, &options) == FLASHTILE_OK);
    CHECK(memcmp(out, alone, sizeof out) == 0 && memcmp(lse, lse_alone, sizeof lse) == 0);
    table.pages32 = NULL;
    table.width = 0;
    table.pages64 = pages64;
    table.page_count = 7;
    table.starts = page_starts;
    table.start_count = SEQUENCES + 1;
    memset(out, 0, sizeof out);
    CHECK(flashtile_attention(&tq, &tpool, &tpool, &to, &tl, &options) == FLASHTILE_OK);
    CHECK(memcmp(out, alone, sizeof out) == 0 && memcmp(lse, lse_alone, sizeof lse) == 0);
    CHECK(flashtile_plan(&tq, &tpool, &tpool, &options, text, sizeof text, NULL) == FLASHTILE_OK);
    tpool.shape[0] = PAGES - 1;
    CHECK(flashtile_attention(&tq, &tpool, &tpool, &to, &tl, &options) == FLASHTILE_INVALID_PAGES);
    CHECK(strstr(flashtile_last_error(), "page 6") != NULL);
    tpool.shape[0] = PAGES;
    CHECK(flashtile_attention(&tq, &tk, &tpool, &to, &tl, &options) == FLASHTILE_BAD_RANK);
    options.query_start_count = SEQUENCES;
    CHECK(flashtile_attention(&tq, &tpool, &tpool, &to, &tl, &options) == FLASHTILE_WRONG_COUNT);

    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.flags = FLASHTILE_CAUSAL;
    options.query_lengths = query_lengths;
    options.query_length_count = SEQUENCES;
    options.key_lengths = key_lengths;
    options.key_length_count = SEQUENCES;
    CHECK(flashtile_attention(&tpq, &tpk, &tpk, &tpo, NULL, &options) == FLASHTILE_OK);
    for (b = 0; b < SEQUENCES; b++) {
        for (h = 0; h < HEADS; h++) {
            for (i = 0; i < LONGEST_Q; i++) {
                static const float untouched[DIM] = {0};
                const float *expected = i < query_lengths[b] ? alone[query_starts[b] + i][h] : untouched;
                CHECK(memcmp(padded_out[b][h][i], expected, sizeof untouched) == 0);
            }
        }
    }
}

/* Turns row i of a head, halves paired, by hand. */
static void turn(double *row, int dim, int position) {
    int p;
    for (p = 0; p < dim / 2; p++) {
        double angle = position * pow(100, -2.0 * p / dim), x = row[p], y = row[p + dim / 2];
        row[p] = x * cos(angle) - y * sin(angle);
        row[p + dim / 2] = x * sin(angle) + y * cos(angle);
    }
}

/* A prompt of 4 tokens, then one token at a time, rotated: in a cache of rows, a rotating one that loses nothing, and one of pages. All
 * three have the same bits, which are near those of double. */
static void check_decode_loop(void) {
    enum { HEADS = 4, HEADS_KV = 2, DIM = 6, PROMPT = 4, TOKENS = 9, KINDS = 3 };
    const flashtile_cache_format format = {FLASHTILE_F32, 0, HEADS_KV, DIM, DIM};
    float q[TOKENS][HEADS][DIM], kv[TOKENS][HEADS_KV][DIM], turned[TOKENS][HEADS][DIM], out[KINDS][TOKENS][HEADS][DIM];
    flashtile_cache *caches[KINDS] = {NULL, NULL, NULL};
    flashtile_rotary *rotary = NULL;
    flashtile_cache_info info;
    int64_t sequence = 0, fork = 0, length = 0, pages[5];
    int n, kind, h, i, j, d;

    for (n = 0; n < TOKENS * HEADS * DIM; n++) (&q[0][0][0])[n] = (float)sin(n);
    for (n = 0; n < TOKENS * HEADS_KV * DIM; n++) (&kv[0][0][0])[n] = (float)cos(3 * n);
    CHECK(flashtile_rotary_new(DIM, 100, TOKENS, FLASHTILE_HALVES, &rotary) == FLASHTILE_OK);
    CHECK(flashtile_cache_new(&format, 1, TOKENS, &caches[0]) == FLASHTILE_OK);
    CHECK(flashtile_cache_new_rotating(&format, 1, 0, TOKENS, &caches[1]) == FLASHTILE_OK);
    CHECK(flashtile_cache_new_paged(&format, 1, 5, 2, &caches[2]) == FLASHTILE_OK);
    CHECK(flashtile_cache_new_sequence(caches[2], &sequence) == FLASHTILE_OK);

    for (kind = 0; kind < KINDS; kind++) {
        flashtile_cache_view view = FLASHTILE_CACHE_VIEW_INIT;
        flashtile_options options = FLASHTILE_OPTIONS_INIT;
        view.cache = caches[kind];
        if (kind == 2) view.sequences = &sequence, view.sequence_count = 1;
        options.flags = FLASHTILE_CAUSAL;
        options.cache = &view;
        for (n = 0; n < TOKENS; n += i) {
            flashtile_tensor tq, tk, to, tt;
            flashtile_rotation rotation;
            const int64_t position = n;
            i = n == 0 ? PROMPT : 1;
            tq = flashtile_contiguous(q[n], FLASHTILE_F32, 1, HEADS, i, DIM);
            tk = flashtile_contiguous(kv[n], FLASHTILE_F32, 1, HEADS_KV, i, DIM);
            tq.strides[1] = tk.strides[1] = DIM; /* stored [tokens, heads, dim] */
            tq.strides[2] = HEADS * DIM, tk.strides[2] = HEADS_KV * DIM;
            tt = to = tq;
            tt.data = turned[n], to.data = out[kind][n];
            rotation.rotary = rotary, rotation.positions = NULL, rotation.position_count = 0;
            CHECK(flashtile_cache_append_to(caches[kind], kind == 2 ? sequence : 0, &tk, &tk, &rotation) == FLASHTILE_OK);
            rotation.positions = &position, rotation.position_count = 1;
            CHECK(flashtile_rotate(&rotation, &tq, &tt) == FLASHTILE_OK);
            CHECK(flashtile_attention(&tt, NULL, NULL, &to, NULL, &options) == FLASHTILE_OK);
            CHECK(flashtile_cache_append_to(caches[kind], 7, &tk, &tk, NULL) == FLASHTILE_NOT_IN_CACHE);
        }
        CHECK(memcmp(out[kind], out[0], sizeof out[0]) == 0);
    }

    for (h = 0; h < HEADS; h++) {
        for (i = 0; i < TOKENS; i++) {
            double sum = 0, expected[DIM] = {0}, query[DIM];
            for (d = 0; d < DIM; d++) query[d] = q[i][h][d];
            turn(query, DIM, i);
            for (j = 0; j <= i; j++) {
                double score = 0, weight, key[DIM];
                for (d = 0; d < DIM; d++) key[d] = kv[j][h / (HEADS / HEADS_KV)][d];
                turn(key, DIM, j);
                for (d = 0; d < DIM; d++) score += query[d] * key[d];
                weight = exp(score / sqrt((double)DIM));
                sum += weight;
                for (d = 0; d < DIM; d++) expected[d] += weight * kv[j][h / (HEADS / HEADS_KV)][d];
            }
            for (d = 0; d < DIM; d++) CHECK(fabs(out[0][i][h][d] - expected[d] / sum) < 1e-5);
        }
    }

    CHECK(flashtile_cache_length(caches[0], 0, &length) == FLASHTILE_OK && length == TOKENS);
    CHECK(flashtile_cache_truncate(caches[0], 0, 5) == FLASHTILE_OK);
    CHECK(flashtile_cache_written(caches[0], 0, 0, &length) == FLASHTILE_OK && length == 5);
    CHECK(flashtile_cache_clear(caches[0]) == FLASHTILE_OK);
    CHECK(flashtile_cache_length(caches[0], 0, &length) == FLASHTILE_OK && length == 0);
    CHECK(flashtile_cache_fork(caches[2], sequence, &fork) == FLASHTILE_OK && fork != sequence);
    CHECK(flashtile_cache_pages(caches[2], fork, pages, 5, &length) == FLASHTILE_OK && length == 5);
    CHECK(flashtile_cache_get_info(caches[2], &info) == FLASHTILE_OK && info.shared_pages == 5 && info.free_pages == 0);
    CHECK(flashtile_cache_reserve(caches[2], fork, 1) == FLASHTILE_CACHE_FULL);
    CHECK(strstr(flashtile_last_error(), "remove or truncate") != NULL);
    CHECK(flashtile_cache_truncate(caches[2], fork, 4) == FLASHTILE_OK);
    CHECK(flashtile_cache_remove(caches[2], sequence) == FLASHTILE_OK);
    CHECK(flashtile_cache_reserve(caches[2], fork, 1) == FLASHTILE_OK);
    CHECK(flashtile_cache_remove(caches[2], sequence) == FLASHTILE_NOT_IN_CACHE);
    for (kind = 0; kind < KINDS; kind++) flashtile_cache_free(caches[kind]);
    flashtile_rotary_free(rotary);
}

static void check_errors(void) {
    float x[4] = {0, 0, 0, 0}, y[4];
    char text[16];
    size_t length = 0;
    flashtile_tensor tx = flashtile_contiguous(x, FLASHTILE_F32, 1, 1, 2, 2);
    flashtile_tensor ty = flashtile_contiguous(y, FLASHTILE_F32, 1, 1, 2, 2);
    flashtile_options options = FLASHTILE_OPTIONS_INIT;

    CHECK(flashtile_attention(&tx, &tx, &tx, &ty, NULL, NULL) == FLASHTILE_OK);
    CHECK(flashtile_attention(&tx, &tx, &tx, &tx, NULL, NULL) == FLASHTILE_OVERLAP);
    CHECK(strstr(flashtile_last_error(), "output") != NULL);
    CHECK(flashtile_attention(&tx, &tx, NULL, &ty, NULL, NULL) == FLASHTILE_NULL_POINTER);
    options.struct_size = 0;
    CHECK(flashtile_attention(&tx, &tx, &tx, &ty, NULL, &options) == FLASHTILE_BAD_STRUCT_SIZE);
    CHECK(flashtile_plan(&tx, &tx, &tx, NULL, text, sizeof text, &length) == FLASHTILE_OK);
    CHECK(strlen(text) == sizeof text - 1 && length > sizeof text && strstr(text, "b1 h1/1") == text);
}

/* Products of dimensions that no int64_t holds. */
static void check_large_shapes(void) {
    float x[4] = {0, 0, 0, 0};
    const int64_t most = (int64_t)(~(uint64_t)0 >> 1), one = 1;
    flashtile_tensor t = flashtile_contiguous(x, FLASHTILE_F32, 0, one << 40, one << 20, one << 10);
    CHECK(t.strides[3] == 1 && t.strides[2] == one << 10 && t.strides[1] == one << 30 && t.strides[0] == most);
    CHECK(flashtile_softmax(&t, &t, -1, 1.0) == FLASHTILE_OK);
    t = flashtile_contiguous(x, FLASHTILE_F32, 1, one << 40, one << 20, one << 10);
    CHECK(flashtile_softmax(&t, &t, -1, 1.0) == FLASHTILE_TOO_LARGE);
    t = flashtile_contiguous(x, FLASHTILE_F32, one << 33, one << 32, one << 32, 1);
    CHECK(t.strides[0] == most);
    CHECK(flashtile_softmax(&t, &t, -1, 1.0) == FLASHTILE_TOO_LARGE);
    t = flashtile_contiguous(x, FLASHTILE_F32, 1, -most, most, -2);
    CHECK(flashtile_softmax(&t, &t, -1, 1.0) == FLASHTILE_NEGATIVE_SIZE);
    t = flashtile_contiguous(x, FLASHTILE_F32, 1, 1, 2, 2);
    CHECK(t.strides[0] == 4 && t.strides[1] == 4 && t.strides[2] == 2 && t.strides[3] == 1);
}

/* A hidden element counts for nothing, also if it is NaN; in place. */
static void check_masked_softmax(void) {
    float x[2][3] = {{1, 0, 1}, {0, 1, 1}}, lse[3] = {9, 9, 9};
    unsigned char visible[3] = {1, 0, 2};
    float bias[2] = {0, 0.5f};
    flashtile_tensor tx = flashtile_contiguous3(x, FLASHTILE_F32, 1, 2, 3);
    flashtile_tensor tm = flashtile_contiguous3(visible, FLASHTILE_BYTE, 1, 1, 3);
    flashtile_tensor tb = flashtile_contiguous3(bias, FLASHTILE_F32, 1, 2, 1);
    flashtile_tensor tl = flashtile_contiguous3(lse, FLASHTILE_F32, 1, 1, 3);
    x[0][1] = (float)(0 * HUGE_VAL); /* NaN */
    CHECK(flashtile_masked_logsumexp(&tx, &tl, &tm, &tb, 1, 2) == FLASHTILE_OK);
    CHECK(fabs(lse[0] - log(exp(2) + exp(0.5))) < 1e-6 && lse[1] == -HUGE_VAL);
    CHECK(flashtile_masked_softmax(&tx, &tx, &tm, NULL, -1, 1) == FLASHTILE_OK);
    CHECK(x[0][0] == 0.5 && x[0][1] == 0 && x[0][2] == 0.5 && x[1][1] == 0);
    CHECK(flashtile_masked_log_softmax(&tx, &tx, NULL, &tb, 1, 1) == FLASHTILE_OK);
    CHECK(fabs(exp(x[0][1]) + exp(x[1][1]) - 1) < 1e-6 && fabs(x[1][1] - x[0][1] - 0.5) < 1e-6);
}

static void check_softmax(void) {
    double x[3] = {1000, 1001, 1002}, sum = 1 + exp(1.0) + exp(2.0);
    flashtile_tensor t = flashtile_contiguous(x, FLASHTILE_F64, 1, 1, 1, 3);
    CHECK(flashtile_softmax(&t, &t, -1, 1.0) == FLASHTILE_OK);
    CHECK(fabs(x[0] - 1 / sum) < 1e-12 && fabs(x[2] - exp(2.0) / sum) < 1e-12);
    CHECK(flashtile_softmax(&t, &t, 4, 1.0) == FLASHTILE_AXIS_OUT_OF_RANGE);
    CHECK(flashtile_softmax(&t, &t, -1, INFINITY) == FLASHTILE_INVALID_OPTION);
}

static void check_cross_entropy(void) {
    float x[6] = {0, 0, -INFINITY, 5, 5, 5}, upstream[1] = {1}, loss[1], gradient[6], lse[2];
    int64_t targets[2] = {1, -1};
    flashtile_cross_entropy_options options = FLASHTILE_CROSS_ENTROPY_OPTIONS_INIT;
    flashtile_tensor t = flashtile_contiguous(x, FLASHTILE_F32, 1, 1, 2, 3);
    flashtile_tensor l = flashtile_contiguous(loss, FLASHTILE_F32, 1, 1, 1, 1);
    flashtile_tensor u = flashtile_contiguous(upstream, FLASHTILE_F32, 1, 1, 1, 1);
    flashtile_tensor g = flashtile_contiguous(gradient, FLASHTILE_F32, 1, 1, 2, 3);
    flashtile_tensor s = flashtile_contiguous(lse, FLASHTILE_F32, 1, 1, 2, 1);
    CHECK(flashtile_logsumexp(&t, &s, -1, 1.0) == FLASHTILE_OK);
    CHECK(fabs(lse[0] - log(2.0)) < 1e-6 && fabs(lse[1] - (5 + log(3.0))) < 1e-6);
    CHECK(flashtile_cross_entropy(&t, targets, 2, &l, -1, NULL) == FLASHTILE_CLASS_OUT_OF_RANGE);
    options.flags = FLASHTILE_IGNORE_INDEX;
    options.ignore_index = -1;
    CHECK(flashtile_cross_entropy(&t, targets, 2, &l, -1, &options) == FLASHTILE_OK);
    CHECK(fabs(loss[0] - log(2.0)) < 1e-6);
    CHECK(flashtile_cross_entropy_backward(&t, targets, 2, &u, &g, -1, &options) == FLASHTILE_OK);
    CHECK(fabs(gradient[0] - 0.5) < 1e-6 && fabs(gradient[1] + 0.5) < 1e-6 && gradient[2] == 0 && gradient[3] == 0);
    options.reduction = FLASHTILE_NO_REDUCTION;
    CHECK(flashtile_cross_entropy(&t, targets, 2, &s, -1, &options) == FLASHTILE_OK);
    CHECK(fabs(lse[0] - log(2.0)) < 1e-6 && lse[1] == 0);
}

int main(void) {
    print_layout();
    printf("version %s\nlevel %s\n", flashtile_version(), flashtile_level());
    CHECK(flashtile_default_threads() >= 1);
    check_attention();
    check_open_sets();
    check_score_tables();
    check_sequences();
    check_decode_loop();
    check_errors();
    check_large_shapes();
    check_softmax();
    check_masked_softmax();
    check_cross_entropy();
    flashtile_release();
    check_attention();
    return failures != 0;
}
