/*
 * What the block readers share: loads and stores, fp16 and bf16, and the two shuffles of the code planes,
 * on 64-bit words and on AVX2 or NEON registers. Byte 0 of a word is its lowest.
 */
#ifndef Q6K_WORDS_H
#define Q6K_WORDS_H

#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "q6k-convert needs a little-endian machine: GGUF and safetensors are little-endian"
#endif

#if defined(__GNUC__) || defined(__clang__)
/* Readers are templates: their flags and shuffles are constants once they are inlined. */
#define INLINE static inline __attribute__((always_inline, unused))
#else
#define INLINE static inline
#endif

/*
 * FAST marks the functions of the build's second path: AVX2, which the processor is asked for at run time, or NEON,
 * which every 64-bit Arm has. Without it there is the portable path alone.
 */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ON_AVX2 1
#include <immintrin.h>
#define FAST __attribute__((target("avx2,f16c")))
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define ON_NEON 1
#include <arm_neon.h>
#define FAST
#endif

/* Encode n blocks into a type's arrays, which are in the order of its row in q6k_kernels/formats/types.py. */
typedef void Encode(const uint8_t *blocks, int64_t n, uint8_t *const *arrays);

/* Join the nibbles of neighbours: `bytes` low nibbles become bytes/2 plane bytes, then the high ones too. */
typedef void Join(const uint8_t *qs, uint8_t *ql, int bytes);

INLINE uint16_t load_u16(const uint8_t *p)
{
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

INLINE uint32_t load_u32(const uint8_t *p)
{
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

INLINE uint64_t load_u64(const uint8_t *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

INLINE void store_u16(uint8_t *p, uint16_t x) { memcpy(p, &x, 2); }
INLINE void store_u32(uint8_t *p, uint32_t x) { memcpy(p, &x, 4); }
INLINE void store_u64(uint8_t *p, uint64_t x) { memcpy(p, &x, 8); }

/* fp16 -> fp32, exact for every value, subnormals included (nearly all real d are subnormal). */
INLINE float half_to_float(uint16_t h)
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

/*
 * Round fp32 to bf16, to nearest even; every NaN becomes the one quiet NaN, so that all machines write the same.
 * On whole arrays and in signed numbers, which compilers turn into vectors; `n` is at most 128.
 */
INLINE void round_to_bf16(const float *values, uint8_t *out, int n)
{
    int32_t bits[128];
    uint16_t rounded[128];
    memcpy(bits, values, (size_t)n * 4);
    for (int i = 0; i < n; i++) {
        const int32_t nan = -((bits[i] & 0x7FFFFFFF) > 0x7F800000);
        const uint32_t sum = ((uint32_t)bits[i] + 0x7FFFu + ((uint32_t)bits[i] >> 16 & 1)) >> 16;
        rounded[i] = (uint16_t)((sum & ~(uint32_t)nan) | (0x7FC0u & (uint32_t)nan));
    }
    memcpy(out, rounded, (size_t)n * 2);
}

/* The low nibbles of eight bytes, neighbours joined: four bytes. */
INLINE uint32_t join_eight(uint64_t x)
{
    x &= 0x0F0F0F0F0F0F0F0Full;
    x = (x | x >> 4) & 0x00FF00FF00FF00FFull;
    x = (x | x >> 8) & 0x0000FFFF0000FFFFull;
    return (uint32_t)(x | x >> 16);
}

INLINE void join_portable(const uint8_t *qs, uint8_t *ql, int bytes)
{
    for (int i = 0; i < bytes; i += 8) {
        const uint64_t x = load_u64(qs + i);
        store_u32(ql + i / 2, join_eight(x));
        store_u32(ql + bytes / 2 + i / 2, join_eight(x >> 4));
    }
}

/* Of each byte, bits 0,2,4,6 to the low nibble and bits 1,3,5,7 to the high one. */
INLINE uint64_t even_bits_first(uint64_t x)
{
    uint64_t t = (x ^ x >> 1) & 0x2222222222222222ull;
    x ^= t ^ t << 1;
    t = (x ^ x >> 2) & 0x0C0C0C0C0C0C0C0Cull;
    return x ^ t ^ t << 2;
}

#ifdef ON_AVX2
/* round_to_bf16 of eight numbers, each into the low half of 32 bits. */
FAST INLINE __m256i bf16_bits_avx2(__m256 f)
{
    const __m256i bits = _mm256_castps_si256(f);
    const __m256i lowest_kept = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), lowest_kept);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
}

FAST INLINE void join_fast(const uint8_t *qs, uint8_t *ql, int bytes)
{
    if (bytes == 16) {
        const __m128i mask = _mm_set1_epi8(15), weights = _mm_set1_epi16(0x1001);
        const __m128i x = _mm_loadu_si128((const __m128i *)qs);
        const __m128i low = _mm_maddubs_epi16(_mm_and_si128(x, mask), weights);
        const __m128i high = _mm_maddubs_epi16(_mm_and_si128(_mm_srli_epi16(x, 4), mask), weights);
        _mm_storeu_si128((__m128i *)ql, _mm_packus_epi16(low, high));
        return;
    }
    const __m256i mask = _mm256_set1_epi8(15), weights = _mm256_set1_epi16(0x1001);
    for (int i = 0; i < bytes; i += 32) {
        const __m256i x = _mm256_loadu_si256((const __m256i *)(qs + i));
        const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(x, mask), weights);
        const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(x, 4), mask), weights);
        /* Packing works on each half of a register: put the four quarters in order. */
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
        _mm_storeu_si128((__m128i *)(ql + i / 2), _mm256_castsi256_si128(both));
        _mm_storeu_si128((__m128i *)(ql + bytes / 2 + i / 2), _mm256_extracti128_si256(both, 1));
    }
}
#endif

#ifdef ON_NEON
/* Swap the bits of `mask` in each 64-bit word with those n above them. */
#define SWAP_NEON(x, mask, n)                                                               \
    do {                                                                                    \
        const uint64x2_t t = vandq_u64(veorq_u64(x, vshrq_n_u64(x, n)), vdupq_n_u64(mask)); \
        x = veorq_u64(x, veorq_u64(t, vshlq_n_u64(t, n)));                                  \
    } while (0)

/* Bytes 0 of four words, then bytes 1, and so on. */
INLINE void store_across(const uint8x16_t first, const uint8x16_t second, uint8_t *out)
{
    static const uint8_t across[32] = {0, 8,  16, 24, 1, 9,  17, 25, 2, 10, 18, 26, 3, 11, 19, 27,
                                       4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31};
    const uint8x16x2_t words = {{first, second}};
    vst1q_u8(out, vqtbl2q_u8(words, vld1q_u8(across)));
    vst1q_u8(out + 16, vqtbl2q_u8(words, vld1q_u8(across + 16)));
}

/* A shifted insertion keeps the other nibble of its first operand. */
INLINE void join_fast(const uint8_t *qs, uint8_t *ql, int bytes)
{
    if (bytes == 16) {
        const uint8x8_t first = vld1_u8(qs), second = vld1_u8(qs + 8);
        const uint8x8_t even = vuzp1_u8(first, second), odd = vuzp2_u8(first, second);
        vst1_u8(ql, vsli_n_u8(even, odd, 4));
        vst1_u8(ql + 8, vsri_n_u8(odd, even, 4));
        return;
    }
    for (int i = 0; i < bytes; i += 32) {
        const uint8x16_t first = vld1q_u8(qs + i), second = vld1q_u8(qs + i + 16);
        const uint8x16_t even = vuzp1q_u8(first, second), odd = vuzp2q_u8(first, second);
        vst1q_u8(ql + i / 2, vsliq_n_u8(even, odd, 4));
        vst1q_u8(ql + bytes / 2 + i / 2, vsriq_n_u8(odd, even, 4));
    }
}
#endif

#endif
