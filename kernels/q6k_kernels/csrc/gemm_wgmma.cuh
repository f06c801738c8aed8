// Many tokens on Hopper: y[M,N] = x[M,K] W^T (+ bias), W6A16, by warpgroup matrix instructions (sm_90a).
//
// The weights are the A operand: a tile's lane order is the A fragment, so they go from shared memory through
// registers, where they become 16 bits wide, straight into the tensor cores and are never written anywhere.
// Tokens are the B operand, from shared memory. Two warps only copy: one the tiles (bulk copies), one the
// activations (tensor copies with the 128-byte swizzle that the instruction reads).
//
//   Q6K_TOKENS      see wgmma.cuh, which comes before this file
//   Q6K_CONSUMERS   warpgroups that multiply, 64 rows each
//   Q6K_TILE_STAGES, Q6K_X_STAGES   depth of the two rings: super-blocks of tiles, 64 columns of x
//   Q6K_SPLIT       1: the blocks of a cluster split K; their sums meet in distributed shared memory, in order
//   Q6K_OCCUPANCY   blocks that shall fit a multiprocessor
//
// fp32 roundings of a term: those of the tensor core's sums over a block's part of K, one for each block of a
// cluster, and the bias.

#ifndef Q6K_CONSUMERS
#define Q6K_CONSUMERS 2
#endif
#ifndef Q6K_TILE_STAGES
#define Q6K_TILE_STAGES 2
#endif
#ifndef Q6K_X_STAGES
#define Q6K_X_STAGES 4
#endif
#ifndef Q6K_SPLIT
#define Q6K_SPLIT 0
#endif
#ifndef Q6K_OCCUPANCY
#define Q6K_OCCUPANCY 1
#endif

constexpr int CONSUMERS = Q6K_CONSUMERS;
constexpr int TILE_STAGES = Q6K_TILE_STAGES;
constexpr int X_STAGES = Q6K_X_STAGES;
constexpr bool SPLIT = Q6K_SPLIT;

constexpr int ROWS = 64 * CONSUMERS;  // of a block's output
constexpr int ROW_TILES = ROWS / TILE_ROWS;
constexpr int THREADS = CONSUMERS * 128 + (TOKENS > 128 ? 128 : 64);
// Groups of products under way while weights are prepared: with few tokens they end long before that.
constexpr int PENDING = TOKENS >= 128 ? 1 : 0;
constexpr int X_BYTES = TOKENS * 128;
constexpr int TILE_STAGE_BYTES = ROW_TILES * TILE_BYTES;
// Shared memory: x ring, tile ring, staging of outputs, barriers. The sums of a split K reuse the rings.
constexpr int TILES_BEGIN = X_STAGES * X_BYTES;
constexpr int STAGING_BEGIN = TILES_BEGIN + TILE_STAGES * TILE_STAGE_BYTES;
constexpr int BARRIERS_BEGIN = STAGING_BEGIN + CONSUMERS * 4 * 512;
constexpr int SUMS_PITCH = ROWS + 4;  // floats between tokens of a block's sums: keeps lanes in distinct banks

// Where the part of `total` begins.
__device__ __forceinline__ int share(int total, int part, int parts) { return (u32)(total * part) / (u32)parts; }

// ---- outputs -----------------------------------------------------------------------------------------------

// A warp's 16 rows x 16 tokens, packed by pairs of tokens, turned in shared memory so that a token's rows are
// 32 contiguous bytes of y.
__device__ __forceinline__ void write_outputs(const float* sums, float upper_bias, float lower_bias, u32 staging, int lane,
                                              u16* y, int m, int n, int pitch, int first_token, int first_row) {
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
    const int token = first_token + j * 16 + (lane >> 1), row = first_row + (lane & 1) * 8;
    if (token < m) {
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

// ---- the kernel --------------------------------------------------------------------------------------------

// Parameters: tiles (row_tiles, K/256, TILE_BYTES); y 16-bit (m, n), 16-byte aligned, rows `pitch` elements apart;
// bias (n,) of `bias_kind`, or null; x_map, x 16-bit (m, k) in boxes of (TOKENS, 64), zero past m. The 48 bytes
// before x_map put it at a multiple of 64: on sm_90 parameters begin 16 bytes past one.
// Outputs are in blocks of ROWS x TOKENS, those of the same rows next to each other. Grid: with SPLIT a cluster for
// each; otherwise a block takes every gridDim.x-th. Shared memory from a 1024-byte boundary.
extern "C" __global__ void __launch_bounds__(THREADS, Q6K_OCCUPANCY)
    q6k_gemm_wgmma(const u8* tiles, u16* y, const void* bias, int bias_kind, int m, int n, int k, int row_tiles,
                   int pitch, const __grid_constant__ TensorMap x_map) {
  extern __shared__ __align__(1024) u8 shared_memory[];
  const u32 shared = shared_address(shared_memory);
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  u32 cluster = 1;
#if Q6K_SPLIT
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(cluster));
#endif
  const int rank = blockIdx.x % cluster;
  const int first_output = blockIdx.x / cluster, step_output = gridDim.x / cluster;
  const int token_blocks = (m + TOKENS - 1) / TOKENS;
  const int outputs = token_blocks * ((row_tiles + ROW_TILES - 1) / ROW_TILES);
  const int blocks = k / SUPER_BLOCK;
  const int first_block = share(blocks, rank, cluster), depth = share(blocks, rank + 1, cluster) - first_block;

  const u32 x_full = shared + BARRIERS_BEGIN, x_free = x_full + X_STAGES * 8;
  const u32 tiles_full = x_free + X_STAGES * 8, tiles_free = tiles_full + TILE_STAGES * 8;
  let_dependents_start();
  if (threadIdx.x == 0) {
    for (int i = 0; i < X_STAGES; ++i) {
      barrier_init(x_full + i * 8, 1);
      barrier_init(x_free + i * 8, CONSUMERS * 4);
    }
    for (int i = 0; i < TILE_STAGES; ++i) {
      barrier_init(tiles_full + i * 8, 1);
      barrier_init(tiles_free + i * 8, CONSUMERS * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  __syncthreads();

  if (warp >= CONSUMERS * 4) {
#if Q6K_TOKENS > 128  // registers move from the warps that copy to those that have many sums
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    RingPlace place;
    if (warp == CONSUMERS * 4 && lane == 0) {
      for (int output = first_output; output < outputs; output += step_output) {
        const int first_tile = output / token_blocks * ROW_TILES;
        const int present = min(ROW_TILES, row_tiles - first_tile);
        for (int i = 0; i < depth; ++i) {
          const u32 full = tiles_full + place.stage * 8;
          barrier_wait(tiles_free + place.stage * 8, place.parity ^ 1);
          barrier_expect(full, present * TILE_BYTES);
          for (int tile = 0; tile < present; ++tile) {
            copy_bulk(shared + TILES_BEGIN + place.stage * TILE_STAGE_BYTES + tile * TILE_BYTES,
                      tiles + ((i64)(first_tile + tile) * blocks + first_block + i) * TILE_BYTES, TILE_BYTES, full);
          }
          place.advance(TILE_STAGES);
        }
      }
    } else if (warp == CONSUMERS * 4 + 1 && lane == 0) {
      wait_for_previous_grid();
      for (int output = first_output; output < outputs; output += step_output) {
        for (int i = 0; i < depth * QUARTERS; ++i) {
          const u32 full = x_full + place.stage * 8;
          barrier_wait(x_free + place.stage * 8, place.parity ^ 1);
          barrier_expect(full, X_BYTES);
          copy_tensor(shared + place.stage * X_BYTES, &x_map, (first_block * QUARTERS + i) * 64,
                      output % token_blocks * TOKENS, full);
          place.advance(X_STAGES);
        }
      }
    }
    __syncwarp();
  } else {
#if Q6K_TOKENS > 128
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
    const u32 own_tile = shared + TILES_BEGIN + warp * TILE_BYTES;  // a warp multiplies one tile of 16 rows
    float sums[SUMS];
    u32 fragments[2][4][4];
    LaneQuarter::RowStep row_steps[2];
    RingPlace tile_place, x_place, x_done;
    auto begin_block = [&]() {
      barrier_wait(tiles_full + tile_place.stage * 8, tile_place.parity);
#if Q6K_EXACT
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_steps[h] = LaneQuarter::row_step(
            load_step(own_tile + tile_place.stage * TILE_STAGE_BYTES, (lane >> 2) + 8 * h));
      }
#endif
    };
    auto end_block = [&]() {
      __syncwarp();
      if (lane == 0) barrier_arrive(tiles_free + tile_place.stage * 8);
      tile_place.advance(TILE_STAGES);
    };
    auto free_x = [&]() {
      if (lane == 0) barrier_arrive(x_free + x_done.stage * 8);
      x_done.advance(X_STAGES);
    };
    // The weights of a quarter of the current super-block, 16 bits wide, into fragments[quarter & 1].
    auto prepare = [&](int quarter) {
      LaneQuarter part;
      part.load(own_tile + tile_place.stage * TILE_STAGE_BYTES, lane, quarter);
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        u32 upper[2], lower[2];
        part.halves(0, group, row_steps[0], upper);
        part.halves(1, group, row_steps[1], lower);
        u32(&a)[4] = fragments[quarter & 1][group];
        a[0] = upper[0], a[1] = lower[0], a[2] = upper[1], a[3] = lower[1];
      }
    };
    for (int output = first_output; output < outputs; output += step_output) {
      const int first_token = output % token_blocks * TOKENS, first_tile = output / token_blocks * ROW_TILES;
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
      begin_block();
      prepare(0);
      for (int block = 0; block < depth; ++block) {
#pragma unroll
        for (int quarter = 0; quarter < QUARTERS; ++quarter) {
          barrier_wait(x_full + x_place.stage * 8, x_place.parity);
          const u64 x = describe(shared + x_place.stage * X_BYTES);
          multiplies_begin();
#pragma unroll
          for (int group = 0; group < 4; ++group) multiply(sums, fragments[quarter & 1][group], x + group * 2);
          multiplies_commit();
          x_place.advance(X_STAGES);
          if (PENDING == 1) {
            // The products before these are done: their fragments and their stage of x are free.
            multiplies_wait<1>();
            if (quarter > 0 || block > 0) free_x();
          }
          if (quarter + 1 < QUARTERS) {
            prepare(quarter + 1);
          } else {
            end_block();
            if (block + 1 < depth) {
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

      const int upper = (first_tile + warp) * TILE_ROWS + (lane >> 2), lower = upper + 8;
      if (!SPLIT) {
        write_outputs(sums, upper < n ? bias_at(bias, bias_kind, upper) : 0.0f,
                      lower < n ? bias_at(bias, bias_kind, lower) : 0.0f, shared + STAGING_BEGIN + warp * 512, lane, y, m,
                      n, pitch, first_token, (first_tile + warp) * TILE_ROWS);
      } else {
        // Everything was copied and read: the rings are free once all warps say so.
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * 128) : "memory");
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
          const int token = i / 4 * 8 + (lane & 3) * 2 + i % 2;
          const int row = warp * TILE_ROWS + (lane >> 2) + (i / 2 % 2) * 8;
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared + (token * SUMS_PITCH + row) * 4), "f"(sums[i])
                       : "memory");
        }
      }
    }
  }

#if Q6K_SPLIT
  synchronize_cluster();
  const int first_token = first_output % token_blocks * TOKENS, first_tile = first_output / token_blocks * ROW_TILES;
  // Four rows of a token at a time; each block of the cluster finishes its part.
  for (int at = rank * THREADS + threadIdx.x; at < TOKENS * ROWS / 4; at += cluster * THREADS) {
    const int token = at / (ROWS / 4), row = at % (ROWS / 4) * 4;
    float total[4] = {};
    for (int other = 0; other < (int)cluster; ++other) {
      u32 remote;
      float part[4];
      asm("mapa.shared::cluster.u32 %0, %1, %2;"
          : "=r"(remote)
          : "r"(shared + (token * SUMS_PITCH + row) * 4), "r"(other));
      asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(part[0]), "=f"(part[1]), "=f"(part[2]), "=f"(part[3])
                   : "r"(remote)
                   : "memory");
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += part[i];
    }
    const int first = first_tile * TILE_ROWS + row;
    if (first_token + token < m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += first + i < n ? bias_at(bias, bias_kind, first + i) : 0.0f;
      u16* const out = y + (i64)(first_token + token) * pitch + first;
      const uint2 four = {pack_halves(total[0], total[1]), pack_halves(total[2], total[3])};
      if (n % 4 == 0 && pitch % 4 == 0) {
        if (first < n) *reinterpret_cast<uint2*>(out) = four;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + i < n) out[i] = (u16)((i < 2 ? four.x : four.y) >> (i & 1) * 16);
        }
      }
    }
  }
  synchronize_cluster();  // no block may end while others read its shared memory
#endif
}
