/*
 * Q2_K and Q3_K blocks of 256 weights -> bf16 weights: for types without a packed form.
 *
 *     Q2_K  scales:16 qs:64 d:2 dmin:2                weight = d * (scale & 15) * code - dmin * (scale >> 4)
 *     Q3_K  hmask:32 qs:64 scales:12 d:2              weight = d * (scale - 32) * (code - 4)
 *
 * Weight 32*(4*h + j) + l has its low two bits in bits 2*j of qs[32*h + l], and the third in bit 4*h + j of hmask[l].
 * Sixteen weights share a scale. Of Q3_K's scales the low nibbles are those of eight bytes, first the low ones of all,
 * and the pairs above are those of the last four bytes, likewise.
 *
 * A group has four or eight different weights: they are computed and rounded first, and then looked up.
 */
#include "words.h"

#define TABLE_END 16 /* bytes that may be read behind the last table */

/* Look up 16 codes in a table of bf16 numbers. */
typedef void LookUp(const uint8_t *codes, const uint8_t *table, uint8_t *out);

INLINE void look_up_portable(const uint8_t *codes, const uint8_t *table, uint8_t *out)
{
    for (int l = 0; l < 16; l++)
        memcpy(out + 2 * l, table + 2 * codes[l], 2);
}

/* The low two bits of 256 codes. */
INLINE void two_bits(const uint8_t *qs, uint8_t *codes)
{
    for (int run = 0; run < 8; run++)
        for (int l = 0; l < 32; l++)
            codes[32 * run + l] = qs[run / 4 * 32 + l] >> run % 4 * 2 & 3;
}

INLINE void blocks_q2_k(const uint8_t *blocks, int64_t n, uint8_t *out, LookUp *look_up)
{
    for (int64_t b = 0; b < n; b++, blocks += 84, out += 512) {
        const float d = half_to_float(load_u16(blocks + 80)), dmin = half_to_float(load_u16(blocks + 82));
        uint8_t codes[256], tables[16 * 8 + TABLE_END];
        float values[16 * 4];
        for (int g = 0; g < 16; g++)
            for (int code = 0; code < 4; code++)
                values[4 * g + code] = d * (float)(blocks[g] & 15) * (float)code - dmin * (float)(blocks[g] >> 4);
        round_to_bf16(values, tables, 16 * 4);
        two_bits(blocks + 16, codes);
        for (int g = 0; g < 16; g++)
            look_up(codes + 16 * g, tables + 8 * g, out + 32 * g);
    }
}

INLINE void blocks_q3_k(const uint8_t *blocks, int64_t n, uint8_t *out, LookUp *look_up)
{
    for (int64_t b = 0; b < n; b++, blocks += 110, out += 512) {
        const uint8_t *low = blocks + 96, *high = blocks + 104;
        const float d = half_to_float(load_u16(blocks + 108));
        uint8_t codes[256], tables[16 * 16 + TABLE_END];
        float values[16 * 8];
        for (int g = 0; g < 16; g++) {
            const int scale = (low[g % 8] >> g / 8 * 4 & 15) | (high[g % 4] >> g / 4 * 2 & 3) << 4;
            for (int code = 0; code < 8; code++)
                values[8 * g + code] = d * (float)(scale - 32) * (float)(code - 4);
        }
        round_to_bf16(values, tables, 16 * 8);
        two_bits(blocks + 32, codes);
        for (int run = 0; run < 8; run++)
            for (int l = 0; l < 32; l++)
                codes[32 * run + l] |= (uint8_t)((blocks[l] >> run & 1) << 2);
        for (int g = 0; g < 16; g++)
            look_up(codes + 16 * g, tables + 16 * g, out + 32 * g);
    }
}

static void q2_k_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q2_k(blocks, n, arrays[0], look_up_portable);
}

static void q3_k_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q3_k(blocks, n, arrays[0], look_up_portable);
}

#ifdef ON_AVX2
FAST INLINE void look_up_fast(const uint8_t *codes, const uint8_t *table, uint8_t *out)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)table), at = _mm_loadu_si128((const __m128i *)codes);
    const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    const __m128i low = _mm_shuffle_epi8(_mm_shuffle_epi8(bytes, even), at);
    const __m128i high = _mm_shuffle_epi8(_mm_shuffle_epi8(_mm_srli_epi16(bytes, 8), even), at);
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128((__m128i *)(out + 16), _mm_unpackhi_epi8(low, high));
}
#endif

#ifdef ON_NEON
INLINE void look_up_fast(const uint8_t *codes, const uint8_t *table, uint8_t *out)
{
    const uint8x16_t bytes = vld1q_u8(table), at = vld1q_u8(codes);
    const uint8x16_t low = vuzp1q_u8(bytes, bytes), high = vuzp2q_u8(bytes, bytes);
    vst2q_u8(out, (uint8x16x2_t){{vqtbl1q_u8(low, at), vqtbl1q_u8(high, at)}});
}
#endif

#ifdef FAST
FAST static void q2_k_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q2_k(blocks, n, arrays[0], look_up_fast);
}

FAST static void q3_k_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_q3_k(blocks, n, arrays[0], look_up_fast);
}
#endif
