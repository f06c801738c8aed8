// Blocks of prefill by mma.m16n8k16, for gemm_mma.cuh and experts_mma.cuh, which follow in the same unit.
//
// Weights are operand A: what a lane holds of a tile is its fragment of 16 rows, rounded once to 16 bits in
// registers. Tokens are operand B, from shared memory by ldmatrix. Sums are fp32, rounded once at the end.
//
//   Q6K_BN     16, 32 or 64: tokens of a block
//   Q6K_KW     parts of K that the warps of a block sum separately; BN * KW <= 64
//   Q6K_SLOTS  1 or 2: tiles there is room for in shared memory, for each warp
//
// A block of 8 warps has BN tokens and 128 / KW rows. Warp w has the row tile w / KW and, of every KW super-blocks,
// number w % KW. Tiles come into shared memory by asynchronous copies, each begun as soon as the first half of the
// slot's previous tile is used up. Activations come through registers, one stage ahead, in stages of 8 KB that all
// warps share. With KW, few rows and tokens still make stages of that size and fill the GPU.

#ifndef Q6K_BN
#define Q6K_BN 16
#endif
#ifndef Q6K_KW
#define Q6K_KW 1
#endif
#ifndef Q6K_SLOTS
#define Q6K_SLOTS 2
#endif

constexpr int BN = Q6K_BN, KW = Q6K_KW, SLOTS = Q6K_SLOTS;
constexpr int GEMM_WARPS = 8, GEMM_THREADS = 32 * GEMM_WARPS;
constexpr int ROWS = TILE_ROWS * GEMM_WARPS / KW;  // rows of a block
constexpr int STAGE_BYTES = 8192;                  // of activations: KW parts of BN tokens
constexpr int STAGE_K = STAGE_BYTES / 2 / (BN * KW);
constexpr int STAGES_PER_BLOCK = SUPER_BLOCK / STAGE_K;   // stages of a super-block
constexpr int PART_BYTES = STAGE_BYTES / KW;
constexpr int TOKEN_BYTES = STAGE_K * 2;
static_assert(STAGE_BYTES == 2 * 16 * GEMM_THREADS, "a thread copies two pieces of 16 bytes");
constexpr int SUM_PITCH = ROWS + 4;                       // fp32 between tokens when sums are turned: no conflicts
static_assert(STAGE_K >= 64 && STAGE_K <= SUPER_BLOCK, "BN * KW is 16, 32 or 64");

// c += a b, rows g (c[0], c[1]) and g + 8, columns 2t and 2t + 1.
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if Q6K_FP16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Loads four 8 x 8 matrices; this lane addresses row lane % 8 of matrix lane / 8.
__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

// Two 16-byte pieces of activations that a thread copies to every stage: source, and place in a stage. The second
// is 4 KB further in the stage: later tokens, or later super-blocks for later parts of K.
struct Activations {
  const u16* from;
  u32 to;
  int tokens_left, first_block, first_column;
  uint4 pieces[2];

  __device__ __forceinline__ void place(const u16* x, i64 stride, int tokens, int first_token, int begin) {
    constexpr int IN_TOKEN = STAGE_K / 8, IN_PART = PART_BYTES / 16;
    const int part = threadIdx.x / IN_PART, token = threadIdx.x % IN_PART / IN_TOKEN, at = threadIdx.x % IN_TOKEN;
    first_block = begin + part;
    first_column = first_block * SUPER_BLOCK + at * 8;
    tokens_left = tokens - token;
    from = x + ((i64)first_token + token) * stride + first_column;
    // Pieces are swapped within 128 bytes, so that those of eight tokens lie in different banks.
    to = part * PART_BYTES + token * TOKEN_BYTES + ((at ^ (token & 7)) << 4);
  }
  // Loads stage `sub` of each part's super-block `step`; tokens past M, columns past k and super-blocks past `end` are
  // zeros.
  __device__ __forceinline__ void load(int step, int sub, int end, int k, i64 stride) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tokens_on = KW == 1 ? i * (BN / 2) : 0, blocks_on = step * KW + i * (KW / 2);
      pieces[i] = make_uint4(0, 0, 0, 0);
      const int columns_on = blocks_on * SUPER_BLOCK + sub * STAGE_K;
      const bool exists = first_column + columns_on < k && (KW == 1 || first_block + blocks_on < end);
      if (tokens_on < tokens_left && exists) {
        pieces[i] = *(const uint4*)(from + tokens_on * stride + columns_on);
      }
    }
  }
  __device__ __forceinline__ void store(u32 stage) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(stage + to + i * (STAGE_BYTES / 2)),
                   "r"(pieces[i].x), "r"(pieces[i].y), "r"(pieces[i].z), "r"(pieces[i].w)
                   : "memory");
    }
  }
};

// Two outputs of one row of y, which is n long; `both`: whether the second exists.
__device__ __forceinline__ void store_pair(u16* to, float2 values, int n, bool both) {
  const u32 pair = pack_halves(values.x, values.y);
  if (n % 2 == 0) {  // then both exist, and the pair is aligned
    *(u32*)to = pair;
  } else {
    to[0] = (u16)pair;
    if (both) to[1] = (u16)(pair >> 16);
  }
}

// The sums over super-blocks [begin, end) of a block's rows of a weight and its tokens, of which those from `m` on do
// not exist; `store` takes the row of x, the row of the weight, two sums, and whether the second exists. With `shared`
// and threads as for q6k_gemm_mma.
template <typename Store>
__device__ __forceinline__ void multiply_block(const u8* tiles, const u16* x, u8* shared, i64 stride, int m, int first_token,
                                               int n, int k, u32 row_block, int begin, int end, Store store) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int blocks = super_blocks_of(k), row_tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
  const int steps = (end - begin + KW - 1) / KW;
  const int part = warp % KW, row_tile = row_block * (GEMM_WARPS / KW) + warp / KW;
  const int mine = row_tile < row_tiles ? end : 0;  // this warp has tiles before that super-block

  const u32 stages = shared_address(shared), slots = stages + 2 * STAGE_BYTES + warp * (SLOTS * TILE_BYTES);
  const u8* tile_from = tiles + ((i64)row_tile * blocks + begin + part) * TILE_BYTES;
#pragma unroll
  for (int slot = 0; slot < SLOTS; ++slot) {
    if (begin + part + slot * KW < mine) {
      copy_tile_async(slots + slot * TILE_BYTES, tile_from + slot * (KW * TILE_BYTES), lane);
    }
    commit_copies();
  }

  wait_for_previous_grid();
  Activations activations;
  activations.place(x, stride, m - first_token, first_token, begin);
  activations.load(0, 0, end, k, stride);
  activations.store(stages);
  __syncthreads();

  // Matrices 0 and 1 are a group of eight tokens, 2 and 3 of the next eight. The group is bits 5 and 6, by xor.
  const u32 fragments = stages + part * PART_BYTES + ((lane & 7) + (lane >> 4) * 8) * TOKEN_BYTES +
                        (((lane >> 3 & 1) ^ (lane & 7)) << 4);
  float sums[BN / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int block = begin + part + step * KW;
    const bool active = block < mine;
    const u32 tile = slots + (step % SLOTS) * TILE_BYTES;
    TileScales scales;
    wait_copies<SLOTS - 1>();
    __syncwarp();
#pragma unroll
    for (int sub = 0; sub < STAGES_PER_BLOCK; ++sub) {
      const int parity = STAGES_PER_BLOCK == 1 ? step & 1 : sub & 1;
      const bool last_sub = sub + 1 == STAGES_PER_BLOCK;
      const bool more = !last_sub || step + 1 < steps;
      if (more) activations.load(last_sub ? step + 1 : step, last_sub ? 0 : sub + 1, end, k, stride);
      if (active) {
        const u32 stage = fragments + parity * STAGE_BYTES;
#pragma unroll
        for (int in_stage = 0; in_stage < STAGE_K / 64; ++in_stage) {
          const int quarter = sub * (STAGE_K / 64) + in_stage;
          if (quarter == 0) scales.load(tile, lane);
          HalfQuarter part;
          part.load(tile, scales, lane, quarter);
          if (quarter == 3) {  // nothing is left to be read
            __syncwarp();
            tile_from += KW * TILE_BYTES;
            if (block + SLOTS * KW < mine) {
              copy_tile_async(tile, tile_from + (SLOTS - 1) * (KW * TILE_BYTES), lane);
            }
          }
#pragma unroll
          for (int group = 0; group < 4; ++group) {
            u32 upper[2], lower[2];
            part.halves(0, group, scales, upper);
            part.halves(1, group, scales, lower);
            const u32 a[4] = {upper[0], lower[0], upper[1], lower[1]};
            const u32 from = (stage + in_stage * 128) ^ (group << 5);
#pragma unroll
            for (int pair = 0; pair < BN / 16; ++pair) {
              u32 b[4];
              load_matrices(b, from + pair * (16 * TOKEN_BYTES));
              multiply_add(sums[2 * pair], a, b[0], b[1]);
              multiply_add(sums[2 * pair + 1], a, b[2], b[3]);
            }
          }
        }
      }
      if (more) activations.store(stages + (parity ^ 1) * STAGE_BYTES);
      __syncthreads();
    }
    commit_copies();
  }

  // Turned in shared memory, so that stores go along rows of y.
  float* const turned = (float*)shared;  // [KW][BN][SUM_PITCH]
  {
    const int g = lane >> 2, t = lane & 3;
    float* const to = turned + part * (BN * SUM_PITCH) + (warp / KW) * TILE_ROWS + g;
#pragma unroll
    for (int tokens = 0; tokens < BN / 8; ++tokens) {
#pragma unroll
      for (int r = 0; r < 4; ++r) to[(tokens * 8 + 2 * t + (r & 1)) * SUM_PITCH + 8 * (r >> 1)] = sums[tokens][r];
    }
  }
  __syncthreads();
  const int first_row = row_block * ROWS;
  for (int at = threadIdx.x; at < BN * ROWS / 2; at += GEMM_THREADS) {
    const int token = at / (ROWS / 2), row = first_row + at % (ROWS / 2) * 2;
    const i64 y_row = first_token + token;
    if (y_row >= m || row >= n) continue;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < KW; ++i) {
      const float2 other = *(const float2*)(turned + (i * BN + token) * SUM_PITCH + (row - first_row));
      sum = i ? make_float2(sum.x + other.x, sum.y + other.y) : other;
    }
    store(y_row, row, sum, row + 1 < n);
  }
}
