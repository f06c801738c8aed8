// Decode with experts: y[p,N] = x[row of p,K] W[expert of p]^T (+ bias) for pairs p of a token and an expert, W6A8.
//
// As decode.cuh, but the weight is a stack (E,N,K), and which of its weights a row meets is in memory.
//
//   Q6K_TOKENS, Q6K_FUSED   both 1: every block quantises the rows that it needs, one by one (quantize.cuh)
//   Q6K_WARPS, Q6K_STAGES, Q6K_OCCUPANCY   see warps.cuh
//
// The row tiles of all pairs form one line that blocks share evenly, each a contiguous range of at most two pairs. The
// warps of a block split the (row tile, super-block) pairs of its range, in order. A row tile that falls to several
// warps is summed over them in the order of warps: the result never depends on timing. Pairs of one expert read its
// tiles each for itself; all but the first find them in the L2 cache.
//
// fp32 roundings of a term: as in decode.cuh without clusters.

static_assert(TOKENS == 1 && Q6K_FUSED, "rows are quantised one by one");

constexpr int PAIRS = 2;  // of a block, at most

// Rows of activations that are still those of a network's gate and of what it gates, `up`.
struct GatedRows {
  static constexpr int BATCH = 1, LOADS = 4;
  const u16 *gate, *up;
  i64 stride;
  int kind;  // a Gate

  __device__ __forceinline__ void load(uint4 (&raw)[LOADS], int token, int column) const {
    const i64 at = token * stride + column;
    const uint4 *const from = reinterpret_cast<const uint4*>(gate + at), *const of_up = reinterpret_cast<const uint4*>(up + at);
    raw[0] = from[0], raw[1] = from[1], raw[2] = of_up[0], raw[3] = of_up[1];
  }

  __device__ __forceinline__ void activations(const uint4 (&raw)[LOADS], uint4 (&values)[2]) const {
    const uint4 factors[2] = {raw[2], raw[3]};
    values[0] = raw[0], values[1] = raw[1];
    apply_gate(kind, values, factors, true);
  }
};

// Parameters: tiles (E, row_tiles, ceil(K/256), TILE_BYTES); experts of the pairs, int64 if `wide`, else int32, of which
// one outside 0..count-1 traps; x 16-bit (rows, k), row p / sharing for pair p, 16-byte aligned and `stride` elements
// apart; up, null, or rows like those of x, which then are gates: activations are what a Gate, `gate`, makes of both;
// y 16-bit (pairs, n); bias (count, n) of `bias_kind`, or null; early: whether to load tiles before the launch before
// has ended. Then they are those of the experts that memory has at that time; if these have changed in the end, tiles
// are loaded again. Grid: at least as many blocks as pairs. Shared memory: `experts_decode.py` has the sizes.
// No pointer is __restrict__: loads of what an earlier launch writes must not move above the wait for it.
extern "C" __global__ void __launch_bounds__(THREADS, Q6K_OCCUPANCY)
    q6k_experts_decode(const u8* tiles, const void* experts, const u16* x, const u16* up, u16* y, const void* bias,
                       i64 stride, int gate, int wide, int bias_kind, int pairs, int sharing, int n, int k, int row_tiles,
                       int count, int early) {
  extern __shared__ __align__(128) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int depth = super_blocks_of(k), total = pairs * row_tiles;
  const int first_row = share(total, blockIdx.x, gridDim.x), rows = share(total, blockIdx.x + 1, gridDim.x) - first_row;
  const int begin = share(rows * depth, warp, WARPS), end = share(rows * depth, warp + 1, WARPS);
  const int first_pair = first_row / row_tiles;
  const int border = (first_pair + 1) * row_tiles - first_row;  // the range's first row tile of the second pair
  const int block_pairs = rows > border ? 2 : 1;

  let_dependents_start();
  // The experts of the block's pairs as memory has them now, -1 for one that does not exist. All lanes have what lane 0
  // has read, though memory may be changing.
  auto read_experts = [&](int (&found)[PAIRS]) {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const int pair = first_pair + (i < block_pairs ? i : 0);
      const i64 id = wide ? static_cast<const volatile i64*>(experts)[pair]
                          : (i64) static_cast<const volatile int*>(experts)[pair];
      found[i] = id < 0 || id >= count ? -1 : (int)id;
    }
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) found[i] = __shfl_sync(0xFFFFFFFFu, found[i], 0);
  };

  const u32 ring = shared_address(shared) + warp * STAGES * TILE_BYTES;
  const int first_of_warp = begin / depth;
  int chosen[PAIRS];
  auto tiles_of = [&](int row_tile) {
    const int second = row_tile >= border;
    const i64 before = (i64)(second ? chosen[1] : chosen[0]) * row_tiles;
    return tiles + (before + first_row + row_tile - (first_pair + second) * row_tiles) * depth * TILE_BYTES;
  };
  // The copies' position: they run STAGES tiles ahead of the sums.
  int copy_at, copy_block, copy_row;
  const u8* from;
  auto begin_copies = [&]() {
    copy_at = begin, copy_row = first_of_warp, copy_block = begin - first_of_warp * depth;
    from = tiles_of(copy_row) + (i64)copy_block * TILE_BYTES;
  };
  auto copy_next = [&](int stage) {
    if (copy_at < end) {
      copy_tile_async(ring + stage * TILE_BYTES, from, lane, evict_first());
      ++copy_at;
      from += TILE_BYTES;
      if (++copy_block == depth) {
        copy_block = 0;
        if (++copy_row == border) from = tiles_of(copy_row);
      }
    }
    commit_copies();
  };
  auto fill_ring = [&](int begin, int end) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      if (stage >= begin && stage < end) copy_next(stage);
    }
  };

  // Activations requested after a full ring of tiles wait for it.
  constexpr int EARLY_STAGES = STAGES > 2 ? 2 : STAGES;
  if (early) {
    read_experts(chosen);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) chosen[i] = max(chosen[i], 0);
    begin_copies();
    fill_ring(0, EARLY_STAGES);
  }
  wait_for_previous_grid();
  auto settle_experts = [&]() {
    int found[PAIRS];
    bool same = early;
    read_experts(found);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      if (found[i] < 0) __trap();
      same = same && found[i] == chosen[i];
      chosen[i] = found[i];
    }
    if (same) return;
    if (early) {
      wait_copies<0>();
      __syncwarp();
    }
    begin_copies();
    fill_ring(0, EARLY_STAGES);
  };

  // A row of activations for each pair, or one if it is the same.
  const bool one_row = first_pair / sharing == (first_pair + 1) / sharing;
  const int codes_bytes = depth * CODES_A_BLOCK, steps_bytes = depth * STEPS_A_BLOCK, parts_bytes = depth * PARTS_A_BLOCK;
  u8* const codes = shared + RING_BYTES;
  u8* const steps = codes + PAIRS * codes_bytes;
  u8* const sums = steps + PAIRS * steps_bytes;
  u8* const parts = sums + (Q6K_OFFSET ? PAIRS * steps_bytes : 0);
  const u32 partials = shared_address(parts) + (Q6K_MINIMUM ? PAIRS * parts_bytes : 0);
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    if (i > 0 && (one_row || i >= block_pairs)) continue;
    const Quantized to = {codes + i * codes_bytes, reinterpret_cast<float*>(steps + i * steps_bytes),
                          Q6K_OFFSET ? reinterpret_cast<u32*>(sums + i * steps_bytes) : nullptr,
                          Q6K_MINIMUM ? reinterpret_cast<u16*>(parts + i * parts_bytes) : nullptr};
    const i64 from = (first_pair + i) / sharing * stride;
    auto between = [&]() {
      if (i > 0) return;
      settle_experts();
      fill_ring(EARLY_STAGES, STAGES);
    };
    if (up == nullptr) {
      quantize_rows<THREADS>(Rows{x + from, stride}, 1, depth * SUPER_BLOCK, k, to, between);
    } else {
      quantize_rows<THREADS>(GatedRows{x + from, up + from, stride, gate}, 1, depth * SUPER_BLOCK, k, to, between);
    }
  }
  __syncthreads();

  auto activations_of = [&](int row_tile) {
    const int row = one_row || row_tile < border ? 0 : 1;
    return of_lane({shared_address(codes) + row * codes_bytes, shared_address(steps) + row * steps_bytes,
                    shared_address(sums) + row * steps_bytes, shared_address(parts) + row * parts_bytes},
                   lane);
  };
  auto store = [&](int row_tile, int r, int token, float value) {
    const int second = row_tile >= border, pair = first_pair + second;
    const int row = (first_row + row_tile - pair * row_tiles) * TILE_ROWS + r;
    if (row >= n || token > 0) return;
    const float addend = bias_kind == NO_BIAS ? 0.0f : bias_at(bias, bias_kind, (second ? chosen[1] : chosen[0]) * n + row);
    y[(i64)pair * n + row] = to_half(value + addend);
  };
  LastSum last;
  last.find(partials, threadIdx.x, rows * depth, depth);
  multiply_tiles(
      ring, lane, begin, end, depth, true, copy_next, activations_of,
      [&](int row_tile) { return slot_of_two(partials, warp, row_tile == first_of_warp); }, store);
  __syncthreads();
  store_shared_tiles(last, partials, rows * depth, depth, store);
}
