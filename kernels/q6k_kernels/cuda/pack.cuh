// Planes to tiles. A warp makes a tile: it reads 16 rows x 256 weights of the planes in 16-byte pieces, turns
// their bytes in shared memory, and writes the tile front to back, 16 bytes a lane.
//
// Memory-bound: a weight is read and written once, for about six instructions of a thread. Pointers are not
// __restrict__, with which the compiler would load the scales only after the rest is done.

constexpr int PACK_WARPS = 8;
constexpr int QL_PITCH = 128 + 16;  // bytes between rows in shared memory: eight rows meet all banks once
constexpr int QH_PITCH = 64 + 16;

// The four bytes of `lane`'s elements of two groups, from 32 weights of the planes.
//   ql: 16 bytes, word w holds weights 8w..8w+7, two a byte; t's byte of each word holds weights 8w+2t, 8w+2t+1
//   qh: words of the even and of the odd weights, byte w bits 2t, 2t+1: weights 8w+2t, 8w+2t+1
// high: high four bits, the first group's in bits 0-3 of each byte; low: low pairs, in bits 0-1 and 2-3.
__device__ __forceinline__ void turn_32_weights(
    const uint4& ql, u32 qh_even, u32 qh_odd, int t, u32& high, u32& low) {
  const u32 select = t | (4 + t) << 4;
  const u32 nibbles = __byte_perm(__byte_perm(ql.x, ql.y, select), __byte_perm(ql.z, ql.w, select), 0x5410);
  // u = q + 32 to two's complement: bit 5 flips, which is bit 3 of the high four.
  const u32 even = ((nibbles >> 2 & 0x03030303u) | (qh_even >> 2 * t & 0x03030303u) << 2) ^ 0x08080808u;
  const u32 odd = ((nibbles >> 6 & 0x03030303u) | (qh_odd >> 2 * t & 0x03030303u) << 2) ^ 0x08080808u;
  // Bytes 0 and 1 belong to the first group, 2 and 3 to the second.
  high = __byte_perm(even | even >> 12, odd | odd >> 12, 0x5140);
  const u32 even_low = nibbles & 0x03030303u, odd_low = nibbles >> 4 & 0x03030303u;
  low = __byte_perm(even_low | even_low >> 14, odd_low | odd_low >> 14, 0x5140) & 0x0F0F0F0Fu;
}

// Grid (ceil(tiles / 8), 1, 1), 256 threads. Pointers aligned to 16 bytes but for `steps`.
//   ql      (rows, k/2), rows = matrices * n
//   qh      (rows, k/4)
//   scale   (rows, k/16), bf16 or, if stepped, int8
//   steps   (rows, k/256) fp16; only if scales are stepped
//   tiles   (matrices, ceil(n/16), k/256, TILE_BYTES); every byte is written, zeros for rows past n
//   n, k    rows of a matrix; weights of a row, a multiple of 256
//   count   matrices * ceil(n/16) * k/256, below 2^32
extern "C" __global__ void __launch_bounds__(32 * PACK_WARPS) q6k_pack(
    const u8* ql, const u8* qh, const u8* scale, const u16* steps, u8* tiles, int n, int k, i64 count) {
  __shared__ __align__(16) u8 planes[PACK_WARPS][TILE_ROWS * (QL_PITCH + QH_PITCH)];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const i64 index = (i64)blockIdx.x * PACK_WARPS + warp;
  if (index >= count) return;
  const u32 super_blocks = (u32)k / SUPER_BLOCK, row_tiles = ((u32)n + TILE_ROWS - 1) / TILE_ROWS;
  const u32 row_tile_of_all = (u32)index / super_blocks;
  const u32 super_block = (u32)index - row_tile_of_all * super_blocks;
  const u32 matrix = row_tile_of_all / row_tiles;
  const int first_row = (int)(row_tile_of_all - matrix * row_tiles) * TILE_ROWS;
  const int rows = n - first_row;  // in this tile: those below `rows` exist
  // Number of the first row's super-block in the planes; the next row's is `super_blocks` further.
  const i64 block = ((i64)matrix * n + first_row) * super_blocks + super_block;
  u8* const tile = tiles + index * TILE_BYTES;

  u8* const ql_shared = planes[warp];
  u8* const qh_shared = ql_shared + TILE_ROWS * QL_PITCH;
  // Missing rows are q = 0, scale 0.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * i + (lane >> 3), at = (lane & 7) * 16;
    u8* const to = ql_shared + row * QL_PITCH + at;
    if (row < rows) {
      copy_async_16(shared_address(to), ql + (block + (i64)row * super_blocks) * 128 + at);
    } else {
      *(uint4*)to = make_uint4(0, 0, 0, 0);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 8 * i + (lane >> 2), at = (lane & 3) * 16;
    u8* const to = qh_shared + row * QH_PITCH + at;
    if (row < rows) {
      copy_async_16(shared_address(to), qh + (block + (i64)row * super_blocks) * 64 + at);
    } else {
      *(uint4*)to = make_uint4(0xAAAAAAAAu, 0xAAAAAAAAu, 0xAAAAAAAAu, 0xAAAAAAAAu);
    }
  }
  commit_copies();
  uint4 scales = make_uint4(0, 0, 0, 0);
#if Q6K_SCALES == SCALES_STEPPED
  u16 step = 0;
  if (lane < TILE_ROWS && lane < rows) {
    scales = *(const uint4*)(scale + (block + (i64)lane * super_blocks) * 16);
    step = steps[block + (i64)lane * super_blocks];
  }
#else
  if ((lane >> 1) < rows) {
    scales = *(const uint4*)(scale + (block + (i64)(lane >> 1) * super_blocks) * 32 + (lane & 1) * 16);
  }
#endif
  wait_copies<0>();
  __syncwarp();

  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u8* const ql_row = ql_shared + (g + 8 * h) * QL_PITCH;
    const u8* const qh_row = qh_shared + (g + 8 * h) * QH_PITCH;
    u32 high[8], low[8];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 pairs = *(const uint4*)(qh_row + 16 * c);
      turn_32_weights(*(const uint4*)(ql_row + 32 * c), pairs.x, pairs.y, t, high[2 * c], low[2 * c]);
      turn_32_weights(*(const uint4*)(ql_row + 32 * c + 16), pairs.z, pairs.w, t, high[2 * c + 1], low[2 * c + 1]);
    }
    u8* const to = tile + lane * 16;
    *(uint4*)(to + 2 * h * 512) = make_uint4(high[0], high[1], high[2], high[3]);
    *(uint4*)(to + (2 * h + 1) * 512) = make_uint4(high[4], high[5], high[6], high[7]);
    *(uint4*)(to + LOW_AT + h * 512) = make_uint4(low[0] | low[1] << 4, low[2] | low[3] << 4,
                                                  low[4] | low[5] << 4, low[6] | low[7] << 4);
  }
#if Q6K_SCALES == SCALES_STEPPED
  if (lane < TILE_ROWS) {
    if (lane < rows) {  // sub-scales + 128; missing rows stay zero
      scales.x ^= 0x80808080u, scales.y ^= 0x80808080u, scales.z ^= 0x80808080u, scales.w ^= 0x80808080u;
    }
    *(uint4*)(tile + SCALES_AT + lane * 16) = scales;
    *(u16*)(tile + STEPS_AT + lane * 2) = step;
  }
#else
  *(uint4*)(tile + SCALES_AT + lane * 16) = scales;
#endif
}
