// What every kernel shares: the tile layout, its unpacking, and the few instructions CUDA C++ has no name for.
//
// Device code here includes nothing, so that run-time compilation needs no header and caches by text alone.
// Kernels are specialised by macros, all integers:
//   Q6K_BITS, Q6K_GROUP, Q6K_MINIMUM, Q6K_SCALES    the weight type, a row of formats/types.py: bits of a code, weights
//               of a group, whether a group has a minimum, and the kind of its scale
//   Q6K_FP16    0: activations and outputs are bf16; 1: fp16
//
// A tile is 16 rows x 256 weights (formats/tiles.py has the rules). lane = 4g + t holds, of row g + 8h and each of
// the 16 groups, the four weights 2t, 2t+1, 2t+8, 2t+9: the A fragment of a 16-row matrix instruction.

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define SCALES_BF16 0      // a bf16 for each group
#define SCALES_STEPPED 1   // an int8 for each group, times an fp16 step for each super-block
#ifndef Q6K_BITS
#define Q6K_BITS 6
#define Q6K_GROUP 16
#define Q6K_MINIMUM 0
#define Q6K_SCALES SCALES_BF16
#endif
#ifndef Q6K_FP16
#define Q6K_FP16 0
#endif

constexpr int TILE_ROWS = 16;
constexpr int SUPER_BLOCK = 256;
constexpr int QUARTERS = 4;              // parts of a super-block: 64 weights, four groups
constexpr bool STEPPED = Q6K_SCALES == SCALES_STEPPED;
constexpr int TILE_WEIGHTS = TILE_ROWS * SUPER_BLOCK;
constexpr int LOW_AT = TILE_WEIGHTS / 2;                        // byte of a tile where the low pairs begin
constexpr int SCALES_AT = TILE_WEIGHTS * Q6K_BITS / 8;          // and the scales
constexpr int STEPS_AT = SCALES_AT + TILE_WEIGHTS / Q6K_GROUP * (STEPPED ? 1 : 2);  // and the steps, if any
constexpr int TILE_BYTES = STEPS_AT + (STEPPED ? TILE_ROWS * 2 : 0);
constexpr int TILE_CHUNKS = TILE_BYTES / 16;

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

static_assert(Q6K_BITS == 6 && Q6K_GROUP == 16 && !Q6K_MINIMUM, "what follows unpacks codes of 6 bits, groups of 16");

// Four groups (64 weights) of the rows g and g + 8, as a lane holds them.
struct LaneQuarter {
  u32 high[2][2];                   // [row half][pair of groups]: nibbles
  u32 low[2];                       // [row half]: pairs of bits
  u32 scales[2][STEPPED ? 1 : 2];   // [row half]: four bytes, or twice two bf16

  // Four times the four weights of a group, as signed bytes: 6-bit two's complement at the top of each byte.
  __device__ __forceinline__ u32 times_four(int h, int group) const {
    const u32 top = group & 1 ? high[h][group >> 1] : high[h][group >> 1] << 4;
    const u32 below = group == 0 ? low[h] << 2 : low[h] >> (2 * group - 2);
    return (top & 0xF0F0F0F0u) | (below & 0x0C0C0C0Cu);
  }

  // The four weights of a group plus 32, as bytes 0..63.
  __device__ __forceinline__ u32 plus_32(int h, int group) const {
    const u32 top = group & 1 ? high[h][group >> 1] >> 2 : high[h][group >> 1] << 2;
    const u32 below = ((low[h] >> (2 * group)) & 0x03030303u) | 0x20202020u;
    return (top & 0x3C3C3C3Cu) ^ below;
  }

#if Q6K_SCALES == SCALES_STEPPED
  // d * sub-scale, without rounding. A sub-scale byte b = sc + 128 in the mantissa of 2^15 reads 32768 + b, and
  // 32896 * d has 9 + 11 significant bits. A d that is infinite gives NaN.
  struct RowStep {
    float d, offset;
  };
  __device__ __forceinline__ static RowStep row_step(u32 fp16_bits) {
    const float d = fp16_to_float(fp16_bits);
    return {d, -32896.0f * d};
  }
  __device__ __forceinline__ float scale(int h, int group, const RowStep& row) const {
    return fmaf(__uint_as_float(__byte_perm(scales[h][0], 0x47000000u, 0x7404 | group << 4)), row.d, row.offset);
  }
#else
  struct RowStep {};
  __device__ __forceinline__ static RowStep row_step(u32) { return {}; }
  __device__ __forceinline__ float scale(int h, int group, const RowStep&) const {
    const u32 pair = scales[h][group >> 1];
    return __uint_as_float(group & 1 ? pair & 0xFFFF0000u : pair << 16);
  }
#endif

  // The four weights of a group times their scale, rounded once to 16 bits: elements (2t, 2t+1), (2t+8, 2t+9).
  //
  // 0x43uu is bf16 128 + u for u < 128. With bf16 scales the 6 + 8 bits of a product leave bf16's own
  // multiplication one rounding; otherwise fp32 holds the product whole (23 bits), and is rounded after.
  __device__ __forceinline__ void halves(int h, int group, const RowStep& row, u32 (&pairs)[2]) const {
    const u32 bytes = plus_32(h, group);
#if Q6K_SCALES == SCALES_BF16 && !Q6K_FP16
    const u32 biased[2] = {__byte_perm(bytes, 0x43434343u, 0x4140), __byte_perm(bytes, 0x43434343u, 0x4342)};
    const u32 both = scales[h][group >> 1];
    const u32 twice = group & 1 ? __byte_perm(both, both, 0x3232) : __byte_perm(both, both, 0x1010);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32 weights;
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(weights) : "r"(biased[i]), "r"(0x3F803F80u), "r"(0xC320C320u));
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pairs[i]) : "r"(weights), "r"(twice), "r"(0x80008000u));
    }
#else
    const float s = scale(h, group, row);
    const float offset = -160.0f * s;  // 3 + 18 bits: exact, and so is the sum, 6 + 18 bits
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // 0x43uu0000 is the same 128 + u in fp32.
      const float first = fmaf(__uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7044 | i << 9)), s, offset);
      const float second = fmaf(__uint_as_float(__byte_perm(bytes, 0x43000000u, 0x7144 | i << 9)), s, offset);
      pairs[i] = pack_halves(first, second);
    }
#endif
  }

  // From shared memory; quarter 0..3 of a tile.
  __device__ __forceinline__ void load(u32 tile, int lane, int quarter) {
    const int g = lane >> 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      load_shared_8(high[h], tile + (2 * h + (quarter >> 1)) * 512 + lane * 16 + (quarter & 1) * 8);
      low[h] = load_shared_4(tile + LOW_AT + h * 512 + lane * 16 + quarter * 4);
#if Q6K_SCALES == SCALES_STEPPED
      scales[h][0] = load_shared_4(tile + SCALES_AT + (g + 8 * h) * 16 + quarter * 4);
#else
      load_shared_8(scales[h], tile + SCALES_AT + (g + 8 * h) * 32 + quarter * 8);
#endif
    }
  }
};

__device__ __forceinline__ u32 load_step(u32 tile, int row) {  // fp16 bits; stepped scales only
  u16 bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(tile + STEPS_AT + row * 2) : "memory");
  return bits;
}

// All sixteen groups.
struct LaneTile {
  uint4 high[2][2];  // [row half][group half]
  uint4 low[2];      // [row half]
  uint4 scales[2][STEPPED ? 1 : 2];
  u32 step[2];       // fp16 bits; stepped scales only

  __device__ __forceinline__ void load(u32 tile, int lane) {
    const int g = lane >> 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      high[h][0] = load_shared_16(tile + (2 * h) * 512 + lane * 16);
      high[h][1] = load_shared_16(tile + (2 * h + 1) * 512 + lane * 16);
      low[h] = load_shared_16(tile + LOW_AT + h * 512 + lane * 16);
#if Q6K_SCALES == SCALES_STEPPED
      scales[h][0] = load_shared_16(tile + SCALES_AT + (g + 8 * h) * 16);
      step[h] = load_step(tile, g + 8 * h);
#else
      scales[h][0] = load_shared_16(tile + SCALES_AT + (g + 8 * h) * 32);
      scales[h][1] = load_shared_16(tile + SCALES_AT + (g + 8 * h) * 32 + 16);
      step[h] = 0;
#endif
    }
  }

  __device__ __forceinline__ LaneQuarter quarter(int q) const {
    LaneQuarter part;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      part.high[h][0] = word_of(high[h][q >> 1], (q & 1) * 2);
      part.high[h][1] = word_of(high[h][q >> 1], (q & 1) * 2 + 1);
      part.low[h] = word_of(low[h], q);
#if Q6K_SCALES == SCALES_STEPPED
      part.scales[h][0] = word_of(scales[h][0], q);
#else
      part.scales[h][0] = word_of(scales[h][q >> 1], (q & 1) * 2);
      part.scales[h][1] = word_of(scales[h][q >> 1], (q & 1) * 2 + 1);
#endif
    }
    return part;
  }
};
