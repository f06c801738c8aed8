// A mixture of experts for one token, but for its products with experts: which are chosen and with what factors, the
// gates between their two products, and the weighted sum with the expert that all tokens share.

constexpr int ROUTE_WARPS = 4;       // of a block, a row of weights each
constexpr int AT_ONCE = 8;           // loads of 16 bytes of a lane, 2048 values of a row
constexpr int MOST_EXPERTS = 512;    // a lane has one in 32 of them
constexpr int SPREAD_THREADS = 128;  // of a block, 8 values each

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000u); }

__device__ __forceinline__ float rounded(float value) { return half_to_float(to_half(value)); }

__device__ __forceinline__ float logistic(float value) { return 1.0f / (1.0f + expf(-value)); }

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
  return value;
}

__device__ __forceinline__ float load_of_others(const float* from) {  // bypasses this multiprocessor's cache
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void to_floats(const uint4& raw, float (&values)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u32 word = word_of(raw, j);
    values[2 * j] = half_to_float(word & 0xFFFFu);
    values[2 * j + 1] = half_to_float(word >> 16);
  }
}

__device__ __forceinline__ uint4 to_halves(const float (&values)[8]) {
  return make_uint4(pack_halves(values[0], values[1]), pack_halves(values[2], values[3]),
                    pack_halves(values[4], values[5]), pack_halves(values[6], values[7]));
}

__device__ __forceinline__ float product(const uint4& a, const uint4& b, float sum) {
  float x[8], y[8];
  to_floats(a, x);
  to_floats(b, y);
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = fmaf(x[j], y[j], sum);
  return sum;
}

// The `top` largest of the logits, of equal ones the first; their factors are the softmax of these alone. By one warp.
__device__ __forceinline__ void choose_experts(const float* logits, int count, int top, int* experts, float* factors) {
  const int lane = threadIdx.x & 31;
  float own[MOST_EXPERTS / 32];
#pragma unroll
  for (int i = 0; i < MOST_EXPERTS / 32; ++i) {
    const int expert = lane + 32 * i;
    own[i] = expert < count ? load_of_others(logits + expert) : minus_infinity();
  }
  int chosen = 0;
  float logit = minus_infinity();
  for (int j = 0; j < top; ++j) {
    float best = minus_infinity();
    int at = count;
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / 32; ++i) {
      if (own[i] > best) best = own[i], at = lane + 32 * i;
    }
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, best, apart);
      const int other_at = __shfl_xor_sync(0xFFFFFFFFu, at, apart);
      if (other > best || (other == best && other_at < at)) best = other, at = other_at;
    }
    at = min(at, count - 1);  // where no logit is a number
    if (lane == j) chosen = at, logit = best;
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / 32; ++i) {
      if (lane + 32 * i == at) own[i] = minus_infinity();
    }
  }
  const float largest = __shfl_sync(0xFFFFFFFFu, logit, 0);
  const float share = lane < top ? expf(logit - largest) : 0.0f, all = sum_of_warp(share);
  if (lane < top) experts[lane] = chosen, factors[lane] = rounded(share / all);
}

// Parameters: the token x 16-bit (k,); weights 16-bit (rows, k): the router's, then the gate's of the shared expert, if
// there is one; logits fp32 (rows,), for what blocks pass to each other; counter, 0; experts (top,); factors fp32
// (top + 1,): the experts', then the shared one's; rows; count of experts, at most MOST_EXPERTS; top, at most 32; k, a
// multiple of 8.
// Grid: ROUTE_WARPS rows of weights a block.
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * 32)
    q6k_route(const u16* x, const u16* weights, float* logits, u32* counter, int* experts, float* factors, int rows,
              int count, int top, int k) {
  __shared__ bool last;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.x * ROUTE_WARPS + warp;
  const int pieces = k / 8;
  const uint4* const of_row = reinterpret_cast<const uint4*>(weights + (i64)min(row, rows - 1) * k);
  const uint4* const of_x = reinterpret_cast<const uint4*>(x);
  uint4 ahead[AT_ONCE] = {};
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (lane + 32 * i < pieces) ahead[i] = of_row[lane + 32 * i];
  }
  let_dependents_start();
  wait_for_previous_grid();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (lane + 32 * i < pieces) sum = product(ahead[i], of_x[lane + 32 * i], sum);
  }
  for (int at = lane + 32 * AT_ONCE; at < pieces; at += 32) sum = product(of_row[at], of_x[at], sum);
  sum = sum_of_warp(sum);
  if (lane == 0 && row < rows) logits[row] = rounded(sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    last = before == gridDim.x - 1;
    if (last) *counter = 0;  // for the next launch
  }
  __syncthreads();
  if (!last || warp > 0) return;
  choose_experts(logits, count, top, experts, factors);
  if (lane == 0 && rows > count) factors[top] = rounded(logistic(load_of_others(logits + count)));
}

// Parameters: gate and up 16-bit, rows of `between` that are `stride` apart; out 16-bit (rows, between), the sigmoid
// linear unit of gate times up; between and stride, multiples of 8. Grid: 8 values of a row a thread, x rows.
extern "C" __global__ void __launch_bounds__(SPREAD_THREADS)
    q6k_gate_experts(const u16* gate, const u16* up, u16* out, int stride, int between) {
  let_dependents_start();
  const int at = (blockIdx.x * SPREAD_THREADS + threadIdx.x) * 8;
  wait_for_previous_grid();
  if (at >= between) return;
  const i64 from = (i64)blockIdx.y * stride + at;
  float gates[8], values[8];
  to_floats(*reinterpret_cast<const uint4*>(gate + from), gates);
  to_floats(*reinterpret_cast<const uint4*>(up + from), values);
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] *= rounded(gates[j] * logistic(gates[j]));
  *reinterpret_cast<uint4*>(out + (i64)blockIdx.y * between + at) = to_halves(values);
}

// Parameters: outputs of experts 16-bit (top, k); factors, as q6k_route writes them; output of the shared expert 16-bit
// (k,), or null; sum 16-bit (k,); k, a multiple of 8. Rounded as 16-bit layers do. Grid: 8 values a thread.
extern "C" __global__ void __launch_bounds__(SPREAD_THREADS)
    q6k_add_experts(const u16* outputs, const float* factors, const u16* shared, u16* sum, int top, int k) {
  let_dependents_start();
  const int at = (blockIdx.x * SPREAD_THREADS + threadIdx.x) * 8;
  wait_for_previous_grid();
  if (at >= k) return;
  float sums[8] = {}, values[8];
  for (int j = 0; j < top; ++j) {
    to_floats(*reinterpret_cast<const uint4*>(outputs + (i64)j * k + at), values);
    const float factor = factors[j];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = fmaf(values[i], factor, sums[i]);
  }
  if (shared != nullptr) {
    to_floats(*reinterpret_cast<const uint4*>(shared + at), values);
    const float factor = factors[top];
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = rounded(sums[i]) + rounded(values[i] * factor);
  }
  *reinterpret_cast<uint4*>(sum + at) = to_halves(sums);
}
