// Tiles to rows: gathered by index (an embedding), or a slice of them.
//
//   Q6K_OUT       0: bf16 outputs, 1: fp16, 2: fp32; each scale * code - min of fp32, rounded to nearest once
//   Q6K_INDEX32   1: indices are int32, 0: int64; q6k_gather only
//
// Four lanes take a super-block of one row. Lane t takes the four weights of each sixteen that a tile keeps for it, 64
// consecutive bytes in each piece. The lanes swap codes so that every store writes consecutive bytes too.
// Memory-bound: a weight's bits read and 2 or 4 bytes written, for about 2 instructions. Pointers are not
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
  static constexpr int TOPS = Q6K_BITS == 8 ? 4 : 2, ROW_WORDS = ROW_SCALES / 4;
  uint4 top[TOPS];
  u32 low[LOW_BITS ? 2 * LOW_BITS : 1], scales[ROW_WORDS], mins[Q6K_MINIMUM ? ROW_WORDS : 1];
  u32 step, min_step;

  __device__ __forceinline__ void load(const u8* tile, int row, int t) {
    const int lane = (row & 7) * 4 + t, h = row >> 3;
#pragma unroll
    for (int c = 0; c < TOPS; ++c) top[c] = *(const uint4*)(tile + (TOPS * h + c) * 512 + lane * 16);
    if (LOW_BITS) load_words(low, tile + LOW_AT + h * 256 * LOW_BITS + lane * 8 * LOW_BITS);
    load_words(scales, tile + SCALES_AT + row * ROW_SCALES);
    if (Q6K_MINIMUM) load_words(mins, tile + MINS_AT + row * ROW_SCALES);
    if (STEPPED) step = *(const u16*)(tile + STEPS_AT + row * 2);
    if (STEPPED && Q6K_MINIMUM) min_step = *(const u16*)(tile + MIN_STEPS_AT + row * 2);
  }

  template <int WORDS>
  __device__ __forceinline__ static void load_words(u32 (&words)[WORDS], const u8* from) {
#pragma unroll
    for (int i = 0; i + 1 < WORDS; i += 2) {
      const uint2 two = *(const uint2*)(from + i * 4);
      words[i] = two.x, words[i + 1] = two.y;
    }
  }

  // The codes of sixteen 2c + odd as bytes plus the bias.
  __device__ __forceinline__ u32 codes(int c, int odd) const {
    const int quarter = c >> 1, sixteen = 2 * (c & 1) + odd;
    LaneQuarter part;
#if Q6K_BITS == 8
    part.top[0][sixteen] = word_of(top[quarter], sixteen);
#else
    const int word = Q6K_BOOK ? c & 1 : odd;
    part.top[0][word] = word_of(top[quarter >> 1], 2 * (quarter & 1) + word);
#endif
    part.low[0] = LOW_BITS == 2 ? low[LOW_BITS == 2 ? quarter : 0]
                                : LOW_BITS == 1 ? low[LOW_BITS == 1 ? quarter >> 1 : 0] >> 4 * (quarter & 1) : 0;
    return part.biased(0, sixteen);
  }

  // Of sixteen 2c + odd. Multiplied as IEEE has it, so that an infinite or NaN step gives what it should.
  __device__ __forceinline__ float value(const u32* words, int c, int odd, u32 step_bits) const {
    const int index = Q6K_GROUP == 16 ? 2 * c + odd : c;
#if Q6K_SCALES == SCALES_INT8_STEPS || Q6K_SCALES == SCALES_UINT8_STEPS
    const u32 byte = words[index >> 2] >> 8 * (index & 3) & 0xFFu;
    return (__uint_as_float(0x4B000000u | byte) - (BYTE_BIAS - 32768.0f + 8388608.0f)) * fp16_to_float(step_bits);
#else
    return scale_value<false>(words, index, RowStep());
#endif
  }
};

// The weights of four codes, bytes plus LaneQuarter::BIAS.
__device__ __forceinline__ void multiply(u32 codes, float scale, float least, float* weights) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // 0x4B0000uu is 2^23 + u: a byte becomes a float without the slow conversion.
    const float biased = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7440 | i));
    weights[i] = (biased - (8388608.0f + LaneQuarter::BIAS)) * scale;
    if (Q6K_MINIMUM) weights[i] -= least;
  }
}

// All 32 lanes call this; `out` is where the row's super-block begins, of which `present` weights exist.
__device__ __forceinline__ void store_super_block(const RowPart& part, int t, u8* out, int present) {
  const u32 own = t & 1 ? 0x7632 : 0x5410, other = t & 1 ? 0x5410 : 0x7632;
#pragma unroll
  for (int c = 0; c < 8; ++c) {  // 32 weights, sixteens 2c and 2c + 1
    // Lane t stores elements 8(t&1)..8(t&1)+7 of sixteen 2c + (t>>1): two of each lane. First lanes t and t^2 swap
    // sixteens, then t and t^1 halves of them.
    const u32 even = part.codes(c, 0), odd = part.codes(c, 1);
    const u32 kept = t & 2 ? odd : even, swapped = __shfl_xor_sync(~0u, t & 2 ? even : odd, 2);
    const u32 mine = __byte_perm(kept, swapped, own);                                         // of lanes t and t^2
    const u32 theirs = __shfl_xor_sync(~0u, __byte_perm(kept, swapped, other), 1);            // of t^1 and t^3
    // Two bytes of each lane, lanes 0 to 3.
    const u32 low = t & 1 ? theirs : mine, high = t & 1 ? mine : theirs;                      // of even and odd lanes
    const u32 first = __byte_perm(low, high, t & 2 ? 0x7632 : 0x5410);
    const u32 second = __byte_perm(low, high, t & 2 ? 0x5410 : 0x7632);
    const float scale = t & 2 ? part.value(part.scales, c, 1, part.step) : part.value(part.scales, c, 0, part.step);
    const float least = Q6K_MINIMUM ? part.value(part.mins, c, 0, part.min_step) : 0.0f;
    float w[8];
    multiply(first, scale, least, w);
    multiply(second, scale, least, w + 4);
    if (32 * c >= present) continue;
#if Q6K_OUT == 2
    uint4* const to = (uint4*)(out + (32 * c + 8 * t) * 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[i] = make_uint4(__float_as_uint(w[4 * i]), __float_as_uint(w[4 * i + 1]), __float_as_uint(w[4 * i + 2]),
                         __float_as_uint(w[4 * i + 3]));
    }
#else
    *(uint4*)(out + (32 * c + 8 * t) * 2) = make_uint4(pack_outputs(w[0], w[1]), pack_outputs(w[2], w[3]),
                                                       pack_outputs(w[4], w[5]), pack_outputs(w[6], w[7]));
#endif
  }
}

// Grid (ceil(count * ceil(k/256) / 64), 1, 1), 256 threads. Begins a step: launches after this one, which may read the
// text's position before their own wait (attend.cuh), start only when all before it have ended.
//   tiles    (ceil(n/16), ceil(k/256), TILE_BYTES), aligned to 16 bytes
//   indices  (count); one outside 0..n-1 traps, which ends the process's use of the device
//   out      (count, k), aligned to 16 bytes
//   pairs    count * ceil(k/256), of a row and one of its super-blocks: 1 to 2^32 - 64, so `out` has up to a terabyte
//   n, k     rows; weights of a row, a multiple of 32
extern "C" __global__ void __launch_bounds__(ROW_THREADS) q6k_gather(
    const u8* tiles, const Index* indices, u8* out, u32 pairs, int n, int k) {
  const u32 super_blocks = (u32)super_blocks_of(k);
  const u32 wanted = blockIdx.x * (ROW_THREADS / 4) + threadIdx.x / 4;
  const bool active = wanted < pairs;
  const u32 pair = active ? wanted : pairs - 1;  // lanes past the end read what another lane reads
  const u32 at = pair / super_blocks;
  const int super_block = (int)(pair - at * super_blocks);
  wait_for_previous_grid();  // it may write `indices` and read `out`
  let_dependents_start();
  const Index row = indices[at];
  if (row < 0 || row >= n) __trap();
  const int t = threadIdx.x & 3;
  RowPart part;
  part.load(tiles + ((i64)(row / TILE_ROWS) * super_blocks + super_block) * TILE_BYTES, (int)(row % TILE_ROWS), t);
  store_super_block(part, t, out + ((i64)at * k + super_block * SUPER_BLOCK) * OUT_BYTES,
                    active ? k - super_block * SUPER_BLOCK : 0);
}

// Grid (ceil(ceil(rows/16) * ceil(k/256) / 4), 1, 1), 256 threads. A warp takes eight rows' super-block: half a tile.
//   tiles      (..., ceil(k/256), TILE_BYTES), aligned to 16 bytes
//   out        (rows, k), aligned to 16 bytes
//   first_row  a multiple of 16
//   rows, k    rows from there, all of which exist, and below 2^32 half tiles in all; weights of a row, a multiple
//              of 32
extern "C" __global__ void __launch_bounds__(ROW_THREADS) q6k_dequantize(
    const u8* tiles, u8* out, int first_row, int rows, int k) {
  const u32 super_blocks = (u32)super_blocks_of(k);
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
  store_super_block(part, t, out + (row * k + super_block * SUPER_BLOCK) * OUT_BYTES,
                    row < rows ? k - (int)super_block * SUPER_BLOCK : 0);
}
