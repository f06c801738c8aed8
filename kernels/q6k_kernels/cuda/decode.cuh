// Decode: y[M,N] = x[M,K] W^T (+ bias) for M <= 8, W6A8.
//
// Memory bandwidth sets the time, so everything serves the stream of tiles. Each warp keeps a ring of tiles in shared
// memory, filled by asynchronous copies that need no registers. If rows of x are few and short, every block quantises
// them for itself while the ring fills. Else q6k_quantize does so once for all blocks, in a launch that overlaps with
// the first copies of the next (programmatic dependent launch).
// mma.m16n8k16 or k32 multiplies one group of 16 rows with up to 8 tokens, so that M = 8 costs about what M = 1 does.
//
//   Q6K_TOKENS, Q6K_FUSED   see quantize.cuh, which comes before this file
//   Q6K_WARPS, Q6K_STAGES, Q6K_OCCUPANCY   see warps.cuh, which comes before it, too
//   Q6K_SPLIT    1: the blocks of a cluster share a range of row tiles and split K; their sums meet in distributed
//                shared memory (sm_90 and later)
//
// A block (or cluster) owns a contiguous range of row tiles; its warps split the (row tile, super-block) pairs of
// that range evenly, in order. A row tile that falls to several warps is summed over them in the order of warps,
// then over the ranks of the cluster: the result never depends on timing.
//
// fp32 roundings of a term: its product with the scale or minimum, the sum of the two groups of 16 or of the group and
// its minimum, one addition of d_a times that for each 32 weights a warp sums (K/32 at most; of one token each of four
// lanes has its own, and two additions follow), one for each warp of each block of a cluster, the bias.

#ifndef Q6K_SPLIT
#define Q6K_SPLIT 0
#endif

// In a decode step, blocks of other launches must find room beside these: a norm's (step.cuh) beside two. Elsewhere so
// few registers would spill.
#if Q6K_TOKENS == 1 && !Q6K_FUSED && Q6K_WARPS * Q6K_OCCUPANCY >= 16 && __CUDA_ARCH__ == 900
#define Q6K_LIMITS __maxnreg__(88)
#else
#define Q6K_LIMITS __launch_bounds__(THREADS, Q6K_OCCUPANCY)
#endif

constexpr bool SPLIT = Q6K_SPLIT;

// ---- clusters ----------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  u32 rank = 0;
#if Q6K_SPLIT
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return (int)rank;
}

__device__ __forceinline__ int cluster_size() {
  u32 size = 1;
#if Q6K_SPLIT
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return (int)size;
}

__device__ __forceinline__ void synchronize_cluster() {
#if Q6K_SPLIT
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ float load_of_rank(u32 address, int rank) {
#if Q6K_SPLIT
  float value;
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
#else
  return load_float(address);
#endif
}

// ---- the kernel --------------------------------------------------------------------------------------------

// Parameters: tiles (T, ceil(K/256), TILE_BYTES); x, if FUSED 16-bit (m, k), rows 16-byte aligned and `stride`
// elements apart, else as q6k_quantize writes it; y 16-bit (m, n); bias (n,) of `bias_kind`,
// or null; m <= TOKENS; early, 1 unless FUSED: whether to load tiles before activations.
// Grid: blocks of a cluster x ranges of row tiles. Shared memory: `decode_plan.py` has the sizes.
// No pointer is __restrict__: loads of what an earlier launch writes must not move above the wait for it.
extern "C" __global__ void Q6K_LIMITS
    q6k_decode(const u8* tiles, const void* x, u16* y, const void* bias, i64 stride, int bias_kind, int m, int n, int k,
               int row_tiles, int early) {
  extern __shared__ __align__(128) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int rank = cluster_rank(), cluster = cluster_size();
  const int ranges = gridDim.x / cluster, range = blockIdx.x / cluster;
  const int blocks = super_blocks_of(k);
  const int first_row = share(row_tiles, range, ranges), rows = share(row_tiles, range + 1, ranges) - first_row;
  const int first_block = share(blocks, rank, cluster), depth = share(blocks, rank + 1, cluster) - first_block;
  const int begin = share(rows * depth, warp, WARPS), end = share(rows * depth, warp + 1, WARPS);

  let_dependents_start();
  const u32 ring = shared_address(shared) + warp * STAGES * TILE_BYTES;
  const int first_of_warp = begin / depth;
  // The copies' position: they run STAGES tiles ahead of the sums.
  int copy_at = begin, copy_block = begin - first_of_warp * depth;
  const u8* from = tiles + ((i64)(first_row + first_of_warp) * blocks + first_block + copy_block) * TILE_BYTES;
  auto copy_next = [&](int stage) {
    if (copy_at < end) {
      copy_tile_async(ring + stage * TILE_BYTES, from, lane, evict_first());
      ++copy_at;
      from += TILE_BYTES;
      if (++copy_block == depth) {
        copy_block = 0;
        from += (i64)(blocks - depth) * TILE_BYTES;
      }
    }
    commit_copies();
  };
  auto fill_ring = [&](int begin, int end) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      if (stage < begin || stage >= end) continue;
      // All copies at once would delay what the previous launch still has to read.
      if (!Q6K_FUSED && stage > begin) wait_copies<0>();
      copy_next(stage);
    }
  };
  u8* const codes = shared + RING_BYTES;
  const int most_depth = (blocks + cluster - 1) / cluster;  // all blocks of a cluster lay out memory alike
  float* const steps = reinterpret_cast<float*>(codes + most_depth * CODES_A_BLOCK);
  float* const sums = steps + most_depth * (STEPS_A_BLOCK / 4);
  float* const parts = sums + (Q6K_OFFSET ? most_depth * (STEPS_A_BLOCK / 4) : 0);
  const u32 partials = shared_address(parts) + (Q6K_MINIMUM ? most_depth * PARTS_A_BLOCK : 0);
  // Activations requested after a full ring of tiles wait for it. So blocks that quantise request them after two
  // stages, and for a small product first.
  constexpr int EARLY_STAGES = Q6K_FUSED && STAGES > 2 ? 2 : STAGES;
  if (early) fill_ring(0, EARLY_STAGES);
  wait_for_previous_grid();
#if Q6K_FUSED
  const u16* const rows_of_x = static_cast<const u16*>(x) + first_block * SUPER_BLOCK;
  const Quantized quantized = {codes, steps, Q6K_OFFSET ? reinterpret_cast<u32*>(sums) : nullptr,
                               Q6K_MINIMUM ? reinterpret_cast<u16*>(parts) : nullptr};
  quantize_rows<THREADS>(Rows{rows_of_x, stride}, m, depth * SUPER_BLOCK, k - first_block * SUPER_BLOCK, quantized,
                         [&]() { fill_ring(early ? EARLY_STAGES : 0, STAGES); });
#else
  const u8* from_x = static_cast<const u8*>(x);
  auto copy_part = [&](const void* to, int bytes, bool needed) {  // of each super-block
    if (needed) {
      for (int at = threadIdx.x * 16; at < depth * bytes; at += THREADS * 16) {
        copy_async_16(shared_address(to) + at, from_x + first_block * bytes + at);
      }
    }
    from_x += blocks * bytes;
  };
  copy_part(codes, CODES_A_BLOCK, true);
  copy_part(steps, STEPS_A_BLOCK, true);
  copy_part(sums, STEPS_A_BLOCK, Q6K_OFFSET);
  copy_part(parts, PARTS_A_BLOCK, Q6K_MINIMUM);
  commit_copies();
  wait_copies<0>();
#endif
  __syncthreads();

  const ActivationParts activations = of_lane(
      {shared_address(codes), shared_address(steps), shared_address(sums), shared_address(parts)}, lane);

  auto store = [&](int row_tile, int r, int token, float value) {
    const int row = (first_row + row_tile) * TILE_ROWS + r;
    if (row < n && token < m) y[(i64)token * n + row] = to_half(value + bias_at(bias, bias_kind, row));
  };
  // With clusters each of a warp's row tiles has a slot of its own.
  auto slot_of = [&](int w, int row_tile) { return partials + (row_tile + w) * OUTPUTS * 4; };
  const int total = rows * depth;
  LastSum last = {};
  if (LastSum::EARLY && !SPLIT) last.find(partials, threadIdx.x, total, depth);
  multiply_tiles(
      ring, lane, begin, end, depth, !SPLIT, copy_next, [&](int) { return activations; },
      [&](int row_tile) {
        return SPLIT ? slot_of(warp, row_tile) : slot_of_two(partials, warp, row_tile == first_of_warp);
      },
      store);

  __syncthreads();
  if (!SPLIT) {
    store_shared_tiles(last, partials, total, depth, store);
  } else {
    for (int at = threadIdx.x; at < rows * OUTPUTS; at += THREADS) {
      const int r = at / OUTPUTS, inside = at % OUTPUTS;
      const int w = first_warp(total, r * depth);
      const u32 place = slot_of(0, r) + inside * 4;
      const float sum = sum_of_warps(place, OUTPUTS * 4, total, w, (r + 1) * depth);
      store_float(place + w * OUTPUTS * 4, sum);
    }
    synchronize_cluster();
    for (int at = rank * THREADS + threadIdx.x; at < rows * OUTPUTS; at += cluster * THREADS) {
      const int r = at / OUTPUTS, inside = at % OUTPUTS;
      float sum = 0.0f;
#pragma unroll 4
      for (int other = 0; other < cluster; ++other) {
        const int other_depth = share(blocks, other + 1, cluster) - share(blocks, other, cluster);
        const int w = first_warp(rows * other_depth, r * other_depth);
        sum += load_of_rank(slot_of(w, r) + inside * 4, other);
      }
      store(r, inside / TOKENS, inside % TOKENS, sum);
    }
    synchronize_cluster();  // no block may end while others read its shared memory
  }
}
