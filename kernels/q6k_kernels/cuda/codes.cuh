// Keys and values of 8 bits, as generate/cache_codes.py defines them: a code for each value, and a scale for each head
// and token. heads.cuh or chunk_heads.cuh, which come after this file, mix keys and queries before.

constexpr float MOST_CODE = 127.0f;
constexpr float LEAST_LARGEST = 7.888609052210118e-31f;  // 2^-100

// How a vector is coded.
struct Coding {
  float factor, scale;

  // A warp's; `largest` of the magnitudes that a lane has.
  __device__ __forceinline__ explicit Coding(float largest) {
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) {
      largest = largest_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, apart));
    }
    largest = largest_or_nan(largest, LEAST_LARGEST);
    factor = __fdiv_rn(MOST_CODE, largest);
    scale = __fdiv_rn(largest, MOST_CODE);
  }

  __device__ __forceinline__ s8 code(float value) const { return (s8)(int)rintf(value * factor); }
};

// Keys and queries are mixed: a Hadamard transform of so many neighbours, divided by the root of their number.
__device__ constexpr int mixed_values(int dim) { return dim & -dim; }

__device__ constexpr float mixing_factor(int values) {
  return values == 1 ? 1.0f : values == 2 ? 0.70710678118654752f : mixing_factor(values / 4) / 2;
}
