// Pairs of a token and an expert in the order of experts, and their rows of activations in that order.
//
// Both kernels are short and bound by latency. Pairs of one expert keep their order: the result never depends on timing.

constexpr int SORT_THREADS = 512, SORT_WARPS = SORT_THREADS / 32;
constexpr int SORT_AT_ONCE = 16;  // pairs of a thread in a round, one after the other

// Parameters: experts of the pairs, int64 if `wide`, else int32, of which one outside 0..gridDim.x-1 traps; order
// (pairs,), the pairs by expert; begins (E + 1,), where each expert's pairs begin in it. Grid: a block for each expert.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    q6k_sort_pairs(const void* experts, int* order, int* begins, int wide, int pairs) {
  __shared__ int before_of[SORT_WARPS], own_of[SORT_WARPS];
  let_dependents_start();
  wait_for_previous_grid();
  const int count = gridDim.x, own = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int before = 0;
  // Which of the thread's pairs of a round chose this block's expert, a bit each; those of earlier experts are counted.
  auto look = [&](int first) {
    int ids[SORT_AT_ONCE];
#pragma unroll
    for (int i = 0; i < SORT_AT_ONCE; ++i) {
      const int pair = min(first + i, pairs - 1);
      const i64 found = wide ? static_cast<const i64*>(experts)[pair] : (i64) static_cast<const int*>(experts)[pair];
      if (found < 0 || found >= count) __trap();
      ids[i] = first + i < pairs ? (int)found : count;
    }
    u32 mine = 0;
#pragma unroll
    for (int i = 0; i < SORT_AT_ONCE; ++i) {
      before += ids[i] < own;
      mine |= (u32)(ids[i] == own) << i;
    }
    return mine;
  };
  constexpr int ROUND = SORT_THREADS * SORT_AT_ONCE;
  const int first = threadIdx.x * SORT_AT_ONCE;
  u32 mine = 0;
  for (int begin = 0; begin < pairs; begin += ROUND) mine = look(begin + first);
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) before += __shfl_xor_sync(0xFFFFFFFFu, before, apart);
  if (lane == 0) before_of[warp] = before;
  __syncthreads();
  int place = 0;
#pragma unroll
  for (int w = 0; w < SORT_WARPS; ++w) place += before_of[w];
  if (threadIdx.x == 0) begins[own] = place;
  if (threadIdx.x == 0 && own == count - 1) begins[count] = pairs;
  for (int begin = 0; begin < pairs; begin += ROUND) {
    if (pairs > ROUND) mine = look(begin + first);
    int through = __popc(mine);  // those of the warp's threads up to this one
#pragma unroll
    for (int apart = 1; apart < 32; apart <<= 1) {
      const int other = __shfl_sync(0xFFFFFFFFu, through, max(lane - apart, 0));
      if (lane >= apart) through += other;
    }
    if (lane == 31) own_of[warp] = through;
    __syncthreads();
    int to = place + through - __popc(mine);
#pragma unroll
    for (int w = 0; w < SORT_WARPS; ++w) {
      const int of_warp = own_of[w];
      if (w < warp) to += of_warp;
      place += of_warp;
    }
    for (; mine; mine &= mine - 1) order[to++] = begin + first + __popc(~mine & (mine - 1));
    __syncthreads();
  }
}

// Parameters: x 16-bit, rows `stride` elements apart and 16-byte aligned; order (pairs,); to (pairs, k): row i is row
// order[i] / sharing of x; pieces: 16-byte pieces of a row. Grid: a block for each pair.
extern "C" __global__ void __launch_bounds__(128)
    q6k_order_rows(const u16* x, const int* order, uint4* to, i64 stride, int sharing, int pieces) {
  let_dependents_start();
  wait_for_previous_grid();
  const uint4* const from = reinterpret_cast<const uint4*>(x + order[blockIdx.x] / sharing * stride);
  uint4* const row = to + (i64)blockIdx.x * pieces;
#pragma unroll 4
  for (int at = threadIdx.x; at < pieces; at += 128) row[at] = from[at];
}
