// Prefill on Hopper: y[M,N] = x[M,K] W^T (+ bias), W6A16, by warpgroup matrix instructions (sm_90a).
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
//
// Outputs are blocks of ROWS x TOKENS. As many as fill the GPU evenly are computed whole. The (output, super-block)
// pairs of the others form one line that all thread blocks share evenly, so that each has the same work. If several
// thread blocks share an output, they leave their sums in global memory to the one that has the output's beginning,
// which adds them in order. The result never depends on timing.
//
// fp32 roundings of a term: those of the tensor core's sums over a block's part of K, one for each block that
// shares the output (K/256 at most), and the bias.

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

// ---- who does what -----------------------------------------------------------------------------------------

// Assigns outputs to blocks. The first `whole` are computed whole, `gridDim.x` at a time. The (output, super-block)
// pairs of the others are shared out in parts of equal length, the first ones longer by one if need be. Parts are
// numbered in reverse order of blocks: a block waits for later parts, so for earlier blocks, which have certainly begun.
struct Shares {
  int outputs, whole, depth;  // depth: super-blocks of K

  __device__ __forceinline__ static int part() { return gridDim.x - 1 - blockIdx.x; }
  __device__ __forceinline__ int begin(int part) const {
    const int pairs = (outputs - whole) * depth, parts = gridDim.x;
    return part * (pairs / parts) + min(part, pairs % parts);
  }
};

// A block's pieces of work, one after the other: super-blocks [begin, end) of `output`. It keeps little state,
// because the sums need the registers.
struct Piece {
  int output, begin, end;

  __device__ __forceinline__ Piece() : output((int)blockIdx.x - (int)gridDim.x), begin(0), end(0) {}

  __device__ __forceinline__ bool next(const Shares& shares) {
    int at = (output - shares.whole) * shares.depth + end;
    if (output < shares.whole) {
      output += gridDim.x;
      begin = 0;
      end = shares.depth;
      if (output < shares.whole) return true;
      at = shares.begin(Shares::part());
    }
    const int stop = shares.begin(Shares::part() + 1);
    if (at == stop) return false;
    output = shares.whole + at / shares.depth;
    begin = at % shares.depth;
    end = min(shares.depth, begin + stop - at);
    return true;
  }
};

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

// ---- outputs that blocks share -------------------------------------------------------------------------------

// A part has room for one block's sums, ordered by thread, and a flag for each warp. No other launch uses the number
// `ticket`, so that older contents of the memory are no raised flag. A warp that has read a flag lowers it.
struct Exchange {
  float* sums;
  u64* flags;
  u64 ticket;

  __device__ __forceinline__ float* place(int part) const {
    return sums + (i64)part * (ROWS * TOKENS) + threadIdx.x * 4;
  }

  __device__ __forceinline__ void leave(const float (&own)[SUMS], int part, int warp, int lane) const {
    float* const to = place(part);
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      *reinterpret_cast<float4*>(to + i * (CONSUMERS * 128)) = make_float4(own[i], own[i + 1], own[i + 2], own[i + 3]);
    }
    __syncwarp();
    if (lane == 0) raise_flag(flags + part * WARPS + warp, ticket);
  }

  // Adds the sums of the parts from `first` to `last`, in order; some loads are in flight at a time.
  __device__ __forceinline__ void collect(float (&own)[SUMS], int first, int last, int warp, int lane) const {
    constexpr int LOADS = SUMS < 32 ? SUMS / 4 : 8;
    for (int part = first + lane; part <= last; part += 32) {
      u64* const flag = flags + part * WARPS + warp;
      await_flag(flag, ticket);
      clear_flag(flag);
    }
    __syncwarp();
    for (int part = first; part <= last; ++part) {
      const float* const from = place(part);
#pragma unroll
      for (int begin = 0; begin < SUMS; begin += LOADS * 4) {
        float4 loaded[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; ++j) loaded[j] = load_of_block(from + (begin + j * 4) * (CONSUMERS * 128));
#pragma unroll
        for (int j = 0; j < LOADS; ++j) {
          own[begin + j * 4] += loaded[j].x;
          own[begin + j * 4 + 1] += loaded[j].y;
          own[begin + j * 4 + 2] += loaded[j].z;
          own[begin + j * 4 + 3] += loaded[j].w;
        }
      }
    }
  }
};

// ---- the kernel --------------------------------------------------------------------------------------------

// Parameters: y 16-bit (m, n), 16-byte aligned, rows `pitch` elements apart; bias (n,) of `bias_kind`, or null;
// sums, flags and ticket of the exchange; the outputs to compute whole; tile_map, the weights in boxes of (ROW_TILES,
// TILE_PIECES, TILE_BYTES / TILE_PIECES) bytes, zero past the last row tile; x_map, x 16-bit (m, k) in boxes of (TOKENS, 64),
// zero past m and k. Parameters begin 16 bytes past a multiple of 64 on sm_90, so the maps, aligned to 64, are at 112 and 240.
// Outputs of the same rows are next to each other. Shared memory from a 1024-byte boundary.
extern "C" __global__ void __launch_bounds__(THREADS, Q6K_OCCUPANCY)
    q6k_gemm_wgmma(u16* y, const void* bias, float* exchanged, u64* flags, u64 ticket, int bias_kind, int m, int n,
                   int k, int pitch, int whole, const __grid_constant__ TensorMap tile_map,
                   const __grid_constant__ TensorMap x_map) {
  extern __shared__ __align__(1024) u8 shared_memory[];
  const u32 shared = shared_address(shared_memory);
  const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int token_blocks = (m + TOKENS - 1) / TOKENS;
  const Shares shares = {token_blocks * ((n + ROWS - 1) / ROWS), whole, super_blocks_of(k)};
  Piece piece;

  const u32 x_full = shared + BARRIERS_BEGIN, x_free = x_full + X_STAGES * 8;
  const u32 tiles_full = x_free + X_STAGES * 8, tiles_free = tiles_full + TILE_STAGES * 8;
  let_dependents_start();
  if (threadIdx.x == 0) {
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
  __syncthreads();

  if (warp >= WARPS) {
#if Q6K_TOKENS > 128  // registers move from the warps that copy to those that have many sums
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    RingPlace place;
    if (warp == WARPS && lane == 0) {
      while (piece.next(shares)) {
        for (int block = piece.begin; block < piece.end; ++block) {
          const u32 full = tiles_full + place.stage * 8;
          barrier_wait(tiles_free + place.stage * 8, place.parity ^ 1);
          barrier_expect(full, TILE_STAGE_BYTES);
          copy_tiles(shared + TILES_BEGIN + place.stage * TILE_STAGE_BYTES, &tile_map, block,
                     piece.output / token_blocks * ROW_TILES, full);
          place.advance(TILE_STAGES);
        }
      }
    } else if (warp == WARPS + 1 && lane == 0) {
      wait_for_previous_grid();
      while (piece.next(shares)) {
        for (int i = piece.begin * QUARTERS; i < piece.end * QUARTERS; ++i) {
          const u32 full = x_full + place.stage * 8;
          barrier_wait(x_free + place.stage * 8, place.parity ^ 1);
          barrier_expect(full, X_BYTES);
          copy_tokens(shared + place.stage * X_BYTES, &x_map, i * 64, piece.output % token_blocks * TOKENS, full);
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
    TileScales scales;
    RingPlace tile_place, x_place, x_done;
    auto begin_block = [&]() {
      barrier_wait(tiles_full + tile_place.stage * 8, tile_place.parity);
      scales.load(own_tile + tile_place.stage * TILE_STAGE_BYTES, lane);
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
    };
    const Exchange exchange = {exchanged, flags, ticket};
    while (piece.next(shares)) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
      begin_block();
      prepare(0);
      for (int block = piece.begin; block < piece.end; ++block) {
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
            if (quarter > 0 || block > piece.begin) free_x();
          }
          if (quarter + 1 < QUARTERS) {
            prepare(quarter + 1);
          } else {
            end_block();
            if (block + 1 < piece.end) {
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

      if (piece.begin > 0) {
        exchange.leave(sums, Shares::part(), warp, lane);
        continue;
      }
      if (piece.end < shares.depth) {
        const int output_end = (piece.output - whole + 1) * shares.depth;
        int last = Shares::part() + 1;
        while (shares.begin(last + 1) < output_end) ++last;
        exchange.collect(sums, Shares::part() + 1, last, warp, lane);
      }
      const int first_row = (piece.output / token_blocks * ROW_TILES + warp) * TILE_ROWS;
      const int upper = first_row + (lane >> 2), lower = upper + 8;
      write_outputs(sums, upper < n ? bias_at(bias, bias_kind, upper) : 0.0f,
                    lower < n ? bias_at(bias, bias_kind, lower) : 0.0f, shared + STAGING_BEGIN + warp * 512, lane, y, m,
                    n, pitch, piece.output % token_blocks * TOKENS, first_row);
    }
  }
}
