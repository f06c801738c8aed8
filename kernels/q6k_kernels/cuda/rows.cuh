// Tiles to rows: gathered by index (an embedding), or a slice of them.
//
//   Q6K_OUT       0: bf16 outputs, 1: fp16, 2: fp32; each the exact product q * scale, rounded to nearest once
//   Q6K_INDEX32   1: indices are int32, 0: int64; q6k_gather only
//
// Four lanes take a super-block of one row. Lane t takes the four weights of each group that a tile keeps for it, 64
// consecutive bytes in each piece. The lanes swap words so that every store writes 64 consecutive bytes too.
// Memory-bound: 0.82 or 0.875 bytes read and 2 or 4 written a weight, for about 2 instructions. Pointers are not
// __restrict__, with which the compiler would delay loads until after the first stores, and wait for memory twice.

#ifndef Q6K_OUT
#define Q6K_OUT 0
#endif
#ifndef Q6K_INDEX32
#define Q6K_INDEX32 0
#endif

constexpr int ROW_THREADS = 256;
constexpr int OUT_BYTES = Q6K_OUT == 2 ? 4 : 2;

#if Q6K_INDEX32
typedef int Index;
#else
typedef i64 Index;
#endif

__device__ __forceinline__ u32 pack_outputs(float low, float high) {
  u32 pair;
#if Q6K_OUT == 1
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

// What lane t of four holds of a row's super-block; the scales are whole in each.
struct RowPart {
  uint4 high[2], low, scales[STEPPED ? 1 : 2];
  u32 step;

  __device__ __forceinline__ void load(const u8* tile, int row, int t) {
    const u8* const from = tile + ((row & 7) * 4 + t) * 16;
    const int h = row >> 3;
    high[0] = *(const uint4*)(from + 2 * h * 512);
    high[1] = *(const uint4*)(from + (2 * h + 1) * 512);
    low = *(const uint4*)(from + LOW_AT + h * 512);
#if Q6K_SCALES == SCALES_STEPPED
    scales[0] = *(const uint4*)(tile + SCALES_AT + row * 16);
    step = *(const u16*)(tile + STEPS_AT + row * 2);
#else
    scales[0] = *(const uint4*)(tile + SCALES_AT + row * 32);
    scales[1] = *(const uint4*)(tile + SCALES_AT + row * 32 + 16);
#endif
  }

  // Of group 2c + odd. Multiplied as IEEE has it, so that an infinite or NaN step gives what it should.
  __device__ __forceinline__ float scale(int c, int odd) const {
#if Q6K_SCALES == SCALES_STEPPED
    const u32 byte = word_of(scales[0], c >> 1) >> (16 * (c & 1) + 8 * odd) & 0xFF;
    return (__uint_as_float(0x4B000000u | byte) - 8388736.0f) * fp16_to_float(step);  // 2^23 + b - (2^23 + 128)
#else
    const u32 pair = word_of(scales[c >> 2], c & 3);
    return __uint_as_float(odd ? pair & 0xFFFF0000u : pair << 16);
#endif
  }
};

// Four weights times their scale. `nibbles` and `pairs` are their bytes in the tile, shared by several groups.
__device__ __forceinline__ void multiply(
    u32 nibbles, u32 pairs, int group, float scale, float (&weights)[4]) {
  const u32 top = nibbles >> 4 * (group & 1) & 0x0F0F0F0Fu, below = pairs >> 2 * (group & 3) & 0x03030303u;
  const u32 plus_32 = (top << 2 | below) ^ 0x20202020u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // 0x4B0000uu is 2^23 + u: a byte becomes a float without the slow conversion.
    weights[i] = (__uint_as_float(__byte_perm(plus_32, 0x4B000000u, 0x7440 | i)) - 8388640.0f) * scale;
  }
}

// All 32 lanes call this; `out` is where the row's super-block begins.
__device__ __forceinline__ void store_super_block(const RowPart& part, int t, u8* out, bool active) {
#if Q6K_OUT == 2
  // Lane t stores elements 4t..4t+3 of a group: of lanes `from` and `from` + 1, the first or last two.
  const int from = 2 * (t & 1);
  const u32 select = t & 2 ? 0x7632 : 0x5410;
#else
  // Lane t stores elements 8(t&1)..8(t&1)+7 of group 2c + (t>>1): the first or last two of all lanes.
  const u32 select = t & 1 ? 0x7632 : 0x5410;
#endif
#pragma unroll
  for (int c = 0; c < 8; ++c) {  // 32 weights, groups 2c and 2c + 1
    const u32 high = word_of(part.high[c >> 2], c & 3), low = word_of(part.low, c >> 1);
#if Q6K_OUT == 2
    const u32 nibbles = __byte_perm(__shfl_sync(~0u, high, from, 4), __shfl_sync(~0u, high, from + 1, 4), select);
    const u32 pairs = __byte_perm(__shfl_sync(~0u, low, from, 4), __shfl_sync(~0u, low, from + 1, 4), select);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float w[4];
      multiply(nibbles, pairs, 2 * c + odd, part.scale(c, odd), w);
      if (active) {
        *(uint4*)(out + (32 * c + 16 * odd + 4 * t) * 4) = make_uint4(
            __float_as_uint(w[0]), __float_as_uint(w[1]), __float_as_uint(w[2]), __float_as_uint(w[3]));
      }
    }
#else
    u32 halves[4];
    const float scale = part.scale(c, t >> 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float w[4];
      const u32 nibbles =
          __byte_perm(__shfl_sync(~0u, high, 2 * i, 4), __shfl_sync(~0u, high, 2 * i + 1, 4), select);
      const u32 pairs = __byte_perm(__shfl_sync(~0u, low, 2 * i, 4), __shfl_sync(~0u, low, 2 * i + 1, 4), select);
      multiply(nibbles, pairs, 2 * c + (t >> 1), scale, w);
      halves[2 * i] = pack_outputs(w[0], w[1]);
      halves[2 * i + 1] = pack_outputs(w[2], w[3]);
    }
    if (active) *(uint4*)(out + (32 * c + 8 * t) * 2) = make_uint4(halves[0], halves[1], halves[2], halves[3]);
#endif
  }
}

// Grid (ceil(count * k/256 / 64), 1, 1), 256 threads. Begins a step: launches after this one, which may read the text's
// position before their own wait (attend.cuh), start only when all before it have ended.
//   tiles    (ceil(n/16), k/256, TILE_BYTES), aligned to 16 bytes
//   indices  (count); one outside 0..n-1 traps, which ends the process's use of the device
//   out      (count, k), aligned to 16 bytes
//   pairs    count * k/256, of a row and one of its super-blocks: 1 to 2^32 - 64, so `out` has up to a terabyte
//   n, k     rows; weights of a row, a multiple of 256
extern "C" __global__ void __launch_bounds__(ROW_THREADS) q6k_gather(
    const u8* tiles, const Index* indices, u8* out, u32 pairs, int n, int k) {
  const u32 super_blocks = (u32)k / SUPER_BLOCK;
  const u32 wanted = blockIdx.x * (ROW_THREADS / 4) + threadIdx.x / 4;
  const bool active = wanted < pairs;
  const u32 pair = active ? wanted : pairs - 1;  // lanes past the end read what another lane reads
  const u32 at = pair / super_blocks;
  wait_for_previous_grid();  // it may write `indices` and read `out`
  let_dependents_start();
  const Index row = indices[at];
  if (row < 0 || row >= n) __trap();
  const int t = threadIdx.x & 3;
  RowPart part;
  part.load(tiles + ((i64)(row / TILE_ROWS) * super_blocks + (pair - at * super_blocks)) * TILE_BYTES,
            (int)(row % TILE_ROWS), t);
  store_super_block(part, t, out + (i64)pair * (SUPER_BLOCK * OUT_BYTES), active);
}

// Grid (ceil(ceil(rows/16) * k/256 / 4), 1, 1), 256 threads. A warp takes eight rows' super-block: half a tile.
//   tiles      (..., k/256, TILE_BYTES), aligned to 16 bytes
//   out        (rows, k), aligned to 16 bytes
//   first_row  a multiple of 16
//   rows, k    rows from there, all of which exist, and below 2^32 half tiles in all; weights of a row, a multiple
//              of 256
extern "C" __global__ void __launch_bounds__(ROW_THREADS) q6k_dequantize(
    const u8* tiles, u8* out, int first_row, int rows, int k) {
  const u32 super_blocks = (u32)k / SUPER_BLOCK;
  const u32 half_tile = blockIdx.x * (ROW_THREADS / 32) + threadIdx.x / 32;
  const u32 tile = half_tile / 2;
  const u32 row_tile = tile / super_blocks;
  const i64 super_block = tile - row_tile * super_blocks;
  const int t = threadIdx.x & 3;
  const int row_in_tile = (int)(half_tile & 1) * 8 + (int)((threadIdx.x & 31) >> 2);
  const i64 row = (i64)row_tile * TILE_ROWS + row_in_tile;
  if (row - (row_in_tile & 7) >= rows) return;  // the whole warp
  RowPart part;
  part.load(tiles + ((i64)(first_row / TILE_ROWS + row_tile) * super_blocks + super_block) * TILE_BYTES,
            row_in_tile, t);
  store_super_block(part, t, out + (row * k + super_block * SUPER_BLOCK) * OUT_BYTES, row < rows);
}
