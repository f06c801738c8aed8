/*
 * Q6_K blocks of 256 weights -> planes, with two forms of scales.
 *
 *     ql:128 qh:64 scales:16 d:2
 *
 * A block is two halves of 128 weights. Weight e = 32*j + l (j = 0..3, l = 0..31) of a half has
 *     low nibble  j&1 picks ql[l] or ql[32+l], j>>1 picks its low or high nibble
 *     high pair   (qh[l] >> 2*j) & 3
 *
 * Every qh byte holds one pair of each of the four chunks of its half, and every plane byte takes its four pairs from
 * four bytes of one chunk. So the pairs of the bytes (x0,x2,x4,x6) of a group of eight form a 4x4 matrix of 2-bit
 * fields, and transposing it yields the four plane bytes at once.
 */
#include "words.h"

#define Q6_K_QH_AT 128
#define Q6_K_SCALES_AT 192
#define Q6_K_D_AT 208

/* The high pairs of half a block, 32 bytes -> 32 plane bytes. */
typedef void Pairs(const uint8_t *qh, uint8_t *plane);
/* d * sub-scale of 16 groups, rounded to bf16. */
typedef void Products(const uint8_t *block, uint8_t *scale);

INLINE void blocks_q6_k(const uint8_t *blocks, int64_t n, uint8_t *const *arrays, Join *join, Pairs *pairs,
                        Products *products)
{
    for (int64_t b = 0; b < n; b++, blocks += 210) {
        for (int half = 0; half < 2; half++) {
            join(blocks + 64 * half, arrays[0] + 128 * b + 64 * half, 64);
            pairs(blocks + Q6_K_QH_AT + 32 * half, arrays[1] + 64 * b + 32 * half);
        }
        if (products) {
            products(blocks, arrays[2] + 32 * b);
        } else {
            memcpy(arrays[2] + 16 * b, blocks + Q6_K_SCALES_AT, 16);
            memcpy(arrays[3] + 2 * b, blocks + Q6_K_D_AT, 2);
        }
    }
}

/*
 * Transpose two 4x4 matrices of 2-bit fields at once, that of the even bytes and that of the odd ones (row = byte),
 * with two delta swaps: byte 2*chunk is the even plane byte of that chunk, byte 2*chunk+1 the odd one.
 */
INLINE uint64_t transpose_pairs(uint64_t x)
{
    uint64_t t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
    return x ^ t ^ t << 28;
}

INLINE void pairs_portable(const uint8_t *qh, uint8_t *plane)
{
    const uint64_t even = 0x00FF00FF00FF00FFull;
    uint64_t w[4];
    for (int i = 0; i < 4; i++)
        w[i] = transpose_pairs(load_u64(qh + 8 * i));
    /* 16 bits a chunk: the even bytes of two words, and the odd ones. */
    const uint64_t even_01 = (w[0] & even) | (w[1] & even) << 8, even_23 = (w[2] & even) | (w[3] & even) << 8;
    const uint64_t odd_01 = (w[0] >> 8 & even) | (w[1] & ~even), odd_23 = (w[2] >> 8 & even) | (w[3] & ~even);
    for (int chunk = 0, at = 0; chunk < 4; chunk++, at += 16)
        store_u64(plane + 8 * chunk, (even_01 >> at & 0xFFFF) | (even_23 >> at & 0xFFFF) << 16 |
                                         (odd_01 >> at & 0xFFFF) << 32 | (odd_23 >> at & 0xFFFF) << 48);
}

INLINE void products_portable(const uint8_t *block, uint8_t *scale)
{
    const float d = half_to_float(load_u16(block + Q6_K_D_AT));
    float products[16];
    for (int g = 0; g < 16; g++)
        products[g] = d * (float)(int8_t)block[Q6_K_SCALES_AT + g];
    round_to_bf16(products, scale, 16);
}

static void q6_k_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q6_k(blocks, n, arrays, join_portable, pairs_portable, products_portable);
}

static void q6_k_exact_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q6_k(blocks, n, arrays, join_portable, pairs_portable, NULL);
}

#ifdef ON_AVX2
/* pairs_portable on all eight words of 32 qh bytes, between the byte gathers before and after. */
FAST INLINE void pairs_fast(const uint8_t *qh, uint8_t *plane)
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
    __m256i x = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)qh), even_then_odd);
    __m256i t = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, 6)), _mm256_set1_epi32(0x00CC00CC));
    x = _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi32(t, 6)));
    t = _mm256_and_si256(_mm256_xor_si256(x, _mm256_srli_epi32(x, 12)), _mm256_set1_epi32(0x0000F0F0));
    x = _mm256_xor_si256(x, _mm256_xor_si256(t, _mm256_slli_epi32(t, 12)));
    x = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(x, chunk_major), lanes_together);
    _mm256_storeu_si256((__m256i *)plane, _mm256_shuffle_epi8(x, pair_words));
}

FAST INLINE void products_fast(const uint8_t *block, uint8_t *scale)
{
    const __m256 d = _mm256_set1_ps(_cvtsh_ss(load_u16(block + Q6_K_D_AT)));
    const __m128i subscales = _mm_loadu_si128((const __m128i *)(block + Q6_K_SCALES_AT));
    __m256i rounded[2];
    for (int i = 0; i < 2; i++) {
        const __m256i sc = _mm256_cvtepi8_epi32(i ? _mm_srli_si128(subscales, 8) : subscales);
        rounded[i] = bf16_bits_avx2(_mm256_mul_ps(d, _mm256_cvtepi32_ps(sc)));
    }
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xD8);
    _mm256_storeu_si256((__m256i *)scale, packed);
}
#endif

#ifdef ON_NEON
/* pairs_portable on two words at a time; then bytes 2*chunk and 2*chunk+1 of all four words are that chunk's. */
INLINE void pairs_fast(const uint8_t *qh, uint8_t *plane)
{
    uint8x16_t words[2];
    for (int i = 0; i < 2; i++) {
        uint64x2_t x = vreinterpretq_u64_u8(vld1q_u8(qh + 16 * i));
        SWAP_NEON(x, 0x0000CCCC0000CCCCull, 14);
        SWAP_NEON(x, 0x00000000F0F0F0F0ull, 28);
        words[i] = vreinterpretq_u8_u64(x);
    }
    store_across(words[0], words[1], plane);
}

/* Compilers turn it into vectors. */
INLINE void products_fast(const uint8_t *block, uint8_t *scale) { products_portable(block, scale); }
#endif

#ifdef FAST
FAST static void q6_k_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q6_k(blocks, n, arrays, join_fast, pairs_fast, products_fast);
}

FAST static void q6_k_exact_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q6_k(blocks, n, arrays, join_fast, pairs_fast, NULL);
}
#endif
