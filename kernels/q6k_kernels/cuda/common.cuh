// What every kernel shares: the tile layout, its unpacking, and the few instructions CUDA C++ has no name for.
//
// Device code here includes nothing, so that run-time compilation needs no header and caches by text alone.
// Kernels are specialised by macros, all integers:
//   Q6K_BITS, Q6K_OFFSET, Q6K_BOOK, Q6K_GROUP, Q6K_MINIMUM, Q6K_SCALES    the weight type, a row of formats/types.py: bits
//               of a stored code, what is subtracted from it, its code book, weights of a group, whether a group has a
//               minimum, and the kind of its scale
//   Q6K_FP16    0: activations and outputs are bf16; 1: fp16
//
// A tile is 16 rows x 256 weights (formats/tiles.py has the rules). lane = 4g + t holds, of row g + 8h and each of
// the 16 groups of 16 weights, the four weights 2t, 2t+1, 2t+8, 2t+9: the A fragment of a 16-row matrix instruction.
// In what follows "sixteen" is such a group; a group of the weight type is one or two of them.

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define SCALES_BF16 0         // a bf16 for each group
#define SCALES_INT8_STEPS 1   // an int8 for each group, times an fp16 step for each super-block
#define SCALES_UINT8_STEPS 2  // a uint8 likewise, below 64
#define SCALES_FP16 3         // an fp16 for each group
#define SCALES_E8M0 4         // an exponent e for each group: 2^(e - 128)
#ifndef Q6K_BITS
#define Q6K_BITS 6
#define Q6K_OFFSET 32
#define Q6K_BOOK 0
#define Q6K_GROUP 16
#define Q6K_MINIMUM 0
#define Q6K_SCALES SCALES_BF16
#endif
#ifndef Q6K_FP16
#define Q6K_FP16 0
#endif

constexpr int TILE_ROWS = 16;
constexpr int SUPER_BLOCK = 256;
constexpr int QUARTERS = 4;              // parts of a super-block: 64 weights, four sixteens
constexpr bool STEPPED = Q6K_SCALES == SCALES_INT8_STEPS || Q6K_SCALES == SCALES_UINT8_STEPS;
constexpr bool WIDE_SCALES = Q6K_SCALES == SCALES_BF16 || Q6K_SCALES == SCALES_FP16;  // of two bytes
constexpr int TILE_WEIGHTS = TILE_ROWS * SUPER_BLOCK;
constexpr int LOW_BITS = Q6K_BITS == 8 ? 0 : Q6K_BITS - 4;       // of a code, apart from its other four
constexpr int LOW_AT = Q6K_BITS == 8 ? TILE_WEIGHTS : TILE_WEIGHTS / 2;  // byte of a tile where they begin
constexpr int SCALES_AT = TILE_WEIGHTS * Q6K_BITS / 8;           // the scales
constexpr int ROW_SCALES = SUPER_BLOCK / Q6K_GROUP * (WIDE_SCALES ? 2 : 1);  // bytes of a row's scales
constexpr int MINS_AT = SCALES_AT + TILE_ROWS * ROW_SCALES;
constexpr int STEPS_AT = MINS_AT + (Q6K_MINIMUM ? TILE_ROWS * ROW_SCALES : 0);
constexpr int MIN_STEPS_AT = STEPS_AT + TILE_ROWS * 2;
constexpr int TILE_BYTES = STEPS_AT + (STEPPED ? TILE_ROWS * 2 * (1 + Q6K_MINIMUM) : 0);
constexpr int TILE_CHUNKS = TILE_BYTES / 16;
static_assert(TILE_BYTES % 16 == 0, "tiles are copied in pieces of 16 bytes");

// Super-blocks of rows of k weights; the last may be part of one.
__device__ __forceinline__ int super_blocks_of(int k) { return (k + SUPER_BLOCK - 1) / SUPER_BLOCK; }

// ---- conversions -------------------------------------------------------------------------------------------

__device__ __forceinline__ float bf16_to_float(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float fp16_to_float(u32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
  return value;
}

__device__ __forceinline__ float half_to_float(u32 bits) {  // of the activations' dtype
  return Q6K_FP16 ? fp16_to_float(bits) : bf16_to_float(bits);
}

__device__ __forceinline__ u32 pack_halves(float low, float high) {  // to the activations' dtype, to nearest even
  u32 pair;
#if Q6K_FP16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

__device__ __forceinline__ u16 to_half(float value) { return (u16)pack_halves(value, 0.0f); }

__device__ __forceinline__ u32 pack_bf16(float low, float high) {  // to nearest even
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ u32 to_bf16(float value) { return pack_bf16(value, 0.0f) & 0xFFFFu; }

enum BiasKind { NO_BIAS = 0, BIAS_BF16 = 1, BIAS_FP16 = 2, BIAS_FP32 = 3 };

__device__ __forceinline__ float bias_at(const void* bias, int kind, int row) {
  if (kind == NO_BIAS) return 0.0f;
  if (kind == BIAS_FP32) return static_cast<const float*>(bias)[row];
  const u32 bits = static_cast<const u16*>(bias)[row];
  return kind == BIAS_FP16 ? fp16_to_float(bits) : bf16_to_float(bits);
}

// ---- asynchronous copies -----------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return (u32)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void copy_async_16(u32 to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void load_shared_8(u32 (&v)[2], u32 address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ u32 load_shared_4(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// A policy for bytes that are read once: they leave the L2 cache first, which keeps what launches pass to each other.
__device__ __forceinline__ u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void copy_async_16(u32 to_shared, const void* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "l"(policy)
               : "memory");
}

// Whole tiles are copied by one warp, 16 bytes a lane; `policy`, if any, as `evict_first`.
template <typename... Policy>
__device__ __forceinline__ void copy_tile_async(u32 to_shared, const u8* tile, int lane, Policy... policy) {
#pragma unroll
  for (int at = 0; at < TILE_CHUNKS; at += 32) {
    if (at + 32 <= TILE_CHUNKS || at + lane < TILE_CHUNKS) {
      copy_async_16(to_shared + (at + lane) * 16, tile + (at + lane) * 16, policy...);
    }
  }
}

// ---- order between dependent launches (sm_90 and later; elsewhere launches never overlap) -------------------

__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- a lane's part of a tile -------------------------------------------------------------------------------

__device__ __forceinline__ u32 word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ u32 load_shared_2(u32 address) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

#if Q6K_BOOK
#if Q6K_BOOK == 1
constexpr u32 BOOK[4] = {0xBFAD9881u, 0xF6EADDCFu, 0x26190D01u, 0x71594535u};  // IQ4 of formats/types.py
#else
constexpr u32 BOOK[4] = {0x03020100u, 0x0C080604u, 0xFDFEFF00u, 0xF4F8FAFCu};  // E2M1
#endif

// The values, signed bytes, of the codes in the lowest four nibbles.
__device__ __forceinline__ u32 look_up(u32 nibbles) {
  const u32 at = nibbles & 0x7777u;
  const u32 first = __byte_perm(BOOK[0], BOOK[1], at), second = __byte_perm(BOOK[2], BOOK[3], at);
  return __byte_perm(first, second, 0x3210u | (nibbles & 0x8888u) >> 1);
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

  // The four stored codes of a sixteen as bytes, times 2^raised(sixteen); or a book's values, signed.
  __device__ __forceinline__ u32 bytes(int h, int sixteen) const {
#if Q6K_BOOK
    return look_up(sixteen & 1 ? top[h][sixteen >> 1] >> 16 : top[h][sixteen >> 1]);
#elif Q6K_BITS == 8
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
#if Q6K_BOOK || Q6K_BITS == 8
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

  // The four weights of a sixteen, 16 bits wide: elements (2t, 2t+1), (2t+8, 2t+9).
  //
  // In bf16, codes below 128 take the fast way: 0x43uu is 128 + u, the group's scale and minimum are rounded to bf16,
  // and the weight is rounded once more. Otherwise fp32 holds scale * code whole (17 + 6 or 11 + 8 bits), subtracting a
  // minimum rounds it, and the weight is rounded after.
  __device__ __forceinline__ void halves(int h, int sixteen, const RowStep& row, u32 (&pairs)[2]) const {
    const u32 bytes = biased(h, sixteen);
#if !Q6K_FP16 && Q6K_BITS < 8 && !Q6K_BOOK
    constexpr u32 UNBIAS = BIAS == 0 ? 0xC300C300u : BIAS == 8 ? 0xC308C308u : BIAS == 16 ? 0xC310C310u : 0xC320C320u;
    const u32 widened[2] = {__byte_perm(bytes, 0x43434343u, 0x4140), __byte_perm(bytes, 0x43434343u, 0x4342)};
#if Q6K_SCALES == SCALES_BF16
    const u32 both = scales[h][sixteen >> 1];
    const u32 factor = sixteen & 1 ? __byte_perm(both, both, 0x3232) : __byte_perm(both, both, 0x1010);
#else
    const float s = scale(h, sixteen, row);
    const u32 factor = pack_halves(s, s);
#endif
    u32 addend = 0x80008000u;
#if Q6K_MINIMUM
    const float least = -minimum(h, sixteen, row);
    addend = pack_halves(least, least);
#endif
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32 codes;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(codes) : "r"(widened[i]), "r"(0x3F803F80u), "r"(UNBIAS));
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pairs[i]) : "r"(codes), "r"(factor), "r"(addend));
    }
#else
    const float s = scale(h, sixteen, row);
#if Q6K_MINIMUM
    const float least = minimum(h, sixteen, row);
#endif
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float weights[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // 0x4B0000uu is 2^23 + u in fp32.
        const float code = __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7440 | (2 * i + j))) - (8388608.0f + BIAS);
#if Q6K_MINIMUM
        weights[j] = fmaf(code, s, -least);
#else
        weights[j] = code * s;
#endif
      }
      pairs[i] = pack_halves(weights[0], weights[1]);
    }
#endif
  }

  // From shared memory; quarter 0..3 of a tile.
  __device__ __forceinline__ void load(u32 tile, int lane, int quarter) {
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
      const int at = ((lane >> 2) + 8 * h) * ROW_SCALES + quarter * SCALE_BYTES;
      load_scales(scales[h], tile + SCALES_AT + at);
#if Q6K_MINIMUM
      load_scales(mins[h], tile + MINS_AT + at);
#endif
    }
  }

  __device__ __forceinline__ static void load_scales(u32 (&words)[SCALE_WORDS], u32 address) {
#if Q6K_SCALES == SCALES_BF16
    load_shared_8(words, address);
#else
    words[0] = SCALE_BYTES == 2 ? load_shared_2(address) : load_shared_4(address);
#endif
  }
};

// All sixteen sixteens. Of the minimums a lane has those of the groups 2t and 2t + 1, as the A fragment of a product.
struct LaneTile {
  static constexpr int TOPS = Q6K_BITS == 8 ? 4 : 2, ROW_WORDS = ROW_SCALES / 4;
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
      load_words(scales[h], tile + SCALES_AT + row * ROW_SCALES);
      if (Q6K_MINIMUM) {
        const u32 from = tile + MINS_AT + row * ROW_SCALES + (lane & 3) * (ROW_SCALES / 4);
        mins[h] = WIDE_SCALES ? load_shared_4(from) : load_shared_2(from);
      }
      steps[h].load(tile, row);
    }
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
        const int word = q * BYTES / 4 + i, down = q * BYTES % 4 * 8;
        part.scales[h][i] = scales[h][word] >> down;
      }
    }
    return part;
  }
};
