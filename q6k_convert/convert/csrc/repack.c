/*
 * Q6_K blocks -> planar ql/qh bit planes and scales, in one pass.
 *
 * A plain shared library without Python.h: it builds wherever there is a C compiler, serves every
 * Python version, and is called through ctypes, which drops the interpreter lock for each call.
 *
 * Byte map of a block of 256 weights (ggml's block_q6_K):  ql:128 qh:64 scales:16 d:2  = 210 bytes
 *
 * A block is two halves of 128 weights. Weight e = 32*j + l (j = 0..3, l = 0..31) of a half has
 *   low nibble  j&1 picks ql[l] or ql[32+l], j>>1 picks its low or high nibble
 *   high pair   (qh[l] >> 2*j) & 3
 * The planes want neighbours packed together instead (see q6k_kernels/formats/planes.py):
 *   ql plane    byte i    = lo[2i] | lo[2i+1] << 4
 *   qh plane    byte w    of a chunk of 32 weights = high pairs of weights 8w+{0,2,4,6}
 *               byte 4+w                           = high pairs of weights 8w+{1,3,5,7}
 *
 * Every qh byte holds one pair of each of the four chunks of its half, and every plane byte takes
 * its four pairs from four bytes of one chunk. So the pairs of the bytes (x0,x2,x4,x6) of a group of
 * eight form a 4x4 matrix of 2-bit fields, and transposing it yields the four plane bytes at once.
 */
#include <stdint.h>
#include <string.h>

#define BLOCK_BYTES 210
#define QH_AT 128
#define SCALES_AT 192
#define D_AT 208
#define QL_PLANE 128 /* bytes a block takes in each array */
#define QH_PLANE 64
#define SUBSCALES 16

enum { SCALES_BF16 = 0, SCALES_EXACT = 1 };
enum { PATH_PORTABLE = 0, PATH_AVX2 = 1 };

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "q6k-convert needs a little-endian machine: GGUF and safetensors are little-endian"
#endif

static uint16_t load_u16(const uint8_t *p)
{
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

/* fp16 -> fp32, exact for every value, subnormals included (nearly all real d are subnormal). */
static float half_to_float(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
    uint32_t bits;
    float f;
    if (exponent == 31) {
        bits = sign | 0x7F800000u | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
        f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}

/* Round to nearest even; every NaN becomes the one quiet NaN, so that all machines write the same. */
static uint16_t float_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : rounded);
}

static inline void scales_exact(const uint8_t *block, uint8_t *scale, uint8_t *steps)
{
    memcpy(scale, block + SCALES_AT, SUBSCALES);
    memcpy(steps, block + D_AT, 2);
}

static void scales_bf16(const uint8_t *block, uint8_t *scale)
{
    const float d = half_to_float(load_u16(block + D_AT));
    uint16_t rounded[SUBSCALES];
    for (int g = 0; g < SUBSCALES; g++)
        rounded[g] = float_to_bf16(d * (float)(int8_t)block[SCALES_AT + g]);
    memcpy(scale, rounded, sizeof rounded);
}

/* Portable path: eight bytes at a time in one 64-bit word, byte 0 lowest. */

static uint64_t load_u64(const uint8_t *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

/* The low nibbles of eight bytes, neighbours joined: four bytes. */
static uint32_t join_nibbles(uint64_t x)
{
    x &= 0x0F0F0F0F0F0F0F0Full;
    x = (x | x >> 4) & 0x00FF00FF00FF00FFull;
    x = (x | x >> 8) & 0x0000FFFF0000FFFFull;
    return (uint32_t)(x | x >> 16);
}

/*
 * Transpose two 4x4 matrices of 2-bit fields at once, that of the even bytes and that of the odd
 * ones (row = byte), with two delta swaps: byte 2*chunk is the even plane byte of that chunk,
 * byte 2*chunk+1 the odd one.
 */
static uint64_t transpose_pairs(uint64_t x)
{
    uint64_t t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
    return x ^ t ^ t << 28;
}

static void block_portable(const uint8_t *block, uint8_t *ql, uint8_t *qh)
{
    for (int half = 0; half < 2; half++, block += 64, ql += 64, qh += 32) {
        for (int i = 0; i < 64; i += 8) {
            const uint64_t x = load_u64(block + i);
            const uint32_t low = join_nibbles(x), high = join_nibbles(x >> 4);
            memcpy(ql + i / 2, &low, 4);
            memcpy(ql + 32 + i / 2, &high, 4);
        }
        const uint8_t *pairs = block + QH_AT - 32 * half;
        for (int w = 0; w < 4; w++) {
            const uint64_t plane = transpose_pairs(load_u64(pairs + 8 * w));
            for (int chunk = 0; chunk < 4; chunk++) {
                qh[8 * chunk + w] = (uint8_t)(plane >> 16 * chunk);
                qh[8 * chunk + 4 + w] = (uint8_t)(plane >> (16 * chunk + 8));
            }
        }
    }
}

static void planes_portable(const uint8_t *blocks, int64_t n, int scales, uint8_t *ql, uint8_t *qh,
                            uint8_t *scale, uint8_t *steps)
{
    for (int64_t b = 0; b < n; b++) {
        const uint8_t *block = blocks + b * BLOCK_BYTES;
        block_portable(block, ql + b * QL_PLANE, qh + b * QH_PLANE);
        if (scales == SCALES_BF16)
            scales_bf16(block, scale + b * 2 * SUBSCALES);
        else
            scales_exact(block, scale + b * SUBSCALES, steps + b * 2);
    }
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,f16c")))

/* Low nibbles of 64 bytes (64 weights), neighbours joined: 32 plane bytes. */
AVX2 static __m256i join_nibbles_avx2(__m256i a, __m256i b)
{
    const __m256i mask = _mm256_set1_epi8(15), weights = _mm256_set1_epi16(0x1001);
    a = _mm256_maddubs_epi16(_mm256_and_si256(a, mask), weights);
    b = _mm256_maddubs_epi16(_mm256_and_si256(b, mask), weights);
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
}

/* transpose_pairs on all eight words of 32 qh bytes, between the byte gathers before and after. */
AVX2 static __m256i transpose_half_avx2(__m256i x)
{
    const __m256i even_then_odd = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,
                                                   0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    /* per lane: words (even w, odd w, even w+1, odd w+1), byte = chunk -> chunk, parity, w */
    const __m256i chunk_major = _mm256_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15,
                                                 0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    const __m256i lanes_together = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    /* (even w01, odd w01, even w23, odd w23) -> (even w0123, odd w0123) */
    const __m256i pair_words = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
                                                0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    x = _mm256_shuffle_epi8(x, even_then_odd);
    __m256i t = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, 6)),
                                 _mm256_set1_epi32(0x00CC00CC));
    x = _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi32(t, 6)));
    t = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, 12)), _mm256_set1_epi32(0x0000F0F0));
    x = _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi32(t, 12)));
    x = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(x, chunk_major), lanes_together);
    return _mm256_shuffle_epi8(x, pair_words);
}

AVX2 static void scales_avx2(const uint8_t *block, uint8_t *scale)
{
    const __m256 d = _mm256_set1_ps(_cvtsh_ss(load_u16(block + D_AT)));
    const __m128i subscales = _mm_loadu_si128((const __m128i *)(block + SCALES_AT));
    __m256i rounded[2];
    for (int i = 0; i < 2; i++) {
        const __m256i sc = _mm256_cvtepi8_epi32(i ? _mm_srli_si128(subscales, 8) : subscales);
        const __m256 s = _mm256_mul_ps(d, _mm256_cvtepi32_ps(sc));
        const __m256i bits = _mm256_castps_si256(s);
        const __m256i lowest_kept = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), lowest_kept);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(s, s, _CMP_UNORD_Q));
        rounded[i] = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
    }
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xD8);
    _mm256_storeu_si256((__m256i *)scale, packed);
}

AVX2 static void planes_avx2(const uint8_t *blocks, int64_t n, int scales, uint8_t *ql, uint8_t *qh,
                             uint8_t *scale, uint8_t *steps)
{
    for (int64_t b = 0; b < n; b++) {
        const uint8_t *block = blocks + b * BLOCK_BYTES;
        for (int half = 0; half < 2; half++) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(block + 64 * half));
            const __m256i y = _mm256_loadu_si256((const __m256i *)(block + 64 * half + 32));
            const __m256i pairs = _mm256_loadu_si256((const __m256i *)(block + QH_AT + 32 * half));
            __m256i *ql_out = (__m256i *)(ql + b * QL_PLANE + 64 * half);
            _mm256_storeu_si256(ql_out, join_nibbles_avx2(x, y));
            _mm256_storeu_si256(ql_out + 1,
                                join_nibbles_avx2(_mm256_srli_epi16(x, 4), _mm256_srli_epi16(y, 4)));
            _mm256_storeu_si256((__m256i *)(qh + b * QH_PLANE + 32 * half), transpose_half_avx2(pairs));
        }
        if (scales == SCALES_BF16)
            scales_avx2(block, scale + b * 2 * SUBSCALES);
        else
            scales_exact(block, scale + b * SUBSCALES, steps + b * 2);
    }
}
#endif

/* Return the fastest path that this processor supports. */
int q6k_best_path(void)
{
#ifdef HAVE_AVX2
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
        return PATH_AVX2;
#endif
    return PATH_PORTABLE;
}

/*
 * Repack n blocks. ql takes 128 bytes a block, qh 64, scale 32 (bf16) or 16 (exact), steps 2 (exact;
 * untouched for bf16). Nothing may overlap. Returns the index of the first block whose d is NaN or
 * infinite (its arrays are written anyway), -1 if every d is finite, -2 if this processor or
 * build lacks the path.
 */
int64_t q6k_to_planes(int path, const uint8_t *blocks, int64_t n, int scales, uint8_t *ql, uint8_t *qh,
                      uint8_t *scale, uint8_t *steps)
{
    if (path < 0 || path > q6k_best_path())
        return -2;
#ifdef HAVE_AVX2
    if (path == PATH_AVX2)
        planes_avx2(blocks, n, scales, ql, qh, scale, steps);
    else
#endif
        planes_portable(blocks, n, scales, ql, qh, scale, steps);
    for (int64_t b = 0; b < n; b++)
        if ((load_u16(blocks + b * BLOCK_BYTES + D_AT) & 0x7C00) == 0x7C00)
            return b;
    return -1;
}
