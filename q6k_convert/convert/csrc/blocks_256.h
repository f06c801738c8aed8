/*
 * Q4_K, Q5_K and IQ4_XS blocks of 256 weights -> planes.
 *
 *     Q4_K    d:2 dmin:2 scales:12 qs:128             IQ4_XS  d:2 scales_h:2 scales_l:4 qs:128
 *     Q5_K    d:2 dmin:2 scales:12 qh:32 qs:128
 *
 * Q4_K and Q5_K: qs[32c+l] holds weight l of group 2c in its low nibble and of group 2c+1 in its high one; bit g of
 * qh[l] is the fifth bit of weight l of group g. IQ4_XS: each 16 bytes of qs are 32 weights as in `blocks_32.h`.
 */
#include "words.h"

/* Bit g of 32 bytes -> the four plane bytes of group g, for the eight groups one after the other. */
typedef void FifthBits(const uint8_t *qh, uint8_t *plane);

/* Eight 6-bit sub-scales and mins. Of 4..7 the low four bits are in the last four bytes, the others above 0..3. */
INLINE void six_bits(const uint8_t *packed, uint8_t *scale, uint8_t *least)
{
    const uint32_t first = load_u32(packed), second = load_u32(packed + 4), third = load_u32(packed + 8);
    store_u32(scale, first & 0x3F3F3F3Fu);
    store_u32(scale + 4, (third & 0x0F0F0F0Fu) | (first >> 2 & 0x30303030u));
    store_u32(least, second & 0x3F3F3F3Fu);
    store_u32(least + 4, (third >> 4 & 0x0F0F0F0Fu) | (second >> 2 & 0x30303030u));
}

INLINE void blocks_k(const uint8_t *blocks, int64_t n, uint8_t *const *arrays, FifthBits *fifth_bits, Join *join)
{
    const int fifth = fifth_bits != NULL, qs_at = 16 + 32 * fifth;
    uint8_t *const *scales = arrays + 1 + fifth;
    for (int64_t b = 0; b < n; b++, blocks += qs_at + 128) {
        for (int i = 0; i < 128; i += 32)
            join(blocks + qs_at + i, arrays[0] + 128 * b + i, 32);
        if (fifth)
            fifth_bits(blocks + 16, arrays[1] + 32 * b);
        six_bits(blocks + 4, scales[0] + 8 * b, scales[1] + 8 * b);
        memcpy(scales[2] + 2 * b, blocks, 2);
        memcpy(scales[3] + 2 * b, blocks + 2, 2);
    }
}

/* A group's sub-scale is a nibble of scales_l under a pair of scales_h, minus 32. */
INLINE uint64_t sub_scales_iq4_xs(const uint8_t *block)
{
    uint64_t high = load_u16(block + 2), low = load_u32(block + 4);
    low = (low | low << 16) & 0x0000FFFF0000FFFFull;
    low = (low | low << 8) & 0x00FF00FF00FF00FFull;
    low = (low | low << 4) & 0x0F0F0F0F0F0F0F0Full;
    high = (high | high << 24) & 0x000000FF000000FFull;
    high = (high | high << 12) & 0x000F000F000F000Full;
    high = (high | high << 6) & 0x0303030303030303ull;
    /* u - 32 in two's complement is (u + 96) with its sign bit turned; no byte carries. */
    return ((low | high << 4) + 0x6060606060606060ull) ^ 0x8080808080808080ull;
}

INLINE void blocks_iq4_xs(const uint8_t *blocks, int64_t n, uint8_t *const *arrays, Join *join)
{
    for (int64_t b = 0; b < n; b++, blocks += 136) {
        for (int i = 0; i < 128; i += 16)
            join(blocks + 8 + i, arrays[0] + 128 * b + i, 16);
        store_u64(arrays[1] + 8 * b, sub_scales_iq4_xs(blocks));
        memcpy(arrays[2] + 2 * b, blocks, 2);
    }
}

/* Each eight bytes of qh are an 8x8 matrix of bits; its transpose has the bits of group g in byte g. */
INLINE void fifth_bits_portable(const uint8_t *qh, uint8_t *plane)
{
    for (int c = 0; c < 4; c++) {
        uint64_t x = load_u64(qh + 8 * c), t;
        t = (x ^ x >> 7) & 0x00AA00AA00AA00AAull;
        x ^= t ^ t << 7;
        t = (x ^ x >> 14) & 0x0000CCCC0000CCCCull;
        x ^= t ^ t << 14;
        t = (x ^ x >> 28) & 0x00000000F0F0F0F0ull;
        x = even_bits_first(x ^ t ^ t << 28);
        for (int g = 0; g < 8; g++)
            plane[4 * g + c] = (uint8_t)(x >> 8 * g);
    }
}

static void q4_k_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_k(blocks, n, arrays, NULL, join_portable);
}

static void q5_k_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_k(blocks, n, arrays, fifth_bits_portable, join_portable);
}

static void iq4_xs_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_iq4_xs(blocks, n, arrays, join_portable);
}

#ifdef ON_AVX2
/* The top bits of 32 bytes are four plane bytes, once even bytes stand before odd ones in each eight. */
FAST INLINE void fifth_bits_fast(const uint8_t *qh, uint8_t *plane)
{
    const __m256i even_then_odd = _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,
                                                   0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    __m256i x = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)qh), even_then_odd);
    for (int g = 7; g >= 0; g--, x = _mm256_slli_epi16(x, 1))
        store_u32(plane + 4 * g, (uint32_t)_mm256_movemask_epi8(x));
}
#endif

#ifdef ON_NEON
/* fifth_bits_portable on two words at a time; then byte g of all four words are the plane bytes of group g. */
INLINE void fifth_bits_fast(const uint8_t *qh, uint8_t *plane)
{
    uint8x16_t words[2];
    for (int i = 0; i < 2; i++) {
        uint64x2_t x = vreinterpretq_u64_u8(vld1q_u8(qh + 16 * i));
        SWAP_NEON(x, 0x00AA00AA00AA00AAull, 7);
        SWAP_NEON(x, 0x0000CCCC0000CCCCull, 14);
        SWAP_NEON(x, 0x00000000F0F0F0F0ull, 28);
        SWAP_NEON(x, 0x2222222222222222ull, 1);
        SWAP_NEON(x, 0x0C0C0C0C0C0C0C0Cull, 2);
        words[i] = vreinterpretq_u8_u64(x);
    }
    store_across(words[0], words[1], plane);
}
#endif

#ifdef FAST
FAST static void q4_k_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_k(blocks, n, arrays, NULL, join_fast);
}

FAST static void q5_k_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_k(blocks, n, arrays, fifth_bits_fast, join_fast);
}

FAST static void iq4_xs_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_iq4_xs(blocks, n, arrays, join_fast);
}
#endif
