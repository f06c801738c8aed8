// Blocks of prefill on Hopper: ROWS x TOKENS outputs, for gemm_wgmma.cuh and experts_wgmma.cuh, which follow in the
// same unit.
//
// The weights are operand A: a tile's lane order is the A fragment. So they go from shared memory to registers, where
// they become 16 bits wide, and from there into the tensor cores; expanded weights are never written to memory.
// Tokens are operand B, from shared memory. Two warps only copy: one the tiles (bulk copies), one the
// activations (tensor copies with the 128-byte swizzle that the instruction reads).
//
//   Q6K_TOKENS      see wgmma.cuh, which comes before this file
//   Q6K_CONSUMERS   warpgroups that multiply, 64 rows each
//   Q6K_TILE_STAGES, Q6K_X_STAGES   depth of the two rings: super-blocks of tiles, 64 columns of x
//   Q6K_OCCUPANCY   blocks that must fit on a multiprocessor

#ifndef Q6K_CONSUMERS
#define Q6K_CONSUMERS 2
#endif
#ifndef Q6K_TILE_STAGES
#define Q6K_TILE_STAGES 2
#endif
#ifndef Q6K_X_STAGES
#define Q6K_X_STAGES 4
#endif
#ifndef Q6K_OCCUPANCY
#define Q6K_OCCUPANCY 1
#endif

constexpr int CONSUMERS = Q6K_CONSUMERS, TILE_STAGES = Q6K_TILE_STAGES, X_STAGES = Q6K_X_STAGES;

constexpr int ROWS = 64 * CONSUMERS;  // rows of a block's output
constexpr int ROW_TILES = ROWS / TILE_ROWS;
constexpr int THREADS = CONSUMERS * 128 + (TOKENS > 128 ? 128 : 64);
// Groups of products in flight while weights are prepared: with few tokens they end long before that.
constexpr int PENDING = TOKENS >= 128 ? 1 : 0;
constexpr int X_BYTES = TOKENS * 128;
constexpr int TILE_STAGE_BYTES = ROW_TILES * TILE_BYTES;
// Shared memory: x ring, tile ring, staging of outputs, barriers.
constexpr int TILES_BEGIN = X_STAGES * X_BYTES;
constexpr int STAGING_BEGIN = TILES_BEGIN + TILE_STAGES * TILE_STAGE_BYTES;
constexpr int BARRIERS_BEGIN = STAGING_BEGIN + CONSUMERS * 4 * 512;
constexpr int WARPS = CONSUMERS * 4;  // warps that multiply

// ---- the two rings -----------------------------------------------------------------------------------------

// The barriers of the rings' stages: full when a copy has come, free when all warps that multiply are done with it.
struct Rings {
  u32 x_full, x_free, tiles_full, tiles_free;

  __device__ __forceinline__ Rings(u32 shared)
      : x_full(shared + BARRIERS_BEGIN),
        x_free(x_full + X_STAGES * 8),
        tiles_full(x_free + X_STAGES * 8),
        tiles_free(tiles_full + TILE_STAGES * 8) {}

  // By one thread; then the block meets.
  __device__ __forceinline__ void init() const {
    for (int i = 0; i < X_STAGES; ++i) {
      barrier_init(x_full + i * 8, 1);
      barrier_init(x_free + i * 8, WARPS);
    }
    for (int i = 0; i < TILE_STAGES; ++i) {
      barrier_init(tiles_full + i * 8, 1);
      barrier_init(tiles_free + i * 8, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }

  // Copies the tiles of a super-block from row tile `first` on to the next place, once it is free.
  __device__ __forceinline__ void copy_tiles_to(RingPlace& place, u32 shared, const TensorMap* map, int block,
                                                int first) const {
    const u32 full = tiles_full + place.stage * 8;
    barrier_wait(tiles_free + place.stage * 8, place.parity ^ 1);
    barrier_expect(full, TILE_STAGE_BYTES);
    copy_tiles(shared + TILES_BEGIN + place.stage * TILE_STAGE_BYTES, map, block, first, full);
    place.advance(TILE_STAGES);
  }

  // Likewise 64 columns of TOKENS rows of x.
  __device__ __forceinline__ void copy_tokens_to(RingPlace& place, u32 shared, const TensorMap* map, int column,
                                                 int row) const {
    const u32 full = x_full + place.stage * 8;
    barrier_wait(x_free + place.stage * 8, place.parity ^ 1);
    barrier_expect(full, X_BYTES);
    copy_tokens(shared + place.stage * X_BYTES, map, column, row, full);
    place.advance(X_STAGES);
  }
};

// ---- products ----------------------------------------------------------------------------------------------

// What a warp multiplies: a tile of 16 rows with all tokens of the block, super-block by super-block.
struct Products {
  const Rings& rings;
  const u32 shared, own_tile;
  const int lane;
  u32 fragments[2][4][4];
  TileScales scales;
  RingPlace tile_place, x_place, x_done;

  __device__ __forceinline__ Products(const Rings& rings, u32 shared, int warp, int lane)
      : rings(rings), shared(shared), own_tile(shared + TILES_BEGIN + warp * TILE_BYTES), lane(lane) {}

  __device__ __forceinline__ void begin_block() {
    barrier_wait(rings.tiles_full + tile_place.stage * 8, tile_place.parity);
    scales.load(own_tile + tile_place.stage * TILE_STAGE_BYTES, lane);
  }
  __device__ __forceinline__ void end_block() {
    __syncwarp();
    if (lane == 0) barrier_arrive(rings.tiles_free + tile_place.stage * 8);
    tile_place.advance(TILE_STAGES);
  }
  __device__ __forceinline__ void free_x() {
    if (lane == 0) barrier_arrive(rings.x_free + x_done.stage * 8);
    x_done.advance(X_STAGES);
  }
  // The weights of a quarter of the current super-block, 16 bits wide, into fragments[quarter & 1].
  __device__ __forceinline__ void prepare(int quarter) {
    HalfQuarter part;
    part.load(own_tile + tile_place.stage * TILE_STAGE_BYTES, scales, lane, quarter);
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      u32 upper[2], lower[2];
      part.halves(0, group, scales, upper);
      part.halves(1, group, scales, lower);
      u32(&a)[4] = fragments[quarter & 1][group];
      a[0] = upper[0], a[1] = lower[0], a[2] = upper[1], a[3] = lower[1];
    }
  }

  // The sums over the super-blocks from `begin` to before `end`, of which there is at least one.
  __device__ __forceinline__ void sum(float (&sums)[SUMS], int begin, int end) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
    begin_block();
    prepare(0);
    for (int block = begin; block < end; ++block) {
#pragma unroll
      for (int quarter = 0; quarter < QUARTERS; ++quarter) {
        barrier_wait(rings.x_full + x_place.stage * 8, x_place.parity);
        const u64 x = describe(shared + x_place.stage * X_BYTES);
        multiplies_begin();
#pragma unroll
        for (int group = 0; group < 4; ++group) multiply(sums, fragments[quarter & 1][group], x + group * 2);
        multiplies_commit();
        x_place.advance(X_STAGES);
        if (PENDING == 1) {
          // The products before these are done: their fragments and their stage of x are free.
          multiplies_wait<1>();
          if (quarter > 0 || block > begin) free_x();
        }
        if (quarter + 1 < QUARTERS) {
          prepare(quarter + 1);
        } else {
          end_block();
          if (block + 1 < end) {
            begin_block();
            prepare(0);
          }
        }
        if (PENDING == 0) {
          multiplies_wait<0>();
          free_x();
        }
      }
    }
    if (PENDING == 1) {
      multiplies_wait<0>();
      free_x();
    }
  }
};

// ---- outputs -----------------------------------------------------------------------------------------------

// A warp's 16 rows x 16 tokens, packed by pairs of tokens, turned in shared memory so that a token's rows are
// 32 contiguous bytes of y. `row_of` returns for a token of the block its row of y, or -1 if there is none.
template <typename RowOf>
__device__ __forceinline__ void write_outputs(const float* sums, float upper_bias, float lower_bias, u32 staging, int lane,
                                              u16* y, int n, int pitch, int first_row, RowOf row_of) {
#pragma unroll
  for (int j = 0; j < SUMS / 8; ++j) {
    const float* const d = sums + j * 8;
    const u32 pieces[4] = {
        pack_halves(d[0] + upper_bias, d[1] + upper_bias), pack_halves(d[2] + lower_bias, d[3] + lower_bias),
        pack_halves(d[4] + upper_bias, d[5] + upper_bias), pack_halves(d[6] + lower_bias, d[7] + lower_bias)};
    // Matrices: (tokens 0-7, rows 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15); lane i addresses row i % 8 of
    // matrix i / 8, which is token i % 8 + 8 * (i / 16), half i / 8 % 2.
    const u32 to = staging + ((lane & 7) + (lane >> 4) * 8) * 32 + ((lane >> 3) & 1) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pieces[0]),
                 "r"(pieces[1]), "r"(pieces[2]), "r"(pieces[3])
                 : "memory");
    __syncwarp();
    const uint4 eight = load_shared_16(staging + lane * 16);
    __syncwarp();
    const int token = row_of(j * 16 + (lane >> 1)), row = first_row + (lane & 1) * 8;
    if (token >= 0) {
      u16* const out = y + (i64)token * pitch + row;
      if (n % 8 == 0 && pitch % 8 == 0) {
        if (row < n) *reinterpret_cast<uint4*>(out) = eight;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (row + i < n) out[i] = (u16)(word_of(eight, i >> 1) >> (i & 1) * 16);
        }
      }
    }
  }
}
