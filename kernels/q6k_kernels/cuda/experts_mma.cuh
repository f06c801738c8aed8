// Prefill with experts by mma.m16n8k16: y[p,N] = x[row of p,K] W[expert of p]^T (+ bias) for many pairs p of a token and
// an expert, W6A16, for GPUs without wgmma.
//
// Pairs come in the order of experts, and so do their rows of x (experts_sort.cuh). A thread block computes one output
// (experts_work.cuh); there are more blocks than outputs, as how many there are is only known in memory.
//
//   Q6K_BN, Q6K_KW, Q6K_SLOTS   see mma_block.cuh
//
// fp32 roundings of a term: as in gemm_mma.cuh without splits.

// Grid: at least a block for each output; 256 threads. Dynamic shared memory as in gemm_mma.cuh.
//   tiles      (count, row_tiles, ceil(k/256), TILE_BYTES), aligned to 16 bytes
//   x          (pairs, k), 16-bit, contiguous, in the order of experts, aligned to 16 bytes
//   y          (pairs, n), x's type
//   bias       (count, n) of `bias_kind`, a BiasKind, or null
//   order, begins   (pairs,) and (count + 1,), as q6k_sort_pairs writes them
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2)
    q6k_experts_mma(const u8* tiles, const u16* x, u16* y, const void* bias, const int* order, const int* begins,
                    int bias_kind, int count, int n, int k, int row_tiles) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ Outputs outputs;
  let_dependents_start();
  wait_for_previous_grid();
  if (threadIdx.x < 32) outputs.count<BN>(begins, count, threadIdx.x);
  __syncthreads();
  const int row_blocks = (n + ROWS - 1) / ROWS, depth = super_blocks_of(k);
  if (blockIdx.x >= outputs.before[count] * row_blocks) return;
  const Output output = outputs.at<BN>(blockIdx.x, begins, count, row_blocks);
  const u8* const weight = tiles + (i64)output.expert * row_tiles * depth * TILE_BYTES;
  multiply_block(weight, x, shared, k, output.end, output.first, n, k, output.row_block, 0, depth,
                 [&](i64 at, int row, float2 sum, bool both) {
                   if (bias_kind != NO_BIAS) {
                     sum.x += bias_at(bias, bias_kind, output.expert * n + row);
                     if (both) sum.y += bias_at(bias, bias_kind, output.expert * n + row + 1);
                   }
                   store_pair(y + (i64)order[at] * n + row, sum, n, both);
                 });
}
