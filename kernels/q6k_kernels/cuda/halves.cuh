// Weights as 16-bit numbers, operand A of prefill (gemm_mma.cuh, gemm_wgmma.cuh, which follow in the same unit).
//
// For bf16 activations a group's scale and minimum are rounded to bf16 first, then the weight: codes, integers below
// 2^8, are whole in bf16, and scale * code - minimum is one instruction for two weights. For fp16, whose exponents are
// too few for scales, fp32 holds scale * code whole (17 + 6 or 11 + 8 bits) and rounds the difference with the minimum.

constexpr bool ROUNDED_SCALES = !Q6K_FP16;
// Scales that have to be computed are computed once: lane t of four prepares those of quarter t of both rows, and passes
// them on.
constexpr bool SHARED_SCALES = ROUNDED_SCALES && Q6K_SCALES != SCALES_BF16;
constexpr int SCALE_PAIRS = LaneQuarter::GROUPS / 2;

struct TileScales {
  RowStep steps[2];                          // [row half]
  u32 scales[2][SHARED_SCALES ? SCALE_PAIRS : 1];  // pairs of bf16; minimums with their sign turned
  u32 mins[2][SHARED_SCALES && Q6K_MINIMUM ? SCALE_PAIRS : 1];

  // From a tile in shared memory. All lanes of a warp call it.
  __device__ __forceinline__ void load(u32 tile, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = (lane >> 2) + 8 * h;
      steps[h].load(tile, row);
      if (!SHARED_SCALES) continue;
      const int at = row * ROW_SCALES + (lane & 3) * LaneQuarter::SCALE_BYTES;
      u32 words[LaneQuarter::SCALE_WORDS];
      LaneQuarter::load_scales(words, tile + SCALES_AT + at);
#pragma unroll
      for (int i = 0; i < SCALE_PAIRS; ++i) {
        scales[h][i] = pack_bf16(scale_value<false>(words, 2 * i, steps[h]), scale_value<false>(words, 2 * i + 1, steps[h]));
      }
#if Q6K_MINIMUM
      LaneQuarter::load_scales(words, tile + MINS_AT + at);
#pragma unroll
      for (int i = 0; i < SCALE_PAIRS; ++i) {
        mins[h][i] = pack_bf16(-scale_value<true>(words, 2 * i, steps[h]), -scale_value<true>(words, 2 * i + 1, steps[h]));
      }
#endif
    }
  }
};

// A quarter of a tile, to be turned into 16-bit numbers.
struct HalfQuarter {
  LaneQuarter part;
  u32 factors[2][SCALE_PAIRS], addends[2][SCALE_PAIRS];  // pairs of bf16, of the quarter's groups

  // All lanes of a warp call it.
  __device__ __forceinline__ void load(u32 tile, const TileScales& of_tile, int lane, int quarter) {
    part.load_codes(tile, lane, quarter);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!SHARED_SCALES) {
        part.load_scales_of_row(h, tile, lane, quarter);
        continue;
      }
#pragma unroll
      for (int i = 0; i < SCALE_PAIRS; ++i) {
        factors[h][i] = __shfl_sync(0xFFFFFFFFu, of_tile.scales[h][i], quarter, 4);
        addends[h][i] = Q6K_MINIMUM ? __shfl_sync(0xFFFFFFFFu, of_tile.mins[h][Q6K_MINIMUM ? i : 0], quarter, 4) : 0;
      }
    }
  }

  // The four weights of a sixteen: elements (2t, 2t+1), (2t+8, 2t+9).
  __device__ __forceinline__ void halves(int h, int sixteen, const TileScales& of_tile, u32 (&pairs)[2]) const {
    const int group = LaneQuarter::group_of(sixteen);
#if Q6K_FP16
    const u32 bytes = part.biased(h, sixteen);
    const float scale = part.scale(h, sixteen, of_tile.steps[h]);
    const float least = Q6K_MINIMUM ? part.minimum(h, sixteen, of_tile.steps[h]) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float weights[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // 0x4B0000uu is 2^23 + u in fp32.
        const float biased = __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7440 | (2 * i + j)));
        const float code = biased - (8388608.0f + LaneQuarter::BIAS);
        weights[j] = Q6K_MINIMUM ? fmaf(code, scale, -least) : code * scale;
      }
      pairs[i] = pack_halves(weights[0], weights[1]);
    }
#else
    const u32 two = SHARED_SCALES ? factors[h][group >> 1] : part.scales[h][Q6K_SCALES == SCALES_BF16 ? group >> 1 : 0];
    const u32 select = group & 1 ? 0x3232 : 0x1010;
    const u32 factor = __byte_perm(two, two, select);
    const u32 addend = Q6K_MINIMUM ? __byte_perm(addends[h][group >> 1], addends[h][group >> 1], select) : 0x80008000u;
#if Q6K_BOOK
    // 0x43uu is 128 + u, 0xC3uu is -(128 + u).
    const u32 low = part.magnitudes<false>(h, sixteen), minus = part.magnitudes<true>(h, sixteen);
#elif Q6K_BITS == 8
    // A signed byte is its low seven bits, in 0x43uu = 128 + u, minus 128, or minus 256 if its sign is set.
    const u32 bytes = part.bytes(h, sixteen), low = bytes & 0x7F7F7F7Fu, minus = bytes & 0x80808080u;
#else
    const u32 low = part.biased(h, sixteen);  // 0x43uu is 128 + u
    constexpr u32 UNBIAS =
        Q6K_OFFSET == 0 ? 0xC300C300u : Q6K_OFFSET == 8 ? 0xC308C308u : Q6K_OFFSET == 16 ? 0xC310C310u : 0xC320C320u;
#endif
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 widened = __byte_perm(low, 0x43434343u, i ? 0x4342 : 0x4140);
#if Q6K_BOOK || Q6K_BITS == 8
      const u32 unbias = __byte_perm(minus, 0xC3C3C3C3u, i ? 0x4342 : 0x4140);
#else
      const u32 unbias = UNBIAS;
#endif
      u32 codes;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(codes) : "r"(widened), "r"(0x3F803F80u), "r"(unbias));
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pairs[i]) : "r"(codes), "r"(factor), "r"(addend));
    }
#endif
  }
};
