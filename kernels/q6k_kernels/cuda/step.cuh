// The parts of a decode step between its products: one token's residual sum, norm and gate, each followed by the
// quantisation that the next product needs (quantize.cuh, which comes before this file, and before it gates.cuh and
// sixteens.cuh). They are tiny and mostly wait; meanwhile the next product loads its first tiles. Of several texts,
// q6k_add_norm and q6k_gate take the tokens of up to TOKENS.
//
//   Q6K_NORM_GROUPS  groups of 16 values that each of 256 threads has of a row that is normed
//   Q6K_CENTRED      1: norms subtract the mean first
//   Q6K_GATE         the activation of q6k_gate, a Gate

static_assert(!Q6K_FUSED, "a step is quantised once for all blocks");

#ifndef Q6K_NORM_GROUPS
#define Q6K_NORM_GROUPS 1
#endif
#ifndef Q6K_CENTRED
#define Q6K_CENTRED 0
#endif
#ifndef Q6K_GATE
#define Q6K_GATE 0
#endif

constexpr int NORM_THREADS = 256;
// Two blocks of the product that follows leave room for a norm of 80 registers. Longer rows need more than there is.
#if __CUDA_ARCH__ == 900 && Q6K_TOKENS == 1 && Q6K_NORM_GROUPS == 1
#define Q6K_NORM_LIMITS __maxnreg__(80)
#else
#define Q6K_NORM_LIMITS __launch_bounds__(NORM_THREADS)
#endif
constexpr int NORM_GROUPS = Q6K_NORM_GROUPS;
constexpr int GATE_THREADS = 128;

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

// What the values of a row of k are multiplied with in its norm, before the weights. If norms are centred the mean is
// subtracted from them first; those past k stay zeros.
__device__ __forceinline__ float inverse_root(float (&values)[NORM_GROUPS][16], float epsilon, int k,
                                              float (&parts)[2][NORM_THREADS / 32]) {
  float sum = 0.0f;
  if (Q6K_CENTRED) {
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

// Calls each(i, group) for the groups of a row that this thread has.
template <typename Each>
__device__ __forceinline__ void for_groups(int groups, Each each) {
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) {
    const int group = threadIdx.x + i * NORM_THREADS;
    if (group < groups) each(i, group);
  }
}

// The weight of a norm, loaded before the wait, because later the next product's copies keep memory busy.
struct Norm {
  float weights[NORM_GROUPS][16];

  __device__ __forceinline__ void load(const float* from, int groups) {
    if (from == nullptr) return;
    for_groups(groups, [&](int i, int group) { load_weights(from + group * 16, weights[i]); });
  }

  // Norm of a row of 16-bit values, in place.
  __device__ __forceinline__ void apply(float (&values)[NORM_GROUPS][16], float epsilon, int k,
                                        float (&parts)[2][NORM_THREADS / 32]) const {
    const float inverse = inverse_root(values, epsilon, k, parts);
    for_groups(k / 16, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] = values[i][j] * inverse * weights[i][j];
      round_16(values[i]);
    });
  }
};

// Outputs of experts that are not added up yet, and a row beside them.
struct Mixed {
  const u16* rows;       // (top, k)
  const float* factors;  // of the rows, then of `beside` if `gated`
  const u16* beside;     // or null
  const float *after_rows, *after_beside;  // weights of the norms of the rows' sum and of `beside`, or null
  int top, gated;

  __device__ __forceinline__ void sum(int group, int k, float (&sums)[16]) const {
    constexpr int AT_ONCE = 4;  // more registers would find no room beside the product before
    for (int first = 0; first < top; first += AT_ONCE) {
      uint4 raw[AT_ONCE][2] = {};
      float values[16];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (first + i < top) load_16(rows + (i64)(first + i) * k + group * 16, raw[i]);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const float factor = first + i < top ? factors[first + i] : 0.0f;
        to_floats(raw[i], values);
#pragma unroll
        for (int j = 0; j < 16; ++j) sums[j] = fmaf(values[j], factor, sums[j]);
      }
    }
    round_16(sums);
  }
};

// A further norm of the sum, and where it goes.
struct Further {
  const float* weight;
  u16* x;
};

// Shared by the kernels below, of one row. MIXED: what is added is `mixed`, else `delta`. MORE: `further` is wanted.
template <bool MIXED, bool MORE>
__device__ __forceinline__ void add_norm(const u16* hidden, const u16* delta, const Mixed& mixed, const float* after,
                                         const float* weight, const Further (&further)[2], u16* sum, u16* x, u8* codes,
                                         float* steps, float factor, float scale, float epsilon, int k,
                                         int token = 0) {
  __shared__ float parts[4][2][NORM_THREADS / 32];
  let_dependents_start();
  const int groups = k / 16, padded = padded_groups(k);
  Norm last, of_delta, of_rows, of_beside, others[2];
  last.load(weight, groups);
  of_delta.load(after, groups);
  if (MIXED) of_rows.load(mixed.after_rows, groups), of_beside.load(mixed.after_beside, groups);
  if (MORE) others[0].load(further[0].weight, groups), others[1].load(further[1].weight, groups);
  uint4 before[NORM_GROUPS][2] = {}, added[NORM_GROUPS][2] = {};
  float values[NORM_GROUPS][16] = {};
  wait_for_previous_grid();
  const u16* const row = MIXED ? mixed.beside : delta;
  for_groups(groups, [&](int i, int group) {
    load_16(hidden + group * 16, before[i]);
    if (row != nullptr) load_16(row + group * 16, added[i]);
  });
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) to_floats(added[i], values[i]);
  if (MIXED) {
    float sums[NORM_GROUPS][16] = {};
    for_groups(groups, [&](int i, int group) { mixed.sum(group, k, sums[i]); });
    if (mixed.after_rows != nullptr) of_rows.apply(sums, epsilon, k, parts[0]);
    if (mixed.after_beside != nullptr) of_beside.apply(values, epsilon, k, parts[1]);
    const float gate = mixed.gated ? mixed.factors[mixed.top] : 1.0f;
    for_groups(groups, [&](int i, int) {
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] *= gate;
      round_16(values[i]);
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] += sums[i][j];
      round_16(values[i]);
    });
  }
  if (after != nullptr) of_delta.apply(values, epsilon, k, parts[2]);
  for_groups(groups, [&](int i, int group) {
    float own[16];
    to_floats(before[i], own);
#pragma unroll
    for (int j = 0; j < 16; ++j) values[i][j] = fmaf(values[i][j], factor, own[j]);
    round_16(values[i]);
    if (scale != 1.0f) {
#pragma unroll
      for (int j = 0; j < 16; ++j) values[i][j] *= scale;
      round_16(values[i]);
    }
    uint4 raw[2];
    to_halves(values[i], raw);
    if (sum != nullptr) store_16(sum + group * 16, raw);
  });
  float inverse = 1.0f;
  if (weight != nullptr || MORE) inverse = inverse_root(values, epsilon, k, parts[3]);
  auto normed = [&](const Norm& norm, int i, uint4 (&raw)[2]) {
    float found[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) found[j] = values[i][j] * inverse * norm.weights[i][j];
    to_halves(found, raw);
  };
#pragma unroll
  for (int i = 0; i < NORM_GROUPS; ++i) {
    const int group = threadIdx.x + i * NORM_THREADS;
    if ((group & ~31) >= padded) break;  // for the whole warp
    const bool present = group < groups;
    uint4 raw[2];
    to_halves(values[i], raw);
    if (present && weight != nullptr) normed(last, i, raw);
    if (x != nullptr && present) store_16(x + group * 16, raw);
    if (codes != nullptr) quantize_into(Quantized::all(codes, steps, k), raw, token, group, group < padded);
  }
  if (!MORE) return;
  for_groups(groups, [&](int i, int group) {
#pragma unroll
    for (int other = 0; other < 2; ++other) {
      uint4 raw[2];
      normed(others[other], i, raw);
      store_16(further[other].x + group * 16, raw);
    }
  });
}

template <typename T>
__device__ __forceinline__ T* from(T* rows, i64 at) {  // null stays null
  return rows == nullptr ? rows : rows + at;
}

// sum = (hidden + (norm of) delta) * scale; x = (norm of) sum: as 16-bit values, in 8 bits, or both.
//
// Parameters, all of one row of k values, a multiple of 32, at most 4096 NORM_GROUPS: hidden; delta, or null to add
// nothing; after, the weight of delta's own norm, or null for none; the norm's weight, or null for none; sum, x, or
// null; codes and steps, as q6k_quantize writes them, zeros past k, or null; factor, of delta after its norm; scale, of
// the sum, a 16-bit number; the norms' epsilon; m, rows of hidden, delta, sum and x, up to TOKENS: codes are of TOKENS, of
// which those from m on become zeros. Norms are root mean squares; their weights are fp32. A block for each of TOKENS.
extern "C" __global__ void Q6K_NORM_LIMITS
    q6k_add_norm(const u16* hidden, const u16* delta, const float* after, const float* weight, u16* sum, u16* x,
                 u8* codes, float* steps, float factor, float scale, float epsilon, int k, int m) {
  const Further none[2] = {};
  const int token = blockIdx.x;
  if (token >= m) {
    let_dependents_start();
    wait_for_previous_grid();  // which may still read what has been where the codes go
    const uint4 zeros[2] = {};
    for (int group = threadIdx.x; (group & ~31) < padded_groups(k); group += NORM_THREADS) {
      quantize_into(Quantized::all(codes, steps, k), zeros, token, group, group < padded_groups(k));
    }
    return;
  }
  const i64 before = (i64)token * k;
  add_norm<false, false>(hidden + before, from(delta, before), Mixed(), after, weight, none, from(sum, before),
                         from(x, before), codes, steps, factor, scale, epsilon, k, token);
}

#if Q6K_NORM_GROUPS <= 2  // more would not fit in registers
// As q6k_add_norm, and two further norms of the sum: their weights, and where they go, 16-bit.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    q6k_add_norms(const u16* hidden, const u16* delta, const float* after, const float* weight, u16* sum, u16* x,
                  u8* codes, float* steps, float factor, float scale, float epsilon, int k,
                  const float* weight_1, u16* x_1, const float* weight_2, u16* x_2) {
  const Further further[2] = {{weight_1, x_1}, {weight_2, x_2}};
  add_norm<false, true>(hidden, delta, Mixed(), after, weight, further, sum, x, codes, steps, factor, scale, epsilon,
                        k);
}

// As q6k_add_norm with the sum of a mixture in place of `delta`: outputs of its experts, 16-bit (top, k); their fp32
// factors, and that of `beside` if `gated`; beside, 16-bit, or null; the weights of the norms of the experts' sum and
// of `beside`, or null. Rounded as layers with 16 bits do.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    q6k_add_mixture(const u16* hidden, const u16* rows, const float* after, const float* weight, u16* sum, u16* x,
                    u8* codes, float* steps, float factor, float scale, float epsilon, int k,
                    const float* factors, const u16* beside, const float* after_rows, const float* after_beside,
                    int top, int gated) {
  const Mixed mixed = {rows, factors, beside, after_rows, after_beside, top, gated};
  const Further none[2] = {};
  add_norm<true, false>(hidden, nullptr, mixed, after, weight, none, sum, x, codes, steps, factor, scale, epsilon, k);
}
#endif

// x = gate's activation * up: as 16-bit values, in 8 bits, or both.
//
// Parameters, all of one row of k values: gate; up, or null for the activation alone; x, or null; codes and steps, as
// q6k_quantize writes them, or null; k. `gate` and `up` are in rows of `width` values, a multiple of 16, `stride` apart;
// those of a token begin `token_stride` after those of the one before, x after k values. m, tokens, up to TOKENS.
// Grid: a thread for each 16 of whole super-blocks x TOKENS; codes past k, and of tokens from m on, are zeros.
extern "C" __global__ void __launch_bounds__(GATE_THREADS)
    q6k_gate(const u16* gate, const u16* up, u16* x, u8* codes, float* steps, int k, int width, int stride,
             i64 token_stride, int m) {
  let_dependents_start();
  const int groups = k / 16, group = blockIdx.x * GATE_THREADS + threadIdx.x, token = blockIdx.y;
  const bool present = group < groups && token < m;
  uint4 raw[2] = {}, raw_up[2] = {};
  wait_for_previous_grid();
  if (present) {
    const i64 at = token * token_stride + group * 16 / width * stride + group * 16 % width;
    load_16(gate + at, raw);
    if (up != nullptr) load_16(up + at, raw_up);
  }
  apply_gate(Q6K_GATE, raw, raw_up, up != nullptr);
  if (x != nullptr && present) store_16(x + (i64)token * k + group * 16, raw);
  if (codes != nullptr) quantize_into(Quantized::all(codes, steps, k), raw, token, group, group < padded_groups(k));
}
