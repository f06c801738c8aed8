// The words of CUDA C++ that csrc/ uses.
#pragma once

#include "emulator.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define gridDim (emulator::grid_size)
#define blockDim (emulator::block_size)

template <typename To, typename From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static inline float __uint_as_float(uint32_t v) { return bits_as<float>(v); }
static inline uint32_t __float_as_uint(float v) { return bits_as<uint32_t>(v); }
static inline int __float_as_int(float v) { return bits_as<int>(v); }
static inline float __int_as_float(int v) { return bits_as<float>(v); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
template <typename A, typename B>
static inline auto min(A a, B b) { return b < a ? b : a; }
template <typename A, typename B>
static inline auto max(A a, B b) { return a < b ? b : a; }

// Element i of the result is byte `selector >> 4i & 7` of the eight, or with bit 3 of its index that byte's sign.
static inline uint32_t emulated_permutation(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> 4 * i & 7;
    uint32_t byte = bytes >> 8 * which & 0xFF;
    if (selector >> 4 * i & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}
static inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  return emulated_permutation(low, high, selector & 0x7777);
}
static inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += (int8_t)((uint32_t)a >> i) * (int8_t)((uint32_t)b >> i);
  return c;
}

static inline size_t __cvta_generic_to_shared(const void* pointer) { return emulator::to_shared_address(pointer); }
[[noreturn]] static inline void __trap() { emulator::fail("trap"); }
static inline void __syncthreads() { emulator::synchronize_block(); }
static inline void __syncwarp(uint32_t mask = ~0u) {
  if (mask != ~0u) emulator::fail("__syncwarp of a part of a warp");
  int nothing = 0;
  emulator::together("__syncwarp", nothing, [](int**) {});
}

template <typename T, typename Source>
static inline T emulated_shuffle(const char* operation, uint32_t mask, T value, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32 or 64 bits");
  if (mask != ~0u) emulator::fail("a shuffle of a part of a warp");
  struct Operand { T value, result; int source; } operand{value, value, source(emulator::current->number % 32)};
  emulator::together(operation, operand, [](Operand** all) {
    for (int lane = 0; lane < 32; ++lane) all[lane]->result = all[all[lane]->source]->value;
  });
  return operand.result;
}
template <typename T>
static inline T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  return emulated_shuffle("__shfl_sync", mask, value,
                          [=](int lane) { return (lane & ~(width - 1)) | (from & (width - 1)); });
}
template <typename T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  if (width != 32) emulator::fail("__shfl_xor_sync of a width");
  return emulated_shuffle("__shfl_xor_sync", mask, value, [=](int lane) { return lane ^ bits; });
}
template <typename T>
static inline T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32) {
  return emulated_shuffle("__shfl_down_sync", mask, value,
                          [=](int lane) { return (lane & (width - 1)) + by < width ? lane + by : lane; });
}

template <typename Pick>
static inline uint32_t emulated_reduction(const char* operation, uint32_t value, uint32_t mask, Pick pick) {
  if (mask != ~0u) emulator::fail("a reduction of a part of a warp");
  emulator::together(operation, value, [=](uint32_t** all) {
    uint32_t found = *all[0];
    for (int lane = 1; lane < 32; ++lane) found = pick(found, *all[lane]);
    for (int lane = 0; lane < 32; ++lane) *all[lane] = found;
  });
  return value;
}
static inline int __all_sync(uint32_t mask, int of_lane) {
  return emulated_reduction("__all_sync", of_lane != 0, mask, [](uint32_t a, uint32_t b) { return a & b; });
}

#define __expf expf  // which the C library has declared another way
#define __log2f log2f
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
