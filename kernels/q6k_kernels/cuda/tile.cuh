// A lane's part of a tile, and its numbers. Comes before every file that reads tiles.

// A code book's values are of one sign for codes below 8 and of the other from 8 up. So each half is a table of
// magnitudes below 128, and a look-up in it gives zero for codes of the other half: PRMT returns the sign of an element,
// in place of the element, where bit 3 of its index is set.
#if Q6K_BOOK == 1
constexpr u32 LOW_HALF[2] = {0x4153687Fu, 0x0A162331u}, HIGH_HALF[2] = {0x26190D01u, 0x71594535u};  // IQ4 of formats/types.py
constexpr bool HIGH_IS_NEGATIVE = false;
#elif Q6K_BOOK == 2
constexpr u32 LOW_HALF[2] = {0x03020100u, 0x0C080604u}, HIGH_HALF[2] = {0x03020100u, 0x0C080604u};  // E2M1
constexpr bool HIGH_IS_NEGATIVE = true;
#endif

#if Q6K_BOOK
// Unlike __byte_perm, which ignores bit 3 of an index.
__device__ __forceinline__ u32 look_up(const u32 (&half)[2], u32 nibbles) {
  u32 values;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(values) : "r"(half[0]), "r"(half[1]), "r"(nibbles));
  return values;
}
#endif

// Row steps, for scales that have them. Products with a scale or minimum below 2^8 are exact: a byte b in the mantissa
// of 2^15 reads 32768 + b, and what is subtracted again has no more than 9 + 11 significant bits. A step that is
// infinite gives NaN.
#if Q6K_SCALES == SCALES_INT8_STEPS || Q6K_SCALES == SCALES_UINT8_STEPS
constexpr float BYTE_BIAS = Q6K_SCALES == SCALES_INT8_STEPS ? 32896.0f : 32768.0f;
struct RowStep {
  float step, offset;
#if Q6K_MINIMUM
  float min_step, min_offset;
#endif
  __device__ __forceinline__ void set(u32 step_bits, u32 min_step_bits) {
    step = fp16_to_float(step_bits);
    offset = -BYTE_BIAS * step;
#if Q6K_MINIMUM
    min_step = fp16_to_float(min_step_bits);
    min_offset = -BYTE_BIAS * min_step;
#endif
  }
  __device__ __forceinline__ void load(u32 tile, int row) {
    set(load_shared_2(tile + STEPS_AT + row * 2), Q6K_MINIMUM ? load_shared_2(tile + MIN_STEPS_AT + row * 2) : 0);
  }
};
#else
struct RowStep {
  __device__ __forceinline__ void load(u32, int) {}
};
#endif

// Element `index` of a lane's words of scales or minimums, as a number; `step` and `offset` of its row.
template <bool MINIMUM>
__device__ __forceinline__ float scale_value(const u32* words, int index, const RowStep& row) {
#if Q6K_SCALES == SCALES_BF16
  return __uint_as_float(index & 1 ? words[index >> 1] & 0xFFFF0000u : words[index >> 1] << 16);
#elif Q6K_SCALES == SCALES_FP16
  return fp16_to_float(index & 1 ? words[index >> 1] >> 16 : words[index >> 1] & 0xFFFFu);
#elif Q6K_SCALES == SCALES_E8M0
  const u32 e = words[index >> 2] >> 8 * (index & 3) & 0xFFu;
  return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
#else
  const float biased = __uint_as_float(__byte_perm(words[index >> 2], 0x47000000u, 0x7404 | (index & 3) << 4));
#if Q6K_MINIMUM
  if (MINIMUM) return fmaf(biased, row.min_step, row.min_offset);
#endif
  return fmaf(biased, row.step, row.offset);
#endif
}

// Four sixteens (64 weights) of the rows g and g + 8, as a lane holds them.
struct LaneQuarter {
  static constexpr int TOPS = Q6K_BITS == 8 ? 4 : 2;                 // words of codes
  static constexpr int GROUPS = 64 / Q6K_GROUP;                      // groups of the weight type
  static constexpr int SCALE_BYTES = GROUPS * (WIDE_SCALES ? 2 : 1);
  static constexpr int SCALE_WORDS = (SCALE_BYTES + 3) / 4;
  u32 top[2][TOPS];             // [row half]: four bits of codes, those of sixteen s in word s & 1; or a word for each
  u32 low[2];                   // [row half]: the other bits, from bit 0 of each byte
  u32 scales[2][SCALE_WORDS];   // [row half]
  u32 mins[2][Q6K_MINIMUM ? SCALE_WORDS : 1];

  // Codes become bytes where they lie: the first two sixteens as they are, the other two times 2^RAISED.
  static constexpr int RAISED = Q6K_BOOK || Q6K_BITS == 8 ? 0 : 8 - Q6K_BITS;
  __device__ __forceinline__ static constexpr int raised(int sixteen) { return sixteen & 2 ? RAISED : 0; }

#if Q6K_BOOK
  // The four values of a sixteen as bytes, those of one sign: magnitudes, zero where the sign is the other.
  template <bool NEGATIVE>
  __device__ __forceinline__ u32 magnitudes(int h, int sixteen) const {
    const u32 word = NEGATIVE == HIGH_IS_NEGATIVE ? top[h][sixteen >> 1] ^ 0x88888888u : top[h][sixteen >> 1];
    const u32 nibbles = sixteen & 1 ? word >> 16 : word;
    return NEGATIVE == HIGH_IS_NEGATIVE ? look_up(HIGH_HALF, nibbles) : look_up(LOW_HALF, nibbles);
  }
#endif

  // The four stored codes of a sixteen as bytes, times 2^raised(sixteen); of 8 bits, signed.
  __device__ __forceinline__ u32 bytes(int h, int sixteen) const {
#if Q6K_BITS == 8
    return top[h][sixteen];
#else
    constexpr u32 NIBBLES = 0x0F0F0F0Fu, OTHERS = ((1 << 2 * LOW_BITS) - 1) * (0x01010101u << RAISED);
    const int field = 2 * LOW_BITS * (sixteen & 1);
    u32 rest = 0;  // bits below 4 for sixteens 2 and 3, from 4 up for 0 and 1
    if (LOW_BITS) rest = (field < RAISED ? low[h] << (RAISED - field) : low[h] >> (field - RAISED)) & OTHERS;
    const u32 nibbles = top[h][sixteen & 1];
    return sixteen & 2 ? (nibbles & ~NIBBLES) | (rest & NIBBLES) : (nibbles & NIBBLES) | (rest & ~NIBBLES);
#endif
  }

  // The codes of a sixteen as bytes from 0 up: those of the weight type plus BIAS.
#if Q6K_BOOK || Q6K_BITS == 8
  static constexpr int BIAS = 128;
#else
  static constexpr int BIAS = Q6K_OFFSET;
#endif
  __device__ __forceinline__ u32 biased(int h, int sixteen) const {
#if Q6K_BOOK
    return 0x80808080u + magnitudes<false>(h, sixteen) - magnitudes<true>(h, sixteen);
#elif Q6K_BITS == 8
    return bytes(h, sixteen) ^ 0x80808080u;
#else
    return bytes(h, sixteen) >> raised(sixteen);
#endif
  }

  __device__ __forceinline__ static int group_of(int sixteen) { return sixteen * 16 / Q6K_GROUP; }

  // Scale and minimum of a sixteen's group, without rounding.
  __device__ __forceinline__ float scale(int h, int sixteen, const RowStep& row) const {
    return scale_value<false>(scales[h], group_of(sixteen), row);
  }
  __device__ __forceinline__ float minimum(int h, int sixteen, const RowStep& row) const {
    return scale_value<true>(mins[h], group_of(sixteen), row);
  }

  // From shared memory; quarter 0..3 of a tile.
  __device__ __forceinline__ void load_codes(u32 tile, int lane, int quarter) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#if Q6K_BITS == 8
      const uint4 codes = load_shared_16(tile + (4 * h + quarter) * 512 + lane * 16);
      top[h][0] = codes.x, top[h][1] = codes.y, top[h][2] = codes.z, top[h][3] = codes.w;
#else
      load_shared_8(top[h], tile + (2 * h + (quarter >> 1)) * 512 + lane * 16 + (quarter & 1) * 8);
#endif
      low[h] = 0;
      if (LOW_BITS == 2) low[h] = load_shared_4(tile + LOW_AT + h * 512 + lane * 16 + quarter * 4);
      if (LOW_BITS == 1) {
        low[h] = load_shared_4(tile + LOW_AT + h * 256 + lane * 8 + (quarter >> 1) * 4) >> 4 * (quarter & 1);
      }
    }
  }

  __device__ __forceinline__ void load_scales_of_row(int h, u32 tile, int lane, int quarter) {
    const int at = ((lane >> 2) + 8 * h) * ROW_SCALES + quarter * SCALE_BYTES;
    load_scales(scales[h], tile + SCALES_AT + at);
#if Q6K_MINIMUM
    load_scales(mins[h], tile + MINS_AT + at);
#endif
  }

  __device__ __forceinline__ static void load_scales(u32 (&words)[SCALE_WORDS], u32 address) {
#if Q6K_SCALES == SCALES_BF16
    load_shared_8(words, address);
#else
    words[0] = SCALE_BYTES == 2 ? load_shared_2(address) : load_shared_4(address);
#endif
  }
};
