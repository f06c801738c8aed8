// Activations in 8 bits, as decode.cuh multiplies them. Comes before every file that makes or reads them.
//
// d_a = max |x| / 127 over 32 values of a row, a = rint(x / d_a); ops/reference.py defines both to the bit. Weights
// whose codes have an offset also need the sums of 16 a, as two int16 in a word for each d_a; those with minimums need d_a
// times the sum of the 32, as three bf16 numbers that add up to its 24 bits.
//
//   Q6K_TOKENS  1, 2, 4 or 8: rows of x there is room for; M may be less
//   Q6K_FUSED   1: every block quantises x for itself; 0: q6k_quantize has done it

#ifndef Q6K_TOKENS
#define Q6K_TOKENS 1
#endif
#ifndef Q6K_FUSED
#define Q6K_FUSED (Q6K_TOKENS <= 2)
#endif

constexpr int TOKENS = Q6K_TOKENS;
// Up to 4 tokens sit in the even columns of the product: then a lane has two sums to scale instead of four.
constexpr int COLUMNS = TOKENS <= 4 ? 1 : 2;
// 64 weights of all tokens. Where they are quantised into shared memory, 16 bytes more than they take keep lanes
// that write them in distinct banks.
constexpr int CHUNK_BYTES = TOKENS * 64 + (Q6K_FUSED ? 16 : 0);
constexpr int CODES_A_BLOCK = 4 * CHUNK_BYTES;
constexpr int STEPS_A_BLOCK = COLUMNS == 1 ? TOKENS * 32 : 256;
constexpr int PARTS_A_BLOCK = TOKENS * 64;

// Where quantised rows go. A part that a weight type does not need is null.
struct Quantized {
  u8* codes;     // in the order of B fragments: [64 weights][token][t][4 sixteens][4 bytes]
  float* steps;  // d_a, in the order of the sums
  u32* sums;     // likewise
  u16* parts;    // B fragments of minimums: [super-block][token][t][3 parts, 1 unused][2 groups of 32]

  // All parts of rows of k activations in one piece of memory, of which two pointers are known.
  __device__ __forceinline__ static Quantized all(u8* codes, float* steps, int k) {
    const int count = super_blocks_of(k) * (STEPS_A_BLOCK / 4);
    return {codes, steps, reinterpret_cast<u32*>(steps + count), reinterpret_cast<u16*>(steps + 2 * count)};
  }
};

// Addresses of the parts in shared memory: of a row, or of what a lane needs of its first super-block.
struct ActivationParts {
  u32 codes, steps, sums, parts;
};

// Lowest bytes of four words.
__device__ __forceinline__ u32 low_bytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The scale d_a of values of which `largest` is the largest magnitude: rounded as the division by 127 that it stands for,
// or NaN.
__device__ __forceinline__ float step_for(float largest) {
  constexpr float PART = 1.0f / 127.0f;
  const float near = largest * PART;
  const bool finite = largest < __uint_as_float(0x7F800000u);
  return finite ? fmaf(fmaf(-near, 127.0f, largest), PART, near) : __uint_as_float(0x7FC00000u);
}

// A group of values to bytes rint(value / d) that end the words they are returned in, as if the division were
// rounded to fp32 before the rint: the remainder corrects the quotient. Values of so small a d that it has no
// reciprocal are raised with it. With d = 0 or NaN all are 0.
template <int COUNT>
__device__ __forceinline__ void quantize_group(const float (&values)[COUNT], float d, u32 (&words)[COUNT]) {
  constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: sums with it are rounded to integers
  const float raised = d > 0x1p-100f ? 1.0f : 0x1p100f, divisor = d * raised, inverse = __frcp_rn(divisor);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float value = values[i] * raised, quotient = value * inverse;
    const float divided = fmaf(fmaf(-quotient, divisor, value), inverse, quotient);
    words[i] = d > 0.0f ? __float_as_uint(divided + TO_INTEGER) : 0;
  }
}

// Quantises a group of 16 of x, `raw`, together with the neighbouring lane's, and writes it where it belongs.
__device__ __forceinline__ void quantize_into(const Quantized& to, const uint4 (&raw)[2], int token, int group,
                                              bool present) {
  float values[16], largest = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const u32 word = word_of(raw[j >> 2], j & 3);
    values[2 * j] = half_to_float(word & 0xFFFFu);
    values[2 * j + 1] = half_to_float(word >> 16);
    largest = largest_or_nan(largest, fabsf(values[2 * j]));
    largest = largest_or_nan(largest, fabsf(values[2 * j + 1]));
  }
  largest = largest_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 1));
  const float d = step_for(largest);
  u32 words[16];
  quantize_group(values, d, words);
  u32 packed[4];
  int sum = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    packed[t] = low_bytes(words[2 * t], words[2 * t + 1], words[2 * t + 8], words[2 * t + 9]);
    sum = __dp4a((int)packed[t], 0x01010101, sum);
  }
  int of_neighbour = 0;
  if (to.sums != nullptr || to.parts != nullptr) of_neighbour = __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
  if (!present) return;
  u8* const code_words = to.codes + (group >> 2) * CHUNK_BYTES + token * 64 + (group & 3) * 4;
#pragma unroll
  for (int t = 0; t < 4; ++t) *reinterpret_cast<u32*>(code_words + t * 16) = packed[t];
  if (group & 1) return;
  const int pair = group >> 1;  // of groups of weights
  const int place = COLUMNS == 1 ? ((pair >> 2) * TOKENS + token) * 4 + (pair & 3)
                                 : (pair >> 1) * 16 + (token >> 1) * 4 + (pair & 1) * 2 + (token & 1);
  to.steps[place] = d;
  if (to.sums != nullptr) to.sums[place] = __byte_perm(sum, of_neighbour, 0x5410);
  if (to.parts == nullptr) return;
  u16* const parts = to.parts + ((pair >> 3) * TOKENS + token) * 32 + (pair >> 1 & 3) * 8 + (pair & 1);
  float left = d * (float)(sum + of_neighbour);
  // Nothing of global memory stays unwritten, though the fourth, zero, is not used.
#pragma unroll
  for (int i = 0; i < (Q6K_FUSED ? 3 : 4); ++i) {
    const u32 part = to_bf16(left);
    parts[2 * i] = (u16)part;
    left -= bf16_to_float(part);
  }
}

// The groups of 16 of a row of k values with those that fill its last super-block, which are zeros.
__device__ __forceinline__ int padded_groups(int k) { return super_blocks_of(k) * (SUPER_BLOCK / 16); }

// A warp's: writes the groups past k of one row.
__device__ __forceinline__ void quantize_padding(const Quantized& to, int k) {
  if (k % SUPER_BLOCK == 0) return;
  const uint4 zeros[2] = {};
  const int group = k / 16 + (threadIdx.x & 31);
  quantize_into(to, zeros, 0, group, group < padded_groups(k));
}

#if Q6K_FUSED
__device__ __forceinline__ int token_of(int at, int groups) {
  return TOKENS <= 2 ? at >= groups : (int)((u32)at / (u32)groups);
}

// Rows of activations, 16-byte aligned and `stride` elements apart: a group of 16 of them is LOADS pieces of memory, of
// which a thread asks for BATCH before it needs the first.
struct Rows {
  static constexpr int BATCH = 4, LOADS = 2;
  const u16* x;
  i64 stride;

  __device__ __forceinline__ void load(uint4 (&raw)[LOADS], int token, int column) const {
    const uint4* const from = reinterpret_cast<const uint4*>(x + token * stride + column);
    raw[0] = from[0], raw[1] = from[1];
  }

  __device__ __forceinline__ void activations(const uint4 (&raw)[LOADS], uint4 (&values)[2]) const {
    values[0] = raw[0], values[1] = raw[1];
  }
};

// Quantises m rows of k values with all threads of a block; columns from `present` on are zeros, not read. `between` is
// called once by each thread, after its first load was issued and before it is needed.
template <int THREADS, typename Source, typename Between>
__device__ __forceinline__ void quantize_rows(const Source& rows, int m, int k, int present, const Quantized& to,
                                              Between between) {
  const int groups = k / 16, total = m * groups;
  constexpr int BATCH = Source::BATCH;
  bool waiting = true;
  for (int begin = threadIdx.x; (begin & ~31) < total; begin += BATCH * THREADS) {
    uint4 raw[BATCH][Source::LOADS] = {};
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if ((begin & ~31) + i * THREADS >= total) break;  // for the whole warp
      const int at = min(begin + i * THREADS, total - 1), token = token_of(at, groups);
      const int column = (at - token * groups) * 16;
      if (column < present) rows.load(raw[i], token, column);
    }
    if (waiting) between();
    waiting = false;
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if ((begin & ~31) + i * THREADS >= total) break;
      const int at = begin + i * THREADS, token = token_of(min(at, total - 1), groups);
      uint4 values[2];
      rows.activations(raw[i], values);
      quantize_into(to, values, token, at - token * groups, at < total);
    }
  }
  if (waiting) between();
}
#endif
