// The parts of attention: matrix instructions on 16-bit values, and a head's norm and rotary embedding.
//
//   Q6K_HEAD_DIM  values of a head, a multiple of 32 up to 512
//   Q6K_CODES     1: the cache holds keys and values of 8 bits (codes.cuh), which are multiplied as fp16

#ifndef Q6K_HEAD_DIM
#define Q6K_HEAD_DIM 128
#endif
#ifndef Q6K_CODES
#define Q6K_CODES 0
#endif

constexpr int DIM = Q6K_HEAD_DIM;
constexpr int ATTEND_HEADS = 8;  // columns of a product; a block may have fewer
constexpr int ATTEND_KEYS = 16;  // of a warp at a time

__device__ __forceinline__ void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if Q6K_FP16 || Q6K_CODES
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#endif
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pack_weights(float low, float high) {  // as `multiply` takes them
  u32 pair;
#if Q6K_FP16 || Q6K_CODES
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

__device__ __forceinline__ void load_matrices(u32 (&parts)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&parts)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ u32 transposed(u32 pairs) {  // of an 8 x 8 matrix of 16-bit values
  u32 result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pairs));
  return result;
}

// A warp's: mixes a vector of which a lane has values lane, lane + 32 and so on, see codes.cuh.
__device__ __forceinline__ void mix(float (&values)[DIM / 32]) {
  constexpr int TOGETHER = mixed_values(DIM);
#pragma unroll
  for (int apart = 1; apart < 32; apart <<= 1) {
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, values[i], apart);
      values[i] = threadIdx.x & apart ? other - values[i] : values[i] + other;
    }
  }
#pragma unroll
  for (int apart = 1; apart < TOGETHER / 32; apart <<= 1) {
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) {
      if (i & apart) continue;
      const float one = values[i], other = values[i + apart];
      values[i] = one + other, values[i + apart] = one - other;
    }
  }
#pragma unroll
  for (int i = 0; i < DIM / 32; ++i) values[i] *= mixing_factor(TOGETHER);
}

// A warp's: codes of a vector, and their scale.
__device__ __forceinline__ void code_vector(const u16* vector, s8* codes, float* scale, int lane) {
  float values[DIM / 32], largest = 0.0f;
#pragma unroll
  for (int i = 0; i < DIM / 32; ++i) {
    values[i] = half_to_float(vector[lane + 32 * i]);
    largest = largest_or_nan(largest, fabsf(values[i]));
  }
  const Coding coding(largest);
#pragma unroll
  for (int i = 0; i < DIM / 32; ++i) codes[lane + 32 * i] = coding.code(values[i]);
  if (lane == 0) *scale = coding.scale;
}

// What a norm is of: a head, all heads of a projection together, or a head that has rotated.
enum Normed { HEAD = 0, PROJECTION = 1, ROTATED_HEAD = 2 };

// How heads are normed and rotate: the first `rotated` values, of which neighbours are pairs, or the halves.
struct HeadForm {
  int normed, rotated, neighbours;
  float epsilon;
};

constexpr float OWN = -1.0f;  // in place of a projection's inverse: that of the head is computed

// What a lane knows of a head's vector, values lane, lane + 32 and so on, before it is there.
struct Rotation {
  float cosines[DIM / 32], sines[DIM / 32], weights[DIM / 32];

  // `weight` of the norm, or null; cosines and sines of the pairs of what rotates. The other values stay.
  __device__ __forceinline__ void load(const float* weight, const float* of_cosines, const float* of_sines,
                                       const HeadForm& form) {
    const int half = form.rotated / 2;
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) {
      const int d = (threadIdx.x & 31) + 32 * i, angle = form.neighbours ? d / 2 : d < half ? d : d - half;
      cosines[i] = d < form.rotated ? of_cosines[angle] : 1.0f;
      sines[i] = d < form.rotated ? of_sines[angle] : 0.0f;
      weights[i] = weight == nullptr ? 1.0f : weight[d];
    }
  }

  // A warp's: the norm, rounded as 16-bit layers do. `inverse` is the projection's, or OWN.
  __device__ __forceinline__ void norm(float (&values)[DIM / 32], float epsilon, float inverse) const {
    if (inverse == OWN) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < DIM / 32; ++i) squares = fmaf(values[i], values[i], squares);
      inverse = rsqrtf(sum_of_warp(squares) / DIM + epsilon);
    }
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) values[i] = half_to_float(to_half(values[i] * inverse * weights[i]));
  }

  // A warp's: the norm, if there is one, and the rotation, rounded after each; and for codes the mixing.
  __device__ __forceinline__ void apply(const u16* from, const HeadForm& form, bool normed, float inverse,
                                        u16* vector) const {
    const int lane = threadIdx.x & 31, half = form.rotated / 2;
    float values[DIM / 32];
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) values[i] = half_to_float(from[lane + 32 * i]);
    if (normed && form.normed != ROTATED_HEAD) norm(values, form.epsilon, inverse);
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) vector[lane + 32 * i] = to_half(values[i]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) {
      const int d = lane + 32 * i, other = form.neighbours ? d ^ 1 : d < half ? d + half : d - half;
      const float partner = half_to_float(other > d ? vector[other] ^ 0x8000u : vector[other]);
      values[i] = half_to_float(to_half(fmaf(values[i], cosines[i], partner * sines[i])));
    }
    if (normed && form.normed == ROTATED_HEAD) norm(values, form.epsilon, OWN);
    if (Q6K_CODES) mix(values);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) vector[lane + 32 * i] = to_half(values[i]);
  }
};

// Of all threads of a block: what the norm of a projection multiplies its values with, before the weights; heads'
// vectors begin `size` apart. `parts` is for this sum alone.
template <int WARPS>
__device__ __forceinline__ float inverse_of(const u16* from, int heads, int size, float epsilon,
                                            float (&parts)[WARPS]) {
  float squares = 0.0f;
  for (int at = threadIdx.x * 8; at < heads * DIM; at += WARPS * 32 * 8) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from + at / DIM * size + at % DIM);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float low = half_to_float(word_of(raw, j) & 0xFFFFu), high = half_to_float(word_of(raw, j) >> 16);
      squares = fmaf(low, low, fmaf(high, high, squares));
    }
  }
  squares = sum_of_warp(squares);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = squares;
  __syncthreads();
  float all = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) all += parts[w];
  return rsqrtf(all / (float)(heads * DIM) + epsilon);
}

// A warp's: the norm without weights of a head's vector, rounded as 16-bit layers do.
__device__ __forceinline__ void normed_without_weights(const u16* from, float epsilon, u16* vector) {
  float values[DIM / 32], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < DIM / 32; ++i) {
    values[i] = half_to_float(from[(threadIdx.x & 31) + 32 * i]);
    squares = fmaf(values[i], values[i], squares);
  }
  const float inverse = rsqrtf(sum_of_warp(squares) / DIM + epsilon);
#pragma unroll
  for (int i = 0; i < DIM / 32; ++i) vector[(threadIdx.x & 31) + 32 * i] = to_half(values[i] * inverse);
}
