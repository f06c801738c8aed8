// Planes to tiles. A warp makes a tile: it reads 16 rows x 256 weights of the code planes, turns their bits in shared
// memory, and writes the tile front to back, 16 bytes a lane; scales it copies.
//
// Pointers are not __restrict__, with which the compiler would load the scales only after the rest is done.

constexpr int PACK_WARPS = 8;
constexpr int PLANE_BYTES = Q6K_BITS == 8 ? 256 : 128;  // of a row's super-block in the first code plane
constexpr int HIGH_BYTES = 32 * LOW_BITS;               // and in the second
// Bytes between rows in shared memory: four bytes more than a multiple of 128 let eight rows meet all banks once.
constexpr int PITCH = PLANE_BYTES + HIGH_BYTES + 4;

// Copies a plane's part of a tile into shared memory, zeros for rows and columns that do not exist. `width` is the bytes
// of a whole row of the plane, `at` those before the super-block.
template <int BYTES>
__device__ __forceinline__ void stage_plane(u8* to, const u8* plane, i64 first_row, int rows, i64 width, i64 at, int lane) {
  const int present = (int)min((i64)BYTES, width - at);
  for (int i = lane; i < TILE_ROWS * (BYTES / 4); i += 32) {
    const int row = i / (BYTES / 4), inside = i % (BYTES / 4) * 4;
    u32 word = 0;
    if (row < rows && inside < present) word = *(const u32*)(plane + (first_row + row) * width + at + inside);
    *(u32*)(to + row * PITCH + inside) = word;
  }
}

// Copies elements of an array of scales: 16 rows of COUNT, zeros for those that do not exist.
template <typename T, int COUNT>
__device__ __forceinline__ void copy_scales(T* to, const T* from, i64 first_row, int rows, i64 width, i64 at, T turn,
                                            int lane) {
  const int present = (int)min((i64)COUNT, width - at);
#pragma unroll
  for (int i = lane; i < TILE_ROWS * COUNT; i += 32) {
    const int row = i / COUNT, inside = i % COUNT;
    T value = 0;
    if (row < rows && inside < present) value = (T)(from[(first_row + row) * width + at + inside] ^ turn);
    to[i] = value;
  }
}

// The four stored codes of a lane's elements of a sixteen as bytes. `row` is a row's planes in shared memory.
__device__ __forceinline__ u32 codes_of(const u8* row, int sixteen, int t) {
#if Q6K_BITS == 8
  const u32 first = *(const u16*)(row + 16 * sixteen + 2 * t), second = *(const u16*)(row + 16 * sixteen + 2 * t + 8);
  return first | second << 16;
#else
  const u32 pair = row[8 * sixteen + t] | (u32)row[8 * sixteen + 4 + t] << 16;
  u32 codes = (pair & 0x000F000Fu) | (pair & 0x00F000F0u) << 4;
#if Q6K_BITS == 6  // a byte holds four even weights' pairs, the one four bytes on those of the odd weights
  const u8* const high = row + PLANE_BYTES + 8 * (sixteen >> 1) + 2 * (sixteen & 1);
  codes |= ((high[0] >> 2 * t & 3u) | (high[4] >> 2 * t & 3u) << 8 | (high[1] >> 2 * t & 3u) << 16 |
            (high[5] >> 2 * t & 3u) << 24) << 4;
#elif Q6K_BITS == 5  // a byte holds four even weights' bits, then those of the odd weights
  const u8* const high = row + PLANE_BYTES + 2 * sixteen;
  codes |= ((high[0] >> t & 1u) | (high[0] >> (4 + t) & 1u) << 8 | (high[1] >> t & 1u) << 16 |
            (high[1] >> (4 + t) & 1u) << 24) << 4;
#endif
  return codes;
#endif
}

// Grid (ceil(tiles / 8), 1, 1), 256 threads. Code planes aligned to 16 bytes, scales to their elements.
//   codes   (rows, k/2), or (rows, k) of 8 bits; rows = matrices * n
//   high    (rows, k LOW_BITS / 8); only if there are low bits
//   scale, mins, steps, min_steps   (rows, k / weights), those that the weight type has
//   tiles   (matrices, ceil(n/16), ceil(k/256), TILE_BYTES); every byte is written, zeros past n and k
//   n, k    rows of a matrix; weights of a row, a multiple of 32
//   count   matrices * ceil(n/16) * ceil(k/256), below 2^32
extern "C" __global__ void __launch_bounds__(32 * PACK_WARPS)
    q6k_pack(const u8* codes, const u8* high, const u8* scale, const u8* mins, const u16* steps, const u16* min_steps,
             u8* tiles, int n, int k, i64 count) {
  __shared__ __align__(16) u8 planes[PACK_WARPS][TILE_ROWS * PITCH];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const i64 index = (i64)blockIdx.x * PACK_WARPS + warp;
  if (index >= count) return;
  const u32 super_blocks = (u32)super_blocks_of(k), row_tiles = ((u32)n + TILE_ROWS - 1) / TILE_ROWS;
  const u32 row_tile_of_all = (u32)index / super_blocks;
  const int super_block = (int)((u32)index - row_tile_of_all * super_blocks);
  const u32 matrix = row_tile_of_all / row_tiles;
  const int first_in_matrix = (int)(row_tile_of_all - matrix * row_tiles) * TILE_ROWS;
  const int rows = n - first_in_matrix;  // in this tile: those below `rows` exist
  const i64 first_row = (i64)matrix * n + first_in_matrix;
  u8* const tile = tiles + index * TILE_BYTES;
  u8* const own = planes[warp];
  stage_plane<PLANE_BYTES>(own, codes, first_row, rows, (i64)k * PLANE_BYTES / SUPER_BLOCK,
                           (i64)super_block * PLANE_BYTES, lane);
#if Q6K_BITS == 5 || Q6K_BITS == 6
  stage_plane<HIGH_BYTES>(own + PLANE_BYTES, high, first_row, rows, (i64)k * HIGH_BYTES / SUPER_BLOCK,
                          (i64)super_block * HIGH_BYTES, lane);
#endif
  constexpr int GROUPS = SUPER_BLOCK / Q6K_GROUP;
  const i64 groups = k / Q6K_GROUP, group = (i64)super_block * GROUPS;
  auto copy = [&](u8* to, const u8* from) {
    if (WIDE_SCALES) {
      copy_scales<u16, GROUPS>((u16*)to, (const u16*)from, first_row, rows, groups, group, 0, lane);
    } else {
      constexpr u8 TURN = Q6K_SCALES == SCALES_INT8_STEPS ? 0x80 : 0;
      copy_scales<u8, GROUPS>(to, from, first_row, rows, groups, group, TURN, lane);
    }
  };
  for (int i = USED_BYTES + lane * 16; i < TILE_BYTES; i += 32 * 16) *(uint4*)(tile + i) = make_uint4(0, 0, 0, 0);
  copy(tile + SCALES_AT, scale);
  if (Q6K_MINIMUM) copy(tile + MINS_AT, mins);
  if (STEPPED) {
    const i64 width = k / SUPER_BLOCK;
    copy_scales<u16, 1>((u16*)(tile + STEPS_AT), steps, first_row, rows, width, super_block, 0, lane);
    if (Q6K_MINIMUM) {
      copy_scales<u16, 1>((u16*)(tile + MIN_STEPS_AT), min_steps, first_row, rows, width, super_block, 0, lane);
    }
  }
  __syncwarp();

  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int in_tile = g + 8 * h, existing = SUPER_BLOCK * super_block;
    const u8* const row = own + in_tile * PITCH;
    u32 v[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      v[j] = codes_of(row, j, t);
      if (in_tile >= rows || existing + 16 * j >= k) v[j] = 0;
    }
    u8* const to = tile + lane * 16;
#if Q6K_BITS == 8
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      *(uint4*)(to + (4 * h + c) * 512) = make_uint4(v[4 * c], v[4 * c + 1], v[4 * c + 2], v[4 * c + 3]);
    }
#else
    constexpr u32 NIBBLES = 0x0F0F0F0Fu;
    u32 top[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#if Q6K_BOOK
      top[i] = __byte_perm(v[2 * i] | v[2 * i] >> 4, v[2 * i + 1] | v[2 * i + 1] >> 4, 0x6420);
#else
      const int sixteen = 4 * (i >> 1) + (i & 1);
      top[i] = (v[sixteen] & NIBBLES) | (v[sixteen + 2] >> LOW_BITS & NIBBLES) << 4;
#endif
    }
    *(uint4*)(to + 2 * h * 512) = make_uint4(top[0], top[1], top[2], top[3]);
    *(uint4*)(to + (2 * h + 1) * 512) = make_uint4(top[4], top[5], top[6], top[7]);
#if Q6K_BITS == 5 || Q6K_BITS == 6
    constexpr u32 LOWEST = ((1 << LOW_BITS) - 1) * 0x01010101u;
    u32 low[2 * LOW_BITS] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int sixteen = 4 * (i >> 1) + (i & 1);
      const u32 both = (v[sixteen + 2] & LOWEST) | (v[sixteen] >> 4 & LOWEST) << LOW_BITS;
      low[i * LOW_BITS / 4] |= both << 2 * LOW_BITS * i % 8;
    }
    u8* const low_to = tile + LOW_AT + h * 256 * LOW_BITS + lane * 8 * LOW_BITS;
#pragma unroll
    for (int i = 0; i < LOW_BITS; ++i) *(uint2*)(low_to + 8 * i) = make_uint2(low[2 * i], low[2 * i + 1]);
#endif
#endif
  }
}
