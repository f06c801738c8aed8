// Planes to tiles. A warp makes a tile: it reads 16 rows x 256 weights of the code planes, turns their bits in shared
// memory, and writes the tile front to back, 16 bytes a lane; scales it copies.
//
// Pointers are not __restrict__, with which the compiler would load the scales only after the rest is done.

constexpr int PACK_WARPS = 8;
constexpr int PLANE_BYTES = Q6K_BITS == 8 ? 256 : 128;  // of a row's super-block in the first code plane
constexpr int HIGH_BYTES = 32 * LOW_BITS;               // and in the second
#if Q6K_BITS == 6
typedef uint4 High;  // what is copied of the second plane at once
#else
typedef u32 High;  // as its rows may be a multiple of 4 bytes only
#endif
// Bytes between rows in shared memory: an odd number of 16 lets the 8 rows that a warp reads at once meet all banks.
constexpr int PITCH = ((PLANE_BYTES + HIGH_BYTES) / 16 | 1) * 16;

// Copies a plane's part of a tile into shared memory, zeros for rows and columns that do not exist. `width` is the bytes
// of a whole row of the plane, a multiple of T's, `at` those before the super-block.
template <typename T, int BYTES>
__device__ __forceinline__ void stage_plane(u8* to, const u8* plane, i64 first_row, int rows, i64 width, i64 at, int lane) {
  constexpr int A_ROW = BYTES / sizeof(T), COUNT = TILE_ROWS * A_ROW / 32;
  const int present = (int)min((i64)BYTES, width - at);
  T values[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {  // all loads are under way before the first is needed
    const int row = (32 * i + lane) / A_ROW, inside = (32 * i + lane) % A_ROW * (int)sizeof(T);
    values[i] = T{};
    if (row < rows && inside < present) values[i] = *(const T*)(plane + (first_row + row) * width + at + inside);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int row = (32 * i + lane) / A_ROW, inside = (32 * i + lane) % A_ROW * (int)sizeof(T);
    *(T*)(to + row * PITCH + inside) = values[i];
  }
}

// Copies an array of scales: 16 rows of BYTES bytes of it, zeros for those that do not exist. `width` is the bytes of a
// whole row, a multiple of T's, `at` those before the super-block.
template <typename T, int BYTES>
__device__ __forceinline__ void copy_elements(u8* to, const u8* from, i64 first_row, int rows, i64 width, i64 at, T turn,
                                              int lane) {
  constexpr int A_ROW = BYTES / sizeof(T);
  const int present = (int)min((i64)BYTES, width - at);
#pragma unroll
  for (int i = lane; i < TILE_ROWS * A_ROW; i += 32) {
    const int row = i / A_ROW, inside = i % A_ROW * (int)sizeof(T);
    T value = 0;
    if (row < rows && inside < present) value = *(const T*)(from + (first_row + row) * width + at + inside) ^ turn;
    ((T*)to)[i] = value;
  }
}

// The same a word at a time where rows are whole words; ELEMENT is the bytes of an element.
template <int BYTES, int ELEMENT>
__device__ __forceinline__ void copy_scales(u8* to, const u8* from, i64 first_row, int rows, i64 width, i64 at, u32 turn,
                                            int lane) {
  if constexpr (BYTES % 4 == 0) {
    if (width % 4 == 0) return copy_elements<u32, BYTES>(to, from, first_row, rows, width, at, turn, lane);
  }
  if constexpr (ELEMENT == 2) {
    copy_elements<u16, BYTES>(to, from, first_row, rows, width, at, (u16)turn, lane);
  } else {
    copy_elements<u8, BYTES>(to, from, first_row, rows, width, at, (u8)turn, lane);
  }
}

// The stored codes of a lane's elements of the two sixteens of 32 weights, four a word, as bytes. `row` is a row's planes
// in shared memory, `pair` the 32 weights of it.
__device__ __forceinline__ void codes_of(u32 (&codes)[2], const u8* row, int pair, int t) {
#if Q6K_BITS == 8
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const u8* const at = row + 32 * pair + 16 * s + 4 * (t >> 1);
    codes[s] = __byte_perm(*(const u32*)at, *(const u32*)(at + 8), t & 1 ? 0x7632 : 0x5410);
  }
#else
  const uint4 low = *(const uint4*)(row + 16 * pair);
  const u32 take = t | (4 + t) << 8;  // byte t of both words, into bytes 0 and 2
  const u32 pairs[2] = {__byte_perm(low.x, low.y, take), __byte_perm(low.z, low.w, take)};
#pragma unroll
  for (int s = 0; s < 2; ++s) codes[s] = (pairs[s] & 0x000F000Fu) | (pairs[s] & 0x00F000F0u) << 4;
#if Q6K_BITS == 6  // a byte holds four even weights' pairs, the one four bytes on those of the odd weights
  const uint2 high = *(const uint2*)(row + PLANE_BYTES + 8 * pair);
  const u32 high_of[2] = {__byte_perm(high.x, high.y, 0x5140), __byte_perm(high.x, high.y, 0x7362)};
#pragma unroll
  for (int s = 0; s < 2; ++s) codes[s] |= (high_of[s] >> 2 * t & 0x03030303u) << 4;
#elif Q6K_BITS == 5  // a byte holds four even weights' bits, then those of the odd weights
  const u32 high = *(const u32*)(row + PLANE_BYTES + 4 * pair), odd = high >> 4;
  const u32 high_of[2] = {__byte_perm(high, odd, 0x5140), __byte_perm(high, odd, 0x7362)};
#pragma unroll
  for (int s = 0; s < 2; ++s) codes[s] |= (high_of[s] >> t & 0x01010101u) << 4;
#endif
#endif
}

// Grid (ceil(tiles / 8), 1, 1), 256 threads. All planes aligned to 16 bytes.
//   codes   (rows, k/2), or (rows, k) of 8 bits; rows = matrices * n
//   high    (rows, k LOW_BITS / 8); only if there are low bits
//   scale, mins, steps, min_steps   (rows, k / weights), those that the weight type has
//   tiles   (matrices, ceil(n/16), ceil(k/256), TILE_BYTES); every byte is written, zeros past n and k
//   n, k    rows of a matrix; weights of a row, a multiple of 32
//   count   matrices * ceil(n/16) * ceil(k/256), below 2^32
extern "C" __global__ void __launch_bounds__(32 * PACK_WARPS)
    q6k_pack(const u8* codes, const u8* high, const u8* scale, const u8* mins, const u8* steps, const u8* min_steps,
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
  stage_plane<uint4, PLANE_BYTES>(own, codes, first_row, rows, (i64)k * PLANE_BYTES / SUPER_BLOCK,
                                  (i64)super_block * PLANE_BYTES, lane);
#if Q6K_BITS == 5 || Q6K_BITS == 6
  stage_plane<High, HIGH_BYTES>(own + PLANE_BYTES, high, first_row, rows, (i64)k * HIGH_BYTES / SUPER_BLOCK,
                                (i64)super_block * HIGH_BYTES, lane);
#endif
  constexpr int ELEMENT = WIDE_SCALES ? 2 : 1, SCALE_BYTES = SUPER_BLOCK / Q6K_GROUP * ELEMENT;
  constexpr u32 TURN = Q6K_SCALES == SCALES_INT8_STEPS ? 0x80808080u : 0;
  auto copy = [&](int at, const u8* from) {
    copy_scales<SCALE_BYTES, ELEMENT>(tile + at, from, first_row, rows, (i64)(k / Q6K_GROUP) * ELEMENT,
                                      (i64)super_block * SCALE_BYTES, TURN, lane);
  };
  for (int i = USED_BYTES + lane * 16; i < TILE_BYTES; i += 32 * 16) *(uint4*)(tile + i) = make_uint4(0, 0, 0, 0);
  copy(SCALES_AT, scale);
  if (Q6K_MINIMUM) copy(MINS_AT, mins);
  if (STEPPED) {
    auto copy_steps = [&](int at, const u8* from) {
      copy_scales<2, 2>(tile + at, from, first_row, rows, (i64)(k / SUPER_BLOCK) * 2, (i64)super_block * 2, 0, lane);
    };
    copy_steps(STEPS_AT, steps);
    if (Q6K_MINIMUM) copy_steps(MIN_STEPS_AT, min_steps);
  }
  __syncwarp();

  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int in_tile = g + 8 * h, existing = SUPER_BLOCK * super_block;
    const u8* const row = own + in_tile * PITCH;
    u32 v[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      u32 codes[2];
      codes_of(codes, row, j, t);
      const bool exists = in_tile < rows && existing + 32 * j < k;
      v[2 * j] = exists ? codes[0] : 0;
      v[2 * j + 1] = exists ? codes[1] : 0;
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
