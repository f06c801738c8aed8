/*
 * Products of a few rows of activations with weights of a byte each, for CPUs.
 *
 *     y[m][n] = sum_g (scale[n][g] * sum_(k in g) code[n][k] * x[m][k]) - sum_g least[n][g] * sum_(k in g) x[m][k]
 *               + bias[n]
 *
 * All sums are in fp32 and have one order, of eight lanes: results are the same to the bit on every processor and with
 * any number of threads. A plain shared library without Python.h, called through ctypes.
 */
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 8

#if defined(__x86_64__)
#define FAST __attribute__((target("avx2")))
#endif

/* Eight numbers; compilers make them of the registers that the function's processor has. */
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Pointers are to contiguous arrays: x (m, k), codes (n, k), scale and least (n, k / group), y (m, n). */
typedef struct {
    const int8_t *codes;
    const float *scale, *least; /* least: or NULL */
    const float *bias;          /* (n,), or NULL */
    int64_t n, k, group;        /* k: a multiple of 32; group: 16 or 32 */
    const float *x;
    float *sums; /* (m, k / group), filled here; NULL without least */
    float *y;
    int64_t m;
    int64_t next; /* the first row of weights that no thread has taken */
} Job;

/* OpenMP's own entry: run work(data) in some threads, each once. */
typedef void Parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);

enum { ROWS_AT_ONCE = 16, STRETCH = 32 };

/* A pointer: a vector handed to a function would change the ABI where there is no AVX. */
INLINE float total(const Floats *sum)
{
    const float *x = (const float *)sum;
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/* In one loop of a known length, which compilers make whole registers of. */
INLINE void to_floats(const int8_t *codes, float *restrict out)
{
    for (int64_t i = 0; i < STRETCH; i++)
        out[i] = (float)codes[i];
}

INLINE void sum_groups(const float *x, int64_t k, int64_t group, float *sums)
{
    for (int64_t at = 0; at < k; at += group) {
        Floats sum = *(const Floats *)(x + at);
        for (int64_t i = LANES; i < group; i += LANES)
            sum += *(const Floats *)(x + at + i);
        *sums++ = total(&sum);
    }
}

INLINE float product(const int8_t *codes, const float *scale, const float *x, int64_t k, int64_t group)
{
    Floats sum = {0};
    for (int64_t at = 0; at < k; at += STRETCH) {
        float w[STRETCH];
        to_floats(codes + at, w);
        for (int64_t begin = 0; begin < STRETCH; begin += group) {
            Floats part = {0};
            for (int64_t i = begin; i < begin + group; i += LANES)
                part += *(const Floats *)(w + i) * *(const Floats *)(x + at + i);
            sum += part * *scale++;
        }
    }
    return total(&sum);
}

INLINE float of_minimums(const float *least, const float *sums, int64_t groups)
{
    Floats sum = {0};
    int64_t g = 0;
    for (; g + LANES <= groups; g += LANES)
        sum += *(const Floats *)(least + g) * *(const Floats *)(sums + g);
    for (int lane = 0; g < groups; g++, lane++)
        sum[lane] += least[g] * sums[g];
    return total(&sum);
}

INLINE void multiply(Job *job, int64_t group)
{
    const int64_t n = job->n, k = job->k, groups = k / group;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&job->next, ROWS_AT_ONCE, __ATOMIC_RELAXED);
        for (int64_t row = first; row < first + ROWS_AT_ONCE && row < n; row++)
            for (int64_t m = 0; m < job->m; m++) {
                float y = product(job->codes + row * k, job->scale + row * groups, job->x + m * k, k, group);
                if (job->least)
                    y -= of_minimums(job->least + row * groups, job->sums + m * groups, groups);
                job->y[m * n + row] = job->bias ? y + job->bias[row] : y;
            }
        if (first + ROWS_AT_ONCE >= n)
            return;
    }
}

/* The weights themselves, fp32 (n, k) into y: those of `PackedWeight.dequantize`, to the bit. */
INLINE void expand(Job *job, int64_t group)
{
    const int64_t n = job->n, k = job->k;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&job->next, ROWS_AT_ONCE, __ATOMIC_RELAXED);
        for (int64_t row = first; row < first + ROWS_AT_ONCE && row < n; row++)
            for (int64_t at = row * k; at < (row + 1) * k; at += STRETCH) {
                float w[STRETCH];
                to_floats(job->codes + at, w);
                for (int64_t begin = 0, g = at / group; begin < STRETCH; begin += group, g++)
                    for (int64_t i = begin; i < begin + group; i += LANES) {
                        Floats values = *(const Floats *)(w + i) * job->scale[g];
                        if (job->least)
                            values -= job->least[g];
                        *(Floats *)(job->y + at + i) = values;
                    }
            }
        if (first + ROWS_AT_ONCE >= n)
            return;
    }
}

/* Groups of known sizes have their loops unrolled. */
INLINE void run(Job *job, int only_expand)
{
    if (only_expand)
        job->group == 16 ? expand(job, 16) : expand(job, 32);
    else
        job->group == 16 ? multiply(job, 16) : multiply(job, 32);
}

static void multiply_portable(void *job) { run(job, 0); }
static void expand_portable(void *job) { run(job, 1); }

#ifdef FAST
FAST static void multiply_fast(void *job) { run(job, 0); }
FAST static void expand_fast(void *job) { run(job, 1); }
#endif

/* Return 1 if there is a second path that this processor supports. */
int q6k_has_fast(void)
{
#ifdef FAST
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

/*
 * Multiply, or with `only_expand` expand. `fast` chooses the second path, which must be there. `parallel` is
 * GOMP_parallel of the OpenMP library whose threads are to be used, or NULL for this thread alone.
 */
void q6k_run(Job *job, int only_expand, int fast, Parallel *parallel, unsigned threads)
{
    void (*work)(void *) = only_expand ? expand_portable : multiply_portable;
#ifdef FAST
    if (fast)
        work = only_expand ? expand_fast : multiply_fast;
#else
    (void)fast;
#endif
    job->next = 0;
    if (!only_expand && job->least)
        for (int64_t m = 0; m < job->m; m++)
            sum_groups(job->x + m * job->k, job->k, job->group, job->sums + m * (job->k / job->group));
    if (parallel && threads > 1)
        parallel(work, job, threads, 0);
    else
        work(job);
}
