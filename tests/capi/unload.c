/* Loads the library named by the first argument and unloads it, while threads start late or can't be started. Says what is wrong
 * on stderr and returns 1. For Linux: link with -rdynamic, so that the library calls this program's pthread_create. */
#define _GNU_SOURCE
#include <flashtile.h>

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static atomic_int refuse, started, ended, failures;
static pthread_t last; /* that was started */

#define CHECK(condition)                                                     \
    do {                                                                     \
        if (!(condition)) {                                                  \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);          \
            failures++;                                                      \
        }                                                                    \
    } while (0)

typedef void *(*routine)(void *);
typedef int (*create)(pthread_t *, const pthread_attr_t *, routine, void *);

typedef struct late {
    routine run;
    void *argument;
} late;

static void *start_late(void *argument) {
    late thread = *(late *)argument;
    void *result;
    free(argument);
    usleep(30000);
    result = thread.run(thread.argument);
    ended++;
    return result;
}

/* In front of the C library's. */
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, routine run, void *argument) {
    create next;
    late *delayed;
    *(void **)&next = dlsym(RTLD_NEXT, "pthread_create");
    if (refuse) return EAGAIN;
    delayed = malloc(sizeof *delayed);
    delayed->run = run;
    delayed->argument = argument;
    started++;
    const int result = next(thread, attributes, start_late, delayed);
    last = *thread;
    return result;
}

typedef int32_t (*attention)(const flashtile_tensor *, const flashtile_tensor *, const flashtile_tensor *,
                             const flashtile_tensor *, const flashtile_tensor *, const flashtile_options *);

/* Large enough for threads. */
enum { HEADS = 4, SEQ = 256, DIM = 64 };
static float x[HEADS * SEQ * DIM], out[HEADS * SEQ * DIM], expected[HEADS * SEQ * DIM];

static int32_t call(attention run, int32_t threads) {
    flashtile_tensor t = flashtile_contiguous(x, FLASHTILE_F32, 1, HEADS, SEQ, DIM);
    flashtile_tensor o = flashtile_contiguous(out, FLASHTILE_F32, 1, HEADS, SEQ, DIM);
    flashtile_options options = FLASHTILE_OPTIONS_INIT;
    options.threads = threads;
    memset(out, 0, sizeof out);
    return run(&t, &t, &t, &o, NULL, &options);
}

/* Whether the last thread may run on all processors but one, the caller's. */
static int is_kept_from_one_processor(void) {
    cpu_set_t own, others;
    sched_getaffinity(0, sizeof own, &own);
    pthread_getaffinity_np(last, sizeof others, &others);
    return CPU_COUNT(&own) == 1 ? CPU_EQUAL(&own, &others) : CPU_COUNT(&others) == CPU_COUNT(&own) - 1;
}

/* A forked child has none of the threads: it computes alone, and stays on the processors that it had. */
static int works_in_a_child(attention run) {
    int status = 1;
    const pid_t child = fork();
    if (child == 0) {
        cpu_set_t before, after;
        sched_getaffinity(0, sizeof before, &before);
        /* On another processor than before, so that helpers would have to be told. */
        if (CPU_COUNT(&before) > 1) CPU_CLR(sched_getcpu(), &before);
        sched_setaffinity(0, sizeof before, &before);
        status = call(run, 2) != FLASHTILE_OK || memcmp(out, expected, sizeof out) != 0;
        sched_getaffinity(0, sizeof after, &after);
        _exit(status || !CPU_EQUAL(&before, &after));
    }
    return waitpid(child, &status, 0) == child && status == 0;
}

int main(int count, char **arguments) {
    const char *threads = getenv("RAYON_NUM_THREADS");
    const int defaults = threads ? atoi(threads) : 0;
    int round, n;
    if (count != 2) return 1;
    for (n = 0; n < HEADS * SEQ * DIM; n++) x[n] = (float)(n * 7919 % 1000) / 1000 - 0.5f;
    for (round = 0; round < 4; round++) {
        void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
        attention run;
        void (*release)(void);
        int32_t (*default_threads)(void);
        const char *(*last_error)(void);
        char message[200];
        if (!library) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        *(void **)&run = dlsym(library, "flashtile_attention");
        *(void **)&release = dlsym(library, "flashtile_release");
        *(void **)&default_threads = dlsym(library, "flashtile_default_threads");
        *(void **)&last_error = dlsym(library, "flashtile_last_error");

        CHECK(call(run, 1) == FLASHTILE_OK && started == ended);
        memcpy(expected, out, sizeof out);

        /* No threads to be had: refused, and well again with the next call. */
        refuse = 1;
        for (n = 0; n < 2; n++) {
            /* One thread is the caller's, and needs no start. */
            CHECK(call(run, 0) == (defaults == 1 ? FLASHTILE_OK : FLASHTILE_THREADS));
            CHECK(defaults != 1 || started == ended);
            CHECK(call(run, 2) == FLASHTILE_THREADS);
        }
        strncpy(message, last_error(), sizeof message - 1);
        message[sizeof message - 1] = 0;
        CHECK(strstr(message, "2 threads") != NULL);
        CHECK(default_threads() == defaults);
        CHECK(strcmp(message, last_error()) == 0);
        refuse = 0;
        CHECK(call(run, 0) == FLASHTILE_OK && memcmp(out, expected, sizeof out) == 0);
        CHECK(call(run, 2) == FLASHTILE_OK && memcmp(out, expected, sizeof out) == 0);
        CHECK(default_threads() == defaults);
        CHECK(is_kept_from_one_processor());
        CHECK(works_in_a_child(run));

        /* Threads that have not begun, or not ended, would run in memory that is no longer there. */
        CHECK(started > 0);
        release();
        CHECK(started == ended);
        CHECK(call(run, 2 + round) == FLASHTILE_OK && memcmp(out, expected, sizeof out) == 0);
        release();
        CHECK(started == ended);
        dlclose(library);
    }
    usleep(100000);
    return failures != 0;
}
