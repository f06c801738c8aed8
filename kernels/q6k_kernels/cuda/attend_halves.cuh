// How a warp holds and multiplies 16 keys, or 16 values, of 16 bits: see attend_block.cuh. attend_codes.cuh is for 8.

#if !Q6K_CODES
typedef u16 Held;  // a number in the cache

struct Piece {
  static constexpr int ROW = DIM * 2 + 16;  // bytes of a key or value in shared memory: rows that are read together
                                            // are in distinct banks
  static constexpr int BYTES = ATTEND_KEYS * ROW;

  // What a lane knows of the queries.
  struct Queries {
    static constexpr bool KEPT = DIM <= 128;  // in registers
    u32 kept[KEPT ? DIM / 16 : 1][2];
    const u16* from;

    __device__ __forceinline__ Queries(const u16 (&queries)[ATTEND_HEADS + 1][DIM + 8], int lane)
        : from(&queries[lane >> 2][(lane & 3) * 2]) {
      if (KEPT) {
#pragma unroll
        for (int c = 0; c < DIM / 16; ++c) kept[KEPT ? c : 0][0] = read(c, 0), kept[KEPT ? c : 0][1] = read(c, 1);
      }
    }

    // Dims 16 c + 8 half + 2t and + 1 of head g.
    __device__ __forceinline__ u32 read(int c, int half) const {
      return *reinterpret_cast<const u32*>(from + c * 16 + half * 8);
    }

    __device__ __forceinline__ u32 pair(int c, int half) const {
      return KEPT ? kept[KEPT ? c : 0][half] : read(c, half);
    }

    __device__ __forceinline__ float factor(int) const { return 1.0f; }
  };

  // Scores of keys g and g + 8 for heads 2t and 2t + 1; two sums, which do not wait for each other.
  static __device__ __forceinline__ void score(float (&parts)[2][4], u32 keys, const Queries& queries, int lane) {
    const u32 key_at = keys + (lane & 15) * ROW + (lane >> 4) * 16;
#pragma unroll
    for (int c = 0; c < DIM / 16; ++c) {
      u32 a[4];
      load_matrices(a, key_at + c * 32);
      multiply(parts[c & 1], a[0], a[1], a[2], a[3], queries.pair(c, 0), queries.pair(c, 1));
    }
  }

  // Adds values times weights to sums[i]: dims 16 i + g and + 8, heads 2t and 2t + 1.
  static __device__ __forceinline__ void add(float (&sums)[DIM / 16][4], u32 values, u32 b0, u32 b1, int lane) {
    const u32 value_at = values + ((lane & 7) + (lane >> 4) * 8) * ROW + (lane >> 3 & 1) * 16;
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i) {
      u32 a[4];
      load_transposed(a, value_at + i * 32);
      multiply(sums[i], a[0], a[1], a[2], a[3], b0, b1);
    }
  }

  static __device__ __forceinline__ int dim_of(int i, int upper, int g) { return i * 16 + upper * 8 + g; }
};
#endif
