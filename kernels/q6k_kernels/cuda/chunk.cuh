// The parts of a chunk of a prompt between its products, but for the heads (chunk_heads.cuh): of many tokens each, what
// step.cuh computes of one, and the softmax of scores that are in memory. gates.cuh and eights.cuh come before this file.
//
//   Q6K_NORM_PARTS  pieces of 2048 values of a row that is normed: each of 256 threads has 8 values of a piece

#ifndef Q6K_NORM_PARTS
#define Q6K_NORM_PARTS 1
#endif

constexpr int NORM_PARTS = Q6K_NORM_PARTS;
constexpr int NORM_THREADS = 256;
constexpr int GATE_THREADS = 128;
constexpr int SOFTMAX_THREADS = 256;

// sum = (hidden + factor * (norm of) delta) * scale; x = (norm of) sum.
//
// Parameters, all of rows of k values, a multiple of 8, at most 2048 NORM_PARTS: hidden; delta, or null to add nothing;
// after, the weight of delta's own norm, or null for none; the norm's weight, or null for none; sum and x, or null;
// factor; scale, a 16-bit number; the norms' epsilon; k; whether norms subtract the mean first. Norms are root mean
// squares; their weights are fp32. Rounded where q6k_add_norm rounds. A block a row.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    q6k_add_norm_rows(const u16* hidden, const u16* delta, const float* after, const float* weight, u16* sum, u16* x,
                      float factor, float scale, float epsilon, int k, int centred) {
  __shared__ float parts_after[NORM_THREADS / 32], parts[NORM_THREADS / 32], of_means[2][NORM_THREADS / 32];
  let_dependents_start();
  const i64 begin = (i64)blockIdx.x * k;
  uint4 raw[NORM_PARTS];  // in 16 bits until they are needed: there are few registers
  float values[NORM_PARTS][8] = {}, factors[8];
  auto at = [](int i) { return (threadIdx.x + i * NORM_THREADS) * 8; };
  wait_for_previous_grid();
#pragma unroll
  for (int i = 0; i < NORM_PARTS; ++i) {
    if (at(i) >= k) break;
    raw[i] = load_raw(hidden + begin + at(i));
    if (delta != nullptr) load_8(delta + begin + at(i), values[i]);
  }
  auto squares = [&]() {
    float found = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_PARTS; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) found = fmaf(values[i][j], values[i][j], found);
    }
    return found;
  };
  auto centre = [&](float* of_mean) {
    float found = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_PARTS; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) found += values[i][j];
    }
    const float mean = sum_of_block<NORM_THREADS>(found, of_mean) / (float)k;
#pragma unroll
    for (int i = 0; i < NORM_PARTS; ++i) {
      if (at(i) >= k) break;
#pragma unroll
      for (int j = 0; j < 8; ++j) values[i][j] -= mean;
    }
  };
  if (after != nullptr) {
    if (centred) centre(of_means[0]);
    const float inverse = rsqrtf(sum_of_block<NORM_THREADS>(squares(), parts_after) / (float)k + epsilon);
#pragma unroll
    for (int i = 0; i < NORM_PARTS; ++i) {
      if (at(i) >= k) break;
      load_factors(after + at(i), factors);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[i][j] = rounded(values[i][j] * inverse * factors[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < NORM_PARTS; ++i) {
    if (at(i) >= k) break;
    to_floats(raw[i], factors);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      values[i][j] = rounded(fmaf(values[i][j], factor, factors[j]));
      if (scale != 1.0f) values[i][j] = rounded(values[i][j] * scale);
    }
    if (sum != nullptr) store_8(sum + begin + at(i), values[i]);
  }
  float inverse = 1.0f;
  if (weight != nullptr && centred) centre(of_means[1]);
  if (weight != nullptr) inverse = rsqrtf(sum_of_block<NORM_THREADS>(squares(), parts) / (float)k + epsilon);
  if (x == nullptr) return;
#pragma unroll
  for (int i = 0; i < NORM_PARTS; ++i) {
    if (at(i) >= k) break;
    if (weight != nullptr) {
      load_factors(weight + at(i), factors);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[i][j] = values[i][j] * inverse * factors[j];
    }
    store_8(x + begin + at(i), values[i]);
  }
}

// x = gate's activation * up, or without up the activation alone.
//
// Parameters: gate and up, 16-bit, up perhaps null, rows `gate_stride` and `up_stride` apart; x 16-bit, rows of k values;
// kind, a Gate, of which LOGISTIC is rounded before the product, as 16-bit layers do; k. A row of gates is in pieces of
// `piece` values that are `apart`. All sizes are multiples of 8. Grid: rows x 8 values a thread.
extern "C" __global__ void __launch_bounds__(GATE_THREADS)
    q6k_gate_rows(const u16* gate, const u16* up, u16* x, i64 gate_stride, i64 up_stride, int kind, int k, int piece,
                  int apart) {
  let_dependents_start();
  const int at = (blockIdx.y * GATE_THREADS + threadIdx.x) * 8;
  wait_for_previous_grid();
  if (at >= k) return;
  float values[8], factors[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  load_8(gate + blockIdx.x * gate_stride + at / piece * apart + at % piece, values);
  if (up != nullptr) load_8(up + blockIdx.x * up_stride + at, factors);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float v = values[j];
    if (kind == CLAMPED_SWIGLU) {
      values[j] = clamped_swiglu(v, factors[j]);
    } else {
      const float logistic = rounded(__fdividef(1.0f, 1.0f + __expf(-v)));
      values[j] = (kind == LOGISTIC ? logistic : activated(kind, v)) * factors[j];
    }
  }
  store_8(x + (i64)blockIdx.x * k + at, values);
}

// x = the sum of experts' outputs, each times its factor, and of what is beside them; rounded before that is added.
//
// Parameters: rows 16-bit (tokens, top, k); factors fp32 (tokens, top), or with `gated` (tokens, top + 1), that of
// `beside` last; beside 16-bit (tokens, k), or null; x 16-bit (tokens, k); top; k, a multiple of 8.
// Grid: tokens x 8 values a thread.
extern "C" __global__ void __launch_bounds__(GATE_THREADS)
    q6k_sum_experts_rows(const u16* rows, const float* factors, const u16* beside, u16* x, int top, int k, int gated) {
  let_dependents_start();
  const int at = (blockIdx.y * GATE_THREADS + threadIdx.x) * 8;
  const i64 token = blockIdx.x;
  wait_for_previous_grid();
  if (at >= k) return;
  float sums[8] = {}, values[8];
  for (int i = 0; i < top; ++i) {
    const float factor = factors[token * (top + gated) + i];
    load_8(rows + (token * top + i) * k + at, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] = fmaf(values[j], factor, sums[j]);
  }
  if (beside != nullptr) {
    const float factor = gated ? factors[token * (top + 1) + top] : 1.0f;
    load_8(beside + token * k + at, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] = rounded(sums[j]) + rounded(values[j] * factor);
  }
  store_8(x + token * k + at, sums);
}

__device__ __forceinline__ float decayed(float score, float largest) {
  return score == minus_infinity() ? 0.0f : __expf(score - largest);
}

// weights = softmax of scores * scale over the keys that a query sees; 0 for the others.
//
// Parameters: scores fp32 (heads of keys, queries, keys); weights 16-bit, likewise; sinks, scores of no key that take a
// part of the weights, fp32 (heads of keys, group), or null; scale; softcap of what is scaled, 0 for none; keys, a
// multiple of 8; first, the position of the first key; start, that of the first query; group, queries of one position;
// window, 0 for none. Grid: queries x heads of keys.
extern "C" __global__ void __launch_bounds__(SOFTMAX_THREADS)
    q6k_softmax_rows(const float* scores, u16* weights, const float* sinks, float scale, float softcap, int keys,
                     int first, int start, int group, int window) {
  __shared__ float maxima[SOFTMAX_THREADS / 32], sums[SOFTMAX_THREADS / 32];
  let_dependents_start();
  const i64 begin = ((i64)blockIdx.y * gridDim.x + blockIdx.x) * keys;
  const int last = start + (int)blockIdx.x / group - first;  // index of the query's own key
  const int oldest = window ? max(0, last - window + 1) : 0;
  auto load = [&](int at, float (&values)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(scores + begin + at);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[j] *= scale;
      // c tanh(s / c) is c - 2c / (1 + e^(2s / c)).
      if (softcap > 0.0f) values[j] = softcap - __fdividef(2.0f * softcap, 1.0f + __expf(2.0f * values[j] / softcap));
      if (at + j < oldest || at + j > last) values[j] = minus_infinity();
    }
  };
  wait_for_previous_grid();
  float largest = minus_infinity(), sum = 0.0f, values[4];
  for (int at = oldest / 4 * 4 + threadIdx.x * 4; at <= last; at += SOFTMAX_THREADS * 4) {
    load(at, values);
    const float most = fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3]));
    if (most > largest) {
      sum *= decayed(largest, most);
      largest = most;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += decayed(values[j], largest);
  }
  float most = largest;
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
  sum *= decayed(largest, most);
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, apart);
  if ((threadIdx.x & 31) == 0) maxima[threadIdx.x >> 5] = most, sums[threadIdx.x >> 5] = sum;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < SOFTMAX_THREADS / 32; ++w) most = fmaxf(most, maxima[w]);
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < SOFTMAX_THREADS / 32; ++w) sum = fmaf(sums[w], decayed(maxima[w], most), sum);
  if (sinks != nullptr) {
    const float sink = sinks[blockIdx.y * group + blockIdx.x % group], with_sink = fmaxf(most, sink);
    sum = sum * decayed(most, with_sink) + decayed(sink, with_sink);
    most = with_sink;
  }
  const float inverse = 1.0f / sum;
  for (int at = threadIdx.x * 4; at < keys; at += SOFTMAX_THREADS * 4) {
    uint2 pairs = make_uint2(0, 0);
    if (at + 3 >= oldest && at <= last) {
      load(at, values);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = decayed(values[j], most) * inverse;
      pairs = make_uint2(pack_halves(values[0], values[1]), pack_halves(values[2], values[3]));
    }
    *reinterpret_cast<uint2*>(weights + begin + at) = pairs;
  }
}
