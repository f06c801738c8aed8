/*
 * Blocks of 32 weights -> planes.
 *
 *     Q4_0, IQ4_NL  d:2 qs:16              Q5_0  d:2 qh:4 qs:16            Q8_0   d:2 qs:32
 *     Q4_1          d:2 m:2 qs:16          Q5_1  d:2 m:2 qh:4 qs:16        MXFP4  e:1 qs:16
 *
 * Weight j is the low nibble of qs[j], weight 16+j the high one; bit j of qh is the fifth bit of weight j.
 */
#include "words.h"

/*
 * scale: bytes of the scale; minimum: whether m follows, stored as min = -m; fifth: whether qh follows.
 */
INLINE void blocks_32(const uint8_t *blocks, int64_t n, uint8_t *const *arrays, int scale, int minimum, int fifth,
                      Join *join)
{
    const int qh_at = scale + 2 * minimum, qs_at = qh_at + 4 * fifth;
    uint8_t *const *scales = arrays + 1 + fifth;
    for (int64_t b = 0; b < n; b++, blocks += qs_at + 16) {
        join(blocks + qs_at, arrays[0] + 16 * b, 16);
        if (fifth)
            store_u32(arrays[1] + 4 * b, (uint32_t)even_bits_first(load_u32(blocks + qh_at)));
        memcpy(scales[0] + scale * b, blocks, (size_t)scale);
        if (minimum)
            store_u16(scales[1] + 2 * b, load_u16(blocks + scale) ^ 0x8000);
    }
}

/* Codes are bytes, in order. */
static void q8_0(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    for (int64_t b = 0; b < n; b++, blocks += 34) {
        memcpy(arrays[0] + 32 * b, blocks + 2, 32);
        memcpy(arrays[1] + 2 * b, blocks, 2);
    }
}

static void half_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 0, 0, join_portable);
}

static void half_min_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 1, 0, join_portable);
}

static void half_fifth_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 0, 1, join_portable);
}

static void half_min_fifth_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 1, 1, join_portable);
}

static void exponent_portable(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 1, 0, 0, join_portable);
}

#ifdef FAST
FAST static void half_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 0, 0, join_fast);
}

FAST static void half_min_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 1, 0, join_fast);
}

FAST static void half_fifth_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 0, 1, join_fast);
}

FAST static void half_min_fifth_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 2, 1, 1, join_fast);
}

FAST static void exponent_fast(const uint8_t *blocks, int64_t n, uint8_t *const *arrays)
{
    blocks_32(blocks, n, arrays, 1, 0, 0, join_fast);
}
#endif
