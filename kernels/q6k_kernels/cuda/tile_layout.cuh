// Where the numbers of a weight type lie in a tile. Comes before every file that reads or writes tiles.
//
// A tile is 16 rows x 256 weights (formats/tiles.py has the rules). lane = 4g + t holds, of row g + 8h and each of
// the 16 groups of 16 weights, the four weights 2t, 2t+1, 2t+8, 2t+9: the A fragment of a 16-row matrix instruction.
// In what follows "sixteen" is such a group; a group of the weight type is one or two of them.

constexpr int TILE_ROWS = 16;
constexpr int QUARTERS = 4;              // parts of a super-block: 64 weights, four sixteens
constexpr bool STEPPED = Q6K_SCALES == SCALES_INT8_STEPS || Q6K_SCALES == SCALES_UINT8_STEPS;
constexpr bool WIDE_SCALES = Q6K_SCALES == SCALES_BF16 || Q6K_SCALES == SCALES_FP16;  // of two bytes
constexpr int TILE_WEIGHTS = TILE_ROWS * SUPER_BLOCK;
constexpr int LOW_BITS = Q6K_BITS == 8 ? 0 : Q6K_BITS - 4;       // of a code, apart from its other four
constexpr int LOW_AT = Q6K_BITS == 8 ? TILE_WEIGHTS : TILE_WEIGHTS / 2;  // byte of a tile where they begin
constexpr int SCALES_AT = TILE_WEIGHTS * Q6K_BITS / 8;           // the scales
constexpr int ROW_SCALES = SUPER_BLOCK / Q6K_GROUP * (WIDE_SCALES ? 2 : 1);  // bytes of a row's scales
constexpr int MINS_AT = SCALES_AT + TILE_ROWS * ROW_SCALES;
constexpr int STEPS_AT = MINS_AT + (Q6K_MINIMUM ? TILE_ROWS * ROW_SCALES : 0);
constexpr int MIN_STEPS_AT = STEPS_AT + TILE_ROWS * 2;
constexpr int USED_BYTES = STEPS_AT + (STEPPED ? TILE_ROWS * 2 * (1 + Q6K_MINIMUM) : 0);
constexpr int TILE_BYTES = (USED_BYTES + 127) / 128 * 128;  // whole lines of memory
constexpr int TILE_CHUNKS = USED_BYTES / 16;
static_assert(USED_BYTES % 16 == 0, "tiles are copied in pieces of 16 bytes");

// Whole tiles are copied by one warp, 16 bytes a lane; `policy`, if any, as `evict_first`.
template <typename... Policy>
__device__ __forceinline__ void copy_tile_async(u32 to_shared, const u8* tile, int lane, Policy... policy) {
#pragma unroll
  for (int at = 0; at < TILE_CHUNKS; at += 32) {
    if (at + 32 <= TILE_CHUNKS || at + lane < TILE_CHUNKS) {
      copy_async_16(to_shared + (at + lane) * 16, tile + (at + lane) * 16, policy...);
    }
  }
}
