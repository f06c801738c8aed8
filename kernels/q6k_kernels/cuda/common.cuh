// What every kernel shares: conversions, copies, and the few instructions CUDA C++ has no name for.
//
// Device code here includes nothing, so that run-time compilation needs no header and caches by text alone.
// Kernels are specialised by macros, all integers:
//   Q6K_BITS, Q6K_OFFSET, Q6K_BOOK, Q6K_GROUP, Q6K_MINIMUM, Q6K_SCALES    the weight type, a row of formats/types.py: bits
//               of a stored code, what is subtracted from it, its code book, weights of a group, whether a group has a
//               minimum, and the kind of its scale
//   Q6K_FP16    0: activations and outputs are bf16; 1: fp16

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

constexpr int SUPER_BLOCK = 256;

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

__device__ __forceinline__ float rounded(float value) { return half_to_float(to_half(value)); }

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000u); }

__device__ __forceinline__ float largest_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int apart = 16; apart; apart >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
  return value;
}

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

__device__ __forceinline__ u32 word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ u32 load_shared_2(u32 address) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ u32 load_shared_4(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// A policy for bytes that are read once: they leave the L2 cache first, which keeps what launches pass to each other.
__device__ __forceinline__ u64 evict_first() {
#if __CUDA_ARCH__ == 900
  return 0x12F0000000000000ull;  // what the instruction makes, as a constant: registers would be copied for each use
#else
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#endif
}

__device__ __forceinline__ void copy_async_16(u32 to_shared, const void* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from), "l"(policy)
               : "memory");
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
