// Prefill: y[M,N] = x[M,K] W^T (+ bias), W6A16, by mma.m16n8k16: for GPUs without wgmma, sm_80 and later.
//
//   Q6K_BN, Q6K_KW, Q6K_SLOTS   see mma_block.cuh, which comes before this file
//
// Small N: blockIdx.y splits K further. Sums of the parts go to a workspace, and q6k_reduce adds them in order. All
// sums are made in a fixed order: the result does not depend on timing.
//
// fp32 roundings of a term: at most ceil(ceil(K/256 / splits) / KW) * 16 products of matrix units, in each of which
// 16 products and the sum so far may be cut to fp32 (rather than rounded) before they are added; then KW + splits
// additions, and one for the bias.

// Grid (ceil(m / BN) * ceil(n / ROWS), splits, 1), blocks of tokens first; 256 threads. Dynamic
// shared memory: two stages, and SLOTS tiles for each warp.
//   tiles      (ceil(n/16), ceil(k/256), TILE_BYTES), aligned to 16 bytes
//   x          (m, k), 16-bit; rows `stride` elements apart and aligned to 16 bytes
//   y          (m, n), x's type; written if there is one split
//   workspace  fp32 (splits, m, n); written if there are more, without the bias
//   bias       (n) of `bias_kind`, a BiasKind
//   stride, bias_kind, m, n, k
// Memory that the previous grid may still write is not __restrict__: its loads might move before the wait.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2)
    q6k_gemm_mma(const u8* __restrict__ tiles, const u16* x, u16* y, float* workspace,
                 const void* bias, i64 stride, int bias_kind, int m, int n, int k) {
  extern __shared__ __align__(128) u8 shared[];
  // Blocks that share rows start together, so that tiles come from memory once.
  const u32 token_blocks = ((u32)m + BN - 1) / BN, row_block = blockIdx.x / token_blocks;
  const int first_token = (int)(blockIdx.x - row_block * token_blocks) * BN;
  const int blocks = super_blocks_of(k);
  const int begin = (int)((i64)blocks * blockIdx.y / gridDim.y);
  const int end = (int)((i64)blocks * (blockIdx.y + 1) / gridDim.y);
  let_dependents_start();
  auto store = [&](i64 token, int row, float2 sum, bool both) {
    const i64 to = token * n + row;
    if (gridDim.y > 1) {
      float* const out = workspace + (i64)blockIdx.y * m * n + to;
      out[0] = sum.x;
      if (both) out[1] = sum.y;
    } else {
      sum.x += bias_at(bias, bias_kind, row);
      if (both) sum.y += bias_at(bias, bias_kind, row + 1);
      store_pair(y + to, sum, n, both);
    }
  };
  multiply_block(tiles, x, shared, stride, m, first_token, n, k, row_block, begin, end, store);
}

// Adds the parts of q6k_gemm_mma. Grid (ceil(m * n / 256), 1, 1), 256 threads; m * n below 2^31.
//   workspace  fp32 (splits, m, n)
//   y          (m, n), 16-bit
//   bias       (n) of `bias_kind`
//   bias_kind, m, n, splits
extern "C" __global__ void __launch_bounds__(256)
    q6k_reduce(const float* workspace, u16* y, const void* bias, int bias_kind, int m, int n,
               int splits) {
  wait_for_previous_grid();
  const u32 count = (u32)m * n, at = blockIdx.x * 256 + threadIdx.x;
  if (at >= count) return;
  float sum = workspace[at];
#pragma unroll 4
  for (int split = 1; split < splits; ++split) sum += workspace[(i64)split * count + at];
  y[at] = to_half(sum + bias_at(bias, bias_kind, at % n));
}
