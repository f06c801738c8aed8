// Prefill with experts on Hopper: y[p,N] = x[row of p,K] W[expert of p]^T (+ bias) for many pairs p of a token and an
// expert, W6A16.
//
// Pairs come in the order of experts, and so do their rows of x (experts_sort.cuh). A thread block computes whole
// outputs, one after the other (experts_work.cuh). Past its expert's last pair it reads those of the next one, and past
// the last row tile those of the next expert, whose products it does not store.
//
//   Q6K_TOKENS, Q6K_CONSUMERS, Q6K_TILE_STAGES, Q6K_X_STAGES, Q6K_OCCUPANCY   see wgmma_block.cuh
//
// fp32 roundings of a term: those of the tensor core's sums over K, and the bias.

// Parameters: y 16-bit (pairs, n), 16-byte aligned; bias (count, n) of `bias_kind`, or null; order (pairs,) and begins
// (count + 1,), as q6k_sort_pairs writes them; tile_map, the weights of all experts in boxes of (ROW_TILES, TILE_PIECES,
// TILE_BYTES / TILE_PIECES) bytes; x_map, x in order, 16-bit (pairs, k) in boxes of (TOKENS, 64), zero past its end and k.
// Parameters begin 16 bytes past a multiple of 64 on sm_90, so the maps, aligned to 64, are at 112 and 240.
// Shared memory from a 1024-byte boundary.
extern "C" __global__ void __launch_bounds__(THREADS, Q6K_OCCUPANCY)
    q6k_experts_wgmma(u16* y, const void* bias, const int* order, const int* begins, int bias_kind, int count, int n, int k,
                      int row_tiles, const __grid_constant__ TensorMap tile_map, const __grid_constant__ TensorMap x_map) {
  extern __shared__ __align__(1024) u8 shared_memory[];
  Outputs& outputs = *reinterpret_cast<Outputs*>(shared_memory + BARRIERS_BEGIN + (X_STAGES + TILE_STAGES) * 16);
  const u32 shared = shared_address(shared_memory);
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int row_blocks = (n + ROWS - 1) / ROWS, depth = super_blocks_of(k);
  const Rings rings(shared);
  let_dependents_start();
  if (threadIdx.x == 0) rings.init();
  wait_for_previous_grid();
  if (warp == 0) outputs.count<TOKENS>(begins, count, lane);
  __syncthreads();
  const int total = outputs.before[count] * row_blocks;

  if (warp >= WARPS) {
#if Q6K_TOKENS > 128  // registers move from the warps that copy to those that have many sums
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    RingPlace place;
    if (warp <= WARPS + 1 && lane == 0) {
      for (int index = blockIdx.x; index < total; index += gridDim.x) {
        const Output output = outputs.at<TOKENS>(index, begins, count, row_blocks);
        if (warp == WARPS) {
          const int first = output.expert * row_tiles + output.row_block * ROW_TILES;
          for (int block = 0; block < depth; ++block) rings.copy_tiles_to(place, shared, &tile_map, block, first);
        } else {
          for (int i = 0; i < depth * QUARTERS; ++i) rings.copy_tokens_to(place, shared, &x_map, i * 64, output.first);
        }
      }
    }
    __syncwarp();
  } else {
#if Q6K_TOKENS > 128
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
    float sums[SUMS];
    Products products(rings, shared, warp, lane);
    for (int index = blockIdx.x; index < total; index += gridDim.x) {
      products.sum(sums, 0, depth);
      const Output output = outputs.at<TOKENS>(index, begins, count, row_blocks);
      const int first_row = (output.row_block * ROW_TILES + warp) * TILE_ROWS, upper = first_row + (lane >> 2);
      auto bias_of = [&](int row) {
        return row < n && bias_kind != NO_BIAS ? bias_at(bias, bias_kind, output.expert * n + row) : 0.0f;
      };
      write_outputs(sums, bias_of(upper), bias_of(upper + 8), shared + STAGING_BEGIN + warp * 512, lane, y, n, n, first_row,
                    [&](int at) { return output.first + at < output.end ? order[output.first + at] : -1; });
    }
  }
}
