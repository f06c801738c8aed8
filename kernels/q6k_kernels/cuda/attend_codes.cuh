// How a warp holds and multiplies 16 keys, or 16 values, of 8 bits (codes.cuh), as attend_halves.cuh does those of 16.
//
// All products are of fp16, whatever the activations are: codes are whole numbers there. Queries are multiplied by a
// power of two, which brings the largest value of a head below 2; the scores take it back. A weight is multiplied by
// the value's scale before it is rounded, by adding the scale's logarithm to the score, so that the largest is 1.

#if Q6K_CODES
typedef s8 Held;  // a number in the cache

// Two of the four bytes of a word, in fp16: 0x64uu is 1024 + u.
template <u32 SELECTOR>
__device__ __forceinline__ u32 widened(u32 biased) {
  u32 pair;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(__byte_perm(biased, 0x64646464u, SELECTOR)), "r"(0x64806480u));
  return pair;
}

struct Piece {
  static constexpr int ROW = DIM + 16;
  static constexpr int SCALES_AT = ATTEND_KEYS * ROW;  // beside keys: their scales, then those of the values
  static constexpr int BYTES = SCALES_AT + 2 * ATTEND_KEYS * 4;

  struct Queries {
    static constexpr bool KEPT = DIM <= 256;
    u32 kept[KEPT ? DIM / 16 : 1][2];
    const u16* from;
    float to_fp16, back;

    __device__ __forceinline__ Queries(const u16 (&queries)[ATTEND_HEADS + 1][DIM + 8], int lane)
        : from(&queries[lane >> 2][(lane & 3) * 4]) {
      float largest = 0.0f;
      for (int c = 0; c < DIM / 16; ++c) {
#pragma unroll
        for (int j = 0; j < 4; ++j) largest = largest_or_nan(largest, fabsf(half_to_float(from[c * 16 + j])));
      }
      largest = largest_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
      largest = largest_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 2));
      const u32 exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
      to_fp16 = __uint_as_float((254u - exponent) << 23);
      back = __uint_as_float(exponent << 23);
      if (KEPT) {
#pragma unroll
        for (int c = 0; c < DIM / 16; ++c) kept[KEPT ? c : 0][0] = read(c, 0), kept[KEPT ? c : 0][1] = read(c, 1);
      }
    }

    // Dims 16 c + 4t + 2 half and + 1 of head g.
    __device__ __forceinline__ u32 read(int c, int half) const {
      const u32 two = *reinterpret_cast<const u32*>(from + c * 16 + half * 2);
      return pack_weights(half_to_float(two & 0xFFFFu) * to_fp16, half_to_float(two >> 16) * to_fp16);
    }

    __device__ __forceinline__ u32 pair(int c, int half) const {
      return KEPT ? kept[KEPT ? c : 0][half] : read(c, half);
    }

    // What the scores of a head are multiplied with. All lanes of a warp call it.
    __device__ __forceinline__ float factor(int head) const { return __shfl_sync(0xFFFFFFFFu, back, head * 4); }
  };

  static __device__ __forceinline__ void score(float (&parts)[2][4], u32 keys, const Queries& queries, int lane) {
    const u32 key_at = keys + (lane & 15) * ROW + (lane >> 4) * 16;
#pragma unroll
    for (int c = 0; c < DIM / 16; c += 2) {
      u32 words[4];  // of 16 dims, keys g and g + 8; of the next 16
      load_matrices(words, key_at + c * 16);
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const u32 low = words[2 * next] ^ 0x80808080u, high = words[2 * next + 1] ^ 0x80808080u;
        multiply(parts[next], widened<0x4140>(low), widened<0x4140>(high), widened<0x4342>(low),
                 widened<0x4342>(high), queries.pair(c + next, 0), queries.pair(c + next, 1));
      }
    }
  }

  // Adds values times weights to sums[i]: dims 16 i + 2g and + 1, heads 2t and 2t + 1.
  static __device__ __forceinline__ void add(float (&sums)[DIM / 16][4], u32 values, u32 b0, u32 b1, int lane) {
    const u32 value_at = values + (lane & 15) * ROW + (lane >> 4) * 16;
#pragma unroll
    for (int i = 0; i < DIM / 16; i += 2) {
      u32 words[4];  // dims 2g and 2g + 1 of values 2t and 2t + 1, and of 2t + 8 and 2t + 9; of the next 16 dims
      load_transposed(words, value_at + i * 16);
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const u32 first = words[2 * next] ^ 0x80808080u, second = words[2 * next + 1] ^ 0x80808080u;
        multiply(sums[i + next], widened<0x4240>(first), widened<0x4341>(first), widened<0x4240>(second),
                 widened<0x4341>(second), b0, b1);
      }
    }
  }

  static __device__ __forceinline__ int dim_of(int i, int upper, int g) { return i * 16 + 2 * g + upper; }
};
#endif
