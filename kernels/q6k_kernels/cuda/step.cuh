// The parts of a decode step between its products: one token's residual sum, norm and gate, each followed by the
// quantisation that the next product needs (quantize.cuh, which comes before this file, with one token). They are
// tiny and mostly wait; meanwhile the next product loads its first tiles.
//
//   Q6K_NORM_GROUPS  groups of 16 values that each of 256 threads has of a row that is normed

static_assert(TOKENS == 1 && !Q6K_FUSED, "a step is of one token, quantised once for all blocks");

#ifndef Q6K_NORM_GROUPS
#define Q6K_NORM_GROUPS 1
#endif

constexpr int NORM_THREADS = 256;
constexpr int NORM_GROUPS = Q6K_NORM_GROUPS;
constexpr int GATE_THREADS = 128;

enum Gate { SILU = 0, GELU_TANH = 1, RELU_SQUARED = 2 };

__device__ __forceinline__ void load_16(const u16* from, uint4 (&raw)[2]) {
  raw[0] = reinterpret_cast<const uint4*>(from)[0];
  raw[1] = reinterpret_cast<const uint4*>(from)[1];
}

__device__ __forceinline__ void store_16(u16* to, const uint4 (&raw)[2]) {
  reinterpret_cast<uint4*>(to)[0] = raw[0];
  reinterpret_cast<uint4*>(to)[1] = raw[1];
}

__device__ __forceinline__ void to_floats(const uint4 (&raw)[2], float (&values)[16]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const u32 word = word_of(raw[j >> 2], j & 3);
    values[2 * j] = half_to_float(word & 0xFFFFu);
    values[2 * j + 1] = half_to_float(word >> 16);
  }
}

__device__ __forceinline__ void to_halves(const float (&values)[16], uint4 (&raw)[2]) {
  u32 words[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) words[j] = pack_halves(values[2 * j], values[2 * j + 1]);
  raw[0] = make_uint4(words[0], words[1], words[2], words[3]);
  raw[1] = make_uint4(words[4], words[5], words[6], words[7]);
}

// Over all threads of the block, in one order. `parts` is for this sum alone.
__device__ __forceinline__ float block_sum(float value, float* parts) {
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < NORM_THREADS / 32; ++w) sum += parts[w];
  return sum;
}

// What the values of a row of k are multiplied with in its norm, before the weights. With `centred` their mean is
// subtracted from them first; those past k stay zeros.
__device__ __forceinline__ float inverse_root(float (&values)[NORM_GROUPS][16], bool centred, float epsilon, int k,
                                              float (&parts)[2][NORM_THREADS / 32]) {
  float sum = 0.0f;
  if (centred) {
#pragma unroll
    for (int i = 0; i < NORM_GROUPS; ++i) {
#pragma unroll
      for (int j = 0; j < 16; ++j) sum += values[i][j];
    }
    const float mean = block_sum(sum, parts[0]) / (float)k;
#pragma unroll
    for (int i = 0; i < NORM_GROUPS; ++i) {
      if (threadIdx.x + i * NORM_THREADS >= k / 16) break;
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] -= mean;
    }
    sum = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) {
#pragma unroll
    for (int j = 0; j < 16; ++j) sum = fmaf(values[i][j], values[i][j], sum);
  }
  return rsqrtf(block_sum(sum, parts[1]) / (float)k + epsilon);
}

__device__ __forceinline__ void load_weights(const float* from, float (&weights)[16]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float4 four = reinterpret_cast<const float4*>(from)[j];
    weights[4 * j] = four.x, weights[4 * j + 1] = four.y, weights[4 * j + 2] = four.z, weights[4 * j + 3] = four.w;
  }
}

// sum = (hidden + (norm of) delta) * scale; x = (norm of) sum: as 16-bit values, in 8 bits, or both.
//
// Parameters, all of one row of k values, a multiple of 32, at most 4096 NORM_GROUPS: hidden; delta, or null to add
// nothing; after, the weight of delta's own norm, or null for none; the norm's weight, or null for none; sum, x, or
// null; codes and steps, as q6k_quantize writes them, or null; factor, of delta after its norm; scale, of the sum, a
// 16-bit number; the norms' epsilon; centred, whether norms subtract the mean before. Norms are
// root mean squares; their weights are fp32. One block. The weights are loaded before the wait, because later the next
// product's copies keep memory busy.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    q6k_add_norm(const u16* hidden, const u16* delta, const float* after, const float* weight, u16* sum, u16* x,
                 u8* codes, float* steps, float factor, float scale, float epsilon, int centred, int k) {
  __shared__ float parts_after[2][NORM_THREADS / 32], parts[2][NORM_THREADS / 32];
  let_dependents_start();
  const int groups = k / 16;
  float weights_after[NORM_GROUPS][16], weights[NORM_GROUPS][16];
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) {
    const int group = threadIdx.x + i * NORM_THREADS;
    if (group >= groups) break;
    if (weight != nullptr) load_weights(weight + group * 16, weights[i]);
    if (after != nullptr) load_weights(after + group * 16, weights_after[i]);
  }
  uint4 raw[2], before[NORM_GROUPS][2] = {}, added[NORM_GROUPS][2] = {};
  float values[NORM_GROUPS][16] = {};
  wait_for_previous_grid();
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) {
    const int group = threadIdx.x + i * NORM_THREADS;
    if (group >= groups) break;
    load_16(hidden + group * 16, before[i]);
    if (delta != nullptr) load_16(delta + group * 16, added[i]);
  }
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) to_floats(added[i], values[i]);
  if (after != nullptr) {
    const float inverse = inverse_root(values, centred, epsilon, k, parts_after);
#pragma unroll
    for (int i = 0; i < NORM_GROUPS; ++i) {
      const int group = threadIdx.x + i * NORM_THREADS;
      if (group >= groups) break;
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] = values[i][j] * inverse * weights_after[i][j];
      to_halves(values[i], raw);
      to_floats(raw, values[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) {
    const int group = threadIdx.x + i * NORM_THREADS;
    if (group >= groups) break;
    float own[16];
    to_floats(before[i], own);
#pragma unroll
    for (int j = 0; j < 16; ++j) values[i][j] = fmaf(values[i][j], factor, own[j]);
    to_halves(values[i], raw);
    to_floats(raw, values[i]);
    if (scale != 1.0f) {
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] *= scale;
      to_halves(values[i], raw);
      to_floats(raw, values[i]);
    }
    if (sum != nullptr) store_16(sum + group * 16, raw);
  }
  float inverse = 1.0f;
  if (weight != nullptr) inverse = inverse_root(values, centred, epsilon, k, parts);
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) {
    const int group = threadIdx.x + i * NORM_THREADS;
    if ((group & ~31) >= groups) break;  // for the whole warp
    const bool present = group < groups;
    if (present && weight != nullptr) {
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] = values[i][j] * inverse * weights[i][j];
    }
    to_halves(values[i], raw);
    if (x != nullptr && present) store_16(x + group * 16, raw);
    if (codes != nullptr) quantize_into(Quantized::all(codes, steps, k), raw, 0, group, present);
  }
}

// x = gate's activation * up: as 16-bit values, in 8 bits, or both.
//
// Parameters, all of one row of k values: gate; up, or null for the activation alone; x, or null; codes and steps, as q6k_quantize writes them, or
// null; kind, a Gate; k. `gate` and `up` are in rows of `width` values, a multiple of 16, `stride` apart. A thread for
// each 16.
extern "C" __global__ void __launch_bounds__(GATE_THREADS)
    q6k_gate(const u16* gate, const u16* up, u16* x, u8* codes, float* steps, int kind, int k, int width,
             int stride) {
  let_dependents_start();
  const int groups = k / 16, group = blockIdx.x * GATE_THREADS + threadIdx.x;
  const bool present = group < groups;
  uint4 raw[2] = {}, raw_up[2] = {};
  wait_for_previous_grid();
  if (present) {
    const int at = group * 16 / width * stride + group * 16 % width;
    load_16(gate + at, raw);
    if (up != nullptr) load_16(up + at, raw_up);
  }
  float values[16], factors[16];
  to_floats(raw, values);
  to_floats(raw_up, factors);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float v = values[j];
    // gelu's tanh(u) is 1 - 2 / (1 + e^2u), so 0.5 (1 + tanh(u)) is the logistic function of 2u.
    const float u = kind == GELU_TANH ? 1.5957691216057308f * fmaf(0.044715f * v * v, v, v) : v;
    const float activated = kind == RELU_SQUARED ? (v < 0.0f ? 0.0f : v * v) : __fdividef(v, 1.0f + __expf(-u));
    values[j] = up == nullptr ? activated : activated * factors[j];
  }
  to_halves(values, raw);
  if (x != nullptr && present) store_16(x + group * 16, raw);
  if (codes != nullptr) quantize_into(Quantized::all(codes, steps, k), raw, 0, group, present);
}

// x = sum of rows, each times its weight.
//
// Parameters: rows 16-bit (top, k); weights fp32 (top,); x 16-bit (k,); k, a multiple of 16. A thread for each 16.
extern "C" __global__ void __launch_bounds__(GATE_THREADS)
    q6k_combine(const u16* rows, const float* weights, u16* x, int top, int k) {
  let_dependents_start();
  const int group = blockIdx.x * GATE_THREADS + threadIdx.x;
  wait_for_previous_grid();
  if (group >= k / 16) return;
  float sums[16] = {}, values[16];
  uint4 raw[2];
  for (int row = 0; row < top; ++row) {
    const float weight = weights[row];
    load_16(rows + (i64)row * k + group * 16, raw);
    to_floats(raw, values);
#pragma unroll
    for (int j = 0; j < 16; ++j) sums[j] = fmaf(values[j], weight, sums[j]);
  }
  to_halves(sums, raw);
  store_16(x + group * 16, raw);
}
