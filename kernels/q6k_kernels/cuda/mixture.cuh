// The routes of one token in a mixture of experts: which experts are chosen, and with what factors.

constexpr int ROUTE_WARPS = 4;     // of a block, a row of weights each
constexpr int AT_ONCE = 11;        // loads of 16 bytes of a lane, 2816 values of a row
constexpr int MOST_EXPERTS = 512;  // a lane has one in 32 of them

__device__ __forceinline__ float logistic(float value) { return 1.0f / (1.0f + expf(-value)); }

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

__device__ __forceinline__ float product(const uint4& a, const uint4& b, float sum) {
  float x[8], y[8];
  to_floats(a, x);
  to_floats(b, y);
#pragma unroll
  for (int j = 0; j < 8; ++j) sum = fmaf(x[j], y[j], sum);
  return sum;
}

// Integers of the same order as numbers, 0 for what is none.
__device__ __forceinline__ u32 ordered(float value) {
  const u32 bits = __float_as_uint(value + 0.0f);  // -0 is 0
  return value != value ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float of_ordered(u32 order) {
  return __uint_as_float(order >> 31 ? order ^ 0x80000000u : ~order);
}

__device__ __forceinline__ u32 max_of_warp(u32 value) {
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(value) : "r"(value));
  return value;
}

__device__ __forceinline__ u32 min_of_warp(u32 value) {
  asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(value) : "r"(value));
  return value;
}

// The `top` largest of up to 32 OF_LANE logits, of equal ones the first; their factors are the softmax of these alone,
// times the experts' scales if there are some. By one warp.
template <int OF_LANE>
__device__ __forceinline__ void choose_experts(const float* logits, const float* scales, int count, int top,
                                               int* experts, float* factors) {
  const int lane = threadIdx.x & 31;
  u32 own[OF_LANE];
#pragma unroll
  for (int i = 0; i < OF_LANE; ++i) {
    const int expert = lane + 32 * i;
    own[i] = expert < count ? ordered(load_of_others(logits + expert)) : 0;
  }
  u32 chosen = 0;
  float logit = of_ordered(0), largest = logit;
  for (int j = 0; j < top; ++j) {
    u32 most = 0, at = count - 1;  // where no logit is a number
#pragma unroll
    for (int i = 0; i < OF_LANE; ++i) most = max(most, own[i]);
    most = max_of_warp(most);
#pragma unroll
    for (int i = OF_LANE - 1; i >= 0; --i) {
      if (most != 0 && own[i] == most) at = min(at, (u32)(lane + 32 * i));
    }
    at = min_of_warp(at);
    if (j == 0) largest = of_ordered(most);
    if (lane == j) chosen = at, logit = of_ordered(most);
#pragma unroll
    for (int i = 0; i < OF_LANE; ++i) {
      if ((u32)(lane + 32 * i) == at) own[i] = 0;
    }
  }
  const float share = lane < top ? expf(logit - largest) : 0.0f, all = sum_of_warp(share);
  if (lane >= top) return;
  experts[lane] = chosen;
  factors[lane] = rounded(share / all * (scales != nullptr ? scales[chosen] : 1.0f));
}

// Parameters: the token x 16-bit (k,); weights 16-bit (rows, k): the router's, then the gate's of the shared expert, if
// there is one; biases of these rows, 16-bit (rows,), or null; scales of the experts, fp32 (count,), or null; logits
// fp32 (rows,), for what blocks pass to each other; counter, 0; experts (top,); factors fp32: the experts', then the
// shared one's; rows; count of experts, at most MOST_EXPERTS; top, at most 32; k, a multiple of 8. Rounded as layers
// with 16 bits do.
// Grid: ROUTE_WARPS rows of weights a block.
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * 32, 1)
    q6k_route(const u16* x, const u16* weights, const u16* bias, const float* scales, float* logits, u32* counter,
              int* experts, float* factors, int rows, int count, int top, int k) {
  __shared__ bool last;
  __shared__ float own_scales[MOST_EXPERTS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.x * ROUTE_WARPS + warp;
  const int pieces = k / 8;
  const uint4* const of_row = reinterpret_cast<const uint4*>(weights + (i64)min(row, rows - 1) * k);
  const uint4* const of_x = reinterpret_cast<const uint4*>(x);
  uint4 ahead[AT_ONCE] = {};
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (lane + 32 * i < pieces) ahead[i] = of_row[lane + 32 * i];
  }
  for (int at = threadIdx.x; at < count; at += ROUTE_WARPS * 32) own_scales[at] = scales != nullptr ? scales[at] : 1.0f;
  const float addend = bias != nullptr && row < rows ? half_to_float(bias[row]) : 0.0f;
  let_dependents_start();
  wait_for_previous_grid();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (lane + 32 * i < pieces) sum = product(ahead[i], of_x[lane + 32 * i], sum);
  }
  for (int at = lane + 32 * AT_ONCE; at < pieces; at += 32) sum = product(of_row[at], of_x[at], sum);
  sum = sum_of_warp(sum);
  if (lane == 0 && row < rows) logits[row] = rounded(sum + addend);
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    last = before == gridDim.x - 1;
    if (last) *counter = 0;  // for the next launch
  }
  __syncthreads();
  if (!last || warp > 0) return;
  if (count <= 128) {
    choose_experts<4>(logits, own_scales, count, top, experts, factors);
  } else if (count <= 256) {
    choose_experts<8>(logits, own_scales, count, top, experts, factors);
  } else {
    choose_experts<MOST_EXPERTS / 32>(logits, own_scales, count, top, experts, factors);
  }
  if (lane == 0 && rows > count) factors[top] = rounded(logistic(load_of_others(logits + count)));
}

// The routes of many tokens, whose logits are there already.
//
// Parameters: logits fp32 (tokens, rows), numbers of 16 bits; scales, count and top as of q6k_route; experts (tokens, top);
// factors fp32 (tokens, top + rows - count); rows, count or one more. Grid: ROUTE_WARPS tokens a block.
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * 32)
    q6k_route_rows(const float* logits, const float* scales, int* experts, float* factors, int tokens, int rows,
                   int count, int top) {
  const int lane = threadIdx.x & 31;
  const i64 token = blockIdx.x * ROUTE_WARPS + (threadIdx.x >> 5);
  let_dependents_start();
  wait_for_previous_grid();
  if (token >= tokens) return;
  const float* const own = logits + token * rows;
  float* const own_factors = factors + token * (top + rows - count);
  if (count <= 128) {
    choose_experts<4>(own, scales, count, top, experts + token * top, own_factors);
  } else if (count <= 256) {
    choose_experts<8>(own, scales, count, top, experts + token * top, own_factors);
  } else {
    choose_experts<MOST_EXPERTS / 32>(own, scales, count, top, experts + token * top, own_factors);
  }
  if (lane == 0 && rows > count) own_factors[top] = rounded(logistic(own[count]));
}
