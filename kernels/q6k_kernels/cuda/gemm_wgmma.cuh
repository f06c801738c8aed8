// Prefill on Hopper: y[M,N] = x[M,K] W^T (+ bias), W6A16, by warpgroup matrix instructions (sm_90a).
//
//   Q6K_TOKENS      see wgmma.cuh, which comes before this file
//   Q6K_CONSUMERS, Q6K_TILE_STAGES, Q6K_X_STAGES, Q6K_OCCUPANCY   see wgmma_block.cuh, which comes before it, too
//
// Outputs are blocks of ROWS x TOKENS. As many as fill the GPU evenly are computed whole. The (output, super-block)
// pairs of the others form one line that all thread blocks share evenly, so that each has the same work. If several
// thread blocks share an output, they leave their sums in global memory to the one that has the output's beginning,
// which adds them in order. The result never depends on timing.
//
// fp32 roundings of a term: those of the tensor core's sums over a block's part of K, one for each block that
// shares the output (K/256 at most), and the bias.

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

  const Rings rings(shared);
  let_dependents_start();
  if (threadIdx.x == 0) rings.init();
  __syncthreads();

  if (warp >= WARPS) {
#if Q6K_TOKENS > 128  // registers move from the warps that copy to those that have many sums
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    RingPlace place;
    if (warp == WARPS && lane == 0) {
      while (piece.next(shares)) {
        for (int block = piece.begin; block < piece.end; ++block) {
          rings.copy_tiles_to(place, shared, &tile_map, block, piece.output / token_blocks * ROW_TILES);
        }
      }
    } else if (warp == WARPS + 1 && lane == 0) {
      wait_for_previous_grid();
      while (piece.next(shares)) {
        for (int i = piece.begin * QUARTERS; i < piece.end * QUARTERS; ++i) {
          rings.copy_tokens_to(place, shared, &x_map, i * 64, piece.output % token_blocks * TOKENS);
        }
      }
    }
    __syncwarp();
  } else {
#if Q6K_TOKENS > 128
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
    float sums[SUMS];
    Products products(rings, shared, warp, lane);
    const Exchange exchange = {exchanged, flags, ticket};
    while (piece.next(shares)) {
      products.sum(sums, piece.begin, piece.end);
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
                    lower < n ? bias_at(bias, bias_kind, lower) : 0.0f, shared + STAGING_BEGIN + warp * 512, lane, y, n,
                    pitch, first_row, [&](int at) {
                      const int token = piece.output % token_blocks * TOKENS + at;
                      return token < m ? token : -1;
                    });
    }
  }
}
