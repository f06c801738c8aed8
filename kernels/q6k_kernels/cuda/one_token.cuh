// Products of a tile with one token in 8 bits: decode_tile.cuh, which comes before this file, has the other numbers.
//
// A matrix instruction has eight columns, and one token fills one. So each column is one of eight groups here: it has the
// token's activations of this group, and zeros for all others. Instructions of all eight add to the same sums, of which a
// lane has the groups 2t and 2t + 1 of the rows g and g + 8: it scales four, where each group by itself would leave it two
// of every eight times as many, the same in four lanes.

#if Q6K_TOKENS == 1
constexpr int SETS = LaneTile::SETS;

// By how much the codes of column 2t + c are raised (LaneQuarter::raised).
__device__ __forceinline__ int raised_column(int t, int c) {
  return (Q6K_GROUP == 16 ? t & 1 : c) ? LaneQuarter::RAISED : 0;
}

// What a lane needs of a row of activations.
__device__ __forceinline__ ActivationParts of_lane(const ActivationParts& row, int lane) {
  const int g = lane >> 2, t = lane & 3;
  constexpr int EACH = 64 / Q6K_GROUP, COLUMN = 8 / SETS;  // groups in a chunk of codes; bytes of two columns' scales
  return {row.codes + g / EACH * CHUNK_BYTES + t * 16 + g % EACH * (16 / EACH), row.steps + t * COLUMN,
          row.sums + t * COLUMN, row.parts + t * 16};
}

// Products of 32 weights of the rows g and g + 8, added to `sums`.
__device__ __forceinline__ void add_products(u32 (&sums)[4], const u32 (&a)[4], u32 first, u32 second) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32." CODE_TYPE
      ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(first), "r"(second));
}

// Adds the parts of four lanes.
__device__ __forceinline__ void add_lanes(float (&totals)[2][1]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    totals[h][0] += __shfl_xor_sync(0xFFFFFFFFu, totals[h][0], 1);
    totals[h][0] += __shfl_xor_sync(0xFFFFFFFFu, totals[h][0], 2);
  }
}

// totals[h][0]: this lane's part of row g + 8h. The addresses are this lane's, at the super-block.
__device__ __forceinline__ void multiply_tile(float (&totals)[2][1], const LaneTile& tile, u32 codes, u32 steps, u32 sums,
                                              u32 parts) {
  constexpr bool TWO = Q6K_GROUP == 16;  // groups in 32 weights
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float of_tile[2] = {};
  u32 flags[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    flags[i] = g == i;
    asm volatile("" : "+r"(flags[i]));
  }
#pragma unroll
  for (int set = 0; set < SETS; ++set) {
    u32 own[2], d[2], code_sums[2] = {};  // of group g; of 2t and 2t + 1
    if (TWO) {
      own[0] = own[1] = load_shared_4(codes + set * 2 * CHUNK_BYTES);
      d[0] = load_shared_4(steps + set * 16);
      if (Q6K_OFFSET) code_sums[0] = code_sums[1] = load_shared_4(sums + set * 16);
    } else {
      load_shared_8(own, codes);
      load_shared_8(d, steps);
      if (Q6K_OFFSET) load_shared_8(code_sums, sums);
    }
    u32 magics[2], products[4], negative[4];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      magics[c] = magic_bits(raised_column(t, c));
      products[c] = minus_offset(code_sums[c], TWO ? c ? 0x0100 : 0x0001 : 0x0101, raised_column(t, c));
      products[2 + c] = negative[c] = negative[2 + c] = products[c];
    }
#pragma unroll
    for (int i = 0; i < 8 / SETS; ++i) {
      const int pair = set * 4 + i, sixteen = pair % 2 * 2;
      const LaneQuarter part = tile.quarter(pair / 2);
      const u32 first = own[0] * flags[TWO ? 2 * i : i], second = own[1] * flags[TWO ? 2 * i + 1 : i];
      u32 a[4];
#if Q6K_BOOK  // a product with each half of the book; their difference is the sum
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = part.magnitudes<true>(j & 1, sixteen + (j >> 1));
      add_products(negative, a, first, second);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = part.magnitudes<false>(j & 1, sixteen + (j >> 1));
#else
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = part.bytes(j & 1, sixteen + (j >> 1));
#endif
      add_products(products, a, first, second);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const u32 none = Q6K_BOOK ? negative[h * 2 + c] : magics[c];
        const float value = __uint_as_float(products[h * 2 + c]) - __uint_as_float(none);
#if Q6K_SCALES == SCALES_UINT8_STEPS
        const float scale =
            __uint_as_float(__byte_perm(tile.scales[h][set], 0x4B000000u, 0x7550 | c)) - 8388608.0f;
#else
        const float scale = scale_value<false>(&tile.scales[h][set], c, tile.steps[h]);
#endif
        if (TWO) {
          sum = c == 0 ? value * scale : fmaf(value, scale, sum);
        } else {
          float& to = STEP_LAST ? of_tile[h] : totals[h][0];
          to = fmaf(value * scale, __uint_as_float(d[c]), to);
        }
      }
      if (TWO) totals[h][0] = fmaf(sum, __uint_as_float(d[0]), totals[h][0]);
    }
  }
#if Q6K_MINIMUM
  float least[4] = {};
  minimums_of_tile(least, tile, parts);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float once = t == 0 ? least[2 * h] : 0.0f;  // all four lanes have it
#if Q6K_SCALES == SCALES_UINT8_STEPS
    totals[h][0] = fmaf(of_tile[h], tile.steps[h].step, totals[h][0]);
    totals[h][0] = fmaf(-once, tile.steps[h].min_step, totals[h][0]);
#else
    totals[h][0] -= once;
#endif
  }
#endif
}
#endif
