// Blocks of the decode kernels: their warps' rings of tiles, and sums of row tiles that fall to several of them.
//
//   Q6K_WARPS    warps of a block
//   Q6K_STAGES   tiles of a warp's ring
//   Q6K_OCCUPANCY  blocks that must fit on a multiprocessor

#ifndef Q6K_WARPS
#define Q6K_WARPS 8
#endif
#ifndef Q6K_STAGES
#define Q6K_STAGES 3
#endif
#ifndef Q6K_OCCUPANCY
#define Q6K_OCCUPANCY 2
#endif

constexpr int WARPS = Q6K_WARPS;
constexpr int STAGES = Q6K_STAGES;
constexpr int THREADS = WARPS * 32;
constexpr int RING_BYTES = WARPS * STAGES * TILE_BYTES;
constexpr int OUTPUTS = TILE_ROWS * TOKENS;  // of a row tile

__device__ __forceinline__ float load_float(u32 address) { return __uint_as_float(load_shared_4(address)); }

__device__ __forceinline__ void store_float(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Start of a part of `total`; hosts ensure that the product is below 2^31.
__device__ __forceinline__ int share(int total, int part, int parts) { return (u32)(total * part) / (u32)parts; }

// The warp that has tile `tile` of the `total` that a block's warps share.
__device__ __forceinline__ int first_warp(int total, int tile) {
  int w = (u32)(tile * WARPS) / (u32)total;
  while (share(total, w + 1, WARPS) <= tile) ++w;
  return w;
}

// Adds the values of warps w, w + 1, ... for one output, up to the warp whose tiles begin at `end` or after. Each
// warp's value lies `pitch` bytes after the previous one. Four loads are in flight at a time.
__device__ __forceinline__ float sum_of_warps(u32 values, int pitch, int total, int w, int end) {
  float sum = 0.0f;
  for (; w < WARPS && share(total, w, WARPS) < end; w += 4) {
    float parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int begin = share(total, w + i, WARPS);
      const bool some = w + i < WARPS && begin < end && begin < share(total, w + i + 1, WARPS);
      parts[i] = some ? load_float(values + (w + i) * pitch) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += parts[i];
  }
  return sum;
}

// Multiplies a warp's tiles, `begin` to before `end` of the row tiles of `depth` super-blocks that its block has, in
// order. copy_next(stage) refills a stage of its ring; activations_of(row tile) are a lane's; store(row tile, row,
// token, sum) takes the sums of row tiles that are the warp's alone if `stores`; others go to slot_of(row tile).
template <typename Copy, typename Activations, typename Slot, typename Store>
__device__ __forceinline__ void multiply_tiles(u32 ring, int lane, int begin, int end, int depth, bool stores, Copy copy_next,
                                               Activations activations_of, Slot slot_of, Store store) {
  const int g = lane >> 2, t = lane & 3;
  if (stores && begin == end) {  // nothing, for those who add up
    for (int at = lane; at < OUTPUTS; at += 32) store_float(slot_of(begin / depth) + at * 4, 0.0f);
    return;
  }
  float totals[2][COLUMNS] = {};
  int row_tile = begin / depth, block = begin - row_tile * depth, stage = 0;
  bool whole = block == 0;
  ActivationParts own = activations_of(row_tile);
  for (int at = begin; at < end; ++at) {
    wait_copies<STAGES - 1>();
    __syncwarp();
    LaneTile tile;
    tile.load(ring + stage * TILE_BYTES, lane);
    __syncwarp();
    copy_next(stage);
    multiply_tile(totals, tile, own.codes + block * CODES_A_BLOCK, own.steps + block * STEPS_A_BLOCK,
                  own.sums + block * STEPS_A_BLOCK, own.parts + block * PARTS_A_BLOCK);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    const bool row_ends = ++block == depth;
    if (row_ends || at + 1 == end) {
      const bool finished = stores && whole && row_ends;
      const u32 slot = slot_of(row_tile);
      add_lanes(totals);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const int token = COLUMNS == 1 ? t : 2 * t + c;
          if (finished) {
            store(row_tile, g + 8 * h, token, totals[h][c]);
          } else if (token < TOKENS) {
            store_float(slot + ((g + 8 * h) * TOKENS + token) * 4, totals[h][c]);
          }
          totals[h][c] = 0.0f;
        }
      }
      ++row_tile;
      block = 0;
      whole = true;
      own = activations_of(row_tile);
    }
  }
}

// The slot of a warp's sums of a row tile. It needs two: it completes each row tile between its first and last itself.
__device__ __forceinline__ u32 slot_of_two(u32 slots, int warp, bool first) {
  return slots + (2 * warp + !first) * OUTPUTS * 4;
}

// A sum over warps that a thread makes in the end: an output of the last row tile that a warp began and did not complete,
// which was completed by the warps after it.
struct LastSum {
  static constexpr bool EARLY = WARPS * OUTPUTS <= THREADS;  // a thread has at most one, and finds it before it multiplies

  int row_tile;  // or -1
  int inside;    // the output's number in the row tile
  int others;    // warps after the first
  u32 first, next;  // where the first warp's value lies, and the second's

  // Number `at` of the block's sums; `total` tiles are the block's.
  __device__ __forceinline__ void find(u32 slots, int at, int total, int depth) {
    const int w = at / OUTPUTS;
    const int begin = share(total, w, WARPS), end = share(total, w + 1, WARPS);
    const int last = (end - 1) / depth, row_end = (last + 1) * depth;
    inside = at % OUTPUTS, others = 0;
    const bool wanted = w < WARPS && begin < end && last * depth >= begin && row_end > end;
    row_tile = wanted ? last : -1;
    first = slot_of_two(slots, w, last == begin / depth) + inside * 4;
    next = slot_of_two(slots, w + 1, true) + inside * 4;
    while (w + 1 + others < WARPS && share(total, w + 1 + others, WARPS) < row_end) ++others;
    asm volatile("" : "+r"(row_tile), "+r"(others), "+r"(first), "+r"(next));  // now, not in the end
  }

  // Four loads are in flight at a time.
  __device__ __forceinline__ float sum() const {
    constexpr int PITCH = 2 * OUTPUTS * 4;
    const float own = load_float(first);
    float sum = 0.0f;
    for (int at = 0; at < others; at += 4) {
      float parts[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[i] = at + i < others ? load_float(next + (at + i) * PITCH) : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += parts[i];
    }
    return own + sum;
  }
};

// Adds up and stores the row tiles that fall to several warps, after multiply_tiles and a barrier.
template <typename Store>
__device__ __forceinline__ void store_shared_tiles(LastSum& last, u32 slots, int total, int depth, Store store) {
  for (int at = threadIdx.x; at < WARPS * OUTPUTS; at += THREADS) {
    if (!LastSum::EARLY) last.find(slots, at, total, depth);
    if (last.row_tile >= 0) store(last.row_tile, last.inside / TOKENS, last.inside % TOKENS, last.sum());
  }
}
