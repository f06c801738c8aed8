/*
 * GGUF blocks -> the arrays of a bundle, in one pass, and the search for scales that are not finite.
 *
 * A plain shared library without Python.h: it builds wherever there is a C compiler, serves every Python version,
 * and is called through ctypes, which drops the interpreter lock for each call. The arrays' layouts are defined in
 * q6k_kernels/formats/{blocks,planes}.py. A new type: its reader in a header, and a row in TYPES.
 */
#include "words.h"

#include "blocks_256.h"
#include "blocks_32.h"
#include "dequantize.h"
#include "q6_k.h"

/* The numbers are those of PATHS in repack.py. A build has one path beside the portable one, or none. */
enum { PATH_PORTABLE, PATH_AVX2, PATH_NEON };

#ifdef FAST
#define ON_BOTH(function) function##_portable, function##_fast
#else
#define ON_BOTH(function) function##_portable, NULL
#endif
#define THE_SAME(function) function, function

/* Names of rows in q6k_kernels/formats/types.py, and of GGML types that become one array of bf16. */
static const struct {
    const char *name;
    Encode *portable, *fast;
} TYPES[] = {
    {"q6_k", ON_BOTH(q6_k)},
    {"q6_k_exact", ON_BOTH(q6_k_exact)},
    {"q4_k", ON_BOTH(q4_k)},
    {"q5_k", ON_BOTH(q5_k)},
    {"q8_0", THE_SAME(q8_0)},
    {"q5_0", ON_BOTH(half_fifth)},
    {"q4_0", ON_BOTH(half)},
    {"q4_1", ON_BOTH(half_min)},
    {"q5_1", ON_BOTH(half_min_fifth)},
    {"iq4_nl", ON_BOTH(half)},
    {"iq4_xs", ON_BOTH(iq4_xs)},
    {"mxfp4", ON_BOTH(exponent)},
    {"Q2_K", ON_BOTH(q2_k)},
    {"Q3_K", ON_BOTH(q3_k)},
};

/* Return the fastest path that this processor supports. */
int q6k_best_path(void)
{
#ifdef ON_AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
        return PATH_AVX2;
#endif
#ifdef ON_NEON
    return PATH_NEON;
#endif
    return PATH_PORTABLE;
}

/*
 * Encode n blocks into the type's arrays, in the order of its row. Nothing may overlap; for no blocks there need be no
 * arrays. Returns 0, or -1 if the type is not in the table, -2 if this processor or build lacks the path; then nothing
 * is written.
 */
int q6k_encode(const char *type, int path, const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    if (path != PATH_PORTABLE && path != q6k_best_path())
        return -2;
    for (size_t i = 0; i < sizeof TYPES / sizeof *TYPES; i++)
        if (strcmp(TYPES[i].name, type) == 0) {
            if (n > 0)
                (path == PATH_PORTABLE ? TYPES[i].portable : TYPES[i].fast)(blocks, n, arrays);
            return 0;
        }
    return -1;
}

INLINE int64_t first_with(const uint8_t *words, int64_t n, int64_t stride, size_t size, uint64_t mask)
{
    for (int64_t b = 0; b < n; b++) {
        uint64_t word = 0;
        memcpy(&word, words + b * stride, size);
        if ((word & mask) == mask)
            return b;
    }
    return n;
}

/*
 * Return the index of the first of n words, `stride` bytes apart and `size` (1, 2, 4 or 8) bytes long, that has all
 * bits of `mask` set, as the exponents of NaN and infinity have; n if there is none.
 */
int64_t q6k_first_with(const uint8_t *words, int64_t n, int64_t stride, int size, uint64_t mask)
{
    switch (size) {
    case 1: return first_with(words, n, stride, 1, mask);
    case 2: return first_with(words, n, stride, 2, mask);
    case 4: return first_with(words, n, stride, 4, mask);
    default: return first_with(words, n, stride, 8, mask);
    }
}
