// Products of a tile with activations in 8 bits, for decode.cuh, which follows in the same unit; of one token those of
// one_token.cuh, which builds on this file.

// All sixteen sixteens. Of the minimums a lane has those of the groups 2t and 2t + 1, as the A fragment of a product. So
// it has the scales if there is one token: of each set of eight groups, in a word.
struct LaneTile {
  static constexpr int TOPS = Q6K_BITS == 8 ? 4 : 2, SETS = Q6K_GROUP == 16 ? 2 : 1;
  static constexpr int PAIR_BYTES = WIDE_SCALES ? 4 : 2;  // of two groups' scales
  static constexpr int ROW_WORDS = TOKENS == 1 ? SETS : ROW_SCALES / 4;
  uint4 top[2][TOPS];               // [row half][part of the sixteens]
  u32 low[2][LOW_BITS ? 2 * LOW_BITS : 1];
  u32 scales[2][ROW_WORDS];
  u32 mins[2];                      // two bytes or two fp16
  RowStep steps[2];

  __device__ __forceinline__ void load(u32 tile, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int c = 0; c < TOPS; ++c) top[h][c] = load_shared_16(tile + (TOPS * h + c) * 512 + lane * 16);
      if (LOW_BITS) load_words(low[h], tile + LOW_AT + h * 256 * LOW_BITS + lane * 8 * LOW_BITS);
      const int row = (lane >> 2) + 8 * h;
      if constexpr (TOKENS == 1) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
          scales[h][set] = load_pair(tile + SCALES_AT + row * ROW_SCALES + (set * 4 + (lane & 3)) * PAIR_BYTES);
        }
      } else {
        load_words(scales[h], tile + SCALES_AT + row * ROW_SCALES);
      }
      if (Q6K_MINIMUM) mins[h] = load_pair(tile + MINS_AT + row * ROW_SCALES + (lane & 3) * PAIR_BYTES);
      steps[h].load(tile, row);
    }
  }

  __device__ __forceinline__ static u32 load_pair(u32 address) {
    return WIDE_SCALES ? load_shared_4(address) : load_shared_2(address);
  }

  template <int WORDS>
  __device__ __forceinline__ static void load_words(u32 (&words)[WORDS], u32 address) {
    if constexpr (WORDS == 2) {
      load_shared_8(words, address);
    } else {
#pragma unroll
      for (int i = 0; i + 3 < WORDS; i += 4) {
        const uint4 four = load_shared_16(address + i * 4);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
  }

  __device__ __forceinline__ LaneQuarter quarter(int q) const {
    constexpr int BYTES = LaneQuarter::SCALE_BYTES;
    LaneQuarter part;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#if Q6K_BITS == 8
#pragma unroll
      for (int i = 0; i < 4; ++i) part.top[h][i] = word_of(top[h][q], i);
#else
      part.top[h][0] = word_of(top[h][q >> 1], (q & 1) * 2);
      part.top[h][1] = word_of(top[h][q >> 1], (q & 1) * 2 + 1);
#endif
      part.low[h] = LOW_BITS == 2 ? low[h][LOW_BITS == 2 ? q : 0]
                                  : LOW_BITS == 1 ? low[h][LOW_BITS == 1 ? q >> 1 : 0] >> 4 * (q & 1) : 0;
#pragma unroll
      for (int i = 0; i < LaneQuarter::SCALE_WORDS; ++i) {
        if (TOKENS == 1) continue;
        const int word = q * BYTES / 4 + i, down = q * BYTES % 4 * 8;
        part.scales[h][i] = scales[h][word] >> down;
      }
    }
    return part;
  }
};

// An integer 2^raised v added to the bits of 1.5 * 2^(23 - raised) makes the float 1.5 * 2^(23 - raised) + v.
__device__ __forceinline__ constexpr u32 magic_bits(int raised) { return 0x4B400000u - (raised << 23); }
__device__ __forceinline__ constexpr float magic(int raised) { return 12582912.0f / (1 << raised); }
// Where a group's scale is a small integer times its super-block's step, the step comes last, and codes of 4 bits are
// multiplied with the scale as integers: 15 * 127 * 32 * 63 < 2^22.
constexpr bool STEP_LAST = Q6K_SCALES == SCALES_UINT8_STEPS;
constexpr bool INTEGER_SCALES = STEP_LAST && Q6K_BITS == 4 && TOKENS > 1;

#if Q6K_BITS == 8
#define CODE_TYPE "s8"
#else
#define CODE_TYPE "u8"
#endif

// c - offset times the sum of one or both sixteens that `sums` has of a token; `both` as two bytes of 1 or 0.
__device__ __forceinline__ u32 minus_offset(u32 sums, int both, int raised) {
  int result = INTEGER_SCALES ? 0 : (int)magic_bits(raised);
#if Q6K_OFFSET
  const int factors = both * (-(Q6K_OFFSET << raised) & 0xFF);
  asm("dp2a.lo.s32.s32 %0, %1, %2, %0;" : "+r"(result) : "r"(sums), "r"(factors));
#endif
  return (u32)result;
}

// Products of 16 or 32 weights of the rows g and g + 8, each with two tokens, added to `first` and `second`. A lane's
// four weights of two sixteens take the places of its eight of one group of 32.
__device__ __forceinline__ void multiply_group(u32 (&sums)[4], const u32 (&a)[4], u32 codes, u32 more_codes, u32 first,
                                               u32 second) {
#if Q6K_GROUP == 16
  asm("mma.sync.aligned.m16n8k16.row.col.s32." CODE_TYPE ".s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %7, %8};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(codes), "r"(first), "r"(second));
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32." CODE_TYPE
      ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %10, %11};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(codes), "r"(more_codes), "r"(first), "r"(second));
#endif
}

// c += a b of minimums: eight groups, sixteen with two parts of the sums.
__device__ __forceinline__ void multiply_minimums(float (&c)[4], const u32 (&a)[2], const uint4& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %4, %5}, {%6, %7}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b.x), "r"(b.y));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b.z));
}

#if Q6K_MINIMUM
// The sums of minimums of a super-block, times those of the activations. Bytes are bf16 numbers; an fp16 number is the
// sum of two, or NaN if it is infinite.
__device__ __forceinline__ void minimums_of_tile(float (&c)[4], const LaneTile& tile, u32 parts) {
  const uint4 b = load_shared_16(parts);
  u32 a[2];
#if Q6K_SCALES == SCALES_FP16
  u32 rest[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float first = fp16_to_float(tile.mins[h] & 0xFFFFu), second = fp16_to_float(tile.mins[h] >> 16);
    a[h] = pack_bf16(first, second);
    rest[h] = pack_bf16(first - bf16_to_float(a[h] & 0xFFFFu), second - bf16_to_float(a[h] >> 16));
  }
  multiply_minimums(c, rest, b);
#else
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // 0x43uu is 128 + u. Times one, as an addition of bf16 takes sm_90.
    const u32 biased = __byte_perm(tile.mins[h], 0x43434343u, 0x4140);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(a[h]) : "r"(biased), "r"(0x3F803F80u), "r"(0xC300C300u));
  }
#endif
  multiply_minimums(c, a, b);
}
#endif

#if Q6K_TOKENS > 1
// What a lane needs of rows of activations.
__device__ __forceinline__ ActivationParts of_lane(const ActivationParts& rows, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const u32 of_token = (COLUMNS == 1 ? min(g >> 1, TOKENS - 1) : g) * 64 + t * 16;
  const u32 of_column = (COLUMNS == 1 ? min(t, TOKENS - 1) : t) * 16;
  return {rows.codes + of_token, rows.steps + of_column, rows.sums + of_column, rows.parts + of_token};
}

// Each lane's sums are whole here.
__device__ __forceinline__ void add_lanes(float (&)[2][COLUMNS]) {}

// totals[h][c]: row g + 8h, token t (COLUMNS 1) or 2t + c. The addresses are this lane's, at the super-block.
__device__ __forceinline__ void multiply_tile(float (&totals)[2][COLUMNS], const LaneTile& tile, u32 codes, u32 steps,
                                              u32 sums, u32 parts) {
  float of_tile[2][COLUMNS] = {};
  uint4 d, code_sums = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int quad = 0; quad < QUARTERS; ++quad) {
    const LaneQuarter part = tile.quarter(quad);
    const uint4 b = load_shared_16(codes + quad * CHUNK_BYTES);
    if (COLUMNS == 2 || quad % 2 == 0) {
      const int at = COLUMNS == 2 ? quad * 64 : quad / 2 * TOKENS * 16;
      d = load_shared_16(steps + at);
      if (Q6K_OFFSET) code_sums = load_shared_16(sums + at);
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      constexpr bool TWO = Q6K_GROUP == 16;  // groups in a pair of sixteens
      const int sixteen = pair * 2, raised = LaneQuarter::raised(sixteen);
      u32 products[TWO ? 2 : 1][4], negative[4];
#pragma unroll
      for (int each = 0; each < (TWO ? 2 : 1); ++each) {
        u32 start[COLUMNS], a[4];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          const u32 of_token = word_of(code_sums, COLUMNS == 1 ? quad % 2 * 2 + pair : pair * 2 + c);
          start[c] = minus_offset(of_token, TWO ? each ? 0x0100 : 0x0001 : 0x0101, raised);
        }
        const u32 first = word_of(b, sixteen + each), second = word_of(b, sixteen + 1);
#if Q6K_BOOK  // a product with each half of the book; their difference is the sum
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = part.magnitudes<true>(i & 1, sixteen + (i >> 1));
        multiply_group(negative, a, first, second, start[0], start[COLUMNS - 1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = part.magnitudes<false>(i & 1, sixteen + (i >> 1));
#else
#pragma unroll
        for (int i = 0; i < (TWO ? 2 : 4); ++i) {
          const int of = sixteen + (TWO ? each : i >> 1);
          a[i] = INTEGER_SCALES ? part.biased(i & 1, of) : part.bytes(i & 1, of);
        }
#endif
        multiply_group(products[each], a, first, second, start[0], start[COLUMNS - 1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
          float sum = 0.0f;
#pragma unroll
          for (int each = 0; each < (TWO ? 2 : 1); ++each) {
            const u32 product = products[each][h * 2 + c];
#if Q6K_SCALES == SCALES_UINT8_STEPS
            if (INTEGER_SCALES) {
              const u32 scale = __byte_perm(part.scales[h][0], 0, 0x4440 | pair);
              sum = __uint_as_float(product * scale + magic_bits(0)) - magic(0);
              continue;
            }
            const float scale =
                __uint_as_float(__byte_perm(part.scales[h][0], 0x4B000000u, 0x7550 | pair)) - 8388608.0f;
#else
            const float scale = part.scale(h, sixteen + each, tile.steps[h]);
#endif
            const float value = __uint_as_float(product) - (Q6K_BOOK ? __uint_as_float(negative[h * 2 + c]) : magic(raised));
            sum = each == 0 ? value * scale : fmaf(value, scale, sum);
          }
          const float step = __uint_as_float(word_of(d, COLUMNS == 1 ? quad % 2 * 2 + pair : pair * 2 + c));
          float& to = STEP_LAST ? of_tile[h][c] : totals[h][c];
          to = fmaf(sum, step, to);
        }
      }
    }
  }
#if Q6K_MINIMUM
  float least[4] = {};
  minimums_of_tile(least, tile, parts);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#if Q6K_SCALES == SCALES_UINT8_STEPS
      totals[h][c] = fmaf(of_tile[h][c], tile.steps[h].step, totals[h][c]);
      totals[h][c] = fmaf(-least[h * 2 + c], tile.steps[h].min_step, totals[h][c]);
#else
      totals[h][c] -= least[h * 2 + c];
#endif
    }
  }
#endif
}
#endif
